"""The common mistakes of a newcomer: each is an error that first says what to write instead."""

import contextlib
import re

import keras
import numpy as np
import pytest
from harness import BACKEND, run_python, to_numpy
from keras import layers
from models import assert_close, assert_differ, captured, fit, mlp, regression, weights

from keras_isaac import ISAAC, capture_inputs, kernel_status


def train_one(layer, optimizer):
    model = captured(optimizer, keras.Sequential([keras.Input((6,)), layer]))
    fit(model, (np.ones((16, 6), "float32"),) * 2)


def train(optimizer, capture=capture_inputs):
    model = capture(mlp())
    model.compile(optimizer=optimizer, loss="mse")
    fit(model, regression(16))


SLIPS = {
    "capture-forgotten": (lambda: train(ISAAC(), lambda model: model), "Write `model = capture_inputs(model)` (from"),
    "inner-optimizer-first": (lambda: ISAAC("adam"), "Write `ISAAC(inner_optimizer='adam')`"),
    "inner-instance-first": (
        lambda: ISAAC(keras.optimizers.Adam()),
        "Write `ISAAC(inner_optimizer=keras.optimizers.Adam(...))`",
    ),
    "rate-with-an-instance": (
        lambda: ISAAC(0.1, inner_optimizer=keras.optimizers.Adam()),
        "Write `ISAAC(inner_optimizer=keras.optimizers.Adam(learning_rate=0.1))`",
    ),
    "isaac-inside": (lambda: ISAAC(inner_optimizer=ISAAC()), "Put `ISAAC` around `ISAAC` instead"),
    "loss-scale-inside": (
        lambda: ISAAC(inner_optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())),
        "Put `LossScaleOptimizer` around `ISAAC` instead: `keras.optimizers.LossScaleOptimizer(ISAAC(...))`",
    ),
    "unknown-argument": (lambda: ISAAC(lr=0.1), "AdamW says: Argument(s) not recognized: {'lr': 0.1}"),
    "argument-of-another": (
        lambda: ISAAC(momentum=0.9),
        "its own arguments and those of AdamW, or choose another inner optimizer: `ISAAC(inner_optimizer='sgd', ...)`",
    ),
    "no-such-optimizer": (
        lambda: ISAAC(inner_optimizer="adm"),
        "its class or an instance. Did you mean 'adam' or 'nadam' or 'adamw'? Received: inner_optimizer='adm'",
    ),
    "no-optimizer": (lambda: ISAAC(inner_optimizer=None), "`inner_optimizer` must be the name of a Keras optimizer"),
    "layer-for-an-optimizer": (lambda: ISAAC(inner_optimizer=layers.Dense), "its class or an instance. Received"),
    "damping-zero": (lambda: ISAAC(damping=0), "`damping` must be a finite number above 0 or a `keras.optimizers.schedules"),
    "damping-word": (lambda: ISAAC(damping="auto"), "Received: damping='auto'"),
    "layers-for-a-model": (
        lambda: capture_inputs(mlp().layers),
        "Give `capture_inputs` a `keras.Model`, a `keras.Layer` or, as a decorator",
    ),
    "name-for-a-path": (
        lambda: capture_inputs(mlp(), "head"),
        "A regular expression must match a whole `layer.path`, such as 'sequential/head', 'sequential/hidden'.",
    ),
    "glob-for-a-path": (
        lambda: capture_inputs(mlp(), "*head"),
        "in which `.*` and not `*` matches any characters. Received: include='*head'",
    ),
    "class-for-a-path": (lambda: capture_inputs(mlp(), keras.layers.Dense), "`include` takes layers and regular expressions"),
    "unsupported-layer": (
        lambda: capture_inputs(layers.LayerNormalization()),
        "Register the layer by `keras_isaac.register_layer`, or leave it out",
    ),
    "rules-for-a-layer": (lambda: capture_inputs(layers.Dense(1), include=".*"), "Give `include` and `exclude` with a model"),
    "nothing-to-condition": (
        lambda: train_one(layers.LayerNormalization(), ISAAC()),
        "Include, unfreeze or register (`keras_isaac.register_layer`) a layer",
    ),
    "optimizer-of-another-model": (
        lambda: [train_one(layers.Dense(6), optimizer) for optimizer in [ISAAC()] * 2],
        "Compile each model with an optimizer of its own: `model.compile(optimizer=ISAAC(...), ...)`",
    ),
    "name-for-a-model": (
        lambda: kernel_status("m"),
        "`kernel_status` takes a `keras.Model` or a `keras.Layer`. Received: model='m' (of type str)",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_an_error_that_helps(slip):
    commit, message = SLIPS[slip]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
        commit()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("wrap", [lambda isaac: isaac, keras.optimizers.LossScaleOptimizer], ids=["isaac", "loss scale"])
@pytest.mark.parametrize("built", ["not", "before compiling", "after compiling", "for another model"])
def test_forgetting_to_capture_loses_no_weights(built, wrap):
    """On JAX, Keras takes the weights out of a model that trains, and loses them if the step fails."""
    model, optimizer = mlp(), wrap(ISAAC())
    model.compile(optimizer="sgd", loss="mse")
    fit(model, regression(16))
    before = weights(model)
    if built == "for another model":
        fit(captured(optimizer), regression(16))
    if built == "before compiling":
        optimizer.build(model.trainable_variables)
    model.compile(optimizer=optimizer, loss="mse")
    if built == "after compiling":
        optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"Write `model = capture_inputs\(model\)`"):
        fit(model, regression(16))
    assert_close(weights(model), before, 0)
    if built == "for another model":
        model.compile(optimizer=ISAAC(), loss="mse")
    fit(capture_inputs(model), regression(16))
    assert_differ(weights(model), before)


def test_a_step_that_cannot_be_conditioned_loses_no_weights():
    optimizer = ISAAC()
    for layer in (layers.Dense(6), layers.Dense(6), layers.LayerNormalization()):
        optimizer = optimizer if isinstance(layer, layers.Dense) else ISAAC()
        model = captured(optimizer, keras.Sequential([keras.Input((6,)), layer]))
        before = weights(model)
        try:
            fit(model, (np.ones((16, 6), "float32"),) * 2)
        except ValueError:
            assert_close(weights(model), before, 0)
        else:
            assert_differ(weights(model), before)


@pytest.mark.parametrize("change", ["added", "unfrozen"])
def test_what_is_new_since_the_optimizer_was_built_is_named(change):
    """Under AdamW, such a layer keeps its weights on TensorFlow; elsewhere Keras raises, on JAX at the loss of all weights."""
    model = capture_inputs(keras.Sequential([keras.Input((6,)), layers.Dense(3, name="first"), layers.Dense(3, name="last")]))
    model.layers[-1].trainable = change == "added"
    model.compile(optimizer=ISAAC(), loss="mse")
    fit(model, regression(16))
    if change == "added":
        model.add(layers.Dense(3, name="new"))
    model.layers[-1].trainable = True
    before, name = [to_numpy(weight) for weight in model.weights], "new" if change == "added" else "last"
    message = rf"Compile '.*' again, .* to train what was added or unfrozen since its optimizer was built: .*{name}/kernel"
    if BACKEND == "jax":
        with pytest.raises(ValueError, match=message):
            fit(model, regression(16))
        assert_close([to_numpy(weight) for weight in model.weights], before, 0)
    else:
        with pytest.warns(UserWarning, match=message), contextlib.suppress(ValueError):
            fit(model, regression(16))
    model.compile(optimizer=ISAAC(), loss="mse")
    fit(model, regression(16))
    assert_differ([to_numpy(model.layers[-1].kernel)], [before[-2]])


def test_a_missing_backend_says_what_to_set():
    code = f"import sys; sys.modules['{BACKEND}'] = None; import keras_isaac"
    message = f"Keras is to run on {BACKEND}, which is not installed. Install it, or set the environment variable"
    assert message in run_python("-c", code, returncode=1)
