"""``train_mtl.py`` on the command line, with three choices per layer and with sparse deltas of a base task."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file
from test_mtl import SMALL, same

import taps
from taps.data.generated.scenes import SceneRecipe, make_scenes

VIT = (
    "--method", "sparse_delta", "--model_type", "test_vit", "--patch_size", 8, "--head_width", 4, "--head_rates", 1, "--crop", 32,
    "--batch_size", 2, "--iterations", 4, "--retrain_iterations", 4, "--pull_iterations", 2, "--eval_iterations", 2,
    "--device", "cpu", "--density", "5%", "--experiment_name", "run",
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sub") / "scenes"
    make_scenes(root, SceneRecipe(size=(32, 32), train=12, val=4, test=3))
    return root


@pytest.fixture(scope="module")
def complete(scenes, tmp_path_factory):
    """A finished run of sparse deltas, and its output."""
    folder = tmp_path_factory.mktemp("complete_sub")
    return folder, run_here("train_mtl.py", "--dataset", scenes, *VIT, "--base_task", "normals", cwd=folder)


def test_sub_tasks_leave_a_table_reuse_and_small_files(complete):
    folder, done = complete
    run = folder / "results/run"
    names = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    assert names == {
        "settings.txt", "settings.yaml", "settings.json", "summary.json", "reuse.json",
        "single_task", "sub_task_000", "retrain_000",
        "predictions.png",
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary["single_task"]["normals"] == summary["tasks"]["normals"], "the base task is the base"
    own = json.loads((run / "retrain_000/summary.json").read_text())["own_weights"]
    assert own["normals"] == 0.0
    assert all(0 < own[task] <= 0.05 for task in ("semseg", "depth"))
    maps = taps.load(run / "retrain_000").predict(torch.zeros(1, 3, 32, 32))
    assert {task: tuple(own.shape) for task, own in maps.items()} == {
        "depth": (1, 1, 4, 4), "normals": (1, 3, 4, 4), "semseg": (1, 7, 4, 4),
    }  # fmt: skip
    reuse = json.loads((run / "reuse.json").read_text())
    assert [row["error"] for row in reuse["rows"]] == [0.0, 0.02, 0.05, 0.1, 0.2]
    assert reuse["base_task"] == "normals"
    assert "error 0.05: semseg" in done.stdout
    description = json.loads((run / "retrain_000/depth/task.json").read_text())
    assert set(description["encodings"].values()) == {"sparse32"}
    base = load_file(run / "single_task/normals/base.safetensors")
    assert all(
        torch.equal(tensor, base[name]) for name, tensor in load_file(run / "retrain_000/base.safetensors").items()
    )
    phases = [json.loads(line)["phase"] for line in (run / "sub_task_000/depth/metrics.jsonl").read_text().splitlines()]
    assert phases == ["gates", "gates", "support", "support", "activations"]


def test_stopped_anywhere_and_continued_it_ends_the_same(complete, scenes, here, tmp_path, stop_at, monkeypatch):
    """The first sub-task is stopped in each of its phases: gates, support and activations."""
    monkeypatch.setattr("taps.runs.sub_tasks.ERRORS", (0.0,))
    arguments = ("--dataset", scenes, *VIT, "--base_task", "normals", "--phases", "retrain")
    with stop_at(32):
        here("train_mtl.py", *arguments, check=143)
    for steps in (3, 4):
        with stop_at(steps):
            here("train_mtl.py", *arguments, "--resume", check=143)
    here("train_mtl.py", *arguments, "test", "--resume")
    same(tmp_path / "results/run", complete[0] / "results/run")


@pytest.mark.parametrize(("more", "units"), [(("--skip", "layers"), 13), ((), 13 + 4)])
def test_every_layer_is_shared_owned_or_skipped(more, units, scenes, here, tmp_path):
    given = ("--method", "automtl", "--curriculum_speed", 0, "--sample", *more)
    given += ("--single_task", "none", "--exp_ids", 1)
    done = here("train_mtl.py", "--dataset", scenes, *SMALL, *given, draws=not more)
    run = tmp_path / "results/run"
    policy = json.loads((run / "retrain_001/policy.json").read_text())
    row = policy["tasks"]["depth"]
    assert len(policy["units"]) == len(row["own"]) == len(row["specific"]) == units
    assert "the policy is nearly uniform" in done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["own_units"] < 1
    assert 0 < summary["executed_blocks"] < 1
    assert (run / "policy.png").is_file()
    phases = {json.loads(line)["phase"] for line in (run / "policy/metrics.jsonl").read_text().splitlines()}
    assert phases == {"pre-train", "weights", "policy"}
    scores = load_file(run / "retrain_001/depth/task.safetensors")
    assert {name for name in scores if name.startswith("delta/")} == {
        f"delta/{unit}/weight" for unit, own in zip(policy["units"], row["specific"], strict=True) if own
    }


def test_what_a_policy_cannot_skip_is_named_before_anything_is_written(scenes, here, tmp_path):
    first = ("train_mtl.py", "--dataset", scenes, *SMALL, "--method", "automtl", "--curriculum_speed", 0)
    here(*first, "--phases", "policy", "--single_task", "none")
    policy = json.loads((tmp_path / "results/run/policy/policy.json").read_text())
    policy["tasks"]["depth"].update(run=[0] * len(policy["units"]), specific=[0] * len(policy["units"]))
    (tmp_path / "mine.json").write_text(json.dumps(policy))
    again = (*first, "--experiment_name", "again", "--phases", "retrain", "--retrain_from", "scratch")
    done = here(*again, "--policy", tmp_path / "mine.json", check=2)
    assert "mine.json: task 'depth': a policy skips 'conv1.0', for which nothing can stand in" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results/again").exists()
    done = here("train_mtl.py", "--skip", "blocks", "--experiment_name", "again", check=2)
    assert done.stderr == "error: --skip is for --method automtl, not adashare\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base_task", "sky"), "unknown task in --base_task 'sky'"),
        (("--base_task", "edges", "--tasks", "semseg", "depth"), "unknown task in --base_task 'edges'"),
        (("--tasks", "semseg"), "semseg is the only task; name others in --tasks"),
        (("--density", "0%"), "'0%' is not a share above 0 and up to 100%"),
        (("--density", "101%"), "'101%' is not a share"),
        (("--density", "much"), "'much' is not a share"),
        (("--structure", "column"), "'column' is not one of weight, row"),
        (("--where", "zzz"), "where='zzz' matches no layer"),
        (("--density", "0.1%"), "has no room for individual weights: the task's own norms take"),
        (("--single_task", "none", "--phases", "test"), "holds no run"),
    ],
)
def test_mistakes_are_one_line(scenes, here, tmp_path, arguments, message):
    done = here("train_mtl.py", "--dataset", scenes, *VIT, *arguments, check=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").rglob("*.safetensors"))
