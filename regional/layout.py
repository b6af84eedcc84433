"""The layout file: YAML in, checked and frozen dataclasses out. Below this nobody checks again."""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import Meta, Struct
from msgspec.structs import replace

MAX_REGIONS = 61


Pixels = Annotated[int, Meta(ge=16, le=8192)]


Ratio = Annotated[float, Meta(ge=0, le=1)]


Position = float | str  # pixels, or a share of the width or height such as 25%


Polygons = Annotated[  # msgspec can't tell a list of points from a list of lists of points; `polygons_of` can
    tuple[Any, ...],
    Meta(description="a list of at least three points [x, y], or several such lists", min_length=1),
]


Blocks = tuple[Annotated[int, Meta(ge=0)], ...] | str  # indices, or text for `blocks_of`


SHARE = r"[0-9]{1,9}(\.[0-9]{1,20})?%"  # what shares in a layout look like


SHAPES = ("box", "polygon", "mask", "color")


class Defaults(NamedTuple):
    """What a model decides where a layout does not."""

    steps: int
    max_sequence_length: int
    size: int
    depth: int
    depth_single_blocks: int


FLUX_DEV = Defaults(24, 512, 1024, 19, 38)


class Lora(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A LoRA for the whole picture. file: a path, or a repository of the hub, org/name or org/name:file. image: the
    control picture of a control LoRA."""

    file: str
    scale: Annotated[float, Meta(ge=-100, le=100)] = 1.0
    image: str | None = None


class RegionLora(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A LoRA for one region alone. plain_steps: act on the region's image tokens in the plain steps too."""

    file: str
    scale: Annotated[float, Meta(ge=-100, le=100)] = 1.0
    plain_steps: bool = False


class Control(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A ControlNet and the picture that it follows.

    model: a file or folder, or a repository of the hub, org/name or org/name:file. mode: for union models, a number or
    a name of MODES. start, end: the share of the steps in which it acts. region: the index of the one region that it
    acts on. residuals: `published` leaves the base branch without those of the single blocks, as the published code
    does. preprocess: what makes the control picture of `image`.
    """

    model: str
    image: str
    mode: Annotated[int, Meta(ge=0)] | str | None = None
    scale: Annotated[float, Meta(ge=-100, le=100)] = 0.7
    start: Annotated[float, Meta(ge=0, le=1)] = 0.0
    end: Annotated[float, Meta(ge=0, le=1)] = 1.0
    region: Annotated[int, Meta(ge=0)] | None = None
    residuals: Literal["all", "published"] = "all"
    preprocess: Literal["canny"] | None = None

    @property
    def mode_index(self) -> int | None:
        return MODES[self.mode] if isinstance(self.mode, str) else self.mode

    def acts(self, step: int, steps: int) -> bool:
        return step / steps >= self.start and (step + 1) / steps <= self.end


MODES = {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "pose": 4, "gray": 5, "lq": 6}  # those of every union model


class Region(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One region: its prompt, and exactly one shape.

    box: x0, y0, x1, y1 in pixels, half-open, or in shares such as 25%. polygon: points [x, y] in the same units, or
    several lists of them (even-odd). mask: a picture, white inside, of the aspect ratio of the layout. color: one of
    the layout's map, [r, g, b] or "#rrggbb", or an index.

    strength: the weight of the region's text for its image tokens, 1 as published. feather: over how many pixels its
    edge is soft. mask_inject_steps, base_ratio: its own, in place of the layout's.
    """

    prompt: str
    box: tuple[Position, Position, Position, Position] | None = None
    polygon: Polygons | None = None
    mask: str | None = None
    color: int | str | tuple[int, int, int] | None = None  # msgspec crashes on limits here; check_color has them
    strength: Annotated[float, Meta(ge=0, le=100)] = 1.0
    feather: Annotated[float, Meta(ge=0, le=8192)] = 0.0
    mask_inject_steps: int | str | None = None
    base_ratio: Ratio | None = None
    loras: tuple[RegionLora, ...] = ()

    @property
    def shape(self) -> str:
        return next(key for key in SHAPES if getattr(self, key) is not None)


class Layout(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One picture. What is None takes the model's default, or for the seed a random one.

    preset: what the settings are that are not written; `published`, the defaults below, or `control`, see PRESETS.
    double_blocks, single_blocks: which blocks' attention is masked, in place of the intervals: "every 2", "0-18",
    "0-4, 8" or a list. map: a picture of the regions that are given by color. image_attention: `open` lets all image
    tokens see each other. base_stream: `shared` has one image stream in the single blocks too; cheaper, not the
    published method.
    """

    prompt: str
    background_prompt: str = "a photo"
    width: Pixels = 1024
    height: Pixels = 1024
    steps: Annotated[int, Meta(ge=1, le=10000)] | None = None
    guidance: Annotated[float, Meta(ge=0, le=1000)] = 3.5
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    base_ratio: Ratio = 0.3
    mask_inject_steps: int | str = "40%"
    double_inject_interval: Annotated[int, Meta(ge=1)] = 1
    single_inject_interval: Annotated[int, Meta(ge=1)] = 1
    double_blocks: Blocks | None = None
    single_blocks: Blocks | None = None
    image_attention: Literal["isolated", "open"] = "isolated"
    base_stream: Literal["separate", "shared"] = "separate"
    max_sequence_length: Annotated[int, Meta(ge=2, le=4096)] | None = None
    region_max_sequence_length: Annotated[int, Meta(ge=2, le=4096)] | str | None = None
    preset: Literal["published", "control"] = "published"
    map: str | None = None
    overlap: Literal["share", "last", "first", "smallest"] = "share"
    method: Literal["regional", "rpg", "plain"] = "regional"
    loras: tuple[Lora, ...] = ()
    controlnets: tuple[Control, ...] = ()
    regions: tuple[Region, ...] = ()

    def filled(self, defaults: Defaults) -> "Layout":
        """The layout with what it leaves to the model; this is what metadata record."""
        length = self.max_sequence_length or defaults.max_sequence_length
        return replace(
            self,
            steps=self.steps or defaults.steps,
            max_sequence_length=length,
            region_max_sequence_length=self.region_length(length),
        )

    def steps_and_ratios(self, steps: int) -> list[tuple[int, float]]:
        """For each region, and last for the background: how many of `steps` are regional, and its base_ratio in them.

        None are at base_ratio 1 or by the plain method: both are plain FLUX.
        """
        own = [(region.mask_inject_steps, region.base_ratio) for region in self.regions] + [(None, None)]
        found = []
        for count, ratio in own:
            ratio = self.base_ratio if ratio is None else ratio
            count = count_of(self.mask_inject_steps if count is None else count, steps)
            found.append((0 if ratio == 1 or self.method == "plain" else count, ratio))
        return found

    def regional_steps(self, steps: int) -> int:
        """How many of `steps` may be regional; none are without regions."""
        return max(count for count, _ in self.steps_and_ratios(steps)) if self.regions else 0

    def is_masked(self, kind: str, index: int) -> bool:
        """Whether the attention of this block, double or single, is masked in the regional steps."""
        blocks = getattr(self, f"{kind}_blocks")
        return index % getattr(self, f"{kind}_inject_interval") == 0 if blocks is None else blocks_of(blocks, index)

    def region_length(self, length: int) -> int:
        """How many text tokens each region has where the base prompt has `length`: as many, a count or a share."""
        if isinstance(self.region_max_sequence_length, str):
            return max(2, share_of(self.region_max_sequence_length, length))
        return self.region_max_sequence_length or length


def count_of(count: int | str, whole: int) -> int:
    """A count, or with % a share, of a whole: at most all of it."""
    return share_of(count, whole) if isinstance(count, str) else min(count, whole)


BLOCK_RANGE = r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?"


def blocks_of(blocks: tuple[int, ...] | str, index: int) -> bool:
    """Is the block of this index among them? ValueError if the text is none of "every 2", "0-18" and "0-4, 8"."""
    if not isinstance(blocks, str):
        return index in blocks
    if every := re.fullmatch(r"\s*every\s+([1-9][0-9]{0,8})\s*", blocks):
        return index % int(every[1]) == 0
    ranges = [re.fullmatch(BLOCK_RANGE, part) for part in blocks.split(",")]
    if not all(ranges):
        raise ValueError(blocks)
    return any(int(low) <= index <= int(high or low) for low, high in (r.groups() for r in ranges))


def share_of(share: str, whole: int) -> int:
    """A share such as 40% of a count, rounded half up."""
    return int(Fraction(share.rstrip("%")) * whole / 100 + Fraction(1, 2))


# Settings by the number of regions. `control` is what held best as regions grow, measured in docs/control: less of the
# base prompt, more regional steps for many regions, and texts of a quarter of the base prompt's length.
PRESETS: dict[str, Callable[[int], dict[str, Any]]] = {
    "published": lambda regions: {},
    "control": lambda regions: {
        "base_ratio": 0.1,
        "mask_inject_steps": "40%" if regions <= 6 else "60%",
        "region_max_sequence_length": "25%",
    },
}
