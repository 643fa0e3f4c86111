"""Policies in four calls: construct the trainer, pre-train, learn the policy, and train under it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from taps.core.modules import evaluating
from taps.core.norm import batch_statistics
from taps.data.multi_label import StreamSampler
from taps.errors import UserError, check_known, unknown
from taps.methods.policy import Policy
from taps.methods.registry import METHODS
from taps.settings.declare import build, declarations
from taps.settings.multi_task import MultiTaskSettings, PolicyTraining
from taps.settings.presets import published
from taps.task_model import TaskModel, adapt
from taps.training.loop import run_phases
from taps.training.schedules import STEPS, cycle_steps, learns_policy, policy_plan, pretrain_plan, weights_plan
from taps.training.separate import Masked, Samplers, SeparateLoaders, inputs_and_labels, with_mask

#: maps a batch of outputs and labels to a number
Measure = Callable[[Tensor, Tensor], Tensor]


class _Planned(Dataset):
    """A data set whose samples are indexed by (index, pass)."""

    def __init__(self, samples: Dataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]):
        return self.samples[key[0]]


def _steps(iterations: int) -> int:
    if iterations < 1:
        raise UserError(f"iterations have to be 1 or more, not {iterations!r}")
    return iterations


class PolicyTrainer:
    """Learn how each task uses each unit of one network, and train the resulting network.

    Args:
        backbone: any module that maps a batch to features; training starts from its weights.
        heads: by task, modules that map features to the task's output.
        loaders: ``"train"`` and ``"val"``, loaders of (inputs, {task: labels}). Only the data set, batch size and ``collate_fn``
            of training loaders are used; the seed determines the order. With a third loader ``"policy"``, its samples train
            the policy and all of ``train`` trains the weights; without it, a part of ``train`` is set aside for the policy.
            Instead of one loader for all tasks, each entry may be a dict of loaders by task, which yield
            ``{"input", "label"}``, perhaps with a ``"mask"``, or pairs. A task's training loader may then be a list of three:
            all samples, those for the weights and those for the policy.
        losses: by task, functions of outputs and labels, and of the mask if there is one, that return the mean loss.
        metrics: by task, functions of a batch's outputs and labels (and mask) that return a number, shown in :attr:`history`;
            or objects with ``val_metrics()``, which returns a dict of numbers over all batches since the last call.
        method: a method that learns policies: ``"automtl"``, ``"adashare"``, ``"dynashare"``, or a registered one.
        seed: seed for everything random.
        **options: options of the method (e.g. ``cost_weight``, ``skip``) or of :func:`taps.adapt` (``norm``, ``layers``), with
            their own defaults; or training options, named as in ``train_mtl.py`` (``lr``, ``policy_lr``, ``task_weights``, …),
            with their defaults for Scenes.

    Attributes:
        model: the shared network with gates.
        history: one dict per epoch and task: ``stage``, ``epoch``, ``train_loss``, ``loss`` and ``metric`` on validation data.

    Raises:
        UserError: for an unknown method or option, a number outside its range, or tasks that differ between heads, losses,
            metrics and labels.

    Example:
        >>> trainer = PolicyTrainer(backbone, heads, loaders, losses, metrics)     # doctest: +SKIP
        >>> trainer.pre_train(iterations=1000)                                     # doctest: +SKIP
        >>> policy = trainer.learn_policy(iterations=2000)                         # doctest: +SKIP
        >>> network = trainer.post_train(policy, iterations=3000).predictor()      # doctest: +SKIP
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Mapping[str, nn.Module],
        loaders: Mapping[str, DataLoader | Mapping[str, DataLoader | Sequence[DataLoader]]],
        losses: Mapping[str, Measure],
        metrics: Mapping[str, Measure] | None = None,
        method: str = "automtl",
        seed: int = 0,
        **options,
    ) -> None:
        if not learns_policy(method):
            raise unknown("method that learns policies", method, filter(learns_policy, METHODS))
        self.tasks = list(heads)
        for what, given in (("losses", losses), ("metrics", metrics or losses)):
            if set(given) != set(self.tasks):
                raise UserError(f"{what} are given for {', '.join(given)}; heads are given for {', '.join(self.tasks)}")
        for name in ("train", "val"):
            if name not in loaders:
                raise UserError(f"loaders lack {name!r}; they have {', '.join(loaders) or 'none'}")
        row = METHODS[method]
        adapting = {name: options.pop(name) for name in (*row.options, "norm", "layers") if name in options}
        of_training = declarations(PolicyTraining)
        for name in options:
            if name not in of_training:
                raise unknown("option", name, [*of_training, *row.options, "norm", "layers"])
        self.losses = {task: with_mask(loss) for task, loss in losses.items()}
        self.metrics = dict(metrics or {})
        self.separate = isinstance(loaders["train"], Mapping)
        by_split = self._by_split(loaders)
        for name, loader in ((split, one) for split, own in by_split.items() for one in own.values()):
            if loader.batch_size is None or isinstance(loader.dataset, torch.utils.data.IterableDataset):
                raise UserError(f"the loader {name!r} needs a data set with a length and a batch_size")
        check_known("task in task_weights", options.get("task_weights", {}), self.tasks)
        loader = next(iter(by_split["train"].values()))
        given = {"batch_size": loader.batch_size, "task_weights": {}, **options, "method": method, "seed": seed}
        self.options = build(MultiTaskSettings, published("scenes", None, method), given)
        for name in STEPS:
            if isinstance(value := getattr(self.options, name), str):
                raise UserError(f"{name}: {value!r} are passes; give a number of steps")
        self.val = by_split["val"] if self.separate else loaders["val"]
        held = [(len(own.dataset), own.batch_size) for own in by_split["val"].values()]
        self._has_single_samples = any(
            size % batch == 1 or batch == 1 for size, batch in held
        )  # without batch statistics
        self.parts = self._divide(by_split)
        self.collate = {name: own.collate_fn for name, own in by_split["train"].items()}
        self.history: list[dict] = []
        torch.manual_seed(seed)
        self._start = (copy.deepcopy(backbone), {task: copy.deepcopy(head) for task, head in heads.items()}, adapting)
        self.model = self._fresh()
        self._check_batch()

    def _by_split(self, loaders: Mapping) -> dict[str, dict[str, DataLoader]]:
        """Return the loaders of each split by task; a loader for all tasks has the name ``""``.

        Raises:
            UserError: if a task has no loader.
        """
        found: dict[str, dict[str, DataLoader]] = {}
        for split, given in loaders.items():
            own = given if isinstance(given, Mapping) else {"": given}
            if isinstance(given, Mapping) != self.separate or (self.separate and not set(self.tasks) <= set(own)):
                raise UserError(f"loaders[{split!r}] lacks a loader for each of {', '.join(self.tasks)}")
            for task, one in own.items():
                if isinstance(one, (list, tuple)):
                    if split != "train" or len(one) != 3:
                        raise UserError(
                            f"the loaders of {task!r} are {len(one)}; give one, or for train all, weights and policy"
                        )
                    for part, loader in zip(("train", "weights", "policy"), one, strict=True):
                        found.setdefault(part, {})[task] = loader
                else:
                    found.setdefault(split, {})[task] = one
        for own in found.values():
            missing = [task for task in self.tasks if self.separate and task not in own]
            if missing:
                raise UserError(
                    f"task {missing[0]!r} has one training loader, others have three: give all tasks as many"
                )
        sizes = {
            loader.batch_size for split in ("train", "weights", "policy") for loader in found.get(split, {}).values()
        }
        if len(sizes) > 1:
            raise UserError(
                f"training loaders have batch sizes {', '.join(map(str, sorted(sizes, key=str)))}; give one size"
            )
        return {
            split: {task: own[task] for task in (self.tasks if self.separate else own)} for split, own in found.items()
        }

    def _divide(self, loaders: dict[str, dict[str, DataLoader]]) -> dict[str, dict[str, Dataset]]:
        """Return the data sets of all training samples and of those for weights and policy."""
        parts: dict[str, dict[str, Dataset]] = {"train": {}, "weights": {}, "policy": {}}
        for task, loader in loaders["train"].items():
            train = parts["train"][task] = loader.dataset
            if "policy" in loaders:
                parts["weights"][task] = loaders.get("weights", loaders["train"])[task].dataset
                parts["policy"][task] = loaders["policy"][task].dataset
                continue
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.options.seed)).tolist()
            cut = round(self.options.policy_fraction * len(train))
            if not 0 < cut < len(train):
                raise UserError(
                    f"policy_fraction {self.options.policy_fraction} of {len(train)} samples leaves a part empty"
                )
            parts["weights"][task] = torch.utils.data.Subset(train, order[cut:])
            parts["policy"][task] = torch.utils.data.Subset(train, order[:cut])
        return parts

    def _fresh(self) -> TaskModel:
        backbone, heads, adapting = copy.deepcopy(self._start)
        model = adapt(backbone, self.options.method, **adapting)
        for task, head in heads.items():
            model.add_task(task, head=head)
        return model

    def _check_batch(self) -> None:
        batches = [(task, self.collate[task]([own[0]])) for part in self.parts.values() for task, own in part.items()]
        if self.separate:
            for task, batch in (*batches, *((task, next(iter(loader), None)) for task, loader in self.val.items())):
                inputs_and_labels(batch, task)
            return
        for batch in (next(iter(self.val), None), *(batch for _, batch in batches)):
            labels = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
            if not isinstance(labels, Mapping) or not set(self.tasks) <= set(labels):
                raise UserError(
                    f"loaders have to give (inputs, {{task: labels}}) with labels of {', '.join(self.tasks)}, or be given by task"
                )

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: min(map(len, part.values())) for name, part in self.parts.items()}

    def pre_train(self, iterations: int) -> TaskModel:
        """Train the weights, with all choices mixed in equal parts (AutoMTL) or with every block running.

        Args:
            iterations: steps, > 0.

        Returns:
            The model, :attr:`model`.
        """
        self.options = replace(self.options, warmup_iterations=_steps(iterations))
        return self._fit("pre-train", self.model, pretrain_plan(self.options))

    def learn_policy(self, iterations: int) -> Policy:
        """Train weights and gates in turn, on different samples.

        Args:
            iterations: total steps, of weights and gates together.

        Returns:
            The most probable policy, which also holds the probabilities: :meth:`taps.methods.policy.Policy.sample` and
            :meth:`taps.methods.policy.Policy.top` return others. A warning is issued where probabilities are nearly uniform.
        """
        cycle = sum(cycle_steps(self.options, self._sizes))
        if _steps(iterations) < cycle:
            raise UserError(f"learning a policy takes a cycle of {cycle} steps at least, not {iterations}")
        self.options = replace(self.options, iterations=iterations, warmup_iterations=0)
        plan = policy_plan(self.options, self._sizes, len(self.model.units))
        self._fit("policy", self.model, plan)
        policy = Policy.of(self.model, plan.phases[-1].curriculum)
        doubt = policy.uncertainty_warning()
        if doubt is not None:
            warnings.warn(doubt, stacklevel=2)
        return policy

    def post_train(self, policy: Policy, iterations: int, start: str = "policy") -> TaskModel:
        """Train the network under a policy.

        Args:
            policy: a policy for this network and these tasks.
            iterations: steps, > 0.
            start: initial weights: ``"policy"``, those after policy learning, or ``"scratch"``, the original ones (published).

        Returns:
            A new model; its :meth:`taps.task_model.TaskModel.predictor` holds only the chosen operators.

        Raises:
            UserError: for a policy that does not fit the network, or an unknown ``start``.
        """
        if start not in ("policy", "scratch"):
            raise unknown("start", start, ("policy", "scratch"))
        policy.check_fits(self.model, self.tasks, "given")
        model = copy.deepcopy(self.model) if start == "policy" else self._fresh()
        model.follow({task: policy.entries(task) for task in self.tasks})
        self.options = replace(self.options, retrain_iterations=_steps(iterations))
        return self._fit("post-train", model, weights_plan(self.options, self._sizes, self.options.seed)).eval()

    def _fit(self, stage: str, model: TaskModel, plan) -> TaskModel:
        options = self.options
        loaders, samplers = {}, {}
        accelerator = Accelerator()
        for name, steps in plan.batches.items():
            made = {}
            for task, samples in self.parts[name].items():
                sampler = StreamSampler(len(samples), options.batch_size, steps, options.seed)
                loader = DataLoader(_Planned(samples), batch_sampler=sampler, collate_fn=self.collate[task])
                made[task] = (loader, sampler)
            if self.separate:
                loaders[name] = SeparateLoaders({task: own for task, (own, _) in made.items()}, accelerator.device)
                samplers[name] = Samplers([own for _, own in made.values()])
            else:
                loaders[name], samplers[name] = made[""]

        def validate() -> tuple[dict[str, dict], float]:
            relies = not model.policies and not self._has_single_samples
            with evaluating(model), batch_statistics(model, relies), torch.no_grad():
                found = self.evaluate(model)
            return found, -sum(options.task_weights.get(task, 1.0) * row["loss"] for task, row in found.items())

        def report(rows: list[dict], is_best: bool) -> None:
            self.history += [{"stage": stage, **row} for row in rows]

        run_phases(
            model, self.tasks, loaders, samplers, plan.recipe, accelerator, criterion=self.losses, validate=validate,
            on_epoch=report,
        )  # fmt: skip
        return model

    def validate(self, hard: bool = True) -> dict[str, dict]:
        """Return :meth:`evaluate` of :attr:`model`.

        Args:
            hard: with decisions, as in inference; otherwise with the mixtures that policies are learned with, drawn anew in each
                batch at the temperature reached.
        """
        # Not what these contain, whose norms stay in evaluation mode.
        relaxed = (
            []
            if hard
            else [module for unit in self.model.units for module in (unit, *(unit.gates[task] for task in self.tasks))]
        )
        with evaluating(self.model):
            try:
                for module in relaxed:
                    module.training = True
                return self.evaluate(self.model)
            finally:
                for module in relaxed:
                    module.training = False

    def evaluate(self, model: TaskModel) -> dict[str, dict]:
        """Return the mean ``loss`` and ``metric`` of every task on the validation data, in the model's current mode.

        A metric with ``val_metrics()`` adds the numbers that this returns instead of ``metric``.
        """
        device = next(model.parameters()).device
        sums: dict[str, dict[str, float]] = {task: {} for task in self.tasks}
        counts = dict.fromkeys(self.tasks, 0)
        with torch.no_grad():
            for task, output, labels in self._outputs(model, device):
                counts[task] += len(output)
                measures = {
                    "loss": self.losses[task],
                    **({"metric": with_mask(self.metrics[task])} if self.metrics else {}),
                }
                for name, measure in measures.items():
                    value = measure(output, labels)
                    if name == "loss" or not hasattr(self.metrics[task], "val_metrics"):
                        sums[task][name] = sums[task].get(name, 0.0) + float(value) * len(output)
        found = {task: {name: value / counts[task] for name, value in own.items()} for task, own in sums.items()}
        for task, metric in self.metrics.items():
            if hasattr(metric, "val_metrics"):
                found[task].update(metric.val_metrics())
        return found

    def _outputs(self, model: TaskModel, device: torch.device) -> Iterator[tuple[str, Tensor, Tensor | Masked]]:
        """Yield each task's outputs and labels, batch by batch."""
        if self.separate:
            for task, loader in self.val.items():
                for batch in loader:
                    x, labels = inputs_and_labels(batch, task)
                    yield task, model(x.to(device), task=task), labels.to(device)
            return
        for x, labels in self.val:
            outputs = model(x.to(device), tasks=self.tasks)
            yield from ((task, outputs[task], labels[task].to(device)) for task in self.tasks)
