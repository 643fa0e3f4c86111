"""Encoding of deltas in fewer bytes: the requested error, the fewest bytes, and task files that load like any other."""

import math
import re

import numpy as np
import pytest
import torch
from cases import NETWORKS
from safetensors.torch import load_file

import taps
from taps.storage import task_file
from taps.storage.encoding import ENCODINGS, encode, encode_as, error_of
from taps.storage.task_tables import show_table


def dense() -> torch.Tensor:
    return torch.randn(24, 16, 3, 3)


def flat_spectrum_low_rank() -> torch.Tensor:
    return (torch.randn(64, 3) @ torch.randn(3, 80)).view(64, 80)


def few_weights() -> torch.Tensor:
    delta = torch.zeros(40, 50)
    delta.view(-1)[torch.randperm(2000)[:20]] = torch.randn(20)
    return delta


@pytest.mark.parametrize("make", [dense, flat_spectrum_low_rank, few_weights])
@pytest.mark.parametrize("max_error", [0.3, 0.02, 0.004, 1e-3])
def test_the_smallest_encoding_within_the_bound_is_taken(make, max_error):
    delta = make()
    found = encode(delta, max_error)
    decoded = found.decode(delta.shape, delta.dtype)
    reference = torch.linalg.norm((decoded - delta).double()) / torch.linalg.norm(delta.double())
    assert reference <= max_error
    assert len(found.data) < delta.nbytes
    for other in set(ENCODINGS) - {"coded"}:
        others = encode_as(other, delta, max_error)
        if error_of(delta, others.decode(delta.shape, delta.dtype)) <= max_error:
            assert len(others.data) >= len(found.data), other


@pytest.mark.parametrize("max_error", [0.7, 0.5, 0.3, 0.1, 0.02, 0.01])
@pytest.mark.parametrize("shape", [(256, 96), (128, 40, 3, 3)])
def test_steps_take_hardly_more_bits_than_any_code_can(max_error, shape):
    """The rate of normally distributed weights at a squared error D is ½ log₂ 1/D (Shannon); uniform steps need ¼ bit more."""
    delta = torch.randn(shape) * 1e-3
    stored = encode_as("range_coded", delta, max_error)
    error = error_of(delta, stored.decode(delta.shape, delta.dtype))
    assert error <= max_error
    rate = math.log2(1 / error)
    assert rate < 8 * len(stored.data) / delta.numel() < rate + 0.4


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [1e-20, -3e4, 5.0, 0.0], [1.0] * 9, [0.0] * 999 + [1.0], [-1.0]])
@pytest.mark.parametrize("max_error", [0.9, 0.2, 1e-4])
def test_steps_of_any_weights(values, max_error):
    delta = torch.tensor(values)
    decoded = encode_as("range_coded", delta, max_error).decode(delta.shape, delta.dtype)
    assert error_of(delta, decoded) <= max_error
    assert not decoded[delta == 0].any()


@pytest.mark.parametrize(
    ("make", "max_error", "expected"),
    [
        (dense, 0.02, "range_coded"),
        (lambda: torch.randn(7), 1e-3, "float16"),
        (flat_spectrum_low_rank, 0.01, "low_rank"),
        (few_weights, 0.01, "sparse16"),
        (lambda: torch.randn(7) * 1e6, 4e-3, "bfloat16"),
    ],
)
def test_what_suits_a_delta(make, max_error, expected):
    assert encode(make(), max_error).name == expected


@pytest.mark.parametrize("delta", [torch.zeros(4, 4), torch.randn(()), torch.randn(7), torch.randn(5).double()])
def test_any_shape(delta):
    found = encode(delta, 0.1)
    if found is not None:
        assert error_of(delta, found.decode(delta.shape, delta.dtype)) <= 0.1
    assert encode(torch.randn(8, 8), 1e-7) is None
    assert encode(torch.zeros(8, 8), 0.0) is not None


@pytest.fixture
def model():
    model = taps.adapt(NETWORKS["resnet"].make())
    model.add_task("a", num_classes=3)
    for unit in model.units[::2]:
        unit.gates["a"].set(False)
    for unit in model.units:
        for parameter in unit.deltas["a"].parameters():
            torch.nn.init.normal_(parameter, std=0.01)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(("max_error", "share"), [(1e-3, 0.51), (0.02, 0.27)])
def test_task_files_load_transparently_and_are_smaller(model, tmp_path, max_error, share):
    model.save_task("a", tmp_path / "exact")
    model.save_task("a", tmp_path / "small", max_error=max_error)
    exact, small = (load_file(tmp_path / kind / "task.safetensors") for kind in ("exact", "small"))
    sizes = [sum(t.nbytes for key, t in kind.items() if key.startswith("delta/")) for kind in (exact, small)]
    assert sizes[1] <= share * sizes[0]
    assert all(torch.equal(exact[key], small[key]) for key in exact if not key.startswith("delta/"))
    x = torch.randn(2, 3, 40, 40)
    base = taps.adapt(NETWORKS["resnet"].make())
    base.load_base(model.base_state())
    base.load_task(tmp_path / "small")
    base.load_task(tmp_path / "exact", name="b")
    for unit in base.eval().units:
        if unit.gates["a"].decide().uses_delta:
            for name in unit.parameter_names:
                assert 0 < error_of(unit.deltas["b"][name], unit.deltas["a"][name]) <= max_error
    assert torch.equal(base(x, "b"), model(x, "a"))
    shown = show_table(task_file.read_description(tmp_path / "small"))
    assert re.search(r"^layer1\.0\.conv1 .* yes, (range_coded|float16)$", shown, re.MULTILINE)
    torch.testing.assert_close(base(x, "a"), model(x, "a"), rtol=0.1, atol=0.1 * float(model(x, "a").abs().max()))
    torch.testing.assert_close(base.merge("a")(x), base(x, "a"), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_encoded_is_stored_exactly_and_said(model, tmp_path):
    with pytest.warns(
        UserWarning, match=r"task 'a': 10 deltas are stored exactly, no smaller encoding is within max_error 1e-08"
    ):
        model.save_task("a", tmp_path / "a", max_error=1e-8)
    model.save_task("a", tmp_path / "b")
    assert (tmp_path / "a/task.safetensors").read_bytes() == (tmp_path / "b/task.safetensors").read_bytes()
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"max_error must lie in 0\.\.1"):
            model.save_task("a", tmp_path / "c", max_error=wrong)
    assert not (tmp_path / "c").exists()


def test_damaged_encodings_are_refused(model, tmp_path):
    from safetensors.torch import save_file

    model.save_task("a", tmp_path / "a", max_error=0.02)
    path = tmp_path / "a/task.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.startswith("delta/"))
    tensors[key] = tensors[key][:-1].clone()
    size = path.stat().st_size
    save_file(tensors, path)
    description = (tmp_path / "a/task.json").read_text()
    (tmp_path / "a/task.json").write_text(description.replace(f'"bytes": {size}', f'"bytes": {path.stat().st_size}'))
    model.remove_task("a")
    with pytest.raises(ValueError, match=r"delta/.* is damaged"):
        model.load_task(tmp_path / "a")
    (tmp_path / "a/task.json").write_text(
        (tmp_path / "a/task.json").read_text().replace(': "range_coded"', ': "int7"', 1)
    )
    with pytest.raises(ValueError, match="is stored as 'int7', which this library or this file does not know"):
        model.load_task(tmp_path / "a")
    assert "a" not in model.tasks


def test_a_flipped_count_of_positions_asks_for_no_memory():
    from taps.storage.encoding import _gaps, _read_gaps

    stored = np.concatenate([_gaps(torch.tensor([1, 5, 9])).numpy(), np.zeros(6, dtype=np.uint8)])
    assert _read_gaps(stored, 2)[0].tolist() == [1, 5, 9]
    stored[3] |= 0x80  # the highest bit of the count
    with pytest.raises(ValueError, match="positions with values"):
        _read_gaps(stored, 2)
