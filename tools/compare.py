"""What an existing file was made of: is it finished, may it be replaced, what differs."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from errors import (
    CHECKPOINT,
    MISSING,
    InputError,
    converted,
    describe,
    opened,
    opened_image,
    parse_json,
)
from formats.safetensors import read_header
from regional.layout import Layout
from tools.metadata import (
    ANY_SIZE,
    CHECKSUM,
    PICTURES,
    SUFFIXES,
    Metadata,
    metadata_in,
    with_names,
)

# What says where an image was made, and not what it shows; `files` and `inputs` say more.
IGNORED = ("torch", "model", "given", "source", "layout_file", "inputs", "pictures", "files")
MOST = 3  # differences in a message


def settings_in(metadata: Metadata, is_exact: bool = True) -> dict[str, Any]:
    """What determines an image, by flat keys: defaults filled in, models and pictures by their
    checksums. is_exact: not of an earlier version, which summed pictures alone."""
    sums = {}
    for key in "pictures", "inputs":
        found = metadata.get(key)
        sums |= found if isinstance(found, dict) else {}

    def content(key: str, name: str) -> str:
        is_picture = key.rpartition(".")[2] in PICTURES
        if name in sums and (is_picture or is_exact):
            return f"sha256 {str(sums[name])[:16]}"
        return name if is_exact else Path(name).name

    keys = {key: metadata[key] for key in Layout.__struct_fields__ if key in metadata}
    with suppress(InputError):
        keys = msgspec.to_builtins(converted(keys, Layout, "", ""))
        keys = dict(flat(with_names(keys, content)))
    files = metadata.get("files")
    for part, name in files.items() if isinstance(files, dict) else ():
        keys[part] = content(part, part if part in sums and is_exact else str(name))
    known = {*IGNORED, *Layout.__struct_fields__}
    return keys | {key: metadata[key] for key in metadata if key not in known}


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """A layout's values by keys such as regions[1].box."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from flat(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple) and any(isinstance(part, dict) for part in value):
        for i, part in enumerate(value):
            yield from flat(part, f"{key}[{i}]")
    elif value not in ((), []):
        yield key, value


def settings_hash(metadata: Metadata) -> str:
    text = json.dumps(settings_in(metadata), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(found: Metadata, metadata: Metadata) -> list[str]:
    """What differs between metadata, as `base_ratio 0.3, now 0.1`."""
    is_exact = "inputs" in found and "inputs" in metadata
    was = settings_in(found, is_exact)
    now = settings_in(metadata, is_exact)
    changed = [key for key in was | now if was.get(key) != now.get(key)]
    return [f"{key} {describe(was.get(key))}, now {describe(now.get(key))}" for key in changed]


def matches(path: Path, metadata: Metadata) -> bool:
    """Was this file made with these settings, by any version of the code, and is it whole?"""
    found = metadata_in(path)
    return found is not None and not differences(found, metadata) and is_whole(path)


def check_kept(path: Path, metadata: Metadata, output: Any) -> bool:
    """Does an existing file stay? False if it may be made again: with --update, where its
    layout or, with --same-code, the program changed. InputError if it is in the way. output:
    tools.flags.Output."""
    found = metadata_in(path)
    if found is None:
        problem = "and nothing in it says how it was made; --overwrite replaces it"
        raise InputError(path, MISSING, f"exists already, {problem}")
    changed = differences(found, metadata)
    if not changed and is_whole(path):
        return not output.same_code or found.get("source") == metadata.get("source")
    layout = metadata.get("layout_file")
    is_own = not changed or (layout is not None and found.get("layout_file") == layout)
    if output.update and is_own:
        return False
    if len(changed) > MOST:
        changed[MOST:] = [f"and {len(changed) - MOST} more"]
    problem = "and is damaged"
    if changed:
        problem = f"made with other settings ({'; '.join(changed)})"
    advice = "--update draws it again" if is_own else "--overwrite replaces it"
    raise InputError(path, MISSING, f"exists already, {problem}; {advice}")


def is_whole(path: Path) -> bool:
    """Can the image be decoded, or have the latents their checksum?"""
    if path.suffix.lower() == ".safetensors":
        text = read_header(path).metadata["layout"]
        expected = parse_json(text, dict[str, Any], path).get(CHECKSUM)
        with opened(path, CHECKPOINT) as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            return expected in (None, hashlib.file_digest(file, "sha256").hexdigest())
    with suppress(InputError):
        if path.suffix.lower() in SUFFIXES:
            with opened_image(path, ANY_SIZE) as image:
                image.load()
        return True
    return False
