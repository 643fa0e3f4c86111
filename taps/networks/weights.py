"""Loading of weight files into a backbone, whichever program wrote them."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from taps.errors import UserError
from taps.networks.classifier import AUXILIARY
from taps.networks.multimae import for_network, is_multimae
from taps.networks.torchvision_weights import counterpart, from_torchvision
from taps.storage.state_dict import does_not_fit, listed, read_checkpoint

State = dict[str, Tensor]
#: names of classifiers
_CLASSIFIERS = ("fc", "head", "head_dist", "heads", "classifier", "last_linear", *AUXILIARY)
#: of several networks in one file, the one that is meant: the query encoder of contrastive training, the averaged teacher
_PREFERRED = ("encoder_q.", "base_encoder.", "teacher.", "ema.", "ema_model.", "online_encoder.", "backbone.")
#: buffers that networks compute themselves
_COMPUTED = (
    "num_batches_tracked", "relative_position_index", "relative_coords_table", "attn_mask", "total_ops", "total_params",
)  # fmt: skip


def load_weights(net: nn.Module, path: str | Path, own: bool = False) -> None:
    """Load a local file into a backbone; every tensor of the backbone has to be in it.

    Names may have any prefix (``module.``, ``model.``, ``encoder_q.``, ``backbone.``). A classifier in the file is left out,
    with a warning, since tasks have their own heads. Known are

    * timm's names, also for another image size, to which position embeddings and window sizes are resampled as timm does with
      downloaded weights;
    * torchvision's names, see :func:`taps.networks.torchvision_weights.from_torchvision`;
    * MultiMAE's names, of which the encoder of RGB images is taken;
    * the names of some authors' own programs, which timm's networks convert;
    * the same sequence of tensors as the network's (same shapes and last parts of names) under other names, with a warning.

    Args:
        net: a backbone without classifier, which is not changed if the file does not fit.
        path: a file as :func:`taps.storage.state_dict.read_state_dict` reads it.
        own: the file is the one that is known to belong to this network, so that nothing is said.

    Raises:
        UserError: in one line, with a file that lists all missing keys, unexpected keys and keys of another shape; or if these
            are weights of a network of torchvision's that computes something else.
    """
    wanted = net.state_dict()
    remarks: list[str] = []
    given, said = read_checkpoint(path)
    state = without_prefix(given, wanted, Path(path).name)
    if is_multimae(state):
        state = for_network(state, wanted, embeds_class=not getattr(net, "no_embed_class", False))
        if "norm.weight" in state:
            remarks.append("MultiMAE has no last norm: that of the network stays as it is")
    check_finite(state, path)
    # torchvision's names are compared by outputs, and base.safetensors is what runs of this library write
    is_sure = own or not set(wanted) <= set(state) or Path(path).name == "base.safetensors"
    _check_architecture(_name(net), said, is_sure, Path(path).name, remarks)
    fitted = _fitted(net, state, wanted, remarks)
    if fitted is None:
        state, _ = _without_classifier(_filtered(net, state), wanted)
        differences = {
            "missing": [key for key in wanted if key not in state and not key.endswith(_COMPUTED)],
            "unexpected": [key for key in state if key not in wanted and not key.endswith(_COMPUTED)],
            "of another shape": [
                f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
                for key in wanted
                if key in state and state[key].shape != wanted[key].shape
            ],
        }
        raise does_not_fit(path, _name(net), differences)
    net.load_state_dict(fitted, strict=False)
    for remark in remarks if not own else ():
        warnings.warn(f"{Path(path).name}: {remark}", stacklevel=3)


def _check_architecture(name: str, said: str | None, is_sure: bool, file: str, remarks: list[str]) -> None:
    """Refuse a file that says it holds the twin that was trained in TensorFlow, or the reverse; remark on what it leaves open."""
    twin = name[3:] if name.startswith("tf_") else f"tf_{name}"
    if said == twin:
        raise UserError(f"{file} says it holds {said}, which pads its images otherwise than {name}; use {said}")
    if said is not None and said != name:
        remarks.append(f"it says it holds {said}, and is taken for {name}")
    elif said is None and not is_sure and timm.is_model(twin):
        remarks.append(
            f"{name} and {twin} have the same tensors but pad images otherwise, and it does not say which it holds"
        )


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a ``UserError`` if a file's tensors hold values that are not finite."""
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{path} holds values that are not finite in {len(broken)} tensors, e.g. {broken[0]}")


def _name(net: nn.Module) -> str:
    return (getattr(net, "pretrained_cfg", None) or {}).get("architecture") or type(net).__name__


def _fitted(net: nn.Module, state: State, wanted: State, remarks: list[str]) -> State | None:
    """The tensors with the network's names and shapes, or ``None``; remarks for the user are added to ``remarks``."""
    for candidate in (lambda: state, lambda: _filtered(net, state)):  # the filters of timm cost time and may fail
        found, left_out = _without_classifier(candidate(), wanted)
        if _fits(found, wanted):
            if left_out:
                remarks.append(f"its classifier {left_out} is left out: each task has a head of its own")
            return found
    converted = from_torchvision(net, state) if counterpart(net) else None
    if converted is not None:
        for candidate in (converted, _filtered(net, converted)):
            if _fits(candidate, wanted):
                remarks.append("its classifier is left out: each task has a head of its own")
                return candidate
    found = _by_position(state, wanted)
    if found is not None:
        remarks.append(
            f"its names ({listed(state, 2)}) are unknown, so its tensors are taken in their order; compare an output with the "
            "program that wrote it"
        )
    return found


def _fits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    needed = {key for key in wanted if not key.endswith(_COMPUTED)}
    given = {key for key in state if not key.endswith(_COMPUTED)}
    return needed == given and all(state[key].shape == wanted[key].shape for key in needed)


def without_prefix(state: State, wanted: State, name: str) -> State:
    """The part of a state dict below the prefix that yields the most of the wanted names; else without what all names share.

    Raises:
        UserError: if several parts would do.
    """
    hits: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for depth in range(min(len(parts), 6)):
            if ".".join(parts[depth:]) in wanted:
                hits["".join(f"{part}." for part in parts[:depth])] += 1
    if hits and max(hits.values()) >= len(wanted) / 2:
        best = [prefix for prefix, count in hits.items() if count == max(hits.values())]
        preferred = [prefix for want in _PREFERRED for prefix in best if want in prefix]
        if len(best) > 1 and not preferred:
            raise UserError(f"{name} holds several networks ({listed(best, 4)}); save the one that is meant alone")
        prefix = preferred[0] if len(best) > 1 else best[0]
        return {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
    while len(shared := {key.split(".", 1)[0] for key in state}) == 1 and all("." in key for key in state):
        if any(key.startswith(f"{min(shared)}.") for key in wanted):
            break
        state = {key.split(".", 1)[1]: tensor for key, tensor in state.items()}
    return state


def _without_classifier(state: State, wanted: State) -> tuple[State, str]:
    """The tensors of a state dict other than a classifier's, and the classifier's name and width."""
    extra = {key for key in state if key not in wanted and key.split(".")[0] in _CLASSIFIERS}
    weights = [
        key for key in extra if key.endswith("weight") and state[key].dim() == 2 and not key.startswith(AUXILIARY)
    ]
    text = max((f"{key.rpartition('.')[0]} ({len(state[key])} classes)" for key in weights), default="")
    return {key: tensor for key, tensor in state.items() if key not in extra}, text


def _filtered(net: nn.Module, state: State) -> State:
    """The tensors as timm's own loading of this kind of network converts them."""
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on how timm indexes
            return dict(convert(dict(state), net))
    except Exception:  # made for known files, it raises anything on others
        return state


def _by_position(state: State, wanted: State) -> State | None:
    """``state`` with the names of ``wanted`` if both are the same sequence of tensors, else ``None``."""
    given, names = list(state.items()), list(wanted)
    if len(given) - len(names) in (1, 2) and all(tensor.dim() <= 2 for _, tensor in given[len(names) :]):
        given = given[: len(names)]  # the classifier at the end
    if len(given) != len(names):
        return None
    for (theirs, tensor), ours in zip(given, names, strict=True):
        if theirs.rsplit(".", 1)[-1] != ours.rsplit(".", 1)[-1] or tensor.shape != wanted[ours].shape:
            return None
    return {ours: tensor for (_, tensor), ours in zip(given, names, strict=True)}
