"""The training loop: averaging, flushing, resuming, phases, budgets, and losses that are not finite."""

import copy
import math
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from cases import NETWORKS
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

import taps
from taps.core.method import SETTLED, Method, Phase
from taps.core.modules import evaluating
from taps.data.classification.images import EpochSampler
from taps.errors import DivergedError
from taps.methods import taps_budget
from taps.methods.baselines import always_own
from taps.methods.registry import METHODS
from taps.methods.taps_budget import allocate, check_size, keep_within, min_bytes, parse_budget, round_within, store
from taps.stop_signals import Interrupted, StopSignals
from taps.storage import checkpoint, task_file
from taps.storage.encoding import encode_as, error_of, rounding_of
from taps.storage.run_folder import RunFolder
from taps.training import loop, split_optimizer
from taps.training.loop import run_phases
from taps.training.recipe import Recipe, make_optimizer
from taps.training.split_optimizer import FACTOR, LAYERWISE, TRUST, SplitOptimizer


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True, rng_types=[])


class Points(torch.utils.data.Dataset):
    """Labelled points, indexed by (index, epoch) as the sampler does."""

    def __init__(self, count: int = 22) -> None:
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(count, 5, generator=generator)
        self.y = (self.x[:, 0] > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, key):
        return self.x[key[0]], self.y[key[0]]


def loader(batch_size: int = 4, count: int = 22):
    data = Points(count)
    sampler = EpochSampler(len(data), seed=0, shuffle=True)
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    return DataLoader(data, batch_sampler=batches, generator=torch.Generator()), sampler


def perceptron(method: str = "taps", dropout: float = 0.0, **options) -> taps.TaskModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 8))
    model = taps.adapt(net, method, **options)
    model.add_task("a", num_classes=2)
    return model


def run(accelerator, recipe: Recipe, model=None, batch_size: int = 4, **options):
    model = model or perceptron()
    batches, sampler = loader(batch_size)
    rows = []
    run_phases(
        model, "a", batches, sampler, recipe, accelerator, on_epoch=lambda new, best: rows.extend(new), **options
    )
    return model, [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same(a, b, **tolerance) -> bool:
    b = b.task_state("a")
    return all(torch.allclose(tensor, b[name], **tolerance) for name, tensor in a.task_state("a").items())


def test_accumulation_is_the_large_batch(accelerator):
    """Gradients are averaged over images, and the remaining batches of an epoch form a separate step."""
    recipe = {"epochs": 3, "warmup_epochs": 1, "lr": 0.1}
    small, _ = run(accelerator, Recipe(accumulate=4, **recipe), batch_size=4)  # windows of 16 and 6 images
    large, _ = run(accelerator, Recipe(**recipe), batch_size=16)
    assert same(small, large, atol=1e-6)
    other, _ = run(accelerator, Recipe(accumulate=2, **recipe), batch_size=4)
    assert not same(small, other, atol=1e-4)


def test_summed_gradients_are_the_mean_s_at_a_rate_that_many_times_larger(accelerator):
    recipe = {"epochs": 3, "warmup_epochs": 1, "accumulate": 11}
    summed, _ = run(accelerator, Recipe(gradients="sum", lr=0.01, **recipe), batch_size=2)
    mean, _ = run(accelerator, Recipe(lr=0.11, **recipe), batch_size=2)
    assert same(summed, mean, atol=1e-6)
    assert not same(summed, run(accelerator, Recipe(lr=0.01, **recipe), batch_size=2)[0], atol=1e-4)


def test_the_average_of_weights_is_validated_and_kept(accelerator):
    """Against the average computed by hand from the weights after each step; gates are not averaged."""
    recipe = {"epochs": 2, "warmup_epochs": 1, "lr": 0.2, "lam": 1.0}
    model, decay, kept = perceptron(), 0.8, []
    average = {name: tensor.clone() for name, tensor in model.task_state("a").items()}
    steps = []
    real = torch.optim.SGD.step

    def step(optimizer, *arguments):
        found = real(optimizer, *arguments)
        steps.append(None)
        for name, tensor in model.task_state("a").items():
            average[name].lerp_(tensor, 0.2) if ".gates." not in name else average[name].copy_(tensor)
        return found

    def validate():
        kept.append({name: tensor.clone() for name, tensor in model.task_state("a").items()})
        for name, tensor in model.task_state("a").items():
            torch.testing.assert_close(tensor, average[name], atol=1e-6, rtol=1e-5, msg=name)
        return {"a": {}}, 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        run(accelerator, Recipe(ema_decay=decay, **recipe), model, validate=validate)
    assert len(kept) == 2
    assert len(steps) == 12
    plain, _ = run(accelerator, Recipe(**recipe))
    assert same(model, plain)  # training itself goes on with the weights


def test_the_average_continues_where_it_stopped(accelerator, tmp_path):
    recipe, found = Recipe(epochs=4, warmup_epochs=1, lr=0.2, ema_decay=0.9), []

    def remember(model):
        return lambda: (found.append([tensor.clone() for tensor in model.task_state("a").values()]), ({"a": {}}, 0.0))[
            1
        ]

    whole = perceptron()
    run(accelerator, recipe, whole, validate=remember(whole))
    expected = found[-1]
    again = perceptron()
    stopped = []

    def stop():
        stopped.append(None)
        if len(stopped) == 2:
            raise KeyboardInterrupt
        return {"a": {}}, 0.0

    with pytest.raises(KeyboardInterrupt):
        run(accelerator, recipe, perceptron(), validate=stop, folder=RunFolder(tmp_path))
    run(accelerator, recipe, again, validate=remember(again), folder=RunFolder(tmp_path))
    assert all(torch.equal(one, two) for one, two in zip(found[-1], expected, strict=True))
    model = perceptron("taps_budget", norm="task")
    with pytest.raises(taps.UserError, match="ema_decay cannot be combined"):
        run(accelerator, Recipe(epochs=3, ema_decay=0.9, budget=with_room(model, 100)), model)


def test_a_batch_norm_that_sees_one_value_is_one_line(accelerator):
    net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    model = taps.adapt(net)
    model.add_task("a", num_classes=2)
    with pytest.raises(
        taps.UserError, match=r"a batch norm sees one value per channel: batches of 1 .* larger --batch_size"
    ):
        run(accelerator, Recipe(epochs=1), model, batch_size=1)


def test_it_learns_and_reports(accelerator):
    model, rows = run(accelerator, Recipe(epochs=6, warmup_epochs=2, lr=0.2, lam=0.1))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["phase"] for row in rows] == ["warm-up"] * 2 + ["train"] * 2 + ["settle"] * 2
    assert rows[0]["train_loss"] > rows[1]["train_loss"]
    assert rows[-1]["train_error"] < 25
    assert rows[-1]["lr"] > 0
    assert len(rows[0]["scores"]) == 2
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing leaks into the next run"


def test_losses_that_are_read_late_change_nothing(accelerator, tmp_path, monkeypatch):
    """On a GPU no step waits for its loss: sums stay on the device, and a lost loss is noticed at the latest by the epoch's end."""
    recipe = Recipe(epochs=3, warmup_epochs=1, lr=0.05)
    model, rows = run(accelerator, recipe)
    monkeypatch.setattr("taps.training.loop.DEFERS_LOSS_READS", True)
    late, late_rows = run(accelerator, recipe)
    assert same(model, late, atol=0, rtol=0)
    assert rows == late_rows
    folder, seen = RunFolder(tmp_path), []

    def criterion(output, labels):
        seen.append(1)
        loss = nn.functional.cross_entropy(output, labels)
        return loss * float("nan") if len(seen) == 9 else loss

    with pytest.raises(DivergedError, match=r"the loss is nan at epoch 2, batch 6 of 6; .*kept"):
        run(accelerator, Recipe(epochs=3), criterion=criterion, folder=folder)
    assert checkpoint.read(folder.state_path).record["progress"]["epoch"] == 1


def test_gates_read_together_decide_as_alone():
    model = taps.adapt(nn.Sequential(*(nn.Linear(3, 3) for _ in range(5))))
    model.add_task("a", num_classes=2)
    gates = model.gates("a")
    for value, gate in zip((0.3, 0.05, 0.1, -1.0, 0.15), gates, strict=True):
        gate.score.data.fill_(value)
    type(gates[0]).read_together(gates)
    assert [gate.decide().specific for gate in gates] == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_larger_lambda_tunes_fewer_layers(accelerator):
    tuned = [run(accelerator, Recipe(epochs=6, warmup_epochs=1, lr=0.05, lam=lam))[1][-1] for lam in (0, 5)]
    assert tuned[0]["tuned_layers"] == 1.0
    assert tuned[1]["tuned_layers"] < 1.0


@pytest.mark.parametrize("stop_after", [3, 6, 8])
@pytest.mark.parametrize("optimizer", ["sgd", "nag", "adam", "adamw"])
def test_stopped_and_resumed_is_never_stopped(accelerator, tmp_path, stop_after, optimizer):
    """Results are bit-identical for stops in the middle or at the end of an epoch, including dropout and momentum."""
    recipe = Recipe(epochs=3, warmup_epochs=0.5, settle_epochs=1, lr=0.05, optimizer=optimizer)
    whole, rows = run(accelerator, recipe, perceptron(dropout=0.4))

    stop = StopSignals()
    model, steps = perceptron(dropout=0.4), []

    def criterion(output, labels):
        steps.append(1)
        if len(steps) == stop_after:
            stop.received = signal.SIGTERM
        return nn.functional.cross_entropy(output, labels)

    folder = RunFolder(tmp_path)
    with pytest.raises(Interrupted) as stopped:
        run(accelerator, recipe, model, criterion=criterion, folder=folder, stop=stop)
    assert stopped.value.status == 143
    assert len(steps) == stop_after
    torch.rand(3)
    resumed, later = run(accelerator, recipe, perceptron(dropout=0.4), folder=folder)
    assert same(whole, resumed, atol=0, rtol=0)
    for row, expected in zip(later, rows[-len(later) :], strict=True):
        assert row == expected


def test_a_checkpoint_of_another_run_is_refused(accelerator, tmp_path):
    folder = RunFolder(tmp_path)
    run(accelerator, Recipe(epochs=1), folder=folder)
    other = taps.adapt(nn.Sequential(nn.Linear(5, 9)))
    other.add_task("a", num_classes=2)
    with pytest.raises(ValueError, match="belongs to another base"):
        run(accelerator, Recipe(epochs=1), other, folder=folder)
    folder.state_path.write_bytes(folder.state_path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"checkpoint .* is damaged"):
        run(accelerator, Recipe(epochs=1), folder=folder)


def test_a_run_always_ends_with_a_task(accelerator):
    """This holds even if the last phase is shorter than a step."""
    kept = []
    recipe = Recipe(epochs=2, warmup_epochs=1.95, accumulate=8, lr=0.1)
    batches, sampler = loader()
    run_phases(
        perceptron("taps", norm="task"),
        "a",
        batches,
        sampler,
        recipe,
        accelerator,
        validate=lambda: ({"a": {"val_error": 50.0}}, 50.0),
        on_epoch=lambda r, b: kept.append(b),
    )
    assert kept == [False, True]
    recipe = Recipe(epochs=1, accumulate=8, lr=0.1, budget=with_room(perceptron("taps_budget", norm="task"), 100))
    model, rows = run(
        accelerator, recipe, perceptron("taps_budget", norm="task")
    )  # one step: nothing was learned that would be worth its bytes
    assert rows[-1]["phase"] == "round"
    assert sum(row["specific"] for row in model.report("a")) == 0


def test_weights_that_are_lost_in_the_last_step_do_not_replace_the_checkpoint(accelerator, tmp_path):
    folder, model = RunFolder(tmp_path), perceptron()

    def lose(rows, best):
        if rows[0]["epoch"] == 2:
            model.heads["a"].weight.data[0, 0] = float("inf")

    batches, sampler = loader()
    with pytest.raises(DivergedError, match="no longer finite in epoch 2; the last good state is kept"):
        run_phases(model, "a", batches, sampler, Recipe(epochs=3), accelerator, on_epoch=lose, folder=folder)
    assert checkpoint.read(folder.state_path).record["progress"]["epoch"] == 1


def test_a_lost_loss_stops_and_keeps_the_last_checkpoint(accelerator, tmp_path):
    folder, seen = RunFolder(tmp_path), []

    def criterion(output, labels):
        seen.append(1)
        loss = nn.functional.cross_entropy(output, labels)
        return loss * float("nan") if len(seen) == 9 else loss  # six batches an epoch

    model = perceptron()
    with pytest.raises(DivergedError, match=r"task a: the loss is nan at epoch 2, batch 2 of 6; .*kept.*lower --lr"):
        run(accelerator, Recipe(epochs=3), model, criterion=criterion, folder=folder)
    before = folder.state_path.read_bytes()
    reference = perceptron()
    run(accelerator, Recipe(epochs=1, warmup_epochs=2, lr=0.01), reference)
    assert checkpoint.read(folder.state_path).record["progress"]["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in model.task_state("a").values())
    assert folder.state_path.read_bytes() == before


def test_phases_are_data(accelerator, monkeypatch):
    """A row with its own phases trains first only the head, then everything."""

    def phases(model, lengths):
        return (Phase("head first", 1, trains=("head",)), Phase("all", lengths.epochs - 1))

    monkeypatch.setitem(METHODS, "staged", Method("head first", "a test", gate=always_own, phases=phases))
    model = perceptron("staged")
    run(accelerator, Recipe(epochs=1), model)
    assert all(not delta.any() for delta in model.roles("a")["delta"].values())
    _, rows = run(accelerator, Recipe(epochs=2, lr=0.1), model)
    assert [row["phase"] for row in rows] == ["head first", "all"]
    assert all(delta.any() for delta in model.roles("a")["delta"].values())


def test_settled_gates_stand_still(accelerator):
    model = perceptron(score_init=0.3)
    _, rows = run(accelerator, Recipe(epochs=4, warmup_epochs=1, settle_epochs=2, lr=0.05), model)
    assert rows[1]["scores"] != rows[0]["scores"]
    assert rows[3]["scores"] == rows[2]["scores"] == rows[1]["scores"]
    assert all(parameter.requires_grad for role in model.roles("a").values() for parameter in role.values())
    assert "gate" in model.roles("a")


@pytest.mark.parametrize(
    ("text", "expected"), [("600KB", 600_000), ("2 MiB", 2 * 1024**2), ("5%", 42), ("77B", 77), ("770", 770)]
)
def test_budget_texts(text, expected):
    model = perceptron()
    assert model.base_parameters == 264
    assert parse_budget(text, model) == (int(0.05 * 264 * 4) if "%" in text else expected)


@pytest.mark.parametrize("text", ["5 apples", "0%", "101%", "-3MB", ""])
def test_wrong_budgets(text):
    with pytest.raises(ValueError, match="budget"):
        parse_budget(text, perceptron())


def with_room(model, room):
    """Return a budget that leaves ``room`` bytes for deltas, if norms and head are stored as coarsely as possible."""
    return min_bytes(model, "a") + 4 * taps_budget._ENTRY + room


@pytest.fixture
def coarse_heads(monkeypatch):
    monkeypatch.setattr(taps_budget, "_PART", 0.0)


@pytest.mark.parametrize("norm", ["task", "follow"])
def test_a_budget_is_kept_and_well_used(tmp_path, norm):
    """Files are at or just below the budget, more bytes keep more, and the model holds the values that its file restores."""

    def network():
        torch.manual_seed(0)
        model = taps.adapt(NETWORKS["resnet"].make(), norm=norm)
        model.add_task("a", num_classes=5)
        for index, unit in enumerate(model.units):
            unit.deltas["a"]["weight"].data.normal_(std=0.01 * (1 + index % 7))
        return model

    def deltas(model):
        return {unit.name: unit.effective_parameters("a", unit.gates["a"].decide()) for unit in model.units}

    trained = network()
    smallest_size, full = min_bytes(trained, "a"), {u.name: u.deltas["a"]["weight"].detach() for u in trained.units}
    most = smallest_size + sum(4 * unit.size for unit in trained.units)
    errors = {taps_budget._motion: [], taps_budget._noise: []}
    for budget in (smallest_size, 15_000, 50_000, 200_000, 600_000, 1_800_000):
        model = network()
        open_units = keep_within(model, "a", budget)
        kept = round_within(model, "a", budget)
        assert len(open_units) - 1 <= len(kept) <= len(open_units)  # nothing has moved in between
        assert set(kept) <= set(open_units)
        store(model, "a", budget)
        path = model.save_task("a", tmp_path / str(budget), compact=True) / "task.safetensors"
        size = path.stat().st_size
        assert 0.985 * min(budget, most) - 1_000 <= size <= budget
        assert [row["name"] for row in model.report("a") if row["specific"]] == kept
        loaded = network()
        loaded.remove_task("a")
        loaded.load_task(tmp_path / str(budget))
        for name, values in deltas(model).items():
            assert all(torch.equal(value, deltas(loaded)[name][key]) for key, value in values.items())
        loaded.save_task("a", tmp_path / "again", compact=True)
        assert (tmp_path / "again/task.safetensors").read_bytes() == path.read_bytes()
        left = {u.name: u.deltas["a"]["weight"].detach() * float(u.name in kept) - full[u.name] for u in model.units}
        for scale, found in errors.items():
            found.append(sum(float(left[u.name].square().sum()) / scale(u, "a") for u in trained.units))
    for found in errors.values():
        assert found[-1] == 0.0 < found[-2]
        assert found == sorted(found, reverse=True)
    with pytest.raises(ValueError, match=rf"too small; the smallest file takes {smallest_size:,}"):
        check_size(network(), "a", smallest_size - 1)


def test_bytes_go_where_they_keep_most(coarse_heads):
    """Compared with brute force over all ways to store two layers within a size, the remaining error is nearly minimal."""
    from itertools import product

    model = perceptron()
    model.units[0].base.weight.data.mul_(30)  # so that noise and motion are different measures
    for unit, size in zip(model.units, (0.3, 0.01), strict=True):
        for parameter in unit.deltas["a"].parameters():
            torch.nn.init.normal_(parameter, std=size)
    differ = 0
    for room in (0, 250, 300, 340, 500, 600, 700, 800, 5000):
        budget = with_room(model, room)
        fixed = [taps_budget._fixed_bytes(model, unit, "a", taps_budget._COARSEST) for unit in model.units]
        hulls = [taps_budget._choices(unit, "a", own, room) for unit, own in zip(model.units, fixed, strict=True)]
        for unit, own, hull in zip(model.units, fixed, hulls, strict=True):
            for index in range(len(hull)):
                taps_budget._measure(unit, "a", hull, index, own, set(range(len(hull))))
        ways = [both for both in product(*hulls) if sum(choice.size for choice in both) <= room]
        for fine, scale in ((-1.0, lambda w, own: w.square().mean().sqrt()), (9.0, lambda w, own: own.square().sum())):
            levels = allocate(model, "a", budget, fine, {})
            if fine > 0 and None in levels.values():  # nothing is noise where layers are closed
                assert levels == allocate(model, "a", budget, -1.0, {})
                continue
            weights = []
            for unit in model.units:
                base, deltas = unit.base_parameters(), unit.deltas["a"]
                whole = torch.cat([(base[name] + deltas[name]).detach().flatten() for name in base])
                weights.append(1 / max(float(scale(base[name], whole)) for name in base))

            def left(both, weights=weights):
                return sum(weight * choice.error for weight, choice in zip(weights, both, strict=True))

            both = [next(c for c in h if c.level == levels[u.name]) for h, u in zip(hulls, model.units, strict=True)]
            assert sum(choice.size for choice in both) <= room
            assert left(both) <= min(map(left, ways)) + 0.05 * left([hull[0] for hull in hulls])
            other = allocate(model, "a", budget, 9.0 if fine < 0 else -1.0, {})
            if levels != other and None not in levels.values():
                theirs = [
                    next(c for c in h if c.level == other[u.name]) for h, u in zip(hulls, model.units, strict=True)
                ]
                assert left(both) < left(theirs)
                differ += 1
    assert differ == 6  # at three sizes, by both
    for parameter in model.units[0].deltas["a"].parameters():
        parameter.data.zero_()
    assert allocate(model, "a", with_room(model, 600)).keys() == {"4"}  # what has not moved needs nothing


def test_what_has_not_moved_takes_no_bytes(tmp_path):
    model = perceptron()
    for unit in model.units:
        for parameter in unit.deltas["a"].parameters():
            parameter.data.zero_()
    assert round_within(model, "a", min_bytes(model, "a")) == []
    store(model, "a", min_bytes(model, "a"))
    path = model.save_task("a", tmp_path, compact=True) / "task.safetensors"
    assert path.stat().st_size <= min_bytes(model, "a")


def test_where_all_can_be_kept_finely_nothing_is_closed():
    """Small layers get more bits, too; with fewer bytes units are chosen by how much they have moved."""
    torch.manual_seed(0)
    model = taps.adapt(NETWORKS["resnet"].make(), "taps_budget")
    model.add_task("a", num_classes=5)
    for index, unit in enumerate(model.units):
        unit.deltas["a"]["weight"].data.normal_(std=0.002 if index % 3 else 0.02)
    ample, scarce = (allocate(model, "a", parse_budget(size, model)) for size in ("12%", "2%"))
    assert max(ample.values()) <= taps_budget._FINE
    assert ample["conv1"] < ample["layer4.1.conv2"]
    open_units = [unit.name for unit in model.units if scarce[unit.name] is not None]
    assert 0 < len(open_units) < len(model.units)
    assert set(open_units) <= {unit.name for index, unit in enumerate(model.units) if not index % 3}


@pytest.mark.parametrize(("room", "kept", "still"), [(128, 1, 6), (140, 1, 3), (200, 1, 1), (290, 2, 3), (500, 2, 1)])
def test_budget_training_resumes_with_its_decisions(room, kept, still, accelerator, tmp_path, monkeypatch):
    """The run is stopped before or after the choice, or after rounding coarse, noticeable or all deltas; the coarser the
    rounding, the earlier deltas become the values that files will hold."""
    monkeypatch.setattr(taps_budget, "_MANY_BITS", math.inf)
    monkeypatch.setattr(taps_budget, "_RATES", {math.inf: 1.0})
    recipe = Recipe(epochs=6, lr=0.1, budget=with_room(perceptron("taps_budget", norm="task"), room))
    whole, rows = run(accelerator, recipe, perceptron("taps_budget", norm="task"))
    assert [row["phase"] for row in rows] == ["open", "open", "settle", "settle", "settle", "round"]
    assert rows[-1]["tuned_layers"] == kept / len(whole.units)
    assert any(unit.deltas["a"].encodings for unit in whole.units if "a" in unit.deltas)
    assert sum("a" in unit.deltas for unit in whole.units) == kept  # what is closed holds nothing
    learning, watched = [], perceptron("taps_budget", norm="task")

    def watch(output, labels):
        deltas = [delta for unit in watched.units if "a" in unit.deltas for delta in unit.deltas["a"].parameters()]
        learning.append({delta.requires_grad for delta in deltas})
        return nn.functional.cross_entropy(output, labels)

    run(accelerator, recipe, watched, criterion=watch)
    assert learning == [{True}] * (36 - still) + [{False}] * still
    for steps_before in (9, 20, 32, 34, 35):
        stop, model, steps = StopSignals(), perceptron("taps_budget", norm="task"), []

        def criterion(output, labels, stop=stop, steps=steps, steps_before=steps_before):
            steps.append(1)
            stop.received = signal.SIGINT if len(steps) == steps_before else None
            return nn.functional.cross_entropy(output, labels)

        folder = RunFolder(tmp_path / str(steps_before))
        with pytest.raises(Interrupted):
            run(accelerator, recipe, model, criterion=criterion, folder=folder, stop=stop)
        resumed, _ = run(accelerator, recipe, perceptron("taps_budget", norm="task"), folder=folder)
        assert same(whole, resumed, atol=0, rtol=0)
        whole.save_task("a", tmp_path / "whole", compact=True)
        resumed.save_task("a", tmp_path / "resumed", compact=True)
        files = [(tmp_path / kind / "task.safetensors").read_bytes() for kind in ("whole", "resumed")]
        assert files[0] == files[1]


@pytest.mark.parametrize(
    ("bits", "epochs", "wanted"),
    [
        (0.1, 6, ("poly", 1.0)), (0.1, 24, ("cosine", 1.0)), (0.3, 6, ("poly", 0.7)), (0.3, 24, ("cosine", 0.7)),
        (0.6, 11, ("poly", 0.5)), (1.9, 12, ("cosine", 0.5)), (2.0, 6, ("cosine", 1.0)),
    ],
)  # fmt: skip
def test_how_a_budget_trains_depends_on_its_bits_and_on_the_epochs(bits, epochs, wanted):
    model = perceptron("taps_budget", norm="task")
    size = math.ceil(bits * model.base_parameters / 8)
    found = taps_budget.by_bits(model, Recipe(epochs=epochs, budget=size))
    assert (found.optimizer, found.decay, found.rate) == ("split", *wanted)
    assert ("delta" in found.adaptive) == (bits >= 2)


@pytest.mark.parametrize(("room", "first"), [(128, 10), (140, 11), (200, 12)])
def test_epochs_compete_once_deltas_are_what_files_hold(room, first, accelerator, tmp_path, monkeypatch):
    """Of twelve epochs, the first one that competes is the best here, and its file keeps the budget."""
    monkeypatch.setattr(taps_budget, "_MANY_BITS", math.inf)
    monkeypatch.setattr(taps_budget, "_RATES", {math.inf: 1.0})
    model, numbers, saved = perceptron("taps_budget", norm="task"), iter(range(100, 0, -1)), []
    recipe = Recipe(epochs=12, lr=0.1, budget=with_room(model, room))
    batches, sampler = loader()

    def on_epoch(rows, best):
        if best:
            path = model.save_task("a", tmp_path / str(len(saved)), compact=True) / "task.safetensors"
            saved.append((rows[0]["epoch"], path.stat().st_size))

    run_phases(
        model,
        "a",
        batches,
        sampler,
        recipe,
        accelerator,
        on_epoch=on_epoch,
        validate=lambda: ({"a": {}}, next(numbers)),
    )
    assert [epoch for epoch, _ in saved] == [first + (first < 12)]
    assert saved[0][1] <= recipe.budget


def test_a_checkpoint_of_another_schedule_is_refused(accelerator, tmp_path):
    folder = RunFolder(tmp_path)
    run(accelerator, Recipe(epochs=1, warmup_epochs=0.5), folder=folder)
    with pytest.raises(ValueError, match=r"another schedule of phases; start again with --overwrite"):
        run(
            accelerator,
            Recipe(epochs=1, budget=with_room(perceptron("taps_budget", norm="task"), 600)),
            perceptron("taps_budget", norm="task"),
            folder=folder,
        )


class Scaled(nn.Module):
    """A network with a parameter of its own; with finetune it is a unit that contains units."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.inner = nn.Linear(5, 8)

    def forward(self, x):
        return self.inner(x) * self.scale


def test_units_inside_a_unit_resume(accelerator, tmp_path):
    def network():
        torch.manual_seed(0)
        model = taps.adapt(Scaled(), "finetune")
        model.add_task("a", num_classes=2)
        return model

    recipe, folder = Recipe(epochs=3, lr=0.1), RunFolder(tmp_path)
    whole, _ = run(accelerator, recipe, network())
    stop, steps = StopSignals(), []

    def criterion(output, labels):
        steps.append(1)
        stop.received = signal.SIGINT if len(steps) == 9 else None
        return nn.functional.cross_entropy(output, labels)

    with pytest.raises(Interrupted):
        run(accelerator, recipe, network(), criterion=criterion, folder=folder, stop=stop)
    resumed, _ = run(accelerator, recipe, network(), folder=folder)
    assert len(whole.task_state("a")) == len(resumed.task_state("a")) == 5
    assert same(whole, resumed, atol=0, rtol=0)


@torch.no_grad()
def test_compact_files_compute_the_same_to_rounding(tmp_path):
    torch.manual_seed(0)
    model = taps.adapt(NETWORKS["resnet"].make())
    model.add_task("a", num_classes=5)
    x = torch.randn(4, 3, 48, 48)
    for _ in range(3):  # running statistics far from the base's
        model.train()(3 * x + 1, "a")
    for norm in model.task_norms:
        torch.nn.init.uniform_(norm.norms["a"].weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.norms["a"].bias)
    expected = model.eval()(x, "a")
    model.save_task("a", tmp_path / "a", compact=True)
    model.save_task("a", tmp_path / "b")
    sizes = [
        sum(tensor.nbytes for key, tensor in task_file.read_stored(tmp_path / name)[1].items() if "norm/" in key)
        for name in "ab"
    ]
    assert sizes[0] == sizes[1] / 4
    model.remove_task("a")
    model.load_task(tmp_path / "a")
    torch.testing.assert_close(model(x, "a"), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    model.save_task("a", tmp_path / "c", compact=True)
    first, second = (tmp_path / name / "task.safetensors" for name in "ac")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("method", ["taps", "taps_budget"])
def test_closed_layers_cost_nothing_once_gates_stand_still(accelerator, method):
    """They have no delta, gradient or optimiser state; with norm="follow" nothing before the first open layer is trained."""
    torch.manual_seed(0)
    model = taps.adapt(nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)], nn.Linear(6, 3)), method, norm="follow")
    model.add_task("a", num_classes=2)
    for unit in model.units[:4]:
        unit.gates["a"].set(False)
    seen, optimizers = [], []
    recipe = Recipe(epochs=2, settle_epochs=1, warmup_epochs=1, lr=0.01)
    recipe = replace(recipe, plan=(Phase("warm-up", 1, penalty=0.0), Phase("settle", 1, penalty=0.0, trains=SETTLED)))
    model.units[3].register_forward_hook(lambda module, x, y: seen.append(y.requires_grad))
    original = loop.make_optimizer

    def make(*given):
        optimizers.append(original(*given))
        return optimizers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_optimizer", make)
        x = torch.randn(24, 6)
        data = [(x[i], int(x[i, 0] > 0)) for i in range(24)]
        batches = DataLoader(data, batch_size=4)
        sampler = SimpleNamespace(epoch=0)
        run_phases(model, "a", batches, sampler, recipe, accelerator)
    assert seen[0]
    assert not seen[-1]
    assert [("a" in unit.deltas) for unit in model.units] == [False] * 4 + [True] * 2
    numbers = sum(
        p.numel() for group in optimizers[0].param_groups for p in group["params"] if group["role"] == "delta"
    )
    assert numbers == sum(unit.size for unit in model.units[4:])
    held = {id(p) for p in model.parameters()}
    assert all(id(p) in held for p in optimizers[0].state)


def test_compiled_steps_compute_the_same(accelerator, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # without a compiler's minute
    recipe = {"epochs": 3, "warmup_epochs": 1, "settle_epochs": 1, "lr": 0.1}
    plain, rows = run(accelerator, Recipe(**recipe), perceptron())
    compiled, others = run(accelerator, Recipe(compile=True, **recipe), perceptron())
    assert same(plain, compiled, atol=1e-5)
    assert others[-1]["train_loss"] == pytest.approx(rows[-1]["train_loss"], abs=1e-5)


def test_a_training_step_is_traced_as_a_whole(monkeypatch):
    """Without copying layers, which not every version's compiler can trace."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    plain = taps.adapt(nn.Sequential(*layers))
    plain.add_task("a", head=nn.Linear(8, 4))
    for unit in plain.units:
        for parameter in unit.deltas["a"].parameters():
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    plain.set_task("a")
    closed, learning = plain.gates("a")
    closed.set(False)
    closed.requires_grad_(False)
    traced = copy.deepcopy(plain)
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    plain.train()(x).square().sum().backward()
    traced.train().hold_buffers()
    for gate in traced.gates("a"):
        gate.decide()
    monkeypatch.setattr("taps.core.modules.with_tensors", None)
    torch.compile(traced, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert learning.score.grad is not None
    for own, other in zip(plain.parameters(), traced.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        assert own.grad is None or torch.allclose(own.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match=r"optimizer: 'sdg' is not one of \(did you mean sgd\?\)"):
        run_phases(perceptron(), "a", *loader(), Recipe(optimizer="sdg"), Accelerator(cpu=True))


def test_a_budget_is_kept_where_no_layer_fits(accelerator, tmp_path):
    budget = min_bytes(perceptron("taps_budget", norm="task"), "a") + 10
    model, rows = run(accelerator, Recipe(epochs=6, lr=0.1, budget=budget), perceptron("taps_budget", norm="task"))
    assert rows[-1]["tuned_layers"] == 0.0
    path = model.save_task("a", tmp_path, compact=True) / "task.safetensors"
    assert path.stat().st_size <= budget


def test_what_is_validated_is_what_is_kept(accelerator, tmp_path, monkeypatch):
    """Of competing epochs the outputs at validation are, to the bit, those of the file that is saved then."""
    monkeypatch.setattr(taps_budget, "_MANY_BITS", math.inf)
    monkeypatch.setattr(taps_budget, "_RATES", {math.inf: 1.0})
    model, x, seen = perceptron("taps_budget", norm="task"), torch.randn(4, 5), []
    recipe = Recipe(epochs=12, lr=0.1, budget=with_room(model, 128))
    batches, sampler = loader()

    def validate():
        with evaluating(model):
            seen.append(model(x, "a").detach())
        return {"a": {"val_error": 0.0}}, float(len(seen))

    def keep(rows, best):
        if best:
            model.save_task("a", tmp_path / str(len(seen)), compact=True)

    run_phases(model, "a", batches, sampler, recipe, accelerator, validate=validate, on_epoch=keep)
    kept = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    assert len(kept) >= 2
    for path in kept:
        fresh = perceptron("taps_budget", norm="task")
        fresh.remove_task("a")
        fresh.load_task(path)
        with evaluating(fresh):
            assert torch.equal(fresh(x, "a"), seen[int(path.name) - 1])


@pytest.mark.parametrize(("sizes", "share"), [(None, 1.0), ([0.2, 1e-4], 1.0), ([0.045, 1e-4], 0.3)])
def test_split_is_normalised_momentum_for_deltas_and_adam_for_norms_and_heads(sizes, share):
    """Step by step the formula in float64, and torch's optimisers, each for its own parameters; with the sizes of weights, those
    of matrices determine the share of the rate, and no step is larger than such a size allows."""
    torch.manual_seed(0)
    shapes = ((4, 3), (3,), (5,), (2,))
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    roles = (("delta", ours[:2], 0.01), ("head", ours[2:3], 0.0), ("gate", ours[3:], 0.0))
    groups = [
        {"params": own, "lr": 0.1, "initial_lr": 0.1, "weight_decay": decay, "role": role} for role, own, decay in roles
    ]
    split = SplitOptimizer(groups, 0.9, (0.9, 0.999), sizes=dict(zip(ours, sizes or (), strict=False)))
    pair = [torch.optim.Adam(theirs[2:3], lr=0.1 * FACTOR), torch.optim.SGD(theirs[3:], lr=0.1, momentum=0.9)]
    w, m, v = [t.detach().double() for t in theirs[:2]], [0.0, 0.0], [0.0, 0.0]
    for step in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step))
            other.grad = one.grad.clone()
        split.step()
        for optimizer in pair:
            optimizer.step()
        for index, own in enumerate(theirs[:2]):
            g = own.grad.double() + 0.01 * w[index]
            m[index] = 0.9 * m[index] + 0.1 * g
            v[index] = 0.999 * v[index] + 0.001 * float((g**2).mean())
        r2 = [one / (1 - 0.999 ** (step + 1)) for one in v]
        of_all = math.sqrt((12 * r2[0] + 3 * r2[1]) / 15)
        for index in range(2):
            size = math.sqrt(r2[index]) ** LAYERWISE * of_all ** (1 - LAYERWISE)
            part = 1 / size if sizes is None else min(1 / size, TRUST * sizes[index] / math.sqrt(r2[index]))
            assert (part < 1 / size) == (sizes is not None and index == 1)
            w[index] = w[index] - 0.1 * share * FACTOR * m[index] / (1 - 0.9 ** (step + 1)) * part
        if step == 2:
            split.load_state_dict(split.state_dict())
    for one, other in zip(ours, [*w, *theirs[2:]], strict=True):
        torch.testing.assert_close(one.detach().double(), other.detach().double(), rtol=0, atol=5e-6)


def test_deltas_are_trained_in_proportion_to_the_weights_that_they_are_added_to():
    """Also after layers were closed; biases and layers of zeros count as a quarter of the network's size."""
    model = taps.adapt(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), "taps_budget")
    model.add_task("a", head=nn.Identity())
    for unit, size in zip(model.units, (0.9, 0.0, 0.1, 0.3), strict=True):
        unit.base.weight.data.fill_(size)
        unit.base.bias.data.zero_()
    optimizer = make_optimizer(model, ["a"], Recipe(epochs=3, budget="1%", wd=0.0))
    least = math.sqrt((0.81 + 0.01 + 0.09) / 4) / 4
    gradients = torch.Generator().manual_seed(0)
    for closed in (None, 0):
        if closed is not None:
            loop_of_run = SimpleNamespace(model=model, roles=model.roles("a"), optimizers={"": optimizer})
            del model.units[closed].deltas["a"]
            loop._Run._forget_dropped(loop_of_run)
        for unit in model.units:
            for delta in unit.deltas["a"].parameters() if "a" in unit.deltas else ():
                delta.grad = torch.randn(delta.shape, generator=gradients)
        before = {unit: unit.deltas["a"]["weight"].detach().clone() for unit in model.units if "a" in unit.deltas}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(split_optimizer, "TRUST", 1e-3)  # so that every step is bounded
            optimizer.step()
        for unit, old in before.items():
            delta, size = unit.deltas["a"]["weight"], max(float(unit.base.weight[0, 0]), least)
            state, group = optimizer.state[delta], optimizer.param_groups[0]
            expected = 1e-3 * group["lr"] * size * state["mean"] / state["square"].sqrt()
            count = int(state["step"])
            expected = expected / (1 - 0.9**count) * math.sqrt(1 - 0.999**count)
            torch.testing.assert_close(old - delta.detach(), expected, rtol=1e-3, atol=1e-9)


def test_a_state_of_another_optimiser_is_refused():
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    before = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    before.step()
    group = {"params": [weight], "lr": 0.1, "initial_lr": 0.1, "weight_decay": 0.0, "role": "delta"}
    split = SplitOptimizer([group], 0.9, (0.9, 0.999))
    state = {"state": before.state_dict()["state"], "param_groups": split.state_dict()["param_groups"]}
    with pytest.raises(ValueError, match="was written with another optimiser"):
        split.load_state_dict(state)


def test_deltas_are_trained_as_they_will_be_stored():
    """Straight-through: outputs are those of the rounded delta, its gradient that of the exact one; encoding ends it."""
    model = perceptron("taps_budget", norm="task")
    unit = model.units[1]
    deltas = unit.deltas["a"]
    nn.init.normal_(deltas["weight"])
    level = 0.42
    rounded = encode_as("range_coded", deltas["weight"], level)
    values = rounded.decode(deltas["weight"].shape, torch.float32)
    deltas.set_rounding("weight", rounding_of(deltas["weight"], level))
    assert 0 < error_of(deltas["weight"].detach(), values) <= level
    torch.testing.assert_close(deltas.used("weight"), values)
    weight = unit.effective_parameters("a", unit.gates["a"].decide())["weight"]
    torch.testing.assert_close(weight, unit.base.weight + values)
    gradient = torch.randn_like(values)
    weight.backward(gradient)
    assert torch.equal(deltas["weight"].grad, gradient)
    deltas.set_encoded("weight", rounded)
    assert torch.equal(deltas.used("weight"), deltas["weight"])
    assert torch.equal(deltas["weight"], values)


@pytest.mark.parametrize("together", [False, True])
def test_norms_of_closed_layers_give_way_by_degrees(together):
    """Between the task's copy and the base's norm training runs a blend of both; validation runs the base's at once."""
    torch.manual_seed(0)
    model = taps.adapt(NETWORKS["resnet"].make(), "taps_budget")
    for task in ("a", "b"):
        model.add_task(task, num_classes=3)
    unit = model.units[0]
    norm = next(norm for norm in model.task_norms if norm.follows(unit))
    nn.init.uniform_(norm.norms["a"].weight, 1.5, 2.5)
    unit.gates["a"].set(False)
    x, found = torch.randn(4, 3, 40, 40), []
    norm.register_forward_hook(lambda module, args, output: found.append((args[0].clone(), output.detach().clone())))
    names = ["a", "b", "a", "b"] if together else "a"
    for part in (0.0, 0.5, 1.0):
        taps_budget.fade_norms(model, "a", part, 0.0, 1.0)
        model.train()(x, names)
        inputs, output = found.pop()
        if not together:
            own, share = norm.norms["a"](inputs), (1 - part) ** 2
            torch.testing.assert_close(output, share * own + (1 - share) * norm.base(inputs))
    taps_budget.fade_norms(model, "a", 0.0, 0.0, 1.0)
    with torch.no_grad():
        model.eval()(x, "a")
    inputs, output = found.pop()
    torch.testing.assert_close(output, norm.base(inputs))
