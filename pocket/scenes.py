"""The world of the pocket checkpoint: patterned shapes on a plain background, drawn and described by a program.

A scene is a background and a few objects. An object has a colour, a pattern, a shape and a place; its caption says all
of that but the place: "a striped red circle, a dotted blue star on a white background". Patterns repeat every 16
pixels on a grid fixed to the picture, which is one token: they are as easy to learn as colours.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLORS = {
    "red": (222, 45, 45),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 55),
    "green": (60, 170, 75),
    "cyan": (70, 200, 215),
    "blue": (50, 95, 215),
    "purple": (140, 70, 190),
    "pink": (245, 135, 185),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (150, 150, 150), "black": (25, 25, 25), "beige": (232, 218, 188)}
DARK = 0.45  # a pattern is drawn in the object's colour and in this fraction of it
PERIOD = 16  # pixels after which a pattern repeats
FINE = 4  # supersampling of edges
MOST_SLACK = 16  # pixels from the middle of a box to an object's: in a long box, ten steps would blend all places


def _pattern_tiles() -> dict[str, np.ndarray]:
    """Name -> (PERIOD, PERIOD) share of the dark tone in each pixel."""
    y, x = (np.mgrid[: PERIOD * FINE, : PERIOD * FINE] + 0.5) / FINE
    dark = {
        "plain": np.zeros_like(x),
        "striped": y >= 8,
        "dotted": np.hypot(x - 8, y - 8) < 4.6,
        "checked": (x >= 8) ^ (y >= 8),
        "zigzag": (y + np.abs(x - 8)) % PERIOD < 8,
    }
    return {name: shrunk(tile) for name, tile in dark.items()}


def _look_tiles() -> dict[str, np.ndarray]:
    """The same for what only the LoRAs of pocket/adapters.py make, which is white."""
    y, x = (np.mgrid[: PERIOD * FINE, : PERIOD * FINE] + 0.5) / FINE
    to_corner = np.hypot(np.minimum(x, PERIOD - x), np.minimum(y, PERIOD - y))
    return {"barred": shrunk(x < 6), "studded": shrunk(to_corner < 5)}


def shrunk(tile: np.ndarray) -> np.ndarray:
    """From FINE samples a pixel, in each direction, to their mean."""
    return tile.reshape(PERIOD, FINE, PERIOD, FINE).mean((1, 3)).astype(np.float32)


def _outlines() -> dict[str, np.ndarray]:
    """Name -> corners (N, 2) of the shape, which fills the square [-1, 1] x [-1, 1]."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    star = np.arange(10) * np.pi / 5 - np.pi / 2
    star_radius = np.where(np.arange(10) % 2, 0.45, 1.0)
    shapes = {
        "circle": np.stack([np.cos(turn), np.sin(turn)], 1),
        "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),
        "triangle": np.array([[0, -1], [1, 1], [-1, 1]]),
        "diamond": np.array([[0, -1], [1, 0], [0, 1], [-1, 0]]),
        "star": np.stack([star_radius * np.cos(star), star_radius * np.sin(star)], 1),
        "heart": np.stack(
            [
                16 * np.sin(turn) ** 3,
                -13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn),
            ],
            1,
        ),
    }
    low = {k: v.min(0) for k, v in shapes.items()}
    return {k: 2 * (v - low[k]) / (v.max(0) - low[k]) - 1 for k, v in shapes.items()}


PATTERNS = _pattern_tiles()
LOOKS = _look_tiles()
SHAPES = _outlines()


@dataclass(frozen=True)
class Thing:
    """One object: its looks, its centre (x, y) and half extents (rx, ry) in pixels."""

    color: str
    pattern: str
    shape: str
    center: tuple[int, int] = (0, 0)
    radius: tuple[int, int] = (0, 0)

    @property
    def caption(self) -> str:
        return f"a {self.pattern} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    background: str
    things: tuple[Thing, ...]


def outline_mask(shape: str, center: tuple[float, float], radius: tuple[float, float], size: tuple[int, int]):
    """Coverage of each pixel by a shape, (height, width) in [0, 1]; size is (width, height)."""
    points = (SHAPES[shape] * np.array(radius) + np.array(center)) * FINE
    fine = Image.new("L", (size[0] * FINE, size[1] * FINE))
    ImageDraw.Draw(fine).polygon([tuple(p) for p in points], fill=255)
    return np.asarray(fine.reduce(FINE), dtype=np.float32) / 255


def paint(color: str, pattern: str, size: tuple[int, int]) -> np.ndarray:
    """A picture (height, width, 3) full of one colour and pattern; size is (width, height)."""
    return np.array(COLORS[color], dtype=np.float32) * (1 - (1 - DARK) * tiled(PATTERNS[pattern], size))


def tiled(tile: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 1) full of a tile; size is (width, height)."""
    return np.tile(tile, (-(-size[1] // PERIOD), -(-size[0] // PERIOD)))[: size[1], : size[0], None]


def draw(scene: Scene) -> np.ndarray:
    """(height, width, 3) uint8."""
    size = (scene.width, scene.height)
    picture = np.empty((scene.height, scene.width, 3), dtype=np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        alpha = outline_mask(thing.shape, thing.center, thing.radius, size)[..., None]
        picture += alpha * (paint(thing.color, thing.pattern, size) - picture)
    return picture.round().astype(np.uint8)


def split(rng: np.random.Generator, width: int, height: int, count: int, least: int = 48) -> list[tuple[int, ...]]:
    """Cut a canvas into at most `count` boxes (x0, y0, x1, y1) on the token grid, no side shorter than `least`."""
    boxes = [(0, 0, width, height)]
    while len(boxes) < count:
        boxes.sort(key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
        x0, y0, x1, y1 = boxes.pop()
        wide = x1 - x0 >= y1 - y0
        low, high = (x0, x1) if wide else (y0, y1)
        cuts = [c for c in range(low + least, high - least + 1) if c % 16 == 0]
        if not cuts:
            return boxes + [(x0, y0, x1, y1)]
        middle = sorted(cuts, key=lambda c: abs(2 * c - low - high))[: max(1, len(cuts) // 2)]
        cut = int(rng.choice(middle))
        boxes += [(x0, y0, cut, y1), (cut, y0, x1, y1)] if wide else [(x0, y0, x1, cut), (x0, cut, x1, y1)]
    return boxes


def part_of(rng: np.random.Generator, width: int, height: int, least: int = 64) -> tuple[int, ...]:
    """A random box (x0, y0, x1, y1) of a canvas on the token grid, no side shorter than `least`."""
    sides = [int(rng.integers(min(least, side) // 16, side // 16 + 1)) * 16 for side in (width, height)]
    x0, y0 = (int(rng.integers(0, (side - own) // 16 + 1)) * 16 for side, own in zip((width, height), sides))
    return x0, y0, x0 + sides[0], y0 + sides[1]


def random_looks(rng: np.random.Generator) -> tuple[str, str, str]:
    return tuple(str(rng.choice(list(choices))) for choices in (COLORS, PATTERNS, SHAPES))


def place(rng: np.random.Generator, looks: tuple[str, str, str], box: tuple[int, ...]) -> Thing:
    """An object of these looks near the middle of a box: most of its size, seldom longer than 1.4 times its width."""
    x0, y0, x1, y1 = box
    half = np.array([x1 - x0, y1 - y0]) / 2
    radius = half * rng.uniform(0.72, 0.95, 2)
    radius = np.minimum(radius, radius.min() * 1.4) // 4 * 4
    slack = np.minimum(0.8 * (half - radius), MOST_SLACK)
    center = np.array([x0 + x1, y0 + y1]) / 2 + rng.uniform(-1, 1, 2) * slack
    center = np.clip((center / 8).round() * 8, (x0 + radius[0], y0 + radius[1]), (x1 - radius[0], y1 - radius[1]))
    return Thing(*looks, center=(int(center[0]), int(center[1])), radius=(int(radius[0]), int(radius[1])))


def random_scene(rng: np.random.Generator, width: int, height: int, count: int) -> Scene:
    """`count` objects at most, each in a box of its own; a single one in a box of any size half of the time, on large
    canvases a fifth, on long ones a tenth: a region's object fills its region, and ten steps often lose a small one."""
    boxes = split(rng, width, height, count) if count else []
    is_long = max(width, height) >= 1.5 * min(width, height)
    anywhere = 0.1 if is_long else 0.5 if width * height < 192 * 192 else 0.2
    if count == 1 and rng.random() < anywhere:
        boxes = [part_of(rng, width, height)]
    things = tuple(place(rng, random_looks(rng), box) for box in boxes)
    return Scene(width, height, str(rng.choice(list(BACKGROUNDS))), things)


def caption(rng: np.random.Generator, scene: Scene, keep_background: float = 0.85) -> str:
    """A description in random order; the background is sometimes left out."""
    on = f"a {scene.background} background"
    if not scene.things:
        return on
    names = [scene.things[i].caption for i in rng.permutation(len(scene.things))]
    text = ", ".join(names) if rng.random() < 0.7 else " and ".join(names)
    return f"{text} on {on}" if rng.random() < keep_background else text
