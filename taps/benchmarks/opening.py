"""Multi-task benchmarks by name: maps of images, images of several domains, hospital stays, volumes of subjects."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from accelerate import Accelerator

from taps.benchmarks.base import Benchmark
from taps.benchmarks.dense import open_dense
from taps.benchmarks.domains import open_classes
from taps.benchmarks.hospital_stays import open_stays
from taps.benchmarks.volumes import open_subjects
from taps.data.multi_label import split_train
from taps.errors import unknown
from taps.settings.multi_task import MultiTaskSettings


def open_benchmark(options: MultiTaskSettings, accelerator: Accelerator) -> Benchmark:
    """Open the data that the options name, check it and split it.

    Raises:
        UserError: if the data is missing or invalid, or the benchmark lacks a task.
    """
    if options.benchmark == "domainnet":
        benchmark = open_classes(options, accelerator)
        _check_weights(options, benchmark.tasks, "domainnet")
        return benchmark
    opener = {"mimic3": open_stays, "volumes": open_subjects}.get(options.benchmark, open_dense)
    benchmark = opener(options, accelerator)
    data = split_train(benchmark.data, options.val_fraction, options.policy_fraction, options.seed)
    _check_weights(options, data.tasks, data.name)
    return replace(benchmark, data=data)


def _check_weights(options: MultiTaskSettings, tasks: Collection[str], benchmark: str) -> None:
    for name in options.task_weights or ():
        if name not in tasks:
            raise unknown(f"task of benchmark {benchmark} in --task_weights", name, tasks)
