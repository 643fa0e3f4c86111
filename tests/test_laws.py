"""Laws that hold for every method on every network."""

import copy

import pytest
import torch
from cases import CASES, METHODS, NETWORKS, make
from torch import nn

import taps
from taps.core.execution import plain_state
from taps.core.gate import Decision
from taps.core.modules import with_tensors
from taps.core.norm import TaskNorm
from taps.core.unit import GatedUnit
from taps.methods.dynashare import InstanceGate


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def case(request):
    return request.param


def batch(network: str, size: int = 4) -> torch.Tensor:
    return torch.randn(size, *NETWORKS[network].shape, generator=torch.Generator().manual_seed(1))


def snapshot(tensors: dict) -> dict:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def train(model, task: str, x: torch.Tensor, steps: int = 3) -> None:
    """Take a few steps with weight decay and a penalty, so that everything that may change does."""
    model.train()
    others = {*model.tasks} - {task}
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9, weight_decay=1e-3
    )
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x, task=task).square().mean() + model.penalty(task)).backward()
        for name, parameter in model.named_parameters():  # others get no gradient, or they would decay
            parts = name.split(".")
            if task not in parts and (others & set(parts) or not model.method.trains_base):
                assert parameter.grad is None, name
        optimizer.step()
    model.eval()


def close_some(model, task: str) -> None:
    for index, unit in enumerate(model.units):
        if isinstance(unit.gates[task], taps.ThresholdGate):
            unit.gates[task].set(index % 3 != 1)


@pytest.fixture(scope="module")
def trained(case):
    """A model whose task "a" has been trained and partly closed, and its earlier state."""
    torch.manual_seed(0)
    network, _ = case
    model = make(*case).eval()
    x = batch(network)
    with torch.no_grad():
        start = {"base": model.features(x), "b": model(x, "b"), "state": snapshot(model.base_state())}
        start["task_b"] = snapshot(model.task_state("b"))
    train(model, "a", x)
    close_some(model, "a")
    return model, x, start


def test_zero_delta_is_the_base_bit_for_bit(case):
    network, method = case
    name, options = METHODS[method]
    net = NETWORKS[network].make().eval()
    x = batch(network)
    with torch.no_grad():
        base = net(x)
        model = taps.adapt(net, name, **options)
        model.add_task("a", head=torch.nn.Identity())
        model.eval()
        if not model.method.learns_policy:
            assert torch.equal(model(x, "a"), base)
            assert torch.equal(net(x), base), "the wrapped network computes what it did"
        for unit in model.units:  # and so it is through the code that adds deltas
            unit.gates["a"].decide = lambda x=None: taps.Decision(specific=torch.tensor(1.0))
        assert torch.equal(model(x, "a"), base)
        if model.method.policy_gate is not None:
            model.follow({"a": [1.0] * len(model.units)})
            for gate in model.gates("a"):
                if isinstance(gate, InstanceGate):
                    gate.choose.bias.copy_(torch.tensor([9.0, -9.0]))
            assert torch.equal(model(x, "a"), base)


def test_number_of_units(case):
    network, method = case
    model = make(*case)
    rows = model.report("a")
    assert len(rows) == len(model.units)
    row = NETWORKS[network]
    count = {"adashare": row.blocks, "dynashare": row.blocks, "automtl_blocks": row.layers + row.blocks}.get(
        method, row.layers
    )
    if method not in ("finetune", "sparse_delta", "sparse_rows", "hard_sharing"):  # which change loose parameters too
        assert len(rows) == count
    assert set(rows[0]) == {"name", "kind", "parameters", "score", "run", "specific"}


def test_decisions_are_hard(trained):
    model, _, _ = trained
    for row, gate in zip(model.report("a"), model.gates("a"), strict=True):
        if gate.uses_input:  # a mean over samples
            continue
        assert row["run"] in (0.0, 1.0)
        assert row["specific"] in (0.0, 1.0)


def test_training_a_task_leaves_base_and_other_tasks_bit_identical(trained):
    model, x, start = trained
    assert_same(start["task_b"], model.task_state("b"))
    if model.method.trains_base:
        assert any(not torch.equal(tensor, start["state"][name]) for name, tensor in model.base_state().items())
        return
    assert_same(start["state"], model.base_state())
    with torch.no_grad():
        assert torch.equal(model.features(x), start["base"])
        assert torch.equal(model(x, "b"), start["b"])


def test_a_shared_pass_computes_each_task_s_own(trained):
    model, x, _ = trained
    outputs = model.predict(x)
    with torch.no_grad():
        for task in ("a", "b"):
            torch.testing.assert_close(outputs[task], model(x, task), rtol=1e-5, atol=1e-5)


def test_training_a_task_changes_that_task(trained):
    model, x, start = trained
    changed = not torch.equal(model(x, "a"), model.heads["a"](start["base"]))
    assert changed == (model.method.name != "linear_probe")


def test_merged_network_computes_the_same_without_a_class_of_ours(trained):
    model, x, _ = trained
    if any(gate.uses_input for gate in model.gates("a")):
        with pytest.raises(ValueError, match="for each sample, so it cannot be merged"):
            model.merge("a")
        return
    plain = model.merge("a")
    assert not any(type(module).__module__.startswith("taps") for module in plain.modules())
    with torch.no_grad():
        assert torch.equal(plain(x), model(x, "a"))
        assert torch.allclose(copy.deepcopy(plain).double()(x.double()), plain(x).double(), atol=1e-4)
    assert not {*plain.parameters()} & {*model.parameters()}


def test_saved_task_loads_exactly_into_a_fresh_base(trained, case, tmp_path):
    model, x, _ = trained
    model.save_task("a", tmp_path)
    network, method = case
    name, options = METHODS[method]
    net = NETWORKS[network].make()
    for trainable in (False, True):
        other = taps.adapt(copy.deepcopy(net), name, **options)
        other.load_base(model.base_state())
        assert other.load_task(tmp_path, trainable=trainable) == "a"
        other.eval()
        with torch.no_grad():
            assert torch.equal(other(x, "a"), model(x, "a"))
        assert other.report("a") == model.report("a")
        own = [parameter for name, parameter in other.named_parameters() if "a" in name.split(".")]
        assert any(parameter.requires_grad for parameter in own) == trainable


def test_file_is_as_long_as_what_it_holds(trained, tmp_path):
    model, _, _ = trained
    model.save_task("a", tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "task.safetensors")
    content = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    account = taps.storage.task_file.read_description(tmp_path)["accounting"]
    counted = account["parameters"] + account["head_parameters"]
    scores = sum(tensor.nbytes for gate in model.gates("a") for tensor in gate.state_dict().values())
    assert content == 4 * counted + scores
    assert (tmp_path / "task.safetensors").stat().st_size <= content + 120 * len(tensors) + 200


def test_same_seed_same_run(case):
    def run():
        torch.manual_seed(3)
        model = make(*case)
        train(model, "a", batch(case[0]))
        return model.task_state("a")

    assert_same(snapshot(run()), run())


def test_task_parameters_are_named_after_the_task(case):
    model = make(*case, tasks=("a", "x-1_Y"))
    parameters = {name for name, _ in model.named_parameters()}
    names = [name for name in parameters if "x-1_Y" in name.split(".")]
    assert set(names) == parameters & model.task_state("x-1_Y").keys()
    gated = "threshold" in model.options
    assert sum(name.endswith(".score") for name in names) == len(model.units) * gated
    holding = sum(name.endswith(".delta") for name in names)
    if model.method.learns_policy:
        owned = [u for u in model.units if u.gates["x-1_Y"].decide().uses_delta]
    else:
        owned = [u for u in model.units if u.gates["x-1_Y"].needs_delta]
    assert holding == sum(len(u.parameter_names) for u in owned)


def test_a_closed_unit_calls_its_base_directly(case, monkeypatch):
    """No weight is even copied: the base module uses its own parameters."""
    model = make(*case).eval()
    close_some(model, "a")
    seen = []

    def watched(module, *rest, **more):
        seen.append(module)
        return with_tensors(module, *rest, **more)

    monkeypatch.setattr("taps.core.unit.with_tensors", watched)
    model(batch(case[0]), "a")
    opened = [place.base for place, row in zip(model.units, model.report("a"), strict=True) if row["specific"] == 1]
    assert {id(module) for module in seen} <= {id(module) for module in opened}
    own = {name for name in plain_state(model.backbone) if "shortcut." not in name}
    assert own == set(NETWORKS[case[0]].make().state_dict())


def test_a_unit_that_is_not_run_never_calls_its_base():
    model = make("perceptron", "taps")
    unit = model.units[0]
    unit.gates["a"] = taps.ConstantGate(run=0.0)
    unit.base.forward = None
    unit.shortcut = torch.nn.Linear(5, 7)
    assert model(batch("perceptron"), "a").shape == (4, 3)


def test_a_decision_that_is_a_tensor_cannot_be_merged():
    model = make("perceptron", "taps")
    gate = model.units[0].gates["a"] = taps.ConstantGate()
    gate.decision = Decision(run=torch.tensor(0.5))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge("a")


@pytest.mark.parametrize("network", ["resnet", "densenet", "vit"])
def test_follow_shares_everything_before_the_first_tuned_layer(network):
    model = make(network, "taps_follow")
    x = batch(network)
    train(model, "a", x)
    for unit in model.units[:-2]:
        unit.gates["a"].set(False)
    model.eval()
    first = model.units[-2]
    inputs = []
    first.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].clone()))
    with torch.no_grad():
        model(x, "a")
        model.features(x)
    assert torch.equal(inputs[0], inputs[1])
    owned = [norm.name for norm in model.task_norms if norm.active("a") is not None]
    assert len(owned) < len(model.task_norms)


def test_follow_with_chosen_layers_shares_the_norms_of_the_others():
    model = taps.adapt(NETWORKS["resnet"][0](), norm="follow", layers="layer2")
    model.add_task("a", num_classes=2)
    owned = [norm.name for norm in model.task_norms if norm.active("a") is not None]
    assert owned
    assert all(name.startswith("layer2.") for name in owned)


def test_a_transformer_s_fast_path_sees_the_deltas():
    """In evaluation without gradients ``nn.TransformerEncoderLayer`` reads weights of its children's children."""
    model = taps.adapt(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten())).eval()
    model.add_task("a", head=nn.Identity())
    for parameter in model.roles("a")["delta"].values():
        parameter.data.normal_()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        fast = model(x, "a")
    torch.testing.assert_close(fast, model(x, "a"))
    torch.testing.assert_close(fast, model.merge("a")(x))


def test_frozen_base_statistics_never_move():
    model = make("resnet", "taps_follow")
    for unit in model.units:
        unit.gates["a"].set(False)
    before = snapshot(model.base_state())
    model.train()
    model(batch("resnet"), "a")
    model.features(batch("resnet"))
    assert_same(before, model.base_state())
    assert all(not norm.base.training for norm in model.task_norms)


def test_deepcopy_is_a_model_of_its_own():
    model = make("resnet", "taps_follow").eval()
    twin = copy.deepcopy(model)
    for unit in twin.units:
        unit.gates["a"].set(False)
    assert all(row["specific"] == 1 for row in model.report("a"))
    assert all(norm.active("a") is None for norm in twin.task_norms)
    modules = set(model.modules())
    assert not any(isinstance(module, (GatedUnit, TaskNorm)) and module in modules for module in twin.modules())


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("resnet34", 36), ("resnet50", 53), ("densenet121", 120), ("mobilenetv2_100", 52), ("convnext_tiny", 58),
        ("vit_small_patch16_224", 49),
        ("swin_tiny_patch4_window7_224", 52),
    ],
)  # fmt: skip
def test_published_networks(name, units):
    """Full-size networks have the right number of units, an unchanged base, and a merged network that timm's model loads."""
    import timm

    size = 224 if "224" in name else 64
    net = taps.create_backbone(name, pretrained=False).eval()
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        base = net(x)
        model = taps.adapt(net).eval()
        model.add_task("a", num_classes=7)
        assert len(model.report("a")) == units
        assert torch.equal(model.heads["a"](base), model(x, "a"))
        for parameter in model.roles("a")["delta"].values():
            parameter.normal_(std=0.01)
        plain = timm.create_model(name, num_classes=7)
        plain.load_state_dict(model.merge("a").state_dict())
        assert torch.equal(plain.eval()(x), model(x, "a"))
        assert not torch.allclose(model.heads["a"](base), model(x, "a"))


def test_resnet50_downsample_positions():
    """Layers are in the published order: the shortcut convolutions are layers 4, 14, 27 and 46."""
    model = taps.adapt(taps.create_backbone("resnet50", pretrained=False))
    model.add_task("a", num_classes=2)
    names = [row["name"] for row in model.report("a")]
    assert [index for index, name in enumerate(names) if "downsample" in name] == [4, 14, 27, 46]
    assert sum(row["parameters"] for row in model.report("a")) == 23_454_912
    assert model.base_parameters == 23_508_032
