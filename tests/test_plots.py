"""Pictures show the hard decisions, at every size."""

import pytest

from taps import plots


def rows(units: int, every: int) -> list[dict]:
    return [
        {"name": f"layer{1 + i // 9}.{i % 9}.conv", "run": 1.0, "specific": float(i % every == 0)} for i in range(units)
    ]


@pytest.mark.parametrize("tasks", [1, 6, 40])
@pytest.mark.parametrize("units", [2, 53, 161])
def test_layers(tmp_path, tasks, units):
    figure = plots.layers({f"task {i}": rows(units, i + 2) for i in range(tasks)}, "title", {"task 0": "91 %"})
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (tasks, units)
    assert image[0].sum() == (units + 1) // 2
    plots.save(figure, tmp_path / "layers.png")
    from PIL import Image

    with Image.open(tmp_path / "layers.png") as picture:
        assert picture.width <= 26 * 150
        assert picture.getextrema()[0] != (255, 255)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("layer3.0.conv1", "layer3"), ("conv1", "conv1"), ("blocks.4.1.conv_pw", "blocks.4"), ("blocks.11.attn.qkv", "blocks.11"),
        ("patch_embed.proj", "patch_embed"),
        ("stages.2.blocks.0.mlp.fc1", "stages.2"), ("features.denseblock1.denselayer2.conv1", "features.denseblock1"),
    ],
)  # fmt: skip
def test_stage_of(name, stage):
    assert plots.stage_of(name) == stage
