"""The baseline that the paper compares with: RPG's regional composition (arXiv 2401.11708), carried over to FLUX.

Nothing is changed inside the model. Every region is denoised with its own prompt over the whole picture, and in each
step the velocities are put together by the masks. It costs one more run of the model for each region.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from regional.mask import RegionTokens

Velocity = Callable[[Tensor, Tensor], Tensor]  # (img (B, L_img, 64), t (B,)) -> (B, L_img, 64)


def composed_velocity(regions: list[Velocity], base: Velocity, tokens: RegionTokens, base_ratio: Tensor) -> Velocity:
    """(1 - base_ratio) * what each token's regions say + base_ratio * what the base prompt says.

    `regions` are the velocities of tokens.prompts, in that order; where regions overlap, their mean counts, by cover.
    base_ratio: (L_img,).
    """
    shares = (tokens.cover / tokens.cover.sum(0))[:, :, None]
    ratio = base_ratio[:, None].float()

    def velocity(img: Tensor, t: Tensor) -> Tensor:
        regional = sum(share.to(img) * region(img, t) for share, region in zip(shares, regions))
        return torch.lerp(regional, base(img, t), ratio.to(regional)) if ratio.any() else regional

    return velocity
