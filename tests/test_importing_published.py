"""Checkpoints of AdaShare, DynaShare, AutoMTL and efficient computation sharing, and weights of MultiMAE."""

import copy
import pickle

import published_programs as theirs
import pytest
import torch
from torch import nn

import taps
from taps.metrics.losses import to_size
from taps.networks.dense_backbones import create_dense_backbone
from taps.networks.published.automtl import _in_order

RATES = (1, 1, 1, 0.5, 0.5, 1, 0.5, 0.5)
IMPORT = "taps import"


def pictures(side: int = 48) -> torch.Tensor:
    """RGB pixels 0..255."""
    return torch.randint(0, 256, (3, 3, side, side), generator=torch.Generator().manual_seed(0)).float()


def as_published(rgb: torch.Tensor) -> torch.Tensor:
    """BGR without its mean, as the programs on convolutional networks see images."""
    return rgb.flip(1) - torch.tensor([104.00698793, 116.66876762, 122.67891434])[:, None, None]


def prepared(model: taps.TaskModel, task: str, rgb: torch.Tensor) -> torch.Tensor:
    """The same images, normalised as the imported task says."""
    said = model.preprocessing_of(task)
    mean, std = (torch.tensor(said[name])[:, None, None] for name in ("mean", "std"))
    return (rgb / 255 - mean) / std


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("program", ["adashare", "dynashare"])
def test_networks_under_policies(program, here, tmp_path):
    torch.manual_seed(0)
    net = theirs.ManyTasks((5, 3), gated=program == "dynashare").eval()
    theirs.shake(net)
    choose = torch.tensor([[1, 0, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 0, 1, 1, 1]])
    policies = [torch.stack([own, 1 - own], dim=1) for own in choose]
    torch.save({"mtl-net": net.state_dict(), "iter": 3, "temp": 1.0}, tmp_path / "best_model.pth.tar")
    with (tmp_path / "policy.pickle").open("wb") as file:
        pickle.dump({f"task{index}_policy": own for index, own in enumerate(policies, start=1)}, file)
    rates = ("--target_rates", *RATES) if program == "dynashare" else ()
    arguments = ("best_model.pth.tar", "--from", program, *rates, "--tasks", "seg", "normals")
    none = here(IMPORT, *arguments, check=2)
    assert "its logits are as at the start): it was trained under one that lies beside it" in none.stderr
    assert not (tmp_path / "results").exists()
    done = here(IMPORT, *arguments, "--policy", "policy.pickle")
    assert "seg: 6 of 8 units run, 0 with weights of its own, " in done.stdout
    model, rgb = taps.load(tmp_path / "results/imported"), pictures()
    found = model.predict(prepared(model, "seg", rgb))
    active = RATES if program == "dynashare" else (1,) * 8
    with torch.no_grad():
        for index, task in enumerate(("seg", "normals"), start=1):
            assert close(found[task], net(as_published(rgb), index, policies[index - 1], active)), task
    logits = torch.where(choose.bool(), 1.0, -1.0)
    for index, own in enumerate(logits, start=1):
        net.get_parameter(f"task{index}_logits").data[:, 0] = own
    torch.save({"mtl-net": {f"module.{k}": t for k, t in net.state_dict().items()}}, tmp_path / "best_model.pth.tar")
    here(IMPORT, *arguments, "--out", "again")  # the most probable policy of the logits
    again = taps.load(tmp_path / "again")
    assert again.policies == model.policies
    assert torch.equal(again.predict(prepared(model, "seg", rgb))["seg"], found["seg"])
    theirs.shake(net)
    torch.save({"mtl-net": net.state_dict()}, tmp_path / "other_model.pth.tar")
    (tmp_path / "again/base.safetensors").unlink()  # as if its tasks were of a network of timm's
    other = ("other_model.pth.tar", *arguments[1:-2], "a", "b", "--out", "again")
    refused = here(IMPORT, *other, check=2)
    assert "again/normals is a task of another base; choose another --out" in refused.stderr


def test_networks_with_layers_of_their_own(here, tmp_path):
    torch.manual_seed(0)
    draw = torch.randint(0, 3, (2, 52), generator=torch.Generator().manual_seed(1)).tolist()
    net = create_dense_backbone("mobilenetv2_100", output_stride=32)
    layers = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    keep = [module.in_channels == module.out_channels and module.stride == (1, 1) for module in layers]
    choices = {
        task: [choice if choice < 2 or same else 1 for choice, same in zip(own, keep, strict=True)]
        for task, own in zip(("segment_semantic", "depth_zbuffer"), draw, strict=True)
    }
    state, nets = theirs.of_automtl({"segment_semantic": 5, "depth_zbuffer": 1}, choices)
    torch.save({"iter": 1, "state_dict": state, "optimizer": {}}, tmp_path / "post_train.model")
    here(IMPORT, "post_train.model", "--from", "automtl")
    model, rgb = taps.load(tmp_path / "results/imported"), pictures(64)
    found = model.predict(prepared(model, "depth_zbuffer", rgb))
    with torch.no_grad():
        for task, plain in nets.items():
            assert close(found[task], plain(as_published(rgb))), task
    state["net.0.policy.depth_zbuffer"] = torch.tensor([0.0, 0.0, 1.0])
    torch.save(state, tmp_path / "skips.model")
    refused = here(IMPORT, "skips.model", "--from", "automtl", "--out", "x", check=2)
    assert "task 'depth_zbuffer' replaces conv_stem by a convolution of its own" in refused.stderr
    here(IMPORT, "skips.model", "--from", "automtl", "--out", "x", "--tasks", "segment_semantic")  # that task does not
    assert taps.load(tmp_path / "x").tasks == ["segment_semantic"]


def test_shortcuts_of_residual_blocks_come_before_their_layers():
    names = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]
    assert _in_order(names) == [*names[:3], names[5], names[3], names[4]]


def sub_task(base: nn.Module, task: str, outputs: int) -> tuple[nn.Module, dict]:
    """A network that differs from the base in a few weights, norms and the global token, and the program's file of it."""
    net = theirs.Transformer(task, outputs).eval()
    own = {key: tensor for key, tensor in base.state_dict().items() if not key.startswith("output")}
    net.load_state_dict({**net.state_dict(), **own})
    parameters = {}
    for name, parameter in net.named_parameters():
        before = parameter.detach().clone()
        if parameter.requires_grad and not name.startswith("output"):
            inside = torch.rand(parameter.shape) < 0.02
            parameter.data.add_(inside * 0.1 * torch.randn(parameter.shape))
        parameters[f"module.{name}"] = [before, torch.zeros_like(before), torch.zeros_like(before)]
    return net, {"model": {f"module.{k}": t for k, t in net.state_dict().items()}, "depth_params": parameters}


def test_sub_tasks_of_a_transformer(here, tmp_path):
    torch.manual_seed(0)
    base = theirs.Transformer("semseg", 5).eval()
    nets = {"semseg": base}
    torch.save({"model": base.state_dict(), "epoch": 3}, tmp_path / "semseg.pth")
    for task, outputs in (("sal", 2), ("edge", 1)):
        nets[task], file = sub_task(base, task, outputs)
        torch.save(file, tmp_path / f"{task}.pt")
    here(IMPORT, "semseg.pth", "sal.pt", "edge.pt", "--from", "efficient_mtl")
    model = taps.load(tmp_path / "results/imported")
    x = torch.randn(2, 3, 32, 32)
    found = model.predict(x)
    with torch.no_grad():
        for task, net in nets.items():
            assert close(to_size(found[task], (32, 32)), net(x)), task
            assert close(model.merge(task)(x), found[task]), task
    files = {task: (tmp_path / f"results/imported/{task}/task.safetensors").stat().st_size for task in nets}
    assert files["sal"] - files["semseg"] < 0.05 * 4 * model.base_parameters  # 2 % of the weights, and norms
    _, file = sub_task(theirs.Transformer("semseg", 5), "sal", 2)
    torch.save(file, tmp_path / "other.pt")
    refused = here(IMPORT, "semseg.pth", "other.pt", "--from", "efficient_mtl", "--out", "x", check=2)
    assert "other.pt has another base than semseg.pth: " in refused.stderr
    assert not (tmp_path / "x").exists()


def test_weights_of_multimae_are_where_networks_start(tmp_path):
    torch.manual_seed(0)
    net = theirs.Transformer("rgb", 3).eval()
    state = {**net.state_dict(), "input_adapters.depth.proj.weight": torch.zeros(3)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    x = torch.randn(2, 3, 32, 32)
    dense = create_dense_backbone("vit_tiny_patch16_224", path=tmp_path / "mae.pth", image_size=(32, 32)).eval()
    embedded = (net.input_adapters["rgb"].proj(x) + net.input_adapters["rgb"].pos_emb).flatten(2).transpose(1, 2)
    with torch.no_grad():
        tokens = net.encoder(torch.cat([embedded, net.global_tokens.expand(2, -1, -1)], dim=1))
        assert close(dense(x), tokens[:, :-1].transpose(1, 2).unflatten(2, (2, 2)))
        with pytest.warns(UserWarning, match="MultiMAE has no last norm"):
            plain = taps.create_backbone("vit_tiny_patch16_224", path=tmp_path / "mae.pth", img_size=32).eval()
        assert close(plain(x), plain.norm(tokens[:, -1]))


def changed(net: nn.Module, **changes) -> dict:
    state = copy.deepcopy(net.state_dict())
    for key, value in changes.items():
        state[key.replace("__", ".")] = value
    return {key: value for key, value in state.items() if value is not None}


class Code:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("other.pth", "--from", "adashare"),
            "other.pth is not a checkpoint of adashare: it has no backbone.blocks; it has weight",
        ),
        (("other.pth", "--from", "automtl"), "other.pth is not a checkpoint of AutoMTL"),
        (("other.pth", "--from", "efficient_mtl"), "other.pth is not a checkpoint of efficient computation sharing"),
        (("ada.pth", "--from", "dynashare"), "ada.pth has no per-image gates; say --from adashare"),
        (("dyna.pth", "--from", "adashare"), "dyna.pth has per-image gates; say --from dynashare"),
        (
            ("dyna.pth", "--from", "dynashare"),
            "does not say which blocks have per-image gates: give its --target_rates",
        ),
        (("dyna.pth", "--from", "dynashare", "--target_rates", 1, 0.5), "--target_rates has 2 values for 8 blocks"),
        (("ada.pth", "--from", "adashare", "--tasks", "a"), "ada.pth has 2 tasks, --tasks names 1"),
        (("volumes.pth", "--from", "adashare"), "the fork for ABCD, which adds every residual twice"),
        (
            ("stays.pth", "--from", "dynashare"),
            "a network for hospital stays, in which hours and features are exchanged",
        ),
        (
            ("lacking.pth", "--from", "adashare"),
            "lacking.pth does not fit ResNet: 1 missing (layer1.0.bn1.running_mean)",
        ),
        (("more.pth", "--from", "adashare"), "more.pth does not fit ResNet: 1 unexpected or of another shape (extra)"),
        (
            ("ada.pth", "--from", "adashare", "--policy", "code.pickle"),
            "not a policy of AdaShare (UnpicklingError: builtins.print)",
        ),
        (("ada.pth", "--from", "adashare", "--policy", "short.pickle"), "holds no policy of 2 tasks and 8 blocks"),
        (("ada.pth", "--from", "adashare", "--policy", "none.pickle"), "none.pickle does not exist"),
        (("surplus.pth", "--from", "adashare"), "surplus.pth: 1 tensors are unknown (surplus)"),
        (("headless.pth", "--from", "adashare"), "headless.pth has no ASPP head (task1_fc1_c0); it has task1_logits"),
        (("stageless.pth", "--from", "adashare"), "stageless.pth is damaged or of another program (ValueError: "),
        (("chosen.pth", "--from", "adashare"), "chosen.pth holds no policy (its logits are as at the start)"),
        (("random.pth", "--from", "adashare"), "random.pth holds no policy (its logits are as at the start)"),
        (("nan.pth", "--from", "adashare"), "nan.pth holds values that are not finite in 1 tensors, e.g. bn1.weight"),
        (("ada.pth", "--from", "adashare", "--tasks", "a", "a"), "--tasks names 'a' twice"),
        (
            ("gates.pth", "--from", "dynashare", "--target_rates", 0.5),
            "gates.pth is damaged or of another program (RuntimeError: ",
        ),
        (("ada.pth", "ada.pth", "--from", "adashare"), "takes one checkpoint, which holds all tasks; 2 were given"),
        (
            ("ada.pth", "--from", "adashare", "--model_type", "resnet18"),
            "--model_type has no effect with --from adashare",
        ),
        (
            ("ada.pth", "--from", "adashare", "--target_rates", 1),
            "--target_rates has no effect with --from adashare",
        ),
        (("code.pth", "--from", "adashare"), "code.pth is not a file of plain tensors, and nothing else is unpickled"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_imported_is_one_line(here, tmp_path, arguments, message):
    torch.manual_seed(0)
    net, gated = theirs.ManyTasks((5, 3)), theirs.ManyTasks((5, 3), gated=True)
    files = {
        "other.pth": nn.Linear(2, 2).state_dict(),
        "ada.pth": changed(net, task1_logits=torch.rand(8, 2)),
        "dyna.pth": changed(gated, task1_logits=torch.rand(8, 2)),
        "volumes.pth": changed(net, backbone__conv1__weight=torch.zeros(8, 3, 7, 7, 7)),
        "stays.pth": changed(gated, backbone__conv1__weight=torch.zeros(8, 3, 7)),
        "lacking.pth": changed(net, backbone__blocks__0__0__bn1__running_mean=None),
        "more.pth": changed(net, backbone__extra=torch.zeros(2)),
        "surplus.pth": changed(net, surplus=torch.zeros(2)),
        "headless.pth": {key: tensor for key, tensor in net.state_dict().items() if "fc1" not in key},
        "stageless.pth": {
            key: tensor for key, tensor in net.state_dict().items() if "blocks.3" not in key and "ds.3" not in key
        },
        "chosen.pth": changed(net, **{f"task{index}_logits": torch.tensor([[0.0, -10.0]] * 8) for index in (1, 2)}),
        "random.pth": changed(net, **{f"task{index}_logits": 1e-3 * torch.randn(8, 2) for index in (1, 2)}),
        "nan.pth": changed(net, task1_logits=torch.rand(8, 2), backbone__bn1__weight=torch.full((64,), torch.nan)),
        "gates.pth": changed(
            gated, task1_logits=torch.rand(8, 2), backbone__blocks__2__0__fc1__weight=torch.zeros(16, 7, 1, 1)
        ),
        "code.pth": {"weight": Code()},
    }
    for name in {str(one) for one in arguments} & files.keys():
        torch.save(files[name], tmp_path / name)
    (tmp_path / "code.pickle").write_bytes(pickle.dumps({"task1_policy": Code()}))
    (tmp_path / "short.pickle").write_bytes(pickle.dumps({"task1_policy": torch.tensor([[1, 0]])}))
    done = here(IMPORT, *arguments, check=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()
