"""A new method in a single file works in Python, in training, in policy learning and in the commands."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import taps
from taps.methods.registry import METHODS
from taps.training.recipe import Recipe

FILE = '''
"""Lucky numbers: a task owns the layers whose gate has drawn one, and shares the rest."""

import torch
from torch import nn

import taps
from taps.core.method import fixed_gate


class LuckyGate(taps.Gate):
    def __init__(self, bias):
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(float(bias)))

    def relax(self, x, state):
        return taps.Decision(specific=self.logit.sigmoid())

    def decide(self, x=None):
        return taps.Decision(specific=float(self.logit > 0))

    @property
    def probabilities(self):
        p = self.logit.sigmoid()
        return torch.stack([1 - p, p, p * 0])


def lucky_gate(unit, bias):
    return LuckyGate(bias)


def luck(gates, task, bias):
    logits = [gate.logit for gate in gates[task] if isinstance(gate, LuckyGate)]
    return torch.stack(logits).square().mean() if logits else torch.zeros(())


def close_first(model, task):
    """When the last phase begins the first unit is shared."""
    model.units[0].gates[task].logit.data.fill_(-1.0)
    return ()


def learn_then_close(model, lengths):
    return (
        taps.Phase("luck", lengths.epochs - 1),
        taps.Phase("close", 1, penalty=0.0, trains=("delta", "norm", "head"), begin=close_first),
    )


taps.METHODS["lucky"] = taps.Method(
    "layers are drawn", "a test", lucky_gate, penalty=luck, phases=learn_then_close, options={"bias": 1.0}
)
taps.METHODS["lucky_policy"] = taps.Method(
    "layers are drawn by a policy", "a test", lucky_gate, penalty=luck, options={"bias": 0.1}, trains_base=True,
    learns_policy=True, policy_gate=fixed_gate,
)
'''


@pytest.fixture
def registered(tmp_path, monkeypatch):
    assert len(FILE.strip().splitlines()) <= 60
    (tmp_path / "lucky.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    importlib.invalidate_caches()
    importlib.import_module("lucky")
    yield
    import sys

    sys.modules.pop("lucky", None)
    for name in ("lucky", "lucky_policy"):
        METHODS.pop(name, None)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6))


def test_it_adapts_trains_saves_and_merges(registered, tmp_path):
    from test_train import run

    model = taps.adapt(small(), "lucky", bias=2.0)
    model.add_task("a", num_classes=3)
    model, rows = run(None, Recipe(epochs=3, lr=0.1, lam=0.01), model)
    assert [row["phase"] for row in rows] == ["luck", "luck", "close"]
    assert [row["specific"] for row in model.report("a")] == [0.0, 1.0]
    model.eval().save_task("a", tmp_path / "task")
    other = taps.adapt(small(), "lucky", bias=2.0).eval()
    other.load_base(model.base_state())
    other.load_task(tmp_path / "task")
    x = torch.randn(4, 5)
    assert torch.equal(other(x, "a"), model(x, "a"))
    torch.testing.assert_close(model.merge("a")(x), model(x, "a"))


def test_its_policy_is_learned(registered):
    x, y = torch.randn(24, 5), torch.randint(0, 3, (24,))

    def samples(batch):
        inputs, labels = zip(*batch, strict=True)
        return torch.stack(inputs), {"a": torch.stack(labels), "b": torch.stack(labels)}

    loader = DataLoader(TensorDataset(x, y), 6, collate_fn=samples)
    trainer = taps.PolicyTrainer(
        small(),
        {task: nn.Linear(6, 3) for task in "ab"},
        {"train": loader, "val": loader},
        dict.fromkeys("ab", nn.functional.cross_entropy),
        method="lucky_policy",
        bias=3.0,
        curriculum_speed=0,
        weight_iterations=1,
        policy_iterations=1,
    )
    trainer.pre_train(2)
    policy = trainer.learn_policy(4)
    assert policy.specific["a"] == (1.0, 1.0)
    network = trainer.post_train(policy, 2)
    assert network.predictor()(x)["b"].shape == (24, 3)


def test_the_commands_take_it(registered, tree, here):
    from conftest import SMALL

    more = ("--dataset", tree / "paint", *SMALL, "--epochs", 2, "--experiment_name", "new")
    done = here("train_sequential.py", *more, "--method", "lucky")
    assert "method lucky" in done.stdout
    assert "lucky: layers are drawn" in " ".join(here("train_sequential.py", "--help").stdout.split())
    wrong = here("train_sequential.py", *more, "--method", "lucky_policy", check=2)
    assert "use train_mtl.py" in wrong.stderr
    typo = here("train_sequential.py", "--method", "lucki", check=2)
    assert len(typo.stderr.splitlines()) == 1


def test_mistakes_are_named():
    row = taps.Method("none", "a test", lambda unit: taps.ConstantGate(), phases=lambda model, lengths: ())
    with pytest.raises(ValueError, match="a method 'taps' is registered already"):
        METHODS["taps"] = row
    METHODS["empty"] = row
    try:
        model = taps.adapt(small(), "empty")
        with pytest.raises(ValueError, match="method 'empty' has a schedule without phases"):
            Recipe().phases(model)
    finally:
        del METHODS["empty"]
    with pytest.raises(ValueError, match="unknown method 'tabs'; did you mean 'taps'"):
        taps.adapt(small(), "tabs")


def test_a_budget_is_kept_in_python_too(tmp_path):
    from test_train import run

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 6))
    model = taps.adapt(net, "taps_budget")
    model.add_task("a", num_classes=3)
    run(None, Recipe(epochs=6, lr=0.1, budget="10%"), model)
    folder = model.save_task("a", tmp_path, compact=True)
    assert (folder / "task.safetensors").stat().st_size <= 0.1 * 4 * model.base_parameters


def test_summaries_are_read_from_the_source_however_they_are_given(tmp_path, monkeypatch):
    from taps.methods import registry

    (tmp_path / "one.py").write_text('\nregister("named", Method(summary="by name", gate=None))\n')
    (tmp_path / "two.py").write_text('\nregister("placed", Method("by place", "a test", None))\n')
    monkeypatch.setattr(registry, "_FOLDER", tmp_path)
    assert registry._read() == {"named": "by name", "placed": "by place"}
