"""Tasks trained together: batches, steps, and the program in both variants."""

import copy
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from cases import make
from conftest import trained_arguments as arguments
from safetensors.torch import load_file

import taps
from taps.data.classification.mixed_batches import TaskSampler
from taps.training.loop import run_phases
from taps.training.recipe import Recipe

SIZES = (40, 12, 7)


def epochs(sampler: TaskSampler, count: int) -> list[list[list[tuple[int, int, int]]]]:
    result = []
    for epoch in range(count):
        sampler.epoch = epoch
        result.append(list(sampler))
    return result


@pytest.mark.parametrize("sampling", ["equal", "proportional", "temperature"])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_epoch_has_full_batches_and_passes_repeat_no_image(sampling, processes):
    sampler = TaskSampler(SIZES, 9, sampling, seed=4, processes=processes)
    all_epochs = epochs(sampler, 5)
    assert len(sampler) % processes == 0
    for batches in all_epochs:
        assert len(batches) == len(sampler)
        assert all(len(batch) == 9 for batch in batches)
        for batch in batches:
            assert all(count >= 2 for count in Counter(task for task, _, _ in batch).values())
    drawn = Counter(sample for batches in all_epochs for batch in batches for sample in batch)
    assert set(drawn.values()) == {1}, "an image comes once in each pass"
    for task, size in enumerate(SIZES):
        passes = Counter(number for own, _, number in drawn if own == task)
        complete = [count for number, count in passes.items() if number < max(passes)]
        assert all(count == size for count in complete), "a pass ends before the next one begins"
    assert epochs(TaskSampler(SIZES, 9, sampling, seed=4, processes=processes), 5) == all_epochs
    assert epochs(TaskSampler(SIZES, 9, sampling, seed=5, processes=processes), 5) != all_epochs


def test_shares_of_the_samplings():
    def shares(sampling, temperature=2.0):
        sampler = TaskSampler(SIZES, 12, sampling, temperature)
        counts = Counter(task for batches in epochs(sampler, 20) for batch in batches for task, _, _ in batch)
        return [counts[task] / sum(counts.values()) for task in range(3)]

    assert shares("equal") == [1 / 3] * 3
    assert shares("proportional") == pytest.approx([size / sum(SIZES) for size in SIZES], abs=0.03)
    roots = [size**0.5 for size in SIZES]
    assert shares("temperature") == pytest.approx([root / sum(roots) for root in roots], abs=0.03)
    assert shares("temperature", 1.0) == shares("proportional")
    assert shares("temperature", 1e9) == pytest.approx(shares("equal"), abs=0.01)
    with pytest.raises(ValueError, match="unknown sampling 'equals'; did you mean 'equal'"):
        TaskSampler(SIZES, 9, "equals")
    with pytest.raises(ValueError, match="too small for 3 tasks"):
        TaskSampler(SIZES, 5)


class Batches(list):
    """A loader of fixed batches, with the interface that accelerate needs."""

    epoch = 0


def data(count: int = 3) -> list[tuple]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(8, 5, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (8,), generator=generator),
            torch.tensor([1, 0, 0, 1, 1, 0, 1, 1]),
        )
        for _ in range(count)
    ]


class Given(torch.utils.data.IterableDataset):
    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def joint_model(train_base: bool = True) -> taps.TaskModel:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.ReLU(), torch.nn.Linear(7, 6))
    model = taps.adapt(net.double(), train_base=train_base)
    for task in ("a", "b"):
        model.add_task(task, num_classes=3)
    return model.double()


def train(model, mixed: bool, base_lr: float | None = None) -> list[dict]:
    rows = []
    recipe = Recipe(epochs=1, warmup_epochs=0, lr=0.1, base_lr=base_lr, momentum=0.9, lam=0.5, mixed=mixed)
    loader = torch.utils.data.DataLoader(Given(data()), batch_size=None)
    accelerator = Accelerator(cpu=True, rng_types=[])
    run_phases(model, ["a", "b"], loader, Batches(), recipe, accelerator, on_epoch=lambda new, best: rows.extend(new))
    return rows


@pytest.mark.parametrize("mixed", [True, False])
def test_joint_steps_follow_the_formula(mixed):
    """w_t = W + 1[s ≥ τ]·δ_t, loss = Σ_t K·n_t/n·(CE_t + λ·mean|s_t|), the base at lr/√K, written out in plain torch."""
    model = joint_model()
    start = copy.deepcopy(model)
    rows = train(model, mixed)
    first = [p.detach().clone() for p in (start.backbone[0].base.weight, start.backbone[0].base.bias)]
    second = [p.detach().clone() for p in (start.backbone[3].base.weight, start.backbone[3].base.bias)]
    own = {
        t: {
            "delta": [torch.zeros_like(p) for p in (*first, *second)],
            "score": [unit.gates[t].score.detach().clone() for unit in start.units],
            "norm": [torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)],
            "head": [p.detach().clone() for p in start.heads[t].parameters()],
        }
        for t in "ab"
    }
    base = [*first, *second]
    everything = [(p, 0.1 / 2**0.5) for p in base]
    everything += [(p, 0.1) for parts in own.values() for values in parts.values() for p in values]
    velocity = [torch.zeros_like(p) for p, _ in everything]
    for x, y, which in data():
        for p, _ in everything:
            p.requires_grad_(True)
        loss = 0
        for position, t in enumerate("ab"):
            rows_of = which == position
            part = own[t]
            on = [1.0 if s.item() >= 0.1 else 0.0 for s in part["score"]]
            through = [s + (flag - s).detach() for s, flag in zip(part["score"], on, strict=True)]
            w = [b + through[i // 2] * d for i, (b, d) in enumerate(zip(base, part["delta"], strict=True))]
            h = torch.nn.functional.linear(x[rows_of], w[0], w[1])
            h = torch.nn.functional.layer_norm(h, (7,), *part["norm"]).relu()
            out = torch.nn.functional.linear(torch.nn.functional.linear(h, w[2], w[3]), *part["head"])
            ce = torch.nn.functional.cross_entropy(out, y[rows_of])
            loss = loss + 2 * rows_of.sum() / 8 * (ce + 0.5 * torch.stack(part["score"]).abs().mean())
        gradients = torch.autograd.grad(loss, [p for p, _ in everything])
        with torch.no_grad():
            for v, g, (p, lr) in zip(velocity, gradients, everything, strict=True):
                p.requires_grad_(False)
                v.mul_(0.9).add_(g)
                p.sub_(lr * v)
    for name, expected in (("0", first), ("3", second)):
        unit = model.backbone.get_submodule(name)
        torch.testing.assert_close([unit.base.weight.data, unit.base.bias.data], expected, rtol=1e-9, atol=1e-11)
    for t in "ab":
        scores = [unit.gates[t].score.data for unit in model.units]
        torch.testing.assert_close(scores, own[t]["score"], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(model.units[1].deltas[t]["weight"].data, own[t]["delta"][2], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(model.heads[t].weight.data, own[t]["head"][0], rtol=1e-9, atol=1e-11)
    assert [row["task"] for row in rows] == ["a", "b"]
    assert all(0 <= row["train_error"] <= 100 for row in rows)


def test_the_base_learns_only_where_it_is_asked_to():
    model = joint_model(train_base=False)
    before = {name: tensor.clone() for name, tensor in model.base_state().items()}
    train(model, mixed=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_state().items())
    model = joint_model()
    assert set(model.roles("a", "b")) == {"base", "delta", "gate", "norm", "head"}
    train(model, mixed=True)
    assert not torch.equal(model.base_state()["0.weight"], before["0.weight"])


def test_load_base_refuses_another_network():
    model, other = make("perceptron", "taps"), make("series", "taps")
    before = {name: tensor.clone() for name, tensor in model.base_state().items()}
    with pytest.raises(ValueError, match="belong to another network"):
        model.load_base(other.base_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base_state().items())


def tensors(folder) -> dict[str, bytes]:
    """Return every tensor file except checkpoints, whose counters have no fixed order."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if path.parent.name != "checkpoint"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_joint_leaves_a_base_and_a_file_a_task(joint, here, tree):
    folder, done = joint
    run = folder / "results/run"
    names = {path.name for path in run.iterdir() if not path.name.startswith("events")}
    assert names == {
        "settings.txt", "settings.yaml", "settings.json", "metrics.jsonl", "summary.json", "fingerprints.json",
        "ink-2", "paint",
        "base.safetensors", "layers.png", "sizes.png", "scores.png", "curves.png", "overlap.png",
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["tasks"]) == ["ink-2", "paint"], "different class lists are different heads"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["task"], row["epoch"]) for row in rows] == [("ink-2", 1), ("paint", 1), ("ink-2", 2), ("paint", 2)]
    assert "2 tasks 2/2" in done.stdout
    net = taps.create_backbone("test_resnet", path=run / "base.safetensors")
    model = taps.adapt(net).eval()
    assert model.load_library(run) == ["ink-2", "paint"]
    first = json.loads((run / "paint/task.json").read_text())
    assert first["base"]["fingerprint"] == model.fingerprint()
    assert here("evaluate.py", run, "--verify", cwd=folder).stdout.count("bit for bit") == 3
    table = here("evaluate.py", run, cwd=folder).stdout
    for row in summary["tasks"].values():
        assert f"{row['accuracy']:.2f}" in table


def test_lite_shares_first_and_adapts_then(tree, here, tmp_path):
    done = here("train_joint.py", *arguments(tree, "--variant", "lite", "--shared_epochs", 1))
    run = tmp_path / "results/run"
    assert {path.name for path in (run / "shared").iterdir()} >= {"base.safetensors", "summary.json", "paint", "ink-2"}
    base, shared = (load_file(path / "base.safetensors") for path in (run, run / "shared"))
    assert all(torch.equal(tensor, shared[name]) for name, tensor in base.items())
    summary, first = (json.loads((path / "summary.json").read_text()) for path in (run, run / "shared"))
    assert (summary["method"], first["method"]) == ("taps", "hard_sharing")
    assert first["parameters_x_base"] == 1.0
    assert done.stdout.count("parameters × base") == 2
    for folder in (run, run / "shared"):
        stored = json.loads((folder / "summary.json").read_text())
        table = here("evaluate.py", folder, cwd=tmp_path).stdout
        assert all(f"{row['accuracy']:.2f}" in table for row in stored["tasks"].values())
        assert here("evaluate.py", folder, "--verify", cwd=tmp_path).stdout.count("bit for bit") == 3
    here("train_joint.py", *arguments(tree, "--variant", "lite", "--shared_epochs", 1, "--overwrite"))
    assert json.loads((run / "summary.json").read_text())["tasks"] == summary["tasks"], "the same seed, the same run"


@pytest.mark.parametrize(("variant", "after"), [("joint", 1), ("lite", 1), ("lite", 3)])
def test_stopped_and_resumed_ends_with_the_same_bytes(variant, after, tree, here, tmp_path, monkeypatch):
    """The run is stopped at the end of an epoch, before it is saved: in joint training and in both stages of lite."""
    import taps.runs.adaptation

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    more = ("--variant", variant, "--sampling", "proportional", "--workers", 1 if variant == "joint" else 0)
    here("train_joint.py", *arguments(tree, *more), cwd=whole)
    line, count = taps.runs.adaptation.epoch_line, []

    def stop(*given):
        count.append(given)
        if len(count) > after:
            raise KeyboardInterrupt
        return line(*given)

    monkeypatch.setattr(taps.runs.adaptation, "epoch_line", stop)
    here("train_joint.py", *arguments(tree, *more), cwd=parts, check=130)
    monkeypatch.undo()
    here("train_joint.py", *arguments(tree, *more, "--resume"), cwd=parts)
    assert tensors(parts) == tensors(whole)


def test_sizes_stopped_in_the_second_end_the_same(tree, here, stop_at, tmp_path):
    """Both start from one open phase of all tasks, whose saved state is still used after a run is stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    more = ("--epochs", 3, "--layers", "layer[123]", "--budget", "40KB", "70KB")
    with stop_at(0) as steps:
        here("train_joint.py", *arguments(tree, *more), cwd=whole)
    run = whole / "results/run"
    assert sorted(path.name for path in run.iterdir()) == ["40kb", "70kb", "summary.csv", "trade_off.png"]
    rows = [json.loads(line) for line in (run / "70kb/metrics.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {"settle", "round"}
    with stop_at(len(steps) - 3):
        here("train_joint.py", *arguments(tree, *more), cwd=parts, check=143)
    stopped = parts / "results/run"
    assert (stopped / "40kb/summary.json").is_file()
    assert (stopped / "70kb").is_dir()
    assert not (stopped / "70kb/summary.json").exists()
    here("train_joint.py", *arguments(tree, *more, "--resume"), cwd=parts)
    assert tensors(parts) == tensors(whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sampling", "equals"), "'equals' is not one of (did you mean equal?)"),
        (("--variant", "light"), "'light' is not one of (did you mean lite?)"),
        (("--compile",), "unknown option --compile"),
        (("--method", "hard_sharing", "--variant", "lite"), "choose another --method"),
        (("--batch_size", "1"), "too small for 2 tasks"),
        (
            ("--variant", "lite", "--epochs", 3, "--shared_epochs", 2, "--lr_warmup_epochs", 2),
            "leaves none of 2 --shared_epochs at the full rate",
        ),
    ],
)
def test_mistakes_are_one_line(more, message, tree, here):
    done = here("train_joint.py", *arguments(tree, *more), check=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_resume_with_the_other_program_is_refused(joint, tree, here, tmp_path):
    shutil.copytree(joint[0] / "results", tmp_path / "results")
    before = tensors(tmp_path)
    done = here("train_sequential.py", *arguments(tree, "--resume"), check=2)
    assert "was written by another program" in done.stderr
    assert tensors(tmp_path) == before


def test_half_precision_and_loading_processes(tree, here, tmp_path):
    """Gates close, and the loaders of many validations leave no processes behind."""
    more = ("--amp", "bf16", "--workers", 2, "--epochs", 3, "--warmup_epochs", 0.5, "--lam", 8)
    here("train_joint.py", *arguments(tree, *more))
    rows = [json.loads(line) for line in (tmp_path / "results/run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["tuned_layers"] < 1
    children = Path("/proc/self/task").glob("*/children")
    assert sum(len(path.read_text().split()) for path in children) == 0


def test_joint_training_needs_two_tasks(tree, here):
    done = here("train_joint.py", *arguments(tree / "paint"), check=2)
    assert "joint training needs at least two tasks" in done.stderr
    done = here("train_sequential.py", *arguments(tree, "--method", "hard_sharing"), check=2)
    assert "use train_joint.py" in done.stderr
