"""The library's front door: stored tasks are models in one call, and one's own images, loaders and networks fit."""

import copy
import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from accelerate import Accelerator
from cases import origin_of
from conftest import ROOT
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import taps
from taps.networks import backbones
from taps.networks.origin import rebuild
from taps.runs.setup import load_run

OLD = ROOT / "tests" / "files" / "0.9.0" / "run"


def network():
    torch.manual_seed(7)
    net = timm.create_model("test_resnet", num_classes=0)
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return net


def trained(method: str, norm: str | None = None, name: str = "a", classes: int = 3) -> taps.TaskModel:
    """Return a model whose task differs from the base wherever its method lets it, with some units closed."""
    model = taps.adapt(network(), method, norm=norm)
    model.add_task(name, num_classes=classes)
    generator = torch.Generator().manual_seed(len(method))
    with torch.no_grad():
        for role, parameters in model.roles(name).items():
            for index, parameter in enumerate(parameters.values()):
                if role == "gate":
                    parameter.fill_(0.2 if index % 2 else 0.05)
                else:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# -- tasks of several methods in one model -------------------------------------------------------------------------

METHODS = [
    ("taps", "task"), ("taps", "follow"), ("taps", "frozen"), ("taps_budget", "follow"), ("finetune", "task"),
    ("norm_only", "task"), ("linear_probe", "frozen"),
]  # fmt: skip


def test_tasks_of_any_method_run_in_one_model(tmp_path):
    x = torch.randn(2, 3, 32, 32)
    alone = {}
    for method, norm in METHODS:
        name = f"{method}-{norm}"
        model = trained(method, norm, name)
        model.save_task(name, tmp_path / name)
        alone[name] = model(x, task=name)
    model = taps.load(tmp_path, base=network())
    for name, expected in alone.items():
        assert torch.equal(model(x, task=name), expected), name
    for name, output in model.predict(x).items():
        torch.testing.assert_close(output, alone[name])
    names = list(alone)[:2]
    torch.testing.assert_close(model(x, task=names), torch.stack([alone[n][i] for i, n in enumerate(names)]))
    for name, expected in alone.items():
        torch.testing.assert_close(model.merge(name)(x), expected)


@pytest.mark.parametrize(("method", "norm"), METHODS)
@pytest.mark.parametrize("host", ["task", "follow", "frozen"])
def test_a_task_saved_from_another_models_method_is_unchanged(method, norm, host, tmp_path):
    model = trained(method, norm)
    model.save_task("a", tmp_path / "first")
    other = taps.adapt(network(), "taps", norm=host).eval()
    other.load_task(tmp_path / "first")
    other.save_task("a", tmp_path / "second")
    for name in ("task.json", "task.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    if (method, norm) != ("taps", host):
        with pytest.raises(taps.UserError, match="adapt the base as for that task, with method="):
            other.load_task(tmp_path / "first", name="b", trainable=True)


def test_units_that_the_model_lacks_are_refused(tmp_path):
    trained("finetune").save_task("a", tmp_path / "a")
    model = taps.adapt(network(), layers="layer1")
    with pytest.raises(taps.UserError, match=r"was made with method='finetune'.* adapt the base as for that task"):
        model.load_task(tmp_path / "a")
    assert model.tasks == []


# -- a folder is a model -------------------------------------------------------------------------------------------


def test_a_run_and_its_tasks_load_in_one_call(finished, tree, tmp_path):
    run = finished[0] / "results/run"
    trainer, prepare = load_run(run)
    model = taps.load(run)
    assert model.tasks == trainer.tasks
    assert model.classes("paint") == ["class0", "class1", "class2"]
    image = Image.open(tree / "paint/test/class1/0.png")
    x = model.transform("paint")(image)[None]
    assert torch.equal(x, prepare.transform(False)(image)[None])
    # two files and the base's name, which they hold
    for name in ("task.json", "task.safetensors"):
        (tmp_path / "shipped").mkdir(exist_ok=True)
        shutil.copy(run / "paint" / name, tmp_path / "shipped")
    alone = taps.load(tmp_path / "shipped")
    expected = trainer(x, task="paint").softmax(1)
    assert torch.equal(model(x, task="paint").softmax(1), expected)
    assert torch.equal(alone(x, task="paint").softmax(1), expected)
    few = taps.load(run, tasks=["paint"])
    assert few.tasks == ["paint"]
    limited = taps.load(run, keep=1)
    assert torch.equal(limited(x, task="paint").softmax(1), expected)
    assert limited.classes("paint") == model.classes("paint")


def test_a_jointly_trained_run_brings_its_base(joint, tree):
    run = joint[0] / "results/run"
    trainer, _ = load_run(run)
    x = torch.randn(1, 3, 32, 32)
    for source in (run, run / "paint"):
        assert torch.equal(taps.load(source)(x, task="paint"), trainer(x, task="paint"))


def test_a_run_of_an_earlier_version_loads_with_its_settings():
    model = taps.load(OLD)
    assert model.transform("paint")(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    assert model.classes("paint") == ["class0", "class1", "class2"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda path: shutil.rmtree(path), {}, "does not exist"),
        (lambda path: (path / "task.json").unlink(), {}, "task.json does not exist"),
        (lambda path: None, {"tasks": ["pain"]}, "unknown task 'pain'; did you mean 'paint'"),
        (lambda path: None, {"base": timm.create_model("test_resnet", num_classes=0)}, "was made for another base"),
        (lambda path: edit(path, base={"model": "resnet999"}), {}, "unknown backbone 'resnet999'"),
        (
            lambda path: edit(path, base={"weights": "file", "file": "w.pth"}),
            {},
            "the weights in w.pth, a file that is",
        ),
        (lambda path: edit(path, base={"seed": None}), {}, "random weights that no seed repeats"),
        (lambda path: edit(path, preprocessing={"input_size": 32}), {}, "the stored preprocessing is damaged"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(finished, change, options, message, tmp_path):
    shutil.copytree(finished[0] / "results/run/paint", tmp_path / "paint")
    change(tmp_path / "paint")
    with pytest.raises(taps.UserError, match=message) as caught:
        taps.load(tmp_path / "paint", **options).transform("paint")
    assert len(str(caught.value).splitlines()) == 1


def edit(path: Path, base: dict | None = None, **entries) -> None:
    description = json.loads((path / "task.json").read_text())
    description["base"].update(base or {})
    description.update(entries)
    description.pop("checksums")  # as in a file of an earlier version
    (path / "task.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    "entries",
    [
        {"base": {}}, {"base": "x"}, {"method": []}, {"options": None}, {"options": {"threshold": "x"}}, {"layers": 3},
        {"head": {}}, {"head": {"type": "Linear", "linear": {"in_features": -1, "out_features": 3, "bias": True}}},
        {"norms": 3}, {"units": 3}, {"units": [{}]}, {"encodings": []}, {"task": ["a"]}, {"classes": [1]}, {"accuracy": "x"},
        {"policy": [[1, 1]]}, {"bytes": "x"}, {"accounting": {}}, {"norms": ["no_such_norm"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_description_is_one_line(entries, tmp_path):
    trained("taps", "task").save_task("a", tmp_path / "a")
    description = {**json.loads((tmp_path / "a/task.json").read_text()), **entries}
    (tmp_path / "a/task.json").write_text(json.dumps(description))
    model = taps.adapt(network())
    for load in (lambda: model.load_task(tmp_path / "a"), lambda: taps.load(tmp_path / "a", base=network())):
        with pytest.raises(taps.UserError) as caught:
            load()
        assert len(str(caught.value).splitlines()) == 1
    assert model.tasks == []


def test_what_is_said_about_a_task_is_kept(tmp_path):
    for name in ("a", "b"):
        trained("taps", "task", name).save_task(name, tmp_path / name, {"accuracy": np.float32(50.0), "pair": (1, 2)})
    model = taps.load(tmp_path, base=network(), keep=1)
    assert model.about("a") == {"accuracy": 50.0, "pair": [1, 2]}
    model.describe_task("a", classes=("x", "y", "z"))
    model.predict(torch.zeros(1, 3, 32, 32))
    assert model.classes("a") == ["x", "y", "z"]
    model.remove_task("a")
    trained("taps", "task").save_task("a", tmp_path / "other")
    model.load_task(tmp_path / "other")
    with pytest.raises(taps.UserError, match="task 'a' has no class names"):
        model.classes("a")
    for entries, message in (
        ({"classes": ["x"]}, "task 'a' has 3 outputs, classes= has 1 names"),
        ({"classes": "abc"}, "have to be a list of names"),
        ({"units": 3}, "has an entry 'units' of its own"),
        ({"note": torch.zeros(2)}, "holds a Tensor, which JSON cannot hold"),
    ):
        with pytest.raises(taps.UserError, match=message):
            model.describe_task("a", **entries)
    before = (tmp_path / "other/task.safetensors").read_bytes()
    with pytest.raises(taps.UserError, match="which JSON cannot hold"):
        model.save_task("a", tmp_path / "other", {"note": object()})
    assert (tmp_path / "other/task.safetensors").read_bytes() == before


def test_a_trained_base_is_saved_with_its_tasks(tmp_path):
    torch.manual_seed(0)
    model = taps.adapt(backbones.create_backbone("test_resnet", pretrained=False), train_base=True).eval()
    model.add_task("a", num_classes=3)
    with torch.no_grad():
        next(iter(model.roles("a")["base"].values())).add_(0.5)
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(taps.TaskModel.from_pretrained(tmp_path)(x, task="a"), model(x, task="a"))


def test_a_network_that_is_not_timms_has_to_be_given(tmp_path):
    model = taps.adapt(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)))
    model.add_task("a", num_classes=3)
    model.save_task("a", tmp_path)
    with pytest.raises(taps.UserError, match="does not say which network it was made for; give base="):
        taps.load(tmp_path)
    for wrong, message in ((None, "the network is a NoneType"), (torch.nn.Linear, "the network is a type")):
        with pytest.raises(taps.UserError, match=message):
            taps.adapt(wrong)


def test_a_network_without_features_is_named():
    class Answer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 6)

        def forward(self, x):
            return {"hidden": self.layer(x)}

    with pytest.raises(taps.UserError, match="returns no features of shape"):
        taps.adapt(Answer()).add_task("a", num_classes=3)


@pytest.mark.parametrize("move", [copy.deepcopy, lambda model: model.to(memory_format=torch.channels_last)])
def test_a_rounded_base_stays_known_when_it_moves(move, tmp_path):
    trained("taps", "follow").save_task("a", tmp_path / "a")
    model = move(taps.adapt(network(), norm="follow").half())
    assert model.load_task(tmp_path / "a") == "a"
    other = move(taps.adapt(network(), norm="follow").half().to(torch.bfloat16))
    assert other.load_task(tmp_path / "a") == "a"
    with torch.no_grad():
        next(iter(other.backbone.parameters())).add_(1)
    with pytest.raises(taps.UserError, match="another base"):
        other.load_task(tmp_path / "a", name="b")


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_a_converted_base_takes_the_tasks_of_its_float32_self(precision, tmp_path):
    trained("taps", "follow").save_task("a", tmp_path / "a")
    x = torch.randn(2, 3, 32, 32).to(precision)
    first = taps.adapt(network(), norm="follow").eval()
    first.load_task(tmp_path / "a")
    first.to(precision)
    second = taps.adapt(network(), norm="follow").to(precision).eval()
    second.load_task(tmp_path / "a")
    torch.testing.assert_close(first(x, task="a"), second(x, task="a"), rtol=0.02, atol=0.02)
    third = taps.adapt(network(), norm="follow").to(precision).eval()
    third.load_library(tmp_path)
    assert torch.equal(third(x, task="a"), second(x, task="a"))
    if precision is not torch.float64:  # rounded, and widened again: no longer the base that the task was made for
        with pytest.raises(taps.UserError, match="another base"):
            taps.adapt(network(), norm="follow").to(precision).float().load_task(tmp_path / "a")


# -- predict ---------------------------------------------------------------------------------------------------------


def test_predict_prints_every_task_of_every_image(finished, tree, here, tmp_path):
    run, images = finished[0] / "results/run", tree / "paint/test"
    files = sorted((images / "class1").glob("*.png"))
    table = here("taps predict", run, files[0]).stdout
    assert [line.split()[0] for line in table.splitlines()] == [str(files[0]), "ink-2", "paint"]
    found = json.loads(here("taps predict", run, images / "class1", "--json", "--batch_size", 2).stdout)
    assert [one["image"] for one in found] == [str(path) for path in files]
    model = taps.load(run)
    for one, path in zip(found, files, strict=True):
        x = model.transform("paint")(Image.open(path))[None]
        probabilities = model(x, task="paint").softmax(1)[0]
        shown = {row["class"]: row["probability"] for row in one["tasks"]["paint"]}
        for name, value in zip(model.classes("paint"), probabilities.tolist(), strict=True):
            assert shown[name] == pytest.approx(value, abs=1e-6)
    text = here("taps predict", run, "--tasks", "paint", "--csv", "--top", 1, "--", f"{images}/*/0.png").stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["task"], row["rank"]) for row in rows] == [("paint", "1")] * 3
    (tmp_path / "own.yaml").write_text(f"folder: {run}\nimages: [{files[0]}]\n")
    assert here("taps predict", "--config", "own.yaml").stdout == table


def test_predict_names_what_it_cannot_read(finished, tree, here, tmp_path):
    run = finished[0] / "results/run"
    shutil.copytree(tree / "paint/test/class0", tmp_path / "photos")
    (tmp_path / "photos/bad.png").write_bytes(b"no image")
    done = here("taps predict", run, "photos", check=1)
    assert len([line for line in done.stdout.splitlines() if line.startswith("photos")]) == 5
    assert done.stderr.splitlines() == [
        "not read: photos/bad.png (not an image of a known format)",
        "1 of 6 images could not be read",
    ]
    done = here("taps predict", run, "photos/bad.png", check=2)
    assert done.stderr == "error: image photos/bad.png cannot be read (not an image of a known format)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a.png"], "a.png does not exist"),
        (["."], "expected a folder of tasks and images, then options: taps predict"),
        ([".", "a.png", "--json", "--csv"], "--json and --csv exclude each other"),
        ([".", "a.png", "--top", "0"], "0' is not a whole number of at least 1"),
        ([".", "empty"], "empty holds no images"),
        ([".", "old.png"], "holds no task"),
        ([OLD, "old.png", "--tasks", "pant"], "unknown task 'pant'; did you mean 'paint'"),
    ],
)
def test_a_mistake_of_predict_is_one_line(arguments, message, here, tmp_path):
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "old.png")
    done = here("taps predict", *arguments, check=2)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- fit ---------------------------------------------------------------------------------------------------------------


def samples(classes: int = 3, count: int = 120) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % classes
    x[:, 0] += 1.5 * y.view(-1, 1, 1)
    return TensorDataset(x, y)


def fresh(method: str = "taps") -> taps.TaskModel:
    model = taps.adapt(network(), method)
    torch.manual_seed(1)
    model.add_task("a", num_classes=3)
    return model


def fit(model: taps.TaskModel, **options) -> taps.Record:
    loader = DataLoader(samples(), 16, shuffle=True)
    return taps.fit(model, "a", loader, DataLoader(samples(), 32), lr=0.05, accelerator=None, **options)


def test_fit_learns_and_leaves_a_task_ready_for_use(tmp_path):
    seen = []
    model = fresh()
    record = fit(
        model, epochs=5, folder=tmp_path / "run", classes=list("xyz"), report=lambda row, best: seen.append(best)
    )
    assert record.curve("val_error")[record.best_epoch - 1] == min(record.curve("val_error")) < 10
    assert len(seen) == len(record.rows) == 5
    assert seen[record.best_epoch - 1]
    x = samples().tensors[0][:4]
    loaded = taps.load(record.folder, base=network())
    assert torch.equal(loaded(x, task="a"), model(x, task="a"))
    assert loaded.classes("a") == list("xyz")
    assert loaded.transform("a")(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    with pytest.raises(taps.UserError, match="unknown number 'val_eror'; did you mean 'val_error'"):
        record.curve("val_eror")


def test_fit_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    from taps.training import loop

    fit(fresh(), epochs=2, folder=tmp_path / "whole")
    original, steps = loop._Run._step, []

    def stop(self, window, phase):
        steps.append(1)
        if len(steps) == 12:  # in the middle of the second epoch
            self.save()
            raise KeyboardInterrupt
        return original(self, window, phase)

    monkeypatch.setattr(loop._Run, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(fresh(), epochs=2, folder=tmp_path / "stopped")
    monkeypatch.setattr(loop._Run, "_step", original)
    fit(fresh(), epochs=2, folder=tmp_path / "stopped", resume=True)
    for name in ("task.json", "task.safetensors"):
        assert (tmp_path / "whole/a" / name).read_bytes() == (tmp_path / "stopped/a" / name).read_bytes(), name


def test_fit_keeps_a_budget(tmp_path):
    record = fit(fresh("taps_budget"), epochs=4, budget="30%", folder=tmp_path)
    assert (record.folder / "task.safetensors").stat().st_size <= 0.3 * 4 * sum(
        p.numel() for p in network().parameters()
    )


def test_fit_takes_any_optimiser_and_criterion():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, 32, 32, generator=generator), torch.rand(40, 1, generator=generator)
    model = taps.adapt(network())
    model.add_task("a", num_classes=1)
    loader = DataLoader(TensorDataset(x, y), 20)
    record = taps.fit(
        model, "a", loader, loader, epochs=3, criterion=torch.nn.functional.mse_loss,
        optimizer=lambda groups: torch.optim.RMSprop([p for group in groups for p in group["params"]], lr=1e-3),
    )  # fmt: skip
    assert record.curve("train_error") == [None] * 3
    assert "metric" not in model.about("a")
    losses = record.curve("val_loss")
    assert losses[record.best_epoch - 1] == min(losses)


def test_fit_takes_any_head(tmp_path):
    model = taps.adapt(network())
    model.add_task("a", head=torch.nn.Sequential(torch.nn.Linear(96, 5), torch.nn.Linear(5, 3)))
    record = fit(model, epochs=1)
    assert model.tasks == ["a"]
    assert record.folder is None
    with pytest.raises(taps.UserError, match="task 'a' is frozen: load it with load_task"):
        fit(model, epochs=1)


def test_an_interrupted_fit_leaves_the_task_as_it_was(tmp_path, monkeypatch):
    """The same call continues on the same model, and a new call can close and open gates again."""
    from taps.training import loop

    fit(fresh(), epochs=4, settle_epochs=2, folder=tmp_path / "whole")
    model, original, steps = fresh(), loop._Run._step, []
    before = {name: tensor.clone() for name, tensor in model.task_state("a").items()}

    def stop(self, window, phase):
        steps.append(phase.name)
        if steps.count("settle") == 2:
            self.save()
            raise KeyboardInterrupt
        return original(self, window, phase)

    monkeypatch.setattr(loop._Run, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(model, epochs=4, settle_epochs=2, folder=tmp_path / "stopped")
    monkeypatch.setattr(loop._Run, "_step", original)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.task_state("a").items())
    assert all(parameter.requires_grad for parameter in model.parameters_of("a"))
    fit(model, epochs=4, settle_epochs=2, folder=tmp_path / "stopped", resume=True)
    whole, stopped = (tmp_path / name / "a/task.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    fit(fresh(), epochs=4, folder=tmp_path / "whole", resume=True)  # settles as it was begun
    with pytest.raises(taps.UserError, match="was begun with epochs=4: continue it with as many"):
        fit(fresh(), epochs=5, settle_epochs=2, folder=tmp_path / "whole", resume=True)


@pytest.mark.parametrize("method", ["finetune", "taps_budget"])
def test_deltas_of_a_loaded_task_learn_on(method, tmp_path):
    options = {"budget": "30%"} if method == "taps_budget" else {}
    record = fit(fresh(method), epochs=3, folder=tmp_path, **options)
    model = fresh(method)
    model.remove_task("a")
    if method == "finetune":
        model.load_task(record.folder)
        model.save_task("a", tmp_path / "small", max_error=0.1)
        model.remove_task("a")
    model.load_task(tmp_path / "small" if method == "finetune" else record.folder, name="a", trainable=True)
    closed = {unit.name for unit in model.units if not unit.gates["a"].decide().uses_delta}
    before = {unit.name: unit.deltas["a"]["weight"].detach().clone() for unit in model.units}
    seen: set[str] = set()

    def report(row, is_best):
        seen.update(unit.name for unit in model.units if unit.gates["a"].decide().uses_delta)

    fit(model, epochs=3, report=report, **options)
    assert closed <= seen, "every unit was open at first"
    assert any(
        not torch.equal(unit.deltas["a"]["weight"], before[unit.name]) for unit in model.units if "a" in unit.deltas
    )


def test_fit_leaves_the_generator_and_asks_the_user_for_what_it_needs():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = fresh()
    torch.manual_seed(5)
    fit(model, epochs=1)
    assert torch.equal(torch.rand(3), expected)
    for options, message in (
        ({"accelerator": Accelerator(cpu=True, gradient_accumulation_steps=4)}, "accumulate="),
        ({"patience": 2}, "needs val_loader="),
    ):
        with pytest.raises(taps.UserError, match=message):
            taps.fit(fresh(), "a", DataLoader(samples(), 20), epochs=1, **options)
    for options, message in (
        ({"patience": 2}, "patience cannot be combined"), ({"settle_epochs": 1}, "settle_epochs= is not used with a budget")
    ):  # fmt: skip
        with pytest.raises(taps.UserError, match=message):
            fit(fresh("taps_budget"), epochs=3, **options)


def test_fit_takes_labels_that_are_no_classes():
    model = taps.adapt(network())
    model.add_task("a", num_classes=1)
    loader = DataLoader(TensorDataset(X, (Y > 0).long()), 20)

    def loss(output, labels):
        return torch.nn.functional.binary_cross_entropy_with_logits(output[:, 0], labels.float())

    record = taps.fit(model, "a", loader, loader, epochs=1, criterion=loss, limit_batches=1)
    assert record.curve("val_loss")[0] > 0


def test_a_refused_call_of_fit_leaves_nothing(tmp_path):
    for options, message in (({"budget": "abc"}, "is not a size"), ({"budget": 10}, "too small")):
        with pytest.raises(taps.UserError, match=message):
            fit(fresh("taps_budget"), epochs=1, folder=tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(taps.UserError, match="choose another folder="):
        fit(fresh(), epochs=1, folder=tmp_path / "other", overwrite=True)


X, Y = samples().tensors


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (
            DataLoader(TensorDataset(X, Y + 1), 16),
            {},
            r"train_loader, batch 0, sample 2: label 3 of task 'a' is out of",
        ),
        ([], {}, "train_loader is empty"),
        (iter([(X, Y)]), {}, "train_loader can be read only once"),
        ((number for number in range(3)), {}, "train_loader can be read only once"),
        ([X], {}, r"train_loader, batch 0: expected a pair \(inputs, labels\) of tensors, found Tensor"),
        ([(X, Y, Y)], {}, "found 3 values"),
        ([(X[:4], Y[:3])], {}, "4 inputs with 3 labels"),
        ([(X, Y)], {"budget": "3%"}, "adapt the base with method='taps_budget'"),
        ([(X, Y)], {"lrr": 1}, "unknown option of taps.fit 'lrr'; did you mean 'lr'"),
        ([(X, Y)], {"lr": -1.0}, "lr: -1.0 is not a number above 0"),
        ([(X, Y)], {"classes": ["x"]}, "task 'a' has 3 outputs, classes= has 1 names"),
        ([(X, Y)], {"val_loader": []}, "val_loader is empty"),
        (samples(), {}, "train_loader is a Dataset; wrap it"),
        (5, {}, "train_loader is int; give a DataLoader"),
        (
            [(X, Y.float())],
            {},
            r"cross-entropy needs labels of shape \(B,\) and type int64, found \(120,\) and torch.float32",
        ),
        ([(X, Y[:, None])], {}, r"found \(120, 1\) and torch.int64"),
        ([(X[:1], Y[:1])], {}, "one sample is not enough for batch normalisation; use drop_last=True"),
        ([(X, Y)], {"preprocessing": {"a": 1}}, "the stored preprocessing is damaged"),
        ([(X, Y)], {"lr_warmup_epochs": 1}, "leaves none of 1 epochs at the full rate"),
    ],
)
def test_a_mistake_of_fit_is_one_line(batches, options, message):
    with pytest.raises(taps.UserError, match=message):
        taps.fit(fresh(), "a", batches, **{"epochs": 1, **options})


# -- networks as people have them --------------------------------------------------------------------------------------

TORCHVISION = {
    "resnet18": 512, "densenet121": 1024, "googlenet": 1024, "squeezenet1_1": 512, "mobilenet_v3_small": 1024,
    "efficientnet_b0": 1280, "shufflenet_v2_x0_5": 1024, "regnet_y_400mf": 440, "vit_b_16": 768,
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_torchvision_classifier_is_dropped_and_the_width_is_found(name):
    options = {"init_weights": False} if name == "googlenet" else {}
    with pytest.warns(UserWarning, match=r"the classifier of \w+ \(1000 classes\) is dropped"):
        model = taps.adapt(getattr(torchvision.models, name)(weights=None, **options))
    model.add_task("a", num_classes=3)
    assert model.num_features == TORCHVISION[name]
    side = 224 if name == "vit_b_16" else 64
    assert model(torch.randn(2, 3, side, side), task="a").shape == (2, 3)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_a_timm_classifier_is_dropped(name):
    net = timm.create_model(name, num_classes=10)
    expected = copy.deepcopy(net)
    expected.reset_classifier(0)
    with pytest.warns(UserWarning, match=r"\(10 classes\) is dropped"):
        model = taps.adapt(net).eval()
    x = torch.randn(1, 3, *net.default_cfg["input_size"][1:])
    assert torch.equal(model.features(x), expected.eval()(x))


def test_a_name_is_a_network():
    model = taps.adapt("tf_efficientnet_lite0")
    assert model.base_name == "tf_efficientnet_lite0"
    with pytest.raises(taps.UserError, match="unknown backbone 'tf_efficientnet_lit0'; did you mean"):
        taps.adapt("tf_efficientnet_lit0")


def test_an_origin_makes_the_network_again():
    torch.manual_seed(3)
    net = backbones.create_backbone("test_vit", pretrained=False, img_size=64)
    origin = {**origin_of(net), "seed": 3}
    before = torch.get_rng_state()
    again = rebuild(json.loads(json.dumps(origin)))
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(net.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert np.isclose(again.patch_embed.img_size, 64).all()


def test_a_file_name_may_have_parentheses(finished, here, tmp_path):
    for name in ("a (1).png", "b (cannot be read (2)).png"):
        (tmp_path / name).write_bytes(b"no image")
        done = here("taps predict", finished[0] / "results/run", name, check=2)
        assert done.stderr == f"error: image {name} cannot be read (not an image of a known format)\n"


def test_fit_takes_a_last_batch_of_one_where_no_batch_norm_learns():
    samples = [(torch.randn(3, 32, 32), index % 3) for index in range(5)]
    model = taps.adapt(timm.create_model("test_resnet", pretrained=False, num_classes=0), "linear_probe")
    model.add_task("a", 3)
    taps.fit(model, "a", DataLoader(samples, 4), epochs=1)
    assert not model.training


def test_half_precision_ends_with_training():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = fresh()
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process
    try:
        half = Accelerator(mixed_precision="bf16", cpu=True)
        taps.fit(model, "a", [samples()[:16]], epochs=1, accelerator=half)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert model(torch.zeros(2, 3, 32, 32), task="a").dtype == torch.float32
