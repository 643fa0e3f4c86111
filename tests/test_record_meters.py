"""Metrics and losses of stays and subjects against short float64 references and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn import metrics

from taps.data.multi_label import IGNORE_INDEX, Task
from taps.metrics.dense import make_metric
from taps.metrics.losses import make_loss, stay_bins
from taps.metrics.records import BIN_HOURS

BINARY, MANY = Task("a", "binary", 1, positive_weight=5.0), Task("a", "binary", 4)
DURATION, CATEGORY = Task("a", "duration", 10), Task("a", "category", 3)
NUMBER = Task("a", "number", 1, scale=(100.0, 8.0))


def batches(kind: str, count: int = 3):
    """Return predictions and labels of the given kind, with missing labels; every batch has the same targets."""
    shapes = {"binary": (6, 1, 20), "many": (6, 4, 20), "duration": (6, 10, 20), "category": (40, 3), "number": (40, 1)}
    for _ in range(count):
        prediction = torch.randn(shapes[kind])
        if kind == "duration":
            target = torch.rand(6, 20) * 500
            target[torch.rand(6, 20) < 0.3] = math.nan
        elif kind == "category":
            target = torch.randint(0, 3, (40,))
            target[::7] = IGNORE_INDEX
        elif kind == "number":
            target = prediction * 0.5 + torch.randn(40, 1)
            target[::9] = math.nan
        else:
            target = (torch.rand(shapes[kind]) < 0.3).float()
            target[(torch.rand(6, 1, 20) < 0.4).expand(shapes[kind])] = math.nan
        yield prediction, target


def measured(task: Task, data: list) -> dict[str, float]:
    meter = make_metric(task)
    for prediction, target in data:
        meter.update(prediction, target)
    return meter.compute()


def together(data: list) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.concatenate([np.asarray(part[index], np.float64) for part in data]) for index in (0, 1))


def roc(target: np.ndarray, score: np.ndarray) -> float:
    """Return the share of pairs of a positive and a negative in which the positive scores higher (Mann-Whitney)."""
    ranks, positive = rankdata(score), target == 1
    count = positive.sum()
    return (ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(target) - count))


def precision_recall(target: np.ndarray, score: np.ndarray) -> float:
    """Sum trapezoids between the points of all thresholds, starting at recall 0 and precision 1, as in the benchmark."""
    points = [(0.0, 1.0)]
    for threshold in np.unique(score)[::-1]:
        chosen = score >= threshold
        points.append((target[chosen].sum() / target.sum(), target[chosen].mean()))
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))


def test_areas_under_curves():
    data = list(batches("binary"))
    prediction, target = together(data)
    known = np.isfinite(target)
    found = measured(BINARY, data)
    assert found["auc_roc"] == pytest.approx(roc(target[known], prediction[known]), abs=1e-9)
    assert found["auc_pr"] == pytest.approx(precision_recall(target[known], prediction[known]), abs=1e-9)
    assert found["auc_roc"] == pytest.approx(metrics.roc_auc_score(target[known], prediction[known]), abs=1e-12)


def test_areas_of_several_questions():
    data = list(batches("many"))
    prediction, target = (array.transpose(0, 2, 1).reshape(-1, 4) for array in together(data))
    known = np.isfinite(target).all(1)
    prediction, target = prediction[known], target[known]
    found = measured(MANY, data)
    assert found["auc_macro"] == pytest.approx(
        np.mean([roc(target[:, i], prediction[:, i]) for i in range(4)]), abs=1e-9
    )
    assert found["auc_micro"] == pytest.approx(roc(target.ravel(), prediction.ravel()), abs=1e-9)
    assert found["auc_macro"] == pytest.approx(metrics.roc_auc_score(target, prediction, average="macro"), abs=1e-12)
    assert found["auc_micro"] == pytest.approx(metrics.roc_auc_score(target, prediction, average="micro"), abs=1e-12)


def test_large_answers_keep_their_order():
    prediction = torch.tensor([[40.0, 50.0, 60.0, 70.0]]).repeat(4, 1)[..., None] + torch.arange(4.0).view(4, 1, 1)
    target = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(4, 1, 1).expand(4, 4, 1)
    assert measured(MANY, [(prediction, target)])["auc_macro"] == 1.0
    with pytest.raises(ValueError, match="task a: the network's outputs are not finite; lower --lr"):
        measured(MANY, [(prediction * math.inf, target)])


def test_kappa_and_mean_absolute_deviation():
    data = list(batches("duration"))
    prediction, target = (np.concatenate([part[i].numpy() for part in data]) for i in (0, 1))
    known = np.isfinite(target)
    chosen, hours = prediction.argmax(1)[known], target[known].astype(np.float64)
    days = hours / 24
    bins = np.select([days < day for day in (1, 2, 3, 4, 5, 6, 7, 8, 14)], range(9), 9)
    observed = np.zeros((10, 10))
    np.add.at(observed, (bins, chosen), 1)
    weights = np.abs(np.subtract.outer(np.arange(10), np.arange(10)))
    expected = np.outer(observed.sum(1), observed.sum(0)) / observed.sum()
    found = measured(DURATION, data)
    assert found["kappa"] == pytest.approx(1 - (weights * observed).sum() / (weights * expected).sum(), abs=1e-9)
    assert found["kappa"] == pytest.approx(metrics.cohen_kappa_score(bins, chosen, weights="linear"), abs=1e-12)
    assert found["mad"] == pytest.approx(metrics.mean_absolute_error(hours, BIN_HOURS[chosen]), abs=1e-4)


def test_bins_include_their_lower_ends():
    hours = torch.tensor([0.0, 23.999, 24.0, 47.9, 191.9, 192.0, 335.9, 336.0, 5000.0, math.nan])
    assert stay_bins(hours).tolist() == [0, 0, 1, 1, 7, 8, 8, 9, 9, IGNORE_INDEX]


def test_accuracies():
    data = list(batches("category"))
    prediction, target = together(data)
    known = target != IGNORE_INDEX
    chosen, target = prediction.argmax(1)[known], target[known]
    found = measured(CATEGORY, data)
    assert found["accuracy"] == pytest.approx(100 * metrics.accuracy_score(target, chosen))
    assert found["balanced_accuracy"] == pytest.approx(100 * metrics.balanced_accuracy_score(target, chosen))


def test_errors_of_numbers_are_in_their_own_units():
    data = list(batches("number"))
    prediction, target = together(data)
    known = np.isfinite(target)
    prediction, target = 100 + 8 * prediction[known], 100 + 8 * target[known]
    found = measured(NUMBER, data)
    assert found["mae"] == pytest.approx(np.abs(prediction - target).mean(), rel=1e-6)
    assert found["r2"] == pytest.approx(1 - ((target - prediction) ** 2).sum() / ((target - target.mean()) ** 2).sum())


KINDS = {"binary": BINARY, "many": MANY, "duration": DURATION, "category": CATEGORY, "number": NUMBER}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_what_is_missing_do_not_matter(kind):
    data = list(batches(kind))
    whole = [tuple(torch.cat([part[index] for part in data]) for index in (0, 1))]
    assert measured(KINDS[kind], data) == pytest.approx(measured(KINDS[kind], whole))
    prediction, target = (tensor.clone() for tensor in whole[0])
    missing = target == IGNORE_INDEX if kind == "category" else ~target.isfinite()
    if kind == "duration":
        prediction[missing[:, None].expand_as(prediction)] = 99.0
    else:
        prediction[missing] = 99.0
    assert measured(KINDS[kind], [(prediction, target)]) == pytest.approx(measured(KINDS[kind], whole))


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_labels_do_not_define_is_nan(kind):
    prediction, target = next(batches(kind))
    target = torch.full_like(target, IGNORE_INDEX) if kind == "category" else torch.full_like(target, math.nan)
    assert all(math.isnan(value) for value in measured(KINDS[kind], [(prediction, target)]).values())
    loss = make_loss(KINDS[kind])(prediction.requires_grad_(), target)
    loss.backward()
    assert loss == 0
    assert (prediction.grad == 0).all()
    if kind == "binary":
        assert math.isnan(measured(BINARY, [(prediction.detach(), torch.zeros_like(target))])["auc_roc"])


def test_losses():
    prediction, target = next(batches("binary"))
    p, y = (np.asarray(t, np.float64) for t in (prediction, target))
    known = np.isfinite(y)
    p, y = p[known], y[known]
    expected = np.mean(5.0 * y * np.log1p(np.exp(-p)) + (1 - y) * np.log1p(np.exp(p)))
    assert float(make_loss(BINARY)(prediction, target)) == pytest.approx(expected, rel=1e-5)

    prediction, target = next(batches("duration"))
    bins = stay_bins(target).numpy()
    scores = prediction.numpy().astype(np.float64)
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    where = np.argwhere(bins != IGNORE_INDEX)
    expected = -np.mean([logs[b, bins[b, t], t] for b, t in where])
    assert float(make_loss(DURATION)(prediction, target)) == pytest.approx(expected, rel=1e-5)

    prediction, target = next(batches("number"))
    p, y = prediction.numpy().astype(np.float64), target.numpy().astype(np.float64)
    assert float(make_loss(NUMBER)(prediction, target)) == pytest.approx(np.nanmean((p - y) ** 2), rel=1e-5)
