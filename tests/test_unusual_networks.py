"""Networks that call a layer twice, keep something from call to call, or hold their layers in unusual ways give the same outputs
by every route: one task, merged, several tasks in one pass, and exported."""

import copy
import pickle
from collections import OrderedDict, deque, namedtuple

import pytest
import torch
from torch import nn

import taps
from taps.core.modules import evaluating

Pair = namedtuple("Pair", "first second")


class Net(nn.Module):
    """Two layers of four; the task tunes the second one unless a test says otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


class OneActivation(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.b(self.act(self.a(self.act(x)))))


class Looped(Net):
    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.a(x))
        return self.b(x)


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.context = None, []

    def forward(self, x):
        return x * (self.gamma if self.gamma is not None else self.context[-1])


class ScaledByAttribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.film = Scaling()

    def forward(self, x):
        h = self.a(x)
        self.film.gamma = self.b(x)
        return self.film(h)


class ScaledByList(ScaledByAttribute):
    def forward(self, x):
        h = self.a(x)
        self.film.context.append(self.b(x))
        y = self.film(h)
        self.film.context.pop()
        return y


class Keeping(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        self.last = y.tanh()
        return y


class ReadsWhatALayerKept(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = Keeping(4, 4)

    def forward(self, x):
        return self.a(self.b(x)) + self.b.last


class OwnNames(Net):
    def __init__(self) -> None:
        super().__init__()
        self._module, self._view = nn.Linear(4, 4), 2.0

    def forward(self, x):
        return self.b(self._module(x) * self._view + self.a(x))


class AsksForInplace(Net):
    def forward(self, x):
        return self.b(self.a(x)) * (2 if getattr(self.a, "inplace", False) else 1)


class Registered(nn.Module):
    kinds: list = []

    def __init_subclass__(cls, *, name):
        Registered.kinds.append(name)


class OfARegistry(Registered, name="one"):
    def forward(self, x):
        return x + 1


class HasARegistry(Net):
    def __init__(self) -> None:
        super().__init__()
        self.plus = OfARegistry()

    def forward(self, x):
        return self.b(self.plus(self.a(x)))


class Held(Net):
    """Layers that are called through a plain attribute with a private name."""

    def __init__(self, hold) -> None:
        super().__init__()
        self._held = hold(self)

    def forward(self, x):
        for layer in self._held.values() if isinstance(self._held, dict) else self._held:
            x = layer(x)
        return x


class Runner(nn.Module):
    """Runs layers that another module has."""

    def __init__(self, layers) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class HasARunner(Net):
    def __init__(self) -> None:
        super().__init__()
        self._modules = {"runner": Runner([self.a, self.b]), **self._modules}

    def forward(self, x):
        return self.runner(x)


class LooksUp(Net):
    """Finds its layers in a set and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.doubled = {self.a: 3.0}, {self.b}
        self.itself = {"self": self}

    def forward(self, x):
        for layer in (self.a, self.b):
            x = layer(x) * (self.scale.get(layer, 1.0) + (layer in self.doubled))
        return x


class WideKeeping(nn.Linear):
    def forward(self, x):
        self.rows = len(x)
        return super().forward(x)


class ReadsTheLastSize(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = WideKeeping(4, 4)

    def forward(self, x):
        return self.b(self.a(x)) * self.b.rows


HELD = {
    "list": lambda net: [net.a, net.b],
    "ordered": lambda net: OrderedDict(one=net.a, two=net.b),
    "named": lambda net: Pair(net.a, net.b),
    "deque": lambda net: deque([net.a, net.b]),
    "methods": lambda net: [net.a.forward, net.b.__call__],
}
KINDS = (
    OneActivation,
    Looped,
    ScaledByAttribute,
    ScaledByList,
    ReadsWhatALayerKept,
    OwnNames,
    AsksForInplace,
    HasARegistry,
    HasARunner,
    LooksUp,
)
MAKE = {
    **{kind.__name__: kind for kind in KINDS},
    **{name: lambda hold=hold: Held(hold) for name, hold in HELD.items()},
}


def adapted(net: nn.Module, norm: str = "follow") -> taps.TaskModel:
    model = taps.adapt(net, norm=norm)
    for task in "ab":
        model.add_task(task, num_classes=3)
        for unit in model.units:
            unit.gates[task].set(unit.name == "b")
            for delta in unit.deltas[task].parameters():
                nn.init.normal_(delta, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", MAKE)
def test_every_route_gives_the_same_outputs(name):
    torch.manual_seed(0)
    model, x = adapted(MAKE[name]()), torch.randn(4, 4)
    with torch.no_grad():
        expected = {task: model(x, task) for task in "ab"}
        plain = {task: model.merge(task)(x) for task in "ab"}
        base = model.features(x)
        program = model.predictor()
        routes = {
            "merged": plain,
            "predict": model.predict(x),
            "tasks": model(x, tasks=["a", "b"]),
            "program": program(x),
        }
        mixed = model(x, task=["a", "b", "a", "b"])
    assert not torch.equal(model.features(x, "a"), base), "the delta has an effect"
    for route, outputs in routes.items():
        for task in "ab":
            torch.testing.assert_close(outputs[task], expected[task], msg=lambda text, route=route: f"{route}: {text}")
    torch.testing.assert_close(mixed, torch.stack([expected[task][i] for i, task in enumerate("abab")]))
    if name not in (
        "ScaledByAttribute",
        "ScaledByList",
        "ReadsWhatALayerKept",
    ):  # which torch.export refuses or warns of
        exported = torch.export.export(program, (x,)).module()(x)
        for task in "ab":
            torch.testing.assert_close(exported[task], expected[task])
    assert Registered.kinds == ["one"]


def test_what_a_layer_keeps_is_of_its_last_call(tmp_path):
    torch.manual_seed(0)
    model = adapted(ReadsTheLastSize())
    model.save_task("a", tmp_path / "a")
    model.remove_task("a")
    model.load_task(tmp_path / "a")
    with torch.no_grad():
        small, large = torch.randn(2, 4), torch.randn(5, 4)
        expected = [model.merge("a")(x) for x in (small, large, small)]
        for x, want in zip((small, large, small), expected, strict=True):
            torch.testing.assert_close(model(x, "a"), want)
        other = copy.deepcopy(model)
        other(large, "a")
        assert model.backbone.b.rows == 2, "a copy keeps what is its own"
    assert pickle.loads(pickle.dumps(model)).tasks == ["b", "a"]


def test_evaluation_mode_inside_of_evaluation_mode():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = taps.adapt(net, norm="task")
    model.add_task("a", num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with evaluating(model):
        model.train()
        model.predict(torch.randn(6, 4))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_random_layers_draw_anew_for_each_call():
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            h = self.b(x)
            self.gap = (self.drop(h) - self.drop(h)).detach().abs().sum()
            return h

    model = adapted(Twice()).train()
    model(torch.randn(8, 4), tasks=["a", "b"])
    assert model.backbone.gap > 0


def test_a_stopped_gradient_stays_stopped():
    class Stopped(Net):
        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h) + 2 * self.b(h.detach())

    torch.manual_seed(0)
    model = taps.adapt(Stopped(), "hard_sharing", train_base=True)
    for task in "ab":
        model.add_task(task, num_classes=2)
    x, gradients = torch.randn(5, 4), []
    for together in (True, False):
        model.zero_grad()
        outputs = model(x, tasks=["a", "b"]) if together else {task: model(x, task) for task in "ab"}
        sum(output.sum() for output in outputs.values()).backward()
        gradients.append([p.grad.clone() for p in model.backbone.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_classifier_of_timm_is_not_made():
    class TwoHeads(Net):
        num_classes, num_features = 0, 4

        def reset_classifier(self, classes):
            self.num_classes = classes
            self.head = nn.Linear(4, classes) if classes else nn.Identity()
            self.other = nn.Linear(4, classes) if classes else None

        def get_classifier(self):
            return self.head

        def forward(self, x):
            x = self.b(self.a(x))
            return self.head(x) + self.other(x) if self.num_classes else x

    net = TwoHeads()
    net.reset_classifier(0)
    model, x = adapted(net), torch.randn(2, 4)
    state = torch.get_rng_state()
    plain = model.merge("a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(plain(x), model(x, "a"))


def test_other_inputs_than_samples_are_left_whole():
    class Masked(Net):
        def forward(self, x, mask):
            return self.b(mask.to(x.dtype) @ self.a(x)).mean(1)

    torch.manual_seed(0)
    model, mask = adapted(Masked()), torch.ones(5, 5).triu()
    x = torch.randn(2, 5, 4)
    mixed = model(x, task=["b", "a"], mask=mask)
    torch.testing.assert_close(mixed, torch.stack([model(x, "b", mask=mask)[0], model(x, "a", mask=mask)[1]]))


def test_inputs_may_all_be_named():
    class Named(Net):
        def forward(self, *, pixels):
            return self.b(self.a(pixels["x"]))

    model = adapted(Named())
    given = {"x": torch.randn(4, 4)}
    alone = {task: model(pixels=given, task=task) for task in "ab"}
    assert torch.equal(model.heads["a"](model.features(pixels=given, task="a")), alone["a"])
    assert model.predict_cost(pixels=given)["macs"] > 0
    torch.testing.assert_close(model.predictor()(pixels=given)["b"], alone["b"])
    assert model(pixels=given, task=["a", "b", "a", "b"]).shape == (4, 3)


def test_a_task_that_is_replaced_while_it_runs_is_an_error():
    model = adapted(Looped())
    handle = model.backbone.b.register_forward_hook(lambda *_: model.remove_task("a"))
    with pytest.raises(taps.UserError, match="removed"):
        model(torch.randn(2, 4), "a")
    handle.remove()
    assert model.tasks == ["b"]
    with pytest.raises(taps.UserError, match="at least one task"):
        model.predictor([])
    with pytest.raises(taps.UserError, match="not both"):
        model(torch.randn(2, 4), task="b", tasks=["b"])


def test_scores_keep_their_precision_and_loaded_tasks_follow_a_state_dict():
    model, x = adapted(Looped()), torch.randn(2, 4)
    for gate in model.gates("a"):
        gate.score.data.fill_(0.09998)  # rounds to 0.1 in half precision
    before = [row["specific"] for row in model.report("a")]
    model.to(torch.bfloat16)
    assert [row["specific"] for row in model.report("a")] == before == [0.0, 0.0]
    model.float()
    for place in (*model.units, *model.task_norms):
        place.settle("b")
    state = dict(model.state_dict())
    state.update({name: torch.zeros_like(value) for name, value in state.items() if name.endswith("score")})
    model.load_state_dict(state)
    torch.testing.assert_close(model(x, "b"), model.merge("b")(x))


def test_predict_evaluates_whatever_part_is_in_training_mode():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    model = taps.adapt(net, norm="task")
    model.add_task("a", num_classes=2)
    model.eval().backbone.train()
    x = torch.randn(6, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(model.predict(x)["a"], model.predict(x)["a"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.backbone.training
