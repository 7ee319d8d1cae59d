"""The captured training step lowers for accelerators from a machine that has none."""

import re

import keras
import numpy as np
import pytest
from harness import BACKEND, paper_isaac, to_numpy
from models import assert_close, assert_differ, captured, mlp, regression, sequence_network, sequences, weights

from keras_isaac import ISAAC, capture_inputs

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


def products_by_precision(module):
    """How many products of a lowered module ask for full precision, and how many leave it to the platform."""
    products = [line for line in module.splitlines() if "stablehlo.dot_general" in line or "stablehlo.convolution" in line]
    highest = sum("HIGHEST" in line for line in products)
    return highest, len(products) - highest


@pytest.mark.often("cpu-loops_step-dense", "cuda-fits_step-images", "tpu-fits_step-sequences")
@pytest.mark.parametrize(
    ("make_step", "network"), [(loops_step, "dense"), (fits_step, "dense"), (fits_step, "images"), (fits_step, "sequences")]
)
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_training_step_lowers_for_accelerators(make_step, network, platform):
    """By elimination in a loop on a CPU, by Cholesky elsewhere; and what the conditioner multiplies is in full precision."""
    import jax
    from jax import export

    make, data = NETWORKS[network]
    x, y = data()
    modules = []
    for model, optimizer in (
        (make(), keras.optimizers.Adam()),
        (capture_inputs(make()), paper_isaac(inner_optimizer="adam", damping=0.1)),
    ):
        model.compile(optimizer=optimizer, loss="mse")
        if make_step is fits_step or isinstance(optimizer, ISAAC):
            model.train_on_batch(x, y)
            step, state = make_step(model)
            exported = export.export(jax.jit(step), platforms=[platform])(state, x, y)
            modules.append(exported.mlir_module())
    calls = set(re.findall(r"custom_call @(\w+)", modules[-1]))
    if platform == "cpu":
        # The elimination is a loop, of which a plain step has none.
        assert calls == set()
        assert "stablehlo.while" in modules[-1]
        lowered = [to_numpy(value) for value in exported.call(state, x, y)[0]]
        before = weights(model)
        model.train_on_batch(x, y)
        assert_close(lowered, weights(model), 1e-5)
        assert_differ(lowered, before)
    else:
        assert "stablehlo.while" not in modules[-1]
        assert len(calls) <= 2
        assert all(re.fullmatch("cusolver_potrf_ffi|cublas_trsm_ffi|Cholesky", call) for call in calls)
    if len(modules) == 2 and platform != "cpu":
        highest, others = zip(*map(products_by_precision, modules), strict=True)
        assert highest[0] == 0
        assert highest[1] > 0
        # The layer's own products are left as they are, and only those.
        assert others[0] == others[1]


def test_layers_that_share_their_input_share_its_inverse():
    """XLA computes the same thing once: one elimination for query, key and value, and one for the output."""
    import jax

    inputs = keras.Input((5, 8))
    model = captured(paper_isaac(), keras.Model(inputs, keras.layers.MultiHeadAttention(2, 4)(inputs, inputs)))
    x, y = np.random.default_rng(0).normal(size=(2, 4, 5, 8)).astype("float32")
    model.train_on_batch(x, y)
    step, state = fits_step(model)
    compiled = jax.jit(step).lower(state, x, y).compile().as_text()
    assert len(re.findall(r" while\(", compiled)) == 2
