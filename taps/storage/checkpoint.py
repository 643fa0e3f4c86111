"""Checkpoints: all that is needed to continue a training run exactly, in one file that is replaced as a whole.

``checkpoint/state.safetensors`` holds the task's tensors, the optimiser's state and the random states; its metadata holds
the counters as JSON. The base is stored only if the method trains it. The order of the data and the random image
transforms follow from the seed and the epoch (:mod:`taps.data.classification.images`) and need no state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import Tensor

from taps.core.network import Network, fingerprint
from taps.errors import UserError
from taps.storage.encoding import EncodedDelta
from taps.storage.files import write_tensors


def save(
    path: Path,
    model: Network,
    tasks: Sequence[str],
    optimizers: Mapping[str, torch.optim.Optimizer],
    accelerator: Accelerator,
    progress: dict,
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the state of a run after some number of steps. Every process must call this; the main process writes.

    Args:
        path: the file.
        model: the unwrapped :class:`taps.core.network.Network`.
        tasks: the tasks in training.
        optimizers: made by :func:`taps.training.recipe.make_optimizer`, by name.
        accelerator: tells processes apart and holds the gradient scaler.
        progress: counters, as JSON.
        average: average of the weights, by name.
    """
    random_states = gather_object([random_state()])
    if not accelerator.is_main_process:
        return
    tensors = moving(model, tasks)
    tensors.update((f"average/{name}", tensor) for name, tensor in (average or {}).items())
    numbers: dict[str, object] = {}
    for key, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{key}/{index}/{name}"] = value
                else:
                    numbers[f"{key}/{index}/{name}"] = value
    for rank, states in enumerate(random_states):
        tensors.update((f"random/{rank}/{name}", tensor) for name, tensor in states.items())
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    record = {
        "tasks": list(tasks),
        "progress": progress,
        "optimizer": numbers,
        "scaler": scaler,
        "processes": accelerator.num_processes,
        "policies": {task: model.policies[task] for task in tasks if task in model.policies},
        "base": None if model.train_base else model.fingerprint(),
        "encodings": {
            f"{task}/{unit.name}": unit.deltas[task].encodings
            for unit in model.units
            for task in tasks
            if task in unit.deltas and unit.deltas[task].encodings
        },
    }
    text = json.dumps(record)
    write_tensors(path, tensors, {"record": text, "checksum": _checksum(text, tensors)})


def _checksum(record: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a checkpoint's counters and tensors."""
    return hashlib.sha256(f"{record}{fingerprint(tensors)}".encode()).hexdigest()


def moving(model: Network, tasks: Sequence[str]) -> dict[str, Tensor]:
    """Return every tensor of the model that training changes."""
    tensors = {f"task/{name}": tensor for task in tasks for name, tensor in model.task_state(task).items()}
    if model.train_base:
        tensors.update((f"base/{name}", tensor) for name, tensor in model.base_state().items())
    return tensors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read by :func:`read`.

    Attributes:
        path: its file.
        record: ``tasks``, the counters ``progress``, and what else :func:`save` writes as JSON.
        tensors: by name.
    """

    path: Path
    record: dict
    tensors: Mapping[str, Tensor]

    def part(self, place: str) -> dict[str, Tensor]:
        """Return the tensors below ``place``, e.g. ``"average"``, by the rest of their names."""
        return {n.removeprefix(f"{place}/"): own for n, own in self.tensors.items() if n.startswith(f"{place}/")}

    def restore_structure(self, model: Network, tasks: Sequence[str]) -> None:
        """Give the model the structure of the checkpoint: drop deltas that it lacks, set those that it holds in an encoding
        and the rounding of others (:mod:`taps.methods.taps_budget`), and restore the structure of gates."""
        encodings, stored = self.record.get("encodings", {}), self.part("task")
        places = {id(module): name for name, module in model.named_modules()}  # units may be nested
        for unit in model.units:
            for task in tasks:
                prefix, gate = (f"{places[id(unit)]}.{kind}.{task}." for kind in ("deltas", "gates"))
                unit.gates[task].restore_structure({n.removeprefix(gate) for n in stored if n.startswith(gate)})
                own = {n.removeprefix(prefix): tensor for n, tensor in stored.items() if n.startswith(prefix)}
                if task in unit.deltas and not own:
                    del unit.deltas[task]
                for name, tensor in own.items():
                    if name.endswith(".rounding"):
                        unit.deltas[task].set_rounding(name.removesuffix(".rounding"), tensor)
                for name, encoding in encodings.get(f"{task}/{unit.name}", {}).items():
                    unit.deltas[task].set_encoded(name, EncodedDelta(encoding, own[f"{name}.stored"]))

    def restore(
        self,
        model: Network,
        tasks: Sequence[str],
        optimizers: Mapping[str, torch.optim.Optimizer],
        accelerator: Accelerator,
    ) -> dict[str, Tensor]:
        """Restore model and optimisers; return this process's random state for :func:`set_random_state`.

        Raises:
            UserError: if the checkpoint does not fit the model.
        """
        path, record = self.path, self.record
        if record["processes"] != accelerator.num_processes:
            raise UserError(
                f"checkpoint {path} was written by {record['processes']} processes, this run has {accelerator.num_processes}; "
                "continue with as many, or start again with --overwrite"
            )
        if record["base"] is not None and record["base"] != model.fingerprint():
            raise UserError(
                f"checkpoint {path} belongs to another base ({record['base'][:16]}…, now {model.fingerprint()[:16]}…)"
            )
        targets = moving(model, tasks)
        wrong = [n for n, own in targets.items() if n not in self.tensors or self.tensors[n].shape != own.shape]
        if record["tasks"] != list(tasks) or wrong:
            raise UserError(
                f"checkpoint {path} belongs to another run (tasks {', '.join(record['tasks'])}; {len(wrong)} tensors differ)"
            )
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(self.tensors[name])
        for task, policy in record.get("policies", {}).items():
            model.policies[task] = tuple(map(tuple, policy))
        states: dict[str, dict[int, dict]] = {key: {} for key in optimizers}
        for name, value in {**self.part("optimizer"), **record["optimizer"]}.items():
            key, index, entry = name.split("/", 2)
            states[key].setdefault(int(index), {})[entry] = value
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict({"state": states[key], "param_groups": optimizer.state_dict()["param_groups"]})
            for parameter, values in optimizer.state.items():
                for name, value in values.items():
                    # In the memory format of new state; the number of steps stays on the host, also beside a scalar.
                    if name != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
                        values[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        if record["scaler"] is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(record["scaler"])
        return self.part(f"random/{accelerator.process_index}")


def read(path: Path) -> Checkpoint | None:
    """Return a checkpoint, or ``None`` if there is no file.

    Raises:
        UserError: if the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        known = metadata.get("checksum")  # not stored before version 0.12
        if known is not None and known != _checksum(metadata["record"], tensors):
            raise UserError(f"checkpoint {path} is damaged: its checksum is another; start again with --overwrite")
        record = json.loads(metadata["record"])
        if "tasks" not in record:
            raise UserError(f"checkpoint {path} was written by another version; start again with --overwrite")
        return Checkpoint(path, record, tensors)
    except (
        SafetensorError,
        OSError,
        KeyError,
        TypeError,
        AttributeError,
        UnicodeDecodeError,
        json.JSONDecodeError,
    ) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}); start again with --overwrite") from None


def random_state() -> dict[str, Tensor]:
    """Return the states of torch's random generators on the CPU and on this process's accelerator."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Restore the random generators to an earlier :func:`random_state`."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
