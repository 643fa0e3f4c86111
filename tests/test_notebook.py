"""The notebook runs on the results of each program, and reports when there are none."""

import os

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
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


@pytest.mark.filterwarnings("default")  # what the notebook's own process does is checked through its outputs
@pytest.mark.parametrize("program", ["sequential", "joint"])
def test_notebook_runs_on_a_results_folder(program, request, tmp_path):
    folder, _ = request.getfixturevalue("finished" if program == "sequential" else "joint")
    multi_task = multi_task_run(tmp_path / "mtl") if program == "joint" else "nowhere"
    notebook = execute(folder / "results" / "run", tmp_path, multi_task)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == (9 if program == "joint" else 6)
    texts = "".join(output.get("text", "") for output in outputs)
    assert "parameters × base" in texts
    assert "million MACs" in texts
    assert "arning" not in texts
    assert ("nowhere holds no finished run; make one with: python train_mtl.py" in texts) == (program == "sequential")


@pytest.mark.filterwarnings("default")
def test_notebook_on_an_empty_folder_says_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CellExecutionError) as caught:
        execute(tmp_path / "empty", tmp_path)
    assert "SystemExit" in str(caught.value), "a line, not a traceback"
    assert "is empty; train into it first" in str(caught.value)
    assert "UserError" not in str(caught.value).split("SystemExit", 1)[1].split("error: ", 1)[1]


def test_the_notebook_is_shipped_with_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 9
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
