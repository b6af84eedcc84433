"""Rectified flow: noise, its levels, how latents become tokens, and samplers.

Schedules give `steps + 1` noise levels from 1 to 0. shift: more high ones, as for
FLUX.1-dev and not schnell.

Samplers lead img (B, L, 64), float32, from sigmas[i] to sigmas[i + 1] in step i. They
yield it after each, and remember nothing between calls.
"""

from collections.abc import Callable, Iterator
from math import exp, factorial, gamma, log

import torch
from einops import rearrange
from torch import Tensor

# (img (B, L_img, 64), t, step) -> (B, L_img, 64), the velocity at t, in [0, 1]; the step's
# index only selects what is scheduled.
Velocity = Callable[[Tensor, float, int], Tensor]
Levels = list[float]
Images = Iterator[Tensor]


def noise(width: int, height: int, seed: int) -> Tensor:
    """The noise of a seed: (1, 16, height / 8, width / 8), the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, 16, height // 8, width // 8)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def pack(latents: Tensor) -> Tensor:
    """Latents (B, 16, 2 h, 2 w) -> image tokens (B, h w, 64), row by row."""
    return rearrange(latents, "B c (h ph) (w pw) -> B (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: Tensor, width: int, height: int) -> Tensor:
    """Image tokens (B, h w, 64) -> latents (B, 16, 2 h, 2 w)."""
    sizes = {"h": height // 16, "w": width // 16, "ph": 2, "pw": 2}
    return rearrange(tokens, "B (h w) (c ph pw) -> B c (h ph) (w pw)", **sizes)


def image_ids(width: int, height: int) -> Tensor:
    """Positions (0, row, column) of the image tokens: (1, h w, 3)."""
    rows = torch.arange(height // 16)
    columns = torch.arange(width // 16)
    zero = torch.zeros(1, dtype=torch.long)
    return torch.cartesian_prod(zero, rows, columns)[None]


def text_ids(length: int) -> Tensor:
    """Positions of text tokens, all zero: (1, length, 3)."""
    return torch.zeros(1, length, 3, dtype=torch.long)


def flux(steps: int, image_tokens: int, shift: bool) -> Levels:
    """The published one, whose mu is linear in the image tokens, through (256, 0.5) and
    (4096, 1.15)."""
    mu = 0.5 + (image_tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    linear = [1 - i / steps for i in range(steps + 1)]
    return shifted(linear, mu if shift else 0)


def simple(steps: int, image_tokens: int, shift: bool) -> Levels:
    """ComfyUI's: entries of its table, which has mu 1.15 for all sizes."""
    table = 10000 if shift else 1000
    rest = [table - int(i * (table / steps)) for i in range(steps)]
    return shifted([i / table for i in (*rest, 0)], 1.15 if shift else 0)


def beta(steps: int, image_tokens: int, shift: bool) -> Levels:
    """diffusers': quantiles of Beta(0.6, 0.6), dense at both ends, from 1 to the last of
    `flux`. ComfyUI's are entries of its table."""
    last = flux(steps, image_tokens, shift)[-2]
    quantiles = [beta_quantile(1 - i / max(steps - 1, 1)) for i in range(steps)]
    return [*(last + x * (1 - last) for x in quantiles), 0.0]


def shifted(levels: Levels, mu: float) -> Levels:
    """Each t becomes e^mu / (e^mu + 1 / t - 1); 0 and 1 stay exactly."""
    if mu == 0:
        return levels
    e = exp(mu)
    return [e / (e + 1 / t - 1) if 0 < t < 1 else t for t in levels]


def beta_quantile(p: float, a: float = 0.6) -> float:
    """x at which the regularized incomplete beta function I_x(a, a) is p."""
    if p > 0.5:
        return 1 - beta_quantile(1 - p, a)
    series = [gamma(k + 1 - a) / factorial(k) / (k + a) for k in range(50)]
    whole = gamma(1 - a) * gamma(a) ** 2 / gamma(2 * a)
    x = 0.0
    for _ in range(25):  # I_x is x^a times an almost constant series.
        total = sum(c * x**k for k, c in enumerate(series))
        x = (p * whole / total) ** (1 / a)
    return x


SCHEDULES = {"flux": flux, "simple": simple, "beta": beta}


def euler(velocity: Velocity, img: Tensor, sigmas: Levels, steps: range) -> Images:
    for step in steps:
        t = sigmas[step]
        img = img + (sigmas[step + 1] - t) * velocity(img, t, step).to(img)
        yield img


def heun(velocity: Velocity, img: Tensor, sigmas: Levels, steps: range) -> Images:
    """The mean of the velocities at both ends of a step; a step to 0 is Euler's."""
    for step in steps:
        t = sigmas[step]
        end = sigmas[step + 1]
        slope = velocity(img, t, step).to(img)
        if end > 0:
            ahead = img + (end - t) * slope
            slope = (slope + velocity(ahead, end, step).to(img)) / 2
        img = img + (end - t) * slope
        yield img


def dpmpp_2m(velocity: Velocity, img: Tensor, sigmas: Levels, steps: range) -> Images:
    """DPM-Solver++(2M), arXiv 2211.01095, like diffusers': `clean`, the expected image,
    goes on changing as in the step before. If there is none in this call, or log_snr is
    infinite, the step is Euler's."""
    before = clean_before = None
    for step in steps:
        t = sigmas[step]
        end = sigmas[step + 1]
        slope = velocity(img, t, step).to(img)
        clean = img - t * slope
        if before and 1 > before > t > end > 0:
            ratio = (log_snr(end) - log_snr(t)) / (log_snr(t) - log_snr(before))
            slope = slope - ratio / 2 * (clean - clean_before) / t
        img = img + (end - t) * slope
        before = t
        clean_before = clean
        yield img


def log_snr(t: float) -> float:
    return log(1 / t - 1)


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
