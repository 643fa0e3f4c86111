"""Settings files: the command line takes precedence, and errors name file and line."""

import json
from dataclasses import replace

import pytest
import yaml
from conftest import SMALL

from taps.cli.options import parse_joint, parse_mtl, parse_sequential
from taps.runs import programs, sweep

PARSERS = {"train_sequential.py": parse_sequential, "train_joint.py": parse_joint, "train_mtl.py": parse_mtl}


def test_the_settings_of_a_run_repeat_it(finished, here, tmp_path):
    run = finished[0] / "results/run"
    with pytest.warns(UserWarning, match=r"the command line wins over .*settings.yaml: --experiment_name"):
        here("train_sequential.py", "--config", run / "settings.yaml", "--experiment_name", "again")
    again = tmp_path / "results/again"
    for name in ("paint/task.safetensors", "ink-2/task.safetensors", "paint/task.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name
    first, second = (yaml.safe_load((folder / "settings.yaml").read_text()) for folder in (run, again))
    assert {**first, "experiment_name": "again"} == second
    assert first.items() <= json.loads((run / "settings.json").read_text()).items()


def test_the_published_program_is_one_switch():
    """What it does otherwise, except for what is set."""
    settings = parse_sequential(
        ["--published", "--dataset", ".", "--model_type", "resnet50", "--cropped", "--lam", "0.1"]
    )
    assert (settings.model_type, settings.resize, settings.val_fraction) == ("resnet50.tv_in1k", 224, 0)
    assert (settings.accumulate, settings.gradients, settings.warmup_epochs, settings.lam) == (8, "sum", 3, 0.1)
    joint = parse_joint(["--published", "--dataset", ".", "--variant", "lite", "--accumulate", "2", "--resize", "256"])
    assert (joint.model_type, joint.shared_optimizer, joint.optimizer) == ("resnet34.tv_in1k", "nag", None)
    assert (joint.accumulate, joint.resize) == (2, 256)
    for arguments in (["--no-pretrained"], ["--model_path", "w.pth"], ["--model_type", "vit_tiny_patch16_224"]):
        assert ".tv_in1k" not in parse_sequential(["--published", "--dataset", ".", *arguments]).model_type
    plain = parse_sequential(["--dataset", "."])
    assert (plain.model_type, plain.resize, plain.accumulate, plain.gradients) == ("resnet34", 256, 1, "mean")


@pytest.mark.parametrize("program", PARSERS)
def test_the_command_line_wins_and_says_so(program, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("lr: 0.5\nseed: 3\n")
    settings = PARSERS[program](["--config", str(file)])
    assert (settings.lr, settings.seed) == (0.5, 3)
    with pytest.warns(UserWarning, match=r"the command line wins over .*own.yaml: --lr$"):
        settings = PARSERS[program](["--config", str(file), "--lr", "0.25", "--seed", "3"])
    assert (settings.lr, settings.seed) == (0.25, 3)


@pytest.mark.parametrize("program", PARSERS)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlearning_rat: 1\n", "unknown setting in own.yaml, line 2: 'learning_rat'"),
        ("# a comment\nsed: 1\n", "unknown setting in own.yaml, line 2: 'sed'; did you mean 'seed'"),
        ("seed: 1\nlr: fast\n", "own.yaml, line 2: lr: 'fast' is not a number above 0"),
        ("seed: [1]\n", "own.yaml, line 1: seed: "),
        ("pretrained: perhaps\n", "own.yaml, line 1: pretrained: "),
        ("- 1\n", "own.yaml does not hold name: value lines"),
        ("lr: [1\n", "own.yaml cannot be read"),
        ("lr: 1\nlr: 2\n", "own.yaml, line 2: lr appears twice"),
        ("seeds: []\n", "own.yaml, line 1: seeds: an empty list is no value"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(program, text, message, here, tmp_path):
    (tmp_path / "own.yaml").write_text(text)
    done = here(program, *SMALL[:3], "--config", "own.yaml", check=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


@pytest.mark.parametrize("value", ["3", "[1, 2]", "[[depth, 2]]"])
def test_weights_that_name_no_task_are_one_line(value, here, tmp_path):
    (tmp_path / "own.yaml").write_text(f"task_weights: {value}\n")
    done = here("train_mtl.py", "--config", "own.yaml", check=2)
    assert "is not a weight per task, such as {depth: 2.0}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_another_number_of_epochs_takes_what_follows_from_it_along(tmp_path):
    (tmp_path / "demo.yaml").write_text("epochs: 6\nwarmup_epochs: 0.5\nsettle_epochs: 4.5\n")
    with pytest.warns(UserWarning, match="--epochs"):
        given = PARSERS["train_sequential.py"](["--config", str(tmp_path / "demo.yaml"), "--epochs", "3"])
    assert (given.warmup_epochs, given.settle_epochs) == (0.25, 2.25)


def test_every_command_takes_a_file(finished, here, tmp_path):
    run = finished[0] / "results/run"
    table = here("evaluate.py", run, "--no_test").stdout
    (tmp_path / "own.yaml").write_text(f"folder: {run}\nno_test: true\n")
    assert here("evaluate.py", "--config", "own.yaml").stdout == table
    (tmp_path / "run.yaml").write_text((run / "settings.yaml").read_text() + f"result_path: {run.parent}\n")
    with pytest.raises(AssertionError, match="result_path appears twice"):
        here("evaluate.py", "--config", "run.yaml", "--no_test")
    settings = {**yaml.safe_load((run / "settings.yaml").read_text()), "result_path": str(run.parent)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert here("evaluate.py", "--config", "run.yaml", "--no_test").stdout == table
    (tmp_path / "tasks.yaml").write_text(f"folders: [{run}]\n")
    assert here("taps tasks", "list", "--config", "tasks.yaml").stdout == here("taps tasks", "list", run).stdout
    (tmp_path / "brains.yaml").write_text("folder: first\ntrain: 6\nval: 6\ntest: 6\nside: 16\n")
    here("taps data", "brains", "--config", "brains.yaml")
    with pytest.warns(UserWarning, match="the command line wins over brains.yaml: folder"):
        here("taps data", "brains", "second", "--config", "brains.yaml")
    first, second = (sorted(path.name for path in (tmp_path / name).rglob("*")) for name in ("first", "second"))
    assert first == second != []


@pytest.mark.parametrize(
    ("action", "text", "message"),
    [
        ("brains", "tran: 3\n", "unknown setting in own.yaml, line 1: 'tran'; did you mean 'train'?"),
        ("brains", "side: 16\ntrain: x\n", "own.yaml, line 2: train: 'x' is not a whole number"),
        ("brains", "train: [1, 2]\n", "own.yaml, line 1: train: [1, 2] is not a whole number of at least 6"),
        ("scenes", "size: [1]\n", "own.yaml, line 1: size: [1] are not 2 values"),
        ("subjects", "overwrite: perhaps\n", "own.yaml, line 1: overwrite: 'perhaps' is not true or false"),
    ],
)
def test_a_mistake_in_the_file_of_an_action(action, text, message, here, tmp_path):
    (tmp_path / "own.yaml").write_text(text)
    folders = ["new"] if action != "subjects" else ["--images", ".", "--labels", "none"]
    done = here("taps data", action, *folders, "--config", "own.yaml", check=2)
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["own.yaml"]


def test_activation_checkpointing_trains_the_same(finished, tree, here, tmp_path):
    """Recomputed activations are identical, so the files equal those of a run without checkpointing."""
    run = finished[0] / "results/run"
    with pytest.warns(UserWarning, match="the command line wins"):
        here(
            "train_sequential.py", "--config", run / "settings.yaml", "--checkpoint_activations",
            "--experiment_name", "less",
        )  # fmt: skip
    name = "paint/task.safetensors"
    assert (tmp_path / "results/less" / name).read_bytes() == (run / name).read_bytes()


def test_the_settings_of_a_run_with_a_budget_repeat_it(tmp_path):
    from taps.settings.declare import as_yaml

    for options in (["--budget", "5%"], ["--method", "taps_budget"], ["--method", "taps", "taps_budget", "--lam", "2"]):
        first = parse_sequential(["--dataset", ".", *options])
        (tmp_path / "settings.yaml").write_text(as_yaml(first))
        assert parse_sequential(["--config", str(tmp_path / "settings.yaml")]) == replace(
            first, config=str(tmp_path / "settings.yaml")
        )


def test_a_file_written_by_hand_sets_everything(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("dataset: datasets/demo/digits\nresume: true\nparallel: 2\n")
    settings = parse_sequential(["--config", str(path)])
    assert (settings.resume, settings.parallel) == (True, 2)
    path.write_text("dataset: datasets/demo/digits\nresume: true\nversions: {}\n")  # the record of a resumed run
    assert not parse_sequential(["--config", str(path)]).resume


def test_what_belongs_to_another_value_is_not_taken_from_the_file(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("input_size: 224\nresize: 256\nseeds: [0, 1, 2]\ndataset: [x]\n")
    with pytest.warns(UserWarning, match="the command line wins over"):
        read = parse_sequential(["--config", str(file), "--input_size", "64", "--seed", "5"])
    assert (read.input_size, read.resize, read.seed, read.seeds) == (64, 73, 5, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiment_name: 2024-31-12\n", "cannot be read: month must be in 1..12"),
        ("dataset: [x]\nresize: 100\n", "--resize 100 is"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(here, tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    done = here("train_sequential.py", "--config", "own.yaml", check=2)
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_settings_of_a_run_name_it_for_evaluation(tmp_path):
    from taps.cli.options import parse_evaluate

    file = tmp_path / "settings.yaml"
    file.write_text("experiment_name: run\nlam: 1.0\ndataset: [x]\n")
    read = parse_evaluate(["--config", str(file), "--verify"])
    assert (read.folder, read.dataset) == ("results/run", None)
    with pytest.warns(UserWarning, match="the command line wins over"):
        assert parse_evaluate(["--config", str(file), "--dataset", "y"]).dataset == ["y"]


def test_the_published_program_trains_the_demo():
    read = parse_sequential(["--published"])
    assert (read.warmup_epochs, read.settle_epochs) == (3.0, 0.0)


def test_the_demo_goes_on_with_the_phases_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_sequential(["--epochs", "12", "--resume"]).settle_epochs == 9.0
    (tmp_path / "results/demo").mkdir(parents=True)
    (tmp_path / "results/demo/settings.json").write_text('{"warmup_epochs": 0.5, "settle_epochs": 4.5}')
    settings = parse_sequential(["--epochs", "12", "--resume"])
    assert (settings.warmup_epochs, settings.settle_epochs) == (0.5, 4.5)


@pytest.mark.parametrize("more", [[], ["--lam", "0.5", "2"]])
def test_runs_of_0_20_go_on_with_gates_that_learn_to_the_end(tmp_path, monkeypatch, more):
    """So do those of a sweep; the default was another one."""
    monkeypatch.chdir(tmp_path)

    def settles(*given: str) -> set:
        runs = sweep.runs(parse_sequential(["--dataset", "x", *more, *given]))
        return {programs._with_method(own).settle_epochs for own in runs}

    for own in sweep.runs(parse_sequential(["--dataset", "x", *more])):
        folder = tmp_path / "results" / own.experiment_name
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text('{"settle_epochs": 0.0}')
    assert settles() == {None}
    assert settles("--resume") == {0.0}
    assert settles("--resume", "--settle_epochs", "3") == {3.0}
    assert settles("--published") == {0.0}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--dataset", "fruit", "--model_type", "hf-hub:timm/resnet34.tv_in1k"], "fruit_hf-hub_timm_resnet34.tv_in1k_taps"),
        (["--dataset", *(f"a/folder_{n}" for n in range(40))], "folder_0_and_39_more_"),
    ],
)  # fmt: skip
def test_names_of_experiments_are_names_of_folders(given, name):
    found = parse_sequential(given).experiment_name
    assert found.startswith(name)
    assert "/" not in found
    assert ":" not in found
    assert len(found) < 200
