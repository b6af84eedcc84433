"""Downloads from a small HTTP server on this machine that answers as the Hugging Face hub does."""

import errno
import hashlib
import json
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import tiny
from huggingface_hub import constants
from PIL import Image
from tqdm import tqdm

import weights
from errors import InputError
from formats import hub
from model.autoencoder import AutoEncoder, AutoEncoderParams

COMMIT = "c0ffee" + "0" * 34
REPO = "org/name"
UNNEEDED = (
    "README.md dev_grid.jpg text_encoder/pytorch_model.bin text_encoder_2/model.onnx "
    "text_encoder_2/README.md text_encoder_2/old/model.safetensors checkpoint-500/model.safetensors"
).split()
FLUX = "flux1-dev.safetensors"


class Hub(ThreadingHTTPServer):
    """One repository, org/name; large files come from another host, as they do there."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = files
        self.requests: list[tuple[str, str, str | None]] = []  # method, file or page, Range
        self.refusal: tuple[int, str] | None = None  # status and X-Error-Code for every file
        self.cut: dict[str, int] = {}  # of these files only so many bytes are sent
        self.tokens_elsewhere: list[str] = []
        self.described: dict[str, dict] = {}  # what is said of a file, other than it is
        self.content: dict[str, bytes] = {}  # what is sent of a file, other than it is

    def sent(self) -> set[str]:
        return {name for method, name, _ in self.requests if method == "GET" and name in self.files}

    def ranges(self, name: str) -> list[str | None]:
        return [how for method, asked, how in self.requests if (method, asked) == ("GET", name)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        page, _, name = self.path.partition("?")[0].partition(f"{COMMIT}/")
        name = name or page
        self.server.requests.append((self.command, name, self.headers["Range"]))
        if page == f"/api/models/{REPO}/revision/main" or page == f"/api/models/{REPO}/revision/{COMMIT}":
            files = [self.described(file, "rfilename", "sha256") for file in self.server.files]
            self.answer(json.dumps({"id": REPO, "sha": COMMIT, "siblings": files}).encode())
        elif page == f"/api/models/{REPO}/tree/{COMMIT}":
            files = [{"type": "file"} | self.described(file, "path", "oid") for file in self.server.files]
            self.answer(json.dumps(files).encode())
        elif name not in self.server.files:
            self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})
        elif page == "/elsewhere/":
            self.server.tokens_elsewhere += [self.headers["Authorization"]] if self.headers["Authorization"] else []
            self.send_file(name)
        elif self.server.refusal or self.headers["Authorization"] != "Bearer hf_of_the_user":
            status, code = self.server.refusal or (401, "GatedRepo")
            self.answer(b"", status, {"X-Error-Code": code})
        elif is_large(name):
            content = self.server.files[name]
            where = {"Location": f"http://localhost:{self.server.server_port}/elsewhere/{COMMIT}/{name}"}
            linked = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
            xet = {"X-Xet-Hash": hashlib.sha256(content).hexdigest(), "X-Xet-Refresh-Route": "/api/xet-read-token"}
            self.answer(b"", 302, where | linked | xet | {"X-Repo-Commit": COMMIT})
        else:
            self.send_file(name)

    do_HEAD = do_GET

    def described(self, name: str, key: str, checksum: str) -> dict:
        content = self.server.files[name]
        lfs = {"size": len(content), "pointerSize": 134, checksum: hashlib.sha256(content).hexdigest()}
        blob = git_sum(content)
        about = {key: name, "size": len(content), "oid": blob, "blobId": blob}
        return about | ({"lfs": lfs} if is_large(name) else {}) | self.server.described.get(name, {})

    def send_file(self, name: str) -> None:
        content = self.server.content.get(name, self.server.files[name])
        etag = {"ETag": f'"{git_sum(content)}"', "X-Repo-Commit": COMMIT}
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        size = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        most = self.server.cut.get(name, len(content)) - start
        self.answer(content[start:], 206 if start else 200, etag | size, most)

    def answer(self, content: bytes, status: int = 200, headers: dict | None = None, most: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            sent = content if most is None else content[: max(most, 0)]
            self.wfile.write(sent)
            self.close_connection = len(sent) < len(content)

    def log_message(self, *_):
        pass


def git_sum(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str) -> bool:
    """In git-lfs, that is, as the hub has it."""
    return name.endswith((".safetensors", ".bin", ".onnx", ".jpg", ".model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model in both formats."""
    folder = tiny.save_diffusers_model(tmp_path_factory.mktemp("hub"))
    tiny.save(folder / FLUX, tiny.flux_state())
    vae = AutoEncoder(AutoEncoderParams(ch=32, ch_mult=(1,), num_res_blocks=1))
    tiny.save(folder / "ae.safetensors", tiny.state(vae))
    for file in folder.glob("tokenizer*/*"):
        file.write_text(file.name)  # The cache stores equal files once.
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def fake(folder, tmp_path, monkeypatch):
    """A hub with the model and much besides; this process asks it alone, in a new cache."""
    server = Hub(files_of(folder) | {name: b"not needed" * 10_000 for name in UNNEEDED})
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "DOWNLOAD_CHUNK_SIZE": 10_000,  # what is written at once, and lost at most when a connection breaks
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its trials
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def refuse(match: str, *args, **kwargs) -> None:
    with pytest.raises(InputError, match=match) as caught:
        weights.find(*args, **kwargs)
    message = str(caught.value)
    assert REPO in message and "\n" not in message and message.startswith("--model org/name: ")


def below(folder: Path, *names: str) -> set[str]:
    return {str(file.relative_to(folder)) for name in names for file in folder.glob(name) if file.is_file()}


ENCODERS = "text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*"


def test_of_a_repository_with_both_formats_the_single_files_are_downloaded(fake, folder):
    found = weights.find(REPO)
    assert fake.sent() == below(folder, FLUX, "ae.safetensors", *ENCODERS)
    for source in (found.flux, found.ae, found.t5, found.clip):
        here = Path(constants.HF_HUB_CACHE) / "models--org--name" / "snapshots" / COMMIT
        assert source.path.read_bytes() == (folder / source.path.relative_to(here)).read_bytes()
    assert fake.tokens_elsewhere == []
    assert not [page for _, page, _ in fake.requests if page.startswith("/api") and REPO not in page]


@pytest.mark.parametrize("missing", [FLUX, "ae.safetensors"])
def test_a_repository_without_all_single_files_gives_its_diffusers_folders(fake, folder, missing):
    del fake.files[missing]
    assert weights.find(REPO).flux.key_names.name == "diffusers"
    assert fake.sent() == below(folder, "transformer/*", "vae/*", *ENCODERS)


def test_components_that_are_given_are_not_downloaded(fake, folder):
    weights.find(REPO, flux=folder / FLUX, t5=folder / "text_encoder_2")
    assert fake.sent() == below(folder, "ae.safetensors", "text_encoder/*", "tokenizer/*", "tokenizer_2/*")


def test_an_encoder_that_lies_alone_takes_the_repository_s_tokenizer(fake, folder, tmp_path):
    alone = tmp_path / "alone" / "deeper"
    shutil.copytree(folder / "text_encoder", alone)
    assert weights.find(REPO, clip=alone).clip_tokenizer.parent.name == COMMIT
    assert not any(name.startswith("text_encoder/") for name in fake.sent())


def test_a_repository_without_tokenizers_is_refused_before_anything_is_downloaded(fake):
    fake.files = {name: content for name, content in fake.files.items() if not name.startswith("tokenizer")}
    refuse("--model org/name: the repository has not all of flux1-.*tokenizer/.*, nor transformer/", REPO)
    assert fake.sent() == set()


def test_a_name_is_a_repository_one_of_its_files_or_a_path(fake, folder):
    encoder = [["text_encoder/*.safetensors", "text_encoder/*.json"]]
    place = hub.locate(REPO, encoder, "--model")
    sent = {"text_encoder/model.safetensors", "text_encoder/config.json"}
    assert below(place, "*/*") == fake.sent() == sent
    patterns = [["*.safetensors", "config.json"]]
    assert hub.locate(f"{REPO}:ae.safetensors", patterns, "--lora") == place / "ae.safetensors"
    assert fake.sent() == sent | {"ae.safetensors"}
    assert hub.locate(REPO, patterns, "--lora") == place and fake.sent() == sent | {"ae.safetensors", FLUX}
    assert hub.locate(folder, [], "--t5") == folder
    missing = r"^--lora: there is no such file or folder; expected a file, a folder.*\.$"
    for name, choices, match in (
        ("org/none:x", [], missing),
        (folder / "none", patterns, missing),
        (f"{REPO}:none.safetensors", patterns, "^--lora: the repository has not all of none.safetensors; download it"),
    ):
        with pytest.raises(InputError, match=match):
            hub.locate(name, choices, "--lora")


def test_configs_may_be_missing(fake):
    del fake.files["text_encoder/config.json"]
    place = hub.locate(REPO, [["text_encoder/*.safetensors", "text_encoder/*.json"]], "--model")
    assert below(place, "*/*") == fake.sent() == {"text_encoder/model.safetensors"}


def size_line(fake, names: set[str], have: int = 0) -> str:
    amount = tqdm.format_sizeof(sum(len(fake.files[name]) for name in names) - have, "B")
    files = "1 file" if len(names) == 1 else f"{len(names)} files"
    return f"org/name: downloading {files}, {amount}, to {constants.HF_HUB_CACHE}\n"


def test_what_is_missing_is_reported_and_downloaded_once(fake, folder, monkeypatch, capsys):
    weights.find(REPO, flux=folder / FLUX)
    assert capsys.readouterr().err == size_line(fake, fake.sent())
    fake.requests.clear()
    first = weights.find(REPO)  # what came the first time does not count
    assert capsys.readouterr().err == size_line(fake, {FLUX})
    assert fake.sent() == {FLUX}
    fake.requests.clear()
    shutil.rmtree(first.flux.path.parent)  # links, which are mended without a download
    assert weights.find(REPO) == first and fake.sent() == set()
    fake.requests.clear()
    for is_offline in False, True:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
        assert weights.find(REPO) == first and fake.requests == []
    assert capsys.readouterr().err == ""


def test_a_connection_that_breaks_once_resumes_in_the_same_run(fake, monkeypatch):
    fake.cut[FLUX] = 1_005_000
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: fake.cut.clear())
    found = weights.find(REPO)
    assert set(fake.ranges(FLUX)) == {None, "bytes=1000000-"}
    assert found.flux.path.read_bytes() == fake.files[FLUX]


def test_a_download_that_broke_resumes_in_the_next_run(fake, capsys):
    fake.cut[FLUX] = 1_005_000
    refuse("the download failed .*; the same command resumes it", REPO)
    fake.cut.clear()
    before = fake.sent() - {FLUX}
    fake.requests.clear()
    capsys.readouterr()
    found = weights.find(REPO)
    assert set(fake.ranges(FLUX)) == {"bytes=1000000-"} and not fake.sent() & before
    assert found.flux.path.read_bytes() == fake.files[FLUX]
    assert capsys.readouterr().err == size_line(fake, fake.sent(), have=1_000_000)
    assert not list((found.flux.path.parents[2] / "blobs").glob("*.incomplete"))


@pytest.mark.parametrize("start", [b"x" * 1000, b"x" * 10_000_000, None], ids=["short", "too long", "whole"])
def test_an_unfinished_file_is_taken_or_if_it_is_damaged_removed(fake, start):
    content = fake.files[FLUX]
    write_unfinished(content, start or content)
    if start:
        refuse("flux1-dev.safetensors was damaged and is removed.; the same command", REPO)
    assert weights.find(REPO).flux.path.read_bytes() == content
    assert start or fake.ranges(FLUX) == []


SMALL = "text_encoder/config.json"


@pytest.mark.parametrize("name", [FLUX, SMALL])
@pytest.mark.parametrize("more", [b"", b"x" * 30_000], ids=["other bytes", "too many"])
def test_what_is_not_as_stated_is_never_taken(fake, name, more):
    fake.content[name] = fake.files[name][:-1] + b"\0" + more
    refuse("more than its .* bytes arrive|was damaged and is removed|should be of size", REPO)
    assert not hub.is_cached(REPO)
    del fake.content[name]
    assert weights.find(REPO).flux.path.read_bytes() == fake.files[FLUX]
    assert hub.is_cached(REPO)


LIES = [
    {"lfs": {"sha256": "../../../../x", "size": 7}},
    {"lfs": {"sha256": "/x", "size": 7}},
    {"lfs": {"sha256": "0" * 64 + "\n", "size": 7}},
    {"lfs": {"sha256": "0" * 64, "size": 0}},
    {"lfs": {"sha256": "0" * 64, "size": -1}},
    {"blobId": "../x"},
    {"size": None},
    {"rfilename": 1},
]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_list_of_files_that_is_wrong_in_a_field_is_not_used(fake, lie):
    fake.described[FLUX] = lie
    refuse("the list of its files: damaged JSON .*siblings", REPO)
    assert fake.sent() == set() and not Path(constants.HF_HUB_CACHE).exists()


def test_names_that_lead_elsewhere_are_left_out(fake, tmp_path):
    for name in "../x.json", "/x.json", "text_encoder/../../../x.json", "a\\..\\x.json", "C:x.json", "a\0.json":
        assert not hub.is_plain(name)
        fake.described[SMALL] = {"rfilename": name}
        hub.locate(REPO, [[FLUX, "*.json", "*/*.json"]], "--model")
        assert not hub.is_plain(name) and not list(tmp_path.rglob("x.json"))
    with pytest.raises(InputError, match="there is no such file or folder"):
        hub.locate(f"{REPO}:../../x", [["*.json"]], "--lora")


def test_the_library_finds_in_the_cache_what_was_downloaded(fake, folder):
    assert not hub.is_cached(REPO)
    place = weights.find(REPO).flux.path.parent
    assert hub.is_cached(REPO) and (place / FLUX).is_symlink()
    how = {"local_files_only": True, "cache_dir": constants.HF_HUB_CACHE}
    assert huggingface_hub.hf_hub_download(REPO, FLUX, **how) == str(place / FLUX)
    patterns = [FLUX, "text_encoder/*.json"]
    assert huggingface_hub.snapshot_download(REPO, allow_patterns=patterns, **how) == str(place)
    fake.requests.clear()
    how["local_files_only"] = False
    assert huggingface_hub.hf_hub_download(REPO, FLUX, **how) == str(place / FLUX)
    assert fake.sent() == set()


def write_unfinished(content: bytes, start: bytes) -> None:
    blobs = Path(constants.HF_HUB_CACHE) / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(content).hexdigest()}.incomplete").write_bytes(start)


def test_what_another_worker_downloads_is_waited_for(fake):
    found = []
    workers = [threading.Thread(target=lambda: found.append(weights.find(REPO))) for _ in range(3)]
    for step in "start", "join":
        for worker in workers:
            getattr(worker, step)()
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert len(fake.ranges(FLUX)) == 2  # the redirection, and the file: once


def test_a_disk_without_room_is_refused_before_anything_is_downloaded(fake, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_234_567))
    names = below(folder, FLUX, "ae.safetensors", *ENCODERS)
    total = tqdm.format_sizeof(sum(len(fake.files[name]) for name in names), "B")
    refuse(f"--model org/name: .*{total} to download, but only 1.23MB are free in .*cache; make room, or", REPO)
    assert fake.sent() == set()


LICENSE = "accept its license at https://huggingface.co/org/name, then run `hf auth login`"
PROBLEMS = {  # what the hub answers, or one of the library's constants -> the message
    (401, "GatedRepo"): f"is gated: {LICENSE}",
    (403, "GatedRepo"): f"is gated: {LICENSE}",
    (503, ""): "http://127.0.0.1:[0-9]+ answers with status 503",
    (404, "EntryNotFound"): "answers with status 404",
    ("ENDPOINT", "http://127.0.0.1:9"): "not in the cache; http://127.0.0.1:9 is out of reach",
    ("HF_HUB_OFFLINE", True): "is out of reach, or HF_HUB_OFFLINE is set",
}


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_what_goes_wrong_on_the_hub_is_one_sentence(fake, monkeypatch, problem):
    if isinstance(problem[0], int):
        fake.refusal = problem
    else:
        monkeypatch.setattr(constants, *problem)
    refuse(f"^--model org/name: .*{PROBLEMS[problem]}", REPO)
    cache = Path(constants.HF_HUB_CACHE)
    assert len(fake.sent()) <= 1 and not list(cache.glob("models--*/snapshots/*"))


def test_a_full_disk_is_one_sentence(fake, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(hub, "http_get", Mock(side_effect=full))
    refuse("the download failed .OSError: .*No space left on device", REPO)


def test_a_repository_that_is_not_there_is_one_sentence(fake):
    absent = "no such repository or folder; a private one needs"
    for name, match in ("org/other", absent), ("org/na..me", "HFValidationError"):
        with pytest.raises(InputError, match=f"^--model {name}: [^\n]*{match}"):
            weights.find(name)


def test_an_image_is_generated_from_a_repository_and_again_offline(fake, model, run, monkeypatch):
    fake.files = files_of(Path(model))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # where progress is shown
    given = ["--prompt", "x", "--width", 64, "--height", 64, "--steps", 1, "--seed", 1]
    code, _, errors = run(*given, "--output", "a.png", model=REPO)
    assert code == 0 and f"org/name: downloading 13 files, 16.7MB, to {constants.HF_HUB_CACHE}" in errors
    assert re.search(r"flux1-dev\.safetensors: 100%\|", "\n".join(errors))
    fake.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, errors = run(*given, "--output", "b.png", model=REPO)
    assert code == 0 and fake.requests == [] and not any("downloading" in line for line in errors)
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
