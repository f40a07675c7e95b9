"""Draw flowers with captions: a data set without a download, in which all attributes of each picture are known.

A drawn scene is described in unit coordinates (x to the right, y down, each 0..1). The same seed gives the same scene
at every size, because a scene has unit coordinates. A scene is painted from back to front at twice the wanted size, and
then averaged down. The parts of a scene are painted in this order: out-of-focus background, stems, leaves, bud,
overlapping petals, center. This module needs only NumPy and Pillow.
"""

import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial

import numpy as np
from PIL import Image

from t2i.errors import UserError

ATTRIBUTES: dict[str, tuple] = {
    "petal_color": ("white", "yellow", "orange", "red", "pink", "purple", "blue", "burgundy"),
    "center_color": ("golden", "brown", "green"),
    "background": ("meadow", "sky", "sunset", "night"),
    "petal_count": (3, 5, 8, 13),  # Fibonacci numbers, as in nature.
    "petal_shape": ("round", "pointed", "notched"),
    "arrangement": ("single", "bud", "pair"),
}
COMBINED = ("petal_color", "center_color", "background", "petal_count")  # Attributes that make up a combination.
VERSION = 3  # Version of the drawing program. Another version draws other pictures from the same seed.
HELD_OUT_SHARE = 0.2  # Share of the combinations that never occur in the training split.
# px. In smaller pictures, thirteen petals cannot be told apart. Larger ones take too long to paint.
MIN_SIZE, MAX_SIZE = 32, 512
SUPERSAMPLING = 2  # Painted pixels per pixel of the picture, along each axis.
# px. The background is painted at this size, then blurred and enlarged, so it looks alike at every picture size.
BACKDROP_SIZE = 64
SHADOW = 0.022  # Reach of the soft shadow around a petal, as a share of the picture's side.
BLUR = 0.022  # Standard deviation of the background's blur, as a share of the picture's side.
COUNT_WORDS = {3: "three", 5: "five", 8: "eight", 13: "thirteen"}

# Colors of a petal at its base, middle and tip, sRGB 0..255.
PETALS = {
    "white": ((196, 205, 190), (240, 241, 244), (255, 255, 255)),
    "yellow": ((218, 160, 4), (253, 222, 36), (255, 243, 120)),
    "orange": ((190, 60, 0), (248, 122, 12), (255, 168, 66)),
    "red": ((110, 2, 12), (216, 20, 28), (244, 66, 60)),
    "pink": ((206, 62, 124), (250, 148, 190), (255, 206, 224)),
    "purple": ((66, 16, 116), (138, 60, 194), (188, 128, 232)),
    "blue": ((12, 22, 120), (36, 70, 214), (96, 136, 250)),
    "burgundy": ((40, 2, 12), (100, 10, 32), (142, 36, 58)),
}
# Colors of a flower's center: of the gaps between its dots, then of the dots, sRGB 0..255.
CENTERS = {
    "golden": ((190, 116, 0), (255, 214, 58)),
    "brown": ((40, 20, 8), (122, 72, 36)),
    "green": ((66, 116, 16), (186, 226, 80)),
}
LEAF = ((30, 70, 24), (62, 124, 44), (122, 176, 80))
# Color gradients of the backgrounds from top to bottom: (y in 0..1, sRGB 0..255).
GRADIENTS = {
    "meadow": ((0.0, (176, 214, 120)), (0.45, (118, 178, 78)), (1.0, (58, 122, 48))),
    "sky": ((0.0, (86, 156, 226)), (0.6, (142, 198, 242)), (1.0, (190, 224, 248))),
    "sunset": (
        (0.0, (98, 66, 122)),
        (0.35, (206, 106, 118)),
        (0.62, (250, 168, 104)),
        (0.74, (255, 212, 140)),
        (0.8, (176, 92, 86)),
        (1.0, (82, 46, 66)),
    ),
    "night": ((0.0, (8, 10, 34)), (0.5, (18, 26, 66)), (1.0, (10, 16, 40))),
}
TINTS = {"meadow": (1.0, 1.0, 0.98), "sky": (1.0, 1.0, 1.0), "sunset": (1.02, 0.97, 0.93), "night": (0.9, 0.93, 1.0)}
# Half width of a petal by petal count, in petal lengths. Neighbours just touch at half length.
HALF_WIDTHS = {
    3: 0.50,
    5: 0.40,
    8: 0.262,
    13: 0.168,
}

# The phrases contain no color words. A small text encoder would confuse them with the colors of petals and center.
PLACES = {
    "meadow": ("in a meadow", "in a sunny meadow"),
    "sky": ("under a clear sky", "against the sky"),
    "sunset": ("at sunset", "in the sunset"),
    "night": ("at night", "on a calm night"),
}
LEADS = {"single": "a single {} flower", "bud": "a {} flower", "pair": "a pair of {} flowers"}
TEMPLATES = (
    "{lead} with {parts}, {place}",
    "{place}, {lead} with {parts}",
    "a photo of {lead} with {parts}, {place}",
    "{lead} {place}, with {parts}",
    "{lead} {place}, showing {parts}",
    "a picture of {lead} {place}: {parts}",
    "{lead} blooming {place}, with {parts}",
)


def is_held_out(attributes: dict) -> bool:
    """Return whether a combination of petal color, center color, background and petal count is held out of training."""
    key = "|".join(str(attributes[name]) for name in COMBINED)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < HELD_OUT_SHARE * 2**64


@cache
def _combinations(held_out: bool) -> tuple[dict, ...]:
    every = (
        dict(zip(COMBINED, values, strict=True)) for values in itertools.product(*map(ATTRIBUTES.__getitem__, COMBINED))
    )
    return tuple(combination for combination in every if is_held_out(combination) == held_out)


def _complete(combination: dict, rng: np.random.Generator) -> dict:
    free = [name for name in ATTRIBUTES if name not in COMBINED]
    return combination | {name: ATTRIBUTES[name][rng.integers(len(ATTRIBUTES[name]))] for name in free}


def sample_attributes(rng: np.random.Generator, held_out: bool = False) -> dict:
    """Draw attributes uniformly from the training combinations or, with `held_out`, from the held-out combinations."""
    combinations = _combinations(held_out)
    return _complete(combinations[rng.integers(len(combinations))], rng)


def caption(attributes: dict, rng: np.random.Generator) -> str:
    """Return a caption of a flower's attributes in a random phrasing.

    Every phrasing of a caption names all attributes, in at most 22 words.
    """
    parts = [
        f"{COUNT_WORDS[attributes['petal_count']]} {attributes['petal_shape']} petals",
        f"a {attributes['center_color']} center",
    ]
    if rng.random() < 0.3:
        parts.reverse()
    if attributes["arrangement"] == "bud":
        parts.append("a bud")
    places = PLACES[attributes["background"]]
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(
        lead=LEADS[attributes["arrangement"]].format(attributes["petal_color"]),
        parts=", ".join(parts[:-1]) + " and " + parts[-1],
        place=places[rng.integers(len(places))],
    )


def drawing(seed: int, index: int, size: int, held_out: bool = False) -> tuple[dict, np.ndarray, str]:
    """Return flower number `index` of the endless series of drawings that `seed` gives.

    The drawing depends only on the arguments.

    Returns:
        The attributes of the flower, the image as uint8 [size, size, 3], and the caption.

    Raises:
        UserError: `size` is outside 32..512 px, or `seed` or `index` is negative.
    """
    if seed < 0 or index < 0:
        raise UserError(f"seed {seed} and index {index} of a drawing must not be negative; give 0 or more")
    rng = np.random.default_rng([seed, index, int(held_out)])
    attributes = sample_attributes(rng, held_out)
    words = caption(attributes, rng)  # The caption uses rng before the image, so it is the same at every size.
    return attributes, draw(attributes, size, rng), words


def prompts(n: int, seed: int, held_out: bool = False) -> list[tuple[dict, str]]:
    """Return `n` pairs of attributes and caption.

    No combination of attributes occurs again before all other combinations have been used.
    """
    if n < 0 or seed < 0:
        raise UserError(f"number {n} and seed {seed} of prompts must not be negative; give 0 or more")
    rng = np.random.default_rng([seed, int(held_out)])
    combinations = _combinations(held_out)
    order = rng.permutation(len(combinations))
    chosen = [_complete(combinations[order[i % len(order)]], rng) for i in range(n)]
    return [(attributes, caption(attributes, rng)) for attributes in chosen]


def draw_many(
    seed: int, start: int, count: int, size: int, held_out: bool = False, workers: int = 1
) -> Iterator[tuple[dict, np.ndarray, str]]:
    """Yield `drawing(seed, i, size, held_out)` for i in start..start+count-1, in this order.

    The number of `workers` (processes) does not change the drawings.

    Raises:
        UserError: one of the processes that draw ended early.
    """
    one = partial(drawing, seed, size=size, held_out=held_out)
    if workers <= 1:
        yield from map(one, range(start, start + count))
        return
    block = 64 * workers  # Drawings in memory at a time. Without a limit, a slow reader would let them pile up.
    context = multiprocessing.get_context("spawn")
    with _single_threaded(), ProcessPoolExecutor(workers, context) as pool:
        try:
            for first in range(start, start + count, block):
                yield from pool.map(one, range(first, min(first + block, start + count)), chunksize=16)
        except BrokenProcessPool:  # multiprocessing.Pool would restart such processes for ever.
            raise UserError(
                "a process that draws flowers ended early, perhaps for lack of memory; give --workers 1"
            ) from None


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Give each process that is started inside the `with` block a single BLAS thread.

    With more threads than cores, threads would wait for each other at every small matrix product.
    """
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def draw(attributes: dict, size: int, rng: np.random.Generator) -> np.ndarray:
    """Paint one scene, and return its picture as uint8 [size, size, 3], sRGB.

    Raises:
        UserError: `size` is outside 32..512 px, or an attribute has an unknown value.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"size {size} of a drawing must lie between {MIN_SIZE} and {MAX_SIZE} px")
    for name, values in ATTRIBUTES.items():
        if attributes.get(name) not in values:
            raise UserError(f"{name} {attributes.get(name)!r} of a drawing is not one of {', '.join(map(str, values))}")
    alone = attributes["arrangement"] == "single"
    side = 1.0 if rng.random() < 0.5 else -1.0  # Side of the bud or of the second flower.
    radius = rng.uniform(0.37, 0.42) if alone else rng.uniform(0.34, 0.37)
    x = 0.5 + (rng.uniform(-0.03, 0.03) if alone else side * rng.uniform(-0.10, -0.07))
    y = (0.455 if alone else 0.5) + rng.uniform(-0.02, 0.02)
    foot = 0.5 + rng.uniform(-0.12, 0.12)  # x at which the stem meets the lower edge of the picture.
    other_x, other_y = 0.5 + side * rng.uniform(0.33, 0.36), rng.uniform(0.15, 0.2)

    backdrop = _backdrop(attributes["background"], rng)
    if attributes["arrangement"] == "pair":
        _stem(backdrop, other_x, other_y, other_x + side * 0.05, 0.014)
        _flower(backdrop, other_x, other_y, rng.uniform(0.19, 0.21), attributes, rng, detail=0.0)
    canvas = _enlarge(backdrop, size * SUPERSAMPLING)

    detail = min(1.0, size / 256)  # In a small picture, fine veins and dots would only be noise.
    if attributes["arrangement"] == "bud":
        _stem(canvas, other_x, other_y + 0.08, foot + side * 0.14, 0.011)
        _bud(canvas, other_x, other_y + 0.1, rng.uniform(-0.25, 0.25), attributes["petal_color"], detail)
    _stem(canvas, x, y, foot, 0.017)
    for direction in (-1.0, 1.0):
        height = rng.uniform(0.93, 1.0)
        along = (height - y) / (1.0 - y)
        angle = -np.pi / 2 + direction * rng.uniform(0.8, 1.15)
        at = x + (foot - x) * along**1.5
        frame = _frame(angle, rng.uniform(0.26, 0.34))
        _petal(canvas, at, height, frame, 0.24, "pointed", _ramp(LEAF), 1.0, 0.1, detail)
    _flower(canvas, x, y, radius, attributes, rng, detail)

    canvas *= np.array(TINTS[attributes["background"]], np.float32)
    image = Image.fromarray(np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8))
    return _soften(np.asarray(image.reduce(SUPERSAMPLING)))


def _soften(image: np.ndarray) -> np.ndarray:
    """Soften an image, uint8 [S, S, 3], by about half a pixel, as a lens does.

    To soften the image, it is convolved with (0.12, 0.76, 0.12) along both axes.
    """
    soft = np.pad(image.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    soft = 0.12 * (soft[:-2] + soft[2:]) + 0.76 * soft[1:-1]
    soft = 0.12 * (soft[:, :-2] + soft[:, 2:]) + 0.76 * soft[:, 1:-1]
    return (soft + 0.5).astype(np.uint8)


@cache
def _grid(size: int) -> np.ndarray:
    """Return the pixel centers of a picture along one axis, in unit coordinates, float32 [size]."""
    return (np.arange(size, dtype=np.float32) + 0.5) / size


@cache
def _ramp(colors: tuple) -> np.ndarray:
    """Return the colors of a petal or leaf from base to tip, float32 [256, 3], 0..1."""
    stops = (0.1, 0.62, 1.0)
    at = np.linspace(0, 1, 256)
    return np.stack([np.interp(at, stops, np.array(colors)[:, i] / 255) for i in range(3)], 1).astype(np.float32)


def _frame(angle: float, length: float) -> np.ndarray:
    """Return the matrix from petal coordinates (along, across) to picture coordinates (x, y)."""
    c, s = np.cos(angle), np.sin(angle)
    return length * np.array([[c, -s], [s, c]])


def _inverse(frame: np.ndarray) -> tuple[float, float, float, float, float]:
    """Return the inverse of a petal's 2 x 2 matrix, row by row, and the length of the petal's unit in the picture.

    np.linalg would be slow on 2 x 2 matrices.
    """
    (a, b), (c, d) = frame.tolist()
    determinant = a * d - b * c
    return d / determinant, -b / determinant, -c / determinant, a / determinant, abs(determinant) ** 0.5


def _backdrop(background: str, rng: np.random.Generator) -> np.ndarray:
    """Paint a background, float32 [64, 64, 3], 0..1: a gradient with soft clouds, a sun, or lights."""
    at = _grid(BACKDROP_SIZE)
    stops, colors = zip(*GRADIENTS[background], strict=True)
    shift = rng.uniform(-0.04, 0.04)
    column = np.stack([np.interp(at + shift, stops, np.array(colors)[:, i] / 255) for i in range(3)], 1)
    canvas = np.repeat(column.astype(np.float32)[:, None], BACKDROP_SIZE, 1)

    def blob(
        x: float, y: float, width: float, height: float, color: tuple, strength: float, disc: bool = False
    ) -> None:
        """Blend one ellipse into the background: a Gaussian, or if `disc` is true, a disc with a soft rim."""
        squared = np.square((at - x) / width)[None] + np.square((at - y) / height)[:, None]
        weight = (strength * np.exp(-(squared * squared * squared) if disc else -squared))[..., None]
        canvas[...] += weight * (np.array(color, np.float32) / 255 - canvas)

    if background == "meadow":
        blob(rng.uniform(0.1, 0.9), 0.0, 0.5, 0.3, (226, 240, 160), 0.7)  # sunlight
        for _ in range(7):
            color = ((210, 230, 120), (86, 156, 62), (240, 240, 180))[rng.integers(3)]
            r = rng.uniform(0.05, 0.12)
            blob(rng.random(), rng.uniform(0, 0.9), r, r, color, rng.uniform(0.25, 0.5), disc=True)
    elif background == "sky":
        for _ in range(3):
            x, y = rng.random(), rng.uniform(0.05, 0.95)
            for _ in range(3):
                blob(
                    x + rng.uniform(-0.16, 0.16),
                    y + rng.uniform(-0.03, 0.03),
                    rng.uniform(0.1, 0.2),
                    rng.uniform(0.04, 0.08),
                    (244, 249, 255),
                    0.6,
                )
    elif background == "sunset":
        x = rng.uniform(0.12, 0.88)
        blob(x, 0.72, 0.45, 0.22, (255, 214, 130), 0.8)  # glow
        blob(x, 0.69, 0.09, 0.09, (255, 246, 206), 0.95, disc=True)  # sun
        blob(rng.random(), 0.98, 0.5, 0.18, (58, 30, 54), 0.9, disc=True)  # hills
        blob(rng.random(), 0.16, 0.4, 0.05, (238, 140, 130), 0.6)  # cloud
    else:
        blob(0.5, 0.45, 0.55, 0.5, (46, 66, 128), 0.75)  # moonlight
        for _ in range(8):
            color = ((255, 214, 140), (150, 190, 255), (190, 160, 240))[rng.integers(3)]
            r = rng.uniform(0.025, 0.07)
            blob(rng.random(), rng.random(), r, r, color, rng.uniform(0.25, 0.55), disc=True)
    return canvas


@cache
def _lens(size: int) -> np.ndarray:
    """Return weights, float32 [size, 64], that blur one axis of the background (Gaussian) and enlarge it in one step."""
    distance = _grid(size)[:, None] - _grid(BACKDROP_SIZE)[None]
    weights = np.exp(-0.5 * np.square(distance / np.float32(BLUR)))
    return weights / weights.sum(1, keepdims=True)


def _enlarge(backdrop: np.ndarray, size: int) -> np.ndarray:
    """Blur a background and enlarge it to float32 [size, size, 3]."""
    planes = _lens(size) @ np.moveaxis(backdrop, 2, 0) @ _lens(size).T
    return np.ascontiguousarray(np.moveaxis(planes, 0, 2))


def _window(canvas: np.ndarray, left: float, top: float, right: float, bottom: float) -> tuple:
    """Return the part of the canvas inside a box of unit coordinates, and the x [1, w] and y [h, 1] of the part's
    pixels.
    """
    size = canvas.shape[0]
    x0, y0 = max(0, int(left * size)), max(0, int(top * size))
    x1, y1 = max(x0, min(size, int(right * size) + 2)), max(y0, min(size, int(bottom * size) + 2))
    at = _grid(size)
    return canvas[y0:y1, x0:x1], at[None, x0:x1], at[y0:y1, None]


def _stem(canvas: np.ndarray, x: float, y: float, foot: float, half_width: float) -> None:
    """Paint a flower's stem from (x, y) down to (foot, 1), in unit coordinates."""
    pad = half_width * 2
    part, px, py = _window(canvas, min(x, foot) - pad, y, max(x, foot) + pad, 1.0)
    along = np.clip((py - y) / (1.0 - y), 0, 1) ** 1.5
    across = (px - (x + (foot - x) * along)) / half_width
    cover = np.clip((1 - np.abs(across)) * (half_width * canvas.shape[0]) + 0.5, 0, 1)[..., None]
    shade = np.clip(0.62 - 0.3 * across, 0.2, 1.0)[..., None]
    part += cover * (shade * np.array((0.36, 0.68, 0.26), np.float32) - part)


def _petal(
    canvas: np.ndarray,
    x: float,
    y: float,
    frame: np.ndarray,
    half_width: float,
    shape: str,
    ramp: np.ndarray,
    light: float,
    bend: float,
    detail: float,
    below: np.ndarray | None = None,
) -> None:
    """Paint one petal or leaf that starts at (x, y), with its soft shadow on the petals painted before.

    Args:
        canvas: the picture, float32 [S, S, 3], 0..1, changed in place.
        x: x of the petal's base in unit coordinates.
        y: y of the petal's base in unit coordinates.
        frame: matrix [2, 2] from petal coordinates (along, across) to picture coordinates.
        half_width: half width of the petal, in petal lengths.
        shape: shape of the petal: round, pointed or notched.
        ramp: colors of the petal from its base to its tip, float32 [256, 3], 0..1.
        light: brightness of the whole petal, about 1.
        bend: sideways bend of the petal. The point at u (0..1) along the petal moves sideways by bend * u * (1 - u)
            petal lengths.
        detail: strength of the petal's fine veins, 0..1.
        below: mask of the flower's petals painted so far, float32 [S, S, 1], 1 inside a petal, changed in place.
    """
    size = canvas.shape[0]
    w = half_width
    corners = frame @ np.array([[0, 0, 1, 1], [-w, w, -w, w]])
    left, top = corners.min(1) - 2 * SHADOW
    right, bottom = corners.max(1) + 2 * SHADOW
    part, px, py = _window(canvas, x + left, y + top, x + right, y + bottom)
    a, b, c, d, unit = _inverse(frame)
    px, py = px - np.float32(x), py - np.float32(y)
    u = a * px + b * py  # Position along the petal: 0 at the base, 1 at the tip.
    q = (c * px + d * py + np.float32(bend) * u * (1 - u)) * np.float32(1 / w)  # Position across it: -1..1.
    q_abs, q_squared = np.abs(q), q * q

    widest = {"round": 0.64, "pointed": 0.48, "notched": 0.72}[shape]
    beyond = np.maximum(u - widest, 0) * np.float32(1 / (1 - widest))
    lower = np.minimum(u * np.float32(1 / widest), 1) - 1
    base = 1 - np.float32(0.75) * lower * lower  # Half width between the base and the widest place.
    if shape == "round":
        inside = base - np.sqrt(q_squared + beyond * beyond)
    elif shape == "pointed":
        near = np.minimum(beyond, 1)  # The cubic is valid up to the tip. Beyond the tip the width falls linearly.
        taper = near * near * (np.float32(2.1) - np.float32(1.1) * near) + (beyond - near)
        inside = base - taper - q_abs
    else:
        inside = base - np.sqrt(np.sqrt(q_squared * q_squared + np.square(beyond * beyond)))
        # The notch of a narrow petal is shallow. Otherwise the petal would look like two.
        depth, reach = np.float32(min(0.24, 0.6 * w)), np.float32(0.7)
        slope = float(np.hypot(1, depth / (reach * w)))
        inside = np.minimum(inside, (1 - depth - u + q_abs * (depth / reach)) * np.float32(1 / (w * slope)))
    scale = unit * w  # Length in the picture of one unit of `inside`.

    cover = np.clip(inside * np.float32(scale * size) + 0.5, 0, 1)
    shadow = np.exp(-np.square(np.minimum(inside, 0) * np.float32(scale / SHADOW)))
    shade = np.float32(light) * (1 - np.float32(0.16) * q_squared + np.float32(0.07) * q)
    shade -= np.float32(0.14) * np.exp(-q_squared * np.float32(1 / 0.006)) * np.clip(1.1 - u, 0, 1)
    if detail > 0.3:
        fan = q / (np.float32(0.3) + np.float32(0.7) * base)
        shade += np.float32(0.05 * (detail - 0.25)) * np.cos(fan * np.float32(21)) * np.clip(u * (1.1 - u) * 4, 0, 1)
    rim = np.float32(0.17) * np.exp(-np.square((inside - np.float32(0.1)) * np.float32(1 / 0.09)))
    shade *= np.float32(0.72) + np.float32(0.28) * np.clip(inside * np.float32(scale / 0.008), 0, 1)  # Dark edge.

    color = ramp[np.clip(u * 255, 0, 255).astype(np.uint8)] * shade[..., None]
    color += (1 - color) * rim[..., None]
    cover = cover[..., None]
    if below is not None:
        mask = _window(below, x + left, y + top, x + right, y + bottom)[0]
        part *= 1 - shadow[..., None] * (np.float32(0.06) + np.float32(0.56) * mask)
        np.maximum(mask, cover, out=mask)
    part += cover * (color - part)


def _flower(
    canvas: np.ndarray, x: float, y: float, radius: float, attributes: dict, rng: np.random.Generator, detail: float
) -> None:
    """Paint the petals and the center of a slightly tilted flower around (x, y)."""
    count, shape = attributes["petal_count"], attributes["petal_shape"]
    turn, lean = rng.uniform(-0.15, 0.15) - np.pi / 2, rng.uniform(0, np.pi)  # One petal points roughly up.
    axes = _frame(lean, 1.0)
    tilt = axes @ np.diag([1.0, rng.uniform(0.86, 1.0)]) @ axes.T
    below = np.zeros((*canvas.shape[:2], 1), np.float32)
    ramp = _ramp(PETALS[attributes["petal_color"]])
    for i in range(count):
        angle = turn + 2 * np.pi * (i + rng.uniform(-0.05, 0.05)) / count
        frame = radius * tilt @ _frame(angle, rng.uniform(0.95, 1.0))
        light = 0.97 + 0.07 * np.cos(angle + 2.2)  # The light comes from the upper left.
        bend = rng.uniform(-0.08, 0.08)
        _petal(canvas, x, y, frame, HALF_WIDTHS[count], shape, ramp, light, bend, detail, below)
    _center(canvas, x, y, radius * rng.uniform(0.34, 0.38) * tilt, turn, attributes["center_color"], detail)


@cache
def _florets(size: int) -> np.ndarray:
    """Return the heights 0..1 of the florets in a flower's center, seen from above, float32 [size, size].

    Floret k of n in a flower's center has the radius sqrt(k / n) and the angle k times the golden angle. Source of the
    florets' positions: Vogel, Mathematical Biosciences 44, 1979.
    """
    n = 55
    at = _grid(size) * 2 - 1
    heights = np.zeros((size, size), np.float32)
    for k in range(n):
        r, angle = 0.94 * np.sqrt((k + 0.5) / n), k * np.pi * (3 - np.sqrt(5))
        squared = (at - np.float32(r * np.cos(angle)))[None] ** 2 + (at - np.float32(r * np.sin(angle)))[:, None] ** 2
        np.maximum(heights, 1 - squared * np.float32(n / 1.1), out=heights)
    return heights


def _center(canvas: np.ndarray, x: float, y: float, frame: np.ndarray, turn: float, color: str, detail: float) -> None:
    """Paint the center of a flower: a dark soft rim on the petals, then a dome of florets."""
    size = canvas.shape[0]
    reach = 1.6 * float(np.abs(frame).sum(1).max())
    part, px, py = _window(canvas, x - reach, y - reach, x + reach, y + reach)
    a, b, c, d, unit = _inverse(frame)
    px, py = px - np.float32(x), py - np.float32(y)
    across, down = a * px + b * py, c * px + d * py
    distance = np.sqrt(across * across + down * down)
    rim = np.exp(-np.square(np.maximum(distance - 1, 0) * np.float32(1 / 0.2)))
    part *= 1 - np.float32(0.72) * rim[..., None]

    heights = _florets(min(512, 1 << int(reach * size).bit_length()))
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    half = np.float32(heights.shape[0] / 2)
    column = np.clip((cos * across + sin * down + 1) * half, 0, heights.shape[0] - 1).astype(np.intp)
    row = np.clip((cos * down - sin * across + 1) * half, 0, heights.shape[0] - 1).astype(np.intp)
    contrast = 0.35 + 0.65 * detail
    height = (np.float32(contrast) * heights[row, column] + np.float32((1 - contrast) * 0.55))[..., None]
    gaps, dots = np.array(CENTERS[color], np.float32) / 255
    dome = 1 - np.float32(0.32) * np.minimum(distance, 1) ** 2 - np.float32(0.14) * (across + down)
    cover = np.clip((1 - distance) * np.float32(size * unit) + 0.5, 0, 1)[..., None]
    part += cover * ((gaps + (dots - gaps) * height) * (np.float32(1.1) * dome[..., None]) - part)


def _bud(canvas: np.ndarray, x: float, y: float, lean: float, color: str, detail: float) -> None:
    """Paint a closed bud with its base at (x, y) in unit coordinates."""
    up = -np.pi / 2 + lean
    below = np.zeros((*canvas.shape[:2], 1), np.float32)
    for turn, length, width in ((-0.3, 0.19, 0.3), (0.3, 0.19, 0.3), (0.0, 0.2, 0.3)):
        frame = _frame(up + turn, length)
        _petal(canvas, x, y, frame, width, "pointed", _ramp(PETALS[color]), 1.0 - 0.3 * turn, 0.0, detail, below)
    for turn in (-0.45, 0.45, 0.0):
        frame = _frame(up + turn, 0.1)
        _petal(canvas, x, y, frame, 0.3, "pointed", _ramp(LEAF), 1.0 - 0.3 * turn, 0.0, detail, below)
