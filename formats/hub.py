"""Files of a Hugging Face repository: those in the cache, or else downloaded there, and a sentence if that fails.

The hub's library finds, links and fetches; what it does not do is done here: it throws an unfinished file away, so the
large ones are fetched into a file of a lasting name, where the next run goes on.
"""

import hashlib
import re
import shutil
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.errors import HTTPError as HttpxError
from huggingface_hub.file_download import DryRunFileInfo, http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, disable_progress_bars
from tqdm import tqdm

from errors import MISSING, InputError


def fetch(repo: str, choices: list[list[str]], purpose: str, instead: str) -> Path:
    """A repository's folder in the cache with all files of one choice of patterns, downloaded if they are not there.

    A pattern that ends in *.json may match nothing. An InputError begins with `purpose` and ends with `instead`,
    another way to reach the same.
    """
    needed = [[pattern for pattern in patterns if not pattern.endswith("*.json")] for patterns in choices]
    try:
        for patterns, must in zip(choices, needed):
            folder = cached(repo, patterns)
            if folder and all(any(folder.glob(pattern)) for pattern in must):
                return folder
        for patterns, must in zip(choices, needed):
            files = snapshot(repo, patterns, dry_run=True)
            if all(any(fnmatchcase(file.filename, pattern) for file in files) for pattern in must):
                download(repo, [file for file in files if file.will_download], purpose, instead)
                return Path(snapshot(repo, patterns))
    except (HttpxError, OSError, ValueError) as error:
        raise InputError(purpose, MISSING, f"{hub_reason(repo, error)}, or {instead}") from error
    wanted = ", nor ".join(" ".join(must) for must in needed)
    raise InputError(purpose, MISSING, f"the repository has not all of {wanted}; {instead}")


def cached(repo: str, patterns: list[str]) -> Path | None:
    """The repository's folder in the cache; None if files that are known to match the patterns are not there."""
    try:
        return Path(snapshot(repo, patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def snapshot(repo: str, patterns: list[str], **how: bool) -> str | list[DryRunFileInfo]:
    """The hub library's snapshot_download, in which no * of a pattern reaches into a folder below."""
    depth = max(pattern.count("/") for pattern in patterns)
    deeper = "*/" * (depth + 1) + "*"
    with disable_progress_bars():  # of what takes no time: the large files are downloaded elsewhere
        return huggingface_hub.snapshot_download(repo, allow_patterns=patterns, ignore_patterns=[deeper], **how)


def download(repo: str, files: list[DryRunFileInfo], purpose: str, instead: str) -> None:
    """Say how much is missing, check that there is room, and download the large files, those in git-lfs."""
    if not files:
        return
    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    about = huggingface_hub.HfApi().model_info(repo, revision=files[0].commit_hash, files_metadata=True)
    sums = {file.rfilename: file.lfs.sha256 for file in about.siblings or [] if file.lfs}
    large = {blobs / f"{sums[file.filename]}.incomplete": file for file in files if file.filename in sums}
    missing = sum(file.file_size for file in files) - sum(path.stat().st_size for path in large if path.exists())
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    amount = f"{len(files)} file{'s' * (len(files) > 1)}, {tqdm.format_sizeof(missing, 'B')}"
    if missing > free:
        room = f"{tqdm.format_sizeof(free, 'B')} are free in {cache}; make room, set HF_HUB_CACHE to another disk"
        raise InputError(purpose, MISSING, f"{amount}, are still to be downloaded, but only {room}, or {instead}")
    print(f"{repo}: downloading {amount}, to {cache}", file=sys.stderr, flush=True)
    for path, file in large.items():
        complete(repo, file, path)


def complete(repo: str, file: DryRunFileInfo, path: Path) -> None:
    """Download what is missing of a large file, and make it a blob of the cache, which is named by its checksum."""
    blob, storage = path.with_suffix(""), path.parents[1]
    lock = storage.parent / ".locks" / storage.name / f"{blob.name}.lock"  # the library's
    for folder in (path.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():  # another worker has downloaded it
            return
        with open(path, "ab") as end:
            start = end.tell()
            if start < file.file_size:
                http_get(
                    huggingface_hub.hf_hub_url(repo, file.filename, revision=file.commit_hash),
                    end,
                    resume_size=start,
                    headers=build_hf_headers(),
                    expected_size=file.file_size,
                    displayed_filename=file.filename,
                )
        if start and digest(path) != blob.name:  # where locks do nothing, two may have written to it
            path.unlink()
            raise OSError(f"{file.filename} was damaged and is removed")
        path.replace(blob)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_reason(repo: str, error: Exception) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, DryRunError | LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, GatedRepoError):  # before its parent, RepositoryNotFoundError
        page = f"https://huggingface.co/{repo}"
        return f"the repository asks for a licence: accept it at {page}, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, nor a folder of that name; a private one needs `hf auth login` or HF_TOKEN"
    if isinstance(error, DryRunError | LocalEntryNotFoundError):
        return f"not in the cache, and {constants.ENDPOINT} is out of reach; go online (and unset HF_HUB_OFFLINE)"
    if isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} answers with status {error.response.status_code}; try again later"
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, HttpxError):
        return f"the connection broke ({what}); what has arrived is kept, and the same command goes on from there"
    return f"the download failed ({what}); try again"


Name = str | Path | None


def existing(flag: str, path: str | Path) -> Path:
    place = Path(path).expanduser()
    if not place.is_file() and not place.is_dir():
        others = (
            "a model's folder, a repository (org/name) or pocket"
            if flag == "--model"
            else "a safetensors or GGUF file, or its folder"
        )
        raise InputError(flag, path, f"there is no such file or folder; expected {others}")
    return place


def lora_file(name: str, key: str) -> Path:
    """The file of a LoRA: a path, or org/name of a repository with one safetensors file, or org/name:file.

    `key` is the one that names it.
    """
    path = Path(name).expanduser()
    repo, _, file = name.partition(":")
    if path.is_file():
        return path
    if path.is_dir():
        folder = path
    elif is_repository(repo):
        folder = fetch(repo, [[file or "*.safetensors"]], f"{key} {name}", "download it elsewhere and give its path")
    else:
        raise InputError(key, Path(name), "there is no such file; expected a safetensors file or org/name:file")
    files = sorted(folder.glob(file or "*.safetensors"))
    if len(files) != 1:
        names = ", ".join(f.name for f in files) or "none"
        raise InputError(key, Path(name), f"expected one safetensors file there, found {names}; name one of them")
    return files[0]


def is_repository(model: Name) -> bool:
    """Does --model name a repository of the Hugging Face hub, org/name, and no folder that is there?"""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model))) and not Path(model).exists()
