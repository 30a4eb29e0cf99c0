"""The brush of Shapes-5i: twenty forms, their textures and the cluttered grounds they stand on, as plain arrays.

Forms are inequalities on a pixel grid, not calls to a drawing library, so that a mask is the same on every machine. Knows
nothing of files, lists or folds (`shapes5i.py` does).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from svf_fast.train.data import VOID

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]  # colours need no more, and painting is half of the time
Mask = NDArray[np.bool_]
Form = Callable[[Floats, Floats, float], Mask]  # (u, v, variation) -> inside; u, v in object units, variation in [0, 1)

_SMALLEST_VISIBLE_SHARE = 0.7  # of an object after later objects were laid over it
_LARGEST_TILT = np.pi / 4  # radians; as in photographs, most things stand more or less upright
# means of colours in 0–255: the ranges overlap, so that brightness helps but does not decide
_GROUND_BRIGHTNESS = (40.0, 150.0)
_OBJECT_BRIGHTNESS = (110.0, 235.0)


def _polar(u: Floats, v: Floats) -> tuple[Floats, Floats]:
    return np.hypot(u, v), np.arctan2(v, u)


def _spikes(u: Floats, v: Floats, count: int, valley: float) -> Mask:
    """A star polygon with `count` tips on the unit circle and valleys at radius `valley`."""
    radius, angle = _polar(u, v)
    half = np.pi / count
    folded = np.abs((angle + half) % (2 * half) - half)
    x, y = radius * np.cos(folded), radius * np.sin(folded)
    valley_x, valley_y = valley * np.cos(half), valley * np.sin(half)
    return (valley_x - 1.0) * y - valley_y * (x - 1.0) > 0


def _star(u: Floats, v: Floats, variation: float) -> Mask:
    return _spikes(u, v, 5, 0.42 + 0.1 * variation)


def _ring(u: Floats, v: Floats, variation: float) -> Mask:
    radius, _ = _polar(u, v)
    return (radius < 0.95) & (radius > 0.45 + 0.15 * variation)


def _arrow(u: Floats, v: Floats, variation: float) -> Mask:
    shaft = (np.abs(v) < 0.22 + 0.08 * variation) & (u > -1.0) & (u < 0.2)
    head = (u >= 0.05) & (np.abs(v) < (1.0 - u) * 0.85)
    return shaft | head


def _square(u: Floats, v: Floats, variation: float) -> Mask:
    side = 0.68 + 0.08 * variation
    return (np.abs(u) < side) & (np.abs(v) < side)


def _wave(u: Floats, v: Floats, variation: float) -> Mask:
    return (np.abs(v - 0.42 * np.sin(np.pi * (1.3 + 0.4 * variation) * u)) < 0.27) & (np.abs(u) < 1.0)


def _cross(u: Floats, v: Floats, variation: float) -> Mask:
    arm = 0.26 + 0.1 * variation
    return ((np.abs(u) < arm) | (np.abs(v) < arm)) & (np.maximum(np.abs(u), np.abs(v)) < 0.9)


def _crescent(u: Floats, v: Floats, variation: float) -> Mask:
    return (np.hypot(u, v) < 1.0) & (np.hypot(u - 0.5, v) > 0.75 - 0.1 * variation)


def _gear(u: Floats, v: Floats, variation: float) -> Mask:
    radius, angle = _polar(u, v)
    rim = np.where(np.sin(8 * angle) > 0, 0.98, 0.74)
    return (radius < rim) & (radius > 0.24 + 0.12 * variation)


def _comb(u: Floats, v: Floats, variation: float) -> Mask:
    bars = (np.abs(v) < 0.16) | (np.abs(v) > 0.62)
    spine = u < -0.3 + 0.1 * variation
    return (bars | spine) & (np.abs(u) < 0.75) & (np.abs(v) < 0.95)


def _spiral(u: Floats, v: Floats, variation: float) -> Mask:
    radius, angle = _polar(u, v)
    pitch = 0.48
    return (((radius - pitch * angle / (2 * np.pi)) % pitch) < 0.27 + 0.04 * variation) & (radius < 0.98)


def _heart(u: Floats, v: Floats, variation: float) -> Mask:
    x, y = 1.15 * u, -1.2 * v + 0.12 - 0.1 * variation
    return (x * x + y * y - 0.75) ** 3 < x * x * y**3


def _triangle(u: Floats, v: Floats, variation: float) -> Mask:
    foot = -0.55 + 0.1 * variation
    return (u > foot) & (np.abs(v) < (1.0 - u) * 0.6)


def _letter_h(u: Floats, v: Floats, variation: float) -> Mask:
    posts = (np.abs(u) > 0.32) & (np.abs(u) < 0.75) & (np.abs(v) < 0.92)
    return posts | ((np.abs(v) < 0.16 + 0.1 * variation) & (np.abs(u) < 0.75))


def _zigzag(u: Floats, v: Floats, variation: float) -> Mask:
    teeth = np.abs((1.6 * u + 0.5 * variation) % 2.0 - 1.0) - 0.5
    return (np.abs(v - 1.1 * teeth) < 0.3) & (np.abs(u) < 1.0)


def _flower(u: Floats, v: Floats, variation: float) -> Mask:
    radius, angle = _polar(u, v)
    return radius < 0.66 + (0.26 + 0.07 * variation) * np.cos(6 * angle)


def _nut(u: Floats, v: Floats, variation: float) -> Mask:
    radius, _ = _polar(u, v)
    return _spikes(u, v, 6, np.cos(np.pi / 6)) & (radius > 0.36 + 0.1 * variation)


def _drop(u: Floats, v: Floats, variation: float) -> Mask:
    width = 0.5 + 0.1 * variation
    tail = (u > -0.4) & (u < 1.0) & (np.abs(v) < width * (1.0 - u) / 1.4)
    return (np.hypot(u + 0.4, v) < width) | tail


def _chevron(u: Floats, v: Floats, variation: float) -> Mask:
    return (np.abs(v + 0.45 - np.abs(u)) < 0.32 + 0.08 * variation) & (np.abs(u) < 0.95)


def _mouth(u: Floats, v: Floats, variation: float) -> Mask:
    radius, angle = _polar(u, v)
    return (radius < 0.92) & (np.abs(angle) > 0.5 + 0.35 * variation)


def _dumbbell(u: Floats, v: Floats, variation: float) -> Mask:
    bar = (np.abs(v) < 0.14 + 0.06 * variation) & (np.abs(u) < 0.6)
    return (np.hypot(np.abs(u) - 0.56, v) < 0.42) | bar


@dataclass(frozen=True)
class ShapeClass:
    """One class: its name, its form, and the texture it wears in colours that mean nothing."""

    name: str
    form: Form
    texture: str


# Class id = position + 1. Fold i's novel classes are 5i+1 … 5i+5. Each fold has solid, thin and holed forms, and each
# texture is worn by classes of several folds: neither the form's kind nor the texture alone tells a class.
CLASSES: tuple[ShapeClass, ...] = (
    ShapeClass("star", _star, "plain"),
    ShapeClass("ring", _ring, "stripes"),
    ShapeClass("arrow", _arrow, "dots"),
    ShapeClass("square", _square, "checks"),
    ShapeClass("wave", _wave, "grid"),
    ShapeClass("cross", _cross, "stripes"),
    ShapeClass("crescent", _crescent, "dots"),
    ShapeClass("gear", _gear, "plain"),
    ShapeClass("comb", _comb, "checks"),
    ShapeClass("spiral", _spiral, "shade"),
    ShapeClass("heart", _heart, "grid"),
    ShapeClass("triangle", _triangle, "stripes"),
    ShapeClass("letter h", _letter_h, "plain"),
    ShapeClass("zigzag", _zigzag, "dots"),
    ShapeClass("flower", _flower, "shade"),
    ShapeClass("nut", _nut, "checks"),
    ShapeClass("drop", _drop, "stripes"),
    ShapeClass("chevron", _chevron, "shade"),
    ShapeClass("mouth", _mouth, "grid"),
    ShapeClass("dumbbell", _dumbbell, "plain"),
)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _colour(rng: np.random.Generator, low: float, high: float) -> Singles:
    """A colour [3] of mean brightness in [low, high], from vivid to nearly grey."""
    red, green, blue, vividness = rng.random(4).tolist()
    mean, grey = _between(rng, low, high), (red + green + blue) / 3.0
    spread = 40.0 + 110.0 * vividness
    return np.clip([mean + (c - grey) * spread for c in (red, green, blue)], 0.0, 255.0).astype(np.float32)


def _pattern(kind: str, u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Share of the second colour at every point, in [0, 1]; u and v are object units."""
    pitch = _between(rng, 0.26, 0.4)
    phase_u, phase_v = rng.random(2) * pitch
    u, v = u + phase_u, v + phase_v
    if kind == "stripes":
        return ((u // (pitch / 2)) % 2).astype(np.float64)
    if kind == "checks":
        return ((u // pitch + v // pitch) % 2).astype(np.float64)
    if kind == "dots":
        return (np.hypot(u % pitch - pitch / 2, v % pitch - pitch / 2) < 0.33 * pitch).astype(np.float64)
    if kind == "grid":
        return (np.minimum(u % pitch, v % pitch) < 0.28 * pitch).astype(np.float64)
    if kind == "shade":
        return np.clip(0.5 + 0.5 * u, 0.0, 1.0)
    return np.zeros_like(u)


def _ground(height: int, width: int, rng: np.random.Generator) -> Singles:
    """A cluttered ground [H, W, 3] in 0–255: two blended colours, stripes or cells, lines and blobs that are no class."""
    cells = int(rng.integers(3, 9))
    blend = cv2.resize(rng.random((cells, cells), np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    angle, frequency = _between(rng, 0.0, np.pi), 2 * np.pi / _between(rng, 5.0, 22.0)
    cosine, sine = np.float32(frequency * np.cos(angle)), np.float32(frequency * np.sin(angle))
    kind = int(rng.integers(4))
    if kind == 1:
        blend = blend + 0.5 * np.sin(columns * cosine + rows * sine)
    elif kind == 2:
        blend = blend + 0.4 * np.sign(np.sin(columns * cosine + rows * sine) * np.sin(rows * cosine - columns * sine))
    elif kind == 3:
        blend = blend + 0.8 * (rng.random((height, width), np.float32) - 0.5)
    first, second = _colour(rng, *_GROUND_BRIGHTNESS), _colour(rng, *_GROUND_BRIGHTNESS)
    ground = first + np.clip(blend, 0.0, 1.0)[..., None] * (second - first)
    for _ in range(int(rng.integers(3, 10))):
        _distract(ground, rng)
    return ground


def _distract(ground: Singles, rng: np.random.Generator) -> None:
    """Draw one line, ellipse or splinter, small enough or plain enough to be none of the twenty forms."""
    height, width = ground.shape[:2]
    colour = tuple(float(c) for c in _colour(rng, *_OBJECT_BRIGHTNESS))
    start = (int(rng.integers(width)), int(rng.integers(height)))
    kind = int(rng.integers(3))
    if kind == 0:
        end = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.line(ground, start, end, colour, int(rng.integers(1, 5)))
    elif kind == 1:
        axes = (int(rng.integers(3, width // 8)), int(rng.integers(3, width // 8)))
        cv2.ellipse(ground, start, axes, float(rng.integers(180)), 0.0, 360.0, colour, -1)
    else:
        corners = np.array(start) + rng.integers(-width // 6, width // 6 + 1, size=(3, 2))
        cv2.fillConvexPoly(ground, corners.astype(np.int32), colour)


@dataclass(frozen=True)
class _Placed:
    """An object on the canvas: its mask inside the window [top, top + h) × [left, left + w), and its own coordinates there."""

    class_id: int
    top: int
    left: int
    inside: Mask
    u: Floats
    v: Floats

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.inside.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def _place(class_id: int, height: int, width: int, size: int, rng: np.random.Generator) -> _Placed:
    """One object of random position, scale, rotation, squeeze and mirror image; it may hang over the picture's edge."""
    radius = size * _between(rng, 0.24, 0.45)
    centre_x, centre_y = _between(rng, 0.1, 0.9) * width, _between(rng, 0.1, 0.9) * height
    angle, squeeze = _between(rng, -_LARGEST_TILT, _LARGEST_TILT), _between(rng, 0.75, 1.0)
    mirror = 1.0 if rng.random() < 0.5 else -1.0
    variation = float(rng.random())
    reach = radius * 1.1
    top, bottom = max(0, int(centre_y - reach)), min(height, int(centre_y + reach) + 2)
    left, right = max(0, int(centre_x - reach)), min(width, int(centre_x + reach) + 2)
    x = (np.arange(left, right, dtype=np.float64) - centre_x) / radius
    y = (np.arange(top, bottom, dtype=np.float64)[:, None] - centre_y) / radius
    u = x * np.cos(angle) + y * np.sin(angle)
    v = (y * np.cos(angle) - x * np.sin(angle)) * mirror / squeeze
    return _Placed(class_id, top, left, CLASSES[class_id - 1].form(u, v, variation), u, v)


def _arrange(class_ids: list[int], height: int, width: int, size: int, rng: np.random.Generator) -> list[_Placed]:
    """Lay the objects down one after the other, so that each stays visible by at least 70 % under the later ones."""
    placed: list[_Placed] = []
    visible = np.full((height, width), -1, dtype=np.int8)
    areas: list[int] = []
    for class_id in class_ids:
        for _ in range(12):
            candidate = _place(class_id, height, width, size, rng)
            area = int(candidate.inside.sum())
            trial = visible.copy()
            trial[candidate.window][candidate.inside] = len(placed)
            shown = np.bincount(trial[trial >= 0], minlength=len(placed) + 1)
            if area > 0 and all(now >= _SMALLEST_VISIBLE_SHARE * was for now, was in zip(shown, areas, strict=False)):
                placed.append(candidate)
                areas.append(area)
                visible = trial
                break
    return placed


def _paint(picture: Singles, thing: _Placed, rng: np.random.Generator) -> None:
    """Colour one object in its class's texture and darken its outline, as most drawn and many real things have it."""
    window = picture[thing.window]
    first = _colour(rng, *_OBJECT_BRIGHTNESS)
    second = first * _between(rng, 0.35, 0.65)
    kind = CLASSES[thing.class_id - 1].texture
    share = _pattern(kind, thing.u[thing.inside], thing.v[thing.inside], rng)[:, None]
    window[thing.inside] = first + share * (second - first)
    core = cv2.erode(thing.inside.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1).astype(bool)
    window[thing.inside & ~core] *= _between(rng, 0.2, 0.7)


def _outline(inside: Mask) -> tuple[Mask, Mask]:
    """The mask and the one-pixel rim just outside it, both padded by a pixel on every side."""
    padded = np.pad(inside, 1)
    rim = cv2.dilate(padded.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) & ~padded
    return padded, rim


def _label(placed: list[_Placed], height: int, width: int) -> NDArray[np.uint8]:
    """Class ids with a void rim of one to two pixels: around an object, and where objects meet on both sides of the seam."""
    label = np.zeros((height + 2, width + 2), dtype=np.uint8)
    for thing in placed:
        padded, rim = _outline(thing.inside)
        window = label[thing.top : thing.top + padded.shape[0], thing.left : thing.left + padded.shape[1]]
        window[padded] = thing.class_id
        window[rim] = VOID
    return np.ascontiguousarray(label[1:-1, 1:-1])


def draw(class_ids: list[int], size: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one picture with objects of the classes given, in this order from back to front.

    Returns (picture [H, W, 3] uint8 RGB, label [H, W] uint8: class ids, 0 ground, 255 void). The long side is `size` pixels,
    the short one 75–100 % of it. An object that finds no place without hiding others too much is left out.
    """
    short = round(size * _between(rng, 0.75, 1.0))
    height, width = (short, size) if rng.random() < 0.5 else (size, short)
    placed = _arrange(class_ids, height, width, size, rng)
    # the ground comes after the arrangement: the label must not depend on how much chance the painting uses
    picture = _ground(height, width, rng)
    for thing in placed:
        _paint(picture, thing, rng)
    light = 1.0 + _between(rng, -0.25, 0.25) * np.linspace(-1.0, 1.0, width, dtype=np.float32)[:, None]
    picture = cv2.GaussianBlur(picture, (3, 3), 0.6) * light
    picture += (rng.random((height, width, 3), np.float32) - 0.5) * np.float32(_between(rng, 8.0, 28.0))
    return np.clip(picture, 0.0, 255.0).astype(np.uint8), _label(placed, height, width)
