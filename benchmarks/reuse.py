"""Savings and losses of reuse on a finished run of sparse deltas: sub-tasks from the base's activations, frames from earlier ones.

python train_mtl.py --method sparse_delta
python benchmarks/reuse.py results/scenes_sparse_delta

Thresholds are calibrated on validation images. Quality is measured on the test split, multiplications and times on its first
images, each relative to the merged networks of the sub-tasks, run in turn. Video: frames of a room from a moving camera
(:func:`clip`), relative to all tasks computed in full for every frame; the difference is
‖y − y_whole‖ / ‖y_whole‖.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options import parse_mtl
from taps.benchmarks.opening import open_benchmark
from taps.cli.program import run
from taps.data.generated.scenes import render
from taps.metrics.relative_gain import relative_gain
from taps.reuse.from_base import Reuse
from taps.reuse.video import VideoReuse
from taps.runs.sub_tasks import Reusing, SubTasks
from taps.settings.declare import Parser
from taps.stop_signals import StopSignals
from taps.storage import run_folder

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def measure_tasks(work: SubTasks, reuse: Reuse, errors: list[float], images: int) -> None:
    """Print one line per allowed error."""
    held, x = work.benchmark.example("val", max(images, 2)), work.benchmark.example("test", images)
    exact: dict = {}
    for error in errors:
        reuse.calibrate([held], error)
        metrics = work.benchmark.evaluate(Reusing(reuse), "test", work.accelerator)
        exact = exact or metrics
        beside = reuse.beside_dense(x, rounds=7)
        for task in reuse.tasks:
            gain, own = relative_gain(metrics[task], exact[task]), beside[task]
            dense = sum(setting.dense for setting in reuse.settings[task].values())
            print(
                f"{task:10} error {error:<5g} quality {gain:+6.2f} %  MACs {own['macs']:.3f}  time {own['time']:.3f}  "
                f"({dense} of {len(reuse.settings[task])} products dense)",
                flush=True,
            )


def clip(
    seed: int, frames: int, size: tuple[int, int] = (64, 64), difficulty: float = 0.5, speed: float = 0.02
) -> Iterator[dict[str, np.ndarray]]:
    """The frames of a video of one scene, with a camera that moves at a constant velocity in a random direction.

    Args:
        seed: seed of the scene, the direction and the sensor noise.
        frames: number of frames.
        size, difficulty: as in :func:`taps.data.generated.scenes.render`.
        speed: metres per frame.
    """
    random = np.random.default_rng((seed, 1))
    direction = random.uniform(-1, 1, 3) * (1.0, 0.3, 1.0)
    direction *= speed / np.linalg.norm(direction)
    for frame in range(frames):
        yield render(np.random.default_rng(seed), size, difficulty, direction * frame, random)


def measure_video(reuse: Reuse, size: tuple[int, int], thresholds: list[float], frames: int, speed: float) -> None:
    """Print one line per threshold."""
    images = [torch.from_numpy(frame["image"].copy()) for frame in clip(0, frames, size, 0.2, speed)]
    video = [((image.permute(2, 0, 1).float() / 255 - MEAN) / STD)[None] for image in images]
    merged = {task: reuse.model.merge(task) for task in (reuse.base_task, *reuse.tasks)}
    for threshold in thresholds:
        state = VideoReuse(reuse, threshold, key_every=frames, split=0)
        ratios, shares, wrong = [], [], {task: [] for task in merged}
        for number, x in enumerate(video):
            started = time.perf_counter()
            outputs = state(x, number)
            middle = time.perf_counter()
            with torch.no_grad():
                whole = {task: net(x) for task, net in merged.items()}
            if number == 0:
                continue  # the key frame
            ratios.append((middle - started) / (time.perf_counter() - middle))
            shares.append(sum(c.done for c in reuse.counts.values()) / sum(c.dense for c in reuse.counts.values()))
            for task, y in whole.items():
                wrong[task].append(float((outputs[task] - y).norm() / y.norm()))
        parts = "  ".join(f"{task} {statistics.mean(values):.3f}" for task, values in wrong.items())
        print(
            f"video threshold {threshold:<5g} products {statistics.mean(shares):.3f}  time {statistics.median(ratios):.3f}  "
            f"difference {parts}",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = Parser(prog="python benchmarks/reuse.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="RUN", type=Path, help="finished run of train_mtl.py --method sparse_delta")
    parser.add_argument("--errors", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1, 0.2], metavar="X")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.2], metavar="X", help="for video"
    )
    parser.add_argument("--images", type=int, default=4, metavar="N", help="timed images (default: 4)")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="video frames (default: 8)")
    parser.add_argument(
        "--speed", type=float, default=0.01, metavar="X", help="camera speed, metres per frame (default: 0.01)"
    )
    given = parser.parse_args(arguments)
    options = parse_mtl(["--config", str(given.folder / "settings.json")])
    accelerator = Accelerator(cpu=True)
    work = SubTasks(
        options, open_benchmark(options, accelerator), accelerator, run_folder.RunFolder(given.folder), StopSignals()
    )
    stage = sorted(given.folder.glob("retrain_*"))[0].name
    reuse = Reuse(work.stored(stage, work.benchmark.tasks), work.base_task, work.sub_tasks)
    x = work.benchmark.example("test", 1)
    print(
        f"{torch.get_num_threads()} threads, {options.model_type}, {x.shape[-2]} × {x.shape[-1]} px, × the merged network"
    )
    measure_tasks(work, reuse, given.errors, given.images)
    measure_video(reuse, tuple(x.shape[-2:]), given.thresholds, given.frames, given.speed)


if __name__ == "__main__":
    run(main)
