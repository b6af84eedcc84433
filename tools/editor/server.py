"""The server of the layout editor: who may ask, and what for; docs/editor.md describes it."""

import contextlib
import hmac
import io
import ipaddress
import json
import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import uvicorn
from msgspec import Meta, Struct
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from errors import MISSING, InputError, info, parse_json
from regional.layout import Seed
from settings import MODEL_KEYS, Settings
from tools.convert import FORMS, IMPORTED
from tools.editor.folder import MASK, Folder
from tools.editor.queue import Queue
from tools.editor.see import Model, check_names
from tools.metadata import SUFFIXES, check_suffix
from tools.preview import COLORS, preview
from tools.schema import json_schema

PORT = 8571  # or a free one
PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
BODY = 1_000_000  # bytes of a request
LARGE = 4 * MASK // 3 + 1000  # of one with a file in base64
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
BEAT = 15  # seconds between signs of life in the stream of events
Data = dict[str, Any]


class Checked(Struct, forbid_unknown_fields=True):
    """A layout's values as they are in the page, and the name of its file."""

    file: str
    layout: Data


class Saved(Checked):
    version: str | None = None


class Drawn(Checked):
    """seeds: an image for each; none: the layout's."""

    seeds: Annotated[list[Seed], Meta(max_length=64)] = []
    maps: bool = False


class Exported(Checked):
    form: str


class Mask(Struct, forbid_unknown_fields=True):
    file: str
    data: str


class Brought(Struct, forbid_unknown_fields=True):
    file: str
    name: str
    form: str
    data: str
    size: list[Annotated[int, Meta(ge=1, le=16384)]] | None = None


class Cancelled(Struct, forbid_unknown_fields=True):
    id: str


class Guard:
    """Answers 4xx to whoever lacks the token, or comes by another name or from another site."""

    def __init__(self, app: ASGIApp, token: str, host: str, port: int):
        self.app = app
        self.token = token
        self.port = port
        self.any_address = ipaddress.ip_address(host).is_unspecified
        self.names = {"localhost", socket.gethostname().lower(), host.lower()}
        if ipaddress.ip_address(host).is_loopback:
            self.names = {"localhost", "127.0.0.1", "::1", host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = self.refusal(scope)
        if status:
            text = {403: "forbidden", 404: "not found", 413: "too large"}[status]
            response = Response(json.dumps({"error": text}), status, HEADERS, "application/json")
            return await response(scope, receive, send)
        _, _, path = scope["path"].removeprefix("/").partition("/")
        await self.app(scope | {"path": f"/{path}", "raw_path": b""}, receive, send)

    def refusal(self, scope: Scope) -> int | None:
        given = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in given if name == b"host"]
        if len(hosts) != 1 or not self.is_ours(hosts[0]):
            return 403
        origins = {value for name, value in given if name == b"origin"}
        if origins - {f"http://{hosts[0]}"}:
            return 403
        site = {value for name, value in given if name == b"sec-fetch-site"}
        token, _, rest = scope["path"].removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode()):
            return 404
        if rest and site - {"same-origin"}:
            return 403
        lengths = [value for name, value in given if name == b"content-length"]
        is_large = any(not value.isdecimal() or int(value[:20]) > LARGE for value in lengths)
        return 413 if is_large else None

    def is_ours(self, host: str) -> bool:
        """Is it a name of this server? Of one for all addresses, any address is, but no name
        that a stranger could point here."""
        name, _, port = host.rpartition(":")
        if port != str(self.port):
            return False
        name = name.strip("[]").lower()
        if self.any_address:
            with contextlib.suppress(ValueError):
                ipaddress.ip_address(name)
                return True
        return name in self.names


class Editor:
    """What the page can ask for."""

    def __init__(self, folder: Folder, file: str | None, model: Model, queue: Queue):
        self.folder = folder
        self.file = file  # that the command line names
        self.model = model
        self.queue = queue

    def routes(self) -> list[Route]:
        def post(path: str, kind: type, work: Callable, most: int = BODY) -> Route:
            return Route(path, partial(answer, kind, work, most), methods=["POST"])

        return [
            Route("/", page),
            Route("/page/{name}", page),
            Route("/api/start", partial(answer_get, self.start)),
            Route("/api/open", partial(answer_get, self.open)),
            Route("/api/results", partial(answer_get, self.results)),
            Route("/api/image", partial(answer_get, self.image)),
            Route("/api/maps", partial(answer_get, self.maps)),
            Route("/api/events", self.events),
            post("/api/check", Checked, self.check),
            post("/api/preview", Checked, self.preview),
            post("/api/save", Saved, self.save),
            post("/api/mask", Mask, self.mask, LARGE),
            post("/api/import", Brought, self.bring, LARGE),
            post("/api/export", Exported, self.export),
            post("/api/generate", Drawn, self.generate),
            post("/api/cancel", Cancelled, self.cancel),
        ]

    def start(self) -> Data:
        return {
            "folder": str(self.folder.root),
            "file": self.file,
            "files": self.folder.layouts(),
            "model": self.model.name,
            "defaults": self.model.defaults._asdict(),
            "schema": json_schema(),
            "colors": [f"#{bytes(color).hex()}" for color in COLORS.tolist()],
            "imports": [*FORMS, *(form for form in IMPORTED if form not in FORMS)],
            "exports": [*FORMS],
        }

    def open(self, name: str) -> Data:
        return self.folder.open(name)

    def results(self, file: str) -> Data:
        return {"results": self.folder.results(self.folder.path(file).parent)}

    def image(self, name: str) -> Response:
        path = self.folder.path(name, (*SUFFIXES, ".gif", ".bmp", ".tiff", ".tif"))
        if not path.is_file():
            raise HTTPException(404, "there is no such image")
        return FileResponse(path, headers=HEADERS)

    def maps(self, name: str) -> Data:
        if name not in self.queue.maps:
            raise HTTPException(404, "no attention maps were kept of this image")
        return self.queue.maps[name]

    def check(self, body: Checked) -> Data:
        return self.model.seen(self.folder, body.file, body.layout)

    def preview(self, body: Checked) -> Response:
        layout = self.model.read(self.folder, body.file, body.layout)
        file = io.BytesIO()
        preview(layout.filled(self.model.defaults)).save(file, format="PNG")
        return Response(file.getvalue(), headers=HEADERS, media_type="image/png")

    def save(self, body: Saved) -> Data:
        check_names(body.layout)
        return self.folder.save(body.file, body.layout, body.version)

    def mask(self, body: Mask) -> Data:
        return self.folder.save_mask(body.file, body.data)

    def bring(self, body: Brought) -> Data:
        return self.folder.bring(body.file, body.name, body.form, body.data, body.size)

    def export(self, body: Exported) -> Data:
        layout = self.model.read(self.folder, body.file, body.layout)
        return self.folder.export(body.file, layout.filled(self.model.defaults), body.form)

    def generate(self, body: Drawn) -> Data:
        self.model.read(self.folder, body.file, body.layout)
        path = self.folder.path(body.file)
        file = {"file": str(path), "name": self.folder.name(path)}
        request = {**file, "layout": body.layout, "maps": body.maps}
        try:
            jobs = [self.queue.submit({**request, "seed": seed}) for seed in body.seeds or [None]]
        except OverflowError as error:
            raise HTTPException(429, str(error)) from None
        return {"jobs": jobs}

    def cancel(self, body: Cancelled) -> Data:
        return {"cancelled": self.queue.cancel(body.id)}

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self.stream(), headers=HEADERS, media_type="text/event-stream")

    async def stream(self) -> AsyncIterator[str]:
        import asyncio

        events = self.queue.listen()
        try:
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), BEAT)
                except TimeoutError:
                    yield ": alive\n\n"
                    continue
                if event is None:
                    return
                yield f"data: {json.dumps(event)}\n\n"
        finally:
            self.queue.forget(events)


async def page(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    path = PAGE / name
    if path.suffix not in KINDS or path not in PAGE.iterdir():
        raise HTTPException(404, "not found")
    return FileResponse(path, headers=HEADERS, media_type=KINDS[path.suffix])


async def answered(work: Callable[..., Any], *arguments: Any, **given: Any) -> Response:
    """What `work` returns, in a thread; 400 for what its caller got wrong."""
    try:
        found = await run_in_threadpool(work, *arguments, **given)
    except (InputError, OSError) as error:
        raise HTTPException(400, str(error)) from None
    if isinstance(found, Response):
        return found
    return Response(msgspec.json.encode(found), headers=HEADERS, media_type="application/json")


async def answer_get(work: Callable[..., Any], request: Request) -> Response:
    names = work.__code__.co_varnames[1 : work.__code__.co_argcount]
    if {*request.query_params} != {*names}:
        raise HTTPException(400, f"expected the query {', '.join(names) or 'to be empty'}")
    return await answered(work, **dict(request.query_params))


async def answer(kind: type, work: Callable[..., Any], most: int, request: Request) -> Response:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "expected JSON")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise HTTPException(413, f"more than {most:,} bytes")
    try:
        return await answered(work, parse_json(bytes(body), kind, "the request"))
    except InputError as error:
        raise HTTPException(400, str(error)) from None


async def refuse(request: Request, error: Any) -> Response:
    text = json.dumps({"error": error.detail})
    return Response(text, error.status_code, HEADERS, "application/json")


def make_app(editor: Editor, token: str, host: str = "127.0.0.1", port: int = PORT) -> ASGIApp:
    app = Starlette(routes=editor.routes(), exception_handlers={HTTPException: refuse})
    return Guard(app, token, host, port)


def opened(path: Path) -> tuple[Folder, str | None]:
    """The folder of --edit, and the file in it that it names."""
    if path.is_dir():
        return Folder(path), None
    check_suffix("--edit", path, (".yaml", ".yml", *SUFFIXES))
    if not path.parent.is_dir():
        raise InputError("--edit", path, "there is no such folder")
    if path.suffix.lower() in SUFFIXES and not path.is_file():
        raise InputError("--edit", path, "there is no such image")
    folder = Folder(path.parent)
    return folder, folder.name(folder.path(path.name))


def absolute(settings: Settings) -> Settings:
    """Settings for a process that works in another folder."""
    found = {}
    for key in (*MODEL_KEYS, "prompt_cache"):
        name = getattr(settings, key)
        if name and (os.path.exists(name) or key == "prompt_cache"):
            found[key] = os.path.abspath(name)
    return msgspec.structs.replace(settings, **found)


def listening(host: str) -> socket.socket:
    """A socket at our port, or at a free one if that is taken."""
    try:
        ipaddress.ip_address(host)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for port in (PORT, 0):
            with contextlib.suppress(OSError if port else ()):
                return socket.create_server((host, port), family=family)
    except (ValueError, OSError) as error:
        problem = f"expected an address of this machine, such as 0.0.0.0 ({error})"
        raise InputError("--host", host, problem) from None
    raise InputError("--host", host, MISSING)


def serve(command: Any, make: Callable[[Settings], Any]) -> int:
    """Serve --edit until Ctrl-C. make: Pipeline."""
    settings = absolute(command.settings)
    folder, file = opened(command.dry_run.edit)
    model = Model(settings)
    if file:
        folder.open(file)  # InputError before the browser opens
    host = command.dry_run.host or "127.0.0.1"
    connection = listening(host)
    port = connection.getsockname()[1]
    token = secrets.token_urlsafe(24)
    queue = Queue(make, settings)
    app = make_app(Editor(folder, file, model, queue), token, host, port)
    shown = f"[{host}]" if ":" in host else host
    if ipaddress.ip_address(host).is_unspecified:
        shown = socket.gethostname()
    address = f"http://{shown}:{port}/{token}/"
    print(address, flush=True)
    info("Ctrl-C ends the editor")
    config = uvicorn.Config(app, log_level="critical", access_log=False, server_header=False)
    has_screen = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if sys.stdout.isatty() and has_screen:
        webbrowser.open(address)
    queue.thread.start()
    # Not in the main thread, which Ctrl-C interrupts whoever still listens.
    how = {"sockets": [connection]}
    server = threading.Thread(target=uvicorn.Server(config).run, kwargs=how, daemon=True)
    server.start()
    try:
        while server.is_alive():
            server.join(1)
    finally:
        queue.close()
        folder.clean()
    return 1
