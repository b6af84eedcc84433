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
from extensions.preview import POCKET, POCKET_RGB, Watch, fitted, in_colors
from regional.layout import Layout
from regional.reader import read_layout
from settings import Settings
from tools.flags import Output
from tools.jobs import Job, Tolerant, Worker, advice, doubts_of, heard, is_full, jobs_of
from tools.metadata import image_metadata, keep_timing, run_metadata, save_image, timings_file, write

OFTEN = 0.1  # seconds between previews
ROOMY = 48e9  # bytes of a GPU that holds all components at once
ALONE = Worker(0, 1, is_shared=False)
Data = dict[str, Any]


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
                request = received(pipe)
                if request["kind"] == "draw":
                    artist.answer(request)


def received(pipe: Connection) -> Data:
    return parse_json(pipe.recv_bytes(), Data, "the pipe")


def send(pipe: Connection, **message: Any) -> None:
    pipe.send_bytes(json.dumps(message).encode())


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
        metadata = image_metadata(layout, job.seed, pipeline, job.origin)
        prepared, found["warnings"] = self.prepare(layout, metadata)
        maps = None
        if request["maps"] and prepared.layout.regional_steps():
            defaults = pipeline.defaults
            maps = AttentionMaps(defaults.depth, defaults.depth_single_blocks)
        latents, times = self.denoise(request, job, prepared, maps)
        image = pipeline.decode(latents, prepared.layout)
        save_image(image, metadata, path)
        keep_timing(pipeline.settings, prepared.layout, times[-1] - times[0])
        if maps:
            found["maps"] = packed(maps, prepared.layout)
        return found | {"seconds": round(time.perf_counter() - start, 2)}

    def prepare(self, layout: Layout, metadata: Data) -> tuple[Any, list[str]]:
        """The prepared layout and its warnings; once for all seeds, while its files stay."""
        key = metadata | {"seed": None}
        if self.prepared[0] != key:
            self.prepared = (None, None, [])
            self.pipeline.embeddings.clear()
            heard()
            prepared = self.pipeline.prepare(layout)
            warnings = heard() + [*doubts_of([prepared.layout], self.pipeline)]
            self.prepared = (key, prepared, warnings)
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
            if received(self.pipe) == {"kind": "cancel", "id": job}:
                raise Cancelled


def packed(maps: AttentionMaps, layout: Layout) -> Data:
    """Each region's mean over steps and blocks: bytes of the token grid, 255 the most of all."""
    heat = maps.maps.mean(dim=(0, 1))
    heat = (255 * heat / heat.max()).round().to(torch.uint8).numpy()
    regions = [base64.b64encode(row.tobytes()).decode() for row in heat]
    return {"width": layout.width // 16, "height": layout.height // 16, "regions": regions}


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def preview_map(pipeline: Any) -> np.ndarray:
    """How latents become RGB, (17, 3): the pocket VAE's, or another's, fitted once and kept."""
    key = run_metadata(pipeline)["inputs"]["ae"]
    if key == POCKET:
        return POCKET_RGB
    file = timings_file().with_name(f"preview_{key}.json")
    with contextlib.suppress(InputError):
        return np.array(parse_json(read_bytes(file, CONFIG), list[list[float]], file))
    rgb = fitted(pipeline.parts.get("ae"), pipeline.device, pipeline.dtype)
    with contextlib.suppress(OSError):  # without a cache it is fitted again
        data = json.dumps(rgb.tolist())
        write(file, partial(Path.write_text, data=data, encoding="utf-8"))
    return rgb
