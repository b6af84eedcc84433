"""A hostile hub and a hostile language-model server on 127.0.0.1.

    python tests/attack/servers.py                # both, some minutes
    python tests/attack/servers.py hub --first 100

Every field of every answer, of JSON and of headers, is replaced by each of some bad values in turn,
while the program downloads a model or asks for a plan; then come answers without end: bodies,
headers, compressed bodies, and those that drip. The program may succeed, or raise InputError,
within 5 s and 300 MB. What it prints must be printable and without secrets, no file may appear
outside the cache, and what is downloaded must be what the hub states. The exit code is 1 otherwise.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import logging
import os
import resource
import shutil
import signal
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
from unittest import mock

SECRET = "hf_of_the_user"
KEY = 'sk-very"secret\\0123'
PASSWORD = "pass-word"
ESCAPED = json.dumps(KEY)[1:-1]
os.environ |= {"HF_TOKEN": SECRET, "HF_HUB_DISABLE_XET": "1", "OPENAI_API_KEY": KEY}
os.environ |= {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
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
HOSTILE = str(Path(tempfile.gettempdir(), "hostile"))  # where no answer may make a file
MEGABYTES = 300
MODEL = "flux1-dev.safetensors"
FILES = {MODEL: b"weights" * 999, "config.json": b"{}"}
BAD = [
    None, True, -1, 0, 1.5, 2**70, "", "x" * 3000, "../../../../x", HOSTILE, "\x1b[2J\n",
    "\u202e", [], [[]], {}, {"a": 1}, [None], "0" * 64, "0" * 40, "g" * 64, "..", ".", "a/b", "-",
    "NaN", inputs.DEEP, SECRET, KEY, PASSWORD, "a\\..\\b", "C:x", "a\0b", ["x"] * 9999,
]  # fmt: skip
HEADERS = [
    "", "-1", "1e9", "x" * 3000, "../../x", '"../../../../x"', "\x1b[2J", "0", "99999999999999",
    "http://[", HOSTILE, f"{SECRET} {KEY}", None,
]  # fmt: skip
MORE_HEADERS = {  # that good answers have not
    "X-HF-Warning": "topic; \x1b[2J",
    "Content-Encoding": "gzip",
    "Content-Range": "bytes 5-4/3",
    "Location": "file:///etc/passwd",
    "Retry-After": "1e99",
    "X-Error-Code": "RevisionNotFound",
    "X-Error-Message": "\x1b[2J" + SECRET,
}
STATUSES = (204, 206, 301, 302, 307, 400, 401, 403, 404, 416, 422, 429, 500, 503)
ECHO = json.dumps({"error": f"\x1b[2J {SECRET} {KEY} {ESCAPED} {PASSWORD}"}).encode()
RAW = [
    b"", b"null", b"[]", b"<html>", b"[" * 50000, b"\xff\xfe", b"x" * 1_500_000,
    b'"message":"' + b"x" * 500_000, ECHO,
]  # fmt: skip


class Change(NamedTuple):
    """One wrong answer: what is changed of the n-th request's.

    where: json, with the part at `path` replaced; raw, the whole body; header; status, with a body
    that repeats secrets.
    """

    request: int
    where: str
    path: Any
    value: Any

    def body(self, content: bytes) -> bytes:
        if self.where == "raw":
            return self.value
        if self.where == "status":
            return ECHO
        if self.where != "json":
            return content
        changed = inputs.replaced(json.loads(content), self.path, lambda _: self.value)
        return inputs.to_json(changed)


Answers = list[tuple[int, dict, bytes]]  # status, headers, body


def changes(answers: Answers) -> Iterator[Change]:
    """All wrong answers to a conversation that was recorded."""
    for i, (_, headers, body) in enumerate(answers):
        for name in headers:
            yield from (Change(i, "header", name, value) for value in HEADERS)
        yield from (Change(i, "header", *header) for header in MORE_HEADERS.items())
        yield from (Change(i, "status", None, status) for status in STATUSES)
        yield from (Change(i, "raw", None, raw) for raw in RAW)
        if body[:1] in (b"{", b"["):
            for path in inputs.places(json.loads(body)):
                yield from (Change(i, "json", path, value) for value in BAD)


def endless(answers: Answers) -> Iterator[Change]:
    """Answers that end late or never: a body, its head, or what drips of either."""
    for i, (status, _, _) in enumerate(answers):
        for kind in ("body", "gzip", "drip", "head", "dripping head"):
            for code in (status, 400, 302):
                yield Change(i, "endless", kind, code)


def send_endless(handler: Any, kind: str, status: int) -> None:
    """Until the client hangs up; but at most 3 GB, in 20 s."""
    start = time.monotonic()
    head = f"HTTP/1.1 {status} OK\r\nX-Error-Code: GatedRepo\r\n".encode()
    head += b"Location: /elsewhere/\r\n" * (status == 302)
    head += b"Content-Encoding: gzip\r\n" * (kind == "gzip")
    send = handler.wfile.write
    if "head" not in kind:
        head += b"\r\n"
    with contextlib.suppress(OSError):
        send(head)
        if kind == "gzip":
            send(BOMB)
        while kind != "gzip" and time.monotonic() - start < 20:
            if "drip" in kind:
                time.sleep(0.1)
            send(b"X" if "drip" in kind else b"[" * 1_000_000)
    handler.close_connection = True


def bomb() -> bytes:
    """3 MB that unpack to 3 GB."""
    data = io.BytesIO()
    with gzip.GzipFile(fileobj=data, mode="wb", compresslevel=9) as file:
        for _ in range(300):
            file.write(b" " * 10_000_000)
    return data.getvalue()


class Hub(test_hub.Hub):
    """Answers as the good one does, but for one answer; records what it says."""

    change: Change | None = None

    def __init__(self) -> None:
        super().__init__(FILES)
        self.RequestHandlerClass = HubHandler
        self.answers: Answers = []

    def handle_error(self, *_: object) -> None:
        pass  # The client hangs up on bad answers.


class HubHandler(test_hub.Handler):
    def answer(self, content: bytes, status: int = 200, headers: Any = None, most: Any = None):
        change = self.server.change
        number = len(self.server.answers)
        sent = {"Content-Length": str(len(content)), **(headers or {})}
        self.server.answers.append((status, sent, content))
        if change is None or change.request != number:
            return super().answer(content, status, sent, most)
        self.close_connection = True  # or the client waits for more
        if change.where == "endless":
            return send_endless(self, change.path, change.value)
        content = change.body(content)
        sent = sent | {"Content-Length": str(len(content))}
        if change.where == "header":
            sent[change.path] = change.value
        if change.where == "status":
            status = change.value
        sent = {name: value for name, value in sent.items() if value is not None}
        super().answer(content, status, sent, most)
        self.close_connection = True


class Language(ThreadingHTTPServer):
    """A language model whose good answer is changed."""

    daemon_threads = True
    change: Change | None = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), LanguageHandler)
        self.url = f"http://user:{PASSWORD}@127.0.0.1:{self.server_port}/v1"
        self.answers: Answers = []

    def handle_error(self, *_: object) -> None:
        pass


class LanguageHandler(test_plan.Handler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, text = test_plan.completion(test_plan.GOOD)
        content = text.encode()
        headers = {"Content-Length": str(len(content)), "Content-Type": "application/json"}
        change = self.server.change
        if not self.server.answers:
            self.server.answers.append((status, headers, content))
        reason = None
        if change:  # to every request: the program asks three times
            if change.where == "endless":
                return send_endless(self, change.path, change.value)
            content = change.body(content)
            headers["Content-Length"] = str(len(content))
            if change.where == "header":
                headers[change.path] = change.value
            if change.where == "status":
                status = change.value
                reason = f"\x1b[2J {KEY}"
        self.send_response(status, reason)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    do_GET = do_POST  # after a redirection


def started(server: Any) -> Any:
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def attempt(run: Callable[[], Any], secrets: list[str]) -> tuple[str, bool]:
    """What is wrong with how this ends, "" if nothing, and whether it succeeded."""
    start = time.monotonic()
    peak = peak_megabytes()
    succeeded = False
    wrong = ""
    printed = io.StringIO()
    (library,) = logging.getLogger("huggingface_hub").handlers
    library.setStream(printed)
    try:
        with contextlib.redirect_stderr(printed):
            run()
        succeeded = True
    except InputError as error:
        print(error, file=printed)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if str(ROOT) in frame.filename][-1]
        place = f"{Path(own.filename).name}:{own.lineno}"
        wrong = f"{type(error).__name__}: {str(error)[:120]!r} at {place}"
    seconds = time.monotonic() - start
    text = printed.getvalue()
    if any(not line.isprintable() or len(line) > 4000 for line in text.split("\n")):
        wrong = wrong or f"what can't be printed: {text[:150]!r}"
    if any(secret in text for secret in secrets):
        wrong = wrong or f"a secret in {text[:150]!r}"
    if peak_megabytes() - peak > MEGABYTES:
        wrong = wrong or f"{peak_megabytes() - peak:.0f} MB"
    if seconds > SECONDS:
        wrong = wrong or f"{seconds:.0f} s"
    return wrong, succeeded


def peak_megabytes() -> float:
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


class Attack:
    """Wrong answers one by one, with what fails, each kind printed once."""

    def __init__(self, name: str, secrets: list[str], server: Any, run: Any, check: Any):
        self.name = name
        self.secrets = secrets
        self.server = server
        self.run = run
        self.check = check
        self.failures: Counter = Counter()

    def on(self, wrong_answers: list[Change], what: str) -> None:
        start = time.monotonic()
        succeeded = 0
        slowest = 0.0
        for number, change in enumerate(wrong_answers[args.first :], args.first):
            self.server.change = change
            before = time.monotonic()
            wrong, is_good = attempt(self.run, self.secrets)
            slowest = max(slowest, time.monotonic() - before)
            succeeded += is_good
            wrong = self.check() or wrong
            if args.verbose:
                print(number, *change[:3], f"{time.monotonic() - before:.1f} s", flush=True)
            if wrong:
                self.failures[wrong] += 1
                if self.failures[wrong] == 1:
                    by = f"{change.where} {change.path}: {wrong} by {str(change.value)[:60]!r}"
                    print(f"{number}: {self.name}, {by}", flush=True)
        seconds = time.monotonic() - start
        times = f"{seconds:.0f} s, the slowest {slowest:.1f} s"
        tried = max(len(wrong_answers) - args.first, 0)
        print(f"{self.name}: {tried} {what} in {times}; {succeeded} were taken", flush=True)


def attack_hub() -> Counter:
    server = started(Hub())
    outer = Path(tempfile.mkdtemp())
    cache = outer / "deep/er/cache/hub"
    constants.HF_HUB_CACHE = str(cache)
    constants.ENDPOINT = server.url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    hub.SECONDS = 2

    def download() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        server.answers.clear()
        folder = hub.fetch(test_hub.REPO, [[MODEL, "config.json"]], "--model x")
        found = hashlib.sha256((folder / MODEL).read_bytes()).hexdigest()
        path = server.change.path if server.change else ()
        states_another = path and path[-1] in ("sha256", "rfilename")
        if found != hashlib.sha256(FILES[MODEL]).hexdigest() and not states_another:
            raise AssertionError("a file that is not what the hub states")

    def check() -> str:
        outside = [p for p in outer.rglob("*") if p.is_file() and not p.is_relative_to(cache)]
        outside += [p for p in (Path(HOSTILE),) if p.exists()]
        for file in outside:
            file.unlink()
        return f"a file outside of the cache: {outside}" if outside else ""

    attack = Attack("hub", [SECRET], server, download, check)
    with mock.patch("time.sleep", lambda _, sleep=time.sleep: sleep(0.01)):  # between its trials
        download()
        answers = list(server.answers)
        print(f"hub: {len(answers)} answers", flush=True)
        attack.on(list(changes(answers)), "wrong answers")
    ends = list(endless(answers))
    attack.on([x for x in ends if x.request == 0 or "drip" not in x.path], "endless ones")
    for change in ends:
        if change.request > 0 and "drip" in change.path:
            server.change = change
            if wrong := interrupted(download):
                attack.failures[wrong] += 1
                print(f"hub, {change}: {wrong}", flush=True)
    server.shutdown()
    shutil.rmtree(outer)
    return attack.failures


def interrupted(run: Callable[[], Any]) -> str:
    """A file that drips is a slow download; Ctrl-C ends it at once, unless it is refused before."""
    start = time.monotonic()
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            run()
        return "it succeeded"
    except (KeyboardInterrupt, InputError):
        seconds = time.monotonic() - start
        return f"{seconds:.1f} s after Ctrl-C" if seconds > 2 else ""
    finally:
        timer.cancel()


def attack_planner() -> Counter:
    server = started(Language())
    secrets = [KEY, ESCAPED, PASSWORD]

    def ask() -> None:
        made = plan("a cat and a dog", 256, 256, server.url, timeout=2)
        text = json.dumps(made)
        if any(json.dumps(secret)[1:-1] in text for secret in secrets):
            raise AssertionError(f"a secret in the plan: {text[:200]}")

    ask()
    attack = Attack("plan", secrets, server, ask, str)
    attack.on(list(changes(list(server.answers))), "wrong answers")
    attack.on(list(endless(list(server.answers))), "endless ones")
    server.shutdown()
    return attack.failures


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("which", nargs="*", default=["hub", "plan"])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    BOMB = bomb()
    total: Counter = Counter()
    for name, run in {"hub": attack_hub, "plan": attack_planner}.items():
        if name in args.which:
            total += run()
    print(f"{total.total()} failures of {len(total)} kinds")
    sys.exit(1 if total else 0)
