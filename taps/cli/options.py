"""Parsing of a command line, a ``--config`` file and presets into a program's settings, without importing torch."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from taps.errors import UserError
from taps.methods.registry import catalog
from taps.settings.adaptation import AdaptationSettings, EvaluateSettings, JointSettings, SequentialSettings
from taps.settings.choices import OF_PENALTIES
from taps.settings.data import SubjectsSettings
from taps.settings.declare import Parser, Settings, build, declarations, make_parser, not_one_of, read_config
from taps.settings.importing import MULTI_TASK_SOURCES, ImportSettings
from taps.settings.multi_task import MultiTaskSettings
from taps.settings.prediction import PredictSettings
from taps.settings.presets import as_published, demo, published, published_taps
from taps.settings.published_files import places_of_subjects, translate
from taps.settings.serving import ServeSettings
from taps.settings.task_names import GENERATED, aliases, file_names

S = TypeVar("S", bound=Settings)
A = TypeVar("A", bound=AdaptationSettings)

#: characters of names of data sets in that of a results folder, and of a folder's name
_LONGEST_NAME, _LONGEST_PART = 100, 255
#: entries of settings.json that are not settings, or are derived from others
_DERIVED = ("versions", "commit", "command", "resize", "tasks", "data")
#: settings class -> what makes its settings of a settings file of a published program
_OF_PUBLISHED = {MultiTaskSettings: translate, SubjectsSettings: places_of_subjects}


def parser_of(kind: type[Settings]) -> Parser:
    """Return the parser of a program's settings; its help shows presets, and says what each method of the program does."""
    if kind is MultiTaskSettings:
        presets = {"Scenes": _of_scenes()}
        methods = {**catalog(without=("budget",)), "single_task": "one network per task"}
    elif issubclass(kind, AdaptationSettings):
        presets = {"demo": demo(), "demo with --budget": demo(budget=True)}
        methods = catalog(without=("policy_gate",) if kind is JointSettings else ("policy_gate", "trains_base"))
    else:
        return make_parser(kind)
    parser = make_parser(kind, presets)
    action = parser._option_string_actions["--method"]
    action.metavar = "{" + ",".join(methods) + "}"  # checked once the command line and the file are combined
    summaries = "; ".join(f"{name}: {summary}" for name, summary in methods.items()).replace("%", "%%")
    action.help = "; ".join(filter(None, (summaries, action.help)))
    return parser


def _of_scenes() -> dict[str, Any]:
    """Return the settings for Scenes: those of one method, as their help says, with that method, the others with AdaShare."""
    found = {}
    for name, declared in declarations(MultiTaskSettings).items():
        method = declared.help.partition(":")[0]
        found[name] = published("scenes", None, method if method in catalog() else "adashare").get(name)
    return {**found, "input_size": None}  # which is that of other benchmarks


def parse(kind: type[S], arguments: Sequence[str]) -> S:
    """Parse settings of which none depends on another."""
    return _built(kind, _given(kind, arguments))


def _built(kind: type[S], given: Mapping[str, Any]) -> S:
    """Return settings with what is given, which has to be all that they require."""
    settings = build(kind, given)
    if not all(getattr(settings, name) for name in kind.required):
        raise UserError(kind.missing)
    return settings


def parse_predict(arguments: Sequence[str]) -> PredictSettings:
    """Parse the settings of ``taps predict``."""
    settings = parse(PredictSettings, arguments)
    if settings.json and settings.csv:
        raise UserError("--json and --csv exclude each other")
    return settings


def parse_serve(arguments: Sequence[str]) -> ServeSettings:
    """Parse the settings of ``taps serve``."""
    settings = parse(ServeSettings, arguments)
    if len(settings.replicas) > 2 or settings.replicas != sorted(settings.replicas):
        raise UserError("--replicas takes a number, or the least and the largest number")
    return replace(
        settings,
        token=settings.token or os.environ.get("TAPS_TOKEN") or None,
        base=settings.base and _absolute(settings.base),
    )


def parse_import(arguments: Sequence[str]) -> ImportSettings:
    """Parse the settings of ``taps import``."""
    settings = parse(ImportSettings, arguments)
    if settings.resize is not None and settings.resize < settings.input_size:
        raise UserError(f"--resize {settings.resize} is smaller than the {settings.input_size} pixels of --input_size")
    for name, what in (("tasks", "names"), ("classes", "files of class names")):
        given = getattr(settings, name)
        whole = settings.source in MULTI_TASK_SOURCES and settings.source != "efficient_mtl"  # one file, several tasks
        if given is not None and len(given) != len(settings.files) and not whole:
            raise UserError(f"--{name} gives {len(given)} {what} for {len(settings.files)} files")
    for name in settings.tasks or ():
        if settings.tasks.count(name) > 1:
            raise UserError(f"--tasks names {name!r} twice")
    for name, programs in (("policy", ("adashare", "dynashare")), ("target_rates", ("dynashare",))):
        if getattr(settings, name) is not None and settings.source not in programs:
            raise UserError(f"--{name} has no effect with --from {settings.source}; it is for {' and '.join(programs)}")
    return replace(settings, model_path=settings.model_path and _absolute(settings.model_path))


def _given(kind: type[S], arguments: Sequence[str], of_run: dict[str, Any] | None = None) -> dict[str, Any]:
    """Combine the command line with the file that it names; the command line takes precedence, with a note.

    ``of_run`` receives settings of training programs in the file, which are refused without it.
    """
    given = vars(parser_of(kind).parse_intermixed_args(arguments))
    if given.get("seeds") is not None and "seed" in given:
        raise UserError("--seed and --seeds exclude each other")
    if "config" not in given:
        return given
    path = Path(given["config"])
    ignore = bool(given.get("ignore_unknown"))
    stored = read_config(
        kind, path, _DERIVED, of_run, (JointSettings, SequentialSettings), ignore, _OF_PUBLISHED.get(kind)
    )
    if _keeps_only_a_budget({**stored, **given}):  # settings.yaml has their defaults
        stored = {name: value for name, value in stored.items() if name not in OF_PENALTIES}
    derivations = [("input_size", "resize"), ("seed", "seeds"), ("seeds", "seed")]
    if stored.get("shared_epochs") == stored.get("epochs"):
        derivations.append(("epochs", "shared_epochs"))
    if not stored.get("dataset"):  # the demo's phases are parts of its epochs
        derivations += [("epochs", "warmup_epochs"), ("epochs", "settle_epochs")]
    for name, derived in derivations:
        if name in given and given[name] != stored.get(name):
            stored.pop(derived, None)  # the file's belongs to the file's other value
    beaten = [
        name if name in kind.positional else f"--{name}"
        for name, value in given.items()
        if name in stored and stored[name] != value
    ]
    if beaten:
        warnings.warn(f"the command line wins over {path}: {', '.join(beaten)}", stacklevel=2)
    return {**stored, **given}


def parse_sequential(arguments: Sequence[str]) -> SequentialSettings:
    """Parse the settings of ``train_sequential.py``."""
    given = _given(SequentialSettings, arguments)
    settings = _complete(SequentialSettings, given, demo(_has_budget(given)))
    is_launched = settings.multi_gpu or os.environ.get("WORLD_SIZE", "1") != "1"
    if is_launched and (settings.parallel or settings.address):
        raise UserError(
            "--parallel trains each task in a process of its own: leave out --multi_gpu, torchrun and accelerate"
        )
    return settings


def parse_joint(arguments: Sequence[str]) -> JointSettings:
    """Parse the settings of ``train_joint.py``."""
    given = _given(JointSettings, arguments)
    variant = given.get("variant", "joint")
    preset = {**demo(_has_budget(given)), "experiment_name": f"demo_{variant}"}
    settings = _complete(JointSettings, given, preset, f"_{variant}")
    if "hard_sharing" in _as_list(settings.method) and variant == "lite":
        raise UserError("--variant lite shares first and adapts then: choose another --method, or --variant joint")
    if settings.shared_epochs is None:
        return replace(settings, shared_epochs=settings.epochs)
    if variant == "lite" and 0 < settings.shared_epochs <= (settings.lr_warmup_epochs or 0):
        raise UserError(
            f"--lr_warmup_epochs {settings.lr_warmup_epochs} leaves none of {settings.shared_epochs} --shared_epochs at the "
            "full rate"
        )
    return settings


def _experiment_name(settings: AdaptationSettings | MultiTaskSettings) -> str | None:
    """Return the experiment's name inside ``--result_path``, which published commands write before it."""
    if settings.experiment_name is None:
        return None
    name, root = os.path.normpath(settings.experiment_name), os.path.normpath(settings.result_path)
    name = name.removeprefix(f"{root}{os.sep}")
    if name == "." or os.path.isabs(name) or name.split(os.sep)[0] == os.pardir:
        raise UserError(
            f"--experiment_name {settings.experiment_name} is not a folder inside {settings.result_path}; choose another "
            "parent with --result_path"
        )
    return name


def _like_published(settings: A, given: Mapping[str, Any]) -> A:
    """The published program's choices that depend on others: torchvision's weights of ResNets, no margin around the crop, bilinear
    resizing, and folders' names that say nothing."""
    tagged = f"{settings.model_type}.tv_in1k"
    name = settings.experiment_name or ("" if settings.dataset else "demo")
    record = Path(settings.result_path, name, "settings.json")
    is_older = (
        bool(name)
        and settings.resume
        and record.is_file()
        and '"interpolation"' not in record.read_text(encoding="utf-8")
    )
    known = re.fullmatch(r"resnet(18|34|50|101|152)", settings.model_type) and not settings.model_path
    return replace(
        settings,
        model_type=tagged if known and settings.pretrained else settings.model_type,
        resize=settings.resize or settings.input_size,
        interpolation=settings.interpolation or (None if is_older else "bilinear"),
        cropped_names=settings.cropped_names if "cropped_names" in given or is_older else False,
    )


def _settings_of_run(given: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that is to go on, nothing if there is none or its file is damaged."""
    known = {"result_path": AdaptationSettings.result_path, **preset, **given}
    try:
        text = Path(known["result_path"], known["experiment_name"], "settings.json").read_text(encoding="utf-8")
        found = json.loads(text)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_budget(given: Mapping[str, Any]) -> bool:
    return given.get("budget") is not None or "taps_budget" in _as_list(given.get("method"))


def _keeps_only_a_budget(given: Mapping[str, Any]) -> bool:
    methods = _as_list(given.get("method"))
    return methods == ["taps_budget"] or (given.get("budget") is not None and len(methods) <= 1)


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _complete(kind: type[A], given: dict[str, Any], preset: dict[str, Any], suffix: str = "") -> A:
    """Fill in defaults, for the demo those of the demo, and refuse options that contradict each other."""
    budget = given.pop("budget", None)
    methods = _as_list(given.get("method")) or ["taps" if budget is None else "taps_budget"]
    given["method"] = methods
    for name in methods:
        if name not in catalog():
            raise UserError(f"argument --method: {not_one_of(name, catalog())}")
    only_budgets = _keeps_only_a_budget({"method": methods, "budget": budget})
    for name in (*OF_PENALTIES, "patience", "ema_decay"):
        if name in given and (only_budgets or (name in ("patience", "ema_decay") and "taps_budget" in methods)):
            raise UserError(f"--{name} is not used with a budget: leave one of them out")
    if given.get("resume") and given.get("overwrite"):
        raise UserError("--resume and --overwrite exclude each other")
    if given.get("dataset"):
        preset = {}
    elif "epochs" in given:  # phases keep their shares of the demo's epochs, or in a run that goes on their lengths
        part, names = given["epochs"] / preset["epochs"], ("warmup_epochs", "settle_epochs")
        earlier = _settings_of_run(given, preset) if given.get("resume") else {}
        preset = {**preset, **{name: earlier.get(name, preset[name] * part) for name in names}}
    if given.get("published"):
        preset = {**preset, **published_taps(kind is JointSettings)}
    settings = build(kind, preset, given)
    if settings.published:
        settings = _like_published(settings, given)
    if settings.resize is not None and settings.resize < settings.input_size:
        raise UserError(f"--resize {settings.resize} is smaller than the {settings.input_size} pixels of --input_size")
    name = _experiment_name(settings)
    if name is None:
        data = [Path(path).name or Path(path).resolve().name for path in settings.dataset or ()]
        name = f"{'_'.join(data)}_{settings.model_type}_{'_'.join(methods)}{suffix}"
        if not (len(name) < _LONGEST_PART and Path(settings.result_path, name, "settings.json").is_file()):  # of 0.17
            network = re.sub(r"[/\\:]+", "_", settings.model_type)  # as in hf-hub:timm/resnet34.tv_in1k
            of_data = "_".join(data)
            if len(of_data) > _LONGEST_NAME and len(data) > 1:
                of_data = f"{data[0]}_and_{len(data) - 1}_more"
            name = f"{of_data}_{network}_{'_'.join(methods)}{suffix}"
    settle = settings.settle_epochs
    penalised = "taps" in methods and max(_as_list(settings.lam)) > 0
    if penalised and settle and settings.warmup_epochs + settle >= settings.epochs:
        raise UserError(
            f"--warmup_epochs {settings.warmup_epochs:g} and --settle_epochs {settle:g} leave none of "
            f"{settings.epochs} epochs for --lam"
        )
    if settings.lr_warmup_epochs and settings.lr_warmup_epochs >= settings.epochs:
        raise UserError(
            f"--lr_warmup_epochs {settings.lr_warmup_epochs} leaves none of {settings.epochs} epochs at the full rate"
        )
    return replace(
        settings,
        budget=budget,
        experiment_name=name,
        resize=settings.resize or round(settings.input_size * 8 / 7),
        dataset=settings.dataset and [os.path.abspath(path) for path in settings.dataset],
        model_path=settings.model_path and _absolute(settings.model_path),
    )


def parse_mtl(arguments: Sequence[str]) -> MultiTaskSettings:
    """Parse the settings of ``train_mtl.py``: the command line, then ``--config``, then the benchmark's published values."""
    given = _given(MultiTaskSettings, arguments)
    named = vars(parser_of(MultiTaskSettings).parse_intermixed_args(arguments))
    benchmark, method = given.get("benchmark", "scenes"), given.get("method", "adashare")
    if method not in {**catalog(), "single_task": ""}:
        raise UserError(f"argument --method: {not_one_of(method, [*catalog(), 'single_task'])}")
    if given.get("skip") is not None and method != "automtl":
        raise UserError(f"--skip is for --method automtl, not {method}")
    of_volumes = [name for name in ("images", "labels", "cat_target", "num_target") if given.get(name)]
    if benchmark != "volumes" and of_volumes:
        raise UserError(f"--{of_volumes[0]} is for --benchmark volumes")
    if given.get("frame_pull") and method != "sparse_delta":
        raise UserError(f"--frame_pull is for --method sparse_delta, not {method}")
    if given.get("dynamic_kernels") and benchmark != "mimic3":
        raise UserError("--dynamic_kernels is for --benchmark mimic3")
    if benchmark == "domainnet" and not given.get("dataset"):
        raise UserError("--benchmark domainnet needs --dataset: its root, or folders with train/ and test/")
    if given.get("resume") and given.get("overwrite"):
        raise UserError("--resume and --overwrite exclude each other")
    targets = [*(given.get("cat_target") or ()), *(given.get("num_target") or ())]
    own_names = {**aliases(benchmark), **file_names(targets)}
    if "tasks" in given:
        given["tasks"] = [own_names.get(name, name) for name in given["tasks"]]
    chosen = given.get("tasks") or targets
    generated = not any(given.get(name) for name in ("dataset", "images", "labels"))
    own = GENERATED.get(benchmark, ())
    for name in chosen if generated and own else ():  # before minutes go into data
        if name not in own:
            published_names = [alias for alias, meant in own_names.items() if meant in own]
            raise UserError(f"argument --tasks: {not_one_of(name, [*own, *published_names])}")
    preset = published(benchmark, len(chosen) or None, method, generated)
    if given.get("published"):
        preset = {**preset, **as_published(benchmark, method)}
    for name in ("task_weights", "positive_weights"):
        if name in given:
            own = {own_names.get(task, task): weight for task, weight in given[name].items()}
            given[name] = {**preset[name], **own}
    settings = build(MultiTaskSettings, {"task_weights": {}, "positive_weights": {}}, preset, given)
    changes: dict[str, Any] = {"resize": round((settings.input_size or 224) * 8 / 7)}
    if "test" in settings.phases and "retrain" not in settings.phases and "exp_ids" not in named:
        changes["exp_ids"] = None  # all that have been trained are tested
    if chosen:
        others = preset["task_weights"].keys() - set(chosen)
        changes["task_weights"] = {n: w for n, w in (settings.task_weights or {}).items() if n not in others}
    changes["experiment_name"] = _experiment_name(settings) or f"{benchmark}_{method}"
    small = "channels" in given or settings.model_type == preset["model_type"]
    if not small and not (settings.model_type or "").startswith("resnet"):
        changes["channels"] = None
    for name in ("model_path", "images", "labels", "normalizer"):
        if getattr(settings, name):
            changes[name] = _absolute(getattr(settings, name))
    if settings.policy:
        changes["policy"] = [_absolute(path) for path in _as_list(settings.policy)]
    if settings.dataset:
        changes["dataset"] = [os.path.abspath(path) for path in settings.dataset]
    if settings.single_task not in (None, "measure", "none"):
        changes["single_task"] = os.path.abspath(settings.single_task)
    return replace(settings, **changes)


def _absolute(path: str) -> str:
    """An absolute path, or the address of a file on the hub or the web as it is."""
    return path if re.match(r"hf-hub:|\w+://", path) else os.path.abspath(path)


def parse_evaluate(arguments: Sequence[str]) -> EvaluateSettings:
    """Parse the settings of ``evaluate.py``."""
    run: dict[str, Any] = {}
    named = vars(parser_of(EvaluateSettings).parse_intermixed_args(arguments))
    given = _given(EvaluateSettings, arguments, run)
    if run and "dataset" in given and "dataset" not in named:  # the images that the run was trained on, not others
        del given["dataset"]
    if "folder" not in given and run.get("experiment_name"):  # the settings.yaml of a run
        given["folder"] = os.path.join(run.get("result_path", "results"), run["experiment_name"])
    settings = _built(EvaluateSettings, given)
    if settings.onnx and not settings.export:
        raise UserError("--onnx says how to export: give --export DIR too")
    if settings.verify and (settings.export or settings.dataset):
        raise UserError("--verify looks at the stored files alone: leave out --export and --dataset")
    return settings
