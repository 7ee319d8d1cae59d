"""The examples run as a newcomer runs them, on small settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import slow_but_on_torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments, cwd):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "120"}, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_digits_prints_a_table_and_saves_a_picture(tmp_path):
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 240)
    np.savez(tmp_path / "blobs.npz", x=random.normal(size=(240, 4, 2)) + y[:, None, None], y=y)
    output = run("digits.py", "--data", "blobs.npz", "--epochs", 2, "--batch-size", 40, "--picture", "curves.png", cwd=tmp_path)
    for name in ("SGD", "Adam", "Muon", "ISAAC", "ISAAC \\+ Adam"):
        row = re.search(rf"│ {name} +│ +[\d.]+ │ +[\d.e-]+ │ +[\d.]+ │ +[\d.]+ │ +([\d.]+) │", output)
        assert row, output
        if name == "SGD":
            assert float(row.group(1)) == 1.0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@slow_but_on_torch
def test_digits_says_what_data_it_takes(tmp_path):
    with pytest.raises(AssertionError, match=r"--data must be digits, mnist, fashion_mnist or an existing \.npz file"):
        run("digits.py", "--data", "nowhere.npz", cwd=tmp_path)


def test_custom_loop_learns(tmp_path):
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run("custom_loop.py", "--steps", 21, cwd=tmp_path))]
    assert losses[-1] < losses[0] / 2


@slow_but_on_torch
def test_monitor_prints_the_table_and_saves_a_picture(tmp_path):
    output = run("monitor.py", "--epochs", 2, "--picture", "curvature.png", cwd=tmp_path)
    assert "4 of 4 trainable kernels are conditioned" in output
    assert float(re.search(r"accuracy ([\d.]+)", output).group(1)) > 0.5
    assert (tmp_path / "curvature.png").read_bytes().startswith(b"\x89PNG")
