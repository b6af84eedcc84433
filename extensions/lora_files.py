"""LoRA files of every family, recognized by their keys alone."""

import re
from collections.abc import Callable
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from errors import MISSING, InputError, parse_json
from extensions.lora import Change, Full, Kronecker, Lora, LowRank, Term
from formats.hub import locate
from formats.key_names import flux_from_diffusers
from formats.safetensors import FLOATS, FP8, Stored, read, read_header, wrong
from model.layers import RMSNorm

# What a key may begin with, before a module's name, with _ for dots.
PREFIX = re.compile(
    r"(base_model_model_|(model_)?diffusion_model_|lora_(unet|transformer|te\d?)_|lycoris_"
    r"|transformer_(?!blocks)|text_encoders?_(2_)?|clip_l_|t5xxl_)*"
)
# What follows the name, by kind; an adapter's name is left out: lora_A.default.weight.
SUFFIX = re.compile(
    r"""(.+?)(?:
      \.(?P<factor>lokr_w[12](?:_[ab])?|hada_w[12]_[ab])
    | (?P<down>([._]lora_down|\.lora_A(\.\w+)?|([._]lora)?(_linear_layer)?\.down)\.weight)
    | (?P<up>([._]lora_up|\.lora_B(\.\w+)?|([._]lora)?(_linear_layer)?\.up)\.weight)
    | (?P<bias>\.lora_B(\.\w+)?\.bias|\.diff_b)
    | (?P<alpha>\.alpha)
    | (?P<magnitude>\.dora_scale|\.lora_magnitude_vector(\.\w+)*)
    | (?P<diff>\.(diff|w_norm))
    | (?P<set>\.set_weight|(?<=_norm)\.scale)
    | (?P<shape>\.reshape_weight)  # of the padded weight; the other factors say it too
    )""",
    re.VERBOSE,
)
Kinds = dict[str, Stored]  # a module's tensors in a file
Shape = tuple[int, ...]
Scale = Callable[[int], float]  # by the rank
Target = tuple[str, str, int, int]  # part, layer, rows [start, stop)


def spellings(modules: dict[str, nn.Module]) -> dict[str, Target]:
    """What files may call each part's layers, without prefix, with _ for dots."""
    found = {}
    for part, module in modules.items():
        for layer, linear in module.named_modules():
            if isinstance(linear, nn.Linear | RMSNorm):
                rows = len(next(linear.parameters()))
                names = {layer: (0, rows), layer.removeprefix("text_model."): (0, rows)}
                if part == "flux":
                    names |= pieces(layer, rows, module.params.hidden_size)
                for name, own in names.items():
                    found[name.replace(".", "_")] = (part, layer, *own)
    return found


def pieces(layer: str, rows: int, hidden: int) -> dict[str, tuple[int, int]]:
    """diffusers', OneTrainer's and XLabs' names of rows of a layer of Flux."""
    theirs = [row.key.rpartition(".")[0] for row in flux_from_diffusers(f"{layer}.weight", {})]
    found = {}
    for i, name in enumerate(theirs):
        stop = rows if i + 1 == len(theirs) else (i + 1) * hidden
        found |= dict.fromkeys([name, f"{layer}.{i}"], (i * hidden, stop))
    block, _, last = layer.rpartition(".")
    for i, stream in enumerate(("img_attn", "txt_attn"), 1):
        if block.endswith(stream):
            found[f"{block.replace(stream, 'processor')}.{last}_lora{i}"] = (0, rows)
    if last == "linear1":
        found[f"{block}.processor.qkv"] = (0, 3 * hidden)
    if last == "linear2":
        found[f"{block}.processor.proj"] = (0, rows)
    return found


def lora_file(name: str, where: str) -> Path:
    """name: a file, a folder or org/name with one, or org/name:file."""
    path = locate(name, [["*.safetensors"]], where)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise InputError(where, MISSING, f"name one of the safetensors files there: {names}")
    return files[0]


def read_lora(path: Path, modules: dict[str, nn.Module]) -> Lora:
    """What a file does to these parts, which may be on the meta device."""
    _, tensors, metadata = read_header(path)
    settings = parse_json(metadata.get("lora_adapter_metadata", "{}"), dict[str, Any], path)
    targets = spellings(modules)
    groups = {}
    unknown = []
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS | FP8:
            raise wrong(path, f"{key} is stored as {tensor.dtype}, which is not supported")
        found = SUFFIX.fullmatch(key)
        module = found[1] if found else ""
        target = targets.get(PREFIX.sub("", module.replace(".", "_"), count=1))
        if target:
            kind = found["factor"] or found.lastgroup
            groups.setdefault((target, module), {})[kind] = tensor
        else:
            unknown.append(key)
    if not groups:
        first = next(iter(tensors), None)
        raise wrong(path, f"none of its keys is known for this model; the first is {first}")
    changes = {part: [] for part in modules}
    for (target, module), kinds in groups.items():
        part, layer, *_ = target
        scale = partial(metadata_scale, path, settings, module)
        own = changes_of(target, modules[part].get_submodule(layer), kinds, scale)
        if module.endswith(("norm_out.linear", "norm_out_linear")):
            own = map(swap_halves, own)
        changes[part] += own
    width = modules["flux"].img_in.in_features
    inputs = [change.term for change in changes["flux"] if change.name == "img_in.weight"]
    is_control = any(isinstance(x, LowRank) and x.down.shape[1] > width for x in inputs)
    return Lora(path, changes, unknown, is_control)


def metadata_scale(path: Path, settings: dict, module: str, rank: int) -> float:
    """alpha / rank by peft's settings in the header, else 1."""
    part = re.match(r"((transformer|text_encoder(_2)?)\.)?", module)[0]
    own = {k.removeprefix(part): x for k, x in settings.items() if k.startswith(part)}
    if "lora_alpha" not in own:
        return 1.0
    try:
        alphas = dict(own.get("alpha_pattern") or {}).items()
        fitting = (alpha for end, alpha in alphas if f".{module}".endswith(f".{end}"))
        alpha = float(next(fitting, own["lora_alpha"]))
    except (TypeError, ValueError) as error:
        raise wrong(path, f"the settings in its header can't be read ({error})") from error
    return alpha / (rank**0.5 if own.get("use_rslora") else rank)


def changes_of(target: Target, layer: nn.Module, kinds: Kinds, scale: Scale) -> list[Change]:
    _, name, start, stop = target
    (weight, tensor), *_ = layer.named_parameters()
    shape = (stop - start, *tensor.shape[1:])
    found = []
    if term := weight_term(kinds, shape, scale, widens=name == "img_in"):
        magnitude = lengths(kinds["magnitude"], *shape) if "magnitude" in kinds else None
        found.append(Change(f"{name}.{weight}", start, stop, term, magnitude))
    for kind in ("diff", "set", "bias"):
        if kind in kinds:
            key = "bias" if kind == "bias" else weight
            size = shape[:1] if kind == "bias" else shape
            term = Full(read_as(kinds[kind], size))
            found.append(Change(f"{name}.{key}", start, stop, term, replaces=kind == "set"))
    return found


def lengths(tensor: Stored, rows: int, columns: int) -> Tensor:
    """DoRA's, of new rows (out, 1), which peft stores flat, or columns (1, in)."""
    if tensor.shape not in ((rows,), (rows, 1), (1, columns)):
        raise misfit(tensor, f"({rows}, 1) or (1, {columns})")
    return read(tensor).float().reshape(tensor.shape[0], -1)


def swap_halves(change: Change) -> Change:
    """diffusers' last modulation is (scale, shift), ours (shift, scale)."""
    term = change.term
    magnitude = change.magnitude
    half = (change.stop - change.start) // 2
    if isinstance(term, Kronecker):
        term = Full(term.delta())
    rows, *others = term  # LowRank's up, Full's matrix
    term = term._make([rows.roll(half, 0), *others])
    if magnitude is not None:
        magnitude = magnitude.roll(half, 0)
    return change._replace(term=term, magnitude=magnitude)


def weight_term(kinds: Kinds, shape: Shape, scale: Scale, widens: bool) -> Term | None:
    """What changes a weight (rows, in), if any; `widens`: to twice the columns."""
    own = {kind: x for kind, x in kinds.items() if kind in ("down", "up") or "_w" in kind}
    if not own:
        return None
    first = next(iter(own))
    if len(shape) == 1:
        raise misfit(own[first], "no matrix for a norm")
    alpha = float(read_as(kinds["alpha"], ())) if "alpha" in kinds else 0.0
    if alpha:
        scale = partial(truediv, alpha)
    if first.startswith("lokr"):
        return kronecker(own, shape, scale)
    if first.startswith("hada"):
        return hadamard(own, shape, scale)
    if widens and "down" in own and own["down"].shape[1:] == (2 * shape[1],):
        shape = (shape[0], 2 * shape[1])
    up, down = factors(own, "up", "down", shape)
    return LowRank(up, down, scale(len(down)))


def kronecker(kinds: Kinds, shape: Shape, scale: Scale) -> Kronecker:
    """LoKr: kron(w1, w2), either of them a product; alpha counts only then."""
    sides = []
    factor = 1.0
    for name in ("lokr_w1", "lokr_w2"):
        if name in kinds:
            sides.append(matrix(kinds[name]))
        else:
            a, b = factors(kinds, f"{name}_a", f"{name}_b")
            sides.append(a.float() @ b.float())
            factor = scale(len(b))
    left, right = sides
    made = tuple(a * b for a, b in zip(left.shape, right.shape))
    if made != shape:
        raise misfit(next(iter(kinds.values())), f"factors of {shape}; they make {made}")
    return Kronecker(left, right, factor)


def hadamard(kinds: Kinds, shape: Shape, scale: Scale) -> LowRank:
    """LoHa: (w1_a @ w1_b) * (w2_a @ w2_b), which is one product of rank r1 r2."""
    a1, b1 = factors(kinds, "hada_w1_a", "hada_w1_b", shape)
    a2, b2 = factors(kinds, "hada_w2_a", "hada_w2_b", shape)
    up = (a1.float()[:, :, None] * a2.float()[:, None, :]).flatten(1)
    down = (b1.float()[:, None, :] * b2.float()[None, :, :]).flatten(0, 1)
    return LowRank(up, down, scale(len(b1)))


def factors(kinds: Kinds, first: str, second: str, shape: Shape = (0, 0)) -> list[Tensor]:
    """Two stored matrices; shape: that of their product, if it is known."""
    if not {first, second} <= kinds.keys():
        file, key, *_ = next(iter(kinds.values()))
        raise wrong(file, f"{key} has no counterpart; download the LoRA again")
    b = matrix(kinds[second], 0, shape[1])
    return [matrix(kinds[first], shape[0], len(b)), b]


def matrix(tensor: Stored, rows: int = 0, columns: int = 0) -> Tensor:
    """A stored matrix, of these sizes if given; or a 1 x 1 convolution."""
    if len(tensor.shape) < 2 or 0 in tensor.shape:
        raise misfit(tensor, "a matrix")
    shape = (rows or tensor.shape[0], columns or tensor.shape[1])
    return read_as(tensor, shape).clone()  # a view keeps its file open


def read_as(tensor: Stored, shape: Shape) -> Tensor:
    """A stored tensor of this shape, or with ones behind it, else InputError."""
    if tensor.shape != shape + (1,) * (len(tensor.shape) - len(shape)):
        raise misfit(tensor, f"{shape}")
    return read(tensor).reshape(shape)


def misfit(tensor: Stored, expected: str) -> InputError:
    found = f"{tensor.key} has shape {tensor.shape}, expected {expected}"
    return wrong(tensor.file, f"{found}; the LoRA was made for another model, or is damaged")
