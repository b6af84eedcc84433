"""The layout file: YAML in, a checked Layout out."""

import difflib
import os
import re
from collections.abc import Collection
from contextlib import suppress
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import yaml
from msgspec import Struct
from msgspec.structs import replace

from errors import LAYOUT, MISSING, InputError, InputErrors, describe, parse_yaml, read_text
from regional.images import colors_in, read_color, read_image, read_mask, readable
from regional.layout import BLOCKS, HEX, PERCENT, PRESETS, SHAPES, Control, Layout, Points, Region

MAX_NUMBER = 100  # characters; a file full of 1:1:1:1... would take hours
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*(:.+)?"  # org/name, or one of its files
PICTURES = ("map", "image", "control_image", "image_prompts", "references")
REPAINTED = ("box", "ellipse", "polygon", "mask", "regions")  # one of these
SYNONYMS = {
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "weight": "strength",
    "circle": "ellipse",
    "denoising_strength": "image",
}


def read_layout(file: str | Path | None, overrides: dict | None = None, size: int = 1024) -> Layout:
    """A layout, with paths from the working directory. size: default width and height.

    Raises InputError, or InputErrors with up to ten mistakes, each with its key.
    """
    overrides = overrides or {}
    if file and Path(file).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"):
        problem = "an image, not a layout; --config-from-metadata repeats its run"
        raise InputError(Path(file), MISSING, problem)
    data = parse_yaml(read_text(file, LAYOUT), Loader, file) if file else {}
    if isinstance(data, dict):
        data |= overrides
    mistakes = InputErrors(file)
    with mistakes.caught():
        check_types(data, Layout, "", mistakes)
    if layout := without(mistakes, data):
        preset = PRESETS[layout.preset]
        missing = {key: value for key, value in preset.items() if key not in data}
        folder = Path(file).parent if file else Path()
        sides = default_size(layout, Path() if "image" in overrides else folder, size)
        missing |= {side: getattr(layout, side) or own for side, own in sides.items()}
        layout = checked(replace(layout, **missing), folder, overrides, mistakes)
    if mistakes.errors:
        raise mistakes
    layout.__dict__["is_checked"] = True  # `replace` forgets it
    return layout


def default_size(layout: Layout, folder: Path, size: int) -> dict[str, int]:
    """The model's, or that of the image to start from, at most as many pixels."""
    sides = {"width": size, "height": size}
    with suppress(InputError):  # an image that can't be read is reported later
        if layout.image:
            image = read_image(str(folder / layout.image.file))
            scale = min(1, size / (image.width * image.height) ** 0.5)
            own = (int(scale * side) // 16 * 16 for side in image.size)
            sides = {key: min(max(side, 16), 8192) for key, side in zip(sides, own)}
    return sides


def without(mistakes: InputErrors, data: Any) -> Layout | None:
    """The layout with harmless values in place of mistakes, so that the rest can be checked
    too; None if that depends on them."""
    if mistakes.errors and not isinstance(data, dict):
        return None
    rest = dict(data)
    for error in mistakes.errors:
        key, index = re.match(r"([^.[]*)(?:\[(\d+))?", error.key).groups()
        if key == "regions" and index:
            rest[key] = [*rest[key]]
            rest[key][int(index)] = {"prompt": "-", "box": ["0%", "0%", "100%", "100%"]}
        elif key in ("width", "height", "map", "overlap", "regions"):
            return None
        else:
            rest.pop(key, None)
    if mistakes.errors:
        rest.setdefault("prompt", "-")
    try:
        return msgspec.convert(rest, Layout)
    except (msgspec.ValidationError, UnicodeEncodeError):
        if not mistakes.errors:
            raise
        return None  # an unknown key with a dot


def checked_in_code(layout: Layout, size: int) -> Layout:
    """A layout made in code, checked like a file; defaults count as unset."""
    if "is_checked" in layout.__dict__:
        return layout
    unset = msgspec.to_builtins(Layout(prompt=None))
    data = msgspec.to_builtins(layout, enc_hook=lambda x: getattr(x, "tolist", x.__str__)())
    data = {key: value for key, value in data.items() if value != unset[key]}
    return read_layout(None, data, size)


TAG = "tag:yaml.org,2002:"
TEXT = TAG + "str"
MERGE = TAG + "merge"
TYPES = [TEXT, MERGE, *(TAG + name for name in ("int", "float", "bool", "null"))]


class Loader(yaml.SafeLoader):
    """YAML with the values of JSON: no tags, no key twice, and a bounded size."""

    def __init__(self, text: str):
        super().__init__(text)
        self.size = 0  # of the text so far, with each alias written out
        self.sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            refuse(event, f"{describe(tag)}: tags are not supported")
        start = self.size
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            check_node(node)
            self.size += 1 + len(node.value)
            self.sizes[node] = self.size - start
        elif node in self.sizes:
            self.size += self.sizes[node]
        else:
            refuse(event, "a value that holds itself")
        if self.size > 2 * LAYOUT:
            refuse(event, "too much text, with aliases written out")
        return node


def check_node(node: yaml.Node) -> None:
    """Refuse keys and types unknown to layouts, and numbers that take long."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            is_word = key.tag == TEXT and re.fullmatch(r"[\w .-]{1,60}", key.value)
            if not is_word and key.tag != MERGE:
                is_text = isinstance(key.value, str)
                name = describe(key.value) if is_text else "that is a list"
                refuse(key, f"invalid key {name}")
            if key.value in seen:  # YAML would take the last
                refuse(key, f"the key {key.value} is written twice")
            seen.add(key.value)
    elif isinstance(node, yaml.ScalarNode):
        if node.tag not in TYPES:
            kind = describe(node.tag.removeprefix(TAG))
            refuse(node, f"{kind} is not a type of layouts; write text in quotes")
        if len(node.value) > MAX_NUMBER and node.tag != TEXT:
            refuse(node, f"a number of more than {MAX_NUMBER} characters")
        pairs = node.value.encode("utf-16", "surrogatepass")  # as JSON writes an emoji
        node.value = pairs.decode("utf-16", "surrogatepass")


def refuse(part: yaml.Node | yaml.Event, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=part.start_mark)


@cache
def fields_of(struct: type[Struct]) -> dict[str, tuple[Any, type[Struct] | None]]:
    """Each key's type, and for parts and lists of them the part's."""
    found = {}
    for name, kind in get_type_hints(struct, include_extras=True).items():
        outer = get_args(kind)[0]
        entry = next(iter(get_args(outer)), None)
        is_part = isinstance(entry, type) and issubclass(entry, Struct)
        found[name] = (kind, None)
        if is_part:
            plain = list if get_origin(outer) is tuple else dict | None
            found[name] = (Annotated[plain, *kind.__metadata__], entry)
    return found


def check_types(data: Any, struct: type[Struct], path: str, mistakes: InputErrors) -> None:
    """Check a mapping's keys one by one, as msgspec stops at the first mistake."""
    key = path.removesuffix(".") or "the layout"
    require(isinstance(data, dict), key, data, "expected a mapping of keys to values")
    for field in msgspec.structs.fields(struct):
        is_there = field.name in data or not field.required
        with mistakes.caught():
            require(is_there, path + field.name, MISSING, "missing")
    for key, value in data.items():
        with mistakes.caught():
            entry = check_type(value, struct, key, path)
            if entry and isinstance(value, dict):
                check_types(value, entry, f"{path}{key}.", mistakes)
                continue
            for i, part in enumerate(value or () if entry else ()):
                with mistakes.caught():
                    check_types(part, entry, f"{path}{key}[{i}].", mistakes)


def check_type(value: Any, struct: type[Struct], key: str, path: str) -> type[Struct] | None:
    """InputError for a value not of its key's type; returns the type of its entries."""
    known = fields_of(struct)
    if key not in known:
        close = difflib.get_close_matches(SYNONYMS.get(key, key), known, 1)
        hint = f"did you mean {close[0]}" if close else f"known keys are {', '.join(known)}"
        raise InputError(path + key, value, f"no such key, {hint}")
    kind, entry = known[key]
    inner = ""
    try:
        if isinstance(value, str):
            value.encode()
        msgspec.convert(value, kind)
        return entry
    except UnicodeEncodeError:
        problem = "invalid Unicode (unpaired surrogate)"
    except msgspec.ValidationError as error:
        problem = re.sub(r"`| \| null", "", str(error))
        problem, _, inner = problem.partition(" - at $")
        value = value_at(value, inner)
        meaning = kind.__metadata__[-1]
        if "regex" in problem or problem.startswith("Invalid enum"):
            options = [x for x in get_args(get_args(kind)[0]) if isinstance(x, str)]
            problem = f"expected {', '.join(options) or meaning}"
        else:
            problem = f"{problem[0].lower()}{problem[1:]} ({meaning})"
        if "expected str" in problem and isinstance(value, (bool, int, float)):
            problem += "; write it in quotes"
        elif "count" in meaning and re.fullmatch(r"0?\.[0-9]{1,9}|1\.0", str(value)):
            problem += f"; write {100 * float(value):.9g}%"
        elif "expected int" in problem and isinstance(value, float) and not value % 1:
            problem += f"; write {value:.0f}"
    raise InputError(path + key + inner, value, problem)


def value_at(data: Any, path: str) -> Any:
    """The value at a path such as regions[1].box."""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        data = data[int(index)] if index else data[key]
    return data


def require(is_good: Any, key: str, value: Any, problem: str) -> None:
    if not is_good:
        raise InputError(key, value, problem)


def checked(layout: Layout, folder: Path, overrides: dict, mistakes: InputErrors) -> Layout:
    """The layout with paths from the working directory and shapes in pixels."""
    for key in ("width", "height"):
        value = getattr(layout, key)
        low = value // 16 * 16
        problem = f"not a multiple of 16, the nearest are {low} and {low + 16}"
        with mistakes.caught():
            require(value == low, key, value, problem)
    for key in ("double_blocks", "single_blocks"):
        value = getattr(layout, key)
        is_good = not isinstance(value, str) or re.search(BLOCKS, value)
        problem = 'expected "every 2", "0-18", "0-4, 8" or a list of indices'
        with mistakes.caught():
            require(is_good, key, value, problem)
    with mistakes.caught():
        layout = with_pictures(layout, folder, "", overrides)
        if layout.image and layout.image.repaint:
            base = Path() if "image" in overrides else folder
            layout = replace(layout, image=checked_start(layout, base))
    for name in ("regions", "loras", "controlnets"):
        base = Path() if name in overrides else folder
        parts = []
        for i, part in enumerate(getattr(layout, name)):
            with mistakes.caught():
                parts.append(checked_part(part, layout, base, f"{name}[{i}]"))
        layout = replace(layout, **{name: tuple(parts)})
    return layout


def checked_part(part: Struct, layout: Layout, folder: Path, path: str) -> Struct:
    """A region, LoRA or ControlNet. folder: where its paths start. path: its key."""
    if isinstance(part, Region):
        return checked_region(part, layout, folder, path)
    if isinstance(part, Control):
        end = part.end
        problem = f"not before its end, {end:g}"
        require(part.start < end, f"{path}.start", part.start, problem)
        count = len(layout.regions)
        is_there = part.region is None or part.region < count
        problem = f"the layout has {count} regions, counted from 0"
        require(is_there, f"{path}.region", part.region, problem)
    part = with_pictures(part, folder, f"{path}.")
    key = "model" if isinstance(part, Control) else "file"
    return replace(part, **{key: located(folder, getattr(part, key))})


def located(folder: Path, name: str) -> str:
    """A file or folder by its path; a repository of the hub as it is."""
    path = folder / name
    if os.path.exists(path):  # False also for names that no file can have
        is_good = path.is_file() or path.is_dir()
        require(is_good, path, MISSING, "neither a file nor a folder")
    elif re.fullmatch(REPOSITORY, name):
        return name
    elif re.fullmatch(REPOSITORY, str(path)):
        return f"./{path}"
    return str(path)


def checked_region(region: Region, layout: Layout, folder: Path, path: str) -> Region:
    loras = tuple(checked_part(lora, layout, folder, path) for lora in region.loras)
    shapes = [key for key in SHAPES if getattr(region, key) is not None]
    has = " and ".join(shapes) or "no shape"
    problem = f"{has}, a region needs exactly one of {', '.join(SHAPES)}"
    if layout.map and not shapes:
        problem += '; "#rrggbb" needs its quotes'
    require(len(shapes) == 1, path, MISSING, problem)
    for name, unset in ("order", 0), ("opacity", 1):
        value = getattr(region, name)
        problem = f"overlap: share has no {name}; write overlap: last"
        require(value == unset or layout.overlap != "share", f"{path}.{name}", value, problem)
    region = with_pictures(region, folder, f"{path}.")
    own = checked_shape(region, region.shape, layout, folder, path)
    return replace(region, loras=loras, **{region.shape: own})


def checked_shape(part: Struct, name: str, layout: Layout, folder: Path, path: str) -> Any:
    """This shape of a region or of what is repainted, in pixels."""
    key = f"{path}.{name}"
    shape = getattr(part, name)
    if name in ("box", "ellipse"):
        return box_in_pixels(shape, layout, key)
    if name == "polygon":
        return polygons_in_pixels(shape, layout, key)
    if name == "mask":
        shape = str(folder / shape)
        empty = "nothing in it is white, no opaque pixel reaches 128"
        check_mask(readable(read_mask, shape, key), layout, key, Path(shape), empty)
    elif name == "color":
        check_color(shape, layout, key)
    else:
        count = len(layout.regions)
        is_good = shape and max(shape) < count
        require(is_good, key, shape, f"the layout has {count} regions, counted from 0")
    return shape


def checked_start(layout: Layout, folder: Path) -> Struct:
    """The image to start from, with what is repainted in pixels."""
    area = layout.image.repaint
    shapes = [key for key in REPAINTED if getattr(area, key) is not None]
    problem = f"expected exactly one of {', '.join(REPAINTED)}"
    require(len(shapes) == 1, "image.repaint", MISSING, problem)
    own = checked_shape(area, *shapes, layout, folder, "image.repaint")
    return replace(layout.image, repaint=replace(area, **{shapes[0]: own}))


def with_pictures(part: Struct, folder: Path, path: str, flags: Collection[str] = ()) -> Struct:
    """A part with its images' paths from the working directory, as flags' are."""
    for key in PICTURES:
        if (value := getattr(part, key, None)) is not None:
            base = Path() if key in flags else folder
            part = replace(part, **{key: picture(value, base, path + key)})
    return part


def picture(value: Any, folder: Path, key: str) -> Any:
    """An image's path, or a part or list of them, from the working directory."""
    if isinstance(value, tuple):
        return tuple(picture(x, folder, f"{key}[{i}]") for i, x in enumerate(value))
    if isinstance(value, Struct):
        return replace(value, file=picture(value.file, folder, f"{key}.file"))
    file = str(folder / value)
    readable(read_image, file, key)
    return file


def box_in_pixels(box: tuple, layout: Layout, key: str) -> tuple[float, ...]:
    sides = (layout.width, layout.height) * 2
    edges = [pixels(edge, sides[i], f"{key}[{i}]") for i, edge in enumerate(box)]
    require(max(edges) > 1, key, box, "smaller than a pixel; write 50% for 0.5")
    x, y, width, height = edges
    hint = ""
    if 0 < width <= layout.width - x and 0 < height <= layout.height - y:
        hint = f"; did you mean [{x:g}, {y:g}, {x + width:g}, {y + height:g}]"
    for axis, low, high in zip("xy", edges, edges[2:]):
        problem = f"the box is empty, {axis}0 must be smaller than {axis}1{hint}"
        require(low < high, key, box, problem)
    return tuple(edges)


def polygons_in_pixels(polygon: tuple, layout: Layout, key: str) -> tuple:
    """A list of points, or several of them, as several."""
    for given in ([polygon], polygon):
        with suppress(msgspec.ValidationError, UnicodeEncodeError):
            polygons = msgspec.convert(given, tuple[Points, ...])
            break
    else:
        problem = "expected at least three points [x, y], or lists of them"
        raise InputError(key, polygon, problem)

    def in_pixels(i: int, point: tuple) -> tuple[float, ...]:
        x, y = point
        name = f"{key}[{i}]"
        return pixels(x, layout.width, name), pixels(y, layout.height, name)

    return tuple(tuple(in_pixels(*entry) for entry in enumerate(points)) for points in polygons)


def pixels(value: float | str, side: int, key: str) -> float:
    """A position in pixels, from pixels or a percentage of the side."""
    place = value
    if isinstance(value, str):
        is_good = re.fullmatch(PERCENT, value)
        require(is_good, key, value, "expected pixels, or a percentage such as 25%")
        place = Fraction(value[:-1]) * side / 100
    problem = f"outside the image, expected 0 to {side} pixels"
    require(0 <= place <= side, key, value, problem)
    return float(place)


def check_color(color: Any, layout: Layout, key: str) -> None:
    problem = "a color needs the layout's map, an image, and there is none"
    require(layout.map is not None, key, color, problem)
    is_good = not isinstance(color, str) or re.search(HEX, color)
    problem = 'expected "#rrggbb", [r, g, b] from 0 to 255, or an index'
    require(is_good, key, color, problem)
    inside = readable(partial(read_color, color=color), layout.map, key)
    empty = ""
    if not inside.any():
        colors = [f"#{bytes(rgb).hex()}" for _, rgb in colors_in(layout.map)]
        has = ", ".join(colors[:8]) or "too many colors"
        empty = f"nothing in the map is of this color; it has {has}"
        if layout.map.lower().endswith((".jpg", ".jpeg")):
            empty += "; a JPEG's are inexact"
    check_mask(inside, layout, key, color, empty)


def check_mask(inside: np.ndarray, layout: Layout, key: str, value: Any, empty: str) -> None:
    height, width = inside.shape
    size = f"{layout.width} x {layout.height}"
    problem = f"aspect ratio {width} x {height} does not match {size}"
    difference = abs(width * layout.height - height * layout.width)
    require(difference <= max(layout.width, layout.height), key, value, problem)
    require(inside.any(), key, value, empty)
