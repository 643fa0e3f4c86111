"""The benchmark of hospital stays: four predictions for each hour of a time series."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn

from taps.benchmarks.base import Benchmark
from taps.data.generated.hospital_stays import make_stays
from taps.data.records.mimic3 import StayData, open_mimic3
from taps.data.records.mimic3_lists import TASKS
from taps.errors import UserError
from taps.networks.heads import HourHead
from taps.networks.series import create_series_backbone
from taps.networks.weights import load_weights
from taps.settings.multi_task import MultiTaskSettings
from taps.settings.task_names import STAYS
from taps.task_model import TaskModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: folder of the generated stays, which are used unless data is named
GENERATED = Path("datasets") / "mimic3_generated"


@dataclass(frozen=True)
class StayBenchmark(Benchmark):
    """A benchmark of in-hospital mortality, decompensation, remaining length of stay and phenotypes."""

    data: StayData

    @property
    def notes(self) -> tuple[str, ...]:
        if self.options.method != "dynashare" or not self.options.causal:
            return self.data.notes
        return (*self.data.notes, "dynashare's gates see the whole series: which blocks run may depend on later hours")

    def backbone(self) -> nn.Module:
        options = self.options
        if options.pretrained:
            raise UserError("there are no pretrained weights for series; leave --pretrained out, or give --model_path")
        torch.manual_seed(options.seed)
        net = create_series_backbone(
            options.model_type,
            len(self.data.discretizer.header),
            options.channels,
            options.causal,
            options.output_stride,
            options.dynamic_kernels,
        )
        if options.model_path:
            load_weights(net, options.model_path)
        return net

    def head(self, task: str, features: int) -> nn.Module:
        options = self.options
        tcn = options.model_type == "tcn"
        return HourHead(
            features,
            self.data.tasks[task].channels,
            self.data.crop,
            stride=1 if tcn else options.output_stride,
            shifted=options.causal and not tcn,
            width=options.head_width,
            rates=options.head_rates,
            dropout=options.head_dropout,
            causal=options.causal,
        )

    def shown(self, model: TaskModel, count: int = 4) -> list[dict]:
        """Return the first stays of the test list that ended in death, up to half of ``count``, and others."""
        samples = self.data.choose([]).samples("test", False)
        labels = [self.data.labels(stay) for stay in self.data.splits["test"][:200]]
        died = [index for index, own in enumerate(labels) if (own["decomp"] == 1).any()]
        others = [index for index in range(len(labels)) if index not in died]
        chosen = (died[: count // 2] + others)[:count]
        rows = []
        for index in chosen:
            own = {name: torch.from_numpy(labels[index][name]) for name in self.data.tasks}
            rows.append(
                {
                    "name": f"stay {len(rows) + 1}",  # pictures are shared, names of patients must not be
                    "hours": self.data.splits["test"][index].hours,
                    "targets": own,
                    "predicted": self.answers(model, samples[index][0]),
                }
            )
        return rows

    def picture(self, shown: list[dict]) -> Figure:
        from taps.plots import records as record_plots

        return record_plots.stays(shown, list(shown[0]["targets"]))


def open_stays(options: MultiTaskSettings, accelerator: Accelerator) -> StayBenchmark:
    """Open the benchmark that the options name, with train not yet split; generated stays unless data is named.

    Raises:
        UserError: if the data is missing or invalid, or lacks a task.
    """
    if options.dataset and len(options.dataset) > 1:
        raise UserError(f"benchmark mimic3 lies in one folder; --dataset names {len(options.dataset)}")
    root = Path(options.dataset[0]) if options.dataset else GENERATED
    if not options.dataset:
        with accelerator.local_main_process_first():
            make_stays(root)
    normalizer = Path(options.normalizer) if options.normalizer else None
    names = [STAYS.get(name, name) for name in options.tasks] if options.tasks else list(TASKS)
    return StayBenchmark(
        open_mimic3(root, options.hours, normalizer, options.positive_weights, names, options.workers), options
    )
