"""One picture by several processes is that of one: two and three of them on the CPU, exchanging through gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import ulysses_worker
from conftest import GOLDEN
from safetensors.torch import load_file

import generate
from tools.metadata import read_metadata

ROOT = Path(__file__).parent.parent


def torchrun(processes: int, *command: object) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_draw_what_one_draws(processes, tmp_path):
    done = torchrun(processes, ROOT / "tests" / "ulysses_worker.py", tmp_path / "latents.safetensors")
    assert done.returncode == 0, done.stderr
    together = load_file(tmp_path / "latents.safetensors")
    with torch.inference_mode():
        alone = ulysses_worker.pictures()
    for name, latents in alone.items():
        assert (together[name.replace(" ", "_")] - latents).abs().max() < 1e-6 * latents.abs().max(), name
    drawn = list(alone.values())
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(drawn) for b in drawn[:i])  # each case is one


def test_heads_that_cannot_be_shared_out_are_refused(tmp_path):
    done = torchrun(4, ROOT / "tests" / "ulysses_worker.py", tmp_path / "latents.safetensors")
    assert done.returncode != 0 and "the model's 6 heads can't be shared out to 4 processes." in done.stderr


def test_a_run_of_two_processes_is_the_published_picture(golden, tmp_path):
    case = "regional_3boxes_full"
    model, layout = golden / "models" / "flux-tiny-dev", golden / case / "layout.yaml"
    out, latents = tmp_path / "image.png", tmp_path / "latents.safetensors"
    flags = "--parallel", "ulysses", "--model", model, "--layout", layout, "--device", "cpu", "--dtype", "float32"
    done = torchrun(2, ROOT / "generate.py", *flags, "--output", out, "--save-latents", latents)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out)]  # said once
    assert read_metadata(out)["processes"] == 2
    published = load_file(GOLDEN / "latents.safetensors")[case]
    assert (load_file(latents)["latents"] - published).abs().max() < 1e-4


def test_what_is_wrong_is_said_once(tmp_path):
    flags = "--parallel", "ulysses", "--prompt", "x", "--seed", 1, "--output", tmp_path / "a.png"
    done = torchrun(5, ROOT / "generate.py", *flags, "--width", 16, "--height", 16)
    assert done.returncode != 0 and not (tmp_path / "a.png").exists()
    assert done.stderr.count("--parallel ulysses: 1 tokens can't be shared out to 5 processes.") == 1, done.stderr


def test_without_torchrun_it_is_refused(tmp_path, capsys):
    assert generate.main(["--prompt", "x", "--parallel", "ulysses", "--output", str(tmp_path / "a.png")]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--shard", "0/2"), ("--attention-maps", "maps")])
def test_what_it_does_not_go_with_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--prompt", "x", "--parallel", "ulysses", *flags])
    assert "--parallel goes with neither" in capsys.readouterr().err
