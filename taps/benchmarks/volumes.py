"""The benchmark of volumes: categories and numbers to predict for every subject."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn

from taps.benchmarks.base import Benchmark
from taps.data.generated.brain_volumes import CATEGORIES, COLUMNS, NUMBERS, make_brains
from taps.data.multi_label import IGNORE_INDEX
from taps.data.records.volumes import VolumeData, open_volumes
from taps.errors import UserError, check_known
from taps.networks.resnet_nd import create_volume_backbone
from taps.networks.weights import load_weights
from taps.settings.multi_task import MultiTaskSettings
from taps.task_model import TaskModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: folder of the generated volumes, which are used unless data is named
GENERATED = Path("datasets") / "volumes_generated"


_SHOWN = 300


@dataclass(frozen=True)
class VolumeBenchmark(Benchmark):
    """A benchmark of categories and numbers to predict from every subject's volume."""

    data: VolumeData

    def backbone(self) -> nn.Module:
        options = self.options
        if options.pretrained:
            raise UserError("there are no pretrained weights for volumes; leave --pretrained out, or give --model_path")
        torch.manual_seed(options.seed)
        net = create_volume_backbone(options.model_type, 1, options.channels, options.output_stride)
        if options.model_path:
            load_weights(net, options.model_path)
        return net

    def head(self, task: str, features: int) -> nn.Module:
        return nn.Linear(features, self.data.tasks[task].channels)

    def shown(self, model: TaskModel, count: int = _SHOWN) -> list[dict]:
        samples = self.data.samples("test", False)
        return [
            {"targets": samples[index][1], "predicted": self.answers(model, samples[index][0])}
            for index in range(min(count, len(samples)))
        ]

    def picture(self, shown: list[dict]) -> Figure:
        from taps.plots import records as record_plots

        pairs: dict[str, list[tuple[float, float]]] = {}
        for name, task in self.data.tasks.items():
            rows = [(row["targets"][name], row["predicted"][name]) for row in shown]
            if task.kind == "category":
                pairs[name] = [(int(label), int(output.argmax())) for label, output in rows if label != IGNORE_INDEX]
            else:
                mean, std = task.scale
                known = [(float(label), float(output)) for label, output in rows if label.isfinite().all()]
                pairs[name] = [(mean + std * label, mean + std * output) for label, output in known]
        return record_plots.subjects(pairs, {name: task.names for name, task in self.data.tasks.items()})


def open_subjects(options: MultiTaskSettings, accelerator: Accelerator) -> VolumeBenchmark:
    """Open the benchmark that the options name, with train not yet split; generated volumes unless data is named.

    Raises:
        UserError: if the data is missing or invalid, or lacks a task.
    """
    given = [options.images, options.labels]
    if any(given) and not all(given):
        raise UserError("--images and --labels go together: the folder of the volumes and the table of their targets")
    if options.dataset:
        raise UserError("benchmark volumes takes --images and --labels instead of --dataset")
    cat, num = options.cat_target or (), options.num_target or ()
    if not any(given):
        check_known("column of the generated table", (*cat, *num), COLUMNS)
        with accelerator.local_main_process_first():
            make_brains(GENERATED)
        given = [GENERATED / "images", GENERATED / "labels.csv"]
        if not cat and not num:
            cat, num = CATEGORIES, NUMBERS
    data = open_volumes(
        Path(given[0]), Path(given[1]), cat, num, options.input_size, options.subject_column, options.group or (),
        options.mixed_shapes, options.workers,
    )  # fmt: skip
    return VolumeBenchmark(data.choose(list(dict.fromkeys(options.tasks))) if options.tasks else data, options)
