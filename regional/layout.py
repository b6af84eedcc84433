"""The layout file: YAML in, checked and frozen dataclasses out. Below this nobody checks again."""

import difflib
import os
import re
import stat
import warnings
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_type_hints

import msgspec
import numpy as np
import yaml
from msgspec import Meta, Struct
from PIL import Image, ImageChops, ImageOps

from model.errors import InputError

MAX_REGIONS = 61
MAX_BYTES = 1_000_000  # of a layout file; YAML takes up to 12 s and 280 MB for so many
MAX_NUMBER = 100  # characters of a number in it; a file full of 1:1:1:1... would take hours
MAX_PICTURE = 25_000_000  # pixels of a mask or map; reading so many takes up to 500 MB (WebP)
MAX_PICTURE_BYTES = 8 * MAX_PICTURE  # of its file
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # of all that Pillow reads; for EPS it would run Ghostscript
Where = Callable[[str], str]  # the path of a key -> how messages name it
Pixels = Annotated[int, Meta(ge=16, le=8192)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
Position = float | str  # pixels, or a share of the width or height such as 25%
Polygons = Annotated[  # msgspec can't tell a list of points from a list of lists of points; `polygons_of` can
    tuple[Any, ...],
    Meta(description="a list of at least three points [x, y], or several such lists", min_length=1),
]
Blocks = tuple[Annotated[int, Meta(ge=0)], ...] | str  # indices, or text for `blocks_of`

REPOSITORY = r"\w[\w.-]*/\w[\w.-]*(:.+)?"  # org/name, or one of its files
SHARE = r"[0-9]{1,9}(\.[0-9]{1,20})?%"  # what shares in a layout look like
SHAPES = ("box", "polygon", "mask", "color")


class Lora(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A LoRA for the whole picture. file: a path, or a repository of the hub, org/name or org/name:file. image: the
    control picture of a control LoRA."""

    file: str
    scale: Annotated[float, Meta(ge=-100, le=100)] = 1.0
    image: str | None = None


class RegionLora(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A LoRA for one region alone. plain_steps: act on the region's image tokens in the plain steps too."""

    file: str
    scale: Annotated[float, Meta(ge=-100, le=100)] = 1.0
    plain_steps: bool = False


class Control(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A ControlNet and the picture that it follows.

    model: a file or folder, or a repository of the hub, org/name or org/name:file. mode: for union models, a number or
    a name of MODES. start, end: the share of the steps in which it acts. region: the index of the one region that it
    acts on. residuals: `published` leaves the base branch without those of the single blocks, as the published code
    does. preprocess: what makes the control picture of `image`.
    """

    model: str
    image: str
    mode: Annotated[int, Meta(ge=0)] | str | None = None
    scale: Annotated[float, Meta(ge=-100, le=100)] = 0.7
    start: Annotated[float, Meta(ge=0, le=1)] = 0.0
    end: Annotated[float, Meta(ge=0, le=1)] = 1.0
    region: Annotated[int, Meta(ge=0)] | None = None
    residuals: Literal["all", "published"] = "all"
    preprocess: Literal["canny"] | None = None

    @property
    def mode_index(self) -> int | None:
        return MODES[self.mode] if isinstance(self.mode, str) else self.mode

    def acts(self, step: int, steps: int) -> bool:
        return step / steps >= self.start and (step + 1) / steps <= self.end


MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "lq": 6}  # those of every union model


class Region(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One region: its prompt, and exactly one shape.

    box: x0, y0, x1, y1 in pixels, half-open, or in shares such as 25%. polygon: points [x, y] in the same units, or
    several lists of them (even-odd). mask: a picture, white inside, of the aspect ratio of the layout. color: one of
    the layout's map, [r, g, b] or "#rrggbb", or an index.

    strength: the weight of the region's text for its image tokens, 1 as published. feather: over how many pixels its
    edge is soft. mask_inject_steps, base_ratio: its own, in place of the layout's.
    """

    prompt: str
    box: tuple[Position, Position, Position, Position] | None = None
    polygon: Polygons | None = None
    mask: str | None = None
    color: int | str | tuple[int, int, int] | None = None  # msgspec crashes on limits here; check_color has them
    strength: Annotated[float, Meta(ge=0, le=100)] = 1.0
    feather: Annotated[float, Meta(ge=0, le=8192)] = 0.0
    mask_inject_steps: int | str | None = None
    base_ratio: Ratio | None = None
    loras: tuple[RegionLora, ...] = ()

    @property
    def shape(self) -> str:
        return next(key for key in SHAPES if getattr(self, key) is not None)


class Layout(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One picture. What is None takes the model's default, or for the seed a random one.

    preset: what the settings are that are not written; `published`, the defaults below, or `control`, see PRESETS.
    double_blocks, single_blocks: which blocks' attention is masked, in place of the intervals: "every 2", "0-18",
    "0-4, 8" or a list. map: a picture of the regions that are given by color. image_attention: `open` lets all image
    tokens see each other. base_stream: `shared` has one image stream in the single blocks too; cheaper, not the
    published method.
    """

    prompt: str
    background_prompt: str = "a photo"
    width: Pixels = 1024
    height: Pixels = 1024
    steps: Annotated[int, Meta(ge=1, le=10000)] | None = None
    guidance: Annotated[float, Meta(ge=0, le=1000)] = 3.5
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    base_ratio: Ratio = 0.3
    mask_inject_steps: int | str = "40%"
    double_inject_interval: Annotated[int, Meta(ge=1)] = 1
    single_inject_interval: Annotated[int, Meta(ge=1)] = 1
    double_blocks: Blocks | None = None
    single_blocks: Blocks | None = None
    image_attention: Literal["isolated", "open"] = "isolated"
    base_stream: Literal["separate", "shared"] = "separate"
    max_sequence_length: Annotated[int, Meta(ge=2, le=4096)] | None = None
    region_max_sequence_length: Annotated[int, Meta(ge=2, le=4096)] | str | None = None
    preset: Literal["published", "control"] = "published"
    map: str | None = None
    overlap: Literal["share", "last", "first", "smallest"] = "share"
    method: Literal["regional", "rpg", "plain"] = "regional"
    loras: tuple[Lora, ...] = ()
    controlnets: tuple[Control, ...] = ()
    regions: tuple[Region, ...] = ()

    def steps_and_ratios(self, steps: int) -> list[tuple[int, float]]:
        """For each region, and last for the background: how many of `steps` are regional, and its base_ratio in them.

        None are at base_ratio 1 or by the plain method: both are plain FLUX.
        """
        own = [(region.mask_inject_steps, region.base_ratio) for region in self.regions] + [(None, None)]
        found = []
        for count, ratio in own:
            ratio = self.base_ratio if ratio is None else ratio
            count = count_of(self.mask_inject_steps if count is None else count, steps)
            found.append((0 if ratio == 1 or self.method == "plain" else count, ratio))
        return found

    def regional_steps(self, steps: int) -> int:
        """How many of `steps` may be regional; none are without regions."""
        return max(count for count, _ in self.steps_and_ratios(steps)) if self.regions else 0

    def is_masked(self, kind: str, index: int) -> bool:
        """Whether the attention of this block, double or single, is masked in the regional steps."""
        blocks = getattr(self, f"{kind}_blocks")
        return index % getattr(self, f"{kind}_inject_interval") == 0 if blocks is None else blocks_of(blocks, index)

    def region_length(self, length: int) -> int:
        """How many text tokens each region has where the base prompt has `length`: as many, a count or a share."""
        if isinstance(self.region_max_sequence_length, str):
            return max(2, share_of(self.region_max_sequence_length, length))
        return self.region_max_sequence_length or length


def count_of(count: int | str, whole: int) -> int:
    """A count, or with % a share, of a whole: at most all of it."""
    return share_of(count, whole) if isinstance(count, str) else min(count, whole)


BLOCK_RANGE = r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?"


def blocks_of(blocks: tuple[int, ...] | str, index: int) -> bool:
    """Is the block of this index among them? ValueError if the text is none of "every 2", "0-18" and "0-4, 8"."""
    if not isinstance(blocks, str):
        return index in blocks
    if every := re.fullmatch(r"\s*every\s+([1-9][0-9]{0,8})\s*", blocks):
        return index % int(every[1]) == 0
    ranges = [re.fullmatch(BLOCK_RANGE, part) for part in blocks.split(",")]
    if not all(ranges):
        raise ValueError(blocks)
    return any(int(low) <= index <= int(high or low) for low, high in (r.groups() for r in ranges))


def share_of(share: str, whole: int) -> int:
    """A share such as 40% of a count, rounded half up."""
    return int(Fraction(share.rstrip("%")) * whole / 100 + Fraction(1, 2))


# Settings by the number of regions. `control` is what held best as regions grow, measured in docs/control: less of the
# base prompt, more regional steps for many regions, and texts of a quarter of the base prompt's length.
PRESETS: dict[str, Callable[[int], dict[str, Any]]] = {
    "published": lambda regions: {},
    "control": lambda regions: {
        "base_ratio": 0.1,
        "mask_inject_steps": "40%" if regions <= 6 else "60%",
        "region_max_sequence_length": "25%",
    },
}


# the command line's names of a ControlNet's keys
CONTROL_FLAGS = {key: f"control_{key}" for key in ("image", "mode", "scale", "start", "end")}
CONTROL_FLAGS |= {"model": "controlnet", "preprocess": "preprocess"}


def naming(file: Path | None, overrides: dict[str, Any]) -> Where:
    """How messages name a key of a layout: by its file, or by the flag that it comes from."""
    name = shown(file or "the command line")

    def where(path: str) -> str:
        if path.startswith("controlnets[") and "controlnets" in overrides:
            return f"the command line: --{CONTROL_FLAGS[path.rpartition('.')[2]].replace('_', '-')}"
        return f"the command line: --{path.replace('_', '-')}" if path in overrides else f"{name}: {path}"

    return where


def read_layout(
    file: Path | None, overrides: dict[str, Any], size: int = 1024, carried: dict[str, Any] | None = None
) -> Layout:
    """Read a layout, with `overrides` (from the command line) in place of what it says and `size` x `size` pixels
    where neither says anything. Mask paths come out absolute or relative to the working directory. carried: in place of
    the file, what a picture carries of how it was made.

    Raises InputError, one sentence that names the file, the key and the value.
    """
    written = read_yaml(file) if file else {}
    if carried is not None:
        written = {key: value for key, value in carried.items() if key in Layout.__struct_fields__}
    if not isinstance(written, dict):
        raise InputError(f"{shown(file)}: expected a mapping of keys to values, found {describe(written)}.")
    data = {"width": size, "height": size, **written, **overrides}
    name, where = shown(file or "the command line"), naming(file, overrides)
    layout = convert(data, where, name)
    settings = PRESETS[layout.preset](len(layout.regions))
    layout = msgspec.structs.replace(layout, **{key: value for key, value in settings.items() if key not in data})
    folder = file.parent if file else Path()
    replace = msgspec.structs.replace

    def picture(file: str | None) -> str | None:
        return None if file is None else str(folder / file)

    def placed(loras: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(replace(lora, file=beside(folder, lora.file)) for lora in loras)

    regions = [
        in_pixels(replace(r, mask=picture(r.mask), loras=placed(r.loras)), layout, where(f"regions[{i}]"))
        for i, r in enumerate(layout.regions)
    ]
    loras, controls = layout.loras, layout.controlnets
    if "loras" not in overrides:
        loras = [replace(lora, image=picture(lora.image)) for lora in placed(loras)]
    if "controlnets" not in overrides:
        controls = [replace(c, model=beside(folder, c.model), image=picture(c.image)) for c in controls]
    layout = replace(
        layout, map=picture(layout.map), loras=tuple(loras), controlnets=tuple(controls), regions=tuple(regions)
    )
    check(layout, where)
    return layout


def in_pixels(region: Region, layout: Layout, where: str) -> Region:
    """The region with its box and polygons in pixels, and its polygons a list of lists of points."""

    def pixels(value: Any, side: int, key: str) -> float:
        if isinstance(value, str) and re.fullmatch(SHARE, value):
            return float(Fraction(value[:-1]) * side / 100)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e9:
            raise InputError(f"{where}.{key} = {describe(value)}: expected pixels, or a share such as 25%.")
        return float(value)

    sides = (layout.width, layout.height)
    box, polygon = region.box, region.polygon
    if box is not None:
        box = tuple(pixels(value, side, f"box[{i}]") for i, (value, side) in enumerate(zip(box, sides * 2)))
    if polygon is not None:
        polygon = tuple(
            tuple(tuple(pixels(value, side, "polygon") for value, side in zip(point, sides)) for point in points)
            for points in polygons_of(polygon, f"{where}.polygon")
        )
    return msgspec.structs.replace(region, box=box, polygon=polygon)


def polygons_of(polygon: Any, where: str) -> list[Any]:
    def is_point(value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and not any(isinstance(v, (list, tuple)) for v in value)
        )

    polygons = [polygon] if all(map(is_point, polygon)) else polygon
    for points in polygons:
        if not isinstance(points, (list, tuple)) or len(points) < 3 or not all(map(is_point, points)):
            raise InputError(
                f"{where} = {describe(list(polygon))}: expected at least three points [x, y], or lists of them."
            )
    return polygons


def beside(folder: Path, name: str) -> str:
    """A file or folder by its path from the layout's folder; as it is if it can only be a repository of the hub."""
    path = folder / name
    exists = os.path.exists(path)  # False also for names that no file can have
    if is_broken(name) or exists and not (path.is_file() or path.is_dir()):
        raise InputError(f"{shown(path)}: it is neither a file nor a folder.")
    if exists:
        return str(path)
    if re.fullmatch(REPOSITORY, name):
        return name
    return f"./{path}" if re.fullmatch(REPOSITORY, str(path)) else str(path)  # no repository: its error would mislead


TAG = "tag:yaml.org,2002:"
TAGS = {TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null")}


def read_yaml(file: Path) -> Any:
    """A layout file's values: those that JSON has, of a bounded number, with no key written twice."""
    try:
        check_file(file, MAX_BYTES)
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        check_node(node, {})
        return loader.construct_document(node)
    except FileNotFoundError:
        raise InputError(f"{shown(file)}: there is no such layout file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{shown(file)}: cannot be read as a text file ({shown(error)}).") from None
    except yaml.YAMLError as error:
        raise InputError(f"{shown(file)}: {yaml_problem(error)}.") from None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:  # values such as !!int ""
        raise InputError(f"{shown(file)}: a value that YAML can't read ({shown(error)}).") from None


def check_file(file: str | Path, most: int) -> None:
    """OSError for what is not to be read: pipes and devices, which may never end, and more bytes than `most`."""
    about = os.stat(file)
    if not stat.S_ISREG(about.st_mode):
        raise OSError("it is no file")
    if about.st_size > most:
        raise OSError(f"its {about.st_size:,} bytes are more than {most:,}")


def check_node(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How much text a node stands for, each alias counted as what it stands for. YAMLError for what no layout holds.
    sizes: those of the nodes seen, by their ids; 0 while we are in one."""
    if id(node) in sizes:
        return sizes[id(node)] or refuse(node, "a value that holds itself")
    sizes[id(node)] = 0
    if node.tag not in TAGS:
        refuse(node, f"{describe(node.tag.removeprefix(TAG))} is no kind of value of a layout; write text in quotes")
    size = 1
    if isinstance(node, yaml.ScalarNode):
        size += len(node.value)
        if size > MAX_NUMBER and node.tag != TAG + "str":
            refuse(node, f"a number of more than {MAX_NUMBER} characters")
        if is_broken(node.value):  # whole pairs, as JSON writes an emoji, are put together
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    elif isinstance(node, yaml.MappingNode):
        check_keys([key for key, _ in node.value])
        size += sum(len(key.value) + check_node(value, sizes) for key, value in node.value)
    else:
        size += sum(check_node(value, sizes) for value in node.value)
    if size > 2 * MAX_BYTES:
        refuse(node, "too much text, with each alias counted as what it stands for")
    sizes[id(node)] = size
    return size


def check_keys(keys: list[yaml.Node]) -> None:
    """YAMLError for keys that are no words, and for one written twice: plain YAML lets the last one win silently."""
    seen = set()
    for key in keys:
        if key.tag not in (TAG + "str", TAG + "merge") or not re.fullmatch(r"[\w .-]{1,60}|<<", key.value):
            name = describe(key.value) if isinstance(key, yaml.ScalarNode) else "that is a list"
            refuse(key, f"the key {name} is no word")
        if key.value in seen:
            refuse(key, f"the key {key.value} is written twice")
        seen.add(key.value)


def refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {problem}")


def yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = " ".join((getattr(error, "problem", None) or str(error)).split())
    if "'\\t'" in problem:
        problem = "a tab is used for indentation, YAML wants spaces"
    return f"line {mark.line + 1}, column {mark.column + 1}: {shown(problem)}" if mark else shown(problem)


def convert(data: dict, where: Where, name: str) -> Layout:
    """Check types, ranges and names. msgspec's error holds the path of the culprit; the value is looked up there."""
    try:
        return msgspec.convert(data, Layout)
    except msgspec.ValidationError as error:
        message, _, path = str(error).rpartition(" - at `$")
        message, path = (message, path) if message else (path, "")  # nothing is said of the root
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: {describe(error.object)}: half of a surrogate pair is no text.") from None
    path = path.rstrip("`").lstrip(".")
    if field := re.search(r"(?s)unknown field `(.*)`", message):
        known = struct_at(path)
        value = describe(value_at(data, path)[field[1]])
        key = f"{path}.{field[1]}" if path else field[1]
        raise InputError(f"{where(shown(key))} = {value}: no such key{hint(field[1], known)}.")
    if field := re.search(r"missing required field `(.*)`", message):
        raise InputError(f"{name}: {path + '.' if path else ''}{field[1]} is missing.")
    value, message = value_at(data, path), shown(message[0].lower() + message[1:].replace("`", ""))
    quote = "; write it in quotes" if "expected str" in message and isinstance(value, (bool, int, float)) else ""
    raise InputError(f"{where(path)} = {describe(value)}: {message}{quote}.")


def struct_at(path: str) -> type[Struct]:
    """What stands at a path such as regions[1].loras[0]."""
    struct = Layout
    for key in re.findall(r"([^.\[\]]+)\[\d+\]", path):
        struct = get_args(get_type_hints(struct)[key])[0]
    return struct


def value_at(data: Any, path: str) -> Any:
    """The value at a path such as regions[1].box."""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        data = data[int(index)] if index else data[key]
    return data


def describe(value: Any, most: int = 80) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of more than 4300 digits
        return f"{type(value).__name__} of a size that can't be shown"
    return text if len(text) <= most else text[: most - 3] + "..."


def shown(name: Any) -> str:
    """A name or message as it is, or quoted, cut and in one line where it would break lines or fill the screen."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 1000 else describe(text, 1000)


def hint(key: str, known: type[Struct]) -> str:
    close = difflib.get_close_matches(key, known.__struct_fields__, 1)
    return f", did you mean {close[0]}" if close else f"; known keys are {', '.join(known.__struct_fields__)}"


def check(layout: Layout, where: Where) -> None:
    """What types alone do not say."""
    for key in ("width", "height"):
        if (value := getattr(layout, key)) % 16:
            low = value // 16 * 16
            raise InputError(f"{where(key)} = {value}: not a multiple of 16, the nearest are {low} and {low + 16}.")
    check_steps(layout.mask_inject_steps, where("mask_inject_steps"))
    for key in ("double_blocks", "single_blocks"):
        try:
            layout.is_masked(key.removesuffix("_blocks"), 0)
        except ValueError as error:
            expected = 'expected "every 2", "0-18", "0-4, 8" or a list of indices'
            raise InputError(f"{where(key)} = {describe(str(error))}: {expected}.") from None
    length = layout.region_max_sequence_length
    if isinstance(length, str) and not (re.fullmatch(SHARE, length) and 0 < float(length[:-1]) <= 100):
        name = f"{where('region_max_sequence_length')} = {describe(length)}"
        raise InputError(f"{name}: expected a count, or a share of max_sequence_length such as 25%.")
    for key in ("prompt", "background_prompt"):
        check_text(getattr(layout, key), where(key))
    if len(layout.regions) > MAX_REGIONS:
        raise InputError(f"{where('regions')} has {len(layout.regions)} entries: at most {MAX_REGIONS} are possible.")
    if layout.map:
        readable(read_picture, layout.map, where("map"))
    for i, region in enumerate(layout.regions):
        check_region(region, layout, where(f"regions[{i}]"))
    for i, lora in enumerate(layout.loras):
        if lora.image:
            readable(read_picture, lora.image, where(f"loras[{i}].image"))
    for i, control in enumerate(layout.controlnets):
        check_control(control, layout, lambda key, i=i: where(f"controlnets[{i}].{key}"))


def check_steps(value: int | str, where: str) -> None:
    if isinstance(value, str):
        if not re.fullmatch(SHARE, value) or float(value[:-1]) > 100:
            raise InputError(f"{where} = {describe(value)}: expected a count, or a share such as 40%.")
    elif value < 0:
        raise InputError(f"{where} = {value}: expected a count of steps from 0 on.")


def check_text(text: str, where: str) -> None:
    if is_broken(text):
        raise InputError(f"{where} = {describe(text)}: half of a surrogate pair is no text.")


def is_broken(text: str) -> bool:
    return re.search("[\ud800-\udfff]", text) is not None


def check_region(region: Region, layout: Layout, where: str) -> None:
    if not region.prompt.strip():
        raise InputError(f"{where}.prompt = {describe(region.prompt)}: a region needs a prompt.")
    check_text(region.prompt, f"{where}.prompt")
    shapes = [key for key in SHAPES if getattr(region, key) is not None]
    if len(shapes) != 1:
        has = " and ".join(shapes) or "no shape"
        raise InputError(f"{where} has {has}: a region needs exactly one of {', '.join(SHAPES)}.")
    if region.mask_inject_steps is not None:
        check_steps(region.mask_inject_steps, f"{where}.mask_inject_steps")
    if region.box:
        check_box(region.box, layout, f"{where}.box")
    elif region.polygon:
        check_polygon(region.polygon, layout, f"{where}.polygon")
    elif region.mask:
        check_mask(region.mask, layout, f"{where}.mask", read_mask, "white, no pixel reaches 128")
    else:
        check_color(region.color, layout, f"{where}.color")


def check_polygon(polygons: Any, layout: Layout, where: str) -> None:
    for x, y in (point for points in polygons for point in points):
        if not (0 <= x <= layout.width and 0 <= y <= layout.height):
            raise InputError(f"{where} has the point [{x:g}, {y:g}], outside {layout.width} x {layout.height}.")


def check_color(color: Any, layout: Layout, where: str) -> None:
    if layout.map is None:
        raise InputError(f"{where} = {describe(color)}: a color needs the layout's map, a picture, and there is none.")
    shown = describe(list(color) if isinstance(color, tuple) else color)
    is_text = isinstance(color, str) and re.fullmatch("#[0-9a-fA-F]{6}", color)
    is_index = isinstance(color, int) and 0 <= color < 2**24
    if not (is_text or is_index or isinstance(color, tuple) and all(0 <= value <= 255 for value in color)):
        raise InputError(f'{where} = {shown}: expected "#rrggbb", [r, g, b] from 0 to 255, or an index.')
    read = partial(read_color, color=color)
    check_mask(layout.map, layout, f"{where} = {shown}: map", read, "of this color")


def check_box(box: tuple[float, ...], layout: Layout, where: str) -> None:
    numbers = [int(v) if v == int(v) else v for v in box] if all(abs(v) < 1e9 for v in box) else list(box)
    x0, y0, x1, y1 = box
    for name, value, end, side in (
        ("x0", x0, layout.width, "width"), ("y0", y0, layout.height, "height"),
        ("x1", x1, layout.width, "width"), ("y1", y1, layout.height, "height"),
    ):  # fmt: skip
        if not 0 <= value <= end:
            raise InputError(f"{where} = {numbers}: {name} = {value:g} lies outside {side} {end}.")
    for low, high, axis in ((x0, x1, "x"), (y0, y1, "y")):
        if low >= high:
            raise InputError(f"{where} = {numbers}: the box is empty, {axis}0 must be smaller than {axis}1.")


def check_control(control: Control, layout: Layout, where: Where) -> None:
    if control.start >= control.end:
        raise InputError(f"{where('start')} = {control.start:g}: not before its end, {control.end:g}.")
    if isinstance(control.mode, str) and control.mode not in MODES:
        raise InputError(
            f"{where('mode')} = {describe(control.mode)}: expected a number, or one of {', '.join(MODES)}."
        )
    if control.region is not None and control.region >= len(layout.regions):
        count = len(layout.regions)
        raise InputError(f"{where('region')} = {control.region}: the layout has {count} regions, counted from 0.")
    readable(read_picture, control.image, where("image"))


def readable(read: Callable[[str], Any], file: str, where: str) -> Any:
    """What `read` makes of a picture's file; InputError if it can't."""
    try:
        return read(file)
    except FileNotFoundError:
        raise InputError(f"{where} = {shown(file)}: there is no such file.") from None
    except Exception as error:  # of broken files Pillow raises almost any: TypeError, SyntaxError, struct.error ...
        raise InputError(f"{where} = {shown(file)}: not a picture that can be read ({shown(error)}).") from None


def check_mask(mask: str, layout: Layout, where: str, read: Callable[[str], np.ndarray], what: str) -> None:
    inside = readable(read, mask, where)
    height, width = inside.shape
    if abs(width * layout.height - height * layout.width) > max(layout.width, layout.height):
        raise InputError(
            f"{where} = {shown(mask)}: its {width} x {height} pixels have not the aspect ratio of "
            f"{layout.width} x {layout.height}."
        )
    if not inside.any():
        raise InputError(f"{where} = {shown(mask)}: nothing in it is {what}.")


quiet = partial(warnings.catch_warnings, action="ignore")  # what matters of Pillow's warnings is an error here


def opened(file: str) -> Image.Image:
    check_file(file, MAX_PICTURE_BYTES)
    with quiet():
        picture = Image.open(file, formats=FORMATS)
    if picture.width * picture.height > MAX_PICTURE:
        picture.close()
        raise ValueError(f"its {picture.width} x {picture.height} pixels are more than {MAX_PICTURE:,}")
    return picture


def read_mask(file: str) -> np.ndarray:
    """A mask picture as (rows, columns) bool: inside is what is white, from 128 of 255 on; transparent is outside."""
    with quiet(), opened(file) as picture:
        if picture.mode.startswith("I"):  # 16 bits: Pillow's own conversion would take all above 255 for white
            return np.asarray(picture) >= 128 * 257
        if picture.has_transparency_data:
            gray, alpha = picture.convert("LA").split()
            return np.asarray(ImageChops.multiply(gray, alpha)) >= 128
        return np.asarray(picture.convert("L")) >= 128


def read_color(file: str, color: Any) -> np.ndarray:
    """Which pixels of a map have this color, (rows, columns) bool. An index is a palette's or a gray value; in a map of
    colors R + 256 G + 65536 B, as in COCO's panoptic pictures."""
    with quiet(), opened(file) as picture:
        if isinstance(color, int) and picture.mode in ("1", "L", "P") or picture.mode.startswith("I"):
            return np.asarray(picture) == color
        if isinstance(color, int):
            color = (color & 255, color >> 8 & 255, color >> 16)
        elif isinstance(color, str):
            color = bytes.fromhex(color[1:])
        return np.logical_and.reduce(
            [np.asarray(band) == value for band, value in zip(picture.convert("RGB").split(), color)]
        )


def read_picture(file: str) -> Image.Image:
    """A control picture as RGB, upright; of 16 bits the upper 8."""
    with quiet(), opened(file) as picture:
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        ImageOps.exif_transpose(picture, in_place=True)
        return picture.convert("RGB")


PERCENT = r"^0{0,6}(100(\.0{1,20})?|[0-9]{1,2}(\.[0-9]{1,20})?)%$"  # a SHARE of at most all


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a layout file, for editors: the dataclasses, what their docstrings say of each key, and as
    much of `check` as a schema can say. Sizes that depend on each other and files that it names are left to the reader.
    """
    _, parts = msgspec.json.schema_components([Layout], ref_template="#/$defs/{name}")
    count_or_share = {"integer": {"minimum": 0}, "string": {"pattern": PERCENT}}
    blocks = {"string": {"pattern": rf"^(\s*every\s+[1-9][0-9]{{0,8}}\s*|{BLOCK_RANGE}(,{BLOCK_RANGE})*)$"}}
    position = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 8192}, {"type": "string", "pattern": PERCENT}]}
    points = {"type": "array", "minItems": 3, "items": {"type": "array", "prefixItems": [position] * 2, "minItems": 2}}
    points["items"]["items"] = False  # as all beyond prefixItems
    narrower = {
        "Layout": {
            "width": {"integer": {"multipleOf": 16}},
            "height": {"integer": {"multipleOf": 16}},
            "mask_inject_steps": count_or_share,
            "double_blocks": blocks,
            "single_blocks": blocks,
            "region_max_sequence_length": {"string": {"pattern": f"(?!^[0.]*%){PERCENT}"}},
            "map": {"string": {"minLength": 1}},
            "regions": {"array": {"maxItems": MAX_REGIONS}},
        },
        "Region": {
            "prompt": {"string": {"pattern": r"\S"}},
            "box": {"array": {"prefixItems": [position] * 4}},
            "polygon": {"array": {"anyOf": [points, {"items": points}]}},
            "mask": {"string": {"minLength": 1}},
            "color": {
                "integer": {"minimum": 0, "maximum": 2**24 - 1},
                "string": {"pattern": "^#[0-9a-fA-F]{6}$"},
                "array": {"prefixItems": [{"type": "integer", "minimum": 0, "maximum": 255}] * 3},
            },
            "mask_inject_steps": count_or_share,
        },
        "Control": {"mode": {"string": {"enum": list(MODES)}}},
    }
    for name, part in parts.items():
        keys = part["properties"]
        names = f"(?:{'|'.join(keys)})"
        part["description"], *about = re.split(rf" ?\b({names}(?:, {names})*): ", " ".join(part["description"].split()))
        for said, meaning in zip(about[::2], about[1::2]):
            for key in said.split(", "):
                keys[key]["description"] = meaning
        for key, limits in narrower.get(name, {}).items():
            for option in keys[key].get("anyOf", [keys[key]]):
                option.update(limits.get(option.get("type"), {}))
    given = {key: {"required": [key], "properties": {key: {"not": {"type": "null"}}}} for key in SHAPES + ("map",)}
    parts["Region"]["oneOf"] = [given[key] for key in SHAPES]
    colored = {"required": ["regions"], "properties": {"regions": {"contains": given["color"]}}}
    layout = {**parts.pop("Layout"), "title": "Regional FLUX layout", "if": colored, "then": given["map"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **layout, "$defs": parts}


if __name__ == "__main__":  # python -m regional.layout > docs/layout.schema.json
    print(msgspec.json.format(msgspec.json.encode(json_schema()), indent=2).decode())
