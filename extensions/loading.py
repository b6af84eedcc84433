"""The LoRAs and ControlNets that a layout names, found, read and checked."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import weights
from errors import InputError, say
from extensions.control import ActiveControl, control_picture, image_share
from extensions.controlnet import ControlNet
from extensions.lora import merge
from extensions.lora_files import read_lora
from extensions.region_lora import can_be_regional
from formats.hub import existing, fetch, is_repository, lora_file
from formats.recognize import Source
from regional.layout import Control, Layout
from regional.reader import Where
from regional.sampling import NO_LORAS, Loras
from weights import check_loads, controlnet_params, flux_params, pick


class ControlPlan(NamedTuple):
    """A ControlNet before it is loaded; its picture is (1, 3, height, width), or its packed latents (1, L_img, 64)."""

    source: Source
    setting: Control
    picture: Tensor


# ------------------------------------------------------------------------------------------------ LoRAs


def read_loras(layout: Layout, checkpoint: weights.Checkpoint, known: Loras = NO_LORAS) -> Loras:
    """All LoRAs that a layout names, by the names they have there; `known` ones are not read again. Says what is left
    out of them."""
    named = {f"loras[{i}].file": lora for i, lora in enumerate(layout.loras)}
    for i, region in enumerate(layout.regions):
        named |= {f"regions[{i}].loras[{j}].file": lora for j, lora in enumerate(region.loras)}
    if not named:
        return {}
    modules, loras = {part: weights.on_meta(getattr(checkpoint, part)) for part in ("flux", "t5", "clip")}, {}
    for key, entry in named.items():
        known = {**known, **loras}
        lora = known.get(entry.file) or read_lora(lora_file(entry.file, f"{key} = {entry.file}"), modules)
        if lora.unknown and entry.file not in known:
            count, first = len(lora.unknown), lora.unknown[0]
            say(f"warning: {lora.path}: {count} of its keys mean nothing for this model and are left out, as {first}")
        loras[entry.file] = lora
        left = {c.name for c in lora.changes["flux"] if not can_be_regional(c)} | {c.name for c in lora.changes["clip"]}
        if lora.is_control != bool(getattr(entry, "image", None)):
            needs = (
                "is a control LoRA, for the whole picture, and needs an image" if lora.is_control else "takes no image"
            )
            raise InputError(f"{key} = {entry.file}: this LoRA {needs}.")
        if left and key.startswith("regions"):
            say(f"warning: {key} = {entry.file}: what changes the whole picture is left out: {', '.join(sorted(left))}")
    return loras


def control_of(layout: Layout) -> Tensor | None:
    """The control picture of the layout's control LoRA, (1, 3, height, width) in [-1, 1]."""
    images = [lora.image for lora in layout.loras if lora.image]
    if len(images) > 1:
        raise InputError(f"loras: {' and '.join(images)}: there can be only one control LoRA, with one image.")
    for image in images:
        picture, warnings = control_picture(image, None, layout.width, layout.height)
        for warning in warnings:
            say(f"warning: {warning}")
        return picture
    return None


def merges_of(layout: Layout, loras: Loras, part: str) -> weights.Merges:
    """What the layout's whole-picture LoRAs make of a part's weights."""
    changes = {}
    for entry in layout.loras:
        for change in loras[entry.file].changes[part]:
            changes.setdefault(change.name, []).append((change, entry.scale))
    return {name: partial(merge, changes=own) for name, own in changes.items()}


def plan_controls(layout: Layout, flux: Source, where: Where = str) -> list[ControlPlan]:
    """The layout's ControlNets, each checked against the transformer and its mode, and their pictures."""
    plans = []
    for i, control in enumerate(layout.controlnets):
        source = find_controlnet(control.model, f"{where(f'controlnets[{i}].model')} =")
        check_base(source, flux)
        check_mode(control, weights.controlnet_params(source).modes, source, where(f"controlnets[{i}].mode"))
        picture, warnings = control_picture(control.image, control.preprocess, layout.width, layout.height)
        if not any(control.acts(step, layout.steps) for step in range(layout.steps)):
            warnings.append(f"{control.model}: no step of {layout.steps} lies within its start and end; it never acts")
        for warning in warnings:
            say(f"warning: {warning}")
        plans.append(ControlPlan(source, control, picture))
    return plans


def check_mode(control: Control, modes: int, source: Source, where: str) -> None:
    if modes and control.mode is None:
        raise InputError(f"{where} is missing: {source.path} is a union of {modes} modes, and needs one of them.")
    if not modes and control.mode is not None:
        raise InputError(f"{where} = {control.mode}: {source.path} has no modes.")
    if modes and control.mode_index >= modes:
        raise InputError(f"{where} = {control.mode}: {source.path} has {modes} modes, counted from 0.")


def load_controls(
    plans: list[ControlPlan], layout: Layout, device: torch.device, dtype: torch.dtype, nets: dict[Path, ControlNet]
) -> list[ActiveControl]:
    """The ControlNets, ready for this layout; each file is loaded once, into `nets`."""
    for plan in plans:
        if plan.source.path not in nets:
            nets[plan.source.path] = weights.load_controlnet(plan.source, device, dtype)
    controls = []
    for source, setting, picture in plans:
        net, picture = nets[source.path], picture.to(device, dtype)
        tokens = net.read(picture) if net.params.hint_width else picture
        controls.append(ActiveControl(net, tokens, image_share(setting, layout).to(device, dtype), setting))
    return controls


def find_controlnet(name: str, flag: str = "--controlnet") -> Source:
    """A ControlNet, from its header alone: `name` is a file, a folder, or a repository, org/name or org/name:file."""
    repository, _, file = name.partition(":")
    if is_repository(repository):
        weight = [file or "*.safetensors"]
        instead = "download it elsewhere and name its folder"
        place = fetch(repository, [[*weight, "config.json"], weight], f"{flag} {name}", instead)
        place = place / file if file else place
    else:
        place = existing(flag, name)
    source = pick("controlnet", flag, place)
    check_loads(source)
    return source


def check_base(controlnet: Source, flux: Source) -> None:
    """InputError when a ControlNet was made for a transformer of other widths."""
    own, base = controlnet_params(controlnet), flux_params(flux)
    for key in ("hidden_size", "in_channels", "context_in_dim", "vec_in_dim"):
        found, expected = getattr(own, key), getattr(base, key)
        if found != expected:
            sizes = f"its {key} is {found}, that of {flux.path} is {expected}"
            raise InputError(f"{controlnet.path}: this ControlNet is of the wrong base size: {sizes}.")
