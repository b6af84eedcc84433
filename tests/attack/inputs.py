"""Broken and hostile files, made from good ones: bytes, JSON, headers of checkpoints, images and their metadata."""

import io
import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

from PIL import Image, PngImagePlugin

DEEP = "<deep>"
DIGITS = "<digits>"
NASTY = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 2**64, 0.5, -0.0, 1e308, 5e-324, 4.0, "", " ", "3",
    "a" * 5000, "\x1b[2J", "a\nb", "\u202e", "\ud800", "../../x", "/dev/zero", "\x00", "F32", "F8_E4M3",
    "GGUF Q4_K", "9" * 400,
    [], {}, [[]], [None], [-1], [0], [0, 0], [1, 2, 3], [4.0, 4.0], [2**62, 2**62], ["a", "b"],
    [[0, 0], [9, 9], [0, 9]],
    {"": 0}, {"a": {"b": [1]}}, DEEP, DIGITS,
]  # fmt: skip
KEYS = ["", "a", "prompt", "width", "__metadata__", "\x1b[31m", "x" * 3000, "\ud800", "../a", "0", "-1", "data_offsets"]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all parts of a JSON value, its own, (), first."""
    found = [path]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in entries:
        found += places(part, (*path, key))
    return found


def replaced(value: Any, path: tuple, change: Callable[[Any], Any]) -> Any:
    """A copy in which the part at this path is changed."""
    if not path:
        return change(value)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], change)
    return copy


def other_value(rng: random.Random, value: Any) -> Any:
    """Some value in the place of this one, often of its type."""
    draw = rng.random()
    if isinstance(value, (int, float)) and draw < 0.4:
        return rng.choice([-value, value + 1, value * 1000, float(value), str(value), 2**62, value - 10**6])
    if isinstance(value, str) and draw < 0.4:
        return mutated_bytes(rng, value.encode(errors="ignore")).decode(errors="replace")
    if isinstance(value, list) and value and draw < 0.5:
        entry = rng.choice(value)
        return rng.choice([value * 2, value[1:], value[:-1], [*value, entry], entry, [value], value * 50])
    if isinstance(value, dict) and value and draw < 0.5:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rng.choice(
            [rest, {**rest, rng.choice(KEYS): value[key]}, {**value, rng.choice(KEYS): rng.choice(NASTY)}]
        )
    return rng.choice(NASTY)


def mutated(rng: random.Random, value: Any) -> Any:
    """A JSON value with one to three parts replaced."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(places(value)[-400:] if rng.random() < 0.3 else places(value)[:400])
        value = replaced(value, path, lambda part: other_value(rng, part))
    return value


def to_json(value: Any) -> bytes:
    """JSON, in which DEEP and DIGITS stand for what no library would write."""
    text = json.dumps(value, ensure_ascii=False).replace(f'"{DEEP}"', "[" * 50000).replace(f'"{DIGITS}"', "9" * 6000)
    return text.encode(errors="surrogatepass")


def mutated_json(rng: random.Random, text: bytes) -> bytes:
    return to_json(mutated(rng, json.loads(text)))


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, cut, doubled, inserted or overwritten."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        some = bytes(rng.choice((0, 1, 10, 32, 34, 91, 123, 127, 128, 255)) for _ in range(rng.choice((1, 2, 8))))
        draw = rng.random()
        if draw < 0.4 and data:
            data[at - 1] ^= 1 << rng.randrange(8)
        elif draw < 0.55:
            data[at:] = b""
        elif draw < 0.7:
            data[at:at] = some
        elif draw < 0.85:
            data[at : at + len(some)] = some
        else:
            data[at:at] = data[at : at + rng.randrange(64)] * rng.choice((1, 2, 50))
    return bytes(data)


def either(rng: random.Random, data: bytes) -> bytes:
    """Text or binary: its bytes, or, where it is JSON, its structure."""
    if data[:1] in b"{[" and rng.random() < 0.7:
        return mutated_json(rng, data)
    return mutated_bytes(rng, data)


def or_large(make: Callable[[random.Random], str], otherwise: Callable) -> Callable[[random.Random, bytes], bytes]:
    """In one of 200 cases a file that is valid, or nearly, and as costly as its size allows."""
    return lambda rng, data: make(rng).encode() if rng.random() < 0.005 else otherwise(rng, data)


def points(rng: random.Random, count: int, side: int, shape: str) -> list[list[int]]:
    """Points of a polygon whose edges go from top to bottom, from left to right, or anywhere."""
    size = 16 if shape == "small" else side
    found = [[rng.randrange(size), rng.randrange(size)] for _ in range(count)]
    if shape in ("tall", "wide"):
        for i, point in enumerate(found):
            point[shape == "tall"] = i % 2 * side
    return found


def costly_layout(rng: random.Random) -> str:
    """Many regions and points, large feathers, on a large image."""
    side, count = rng.choice((1024, 8192)), rng.choice((1, 2, 61))
    length = rng.choice((3, 100, 2000 // count, 8000 // count))
    shape = rng.choice(("tall", "wide", "small", "any"))
    layout = {"prompt": "a", "width": side, "height": side, "overlap": rng.choice(("share", "smallest", "last"))}
    regions = []
    for i in range(count):
        region = {"prompt": f"b{i}", "feather": rng.choice((0, 40, 8192, rng.uniform(0, 8192))), "mask_inject_steps": i}
        polygon = points(rng, max(3, length), side, shape)
        if rng.random() < 0.3:
            polygon = [polygon[k : k + 3] for k in range(0, len(polygon) - 2, 3)]
        if rng.random() < 0.3:
            region["box"] = [rng.randrange(side // 2), 0, side, rng.uniform(1, side)]
        else:
            region["polygon"] = polygon
        regions.append(region)
    layout["regions"] = regions
    return json.dumps(layout, separators=(",", ":"))


def large_layout(rng: random.Random) -> str:
    text = costly_layout(rng)
    if rng.random() < 0.3:  # YAML, in which an alias stands for a point
        side, length = rng.choice((1024, 8192)), rng.choice((100, 10000, 30000))
        names = [f"&{chr(97 + i)} {[rng.randrange(side), i % 2 * side]}" for i in range(26)]
        aliases = ",".join(f"*{chr(97 + rng.randrange(13) * 2 + i % 2)} " for i in range(length))
        text = f"prompt: a\nwidth: {side}\nheight: {side}\nregions:\n- prompt: b\n"
        text += f"  polygon: [{','.join(names)},{aliases}]\n"
    return text


def large_split(rng: random.Random) -> str:
    """A plan of RPG that repeats something a thousand times or more."""
    part = rng.choice(
        ("Final split ratio:", "Regional Prompt:", "1,", "1;", "1.1;", "9", " BREAK ", "ADDCOL ", "\n", " ")
    )
    before, between = rng.choice(("", "Final split ratio: ", "1,1")), rng.choice(("", "\nRegional Prompt: a BREAK "))
    return before + part * rng.choice((1000, 50000, 500000)) + between + part * rng.choice((0, 1000, 50000))


def large_annotations(rng: random.Random) -> str:
    """COCO's, many or with many polygons, of a large image."""
    side, count = rng.choice((640, 8192, 16384)), rng.choice((1, 20, 61, 1000))
    shape = rng.choice(("tall", "wide", "small", "any"))
    annotations = []
    for i in range(count):
        polygons = [
            points(rng, rng.choice((3, 5, 3000 // count + 3)), side, shape) for _ in range(rng.choice((1, 3, 20)))
        ]
        outline = [sum(polygon, []) for polygon in polygons]
        annotations.append({"id": i, "image_id": 1, "category_id": 1, "segmentation": outline})
    image = {"id": 1, "width": side, "height": side}
    return json.dumps({"images": [image], "categories": [{"id": 1, "name": "a"}], "annotations": annotations})


def as_python(rng: random.Random, data: bytes) -> bytes:
    """JSON as a Python literal, sometimes with tuples, sets, and what JSON has not."""
    text = repr(mutated(rng, json.loads(data)))
    lists = r"\[([^][{}()]+)\]"
    text = re.sub(lists, rng.choice((r"[\1]", r"(\1,)", r"{\1}")), text, count=rng.choice((1, 5)))
    more = rng.choice(
        ("", "", "nan", "{1, 2}", "...", "b'a'", "1j", "9" * 5000, "-" * 5000 + "1", "(" * 500, "1+" * 5000 + "1")
    )
    return text.replace(rng.choice("0123"), more or "7", 1).encode(errors="surrogatepass")


def either_or_python(rng: random.Random, data: bytes) -> bytes:
    return as_python(rng, data) if rng.random() < 0.2 else either(rng, data)


def mutated_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header is changed; its length is right, mostly."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    length = struct.unpack("<Q", data[:8])[0]
    text = mutated_json(rng, data[8 : 8 + length])
    if rng.random() < 0.1:
        length = rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**40, 2**63))
    else:
        length = len(text)
    return struct.pack("<Q", length) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


def image_bytes(image: Image.Image, form: str, metadata: str | None = None) -> bytes:
    """An image file that carries this text as the program's images carry their layout."""
    how: dict[str, Any] = {}
    if metadata is not None and form == "PNG":
        how["pnginfo"] = PngImagePlugin.PngInfo()
        how["pnginfo"].add_text("layout", metadata)
    elif metadata is not None:
        exif = Image.Exif()
        exif[0x010E] = metadata
        how["exif"] = exif
    data = io.BytesIO()
    image.save(data, form, **how)
    return data.getvalue()


def mutated_carrier(metadata: bytes, rng: random.Random, carrier: bytes) -> bytes:
    """An image whose metadata are changed, or which is itself."""
    form = rng.choice(("PNG", "JPEG", "WEBP"))
    image = Image.new("RGB", (8, 8))
    draw = rng.random()
    if draw < 0.05:  # numbers where there should be text
        exif = Image.Exif()
        exif[0x010E] = rng.choice((5, 70000, b"\xff[", b"5"))
        data = io.BytesIO()
        image.save(data, "JPEG", exif=exif)
        return data.getvalue()
    text = mutated_json(rng, metadata) if draw < 0.8 else metadata
    try:
        data = image_bytes(image, form, text.decode(errors="replace"))
    except (ValueError, struct.error, OSError):  # more than the format holds
        data = image_bytes(image, "PNG", text[:1000].decode(errors="replace"))
    return mutated_bytes(rng, rng.choice((data, carrier))) if draw >= 0.7 else data


def mutated_png(rng: random.Random, data: bytes) -> bytes:
    """A PNG whose bytes or texts are changed."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, data)
    texts = PngImagePlugin.PngInfo()
    with Image.open(io.BytesIO(data)) as image:
        for key, text in image.info.items():
            texts.add_text(key, either(rng, text.encode()).decode(errors="replace"))
        made = io.BytesIO()
        image.save(made, "PNG", pnginfo=texts)
    return made.getvalue()


def large_drawing(rng: random.Random) -> str:
    """An SVG that repeats something as often as it may."""
    part = rng.choice(
        ("<g>", '<g id="a">', "<g/>", "<!-- -->", "M0 0h9v9z", "a9 9 0 0 1 9 9", "1" * 99, " ", "scale(", ",")
    )
    count = rng.choice((1000, 40000, 400000))
    if part.startswith("<"):
        return f'<svg width="9" height="9">{part * count}{"</g>" * count * ("/" not in part)}</svg>'
    key, tag = rng.choice(
        (("d", "path"), ("transform", "path"), ("points", "polygon"), ("id", "rect"), ("width", "rect"))
    )
    return f'<svg width="9" height="9"><{tag} {key}="{part * count}"/></svg>'
