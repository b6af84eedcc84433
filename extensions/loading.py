"""The files of a layout's LoRAs and ControlNets: found, read and checked."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import MISSING, InputError, warn
from extensions.controlnet import ControlNet, ControlNetParams, LoadedControl
from extensions.flux_tools import check_channels
from extensions.lora import Loras, can_be_regional, merge
from extensions.lora_files import lora_file, read_lora
from extensions.pictures import control_image
from formats import components
from formats.hub import locate
from formats.recognize import CONTROLNET_FILES, Source, pick
from formats.safetensors import wrong
from regional.layout import Control, Layout
from regional.mask import region_tokens

Nets = dict[Path, ControlNet]  # by their files


class Files:
    """What a layout's extensions need of its files. InputError for most that can be wrong with
    them. params: the transformer's. controls: each ControlNet's file, and its image."""

    def __init__(self, layout: Layout, checkpoint: Any, known: Loras):
        self.layout = layout
        self.params = components.flux_params(checkpoint.flux)
        check_channels(layout, self.params)
        self.controls = plan_controls(layout, checkpoint.flux)
        self.loras = read_loras(layout, checkpoint, known)

    def encode_controls(self, latents_of: Callable[[Tensor], Tensor]) -> None:
        """The images as latents, where the ControlNet does not read pixels."""
        for i, (source, image) in enumerate(self.controls):
            if not controlnet_params(source).hint_width:
                self.controls[i] = source, latents_of(image)

    def load_controls(self, device: torch.device, dtype: torch.dtype, nets: Nets) -> list:
        """LoadedControls. nets: the loaded ones; new ones are added."""
        return load_controls(self.layout, self.controls, device, dtype, nets)


def read_loras(layout: Layout, checkpoint: Any, known: Loras) -> Loras:
    """LoRAs by their names in the layout; those in `known` are not reread. checkpoint:
    weights.Checkpoint."""
    named = {f"loras[{i}].file": lora for i, lora in enumerate(layout.loras)}
    for i, region in enumerate(layout.regions):
        for j, lora in enumerate(region.loras):
            named[f"regions[{i}].loras[{j}].file"] = lora
    if not named:
        return {}
    modules = {x: components.on_meta(getattr(checkpoint, x)) for x in ("flux", "t5", "clip")}
    loras = {}
    for key, entry in named.items():
        where = f"{key} = {entry.file}"
        lora = loras.get(entry.file) or known.get(entry.file)
        if lora is None:
            lora = read_lora(lora_file(entry.file, where), modules)
            if lora.unknown:
                keys = f"{len(lora.unknown)} unrecognized keys"
                warn(f"{lora.path}: {keys} are skipped, such as {lora.unknown[0]}")
        loras[entry.file] = lora
        if lora.is_control != bool(getattr(entry, "image", None)):
            problem = "a control LoRA is for the whole image and needs an image; others take none"
            raise InputError(key, Path(entry.file), problem)
        skipped = {x.name for x in lora.changes["flux"] if not can_be_regional(x)}
        skipped |= {x.name for x in lora.changes["clip"]}
        if skipped and key.startswith("regions"):
            names = ", ".join(sorted(skipped))
            warn(f"{where}: what changes the whole image is skipped: {names}")
    return loras


def merges_of(layout: Layout, loras: Loras, part: str) -> components.Merges:
    """By tensor, what merges the LoRAs for the whole image."""
    changes = {}
    for entry in layout.loras:
        for change in loras[entry.file].changes[part]:
            changes.setdefault(change.name, []).append((change, entry.scale))
    return {name: partial(merge, changes=own) for name, own in changes.items()}


def plan_controls(layout: Layout, flux: Source) -> list[tuple[Source, Tensor]]:
    """Each one's file, which fits, and image, (1, 3, height, width) in [-1, 1]."""
    found = []
    steps = layout.run_steps()
    for i, control in enumerate(layout.controlnets):
        key = f"controlnets[{i}]"
        source = find_controlnet(control.model, f"{key}.model")
        check_base(source, flux)
        modes = controlnet_params(source).modes
        if control.mode not in (range(modes) if modes else [None]):
            value = MISSING if control.mode is None else control.mode
            expected = f"one of its modes, 0 to {modes - 1}" if modes else "no mode"
            raise InputError(f"{key}.mode", value, f"{source.path} expects {expected}")
        found.append((source, control_image(control.image, control.preprocess, layout)))
        if not any(control.acts(step, steps) for step in range(steps)):
            warn(f"{control.model}: none of the {steps} steps lies between start and end")
    return found


def find_controlnet(name: str, flag: str = "--controlnet") -> Source:
    place = locate(name, CONTROLNET_FILES, f"{flag} {name}")
    source = pick("controlnet", flag, place)
    components.check_loads(source, CONTROLNET)
    return source


def controlnet_bytes(layout: Layout, dtype: torch.dtype) -> int:
    """What a layout's ControlNets take in memory."""
    sources = [find_controlnet(name) for name in {x.model for x in layout.controlnets}]
    stored = [tensor for source in sources for tensor in source.tensors.values()]
    return dtype.itemsize * sum(math.prod(tensor.shape) for tensor in stored)


def check_base(controlnet: Source, flux: Source) -> None:
    own = controlnet_params(controlnet)
    base = components.flux_params(flux)
    for key in ("hidden_size", "in_channels", "context_in_dim", "vec_in_dim"):
        found = getattr(own, key)
        if key == "in_channels":  # A ControlNet reads the image without further channels.
            expected = base.out_channels
        else:
            expected = getattr(base, key)
        if found != expected:
            problem = f"its {key} is {found}, that of {flux.path} is {expected}"
            raise wrong(controlnet.path, problem)


def load_controls(
    layout: Layout, found: list[tuple[Source, Tensor]], device: torch.device, dtype: torch.dtype,
    nets: Nets,
) -> list[LoadedControl]:  # fmt: skip
    """found: by `plan_controls`, with packed latents (1, L_img, 64) unless the net reads pixels.
    nets: the loaded ones; new ones are added."""
    controls = []
    for setting, (source, image) in zip(layout.controlnets, found):
        if source.path not in nets:
            nets[source.path] = components.load(source, device, dtype, kind=CONTROLNET)
        net = nets[source.path]
        image = image.to(device, dtype)
        tokens = net.read(image) if net.params.hint_width else image
        scale = scale_of(setting, layout).to(image)
        controls.append(LoadedControl(net, tokens, scale, setting))
    return controls


def controlnet_params(source: Source) -> ControlNetParams:
    """Sizes from the header's shapes; a config.json would add nothing."""
    sizes = components.stream_sizes(source)
    x_embedder = "controlnet_x_embedder.weight"
    modes = "controlnet_mode_embedder.weight"
    channels = sizes["in_channels"]
    if source.shape(x_embedder)[1] != channels:
        key = source.key_names.rows(x_embedder, source.tensors)[0].key
        problem = f"{channels} columns; inpainting ControlNets are not supported"
        raise source.misshapen(key, problem)
    if modes in source.tensors:
        sizes["modes"] = source.shape(modes)[0]
    if any(key.startswith("input_hint_block.") for key in source.tensors):
        sizes["hint_width"] = source.shape("input_hint_block.0.weight", dims=4)[0]
    return ControlNetParams(**sizes)


CONTROLNET = components.Kind(ControlNet, controlnet_params)


def scale_of(control: Control, layout: Layout) -> Tensor:
    """(L_img, 1) float32, row by row: 0 outside the region."""
    if control.region is None:
        return torch.full((layout.width * layout.height // 256, 1), control.scale)
    inside = region_tokens(layout).image_bits >> control.region & 1
    return control.scale * inside[:, None].float()
