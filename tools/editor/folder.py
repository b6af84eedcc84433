"""The opened folder: the only place where the editor reads and writes."""

import base64
import hashlib
import os
import re
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from errors import LAYOUT, MISSING, InputError, opened_image, parsed, read_bytes
from regional.layout import Layout
from regional.reader import REPOSITORY, fields_of
from tools.convert import FORMS, IMPORTED, Source, to_form, to_layout
from tools.convert import write as write_all
from tools.jobs import heard
from tools.metadata import (
    SUFFIXES,
    check_suffix,
    check_writable,
    is_picture,
    metadata_in,
    names_in,
    read_metadata,
    with_names,
    write,
)
from tools.yaml_text import dumped, edited, same, values_in

YAML = (".yaml", ".yml")
MASK = 16_000_000  # bytes of a mask or of a file to import
MOST_FILES = 500  # that are listed, and results that are looked at
OUTSIDE = "lies outside the opened folder, and no layout in it names it"
CHANGED = "was changed by another program since it was opened"
Data = dict[str, Any]


class Folder:
    """Files by their names below `root`, an existing folder. InputError for other places, also
    where links lead to."""

    def __init__(self, root: Path):
        self.root = Path(os.path.realpath(root))
        self.named: set[str] = set()  # real paths outside that its layouts name on disk
        self.drafts: set[Path] = set()  # masks that no saved layout names yet

    def path(self, name: str, suffixes: tuple[str, ...] = (*YAML, *SUFFIXES)) -> Path:
        """The real path of a name from the page; no hidden file."""
        try:
            path = Path(os.path.realpath(self.root / name))
            is_good = path.is_relative_to(self.root) and len(os.fsencode(path)) < 4000
        except ValueError:  # NUL, or a surrogate
            is_good = False
        if not is_good:
            raise InputError(Path(name), MISSING, "is not in the opened folder")
        parts = path.relative_to(self.root).parts
        if not parts or any(part.startswith(".") for part in parts):
            raise InputError(Path(name), MISSING, "is a hidden file or no file's name")
        check_suffix(name, path, suffixes)
        return path

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def layouts(self) -> list[str]:
        found = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            paths = [Path(folder, name) for name in sorted(names) if name.endswith(YAML)]
            found += [self.name(path) for path in paths if not path.name.startswith(".")]
            if len(found) > MOST_FILES:
                break
        return found[:MOST_FILES]

    def results(self, file: str, most: int = 24) -> Data:
        """The newest images beside a layout that say how they were made."""
        base = self.path(file).parent
        files = [x for x in base.glob("[!.]*") if x.suffix.lower() in SUFFIXES and x.is_file()]
        files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        found = []
        for file in files[:MOST_FILES]:
            if not file.is_symlink() and (metadata := metadata_in(file)):
                found.append({"name": self.name(file), "seed": metadata["seed"]})
                if len(found) == most:
                    break
        return {"results": found}

    def text(self, path: Path) -> str:
        return parsed(bytes.decode, read_bytes(path, LAYOUT), path, "not UTF-8")

    def open(self, name: str) -> Data:
        """A layout's values, and a version to save it by: None for a file to be made."""
        path = self.path(name)
        if path.suffix.lower() in SUFFIXES:
            made = path.with_suffix(".yaml")
            layout = recorded(path)
            found = {"version": None, "layout": layout, "from": self.name(path)}
            while made.exists():
                made = made.with_stem(f"{made.stem}_new")
            return found | {"file": self.name(made)}
        if not path.exists():
            layout = {"prompt": "", "regions": []}
            return {"file": self.name(path), "version": None, "layout": layout}
        text = self.text(path)
        layout = values_in(text, path)
        if not isinstance(layout, dict):
            raise InputError(path, MISSING, "holds no layout: expected keys and their values")
        for _, file in names_in(layout):
            with suppress(ValueError):
                self.named.add(os.path.realpath(path.parent / file))
        return {"file": self.name(path), "version": version(text), "layout": layout}

    def save(self, name: str, layout: Data, known: str | None) -> Data:
        """known: the version that the page has; of another nothing is replaced."""
        path = self.path(name, YAML)
        self.rebased(layout, path.parent)
        old = self.text(path) if path.exists() else ""
        if known != (version(old) if old else None):
            raise InputError(path, MISSING, CHANGED if old else "there is no such file any more")
        text = dumped(layout)
        keeps = True
        if old:
            text, keeps = edited(old, layout, path)
        if len(text.encode()) > LAYOUT or not same(values_in(text, path), layout):
            raise InputError(path, MISSING, "too long, or with values that a layout can't have")
        if text != old:
            check_writable(path, overwrite=True)
            write(path, partial(Path.write_bytes, data=text.encode()))
        self.drafts -= {path.parent / file for _, file in names_in(layout)}
        self.clean()
        return {"file": self.name(path), "version": version(text), "comments": keeps}

    def rebased(self, layout: Data, base: Path) -> Data:
        """The layout with the names of files from `base`, its folder, as paths. InputError for
        files outside the folder, unless layouts on disk name them already."""

        def change(key: str, name: str) -> str:
            try:
                real = os.path.realpath(base / name)
                is_there = os.path.exists(real)
            except (OSError, ValueError):  # NUL, or too long
                raise InputError(key, name, "no file can have this name") from None
            is_named = is_there or is_picture(key) or not re.fullmatch(REPOSITORY, name)
            if is_named and not Path(real).is_relative_to(self.root) and real not in self.named:
                raise InputError(key, name, OUTSIDE)
            return str(base / name) if is_named else name

        return with_names(layout, change)

    def save_mask(self, file: str, data: str) -> Data:
        """A PNG beside a layout, named by its content."""
        layout = self.path(file, YAML)
        content = decoded(data, "the mask")
        digest = hashlib.sha256(content).hexdigest()[:8]
        path = layout.with_name(f"{layout.stem}_mask_{digest}.png")

        def save(unfinished: Path) -> None:
            unfinished.write_bytes(content)
            with opened_image(unfinished) as image:
                image.load()
                if image.format != "PNG":
                    raise InputError("the mask", MISSING, "is not a PNG image")

        if not path.exists():
            check_writable(path, overwrite=False)
            write(path, save)
            self.drafts.add(path)
        return {"name": path.name}

    def clean(self) -> None:
        """Remove masks that were drawn and not kept; the page has them."""
        while self.drafts:
            self.drafts.pop().unlink(missing_ok=True)

    def bring(self, file: str, name: str, form: str, data: str, size: list[int] | None) -> Data:
        """Another program's file as a layout; its images are written beside the layout."""
        if form not in {**FORMS, **IMPORTED}:
            raise InputError("form", form, f"expected one of {', '.join([*FORMS, *IMPORTED])}")
        layout = self.path(file, YAML)
        heard()
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, f"source{Path(name).suffix[:8]}")
            source.write_bytes(decoded(data, name))
            try:
                found = to_layout(Source(source, None, False, None, size), form, layout.stem)
            except InputError as error:
                problem = str(error).replace(f"{source}", Path(name).name).rstrip(".")
                raise InputError("import", MISSING, problem) from None
        values = values_in(found.pop(""), layout)
        if found:
            write_all({"": dumped(values), **found}, layout, overwrite=False, source=None)
        return {"layout": values, "warnings": heard(), "written": [*found]}

    def export(self, file: str, layout: Layout, form: str) -> Data:
        """Writes a checked layout in another form beside its file, under a new name."""
        if form not in FORMS:
            raise InputError("form", form, f"expected one of {', '.join(FORMS)}")
        path = self.path(file, YAML)
        heard()
        suffix = ".txt" if form == "rpg" else ".json"
        stem = f"{path.stem}.{form}"
        while path.with_name(stem + suffix).exists():
            stem += "_new"
        files = to_form(layout, form, stem)
        write_all(files, path.with_name(stem + suffix), overwrite=False, source=None)
        names = [self.name(path.with_name(name or stem + suffix)) for name in files]
        return {"written": names, "warnings": heard()}


def version(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def decoded(data: str, what: str) -> bytes:
    content = parsed(partial(base64.b64decode, validate=True), data, what, "damaged base64")
    if len(content) > MASK:
        raise InputError(Path(what), MISSING, f"more than {MASK:,} bytes")
    return content


def recorded(path: Path) -> Data:
    """The layout of an image, without what is a default; its paths start at the image."""
    metadata = read_metadata(path)
    keys = {key: metadata[key] for key in Layout.__struct_fields__ if key in metadata}
    layout = parsed(lambda x: msgspec.convert(x, Layout), keys, path, "its layout is damaged")
    return slim(msgspec.to_builtins(layout), Layout)


def slim(data: Data, struct: type[msgspec.Struct]) -> Data:
    """Keys whose values are not the defaults, in nested parts too."""
    found = {}
    for field in msgspec.structs.fields(struct):
        value = data[field.name]
        _, part = fields_of(struct)[field.name]
        default = None if field.required else field.default
        if not field.required and (value == default or (value == [] and default == ())):
            continue
        if part and isinstance(value, list | tuple):
            value = [slim(entry, part) for entry in value]
        elif part:
            value = slim(value, part)
        found[field.name] = value
    return {key: list(x) if isinstance(x, tuple) else x for key, x in found.items()}
