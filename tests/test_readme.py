"""The Python of the README and of CONTRIBUTING runs as it is written."""

import re
from pathlib import Path

import numpy as np
import pytest
import test_layers as invariants
from cases import Case
from harness import IS_COMPILED
from readings import dense

from keras_isaac import ISAAC

ROOT = Path(__file__).parents[1]


def run_python(page):
    """Runs the Python of a page, and returns how many pieces there are and what they define."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    return len(snippets), names


def test_the_readmes_model_trains():
    count, names = run_python("README.md")
    assert count >= 2
    model = names["model"]
    assert isinstance(model.optimizer, ISAAC)
    random = np.random.default_rng(0)
    model.fit(random.normal(size=(20, 64)), random.integers(0, 10, 20), verbose=0)


def test_the_adapter_of_contributing_keeps_the_invariants():
    def read(layer, inputs):
        return dense(layer, np.tanh(inputs))

    count, names = run_python(".github/CONTRIBUTING.md")
    assert count == 1
    case = Case("squashing", names["Squashing"], (3, 2, 7), read)
    invariants.test_output_outside_a_training_step_is_the_plain_layers(case)
    invariants.test_only_kernel_gradients_differ_from_the_plain_layers_and_are_the_oracles(case, IS_COMPILED)
    invariants.test_huge_damping_gives_the_plain_gradient_and_any_a_direction_of_increase(case)
    invariants.test_second_step_compiles_nothing(case)


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", "examples/benchmarks/RESULTS.md"])
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert targets
    for target in targets:
        assert (ROOT / page).parent.joinpath(target).exists(), target
