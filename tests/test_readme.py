"""The README's Python runs as it is written."""

import re
from pathlib import Path

import numpy as np
import pytest
import test_layers as laws
from cases import Case, dense

from keras_isaac import ISAAC


@pytest.fixture(scope="module")
def namespace():
    """What the README's Python defines."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(snippets) >= 3
    names = {}
    for snippet in snippets:
        exec(snippet, names)
    return names


def test_the_readmes_model_trains(namespace):
    random = np.random.default_rng(0)
    model = namespace["model"]
    assert isinstance(model.optimizer, ISAAC)
    model.fit(random.normal(size=(20, 64)), random.integers(0, 10, 20), verbose=0)


def test_the_readmes_layer_keeps_the_laws(namespace, count_traces):
    def read(layer, inputs):
        return dense(layer, np.tanh(inputs))

    case = Case("squashing", namespace["Squashing"], (3, 2, 7), read)
    laws.test_output_outside_a_training_step_is_the_plain_layers(case)
    for compiled in (False, True):
        laws.test_only_kernel_gradients_differ_from_the_plain_layers_and_are_the_oracles(case, compiled)
    laws.test_huge_damping_gives_the_plain_gradient_and_any_a_direction_of_increase(case)
    laws.test_second_step_compiles_nothing(case, count_traces)
