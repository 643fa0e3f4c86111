"""Tasks side by side: the files are those of one after another, whatever happens to the processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SMALL

from taps.runs import cluster

pytestmark = pytest.mark.slow


def line(tree: Path, *more: object) -> list[str]:
    return list(
        map(str, ("--dataset", tree, *SMALL, "--epochs", 3, "--warmup_epochs", 1, "--experiment_name", "run", *more))
    )


def files(folder: Path) -> dict[str, bytes]:
    """The tasks' files of all runs."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("task.*"))}


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train_sequential.py"), *arguments, "--parallel", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def workers(parent: int) -> list[int]:
    """Processes of Ray below ``parent`` that train a task."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            number = int(path.name)
            if b"_train_task" not in (path / "cmdline").read_bytes():
                continue
            while number > 1 and number != parent:
                number = int((Path("/proc") / str(number) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if number == parent:
            found.append(int(path.name))
    return found


def wait_for(condition, process: subprocess.Popen) -> None:
    ended = time.time() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.time() < ended
        time.sleep(0.05)


@contextmanager
def ray_in_this_process():
    """Run remote tasks here, one after another, without the half minute that Ray takes to start."""

    def remote(**options):
        def wrapped(function):
            def call(*arguments):
                future = Future()
                future.set_result(function(*arguments))
                return future

            return SimpleNamespace(remote=call)

        return wrapped

    exceptions = SimpleNamespace(
        RayTaskError=type("RayTaskError", (Exception,), {}), RayError=type("RayError", (Exception,), {})
    )
    ray = SimpleNamespace(
        remote=remote, put=lambda value: value, get=Future.result, wait=lambda all, timeout: (all, []),
        cluster_resources=dict, exceptions=exceptions,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        for name in ("connected", "started_during_import"):
            patch.setattr(cluster, name, lambda *given: nullcontext())
        yield


@pytest.fixture(scope="module")
def one_after_another(tree, tmp_path_factory) -> dict[str, bytes]:
    from conftest import run_here

    folder = tmp_path_factory.mktemp("sequence")
    run_here("train_sequential.py", *line(tree, "--lam", 0.5, 4), cwd=folder)
    return files(folder)


def test_a_killed_process_changes_no_byte(tree, tmp_path, one_after_another):
    """Two tasks of two λ, which share their warm-up; one process is killed when it has written a checkpoint."""
    running = start(tmp_path, line(tree, "--lam", "0.5", "4"))
    try:
        wait_for(
            lambda: any(tmp_path.rglob("parallel/*/checkpoint/state.safetensors")) and workers(running.pid), running
        )
        killed = workers(running.pid)[0]
        os.kill(killed, signal.SIGKILL)
        output = running.communicate(timeout=170)[0]
    finally:
        running.kill()
    assert running.returncode == 0, output
    assert files(tmp_path) == one_after_another
    assert "lam0.5 paint 3/3" in output
    assert "λ 4" in output
    assert not any(tmp_path.rglob("parallel"))


def test_a_stopped_run_goes_on_with_the_same_bytes(tree, tmp_path, one_after_another, here):
    running = start(tmp_path, line(tree, "--lam", "4"))
    try:
        wait_for(lambda: any(tmp_path.rglob("parallel/*/checkpoint/state.safetensors")), running)
        running.send_signal(signal.SIGTERM)
        output = running.communicate(timeout=120)[0]
    finally:
        running.kill()
    assert running.returncode == 143, output
    assert "continue with --resume" in output
    assert "Traceback" not in output
    run = tmp_path / "results/run"
    assert (run / "parallel").is_dir()
    reason = here("train_sequential.py", *line(tree, "--lam", "4", "--resume"), check=2).stderr
    assert "was begun with --parallel; continue it with --parallel" in reason
    with ray_in_this_process():
        here("train_sequential.py", *line(tree, "--lam", "4", "--resume", "--parallel", 2))
    wanted = {name.replace("lam4/", ""): own for name, own in one_after_another.items() if "lam4" in name}
    assert files(tmp_path) == wanted
    assert not (run / "parallel").exists()


def test_a_run_begun_alone_goes_on_side_by_side(tree, tmp_path, one_after_another, here, stop_at):
    with stop_at(0) as whole:
        here("train_sequential.py", *line(tree, "--lam", "4", "--experiment_name", "whole"))
    shutil.rmtree(tmp_path / "results/whole")
    with stop_at(6):
        here("train_sequential.py", *line(tree, "--lam", "4"), check=143)
    with ray_in_this_process(), stop_at(0) as rest:
        here("train_sequential.py", *line(tree, "--lam", "4", "--resume", "--parallel", 2))
    assert len(rest) == len(whole) - 6, "what was trained is handed over"
    wanted = {name.replace("lam4/", ""): own for name, own in one_after_another.items() if "lam4" in name}
    assert files(tmp_path) == wanted


def test_a_mistake_is_one_line(tree, here):
    for more, reason in (
        (("--parallel", "0"), "argument --parallel: '0' is not a whole number of at least 1"),
        (("--parallel", "2", "--multi_gpu"), "leave out --multi_gpu"),
        (("--address", "127.0.0.1:1"), "the Ray cluster at 127.0.0.1:1 does not answer"),
    ):
        assert reason in here("train_sequential.py", *line(tree, *more, "--overwrite"), check=2).stderr
