"""The tutorial runs, and the summary that it shows is the one that the code prints."""

import json
import os
import re
import sys

import pytest
from harness import run_python, slow_but_on_torch
from test_examples import EXAMPLES

# Runs each cell as a notebook does, and keeps what it prints.
RUN_CELLS = """
import contextlib, io, json
names, printed = {"display": print}, []
for cell in json.load(open("cells.json")):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(cell, names)
    printed.append(output.getvalue())
json.dump(printed, open("printed.json", "w"))
"""


@pytest.fixture(scope="module")
def cells():
    """The code cells."""
    return [cell for cell in json.loads((EXAMPLES / "tutorial.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]


def shown(cell):
    """The text that the notebook shows below a cell."""
    return "".join("".join(output.get("text", ())) for output in cell["outputs"])


@slow_but_on_torch
def test_the_tutorial_runs_and_shows_the_summary_of_this_code(cells, tmp_path):
    sources = ["".join(cell["source"]) for cell in cells]
    assert "EPOCHS, BATCH_SIZE = 6, 50" in sources[0]
    sources[0] = sources[0].replace("EPOCHS, BATCH_SIZE = 6, 50", "EPOCHS, BATCH_SIZE = 2, 50")
    (tmp_path / "cells.json").write_text(json.dumps(sources))
    path = os.pathsep.join(filter(None, sys.path))
    run_python("-c", RUN_CELLS, cwd=tmp_path, MPLBACKEND="Agg", COLUMNS="80", PYTHONPATH=path)
    printed = json.loads((tmp_path / "printed.json").read_text())
    (place,) = (place for place, source in enumerate(sources) if source.startswith("summary(model"))
    assert "trainable kernels are conditioned" in printed[place]
    assert printed[place] == shown(cells[place])
    losses = [float(loss) for loss in re.findall(r"test loss ([\d.]+)", printed[-1])]
    assert len(losses) == 2
    # A guess of ten classes costs 2.3.
    assert max(losses) < 1.5, printed[-1]


def test_the_tutorial_keeps_its_outputs(cells):
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    for text in ("AdamW: test loss", "ISAAC, damping", "trainable kernels are conditioned"):
        assert any(text in shown(cell) for cell in cells)
