"""The files of a layout's LoRAs and ControlNets: found, read and checked."""

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import MISSING, InputError, warn
from extensions.controlnet import ControlNet, ControlNetParams, LoadedControl
from extensions.flux_tools import check_channels
from extensions.lora import Loras, can_be_regional, merge
from extensions.lora_files import lora_file, read_lora
from extensions.pictures import control_image
from extensions.redux import Projector, ProjectorParams, Vision
from extensions.siglip import Siglip, SiglipParams, pixels_of
from formats import components
from formats.hub import locate, redux_place
from formats.key_names import count
from formats.recognize import CONTROLNET_FILES, Source, pick
from formats.safetensors import wrong
from regional.layout import Control, Layout
from regional.mask import region_tokens

Nets = dict[Path, ControlNet]  # by their files


class Files:
    """What a layout's extensions need of its files. InputError for most that can be wrong with
    them. params: the transformer's. controls: each ControlNet's file, and its image. vision:
    of image prompts."""

    def __init__(self, layout: Layout, pipeline: Any):
        checkpoint = pipeline.checkpoint
        self.layout = layout
        self.params = components.flux_params(checkpoint.flux)
        check_channels(layout, self.params)
        self.controls = plan_controls(layout, checkpoint.flux)
        self.loras = read_loras(layout, checkpoint, pipeline.loras)
        self.vision = vision_of(layout, checkpoint, pipeline.settings.redux)

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


# ------------------------------------------------------------------------ image prompts


def vision_of(layout: Layout, checkpoint: Any, redux: str | None) -> Vision | None:
    """What a layout's image prompts need, from headers alone; None without any. redux: where
    FLUX.1 Redux is, if not at its place. InputError for files that are not there or do not fit."""
    own = [prompt for region in layout.regions for prompt in region.image_prompts]
    if own and not layout.regional_steps():
        warn("the regions' image_prompts have no effect without regional steps")
        own = []
    prompts = [*layout.image_prompts, *own]
    if not prompts:
        return None
    siglip, projector = find_redux(checkpoint, redux)
    size = siglip_params(siglip).image_size
    images = {x.file: pixels_of(x.file, size) for x in prompts}

    def load(device: torch.device, dtype: torch.dtype) -> list[nn.Module]:
        kinds = ((siglip, SIGLIP), (projector, PROJECTOR))
        return [components.load(source, device, dtype, kind=kind) for source, kind in kinds]

    return Vision(layout, images, f"{siglip.path} {projector.path}", load)


def find_redux(checkpoint: Any, redux: str | None = None) -> tuple[Source, Source]:
    """SigLIP and the projector: in --redux, or near it where that is the projector's file."""
    place = redux_place(checkpoint.name, redux)
    projector = pick("redux", "--redux", place)
    siglip = pick("siglip", "--redux", place) if place.is_dir() else siglip_near(place)
    components.check_loads(siglip, SIGLIP)
    components.check_loads(projector, PROJECTOR)
    width, _, context = projector_params(projector)
    hidden = siglip_params(siglip).hidden_size
    if width != hidden:
        problem = f"it reads tokens {width} wide, but those of {siglip.path} are {hidden}"
        raise wrong(projector.path, problem)
    expected = components.flux_params(checkpoint.flux).context_in_dim
    if context != expected:
        problem = f"its tokens are {context} wide, but {checkpoint.flux.path} expects {expected}"
        raise wrong(projector.path, problem)
    return siglip, projector


def siglip_near(file: Path) -> Source:
    """SigLIP for a projector's file: in its folder, in the one that a repository has for it, or in
    ComfyUI's, where clip_vision is beside style_models."""
    above = file.absolute().parents[1]
    for folder in (above / "image_encoder", above / "clip_vision"):
        if folder.is_dir():
            with suppress(InputError):
                return pick("siglip", "--redux", folder)
    return pick("siglip", "--redux", file.parent)


def siglip_params(source: Source) -> SiglipParams:
    """config.json has the number of heads and the image's size. Without it heads have so400m's
    size, 72, and images the next multiple of 32 pixels: 384, of which 27 x 14 = 378 are seen."""
    key = "embeddings.patch_embedding.weight"
    hidden, _, patch, _ = source.shape(key, dims=4)
    if hidden * patch == 0:
        raise source.misshapen(key, "no dimension of size 0")
    heads = int(source.number("config.json", "num_attention_heads", max(hidden // 72, 1)))
    if heads == 0 or hidden % heads:
        problem = f"config.json's {heads} heads do not divide the hidden size {hidden}"
        raise wrong(source.path, problem)
    tokens, _ = source.shape("embeddings.position_embedding.weight")
    seen = isqrt(tokens) * patch
    size = int(source.number("config.json", "image_size", -(-seen // 32) * 32))
    if (size // patch) ** 2 != tokens:
        problem = f"it has {tokens} positions for {size} x {size} pixels in patches of {patch}"
        raise wrong(source.path, problem)
    return SiglipParams(
        hidden_size=hidden,
        mlp_hidden=source.shape("encoder.layers.0.mlp.fc1.weight")[0],
        num_heads=heads,
        num_layers=count(source.tensors, r"encoder\.layers\.(\d+)\."),
        patch_size=patch,
        image_size=size,
    )


def projector_params(source: Source) -> ProjectorParams:
    hidden, width = source.shape("redux_up.weight")
    context, _ = source.shape("redux_down.weight")
    return ProjectorParams(width, hidden, context)


SIGLIP = components.Kind(Siglip, siglip_params)
PROJECTOR = components.Kind(Projector, projector_params)
