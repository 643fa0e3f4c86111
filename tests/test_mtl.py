"""``train_mtl.py`` on the command line: all phases, single phases, stopped and resumed, with every method and with user errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import run_here
from safetensors.torch import load_file

import taps
from options import parse_mtl
from taps.benchmarks.opening import open_benchmark
from taps.data.generated.scenes import SceneRecipe, make_scenes
from taps.methods.policy import Policy
from taps.runs import multi_task
from taps.settings.choices import LAST_TEMPERATURE
from taps.settings.declare import as_dict
from taps.settings.presets import published
from taps.stop_signals import Interrupted, StopSignals
from taps.storage.run_folder import RunFolder
from taps.training.loop import run_phases
from taps.training.schedules import policy_plan, weights_plan

SMALL = (
    "--model_type", "resnet10t", "--channels", 8, 8, 8, 8, "--head_width", 4, "--crop", 32, "--batch_size", 2, "--iterations", 10,
    "--warmup_iterations", 2, "--weight_iterations", 1, "--policy_iterations", 1, "--retrain_iterations", 4,
    "--eval_iterations", 2, "--curriculum_speed", 1, "--settle_iterations", 2, "--device", "cpu", "--experiment_name", "run",
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mtl") / "scenes"
    make_scenes(root, SceneRecipe(size=(32, 32), train=12, val=2, test=3))
    return root


@pytest.fixture(scope="module")
def complete(scenes, tmp_path_factory):
    """A finished run of all phases, and its output."""
    folder = tmp_path_factory.mktemp("complete")
    return folder, run_here("train_mtl.py", "--dataset", scenes, *SMALL, cwd=folder)


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Return every tensor that a run has saved, except those of checkpoints."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if path.parent.name != "checkpoint"]
    return {str(path.relative_to(folder)): load_file(path) for path in files}


def same(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        assert all(torch.equal(tensor, theirs[name][key]) for key, tensor in tensors.items()), name


def test_all_phases_leave_policies_networks_a_table_and_pictures(complete):
    folder, done = complete
    run = folder / "results/run"
    names = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    assert names == {
        "settings.txt", "settings.yaml", "settings.json", "summary.json", "policy", "retrain_000", "retrain_001", "single_task",
        "policy.png", "similarity.png", "predictions.png",
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= {
        "method", "seed", "seconds", "delta_t", "executed_blocks", "macs_x_single", "parameters_x_single", "tasks",
    }  # fmt: skip
    assert list(summary["tasks"]) == ["semseg", "normals", "depth"]
    policies = [
        json.loads((run / stage / "policy.json").read_text()) for stage in ("policy", "retrain_000", "retrain_001")
    ]
    assert all(policy["units"] == policies[0]["units"] for policy in policies)
    assert policies[0]["tasks"]["depth"]["probability"] == policies[1]["tasks"]["depth"]["probability"]
    share = sum(sum(row["run"]) for policy in policies[1:] for row in policy["tasks"].values()) / (2 * 3 * 4)
    assert summary["executed_blocks"] == pytest.approx(share), "what is executed is what the policies say"
    rows = summary["retrains"].values()
    assert summary["delta_t"] == pytest.approx(sum(row["delta_t"] for row in rows) / 2)
    for task, own in summary["tasks"].items():
        for name, value in own.items():
            assert value == pytest.approx(sum(row["tasks"][task][name] for row in rows) / 2)
            assert f"{value:9.3f}" in done.stdout
    assert "Δ_T" in done.stdout
    assert "policy 9/9 policy" in done.stdout
    assert 0 < summary["macs_x_single"] < 1
    assert 0 < summary["parameters_x_single"] <= 0.4


def test_what_is_stored_computes_what_was_tested(complete, scenes, monkeypatch):
    folder, _ = complete
    monkeypatch.chdir(folder)
    options = parse_mtl(["--dataset", str(scenes), *map(str, SMALL)])
    accelerator = Accelerator(cpu=True)
    benchmark = open_benchmark(options, accelerator)
    run = multi_task.MultiTask(options, benchmark, accelerator, RunFolder(folder / "results/run"), StopSignals())
    stored = json.loads((folder / "results/run/retrain_000/summary.json").read_text())["tasks"]
    for model in (run.stored("retrain_000", benchmark.tasks), taps.load(folder / "results/run/retrain_000")):
        with torch.no_grad():
            metrics = benchmark.evaluate(model, "test", accelerator)
        assert {task: metrics[task] for task in stored} == {task: pytest.approx(own) for task, own in stored.items()}


def test_a_test_of_other_options_is_measured_again(complete, scenes, here, tmp_path):
    shutil.copytree(complete[0] / "results", tmp_path / "results")
    again = ("train_mtl.py", "--dataset", scenes, *SMALL, "--phases", "test")
    found = []
    for options in ((), ("--metrics", "published"), ()):
        here(*again, *options)
        found.append(json.loads((tmp_path / "results/run/summary.json").read_text())["tasks"])
    assert found[0] == found[2] != found[1]
    here(*again, "--exp_ids", 0)
    assert [*json.loads((tmp_path / "results/run/summary.json").read_text())["retrains"]] == ["retrain_000"]
    assert "has no trained retrain_007; it has retrain_000" in here(*again, "--exp_ids", 7, check=2).stderr


def test_phases_one_at_a_time_are_the_same_run(complete, scenes, here, tmp_path):
    here("train_mtl.py", "--dataset", scenes, *SMALL, "--phases", "policy", "--track", "tensorboard")
    assert len(list((tmp_path / "results/run").rglob("events.out.tfevents*"))) >= 2, "ours and the tracker's"
    assert not list((tmp_path / "results/run").rglob("checkpoint")), "of finished stages"
    done = here("train_mtl.py", "--dataset", scenes, *SMALL, "--phases", "test", check=2)
    assert "no trained network to test; run --phases retrain first" in done.stderr
    for number in (1, 0):
        here(
            "train_mtl.py", "--dataset", scenes, *SMALL, "--phases", "retrain", "--exp_ids", number, "--keep_checkpoint"
        )
        assert (tmp_path / f"results/run/retrain_{number:03d}/checkpoint/state.safetensors").is_file()
    here("train_mtl.py", "--dataset", scenes, *SMALL, "--phases", "test")
    same(tmp_path / "results/run", complete[0] / "results/run")
    ours, theirs = (json.loads((root / "results/run/summary.json").read_text()) for root in (tmp_path, complete[0]))
    assert ours["tasks"] == theirs["tasks"]
    assert ours["delta_t"] == theirs["delta_t"]


def test_stopped_anywhere_and_continued_it_ends_the_same(complete, scenes, here, tmp_path, stop_at):
    """The run is stopped in the second single-task network, in policy learning and in the second retraining."""
    arguments = ("--dataset", scenes, *SMALL, "--phases", "policy", "retrain")
    with stop_at(15):
        done = here("train_mtl.py", *arguments, check=143)
    assert "continue with --resume" in done.stderr
    done = here("train_mtl.py", *arguments, check=2)
    assert "continue it with --resume" in done.stderr
    for steps in (21, 11):
        with stop_at(steps):
            here("train_mtl.py", *arguments, "--resume", check=143)
    here("train_mtl.py", *arguments, "test", "--resume")
    same(tmp_path / "results/run", complete[0] / "results/run")


@pytest.mark.parametrize("method", ["dynashare", "hard_sharing", "taps", "single_task"])
def test_every_method_gives_a_table(complete, scenes, here, tmp_path, method):
    single = complete[0] / "results/run"
    done = here(
        "train_mtl.py", "--dataset", scenes, *SMALL, "--method", method, "--single_task", single, "--exp_ids", 0
    )
    summary = json.loads((tmp_path / "results/run/summary.json").read_text())
    assert summary["method"] == method
    assert f"method {method}" in done.stdout
    reference = json.loads((single / "summary.json").read_text())["single_task"]
    if method == "single_task":
        assert summary["tasks"] == reference, "the same networks as those that are measured along"
        assert summary["delta_t"] == 0.0
    else:
        assert summary["single_task"] == reference
    assert (tmp_path / "results/run/predictions.png").is_file()
    if method == "hard_sharing":
        assert summary["executed_blocks"] == 1.0
        assert summary["macs_x_single"] == pytest.approx(1 / 3)
        assert summary["parameters_x_single"] == pytest.approx(1 / 3)
    if method == "taps":
        assert summary["parameters_x_single"] > 1 / 3


def test_classification_tasks_share_blocks_too(tree, here, tmp_path):
    arguments = list(SMALL)
    done = here(
        "train_mtl.py", "--benchmark", "domainnet", "--dataset", tree, "--input_size", 32, "--no-pretrained", *arguments,
        "--model_type", "test_resnet", "--single_task", "none", "--exp_ids", 0,
    )  # fmt: skip
    summary = json.loads((tmp_path / "results/run/summary.json").read_text())
    assert {task: list(own) for task, own in summary["tasks"].items()} == {"ink-2": ["accuracy"], "paint": ["accuracy"]}
    assert summary["delta_t"] is None
    assert "units run" in done.stdout


def test_other_programs_say_what_a_multi_task_run_is(complete, here, finished):
    from taps.storage.run_folder import find_runs

    run = complete[0] / "results/run"
    done = here("evaluate.py", run, check=2)
    assert "is a multi-task run; print its table with: python train_mtl.py --config" in done.stderr
    line = done.stderr.split("python train_mtl.py ")[1].split()
    assert "Δ_T" in here("train_mtl.py", *line, cwd=complete[0]).stdout
    shutil.copytree(run, finished[0] / "results/beside")
    try:
        assert list(find_runs(finished[0] / "results")) == ["run"]
    finally:
        shutil.rmtree(finished[0] / "results/beside")


def test_a_policy_of_ones_own_can_be_trained_under(complete, scenes, here, tmp_path):
    given = complete[0] / "results/run/retrain_001/policy.json"
    arguments = (
        "--dataset",
        scenes,
        *SMALL,
        "--policy",
        given,
        "--no-sample",
        "--exp_ids",
        0,
        "--phases",
        "retrain",
        "test",
    )
    done = here("train_mtl.py", *arguments, "--single_task", "none", check=2)
    assert "leaves no weights to start from: add --retrain_from scratch" in done.stderr
    here("train_mtl.py", *arguments, "--single_task", "none", "--retrain_from", "scratch")
    ours, theirs = (
        json.loads(path.read_text())["tasks"] for path in (tmp_path / "results/run/retrain_000/policy.json", given)
    )
    assert ours == theirs
    done = here("train_mtl.py", *arguments, "--overwrite", check=2)
    assert "--overwrite starts" in done.stderr


def test_retraining_starts_where_policy_learning_ended(complete, scenes, monkeypatch):
    monkeypatch.chdir(complete[0])
    options = parse_mtl(["--dataset", str(scenes), *map(str, SMALL)])
    benchmark = open_benchmark(options, Accelerator(cpu=True))
    folder = RunFolder(complete[0] / "results/run")
    run = multi_task.MultiTask(options, benchmark, Accelerator(cpu=True), folder, StopSignals())
    ways = {"semseg": (1.0,) * 4, "normals": (0.0, 1.0, 1.0, 1.0), "depth": (1.0, 0.0, 0.0, 1.0)}
    model = run.model(benchmark.tasks, policy=Policy("resnet10t", (), {}, ways), start="policy")
    stored = load_file(complete[0] / "results/run/policy/base.safetensors")
    parted = [norm for norm in model.task_norms if "depth" in norm.norms]
    assert parted
    for norm in parted:
        assert torch.equal(norm.active("depth").running_mean, stored[f"{norm.name}.running_mean"])
        assert float(norm.active("depth").running_mean.abs().sum()) > 0


def test_settings_of_a_run_are_a_configuration(complete, scenes, tmp_path):
    stored = complete[0] / "results/run/settings.json"
    options = as_dict(parse_mtl(["--config", str(stored)]))
    assert options == {**as_dict(parse_mtl(["--config", str(stored.with_suffix(".yaml"))])), "config": str(stored)}
    settings = json.loads(stored.read_text())
    for name, value in options.items():
        if name not in ("config", "phases"):
            assert json.loads(json.dumps(value)) == settings[name], name
    with pytest.warns(UserWarning, match="the command line wins over .*settings.json: --lr, --tasks"):
        changed = parse_mtl(["--config", str(stored), "--lr", "0.5", "--tasks", "sn"])
    assert (changed.lr, changed.tasks, changed.task_weights) == (0.5, ["normals"], {"normals": 3.0})
    (tmp_path / "own.yml").write_text(
        "method: dynashare\ntarget_rates: [1, 0.5]\npretrained: false\ntask_weights: {seg: 2}\n"
    )
    options = parse_mtl(["--config", str(tmp_path / "own.yml")])
    assert (options.method, options.target_rates, options.task_weights["semseg"]) == ("dynashare", [1.0, 0.5], 2.0)


@pytest.mark.parametrize("benchmark", ["nyuv2", "cityscapes", "taskonomy", "domainnet", "scenes"])
@pytest.mark.parametrize(
    "method", ["adashare", "dynashare", "automtl", "sparse_delta", "taps", "hard_sharing", "single_task"]
)
def test_published_values_fill_every_option(benchmark, method):
    arguments = ["--benchmark", benchmark, "--method", method]
    options = parse_mtl([*arguments, "--dataset", "x"] if benchmark == "domainnet" else arguments)
    for name, value in published(benchmark, None, method).items():
        assert getattr(options, name) == value or value is None, name
    assert as_dict(options).keys() >= {"lr", "base_lr", "iterations", "sparsity_weight", "policy_lr"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "semseg", "edgs"), "unknown task of benchmark scenes 'edgs'; did you mean 'edges'"),
        (("--iterations", 3), "leave no cycle of 1 + 1 steps after 2 of warm-up: give at least 10"),
        (("--warmup_iterations", 11), "--warmup_iterations 11 are more than --iterations 10"),
        (("--batch_size", 20), "--batch_size 20 is larger than the"),
        (("--config", "nowhere.yml"), "--config nowhere.yml cannot be read"),
        (("--phases", "retrain"), "holds no run; start it with --phases policy"),
        (("--policy", "nowhere.json"), "nowhere.json does not exist; learn a policy first"),
        (("--model_type", "vgg11"), "vgg11 cannot be made with output stride 8 and channels"),
        (("--channels", 8, 8), "expected 4 arguments"),
        (("--single_task", "nowhere.json"), "nowhere.json does not exist"),
        (("--task_weights", "semseg"), "'semseg' is not TASK=X"),
        (("--benchmark", "domainnet"), "needs --dataset"),
        (("--target_rates", 0.5, 0.5, "--method", "dynashare"), "target_rates has 2 values, the network has 4 blocks"),
        (("--resume", "--overwrite"), "exclude each other"),
        (
            ("--task_weights", "semsg=2"),
            "unknown task of benchmark scenes in --task_weights 'semsg'; did you mean 'semseg'",
        ),
        (("--method", "dynashare", "--settle_iterations", 4), "leave none of 4 steps for gates to learn"),
        (("--method", "taps_budget"), "method taps_budget keeps a size: use train_sequential.py or train_joint.py"),
        (("--betas", 1, 0.9), "'1' is not a number"),
    ],
)
def test_mistakes_are_one_line(scenes, here, tmp_path, arguments, message):
    given = () if "--benchmark" in arguments else ("--dataset", scenes)
    done = here("train_mtl.py", *given, *SMALL, *arguments, check=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").rglob("*.safetensors"))


def test_another_backbones_policy_is_refused_and_nothing_overwritten(complete, scenes, here, tmp_path):
    shutil.copytree(complete[0] / "results", tmp_path / "results")
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}
    policy = json.loads((tmp_path / "results/run/policy/policy.json").read_text())
    policy["units"][0] = "stem"
    (tmp_path / "other.json").write_text(json.dumps(policy))
    done = here("train_mtl.py", "--dataset", scenes, *SMALL, "--policy", "other.json", "--resume", check=2)
    assert "is for resnet10t with 4 units, this network is resnet10t with 4: their units differ" in done.stderr
    fresh = [value if value != "run" else "other" for value in SMALL]
    done = here("train_mtl.py", "--dataset", scenes, *fresh, "--policy", "other.json", check=2)
    assert "is for resnet10t with 4 units, this network is resnet10t with 4: their units differ" in done.stderr
    assert before == {path: path.read_bytes() for path in before}


def alternate(scenes, monkeypatch, tmp_path, **changes):
    """Return a model, its benchmark and a plan of policy learning."""
    monkeypatch.chdir(tmp_path)
    options = parse_mtl(["--dataset", str(scenes), *map(str, SMALL)])
    for name, value in changes.items():
        options = replace(options, **{name: value})
    benchmark = open_benchmark(options, Accelerator(cpu=True))
    run = multi_task.MultiTask(options, benchmark, Accelerator(cpu=True), RunFolder(tmp_path), StopSignals())
    model = run.model(benchmark.tasks)
    sizes = {split: benchmark.size(split) for split in ("weights", "policy")}
    plan = policy_plan(options, sizes, len(model.units))
    streams = {split: benchmark.stream(split, steps, 0, 1, benchmark.tasks) for split, steps in plan.batches.items()}
    return model, benchmark, plan, streams


def test_weight_and_policy_steps_move_only_what_they_should(scenes, monkeypatch, tmp_path):
    model, benchmark, plan, streams = alternate(scenes, monkeypatch, tmp_path)
    before: dict[str, torch.Tensor] = {}
    moved: dict[str, set[str]] = {}
    opened, temperatures = [], []

    def on_epoch(rows, is_best):
        nonlocal before
        kind = rows[0]["phase"]
        now = {name: tensor.clone() for name, tensor in model.state_dict().items() if "num_batches" not in name}
        for name, tensor in now.items():
            if not torch.equal(tensor, before[name]):
                role = "gate" if ".gates." in name else "statistics" if "running" in name else "weights"
                moved.setdefault(kind, set()).add(role)
        before = now
        opened.append([gate.in_curriculum for gate in model.gates("depth")])
        temperatures.append(model.state.temperature)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "num_batches" not in name}
    run_phases(
        model, benchmark.tasks, {s: loader for s, (loader, _) in streams.items()}, {s: own for s, (_, own) in streams.items()},
        plan.recipe, Accelerator(cpu=True), criterion=benchmark.criteria(), on_epoch=on_epoch,
    )  # fmt: skip
    assert moved == {
        "warm-up": {"weights", "statistics"}, "weights": {"weights", "statistics"}, "policy": {"gate"},
    }  # fmt: skip
    assert opened[0] == [False] * 4
    assert opened[1:9:2] == [[False] * (3 - n) + [True] * (n + 1) for n in range(4)]
    cycles = len(temperatures) // 2
    falling = [5.0 * (LAST_TEMPERATURE / 5.0) ** (cycle / (cycles - 1)) for cycle in range(cycles)]
    assert temperatures[1::2] == temperatures[2::2] == pytest.approx(falling)
    assert all(gate.in_curriculum for gate in model.gates("depth"))


def test_every_trainable_tensor_is_in_one_group_of_each_optimiser(scenes, monkeypatch, tmp_path):
    from taps.training.recipe import make_optimizer

    model, benchmark, plan, _ = alternate(scenes, monkeypatch, tmp_path)
    everything = {id(p) for p in model.parameters() if p.requires_grad}
    for name, recipe in {"main": plan.recipe, **plan.recipe.others}.items():
        roles = {role for phase in plan.phases if phase.optimizer == name for role in phase.trains}
        groups = make_optimizer(model, benchmark.tasks, recipe, roles).param_groups
        held = [id(p) for group in groups for p in group["params"]]
        assert len(held) == len(set(held))
        gates = {id(p) for task in benchmark.tasks for gate in model.gates(task) for p in gate.parameters()}
        assert set(held) == (gates if name == "policy" else everything - gates)


def test_plans_are_the_published_schedule():
    options = parse_mtl(["--benchmark", "nyuv2", "--tasks", "seg", "sn"])
    plan = policy_plan(options, {"weights": 636, "policy": 159}, 8)
    cycles = (20000 - 4000) // (39 + 9)
    assert plan.batches == {"weights": 39, "policy": 9, "train": 400}
    assert plan.recipe.epochs == 10 + 2 * cycles
    assert plan.phases[0].curriculum == 0
    assert [phase.curriculum for phase in plan.phases[1:]] == [
        min(c // 3 + 1, 8) for c in range(cycles) for _ in range(2)
    ]
    assert [phase.competes for phase in plan.phases[2::2]] == [c >= 21 for c in range(cycles)]
    assert plan.phases[-1].temperature == pytest.approx(5.0 * 0.965 ** (cycles - 1))
    assert plan.recipe.learning_rate(9) == 1.0
    assert plan.recipe.learning_rate(10) == 0.5
    options = replace(options, curriculum_speed=0.2)
    faster = policy_plan(options, {"weights": 636, "policy": 159}, 52)
    assert [phase.curriculum for phase in faster.phases[1:29:2]] == [*range(1, 52, 5), 52, 52, 52]
    again = weights_plan(options, {"weights": 636, "policy": 159}, 3)
    assert (again.recipe.epochs, again.batches, again.recipe.seed) == (50, {"train": 400}, 3)


def test_a_plan_too_short_for_all_blocks_is_said():
    options = parse_mtl(["--benchmark", "nyuv2", "--tasks", "seg", "sn", "--iterations", "4096"])
    with pytest.warns(UserWarning, match="for 2 cycles of 39 \\+ 9 steps; to learn the policy of all 8 blocks"):
        plan = policy_plan(options, {"weights": 636, "policy": 159}, 8)
    assert plan.phases[-1].curriculum == 1


def test_a_policy_may_be_retrained_under_other_settings(complete, scenes, here, tmp_path):
    """As in the published program of DynaShare, whose two phases have two settings files and one name."""
    shutil.copytree(complete[0] / "results/run", tmp_path / "results/run")
    more = ("--method", "dynashare", "--target_rates", 0.5, "--retrain_iterations", 6)
    line = ("train_mtl.py", "--dataset", scenes, *SMALL, *more, "--phases", "retrain")
    for number in (0, 7):
        done = here(*line, "--exp_ids", number, check=2)
        assert "cannot be resumed with other settings" in done.stderr, (
            "what was retrained goes on, or is averaged with it"
        )
    for stage in (tmp_path / "results/run").glob("retrain_*"):
        shutil.rmtree(stage)
    here(*line, "--exp_ids", 7)
    stored = json.loads((tmp_path / "results/run/settings.json").read_text())
    assert (stored["method"], stored["retrain_iterations"]) == ("dynashare", 6)


def test_interrupted_is_not_swallowed(scenes, monkeypatch, tmp_path):
    model, benchmark, plan, streams = alternate(scenes, monkeypatch, tmp_path)
    stop = StopSignals()
    stop.received = 2
    with pytest.raises(Interrupted):
        run_phases(
            model, benchmark.tasks, {s: loader for s, (loader, _) in streams.items()},
            {s: own for s, (_, own) in streams.items()}, plan.recipe, Accelerator(cpu=True),
            criterion=benchmark.criteria(), stop=stop,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--tasks", "seg", "norml"),
            "'norml' is not one of (did you mean normal?) semseg, normals, depth, seg, sn, normal",
        ),
        (
            ("--benchmark", "mimic3", "--tasks", "mortalty"),
            "'mortalty' is not one of (did you mean mortality?) ihm, decomp",
        ),
    ],
)
def test_a_wrong_task_is_named_before_data_is_generated(options, message, here, tmp_path):
    done = here("train_mtl.py", *options, check=2)
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_published_task_names_are_known():
    settings = parse_mtl(["--benchmark", "taskonomy", "--tasks", "segment_semantic", "depth_zbuffer", "normal"])
    assert settings.tasks == ["semseg", "depth", "normals"]
