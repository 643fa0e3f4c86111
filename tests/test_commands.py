"""The command-line programs, run in a temporary folder on small data."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, SMALL, trained_arguments
from safetensors import safe_open
from safetensors.torch import load_file

import taps
from taps.storage.run_folder import read_run


def task_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("results/run/*/task.*"))}


def test_a_run_leaves_a_complete_results_folder(finished):
    folder, done = finished
    run = folder / "results" / "run"
    names = {path.name for path in run.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert names - events == {
        "settings.txt", "settings.yaml", "settings.json", "metrics.jsonl", "summary.json", "fingerprints.json",
        "ink-2", "paint", "layers.png", "sizes.png", "scores.png", "curves.png", "overlap.png",
    }  # fmt: skip
    assert os.listdir(folder) == ["results"], "nothing is left anywhere else"
    settings = json.loads((run / "settings.json").read_text())
    assert settings["lam"] == 4.0
    assert {"versions", "commit", "seed", "command"} <= set(settings)
    assert "lam=4.0" in (run / "settings.txt").read_text().splitlines()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["task"], row["epoch"]) for row in rows] == [("ink-2", 1), ("ink-2", 2), ("paint", 1), ("paint", 2)]
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == {
        "method", "seed", "seconds", "mean_accuracy", "parameters_x_base", "parameters_x_base_with_heads", "bytes_x_base", "tasks"
    }  # fmt: skip
    for task, row in summary["tasks"].items():
        assert set(row) == {"accuracy", "tuned_layers", "parameters", "bytes"}
        assert row["bytes"] == (run / task / "task.safetensors").stat().st_size
        assert 0 <= row["accuracy"] <= 100
    with (run / "layers.png").open("rb") as picture:
        assert picture.read(8) == b"\x89PNG\r\n\x1a\n"
    for text in ("ink-2", "paint", "tuned layers %", "parameters × base", "layers.png"):
        assert text in done.stdout


def test_tensorboard_has_the_published_tags(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "results" / "run"))
    events.Reload()
    published = {"Validation Error", "Training Error", "Training Loss", "Learning Rate", "Percent Weights Activated"}
    assert set(events.Tags()["scalars"]) == {f"{tag}_{task}" for tag in published for task in ("ink-2", "paint")}
    assert [event.step for event in events.Scalars("Training Loss_paint")] == [1, 2]
    assert events.Scalars("Learning Rate_paint")[1].value == pytest.approx(0.01)


def test_one_task_has_the_plain_tags_and_all_options_run(tree, here, tmp_path):
    arguments = (
        "--dataset",
        tree / "paint",
        *SMALL,
        "--warmup_epochs",
        1,
        "--epochs",
        3,
        "--optimizer",
        "nag",
        "--score_lr",
        0.05,
        "--momentum",
        0.8,
    )
    arguments += (
        "--wd",
        1e-4,
        "--accumulate",
        2,
        "--eval_epochs",
        2,
        "--limit_batches",
        3,
        "--seed",
        3,
        "--amp",
        "bf16",
    )
    arguments += ("--norm", "follow", "--layers", "layer[234]", "--resize", 36, "--cropped", "--no_flip", "--multi_gpu")
    arguments += ("--result_path", "out", "--settle_epochs", 1, "--skip_bad_images")
    done = here("train_sequential.py", *arguments, cwd=tmp_path)
    run = tmp_path / "out" / "paint_test_resnet_taps"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert ["val_error" in row for row in rows] == [False, True, True]
    assert rows[0]["lr"] == 0.02
    assert len(rows[0]["scores"]) == 10
    assert "at most one GPU" in done.stdout
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    assert "Validation Error" in events.Tags()["scalars"]


@pytest.mark.parametrize("method", ["finetune", "norm_only", "linear_probe"])
def test_baselines(tree, here, tmp_path, method):
    more = ("--method", method, "--lam", 2, "--penalty", "weights")
    said = here("train_sequential.py", *trained_arguments(tree / "paint", *more), cwd=tmp_path).stdout
    assert f"no effect with --method {method}: --lam, --warmup_epochs, --penalty" in said
    row = json.loads((tmp_path / "results/run/summary.json").read_text())["tasks"]["paint"]
    assert row["tuned_layers"] == (1.0 if method == "finetune" else 0.0)
    assert (row["parameters"] == 0) == (method == "linear_probe")


def test_budget(tree, here, tmp_path):
    here("train_sequential.py", *trained_arguments(tree / "paint", "--budget", "100KB"), cwd=tmp_path)
    summary = json.loads((tmp_path / "results/run/summary.json").read_text())
    row = summary["tasks"]["paint"]
    assert summary["method"] == "taps_budget"
    base = json.loads((tmp_path / "results/run/paint/task.json").read_text())["base"]["parameters"]
    assert summary["bytes_x_base"] == pytest.approx(1 + row["bytes"] / (4 * base))
    assert 0.98 * 100_000 < row["bytes"] <= 100_000
    assert row["bytes"] == (tmp_path / "results/run/paint/task.safetensors").stat().st_size
    assert "bit for bit" in here("evaluate.py", "results/run", "--verify", cwd=tmp_path).stdout
    done = here(
        "train_sequential.py",
        *trained_arguments(tree / "paint", "--budget", "250", "--overwrite"),
        cwd=tmp_path,
        check=2,
    )
    assert "too small; the smallest file takes" in done.stderr


def test_sizes_begin_with_one_open_phase(tree, here, tmp_path):
    """Each equals a separate run of that size, stopped or not; a size can be added later. One with few bits per weight, whose
    learning rates fall later, begins by itself.
    """
    arguments = trained_arguments(tree / "paint", "--epochs", 3, "--budget")
    curve = tmp_path / "results/run"
    done = here("train_sequential.py", *arguments, "60KB", "100KB", "170KB", cwd=tmp_path)
    assert "picture: results/run/trade_off.png" in done.stdout
    assert sorted(path.name for path in curve.iterdir()) == [
        "100kb",
        "170kb",
        "60kb",
        "summary.csv",
        "trade_off.png",
    ]
    phases = {size: {row["phase"] for row in read_run(curve / size).metrics} for size in ("60kb", "100kb", "170kb")}
    assert phases == {"170kb": {"settle", "round"}, **{key: {"open", "settle", "round"} for key in ("60kb", "100kb")}}
    done = here("evaluate.py", "results/run", cwd=tmp_path, check=2)
    assert "results/run holds several runs; name one of them, e.g. results/run/100kb" in done.stderr
    here("train_sequential.py", *arguments, "170KB", "--experiment_name", "alone", cwd=tmp_path)
    stored = [path / "paint/task.safetensors" for path in (curve / "170kb", tmp_path / "results/alone")]
    assert stored[0].read_bytes() == stored[1].read_bytes()
    done = here("train_sequential.py", *arguments, "100KB", "130KB", cwd=tmp_path, check=2)
    assert "exists; continue it or add runs with --resume" in done.stderr
    table = here("train_sequential.py", *arguments, "130KB", "--resume", cwd=tmp_path).stdout
    rows = [row.split()[0] for row in table.splitlines() if "kb  " in row]
    assert rows == ["60kb", "100kb", "130kb", "170kb"], "also those of earlier commands"
    assert sorted(path.name for path in curve.iterdir()) == [
        "100kb",
        "130kb",
        "170kb",
        "60kb",
        "summary.csv",
        "trade_off.png",
    ]


@pytest.mark.parametrize("steps", [5, 10])
def test_stopped_after_the_last_step_of_an_epoch_it_ends_the_same(steps, tree, here, tmp_path, stop_at, finished):
    """The stop comes before the validation of the first epoch, and before that of the last."""
    arguments = trained_arguments(tree / "paint")
    with stop_at(steps) as taken:
        done = here("train_sequential.py", *arguments, check=143)
    assert len(taken) == steps
    assert len(re.findall("% validation", done.stdout)) == steps // 5 - 1, "the epoch was not validated"
    here("train_sequential.py", *arguments, "--resume")
    ours, theirs = (folder / "results/run/paint/task.safetensors" for folder in (tmp_path, finished[0]))
    assert ours.read_bytes() == theirs.read_bytes()


def test_an_unreadable_test_image_does_not_cost_the_training(tree, here, tmp_path, stop_at):
    shutil.copytree(tree / "paint", tmp_path / "paint")
    (tmp_path / "paint/test/class0/0.png").write_bytes(b"no image")
    arguments = trained_arguments("paint")
    done = here("train_sequential.py", *arguments, check=2)
    assert "0.png cannot be read" in done.stderr
    longer = here("train_sequential.py", *arguments, "--epochs", 3, "--resume", check=2)
    assert "was stopped before its 2 epochs: finish them with --resume, and extend it then" in longer.stderr
    done = here("train_sequential.py", *arguments, "--resume", "--skip_bad_images")
    with stop_at(1):
        here("train_sequential.py", *arguments, "--epochs", 4, "--resume", "--skip_bad_images", check=143)
    wrong = here("train_sequential.py", *arguments, "--epochs", 6, "--resume", "--skip_bad_images", check=2).stderr
    assert "was stopped before its 4 epochs: finish them with --resume, and extend it then" in wrong
    here("train_sequential.py", *arguments, "--epochs", 4, "--resume", "--skip_bad_images")
    assert "1 unreadable images are left out" in done.stdout
    assert not re.search(r"^paint 1/2", done.stdout, re.MULTILINE), "nothing is trained again"


def test_published_habit_of_selecting_on_test_is_said(tree, here, tmp_path):
    done = here("train_sequential.py", *trained_arguments(tree / "paint", "--val_fraction", 0), cwd=tmp_path)
    assert "selected on the test split" in done.stdout


def test_evaluate_prints_the_stored_accuracies_and_exports(finished, here, tmp_path, tree):
    folder, _ = finished
    summary = json.loads((folder / "results/run/summary.json").read_text())
    done = here("evaluate.py", "results/run", "--export", tmp_path / "out", "--device", "cpu", cwd=folder)
    for name, row in summary["tasks"].items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert f"{row['accuracy']:.2f}" in line
        assert f"{row['bytes']:,}" in line
        net = timm.create_model("test_resnet", num_classes=4 if name == "ink-2" else 3)
        net.load_state_dict(load_file(tmp_path / "out" / f"{name}.safetensors"))
        program = torch.export.load(tmp_path / "out" / f"{name}.pt2").module()
        x = torch.randn(3, 3, 32, 32)
        torch.testing.assert_close(program(x), net.eval()(x))
        together = torch.export.load(tmp_path / "out/together.pt2").module()
        torch.testing.assert_close(together(x)[name], net(x))
    assert f"{summary['parameters_x_base']:.3f}" in done.stdout
    assert f"{summary['parameters_x_base_with_heads']:.3f}" in done.stdout
    stored = here("evaluate.py", "results/run", "--no_test", "--tasks", "paint", cwd=folder)
    assert "ink-2" not in stored.stdout
    few = tmp_path / "few" / "paint"  # folders of classes, of which some are missing, are tested on as a whole
    for label in ("class0", "class2"):
        shutil.copytree(tree / "paint" / "test" / label, few / label)
    other = here("evaluate.py", "results/run", "--dataset", few, "--tasks", "paint", cwd=folder)
    assert "paint: there is no test/, so all 10 images are tested on" in other.stdout
    wrong = here("evaluate.py", "results/run", "--tasks", "pant", cwd=folder, check=2)
    assert "unknown task 'pant'; did you mean 'paint'" in wrong.stderr


def test_one_onnx_program_for_all_tasks(finished, here, tmp_path):
    import onnxruntime

    folder, _ = finished
    here("evaluate.py", "results/run", "--no_test", "--export", tmp_path / "out", "--onnx", cwd=folder)
    x = torch.randn(3, 3, 32, 32)
    session = onnxruntime.InferenceSession(tmp_path / "out/together.onnx")
    assert [output.name for output in session.get_outputs()] == ["ink-2", "paint"]
    outputs = session.run(None, {"images": x.numpy()})
    for name, output in zip(("ink-2", "paint"), outputs, strict=True):
        expected = torch.export.load(tmp_path / "out" / f"{name}.pt2").module()(x)
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)
        single = onnxruntime.InferenceSession(tmp_path / "out" / f"{name}.onnx").run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(single[0]), expected, rtol=1e-4, atol=1e-4)
    again = here("evaluate.py", "results/run", "--no_test", "--export", tmp_path / "out", cwd=folder, check=2)
    assert "exists; export to another folder" in again.stderr
    labels = json.loads((tmp_path / "out/labels.json").read_text())
    assert labels["paint"]["classes"] == ["class0", "class1", "class2"]
    assert labels["paint"]["preprocessing"]["input_size"] == 32
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == labels
    with safe_open(tmp_path / "out/paint.safetensors", "pt") as state:
        assert json.loads(state.metadata()["labels"]) == labels["paint"]
    alone = here("evaluate.py", "results/run", "--onnx", cwd=folder, check=2)
    assert "give --export DIR too" in alone.stderr


def test_a_folder_of_classes_that_has_grown_is_named(tree, here, tmp_path):
    shutil.copytree(tree / "paint/train", tmp_path / "paint")
    here("train_sequential.py", "--dataset", "paint", *SMALL, "--epochs", 1, "--experiment_name", "run")
    assert "warning" not in here("evaluate.py", "results/run").stdout
    shutil.copy(tmp_path / "paint/class0/0.png", tmp_path / "paint/class0/new.png")
    assert "the images of paint are not those of the run" in here("evaluate.py", "results/run").stdout


def test_export_does_without_one_program_where_the_network_cannot_be_followed(finished, here, tmp_path, monkeypatch):
    from taps.multitask.shared_pass import Predictor

    def refuse(self, x):
        raise TypeError("this network looks at what it holds")

    monkeypatch.setattr(Predictor, "forward", refuse)
    with pytest.warns(UserWarning, match="no program for all tasks together"):
        here("evaluate.py", "results/run", "--no_test", "--export", tmp_path / "out", cwd=finished[0])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "ink-2.pt2", "ink-2.safetensors", "labels.json", "paint.pt2", "paint.safetensors"
    }  # fmt: skip


def test_evaluate_names_a_damaged_task_and_tests_the_others(finished, command, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "results", tmp_path / "results")
    (tmp_path / "results/run/paint/task.safetensors").write_bytes(b"short")
    done = command("evaluate.py", "results/run", cwd=tmp_path)
    assert "warning: skipping task: results/run/paint/task.safetensors has 5 bytes" in done.stderr
    assert "ink-2" in done.stdout
    assert "paint" not in done.stdout


def test_tensorboard_has_the_pictures(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "results" / "run"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"layers", "sizes", "scores", "curves", "overlap"}


def test_resume_of_a_finished_run_changes_nothing(finished, here, tree):
    folder, _ = finished
    before = task_files(folder)
    here("train_sequential.py", *trained_arguments(tree, "--resume"), cwd=folder)
    assert task_files(folder) == before


def start(folder: Path, *arguments) -> subprocess.Popen:
    line = [sys.executable, str(ROOT / "train_sequential.py"), *map(str, arguments)]
    return subprocess.Popen(
        line,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
        start_new_session=True,
    )


def wait_for(path: Path, lines: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not (path.exists() and len(path.read_text().splitlines()) >= lines):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_an_epoch_and_resumed_ends_with_the_same_bytes(finished, tree, here, tmp_path, number):
    """The run is killed during the second epoch of the first task; SIGTERM reaches its workers too, as from ``timeout``."""
    workers = ("--workers", 1) if number == signal.SIGTERM else ()
    process = start(tmp_path, *trained_arguments(tree, *workers))
    wait_for(tmp_path / "results/run/metrics.jsonl", 1, process)
    time.sleep(0.05)
    os.killpg(process.pid, number) if workers else process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert process.returncode == expected[number], stderr
    if number != signal.SIGKILL:
        assert "continue with --resume" in stderr
        assert "Traceback" not in stderr
    here("train_sequential.py", *trained_arguments(tree, "--resume"), cwd=tmp_path)
    assert task_files(tmp_path) == task_files(finished[0])
    ours, theirs = (
        [{**json.loads(line), "seconds": 0} for line in (root / "results/run/metrics.jsonl").read_text().splitlines()]
        for root in (tmp_path, finished[0])
    )
    assert ours == theirs


def make_bad(tree: Path, root: Path, kind: str) -> Path:
    shutil.copytree(tree / "paint", root / "bad")
    bad = root / "bad"
    if kind == "no train":
        shutil.rmtree(bad / "train")
    elif kind == "no images":
        for path in bad.glob("train/*/*.png"):
            path.unlink()
    elif kind == "extra class":
        shutil.copytree(bad / "test/class0", bad / "test/class9")
    elif kind == "bad image":
        for path in bad.glob("train/class1/*.png"):
            path.write_bytes(path.read_bytes()[:60])
    return bad


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "nowhere does not exist"),
        ("no train", "has no train/ folder"),
        ("no images", "has no images"),
        ("extra class", "test/ has classes that train/ lacks: class9"),
        ("bad image", "cannot be read"),
    ],
)
def test_bad_data_is_one_line_and_status_2(tree, here, tmp_path, kind, message):
    data = tmp_path / "nowhere" if kind == "missing" else make_bad(tree, tmp_path, kind)
    for workers in ("0", "2") if kind == "bad image" else ("0",):
        done = here(
            "train_sequential.py", *trained_arguments(data, "--workers", workers, "--overwrite"), cwd=tmp_path, check=2
        )
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ")
    if kind == "bad image":
        done = here(
            "train_sequential.py",
            *trained_arguments(tmp_path / "bad", "--overwrite", "--skip_bad_images"),
            cwd=tmp_path,
        )
        assert "bad: 12 unreadable images are left out" in done.stdout
    else:
        assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lam", "-1"), "argument --lam: '-1' is not a number of at least 0"),
        (("--epochs", "0"), "argument --epochs: '0' is not a whole number of at least 1"),
        (("--epochs", "two"), "'two' is not a whole number"),
        (("--model_type", "resnet35"), "did you mean"),
        (("--method", "tabs"), "'tabs' is not one of (did you mean taps?) taps, "),
        (("--lamda", "1"), "unknown option --lamda; did you mean --lam?"),
        (("--resume", "--overwrite"), "exclude each other"),
        (("--device", "cuda"), "--device cuda is not available"),
        (("--layers", "nothing"), "matches none"),
        (("--budget", "lots"), "is not a size"),
        (("--model_type", "test_vit", "--input_size", "40"), "test_vit does not take images of --input_size 40: "),
        (("--budget", "3MB", "3mb"), "--budget names one size twice: 3mb and 3mb"),
        (("--budget", "300KB", "0.3MB"), "--budget names one size twice: 300kb and 0.3mb"),
        (
            ("--budget", "5%", "--lam", "1"),
            "--lam is not used with a budget: leave one of them out",
        ),
        (("--method", "taps_budget", "--settle_epochs", "1"), "--settle_epochs is not used with a budget"),
        (("--model_path", "nothing.pth"), "nothing.pth does not exist"),
        (("--val_fraction", "0.001"), "leaves none to validate on"),
        (("--lr", "1e30"), "the loss is"),
        (("--lr", "nan"), "is not a number above 0"),
        (("--amp", "fp16"), "--amp fp16 needs a GPU"),
        (("--settle_epochs", "1"), "leave none of 2 epochs for --lam"),
        (("--model_type", "resnet18.of_mine"), "unknown backbone 'resnet18.of_mine'"),
        (("--result_path", "/proc/nowhere"), "/proc/nowhere"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(tree, here, tmp_path, arguments, message):
    if torch.cuda.is_available() and {"cuda", "fp16"} & set(arguments):
        pytest.skip("a mistake only where there is no GPU")
    done = here("train_sequential.py", *trained_arguments(tree / "paint", *arguments), cwd=tmp_path, check=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    if "loss" not in message:
        assert not list(tmp_path.glob("results/run/*/task.json"))


def test_an_experiment_is_never_overwritten_unasked(finished, tree, here, tmp_path):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = here("train_sequential.py", *trained_arguments(tree), cwd=folder, check=2)
    assert "--resume, replace it with --overwrite" in done.stderr
    done = here("train_sequential.py", *trained_arguments(tree, "--resume", "--lam", "2"), cwd=folder, check=2)
    assert "cannot be resumed with other settings: lam=2.0 (was 4.0)" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "results/run").mkdir(parents=True)
    (tmp_path / "results/run/thesis.tex").write_text("years of work")
    done = here("train_sequential.py", *trained_arguments(tree, "--overwrite"), cwd=tmp_path, check=2)
    assert "is not a run of this program" in done.stderr
    assert (tmp_path / "results/run/thesis.tex").read_text() == "years of work"


def test_evaluate_refuses_what_is_no_run(here, tmp_path):
    assert "does not exist" in here("evaluate.py", "nothing", cwd=tmp_path, check=2).stderr
    assert "holds no task files" in here("evaluate.py", ".", cwd=tmp_path, check=2).stderr


def test_data_check_command(tree, here, tmp_path):
    line = [sys.executable, "-m", "taps", "data", "check", str(tree / "paint")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "3 classes, 36 train, 15 test" in done.stdout
    done = here("taps data", "check", "nowhere", check=2)
    assert done.stderr == "error: dataset folder nowhere does not exist\n"


@pytest.mark.parametrize("epochs", ["1", "2", "6", "12"])
def test_the_demo_s_phases_keep_their_shares(epochs):
    from options import parse_joint, parse_sequential

    for parse in (parse_sequential, parse_joint):
        options = parse(["--epochs", epochs])
        assert options.warmup_epochs == pytest.approx(int(epochs) / 12)
        assert options.settle_epochs == pytest.approx(int(epochs) * 0.75)


def test_help_explains_every_option(here, tmp_path):
    text = here("train_sequential.py", "--help", cwd=tmp_path).stdout
    from options import sequential_parser

    for action in sequential_parser()._actions:
        assert action.help, action.option_strings
        assert action.option_strings[0] in text


def test_a_mistake_with_overwrite_costs_no_earlier_run(finished, tree, here, tmp_path):
    shutil.copytree(finished[0] / "results", tmp_path / "results")
    before = task_files(tmp_path)
    for wrong in (("--budget", "lots"), ("--budget", "250"), ("--layers", "nothing"), ("--model_path", "nothing.pth")):
        here("train_sequential.py", *trained_arguments(tree, "--overwrite", *wrong), cwd=tmp_path, check=2)
    assert task_files(tmp_path) == before


def test_a_vision_transformer_at_another_size(tree, here, tmp_path):
    arguments = trained_arguments(tree / "paint", "--model_type", "vit_tiny_patch16_224", "--limit_batches", 1)
    here("train_sequential.py", *arguments, cwd=tmp_path)
    here("evaluate.py", "results/run", "--device", "cpu", cwd=tmp_path)


def test_verify_says_whether_anything_has_moved(finished, here, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "run"
    shutil.copytree(finished[0] / "results" / "run", folder)
    done = here("evaluate.py", folder, "--verify", cwd=tmp_path)
    assert re.fullmatch(
        r"base: \d+ tensors, bit for bit\nink-2: answers bit for bit as after its training\npaint: answers .*\n",
        done.stdout,
    )
    path = folder / "paint/task.safetensors"
    tensors = load_file(path)
    tensors["head/weight"] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    description = json.loads((folder / "paint/task.json").read_text())
    (folder / "paint/task.json").write_text(json.dumps({**description, "bytes": path.stat().st_size}))
    done = here("evaluate.py", folder, "--verify", cwd=tmp_path, check=1)
    assert "ink-2: answers bit for bit" in done.stdout
    assert re.search(r"paint: not loaded: .*task.safetensors is damaged: its checksum is not the one in", done.stdout)
    (folder / "paint/task.json").write_text(
        json.dumps({**description, "checksums": None, "bytes": path.stat().st_size})
    )
    done = here("evaluate.py", folder, "--verify", cwd=tmp_path, check=1)  # a task of an earlier version
    assert re.search(r"paint: its answers differ, by [\d.e-]+ in the first \d+ numbers", done.stdout)
    fingerprints = json.loads((folder / "fingerprints.json").read_text())
    moved = sorted(fingerprints)[3]
    (folder / "fingerprints.json").write_text(json.dumps({**fingerprints, moved: "0" * 64}))
    done = here("evaluate.py", folder, "--verify", cwd=tmp_path, check=1)
    assert done.stdout == f"base: {moved} is not what it was\n"
    (folder / "fingerprints.json").unlink()
    assert "fingerprints.json" in here("evaluate.py", folder, "--verify", cwd=tmp_path, check=2).stderr
    assert (
        "leave out --export" in here("evaluate.py", folder, "--verify", "--export", "x", cwd=tmp_path, check=2).stderr
    )


def test_a_finished_run_is_extended_by_more_epochs(finished, tree, here, tmp_path, monkeypatch):
    from taps.training import loop

    shutil.copytree(finished[0] / "results/run", tmp_path / "results/run")
    longer = (*trained_arguments(tree, "--resume"), "--epochs", 4)
    before = json.loads((tmp_path / "results/run/paint/task.json").read_text())
    real, epochs = loop._Run.train_epoch, []

    def count(run):
        epochs.append((run.name, run.progress.epoch))
        if len(epochs) == 4:
            raise KeyboardInterrupt  # in the second task's last epoch
        return real(run)

    monkeypatch.setattr(loop._Run, "train_epoch", count)
    here("train_sequential.py", *longer, check=130)
    assert epochs == [("ink-2", 2), ("ink-2", 3), ("paint", 2), ("paint", 3)]
    monkeypatch.setattr(
        loop._Run, "train_epoch", lambda run: (epochs.append((run.name, run.progress.epoch)), real(run))[1]
    )
    here("train_sequential.py", *longer)
    assert epochs[4:] == [("paint", 3)]
    rows = [json.loads(line) for line in (tmp_path / "results/run/metrics.jsonl").read_text().splitlines()]
    assert sorted((row["task"], row["epoch"]) for row in rows) == [
        (t, e) for t in ("ink-2", "paint") for e in (1, 2, 3, 4)
    ]
    after = json.loads((tmp_path / "results/run/paint/task.json").read_text())
    assert after["val_error"] <= before["val_error"]  # the best of all four
    assert after["provenance"]["epochs"] == 4
    assert "epochs: 4" in (tmp_path / "results/run/settings.yaml").read_text()
    here("train_sequential.py", *longer)
    assert len(epochs) == 5  # nothing is left to do
    done = here("train_sequential.py", *trained_arguments(tree, "--resume"), check=2)
    assert "cannot be resumed with other settings: epochs=2 (was 4)" in done.stderr


@pytest.mark.parametrize("program", ["train_sequential.py", "train_joint.py"])
@pytest.mark.parametrize("is_better", [False, True])
def test_more_epochs_replace_the_best_only_if_they_are_better(
    program, is_better, finished, joint, tree, here, tmp_path, monkeypatch
):
    """The whole state goes on from the best epoch, the base of joint training too, and ends consistent."""
    from taps.runs.adaptation import Experiment

    source = (finished if program == "train_sequential.py" else joint)[0]
    run = tmp_path / "results/run"
    shutil.copytree(source / "results/run", run)
    files = [run / name for name in ("paint/task.safetensors", "base.safetensors") if (run / name).exists()]
    before = [path.read_bytes() for path in files]
    monkeypatch.setattr(Experiment, "_score", lambda self, model, task: 101.0 if is_better else -1.0)
    here(program, *trained_arguments(tree, "--resume"), "--epochs", 3)
    assert ([path.read_bytes() for path in files] != before) == is_better
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted((row["task"], row["epoch"]) for row in rows) == [
        (t, e) for t in ("ink-2", "paint") for e in (1, 2, 3)
    ]
    assert json.loads((run / "paint/task.json").read_text())["provenance"]["epochs"] == 3
    here("evaluate.py", run, "--verify")


def test_what_cannot_be_extended_is_one_line(tree, here, tmp_path):
    line = ("train_sequential.py", *trained_arguments(tree / "paint", "--budget", "50%"))
    here(*line)
    done = here(*line, "--resume", "--epochs", 4, check=2)
    assert "cannot be extended to 4 epochs: a budget divides all epochs into parts" in done.stderr


def test_a_renamed_task_folder_is_the_same_task(finished, here, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0] / "results/run", folder)
    (folder / "paint").rename(folder / "renamed")
    assert "paint: answers bit for bit" in here("evaluate.py", folder, "--verify").stdout
    here("evaluate.py", folder, "--no_test", "--tasks", "ink-2", "--export", "out")
    here("evaluate.py", folder, "--no_test", "--tasks", "paint", "--export", "out")
    labels = json.loads((tmp_path / "out/labels.json").read_text())
    assert {name: len(own["classes"]) for name, own in labels.items()} == {"ink-2": 4, "paint": 3}


def test_numbers_of_gpus_count_within_the_visible_ones(monkeypatch):
    from taps.cli.program import choose_gpus

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-6")
    with pytest.raises(taps.UserError, match="--gpus 3 is not among the 3 GPUs"):
        choose_gpus([3])
    assert choose_gpus([2, 0])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-6,4"
    monkeypatch.setenv("WORLD_SIZE", "2")  # a process of the run, which has its GPUs
    choose_gpus([2, 0])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-6,4"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert not choose_gpus([1])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(taps.UserError, match="--gpus 3: this machine has 3, counted from 0"):
        choose_gpus([3])


def test_a_seed_too_large_is_one_line(here):
    assert "--seed" in here("train_sequential.py", "--seed", 10**23, check=2).stderr


def test_a_stopped_run_is_finished_before_it_is_extended(finished, tree, here, tmp_path, stop_at):
    line = ("train_sequential.py", *trained_arguments(tree / "paint"))
    with stop_at(3):
        here(*line, check=143)
    done = here(*line, "--resume", "--epochs", 4, check=2)
    assert "was stopped before its 2 epochs: finish them with --resume" in done.stderr
    here(*line, "--resume")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="concerns glibc")
@pytest.mark.parametrize("thread", ["the program's", "another"])
def test_programs_use_freed_memory_again(thread):
    """Large blocks that are freed and requested again cost no page faults, in whichever thread."""
    program = """
import ctypes, resource, sys, threading
from taps.cli import program
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc.argtypes, libc.memset.argtypes = [ctypes.c_size_t], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults(times, size=40_000_000):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        block = libc.malloc(size)
        libc.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def main(arguments):
    run = lambda: print(faults(1), faults(10))
    if arguments == ["another"]:
        worker = threading.Thread(target=run)
        worker.start()
        worker.join()
    else:
        run()

program.run(main)
"""
    line = [sys.executable, "-c", program, thread]
    printed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    once, again = map(int, printed.split())
    assert again < max(once, 100), "one for each page each time"


@pytest.mark.parametrize("others", ["fail too", "go on"])
def test_one_of_several_processes_says_what_is_wrong(others):
    """The first does for all; another one does if a launcher does not end it, since then the first has not failed."""
    program = """
import os, sys
from taps.cli import program
from taps.errors import UserError

def main(arguments):
    raise UserError("cannot read picture 3")

program._SECONDS_TO_BE_ENDED = 60 if sys.argv[1] == "fail too" else 0
program.run(main)
"""
    line = [sys.executable, "-c", program, others]
    running = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "RANK": "1"})
    if others == "go on":
        assert running.communicate()[1] == "error: cannot read picture 3\n"
        assert running.returncode == 2
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            running.communicate(timeout=2)
        running.terminate()
        assert running.communicate()[1] == ""
        assert running.returncode == 143
