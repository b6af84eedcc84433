"""What test_ulysses.py runs in several processes: a small model in every way that sampling knows.

torchrun --nproc-per-node 3 tests/ulysses_worker.py latents.safetensors
"""

import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent)]

from extensions.control import controlnets  # noqa: E402
from extensions.controlnet import ControlNet, ControlNetParams, LoadedControl  # noqa: E402
from extensions.loading import scale_of  # noqa: E402
from extensions.lora import Change, Lora, LowRank  # noqa: E402
from extensions.region_lora import region_loras  # noqa: E402
from model.transformer import Flux, FluxParams  # noqa: E402
from regional.attention import portable_attention  # noqa: E402
from regional.layout import Control, Defaults, Layout, Region, RegionLora  # noqa: E402
from regional.mask import region_tokens  # noqa: E402
from regional.sampling import Conditioning, sample  # noqa: E402
from runtime.ulysses import Ulysses  # noqa: E402

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


LORAS = {"loras": (RegionLora(file="everywhere", scale=0.8, plain_steps=True),)}
CASES = {
    "plain": layout(),
    "regional": layout(TOP, RIGHT),
    "no base branch": layout(TOP, RIGHT, base_ratio=0),
    "one stream": layout(TOP, RIGHT, base_stream="shared"),
    "soft and strong": layout({**TOP, "feather": 24}, {**RIGHT, "strength": 2.5}),
    "intervals": layout(TOP, RIGHT, double_inject_interval=2, single_inject_interval=2),
    "composition": layout(TOP, RIGHT, method="rpg"),
    "loras of regions": layout({**TOP, **LORAS}, RIGHT),
    "control": layout(TOP, RIGHT),
    "control as published": layout(TOP, RIGHT),
    "control and loras of regions": layout({**TOP, **LORAS}, RIGHT),
}


def random_model(kind: type, params: FluxParams) -> torch.nn.Module:
    torch.manual_seed(0)
    model = kind(params).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def random_lora(flux: Flux) -> Lora:
    """Of every matrix in the blocks, modulation included."""
    changes = [
        Change(name, 0, len(weight), LowRank(torch.randn(len(weight), 2), torch.randn(2, weight.shape[1]), 0.02))
        for name, weight in flux.named_parameters()
        if "blocks" in name and weight.ndim == 2
    ]
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
        if name.startswith("control"):
            extensions.append(controlnets([control_of(name, of)], flux.params, of.steps, conditioning, part))
        found[name] = sample(flux, of, tokens, conditioning, 0, portable_attention, extensions)
    return found


if __name__ == "__main__":
    with torch.inference_mode():
        parallel = Ulysses(CPU, SIZES["num_heads"])
        found = {name.replace(" ", "_"): x.contiguous() for name, x in latents(parallel).items()}
        if parallel.is_any(parallel.rank == parallel.size - 1) and parallel.rank == 0:
            save_file(found, sys.argv[1])
        parallel.close()
