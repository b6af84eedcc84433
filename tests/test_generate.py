"""What is computed: which attention, which prompts, which components; and what mistakes lead to."""

import gc
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import maps_of
from torch.nn.attention import SDPBackend

import generate
import pipeline
from errors import InputError
from extensions.attention_maps import AttentionMaps
from model.clip import CLIPTextEncoder
from model.t5 import T5Encoder
from model.tokenizers import T5Tokenizer
from model.transformer import Flux, FluxParams
from regional.attention import dense_attention, portable_attention
from regional.layout import Layout
from regional.mask import RegionTokens
from regional.reader import read_layout
from runtime import choose
from runtime.unmasked import kernel_or_library
from settings import Settings
from tools.flags import GROUPS, parse
from tools.metadata import run_metadata

ROOT = Path(__file__).parent.parent
BOAT = {"prompt": "a red boat", "box": [0, 0, 48, 64]}
TOWER = {"prompt": "a lighthouse", "box": [32, 16, 96, 48]}
WHOLE = {"prompt": "a red boat", "box": [0, 0, 96, 64]}
A = {
    "prompt": "a harbor at dawn", "background_prompt": "the sea", "width": 96, "height": 64, "seed": 3,
    "steps": 3, "mask_inject_steps": 2, "max_sequence_length": 32, "regions": [BOAT, TOWER],
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_pipeline(golden):
    return pipeline.Pipeline(golden / "models" / "flux-tiny-dev", device="cpu")


@pytest.fixture(scope="module")
def latents(tiny_pipeline):
    """latents(key=value ...) denoises A with these keys changed."""

    def latents(**changes) -> torch.Tensor:
        layout = read_layout(None, A | changes)
        return tiny_pipeline.denoise(tiny_pipeline.prepare(layout), layout.seed)

    return latents


@pytest.fixture(scope="module")
def published(latents):
    return latents()


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().max().item()


def test_no_regions_no_steps_and_beta_one_are_plain_flux_bit_for_bit(latents, published):
    plain = latents(regions=[])
    assert plain.shape == (1, 16, 8, 12) and plain.dtype == torch.float32
    ways = {"mask_inject_steps": 0}, {"base_ratio": 1}, {"method": "plain"}, {"method": "rpg", "base_ratio": 1}
    assert all(torch.equal(plain, latents(**changes)) for changes in ways)
    assert not torch.equal(plain, published)


def test_sorting_the_tokens_changes_nothing_but_their_order(latents, published, monkeypatch):
    tokens = RegionTokens.sorted
    monkeypatch.setattr(RegionTokens, "sorted", lambda self: (self, torch.arange(len(self.image_bits))))
    assert 0 < distance(published, latents()) < 1e-5
    # Bits in another order than the tokens' would be wrong.
    monkeypatch.setattr(RegionTokens, "sorted", lambda self: (self, tokens(self)[1]))
    assert distance(published, latents()) > 1e-2


def test_what_has_no_effect(latents, published):
    """The regions' order; the background where nothing is uncovered; rpg in place of one image, where its one
    region is the whole image, at base_ratio 0 and in all steps."""
    assert distance(published, latents(regions=[TOWER, BOAT])) < 1e-5
    other = latents(regions=[WHOLE], background_prompt="the desert")
    assert torch.equal(latents(regions=[WHOLE]), other)
    composed = latents(regions=[WHOLE], method="rpg", base_ratio=0, mask_inject_steps="100%")
    assert distance(composed, latents(prompt="a red boat", regions=[])) < 1e-5


def test_defaults_written_out_change_nothing(latents, published):
    """Strength 1, no feather, the layout's own steps and ratio: the published method to the bit."""
    own = {"strength": 1, "feather": 0, "mask_inject_steps": 2, "base_ratio": 0.3}
    more = {"image_attention": "isolated", "base_stream": "separate", "region_max_sequence_length": 32}
    more |= {"double_blocks": "every 1", "single_blocks": "0-99"}
    assert torch.equal(published, latents(**more, regions=[BOAT | own, TOWER | own]))
    assert not torch.equal(published, latents(region_max_sequence_length=8))


def test_defaults_of_steps_and_prompt_length_come_from_the_model(golden, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "sample", lambda flux, layout, *rest: seen.append(layout))
    for name in ("dev", "schnell"):
        tiny = pipeline.Pipeline(golden / "models" / f"flux-tiny-{name}", device="cpu")
        tiny.denoise(tiny.prepare(Layout(prompt="a harbor", width=96, height=64)), 1)
    assert [(layout.steps, layout.max_sequence_length) for layout in seen] == [(24, 512), (4, 256)]


def test_the_encoders_are_gone_before_the_transformer_and_it_before_the_vae(run, monkeypatch):
    alive = {}
    load = pipeline.Parts.load

    def models() -> set[int]:
        gc.collect()
        return {id(x) for x in gc.get_objects() if type(x) in (T5Encoder, CLIPTextEncoder, Flux)}

    before = models()  # other tests' models, kept by fixtures

    def loading(self, name, *rest):
        alive[name] = models() - before
        return load(self, name, *rest)

    monkeypatch.setattr(pipeline.Parts, "load", loading)
    assert run("--prompt", "a fox", "--width", 64, "--height", 64, "--steps", 1).made == ["picture.png"]
    assert alive["flux"] == alive["ae"] == set() and {"t5", "clip"} <= alive.keys()


def test_a_pipeline_takes_settings_or_their_fields(model, tiny_pipeline):
    settings = Settings(model=model, device="cpu")
    assert tiny_pipeline.settings == settings
    assert generate.Pipeline is pipeline.Pipeline
    assert run_metadata(pipeline.Pipeline(settings)) == run_metadata(tiny_pipeline)
    with pytest.raises(TypeError, match="dtipe"):
        pipeline.Pipeline(model, dtipe="float32")
    wrong = {"dtype": "float16", "attention": "x", "quantize": "fp9", "offload": "block"}
    for name, value in wrong.items():
        with pytest.raises(InputError, match=f"--{name} {value}"):
            pipeline.Pipeline(model, **{name: value})


def code_in(language: str) -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return [part.split("```")[0] for part in readme.split(f"```{language}\n")[1:]]


def test_the_readmes_layout_commands_and_library_example_are_valid(run, monkeypatch):
    Path("layout.yaml").write_text(code_in("yaml")[0], encoding="utf-8")
    ran = run("--layout", "layout.yaml", "--steps", 3, model=None)
    assert ran.code == 0 and Image.open(ran.made[0]).size == (256, 256)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(code_in("python")[0], names)
    assert names["image"].size == (256, 256)
    commands = [shlex.split(line, comments=True) for block in code_in("sh") for line in block.splitlines()]
    ours = [command[2:] for command in commands if command[:2] == ["python", "generate.py"]]
    assert ["--layout", "layout.yaml"] in ours and len(ours) >= 3
    assert all(file.exists() for flags in ours for file in parse(flags).output.layout)
    assert run("--layout", "layout.yaml", "--check", model=None).code == 0


@pytest.fixture
def kernel():
    """The kernel's module, in Triton's interpreter (see conftest.py)."""
    module = pytest.importorskip("regional.kernel")
    if not module.INTERPRETED:
        pytest.skip("there is a GPU")
    return module


def test_the_kernel_generates_what_the_portable_attention_does(tiny_pipeline, model, kernel):
    short = {"region_max_sequence_length": 8, "steps": 1, "mask_inject_steps": 1}
    prepared = tiny_pipeline.prepare(read_layout(None, A | short))
    other = pipeline.Pipeline(model, device="cpu", attention="kernel")
    assert 0 < distance(other.denoise(prepared, 1), tiny_pipeline.denoise(prepared, 1)) < 1e-5


def test_attention_may_be_a_function(model, tiny_pipeline):
    """It makes the masked attention of tokens, as portable_attention does; images record its name."""
    made = []

    def mine(tokens):
        made.append(len(tokens.bits))
        return dense_attention(tokens)

    own = pipeline.Pipeline(model, device="cpu", attention=mine)
    dense = pipeline.Pipeline(model, device="cpu", attention="dense")
    prepared = tiny_pipeline.prepare(read_layout(None, A))
    assert torch.equal(own.denoise(prepared, 1), dense.denoise(prepared, 1))
    assert made == [3 * 32 + 32 + 24, 3 * 32 + 32 + 2 * 24]  # in double blocks, in single blocks
    assert run_metadata(own)["attention"].endswith("test_attention_may_be_a_function.<locals>.mine")
    assert own.settings.attention == "auto" and "attention" not in run_metadata(tiny_pipeline)
    assert pipeline.Pipeline(Settings(model=model, device="cpu"), attention=mine).attention is mine
    with pytest.raises(InputError, match="--attention mine: expected one of auto"):
        pipeline.Pipeline(model, attention="mine")


def test_which_attention_is_chosen(monkeypatch, kernel):
    def chosen(name: str, device: str):
        return choose.choose_attention(name, torch.device(device), torch.bfloat16, False)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert chosen("auto", "cuda").func is chosen("kernel", "cuda").func is kernel_or_library
    for how in ("auto", "mps"), ("auto", "cpu"), ("portable", "cuda"):
        assert chosen(*how) is portable_attention
    assert chosen("dense", "cuda") is dense_attention
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen("auto", "cuda") is portable_attention
    with pytest.raises(InputError, match="Ampere"):
        chosen("kernel", "cuda")


def test_the_librarys_fastest_attention_is_preferred(monkeypatch):
    """On a GPU; here a tensor that claims to be on one. The base branch's shape is timed."""
    asked = []
    fastest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]
    txt = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 32, 8))
    monkeypatch.setattr(choose, "timed_backends", lambda *args: asked.append(args) or fastest)
    monkeypatch.setattr(choose, "sdpa_kernel", lambda backends, set_priority: backends)
    flux = SimpleNamespace(params=FluxParams(hidden_size=64, num_heads=2))
    chosen = choose.library_attention(flux, Layout(prompt="", width=96, height=64), txt, False)
    assert chosen == [*fastest, SDPBackend.MATH]
    assert asked == [((1, 2, 32 + 24, 32), torch.bfloat16, torch.device("cuda"))]


@pytest.fixture
def layout(tmp_path) -> str:
    (tmp_path / "layout.yaml").write_text(json.dumps(A | {"steps": 2, "mask_inject_steps": 1}))
    return "layout.yaml"


def test_the_kernel_is_refused_where_it_cannot_run(run, layout, monkeypatch, kernel):
    def refused(words: str, dtype: str = "float32") -> bool:
        ran = run("--layout", layout, "--attention", "kernel", "--dtype", dtype)
        return ran.code == 2 and words in ran.errors[-1] and not list(Path().glob("*.png"))

    assert refused("--attention kernel", "bfloat16")
    monkeypatch.setattr(kernel, "INTERPRETED", False)
    assert refused("--attention kernel")
    monkeypatch.delattr("regional.kernel", raising=False)
    monkeypatch.setitem(sys.modules, "regional.kernel", None)
    assert refused("Triton is missing")


def test_attention_maps_are_fractions_inside_the_regions(run, layout):
    """Observing changes nothing."""
    flags = ["--layout", layout, "--output", "z.png", "--overwrite", "--save-latents", "z.safetensors"]
    assert run(*flags).code == 0
    plain = load_file("z.safetensors")["latents"]
    assert run(*flags, "--attention-maps", "maps").code == 0
    assert torch.equal(plain, load_file("z.safetensors")["latents"])
    maps = load_file("maps/z.safetensors")["maps"]
    assert maps.shape == (1, 5, 3, 24)  # steps; 2 double and 3 single blocks; prompts; tokens
    assert maps.min() >= 0 and maps.sum(2).max() <= 1.001
    assert Image.open("maps/z_step1.png").size[0] == 5 * 96 + 4 * 8
    assert not Path("maps/z_step2.png").exists()
    assert run(*flags, "--attention-maps", "ten", "--steps", 10, "--mask-inject-steps", 10).code == 0
    steps = [f"z_step{i:02}.png" for i in range(1, 11)]
    assert sorted(path.name for path in Path("ten").glob("*.png")) == steps
    assert AttentionMaps(7, 0).groups == ["double 0-2", "double 3-4", "double 5-6"]
    Path("maps/a_step7.png").write_text("mine")
    flags = ["--layout", layout, "--attention-maps", "maps"]
    assert run(*flags, "--output", "a.png").code == 2 and not Path("a.png").exists()
    ran = run(*flags, "--output", "b.png", "--method", "plain")
    assert ran.code == 0 and "no attention maps" in ran.errors[2] and not Path("maps/b.safetensors").exists()


def test_attention_maps_of_a_repainted_image_of_another_size_show_it_at_the_layouts(run, layout):
    Image.new("RGB", (160, 80), "red").save("start.png")
    given = json.loads(Path(layout).read_text()) | {"image": {"file": "start.png", "repaint": {"regions": [0]}}}
    Path(layout).write_text(json.dumps(given))
    assert run("--layout", layout, "--output", "z.png", "--attention-maps", "maps").code == 0
    assert Image.open("z.png").size == (160, 80)
    sheet = Image.open("maps/z_step1.png")
    assert sheet.size[0] == 5 * 96 + 4 * 8 and load_file("maps/z.safetensors")["maps"].shape[-1] == 24


def test_attention_maps_have_one_entry_for_a_step_of_two_evaluations(tiny_pipeline):
    """That of the first."""
    found = []
    for sampler in "euler", "heun":
        maps = maps_of(tiny_pipeline)
        prepared = tiny_pipeline.prepare(read_layout(None, A | {"sampler": sampler}))
        tiny_pipeline.denoise(prepared, 3, [maps.extend])
        found.append(maps.maps)
    assert found[0].shape == found[1].shape == (2, 5, 3, 24)
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], found[1][1])


@pytest.mark.published
@pytest.mark.parametrize("strength", [0, 1])
def test_a_prompt_gets_attention_in_its_region_unless_it_has_no_strength(tiny_pipeline, strength):
    layout = read_layout(None, A | {"regions": [{**BOAT, "strength": strength}, TOWER]})
    maps = maps_of(tiny_pipeline)
    tiny_pipeline.denoise(tiny_pipeline.prepare(layout), 3, [maps.extend])
    left = torch.arange(24) % 6 < 3
    assert (maps.maps[:, :, 0] > 0).eq(left & (strength > 0)).all() and maps.maps[:, :, 1].any()


def test_a_flag_overrides_the_layout_and_what_is_automatic_is_reported(run, layout, latents):
    flags = ["--output", "z.png", "--save-latents", "z.safetensors", "--verbose"]
    ran = run("--layout", layout, *flags, "--steps", 3, "--mask-inject-steps", 2, "--seed", 9)
    assert ran.code == 0 and torch.equal(load_file("z.safetensors")["latents"], latents(seed=9))
    assert {"masked attention: portable", "unmasked attention: as torch chooses"} <= {*ran.errors}


def test_a_cut_prompt_is_reported_with_the_first_words_that_are_cut(tiny_pipeline, capsys):
    prompt = "one two three four five six " * 10 + "and a swan"
    t5 = T5Tokenizer(tiny_pipeline.checkpoint.t5_tokenizer)
    for length in 32, len(t5.encode(prompt)[0]):
        (cut,) = t5([prompt], length)[1]
        tiny_pipeline.prepare(read_layout(None, A | {"prompt": prompt, "max_sequence_length": length}))
        (line,) = [line for line in capsys.readouterr().err.splitlines() if f"{length} tokens" in line]
        assert line.startswith("warning: ") and cut[:60] in line and len(line) < 200, (line, cut)


def test_tokenizers_of_another_model_are_refused(run, golden):
    shutil.copytree(golden / "models" / "flux-tiny-dev", "mixed")
    file = Path("mixed/tokenizer/vocab.json")
    vocab = json.loads(file.read_text())
    file.write_text(json.dumps(vocab | {"<|endoftext|>": vocab["<|endoftext|>"] + 1000}))
    ran = run("--prompt", "a fox", "--output", "a.png", model="mixed")
    assert ran.code == 2 and "tokenizer" in ran.errors[-1] and "don't match" in ran.errors[-1]


MISTAKES = """\
--flux cut.safetensors: 100,000
--flux pointer.safetensors: git-lfs
--flux model.ckpt: pickle
--flux lora.safetensors: LoRA
--flux gone.safetensors: --flux
--ae MODEL/flux1-dev.safetensors: --ae
--model empty: --model
--model nowhere: --model
--output a.gif: --output
--output model.ckpt/a.png: is no folder to write it to
--output folder.png --overwrite: folder.png
--output LONG.png: no file of this name
--save-latents z.png: --save-latents
--seed -4: --seed
--width 1000: width"""


def test_mistakes_end_with_code_two_and_one_sentence(run, layout, model):
    """Each message has the value, up to the first blank, and the words after the colon."""
    Path("cut.safetensors").write_bytes(Path(model, "flux1-dev.safetensors").read_bytes()[:100000])
    Path("pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Path("model.ckpt").write_bytes(b"PK\x03\x04")
    save_file({"lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": torch.zeros(4, 4)}, "lora.safetensors")
    Path("empty").mkdir()
    Path("folder.png").mkdir()
    for line in MISTAKES.replace("MODEL", model).replace("LONG", "x" * 252).splitlines():
        command, words = line.split(": ")
        flags = command.split()
        code, made, errors = run("--layout", layout, *flags, model=model if "--model" not in flags else None)
        assert code == 2 and made == [] and errors[-1].startswith("generate.py: "), line
        assert words in errors[-1] and Path(flags[1]).name in errors[-1], errors
    assert [str(path) for path in Path().glob("*.png")] == ["folder.png"]


@pytest.mark.parametrize("device", ["gpu"] + ["cuda:1"] * (not torch.cuda.is_available()))
def test_a_device_that_is_not_there_is_an_error(device, capsys):
    assert generate.main(["--prompt", "x", "--device", device]) == 2
    assert f"generate.py: --device {device}: " in capsys.readouterr().err


WRONG_FLAGS = {
    "--stepz 3": "--stepz: no such flag, did you mean --steps",
    "--widht=256": "--widht: no such flag, did you mean --width",
    "layout.yaml": "layout.yaml: no such flag, did you mean --layout",
    "--prompt x 3": "3: no such flag",
    "--steps three": "--steps: invalid int value: 'three'",
    "--width": "--width: expected one argument",
    "--overlap topmost": "--overlap: invalid choice: 'topmost'",
    "": "give a --layout, or at least a --prompt",
}
for text in "-4", "5-1", "1-x", "1,2", "0-9999999":
    WRONG_FLAGS[f"--seed {text}"] = f"--seed: expected seeds, such as 1 2 3 or 1-90, not {text}"


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_a_wrong_flag_is_one_sentence_without_the_usage(flags, run):
    code, _, (line,) = run("--device", "cpu", *flags.split(), model=None)
    assert code == 2 and line.startswith(f"generate.py: {WRONG_FLAGS[flags]}") and line.endswith("see --help.")


def test_seeds_are_numbers_and_ranges():
    flags = ["--prompt", "x", "--seed", "7", "1-3", "--seed", "9-9"]
    assert parse(flags).output.seed == (7, 1, 2, 3, 9) and parse(flags[:2]).output.seed == ()


def test_help_has_all_flags_in_named_groups(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    usage, *groups = re.split(r"\n\n(?=[^\n]+:\n)", text)
    assert len(usage.splitlines()) < 5
    titles = {group.split(":")[0]: re.findall(r"^  (--[\w-]+)", group, re.M) for group in groups}
    assert {*titles} == {"options", *GROUPS.values()}
    assert titles["what is drawn"][0] == "--prompt" and "--width" in titles["what is drawn"]
    assert {"--mask-inject-steps", "--region-max-sequence-length"} <= {*titles["how regions are kept apart"]}
    assert "--controlnet" in titles["a ControlNet and LoRAs, which replace the layout's"]
