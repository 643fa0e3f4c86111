"""Multi-task benchmarks: data, heads, losses and metrics of all tasks behind one face, dense or not."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from taps import commands
from taps.data import TaskData, split_validation
from taps.data.dense import DenseData, DenseSet, make_evaluation, make_stream, split_train
from taps.data.formatted import ALIASES, layout_of, open_formatted
from taps.data.images import ImageSet
from taps.data.scenes import make_scenes
from taps.data.tasks import make_task_loader
from taps.dense import make_loss, to_size
from taps.errors import UserError, unknown
from taps.heads import ASPP, create_dense_backbone
from taps.layer import evaluating
from taps.metrics import accuracy
from taps.model import TaskModel

#: where a benchmark's data is looked for, below the data root
FOLDERS = {"nyuv2": "nyu_v2", "cityscapes": "cityscapes", "taskonomy": "taskonomy", "scenes": "scenes"}
BENCHMARKS = (*FOLDERS, "domainnet")
Metrics = dict[str, dict[str, float]]
_CHECKED = 1000  # samples of a split


class Executed:
    """Counts, inside a ``with`` block, the share of samples for which each task's gates run each unit."""

    def __init__(self, model: TaskModel, tasks: Iterable[str]) -> None:
        self.model, self.tasks = model, tuple(tasks)
        self.sums = {task: [0.0] * len(model.units) for task in self.tasks}
        self.calls = {task: [0] * len(model.units) for task in self.tasks}

    def __enter__(self) -> Executed:
        self._hooks = [
            gate.register_forward_hook(self._counter(task, index))
            for task in self.tasks
            for index, gate in enumerate(self.model.gates(task))
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _counter(self, task: str, index: int) -> Callable:
        def count(gate, args, decision) -> None:
            run = decision.run
            size = len(args[0]) if isinstance(args[0], Tensor) else 1
            self.sums[task][index] += float(run.float().mean() if isinstance(run, Tensor) else run) * size
            self.calls[task][index] += size

        return count

    def rates(self, accelerator: Accelerator) -> dict[str, list[float]]:
        """For each task the share of its samples, over all processes, that ran each unit: 0..1."""
        found = {}
        for task in self.tasks:
            both = torch.tensor([self.sums[task], self.calls[task]], dtype=torch.float32, device=accelerator.device)
            total, count = accelerator.reduce(both, "sum").cpu()
            found[task] = (total / count.clamp(min=1)).tolist()
        return found


@dataclass(frozen=True)
class DenseBenchmark:
    """Maps to predict on the same images.

    Attributes:
        data: the chosen tasks and all splits.
        options: of the command.
    """

    data: DenseData
    options: Namespace

    @property
    def tasks(self) -> list[str]:
        return list(self.data.tasks)

    def size(self, split: str) -> int:
        """Number of samples."""
        return len(self.data.splits[split])

    def check(self) -> None:
        """Read samples of every split, all of them where there are few, before anything is trained.

        Raises:
            UserError: if a file holds what it should not, or the images of val or test differ in size.
        """
        for split in ("train", "val", "test"):
            samples = DenseSet(self.data, split, False)
            step = max(len(samples) // _CHECKED, 1)
            sizes = set()
            for index in tqdm(range(0, len(samples), step), desc=f"checking {split}", disable=None, leave=False):
                sizes.add(samples.read(index)["image"].shape[:2])
            if split != "train" and len(sizes) > 1 and self.options.batch_size > 1:
                raise UserError(f"{self.data.name}: the images of {split} differ in size: use --batch_size 1")

    def backbone(self) -> nn.Module:
        """The network, from its seed or its weights."""
        crop = self.data.crop
        size = (crop, crop) if isinstance(crop, int) else crop
        options = self.options
        torch.manual_seed(options.seed)
        return create_dense_backbone(
            options.model_type, options.pretrained, options.model_path, options.output_stride, options.channels, size
        )

    def head(self, task: str, features: int) -> nn.Module:
        """A fresh head."""
        options = self.options
        return ASPP(
            features, self.data.tasks[task].channels, options.head_width, options.head_rates, options.head_dropout
        )

    def criteria(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The losses by task."""
        return {name: make_loss(task, self.options.loss_at == "output") for name, task in self.data.tasks.items()}

    def stream(self, split: str, batches: int, seed: int, processes: int, tasks: Sequence[str]):
        """A training loader and its sampler."""
        data, size, workers = self.data.choose(tasks), self.options.batch_size, self.options.workers
        return make_stream(data, split, size, batches, seed=seed, workers=workers, processes=processes)

    def evaluate(self, model: TaskModel, split: str, accelerator: Accelerator, limit: int | None = None) -> Metrics:
        """The metrics of every task of the model, in the mode it is in, on a split."""
        from taps.dense_metrics import make_metric  # torchmetrics: a second of import that --help need not wait for

        tasks = model.tasks
        published = self.options.metrics == "published"
        device = "cpu" if accelerator.device.type == "mps" else accelerator.device  # which has no float64
        meters = {task: make_metric(self.data.tasks[task], published).to(device) for task in tasks}
        for x, targets in self._batches(split, accelerator, limit):
            with torch.no_grad(), accelerator.autocast():
                outputs = model(x, tasks=tasks)
            for task in tasks:
                output = to_size(
                    outputs[task].float(), targets[task].shape[-2:], "nearest" if published else "bilinear"
                )
                output, target = accelerator.gather_for_metrics((output, targets[task]))
                meters[task].update(output.to(device), target.to(device))
        return {task: meter.compute() for task, meter in meters.items()}

    def _batches(self, split: str, accelerator: Accelerator, limit: int | None):
        loader = make_evaluation(self.data, split, self.options.batch_size, self.options.workers)
        return _progress(accelerator.prepare_data_loader(loader), limit, split, accelerator)

    def example(self, split: str = "test", count: int | None = None) -> Tensor:
        """A batch of images of a split."""
        samples = DenseSet(self.data.choose([]), split, False)
        count = min(count or self.options.batch_size, len(samples))
        return torch.stack([samples[index][0] for index in range(count)])

    def shown(self, model: TaskModel, count: int = 3) -> list[dict]:
        """Some test samples with what is labelled and what is predicted: for pictures."""
        samples = DenseSet(self.data, "test", False)
        device = next(model.parameters()).device
        rows = []
        for index in range(min(count, len(samples))):
            x, targets = samples[index]
            outputs = model.predict(x[None].to(device))
            predicted = {task: to_size(outputs[task].float().cpu(), targets[task].shape[-2:])[0] for task in outputs}
            rows.append({"image": samples.read(index)["image"], "targets": targets, "predicted": predicted})
        return rows


@dataclass(frozen=True)
class ClassBenchmark:
    """Classification tasks, each with images of its own (DomainNet and any image folders).

    Attributes:
        data: the tasks, with validation images.
        policies: the images of each task that learn the policies, a part of its training images.
        options: of the command.
    """

    data: tuple[TaskData, ...]
    policies: tuple[TaskData, ...]
    options: Namespace

    @property
    def tasks(self) -> list[str]:
        return [task.name for task in self.data]

    def _samples(self, task: str, split: str):
        whole = next(one for one in self.data if one.name == task)
        parts = next(one for one in self.policies if one.name == task)
        validation = whole.val if whole.val is not None else whole.test
        by_split = {"train": whole.train, "val": validation, "test": whole.test}
        return {**by_split, "weights": parts.train, "policy": parts.val}[split]

    def size(self, split: str) -> int:
        """Number of images, a task in the mean."""
        return sum(len(self._samples(task, split)) for task in self.tasks) // len(self.tasks)

    def check(self) -> None:
        """Images are read when they are needed; ``python -m taps.data`` checks their number."""

    def backbone(self) -> nn.Module:
        return commands.make_base(self.options)

    def head(self, task: str, features: int) -> nn.Module:
        return nn.Linear(features, len(next(one for one in self.data if one.name == task).classes))

    def criteria(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        return dict.fromkeys(self.tasks, nn.functional.cross_entropy)

    def _prepare(self):
        return commands.make_preprocessing(
            self.options,
            commands.make_base(Namespace(**{**vars(self.options), "pretrained": False, "model_path": None})),
        )

    def stream(self, split: str, batches: int, seed: int, processes: int, tasks: Sequence[str]):
        prepare = self._prepare()
        whole = {one.name: one for one in self.data}
        return make_task_loader(
            {task: self._samples(task, split) for task in tasks},
            {task: prepare.transform(True, whole[task].squash, whole[task].flip) for task in tasks},
            self.options.batch_size,
            seed=seed,
            workers=self.options.workers,
            processes=processes,
            batches=batches * processes,
        )

    def evaluate(self, model: TaskModel, split: str, accelerator: Accelerator, limit: int | None = None) -> Metrics:
        prepare, found = self._prepare(), {}
        for task in model.tasks:
            whole = next(one for one in self.data if one.name == task)
            samples = ImageSet(self._samples(task, split), prepare.transform(False, whole.squash))
            size = self.options.batch_size  # a last batch of one image would have no statistics of its own
            size += len(samples) % size == 1
            loader = accelerator.prepare_data_loader(DataLoader(samples, size, num_workers=self.options.workers))
            with torch.no_grad():
                value = accuracy(model, task, loader, accelerator, len(whole.classes), limit, split)
            found[task] = {"accuracy": value}
        return found

    def example(self, split: str = "test", count: int | None = None) -> Tensor:
        whole = self.data[0]
        samples = ImageSet(self._samples(whole.name, split), self._prepare().transform(False, whole.squash))
        count = min(count or self.options.batch_size, len(samples))
        return torch.stack([samples[index][0] for index in range(count)])

    def shown(self, model: TaskModel, count: int = 3) -> list[dict]:
        return []


Benchmark = DenseBenchmark | ClassBenchmark


def _progress(loader: DataLoader, limit: int | None, title: str, accelerator: Accelerator):
    count = min(len(loader), limit or len(loader))
    quiet = None if accelerator.is_main_process else True
    return tqdm(islice(loader, count), total=count, desc=title, disable=quiet, leave=False)


def open_benchmark(options: Namespace, accelerator: Accelerator) -> Benchmark:
    """The data that the options name, checked and split.

    Raises:
        UserError: if it is missing or wrong, or the benchmark lacks a task.
    """
    if options.benchmark == "domainnet":
        return _open_classes(options, accelerator)
    if options.dataset and len(options.dataset) > 1:
        raise UserError(f"benchmark {options.benchmark} lies in one folder; --dataset names {len(options.dataset)}")
    root = Path(options.dataset[0]) if options.dataset else Path("datasets") / FOLDERS[options.benchmark]
    if options.benchmark == "scenes" and not options.dataset:
        with accelerator.local_main_process_first():
            make_scenes(root)
    data = open_formatted(options.benchmark, root, layout_of(options.benchmark, options.num_class))
    for name in options.task_weights:
        if name not in data.tasks:
            raise unknown(f"task of benchmark {data.name} in --task_weights", name, data.tasks)
    names = [ALIASES.get(name, name) for name in options.tasks] if options.tasks else list(data.tasks)
    data = data.choose(list(dict.fromkeys(names)))
    if options.crop:
        data = replace(data, crop=options.crop)
    data = split_train(data, options.val_fraction, options.policy_fraction, options.seed)
    return DenseBenchmark(data, options)


def _open_classes(options: Namespace, accelerator: Accelerator) -> ClassBenchmark:
    with accelerator.local_main_process_first():
        tasks = commands.read_data(options.dataset, options)
    if options.tasks:
        known = [task.name for task in tasks]
        wrong = [name for name in options.tasks if name not in known]
        if wrong:
            raise UserError(f"benchmark domainnet has no task {wrong[0]!r}; it has {', '.join(known)}")
        tasks = [task for task in tasks if task.name in options.tasks]
    whole = [split_validation(task, options.val_fraction, options.seed) for task in tasks]
    parts = [split_validation(replace(task, val=None), options.policy_fraction, options.seed + 1) for task in whole]
    return ClassBenchmark(tuple(whole), tuple(parts), options)


def measure_executed(
    benchmark: Benchmark, model: TaskModel, split: str, accelerator: Accelerator, limit: int | None = None
) -> tuple[Metrics, Mapping[str, list[float]]]:
    """The metrics on a split, and for each task the share of samples that ran each unit."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        counts = stack.enter_context(Executed(model, model.tasks))
        metrics = benchmark.evaluate(model, split, accelerator, limit)
    return metrics, counts.rates(accelerator)
