"""Images with several labels: tables, loss, average precision, and the commands from training to prediction."""

import csv
import json
import random
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import SMALL
from PIL import Image
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader, TensorDataset

import taps
from taps.data.classification.folders import find_tasks
from taps.data.classification.images import ImageSet, choose_stratified
from taps.metrics.accuracy import average_precision
from taps.metrics.losses import BinaryCrossEntropy, positive_weights

COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """A folder with images of coloured squares and tables of which colours each has."""
    root, draw = tmp_path_factory.mktemp("squares"), random.Random(0)
    (root / "images").mkdir()
    rows = []
    for number in range(90):
        has = [draw.random() < 0.5 for _ in COLOURS]
        pixels = np.full((32, 32, 3), 90, dtype=np.uint8)
        for index, present in enumerate(has):
            if present:
                top, left = draw.randrange(20), 11 * index
                pixels[top : top + 10, left : left + 10] = 0
                pixels[top : top + 10, left : left + 10, 2 - index] = 255
        Image.fromarray(pixels).save(root / f"images/{number}.png")
        rows.append((f"images/{number}.png", has, "test" if number >= 60 else ""))
    with (root / "colours.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("path", "labels", "split"))
        said = (";".join(c for c, own in zip(COLOURS, has, strict=True) if own) for _, has, _ in rows)
        table.writerows((row[0], names, row[2]) for row, names in zip(rows, said, strict=True))
    with (root / "wide.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("path", *COLOURS, "split"))
        table.writerows((path, *map(int, has), split) for path, has, split in rows)
    return root


def test_both_kinds_of_tables_say_the_same(squares):
    named, wide = find_tasks([squares / "colours.csv", squares / "wide.csv"])
    assert named.classes == wide.classes == COLOURS
    assert named.train == wide.train
    assert named.test == wide.test
    assert len(named.test) == 30
    assert named.has_several_labels
    label = ImageSet(named.train, lambda image: torch.zeros(1))[0][1]
    assert label.dtype == torch.float32
    assert label.tolist() == list(named.train[0][1])


def test_rare_labels_are_divided_too():
    samples = [(str(number), (1, int(number % 10 == 0))) for number in range(100)]
    chosen = choose_stratified(samples, 0.3, seed=0)
    assert len(chosen) == 30
    assert sum(label[1] for _, label in chosen) == 3


def test_the_loss_is_the_formula():
    torch.manual_seed(0)
    output, labels = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5, 3)).float()
    weights = positive_weights([tuple(map(int, row)) for row in labels.tolist()])
    for column, weight in enumerate(weights):
        with_it = float(labels[:, column].sum())
        assert weight == (pytest.approx((5 - with_it) / with_it) if 0 < with_it < 5 else 1.0)
    targets, p = 0.8 * labels.double() + 0.1, 1 / (1 + (-output).exp())
    expected = -(torch.tensor(weights) * targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    assert float(BinaryCrossEntropy(0.2, weights)(output, labels)) == pytest.approx(float(expected), rel=1e-6)


def test_average_precision_is_scikit_learns():
    torch.manual_seed(0)
    outputs, labels = torch.randn(40, 4), torch.randint(2, (40, 4)).float()
    labels[:, 3] = 0

    class Stored(torch.nn.Module):
        def forward(self, x, task):
            return outputs[x.long()[:, 0]]

    loader = DataLoader(TensorDataset(torch.arange(40)[:, None], labels), batch_size=7)
    found = average_precision(Stored(), "task", loader, Accelerator(cpu=True), 4)
    expected = [100 * average_precision_score(labels[:, index], outputs[:, index]) for index in range(3)]
    assert found.per_class == [*map(pytest.approx, expected), None]
    assert found.accuracy == pytest.approx(sum(expected) / 3)


def test_from_a_table_to_predictions(squares, here, tmp_path):
    """Trained by the command, stored, loaded and asked: labels are right, and their probabilities are independent."""
    line = ["train_sequential.py", "--dataset", squares / "colours.csv", *SMALL, "--no_flip", "--epochs", 12]
    said = here(*line, "--lr", 0.1, "--class_weights", "balanced", "--experiment_name", "run", "--lam", 0.1).stdout
    assert re.search(r"colours 12/12 settle: loss [\d.]+  mAP [\d.]+ % validation", said)
    assert re.search(r"task +mAP %", said)
    stored = json.loads((tmp_path / "results/run/colours/task.json").read_text())
    test = json.loads((tmp_path / "results/run/colours/test.json").read_text())
    assert stored["metric"] == "mean average precision"
    assert set(test["per_class"]) == set(COLOURS)
    assert test["confusion"] is None
    assert stored["accuracy"] == pytest.approx(sum(test["per_class"].values()) / 3)
    assert stored["accuracy"] > 90  # a network that looks at nothing reaches about 50
    again = here("evaluate.py", "results/run").stdout
    assert f"{stored['accuracy']:.2f}" in again
    images = [path for path, _ in find_tasks([squares / "colours.csv"])[0].test]
    answers = json.loads(here("taps predict", "results/run", *images, "--json", "--top", 3).stdout)
    sums = [sum(one["probability"] for one in answer["tasks"]["colours"]) for answer in answers]
    assert max(sums) > 1.5
    assert min(sums) < 0.8
    assert "mAP %" in here("taps tasks", "list", "results/run").stdout


@pytest.mark.parametrize(
    ("script", "more", "message"),
    [
        ("train_joint.py", (), "task colours: images with several labels are for tasks trained one by one"),
        ("train_sequential.py", ("--mixup", 0.2), "task colours: --mixup and --cutmix are not for images with several"),
        ("train_mtl.py", ("--benchmark", "domainnet"), "images with several labels are for train_sequential.py"),
    ],
)
def test_what_takes_one_label_says_so(script, more, message, squares, here, tmp_path):
    kind = () if script == "train_mtl.py" else SMALL
    paths = (squares / "colours.csv", squares / "wide.csv")
    done = here(script, "--dataset", *paths, *kind, *more, "--experiment_name", "run", check=2)
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "results/run").exists()


def test_a_table_without_any_label_is_one_line(tmp_path):
    from taps.data.classification.folders import read_table

    (tmp_path / "empty.csv").write_text("path,labels\na.png,\nb.png,\n")
    with pytest.raises(taps.UserError, match="column 'labels' names no label"):
        read_table(tmp_path / "empty.csv")
    (tmp_path / "one.csv").write_text("path,label,split\na.png,x,train\nb.png,y,train\nc.png,z,test\n")
    with pytest.raises(taps.UserError, match="lists no training images of class 'z'"):
        read_table(tmp_path / "one.csv")
