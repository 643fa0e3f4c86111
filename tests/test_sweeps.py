"""Sweeps: lists are runs. Each run of a sweep is the run that it would be by itself, whatever they share."""

import csv
import json
import shutil
from functools import partial

import pytest
from conftest import SMALL

from taps.cli.options import parse_sequential
from taps.runs import sweep
from taps.storage.run_folder import read_run


def options(*arguments: object):
    return parse_sequential([*map(str, arguments), "--experiment_name", "all"])


def names(*arguments: object) -> list[str]:
    return [own.experiment_name for own in sweep.runs(options(*arguments))]


def test_a_run_for_each_combination():
    assert names("--lam", 1) == ["all"]
    assert names("--lam", 0.25, 2) == ["all/lam0.25", "all/lam2"]
    assert names("--budget", "1%", "3 %") == ["all/1%", "all/3%"]
    assert names("--seeds", 0, 3) == ["all/seed0", "all/seed3"]
    assert names("--seeds", 4) == ["all/seed4"]
    assert names("--lam", 0.5, 1, "--seeds", 0, 1) == [
        "all/lam0.5_seed0", "all/lam0.5_seed1", "all/lam1_seed0", "all/lam1_seed1",
    ]  # fmt: skip
    several = names(
        "--method", "taps", "finetune", "taps_budget", "--lam", 0.5, 1, "--budget", "1%", "3%", "--seeds", 0, 1
    )
    assert several[:2] == ["all/taps_lam0.5_seed0", "all/taps_lam0.5_seed1"]
    assert several[4:6] == ["all/finetune_seed0", "all/finetune_seed1"]
    assert several[6:] == [f"all/taps_budget_{size}_seed{seed}" for size in ("1%", "3%") for seed in (0, 1)]
    own = sweep.runs(options("--lam", 0.5, 1, "--seeds", 2, 3))[-1]
    assert (own.lam, own.seed, own.seeds, own.method, own.budget) == (1.0, 3, None, "taps", None)


def test_runs_are_added_to_those_of_one_value(tmp_path):
    """Which the names of the first ones do not have."""
    for name, method, lam in (("seed0", "taps", 1.0), ("seed1", "taps", 1.0), ("mine", "taps", 3.0)):
        (tmp_path / "all" / name).mkdir(parents=True)
        settings = {"method": method, "lam": lam, "budget": None, "seed": int(name == "seed1")}
        (tmp_path / "all" / name / "settings.json").write_text(json.dumps(settings))
    added = partial(names, "--result_path", tmp_path, "--resume", "--seeds", 0, 2)
    assert added("--lam", 1) == ["all/seed0", "all/seed2"]
    assert added("--lam", 2) == ["all/lam2_seed0", "all/lam2_seed2"]
    assert added("--method", "finetune") == ["all/finetune_seed0", "all/finetune_seed2"]
    assert added("--method", "taps_budget", "--budget", "1%")[0] == "all/taps_budget_1%_seed0"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--lam", 1, "1.0"), "--lam names one value twice"),
        (("--seeds", 1, 1), "--seeds names one value twice: 1 and 1"),
        (("--method", "taps", "taps"), "--method names one value twice"),
        (("--method", "finetune", "--lam", 1, 2), "--lam has no effect with method finetune"),
        (("--method", "taps", "finetune", "--budget", "1%"), "--budget is not for method taps, finetune"),
    ],
)
def test_a_list_that_says_nothing_is_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        sweep.runs(options(*arguments))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--method", "taps", "tabs"), "'tabs' is not one of (did you mean taps?)"),
        (("--seed", 1, "--seeds", 1), "--seed and --seeds exclude each other"),
        (("--lam", 1, "x"), "argument --lam: 'x' is not a number"),
        (("--budget", "1%", "--lam", 1, 2), "--lam is not used with a budget"),
    ],
)
def test_mistakes_are_one_line(arguments, reason, here):
    assert reason in here("train_sequential.py", *arguments, check=2).stderr


@pytest.mark.slow
def test_runs_of_a_sweep_equal_single_runs_and_share_the_warm_up(tree, here, tmp_path):
    line = ("train_sequential.py", "--dataset", tree / "paint", *SMALL, "--epochs", 3)
    line += ("--warmup_epochs", 1.5, "--settle_epochs", 0)
    done = here(*line, "--lam", 0, 8, "--seeds", 0, 1, "--experiment_name", "sweep")
    root = tmp_path / "results/sweep"
    runs = ["lam0_seed0", "lam0_seed1", "lam8_seed0", "lam8_seed1"]
    assert sorted(path.name for path in root.iterdir()) == [*runs, "summary.csv", "trade_off.png"]
    for lam, seed in ((0, 1), (8, 0)):
        here(*line, "--lam", lam, "--seed", seed, "--experiment_name", "alone", "--overwrite")
        stored = [
            path / "paint/task.safetensors" for path in (root / f"lam{lam}_seed{seed}", tmp_path / "results/alone")
        ]
        assert stored[0].read_bytes() == stored[1].read_bytes()
    # the second λ of a seed goes on from the middle of the second epoch
    assert [row["epoch"] for row in read_run(root / "lam0_seed0").metrics] == [1, 2, 3]
    assert [row["epoch"] for row in read_run(root / "lam8_seed0").metrics] == [2, 3]
    with (root / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == runs
    assert {row["lam"] for row in rows} == {"0.0", "8.0"}
    for row in rows:
        assert float(row["accuracy:paint"]) == read_run(root / row["run"]).summary["mean_accuracy"]
    table = [text.split() for text in done.stdout.splitlines() if text.startswith("λ ")]
    assert [row[1:4] for row in table[-2:]] == [["8", "taps", "2"], ["0", "taps", "2"]]
    assert all(row[5] == "±" for row in table[-2:])
    here(*line, "--lam", 2, "--seeds", 0, "--experiment_name", "sweep", "--resume")
    assert (root / "lam2_seed0/summary.json").is_file()


@pytest.mark.slow
def test_methods_side_by_side_in_one_table(tree, here, tmp_path):
    line = ("train_sequential.py", "--dataset", tree / "paint", *SMALL, "--epochs", 2, "--experiment_name", "methods")
    table = here(*line, "--method", "taps", "taps_budget", "linear_probe", "--budget", "50%").stdout
    found = sorted(path.name for path in (tmp_path / "results/methods").iterdir() if path.is_dir())
    assert found == ["linear_probe", "taps", "taps_budget_50%"]
    assert next(row for row in table.splitlines() if row.startswith("50%")).split()[1] == "taps_budget"


@pytest.mark.slow
def test_a_joint_sweep(tree, here, tmp_path):
    line = (
        "train_joint.py",
        "--dataset",
        tree,
        *SMALL,
        "--epochs",
        1,
        "--warmup_epochs",
        0,
        "--experiment_name",
        "joint",
        "--shared_epochs",
        1,
    )
    here(*line, "--seeds", 0, 1)
    here(*line[:-4], "--experiment_name", "lite", "--variant", "lite", "--lam", 0.5, 4)
    for run in ("joint/seed0", "joint/seed1", "lite/lam0.5", "lite/lam4"):
        assert (tmp_path / "results" / run / "summary.json").is_file()


@pytest.mark.slow
def test_multi_task_runs_over_seeds_and_policies(here, tmp_path):
    from test_mtl import SMALL as TINY

    from taps.data.generated.scenes import SceneRecipe, make_scenes

    make_scenes(tmp_path / "scenes", SceneRecipe(size=(32, 32), train=12, val=2, test=3))
    line = ("train_mtl.py", "--dataset", tmp_path / "scenes", *TINY[:-1], "sweep", "--exp_ids", 0)
    here(*line, "--seeds", 0)
    root = tmp_path / "results/sweep"
    assert "add runs with --resume" in here(*line, "--seeds", 1, check=2).stderr
    done = here(*line, "--seeds", 1, "--resume")
    assert sorted(path.name for path in root.iterdir()) == ["seed0", "seed1", "seeds.png", "summary.csv"]
    here(*line[:-3], "alone", "--exp_ids", 0, "--seed", 1)
    alone, own = (
        json.loads((path / "summary.json").read_text()) for path in (tmp_path / "results/alone", root / "seed1")
    )
    assert all(alone[key] == own[key] for key in ("tasks", "delta_t", "executed_blocks", "macs_x_single", "seed"))
    assert "adashare" in done.stdout
    assert "±" in done.stdout
    assert [row.split(",")[0] for row in (root / "summary.csv").read_text().split()] == ["run", "seed0", "seed1"]
    policies = [root / f"seed{seed}/policy/policy.json" for seed in (0, 1)]
    more = ("--phases", "retrain", "test", "--retrain_from", "scratch", "--policy", *policies)
    here(*line[:-3], "policies", "--exp_ids", 0, *more, "--single_task", "measure")
    with (tmp_path / "results/policies/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["policy1", "policy2"]
    assert [row["policy"] for row in rows] == list(map(str, policies))
    found = (tmp_path / "results/policies" / run / "single_task" for run in ("policy1", "policy2"))
    assert [path.is_dir() for path in found] == [True, False], "the second run has the first one's reference"
    assert "--seed and --seeds exclude" in here(*line, "--seeds", 0, "--seed", 1, check=2).stderr
    assert "--seeds names one value twice" in here(*line, "--seeds", 1, 1, check=2).stderr


@pytest.mark.slow
def test_a_sweep_is_replaced_only_by_one_that_can_run(tree, here, tmp_path):
    line = ("train_sequential.py", "--dataset", tree / "paint", *SMALL, "--epochs", 1, "--warmup_epochs", 0)
    root = tmp_path / "results/s"
    wrong = here(*line, "--lam", 1, 2, "--experiment_name", "s", "--layers", "nothing", check=2)
    assert "matches none" in wrong.stderr
    assert not root.exists()
    here(*line, "--lam", 1, 2, "--experiment_name", "s")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    here(*line, "--lam", 1, 2, "--experiment_name", "s", "--overwrite", "--layers", "nothing", check=2)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    here(*line, "--method", "finetune", "--resume", "--experiment_name", "s")
    assert (root / "finetune/summary.json").is_file()
    here(*line, "--lam", 1, "--experiment_name", "s/mine")
    refused = here(*line, "--lam", 1, 2, "--experiment_name", "s", "--overwrite", check=2).stderr
    assert "also holds the run mine; move that away before overwriting" in refused
    assert (root / "mine/summary.json").is_file()


def test_close_values_have_different_names():
    names = [
        own.experiment_name
        for own in sweep.runs(parse_sequential(["--dataset", ".", "--lam", "0.1234567", "0.12345671", "1"]))
    ]
    assert [name.rpartition("/")[2] for name in names] == ["lam0.1234567", "lam0.12345671", "lam1"]


def test_runs_are_added_only_to_their_like(tree, here, tmp_path):
    arguments = ("--dataset", tree / "paint", *SMALL, "--epochs", 1, "--experiment_name", "s")
    here("train_sequential.py", *arguments, "--seeds", 0)
    done = here(
        "train_sequential.py", *arguments[:-4], "--epochs", 2, *arguments[-2:], "--resume", "--seeds", 1, check=2
    )
    assert "has other settings: epochs=2 (was 1)" in done.stderr
    assert not (tmp_path / "results/s/seed1").exists()
    others = tmp_path / "others" / "paint"
    shutil.copytree(tree / "paint", others)
    next(others.glob("train/*/*")).unlink()
    moved = ("--dataset", others, *arguments[2:])
    assert "was trained on other images of task paint" in here(
        "train_sequential.py", *moved, "--resume", "--seeds", 1, check=2
    ).stderr  # fmt: skip
    assert not (tmp_path / "results/s/seed1").exists()
    here("train_sequential.py", *arguments, "--resume", "--seeds", 1)
    assert len((tmp_path / "results/s/summary.csv").read_text().splitlines()) == 3


def test_jobs_wait_only_for_the_one_that_trains_their_start(tmp_path):
    from taps.runs.parallel import Job, _next

    start = tmp_path / "0_sgd.safetensors"
    first, second, other = (Job(None, "t", 1, "", path) for path in (start, start, tmp_path / "1.safetensors"))
    assert _next([second, other], [first]) is other
    start.touch()
    assert _next([second, other], [first]) is second


@pytest.mark.slow
def test_a_stopped_sweep_is_finished_before_it_is_extended(tree, here, tmp_path, stop_at):
    line = ("train_sequential.py", "--dataset", tree / "paint", *SMALL, "--experiment_name", "s", "--warmup_epochs", 1)
    line += ("--lam", 0.5, 4)
    with stop_at(7):
        here(*line, "--epochs", 2, check=143)
    wrong = here(*line, "--epochs", 3, "--resume", check=2).stderr
    assert "results/s was stopped: finish it with --resume --epochs 2, and extend it then" in wrong
    here(*line, "--epochs", 2, "--resume")
    here(*line, "--epochs", 3, "--resume")
    runs = [json.loads((tmp_path / "results/s" / name / "settings.json").read_text()) for name in ("lam0.5", "lam4")]
    assert [run["epochs"] for run in runs] == [3, 3]
