"""All tasks on the same batch, in one pass that computes what they share once.

While it runs, :attr:`taps.gates.State.task` is a :class:`Together`, and every unit and norm hands its call to it. A tensor
stays an ordinary one while all tasks agree on it; from their first difference on it is a :class:`taps.branches.Branches`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from taps.branches import Changes, join, select
from taps.errors import Inseparable
from taps.gates import State, first_input
from taps.layer import TaskModule, inner_first, run_head

if TYPE_CHECKING:
    from taps.model import TaskModel


class Together:
    """Several tasks that all see the same samples.

    Args:
        state: of the model.
        tasks: their names.
    """

    def __init__(self, state: State, tasks: Sequence[str]) -> None:
        self.state = state
        self.tasks = tuple(tasks)

    def run(self, module, args: tuple, kwargs: dict):
        """Run a unit or norm once for each group of tasks that want the same of it, on each input that they have."""
        Changes.check((args, kwargs), self.tasks)
        answers, groups = {}, {}
        x = first_input(args, kwargs)
        for task in self.tasks:
            with self.state.running(task):
                answers[task] = module.ask(task, select(x, (task,)))
            groups.setdefault(module.shared(answers[task]) or (task,), []).append(task)
        results = []
        for tasks in groups.values():
            inner = tasks[0] if len(tasks) == 1 else self.among(tasks)
            arguments, keywords = select((args, kwargs), tasks)
            plain = [leaf for leaf in tree_flatten((arguments, keywords))[0] if type(leaf) is Tensor]
            with self.state.running(inner):
                versions = [leaf._version for leaf in plain]
                results.append((tuple(tasks), module.carry_out(tasks[0], answers[tasks[0]], arguments, keywords)))
                if len(groups) > 1 and versions != [leaf._version for leaf in plain]:
                    raise Inseparable("a layer changes its input in place")
        return join(results)

    def among(self, tasks: Sequence[str]) -> Together:
        """The same for some of the tasks."""
        return Together(self.state, tasks)

    def read(self, value: Callable[[str], object]):
        """An attribute whose value depends on the task."""
        results = []
        for task in self.tasks:
            with self.state.running(task):
                results.append(((task,), value(task)))
        return join(results)


def run_together(backbone: nn.Module, state: State, x: Tensor, tasks: Sequence[str]):
    """The backbone's output for several tasks on the same batch: a tree of tensors and :class:`Branches`.

    Raises:
        Inseparable: if the network's code cannot be followed.
    """
    with Changes(state), state.running(Together(state, tasks) if len(tasks) > 1 else tasks[0]):
        features = backbone(x)
        Changes.check(features, tasks)
    return features


class Variants(TaskModule):
    """What is left of a unit or norm when its tasks' decisions are carried out: one plain module a distinct behaviour.

    Args:
        state: of the predictor.
        choices: for each task the name of its variant.
        variants: plain modules by name.
    """

    def __init__(self, state: State, choices: dict[str, Hashable], variants: dict[Hashable, nn.Module]) -> None:
        super().__init__()
        self.state = state
        self.choices = choices
        self.variants = nn.ModuleList(variants.values())
        self._index = {name: index for index, name in enumerate(variants)}

    def ask(self, task: str, x: Tensor | None) -> Hashable:
        return self.choices[task]

    def shared(self, answer: Hashable) -> Hashable:
        return answer

    def carry_out(self, task: str, answer: Hashable, args: tuple, kwargs: dict):
        return self.variants[self._index[answer]](*args, **kwargs)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "variants" not in self.__dict__.get("_modules", {}):
                raise
        first = next(iter(self.choices))
        return self.for_current_task(
            lambda task: getattr(self.variants[self._index[self.choices[task or first]]], name)
        )


class Predictor(nn.Module):
    """From a batch to ``{task: output}``: what tasks share is computed once, and no gate is left to ask.

    Made by :meth:`taps.model.TaskModel.predictor`. ``torch.export`` turns it into one program with many outputs.
    """

    def __init__(self, backbone: nn.Module, heads: nn.ModuleList, tasks: Sequence[str], state: State) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.state = state
        self.backbone = backbone
        self.heads = heads

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = run_together(self.backbone, self.state, x, self.tasks)
        return {
            task: run_head(head, select(features, (task,))) for task, head in zip(self.tasks, self.heads, strict=True)
        }


def outputs(model: TaskModel, x: Tensor, tasks: list[str]) -> dict[str, Tensor]:
    """Every task's output on the same batch, in the mode the model is in; see :meth:`taps.model.TaskModel.predict`."""
    try:
        features = run_together(model.backbone, model.state, x, tasks)
    except Exception as error:
        # Code that a value for several tasks cannot go through fails in any way; a mistake fails again here.
        outputs = {task: model(x, task) for task in tasks}
        reason = str(error) if isinstance(error, Inseparable) else f"{type(error).__name__}: {error}"
        warnings.warn(f"the tasks are run one by one: {reason}", stacklevel=3)
        return outputs
    return {task: run_head(model.heads[task], select(features, (task,))) for task in tasks}


def predictor(model: TaskModel, tasks: list[str]) -> Predictor:
    """One module for all tasks; see :meth:`taps.model.TaskModel.predictor`. The model is in evaluation mode."""
    memo: dict[int, object] = {}
    state = State()
    for module in inner_first((*model.units, *model.task_norms)):
        choices, variants = {}, {}
        for task in tasks:
            name = module.shared(module.ask(task, None)) or (task,)
            choices[task] = name
            if name not in variants:
                variants[name] = module.merged(task, dict(memo))
        memo[id(module)] = Variants(state, choices, variants)
    backbone = copy.deepcopy(model.backbone, memo).requires_grad_(False)
    heads = nn.ModuleList([copy.deepcopy(model.heads[task]) for task in tasks])
    return Predictor(backbone, heads, tasks, state).eval()
