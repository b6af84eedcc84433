"""Answers of servers, bounded in size and time."""

import logging
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import httpx2
from huggingface_hub import get_session, set_client_factory
from huggingface_hub.utils._http import default_client_factory

MOST_ERROR = 100_000  # bytes of an error's or a redirection's body


class Bounded(httpx2.SyncByteStream):
    def __init__(self, stream: Any):
        self.stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self.stream:
            size += len(part)
            if size > MOST_ERROR:
                raise OSError(f"more than {MOST_ERROR:,} bytes with an error or a redirection")
            yield part

    def close(self) -> None:
        self.stream.close()


def bound(response: httpx2.Response) -> None:
    """Of what is no success, the HTTP library and the hub's read all."""
    if not response.is_success:
        response.stream = Bounded(response.stream)


def client() -> httpx2.Client:
    made = default_client_factory()
    made.event_hooks = {**made.event_hooks, "response": [bound]}
    return made


def printable(record: logging.LogRecord) -> bool:
    """The hub library logs warnings, which may quote a server."""
    text = " ".join(record.getMessage().split())
    record.msg = text if text.isprintable() else repr(text)[:1000]
    record.args = ()
    return True


set_client_factory(client)
for handler in logging.getLogger("huggingface_hub").handlers:
    handler.addFilter(printable)


Answer = tuple[httpx2.Response, bytes]


def answer(method: str, url: str, seconds: float, most: int, **how: Any) -> Answer:
    """A response and its whole body, decompressed, complete within so many seconds.

    It is read in a thread, as no timeout ends the wait for a name or for headers that drip.
    """
    found: SimpleQueue = SimpleQueue()
    end = time.monotonic() + seconds

    def read() -> None:
        body = bytearray()
        try:
            how["timeout"] = seconds
            with get_session().stream(method, url, **how) as response:
                for part in response.iter_bytes():
                    body += part
                    if len(body) > most:
                        raise OSError(f"more than {most:,} bytes")
                    if time.monotonic() > end:
                        return
            found.put((response, bytes(body)))
        except Exception as error:  # to be raised in the thread that waits
            found.put(error)

    Thread(target=read, daemon=True).start()
    try:
        result = found.get(timeout=seconds)
    except Empty:
        raise TimeoutError("timed out") from None
    if isinstance(result, Exception):
        raise result
    return result
