"""Many pictures: names, what is kept, workers, runs that are stopped or killed, memory, replay, the prompts' cache."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
import pipeline
import weights
from model.t5 import T5Encoder
from model.transformer import Flux
from regional.reader import read_layout
from tools import jobs
from tools.metadata import EXIF_DESCRIPTION

ROOT = Path(__file__).parent.parent
A = {
    "prompt": "a harbour at dawn",
    "background_prompt": "the sea",
    "width": 64,
    "height": 64,
    "steps": 2,
    "mask_inject_steps": 1,
    "max_sequence_length": 16,
    "seed": 3,
    "regions": [{"prompt": "a red boat", "box": [0, 0, 32, 64]}, {"prompt": "a lighthouse", "box": [32, 16, 64, 48]}],
}
WORKER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
PARTS = ("load_t5", "load_clip", "load_flux", "load_autoencoder")


def write(path: str | Path, **changes) -> str:
    """A layout file: A with changes; None takes a key out."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    layout = {key: value for key, value in {**A, **changes}.items() if value is not None}
    Path(path).write_text(yaml.safe_dump(layout))
    return str(path)


class Ran(NamedTuple):
    code: int
    made: list[str]
    errors: list[str]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several processes run at once; and bits are those of as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(golden) -> str:
    return str(golden / "models" / "flux-tiny-dev")


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys) -> Callable[..., Ran]:
    """run(*flags) runs generate.py in tmp_path on a tiny random FLUX: exit code, pictures printed, lines of stderr."""
    monkeypatch.chdir(tmp_path)
    for name in WORKER_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(*flags: str | int, model: str | None = model) -> Ran:
        capsys.readouterr()
        named = ["--model", model] if model else []
        code = generate.main([*map(str, flags), *named, "--device", "cpu"])
        out, errors = capsys.readouterr()
        assert "Traceback" not in errors
        return Ran(code, out.split(), errors.splitlines())

    return run


def outside(model: str, *flags: str) -> list[str]:
    """The command line of the same run in a process of its own."""
    return [sys.executable, str(ROOT / "generate.py"), *map(str, flags), "--model", model, "--device", "cpu"]


def environment() -> dict[str, str]:
    """With one thread, as here, so that bits can be compared."""
    others = {key: value for key, value in os.environ.items() if key not in WORKER_VARIABLES}
    return {**others, "OMP_NUM_THREADS": "1"}


def pictures(folder: str = ".") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.suffix == ".png"}


def settings_of(picture: str) -> dict:
    return json.loads(Image.open(picture).text["layout"])


def latents(file: str = "z.safetensors") -> torch.Tensor:
    return load_file(file)["latents"]


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "template, names",
    [
        ("{name}.png", ["a_1.png", "a_2.png", "b_1.png", "b_2.png"]),
        ("{seed}-{name}.png", ["1-a.png", "2-a.png", "1-b.png", "2-b.png"]),
        ("{name}/x{seed}.png", ["a/x1.png", "a/x2.png", "b/x1.png", "b/x2.png"]),
    ],
)
def test_a_template_names_the_pictures(run, template, names):
    ran = run("--layout", write("a.yaml"), write("b.yaml", prompt="a forest"), "--seed", 1, 2, "--output", template)
    if "/" in template:  # folders are not made
        assert ran.code == 1 and ran.made == [] and len([e for e in ran.errors if "there is no folder" in e]) == 2
        Path("a").mkdir(), Path("b").mkdir()
        ran = run("--layout", "a.yaml", "b.yaml", "--seed", 1, 2, "--output", template)
    assert ran.code == 0 and ran.made == names
    said = [(settings_of(name)["prompt"], settings_of(name)["seed"]) for name in names]
    assert said == [(prompt, seed) for prompt in (A["prompt"], "a forest") for seed in (1, 2)]


def test_a_template_names_sweeps(run):
    sweep = ["--sweep", "base_ratio=0,0.5", "--sweep", "steps=1,2"]
    ran = run("--layout", write("a.yaml"), write("b.yaml"), *sweep, "--output", "{sweep}_of_{name}.png")
    assert ran.code == 0 and len(ran.made) == 10 and ran.made[-2:] == ["sheet_of_a.png", "sheet_of_b.png"]
    for name in ran.made[:8]:
        made_by = settings_of(name)
        sweep = f"base_ratio={made_by['base_ratio']:g}_steps={made_by['steps']}"
        assert name in (f"{sweep}_of_a.png", f"{sweep}_of_b.png")


def test_one_layouts_pictures_go_where_output_says(run):
    assert run("--layout", write("a.yaml"), "--output", "x.webp").made == ["x.webp"]
    assert run("--layout", "a.yaml", "--output", "x_{seed}_{name}.jpg", "--seed", 8).made == ["x_8_a.jpg"]


def test_a_folder_stands_for_its_layouts(run):
    for name in ("in/b.yaml", "in/c.yml", "d.yaml"):
        write(name)
    Path("in/a.json").write_text("what made a picture, not a layout")
    Path("in/notes.txt").write_text("no layout")
    assert run("--layout", "in", "d.yaml").made == ["b.png", "c.png", "d.png"]


def test_a_layout_is_never_overwritten(run):
    Path("c.json").write_text(json.dumps(A))
    ran = run("--layout", "c.json", "--output", "c.png", "--metadata", "--overwrite")
    assert ran.code == 2 and "c.json: that is a layout" in ran.errors[0] and json.loads(Path("c.json").read_text()) == A


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
def test_two_pictures_of_one_name_are_refused(run, flags):
    for name in ("a.yaml", "b.yaml", "other/a.yaml"):
        write(name)
    ran = run("--layout", *flags)
    assert ran.code == 2 and ran.made == [] and len(ran.errors) == 1 and "{name}" in ran.errors[0]
    assert not pictures() and not Path("z.safetensors").exists()


def test_the_model_is_loaded_once(run, monkeypatch):
    loaded = []
    for name in PARTS:
        load = getattr(weights, name)
        monkeypatch.setattr(weights, name, lambda *a, name=name, load=load: (loaded.append(name), load(*a))[1])
    layouts = [write(f"{name}.yaml", prompt=f"the letter {name}") for name in "abc"]
    assert len(run("--layout", *layouts, "--seed", 1, 2).made) == 6
    assert sorted(loaded) == sorted(PARTS)


# ------------------------------------------------------------------------------------------------ kept and made again


def refuse_to_load(monkeypatch, *parts: str) -> None:
    for name in parts:
        monkeypatch.setattr(weights, name, lambda *_: pytest.fail("a part of the model is loaded"))


def test_finished_pictures_are_kept(run, monkeypatch):
    flags = ["--layout", write("a.yaml"), write("b.yaml", regions=[]), "--seed", 1, 2, "--save-latents"]
    flags += ["{name}.safetensors", "--metadata"]
    first = run(*flags)
    files = {file: file.stat() for file in Path().iterdir()}
    assert first.code == 0 and len(files) == 2 + 4 * 3
    refuse_to_load(monkeypatch, *PARTS)
    again = run(*flags)
    assert again.code == 0 and again.made == first.made and len([e for e in again.errors if "kept" in e]) == 4
    assert {f: (s.st_mtime_ns, s.st_ino) for f, s in files.items()} == {
        f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in Path().iterdir()
    }


@pytest.mark.parametrize("lost", ["b_2.png", "b_2.json", "b_2.safetensors"])
def test_what_is_missing_is_made_again(run, lost):
    flags = ["--layout", write("a.yaml"), write("b.yaml", regions=[]), "--seed", 1, 2, "--save-latents"]
    flags += ["{name}.safetensors", "--metadata"]
    run(*flags)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in Path().iterdir()}
    Path(lost).unlink()
    ran = run(*flags)
    assert ran.code == 0 and len([e for e in ran.errors if "kept" in e]) == 3
    assert {file: file.read_bytes() for file in Path().iterdir()} == {file: data for file, (_, data) in before.items()}
    assert all(file.stat().st_mtime_ns == before[file][0] for file in Path().iterdir() if file.stem != "b_2")


def mask(path: str, left: int) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, :left] = 255
    Image.fromarray(pixels).save(path)


CHANGES = {
    "seed": {"seed": 4},
    "prompt": {"prompt": "a harbour at dusk"},
    "steps": {"steps": 3},
    "guidance": {"guidance": 4},
    "a region's prompt": {"regions": [{"prompt": "a blue boat", "mask": "masks/m.png"}]},
    "a box": {"regions": [{"prompt": "a red boat", "box": [0, 0, 48, 64]}]},
    "the pixels of a mask": {},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_picture_of_other_settings_is_refused_or_redone(run, what):
    """Never kept as if it were finished, and never replaced without --overwrite."""
    mask("masks/m.png", 32)
    masked = {"regions": [{"prompt": "a red boat", "mask": "masks/m.png"}]}
    write("a.yaml", **masked), write("b.yaml")
    assert run("--layout", "a.yaml", "b.yaml").code == 0
    before = pictures()

    write("a.yaml", **{**masked, **CHANGES[what]}), write("c.yaml")
    if not CHANGES[what]:
        mask("masks/m.png", 16)
    alone = run("--layout", "a.yaml", "--output", "a.png")
    assert alone.code == 2 and alone.made == [] and "a.png" in alone.errors[-1] and "--overwrite" in alone.errors[-1]
    many = run("--layout", "a.yaml", "b.yaml", "c.yaml")
    assert many.code == 1 and many.made == ["b.png", "c.png"] and len([e for e in many.errors if "a.png" in e]) == 1
    assert {name: pictures()[name] for name in before} == before

    redone = run("--layout", "a.yaml", "b.yaml", "c.yaml", "--overwrite")
    assert redone.code == 0 and redone.made == ["a.png", "b.png", "c.png"]
    assert pictures()["a.png"] != before["a.png"] and pictures()["b.png"] == before["b.png"]


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--base-ratio", "0.2"], ["--method", "plain"]])
def test_a_flag_is_a_setting_too(run, flags):
    assert run("--layout", write("a.yaml"), "--output", "a.png").code == 0
    assert run("--layout", "a.yaml", "--output", "a.png", *flags).code == 2
    assert run("--layout", "a.yaml", "--output", "a.png", *flags, "--overwrite").made == ["a.png"]


def test_a_picture_of_another_model_is_refused(run, golden):
    assert run("--layout", write("a.yaml"), "--output", "a.png").code == 0
    other = run("--layout", "a.yaml", "--output", "a.png", model=str(golden / "models" / "flux-tiny-schnell"))
    assert other.code == 2 and "exists already" in other.errors[-1]


def test_a_random_seed_is_not_drawn_again(run, monkeypatch):
    layouts = [write("a.yaml", seed=None), write("b.yaml", seed=None)]
    first = run("--layout", *layouts)
    assert settings_of("a.png")["seed"] != settings_of("b.png")["seed"]
    refuse_to_load(monkeypatch, *PARTS)
    assert run("--layout", *layouts).made == first.made == ["a.png", "b.png"]


def test_a_strange_picture_is_not_replaced(run):
    Image.new("RGB", (64, 64)).save("a.png")
    before = Path("a.png").read_bytes()
    assert run("--layout", write("a.yaml"), write("b.yaml"))[:2] == (1, ["b.png"])
    assert Path("a.png").read_bytes() == before


# ------------------------------------------------------------------------------------------------ failing layouts


def out_of_memory(flux: Flux, layout, *_, **__) -> torch.Tensor:
    if layout.prompt == "too much":
        raise torch.OutOfMemoryError("no room")
    return SAMPLE(flux, layout, *_, **__)


SAMPLE = pipeline.sample
BAD = {
    "broken YAML": ("prompt: [", "bad.yaml"),
    "an unknown key": (yaml.safe_dump({**A, "stepz": 3}), "stepz"),
    "a missing mask": (yaml.safe_dump({**A, "regions": [{"prompt": "a", "mask": "gone.png"}]}), "gone.png"),
    "a missing LoRA": (yaml.safe_dump({**A, "loras": [{"file": "gone.safetensors"}]}), "gone.safetensors"),
    "a ControlNet that is none": (
        yaml.safe_dump({**A, "controlnets": [{"model": "masks/m.png", "image": "masks/m.png"}]}),
        "masks/m.png",
    ),
    "no memory": (yaml.safe_dump({**A, "prompt": "too much"}), "no room"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_failing_layout_is_reported_and_the_rest_go_on(run, monkeypatch, what):
    monkeypatch.setattr(pipeline, "sample", out_of_memory)
    text, told = BAD[what]
    mask("masks/m.png", 32)
    write("a.yaml"), write("c.yaml")
    Path("bad.yaml").write_text(text)
    ran = run("--layout", "a.yaml", "bad.yaml", "c.yaml")
    assert ran.code == 1 and ran.made == ["a.png", "c.png"]
    assert [told in error for error in ran.errors if error.startswith("generate.py:")] == [True]

    write("bad.yaml")  # mended: the next run makes it alone
    ran = run("--layout", "a.yaml", "bad.yaml", "c.yaml")
    assert ran.code == 0 and len([e for e in ran.errors if "kept" in e]) == 2
    assert ran.made == ["a.png", "c.png", "bad.png"] and sorted(pictures()) == ["a.png", "bad.png", "c.png"]


# ------------------------------------------------------------------------------------------------ workers

WAYS = {
    "--shard": lambda i, n: (["--shard", f"{i}/{n}"], {}),
    "torchrun": lambda i, n: ([], {"RANK": i, "WORLD_SIZE": n, "LOCAL_RANK": i}),
    "SLURM": lambda i, n: ([], {"SLURM_PROCID": i, "SLURM_NTASKS": n, "SLURM_LOCALID": i}),
    "--shard first": lambda i, n: (["--shard", f"{i}/{n}"], {"RANK": 0, "WORLD_SIZE": 9}),
}


@pytest.fixture(scope="module")
def whole(golden, tmp_path_factory) -> dict[str, bytes]:
    """Seven pictures by one worker."""
    folder = tmp_path_factory.mktemp("whole")
    flags = ["--output", str(folder / "{name}.png"), "--model", str(golden / "models" / "flux-tiny-dev")]
    assert generate.main(["--layout", *shared_layouts(folder), "--device", "cpu", *flags]) == 0
    return pictures(folder)


def shared_layouts(folder: Path) -> list[str]:
    return [write(folder / f"{i}.yaml", prompt=f"view {i}", seed=i, regions=A["regions"][: i % 3]) for i in range(7)]


@pytest.mark.parametrize("way", WAYS)
def test_workers_share_the_pictures(run, whole, tmp_path, monkeypatch, way):
    layouts, made = shared_layouts(tmp_path), []
    for i in range(3):
        flags, variables = WAYS[way](i, 3)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        ran = run("--layout", *layouts, *flags)
        assert ran.code == 0 and 2 <= len(ran.made) <= 3
        made += ran.made
    assert len(made) == 7 and pictures() == whole


def test_any_number_of_workers_makes_each_picture_once(tmp_path):
    files = [Path(file) for file in shared_layouts(tmp_path)]
    read = lambda file, swept: read_layout(file, {}, 64)  # noqa: E731

    def planned(index: int, count: int) -> list[tuple]:
        worker = jobs.worker_of(f"{index}/{count}", False)
        output = jobs.Output(seed=(1, 2, 3))
        found = jobs.plan_jobs(files, output, read, worker, jobs.Failures(False))
        return [(job.files["image"], job.seed) for job in found]

    whole = planned(0, 1)
    assert len(whole) == 21
    for n in range(2, 25):
        shares = [planned(i, n) for i in range(n)]
        assert sorted(sum(shares, [])) == sorted(whole)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_worker_without_a_picture_is_content(run):
    ran = run("--layout", write("a.yaml"), "--shard", "1/2")
    assert ran.code == 0 and ran.made == [] and not pictures()


def test_workers_do_not_choose_a_seed_each(run):
    ran = run("--layout", write("a.yaml", seed=None), "--shard", "0/2")
    assert ran.code == 2 and len(ran.errors) == 1 and "a.yaml: seed is missing" in ran.errors[0]
    ran = run("--layout", "a.yaml", write("b.yaml"), "--shard", "1/2")
    assert ran.code == 1 and "a.yaml: seed is missing" in ran.errors[0]
    assert run("--layout", "a.yaml", "--shard", "0/2", "--seed", 1).code == 0


@pytest.mark.parametrize("shard", ["1/1", "2/2", "5/3", "1", "a/b", "1/2/3", "0/0", "", "/", "-1/2", "1.0/2", "²/3"])
def test_a_shard_that_is_none_is_refused(run, shard):
    ran = run("--layout", write("a.yaml"), f"--shard={shard}")
    assert ran.code == 2 and ran.made == [] and len(ran.errors) == 1 and f"--shard {shard}" in ran.errors[0]


# ------------------------------------------------------------------------------------------------ stopped and killed


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_running_step_is_the_last(run, monkeypatch, kind):
    forward, steps, before = Flux.forward, [], signal.getsignal(kind)

    def stopping(self, *args, **hooks):
        steps.append(1)
        if len(steps) == 6:  # the second step of the second picture
            os.kill(os.getpid(), kind)
        return forward(self, *args, **hooks)

    monkeypatch.setattr(Flux, "forward", stopping)
    flags = ["--layout", write("a.yaml", steps=4), "--seed", 1, 2, 3, "--output", "x.png"]
    ran = run(*flags)
    assert ran.code == 130 and len(steps) == 6 and ran.made == ["x_1.png"]
    assert [error for error in ran.errors if error.startswith("generate.py")] == [
        "generate.py: stopping after this step",
        "generate.py: interrupted",
    ]
    assert signal.getsignal(kind) is before
    assert sorted(file.name for file in Path().iterdir()) == ["a.yaml", "x_1.png"]
    assert run(*flags).made == ["x_1.png", "x_2.png", "x_3.png"] and len(steps) == 6 + 8


def test_the_second_signal_does_not_wait(run, monkeypatch):
    def stopping(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the step went on")

    monkeypatch.setattr(Flux, "forward", stopping)
    assert run("--layout", write("a.yaml")).code == 130 and not pictures()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_keeps_what_is_finished(run, model, kind):
    flags = ["--layout", write("a.yaml"), "--seed", *range(40), "--save-latents", "x.safetensors", "--metadata"]
    flags += ["--output", "x.png"]
    process = subprocess.Popen(
        outside(model, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    made = [process.stdout.readline().strip() for _ in range(3)]
    process.send_signal(kind)
    out, errors = process.communicate(timeout=60)
    made += out.split()
    assert process.returncode == 130 and "stopping after this step" in errors and "Traceback" not in errors
    assert 3 <= len(made) < 40 and made == [f"x_{seed}.png" for seed in range(len(made))]
    assert not list(Path().glob(".*")) and sorted(pictures()) == sorted(made)
    before = {name: Path(name).stat().st_mtime_ns for name in made}

    ran = run(*flags)
    assert ran.code == 0 and ran.made == [f"x_{seed}.png" for seed in range(40)]
    assert before == {name: Path(name).stat().st_mtime_ns for name in made}
    Path("fresh").mkdir()
    assert run("--layout", "a.yaml", "--seed", *range(40), "--output", "fresh/x.png").code == 0
    assert pictures() == pictures("fresh")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its workers are forked")
def test_killed_runs_go_on(tmp_path):
    """A few kills; `python benchmarks/kill.py` makes 50."""
    kills = os.environ.get("KILLS", "6")
    command = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), "--kills", kills]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{kills} kills, 0 with anything wrong" in ran.stdout


KILLED_WRITING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import generate
from tools import metadata as outputs
replace = outputs.Path.replace
def half(unfinished, path):
    if path.name == {name!r}:
        unfinished.write_bytes(unfinished.read_bytes()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    replace(unfinished, path)
outputs.Path.replace = half
generate.main(sys.argv[1:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL")
@pytest.mark.parametrize("killed_in", ["x.png", "x.json", "x.safetensors"])
def test_a_half_written_file_is_written_again(run, model, killed_in):
    flags = ["--layout", write("a.yaml"), "--output", "x.png", "--metadata", "--save-latents", "x.safetensors"]
    code = KILLED_WRITING.format(root=str(ROOT), name=killed_in)
    killed = subprocess.run([sys.executable, "-c", code, *outside(model, *flags)[2:]], env=environment())
    assert killed.returncode == -signal.SIGKILL and not Path(killed_in).exists()
    [unfinished] = Path().glob(".x.*")
    assert unfinished.suffix == Path(killed_in).suffix
    Path(".x.1.77.png").write_text("another worker's x.1.png")

    assert run(*flags).code == 0
    assert sorted(file.name for file in Path().iterdir()) == [
        ".x.1.77.png", "a.yaml", "x.json", "x.png", "x.safetensors",
    ]  # fmt: skip
    assert run("--layout", "a.yaml", "--output", "y.png").code == 0
    assert Path("x.png").read_bytes() == Path("y.png").read_bytes()


# ------------------------------------------------------------------------------------------------ no state

HUNDRED = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import generate
make, sizes = generate.make, []
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
        regions = [{"prompt": f"thing {i}", "polygon": [[0, 0], [64, 0], [0, 64]], "strength": 2.0, "feather": 8}]
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
def test_a_hundred_layouts_leave_nothing_behind(run, model):
    """No memory, and no state: some of them are drawn again, by processes that draw nothing else."""
    mask("masks/m.png", 24)
    layouts = [write(f"{i:03}.yaml", **various(i)) for i in range(100)]
    flags = outside(model, "--layout", *layouts, "--save-latents", "{name}.safetensors")[2:]
    code = HUNDRED.format(root=str(ROOT))
    ran = subprocess.run([sys.executable, "-c", code, *flags], env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    sizes = json.loads(ran.stderr.splitlines()[-1])
    assert len(sizes) == 100 and max(sizes[9:]) < 1.02 * sizes[9]

    for i in (99, 87):
        flags = ["--layout", layouts[i], "--output", "fresh.png", "--save-latents", "fresh.safetensors", "--overwrite"]
        subprocess.run(outside(model, *flags), check=True, env=environment(), capture_output=True)
        assert torch.equal(latents("fresh.safetensors"), latents(f"{i:03}.safetensors"))
        assert Path("fresh.png").read_bytes() == Path(f"{i:03}.png").read_bytes()
    torch.manual_seed(0)
    for i in torch.randperm(100)[:4].tolist():  # and in other company
        assert run("--layout", layouts[i], "--output", f"again{i}.png").code == 0
        assert Path(f"again{i}.png").read_bytes() == Path(f"{i:03}.png").read_bytes()


def test_a_pipeline_called_again_gives_the_same(run, model):
    mask("masks/m.png", 24)
    drawing = pipeline.Pipeline(model, device="cpu")
    layouts = [read_layout(Path(write(f"{i}.yaml", **various(i))), {}) for i in (1, 5, 10, 14)]
    first = [drawing(layout, seed=7).tobytes() for layout in layouts]
    assert len(set(first)) == 4
    assert [drawing(layout, seed=7).tobytes() for layout in layouts[::-1]] == first[::-1]


# ------------------------------------------------------------------------------------------------ what pictures carry


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


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".json"])
def test_a_picture_is_made_again_from_what_it_carries(run, everything, suffix):
    picture = "x.png" if suffix == ".json" else f"x{suffix}"
    flags = ["--layout", everything(), "--output", picture, "--dtype", "bfloat16", "--seed", 2**53 + 1]
    assert run(*flags, "--save-latents", "z.safetensors", *["--metadata"] * (suffix == ".json")).code == 0
    Path("deep/all.yaml").unlink()
    again = ["--config-from-metadata", f"x{suffix}", "--save-latents", "y.safetensors"]
    assert run(*again, "--output", f"y{Path(picture).suffix}", model=None)[:2] == (0, [f"y{Path(picture).suffix}"])
    assert torch.equal(latents("y.safetensors"), latents("z.safetensors"))
    assert Path(f"y{Path(picture).suffix}").read_bytes() == Path(picture).read_bytes()


@pytest.mark.parametrize("part", ["flux", "t5", "clip", "ae"])
def test_a_model_of_several_files_is_found_again(run, golden, model, part):
    kind = {"flux": "flux1-dev", "t5": "text_encoder_2", "clip": "text_encoder", "ae": "ae"}[part]
    found = sorted(Path(model).glob(f"{kind}*.safetensors")) + sorted(Path(model).glob(f"{kind}/*.safetensors"))
    save_file({k: t * 1.1 for file in found for k, t in load_file(file).items()}, "own.safetensors")
    flags = ["--layout", write("a.yaml"), "--save-latents", "z.safetensors", "--output", "z.png"]
    assert run(*flags, f"--{part}", "own.safetensors").code == 0
    again = ["--config-from-metadata", "z.png", "--save-latents", "y.safetensors", "--output", "y.png"]
    assert run(*again, model=None).code == 0
    assert torch.equal(latents("z.safetensors"), latents("y.safetensors"))
    assert Path("z.png").read_bytes() == Path("y.png").read_bytes()
    assert run(*flags, "--overwrite").code == 0  # by the model itself: the file made a difference
    assert Path("z.png").read_bytes() != Path("y.png").read_bytes()


def test_flags_win_over_what_a_picture_carries(run):
    assert run("--layout", write("a.yaml"), "--output", "x.png").code == 0
    changes = [
        ["--seed", "9"], ["--steps", "3"], ["--prompt", "a harbour at dusk"], ["--base-ratio", "0"], ["--height", "80"],
        ["--background-prompt", "the desert"], ["--dtype", "bfloat16"], ["--overlap", "last"],
    ]  # fmt: skip
    seen = [latents_of(run, "--layout", "a.yaml")]
    for flags in changes:
        expected, found = (latents_of(run, *of, *flags) for of in SAME_TWICE)
        assert torch.equal(expected, found), flags
        seen.append(found)
    others = [z for z in seen[1:-1] if z.shape != seen[0].shape or not torch.equal(z, seen[0])]
    assert len(others) == len(changes) - 1


SAME_TWICE = (["--layout", "a.yaml"], ["--config-from-metadata", "x.png"])


def latents_of(run, *flags: str) -> torch.Tensor:
    assert run(*flags, "--output", "z.png", "--save-latents", "z.safetensors", "--overwrite").code == 0
    return latents()


def test_several_seeds_of_a_picture(run):
    assert run("--layout", write("a.yaml"), "--output", "x.png", "--seed", 1, 2).made == ["x_1.png", "x_2.png"]
    assert run("--config-from-metadata", "x_1.png", "--seed", 1, 2, "--output", "y.png").code == 0
    assert [Path(f"y_{i}.png").read_bytes() for i in (1, 2)] == [Path(f"x_{i}.png").read_bytes() for i in (1, 2)]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_no_metadata_leaves_nothing_in_a_picture(run, suffix):
    assert run("--layout", write("a.yaml", prompt="SECRET"), "--output", f"x{suffix}", "--no-metadata").code == 0
    with Image.open(f"x{suffix}") as image:
        assert not getattr(image, "text", None) and EXIF_DESCRIPTION not in image.getexif()
    assert b"SECRET" not in Path(f"x{suffix}").read_bytes()
    ran = run("--config-from-metadata", f"x{suffix}")
    assert ran.code == 2 and len(ran.errors) == 1 and f"x{suffix}" in ran.errors[0]
    assert run("--layout", "a.yaml", "--output", f"y{suffix}").code == 0
    assert b"SECRET" in Path(f"y{suffix}").read_bytes()


def test_a_side_car_speaks_for_a_picture_that_carries_nothing(run, monkeypatch):
    flags = ["--layout", write("a.yaml"), "--output", "x.png", "--no-metadata", "--metadata"]
    assert run(*flags, "--save-latents", "z.safetensors").code == 0
    assert run("--config-from-metadata", "x.png", "--output", "y.png", "--save-latents", "y.safetensors").code == 0
    assert torch.equal(latents("y.safetensors"), latents("z.safetensors"))
    refuse_to_load(monkeypatch, *PARTS)
    assert run(*flags).made == ["x.png"]


def test_a_side_car_says_what_the_picture_says(run):
    assert run("--layout", write("a.yaml"), "--output", "x.png", "--metadata").code == 0
    made_by = json.loads(Path("x.json").read_text())
    assert made_by == settings_of("x.png") and made_by["seed"] == 3
    assert made_by["regions"][0]["prompt"] == "a red boat" and made_by["guidance"] == 3.5


@pytest.mark.parametrize(
    "file, data",
    [
        ("gone.png", None),
        ("x.png", b"no picture"),
        ("x.json", b"no json"),
        ("x.json", b"[1, 2]"),
        ("x.json", b'{"prompt": "a"}'),
        ("x.json", json.dumps({**A, "model": "nowhere"}).encode()),
        ("x.json", json.dumps({**A, "model": "pocket", "seed": "three"}).encode()),
        ("x.json", json.dumps({**A, "model": "pocket", "dtype": "torch.float16"}).encode()),
        ("x.json", json.dumps({**A, "model": "pocket", "regions": [{"prompt": "a", "mask": "gone"}]}).encode()),
    ],
)
def test_what_carries_nothing_is_refused_in_one_sentence(run, file, data):
    if data:
        Path(file).write_bytes(data)
    ran = run("--config-from-metadata", file, model=None)
    assert ran.code == 2 and ran.made == [] and len(ran.errors) == 1 and ran.errors[0].startswith("generate.py: ")


# how AUTOMATIC1111's web UI reads the text, modules/infotext_utils.py
A1111_PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@pytest.mark.parametrize("prompt", ["a harbour at dawn", "two lines,\nof text: with a colon", "ein Hafen, früh – 港"])
def test_the_parameters_are_those_that_other_tools_read(run, prompt):
    assert run("--layout", write("a.yaml", prompt=prompt, guidance=2.5), "--output", "x.png").code == 0
    *text, last = Image.open("x.png").text["parameters"].strip().split("\n")
    found = dict(A1111_PARAMETER.findall(last))
    assert "\n".join(text) == prompt and len(found) >= 3
    told = {key: found[key] for key in ("Steps", "Sampler", "CFG scale", "Distilled CFG Scale", "Seed", "Size")}
    assert told == {
        "Steps": "2", "Sampler": "Euler", "CFG scale": "1", "Distilled CFG Scale": "2.5", "Seed": "3", "Size": "64x64",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the prompts' cache


@pytest.fixture
def encoded(monkeypatch) -> list[tuple[int, ...]]:
    """Which ids T5 encodes from now on."""
    seen, forward = [], T5Encoder.forward

    def recording(self, ids):
        seen.append(tuple(ids[0].tolist()))
        return forward(self, ids)

    monkeypatch.setattr(T5Encoder, "forward", recording)
    return seen


def test_cached_prompts_need_no_encoder(run, encoded, monkeypatch):
    write("a.yaml")
    without = latents_of(run, "--layout", "a.yaml")
    assert torch.equal(latents_of(run, "--layout", "a.yaml", "--prompt-cache", "cache"), without)
    assert len(encoded) == 2 * len(list(Path("cache").glob("t5-*"))) == 8  # the prompt, two regions', the background's
    assert not list(Path("cache").glob(".*"))
    refuse_to_load(monkeypatch, "load_t5", "load_clip")
    assert torch.equal(latents_of(run, "--layout", "a.yaml", "--prompt-cache", "cache"), without)


def test_only_what_changed_is_encoded_anew(run, encoded):
    write("a.yaml")
    latents_of(run, "--layout", "a.yaml", "--prompt-cache", "cache")
    encoded.clear()
    flags = ["--layout", "a.yaml", "--background-prompt", "the desert"]
    found = latents_of(run, *flags, "--prompt-cache", "cache")
    assert len(encoded) == 1
    assert torch.equal(found, latents_of(run, *flags))
    encoded.clear()
    found = latents_of(run, "--layout", "a.yaml", "--dtype", "bfloat16", "--prompt-cache", "cache")
    assert len(encoded) == 4
    assert torch.equal(found, latents_of(run, "--layout", "a.yaml", "--dtype", "bfloat16"))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_changed_encoders_encode_anew(run, golden, tmp_path, part):
    own = tmp_path / "own"
    shutil.copytree(golden / "models" / "flux-tiny-dev", own)
    write("a.yaml")

    def made(*flags: str) -> torch.Tensor:
        flags = ["--layout", "a.yaml", "--output", "z.png", "--save-latents", "z.safetensors", "--overwrite", *flags]
        assert run(*flags, model=str(own)).code == 0
        return latents()

    before = made("--prompt-cache", "cache")
    file = sorted((own / part).glob("*.safetensors"))[0]
    save_file({name: tensor * 1.25 for name, tensor in load_file(file).items()}, file)
    after = made("--prompt-cache", "cache")
    assert not torch.equal(before, after) and torch.equal(after, made())


def test_an_embedding_does_not_depend_on_other_prompts(run):
    others = [write(f"{i}.yaml", prompt="a much longer prompt " * i, regions=A["regions"][:i]) for i in range(3)]
    assert run("--layout", write("a.yaml"), "--prompt-cache", "alone").code == 0
    assert run("--layout", *others, "a.yaml", "--prompt-cache", "together", "--output", "{name}-.png").code == 0
    alone, together = ({f.name: f.read_bytes() for f in Path(name).iterdir()} for name in ("alone", "together"))
    assert len(alone) == 5 and len(together) > 5 and alone.items() <= together.items()
    assert Path("a.png").read_bytes() == Path("a-.png").read_bytes()


def test_loras_of_one_name_are_told_apart(run, encoded):
    """What they do to T5 is cached by their files and scales, not by their names."""
    for folder, seed in ("one", 1), ("two", 2):
        Path(folder).mkdir()
        generator = torch.Generator().manual_seed(seed)
        parts = {name: torch.randn(2, 64, generator=generator) for name in ("lora_down", "lora_up")}
        name = "lora_te2_encoder_block_0_layer_0_SelfAttention_q"
        lora = {f"{name}.{part}.weight": x if part == "lora_down" else x.T.contiguous() for part, x in parts.items()}
        save_file(lora, f"{folder}/lora.safetensors")
    write("a.yaml")
    made = []
    for first, second in ("one", "two"), ("two", "one"):
        loras = ["--lora", f"{first}/lora.safetensors", "1", "--lora", f"{second}/lora.safetensors", "0.5"]
        made += [latents_of(run, "--layout", "a.yaml", *loras, *cache) for cache in (["--prompt-cache", "cache"], [])]
    assert torch.equal(made[0], made[1]) and torch.equal(made[2], made[3]) and not torch.equal(made[0], made[2])


def test_a_cache_that_is_broken_is_made_again(run, encoded):
    write("a.yaml")
    expected = latents_of(run, "--layout", "a.yaml", "--prompt-cache", "cache")
    for file in Path("cache").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    encoded.clear()
    assert torch.equal(latents_of(run, "--layout", "a.yaml", "--prompt-cache", "cache"), expected) and len(encoded) == 4
    assert torch.equal(latents_of(run, "--layout", "a.yaml", "--prompt-cache", "cache"), expected) and len(encoded) == 4
