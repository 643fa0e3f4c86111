"""Multi-task benchmark runs: from settings and data to a results folder, stage by stage.

    results/<experiment>/
      single_task/<task>/…     one network per task, the reference of Δ_T if it is measured
      policy/policy.json …     result of warm-up and policy learning: the best policy, with its weights
      retrain_000/policy.json … training under a policy sampled with seed 0, or plain training for a method without policies
      summary.json             the table; policy.png, similarity.png, predictions.png

A stage holds ``base.safetensors`` and task files of its best epoch, ``trained.json`` once it is trained, and ``summary.json``
once it is tested. Finished stages are not repeated.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from taps.benchmarks.base import Benchmark
from taps.benchmarks.executed import measure_executed
from taps.core import accounting
from taps.core.modules import evaluating
from taps.core.norm import batch_statistics
from taps.errors import UserError, unknown
from taps.methods.policy import Policy, read_policy
from taps.methods.registry import METHODS
from taps.metrics import cost
from taps.metrics.relative_gain import Metrics, mean_metrics, score
from taps.plots import style
from taps.runs.log import Log, open_log
from taps.runs.multi_task_summary import policy_pictures, read_reference, summarise, table
from taps.settings.declare import as_dict, as_yaml, declarations
from taps.settings.multi_task import BenchmarkTraining, MultiTaskSettings, Report, Stages
from taps.stop_signals import Interrupted, StopSignals
from taps.storage import checkpoint, run_folder
from taps.storage.files import read_json, read_tensors, write_json, write_tensors
from taps.task_model import TaskModel, adapt
from taps.training.loop import run_phases
from taps.training.schedules import Plan, learns_policy, policy_plan, resolve_passes, weights_plan


@dataclass
class MultiTask:
    """A multi-task run: :meth:`start` opens its folder, :meth:`train` and :meth:`test` do the work.

    Attributes:
        options: settings of the command.
        benchmark: the data.
        accelerator: devices and processes.
        folder: the results folder.
        stop: signals that end the run.
        log: what goes to TensorBoard and to trackers.
    """

    options: MultiTaskSettings
    benchmark: Benchmark
    accelerator: Accelerator
    folder: run_folder.RunFolder
    stop: StopSignals
    log: Log = field(default_factory=Log)

    @classmethod
    @contextmanager
    def start(cls, options: MultiTaskSettings, benchmark: Benchmark, accelerator: Accelerator, stop: StopSignals):
        """Open the results folder for the ``with`` block; a run of later phases continues an existing one."""
        path = Path(options.result_path) / options.experiment_name
        later = ("policy" not in options.phases and learns_policy(options.method)) or options.phases == ["test"]
        exists = (path / "settings.json").is_file()
        if later and not exists and not (options.policy and "retrain" in options.phases):
            raise UserError(f"{path} holds no run; start it with --phases policy, or all phases")
        if later and options.overwrite and exists:
            raise UserError(f"--overwrite starts {path} again from its first phase; leave it out, or name all --phases")
        free = _free_settings(options, path) if later and exists else ()
        options = resolve_passes(options, benchmark.size("train") // accelerator.num_processes)
        settings = {**as_dict(options), "resize": options.resize, "tasks": benchmark.tasks}
        run = cls(options, benchmark, accelerator, run_folder.RunFolder(path), stop)
        run.check()
        if accelerator.is_main_process:
            run.folder = run_folder.RunFolder.open(
                path,
                settings,
                options.resume or later,
                options.overwrite,
                repeatable=as_yaml(options),
                free=free,
                records="retrain" in options.phases,
            )
            for name, (before, now) in run.folder.changed.items():
                accelerator.print(f"--{name} is {now}, unlike in the run's earlier phases ({before})")
        accelerator.wait_for_everyone()
        name = options.experiment_name if options.track else None
        with run.folder, open_log(path, accelerator, name, settings) as run.log:
            yield run

    @property
    def sizes(self) -> dict[str, int]:
        """Return the number of each process's samples used to train weights and policies in turn."""
        return {split: self.benchmark.size(split) // self.accelerator.num_processes for split in ("weights", "policy")}

    @property
    def learns_policy(self) -> bool:
        return learns_policy(self.options.method)

    def check(self) -> None:
        """Refuse settings that cannot be trained, before anything is written.

        Raises:
            UserError: for an unsuitable network, plan, policy or reference.
        """
        options = self.options
        model = self.model((), "hard_sharing" if options.method == "single_task" else None)
        for split in ("train", "weights", "policy") if self.learns_policy else ("train",):
            self.benchmark.stream(split, 1, 0, 1, self.benchmark.tasks)
        weights_plan(options, self.sizes, options.seed)
        self.benchmark.check()
        if self.learns_policy:
            model.make_gates([1.0] * len(model.units))
            if "policy" in options.phases:
                policy_plan(options, self.sizes, len(model.units))
            if options.policy:
                self.policy()
                if options.retrain_from == "policy" and not (
                    {"policy"} & set(options.phases) or self._is_trained("policy")
                ):
                    raise UserError(
                        "--policy without a policy stage leaves no weights to start from: add --retrain_from scratch"
                    )
        if options.single_task not in (None, "none", "measure"):
            read_reference(Path(options.single_task), self.benchmark.tasks, options.metrics)

    # -- models --------------------------------------------------------------------------------------------------

    def model(
        self,
        tasks: Sequence[str],
        method: str | None = None,
        policy: Policy | None = None,
        start: str | None = None,
        options: Mapping | None = None,
    ) -> TaskModel:
        """Return a new model, whose initial state depends on the seed but not on earlier training.

        Args:
            tasks: tasks to add.
            method: method to use instead of that of the options.
            policy: policy that the tasks follow.
            start: stage that supplies the initial weights, heads and norms.
            options: the method's options; ``None``: those of the run.
        """
        name = method or self.options.method
        given = vars(self.options) if options is None else options
        options = {key: given[key] for key in METHODS[name].options if given.get(key) is not None}
        norm = self.options.norm if self.options.norm in METHODS[name].norms else None
        learns = not METHODS[name].builds_on_base
        model = adapt(self.benchmark.backbone(), name, norm=norm, train_base=learns, **options)
        if self.options.checkpoint_activations:
            model.checkpoint_activations()
        for index, task in enumerate(tasks):
            torch.manual_seed(self.options.seed + 1 + index)
            model.add_task(task, head=self.benchmark.head(task, model.num_features))
        if start is not None:
            self._start_from(model, start)
        if policy is not None:
            # Must follow the loading of weights: tasks that diverge copy the base's norms.
            model.follow({task: policy.entries(task) for task in tasks})
        return model.to(self.accelerator.device)

    def stored(self, stage: str, tasks: Sequence[str], trainable: bool = False) -> TaskModel:
        """Return the model that a stage has saved, with the method and options that it had."""
        path = self.folder.path / stage
        made = read_json(path / tasks[0] / "task.json")
        if made.get("method") not in METHODS:
            raise unknown(f"method in {path / tasks[0]}", made.get("method"), METHODS)
        model = self.model((), made["method"], options=made["options"])
        model.load_base(read_tensors(path / "base.safetensors"))
        for task in tasks:
            model.load_task(path / task, head=self.benchmark.head(task, model.num_features), trainable=trainable)
        return model.eval()

    def _start_from(self, model: TaskModel, stage: str) -> None:
        """Give a model the weights, heads, norms and deltas that a stage has saved, perhaps of another method; gates are new."""
        earlier = self.stored(stage, model.tasks, trainable=True)
        model.load_base(earlier.base_state())
        for task in model.tasks:
            model.heads[task].load_state_dict(earlier.heads[task].state_dict())
            norms = [
                (own.norms, theirs.norms) for own, theirs in zip(model.task_norms, earlier.task_norms, strict=True)
            ]
            deltas = [(own.deltas, theirs.deltas) for own, theirs in zip(model.units, earlier.units, strict=True)]
            for held, stored in (*norms, *deltas):
                if task in held and task in stored:
                    held[task].load_state_dict(stored[task].state_dict())

    # -- training ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train every unfinished stage that the phases include."""
        options, tasks = self.options, self.benchmark.tasks
        model = self.model((), options.method if options.method in METHODS else "hard_sharing")
        units = len(model.units)
        self._announce(model)
        if options.single_task == "measure" and {"policy", "retrain"} & set(options.phases):
            self._train_single()
        if options.method == "single_task":
            self._train_single()
            return
        if self.learns_policy and "policy" in options.phases and not self._is_trained("policy"):
            self._fit("policy", self.model(tasks), policy_plan(options, self.sizes, units), tasks)
        if "retrain" not in options.phases:
            return
        if not self.learns_policy:
            if not self._is_trained("retrain_000"):
                self._fit("retrain_000", self.model(tasks), weights_plan(options, self.sizes, options.seed), tasks)
            return
        learned = self.policy()
        doubt = learned.uncertainty_warning() if options.sample else None
        if doubt is not None:
            self.accelerator.print(f"warning: {doubt} (--no-sample)")
        for number in options.exp_ids:
            stage = f"retrain_{number:03d}"
            if self._is_trained(stage):
                continue
            path = self.folder.path / stage
            if checkpoint.read(run_folder.RunFolder(path).state_path) is not None:
                policy = read_policy(path / "policy.json")  # the policy with which the stage began
            elif options.sample:
                policy = learned.sample(torch.Generator().manual_seed(1000 * options.seed + number))
            else:
                policy = learned.top(number + 1)[-1] if number else learned  # possibly written by hand
            start = "policy" if options.retrain_from == "policy" else None
            model = self.model(tasks, policy=policy, start=start)
            if self.accelerator.is_main_process:
                policy.write(path / "policy.json")
            self._fit(stage, model, weights_plan(options, self.sizes, options.seed + number), tasks)

    def policy(self) -> Policy:
        """Return the policy to train under: the given one, or the one that this run has learned.

        Raises:
            UserError: if there is none, or it belongs to another network or other tasks.
        """
        path = Path(self.options.policy) if self.options.policy else self.folder.path / "policy" / "policy.json"
        if not self.options.policy and not self._is_trained("policy"):
            raise UserError(
                f"{self.folder.path} has no finished policy; continue with --resume --phases policy, or give one that it has "
                "so far with --policy"
            )
        if not path.is_file():
            raise UserError(f"{path} does not exist; learn a policy first with --phases policy")
        policy = read_policy(path)
        model = self.model(())
        policy.check_fits(model, self.benchmark.tasks, path)
        for task in self.benchmark.tasks:
            try:
                model.make_gates(policy.entries(task))
            except UserError as error:
                raise UserError(f"{path}: task {task!r}: {error}") from None
        return replace(policy, parents=model.parents if policy.parents or any(model.parents) else ())

    def _train_single(self) -> None:
        alone = replace(self.options, method="single_task")
        for task in self.benchmark.tasks:
            stage = f"single_task/{task}"
            if not self._is_trained(stage):
                plan = weights_plan(alone, self.sizes, self.options.seed)
                self._fit(stage, self.model([task], "hard_sharing"), plan, [task])

    def _is_trained(self, stage: str) -> bool:
        return (self.folder.path / stage / "trained.json").is_file()

    def _fit(self, stage: str, model: TaskModel, plan: Plan, tasks: Sequence[str]) -> None:
        """Train a stage and keep its best epoch."""
        folder = run_folder.RunFolder(self.folder.path / stage)
        folder.rows = folder.read_metrics()
        processes = self.accelerator.num_processes
        loaders, samplers = {}, {}
        for split, steps in plan.batches.items():
            if plan.phases is None or any(phase.data == split for phase in plan.phases):
                stream = self.benchmark.stream(split, steps, plan.recipe.seed, processes, tasks)
                loaders[split], samplers[split] = stream
        learns_policy = model.method.learns_policy and not model.policies

        def report(rows: list[dict], is_best: bool) -> None:
            if any("score" in row for row in rows):
                self._report(stage, rows, plan.recipe.epochs, is_best)
                if learns_policy:
                    Policy.of(model).write(folder.path / ("policy.json" if is_best else "latest.json"))

        def keep(rows: list[dict]) -> None:
            write_tensors(folder.base_path, model.base_state())
            for task in tasks:
                model.save_task(task, folder.task_path(task))

        def validate() -> tuple[dict[str, dict], float]:
            # While policies change, running statistics do not match any task's path through the network.
            with evaluating(model), batch_statistics(model, learns_policy):
                metrics = self.benchmark.evaluate(model, "val", self.accelerator, self.options.limit_batches)
            value = score(metrics)
            return {task: {"metrics": own, "score": value} for task, own in metrics.items()}, value

        progress = run_phases(
            model, tasks, loaders, samplers, plan.recipe, self.accelerator, criterion=self.benchmark.criteria(),
            validate=validate, on_epoch=report, keep=keep, folder=folder, stop=self.stop,
        )  # fmt: skip
        if self.accelerator.is_main_process:
            seconds = round(sum(row["seconds"] for row in folder.rows), 1)
            write_json(folder.path / "trained.json", {"seconds": seconds, "validation_score": progress.best})
            if not self.options.keep_checkpoint:
                shutil.rmtree(folder.state_path.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _announce(self, model: TaskModel) -> None:
        say, options = self.accelerator.print, self.options
        say(
            f"{options.benchmark}: {', '.join(self.benchmark.tasks)}; method {options.method}, {options.model_type} with "
            f"{len(model.units)} units, {self.accelerator.num_processes} × {self.accelerator.device.type}, "
            f"results in {self.folder.path}"
        )
        sizes = ", ".join(
            f"{self.benchmark.size(split)} {split}" for split in ("train", "weights", "policy", "val", "test")
        )
        say(f"  samples: {sizes}")
        if model.unskippable and self.learns_policy:
            name, why = next(iter(model.unskippable.items()))
            say(f"  {len(model.unskippable)} of the units cannot be skipped, e.g. {name}: {why}")
        for note in self.benchmark.notes:
            say(f"  {note}")
        if not options.val_fraction:
            say(
                "  no validation samples are taken out of train: without a val list choices are made on test, as published"
            )

    def _report(self, stage: str, rows: list[dict], epochs: int, is_best: bool) -> None:
        """Report an epoch in one line and in TensorBoard."""
        first = rows[0]
        firsts = ((row["task"], *next(iter(row["metrics"].items()))) for row in rows)
        values = "  ".join(f"{task} {name} {value:.3g}" for task, name, value in firsts)
        executed = sum(row["executed"] for row in rows) / len(rows)
        loss = sum(row["train_loss"] for row in rows)
        self.accelerator.print(
            f"{stage} {first['epoch']}/{epochs} {first['phase']}: loss {loss:.3f}  {values}  run {100 * executed:.0f} %"
            f"{'  *' if is_best else ''}",
            flush=True,
        )
        for row in rows:
            values = {
                f"{stage}/{row['task']}/{name}": value
                for name, value in {**row["metrics"], "loss": row["train_loss"]}.items()
            }
            self.log.scalars(values, row["epoch"])
            self.log.track(values)

    # -- testing -------------------------------------------------------------------------------------------------

    def test(self) -> None:
        """Test each trained stage that was not tested with these options, and write the table and the pictures."""
        options, tasks = self.options, self.benchmark.tasks
        single = self._reference()
        if options.method == "single_task":
            self._write({"retrains": {}, "tasks": single}, single, None)
            return
        stages = sorted(path.parent.name for path in self.folder.path.glob("retrain_*/trained.json"))
        if not stages:
            raise UserError(f"{self.folder.path} has no trained network to test; run --phases retrain first")
        if "retrain" not in options.phases and options.exp_ids is not None:
            asked = [f"retrain_{number:03d}" for number in options.exp_ids]
            missing = [stage for stage in asked if stage not in stages]
            if missing:
                raise UserError(f"{self.folder.path} has no trained {missing[0]}; it has {', '.join(stages)}")
            stages = asked

        def measure(stage: str) -> dict:
            model = self.stored(stage, tasks)
            metrics, rates = measure_executed(self.benchmark, model, "test", self.accelerator, options.limit_batches)
            example = self.benchmark.example().to(self.accelerator.device)
            validated = read_json(self.folder.path / stage / "trained.json")["validation_score"]
            # by task, 1.0 for each unit that runs with the task's own weights, and how many weights it has ÷ the base's
            own = {task: [float(row["specific"] > 0) for row in model.report(task)] for task in model.tasks}
            sizes = {task: accounting.accounting(model, task)["parameters"] for task in model.tasks}
            own_weights = {task: size / model.base_parameters for task, size in sizes.items()}
            return {
                "tasks": metrics, "executed": rates, "own": own, "own_weights": own_weights,
                **cost.relative_cost(model, example, self.benchmark.on_one_image), "validation_score": validated,
            }  # fmt: skip

        tested = {stage: self._once(stage, measure) for stage in stages}
        best = max(tested, key=lambda stage: tested[stage]["validation_score"])
        self._write(
            {"retrains": tested, "best": best, "tasks": mean_metrics([row["tasks"] for row in tested.values()])},
            single,
            best,
        )

    def _once(self, stage: str, measure: Callable[[str], dict]) -> dict:
        """Return a stage's ``summary.json``, measured if there is none of these options; ends the run if it was asked to stop."""
        if self.stop.received is not None:
            raise Interrupted(self.stop.received)
        path = self.folder.path / stage / "summary.json"
        if not self._was_tested(path):
            found = {**measure(stage), "tested_with": self._tested_with}
            if self.accelerator.is_main_process:
                write_json(path, found)
        self.accelerator.wait_for_everyone()
        return read_json(path)

    @property
    def _tested_with(self) -> dict[str, object]:
        """The options on which the results of a test depend."""
        return {name: getattr(self.options, name) for name in ("metrics", "limit_batches")}

    def _was_tested(self, path: Path) -> bool:
        """Return whether a file has the results of a test with these options, of which files before version 0.18 say nothing."""
        known = read_json(path) if path.is_file() else None
        of_run = read_json(self.folder.path / "settings.json")
        before = {name: of_run.get(name) for name in self._tested_with}
        return known is not None and known.get("tested_with", before) == self._tested_with

    def _reference(self) -> Metrics | None:
        """Return the single-task results, measured in this run or given."""
        source = self.options.single_task
        if source == "measure" or self.options.method == "single_task":

            def measure(stage: str) -> dict:
                task = Path(stage).name
                if not self._is_trained(stage):
                    raise UserError(
                        f"task {task} has no single-task network yet; run all phases, or --phases retrain test"
                    )
                model = self.stored(stage, [task])
                with evaluating(model):
                    return {
                        "tasks": self.benchmark.evaluate(model, "test", self.accelerator, self.options.limit_batches)
                    }

            stages = [f"single_task/{task}" for task in self.benchmark.tasks]
            return {task: own for stage in stages for task, own in self._once(stage, measure)["tasks"].items()}
        if source in (None, "none"):
            return None
        return read_reference(Path(source), self.benchmark.tasks, self.options.metrics)

    def _shown(self, best: str | None) -> list[dict]:
        """Return test samples with the predictions of the best network, or of each task's single-task network."""
        if best is not None:
            return self.benchmark.shown(self.stored(best, self.benchmark.tasks))
        shown: list[dict] = []
        for task in self.benchmark.tasks:
            own = self.benchmark.shown(self.stored(f"single_task/{task}", [task]))
            shown = shown or own
            for row, other in zip(shown, own, strict=True):
                row["predicted"].update(other["predicted"])
        return shown

    def _write(self, found: dict, single: Metrics | None, best: str | None) -> None:
        """Write ``summary.json``, the table and the pictures in the first process."""
        if not self.accelerator.is_main_process:
            return
        seconds = sum(read_json(path)["seconds"] for path in self.folder.path.rglob("trained.json"))
        summary = summarise(self.options.method, self.options.seed, seconds, found, single)
        write_json(self.folder.path / "summary.json", summary)
        figures = policy_pictures(self.folder.path)
        shown = self._shown(best)
        if shown:
            figures["predictions"] = self.benchmark.picture(shown)
        pictures = []
        for name, figure in figures.items():
            pictures.append(str(self.folder.path / f"{name}.png"))
            style.save(figure, Path(pictures[-1]))
            self.log.figure(name, figure)
        self.accelerator.print(f"\n{table(summary)}\npictures: {', '.join(pictures) or 'none'}")


#: settings of methods that policy learning, or training under a policy, uses
_OF_POLICIES = (
    "sparsity_weight", "sharing_weight", "sparsity_loss", "sharing_loss", "sampling", "target_rates", "target_weight",
    "target_loss", "preference_weight", "policy_scale", "cost_weight", "cost", "cost_target",
)  # fmt: skip


def _free_settings(options: MultiTaskSettings, path: Path) -> set[str]:
    """Return the settings in which a run's later phases may differ from its earlier ones.

    A policy may be followed by training of another length or at other rates, or under the gates of another method with the same
    kind of policy, as in the published program of DynaShare; what has been retrained may be tested with any.
    """
    if "retrain" in options.phases and any(path.glob("retrain_*")):
        return set()  # they go on as they were begun, and those of other policies are averaged with them
    groups = (Stages, BenchmarkTraining, Report)
    of_training = {*_OF_POLICIES, *(name for group in groups for name in declarations(group))} - {"seed"}
    stored = METHODS.get(str(read_json(path / "settings.json").get("method")))
    if "retrain" in options.phases and stored is not None and stored.gate is METHODS[options.method].gate:
        of_training.add("method")
    return of_training
