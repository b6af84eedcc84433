"""The method rpg, the paper's baseline: whole images of the regions' prompts, composed in every
step."""

import torch
from torch import Tensor

from regional.extension import Branches
from regional.sampling import Run
from sampler.flow import Velocity


def composed(run: Run, base_ratio: Tensor) -> Velocity:
    """The velocities of each region's prompt over the whole image, combined by cover and
    blended with the base prompt's: base_ratio (L_img,)."""
    txt = run.conditioning.txt
    base_ratio = base_ratio.to(txt.device)
    bits = run.tokens.image_bits.to(txt.device)
    plain = run.velocity(txt, Branches(bits, run.order, txt.shape[1]))
    regions = []
    for i, txt in enumerate(run.conditioning.regions):
        bits = torch.full_like(run.order, 1 << run.tokens.prompt_bits[i]).to(txt.device)
        branches = Branches(bits, run.order, len(txt), prompt=1 + i)
        regions.append(run.velocity(txt[None], branches))
    cover = run.tokens.cover.to(base_ratio.device)
    fractions = (cover / cover.sum(0))[:, :, None]
    ratio = base_ratio[:, None].float()
    has_base = bool(base_ratio.any())

    def velocity(img: Tensor, t: float, step: int) -> Tensor:
        # The sum is float32, like img, whatever the velocities' dtype.
        mean = sum(f.to(img) * region(img, t, step) for f, region in zip(fractions, regions))
        if not has_base:
            return mean
        return torch.lerp(mean, plain(img, t, step).to(mean), ratio.to(mean))

    return velocity
