"""Schedules: `steps + 1` noise levels, from 1 to 0.

shift: more steps at high noise, as for FLUX.1-dev and not schnell.
"""

import math


def flux(steps: int, image_tokens: int, shift: bool) -> list[float]:
    """The published one: larger images are shifted more, mu being linear in the tokens,
    through (256, 0.5) and (4096, 1.15)."""
    mu = 0.5 + (image_tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    return shifted([1 - i / steps for i in range(steps + 1)], mu if shift else 0)


def simple(steps: int, image_tokens: int, shift: bool) -> list[float]:
    """ComfyUI's: entries of its table, which has mu 1.15 for all sizes."""
    table = 10000 if shift else 1000
    rest = [table - int(i * (table / steps)) for i in range(steps)]
    return shifted([i / table for i in (*rest, 0)], 1.15 if shift else 0)


def beta(steps: int, image_tokens: int, shift: bool) -> list[float]:
    """diffusers': from 1 to the last level of `flux` by quantiles of Beta(0.6, 0.6), dense
    at both ends. ComfyUI's are entries of its table."""
    last = flux(steps, image_tokens, shift)[-2]
    quantiles = [beta_quantile(1 - i / max(steps - 1, 1)) for i in range(steps)]
    return [*(last + x * (1 - last) for x in quantiles), 0.0]


def shifted(levels: list[float], mu: float) -> list[float]:
    """Each t becomes e^mu / (e^mu + 1 / t - 1); 0 and 1 stay exactly."""
    if mu == 0:
        return levels
    e = math.exp(mu)
    return [e / (e + 1 / t - 1) if 0 < t < 1 else t for t in levels]


def beta_quantile(p: float, a: float = 0.6) -> float:
    """x at which the regularized incomplete beta function I_x(a, a) is p."""
    if p > 0.5:
        return 1 - beta_quantile(1 - p, a)
    series = [math.gamma(k + 1 - a) / math.factorial(k) / (k + a) for k in range(50)]
    whole = math.gamma(1 - a) * math.gamma(a) ** 2 / math.gamma(2 * a)
    x = 0.0
    for _ in range(25):  # I_x is x^a times an almost constant series.
        x = (p * whole / sum(c * x**k for k, c in enumerate(series))) ** (1 / a)
    return x


SCHEDULES = {"flux": flux, "simple": simple, "beta": beta}
