"""LoRA terms: merged into weights while these are loaded, or added for some tokens by hooks."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fp8 import Fp8Linear


class LowRank(NamedTuple):
    """scale * up @ down: up (out, rank), down (rank, in)."""

    up: Tensor
    down: Tensor
    scale: float

    def delta(self) -> Tensor:
        return self.scale * (self.up @ self.down)

    def __call__(self, x: Tensor, rows: slice) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.down), self.up[rows])


class Kronecker(NamedTuple):
    """scale * kron(left, right): left (a, b), right (c, d), for a layer from b d to a c."""

    left: Tensor
    right: Tensor
    scale: float

    def delta(self) -> Tensor:
        return self.scale * torch.kron(self.left, self.right)

    def __call__(self, x: Tensor, rows: slice) -> Tensor:
        x = F.linear(x.unflatten(-1, (self.left.shape[1], -1)), self.right)
        x = torch.einsum("...bc,ab->...ac", x, self.left)
        return self.scale * x.flatten(-2)[..., rows]


class Full(NamedTuple):
    """A whole matrix (out, in), or for a bias or a norm a vector (out,)."""

    matrix: Tensor

    def delta(self) -> Tensor:
        return self.matrix

    def __call__(self, x: Tensor, rows: slice) -> Tensor:
        own = self.matrix[rows]
        return own if own.ndim == 1 else F.linear(x, own)


# Called like a layer, a term gives some of its rows: x (B, L, in) -> (B, L, rows).
Term = LowRank | Kronecker | Full


def converted(term: Term, device: torch.device | str, dtype: torch.dtype) -> Term:
    return term._make(x.to(device).to(dtype) if isinstance(x, Tensor) else x for x in term)


class Change(NamedTuple):
    """What a file does to rows [start, stop) of the tensor `name`. magnitude: DoRA's, (out, 1) or
    (1, in), the lengths of the changed weight's rows or columns. replaces: what was there."""

    name: str
    start: int
    stop: int
    term: Term
    magnitude: Tensor | None = None
    replaces: bool = False

    def delta(self, rows: Tensor) -> Tensor:
        """What is added to the weight's rows (out, in), at a scale of 1."""
        new = converted(self.term, rows.device, rows.dtype).delta()
        if self.replaces:
            return new - rows
        if self.magnitude is None:
            return new
        changed = rows + new
        magnitude = self.magnitude.to(rows.device).to(rows.dtype)
        by_row = len(magnitude) == len(rows)
        lengths = changed.norm(dim=1 if by_row else 0, keepdim=True)
        return changed * magnitude / lengths - rows


@dataclass(frozen=True)
class Lora:
    """A file's changes to flux, t5 and clip, and its unknown keys. is_control: with it the
    transformer reads a control image next to the noisy one (BFL's Canny and Depth)."""

    path: Path
    changes: dict[str, list[Change]]
    unknown: list[str]
    is_control: bool = False


Loras = Mapping[str, Lora]  # by their names in the layout
NO_LORAS: Loras = {}


def merge(weight: Tensor, changes: list[tuple[Change, float]]) -> Tensor:
    """A weight, float32 or more, with changes at these scales; control LoRAs make it wider."""
    weight = weight.clone()
    for change, scale in changes:
        low_rank = isinstance(change.term, LowRank)
        columns = change.term.down.shape[1] if low_rank else weight.shape[-1]
        if columns > weight.shape[-1]:
            weight = F.pad(weight, (0, columns - weight.shape[-1]))
        rows = weight[change.start : change.stop][..., :columns]
        rows += scale * change.delta(rows)
    return weight


# Layers whose input is one vector for all tokens.
MODULATION = re.compile(r"mod(ulation)?\.(lin|1)$")
# By the first part of a tensor's name.
STREAMS = {"img_in": "img", "txt_in": "txt", "single_blocks": "both", "final_layer": "img"}


def stream_of(name: str) -> str | None:
    """Which tokens a tensor of Flux works on: img, txt, both; None for those of vectors."""
    first, *rest = name.split(".")
    return rest[1][:3] if first == "double_blocks" else STREAMS.get(first)


def can_be_regional(change: Change) -> bool:
    return stream_of(change.name) is not None and not change.name.endswith("_norm.scale")


class Addition(NamedTuple):
    """A change of a linear layer for the tokens where `tokens` (L,) is true."""

    change: Change
    scale: float
    tokens: Tensor


Hooks = dict[str, Callable[..., Tensor]]  # by layer


@contextmanager
def added(module: nn.Module, hooks: Hooks) -> Iterator[None]:
    """While it lasts, layers make these additions; other tokens keep their bits."""
    with ExitStack() as stack:
        for layer, hook in hooks.items():
            linear = module.get_submodule(layer)
            stack.enter_context(linear.register_forward_hook(hook, with_kwargs=True))
        yield


def hooks_for(
    module: nn.Module, additions: list[Addition], device: torch.device, dtype: torch.dtype
) -> Hooks:  # fmt: skip
    """What makes these additions; device, dtype: of the layers' inputs."""
    terms = {}
    for change, scale, tokens in additions:
        layer = change.name.rpartition(".")[0]
        term = change.term
        if change.magnitude is not None:  # what a DoRA comes to
            rows = slice(change.start, change.stop)
            linear = module.get_submodule(layer)
            weight = linear.upcast(rows) if isinstance(linear, Fp8Linear) else linear.weight[rows]
            precise = torch.promote_types(weight.dtype, torch.float32)
            term = Full(change.delta(weight.to(precise)))
        term = converted(term, device, dtype)
        index = tokens.nonzero().flatten().to(device)
        addition = term, scale, range(change.start, change.stop), tokens.cpu(), index
        terms.setdefault(layer, []).append(addition)
    return {name: partial(add, own, bool(MODULATION.search(name))) for name, own in terms.items()}


def add(
    terms: list[tuple[Term, float, range, Tensor, Tensor]], of_vector: bool,
    linear: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any], out: Tensor,
) -> Tensor:  # fmt: skip
    """A forward hook: scale * term(x) is added to some rows of the output of some tokens, (L,)
    bool and indices. args[0]: (B, L, in), or the last tokens alone; if `of_vector`, one for all,
    (B, 1, in), and each token gets an output of its own. kwargs: FusedLinear's `rows` in `out`."""
    (x,) = args
    asked = range(linear.out_features)[kwargs.get("rows", slice(None))]
    for term, scale, rows, tokens, index in terms:
        start = max(rows.start, asked.start)
        stop = min(rows.stop, asked.stop)
        if start >= stop:
            continue
        own = slice(start - rows.start, stop - rows.start)
        there = slice(start - asked.start, stop - asked.start)
        if of_vector:
            out = out.repeat(1, len(tokens), 1) if out.shape[1] == 1 else out
            out[:, index, there] += scale * term(x, own)
        else:
            before = len(tokens) - x.shape[1]
            index = index[int(tokens[:before].sum()) :] - before
            out[:, index, there] += scale * term(x[:, index], own)
    return out
