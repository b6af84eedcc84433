"""LoRA files of every family, recognized by their keys alone."""

import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from errors import MISSING, InputError
from extensions.lora import Change, Full, Kronecker, Lora, LowRank, Term
from formats.hub import locate
from formats.key_names import flux_from_diffusers
from formats.safetensors import FLOATS, FP8, CheckpointFile, Stored, parse, read, read_header
from model.layers import RMSNorm

# What a key may begin with, before a module's name, dots written as underscores.
PREFIX = re.compile(
    r"(base_model_model_|(model_)?diffusion_model_|lora_(unet|transformer|te\d?)_|lycoris_"
    r"|transformer_(?!blocks)|text_encoders?_(2_)?|clip_l_|t5xxl_)*"
)
# What follows the name, by kind. The adapter's name, as in lora_A.default.weight, is left out.
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


class Target(NamedTuple):
    """The rows of a part's layer that a name in a file stands for; swapped: by halves there."""

    part: str
    layer: str
    start: int
    stop: int
    swapped: bool = False


def flat(name: str) -> str:
    return name.replace(".", "_")


def spellings(modules: dict[str, nn.Module]) -> dict[str, Target]:
    """What files may call each part's layers, flat and without prefix."""
    found = {}
    for part, module in modules.items():
        for layer, linear in module.named_modules():
            if not isinstance(linear, nn.Linear | RMSNorm):
                continue
            rows = len(linear.scale) if isinstance(linear, RMSNorm) else linear.out_features
            whole = Target(part, layer, 0, rows)
            found[layer] = whole
            if part == "clip":
                found[layer.removeprefix("text_model.")] = whole
            if part == "flux":
                found |= pieces(whole, module.params.hidden_size)
    return {flat(name): target for name, target in found.items()}


def pieces(whole: Target, hidden: int) -> dict[str, Target]:
    """diffusers', OneTrainer's and XLabs' names of one of Flux's layers and of its parts."""
    layer = whole.layer
    theirs = [row.key.rpartition(".")[0] for row in flux_from_diffusers(f"{layer}.weight", {})]
    found = {}
    for i, name in enumerate(theirs):
        stop = whole.stop if i + 1 == len(theirs) else (i + 1) * hidden
        piece = whole._replace(start=i * hidden, stop=stop, swapped=name == "norm_out.linear")
        found |= {name: piece, f"{layer}.{i}": piece}
    block, _, last = layer.rpartition(".")
    for i, stream in enumerate(("img_attn", "txt_attn"), 1):
        if block.endswith(stream):
            block = block.replace(stream, "processor")
            found[f"{block}.{last}_lora{i}"] = whole
    if last == "linear1":
        found[f"{block}.processor.qkv"] = whole._replace(stop=3 * hidden)
    if last == "linear2":
        found[f"{block}.processor.proj"] = whole
    return found


def lora_file(name: str, where: str) -> Path:
    """A file, a folder or org/name with one, or org/name:file. `where` begins messages."""
    path = locate(name, [["*.safetensors"]], where)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        problem = f"expected one safetensors file there, found {names}; name one of them"
        raise InputError(where, MISSING, problem)
    return files[0]


def read_lora(path: Path, modules: dict[str, nn.Module]) -> Lora:
    """What a file does to a model with these parts, which may be on the meta device."""
    file = read_header(path)
    targets = spellings(modules)
    groups = {}
    unknown = []
    for key, tensor in file.tensors.items():
        if tensor.dtype not in FLOATS | FP8:
            problem = f"{key} is stored as {tensor.dtype}, which is not supported"
            raise InputError(path, MISSING, problem)
        found = SUFFIX.fullmatch(key)
        module = found[1] if found else ""
        target = targets.get(PREFIX.sub("", flat(module), count=1))
        if target:
            kind = found["factor"] or found.lastgroup
            groups.setdefault((target, module), {})[kind] = tensor
        else:
            unknown.append(key)
    if not groups:
        first = next(iter(file.tensors), None)
        problem = f"no LoRA for this model: none of its keys is known (the first is {first})"
        raise InputError(path, MISSING, problem)
    changes = {part: [] for part in modules}
    for (target, module), kinds in groups.items():
        layer = modules[target.part].get_submodule(target.layer)
        scale = metadata_scale(file, module, kinds)
        changes[target.part] += changes_of(target, layer, kinds, scale)
    width = modules["flux"].img_in.in_features
    inputs = [change.term for change in changes["flux"] if change.name == "img_in.weight"]
    is_control = any(isinstance(x, LowRank) and x.down.shape[1] > width for x in inputs)
    return Lora(path, changes, unknown, is_control)


def metadata_scale(file: CheckpointFile, module: str, kinds: Kinds) -> float:
    """alpha / rank by peft's settings in the header, else 1; for files without alpha keys."""
    settings = parse(file.path, file.metadata.get("lora_adapter_metadata", "{}").encode())
    part = re.match(r"((transformer|text_encoder(_2)?)\.)?", module)[0]
    name = module.removeprefix(part)
    own = {key.removeprefix(part): x for key, x in settings.items() if key.startswith(part)}
    if "down" not in kinds or "lora_alpha" not in own:
        return 1.0
    rank = max(kinds["down"].shape[0], 1)
    try:
        alphas = dict(own.get("alpha_pattern") or {}).items()
        fitting = (alpha for end, alpha in alphas if f".{name}".endswith(f".{end}"))
        alpha = float(next(fitting, own["lora_alpha"]))
    except (TypeError, ValueError) as error:
        problem = f"the settings in its header can't be read ({error})"
        raise InputError(file.path, MISSING, problem) from error
    return alpha / (rank**0.5 if own.get("use_rslora") else rank)


def changes_of(target: Target, layer: nn.Module, kinds: Kinds, scale: float) -> list[Change]:
    """What one module of a file changes: weight, bias or norm."""
    _, name, start, stop, swapped = target
    is_norm = isinstance(layer, RMSNorm)
    shape = (stop - start,) if is_norm else (stop - start, layer.in_features)
    weight = Change(f"{name}.{'scale' if is_norm else 'weight'}", start, stop, None)
    found = []
    if term := weight_term(kinds, shape, scale, widens=name == "img_in"):
        magnitude = None
        if "magnitude" in kinds:
            magnitude = read(kinds["magnitude"]).float()
            if magnitude.ndim == 1:  # as peft writes columns
                magnitude = magnitude[:, None]
        found.append(weight._replace(term=term, magnitude=magnitude))
    for kind in ("diff", "set"):
        if kind in kinds:
            term = Full(read(check(kinds[kind], shape)))
            found.append(weight._replace(term=term, replaces=kind == "set"))
    if "bias" in kinds:
        term = Full(read(check(kinds["bias"], shape[:1])))
        found.append(Change(f"{name}.bias", start, stop, term))
    return [swap_halves(change) for change in found] if swapped else found


def swap_halves(change: Change) -> Change:
    """diffusers' last modulation is (scale, shift), ours (shift, scale)."""
    term = change.term
    half = (change.stop - change.start) // 2
    if isinstance(term, LowRank):
        term = term._replace(up=term.up.roll(half, 0))
    else:
        term = Full(term.delta().roll(half, 0))
    magnitude = change.magnitude
    if magnitude is not None and len(magnitude) == 2 * half:
        magnitude = magnitude.roll(half, 0)
    return change._replace(term=term, magnitude=magnitude)


def weight_term(kinds: Kinds, shape: tuple[int, ...], scale: float, widens: bool) -> Term | None:
    """What changes a weight of this shape (rows, in), if anything does; BFL's control LoRAs have
    twice the columns (`widens`)."""
    own = {kind: x for kind, x in kinds.items() if kind in ("down", "up") or "_w" in kind}
    if not own:
        return None
    if len(shape) == 1:
        raise misfit(next(iter(own.values())), "no matrix for a norm")
    alpha = float(read(check(kinds["alpha"], ()))) if "alpha" in kinds else 0.0
    if any(kind.startswith("lokr") for kind in own):
        return kronecker(own, shape, alpha)
    if any(kind.startswith("hada") for kind in own):
        return hadamard(own, shape, alpha)
    rows, columns = shape
    if widens and "down" in own and own["down"].shape[1:] == (2 * columns,):
        columns *= 2
    up, down = factors(own, "up", "down", rows, columns)
    return LowRank(up, down, alpha / len(down) if alpha else scale)


def kronecker(kinds: Kinds, shape: tuple[int, ...], alpha: float) -> Kronecker:
    """LoKr: kron(w1, w2), either of them a product of two; alpha counts only then."""
    sides = []
    rank = None
    for name in ("lokr_w1", "lokr_w2"):
        if name in kinds:
            sides.append(matrix(kinds[name]))
        else:
            a, b = factors(kinds, f"{name}_a", f"{name}_b")
            rank = len(b)
            sides.append(a.float() @ b.float())
    left, right = sides
    made = tuple(a * b for a, b in zip(left.shape, right.shape))
    if made != shape:
        raise misfit(next(iter(kinds.values())), f"factors of {shape}; they make {made}")
    return Kronecker(left, right, alpha / rank if alpha and rank else 1.0)


def hadamard(kinds: Kinds, shape: tuple[int, ...], alpha: float) -> LowRank:
    """LoHa: (w1_a @ w1_b) * (w2_a @ w2_b), which is one product of rank r1 r2."""
    names = ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")
    (a1, b1), (a2, b2) = (factors(kinds, *name, *shape) for name in names)
    up = (a1.float()[:, :, None] * a2.float()[:, None, :]).flatten(1)
    down = (b1.float()[:, None, :] * b2.float()[None, :, :]).flatten(0, 1)
    return LowRank(up, down, alpha / len(b1) if alpha else 1.0)


def factors(
    kinds: Kinds, first: str, second: str, rows: int = 0, columns: int = 0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Two stored matrices; the sizes of their product, if given."""
    pair = [kinds[name] for name in (first, second) if name in kinds]
    if len(pair) < 2:
        file, key, *_ = next(iter(kinds.values()))
        raise InputError(file, MISSING, f"{key} has no counterpart; download the LoRA again")
    for tensor in pair:
        if len(tensor.shape) < 2 or 0 in tensor.shape:
            raise misfit(tensor, "a matrix")
    a, b = pair
    check(b, (b.shape[0], columns or b.shape[1]))
    return matrix(check(a, (rows or a.shape[0], b.shape[0]))), matrix(b)


def matrix(tensor: Stored) -> Tensor:
    """A matrix as it is stored; 1 x 1 convolutions are matrices too."""
    return read(tensor).reshape(tensor.shape[:2]).clone()  # a view would keep its file open


def check(tensor: Stored, shape: tuple[int, ...]) -> Stored:
    """InputError unless a tensor has this shape, or with ones behind it."""
    if tensor.shape != shape + (1,) * (len(tensor.shape) - len(shape)):
        raise misfit(tensor, f"{shape}")
    return tensor


def misfit(tensor: Stored, expected: str) -> InputError:
    problem = f"{tensor.key} has shape {tensor.shape}, expected {expected}"
    why = "the LoRA was made for another model, or is damaged"
    return InputError(tensor.file, MISSING, f"{problem}; {why}")
