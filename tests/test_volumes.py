"""Volumes: table and lists, error messages, division of subjects, and the benchmark on the command line."""

import csv
import itertools
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import taps
from options import parse_mtl
from taps.data.checks import check
from taps.data.generated.brain_volumes import CATEGORIES, NUMBERS, BrainRecipe, make_brain, make_brains
from taps.data.multi_label import IGNORE_INDEX, split_train
from taps.data.records.subjects import divide, join_groups, list_path, read_table
from taps.data.records.volumes import open_volumes, read_volume, volume_shape
from taps.networks.resnet_nd import create_volume_backbone

TINY = BrainRecipe(side=16, train=24, val=12, test=12, missing_numbers=0.05, missing_categories=0.05, seed=1)
SMALL = (
    "--channels", 4, 4, 4, 4, "--model_type", "resnet10", "--batch_size", 4, "--iterations", 12, "--warmup_iterations", 2,
    "--weight_iterations", 1, "--policy_iterations", 1, "--retrain_iterations", 4, "--eval_iterations", 3, "--curriculum_speed", 1,
    "--settle_iterations", 2, "--policy_fraction", 0.3, "--device", "cpu", "--experiment_name", "run", "--exp_ids", 0,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("volumes") / "brains"
    make_brains(root, TINY)
    return root


@pytest.fixture
def tree(made, tmp_path) -> Path:
    """A copy of the data that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "tree"))


def opened(root: Path, cat=CATEGORIES, num=NUMBERS, **options):
    return open_volumes(root / "images", root / "labels.csv", cat, num, **options)


def read_rows(root: Path) -> list[dict[str, str]]:
    with open(root / "labels.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(root: Path, rows: list[dict[str, str]]) -> None:
    with open(root / "labels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def names(root: Path, split: str) -> list[str]:
    return list_path(root / "images", split).read_text().split()


def set_cells(root: Path, column: str, change, split: str) -> None:
    """Change a column's cells for the subjects in a split."""
    subjects = {name.removesuffix(".npy") for name in names(root, split)}
    rows = read_rows(root)
    for row in rows:
        if row["subjectkey"] in subjects:
            row[column] = change(row[column])
    write_rows(root, rows)


def test_labels_are_those_of_the_table_and_scales_those_of_the_training_subjects(made):
    data = opened(made)
    rows = {row["subjectkey"]: row for row in read_rows(made)}
    assert list(data.tasks) == [*CATEGORIES, *NUMBERS]
    ages = [float(rows[s]["interview_age"]) for s in data.splits["train"] if rows[s]["interview_age"]]
    assert data.tasks["interview_age"].scale == pytest.approx((np.mean(ages), np.std(ages)))
    assert data.tasks["diagnosis"].names == ("high", "low", "middle")
    assert data.tasks["sex"].names == ("1", "2")
    for split in ("train", "val", "test"):
        samples = data.samples(split, False)
        for index, subject in enumerate(data.splits[split]):
            _, labels = samples[index]
            for name in CATEGORIES:
                cell = rows[subject][name]
                assert int(labels[name]) == (data.tasks[name].names.index(cell) if cell else IGNORE_INDEX)
            for name in NUMBERS:
                cell, (mean, std) = rows[subject][name], data.tasks[name].scale
                assert (
                    (float(labels[name]) * std + mean == pytest.approx(float(cell))) if cell else labels[name].isnan()
                )


def test_targets_with_any_name_become_tasks_with_names_fit_for_files(tree):
    rows = [{**row, "race.ethnicity": row["sex"], "age (years)": row["interview_age"]} for row in read_rows(tree)]
    write_rows(tree, rows)
    data, plain = opened(tree, ("race.ethnicity",), ("age (years)",)), opened(tree, ("sex",), ("interview_age",))
    assert list(data.tasks) == [task.name for task in data.tasks.values()] == ["race_ethnicity", "age_years"]
    for (_, labels), (_, expected) in zip(data.samples("test", False), plain.samples("test", False), strict=True):
        assert labels["race_ethnicity"] == expected["sex"]
        assert torch.equal(labels["age_years"].nan_to_num(), expected["interview_age"].nan_to_num())


def test_volumes_are_scaled_to_the_unit_range_and_brought_to_a_size(made):
    x, _ = opened(made).samples("train", True)[0]
    raw = np.load(made / "images" / names(made, "train")[0]).astype(np.float64)
    np.testing.assert_allclose(x[0], (raw - raw.min()) / (raw.max() - raw.min()), atol=1e-6)
    small, _ = opened(made, side=8).samples("train", True)[0]
    assert small.shape == (1, 8, 8, 8)
    assert 0 <= small.min() <= small.max() <= 1


def test_nifti_is_read_like_arrays(tree):
    images = tree / "images"
    for split in ("train", "val", "test"):
        lines = []
        for index, name in enumerate(names(tree, split)):
            suffix = ".nii.gz" if index % 2 else ".nii"
            array = np.load(images / name)
            nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), np.eye(4)), images / name.replace(".npy", suffix))
            (images / name).unlink()
            lines.append(name.replace(".npy", suffix))
        list_path(images, split).write_text("\n".join(lines))
    data = opened(tree)
    assert data.size == (16, 16, 16)
    assert len(data.splits["train"]) == TINY.train
    data.samples("train", True)[1]
    (images / names(tree, "train")[1]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"\.nii\.gz cannot be read"):
        opened(tree)


def test_what_is_left_out_is_counted_and_named(tree):
    images = tree / "images"
    train, rows = names(tree, "train"), read_rows(tree)
    (images / train[0]).unlink()
    rows = [row for row in rows if row["subjectkey"] != train[1].removesuffix(".npy")]
    alone = train[2].removesuffix(".npy")
    for row in rows:
        if row["subjectkey"] == alone:
            row.update(dict.fromkeys((*CATEGORIES, *NUMBERS), "NaN"))
    write_rows(tree, rows)
    data = opened(tree)
    assert len(data.splits["train"]) == TINY.train - 3
    notes = "\n".join(data.notes)
    assert "1 listed subjects have no volume and are left out, e.g. image_train_SubjectList.txt row 1" in notes
    assert (
        "1 listed subjects have no row in labels.csv and are left out, e.g. image_train_SubjectList.txt row 2" in notes
    )
    assert "1 subjects have no value of any target and are left out, e.g. labels.csv row" in notes
    for name in (*CATEGORIES, *NUMBERS):
        missing = sum(not row[name] or row[name] == "NaN" for row in rows if row["subjectkey"] + ".npy" != train[0])
        if missing:
            assert f"{missing} subjects have no value of {name} and take no part in it" in notes


def test_categories_that_no_training_subject_has_are_left_out_and_named(tree):
    set_cells(tree, "diagnosis", lambda cell: "rare" if cell == "low" else cell, "test")
    data = opened(tree)
    count = sum(row["diagnosis"] == "rare" for row in read_rows(tree))
    note = next(note for note in data.notes if "diagnosis in test" in note)
    assert note.startswith(
        f"{count} values of diagnosis in test are in no training row and are left out, e.g. 'rare' in"
    )
    labels = [int(data.samples("test", False)[index][1]["diagnosis"]) for index in range(TINY.test)]
    assert labels.count(IGNORE_INDEX) >= count
    assert data.tasks["diagnosis"].channels == 3


MISTAKES = {
    "no target": (lambda root: None, {"cat": (), "num": ()}, r"choose the targets with --cat_target, --num_target"),
    "name": (lambda root: None, {"cat": ("race.eth",)}, r"unknown column of .*'race.eth'"),
    "families in two lists": (
        lambda root: set_cells(root, "site_id_l", lambda cell: "one", "test"),
        {"group": ["site_id_l"]}, r"are alike in site_id_l: divide the subjects again with --group, or leave --group out",
    ),
    "list of another encoding": (
        lambda root: list_path(root / "images", "val").write_bytes(b"\xff.npy"), {}, r"image_val_SubjectList.txt cannot be read",
    ),
    "twice": (lambda root: None, {"cat": ("sex",), "num": ("sex",)}, r"target 'sex' is given twice"),
    "column": (
        lambda root: None, {"cat": ("sexx",)}, r"unknown column of .*labels.csv 'sexx'; did you mean 'sex'\?",
    ),
    "subjects' column": (
        lambda root: None, {"subject_column": "id"}, r"unknown column of .*labels.csv 'id'.*--subject_column",
    ),
    "number": (
        lambda root: set_cells(root, "picvocab", lambda cell: "many", "train"), {}, r"labels.csv row \d+: picvocab is 'many'",
    ),
    "constant": (
        lambda root: set_cells(root, "picvocab", lambda cell: "1", "train"), {}, r"picvocab has fewer than two different values",
    ),
    "one class": (
        lambda root: set_cells(root, "sex", lambda cell: "1", "val"), {},
        r"sex has only '1' among the 12 subjects of image_val_SubjectList.txt; divide them again with --stratify sex",
    ),
    "no list": (
        lambda root: list_path(root / "images", "val").unlink(), {}, r"image_val_SubjectList.txt does not exist; make the lists",
    ),
    "in two lists": (
        lambda root: list_path(root / "images", "val").write_text("\n".join(names(root, "train"))), {},
        r"image_val_SubjectList.txt row 1: subject '.*' is in image_train_SubjectList.txt too",
    ),
    "no volume's name": (
        lambda root: list_path(root / "images", "val").write_text("a.png\n"), {}, r"val_SubjectList.txt row 1: 'a.png'",
    ),
    "row twice": (
        lambda root: write_rows(root, [*read_rows(root), read_rows(root)[0]]), {}, r"labels.csv row 50: subject '.*' was in row 2",
    ),
    "cells": (
        lambda root: (root / "labels.csv").write_text("subjectkey,sex\na,1,2\n"), {"num": ()}, r"row 2 has 3 cells instead of 2",
    ),
    "shape": (
        lambda root: np.save(root / "images" / names(root, "test")[3], np.zeros((16, 16, 12))), {},
        r"has shape \(16, 16, 12\), the others \(16, 16, 16\): resample it, .* --mixed_shapes",
    ),
    "dimensions": (
        lambda root: np.save(root / "images" / names(root, "test")[3], np.zeros((16, 16))), {"mixed": True}, r"has shape",
    ),
    "other classes": (
        lambda root: set_cells(root, "sex", lambda cell: "x", "val"), {},
        r"sex has no value that training subjects have among the 12 subjects of image_val_SubjectList.txt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_with_file_and_row(tree, name):
    damage, options, message = MISTAKES[name]
    damage(tree)
    with pytest.raises(ValueError, match=message) as raised:
        opened(tree, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[["a"]]]), "holds <U1 of shape"),
        (np.full((2, 2, 2), np.nan), "holds values that are not finite"),
        (np.array([{}], dtype=object), "cannot be read"),
    ],
)
def test_volumes_that_are_none_are_refused(tmp_path, array, message):
    np.savez(tmp_path / "several.npz", a=np.zeros(3))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    with pytest.raises(ValueError, match="holds several arrays; a volume is one"):
        volume_shape(tmp_path / "several.npy")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"text.npy cannot be read: it is not an .npy file"):
        volume_shape(tmp_path / "text.npy")
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path / "a.npy")


def test_other_shapes_can_be_allowed(tree):
    np.save(tree / "images" / names(tree, "test")[3], np.random.default_rng(0).random((16, 12, 20)))
    data = opened(tree, mixed=True)
    assert data.samples("test", False)[3][0].shape == (1, 16, 16, 16)


# -- dividing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """200 subjects: a fifth with a rare value, families of one to three at two ages, three of the families over two sites."""
    random = np.random.default_rng(0)
    lines = ["subjectkey,kind,age,family,site"]
    family = 0
    for index in range(200):
        family += random.random() < 0.7
        lines.append(f"s{index},{'rare' if index % 5 == 0 else 'usual'},{random.normal():.3f},{family},{index % 9}")
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(lines) + "\n")
    return read_table(path)


def test_parts_are_disjoint_shuffled_stratified_and_keep_families_together(table):
    subjects = list(table.rows)
    parts = divide(table, subjects, 0.15, 0.2, seed=0, stratify=["kind", "age"], group=["family"])
    assert sorted(itertools.chain(*parts.values())) == sorted(subjects)
    assert len(parts["val"]) == pytest.approx(30, abs=4)
    assert len(parts["test"]) == pytest.approx(40, abs=4)
    for own in parts.values():
        assert np.mean([table.cell(s, "kind") == "rare" for s in own]) == pytest.approx(0.2, abs=0.1)
    families = [{table.cell(s, "family") for s in own} for own in parts.values()]
    assert not families[0] & families[1] | families[0] & families[2] | families[1] & families[2]
    assert parts == divide(table, subjects, 0.15, 0.2, seed=0, stratify=["kind", "age"], group=["family"])
    assert parts != divide(table, subjects, 0.15, 0.2, seed=1, stratify=["kind", "age"], group=["family"])
    assert max(int(s[1:]) for s in parts["test"]) > 150, "not the first in the order of names"


def test_groups_join_over_all_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("subjectkey,family,site\na,1,x\nb,1,y\nc,2,y\nd,3,z\ne,,z\nf,,\n")
    own = dict(zip("abcdef", join_groups(read_table(path), list("abcdef"), ["family", "site"]), strict=True))
    assert own["a"] == own["b"] == own["c"]
    assert own["d"] == own["e"]
    assert len({own["a"], own["d"], own["f"]}) == 3


def test_rare_and_textual_strata_are_spread(tmp_path):
    path = tmp_path / "t.csv"
    lines = [f"s{index},{'x' if index < 12 else 'y'},site{index % 15}" for index in range(30)]
    path.write_text("subjectkey,sex,site\n" + "\n".join(lines) + "\n")
    table = read_table(path)
    for column in ("sex", "site"):
        parts = divide(table, list(table.rows), 0.2, 0.2, 0, stratify=[column])
        assert [len(own) for own in parts.values()] == pytest.approx([18, 6, 6], abs=4)
    none = tmp_path / "none.csv"
    none.write_text("subjectkey,diagnosis\na,None\nb,ADHD\nc,NaN\n")
    assert [read_table(none).cell(s, "diagnosis") for s in "abc"] == ["None", "ADHD", None], "controls are a category"


def test_the_training_subjects_are_divided_by_families_too(made):
    data = split_train(opened(made, group=["rel_family_id"]), 0.1, 0.4, seed=0)
    assert len(set(data.groups.values())) < len(data.groups), "some have siblings"
    rows = {row["subjectkey"]: row["rel_family_id"] for row in read_rows(made)}
    weights, policy = ({rows[s] for s in data.splits[part]} for part in ("weights", "policy"))
    assert not weights & policy
    assert len(data.splits["weights"]) + len(data.splits["policy"]) == TINY.train


def test_dividing_as_a_command(tree, here):
    arguments = ["taps data", "subjects", "--images", tree / "images", "--labels", tree / "labels.csv"]
    arguments += ["--group", "rel_family_id"]
    assert "exists; replace the lists with --overwrite" in here(*arguments, check=2).stderr
    before = names(tree, "train")
    done = here(*arguments, "--stratify", "sex", "--test_size", "0.3", "--overwrite", "--seed", "5")
    assert f"{len(names(tree, 'train'))} train, " in done.stdout
    assert names(tree, "train") != before
    lists = {split: names(tree, split) for split in ("train", "val", "test")}
    assert sorted(itertools.chain(*lists.values())) == sorted(path.name for path in (tree / "images").glob("*.npy"))
    assert len(lists["test"]) == pytest.approx(0.3 * 48, abs=3)
    assert "did you mean 'sex'" in here(*arguments, "--stratify", "sexes", "--overwrite", check=2).stderr


def test_too_few_groups_are_refused(table):
    with pytest.raises(ValueError, match="1 groups of subjects leave none for train, val or test"):
        divide(table, list(table.rows), 0.1, 0.1, 0, group=["kind", "site"])


# -- generated volumes -------------------------------------------------------------------------------------------


def test_grain_is_seen_in_a_few_voxels_and_accord_in_no_lobe_alone():
    random = np.random.default_rng(0)
    factors = random.normal(size=(300, 2))
    volumes = np.stack([make_brain(random, accord, grain, 24, 0.15) for accord, grain in factors]) / 80.0
    lobes = [volumes[:, place, 10:14, 10:14].mean((1, 2, 3)) - 1 for place in (slice(6, 9), slice(15, 18))]
    steps = np.abs(np.diff(volumes[:, 10:14, 10:14, 10:14], axis=2)).mean((1, 2, 3))

    def follows(values, factor):
        return np.corrcoef(values, factors[:, factor])[0, 1]

    assert follows(steps, 1) > 0.8
    assert follows(lobes[0] * lobes[1], 0) > 0.85
    assert max(abs(follows(values, 0)) for values in (*lobes, steps)) < 0.2
    assert max(abs(follows(values, 1)) for values in (*lobes, lobes[0] * lobes[1])) < 0.2


def test_each_target_follows_its_factor_and_categories_are_rarer(tmp_path):
    make_brains(tmp_path / "many", BrainRecipe(side=16, train=240, val=6, test=6, label_noise=0.0))
    with open(tmp_path / "many/labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, category, order in (
        ("interview_age", "diagnosis", ["low", "middle", "high"]),
        ("picvocab", "sex", ["2", "1"]),
    ):
        both = [row for row in rows if row[number] and row[category]]
        values = sorted(both, key=lambda row: float(row[number]))
        places = [order.index(row[category]) for row in values]
        assert sum(a > b for a, b in itertools.pairwise(places)) <= 3  # numbers are rounded
        assert set(places) == set(range(len(order)))
        shares = [sum(not row[name] for row in rows[:240]) / 240 for name in (number, category)]
        assert shares == pytest.approx([0.4, 0.75], abs=0.1)


def test_generated_trees_are_the_same_again(made):
    again = made.parent / "again"
    make_brains(again, TINY)
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert all((made / path).read_bytes() == (again / path).read_bytes() for path in files)


def test_check_names_what_is_damaged(tree):
    assert check(tree)[1] == 0
    victim, gone = names(tree, "test")[:2]
    (tree / "images" / victim).write_bytes(b"\x93NUMPY")
    (tree / "images" / gone).unlink()
    lines, wrong = check(tree)
    assert wrong == 2
    assert any(victim in line for line in lines)
    assert any(gone in line for line in lines)


# -- networks and the command ------------------------------------------------------------------------------------


def test_published_network():
    with torch.device("meta"):
        net = create_volume_backbone("resnet50")
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(46.2e6, rel=2e-3)
    assert net.num_features == 2048
    with pytest.raises(ValueError, match="unknown network for volumes 'resnet49'"):
        create_volume_backbone("resnet49")


@pytest.mark.parametrize("method", ["adashare", "dynashare", "taps"])
def test_all_phases_give_a_table_and_pictures(made, here, tmp_path, method):
    done = here(
        "train_mtl.py", "--benchmark", "volumes", "--images", made / "images", "--labels", made / "labels.csv", "--cat_target",
        *CATEGORIES, "--num_target", *NUMBERS, "--input_size", 16, *SMALL, "--method", method, "--single_task",
        "measure" if method == "adashare" else "none", draws=True,
    )  # fmt: skip
    run = tmp_path / "results/run"
    summary = json.loads((run / "summary.json").read_text())
    assert {task: list(own) for task, own in summary["tasks"].items()} == {
        **{name: ["accuracy", "balanced_accuracy"] for name in CATEGORIES},
        **{name: ["mae", "r2"] for name in NUMBERS},
    }
    assert "take no part in it" in done.stdout
    model = taps.load(run / "retrain_000")
    assert set(model.predict(torch.zeros(1, 1, 16, 16, 16))) == set(summary["tasks"])
    assert (run / "predictions.png").is_file()
    assert (run / "policy.png").is_file() == (method != "taps")
    if method == "adashare":
        assert summary["delta_t"] is not None


@pytest.mark.parametrize(
    "targets", [("--num_target", "interview_age"), ("--cat_target", "sex")], ids=["one number", "one category"]
)
def test_one_target_alone(made, here, tmp_path, targets):
    here(
        "train_mtl.py", "--benchmark", "volumes", "--images", made / "images", "--labels", made / "labels.csv", *targets,
        "--input_size", 16, *SMALL, "--method", "single_task",
    )  # fmt: skip
    assert list(json.loads((tmp_path / "results/run/summary.json").read_text())["tasks"]) == [targets[1]]


def test_published_configuration_is_the_default_where_data_is_named():
    options = parse_mtl(["--benchmark", "volumes", "--images", "a", "--labels", "b", "--cat_target", "sex"])
    assert (options.model_type, options.input_size, options.lr, options.base_lr) == ("resnet50", 96, 1e-3, 1e-6)
    assert (options.iterations, options.warmup_iterations) == ("69e", "9e")
    assert parse_mtl(["--benchmark", "volumes"]).model_type == "resnet18"
    assert parse_mtl(["--benchmark", "volumes", "--cat_target", "diagnosis"]).task_weights == {"diagnosis": 2.0}


COMMAND_MISTAKES = {
    "one of two": (("--images", "x"), "--images and --labels go together"),
    "dataset": (
        ("--dataset", "x", "--images", "x", "--labels", "y"),
        "takes --images and --labels instead of --dataset",
    ),
    "folder": (("--images", "x", "--labels", "LABELS", "--cat_target", "sex"), "x does not exist"),
    "table": (("--images", "x", "--labels", "y.csv", "--cat_target", "sex"), "y.csv does not exist"),
    "generated column": (
        ("--cat_target", "sexes"),
        "unknown column of the generated table 'sexes'; did you mean 'sex'",
    ),
    "one default target": (("--cat_target", "sex", "--tasks", "sexes"), "unknown task of benchmark volumes 'sexes'"),
    "target": (("--images", "IMAGES", "--labels", "LABELS", "--num_target", "age"), "unknown column of"),
}


@pytest.mark.parametrize("name", COMMAND_MISTAKES)
def test_mistakes_end_with_one_line(made, here, tmp_path, name):
    arguments, message = COMMAND_MISTAKES[name]
    places = {"IMAGES": made / "images", "LABELS": made / "labels.csv"}
    done = here("train_mtl.py", "--benchmark", "volumes", *SMALL, *(places.get(a, a) for a in arguments), check=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()
    assert (tmp_path / "datasets").exists() == (name == "one default target")


def test_volumes_of_nifti_have_one_orientation(tmp_path):
    """One volume stored with its axes in another order and direction."""
    from taps.data.records.volumes import read_volume, volume_shape

    values = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    turned = np.flip(values, 0).transpose(1, 2, 0)
    affine = np.array([[0, 0, -1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=float)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(turned), affine), tmp_path / "b.nii.gz")
    for name in ("a.nii", "b.nii.gz"):
        assert volume_shape(tmp_path / name) == (2, 3, 4)
        assert np.array_equal(read_volume(tmp_path / name), values), name
