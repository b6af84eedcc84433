"""Samplers: step i leads img (B, L, 64), float32, from sigmas[i] to sigmas[i + 1].

They yield img after each step. A call remembers nothing of the one before.
"""

import math
from collections.abc import Callable, Iterator

from torch import Tensor

# (img (B, L_img, 64), t, step) -> (B, L_img, 64), the velocity at t, in [0, 1]; the step's
# index only selects what is scheduled.
Velocity = Callable[[Tensor, float, int], Tensor]
Images = Iterator[Tensor]


def euler(velocity: Velocity, img: Tensor, sigmas: list[float], steps: range) -> Images:
    for step in steps:
        t = sigmas[step]
        img = img + (sigmas[step + 1] - t) * velocity(img, t, step).to(img)
        yield img


def heun(velocity: Velocity, img: Tensor, sigmas: list[float], steps: range) -> Images:
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


def dpmpp_2m(velocity: Velocity, img: Tensor, sigmas: list[float], steps: range) -> Images:
    """DPM-Solver++(2M), arXiv 2211.01095, like diffusers': `clean`, the expected image,
    goes on changing as in the step before. Where there is none in this call, or where
    log_snr is infinite, a step is Euler's.
    """
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
    return math.log(1 / t - 1)


SAMPLERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
