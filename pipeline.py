"""FLUX.1 with regions, loaded once: a layout and a seed in, an image out.

    from pipeline import Pipeline
    from regional.layout import Layout, Region

    pipeline = Pipeline("black-forest-labs/FLUX.1-dev")
    boat = Region(prompt="a red boat", box=(0, 0, 512, 1024))
    image = pipeline(Layout(prompt="a harbor", regions=(boat,)), seed=1)

A call is `prepare` (prompts and control images are encoded), `denoise` and `decode`. Components of
the model are loaded when they are needed and stay until `drop`, so that one can make room for the
next. A pipeline is not thread-safe.
"""

import gc
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

import weights
from errors import MISSING, InputError, info, warn
from extensions.attention_maps import AttentionMaps
from extensions.control import control_lora, controlnets
from extensions.controlnet import ControlNet
from extensions.loading import (
    control_of,
    controlnet_params,
    find_controlnet,
    load_controls,
    merges_of,
    plan_controls,
    read_loras,
)
from extensions.lora import NO_LORAS, Addition, Lora, Loras, added, hooks_for
from extensions.region_lora import all_of, region_loras
from formats.recognize import Source
from model.autoencoder import to_uint8
from model.layers import Modulation
from model.tokenizers import CLIPTokenizer, T5Tokenizer
from model.transformer import Flux
from regional.attention import portable_attention
from regional.extension import Conditioning, Extension
from regional.layout import Defaults, Layout, RegionLora
from regional.mask import RegionTokens, region_tokens
from regional.prompts import check_vocabulary, encode_prompts
from regional.sampling import Modulations, modulations, sample
from runtime.choose import choose_attention, choose_device, choose_fp8, library_attention
from runtime.memory import WORKING_T5, place, working_bytes
from runtime.offload import Streamed, read_ahead
from runtime.prompt_cache import PromptCache
from runtime.ulysses import Ulysses
from sampler.flow import pack
from settings import MODEL_KEYS, Settings


class Prepared(NamedTuple):
    """A layout, and all that is encoded and read for it, once for all seeds.

    layout: resolved. controls: each ControlNet's file and its control image or packed latents.
    control_latents: those of a control LoRA's image, (1, L_img, 64).
    """

    layout: Layout
    tokens: RegionTokens | None
    conditioning: Conditioning
    loras: Loras
    controls: list[tuple[Source, Tensor]]
    control_latents: Tensor | None


class Pipeline:
    """A model and how it runs: Pipeline(settings), or Pipeline(model, ...) with the fields of
    Settings by name. InputError for what this machine or the model's files do not allow."""

    def __init__(self, model: Settings | str | Path | None = None, **settings: Any):
        given = model if isinstance(model, Settings) else Settings(model=model, **settings)
        self.settings = given.checked()
        self.device = choose_device(self.settings.device)
        dtype = self.settings.dtype
        if dtype == "auto":
            dtype = "float32" if self.device.type == "cpu" else "bfloat16"
        self.dtype = getattr(torch, dtype)
        self.checkpoint = weights.find(*(getattr(self.settings, key) for key in MODEL_KEYS))
        self.defaults = Defaults(**weights.model_defaults(self.checkpoint.flux))
        if self.dtype == torch.float32:  # TF32 in cuDNN's convolutions makes the VAE err by 3e-4
            torch.backends.cudnn.allow_tf32 = False
        self.fp8 = choose_fp8(self.settings.quantize, self.checkpoint.flux, self.device)
        self.check_machine()
        heads = weights.flux_params(self.checkpoint.flux).num_heads
        self.parallel = Ulysses(self.device, heads) if self.settings.parallel else None
        self.parts = Parts(self)
        self.embeddings = PromptCache(self.settings.prompt_cache)
        self.loras: dict[str, Lora] = {}  # all that were read, by their names in layouts

    def check_machine(self) -> None:
        compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
        if self.settings.compile and not any(map(shutil.which, compilers)):
            problem = "torch.compile needs a C++ compiler, and there is none here; leave it out"
            raise InputError("--compile", MISSING, problem)
        if self.settings.offload == "blocks" and self.device.type == "mps":
            problem = "Apple's GPUs already share the host's memory; leave it out"
            raise InputError("--offload", "blocks", problem)

    @property
    def metadata(self) -> dict[str, Any]:
        """What images record of how they were made; settings.recorded is the reverse."""
        settings = self.settings
        chosen = {
            "fp8": self.fp8,
            "compile": settings.compile,
            "processes": self.parallel and self.parallel.size,
            "attention": settings.attention if settings.attention != "auto" else None,
        }
        given = {key: getattr(settings, key) for key in MODEL_KEYS}
        return {
            "model": self.checkpoint.name,
            "files": {part: str(getattr(self.checkpoint, part).path) for part in MODEL_KEYS[1:]},
            "dtype": str(self.dtype),
            "torch": torch.__version__,
            **{key: value for key, value in chosen.items() if value},
            "given": {key: value for key, value in given.items() if value},
        }

    def __call__(self, layout: Layout, seed: int) -> Image.Image:
        prepared = self.prepare(layout)
        self.embeddings.clear()  # Calls with ever new prompts must not fill the memory.
        return self.decode(self.denoise(prepared, seed))

    def drop(self, *names: str) -> None:
        """Free components: t5, clip, flux, ae; with t5 the prompt embeddings kept in memory."""
        self.parts.drop(*names)
        if "t5" in names:
            self.embeddings.clear()

    def maps(self) -> AttentionMaps:
        """An observer of the attention, whose `extend` is for `denoise`."""
        return AttentionMaps(self.defaults.depth, self.defaults.depth_single_blocks)

    @torch.inference_mode()
    def prepare(self, layout: Layout) -> Prepared:
        """Read and encode what a layout names."""
        layout = layout.resolved(self.defaults)
        controls = plan_controls(layout, self.checkpoint.flux) if layout.controlnets else []
        loras = self.read_loras(layout)
        control_image = control_of(layout) if layout.loras else None
        in_plain_steps = any(lora.plain_steps for region in layout.regions for lora in region.loras)
        is_regional = layout.regional_steps() > 0
        tokens = region_tokens(layout) if is_regional or in_plain_steps else None
        for warning in tokens.warnings if tokens else ():
            warn(warning)
        if is_regional and layout.method == "regional":  # Errors come before the encoders load.
            choose_attention(self.settings.attention, self.device, self.dtype)
        conditioning = self.encode(layout, tokens, loras)
        control_latents = None if control_image is None else self.latents_of(control_image)
        for i, (source, image) in enumerate(controls):
            if not controlnet_params(source).hint_width:
                controls[i] = source, self.latents_of(image)
        return Prepared(layout, tokens, conditioning, loras, controls, control_latents)

    def read_loras(self, layout: Layout) -> Loras:
        if not layout.loras and not any(region.loras for region in layout.regions):
            return NO_LORAS
        loras = read_loras(layout, self.checkpoint, self.loras)
        self.loras |= loras
        return loras

    def encode(self, layout: Layout, tokens: RegionTokens | None, loras: Loras) -> Conditioning:
        checkpoint = self.checkpoint
        sizes = {
            "t5": (weights.t5_params(checkpoint.t5).vocab_size, checkpoint.t5_tokenizer),
            "clip": (weights.clip_params(checkpoint.clip).vocab_size, checkpoint.clip_tokenizer),
        }

        def encode(name: str, ids: Tensor, own: Sequence[RegionLora]) -> Tensor:
            check_vocabulary(ids, *sizes[name], getattr(checkpoint, name).path)
            return self.embedding(name, ids, layout, loras, own)

        t5 = T5Tokenizer(checkpoint.t5_tokenizer)
        clip = CLIPTokenizer(checkpoint.clip_tokenizer)
        return encode_prompts(layout, tokens, t5, clip, encode)

    def embedding(self, name: str, ids: Tensor, layout: Layout, loras: Loras, own: Sequence[RegionLora]) -> Tensor:
        """The result of an encoder, t5 or clip, for one prompt's ids (1, L), changed by the layout's
        LoRAs and by `own`, those of its region; on the CPU, and cached."""
        merged = [lora for lora in layout.loras if loras[lora.file].changes[name]]
        own = [lora for lora in own if loras[lora.file].changes[name]]
        files = {tensor.file for tensor in getattr(self.checkpoint, name).tensors.values()}
        device = self.device.type
        if device == "cuda":
            device = torch.cuda.get_device_name(self.device)
        depends_on = [
            ids.tolist(), sorted(map(identity, files)),
            [(identity(loras[lora.file].path), lora.scale) for lora in (*merged, *own)], len(own),
            str(self.dtype), device, torch.__version__, torch.get_num_threads(),
        ]  # fmt: skip

        def encode() -> Tensor:
            encoder = self.parts.get(name, layout, loras)
            everywhere = torch.ones(ids.shape[1], dtype=torch.bool)
            changes = [(c, lora.scale) for lora in own for c in loras[lora.file].changes[name]]
            additions = [Addition(change, scale, everywhere) for change, scale in changes]
            hooks = hooks_for(encoder, additions, self.device, self.dtype) if additions else {}
            with added(encoder, hooks) if hooks else nullcontext():
                return encoder(ids.to(self.device)).to(self.dtype).cpu()

        return self.embeddings.get(name, depends_on, encode)

    @torch.inference_mode()
    def denoise(
        self, prepared: Prepared, seed: int, extensions: Sequence[Extension] = (),
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:  # fmt: skip
        """Latents (1, 16, height / 8, width / 8), float32. extensions: further ones than the
        layout's; on_step: called after every step. `prepared` may be of another dtype."""
        layout = prepared.layout
        settings = self.settings
        flux = self.parts.get("flux", layout, prepared.loras)
        given = (x if x is None else x.to(self.device, self.dtype) for x in prepared.conditioning)
        conditioning = Conditioning(*given)
        extensions = self.extensions(flux, prepared, conditioning, extensions)
        modulation = self.parts.modulation(flux, prepared, conditioning.y)
        masked_attention = portable_attention
        if layout.regional_steps() and layout.method == "regional":
            how = (settings.attention, self.device, self.dtype, settings.verbose)
            masked_attention = choose_attention(*how)
        stance = nullcontext()
        if settings.compile and any(region.loras for region in layout.regions):
            info("regions' own LoRAs: this layout's blocks run uncompiled")
            stance = torch.compiler.set_stance("force_eager")
        with library_attention(flux, layout, conditioning.txt, settings.verbose), stance:
            latents = sample(
                flux, layout, prepared.tokens, conditioning, seed, masked_attention, extensions,
                on_step, modulation,
            )  # fmt: skip
        self.parts.release()  # room for the VAE
        return latents

    def extensions(
        self, flux: Flux, prepared: Prepared, conditioning: Conditioning, own: Sequence[Extension]
    ) -> list[Extension]:
        """The layout's extensions and a call's own, the innermost first.

        LoRAs of regions see a process's part of the tokens, all others see all tokens. ControlNets
        are outermost, because they read the image without a control LoRA's.
        """
        layout = prepared.layout
        part = self.parallel.part if self.parallel else all_of
        found = []
        if any(region.loras for region in layout.regions):
            where = (self.device, self.dtype, partial(part, dim=0))
            found.append(region_loras(flux, layout, prepared.loras, *where))
        if self.parallel:
            found.append(self.parallel.extend)
        if prepared.control_latents is not None:
            found.append(control_lora(prepared.control_latents.to(self.device, self.dtype)))
        found += own
        if prepared.controls:
            where = (self.device, self.dtype, self.parts.controlnets)
            controls = load_controls(layout, prepared.controls, *where)
            found.append(controlnets(controls, flux.params, layout.steps, conditioning, part))
        return found

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Image.Image:
        vae = self.parts.get("ae")
        pixels = vae.decode(latents.to(self.device, self.dtype))
        return Image.fromarray(to_uint8(pixels)[0].cpu().numpy())

    def latents_of(self, image: Tensor) -> Tensor:
        """The packed latents of a control image (1, 3, height, width), (1, L_img, 64)."""
        vae = self.parts.get("ae")
        return pack(vae.encode(image.to(self.device, self.dtype))).cpu()


# ------------------------------------------------------------------------------------- components


class Part(NamedTuple):
    """A loaded component. loras: files and scales merged into it. streamed: what of it is on the
    GPU only in turn. room: bytes that were reserved for working with it."""

    module: nn.Module
    loras: list[tuple[str, float]]
    streamed: list[Streamed]
    room: int


class Parts:
    """Loads, keeps and drops the components of a model."""

    def __init__(self, pipeline: Pipeline):
        self.checkpoint = pipeline.checkpoint
        self.settings = pipeline.settings
        self.device = pipeline.device
        self.dtype = pipeline.dtype
        self.fp8 = pipeline.fp8
        self.loaded: dict[str, Part] = {}
        # These are dropped with flux: ControlNets by their files, and one layout's modulation.
        self.controlnets: dict[Path, ControlNet] = {}
        self.modulated: tuple[Prepared | None, Modulations] = (None, [])

    def get(self, name: str, layout: Layout | None = None, loras: Loras = NO_LORAS) -> nn.Module:
        """t5, clip, flux or ae with the layout's LoRAs merged; it is loaded again for others, and
        the transformer also for an image that needs more memory than it left free."""
        used = [x for x in layout.loras if loras[x.file].changes.get(name)] if layout else []
        key = [(lora.file, lora.scale) for lora in used]
        room = 0
        if name == "flux" and self.settings.offload != "blocks" and self.device.type == "cuda":
            room = self.room_for(layout)
        part = self.loaded.get(name)
        if part is None or part.loras != key or part.room < room:
            room = max(room, part.room if part else 0)
            self.drop(name)
            merges = merges_of(layout, loras, name) if used else weights.NOTHING
            module, streamed = self.load(name, merges, room or WORKING_T5)
            self.loaded[name] = Part(module, key, streamed, room)
        return self.loaded[name].module

    def room_for(self, layout: Layout) -> int:
        """About how many bytes the transformer and the layout's ControlNets work with."""
        names = {control.model for control in layout.controlnets}
        stored = [x for name in names for x in find_controlnet(name).tensors.values()]
        numbers = sum(math.prod(tensor.shape) for tensor in stored)
        hidden = weights.flux_params(self.checkpoint.flux).hidden_size
        activations = working_bytes(hidden, layout, self.dtype, self.fp8)
        return activations + numbers * self.dtype.itemsize

    def load(self, name: str, merges: weights.Merges, room: int) -> tuple[nn.Module, list[Streamed]]:
        """room: how many bytes of the GPU the weights must leave free."""
        source = getattr(self.checkpoint, name)
        where = (self.device, self.dtype)
        if name in ("ae", "clip"):
            return weights.load(source, *where, merges), []
        fp8 = self.fp8 and name == "flux"
        placed = place(source, self.settings.offload, *where, fp8, room)
        module = weights.load(source, *where, merges, placed.on_host, fp8)
        streamed = []
        if placed.blocks:
            blocks = [module.get_submodule(block) for block in placed.blocks]
            streamed.append(Streamed(blocks, self.device, pin=True))
        if placed.modulation:
            layers = [layer for layer in module.modules() if isinstance(layer, Modulation)]
            streamed.append(Streamed(layers, self.device))
        if name == "t5" and "flux" not in self.loaded:
            read_ahead(self.checkpoint.flux)  # while T5 encodes
        if name == "flux" and self.settings.compile:
            module.compile_blocks()
        return module, streamed

    def modulation(self, flux: Flux, prepared: Prepared, y: Tensor) -> Modulations:
        """The modulation of a layout's steps, computed once for all its seeds."""
        if self.modulated[0] is not prepared:
            self.modulated = (prepared, modulations(flux, prepared.layout, y))
            self.release()
        return self.modulated[1]

    def release(self) -> None:
        """Free the GPU memory of weights that are there only in turn."""
        for part in self.loaded.values():
            for streamed in part.streamed:
                streamed.release()

    def drop(self, *names: str) -> None:
        self.release()
        for name in names:
            self.loaded.pop(name, None)
        if "flux" in names:
            self.controlnets.clear()
            self.modulated = (None, [])
            if self.settings.compile:  # Compiled blocks hold references to themselves.
                gc.collect()
        if self.device.type == "cuda":  # The next component's tensors are of other sizes.
            torch.cuda.empty_cache()
            if hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.11 has no such function
                torch.accelerator.empty_host_cache()


def identity(file: Path) -> tuple[str, int, int]:
    """Which file this is, and in which state."""
    return str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns
