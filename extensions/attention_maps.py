"""How much the image tokens attend to each region's prompt."""

import numpy as np
import torch
from torch import Tensor

from model.attention import Block
from regional.attention import added_scores, allowed, in_one_sequence
from regional.extension import Branches, Forward, Pass


class AttentionMaps:
    """The fraction of each image token's regional-branch attention that goes to each
    region's prompt, averaged over heads and thirds of the double and single blocks."""

    def __init__(self, depth: int, depth_single_blocks: int):
        self.group_of = {}
        self.groups = []
        for kind, count in ("double", depth), ("single", depth_single_blocks):
            for blocks in filter(len, np.array_split(range(count), 3)):
                group = len(self.groups), len(blocks)
                self.group_of |= {Block(kind, int(i)): group for i in blocks}
                last = f"-{blocks[-1]}" if len(blocks) > 1 else ""
                self.groups.append(f"{kind} {blocks[0]}{last}")
        self.steps = {}

    def extend(self, forward: Forward, branches: Branches) -> Forward:
        if branches.base_ratio is None:
            return forward
        bits = branches.region_bits.cpu()
        order = branches.order
        length = len(order)
        start = len(bits) - length
        own = bits[:start].unique_consecutive()
        words = (bits[:start, None] == own).float()  # (L_txt, R), whose they are

        def watched(given: Pass, step: int) -> Tensor:
            if step in self.steps:  # Heun's second evaluation
                return forward(given, step)
            maps = self.steps[step] = torch.zeros(len(self.groups), len(own), length)
            further = given.img.shape[1] - length  # references, before the image
            seen_bits = given.attention.bits.cpu() if further else bits
            weights = given.attention.log_weights if further else branches.log_weights
            weights = None if weights is None else weights.cpu()
            no_base = torch.zeros(further + length)
            tokens = in_one_sequence(seen_bits, 0, start, no_base, weights)
            every = torch.arange(len(seen_bits))
            image = start + further

            def attention(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
                group, blocks = self.group_of[block]
                q_img = q[:1, :, -length:]  # of a batch of two, the second is the negative prompt
                others = slice(given.txt.shape[1], given.txt.shape[1] + further)
                parts = [k[:1, :, rows] for rows in (slice(start), others, slice(-length, None))]
                seen = torch.cat(parts, dim=2)
                for value in bits[start:].unique():
                    rows = (bits[start:] == value).nonzero().flatten()
                    scores = q_img[:, :, rows] @ seen.mT / q.shape[-1] ** 0.5
                    if branches.is_masked(block):
                        added = added_scores(tokens, image + rows, every)
                        scores += 0 if added is None else added.to(scores)
                        hidden = ~allowed(value, seen_bits)
                        scores = scores.masked_fill(hidden.to(q.device), -torch.inf)
                    found = scores.float().softmax(-1)[..., :start] @ words.to(q.device)
                    found = found.mean((0, 1))
                    maps[group][:, order[rows]] += found.T.cpu() / blocks
                return given.attention(q, k, v, block)

            return forward(given._replace(attention=attention), step)

        return watched

    @property
    def maps(self) -> Tensor:
        """(regional steps, groups, R, L_img) float32, row by row."""
        return torch.stack(list(self.steps.values()))
