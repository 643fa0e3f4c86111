"""Figures for all numbers of tasks and layers."""

import pytest

from taps.methods.policy import Policy
from taps.plots import layers as layer_plots
from taps.plots import policies, style
from taps.plots import predictions as prediction_plots
from taps.plots.style import BORDER


def rows(units: int, every: int) -> list[dict]:
    return [
        {"name": f"layer{1 + i // 9}.{i % 9}.conv", "run": 1.0, "specific": float(i % every == 0)} for i in range(units)
    ]


@pytest.mark.parametrize(("tasks", "units"), [(1, 2), (40, 2), (6, 53), (1, 161), (40, 161)])
def test_layers(tmp_path, tasks, units):
    figure = layer_plots.layers({f"task {i}": rows(units, i + 2) for i in range(tasks)}, "title", {"task 0": "91 %"})
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (tasks, units)
    assert image[0].sum() == (units + 1) // 2
    style.save(figure, tmp_path / "layers.png")
    from PIL import Image

    with Image.open(tmp_path / "layers.png") as picture:
        assert picture.width <= 26 * 150
        assert picture.getextrema()[0] != (255, 255)


def test_layers_names_shortcuts_and_borders():
    names = ["conv1", "layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "layer2.1.conv1"]
    figure = layer_plots.layers({"a": [{"name": name, "run": 1.0, "specific": 1.0} for name in names]})
    axes = figure.axes[0]
    above = axes.child_axes[0]
    assert [(tick.get_position()[0], tick.get_text()) for tick in above.get_xticklabels()] == [(3, "downsample")]
    assert sorted(line.get_xdata()[0] for line in axes.lines if line.get_color() == BORDER) == [0.5, 1.5]


def summary(tasks: int) -> dict:
    rows = {f"task {i}": {"accuracy": 90.0 - i, "parameters": 1000 * i, "tuned_layers": 0.5} for i in range(tasks)}
    return {"mean_accuracy": 88.0, "parameters_x_base": 2.5, "tasks": rows}


def drawn(figure, path) -> tuple[int, int]:
    from PIL import Image

    style.save(figure, path)
    with Image.open(path) as picture:
        assert picture.getextrema()[0] != (255, 255)
        return picture.size


def test_a_map_of_many_pairs_stays_small():
    figure = layer_plots.overlap({f"a task with a long name {i}": rows(12, i % 5 + 2) for i in range(300)})
    assert max(figure.get_size_inches()) < 21
    assert not figure.axes[0].texts
    assert len(figure.axes[0].get_xticks()) <= 160
    pair = layer_plots.overlap({name: rows(12, 2) for name in ("one", "two")})
    assert pair.get_size_inches()[0] > 4, "the title has room"


@pytest.mark.parametrize("tasks", [1, 14])
def test_every_picture_at_every_number_of_tasks(tmp_path, tasks):
    units = {f"task {i}": rows(53, i + 2) for i in range(tasks)}
    figure = layer_plots.sizes(summary(tasks))
    assert [bar.get_width() for bar in figure.axes[0].patches] == [90.0 - i for i in range(tasks)]
    assert [bar.get_width() for bar in figure.axes[1].patches] == pytest.approx([i / 1000 for i in range(tasks)])
    drawn(figure, tmp_path / "sizes.png")

    figure = layer_plots.overlap(units)
    shared = figure.axes[0].images[0].get_array()
    assert shared.shape == (tasks, tasks)
    assert all(shared[i][i] == 100 for i in range(tasks)), "every task tunes something"
    drawn(figure, tmp_path / "overlap.png")

    metrics = [
        {"task": task, "epoch": epoch, "scores": [0.15 - 0.01 * epoch] * 53} for epoch in range(1, 4) for task in units
    ]
    figure = layer_plots.scores(metrics, threshold=0.1)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == list(units)
    lines = panels[0].lines
    assert len(lines) == 53 + 1
    assert list(lines[0].get_ydata()) == pytest.approx([0.14, 0.13, 0.12])
    assert set(lines[-1].get_ydata()) == {0.1}, "the threshold"
    drawn(figure, tmp_path / "scores.png")

    from PIL import Image

    outputs = {task: [("a class with a long name", 0.75), ("b", 0.25)] for task in units}
    figure = prediction_plots.predictions(Image.new("RGB", (8, 8)), outputs)
    assert [axes.get_title(loc="left") for axes in figure.axes[1:]] == list(units)
    assert [bar.get_width() for bar in figure.axes[1].patches] == [75.0, 25.0]
    width, height = drawn(figure, tmp_path / "predictions.png")
    assert max(width, height) < 4000


def test_probabilities_of_layers_include_those_of_the_blocks_around_them():
    run, specific = {"a": (1.0, 1.0)}, {"a": (0.0, 1.0)}
    learned = Policy("net", ("b", "b.conv"), {"a": (0.5, 0.8)}, run, {"a": (0.0, 0.4)}, specific, (None, 0))
    figure = policies.policy(learned, {"run": learned.run}, {"run": learned.specific})
    shown = [axes.images[0].get_array().tolist() for axes in figure.axes]
    assert shown == [[[0.5, 0.4]], [[0.0, 0.2]], [[0.5, 1.0]]]
    assert len({axes.images[0].cmap.name for axes in figure.axes}) == 2, "decisions have colours of their own"


def test_pictures_of_many_tasks_are_not_too_large():
    from PIL import Image

    names = [f"task {i}" for i in range(40)]
    outputs = {name: [("a class with a long name", 0.75)] for name in names}
    figures = (
        prediction_plots.predictions(Image.new("RGB", (8, 8)), outputs),
        layer_plots.overlap({name: rows(53, i + 2) for i, name in enumerate(names)}),
        layer_plots.sizes(summary(40)),
    )
    assert max(150 * side for figure in figures for side in figure.get_size_inches()) < 4000


def test_overlap_is_tuned_by_both_among_tuned_by_either():
    def task(*tuned: int) -> list[dict]:
        return [{"name": str(i), "run": 1.0, "specific": float(i in tuned)} for i in range(5)]

    figure = layer_plots.overlap({"a": task(0, 1, 2), "b": task(1, 2, 3), "c": task()})
    assert figure.axes[0].images[0].get_array().tolist() == [[100, 50, 0], [50, 100, 0], [0, 0, 0]]
    assert [text.get_text() for text in figure.axes[0].texts][::4] == ["3", "3", "0"]


def test_trade_off_is_a_point_a_run(tmp_path):
    runs = {f"run {i}": {"parameters_x_base": 4.0 - i, "mean_accuracy": 90.0 - i} for i in range(3)}
    figure = layer_plots.trade_off(runs, {"run 0": "λ = 0"}, {"run 1": "joint"})
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert [[2, 88], [4, 90]] in lines.values(), "runs of one kind are connected"
    assert lines["joint"] == [[3, 89]]
    assert {text.get_text() for text in figure.axes[0].texts} == {"λ = 0", "run 1", "run 2"}
    drawn(figure, tmp_path / "trade_off.png")


def test_methods_without_scores_have_no_picture_of_them():
    assert layer_plots.scores([{"task": "a", "epoch": 1, "scores": [None, None]}], 0.1) is None


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("layer3.0.conv1", "layer3"), ("conv1", "conv1"), ("blocks.4.1.conv_pw", "blocks.4"), ("blocks.11.attn.qkv", "blocks.11"),
        ("patch_embed.proj", "patch_embed"),
        ("stages.2.blocks.0.mlp.fc1", "stages.2"), ("features.denseblock1.denselayer2.conv1", "features.denseblock1"),
    ],
)  # fmt: skip
def test_stage_of(name, stage):
    assert style.stage_of(name) == stage


def test_names_are_no_formulas(tmp_path):
    from taps.plots.confusion import confusion
    from taps.plots.style import save

    save(confusion([[3, 1], [0, 2]], ["$10_$20", "水果"], "price $"), tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000
