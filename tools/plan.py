"""A layout from a long prompt, by a language model behind an OpenAI-compatible endpoint.

The key comes from OPENAI_API_KEY alone: a stored hub token must not go anywhere else.
"""

import json
import os
import re
from base64 import b64encode
from functools import partial
from html import escape
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec
import numpy as np
import yaml
from msgspec import Meta, Struct

from errors import LAYOUT, MISSING, InputError, info, parse_json, parsed
from formats.known import Known
from formats.network import answer
from regional.layout import MAX_REGIONS
from regional.reader import read_layout
from tools.flags import naming
from tools.metadata import check_writable, write

INSTRUCTIONS = """You plan an image of {width} x {height} pixels for a text-to-image model that
generates each region from a prompt of its own. Answer with one JSON object of the schema below and
nothing else. Plan 1 to {most} regions, one for each subject that has a place of its own. Boxes may
overlap a little, but none may lie wholly under others. Leave out nothing that is asked for.
{schema}"""
WORDS = """
The text-to-image model knows no words but these: {words}. All prompts have to be made of them, as
in: {example}. What is asked for in other words, show by shapes and colors that stand for it."""
HEADER = "# A plan to edit: boxes are x0, y0, x1, y1. Then: python generate.py --layout FILE\n"
CHECK_KEY = "; check OPENAI_API_KEY"
MOST = 1_000_000  # bytes of an answer
MOST_PROMPT = 20_000  # characters
HINTS = {401: CHECK_KEY, 403: CHECK_KEY, 404: "; check --llm-url and --llm-model"}


# The docstrings are for the language model. Percentages are easier for it than pixels and fit
# any size. Edges have names, as strict schemas have no list lengths.
class Box(Struct, forbid_unknown_fields=True):
    """Left, upper, right and lower edge in whole percent, 0 to 100, of the image's size."""

    x0: int
    y0: int
    x1: int
    y1: int


class Part(Struct, forbid_unknown_fields=True):
    """A region. prompt: its subject alone, with all that is asked of it, fitting details, and the
    light and style of the image. box: where, in the size and proportions of the subject."""

    prompt: str
    box: Box


class Plan(Struct, forbid_unknown_fields=True):
    """prompt: the whole image in a few sentences. background_prompt: what is in no region."""

    prompt: str
    background_prompt: str
    regions: list[Part]


class Message(Struct):
    content: str | None = None
    refusal: str | None = None


class Choice(Struct):
    message: Message


class Completion(Struct):
    """What is used of a /chat/completions answer."""

    choices: Annotated[list[Choice], Meta(min_length=1)]


def plan(
    prompt: str, width: int, height: int, url: str | None = None, model: str | None = None,
    timeout: float = 120, known: Known | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A layout's keys, with boxes in percent. What is no layout is retried, twice at most.
    url: by default OPENAI_BASE_URL. timeout: seconds for an answer. known: to the image model."""
    given = {"prompt": prompt, "width": width, "height": height}
    with naming(None, given):
        read_layout(None, given)  # fails without asking
    url = (url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")
    url = url.removesuffix("/chat/completions")
    if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", url):  # it may hold a password
        problem = "a plan needs it, or OPENAI_BASE_URL, such as http://localhost:8000/v1"
        raise InputError("--llm-url", MISSING, problem)
    url += "/v1" * (url.count("/") == 2) + "/chat/completions"
    _, parts = msgspec.json.schema_components([Plan], ref_template="#/$defs/{name}")
    schema = {**parts.pop("Plan"), "$defs": parts}
    text = json.dumps(schema)  # for servers without response_format
    system = INSTRUCTIONS.format(width=width, height=height, most=MAX_REGIONS, schema=text)
    if known and known.words:
        system += WORDS.format(words=json.dumps(known.words), example=known.example)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    strict = {"name": "layout", "strict": True, "schema": schema}
    form = {"type": "json_schema", "json_schema": strict}
    body = {"messages": messages, "response_format": form}
    if model:
        body["model"] = model
    for _ in range(3):
        content = ask(url, body, timeout)
        try:
            return layout_of(content, width, height)
        except InputError as error:
            problem = public(str(error), url, 2000)
        info(f"{public(url, url)}: no layout: {problem}")
        correction = f"This can't be used: {problem} Answer with the whole JSON object, corrected."
        messages.append({"role": "assistant", "content": content})
        messages.append({"role": "user", "content": correction})
    how = "" if "response_format" in body else " (without a JSON Schema, which it does not take)"
    problem = f"no layout in three answers{how}; the last: {problem.removesuffix('.')}"
    raise InputError(public(url, url), MISSING, problem)


def key() -> str:
    found = os.environ.get("OPENAI_API_KEY", "").strip()
    if found.isascii() and found.isprintable():
        return found
    raise InputError("OPENAI_API_KEY", MISSING, "it has characters that no key has")


def hidden(text: str, url: str, least: int = 4) -> str:
    """A text without the key and the URL's password, however a server escaped them.

    least: shorter ones are no secrets; servers without keys take EMPTY or ollama.
    """
    login = url.split("/")[2].rpartition("@")[0]
    password = unquote(login.partition(":")[2])
    basic = b64encode(unquote(login).encode()).decode()
    for secret in (key(), password, basic):
        if len(secret) >= least:
            text = re.sub("".join(map(any_form, secret)), "[key]", text)
    return text


def any_form(c: str) -> str:
    """A pattern for a character as it is, or as in JSON, a URL or HTML."""
    code = f"{ord(c):x}"
    percent = "".join(f"%{byte:02x}" for byte in c.encode())
    codes = rf"\\{{1,8}}(?:u0*|x0?){code}|&#x0*{code};|&#0*{ord(c)};|{percent}"
    return rf"(?:\\{{0,8}}{re.escape(c)}|{re.escape(escape(c))}|(?i:{codes}))"


def public(text: str, url: str, most: int = 200) -> str:
    """A text from outside in one printable line, without secrets. url: the server's."""
    text = re.sub(r"(?<=://)[^/\s]*@", "", hidden(text, url))
    text = " ".join(text.split())[:most]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)[:most]


def ask(url: str, body: dict[str, Any], timeout: float) -> str:
    """The model's answer without its thoughts. A refused schema is removed from `body`."""
    headers = {"Authorization": f"Bearer {key()}"} if key() else {}
    place = public(url, url)
    try:
        response, data = answer("POST", url, timeout, MOST, json=body, headers=headers)
    except Exception as error:  # the HTTP library's have no common base, and may hold secrets
        reason = public(str(error), url) or type(error).__name__
        raise InputError(place, MISSING, f"no answer ({reason}) in {timeout:g} s") from None
    text = data.decode(errors="replace")
    if not response.is_success:
        status = response.status_code
        phrase = public(response.reason_phrase, url)
        problem = f'HTTP {status} {phrase}, "{public(text, url)}"{HINTS.get(status, "")}'
        about_schema = re.search("response_?format|schema|grammar|structured", text, re.IGNORECASE)
        if not ("response_format" in body and status in (400, 422) and about_schema):
            raise InputError(place, MISSING, problem)
        info(f"{place}: {problem}. Asking without a JSON Schema.")
        del body["response_format"]
        return ask(url, body, timeout)
    try:
        message = parse_json(data, Completion, url).choices[0].message
    except InputError:
        problem = f'not a chat completion: "{public(text, url)}"'
        raise InputError(place, MISSING, problem) from None
    content = hidden(message.content or "", url, 8)  # It is written to a file.
    content = content.rpartition("</think>")[2].partition("<think>")[0].strip()
    if message.refusal or not content:
        refusal = public(message.refusal or "an empty answer", url)
        raise InputError(place, MISSING, f'the model refuses: "{refusal}"')
    return content


def layout_of(answer: str, width: int, height: int) -> dict[str, Any]:
    """The layout's keys from an answer's JSON; InputError if none fits."""
    text = answer[answer.find("{") : answer.rfind("}") + 1]
    data = parse_json(text, Any, "the answer")
    fit = partial(msgspec.convert, type=Plan, strict=False)
    found = parsed(fit, data, "the answer", "not as asked for")
    if not found.prompt.strip() or not found.regions:
        raise InputError("prompt, regions", MISSING, "they must not be empty")
    if len(found.regions) > MAX_REGIONS:
        raise InputError("regions", MISSING, f"at most {MAX_REGIONS} are possible")
    prompts = [found.prompt, found.background_prompt, *(part.prompt for part in found.regions)]
    if max(map(len, prompts)) > MOST_PROMPT:
        raise InputError("prompt", MISSING, f"at most {MOST_PROMPT:,} characters are possible")
    check_boxes([msgspec.structs.astuple(region.box) for region in found.regions])
    layout = {"width": width, "height": height, **msgspec.to_builtins(found)}
    for region in layout["regions"]:
        region["box"] = [f"{edge}%" for edge in region["box"].values()]
    if len(as_yaml(layout).encode(errors="replace")) > LAYOUT:
        raise InputError("the layout", MISSING, f"its file would have more than {LAYOUT:,} bytes")
    read_layout(None, layout)
    return layout


def check_boxes(boxes: list[tuple[int, int, int, int]]) -> None:
    """Boxes in percent lie in the image, each with a part that no other covers."""
    depth = np.zeros((100, 100), dtype=int)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        if not (0 <= x0 < x1 <= 100 and 0 <= y0 < y1 <= 100):
            problem = "expected 0 <= x0 < x1 <= 100, and likewise for y"
            raise InputError(f"regions[{i}].box", list(boxes[i]), problem)
        depth[y0:y1, x0:x1] += 1
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        if depth[y0:y1, x0:x1].min() > 1:
            raise InputError(f"regions[{i}].box", list(boxes[i]), "other regions cover all of it")


def as_yaml(layout: dict[str, Any]) -> str:
    style = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None, "width": 110}
    return HEADER + yaml.safe_dump(layout, **style)


def write_plan(layout: dict[str, Any], file: Path, overwrite: bool = False) -> None:
    check_writable(file, overwrite)
    write(file, partial(Path.write_text, data=as_yaml(layout), encoding="utf-8"))
