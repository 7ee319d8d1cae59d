"""The examples run as a newcomer runs them, on small settings."""

import re
from pathlib import Path

from harness import run_python, slow_but_on_torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments, cwd):
    return run_python(EXAMPLES / script, *arguments, cwd=cwd, COLUMNS="120")


def test_digits_prints_a_table_and_saves_a_picture(tmp_path):
    output = run("digits.py", "--epochs", 2, "--seeds", 2, "--picture", "pictures/curves.png", cwd=tmp_path)
    table = output.partition("ms a step")[2]
    for name in ("SGD", "AdamW", "ISAAC()", "Muon", "ISAAC(Muon)"):
        row = re.search(rf"^{re.escape(name)} +([\d.]+) \+- [\d.]+ +([\d.]+) +[\d.]+$", table, re.MULTILINE)
        assert row, output
        losses = [float(loss) for loss in re.findall(rf"seed \d, {re.escape(name)}: test loss ([\d.]+)", output)]
        assert len(losses) == 2
        assert abs(float(row[1]) - sum(losses) / 2) < 2e-4
        # A guess of ten classes costs 2.3, and is right once in ten times.
        assert float(row[1]) < 2.3
        assert float(row[2]) > 0.2
    assert "Epoch" not in output
    assert f"Picture: {tmp_path / 'pictures' / 'curves.png'}" in output
    assert (tmp_path / "pictures" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_custom_loop_learns(tmp_path):
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run("custom_loop.py", "--steps", 21, cwd=tmp_path))]
    assert losses[-1] < losses[0] / 2


@slow_but_on_torch
def test_monitor_prints_the_table_and_saves_a_picture(tmp_path):
    output = run("monitor.py", "--epochs", 2, "--picture", "curvature.png", cwd=tmp_path)
    assert "4 of 4 trainable kernels are conditioned" in output
    assert float(re.search(r"accuracy ([\d.]+)", output).group(1)) > 0.5
    for name in ("hidden_1", "hidden_2", "hidden_3", "logits"):
        cosine = re.search(rf"^{name}: cosine to the plain gradient ([\d.]+), largest", output, re.MULTILINE)
        assert cosine, output
        assert 0 < float(cosine[1]) < 1
    assert (tmp_path / "curvature.png").read_bytes().startswith(b"\x89PNG")
