"""Laws of methods that skip residual blocks, for networks in one, two and three dimensions."""

import copy

import pytest
import timm
import torch
from cases import NETWORKS as ALL
from cases import BasicBlock, alternating
from torch import nn

import taps
from taps.core.gate import ConstantGate
from taps.core.modules import evaluating
from taps.methods.blocks import BLOCKS, find_blocks
from taps.methods.policy import Policy, read_policy

NETWORKS = {name: row for name, row in ALL.items() if row.blocks and name != "resnet"}


def make(network: str, method: str, policies: dict | None = None, **options) -> taps.TaskModel:
    model = taps.adapt(NETWORKS[network].make(), method, **options)
    for index, task in enumerate(policies or ("a", "b")):
        model.add_task(task, num_classes=3 + index)
    if policies:
        model.follow(policies)
    return model


def batch(network: str, size: int = 4) -> torch.Tensor:
    return torch.randn(size, *NETWORKS[network].shape)


def move_statistics(model) -> None:
    """Set running statistics that differ from norm to norm, as after training."""
    for tensor in model.buffers():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.2)


@pytest.mark.parametrize("network", NETWORKS)
def test_blocks_are_found_in_network_order(network):
    net, count = NETWORKS[network].make(), NETWORKS[network].blocks
    found = find_blocks(net)
    assert len(found) == count
    places = {id(module): place for place, module in enumerate(net.modules())}
    order = [places[id(unit.module)] for unit in found]
    assert order == sorted(order)
    assert all(unit.channels for unit in found)


def test_networks_without_blocks_are_refused_and_new_blocks_can_be_added():
    class Mine(BasicBlock):
        pass

    assert len(find_blocks(nn.Sequential(Mine(1, 2, 2)))) == 1
    other = type("Other", (nn.Module,), {"forward": lambda self, x: x + 1})
    with pytest.raises(ValueError, match=r"Sequential has no residual block that can be skipped; known are BasicBlock"):
        taps.adapt(nn.Sequential(other(), nn.Linear(2, 2)), "adashare")
    BLOCKS["Other"] = lambda block: {"": None}
    try:
        assert [unit.name for unit in find_blocks(nn.Sequential(other(), nn.Linear(2, 2)))] == ["0"]
    finally:
        del BLOCKS["Other"]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_skipped_block_is_not_called_and_a_shared_one_once(network):
    count = NETWORKS[network].blocks
    model = make(network, "adashare", {"a": [1.0, *alternating(count - 1, 0)], "b": [1.0, *alternating(count - 1, 1)]})
    calls = [0] * count
    for index, unit in enumerate(model.units):
        unit.base.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    x = batch(network)
    model(x, task="a")
    assert calls == [1, *map(int, alternating(count - 1, 0))]
    calls[:] = [0] * count
    model(x, tasks=["a", "b"])
    assert calls == [1] * count, "the first block by both at once, every other one by one of them"
    for unit in model.units:
        unit.gates["a"] = unit.gates["b"] = ConstantGate(run=0.0)
    calls[:] = [0] * count
    model.predict(x)
    assert calls == [0] * count


@pytest.mark.parametrize("network", NETWORKS)
def test_instance_gates_run_only_the_rows_that_are_kept(network):
    count = NETWORKS[network].blocks
    model = make(network, "dynashare", {"a": [1.0] * count}, target_rates=[0.5] * count)
    seen = []
    for unit in model.units:
        unit.base.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len((*args, *kwargs.values())[0])), with_kwargs=True
        )
    x = batch(network, 6)
    model.eval()
    for unit in model.units:  # a threshold in the middle of these samples
        gate = unit.gates["a"]
        gate.decide = lambda x, gate=gate: taps.core.gate.Decision(run=(x.flatten(1).mean(1) > x.mean()).to(x.dtype))
    with torch.no_grad():
        together = model.features(x, "a")
        assert seen
        assert all(0 < rows < 6 for rows in seen)
        for unit in model.units:
            del unit.gates["a"].decide
        first = model.features(x, "a")
        assert torch.equal(first, model.features(x, "a")), "no noise in evaluation"
        alone = torch.cat([model.features(x[i : i + 1], "a") for i in range(6)])
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-4)
    assert together.shape == first.shape


def test_instance_gates_that_stand_still_train_as_they_evaluate():
    model = make("narrow", "dynashare", {"a": [1.0] * 8}, target_rates=[0.5] * 8)
    x = batch("narrow", 6)
    for gate in model.gates("a"):
        gate.requires_grad_(False)
        gate.normalize.running_mean.normal_()
    kept = []
    for unit in model.units:
        unit.base.register_forward_pre_hook(lambda module, args: kept.append(len(args[0])))
    before = {name: tensor.clone() for gate in model.gates("a") for name, tensor in gate.named_buffers()}
    for gate in model.gates("a"):
        gate.choose.weight.data.normal_()
        gate.choose.bias.data.zero_()
    model.train().features(x, "a").sum().backward()
    assert all(gate.rate is None for gate in model.gates("a"))
    assert kept
    assert min(kept) < 6, "rows that are left out are not computed"
    after = {name: tensor for gate in model.gates("a") for name, tensor in gate.named_buffers()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("network", ["narrow", "mobilenet", "vit", "residual_series"])
def test_one_pass_for_all_tasks_trains_like_a_pass_each(network):
    count = NETWORKS[network].blocks
    policies = {"a": [1.0, *alternating(count - 1, 0)], "b": [1.0, *alternating(count - 1, 1)]}
    model = make(network, "adashare", policies).double()
    x = batch(network).double()
    gradients = []
    for at_once in (True, False):
        model.zero_grad()
        if at_once:
            sum(output.square().mean() for output in model(x, tasks=["a", "b"]).values()).backward()
        else:
            for task in policies:
                model(x, task).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-7, atol=1e-9, msg=name)


def test_tasks_have_their_own_norms_from_where_their_ways_part():
    policies = {"a": [1.0] * 8, "b": [1.0] * 8, "c": [1.0] * 5 + [0.0] * 3}
    model = make("narrow", "adashare", policies)
    position = {unit.name: index for index, unit in enumerate(model.units)}
    for norm in model.task_norms:
        inside = [index for name, index in position.items() if norm.name.startswith(f"{name}.")]
        parted = bool(inside) and inside[0] > 5 and "downsample" in norm.name  # c never comes to the others
        assert ("a" in norm.norms) == parted, norm.name
        assert not parted or (norm.active("a") is norm.active("b") and norm.active("a") is not norm.active("c"))
    x = batch("narrow", 8)
    model.train()
    model(x, tasks=["a", "b", "c"])
    for norm in model.task_norms:
        if norm.active("c") is not norm.active("a"):
            norm.active("c").weight.data.add_(0.1)
    alone = copy.deepcopy(model)
    model.eval(), alone.eval()
    calls = []
    model.units[7].base.conv1.register_forward_hook(lambda *_: calls.append(1))
    outputs = model.predict(x)
    assert len(calls) == 1, "a and b are still one"
    with torch.no_grad():
        assert all(torch.equal(outputs[task], alone(x, task)) for task in policies)


def test_tasks_part_at_the_first_gate_that_looks_at_the_sample():
    rates = [1.0] * 2 + [0.5] * 6
    model = make("narrow", "dynashare", {"a": [1.0] * 8, "b": [1.0] * 8}, target_rates=rates)
    owned = [norm for norm in model.task_norms if "a" in norm.norms]
    assert {norm.name for norm in owned} == {norm.name for norm in model.task_norms if norm.position > 2}
    assert all(norm.active("a") is not norm.active("b") for norm in owned)


def test_a_blended_block_counts_a_batch_once():
    """The convolution beside a block is both part of it and its shortcut."""
    model = make("narrow", "adashare")
    model.train()(batch("narrow", 4), "a").sum().backward()
    counts = {name: int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert set(counts.values()) == {1}, counts


def test_new_policies_regroup_norms_and_leave_those_of_others():
    model = make("narrow", "adashare", {"a": [1.0] * 8, "b": [0.0] * 8})
    last = next(
        norm for norm in model.task_norms if norm.name == "layer4.0.downsample.1"
    )  # which a skipped block keeps
    first = last.active("a")
    model.add_task("c", num_classes=2)
    model.follow({"c": [0.0] * 8})
    assert last.active("a") is first, "a trained copy is not lost"
    assert last.active("b") is last.active("c")
    model.follow({"b": [1.0] * 8, "c": [1.0] * 8})
    assert all(last.active(task) is None for task in "abc"), "all go the same way again"


def test_policy_files_are_readable_and_checked(tmp_path):
    model = make("narrow", "adashare")
    with torch.no_grad():
        for index, unit in enumerate(model.units):
            unit.gates["a"].logits.copy_(torch.tensor([index / 4 - 1.0, 0.0]))
    policy = Policy.of(model)
    assert policy.run == {"a": (0.0,) * 4 + (1.0,) * 4, "b": (1.0,) * 8}
    policy.write(tmp_path / "policy.json")
    read = read_policy(tmp_path / "policy.json")
    assert (read.run, read.units) == (policy.run, tuple(unit.name for unit in model.units))
    assert read.probability["a"] == pytest.approx(policy.probability["a"], abs=1e-6)
    assert read.similarity("a", "a") == 1.0
    assert 0.5 < read.similarity("a", "b") < 1.0
    read.check_fits(model, ["a", "b"], tmp_path)
    draws = [read.sample(torch.Generator().manual_seed(seed)).run for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    rate = torch.tensor([read.sample(torch.Generator().manual_seed(seed)).run["a"] for seed in range(400)]).mean(0)
    torch.testing.assert_close(rate, torch.tensor(read.probability["a"]), atol=0.1, rtol=0)
    with pytest.raises(ValueError, match=r"policy p is for resnet18 with 8 units, this network is .* with 2"):
        read.check_fits(make("residual_series", "adashare"), ["a"], "p")
    with pytest.raises(ValueError, match="has no task 'z'; it has a, b"):
        read.check_fits(model, ["z"], "p")
    text = (tmp_path / "policy.json").read_text()
    for old, new, message in (
        ('"format": 1', '"format": 7', "format version 7"),
        ('"run": [', '"run": [0, ', "entries of 'run' for 8 units"),
        ('"units"', '"parts"', "is damaged"),
        ("0,", "3,", "neither 0 nor 1"),
    ):
        (tmp_path / "bad.json").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            read_policy(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="a policy of 3 units was given, the network has 8"):
        model.follow({"a": [1, 0, 1]})
    with pytest.raises(ValueError, match="method 'taps' learns no policies"):
        taps.adapt(timm.create_model("resnet18", num_classes=0)).make_gates([1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "sof"}, "sampling must be one of soft, hard"),
        ({"sparsity_loss": "x"}, "sparsity_loss must be one of code, paper"),
        ({"sharing_loss": "x"}, "sharing_loss must be one of code, paper"),
        ({"target_rates": [0.5] * 3}, "target_rates has 3 values, the network has 8 blocks"),
        ({"target_rates": 1.5}, "must lie in 0..1"),
        ({"target_loss": "x"}, "target_loss must be one of gated, code"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        taps.adapt(NETWORKS["narrow"].make(), "dynashare", **options)


def test_a_block_that_is_not_open_yet_runs_for_everybody():
    model = make("narrow", "adashare").train()
    for gate in model.gates("a"):
        gate.in_curriculum = False
        gate.logits.data[0] = -50.0
    x = batch("narrow")
    with evaluating(model), torch.no_grad():
        assert torch.equal(model.features(x, "a"), model.features(x, None))
    for gate in model.gates("a"):
        gate.in_curriculum = True
    with evaluating(model), torch.no_grad():
        assert not torch.equal(model.features(x, "a"), model.features(x, None))
