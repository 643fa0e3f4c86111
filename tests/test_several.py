"""Several tasks in one pass give the same results as each alone, on every network, and share all possible work."""

import copy

import pytest
import torch
from cases import CASES as ALL
from cases import NETWORKS, make
from timm.layers import StdConv2d
from torch import nn

import taps
from taps.core.find import Found
from taps.multitask.macs import macs

#: without methods whose tasks share the base's batch statistics, which each task moves, or decide for each sample
CASES = [case for case in ALL if case[1] not in ("hard_sharing", "adashare", "dynashare")]
TASKS = ("a", "b", "c")
#: samples of the tasks, interleaved; "b" has as many outputs as no other task
NAMES = ["b", "a", "c", "a", "b", "c", "a", "b"]


def prepared(network: str, method: str, from_unit: float = 0.5) -> taps.TaskModel:
    """Return three tasks with their own deltas and norms; the first part of the units is closed, then two of three are open."""
    torch.manual_seed(0)
    model = make(network, method, TASKS)
    for position, task in enumerate(TASKS):
        roles = model.roles(task)
        for parameter in (*roles.get("delta", {}).values(), *roles.get("norm", {}).values()):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.03)
        for index, unit in enumerate(model.units):
            gate = unit.gates[task]
            if isinstance(gate, taps.ThresholdGate):
                gate.set(index >= from_unit * len(model.units) and (index + position) % 3 != 0)
    return model


def batch(network: str, size: int = len(NAMES)) -> torch.Tensor:
    return torch.randn(size, *NETWORKS[network].shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def case(request):
    return request.param, prepared(*request.param).eval()


def test_predict_is_each_task_by_itself_and_computes_less(case):
    (network, _), model = case
    x = batch(network, 3)
    with torch.no_grad():
        expected = {task: model(x, task) for task in TASKS}
    outputs = model.predict(x)
    assert list(outputs) == list(TASKS)
    for task in TASKS:
        torch.testing.assert_close(outputs[task], expected[task], rtol=1e-5, atol=1e-5)
    cost = model.predict_cost(x)
    assert 0 < cost["macs"] <= cost["macs_separate"]
    if model.norm != "task" and model.method.name == "taps":
        assert cost["macs"] < 0.9 * cost["macs_separate"]


def test_predictor_is_an_ordinary_module_with_the_same_outputs(case):
    (network, _), model = case
    x = batch(network, 3)
    predictor = model.predictor(["c", "a"])
    expected = model.predict(x, ["c", "a"])
    assert not any(
        isinstance(module, (taps.core.unit.GatedUnit, taps.core.norm.TaskNorm)) for module in predictor.modules()
    )
    with torch.no_grad():
        outputs = predictor(x)
    assert list(outputs) == ["c", "a"]
    for task, output in outputs.items():
        torch.testing.assert_close(output, expected[task])


def test_mixed_batch_is_each_task_on_its_samples(case):
    (network, _), model = case
    x = batch(network)
    with torch.no_grad():
        outputs = model(x, NAMES)
        assert isinstance(outputs, list), "the tasks have different numbers of outputs"
        assert len(outputs) == len(NAMES)
        for task in TASKS:
            rows = [index for index, name in enumerate(NAMES) if name == task]
            expected = model(x[rows], task)
            torch.testing.assert_close(torch.stack([outputs[row] for row in rows]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settled", [("a", "c"), TASKS], ids=["some", "all"])
@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_settled_tasks_run_in_a_mixed_batch_without_decisions(network, settled, monkeypatch):
    model, x = prepared(network, "taps").eval(), batch(network)
    with torch.no_grad():
        expected = model(x, NAMES)
        for task in settled:
            model.settle(task)
        asked = []
        for kind in (taps.core.unit.GatedUnit, taps.core.norm.TaskNorm):
            original = kind.decision_for
            monkeypatch.setattr(
                kind, "decision_for", lambda place, task, x, of=original: (asked.append(task), of(place, task, x))[1]
            )
        outputs = model(x, NAMES)
    assert set(asked) == set(TASKS) - set(settled)
    for own, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


def test_training_on_a_mixed_batch_is_training_on_each_task(case, monkeypatch):
    """Gradients of all parameters, including those of closed gates, and the running statistics agree."""
    original = taps.methods.sparse_delta.hard_concrete  # draws would differ
    monkeypatch.setattr(
        "taps.methods.sparse_delta.hard_concrete", lambda a, t, g: original(a, t, uniform=torch.full_like(a, 0.5))
    )
    (network, _), model = case
    results = []
    for mixed in (False, True):
        twin = copy.deepcopy(model).double().train()
        for module in twin.modules():
            if "Drop" in type(module).__name__ or "Stochastic" in type(module).__name__:
                module.eval()  # draws differ
        x = batch(network).double()
        if mixed:
            outputs = twin(x, NAMES)
            by_task = {task: torch.stack([outputs[i] for i, n in enumerate(NAMES) if n == task]) for task in TASKS}
        else:
            by_task = {task: twin(x[[i for i, n in enumerate(NAMES) if n == task]], task) for task in TASKS}
        sum(by_task[task].square().mean() + twin.penalty(task) for task in TASKS).backward()
        gradients = {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.requires_grad}
        results.append((by_task, gradients, dict(twin.named_buffers())))
    for task in TASKS:
        torch.testing.assert_close(results[0][0][task], results[1][0][task], rtol=1e-9, atol=1e-9)
    for name, gradient in results[0][1].items():
        other = results[1][1][name]
        # a closed unit's delta has a gradient of zero or none
        gradient, other = (torch.zeros(()) if g is None or not g.any() else g for g in (gradient, other))
        torch.testing.assert_close(other, gradient, rtol=1e-7, atol=1e-9, msg=name)
    for name, buffer in results[0][2].items():
        torch.testing.assert_close(buffer, results[1][2][name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("network", ["resnet", "vit"])
def test_what_tasks_share_runs_once_on_the_whole_batch(network):
    model = prepared(network, "taps_follow", from_unit=2.0).train()  # everything closed, gates still learning
    seen = []
    for unit in model.units:
        unit.base.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    x = batch(network)
    model(x, ["a"] * 4 + ["c"] * 4)  # the first call looks once whether rows are samples
    seen.clear()
    model(x, ["a"] * 4 + ["c"] * 4)
    assert len(seen) == len(model.units)
    assert {size % len(x) for size in seen} == {0}
    seen.clear()
    model.predict(x)
    assert len(seen) == len(model.units)


def test_predict_shares_everything_before_the_first_tuned_layer_and_side_branches_too():
    """Only the downsampling convolution of layer4 is tuned; the block's main path stays shared until both paths meet."""
    model = taps.adapt(taps.create_backbone("resnet18", pretrained=False), norm="follow").eval()
    for task in TASKS:
        model.add_task(task, num_classes=2)
        for unit in model.units:
            unit.gates[task].set(unit.name == "layer4.0.downsample.0")
            for parameter in unit.deltas[task].parameters():
                parameter.data.normal_(std=0.1)
    calls = []
    for unit in model.units:
        unit.base.register_forward_pre_hook(
            lambda module, inputs, name=unit.name: calls.extend([name] * len(getattr(inputs[0], "parts", [0])))
        )
    outputs = model.predict(torch.randn(2, 3, 64, 64))
    assert calls.count("layer4.0.conv2") == 1
    assert calls.count("layer4.0.downsample.0") == 3
    assert calls.count("layer4.1.conv1") == 3
    assert not torch.equal(outputs["a"], outputs["b"])


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.linear(self.attention(x, x, x)[0]).mean(0)


class InPlaceAlias(nn.Module):
    """A module that keeps a tensor, changes it in place for some tasks only, and reads it again under its first name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        kept = self.first(x)
        y = kept
        y += self.second(kept)
        return kept * 2 + y


class MethodInPlace(InPlaceAlias):
    def forward(self, x):
        y = self.first(x)
        y.add_(self.second(y))
        return y


class Decides(InPlaceAlias):
    def forward(self, x):
        y = self.second(self.first(x))
        return y if int(y.sum() * 100) % 2 else -y


class MixesSamples(InPlaceAlias):
    def forward(self, x):
        y = self.second(self.first(x))
        return y - y.mean(0)


class Checks(InPlaceAlias):
    """A module that requires tensors, indexes, stacks, unpacks, loops and reads sizes."""

    def forward(self, x):
        y = self.second(self.first(x))
        if not isinstance(y, torch.Tensor):
            raise TypeError("not a tensor")
        rows, columns = y.shape
        left, right = y[:, : columns // 2], y[..., columns // 2 :]
        z = torch.cat([left, right * 2, x[:, :1]], dim=1).view(rows, -1).clone()
        z[:, 0] = 1.5
        first, *others = z.unbind(1)
        return torch.stack([first, *others], dim=1) - torch.ones(rows, 1) * z.mean(1, keepdim=True) + len(y) // rows


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (InPlaceAlias, (6,)),
        (MethodInPlace, (6,)),
        (Decides, (6,)),
        (Checks, (6,)),
        (SequenceFirst, (6, 8)),
    ],
)
def test_networks_that_need_care_are_right_all_the_same(net, shape):
    torch.manual_seed(0)
    model = taps.adapt(net(), norm="follow").eval()
    for task in TASKS:
        model.add_task(task, head=nn.Identity())
        for parameter in model.roles(task)["delta"].values():
            parameter.data.normal_()
        model.units[0].gates[task].set(False)
    x = torch.randn(6, *shape)
    with torch.no_grad():
        expected = {task: model(x, task) for task in TASKS}
        mixed = model(x, ["a", "b", "c"] * 2)
    for index in range(6) if net is not Decides else ():  # which looks at the whole batch
        torch.testing.assert_close(mixed[index], expected[TASKS[index % 3]][index])
    outputs = model.predict(x)
    for task in TASKS:
        torch.testing.assert_close(outputs[task], expected[task])


def test_samples_that_depend_on_each_other_stay_with_their_task():
    torch.manual_seed(0)
    model = taps.adapt(MixesSamples()).eval()
    for task in TASKS:
        model.add_task(task, head=nn.Identity())
    x = torch.randn(6, 6)
    mixed = model(x, ["a", "b", "c"] * 2)
    torch.testing.assert_close(mixed[1::3], model(x[1::3], "b"))


def test_a_layer_that_changes_its_input_spoils_nothing():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(torch.relu_(x))

    method = taps.Method("blocks", "test", taps.methods.taps.threshold_gate, select=lambda net: [
        Found("1", net[1], ("linear.weight",))
    ])  # fmt: skip
    taps.METHODS["test_blocks"] = method
    try:
        model = taps.adapt(nn.Sequential(nn.Linear(6, 6), Block()), "test_blocks").eval()
    finally:
        del taps.METHODS["test_blocks"]
    for task in ("a", "b"):
        model.add_task(task, head=nn.Identity())
        for parameter in model.roles(task)["delta"].values():
            parameter.data.normal_()
    x = torch.randn(4, 6)
    outputs = model.predict(x)
    with torch.no_grad():
        torch.testing.assert_close(outputs["b"], model(x, "b"))


def test_names_and_modes():
    model = make("perceptron", "taps", ("a", "b")).train()
    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match="3 names for a batch of 4"):
        model(x, ["a", "b", "a"])
    with pytest.raises(ValueError, match="unknown task 'd'"):
        model(x, ["a", "d", "a", "b"])
    with pytest.raises(ValueError, match="unknown task"):
        model.predict(x, ["e"])
    model.units[0].eval()
    model.predict(x)
    assert model.training
    assert not model.units[0].training
    assert model.state.call is None
    assert model.predict(x, []) == {}
    with torch.inference_mode():
        assert model.predict(torch.randn(4, 5))["a"].shape == (4, 3)
    same = taps.adapt(nn.Sequential(nn.Linear(5, 4)))
    for task in ("a", "b"):
        same.add_task(task, num_classes=2)
    assert same(x, ["b", "a", "a", "b"]).shape == (4, 2), "equal numbers of outputs make a tensor"


def test_one_program_with_an_output_a_task():
    model = prepared("resnet", "taps_follow").eval()
    x = batch("resnet", 3)
    batch_size = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model.predictor(), (x,), dynamic_shapes=({0: batch_size},))
    outputs = program.module()(x[:2])
    expected = model.predict(x[:2])
    assert list(outputs) == list(TASKS)
    for task in TASKS:
        torch.testing.assert_close(outputs[task], expected[task])
    convolutions = sum("conv2d" in str(node.target) for node in program.graph.nodes)
    assert convolutions < 3 * len(model.units), "what is shared is there once"


def test_input_dependent_units_go_their_own_way():
    model = make("narrow", "dynashare", ("a", "b")).eval()
    model.follow({task: [1.0] * len(model.units) for task in "ab"})
    gates = [gate for task in "ab" for gate in model.gates(task) if gate.uses_input]
    for gate in gates:
        torch.nn.init.normal_(gate.choose.weight)
        torch.nn.init.zeros_(gate.choose.bias)
    x = torch.randn(6, *NETWORKS["narrow"].shape)
    with torch.no_grad():
        expected = {task: model(x, task) for task in ("a", "b")}
        for task, output in model.predict(x).items():
            torch.testing.assert_close(output, expected[task])
        mixed = model(x, ["a", "b"] * 3)
    for index in range(6):
        torch.testing.assert_close(mixed[index], expected["ab"[index % 2]][index])
    with pytest.raises(ValueError, match="cannot be merged"):
        model.predictor()


class Gated(nn.Module):
    """In-place activations directly after layers, as in squeeze-and-excitation, and a layer that standardises its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 6, 3), StdConv2d(6, 6, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        y = torch.relu_(self.first(x))
        return torch.relu_(self.third(torch.relu_(self.second(y)))).mean((2, 3))


def test_momentum_in_place_activations_and_standardised_weights():
    """After several steps with momentum while gates close, mixed batches give the same result as separate tasks."""
    ends = []
    for mixed in (False, True):
        torch.manual_seed(0)
        model = taps.adapt(Gated().double()).train()
        for task in TASKS:
            model.add_task(task, num_classes=3)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
            if step == 3:  # deltas have moved by now
                for unit in model.units:
                    unit.gates["a"].set(False)
                model.units[0].gates["b"].set(False)
            if mixed:
                y = model(x, NAMES)
                loss = sum(y[[i for i, n in enumerate(NAMES) if n == task]].square().mean() for task in TASKS)
            else:
                rows = {task: [i for i, n in enumerate(NAMES) if n == task] for task in TASKS}
                loss = sum(model(x[rows[task]], task).square().mean() for task in TASKS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_mixed_training_in_half_precision():
    model = prepared("resnet", "taps").train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch("resnet"), NAMES)
        loss = sum(output.float().square().mean() for output in outputs)
    loss.backward()
    scores = [unit.gates["a"].score.grad for unit in model.units]
    assert all(torch.isfinite(gradient) for gradient in scores)
    assert any(gradient != 0 for gradient in scores[: len(scores) // 2]), "closed gates learn too"


def test_tasks_may_be_called_as_they_like_and_heads_work_in_place():
    names = ("base", "skip", "other")
    model = taps.adapt(NETWORKS["resnet"][0](), norm="follow").eval()
    for index, task in enumerate(names):
        model.add_task(task, head=nn.Sequential(nn.SiLU(inplace=True), nn.Linear(56, 2)))
        for unit in model.units:
            unit.gates[task].set(index == 0)
            for parameter in unit.deltas[task].parameters():
                parameter.data.normal_(std=0.1)
    x = batch("resnet", 2)
    with torch.no_grad():
        expected = {task: model(x, task) for task in names}
        for outputs in (model.predict(x), model.predictor()(x)):
            for task in names:
                torch.testing.assert_close(outputs[task], expected[task])
        mixed = model(x, ["skip", "other"])
        torch.testing.assert_close(mixed[1], expected["other"][1])


def test_several_rows_a_sample():
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):  # (B, 3, 6) -> (B * 3, 6)
            return self.linear(x.flatten(0, 1))

    model = taps.adapt(Frames()).eval()
    for task in ("a", "b"):
        model.add_task(task, num_classes=2)
    with pytest.raises(ValueError, match="one output per sample"):
        model(torch.randn(4, 3, 6), ["a", "b", "a", "b"])
    for task in ("c", "d"):
        model.add_task(task, head=nn.Sequential(nn.Linear(6, 2), nn.Unflatten(0, (-1, 3)), nn.Flatten()))
    x = torch.randn(4, 3, 6)
    mixed = model(x, ["c", "d", "c", "d"])
    torch.testing.assert_close(mixed[1::2], model(x[1::2], "d"))


@pytest.mark.parametrize("predicts", ["predict", "predictor"])
def test_a_pass_keeps_nothing_that_only_one_task_can_ask_for(predicts, monkeypatch):
    """Of tasks that differ from the first layer on no output is kept, however many there are."""
    from taps.multitask import shared_pass

    kept, known = [], shared_pass.SharedPass.__init__

    def watched(self, *given):
        known(self, *given)
        kept.append(self)

    monkeypatch.setattr(shared_pass.SharedPass, "__init__", watched)
    counts = []
    for number in (2, 4):
        torch.manual_seed(0)
        model = taps.adapt(NETWORKS["resnet"].make(), "finetune")
        for index in range(number):
            model.add_task(f"t{index}", num_classes=3)
            for parameter in model.roles(f"t{index}")["delta"].values():
                nn.init.normal_(parameter, std=0.01)
        model.eval()
        ask = model.predict if predicts == "predict" else model.predictor()
        with torch.no_grad():
            ask(torch.randn(2, 3, 32, 32))
        counts.append(sum(len(records) for records in kept[-1].records.values()))
    assert counts == [0, 0]


@pytest.mark.parametrize("norm", ["frozen", "follow"])
def test_what_some_of_the_tasks_share_is_computed_and_stored_once(norm):
    torch.manual_seed(0)
    net = NETWORKS["narrow"].make()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # with zeros a skipped block would give what the block gives
            nn.init.uniform_(module.weight, 0.5, 1.5)
    model = taps.adapt(net, "adashare", norm=norm)
    for task in "abc":
        model.add_task(task, num_classes=2)
    count = len(model.units)
    model.follow({"a": [0.0] + [1.0] * (count - 1), "b": [1.0] * count, "c": [1.0] * count})
    model.eval()
    x = torch.randn(2, 3, 40, 40)
    cost, program = model.predict_cost(x), model.predictor()
    assert macs(program, x) <= cost["macs"] + cost["macs_heads"] < cost["macs_separate"]
    stored = {t.data_ptr(): t.numel() for t in program.networks.parameters()}
    copies = sum(p.numel() for norm in model.task_norms for task in norm.norms for p in norm.norms[task].parameters())
    assert sum(stored.values()) <= model.base_parameters + copies
    exported = torch.export.export(program, (x,)).module()
    assert macs(exported, x) == macs(program, x)
    for task, output in model.predict(x).items():
        assert torch.equal(output, program(x)[task])
        assert torch.allclose(output, exported(x)[task], atol=1e-6)
