"""The denoising of an image: first the regional steps, then plain FLUX.

What is optional is an extension, a function that wraps the forward pass: see
docs/extensions.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from model.attention import Attention, Join, plain_attention, text_then_image
from model.layers import Vectors
from model.transformer import Flux, FluxParams, as_it_is
from regional.attention import MaskedAttention, RegionalAttention, Tokens
from regional.extension import Branches, Conditioning, Extension, Pass
from regional.layout import Layout
from regional.mask import RegionTokens, stage_ratios
from sampler.flow import SAMPLERS, SCHEDULES, Velocity, image_ids, noise, pack, text_ids, unpack

MakeAttention = Callable[[Tokens], MaskedAttention]
Modulations = list[dict[float, list[Vectors]]]  # by the prompt's row in y and by t


def noise_levels(layout: Layout, params: FluxParams) -> list[float]:
    image_tokens = layout.width * layout.height // 256
    levels = SCHEDULES[layout.schedule](layout.steps, image_tokens, params.guidance_embed)
    return levels[layout.steps - layout.run_steps() :]


def guidance_of(layout: Layout, device: torch.device) -> Tensor:
    return torch.tensor([layout.guidance], dtype=torch.float32, device=device)


def modulations(flux: Flux, layout: Layout, y: Tensor) -> Modulations:
    """The modulation at all levels that the sampler asks for; y: Conditioning's."""
    levels = noise_levels(layout, flux.params)[:-1]
    own = layout.regional_steps() + (layout.sampler == "heun")
    guidance = guidance_of(layout, y.device)
    found = []
    for i in range(len(y) if layout.method == "rpg" else 1):
        times = levels[:own] if i else levels
        found.append(dict(zip(times, flux.modulations(times, y[i : i + 1], guidance))))
    return found


def sample(
    flux: Flux,
    layout: Layout,
    tokens: RegionTokens | None,
    conditioning: Conditioning,
    seed: int,
    regional_velocity: "RegionalVelocity",
    extensions: Sequence[Extension] = (),
    on_step: Callable[[], None] = lambda: None,
    modulation: Modulations | None = None,
) -> Tensor:
    """Latents (1, 16, height / 8, width / 8), float32. extensions: the first is the
    innermost. regional_velocity: `by` an attention, or another method's. modulation:
    `modulations`, if known; what it lacks is added."""
    txt = conditioning.txt
    steps = layout.run_steps()
    levels = noise_levels(layout, flux.params)
    img = pack(noise(layout.width, layout.height, seed))
    img = img.to(txt.device, txt.dtype).float()
    if conditioning.image is not None:
        img = levels[0] * img + (1 - levels[0]) * conditioning.image.float()
    order = torch.arange(img.shape[1])
    stages = []
    if layout.regional_steps():
        stages = [(end, tokens.mean(ratios)) for end, ratios in stage_ratios(layout, tokens)]
        tokens, order = tokens.sorted()  # tokens of the same regions side by side
    modulation = modulation or modulations(flux, layout, conditioning.y)
    run = Run(flux, layout, tokens, conditioning, order, modulation, extensions)
    bits = tokens.image_bits if tokens else torch.zeros_like(order)
    plain = run.velocity(txt, Branches(bits.to(txt.device), order, txt.shape[1]))
    img = img[:, order]
    start = 0
    with tqdm(total=steps, desc=f"seed {seed}", disable=None, leave=None) as bar:
        for end, ratio in [*stages, (steps, None)]:
            velocity = plain if ratio is None else regional_velocity(run, ratio[order])
            for latest in SAMPLERS[layout.sampler](velocity, img, levels, range(start, end)):
                img = latest
                bar.update()
                on_step()
            start = end
    return unpack(img[:, order.argsort()], layout.width, layout.height)


@dataclass(frozen=True)
class Run:
    """What all passes of one image share; the image tokens are in this order."""

    flux: Flux
    layout: Layout
    tokens: RegionTokens | None
    conditioning: Conditioning
    order: Tensor
    modulation: Modulations
    extensions: Sequence[Extension]

    def velocity(
        self, txt: Tensor, branches: Branches, attention: Attention = plain_attention,
        join: Join = text_then_image,
    ) -> Velocity:  # fmt: skip
        """The velocity by txt (1, L_txt, context), through all extensions."""
        img_ids = image_ids(self.layout.width, self.layout.height)[:, self.order]
        txt_ids = text_ids(txt.shape[1])
        y = self.conditioning.y[branches.prompt, None]
        guidance = guidance_of(self.layout, txt.device)
        known = self.modulation[branches.prompt]

        def forward(given: Pass, step: int) -> Tensor:
            return self.flux(*given[:8])

        for extension in self.extensions:
            forward = extension(forward, branches)

        def velocity(img: Tensor, t: float, step: int) -> Tensor:
            timesteps = torch.full((1,), t, dtype=torch.float32, device=txt.device)
            if t not in known:
                known[t] = self.flux.modulation(timesteps, y, guidance)
            inputs = (img.to(txt.dtype), img_ids, txt, txt_ids, known[t])
            hooks = (attention, join, as_it_is)
            return forward(Pass(*inputs, *hooks, timesteps, y, guidance), step)

        return velocity


RegionalVelocity = Callable[[Run, Tensor], Velocity]  # by base_ratio (L_img,)


def by(masked_attention: MakeAttention) -> RegionalVelocity:
    """Every region's prompt in its region, blended with the base prompt."""
    return partial(regional, masked_attention)


def regional(masked_attention: MakeAttention, run: Run, base_ratio: Tensor) -> Velocity:
    txt, regions, *_ = run.conditioning
    layout = run.layout
    length = txt.shape[1]
    own = torch.tensor([len(x) for x in regions])
    bits = run.tokens.bits(own).to(txt.device)
    how = (base_ratio, layout.is_masked, run.tokens.log_weights())
    is_shared = layout.base_stream == "shared"
    lengths = (length, len(run.order))
    attention = RegionalAttention(masked_attention, bits, *lengths, *how, is_shared)
    texts = torch.cat([*regions, txt[0, : length * attention.has_base]])
    streams = (attention.has_base, attention.streams)
    branches = Branches(bits, run.order, length, 0, *streams, *how)
    return run.velocity(texts[None], branches, attention, attention.join)
