"""Sparse deltas: hard-concrete gates against their formulas, supports, files of minimal size, and reuse."""

import json
import math

import numpy as np
import pytest
import torch
from cases import NETWORKS
from conftest import ROOT
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

import taps
from taps.core.accounting import accounting, task_parameters
from taps.data.generated.scenes import render
from taps.methods.activation_gap import distance_to_base
from taps.methods.sparse_delta import HIGH, LOW, chance_open, fix_support, hard_concrete
from taps.reuse.from_base import Reuse
from taps.reuse.video import VideoReuse
from taps.storage.encoding import encode_as

SOME = ("resnet", "vit", "convnext", "series", "perceptron", "torchvision_vit")


def draws(network: str, density: float = 0.05, structure: str = "weight", norm: str = "task") -> taps.TaskModel:
    """Return a model with a base task and a sub-task whose support is fixed."""
    torch.manual_seed(0)
    model = taps.adapt(NETWORKS[network][0](), "sparse_delta", density=density, structure=structure, norm=norm)
    for task in ("base", "sub"):
        model.add_task(task, num_classes=3)
    model.follow({"base": [1.0] * len(model.units)})
    for norm_ in model.task_norms:
        norm_.remove_task("base")
    for unit in model.units:
        for delta in unit.deltas["sub"].parameters():
            nn.init.normal_(delta, std=0.02)
    fix_support(model, "sub")
    return model.eval()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_hard_concrete_is_its_formula(temperature):
    logit = torch.randn(50, dtype=torch.float64, requires_grad=True)
    uniform = torch.rand(50, dtype=torch.float64)
    z = hard_concrete(logit, temperature, uniform=uniform)
    expected = []
    for a, u in zip(logit.tolist(), uniform.tolist(), strict=True):
        u = min(max(u, 1e-4), 1 - 1e-4)
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / temperature))
        expected.append(min(max(LOW + s * (HIGH - LOW), 0.0), 1.0))
    torch.testing.assert_close(z, torch.tensor(expected, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(z.sum(), logit)
    step = 1e-6
    ahead = hard_concrete(logit + step, temperature, uniform=uniform)
    behind = hard_concrete(logit - step, temperature, uniform=uniform)
    torch.testing.assert_close(gradient, ((ahead - behind) / (2 * step)).detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("logit", "open_", "one"), [(5.0, 0.993, 0.967), (0.0, 0.5, 0.166), (-5.0, 0.007, 0.001)])
def test_the_chance_of_being_open_is_that_of_the_draws(logit, open_, one):
    z = hard_concrete(torch.full((200_000,), logit), generator=torch.Generator().manual_seed(0))
    assert chance_open(torch.tensor(logit)).item() == pytest.approx(open_, abs=1e-3)
    assert float((z > 0).float().mean()) == pytest.approx(open_, abs=4e-3)
    assert float((z == 1).float().mean()) == pytest.approx(one, abs=4e-3)


@pytest.mark.parametrize("structure", ["weight", "row"])
def test_the_penalty_is_the_expected_share_and_its_gradient(structure):
    model = taps.adapt(NETWORKS["perceptron"][0](), "sparse_delta", structure=structure).double()
    model.add_task("a", num_classes=2)
    gates = model.gates("a")
    for gate in gates:
        for parameter in gate.parameters():
            nn.init.normal_(parameter)
    total = count = 0.0
    for gate in gates:
        total += sum(1 / (1 + math.exp(-a)) for a in gate.tensor_logits.tolist())
        for shape, logit in zip(gate.shapes.values(), gate.logits, strict=True):
            each = shape.numel() // logit.numel()
            total += each * sum(1 / (1 + math.exp(-a)) for a in logit.flatten().tolist())
            count += shape.numel()
    penalty = model.penalty("a")
    assert penalty.item() == pytest.approx(total / count)
    penalty.backward()
    logit = gates[0].logits[0]
    s = logit.detach().sigmoid()
    each = gates[0].shapes["weight"].numel() // logit.numel()
    torch.testing.assert_close(logit.grad, s * (1 - s) * each / count)


def test_gates_multiply_deltas_and_learn_as_the_published_program_does():
    layer = nn.Linear(4, 3).double()
    model = taps.adapt(nn.Sequential(layer), "sparse_delta").double()
    model.add_task("a", head=nn.Identity())
    unit = model.units[0]
    gate, delta = unit.gates["a"], unit.deltas["a"]["weight"]
    nn.init.normal_(delta)
    nn.init.normal_(gate.logits[0])
    nn.init.constant_(gate.tensor_logits, 0.3)
    model.state.generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 4, dtype=torch.float64)
    y = model(x, "a")
    generator = torch.Generator().manual_seed(1)
    tensors = hard_concrete(gate.tensor_logits, uniform=torch.rand(2, generator=generator).double())
    z = hard_concrete(gate.logits[0], uniform=torch.rand(3, 4, generator=generator).double())
    weight = layer.weight + tensors[0] * z * delta
    torch.testing.assert_close(y, x @ weight.T + layer.bias)
    y.square().sum().backward()
    g = (2 * y.detach()).T @ x  # dL/dw
    torch.testing.assert_close(delta.grad, g * (tensors[0] * z).detach())
    slope = torch.autograd.grad(z.sum(), gate.logits[0], retain_graph=True)[0]
    torch.testing.assert_close(gate.logits[0].grad, g * delta.detach() * tensors[0].detach() * slope)


@pytest.mark.parametrize("network", SOME)
@pytest.mark.parametrize("structure", ["weight", "row"])
def test_zero_deltas_are_the_base_and_supports_keep_their_number(network, structure):
    x = torch.randn(2, *NETWORKS[network][1])
    model = taps.adapt(NETWORKS[network][0](), "sparse_delta", structure=structure, density=0.4).eval()
    model.add_task("a", num_classes=3)
    with torch.no_grad():
        assert torch.equal(model.features(x, "a"), model.features(x))
    for unit in model.units:
        for delta in unit.deltas["a"].parameters():
            nn.init.normal_(delta, std=0.02)
    count = fix_support(model, "a")
    account = accounting(model, "a")
    room = 0.4 * model.base_parameters - account["norm_parameters"]
    largest = max(unit.size for unit in model.units) if structure == "row" else 1
    assert room - largest <= count <= room
    assert count == account["delta_parameters"] == sum(task_parameters(unit, "a") for unit in model.units)
    stored = sum(int(delta.count_nonzero()) for unit in model.units for delta in unit.deltas["a"].parameters())
    assert stored == count


def test_the_largest_changes_stay_and_gates_are_folded():
    model = taps.adapt(nn.Sequential(nn.Linear(10, 10, bias=False)), "sparse_delta", density=0.25)
    model.add_task("a", head=nn.Identity())
    unit = model.units[0]
    delta = unit.deltas["a"]["weight"]
    nn.init.normal_(delta)
    nn.init.normal_(unit.gates["a"].logits[0], std=2.0)
    change = delta.detach() * unit.gates["a"].middle()["weight"]
    fix_support(model, "a")
    chosen = change.abs().flatten().topk(25).indices
    expected = torch.zeros(100)
    expected[chosen] = change.flatten()[chosen]
    torch.testing.assert_close(delta.detach().flatten(), expected)


def test_training_stays_inside_of_the_support():
    model = draws("vit").train()
    before = {
        u.name: {n: d.detach().clone() for n, d in u.deltas["sub"].named_parameters()}
        for u in model.units
        if "sub" in u.deltas
    }
    base = {name: tensor.clone() for name, tensor in model.base_state().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32), "sub").square().sum().backward()
        optimizer.step()
    moved = 0
    for unit in model.units:
        for name, delta in unit.deltas["sub"].named_parameters() if "sub" in unit.deltas else ():
            inside = before[unit.name][name] != 0
            assert not delta[~inside].any()
            moved += int((delta[inside] != before[unit.name][name][inside]).sum())
    assert moved
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.base_state().items())


@pytest.mark.parametrize("count", [4096, 30_000, 400_000])
@pytest.mark.parametrize("density", [0.001, 0.02, 0.05, 0.4])
def test_positions_take_little_more_than_the_least_possible(count, density):
    torch.manual_seed(1)
    delta = torch.randn(count) * (torch.rand(count) < density)
    kept = int(delta.count_nonzero())
    stored = encode_as("sparse32", delta)
    assert torch.equal(stored.decode(delta.shape, delta.dtype), delta)
    entropy = (math.lgamma(count + 1) - math.lgamma(kept + 1) - math.lgamma(count - kept + 1)) / math.log(2)
    assert len(stored.data) <= 1.1 * (4 * kept + entropy / 8) + 8
    if kept > 1000:  # where five bytes of the head are nothing
        assert len(stored.data) <= 1.01 * (4 * kept + entropy / 8)


@pytest.mark.parametrize("network", ["vit", "resnet"])
def test_files_hold_supports_and_values_alone(network, tmp_path):
    model = draws(network, density=0.04)
    x = torch.randn(2, *NETWORKS[network][1])
    with torch.no_grad():
        expected = model(x, "sub")
    model.save_task("sub", tmp_path / "sub")
    account, description = accounting(model, "sub"), json.loads((tmp_path / "sub/task.json").read_text())
    least = 0.0
    tensors = load_file(tmp_path / "sub/task.safetensors")
    for unit in model.units:
        for name in unit.parameter_names if "sub" in unit.deltas else ():
            delta = unit.deltas["sub"][name]
            n, k = delta.numel(), int(delta.count_nonzero())
            least += 4 * k + (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2) / 8
    deltas = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith("delta/"))
    assert deltas <= 1.1 * least
    assert account["delta_parameters"] * 4 < deltas
    assert set(description["encodings"].values()) == {"sparse32"}
    fresh = taps.adapt(NETWORKS[network][0](), "sparse_delta", density=0.04)
    fresh.load_base(model.base_state())
    fresh.load_task(tmp_path / "sub")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x, "sub"), expected)
        torch.testing.assert_close(fresh.merge("sub")(x), expected)
    assert accounting(fresh, "sub")["units"] == account["units"]


def test_the_gap_is_zero_for_the_base_and_pulls_a_task_to_it():
    model = draws("vit").train()
    x = torch.randn(2, 3, 32, 32)
    with distance_to_base(model, x, {}) as gap:
        model(x, "base")
    assert float(gap.value()) == 0.0
    values = []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        with distance_to_base(model, x, {}) as gap:
            model(x, "sub")
        gap.value().backward()
        optimizer.step()
        values.append(gap.value().item())
    assert values[-1] < 0.7 * values[0]


def test_a_loaded_support_goes_on_learning_inside_of_itself(tmp_path):
    model = draws("vit")
    model.save_task("sub", tmp_path / "sub")
    fresh = taps.adapt(NETWORKS["vit"][0](), "sparse_delta", density=0.05)
    fresh.load_base(model.base_state())
    fresh.load_task(tmp_path / "sub", trainable=True)
    count = accounting(fresh, "sub")["delta_parameters"]
    optimizer = torch.optim.SGD([p for p in fresh.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        fresh.train()(torch.randn(2, 3, 32, 32), "sub").square().sum().backward()
        optimizer.step()
    inside = sum(int(delta.count_nonzero()) for unit in fresh.units for delta in unit.deltas["sub"].parameters())
    assert inside <= count == accounting(fresh, "sub")["delta_parameters"]


def test_momentum_of_the_gates_phase_does_not_leave_the_support():
    from torch.utils.data import DataLoader

    from taps.data.multi_label import StreamSampler
    from taps.training.loop import run_phases
    from taps.training.recipe import Recipe

    model = taps.adapt(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), "sparse_delta", density=0.05)
    model.add_task("a", num_classes=3)
    sampler = StreamSampler(32, 8, 4)
    samples = {(i, n): (torch.randn(16), i % 3) for i in range(32) for n in range(9)}
    loader = DataLoader(samples, batch_sampler=sampler)
    run_phases(model, "a", loader, sampler, Recipe(epochs=4, lr=0.1, momentum=0.9))
    for unit in model.units:
        for name, inside in unit.gates["a"].support().items():
            assert not unit.deltas["a"][name][inside == 0].any()


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda m: fix_support(m, "b"), "unknown task 'b'"),
        (lambda m: fix_support(m, "a", 2.0), "density must lie in 0..1"),
        (lambda m: fix_support(m, "a", 1e-6), "has no room for individual weights: the task's own norms take"),
    ],
)
def test_supports_that_cannot_be_fixed(work, message):
    model = taps.adapt(NETWORKS["perceptron"][0](), "sparse_delta")
    model.add_task("a", num_classes=2)
    with pytest.raises(ValueError, match=message):
        work(model)
    other = taps.adapt(NETWORKS["perceptron"][0](), "taps")
    other.add_task("a", num_classes=2)
    with pytest.raises(ValueError, match="task 'a' has no gate on individual weights"):
        fix_support(other, "a")


# -- reuse -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", SOME)
@pytest.mark.parametrize("structure", ["weight", "row"])
def test_without_a_threshold_reuse_is_the_merged_network(network, structure):
    model = draws(network, 0.4, structure)
    x = torch.randn(3, *NETWORKS[network][1])
    reuse = Reuse(model, "base")
    outputs = reuse(x)
    with torch.no_grad():
        torch.testing.assert_close(outputs["sub"], model.merge("sub")(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs["base"], model.merge("base")(x))
    assert reuse.counts["base"].done == reuse.counts["base"].dense
    assert reuse.counts["sub"].done <= reuse.counts["sub"].dense


class AddsInPlace(nn.Module):
    """A network that changes a product's output after it was recorded."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        y = self.first(x)
        y += self.second(y)
        return self.last(y)


@pytest.mark.parametrize("is_pruned", [False, True])
def test_reuse_of_unusual_layers_is_the_merged_network(is_pruned):
    torch.manual_seed(0)
    net = AddsInPlace()
    if is_pruned:  # the weight is computed by a hook
        prune.l1_unstructured(net.first, "weight", 0.5)
    model = taps.adapt(net, "taps")
    for task in ("base", "sub"):
        model.add_task(task, num_classes=2)
        for gate in model.gates(task):
            gate.set(task == "sub")
    changed = "first" if is_pruned else "second"
    unit = next(unit for unit in model.units if unit.name == changed)
    for delta in unit.deltas["sub"].parameters():
        delta.data.normal_()
    x = torch.randn(3, 6)
    torch.testing.assert_close(Reuse(model.eval(), "base")(x)["sub"], model(x, task="sub"))


def test_what_is_equal_is_not_computed_again():
    model = draws("vit", 0.05, norm="follow")
    for unit in model.units[:-3]:
        if "sub" in unit.deltas:
            for delta in unit.deltas["sub"].parameters():
                delta.data.zero_()
            unit.gates["sub"].fix_support(
                {name: torch.zeros(shape, dtype=torch.bool) for name, shape in unit.gates["sub"].shapes.items()}
            )
    calls = []
    reuse = Reuse(model, "base")
    x = torch.randn(2, 3, 32, 32)
    for unit in model.units:
        unit.base.register_forward_hook(lambda module, *_: calls.append(module))
    outputs = reuse(x)
    count = reuse.counts["sub"]
    assert count.done < 0.5 * count.dense
    with torch.no_grad():
        torch.testing.assert_close(outputs["sub"], model(x, "sub"), rtol=1e-4, atol=1e-5)


def test_hooks_of_layers_change_what_is_reused_too():
    model = draws("vit", 0.05)
    reuse, x = Reuse(model, "base"), torch.randn(2, 3, 32, 32)
    model.units[-1].base.register_forward_hook(lambda module, inputs, output: 3 * output)
    outputs = reuse(x)
    with torch.no_grad():
        torch.testing.assert_close(outputs["sub"], model(x, "sub"), rtol=1e-4, atol=1e-4)


def test_frames_may_come_in_one_buffer():
    model = draws("vit", 0.05)
    video = VideoReuse(Reuse(model, "base"), threshold=0.0, key_every=8)
    buffer = np.zeros((1, 3, 32, 32), np.float32)
    for seed in range(3):
        buffer[:] = np.random.default_rng(seed).normal(size=buffer.shape)
        outputs = video(torch.from_numpy(buffer))
        with torch.no_grad():
            for task in ("base", "sub"):
                torch.testing.assert_close(outputs[task], model(torch.from_numpy(buffer), task), rtol=1e-3, atol=1e-3)


def test_larger_errors_leave_out_more_and_change_more():
    model = draws("vit", 0.02, "row")
    images = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    reuse = Reuse(model, "base")
    with torch.no_grad():
        exact = model(images[0], "sub")
    done, wrong = [], []
    for error in (0.0, 0.05, 0.2, 1.0):
        reuse.calibrate(images, error, rounds=1)
        reuse.merged = {}
        for setting in reuse.settings["sub"].values():
            setting.dense = False
        wrong.append(float((reuse(images[0])["sub"] - exact).norm() / exact.norm()))
        done.append(reuse.counts["sub"].done / reuse.counts["sub"].dense)
        beside = reuse.beside_dense(images[0], rounds=1)["sub"]
        assert 0 < beside["macs"] <= 1
        assert beside["time"] > 0
    assert done == sorted(done, reverse=True)
    assert done[-1] < 0.6 * done[0]
    assert wrong[0] < 1e-4 < wrong[-1]


def test_the_merged_layer_takes_over_where_it_is_faster(monkeypatch):
    model = draws("vit")
    reuse = Reuse(model, "base")
    monkeypatch.setattr("taps.reuse.from_base._slower", lambda *arguments: True)
    images = [torch.randn(2, 3, 32, 32)]
    reuse.calibrate(images, 0.1, by_time=True)
    assert all(setting.dense for setting in reuse.settings["sub"].values())
    reuse.merged = {}
    with torch.no_grad():
        assert torch.equal(reuse(images[0])["sub"], model(images[0], "sub"))
    assert reuse.counts["sub"].done == reuse.counts["sub"].dense


def test_a_task_that_gains_nothing_is_run_as_its_merged_network(monkeypatch):
    model = draws("vit")
    reuse, images = Reuse(model, "base"), torch.randn(2, 3, 32, 32)
    monkeypatch.setattr(Reuse, "beside_dense", lambda self, x, rounds: {"sub": {"macs": 1.0, "time": 1.2}})
    reuse.calibrate(images, 0.1, by_time=True)
    monkeypatch.undo()
    assert list(reuse.merged) == ["sub"]
    with torch.no_grad():
        assert torch.equal(reuse(images)["sub"], model.merge("sub")(images))
    assert list(reuse(images)) == ["base", "sub"]
    assert reuse.beside_dense(images)["sub"] == {"macs": 1.0, "time": 1.0}


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda r, m: r.calibrate([torch.randn(1, 3, 32, 32)], 0.1), "cannot be calibrated on 1 images"),
        (lambda r, m: r.calibrate([torch.randn(2, 3, 32, 32)], -0.1), "has to be at least 0"),
        (lambda r, m: r.calibrate([torch.randn(2, 3, 32, 32)], "5%"), "has to be at least 0, not '5%'"),
        (lambda r, m: r.calibrate([torch.randn(2, 3, 32, 32)], 0.1, rounds=0), "in 1 round or more"),
        (lambda r, m: r.calibrate([torch.randn(0, 3, 32, 32), torch.randn(1, 3, 32, 32)], 0.1), "on 1 images"),
        (lambda r, m: r.calibrate([(torch.randn(2, 3, 32, 32), torch.zeros(2))], 0.1), "images, not on a tuple"),
        (lambda r, m: VideoReuse(r, threshold=float("nan")), "a threshold of at least 0"),
        (lambda r, m: Reuse(m, "sub"), "task 'sub' has weights of its own"),
        (lambda r, m: Reuse(m, "bse"), "did you mean 'base'"),
        (
            lambda r, m: [v := VideoReuse(r), v(torch.randn(1, 3, 32, 32)), v(torch.randn(2, 3, 32, 32))],
            "a frame of shape",
        ),
        (lambda r, m: VideoReuse(r, key_every=0), "key frames every 1 or more"),
        (lambda r, m: VideoReuse(r, split=99), "a split in 0..9"),
    ],
)
def test_mistakes_of_reuse_are_named(work, message):
    model = draws("vit")
    with pytest.raises(ValueError, match=message):
        work(Reuse(model, "base"), model)


@pytest.fixture
def clip(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from reuse import clip

    return clip


@pytest.mark.parametrize("split", [None, 0, 4])
def test_video_without_a_threshold_is_frame_by_frame(clip, split):
    model = draws("vit", 0.05, "row")
    reuse = Reuse(model, "base")
    video = VideoReuse(reuse, key_every=3, split=split)
    frames = [
        torch.from_numpy(np.ascontiguousarray(f["image"])).permute(2, 0, 1)[None].float() / 255
        for f in clip(1, 5, (32, 32))
    ]
    for number, x in enumerate(frames):
        outputs = video(x, number)
        with torch.no_grad():
            for task in ("base", "sub"):
                torch.testing.assert_close(outputs[task], model(x, task), rtol=1e-4, atol=1e-5)


def test_a_still_camera_costs_nothing_and_frames_come_in_order():
    model = draws("vit")
    video = VideoReuse(Reuse(model, "base"), key_every=3, split=0)
    x = torch.randn(1, 3, 32, 32)
    shares = []
    for number in range(4):
        video(x, number)
        shares.append(video.reuse.counts["base"].done / video.reuse.counts["base"].dense)
    assert shares[0] == shares[3] == 1.0  # key frames
    assert shares[1:3] == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"frame 7 came after frame 3: give frames in order, or call reset\(\)"):
        video(x, 7)
    video.reset()
    video(x, 7)
    assert video.frame == 7


def test_small_changes_add_up_until_they_count():
    model = draws("perceptron", 0.4)
    video = VideoReuse(Reuse(model, "base"), threshold=0.15, key_every=100)
    x = torch.ones(1, 5)
    video(x)
    moved = []
    for step in range(1, 8):
        video(x * (1 + 0.03 * step))
        moved.append(video.reuse.counts["base"].done > 0)
    assert not moved[0]
    assert any(moved)


def test_a_moving_camera_sees_the_same_room(clip):
    still = render(np.random.default_rng(3), (32, 32), 0.5)
    frames = list(clip(3, 4, (32, 32), speed=0.05))
    assert np.array_equal(frames[0]["depth"], still["depth"])
    assert np.array_equal(frames[0]["semseg"], still["semseg"])
    changed = [float((frame["semseg"] != still["semseg"]).mean()) for frame in frames]
    assert changed[0] == 0 < changed[3] < 0.5
    assert not np.array_equal(frames[0]["image"], frames[1]["image"])


def test_what_comes_before_the_chosen_layers_is_computed_once():
    torch.manual_seed(0)
    model = taps.adapt(NETWORKS["vit"][0](), "sparse_delta", where=r"blocks\.1\.", density=0.1, norm="follow")
    for task in ("base", "sub"):
        model.add_task(task, num_classes=3)
    model.follow({"base": [1.0] * len(model.units)})
    for unit in model.units:
        for delta in unit.deltas["sub"].parameters() if "sub" in unit.deltas else ():
            nn.init.normal_(delta, std=0.02)
    fix_support(model, "sub")
    assert {unit.name.split(".")[1] for unit in model.units if task_parameters(unit, "sub")} == {"1"}
    reuse, x = Reuse(model.eval(), "base"), torch.randn(2, 3, 32, 32)
    outputs = reuse(x)
    assert reuse.counts["sub"].done < 0.55 * reuse.counts["sub"].dense
    with torch.no_grad():
        torch.testing.assert_close(outputs["sub"], model.merge("sub")(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "("}, r"where='\(' is not a valid regular expression"),
        ({"structure": "blocks"}, "structure must be one of weight, row"),
        ({"density": 0.0}, "density must lie in 0..1"),
        ({"density": 1.2}, "density must lie in 0..1"),
        ({"init": 99.0}, "init must lie in"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        taps.adapt(NETWORKS["perceptron"][0](), "sparse_delta", **options)
