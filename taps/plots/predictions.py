"""Figures of predictions for images: classes and maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from taps.data.dense.dataset import CLASS_KINDS
from taps.data.multi_label import IGNORE_INDEX
from taps.networks.preprocessing import ToRGB
from taps.plots.style import SECOND, bare, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def predictions(image: Image, outputs: Mapping[str, Sequence[tuple[str, float]]]) -> Figure:
    """An image with the most probable classes of each task.

    Args:
        image: the image before preprocessing.
        outputs: by task, (class, probability in 0..1), the most probable first.
    """
    columns = min(len(outputs), max(3, math.ceil(math.sqrt(len(outputs)))))
    lines = math.ceil(len(outputs) / columns)
    figure = new_figure(2.6 + 3.0 * columns, max(2.6, 1.4 * lines + 0.4))
    grid = figure.add_gridspec(lines, columns + 1, width_ratios=[1.0] + [1.1] * columns)
    picture = figure.add_subplot(grid[:, 0])
    picture.imshow(ToRGB()(image))
    picture.set_anchor("N")
    picture.axis("off")
    for index, (task, classes) in enumerate(outputs.items()):
        axes = figure.add_subplot(grid[index // columns, index % columns + 1])
        names = [name if len(name) <= 18 else f"{name[:17]}…" for name, _ in classes]
        values = [100 * value for _, value in classes]
        bars = axes.barh(range(len(names)), values, color=SECOND, height=0.7)
        axes.bar_label(bars, [f"{value:.0f} %" for value in values], padding=2, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(0, 125)
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.set_title(task, fontsize=9, loc="left")
        bare(axes)
    return figure


def maps(samples: Sequence[Mapping], kinds: Mapping[str, str]) -> Figure:
    """Images with the labels and predictions of every dense task; unlabelled pixels are white.

    Args:
        samples: dicts of ``image`` (H, W, 3), and by task ``targets`` and ``predicted`` (C, H, W) tensors.
        kinds: kinds of the tasks by name.
    """
    titles = ["image"] + [f"{task}, {which}" for task in kinds for which in ("labelled", "predicted")]
    height, width = samples[0]["image"].shape[:2]
    figure = new_figure(1.9 * len(titles), 1.9 * height / width * len(samples) + 0.5)
    grid = figure.subplots(len(samples), len(titles), squeeze=False)
    for axes, sample in zip(grid, samples, strict=True):
        image = sample["image"]
        drawn = [image if image.dtype.kind == "u" else image / 255.0]
        for task, kind in kinds.items():
            drawn += _drawn(kind, sample["targets"][task], sample["predicted"][task])
        for place, array in zip(axes, drawn, strict=True):
            place.imshow(array, interpolation="nearest")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        bare(axes)
    return figure


def _drawn(kind: str, target, predicted) -> tuple:
    """A label and a prediction as RGB arrays (H, W, 3) in the same colours."""
    import torch
    from matplotlib import colormaps

    if kind in CLASS_KINDS:
        known = target != IGNORE_INDEX
        palette = [color[:3] for name in ("tab20", "tab20b", "tab20c") for color in colormaps[name].colors]
        colors = torch.tensor([palette[index % len(palette)] for index in range(256)])
        drawn = [colors[target], colors[predicted.argmax(0)]]
    elif kind == "normals":
        known = target.isfinite().all(0)
        units = [torch.nn.functional.normalize(own.nan_to_num(), dim=0) for own in (target, predicted)]
        drawn = [(own.movedim(0, -1) / 2 + 0.5).clamp(0, 1) for own in units]
    else:
        known = target[0].isfinite()
        low, high = 0.0, 1.0
        if kind == "edges":
            predicted = predicted.sigmoid()
        elif known.any():
            low, high = float(target[0][known].min()), float(target[0][known].max())
        scaled = [((own[0].nan_to_num() - low) / max(high - low, 1e-6)).clamp(0, 1) for own in (target, predicted)]
        drawn = [torch.from_numpy(colormaps["viridis"](own.numpy())[..., :3]).float() for own in scaled]
    return torch.where(known[..., None], drawn[0], torch.ones(3)).numpy(), drawn[1].numpy()
