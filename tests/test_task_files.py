"""Task files are complete, small and refused if they do not fit; the model and the folder are left unchanged."""

import json
import os

import pytest
import torch
from cases import make
from safetensors.torch import load_file, save_file
from torch import nn

import taps


@pytest.fixture(scope="module")
def net_state():
    torch.manual_seed(5)
    return taps.create_backbone("resnet18", pretrained=False).state_dict()


def fresh(net_state, method="taps", **options):
    net = taps.create_backbone("resnet18", pretrained=False)
    net.load_state_dict(net_state)
    return taps.adapt(net, method, **options)


@pytest.fixture
def saved(net_state, tmp_path):
    model = fresh(net_state)
    model.add_task("sketch", num_classes=5)
    for parameter in model.roles("sketch")["delta"].values():
        parameter.data.normal_(std=0.1)
    for unit in model.units[4:]:
        unit.gates["sketch"].set(False)
    model.save_task("sketch", tmp_path / "sketch", {"classes": list("abcde")})
    return model, tmp_path / "sketch"


def test_only_what_is_used_is_stored(saved):
    model, folder = saved
    tensors = load_file(folder / "task.safetensors")
    deltas = [name for name in tensors if name.startswith("delta/")]
    assert deltas == sorted(f"delta/{unit.name}/weight" for unit in model.units[:4])
    assert tensors["gate/score"].shape == (20,)
    description = json.loads((folder / "task.json").read_text())
    assert description["classes"] == list("abcde")
    assert description["base"]["fingerprint"] == model.fingerprint()
    assert [row["specific"] for row in description["units"]] == [1.0] * 4 + [0.0] * 16
    assert sorted(os.listdir(folder)) == ["task.json", "task.safetensors"]


def test_a_loaded_task_holds_no_delta_where_it_is_closed(saved, net_state):
    _, folder = saved
    other = fresh(net_state)
    other.load_task(folder, name="other-name")
    assert other.tasks == ["other-name"]
    assert sum("other-name" in unit.deltas for unit in other.units) == 4
    other.remove_task("other-name")
    assert other.tasks == []
    assert not any("other-name" in name for name in other.state_dict())
    other.load_task(folder, trainable=True)
    assert all("sketch" in unit.deltas for unit in other.units)


def test_fingerprint_sees_every_tensor(net_state):
    model = fresh(net_state)
    prints = {model.fingerprint()}
    with torch.no_grad():
        model.backbone.layer4[1].bn2.base.running_mean[3] += 1e-6
        prints.add(model.fingerprint())
        model.backbone.conv1.base.weight[0, 0, 0, 0] += 1e-6
        prints.add(model.fingerprint())
    assert len(prints) == 3
    assert fresh(net_state).fingerprint() in prints


def damage_truncate(folder):
    path = folder / "task.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_nan(folder):
    tensors = load_file(folder / "task.safetensors")
    tensors["head/weight"][0, 0] = float("nan")
    save_file(tensors, folder / "task.safetensors", {"format": "pt"})


def damage_missing_tensor(folder):
    tensors = load_file(folder / "task.safetensors")
    del tensors["delta/conv1/weight"]
    save_file(tensors, folder / "task.safetensors", {"format": "pt"})
    rewrite(folder, bytes=(folder / "task.safetensors").stat().st_size)


def damage_extra_tensor(folder):
    tensors = load_file(folder / "task.safetensors")
    tensors["delta/fc/weight"] = torch.zeros(3)
    save_file(tensors, folder / "task.safetensors", {"format": "pt"})
    rewrite(folder, bytes=(folder / "task.safetensors").stat().st_size)


def rewrite(folder, **entries):
    path = folder / "task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "not a complete safetensors file"),
        (damage_nan, "head/weight holds values that are not finite"),
        (damage_missing_tensor, "lacks the delta of conv1, whose gate is open"),
        (damage_extra_tensor, "delta/fc/weight"),
        (lambda folder: rewrite(folder, format=99), "format version 99; this version reads formats 1 and 2"),
        (lambda folder: rewrite(folder, method="finetune"), "which method 'finetune' does not have"),
        (lambda folder: rewrite(folder, method="finetune", options={}), "lacks the delta of"),
        (lambda folder: rewrite(folder, method="fintune"), "method='fintune'"),
        (lambda folder: rewrite(folder, bytes=7), "do not belong together"),
        (lambda folder: (folder / "task.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "task.json").unlink(), "does not exist"),
        (lambda folder: (folder / "task.safetensors").unlink(), "does not exist"),
        (
            lambda folder: rewrite(folder, base={"name": "x", "fingerprint": "0" * 64, "parameters": 1}),
            "another base.*0000.*this one is",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(saved, net_state, damage, message):
    _, folder = saved
    damage(folder)
    model = fresh(net_state)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        model.load_task(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert list(model.state_dict()) == before, "the model is unchanged"


@pytest.mark.parametrize("change", [{"method": "finetune"}, {"norm": "follow"}, {"options": {"threshold": 0.2}}])
def test_a_task_of_another_method_cannot_be_trained_further(saved, net_state, change):
    _, folder = saved
    rewrite(folder, **change)
    with pytest.raises(ValueError, match=f"{next(iter(change))}.* adapt the base as for that task"):
        fresh(net_state).load_task(folder, trainable=True)


def test_another_base_is_refused_with_both_fingerprints(saved, net_state):
    model, folder = saved
    other = taps.adapt(taps.create_backbone("resnet18", pretrained=False))
    with pytest.raises(ValueError, match=f"{model.fingerprint()[:16]}.*{other.fingerprint()[:16]}"):
        other.load_task(folder)


def test_a_task_that_is_not_finite_is_not_saved(saved):
    model, folder = saved
    before = (folder / "task.safetensors").read_bytes()
    model.units[0].deltas["sketch"]["weight"].data[0] = float("inf")
    with pytest.raises(ValueError, match=r"not saved: delta/conv1/weight"):
        model.save_task("sketch", folder)
    assert (folder / "task.safetensors").read_bytes() == before


def test_an_own_head_is_stored_and_needs_its_module_back(net_state, tmp_path):
    def head():
        return nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 2))

    model = fresh(net_state).eval()
    model.add_task("t", head=head())
    model.save_task("t", tmp_path)
    other = fresh(net_state).eval()
    with pytest.raises(ValueError, match="give load_task a head="):
        other.load_task(tmp_path)
    other.load_task(tmp_path, head=head())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(x, "t"), model(x, "t"))
    assert torch.equal(model.merge("t")(x), model(x, "t"))


def test_names(net_state):
    model = fresh(net_state)
    for name in ("items", "train", "weight", "2026-test_A"):
        model.add_task(name, num_classes=2)
    for name in ("a b", "a/b", "a.b", "", "é", 3):
        with pytest.raises(ValueError, match="is not allowed"):
            model.add_task(name, num_classes=2)
    with pytest.raises(ValueError, match="already has a task 'items'"):
        model.add_task("items", num_classes=2)
    with pytest.raises(ValueError, match="unknown task 'itens'; did you mean 'items'"):
        model(torch.zeros(1, 3, 32, 32), task="itens")
    for call in (model.penalty, model.report, model.merge, model.remove_task):
        with pytest.raises(ValueError, match="unknown task"):
            call("nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tapes"}, "unknown method 'tapes'; did you mean 'taps'"),
        ({"norm": "shared"}, "unknown norm policy 'shared'"),
        ({"treshold": 0.3}, "unknown option of method taps: 'treshold'; did you mean 'threshold'"),
        ({"ste": "soft"}, "ste must be 'code' or 'paper'"),
        ({"threshold": float("nan")}, "threshold must be a finite number"),
        ({"layers": "("}, "not a valid regular expression"),
        ({"layers": "layer9"}, "matches none of the 20 layers"),
        ({"method": "norm_only", "norm": "frozen"}, "works with norm='task'"),
        ({"method": "finetune", "threshold": 0.1}, "unknown option"),
    ],
)
def test_wrong_arguments_of_adapt(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        taps.adapt(taps.create_backbone("resnet18", pretrained=False), **arguments)


def test_adapting_twice_or_nothing_is_refused():
    model = make("perceptron", "taps")
    with pytest.raises(ValueError, match="adapted already"):
        taps.adapt(model.backbone)
    with pytest.raises(ValueError, match="no convolution, linear or attention layer"):
        taps.adapt(nn.ReLU())
    with pytest.raises(ValueError, match="either num_classes or head"):
        model.add_task("c")
    with pytest.raises(ValueError, match="whole number above 0"):
        model.add_task("c", num_classes=0)


def test_layers_chooses_by_name():
    model = taps.adapt(taps.create_backbone("resnet18", pretrained=False), layers=r"layer[34]\.")
    model.add_task("a", num_classes=2)
    rows = model.report("a")
    assert len(rows) == 10
    assert all(row["name"].startswith(("layer3.", "layer4.")) for row in rows)
