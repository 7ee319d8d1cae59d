"""Whole training runs: against NumPy float64 (and so the backends against each other), compiled and eager, resumed."""

import json

import keras
import numpy as np
import pytest
from harness import BACKEND, paper_isaac, run_python
from models import assert_close, batches, captured, fit, mlp, numpy_training, regression, trained, weights

from keras_isaac import capture_inputs

MODES = {
    "default": {},
    "eager": {"run_eagerly": True},
    "jit": {"jit_compile": True},
    "no jit": {"jit_compile": False},
}


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow if (mode, BACKEND) == ("jit", "torch") else ()) for mode in MODES]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_ten_steps_are_numpys_on_every_backend_compiled_and_eager(mode):
    inputs, targets = regression(40)  # The last batch of an epoch is smaller: 16, 16, 8 rows; the hidden layer is 8 wide.
    options = {"learning_rate": 0.2, "damping": 0.05, "momentum": 0.9}
    numpy = numpy_training(mlp(), batches((inputs[:32], targets[:32]), 16, 10), **options)
    # The same ten steps of two batches of 16: rows more than features in both layers.
    actual = trained(paper_isaac(**options), capture_inputs, (inputs[:32], targets[:32]), MODES[mode], epochs=5)
    assert_close(actual, numpy, 1e-4)


def test_ten_steps_with_fewer_rows_than_features_and_a_smaller_last_batch():
    inputs, targets = regression(12)
    options = {"learning_rate": 0.2, "damping": 0.05, "momentum": 0.9}
    # 5, 5 and 2 rows.
    steps = batches((inputs, targets), 5, 9)
    model = captured(paper_isaac(**options))
    for batch in steps:
        model.train_on_batch(*batch)
    assert_close(weights(model), numpy_training(mlp(), steps, **options), 1e-4)
    assert len({len(x) for x, _ in steps}) > 1


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.data")
@pytest.mark.parametrize("drop_remainder", [False, True])
def test_tensorflow_datasets_with_and_without_a_static_batch_size(drop_remainder):
    import tensorflow as tf

    data = regression(48)
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(16, drop_remainder=drop_remainder)
    model = captured(paper_isaac(damping=0.1))
    model.fit(dataset, verbose=0, shuffle=False)
    assert_close(weights(model), trained(paper_isaac(damping=0.1), capture_inputs, data), 1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has steps_per_execution on JAX and TensorFlow")
def test_steps_per_execution():
    options = {"steps_per_execution": 3}
    assert_close(
        trained(paper_isaac(damping=0.1), capture_inputs, None, options, epochs=2),
        trained(paper_isaac(damping=0.1), capture_inputs, epochs=2),
    )


def test_non_finite_inputs_train_on_without_an_exception_as_under_sgd():
    inputs, targets = regression(16)
    inputs[3, 1] = np.nan
    for options in MODES["default"], MODES["eager"]:
        after = trained(paper_isaac(damping=0.1), capture_inputs, (inputs, targets), options)
        assert not np.isfinite(after[0]).all()


def test_it_learns_faster_than_its_inner_optimizer_at_the_same_rate():
    data = regression(256, seed=1)

    def loss(optimizer):
        model = captured(optimizer, mlp(width=32))
        return fit(model, data, epochs=10).history["loss"][-1]

    assert loss(paper_isaac(inner_optimizer="adam", learning_rate=0.01, damping=0.1)) < loss(keras.optimizers.Adam(0.01))


OPTIMIZERS = {
    "momentum": "paper_isaac(damping=0.3, momentum=0.9)",
    "adam": "paper_isaac(damping=0.3, inner_optimizer='adam', learning_rate=0.01)",
    "schedules": "paper_isaac(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.9),"
    " keras.optimizers.schedules.ExponentialDecay(1.0, 2, 0.5), momentum=0.9)",
    "accumulation": "paper_isaac(damping=0.3, gradient_accumulation_steps=2, momentum=0.9)",
    "average": "paper_isaac(damping=0.3, use_ema=True, inner_optimizer='adam')",
    "loss scale": "keras.optimizers.LossScaleOptimizer(paper_isaac(damping=0.3, inner_optimizer='adam'))",
}


@pytest.mark.often("adam", "loss scale")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saved_mid_training_and_resumed_in_a_fresh_process_continues_bit_for_bit(optimizer, tmp_path):
    model = captured(eval(OPTIMIZERS[optimizer]))
    for _ in range(5):
        model.train_on_batch(*regression(16))
    if optimizer != "schedules":
        isaac = getattr(model.optimizer, "inner_optimizer", None) if optimizer == "loss scale" else model.optimizer
        isaac.damping = 0.25
    model.save(tmp_path / "model.keras")
    for _ in range(5):
        model.train_on_batch(*regression(16))
    script = (
        "import sys, json, keras; from models import regression, weights; from keras_isaac import capture_inputs\n"
        "model = capture_inputs(keras.models.load_model(sys.argv[1]))\n"
        "for _ in range(5): model.train_on_batch(*regression(16))\n"
        "print(json.dumps([w.tolist() for w in weights(model)]))"
    )
    output = run_python("-c", script, tmp_path / "model.keras")
    resumed = [np.asarray(w) for w in json.loads(output.splitlines()[-1])]
    assert_close(resumed, weights(model), 0)


def test_a_saved_model_loads_where_the_package_is_not_installed(tmp_path):
    model = captured(paper_isaac())
    model.train_on_batch(*regression(16))
    model.save(tmp_path / "model.keras")
    script = (
        "import sys; sys.modules['keras_isaac'] = None\n"
        "import keras; model = keras.models.load_model(sys.argv[1], compile=False)\n"
        "print(float(keras.ops.sum(model.get_layer('hidden').kernel)))"
    )
    output = run_python("-c", script, tmp_path / "model.keras", cwd=tmp_path)
    assert float(output.splitlines()[-1]) == pytest.approx(weights(model)[0].sum(), abs=1e-5)
