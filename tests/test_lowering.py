"""The captured training step lowers for accelerators from a machine that has none."""

import re

import keras
import numpy as np
import pytest
from harness import BACKEND, paper_isaac, to_numpy
from models import assert_close, assert_differ, mlp, regression, sequence_network, sequences, weights

from keras_isaac import capture_inputs

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="JAX lowers for other platforms")


def image_network():
    """Convolutions of every kind."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, activation="relu", padding="same"),
            keras.layers.DepthwiseConv2D(3),
            keras.layers.SeparableConv2D(4, 2),
            keras.layers.Conv2DTranspose(2, 2),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


NETWORKS = {
    # Few features, and so many rows that their inverse is taken in blocks.
    "dense": (lambda: mlp(width=80), lambda: regression(70)),
    "images": (image_network, lambda: (np.random.default_rng(0).normal(size=(4, 6, 6, 2)).astype("float32"), regression(4)[1])),
    "sequences": (sequence_network, lambda: sequences(4)),
}


def loops_step(model):
    """A step of public parts, as in `examples/custom_loop.py`, and its state."""
    import jax

    def compute_loss(trainable, non_trainable, optimizer_variables, x, y):
        with model.optimizer.conditioning(optimizer_variables):
            outputs, non_trainable = model.stateless_call(trainable, non_trainable, x, training=True)
        return keras.ops.mean(keras.ops.square(outputs - y)), non_trainable

    def step(state, x, y):
        (_, non_trainable), gradients = jax.value_and_grad(compute_loss, has_aux=True)(*state, x, y)
        trainable, optimizer_variables = model.optimizer.stateless_apply(state[2], gradients, state[0])
        return trainable, non_trainable, optimizer_variables

    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
    return step, [[variable.value for variable in group] for group in groups]


def fits_step(model):
    """The step of `fit`, and its state."""

    def step(state, x, y):
        return model.train_step(state, (x, y))[1]

    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables, model.metrics_variables)
    return step, [[variable.value for variable in group] for group in groups]


@pytest.mark.parametrize(
    ("make_step", "network"), [(loops_step, "dense"), (fits_step, "dense"), (fits_step, "images"), (fits_step, "sequences")]
)
def test_the_training_step_lowers_for_accelerators(make_step, network):
    """In XLA's own operations, without a call that a platform might not know; and what is lowered is the step."""
    import jax
    from jax import export

    make, data = NETWORKS[network]
    model, (x, y) = capture_inputs(make()), data()
    model.compile(optimizer=paper_isaac(inner_optimizer="adam", damping=0.1), loss="mse")
    model.train_on_batch(x, y)
    step, state = make_step(model)
    exported = export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(state, x, y)
    module = exported.mlir_module()
    assert re.findall(r"custom_call @\w+", module) == []
    # The elimination is a loop, of which a plain step has none.
    assert "stablehlo.while" in module
    lowered = [to_numpy(value) for value in exported.call(state, x, y)[0]]
    before = weights(model)
    model.train_on_batch(x, y)
    assert_close(lowered, weights(model), 1e-5)
    assert_differ(lowered, before)


def test_layers_that_share_their_input_share_its_inverse():
    """XLA computes the same thing once: one elimination for query, key and value, and one for the output."""
    import jax

    inputs = keras.Input((5, 8))
    model = capture_inputs(keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)))
    model.compile(optimizer=paper_isaac(), loss="mse")
    x, y = np.random.default_rng(0).normal(size=(2, 4, 5, 8)).astype("float32")
    model.train_on_batch(x, y)
    step, state = fits_step(model)
    compiled = jax.jit(step).lower(state, x, y).compile().as_text()
    assert len(re.findall(r" while\(", compiled)) == 2
