"""Runs again: what --update draws, what another folder or version changes, progress and logs, replay, --decode."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from PIL import Image
from safetensors.torch import save_file
from test_batch import BOAT, MASKED, counts, kept, settings_of, write, write_mask

from model.transformer import Flux
from tools import compare, jobs, metadata
from tools.flags import parse

OUT = ["--output", "out/{name}_{seed}.png"]
BATCH = ["--layout", "layouts", "--seed", 1, 2, *OUT]
NAMES = [f"out/{name}_{seed}.png" for name in "abc" for seed in (1, 2)]


def write_batch() -> None:
    for name in "abc":
        write(f"layouts/{name}.yaml", prompt=f"a harbor, {name}", steps=1)


def times() -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in Path("out").iterdir()}


def recorded_without(name: str, *keys: str) -> None:
    """An image as a version that did not know these keys made it."""
    found = {key: value for key, value in settings_of(name).items() if key not in keys}
    metadata.save_image(Image.open(name), found, Path(name))


def test_update_draws_again_what_a_changed_layout_drew_and_nothing_else(run, monkeypatch):
    write_batch()
    assert counts(run(*BATCH)) == (6, 0, 0)
    write("layouts/b.yaml", prompt="another harbor", steps=1)
    before = times()
    ran = run(*BATCH)
    assert ran.code == 1 and counts(ran) == (0, 4, 2) and times() == before
    assert sum("prompt 'a harbor, b', now 'another harbor'" in error for error in ran.errors) == 2
    forward = Flux.forward
    steps = []

    def stopping(*args, **hooks):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **hooks)

    with monkeypatch.context() as patch:  # stopped while it draws the second
        patch.setattr(Flux, "forward", stopping)
        ran = run(*BATCH, "--update")
    assert ran.code == 130 and counts(ran) == (1, 4, 0)
    ran = run(*BATCH, "--update")
    assert ran.code == 0 and counts(ran) == (1, 5, 0) and sorted(ran.made) == NAMES
    assert {name for name, at in times().items() if before[name] != at} == {"out/b_1.png", "out/b_2.png"}
    assert counts(run(*BATCH)) == counts(run(*BATCH, "--update")) == (0, 6, 0)


def test_update_replaces_no_image_of_another_layout_and_none_of_the_users(run):
    alone = ["--layout", write("a.yaml"), "--output", "x.png"]
    write("b.yaml", prompt="b")
    assert run(*alone).code == 0
    refused = [["--layout", "b.yaml"], ["--prompt", "b", "--width", 64, "--height", 64]]
    for flags in refused:
        ran = run(*flags, "--output", "x.png", "--update")
        assert ran.code == 2 and "; --overwrite replaces it" in ran.errors[-1]
    recorded_without("x.png", "layout_file")  # as earlier versions wrote it
    assert kept(run(*alone, "--update")) == 1
    assert run(*alone, "--update", "--steps", 1).code == 2
    Image.new("RGB", (64, 64)).save("x.png")
    assert run(*alone, "--update").code == 2


def test_a_moved_folder_another_one_and_another_version_make_nothing_stale(run, model, monkeypatch, tmp_path):
    regions = [*MASKED["regions"], BOAT]
    write_mask("project/layouts/masks/m.png", 20)
    write("project/layouts/a.yaml", regions=regions)
    shutil.copytree(model, "project/model")
    command = ["--layout", "layouts", "--output", "out/{name}.png", "--metadata"]
    monkeypatch.chdir("project")
    assert run(*command, model="model").code == 0
    there = tmp_path / "project"
    monkeypatch.chdir(tmp_path)  # by other names, from another folder
    command = ["--layout", there / "layouts", "--output", "project/out/{name}.png", "--metadata"]
    assert kept(run(*command, model=there / "model")) == 1
    there.rename(tmp_path / "moved")
    command = ["--layout", "moved/layouts", "--output", "moved/out/{name}.png", "--metadata"]
    assert kept(run(*command, model="moved/model")) == 1
    for keys in ["overlap", "double_blocks"], ["base_stream"], ["layout_file", "source"]:
        recorded_without("moved/out/a.png", *keys)  # a key that a version added has its default
        Path("moved/out/a.json").write_text(json.dumps(settings_of("moved/out/a.png")))
        assert kept(run(*command, model="moved/model")) == 1


def test_weights_that_changed_make_an_image_stale(run, model):
    shutil.copytree(model, "model")
    flags = ["--layout", write("a.yaml"), "--output", "a.png"]
    assert run(*flags, model="model").code == 0
    file = next(Path("model").glob("ae*"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)  # of the same size and name
    metadata.fingerprint.cache_clear()
    ran = run(*flags, model="model")
    assert ran.code == 2 and "(ae 'sha256 " in ran.errors[-1]
    ran = run("--config-from-metadata", "a.png", "--output", "b.png", model=None)
    assert ran.code == 0 and "warning: a.png was made by other weights: ae" in ran.errors


def test_another_version_of_the_code_is_said_and_drawn_again_on_request(run, monkeypatch):
    write_batch()
    assert run(*BATCH).code == 0
    before = times()
    assert not any("another version" in error for error in run(*BATCH).errors)
    monkeypatch.setattr(metadata, "source_hash", lambda: "another")
    for flags in [], ["--update"]:
        ran = run(*BATCH, *flags)
        assert counts(ran) == (0, 6, 0) and times() == before
        assert "6 images were made by another version of the code" in ran.errors[-1]
    ran = run(*BATCH, "--update", "--same-code")
    assert counts(ran) == (6, 0, 0) and not any("another version" in error for error in ran.errors)
    assert counts(run(*BATCH, "--update", "--same-code")) == (0, 6, 0)
    assert run(*BATCH, "--same-code").code == 2


def test_the_hash_of_the_source_depends_on_what_an_image_depends_on(tmp_path, monkeypatch):
    def hashed() -> str:
        metadata.source_hash.cache_clear()
        return metadata.source_hash()

    monkeypatch.setattr(metadata, "ROOT", tmp_path)
    for name in "pipeline.py", "model/flux.py", "tools/jobs.py", "tests/test.py":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [hashed()]
    for name in "tools/jobs.py", "tests/test.py", "model/flux.py", "pipeline.py":
        (tmp_path / name).write_text("changed")
        found.append(hashed())
    assert found[0] == found[1] == found[2] != found[3] != found[4]
    metadata.source_hash.cache_clear()


def test_without_output_the_same_image_is_kept_and_another_gets_the_next_name(run):
    flags = ["--layout", write("a.yaml", steps=1)]
    made = []
    for more in [], [], ["--steps", 2], ["--steps", 2], [], ["--steps", 3, "--overwrite"], ["--steps", 2]:
        ran = run(*flags, *more)
        assert ran.code == 0
        made.append((*ran.made, counts(ran)[1]))
    names = ["a.png", "a.png", "a_1.png", "a_1.png", "a.png", "a.png", "a_1.png"]
    assert made == list(zip(names, (0, 1, 0, 1, 1, 0, 1)))
    assert settings_of("a.png")["steps"] == 3
    assert run(*flags, "--update").made == ["a.png"] and settings_of("a.png")["steps"] == 1
    write("b.yaml", seed=None, steps=1)
    assert [run("--layout", "b.yaml").made for _ in range(2)] == [["b.png"], ["b_1.png"]]  # two random seeds
    sweep = [*flags, "--sweep", "base_ratio=0,0.3"]
    assert run(*sweep).made == run(*sweep).made
    ran = run(*sweep[:-1], "base_ratio=0,0.3,0.6")
    assert counts(ran) == (1, 2, 0) and ran.made[-1] == "a_sheet.png" and ran.code == 0


class Terminal:
    """A stream that says that it is one."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_progress_in_a_log_and_on_a_terminal(run, monkeypatch):
    write_batch()
    assert run(*BATCH[:2], "--seed", 1, *OUT).code == 0
    monkeypatch.setattr(jobs, "SILENCE", -1)
    ran = run(*BATCH)
    assert [error for error in ran.errors if "step 1 of 1" in error][0] == "image 4 of 6: step 1 of 1"
    pattern = r"image (\d) of 6: out/([abc])_2\.png, [\d.]+ s; [\d.]+ a minute, \d\d:\d\d left"
    found = [match.groups() for error in ran.errors if (match := re.fullmatch(pattern, error))]
    assert len(found) == 3 and found[-1] == ("6", "c") and counts(ran) == (3, 3, 0)
    assert not any("kept" in error for error in ran.errors[:-1])
    alone = run("--layout", "layouts/a.yaml", "--output", "alone.png")
    assert "step 1 of 1" in alone.errors and not any(error.startswith("image") for error in alone.errors)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert run(*BATCH, "--overwrite").code == 0
    assert {f"image {i} of 6" for i in range(1, 7)} <= {*re.findall(r"image \d of 6", terminal.text)}
    assert "a minute" in terminal.text and "seed 2: " in terminal.text and "6 generated" in terminal.text
    assert "step 1 of 1" not in terminal.text
    for line in terminal.text.split("\n"):  # no message within a bar
        assert not re.search(r"\|.*first step|first step.*\|", line.rpartition("\r")[2])


def test_a_log_gets_a_record_of_each_image(run):
    write_batch()
    Path("layouts/bad.yaml").write_text("prompt: [")
    write("layouts/c.yaml", prompt="long " * 30 + "<lora:x>", steps=1)
    flags = [*BATCH, "--log", "logs/run.jsonl"]
    assert run("--layout", "layouts/a.yaml", "--seed", 1, *OUT).code == 0
    ran = run(*flags)
    assert ran.code == 1 and counts(ran) == (5, 1, 2)
    records = [json.loads(line) for line in Path("logs/run.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records if record["file"]] == ran.made
    outcomes = [record["outcome"] for record in records]
    assert outcomes == ["failed"] * 2 + ["kept"] + ["generated"] * 5
    assert "bad.yaml" in records[0]["error"] and records[0]["seconds"] == 0
    assert records[0]["layout"] == "layouts/bad.yaml"
    last = records[-1]
    assert last["layout"] == "layouts/c.yaml" and last["seed"] == 2 and last["seconds"] > 0
    assert last["settings"] == compare.settings_hash(settings_of(last["file"]))
    assert len({record["settings"] for record in records[2:]}) == 6
    assert ["long" in "".join(record["warnings"]) for record in records[2:]] == [False] * 4 + [True] * 2
    assert ["<lora:x>" in "".join(record["warnings"]) for record in records[2:]] == [False] * 4 + [True] * 2
    assert run(*flags).code == 1
    again = [json.loads(line) for line in Path("logs/run.jsonl").read_text().splitlines()]
    assert again[: len(records)] == records and [x["outcome"] for x in again[8:]] == ["failed"] * 2 + ["kept"] * 6
    for name in "logs/run.txt", "logs", "layouts/a.yaml":
        assert run(*BATCH, "--log", name).code == 2
    os.mkfifo("fifo.jsonl")
    assert run(*BATCH, "--log", "fifo.jsonl").code == 2
    shutil.copy("layouts/a.yaml", "a.jsonl")
    ran = run("--layout", "a.jsonl", "--log", "a.jsonl")
    assert ran.code == 2 and "this run reads that file" in ran.errors[0]


def test_an_error_among_several_layouts_names_its_layout_and_is_counted_once(run, monkeypatch):
    """Also where a repository's layouts are read twice, before and after its download."""
    write("a.yaml", steps=1), write("b.yaml", loras=[{"file": "gone.safetensors"}])
    Path("c.yaml").write_text("prompt: [")
    monkeypatch.setattr("generate.is_repository", lambda name: True)
    ran = run("--layout", "a.yaml", "b.yaml", "c.yaml")
    errors = [error for error in ran.errors if error.startswith("generate.py: ")]
    assert counts(ran) == (1, 0, 2) and len(errors) == 2
    assert errors[1].startswith("generate.py: b.yaml: loras[0].file = gone.safetensors")
    assert any(error.startswith("image 3 of 3: a.png") for error in ran.errors)


def test_the_steps_of_each_image_are_timed_on_a_gpu_that_is_behind(monkeypatch):
    """Its first and last step end when the GPU says so."""
    now = [0.0]
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.__setitem__(0, now[0] + 10))
    tally = jobs.Tally(parse(["--prompt", "a"]))
    for _ in range(2):
        for step in range(1, 5):
            now[0] += 1
            tally.on_step(step, 4)
        assert tally.last_step - tally.first_step == 3 + 10


def paths_in(found: dict) -> list[str]:
    return [name for _, name in metadata.names_in(found)] + [*found["inputs"], *found["files"].values()]


@pytest.fixture
def pictured(run, tmp_path, monkeypatch, golden) -> Path:
    """The folder of an image that needs a mask, a map and a LoRA, made from elsewhere by absolute names."""
    lora = shutil.copy(golden / "models" / "lora" / "lora_diffusers.safetensors", tmp_path)
    folder = tmp_path / "project"
    write_mask(folder / "layouts/masks/m.png", 20)
    colors = Image.new("RGB", (64, 64))
    colors.paste("#ff0000", (30, 40, 64, 64))
    colors.save(folder / "layouts/map.png")
    shutil.move(lora, folder / "lora.safetensors")
    regions = [*MASKED["regions"], {"prompt": "b", "color": "#ff0000", "loras": [{"file": "../lora.safetensors"}]}]
    layout = write(folder / "layouts/a.yaml", regions=regions, map="map.png", steps=1)
    flags = ["--output", folder / "out/x.png", "--save-latents", folder / "latents/x.safetensors", "--metadata"]
    assert run("--layout", layout, *flags).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def test_an_image_is_made_again_from_anywhere(run, pictured, tmp_path):
    """Its metadata, of each of its files, name nothing by an absolute path."""
    for name in "out/x.png", "out/x.json", "latents/x.safetensors":
        found = metadata.read_metadata(pictured / name)
        assert not [path for path in paths_in(found) if os.path.isabs(path)]
        assert found["regions"][0]["mask"] == "../layouts/masks/m.png" and found["map"] == "../layouts/map.png"
    moved = pictured.rename(tmp_path / "moved")
    for name in "out/x.png", "out/x.json", "latents/x.safetensors":
        flags = ["--config-from-metadata", moved / name, "--output", "y.png", "--overwrite"]
        assert run(*flags, model=None).code == 2  # masks are not in the image's folder
        ran = run(*flags, "--trust-metadata", "--save-latents", "y.safetensors", model=None)
        assert ran.code == 0 and Image.open("y.png").tobytes() == Image.open(moved / "out/x.png").tobytes()
    assert settings_of("y.png")["map"] == "../moved/layouts/map.png"
    assert not compare.differences(settings_of("y.png"), settings_of(moved / "out/x.png"))


def test_paths_lead_through_links(tmp_path):
    """From a folder that is a link, .. leads elsewhere than its name says."""
    for name in "real/out", "models/flux":
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/out").symlink_to(tmp_path / "real/out")
    (tmp_path / "linked").symlink_to(tmp_path / "models")
    for folder in "real/out", "deep/er/out", "new/folder":
        for name in "models/flux", "linked/flux":
            found = metadata.portable({"model": str(tmp_path / name)}, tmp_path / folder)["model"]
            (tmp_path / "new/folder").mkdir(parents=True, exist_ok=True)
            assert found.startswith("../") and (tmp_path / folder / found).samefile(tmp_path / "models/flux")
            assert found.endswith(name) or folder == "deep/er/out"


@pytest.mark.parametrize("name", ["layouts/masks/m.png", "layouts/map.png", "lora.safetensors"])
def test_an_input_that_changed_or_is_gone_is_named_with_the_image(run, pictured, name):
    flags = ["--config-from-metadata", pictured / "out/x.png", "--output", "y.png", "--trust-metadata"]
    file = pictured / name
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    metadata.fingerprint.cache_clear()
    ran = run(*flags, model=None)
    assert ran.code == 2 and len(ran.errors) == 1 and "has changed since the image was made" in ran.errors[0]
    assert f"{pictured}/out/x.png: it was made with " in ran.errors[0] and name in ran.errors[0]
    file.unlink()
    ran = run(*flags, model=None)
    assert ran.code == 2 and len(ran.errors) == 1 and "is not there any more" in ran.errors[0]
    assert f"{pictured}/out/x.png: it was made with " in ran.errors[0] and name in ran.errors[0]


def test_an_image_of_an_earlier_version_is_made_again_beside_its_pictures(run, tmp_path, monkeypatch):
    """Its metadata name them from the folder in which it was made."""
    shutil.copytree(FIXTURES / "recorded", "old")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    flags = ["--config-from-metadata", "../old/image.png", "--output", "y.png"]
    assert run(*flags, model=None).code == 0
    write_mask("../old/mask.png", 20)
    ran = run(*flags, model=None)
    assert ran.code == 2 and "image.png: it was made with regions[0].mask" in ran.errors[0]


def test_latents_are_decoded_with_their_metadata(run, pictured, tmp_path):
    shutil.rmtree(pictured / "layouts")  # not needed any more
    latents = pictured / "latents/x.safetensors"
    ran = run("--decode", latents, "--trust-metadata", "--output", "out/{name}_{seed}.png", model=None)
    assert ran.code == 0 and ran.made == ["out/x_3.png"]
    image = pictured / "out/x.png"
    assert Image.open(ran.made[0]).tobytes() == Image.open(image).tobytes()
    assert not compare.differences(settings_of(ran.made[0]), settings_of(image))
    assert not [path for path in paths_in(settings_of(ran.made[0])) if os.path.isabs(path)]
    made = [run("--decode", latents, "--trust-metadata", model=None).made for _ in range(2)]
    assert made == [["x.png"], ["x.png"]]
    Image.new("RGB", (64, 64)).save("x.png")
    assert run("--decode", latents, "--trust-metadata", model=None).made == ["x_1.png"]
    assert run("--decode", latents, model=None).code == 2  # its model is elsewhere
    data = bytearray(latents.read_bytes())
    data[-20] ^= 1
    latents.write_bytes(data)
    text = {"layout": json.dumps({"prompt": "a", "seed": 1, "model": "pocket"})}
    save_file({"latents": torch.zeros(1, 16, 8)}, "flat.safetensors", text)
    save_file({"maps": torch.zeros(1)}, "maps.safetensors", text)
    save_file({"latents": torch.zeros(1, 16, 8, 8)}, "none.safetensors")
    words = {latents: "damaged", image: "--decode", "flat.safetensors": "no latents", "maps.safetensors": "no latents"}
    for name, word in {**words, "none.safetensors": "no generation metadata", "gone": "no such file"}.items():
        ran = run("--decode", name, "--trust-metadata", "--output", "z.png", model=None)
        assert ran.code == 2 and len(ran.errors) == 1 and word in ran.errors[0], ran.errors


def test_an_old_image_without_metadata_is_not_taken_for_the_one_that_its_new_json_describes(run, monkeypatch):
    flags = ["--output", "x.png", "--no-metadata", "--metadata"]
    assert run("--layout", write("a.yaml"), *flags).code == 0
    write("a.yaml", prompt="other")
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "save_image", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("--layout", "a.yaml", *flags, "--update").code == 130
    assert counts(run("--layout", "a.yaml", *flags, "--update")) == (1, 0, 0)


def test_an_image_without_metadata_is_not_lost_when_its_successor_cannot_be_written(run, monkeypatch):
    flags = ["--layout", write("a.yaml", steps=1), "--output", "x.png", "--no-metadata"]
    assert run(*flags).code == 0
    monkeypatch.setattr(jobs, "save_image", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    assert run(*flags, "--overwrite").code == 1 and Path("x.png").exists()
