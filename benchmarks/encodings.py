"""Accuracy with fewer bits per weight: every task of a run tested again with its deltas in each encoding.

    python train_sequential.py --method finetune --lr 0.02 --experiment_name finetune
    python benchmarks/encodings.py results/finetune

Nothing is trained again; norms and heads stay exact. Each row has the encoding, the bytes of the deltas ÷ their bytes in
float32, the mean of the errors ‖δ̂ − δ‖ / ‖δ‖, and the mean test accuracy in percent.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from argparse import Namespace
from pathlib import Path

from accelerate import Accelerator

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from taps.data import opening  # noqa: E402
from taps.runs import setup  # noqa: E402
from taps.runs.adaptation import measure  # noqa: E402
from taps.storage import files, run_folder  # noqa: E402
from taps.storage.encoding import encode, encode_as, error_of  # noqa: E402

CASES = (
    "exact",
    "float16",
    *(f"range_coded {error}" for error in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45)),
    "max_error 0.02",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    options = Namespace(**files.read_json(given.folder / "settings.json"))
    data = {task.name: task for task in opening.read_data(options.dataset, options)}
    how = Namespace(batch_size=64, workers=0, limit_batches=None)
    accelerator = Accelerator(cpu=True, rng_types=[])
    names = list(run_folder.read_tasks(given.folder))
    model, prepare = setup.load_run(given.folder, names)
    exact = {
        (unit.name, task, name): unit.deltas[task][name].detach().clone()
        for unit in model.units
        for task in names
        if task in unit.deltas
        for name in unit.parameter_names
    }
    for case in CASES:
        stored_bytes, errors = 0, []
        for unit in model.units:
            for task in (task for task in names if task in unit.deltas):
                for part in unit.parameter_names:
                    delta = exact[unit.name, task, part]
                    found = None
                    if case.startswith("max_error"):
                        found = encode(delta, float(case.split()[1]))
                    elif case != "exact":
                        name, _, bound = case.partition(" ")
                        found = encode_as(name, delta, float(bound or 0))
                    value = delta if found is None else found.decode(delta.shape, delta.dtype)
                    unit.deltas[task][part].data.copy_(value)
                    stored_bytes += delta.nbytes if found is None else len(found.data)
                    errors.append(error_of(delta, value))
        scores = [
            measure(model, data[task], data[task].test, prepare, accelerator, how, task).accuracy for task in names
        ]
        share = stored_bytes / sum(delta.nbytes for delta in exact.values())
        print(
            f"{case:16} {share:.3f}  error {statistics.mean(errors):.4f}  accuracy {statistics.mean(scores):.2f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
