"""Multi-task benchmarks by name: maps of images, images of several domains, hospital stays, volumes of subjects."""

from __future__ import annotations

from dataclasses import replace

from accelerate import Accelerator

from taps.benchmarks.base import Benchmark
from taps.benchmarks.dense import open_dense
from taps.benchmarks.domains import open_classes
from taps.benchmarks.hospital_stays import open_stays
from taps.benchmarks.volumes import open_subjects
from taps.data.multi_label import split_train
from taps.errors import check_known
from taps.settings.multi_task import MultiTaskSettings


def open_benchmark(options: MultiTaskSettings, accelerator: Accelerator) -> Benchmark:
    """Open the data that the options name, check it and split it.

    Raises:
        UserError: if the data is missing or invalid, or the benchmark lacks a task.
    """
    if options.benchmark == "domainnet":
        benchmark = open_classes(options, accelerator)
        check_known("task of benchmark domainnet in --task_weights", options.task_weights or (), benchmark.tasks)
        return benchmark
    opener = {"mimic3": open_stays, "volumes": open_subjects}.get(options.benchmark, open_dense)
    benchmark = opener(options, accelerator)
    data = split_train(benchmark.data, options.val_fraction, options.policy_fraction, options.seed)
    check_known(f"task of benchmark {data.name} in --task_weights", options.task_weights or (), data.tasks)
    return replace(benchmark, data=data)
