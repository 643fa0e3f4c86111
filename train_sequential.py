"""Adapt one pretrained network to one task after another: small deltas behind learned gates, the base untouched.

python train_sequential.py                                          # the demo, about three minutes on two CPU cores
python train_sequential.py --dataset datasets/cubs_cropped --model_type resnet50 --lam 0.1
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import taps
from options import parse_sequential
from taps import commands, curve
from taps.experiment import Experiment, check_budget, prepare_tasks
from taps.signals import StopSignals


def main(arguments: Sequence[str]) -> None:
    options = parse_sequential(arguments)
    if options.multi_gpu:
        commands.launch_on_every_gpu(__file__, arguments)
    accelerator = commands.make_accelerator(options)
    tasks = prepare_tasks(options, accelerator)
    net = commands.make_base(options)
    prepare = commands.make_preprocessing(options, net)
    model = taps.adapt(net, options.method, norm=options.norm, layers=options.layers, train_base=False)
    runs = curve.runs(options)
    for own in runs:
        check_budget(own, model, tasks)
    with StopSignals() as stop, curve.shared_start(options, accelerator) as opened:
        for own in runs:
            path = Path(own.result_path) / own.experiment_name
            with Experiment.start(own, accelerator, tasks, prepare, path, stop, opened=opened) as experiment:
                experiment.announce(model)
                experiment.train_in_sequence(model)
                experiment.finish()
    accelerator.end_training()


if __name__ == "__main__":
    commands.run(main)
