"""What --check and a run say before the work begins: what the model can't do, and how long it takes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_tokenizers import PROMPTS, T5_JSON, T5_PIECES

import weights
from formats.known import doubts, known_of
from model.tokenizers import T5Tokenizer
from pocket import export
from pocket.latents import CANVASES
from pocket.scenes import caption, random_scene
from regional.layout import FLUX_DEV, Control, Layout, Region, RegionLora
from regional.mask import region_tokens
from regional.reader import read_layout
from settings import Settings
from tools.cost import plain_flops, resolved, stages
from tools.metadata import keep_timing

ROOT = Path(__file__).parent.parent
POCKET = weights.find("pocket")
EXAMPLES = [ROOT / "layout.yaml", *sorted((ROOT / "examples").glob("*.yaml"))]
SIZE = {"width": 256, "height": 256}


def said(*prompts: str, flux=None, t5=None, **keys) -> list[str]:
    """Of a layout for each prompt."""
    layouts = [Layout(prompt=prompt, **SIZE | keys).resolved(FLUX_DEV) for prompt in prompts]
    return list(doubts(layouts, flux, t5))


def of_pocket(*prompts: str, **keys) -> list[str]:
    return said(*prompts, flux=POCKET.flux, t5=T5Tokenizer(POCKET.t5_tokenizer), **keys)


def test_the_pocket_model_knows_the_words_and_sizes_that_it_was_trained_on():
    known = known_of(POCKET.flux)
    rng = np.random.default_rng(0)
    captions = [caption(rng, random_scene(rng, 256, 256, 8)) for _ in range(200)] + ["a photo"]
    words = {word for text in captions for word in re.findall(r"\w+", text)}
    assert words == set(sum(known.words.values(), [])) and of_pocket(*captions, known.example) == []
    assert all(of_pocket("a photo", width=width, height=height) == [] for width, height in CANVASES)
    written = json.loads((ROOT / "pocket" / "checkpoint" / "config.json").read_text())
    assert written == {"known": export.known()}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_of_the_examples_only_what_is_for_flux_has_unknown_words(file):
    layout = read_layout(file, {}, 256).resolved(FLUX_DEV)
    found = list(doubts([layout], POCKET.flux, None))
    beyond = "pixels: the model was trained on 64 to 256 pixels a side."
    size = [f"{layout.width} x {layout.height} {beyond}"] if layout.width > 256 else []
    assert found[: len(size)] == size
    words = found[len(size) :]
    if file.stem == "flux_dev":
        (text,) = words
        assert "not learned the words lighthouse, keeper, stands," in text and "more; it draws such as 'a str" in text
    else:
        assert words == []


def test_words_and_sizes_beyond_the_pocket_model_are_named_once_each():
    (words,) = of_pocket("a cat in a hat", "a Red circle", "a cat, (plain) blue star!", "ein roter Kreis, 日本 🦊")
    assert words.startswith("the model has not learned the words cat, in, hat, Red, ein, roter, Kreis, 日本, 🦊; ")
    for width, height in (272, 64), (64, 272), (48, 256), (512, 512):
        (size,) = of_pocket("a photo", "a photo", width=width, height=height)
        assert size.startswith(f"{width} x {height} pixels: ")


def test_flux_is_made_for_a_tenth_to_two_megapixels():
    for width, height in (256, 256), (1024, 1024), (1920, 1088), (4096, 512), (16, 4096):
        assert said("a cat", width=width, height=height) == []
    for width, height in (256, 240), (8192, 8192), (2048, 1040):
        (size,) = said("a cat", width=width, height=height)
        assert size == f"{width} x {height} pixels: the model was trained on about 0.1 to 2 megapixels."


@pytest.mark.parametrize("path", [T5_JSON, T5_PIECES])
def test_characters_are_named_exactly_where_t5_reads_an_unknown_token(path):
    t5 = T5Tokenizer(path)
    lacking = 0
    for prompt in filter(str.strip, PROMPTS):
        found = [text for text in said(prompt, t5=t5) if "can't read" in text]
        assert len(found) == (t5.unknown in t5.encode(prompt)[0]), prompt
        lacking += len(found)
    assert 0 < lacking < len(PROMPTS)
    (found,) = said("a fox 日本", "a 🦊 in 日本", t5=t5)
    assert found == "the model can't read 日, 本, 🦊, which T5's vocabulary lacks."


FOREIGN = {
    "a (red hat:1.3), ((a cat):.5) and <lora:ink-v2:0.8>": ["(red hat:1.3)", "<lora:ink-v2:0.8>", "strength, loras"],
    "embedding:easynegative, a cat": ["embedding:easynegative: FLUX", "description"],
    "a cat BREAK a dog": ["BREAK:", "use regions instead"],
    "two\nADDCOL a fox AND a swan": ["ADDCOL, AND", "use regions instead"],
}
PLAIN = [
    "a ratio of (3:2)", "a cat (a very old one) at (10:30), in (a: b)", "a sign that says SALT AND PEPPER", "a (cat)",
    "the score 2:1", "a plain and simple star", "a < b > c", "an embedding", "BREAKING news", "a cat (1:1.5)", "A AND",
]  # fmt: skip


@pytest.mark.parametrize("prompt", FOREIGN)
def test_other_programs_syntax_is_named_with_what_to_use_instead(prompt):
    (text,) = said(prompt)
    assert all(part in text for part in FOREIGN[prompt]) and text.endswith(" instead."), text
    region = Region(prompt=prompt, box=(0, 0, 64, 64))
    assert said(*["a cat"] * 30, regions=(region,)) == [text]


@pytest.mark.parametrize("prompt", PLAIN)
def test_ordinary_parentheses_and_capitals_are_no_syntax(prompt):
    assert said(prompt) == []


def test_an_empty_prompt_is_named():
    assert said("", " ", "a cat") == ["prompt is empty: nothing says what the whole image shows."]


def test_many_doubts_are_short_sentences():
    texts = said(*(f"(x{'y' * i}:1.5)" for i in range(100)), "")
    texts += [text for n in range(1, 40) for text in said("a", width=16 * n, height=16)]
    texts += of_pocket(" ".join(f"w{i}x" for i in range(1000)))
    assert all(text.endswith(".") and len(text) < 300 for text in texts) and " and 90 more" in texts[1]


def test_a_run_says_it_once_before_the_first_step_and_check_for_each_layout(run):
    for i in range(3):
        Path(f"l{i}.yaml").write_text("{prompt: a cat, seed: 1, width: 272, height: 64}")
    ran = run("--layout", ".", "--steps", 2, "--seed", "1-2", "--output", "{name}_{seed}.png", model=None)
    first = next(i for i, line in enumerate(ran.errors) if "first step" in line)
    doubted = [i for i, line in enumerate(ran.errors) if line.startswith("warning: ")]
    assert len(ran.made) == 6 and len(doubted) == 2 and max(doubted) < first
    ran = run("--layout", ".", "--check", model=None)
    assert ran.code == 0 and sum("272 x 64 pixels" in line for line in ran.errors) == 3
    assert sum("words cat;" in line for line in ran.errors) == 3
    assert run("--prompt", "a cat", "--check", model="org/name").code == 0  # nothing of it is here


def test_previews_of_one_name_do_not_replace_each_other(run):
    for name in "x", "y":
        Path(name).mkdir()
        Path(name, "a.yaml").write_text("{prompt: a red cube, width: 64, height: 64}")
    ran = run("--layout", "x", "y", "--preview", "p.png", "--overwrite")
    assert ran.code == 2 and "p_a.png: several layouts would have this name" in ran.errors[-1]


def test_a_damaged_list_of_what_a_model_knows_is_a_mistake(run, model):
    Path(model, "config.json").write_text('{"known": {"words": ["cat"]}}')
    try:
        ran = run("--prompt", "a cat", "--check")
    finally:
        Path(model, "config.json").unlink()
    assert ran.code == 2 and "config.json: damaged" in ran.errors[-1]


STARTED = ("--prompt", "a secret fox", "--width", 64, "--height", 64, "--steps", 5)


@pytest.fixture
def timings(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "regional_flux" / "timings.json"


def estimate(run, *flags, **model) -> str:
    ran = run(*flags, "--check", **model)
    assert ran.code == 0
    return " ".join(ran.made).partition("steps: about ")[2]


def change(timings: Path, **values) -> None:
    runs = json.loads(timings.read_text())
    timings.write_text(json.dumps({key: timing | values for key, timing in runs.items()}))


def test_check_tells_seconds_and_memory_by_what_a_run_of_this_model_took(run, model, timings):
    assert estimate(run, *STARTED) == "" and not timings.exists()
    assert run(*STARTED).code == 0 and run(*STARTED, "--seed", 3).code == 0
    assert "secret" not in timings.read_text()
    (timing,) = json.loads(timings.read_text()).values()
    assert 0 < timing["seconds"] < 60 and timing["memory"] == torch.cuda.max_memory_allocated()
    change(timings, seconds=100, memory=0)  # of 4 steps
    assert estimate(run, *STARTED) == "125 s, from a run of 64 x 64 here"
    change(timings, memory=2 * 10**9)
    assert estimate(run, *STARTED) == "125 s and 2.0 GB on the GPU, from a run of 64 x 64 here"
    change(timings, seconds=8000)
    assert estimate(run, *STARTED).startswith("3 hours and 2.0 GB")
    change(timings, seconds=100)
    params = weights.flux_params(weights.find(model).flux)
    seconds = 125 * plain_flops(params, 512, 256) / plain_flops(params, 512, 16)
    assert estimate(run, *STARTED, "--width", 256, "--height", 256) == f"{seconds:.0f} s, from a run of 64 x 64 here"
    assert estimate(run, *STARTED, "--dtype", "bfloat16") == estimate(run, *STARTED, model=None) == ""


def test_regional_steps_count_by_their_flops(run, model, timings):
    region = {"prompt": "a secret", "box": [0, 0, 32, 64]}
    keys = {"prompt": "x", "width": 64, "height": 64, "mask_inject_steps": 2, "regions": [region]}
    Path("a.yaml").write_text(json.dumps(keys))
    assert run("--layout", "a.yaml", "--steps", 5).code == 0 and "secret" not in timings.read_text()
    change(timings, seconds=100)
    params = weights.flux_params(weights.find(model).flux)
    layout = resolved(read_layout(Path("a.yaml"), {"steps": 5}), params)
    (_, regional, _), (_, plain, _) = stages(layout, params, region_tokens(layout))
    assert regional > 1.2 * plain
    second = 100 / (regional + 3 * plain)
    assert estimate(run, *STARTED).startswith(f"{5 * plain * second:.0f} s, ")
    assert estimate(run, "--layout", "a.yaml", "--steps", 5).startswith(
        f"{(2 * regional + 3 * plain) * second:.0f} s, "
    )


def test_runs_are_kept_by_size_the_newest_fifty_and_never_in_the_way(run, timings, monkeypatch):
    run(*STARTED)
    (timing,) = json.loads(timings.read_text()).values()
    timings.write_text(json.dumps({str(i): timing for i in range(60)}))
    run(*STARTED, "--width", 80)
    kept = [*json.loads(timings.read_text())]
    assert kept[:-1] == [str(i) for i in range(11, 60)] and kept[-1].endswith(" 80 x 64")
    for text in "{", "[]", '{"x": {"seconds": 1}}':
        timings.write_text(text)
        assert estimate(run, *STARTED) == "" and timings.read_text() == text
        assert run(*STARTED).code == 0 and estimate(run, *STARTED)
    file = timings.with_name("file")
    file.write_text("mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    ran = run(*STARTED)
    assert (
        ran.code == 0 and len(ran.made) == 1 and not [line for line in ran.errors if "mine" in line or "file" in line]
    )
    assert file.read_text() == "mine"


def test_what_is_not_in_the_flops_is_not_kept(timings):
    control = Control(model="x", image="y")
    region = Region(prompt="x", box=(0, 0, 64, 64), loras=(RegionLora(file="z"),))
    for keys in {"controlnets": (control,)}, {"regions": (region,)}, {"steps": 1}:
        keep_timing(Settings(), Layout(prompt="x", **SIZE | keys).resolved(FLUX_DEV), 2.0)
        assert not timings.exists()
    keep_timing(Settings(), Layout(prompt="x", steps=2, **SIZE).resolved(FLUX_DEV), 3.0)
    (timing,) = json.loads(timings.read_text()).values()
    assert timing["seconds"] == 3
