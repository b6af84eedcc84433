"""ComfyUI's workflows: as it saves and as it exports them (API), and those in its pictures.

A graph is followed upwards from the sampler. A conditioning with a mask, box or area beside it
is a region, whatever its node is called; without one it belongs to the base prompt.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from errors import CONFIG, MISSING, InputError, read_text
from tools.importers import common
from tools.importers.common import Data, record

WIDGETS = """ApplyRegionalConds start_percent end_percent
BasicScheduler scheduler steps denoise
CLIPTextEncodeFlux clip_l t5xxl guidance
CLIPTextEncode text
ConditioningSetArea width height x y strength
ConditioningSetMask strength
CreateShape shape frames location_x location_y grow frame_width frame_height \
shape_width shape_height
Empty width height
FluxAttnOverride double_blocks single_blocks
FluxDeGuidance guidance
FluxGuidance guidance
FluxRegionBBOX x1 y1 x2 y2
KSamplerSelect sampler_name
KSamplerAdvanced add_noise noise_seed steps cfg sampler_name scheduler
KSampler seed steps cfg sampler_name scheduler denoise
LoadImageMask image channel
MaskComposite x y operation
RandomNoise noise_seed
SamplerCustom add_noise noise_seed cfg
SolidMask value width height"""  # of nodes whose type starts so, what widgets_values are
AFTER_SEED = ("fixed", "increment", "decrement", "randomize")
VALUES = ("t5xxl", "text", "value", "int", "seed", "string")
ABOVE = re.compile(r"prev|model$|guider$|positive$|cond|region")
MANY = 2000  # nodes
NODE = record(class_type=str, inputs=Data)
SOCKET = record(type=Any | None, name=str, link=int | None, widget=Data | None)
SOCKETS = list[SOCKET] | None
DRAWN = record(id=int | str, type=str, mode=int | None, inputs=SOCKETS,
               outputs=list[Data] | None, widgets_values=list[Any] | Data | None)  # fmt: skip
LINK = tuple[int, int | str, int, int | str, int, Any]
WORKFLOW = record(nodes=list[DRAWN], links=list[LINK | None])
FULL = [(0, 0), (1, 0), (1, 1), (0, 1)]


def is_link(value: Any) -> bool:
    return isinstance(value, list) and [type(part) for part in value] == [str, int]


def inputs_of(node: Any, links: dict[int, list]) -> Data:
    """A drawn node's inputs, as the API has them."""
    own = [str(socket.widget.get("name")) for socket in node.inputs or () if socket.widget]
    known = map(str.split, WIDGETS.splitlines())
    names = [names for start, *names in known if node.type.startswith(start)]
    values = node.widgets_values or []
    if isinstance(values, list):
        values = (value for value in values if value not in AFTER_SEED)
        values = dict(zip([*names, own or ["value"]][0], values))
    return values | {s.name: links[s.link] for s in node.inputs or () if s.link in links}


def drawn_nodes(graph: Any) -> Data:
    """A workflow's nodes, as the API has them."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph.links if link}
    nodes = {}
    through = {}
    for node in graph.nodes:
        name = str(node.id)
        inputs = inputs_of(node, links)
        linked = [*filter(is_link, inputs.values()), None]
        if node.type == "GetNode":
            through[name, 0] = [f"set {inputs['value']}", 0]
        elif node.type in ("Reroute", "SetNode"):
            through[name, 0] = through[f"set {inputs.get('value')}", 0] = linked[0]
        elif node.mode == 4:  # bypassed
            for slot, output in enumerate(node.outputs or ()):
                same = [s.name for s in node.inputs or () if s.type == output.get("type")]
                through[name, slot] = inputs.get(same[0]) if same else None
        elif node.mode != 2:  # muted
            nodes[name] = NODE(class_type=node.type, inputs=inputs)
    for inputs in (node.inputs for node in nodes.values()):
        for key, value in inputs.items():
            for _ in range(99):
                if is_link(value) and value[0] not in nodes:
                    value = through.get(tuple(value))
            inputs[key] = value
    return nodes


def box(*edges: float) -> list[tuple[float, float]]:
    x0, y0, x1, y1 = (min(max(edge, 0), 1) for edge in edges)
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def inverse(rings: list | None) -> list | None:
    if rings is None:
        return None
    return rings[1:] if rings[:1] == [FULL] else [FULL, *rings]


class Graph:
    def __init__(self, text: str, path: Path):
        self.path = path
        self.size = (1, 1)
        self.seen: set[Any] = set()
        is_drawn = "nodes" in common.json_in(text, Data, path)
        found = common.json_in(text, WORKFLOW if is_drawn else dict[str, NODE], path)
        self.nodes = drawn_nodes(found) if is_drawn else found
        if len(self.nodes) > MANY:
            raise InputError(path, MISSING, f"its nodes are more than {MANY:,}")

    def value(self, node: Any, key: str) -> Any:
        """An input's plain value, which may come from another node; None if it is made there."""
        value = node.inputs.get(key)
        for _ in range(9):
            if is_link(value):
                inputs = self.nodes[value[0]].inputs
                value = next((inputs[name] for name in VALUES if name in inputs), None)
        return None if is_link(value) else value

    def upstream(self, start: Any) -> Iterator[Any]:
        """The nodes that something is made of, the nearest first."""
        queue = [start]
        seen = set()
        for link in filter(is_link, queue):
            if link[0] not in seen:
                seen.add(link[0])
                node = self.nodes[link[0]]
                yield node
                queue += [value for key, value in node.inputs.items() if key != "negative"]

    def nearest(self, start: Any, *keys: str) -> Any:
        found = (self.value(node, key) for node in self.upstream(start) for key in keys)
        return next((value for value in found if value is not None), None)

    def numbers(self, name: str, keys: str) -> list[float]:
        node = self.nodes[name]
        values = [(self.value(node, key), f"{name}.{key}") for key in keys.split()]
        return [common.number(value, key, self.path) for value, key in values]

    def prompts(self, link: Any, place: Any = None, strength: Any = None) -> Iterator[tuple]:
        """Each text above, the node and mask that say where it is, or None, and its strength."""
        if not is_link(link) or (link[0], str(place)) in self.seen:
            return
        name = link[0]
        self.seen |= {name, (name, str(place))}
        node = self.nodes[name]
        texts = [self.value(node, key) for key in ("t5xxl", "text")]
        if text := next((text for text in texts if isinstance(text, str)), None):
            yield common.plain(text), place, strength
            return
        if "text" in node.inputs:
            common.report([f"the text of {node.class_type} {name}, which another node makes"])
        is_area = "x1" in node.inputs or {"x", "y", "width"} <= node.inputs.keys()
        for key in sorted(filter(ABOVE.match, node.inputs), key=lambda key: key[:4] != "prev"):
            suffix = re.sub("^cond[a-z]*", "", key)
            mask = node.inputs.get("mask" + suffix)
            its = place, strength
            if key.startswith("cond") and (is_area or is_link(mask)):
                its = (name, mask), self.value(node, "strength" + suffix)
            yield from self.prompts(node.inputs[key], *its)

    def shape(self, name: str, mask: Any) -> Data | None:
        """A region's box, polygon or mask, as a layout has it. None: it is not read."""
        node = self.nodes[name]
        if mask:
            rings = self.outline(*mask)
            if isinstance(rings, str):
                return {"mask": rings}
            if node.class_type == "CreateRegionalCond":  # its masks are black inside
                rings = inverse(rings)
        elif "x1" in node.inputs:
            rings = [box(*self.numbers(name, "x1 y1 x2 y2"))]
        else:
            x, y, w, h = self.numbers(name, "x y width height")
            if not node.class_type.endswith("Percentage"):
                return {"box": [x, y, x + w, y + h]}
            rings = [box(x, y, x + w, y + h)]
        width, height = self.size
        rings = [[(x * width, y * height) for x, y in ring] for ring in rings or ()]
        return common.shape_of(rings) if rings else None

    def outline(self, name: str, slot: int) -> Any:
        """A mask as rings (even-odd) in fractions of the image, or a file. None: not read."""
        node = self.nodes[name]
        kind = node.class_type
        if kind == "LoadImageMask" and self.value(node, "channel") != "alpha":
            return str(self.path.parent / self.value(node, "image"))
        if kind == "InvertMask":
            return inverse(self.outline(*node.inputs["mask"]))
        if kind == "SolidMask":
            return [FULL] if self.numbers(name, "value") >= [0.5] else []
        if kind == "MaskComposite":
            below, above = node.inputs["destination"], node.inputs["source"]
            x, y, w, h = self.numbers(name, "x y") + self.numbers(above[0], "width height")
            width, height = (self.nearest(below, side) for side in ("width", "height"))
            rings = self.outline(*below)
            is_read = self.value(node, "operation") == ("subtract" if FULL in rings else "add")
            part = box(x / width, y / height, (x + w) / width, (y + h) / height)
            return [*rings, part] if is_read and self.outline(*above) else None
        if kind == "CreateShapeMask" and self.value(node, "shape") == "square":
            x, y, w, h = self.numbers(name, "location_x location_y shape_width shape_height")
            width, height = self.numbers(name, "frame_width frame_height")
            left, top = x - w / 2, y - h / 2
            rings = [box(left / width, top / height, (left + w) / width, (top + h) / height)]
            return inverse(rings) if slot == 1 else rings
        return None


def read(path: Path, size: Any) -> Data:
    texts = common.texts_in(path)
    text = texts.get("prompt") or texts.get("workflow")
    if texts and not text:
        raise InputError(path, MISSING, "carries no workflow of ComfyUI")
    graph = Graph(text or read_text(path, CONFIG), path)
    starts = [[name, 0] for name, node in graph.nodes.items() if "latent_image" in node.inputs]
    if not starts:
        problem = "no node in it has a latent_image (subgraphs are read from API exports)"
        raise InputError(path, MISSING, problem)
    start = min(starts[:20], key=lambda link: sum(1 for _ in graph.upstream(link)))  # first pass
    nearest = partial(graph.nearest, start)
    latent = graph.nodes[start[0]].inputs["latent_image"]
    found = {side: graph.nearest(latent, side) or texts.get(side) for side in ("width", "height")}
    found |= {"steps": nearest("steps"), "guidance": nearest("guidance")}
    found |= {"seed": nearest("seed", "noise_seed"), "regions": []}
    found |= common.sampling(sampler=nearest("sampler_name"), schedule=nearest("scheduler"))
    for key in ("double_blocks", "single_blocks"):
        if (blocks := nearest(key)) is not None:
            found[key] = [int(index) for index in re.findall(r"\d{1,9}", str(blocks))]
    base = []
    graph.size = (found["width"], found["height"]) if found["height"] else size or (1, 1)
    kinds = [node.class_type for node in graph.upstream(start)]
    lost = [kind for kind in kinds if re.search("Lora|ControlNetApply|IPAdapter|StyleModel", kind)]
    for prompt, place, strength in graph.prompts(start):
        if place is None:
            base.append(prompt)
        elif shape := graph.shape(*place):
            strength = 1 if strength is None else strength
            found["regions"].append({"prompt": prompt, **shape, "strength": strength})
        else:
            lost.append(f"the region of {graph.nodes[place[1][0]].class_type}, {prompt}")
    found["prompt"] = ", ".join(dict.fromkeys(base))
    found |= negative(graph, start, found["guidance"] is not None)
    given = {key: nearest(key) for key in ("denoise", "start_percent", "end_percent")}
    lost += [f"{key} {value}" for key, value in given.items() if value not in (None, 0, 1)]
    kinds = [node.class_type for name, node in graph.nodes.items() if name not in graph.seen]
    common.report(lost + [kind for kind in kinds if "Region" in kind])
    return found


def negative(graph: Graph, start: Any, is_flux: bool) -> Data:
    """The layout's keys for true guidance: the nearest node's that has a scale above 1."""
    for node in graph.upstream(start):
        scale = graph.value(node, "cfg")
        if isinstance(scale, int | float) and scale != 1:
            found = graph.prompts(node.inputs.get("negative"))
            texts = dict.fromkeys(text for text, place, _ in found if place is None)
            return common.guided(", ".join(texts), scale, is_flux)
    return {}
