"""Files are whole or not there, belong together, and damage is noticed: mutations, full disks, two runs in one folder."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

import taps
from taps.settings.adaptation import SequentialSettings
from taps.settings.declare import as_yaml, build, read_config
from taps.storage import checkpoint, files
from taps.storage.run_folder import RunFolder

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MUTATIONS = settings(max_examples=1000, deadline=None, derandomize=True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )


def trained(seed: int = 1, **options) -> taps.TaskModel:
    model = taps.adapt(network(), "taps", **options)
    model.add_task("sketch", num_classes=3)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters_of("sketch"):
            parameter += 0.02 * torch.randn(parameter.shape)
    return model.eval()


def mutated(data, whole: bytes) -> bytes:
    """A file that is cut short, or has one bit flipped, a byte replaced or a piece taken out."""
    kind, at = data.draw(some.sampled_from(("cut", "bit", "byte", "gap"))), data.draw(some.integers(0, len(whole) - 1))
    if kind == "cut":
        return whole[:at]
    if kind == "gap":
        return whole[:at] + whole[at + data.draw(some.integers(1, 9)) :]
    byte = whole[at] ^ (1 << data.draw(some.integers(0, 7))) if kind == "bit" else data.draw(some.integers(0, 255))
    return whole[:at] + bytes([byte]) + whole[at + 1 :]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A stored task, its outputs, and a model of its base."""
    folder = tmp_path_factory.mktemp("saved")
    model = trained()
    preprocessing = {
        "input_size": 8,
        "resize": 9,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
        "crop": "center",
    }
    model.save_task("sketch", folder / "sketch", {"classes": ["a", "b", "c"], "preprocessing": preprocessing})
    return folder, model(X, task="sketch").detach(), taps.adapt(network(), "taps").eval()


@pytest.mark.parametrize("name", ["task.json", "task.safetensors"])
@MUTATIONS
@given(some.data())
def test_a_damaged_task_is_refused_or_gives_the_right_outputs(saved, tmp_path_factory, name, data):
    source, expected, model = saved
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "sketch", folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(mutated(data, whole))
    try:
        task = model.load_task(folder)
    except taps.UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (some mutations are harmless)
    else:
        assert torch.equal(model(X, task=task), expected)
        model.transform(task)
        model.remove_task(task)
    assert model.tasks == []


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A checkpoint, and the model that it was made of."""
    model = trained().train()
    optimizer = torch.optim.SGD(model.parameters_of("sketch"), lr=0.1, momentum=0.9)
    (model(X, task="sketch").square().mean() + model.penalty("sketch")).backward()
    optimizer.step()
    path, accelerator = tmp_path_factory.mktemp("stopped") / "state.safetensors", Accelerator(cpu=True)
    checkpoint.save(path, model, ["sketch"], {"main": optimizer}, accelerator, {"epoch": 1, "batch": 2})
    return path, model, optimizer, accelerator


@MUTATIONS
@given(some.data())
def test_a_damaged_checkpoint_is_refused_or_restores_the_same_state(stopped, tmp_path_factory, data):
    path, model, optimizer, accelerator = stopped
    damaged = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    damaged.write_bytes(mutated(data, path.read_bytes()))
    try:
        state = checkpoint.read(damaged)
    except taps.UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    other = trained(seed=2).train()
    state.restore_structure(other, ["sketch"])
    again = torch.optim.SGD(other.parameters_of("sketch"), lr=0.1, momentum=0.9)
    state.restore(other, ["sketch"], {"main": again}, accelerator)
    assert state.record["progress"] == {"epoch": 1, "batch": 2}
    for name, tensor in model.task_state("sketch").items():
        assert torch.equal(other.task_state("sketch")[name], tensor), name
    for one, two in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])


@MUTATIONS
@given(some.data())
def test_a_damaged_settings_file_is_refused_or_is_one_of_settings(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "settings.yaml"
    whole = as_yaml(build(SequentialSettings, {"method": "taps", "dataset": ["a", "b"], "epochs": 3})).encode()
    path.write_bytes(mutated(data, whole))
    try:
        build(SequentialSettings, read_config(SequentialSettings, path))
    except taps.UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("step", range(3))
def test_a_save_that_is_cut_off_leaves_the_old_task_or_the_new_one(tmp_path, monkeypatch, step):
    old, new = trained(), trained(seed=2)
    old.save_task("sketch", tmp_path / "t", {"round": 1})
    expected = {1: old(X, task="sketch"), 2: new(X, task="sketch")}
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == step + 1:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        new.save_task("sketch", tmp_path / "t", {"round": 2})
    monkeypatch.undo()
    model = taps.adapt(network(), "taps").eval()
    model.load_task(tmp_path / "t")
    found = model.about("sketch")["round"]
    assert found == (2 if step == 2 else 1)
    assert torch.equal(model(X, task="sketch"), expected[found])
    assert taps.load(tmp_path / "t", base=network()).tasks == ["sketch"]
    new.save_task("sketch", tmp_path / "t", {"round": 3})
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["task.json", "task.safetensors"]


def test_a_task_that_is_replaced_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    trained().save_task("sketch", tmp_path / "t")
    new = trained(seed=2)
    real, calls = taps.storage.task_file.read_tensors, []

    def read(path):
        if not calls:
            new.save_task("sketch", tmp_path / "t")
        calls.append(path)
        return real(path)

    monkeypatch.setattr(taps.storage.task_file, "read_tensors", read)
    model = taps.adapt(network(), "taps").eval()
    model.load_task(tmp_path / "t")
    assert torch.equal(model(X, task="sketch"), new(X, task="sketch"))


def test_entries_that_json_cannot_hold_are_refused_before_anything_is_written(tmp_path):
    model = trained()
    model.save_task("sketch", tmp_path / "t", {"score": np.float32(0.5), "count": np.int64(3), "best": torch.tensor(2)})
    about = json.loads((tmp_path / "t/task.json").read_text())
    assert (about["score"], about["count"], about["best"]) == (0.5, 3, 2)
    before = {path: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    with torch.no_grad():
        model.heads["sketch"].weight += 1
    numbers = (float("nan"), np.float32("inf"), torch.tensor(torch.nan), [1.0, float("nan")])
    for value in ({1, 2}, object(), np.zeros(3), {"a": b"x"}, {1: 2, "1": 3}, *numbers):
        with pytest.raises(taps.UserError, match=r"the entry 'x' of task.json holds a \w+, which JSON cannot hold"):
            model.save_task("sketch", tmp_path / "t", {"x": value})
    with pytest.raises(taps.UserError, match=r"the entry 'classes' of task.json is '5', which no loader accepts"):
        model.save_task("sketch", tmp_path / "t", {"classes": 5})
    assert {path: path.read_bytes() for path in (tmp_path / "t").iterdir()} == before


def test_a_disk_that_is_full_leaves_the_old_task(tmp_path):
    """Limits the size of files in a process of its own, which the operating system answers like a full disk."""
    trained().save_task("sketch", tmp_path / "t")
    before = {path: path.read_bytes() for path in (tmp_path / "t").iterdir()}
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "sys.path[:0] = ['tests']\n"
        "from test_files import trained\n"
        "from taps.cli.program import run\n"
        "model = trained(seed=2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"run(lambda arguments: model.save_task('sketch', {str(tmp_path / 't')!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "cannot be written to" in done.stderr
    assert "File too large" in done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "t").iterdir()} == before


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        trained().save_task("sketch", tmp_path / "file" / "t")
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            trained().save_task("sketch", tmp_path / "closed" / "t")
        assert not any((tmp_path / "closed").iterdir())


def test_two_runs_cannot_write_into_one_folder(tmp_path):
    first = RunFolder.open(tmp_path / "run", {"lr": 0.1})
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(taps.UserError, match=r"another run is writing to .*run; wait for it, or choose another"):
            RunFolder.open(tmp_path / "run", {"lr": 0.1}, **options)
    code = (
        f"from pathlib import Path\nfrom taps.storage.run_folder import RunFolder\n"
        f"RunFolder.open(Path({str(tmp_path / 'run')!r}), {{'lr': 0.1}}, resume=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "another run is writing to" in done.stderr
    first.release()
    with RunFolder.open(tmp_path / "run", {"lr": 0.1}, resume=True):
        pass
    with RunFolder.open(tmp_path / "run", {"lr": 0.2}, overwrite=True) as again:
        assert files.read_json(again.path / "settings.json")["lr"] == 0.2


def test_a_run_whose_folder_is_deleted_says_so(tmp_path):
    with RunFolder.open(tmp_path / "run", {"lr": 0.1}) as run:
        run.add_metrics([{"task": "a", "epoch": 1}])
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(taps.UserError, match="run was deleted while the run was writing to it"):
            run.add_metrics([{"task": "a", "epoch": 2}])
    assert not (tmp_path / "run").exists()


def test_a_run_whose_folder_was_deleted_and_taken_by_another_says_so(tmp_path):
    with RunFolder.open(tmp_path / "run", {"lr": 0.1}) as run:
        run.add_metrics([{"task": "a", "epoch": 1}])
        shutil.rmtree(tmp_path / "run")
        with RunFolder.open(tmp_path / "run", {"lr": 0.2}) as other:
            other.add_metrics([{"task": "a", "epoch": 7}])
            with pytest.raises(taps.UserError, match=r"run was deleted while the run was writing to it"):
                run.add_metrics([{"task": "a", "epoch": 2}])
            assert other.read_metrics() == [{"task": "a", "epoch": 7}]


def test_a_run_that_began_before_a_setting_existed_has_its_default(tmp_path):
    with RunFolder.open(tmp_path / "run", {"lr": 0.1}):
        pass
    defaults = {"lr": 0.01, "background": "white"}
    with RunFolder.open(tmp_path / "run", {"lr": 0.1, "background": "white"}, resume=True, defaults=defaults):
        pass
    with pytest.raises(
        taps.UserError, match=r"other settings: background=black \(was white\); leave these as they were"
    ):
        RunFolder.open(tmp_path / "run", {"lr": 0.1, "background": "black"}, resume=True, defaults=defaults)
    stored = files.read_json(tmp_path / "run/settings.json")
    stored["versions"] = {**stored["versions"], "taps": "0.12.99", "torch": "2.99"}
    files.write_json(tmp_path / "run/settings.json", stored)
    with RunFolder.open(tmp_path / "run", {"lr": 0.1, "workers": 7}, resume=True):
        pass  # upgraded, with another number of workers
