"""Calls of a model: from several threads, with activation checkpointing, with any inputs and outputs, on an unchanged base."""

import copy
import threading
from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
from cases import NETWORKS, make
from torch import nn
from torch.utils.checkpoint import checkpoint

import taps

# -- threads -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared():
    """A model with three different tasks."""
    torch.manual_seed(0)
    model = make("resnet", "taps_follow", ("a", "b", "c"))
    for position, task in enumerate(model.tasks):
        for parameter in model.roles(task)["delta"].values():
            parameter.data.normal_(std=0.05)
        for index, unit in enumerate(model.units):
            unit.gates[task].set(index > 8 and (index + position) % 2 == 0)
    return model.eval()


def in_threads(calls: dict, rounds: int = 12) -> list[BaseException]:
    """Repeat each call in its own thread, all at once; a result that differs from that of a single call is an error."""
    expected = {name: call() for name, call in calls.items()}
    errors, barrier = [], threading.Barrier(len(calls))

    def work(name: str) -> None:
        try:
            barrier.wait()
            for _ in range(rounds):
                torch.testing.assert_close(calls[name](), expected[name], rtol=0, atol=0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_threads_get_what_each_gets_alone(shared):
    x = torch.randn(3, 3, 32, 32)
    predictor = shared.predictor(["a", "c"])

    def sticky():
        shared.set_task("b")
        return shared(x)

    with torch.no_grad():
        calls = {
            "a": lambda: shared(x, "a"),
            "b": lambda: shared(x, task="b"),
            "sticky": sticky,
            "base": lambda: shared.features(x),
            "predict": lambda: shared.predict(x),
            "mixed": lambda: list(shared(x, ["a", "b", "c"])),
            "predictor": lambda: predictor(x),
        }
        grad = {name: (lambda call=call: torch.no_grad()(call)()) for name, call in calls.items()}
        assert in_threads(grad) == []
    shared.set_task(None)


def test_threads_share_a_library_that_holds_one_task(shared, tmp_path):
    for task in shared.tasks:
        shared.save_task(task, tmp_path / task)
    model = make("resnet", "taps_follow", ())
    model.load_base(shared.base_state())
    model.eval().load_library(tmp_path, keep=1)
    x = torch.randn(2, 3, 32, 32)
    calls = {task: lambda task=task: model(x, task).detach() for task in ("a", "b", "c")}
    calls["all"] = lambda: model.predict(x)
    assert in_threads(calls, rounds=6) == []
    model(x, "a")
    assert sum(task in model.heads for task in ("a", "b", "c")) == 1


def test_a_thread_trains_while_others_predict():
    model = make("perceptron", "taps_frozen", ("a", "b"))
    model.eval()
    x, stop, errors = torch.randn(4, 5), threading.Event(), []
    with torch.no_grad():
        expected = model(x, "b")

    def train() -> None:
        optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "a" in n.split(".")], lr=0.1)
        while not stop.is_set():
            optimizer.zero_grad()
            model(x, "a").square().sum().backward()
            optimizer.step()

    thread = threading.Thread(target=train)
    thread.start()
    for _ in range(100):
        with torch.no_grad():
            if not torch.equal(model(x, "b"), expected):
                errors.append("b moved")
    stop.set()
    thread.join()
    assert errors == []


def test_the_sticky_task_is_a_threads_own(shared):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        shared.set_task("a")
        assert torch.equal(shared(x), shared(x, "a"))
        assert torch.equal(shared(x, "b"), shared(x, task="b"))
        seen = []
        thread = threading.Thread(target=lambda: seen.append(shared.state.default))
        thread.start()
        thread.join()
        assert seen == [None]
    with pytest.raises(ValueError, match="unknown task 'd'"):
        shared.set_task("d")
    shared.set_task(None)
    with pytest.raises(ValueError, match="no task given"):
        shared(x)


# -- activation checkpointing --------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A network that recomputes two of its three parts in the backward pass."""

    def __init__(self, reentrant: bool | None, first: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.3), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.reentrant, self.first = reentrant, first

    def forward(self, x):
        for part in (self.stem, self.middle, self.last):
            if self.reentrant is None or (part is self.stem and not self.first):
                x = part(x)
            else:
                x = checkpoint(part, x, use_reentrant=self.reentrant)
        return x


def gradients(net: nn.Module, kind: str, method: str = "taps", steps: int = 2) -> dict[str, torch.Tensor]:
    """Return the gradients of all trained parameters, and the running statistics, after some steps of one kind."""
    torch.manual_seed(0)
    model = taps.adapt(net, method)
    for task in ("a", "b"):
        model.add_task(task, num_classes=3)
        for parameter in model.roles(task).get("delta", {}).values():
            parameter.data.normal_(std=0.05)
    if method == "taps":
        model.units[1].gates["a"].set(False)
    model.train()
    size = 24 if isinstance(net, Checkpointed) else 32
    x = torch.randn(6, 3, size, size)
    names = ["a", "b", "a", "b", "a", "b"]
    for step in range(steps):
        torch.manual_seed(step)
        if kind == "single":
            loss = model(x, "a").square().mean()
        elif kind == "joint":
            loss = model(x, "a").square().mean() + 2 * model(x, "b").square().mean()
        elif kind == "mixed":
            loss = model(x, names).square().mean()
        else:
            loss = sum(output.square().mean() for output in model(x, tasks=["a", "b"]).values())
        (loss + model.penalty("a")).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {**found, **{name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}}


@pytest.mark.parametrize("kind", ["single", "joint", "mixed", "together"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_checkpoints_in_a_users_network_change_no_gradient(kind, reentrant, first):
    torch.manual_seed(1)
    plain = Checkpointed(None)
    again = Checkpointed(reentrant, first)
    again.load_state_dict(plain.state_dict())
    expected, found = gradients(plain, kind), gradients(again, kind)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["single", "joint", "mixed", "together"])
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timms_own_checkpoints_change_no_gradient(kind, name):
    options = {"img_size": 32, "depth": 2} if "vit" in name else {}
    torch.manual_seed(1)
    plain = timm.create_model(name, num_classes=0, **options)
    again = copy.deepcopy(plain)
    again.set_grad_checkpointing(True)
    expected, found = gradients(plain, kind), gradients(again, kind)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_a_whole_call_may_be_checkpointed():
    torch.manual_seed(1)
    model = make("resnet", "taps")
    x = torch.randn(4, 3, 32, 32)
    for way in (False, True):
        model.zero_grad()
        loss = checkpoint(lambda x: model(x, "a"), x, use_reentrant=False) if way else model(x, "a")
        loss.square().mean().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if not way:
            expected = found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_layers_called_in_a_backward_pass_of_no_known_call_are_refused():
    class Nested(Checkpointed):
        def forward(self, x):
            def inner(x):
                return checkpoint(self.middle, x, use_reentrant=False)

            return self.last(checkpoint(inner, self.stem(x), use_reentrant=True))

    model = taps.adapt(Nested(None)).train()
    model.add_task("a", num_classes=2)
    with pytest.raises(ValueError, match="checkpoint parts of the network, each by itself"):
        model(torch.randn(4, 3, 24, 24), "a").sum().backward()


def test_the_switch_of_a_network_is_an_option():
    model = taps.adapt(taps.create_backbone("resnet10t", pretrained=False))
    model.checkpoint_activations()
    assert model.backbone.grad_checkpointing
    with pytest.raises(ValueError, match="has no set_grad_checkpointing"):
        make("perceptron", "taps").checkpoint_activations()


# -- the base is never touched -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "normalized",
    [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm],
)
def test_hooks_and_parametrizations_move_nothing_of_the_base(normalized):
    torch.manual_seed(0)
    net = nn.Sequential(normalized(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    net(torch.randn(1, 3, 8, 8))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = taps.adapt(net)
    model.add_task("a", num_classes=2)
    held = []
    model.units[0].base.register_forward_hook(
        lambda *_: held.append({name: tensor.clone() for name, tensor in model.base_state().items()})
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()(torch.randn(4, 3, 8, 8), "a").square().sum().backward()
        optimizer.step()
    model.eval()(torch.randn(4, 3, 8, 8), "a")
    for state in (model.base_state(), *held):
        assert before.keys() == state.keys()
        assert all(torch.equal(before[name], state[name]) for name in before)
    assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if name.endswith(".delta"))


class Tied(nn.Module):
    """Two layers that share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_tied_parameters_agree_everywhere(tmp_path):
    model = taps.adapt(Tied()).eval()
    for task in ("a", "b"):
        model.add_task(task, num_classes=3)
        for parameter in model.roles(task)["delta"].values():
            parameter.data.normal_()
    model.units[1].gates["b"].set(False)
    x = torch.randn(4, 6)
    model.save_task("a", tmp_path)
    with torch.no_grad():
        for task in ("a", "b"):
            torch.testing.assert_close(model.merge(task)(x), model(x, task))
            torch.testing.assert_close(model.predictor()(x)[task], model(x, task))
        other = taps.adapt(Tied()).eval()
        other.load_base(model.base_state())
        other.load_task(tmp_path)
        torch.testing.assert_close(other(x, "a"), model(x, "a"), rtol=0, atol=0)


# -- inputs and outputs --------------------------------------------------------------------------------------------


@dataclass
class Output:
    features: torch.Tensor
    maps: list


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.kind = kind

    def forward(self, x):
        a = self.first(x)
        b = self.second(a)
        return {
            "tuple": (a, b), "list": [a, b], "dict": {"a": a, "b": {"c": b}}, "dataclass": Output(a, [b, None, 3]),
        }[self.kind]  # fmt: skip


class Head(nn.Module):
    """A head that finds its input tensors in any container."""

    def forward(self, found):
        values = {"tuple": lambda: found, "list": lambda: found}
        if isinstance(found, Output):
            assert found.maps[1:] == [None, 3]
            return found.features.sum(1, keepdim=True) * found.maps[0]
        a, b = (found["a"], found["b"]["c"]) if isinstance(found, dict) else values[type(found).__name__]()
        assert type(a) is torch.Tensor
        return a.sum(1, keepdim=True) * b


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "dataclass"])
def test_outputs_of_any_kind_pass_through(kind):
    model = taps.adapt(Outputs(kind), norm="follow").eval()
    for task in ("a", "b"):
        model.add_task(task, head=Head())
        for parameter in model.roles(task)["delta"].values():
            parameter.data.normal_()
    model.units[0].gates["a"].set(False)
    model.units[0].gates["b"].set(False)
    x = torch.randn(4, 6)
    with torch.no_grad():
        expected = {task: model(x, task) for task in ("a", "b")}
        torch.testing.assert_close(model.predict(x), expected)
        torch.testing.assert_close(model.predictor()(x), expected)
        mixed = model(x, ["a", "b", "b", "a"])
    torch.testing.assert_close(mixed, torch.stack([expected["abba"[i]][i] for i in range(4)]))


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, pixels, mask=None, scale=1.0):
        y = self.layer(pixels)
        return (y if mask is None else y * mask) * scale


def test_further_inputs_go_to_the_network():
    model = taps.adapt(Inputs()).eval()
    for task in ("a", "b"):
        model.add_task(task, num_classes=2)
        for parameter in model.roles(task)["delta"].values():
            parameter.data.normal_()
    x, mask = torch.randn(4, 6), (torch.rand(4, 5) > 0.5).float()
    with torch.no_grad():
        expected = {task: model.heads[task](model.features(x, task) * mask * 2.0) for task in ("a", "b")}
        for task in ("a", "b"):
            torch.testing.assert_close(model(x, task=task, mask=mask, scale=2.0), expected[task])
            torch.testing.assert_close(model(pixels=x, task=task, mask=mask, scale=2.0), expected[task])
        torch.testing.assert_close(model.predict(x, mask=mask, scale=2.0), expected)
        torch.testing.assert_close(model(pixels=x, tasks=["a", "b"], mask=mask, scale=2.0), expected)
        names = ["b", "a", "a", "b"]
        mixed = model(x, names, mask=mask, scale=2.0)
        torch.testing.assert_close(mixed, torch.stack([expected[name][i] for i, name in enumerate(names)]))
    with pytest.raises(ValueError, match="without an input"):
        model(task="a")


@pytest.mark.parametrize("network", ["resnet", "vit", "torchvision_vit", "perceptron"])
def test_everything_works_in_inference_mode(network, tmp_path):
    model = make(network, "taps_follow").eval()
    for parameter in model.roles("a")["delta"].values():
        parameter.data.normal_(std=0.05)
    x = torch.randn(4, *NETWORKS[network].shape)
    with torch.no_grad():
        expected = {task: model(x, task) for task in ("a", "b")}
    predictor = model.predictor()
    model.save_task("a", tmp_path)
    with torch.inference_mode():
        inside = torch.randn(4, *NETWORKS[network].shape).copy_(x)
        for task in ("a", "b"):
            torch.testing.assert_close(model(inside, task), expected[task])
        for outputs in (
            model.predict(inside),
            predictor(inside),
            model(inside, tasks=["a", "b"]),
            model.predictor()(x),
        ):
            for task, output in outputs.items():
                torch.testing.assert_close(output, expected[task], rtol=1e-4, atol=1e-5)
        for name, output in zip("abab", model(inside, ["a", "b", "a", "b"]), strict=True):
            assert output.shape == expected[name].shape[1:]
        torch.testing.assert_close(model.merge("a")(inside), expected["a"], rtol=1e-4, atol=1e-5)
        name = model.load_task(tmp_path, name="c")
        torch.testing.assert_close(model(inside, name), expected["a"], rtol=0, atol=0)
        model.add_task("d", num_classes=2)
    model.train()(x, "d").sum().backward()


# -- batch size 1 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "method"), [("resnet", "taps_follow"), ("vit", "taps"), ("lite", "taps_budget")])
def test_a_loaded_task_sums_nothing_and_takes_no_more_memory(network, method, tmp_path, monkeypatch):
    model = make(network, method).eval()
    for parameter in model.roles("a")["delta"].values():
        parameter.data.normal_(std=0.05)
    for unit in model.units[::2]:
        unit.gates["a"].set(False)
    model.save_task("a", tmp_path)
    other = make(network, method, ())
    other.load_base(model.base_state())
    base_only = sum(tensor.nbytes for tensor in (*other.parameters(), *other.buffers()))
    other.eval().load_task(tmp_path)
    added = sum(tensor.nbytes for tensor in (*other.parameters(), *other.buffers())) - base_only
    assert added <= (tmp_path / "task.safetensors").stat().st_size + 2048
    monkeypatch.setattr("taps.core.unit.add_delta", lambda *_: pytest.fail("W + δ was computed"))
    x = torch.randn(1, *NETWORKS[network].shape)
    with torch.no_grad():
        y = other(x, "a")
        other.predict(x)
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(y, model(x, "a"))
    again = other.save_task("a", tmp_path / "again")
    assert (again / "task.safetensors").read_bytes() == (tmp_path / "task.safetensors").read_bytes()
    other.load_base({name: tensor * 2 if "conv" in name else tensor for name, tensor in model.base_state().items()})
    model.load_base(other.base_state())
    with torch.no_grad():
        assert torch.equal(other(x, "a"), model(x, "a")), "the sums follow the base"


# -- networks that do unusual things -------------------------------------------------------------------------------


def with_tasks(net: nn.Module, method: str = "finetune") -> taps.TaskModel:
    """A model with two tasks whose deltas and norms differ from the base."""
    model = taps.adapt(net, method)
    for task in ("a", "b"):
        model.add_task(task, 3)
        for parameter in model.parameters_of(task):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


class ScaleNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.gain * x / x.norm(dim=-1, keepdim=True)


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6))

    def bias(self):
        return self.table.tanh()


class Asked(nn.Module):
    """A module is asked for a value that depends on its parameters, as relative positions are in CoAtNet."""

    def __init__(self):
        super().__init__()
        self.layer, self.position = nn.Linear(4, 6), Bias()

    def forward(self, x):
        return self.layer(x) + self.position.bias()


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scales = nn.Linear(4, 6), nn.ParameterList([torch.ones(6), torch.zeros(6)])

    def forward(self, x):
        return self.layer(x) * self.scales[0] + self.scales[1]


class ByType(nn.Module):
    """A network that treats its children by their types, as many hand-written ones do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu() if isinstance(layer, nn.Linear) else 2 * layer(x)
        return x


class Normed(nn.Linear):
    """A layer that contains a norm."""

    def __init__(self):
        super().__init__(4, 6)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return super().forward(self.norm(x))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        x -= 1.0
        return self.layer(x)


@pytest.mark.parametrize(
    "net",
    [lambda: nn.Sequential(nn.Linear(4, 8), ScaleNorm(), nn.Linear(8, 6)), Asked, Listed, ByType, Normed, InPlace],
    ids=["scalar norm", "asked", "listed", "by type", "normed layer", "in place"],
)
def test_every_way_to_call_a_task_gives_the_same(net):
    model, x = with_tasks(net()), torch.randn(4, 4)
    alone = {task: model(x.clone(), task=task) for task in model.tasks}
    together, predictor = model.predict(x.clone()), model.predictor()(x.clone())
    mixed = model(x.clone(), task=["a", "b", "a", "b"])
    for index, task in enumerate(model.tasks):
        for found in (model.merge(task)(x.clone()), together[task], predictor[task]):
            torch.testing.assert_close(found, alone[task])
        torch.testing.assert_close(mixed[index::2], alone[task][index::2])
    model.train()
    model(x.clone(), task="a").square().sum().backward()
    lost = [n for own in model.roles("a").values() for n, parameter in own.items() if parameter.grad is None]
    assert not lost


def test_a_mixed_batch_depends_on_further_arguments():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x, centre=False):
            x = self.layer(x)
            return x - x.mean(0) if centre else x

    model, x = with_tasks(Centred()), torch.randn(4, 4)
    names = ["a", "a", "b", "b"]
    model(x, task=names)
    expected = torch.cat([model(x[:2], task="a", centre=True), model(x[2:], task="b", centre=True)])
    torch.testing.assert_close(model(x, task=names, centre=True), expected)


def test_an_unknown_task_never_runs_the_base():
    model, x = with_tasks(nn.Sequential(nn.Linear(4, 6))), torch.randn(2, 4)
    with pytest.raises(taps.UserError, match="typo"):
        model.features(x, task="typo")
    with pytest.raises(taps.UserError, match="typo"), model.using("typo"):
        pass


def test_a_counter_of_the_base_does_not_move():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 6)
            self.register_buffer("steps", torch.tensor(0))

        def forward(self, x):
            if self.training:
                self.steps += 1
            return self.layer(x)

    model = with_tasks(Counting())
    before = model.fingerprint()
    model.train()
    model(torch.randn(2, 4), task="a")
    assert model.fingerprint() == before


def test_a_refused_task_leaves_nothing():
    net = timm.create_model("test_resnet", pretrained=False, num_classes=7)
    with pytest.raises(taps.UserError, match="zzz"):
        taps.adapt(net, layers="zzz")
    assert net.num_classes == 7
    with pytest.warns(UserWarning, match="is dropped"):
        model = taps.adapt(net)
    names = set(model.state_dict())
    with pytest.raises(taps.UserError, match=r"head must be an nn\.Module, not function"):
        model.add_task("a", head=lambda x: x)
    with pytest.raises(RuntimeError):
        model.add_task("a", head=Refusing())
    assert set(model.state_dict()) == names
    assert not model.tasks


class Refusing(nn.Module):
    def to(self, *args, **kwargs):
        raise RuntimeError("not here")


class Caching(nn.Module):
    """A module that caches what it computes from a parameter in evaluation mode, as the attention of LeViT does."""

    def __init__(self):
        super().__init__()
        self.layer, self.biases, self.bias_cache = nn.Linear(4, 6), nn.Parameter(torch.zeros(6)), {}

    def forward(self, x):
        if "bias" not in self.bias_cache or self.training:
            self.bias_cache["bias"] = self.biases.tanh()
        return self.layer(x) + self.bias_cache["bias"]


def test_what_a_module_caches_belongs_to_one_task():
    model, x = with_tasks(nn.Sequential(Caching(), nn.Linear(6, 6))), torch.randn(2, 4)
    model.features(x)
    for task in ("a", "b", "a"):
        torch.testing.assert_close(model(x, task=task), model.merge(task)(x))


@pytest.mark.parametrize("kind", ["method", "partial"])
def test_a_forward_of_its_own_sees_the_tasks_weights(kind):
    from functools import partial
    from types import MethodType

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias).relu()

    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    net[0].forward = MethodType(forward, net[0]) if kind == "method" else partial(forward, net[0])
    model, x = taps.adapt(net, "finetune"), torch.randn(2, 4)
    model.add_task("a", 3)
    before = model(x, task="a")
    model(x, task="a").sum().backward()
    delta = model.units[0].deltas["a"]["weight"]
    assert delta.grad.abs().sum() > 0
    delta.data.add_(1.0)
    assert (model(x, task="a") - before).abs().max() > 1e-3


class Options(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, positive=False, negative=False):
        y = self.layer(x)
        return y.relu() if positive else -y if negative else y


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.last = Options(), nn.Linear(4, 6)

    def forward(self, x):
        return self.last(self.part(x, positive=True) + self.part(x, negative=True))


def test_calls_that_differ_in_names_of_arguments_are_different_calls():
    model, x = taps.adapt(CalledTwice(), "finetune", layers="last"), torch.randn(2, 4)
    for task in ("a", "b"):
        model.add_task(task, 3)
    model.eval()
    for task, output in model.predict(x).items():
        torch.testing.assert_close(output, model(x, task=task))


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_gradients_of_a_shared_pass_reach_each_tasks_own_norm(mode):
    model = taps.adapt(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6)), "norm_only")
    for task in ("a", "b"):
        model.add_task(task, 3)
    outputs = model.train(mode)(torch.randn(2, 4), tasks=["a", "b"])
    (outputs["a"].square().sum() + outputs["b"].square().sum()).backward()
    for task in ("a", "b"):
        assert model.task_norms[0].norms[task].weight.grad is not None


def test_norms_changed_behind_autograd_are_seen():
    model, x = (
        taps.adapt(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6)), "norm_only"),
        torch.randn(2, 4),
    )
    for task in ("a", "b"):
        model.add_task(task, 3)
    model.eval().predict(x)
    for parameter in model.task_norms[0].norms["a"].parameters():
        parameter.data.add_(0.5)
    for task, output in model.predict(x).items():
        torch.testing.assert_close(output, model(x, task=task))


def test_a_frozen_base_keeps_dropout_in_training():
    class Attention(nn.Module):
        """As in Swin: a table of positions beside a functional dropout."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 6)
            self.register_buffer("index", torch.arange(6))
            self.register_buffer("mask", torch.zeros(6), persistent=False)

        def forward(self, x):
            return nn.functional.dropout(self.layer(x)[:, self.index] + self.mask, 0.5, self.training)

    model = taps.adapt(nn.Sequential(Attention()))
    model.add_task("a", 3)
    x = torch.ones(1, 4)
    assert not torch.equal(model.train()(x, task="a"), model(x, task="a"))
    assert torch.equal(model.eval()(x, task="a"), model(x, task="a"))


def test_hooks_on_a_norm_are_called_for_tasks_too_until_they_are_removed():
    class Watch:
        def __init__(self):
            self.seen = []

        def hook(self, module, args, output):
            self.seen.append(output.detach())

    net, watch = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6)), Watch()
    handle = net[1].register_forward_hook(watch.hook)
    model = taps.adapt(net)
    model.add_task("a", 2)
    watch.seen.clear()
    model(torch.randn(2, 4), task="a")
    assert len(watch.seen) == 1
    handle.remove()
    model(torch.randn(2, 4), task="a")
    assert len(watch.seen) == 1


def test_a_gate_of_a_loaded_task_can_be_closed(tmp_path):
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    model = with_tasks(copy.deepcopy(net), "taps")
    for gate in model.gates("a"):
        gate.set(True)
    model.save_task("a", tmp_path / "a")
    other, x = taps.adapt(net, "taps").eval(), torch.randn(2, 4)
    other.load_task(tmp_path / "a")
    for gate in other.gates("a"):
        gate.set(False)
    torch.testing.assert_close(other.backbone(x), other.features(x, task="a"))


def test_a_part_without_gradients_is_no_checkpoint():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.stem, self.last = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 6)

        def forward(self, ids):
            with torch.no_grad():
                h = self.stem(self.embedding(ids).mean(1))
            return self.last(h)

    model = taps.adapt(Frozen(), "finetune")
    model.add_task("a", 3)
    model.train()(torch.randint(9, (2, 5)), task="a").square().sum().backward()
    unit = next(unit for unit in model.units if unit.name == "last")
    assert unit.deltas["a"]["weight"].grad.abs().sum() > 0


def test_norms_of_a_training_mixed_batch_see_each_task_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
    model = taps.adapt(net, "finetune", norm="task")
    for task in ("a", "b"):
        model.add_task(task, 3)
    shared = model.task_norms[0]
    shared.share([["a", "b"], []])
    shared.add_task("a", "b", always=True)
    x = torch.randn(6, 3, 8, 8)
    model.train()
    alone = torch.cat([model(x[:3], task="a"), model(x[3:], task="b")])
    torch.testing.assert_close(model(x, task=["a"] * 3 + ["b"] * 3), alone)


def test_tasks_can_be_added_while_another_thread_lists_them():
    from taps.core.modules import TaskDict

    tasks = TaskDict()
    tasks["a"], tasks["b"] = nn.Linear(1, 1), nn.Linear(1, 1)
    for task in tasks:
        tasks[f"{task}'"] = nn.Linear(1, 1)
        del tasks[task]
    assert list(tasks) == ["a'", "b'"]


def test_data_parallel_is_refused():
    model = with_tasks(nn.Sequential(nn.Linear(4, 6)))
    replica = model._replicate_for_data_parallel()
    with pytest.raises(taps.UserError, match="DistributedDataParallel"):
        replica(torch.randn(2, 4), task="a")


def test_options_may_be_numbers_of_numpy(tmp_path):
    import numpy as np

    model = taps.adapt(nn.Sequential(nn.Linear(4, 6)), threshold=np.float64(0.25))
    model.add_task("a", 3)
    model.save_task("a", tmp_path / "a")
    assert model.options["threshold"] == 0.25


def test_one_task_may_be_named_without_a_list(tmp_path):
    model, x = with_tasks(nn.Sequential(nn.Linear(4, 6))), torch.randn(2, 4)
    for found in (model.predict(x, tasks="a"), model(x, tasks="a"), model.predictor("a")(x)):
        torch.testing.assert_close(found["a"], model(x, task="a"))
    model.save_task("a", tmp_path / "a", about={"classes": ("x", "y", "z")})
    assert model.classes("a") == ["x", "y", "z"]


# -- networks and models as users change them ----------------------------------------------------------------------


class Cosine(nn.Linear):
    def forward(self, x):
        return 10 * nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


@pytest.mark.parametrize(
    "head", [lambda: Cosine(512, 3), lambda: nn.Linear(512, 3, bias=False)], ids=["own", "no bias"]
)
def test_merge_keeps_heads_that_are_no_plain_linear_layer(head):
    model = taps.adapt(taps.create_backbone("resnet18", pretrained=False)).eval()
    model.add_task("a", head=head())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.merge("a")(x), model.eval()(x, task="a"), rtol=0, atol=0)


def test_a_task_that_is_removed_in_a_call_does_not_become_the_base():
    model = with_tasks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    model.units[0].register_forward_hook(lambda *_: model.remove_task("a"))
    with pytest.raises(taps.UserError, match="task 'a' was removed while it ran"):
        model(torch.randn(2, 4), task="a")


def test_copies_keep_parametrised_layers_and_the_default_task():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 6))
    model = with_tasks(net)
    model.set_task("a")
    twin, x = copy.deepcopy(model), torch.randn(3, 4)
    torch.testing.assert_close(twin(x), model(x, task="a"), rtol=0, atol=0)
    assert [type(unit) for unit in twin.units] == [type(unit) for unit in model.units]
    assert (twin.report("a") == model.report("a"), twin.state.default) == (True, "a")


def test_a_classifier_that_was_dropped_before_is_no_reason_to_drop_another_layer():
    net = torchvision.models.mobilenet_v3_small()
    net.classifier[-1] = nn.Identity()
    assert taps.adapt(net).backbone.classifier[0].in_features == 576
    plain = timm.create_model("resnet10t")
    with pytest.raises(taps.UserError, match="matches none"):
        taps.adapt(plain, layers="^fc$")
    assert isinstance(plain.fc, nn.Linear)


class Listed(nn.Module):
    """A network that calls its layers through a list, a dictionary and a tuple of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.listed, self.named, self.pairs = [self.one], {"two": self.two}, (("three", self.three),)

    def forward(self, x):
        for layer in (*self.listed, *self.named.values(), *(layer for _, layer in self.pairs)):
            x = layer(x).relu()
        return x


def test_layers_held_in_plain_lists_see_the_tasks():
    net = Listed()
    model, x = with_tasks(copy.deepcopy(net)), torch.randn(3, 4)
    model.train()(x, task="a").sum().backward()
    assert all(unit.deltas["a"]["weight"].grad is not None for unit in model.units)
    torch.testing.assert_close(model.eval().merge("a")(x), model(x, task="a"), rtol=0, atol=0)
    torch.testing.assert_close(model.features(x), net(x), rtol=0, atol=0)


class Centred(nn.Module):
    """A network with a buffer of its own and functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        return nn.functional.dropout(self.layer(x - self.mean), 0.5, self.training)


def test_a_buffer_of_the_network_stays_and_dropout_works():
    model = with_tasks(Centred())
    for _ in range(2):
        features = model.train().features(torch.ones(64, 4), task="a")
        assert model.backbone.training
        assert features.std(0).min() > 0, "of equal samples"


def test_a_task_that_is_no_longer_trained_does_not_change_in_training_mode(tmp_path):
    model = make("resnet", "taps", ("a", "b"))
    model.save_task("a", tmp_path / "a")
    model.remove_task("a")
    model.load_task(tmp_path / "a")
    x = torch.randn(4, 3, 32, 32)
    before = model.eval()(x, task="a")
    torch.testing.assert_close(model.train()(x, task="a"), before, rtol=0, atol=0)
    torch.testing.assert_close(model.eval()(x, task="a"), before, rtol=0, atol=0)


def test_maps_and_networks_without_layers_ask_for_a_head():
    maps = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    for net in (maps, nn.Sequential(nn.Embedding(5, 3))):
        with pytest.raises(taps.UserError, match="give head= instead of num_classes"):
            taps.adapt(net, "finetune").add_task("a", num_classes=2)


def test_functional_calls_with_other_parameters():
    model, x = with_tasks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))).eval(), torch.randn(2, 4)
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    outputs = torch.func.functional_call(model, held, (x,), {"task": "a"})
    torch.testing.assert_close(outputs, model(x, task="a"), rtol=0, atol=0)


def test_hooks_in_a_backward_pass_read_attributes():
    model, seen = with_tasks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))), []
    for unit in model.units:
        unit.register_full_backward_hook(lambda unit, *_: seen.append((unit.in_features, unit.weight.shape)))
    model.train()(torch.randn(2, 4, requires_grad=True), task="a").sum().backward()
    assert seen == [(4, (4, 4))] * 2


def test_attributes_that_are_set_reach_the_layer_or_are_refused():
    model, x = make("resnet", "taps", ("a",)), torch.randn(2, 3, 32, 32)
    model.add_task("b", num_classes=2)
    first, norm = model.units[0], model.task_norms[0]
    before = first(x).shape[-1]
    first.stride = (1, 1)
    assert (first.stride, first(x).shape[-1]) == ((1, 1), 2 * before)
    norm.momentum = 0.01
    assert {norm.base.momentum, *(norm.norms[task].momentum for task in "ab")} == {0.01}
    with pytest.raises(taps.UserError, match=r"weight cannot be replaced in an adapted network"):
        first.weight = nn.Parameter(torch.zeros(1))


def test_an_empty_mixed_batch_is_one_line_and_spoils_no_later_one():
    model = with_tasks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    model.add_task("c", num_classes=2)
    with pytest.raises(taps.UserError, match="the batch is empty"):
        model(torch.randn(0, 4), task=[])
    assert len(model(torch.randn(2, 4), task=["a", "c"])) == 2


def test_a_penalty_is_of_the_models_method(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with_tasks(copy.deepcopy(net)).save_task("a", tmp_path / "a")
    model = taps.adapt(net)
    model.load_task(tmp_path / "a")
    with pytest.raises(taps.UserError, match="trained with method 'finetune', the model is for 'taps'"):
        model.penalty("a")


def test_a_matrix_is_not_a_norm_whatever_its_class_is_called():
    class NormalizedLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x):
            return nn.functional.linear(nn.functional.normalize(x), self.weight)

    model = taps.adapt(nn.Sequential(nn.Linear(4, 4), NormalizedLinear()))
    model.add_task("a", head=nn.Linear(6, 2))
    assert not model.task_norms
    assert not model.roles("a").get("norm")


def test_a_network_that_was_changed_is_not_rebuilt_from_its_name(tmp_path):
    changed = timm.create_model("resnet10t", global_pool="max", num_classes=0)
    other = taps.create_backbone("resnet10t", pretrained=False, act_layer=nn.SiLU)
    for number, net in enumerate((changed, other)):
        model = taps.adapt(net)
        model.add_task("a", num_classes=2)
        model.save_task("a", tmp_path / str(number))
        with pytest.raises(taps.UserError, match="give"):
            taps.load(tmp_path / str(number))
    usual = taps.adapt(timm.create_model("vit_tiny_patch16_224", num_classes=0, drop_path_rate=0.1))
    usual.add_task("a", num_classes=2)
    usual.save_task("a", tmp_path / "usual")
    with pytest.raises(taps.UserError, match=r"downloaded|made for another base"):  # known, with pretrained weights
        taps.load(tmp_path / "usual")


def test_options_that_a_network_does_not_take_are_named():
    with pytest.raises(taps.UserError, match="resnet10t cannot be made with the options img_size"):
        taps.create_backbone("resnet10t", pretrained=False, img_size=64)
    with pytest.raises(taps.UserError, match="leave num_classes out"):
        taps.create_backbone("resnet10t", pretrained=False, num_classes=3)


class ListedThenActivated(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()

    def forward(self, x):
        return self.act(super().forward(x))


def test_layers_in_lists_belong_to_each_task_in_passes_of_several():
    model, x = taps.adapt(ListedThenActivated(), "finetune"), torch.randn(3, 4)
    for task in "ab":
        model.add_task(task, num_classes=2)
    for parameter in model.roles("b")["delta"].values():
        parameter.data.normal_()
    expected = {task: model.eval()(x, task=task) for task in "ab"}
    program = torch.export.export(model.predictor(), (x,)).module()
    for outputs in (model(x, tasks=["a", "b"]), model.predict(x), model.predictor()(x), program(x)):
        torch.testing.assert_close(outputs, expected)


class Moving(nn.Module):
    """A network that moves its own buffer in training and divides by it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        y = self.layer(x)
        if self.training:
            self.scale.lerp_(y.detach().std(0), 0.1)
        return y / self.scale


def test_a_network_that_moves_its_buffer_learns_and_is_not_moved():
    for kind in ("task", "tasks"):
        model = with_tasks(Moving())
        before = model.fingerprint()
        for _ in range(2):
            given = {"task": "a"} if kind == "task" else {"tasks": ["a"]}
            outputs = model.train()(torch.randn(8, 4), **given)
            (outputs if kind == "task" else outputs["a"]).sum().backward()
        assert model.fingerprint() == before
        assert not model.backbone.training


def test_a_forward_may_be_set_on_a_wrapped_layer():
    model, x = with_tasks(nn.Sequential(nn.Linear(4, 4))).eval(), torch.randn(2, 4)
    unit, before = model.units[0], model(x, task="a")
    original = unit.forward
    unit.forward = lambda *args: 2 * original(*args)
    torch.testing.assert_close(unit(x), 2 * original(x))
    assert not torch.equal(model(x, task="a"), before)
