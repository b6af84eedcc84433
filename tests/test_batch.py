"""Many images: names, what is kept, workers, stopped and killed runs, metadata, the prompt cache."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import FIXTURES
from PIL import Image
from safetensors.torch import load_file, save_file

import pipeline
from model.t5 import T5Encoder
from model.transformer import Flux
from regional.reader import read_layout
from tools import compare, jobs, metadata
from tools.flags import parse

ROOT = Path(__file__).parent.parent
BOAT = {"prompt": "a red boat", "box": [0, 0, 32, 64]}
A = {"prompt": "a harbor at dawn", "background_prompt": "the sea", "width": 64, "height": 64}
A |= {"steps": 2, "mask_inject_steps": 1, "max_sequence_length": 16, "seed": 3}
A["regions"] = [BOAT, {"prompt": "a lighthouse", "box": [32, 16, 64, 48]}]
LATENTS = ["--save-latents", "z.safetensors"]


def write(path: str | Path, **changes) -> str:
    """A layout file: A with changes; None takes a key out."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    layout = {key: value for key, value in {**A, **changes}.items() if value is not None}
    Path(path).write_text(yaml.safe_dump(layout))
    return str(path)


def write_mask(path: str, left: int) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(np.arange(64) < left)[None].repeat(64, axis=0) * 255).save(path)


def images() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path().glob("*.png")}


def settings_of(image: str) -> dict:
    return json.loads(Image.open(image).text["layout"])


def counts(ran) -> tuple[int, ...]:
    """How many images were generated, kept and failed, as the last line says."""
    found = [re.match(r"(\d+) generated, (\d+) kept, (\d+) failed, [\d.]+ s$", error) for error in ran.errors]
    return tuple(map(int, next(filter(None, found)).groups()))


def kept(ran) -> int:
    return counts(ran)[1]


def planned(flags: str) -> list[jobs.Job]:
    """The jobs of this command line; nothing is generated."""
    command = parse(flags.split())
    return jobs.plan_jobs(command, jobs.Tally(command), 64)


def names_of(flags: str) -> list[str]:
    return [str(file) for job in planned(flags) for file in job.files.values()]


TWO = "--layout a.yaml b.yaml --seed 1 2 --output"
NAMES = {
    "--layout scene.v2.yaml": "scene.v2.png",
    "--prompt fox": "picture.png",
    "--layout in a.yaml": "b.png c.png a.png",
    "--layout a.yaml": "a_2.png",  # a.png and a_1.png exist
    "--layout a.yaml --seed 1": "a_seed1.png",
    "--layout a.yaml --seed 1 2": "a_seed1.png a_seed2.png",
    "--layout c.yaml --seed 1 2": "c_1_seed1.png c_1_seed2.png",  # c_seed2.png exists
    "--layout a.yaml --overwrite": "a.png",
    "--layout a.yaml --seed 1 --output x.png": "x.png",
    "--layout a.yaml --seed 7 8 --save-latents z.safetensors --output x_{seed}_{name}.jpg":
        "x_7_a.jpg z_seed7.safetensors x_8_a.jpg z_seed8.safetensors",
    "--layout a.yaml --output x.webp --metadata --attention-maps m": "x.webp x.json m/x.safetensors",
    f"{TWO} {{name}}.png": "a_seed1.png a_seed2.png b_seed1.png b_seed2.png",
    f"{TWO} {{seed}}-{{name}}.png": "1-a.png 2-a.png 1-b.png 2-b.png",
    f"{TWO} {{name}}/x{{seed}}.png": "a/x1.png a/x2.png b/x1.png b/x2.png",
    "--layout a.yaml b.yaml --sweep steps=1,2 --output {sweep}_of_{name}.png":
        "steps=1_of_a.png steps=2_of_a.png steps=1_of_b.png steps=2_of_b.png",
}  # fmt: skip


def test_names_with_and_without_a_template(run):
    for name in "a.yaml", "b.yaml", "c.yaml", "scene.v2.yaml", "in/b.yaml", "in/c.yml":
        write(name)
    Path("in/a.json").write_text("metadata, no layout")
    Path("a").mkdir()
    Path("b").mkdir()
    for mine in "a.png", "a_1.png", "c_seed2.png":
        Path(mine).write_text("mine")
    for flags, names in NAMES.items():
        assert names_of(flags) == names.split(), flags
    sheets = [str(job.sheet) for job in planned(flags)]
    assert sheets == ["sheet_of_a.png"] * 2 + ["sheet_of_b.png"] * 2
    Path("b").rmdir()  # folders are made
    ran = run(*TWO.split(), "{name}/x{seed}.png")
    assert ran.code == 0 and ran.made == ["a/x1.png", "a/x2.png", "b/x1.png", "b/x2.png"]
    assert [settings_of(name)["seed"] for name in ran.made] == [1, 2, 1, 2]


def test_a_sweep_makes_every_image_and_a_sheet(run):
    sweep = ["--sweep", "base_ratio=0,0.5", "--sweep", "mask-inject-steps=0,50%"]
    ran = run("--layout", write("a.yaml"), *sweep, "--seed", 1, 2)
    assert ran.code == 0 and len(ran.made) == 9 and ran.made[-1] == "a_sheet.png"
    for name in ran.made[:8]:
        found = settings_of(name)
        labels = f"base_ratio={found['base_ratio']:g}"
        labels += f"_mask_inject_steps={found['mask_inject_steps']}"
        assert name == f"a_{labels}_seed{found['seed']}.png"
    with Image.open("a_sheet.png") as sheet:  # a column for each T, a row for each beta and seed
        assert sheet.size[0] == 2 * 64 + 8 and sheet.size[1] > 4 * 64
    flags = ["--base-ratio", "0.5", "--mask-inject-steps", "0", "--seed", 2]
    assert run("--layout", "a.yaml", *flags, "--output", "own.png").code == 0
    swept = Image.open("a_base_ratio=0.5_mask_inject_steps=0_seed2.png")
    assert Image.open("own.png").tobytes() == swept.tobytes()


REFUSED = """\
a.yaml --sweep prompt=a,b: base_ratio
a.yaml --sweep base_ratio=2: base
a.yaml --sweep base_ratio: base_ratio
a.yaml --sweep steps=[: steps
a.yaml --sweep base_ratio=0,0.1 --sweep base-ratio=0.2: twice
a.yaml --sweep steps=1,2 --output z.png: z_sheet.png
c.json --output c.png --metadata --overwrite: as a layout
empty: --layout empty
a.yaml other/a.yaml: {name}
a.yaml b.yaml --output x_{seed}.png --seed 1 2: {name}
a.yaml b.yaml --output {name}.png --save-latents z.safetensors: {name}""".splitlines()
NO_SHARDS = ("2/2", "5/3", "1", "a/b", "1/2/3", "", "/", "-1/2", "1.0/2", "²/3")
REFUSED += [f"a.yaml --shard={shard}: --shard {shard}" for shard in NO_SHARDS]


def test_what_makes_no_sense_or_would_overwrite_is_refused(run):
    for name in "a.yaml", "b.yaml", "other/a.yaml":
        write(name)
    Path("empty").mkdir()
    Path("c.json").write_text(json.dumps(A))
    Path("z_sheet.png").write_text("mine")
    before = sorted(Path().iterdir())
    for line in REFUSED:
        flags, words = line.split(": ")
        ran = run("--layout", *flags.split())
        assert ran.code == 2 and len(ran.errors) == 1 and words in ran.errors[0], line
    assert sorted(Path().iterdir()) == before and json.loads(Path("c.json").read_text()) == A


def test_finished_images_are_kept_and_what_is_missing_is_made_again(run, spy):
    loaded = spy(pipeline.Parts, "load")
    flags = ["--layout", write("a.yaml"), write("b.yaml", regions=[]), "--seed", 1, 2]
    flags += ["--metadata", "--save-latents", "{name}.safetensors"]

    def state() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in Path().iterdir()}

    first = run(*flags)
    assert sorted(name for _, name, *_ in loaded) == ["ae", "clip", "flux", "t5"]  # once for all images
    before = state()
    data = {file: file.read_bytes() for file in before}
    assert first.code == 0 and len(before) == 2 + 4 * 3
    loaded.clear()
    again = run(*flags)
    assert again.code == 0 and again.made == first.made and kept(again) == 4
    assert state() == before and not loaded
    for lost in ("b_seed2.png", "b_seed2.json", "b_seed2.safetensors"):
        Path(lost).unlink()
        assert kept(run(*flags)) == 3
        assert {file: file.read_bytes() for file in Path().iterdir()} == data
        assert {file.stem for file, was in before.items() if state()[file] != was} == {"b_seed2"}


MASKED = {"regions": [{"prompt": "a red boat", "mask": "masks/m.png"}]}
CHANGES = {  # of the layout, by what the message says; the last: of the mask's pixels
    "seed 3, now 4": {"seed": 4},
    "steps 2, now 3": {"steps": 3},
    "regions[0].box None, now [0.0, 0.0, 32.0, 64.0]; regions[0].mask 'HASH', now None": {"regions": [BOAT]},
    "regions[0].mask 'HASH', now 'HASH'": {},
}


def test_an_image_of_other_settings_is_refused_or_redone(run, golden):
    """It is never kept as if it were finished, and never replaced without a flag that says so."""
    write_mask("masks/m.png", 32)
    write("a.yaml", **MASKED), write("b.yaml"), write("c.yaml")
    Image.new("RGB", (64, 64)).save("c.png")  # nobody knows by what
    assert run("--layout", "a.yaml", "b.yaml").code == 0
    before = images()
    alone = ["--layout", "a.yaml", "--output", "a.png"]
    for flags in "--dtype bfloat16", "--base-ratio 0.2", "--method plain", "--attention dense":
        assert run(*alone, *flags.split()).code == 2
    assert run(*alone, model=golden / "models" / "flux-tiny-schnell").code == 2
    for words, changes in CHANGES.items():
        write("a.yaml", **MASKED | changes)
        write_mask("masks/m.png", 32 if changes else 16)
        ran = run(*alone)
        assert ran.code == 2 and ran.made == []
        said = re.sub("sha256 [0-9a-f]{16}", "HASH", ran.errors[-1])
        assert f"a.png: exists already, made with other settings ({words}); --update draws it again." in said
    many = run("--layout", "a.yaml", "b.yaml", "c.yaml")
    assert many.code == 1 and many.made == ["b.png"] and counts(many) == (0, 1, 2)
    assert sum("nothing in it says how it was made; --overwrite" in error for error in many.errors) == 1
    assert images() == before
    redone = run("--layout", "a.yaml", "b.yaml", "--overwrite")
    assert redone.code == 0 and redone.made == ["a.png", "b.png"]
    assert images()["a.png"] != before["a.png"] and images()["b.png"] == before["b.png"]


def test_a_random_seed_is_printed_and_chosen_once(run, spy):
    loaded = spy(pipeline.Parts, "load")
    layouts = [write("a.yaml", seed=None), write("b.yaml", seed=None)]
    first = run("--layout", *layouts)
    seeds = [settings_of(name)["seed"] for name in ("a.png", "b.png")]
    assert seeds[0] != seeds[1] and f"seed {seeds[0]}, {seeds[1]}" in first.errors
    loaded.clear()
    assert run("--layout", *layouts).made == first.made == ["a.png", "b.png"] and not loaded


BAD = {  # changes of A, or text, by what the message names
    "gone.png": {"regions": [{"prompt": "a", "mask": "gone.png"}]},
    "gone.safetensors": {"loras": [{"file": "gone.safetensors"}]},
    "m.png": {"controlnets": [{"model": "masks/m.png", "image": "masks/m.png"}]},
    "stepz": {"stepz": 3},
    "no room": {"prompt": "too much"},
    "bad5.yaml": "prompt: [",
}


def test_failing_layouts_are_reported_and_the_others_continue(run, monkeypatch):
    sample = pipeline.sample

    def out_of_memory(flux, layout, *rest):
        if layout.prompt == "too much":
            raise torch.OutOfMemoryError("no room")
        return sample(flux, layout, *rest)

    monkeypatch.setattr(pipeline, "sample", out_of_memory)
    write_mask("masks/m.png", 32)
    write("a.yaml"), write("c.yaml")
    bad = [f"bad{i}.yaml" for i in range(len(BAD))]
    for file, changes in zip(bad, BAD.values()):
        Path(file).write_text(changes) if isinstance(changes, str) else write(file, **changes)
    alone = run("--layout", "bad4.yaml")
    assert alone.code == 1 and "--offload blocks or --quantize fp8" in alone.errors[-1]
    assert run("--layout", "bad3.yaml").code == 2
    flags = ["--layout", "a.yaml", *bad, "c.yaml"]
    ran = run(*flags)
    assert ran.code == 1 and ran.made == ["a.png", "c.png"]
    errors = [error for error in ran.errors if error.startswith("generate.py:")]
    assert len(errors) == len(BAD)
    assert all(sum(words in error for error in errors) == 1 for words in BAD), errors
    for file in bad:  # mended: the next run generates these alone
        write(file)
    ran = run(*flags)
    assert ran.code == 0 and kept(ran) == 2 and len(ran.made) == len(images()) == 2 + len(BAD)


WAYS = {  # flags and variables of worker i of n
    "--shard": ("--shard {i}/{n}", ""),
    "torchrun": ("", "RANK={i} WORLD_SIZE={n} LOCAL_RANK={i}"),
    "SLURM": ("", "SLURM_PROCID={i} SLURM_NTASKS={n} SLURM_LOCALID={i}"),
    "--shard first": ("--shard {i}/{n}", "RANK=0 WORLD_SIZE=9"),
}


@pytest.mark.parametrize("flags, variables", WAYS.values(), ids=WAYS)
def test_any_number_of_workers_makes_each_image_once(run, monkeypatch, flags, variables):
    many = f"--layout {write('a.yaml')} {write('b.yaml')} --seed 1 2 3 "
    whole = names_of(many + "--shard 0/1")
    assert len(whole) == 6
    for n in 2, 3, 4, 7:
        split = []
        for i in range(n):
            for variable in variables.format(i=i, n=n).split():
                monkeypatch.setenv(*variable.split("="))
            split.append(names_of(many + flags.format(i=i, n=n)))
        assert sorted(sum(split, [])) == sorted(whole)
        assert max(map(len, split)) - min(map(len, split)) <= 1


def test_workers_do_not_choose_a_seed_each(run):
    alone = run("--layout", write("a.yaml", seed=None), "--shard", "0/2")
    two = run("--layout", "a.yaml", write("b.yaml"), "--shard", "1/2")
    assert alone.code == 2 and len(alone.errors) == 1 and two.code == 1
    assert "a.yaml: seed: is missing" in alone.errors[0] == two.errors[0]
    ran = run("--layout", "a.yaml", "--shard", "1/2", "--seed", 1)  # a worker without an image
    assert ran.code == 0 and ran.made == [] and not images()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_after_the_step_and_the_second_at_once(run, monkeypatch, kind):
    steps = []
    forward = Flux.forward
    before = signal.getsignal(kind)

    def stopping(*args, **hooks):
        steps.append(1)
        if len(steps) in (4, 8):  # the first steps of a second image
            os.kill(os.getpid(), kind)
        if len(steps) == 8:
            os.kill(os.getpid(), kind)
            pytest.fail("the step continued")
        return forward(*args, **hooks)

    monkeypatch.setattr(Flux, "forward", stopping)
    flags = ["--layout", write("a.yaml", steps=3), "--seed", 1, 2, "--output", "x.png"]
    ran = run(*flags)
    assert ran.code == 130 and len(steps) == 4 and ran.made == ["x_seed1.png"]
    said = [error for error in ran.errors if error.startswith("generate.py: ")]
    assert said == ["generate.py: stopping after this step", "generate.py: interrupted"]
    assert signal.getsignal(kind) is before
    assert sorted(file.name for file in Path().iterdir()) == ["a.yaml", "x_seed1.png"]
    assert run(*flags).made == ["x_seed1.png", "x_seed2.png"] and len(steps) == 4 + 3
    assert run(*flags, "--seed", 3).code == 130 and not Path("x_seed3.png").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its workers are forked")
def test_killed_runs_are_resumed(run):
    """A few kills; `python benchmarks/kill.py` makes 50."""
    kills = os.environ.get("KILLS", "3")
    command = [sys.executable, ROOT / "benchmarks" / "kill.py", "--kills", kills, "--images", "12"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert f"{kills} kills, 0 with anything wrong" in ran.stdout and not ran.returncode, ran.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is forked")
@pytest.mark.parametrize("killed_in", ["x.png", "x.json", "x.safetensors"])
def test_a_half_written_file_is_written_again(run, monkeypatch, killed_in):
    replace = Path.replace

    def half(unfinished, path):
        if path.name == killed_in:
            unfinished.write_bytes(unfinished.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        replace(unfinished, path)

    flags = ["--layout", write("a.yaml"), "--output", "x.png", "--metadata", "--save-latents", "x.safetensors"]
    if not (child := os.fork()):
        monkeypatch.setattr(metadata.Path, "replace", half)
        run(*flags)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    [unfinished] = Path().glob(".x.*")
    assert unfinished.suffix == Path(killed_in).suffix and not Path(killed_in).exists()
    Path(".x.1.77.png").write_text("another worker's x.1.png")
    with pytest.raises(OSError):  # where nothing is killed, nothing unfinished remains
        metadata.write(Path("a.png"), lambda file: file.write_text("half") + file.mkdir())
    assert run(*flags).code == 0
    names = [".x.1.77.png", "a.yaml", "x.json", "x.png", "x.safetensors"]
    assert sorted(file.name for file in Path().iterdir()) == names
    assert Image.open("x.png").size == (64, 64)


MANY = """
import sys, generate
from tools import jobs
make = jobs.make
def making(*args):
    make(*args)
    print("pages", open("/proc/self/statm").read().split()[1])
jobs.make = making
sys.exit(generate.main(sys.argv[1:]))
"""
SHAPES = [[], [{"box": [0, 0, 32, 64]}, {"box": [16, 16, 48, 48]}, {"box": [0, 32, 64, 64]}]]
SHAPES.append([{"polygon": [[0, 0], [64, 0], [0, 64]], "strength": 2.0, "feather": 8}])
SHAPES += [[{"mask": "masks/m.png", "base_ratio": 0.1}], SHAPES[1][:2]]


def various(i: int) -> dict:
    """Layouts that differ in all that could be kept by mistake."""
    regions = [{"prompt": f"thing {i} {j}", **shape} for j, shape in enumerate(SHAPES[i % 5])]
    method = ("regional", "regional", "rpg", "plain")[i % 4]
    more = {"double_inject_interval": 1 + i % 2, "base_ratio": (0.3, 0.0, 0.5)[i % 3]}
    more |= {"method": method, "max_sequence_length": (16, 12)[i % 2]}
    return {"prompt": f"view {i}", "seed": i, "regions": regions, **more}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_many_layouts_leave_nothing_behind(run, model, monkeypatch):
    """No memory, and no state: an image is the same in other company, and in another process."""
    write_mask("masks/m.png", 24)
    layouts = [write(f"{i:03}.yaml", **various(i)) for i in range(30)]
    command = [sys.executable, "-c", MANY, "--layout", *layouts, "--model", model, "--device", "cpu"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # as here, so that bits can be compared
    ran = subprocess.run(command, capture_output=True, text=True)
    sizes = [int(line.split()[1]) for line in ran.stdout.splitlines() if line.startswith("pages")]
    assert len(sizes) == 30 and max(sizes[9:]) < 1.02 * sizes[9]
    for i in (29, 26, 23, 12, 5):
        assert run("--layout", layouts[i], "--output", f"again{i}.png").code == 0
        assert Path(f"again{i}.png").read_bytes() == Path(f"{i:03}.png").read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".json"])
def test_an_image_is_reproduced_from_its_metadata(run, golden, suffix):
    """A layout with every kind of region, a mask, a map and LoRAs, in a folder of its own."""
    lora = str(golden / "models" / "lora" / "lora_diffusers.safetensors")
    regions = [
        {"prompt": "0", "box": ["0%", 0, "50%", 33.5], "loras": [{"file": lora, "scale": 0.7}]},
        {"prompt": "1", "polygon": [[0, 0], ["100%", 0], [0, 64]], "strength": 1.5, "feather": 4},
        {"prompt": "2", "mask": "masks/m.png", "base_ratio": 0.1, "mask_inject_steps": "50%"},
        {"prompt": "3", "color": "#ff0000"},
    ]
    more = {"map": "map.png", "preset": "control", "loras": [{"file": lora, "scale": 0.3}]}
    write_mask("deep/masks/m.png", 20)
    colors = Image.new("RGB", (64, 64))
    colors.paste("#ff0000", (30, 40, 64, 64))
    colors.save("deep/map.png")
    layout = write("deep/all.yaml", regions=regions, steps=4, mask_inject_steps="40%", **more)
    image = "x.png" if suffix == ".json" else f"x{suffix}"
    flags = ["--layout", layout, "--output", image, "--metadata", *LATENTS]
    assert run(*flags, "--dtype", "bfloat16", "--seed", 2**53 + 1).code == 0
    with Image.open(image) as opened:
        assert f".{opened.format.lower().replace('jpeg', 'jpg')}" == Path(image).suffix
        found = json.loads(opened.getexif().get(metadata.EXIF_DESCRIPTION) or opened.text["layout"])
    assert found == json.loads(Path("x.json").read_text()) and found["seed"] == 2**53 + 1
    assert found["files"]["ae"] == "ae.safetensors" and found["layout_file"] == "all.yaml"
    Path(layout).unlink()
    if suffix != ".json":  # the image has all that its .json has
        Path("x.json").unlink()
    flags = ["--config-from-metadata", f"x{suffix}", "--save-latents", "y.safetensors", "--trust-metadata"]
    again = f"y{Path(image).suffix}"
    assert run(*flags, "--output", again, model=None)[:2] == (0, [again])
    assert torch.equal(*(load_file(f"{name}.safetensors")["latents"] for name in "yz"))
    assert Path(again).read_bytes() == Path(image).read_bytes()


def test_images_of_the_program_before_its_redesign_are_reproduced_and_kept(run, spy):
    """recorded/image.png was generated by commit 3a2dc7f, from a layout with a mask, a box in
    percentages, a polygon and a preset, by --attention dense --dtype bfloat16."""
    loaded = spy(pipeline.Parts, "load")
    for file in (FIXTURES / "recorded").iterdir():
        shutil.copy(file, file.name)
    old = settings_of("image.png")
    again = ["--config-from-metadata", "image.png", "--output", "again.png"]
    assert run(*again, model=None).code == 0
    found = settings_of("again.png")
    assert [region["mask"] for region in found["regions"]] == ["./mask.png", None, None]
    assert found["inputs"]["./mask.png"].startswith(old["pictures"]["mask.png"])
    assert not compare.differences(old, found)
    first, second = (np.asarray(Image.open(f)).astype(int) for f in ("image.png", "again.png"))
    assert np.abs(first - second).mean() < 1
    # That image itself is as good as one of this version.
    shutil.copy("image.png", "again.png")
    loaded.clear()
    ran = run(*again, model=None)
    assert ran.code == 0 and kept(ran) == 1 and not loaded


def test_a_model_of_several_files_is_found_again(run, model):
    parts = {"flux": "flux1-dev", "t5": "text_encoder_2/", "clip": "text_encoder/", "ae": "ae"}
    own = []
    for part, kind in parts.items():
        files = Path(model).glob(f"{kind}*.safetensors")
        tensors = {key: x * 1.1 for file in files for key, x in load_file(file).items()}
        save_file(tensors, f"{part}.safetensors")
        own += [f"--{part}", f"{part}.safetensors"]
    flags = ["--layout", write("a.yaml", steps=1), "--output", "z.png"]
    assert run(*flags, *own).code == 0
    again = ["--config-from-metadata", "z.png", "--output", "y.png", "--trust-metadata"]
    assert run(*again, model=None).code == 0
    assert Path("z.png").read_bytes() == Path("y.png").read_bytes()
    for i in range(0, len(own), 2):  # each of the files made a difference
        assert run(*flags, *own[:i], *own[i + 2 :], "--overwrite").code == 0
        assert Path("z.png").read_bytes() != Path("y.png").read_bytes(), own[i]
    assert run(*again, "--overwrite").code == 0  # --model replaces all recorded files
    assert settings_of("y.png")["given"] == {"model": os.path.relpath(model)}


STRANGERS = {
    "model = 'evil/repo', which would be downloaded": {"given": {"model": "evil/repo"}},
    "model = '/srv/model', which is in none": {"given": {"model": "/srv/model"}},
    "ae = '../ae.safetensors', which is in none": {"given": {"model": "pocket", "ae": "../ae.safetensors"}},
    "loras[0].file = 'evil/repo:x', which would be downloaded": {"loras": [{"file": "evil/repo:x"}]},
    "regions[0].mask = '/etc/passwd', which is in none": {"regions": [{"prompt": "a", "mask": "/etc/passwd"}]},
    "regions[0].loras[0].file = 'link/a/b', which is in none": {
        "regions": [{"prompt": "a", "box": [0, 0, 64, 64], "loras": [{"file": "link/a/b"}]}]
    },
}


@pytest.mark.parametrize("danger", STRANGERS)
def test_what_a_strangers_image_names_is_not_used_without_consent(run, danger):
    Path("x.json").write_text(json.dumps({**A, "model": "pocket", **STRANGERS[danger]}))
    Path("link").symlink_to("/usr")
    flags = ["--config-from-metadata", "x.json", "--output", "y.png"]
    ran = run(*flags, model=None)
    again = f"python generate.py {' '.join(flags)} --device cpu --trust-metadata."
    assert ran.code == 2 and danger in ran.errors[0] and ran.errors[0].endswith(again)


def test_flags_override_the_metadata(run):
    flags = ["--output", "x.png", *LATENTS, "--overwrite"]
    assert run("--layout", write("a.yaml"), *flags).code == 0
    shutil.copy("x.png", "old.png")
    changes = "--seed 9 --steps 3 --prompt dusk --base-ratio 0 --height 80 --dtype bfloat16"
    found = []
    for source in ["--layout", "a.yaml"], ["--config-from-metadata", "old.png"]:
        assert run(*source, *changes.split(), *flags).code == 0
        found.append(load_file("z.safetensors")["latents"])
    assert torch.equal(*found)
    recorded = settings_of("x.png")
    expected = {"seed": 9, "steps": 3, "prompt": "dusk", "base_ratio": 0, "height": 80}
    assert recorded | expected | {"dtype": "torch.bfloat16"} == recorded


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_no_metadata_embeds_nothing(run, spy, suffix):
    loaded = spy(pipeline.Parts, "load")
    image = f"x{suffix}"
    flags = ["--layout", write("a.yaml", prompt="SECRET"), "--output", image, "--no-metadata"]
    assert run(*flags).code == 0 and b"SECRET" not in Path(image).read_bytes()
    ran = run("--config-from-metadata", image)
    assert ran.code == 2 and len(ran.errors) == 1 and image in ran.errors[0]
    assert run(*flags, "--overwrite", "--metadata").code == 0  # the .json is enough
    loaded.clear()
    assert kept(run(*flags, "--metadata")) == 1 and not loaded


def test_metadata_too_large_for_a_jpeg_are_left_out_with_a_warning(run):
    ran = run("--layout", write("a.yaml", background_prompt="sea " * 20000), "--output", "a.jpg")
    assert ran.code == 0 and any("do not fit into a JPEG" in error for error in ran.errors)
    assert metadata.EXIF_DESCRIPTION not in Image.open("a.jpg").getexif()


def test_unusable_metadata_are_refused_in_one_sentence(run):
    wrong = [{"seed": "three"}, {"dtype": "torch.float16"}, {"model": "nowhere"}]
    wrong.append({"regions": [{"prompt": "a", "mask": "gone"}]})
    texts = [json.dumps({**A, "model": "pocket", **changes}) for changes in wrong]
    for text in "no json", "[1, 2]", '{"prompt": "a"}', *texts:
        Path("x.json").write_text(text)
        Path("x.png").write_text(text)
        for file in "x.json", "x.png", "gone.png":
            ran = run("--config-from-metadata", file, model=None)
            assert ran.code == 2 and ran.made == [] and len(ran.errors) == 1
            assert ran.errors[0].startswith("generate.py: ")


def test_the_parameters_are_those_that_other_tools_read(run):
    prompt = "two lines,\nof text: with a colon, früh – 港"
    layout = write("a.yaml", prompt=prompt, guidance=2.5)
    assert run("--layout", layout, "--output", "x.png").code == 0
    *text, last = Image.open("x.png").text["parameters"].strip().split("\n")
    # As AUTOMATIC1111's web UI reads it, modules/infotext_utils.py.
    found = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert "\n".join(text) == prompt and found["Sampler"] == "Euler"
    numbers = {"Steps": 2, "CFG scale": 1, "Distilled CFG Scale": 2.5, "Seed": 3}
    assert {key: float(found[key]) for key in numbers} == numbers and found["Size"] == "64x64"


@pytest.mark.parametrize("sampler, name", [("heun", "Heun"), ("dpmpp_2m", "DPM++ 2M")])
def test_a_sampler_is_named_as_in_other_programs_and_replayed(run, sampler, name):
    """Metadata without the keys, as of older versions, mean Euler and the published schedule."""
    flags = ["--steps", 5, "--mask-inject-steps", 1]
    layout = write("a.yaml", sampler=sampler, schedule="simple")
    assert run("--layout", layout, *flags, "--output", "x.png").code == 0
    assert f", Sampler: {name}, CFG" in Image.open("x.png").text["parameters"]
    again = ["--config-from-metadata", "x.png", "--output", "y.png"]
    assert run(*again).code == 0
    assert Path("y.png").read_bytes() == Path("x.png").read_bytes()
    found = settings_of("x.png")
    old = {key: value for key, value in found.items() if key not in ("sampler", "schedule")}
    Path("old.json").write_text(json.dumps(old))
    assert run("--config-from-metadata", "old.json", "--output", "old.png").code == 0
    default = ["--sampler", "euler", "--schedule", "flux", "--output", "default.png"]
    assert run("--layout", layout, *flags, *default).code == 0
    assert Path("old.png").read_bytes() == Path("default.png").read_bytes() != Path("x.png").read_bytes()


def test_samplers_and_schedules_can_be_swept(run):
    ran = run("--layout", write("a.yaml"), "--sweep", "sampler=euler,heun", "--sweep", "schedule=flux,simple")
    assert ran.code == 0 and len(ran.made) == 5
    assert len({Image.open(name).tobytes() for name in ran.made}) == 5
    ran = run("--layout", write("b.yaml", sampler="dpm"))
    assert ran.code == 2 and "b.yaml: sampler = 'dpm'" in ran.errors[-1]


@pytest.fixture
def encode(model, tmp_path):
    """encode(cache, **changes): the prompt embeddings of A with changes, by a new pipeline."""

    def encode(cache: str | None, of=model, dtype="auto", **changes) -> list[torch.Tensor]:
        folder = tmp_path / cache if cache else None
        tiny = pipeline.Pipeline(of, device="cpu", dtype=dtype, prompt_cache=folder)
        return list(tiny.prepare(read_layout(None, A | changes)).conditioning[:3])

    return encode


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def test_cached_prompts_need_no_encoder(encode, spy, tmp_path):
    loaded = spy(pipeline.Parts, "load")
    encoded = spy(T5Encoder, "forward")
    without = encode(None)
    assert same(encode("cache"), without)
    # They are the base prompt's, two regions' and the background's.
    assert len(encoded) == 2 * len(list(tmp_path.glob("cache/t5-*"))) == 8
    assert not list(tmp_path.glob("cache/.*"))
    loaded.clear()
    assert same(encode("cache"), without) and not loaded
    for file in (tmp_path / "cache").iterdir():  # broken files are made again
        file.write_bytes(file.read_bytes()[:50])
    encoded.clear()
    for _ in range(2):
        assert same(encode("cache"), without) and len(encoded) == 4
    for changes, count in ({"background_prompt": "the desert"}, 1), ({"dtype": "bfloat16"}, 4):
        encoded.clear()  # only what changed is encoded anew
        found = encode("cache", **changes)
        assert len(encoded) == count and same(found, encode(None, **changes))
    for i in range(3):  # an embedding does not depend on other prompts
        encode("other", prompt="a much longer prompt " * i, regions=A["regions"][:i])
    assert same(encode("other"), without)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_changed_encoders_encode_anew(encode, model, tmp_path, part):
    """Also if neither the file's name nor its size tells."""
    own = shutil.copytree(model, tmp_path / "own")
    file = sorted((own / part).glob("*.safetensors"))[0]
    found = []
    for scale in (1.25, 1.5):
        save_file({name: tensor * scale for name, tensor in load_file(file).items()}, file)
        found.append(encode("cache", own))
        assert same(found[-1], encode(None, own))
    assert not same(*found)


def test_loras_of_one_name_are_told_apart(encode, tmp_path):
    """What they do to T5 is cached by their files and scales, not by their names."""
    files = [tmp_path / name / "lora.safetensors" for name in ("one", "two")]
    for seed, file in enumerate(files):
        file.parent.mkdir()
        down, up = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(seed))
        name = "lora_te2_encoder_block_0_layer_0_SelfAttention_q"
        terms = {"lora_down": down, "lora_up": up.T.contiguous()}
        save_file({f"{name}.{key}.weight": term for key, term in terms.items()}, file)
    found = []
    for order in files, files[::-1]:
        loras = [{"file": str(file), "scale": scale} for file, scale in zip(order, (1, 0.5))]
        found.append(encode("cache", loras=loras))
        assert same(found[-1], encode(None, loras=loras))
    assert not same(*found)
