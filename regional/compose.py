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
    base_ratio: (L_img,), on the device that the velocities are computed on.

    Whatever the dtype of the velocities, the sum has that of `img`, which is float32 in a run.
    """
    cover = tokens.cover.to(base_ratio.device)
    fractions = (cover / cover.sum(0))[:, :, None]
    has_base = bool(base_ratio.any())
    ratio = base_ratio[:, None].float()

    def velocity(img: Tensor, t: Tensor) -> Tensor:
        regional = sum(part.to(img) * region(img, t) for part, region in zip(fractions, regions))
        if not has_base:
            return regional
        return torch.lerp(regional, base(img, t).to(regional), ratio.to(regional))

    return velocity
