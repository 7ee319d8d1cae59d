"""The laws that every captured layer keeps, over the table of cases."""

import keras
import numpy as np
import pytest
from cases import data, each_case
from harness import run
from oracle import relative_error

from keras_isaac import ISAAC, capture_inputs

TOLERANCE = 1e-5


@each_case()
def test_output_outside_a_training_step_is_the_plain_layers(case):
    layer, inputs, _ = data(case)
    plain = keras.ops.convert_to_numpy(layer(inputs))
    captured = keras.ops.convert_to_numpy(capture_inputs(layer)(inputs))
    np.testing.assert_array_equal(captured, plain)


@each_case()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_only_the_kernel_gradient_differs_from_the_plain_layers(case, compiled):
    layer, inputs, cotangent = data(case)
    plain = run(layer, inputs, cotangent, compiled=compiled)
    capture_inputs(layer)
    np.testing.assert_array_equal(run(layer, inputs, cotangent, compiled=compiled).gradients[0], plain.gradients[0])
    conditioned = run(layer, inputs, cotangent, ISAAC(damping=0.3), compiled)
    assert relative_error(conditioned.outputs, plain.outputs) < 1e-6
    assert relative_error(conditioned.input_gradient, plain.input_gradient) < 1e-6
    for variable, ours, theirs in zip(layer.trainable_variables, conditioned.gradients, plain.gradients, strict=True):
        if variable is not layer.kernel:
            assert relative_error(ours, theirs) < 1e-6
        else:
            assert relative_error(ours, theirs) > 1e-2


@each_case()
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("damping", [1e-2, 0.3, 30.0])
def test_kernel_gradient_is_the_oracles(case, compiled, damping):
    layer, inputs, cotangent = data(case)
    expected = case.kernel_gradient(layer, inputs, cotangent, damping)
    actual = run(capture_inputs(layer), inputs, cotangent, ISAAC(damping=damping), compiled).gradients[0]
    assert relative_error(actual, expected) < TOLERANCE


@each_case()
def test_huge_damping_gives_the_plain_gradient(case):
    layer, inputs, cotangent = data(case)
    plain = run(layer, inputs, cotangent).gradients[0]
    actual = run(capture_inputs(layer), inputs, cotangent, ISAAC(damping=1e8)).gradients[0]
    assert relative_error(actual, plain) < 1e-6


@each_case()
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0, 1e2, 1e6])
def test_direction_is_one_of_increase(case, damping):
    layer, inputs, cotangent = data(case)
    plain = run(layer, inputs, cotangent).gradients[0]
    conditioned = run(capture_inputs(layer), inputs, cotangent, ISAAC(damping=damping)).gradients[0]
    assert np.sum(conditioned * plain) > 0


@each_case()
def test_second_step_compiles_nothing(case, count_traces):
    layer, inputs, _ = data(case)
    traces = count_traces()
    model = capture_inputs(keras.Sequential([keras.Input(inputs.shape[1:]), traces.layer, layer]))
    model.compile(optimizer=ISAAC(learning_rate=1e-3), loss="mse")
    targets = np.zeros(layer.compute_output_shape(inputs.shape), "float32")
    model.train_on_batch(inputs, targets)
    first = traces.count
    for _ in range(3):
        model.train_on_batch(inputs, targets)
    assert first > 0
    # Eager PyTorch runs the layer's Python code each step and compiles nothing to begin with.
    assert traces.count == (first if keras.backend.backend() != "torch" else first + 3)


@each_case()
def test_saved_file_is_the_plain_models(case, tmp_path):
    layer, inputs, _ = data(case)
    model = keras.Sequential([keras.Input(inputs.shape[1:]), layer])
    before, paths, config = model.predict(inputs, verbose=0), [w.path for w in model.weights], model.get_config()
    capture_inputs(model)
    assert [w.path for w in model.weights] == paths
    assert model.get_config() == config
    assert type(model) is keras.Sequential
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert "call" not in vars(loaded.layers[-1])
    np.testing.assert_array_equal(loaded.predict(inputs, verbose=0), before)
