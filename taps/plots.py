"""Pictures. Everything shown is read from a results folder, i.e. from the gates' hard decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from taps.cost import is_tuned
from taps.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_TUNED, _SHARED, _BORDER, _SECOND = "#d9542b", "#e9edf2", "#8793a3", "#3f6fa3"
_SHORTCUTS = ("downsample", "shortcut", "skip")


def stage_of(name: str) -> str:
    """The part of the network a layer belongs to: ``layer3`` of ``layer3.0.conv1``, ``blocks.4`` of ``blocks.4.1.conv_pw``."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part[-1].isdigit():
            return ".".join(parts[: index + 1])
    return parts[0]


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def bare(axes) -> None:
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def layers(tasks: Mapping[str, list[dict]], title: str = "", captions: Mapping[str, str] | None = None) -> Figure:
    """Heat map of units (left to right in network order) × tasks: tuned or shared.

    Stage borders are drawn, and shortcut convolutions are named above the map.

    Args:
        tasks: rows of ``model.report`` by task; all of the same network.
        title: above the picture.
        captions: a short text at the right end of a task's row, e.g. its accuracy.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names = list(tasks)
    units = [row["name"] for row in tasks[names[0]]]
    matrix = [[float(is_tuned(row)) for row in tasks[name]] for name in names]
    figure = new_figure(min(max(0.17 * len(units) + 3.2, 7), 26), 0.3 * len(names) + 2.3)
    axes = figure.add_subplot()
    axes.imshow(matrix, aspect="auto", cmap=ListedColormap([_SHARED, _TUNED]), vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([index - 0.5 for index in range(1, len(units))], minor=True)
    axes.set_yticks([index - 0.5 for index in range(1, len(names))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    stages = [stage_of(unit) for unit in units]
    starts = [index for index in range(len(units)) if index == 0 or stages[index] != stages[index - 1]]
    ends = [*starts[1:], len(units)]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=_BORDER, linewidth=1.0)
    turned = len(starts) > 6
    axes.set_xticks(
        [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)],
        [stages[start] for start in starts],
        rotation=45 if turned else 0,
        ha="right" if turned else "center",
        rotation_mode="anchor" if turned else None,
        fontsize=8,
    )
    axes.set_xlabel(f"layers in network order, {len(units)} in all")
    bare(axes)
    shortcuts = [index for index, unit in enumerate(units) if any(word in unit for word in _SHORTCUTS)]
    if shortcuts:
        above = axes.secondary_xaxis("top")
        above.set_xticks(shortcuts, [_shortcut_name(units[index]) for index in shortcuts], fontsize=7, color=_BORDER)
        above.tick_params(length=3, color=_BORDER)
        above.spines["top"].set_visible(False)
    if captions:
        right = axes.secondary_yaxis("right")
        right.set_yticks(range(len(names)), [captions.get(name, "") for name in names])
        right.tick_params(length=0)
        right.spines["right"].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    keys = [Patch(color=_TUNED, label="the task's own weights"), Patch(color=_SHARED, label="shared with the base")]
    figure.legend(handles=keys, loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure


def _shortcut_name(unit: str) -> str:
    return next(word for word in _SHORTCUTS if word in unit)


def sizes(summary: Mapping) -> Figure:
    """Accuracy and stored parameters of each task of a ``summary.json``, side by side."""
    rows = summary["tasks"]
    names = list(rows)
    figure = new_figure(9, 0.3 * len(names) + 1.6)
    left, right = figure.subplots(1, 2, sharey=True)
    values = [row["accuracy"] for row in rows.values()]
    bars = left.barh(names, values, color=_SECOND, height=0.7)
    left.axvline(summary["mean_accuracy"], color=_BORDER, linestyle="--", linewidth=1, zorder=0)
    left.bar_label(bars, [f"{value:.1f}" for value in values], label_type="center", color="white", fontsize=8)
    left.set_xlim(0, 100)
    left.set_xticks(range(0, 101, 20))
    left.set_xlabel(f"accuracy on the test split, %  (mean {summary['mean_accuracy']:.1f}, dashed)")
    millions = [row["parameters"] / 1e6 for row in rows.values()]
    bars = right.barh(names, millions, color=_TUNED, height=0.7)
    texts = [
        f"{size:.2f} M, {100 * row['tuned_layers']:.0f} %" for size, row in zip(millions, rows.values(), strict=True)
    ]
    right.bar_label(bars, texts, padding=3, fontsize=8)
    right.set_xlim(0, max([*millions, 1e-3]) * 1.35)
    right.set_xlabel(f"stored parameters, and layers tuned  (all: {summary['parameters_x_base']:.2f} × base)")
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure


def scores(metrics: Iterable[Mapping], threshold: float) -> Figure | None:
    """Every layer's score over the epochs, one panel a task, with the threshold τ above which a layer is tuned.

    Args:
        metrics: rows of ``metrics.jsonl``.
        threshold: τ.

    Returns:
        ``None`` for a method whose gates have no scores.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    tasks: dict[str, list[Mapping]] = {}
    for row in metrics:
        if row["scores"] and row["scores"][0] is not None:
            tasks.setdefault(row["task"], []).append(row)
    if not tasks:
        return None
    columns = min(len(tasks), max(3, math.ceil(math.sqrt(len(tasks)))))
    lines = math.ceil(len(tasks) / columns)
    figure = new_figure(max(2.6 * columns + 1.6, 6), max(2.0 * lines + 0.9, 3.6))
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    depth = colormaps["viridis"]
    for axes in panels.flat[len(tasks) :]:
        axes.axis("off")
    for axes, (name, rows) in zip(panels.flat, tasks.items(), strict=False):
        epochs, count = [row["epoch"] for row in rows], len(rows[0]["scores"])
        for unit in range(count):
            values = [row["scores"][unit] for row in rows]
            axes.plot(epochs, values, color=depth(unit / max(count - 1, 1)), linewidth=0.8, marker=".", markersize=3)
        axes.axhline(threshold, color=_TUNED, linestyle="--", linewidth=1.2)
        axes.set_title(name, fontsize=9)
        axes.set_yscale("symlog", linthresh=0.5, linscale=2)  # most scores stay near τ, a few run far away
        axes.set_yticks([-1, 0, 1], ["-1", "0", "1"])
        axes.set_yticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel(f"score of a layer (dashed: threshold {threshold:g})", fontsize=9)
    bar = figure.colorbar(ScalarMappable(Normalize(1, count), depth), ax=panels, pad=0.01, aspect=30)
    bar.set_label("layer, in network order", fontsize=8)
    return figure


def overlap(tasks: Mapping[str, list[dict]]) -> Figure:
    """For each two tasks, the layers that both tune among those that either tunes, in %; the diagonal counts the layers."""
    names = list(tasks)
    tuned = [{row["name"] for row in tasks[name] if is_tuned(row)} for name in names]
    shared = [[100 * len(a & b) / max(len(a | b), 1) for b in tuned] for a in tuned]
    side = 0.42 * len(names) + 2.4
    figure = new_figure(side + 1.2, side)
    axes = figure.add_subplot()
    image = axes.imshow(shared, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for row in range(len(names)):
        for column in range(len(names)):
            text = str(len(tuned[row])) if row == column else f"{shared[row][column]:.0f}"
            color = "white" if shared[row][column] > 60 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    bare(axes)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("tuned by both, % of tuned by either", fontsize=8)
    axes.set_title("which tasks tune the same layers (diagonal: how many)", fontsize=9, loc="left")
    return figure


def trade_off(
    runs: Mapping[str, Mapping],
    labels: Mapping[str, str] | None = None,
    groups: Mapping[str, str] | None = None,
    size: str = "parameters_x_base",
) -> Figure:
    """Mean accuracy against size, one point a run.

    Args:
        runs: ``summary.json`` by run.
        labels: what is written at each point, e.g. λ; the run's name by default.
        groups: which line each run lies on, e.g. its way of training; one line by default.
        size: what of a summary is the size: ``"parameters_x_base"`` or ``"bytes_x_base"``.
    """
    figure = new_figure(7, 4.4)
    axes = figure.add_subplot()
    colors = (_TUNED, _SECOND, "#4f9d69", "#8a5fa8", "#b08d2f", "#5f6b78")
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for name, run in runs.items():
        line = (groups or {}).get(name, "")
        lines.setdefault(line, []).append((run[size], run["mean_accuracy"], name))
    for index, (line, points) in enumerate(sorted(lines.items())):
        points.sort()
        color = colors[index % len(colors)]
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=color, linewidth=1, label=line)
        for x, y, name in points:
            text = (labels or {}).get(name, name)
            axes.annotate(text, (x, y), xytext=(6, -3), textcoords="offset points", fontsize=8)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.margins(x=0.15, y=0.2)
    axes.set_xlabel(f"{size.partition('_')[0]} of base and tasks together, × base")
    axes.set_ylabel("mean accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def predictions(image: Image, outputs: Mapping[str, Sequence[tuple[str, float]]]) -> Figure:
    """An image, and beside it each task's most probable classes.

    Args:
        image: as a person sees it.
        outputs: for each task (class, probability 0..1), the most probable first.
    """
    columns = min(len(outputs), max(3, math.ceil(math.sqrt(len(outputs)))))
    lines = math.ceil(len(outputs) / columns)
    figure = new_figure(2.6 + 3.0 * columns, max(2.6, 1.4 * lines + 0.4))
    grid = figure.add_gridspec(lines, columns + 1, width_ratios=[1.0] + [1.1] * columns)
    picture = figure.add_subplot(grid[:, 0])
    picture.imshow(image)
    picture.set_anchor("N")
    picture.axis("off")
    for index, (task, classes) in enumerate(outputs.items()):
        axes = figure.add_subplot(grid[index // columns, index % columns + 1])
        names = [name if len(name) <= 18 else f"{name[:17]}…" for name, _ in classes]
        values = [100 * value for _, value in classes]
        bars = axes.barh(range(len(names)), values, color=_SECOND, height=0.7)
        axes.bar_label(bars, [f"{value:.0f} %" for value in values], padding=2, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(0, 125)
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.set_title(task, fontsize=9, loc="left")
        bare(axes)
    return figure


def policy(
    learned,
    executed: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    own: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> Figure:
    """Tasks × units: the learned probability of running each unit, and below it the share of samples that ran it in each
    network trained under a policy. Where tasks may have weights of their own, units are marked by what is done with them:
    skipped white, shared light, the task's own dark.

    Args:
        learned: a :class:`taps.policy.Policy`.
        executed: for each trained network, by task, shares of samples 0..1.
        own: for each trained network, by task, 1.0 where the task has weights of its own.
    """
    panels = {"learned probability of running": learned.probability}
    if learned.own:
        panels["learned probability of own weights"] = learned.own
    names, count = list(learned.run), len(learned.units)
    for title, shares in (executed or {}).items():
        mine = (own or {}).get(title)
        if mine:
            shares = {name: [r * (1 + o) / 2 for r, o in zip(shares[name], mine[name], strict=True)] for name in names}
        panels[title] = shares
    figure = new_figure(min(max(0.34 * count + 3.0, 7), 26), len(panels) * (0.28 * len(names) + 0.5) + 1.2)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, shares) in zip(grid, panels.items(), strict=True):
        axes.imshow([shares[name] for name in names], aspect="auto", cmap="Oranges", vmin=0, vmax=1.15)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        decided = bool((own or {}).get(title))
        values = [value for name in names for value in shares[name]]
        what = f"{title}: {100 * sum(values) / len(values):.0f} %"
        if decided:
            parts = [100 * sum(value == level for value in values) / len(values) for level in (0.5, 1.0, 0.0)]
            what = f"{title}: {parts[0]:.0f} % shared, {parts[1]:.0f} % the task's own, {parts[2]:.0f} % skipped"
        axes.set_title(what, fontsize=9, loc="left")
        axes.set_xticks([index - 0.5 for index in range(1, count)], minor=True)
        axes.set_yticks([index - 0.5 for index in range(1, len(names))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        for row, name in enumerate(names if count <= 40 else ()):
            for column, value in enumerate(shares[name]):
                text = f"{value:.2f}".lstrip("0") if 0 < value < 1 else f"{value:.0f}"
                if decided:
                    text = {0.0: "", 0.5: "·", 1.0: "own"}.get(value, text)
                color = "white" if value > 0.7 else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
        bare(axes)
    grid[-1].set_xticks(range(count), learned.units, rotation=45, ha="right", rotation_mode="anchor", fontsize=7)
    grid[-1].set_xlabel(f"units of {learned.backbone} in network order")
    return figure


def similarity(learned) -> Figure:
    """How alike the tasks' policies are: 1 − mean difference of the probabilities, in %."""
    names = list(learned.run)
    values = [[100 * learned.similarity(a, b) for b in names] for a in names]
    side = 0.6 * len(names) + 2.4
    figure = new_figure(side + 1.2, side)
    axes = figure.add_subplot()
    low = min(min(row) for row in values)
    image = axes.imshow(values, cmap="Blues", vmin=math.floor(low / 10) * 10 if low < 100 else 90, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    middle = sum(image.get_clim()) / 2
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color = "white" if value > middle else "black"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    bare(axes)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("policies alike, %", fontsize=8)
    axes.set_title("which tasks do the same", fontsize=9, loc="left")
    return figure


def maps(samples: Sequence[Mapping], kinds: Mapping[str, str]) -> Figure:
    """Images, and for every dense task what is labelled and what is predicted; pixels without a label are white.

    Args:
        samples: dicts of ``image`` (H, W, 3), and by task ``targets`` and ``predicted`` (C, H, W) tensors.
        kinds: of the tasks.
    """
    tasks = list(kinds)
    height, width = samples[0]["image"].shape[:2]
    figure = new_figure(1.9 * (1 + 2 * len(tasks)), 1.9 * height / width * len(samples) + 0.5)
    grid = figure.subplots(len(samples), 1 + 2 * len(tasks), squeeze=False)
    for axes, sample in zip(grid, samples, strict=True):
        image = sample["image"]
        axes[0].imshow(image if image.dtype.kind == "u" else image / 255.0)
        for index, task in enumerate(tasks):
            target, predicted = sample["targets"][task], sample["predicted"][task]
            for place, drawn in zip(
                axes[1 + 2 * index : 3 + 2 * index], _drawn(kinds[task], target, predicted), strict=True
            ):
                place.imshow(drawn, interpolation="nearest")
    titles = ["image"] + [f"{task}, {what}" for task in tasks for what in ("labelled", "predicted")]
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

    white = torch.ones(3)
    if kind in ("classes", "saliency"):
        palette = [color[:3] for name in ("tab20", "tab20b", "tab20c") for color in colormaps[name].colors]
        colors = torch.tensor([palette[index % len(palette)] for index in range(256)])
        labelled = torch.where((target == 255)[..., None], white, colors[target])
        return labelled.numpy(), colors[predicted.argmax(0)].numpy()
    if kind == "normals":
        shown = [
            torch.nn.functional.normalize(vectors.nan_to_num(), dim=0).movedim(0, -1) / 2 + 0.5
            for vectors in (target, predicted)
        ]
        return torch.where(target.isfinite().all(0)[..., None], shown[0], white).numpy(), shown[1].clamp(0, 1).numpy()
    valid = target[0].isfinite()
    low, high = 0.0, 1.0
    if kind == "edges":
        predicted = predicted.sigmoid()
    elif valid.any():
        low, high = float(target[0][valid].min()), float(target[0][valid].max())
    scaled = [((values[0].nan_to_num() - low) / max(high - low, 1e-6)).clamp(0, 1) for values in (target, predicted)]
    labelled, guess = (torch.from_numpy(colormaps["viridis"](values.numpy())[..., :3]).float() for values in scaled)
    return torch.where(valid[..., None], labelled, white).numpy(), guess.numpy()


def run_pictures(
    descriptions: Mapping[str, Mapping], summary: Mapping, metrics: Iterable[Mapping]
) -> dict[str, Figure]:
    """The pictures of a run by name, from its tasks' descriptions, ``summary.json`` and ``metrics.jsonl``."""
    captions = {
        name: f"{row['accuracy']:.1f} %, {100 * row['tuned_layers']:.0f} % tuned"
        for name, row in summary["tasks"].items()
    }
    first = next(iter(descriptions.values()))
    units = {name: description["units"] for name, description in descriptions.items()}
    title = f"{first['base']['name']}: which layers each task tuned ({summary['parameters_x_base']:.2f} × base)"
    figures = {"layers": layers(units, title, captions), "sizes": sizes(summary)}
    over_time = scores(metrics, first["options"].get("threshold", 0.0))
    if over_time is not None:
        figures["scores"] = over_time
    if len(units) > 1:
        figures["overlap"] = overlap(units)
    return figures


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
