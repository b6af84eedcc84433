"""Runs that something disturbs: damaged results, dead and living processes, streams, memory, threads."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_batch import LATENTS, kept, planned, settings_of, write

import generate
import pipeline
from errors import InputError
from regional.reader import read_layout
from tools import compare, jobs, metadata
from tools.sheets import GAP, contact_sheet, fitting, map_sheets

ALL = ["--output", "x.png", *LATENTS, "--metadata", "--attention-maps", "maps"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def zero(file: Path) -> None:
    """The numbers of a safetensors file become zeros."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:start] + bytes(len(data) - start))


@pytest.mark.parametrize("name, damage", [("x.png", cut), ("z.safetensors", zero), ("maps/x.safetensors", zero)])
def test_damaged_results_are_made_again(run, name, damage):
    flags = ["--layout", write("a.yaml"), *ALL]
    assert run(*flags).code == 0
    whole = Path(name).read_bytes()
    assert kept(run(*flags)) == 1
    damage(Path(name))
    assert run(*flags).code == 2  # it is in the way, and not this program's work any more
    assert run(*flags, "--overwrite").code == 0 and Path(name).read_bytes() == whole


@pytest.mark.parametrize("missing", ["x.png", "x.json", "maps/x.safetensors", "maps/x_step1.png"])
def test_a_job_that_was_cut_short_is_finished(run, missing):
    """Whatever of its files is there, the same command makes all of them."""
    flags = ["--layout", write("a.yaml"), *ALL]
    assert run(*flags).code == 0
    files = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    for file in [Path(missing), Path("maps/x.safetensors"), Path("x.png")]:
        file.unlink(missing_ok=True)
    assert run(*flags).code == 0
    assert {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()} == files


def test_what_dead_processes_left_is_removed_and_living_ones_keep_theirs(tmp_path):
    dead = next(pid for pid in range(2**22 - 1, 1, -1) if not metadata.is_alive(pid))
    names = {f".x.{metadata.HOST}-{dead}.png": False, f".x.{metadata.HOST}-{os.getpid()}.png": True}
    names |= {f".x.0123abcd-{dead}.png": True, f".x.1.{metadata.HOST}-{dead}.png": True, ".x.77.png": True}
    for name in (*names, f".x.0123abcd-{dead + 1}.png"):
        (tmp_path / name).write_text("")
    yesterday = time.time() - 2 * metadata.DAY
    os.utime(tmp_path / f".x.0123abcd-{dead + 1}.png", (yesterday, yesterday))
    metadata.remove_unfinished(tmp_path / "x.png")
    assert {file.name for file in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


def test_overwriting_without_a_seed_draws_another(run):
    flags = ["--layout", write("a.yaml", seed=None), "--output", "x.png"]
    seeds = []
    for more in [], [], ["--overwrite"]:
        assert run(*flags, *more).code == 0
        seeds.append(settings_of("x.png")["seed"])
    assert seeds[0] == seeds[1] != seeds[2]


def test_hidden_files_are_no_layouts(run):
    write("layouts/a.yaml")
    Path("layouts/._a.yaml").write_bytes(b"\x00\x05\x16\x07")
    assert len(planned("--layout layouts")) == 1


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError("no")])
def test_lack_of_memory_fails_one_layout_and_not_the_others(run, monkeypatch, error):
    decode = pipeline.Pipeline.decode
    calls = []

    def failing(self, latents, layout):
        calls.append(latents)
        if len(calls) == 1:
            raise error
        return decode(self, latents, layout)

    monkeypatch.setattr(pipeline.Pipeline, "decode", failing)
    ran = run("--layout", write("a.yaml"), write("b.yaml"), "--output", "{name}.png")
    assert ran.code == 1 and ran.made == ["b.png"] and any(str(error) in line for line in ran.errors)
    calls.clear()
    ran = run("--layout", "a.yaml", "--output", "c.png")
    assert ran.code == 1 and "out of memory" in ran.errors[-1]


def test_other_errors_of_the_program_are_not_taken_for_a_lack_of_memory(run, monkeypatch):
    def failing(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(pipeline.Pipeline, "decode", failing)
    with pytest.raises(RuntimeError, match="a defect"):
        run("--layout", write("a.yaml"))


class Full:
    """A stream whose disk is full."""

    def write(self, *text):
        raise OSError(28, "No space left on device")

    flush = write


@pytest.mark.parametrize("stream", [None, Full()])
def test_streams_that_take_nothing_do_not_end_a_run(run, model, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    flags = ["--layout", write("a.yaml"), "--output", "x.png", "--model", model, "--device", "cpu"]
    assert generate.main(flags) == 0 and Path("x.png").exists()


def test_control_c_while_modules_load_prints_no_traceback(tmp_path):
    (tmp_path / "msgspec.py").write_text("import os\nos.kill(os.getpid(), 2)\nraise ImportError\n")
    command = [sys.executable, generate.__file__]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert done.returncode == -signal.SIGINT and not done.stderr


@pytest.mark.parametrize("phase", ["read_layout", "Pipeline"])
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_where_nothing_is_drawn_a_signal_ends_at_once(run, monkeypatch, phase, kind):
    owner = jobs if phase == "read_layout" else generate
    monkeypatch.setattr(owner, phase, lambda *_, **__: signal.raise_signal(kind))
    ran = run("--layout", write("a.yaml"), "--output", "x.png")
    assert ran.code == 130 and ran.errors == ["generate.py: interrupted"]


def test_a_second_thread_is_refused(model):
    made = pipeline.Pipeline(model, device="cpu")
    layout = read_layout(None, {"prompt": "a", "width": 64, "height": 64, "steps": 1})
    prepared = made.prepare(layout)
    errors = []

    def other() -> None:
        try:
            made.decode(torch.zeros(1, 16, 8, 8))
        except RuntimeError as error:
            errors.append(str(error))

    def on_step() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    latents = made.denoise(prepared, 1, on_step=on_step)
    assert errors == ["this pipeline is in use by another thread"]
    assert made.decode(latents).size == (64, 64)  # and later it is free again


def test_the_metadata_of_a_tensor_hold_its_checksum_and_old_files_are_accepted(tmp_path):
    file = tmp_path / "x.safetensors"
    settings = {"prompt": "a", "seed": 1, "model": "m"}
    metadata.save_tensor("latents", torch.ones(2), settings, file)
    assert metadata.read_metadata(file) == settings and compare.matches(file, settings)
    save_file(load_file(file), file, {"layout": json.dumps(settings)})  # as earlier versions wrote it
    assert compare.matches(file, settings)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "1", None, True])
def test_metadata_with_an_impossible_seed_are_none(tmp_path, seed):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"prompt": "a", "seed": seed, "model": "m"}))
    assert metadata.metadata_in(file) is None
    with pytest.raises(InputError, match="x.json: contains no generation metadata"):
        metadata.read_metadata(file)


def test_regions_of_one_prompt_have_a_row_each(tmp_path):
    class Maps:
        maps = torch.rand(1, 2, 3, 4)  # steps, groups, prompts, tokens
        groups = ["early", "late"]

    heights = [map_sheets(Maps, Image.new("RGB", (32, 32)), prompts)[0].height for prompts in ("abc", "aac")]
    assert heights[0] == heights[1]


def test_the_largest_image_of_a_sheet_fits_into_its_cell():
    """A sweep can change the size."""
    sizes = [(32, 48), (64, 16)]
    sheet = contact_sheet({"": [Image.new("RGB", size, "red") for size in sizes]})
    assert sheet.size == (2 * 64 + GAP, 48)
    red = [count for count, color in sheet.getcolors() if color == (255, 0, 0)]
    assert red == [32 * 48 + 64 * 16]


def test_a_long_label_is_cut_soon():
    calls = []

    class Font:
        def getlength(self, text):
            calls.append(text)
            return 5 * len(text)

    assert fitting("x" * 100_000, 50, Font()) == "x" * 7 + "..." and len(calls) < 30
    assert fitting("x" * 10, 50, Font()) == "x" * 10


def test_job_streams_escape_what_they_cannot_show(capsys):
    class Ascii:
        def __init__(self):
            self.how = None

        def reconfigure(self, errors):
            self.how = errors

        def write(self, text):
            return len(text)

    stream = Ascii()
    assert jobs.Tolerant(stream).write("ä") == 1 and stream.how == "backslashreplace"


def test_what_a_terminal_would_act_on_is_escaped(run, tmp_path):
    ran = run("--layout", write("a.yaml", prompt="a \x1b[2J\u202e b " * 9), "--output", "\x1b[2J.png")
    text = "".join(ran.errors + ran.made)
    assert ran.code == 0 and text.isprintable() and "\\x1b[2J" in text and ran.made == ["'\\x1b[2J.png'"]


READ = [
    "a.yaml",
    "map.png",
    "mask.png",
    "edges.png",
    "link.png",
    "maps/x_step1.png",
    "lora.safetensors",
    "flux.safetensors",
]


@pytest.mark.parametrize("name", READ)
def test_what_a_run_reads_is_not_among_what_it_writes(run, name):
    """Not even by --overwrite, and by whatever name it is called."""
    Path("maps").mkdir()
    for file in READ:
        Image.new("RGB", (64, 64), "white").save(file, "PNG")
    Path("link.png").unlink()
    Path("link.png").symlink_to("mask.png")
    regions = [{"prompt": "a", "mask": "maps/x_step1.png" if "maps" in name else "mask.png"}]
    loras = [{"file": "lora.safetensors"}] if "lora" in name else []
    controls = [{"model": "a/b", "image": "edges.png"}]
    layout = write("a.yaml", map="map.png", regions=regions, controlnets=controls, loras=loras)
    kind = "--save-latents" if "safetensors" in name else "--attention-maps" if "maps" in name else "--output"
    flags = ["--layout", layout, "--overwrite", kind, "maps" if "maps" in name else name]
    flags += ["--output", "maps/../x.png"] if kind != "--output" else []
    flags += ["--flux", "flux.safetensors"] if "flux" in name else []
    before = Path(name).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "Pipeline", lambda *_: pytest.fail("nothing is loaded"))
        patch.setattr(generate, "is_repository", lambda name: True)
        ran = run(*flags)
    expected = "this run reads that file" if name != "a.yaml" else "the suffix must be"
    assert ran.code == 2 and expected in ran.errors[0] and Path(name).read_bytes() == before
    if kind == "--output" and name.endswith("png"):
        ran = run("--layout", layout, "--overwrite", "--preview", f"./{name}")
        assert ran.code == 2 and expected in ran.errors[0] and Path(name).read_bytes() == before


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_sweep_is_resumed_and_extended_with_its_sheet(run, suffix):
    flags = ["--layout", write("a.yaml"), "--output", f"{{sweep}}{suffix}", "--sweep"]
    assert run(*flags, "base_ratio=0,0.3").code == 0
    sheet = next(Path().glob("*sheet*"))
    before = Image.open(sheet).size
    assert run(*flags, "base_ratio=0,0.3").code == 0 and Image.open(sheet).size == before
    assert run(*flags, "base_ratio=0,0.3,0.6").code == 0 and Image.open(sheet).width > before[0]
    Image.new("RGB", (8, 8)).save(sheet)  # the user's own
    ran = run(*flags, "base_ratio=0,0.3")
    assert ran.code == 2 and "exists already" in ran.errors[0]
