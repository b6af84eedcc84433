"""Values into a layout's text: what stays the same keeps its text, its comments and its place."""

import math
import re
from bisect import bisect_left
from pathlib import Path
from typing import Any

import yaml

from errors import InputError, parse_yaml
from regional.reader import MERGE, Loader

HOUSE = {"default_flow_style": None, "sort_keys": False, "allow_unicode": True, "width": 110}
ONE_LINE = {**HOUSE, "default_flow_style": True, "width": math.inf}
Edit = tuple[int, int, str]  # the text from this index to that one becomes this


class Unsure(Exception):
    """The text has a form that can't be changed in place."""


def values_in(text: str, file: str | Path) -> Any:
    """What YAML says, in values that JSON has: .nan and .inf are text. InputError with the line."""
    return plain(parse_yaml(text, Loader, file))


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def same(one: Any, other: Any) -> bool:
    """Equal as a layout's values: 1 is 1.0, but true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def edited(text: str, new: dict[str, Any], file: str | Path) -> tuple[str, bool]:
    """The text with these values, and whether its comments are kept: they are not if aliases
    or merged keys stand where something changes."""
    bom = "\ufeff" if text.startswith("\ufeff") else ""
    body = text.removeprefix("\ufeff")
    old = values_in(body, file)
    if same(old, new):
        return text, True
    if isinstance(old, dict):
        try:
            found = Changes(body).applied(old, new)
            if same(values_in(found, file), new):
                return bom + found, True
        except (Unsure, InputError):
            pass
    return bom + dumped(new), not re.search(r"(^|\s)#", body)


def dumped(value: Any) -> str:
    return yaml.safe_dump(value, **HOUSE)


def one_line(value: Any, quotes: str | None = None) -> str:
    """In flow style, as it may stand anywhere."""
    return yaml.safe_dump([value], default_style=quotes, **ONE_LINE)[1:].rstrip()[:-1]


class Changes:
    """Collects what to replace in a text."""

    def __init__(self, text: str):
        self.text = text
        self.line = "\r\n" if "\r\n" in text else "\n"
        self.edits: list[Edit] = []
        tokens = list(yaml.scan(text, Loader))
        self.colons = [x.start_mark.index for x in tokens if isinstance(x, yaml.ValueToken)]
        self.dashes = [x.start_mark.index for x in tokens if isinstance(x, yaml.BlockEntryToken)]
        self.root = Loader(text).get_single_node()

    def applied(self, old: dict[str, Any], new: dict[str, Any]) -> str:
        self.mapping(self.root, old, new)
        return self.replaced(0, len(self.text), self.edits)

    def replaced(self, start: int, end: int, edits: list[Edit]) -> str:
        parts = []
        for first, last, text in sorted(edits, key=lambda edit: edit[:2]):
            if first < start:
                raise Unsure
            parts += [self.text[start:first], text]
            start = last
        return "".join([*parts, self.text[start:end]])

    def mapping(self, node: yaml.MappingNode, old: dict[str, Any], new: dict[str, Any]) -> None:
        own = [(key, value) for key, value in node.value if key.tag != MERGE]
        kept = [i for i, (key, _) in enumerate(own) if key.value in new]
        if not kept:
            raise Unsure
        for i, (key, value) in enumerate(own):
            if i in kept:
                self.value(key, value, old[key.value], new[key.value], node.flow_style)
        for i in set(range(len(own))) - {*kept}:
            self.remove(own, i, kept[0], node.flow_style)
        known = {key.value for key, _ in own}
        merged = {key for key in old.keys() - known if key in new and same(old[key], new[key])}
        key, value = own[kept[-1]]
        for name in new:
            if name in known or name in merged:
                continue
            if node.flow_style:
                place = max(key.end_mark.index, self.end(value))
                text = f", {one_line(name)}: {one_line(new[name])}"
            else:
                place = self.line_end(max(key.end_mark.index, self.end(value)))
                text = self.line + " " * key.start_mark.column
                text += self.entry(one_line(name), new[name], key.start_mark.column)
            self.edits.append((place, place, text))

    def entry(self, name: str, value: Any, column: int) -> str:
        """A key and its value in block style, the program's."""
        parts = value.values() if isinstance(value, dict) else value
        if not (isinstance(value, dict | list) and any(isinstance(x, dict | list) for x in parts)):
            return f"{name}: {one_line(value)}"
        text = dumped({"x": value}).rstrip("\n")[1:]
        return (name + text).replace("\n", self.line + " " * column)

    def remove(self, own: list[tuple], i: int, first_kept: int, is_flow: bool) -> None:
        key, value = own[i]
        start = key.start_mark.index
        if is_flow or self.text[self.line_start(start) : start].strip():
            if i < first_kept:  # of `- prompt: ..` the dash stays
                self.edits.append((start, own[i + 1][0].start_mark.index, ""))
            elif is_flow:
                before = self.end(own[i - 1][1])
                self.edits.append((before, self.end(value), ""))
            else:
                raise Unsure
            return
        start = self.line_start(start)
        if i > 0:
            start = self.with_comments(start, self.line_end(self.end(own[i - 1][1])))
        end = max(key.end_mark.index, self.end(value))
        if start == 0:
            self.edits.append((0, self.next_line(end), ""))
        else:  # with the line break before it, as a new key may follow
            self.edits.append((self.line_end(start - 1), self.line_end(end), ""))

    def value(self, key: yaml.Node, node: yaml.Node, old: Any, new: Any, is_flow: bool) -> None:
        if same(old, new):
            return
        if node.start_mark.index < key.end_mark.index:  # an alias: the node stands elsewhere
            raise Unsure
        changes = len(self.edits)
        try:
            return self.inside(node, old, new)
        except Unsure:
            del self.edits[changes:]
        colon = self.colons[bisect_left(self.colons, key.end_mark.index)]
        quotes = node.style if isinstance(new, str) and isinstance(old, str) else None
        quotes = quotes if quotes in ("'", '"') else None
        if isinstance(new, list) and any(isinstance(part, dict) for part in new) and not is_flow:
            text = self.entry("", new, key.start_mark.column)
            self.edits.append((colon, max(colon + 1, self.end(node)), text))
        elif isinstance(node, yaml.ScalarNode) and node.style in ("|", ">") or not self.width(node):
            self.edits.append((colon + 1, max(colon + 1, self.end(node)), f" {one_line(new)}"))
        elif isinstance(node, yaml.CollectionNode) and not node.flow_style:
            self.edits.append((colon + 1, self.end(node), f" {one_line(new)}"))
        else:
            self.edits.append((node.start_mark.index, self.end(node), one_line(new, quotes)))

    def inside(self, node: yaml.Node, old: Any, new: Any) -> None:
        """Change parts of a value. Unsure if it must be written as a whole."""
        if isinstance(node, yaml.MappingNode) and isinstance(new, dict):
            self.mapping(node, old, new)
        elif isinstance(node, yaml.SequenceNode) and isinstance(new, list) and new and old:
            pairs = matched(old, new)
            if pairs == [*range(len(old))]:
                for item, was, now in zip(node.value, old, new):
                    self.item(item, was, now)
            elif node.flow_style:
                raise Unsure
            else:
                self.sequence(node, old, new, pairs)
        else:
            raise Unsure

    def item(self, node: yaml.Node, old: Any, new: Any) -> None:
        if same(old, new):
            return
        is_scalar = isinstance(node, yaml.ScalarNode)
        if is_scalar and not isinstance(new, dict | list) and self.width(node):
            if node.style in ("|", ">"):
                raise Unsure
            quotes = node.style if isinstance(new, str) and node.style else None
            self.edits.append((node.start_mark.index, self.end(node), one_line(new, quotes)))
        else:
            self.inside(node, old, new)

    def sequence(
        self, node: yaml.SequenceNode, old: list, new: list, pairs: list[int | None]
    ) -> None:  # fmt: skip
        """Items that come, go and change places, each with the comments above it."""
        starts = []
        for i, item in enumerate(node.value):
            dash = self.dashes[bisect_left(self.dashes, item.start_mark.index) - 1]
            start = self.line_start(dash)
            if self.text[start:dash].strip():
                raise Unsure
            before = self.next_line(self.end(node.value[i - 1])) if i else 0
            starts.append(self.with_comments(start, before))
        indent = self.text[start:dash]
        ends = [*starts[1:], self.next_line(self.end(node.value[-1]))]
        chunks = []
        for pair, value in zip(pairs, new):
            if pair is None:
                lines = dumped([value]).splitlines()
                chunks.append("".join(indent + line + self.line for line in lines))
                continue
            before = self.edits
            self.edits = []
            self.item(node.value[pair], old[pair], value)
            chunk = self.replaced(starts[pair], ends[pair], self.edits)
            chunks.append(chunk if chunk.endswith("\n") else chunk + self.line)
            self.edits = before
        whole = "".join(chunks).removesuffix("\n").removesuffix("\r")
        self.edits.append((starts[0], self.line_end(self.end(node.value[-1])), whole))

    def width(self, node: yaml.Node) -> int:
        return node.end_mark.index - node.start_mark.index

    def end(self, node: yaml.Node) -> int:
        """Where a node's own text ends, without what PyYAML counts to it."""
        if isinstance(node, yaml.ScalarNode) or node.flow_style:
            text = self.text[node.start_mark.index : node.end_mark.index]
            return node.start_mark.index + len(text.rstrip())
        last = node.value[-1]
        if not isinstance(node, yaml.MappingNode):
            return self.end(last)
        key, value = last
        return max(key.end_mark.index, self.end(value))

    def line_start(self, index: int) -> int:
        return self.text.rfind("\n", 0, index) + 1

    def line_end(self, index: int) -> int:
        found = self.text.find("\n", index)
        found = len(self.text) if found < 0 else found
        return found - (self.text[found - 1 : found] == "\r")

    def next_line(self, index: int) -> int:
        found = self.text.find("\n", index)
        return len(self.text) if found < 0 else found + 1

    def with_comments(self, start: int, first: int) -> int:
        """The start of the lines of comments directly above a line, none before `first`."""
        while (above := self.line_start(start - 1)) >= first and start:
            if not self.text[above:start].lstrip().startswith("#"):
                break
            start = above
        return start


def matched(old: list[Any], new: list[Any]) -> list[int | None]:
    """For each new item the old one that it is, or was before a change; None for none."""
    if not all(isinstance(part, dict) for part in (*old, *new)):
        return [*range(len(old))] if len(old) == len(new) else [None] * len(new)
    left = dict(enumerate(old))
    pairs: list[int | None] = [None] * len(new)

    def pair(key: Any) -> None:
        for j, value in enumerate(new):
            if pairs[j] is None:
                pairs[j] = next((i for i, part in left.items() if key(j, i, value, part)), None)
                left.pop(pairs[j], None)

    pair(lambda j, i, value, part: same(value, part))
    pair(lambda j, i, value, part: same(value.get("prompt"), part.get("prompt")))
    pair(lambda j, i, value, part: i == j)
    if len(old) == len(new):
        pair(lambda j, i, value, part: True)
    return pairs
