"""Effect of λ: share of tuned layers and validation accuracy over λ and seeds, on domains of the demo.

    python benchmarks/sparsity.py --domains digits_outline photo_filter --lam 0 0.25 1 4 --seeds 0 1 2

Uses the demo's recipe. Accuracies are measured on a fifth of the training images; the test images are not read.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from accelerate import Accelerator

import taps
from taps.core.accounting import accounting
from taps.data.classification.images import TaskData, make_loader, split_validation
from taps.data.generated.demo import DOMAINS, make_demo, read_demo
from taps.metrics.accuracy import accuracy_by_class
from taps.networks.preprocessing import Preprocessing, of_network
from taps.training.loop import run_phases
from taps.training.recipe import Recipe


def run(task: TaskData, lam: float, seed: int, accelerator: Accelerator) -> tuple[float, float]:
    """Return one task's share of tuned layers and validation accuracy in percent."""
    task = split_validation(task, 0.2, seed)
    net = taps.create_backbone("tf_efficientnet_lite0")
    prepare = Preprocessing(64, 73, **of_network(net))
    model = taps.adapt(net)
    torch.manual_seed(seed)
    model.add_task(task.name, num_classes=len(task.classes))
    loader, sampler = make_loader(task.train, prepare.transform(True, True, flip=False), 16, train=True, seed=seed)
    validation, _ = make_loader(task.val, prepare.transform(False, True), 64, train=False)
    recipe = Recipe(epochs=6, warmup_epochs=0.5, settle_epochs=4.5, lr=0.03, lam=lam, seed=seed)
    run_phases(model, task.name, loader, sampler, recipe, accelerator)
    share = accounting(model, task.name)["tuned_layers"]
    found = accuracy_by_class(model, task.name, accelerator.prepare(validation), accelerator, len(task.classes))
    return share, found.accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="+", default=["digits_outline", "photo_filter"], choices=DOMAINS)
    parser.add_argument("--lam", nargs="+", type=float, default=[0.0, 0.25, 1.0, 4.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    accelerator = Accelerator(cpu=True, rng_types=[])
    make_demo(Path("datasets/demo"))
    tasks = [task for task in read_demo(Path("datasets/demo")) if task.name in options.domains]
    for lam in options.lam:
        pairs = [run(task, lam, seed, accelerator) for seed in options.seeds for task in tasks]
        shares, scores = zip(*pairs, strict=True)
        row = {
            "lam": lam,
            "tuned_layers": round(statistics.mean(shares), 3),
            "tuned_layers_spread": [round(min(shares), 3), round(max(shares), 3)],
            "accuracy": round(statistics.mean(scores), 2),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
