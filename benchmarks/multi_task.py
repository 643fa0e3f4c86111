"""Quality of multi-task methods on Scenes: Δ_T and executed blocks over several seeds, using the command-line programs.

    python benchmarks/multi_task.py                 # three seeds, about forty minutes on two cores

For each seed AdaShare runs first, with its single-task networks; the other methods are compared with the same networks and
take as many weight steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("adashare", "dynashare", "automtl", "hard_sharing")


def run(method: str, seed: int, folder: Path) -> dict:
    """Return the summary of one run; the first run of a seed trains the single-task networks."""
    line = [sys.executable, str(ROOT / "train_mtl.py"), "--method", method, "--seed", str(seed)]
    line += ["--experiment_name", f"{method}_{seed}", "--result_path", str(folder)]
    if method != METHODS[0]:
        line += ["--single_task", str(folder / f"{METHODS[0]}_{seed}")]
    subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / f"{method}_{seed}" / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found: dict[str, list[dict]] = {method: [] for method in METHODS}
        for seed in given.seeds:
            for method in METHODS:
                summary = run(method, seed, Path(name))
                found[method].append(summary)
                blocks = 100 * summary["executed_blocks"]
                print(f"seed {seed} {method:12}  Δ_T {summary['delta_t']:+6.2f} %  blocks {blocks:5.1f} %", flush=True)
        for method, rows in found.items():
            gains, blocks = [row["delta_t"] for row in rows], [100 * row["executed_blocks"] for row in rows]
            spread = f" ± {statistics.stdev(gains):.2f}" if len(gains) > 1 else ""
            print(
                f"mean   {method:12}  Δ_T {statistics.mean(gains):+6.2f}{spread} %  blocks {statistics.mean(blocks):5.1f} %"
            )


if __name__ == "__main__":
    main()
