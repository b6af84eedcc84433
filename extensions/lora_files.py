"""LoRA files of every family, recognized by their keys alone."""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from errors import MISSING, InputError
from extensions.lora import Change, Full, Kronecker, Lora, LowRank, Term
from formats.hub import locate
from formats.key_names import flux_from_diffusers
from formats.safetensors import FLOATS, FP8, CheckpointFile, Stored, parse, read, read_header
from model.layers import RMSNorm


class Target(NamedTuple):
    """The rows of a part's layer that a name in a file stands for; `swapped`: the file has their halves swapped."""

    part: str
    layer: str
    start: int
    stop: int
    swapped: bool = False


# What a key may begin with, before a module's name, dots written as underscores.
PREFIX = re.compile(
    r"(base_model_model_|(model_)?diffusion_model_|lora_(unet|transformer|te\d?)_|lycoris_|transformer_(?!blocks)"
    r"|text_encoders?_(2_)?|clip_l_|t5xxl_)*"
)
# What it may end with -> its kind. The adapter's name, as in lora_A.default.weight, is left out.
SUFFIXES = {
    r"[._]lora_down\.weight|\.lora_A(\.\w+)?\.weight|([._]lora)?(_linear_layer)?\.down\.weight": "down",
    r"[._]lora_up\.weight|\.lora_B(\.\w+)?\.weight|([._]lora)?(_linear_layer)?\.up\.weight": "up",
    r"\.lora_B(\.\w+)?\.bias|\.diff_b": "bias",
    r"\.alpha": "alpha",
    r"\.dora_scale|\.lora_magnitude_vector(\.\w+)*": "magnitude",
    r"\.(diff|w_norm)": "diff",
    r"\.set_weight|(?<=_norm)\.scale": "set",
    r"\.reshape_weight": "shape",  # of the padded weight; the other factors say it too
}
FACTORS = r"\.(lokr_w[12](?:_[ab])?|hada_w[12]_[ab])"


def take_apart(key: str) -> tuple[str, str]:
    """A key -> the module's name as the file has it, and the kind; ("", "") for a key of no known kind."""
    if found := re.fullmatch(rf"(.+?){FACTORS}", key):
        return found[1], found[2]
    for pattern, kind in SUFFIXES.items():
        if found := re.fullmatch(rf"(.+?)(?:{pattern})", key):
            return found[1], kind
    return "", ""


def flat(name: str) -> str:
    return name.replace(".", "_")


def spellings(modules: dict[str, nn.Module]) -> dict[str, Target]:
    """How files may call the layers of each part, without prefix and flat, and what that stands for."""
    found = {}
    for part, module in modules.items():
        for layer, linear in module.named_modules():
            if not isinstance(linear, nn.Linear | RMSNorm):
                continue
            rows = linear.out_features if isinstance(linear, nn.Linear) else len(linear.scale)
            found[flat(layer)] = Target(part, layer, 0, rows)
            if part == "clip":
                found[flat(layer).removeprefix("text_model_")] = Target(part, layer, 0, rows)
            if part == "flux":
                found |= pieces(layer, rows, module.params.hidden_size)
    return found


def pieces(layer: str, rows: int, hidden: int) -> dict[str, Target]:
    """The other names of one of Flux's layers and of its parts: diffusers', OneTrainer's and XLabs'."""
    theirs = [row.key.rpartition(".")[0] for row in flux_from_diffusers(f"{layer}.weight", {})]
    starts = [i * hidden for i in range(len(theirs))]
    found = {}
    for i, (name, start, stop) in enumerate(zip(theirs, starts, [*starts[1:], rows])):
        target = Target("flux", layer, start, stop, swapped=name == "norm_out.linear")
        found |= {flat(name): target, f"{flat(layer)}_{i}": target}
    if double := re.fullmatch(r"(double_blocks\.\d+)\.(img|txt)_attn\.(qkv|proj)", layer):
        number = {"img": 1, "txt": 2}[double[2]]
        found[flat(f"{double[1]}.processor.{double[3]}_lora{number}")] = Target("flux", layer, 0, rows)
    if single := re.fullmatch(r"(single_blocks\.\d+)\.linear([12])", layer):
        is_first = single[2] == "1"
        name = flat(f"{single[1]}.processor.{'qkv' if is_first else 'proj'}")
        found[name] = Target("flux", layer, 0, 3 * hidden if is_first else rows)
    return found


def lora_file(name: str, where: str) -> Path:
    """The file of a LoRA: a file, a folder or org/name with one, or org/name:file; `where` begins messages."""
    path = locate(name, [["*.safetensors"]], where)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise InputError(where, MISSING, f"expected one safetensors file there, found {names}; name one of them")
    return files[0]


def read_lora(path: Path, modules: dict[str, nn.Module]) -> Lora:
    """What a file does to a model with these parts (on the meta device will do). InputError if nothing in it fits."""
    file = read_header(path)
    names = spellings(modules)
    groups = {}
    unknown = []
    for key, tensor in file.tensors.items():
        if tensor.dtype not in FLOATS | FP8:
            raise InputError(path, MISSING, f"{key} is stored as {tensor.dtype}, which is not supported")
        module, kind = take_apart(key)
        target = names.get(PREFIX.sub("", flat(module), count=1))
        if target:
            groups.setdefault((target, module), {})[kind] = tensor
        else:
            unknown.append(key)
    if not groups:
        keys = f"none of its keys is known (the first is {next(iter(file.tensors), None)})"
        raise InputError(path, MISSING, f"no LoRA for this model: {keys}")
    changes = {part: [] for part in modules}
    for (target, module), kinds in groups.items():
        layer = modules[target.part].get_submodule(target.layer)
        changes[target.part] += changes_of(target, layer, kinds, metadata_scale(file, module, kinds))
    inputs = [change.term for change in changes["flux"] if change.name == "img_in.weight"]
    width = modules["flux"].img_in.in_features
    is_control = any(isinstance(term, LowRank) and term.down.shape[1] > width for term in inputs)
    return Lora(path, changes, unknown, is_control)


def metadata_scale(file: CheckpointFile, module: str, kinds: dict[str, Stored]) -> float:
    """alpha / rank as peft's settings in the header say it, for files without alpha keys; 1 without such settings."""
    settings = parse(file.path, file.metadata.get("lora_adapter_metadata", "{}").encode())
    part = re.match(r"(transformer|text_encoder(_2)?)\.", module)
    part = part[0] if part else ""
    name = module.removeprefix(part)
    own = {key.removeprefix(part): value for key, value in settings.items() if key.startswith(part)}
    if "down" not in kinds or "lora_alpha" not in own:
        return 1.0
    rank = max(kinds["down"].shape[0], 1)
    try:
        patterns = dict(own.get("alpha_pattern") or {})
        alpha = next((a for end, a in patterns.items() if f".{name}".endswith(f".{end}")), own["lora_alpha"])
        return float(alpha) / (rank**0.5 if own.get("use_rslora") else rank)
    except (TypeError, ValueError) as error:
        raise InputError(file.path, MISSING, f"the settings in its header can't be read ({error})") from error


def changes_of(target: Target, layer: nn.Module, kinds: dict[str, Stored], scale: float) -> list[Change]:
    """The changes of one module of a file: of its weight, and of its bias or norm."""
    rows = target.stop - target.start
    change = partial(Change, start=target.start, stop=target.stop)
    found = []
    weight = f"{target.layer}.{'scale' if isinstance(layer, RMSNorm) else 'weight'}"
    if term := weight_term(kinds, rows, layer, scale, widens=target.layer == "img_in"):
        magnitude = read(kinds["magnitude"]).float().reshape(kinds["magnitude"].shape) if "magnitude" in kinds else None
        found.append(change(weight, term=term, magnitude=as_column(magnitude, rows)))
    for kind in ("diff", "set"):
        if kind in kinds:
            check(kinds[kind], (rows, layer.in_features) if isinstance(layer, nn.Linear) else (rows,))
            found.append(change(weight, term=Full(read(kinds[kind])), replaces=kind == "set"))
    if "bias" in kinds:
        check(kinds["bias"], (rows,))
        found.append(change(f"{target.layer}.bias", term=Full(read(kinds["bias"]))))
    return [swap_halves(c) for c in found] if target.swapped else found


def as_column(magnitude: Tensor | None, rows: int) -> Tensor | None:
    """peft writes DoRA's magnitudes as a vector."""
    return magnitude[:, None] if magnitude is not None and magnitude.ndim == 1 else magnitude


def swap_halves(change: Change) -> Change:
    """diffusers' last modulation is (scale, shift), ours (shift, scale)."""
    magnitude = change.magnitude
    half = (change.stop - change.start) // 2
    if isinstance(change.term, LowRank):
        term = change.term._replace(up=change.term.up.roll(half, 0))
    else:
        term = Full(change.term.delta().roll(half, 0))
    if magnitude is not None and len(magnitude) == 2 * half:
        magnitude = magnitude.roll(half, 0)
    return change._replace(term=term, magnitude=magnitude)


def weight_term(kinds: dict[str, Stored], rows: int, layer: nn.Module, scale: float, widens: bool) -> Term | None:
    """The term that changes a layer's weight (rows, in); None if the file has none for it. With `widens` it may have
    twice the columns, as BFL's control LoRAs have for img_in."""
    kinds = {kind: tensor for kind, tensor in kinds.items() if kind in ("down", "up", "alpha") or "_w" in kind}
    if not kinds or set(kinds) == {"alpha"}:
        return None
    if not isinstance(layer, nn.Linear):
        raise misfit(next(iter(kinds.values())), "no matrix for a norm")
    alpha = 0.0
    if "alpha" in kinds:
        check(kinds["alpha"], ())
        alpha = float(read(kinds.pop("alpha")))
    if any(kind.startswith("lokr") for kind in kinds):
        return kronecker(kinds, rows, layer.in_features, alpha)
    if any(kind.startswith("hada") for kind in kinds):
        return hadamard(kinds, rows, layer.in_features, alpha)
    down, up = pair(kinds, "down", "up")
    rank = down.shape[0]
    wide = widens and down.shape[1:] == (2 * layer.in_features,)
    check(down, (rank, layer.in_features * (1 + wide)))
    check(up, (rows, rank))
    return LowRank(matrix(up), matrix(down), alpha / rank if alpha else scale)


def kronecker(kinds: dict[str, Stored], rows: int, columns: int, alpha: float) -> Kronecker:
    """LyCORIS' LoKr: kron(w1, w2), either of them a product of two; alpha counts only then."""
    factors = []
    rank = None
    for i in (1, 2):
        if f"lokr_w{i}" in kinds:
            factors.append(matrix(kinds[f"lokr_w{i}"]))
            continue
        a, b = pair(kinds, f"lokr_w{i}_a", f"lokr_w{i}_b")
        rank = b.shape[0]
        check(a, (a.shape[0], rank))
        factors.append(matrix(a).float() @ matrix(b).float())
    left, right = factors
    made = (left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])
    if made != (rows, columns):
        raise misfit(next(iter(kinds.values())), f"factors of {(rows, columns)}; they make {made}")
    return Kronecker(left, right, alpha / rank if alpha and rank else 1.0)


def hadamard(kinds: dict[str, Stored], rows: int, columns: int, alpha: float) -> LowRank:
    """LyCORIS' LoHa: (w1_a @ w1_b) * (w2_a @ w2_b), which is one product of rank r1 r2."""
    sides = [pair(kinds, f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2)]
    for a, b in sides:
        check(a, (rows, b.shape[0]))
        check(b, (b.shape[0], columns))
    (a1, b1), (a2, b2) = (tuple(matrix(x).float() for x in side) for side in sides)
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    return LowRank(up, down, alpha / len(b1) if alpha else 1.0)


def pair(kinds: dict[str, Stored], first: str, second: str) -> tuple[Stored, Stored]:
    if first not in kinds or second not in kinds:
        there = next(iter(kinds.values()))
        raise InputError(there.file, MISSING, f"{there.key} has no counterpart; download the LoRA again")
    return kinds[first], kinds[second]


def matrix(tensor: Stored) -> Tensor:
    """A matrix as it is stored; 1 x 1 convolutions are matrices too."""
    return read(tensor).reshape(tensor.shape[:2]).clone()  # a view would keep its file open


def check(tensor: Stored, shape: tuple[int, ...]) -> None:
    """InputError unless a tensor has this shape, or with ones behind it."""
    if tensor.shape != shape + (1,) * (len(tensor.shape) - len(shape)):
        raise misfit(tensor, f"{shape}")


def misfit(tensor: Stored, expected: str) -> InputError:
    problem = f"{tensor.key} has shape {tensor.shape}, expected {expected}"
    return InputError(tensor.file, MISSING, f"{problem}; the LoRA was made for another model, or is damaged")
