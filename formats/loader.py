"""A module's tensors from a checkpoint's: their rows stacked, LoRAs merged, in FP8 if wanted."""

import re
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from formats.fp8 import Fp8Linear, can_multiply, to_fp8
from formats.key_names import Rows
from formats.safetensors import Stored, stored_fp8, values, whole

Device = torch.device | str
Merges = Mapping[str, Callable[[Tensor], Tensor]]  # by tensor: adds LoRAs
State = dict[str, Tensor]
Recipe = dict[str, list[Rows]]  # which rows of a file make up each tensor
FP8_LAYERS = re.compile(r"blocks\.\d+\.(?!.*mod)")  # the blocks but for modulation
MERGING = threading.Lock()  # A merge takes several times its matrix.


def fp8_layers(module: nn.Module) -> set[str]:
    """The layers of a transformer that may become FP8."""
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    return set(filter(FP8_LAYERS.search, linear))


class Loader(NamedTuple):
    """Makes a module's tensors from a file's."""

    tensors: dict[str, Stored]
    recipe: Recipe
    module: State
    device: Device
    dtype: torch.dtype
    merges: Merges

    def tensor(self, name: str, device: Device) -> Tensor:
        merge = self.merges.get(name)
        if merge is None:
            return self.stacked(name, device, self.dtype)
        with MERGING:
            precise = torch.promote_types(self.dtype, torch.float32)
            return merge(self.stacked(name, device, precise)).to(self.dtype)

    def fp8(self, name: str) -> tuple[Tensor, ...]:
        """A weight (out, in) in FP8 and its scales (out, 1); stored ones are kept."""
        rows = self.recipe[name]
        stored = [self.tensors[row.key] for row in rows]
        if name in self.merges or any(tensor.dtype != "F8_E4M3" for tensor in stored):
            # At once, a large matrix would take several times its memory.
            pieces = map(to_fp8, self.tensor(name, self.device).split(1024))
        else:
            parts = [slice(row.start, row.stop) for row in rows]
            pieces = map(partial(stored_fp8, device=self.device), stored, parts)
        return tuple(torch.cat(parts) for parts in zip(*pieces))

    def stacked(self, name: str, device: Device, dtype: torch.dtype) -> Tensor:
        """A tensor's rows, stacked."""
        rows = self.recipe[name]
        shape = self.module[name].shape
        if len(rows) == 1 and rows[0].stop is None:
            return whole(self.tensors[rows[0].key], device, dtype).reshape(shape)
        out = torch.empty(shape, device=device, dtype=dtype)
        start = 0
        for row in rows:
            piece = values(self.tensors[row.key], device, dtype)
            piece = piece[row.start : row.stop]
            out[start : start + len(piece)] = piece
            start += len(piece)
        return out


def fit_layers(module: nn.Module, fp8: set[str], state: State, device: torch.device) -> None:
    """Replace layers that become FP8, and an img_in that a control LoRA made wider."""
    with torch.device("meta"):
        for name in fp8:
            layer = module.get_submodule(name)
            sizes = (layer.in_features, layer.out_features)
            module.set_submodule(name, Fp8Linear(*sizes, can_multiply(device)))
        weight = state.get("img_in.weight")
        if weight is not None and weight.shape != module.img_in.weight.shape:
            module.img_in = nn.Linear(*reversed(weight.shape))
