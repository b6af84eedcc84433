"""A hostile hub and a hostile language-model server on 127.0.0.1: every field of every answer is wrong in turn.

    python tests/attack/servers.py                # both, some minutes
    python tests/attack/servers.py hub --first 100

For each field of each answer, of JSON and of headers, and each of some bad values, the program downloads a model or
asks for a plan. It may succeed, or raise InputError with printable lines, within 5 s; no file may appear outside the
cache, no secret in a message, and what is downloaded must have the sha256 that the hub states. The exit code is 1
otherwise.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

SECRET = "hf_of_the_user"
KEY = "sk-very-secret-0123"
os.environ |= {"HF_TOKEN": SECRET, "HF_HUB_DISABLE_XET": "1", "OPENAI_API_KEY": KEY, "HF_HUB_ETAG_TIMEOUT": "2"}
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import inputs  # noqa: E402
import test_hub  # noqa: E402
import test_plan  # noqa: E402
from huggingface_hub import constants  # noqa: E402

from errors import InputError  # noqa: E402
from formats import hub  # noqa: E402
from tools.plan import plan  # noqa: E402

SECONDS = 5
BAD = [
    None, True, -1, 0, 1.5, 2**70, "", "x" * 3000, "../../../../x", "/tmp/hostile", "\x1b[2J\n", "\u202e", [], [[]], {},
    {"a": 1}, [None], "0" * 64, "g" * 64, "..", ".", "a/b", "-", "NaN", inputs.DEEP, SECRET, KEY,
]  # fmt: skip
HEADERS = [
    "",
    "-1",
    "1e9",
    "x" * 3000,
    "../../x",
    '"../../../../x"',
    "\x1b[2J",
    "0",
    "99999999999999",
    "http://[",
    "/tmp/hostile",
]


class Change(NamedTuple):
    """One wrong answer: the n-th request's body, JSON with the part at `path` replaced, or a header, or all of it."""

    request: int
    where: str
    path: Any
    value: Any

    def body(self, content: bytes) -> bytes:
        if self.where == "raw":
            return self.value
        if self.where != "json":
            return content
        return inputs.to_json(inputs.replaced(json.loads(content), self.path, lambda _: self.value))


def changes(answers: list[tuple[int, dict, bytes]]) -> Iterator[Change]:
    """All wrong answers to a conversation that was recorded."""
    for i, (_, headers, body) in enumerate(answers):
        for name in headers:
            yield from (Change(i, "header", name, value) for value in (*HEADERS, None))
        for status in (204, 206, 301, 302, 400, 401, 403, 404, 416, 429, 500, 503):
            yield Change(i, "status", None, status)
        for raw in (
            b"",
            b"null",
            b"[]",
            b"<html>",
            b"[" * 50000,
            b"\xff\xfe",
            b"x" * 1_500_000,
            b'"message":"' + b"x" * 500_000,
        ):
            yield Change(i, "raw", None, raw)
        if body[:1] in (b"{", b"["):
            for path in inputs.places(json.loads(body)):
                yield from (Change(i, "json", path, value) for value in BAD)


class Hub(test_hub.Hub):
    """Answers as the good one does, but for one answer; records what it says."""

    change: Change | None = None

    def __init__(self, files: dict[str, bytes]):
        super().__init__(files)
        self.RequestHandlerClass = HubHandler
        self.answers: list[tuple[int, dict, bytes]] = []

    def handle_error(self, *_: object) -> None:
        pass  # The client hangs up on bad answers.


class HubHandler(test_hub.Handler):
    def answer(self, content: bytes, status: int = 200, headers: dict | None = None, most: int | None = None) -> None:
        change, number = self.server.change, len(self.server.answers)
        all_headers = {"Content-Length": str(len(content)), **(headers or {})}
        self.server.answers.append((status, all_headers, content))
        if change and change.request == number:
            if change.where == "header":
                all_headers = {**all_headers, change.path: change.value}
            if change.where == "status":
                status = change.value
            content = change.body(content)
            if change.where in ("json", "raw"):
                all_headers["Content-Length"] = str(len(content))
        super().answer(content, status, all_headers, most)
        self.close_connection = self.close_connection or change is not None  # or the client waits for more


class Language(ThreadingHTTPServer):
    """A language model whose good answer is changed."""

    daemon_threads = True
    change: Change | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), LanguageHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.answers: list[tuple[int, dict, bytes]] = []

    def handle_error(self, *_: object) -> None:
        pass


class LanguageHandler(test_plan.Handler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, text = test_plan.completion(test_plan.GOOD)
        content, headers = (
            text.encode(),
            {"Content-Length": str(len(text.encode())), "Content-Type": "application/json"},
        )
        change = self.server.change
        if not self.server.answers:
            self.server.answers.append((status, headers, content))
        if change:  # to every request: the program asks three times
            content = change.body(content)
            headers["Content-Length"] = str(len(content))
            if change.where == "header":
                headers[change.path] = change.value
            if change.where == "status":
                status = change.value
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True


def started(server: Any) -> Any:
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def attempt(run: Callable[[], Any], secrets: tuple[str, ...]) -> tuple[str, bool]:
    """What is wrong with how this ends, "" if nothing, and whether it succeeded."""
    start = time.monotonic()
    succeeded = False
    wrong = ""
    try:
        run()
        succeeded = True
    except InputError as error:
        text = str(error)
        if any(not line.isprintable() or len(line) > 4000 for line in text.split("\n")):
            wrong = f"a message that can't be printed: {text[:150]!r}"
        if any(secret in text for secret in secrets):
            wrong = f"a secret in {text[:150]!r}"
    except Exception as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename][-1]
        wrong = f"{type(error).__name__}: {str(error)[:120]!r} at {Path(own.filename).name}:{own.lineno}"
    seconds = time.monotonic() - start
    return wrong or (f"{seconds:.0f} s" if seconds > SECONDS else ""), succeeded


def attack_hub(first: int) -> Counter:
    files = {"flux1-dev.safetensors": b"weights" * 999, "config.json": b"{}"}
    failures: Counter = Counter()
    with tempfile.TemporaryDirectory() as outer:
        cache = Path(outer, "deep/er/cache/hub")
        constants.HF_HUB_CACHE = str(cache)

        def download(server: Hub) -> None:
            shutil.rmtree(cache, ignore_errors=True)
            server.answers.clear()
            folder = hub.fetch(test_hub.REPO, [["flux1-dev.safetensors", "config.json"]], "model", "x")
            found = hashlib.sha256((folder / "flux1-dev.safetensors").read_bytes()).hexdigest()
            if found != hashlib.sha256(files["flux1-dev.safetensors"]).hexdigest() and not tells_another_sum(server):
                raise AssertionError("a file that is not what the hub states")

        def tells_another_sum(server: Hub) -> bool:
            return server.change.where == "json" and server.change.path[-1:] in (("sha256",), ("oid",))

        server = started(Hub(files))
        constants.ENDPOINT = server.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        download(server)
        conversation = list(server.answers)
        wrong_answers = list(changes(conversation))
        print(f"hub: {len(conversation)} answers, {len(wrong_answers)} wrong ones", flush=True)
        succeeded = 0
        for number, change in enumerate(wrong_answers[first:], first):
            server.change = change
            start = time.monotonic()
            wrong, is_good = attempt(lambda: download(server), (SECRET,))
            if args.verbose:
                print(
                    number, change.request, change.where, change.path, f"{time.monotonic() - start:.1f} s", flush=True
                )
            succeeded += is_good
            outside = [p for p in Path(outer).rglob("*") if p.is_file() and not p.is_relative_to(cache)]
            if outside or Path("/tmp/hostile").exists():
                wrong = f"a file outside of the cache: {outside}"
                [p.unlink() for p in outside]
            if wrong:
                what = f"hub, {change.where} {change.path}: {wrong}"
                failures[wrong] += 1
                if failures[wrong] == 1:
                    print(f"{number}: {what} by {str(change.value)[:60]!r}", flush=True)
        print(f"hub: {succeeded} downloads succeeded, the others were refused")
        server.shutdown()
    return failures


def attack_planner(first: int) -> Counter:
    failures: Counter = Counter()
    server = started(Language())

    def ask() -> None:
        plan("a cat and a dog", 256, 256, server.url, timeout=2)

    ask()
    wrong_answers = list(changes(list(server.answers)))
    print(f"plan: {len(wrong_answers)} wrong answers", flush=True)
    succeeded = 0
    for number, change in enumerate(wrong_answers[first:], first):
        server.change = change
        wrong, is_good = attempt(ask, (KEY,))
        succeeded += is_good
        if wrong:
            failures[wrong] += 1
            if failures[wrong] == 1:
                print(
                    f"{number}: plan, {change.where} {change.path}: {wrong} by {str(change.value)[:60]!r}", flush=True
                )
    print(f"plan: {succeeded} plans were made, the others were refused")
    server.shutdown()
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=["hub", "plan"])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    total: Counter = Counter()
    for name, run in {"hub": attack_hub, "plan": attack_planner}.items():
        if name in args.which:
            total += run(args.first)
    print(f"{total.total()} failures of {len(total)} kinds")
    sys.exit(1 if total else 0)
