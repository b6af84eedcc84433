"""The noise levels of the Euler steps."""

import math


def sigmas(steps: int, image_tokens: int, shift: bool) -> list[float]:
    """`steps + 1` noise levels from 1 to 0.

    With `shift` (FLUX.1-dev; not schnell) large images spend more steps at high noise: t becomes
    e^mu / (e^mu + 1 / t - 1), mu linear in the image tokens, through (256, 0.5) and (4096, 1.15).
    """
    linear = [1 - i / steps for i in range(steps + 1)]
    if not shift:
        return linear
    mu = 0.5 + (image_tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    return [math.exp(mu) / (math.exp(mu) + 1 / t - 1) if t > 0 else 0.0 for t in linear]
