"""What a layout is: frozen structs. The reader checks them, `resolved` parses text;
below that nothing is checked or parsed again."""

import re
from collections.abc import Collection
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta, Struct
from msgspec.structs import replace

from model.attention import Block
from sampler.flow import SAMPLERS, SCHEDULES

MAX_REGIONS = 61
SHAPES = ("box", "ellipse", "polygon", "mask", "color")
EXTRAS = ("loras", "controlnets", "image", "control_image", "image_prompts", "references")
UNION_MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "lq")
MODES = {name: mode for mode, name in enumerate(UNION_MODES)}

# Patterns end in $(?!\n), as $ alone lets a line break follow.
PERCENT = r"0{0,6}(100(\.0{1,20})?|[0-9]{1,2}(\.[0-9]{1,20})?)%"  # at most 100%
EVERY = r"\s*every\s+([1-9][0-9]{0,8})\s*"
BLOCK_RANGE = r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?"
HEX = r"^#[0-9a-fA-F]{6}$(?!\n)"
BLOCKS = rf"^({EVERY}|{BLOCK_RANGE}(,{BLOCK_RANGE})*)$(?!\n)"

Pixels = Annotated[int, Meta(ge=16, le=8192)]
Steps = Annotated[int, Meta(ge=1, le=10000)]
Guidance = Annotated[float, Meta(ge=0, le=1000)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Tokens = Annotated[int, Meta(ge=2, le=4096)]
Interval = Annotated[int, Meta(ge=1)]
Index = Annotated[int, Meta(ge=0)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
Opacity = Annotated[float, Meta(gt=0, le=1)]
Scale = Annotated[float, Meta(ge=-100, le=100)]
Strength = Annotated[float, Meta(ge=0, le=100)]
Feather = Annotated[float, Meta(ge=0, le=8192)]
CFG = Annotated[float, Meta(ge=1, le=1000)]
Denoise = Annotated[float, Meta(gt=0, le=1)]
Percent = Annotated[str, Meta(pattern=rf"^{PERCENT}$(?!\n)")]
SomePercent = Annotated[str, Meta(pattern=rf"^(?![0.]*%){PERCENT}$(?!\n)")]
Count = Index | Percent
Text = Annotated[str, Meta(pattern=r"\S")]
Sampler = Literal[tuple(SAMPLERS)]
Schedule = Literal[tuple(SCHEDULES)]
Overlap = Literal["share", "last", "first", "smallest"]
Mode = Literal[tuple(MODES)]
Blocks = tuple[Index, ...] | str  # With a pattern in such a union, msgspec crashes.
Position = int | float | str  # pixels, or a percentage of the width or height
Box = tuple[Position, Position, Position, Position]
Points = Annotated[tuple[tuple[Position, Position], ...], Meta(min_length=3)]
Polygon = Annotated[tuple[Any, ...], Meta(min_length=1)]  # points, or lists of them
Byte = Annotated[int, Meta(ge=0, le=255)]
RGB = Annotated[tuple[Byte, ...], Meta(min_length=3, max_length=3)]
Color = Annotated[int, Meta(ge=0, lt=2**24)] | str | RGB

BASE_STEPS = "of them with a base branch, a count or 40%"
STYLE = "appended to every prompt, or a text with {prompt} in it"
ORDER = "where regions overlap, the highest is on top"
FILE_OR_REPOSITORY = "a path, or a repository, org/name or org/name:file"
MODE = f"a union's mode, a number or {', '.join(MODES)}"
RESIDUALS = "published: the base branch gets none of the single blocks'"
WHICH_BLOCKS = 'the masked ones: "every 2", "0-18", "0-4, 8" or a list'
COLOR = 'one of the layout\'s map: "#rrggbb", [r, g, b] or an index'
ACROSS = "open: all image tokens see each other"
SHARED = "shared: one image stream in single blocks; not as published"
REGION_TOKENS = "text tokens of each region, a count or 25% of max_sequence_length"
DENOISE = "the fraction of steps to run; default: 0.6, with repaint 1"
LOOKS = "images whose looks it takes on (FLUX.1 Redux)"
REFERENCES = "images for FLUX.1 Kontext"
PRESET = "control: defaults for many regions"
METHOD = "rpg: whole images composed; plain: unmodified FLUX"


class Defaults(NamedTuple):
    """What a model decides where a layout does not; size: width and height."""

    steps: int
    max_sequence_length: int
    size: int
    depth: int
    depth_single_blocks: int


FLUX_DEV = Defaults(24, 512, 1024, 19, 38)


class Part(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a layout; keys have ranges and meanings."""


class Lora(Part):
    """A LoRA for the whole image."""

    file: Annotated[str, FILE_OR_REPOSITORY]
    scale: Annotated[Scale, "how strongly it acts"] = 1.0
    image: Annotated[str | None, "the control image of a control LoRA"] = None


class RegionLora(Part):
    """A LoRA for one region."""

    file: Annotated[str, FILE_OR_REPOSITORY]
    scale: Annotated[Scale, "how strongly it acts"] = 1.0
    plain_steps: Annotated[bool, "act in the plain steps too"] = False


class Control(Part):
    """A ControlNet and the image that it follows."""

    model: Annotated[str, FILE_OR_REPOSITORY]
    image: Annotated[str, "the image that it follows"]
    mode: Annotated[Index | Mode | None, MODE] = None
    scale: Annotated[Scale, "how strongly it acts"] = 0.7
    start: Annotated[Ratio, "the fraction of steps where it begins"] = 0.0
    end: Annotated[Ratio, "the fraction of steps where it ends"] = 1.0
    region: Annotated[Index | None, "the index of its one region"] = None
    residuals: Annotated[Literal["all", "published"], RESIDUALS] = "all"
    preprocess: Annotated[Literal["canny"] | None, "canny: follow its edges"] = None

    def acts(self, step: int, steps: int) -> bool:
        return step / steps >= self.start and (step + 1) / steps <= self.end


class ImagePrompt(Part):
    """An image as further tokens of a prompt."""

    file: Annotated[str, "the image"]
    strength: Annotated[Strength, "multiplies its tokens"] = 1.0


class Repaint(Part):
    """A part of an image, by exactly one shape."""

    box: Annotated[Box | None, "as a region's"] = None
    ellipse: Annotated[Box | None, "as a region's"] = None
    polygon: Annotated[Polygon | None, "as a region's"] = None
    mask: Annotated[str | None, "as a region's"] = None
    regions: Annotated[tuple[Index, ...] | None, "the indices of regions"] = None
    feather: Annotated[Feather, "pixels beyond it that blend"] = 0.0


class Start(Part):
    """An image to start from."""

    file: Annotated[str, "the image"]
    denoise: Annotated[Denoise | None, DENOISE] = None
    repaint: Annotated[Repaint | None, "draw this anew, keep the rest"] = None


class Region(Part):
    """A region: its prompt, and exactly one shape."""

    prompt: Annotated[Text, "what the region shows, in words"]
    box: Annotated[Box | None, "x0, y0, x1, y1, half-open, in pixels or 25%"] = None
    ellipse: Annotated[Box | None, "inscribed in the box x0, y0, x1, y1"] = None
    polygon: Annotated[Polygon | None, "points [x, y], or lists of them (even-odd)"] = None
    mask: Annotated[str | None, "an image; pixels >= 128 are inside"] = None
    color: Annotated[Color | None, COLOR] = None
    order: Annotated[int, ORDER] = 0
    opacity: Annotated[Opacity, "how far it hides the regions below"] = 1.0
    strength: Annotated[Strength, "attention weight of its prompt; published: 1"] = 1.0
    feather: Annotated[Feather, "over how many pixels its edge is soft"] = 0.0
    mask_inject_steps: Annotated[Count | None, "its own, a count or 40%"] = None
    base_ratio: Annotated[Ratio | None, "its own, in place of the layout's"] = None
    loras: Annotated[tuple[RegionLora, ...], "LoRAs for it alone"] = ()
    negative_prompt: Annotated[str | None, "its own, in place of the layout's"] = None
    image_prompts: Annotated[tuple[ImagePrompt, ...], LOOKS] = ()
    references: Annotated[tuple[str, ...], REFERENCES] = ()

    @property
    def shape(self) -> str:
        return next(key for key in SHAPES if getattr(self, key) is not None)


Regions = Annotated[tuple[Region, ...], Meta(max_length=MAX_REGIONS)]


class Layout(Part, dict=True):
    """One image. Null stands for the model's default, and for a random seed."""

    prompt: Annotated[str, "the base prompt"]
    background_prompt: Annotated[str, "where there is no region"] = "a photo"
    style: Annotated[str, STYLE] = ""
    width: Annotated[Pixels | None, "in pixels, a multiple of 16"] = None
    height: Annotated[Pixels | None, "in pixels, a multiple of 16"] = None
    steps: Annotated[Steps | None, "denoising steps; default: the model's"] = None
    sampler: Annotated[Sampler, "a step of heun costs two"] = "euler"
    schedule: Annotated[Schedule, "noise levels; flux: published"] = "flux"
    guidance: Annotated[Guidance, "guidance of FLUX.1-dev"] = 3.5
    seed: Annotated[Seed | None, "of the noise; default: random"] = None
    base_ratio: Annotated[Ratio, "weight of the base-prompt branch in the blend"] = 0.3
    mask_inject_steps: Annotated[Count, "regional steps, a count or 40%"] = "40%"
    base_steps: Annotated[Count, BASE_STEPS] = "100%"
    double_inject_interval: Annotated[Interval, "mask every N-th double block"] = 1
    single_inject_interval: Annotated[Interval, "mask every N-th single block"] = 1
    double_blocks: Annotated[Blocks | None, WHICH_BLOCKS] = None
    single_blocks: Annotated[Blocks | None, WHICH_BLOCKS] = None
    image_attention: Annotated[Literal["isolated", "open"], ACROSS] = "isolated"
    base_stream: Annotated[Literal["separate", "shared"], SHARED] = "separate"
    max_sequence_length: Annotated[Tokens | None, "text tokens of the base prompt"] = None
    region_max_sequence_length: Annotated[Tokens | SomePercent | None, REGION_TOKENS] = None
    preset: Annotated[Literal["published", "control"], PRESET] = "published"
    map: Annotated[str | None, "an image of regions given by color"] = None
    overlap: Annotated[Overlap, "which of its regions a token belongs to"] = "share"
    method: Annotated[Literal["regional", "rpg", "plain"], METHOD] = "regional"
    loras: Annotated[tuple[Lora, ...], "LoRAs for the whole image"] = ()
    controlnets: Annotated[tuple[Control, ...], "ControlNets for the whole image"] = ()
    image: Annotated[Start | None, "an image to start from"] = None
    control_image: Annotated[str | None, "what FLUX.1 Canny or Depth follows"] = None
    negative_prompt: Annotated[str, "what is not wanted"] = ""
    true_cfg_scale: Annotated[CFG, "how far away from it; 1: not used"] = 1.0
    cfg_batch: Annotated[bool, "both prompts in one forward pass"] = False
    image_prompts: Annotated[tuple[ImagePrompt, ...], LOOKS] = ()
    references: Annotated[tuple[str, ...], REFERENCES] = ()
    regions: Annotated[Regions, f"at most {MAX_REGIONS}"] = ()

    def filled(self, defaults: Defaults) -> "Layout":
        """The layout with the model's defaults filled in, as metadata record it."""
        length = self.max_sequence_length or defaults.max_sequence_length
        own = self.region_max_sequence_length or length
        if isinstance(own, str):
            own = max(2, count_of(own, length))
        lengths = {"max_sequence_length": length, "region_max_sequence_length": own}
        width = self.width or defaults.size
        height = self.height or defaults.size
        steps = self.steps or defaults.steps
        return replace(self, steps=steps, width=width, height=height, **lengths)

    def styled(self) -> "Layout":
        """The layout with its style in all prompts."""

        def full(part: Any, key: str = "prompt") -> Any:
            text = getattr(part, key)
            if "{prompt}" in self.style:
                text = self.style.replace("{prompt}", text)
            else:
                text = ", ".join(filter(None, (text, self.style)))
            return replace(part, **{key: text})

        layout = full(full(self), "background_prompt")
        return replace(layout, regions=tuple(map(full, self.regions)), style="")

    def resolved(self, defaults: Defaults) -> "Layout":
        """The filled layout, with nothing left to parse: counts are ints, each region has its
        own, blocks are sets of indices, prompts have the style."""
        layout = self.styled().filled(defaults)

        def own(part: Any) -> Any:
            ratio = self.base_ratio if part.base_ratio is None else part.base_ratio
            steps = part.mask_inject_steps
            steps = self.mask_inject_steps if steps is None else steps
            steps = count_of(steps, layout.run_steps())
            if ratio == 1 or self.method == "plain":  # Both are plain FLUX.
                steps = 0
            return replace(part, mask_inject_steps=steps, base_ratio=float(ratio))

        def masked(kind: str, depth: int) -> frozenset[int]:
            every = getattr(self, f"{kind}_inject_interval")
            blocks = getattr(self, f"{kind}_blocks")
            blocks = range(0, depth, every) if blocks is None else blocks
            return frozenset(i for i in range(depth) if blocks_of(blocks, i))

        controls = (replace(x, mode=MODES.get(x.mode, x.mode)) for x in self.controlnets)
        return replace(
            own(layout),
            regions=tuple(map(own, layout.regions)),
            base_steps=count_of(self.base_steps, layout.run_steps()),
            double_blocks=masked("double", defaults.depth),
            single_blocks=masked("single", defaults.depth_single_blocks),
            controlnets=tuple(controls),
        )

    def run_steps(self) -> int:
        """How many of a filled layout's steps are run, by diffusers' formula,
        at least one."""
        skipped = 0
        if self.image is not None:
            denoise = self.image.denoise or (1.0 if self.image.repaint else 0.6)
            skipped = int(self.steps - self.steps * denoise)
        return max(self.steps - skipped, 1)

    def has_extras(self) -> bool:
        """Does it ask for what only extensions can do?"""
        parts = (self, *self.regions)
        found = any(getattr(part, key, None) for part in parts for key in EXTRAS)
        return found or self.true_cfg_scale > 1

    def regional_steps(self) -> int:
        """How many steps of a resolved layout may be regional."""
        counts = [part.mask_inject_steps for part in (self, *self.regions)]
        return max(counts) if self.regions else 0

    def is_masked(self, block: Block) -> bool:
        """Is this block's attention masked in a resolved layout's regional steps?"""
        return block.index in getattr(self, f"{block.kind}_blocks")


def count_of(count: int | str, whole: int) -> int:
    """A count, or a percentage rounded half up, of a whole: at most all of it."""
    if isinstance(count, str):
        return int(Fraction(count.rstrip("%")) * whole / 100 + Fraction(1, 2))
    return min(count, whole)


def blocks_of(blocks: Collection[int] | str, index: int) -> bool:
    """Is this block among "every 2", "0-18", "0-4, 8" or indices?"""
    if not isinstance(blocks, str):
        return index in blocks
    if every := re.fullmatch(EVERY, blocks):
        return index % int(every[1]) == 0
    ranges = re.findall(BLOCK_RANGE, blocks)
    return any(int(low) <= index <= int(high or low) for low, high in ranges)


PRESETS = {
    "published": {},
    "control": {  # held best as regions grow, measured in docs/control
        "base_ratio": 0.1,
        "mask_inject_steps": "80%",
        "base_steps": "40%",
        "region_max_sequence_length": "25%",
        "overlap": "smallest",
    },
}
