"""What of prompts and sizes a model can't read or draw: a sentence for each cause."""

import re
import string
from collections.abc import Iterable, Iterator
from typing import Any
from unicodedata import normalize

import msgspec

from errors import converted
from formats.recognize import Source
from model.tokenizers import T5Tokenizer

# What prompts for other programs hold, and what a layout has instead
FOREIGN = {
    r"\([^()]*[^\d\s()]\s*:\s*\d*\.?\d+\s*\)": "a region's strength",
    r"<(?:lora|lyco|hypernet):[^<>]*>": "loras",
    r"\bembedding:[\w.-]+": "a description",
    r"(?<![A-Z'\"] )\b(?:BREAK|AND|ADD(?:COL|ROW|BASE|COMM))\b(?=\s+\S)(?! [A-Z]{2})": "regions",
}


class Known(msgspec.Struct):
    """What a model was trained on: FLUX.1, or a small one that says so in its config.json."""

    sides: tuple[int, int] = (16, 8192)
    pixels: tuple[int, int] = (2**16, 2**21)
    sizes: str = "about 0.1 to 2 megapixels"
    words: dict[str, list[str]] = {}  # all, by their kinds
    example: str = ""


def known_of(flux: Source | None) -> Known:
    config = flux.config if flux else {}
    return converted(config.get("known", {}), Known, "config.json", "damaged")


def doubts(layouts: list[Any], flux: Source | None, t5: T5Tokenizer | None) -> Iterator[str]:
    """Of resolved layouts. flux, t5: the model's, if they are here."""
    known = known_of(flux)
    beyond = {}
    prompts = [layout.prompt for layout in layouts]
    if not all(map(str.strip, prompts)):
        yield "prompt is empty: nothing says what the whole image shows."
    for layout in layouts:
        prompts += [region.prompt for region in layout.regions]
        prompts += [layout.background_prompt] * bool(layout.regions)
        size = (layout.width, layout.height)
        fits = known.pixels[0] <= layout.width * layout.height <= known.pixels[1]
        if not (fits and known.sides[0] <= min(size) <= max(size) <= known.sides[1]):
            beyond[f"{layout.width} x {layout.height}"] = None
    if beyond:
        yield f"{listed(beyond)} pixels: the model was trained on {known.sizes}."
    unset = any(layout.guidance == 3.5 for layout in layouts)
    sizes = [flux.shape(name) for name in ("img_in.weight", "final_layer.linear.weight") if flux]
    if unset and sizes and sizes[0][1] > sizes[1][0]:
        yield "guidance is 3.5, but FLUX.1 Fill and Canny are made for 30, and Depth for 10."
    text = normalize("NFKC", "\n".join(dict.fromkeys(prompts)))
    if known.words:
        learned = sum(known.words.values(), [""])
        words = dict.fromkeys(word.strip(string.punctuation) for word in text.split())
        if unknown := [word for word in words if word not in learned]:
            example = f"it draws such as {known.example!r}"
            yield f"the model has not learned the words {listed(unknown)}; {example}."
    elif t5:
        if unknown := [c for c in dict.fromkeys(text) if t5.unknown in t5.encode(c)[0]]:
            yield f"the model can't read {listed(unknown)}, which T5's vocabulary lacks."
    found = {}
    for pattern, instead in FOREIGN.items():
        found |= {match[0]: instead for match in re.finditer(pattern, text)}
    if found:
        instead = listed(dict.fromkeys(found.values()))
        yield f"{listed(found)}: FLUX.1 reads that as text; use {instead} instead."


def listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
