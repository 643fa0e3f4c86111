"""The notebook runs on the results of each program, and says one thing where there are none."""

import os

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = ROOT / "visualize_taps.ipynb"


def execute(results, folder):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    environment = {**os.environ, "TAPS_RESULTS": str(results), "PYTHONPATH": str(ROOT)}
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute(env=environment)
    return notebook


@pytest.mark.filterwarnings("default")  # what the notebook's own process does is checked through its outputs
@pytest.mark.parametrize("program", ["sequential", "joint"])
def test_notebook_runs_on_a_results_folder(program, request, tmp_path):
    folder, _ = request.getfixturevalue("finished" if program == "sequential" else "joint")
    notebook = execute(folder / "results" / "run", tmp_path)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6
    texts = "".join(output.get("text", "") for output in outputs)
    assert "parameters × base" in texts
    assert "million MACs" in texts
    assert "arning" not in texts


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
    assert len(pictures) == 6
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
