"""From a name to files: a path, or a Hugging Face repository, downloaded unless it is in the cache.

huggingface_hub lists, links and downloads. But its 2.4 deletes an unfinished file when a download
breaks, so large files are downloaded here, under a lasting name from which the next run resumes.
"""

import hashlib
import re
import shutil
import sys
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import DryRunFileInfo, http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, disable_progress_bars
from tqdm import tqdm

from errors import MISSING, InputError

Name = str | Path | None


def is_repository(name: Name) -> bool:
    """Is it the name of a repository, org/name, and not of a path that exists?"""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not Path(name).exists()


OPTIONAL = ".json"  # patterns that end so may match nothing
ELSEWHERE = "download it elsewhere and give its path"


def locate(name: str | Path, choices: list[list[str]], purpose: str, instead: str = ELSEWHERE) -> Path:
    """The file or folder that a name means: a path, org/name, or org/name:file.

    choices: lists of patterns. Of a repository, the first list that is complete there is downloaded;
    a named file replaces its patterns, except *.json. With no choices a repository is an error.
    purpose and instead: how messages begin and end.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.is_dir():
        return path
    repo, _, file = str(name).partition(":")
    if choices and is_repository(repo):
        if file:
            choices = [[file, *(pattern for pattern in choices[0] if pattern.endswith(OPTIONAL))]]
        return fetch(repo, choices, purpose, instead) / file
    expected = "a file, a folder" + ", org/name or org/name:file" * bool(choices)
    raise InputError(purpose, MISSING, f"there is no such file or folder; expected {expected}")


def fetch(repo: str, choices: list[list[str]], purpose: str, instead: str) -> Path:
    """A repository's folder in the cache with the files of the first complete choice of patterns."""
    needed = [[pattern for pattern in patterns if not pattern.endswith(OPTIONAL)] for patterns in choices]
    try:
        for patterns, must in zip(choices, needed):
            with suppress(LocalEntryNotFoundError):
                folder = Path(snapshot(repo, patterns, local_files_only=True))
                if all(any(folder.glob(pattern)) for pattern in must):
                    return folder
        for patterns, must in zip(choices, needed):
            files = snapshot(repo, patterns, dry_run=True)
            if all(any(fnmatchcase(file.filename, pattern) for file in files) for pattern in must):
                download(repo, [file for file in files if file.will_download], purpose, instead)
                return Path(snapshot(repo, patterns))
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(purpose, MISSING, f"{hub_reason(repo, error)}, or {instead}") from error
    wanted = ", nor ".join(" ".join(must) for must in needed)
    raise InputError(purpose, MISSING, f"the repository has not all of {wanted}; {instead}")


def snapshot(repo: str, patterns: list[str], **how: bool) -> str | list[DryRunFileInfo]:
    """The hub library's snapshot_download, in which no * of a pattern reaches into a folder below."""
    depth = max(pattern.count("/") for pattern in patterns)
    deeper = "*/" * (depth + 1) + "*"
    with disable_progress_bars():  # they are for small files; `complete` downloads the large ones
        return huggingface_hub.snapshot_download(repo, allow_patterns=patterns, ignore_patterns=[deeper], **how)


def download(repo: str, files: list[DryRunFileInfo], purpose: str, instead: str) -> None:
    """Print the size of what is missing, check free disk space and download the large files, those in git-lfs."""
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
    """Download the rest of a large file, and make it a blob of the cache, whose name is its checksum."""
    blob = path.with_suffix("")
    storage = path.parents[1]
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
    """What is wrong, and what to do."""
    unreachable = hub_errors.DryRunError | LocalEntryNotFoundError
    if isinstance(error, unreachable) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, hub_errors.GatedRepoError):  # before its parent, RepositoryNotFoundError
        page = f"https://huggingface.co/{repo}"
        return f"the repository is gated: accept its license at {page}, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return "there is no such repository, nor a folder of that name; a private one needs `hf auth login` or HF_TOKEN"
    if isinstance(error, unreachable):
        return f"not in the cache, and {constants.ENDPOINT} is out of reach; go online (and unset HF_HUB_OFFLINE)"
    if isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} answers with status {error.response.status_code}; try again later"
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, HTTPError):
        return f"the connection broke ({what}); what has arrived is kept, and the same command resumes there"
    return f"the download failed ({what}); try again"
