"""The model: one base network for many tasks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from taps.core.execution import Execution
from taps.core.find import choose, find_everything
from taps.core.modules import computed_tensors, evaluating, first_input
from taps.core.network import NO_INPUT, Network, inner_first
from taps.errors import UserError, check_known, unknown
from taps.methods.registry import METHODS
from taps.multitask import mixed_batch, shared_pass
from taps.multitask.macs import macs
from taps.multitask.trees import tensors
from taps.networks import backbones, preprocessing
from taps.networks.classifier import attach_head, classifier_layers, without_classifier
from taps.networks.heads import make_head
from taps.networks.origin import checked, described, rebuild
from taps.storage import hub, run_folder, task_file
from taps.storage.files import read_tensors, write_tensors
from taps.storage.library import Library, TaskCache


def adapt(
    net: nn.Module | str,
    method: str = "taps",
    norm: str | None = None,
    layers: str | None = None,
    train_base: bool | None = None,
    **options,
) -> TaskModel:
    """Make ``net`` the shared base of many tasks.

    The network is wrapped in place, which does not change its outputs: a task whose deltas are zero gives bit-identical
    outputs. It is frozen unless the method trains it.

    Args:
        net: any module that maps a batch to features. Each task brings its own head, so the classifier of a timm or torchvision
            network is dropped, with a warning. A name is passed to :func:`taps.create_backbone`.
        method: a name in ``taps.METHODS``.
        norm: ``"task"`` each task has its own norms everywhere (the paper); ``"follow"`` only where the layer before
            the norm is tuned, so that shared parts are shared exactly; ``"frozen"`` the base's. This applies to BatchNorm,
            LayerNorm, GroupNorm and similar norms. ``None``: the method's own default, ``"task"`` for TAPS. A
            method that supports only one policy uses that.
        layers: a regular expression searched in the names of layers; layers without a match stay shared. ``None``: all layers.
        train_base: whether the base is trained with the tasks, as in joint training; ``None``: the method's default.
        **options: options of the method, e.g. for ``"taps"``: ``threshold=0.1`` (τ), ``score_init=0.15``, ``ste="code"``.

    Raises:
        UserError: (a ``ValueError``) for an unknown method, norm policy or option, or a pattern without a match.

    Example:
        >>> model = adapt(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)))
        >>> model.add_task("sketch", num_classes=3)
        >>> model(torch.zeros(2, 4), task="sketch").shape
        torch.Size([2, 3])
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    row = METHODS[method]
    check_known(f"option of method {method}:", options, row.options)
    norm = row.norms[0] if norm is None else norm
    if norm not in ("task", "follow", "frozen"):
        raise unknown("norm policy", norm, ("task", "follow", "frozen"))
    if norm not in row.norms:
        if norm != "task":
            raise UserError(f"method {method!r} works with norm={row.norms[0]!r}, not {norm!r}")
        norm = row.norms[0]
    trains = row.trains_base if train_base is None else train_base
    if not isinstance(net, (str, nn.Module)):
        raise UserError(f"the network is a {type(net).__name__}; give a module or the name of a timm model")
    if layers is not None and isinstance(net, nn.Module):  # before the classifier is removed
        found, classifier = row.find_units(net, {**row.options, **options}), classifier_layers(net)
        choose([unit for unit in found if id(unit.module) not in classifier], layers)
    net = backbones.create_backbone(net) if isinstance(net, str) else without_classifier(net)
    plain = {
        name: value.item() if isinstance(value, (np.generic, Tensor)) else value for name, value in options.items()
    }
    return TaskModel(net, row, norm, layers, {**row.options, **plain}, trains)


def load(
    source: str | Path, base: nn.Module | str | Path | None = None, tasks: Sequence[str] | None = None, keep: int = 16
) -> TaskModel:
    """Return a model with stored tasks, ready to use: the base is built, and its fingerprint is checked.

    Tasks may have been trained with different methods and norm policies, as long as their base is the same.

    Args:
        source: a task's folder, a folder that holds several, such as ``"results/demo"``, or ``"hf-hub:user/repository"``.
        base: the network, or a file with its weights; needed only if the files do not say how to get it.
        tasks: names of the tasks to load; ``None`` for all.
        keep: largest number of tasks in memory; if there are more, each is loaded on first use.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: if there is no task, a task is damaged or unknown, the base cannot be found, or the tasks were made for another.

    Example:
        >>> model = taps.load("results/demo")  # doctest: +SKIP
        >>> outputs = model.predict(model.transform("digits")(image)[None])  # doctest: +SKIP
    """
    if str(source).startswith(hub.PREFIX):
        source = hub.download(str(source))
    library = Library([source])
    if not library.folders:
        library.check()
    tasks = [tasks] if isinstance(tasks, str) else tasks
    for name in tasks or ():
        if name not in library.folders:
            damaged = [reason for folder, reason in library.refused.items() if folder.name == name]
            raise (
                UserError(f"task {name!r} cannot be used: {damaged[0]}")
                if damaged
                else unknown("task", name, library.folders)
            )
    names = list(tasks or library.folders)
    library.folders = {name: library.folders[name] for name in names}
    library.descriptions = {name: library.descriptions[name] for name in names}
    library.warn()
    found = library.descriptions
    model = empty_model(found, library.folders, base, source)
    if len(names) > keep:
        model.load_library(*library.folders.values(), keep=keep)
    else:
        for name in names:
            model.load_task(library.folders[name], name=name)
    for name in names:
        if "preprocessing" not in found[name]:  # written before version 0.11: as the run's settings say
            usual = model.default_preprocessing(224).describe()
            prepare = run_folder.older_preprocessing(usual, library.folders[name], name)
            model.describe_task(name, preprocessing=prepare)
    return model


def empty_model(
    found: Mapping[str, dict],
    folders: Mapping[str, Path],
    base: nn.Module | str | Path | None = None,
    source: str | Path | None = None,
) -> TaskModel:
    """Return a model without tasks, in evaluation mode, into which stored tasks of one base can be loaded.

    Args:
        found: contents of each task's ``task.json``; at least one.
        folders: folder of each task.
        base: as in :func:`load`.
        source: what to call the tasks in messages; ``None``: the first one's folder.

    Raises:
        UserError: as :func:`load`.
    """
    (name, first), *others = found.items()
    source = folders[name] if source is None else source
    for other, description in others:
        if description["base"]["fingerprint"] != first["base"]["fingerprint"]:
            raise UserError(
                f"{source} holds tasks of different bases, {name} and {other}; name some of one base: tasks="
            )
    beside = None if base is not None else _base_beside(folders[name])
    net = base if isinstance(base, nn.Module) else _build_base(folders[name], first["base"], base, beside is not None)
    try:
        model = adapt(net, **host_options(found), train_base=False).eval()
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # an option of another type
        raise UserError(f"{source}: the options in task.json are damaged: {error}") from None
    if beside is not None:
        try:
            model.load_base(read_tensors(beside))
        except UserError as error:
            raise UserError(f"{beside}: {error}") from None
    if model.fingerprint() != first["base"]["fingerprint"] and base is None:
        raise UserError(
            f"{source} was made for another base than the {model.base_name} that its files describe; give it as base="
        )
    return model


def _about(description: dict, kept: Sequence[str] | None = None) -> dict:
    """Return the entries of ``task.json`` that are about the task, or those of them in ``kept``."""
    return {k: v for k, v in description.items() if k not in task_file.STRUCTURE and (kept is None or k in kept)}


def _base_beside(folder: Path) -> Path | None:
    """Return the file of a base that was trained with its tasks, if there is one beside the task in ``folder``."""
    paths = [parent / "base.safetensors" for parent in (folder, folder.resolve().parent)]
    return next((path for path in paths if path.is_file()), None)


def _build_base(folder: Path, described: dict, weights: str | Path | None, is_empty: bool) -> nn.Module:
    """Make the base of the task in ``folder``, with any weights if it is filled later."""
    of_run = run_folder.base_origin(folder.resolve().parent, described["name"])
    origin = {"path": of_run.get("path"), **described} if "model" in described else of_run
    if "model" not in described and not backbones.is_known(origin["model"]):
        origin = {}
    pixels = origin.get("input_size")  # known only from the settings of earlier versions
    if isinstance(pixels, int) and backbones.needs_image_size(origin["model"], pixels):
        origin = {**origin, "options": {"img_size": pixels}}
    return rebuild(origin, weights or origin.get("path"), is_empty)


def host_options(descriptions: Mapping[str, dict]) -> dict:
    """Return arguments of :func:`adapt` for a model that can run all of these tasks."""
    made = [
        {key: description.get(key) for key in ("method", "norm", "layers")} for description in descriptions.values()
    ]
    options = [description["options"] for description in descriptions.values()]
    if all(own == made[0] for own in made) and all(own == options[0] for own in options):
        if made[0]["method"] not in METHODS:
            raise unknown("method", made[0]["method"], METHODS)
        return {**made[0], **options[0]}
    everything = any(
        METHODS[name].select is find_everything for name in {str(own["method"]) for own in made} if name in METHODS
    )
    return {"method": "finetune" if everything else "taps", "norm": "task"}


class TaskModel(Network):
    """A base network with gated units and norms and one head per task, in which calls select a task by its name.

    Made by :func:`adapt`. ``model(x, task="sketch")`` runs one task; the methods below also take the task's name. Several threads
    may use one model in evaluation mode.
    """

    def __init__(self, net: nn.Module, *args, **kwargs) -> None:
        self._described = described(net)
        self._preprocessing = preprocessing.of_network(net)
        super().__init__(net, *args, **kwargs)
        self._about: dict[str, dict] = {}
        #: what a library's files, which may be read again, do not replace
        self._described_by_user: dict[str, dict] = {}
        self._compact: dict[str, bool] = {}  # whether files of the task were packed
        self._cache: TaskCache | None = None
        self._mixable = mixed_batch.Mixable()
        self._shared = shared_pass.SharedView(self.backbone, self.state)

    # -- tasks ---------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order they were added; tasks of a library come last, loaded or not."""
        offered = self._cache.library.folders if self._cache else {}
        return [task for task in self.heads if task not in offered] + list(offered)

    def check_task(self, task: str) -> None:
        """Raise a ``UserError`` unless the model has ``task``; load it if it is in the library."""
        with self._loaded([task]):
            pass

    def add_task(self, task: str, num_classes: int | None = None, head: nn.Module | None = None) -> None:
        self._check_free(task)
        super().add_task(task, num_classes, head)

    add_task.__doc__ = Network.add_task.__doc__

    def _check_free(self, task: str) -> None:
        self.check_new_task(task)
        if self._cache and task in self._cache:
            raise UserError(
                f"the model's library already has a task {task!r}; remove_task it first or choose another name"
            )

    @contextmanager
    def _loaded(self, tasks: Sequence[str]) -> Iterator[None]:
        """Keep all of ``tasks`` in the model inside the ``with`` block."""
        cache = self._cache
        for task in tasks:
            if task not in self.heads and not (cache and task in cache):
                raise unknown("task", task, self.tasks, "" if self.tasks else "add it with add_task or load_task")
        with cache.holding([task for task in tasks if task in cache]) if cache else ExitStack():
            heads = {task: self.heads.get(task) for task in tasks}
            yield
            for task, head in heads.items():  # another thread's change would give parts of two versions
                if head is None or self.heads.get(task) is not head:
                    raise UserError(f"task {task!r} was removed or replaced while it ran; call again")

    def remove_task(self, task: str) -> None:
        """Remove a task and everything that belongs to it; files are not changed."""
        self.check_task(task)
        if self._cache:
            self._cache.forget(task)
        self.forget(task)
        self._about.pop(task, None)
        self._described_by_user.pop(task, None)
        self._compact.pop(task, None)

    def describe_task(self, task: str, **about: object) -> None:
        """Set entries that ``task.json`` will hold, e.g. ``classes=["cat", "dog"]``; ``None`` removes one."""
        both = {**self.about(task), **about}
        both = task_file.plain_entries({key: value for key, value in both.items() if value is not None})
        outputs = getattr(self.heads[task], "out_features", None) if task in self.heads else None
        names = both.get("classes")
        if names is not None and (not isinstance(names, list) or not all(isinstance(name, str) for name in names)):
            raise UserError(f"classes of task {task!r} have to be a list of names")
        if names is not None and outputs is not None and len(names) != outputs:
            raise UserError(f"task {task!r} has {outputs} outputs, classes= has {len(names)} names")
        self._about[task] = both
        self._described_by_user.setdefault(task, {}).update(about)

    def about(self, task: str) -> dict:
        """Return what is stored about a task besides its weights: class names, preprocessing, accuracy and so on."""
        stored = self._cache.library.descriptions if self._cache else {}
        if task not in self.heads and task not in stored:
            self.check_task(task)
        return dict(self._about[task]) if task in self._about else _about(stored.get(task, {}))

    def classes(self, task: str) -> list[str]:
        """Return the names of a task's classes, in the order of its outputs.

        Raises:
            UserError: for an unknown task, or one without class names.
        """
        names = self.about(task).get("classes")
        if not isinstance(names, list):
            raise UserError(f"task {task!r} has no class names; set them with describe_task({task!r}, classes=[…])")
        return list(names)

    def transform(self, task: str):
        """Return the task's preprocessing in evaluation: from a PIL image to a (3, H, W) float tensor.

        A task without stored preprocessing gets that of the base's weights, at 224 px.

        Raises:
            UserError: for an unknown task, or a damaged description.
        """
        return preprocessing.stored_transform(self.preprocessing_of(task))

    def preprocessing_of(self, task: str) -> dict:
        """Return the description of a task's preprocessing, as ``task.json`` holds it; see :meth:`transform`."""
        return self.about(task).get("preprocessing") or self.default_preprocessing(224).describe()

    def default_preprocessing(self, input_size: int) -> preprocessing.Preprocessing:
        """Return preprocessing for images of this size in pixels, normalised as for the base's weights."""
        return preprocessing.Preprocessing(input_size, round(input_size * 8 / 7), **self._preprocessing)

    def set_task(self, task: str | None) -> None:
        """Set the default task of this thread's calls, so that loops that call ``model(x)`` work unchanged.

        Args:
            task: name of the task; ``None`` for none.

        Raises:
            UserError: for an unknown task.
        """
        if task is not None:
            self.check_task(task)
        self.state.default = task

    # -- running -------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, task: str | None) -> Iterator[None]:
        """Run the backbone with ``task`` inside a ``with`` block; ``None`` means the base alone."""
        self.hold_buffers()
        with self._loaded([] if task is None else [task]), self.state.running(task):
            yield

    def features(self, x=NO_INPUT, task: str | Execution | None = None, **inputs):
        with self._loaded([task] if isinstance(task, str) else []):
            return super().features(x, task, **inputs)

    def forward(
        self, x=NO_INPUT, task: str | Sequence[str] | None = None, tasks: Sequence[str] | None = None, **inputs
    ):
        """Run one task, a batch whose samples belong to different tasks, or several tasks on the same samples.

        Args:
            x: a batch, (B, ...) as the backbone takes it; omitted if the backbone takes only named inputs.
            task: the task's name, or B names, one per sample. Shared computation is then done once for the whole
                batch; the result is the same as running each task on its samples, including batch statistics. ``None``: the task
                set by :meth:`set_task`.
            tasks: instead of ``task``, names of tasks that all run on all samples; shared computation is done once, as in
                :meth:`predict`, but in the model's current mode and with gradients. A norm that several tasks share
                updates its statistics once for each of its different inputs.
            **inputs: further inputs of the backbone, e.g. ``mask=``; for a batch of several tasks, each with one row per sample.

        Returns:
            The output of the task's head, (B, num_classes) for a linear head. For one name per sample the outputs in
            batch order: a tensor if their shapes agree, else a list of B outputs. With ``tasks=`` a dict.

        Raises:
            UserError: for an unknown task, or a number of names that is not B.
        """
        if getattr(self, "_is_replica", False):
            raise UserError("nn.DataParallel copies a model without its parameters; use DistributedDataParallel")
        args = () if x is NO_INPUT else (x,)
        if not args and not inputs:
            raise UserError("the model was called without an input")
        if tasks is not None:
            if task is not None:
                raise UserError("give task= or tasks=, not both")
            names = self._names(tasks)
            if self.training:
                self.hold_buffers()
            with self._loaded(names):
                return shared_pass.outputs(self, self._shared, args, inputs, names)
        task = self.state.default if task is None else task
        if task is None:
            raise UserError("no task given: pass task='NAME' or tasks=[…], or call set_task first")
        if isinstance(task, str):
            with self._loaded([task]):
                return self.heads[task](self.run(task, args, inputs))
        names = list(task)
        x = first_input(args, inputs)
        size = len(x if isinstance(x, (list, tuple)) else next(iter(tensors((args, inputs))), ()))
        if len(names) != size:
            raise UserError(f"task= has {len(names)} names for a batch of {size} samples; give one for each sample")
        if not names:
            raise UserError("the batch is empty, so task= names no task to run")
        with self._loaded(list(dict.fromkeys(names))):
            if len(set(names)) == 1:
                return self.heads[names[0]](self.run(names[0], args, inputs))
            return mixed_batch.run_mixed(self, self._mixable, args, inputs, names)

    @property
    def _base_origin(self) -> dict:
        """How the base was made, for files; checked when it is first needed."""
        self._described = checked(*self._described), None
        return self._described[0]

    def _names(self, tasks: Sequence[str] | None) -> list[str]:
        """Return each of the tasks once; ``None``: all."""
        return self.tasks if tasks is None else [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))

    def predict(self, x=NO_INPUT, tasks: Sequence[str] | None = None, **inputs) -> dict[str, Tensor]:
        """Return every task's output on the same batch, in evaluation mode and without gradients.

        A part of the network that two tasks share and that gets the same input from both is computed once. With
        ``norm="task"`` tasks differ from the first norm on; ``norm="follow"`` shares everything before the first
        tuned layer.

        Args:
            x: a batch, (B, ...).
            tasks: names; ``None`` for all tasks.
            **inputs: further inputs of the backbone.

        Returns:
            ``{task: output}`` in the order of ``tasks``.
        """
        names = self._names(tasks)
        at_once = max(self._cache.keep if self._cache else len(names), 1)  # at most those that a library may hold
        args = () if x is NO_INPUT else (x,)
        outputs = {}
        with torch.inference_mode(False), torch.no_grad():
            args, inputs = shared_pass.outside_of_inference(args, inputs)
            for start in range(0, len(names), at_once):
                some = names[start : start + at_once]
                with self._loaded(some), evaluating(self):
                    outputs.update(shared_pass.outputs(self, self._shared, args, inputs, some))
        return outputs

    def predict_cost(self, x=NO_INPUT, tasks: Sequence[str] | None = None, **inputs) -> dict[str, int]:
        """Return the multiply-accumulate operations (MACs) of :meth:`predict` on a batch: convolutions, matrix products, attention.

        Returns:
            ``macs``, the network's MACs for all tasks in one pass; ``macs_separate``, its MACs for one separate
            pass per task; ``macs_heads``, the MACs of the heads, which are added to either.
        """
        names = self._names(tasks)
        args = () if x is NO_INPUT else (x,)
        with self._loaded(names), evaluating(self), torch.no_grad():
            self._shared.check_copies(args, inputs)
            heads = separate = 0
            for task in names:
                separate += macs(self.run, task, args, inputs)
                heads += macs(self.heads[task], self.run(task, args, inputs))
            one_pass = macs(shared_pass.outputs, self, self._shared, args, inputs, names)
        return {"macs": one_pass - heads, "macs_separate": separate, "macs_heads": heads}

    def predictor(self, tasks: Sequence[str] | None = None) -> nn.Module:
        """Return an ordinary module from a batch to ``{task: output}`` that gives the same outputs as :meth:`predict`.

        It contains no gates, but one plain module for each different behaviour of a layer. It is in evaluation mode;
        ``torch.export.export(predictor, (x,))`` makes one program with one output per task.

        Raises:
            ValueError: if a decision depends on the input, so that no fixed network is equivalent.
        """
        names = self._names(tasks)
        with self._loaded(names), evaluating(self), torch.inference_mode(False):
            return shared_pass.predictor(self, names)

    # -- files and plain networks --------------------------------------------------------------------------------

    def save_task(
        self,
        task: str,
        folder: str | Path,
        about: dict | None = None,
        max_error: float | None = None,
        compact: bool | None = None,
    ) -> Path:
        """Write ``folder/task.safetensors`` and ``folder/task.json``: all that is needed to use the task on its base.

        Only what the task uses is stored: deltas of open units, norms in use, gate scores and the head.

        Args:
            task: the task's name.
            folder: created if it does not exist; files of an earlier save are replaced.
            about: further entries for ``task.json``, such as class names.
            max_error: store each delta in the fewest bytes that keep ‖δ̂ − δ‖ / ‖δ‖ within this, 0..1
                (:mod:`taps.storage.encoding`); deltas for which no encoding achieves this are stored exactly, with a warning.
                ``None``: store everything exactly.
            compact: pack all tensors in one, with norms and head in float16 (rounded to about a thousandth) and batch statistics
                folded into weights and biases; after training with a budget, norms and head stay as encoded then. ``None``: as
                the task was loaded, or trained with a budget by :func:`taps.fit`; else not.

        Returns:
            The folder.

        Raises:
            UserError: if a value is not finite, or ``max_error`` is out of range.
        """
        self.check_task(task)
        self._described_by_user.setdefault(task, {}).update(about or {})
        about = {**self._about.get(task, {}), **task_file.plain_entries(about or {})}
        compact = self._compact.get(task, False) if compact is None else compact
        task_file.save(self, task, Path(folder), about, max_error, compact, self._base_origin)
        self._about[task] = about
        return Path(folder)

    def load_task(
        self, folder: str | Path, name: str | None = None, head: nn.Module | None = None, trainable: bool = False
    ) -> str:
        """Add the task stored in ``folder``.

        Args:
            folder: holds ``task.json`` and ``task.safetensors``.
            name: a name for the task in this model; ``None`` keeps the stored one.
            head: receives the stored head; needed only if that is a module of the user's own.
            trainable: whether the task may be trained further. By default it is frozen and holds only the tensors that it uses.

        Returns:
            The task's name.

        Raises:
            UserError: if a file is missing, damaged, of another format version, or was made for another base, method
                or norm policy. The model is then unchanged.
        """
        task = task_file.read_description(Path(folder))["task"] if name is None else name
        self._check_free(task)
        self._load(Path(folder), task, head, trainable)
        return task

    def _load(self, folder: Path, task: str, head: nn.Module | None = None, trainable: bool = False) -> None:
        """Load a task from its files, with what ``task.json`` says about it."""
        with torch.inference_mode(False):  # inference tensors could not be used elsewhere
            description = task_file.load(self, folder, task, head, trainable, METHODS.get, make_head)
        kept = ("classes", "preprocessing") if trainable else None
        both = {**_about(description, kept), **self._described_by_user.get(task, {})}
        self._about[task] = task_file.plain_entries({key: value for key, value in both.items() if value is not None})
        self._compact[task] = bool(description.get("compact")) and not trainable

    def save_pretrained(self, folder: str | Path, tasks: Sequence[str] | None = None) -> Path:
        """Save tasks, all by default, each in a subfolder of its name; :meth:`from_pretrained` reads them back.

        A base that is trained with its tasks is saved beside them.
        """
        for task in self._names(tasks):
            self.save_task(task, Path(folder) / task)
        if self.train_base:
            write_tensors(Path(folder) / "base.safetensors", self.base_state())
        return Path(folder)

    @staticmethod
    def from_pretrained(source: str | Path, **options) -> TaskModel:
        """Return a model with stored tasks, as :func:`taps.load` does."""
        return load(source, **options)

    def push_task(self, task: str, repository: str, private: bool = False, message: str | None = None) -> str:
        """Upload a task to the Hugging Face hub with a model card; ``taps.load("hf-hub:user/repository")`` reads it back.

        Args:
            task: the task's name.
            repository: ``"user/name"``, created if it does not exist.
            private: whether a new repository is private.
            message: message of the commit.

        Returns:
            The repository's address.

        Raises:
            UserError: for an unknown task, or if the hub does not answer or refuses, for example without a token.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_task(task, folder)
            if self.train_base:
                write_tensors(Path(folder) / "base.safetensors", self.base_state())
            return hub.upload(Path(folder), repository, private, message)

    def load_library(self, *roots: str | Path, keep: int | None = None) -> list[str]:
        """Make every task stored in some folders available; each is loaded on first use.

        Args:
            roots: folders of tasks, or folders that contain such folders, e.g. ``"results/demo"``.
            keep: largest number of them in memory at a time, the most recently used ones; > 0; ``None``: as before, at first 16.
                A call that needs more, such as a mixed batch or :meth:`predictor`, holds all that it needs.

        Returns:
            Names of the tasks that are now available.

        Raises:
            UserError: if a root holds no task, or a name is taken. Damaged tasks, and those made for another base or
                method, are left out with a warning that names them.
        """
        if keep is None:
            keep = self._cache.keep if self._cache else 16
        if keep < 1:
            raise UserError(f"keep must be at least 1, not {keep}")
        library = Library(roots)
        for name, folder in [*library.folders.items()]:
            try:
                self._check_free(name)
                task_file.check_fits(self, library.descriptions[name], folder / "task.json", METHODS.get)
            except UserError as error:
                library.refused[folder] = str(error)
                del library.folders[name], library.descriptions[name]
        if not library.folders:
            library.check()
        library.warn()
        if self._cache:
            self._cache.add(library, keep)
        else:
            self._cache = TaskCache(library, keep, self._load_from_library, self.forget)
        return list(library.folders)

    def _load_from_library(self, folder: Path, task: str) -> None:
        if task not in self.heads:
            with torch.no_grad():
                self._load(folder, task)
            if self._cache:
                self._cache.library.descriptions[task] = task_file.read_description(folder)

    def merge(self, task: str) -> nn.Module:
        """Return an ordinary network, without any class of this library, that gives the same outputs as ``model(x, task)``.

        For a timm backbone with a linear head it is the timm model itself with the head as its classifier, so its
        state dict loads into ``timm.create_model(name, num_classes=…)``. Otherwise it is
        ``nn.Sequential(backbone=…, head=…)``. It is in evaluation mode and can be exported, compiled or trained.
        """
        with self._loaded([task]), torch.inference_mode(False):
            return self._merged(task)

    def _merged(self, task: str) -> nn.Module:
        memo = computed_tensors(self.backbone)
        for module in inner_first((*self.units, *self.task_norms)):
            memo[id(module)] = module.merged(task, memo)
        plain = copy.deepcopy(self.backbone, memo)
        for name in ("taps_origin", "taps_structure"):
            plain.__dict__.pop(name, None)
        return attach_head(plain, copy.deepcopy(self.heads[task])).requires_grad_(True).eval()

    def extra_repr(self) -> str:
        return f"method={self.method.name!r}, norm={self.norm!r}, units={len(self.units)}, tasks={self.tasks}"
