"""How long whole steps take: ours beside the published algorithm and diffusers, in one run, with the same weights.

    python benchmarks/speed.py           # FLUX.1-dev's sizes with random weights, bfloat16, on a CUDA GPU
    python benchmarks/speed.py --caps    # whole runs of ours where torch may take only a part of the card
    python benchmarks/speed.py --proxy   # anywhere: small, float32; the exit code is 1 where a target is missed

Who takes part: `ours`; `compiled`, the same with compiled blocks; `fp8`, the same again with its matrices in 8 bits;
`naive`, the published algorithm re-created (naive.py), and `naive-compiled`; and diffusers' plain FLUX.1, where it is
installed. All share one set of weights. Regions are a grid over the whole picture with 512 text tokens each; 10 of 24
steps are regional, at base_ratio 0.3. After the regional steps come the late ones, which are plain FLUX.

In each round everybody has a turn at every kind of step, one right behind the other as steps follow in a run. The
median counts, by CUDA events, or with --proxy the minimum on one thread, because other programs only ever add time. A
whole run is 10 regional and 14 late steps; at the first size it is also made in one piece, once, with all that is done
once a picture. Extra memory is the peak beyond the weights, with the mask or the lists that a participant keeps; of our
weights the modulation layers do not count, because generate.py keeps them in host memory.

By estimate, on an H100: 10 minutes, of which compiling takes 4, in 65 GB; --caps 6 minutes, and 24 GB in the temporary
folder. Leave parts out by --only, --sizes, --rounds and --no-runs. --proxy takes 3 minutes on one CPU core.
A participant that fails has `failed: ...` in its row, and the exit code is 1.
"""

import argparse
import gc
import importlib.util
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))
import weights  # noqa: E402
from benchmarks import naive  # noqa: E402
from benchmarks.failures import Failures  # noqa: E402
from formats import key_names as namings  # noqa: E402
from formats import recognize  # noqa: E402
from formats.fp8 import Fp8Linear, can_multiply, to_fp8  # noqa: E402
from formats.loader import FP8_LAYERS  # noqa: E402
from model.attention import Attention, plain_attention
from model.transformer import Flux, FluxParams  # noqa: E402
from pipeline import Pipeline, Prepared
from regional.attention import RegionalAttention, allowed  # noqa: E402
from regional.layout import FLUX_DEV, Layout, Region  # noqa: E402
from regional.mask import RegionTokens, region_tokens  # noqa: E402
from regional.sampling import Conditioning, by, guidance_of, noise_levels, sample  # noqa: E402
from runtime.choose import choose_attention, fastest_backends  # noqa: E402
from runtime.offload import FLUX_MODULATION  # noqa: E402
from sampler.flow import euler, image_ids, noise, pack, text_ids, unpack  # noqa: E402

GRIDS = {1: (1, 1), 4: (2, 2), 16: (4, 4)}
REGIONAL, LATE = 10, 14  # steps of a whole run
RATIO = 0.3
OURS, COMPILED, FP8, NAIVE, NAIVE_COMPILED, DIFFUSERS = (
    "ours",
    "compiled",
    "fp8",
    "naive",
    "naive-compiled",
    "diffusers",
)
GB = 1e9

Call = Callable[[], Tensor]
Step = str | int  # "plain", "late", or how many regions a regional step has
Times = dict[tuple[str, Step], float]  # seconds, by participant and step


class Setting(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    params: FluxParams
    text_length: int
    sizes: Sequence[tuple[int, int]]
    regions: Sequence[int]
    participants: Sequence[str]
    rounds: int
    pick: Callable[[list[float]], float]  # of the rounds' times


GPU = Setting(
    torch.device("cuda"), torch.bfloat16, FluxParams(), 512, [(1024, 1024), (1280, 768)], [1, 4, 16],
    [OURS, COMPILED, FP8, NAIVE, NAIVE_COMPILED, DIFFUSERS], 7, statistics.median,
)  # fmt: skip
PROXY = Setting(
    torch.device("cpu"), torch.float32,
    FluxParams(hidden_size=512, mlp_hidden=2048, num_heads=4, depth=2, depth_single_blocks=4),
    128, [(512, 512)], [4, 16], [OURS, NAIVE], 10, min,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ weights


def random_flux(setting: Setting) -> Flux:
    with torch.device("meta"):
        flux = Flux(setting.params)
    flux = flux.to(setting.dtype).to_empty(device=setting.device)
    for name, parameter in flux.named_parameters():
        nn.init.ones_(parameter) if name.endswith("scale") else nn.init.normal_(parameter, std=0.02)
    return flux.requires_grad_(False)


def twin(flux: Flux) -> Flux:
    """A second module with the very same weights in memory."""
    with torch.device("meta"):
        other = Flux(flux.params)
    other.load_state_dict(flux.state_dict(), assign=True)
    return other.requires_grad_(False)


def compiled(flux: Flux) -> Flux:
    flux.compile_blocks()
    return flux


def in_fp8(flux: Flux) -> Flux:
    """A second module whose blocks' matrices are in 8 bits, as the loader makes them; the rest is shared."""
    other = twin(flux)
    for name, layer in list(other.named_modules()):
        if isinstance(layer, nn.Linear) and FP8_LAYERS.search(name):
            with torch.device("meta"):
                small = Fp8Linear(layer.in_features, layer.out_features, can_multiply(layer.weight.device))
            numbers, scale = to_fp8(layer.weight)
            small.load_state_dict({"weight": numbers, "scale": scale, "bias": layer.bias}, assign=True)
            other.set_submodule(name, small.requires_grad_(False))
    return other


def diffusers_twin(flux: Flux) -> nn.Module:
    """diffusers' transformer; its weights are views of ours."""
    from diffusers import FluxTransformer2DModel

    params, head_dim = flux.params, flux.params.hidden_size // flux.params.num_heads
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(
            in_channels=params.in_channels, num_layers=params.depth, num_single_layers=params.depth_single_blocks,
            attention_head_dim=head_dim, num_attention_heads=params.num_heads,
            joint_attention_dim=params.context_in_dim, pooled_projection_dim=params.vec_in_dim, guidance_embeds=True,
            axes_dims_rope=(head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16),
        )  # fmt: skip
    state = {}
    for name, tensor in flux.state_dict().items():
        *firsts, last = [row.key for row in namings.flux_from_diffusers(name, {})]
        pieces = tensor.split([params.hidden_size] * len(firsts) + [len(tensor) - params.hidden_size * len(firsts)])
        state |= dict(zip([*firsts, last], pieces))
    for name in "norm_out.linear.weight", "norm_out.linear.bias":  # theirs is (scale, shift), ours (shift, scale)
        state[name] = state[name].roll(params.hidden_size, dims=0)
    theirs.load_state_dict(state, assign=True)
    return theirs.requires_grad_(False).eval()


def weight_bytes(module: nn.Module, all_of_them: bool = True) -> int:
    """Bytes of a module's weights; without the modulation layers of its blocks, or `all_of_them`."""
    named = module.named_parameters()
    return sum(weight.nbytes for name, weight in named if all_of_them or not FLUX_MODULATION.search(name))


# ------------------------------------------------------------------------------------------------ what is given


class Scene(NamedTuple):
    """A layout and what its steps are given.

    img: (1, L_img, 64) float32 noise, and img_ids (1, L_img, 3), both in the order of the tokens' bits.
    bits: (L,) int64, those of [txt_1 .. txt_R, img]; None without regions. backends: ours for unmasked attention.
    """

    layout: Layout
    tokens: RegionTokens | None
    conditioning: Conditioning
    img: Tensor
    img_ids: Tensor
    bits: Tensor | None
    backends: list[SDPBackend]

    @property
    def guidance(self) -> Tensor:
        return guidance_of(self.layout, self.img.device)


def grid_layout(width: int, height: int, regions: int, text_length: int) -> Layout:
    boxes = []
    if regions:
        columns, rows = GRIDS[regions]
        xs, ys = ([size * i // n for i in range(n + 1)] for size, n in ((width, columns), (height, rows)))
        boxes = [(x0, y0, x1, y1) for y0, y1 in zip(ys, ys[1:]) for x0, x1 in zip(xs, xs[1:])]
    return Layout(
        prompt="p", width=width, height=height, steps=REGIONAL + LATE, mask_inject_steps=REGIONAL, base_ratio=RATIO,
        max_sequence_length=text_length, region_max_sequence_length=text_length,
        regions=tuple(Region(prompt="r", box=box) for box in boxes),
    ).resolved(FLUX_DEV)  # fmt: skip


def scene(setting: Setting, width: int, height: int, regions: int) -> Scene:
    device, params, length = setting.device, setting.params, setting.text_length
    sizes = {"depth": params.depth, "depth_single_blocks": params.depth_single_blocks}
    layout = grid_layout(width, height, regions, length).resolved(FLUX_DEV._replace(**sizes))
    img, ids = pack(noise(width, height, 0)).to(device, setting.dtype).float(), image_ids(width, height)
    tokens, bits, backends = None, None, []
    if regions:
        tokens = region_tokens(layout)
        own, order = tokens.sorted()
        img, ids, bits = img[:, order], ids[:, order], own.bits(length).to(device)
    if device.type == "cuda":
        heads = params.num_heads
        q = torch.randn(1, heads, length + img.shape[1], params.hidden_size // heads, device=device)
        backends = fastest_backends(q.to(setting.dtype))
    txt, texts, y = (
        torch.randn(shape, device=device).to(setting.dtype)
        for shape in (
            (1, length, params.context_in_dim),
            (regions, length, params.context_in_dim),
            (1, params.vec_in_dim),
        )
    )
    return Scene(layout, tokens, Conditioning(txt, texts if regions else None, y), img, ids, bits, backends)


# ------------------------------------------------------------------------------------------------ who takes part


class Participant:
    """`step` gives a function that makes one step, a velocity (1, L_img, 64), or None if there is no such step here;
    `run` makes a whole picture's latents."""

    weights: int  # bytes that it needs on the device

    def step(self, kind: Step, scene: Scene) -> Call | None:
        return None

    def run(self, scene: Scene) -> Tensor | None:
        return None


class Ours(Participant):
    def __init__(self, flux: Flux, setting: Setting):
        self.flux, self.weights = flux, weight_bytes(flux, all_of_them=False)
        self.masked_attention = choose_attention("auto", setting.device, setting.dtype)

    def step(self, kind: Step, scene: Scene) -> Call:
        txt = scene.conditioning.txt
        if not isinstance(kind, int):
            return self.velocity(scene, txt, plain_attention)
        attention = RegionalAttention(self.masked_attention, scene.bits, txt.shape[1], scene.img.shape[1], RATIO)
        txt = torch.cat([scene.conditioning.regions.flatten(0, 1)[None], txt], dim=1)
        return self.velocity(scene, txt, attention, join=attention.join)

    def velocity(self, scene: Scene, txt: Tensor, attention: Attention, **hooks: Any) -> Call:
        """As `sample` asks for it: the modulation of all steps is computed before the first."""
        modulation = self.flux.modulation(*time_and_vectors(scene))
        given = scene.img_ids, txt, text_ids(txt.shape[1]), modulation

        def call() -> Tensor:
            with preferred(scene.backends):
                return self.flux(scene.img.to(txt.dtype), *given, attention, **hooks)

        return call

    def run(self, scene: Scene) -> Tensor:
        with preferred(scene.backends):
            return sample(self.flux, scene.layout, scene.tokens, scene.conditioning, 0, by(self.masked_attention))


class Naive(Participant):
    def __init__(self, flux: Flux, blocks: naive.Blocks = naive.EAGER):
        self.flux, self.blocks, self.weights = flux, blocks, weight_bytes(flux)

    def steps(self, scene: Scene) -> naive.Naive:
        mask = allowed(scene.bits[:, None], scene.bits[None, :])
        length = scene.conditioning.txt.shape[1]
        return naive.Naive(self.flux, scene.img_ids, length, mask, RATIO, blocks=self.blocks)

    def step(self, kind: Step, scene: Scene) -> Call | None:
        if kind == "plain":
            return None
        steps, given = self.steps(scene), time_and_vectors(scene)
        txt, regions, *_ = scene.conditioning
        if kind == "late":
            return lambda: steps.late_step(scene.img.to(txt.dtype), txt, *given)
        return lambda: steps.regional_step(scene.img.to(txt.dtype), txt, regions, *given)

    def run(self, scene: Scene) -> Tensor | None:
        if scene.bits is None:
            return None
        steps, levels = self.steps(scene), noise_levels(scene.layout, self.flux.params)
        txt, regions, y, _ = scene.conditioning

        def regional(img: Tensor, t: float, step: int) -> Tensor:
            given = torch.full((1,), t, device=txt.device), y, scene.guidance
            return steps.regional_step(img.to(txt.dtype), txt, regions, *given)

        def late(img: Tensor, t: float, step: int) -> Tensor:
            given = torch.full((1,), t, device=txt.device), y, scene.guidance
            return steps.late_step(img.to(txt.dtype), txt, *given)

        *_, img = euler(regional, scene.img, levels, range(REGIONAL))
        *_, img = euler(late, img, levels, range(REGIONAL, REGIONAL + LATE))
        _, order = scene.tokens.sorted()
        return unpack(img[:, order.argsort()], scene.layout.width, scene.layout.height)


class Diffusers(Participant):
    def __init__(self, flux: Flux):
        self.flux = diffusers_twin(flux)
        self.weights = weight_bytes(self.flux)

    def step(self, kind: Step, scene: Scene) -> Call | None:
        if kind != "plain":
            return None
        txt = scene.conditioning.txt
        ids = [ids[0].to(txt.device, torch.float32) for ids in (scene.img_ids, text_ids(txt.shape[1]))]
        t, y, guidance = time_and_vectors(scene)
        return lambda: self.flux(scene.img.to(txt.dtype), txt, y, t, *ids, guidance, return_dict=False)[0]


def time_and_vectors(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """The first step's timestep (1,), y (1, vec) and guidance (1,)."""
    return torch.ones(1, device=scene.img.device), scene.conditioning.y, scene.guidance


def preferred(backends: list[SDPBackend]) -> AbstractContextManager:
    return sdpa_kernel([*backends, SDPBackend.MATH], set_priority=True) if backends else nullcontext()


def participants(setting: Setting, failures: Failures) -> dict[str, Participant]:
    flux = random_flux(setting)
    makers = {
        OURS: lambda: Ours(flux, setting),
        COMPILED: lambda: Ours(compiled(twin(flux)), setting),
        FP8: lambda: Ours(compiled(in_fp8(flux)), setting),
        NAIVE: lambda: Naive(flux),
        NAIVE_COMPILED: lambda: Naive(flux, naive.compiled_blocks()),
        DIFFUSERS: lambda: Diffusers(flux),
    }
    left = set(setting.participants)
    if DIFFUSERS in left and not importlib.util.find_spec("diffusers"):
        print("diffusers is not installed here, and left out.\n")
        left.remove(DIFFUSERS)
    who = {}
    for name, make in makers.items():
        if name in left:
            with failures.caught(f"| {name} | it can't be made |"):
                who[name] = make()
    return who


# ------------------------------------------------------------------------------------------------ measuring


def turns(calls: dict[Any, Call], device: torch.device) -> dict[Any, float | Exception]:
    """Seconds of one call each, without a pause in between; or why it failed."""
    if device.type != "cuda":
        return {key: host_seconds(call) for key, call in calls.items()}
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    attempt(next(iter(calls.values())))  # so that the first one, too, is launched while the GPU is busy
    events[0].record()
    errors = {}
    for (key, call), event in zip(calls.items(), events[1:]):
        errors[key] = attempt(call)
        event.record()
    torch.cuda.synchronize()
    return {key: errors[key] or start.elapsed_time(end) / 1e3 for key, start, end in zip(calls, events, events[1:])}


def host_seconds(call: Call) -> float | Exception:
    start = time.perf_counter()
    error = attempt(call)
    return error or time.perf_counter() - start


def attempt(call: Call) -> Exception | None:
    """Make a call; returns what it raised."""
    try:
        call()
    except Exception as error:
        return error.with_traceback(None)  # which would hold the tensors of every frame
    return None


def measured(calls: dict[Any, Call], setting: Setting) -> dict[Any, float | Exception]:
    """Seconds of each call, by all rounds; or why it failed, and then it has no further turn."""
    rounds, failed = [], {}
    for _ in range(setting.rounds):
        left = {key: call for key, call in calls.items() if key not in failed}
        if left:
            rounds.append(turns(left, setting.device))
            failed |= {key: found for key, found in rounds[-1].items() if isinstance(found, Exception)}
    return {key: failed[key] if key in failed else setting.pick([each[key] for each in rounds]) for key in calls}


def timed(run: Call) -> float:
    """Seconds until the result can be read."""
    start = time.perf_counter()
    run().sum().item()
    return time.perf_counter() - start


def memory(device: torch.device, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def made(participant: Participant, kind: Step, scene: Scene) -> tuple[Call | None, Tensor | None, int]:
    """The step, warmed up, what it gives, and its peak bytes beyond what was there."""
    device = scene.img.device
    before = memory(device)
    call = participant.step(kind, scene)
    if call is None:
        return None, None, 0
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    out = call()
    return call, out, memory(device, peak=True) - before


class Watts:
    """The card's power while a `with` block runs, `median` in W; None where nvidia-smi does not tell."""

    def __init__(self, device: torch.device):
        self.readings, self.done = [], threading.Event()
        self.watcher = None
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            self.watcher = threading.Thread(target=self.watch, args=(torch.cuda.get_device_properties(device).uuid,))

    def watch(self, uuid: str) -> None:
        while not self.done.wait(0.2):
            self.readings += [float(x) for x in nvidia_smi("power.draw", "-i", f"GPU-{uuid}").split() if x[0].isdigit()]

    def __enter__(self) -> "Watts":
        if self.watcher:
            self.watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.watcher:
            self.done.set()
            self.watcher.join()

    @property
    def median(self) -> float | None:
        return statistics.median(self.readings) if self.readings else None


def nvidia_smi(query: str, *options: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", *options]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# ------------------------------------------------------------------------------------------------ tables


def describe(setting: Setting) -> None:
    if setting.device.type != "cuda":
        print(f"{platform.machine()}, torch {torch.__version__}, threads: {torch.get_num_threads()}\n")
        return
    import triton

    driver = nvidia_smi("driver_version").split("\n")[0] if shutil.which("nvidia-smi") else "not told"
    print(
        f"{torch.cuda.get_device_name()}, driver {driver}, torch {torch.__version__}, Triton {triton.__version__}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}\n"
    )


def attention_kernels(setting: Setting, scene: Scene) -> None:
    """Which of the library's attentions was taken, by the name of the GPU kernel that most time goes into."""
    heads, length = setting.params.num_heads, setting.text_length + scene.img.shape[1]
    q = torch.randn(1, heads, len(scene.bits), setting.params.hidden_size // heads, device=setting.device)
    q = q.to(setting.dtype)
    mask = allowed(scene.bits[:, None], scene.bits[None, :])

    def unmasked() -> Tensor:
        return F.scaled_dot_product_attention(*[q[:, :, :length]] * 3)

    def preferred_one() -> Tensor:
        with preferred(scene.backends):
            return unmasked()

    for what, call in {
        "unmasked, as torch chooses (naive, diffusers)": unmasked,
        f"unmasked, {scene.backends[0].name} preferred (ours)": preferred_one,
        f"dense mask, {len(scene.bits)} tokens (naive)": lambda: F.scaled_dot_product_attention(q, q, q, mask),
    }.items():
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        longest = max(profile.key_averages(), key=lambda event: event.device_time_total, default=None)
        print(f"- {what}: `{longest.key[:100] if longest else 'not told'}`")
    print()


def difference(out: Tensor, reference: Tensor | None) -> str:
    if reference is None:
        return ""
    return f"{float((out - reference).float().norm() / reference.float().norm()):.0e}"


def steps_table(who: dict[str, Participant], setting: Setting, size: tuple[int, int], failures: Failures) -> Times:
    """Prints every kind of step at one size, by everybody; gives the times of those that did not fail."""
    calls, notes = {}, {}

    def row(name: str, kind: Step) -> str:
        what = f"regional, {kind}" if isinstance(kind, int) else kind
        return f"| {size[0]} x {size[1]} | {what} | {name} |"

    for kind, given in scenes_of(setting, *size).items():
        reference = None
        for name, participant in who.items():
            with failures.caught(row(name, kind)):
                call, out, extra = made(participant, kind, given)
                if call:
                    calls[name, kind] = call
                    extra = f"{extra / 2**20:.0f}" if extra else ""
                    notes[name, kind] = f"{extra} | {difference(out, reference)}"
                    reference = out if reference is None else reference
    times, found = {}, {}
    with failures.caught(f"| {size[0]} x {size[1]} | all steps |"):  # a GPU that failed for good
        found = measured(calls, setting)
    for key, seconds in found.items():
        if isinstance(seconds, Exception):
            failures.add(row(*key), seconds)
        else:
            times[key] = seconds
            print(f"{row(*key)} {seconds * 1e3:.1f} | {notes[key]} |", flush=True)
    return times


def scenes_of(setting: Setting, width: int, height: int) -> dict[Step, Scene]:
    regional = {regions: scene(setting, width, height, regions) for regions in setting.regions}
    return {"plain": scene(setting, width, height, 0), "late": regional[4], **regional}


def run_seconds(times: Times, name: str, regions: int) -> float:
    """A whole run's, from its steps'; without regions that of plain FLUX."""
    if not regions:
        return (REGIONAL + LATE) * times[name, "plain"]
    return REGIONAL * times[name, regions] + LATE * times[name, "late"]


def runs_table(who: dict[str, Participant], setting: Setting, times: Times, failures: Failures) -> None:
    print("\n| regions | | run, from its steps, s | in one piece, s | W |\n|---|---|---|---|---|", flush=True)
    for regions in (0, *setting.regions):
        given = scene(setting, *setting.sizes[0], regions)
        for name, participant in who.items():
            if not {(name, regions or "plain"), (name, "late" if regions else "plain")} <= times.keys():
                continue
            row = f"| {regions} | {name} | {run_seconds(times, name, regions):.2f} |"
            with failures.caught(row), Watts(setting.device) as watts:
                seconds = None if name == DIFFUSERS else timed(lambda p=participant, g=given: p.run(g))
                whole = "" if seconds is None else f"{seconds:.2f}"
                power = f"{watts.median:.0f}" if watts.median else ""
                print(f"{row} {whole} | {power} |", flush=True)


class Goal(NamedTuple):
    """floor: what has to be reached; aim: what would be good. `least`: more is better."""

    name: str
    value: float
    floor: float
    aim: float
    least: bool = True

    def reaches(self, limit: float) -> bool:
        return self.value >= limit if self.least else self.value <= limit

    def row(self) -> str:
        verdict = "aim met" if self.reaches(self.aim) else "met" if self.reaches(self.floor) else "missed"
        sign = ">=" if self.least else "<="
        floor = "it runs" if math.isinf(self.floor) else f"{sign} {self.floor:g}"
        return f"| {self.name} | {self.value:.2f} | {floor} | {sign} {self.aim:g} | {verdict} |"


def report(goals: list[Goal]) -> bool:
    """Prints them; are all floors reached?"""
    print("\n| | measured | floor | aim | |\n|---|---|---|---|---|")
    for goal in goals:
        print(goal.row())
    return all(goal.reaches(goal.floor) for goal in goals)


def goals_of(times: Times, who: dict[str, Participant]) -> list[Goal]:
    """Those that everybody is there for. The ratios of G1 to G6 are of whole runs."""
    goals = []

    def faster(name: str, rival: str, ours: str, regions: int, floor: float, aim: float) -> None:
        if {(x, kind) for x in (rival, ours) for kind in (regions, "late")} <= times.keys():
            ratio = run_seconds(times, rival, regions) / run_seconds(times, ours, regions)
            goals.append(Goal(f"{name}: {rival} / {ours}, R = {regions}", ratio, floor, aim))

    faster("G1", NAIVE, COMPILED, 4, 1.9, 2.3)
    faster("G1", NAIVE, COMPILED, 16, 2.3, 3.0)
    faster("G2", NAIVE, OURS, 4, 1.25, 1.6)
    faster("G3", NAIVE_COMPILED, COMPILED, 4, 1.3, 1.5)
    faster("G3", NAIVE_COMPILED, COMPILED, 16, 1.6, 2.2)
    faster("G5", NAIVE, FP8, 4, 2.6, 3.2)
    if (COMPILED, "plain") in times:
        plain = times[COMPILED, "plain"]
        for regions, floor, aim in (1, 1.45, 1.35), (4, 1.5, 1.4), (16, 2.0, 1.85):
            if {(COMPILED, regions), (COMPILED, "late")} <= times.keys():
                ratio = run_seconds(times, COMPILED, regions) / run_seconds(times, COMPILED, 0)
                goals.append(Goal(f"G6: compiled / own plain, R = {regions}", ratio, floor, aim, least=False))
        rival = DIFFUSERS if DIFFUSERS in who else OURS
        if (rival, "plain") in times:
            goals.append(Goal(f"G8: plain step, {rival} / compiled", times[rival, "plain"] / plain, 1.5, 1.7))
        if (COMPILED, "late") in times:
            late = times[COMPILED, "late"] / plain
            goals.append(Goal("G9: compiled, late step / plain step", late, 1.02, 1.0, least=False))
    if COMPILED in who:
        goals.append(Goal("M2: weights, GB", who[COMPILED].weights / GB, 17.5, 17.5, least=False))
    if FP8 in who:
        goals.append(Goal("M2: weights in fp8, GB", who[FP8].weights / GB, 8.8, 8.8, least=False))
    return goals


def proxy_goals(times: Times) -> list[Goal]:
    goals = [
        Goal(f"regional step, naive / ours, R = {regions}", times[NAIVE, regions] / times[OURS, regions], floor, aim)
        for regions, floor, aim in ((4, 1.2, 1.26), (16, 1.5, 1.72))
        if {(NAIVE, regions), (OURS, regions)} <= times.keys()
    ]
    if not {(OURS, "late"), (OURS, "plain")} <= times.keys():
        return goals
    late = times[OURS, "late"] / times[OURS, "plain"]
    return [*goals, Goal("ours, late step / plain step", late, 1.05, 1.0, least=False)]


def compare(setting: Setting, failures: Failures) -> tuple[Times, dict[str, Participant]]:
    """All tables of steps; gives the times at the first size."""
    describe(setting)
    who = participants(setting, failures)
    for name, participant in who.items():
        print(f"{name}: {participant.weights / GB:.2f} GB of weights")
    print()
    if setting.device.type == "cuda":
        with failures.caught("- the library's attentions:"):
            attention_kernels(setting, scene(setting, *setting.sizes[0], 4))
    print("| picture | step | | ms | extra MiB | differs from the first by |\n|---|---|---|---|---|---|", flush=True)
    times = [steps_table(who, setting, size, failures) for size in setting.sizes]
    return times[0], who


# ------------------------------------------------------------------------------------------------ caps


class Cap(NamedTuple):
    """gigabytes: what torch may take. how: what the pipeline is told. rival: whose time without a cap it is compared
    with."""

    what: str
    gigabytes: float
    how: dict[str, str]
    rival: str
    aim: float


CAPS = [
    Cap("bfloat16", 24, {"quantize": "none", "offload": "none"}, "bfloat16", 1.1),
    Cap("fp8", 12, {"quantize": "fp8", "offload": "none"}, "fp8", 1.6),
    Cap("bfloat16, streamed as needed", 12, {"quantize": "none", "offload": "auto"}, "bfloat16", 1.6),
]
CAPPED_RUNS = 3


def limit(gigabytes: float | None, device: torch.device) -> None:
    """What torch may take of the card from now on; all of it for None."""
    gc.collect()  # compiled modules hold themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if gigabytes is None else gigabytes * GB / total)
        torch.cuda.reset_peak_memory_stats()


def random_checkpoint(setting: Setting, folder: Path) -> recognize.Source:
    path = folder / "flux.safetensors"
    save_file({name: tensor.cpu() for name, tensor in random_flux(setting).state_dict().items()}, path)
    return weights.pick("flux", "--flux", path)


def pipeline_for(source: recognize.Source, setting: Setting, how: dict[str, str]) -> Pipeline:
    """A pipeline with this transformer; no other part of it is ever loaded."""
    dtype = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[setting.dtype]
    drawing = Pipeline(
        "pocket", device=setting.device.type, dtype=dtype, compile=COMPILED in setting.participants, **how
    )
    drawing.parts.checkpoint = drawing.checkpoint._replace(flux=source)
    return drawing


def caps(setting: Setting, failures: Failures) -> list[Goal]:
    """Whole runs with four regions under each cap, and without it; the weights are loaded under it too."""
    describe(setting)
    given = scene(setting, *setting.sizes[0], 4)
    prepared = Prepared(given.layout, given.tokens, given.conditioning)
    uncapped, goals = {}, []
    print("| | cap, GB | weights, GB | peak, GB | run, s | without the cap, s |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        source = random_checkpoint(setting, Path(folder))
        for cap in CAPS:
            try:
                with failures.caught(f"| {cap.what} | {cap.gigabytes} |"):
                    seconds = capped(cap, source, prepared, setting, uncapped)
                    name = f"M3: {cap.what} under {cap.gigabytes} GB, of {cap.rival}'s time without"
                    if cap.rival in uncapped:
                        goals.append(Goal(name, seconds / uncapped[cap.rival], math.inf, cap.aim, least=False))
            finally:
                limit(None, setting.device)
    return goals


def capped(
    cap: Cap, source: recognize.Source, prepared: Prepared, setting: Setting, uncapped: dict[str, float]
) -> float:
    """Prints a cap's row and gives the seconds of a run under it; adds those of one without it to `uncapped`."""
    limit(cap.gigabytes, setting.device)
    drawing = pipeline_for(source, setting, cap.how)
    seconds, in_use = run_times(drawing, prepared, setting)
    peak = memory(setting.device, peak=True)
    limit(None, setting.device)
    if cap.rival == cap.what:
        uncapped[cap.what], _ = run_times(drawing, prepared, setting)
    free = f"{uncapped[cap.what]:.2f}" if cap.what in uncapped else ""
    sizes = " | ".join(f"{x / GB:.2f}" for x in (in_use, peak))
    print(f"| {cap.what} | {cap.gigabytes} | {sizes} | {seconds:.2f} | {free} |", flush=True)
    return seconds


def run_times(drawing: Pipeline, prepared: Prepared, setting: Setting) -> tuple[float, int]:
    """Seconds of a whole run, the modulation known already, and the bytes that stay on the device in between. NaN
    where it does not fit."""
    try:
        timed(lambda: drawing.denoise(prepared, 0))
        in_use = memory(setting.device)
        return statistics.median(timed(lambda: drawing.denoise(prepared, 0)) for _ in range(CAPPED_RUNS)), in_use
    except torch.OutOfMemoryError:
        return math.nan, 0


# ------------------------------------------------------------------------------------------------ the command line


def size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return width, height


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxy", action="store_true", help="a small version of it on the CPU")
    parser.add_argument("--caps", action="store_true", help="only whole runs of ours, under caps of 24 and 12 GB")
    parser.add_argument("--only", nargs="+", choices=GPU.participants, metavar="NAME", help="who takes part")
    parser.add_argument("--sizes", nargs="+", type=size, metavar="WxH", help="pictures, as 1024x1024")
    parser.add_argument("--no-runs", action="store_true", help="steps alone, no run in one piece")
    parser.add_argument("--rounds", type=int, help=f"at least 5; default {GPU.rounds}, with --proxy {PROXY.rounds}")
    args = parser.parse_args()
    if not args.proxy and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --proxy runs anywhere")
    if args.proxy and args.only:
        parser.error("--proxy needs both of its participants")
    if args.rounds is not None and args.rounds < 5:
        parser.error("--rounds: a median of fewer than 5 says little")
    setting = PROXY if args.proxy else GPU
    setting = setting._replace(
        participants=args.only or setting.participants,
        sizes=args.sizes or setting.sizes,
        rounds=args.rounds or setting.rounds,
    )
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # bfloat16, fp8 and sizes that happen to be equal, each once
    failures = Failures()
    if args.caps:
        goals = caps(setting, failures)
    elif args.proxy:
        torch.set_num_threads(1)  # several would wait for whichever of them another program holds up
        goals = proxy_goals(compare(setting, failures)[0])
    else:
        times, who = compare(setting, failures)
        if not args.no_runs:
            runs_table(who, setting, times, failures)
        goals = goals_of(times, who)
    reached = report(goals)
    return failures.exit_code() or int(not reached)


if __name__ == "__main__":
    sys.exit(main())
