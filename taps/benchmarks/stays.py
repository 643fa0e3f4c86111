"""Hospital stays as a benchmark: four questions about each hour of a series."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import nn

from taps.backbones import load_weights
from taps.benchmarks.shared import SharedBenchmark
from taps.data.mimic3 import ALIASES, StayData, open_mimic3
from taps.data.stay_lists import TASKS
from taps.data.stays import make_stays
from taps.errors import UserError
from taps.heads import HourHead
from taps.model import TaskModel
from taps.residual import create_series_backbone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: where the generated stays are, that are used unless data is named
GENERATED = Path("datasets") / "mimic3_generated"


@dataclass(frozen=True)
class StayBenchmark(SharedBenchmark):
    """In-hospital mortality, decompensation, remaining length of stay and phenotypes."""

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
        """The first stays of the test list that ended in death, and others; half and half where there are both."""
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
                    "name": f"stay {len(rows) + 1}",  # pictures are shown around, names of patients are not
                    "hours": self.data.splits["test"][index].hours,
                    "targets": own,
                    "predicted": self.answers(model, samples[index][0]),
                }
            )
        return rows

    def picture(self, shown: list[dict]) -> Figure:
        from taps import record_plots

        return record_plots.stays(shown, list(shown[0]["targets"]))


def open_stays(options: Namespace, accelerator: Accelerator) -> StayBenchmark:
    """The benchmark that the options name, not yet divided; generated stays unless data is named.

    Raises:
        UserError: if it is missing or wrong, or lacks a task.
    """
    if options.dataset and len(options.dataset) > 1:
        raise UserError(f"benchmark mimic3 lies in one folder; --dataset names {len(options.dataset)}")
    root = Path(options.dataset[0]) if options.dataset else GENERATED
    if not options.dataset:
        with accelerator.local_main_process_first():
            make_stays(root)
    normalizer = Path(options.normalizer) if options.normalizer else None
    names = [ALIASES.get(name, name) for name in options.tasks] if options.tasks else list(TASKS)
    return StayBenchmark(
        open_mimic3(root, options.hours, normalizer, options.positive_weights, names, options.workers), options
    )
