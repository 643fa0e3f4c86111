"""Hospital stays: file formats, error messages, causality of networks, and the benchmark on the command line."""

import csv
import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.nn.functional import pad

import taps
from options import parse_mtl
from taps.data.checks import check
from taps.data.generated.brain_volumes import CATEGORIES, NUMBERS
from taps.data.generated.hospital_stays import StayRecipe, make_stays
from taps.data.multi_label import make_stream, split_train
from taps.data.records.mimic3 import fit_normalizer, open_mimic3
from taps.data.records.mimic3_discretizer import Discretizer, read_normalizer
from taps.data.records.mimic3_lists import PHENOTYPES, TASKS, find_root, read_labels, rows_of
from taps.networks.dynamic_convolution import DynamicConv1d
from taps.networks.heads import HourHead
from taps.networks.series import create_series_backbone

PUBLISHED = ROOT.parent / "shared/data/mimic3"
TINY = StayRecipe(train=24, val=8, test=10, seed=3)
SMALL = (
    "--benchmark", "mimic3", "--channels", 4, 4, 4, 4, "--head_width", 2, "--head_rates", 1, "--hours", 64, "--batch_size", 4,
    "--iterations", 12, "--warmup_iterations", 2, "--weight_iterations", 1, "--policy_iterations", 1, "--retrain_iterations", 4,
    "--eval_iterations", 3, "--curriculum_speed", 1, "--settle_iterations", 2, "--device", "cpu", "--experiment_name", "run",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stays") / "stays"
    make_stays(root, TINY)
    return root


@pytest.fixture
def tree(made, tmp_path) -> Path:
    """A copy of the data that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "tree"))


def edit(path: Path, row: int, change) -> None:
    """Change the cells of a row of a CSV (1 is the header)."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    rows[row - 1] = change(rows[row - 1])
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def first_stay(root: Path) -> Path:
    return root / "train" / (root / "train_listfile.csv").read_text().splitlines()[1].split(",")[0]


def slowly(config: dict, path: Path, hours: float) -> np.ndarray:
    """Discretise like mimic3-benchmarks, cell by cell: hourly bins, previous values, flags."""
    count = int(hours + 1 - 1e-6)
    seen: list[dict[str, str]] = [{} for _ in range(count)]
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            hour = float(row.pop("Hours"))
            if hour <= hours + 1e-6:
                seen[int(hour - 1e-6)].update({name: text for name, text in row.items() if text})
    rows = []
    before = dict(config["normal_values"])
    for own in seen:
        before.update(own)
        values: list[float] = []
        for name in config["id_to_channel"]:
            known = config["possible_values"][name]
            if config["is_categorical_channel"][name]:
                values += [float(before[name] == value) for value in known]
            else:
                values.append(float(before[name]))
        rows.append(values + [float(name in own) for name in config["id_to_channel"]])
    return np.array(rows)


def test_bins_are_those_of_the_benchmark(made):
    config = json.loads((made / "discretizer_config.json").read_text())
    discretizer = Discretizer(made / "discretizer_config.json")
    data = open_mimic3(made)
    for stay in data.splits["train"][:6]:
        path = made / "train" / stay.name
        ours = discretizer.expand(*discretizer.read(path, stay.hours))
        assert ours.shape[1] == len(discretizer.header) == 76
        np.testing.assert_allclose(ours, slowly(config, path, stay.hours), rtol=1e-6)


def test_edges_of_bins(tmp_path, made):
    """Values on the hour belong to the hour before, later values in an hour win, and values after the stay are left out."""
    discretizer = Discretizer(made / "discretizer_config.json")
    heart, height = discretizer.channels.index("Heart Rate"), discretizer.channels.index("Height")
    lines = [["Hours", *discretizer.channels]]
    for hour, value in (("0.0", "50"), ("1.0", "60"), ("1.5", "70"), ("1.75", "75"), ("4.0", "90"), ("4.2", "95")):
        row = [hour, *[""] * 17]
        row[1 + heart] = value
        lines.append(row)
    path = tmp_path / "x.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(lines)
    values, measured = discretizer.read(path, 4.0)
    assert values[:, heart].tolist() == [60, 75, 75, 90]
    assert measured[:, heart].tolist() == [True, True, False, True]
    assert (values[:, height] == 170).all()
    assert not measured[:, height].any()


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the publishers' files are not here")
def test_published_configuration_and_normalizer():
    discretizer = Discretizer(PUBLISHED / "discretizer_config.json")
    assert len(discretizer.header) == 76
    assert len(discretizer.continuous) == 12
    assert sum(width for width in discretizer.widths if width > 1) == 47
    means, stds = read_normalizer(PUBLISHED / "multitask_normalizer.json", 76)
    glucose = discretizer.header.index("Glucose")
    assert means[glucose] == pytest.approx(140.387, abs=1e-3)
    assert stds[glucose] == pytest.approx(1766.74, abs=1e-2)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the publishers' files are not here")
def test_generated_stays_are_read_with_the_published_files(tree):
    ours, theirs = (json.loads((folder / "discretizer_config.json").read_text()) for folder in (tree, PUBLISHED))
    assert ours["id_to_channel"] == theirs["id_to_channel"]
    for name, values in theirs["possible_values"].items():
        assert sorted(ours["possible_values"][name]) == sorted(values)
    assert ours["normal_values"] == theirs["normal_values"]
    shutil.copy(PUBLISHED / "discretizer_config.json", tree)
    data = open_mimic3(tree, normalizer=PUBLISHED / "multitask_normalizer.json")
    x, _ = data.samples("train", True)[0]
    assert x.shape == (76, 170)


def test_generated_lists_follow_the_benchmarks_rules(made):
    for path in made.glob("*_listfile.csv"):
        header = path.read_text().splitlines()[0]
        assert header.split(",")[2:] == [
            "in-hospital mortality task (pos;mask;label)",
            "length of stay task (masks;labels)",
            "phenotyping task (labels)",
            "decompensation task (masks;labels)",
        ]
        for number, _, cells in rows_of(path):
            hours = float(cells[1])
            labels = read_labels(path, number, cells, 170)
            asked = np.flatnonzero(np.isfinite(labels["los"]))
            assert asked.min() >= 4
            # at hour i, which ends after i + 1 hours, as in the benchmark
            np.testing.assert_allclose(labels["los"][asked], hours - asked - 1, atol=1e-4)
            assert asked.max() < hours
            assert np.isfinite(labels["ihm"]).any() == (hours >= 48)
            assert np.isfinite(labels["ihm"][0, 47]) == (hours >= 48)
            dies = labels["decomp"][0]
            if (dies == 1).any():
                assert (np.flatnonzero(dies == 1) > hours - 27).all()
            assert np.isfinite(dies).sum() <= len(asked)
            at = np.flatnonzero(np.isfinite(labels["pheno"][0]))
            assert at.tolist() == [min(int(hours + 1 - 1e-6), 170) - 1]


def test_questions_beyond_the_crop_are_left_out_and_counted(made):
    whole, short = open_mimic3(made, 170), open_mimic3(made, 50, names=["ihm", "los", "pheno"])
    note = next(note for note in short.notes if "longer than 50 hours" in note)
    long = sum(stay.hours > 50 for stays in whole.splits.values() for stay in stays)
    assert note.startswith(f"{long} stays")
    lost = 0
    for split in ("train", "val", "test"):
        for _, _, cells in rows_of(made / f"{split}_listfile.csv"):
            lost += sum(max((len(cells[index].split(";")) // 2) - 1 - 50, 0) for index in (3, 5))
    assert f"{lost} labels" in note
    x, labels = short.samples("train", True)[0]
    assert x.shape == (76, 50)
    assert all(own.shape[-1] == 50 for own in labels.values())


def test_inputs_are_normalised_and_filled_up_with_zeros(made):
    data = open_mimic3(made, 170)
    samples = data.samples("train", True)
    stay = data.splits["train"][0]
    x, _ = samples[0]
    count = int(stay.hours + 1 - 1e-6)
    raw = data.discretizer.expand(*data.bins(stay))
    for column, name in enumerate(data.discretizer.header):
        own = raw[:, column]
        if "->" not in name:
            own = (own - data.normalizer[0][column]) / data.normalizer[1][column]
        np.testing.assert_allclose(x[column, :count], own, rtol=1e-5, atol=1e-5)
    assert (x[:, count:] == 0).all()
    assert torch.equal(samples[0][0], x), "read once, and the same again"


def test_the_normaliser_is_fitted_on_the_training_bins(tree, here):
    (tree / "normalizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no normalizer.json; fit it with: taps data normalizer"):
        open_mimic3(tree)
    means, stds = read_normalizer(fit_normalizer(tree), 76)
    refused = here("taps data", "normalizer", tree, check=2)
    assert "exists; replace it with --overwrite" in refused.stderr
    here("taps data", "normalizer", tree, "--overwrite")
    data = open_mimic3(tree)
    bins = np.concatenate([data.discretizer.expand(*data.bins(stay)) for stay in data.splits["train"]])
    np.testing.assert_allclose(means, bins.mean(0), rtol=1e-4, atol=1e-6)
    measured = bins.std(0, ddof=1)
    np.testing.assert_allclose(stds[measured > 1e-3], measured[measured > 1e-3], rtol=1e-3)
    np.savez(tree / "normalizer.npz", means=means, stds=stds)
    (tree / "normalizer.json").unlink()
    np.testing.assert_array_equal(open_mimic3(tree).normalizer[0], means)


def test_patients_stay_in_one_part(made):
    data = split_train(open_mimic3(made), 0.1, 0.4, seed=0)
    patients = {name: {stay.name.split("_")[0] for stay in data.splits[name]} for name in ("weights", "policy", "val")}
    assert not patients["weights"] & patients["policy"]
    assert not patients["weights"] & patients["val"]
    names = [stay.name for stay in data.splits["weights"] + data.splits["policy"]]
    assert sorted(names) == sorted(stay.name for stay in data.splits["train"])
    assert len({name.split("_")[0] for name in names}) < len(names), "some patients have two stays"


def test_loading_does_not_depend_on_workers(made):
    data = split_train(open_mimic3(made, 48, names=["los", "pheno"]), 0.1, 0.4, seed=0)
    batches = []
    for workers in (0, 2):
        loader, _ = make_stream(data, "weights", 4, 2, seed=0, workers=workers)
        batches.append(list(loader))
    for (x, labels), (y, others) in zip(*batches, strict=True):
        assert torch.equal(x, y)
        assert all(torch.equal(labels[task].nan_to_num(9), others[task].nan_to_num(9)) for task in labels)


# -- mistakes ----------------------------------------------------------------------------------------------------


def replace_cell(index: int, text: str):
    return lambda cells: [*cells[:index], text, *cells[index + 1 :]]


def lengthened(cells: list[str]) -> list[str]:
    """Add two more steps of remaining hours than the stay has."""
    entries = cells[3].split(";")
    half = len(entries) // 2
    return [*cells[:3], ";".join([*entries[:half], "1", "1", *entries[half:], "0.5", "0.5"]), *cells[4:]]


def longer(cells: list[str]) -> list[str]:
    return [*cells[:3], cells[3] + ";1", *cells[4:]]


LISTS = {
    "odd number of entries": (longer, r"train_listfile.csv row 2: remaining hours has \d+ entries, but as many masks"),
    "phenotypes": (replace_cell(4, "1;0"), r"train_listfile.csv row 2: phenotypes has 2 entries, 25 are needed"),
    "twice": (None, r"train_listfile.csv row 26: .*_timeseries.csv was in row 2 already"),
    "header": (None, r"train_listfile.csv row 1 is not a header 'filename,length of stay,…' of 6 columns"),
    "cells": (lambda cells: cells[:5], r"train_listfile.csv row 2 has 5 cells instead of 6"),
    "length": (replace_cell(1, "long"), r"train_listfile.csv row 2: a length of stay of 'long' hours"),
    "file": (replace_cell(0, "1_episode1_timeseries.csv"), r"train_listfile.csv row 2: .*1_episode1_.* does not exist"),
    "patient": (None, r"patient 100\d\d is in both train_listfile.csv and val_listfile.csv"),
}


@pytest.mark.parametrize("name", LISTS)
def test_wrong_lists_are_refused_with_file_and_row(tree, name):
    change, message = LISTS[name]
    path = tree / "train_listfile.csv"
    lines = path.read_text().splitlines()
    if name == "twice":
        path.write_text("\n".join([*lines, lines[1]]) + "\n")
    elif name == "header":
        path.write_text("\n".join(lines[1:]) + "\n")
    elif name == "patient":
        with open(tree / "val_listfile.csv", "a") as file:
            file.write(lines[1] + "\n")
    else:
        edit(tree / "train_listfile.csv", 2, change)
    with pytest.raises(ValueError, match=message):
        open_mimic3(tree)
    lines, wrong = check(tree)
    assert wrong == 1, lines


LABELS = {
    "mortality": (2, "47;1", r"row 2: mortality is '47;1', not position;mask;label"),
    "steps": (3, lengthened, r"row 2: remaining hours has \d+ steps, a stay of .* hours has \d+"),
    "few steps": (3, "1;2.5", r"row 2: remaining hours has 1 steps, a stay of .* hours has \d+"),
    "position": (2, "200;1;1", r"row 2: mortality is asked at hour 200 of a stay of"),
    "phenotype": (4, ";".join(["2"] * 25), r"row 2: phenotypes has 25 entries, 25 of 0 or 1 are needed; entry 1 is 2"),
    "number": (3, "1;x", r"row 2: remaining hours: 'x' is not a number"),
    "nan": (3, "1;nan", r"row 2: remaining hours holds nan"),
    "mask": (5, "3;1", r"row 2: decompensation holds entries other than 0 and 1"),
}


@pytest.mark.parametrize("name", LABELS)
def test_wrong_labels_are_refused_with_file_and_row(tree, name):
    index, text, message = LABELS[name]
    edit(tree / "train_listfile.csv", 2, text if callable(text) else replace_cell(index, text))
    with pytest.raises(ValueError, match=message):
        open_mimic3(tree).samples("train", True)[0]


SERIES = {
    "column": (1, lambda row: ["X" if name == "Glucose" else name for name in row], r"has no column 'Glucose'"),
    "column twice": (1, lambda row: [*row, "Glucose"], r"has the column 'Glucose' twice"),
    "more columns": (1, lambda row: [*row, "Mood"], r"has a column 'Mood', which discretizer_config.json does not know"),
    "hours": (1, lambda row: ["Time", *row[1:]], r"the first column must be 'Hours', not 'Time'"),
    "category": (3, replace_cell(4, "5 Asleep"), r"row 3: '5 Asleep' is not a value of Glascow coma scale eye opening; known are"),
    "number": (3, replace_cell(9, "fast"), r"row 3: Heart Rate is 'fast', not a number"),
    "infinite": (3, replace_cell(9, "inf"), r"row 3: Heart Rate is 'inf', not a number"),
    "hour": (3, replace_cell(0, "-2.5"), r"row 3: '-2.5' is not an hour of a stay"),
    "order": (3, replace_cell(0, "0.0"), r"row 3: hour 0.0 comes after hour"),
    "cells": (3, lambda row: row[:-1], r"row 3 has 17 cells instead of 18"),
}  # fmt: skip


@pytest.mark.parametrize("name", SERIES)
def test_wrong_time_series_are_refused_with_file_and_row(tree, name):
    row, change, message = SERIES[name]
    path = first_stay(tree)
    edit(path, row, change)
    with pytest.raises(ValueError, match=message) as raised:
        open_mimic3(tree).samples("train", True)[0]
    assert path.name in str(raised.value)
    assert "\n" not in str(raised.value)
    lines, wrong = check(tree)
    assert wrong == 1
    assert path.name in lines[-1]


def test_empty_stays_are_left_out_and_counted(tree):
    path = first_stay(tree)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    edit(tree / "train_listfile.csv", 4, lambda cells: [cells[0], "0.3", "0;0;0", ";", cells[4], ";"])
    blank = tree / "train" / (tree / "train_listfile.csv").read_text().splitlines()[2].split(",")[0]
    blank.write_text(path.read_text() + "0.5" + "," * 17 + "\n")
    data = open_mimic3(tree)
    assert len(data.splits["train"]) == TINY.train - 3
    assert "2 empty stays are left out, e.g. train_listfile.csv row 2" in data.notes
    assert "1 stays are shorter than an hour and left out, e.g. train_listfile.csv row 4" in data.notes


def test_one_answer_only_is_refused_and_single_phenotypes_are_named(tree):
    for number in range(2, TINY.test + 2):
        edit(tree / "test_listfile.csv", number, lambda cells: [*cells[:4], "0;" + cells[4].split(";", 1)[1], cells[5]])
    assert any("test: 1 of 25 phenotypes have equal labels only" in note for note in open_mimic3(tree).notes)
    for number in range(2, TINY.test + 2):
        edit(tree / "test_listfile.csv", number, replace_cell(2, "47;1;0"))
    with pytest.raises(ValueError, match=r"test_listfile.csv has only one answer for task ihm within the hours"):
        open_mimic3(tree)
    assert list(open_mimic3(tree, names=["los", "pheno"]).tasks) == ["los", "pheno"], "which nobody asked for"


def test_normalisers_are_never_unpickled(tree, tmp_path):
    pickled = tmp_path / "mult_ts1.0.normalizer"
    pickled.write_bytes(b"\x80\x02}.")
    with pytest.raises(ValueError, match="may be a pickle, and nothing is unpickled: fit a normaliser with"):
        open_mimic3(tree, normalizer=pickled)
    np.savez(tmp_path / "short.npz", means=np.zeros(3), stds=np.ones(3))
    with pytest.raises(ValueError, match=r"has means of shape \(3,\) and stds of shape \(3,\); 76 each"):
        open_mimic3(tree, normalizer=tmp_path / "short.npz")
    np.savez(tmp_path / "objects.npz", means=np.array([{}], dtype=object), stds=np.ones(3))
    with pytest.raises(ValueError, match="does not hold numbers"):
        open_mimic3(tree, normalizer=tmp_path / "objects.npz")
    (tmp_path / "none.json").write_text("{}")
    (tmp_path / "empty.npz").touch()
    with pytest.raises(ValueError, match="does not hold numbers"):
        open_mimic3(tree, normalizer=tmp_path / "empty.npz")
    with pytest.raises(ValueError, match="does not hold numbers 'means' and 'stds'"):
        open_mimic3(tree, normalizer=tmp_path / "none.json")


def test_missing_files_are_named(tree):
    assert find_root(tree) == tree
    inner = tree.parent / "outer" / "multitask"
    inner.parent.mkdir()
    tree.rename(inner)
    assert find_root(inner.parent) == inner
    (inner / "val_listfile.csv").unlink()
    with pytest.raises(
        ValueError, match=r"val_listfile.csv does not exist; mimic3-benchmarks' split_train_val writes it"
    ):
        open_mimic3(inner)
    (inner / "discretizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"copy it from mimic3-benchmarks"):
        open_mimic3(inner)
    with pytest.raises(
        ValueError, match=r"has no train_listfile.csv; make it with mimic3-benchmarks' create_multitask"
    ):
        open_mimic3(inner.parent.parent)


# -- networks ----------------------------------------------------------------------------------------------------


def answers(name: str, causal: bool, dynamic_kernels: int = 0):
    """Return a network and a head for 40 hours, in evaluation mode."""
    net = create_series_backbone(name, 5, (4, 4, 4, 4), causal, dynamic_kernels=dynamic_kernels)
    shifted = causal and name != "tcn"
    head = HourHead(4, 2, 40, net.output_stride, shifted, width=4, rates=(1, 6), dropout=0.0, causal=causal)
    return torch.nn.Sequential(net, head).eval()


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "dynamic", "resnet50", "tcn"])
def test_answers_about_an_hour_do_not_look_ahead(name):
    if name == "dynamic":
        network = answers("resnet10", True, 3)
    else:
        network = answers(name, True) if name != "resnet50" else answers_of_bottlenecks()
    x = torch.randn(2, 5, 40)
    expected = network(x)
    assert expected.shape == (2, 2, 40)
    for hour in (0, 7, 8, 23, 39):
        changed = x.clone()
        changed[:, :, hour:] += torch.randn(2, 5, 40 - hour)
        assert torch.equal(network(changed)[..., :hour], expected[..., :hour])
    changed = x.clone()
    changed[:, :, 23] += 1.0
    assert not torch.equal(network(changed)[..., 23], expected[..., 23]), (
        "the hour itself is seen where it ends a position"
    )


def answers_of_bottlenecks():
    net = create_series_backbone("resnet50", 5, (2, 2, 2, 2))
    head = HourHead(8, 2, 40, net.output_stride, True, width=4, rates=(1,), dropout=0.0, causal=True)
    return torch.nn.Sequential(net, head).eval()


@pytest.mark.parametrize("method", ["adashare", "taps", "hard_sharing"])
def test_nor_do_those_of_adapted_networks(method):
    model = taps.adapt(create_series_backbone("tcn", 5, (4, 4, 4, 4)), method)
    for task in ("a", "b"):
        model.add_task(task, head=HourHead(4, 2, 40, width=4, rates=(1, 6), dropout=0.0, causal=True))
    if method == "adashare":
        model.follow({"a": [1, 0, 1, 1, 0, 1], "b": [1] * 6})
    x = torch.randn(2, 5, 40)
    changed = torch.cat([x[..., :23], torch.randn(2, 5, 17)], -1)
    ours, theirs = model.predict(x), model.predict(changed)
    for task in ours:
        assert torch.equal(ours[task][..., :23], theirs[task][..., :23])
        assert not torch.equal(ours[task], theirs[task])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_any_number_of_hours_gets_as_many_answers(causal, stride):
    net = create_series_backbone("resnet10", 3, (2, 2, 2, 2), causal, stride).eval()
    for hours in (8, 9, 16, 17, 31, 47, 161, 170):
        head = HourHead(2, 3, hours, stride, causal, width=2, rates=(1,), dropout=0.0, causal=causal)
        assert head(net(torch.randn(1, 3, hours))).shape == (1, 3, hours)


def test_without_causality_they_do():
    network = answers("resnet18", False)
    x = torch.randn(1, 5, 40)
    changed = x.clone()
    changed[..., 30:] = 0
    assert not torch.equal(network(changed)[..., :20], network(x)[..., :20])


@pytest.mark.parametrize("causal", [True, False])
def test_dynamic_convolutions_mix_kernels_by_the_mean_so_far(causal):
    """One sample and position at a time, in float64."""
    torch.manual_seed(0)
    layer = DynamicConv1d(5, 3, stride=2, kernels=4, causal=causal).double()
    torch.nn.init.normal_(layer.choose.weight, std=30)
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    found = layer(x)
    assert found.shape == (2, 3, 5)
    for sample in range(2):
        for place in range(5):
            mean = x[sample, :, : 2 * place + 1 if causal else None].mean(1)
            hidden = (layer.reduce.weight @ mean).clamp(min=0)
            logits = layer.choose.weight @ hidden + layer.choose.bias
            shares = (logits / 34).exp() / (logits / 34).exp().sum()
            kernel = sum(share * own for share, own in zip(shares, layer.weight, strict=True))
            torch.testing.assert_close(found[sample, :, place], kernel @ x[sample, :, 2 * place])


def test_published_sizes():
    net = create_series_backbone("resnet18", 76, causal=False)
    assert net(torch.zeros(1, 76, 170)).shape == (1, 512, 22)
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(3.86e6, rel=2e-3)


def test_padding_behind_a_stay_changes_nothing_before():
    network = answers("tcn", True)
    x = torch.randn(1, 5, 25)
    torch.testing.assert_close(network(pad(x, (0, 15)))[..., :25], network(x)[..., :25])


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="unknown network for series 'resnet19'; did you mean 'resnet1"):
        create_series_backbone("resnet19", 3)
    with pytest.raises(ValueError, match="a tcn never looks ahead; leave --no-causal out"):
        create_series_backbone("tcn", 3, causal=False)
    with pytest.raises(ValueError, match="a tcn has no dynamic convolutions; leave --dynamic_kernels out"):
        create_series_backbone("tcn", 3, dynamic_kernels=4)


# -- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "network"),
    [("adashare", "resnet10"), ("dynashare", "resnet10"), ("hard_sharing", "tcn"), ("taps", "tcn")],
)
def test_all_phases_give_a_table_and_pictures(made, here, tmp_path, method, network):
    done = here(
        "train_mtl.py", "--dataset", made, *SMALL, "--method", method, "--model_type", network, "--exp_ids", 0,
        "--target_rates", 0.75, "--single_task", "measure" if method == "adashare" else "none",
        *(("--dynamic_kernels", 2) if method == "dynashare" else ()), draws=True,
    )  # fmt: skip
    run = tmp_path / "results/run"
    summary = json.loads((run / "summary.json").read_text())
    assert {task: list(own) for task, own in summary["tasks"].items()} == {
        "ihm": ["auc_roc", "auc_pr"],
        "decomp": ["auc_roc", "auc_pr"],
        "los": ["kappa", "mad"],
        "pheno": ["auc_macro", "auc_micro"],
    }
    model = taps.load(run / "retrain_000")
    assert model.predict(torch.zeros(1, 76, 64))["pheno"].shape == (1, 25, 64)
    assert (run / "predictions.png").is_file()
    assert (run / "policy.png").is_file() == (method in ("adashare", "dynashare"))
    assert "stays are longer than 64 hours" in done.stdout
    assert ("dynashare's gates see the whole series" in done.stdout) == (method == "dynashare")
    if method == "adashare":
        assert summary["delta_t"] is not None
        again = here("train_mtl.py", "--dataset", made, *SMALL, "--model_type", network, check=2)
        assert "continue it with --resume" in again.stderr


def test_published_configuration_is_the_default_where_data_is_named(made):
    options = parse_mtl(["--benchmark", "mimic3", "--dataset", str(made)])
    assert (options.batch_size, options.hours, options.model_type, options.iterations) == (256, 170, "resnet18", 1000)
    assert options.positive_weights == {"ihm": 5.0, "decomp": 500.0, "pheno": 5.0}
    assert options.task_weights == {"ihm": 1.0, "decomp": 4.0, "los": 4.0, "pheno": 1.0}
    generated = parse_mtl(["--benchmark", "mimic3"])
    assert generated.batch_size < 256
    some = parse_mtl(["--benchmark", "mimic3", "--dataset", str(made), "--tasks", "mortality", "los"])
    assert some.tasks == ["ihm", "los"]
    assert some.task_weights == {"ihm": 1.0, "los": 4.0}


MISTAKES = {
    "pretrained": (("--pretrained",), "there are no pretrained weights for series"),
    "looking ahead": (("--model_type", "tcn", "--no-causal"), "a tcn never looks ahead"),
    "task": (("--tasks", "mood"), "unknown task of benchmark mimic3 'mood'"),
    "weights": (("--positive_weights", "los=2"), "unknown yes-or-no task in positive weights 'los'"),
    "no steps": (("--eval_iterations", "0"), "'0' is not a whole number of at least 1"),
    "endless steps": (("--iterations", "infe"), "'inf' is not a number above 0 and at most"),
    "volumes": (("--images", "x"), "--images is for --benchmark volumes"),
    "network": (("--model_type", "resnext50"), "unknown network for series 'resnext50'"),
    "crop": (("--hours", "20"), "has only one answer"),
    "warm-up": (("--iterations", "2e", "--warmup_iterations", "4e"), "are more than --iterations"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_one_line(made, here, tmp_path, name):
    arguments, message = MISTAKES[name]
    done = here("train_mtl.py", "--dataset", made, *SMALL, *arguments, check=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_steps_can_be_passes_over_the_training_stays(made, here, tmp_path):
    where = SMALL.index("--retrain_iterations")
    arguments = [*SMALL[:where], *SMALL[where + 2 :]]
    here("train_mtl.py", "--dataset", made, *arguments, "--method", "hard_sharing", "--retrain_iterations", "0.5e",
         "--retrain_from", "scratch", "--single_task", "none")  # fmt: skip
    settings = json.loads((tmp_path / "results/run/settings.json").read_text())
    assert settings["retrain_iterations"] == TINY.train / 2 / 4


def test_the_known_structure_names_every_pair(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from sharing import SHARED

    for benchmark, tasks in (("mimic3", TASKS), ("volumes", (*CATEGORIES, *NUMBERS))):
        assert set(map(frozenset, SHARED[benchmark])) == set(map(frozenset, combinations(tasks, 2)))
    assert PHENOTYPES == 25
