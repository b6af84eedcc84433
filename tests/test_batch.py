"""Many images: names, what is kept, workers, stopped and killed runs, metadata, the prompt cache."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import FIXTURES, WORKER_VARIABLES
from PIL import Image
from safetensors.torch import load_file, save_file

import pipeline
from model.t5 import T5Encoder
from model.transformer import Flux
from regional.layout import Layout
from regional.reader import read_layout
from tools import jobs, metadata
from tools.flags import parse

ROOT = Path(__file__).parent.parent
A = {
    "prompt": "a harbor at dawn",
    "background_prompt": "the sea",
    "width": 64,
    "height": 64,
    "steps": 2,
    "mask_inject_steps": 1,
    "max_sequence_length": 16,
    "seed": 3,
    "regions": [{"prompt": "a red boat", "box": [0, 0, 32, 64]}, {"prompt": "a lighthouse", "box": [32, 16, 64, 48]}],
}
PARTS = ("t5", "clip", "flux", "ae")


def write(path: str | Path, **changes) -> str:
    """A layout file: A with changes; None takes a key out."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    layout = {key: value for key, value in {**A, **changes}.items() if value is not None}
    Path(path).write_text(yaml.safe_dump(layout))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several processes run at once; and bits are those of as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outside(model: str, *flags: str) -> list[str]:
    """The command line of the same run in a process of its own."""
    return [sys.executable, str(ROOT / "generate.py"), *map(str, flags), "--model", model, "--device", "cpu"]


def environment() -> dict[str, str]:
    """With one thread, as here, so that bits can be compared."""
    others = {key: value for key, value in os.environ.items() if key not in WORKER_VARIABLES}
    return {**others, "OMP_NUM_THREADS": "1"}


def images(folder: str = ".") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.suffix == ".png"}


def settings_of(picture: str) -> dict:
    return json.loads(Image.open(picture).text["layout"])


def latents(file: str = "z.safetensors") -> torch.Tensor:
    return load_file(file)["latents"]


# ------------------------------------------------------------------------------------------- names


def planned(*flags: str | int) -> list[jobs.Job]:
    """The jobs of this command line; nothing is generated."""
    command = parse([str(flag) for flag in flags])
    files = jobs.layout_files(command.output)
    worker = jobs.worker_of(command.output.shard, False)

    def read(file: Path | None, swept: dict) -> Layout:
        return read_layout(file, command.overrides | swept, 64)

    return jobs.plan_jobs(files, command.output, read, worker, jobs.Failures(len(files) == 1))


def names_of(found: list[jobs.Job], what: str = "image") -> list[str]:
    return [str(job.files[what]) for job in found]


@pytest.mark.parametrize(
    "template, names",
    [
        ("{name}.png", ["a_1.png", "a_2.png", "b_1.png", "b_2.png"]),
        ("{seed}-{name}.png", ["1-a.png", "2-a.png", "1-b.png", "2-b.png"]),
        ("{name}/x{seed}.png", ["a/x1.png", "a/x2.png", "b/x1.png", "b/x2.png"]),
    ],
)
def test_a_template_names_the_images(run, template, names):
    flags = ["--layout", write("a.yaml"), write("b.yaml", prompt="a forest"), "--seed", 1, 2]
    ran = run(*flags, "--output", template)
    if "/" in template:  # folders are not made
        assert ran.code == 1 and ran.made == []
        assert len([error for error in ran.errors if "there is no folder" in error]) == 2
        Path("a").mkdir(), Path("b").mkdir()
        ran = run(*flags, "--output", template)
    assert ran.code == 0 and ran.made == names
    found = [(settings_of(name)["prompt"], settings_of(name)["seed"]) for name in names]
    assert found == [(prompt, seed) for prompt in (A["prompt"], "a forest") for seed in (1, 2)]


def test_names_without_a_template(run):
    write("a.yaml"), write("scene.v2.yaml"), write("in/b.yaml"), write("in/c.yml")
    Path("in/a.json").write_text("metadata, no layout")
    assert names_of(planned("--layout", "scene.v2.yaml")) == ["scene.v2.png"]
    assert names_of(planned("--prompt", "a fox")) == ["picture.png"]
    assert names_of(planned("--layout", "in", "a.yaml")) == ["b.png", "c.png", "a.png"]
    Path("a.png").write_text("mine")
    Path("a_1.png").write_text("mine")
    assert names_of(planned("--layout", "a.yaml")) == ["a_2.png"]
    found = planned("--layout", "a.yaml", "--output", "x_{seed}_{name}.jpg", "--seed", 8)
    assert names_of(found) == ["x_8_a.jpg"]
    found = planned("--layout", "a.yaml", "--seed", 7, 8, "--output", "x.png", "--save-latents", "z.safetensors")
    assert names_of(found, "latents") == ["z_7.safetensors", "z_8.safetensors"]
    found = planned("--layout", "a.yaml", "--output", "x.webp", "--metadata", "--attention-maps", "maps")
    assert found[0].files["metadata"] == Path("x.json") and found[0].files["maps"] == Path("maps/x.safetensors")


def test_a_sweep_makes_every_image_and_a_sheet(run):
    sweep = ["--sweep", "base_ratio=0,0.5", "--sweep", "mask-inject-steps=0,50%", "--seed", 1, 2]
    ran = run("--layout", write("a.yaml"), *sweep)
    assert ran.code == 0 and len(ran.made) == 9 and ran.made[-1] == "a_sheet.png"
    for name in ran.made[:8]:
        found = settings_of(name)
        labels = f"base_ratio={found['base_ratio']:g}_mask_inject_steps={found['mask_inject_steps']}"
        assert name == f"a_{labels}_{found['seed']}.png"
    with Image.open("a_sheet.png") as sheet:  # a column for each T, a row for each beta and seed
        assert sheet.size[0] == 2 * 64 + 8 and sheet.size[1] > 4 * 64
    flags = ["--base-ratio", "0.5", "--mask-inject-steps", "0", "--seed", 2, "--output", "own.png"]
    assert run("--layout", "a.yaml", *flags).code == 0
    swept = Image.open("a_base_ratio=0.5_mask_inject_steps=0_2.png")
    assert Image.open("own.png").tobytes() == swept.tobytes()


def test_a_template_names_sweeps(run):
    flags = ["--layout", write("a.yaml"), write("b.yaml"), "--sweep", "steps=1,2", "--output", "{sweep}_of_{name}.png"]
    found = planned(*flags)
    assert names_of(found) == [f"steps={n}_of_{name}.png" for name in "ab" for n in (1, 2)]
    assert [str(job.sheet) for job in found] == ["sheet_of_a.png"] * 2 + ["sheet_of_b.png"] * 2


@pytest.mark.parametrize(
    "sweep, told",
    [
        (["prompt=a,b"], "base_ratio"),
        (["base_ratio=2"], "base"),
        (["base_ratio"], "base_ratio"),
        (["steps=["], "steps"),
        (["base_ratio=0,0.1", "base-ratio=0.2"], "twice"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_an_error(run, sweep, told):
    ran = run("--layout", write("a.yaml"), *(x for text in sweep for x in ("--sweep", text)))
    assert ran.code == 2 and told in ran.errors[-1] and not images()


def test_a_layout_or_a_sheet_is_never_overwritten(run):
    Path("c.json").write_text(json.dumps(A))
    ran = run("--layout", "c.json", "--output", "c.png", "--metadata", "--overwrite")
    assert ran.code == 2 and "that is a layout" in ran.errors[0] and "c.json" in ran.errors[0]
    assert json.loads(Path("c.json").read_text()) == A
    Path("z_sheet.png").write_text("mine")
    assert run("--layout", write("a.yaml"), "--sweep", "steps=1,2", "--output", "z.png").code == 2
    assert Path("z_sheet.png").read_text() == "mine" and not Path("z_steps=1.png").exists()


def test_a_folder_without_layouts_is_an_error(run):
    Path("empty").mkdir()
    ran = run("--layout", "empty")
    assert ran.code == 2 and len(ran.errors) == 1 and "--layout empty" in ran.errors[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["a.yaml", "a.yaml"],
        ["a.yaml", "other/a.yaml"],
        ["a.yaml", "b.yaml", "--output", "x.png"],
        ["a.yaml", "b.yaml", "--output", "x_{seed}.png", "--seed", 1, 2],
        ["a.yaml", "b.yaml", "--output", "{name}.png", "--save-latents", "z.safetensors"],
    ],
)
def test_two_images_of_one_name_are_refused(run, flags):
    for name in ("a.yaml", "b.yaml", "other/a.yaml"):
        write(name)
    ran = run("--layout", *flags)
    assert ran.code == 2 and ran.made == [] and len(ran.errors) == 1 and "{name}" in ran.errors[0]
    assert not images() and not Path("z.safetensors").exists()


def test_the_model_is_loaded_once(run, monkeypatch):
    loaded = []
    load = pipeline.Parts.load
    monkeypatch.setattr(
        pipeline.Parts, "load", lambda self, name, *rest: (loaded.append(name), load(self, name, *rest))[1]
    )
    layouts = [write(f"{name}.yaml", prompt=f"the letter {name}") for name in "abc"]
    assert len(run("--layout", *layouts, "--seed", 1, 2).made) == 6
    assert sorted(loaded) == sorted(PARTS)


# --------------------------------------------------------------------------- kept and made again


def refuse_to_load(monkeypatch, *parts: str) -> None:
    load = pipeline.Parts.load

    def refusing(self, name, *rest):
        assert name not in parts, f"{name} is loaded"
        return load(self, name, *rest)

    monkeypatch.setattr(pipeline.Parts, "load", refusing)


def state() -> dict[Path, tuple]:
    return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in Path().iterdir()}


def kept(ran) -> int:
    return len([error for error in ran.errors if "kept" in error])


def test_finished_images_are_kept_and_what_is_missing_is_made_again(run):
    flags = ["--layout", write("a.yaml"), write("b.yaml", regions=[]), "--seed", 1, 2, "--metadata"]
    flags += ["--save-latents", "{name}.safetensors"]
    first = run(*flags)
    before = state()
    data = {file: file.read_bytes() for file in before}
    assert first.code == 0 and len(before) == 2 + 4 * 3
    with pytest.MonkeyPatch.context() as patch:
        refuse_to_load(patch, *PARTS)
        again = run(*flags)
    assert again.code == 0 and again.made == first.made and kept(again) == 4 and state() == before
    for lost in ("b_2.png", "b_2.json", "b_2.safetensors"):
        Path(lost).unlink()
        ran = run(*flags)
        assert ran.code == 0 and kept(ran) == 3
        assert {file: file.read_bytes() for file in Path().iterdir()} == data
        changed = [file.stem for file, was in before.items() if state()[file] != was]
        assert set(changed) == {"b_2"}


def mask(path: str, left: int) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, :left] = 255
    Image.fromarray(pixels).save(path)


MASKED = {"regions": [{"prompt": "a red boat", "mask": "masks/m.png"}]}
CHANGES = {
    "seed": {"seed": 4},
    "prompt": {"prompt": "a harbor at dusk"},
    "steps": {"steps": 3},
    "guidance": {"guidance": 4},
    "a region's prompt": {"regions": [{"prompt": "a blue boat", "mask": "masks/m.png"}]},
    "a box": {"regions": [{"prompt": "a red boat", "box": [0, 0, 48, 64]}]},
    "the pixels of a mask": {},
}


def test_an_image_of_other_settings_is_refused_or_redone(run):
    """It is never kept as if it were finished, and never replaced without --overwrite."""
    mask("masks/m.png", 32)
    write("a.yaml", **MASKED), write("b.yaml")
    assert run("--layout", "a.yaml", "b.yaml").code == 0
    before = images()
    for changes in CHANGES.values():
        write("a.yaml", **{**MASKED, **changes})
        mask("masks/m.png", 32 if changes else 16)
        alone = run("--layout", "a.yaml", "--output", "a.png")
        assert alone.code == 2 and alone.made == []
        assert "a.png" in alone.errors[-1] and "--overwrite" in alone.errors[-1]
    write("c.yaml")
    many = run("--layout", "a.yaml", "b.yaml", "c.yaml")
    assert many.code == 1 and many.made == ["b.png", "c.png"]
    assert len([error for error in many.errors if "a.png" in error]) == 1
    assert {name: images()[name] for name in before} == before
    redone = run("--layout", "a.yaml", "b.yaml", "c.yaml", "--overwrite")
    assert redone.code == 0 and redone.made == ["a.png", "b.png", "c.png"]
    assert images()["a.png"] != before["a.png"] and images()["b.png"] == before["b.png"]


def test_flags_and_the_model_are_settings_too(run, golden):
    flags = ["--layout", write("a.yaml"), "--output", "a.png"]
    assert run(*flags).code == 0
    for change in ["--dtype", "bfloat16"], ["--base-ratio", "0.2"], ["--method", "plain"], ["--attention", "dense"]:
        assert run(*flags, *change).code == 2
    other = run(*flags, model=golden / "models" / "flux-tiny-schnell")
    assert other.code == 2 and "exists already" in other.errors[-1]
    assert run(*flags, "--base-ratio", "0.2", "--overwrite").made == ["a.png"]


def test_a_random_seed_is_printed_and_chosen_once(run, monkeypatch):
    layouts = [write("a.yaml", seed=None), write("b.yaml", seed=None)]
    first = run("--layout", *layouts)
    seeds = [settings_of(name)["seed"] for name in ("a.png", "b.png")]
    assert seeds[0] != seeds[1] and f"seed {seeds[0]}, {seeds[1]}" in first.errors
    refuse_to_load(monkeypatch, *PARTS)
    assert run("--layout", *layouts).made == first.made == ["a.png", "b.png"]


def test_a_strange_image_is_not_replaced(run):
    Image.new("RGB", (64, 64)).save("a.png")
    before = Path("a.png").read_bytes()
    assert run("--layout", write("a.yaml"), write("b.yaml"))[:2] == (1, ["b.png"])
    assert run("--layout", "a.yaml", "--output", "a.png").code == 2
    assert Path("a.png").read_bytes() == before


def test_an_unfinished_file_never_has_the_final_name(tmp_path):
    def broken(file):
        file.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        metadata.write(tmp_path / "a.png", broken)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------- failing layouts

SAMPLE = pipeline.sample


def out_of_memory(flux: Flux, layout: Layout, *rest, **more) -> torch.Tensor:
    if layout.prompt == "too much":
        raise torch.OutOfMemoryError("no room")
    return SAMPLE(flux, layout, *rest, **more)


BAD = {  # changes of A, or text, and what the message names
    "a missing mask": ({"regions": [{"prompt": "a", "mask": "gone.png"}]}, "gone.png"),
    "a missing LoRA": ({"loras": [{"file": "gone.safetensors"}]}, "gone.safetensors"),
    "a mask as ControlNet": ({"controlnets": [{"model": "masks/m.png", "image": "masks/m.png"}]}, "m.png"),
    "an unknown key": ({"stepz": 3}, "stepz"),
    "no memory": ({"prompt": "too much"}, "no room"),
    "broken YAML": ("prompt: [", "bad5.yaml"),
}


def test_failing_layouts_are_reported_and_the_others_continue(run, monkeypatch):
    monkeypatch.setattr(pipeline, "sample", out_of_memory)
    mask("masks/m.png", 32)
    write("a.yaml"), write("c.yaml")
    bad = [f"bad{i}.yaml" for i in range(len(BAD))]
    for file, (changes, _) in zip(bad, BAD.values()):
        Path(file).write_text(changes) if isinstance(changes, str) else write(file, **changes)
    flags = ["--layout", "a.yaml", *bad, "c.yaml"]
    ran = run(*flags)
    assert ran.code == 1 and ran.made == ["a.png", "c.png"]
    errors = [error for error in ran.errors if error.startswith("generate.py:")]
    assert len(errors) == len(BAD)
    for _, told in BAD.values():
        assert [told in error for error in errors].count(True) == 1, told

    for file in bad:  # mended: the next run generates these alone
        write(file)
    ran = run(*flags)
    assert ran.code == 0 and kept(ran) == 2 and len(ran.made) == len(images()) == 2 + len(BAD)


def test_a_single_failing_layout_decides_the_exit_code(run, monkeypatch):
    monkeypatch.setattr(pipeline, "sample", out_of_memory)
    ran = run("--layout", write("a.yaml", prompt="too much"))
    assert ran.code == 1 and "--offload blocks or --quantize fp8" in ran.errors[-1]
    assert run("--layout", write("a.yaml", stepz=3)).code == 2


# -------------------------------------------------------------------------------------- workers

WAYS = {
    "--shard": lambda i, n: (["--shard", f"{i}/{n}"], {}),
    "torchrun": lambda i, n: ([], {"RANK": i, "WORLD_SIZE": n, "LOCAL_RANK": i}),
    "SLURM": lambda i, n: ([], {"SLURM_PROCID": i, "SLURM_NTASKS": n, "SLURM_LOCALID": i}),
    "--shard first": lambda i, n: (["--shard", f"{i}/{n}"], {"RANK": 0, "WORLD_SIZE": 9}),
}


@pytest.mark.parametrize("way", WAYS)
def test_workers_split_the_images(run, monkeypatch, way):
    layouts = [write(f"{i}.yaml", prompt=f"view {i}") for i in range(7)]
    made = []
    for i in range(3):
        flags, variables = WAYS[way](i, 3)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        found = names_of(planned("--layout", *layouts, *flags))
        assert 2 <= len(found) <= 3
        made += found
    assert sorted(made) == [f"{i}.png" for i in range(7)]


def test_workers_generate_what_one_process_does(run):
    layouts = [write(f"{i}.yaml", prompt=f"view {i}", regions=A["regions"][:i]) for i in range(3)]
    for i in range(2):
        assert run("--layout", *layouts, "--shard", f"{i}/2").code == 0
    made = images()
    for i in range(3):
        assert run("--layout", layouts[i], "--output", "own.png").code == 0
        assert Path("own.png").read_bytes() == made[f"{i}.png"]
        Path("own.png").unlink()


def test_any_number_of_workers_makes_each_image_once(run):
    layouts = [write(f"{i}.yaml") for i in range(3)]
    flags = ["--layout", *layouts, "--seed", 1, 2, 3, 4, 5]
    whole = names_of(planned(*flags, "--shard", "0/1"))
    assert len(whole) == 15
    for n in range(2, 18):
        split = [names_of(planned(*flags, "--shard", f"{i}/{n}")) for i in range(n)]
        assert sorted(sum(split, [])) == sorted(whole)
        assert max(map(len, split)) - min(map(len, split)) <= 1


def test_a_worker_without_an_image_is_content(run):
    ran = run("--layout", write("a.yaml"), "--shard", "1/2")
    assert ran.code == 0 and ran.made == [] and not images()


def test_workers_do_not_choose_a_seed_each(run):
    ran = run("--layout", write("a.yaml", seed=None), "--shard", "0/2")
    assert ran.code == 2 and len(ran.errors) == 1 and "a.yaml: seed: is missing" in ran.errors[0]
    ran = run("--layout", "a.yaml", write("b.yaml"), "--shard", "1/2")
    assert ran.code == 1 and "a.yaml: seed: is missing" in ran.errors[0]
    assert run("--layout", "a.yaml", "--shard", "0/2", "--seed", 1).code == 0


def test_a_shard_that_is_none_is_refused(run):
    write("a.yaml")
    for shard in ("1/1", "2/2", "5/3", "1", "a/b", "1/2/3", "0/0", "", "/", "-1/2", "1.0/2", "²/3"):
        ran = run("--layout", "a.yaml", f"--shard={shard}")
        assert ran.code == 2 and ran.made == [] and len(ran.errors) == 1
        assert f"--shard {shard}" in ran.errors[0]


# --------------------------------------------------------------------------- stopped and killed


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_running_step_is_the_last(run, monkeypatch, kind):
    steps = []
    forward = Flux.forward
    before = signal.getsignal(kind)

    def stopping(self, *args, **hooks):
        steps.append(1)
        if len(steps) == 4:  # the first step of the second image
            os.kill(os.getpid(), kind)
        return forward(self, *args, **hooks)

    monkeypatch.setattr(Flux, "forward", stopping)
    flags = ["--layout", write("a.yaml", steps=3), "--seed", 1, 2, "--output", "x.png"]
    ran = run(*flags)
    assert ran.code == 130 and len(steps) == 4 and ran.made == ["x_1.png"]
    assert [error for error in ran.errors if error.startswith("generate.py")] == [
        "generate.py: stopping after this step",
        "generate.py: interrupted",
    ]
    assert signal.getsignal(kind) is before
    assert sorted(file.name for file in Path().iterdir()) == ["a.yaml", "x_1.png"]
    assert run(*flags).made == ["x_1.png", "x_2.png"] and len(steps) == 4 + 3


def test_the_second_signal_does_not_wait(run, monkeypatch):
    def stopping(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the step continued")

    monkeypatch.setattr(Flux, "forward", stopping)
    assert run("--layout", write("a.yaml")).code == 130 and not images()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_stopped_process_keeps_what_is_finished(run, model):
    seeds = range(20)
    flags = ["--layout", write("a.yaml"), "--seed", *seeds, "--save-latents", "x.safetensors"]
    flags += ["--metadata", "--output", "x.png"]
    pipe = subprocess.PIPE
    command = outside(model, *flags)
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment())
    made = [process.stdout.readline().strip() for _ in range(3)]
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    made += out.split()
    assert process.returncode == 130 and "stopping after this step" in errors
    assert "Traceback" not in errors
    assert 3 <= len(made) < 20 and made == [f"x_{seed}.png" for seed in range(len(made))]
    assert not list(Path().glob(".*")) and sorted(images()) == sorted(made)
    before = {name: Path(name).stat().st_mtime_ns for name in made}
    ran = run(*flags)
    assert ran.code == 0 and ran.made == [f"x_{seed}.png" for seed in seeds]
    assert before == {name: Path(name).stat().st_mtime_ns for name in made}
    assert run("--layout", "a.yaml", "--seed", len(made), "--output", "fresh.png").code == 0
    assert Path("fresh.png").read_bytes() == Path(f"x_{len(made)}.png").read_bytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its workers are forked")
def test_killed_runs_are_resumed(tmp_path):
    """A few kills; `python benchmarks/kill.py` makes 50."""
    kills = os.environ.get("KILLS", "3")
    command = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), "--kills", kills]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{kills} kills, 0 with anything wrong" in ran.stdout


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
    assert not Path(killed_in).exists()
    [unfinished] = Path().glob(".x.*")
    assert unfinished.suffix == Path(killed_in).suffix
    Path(".x.1.77.png").write_text("another worker's x.1.png")
    assert run(*flags).code == 0
    names = [".x.1.77.png", "a.yaml", "x.json", "x.png", "x.safetensors"]
    assert sorted(file.name for file in Path().iterdir()) == names
    assert run("--layout", "a.yaml", "--output", "y.png").code == 0
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()


# ------------------------------------------------------------------------------------- no state

MANY = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import generate
make = generate.make
sizes = []
def making(*args, **more):
    make(*args, **more)
    sizes.append(int(Path("/proc/self/statm").read_text().split()[1]))
generate.make = making
code = generate.main(sys.argv[1:])
print(json.dumps(sizes), file=sys.stderr)
sys.exit(code)
"""


def various(i: int) -> dict:
    """Layouts that differ in all that could be kept by mistake."""
    boxes = [[0, 0, 32, 64], [32, 0, 64, 64], [16, 16, 48, 48], [0, 32, 64, 64]]
    regions = [{"prompt": f"thing {i} {j}", "box": box} for j, box in enumerate(boxes[: i % 5])]
    if i % 7 == 3:
        polygon = [[0, 0], [64, 0], [0, 64]]
        regions = [{"prompt": f"thing {i}", "polygon": polygon, "strength": 2.0, "feather": 8}]
    if i % 7 == 5:
        regions = [{"prompt": f"thing {i}", "mask": "masks/m.png", "base_ratio": 0.1}]
    return {
        "prompt": f"view {i}",
        "seed": i,
        "regions": regions,
        "method": ("regional", "regional", "rpg", "plain")[i % 4],
        "base_ratio": (0.3, 0.0, 0.5)[i % 3],
        "double_inject_interval": 1 + i % 2,
        "max_sequence_length": (16, 12)[i % 2],
    }


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_many_layouts_leave_nothing_behind(run, model):
    """No memory, and no state: an image is the same in other company, and in another process."""
    mask("masks/m.png", 24)
    layouts = [write(f"{i:03}.yaml", **various(i)) for i in range(60)]
    flags = outside(model, "--layout", *layouts)[2:]
    command = [sys.executable, "-c", MANY.format(root=str(ROOT)), *flags]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    sizes = json.loads(ran.stderr.splitlines()[-1])
    assert len(sizes) == 60 and max(sizes[9:]) < 1.02 * sizes[9]
    for i in (59, 47, 23, 5):
        assert run("--layout", layouts[i], "--output", f"again{i}.png").code == 0
        assert Path(f"again{i}.png").read_bytes() == Path(f"{i:03}.png").read_bytes()


def test_a_pipeline_called_again_gives_the_same(run, model):
    mask("masks/m.png", 24)
    tiny = pipeline.Pipeline(model, device="cpu")
    layouts = [read_layout(Path(write(f"{i}.yaml", **various(i))), {}) for i in (1, 5, 10, 14)]
    first = [tiny(layout, seed=7).tobytes() for layout in layouts]
    assert len(set(first)) == 4
    assert [tiny(layout, seed=7).tobytes() for layout in layouts[::-1]] == first[::-1]


# ---------------------------------------------------------------------------- embedded metadata


@pytest.fixture
def everything(golden) -> Callable[[], str]:
    """A layout with every kind of region, a mask, a map and LoRAs, in a folder of its own."""

    def write_it() -> str:
        lora = str(golden / "models" / "lora" / "lora_diffusers.safetensors")
        regions = [
            {"prompt": "a red boat", "box": ["0%", 0, "50%", 33.5], "loras": [{"file": lora, "scale": 0.7}]},
            {"prompt": "a lighthouse", "polygon": [[0, 0], ["100%", 0], [0, 64]], "strength": 1.5, "feather": 4},
            {"prompt": "the sun", "mask": "masks/m.png", "base_ratio": 0.1, "mask_inject_steps": "50%"},
            {"prompt": "gulls", "color": "#ff0000"},
        ]
        more = {"map": "map.png", "preset": "control", "loras": [{"file": lora, "scale": 0.3}]}
        file = write("deep/all.yaml", regions=regions, steps=4, mask_inject_steps="40%", **more)
        mask("deep/masks/m.png", 20)
        colors = np.zeros((64, 64, 3), np.uint8)
        colors[40:, 30:, 0] = 255
        Image.fromarray(colors).save("deep/map.png")
        return file

    return write_it


@pytest.mark.parametrize("suffix, kind", [(".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP"), (".json", "PNG")])
def test_an_image_is_reproduced_from_its_metadata(run, everything, suffix, kind):
    image = "x.png" if suffix == ".json" else f"x{suffix}"
    again = f"y{Path(image).suffix}"
    flags = ["--layout", everything(), "--output", image, "--dtype", "bfloat16", "--seed", 2**53 + 1, "--metadata"]
    assert run(*flags, "--save-latents", "z.safetensors").code == 0
    with Image.open(image) as opened:
        assert opened.format == kind and opened.size == (64, 64)
        text = opened.text["layout"] if kind == "PNG" else opened.getexif()[metadata.EXIF_DESCRIPTION]
    assert json.loads(text) == json.loads(Path("x.json").read_text())
    assert json.loads(text)["seed"] == 2**53 + 1 and json.loads(text)["files"]["ae"].endswith("ae.safetensors")
    Path("deep/all.yaml").unlink()
    flags = ["--config-from-metadata", f"x{suffix}", "--save-latents", "y.safetensors", "--output", again]
    assert run(*flags, model=None)[:2] == (0, [again])
    assert torch.equal(latents("y.safetensors"), latents("z.safetensors"))
    assert Path(again).read_bytes() == Path(image).read_bytes()


def test_images_of_the_program_before_its_redesign_are_reproduced_and_kept(run, monkeypatch):
    """recorded/image.png was generated by commit 3a2dc7f, from a layout with a mask, a box in
    percentages, a polygon and a preset, by --attention dense --dtype bfloat16."""
    for file in (FIXTURES / "recorded").iterdir():
        shutil.copy(file, file.name)
    old = settings_of("image.png")
    again = ["--config-from-metadata", "image.png", "--output", "again.png"]
    assert run(*again, model=None).code == 0
    ignored = {"files": None, "torch": None}
    assert settings_of("again.png") | ignored == old | ignored
    pixels = [np.asarray(Image.open(name)).astype(int) for name in ("image.png", "again.png")]
    assert np.abs(pixels[0] - pixels[1]).mean() < 1
    # The same image from this folder of the program is not generated again.
    moved = json.loads(json.dumps(old).replace("/opt/regional-flux/", f"{ROOT}/"))
    metadata.save_image(Image.open("image.png"), moved, Path("again.png"))
    refuse_to_load(monkeypatch, *PARTS)
    ran = run(*again, model=None)
    assert ran.code == 0 and kept(ran) == 1


def test_a_model_of_several_files_is_found_again(run, model):
    parts = {"flux": "flux1-dev", "t5": "text_encoder_2", "clip": "text_encoder", "ae": "ae"}
    own = []
    for part, kind in parts.items():
        found = [*Path(model).glob(f"{kind}*.safetensors"), *Path(model).glob(f"{kind}/*.safetensors")]
        tensors = {key: x * 1.1 for file in sorted(found) for key, x in load_file(file).items()}
        save_file(tensors, f"{part}.safetensors")
        own += [f"--{part}", f"{part}.safetensors"]
    flags = ["--layout", write("a.yaml"), "--save-latents", "z.safetensors", "--output", "z.png"]
    assert run(*flags, *own).code == 0
    again = ["--config-from-metadata", "z.png", "--save-latents", "y.safetensors", "--output", "y.png"]
    assert run(*again, model=None).code == 0
    assert torch.equal(latents("z.safetensors"), latents("y.safetensors"))
    assert Path("z.png").read_bytes() == Path("y.png").read_bytes()
    for i in range(0, len(own), 2):  # each of the files made a difference
        fewer = own[:i] + own[i + 2 :]
        assert run(*flags, *fewer, "--overwrite").code == 0
        assert Path("z.png").read_bytes() != Path("y.png").read_bytes(), own[i]
    assert run(*again, "--overwrite").code == 0  # --model replaces all recorded files
    assert settings_of("y.png")["given"] == {"model": model}


def test_flags_override_the_metadata(run):
    assert run("--layout", write("a.yaml"), "--output", "x.png").code == 0
    changes = [
        ["--seed", "9"], ["--steps", "3"], ["--prompt", "a harbor at dusk"], ["--base-ratio", "0"],
        ["--height", "80"], ["--dtype", "bfloat16"],
    ]  # fmt: skip
    seen = []
    for flags in changes:
        of_layout = latents_of(run, "--layout", "a.yaml", *flags)
        assert torch.equal(of_layout, latents_of(run, "--config-from-metadata", "x.png", *flags)), flags
        seen.append(of_layout.double().sum().item())
    assert len(set(seen)) == len(changes)


def latents_of(run, *flags: str) -> torch.Tensor:
    more = ["--output", "z.png", "--save-latents", "z.safetensors", "--overwrite"]
    assert run(*flags, *more).code == 0
    return latents()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_no_metadata_embeds_nothing(run, monkeypatch, suffix):
    flags = ["--layout", write("a.yaml", prompt="SECRET"), "--output", f"x{suffix}"]
    assert run(*flags, "--no-metadata").code == 0
    with Image.open(f"x{suffix}") as image:
        assert not getattr(image, "text", None) and metadata.EXIF_DESCRIPTION not in image.getexif()
    assert b"SECRET" not in Path(f"x{suffix}").read_bytes()
    ran = run("--config-from-metadata", f"x{suffix}")
    assert ran.code == 2 and len(ran.errors) == 1 and f"x{suffix}" in ran.errors[0]
    assert run(*flags, "--overwrite", "--no-metadata", "--metadata").code == 0  # the .json is enough
    refuse_to_load(monkeypatch, *PARTS)
    assert kept(run(*flags, "--no-metadata", "--metadata")) == 1


def test_metadata_too_large_for_a_jpeg_are_left_out_with_a_warning(run):
    ran = run("--layout", write("a.yaml", background_prompt="sea " * 20000), "--output", "a.jpg")
    assert ran.code == 0 and any("do not fit into a JPEG" in error for error in ran.errors)
    assert metadata.EXIF_DESCRIPTION not in Image.open("a.jpg").getexif()


@pytest.mark.parametrize(
    "file, data",
    [("gone.png", None), ("x.png", "no image"), ("x.json", "no json"), ("x.json", "[1, 2]")]
    + [("x.json", '{"prompt": "a"}'), ("x.json", json.dumps(A | {"model": "nowhere"}))]
    + [
        ("x.json", json.dumps({**A, "model": "pocket", **wrong}))
        for wrong in ({"seed": "three"}, {"dtype": "torch.float16"}, {"regions": [{"prompt": "a", "mask": "gone"}]})
    ],
)
def test_unusable_metadata_are_refused_in_one_sentence(run, file, data):
    if data:
        Path(file).write_text(data)
    ran = run("--config-from-metadata", file, model=None)
    assert ran.code == 2 and ran.made == [] and len(ran.errors) == 1
    assert ran.errors[0].startswith("generate.py: ")


# how AUTOMATIC1111's web UI reads the text, modules/infotext_utils.py
A1111_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@pytest.mark.parametrize("prompt", ["a harbor at dawn", "two lines,\nof text: with a colon", "ein Hafen, früh – 港"])
def test_the_parameters_are_those_that_other_tools_read(run, prompt):
    assert run("--layout", write("a.yaml", prompt=prompt, guidance=2.5), "--output", "x.png").code == 0
    *text, last = Image.open("x.png").text["parameters"].strip().split("\n")
    found = dict(A1111_PARAMETER.findall(last))
    assert "\n".join(text) == prompt and len(found) >= 3
    told = {key: found[key] for key in ("Steps", "Sampler", "CFG scale", "Distilled CFG Scale", "Seed", "Size")}
    assert told == {
        "Steps": "2", "Sampler": "Euler", "CFG scale": "1", "Distilled CFG Scale": "2.5", "Seed": "3", "Size": "64x64",
    }  # fmt: skip


# ----------------------------------------------------------------------------- the prompt cache


@pytest.fixture
def encoded(monkeypatch) -> list[tuple[int, ...]]:
    """Which ids T5 encodes from now on."""
    seen = []
    forward = T5Encoder.forward

    def recording(self, ids):
        seen.append(tuple(ids[0].tolist()))
        return forward(self, ids)

    monkeypatch.setattr(T5Encoder, "forward", recording)
    return seen


@pytest.fixture
def encode(model, tmp_path):
    """encode(cache, **changes): the prompt embeddings of A with changes, by a new pipeline."""

    def encode(cache: str | None, of: str = model, dtype: str = "auto", **changes) -> list[torch.Tensor]:
        folder = tmp_path / cache if cache else None
        tiny = pipeline.Pipeline(of, device="cpu", dtype=dtype, prompt_cache=folder)
        return list(tiny.prepare(read_layout(None, A | changes)).conditioning[:3])

    return encode


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def test_cached_prompts_need_no_encoder(encode, encoded, monkeypatch, tmp_path):
    without = encode(None)
    assert same(encode("cache"), without)
    # They are the base prompt's, two regions' and the background's.
    assert len(encoded) == 2 * len(list(tmp_path.glob("cache/t5-*"))) == 8
    assert not list(tmp_path.glob("cache/.*"))
    refuse_to_load(monkeypatch, "t5", "clip")
    assert same(encode("cache"), without)


def test_a_broken_cache_is_made_again(encode, encoded, tmp_path):
    expected = encode("cache")
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    encoded.clear()
    for _ in range(2):
        assert same(encode("cache"), expected) and len(encoded) == 4


def test_only_what_changed_is_encoded_anew(encode, encoded):
    encode("cache")
    for changes, count in ({"background_prompt": "the desert"}, 1), ({"dtype": "bfloat16"}, 4):
        encoded.clear()
        found = encode("cache", **changes)
        assert len(encoded) == count and same(found, encode(None, **changes))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_changed_encoders_encode_anew(encode, model, tmp_path, part):
    own = shutil.copytree(model, tmp_path / "own")
    before = encode("cache", own)
    file = sorted((own / part).glob("*.safetensors"))[0]
    save_file({name: tensor * 1.25 for name, tensor in load_file(file).items()}, file)
    after = encode("cache", own)
    assert not same(before, after) and same(after, encode(None, own))


def test_an_embedding_does_not_depend_on_other_prompts(encode):
    alone = encode(None)
    for i in range(3):
        encode("cache", prompt="a much longer prompt " * i, regions=A["regions"][:i])
    assert same(encode("cache"), alone)


def test_loras_of_one_name_are_told_apart(encode, tmp_path):
    """What they do to T5 is cached by their files and scales, not by their names."""
    files = [tmp_path / name / "lora.safetensors" for name in ("one", "two")]
    for seed, file in enumerate(files):
        file.parent.mkdir()
        down, up = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(seed))
        name = "lora_te2_encoder_block_0_layer_0_SelfAttention_q"
        save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up.T.contiguous()}, file)
    found = []
    for order in files, files[::-1]:
        loras = [{"file": str(file), "scale": scale} for file, scale in zip(order, (1, 0.5))]
        found.append(encode("cache", loras=loras))
        assert same(found[-1], encode(None, loras=loras))
    assert not same(*found)
