"""The denoising of one picture: noise in, latents out, the first steps regional and the others plain FLUX."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from extensions.attention_maps import AttentionMaps
from extensions.control import ActiveControl, control_hook
from extensions.lora import MODULATION, Addition, Lora, added, hooks_for
from extensions.region_lora import additions, all_of, plain_step, regional_step
from model.attention import Attention, Block, plain_attention
from model.transformer import Flux, FluxParams, Modulate
from regional.attention import MaskedAttention, RegionalAttention, Tokens
from regional.layout import FLUX_DEV, Layout
from regional.mask import RegionTokens, regional_stages
from runtime.ulysses import Ulysses
from sampler.flow import denoise, image_ids, noise, pack, text_ids, unpack
from sampler.schedule import sigmas

Loras = Mapping[str, Lora]  # by their names in the layout


NO_LORAS: Loras = {}


class Conditioning(NamedTuple):
    """The encoded prompts: txt (1, L_txt, context), regions (R, L_region, context) or None, and CLIP's vectors, of the
    base prompt alone, y (1, vec), or by the method rpg of the regions' too, (1 + R, vec). control: a control LoRA's
    picture, its packed latents (1, L_img, 64)."""

    txt: Tensor
    regions: Tensor | None
    y: Tensor
    control: Tensor | None = None


def noise_levels(layout: Layout, params: FluxParams) -> list[float]:
    return sigmas(layout.steps, layout.width * layout.height // 256, shift=params.guidance_embed)


def modulations(flux: Flux, layout: Layout, y: Tensor) -> list[list[Modulate]]:
    """What modulates the blocks in each step of the layout, by the vectors y (n, vec) of the base prompt and, where the
    method rpg needs them, the regions."""
    guidance, levels = guidance_of(layout, y.device), noise_levels(layout, flux.params)
    found = [flux.modulations(levels[:-1], y[:1], guidance)]
    if layout.method == "rpg":
        regional = levels[: layout.regional_steps(layout.steps)]
        found += [flux.modulations(regional, own[None], guidance) for own in y[1:]]
    return found


def guidance_of(layout: Layout, device: torch.device) -> Tensor:
    return torch.tensor([layout.guidance], dtype=torch.float32, device=device)


def sample(
    flux: Flux,
    layout: Layout,
    tokens: RegionTokens | None,
    conditioning: Conditioning,
    seed: int,
    masked_attention: Callable[[Tokens], MaskedAttention],
    maps: AttentionMaps | None = None,
    is_masked: Callable[[Block], bool] | None = None,
    loras: Loras = NO_LORAS,
    controls: Sequence[ActiveControl] = (),
    on_step: Callable[[], None] = lambda: None,
    modulation: list[list[Modulate]] | None = None,
    parallel: Ulysses | None = None,
) -> Tensor:
    """Noise to latents (1, 16, height / 8, width / 8), float32: the first steps regional, the others plain FLUX.

    is_masked: in which blocks the regional branch is masked; without it the layout says so. on_step: called after
    every step. modulation: what `modulations` gives for the layout, if it is known already. parallel: shares the work
    out to several processes.
    """
    device, dtype = conditioning.txt.device, conditioning.txt.dtype
    img = pack(noise(layout.width, layout.height, seed)).to(device, dtype).float()
    img_ids, beside = image_ids(layout.width, layout.height), conditioning.control
    guidance, part = guidance_of(layout, device), parallel.part if parallel else all_of
    modulation, step = modulation or modulations(flux, layout, conditioning.y), 0
    stages = regional_stages(layout.resolved(FLUX_DEV), tokens) if layout.regional_steps(layout.steps) else []
    if stages:  # tokens of the same regions side by side, for this run
        tokens, order = tokens.sorted()
        stages = [(end, base_ratio[order]) for end, base_ratio in stages]
        img, img_ids, beside = (x if x is None else x[:, order] for x in (img, img_ids, beside))
        controls = [control.sorted(order) for control in controls]
    length = conditioning.txt.shape[1]
    levels = noise_levels(layout, flux.params)
    base = {"img_ids": img_ids, "txt": conditioning.txt, "txt_ids": text_ids(length), "y": conditioning.y[:1]}
    control = control_hook(controls, flux.params, layout.steps, base | {"guidance": guidance}, part)

    def velocity(
        txt: Tensor,
        prompt: int,
        changes: list[Addition],
        streams: int = 1,
        attention: Attention = plain_attention,
        **hooks: Any,
    ) -> Velocity:
        """By the text tokens txt (1, L, context) and conditioning.y[prompt]."""
        ids, y = text_ids(txt.shape[1]), conditioning.y[prompt, None]
        lora_hooks = hooks_for(flux, changes, device, dtype)
        changes_modulation = any(MODULATION.search(layer) for layer in lora_hooks)
        if parallel:
            attention = parallel.attention(attention, txt.shape[1], img.shape[1], streams)

        def flow(img: Tensor, t: Tensor) -> Tensor:
            img = img.to(dtype)
            residuals = {"after_block": control(img, t, step, streams)} if controls else {}
            x = img if beside is None else torch.cat([img, beside], dim=-1)
            known = None if changes_modulation else modulation[prompt][step]
            with added(flux, lora_hooks):
                out = flux(
                    part(x), part(img_ids), part(txt), part(ids), t, y, guidance, attention, modulation=known,
                    **residuals, **hooks,
                )  # fmt: skip
            return parallel.whole(out, img.shape[1]) if parallel else out

        return flow

    changes = additions(
        layout.regions, loras, lambda bit: plain_step(tokens.image_bits & bit != 0, length, part), in_plain_steps=True
    )
    plain = velocity(conditioning.txt, 0, changes)

    def composed(base_ratio: Tensor) -> Velocity:
        everywhere = plain_step(torch.ones(img.shape[1], dtype=torch.bool), conditioning.regions.shape[1], part)
        own = [
            velocity(txt[None], 1 + i, additions(layout.regions[i : i + 1], loras, lambda bit: everywhere))
            for i, txt in enumerate(conditioning.regions)
        ]
        return composed_velocity(own, plain, tokens, base_ratio)

    def regional(base_ratio: Tensor) -> Velocity:
        bits = tokens.bits(conditioning.regions.shape[1]).to(device)
        attention = RegionalAttention(
            masked_attention, bits, length, img.shape[1], base_ratio,
            is_masked or (lambda block: layout.is_masked(block.kind, block.index)),
            tokens.log_weights(), shared=layout.base_stream == "shared",
        )  # fmt: skip
        streams, has_base = attention.streams, attention.has_base
        changes = additions(
            layout.regions, loras,
            lambda bit: regional_step(bits & bit != 0, length, img.shape[1], has_base, streams, part),
        )  # fmt: skip
        txt = [conditioning.regions.flatten(0, 1)[None]] + ([conditioning.txt] if has_base else [])
        watched = maps.watch(attention, bits, len(tokens.prompts), order, tokens.log_weights()) if maps else attention
        return velocity(torch.cat(txt, dim=1), 0, changes, streams, watched, join=attention.join)

    def after_step(img: Tensor) -> None:
        nonlocal step
        step += 1
        bar.update()
        on_step()

    done = 0
    with tqdm(total=layout.steps, desc=f"seed {seed}", disable=None) as bar:
        for end, base_ratio in stages:
            first = (composed if layout.method == "rpg" else regional)(base_ratio)
            img = denoise(first, img, levels[done : end + 1], after_step)
            done = end
        img = denoise(plain, img, levels[done:], after_step)
    if stages:
        img = img[:, order.argsort()]
    return unpack(img, layout.width, layout.height)


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
