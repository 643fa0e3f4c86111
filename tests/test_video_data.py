"""NYUDv2 with the frames around each image: files, transforms, training that pulls frames together, error messages."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from look_alikes import SIZE, TRAIN, VAL, make_look_alike
from PIL import Image
from torch import nn

import taps
from taps.data.checks import check
from taps.data.dense.astmt_layout import open_protocol
from taps.data.dense.dataset import FRAMES, DenseSet
from taps.data.dense.video_layout import open_video
from taps.methods.activation_gap import distance_to_neighbour
from taps.settings.task_names import NEIGHBOUR

AROUND = ("rgb_18", "rgb_19", "rgb_21", "rgb_22")
FOLDERS = {"segmentation": "semseg", "depth": "depth", "normals": "normals", "edge": "edge"}


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> tuple[Path, Path]:
    """The look-alike of NYUDv2 in both layouts; frame n of a clip is its image moved by n − 20 columns."""
    folder = tmp_path_factory.mktemp("video")
    make_look_alike(folder / "plain", "nyud")
    for split, listed in (("train", "train"), ("test", "val")):
        for name in (folder / f"plain/gt_sets/{listed}.txt").read_text().split():
            image = folder / f"plain/images/{name}.png"
            labels = [(next((folder / "plain" / theirs).glob(f"{name}.*")), ours) for theirs, ours in FOLDERS.items()]
            for theirs, ours in ((image, "rgb"), *labels):
                target = folder / "video" / split / ours / "clip" / f"{name}{theirs.suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(theirs, target)
            for frame in AROUND if split == "train" else ():
                target = folder / "video" / split / frame / "clip" / f"{name}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.roll(np.asarray(Image.open(image)), int(frame[-2:]) - 20, axis=1)).save(target)
    return folder / "plain", folder / "video"


@pytest.fixture
def video(roots, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(roots[1], tmp_path / "video"))


def test_labels_are_those_of_the_other_layout_and_frames_come_along(roots):
    plain, video = open_protocol("nyud", roots[0]), open_video(roots[1], with_frames=True)
    for split, count in (("train", TRAIN), ("test", VAL)):
        ours, theirs = (DenseSet(data, split, split == "train") for data in (video, plain))
        assert len(ours) == len(theirs) == count
        for index in range(count):
            own, other = ours.read(index), theirs.read(index)
            frames = own.pop(FRAMES, None)
            assert own.keys() == other.keys()
            assert all(np.array_equal(own[key], other[key], equal_nan=own[key].dtype.kind == "f") for key in own)
            assert (frames is None) == (split == "test")
            for moved, frame in zip((-2, -1, 1, 2), () if frames is None else frames, strict=False):
                assert np.array_equal(frame, np.roll(own["image"], moved, axis=1))
    assert NEIGHBOUR not in DenseSet(video, "test", False)[0][1]
    assert NEIGHBOUR not in DenseSet(open_video(roots[1]), "train", True)[0][1]


def test_a_frame_is_changed_like_its_image(roots):
    """The frame is the image itself, so that zoom, flip, crop and colours have to agree."""
    data = open_video(roots[1], ["semseg"], with_frames=True)
    samples = DenseSet(data, "train", True, seed=3)
    samples.read(0)[FRAMES][:] = samples.read(0)["image"]
    images = [samples[(0, number)] for number in range(4)]
    for image, labels in images:
        assert image.shape == labels[NEIGHBOUR].shape == (3, 416, 416)
        assert torch.equal(image, labels[NEIGHBOUR])
    assert not torch.equal(images[0][0], images[1][0])


def test_each_pass_draws_a_frame(roots):
    data = replace(open_video(roots[1], ["semseg"], with_frames=True), distort=False)
    samples = DenseSet(data, "train", True)
    for index, frame in enumerate(samples.read(0)[FRAMES]):
        frame[:] = 60 * index
    shades = {float(samples[(0, number)][1][NEIGHBOUR][0, 208, 208]) for number in range(32)}
    assert len(shades) == 4


def test_the_distance_of_frames_is_zero_for_equal_ones_and_has_a_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(2))
    net.num_features = 4
    model = taps.adapt(net, "hard_sharing", train_base=True)
    model.add_task("a", head=nn.Identity())
    x = torch.randn(2, 3, 6, 6)
    for frame, is_zero in ((x.clone(), True), (x + 0.1 * torch.randn_like(x), False)):
        with distance_to_neighbour(model, x, {NEIGHBOUR: frame}, 0.5) as gap:
            model(x, task="a")
        assert (gap.value().item() == 0) == is_zero
    model.zero_grad()
    gap.value().backward()
    first, second = (parameter.grad for parameter in net.parameters() if parameter.dim() == 4)
    assert first.abs().sum() > 0
    assert second is None, "its input is compared, which it does not change"
    with torch.no_grad():
        inputs = [net[:2](own) for own in (x, frame)]
        parts = [(a - b).norm(dim=1).sum() / b.norm(dim=1).sum() for a, b in ((x, frame), inputs)]
    assert gap.value().item() == pytest.approx(0.5 * float(sum(parts)) / 2)


def arguments(root: Path, *more) -> tuple:
    return (
        "--benchmark", "nyud", "--dataset", root, "--method", "sparse_delta", "--tasks", "semseg", "depth",
        "--model_type", "test_vit", "--patch_size", 8, "--crop", 32,
        "--head_width", 4, "--head_rates", 1, "--batch_size", 2, "--iterations", 2,
        "--retrain_iterations", 2, "--pull_iterations", 2, "--eval_iterations", 2, "--density", "5%", "--single_task", "none",
        "--device", "cpu", "--experiment_name", "run", "--no-pretrained", *more,
    )  # fmt: skip


def test_the_base_is_trained_beside_neighbouring_frames(roots, here, tmp_path):
    here("train_mtl.py", *arguments(roots[1], "--phases", "retrain"))
    row = tmp_path / "results/run/single_task/semseg/metrics.jsonl"
    alone = json.loads(row.read_text().splitlines()[0])["train_loss"]
    here("train_mtl.py", *arguments(roots[1], "--phases", "retrain", "--frame_pull", 0.5, "--overwrite"))
    assert json.loads(row.read_text().splitlines()[0])["train_loss"] != alone, "the second step follows from the first"
    assert set(taps.load(tmp_path / "results/run/retrain_000").tasks) == {"semseg", "depth"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: next((root / "train/rgb_21/clip").iterdir()).unlink(), "train/rgb_21 has no file for clip/"),
        (lambda root: next((root / "test/semseg/clip").iterdir()).unlink(), "test/semseg has no file for clip/"),
        (
            lambda root: (
                Image.new("RGB", SIZE).save(next((root / "train/rgb_18/clip").iterdir()))
                if SIZE[0] != SIZE[1]
                else None
            ),
            "is not of the size of",
        ),
        (lambda root: shutil.rmtree(root / "train/rgb_18"), "train/rgb_18 has no file for clip/"),
    ],
    ids=["frame missing", "label missing", "other size", "folder missing"],
)
def test_damaged_trees_end_with_one_line(video, here, tmp_path, damage, message):
    damage(video)
    done = here("train_mtl.py", *arguments(video, "--frame_pull", 0.1), check=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_frames_have_to_be_there(roots, here):
    done = here("train_mtl.py", *arguments(roots[0], "--frame_pull", 0.1), check=2)
    assert "--frame_pull needs the frames around each image, which " in done.stderr
    done = here("train_mtl.py", "--benchmark", "nyud", "--frame_pull", 0.1, check=2)
    assert "--frame_pull is for --method sparse_delta, not adashare" in done.stderr


def test_check_reads_every_file(video):
    lines, wrong = check(video)
    assert wrong == 0
    assert f"{TRAIN} train, {VAL} test; semseg, depth, normals, edges; frames around training images" in lines[0]
    next((video / "train/rgb_22/clip").iterdir()).write_bytes(b"none")
    lines, wrong = check(video)
    assert wrong == 1
    assert "train/rgb_22/clip/" in lines[1]
