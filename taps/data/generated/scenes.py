"""Scenes: a generated dense benchmark of ray-cast rooms with exact labels.

A room has a floor, a ceiling and walls, and contains spheres, boxes, cylinders and cones with random colours, sizes and textures
under a random light; the back wall may have an opening, behind which nothing is labelled. Classes depend on shapes, not on
colours and textures. The camera is at the origin unless it is moved; x points right, y up and z into the room.
``taps data scenes FOLDER`` writes a data set in a layout that :mod:`taps.data.dense.adashare_layout` reads:

    scenes.json                      train (train1 + train2), val, test: [img, seg, normal, depth, edge, keypoint]
    img/0001.png                     uint8 RGB
    seg/0001.png                     uint8, 0..6, 255 for no label
    normal/0001.png                  uint8, (n + 1) · 127.5, (255, 255, 255) for no label
    depth/0001.npy                   float32, distance along z in metres, 0 for no label
    edge/0001.png, keypoint/0001.png uint16, 0..65535 for 0..1
    about.json                       size, difficulty, seed and format version
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt
from tqdm import tqdm

from taps.data.dense.adashare_layout import SCENE_CLASSES
from taps.data.generated.tree import make_tree
from taps.data.multi_label import IGNORE_INDEX
from taps.settings.data import SceneRecipe
from taps.settings.declare import as_dict, check_values
from taps.storage.files import write_json

_VERSION = 1
_FLOOR, _CEILING, _WALL, _SPHERE, _BOX, _CYLINDER, _CONE = range(len(SCENE_CLASSES))


class _View:
    """The nearest surface that each ray of a camera has hit so far."""

    def __init__(self, height: int, width: int, camera: np.ndarray) -> None:
        self.camera = camera
        self.field = 0.75  # tangent of half the field of view
        self.shape, count = (height, width), height * width
        across, down = np.meshgrid((np.arange(width) + 0.5) / width * 2 - 1, (np.arange(height) + 0.5) / height * 2 - 1)
        x, y = across.ravel() * self.field, -down.ravel() * self.field * height / width
        self.rays = np.stack([x, y, np.ones(count)], 1)
        self.depth = np.full(count, np.inf)
        self.kind = np.full(count, IGNORE_INDEX, np.int64)
        self.instance = np.full(count, -1, np.int64)
        self.normal, self.colour = np.zeros((count, 3)), np.zeros((count, 3))

    def hit(self, where: np.ndarray, depth: np.ndarray, normal: np.ndarray, kind: int, instance: int, colour) -> None:
        """Add a surface at ``depth`` with ``normal`` (N, 3) for the rays ``where``; ``colour`` maps points (N, 3) to RGB."""
        nearer = where & (depth > 0.05) & (depth < self.depth)
        if nearer.any():
            self.depth[nearer], self.kind[nearer], self.instance[nearer] = depth[nearer], kind, instance
            self.normal[nearer] = np.broadcast_to(normal, self.normal.shape)[nearer]
            self.colour[nearer] = colour(self.rays[nearer] * depth[nearer, None] + self.camera)


def _texture(random: np.random.Generator, strength: float):
    """A random texture: a function from points (N, 3) to RGB with a checkered or striped pattern."""
    base = random.uniform(0.15, 0.95, 3)
    other = np.clip(base + strength * random.uniform(-0.6, 0.6, 3), 0, 1)
    pitch, turn = random.uniform(0.15, 0.6), random.uniform(0, math.pi)
    checkered = random.random() < 0.5
    axes = np.array([[math.cos(turn), 0, math.sin(turn)], [-math.sin(turn), 0.7, math.cos(turn)]])

    def colour(points: np.ndarray) -> np.ndarray:
        cells = np.floor(points @ axes.T / pitch).astype(np.int64)
        odd = (cells.sum(1) if checkered else cells[:, 1]) % 2
        return np.where(odd[:, None] == 1, other, base)

    return colour


def _plane(view: _View, normal: Sequence[float], offset: float, kind: int, instance: int, colour, inside=None) -> None:
    """The plane n·p = offset, limited to points for which ``inside`` is true."""
    normal = np.asarray(normal, float)
    slope = view.rays @ normal
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = offset / slope
    depth = np.where(np.isfinite(depth), depth, -1.0)
    where = depth > 0
    if inside is not None:
        where &= inside(view.rays * depth[:, None])
    view.hit(where, depth, normal, kind, instance, colour)


def _roots(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> list[np.ndarray]:
    """The real solutions of a·t² + 2b·t + c = 0, or NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(b * b - a * c)
        return [(-b - root) / a, (-b + root) / a]


def _sphere(view: _View, centre: np.ndarray, radius: float, instance: int, colour) -> None:
    rays = view.rays
    for depth in _roots((rays**2).sum(1), -(rays @ centre), np.full(len(rays), centre @ centre - radius**2)):
        depth = np.nan_to_num(depth, nan=-1.0)
        view.hit(depth > 0, depth, (rays * depth[:, None] - centre) / radius, _SPHERE, instance, colour)


def _axes(turn: float) -> np.ndarray:
    """The axes of a box that is turned about the vertical, as rows."""
    return np.array([[math.cos(turn), 0, math.sin(turn)], [0, 1, 0], [-math.sin(turn), 0, math.cos(turn)]])


def _box(view: _View, centre: np.ndarray, half: np.ndarray, turn: float, instance: int, colour) -> None:
    axes = _axes(turn)
    for axis in range(3):
        for sign in (-1.0, 1.0):
            normal = sign * axes[axis]
            others = [other for other in range(3) if other != axis]

            def inside(points: np.ndarray, others=others) -> np.ndarray:
                local = (points - centre) @ axes.T
                return (np.abs(local[:, others]) <= half[others]).all(1)

            _plane(view, normal, float(normal @ centre + half[axis]), _BOX, instance, colour, inside)


def _round(view: _View, foot: np.ndarray, radius: float, height: float, slope: float, instance: int, colour) -> None:
    """A cylinder (``slope`` = 0) or a cone (``slope`` = radius / height) that stands on its foot."""
    rays = view.rays
    kind = _CONE if slope else _CYLINDER
    # The surface is ‖(p − foot)_xz‖ = radius − slope · (p − foot)_y.
    a = rays[:, 0] ** 2 + rays[:, 2] ** 2 - (slope * rays[:, 1]) ** 2
    width = radius + slope * foot[1]
    b = -(rays[:, 0] * foot[0] + rays[:, 2] * foot[2]) + slope * rays[:, 1] * width
    c = np.full(len(rays), foot[0] ** 2 + foot[2] ** 2 - width**2)
    for depth in _roots(a, b, c):
        depth = np.nan_to_num(depth, nan=-1.0, posinf=-1.0, neginf=-1.0)
        local = rays * depth[:, None] - foot
        outward = np.stack([local[:, 0], slope * np.hypot(local[:, 0], local[:, 2]), local[:, 2]], 1)
        outward /= np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-9)
        where = (depth > 0) & (local[:, 1] >= 0) & (local[:, 1] <= height)
        view.hit(where, depth, outward, kind, instance, colour)
    for level, normal in ((height, 1.0), (0.0, -1.0)):
        reach = radius - slope * level

        def inside(points: np.ndarray, reach=reach) -> np.ndarray:
            return np.hypot(points[:, 0] - foot[0], points[:, 2] - foot[2]) <= reach

        _plane(view, (0, normal, 0), normal * (foot[1] + level), kind, instance, colour, inside)


def render(
    random: np.random.Generator,
    size: tuple[int, int],
    difficulty: float,
    camera: Sequence[float] = (0.0, 0.0, 0.0),
    noise: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """Render one scene.

    Args:
        random: source of all random choices.
        size: (H, W).
        difficulty: 0..1.
        camera: position of the camera in metres.
        noise: separate source of the sensor's noise.

    Returns:
        ``image`` (H, W, 3) uint8; ``semseg`` (H, W) uint8; ``normals`` (H, W, 3), unit vectors or NaN; ``depth`` (H, W) in
        metres, 0 for no label; ``edges`` and ``keypoints`` (H, W) in 0..1.
    """
    place = np.asarray(camera, float)
    view = _View(*size, place)
    strength = 0.2 + 0.8 * difficulty
    floor, ceiling = -random.uniform(0.9, 1.6), random.uniform(0.8, 1.5)
    back, left, right = random.uniform(4.5, 8.0), -random.uniform(1.8, 3.5), random.uniform(1.8, 3.5)
    opening = None
    if random.random() < 0.5:
        start = random.uniform(left + 0.3, right - 1.3)
        opening = (start, start + random.uniform(0.7, 1.3), floor + random.uniform(1.2, ceiling - floor - 0.2))
    walls = _texture(random, strength)

    def within(points: np.ndarray) -> np.ndarray:
        return points[:, 2] <= back - place[2]

    def closed(points: np.ndarray) -> np.ndarray:
        x, y, _ = (points + place).T
        return ~((x > opening[0]) & (x < opening[1]) & (y < opening[2]))

    _plane(view, (0, 1, 0), floor - place[1], _FLOOR, 0, _texture(random, strength), within)
    _plane(view, (0, -1, 0), place[1] - ceiling, _CEILING, 1, _texture(random, 0.2 * strength), within)

    _plane(view, (0, 0, -1), place[2] - back, _WALL, 2, walls, closed if opening else None)
    _plane(view, (1, 0, 0), left - place[0], _WALL, 3, walls, within)
    _plane(view, (-1, 0, 0), place[0] - right, _WALL, 4, walls, within)
    corners = [np.array([x, y, back]) - place for x in (left, right) for y in (floor, ceiling)]
    count = 2 + int(random.integers(0, 2 + round(5 * difficulty)))
    for instance in range(10, 10 + count):
        kind = int(random.integers(_SPHERE, _CONE + 1))
        radius, height = random.uniform(0.2, 0.55), random.uniform(0.4, 1.3)
        z = random.uniform(1.8, back - 0.6)
        reach = min(z * view.field, right - 0.6, -left - 0.6)
        foot = np.array([random.uniform(-reach, reach), floor, z]) - place
        colour = _texture(random, strength)
        if kind == _SPHERE:
            _sphere(view, foot + np.array([0, radius, 0]), radius, instance, colour)
        elif kind == _BOX:
            half, turn = np.array([radius, height / 2, random.uniform(0.2, 0.55)]), random.uniform(0, math.pi)
            centre = foot + np.array([0, height / 2, 0])
            _box(view, centre, half, turn, instance, colour)
            axes = _axes(turn)
            corners += [centre + (signs * half) @ axes for signs in itertools.product([-1, 1], repeat=3)]
        else:
            _round(view, foot, radius, height, radius / height if kind == _CONE else 0.0, instance, colour)
            if kind == _CONE:
                corners.append(foot + np.array([0, height, 0]))
    seen = view.kind != IGNORE_INDEX
    facing = np.where((view.normal * view.rays).sum(1, keepdims=True) > 0, -1.0, 1.0)
    normal = view.normal * facing
    return {
        "image": _shade(view, normal, seen, random, difficulty, noise or random),
        "semseg": view.kind.reshape(size).astype(np.uint8),
        "normals": np.where(seen[:, None], normal, np.nan).reshape(*size, 3).astype(np.float32),
        "depth": np.where(seen, view.depth, 0.0).reshape(size).astype(np.float32),
        "edges": _edges(view, normal),
        "keypoints": _keypoints(view, corners),
    }


def _shade(
    view: _View,
    normal: np.ndarray,
    seen: np.ndarray,
    random: np.random.Generator,
    difficulty: float,
    noise: np.random.Generator,
) -> np.ndarray:
    """The image: Lambertian reflection of a point light, ambient light, the sky behind the opening, and sensor noise."""
    light = np.array([random.uniform(-1.5, 1.5), random.uniform(0.2, 0.9), random.uniform(0.0, 3.0)]) - view.camera
    towards = light - view.rays * np.where(seen, view.depth, 1.0)[:, None]
    towards /= np.maximum(np.linalg.norm(towards, axis=1, keepdims=True), 1e-9)
    ambient = random.uniform(0.35, 0.6) - 0.2 * difficulty
    brightness = ambient + (1 - ambient) * np.clip((normal * towards).sum(1), 0, 1)
    sky = random.uniform(0.5, 1.0, 3)
    colours = np.where(seen[:, None], view.colour * brightness[:, None], sky)
    colours = colours * random.uniform(0.7, 1.2) + noise.normal(0, 0.01 + 0.05 * difficulty, colours.shape)
    return (np.clip(colours, 0, 1) * 255).round().astype(np.uint8).reshape(*view.shape, 3)


def _edges(view: _View, normal: np.ndarray) -> np.ndarray:
    """1 on outlines and creases, decreasing with the distance d in pixels as exp(−d²/2)."""
    instance, normal = view.instance.reshape(view.shape), normal.reshape(*view.shape, 3)
    line = np.zeros(view.shape, bool)
    for axis in (0, 1):
        ahead = np.s_[1:, :] if axis == 0 else np.s_[:, 1:]
        behind = np.s_[:-1, :] if axis == 0 else np.s_[:, :-1]
        crease = (normal[ahead] * normal[behind]).sum(-1) < math.cos(math.radians(35))
        line[behind] |= (instance[ahead] != instance[behind]) | (crease & (instance[ahead] >= 0))
    if not line.any():
        return np.zeros(view.shape, np.float32)
    return np.exp(-0.5 * distance_transform_edt(~line) ** 2).astype(np.float32)


def _keypoints(view: _View, corners: Sequence[np.ndarray]) -> np.ndarray:
    """Visible corners of boxes and of the room and tips of cones, as Gaussians with σ = 1 pixel at a width of 64."""
    height, width = view.shape
    rows, columns = np.mgrid[:height, :width]
    sigma = max(width / 64.0, 0.7)
    depth = np.where(np.isfinite(view.depth), view.depth, 1e9).reshape(view.shape)
    heat = np.zeros(view.shape)
    for corner in corners:
        if corner[2] < 0.1:
            continue
        column = (corner[0] / corner[2] / view.field + 1) / 2 * width - 0.5
        row = (1 - corner[1] / corner[2] / (view.field * height / width)) / 2 * height - 0.5
        r, c = round(row), round(column)
        if not (0 <= r < height and 0 <= c < width):
            continue
        around = depth[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
        if np.abs(around - corner[2]).min() < 0.04 * corner[2]:
            heat = np.maximum(heat, np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * sigma**2)))
    return heat.astype(np.float32)


def make_scenes(root: Path, recipe: SceneRecipe | None = None) -> None:
    """Write the benchmark into ``root``, completely or not at all; data of the same recipe is kept.

    Raises:
        UserError: if ``root`` holds other data, or for an invalid recipe.
    """
    recipe = recipe or SceneRecipe()
    check_values(recipe)
    about = {"version": _VERSION, **as_dict(recipe, SceneRecipe), "size": list(recipe.size)}
    make_tree(root, about, lambda building: _write(building, recipe))


def _write(root: Path, recipe: SceneRecipe) -> None:
    random = np.random.default_rng(recipe.seed)
    columns = ("img", "seg", "normal", "depth", "edge", "keypoint")
    for column in columns:
        (root / column).mkdir()
    entries = []
    total = recipe.train + recipe.val + recipe.test
    for index in tqdm(range(total), desc="rendering scenes", disable=None, leave=False):
        scene = render(random, recipe.size, recipe.difficulty)
        normals = np.where(np.isnan(scene["normals"]), 1.0, scene["normals"])
        stored = (
            scene["image"],
            scene["semseg"],
            ((normals + 1) * 127.5).round().astype(np.uint8),
            scene["depth"],
            (scene["edges"] * 65535).round().astype(np.uint16),
            (scene["keypoints"] * 65535).round().astype(np.uint16),
        )
        entries.append([f"{column}/{index + 1:04d}.{'npy' if column == 'depth' else 'png'}" for column in columns])
        for path, array in zip(entries[-1], stored, strict=True):
            if path.endswith(".npy"):
                np.save(root / path, array, allow_pickle=False)
            else:
                Image.fromarray(array).save(root / path)
    train, rest = entries[: recipe.train], entries[recipe.train :]
    cut = round(0.7 * recipe.train)
    lists = {"train": train, "train1": train[:cut], "train2": train[cut:], "val": rest[: recipe.val]}
    write_json(root / "scenes.json", {**lists, "test": rest[recipe.val :]})
