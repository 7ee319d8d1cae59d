"""The recipes and the tutorial run as a newcomer runs them, on small settings."""

import json
import os
import re
import subprocess
import sys

import pytest
from harness import slow_but_on_torch
from models import keras_hub
from test_examples import EXAMPLES, run


def test_a_physics_informed_network_comes_near_the_solution(tmp_path):
    output = run("recipes/physics_informed.py", "--width", 16, "--epochs", 12, cwd=tmp_path)
    for name in ("Adam", "ISAAC"):
        errors = re.search(rf"{name} +relative error of u: ([\d.e+-]+) at first, ([\d.e+-]+) after 192 steps", output)
        assert errors, output
        assert float(errors.group(2)) < float(errors.group(1)) / 2, output


@pytest.mark.slow
def test_transfer_learning_beats_chance(tmp_path):
    output = run("recipes/transfer_learning.py", "--weights", "none", "--epochs", 5, cwd=tmp_path)
    accuracies = [float(accuracy) for accuracy in re.findall(r"held-out accuracy ([\d.]+)", output)]
    assert len(accuracies) == 2
    # Of five classes.
    assert min(accuracies) > 0.3, output
    assert "head/kernel" in output


@pytest.mark.slow
def test_lora_lowers_the_held_out_loss(tmp_path):
    keras_hub()
    output = run("recipes/lora.py", "--width", 32, "--samples", 1024, "--epochs", 4, cwd=tmp_path)
    before = float(re.search(r"before LoRA: ([\d.]+)", output).group(1))
    for name in ("AdamW", "ISAAC"):
        assert float(re.search(rf"epochs of {name}: ([\d.]+)", output).group(1)) < before, output
    assert "lora" in output


@pytest.fixture(scope="module")
def tutorial():
    """The cells of Python."""
    cells = json.loads((EXAMPLES / "tutorial.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@slow_but_on_torch
def test_the_tutorial_runs(tutorial, tmp_path):
    program = "\n\n".join("".join(cell["source"]) for cell in tutorial)
    assert "EPOCHS, BATCH_SIZE = 6, 50" in program
    (tmp_path / "tutorial.py").write_text(program.replace("EPOCHS, BATCH_SIZE = 6, 50", "EPOCHS, BATCH_SIZE = 2, 50"))
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "tutorial.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    losses = {name: float(loss) for name, loss in re.findall(r"(AdamW|ISAAC): test loss ([\d.]+)", result.stdout)}
    assert losses.keys() == {"AdamW", "ISAAC"}
    # A guess of ten classes costs 2.3.
    assert max(losses.values()) < 1.5, result.stdout


def test_the_tutorial_keeps_its_outputs(tutorial):
    outputs = [output for cell in tutorial for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 2
    text = "".join("".join(output.get("text", ())) for output in outputs)
    assert "kernels are conditioned" in text
    assert "ISAAC: test loss" in text
