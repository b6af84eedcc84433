"""One image by several processes is that of one; here on the CPU, exchanging through gloo."""

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
from errors import InputError
from runtime.ulysses import Ulysses
from tools.metadata import read_metadata

ROOT = Path(__file__).parent.parent
COMMAND = (ROOT / "generate.py", "--parallel", "ulysses")


def torchrun(processes: int, *command: object) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, env=env, timeout=300)


def test_several_processes_compute_what_one_computes(tmp_path):
    done = torchrun(3, ROOT / "tests" / "ulysses_worker.py", tmp_path / "latents.safetensors")
    assert done.returncode == 0, done.stderr
    together = load_file(tmp_path / "latents.safetensors")
    with torch.inference_mode():
        alone = ulysses_worker.latents()
    for name, expected in alone.items():
        error = (together[name.replace(" ", "_")] - expected).abs().max()
        assert error < 1e-6 * expected.abs().max(), name
    cases = list(alone.values())  # which all differ
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(cases) for b in cases[:i])


def test_heads_that_cannot_be_shared_out_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    match = "^--parallel ulysses: the model's 6 heads can't be shared out to 4 processes.$"
    with pytest.raises(InputError, match=match):
        Ulysses(torch.device("cpu"), 6)


def test_a_run_of_two_processes_is_the_published_image(golden, tmp_path):
    case = "regional_3boxes_full"
    out, latents = tmp_path / "image.png", tmp_path / "latents.safetensors"
    flags = ("--layout", golden / case / "layout.yaml", "--device", "cpu", "--output", out, "--save-latents", latents)
    done = torchrun(2, *COMMAND, "--model", golden / "models" / "flux-tiny-dev", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out)]  # printed once
    assert read_metadata(out)["processes"] == 2
    published = load_file(GOLDEN / "latents.safetensors")[case]
    assert (load_file(latents)["latents"] - published).abs().max() < 1e-4


def test_an_error_is_printed_once(model, tmp_path):
    flags = ("--prompt", "x", "--seed", 1, "--output", tmp_path / "a.png", "--width", 16, "--height", 16)
    done = torchrun(2, *COMMAND, "--model", model, *flags)
    assert done.returncode != 0 and not (tmp_path / "a.png").exists()
    problem = "--parallel ulysses: 1 tokens can't be shared out to 2 processes."
    assert done.stderr.count(problem) == 1, done.stderr


def test_without_torchrun_and_what_it_does_not_go_with_it_is_refused(run, capsys):
    command = ("--prompt", "x", "--parallel", "ulysses")
    code, _, (line,) = run(*command)
    assert code == 2 and "torchrun --nproc-per-node" in line
    for flags in ("--shard", "0/2"), ("--attention-maps", "maps"):
        with pytest.raises(SystemExit):
            generate.main([*command, *flags])
        assert "--parallel goes with neither" in capsys.readouterr().err
