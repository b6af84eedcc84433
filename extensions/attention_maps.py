"""For a research reader: where in the picture each region's text is looked at, per step and group of blocks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.attention import Attention, Block
from regional.attention import RegionalAttention, added_scores, in_one_sequence
from regional.mask import allowed
from tools.metadata import save_tensor, write
from tools.sheets import contact_sheet


class AttentionMaps:
    """Watches the attention of one picture's regional steps.

    For every image token, the share of its attention in the regional branch that goes to each region's text; the mean
    over the heads, and over the blocks of a group: thirds of the double blocks and of the single blocks. The scores are
    computed a second time for it, for one distinct value of the bits after the other.
    """

    def __init__(self, depth: int, depth_single_blocks: int):
        self.group_of, self.groups = {}, []
        for kind, count in ("double", depth), ("single", depth_single_blocks):
            for blocks in np.array_split(np.arange(count), min(3, count)):
                self.group_of |= {Block(kind, int(i)): (len(self.groups), len(blocks)) for i in blocks}
                self.groups.append(f"{kind} {blocks[0]}" + (f"-{blocks[-1]}" if len(blocks) > 1 else ""))
        self.steps = []

    def watch(
        self, attention: RegionalAttention, bits: Tensor, texts: int, order: Tensor, log_weights: Tensor | None = None
    ) -> Attention:
        """The same attention, watched. bits: (L,) int64, those of [txt_1 .. txt_R, img]; texts: R; order: (L_img,), the
        places of the image tokens in the picture; log_weights: (L_img, 2 R), as RegionalAttention has them."""
        text_tokens, image_bits = bits.split([len(bits) - len(order), len(order)])
        text_length, every = len(text_tokens) // texts, torch.arange(len(bits), device=bits.device)
        weighed = in_one_sequence(bits, 0, text_length, torch.zeros(len(order), device=bits.device), log_weights)

        def watched(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
            if block == Block("double", 0):
                self.steps.append(torch.zeros(len(self.groups), texts, len(order)))
            group, blocks = self.group_of[block]
            k_seen = torch.cat([k[:, :, : len(text_tokens)], k[:, :, -len(order) :]], dim=2)
            for value in image_bits.unique():
                rows = (image_bits == value).nonzero().flatten()
                scores = q[:, :, -len(order) :][:, :, rows] @ k_seen.mT / q.shape[-1] ** 0.5
                if attention.is_masked(block):
                    added = added_scores(weighed, len(text_tokens) + rows, every)
                    scores = scores if added is None else scores + added.to(scores)
                    scores = scores.masked_fill(~allowed(bits, value), float("-inf"))
                weights = scores.float().softmax(-1)[..., : len(text_tokens)]
                share = weights.unflatten(-1, (texts, text_length)).sum(-1).mean((0, 1))
                self.steps[-1][group][:, order[rows.cpu()]] += share.T.cpu() / blocks
            return attention(q, k, v, block)

        return watched

    def extend(self) -> None:
        """Until branch a is merged."""

    @property
    def maps(self) -> Tensor:
        """(regional steps, groups, R, L_img) float32, the image tokens row by row."""
        return torch.stack(self.steps)

    def sheets(self, picture: Image.Image, prompts: list[str]) -> list[Image.Image]:
        """One contact sheet for each regional step: a row for each text, a column for each group of blocks. All are on
        one scale: white is the largest share of all."""
        grid = picture.height // 16, picture.width // 16
        heat = (self.maps / self.maps.max()).unflatten(-1, grid).numpy()
        return [
            contact_sheet(
                {prompt: [overlay(picture, heat) for heat in step[:, i]] for i, prompt in enumerate(prompts)},
                self.groups,
            )
            for step in heat
        ]


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture darkened, and lit up where the heat, (height / 16, width / 16) in [0, 1], is high."""
    light = Image.fromarray((255 * heat).astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", picture.size, "white"), picture.point(lambda v: v // 3), light)


def save_maps(maps: AttentionMaps, path: Path, image: Image.Image, prompts: list[str], made_by: dict) -> None:
    """A sheet for each regional step, path_step1.png and so on, and the numbers behind them, path.safetensors."""
    for i, sheet in enumerate(maps.sheets(image, prompts)):
        write(path.with_name(f"{path.name}_step{i + 1}.png"), sheet.save)
    save_tensor("maps", maps.maps, made_by, path.with_name(f"{path.name}.safetensors"))
