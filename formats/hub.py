"""From a name to files: a path, or a Hugging Face repository, downloaded unless cached.

huggingface_hub knows what is in its cache and transfers the bytes. But its own download makes
paths of unchecked answers, verifies no checksum and deletes what is unfinished.
"""

import hashlib
import io
import os
import re
import shutil
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import httpx2
import huggingface_hub as hub
from huggingface_hub import constants
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from huggingface_hub.file_download import (
    _cache_commit_hash_for_specific_revision,
    _create_symlink,
    http_get,
    repo_folder_name,
)
from huggingface_hub.utils import WeakFileLock, hf_raise_for_status
from msgspec import Meta, Struct
from tqdm import tqdm

from errors import CHECKPOINT, CONFIG, MISSING, InputError, info, opened, parse_json
from formats.network import answer

Name = str | Path | None
Choices = list[list[str]]  # lists of patterns
Sha1 = Annotated[str, Meta(pattern=r"^[0-9a-f]{40}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
OFFLINE = hub.errors.OfflineModeIsEnabled
UNREACHABLE = OFFLINE | TimeoutError | httpx2.ConnectError | httpx2.TimeoutException
ELSEWHERE = "download it elsewhere and give its path"
SECONDS = 60  # for a repository's list of files

REDUX = "black-forest-labs/FLUX.1-Redux-dev"
POCKET_REDUX = Path(__file__).parents[1] / "pocket" / "adapters" / "redux"


class Large(Struct):
    """What git-lfs states of a file."""

    sha256: Sha256
    size: Annotated[int, Meta(ge=1, le=2**50)]


class File(Struct, rename={"name": "rfilename", "oid": "blobId"}):
    """A repository's file. oid: git's, of a pointer if it is in git-lfs."""

    name: str
    size: Annotated[int, Meta(ge=0, le=2**50)]
    oid: Sha1
    lfs: Large | None = None

    def __post_init__(self) -> None:
        self.size = self.lfs.size if self.lfs else self.size

    @property
    def sum(self) -> str:
        return self.lfs.sha256 if self.lfs else self.oid


class Listing(Struct, rename={"commit": "sha", "files": "siblings"}):
    commit: Sha1
    files: list[File]


def is_repository(name: Name) -> bool:
    """Is it a repository's name, org/name, and not an existing path?"""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not Path(name).exists()


def is_optional(pattern: str) -> bool:
    return pattern.endswith(".json")


def is_plain(name: str) -> bool:
    """Does it name a file in or below the folder, on any system?"""
    has_dots = any(part.strip(". ") == "" for part in name.split("/"))  # or is empty
    return name.isprintable() and not has_dots and not re.search(r'[\\:*?"<>|]', name)


def storage_of(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))


def is_cached(repo: str) -> bool:
    return any(storage_of(repo).glob("snapshots/*"))


def locate(name: Name, choices: Choices, purpose: str) -> Path:
    """The file or folder that a name means: a path, org/name or org/name:file.

    Of a repository, the first complete one of `choices` is downloaded; *.json are optional,
    and a named file replaces the patterns. Without choices a repository is an error.
    purpose: how messages begin.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.is_dir():
        return path
    repo, _, file = str(name).partition(":")
    if choices and is_repository(repo) and (is_plain(file) or not file):
        if file:
            choices = [[file, *filter(is_optional, choices[0])]]
        return fetch(repo, choices, purpose) / file
    expected = "a file, a folder" + ", org/name or org/name:file" * bool(choices)
    problem = f"there is no such file or folder; expected {expected}"
    raise InputError(purpose, MISSING, problem)


def fetch(repo: str, choices: Choices, purpose: str) -> Path:
    """A repository's cache folder with the files of the first complete choice."""
    needed = [[x for x in patterns if not is_optional(x)] for patterns in choices]
    try:
        for patterns, must in zip(choices, needed):
            with suppress(hub.errors.LocalEntryNotFoundError):
                how = dict(allow_patterns=patterns, ignore_patterns=[below(patterns)])
                folder = Path(hub.snapshot_download(repo, local_files_only=True, **how))
                if all(any(folder.glob(pattern)) for pattern in must):
                    return folder
        listing = listed(repo)
        for patterns, must in zip(choices, needed):
            files = [file for file in listing.files if is_chosen(file.name, patterns)]
            if all(any(fnmatchcase(file.name, x) for file in files) for x in must):
                return download(repo, listing, files, purpose)
    except InputError:
        raise
    except Exception as error:  # The library's parsers raise almost any.
        problem = f"{reason(repo, error)}, or {ELSEWHERE}"
        raise InputError(purpose, MISSING, problem) from error
    wanted = ", nor ".join(" ".join(must) for must in needed)
    raise InputError(purpose, MISSING, f"the repository has not all of {wanted}; {ELSEWHERE}")


def below(patterns: list[str]) -> str:
    """What a * of the patterns may not reach: files in deeper folders."""
    return "*/" * (max(pattern.count("/") for pattern in patterns) + 1) + "*"


def is_chosen(name: str, patterns: list[str]) -> bool:
    chosen = any(fnmatchcase(name, pattern) for pattern in patterns)
    return chosen and not fnmatchcase(name, below(patterns))


def headers() -> dict[str, str]:
    """For these, the library would first ask which environment variables to look up, and tell."""
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else hub.get_token()
    login = {"Authorization": f"Bearer {token}"} if token else {}
    return {"User-Agent": f"hf_hub/{hub.__version__}", **login}


def listed(repo: str) -> Listing:
    """The newest commit and its files, without names that lead elsewhere."""
    url = f"{constants.ENDPOINT}/api/models/{repo}/revision/main?blobs=True"
    response, body = answer("GET", url, SECONDS, CONFIG, headers=headers())
    hf_raise_for_status(response)
    try:
        listing = parse_json(body, Listing, repo)
    except InputError as error:
        raise OSError(f"the list of its files: {error.problem}") from None
    listing.files = [file for file in listing.files if is_plain(file.name)]
    return listing


def download(repo: str, listing: Listing, files: list[File], purpose: str) -> Path:
    """The folder of links to these files, like the library's, once all are there."""
    storage = storage_of(repo)
    blobs = storage / "blobs"
    missing = {file.sum: file for file in files if not (blobs / file.sum).exists()}
    if missing:
        announce(repo, list(missing.values()), blobs, purpose)
    for file in missing.values():
        complete(repo, listing.commit, file, blobs / file.sum)
    tree = {}  # tells the library whether all files are there
    for file in listing.files:
        large = (file.sum, file.size) if file.lfs else ()
        tree[file.name] = TreeCacheEntry(file.size, file.oid, *large)
    write_tree_cache(str(storage), listing.commit, tree)
    folder = storage / "snapshots" / listing.commit
    lock = storage.parent / ".locks" / storage.name / "links.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # A link that another worker has made would be made anew.
        for file in files:
            place = folder / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not (place.exists() and place.samefile(blobs / file.sum)):
                _create_symlink(str(blobs / file.sum), str(place))
    _cache_commit_hash_for_specific_revision(str(storage), "main", listing.commit)
    return folder


def announce(repo: str, files: list[File], blobs: Path, purpose: str) -> None:
    """Print how much is to be downloaded; InputError if it does not fit."""
    cache = Path(constants.HF_HUB_CACHE)
    missing = sum(file.size for file in files)
    for file in files:
        with suppress(FileNotFoundError):  # not begun, or just completed by another worker
            missing -= (blobs / f"{file.sum}.incomplete").stat().st_size
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    size = tqdm.format_sizeof(missing, "B")
    amount = f"{len(files)} file{'s' * (len(files) > 1)}, {size}"
    if missing > free:
        room = f"only {tqdm.format_sizeof(free, 'B')} are free in {cache}"
        advice = "make room, or set HF_HUB_CACHE to another disk"
        raise InputError(purpose, MISSING, f"{amount} to download, but {room}; {advice}")
    info(f"{repo}: downloading {amount}, to {cache}")


class Limited(io.BufferedWriter):
    """A file to append to, up to a size."""

    def __init__(self, path: Path, most: int):
        super().__init__(io.FileIO(path, "ab"))
        self.most = most

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.most:
            raise OSError(f"more than its {self.most} bytes arrive")
        return super().write(data)


def complete(repo: str, commit: str, file: File, blob: Path) -> None:
    """Download the rest of a file and make it a cache blob, named by its checksum."""
    storage = blob.parents[1]
    lock = storage.parent / ".locks" / storage.name / f"{blob.name}.lock"  # the library's
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():  # Another worker has downloaded it.
            return
        path = blob.with_name(f"{blob.name}.incomplete")
        with Limited(path, file.size) as end:
            start = end.tell()
            if start < file.size:
                url = hub.hf_hub_url(repo, file.name, revision=commit)
                how = dict(headers=headers(), displayed_filename=file.name)
                http_get(url, end, resume_size=start, expected_size=file.size, **how)
            end.flush()
            os.fsync(end.fileno())
        if checksum(path, file) != file.sum:
            path.unlink()
            raise OSError(f"{file.name} was damaged and is removed")
        path.replace(blob)


def checksum(path: Path, file: File) -> str:
    """By the hash that names it: of the bytes alone, or as a git blob."""
    start = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with opened(path, CHECKPOINT) as data:
        return hashlib.file_digest(data, lambda: start).hexdigest()


def reason(repo: str, error: Exception) -> str:
    """What is wrong, and what to do."""
    if isinstance(error, hub.errors.GatedRepoError):  # It is a RepositoryNotFoundError, too.
        accept = f"accept its license at https://huggingface.co/{repo}"
        return f"the repository is gated: {accept}, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return "no such repository or folder; a private one needs `hf auth login` or HF_TOKEN"
    if isinstance(error, UNREACHABLE):
        return f"not in the cache; {constants.ENDPOINT} is out of reach, or HF_HUB_OFFLINE is set"
    if isinstance(error, hub.errors.HfHubHTTPError):
        return f"{constants.ENDPOINT} answers with status {error.response.status_code}"
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"the download failed ({what}); the same command resumes it"


def redux_place(model: str, name: Name) -> Path:
    """Where FLUX.1 Redux is: as --redux has it, the pocket model's, or the official one."""
    name = str(name or (POCKET_REDUX if model == "pocket" else REDUX))
    return locate(name, [["image_encoder/*", "image_embedder/*"]], f"--redux {name}")
