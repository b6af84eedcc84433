"""The server of the layout editor: who may ask, and what for; docs/editor.md describes it."""

import asyncio
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
from msgspec import Meta
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from errors import InputError, info, parse_json
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
BEAT = 15  # seconds between signs of life in the stream of events
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
Data = dict[str, Any]
Seeds = Annotated[list[Seed], Meta(max_length=64)]
Sides = Annotated[list[Annotated[int, Meta(ge=1, le=16384)]], Meta(min_length=2, max_length=2)]
FILE = {"file": str}
LAYOUT = {"file": str, "layout": Data}


class Guard:
    """Answers 4xx to whoever lacks the token, or comes by another name or from another site."""

    def __init__(self, app: ASGIApp, token: str, host: str, port: int):
        self.app = app
        self.token = token.encode()
        self.port = port
        self.address = ipaddress.ip_address(host)
        self.names = {host, "localhost", "127.0.0.1", "::1"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if status := self.refusal(scope):
                return await failure(status, "refused")(scope, receive, send)
            path = scope["path"].removeprefix("/").partition("/")[2]
            scope = scope | {"path": f"/{path}", "raw_path": b""}
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> int | None:
        def given(name: bytes) -> list[str]:
            return [value.decode("latin-1") for key, value in scope["headers"] if key == name]

        hosts = given(b"host")
        if len(hosts) != 1 or not self.is_ours(hosts[0]):
            return 403
        token, _, rest = scope["path"].removeprefix("/").partition("/")
        if {*given(b"origin")} - {f"http://{hosts[0]}"}:
            return 403
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.token):
            return 404
        if rest and {*given(b"sec-fetch-site")} - {"same-origin"}:
            return 403
        lengths = given(b"content-length")
        is_good = all(x.isdecimal() and len(x) < 20 and int(x) <= LARGE for x in lengths)
        return None if is_good else 413

    def is_ours(self, host: str) -> bool:
        """Is it a name of this server? Beyond loopback any address is, but no name, as a
        stranger could point one here."""
        name, _, port = host.rpartition(":")
        name = name.strip("[]").lower()
        is_address = not self.address.is_loopback
        with contextlib.suppress(ValueError):
            is_address = is_address and bool(ipaddress.ip_address(name))
            return port == str(self.port) and (is_address or name in self.names)
        return port == str(self.port) and name in self.names


class Editor:
    """What the page can ask for."""

    def __init__(self, folder: Folder, file: str | None, model: Model, queue: Queue):
        self.folder = folder
        self.file = file  # that the command line names
        self.model = model
        self.queue = queue

    def routes(self) -> list[Route]:
        folder = self.folder

        def get(path: str, work: Callable, *names: str) -> Route:
            return Route(f"/api/{path}", partial(answer_get, work, names))

        def post(path: str, work: Callable, most: int = BODY, **keys: Any) -> Route:
            kind = msgspec.defstruct("Body", [*keys.items()], forbid_unknown_fields=True)
            return Route(f"/api/{path}", partial(answer, work, kind, most), methods=["POST"])

        mask = {**FILE, "data": str}
        bring = {**FILE, "name": str, "form": str, "data": str, "size": Sides | None}
        draw = {**LAYOUT, "seeds": Seeds, "maps": bool}
        return [
            Route("/", page),
            Route("/page/{name}", page),
            Route("/api/events", self.events),
            get("start", self.start),
            get("open", folder.open, "name"),
            get("results", folder.results, "file"),
            get("image", self.image, "name"),
            get("maps", self.maps, "name"),
            post("check", partial(self.model.seen, folder), **LAYOUT),
            post("preview", self.preview, **LAYOUT),
            post("save", self.save, **LAYOUT, version=str | None),
            post("mask", folder.save_mask, LARGE, **mask),
            post("import", folder.bring, LARGE, **bring),
            post("export", self.export, **LAYOUT, form=str),
            post("generate", self.generate, **draw),
            post("cancel", self.queue.cancel, id=str),
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
            "imports": list(dict.fromkeys([*FORMS, *IMPORTED])),
            "exports": [*FORMS],
        }

    def image(self, name: str) -> Response:
        path = self.folder.path(name, (*SUFFIXES, ".gif", ".bmp", ".tiff", ".tif"))
        if not path.is_file():
            raise HTTPException(404, "there is no such image")
        return FileResponse(path, headers=HEADERS)

    def maps(self, name: str) -> Data:
        if name not in self.queue.maps:
            raise HTTPException(404, "no attention maps were kept of this image")
        return self.queue.maps[name]

    def preview(self, file: str, layout: Data) -> Response:
        found = self.model.read(self.folder, file, layout).filled(self.model.defaults)
        image = io.BytesIO()
        preview(found).save(image, format="PNG")
        return Response(image.getvalue(), headers=HEADERS, media_type="image/png")

    def save(self, file: str, layout: Data, version: str | None) -> Data:
        check_names(layout)
        return self.folder.save(file, layout, version)

    def export(self, file: str, layout: Data, form: str) -> Data:
        found = self.model.read(self.folder, file, layout)
        return self.folder.export(file, found.filled(self.model.defaults), form)

    def generate(self, file: str, layout: Data, seeds: list[int], maps: bool) -> Data:
        """An image for each seed; for none the layout's."""
        self.model.read(self.folder, file, layout)
        path = self.folder.path(file)
        request = {"file": str(path), "layout": layout, "maps": maps}
        try:
            name = self.folder.name(path)
            jobs = [self.queue.submit(name, request | {"seed": x}) for x in seeds or [None]]
        except OverflowError as error:
            raise HTTPException(429, str(error)) from None
        return {"jobs": jobs}

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self.stream(), headers=HEADERS, media_type="text/event-stream")

    async def stream(self) -> AsyncIterator[str]:
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


def failure(status: int, text: str) -> Response:
    return Response(json.dumps({"error": text}), status, HEADERS, "application/json")


async def page(request: Request) -> Response:
    path = PAGE / request.path_params.get("name", "index.html")
    if path.suffix not in KINDS or path not in PAGE.iterdir():
        raise HTTPException(404, "not found")
    return FileResponse(path, headers=HEADERS, media_type=KINDS[path.suffix])


async def answered(work: Callable[..., Any], given: Data) -> Response:
    """What `work` returns, in a thread; 400 for what its caller got wrong."""
    try:
        found = await run_in_threadpool(work, **given)
    except (InputError, OSError) as error:
        return failure(400, str(error))
    if isinstance(found, Response):
        return found
    return Response(msgspec.json.encode(found), headers=HEADERS, media_type="application/json")


async def answer_get(work: Callable[..., Any], names: tuple[str, ...], request: Request) -> Response:
    if {*request.query_params} != {*names}:
        return failure(400, f"expected the query {', '.join(names) or 'to be empty'}")
    return await answered(work, dict(request.query_params))


async def answer(work: Callable[..., Any], kind: type, most: int, request: Request) -> Response:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return failure(415, "expected JSON")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            return failure(413, f"more than {most:,} bytes")
    try:
        given = msgspec.structs.asdict(parse_json(bytes(body), kind, "the request"))
    except InputError as error:
        return failure(400, str(error))
    return await answered(work, given)


async def refuse(request: Request, error: Exception) -> Response:
    return failure(error.status_code, error.detail)


def make_app(editor: Editor, token: str, host: str = "127.0.0.1", port: int = PORT) -> ASGIApp:
    app = Starlette(routes=editor.routes(), exception_handlers={HTTPException: refuse})
    return Guard(app, token, host, port)


def opened(path: Path) -> tuple[Folder, str | None]:
    """The folder of --edit, and the file in it that it names."""
    if path.is_dir():
        return Folder(path), None
    check_suffix("--edit", path, (".yaml", ".yml", *SUFFIXES))
    is_image = path.suffix.lower() in SUFFIXES
    if not (path.is_file() if is_image else path.parent.is_dir()):
        raise InputError("--edit", path, f"there is no such {'image' if is_image else 'folder'}")
    folder = Folder(path.parent)
    folder.open(path.name)  # InputError before the browser opens
    return folder, path.name


def absolute(settings: Settings) -> Settings:
    """Settings for a process that works in another folder."""
    names = {key: getattr(settings, key) for key in (*MODEL_KEYS, "prompt_cache")}
    paths = {key: name for key, name in names.items() if name and os.path.exists(name)}
    found = {key: os.path.abspath(name) for key, name in paths.items()}
    return msgspec.structs.replace(settings, **found)


def listening(host: str) -> socket.socket:
    """A socket at our port, or at a free one if that is taken."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        with contextlib.suppress(OSError):
            return socket.create_server((host, PORT), family=family)
        return socket.create_server((host, 0), family=family)
    except (ValueError, OSError):
        raise InputError("--host", host, "expected an address of this machine") from None


def serve(command: Any, make: Callable[[Settings], Any]) -> int:
    """Serve --edit until Ctrl-C. make: Pipeline."""
    settings = absolute(command.settings)
    folder, file = opened(command.dry_run.edit)
    model = Model(settings)
    host = command.dry_run.host or "127.0.0.1"
    connection = listening(host)
    port = connection.getsockname()[1]
    token = secrets.token_urlsafe(24)
    queue = Queue(make, settings)
    app = make_app(Editor(folder, file, model, queue), token, host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/{token}/"
    print(address, flush=True)
    info("Ctrl-C ends the editor")
    has_screen = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
    if sys.stdout.isatty() and has_screen:
        webbrowser.open(address)
    queue.thread.start()
    config = uvicorn.Config(app, log_level="critical", access_log=False, server_header=False)
    # Not in the main thread, which Ctrl-C interrupts whoever still listens.
    run = partial(uvicorn.Server(config).run, sockets=[connection])
    server = threading.Thread(target=run, daemon=True)
    server.start()
    try:
        while server.is_alive():
            server.join(1)
    finally:
        queue.close()
        folder.clean()
    return 1
