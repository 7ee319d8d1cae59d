"""Checks `examples/benchmarks/swap.py` on one small task: `test_benchmarks.py` runs this in an empty folder, on JAX."""

import io
import json
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path

import evidence
import keras
import numpy as np
import report
import swap
import tasks


def build(seed):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1, name="logits")])


x = 5 * np.random.default_rng(0).normal(size=(120, 6)).astype("float32")
parts = [(x, np.sin(x[:, :1]))] * 3
task = tasks.TASKS["diabetes"]._replace(build=build, data=lambda: parts, batch_size=12, steps=20)
tasks.TASKS["cnn"] = task


def call(main, *arguments):
    sys.argv = ["main", "--tasks", "cnn", *arguments]
    with redirect_stdout(io.StringIO()) as output:
        main()
    return output.getvalue()


def load(folder):
    return [json.loads(line) for line in (folder / "cnn.jsonl").read_text().splitlines()]


call(evidence.main, "--methods", "AdamW;ScheduleFreeAdamW", "--settings", "2", "--seeds", "1")
losses = evidence.searched(evidence.load("cnn"), "AdamW", 1)
arguments = "--bases", "AdamW;ScheduleFreeAdamW;Lion", "--horizons", "1", "--seeds", "2"
assert call(swap.main, *arguments, "--max-seconds", "0") == "out of time\n"
output = call(swap.main, *arguments)
runs = load(swap.SWAPPED)
assert [(run["base"], run["isaac"] is not None, run["seed"]) for run in runs] == [
    (base, wrapped, seed) for base in ("AdamW", "ScheduleFreeAdamW") for seed in (0, 1) for wrapped in (False, True)
]
assert "no search of Lion" in output
# The plain run is the search's best one, and the wrapped one trains otherwise, at the same setting.
(best,) = [run for run in evidence.load("cnn") if evidence.setting_of(run) == min(losses, key=losses.get)]
assert all(runs[0][key] == best[key] for key in ("rate", "second", "seed", "horizon", "validation", "loss"))
assert all(runs[1][key] == best[key] for key in ("rate", "second", "seed", "horizon"))
assert runs[1]["loss"] != runs[0]["loss"]
assert runs[1]["isaac"] == swap.isaac_config({})
(row,) = [line for line in output.splitlines() if line.startswith("| cnn")][:1]
plain, wrapped = (np.mean([run["loss"] for run in runs[start:4:2]]) for start in (0, 1))
for cell in (f"{plain:.3g} ± ", f"{wrapped:.3g} ± ", f"{100 * (wrapped / plain - 1):+.1f} %"):
    assert cell in row, row

# It resumes; other arguments of ISAAC are other runs, and with a huge damping they are the plain ones.
assert call(swap.main, *arguments).count("(") == 0
call(swap.main, *arguments, "--isaac", "damping=1e8,max_rows=64", "--results", "other")
others = load(Path("other"))
assert len(others) == 4
assert len(load(swap.SWAPPED)) == 8
assert all(run["isaac"]["damping"] == 1e8 and run["isaac"]["max_rows"] == 64 for run in others)
for plain, wrapped in zip(runs[::2], others, strict=True):
    np.testing.assert_allclose(wrapped["validation"], plain["validation"], rtol=2e-3)

# At the defaults, each optimizer has its own.
call(swap.main, "--bases", "Keras Muon", "--defaults", "--seeds", "1")
muon, default = load(swap.SWAPPED)[-1], keras.optimizers.Muon()
np.testing.assert_allclose((muon["rate"], muon["second"]), (float(default.learning_rate), default.weight_decay))

call(swap.main, "--bases", "AdamW", "--time")
page = Path("page.md")
page.write_text(f"before\n{report.FIRST}old\n{report.LAST}after\n")
with redirect_stdout(io.StringIO()) as output:
    sys.argv = ["report.py", "--page", "page.md"]
    report.main()
assert page.read_text().startswith("before")
assert page.read_text().endswith("after\n")
assert "old" not in page.read_text()
assert "| AdamW | best | 1 | 1 |" in page.read_text()
text = output.getvalue()
for part in (
    "| AdamW | best | 1 | 1 |",
    "| Keras Muon | defaults | 1 | 1 |",
    "Time of a step",
    "Sooner than AdamW: ISAAC + AdamW",
):
    assert part in text, text
assert max(line.count("|") for line in text.splitlines()) <= 9, text
assert Path("curves.png").read_bytes().startswith(b"\x89PNG")

# Level is what lies within the standard error of the paired difference; a run that diverged is a loss.
assert swap.verdict([1.0, 2.0, 3.0], [0.9, 1.9, 2.9]) == "lower"
assert swap.verdict([1.0, 2.0, 3.0], [1.1, 1.9, 3.0]) == "level"
assert swap.verdict([1.0, 2.0, 3.0], [1.2, 2.1, 3.2]) == "higher"
assert swap.verdict([1.0, 2.0], [0.5, math.inf]) == "higher"
assert swap.verdict([math.inf, 2.0], [0.5, 2.0]) == "lower"
assert swap.part_to([4.0, 2.0, 1.0], 2.0) == 0.2
assert swap.part_to([4.0, 2.0, 1.0], math.sqrt(2)) == 0.25
assert swap.part_to([4.0, 2.0, 1.0], 0.5) == math.inf
