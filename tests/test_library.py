"""Libraries of many tasks: commands, loading on first use, and damaged tasks."""

import json
import shutil

import pytest
import torch
from torch import nn

import taps

NAMES = [f"task-{index:02d}" for index in range(20)]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Twenty tasks in a folder, and the model that saved them."""
    root = tmp_path_factory.mktemp("shelf")
    model = taps.adapt(network()).eval()
    for index, name in enumerate(NAMES):
        model.add_task(name, num_classes=2 + index % 3)
        for parameter in model.roles(name)["delta"].values():
            parameter.data.normal_()
        model.units[index % 3].gates[name].set(False)
        model.save_task(name, root / name, {"classes": ["a", "b"], "accuracy": 50.0 + index})
    return model, root


@pytest.fixture
def copied(shelf, tmp_path):
    shutil.copytree(shelf[1], tmp_path / "shelf")
    return tmp_path / "shelf"


def held(model) -> int:
    return len(model.heads)


def test_tasks_are_loaded_when_used_and_few_are_held(shelf):
    model, root = shelf
    other = taps.adapt(network()).eval()
    assert other.load_library(root, keep=3) == NAMES
    assert held(other) == 0
    assert other.tasks == NAMES
    x = torch.randn(4, 6)
    with torch.no_grad():
        for name in (*NAMES[:6], *NAMES[4:8], NAMES[0]):
            assert torch.equal(other(x, name), model(x, name))
            assert held(other) <= 3
        before = other.heads[NAMES[0]]
        other(x, NAMES[7])
        other(x, NAMES[0])
        assert other.heads[NAMES[0]] is before, "a task that is held is not loaded again"
        outputs = other.predict(x)
        assert held(other) <= 3
        assert list(outputs) == NAMES
        for name in NAMES:
            torch.testing.assert_close(outputs[name], model(x, name))
        mixed = other(x, NAMES[:4])
        assert held(other) == 4, "one call gets what it needs"
        torch.testing.assert_close(mixed[2], model(x[2:3], NAMES[2])[0])
    assert other.report(NAMES[9]) == model.report(NAMES[9])
    assert held(other) <= 3


def test_a_library_beside_other_tasks(shelf, copied):
    other = taps.adapt(network()).eval()
    other.add_task("mine", num_classes=2)
    other.load_library(copied, keep=1)
    with pytest.raises(ValueError, match="already has a task 'task-03'"):
        other.add_task("task-03", num_classes=2)
    with pytest.raises(ValueError, match="library already has a task 'task-03'"):
        other.load_task(copied / "task-03")
    assert other.load_task(copied / "task-03", name="again") == "again"
    with pytest.raises(ValueError, match="20 of 20 tasks cannot be used: the model's library already has"):
        other.load_library(copied)
    other.remove_task("task-03")
    assert "task-03" not in other.tasks
    with pytest.raises(ValueError, match="unknown task 'task-03'; did you mean"):
        other(torch.randn(1, 6), "task-03")
    assert "mine" in other.tasks
    with pytest.raises(ValueError, match="keep must be at least 1"):
        taps.adapt(network()).load_library(copied, keep=0)


def test_as_many_as_fit_are_held_and_every_method_finds_its_task(shelf):
    model, root = shelf
    other = taps.adapt(network()).eval()
    other.load_library(root, keep=10)
    x = torch.randn(2, 6)
    with torch.inference_mode():  # the first use of a task may be anywhere
        for name in NAMES[:10]:
            other(x, name)
    assert held(other) == 10
    first = other.heads[NAMES[0]]
    with torch.no_grad():
        other(x, NAMES[0])
        assert other.heads[NAMES[0]] is first
        with other.using(NAMES[15]):
            assert torch.equal(other.backbone(x), model.features(x, NAMES[15]))
        with pytest.raises(ValueError, match="unknown task"), other.using("task-3"):
            pass
    cost = other.predict_cost(x, NAMES)
    assert cost["macs"] <= cost["macs_separate"]
    assert cost["macs_heads"] > 0
    other.penalty(NAMES[16])
    assert held(other) <= 20
    other(x, NAMES[0])
    assert held(other) <= 10


def test_switching_tasks_copies_no_weights(shelf):
    model, _ = shelf
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    x = torch.randn(2, 6)
    with torch.no_grad():
        for name in NAMES:
            model(x, name)
    assert pointers == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def damage(folder, how: str) -> str:
    path, description = folder / "task.safetensors", json.loads((folder / "task.json").read_text())
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
        return "bytes, task.json says"
    if how == "gone":
        path.unlink()
        return "task.safetensors does not exist"
    if how == "no description":
        (folder / "task.json").unlink()
        return "task.json does not exist"
    if how == "garbled":
        (folder / "task.json").write_text("{")
        return "cannot be read as JSON"
    if how == "version":
        description["format"] = 99
        message = "format version 99"
    else:
        description["base"]["fingerprint"] = "0" * 64
        message = "made for another base"
    (folder / "task.json").write_text(json.dumps(description))
    return message


@pytest.mark.parametrize("how", ["cut", "gone", "no description", "garbled", "version", "base"])
def test_one_damaged_task_among_good_ones_is_named(how, copied):
    message = damage(copied / "task-05", how)
    model = taps.adapt(network()).eval()
    with pytest.warns(UserWarning, match=f"skipping task.*task-05.*{message}"):
        names = model.load_library(copied)
    assert names == [name for name in NAMES if name != "task-05"]
    assert model(torch.randn(1, 6), "task-06").shape == (1, 2)


def test_commands(copied, here):
    listed = here("taps tasks", "list", copied)
    lines = listed.stdout.splitlines()
    assert len(lines) == 1 + len(NAMES)
    assert lines[0].split()[0] == "task"
    assert "51.00" in lines[2]
    assert "2/3" in lines[2]
    shown = here("taps tasks", "show", copied / "task-01").stdout
    assert "51.00 %" in shown
    assert shown.count("yes") == 2
    compared = here("taps tasks", "compare", copied / "task-00", copied / "task-01", copied / "task-03").stdout
    assert len(compared.splitlines()) == 4
    assert "100" in next(line for line in compared.splitlines() if line.startswith("task-00  task-03"))
    shutil.copytree(copied / "task-01", copied.parent / "other" / "task-01")
    across = here("taps tasks", "compare", copied / "task-01", copied.parent / "other" / "task-01").stdout
    assert "task-01  other/task-01" in across
    damage(copied / "task-05", "cut")
    left = here("taps tasks", "list", copied, check=2)
    assert len(left.stdout.splitlines()) == len(NAMES), "the good ones are listed"
    assert left.stderr.count("\n") == 1
    assert "1 of 20 tasks cannot be used" in left.stderr
    assert "task-05" in left.stderr


def test_mistakes_of_the_commands_are_one_line(copied, here, tmp_path):
    for arguments, message in (
        (("list", tmp_path / "nowhere"), "does not exist"),
        (("list", tmp_path), "holds no task"),
        (("compare", copied / "task-00"), "comparing takes two"),
        (("lst", copied), "unknown command lst; did you mean list?"),
        ((), "taps tasks takes a command; choose from list, show, compare"),
        (("list",), "name folders of tasks: taps tasks list results/demo"),
        (("list", copied, copied / "task-00"), "both hold a task 'task-00'"),
    ):
        done = here("taps tasks", *arguments, check=2)
        assert message in done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    other = taps.adapt(nn.Sequential(nn.Linear(6, 5)))
    other.add_task("small", num_classes=2)
    other.save_task("small", tmp_path / "small")
    done = here("taps tasks", "compare", copied / "task-00", tmp_path / "small", check=2)
    assert "have gates on different layers, which cannot be compared" in done.stderr


def test_norms_forget_tasks_that_are_removed(shelf):
    model = taps.adapt(network()).eval()
    model.load_library(shelf[1], keep=2)
    for name in NAMES:
        model.predict(torch.randn(2, 6), tasks=[name, NAMES[0]])
    assert all(len(norm._contents) <= held(model) for norm in model.task_norms)


def test_a_task_that_is_read_again_has_the_names_of_its_new_files(shelf, copied):
    other = taps.adapt(network()).eval()
    names = other.load_library(copied, keep=1)[:2]
    x = torch.randn(2, 6)
    other(x, names[0])
    old = other.about(names[0]).get("classes")
    source = taps.adapt(network()).eval()
    source.load_task(copied / names[0])
    source.describe_task(names[0], classes=[f"new {index}" for index in range(source.heads[names[0]].out_features)])
    other(x, names[1])
    source.save_task(names[0], copied / names[0])
    other(x, names[0])
    assert other.classes(names[0])[0] == "new 0"
    assert old != other.classes(names[0])
    other.describe_task(names[0], classes=None)
    other(x, names[1])
    other(x, names[0])
    assert other.about(names[0]).get("classes") is None, "what was removed stays removed"
