"""FLUX.1 with regions, loaded once: a layout and a seed in, a picture out.

    from generate import Pipeline
    from regional.layout import Layout, Region

    pipeline = Pipeline("black-forest-labs/FLUX.1-dev")
    boat = Region(prompt="a red boat", box=(0, 0, 512, 1024))
    picture = pipeline(Layout(prompt="a harbour", regions=(boat,)), seed=1)

A call is `prepare` (prompts and control pictures are encoded), `latents` (denoising) and `decode`. Parts of the model
are loaded when they are needed and stay until `drop`, so that one can make room for the next. One thread at a time.
"""

import gc
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import weights
from errors import InputError, say
from extensions.attention_maps import AttentionMaps
from extensions.control import control_lora, controlnets
from extensions.controlnet import ControlNet
from extensions.loading import control_of, load_controls, merges_of, plan_controls, read_loras
from extensions.lora import NO_LORAS, Addition, Lora, Loras, added, hooks_for
from extensions.region_lora import all_of, region_loras
from formats.hub import Name
from formats.recognize import Source
from model.autoencoder import to_uint8
from model.layers import Modulation
from model.tokenizers import CLIPTokenizer, T5Tokenizer
from model.transformer import Flux
from regional.attention import portable_attention
from regional.layout import Layout, RegionLora
from regional.mask import RegionTokens, region_tokens
from regional.reader import Where
from regional.sampling import Conditioning, Extension, Modulations, modulations, sample
from runtime.choose import (
    ATTENTIONS,
    DTYPES,
    OFFLOAD,
    QUANTIZE,
    choose_attention,
    choose_device,
    choose_fp8,
    library_attention,
)
from runtime.memory import stays_on_host, working_bytes
from runtime.offload import FLUX_BLOCKS, FLUX_MODULATION, T5_BLOCKS, Streamed, read_ahead
from runtime.ulysses import Ulysses
from sampler.flow import pack
from tools.metadata import write


class Prepared(NamedTuple):
    """A layout with the model's defaults in it, and all that is encoded and read for it, once for all seeds.

    controls: each ControlNet's file and control image, as load_controls takes them; control_latents: those of a control
    LoRA's image, packed, (1, L_img, 64).
    """

    layout: Layout
    tokens: RegionTokens | None
    conditioning: Conditioning
    loras: Loras
    controls: list[tuple[Source, Tensor]]
    control_latents: Tensor | None = None


class Pipeline:
    """A model and how it runs; see the top of this file.

    model, flux, t5, clip, ae, compile, quantize, offload: as --model, --flux ... of generate.py. device: auto, cuda,
    cpu, mps, or cuda:1 and so on. cache: a folder where encoded prompts are kept, by a hash of all that they depend on.
    ulysses: share each picture's work out to the processes that torchrun started. InputError for what can't be.
    """

    def __init__(
        self,
        model: Name = None,
        flux: Name = None,
        t5: Name = None,
        clip: Name = None,
        ae: Name = None,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        cache: Path | None = None,
        verbose: bool = False,
        compile: bool = False,
        quantize: str = "auto",
        offload: str = "auto",
        ulysses: bool = False,
    ):
        for name, value, choices in (
            ("dtype", dtype, ("auto", *DTYPES)), ("attention", attention, ("auto", *ATTENTIONS)),
            ("quantize", quantize, QUANTIZE), ("offload", offload, OFFLOAD),
        ):  # fmt: skip
            if value not in choices:
                raise InputError(f"--{name} {value}: expected one of {', '.join(choices)}.")
        self.device = choose_device(device)
        if dtype == "auto":
            dtype = "float32" if self.device.type == "cpu" else "bfloat16"
        self.dtype, self.attention, self.cache, self.verbose = DTYPES[dtype], attention, cache, verbose
        self.checkpoint = weights.find(model, flux, t5, clip, ae)
        self.size = int(weights.metadata_number(self.checkpoint.flux, "sample_size", 1024))  # where a layout has none
        self.fp8, self.compile, self.offload = choose_fp8(quantize, self.checkpoint.flux, self.device), compile, offload
        if compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))):
            raise InputError("--compile: torch.compile needs a C++ compiler, and there is none here; leave it out.")
        if offload == "blocks" and self.device.type == "mps":
            raise InputError("--offload blocks: Apple's GPUs have the host's memory already; leave it out.")
        heads = weights.flux_params(self.checkpoint.flux).num_heads
        self.parallel = Ulysses(self.device, heads) if ulysses else None
        self.streamed: dict[str, list[Streamed]] = {}  # by part: what of it is on the device only in turn
        self.flux_room = 0  # bytes that were counted on for working with the transformer when it was loaded
        self.modulated: tuple[Prepared | None, Modulations] = None, []  # of the last layout
        self.nets: dict[Path, ControlNet] = {}  # ControlNets, by their files
        self.loras: dict[str, Lora] = {}  # all that were read, by their names in layouts
        self.parts: dict[str, tuple[Any, nn.Module]] = {}  # by name: which LoRAs are merged into it, and the part
        self.encoded: dict[str, Tensor] = {}  # prompts, until the encoders are dropped

    def __call__(self, layout: Layout, seed: int) -> Image.Image:
        prepared = self.prepare(layout)
        self.encoded.clear()  # calls with ever new prompts must not fill the memory
        return self.decode(self.latents(prepared, seed))

    @torch.inference_mode()
    def prepare(self, layout: Layout, where: Where = lambda path: path) -> Prepared:
        """Read and encode what a layout names. `where` names its keys in messages."""
        layout = with_model_defaults(layout, self.checkpoint.flux)
        controls = plan_controls(layout, self.checkpoint.flux, where)
        loras = read_loras(layout, self.checkpoint, self.loras)
        self.loras |= loras
        lora_picture = control_of(layout)
        regional = layout.regional_steps(layout.steps) > 0
        in_plain_steps = any(lora.plain_steps for region in layout.regions for lora in region.loras)
        tokens = region_tokens(layout) if regional or in_plain_steps else None
        for warning in tokens.warnings if tokens else ():
            say(f"warning: {warning}")
        if regional and layout.method == "regional":  # complain before the encoders are loaded
            choose_attention(self.attention, self.device, self.dtype)
        conditioning = self.encode(layout, tokens, layout.method == "rpg", loras)
        control_latents = None if lora_picture is None else self.latents_of(lora_picture)
        controls = [
            (source, image if weights.controlnet_params(source).hint_width else self.latents_of(image))
            for source, image in controls
        ]
        return Prepared(layout, tokens, conditioning, loras, controls, control_latents)

    @torch.inference_mode()
    def latents(
        self,
        prepared: Prepared,
        seed: int,
        extensions: Sequence[Extension] = (),
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Latents (1, 16, height / 8, width / 8), float32. extensions: further ones than the layout's."""
        layout, tokens, conditioning, loras, *_ = prepared
        flux = self.part("flux", layout, loras)
        conditioning = Conditioning(*(x if x is None else x.to(self.device) for x in conditioning))
        extensions = self.extensions(flux, prepared, conditioning, extensions)
        modulation = self.modulation(flux, prepared)
        masked_attention = portable_attention
        if layout.regional_steps(layout.steps) and layout.method == "regional":
            masked_attention = choose_attention(self.attention, self.device, self.dtype, self.verbose)
        eager = self.compile and any(region.loras for region in layout.regions)
        if eager:
            say("regions' own LoRAs: this layout's blocks run uncompiled")
        stance = torch.compiler.set_stance("force_eager") if eager else nullcontext()
        with library_attention(flux, layout, conditioning.txt, self.verbose), stance:
            z = sample(
                flux, layout, tokens, conditioning, seed, masked_attention, extensions, on_step, modulation
            )  # fmt: skip
        self.release()  # room for the VAE
        return z

    def extensions(
        self, flux: Flux, prepared: Prepared, conditioning: Conditioning, own: Sequence[Extension]
    ) -> list[Extension]:
        """The layout's extensions and a call's own, the innermost first.

        LoRAs of regions see a process's part of the tokens, the others all of them; ControlNets, the outermost, see the
        image without a control LoRA's.
        """
        layout = prepared.layout
        found = []
        part = self.parallel.part if self.parallel else all_of
        if any(region.loras for region in layout.regions):
            found.append(region_loras(flux, layout, prepared.loras, self.device, self.dtype, partial(part, dim=0)))
        if self.parallel:
            found.append(self.parallel.extend)
        if prepared.control_latents is not None:
            found.append(control_lora(prepared.control_latents.to(self.device)))
        found += own
        if prepared.controls:
            controls = load_controls(layout, prepared.controls, self.device, self.dtype, self.nets)
            found.append(controlnets(controls, flux.params, layout.steps, conditioning, part))
        return found

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Image.Image:
        autoencoder = self.part("ae")
        return Image.fromarray(to_uint8(autoencoder.decode(z.to(self.device, self.dtype)))[0].cpu().numpy())

    def maps(self) -> AttentionMaps:
        """What watches the attention, by its `extend`, one of the extensions of `latents`."""
        params = weights.flux_params(self.checkpoint.flux)
        return AttentionMaps(params.depth, params.depth_single_blocks)

    def drop(self, *names: str) -> None:
        """Let go of parts: t5, clip, flux, ae."""
        self.release()
        for name in names:
            self.parts.pop(name, None)
            self.streamed.pop(name, None)
        if "t5" in names:
            self.encoded.clear()
        if "flux" in names:
            self.nets.clear()
            self.modulated = None, []
            if self.compile:  # compiled blocks hold themselves
                gc.collect()
        if self.device.type == "cuda":  # what comes next is of other sizes
            torch.cuda.empty_cache()
            torch.accelerator.empty_host_cache()

    def part(self, name: str, layout: Layout | None = None, loras: Loras = NO_LORAS) -> nn.Module:
        """A part of the model with the layout's whole-picture LoRAs merged into it; loaded again for other LoRAs."""
        entries = [(e.file, e.scale) for e in layout.loras if loras[e.file].changes.get(name)] if layout else []
        room = 0
        if name == "flux" and self.offload == "auto" and self.device.type == "cuda":
            room = working_bytes(self.checkpoint.flux, layout, self.dtype, self.fp8)
        if self.parts.get(name, (None, None))[0] != entries or room > self.flux_room:
            self.drop(name)
            self.flux_room = room if name == "flux" else self.flux_room
            merges = merges_of(layout, loras, name) if entries else weights.NOTHING
            self.parts[name] = entries, self.load(name, merges, layout)
        return self.parts[name][1]

    def load(self, name: str, merges: weights.Merges, layout: Layout | None) -> nn.Module:
        source, where = getattr(self.checkpoint, name), (self.device, self.dtype)
        if name == "ae":
            return weights.load_autoencoder(source, *where)
        if name == "clip":
            return weights.load_clip(source, *where, merges)
        streamed = stays_on_host(source, self.offload, *where, self.fp8 and name == "flux", layout)
        if name == "t5":
            t5 = weights.load_t5(source, *where, merges, T5_BLOCKS if streamed else weights.NEVER)
            if streamed:
                self.streamed[name] = [Streamed(list(t5.encoder.block), self.device, pin=True)]
            if "flux" not in self.parts:
                read_ahead(self.checkpoint.flux)  # while this encodes
            return t5
        on_card = self.device.type == "cuda"  # where only what comes of the modulation layers is needed all the time
        on_host = FLUX_BLOCKS if streamed else FLUX_MODULATION if on_card else weights.NEVER
        flux = weights.load_flux(source, *where, merges, on_host, self.fp8)
        layers = [layer for layer in flux.modules() if isinstance(layer, Modulation)]
        self.streamed[name] = [Streamed(layers, self.device)] if on_card else []
        if streamed:
            self.streamed[name].append(Streamed([*flux.double_blocks, *flux.single_blocks], self.device, pin=True))
        if self.compile:
            flux.compile_blocks()
        return flux

    def modulation(self, flux: Flux, prepared: Prepared) -> Modulations:
        """What modulates the blocks in each step of a layout; made once for all its seeds."""
        if self.modulated[0] is not prepared:
            y = prepared.conditioning.y.to(self.device)
            self.modulated = prepared, modulations(flux, prepared.layout, y)
            self.release()
        return self.modulated[1]

    def release(self) -> None:
        """Give back the memory of those weights on the card that are only there in turn."""
        for streamed in itertools.chain(*self.streamed.values()):
            streamed.release()

    def latents_of(self, picture: Tensor) -> Tensor:
        """A control picture's packed latents, (1, L_img, 64)."""
        return pack(self.part("ae").encode(picture.to(self.device, self.dtype))).cpu()

    def encode(
        self, layout: Layout, tokens: RegionTokens | None, vectors: bool, loras: Loras = NO_LORAS
    ) -> Conditioning:
        """Encode the prompts, with CLIP the base prompt's alone or all `vectors`.

        Each prompt is encoded by itself: in a batch its numbers would depend, in their last bits, on the batch.
        """
        checkpoint, regions = self.checkpoint, tokens.prompts if tokens else []
        tokenizer = T5Tokenizer(checkpoint.t5_tokenizer)
        base_ids = tokenize(tokenizer, [layout.prompt], layout.max_sequence_length)
        region_ids = tokenize(tokenizer, regions, layout.region_max_sequence_length) if regions else []
        clip_ids, cut = CLIPTokenizer(checkpoint.clip_tokenizer)([layout.prompt] + regions * vectors)
        if cut[0]:
            say(f"warning: CLIP reads 77 tokens of the base prompt; it does not see: {cut[0]!r}")
        t5_size = weights.t5_params(checkpoint.t5).vocab_size
        clip_size = weights.clip_params(checkpoint.clip).vocab_size
        for ids in [base_ids, *region_ids]:
            check_vocabulary(ids.max(), t5_size, checkpoint.t5_tokenizer, checkpoint.t5)
        check_vocabulary(clip_ids.max(), clip_size, checkpoint.clip_tokenizer, checkpoint.clip)
        own = [region.loras for region in layout.regions] + [()] * (len(regions) - len(layout.regions))
        states = [self.cached("t5", ids[None], layout, loras, region) for ids, region in zip(region_ids, own)]
        pooled = [self.cached("clip", ids[None], layout, loras) for ids in clip_ids]
        txt = self.cached("t5", base_ids, layout, loras)
        return Conditioning(txt, torch.cat(states) if states else None, torch.cat(pooled))

    def cached(self, part: str, ids: Tensor, layout: Layout, loras: Loras, own: Sequence[RegionLora] = ()) -> Tensor:
        """What an encoder makes of one prompt's ids (1, L), changed by its region's `own` LoRAs; on the CPU. It comes
        from this process's memory, or from the cache's folder, if it was made before: by the same weights, in the same
        dtype, on such a device, with as many threads."""
        merged, own = ([lora for lora in given if loras[lora.file].changes[part]] for given in (layout.loras, own))
        source, entries = getattr(self.checkpoint, part), [*merged, *own]
        files = {tensor.file for tensor in source.tensors.values()}
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        depends_on = [
            ids.tolist(), sorted(map(identity, files)), [(identity(loras[e.file].path), e.scale) for e in entries],
            len(own), str(self.dtype), device, torch.__version__, torch.get_num_threads(),
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()
        file = self.cache / f"{part}-{name}.safetensors" if self.cache else None
        if name not in self.encoded and file and file.exists():
            with suppress(SafetensorError):  # a broken file is written anew
                self.encoded[name] = load_file(file)["states"]
        if name not in self.encoded:
            encoder = self.part(part, layout, loras)
            everywhere = torch.ones(ids.shape[1], dtype=torch.bool)
            changes = [Addition(c, lora.scale, everywhere) for lora in own for c in loras[lora.file].changes[part]]
            with added(encoder, hooks_for(encoder, changes, self.device, self.dtype)):
                self.encoded[name] = encoder(ids.to(self.device)).to(self.dtype).cpu()
            if file:
                self.cache.mkdir(parents=True, exist_ok=True)
                write(file, partial(Path.write_bytes, data=save({"states": self.encoded[name].contiguous()})))
        return self.encoded[name]


def identity(file: Path) -> tuple[str, int, int]:
    """Which file this is, and in which state."""
    return str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns


def with_model_defaults(layout: Layout, flux: Source) -> Layout:
    """Fill in what the layout leaves to the model: dev takes 24 steps and 512 text tokens, schnell 4 and 256."""
    steps, length = (24, 512) if weights.flux_params(flux).guidance_embed else (4, 256)
    length = int(weights.metadata_number(flux, "max_sequence_length", length))
    length = layout.max_sequence_length or length
    return msgspec.structs.replace(
        layout,
        steps=layout.steps or steps,
        max_sequence_length=length,
        region_max_sequence_length=layout.region_length(length),
    )


# ------------------------------------------------------------------------------------------------ what is encoded


def tokenize(tokenizer: T5Tokenizer, prompts: list[str], length: int) -> Tensor:
    ids, cut = tokenizer(prompts, length)
    for prompt, rest in zip(prompts, cut):
        if rest:
            say(f"warning: {length} text tokens do not hold {prompt[:40]!r}...; cut off: {rest!r}")
    return ids


def text_lengths(layout: Layout, checkpoint: weights.Checkpoint) -> list[int]:
    """How many tokens the base prompt and each region's prompt have, the background's included where it is needed."""
    prompts = [layout.prompt] + (region_tokens(layout).prompts if layout.regions else [])
    tokenizer = T5Tokenizer(checkpoint.t5_tokenizer)
    return [len(tokenizer.encode(prompt)[0]) + 1 for prompt in prompts]  # and the end token


def check_vocabulary(highest: Tensor, size: int, tokenizer: Path, encoder: Source) -> None:
    if highest >= size:
        raise InputError(
            f"{tokenizer}: its ids go beyond the {size} tokens that {encoder.path} knows; they don't match."
        )
