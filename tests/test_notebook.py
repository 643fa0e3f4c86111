"""The notebook runs on the results of each program, and reports when there are none."""

import ast
import os

import nbformat
import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

from taps.methods.policy import Policy
from taps.storage.files import write_json

NOTEBOOK = ROOT / "visualize_taps.ipynb"


def multi_task_run(folder):
    """Write the files of a multi-task run from which pictures are made."""
    run = {"a": (1.0, 0.0), "b": (1.0, 1.0)}
    policy = Policy("resnet", ("layer1.0", "layer1.1"), {"a": (0.9, 0.2), "b": (0.8, 0.6)}, run)
    policy.write(folder / "retrain_000/policy.json")
    write_json(folder / "retrain_000/summary.json", {"executed": run})
    write_json(folder / "summary.json", {})
    Image.new("RGB", (8, 8)).save(folder / "predictions.png")
    return folder


def execute(results, folder, multi_task="nowhere"):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    environment = {**os.environ, "TAPS_RESULTS": str(results), "TAPS_MTL_RESULTS": str(multi_task)}
    environment["PYTHONPATH"] = str(ROOT)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute(env=environment)
    return notebook


def cells_here(results, multi_task, monkeypatch) -> list:
    """Execute the cells in this process, without IPython, and return their values that are not None."""
    monkeypatch.setenv("TAPS_RESULTS", str(results))
    monkeypatch.setenv("TAPS_MTL_RESULTS", str(multi_task))
    space, values = {}, []
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            body = ast.parse(cell.source.removeprefix("%matplotlib inline\n")).body
            value = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), "cell", "exec"), space)
            values.append(eval(compile(value, "cell", "eval"), space) if value else None)
    return [value for value in values if value is not None]


@pytest.mark.filterwarnings("default")  # what the notebook's own process does is checked through its outputs
def test_notebook_runs_on_a_results_folder(joint, tmp_path):
    notebook = execute(joint[0] / "results/run", tmp_path, multi_task_run(tmp_path / "mtl"))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 10
    texts = "".join(output.get("text", "") for output in outputs)
    assert "parameters × base" in texts
    assert "million MACs" in texts
    assert "arning" not in texts
    assert "nowhere holds no finished run" not in texts


def test_its_cells_run_where_there_is_no_multi_task_run(finished, monkeypatch, capsys):
    values = cells_here(finished[0] / "results/run", "nowhere", monkeypatch)
    assert sum(isinstance(value, Figure) for value in values) == len(values) == 7
    texts = capsys.readouterr().out
    assert "parameters × base" in texts
    assert "million MACs" in texts
    assert "nowhere holds no finished run; make one with: python train_mtl.py" in texts


def test_on_an_empty_folder_it_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        cells_here(tmp_path, "nowhere", monkeypatch)
    assert str(caught.value).startswith("error: ")
    assert "is empty; train into it first" in str(caught.value)
    assert caught.value.__suppress_context__, "a line, not a traceback"


def test_the_notebook_is_shipped_with_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 10
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
