"""What of prompts and sizes a model can't read or draw; each kind gets one sentence."""

import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unicodedata import normalize

import msgspec

from errors import converted
from formats.recognize import Source
from model.tokenizers import T5Tokenizer

FLUX_PIXELS = (256 * 256, 2 * 1024 * 1024)
MOST = 3  # prompts that have a sentence each
# What prompts of other programs hold, and what a layout has instead
FOREIGN = {
    r"\([^()]*[^\d\s()]\s*:\s*\d*\.?\d+\s*\)": "a region's strength",
    r"<(?:lora|lyco|hypernet):[^<>]*>": "loras",
    r"\bembedding:\S+": "a description",
    r"(?<![A-Z'\"] )\b(?:BREAK|AND|ADD(?:COL|ROW|BASE|COMM))\b(?=\s+\S)(?! [A-Z]{2})": "regions",
}


class Known(msgspec.Struct):
    """What a small model was trained on: `known` in its config.json. sizes: of the shortest and
    the longest side. words: all, by their kinds."""

    sizes: tuple[int, int] | None = None
    words: dict[str, list[str]] = {}
    example: str = ""


def known_of(flux: Source | None) -> Known:
    found = flux.config.get("known", {}) if flux else {}
    return converted(found, Known, flux.path if flux else "", "damaged config.json")


def doubts(
    layouts: Iterable[tuple[Path | None, Any]], flux: Source | None, t5_tokenizer: Path | None
) -> Iterator[str]:
    """A sentence for each distinct cause for doubt in layouts, which come with their files."""
    known = known_of(flux)
    beyond = []
    sizes = {}
    prompts = {}  # and where each comes first
    for file, layout in layouts:
        sizes[layout.width, layout.height] = None
        own = {"prompt": layout.prompt}
        if layout.regions:
            own["background_prompt"] = layout.background_prompt
        own |= {f"regions[{i}].prompt": part.prompt for i, part in enumerate(layout.regions)}
        for key, prompt in own.items():
            prompts.setdefault(prompt, f"{file}: {key}" if file else key)
    low, high = known.sizes or FLUX_PIXELS
    sides = "about 0.1 to 2 megapixels"
    if known.sizes:
        sides = f"{low} to {high} pixels a side"
    for width, height in sizes:
        given = (width, height) if known.sizes else (width * height,)
        if not low <= min(given) <= max(given) <= high:
            beyond.append(f"{width} x {height}")
    if beyond:
        yield f"{listed(beyond)} pixels: the model was trained on {sides}."
    text = normalize("NFKC", "\n".join(prompts))
    if known.words:
        words = dict.fromkeys(word.strip(string.punctuation) for word in text.split())
        if unknown := [x for x in words if x not in sum(known.words.values(), [""])]:
            problem = f"the model has not learned the words {listed(unknown)}"
            yield f"{problem}; it can draw prompts such as {known.example!r}."
    elif t5_tokenizer:
        t5 = T5Tokenizer(t5_tokenizer)
        characters = filter(str.isprintable, dict.fromkeys(text))
        if unknown := [x for x in characters if t5.unknown in t5.encode(x)[0]]:
            yield f"the model can't read {listed(unknown)}, which are not in T5's vocabulary."
    yield from foreign(prompts)


def foreign(prompts: dict[str, str]) -> Iterator[str]:
    """Of prompts and where they are: those that are empty or in other programs' syntax."""
    found = []
    for prompt, key in prompts.items():
        uses = {}
        for pattern, instead in FOREIGN.items():
            uses |= {match[0]: instead for match in re.finditer(pattern, prompt)}
        if uses:
            instead = listed(dict.fromkeys(uses.values()))
            found.append(f"{key}: FLUX.1 reads {listed(uses)} as text; use {instead} instead.")
        elif not prompt.strip():
            found.append(f"{key} is empty: nothing says what to draw.")
    yield from found[:MOST]
    if len(found) > MOST:
        yield f"{len(found) - MOST} more prompts are empty or written for other programs."


def listed(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
