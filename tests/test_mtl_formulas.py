"""Formulas of multi-task learning against short independent references in float64."""

import copy
import itertools
import math

import numpy as np
import pytest
import timm
import torch
from scipy.ndimage import map_coordinates
from scipy.special import log_softmax, softmax
from timm.models.resnet import BasicBlock
from torch import nn
from torch.nn import functional as F

import taps
from taps.core.execution import State
from taps.core.gate import ConstantGate
from taps.data.multi_label import IGNORE_INDEX, Task
from taps.methods.adashare import SelectGate, sharing, sparsity
from taps.methods.dynashare import InstanceGate, target_rate
from taps.methods.gumbel import gumbel
from taps.metrics.dense import make_metric
from taps.metrics.losses import make_loss, shrink, to_size
from taps.metrics.relative_gain import delta_t, relative_gain
from taps.networks.heads import ASPP


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(logits, temperature, generator):
    """Return the select column of softmax((logits + g) / temperature), g = −log(−log u)."""
    u = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    powers = torch.exp((logits - torch.log(-torch.log(u))) / temperature)
    return powers[..., 0] / (powers[..., 0] + powers[..., 1])


def straight(soft):
    """Return 1[soft ≥ ½] with the gradient of soft."""
    return (soft >= 0.5).double() + (soft - soft.detach())


def select_gates(logits, opened=None):
    """Return one gate per row of logits, in float64."""
    gates = [SelectGate(init=tuple(row)).double() for row in np.asarray(logits).tolist()]
    for gate, row in zip(gates, np.asarray(logits), strict=True):
        gate.logits.data.copy_(torch.tensor(row))
    for gate, is_open in zip(gates, opened or [], strict=False):
        gate.in_curriculum = is_open
    return gates


# -- Gumbel-softmax ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_gumbel_softmax_and_its_gradient(temperature):
    values = torch.randn(50, 7, 2, dtype=torch.float64)
    weight = torch.randn(50, 7, dtype=torch.float64)
    soft_ref = draw(values, temperature, seeded(3))
    slope = weight * soft_ref * (1 - soft_ref) / temperature
    for hard in (False, True):
        logits = values.clone().requires_grad_()
        got = gumbel(logits, temperature, hard, seeded(3))
        if hard:
            assert torch.equal(got, (soft_ref >= 0.5).double())
            assert set(got.tolist()[0]) <= {0.0, 1.0}
        else:
            torch.testing.assert_close(got, soft_ref, rtol=1e-9, atol=1e-12)
        (got * weight).sum().backward()
        torch.testing.assert_close(logits.grad, torch.stack([slope, -slope], -1), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("logits", [(0.5, 0.5), (2.0, 0.7), (-1.0, 0.4)])
def test_hard_draws_have_the_softmax_probability(logits, temperature):
    runs = gumbel(torch.tensor(logits).double().expand(20000, 2), temperature, True, seeded(11))
    assert abs(float(runs.mean()) - softmax(logits)[0]) < 0.02


@pytest.mark.parametrize("sampling", ["soft", "hard"])
def test_select_gate_draws_and_decides(sampling):
    """Relaxed: one draw from the state's generator; decided: 1 if the probability to select is at least ½."""
    state = State()
    state.temperature, state.generator = 0.7, seeded(4)
    reference = seeded(4)
    for logits in ((0.3, 0.9), (1.4, -0.2), (0.5, 0.5)):
        gate = SelectGate(sampling, logits).double()
        soft = draw(gate.logits.detach(), 0.7, reference)
        run = gate.train()(None, state).run
        torch.testing.assert_close(run, straight(soft) if sampling == "hard" else soft, rtol=1e-9, atol=0)
        assert gate.eval()(None, state).run == float(softmax(logits)[0] >= 0.5)
        assert float(gate.probability.detach()) == pytest.approx(softmax(gate.logits.detach().numpy())[0], rel=1e-9)


# -- the block equation --------------------------------------------------------------------------------------------


def two_blocks():
    """Return a block with an identity shortcut, then one that halves the size, with a projection."""
    downsample = nn.Sequential(nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6))
    net = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 6, stride=2, downsample=downsample)).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


def normalized(x, norm, training=True):
    """Compute batch normalisation with the batch's statistics or the running ones."""
    mean = x.mean((0, 2, 3)) if training else norm.running_mean
    var = x.var((0, 2, 3), unbiased=False) if training else norm.running_var
    mean, var, weight, bias = (t[:, None, None] for t in (mean, var, norm.weight, norm.bias))
    return (x - mean) / torch.sqrt(var + norm.eps) * weight + bias


def shortcut(block, x, training=True):
    if block.downsample is None:
        return x
    convolution, norm = block.downsample
    return normalized(F.conv2d(x, convolution.weight, stride=convolution.stride), norm, training)


def run_block(block, x, training=True):
    y = F.conv2d(x, block.conv1.weight, stride=block.conv1.stride, padding=1)
    y = normalized(y, block.bn1, training).clamp(min=0)
    y = normalized(F.conv2d(y, block.conv2.weight, padding=1), block.bn2, training)
    return (y + shortcut(block, x, training)).clamp(min=0)


def mix(block, x, u, training=True):
    return u * run_block(block, x, training) + (1 - u) * shortcut(block, x, training)


@pytest.mark.parametrize("norm", ["follow", "frozen", "task"])
@pytest.mark.parametrize("sampling", ["soft", "hard"])
@pytest.mark.parametrize("temperature", [0.4, 2.0])
def test_block_equation_and_its_gradients(sampling, temperature, norm):
    """x_next = u·f(x) + (1 − u)·shortcut(x): output, and gradients of logits, weights and input, over several draws."""
    net = two_blocks()
    plain, parameters = copy.deepcopy(net), list(net.parameters())
    model = taps.adapt(net, "adashare", sampling=sampling, norm=norm)
    model.add_task("a", head=nn.Flatten())
    model.train()
    logits = 0.3 * torch.randn(2, 2, dtype=torch.float64)
    for gate, row in zip(model.gates("a"), logits, strict=True):
        gate.logits.data.copy_(row)
    logits.requires_grad_()
    model.state.temperature, model.state.generator = temperature, seeded(8)
    reference, seen = seeded(8), set()
    for _ in range(6):
        values = torch.randn(3, 4, 6, 6, dtype=torch.float64)
        x, x_ref = values.clone().requires_grad_(), values.clone().requires_grad_()
        got, want = model(x, task="a"), x_ref
        for block, row in zip(plain, logits, strict=True):
            u = draw(row, temperature, reference)
            u = straight(u) if sampling == "hard" else u
            seen.add(float(u.detach()))
            want = mix(block, want, u)
        want = want.flatten(1)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
        g = torch.randn_like(want)
        (got * g).sum().backward()
        (want * g).sum().backward()
        torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-7, atol=1e-9)
    assert seen == {0.0, 1.0} if sampling == "hard" else len(seen) == 12
    own = torch.stack([gate.logits.grad for gate in model.gates("a")])
    torch.testing.assert_close(own, logits.grad, rtol=1e-7, atol=1e-9)
    if norm != "task":
        for parameter, other in zip(parameters, plain.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-7, atol=1e-9)


def test_block_equation_of_a_whole_resnet():
    """The reference runs the eight blocks of timm's resnet18 one by one on an unchanged copy of the network."""
    net = timm.create_model("resnet18", num_classes=0, channels=(8, 8, 8, 8)).double()
    plain = copy.deepcopy(net).train()
    model = taps.adapt(net, "adashare", sampling="soft")
    model.add_task("a", num_classes=3)
    model.train()
    model.state.temperature, model.state.generator = 1.3, seeded(5)
    logits = torch.randn(8, 2, dtype=torch.float64)
    for gate, row in zip(model.gates("a"), logits, strict=True):
        gate.logits.data.copy_(row)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    got = model(x, task="a")
    reference = seeded(5)
    y = plain.maxpool(plain.act1(plain.bn1(plain.conv1(x))))
    blocks = [block for layer in (plain.layer1, plain.layer2, plain.layer3, plain.layer4) for block in layer]
    for block, row in zip(blocks, logits, strict=True):
        u = draw(row, 1.3, reference)
        y = u * block(y) + (1 - u) * (y if block.downsample is None else block.downsample(y))
    head = model.heads["a"]
    want = y.mean((2, 3)) @ head.weight.T + head.bias
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("policy", list(itertools.product([0, 1], repeat=2)))
def test_followed_policies_run_or_skip(policy, training):
    net = two_blocks()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    plain = copy.deepcopy(net)
    model = taps.adapt(net, "adashare")
    for task in ("a", "b"):
        model.add_task(task, head=nn.Flatten())
    model.follow({"a": list(policy), "b": [1, 1]})
    model.train(training)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    for task, runs in (("a", policy), ("b", (1, 1))):
        # the running statistics move while training, but are not looked at
        want = x
        for block, u in zip(plain, runs, strict=True):
            want = mix(block, want, u, training)
        torch.testing.assert_close(model(x, task=task), want.flatten(1), rtol=1e-8, atol=1e-10)


# -- penalties -----------------------------------------------------------------------------------------------------


def sparsity_ref(logits, opened, variant):
    """Return the mean of −log p_skip, or the sum of log p_select, over opened blocks."""
    rows = [row for row, is_open in zip(logits, opened, strict=True) if is_open]
    if variant == "code":
        return sum(-torch.log(torch.exp(row[1]) / torch.exp(row).sum()) for row in rows) / len(rows)
    return sum(torch.log(torch.exp(row[0]) / torch.exp(row).sum()) for row in rows)


def sharing_ref(a, b, variant):
    """Return Σ (l+1)/L·|difference of select logits|, or Σ (L−l)/L·|difference of select probabilities|."""
    total, count = 0.0, len(a)
    for place in range(count):
        if variant == "code":
            total = total + (place + 1) / count * (a[place, 0] - b[place, 0]).abs()
        else:
            p, q = (torch.exp(one[place, 0]) / torch.exp(one[place]).sum() for one in (a, b))
            total = total + (count - place) / count * (p - q).abs()
    return total


@pytest.mark.parametrize(
    ("opened", "sparse"), [(1, 2.417775836142688), (5, 1.8549703588598434), (16, 2.337273869296895)]
)
def test_penalties_are_the_published_program_s(opened, sparse):
    """Numbers of AdaShare's functions on logits made by formula, of three tasks and 16 blocks, the last of which are opened."""
    block = np.arange(16)
    logits = [np.stack([np.sin(0.7 * block + task), np.cos(1.3 * block - task)], axis=1) for task in (1, 2, 3)]
    gates = [select_gates(own, [False] * (16 - opened) + [True] * opened) for own in logits]
    assert sum(sparsity(own).item() for own in gates) == pytest.approx(sparse, rel=1e-12)
    pairs = sum(sharing(gates[a], gates[b]).item() for a, b in ((0, 1), (0, 2), (1, 2)))
    assert pairs == pytest.approx(20.005196655889762, rel=1e-12)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("opened", [[True] * 5, [False, False, True, False, True], [False] * 4 + [True]])
def test_sparsity_over_opened_blocks(opened, variant):
    logits = 2 * torch.randn(5, 2, dtype=torch.float64)
    gates = select_gates(logits, opened)
    logits.requires_grad_()
    got, want = sparsity(gates, variant), sparsity_ref(logits, opened, variant)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    got.backward()
    want.backward()
    for gate, row in zip(gates, logits.grad, strict=True):
        own = torch.zeros(2).double() if gate.logits.grad is None else gate.logits.grad
        torch.testing.assert_close(own, row, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_sharing_weighs_blocks_by_their_place(count, variant):
    a, b = 2 * torch.randn(2, count, 2, dtype=torch.float64)
    want = sharing_ref(a, b, variant)
    got = sharing(select_gates(a), select_gates(b), variant)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(sharing(select_gates(b), select_gates(a), variant), got, rtol=1e-9, atol=0)
    assert float(sharing(select_gates(a), select_gates(a), variant).detach()) == 0.0


@pytest.mark.parametrize("sparsity_loss", ["code", "paper"])
@pytest.mark.parametrize("sharing_loss", ["code", "paper"])
@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_penalties_of_all_tasks_add_up(tasks, sharing_loss, sparsity_loss):
    """w_sparsity·Σ_k sparsity_k + w_sharing·Σ_{i<j} sharing_ij, and its gradient in every logit."""
    options = {"sparsity_weight": 0.3, "sharing_weight": 1.7}
    net = nn.Sequential(*(BasicBlock(2, 2) for _ in range(4))).double()
    model = taps.adapt(net, "adashare", **options, sparsity_loss=sparsity_loss, sharing_loss=sharing_loss)
    names = [f"task{number}" for number in range(tasks)]
    logits = torch.randn(tasks, 4, 2, dtype=torch.float64)
    opened = [False, True, True, True]
    for name, own in zip(names, logits, strict=True):
        model.add_task(name, head=nn.Flatten())
        for gate, row, is_open in zip(model.gates(name), own, opened, strict=True):
            gate.logits.data.copy_(row)
            gate.in_curriculum = is_open
    logits.requires_grad_()
    want = 0.3 * sum(sparsity_ref(own, opened, sparsity_loss) for own in logits)
    want = want + 1.7 * sum(sharing_ref(a, b, sharing_loss) for a, b in itertools.combinations(logits, 2))
    got = sum(model.penalty(name) for name in names)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    got.backward()
    want.backward()
    for name, rows in zip(names, logits.grad, strict=True):
        for gate, row in zip(model.gates(name), rows, strict=True):
            own = torch.zeros(2).double() if gate.logits.grad is None else gate.logits.grad
            torch.testing.assert_close(own, row, rtol=1e-6, atol=1e-12)


# -- instance gates ------------------------------------------------------------------------------------------------

SHAPES = {"1-d": ((6, 5, 9), 1), "2-d": ((6, 5, 4, 7), 1), "3-d": ((6, 5, 2, 3, 4), 1), "tokens": ((6, 8, 5), -1)}


def instance_gate(channels=5, target=0.4, channel_dim=1):
    """Return a gate with only random tensors, so that samples make different choices."""
    gate = InstanceGate(channels, target, channel_dim).double()
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    gate.normalize.running_mean.normal_()
    gate.normalize.running_var.uniform_(0.5, 2.0)
    nn.init.zeros_(gate.choose.bias)
    return gate


def instance_logits(gate, x, training, channel_dim=1):
    """Compute pooling over all positions → linear → BatchNorm → ReLU → linear."""
    tensors = {**dict(gate.named_parameters()), **dict(gate.named_buffers())}
    x = x.movedim(channel_dim, 1)
    pooled = x.reshape(*x.shape[:2], -1).sum(-1) / math.prod(x.shape[2:])
    hidden = pooled @ tensors["reduce.weight"].T + tensors["reduce.bias"]
    mean, var = tensors["normalize.running_mean"], tensors["normalize.running_var"]
    if training:
        mean = hidden.mean(0)
        var = ((hidden - mean) ** 2).mean(0)
    hidden = (hidden - mean) / (var + 1e-5).sqrt() * tensors["normalize.weight"] + tensors["normalize.bias"]
    return hidden.clamp(min=0) @ tensors["choose.weight"].T + tensors["choose.bias"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", SHAPES)
def test_instance_gate_logits(layout, training):
    shape, channel_dim = SHAPES[layout]
    gate = instance_gate(channel_dim=channel_dim).train(training)
    x = torch.randn(shape, dtype=torch.float64)
    want = instance_logits(gate, x, training, channel_dim)
    torch.testing.assert_close(gate.logits(x), want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("layout", SHAPES)
def test_instance_gate_decides_without_noise(layout):
    shape, channel_dim = SHAPES[layout]
    gate = instance_gate(channel_dim=channel_dim).eval()
    x = torch.randn(64, *shape[1:], dtype=torch.float64)
    run, skip = instance_logits(gate, x, False, channel_dim).unbind(1)
    gate.choose.bias.data[1] = (run - skip).mean().detach()
    run, skip = instance_logits(gate, x, False, channel_dim).unbind(1)
    first, second = gate(x, State()).run, gate(x, State()).run
    assert torch.equal(first, (run >= skip).double())
    assert torch.equal(first, second)
    assert 0 < float(first.mean()) < 1
    for parameter in gate.choose.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(gate(x, State()).run, torch.ones(64).double())


@pytest.mark.parametrize("layout", SHAPES)
def test_instance_gate_draws_while_training(layout):
    shape, channel_dim = SHAPES[layout]
    gate = instance_gate(channel_dim=channel_dim).train()
    state = State()
    state.temperature, state.generator = 0.8, seeded(2)
    x = torch.randn(64, *shape[1:], dtype=torch.float64)
    soft = draw(instance_logits(gate, x, True, channel_dim), 0.8, seeded(2))
    run = gate(x, state).run
    assert torch.equal(run, (soft >= 0.5).double())
    weight = torch.randn(64, dtype=torch.float64)
    parameters = list(gate.parameters())
    got = torch.autograd.grad((run * weight).sum(), parameters)
    for one, other in zip(got, torch.autograd.grad((soft * weight).sum(), parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("variant", ["gated", "code"])
def test_target_rate_and_its_gradient(variant):
    """Of five gates, one is constant and one has not seen a batch."""
    targets = [0.2, 0.5, 0.9, 0.7]
    gates = [instance_gate(target=target).train() for target in targets]
    state = State()
    state.generator = seeded(6)
    reference, terms, runs = seeded(6), [], []
    for gate, target in zip(gates[:3], targets, strict=False):
        x = torch.randn(20, 5, 4, 4, dtype=torch.float64)
        gate(x, state)
        runs.append(straight(draw(instance_logits(gate, x, True), 1.0, reference)))
        terms.append((target - runs[-1].mean()) ** 2)
    want = sum(terms) / (3 if variant == "gated" else 5)
    got = target_rate([ConstantGate(), *gates], variant)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert len({float(run.detach().mean()) for run in runs} | {0.0, 1.0}) > 3
    parameters = [parameter for gate in gates[:3] for parameter in gate.parameters()]
    for one, other in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("policy", [(1, 1), (0, 1), (1, 0)])
def test_instance_gates_mix_samples_in_the_network(policy, training):
    """x_next = u·a(x)·f(x) + (1 − u·a(x))·shortcut(x), with one a(x) per sample; u is the task's policy."""
    net = two_blocks()
    plain = copy.deepcopy(net)
    model = taps.adapt(net, "dynashare", target_rates=[0.3, 0.6], target_weight=4.0, target_loss="code")
    model.add_task("a", head=nn.Flatten())
    model.follow({"a": list(policy)})
    for gate in model.gates("a"):
        for parameter in gate.parameters():
            nn.init.normal_(parameter)
        if isinstance(gate, InstanceGate):
            nn.init.zeros_(gate.choose.bias)
    gates = [copy.deepcopy(gate) for gate in model.gates("a")]
    model.train(training)
    model.state.temperature, model.state.generator = 0.6, seeded(9)
    reference, penalty = seeded(9), 0.0
    x = torch.randn(12, 4, 6, 6, dtype=torch.float64)
    want = x
    for block, gate, u, target in zip(plain, gates, policy, [0.3, 0.6], strict=True):
        if u:
            logits = instance_logits(gate, want, training)
            a = draw(logits, 0.6, reference) >= 0.5 if training else logits[:, 0] >= logits[:, 1]
            penalty += 4.0 * (target - float(a.double().mean())) ** 2 / 2
            want = mix(block, want, a.double()[:, None, None, None], training)
        else:
            want = shortcut(block, want, training)
    torch.testing.assert_close(model(x, task="a"), want.flatten(1), rtol=1e-8, atol=1e-10)
    if training:
        assert float(model.penalty("a").detach()) == pytest.approx(penalty, rel=1e-6)


# -- losses --------------------------------------------------------------------------------------------------------

CHANNELS = {"classes": 4, "normals": 3, "depth": 1, "disparity": 1, "map": 1}
SMALL = (4, 5)


def dense_task(kind, weights=None):
    return Task("a", kind, CHANNELS[kind], weights)


def label_of(kind, size, rng, batch=3, missing=0.3):
    """Return a label of the given kind in which some pixels have no value."""
    gone = rng.random((batch, *size)) < missing
    if kind == "classes":
        return np.where(gone, IGNORE_INDEX, rng.integers(0, CHANNELS[kind], (batch, *size)))
    label = rng.normal(size=(batch, CHANNELS[kind], *size))
    if kind == "normals":
        label /= np.linalg.norm(label, axis=1, keepdims=True)
    elif kind != "map":
        label = np.abs(label) + 0.3
    label[np.broadcast_to(gone[:, None], label.shape)] = np.nan
    return label


def enlarged(prediction, size):
    """Upsample bilinearly, with pixel centres at half integers (align_corners=False) and a repeated border."""
    axes = [
        np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        for old, new in zip(prediction.shape[2:], size, strict=True)
    ]
    places = np.stack(np.meshgrid(*axes, indexing="ij"))
    return np.stack([[map_coordinates(plane, places, order=1) for plane in image] for image in prediction])


def shrunk(label, size):
    """Downsample by taking for every new pixel the first of the old pixels that it covers."""
    rows, columns = (
        [place * old // new for place in range(new)] for old, new in zip(label.shape[-2:], size, strict=True)
    )
    return label[..., rows, :][..., columns]


def loss_ref(kind, prediction, label, weights=None):
    if kind == "classes":
        known = label != IGNORE_INDEX
        labels = label[known]
        scores = log_softmax(np.moveaxis(prediction, 1, -1)[known], axis=-1)
        each = np.ones(len(labels)) if weights is None else np.asarray(weights)[labels]
        return -(each * scores[np.arange(len(labels)), labels]).sum() / each.sum()
    known = np.isfinite(label).all(1)
    p, g = (np.moveaxis(one, 1, -1)[known] for one in (prediction, label))
    if kind == "normals":
        cosines = (p * g).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(g, axis=1)
        return 1 - cosines.mean()
    return np.abs(p - g).mean()


CASES = [(kind, None) for kind in CHANNELS] + [("classes", (0.5, 2.0, 1.0, 3.5))]


@pytest.mark.parametrize("at_output", [False, True])
@pytest.mark.parametrize("size", [SMALL, (12, 15), (11, 13)])
@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_losses(kind, weights, size, at_output):
    rng = np.random.default_rng(1)
    prediction = rng.normal(size=(3, CHANNELS[kind], *SMALL)) * 2
    label = label_of(kind, size, rng)
    if at_output:
        want = loss_ref(kind, prediction, shrunk(label, SMALL), weights)
    else:
        want = loss_ref(kind, enlarged(prediction, size), label, weights)
    loss = make_loss(dense_task(kind, weights), "nearest" if at_output else None)
    x = torch.tensor(prediction, requires_grad=True)
    got = loss(x, torch.tensor(label))
    assert float(got.detach()) == pytest.approx(want, rel=1e-5)
    got.backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0
    direction = rng.normal(size=prediction.shape)
    step = 1e-6 * direction
    ahead, behind = (
        loss_ref(kind, moved, shrunk(label, SMALL), weights)
        if at_output
        else loss_ref(kind, enlarged(moved, size), label, weights)
        for moved in (prediction + step, prediction - step)
    )
    slope = float((x.grad * torch.tensor(direction)).sum())
    assert slope == pytest.approx((ahead - behind) / 2e-6, rel=1e-4, abs=1e-5)
    if size == SMALL:
        gone = label == IGNORE_INDEX if kind == "classes" else ~np.isfinite(label).all(1)
        assert (x.grad.abs().sum(1)[torch.tensor(gone)] == 0).all()


def test_labels_at_the_size_of_predictions_keep_their_place():
    """A slope that is learned at the network's output comes back where it was, unless half a cell is lost as in the programs."""
    slope = torch.arange(56.0).expand(1, 1, 56, 56)
    inner = (..., slice(8, -8), slice(8, -8))
    moved = {
        mode: float((to_size(shrink(slope, (7, 7), mode), (56, 56)) - slope)[inner].mean())
        for mode in ("nearest-exact", "nearest")
    }
    assert moved == pytest.approx({"nearest-exact": 0.5, "nearest": -3.5})


@pytest.mark.parametrize("at_output", [False, True])
@pytest.mark.parametrize("size", [SMALL, (12, 15)])
@pytest.mark.parametrize(("kind", "weights"), CASES)
def test_losses_of_batches_without_labels(kind, weights, size, at_output):
    label = torch.tensor(label_of(kind, size, np.random.default_rng(0), missing=2.0))
    x = torch.randn(3, CHANNELS[kind], *SMALL, dtype=torch.float64, requires_grad=True)
    loss = make_loss(dense_task(kind, weights), "nearest" if at_output else None)(x, label)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))


# -- metrics -------------------------------------------------------------------------------------------------------


def streamed(kind, batches, published=False, channels=None):
    """Return the library's metric over batches of (prediction, label)."""
    metric = make_metric(Task("a", kind, channels or CHANNELS[kind]), published)
    for prediction, label in batches:
        metric.update(torch.tensor(prediction), torch.tensor(label))
    return metric.compute()


def class_batches():
    """Return seven classes: 0 and 1 often right, 2 labelled but never right, 3 only predicted, 4 only in void, 5 and 6 absent."""
    rng = np.random.default_rng(2)
    batches = []
    for count, size in ((3, (6, 5)), (1, (4, 9)), (2, (3, 3))):
        label = rng.choice([0, 1, 2, IGNORE_INDEX], (count, *size), p=[0.4, 0.3, 0.1, 0.2])
        chosen = np.where(rng.random(label.shape) < 0.7, label, rng.choice([0, 1, 3], label.shape))
        chosen = np.where(chosen == 2, 3, chosen)
        chosen = np.where(label == IGNORE_INDEX, 4, chosen)
        prediction = rng.normal(size=(count, 7, *size))
        np.put_along_axis(prediction, chosen[:, None], 9.0, axis=1)
        batches.append((prediction, label))
    return batches


@pytest.mark.parametrize("published", [False, True])
def test_class_metrics(published):
    batches = class_batches()
    labels = np.concatenate([label.ravel() for _, label in batches])
    chosen = np.concatenate([prediction.argmax(1).ravel() for prediction, _ in batches])[labels != IGNORE_INDEX]
    labels = labels[labels != IGNORE_INDEX]
    ratios = []
    for number in range(7):
        both = ((labels == number) & (chosen == number)).sum()
        either = ((labels == number) | (chosen == number)).sum()
        if (both if published else either) > 0:
            ratios.append(both / either)
    assert len(ratios) == (2 if published else 4)
    accuracy = (labels == chosen).mean()
    if published:
        each = [(prediction.argmax(1) == label)[label != IGNORE_INDEX].mean() for prediction, label in batches]
        accuracy = np.average(each, weights=[len(label) for _, label in batches])
    got = streamed("classes", batches, published, 7)
    assert got == pytest.approx({"miou": 100 * np.mean(ratios), "pixel_accuracy": 100 * accuracy}, rel=1e-6)


def angles_ref(batches, published):
    """Return the degrees between unit vectors n or, if published, between the vectors (n + 1)/2."""
    found = []
    for prediction, label in batches:
        known = np.isfinite(label).all(1)
        p, g = (np.moveaxis(one, 1, -1)[known] for one in (prediction, label))
        p, g = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (p, g))
        if published:
            p, g = (p + 1) / 2, (g + 1) / 2
        cosine = (p * g).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(g, axis=1)
        found.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    return np.concatenate(found)


def normal_batches(counts, noise, missing=0.25):
    rng = np.random.default_rng(3)
    batches = []
    for count in counts:
        label = label_of("normals", (9, 8), rng, count, missing)
        prediction = 3 * np.nan_to_num(label) + noise * rng.normal(size=label.shape)
        batches.append((prediction, label))
    return batches


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0])
def test_normal_metrics(noise, published):
    batches = normal_batches((4, 1, 12), noise)
    batches.append((batches[1][0], np.full_like(batches[1][1], np.nan)))
    angles = angles_ref(batches, published)
    ordered = np.sort(angles)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    got = streamed("normals", batches, published)
    assert low - 0.02 <= got.pop("median_angle") <= high + 0.02
    want = {"mean_angle": angles.mean(), "rmse_angle": np.sqrt((angles**2).mean())}
    want |= {f"within_{limit:g}": 100 * (angles < limit).mean() for limit in (11.25, 22.5, 30)}
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("angles", [[40.0, 3.0, 95.0], [0.0, 180.0, 180.0], [12.0, 7.5, 7.5, 0.0, 60.0], [1.2345]])
def test_median_of_few_angles(angles):
    """An odd number of pixels, one per batch, has a single median."""
    batches = []
    for angle in np.radians(angles):
        label = np.array([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
        batches.append((2 * np.array([np.sin(angle), 0.0, np.cos(angle)]).reshape(1, 3, 1, 1), label))
    got = streamed("normals", batches)
    assert abs(got["median_angle"] - np.median(angles)) <= 0.02
    assert got["mean_angle"] == pytest.approx(np.mean(angles), rel=1e-9)


def depth_batches(kind="depth"):
    """Return batches of unequal sizes; some predictions are not positive, some exactly on a threshold, one batch is void."""
    rng = np.random.default_rng(4)
    batches = []
    for count in (3, 1, 2):
        label = label_of(kind, (5, 7), rng, count)
        prediction = np.nan_to_num(label) * np.exp(0.4 * rng.normal(size=label.shape)) * count
        prediction[rng.random(label.shape) < 0.15] *= -1
        batches.append((prediction, label))
    edge = np.array([1.25, 0.8, 1.5625, 1.953125, 1.2499, 0.0, -1.0, 1.0]).reshape(1, 1, 2, 4)
    return [*batches, (edge, np.ones_like(edge)), (edge, np.full_like(edge, np.nan))]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", ["depth", "disparity"])
def test_depth_metrics(kind, published):
    batches = depth_batches(kind)
    pairs = [(p[np.isfinite(g)], g[np.isfinite(g)]) for p, g in batches]
    images = [len(label) for (_, label), (_, g) in zip(batches, pairs, strict=True) if len(g)]
    pairs = [(p, g) for p, g in pairs if len(g)]
    p, g = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    want = {"abs_error": np.abs(p - g).mean(), "rel_error": (np.abs(p - g) / g).mean()}
    if published:
        want["abs_error"] = np.average([np.abs(a - b).mean() for a, b in pairs], weights=images)
        want["rel_error"] = np.average([(np.abs(a - b) / b).mean() for a, b in pairs], weights=images)
    want["rmse"] = np.sqrt(((p - g) ** 2).mean())
    for power in (1, 2, 3):
        right = [
            (published and a < 0) or (a > 0 and max(a / b, b / a) < 1.25**power)
            for a, b in zip(p.tolist(), g.tolist(), strict=True)
        ]
        want[f"delta_{power}"] = 100 * np.mean(right)
    assert streamed(kind, batches, published) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("published", [False, True])
def test_map_metrics(published):
    rng = np.random.default_rng(5)
    batches = []
    for count in (4, 1, 2):
        label = label_of("map", (6, 3), rng, count)
        batches.append((count * rng.normal(size=label.shape), label))
    batches.append((batches[1][0], np.full_like(batches[1][1], np.nan)))
    errors = [np.abs(prediction - label)[np.isfinite(label)] for prediction, label in batches[:3]]
    means = [each.mean() for each in errors]
    want = np.average(means, weights=(4, 1, 2)) if published else np.concatenate(errors).mean()
    assert streamed("map", batches, published) == pytest.approx({"error": want}, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "sign"),
    [(name, -1) for name in ("mean_angle", "median_angle", "abs_error", "rel_error", "error")]
    + [(name, 1) for name in ("miou", "pixel_accuracy", "within_11.25", "within_22.5", "within_30")]
    + [(f"delta_{power}", 1) for power in (1, 2, 3)],
)
def test_relative_gain_of_one_metric(name, sign):
    assert relative_gain({name: 12.0}, {name: 10.0}) == pytest.approx(sign * 20.0, rel=1e-12)
    assert relative_gain({name: 7.0}, {name: 10.0}) == pytest.approx(sign * -30.0, rel=1e-12)


def test_relative_gain_and_delta_t():
    """Gains are means over the metrics of a task, excluding rmse and rmse_angle, and then over tasks."""
    lower = {"mean_angle", "median_angle", "abs_error", "rel_error", "error"}
    kinds = {
        "seg": ["miou", "pixel_accuracy"],
        "sn": ["mean_angle", "median_angle", "within_11.25", "within_22.5", "within_30", "rmse_angle"],
        "depth": ["abs_error", "rel_error", "delta_1", "delta_2", "delta_3", "rmse"],
        "edge": ["error"],
    }
    rng = np.random.default_rng(6)
    values, single = ({task: {n: rng.uniform(1, 90) for n in names} for task, names in kinds.items()} for _ in "ab")
    gains = {}
    for task, names in kinds.items():
        each = [
            (-1) ** (name in lower) * (values[task][name] - single[task][name]) / single[task][name] * 100
            for name in names
            if name not in ("rmse", "rmse_angle")
        ]
        gains[task] = sum(each) / len(each)
        assert relative_gain(values[task], single[task]) == pytest.approx(gains[task], rel=1e-9)
    assert delta_t(values, single) == pytest.approx(np.mean(list(gains.values())), rel=1e-9)


# -- the head ------------------------------------------------------------------------------------------------------


def convolved(x, layer, rate):
    """Compute a convolution of three taps per dimension, rate apart, with zero padding, as a sum of shifted inputs."""
    weight, dimensions = layer.weight.detach().numpy(), x.ndim - 2
    padded = np.pad(x, [(0, 0), (0, 0)] + [(rate, rate)] * dimensions)
    y = layer.bias.detach().numpy().reshape(-1, *[1] * dimensions)
    for taps_at in itertools.product(range(3), repeat=dimensions):
        window = tuple(slice(tap * rate, tap * rate + size) for tap, size in zip(taps_at, x.shape[2:], strict=True))
        shifted = padded[(slice(None), slice(None), *window)]
        y = y + np.einsum("oi,bi...->bo...", weight[(slice(None), slice(None), *taps_at)], shifted)
    return y


def pointwise(x, layer):
    weight = layer.weight.detach().numpy().reshape(layer.weight.shape[:2])
    bias = layer.bias.detach().numpy().reshape(-1, *[1] * (x.ndim - 2))
    return np.einsum("oi,bi...->bo...", weight, x) + bias


@pytest.mark.parametrize("rates", [(1, 2, 5), (6, 12, 18, 24)])
@pytest.mark.parametrize("size", [(11,), (7, 9), (4, 5, 6)])
def test_aspp_adds_its_branches(size, rates):
    head = ASPP(5, 3, width=7, rates=rates, dropout=0.5, dimensions=len(size)).double().eval()
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = [layer for layer in head.modules() if isinstance(layer, kind)]
    assert len(layers) == 3 * len(rates)
    want = 0.0
    for place, rate in enumerate(rates):
        first, second, last = layers[3 * place : 3 * place + 3]
        y = np.maximum(convolved(x.numpy(), first, rate), 0)
        want = want + pointwise(np.maximum(pointwise(y, second), 0), last)
    np.testing.assert_allclose(head(x).detach().numpy(), want, rtol=1e-8, atol=1e-10)
