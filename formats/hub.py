"""From a name to files: a path, or a Hugging Face repository, downloaded unless it is in the cache.

huggingface_hub lists, links and downloads. But its 2.4 deletes an unfinished file when a download
breaks, so large files are downloaded here, under a lasting name from which the next run resumes.
"""

import hashlib
import re
import shutil
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub import constants
from huggingface_hub.file_download import DryRunFileInfo, http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, disable_progress_bars
from tqdm import tqdm

from errors import MISSING, InputError, info

Name = str | Path | None
Choices = list[list[str]]  # lists of patterns
UNREACHABLE = hub.errors.DryRunError | hub.errors.LocalEntryNotFoundError
ELSEWHERE = "download it elsewhere and give its path"


def is_repository(name: Name) -> bool:
    """Is it the name of a repository, org/name, and not of a path that exists?"""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name))) and not Path(name).exists()


def is_optional(pattern: str) -> bool:
    return pattern.endswith(".json")


def locate(name: Name, choices: Choices, purpose: str) -> Path:
    """The file or folder that a name means: a path, org/name, or org/name:file.

    Of a repository, the first of `choices` that is complete there is downloaded, where *.json are
    optional; a named file replaces the patterns. With no choices a repository is an error.
    purpose: how messages begin.
    """
    path = Path(name).expanduser()
    if path.is_file() or path.is_dir():
        return path
    repo, _, file = str(name).partition(":")
    if choices and is_repository(repo):
        if file:
            choices = [[file, *filter(is_optional, choices[0])]]
        return fetch(repo, choices, purpose) / file
    expected = "a file, a folder" + ", org/name or org/name:file" * bool(choices)
    problem = f"there is no such file or folder; expected {expected}"
    raise InputError(purpose, MISSING, problem)


def fetch(repo: str, choices: Choices, purpose: str) -> Path:
    """A repository's folder in the cache with the files of the first complete choice."""
    needed = [[x for x in patterns if not is_optional(x)] for patterns in choices]
    try:
        for patterns, must in zip(choices, needed):
            with suppress(hub.errors.LocalEntryNotFoundError):
                folder = Path(snapshot(repo, patterns, local_files_only=True))
                if all(any(folder.glob(pattern)) for pattern in must):
                    return folder
        for patterns, must in zip(choices, needed):
            files = snapshot(repo, patterns, dry_run=True)
            names = [file.filename for file in files]
            if all(any(fnmatchcase(name, x) for name in names) for x in must):
                files = [file for file in files if file.will_download]
                if files:
                    download(repo, files, purpose)
                return Path(snapshot(repo, patterns))
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        problem = f"{reason(repo, error)}, or {ELSEWHERE}"
        raise InputError(purpose, MISSING, problem) from error
    wanted = ", nor ".join(" ".join(must) for must in needed)
    raise InputError(purpose, MISSING, f"the repository has not all of {wanted}; {ELSEWHERE}")


def snapshot(repo: str, patterns: list[str], **how: bool) -> str | list[DryRunFileInfo]:
    """The hub library's snapshot_download, but no * of a pattern reaches into a folder below."""
    depth = max(pattern.count("/") for pattern in patterns)
    how |= dict(allow_patterns=patterns, ignore_patterns=["*/" * (depth + 1) + "*"])
    with disable_progress_bars():  # Large files have their own, in `complete`.
        return hub.snapshot_download(repo, **how)


def download(repo: str, files: list[DryRunFileInfo], purpose: str) -> None:
    """Print the size of what is missing, check free disk space, download files in git-lfs."""
    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    commit = files[0].commit_hash
    about = hub.HfApi().model_info(repo, revision=commit, files_metadata=True)
    sums = {x.rfilename: x.lfs.sha256 for x in about.siblings or [] if x.lfs}
    large = [file for file in files if file.filename in sums]
    paths = [blobs / f"{sums[file.filename]}.incomplete" for file in large]
    missing = sum(file.file_size for file in files)
    missing -= sum(path.stat().st_size for path in paths if path.exists())
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    size = tqdm.format_sizeof(missing, "B")
    amount = f"{len(files)} file{'s' * (len(files) > 1)}, {size}"
    if missing > free:
        room = f"only {tqdm.format_sizeof(free, 'B')} are free in {cache}"
        advice = "make room, or set HF_HUB_CACHE to another disk"
        raise InputError(purpose, MISSING, f"{amount} to download, but {room}; {advice}")
    info(f"{repo}: downloading {amount}, to {cache}")
    for file, path in zip(large, paths):
        complete(repo, file, path)


def complete(repo: str, file: DryRunFileInfo, path: Path) -> None:
    """Download the rest of a large file and make it a blob of the cache, named by its checksum."""
    blob = path.with_suffix("")
    storage = path.parents[1]
    lock = storage.parent / ".locks" / storage.name / f"{blob.name}.lock"  # the library's
    for folder in (path.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():  # Another worker has downloaded it.
            return
        name = file.filename
        with open(path, "ab") as end:
            start = end.tell()
            if start < file.file_size:
                url = hub.hf_hub_url(repo, name, revision=file.commit_hash)
                how = dict(headers=build_hf_headers(), displayed_filename=name)
                http_get(url, end, resume_size=start, expected_size=file.file_size, **how)
        # Where locks do nothing, two processes may have written to it.
        if start and digest(path) != blob.name:
            path.unlink()
            raise OSError(f"{name} was damaged and is removed")
        path.replace(blob)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(repo: str, error: Exception) -> str:
    """What is wrong, and what to do."""
    if isinstance(error, UNREACHABLE) and isinstance(error.__cause__, hub.errors.HfHubHTTPError):
        error = error.__cause__
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
