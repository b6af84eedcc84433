"""Prompts to embeddings: T5's for every prompt, CLIP's pooled one for the base prompt."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import weights
from errors import MISSING, InputError, warn
from extensions.lora import Addition, added, hooks_for
from formats.recognize import Source
from model.tokenizers import CLIPTokenizer, T5Tokenizer
from regional.layout import Layout, RegionLora
from regional.mask import RegionTokens
from regional.sampling import Conditioning, Loras
from runtime.prompt_cache import PromptCache


class Prompts(NamedTuple):
    """Encodes prompts. get_encoder: gives t5 or clip with a layout's LoRAs merged."""

    checkpoint: weights.Checkpoint
    device: torch.device
    dtype: torch.dtype
    get_encoder: Callable[..., nn.Module]
    cache: PromptCache

    def encode(self, layout: Layout, tokens: RegionTokens | None, loras: Loras) -> Conditioning:
        """Encode the prompts; with CLIP the base prompt's alone, or for the method rpg all.

        Each prompt is encoded by itself: in a batch, rounding would depend on the others.
        """
        checkpoint = self.checkpoint
        regions = tokens.prompts if tokens else []
        tokenizer = T5Tokenizer(checkpoint.t5_tokenizer)
        base_ids = tokenize(tokenizer, [layout.prompt], layout.max_sequence_length)
        region_ids = tokenize(tokenizer, regions, layout.region_max_sequence_length)
        pooled = [layout.prompt] + regions * (layout.method == "rpg")
        clip_ids, cut = CLIPTokenizer(checkpoint.clip_tokenizer)(pooled)
        if cut[0]:
            warn(f"CLIP reads 77 tokens of the base prompt; it ignores: {cut[0]!r}")
        size = weights.t5_params(checkpoint.t5).vocab_size
        for ids in [base_ids, *region_ids]:
            check_vocabulary(ids, size, checkpoint.t5_tokenizer, checkpoint.t5)
        size = weights.clip_params(checkpoint.clip).vocab_size
        check_vocabulary(clip_ids, size, checkpoint.clip_tokenizer, checkpoint.clip)
        own = [region.loras for region in layout.regions]
        own += [()] * (len(regions) - len(own))  # the background's
        encode = partial(self.embedding, layout=layout, loras=loras)
        states = [encode("t5", ids[None], own=used) for ids, used in zip(region_ids, own)]
        y = [encode("clip", ids[None]) for ids in clip_ids]
        regions = torch.cat(states) if states else None
        return Conditioning(encode("t5", base_ids), regions, torch.cat(y))

    def embedding(
        self, part: str, ids: Tensor, layout: Layout, loras: Loras, own: Sequence[RegionLora] = ()
    ) -> Tensor:  # fmt: skip
        """An encoder's result for one prompt's ids (1, L), changed by the layout's LoRAs and by
        those of its region, `own`; on the CPU."""
        merged = [lora for lora in layout.loras if loras[lora.file].changes[part]]
        own = [lora for lora in own if loras[lora.file].changes[part]]
        files = {tensor.file for tensor in getattr(self.checkpoint, part).tensors.values()}
        device = self.device.type
        if device == "cuda":
            device = torch.cuda.get_device_name(self.device)
        depends_on = [
            ids.tolist(), sorted(map(identity, files)),
            [(identity(loras[lora.file].path), lora.scale) for lora in (*merged, *own)], len(own),
            str(self.dtype), device, torch.__version__, torch.get_num_threads(),
        ]  # fmt: skip

        def encode() -> Tensor:
            encoder = self.get_encoder(part, layout, loras)
            everywhere = torch.ones(ids.shape[1], dtype=torch.bool)
            changes = [(c, lora.scale) for lora in own for c in loras[lora.file].changes[part]]
            additions = [Addition(change, scale, everywhere) for change, scale in changes]
            with added(encoder, hooks_for(encoder, additions, self.device, self.dtype)):
                return encoder(ids.to(self.device)).to(self.dtype).cpu()

        return self.cache.get(part, depends_on, encode)


def identity(file: Path) -> tuple[str, int, int]:
    """Which file this is, and in which state."""
    return str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns


def tokenize(tokenizer: T5Tokenizer, prompts: list[str], length: int) -> Tensor | list[Tensor]:
    """Ids (len(prompts), length)."""
    if not prompts:
        return []
    ids, cut = tokenizer(prompts, length)
    for prompt, rest in zip(prompts, cut):
        if rest:
            warn(f"{prompt[:40]!r}... has more than {length} tokens; cut off: {rest!r}")
    return ids


def check_vocabulary(ids: Tensor, size: int, tokenizer: Path, encoder: Source) -> None:
    if ids.max() >= size:
        problem = f"its ids exceed the {size} tokens of {encoder.path}; they don't match"
        raise InputError(tokenizer, MISSING, problem)
