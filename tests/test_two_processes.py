"""Programs under torchrun: with gloo on the CPU, both processes take the same decisions and hold the same networks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, trained_arguments
from test_mtl import SMALL
from test_sub_tasks import VIT

from taps.data.generated.brain_volumes import BrainRecipe, make_brains
from taps.data.generated.scenes import SceneRecipe, make_scenes

#: each process runs the programs one after the other and notes what it holds at every validation and choice
SCRIPT = """
import json, os, sys
from contextlib import redirect_stdout

sys.path.insert(0, ROOT)
from accelerate.state import PartialState
from matplotlib.figure import Figure

import taps.methods.sparse_delta as sparse_delta
import taps.runs.adaptation as adaptation
import taps.runs.multi_task as multi_task
import taps.runs.sub_tasks as sub_tasks
from taps.cli.main import execute

rank, models = os.environ["RANK"], []
by_class = adaptation.accuracy_by_class
score, model_of, fix = multi_task.score, multi_task.MultiTask.model, sparse_delta.fix_support


def note(*values):
    with open(f"rank{rank}.jsonl", "a") as file:
        file.write(json.dumps(values) + "\\n")


def watched(model, task, *rest, **options):
    state = model.task_state(task)
    scores = {name: tensor.tolist() for name, tensor in state.items() if name.endswith("score")}
    note(scores, sum(float(tensor.sum()) for name, tensor in state.items() if name.endswith("delta")))
    return by_class(model, task, *rest, **options)


def watched_model(self, *rest, **options):
    models.append(model_of(self, *rest, **options))
    return models[-1]


def watched_score(metrics):
    note({name: float(parameter.double().sum()) for name, parameter in models[-1].named_parameters()}, metrics)
    return score(metrics)


def watched_fix(model, task):
    count = fix(model, task)
    masks = [mask for gate in model.gates(task) for mask in gate.support().values()]
    deltas = [float(delta.double().sum()) for unit in model.units for delta in unit.deltas[task].parameters()]
    note(task, count, [int(mask.flatten().nonzero().sum()) for mask in masks], deltas)
    return count


adaptation.accuracy_by_class = watched
multi_task.score, multi_task.MultiTask.model = watched_score, watched_model
sparse_delta.fix_support = watched_fix
sub_tasks.ERRORS = (0.0, 0.1)
Figure.draw = lambda *rest: None  # pictures stay blank
PartialState.destroy_process_group = lambda *rest: None  # one group for all programs
for name, (program, arguments) in json.loads(sys.argv[1]).items():
    os.makedirs(name, exist_ok=True)
    os.chdir(name)
    with open(f"rank{rank}.txt", "w") as file, redirect_stdout(file):
        execute(program, arguments)
    os.chdir("..")
"""

#: a run -> the number of notes
NOTES = {
    "sequential": 3, "joint budget": 6, "scenes dynashare": 7, "domainnet adashare": 7, "volumes adashare": 7,
    "scenes sparse_delta": 11,
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tree, tmp_path_factory) -> Path:
    """A folder for each run, with the notes and the output of both processes."""
    root = tmp_path_factory.mktemp("ranks")
    make_scenes(root / "scenes", SceneRecipe(size=(32, 32), train=12, val=4, test=3))
    make_brains(root / "brains", BrainRecipe(side=16, train=18, val=7, test=9))
    mtl, alone = ("mtl", "--single_task", "none"), ("--exp_ids", 0)
    scenes = ("--dataset", root / "scenes", "--tasks", "semseg", "depth")
    classes = ("--dataset", tree, "--input_size", 32, "--no-pretrained", "--model_type", "test_resnet")
    volumes = ("--images", root / "brains/images", "--labels", root / "brains/labels.csv", "--cat_target", "sex")
    volumes += ("--num_target", "picvocab", "--model_type", "resnet10", "--input_size", 16)
    runs = {
        "sequential": (
            "train",
            *trained_arguments(tree / "paint", "--norm", "follow", "--settle_epochs", 0.5),
        ),
        "joint budget": ("joint", *trained_arguments(tree, "--norm", "follow", "--budget", "100KB")),
        "scenes dynashare": (*mtl, *SMALL, *scenes, "--method", "dynashare", *alone),
        "domainnet adashare": (*mtl, "--benchmark", "domainnet", *SMALL, *classes, "--method", "adashare", *alone),
        "volumes adashare": (*mtl, "--benchmark", "volumes", *SMALL, *volumes, "--method", "adashare", *alone),
        "scenes sparse_delta": (*mtl, *scenes, *VIT),
    }
    script, given = root / "ranks.py", {name: (program, [*map(str, rest)]) for name, (program, *rest) in runs.items()}
    script.write_text(f"ROOT = {str(ROOT)!r}\n{SCRIPT}")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, json.dumps(given)], cwd=root, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", NOTES)
def test_two_processes_hold_the_same_throughout(ranks, name):
    """Decisions, weights, metrics and supports agree, also with penalties that couple tasks, and the run is complete."""
    first, second = ((ranks / name / f"rank{rank}.jsonl").read_text() for rank in (0, 1))
    assert first == second
    assert len(first.splitlines()) == NOTES[name]
    assert "2 × cpu" in (ranks / name / "rank0.txt").read_text()
    run = ranks / name / "results/run"
    summary = json.loads((run / "summary.json").read_text())
    if "budget" in name:
        assert all(row["bytes"] <= 100_000 for row in summary["tasks"].values())
    if "sparse_delta" in name:
        supports = [note for note in map(json.loads, first.splitlines()) if isinstance(note[0], str)]
        assert len(supports) == 1
        assert all(math.isfinite(value) for value in supports[0][3])
        assert (run / "reuse.json").is_file()
