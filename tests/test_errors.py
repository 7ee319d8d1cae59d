"""The common slips of a newcomer: each is an error that says what to write instead."""

import os
import re
import subprocess
import sys

import keras
import pytest
from harness import BACKEND
from models import fit, mlp, regression

from keras_isaac import ISAAC, capture_inputs


def train(optimizer, capture=capture_inputs):
    model = capture(mlp())
    model.compile(optimizer=optimizer, loss="mse")
    fit(model, regression(16))


SLIPS = {
    "capture-forgotten": (lambda: train(ISAAC(), lambda model: model), "Write `model = capture_inputs(model)` (from"),
    "inner-optimizer-first": (lambda: ISAAC("adam"), "write `ISAAC(inner_optimizer='adam')`. Received: learning_rate='adam'"),
    "inner-instance-first": (lambda: ISAAC(keras.optimizers.Adam()), "`ISAAC(inner_optimizer=keras.optimizers.Adam(...))`"),
    "unknown-argument": (
        lambda: ISAAC(lr=0.1),
        "to the inner optimizer, and AdamW says: Argument(s) not recognized: {'lr': 0.1}",
    ),
    "argument-of-another": (lambda: ISAAC(momentum=0.9), "Another takes its place by name: `ISAAC(inner_optimizer='sgd')`"),
    "no-such-optimizer": (
        lambda: ISAAC(inner_optimizer="adm"),
        "its class or an instance. Did you mean 'adam' or 'nadam' or 'adamw'? Received: inner_optimizer='adm'",
    ),
    "no-optimizer": (lambda: ISAAC(inner_optimizer=None), "`inner_optimizer` must be the name of a Keras optimizer"),
    "damping-zero": (lambda: ISAAC(damping=0), "`damping` must be a finite number above 0 or a `keras.optimizers.schedules"),
    "damping-word": (lambda: ISAAC(damping="auto"), "Received: damping='auto'"),
    "layers-for-a-model": (lambda: capture_inputs(mlp().layers), "takes a `keras.Model`, a `keras.Layer` or, as a decorator"),
    "optimizer-for-a-model": (lambda: capture_inputs(ISAAC()), "(of type ISAAC)"),
    "name-for-a-path": (
        lambda: capture_inputs(mlp(), "head"),
        "whole `layer.path`. The nearest: 'sequential/head', 'sequential/hidden'. Received: include='head'",
    ),
    "glob-for-a-path": (
        lambda: capture_inputs(mlp(), "*head"),
        "any characters are `.*` and not `*`. Received: include='*head'",
    ),
    "class-for-a-path": (lambda: capture_inputs(mlp(), keras.layers.Dense), "`include` takes layers and regular expressions"),
    "unsupported-layer": (
        lambda: capture_inputs(keras.layers.LayerNormalization()),
        "There is no conditioned form of LayerNormalization layer 'layer_normalization'. Supported:",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_an_error_that_helps(slip):
    commit, message = SLIPS[slip]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        commit()


def test_capturing_after_a_fit_that_failed():
    """On JAX, Keras loses the weights, and the error says so."""
    model = mlp()
    model.compile(optimizer=ISAAC(), loss="mse")
    message = "build the model again first" if BACKEND == "jax" else "no captured layer took part"
    with pytest.raises(ValueError, match=message):
        fit(model, regression(16))
    if BACKEND == "jax":
        model = mlp()
        model.compile(optimizer=ISAAC(), loss="mse")
    fit(capture_inputs(model), regression(16))


def test_a_missing_backend_says_what_to_set():
    code = f"import sys; sys.modules['{BACKEND}'] = None; import keras_isaac"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert result.returncode == 1
    assert f"Keras is to run on {BACKEND}, which is not installed. Install it, or set the environment variable" in result.stderr
