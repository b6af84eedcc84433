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
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

import weights
from errors import MISSING, InputError, info, warn
from extensions.attention_maps import AttentionMaps
from extensions.controlnet import ControlNet
from extensions.loading import ControlPlan, control_of, load_controls, merges_of, plan_controls, read_loras
from extensions.lora import Lora
from model.autoencoder import to_uint8
from model.layers import Modulation
from prompts import Prompts
from regional.attention import portable_attention
from regional.layout import Layout
from regional.mask import RegionTokens, region_tokens
from regional.sampling import NO_LORAS, Conditioning, Loras, modulations, sample
from runtime.choose import choose_attention, choose_device, choose_fp8, library_attention
from runtime.memory import stays_on_host, working_bytes
from runtime.offload import FLUX_BLOCKS, FLUX_MODULATION, T5_BLOCKS, Streamed, read_ahead
from runtime.prompt_cache import PromptCache
from runtime.ulysses import Ulysses
from sampler.flow import pack
from settings import MODEL_KEYS, Settings


class Prepared(NamedTuple):
    """A layout with the model's defaults filled in, and all that is encoded and read for it, once
    for all seeds."""

    layout: Layout
    tokens: RegionTokens | None
    conditioning: Conditioning
    loras: Loras
    controls: list[ControlPlan]


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
        self.defaults = weights.defaults(self.checkpoint.flux)
        self.fp8 = choose_fp8(self.settings.quantize, self.checkpoint.flux, self.device)
        self.check_machine()
        heads = weights.flux_params(self.checkpoint.flux).num_heads
        self.parallel = Ulysses(self.device, heads) if self.settings.parallel else None
        self.parts = Parts(self)
        cache = PromptCache(self.settings.prompt_cache)
        self.prompts = Prompts(self.checkpoint, self.device, self.dtype, self.parts.get, cache)
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
        self.prompts.cache.clear()  # Calls with ever new prompts must not fill the memory.
        return self.decode(self.denoise(prepared, seed))

    def drop(self, *names: str) -> None:
        """Free components: t5, clip, flux, ae; with t5 the prompt embeddings kept in memory."""
        self.parts.drop(*names)
        if "t5" in names:
            self.prompts.cache.clear()

    def maps(self) -> AttentionMaps:
        """An observer of the attention, whose `extend` is for `denoise`."""
        return AttentionMaps(self.defaults.depth, self.defaults.depth_single_blocks)

    @torch.inference_mode()
    def prepare(self, layout: Layout) -> Prepared:
        """Read and encode what a layout names."""
        layout = layout.filled(self.defaults)
        controls = plan_controls(layout, self.checkpoint.flux)
        loras = read_loras(layout, self.checkpoint, self.loras)
        self.loras |= loras
        control_image = control_of(layout)
        regional = layout.regional_steps(layout.steps) > 0
        in_plain_steps = any(lora.plain_steps for region in layout.regions for lora in region.loras)
        tokens = region_tokens(layout) if regional or in_plain_steps else None
        for warning in tokens.warnings if tokens else ():
            warn(warning)
        if regional and layout.method == "regional":  # Errors come before the encoders are loaded.
            choose_attention(self.settings.attention, self.device, self.dtype)
        conditioning = self.prompts.encode(layout, tokens, loras)
        if control_image is not None:
            conditioning = conditioning._replace(control=self.latents_of(control_image))
        for i, plan in enumerate(controls):
            if not weights.controlnet_params(plan.source).hint_width:
                controls[i] = plan._replace(picture=self.latents_of(plan.picture))
        return Prepared(layout, tokens, conditioning, loras, controls)

    @torch.inference_mode()
    def denoise(
        self, prepared: Prepared, seed: int, extensions: Sequence[Any] = (),
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:  # fmt: skip
        """Latents (1, 16, height / 8, width / 8), float32. extensions: further ones, outermost;
        on_step: called after every step. `prepared` may come from a pipeline of another dtype."""
        layout = prepared.layout
        flux = self.parts.get("flux", layout, prepared.loras)
        nets = self.parts.controlnets
        controls = load_controls(prepared.controls, layout, self.device, self.dtype, nets)
        given = (x if x is None else x.to(self.device, self.dtype) for x in prepared.conditioning)
        conditioning = Conditioning(*given)
        if self.parts.modulated[0] is not prepared:
            self.parts.modulated = prepared, modulations(flux, layout, conditioning.y)
            self.parts.release()
        how = (self.settings.attention, self.device, self.dtype, self.settings.verbose)
        masked_attention = portable_attention
        if layout.regional_steps(layout.steps) and layout.method == "regional":
            masked_attention = choose_attention(*how)
        stance = nullcontext()
        if self.settings.compile and any(region.loras for region in layout.regions):
            info("regions' own LoRAs: this layout's blocks run uncompiled")
            stance = torch.compiler.set_stance("force_eager")
        maps = extensions[0].__self__ if extensions else None  # until branch a is merged
        with library_attention(flux, layout, conditioning.txt, self.settings.verbose), stance:
            latents = sample(
                flux, layout, prepared.tokens, conditioning, seed, masked_attention, maps,
                loras=prepared.loras, controls=controls, on_step=on_step,
                modulation=self.parts.modulated[1], parallel=self.parallel,
            )  # fmt: skip
        self.parts.release()  # room for the VAE
        return latents

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
        self.modulated: tuple[Prepared | None, list] = (None, [])

    def get(self, name: str, layout: Layout | None = None, loras: Loras = NO_LORAS) -> nn.Module:
        """t5, clip, flux or ae with the layout's LoRAs merged; it is loaded again for others, and
        the transformer also for an image that needs more memory than it left free."""
        used = [x for x in layout.loras if loras[x.file].changes.get(name)] if layout else []
        key = [(lora.file, lora.scale) for lora in used]
        room = 0
        if name == "flux" and self.settings.offload == "auto" and self.device.type == "cuda":
            room = working_bytes(self.checkpoint.flux, layout, self.dtype, self.fp8)
        part = self.loaded.get(name)
        if part is None or part.loras != key or part.room < room:
            room = max(room, part.room if part else 0)
            self.drop(name)
            merges = merges_of(layout, loras, name) if used else weights.NOTHING
            module, streamed = self.load(name, merges, layout)
            self.loaded[name] = Part(module, key, streamed, room)
        return self.loaded[name].module

    def load(
        self, name: str, merges: weights.Merges, layout: Layout | None
    ) -> tuple[nn.Module, list[Streamed]]:  # fmt: skip
        source = getattr(self.checkpoint, name)
        where = (self.device, self.dtype)
        if name == "ae":
            return weights.load_autoencoder(source, *where), []
        if name == "clip":
            return weights.load_clip(source, *where, merges), []
        fp8 = self.fp8 and name == "flux"
        is_streamed = stays_on_host(source, self.settings.offload, *where, fp8, layout)
        if name == "t5":
            on_host = T5_BLOCKS if is_streamed else weights.NEVER
            t5 = weights.load_t5(source, *where, merges, on_host)
            if "flux" not in self.loaded:
                read_ahead(self.checkpoint.flux)  # while T5 encodes
            blocks = list(t5.encoder.block)
            return t5, [Streamed(blocks, self.device, pin=True)] if is_streamed else []
        on_gpu = self.device.type == "cuda"  # There, modulation layers are needed once per layout.
        on_host = FLUX_BLOCKS if is_streamed else FLUX_MODULATION if on_gpu else weights.NEVER
        flux = weights.load_flux(source, *where, merges, on_host, fp8)
        layers = [layer for layer in flux.modules() if isinstance(layer, Modulation)]
        streamed = [Streamed(layers, self.device)] if on_gpu else []
        if is_streamed:
            blocks = [*flux.double_blocks, *flux.single_blocks]
            streamed.append(Streamed(blocks, self.device, pin=True))
        if self.settings.compile:
            flux.compile_blocks()
        return flux, streamed

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
            torch.accelerator.empty_host_cache()
