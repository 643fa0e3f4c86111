"""Methods of every kind can be added as rows: those defined here need no change in gates, layers or model.

They are the smallest gates of each kind (block selection, input-dependent blocks, three-way choice, elementwise masks);
they test the mechanism, not the quality of the methods.
"""

import pytest
import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

import taps
from taps.core.execution import State
from taps.core.find import Found
from taps.core.gate import Decision, Gate
from taps.core.method import Method
from taps.methods.registry import METHODS


def blocks(net: nn.Module) -> list[Found]:
    return [
        Found(name, module, (), module.downsample)
        for name, module in net.named_modules()
        if isinstance(module, BasicBlock)
    ]


class SelectGate(Gate):
    """Block selection with a two-way Gumbel-softmax (AdaShare's kind)."""

    needs_delta = False

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def relax(self, x: Tensor, state: State) -> Decision:
        noise = -torch.rand(2, generator=state.generator).clamp_min(1e-9).log().neg().log()
        return Decision(run=((self.logits + noise) / state.temperature).softmax(0)[0])

    def decide(self, x: Tensor | None = None) -> Decision:
        return Decision(run=float(self.logits[0] >= self.logits[1]))


class InstanceGate(Gate):
    """A choice per sample (DynaShare's kind)."""

    needs_delta = False

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Parameter(torch.zeros(()))

    def relax(self, x: Tensor, state: State) -> Decision:
        return Decision(run=(x.mean(dim=(1, 2, 3)) - self.cut).sigmoid())

    def decide(self, x: Tensor | None = None) -> Decision:
        return Decision(run=0.5 if x is None else (x.mean(dim=(1, 2, 3)) > self.cut).float())


class ThreeWayGate(Gate):
    """A choice of shared, own or skipped (AutoMTL's kind)."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))

    def relax(self, x: Tensor, state: State) -> Decision:
        shared, own, skip = (self.logits / state.temperature).softmax(0)
        return Decision(run=1 - skip, specific=own / (shared + own))

    def decide(self, x: Tensor | None = None) -> Decision:
        choice = int(self.logits.argmax())
        return Decision(run=float(choice != 2), specific=float(choice == 1))


class ElementGate(Gate):
    """A mask over all weights (the sparse delta's kind)."""

    def __init__(self, shapes: dict) -> None:
        super().__init__()
        self.masks = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes.values()])
        self.names = list(shapes)

    def relax(self, x: Tensor, state: State) -> Decision:
        return Decision(specific={name: mask.sigmoid() for name, mask in zip(self.names, self.masks, strict=True)})

    def decide(self, x: Tensor | None = None) -> Decision:
        return Decision(specific={name: (mask > 0).float() for name, mask in zip(self.names, self.masks, strict=True)})


ROWS = {
    "select": Method("blocks", "test", lambda unit: SelectGate(), select=blocks, trains_base=True),
    "instance": Method("blocks by sample", "test", lambda unit: InstanceGate(), select=blocks, trains_base=True),
    "three_way": Method("shared, own or skip", "test", lambda unit: ThreeWayGate(), trains_base=True),
    "elements": Method("masks", "test", lambda unit: ElementGate(unit.shapes)),
}


@pytest.fixture(params=ROWS)
def model(request, monkeypatch):
    monkeypatch.setitem(METHODS, request.param, ROWS[request.param])
    if request.param == "three_way":  # skipping is the identity, so shapes must agree
        net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Flatten())
    else:
        net = taps.create_backbone("resnet10t", pretrained=False)
    model = taps.adapt(net, request.param)
    for task in ("a", "b"):
        model.add_task(task, head=nn.LazyLinear(3))
    return model


def test_it_trains_reports_and_counts(model, tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
    for task in ("a", "b"):
        model(x, task)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = sum(nn.functional.cross_entropy(model(x, task), y) for task in ("a", "b"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    gates = [gate for unit in model.units for gate in unit.gates["a"].parameters()]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in gates), "the gates learn"
    model.eval()
    assert all(0 <= row["run"] <= 1 and 0 <= row["specific"] <= 1 for row in model.report("a"))
    assert model(x, "a").shape == (8, 3)


def test_everything_selected_is_the_plain_network_bit_for_bit(monkeypatch):
    monkeypatch.setitem(METHODS, "select", ROWS["select"])
    net = taps.create_backbone("resnet10t", pretrained=False).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
        model = taps.adapt(net, "select").eval()
        model.add_task("a", head=nn.Identity())
        assert torch.equal(model(x, "a"), expected)
        calls = []
        unit = model.units[1]
        unit.base.register_forward_hook(lambda *arguments: calls.append(1))
        unit.gates["a"].logits.data.copy_(torch.tensor([0.0, 1.0]))
        skipped = model(x, "a")
        assert not calls, "a skipped block is not called"
        assert not torch.equal(skipped, expected)
        assert torch.equal(model.merge("a")(x), skipped)


def test_rows_that_are_not_kept_are_never_computed(monkeypatch):
    monkeypatch.setitem(METHODS, "instance", ROWS["instance"])
    model = taps.adapt(taps.create_backbone("resnet10t", pretrained=False), "instance").eval()
    model.add_task("a", head=nn.Identity())
    seen = []
    unit = model.units[1]
    unit.base.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    unit.gates["a"].register_forward_hook(lambda *arguments: Decision(run=torch.tensor([1.0, 0.0, 1.0, 0.0])))
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        mixed = model(x, "a")
        assert seen == [2]
        unit.gates["a"]._forward_hooks.clear()
        unit.gates["a"].register_forward_hook(lambda *arguments: Decision(run=1.0))
        torch.testing.assert_close(mixed[::2], model(x, "a")[::2])
    unit.gates["a"].decide = lambda x=None: Decision(run=torch.ones(4))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge("a")


def test_an_elementwise_mask_is_saved_merged_and_loaded(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "elements", ROWS["elements"])
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    model = taps.adapt(net, "elements").eval()
    model.add_task("a", num_classes=2)
    for parameter in model.roles("a")["delta"].values():
        parameter.data.normal_()
    x = torch.randn(3, 4)
    expected = model(x, "a")
    torch.testing.assert_close(model.merge("a")(x), expected)
    model.save_task("a", tmp_path)
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    other.load_state_dict(model.base_state())
    other = taps.adapt(other, "elements").eval()
    other.load_task(tmp_path)
    torch.testing.assert_close(other(x, "a"), expected)
