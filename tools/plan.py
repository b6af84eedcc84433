"""A layout from a long prompt, asked of a language model behind an OpenAI-compatible endpoint, for the user to edit.

The key comes from OPENAI_API_KEY alone: a stored token of the Hugging Face hub must not go to any other place.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml
from huggingface_hub import get_session
from msgspec import Struct

from errors import InputError
from regional.layout import MAX_REGIONS
from regional.reader import read_layout

INSTRUCTIONS = """You plan a picture of {width} x {height} pixels for a text-to-image model that draws each region from
a prompt of its own. Answer with one JSON object of the schema below and nothing else. Plan 1 to {most} regions, one for
each subject that has a place of its own. Boxes may overlap a little, but none may lie wholly under others. Leave out
nothing that is asked for.
{schema}"""


HEADER = "# A plan to edit: boxes are x0, y0, x1, y1. Then: python generate.py --layout FILE\n"


HINTS = {401: "; check OPENAI_API_KEY", 403: "; check OPENAI_API_KEY", 404: "; check --llm-url and --llm-model"}


# Their docstrings are for the language model. Per cent are easier for it than pixels, and hold for any size; names
# instead of a list, because strict schemas know no lengths of lists.
class Box(Struct, forbid_unknown_fields=True):
    """Left, upper, right and lower edge in whole per cent, 0 to 100, of the picture's width and height."""

    x0: int
    y0: int
    x1: int
    y1: int


class Part(Struct, forbid_unknown_fields=True):
    """A region. prompt: complete in itself, its subject with all that is asked of it, fitting details, and the light
    and style of the picture; no other region's subject. box: where, in the size and proportions of the subject."""

    prompt: str
    box: Box


class Plan(Struct, forbid_unknown_fields=True):
    """prompt: the whole picture in a few sentences. background_prompt: what is to be seen where no region is."""

    prompt: str
    background_prompt: str
    regions: list[Part]


def plan(
    prompt: str, width: int, height: int, url: str | None = None, model: str | None = None, timeout: float = 120,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """A layout's keys for this prompt, boxes in shares. What is no layout is asked for again, twice at most; `say`
    hears of it. `url`: by default OPENAI_BASE_URL. `timeout`: seconds without a word from the endpoint."""
    read_layout(None, {"prompt": prompt, "width": width, "height": height})  # the user's own mistakes come first
    url = (url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/").removesuffix("/chat/completions")
    if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", url):  # not shown, for it may hold a password
        raise InputError("a plan needs --llm-url or OPENAI_BASE_URL, an address such as http://localhost:8000/v1.")
    url += "/v1" * (url.count("/") == 2) + "/chat/completions"
    _, parts = msgspec.json.schema_components([Plan], ref_template="#/$defs/{name}")
    schema = {"name": "layout", "strict": True, "schema": {**parts.pop("Plan"), "$defs": parts}}
    system = INSTRUCTIONS.format(width=width, height=height, most=MAX_REGIONS, schema=json.dumps(schema["schema"]))
    messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    body = {"messages": messages, "response_format": {"type": "json_schema", "json_schema": schema}}
    body |= {"model": model} if model else {}
    for again in (True, True, False):
        answer = ask(url, body, timeout, say)
        try:
            return layout_of(answer, width, height)
        except InputError as error:
            problem = public(re.sub("^the command line: (--)?", "", str(error)))
        if again:
            say(f"{public(url)}: asking again: {problem}")
        correction = f"This can't be used: {problem} Answer with the whole JSON object, corrected."
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": correction}]
    plainly = "" if "response_format" in body else " (without a JSON Schema, which it does not take)"
    raise InputError(f"{public(url)}: no layout in three answers{plainly}; the last: {problem}")


def write_plan(layout: dict[str, Any], file: Path, overwrite: bool = False) -> None:
    """Write a layout file, under a temporary name first."""
    if file.exists() and not overwrite:
        raise InputError(f"{file}: exists already; choose another --output, or add --overwrite.")
    unfinished = file.with_stem(f".{file.stem}.{os.getpid()}")
    try:
        text = yaml.safe_dump(layout, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
        unfinished.write_text(HEADER + text, encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def key() -> str:
    found = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (found.isascii() and found.isprintable()):
        raise InputError("OPENAI_API_KEY: it has characters that no key has.")
    return found


def public(text: str) -> str:
    """A text from outside in one line, without the key, and without users and passwords in URLs."""
    text = re.sub(r"(?<=://)[^/\s]*@", "", text.replace(key() or "\0", "[key]"))
    return " ".join(text.split())


def ask(url: str, body: dict[str, Any], timeout: float, say: Callable[[str], None]) -> str:
    """The model's answer without its thoughts. A schema that is not taken goes out of `body`, for good."""
    headers = {"Authorization": f"Bearer {key()}"} if key() else {}
    try:
        response = get_session().post(url, json=body, headers=headers, timeout=timeout)
    except Exception as error:  # the HTTP library's have no common base, and may hold secrets
        reason = public(str(error)) or type(error).__name__
        raise InputError(f"{public(url)}: no answer ({reason}); the time-out is {timeout:g} s.") from None
    status, text = response.status_code, response.text
    if not response.is_success:
        said = re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)+)"', text)
        said = public(said[1] if said else text)[:200]
        problem = f"{public(url)}: HTTP {status} {response.reason_phrase}, {said!r}{HINTS.get(status, '')}."
        about_schema = re.search("response_?format|schema|grammar|structured", text, re.IGNORECASE)
        if not ("response_format" in body and status in (400, 422) and about_schema):
            raise InputError(problem)
        say(f"{problem} Asking without a JSON Schema.")
        del body["response_format"]
        return ask(url, body, timeout, say)
    try:
        message = response.json()["choices"][0]["message"]
        refusal, content = message.get("refusal"), message.get("content") or ""
        content = content.rpartition("</think>")[2].partition("<think>")[0].strip()
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(f"{public(url)}: this is no chat completion: {public(text)[:200]!r}.") from None
    if refusal or not content:
        raise InputError(f"{public(url)}: the model refuses: {public(str(refusal or 'an empty answer'))[:200]!r}.")
    return content


def layout_of(answer: str, width: int, height: int) -> dict[str, Any]:
    """The keys of the layout that the JSON in an answer means; InputError if it means none."""
    try:
        found = msgspec.json.decode(answer[answer.find("{") : answer.rfind("}") + 1], type=Plan, strict=False)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InputError(f"the JSON is not as asked for: {error}.") from None
    if not found.prompt.strip() or not found.regions:
        raise InputError("prompt and regions must not be empty.")
    check_boxes([msgspec.structs.astuple(region.box) for region in found.regions])
    layout = {"width": width, "height": height, **msgspec.to_builtins(found)}
    for region in layout["regions"]:
        region["box"] = [f"{edge}%" for edge in region["box"].values()]
    read_layout(None, layout)
    return layout


def check_boxes(boxes: list[tuple[int, int, int, int]]) -> None:
    """Boxes in per cent lie in the picture, and each has a part that no other covers."""
    depth = np.zeros((100, 100), dtype=int)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        if not (0 <= x0 < x1 <= 100 and 0 <= y0 < y1 <= 100):
            raise InputError(f"regions[{i}].box = {list(boxes[i])}: expected 0 <= x0 < x1 <= 100, and y0, y1 so too.")
        depth[y0:y1, x0:x1] += 1
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        if depth[y0:y1, x0:x1].min() > 1:
            raise InputError(f"regions[{i}].box = {list(boxes[i])}: other regions cover all of it.")
