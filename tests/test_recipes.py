"""The recipes run as a newcomer runs them, on small settings."""

import re

import pytest
from models import keras_hub
from test_examples import EXAMPLES, run


def run_recipe(name, constants, smaller, folder):
    """Runs a recipe with smaller constants, and returns what it prints."""
    program = (EXAMPLES / "recipes" / f"{name}.py").read_text()
    assert constants in program
    (folder / "recipe.py").write_text(program.replace(constants, smaller))
    return run(folder / "recipe.py", cwd=folder)


def test_isaac_around_your_own_optimizer_ends_lower(tmp_path):
    output = run_recipe("keep_your_recipe", "EPOCHS, BATCH_SIZE = 10, 50", "EPOCHS, BATCH_SIZE = 3, 50", tmp_path)
    losses = {name: float(loss) for name, loss in re.findall(r"^(.*): held-out loss ([\d.]+)", output, re.MULTILINE)}
    assert losses["ISAAC around AdamW"] < losses["AdamW"] < 1, output


def test_a_physics_informed_network_comes_near_the_solution(tmp_path):
    output = run_recipe("physics_informed", "WIDTH, EPOCHS = 64, 60", "WIDTH, EPOCHS = 16, 12", tmp_path)
    errors = dict(re.findall(r"(\w+) +relative error of u: ([\d.e+-]+) after 192 steps", output))
    assert errors.keys() == {"Adam", "ISAAC"}
    # Zero everywhere has an error of 1.
    assert all(float(error) < 0.5 for error in errors.values()), output


@pytest.mark.slow
def test_transfer_learning_beats_chance(tmp_path):
    constants = 'WEIGHTS, EPOCHS = "imagenet", 10'
    output = run_recipe("transfer_learning", constants, "WEIGHTS, EPOCHS = None, 5", tmp_path)
    accuracies = [float(accuracy) for accuracy in re.findall(r"held-out accuracy ([\d.]+)", output)]
    assert len(accuracies) == 2
    # Of five classes.
    assert min(accuracies) > 0.3, output
    assert "head/kernel" in output


@pytest.mark.slow
def test_lora_lowers_the_held_out_loss(tmp_path):
    keras_hub()
    constants = "WIDTH, SAMPLES, EPOCHS = 64, 128, 2048, 10"
    output = run_recipe("lora", constants, "WIDTH, SAMPLES, EPOCHS = 64, 32, 1024, 4", tmp_path)
    before = float(re.search(r"before LoRA: ([\d.]+)", output).group(1))
    for name in ("AdamW", "ISAAC"):
        assert float(re.search(rf"epochs of {name}: ([\d.]+)", output).group(1)) < before, output
    assert "lora" in output
