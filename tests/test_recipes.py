"""The recipes run as a newcomer runs them, on small settings."""

import re

import pytest
from models import keras_hub
from test_examples import run


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
