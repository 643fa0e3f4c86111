"""Fixtures of all tests: seeds, one thread per test process (tests run in parallel), and expensive runs made once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import base64
import gc
import io
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from taps.memory import keep_freed_memory  # noqa: E402

keep_freed_memory()


#: files whose tests run programs, train to a quality, or draw and generate a lot
SLOW_FILES = (
    "backbones", "choices", "commands", "compact_files", "config_files", "context_data", "data", "dense_data", "docs",
    "encoding", "files", "front_door", "install", "joint", "mtl", "notebook", "parallel", "plots", "published", "recipes",
    "serving", "stays", "sub_tasks", "train", "trainer", "two_processes", "volumes", "weights",
)  # fmt: skip
#: networks of ``cases.py`` small enough for ``make test-fast``
QUICK_NETWORKS = ("narrow", "vit", "series", "volumes", "residual_series", "residual_volumes", "perceptron")


#: files whose tests take longest, which begin first so that none is left for the end
LONGEST = ("two_processes", "parallel", "install", "serving", "sub_tasks", "sweeps", "joint", "commands")


def pytest_itemcollected(item):
    """Mark the slow tests."""
    from cases import NETWORKS

    values = item.callspec.params if hasattr(item, "callspec") else {}
    case = values.get("case")
    network = case[0] if isinstance(case, tuple) else values.get("network")
    runs_programs = bool({"command", "here"} & set(getattr(item, "fixturenames", ())))
    is_large = (
        isinstance(network, str) and network in NETWORKS and network not in QUICK_NETWORKS
    ) or "published_networks" in item.name
    if runs_programs or is_large or item.path.stem.removeprefix("test_") in SLOW_FILES:
        item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Sort the longest first."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))


def pytest_collection_finish():
    """Garbage is not looked for among what imports have made, which every end of training would pay for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """Two small tasks as image folders: noise whose class is its colour. One task has three classes, the other four."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for name, classes in (("paint", 3), ("ink-2", 4)):
        for split, count in (("train", 12), ("test", 5)):
            for label in range(classes):
                folder = root / name / split / f"class{label}"
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = torch.randint(0, 120, (40, 36, 3), generator=generator, dtype=torch.uint8)
                    pixels[..., label % 3] += 100 if label < 3 else 10
                    Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def command():
    """Run a program from the command line: ``command("train_sequential.py", "--epochs", "1", cwd=folder)``."""

    def run(
        script: str, *arguments: object, cwd: Path, timeout: float = 180, check: int | None = 0, **environment: str
    ):
        line = [sys.executable, "-W", "error::ResourceWarning", str(ROOT / script), *map(str, arguments)]
        done = subprocess.run(
            line, cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
        )
        if check is not None:
            assert done.returncode == check, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


#: the commands of the scripts
SCRIPTS = {"train_sequential.py": "train", "train_joint.py": "joint", "train_mtl.py": "mtl", "evaluate.py": "evaluate"}
#: programs that have been run in this process
_imported: set[str] = set()


def run_here(script: str, *arguments: object, cwd: Path, check: int = 0) -> SimpleNamespace:
    """Run a script or a command such as ``"taps predict"`` in this process and return its output, as ``command`` does.

    It executes the same code as from a shell, without the seconds that imports take.
    """
    import importlib

    from accelerate.state import AcceleratorState

    from taps.cli.main import main

    words = ["taps", SCRIPTS[script]] if script in SCRIPTS else script.split()
    if script not in _imported:  # see pytest_collection_finish
        _imported.add(script)
        importlib.import_module("taps.runs.programs")  # programs import it after their options are checked
        gc.collect()
        gc.freeze()
    out, err = io.StringIO(), io.StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)
    threshold = gc.get_threshold()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [*words, *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            gc.set_threshold(*threshold)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            AcceleratorState._reset_state(reset_partial_state=True)
    text = {"stdout": out.getvalue(), "stderr": err.getvalue()}
    assert status == check, text
    return SimpleNamespace(returncode=status, **text)


#: a PNG of one pixel
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")

#: options of a run that takes seconds
SMALL = ("--model_type", "test_resnet", "--no-pretrained", "--input_size", "32", "--batch_size", "6", "--workers", "0")
SMALL += ("--device", "cpu", "--val_fraction", "0.2", "--lr", "0.02")


def trained_arguments(tree: Path, *more: object) -> tuple:
    penalty = () if {"--budget", "taps_budget"} & set(more) else ("--warmup_epochs", 1, "--lam", 4)
    return ("--dataset", tree, *SMALL, "--epochs", 2, *penalty, "--experiment_name", "run", *more)


@pytest.fixture(scope="session")
def finished(tree, tmp_path_factory):
    """A finished run of two tasks, one after the other, and its output."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_here("train_sequential.py", *trained_arguments(tree), cwd=folder)


@pytest.fixture(scope="session")
def joint(tree, tmp_path_factory):
    """A finished run of two tasks trained together, and its output."""
    folder = tmp_path_factory.mktemp("joint")
    return folder, run_here("train_joint.py", *trained_arguments(tree), cwd=folder)


@pytest.fixture
def stop_at(monkeypatch):
    """A context in which training receives SIGTERM at the given step (0: never); yields a list with one entry per step."""
    from contextlib import contextmanager

    from taps.training import loop

    @contextmanager
    def stopping(steps: int):
        taken, original = [], loop._Run._step

        def step(self, window, phase):
            taken.append(1)
            if len(taken) == steps:
                self.stop.received = 15
            return original(self, window, phase)

        with monkeypatch.context() as patched:
            patched.setattr(loop._Run, "_step", step)
            yield taken

    return stopping


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Run a program in this process, in an empty folder, and return its output, as ``command`` does.

    Pictures are a pixel unless the test asks for them with ``draws=True``: to draw them takes longer than to train.
    """

    def run(
        script: str, *arguments: object, cwd: Path = tmp_path, check: int = 0, draws: bool = False
    ) -> SimpleNamespace:
        with monkeypatch.context() as patch:
            if not draws:
                patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **how: path.write_bytes(PIXEL))
                patch.setattr("torch.utils.tensorboard.SummaryWriter.add_figure", lambda *given, **how: None)
            return run_here(script, *arguments, cwd=cwd, check=check)

    return run
