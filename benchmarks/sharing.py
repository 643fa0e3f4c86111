"""Agreement of policies with the structure that tasks share: generated stays and volumes, over several seeds.

    python benchmarks/sharing.py                    # five seeds of both, about forty minutes on two cores
    python benchmarks/sharing.py --policy_only      # without Δ_T

The command-line program runs for every seed. The result is the rank correlation (Spearman), over all pairs of tasks, between
the similarity of their learned policies and the known share that their targets have in common. Pairs that share equally much
are tied, so a perfect order has 0.93 for stays and 0.83 for volumes. The last lines average the similarities over seeds first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from taps.methods.policy import read_policy  # noqa: E402

#: the part that the questions of two tasks share, by what generated the data (taps.data.generated)
SHARED = {
    "mimic3": {
        ("ihm", "decomp"): 0.5, ("ihm", "los"): 0.0, ("ihm", "pheno"): 1.0, ("decomp", "los"): 0.5, ("decomp", "pheno"): 0.5,
        ("los", "pheno"): 0.0,
    },
    "volumes": {
        ("diagnosis", "interview_age"): 1.0, ("diagnosis", "sex"): 0.0, ("diagnosis", "picvocab"): 0.0,
        ("sex", "interview_age"): 0.0, ("sex", "picvocab"): 1.0, ("interview_age", "picvocab"): 0.0,
    },
}  # fmt: skip


def run(benchmark: str, seed: int, folder: Path, policy_only: bool, more: list[str]) -> Path:
    """Run the command for one seed and return its results folder."""
    name = f"{benchmark}_{seed}"
    line = [sys.executable, str(ROOT / "train_mtl.py"), "--benchmark", benchmark, "--seed", str(seed)]
    line += ["--experiment_name", name, "--result_path", str(folder), *more]
    line += ["--phases", "policy", "--single_task", "none"] if policy_only else []
    subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--benchmarks", nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--policy_only", action="store_true")
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        for benchmark in given.benchmarks:
            shared = SHARED[benchmark]
            alike, correlations, gains = [], [], []
            for seed in given.seeds:
                path = run(benchmark, seed, Path(name), given.policy_only, more)
                policy = read_policy(path / "policy" / "policy.json")
                alike.append([policy.similarity(a, b) for a, b in shared])
                correlations.append(float(spearmanr(list(shared.values()), alike[-1]).statistic))
                text = f"{benchmark} seed {seed}: rank correlation {correlations[-1]:+.2f}"
                if not given.policy_only:
                    summary = json.loads((path / "summary.json").read_text())
                    gains.append(summary["delta_t"])
                    text += f", Δ_T {gains[-1]:+.2f} %, blocks {100 * summary['executed_blocks']:.0f} %, {summary['seconds']:.0f} s"
                print(text, flush=True)
            means = [statistics.mean(own) for own in zip(*alike, strict=True)]
            print(f"{benchmark}: rank correlation {statistics.mean(correlations):+.2f} in the mean of the seeds")
            pairs = ", ".join(f"{a}–{b} {value:.2f}" for (a, b), value in zip(shared, means, strict=True))
            print(
                f"{benchmark}: of mean similarities {spearmanr(list(shared.values()), means).statistic:+.2f} ({pairs})"
            )
            if len(gains) > 1:
                print(f"{benchmark}: Δ_T {statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f} %")


if __name__ == "__main__":
    main()
