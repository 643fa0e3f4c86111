"""Import of other programs' checkpoints: fine-tuned networks, LoRA adapters and published checkpoints become tasks of one base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from taps.core.find import find_layers, is_norm
from taps.core.network import fingerprint
from taps.data.classification.folders import task_name
from taps.errors import UserError, first_line
from taps.networks.adapters import Changes, peft_changes, state_dict_changes, taps_checkpoint
from taps.networks.backbones import create_backbone, needs_image_size
from taps.networks.preprocessing import Preprocessing
from taps.networks.published.adashare import read_block_policies
from taps.networks.published.automtl import read_automtl
from taps.networks.published.efficient_mtl import read_efficient_mtl
from taps.networks.published.result import Published, PublishedTask, load
from taps.networks.weights import check_finite
from taps.settings.importing import MULTI_TASK_SOURCES, ImportSettings
from taps.storage.files import read_json, read_tensors, write_tensors
from taps.storage.state_dict import listed, without_counters
from taps.task_model import TaskModel, adapt

#: names of classifiers besides the one that a timm model declares
_CLASSIFIERS = ("fc", "head", "classifier", "heads.head")
#: ResNets by their numbers of blocks and whether these are bottlenecks
_RESNETS = {
    ((2, 2, 2, 2), False): "resnet18", ((3, 4, 6, 3), False): "resnet34", ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101", ((3, 8, 36, 3), True): "resnet152",
}  # fmt: skip


def import_files(settings: ImportSettings, say: Callable[[str], None]) -> None:
    """Write a task's folder for each file, and the base if no other program has it.

    Raises:
        UserError: if a file is not of the kind that was said, does not fit the base, or a task exists.
    """
    paths, out = list(map(Path, settings.files)), Path(settings.out)
    if settings.source in MULTI_TASK_SOURCES:
        _import_published(settings, paths, out, say)
        return
    names = settings.tasks or [task_name(path.stem if path.is_file() else path.name) for path in paths]
    _check_free(names, out, settings)
    classes = [_lines(Path(file)) for file in settings.classes or ()]
    base_file = out / "base.safetensors"
    net, found = _read(settings, paths, base_file if base_file.is_file() else None)
    models: dict[str, TaskModel] = {}
    made: list[tuple[str, TaskModel, dict]] = []
    for index, (path, name, changes) in enumerate(zip(paths, names, found, strict=True)):
        if not changes.head:
            raise UserError(f"{path} has no classifier, which a task needs; its tensors are those of the network alone")
        outputs = len(changes.head["weight"])
        if classes and len(classes[index]) != outputs:
            raise UserError(f"{settings.classes[index]} names {len(classes[index])} classes, {path} has {outputs}")
        check_finite({**changes.deltas, **changes.values, **changes.head}, path)
        method = "finetune" if _loose(net, changes) else "taps"
        if method not in models:
            models[method] = adapt(copy.deepcopy(net), method, norm="task").eval()
        add_changes(models[method], name, changes, path)
        about = {
            "preprocessing": _preprocessing(models[method], settings).describe(settings.cropped),
            "provenance": {"imported": path.name, "from": settings.source},
            **({"classes": classes[index]} if classes else {}),
        }
        made.append((name, models[method], about))
    _check_base(models[method], base_file, names if settings.overwrite else [])
    if settings.source == "taps" or settings.model_path is not None:
        write_tensors(base_file, models[method].base_state())
    for name, model, about in made:
        model.save_task(name, out / name, about, settings.max_error)
        tuned = sum(bool(unit.gates[name].decide().uses_delta) for unit in model.units)
        outputs, layers = model.heads[name].out_features, f"{tuned} of {len(model.units)} layers tuned"
        say(f"{name}: {outputs} classes, {layers}, {_size(model, out / name)}")
    say(f"your own images: taps predict {out} IMAGE…")


def _check_free(names: Sequence[str], out: Path, settings: ImportSettings) -> None:
    twice = [name for name in names if list(names).count(name) > 1]
    if twice:
        raise UserError(f"two tasks would have the name {twice[0]!r}; name them with --tasks")
    for name in names:
        if (out / name).exists() and not settings.overwrite:
            raise UserError(f"{out / name} exists; replace it with --overwrite, or choose another --out or --tasks")


def _check_base(model: TaskModel, file: Path, replaced: Sequence[str]) -> None:
    """Raise a ``UserError`` if the folder has another base, or tasks of another one that are not replaced."""
    if file.exists() and fingerprint(read_tensors(file)) != fingerprint(model.base_state()):
        raise UserError(f"{file} is another base; choose another --out")
    for path in sorted(file.parent.glob("*/task.json")):
        if path.parent.name in replaced:
            continue
        made_for = read_json(path).get("base")
        if isinstance(made_for, Mapping) and made_for.get("fingerprint") != model.fingerprint():
            raise UserError(f"{path.parent} is a task of another base; choose another --out")


def _size(model: TaskModel, folder: Path) -> str:
    size = (folder / "task.safetensors").stat().st_size
    return f"{size:,} bytes, {100 * size / (4 * model.base_parameters):.1f} % of the base"


def _import_published(settings: ImportSettings, paths: list[Path], out: Path, say: Callable[[str], None]) -> None:
    """Write the base and the tasks of a published program with maps as outputs."""
    source = settings.source
    for option in ("model_type", "model_path", "classes"):
        if getattr(settings, option) is not None:
            raise UserError(f"--{option} has no effect with --from {source}: the file says what it needs")
    if source != "efficient_mtl" and len(paths) > 1:
        raise UserError(f"--from {source} takes one checkpoint, which holds all tasks; {len(paths)} were given")
    try:
        found = _read_published(settings, paths)
        _check_free(list(found.tasks), out, settings)
        found.net.taps_origin.update(weights="file", file="base.safetensors")  # type: ignore[union-attr, operator]
        check_finite(found.net.state_dict(), paths[0])
        model = adapt(found.net, found.method, norm=found.norm, train_base=False, **found.options).eval()
        for name, own in found.tasks.items():
            gates = {f"{unit} {key}": tensor for unit, held in own.gates.items() for key, tensor in held.items()}
            check_finite({**own.deltas, **own.norms, **own.head.state_dict(), **gates}, paths[0])
            _add_published(model, name, own, paths[0])
    except UserError:
        raise
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, AttributeError) as error:  # of a damaged file
        reason = first_line(error, 120)
        raise UserError(f"{paths[0]} is damaged or of another program ({type(error).__name__}: {reason})") from None
    base_file = out / "base.safetensors"
    _check_base(model, base_file, list(found.tasks) if settings.overwrite else [])
    write_tensors(base_file, model.base_state())
    prepare = Preprocessing(settings.input_size, settings.resize or settings.input_size, **found.pixels)  # type: ignore[arg-type]
    for name in found.tasks:
        file = paths[list(found.tasks).index(name)] if len(paths) > 1 else paths[0]
        about = {
            "preprocessing": prepare.describe(settings.cropped),
            "provenance": {"imported": file.name, "from": source},
        }
        model.save_task(name, out / name, about, settings.max_error)
        rows = model.report(name)
        run, tuned = sum(row["run"] > 0 for row in rows), sum(row["specific"] > 0 for row in rows)
        say(f"{name}: {run} of {len(rows)} units run, {tuned} with weights of its own, {_size(model, out / name)}")
    say(f"in Python: taps.load({str(out)!r}).predict(images)")


def _read_published(settings: ImportSettings, paths: list[Path]) -> Published:
    if settings.source in ("adashare", "dynashare"):
        policy = Path(settings.policy) if settings.policy else None
        return read_block_policies(paths[0], policy, settings.tasks, settings.target_rates, settings.source)
    if settings.source == "automtl":
        return read_automtl(paths[0], settings.tasks)
    return read_efficient_mtl(paths, settings.tasks)


@torch.no_grad()
def _add_published(model: TaskModel, task: str, own: PublishedTask, path: Path) -> None:
    """Add a task of a published network.

    Raises:
        UserError: for a tensor that the model has no place for.
    """
    features = next(iter(own.head.parameters())).shape[1]
    if features != model.num_features:
        raise UserError(f"{path}: the head of {task} takes {features} features, the network gives {model.num_features}")
    model.add_task(task, head=own.head)
    if own.policy is not None:
        model.follow({task: own.policy})
    _fill(model, task, own.deltas, own.norms, path)
    for unit in model.units:
        gate, given = unit.gates[task], own.gates.get(unit.name, {})
        if own.policy is None:
            gate.fix_support({name: unit.deltas[task][name] != 0 for name in unit.parameter_names})
        state = gate.state_dict()
        gate.load_state_dict({**state, **{key: tensor for key, tensor in given.items() if key in state}})
    if own.policy is None:
        model.policies[task] = tuple((1.0, unit.gates[task].decide().specific) for unit in model.units)


@torch.no_grad()
def _fill(model: TaskModel, task: str, deltas: Mapping[str, Tensor], norms: Mapping[str, Tensor], path: Path) -> None:
    """Give a task its deltas and norms; it is removed if the model has no place for one of them.

    Raises:
        UserError: for a tensor without a place.
    """
    left = {**deltas, **norms}
    for unit in model.units:
        for name in unit.parameter_names:
            delta = left.pop(f"{unit.name}.{name}" if unit.name else name, None)
            if delta is not None:
                unit.deltas[task][name].copy_(delta)
    for norm in model.task_norms:
        if task in norm.norms:
            for name, tensor in norm.norms[task].state_dict(keep_vars=True).items():
                value = left.pop(f"{norm.name}.{name}", None)
                if value is not None:
                    tensor.copy_(value)
    left = without_counters(left)
    if left:
        model.remove_task(task)
        raise UserError(f"{path}: {len(left)} tensors have no place in this network, e.g. {min(left)}")


def _preprocessing(model: TaskModel, settings: ImportSettings) -> Preprocessing:
    """Return the preprocessing of test images: for TAPS the published one, else that of the base's weights."""
    prepare, resize = model.default_preprocessing(settings.input_size), settings.resize
    if settings.source == "taps":
        plain = Preprocessing()
        prepare = replace(plain, input_size=settings.input_size, resize=settings.input_size, published=True)
    return prepare if resize is None else replace(prepare, resize=resize)


def _read(settings: ImportSettings, paths: list[Path], earlier: Path | None) -> tuple[nn.Module, list[Changes]]:
    """Return the base, for TAPS that of an ``earlier`` import if there was one, and each file's changes of it."""
    if settings.source == "taps":
        read = [taps_checkpoint(path) for path in paths]
        base, _ = read[0]
        name = settings.model_type or _resnet_of(base, paths[0])
        weights = settings.model_path or earlier
        net = create_backbone(name, pretrained=False, path=weights)
        shared = {f"{layer}.weight" for layer in read[0][1].scores}
        if weights is None:
            load(net, base, paths[0])
        held = net.state_dict()
        for (own, _), path in zip(read, paths, strict=True):
            shapes = [{k: t.shape for k, t in without_counters(part).items()} for part in (held, own)]
            if shapes[0] != shapes[1]:
                wrong = sorted(key for key in {**shapes[0], **shapes[1]} if shapes[0].get(key) != shapes[1].get(key))
                raise UserError(
                    f"{path} is not of {name}: {len(wrong)} tensors are missing, new or of another shape, {listed(wrong)}"
                )
            other = [key for key in shared if key not in held or not torch.equal(own[key], held[key])]
            if other:
                raise UserError(
                    f"{path} has another base: {len(other)} of {len(shared)} frozen weights differ, e.g. {other[0]}"
                )
        net.taps_origin.update(weights="file", file="base.safetensors")  # type: ignore[union-attr, operator]
        return net, [changes for _, changes in read]
    if settings.model_type is None:
        raise UserError(f"--from {settings.source} needs --model_type, the timm model that was tuned")
    size = {"img_size": settings.input_size} if needs_image_size(settings.model_type, settings.input_size) else {}
    net = create_backbone(settings.model_type, path=settings.model_path, **size)
    base = net.state_dict()
    norms = [name for name, module in net.named_modules() if is_norm(module)]
    declared = (getattr(net, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = tuple(dict.fromkeys([*([declared] if isinstance(declared, str) else declared), *_CLASSIFIERS]))
    read_one = peft_changes if settings.source == "peft" else state_dict_changes
    return net, [read_one(path, base, norms, classifiers) for path in paths]


def _resnet_of(state: Mapping[str, Tensor], path: Path) -> str:
    """The name of the ResNet with these tensors."""
    blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    )
    name = _RESNETS.get((blocks, "layer1.0.conv3.weight" in state))
    if name is None or not timm.is_model(name):
        raise UserError(f"{path} holds none of the ResNets that TAPS was published with; give --model_type")
    return name


def _loose(net: nn.Module, changes: Changes) -> bool:
    """Whether anything besides layers and norms has changed, e.g. position embeddings."""
    layers = {f"{layer.name}.{name}" for layer in find_layers(net) for name in layer.parameter_names}
    return any(key not in layers for key in changes.deltas)


def add_changes(model: TaskModel, task: str, changes: Changes, path: Path) -> None:
    """Add a task with the given deltas, norms and head; gates are open where deltas differ from zero, or as the file says.

    Raises:
        UserError: for a tensor that the model has no place for.
    """
    head = changes.head
    linear = nn.Linear(head["weight"].shape[1], len(head["weight"]), bias="bias" in head)
    if linear.in_features != model.num_features:
        raise UserError(
            f"{path}: the classifier takes {linear.in_features} features, the network gives {model.num_features}"
        )
    linear.load_state_dict(head)
    model.add_task(task, head=linear)
    _fill(model, task, changes.deltas, changes.values, path)
    for unit in model.units if model.method.name == "taps" else ():
        if unit.name in changes.scores:
            with torch.no_grad():
                unit.gates[task].score.fill_(changes.scores[unit.name])
        else:
            unit.gates[task].set(any(bool(unit.deltas[task][name].any()) for name in unit.parameter_names))


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a list of classes: {error}") from None
