"""Images to draw, one at a time, in a process of their own; whoever listens hears of each step."""

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

from settings import Settings
from tools.editor import worker

FINISHED = 60  # jobs that are remembered
MAPS = 20  # images whose attention maps are
WAITING = 200  # jobs at most
UNHEARD = 500  # events that a listener may lag behind
Data = dict[str, Any]


class Queue:
    """Jobs by their ids. A job's state is waiting, running, done, failed or cancelled.

    make: Pipeline, which is called in the other process alone.
    """

    def __init__(self, make: Callable[[Settings], Any], settings: Settings):
        self.start_worker = (make, settings)
        self.jobs: dict[str, Data] = {}
        self.requests: dict[str, Data] = {}  # of those not finished
        self.maps: dict[str, Data] = {}  # by the images' names
        self.worker: Data = {"state": "starting", "error": None}
        self.changed = threading.Condition()  # its lock may be taken twice
        self.ids = itertools.count(1)
        self.process: Any = None
        self.pipe: Any = None
        self.is_closed = False
        self.listeners: dict[asyncio.Queue, asyncio.AbstractEventLoop] = {}
        self.thread = threading.Thread(target=self.run, daemon=True)

    def close(self) -> None:
        """End the other process at once, and the thread, which asks for its exit code."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
            if self.process is not None:
                self.process.kill()
        if self.thread.is_alive():
            self.thread.join()

    def submit(self, name: str, request: Data) -> Data:
        """A new job for a layout of this name. request: file, layout, seed or None, maps."""
        with self.changed:
            if len(self.requests) >= WAITING:
                raise OverflowError(f"{WAITING} images are waiting already")
            key = str(next(self.ids))
            self.requests[key] = {"kind": "draw", "id": key, **request}
            self.jobs[key] = {"id": key, "state": "waiting", "file": name, "seed": request["seed"]}
            self.changed.notify_all()
        self.tell_places()
        return self.jobs[key]

    def cancel(self, id: str) -> Data:
        """A running image stops after its step. cancelled: false if it is over, or unknown."""
        with self.changed:
            if id not in self.requests:
                return {"cancelled": False}
            if self.jobs[id]["state"] == "running":
                with contextlib.suppress(OSError):
                    worker.send(self.pipe, kind="cancel", id=id)
                return {"cancelled": True}
            self.finish(id, state="cancelled")
        return {"cancelled": True}

    def listen(self) -> asyncio.Queue:
        """Events for one listener: first all that is known. To be called in its loop."""
        events = asyncio.Queue(UNHEARD)
        with self.changed:
            self.listeners[events] = asyncio.get_running_loop()
            jobs = [dict(job) for job in self.jobs.values()]
            events.put_nowait({"kind": "all", "jobs": jobs, "worker": self.worker})
        return events

    def forget(self, events: asyncio.Queue) -> None:
        with self.changed:
            self.listeners.pop(events, None)

    def tell(self, event: Data) -> None:
        """To all listeners; the stream of one who lags far behind ends, and may begin anew."""

        def put(events: asyncio.Queue) -> None:
            if events.full():
                self.forget(events)
                events.get_nowait()
                events.put_nowait(None)
            else:
                events.put_nowait(event)

        with self.changed:
            for events, loop in self.listeners.items():
                with contextlib.suppress(RuntimeError):  # The server is ending.
                    loop.call_soon_threadsafe(put, events)

    def update(self, key: str, **known: Any) -> None:
        with self.changed:
            self.jobs[key] |= known
            self.tell({"kind": "job", "job": dict(self.jobs[key])})

    def finish(self, key: str, **known: Any) -> None:
        with self.changed:
            self.requests.pop(key, None)
            over = [key for key in self.jobs if key not in self.requests]
            for old in over[:-FINISHED]:
                del self.jobs[old]
        self.update(key, preview=None, left=None, place=None, **known)
        self.tell_places()

    def tell_places(self) -> None:
        with self.changed:
            waiting = [key for key in self.requests if self.jobs[key]["state"] == "waiting"]
            for place, key in enumerate(waiting, 1):
                if self.jobs[key].get("place") != place:
                    self.update(key, place=place)

    def set_worker(self, state: str, error: str | None = None) -> None:
        self.worker = {"state": state, "error": error}
        self.tell({"kind": "worker", "worker": self.worker})

    def run(self) -> None:
        """In a thread: keeps a process and gives it one job after the other."""
        while not self.is_closed:
            if self.process is None or not self.process.is_alive():
                self.start()
            with self.changed:
                self.changed.wait_for(lambda: self.requests or self.is_closed)
                key = next(iter(self.requests), None)
            if key is not None and not self.is_closed:
                self.draw(key)

    def start(self) -> None:
        """Start the process and load the model."""
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        arguments = (*self.start_worker, other)
        process = context.Process(target=worker.run, args=arguments, daemon=True)
        process.start()
        other.close()
        with self.changed:
            self.process = process
            if self.is_closed:
                process.kill()
        message = self.receive()
        is_ready = message["kind"] == "ready"
        self.set_worker(message["kind"], None if is_ready else message["error"])

    def receive(self) -> Data:
        """The process's next message; for one that has ended, that it failed."""
        try:
            return worker.received(self.pipe)
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            text = f"the process that draws has ended ({how}); the next image starts it anew"
            return {"kind": "failed", "error": text, "crashed": True}

    def draw(self, key: str) -> None:
        """Give a job to the process, and tell of it until it is over."""
        if self.worker["state"] == "failed":  # to load the model; run tries again
            self.process.join()
            return self.finish(key, state="failed", error=self.worker["error"])
        with self.changed:
            self.jobs[key] |= {"state": "running", "place": None}
            with contextlib.suppress(OSError):  # It is dead: then receive says so.
                self.pipe.send_bytes(json.dumps(self.requests[key]).encode())
        self.update(key, step=0)
        self.tell_places()
        while (message := self.receive())["kind"] == "step":
            self.update(key, **{name: message[name] for name in message.keys() - {"kind"}})
        if message.pop("crashed", False):
            self.set_worker("restarting", message["error"])
        if maps := message.pop("maps", None):
            self.maps[message["name"]] = maps
            self.maps = dict([*self.maps.items()][-MAPS:])
            message["has_maps"] = True
        self.finish(key, state=message.pop("kind"), **message)
