"""PASCAL-Context and NYUDv2: file formats, error messages, transforms, losses and metrics."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from look_alikes import CONTEXT, SIZE, TRAIN, VAL, VOC, anno, make_look_alike, rendered
from PIL import Image
from scipy.io import loadmat, savemat
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from skimage.morphology import thin

from options import parse_mtl
from taps.data.checks import check
from taps.data.dense.astmt_labels import PARTS
from taps.data.dense.astmt_layout import PROTOCOLS, covered_classes, open_protocol
from taps.data.dense.dataset import DenseSet, distort
from taps.data.multi_label import IGNORE_INDEX, Task, split_train
from taps.methods.registry import catalog
from taps.metrics import edges
from taps.metrics.dense import make_metric
from taps.metrics.losses import make_loss
from taps.metrics.relative_gain import counted, delta_t, relative_gain, score
from taps.settings import presets


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("protocols")
    for name in PROTOCOLS:
        make_look_alike(folder / name, name)
    return {name: folder / name for name in PROTOCOLS}


@pytest.fixture
def copies(roots, tmp_path) -> dict[str, Path]:
    """Copies of the data that a test may damage."""
    return {name: Path(shutil.copytree(root, tmp_path / name)) for name, root in roots.items()}


def read(root: Path, name: str, split: str = "train", tasks=None) -> list[dict]:
    data = open_protocol(name, root, tasks)
    samples = DenseSet(data, split, False)
    return [samples.read(index) for index in range(len(samples))]


# -- files ---------------------------------------------------------------------------------------------------------


def test_the_part_names_are_those_of_six_parts():
    assert len(PARTS) == 24
    assert set(PARTS.values()) == set(range(1, 7))
    left = {name for name in PARTS if f"r{name[1:]}" in PARTS and name[0] == "l"}
    assert len(left) == 9
    assert all(PARTS[name] == PARTS[f"r{name[1:]}"] for name in left)


def test_every_label_of_pascal_context_comes_back(roots):
    made = rendered()
    arrays = read(roots["pascal_context"], "pascal_context") + read(roots["pascal_context"], "pascal_context", "test")
    assert len(arrays) == len(made) == TRAIN + VAL
    seen = set()
    for own, scene in zip(arrays, made, strict=True):
        classes = scene["semseg"]
        known = classes != IGNORE_INDEX
        assert np.array_equal(own["semseg"], np.where(known, np.array((*VOC, *[0] * 249))[classes], IGNORE_INDEX))
        assert np.array_equal(own["saliency"], (known & (classes > 2)).astype(int))
        assert own["saliency"].dtype == np.int64
        assert np.abs(own["image"].astype(int) - scene["image"]).mean() < 25, "JPEG"
        covered = known & np.isin(classes, (0, 1, 2, 3, 4))  # floor, ceiling, wall, tvmonitor, chair
        assert np.array_equal(np.isfinite(own["normals"]).all(0), covered)
        assert np.allclose(own["normals"][:, covered].T, scene["normals"][covered], atol=0.02)
        assert np.allclose(np.linalg.norm(own["normals"][:, covered], axis=0), 1, atol=1e-5)
        people = classes == 5
        seen.add(bool(people.any()))
        if people.any():
            assert np.array_equal(own["parts"] > 0, people)
            rows = np.argwhere(people)[:, 0]
            assert own["parts"][rows.min()].max() == PARTS["head"]
            assert set(own["parts"][rows.max()]) <= {0, PARTS["lfoot"]}
        else:
            assert (own["parts"] == IGNORE_INDEX).all(), "nobody: no label at all"
        differs = np.zeros(SIZE, bool)
        differs[1:] |= classes[1:] != classes[:-1]
        differs[:-1] |= classes[1:] != classes[:-1]
        differs[:, 1:] |= classes[:, 1:] != classes[:, :-1]
        differs[:, :-1] |= classes[:, 1:] != classes[:, :-1]
        edges = own["edges"][0] == 1
        assert set(np.unique(own["edges"])) == {0.0, 1.0}
        assert not (edges & ~differs).any()
        assert 0.3 < edges.sum() / differs.sum() < 0.7, "two rows of pixels lie along an outline, one is left"
    assert seen == {True, False}
    assert set(Path(roots["pascal_context"], "semseg/VOC12").iterdir())
    assert set(Path(roots["pascal_context"], "semseg/pascal-context").iterdir())


def test_every_label_of_nyud_comes_back(roots):
    made = rendered()
    for own, scene in zip(read(roots["nyud"], "nyud") + read(roots["nyud"], "nyud", "test"), made, strict=True):
        known = scene["semseg"] != IGNORE_INDEX
        assert np.array_equal(own["image"], scene["image"])
        assert np.array_equal(own["semseg"], np.where(known, 5 * scene["semseg"].astype(int), IGNORE_INDEX)), (
            "1 is class 0"
        )
        assert np.array_equal(own["depth"][0], np.where(known, scene["depth"], np.nan), equal_nan=True)
        assert np.array_equal(np.isfinite(own["normals"]).all(0), known)
        assert np.allclose(own["normals"][:, known].T, scene["normals"][known], atol=0.02)
        assert np.array_equal(own["edges"][0] == 1, thin(scene["edges"] == 1))


def test_other_forms_of_the_same_files(copies):
    """Normals and edges are arrays instead of images, images are JPEG instead of PNG."""
    before = read(copies["nyud"], "nyud")
    for path in (copies["nyud"] / "normals").iterdir():
        np.save(path.with_suffix(".npy"), np.array(Image.open(path)) / np.float32(127.5) - 1)
        path.unlink()
    for path in (copies["nyud"] / "edge").iterdir():
        np.save(path.with_suffix(".npy"), np.array(Image.open(path)) > 0)
        path.unlink()
    for path in (copies["nyud"] / "images").iterdir():
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    for own, other in zip(before, read(copies["nyud"], "nyud"), strict=True):
        assert np.allclose(own["normals"], other["normals"], atol=1e-5, equal_nan=True)
        assert np.array_equal(own["edges"], other["edges"])


def test_normals_are_limited_to_classes_that_nyuv2_has(copies):
    root = copies["pascal_context"]
    assert covered_classes(root) == {CONTEXT[index] for index in (0, 1, 2, 3, 4)}
    assert open_protocol("pascal_context", root).notes == ()
    (root / "data").mkdir()
    (root / "db_info").rename(root / "data/db_info")
    (root / "data/db_info/nyu_classes.json").write_text(json.dumps(["unknown", "wall"]))
    assert covered_classes(root) == {CONTEXT[2], CONTEXT[3]}, "tvmonitor is one of them"
    shutil.rmtree(root / "data")
    data = open_protocol("pascal_context", root)
    assert "normals of 11 images are used on every class" in data.notes[0]
    assert open_protocol("pascal_context", root, ["edges"]).notes == ()
    everywhere = DenseSet(data, "train", False).read(0)["normals"]
    assert np.array_equal(np.isfinite(everywhere).all(0), rendered()[0]["semseg"] != IGNORE_INDEX)


def test_structures_are_stored_as_in_the_data_set(roots):
    stored = loadmat(roots["pascal_context"] / "human_parts/000001.mat")["anno"]
    assert stored.dtype.names == ("imname", "objects")
    assert stored[0, 0]["objects"].dtype.names == ("class", "class_ind", "mask", "parts")
    assert stored[0, 0]["objects"].shape[0] == 1, "a row of structures, as in the data set"


def text(path: Path, change) -> None:
    path.write_text(change(path.read_text()))


def png(path: Path, change) -> None:
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def npy(path: Path, change) -> None:
    np.save(path, change(np.load(path)))


def mat(path: Path, change) -> None:
    savemat(path, change({key: value for key, value in loadmat(path).items() if not key.startswith("__")}))


def unknown_part(content: dict) -> dict:
    classes = np.full(SIZE, 5, np.uint8)
    own = anno("x", classes)
    own["objects"][0, 0]["parts"][0, 0]["part_name"] = "tail"
    return {"anno": own}


def small_part(content: dict) -> dict:
    return {"anno": anno("x", np.full((9, 9), 5, np.uint8))}


def low(content: dict) -> dict:
    return {"LabelMap": content["LabelMap"][:7]}


def remove(path: Path, change=None) -> None:
    path.unlink()


def overwrite(path: Path, change) -> None:
    path.write_bytes(change)


MISTAKES = [
    ("nyud", "gt_sets/val.txt", remove, None, "gt_sets/val.txt does not exist; datasets/README.md says where"),
    ("nyud", "gt_sets/train.txt", text, lambda old: "\n", "gt_sets/train.txt lists no image"),
    ("nyud", "gt_sets/train.txt", text, lambda old: old + "000009\n", r"000009 is in gt_sets/train.txt and in gt_sets/val.txt of"),
    ("nyud", "gt_sets/train.txt", overwrite, b"\xff\xfe\x00", "gt_sets/train.txt cannot be read"),
    ("nyud", "images/000001.png", remove, None, "images/000001.png belongs to an image of gt_sets/train.txt and does not exist"),
    ("nyud", "depth/000001.npy", remove, None, "depth/000001.npy belongs to an image of"),
    ("nyud", "depth/000001.npy", npy, lambda a: a[:9], "depth/000001.npy has 9 × 64 pixels, its image has 48 × 64"),
    ("nyud", "depth/000001.npy", npy, lambda a: a - 9, "depth/000001.npy holds a negative depth"),
    ("nyud", "segmentation/000001.png", png, lambda a: a * 0 + 41, r"holds class 41; there are 40 classes \(1–40\) and 0 for none"),
    ("nyud", "segmentation/000001.png", png, lambda a: a * 0, "segmentation/000001.png has no labelled pixel"),
    ("nyud", "normals/000001.png", png, lambda a: a[..., 0], "normals are uint8 with three channels"),
    ("nyud", "images/000001.png", png, lambda a: a[..., 0], "an image has three channels"),
    ("nyud", "images/000001.png", overwrite, b"no image", "images/000001.png cannot be read"),
    ("nyud", "edge/000001.png", png, lambda a: a[:5], "edge/000001.png has 5 × 64 pixels"),
    ("pascal_context", "ImageSets/Context/train.txt", remove, None, "Context/train.txt does not exist"),
    ("pascal_context", "sal_distill/000001.png", remove, None, "sal_distill/000001.png belongs to an image of"),
    ("pascal_context", "semseg/VOC12/000001.png", remove, None, "semseg/VOC12/000001.png belongs to"),
    ("pascal_context", "semseg/VOC12/000001.png", png, lambda a: a * 0 + 21, r"class 21; there are 21 classes \(0–20\)"),
    ("pascal_context", "human_parts/000001.mat", overwrite, b"MATLAB 7.3", "human_parts/000001.mat cannot be read"),
    ("pascal_context", "human_parts/000001.mat", mat, unknown_part, "has a part 'tail', which persons do not have"),
    ("pascal_context", "human_parts/000001.mat", mat, lambda c: {"a": 1}, "does not hold anno.objects with class_ind"),
    ("pascal_context", "human_parts/000001.mat", mat, small_part, r"map of shape \(9, 9\)"),
    ("pascal_context", "pascal-context/trainval/000001.mat", mat, lambda c: {"x": 1}, "trainval/000001.mat has no LabelMap"),
    ("pascal_context", "pascal-context/trainval/000001.mat", mat, low, r"shape \(7, 64\), its image"),
    ("pascal_context", "db_info/context_classes.json", text, lambda old: '{"wall": "1"}', "hold an id for each class name"),
    ("pascal_context", "db_info/nyu_classes.json", text, lambda old: "5", "nyu_classes.json does not hold class names"),
    ("pascal_context", "db_info/context_classes.json", text, lambda old: "[", "context_classes.json cannot be read as JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "how", "change", "message"), MISTAKES)
def test_wrong_trees_are_named_in_one_line(copies, name, file, how, change, message):
    how(copies[name] / file, change)
    with pytest.raises(ValueError, match=message) as raised:
        read(copies[name], name)
    assert "\n" not in str(raised.value)


def test_only_the_files_of_the_chosen_tasks_have_to_be_there(copies):
    for folder in ("human_parts", "sal_distill", "normals_distill"):
        shutil.rmtree(copies["pascal_context"] / folder)
    assert read(copies["pascal_context"], "pascal_context", tasks=["semseg", "edges"])[0].keys() == {
        "image", "semseg", "edges",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"human_parts/000001.mat belongs to"):
        open_protocol("pascal_context", copies["pascal_context"])
    with pytest.raises(ValueError, match="unknown task of benchmark pascal_context 'part'; did you mean 'parts'"):
        open_protocol("pascal_context", copies["pascal_context"], ["part"])


def test_a_tree_is_checked_file_by_file(copies):
    lines, wrong = check(copies["nyud"])
    assert (lines[0], wrong) == (f"{copies['nyud']}: nyud, 8 train, 3 test", 2)
    assert lines[1:] == ["  train: 787 missing (8 of 795)", "  test: 651 missing (3 of 654)"]
    root = copies["pascal_context"]
    shutil.rmtree(root / "db_info")
    for number in (2, 3):
        (root / f"sal_distill/00000{number}.png").unlink()
    overwrite(root / "pascal-context/trainval/000004.mat", b"?")
    lines, wrong = check(root)
    assert wrong == 2 + 2 + 1, "one damaged file is one mistake, though two tasks read it"
    report = "\n".join(lines)
    assert "train: 4990 missing (8 of 4998)" in report
    assert "test: 5102 missing (3 of 5105)" in report
    assert "saliency: 2 of 11 files missing, the first is" in report
    assert "normals are used on every class" in report


# -- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_samples_are_padded_cut_and_depend_on_the_seed(roots, name):
    data = replace(open_protocol(name, roots[name]), crop=(56, 60))
    assert (data.crop_size, open_protocol(name, roots[name]).crop_size) == ((56, 60), PROTOCOLS[name].crop)
    image, targets = DenseSet(data, "test", False)[0]
    assert image.shape == (3, 56, 64), "never smaller than a crop, and whole"
    assert (image[:, :4] == 0).all()
    assert (image[:, -4:] == 0).all()
    arrays = DenseSet(data, "test", False).read(0)
    for task, target in targets.items():
        inner, border = target[..., 4:-4, :], torch.cat([target[..., :4, :], target[..., -4:, :]], -2)
        assert np.array_equal(inner, arrays[task], equal_nan=True)
        assert bool((border == IGNORE_INDEX).all() if target.dtype == torch.int64 else border.isnan().all())
    first, second, other = (DenseSet(data, "train", True, seed) for seed in (0, 0, 1))
    for index in range(4):
        (a, x), (b, y), (c, _) = (samples[index, 3] for samples in (first, second, other))
        assert a.shape == (3, 56, 60)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert all(torch.equal(x[task].nan_to_num(9.0), y[task].nan_to_num(9.0)) for task in x)
        assert all(own.shape[-2:] == (56, 60) for own in x.values())
        for task in x.keys() & {"semseg", "saliency", "parts"}:
            assert set(x[task].unique().tolist()) <= {*range(data.tasks[task].channels), IGNORE_INDEX}
        assert set(x["edges"][x["edges"].isfinite()].tolist()) <= {0.0, 1.0}
    parts = split_train(data, 0.25, 0.5, 0).splits
    assert (len(parts["val"]), len(parts["test"])) == (2, 3)


def flat_data(root: Path, **changes):
    """Return NYUDv2 data in which each image is a slope: the column gives the depth and the normals' first component."""

    def same(sample, tasks):
        rows, columns = np.mgrid[:40, :48].astype(np.float32)
        return {
            "image": np.stack([rows * 5, columns * 5, rows * 0], 2),
            "semseg": (rows // 30).astype(np.int64),
            "depth": 1 + columns[None] / 10,
            "normals": np.stack([np.full_like(rows, 0.6), np.full_like(rows, 0.8), rows * 0]),
            "edges": (columns[None] % 4 == 0).astype(np.float32),
        }

    return replace(open_protocol("nyud", root), **{"read": same, "crop": (24, 24), "distort": False, **changes})


@pytest.mark.parametrize("zoom", [0.5, 1.0, 2.0])
def test_zoom_divides_depth_and_a_mirror_turns_normals(roots, zoom):
    signs = set()
    for number in range(8):
        samples = DenseSet(flat_data(roots["nyud"], zoom=(zoom, zoom), crop=(80, 100)), "train", True)
        _, targets = samples[0, number]
        depth, normals = targets["depth"][0], targets["normals"][0]
        inside = depth.isfinite()
        assert int(inside.sum()) == round(40 * zoom) * round(48 * zoom), "the whole image, and nothing where it ends"
        assert float(depth[inside].mean()) == pytest.approx(3.35 / zoom, rel=0.02)
        row = depth[40][inside[40]]
        mirrored = bool(row[-1] < row[0])
        assert torch.allclose(normals[inside], torch.tensor(-0.6 if mirrored else 0.6))
        assert bool((targets["semseg"][~inside] == IGNORE_INDEX).all() and targets["edges"][0][~inside].isnan().all())
        signs.add(mirrored)
    assert signs == {True, False}


def test_zooms_are_spread_over_their_range(roots):
    samples = DenseSet(flat_data(roots["nyud"], crop=(80, 100)), "train", True)
    shares = [float(samples[0, number][1]["depth"].isfinite().float().mean()) for number in range(60)]
    zooms = np.sqrt(np.array(shares) * 80 * 100 / (40 * 48))
    assert 0.49 < zooms.min() < 0.6
    assert 1.9 < zooms.max() < 2.01
    assert 1.1 < zooms.mean() < 1.4


def test_a_crop_that_one_class_fills_is_drawn_again(roots):
    def shares(**changes) -> np.ndarray:
        samples = DenseSet(flat_data(roots["nyud"], zoom=(1.0, 1.0), **changes), "train", True)
        cuts = [samples[0, number][1]["semseg"] for number in range(60)]
        return np.array([float((cut == 0).float().mean()) for cut in cuts])

    strict, free = shares(varied=("semseg", 0.75)), shares(varied=None)
    assert (free >= 0.75).mean() > 0.6
    assert (strict >= 0.75).mean() < 0.2
    kept = free < 0.75
    assert np.array_equal(strict[kept], free[kept]), "the first draw is kept where it will do"
    samples = DenseSet(flat_data(roots["nyud"], zoom=(1.0, 1.0)).choose(["depth"]), "train", True)
    assert samples[0, 0][1].keys() == {"depth"}


def test_colours_change_within_bounds():
    image = torch.rand(3, 8, 8)
    seen = [distort(image, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert all(float(own.min()) >= 0 and float(own.max()) <= 1 for own in seen)
    assert sum(torch.equal(own, image) for own in seen) < 10
    assert torch.equal(distort(image, torch.Generator().manual_seed(3)), seen[3])


# -- losses --------------------------------------------------------------------------------------------------------


def test_losses_against_sums():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(2, 2, 5, 6)), rng.integers(0, 2, (2, 5, 6))
    target[0, :2] = IGNORE_INDEX
    known = target != IGNORE_INDEX
    share = (target[known] == 1).mean()
    p = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    each = np.where(target == 1, -(1 - share) * np.log(p), -share * np.log(1 - p))
    loss = make_loss(Task("a", "saliency", 2))
    assert float(loss(torch.tensor(logits), torch.tensor(target))) == pytest.approx(each[known].mean(), rel=1e-5)
    assert float(loss(torch.tensor(logits), torch.full((2, 5, 6), IGNORE_INDEX))) == 0
    x, edges = rng.normal(size=(2, 1, 5, 6)), rng.integers(0, 2, (2, 1, 5, 6)).astype(float)
    edges[1, 0, 0] = np.nan
    p = 1 / (1 + np.exp(-x))
    each = np.where(edges == 1, -0.95 * np.log(p), -0.05 * np.log(1 - p))[np.isfinite(edges)]
    loss = make_loss(PROTOCOLS["nyud"].tasks["edges"])
    assert float(loss(torch.tensor(x), torch.tensor(edges))) == pytest.approx(each.mean(), rel=1e-5)
    vectors, normals = rng.normal(size=(2, 2, 3, 5, 6))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    normals[:, :, 3] = np.nan
    each = np.abs(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) - normals).sum(1)
    loss = make_loss(PROTOCOLS["nyud"].tasks["normals"])
    assert float(loss(torch.tensor(vectors), torch.tensor(normals))) == pytest.approx(np.nanmean(each), rel=1e-5)
    assert float(loss(torch.tensor(vectors), torch.full((2, 3, 5, 6), math.nan))) == 0


# -- metrics -------------------------------------------------------------------------------------------------------


def max_f(probability: np.ndarray, target: np.ndarray, published: bool) -> float:
    known = target != IGNORE_INDEX
    compared, thresholds = probability.astype(np.float32), np.arange(256, dtype=np.float32) / np.float32(255)
    if published:
        compared = 1 / (1 + np.exp(-compared))
        thresholds = np.arange(1, 20).astype(np.float32) * np.float32(0.05)
    best = 0.0
    for threshold in thresholds:
        there = (compared >= threshold) & known
        right = (there & (target == 1)).sum()
        if right:
            precision, recall = right / there.sum(), right / (target == 1).sum()
            best = max(best, 1.3 * precision * recall / (0.3 * precision + recall))
    return 100 * best


@pytest.mark.parametrize("published", [False, True])
def test_max_f_against_brute_force(published):
    rng = np.random.default_rng(2)
    target = rng.integers(0, 2, (4, 9, 11))
    target[:, :2] = IGNORE_INDEX
    logit = rng.normal(size=target.shape) + 1.5 * (target == 1)
    prediction = torch.tensor(np.stack([np.zeros_like(logit), logit], 1))
    metric = make_metric(Task("a", "saliency", 2), published)
    for part in (slice(0, 1), slice(1, 4)):
        metric.update(prediction[part], torch.tensor(target[part]))
    probability = prediction.float().softmax(1)[:, 1].numpy()
    assert metric.compute()["max_f"] == pytest.approx(max_f(probability, target, published), abs=1e-4)
    other = make_metric(Task("a", "saliency", 2), not published)
    other.update(prediction, torch.tensor(target))
    assert other.compute() != metric.compute()
    metric.reset()
    metric.update(prediction[:, :, :2], torch.tensor(target[:, :2]))
    assert math.isnan(metric.compute()["max_f"]), "nothing is labelled"


def test_the_published_max_f_tells_few_probabilities_apart():
    """0.45 and 0.6 lie on the same side of all five thresholds."""
    target = torch.tensor([[[0, 1]]])
    logits = torch.logit(torch.tensor([[[0.45, 0.6]]]))
    prediction = torch.stack([torch.zeros(1, 1, 2), logits], 1)
    values = []
    for published in (False, True):
        metric = make_metric(Task("a", "saliency", 2), published)
        metric.update(prediction, target)
        values.append(metric.compute()["max_f"])
    assert values == pytest.approx([100.0, 100 * 1.3 * 0.5 / (0.15 + 1)])


def test_matching_in_order_is_the_largest_of_every_first_part():
    rng = np.random.default_rng(4)
    for _ in range(5):
        labelled = rng.random((14, 16)) < 0.2
        predicted = rng.permutation(np.argwhere(rng.random((14, 16)) < 0.4))
        starts, choices = edges.partners(predicted, labelled, 2.3)
        places = np.argwhere(labelled)
        near = np.linalg.norm(predicted[:, None] - places[None], axis=2) <= 2.3
        graph = csr_matrix((np.ones(len(choices)), choices, starts), (len(predicted), len(places)))
        assert np.array_equal(graph.toarray() > 0, near)
        found = edges.match_in_order(starts, choices, len(places))
        for size in range(0, len(predicted) + 1, 7):
            largest = (maximum_bipartite_matching(graph[:size], "column") >= 0).sum() if size else 0
            assert found[:size].sum() == largest


def ods_f(prediction: np.ndarray, target: np.ndarray, tolerance: float) -> float:
    """Return the metric for probabilities; the metric itself takes logits."""
    metric = make_metric(Task("edges", "edges", 1, tolerance=tolerance))
    metric.update(torch.logit(torch.tensor(prediction), 1e-6)[None, None], torch.tensor(target)[None, None])
    return metric.compute()["ods_f"]


def test_ods_f_of_hand_made_lines():
    target = np.zeros((60, 80), np.float32)  # a diagonal of 100 pixels
    target[10, 5:75] = 1
    exact = target * 0.8
    assert ods_f(exact, target, 0.03) == pytest.approx(100)
    for shift, f in ((3, 100.0), (4, 0.0)):
        assert ods_f(np.roll(exact, shift, 0), target, 0.03) == pytest.approx(f), "within and beyond 3 pixels"
    half = exact.copy()
    half[:, 40:] = 0
    assert ods_f(half, target, 0.03) == pytest.approx(100 * 2 * 35 / (35 + 70)), "P 1, R 1/2; ends reach no further"
    double = exact + 0.8 * np.roll(target, 3, 0)
    assert ods_f(double, target, 0.03) == pytest.approx(100 * 2 * 70 / (140 + 70)), "a label is matched once"
    unsure = exact + 0.3 * np.roll(target, 30, 0)
    assert ods_f(unsure, target, 0.03) == pytest.approx(100), "a threshold leaves the wrong line out"
    thick = gaussian_filter(target, 2.0)
    assert ods_f(thick / thick.max(), target, 0.03) > 97, "ridges are thinned"
    flat = np.full_like(target, 0.5)
    assert ods_f(flat, target, 0.03) < 60
    known = target.copy()
    known[30:] = np.nan
    unsure[40] = 0.9
    assert ods_f(unsure, np.where(np.isnan(known), np.nan, known), 0.03 * 100 / math.hypot(30, 80)) == pytest.approx(
        100
    )
    assert math.isnan(ods_f(flat, np.full_like(target, np.nan), 0.03))
    assert ods_f(np.zeros_like(target), target, 0.03) == 0
    assert ods_f(np.full_like(target, np.nan), target, 0.03) == 0


def test_ods_f_of_all_images_together():
    """Two halves give the same counts as the whole, and one threshold holds for the data set."""
    rng = np.random.default_rng(5)
    target = torch.zeros(4, 1, 40, 40)
    for index in range(4):
        target[index, 0, 8 + 7 * index] = 1
    blurred = torch.tensor(gaussian_filter(target.numpy(), (0, 0, 1.5, 1.5)))
    prediction = 6 * blurred / blurred.amax() + 0.5 * torch.tensor(rng.normal(size=target.shape)) - 3
    whole, *halves = (make_metric(Task("e", "edges", 1, tolerance=0.02)) for _ in range(3))
    whole.update(prediction, target)
    halves[0].update(prediction[:2], target[:2])
    halves[1].update(prediction[2:], target[2:])
    assert torch.equal(whole.counts, halves[0].counts + halves[1].counts)
    halves[0].counts += halves[1].counts
    assert halves[0].compute() == whole.compute()
    assert 50 < whole.compute()["ods_f"] < 100
    pairs, predicted, labelled = whole.counts
    assert bool((pairs <= predicted).all() and (pairs <= labelled).all())
    assert bool((predicted.diff() <= 0).all())


def test_headline_metrics_alone_are_counted():
    task = PROTOCOLS["nyud"].tasks["depth"]
    found = task.reported({"abs_error": 0.3, "rel_error": 0.2, "rmse": 0.5})
    assert found == {"rmse": 0.5, "also/abs_error": 0.3, "also/rel_error": 0.2}
    assert counted(found) == ["rmse"]
    assert relative_gain(found, {"rmse": 1.0, "also/abs_error": 9.0}) == pytest.approx(50)
    plain = Task("depth", "depth", 1).reported({"abs_error": 0.3, "rmse": 0.5})
    assert (list(plain), counted(plain)) == (["abs_error", "rmse"], ["abs_error"])
    assert counted({"ods_f": 1.0}) == ["ods_f"]
    published = {
        "semseg": {"miou": 50.46},
        "depth": {"rmse": 0.5332},
        "normals": {"mean_angle": 18.42},
        "edges": {"ods_f": 77.89},
    }
    single = {
        "semseg": {"miou": 51.15},
        "depth": {"rmse": 0.5792},
        "normals": {"mean_angle": 19.77},
        "edges": {"ods_f": 77.35},
    }
    assert delta_t(published, single) == pytest.approx(3.53, abs=0.005), "a published table of NYUDv2"
    worse = {**published, "edges": {"ods_f": 0.0}}
    assert score(worse) < score(published)
    assert score({"depth": found}) == pytest.approx(-math.log(0.5))


def test_published_miou_is_over_every_class():
    prediction = torch.nn.functional.one_hot(torch.tensor([[[0, 0, 1, 1]]]), 21).movedim(-1, 1).float()
    target = torch.tensor([[[0, 0, 1, 0]]])
    values = []
    for published in (False, True):
        metric = make_metric(PROTOCOLS["pascal_context"].tasks["semseg"], published)
        metric.update(prediction, target)
        values.append(metric.compute()["miou"])
    assert values == pytest.approx([100 * (2 / 3 + 1 / 2) / 2, 100 * (2 / 3 + 1 / 2) / 21])
    normals = torch.randn(1, 3, 4, 4)
    for published in (False, True):
        metric = make_metric(PROTOCOLS["nyud"].tasks["normals"], published)
        metric.update(normals, torch.nn.functional.normalize(-normals, dim=1))
        assert metric.compute()["mean_angle"] == pytest.approx(180)


# -- the command ---------------------------------------------------------------------------------------------------

FEW = (
    "--model_type", "resnet10t", "--no-pretrained", "--channels", 8, 8, 8, 8, "--head_width", 4, "--crop", 48, "--batch_size", 2,
    "--iterations", 10, "--warmup_iterations", 2, "--weight_iterations", 1, "--policy_iterations", 1, "--retrain_iterations", 2,
    "--eval_iterations", 4, "--curriculum_speed", 1, "--val_fraction", 0.25, "--policy_fraction", 0.5, "--device", "cpu",
    "--experiment_name", "run",
)  # fmt: skip


@pytest.mark.parametrize("method", [*catalog(), "single_task"])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_presets_fill_every_option(name, method):
    options = parse_mtl(["--benchmark", name, "--method", method])
    for key, value in presets.published(name, None, method).items():
        assert getattr(options, key) == (list(value) if isinstance(value, tuple) else value), key
    assert set(options.tasks) == set(options.task_weights) == set(PROTOCOLS[name].tasks)
    short = parse_mtl(["--benchmark", name, "--tasks", "seg", "edge"])
    assert short.task_weights == {"semseg": 1.0, "edges": 50.0}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_command_trains_and_tests(roots, name, command, here, tmp_path):
    arguments = ("train_mtl.py", "--benchmark", name, "--dataset", roots[name], *FEW)
    if name == "pascal_context":
        done = command(*arguments, "--method", "hard_sharing", cwd=tmp_path)
    else:
        done = here(*arguments, draws=True)
    run = tmp_path / "results/run"
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["tasks"]) == list(PROTOCOLS[name].tasks)
    for task, own in summary["tasks"].items():
        headline = PROTOCOLS[name].tasks[task].headline
        assert tuple(metric for metric in own if not metric.startswith("also/")) == headline
        assert headline[0] in done.stdout
    assert (run / "predictions.png").stat().st_size > 10_000
    assert "samples: 6 train, 3 weights, 3 policy, 2 val, 3 test" in done.stdout
    assert "also/" in done.stdout


def test_mistakes_of_the_command_are_one_line(roots, here, copies):
    done = here("train_mtl.py", "--benchmark", "nyud", *FEW, check=2)
    assert "datasets/NYUDv2/gt_sets/train.txt does not exist; datasets/README.md says where" in done.stderr
    (copies["nyud"] / "depth/000002.npy").unlink()
    done = here("train_mtl.py", "--benchmark", "nyud", "--dataset", copies["nyud"], *FEW, check=2)
    assert "depth/000002.npy belongs to an image of gt_sets/train.txt and does not exist" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
