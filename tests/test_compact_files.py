"""Compact files: the range code of small integers, packed tensors, norms and heads in few bytes, and damage of each."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from cases import NETWORKS
from hypothesis import given, settings
from hypothesis import strategies as st

import taps
from taps.core.modules import evaluating
from taps.methods.taps_budget import check_size, keep_within, min_bytes, parse_budget, round_within, store
from taps.storage import packing, range_code
from taps.storage.norms_and_head import encoded_small, set_small
from taps.storage.task_file import active_norms


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 90),
    scale=st.sampled_from([0.0, 0.02, 0.4, 3.0, 80.0, 5000.0]),
    seed=st.integers(0, 999),
)
def test_a_range_code_gives_back_every_number(rows, columns, scale, seed):
    drawn = np.random.default_rng(seed)
    spread = drawn.gamma(0.5, size=(rows, 1)) * drawn.gamma(0.5, size=(1, columns))
    numbers = np.rint(drawn.laplace(size=(rows, columns)) * spread * scale).clip(-32767, 32767).astype(np.int32)
    assert np.array_equal(range_code.unpack(range_code.pack(numbers), numbers.shape), numbers)


@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0, 4.0, 60.0])
def test_a_range_code_takes_at_most_the_entropy_of_independent_numbers(scale):
    """… plus two per cent for frequencies that are not known in advance; and less where rows and columns differ."""
    drawn = np.random.default_rng(0)
    for spread in (1.0, drawn.gamma(1.0, size=(256, 1)) * drawn.gamma(1.0, size=(1, 384))):
        numbers = np.rint(drawn.laplace(size=(256, 384)) * spread * scale).astype(np.int32)
        counts = np.unique(numbers, return_counts=True)[1] / numbers.size
        entropy = -(counts * np.log2(counts)).sum() * numbers.size / 8
        assert len(range_code.pack(numbers)) < entropy * (1.02 if isinstance(spread, float) else 0.93) + 32


def test_damaged_range_codes_raise_nothing_but_a_value_error():
    drawn = np.random.default_rng(0)
    numbers = np.rint(drawn.laplace(size=(40, 70))).astype(np.int32)
    code = range_code.pack(numbers)
    for _ in range(300):
        damaged = bytearray(code)
        if drawn.random() < 0.3:
            del damaged[drawn.integers(len(damaged)) :]
        else:
            damaged[drawn.integers(len(damaged))] ^= 1 << int(drawn.integers(8))
        with contextlib.suppress(ValueError):
            assert range_code.unpack(bytes(damaged), numbers.shape).shape == numbers.shape
    with pytest.raises(ValueError, match="not a range code of 20 × 70 numbers"):
        range_code.unpack(code, (20, 70))


def test_packed_tensors():
    tensors = {f"delta/blocks.{index}.conv": torch.randn(3, index) for index in range(40)}
    packed = packing.pack(tensors)
    back = packing.unpack(packed)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    assert len(packed) < sum(tensor.nbytes for tensor in tensors.values()) + 40 * 24
    for cut in (0, 3, 30, len(packed) - 1):
        with pytest.raises(ValueError, match="packed tensors"):
            packing.unpack(packed[:cut])


@pytest.fixture(params=["resnet", "vit"])
def model(request):
    model = taps.adapt(NETWORKS[request.param].make(), "taps_budget")
    model.add_task("a", num_classes=5)
    torch.manual_seed(0)
    for unit in model.units:
        for parameter in unit.deltas["a"].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    for norm in model.task_norms:
        own = norm.norms["a"]
        for tensor in own.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(torch.rand_like(tensor).mul(0.2).add(0.9))
    model.shape = NETWORKS[request.param].shape
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("share", ["30%", "8%", "smallest"])
def test_a_file_holds_what_the_model_answers_with_and_keeps_its_size(model, tmp_path, share):
    budget = min_bytes(model, "a") + 400 if share == "smallest" else parse_budget(share, model)
    round_within(model, "a", budget)
    x = torch.randn(2, *model.shape)
    with evaluating(model):
        own = model(x, "a")
        undo = store(model, "a", budget)
        stored = model(x, "a")
        model.save_task("a", tmp_path / "a", compact=True)
        undo()
        assert torch.equal(model(x, "a"), own)
    size = (tmp_path / "a/task.safetensors").stat().st_size
    assert size <= budget
    description = json.loads((tmp_path / "a/task.json").read_text())
    assert description["format"] == 2
    assert {"head/weight", "norm/weight", "norm/bias"} & description["encodings"].keys() or share == "30%"
    model.load_task(tmp_path / "a", name="b")
    assert torch.equal(model(x, "b"), stored)
    torch.testing.assert_close(model.merge("b")(x), stored, rtol=1e-3, atol=1e-4)
    model.save_task("b", tmp_path / "again", compact=True)
    again = (tmp_path / "again/task.safetensors").read_bytes()
    assert again == (tmp_path / "a/task.safetensors").read_bytes()


@torch.no_grad()
def test_a_norms_error_is_at_most_half_a_step_of_its_channels_weight(model):
    norms = active_norms(model, "a")
    before = [{name: tensor.clone() for name, tensor in norm.norms["a"].state_dict().items()} for norm in norms]
    undo = set_small(model, "a", norms, encoded_small(model, "a", norms, 0.05))
    for norm, own in zip(norms, before, strict=True):
        base, stored = norm.base, norm.norms["a"]
        weight, bias = own["weight"].double(), own["bias"].double()
        if "running_var" in own:  # y = w (x − m)/s + b, written with the base's m and s
            ratio = ((base.running_var.double() + base.eps) / (own["running_var"].double() + base.eps)).sqrt()
            spread = (own["running_var"].double() + base.eps).sqrt()
            bias = bias + weight * (base.running_mean.double() - own["running_mean"].double()) / spread
            weight = weight * ratio
            assert torch.equal(stored.running_mean, base.running_mean)
        size = base.weight.double().abs()
        step = 0.05 * size.clamp(min=0.25 * float(size.median()))
        assert ((stored.weight.double() - weight).abs() <= 0.5001 * step + 1e-6).all()
        assert ((stored.bias.double() - bias).abs() <= 0.5001 * step + 1e-6).all()
    undo()
    for norm, own in zip(norms, before, strict=True):
        assert all(torch.equal(tensor, own[name]) for name, tensor in norm.norms["a"].state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_keeps_its_size(model, dtype, tmp_path):
    model.to(dtype)
    budget = parse_budget("8%", model)
    round_within(model, "a", budget)
    store(model, "a", budget)
    path = model.save_task("a", tmp_path, compact=True) / "task.safetensors"
    assert path.stat().st_size <= budget


def test_norms_that_start_at_zero_and_whole_numbers_in_a_head_are_kept():
    """As the last norm of a residual block may start, and as a head may hold an order of classes."""
    net = NETWORKS["resnet"].make()
    for name, module in net.named_modules():
        if name.endswith("bn2"):
            torch.nn.init.zeros_(module.weight)
    model = taps.adapt(net, "taps_budget", norm="task")
    head = torch.nn.Linear(net.num_features, 3)
    head.register_buffer("order", torch.arange(70_000, 70_003))
    model.add_task("a", head=head)
    torch.manual_seed(0)
    for norm in model.task_norms:
        torch.nn.init.uniform_(norm.norms["a"].weight, 0.05, 1.5)
    norms = active_norms(model, "a")
    before = [norm.norms["a"].weight.detach().clone() for norm in norms]
    for step in (0.002, 0.05):
        undo = set_small(model, "a", norms, encoded_small(model, "a", norms, step))
        for norm, own in zip(norms, before, strict=True):
            assert (norm.norms["a"].weight - own).abs().max() <= 0.51 * step * max(float(norm.base.weight.max()), 0.05)
        assert head.order.tolist() == [70_000, 70_001, 70_002]
        undo()


@torch.no_grad()
def test_a_head_is_stored_as_finely_as_its_loss_needs():
    """The error grows with the norms' step, stays within 0.3 up to a step of 0.05, and is about 0.2 at a step of 0.008."""
    model = taps.adapt(NETWORKS["resnet"].make(), "taps_budget")
    model.add_task("a", num_classes=50)
    weight = model.heads["a"].weight
    errors = []
    for step in (0.002, 0.008, 0.0125, 0.05, 0.1):
        stored = encoded_small(model, "a", [], step)["head/weight"].decode(weight.shape, torch.float32)
        errors.append(float((stored - weight).norm() / weight.norm()))
    assert errors == sorted(errors)
    assert 0.15 < errors[1] < 0.2
    assert 0.25 < errors[3] <= 0.3 < errors[4]


@torch.no_grad()
def test_what_is_saved_while_deltas_are_rounded_answers_as_the_model(model, tmp_path):
    """… as does a task that is settled then; what a file holds keeps its size when it is stored again."""
    budget = parse_budget("8%", model)
    keep_within(model, "a", budget)
    x = torch.randn(2, *model.shape)
    own = model(x, "a")
    model.save_task("a", tmp_path / "early")
    model.load_task(tmp_path / "early", name="b")
    torch.testing.assert_close(model(x, "b"), own, rtol=1e-5, atol=1e-6)
    round_within(model, "a", budget)
    sizes = []
    for _ in range(2):
        store(model, "a", budget)
        path = model.save_task("a", tmp_path / "a", compact=True) / "task.safetensors"
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1] <= budget


def test_too_small_a_size_names_the_smallest_and_what_takes_it(model):
    smallest = min_bytes(model, "a")
    with pytest.raises(ValueError, match=rf"the smallest file takes {smallest:,}: [\d,]+ for the head, the rest for"):
        check_size(model, "a", smallest - 1)


def test_biases_take_few_bytes(model, tmp_path):
    round_within(model, "a", parse_budget("8%", model))
    stored = json.loads((model.save_task("a", tmp_path, compact=True) / "task.json").read_text())["encodings"]
    biases = {key: name for key, name in stored.items() if key.startswith("delta/") and key.endswith("bias")}
    assert set(biases.values()) <= {"range_coded"}
    assert biases or not any("bias" in unit.parameter_names for unit in model.units)


def test_mutated_compact_files_are_refused_in_one_line_and_load_nothing(model, tmp_path):
    round_within(model, "a", parse_budget("8%", model))
    store(model, "a", parse_budget("8%", model))
    model.save_task("a", tmp_path / "a", compact=True)
    model.remove_task("a")
    whole = (tmp_path / "a/task.safetensors").read_bytes()
    drawn = np.random.default_rng(0)
    for index in range(125):
        folder = tmp_path / "mutated"
        shutil.copytree(tmp_path / "a", folder, dirs_exist_ok=True)
        damaged = bytearray(whole)
        if index % 3 == 0:
            del damaged[drawn.integers(len(damaged)) :]
        else:
            damaged[drawn.integers(len(damaged))] ^= 1 << int(drawn.integers(8))
        (folder / "task.safetensors").write_bytes(bytes(damaged))
        with pytest.raises(taps.UserError) as caught:
            model.load_task(folder)
        assert "\n" not in str(caught.value)
        assert not model.tasks
        assert not model.encoded
