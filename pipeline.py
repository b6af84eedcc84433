"""FLUX.1 with regions, loaded once: a layout and a seed in, an image out.

    pipeline = Pipeline("black-forest-labs/FLUX.1-dev")
    image = pipeline(Layout(prompt="a harbor"), seed=1)

A call is `prepare` (encodes prompts and control images), `denoise` and `decode`.
Components are loaded when needed and stay until `drop`. What not every image needs
is imported where it is used. Threads need a pipeline each.
"""

import gc
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from PIL import Image
from torch import Tensor, nn

import weights
from errors import MISSING, InputError, info, warn
from formats import components
from model.autoencoder import to_uint8
from model.tokenizers import CLIPTokenizer, T5Tokenizer
from model.transformer import Flux
from regional.attention import portable_attention
from regional.extension import Conditioning, Extension
from regional.layout import Defaults, Layout
from regional.mask import RegionTokens, region_tokens
from regional.prompts import encode_prompts, moved
from regional.reader import checked_in_code
from regional.sampling import MakeAttention, Modulations, by, modulations, sample
from runtime.choose import choose_attention, choose_device, choose_fp8, library_attention
from settings import MODEL_KEYS, Settings, invalid

Loras = dict[str, Any]  # extensions.lora.Lora by the names in layouts
NO_LORAS: Loras = {}


class Prepared(NamedTuple):
    """A resolved layout and what is encoded for it; extras: extensions.extras.Extras."""

    layout: Layout
    tokens: RegionTokens | None
    conditioning: Conditioning
    extras: Any = None


def alone(method: Callable) -> Callable:
    """A pipeline's method for one thread at a time; RuntimeError for others."""

    @wraps(method)
    def checked(self: "Pipeline", *args: Any, **kwargs: Any) -> Any:
        if not self.lock.acquire(blocking=False):
            raise RuntimeError("this pipeline is in use by another thread")
        try:
            return method(self, *args, **kwargs)
        finally:
            self.lock.release()

    return checked


class Pipeline:
    """A model and how it runs: Pipeline(settings), or Pipeline(model, ...) with the fields
    of Settings; attention may also be a function like `portable_attention`.
    InputError for what the machine or the files do not allow."""

    def __init__(self, model: Settings | str | Path | None = None, **settings: Any):
        is_function = callable(settings.get("attention"))
        self.attention = settings.pop("attention") if is_function else None
        given = model if isinstance(model, Settings) else Settings(model=model, **settings)
        values = msgspec.to_builtins(given, enc_hook=str)  # paths as text
        try:
            settings = self.settings = msgspec.convert(values, Settings)
        except msgspec.ValidationError as error:
            raise invalid(values, error) from None
        self.device = choose_device(settings)
        automatic = "float32" if self.device.type == "cpu" else "bfloat16"
        self.dtype = getattr(torch, settings.dtype.replace("auto", automatic))
        if self.dtype == torch.float32:  # TF32 in cuDNN errs by 3e-4.
            torch.backends.cudnn.allow_tf32 = False
        self.checkpoint = weights.find(*(getattr(settings, key) for key in MODEL_KEYS))
        flux = self.checkpoint.flux
        self.defaults = Defaults(**components.model_defaults(flux))
        self.fp8 = choose_fp8(settings.quantize, flux, self.device)
        self.parallel = None
        if settings.parallel:
            from runtime.ulysses import Ulysses

            self.parallel = Ulysses(self.device, components.flux_params(flux).num_heads)
        self.parts = Parts(self)
        self.lock = threading.RLock()
        self.embeddings: dict[str, Tensor] = {}
        self.loras: Loras = {}  # all that were read

    @alone
    def __call__(self, layout: Layout, seed: int) -> Image.Image:
        prepared = self.prepare(layout)
        self.embeddings.clear()  # New prompts must not fill the memory.
        return self.decode(self.denoise(prepared, seed), prepared.layout)

    def drop(self, *names: str) -> None:
        """Free t5, clip, flux or ae; with t5 also the prompt embeddings."""
        self.parts.drop(*names)
        if "t5" in names:
            self.embeddings.clear()

    @alone
    @torch.inference_mode()
    def prepare(self, layout: Layout) -> Prepared:
        """Read and encode what a layout names; most errors precede loading."""
        layout = checked_in_code(layout, self.defaults.size).resolved(self.defaults)
        extras = None
        sizes = components.flux_params(self.checkpoint.flux)
        if layout.has_extras() or sizes.in_channels != sizes.out_channels:
            from extensions.extras import Extras
            from extensions.loading import Files

            extras = Extras(layout, Files(layout, self))
            self.loras |= extras.files.loras
        tokens = None
        if layout.regional_steps() or any(x.plain_steps for y in layout.regions for x in y.loras):
            tokens = region_tokens(layout)
            for warning in tokens.warnings:
                warn(warning)
        self.masked_attention(layout)
        t5 = T5Tokenizer(self.checkpoint.t5_tokenizer)
        clip = CLIPTokenizer(self.checkpoint.clip_tokenizer)
        how = {"t5": t5, "clip": clip, "encode": partial(self.embedding, layout)}
        encode = partial(encode_prompts, **how)
        conditioning = encode(layout, tokens)
        if extras:
            conditioning = extras.encode(self, conditioning, tokens, encode)
        return Prepared(layout, tokens, conditioning, extras)

    def masked_attention(self, layout: Layout, verbose: bool = False) -> MakeAttention:
        if layout.method != "regional" or not layout.regional_steps():
            return portable_attention
        how = (self.settings.attention, self.device, self.dtype, verbose)
        return self.attention or choose_attention(*how)

    def embedding(self, layout: Layout, name: str, ids: Tensor, own: Sequence[Any]) -> Tensor:
        """t5's or clip's embedding of a prompt's ids (1, L) with the layout's LoRAs and
        `own`, its region's; on the CPU, cached."""
        read = self.loras
        source = getattr(self.checkpoint, name)
        size = components.KINDS[name].params(source).vocab_size
        if ids.max() >= size:
            problem = f"its ids don't match the {size} tokens of {source.path}"
            raise InputError(getattr(self.checkpoint, f"{name}_tokenizer"), MISSING, problem)
        own = changing(name, own, read)
        loras = changing(name, layout.loras, read) + own
        used = [(read[lora.file].path, lora.scale) for lora in loras]
        key = f"{name} {ids.tolist()} {used} {len(own)}"
        if key in self.embeddings:
            return self.embeddings[key]

        def encode() -> Tensor:
            encoder = self.parts.get(name, layout, read)
            changed = nullcontext()
            if own:
                from extensions.region_lora import prompt_loras

                how = (ids.shape[1], self.device, self.dtype)
                changed = prompt_loras(encoder, name, own, read, *how)
            with changed:
                return encoder(ids.to(self.device)).to(self.dtype).cpu()

        if self.settings.prompt_cache:
            from runtime.prompt_cache import cached

            files = {tensor.file for tensor in source.tensors.values()}
            depends_on = [ids.tolist(), files, used, len(own), str(self.dtype)]
            folder = Path(self.settings.prompt_cache)
            encode = partial(cached, folder, name, depends_on, self.device, encode)
        self.embeddings[key] = encode()
        return self.embeddings[key]

    @alone
    @torch.inference_mode()
    def denoise(
        self, prepared: Prepared, seed: int, extensions: Sequence[Extension] = (),
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:  # fmt: skip
        """Latents (1, 16, height / 8, width / 8), float32. extensions: besides the
        layout's. on_step: called after each step."""
        layout = prepared.layout
        verbose = self.settings.verbose
        flux = self.parts.get("flux", layout, self.loras)
        conditioning = moved(prepared.conditioning, self.device, self.dtype)
        if prepared.extras or self.parallel:
            from extensions.extras import extensions_of

            extensions = extensions_of(self, flux, prepared, conditioning, extensions, seed)
        modulation = self.parts.modulation(flux, prepared, conditioning.y)
        method = by(self.masked_attention(layout, verbose))
        if layout.method == "rpg":
            from extensions.rpg import composed as method
        unmasked = library_attention(flux, layout, conditioning.txt, verbose)
        stance = nullcontext()
        if self.settings.compile and any(region.loras for region in layout.regions):
            info("regions' own LoRAs: this layout's blocks run uncompiled")
            stance = torch.compiler.set_stance("force_eager")
        known = (conditioning, seed, method, extensions, on_step, modulation)
        with unmasked, stance:
            latents = sample(flux, layout, prepared.tokens, *known)
        self.parts.release()  # room for the VAE
        return latents

    @alone
    @torch.inference_mode()
    def decode(self, latents: Tensor, layout: Layout | None = None) -> Image.Image:
        """The image. layout: if it repaints an image, the rest keeps its pixels."""
        vae = self.parts.get("ae")
        pixels = vae.decode(latents.to(self.device, self.dtype))
        image = Image.fromarray(to_uint8(pixels)[0].cpu().numpy())
        if layout and layout.image and layout.image.repaint:
            from extensions.repaint import pasted

            image = pasted(image, layout)
        return image


def changing(part: str, entries: Sequence[Any], loras: Loras) -> list[Any]:
    """The LoRAs that change this component."""
    return [entry for entry in entries if loras[entry.file].changes.get(part)]


class Part(NamedTuple):
    """A loaded component. streamed: what is on the GPU only in turn. loras: files and scales
    merged into it. room: bytes left free to work with it."""

    module: nn.Module
    streamed: list[Any]
    loras: list[tuple[str, float]]
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
        self.controlnets: dict[Path, nn.Module] = {}  # by their files
        self.modulated = (None, [])  # one layout's

    def get(self, name: str, layout: Layout | None = None, loras: Loras = NO_LORAS) -> nn.Module:
        """t5, clip, flux or ae with the layout's LoRAs merged; reloaded for others, the
        transformer also for an image that needs more memory."""
        used = changing(name, layout.loras, loras) if layout else []
        key = [(lora.file, lora.scale) for lora in used]
        room = self.room_for(layout) if name == "flux" else 0
        part = self.loaded.get(name)
        if part is None or part.loras != key or part.room < room:
            room = max(room, part.room if part else 0)
            self.drop(name)
            merges = components.NOTHING
            if used:
                from extensions.loading import merges_of

                merges = merges_of(layout, loras, name)
            part = self.loaded[name] = Part(*self.load(name, merges, room), key, room)
        return part.module

    def room_for(self, layout: Layout) -> int:
        """Roughly how many GPU bytes the transformer and ControlNets work with."""
        if self.device.type != "cuda" or self.settings.offload == "blocks":
            return 0
        from extensions.loading import controlnet_bytes
        from runtime.memory import working_bytes

        hidden = components.flux_params(self.checkpoint.flux).hidden_size
        activations = working_bytes(hidden, layout, self.dtype, self.fp8)
        return activations + controlnet_bytes(layout, self.dtype)

    def load(self, name: str, merges: components.Merges, room: int) -> tuple[nn.Module, list[Any]]:
        """A Part's module and streamed. room: GPU bytes to leave free."""
        source = getattr(self.checkpoint, name)
        offload = self.settings.offload
        where = (self.device, self.dtype)
        fp8 = self.fp8 and name == "flux"
        is_placed = fp8 or self.device.type == "cuda" or offload == "blocks"
        streamed = []
        if is_placed and name in ("flux", "t5"):
            from runtime.memory import load_placed

            module, streamed = load_placed(source, *where, merges, offload, fp8, room)
        else:
            module = components.load(source, *where, merges)
        if name == "t5" and "flux" not in self.loaded and self.checkpoint.name != "pocket":
            from runtime.offload import read_ahead

            read_ahead(self.checkpoint.flux)  # while T5 encodes
        if name == "flux" and self.settings.compile:
            module.compile_blocks()
        return module, streamed

    def modulation(self, flux: Flux, prepared: Prepared, y: Tensor) -> Modulations:
        """The modulation of a layout's steps, for all its seeds."""
        if self.modulated[0] is not prepared:
            self.modulated = (prepared, modulations(flux, prepared.layout, y))
            self.release()
        return self.modulated[1]

    def release(self) -> None:
        """Free the GPU memory of streamed weights."""
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
            if self.settings.compile:  # Compiled blocks refer to themselves.
                gc.collect()
        if self.device.type == "cuda":  # The next tensors are of other sizes.
            torch.cuda.empty_cache()
            if hasattr(torch.accelerator, "empty_host_cache"):  # not in torch 2.11
                torch.accelerator.empty_host_cache()
