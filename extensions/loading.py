"""The LoRAs and ControlNets that a layout names, found, read and checked."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import weights
from errors import InputError, say
from extensions.control import LoadedControl, control_image, scale_of
from extensions.controlnet import ControlNet
from extensions.lora import NO_LORAS, Loras, merge
from extensions.lora_files import read_lora
from extensions.region_lora import can_be_regional
from formats.hub import existing, fetch, is_repository, lora_file
from formats.recognize import Source
from regional.layout import Control, Layout
from regional.reader import Where
from weights import check_loads, controlnet_params, flux_params, pick

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
                "is a control LoRA, for the whole image, and needs an image" if lora.is_control else "takes no image"
            )
            raise InputError(f"{key} = {entry.file}: this LoRA {needs}.")
        if left and key.startswith("regions"):
            say(f"warning: {key} = {entry.file}: what changes the whole image is left out: {', '.join(sorted(left))}")
    return loras


def control_of(layout: Layout) -> Tensor | None:
    """The image of the layout's control LoRA, (1, 3, height, width) in [-1, 1]."""
    files = [lora.image for lora in layout.loras if lora.image]
    if len(files) > 1:
        names = " and ".join(files)
        raise InputError(f"loras: {names}: there can be only one control LoRA, with one image.")
    return control_image(files[0], None, layout) if files else None


def merges_of(layout: Layout, loras: Loras, part: str) -> weights.Merges:
    """By tensor, what merges the layout's LoRAs for the whole image into a component's weights."""
    changes = {}
    for entry in layout.loras:
        for change in loras[entry.file].changes[part]:
            changes.setdefault(change.name, []).append((change, entry.scale))
    return {name: partial(merge, changes=own) for name, own in changes.items()}


def plan_controls(layout: Layout, flux: Source, where: Where) -> list[tuple[Source, Tensor]]:
    """For each of the layout's ControlNets its file, checked against the transformer and the mode,
    and its control image, (1, 3, height, width) in [-1, 1]."""
    found = []
    for i, control in enumerate(layout.controlnets):
        source = find_controlnet(control.model, f"{where(f'controlnets[{i}].model')} =")
        check_base(source, flux)
        modes = weights.controlnet_params(source).modes
        check_mode(control, modes, source, where(f"controlnets[{i}].mode"))
        found.append((source, control_image(control.image, control.preprocess, layout)))
        if not any(control.acts(step, layout.steps) for step in range(layout.steps)):
            never = f"no step of {layout.steps} lies within its start and end; it never acts"
            say(f"warning: {control.model}: {never}")
    return found


def check_mode(control: Control, modes: int, source: Source, where: str) -> None:
    if modes and control.mode is None:
        raise InputError(f"{where} is missing: {source.path} is a union of {modes} modes, and needs one of them.")
    if not modes and control.mode is not None:
        raise InputError(f"{where} = {control.mode}: {source.path} has no modes.")
    if modes and control.mode_index >= modes:
        raise InputError(f"{where} = {control.mode}: {source.path} has {modes} modes, counted from 0.")


def load_controls(
    layout: Layout, found: list[tuple[Source, Tensor]], device: torch.device, dtype: torch.dtype,
    nets: dict[Path, ControlNet],
) -> list[LoadedControl]:  # fmt: skip
    """The layout's ControlNets. found: what `plan_controls` gives, with packed latents (1, L_img,
    64) for images that are not read as pixels. nets: those loaded; new ones are added."""
    controls = []
    for setting, (source, image) in zip(layout.controlnets, found):
        if source.path not in nets:
            nets[source.path] = weights.load_controlnet(source, device, dtype)
        net = nets[source.path]
        image = image.to(device, dtype)
        tokens = net.read(image) if net.params.hint_width else image
        scale = scale_of(setting, layout).to(device, dtype)
        controls.append(LoadedControl(net, tokens, scale, setting))
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
