"""Runs Keras' own tests of the layers that can be captured, with every such layer captured.

`python tests/keras_own.py` takes the tests from the installed Keras, on the backend that it is set to, and runs them twice: as
they are; and with each supported layer captured as soon as it is made, and a conditioning scope open around each test. Its
damping is so large that conditioned gradients are the plain ones. It lists the tests whose outcome differs. Arguments go to
pytest.
"""

import functools
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import pytest
from harness import paper_isaac

from keras_isaac import capture_inputs
from keras_isaac.layers import ADAPTERS, adapter_of

FILES = (
    "core/*dense_test.py",
    "core/*embedding_test.py",
    "convolutional/*_test.py",
    "attention/*_attention_test.py",
    "rnn/*_test.py",
)


class Outcomes:
    """A plugin of pytest that notes how each test ended."""

    def __init__(self):
        self.outcomes, self.conditioned = {}, []

    def pytest_runtest_logreport(self, report):
        """A failure before, in or after a test is the test's."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = [report.outcome, report.longreprtext[-2000:]]


class Capturing(Outcomes):
    """Captures layers, and opens the scope around each test."""

    def __init__(self):
        super().__init__()
        for layer_class in {each for each in vars(keras.layers).values() if getattr(each, "call", None) in ADAPTERS}:
            layer_class.__init__ = _capturing(layer_class.__init__)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        """Runs the test."""
        optimizer = paper_isaac(damping=1e30)
        variables = [[variable.value for variable in optimizer.variables]] if keras.backend.backend() == "jax" else []
        with optimizer.conditioning(*variables):
            result = yield
        if optimizer.step_check._has_now:
            self.conditioned.append(item.nodeid)
        return result


def _capturing(plain_init):
    @functools.wraps(plain_init)
    def init(self, *args, **kwargs):
        plain_init(self, *args, **kwargs)
        if adapter_of(self) is not None:
            capture_inputs(self)

    # Keras reads the arguments for `get_config`, and does not look behind a wrapper by itself.
    init.__signature__ = inspect.signature(plain_init)
    return init


def run(plugin, arguments):
    """Runs the tests in this process, with none of this project's settings."""
    root = Path(keras.__file__).parent
    files = sorted(str(path) for pattern in FILES for path in root.rglob(f"layers/{pattern}"))
    options = ["-c", os.devnull, "--rootdir", str(root), "-p", "no:cacheprovider", "-q", "--tb=short", "-W", "ignore"]
    pytest.main([*options, *files, *arguments], plugins=[plugin])
    return {"outcomes": plugin.outcomes, "conditioned": plugin.conditioned}


def in_process(kind, arguments):
    """Runs the tests in a process of their own, silently."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, __file__, "--results", str(results), kind, *arguments]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if not results.exists():
            sys.exit(process.stdout[-4000:] + process.stderr[-4000:])
        return json.loads(results.read_text())


def main():
    """Runs the tests in both ways, and lists the differences."""
    if sys.argv[1:2] == ["--results"]:
        plugin = {"plain": Outcomes, "captured": Capturing}[sys.argv[3]]()
        Path(sys.argv[2]).write_text(json.dumps(run(plugin, sys.argv[4:])))
        return
    plain, captured = (in_process(kind, sys.argv[1:]) for kind in ("plain", "captured"))
    outcomes = [outcome for outcome, _ in plain["outcomes"].values()]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
    print(f"Keras {keras.__version__} on {keras.backend.backend()}: {counts} as they are.")
    print(f"{len(captured['conditioned'])} tests used a conditioned kernel.")
    differing = [test for test in plain["outcomes"] if captured["outcomes"].get(test, [None])[0] != plain["outcomes"][test][0]]
    for test in differing:
        outcome, text = captured["outcomes"].get(test, ("not run", ""))
        print(f"\n{test}: {plain['outcomes'][test][0]} as it is, {outcome} when captured\n{text}")
    print(f"{len(differing)} tests end otherwise with the layers captured.")
    sys.exit(bool(differing) or not captured["conditioned"])


if __name__ == "__main__":
    main()
