"""One image on several GPUs: each process has a part of the tokens, in attention a part of the heads.

Sequence parallelism as in DeepSpeed-Ulysses (arXiv 2309.14509), as an extension of sampling. Before
attention the processes exchange, all to all, their tokens' q, k and v, so that each has all tokens
of its own heads, in the usual order; after it they exchange back. Attention itself, the regional
mask with it, is untouched, and the result is that of one process. Extensions before it in the list
see a process's part of the tokens, those after it all of them; `part` tells which part that is.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from errors import InputError
from model.attention import Attention, Block
from regional.extension import Branches, Forward, Pass


class Ulysses:
    """This process among `size` of one group, which torchrun has started."""

    def __init__(self, device: torch.device, heads: int):
        if not dist.is_torchelastic_launched():
            raise InputError("--parallel", "ulysses", "start it by torchrun --nproc-per-node N generate.py")
        size = int(os.environ["WORLD_SIZE"])
        if heads % size:
            problem = f"the model's {heads} heads can't be shared out to {size} processes"
            raise InputError("--parallel", "ulysses", problem)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        self.rank = dist.get_rank()
        self.size = size
        self.on_hosts = dist.new_group(backend="gloo")

    def extend(self, forward: Forward, branches: Branches) -> Forward:
        """The extension: a process computes its part of the tokens, and gets the whole velocity."""

        def split(given: Pass, step: int) -> Tensor:
            tokens = given.img, given.img_ids, given.txt, given.txt_ids
            img = given.img.shape[1]
            attention = self.attention(given.attention, given.txt.shape[1], img, branches.streams)
            local = Pass(*map(self.part, tokens), *given[4:])._replace(attention=attention)
            return self.whole(forward(local, step), img)

        return split

    def counts(self, length: int) -> list[int]:
        """How many of `length` tokens each process has."""
        return [length // self.size + (rank < length % self.size) for rank in range(self.size)]

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's part of the tokens along `dim`."""
        if x.shape[dim] < self.size:
            problem = f"{x.shape[dim]} tokens can't be shared out to {self.size} processes"
            raise InputError("--parallel", "ulysses", problem)
        return x.split(self.counts(x.shape[dim]), dim)[self.rank]

    def whole(self, x: Tensor, length: int) -> Tensor:
        """(B, l, ...) of each process -> (B, length, ...), the same for all."""
        counts = self.counts(length)
        out = x.new_zeros(x.shape[0], length, *x.shape[2:])
        out[:, sum(counts[: self.rank]) :][:, : counts[self.rank]] = x
        dist.all_reduce(out)
        return out

    def attention(self, inner: Attention, txt: int, img: int, streams: int = 1) -> Attention:
        """`inner` over all tokens, for heads shared out. txt, img: tokens of [txt, img] in the double blocks, and of
        [txt, img, ...] with so many image streams in the single blocks."""
        lengths = {"double": [txt, img], "single": [txt] + [img] * streams}

        def attend(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
            # what each process has of each segment of the sequence
            counts = list(zip(*(self.counts(length) for length in lengths[block.kind])))
            x = torch.stack([q, k, v]).unflatten(2, (self.size, -1)).movedim(2, 0)
            sizes = [sum(own) for own in counts]
            pieces = self.exchange(list(x), [(*x.shape[1:-2], size, x.shape[-1]) for size in sizes])
            pieces = [piece.split(own, dim=-2) for piece, own in zip(pieces, counts)]
            out = inner(*torch.cat([piece for segment in zip(*pieces) for piece in segment], dim=-2), block)
            segments = out.split([count for segment in zip(*counts) for count in segment], dim=-2)
            parts = [torch.cat(segments[rank :: self.size], dim=-2) for rank in range(self.size)]
            return torch.cat(self.exchange(parts, [parts[self.rank].shape] * self.size), dim=1)

        return attend

    def exchange(self, parts: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Send one part to each process and get one of such a shape from each."""
        sizes = [torch.Size(shape).numel() for shape in shapes]
        flat = torch.cat([part.flatten() for part in parts])
        received = flat.new_empty(sum(sizes))
        dist.all_to_all_single(received, flat, sizes, [part.numel() for part in parts])
        return [x.view(shape) for x, shape in zip(received.split(sizes), shapes)]

    def is_any(self, flag: bool) -> bool:
        """Is it true in any process?"""
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.on_hosts)  # a GPU would have to finish its work first
        return bool(found)

    def close(self) -> None:
        dist.destroy_process_group()
