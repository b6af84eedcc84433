"""One image on several GPUs: each process has some of the tokens, in attention of the heads.

DeepSpeed-Ulysses (arXiv 2309.14509) as an extension of sampling: before attention processes
exchange q, k and v, so that each has all tokens of its heads, then back. Extensions before
it in the list see a process's `part` of the tokens, those after it all.
"""

import math
import os
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from errors import InputError
from model.attention import Attention, Block
from regional.extension import Branches, Forward, Pass

wrong = partial(InputError, "--parallel", "ulysses")


class Ulysses:
    """This process among `size` of one group, which torchrun has started."""

    def __init__(self, device: torch.device, heads: int):
        if not dist.is_torchelastic_launched():
            raise wrong("start it by torchrun --nproc-per-node N generate.py")
        size = int(os.environ["WORLD_SIZE"])
        if heads % size:
            raise wrong(f"the model's {heads} heads can't be shared out to {size} processes")
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        self.rank = dist.get_rank()
        self.size = size
        self.on_hosts = dist.new_group(backend="gloo")

    def extend(self, forward: Forward, branches: Branches) -> Forward:
        """Each process computes its part of the tokens, and gets the whole velocity."""

        def split(given: Pass, step: int) -> Tensor:
            tokens = given.img, given.img_ids, given.txt, given.txt_ids
            lengths = given.txt.shape[1], given.img.shape[1], branches.streams
            attention = self.attention(given.attention, *lengths)
            local = Pass(*map(self.part, tokens), *given[4:])
            own = forward(local._replace(attention=attention), step)  # (B, l, channels)
            whole = own.new_zeros(own.shape[0], given.img.shape[1], own.shape[2])
            self.part(whole).copy_(own)
            dist.all_reduce(whole)
            return whole

        return split

    def counts(self, length: int) -> list[int]:
        """How many of `length` tokens each process has, as by `tensor_split`."""
        least, more = divmod(length, self.size)
        return [least + (rank < more) for rank in range(self.size)]

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's part of the tokens along `dim`."""
        if x.shape[dim] < self.size:
            raise wrong(f"{x.shape[dim]} tokens can't be shared out to {self.size} processes")
        return x.tensor_split(self.size, dim)[self.rank]

    def attention(self, inner: Attention, txt: int, img: int, streams: int) -> Attention:
        """`inner` over all tokens, for some heads. txt, img: tokens of [txt, img] in double
        blocks, and of [txt, img, ...] with `streams` image streams in single blocks."""
        lengths = {"double": [txt, img], "single": [txt] + [img] * streams}

        def attend(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
            segments = [self.counts(length) for length in lengths[block.kind]]
            counts = list(zip(*segments))  # each process's tokens of each segment
            x = torch.stack([q, k, v]).unflatten(2, (self.size, -1)).movedim(2, 0)
            shapes = [(*x.shape[1:-2], sum(own), x.shape[-1]) for own in counts]
            received = self.exchange(list(x), shapes)
            pieces = [x.split(own, dim=-2) for x, own in zip(received, counts)]
            in_order = [piece for segment in zip(*pieces) for piece in segment]
            out = inner(*torch.cat(in_order, dim=-2), block)
            pieces = out.split(sum(segments, []), dim=-2)
            parts = [torch.cat(pieces[rank :: self.size], dim=-2) for rank in range(self.size)]
            shapes = [parts[self.rank].shape] * self.size
            return torch.cat(self.exchange(parts, shapes), dim=1)

        return attend

    def exchange(self, parts: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Send one part to each process and get one of such a shape from each."""
        sizes = [math.prod(shape) for shape in shapes]
        flat = torch.cat([part.flatten() for part in parts])
        received = flat.new_empty(sum(sizes))
        dist.all_to_all_single(received, flat, sizes, [x.numel() for x in parts])
        return [x.view(shape) for x, shape in zip(received.split(sizes), shapes)]

    def is_any(self, flag: bool) -> bool:
        """Is it true in any process? A GPU would have to finish its work to tell."""
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.on_hosts)
        return bool(found)

    def close(self) -> None:
        dist.destroy_process_group()
