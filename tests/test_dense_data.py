"""Dense benchmarks: file formats, error messages, transforms and the order of samples."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from taps.data.dense import adashare_layout
from taps.data.dense.adashare_layout import layout_of, open_formatted
from taps.data.dense.dataset import LOG_RANGE, DenseSet
from taps.data.generated.scenes import SceneRecipe, make_scenes, render
from taps.data.multi_label import IGNORE_INDEX, StreamSampler, make_evaluation, make_stream, split_train

SAMPLES = ROOT.parent / "shared/data/nyu_v2_samples"
TINY = SceneRecipe(size=(32, 40), train=10, val=3, test=4)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dense") / "scenes"
    make_scenes(root, TINY)
    return root


def write_lists(root: Path, file: str, train: list, test: list, **more: list) -> None:
    (root / file).write_text(json.dumps({"train": train, "test": test, **more}))


@pytest.fixture
def nyuv2(tmp_path) -> Path:
    """Three samples in the published layout."""
    root = tmp_path / "nyu"
    random = np.random.default_rng(0)
    items = []
    for name in ("0001", "0002", "0003"):
        for folder in ("img", "seg", "normal_mask", "depth"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (24, 32, 3), np.uint8)).save(root / f"img/{name}.png")
        seg = random.integers(0, 40, (24, 32)).astype(np.uint8)
        seg[:5] = 255
        Image.fromarray(seg).save(root / f"seg/{name}.png")
        normals = random.normal(size=(24, 32, 3))
        normals /= np.linalg.norm(normals, axis=2, keepdims=True)
        stored = ((normals + 1) * 127.5).round().astype(np.uint8)
        stored[:, :4] = 255
        Image.fromarray(stored).save(root / f"normal_mask/{name}.png")
        depth = random.uniform(1, 5, (24, 32)).astype(np.float32)
        depth[-2:] = 0
        np.save(root / f"depth/{name}.npy", depth)
        items.append([f"img/{name}.png", f"seg/{name}.png", f"normal_mask/{name}.png", f"depth/{name}.npy"])
    write_lists(root, "nyu_v2_3task.json", items[:2], items[2:])
    return root


def test_scenes_are_exact_and_of_one_seed(scenes, tmp_path):
    first, second = (render(np.random.default_rng(3), (32, 40), 0.5) for _ in range(2))
    assert all(np.array_equal(first[name], second[name], equal_nan=name == "normals") for name in first)
    make_scenes(tmp_path / "again", TINY)
    files = sorted(path.relative_to(scenes) for path in scenes.rglob("*.*"))
    assert all((scenes / path).read_bytes() == (tmp_path / "again" / path).read_bytes() for path in files)
    seen = first["depth"] > 0
    assert np.array_equal(seen, first["semseg"] != IGNORE_INDEX)
    assert np.allclose(np.linalg.norm(first["normals"][seen], axis=-1), 1, atol=1e-5)
    assert set(np.unique(first["semseg"])) <= {*range(len(adashare_layout.SCENE_CLASSES)), IGNORE_INDEX}
    for name in ("edges", "keypoints"):
        assert 0 <= first[name].min() < first[name].max() <= 1


def test_normals_are_the_slope_of_depth():
    """On smooth surfaces the depth map's own gradient gives the normal."""
    scene = render(np.random.default_rng(5), (96, 96), 0.0)
    depth, normals = scene["depth"], scene["normals"]
    places = (np.arange(96) + 0.5) / 96 * 2 - 1
    points = np.stack(
        [
            np.broadcast_to(places * 0.75, (96, 96)) * depth,
            -np.broadcast_to(places[:, None] * 0.75, (96, 96)) * depth,
            depth,
        ],
        -1,
    )
    across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    slope = np.cross(across, down)
    slope /= np.maximum(np.linalg.norm(slope, axis=-1, keepdims=True), 1e-9)
    inner = scene["edges"][1:-1, 1:-1] < 0.01
    inner &= depth[1:-1, 1:-1] > 0
    agreement = np.abs((slope * normals[1:-1, 1:-1]).sum(-1))[inner]
    assert inner.mean() > 0.5
    assert np.mean(agreement > 0.98) > 0.97


def test_scenes_folder_is_whole_or_not_there(scenes, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in scenes.rglob("*")}
    make_scenes(scenes, TINY)
    assert before == {path: path.stat().st_mtime_ns for path in scenes.rglob("*")}, "the same is kept"
    with pytest.raises(ValueError, match="holds other data"):
        make_scenes(scenes, SceneRecipe(size=(32, 40), train=11, val=3, test=4))
    with pytest.raises(ValueError, match="size: 8 is not a whole number of at least 16"):
        make_scenes(tmp_path / "x", SceneRecipe(size=(8, 8)))
    assert not (tmp_path / "x").exists()


def test_scenes_read_back_what_was_rendered(scenes):
    data = open_formatted("scenes", scenes, layout_of("scenes"))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 10, "val": 3, "test": 4, "weights": 7, "policy": 3,
    }  # fmt: skip
    random = np.random.default_rng(TINY.seed)
    scene = render(random, TINY.size, TINY.difficulty)
    arrays = DenseSet(data, "train", False).read(0)
    assert np.array_equal(arrays["semseg"], scene["semseg"])
    assert np.allclose(arrays["depth"][0], np.where(scene["depth"] > 0, scene["depth"], np.nan), equal_nan=True)
    assert np.allclose(arrays["normals"].transpose(1, 2, 0), scene["normals"], atol=0.02, equal_nan=True)
    assert np.allclose((arrays["edges"][0] + 1) / 2, scene["edges"], atol=1e-3)


def test_nyuv2_layout(nyuv2):
    data = split_train(open_formatted("nyuv2", nyuv2, layout_of("nyuv2")), 0.0, 0.5, seed=0)
    assert len(data.splits["weights"]) == len(data.splits["policy"]) == 1
    assert data.splits["val"] == data.splits["test"]
    image, targets = DenseSet(data, "test", False)[0]
    assert image.shape == (3, 24, 32)
    assert image.dtype == torch.float32
    assert targets["semseg"].dtype == torch.int64
    assert bool((targets["semseg"][:5] == IGNORE_INDEX).all())
    assert targets["normals"][:, :, :4].isnan().all()
    torch.testing.assert_close(targets["normals"][:, :, 4:].norm(dim=0), torch.ones(24, 28), atol=1e-5, rtol=0)
    assert targets["depth"][:, -2:].isnan().all()
    assert float(targets["depth"][:, :-2].min()) >= 1


@pytest.mark.parametrize("classes", [2, 7, 19])
def test_cityscapes_layout(tmp_path, classes):
    random = np.random.default_rng(0)
    for folder in ("image", "depth", "label2", "label7", "label19"):
        (tmp_path / folder).mkdir()
    items = []
    for index in range(3):
        np.save(tmp_path / f"image/{index}.npy", random.random((16, 32, 3)))
        np.save(tmp_path / f"depth/{index}.npy", random.uniform(0, 0.4, (16, 32, 1)).clip(0.01))
        for count in (2, 7, 19):
            np.save(tmp_path / f"label{count}/{index}.npy", random.integers(-1, count, (16, 32)).astype(np.float32))
        items.append([f"{column}/{index}.npy" for column in ("image", "depth", "label2", "label7", "label19")])
    write_lists(tmp_path, "cityscape.json", items[:2], items[2:], train1=items[:1], train2=items[1:2])
    data = open_formatted("cityscapes", tmp_path, layout_of("cityscapes", classes))
    image, targets = DenseSet(data, "test", False)[0]
    stored = np.load(tmp_path / f"label{classes}/2.npy")
    assert data.tasks["semseg"].channels == classes
    assert np.array_equal(targets["semseg"].numpy(), np.where(stored < 0, IGNORE_INDEX, stored))
    assert data.tasks["depth"].kind == "disparity"
    assert targets["depth"].shape == (1, 16, 32)
    assert -3 < float(image.mean()) < 3
    with pytest.raises(ValueError, match="labels of 2, 7 or 19 classes, not 5"):
        layout_of("cityscapes", 5)


def test_taskonomy_layout(tmp_path):
    random = np.random.default_rng(0)
    columns = ("rgb", "seg", "normal", "depth_zbuffer", "keypoints2d", "edge_texture")
    for column in columns:
        (tmp_path / column).mkdir()
    values = {
        "rgb": random.integers(0, 255, (16, 16, 3), np.uint8),
        "seg": random.integers(0, 18, (16, 16)).astype(np.uint8),
        "normal": random.integers(0, 250, (16, 16, 3), np.uint8),
        "depth_zbuffer": random.integers(300, 65535, (16, 16)).astype(np.uint16),
        "keypoints2d": random.integers(0, 65535, (16, 16)).astype(np.uint16),
        "edge_texture": random.integers(0, 65535, (16, 16)).astype(np.uint16),
    }
    item = []
    for column, array in values.items():
        Image.fromarray(array).save(tmp_path / f"{column}/0.png")
        item.append(f"{column}/0.png")
    np.save(tmp_path / "semseg_prior_factor.npy", np.linspace(0.5, 2, 17))
    write_lists(tmp_path, "taskonomy.json", [item], [item])
    data = open_formatted("taskonomy", tmp_path, layout_of("taskonomy"))
    _, targets = DenseSet(data, "test", False)[0]
    values = {name: array.repeat(16, 0).repeat(16, 1) for name, array in values.items()}  # brought to 256 × 256
    seg = values["seg"].astype(np.int64)
    assert np.array_equal(targets["semseg"].numpy(), np.where(seg == 0, IGNORE_INDEX, seg - 1)), (
        "0 is unlabelled, not class 0"
    )
    assert data.tasks["semseg"].class_weights == pytest.approx(np.linspace(0.5, 2, 17))
    far = values["depth_zbuffer"] >= 64500
    expected = np.log1p(values["depth_zbuffer"].astype(float)) / np.log(2**16)
    assert np.allclose(targets["depth"][0], np.where(far, np.nan, expected), equal_nan=True)
    assert np.array_equal(targets["normals"].isnan().all(0).numpy(), far), "normals are masked as depth is"
    for task, column, top in (("keypoints", "keypoints2d", 0.005), ("edges", "edge_texture", 0.08)):
        expected = (values[column] / 2**16).clip(0, top) / top * 2 - 1
        assert np.allclose(targets[task][0], expected, atol=1e-5)


def replace_array(path: Path, change) -> None:
    array = np.load(path) if path.suffix == ".npy" else np.array(Image.open(path))
    array = change(array)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("seg/0003.png", lambda a: np.full_like(a, 77), r"seg/0003.png holds class 77; there are 40 classes \(0–39\)"),
        ("seg/0003.png", lambda a: np.full_like(a, 255), "seg/0003.png has no labelled pixel"),
        ("seg/0003.png", lambda a: a[:10], "seg/0003.png has 10 × 32 pixels, its image has 24 × 32"),
        ("seg/0003.png", lambda a: np.stack([a] * 3, 2), "has 3 dimensions; a label map has two"),
        ("normal_mask/0003.png", lambda a: np.full_like(a, 255), "has no valid pixel"),
        ("normal_mask/0003.png", lambda a: a[..., 0], "normals are uint8 with three channels"),
        ("depth/0003.npy", lambda a: a - 4, "holds a negative depth"),
        ("depth/0003.npy", lambda a: a / a.min(), "holds values that are not finite"),
        ("depth/0003.npy", lambda a: a * 0, "has no valid pixel"),
        ("depth/0003.npy", lambda a: a.astype(str), "which this label is not stored as"),
        ("img/0003.png", lambda a: a[..., 0], "an image has three channels"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_wrong_labels_are_named(nyuv2, file, change, message):
    replace_array(nyuv2 / file, change)
    data = open_formatted("nyuv2", nyuv2, layout_of("nyuv2"))
    with pytest.raises(ValueError, match=message):
        DenseSet(data, "test", False)[0]


def test_damaged_and_pickled_files_are_refused(nyuv2):
    data = open_formatted("nyuv2", nyuv2, layout_of("nyuv2"))
    np.save(nyuv2 / "depth/0003.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"depth/0003.npy cannot be read"):
        DenseSet(data, "test", False)[0]
    (nyuv2 / "img/0003.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"img/0003.png cannot be read"):
        DenseSet(data, "test", False)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lists: lists["train"][0].pop(),
            r"entry 0 of 'train' has 3 paths instead of 4 \(image, semseg, normals",
        ),
        (lambda lists: lists["test"].append("img"), "entry 1 of 'test' is not a list of paths"),
        (lambda lists: lists.pop("test"), "has no list 'test'"),
        (lambda lists: lists["train"][1].__setitem__(0, "img/9.png"), r"img/9.png is listed in .* and does not exist"),
        (lambda lists: lists.update(train1=lists["train"], train2=lists["train"]), "have to be disjoint"),
    ],
)
def test_wrong_lists_are_named(nyuv2, change, message):
    path = nyuv2 / "nyu_v2_3task.json"
    lists = json.loads(path.read_text())
    change(lists)
    path.write_text(json.dumps(lists))
    with pytest.raises(ValueError, match=message):
        open_formatted("nyuv2", nyuv2, layout_of("nyuv2"))


def test_a_tree_is_checked_file_by_file(nyuv2, scenes):
    from taps.data.checks import check

    lines, wrong = check(scenes)
    assert (len(lines), wrong) == (1, 0)
    assert "scenes, 10 train, 3 val, 4 test, 7 weights, 3 policy" in lines[0]
    replace_array(nyuv2 / "seg/0002.png", lambda a: np.full_like(a, 50))
    (nyuv2 / "depth/0003.npy").unlink()
    lines, wrong = check(nyuv2)
    text = "\n".join(lines)
    assert wrong == 4
    assert "train: 793 missing (2 of 795)" in text
    assert "seg/0002.png holds class 50" in text
    assert "depth/0003.npy is listed and does not exist" in text


def test_missing_benchmarks_and_tasks(nyuv2, tmp_path):
    with pytest.raises(ValueError, match=r"nyu_v2_3task.json does not exist; datasets/README.md says where"):
        open_formatted("nyuv2", tmp_path / "nowhere", layout_of("nyuv2"))
    with pytest.raises(ValueError, match=r"unknown task of benchmark nyuv2 'edgs'"):
        open_formatted("nyuv2", nyuv2, layout_of("nyuv2")).choose(["semseg", "edgs"])
    with pytest.raises(ValueError, match="leaves a part empty"):
        split_train(open_formatted("nyuv2", nyuv2, layout_of("nyuv2")), 0.1, 0.5, 0)


def test_splits_are_disjoint_and_seeded(scenes):
    data = open_formatted("scenes", scenes, layout_of("scenes"))
    lists = {name: split for name, split in data.splits.items() if name in ("train", "test")}
    parts = [split_train(type(data)(**{**vars(data), "splits": lists}), 0.3, 0.4, seed).splits for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    names = {split: {sample["image"] for sample in parts[0][split]} for split in parts[0]}
    assert not names["val"] & names["train"]
    assert not names["weights"] & names["policy"]
    assert names["weights"] | names["policy"] == names["train"]
    assert (len(names["val"]), len(names["policy"])) == (3, 3)


def test_transforms_keep_image_and_labels_in_step(scenes):
    """A map that depends only on the position follows the image through zoom, mirror and crop."""
    data = open_formatted("scenes", scenes, layout_of("scenes")).choose(["semseg", "normals", "depth", "edges"])
    data = replace(data, tasks={**data.tasks, "edges": replace(data.tasks["edges"], kind="log_depth")})

    def read(sample, tasks):
        rows, columns = np.mgrid[:40, :48].astype(np.float32)
        image = np.stack([rows * 5, columns * 5, rows * 0], 2)
        normal = np.stack([np.full_like(rows, 0.6), np.full_like(rows, 0.8), rows * 0])
        return {
            "image": image,
            "semseg": (rows // 10).astype(np.int64),
            "normals": normal,
            "depth": 1 + columns[None] / 10,
            "edges": np.log1p(100 + 10 * columns[None]) / LOG_RANGE,
        }

    fields = {**vars(data), "read": read, "crop": 24}
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    signs = set()
    for zoom in ((1.0, 1.0), (0.5, 0.5), (1.5, 1.5)):
        samples = DenseSet(type(data)(**{**fields, "zoom": zoom}), "train", True, seed=0)
        for number in range(6):
            image, targets = samples[0, number]
            assert image.shape[1:] == targets["semseg"].shape == (24, 24)
            assert targets["depth"].shape == (1, 24, 24)
            rows, columns = ((image * std + mean) * 255 / 5)[:2]
            valid = targets["depth"][0].isfinite() & (targets["semseg"] != IGNORE_INDEX)
            inner = valid & (rows % 10 > 2) & (rows % 10 < 8)
            assert torch.equal(targets["semseg"][inner], (rows[inner] / 10).long())
            expected = (1 + columns / 10) / zoom[0]
            torch.testing.assert_close(targets["depth"][0][valid], expected[valid], atol=0.12, rtol=0)
            depth = (targets["edges"][0] * LOG_RANGE).expm1()  # as Taskonomy's files hold it
            torch.testing.assert_close(depth[valid], 100 * expected[valid], atol=12, rtol=0)
            sideways = targets["normals"][0][valid]
            falls = bool((columns[:, 1:] < columns[:, :-1])[valid[:, 1:] & valid[:, :-1]].float().mean() > 0.5)
            assert torch.allclose(sideways, torch.full_like(sideways, -0.6 if falls else 0.6))
            signs.add(falls)
    assert signs == {True, False}
    assert not torch.equal(samples[0, 0][0], samples[0, 1][0])
    assert torch.equal(samples[0, 1][0], samples[0, 1][0])


def test_a_stream_goes_on_from_epoch_to_epoch():
    sampler = StreamSampler(7, 3, 2, seed=1)
    seen = []
    for epoch in range(7):
        sampler.epoch = epoch
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [3, 3]
        seen += [key for batch in batches for key in batch]
    for start in range(0, 42, 7):
        assert sorted(index for index, _ in seen[start : start + 7]) == list(range(7))
        assert {number for _, number in seen[start : start + 7]} == {start // 7}
    assert [index for index, _ in seen[:7]] != [index for index, _ in seen[7:14]]


def test_loaders_give_the_same_for_any_number_of_workers(scenes):
    data = open_formatted("scenes", scenes, layout_of("scenes")).choose(["semseg", "edges"])
    data = type(data)(**{**vars(data), "crop": (24, 32), "zoom": (0.8, 1.2)})
    batches = []
    for workers in (0, 1):
        loader, sampler = make_stream(data, "train", 4, 3, seed=0, workers=workers)
        sampler.epoch = 1
        batches.append(list(loader))
    for (x, targets), (other, others) in zip(*batches, strict=True):
        assert x.shape == (4, 3, 24, 32)
        assert torch.equal(x, other)
        assert all(torch.equal(targets[name], others[name]) for name in targets)
    with pytest.raises(ValueError, match="--batch_size 20 is larger than the 10 samples of train"):
        make_stream(data, "train", 20, 1)
    assert sum(len(x) for x, _ in make_evaluation(data, "test", 3)) == 4


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the real samples are not here")
def test_real_nyuv2_samples_go_all_the_way(tmp_path):
    """Loader, losses, metrics and pictures work on four real images."""
    from taps.metrics.dense import make_metric
    from taps.metrics.losses import make_loss
    from taps.plots import predictions as prediction_plots
    from taps.plots import style

    shutil.copytree(SAMPLES, tmp_path / "nyu")
    names = sorted(path.stem for path in SAMPLES.glob("img/*.png"))
    items = [[f"img/{n}.png", f"seg/{n}.png", f"normal_mask/{n}.png", f"depth/{n}.npy"] for n in names]
    write_lists(tmp_path / "nyu", "nyu_v2_3task.json", items, items)
    data = open_formatted("nyuv2", tmp_path / "nyu", layout_of("nyuv2"))
    samples = [DenseSet(data, "test", False)[index] for index in range(4)]
    targets = {task: torch.stack([own[task] for _, own in samples]) for task in data.tasks}
    length = targets["normals"].norm(dim=1)
    torch.testing.assert_close(length[length.isfinite()], torch.ones(int(length.isfinite().sum())), atol=1e-4, rtol=0)
    assert 0.2 < float(length.isnan().float().mean()) < 0.4
    assert 0.7 < float(targets["depth"][targets["depth"].isfinite()].min()) < 1
    perfect = {
        "semseg": torch.nn.functional.one_hot(targets["semseg"].clamp(max=39), 40).movedim(-1, 1).float() * 50,
        "normals": targets["normals"].nan_to_num(),
        "depth": targets["depth"].nan_to_num(1.0),
    }
    for name, task in data.tasks.items():
        assert float(make_loss(task)(perfect[name], targets[name])) < 1e-4
        meter = make_metric(task)
        meter.update(perfect[name], targets[name])
        numbers = meter.compute()
        best = {"semseg": ("miou", 100), "normals": ("mean_angle", 0), "depth": ("abs_error", 0)}[name]
        assert numbers[best[0]] == pytest.approx(best[1], abs=0.02)
    constant = targets["normals"].nan_to_num().sum((0, 2, 3)).view(1, 3, 1, 1).expand(4, 3, 480, 640)
    found = {}
    for published in (False, True):
        meter = make_metric(data.tasks["normals"], published)
        meter.update(constant, targets["normals"])
        found[published] = meter.compute()["mean_angle"]
    assert 40 < found[False] < 55, "decoded"
    assert 15 < found[True] < 25, "the published scale"
    reader = DenseSet(data, "test", False)
    rows = [
        {
            "image": reader.read(index)["image"],
            "targets": samples[index][1],
            "predicted": {task: perfect[task][index] for task in perfect},
        }
        for index in range(2)
    ]
    figure = prediction_plots.maps(rows, {name: task.kind for name, task in data.tasks.items()})
    style.save(figure, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    loader, _ = make_stream(data, "train", 2, 2)
    for x, own in loader:
        assert x.shape == (2, 3, 321, 321)
        assert own["normals"].shape == (2, 3, 321, 321)
