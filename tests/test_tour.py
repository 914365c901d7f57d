"""The notebook docs/tour.ipynb: as it is kept, and run from its first cell to its last."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "docs" / "tour.ipynb"


def outputs(cells):
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def test_it_is_kept_with_its_outputs():
    text = TOUR.read_text()
    found = json.loads(text)
    kinds = [kind for output in outputs(found["cells"]) for kind in output.get("data", {})]
    assert kinds.count("image/png") == 4
    assert not any(output["output_type"] == "error" for output in outputs(found["cells"]))
    counts = [c["execution_count"] for c in found["cells"] if c["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))  # at once, from above to below
    assert len(text) < 500_000
    pictures = [o.get("data", {}).pop("image/png", "") for o in outputs(found["cells"])]
    assert any(pictures)
    assert not re.search(r"/(home|root|Users|tmp|work)/\w", json.dumps(found))


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    """In a folder of its own inside of the project's copy; trained for a moment only."""
    import nbclient
    import nbformat

    monkeypatch.setenv("TOUR_STEPS", "30")
    monkeypatch.setenv("TOUR_FOLDER", str(tmp_path / "tour"))
    copy = tmp_path / "project"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "data", "logs")
    shutil.copytree(ROOT, copy, ignore=ignored)
    notebook = nbformat.read(copy / "docs" / "tour.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(copy / "docs")}}
    )
    client.execute(env={**os.environ, "JAX_PLATFORMS": "cpu"})
    text = "".join(output.get("text", "") for output in outputs(notebook.cells))
    assert "1797 images of 10 classes" in text and "step 30" in text
    kinds = [kind for output in outputs(notebook.cells) for kind in output.get("data", {})]
    assert kinds.count("image/png") == 4
