"""AutoMTL: replacements of skipped layers, the three-way gate against its formulas, and policies of three choices."""

import itertools
import json
import math

import pytest
import timm
import torch
from cases import NETWORKS
from torch import nn
from torch.nn.functional import conv2d

import taps
from taps.core.execution import State
from taps.core.modules import evaluating
from taps.methods.automtl import ChoiceGate, expected_cost, preference
from taps.methods.policy import Policy, read_policy
from taps.methods.stand_ins import find_choices, find_depths, stand_in
from taps.metrics.cost import relative_cost

ALL = {name: NETWORKS[name] for name in NETWORKS if name != "torchvision_vit" and not name.startswith("residual")}
CASES = [(network, "layers") for network in ALL]
CASES += [(network, "blocks") for network in ("resnet", "lite", "vit", "convnext", "torchvision_resnet", "mobilenet")]


def model_of(network: str, **options) -> taps.TaskModel:
    model = taps.adapt(ALL[network].make(), "automtl", **options)
    for task in "ab":
        model.add_task(task, num_classes=3)
    return model


def skipping(model, own=False) -> list[tuple[int, int]]:
    """Return a policy that skips every second skippable unit, and owns (if they have weights) or shares the others."""
    units, free = model.descriptions, [unit.index for unit in model.descriptions if unit.stand_in_size is not None]
    wanted = [index for index in free if index % 2] if len(free) == len(units) else free[1::2]
    return [(0, 0) if index in wanted else (1, int(own and unit.size > 0)) for index, unit in enumerate(units)]


def move(model, task: str) -> None:
    for unit in model.units:
        if task in unit.deltas:
            for delta in unit.deltas[task].parameters():
                nn.init.normal_(delta, std=0.05)


@pytest.mark.parametrize(("network", "skip"), CASES)
def test_every_choice_runs_learns_and_can_be_merged(network, skip):
    model = model_of(network, skip=skip)
    x = torch.randn(2, *ALL[network].shape)
    (model(x, "a").sum() + model(x, "b").sum() + model.penalty("a")).backward()
    gradients = [unit.gates["a"].logits.grad for unit in model.units]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    model.follow({"a": skipping(model, own=True), "b": skipping(model)})
    move(model, "a")
    called = []
    for unit, (run, _) in zip(model.units, model.policies["a"], strict=True):
        if run == 0.0:
            unit.base.register_forward_hook(lambda module, *rest: called.append(module))
    with evaluating(model), torch.no_grad():
        expected = {task: model(x, task) for task in "ab"}
        assert not called
        together = model.predict(x)
        gone = model.predictor()
        for task in "ab":
            torch.testing.assert_close(together[task], expected[task])
            torch.testing.assert_close(model.merge(task)(x), expected[task])
            torch.testing.assert_close(gone(x)[task], expected[task])
        names = ["a", "b"] * (len(x) // 2)
        for output, row, task in zip(model(x, names), range(len(x)), names, strict=True):
            torch.testing.assert_close(output, expected[task][row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", ["layers", "blocks"])
@pytest.mark.parametrize("network", ["resnet", "mobilenet", "vit"])
def test_what_is_left_is_exported_and_holds_nothing_that_is_skipped(network, skip):
    model = model_of(network, skip=skip).eval()
    model.follow({"a": skipping(model, own=True), "b": skipping(model)})
    x = torch.randn(2, *ALL[network].shape)
    gone = model.predictor()
    program = torch.export.export(gone, (x,))
    with torch.no_grad():
        for task, output in gone(x).items():
            torch.testing.assert_close(program.module()(x)[task], output)
    most = model.base_parameters * 2 + sum(unit.stand_in_size or 0 for unit in model.descriptions)
    assert sum(parameter.numel() for parameter in gone.parameters()) < most


def test_prefixes_that_tasks_share_run_once():
    model = model_of("resnet")
    count = len(model.units)
    model.follow({"a": [(1, 0)] * count, "b": [(1, 0)] * (count - 4) + [(1, 1)] * 4})
    calls = dict.fromkeys(range(count), 0)
    for index, unit in enumerate(model.units):
        unit.base.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    model.predict(torch.randn(2, 3, 40, 40))
    assert list(calls.values()) == [1] * (count - 4) + [2] * 4
    cost = model.predict_cost(torch.randn(2, 3, 40, 40))
    assert cost["macs"] < 0.75 * cost["macs_separate"]


def test_norms_are_a_tasks_own_from_where_ways_part():
    model = model_of("resnet")
    count = len(model.units)
    model.follow({"a": [(1, 0)] * count, "b": [(1, 0)] * 6 + [(1, 1)] + [(1, 0)] * (count - 7)})
    for norm in model.task_norms:
        own = {task: norm.active(task) for task in "ab"}
        if norm.position <= 6:
            assert own == {"a": None, "b": None}
        else:
            assert own["a"] is not None
            assert own["b"] is not None
            assert own["a"] is not own["b"]
    statistics = [norm.active("a").running_mean.clone() for norm in model.task_norms if norm.active("a") is not None]
    model.train()(torch.randn(4, 3, 40, 40), "b")
    assert all(
        torch.equal(before, norm.active("a").running_mean)
        for before, norm in zip(statistics, [n for n in model.task_norms if n.active("a") is not None], strict=True)
    )


@pytest.mark.parametrize(
    ("layer", "shape", "parameters"),
    [
        (nn.Conv2d(8, 8, 3, padding=1), (2, 8, 9, 9), 0),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1), (2, 8, 9, 9), 0),
        (nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), (2, 8, 10, 10), 24),
        (nn.Conv2d(3, 8, 7, stride=2, padding=3), (2, 3, 11, 12), 24),
        (nn.Conv2d(3, 6, 4, stride=4), (2, 3, 9, 9), 6),
        (nn.Conv2d(8, 8, 3, dilation=2, padding=2, groups=8), (2, 8, 9, 9), 0),
        (nn.Conv1d(4, 4, 5, padding=2), (2, 4, 7), 0),
        (nn.Conv3d(2, 4, 3, padding=1), (2, 2, 5, 5, 5), 4),
        (nn.Linear(6, 9), (2, 5, 6), 18),
        (nn.Linear(6, 12), (2, 5, 6), 12),
        (nn.Linear(12, 4), (2, 5, 12), 12),
        (nn.Linear(6, 6), (2, 6), 0),
    ],
)
def test_a_stand_in_has_the_layers_shape_and_starts_as_a_mean(layer, shape, parameters):
    found = stand_in(layer)
    x = torch.randn(shape)
    assert found(x).shape == layer(x).shape
    assert sum(p.numel() for p in found.parameters()) == parameters
    torch.testing.assert_close(found(torch.ones(shape)), torch.ones_like(layer(x)))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3), "no stand-in gives an output of the same size"),
        (nn.Conv2d(7, 8, 1, bias=False), "would have 56 parameters, no fewer than its own 56"),
        (nn.MultiheadAttention(8, 2), "nothing is known to stand in for a MultiheadAttention"),
        (nn.ConvTranspose2d(8, 8, 2, stride=2), "nothing is known"),
    ],
)
def test_what_cannot_be_skipped_says_why(layer, reason):
    with pytest.raises(ValueError, match=reason):
        stand_in(layer)
    model = taps.adapt(nn.Sequential(layer, nn.ReLU()), "automtl")
    assert reason in model.unskippable["0"]
    model.add_task("a", head=nn.Identity())
    assert model.units[0].gates["a"].probabilities.tolist() == [0.5, 0.5, 0.0]
    with pytest.raises(ValueError, match="policy skips '0'"):
        model.follow({"a": [0.0]})


def test_what_follows_a_skipped_layer_may_work_in_place():
    model = taps.adapt(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)), "automtl")
    model.add_task("a", head=nn.Identity())
    model.follow({"a": [0.0]})
    x = torch.randn(2, 3, 5, 5)
    before = x.clone()
    torch.testing.assert_close(model.eval()(x, "a"), before.relu())
    assert torch.equal(x, before)
    torch.testing.assert_close(model.merge("a")(x), before.relu())
    assert torch.equal(x, before)


def test_stand_ins_have_the_networks_type():
    model = taps.adapt(NETWORKS["resnet"].make().double(), "automtl")
    model.add_task("a", num_classes=2)
    assert model(torch.randn(2, 3, 40, 40).double(), "a").dtype == torch.float64


def test_layers_whose_weights_are_read_are_not_skipped():
    found = find_choices(NETWORKS["torchvision_swin"].make())
    kept = {one.name: one.unskippable for one in found if one.unskippable}
    assert any(name.endswith("attn.qkv") for name in kept)
    assert set(kept.values()) == {"its weights are read instead of it being called"}


def test_a_network_that_cannot_be_followed_names_the_layer_that_it_reads():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.first.weight) if x.sum() > 0 else self.second(x)

    assert find_depths(Reads(), ["first", "second"]) is None
    model = taps.adapt(Reads(), "automtl")
    model.add_task("a", num_classes=2)
    with pytest.raises(
        ValueError, match=r"unit 'first' \(Linear\) cannot be skipped: the module around it reads its weight"
    ):
        model(torch.ones(2, 4), "a")


def test_depth_is_the_longest_way():
    net = timm.create_model("resnet34", num_classes=0)
    depths = find_depths(net, [layer.name for layer in find_choices(net)])
    assert max(depths.values()) == 33
    assert depths["conv1"] == 1
    assert {layer.name: layer.stride for layer in find_choices(net)}["layer2.0.conv1"] == 4  # positions of two by two
    assert depths["layer2.0.downsample.0"] == depths["layer2.0.conv1"] == 8


def test_three_branches_are_one_convolution():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    model = taps.adapt(nn.Sequential(layer), "automtl")
    model.double().add_task("a", head=nn.Identity())
    move(model, "a")
    unit, state = model.units[0], model.state
    gate = unit.gates["a"]
    nn.init.normal_(gate.logits)
    nn.init.normal_(unit.shortcut.weight)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    state.temperature, state.generator = 0.7, torch.Generator().manual_seed(3)
    y = model(x, "a")
    p = gate.draw()
    uniform = torch.rand(3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(p, ((gate.logits - (-uniform.log()).log()) / 0.7).softmax(0))
    own = {name: layer.get_parameter(name) + unit.deltas["a"][name] for name in ("weight", "bias")}
    branches = (
        p[0] * layer(x)
        + p[1] * conv2d(x, own["weight"], own["bias"], padding=1)
        + p[2] * conv2d(x, unit.shortcut.weight, groups=2)
    )
    torch.testing.assert_close(y, branches, rtol=1e-12, atol=1e-12)
    wanted = [gate.logits, layer.weight, unit.deltas["a"]["weight"], unit.shortcut.weight]
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((y * weight).sum(), wanted, retain_graph=True)
    theirs = torch.autograd.grad((branches * weight).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_high_temperature_is_the_mean_of_the_choices():
    model = model_of("resnet")
    model.state.temperature = math.inf
    for unit in model.units:
        nn.init.normal_(unit.gates["a"].logits)
        decision = unit.gates["a"](None, model.state)
        assert decision.run.item() == pytest.approx(2 / 3)
        assert decision.specific.item() == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_published_regulariser(scale):
    model = model_of("resnet", preference_weight=1.0, policy_scale=scale).double()
    model.state.generator = torch.Generator().manual_seed(1)
    model.double()
    model(torch.randn(2, 3, 40, 40, dtype=torch.float64), "a")
    expected = 0.0
    for unit, description in zip(model.units, model.descriptions, strict=True):
        p = unit.gates["a"].draw().tolist()
        soft = [math.log1p(math.exp(scale * (p[k] - p[0]))) for k in (1, 2)]
        expected += (17 - description.depth) / 17 * sum(soft)
    assert model.penalty("a").item() == pytest.approx(expected, rel=1e-6)
    assert model.units[-1].gates["a"].weight == 0.0
    model.penalty("a").backward()
    model.penalty("a").backward()  # as often as one likes
    pi = preference(model_of("resnet").gates("a"), scale)  # without a draw by the probabilities
    assert pi.item() == pytest.approx(sum(u.gates["a"].weight * 2 * math.log(2) for u in model.units), rel=1e-6)


def test_layers_go_with_the_block_around_them():
    model = model_of("mobilenet", skip="blocks").eval()
    names = [unit.name for unit in model.units]
    block = names.index("blocks.1.1")
    held = [index for index, place in enumerate(model.parents) if place == block]
    assert [names[index] for index in held] == [f"blocks.1.1.conv_{part}" for part in ("pw", "dw", "pwl")]
    model.follow({"a": [(int(index != block), int(index != block and index in held)) for index in range(len(names))]})
    assert all(model.policies["a"][index] == (0.0, 0.0) for index in [block, *held])
    model.follow({"b": model.policies["a"]})  # as its file would say
    assert {row["run"] for row in model.report("a") if row["name"].startswith("blocks.1.1")} == {0.0}
    account = relative_cost(model, torch.randn(2, 3, 64, 64))
    assert taps.core.accounting.own_norm_parameters(model, "ab") == 0  # both go the same way
    left_out = sum(parameter.numel() for parameter in model.units[block].weights().values())
    assert left_out > sum(model.units[index].size for index in held) > 0
    assert account["parameters"] == model.base_parameters - left_out


@pytest.mark.parametrize(("network", "what"), [("resnet", "blocks"), ("perceptron", "layers")])
def test_blocks_are_skipped_where_there_are_any(network, what):
    net = NETWORKS[network].make()
    assert [unit.name for unit in find_choices(net, "auto")] == [unit.name for unit in find_choices(net, what)]


def test_norms_inside_of_a_block_belong_to_those_who_run_it():
    model = taps.adapt(NETWORKS["resnet"].make(), "automtl", skip="blocks")
    for task in "abc":
        model.add_task(task, num_classes=3)
    names = [unit.name for unit in model.units]
    block = names.index("layer4.1")
    model.follow({task: [(int(task != "a" or index != block), 0) for index in range(len(names))] for task in "abc"})
    assert not any(norm.active(task) for norm in model.task_norms for task in "abc")  # it is the last one
    block = names.index("layer4.0")
    model.follow({"a": [(int(index != block), 0) for index in range(len(names))]})
    own = {norm.name: {task: norm.active(task) for task in "abc"} for norm in model.task_norms}
    assert not any(own["layer4.0.bn1"].values())
    assert own["layer4.0.downsample.1"]["a"] is not own["layer4.0.downsample.1"]["b"]
    assert own["layer4.1.bn1"]["b"] is own["layer4.1.bn1"]["c"] is not own["layer4.1.bn1"]["a"]


def test_own_weights_in_a_skipped_block_count_for_nothing():
    model = model_of("resnet", skip="blocks")
    for name, logits in (("layer1.0", [0.0, 0.0, 1.0]), ("layer1.0.conv1", [0.0, 1.0, 0.0])):
        unit = next(unit for unit in model.units if unit.name == name)
        unit.gates["a"].logits.data = torch.tensor(logits)
    account = taps.core.accounting.accounting(model, "a")
    assert account["tuned_units"] == account["delta_parameters"] == 0
    model.follow({"a": [(1, 1)] * len(model.units)})  # blocks have nothing of their own
    assert taps.core.accounting.accounting(model, "a")["tuned_units"] == len(model.units) - NETWORKS["resnet"].blocks


def test_a_network_that_is_a_block_holds_its_layers():
    block = timm.models.vision_transformer.Block(8, 2)
    model = taps.adapt(block, "automtl", skip="blocks")
    names = [unit.name for unit in model.units]
    assert names[0] == "attn"
    assert model.parents[names.index("attn.qkv")] == 0


def test_of_a_resnets_block_the_projection_stays():
    model = model_of("resnet", skip="blocks").eval()
    names = [unit.name for unit in model.units]
    projection, block = names.index("layer2.0.downsample.0"), names.index("layer2.0")
    assert model.parents[projection] is None
    assert model.parents[names.index("layer2.0.conv1")] == block
    model.follow({task: [(int(index != block), 0) for index in range(len(names))] for task in "ab"})
    called = []
    for index in (projection, names.index("layer2.0.conv1")):
        model.units[index].base.register_forward_hook(lambda *_, index=index: called.append(names[index]))
    model.predict(torch.randn(2, 3, 40, 40))
    assert called == ["layer2.0.downsample.0"]


@pytest.mark.parametrize("kind", ["parameters", "macs"])
def test_what_a_block_holds_is_expected_to_cost_as_often_as_it_is_run(kind):
    model = model_of("resnet", skip="blocks")
    with torch.no_grad():
        model(torch.randn(1, 3, 40, 40), "a"), model(torch.randn(1, 3, 40, 40), "b")
    gates = {task: model.gates(task) for task in "ab"}
    block = [unit.name for unit in model.units].index("layer3.1")
    held = [index for index, place in enumerate(model.parents) if place == block]
    single = sum(2 * gate.costs(kind)[0] for gate in gates["a"])
    sizes = sum(gates["a"][index].costs(kind)[0] for index in held)

    def cost(never: str) -> float:
        for task in "ab":
            gates[task][block].logits.data = torch.tensor([0.0, 0.0, 50.0 if task in never else -50.0])
        return float(expected_cost(gates, kind).detach())

    both = {"macs": 2.0, "parameters": 1 - 0.25 + 1.0}[kind]  # each task shares or owns, one time in two
    one = {"macs": 1.0, "parameters": 0.5 + 0.5}[kind]
    assert cost("") - cost("ab") == pytest.approx(both * sizes / single, rel=1e-4)
    assert cost("a") - cost("ab") == pytest.approx(one * sizes / single, rel=1e-4)


@pytest.mark.parametrize("kind", ["parameters", "macs"])
def test_expected_cost_is_the_mean_over_draws(kind):
    model = model_of("resnet")
    torch.manual_seed(0)
    for unit in model.units:
        for task in "ab":
            nn.init.normal_(unit.gates[task].logits)
    with torch.no_grad():
        model(torch.randn(1, 3, 40, 40), "a"), model(torch.randn(1, 3, 40, 40), "b")
    gates = {task: model.gates(task) for task in "ab"}
    total = single = 0.0
    for a, b in zip(*gates.values(), strict=True):
        size, skip = a.costs(kind)
        single += 2 * size
        for i, j in itertools.product(range(3), repeat=2):
            chance = float((a.probabilities[i] * b.probabilities[j]).detach())
            if kind == "macs":
                cost = sum(size if k < 2 else skip for k in (i, j))
            else:
                cost = size * ((0 in (i, j)) + (i == 1) + (j == 1)) + skip * (2 in (i, j))
            total += chance * cost
    assert float(expected_cost(gates, kind).detach()) == pytest.approx(total / single, rel=1e-5)


@pytest.mark.parametrize("kind", ["parameters", "macs"])
def test_a_cost_target_is_reached_and_has_gradients(kind):
    model = model_of("resnet", preference_weight=0.0, cost_weight=1.0, cost_target=0.3, cost=kind)
    optimizer = torch.optim.Adam([g.logits for t in "ab" for g in model.gates(t)], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (model.penalty("a") + model.penalty("b")).backward()
        optimizer.step()
    assert float(expected_cost({task: model.gates(task) for task in "ab"}, kind).detach()) < 0.32


def three_choices() -> Policy:
    return Policy(
        "net", ("x", "y"), {"a": (0.9, 1.0), "b": (0.5, 0.2)}, {"a": (1.0, 1.0), "b": (1.0, 0.0)},
        {"a": (0.2, 0.6), "b": (0.3, 0.1)}, {"a": (0.0, 1.0), "b": (1.0, 0.0)},
    )  # fmt: skip


def test_the_most_probable_policies_are_those_of_brute_force():
    policy = three_choices()
    columns = [chances for task in "ab" for chances in policy.probabilities(task)]
    every = [
        (math.prod(column[i] for column, i in zip(columns, path, strict=True)), path)
        for path in itertools.product(range(3), repeat=4)
    ]
    expected = sorted((chance for chance, _ in every if chance > 0), reverse=True)
    found = policy.top(100)
    assert len(found) == len(expected) == 3 * 2 * 3 * 3

    def chance(drawn: Policy) -> float:
        total = 1.0
        for task in "ab":
            for chances, entry in zip(policy.probabilities(task), drawn.entries(task), strict=True):
                total *= chances[{(1.0, 0.0): 0, (1.0, 1.0): 1, (0.0, 0.0): 2}[entry]]
        return total

    assert [chance(one) for one in found] == pytest.approx(expected)
    assert policy.argmax() == found[0]


def test_policies_that_differ_where_nothing_is_run_count_once(tmp_path):
    undecided = Policy(
        "net", ("block", *(f"block.{index}" for index in range(16))), {"a": (0.4, *[1.0] * 16)}, {"a": (1.0,) * 17},
        {"a": (0.0, *[0.5] * 16)}, {"a": (0.0,) * 17}, (None, *[0] * 16),
    )  # fmt: skip
    assert len({one.entries("a") for one in undecided.top(4)}) == 4
    policy = Policy(
        "net", ("block", "block.layer", "last"), {"a": (0.1, 1.0, 1.0)}, {"a": (0.0, 0.0, 1.0)},
        {"a": (0.0, 0.45, 0.3)}, {"a": (0.0, 0.0, 0.0)}, (None, 0, None),
    )  # fmt: skip
    skipped, whole = ((0.0, 0.0), (0.0, 0.0)), ((1.0, 0.0), (1.0, 0.0))
    assert [one.entries("a")[:2] for one in policy.top(4)] == [skipped, skipped, whole, ((1.0, 0.0), (1.0, 1.0))]
    assert len(policy.top(100)) == 6
    assert len({one.entries("a") for one in policy.top(100)}) == 6
    drawn = {policy.sample(torch.Generator().manual_seed(seed)).entries("a")[:2] for seed in range(100)}
    assert skipped in drawn
    assert ((0.0, 0.0), (1.0, 1.0)) not in drawn
    policy.write(tmp_path / "policy.json")
    assert read_policy(tmp_path / "policy.json") == policy
    stored = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps({**stored, "inside": [None, 2, None]}))
    with pytest.raises(ValueError, match="must name for each of the 3 units an earlier one"):
        read_policy(tmp_path / "policy.json")


def test_draws_follow_the_probabilities_and_depend_on_the_seed():
    policy = three_choices()
    draws = [policy.sample(torch.Generator().manual_seed(seed)) for seed in range(2000)]
    assert policy.sample(torch.Generator().manual_seed(5)) == draws[5]
    for task in "ab":
        for unit in range(2):
            for entry, chance in zip(((1, 0), (1, 1), (0, 0)), policy.probabilities(task)[unit], strict=True):
                share = sum(draw.entries(task)[unit] == entry for draw in draws) / len(draws)
                assert share == pytest.approx(chance, abs=0.04)


def test_entropy_and_doubt():
    policy = three_choices()
    expected = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(3)
    expected += -(0.4 * math.log(0.4) + 0.6 * math.log(0.6)) / math.log(2)  # skipping is not offered
    assert policy.entropy("a") == pytest.approx(expected / 2)
    assert "nearly uniform (entropy, 1 is a coin toss: a" not in (policy.uncertainty_warning() or "")
    fresh = Policy.of(model_of("perceptron"))
    assert fresh.entropy("a") == pytest.approx(1.0)
    assert "nearly uniform" in fresh.uncertainty_warning()


def test_a_policy_of_three_choices_survives_its_file(tmp_path):
    policy = three_choices()
    policy.write(tmp_path / "policy.json")
    assert read_policy(tmp_path / "policy.json") == policy
    stored = json.loads((tmp_path / "policy.json").read_text())
    assert stored["tasks"]["b"] == {"probability": [0.5, 0.2], "run": [1, 0], "own": [0.3, 0.1], "specific": [1, 0]}
    stored["tasks"]["b"]["specific"] = [1, 1]
    (tmp_path / "policy.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="task 'b' has weights of its own in a unit that it does not run"):
        read_policy(tmp_path / "policy.json")


def test_a_followed_policy_survives_a_task_file(tmp_path):
    model = model_of("resnet").eval()
    model.follow({"a": skipping(model, own=True), "b": skipping(model)})
    move(model, "a")
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        expected = model(x, "a")
    model.save_task("a", tmp_path / "a")
    fresh = taps.adapt(NETWORKS["resnet"].make(), "automtl")
    fresh.load_base(model.base_state())
    fresh.load_task(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x, "a"), expected)
    assert fresh.policies["a"] == model.policies["a"]


def test_a_task_with_few_weights_of_its_own_can_be_trained_further(tmp_path):
    """Its file stores them as positions and values, as for supports, which this method's gates do not have."""
    model = model_of("resnet")
    for unit in model.units:
        unit.gates["a"].logits.data = torch.tensor([0.0, 1.0, 0.0])
        unit.deltas["a"]["weight"].data.view(-1)[:2] = 0.5
    model.save_task("a", tmp_path / "a", max_error=0.0)
    assert "sparse" in (tmp_path / "a/task.json").read_text()
    fresh = taps.adapt(NETWORKS["resnet"].make(), "automtl")
    fresh.load_base(model.base_state())
    fresh.load_task(tmp_path / "a", trainable=True)
    assert all(isinstance(gate, ChoiceGate) for gate in fresh.gates("a"))


def test_own_weights_stay_when_a_policy_is_followed():
    model = model_of("resnet")
    move(model, "a")
    before = {unit.name: unit.deltas["a"]["weight"].detach().clone() for unit in model.units}
    model.follow({"a": [(1, 1)] * len(model.units)})
    assert all(torch.equal(unit.deltas["a"]["weight"], before[unit.name]) for unit in model.units)
    model.follow({"a": [(1, 0)] * len(model.units)})
    assert not any("a" in unit.deltas for unit in model.units)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([1], "a policy of 1 units was given, the network has 2"),
        ([1, 0.5], "a policy has the entry 0.5; give 1 or 0"),
        ([1, math.nan], "a policy has the entry nan"),
        (["1", "1"], "a policy has the entry '1'"),
    ],
)
def test_a_policy_that_cannot_be_followed_changes_no_task(policy, message):
    model = model_of("perceptron")
    with pytest.raises(ValueError, match=message):
        model.follow({"a": [(1, 1)] * 2, "b": policy})
    assert not model.policies
    assert all(isinstance(gate, ChoiceGate) for gate in model.gates("a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": "bytes"}, "cost must be one of parameters, macs"),
        ({"cost_target": 0.0}, "cost_target must be above 0"),
        ({"skip": "stages"}, "skip must be one of layers, blocks, auto, not 'stages'"),
        ({"skip": "blocks"}, "Sequential has no residual block that can be skipped"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        model_of("perceptron", **options)


def test_a_gate_that_decides_gives_numbers():
    model = model_of("perceptron")
    gate: ChoiceGate = model.units[0].gates["a"]
    for logits, decision in (((1, 0, 0), (1.0, 0.0)), ((0, 1, 0), (1.0, 1.0)), ((0, 0, 1), (0.0, 0.0))):
        gate.logits.data = torch.tensor(logits, dtype=torch.float32)
        gate.eval()
        assert gate(torch.zeros(1, 5), State())[:2] == decision


def test_blocks_that_the_curriculum_never_reached_run():
    from taps.methods.policy import Policy

    model = taps.adapt(timm.create_model("resnet18", num_classes=0), "adashare")
    model.add_task("a", 2)
    for gate in model.gates("a")[:5]:
        gate.in_curriculum = False
    policy = Policy.of(model)
    assert policy.probability["a"][:5] == (1.0,) * 5
    assert all(policy.sample(torch.Generator().manual_seed(seed)).run["a"][:5] == (1.0,) * 5 for seed in range(5))
