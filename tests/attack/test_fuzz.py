"""Whatever a layout file holds, it becomes a Layout whose regions can be rasterized, or gets one
sentence for each mistake, in bounded time and memory.

By default a few hundred random layouts are tried, the same in each run. `pytest -m attack` tries
others for FUZZ_SECONDS, 25 by default, in each of two tests.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, PngImagePlugin

import generate
from errors import LAYOUT, MAX_PIXELS, InputError
from extensions.repaint import repainted
from regional.layout import FLUX_DEV, Control, Layout, Lora, Region, RegionLora, Repaint, Start
from regional.mask import region_tokens
from regional.reader import read_layout

ROOT = Path(__file__).parents[2]
LAYOUTS = [ROOT / "layout.yaml", *sorted((ROOT / "examples").glob("*.yaml"))]
CASES = 300  # near validity, and with changed bytes
BOX = float(os.environ.get("FUZZ_SECONDS", 25))
MEMORY = 1000  # MB
SECONDS = 60  # for one layout on a slow machine


def read(file: Path) -> str | None:
    """None for a layout that is good for all that a run asks of it, or the sentences it gets."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            layout = read_layout(file, {})
        except InputError as error:
            for line in str(error).split("\n"):
                assert line.endswith(".") and line.isprintable() and len(line) < 4000, line
            return str(error)
        resolved = layout.resolved(FLUX_DEV)
        assert resolved.regional_steps() <= resolved.run_steps() <= resolved.steps <= 10000 and resolved.run_steps() > 0
        assert max(layout.width, layout.height) <= 8192 and layout.width % 16 == layout.height % 16 == 0
        if layout.image and layout.image.repaint:
            anew = repainted(layout)
            assert anew.shape == (layout.height, layout.width) and 0 <= anew.min() <= anew.max() <= 1
        if layout.regions:
            tokens = region_tokens(layout)
            tokens.bits(2), tokens.sorted()
            weights = tokens.log_weights()
            assert (tokens.image_bits != 0).all()
            assert not (tokens.cover.isnan() | (tokens.cover < 0)).any()
            assert weights is None or not weights.isnan().any()
    return None


def unknown_keys(values: Any, struct: type = Layout) -> list[str]:
    """The keys of a layout, as YAML has it, that the reader does not know."""
    found = [key for key in values if key not in struct.__struct_fields__]
    for key, part in {"image": Start, "repaint": Repaint}.items():
        if struct in (Layout, Start) and isinstance(values.get(key), dict):
            found += unknown_keys(values[key], part)
    loras = RegionLora if struct is Region else Lora
    for key, part in {"regions": Region, "loras": loras, "controlnets": Control}.items():
        entries = values.get(key) if key in struct.__struct_fields__ else None
        found += [name for entry in entries or () for name in unknown_keys(entry, part)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images that layouts name, and what is in no way an image."""
    folder = tmp_path_factory.mktemp("layouts")
    for name in ("disc.png", "edges.png"):
        shutil.copy(ROOT / "examples" / name, folder)
    Image.new("L", (32, 32), 255).save(folder / "white.png")
    halves = Image.new("RGB", (32, 32), "red")
    halves.paste("blue", (16, 0, 32, 32))
    halves.save(folder / "halves.png")
    (folder / "text.png").write_text("not an image")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    return folder


# ---------------------------------------------------------------------------------- near validity

SHAPES = [
    {"box": [0, 0, 16, 16]}, {"box": ["0%", 3, "50.5%", 15.9]}, {"box": [-0.0, 0.0, 1e-300, 1.1]},
    {"ellipse": ["0%", 0, 16, 16]}, {"ellipse": [-0.0, 2, 1e-300, 3.5]},
    {"polygon": [[0, 0], [16, 0], ["50%", 16]]}, {"polygon": [[0, 0], [16, 16], [16, 0], [0, 16]]},
    {"polygon": [[7, 7], [7, 7], [7, 7]]}, {"polygon": [[[0, 0], [16, 0], [0, 16]], [[1, 1], [9, 1], [1, 9]]]},
    {"polygon": [[8 + 7 * np.cos(i).item(), 8 + 7 * np.sin(2.4 * i).item()] for i in range(25)]},
    {"mask": "white.png"}, {"mask": "disc.png"}, {"color": [255, 0, 0]}, {"color": "#0000ff"}, {"color": 255},
]  # fmt: skip
WORDS = ["a fox", "a\x00b", "\U0001f98a", "a: [b", "- c\n\td", "% 'q' \"r\"", "\u2028 \x85 \ufeff", "z" * 1000]
GOOD_REGION = {
    "strength": [0, 1, 5e-324, 100, -0.0], "feather": [0, 16, 40.5, 8192, 1e-300], "base_ratio": [0, 1, 0.5, None],
    "mask_inject_steps": [0, "0%", "33.333333333333336%", 10**18, None], "loras": [[], [{"file": "gone", "scale": -1}]],
    "order": [0], "negative_prompt": ["", "ugly", None],
}  # fmt: skip
GOOD_IMAGES = [
    {"file": "disc.png"},
    {"file": "halves.png", "denoise": 5e-324},
    {"file": "edges.png", "denoise": 1, "repaint": None},
    {"file": "white.png", "denoise": 0.5, "repaint": {"box": ["0%", 3, "50.5%", 15.9], "feather": 1e-300}},
    {"file": "disc.png", "repaint": {"polygon": [[0, 0], [16, 0], ["50%", 16]], "feather": 8192}},
    {"file": "disc.png", "repaint": {"mask": "white.png", "regions": None}},
]
GOOD = {
    "width": [16, 64, 272], "background_prompt": ["", "grey"], "seed": [0, 2**63 - 1, None], "steps": [1, 10000],
    "style": ["", "in {prompt}", "\u2028"],
    "guidance": [0, 1e-300, 1000.0], "base_ratio": [0, 1, 0.5], "mask_inject_steps": [0, 10**18, "100%", "0.1%"],
    "double_inject_interval": [1, 10**18], "single_inject_interval": [2], "double_blocks": ["every 2", [], [3]],
    "single_blocks": ["0", "9-1", None, [10**18]], "image_attention": ["open"], "base_stream": ["shared"],
    "max_sequence_length": [2, None], "region_max_sequence_length": [4096, "1%", None], "preset": ["control"],
    "overlap": ["last", "first", "smallest"], "method": ["rpg", "plain"],
    "image": GOOD_IMAGES, "control_image": ["edges.png", None], "negative_prompt": ["", "z" * 1000],
    "true_cfg_scale": [1, 1.5, 1000], "cfg_batch": [True, False],
    "loras": [[{"file": "a/b:c"}, {"file": ".", "image": "edges.png"}]],
    "controlnets": [[{"model": "\x00", "image": "edges.png", "mode": "canny", "end": 0.5, "scale": -0.0}]],
}  # fmt: skip


class Raw(str):
    """A value as YAML, not quoted."""


NASTY = [
    None, True, False, 0, -1, 7, 2**63, 10**30, 0.5, 5e-324, 1e308, -1e308, float("nan"), float("inf"), -float("inf"),
    "", " ", "3", "\ud800", "\udfff\ud800", "%", "1e5%", "-5%", "\u0663%", "\xb2%", "9" * 400 + "%", "100.001%", "inf%",
    "every 0", "every \u0663", "0-9999999999, 0", ",", "#ff00g0", "#\u0663" + "0" * 5, "white.png\x00", "a" * 5000,
    ".", "pipe", "loop", "gone.png", "text.png", "edges.png", "/dev/zero", "\ud800.png", "a\nb.png", "\x1b[2J",
    [], {}, [[]], [[[]]], [None], {"": 0}, {"a\nb": 1}, {"a` - at `$.width": 1}, {"<<": {"x": 1}}, {"file": "\ud800"},
    [0, 0, 16], [0, 0, 16, 16], [16, 16, 0, 0], [0, 0, 1e308, 1e308], [float("nan")] * 4, [10**99] * 4, [True] * 4,
    [[0, 0], [1, 1]], [[0, 0], [1, 1], [2, float("nan")]], [[0, 0, 0]] * 3, [[0, 0], [9, 9], [0, 10**99]], [[], [], []],
    [{"prompt": "a"}], [{"file": "pipe"}], [{"model": "pipe", "image": "pipe"}], [{"prompt": "a", "mask": "pipe"}] * 70,
    *map(Raw, (
        "2024-01-31", "2024-13-45", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!binary aGk=", "!!binary \xe9",
        "!!int ''", "!!float ''", "!!bool x", "!!null x", "!!int []", "!!str {}", "!!str {=: 3}", "!!map []", "!x y",
        "!!python/name:os.system", "!!python/object/apply:os.system [ls]", "&a [*a]", "&a {k: *a}", "&a {<<: *a}", "=",
        "<<", "*b", "0x" + "f" * 9999, "9" * 9999, "1:59:59", "1:1:1.5", "1" + ":59" * 500, "1" + ":59" * 500 + ".5",
        "0o9", "089", "1_000", "0b1", "1e5", "+.inf", "[" * 99, "\"\\ud83e\\udd8a\"", "\"\\U00110000\"",
    )),
]  # fmt: skip


def to_yaml(value: Any) -> str:
    match value:
        case Raw():
            return str(value)
        case dict():
            return "{" + ", ".join(f"{json.dumps(key)}: {to_yaml(entry)}" for key, entry in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(to_yaml, value)) + "]"
        case float():
            text = repr(value).replace("nan", ".nan").replace("inf", ".inf")
            return text.replace("e", ".0e") if "e" in text and "." not in text else text
    return json.dumps(value).replace("\\ud83e\\udd8a", "\U0001f98a")


def some_of(good: dict[str, list], rng: random.Random) -> dict[str, Any]:
    keys = rng.sample(list(good), rng.randrange(4))
    return {key: rng.choice(good[key]) for key in keys}


def nasty(rng: random.Random) -> Any:
    number = struct.unpack("d", rng.randbytes(8))[0]
    text = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) for _ in range(4))
    return rng.choice((*[rng.choice(NASTY)] * 6, number, rng.randrange(-300, 300), text))


def near_validity(rng: random.Random) -> tuple[dict[str, Any], int]:
    """A layout, and in how many ways it may be invalid."""
    keys = sorted({*GOOD, *GOOD_REGION, "prompt", "box", "ellipse", "polygon", "mask", "color", "image", "map"})
    keys += ["denoise", "repaint", "true_cfg_scale", "cfg_batch", "control_image", "negative_prompt"]
    keys += ["height", "promt", "weight", "0", "a.b", "\xfc", "\ud800"]
    layout = {"prompt": rng.choice(WORDS), "map": "halves.png", "width": 64}
    layout |= some_of(GOOD, rng)
    layout["height"] = layout["width"]
    layout["regions"] = [
        {"prompt": rng.choice(WORDS)} | rng.choice(SHAPES) | some_of(GOOD_REGION, rng) for _ in range(rng.randrange(4))
    ]
    spoils = rng.randrange(3)
    for _ in range(spoils):
        places = [layout, *layout["regions"]]
        if isinstance(image := layout.get("image"), dict):
            image = layout["image"] = dict(image)
            places += [image, image]
            if isinstance(image.get("repaint"), dict):
                places.append(image["repaint"])
                image["repaint"] = places[-1] = dict(places[-1])
        place = rng.choice(places)
        another = some_of(GOOD | GOOD_REGION, rng)
        place |= another if rng.random() < 0.4 else {rng.choice(keys): nasty(rng)}
    return layout, spoils


def try_near_validity(file: Path, rng: random.Random) -> str:
    layout, spoils = near_validity(rng)
    file.write_text(to_yaml(layout), encoding="utf-8")
    sentence = read(file)
    assert spoils or sentence is None, (layout, sentence)
    assert sentence or not unknown_keys(layout)
    return re.sub(r"'.*?'|\".*?\"|[\d.]+|= .*: ", "", (sentence or "").replace(str(file), ""))


def test_layouts_near_validity_are_layouts_or_get_one_sentence(folder):
    rng = random.Random(0)
    kinds = Counter(try_near_validity(folder / "near.yaml", rng) for _ in range(CASES))
    assert CASES / 4 < kinds[""] < 3 * CASES / 4 and len(kinds) > 50


@pytest.mark.attack
@pytest.mark.parametrize("attempt", ["near validity", "changed bytes"])
def test_random_files_until_the_time_is_over(folder, attempt):
    try_one = {"near validity": try_near_validity, "changed bytes": try_changed_bytes}[attempt]
    end = time.monotonic() + BOX
    seed = random.randrange(10**9)
    file = folder / f"{attempt}.yaml"
    while time.monotonic() < end:
        seed += 1
        try:
            try_one(file, random.Random(seed))
        except BaseException as error:
            error.add_note(f"seed {seed}: {file.read_bytes()!r}")
            raise


# ------------------------------------------------------------------------------ changed bytes

PIECES = [
    b"\n", b"  ", b"\t", b": ", b"- ", b"[", b"]", b"{", b"}", b"'", b'"', b"#", b"%", b"&a ", b"*a", b"<<: *a",
    b"? ", b"|\n", b">-\n", b"---\n", b"...\n", b"%YAML 1", b"!!set ", b"\x00", b"\xff", b"\xed\xa0\x80", b"\xc2\x85",
    b"\xef\xbb\xbf", b"\\ud800", b".nan", b"1e999", b"-", b"0x", b"true", b"null", b"9" * 99, b"mask: pipe\n", b"a: ",
]  # fmt: skip


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        j = min(j, i + rng.choice((1, 1, 4, 40)))
        piece = rng.choice(PIECES)
        other = rng.choice(others)
        k = rng.randrange(len(other))
        flipped = bytes([data[i] ^ 1 << rng.randrange(8)]) if i < len(data) else b""
        ways = [  # a bit is flipped; bytes are removed, inserted, replaced, repeated or another's
            data[:i] + flipped + data[i + 1 :], data[:i] + data[j:], data[:i] + piece + data[i:],
            data[:i] + piece + data[j:], data[:j] + data[i:], data[:i] + other[k : k + j - i] + data[j:],
        ]  # fmt: skip
        data = rng.choice(ways)
    return data


SHORT = re.compile(rb"#.*| on a \w+ background")  # without which it is faster
WRITTEN = [SHORT.sub(b"", file.read_bytes()) for file in LAYOUTS]


def try_changed_bytes(file: Path, rng: random.Random) -> bool:
    """Is it still a layout?"""
    file.write_bytes(mutated(rng.choice(WRITTEN), WRITTEN, rng))
    if read(file) is not None:
        return False
    assert not unknown_keys(yaml.safe_load(file.read_text(encoding="utf-8")))
    return True


def test_files_with_changed_bytes_are_layouts_or_get_one_sentence(folder):
    rng = random.Random(0)
    accepted = sum(try_changed_bytes(folder / "changed.yaml", rng) for _ in range(CASES))
    assert CASES / 5 < accepted < 4 * CASES / 5


# ------------------------------------------------------------------------------ files that do harm


def layout_of(*regions: str, side: int = 64, more: str = "") -> str:
    entries = "".join(f"\n- {{prompt: r, {region}}}" for region in regions)
    return f"prompt: x\nwidth: {side}\nheight: {side}\n{more}\nregions:{entries or ' []'}"


def laughs(entry: str, wrap: str = "[{}]") -> str:
    """A billion of `entry`, each line ten of the one before."""
    lines = [f"a: &a {entry}"]
    lines += [f"{new}: &{new} {wrap.format(', '.join(['*' + old] * 10))}" for old, new in zip("abcdefghi", "bcdefghij")]
    return "\n".join(lines)


def png(width: int, height: int, chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of 8-bit gray, but for its pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    for kind, chunk in [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks]:
        check = struct.pack(">I", zlib.crc32(kind + chunk))
        data += struct.pack(">I", len(chunk)) + kind + chunk + check
    return data


NO_FILE = "not a regular file|Is a directory|No such device"
TEXTS = {  # name: YAML, and what its sentence says, None where it is a layout
    "billion laughs": (laughs("[lol]"), "too much text"),
    "a billion of a long text": (laughs("k" * 1000) + "\nprompt: *j", "too much text"),
    "a billion in a key": (laughs("[lol]") + "\n? *j\n: x", "invalid key|too much"),
    "a billion merged keys": (laughs("{x: 1}", "{{<<: [{}]}}"), "too much text"),
    "25 million LoRAs": (
        f"prompt: x\nloras: &l [{'{file: a}, ' * 5000}]\nregions: [&r {{prompt: a, loras: *l}}, {'*r, ' * 5000}]",
        "too much text"),
    "a list that holds itself": ("prompt: &a [*a]", "holds itself"),
    "a mapping merged into itself": ("prompt: x\nregions: [&a {<<: *a}]", "holds itself"),
    "a long chain of aliases": (
        "prompt: [&a0 [], " + ", ".join(f"&a{i + 1} [*a{i}]" for i in range(9000)) + "]", "too much text|size"),
    "a deep chain of aliases": (
        "prompt: [&a0 [], " + ", ".join(f"&a{i + 1} [*a{i}]" for i in range(900)) + "]", "str|too much text"),
    "10 ** 5000": ("prompt: x\nseed: 1" + "0" * 5000, "number of more than"),
    "a hexadecimal number of 190 kB": ("prompt: x\nseed: 0x" + "f" * 190_000, "number of more than"),
    "a sexagesimal number of 190 kB": ("prompt: x\nseed: 1" + ":59" * 60_000, "number of more than"),
    "20 kB of values": ("prompt: [" + "a," * (LAYOUT // 10) + "]", "expected str"),
    "200 kB of brackets": ("[" * LAYOUT, "recursion"),
    "more than 200 kB": ("#" * (LAYOUT + 1), "bytes are more than"),
    "a key of 190 kB": ("k" * 190_000 + ": x", "mapping|invalid key|expected"),
    "half a surrogate as a number": ('prompt: x\nwidth: "\\ud800"', "surrogate"),
    "half a surrogate as a file": ('prompt: x\nloras: [{file: "\\ud800"}]', "surrogate"),
    "an emoji as JSON has it": ('{"prompt": "\\ud83e\\udd8a"}', None),
    "an empty list of blocks as text": ("prompt: x\ndouble_blocks: ''", "expected"),
    "blocks of 5000 digits": ("prompt: x\ndouble_blocks: 0-4, " + "9" * 5000, "expected"),
    "a path of 100 kB": (layout_of("mask: " + "m" * 100_000), "too long"),
    "a LoRA of a path of 100 kB": ("prompt: x\nloras: [{file: " + "m/" * 50_000 + "}]", None),
    "a LoRA that is a pipe": ("prompt: x\nloras: [{file: pipe}]", "neither a file"),
    "a mask that is a pipe": (layout_of("mask: pipe"), NO_FILE),
    "a mask that is a device": (layout_of("mask: /dev/zero"), NO_FILE),
    "a mask that is a socket": (layout_of("mask: socket"), NO_FILE),
    "a mask that is a symlink to itself": (layout_of("mask: loop"), "symbolic links"),
    "a mask that is a symlink": (layout_of("mask: link.png"), None),
    "an empty mask": (layout_of("mask: ''"), NO_FILE),
    "a control image of broken EXIF data": (
        "prompt: x\ncontrolnets: [{model: a, image: exif.jpg}]", "not an image that can be read"),
    "a large image to start from, repainted with the largest feather": (
        "prompt: x\nwidth: 1024\nheight: 1024\nimage: {file: white.png, repaint: {mask: white.png, feather: 8192}}",
        None),
    "an image to start from that is a pipe": ("prompt: x\nimage: {file: pipe}", NO_FILE),
    "an image to start from that is a device": ("prompt: x\nimage: {file: /dev/zero}", NO_FILE),
    "an image of broken EXIF data to start from": (
        "prompt: x\nimage: {file: exif.jpg}", "not an image that can be read"),
    "an empty map": ("prompt: x\nmap: ''", NO_FILE),
    "61 soft regions of a large size": (
        layout_of(*["polygon: [[0, 0], [4096, 0], [2000, 4096]], feather: 300"] * 61, side=4096, more="overlap: last"),
        None),
    "the largest feather": (layout_of("box: [0, 0, 4096, 8192], feather: 8192", side=8192), None),
    "a polygon of 5,000 points that holds no token": (
        layout_of(f"polygon: [{', '.join(f'[{9 + i % 2}, {i % 3 * 4096}]' for i in range(5000))}]", side=8192), None),
}  # fmt: skip
IMAGES = {  # what the sentence about such a mask says
    "largest.png": None, "largest.webp": None, "larger.png": "pixels are more than",
    "4 gigapixels.png": "pixels|exceeds", "claims 24 megapixels.png": "can be read", "cut.png": "truncated",
    "empty.png": "cannot identify", "3 GB.png": "bytes are more than", "text bomb.png": "too large",
    "profile bomb.png": "too large", "script.png": "cannot identify", "palette.png": None,
    "moving.gif": None, "cmyk.jpg": None, "one bit.png": None, "16 bits.png": None, "floats.tiff": None,
    "a\nb.png": "no such file",
}  # fmt: skip
PATHS = {  # of layouts, and what is said of them
    "3 GB": ("3 GB.yaml", "bytes are more than"), "a pipe": ("pipe", NO_FILE),
    "a device": ("/dev/zero", NO_FILE), "a folder": (".", NO_FILE),
    "a symlink to itself": ("loop", "symbolic links"), "a symlink": ("link.yaml", None),
    "a name of two lines": ("a\nb.yaml", "no such file"),
    "a name that is too long": ("n" * 300, "too long"),
}  # fmt: skip


def write_images(folder: Path) -> None:
    side = round(MAX_PIXELS**0.5)
    small = Image.new("L", (64, 64), 255)
    for suffix in ("png", "webp"):
        image = Image.new("RGBA", (side, side), "white")
        image.save(folder / f"largest.{suffix}", compress_level=1, method=0)
    Image.new("1", (side + 1, side + 1), 1).save(folder / "larger.png")
    end = [(b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    (folder / "4 gigapixels.png").write_bytes(png(65535, 65535, end))
    (folder / "claims 24 megapixels.png").write_bytes(png(4900, 4900, end))
    small.save(folder / "whole.png")
    width = struct.pack("<HHI4s", 0x100, 2, 1, b"a")  # a width of text
    turned = struct.pack("<HHII", 0x112, 3, 1, 6)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + width + turned + bytes(4)
    small.save(folder / "exif.jpg", exif=exif)
    (folder / "link.png").symlink_to("whole.png")
    (folder / "cut.png").write_bytes((folder / "disc.png").read_bytes()[:-30])
    (folder / "empty.png").touch()
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n(ran) print\nshowpage\n")
    (folder / "3 GB.png").write_bytes(png(64, 64, []) + struct.pack(">I4s", 2**31 - 1, b"junk"))
    for name in ("3 GB.png", "3 GB.yaml"):
        with open(folder / name, "ab") as file:
            file.truncate(3 * 2**30)
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "a" * 50_000_000, zip=True)
    small.save(folder / "text bomb.png", pnginfo=info)
    small.save(folder / "profile bomb.png", icc_profile=bytes(50_000_000))
    palette = small.convert("P")
    palette.save(folder / "palette.png", transparency=bytes(255) + b"\xff")
    small.save(folder / "moving.gif", save_all=True, append_images=[Image.new("L", (64, 64), 9)])
    Image.new("CMYK", (64, 64)).save(folder / "cmyk.jpg")
    small.convert("1").save(folder / "one bit.png")
    Image.new("I;16", (64, 64), 65535).save(folder / "16 bits.png")
    Image.new("F", (64, 64), 255).save(folder / "floats.tiff")


@pytest.fixture(scope="module")
def harm(folder) -> dict[str, tuple[Path, str | None]]:
    """The layouts that do harm: their files, and what is said of them."""
    write_images(folder)
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(folder)  # a socket's path must be short
    server.bind("socket")
    os.chdir(here)
    files = {}
    for i, (name, (text, says)) in enumerate(TEXTS.items()):
        files[name] = folder / f"harm{i}.yaml", says
        files[name][0].write_text(text)
    for i, (image, says) in enumerate(IMAGES.items()):
        files[image] = folder / f"image{i}.yaml", says
        files[image][0].write_text(layout_of(f"mask: {json.dumps(image)}", f"mask: {json.dumps(image)}"))
    (folder / "link.yaml").symlink_to(f"image{list(IMAGES).index('palette.png')}.yaml")
    return files | {name: (folder / path, says) for name, (path, says) in PATHS.items()}


def judge(files: list[str]) -> None:
    """For a process of its own: a line of JSON for each file, with the peak memory so far, in MB,
    that Linux reports. (getrusage's is at least what the parent process had.)"""
    status = Path("/proc/self/status")
    for file in files:
        signal.alarm(SECONDS)
        sentence = read(Path(file))
        signal.alarm(0)
        peak = re.search(r"VmHWM:\s+(\d+)", status.read_text() if status.exists() else "VmHWM: 0")
        print(json.dumps([sentence, int(peak[1]) / 1024]), flush=True)


@pytest.fixture(scope="module")
def judged(harm) -> dict[str, tuple[str | None, float]]:
    """What another process reports of each file that does harm."""
    code = "import sys; from tests.attack.test_fuzz import judge; judge(sys.argv[1:])"
    command = [sys.executable, "-c", code, *(str(file) for file, _ in harm.values())]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    outcomes = [json.loads(line) for line in found.stdout.splitlines()]
    last = list(harm)[len(outcomes) - 1]
    assert len(outcomes) == len(harm), f"after {last}: {found.returncode} {found.stderr}"
    return dict(zip(harm, outcomes))


@pytest.mark.parametrize("name", [*TEXTS, *IMAGES, *PATHS])
def test_a_file_made_to_do_harm_does_none(name, harm, judged):
    (_, says), (sentence, memory) = harm[name], judged[name]
    assert (sentence is None) == (says is None) and re.search(says or "", sentence or ""), sentence
    assert memory < MEMORY


# Of a folder all files are read; the last is refused by the machine, with exit code 1.
SKIPPED = ("a folder", "a name that is too long")
BAD = [name for name, (_, says) in (TEXTS | PATHS).items() if says and name not in SKIPPED]


def test_the_command_line_prints_one_sentence_for_each_file_and_ends_with_2(harm, capsys):
    files = [str(harm[name][0]) for name in BAD]
    assert generate.main(["--check", "--layout", *files]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) >= len(BAD) and all(line.startswith("generate.py: ") for line in lines)
    assert not out


def test_the_program_itself_prints_one_sentence_and_ends_with_2(harm, tmp_path):
    file = harm["a mask that is a pipe"][0]
    command = [sys.executable, "generate.py", "--layout", file, "--output", tmp_path / "y.png"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("generate.py: ") and found.stderr.count("\n") == 1
