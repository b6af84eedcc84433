"""The LoRAs and ControlNets that a layout names: found, read and checked."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import weights
from errors import MISSING, InputError, warn
from extensions.control import LoadedControl, control_image, scale_of
from extensions.controlnet import ControlNet, ControlNetParams
from extensions.lora import NO_LORAS, Loras, merge
from extensions.lora_files import lora_file, read_lora
from extensions.region_lora import can_be_regional
from formats.hub import locate
from formats.recognize import Source
from regional.layout import Control, Layout
from weights import Kind, check_loads, flux_params, pick, stream_sizes

# ------------------------------------------------------------------------------------------ LoRAs


def read_loras(layout: Layout, checkpoint: weights.Checkpoint, known: Loras = NO_LORAS) -> Loras:
    """All LoRAs that a layout names, by their names there; `known` ones are not read again. Warns of
    what is left out of them."""
    named = {f"loras[{i}].file": lora for i, lora in enumerate(layout.loras)}
    for i, region in enumerate(layout.regions):
        named |= {f"regions[{i}].loras[{j}].file": lora for j, lora in enumerate(region.loras)}
    if not named:
        return {}
    components = ("flux", "t5", "clip")
    modules = {name: weights.on_meta(getattr(checkpoint, name)) for name in components}
    loras = {}
    for key, entry in named.items():
        known = {**known, **loras}
        lora = known.get(entry.file)
        if lora is None:
            lora = read_lora(lora_file(entry.file, f"{key} = {entry.file}"), modules)
            if lora.unknown:
                count = len(lora.unknown)
                warn(f"{lora.path}: {count} unrecognized keys are skipped, such as {lora.unknown[0]}")
        loras[entry.file] = lora
        if lora.is_control != bool(getattr(entry, "image", None)):
            needs = "takes no image"
            if lora.is_control:
                needs = "is a control LoRA, for the whole image, and needs an image"
            raise InputError(key, Path(entry.file), f"this LoRA {needs}")
        skipped = {change.name for change in lora.changes["flux"] if not can_be_regional(change)}
        skipped |= {change.name for change in lora.changes["clip"]}
        if skipped and key.startswith("regions"):
            names = ", ".join(sorted(skipped))
            warn(f"{key} = {entry.file}: what changes the whole image is skipped: {names}")
    return loras


def control_of(layout: Layout) -> Tensor | None:
    """The image of the layout's control LoRA, (1, 3, height, width) in [-1, 1]."""
    files = [lora.image for lora in layout.loras if lora.image]
    if len(files) > 1:
        raise InputError("loras", files, "there can be only one control LoRA, with one image")
    return control_image(files[0], None, layout) if files else None


def merges_of(layout: Layout, loras: Loras, part: str) -> weights.Merges:
    """By tensor, what merges the layout's LoRAs for the whole image into a component's weights."""
    changes = {}
    for entry in layout.loras:
        for change in loras[entry.file].changes[part]:
            changes.setdefault(change.name, []).append((change, entry.scale))
    return {name: partial(merge, changes=own) for name, own in changes.items()}


# ------------------------------------------------------------------------------------ ControlNets


def plan_controls(layout: Layout, flux: Source) -> list[tuple[Source, Tensor]]:
    """For each of the layout's ControlNets its file, checked against the transformer and the mode,
    and its control image, (1, 3, height, width) in [-1, 1]."""
    found = []
    for i, control in enumerate(layout.controlnets):
        source = find_controlnet(control.model, f"controlnets[{i}].model")
        check_base(source, flux)
        check_mode(control, controlnet_params(source).modes, source, f"controlnets[{i}].mode")
        found.append((source, control_image(control.image, control.preprocess, layout)))
        if not any(control.acts(step, layout.steps) for step in range(layout.steps)):
            warn(f"{control.model}: none of the {layout.steps} steps lies between start and end")
    return found


def check_mode(control: Control, modes: int, source: Source, key: str) -> None:
    if modes and control.mode is None:
        problem = f"missing, {source.path} is a union of {modes} modes and needs one of them"
        raise InputError(key, MISSING, problem)
    if not modes and control.mode is not None:
        raise InputError(key, control.mode, f"{source.path} has no modes")
    if modes and control.mode >= modes:
        raise InputError(key, control.mode, f"{source.path} has {modes} modes, counted from 0")


def load_controls(
    layout: Layout, found: list[tuple[Source, Tensor]], device: torch.device, dtype: torch.dtype,
    nets: dict[Path, ControlNet],
) -> list[LoadedControl]:  # fmt: skip
    """The layout's ControlNets. found: what `plan_controls` gives, with packed latents (1, L_img,
    64) for images that are not read as pixels. nets: those loaded; new ones are added."""
    controls = []
    for setting, (source, image) in zip(layout.controlnets, found):
        if source.path not in nets:
            nets[source.path] = weights.load(source, device, dtype, kind=CONTROLNET)
        net = nets[source.path]
        image = image.to(device, dtype)
        tokens = net.read(image) if net.params.hint_width else image
        scale = scale_of(setting, layout).to(device, dtype)
        controls.append(LoadedControl(net, tokens, scale, setting))
    return controls


def controlnet_params(source: Source) -> ControlNetParams:
    """Sizes of a ControlNet from the header's shapes; a config.json would add nothing."""
    sizes = stream_sizes(source)
    width = source.shape("controlnet_x_embedder.weight")[1]
    if width != sizes["in_channels"]:
        key = source.key_names.rows("controlnet_x_embedder.weight", source.tensors)[0].key
        expected = f"{sizes['in_channels']} columns; inpainting ControlNets are not supported"
        raise source.misshapen(key, expected)
    union = "controlnet_mode_embedder.weight"
    has_hint = any(key.startswith("input_hint_block.") for key in source.tensors)
    return ControlNetParams(
        **sizes,
        modes=source.shape(union)[0] if union in source.tensors else 0,
        hint_width=source.shape("input_hint_block.0.weight", dims=4)[0] if has_hint else 0,
    )


CONTROLNET = Kind(ControlNet, controlnet_params)


def find_controlnet(name: str, flag: str = "--controlnet") -> Source:
    """A ControlNet, from its header alone: `name` is a file, a folder, org/name or org/name:file."""
    place = locate(name, [["*.safetensors", "config.json"]], f"{flag} {name}")
    source = pick("controlnet", flag, place)
    check_loads(source, CONTROLNET)
    return source


def check_base(controlnet: Source, flux: Source) -> None:
    """InputError when a ControlNet was made for a transformer of other widths."""
    own, base = controlnet_params(controlnet), flux_params(flux)
    for key in ("hidden_size", "in_channels", "context_in_dim", "vec_in_dim"):
        found, expected = getattr(own, key), getattr(base, key)
        if found != expected:
            sizes = f"its {key} is {found}, that of {flux.path} is {expected}"
            raise InputError(controlnet.path, MISSING, f"this ControlNet is of the wrong base size: {sizes}")
