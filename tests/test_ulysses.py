"""One image by several processes is that of one; here on the CPU, exchanging through gloo.

As a script, torchrun --nproc-per-node 3 tests/test_ulysses.py latents.safetensors, it samples with a small model in
every way that sampling knows.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from errors import InputError
from extensions.controlnet import ControlNet, ControlNetParams, LoadedControl, controlnets
from extensions.guidance import true_cfg
from extensions.loading import scale_of
from extensions.lora import Change, Lora, LowRank
from extensions.region_lora import region_loras
from extensions.rpg import composed
from model.transformer import Flux, FluxParams
from regional.attention import portable_attention
from regional.layout import Control, Defaults, Layout, Region, RegionLora
from regional.mask import region_tokens
from regional.sampling import Conditioning, by, sample
from runtime.ulysses import Ulysses
from tools.metadata import read_metadata

ROOT = Path(__file__).parent.parent
COMMAND = (ROOT / "generate.py", "--parallel", "ulysses")
SIZES = dict(
    vec_in_dim=12, context_in_dim=20, hidden_size=192, mlp_hidden=96, num_heads=6, depth=2, depth_single_blocks=3
)
CPU = torch.device("cpu")
# 35 image tokens; with prompts of 7 and 5 tokens nothing can be shared out evenly
SIZE = dict(width=80, height=112, steps=2, mask_inject_steps=1)
TOP = dict(prompt="a", box=(0, 0, 80, 56))
RIGHT = dict(prompt="b", box=(32, 16, 80, 112))
FLUX_DEV = Defaults(24, 512, 1024, 2, 3)


def layout(*regions: dict, **more) -> Layout:
    regions = tuple(Region(**region) for region in regions)
    return Layout(prompt="p", regions=regions, **SIZE, **more).resolved(FLUX_DEV)


TOP_LORAS = {**TOP, "loras": (RegionLora(file="everywhere", scale=0.8, plain_steps=True),)}
CASES = {
    "plain": layout(),
    "regional": layout(TOP, RIGHT),
    "no base branch": layout(TOP, RIGHT, base_ratio=0),
    "one stream": layout(TOP, RIGHT, base_stream="shared"),
    "soft and strong": layout({**TOP, "feather": 24}, {**RIGHT, "strength": 2.5}),
    "intervals": layout(TOP, RIGHT, double_inject_interval=2, single_inject_interval=2),
    "composition": layout(TOP, RIGHT, method="rpg"),
    "loras of regions": layout(TOP_LORAS, RIGHT),
    "control": layout(TOP, RIGHT),
    "control as published": layout(TOP, RIGHT),
    "control and loras of regions": layout(TOP_LORAS, RIGHT),
    "true guidance": layout(TOP_LORAS, RIGHT, true_cfg_scale=2),
    "true guidance in a batch with control": layout(TOP, RIGHT, true_cfg_scale=3, cfg_batch=True),
}


def random_model(kind: type, params: FluxParams) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind(params).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def random_lora(flux: Flux) -> Lora:
    """Of every matrix in the blocks, modulation included."""
    changes = []
    for name, weight in flux.named_parameters():
        if "blocks" in name and weight.ndim == 2:
            rows, columns = weight.shape
            changes.append(Change(name, 0, rows, LowRank(torch.randn(rows, 2), torch.randn(2, columns), 0.02)))
    return Lora(Path("everywhere"), {"flux": changes}, [])


def control_of(name: str, of: Layout) -> LoadedControl:
    net = random_model(ControlNet, ControlNetParams(**{**SIZES, "depth_single_blocks": 2}))
    setting = Control(model="m", image="i", scale=0.9, residuals="published" if "published" in name else "all")
    return LoadedControl(net, torch.randn(1, 35, 64).double(), scale_of(setting, of).double(), setting)


def latents(parallel: Ulysses | None = None) -> dict[str, Tensor]:
    flux = random_model(Flux, FluxParams(**SIZES))
    found = {}
    loras = {"everywhere": random_lora(flux)}
    part = parallel.part if parallel else lambda x, dim=1: x
    for name, of in CASES.items():
        torch.manual_seed(1)
        tokens = region_tokens(of) if of.regions else None
        count = len(tokens.prompts) if tokens else 0
        shapes = ((1, 7, 20), (count, 5, 20), (1 + count, 12))
        txt, regions, y = (torch.randn(shape).double() for shape in shapes)
        conditioning = Conditioning(txt, regions if count else None, y)
        extensions = [region_loras(flux, of, loras, CPU, torch.float64, partial(part, dim=0))]
        extensions += [parallel.extend] if parallel else []
        if of.true_cfg_scale > 1:
            own = Conditioning(-txt, conditioning.regions.flip(0), y.flip(1))
            extensions.append(true_cfg(flux, of, own))
        if "control" in name:
            extensions.append(controlnets([control_of(name, of)], flux.params, of.steps, conditioning, part))
        method = composed if of.method == "rpg" else by(portable_attention)
        found[name] = sample(flux, of, tokens, conditioning, 0, method, extensions)
    return found


def torchrun(processes: int, *command: object) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, env=env, timeout=300)


def test_several_processes_compute_what_one_computes(tmp_path):
    done = torchrun(3, __file__, tmp_path / "latents.safetensors")
    assert done.returncode == 0, done.stderr
    together = load_file(tmp_path / "latents.safetensors")
    with torch.inference_mode():
        alone = latents()
    for name, expected in alone.items():
        error = (together[name.replace(" ", "_")] - expected).abs().max()
        assert error < 1e-6 * expected.abs().max(), name
    cases = list(alone.values())  # which all differ
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(cases) for b in cases[:i])


@pytest.mark.published
def test_a_run_of_two_processes_is_the_published_image(golden, tmp_path):
    case = "regional_3boxes_full"
    out, saved = tmp_path / "image.png", tmp_path / "latents.safetensors"
    flags = ("--layout", golden / case / "layout.yaml", "--device", "cpu", "--output", out, "--save-latents", saved)
    done = torchrun(2, *COMMAND, "--model", golden / "models" / "flux-tiny-dev", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(out)]  # printed once
    assert read_metadata(out)["processes"] == 2
    published = load_file(GOLDEN / "latents.safetensors")[case]
    assert (load_file(saved)["latents"] - published).abs().max() < 1e-4


def test_an_error_is_printed_once(model, tmp_path):
    flags = ("--prompt", "x", "--seed", 1, "--output", tmp_path / "a.png", "--width", 16, "--height", 16)
    done = torchrun(2, *COMMAND, "--model", model, *flags)
    assert done.returncode != 0 and not (tmp_path / "a.png").exists()
    problem = "--parallel ulysses: 1 tokens can't be shared out to 2 processes."
    assert done.stderr.count(problem) == 1, done.stderr


def test_without_torchrun_and_what_it_does_not_go_with_it_is_refused(run, monkeypatch):
    command = ("--prompt", "x", "--parallel", "ulysses")
    code, _, (line,) = run(*command)
    assert code == 2 and "torchrun --nproc-per-node" in line
    for flags in ("--shard", "0/2"), ("--attention-maps", "maps"):
        code, _, (line,) = run(*command, *flags)
        assert code == 2 and "--parallel goes with neither" in line
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    with pytest.raises(InputError, match="the model's 6 heads can't be shared out to 4 processes"):
        Ulysses(CPU, 6)


if __name__ == "__main__":
    with torch.inference_mode():
        parallel = Ulysses(CPU, SIZES["num_heads"])
        found = {name.replace(" ", "_"): x.contiguous() for name, x in latents(parallel).items()}
        if parallel.is_any(parallel.rank == parallel.size - 1) and parallel.rank == 0:
            save_file(found, sys.argv[1])
        parallel.close()
