"""Peak memory of joint training with two and with six tasks: it grows in the joint variant, but not in the lite variant.

    python benchmarks/memory.py

Each run trains on a few batches of the demo's data in a separate process, whose peak memory is compared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from taps.data.generated.demo import make_demo  # noqa: E402


def peak(variant: str, tasks: list[Path], given: argparse.Namespace) -> int:
    """Return the peak memory of the program in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, str(ROOT / "train_joint.py"), "--variant", variant, "--dataset", *map(str, tasks)]
        line += [
            "--model_type",
            given.model,
            "--no-pretrained",
            "--input_size",
            str(given.pixels),
            "--batch_size",
            "16",
        ]
        line += [
            "--epochs",
            "2",
            "--warmup_epochs",
            "0.5",
            "--limit_batches",
            "6",
            "--workers",
            "0",
            "--result_path",
            folder,
        ]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(process.stderr.read().decode()[-2000:])
        return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet34")
    parser.add_argument("--pixels", type=int, default=64)
    given = parser.parse_args()
    data = Path(tempfile.mkdtemp()) / "demo"
    try:
        make_demo(data)
        tasks = sorted(path for path in data.iterdir() if (path / "train").is_dir())
        for variant in ("lite", "joint"):
            two, six = peak(variant, tasks[:2], given), peak(variant, tasks, given)
            print(
                f"{variant}, {given.model}, {given.pixels} px: {two >> 20} MiB with 2 tasks, {six >> 20} MiB with "
                f"{len(tasks)}, {six / two:.3f} ×",
                flush=True,
            )
    finally:
        shutil.rmtree(data.parent)


if __name__ == "__main__":
    main()
