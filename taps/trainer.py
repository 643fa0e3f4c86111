"""Policies in four calls: a backbone, heads, loaders, losses and metrics; pre-train; learn the policy; train under it."""

from __future__ import annotations

import copy
import math
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from taps.data.shared import StreamSampler
from taps.errors import UserError, check_number, unknown
from taps.layer import batch_statistics, evaluating
from taps.methods import METHODS
from taps.model import TaskModel, adapt
from taps.plan import POLICY_METHODS, cycle_steps, policy_plan, pretrain_plan, weights_plan
from taps.policy import Policy
from taps.presets import preset
from taps.train import fit

#: from a batch of outputs and labels to a number
Measure = Callable[[Tensor, Tensor], Tensor]
#: options of ``train_mtl.py`` that say how to train
TRAINING = (
    "batch_size", "optimizer", "lr", "base_lr", "score_lr", "momentum", "betas", "wd", "decay", "decay_iterations", "decay_rate",
    "weights_optimizer", "weights_lr", "policy_lr", "policy_wd", "weight_iterations", "policy_iterations", "eval_iterations",
    "settle_iterations", "init_temperature", "temperature_decay", "curriculum_speed", "policy_fraction", "task_weights",
    "limit_batches",
)  # fmt: skip
#: numbers among them: the lowest and the highest value, and whether the lowest itself is one
_RANGES = {
    **dict.fromkeys(("batch_size", "weight_iterations", "policy_iterations"), (1, math.inf, True)),
    **dict.fromkeys(("eval_iterations", "limit_batches"), (1, math.inf, True)),
    **dict.fromkeys(("lr", "base_lr", "score_lr", "weights_lr", "policy_lr", "init_temperature"), (0, math.inf, False)),
    **dict.fromkeys(("decay_iterations", "decay_rate"), (0, math.inf, False)),
    **dict.fromkeys(("wd", "policy_wd", "settle_iterations", "curriculum_speed"), (0, math.inf, True)),
    "momentum": (0, 1, True), "temperature_decay": (0, 1, False),
}  # fmt: skip


class _Planned(Dataset):
    """A data set whose samples are asked for by (index, pass)."""

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
    """Learn what each task does with each unit of one network, and train the network that comes of it.

    Args:
        backbone: any module from a batch to features; its weights are where training starts.
        heads: by task, from features to the task's output.
        loaders: ``"train"`` and ``"val"``, loaders of (inputs, {task: labels}), of which the training ones give their data set,
            batch size and ``collate_fn``, and are shuffled by the seed; with ``"policy"`` too, that one's samples
            learn the policy and all of ``train`` the weights, else a part of ``train`` is set aside for it.
        losses: by task, from outputs and labels to the mean loss.
        metrics: by task, from outputs and labels of a batch to a number; shown in :attr:`history`.
        method: ``"automtl"``, ``"adashare"`` or ``"dynashare"``.
        seed: of everything random.
        **options: of the method (e.g. ``cost_weight``, ``skip``) or of :func:`taps.adapt` (``norm``), with their own defaults;
            or of training, named as those of ``train_mtl.py`` (``lr``, ``policy_lr``, ``task_weights``, …), with the defaults
            that these have for Scenes.

    Attributes:
        model: the shared network with gates.
        history: a dict an epoch and task: ``stage``, ``epoch``, ``train_loss``, ``loss`` and ``metric`` on validation data.

    Raises:
        UserError: for an unknown method or option, a number outside of its range, or tasks that differ between heads, losses,
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
        loaders: Mapping[str, DataLoader],
        losses: Mapping[str, Measure],
        metrics: Mapping[str, Measure] | None = None,
        method: str = "automtl",
        seed: int = 0,
        **options,
    ) -> None:
        if method not in POLICY_METHODS:
            raise unknown("method that learns policies", method, POLICY_METHODS)
        self.tasks = list(heads)
        for what, given in (("losses", losses), ("metrics", metrics or losses)):
            if set(given) != set(self.tasks):
                raise UserError(f"{what} are given for {', '.join(given)}; heads are given for {', '.join(self.tasks)}")
        for name in ("train", "val"):
            if name not in loaders:
                raise UserError(f"loaders lack {name!r}; they have {', '.join(loaders) or 'none'}")
        row = METHODS[method]
        adapting = {name: options.pop(name) for name in (*row.options, "norm", "layers") if name in options}
        values = {
            **preset("scenes", None, method),
            "momentum": 0.9,
            "score_lr": None,
            "limit_batches": None,
            "task_weights": {},
        }
        for name in options:
            if name not in TRAINING:
                raise unknown("option", name, [*TRAINING, *row.options, "norm", "layers"])
        self.losses, self.metrics = dict(losses), dict(metrics or {})
        for name, loader in loaders.items():
            if loader.batch_size is None or isinstance(loader.dataset, torch.utils.data.IterableDataset):
                raise UserError(f"the loader {name!r} needs a data set with a length and a batch_size")
        for task in options.get("task_weights", {}):
            if task not in self.tasks:
                raise unknown("task in task_weights", task, self.tasks)
        loader = loaders["train"]
        self.options = Namespace(
            **{**values, "batch_size": loader.batch_size, **options, "method": method, "seed": seed}
        )
        for name, limits in _RANGES.items():
            check_number(name, getattr(self.options, name), *limits)
        for task, weight in self.options.task_weights.items():
            check_number(f"task_weights of {task}", weight)
        self.val = loaders["val"]
        self.parts = {"train": loader.dataset, **self._divide(loaders)}
        self.collate = loader.collate_fn
        self.history: list[dict] = []
        torch.manual_seed(seed)
        self._start = (copy.deepcopy(backbone), {task: copy.deepcopy(head) for task, head in heads.items()}, adapting)
        self.model = self._fresh()
        self._check_batch()

    def _divide(self, loaders: Mapping[str, DataLoader]) -> dict[str, Dataset]:
        train = loaders["train"].dataset
        if "policy" in loaders:
            return {"weights": train, "policy": loaders["policy"].dataset}
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.options.seed)).tolist()
        cut = round(self.options.policy_fraction * len(train))
        if not 0 < cut < len(train):
            raise UserError(
                f"policy_fraction {self.options.policy_fraction} of {len(train)} samples leaves a part empty"
            )
        return {
            "weights": torch.utils.data.Subset(train, order[cut:]),
            "policy": torch.utils.data.Subset(train, order[:cut]),
        }

    def _fresh(self) -> TaskModel:
        backbone, heads, adapting = copy.deepcopy(self._start)
        model = adapt(backbone, self.options.method, **adapting)
        for task, head in heads.items():
            model.add_task(task, head=head)
        return model

    def _check_batch(self) -> None:
        batches = [next(iter(self.val), None), *(self.collate([part[0]]) for part in self.parts.values())]
        for batch in batches:
            labels = batch[1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
            if not isinstance(labels, Mapping) or not set(self.tasks) <= set(labels):
                raise UserError(
                    f"loaders have to give (inputs, {{task: labels}}) with labels of {', '.join(self.tasks)}"
                )

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: len(part) for name, part in self.parts.items()}

    def pre_train(self, iterations: int) -> TaskModel:
        """Train the weights with all choices in equal parts (AutoMTL), or with every block running.

        Args:
            iterations: steps, > 0.

        Returns:
            The model, :attr:`model`.
        """
        self.options.warmup_iterations = _steps(iterations)
        return self._fit("pre-train", self.model, pretrain_plan(self.options))

    def learn_policy(self, iterations: int) -> Policy:
        """Train weights and gates in turn, on different samples.

        Args:
            iterations: steps of both together.

        Returns:
            The most probable policy, with the probabilities in it: :meth:`taps.policy.Policy.sample` and
            :meth:`taps.policy.Policy.top` give others. A warning is given where these are nearly uniform.
        """
        cycle = sum(cycle_steps(self.options, self._sizes))
        if _steps(iterations) < cycle:
            raise UserError(f"learning a policy takes a cycle of {cycle} steps at least, not {iterations}")
        self.options.iterations, self.options.warmup_iterations = iterations, 0
        self._fit("policy", self.model, policy_plan(self.options, self._sizes, len(self.model.units)))
        policy = Policy.of(self.model)
        doubt = policy.doubt()
        if doubt is not None:
            warnings.warn(doubt, stacklevel=2)
        return policy

    def post_train(self, policy: Policy, iterations: int, start: str = "policy") -> TaskModel:
        """Train the network under a policy.

        Args:
            policy: for this network and these tasks.
            iterations: steps, > 0.
            start: from the weights of policy learning, ``"policy"``, or from those of the beginning, ``"scratch"`` (published).

        Returns:
            A model of its own; its :meth:`taps.model.TaskModel.predictor` holds the chosen operators alone.

        Raises:
            UserError: for a policy that does not fit, or an unknown start.
        """
        if start not in ("policy", "scratch"):
            raise unknown("start", start, ("policy", "scratch"))
        policy.check_fits(self.model, self.tasks, "given")
        model = copy.deepcopy(self.model) if start == "policy" else self._fresh()
        model.follow({task: policy.entries(task) for task in self.tasks})
        self.options.retrain_iterations = _steps(iterations)
        return self._fit("post-train", model, weights_plan(self.options, self._sizes, self.options.seed)).eval()

    def _fit(self, stage: str, model: TaskModel, plan) -> TaskModel:
        options, streams, samplers = self.options, {}, {}
        for name, steps in plan.batches.items():
            samplers[name] = StreamSampler(len(self.parts[name]), options.batch_size, steps, options.seed)
            streams[name] = DataLoader(
                _Planned(self.parts[name]), batch_sampler=samplers[name], collate_fn=self.collate
            )

        def validate() -> tuple[dict[str, dict], float]:
            with evaluating(model), batch_statistics(model, not model.policies), torch.no_grad():
                found = self.evaluate(model)
            return found, -sum(options.task_weights.get(task, 1.0) * row["loss"] for task, row in found.items())

        def on_epoch(rows: list[dict], is_best: bool) -> None:
            self.history += [{"stage": stage, **row} for row in rows]

        fit(
            model, self.tasks, streams, samplers, plan.recipe, Accelerator(), criterion=self.losses, validate=validate,
            on_epoch=on_epoch,
        )  # fmt: skip
        return model

    def evaluate(self, model: TaskModel) -> dict[str, dict]:
        """Mean ``loss`` and ``metric`` of every task on the validation data, in the mode that the model is in."""
        device = next(model.parameters()).device
        sums: dict[str, dict[str, float]] = {task: {} for task in self.tasks}
        count = 0
        with torch.no_grad():
            for x, labels in self.val:
                outputs = model(x.to(device), tasks=self.tasks)
                count += len(x)
                for task in self.tasks:
                    measures = {"loss": self.losses[task], **({"metric": self.metrics[task]} if self.metrics else {})}
                    for name, measure in measures.items():
                        value = float(measure(outputs[task], labels[task].to(device)))
                        sums[task][name] = sums[task].get(name, 0.0) + value * len(x)
        return {task: {name: value / count for name, value in own.items()} for task, own in sums.items()}
