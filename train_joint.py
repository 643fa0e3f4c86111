"""Train one network for many tasks together: a shared base and, for each task, small deltas behind learned gates.

python train_joint.py                                    # the demo's six tasks, the base learning along
python train_joint.py --variant lite                     # a base shared by all first, then one task after another
python train_joint.py --dataset datasets/DomainNet --model_type resnet34 --lam 1
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

import taps
from options import parse_joint
from taps import commands, curve
from taps.data import TaskData
from taps.errors import UserError
from taps.experiment import Experiment, check_budget, prepare_tasks
from taps.files import read_tensors, write_tensors
from taps.signals import StopSignals


def main(arguments: Sequence[str]) -> None:
    options = parse_joint(arguments)
    if options.multi_gpu:
        commands.launch_on_every_gpu(__file__, arguments)
    accelerator = commands.make_accelerator(options)
    tasks = prepare_tasks(options, accelerator)
    if len(tasks) < 2:
        raise UserError(f"joint training needs at least two tasks, {tasks[0].name} is one; use train_sequential.py")
    with StopSignals() as stop:
        train = lite if options.variant == "lite" else together
        train(options, accelerator, tasks, stop)
    accelerator.end_training()


def together(
    options: Namespace,
    accelerator: Accelerator,
    tasks: list[TaskData],
    stop: StopSignals,
) -> None:
    """The base and every task's deltas, gates, norms and heads at once."""
    net = commands.make_base(options)
    prepare = commands.make_preprocessing(options, net)
    runs = curve.runs(options)

    def adapted() -> taps.TaskModel:  # the base learns, so that each run needs its own
        kind = {"norm": options.norm, "layers": options.layers, "train_base": True}
        return taps.adapt(copy.deepcopy(net), options.method, **kind)

    model = adapted()
    for own in runs:
        check_budget(own, model, tasks)
    with curve.shared_start(options, accelerator) as opened:
        for own in runs:
            model = model if own is runs[0] else adapted()
            path = Path(own.result_path) / own.experiment_name
            with Experiment.start(own, accelerator, tasks, prepare, path, stop, opened=opened) as experiment:
                experiment.announce(model)
                experiment.train_together(model)
                experiment.finish()


def lite(
    options: Namespace,
    accelerator: Accelerator,
    tasks: list[TaskData],
    stop: StopSignals,
) -> None:
    """First one network that all tasks share, then one task after another on it: the memory of one task."""
    path = Path(options.result_path) / options.experiment_name
    net = commands.make_base(options)
    prepare = commands.make_preprocessing(options, net)
    second = taps.adapt(copy.deepcopy(net), options.method, norm=options.norm, layers=options.layers, train_base=False)
    check_budget(options, second, tasks)
    with Experiment.start(options, accelerator, tasks, prepare, path, stop, stages=("shared",)) as experiment:
        own = {
            "method": "hard_sharing",
            "norm": "frozen",
            "epochs": options.shared_epochs,
            "budget": None,
            "layers": None,
        }
        first_stage = Namespace(**{**vars(options), **own})
        with Experiment.start(first_stage, accelerator, tasks, prepare, path / "shared", stop) as shared:
            model = taps.adapt(net, "hard_sharing", train_base=True)
            shared.announce(model)
            shared.train_together(model)
            shared.finish()
        del model, net
        base = read_tensors(shared.folder.base_path)
        if accelerator.is_main_process and not experiment.folder.base_path.is_file():
            write_tensors(experiment.folder.base_path, base)
        accelerator.wait_for_everyone()
        second.load_base(base)
        experiment.announce(second)
        experiment.train_in_sequence(second, heads=path / "shared")
        experiment.finish(before=sum(row["seconds"] for row in shared.folder.rows))


if __name__ == "__main__":
    commands.run(main)
