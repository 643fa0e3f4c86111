"""Sub-tasks of a base task (efficient computation sharing): a :mod:`taps.runs.multi_task` run that adds tasks one by one.

single_task/<base task>/   the base task's network, on which the others are built
single_task/<task>/        full fine-tuning of all of its weights, the reference of Δ_T if it is measured
sub_task_000/<task>/       the sparse delta of one task, trained with seed 0
retrain_000/               the base and all of its tasks, ready for use and testing
reuse.json                 cost and quality of sub-tasks computed from the base's activations, by allowed error
"""

from __future__ import annotations

from torch import Tensor

from taps.errors import UserError, unknown
from taps.methods.sparse_delta import max_weights
from taps.metrics.relative_gain import relative_gain
from taps.reuse.from_base import Reuse
from taps.runs.multi_task import MultiTask
from taps.storage.files import read_json, read_tensors, write_json, write_tensors
from taps.task_model import TaskModel
from taps.training.schedules import base_plan, delta_plan, weights_plan

#: relative errors allowed in the inputs of matrix products, for which reuse is measured
ERRORS = (0.0, 0.02, 0.05, 0.1, 0.2)


class SubTasks(MultiTask):
    """A run of efficient computation sharing."""

    @property
    def base_task(self) -> str:
        return self.options.base_task or self.benchmark.tasks[0]

    @property
    def sub_tasks(self) -> list[str]:
        return [task for task in self.benchmark.tasks if task != self.base_task]

    def check(self) -> None:
        tasks = self.benchmark.tasks
        if self.base_task not in tasks:
            raise unknown("task in --base_task", self.base_task, tasks, "it has to be among --tasks")
        if not self.sub_tasks:
            raise UserError(f"{self.base_task} is the only task; name others in --tasks that are built on it")
        super().check()
        model, task = self.model(()), self.sub_tasks[0]
        model.add_task(task, head=self.benchmark.head(task, model.num_features))
        max_weights(model, task, self.options.density)

    @property
    def base_stage(self) -> str:
        """The name of the stage that trains the base task's network."""
        return f"single_task/{self.base_task}"

    def train(self) -> None:
        self._announce(self.model(()))
        if "retrain" not in self.options.phases:
            return
        if not self._is_trained(self.base_stage):
            plan = base_plan(self.options, self.sizes, self.options.seed)
            self._fit(self.base_stage, self.model([self.base_task], "hard_sharing"), plan, [self.base_task])
        self.benchmark = self.benchmark.without_frames()  # only the base task is trained beside them
        for task in self.sub_tasks if self.options.single_task == "measure" else ():
            stage = f"single_task/{task}"
            if not self._is_trained(stage):
                model = self._on_base(self.model([task], "hard_sharing"))
                self._fit(stage, model, weights_plan(self.options, self.sizes, self.options.seed), [task])
        for number in self.options.exp_ids:
            for task in self.sub_tasks:
                stage = f"sub_task_{number:03d}/{task}"
                if not self._is_trained(stage):
                    plan = delta_plan(self.options, self.options.seed + number)
                    self._fit(stage, self._on_base(self.model([task])), plan, [task])
            self._gather(number)
            self.accelerator.wait_for_everyone()

    def _on_base(self, model: TaskModel) -> TaskModel:
        """Load the base task's weights into the model, and start its tasks' norms from the base task's."""
        model.load_base(read_tensors(self.folder.path / self.base_stage / "base.safetensors"))
        for norm in model.task_norms:
            for task in list(norm.norms):
                norm.add_task(task)
        return model.to(self.accelerator.device)

    def _gather(self, number: int) -> None:
        """Combine the base and the trained sub-tasks in one stage."""
        stage = self.folder.path / f"retrain_{number:03d}"
        if (stage / "trained.json").is_file() or not self.accelerator.is_main_process:
            return
        parts = {task: self.folder.path / f"sub_task_{number:03d}" / task for task in self.sub_tasks}
        model = self._on_base(self.model([]))
        self._add_base_task(model)
        for task, part in parts.items():
            model.load_task(part / task, head=self.benchmark.head(task, model.num_features))
        write_tensors(stage / "base.safetensors", model.base_state())
        for task in self.benchmark.tasks:
            model.save_task(task, stage / task)
        trained = [read_json(part / "trained.json") for part in parts.values()]
        score = sum(row["validation_score"] for row in trained) / len(trained)
        write_json(stage / "trained.json", {"seconds": 0.0, "validation_score": score})

    def _add_base_task(self, model: TaskModel) -> None:
        """Add the base task: the base itself, with the head that was trained with it."""
        plain = self.stored(self.base_stage, [self.base_task])
        model.add_task(self.base_task, head=plain.heads[self.base_task])
        model.follow({self.base_task: [1.0] * len(model.units)})
        for norm in model.task_norms:
            norm.remove_task(self.base_task)

    # -- reuse ---------------------------------------------------------------------------------------------------

    def test(self) -> None:
        super().test()
        self.accelerator.wait_for_everyone()
        best = read_json(self.folder.path / "summary.json")["best"]
        tested = self.folder.path / best / "summary.json"
        reused = self.folder.path / "reuse.json"
        if not reused.is_file() or reused.stat().st_mtime_ns < tested.stat().st_mtime_ns:
            self._measure_reuse(best)
            self.accelerator.wait_for_everyone()

    def _measure_reuse(self, stage: str) -> None:
        """Write ``reuse.json`` and its table: thresholds from a few validation images, quality on all of them."""
        reuse = Reuse(self.stored(stage, self.benchmark.tasks), self.base_task, self.sub_tasks)
        images = self.benchmark.example("val", 4).to(self.accelerator.device)
        size = max(len(images) // 2, 2)
        rows = []
        for error in ERRORS:
            reuse.calibrate([images[:size]], error)
            metrics = self.benchmark.evaluate(Reusing(reuse), "val", self.accelerator, self.options.limit_batches)
            own = {task: metrics[task] for task in self.sub_tasks}
            rows.append({"error": error, "tasks": own, "beside_merged": reuse.beside_dense(images)})
        gains = {
            error: {task: relative_gain(row["tasks"][task], rows[0]["tasks"][task]) for task in self.sub_tasks}
            for error, row in zip(ERRORS, rows, strict=True)
        }
        if self.accelerator.is_main_process:
            write_json(self.folder.path / "reuse.json", {"stage": stage, "base_task": self.base_task, "rows": rows})
        lines = ["sub-tasks computed from the base's activations, validation split, beside their merged networks:"]
        for row in rows:
            parts = [
                f"{task} {gains[row['error']][task]:+.2f} % at {100 * own['macs']:.0f} % of the MACs, {100 * own['time']:.0f} % of "
                "the time"
                for task, own in row["beside_merged"].items()
            ]
            lines.append(f"  error {row['error']:g}: {'; '.join(parts)}")
        self.accelerator.print("\n".join(lines))


class Reusing:
    """Sub-tasks computed by reuse, with the interface of a model."""

    def __init__(self, reuse: Reuse) -> None:
        self.reuse, self.tasks = reuse, [reuse.base_task, *reuse.tasks]

    def __call__(self, x: Tensor, tasks: list[str]) -> dict[str, Tensor]:
        return self.reuse(x)
