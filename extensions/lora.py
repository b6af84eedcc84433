"""LoRA terms, merged into weights at loading or added for some tokens by hooks."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats.fp8 import Fp8Linear

# Layers whose input is one vector for all tokens.
MODULATION = re.compile(r"mod(ulation)?\.(lin|1)$")
# Which tokens the parts of Flux work on, by the first word of a tensor's name.
STREAMS = {"img_in": "img", "txt_in": "txt", "single_blocks": "both", "final_layer": "img"}
Loras = Mapping[str, "Lora"]  # by their names in the layout
Hooks = dict[str, Callable[..., Tensor]]  # by layer
Addition = tuple["Change", float, Tensor]  # its scale; which tokens get it, (L,) bool


class LowRank(NamedTuple):
    """scale * up @ down."""

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)
    scale: float

    def delta(self) -> Tensor:
        return self.scale * (self.up @ self.down)

    def __call__(self, x: Tensor, rows: slice) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.down), self.up[rows])


class Kronecker(NamedTuple):
    """scale * kron(left, right), (a c, b d)."""

    left: Tensor  # (a, b)
    right: Tensor  # (c, d)
    scale: float

    def delta(self) -> Tensor:
        return self.scale * torch.kron(self.left, self.right)

    def __call__(self, x: Tensor, rows: slice) -> Tensor:
        x = F.linear(x.unflatten(-1, (self.left.shape[1], -1)), self.right)
        x = torch.einsum("...bc,ab->...ac", x, self.left)
        return self.scale * x.flatten(-2)[..., rows]


class Full(NamedTuple):
    """All numbers of a change."""

    matrix: Tensor  # (out, in), or for a bias or a norm (out,)

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
    """What a file does to some rows of one tensor."""

    name: str  # of a tensor, whose rows [start, stop) change
    start: int
    stop: int
    term: Term
    magnitude: Tensor | None = None  # DoRA's: lengths of new rows (out, 1) or columns (1, in)
    replaces: bool = False  # what was there

    def delta(self, rows: Tensor) -> Tensor:
        """What is added to the weight's rows (out, in), at a scale of 1."""
        new = converted(self.term, rows.device, rows.dtype).delta()
        if self.replaces:
            return new - rows
        if self.magnitude is None:
            return new
        changed = rows + new
        by_row = len(self.magnitude) == len(rows)
        lengths = changed.norm(dim=1 if by_row else 0, keepdim=True)
        return changed * self.magnitude.to(rows) / lengths - rows


class Lora(NamedTuple):
    """A file, read."""

    path: Path
    changes: dict[str, list[Change]]  # of flux, t5 and clip
    unknown: list[str]  # keys
    is_control: bool = False  # it reads an image, as BFL's Canny and Depth


def merge(weight: Tensor, changes: list[tuple[Change, float]]) -> Tensor:
    """A weight, in float32 or more, with scaled changes; control LoRAs widen it."""
    weight = weight.clone()
    for change, scale in changes:
        low_rank = isinstance(change.term, LowRank)
        columns = change.term.down.shape[1] if low_rank else weight.shape[-1]
        if columns > weight.shape[-1]:
            weight = F.pad(weight, (0, columns - weight.shape[-1]))
        rows = weight[change.start : change.stop][..., :columns]
        rows += scale * change.delta(rows)
    return weight


def stream_of(name: str) -> str | None:
    """Which tokens a tensor of Flux works on; None for those of vectors."""
    first, *rest = name.split(".")
    return rest[1][:3] if first == "double_blocks" else STREAMS.get(first)


def can_be_regional(change: Change) -> bool:
    return stream_of(change.name) is not None and not change.name.endswith("_norm.scale")


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
        rows = slice(change.start, change.stop)
        term = change.term
        if change.magnitude is not None:  # what a DoRA comes to
            linear = module.get_submodule(layer)
            weight = linear.upcast(rows) if isinstance(linear, Fp8Linear) else linear.weight[rows]
            precise = torch.promote_types(weight.dtype, torch.float32)
            term = Full(change.delta(weight.to(precise)))
        index = tokens.nonzero().flatten().to(device)
        addition = converted(term, device, dtype), scale, rows, tokens.cpu(), index
        terms.setdefault(layer, []).append(addition)
    is_vector = {layer: bool(MODULATION.search(layer)) for layer in terms}
    return {layer: partial(add, own, is_vector[layer]) for layer, own in terms.items()}


def add(
    terms: list[tuple], of_vector: bool, linear: nn.Module,
    args: tuple[Tensor], kwargs: dict, out: Tensor,
) -> Tensor:  # fmt: skip
    """A forward hook: adds scale * term(x) to rows of some tokens. terms: these, (L,) bool
    and indices last. x: (B, L, in), or the last tokens; if `of_vector` (B, 1, in), and each
    token gets its own output. kwargs: FusedLinear's `rows`, those in `out`."""
    (x,) = args
    asked = range(linear.out_features)[kwargs.get("rows", slice(None))]
    for term, scale, rows, tokens, index in terms:
        start = max(rows.start, asked.start)
        stop = min(rows.stop, asked.stop)
        if start >= stop:
            continue
        own = slice(start - rows.start, stop - rows.start)
        there = slice(start - asked.start, stop - asked.start)
        given = x
        if of_vector:
            out = out.repeat(1, len(tokens), 1) if out.shape[1] == 1 else out
        else:
            before = len(tokens) - x.shape[1]
            index = index[int(tokens[:before].sum()) :] - before
            given = x[:, index]
        out[:, index, there] += scale * term(given, own)
    return out
