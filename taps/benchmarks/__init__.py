"""Multi-task benchmarks by name: maps of images, images of several domains, hospital stays, volumes of subjects."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from accelerate import Accelerator

from taps.benchmarks.classes import open_classes
from taps.benchmarks.dense import FOLDERS, open_dense
from taps.benchmarks.shared import Benchmark, Metrics
from taps.benchmarks.stays import open_stays
from taps.benchmarks.volumes import open_subjects
from taps.data.shared import split_train
from taps.errors import unknown

BENCHMARKS = (*FOLDERS, "domainnet", "mimic3", "volumes")
__all__ = ["BENCHMARKS", "Benchmark", "Metrics", "open_benchmark"]


def open_benchmark(options: Namespace, accelerator: Accelerator) -> Benchmark:
    """The data that the options name, checked and split.

    Raises:
        UserError: if it is missing or wrong, or the benchmark lacks a task.
    """
    if options.benchmark == "domainnet":
        return open_classes(options, accelerator)
    opener = {"mimic3": open_stays, "volumes": open_subjects}.get(options.benchmark, open_dense)
    benchmark = opener(options, accelerator)
    data = split_train(benchmark.data, options.val_fraction, options.policy_fraction, options.seed)
    for name in options.task_weights:
        if name not in data.tasks:
            raise unknown(f"task of benchmark {data.name} in --task_weights", name, data.tasks)
    return replace(benchmark, data=data)
