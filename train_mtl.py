"""Learn which blocks of one network each of several tasks runs; train again under sampled policies; test.

python train_mtl.py                                              # AdaShare on Scenes: all phases, offline
python train_mtl.py --method dynashare                           # the same with gates for every sample
python train_mtl.py --method automtl                             # every layer shared, owned or skipped
python train_mtl.py --method sparse_delta --base_task semseg     # sub-tasks that change 2 % of a base task's weights
python train_mtl.py --benchmark nyuv2 --tasks semseg normals depth --phases policy
python train_mtl.py --benchmark nyuv2 --tasks semseg normals depth --phases retrain test --exp_ids 0 1 2
"""

from __future__ import annotations

from collections.abc import Sequence

from options import parse_mtl
from taps import commands
from taps.benchmarks import open_benchmark
from taps.methods import METHODS
from taps.mtl import MultiTask
from taps.signals import StopSignals
from taps.sub_tasks import SubTasks


def main(arguments: Sequence[str]) -> None:
    options = parse_mtl(arguments)
    if options.multi_gpu:
        commands.launch_on_every_gpu(__file__, arguments)
    accelerator = commands.make_accelerator(options)
    benchmark = open_benchmark(options, accelerator)
    row = METHODS.get(options.method)
    kind = SubTasks if row is not None and row.builds_on_base else MultiTask
    with StopSignals() as stop, kind.start(options, benchmark, accelerator, stop) as run:
        if {"policy", "retrain"} & set(options.phases):
            run.train()
        if "test" in options.phases:
            run.test()
    accelerator.end_training()


if __name__ == "__main__":
    commands.run(main)
