"""The process that draws: the pipeline, loaded once, and a pipe to the server. Messages are JSON."""

import base64
import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from errors import CONFIG, InputError, parse_json, read_bytes
from extensions.attention_maps import AttentionMaps
from regional.extension import Branches, Forward, Pass
from regional.layout import Layout
from regional.reader import read_layout
from settings import Settings
from tools.flags import Output
from tools.jobs import Job, Tolerant, Worker, advice, doubts_of, heard, is_full, jobs_of
from tools.metadata import image_metadata, keep_timing, run_metadata, save_image, timings_file, write

OFTEN = 0.1  # seconds between previews
ROOMY = 48e9  # bytes of a GPU that holds all components at once
SAMPLES = 6  # images to fit a preview to, of 256 pixels a side
ALONE = Worker(0, 1, is_shared=False)
Data = dict[str, Any]
# How the pocket VAE's latents become red, green and blue: a constant, then its 16 channels;
# by benchmarks/preview_map.py. The key is the fingerprint of its weights.
POCKET = "781218b719d2c98f"
POCKET_RGB = """
155 11 -10 -5 -61 -4 -5 21 17 1 -9 11 22 -21 -8 19 13
143 11 -27 -4 -45 -9 0 29 12 -7 -3 15 21 -10 7 9 12
132 0 -36 -1 -14 -6 6 5 6 3 6 3 7 -4 25 11 11
"""


class Cancelled(Exception):
    """The page asked to stop this image."""


def run(make: Callable[[Settings], Any], settings: Settings, pipe: Connection) -> None:
    """Draw what the pipe asks for until it closes. make: Pipeline."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all processes at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.redirect_stderr(Tolerant(sys.stderr)):
        try:
            artist = Artist(make(settings), pipe)
        except (InputError, OSError, RuntimeError) as error:
            send(pipe, kind="failed", error=str(error))
            return
        send(pipe, kind="ready", model=artist.pipeline.checkpoint.name)
        with contextlib.suppress(EOFError):
            while True:
                request = json.loads(pipe.recv_bytes())
                if request["kind"] == "draw":
                    artist.answer(request)


def send(pipe: Connection, **message: Any) -> None:
    pipe.send_bytes(json.dumps(message).encode())


class Watch:
    """An extension that keeps what the last pass began with and its velocity."""

    def __init__(self):
        self.latest: tuple | None = None

    def extend(self, forward: Forward, branches: Branches) -> Forward:
        def watched(given: Pass, step: int) -> Tensor:
            velocity = forward(given, step)
            self.latest = (given.img, velocity, given.timesteps, branches.order)
            return velocity

        return watched

    def estimate(self) -> Tensor:
        """The image's packed latents (L_img, 64) float32, if the velocity stayed as it is."""
        img, velocity, t, order = self.latest
        count = len(order)
        noisy = img[0, :count].float()
        tokens = noisy - t[0].float() * velocity[0, :count].float()
        return tokens.cpu()[order.argsort()]


class Artist:
    """A pipeline, the latest prepared layout, and the preview's map to RGB."""

    def __init__(self, pipeline: Any, pipe: Connection):
        self.pipeline = pipeline
        self.pipe = pipe
        self.prepared: tuple = (None, None, [])
        self.rgb: np.ndarray | None = None

    def answer(self, request: Data) -> None:
        """Draw an image, and send what became of it."""
        report = partial(send, self.pipe, id=request["id"])
        try:
            report(kind="done", **self.draw(request))
        except Cancelled:
            report(kind="cancelled")
        except (InputError, OSError) as error:
            report(kind="failed", error=str(error))
        except (MemoryError, RuntimeError) as error:
            if not is_full(error):
                raise
            text = f"out of memory: {advice(error, self.pipeline.settings)}"
            self.pipeline.drop("t5", "clip", "flux", "ae")
            report(kind="failed", error=text)

    def draw(self, request: Data) -> Data:
        pipeline = self.pipeline
        file = Path(request["file"])
        os.chdir(file.parent)  # a layout's paths start there, as do the images' names
        layout = read_layout(None, request["layout"], pipeline.defaults.size)
        seeds = () if request["seed"] is None else (request["seed"],)
        file = Path(file.name)
        job = jobs_of(file, {(): layout}, Output(seed=seeds), ALONE, True, pipeline)[0]
        path = job.files["image"]
        found = {"name": path.name, "seed": job.seed, "kept": path.exists(), "seconds": 0.0}
        if found["kept"]:  # drawn before with the same settings
            return found
        start = time.perf_counter()
        prepared, found["warnings"] = self.prepare(layout)
        maps = None
        if request["maps"] and prepared.layout.regional_steps():
            defaults = pipeline.defaults
            maps = AttentionMaps(defaults.depth, defaults.depth_single_blocks)
        latents, times = self.denoise(request, job, prepared, maps)
        image = pipeline.decode(latents, prepared.layout)
        metadata = image_metadata(layout, job.seed, pipeline, job.origin)
        save_image(image, metadata, path)
        keep_timing(pipeline.settings, prepared.layout, times[-1] - times[0])
        if maps:
            found["maps"] = packed(maps, prepared.layout)
        return found | {"seconds": round(time.perf_counter() - start, 2)}

    def prepare(self, layout: Layout) -> tuple[Any, list[str]]:
        """The prepared layout and its warnings; of the latest, again."""
        if self.prepared[0] != layout:
            self.prepared = (None, None, [])
            self.pipeline.embeddings.clear()
            heard()
            prepared = self.pipeline.prepare(layout)
            warnings = heard() + [*doubts_of([prepared.layout], self.pipeline)]
            self.prepared = (layout, prepared, warnings)
        if not self.is_roomy():
            self.pipeline.drop("t5", "clip", "ae")
        return self.prepared[1:]

    def is_roomy(self) -> bool:
        device = self.pipeline.device
        if device.type != "cuda":
            return True
        return torch.cuda.get_device_properties(device).total_memory > ROOMY

    def denoise(
        self, request: Data, job: Job, prepared: Any, maps: AttentionMaps | None
    ) -> tuple[Tensor, list[float]]:  # fmt: skip
        """The latents, and when each step ended."""
        steps = prepared.layout.run_steps()
        report = partial(send, self.pipe, id=request["id"], kind="step", steps=steps)
        report(step=0, seed=job.seed)
        self.check(request["id"])
        if self.rgb is None:
            self.rgb = preview_map(self.pipeline)
        watch = Watch()
        times = []
        sent = 0.0

        def on_step() -> None:
            nonlocal sent
            self.check(request["id"])
            now = time.perf_counter()
            times.append(now)
            step = len(times)
            left = (now - times[0]) / (step - 1) * (steps - step) if step > 1 else None
            message = {"step": step, "seed": job.seed, "left": left}
            if now - sent > OFTEN:
                sent = now
                grid = (prepared.layout.height // 16, prepared.layout.width // 16)
                message["preview"] = data_url(in_colors(watch.estimate(), *grid, self.rgb))
            report(**message)

        extensions = [watch.extend, *([maps.extend] if maps else [])]
        return self.pipeline.denoise(prepared, job.seed, extensions, on_step), times

    def check(self, job: str) -> None:
        """Cancelled if the page asked for it."""
        while self.pipe.poll():
            if json.loads(self.pipe.recv_bytes()) == {"kind": "cancel", "id": job}:
                raise Cancelled


def packed(maps: AttentionMaps, layout: Layout) -> Data:
    """Each region's mean over steps and blocks: bytes of the token grid, 255 the most of all."""
    heat = maps.maps.mean(dim=(0, 1))
    heat = (255 * heat / heat.max()).round().to(torch.uint8).numpy()
    regions = [base64.b64encode(row.tobytes()).decode() for row in heat]
    return {"width": layout.width // 16, "height": layout.height // 16, "regions": regions}


def by_pixel(tokens: Tensor, h: int, w: int) -> np.ndarray:
    """Packed latents (h w, 64) as 1 and 16 channels: (2 h, 2 w, 17)."""
    latents = tokens.reshape(h, w, 16, 2, 2).permute(0, 3, 1, 4, 2).reshape(2 * h, 2 * w, 16)
    return np.concatenate([np.ones((2 * h, 2 * w, 1)), latents.float().numpy()], axis=2)


def in_colors(tokens: Tensor, h: int, w: int, rgb: np.ndarray) -> Image.Image:
    """A small image, (2 h, 2 w), of packed latents (h w, 64). rgb: (17, 3)."""
    colors = by_pixel(tokens, h, w) @ rgb
    return Image.fromarray(colors.clip(0, 255).round().astype(np.uint8))


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def preview_map(pipeline: Any) -> np.ndarray:
    """How latents become RGB, (17, 3): the pocket VAE's, or another's, fitted once and kept."""
    key = run_metadata(pipeline)["inputs"]["ae"]
    if key == POCKET:
        return np.array(POCKET_RGB.split(), dtype=float).reshape(3, 17).T
    file = timings_file().with_name(f"preview_{key}.json")
    with contextlib.suppress(InputError):
        return np.array(parse_json(read_bytes(file, CONFIG), list[list[float]], file))
    rgb = fitted(pipeline)
    with contextlib.suppress(OSError):  # without a cache it is fitted again
        data = json.dumps(rgb.tolist())
        write(file, partial(Path.write_text, data=data, encoding="utf-8"))
    return rgb


@torch.inference_mode()
def fitted(pipeline: Any) -> np.ndarray:
    """By least squares over images that the VAE encodes and decodes: (17, 3)."""
    random = np.random.default_rng(0)
    rows = []
    colors = []
    for _ in range(SAMPLES):
        tokens = pipeline.latents_of(pattern(random))[0]
        latents = by_pixel(tokens, 16, 16)
        whole = torch.from_numpy(latents[..., 1:]).float().permute(2, 0, 1)[None]
        image = pipeline.decode(whole).resize((32, 32), Image.Resampling.BOX)
        rows.append(latents.reshape(-1, 17))
        colors.append(np.asarray(image, dtype=float).reshape(-1, 3))
    return np.linalg.lstsq(np.concatenate(rows), np.concatenate(colors))[0]


def pattern(random: np.random.Generator) -> Tensor:
    """Colored rectangles on a smooth background, (1, 3, 256, 256) in [-1, 1]."""
    coarse = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    image = np.array(coarse.resize((256, 256), Image.Resampling.BICUBIC))
    for _ in range(24):
        x, y = random.integers(0, 224, 2)
        width, height = random.integers(16, 96, 2)
        image[y : y + height, x : x + width] = random.integers(0, 256, 3)
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
