"""Captured layers in control flow, in functions that the user traces, and in recomputation."""

import keras
import numpy as np
import pytest
from harness import BACKEND, paper_isaac, to_numpy
from keras import ops
from oracle import relative_error

from keras_isaac import capture_inputs

FLOWS = {
    "cond": (
        lambda layer, x: ops.cond(ops.mean(x) < 9.0, lambda: x + layer(x), lambda: x),
        lambda layer, x: x + layer(x),
    ),
    "switch": (
        lambda layer, x: ops.switch(ops.cast(ops.mean(x) < 9.0, "int32"), [lambda x: x, lambda x: x + layer(x)], x),
        lambda layer, x: x + layer(x),
    ),
    "while_loop": (
        lambda layer, x: ops.while_loop(lambda i, x: i < 1, lambda i, x: (i + 1, layer(x)), (0, x), maximum_iterations=1)[1],
        lambda layer, x: layer(x),
    ),
    "scan": (
        lambda layer, x: ops.scan(lambda state, _: (layer(state), state), x, ops.zeros(1))[0],
        lambda layer, x: layer(x),
    ),
}
KINDS = {
    "dense": (lambda: keras.layers.Dense(4, activation="tanh"), (6, 4)),
    "lora": (lambda: keras.layers.Dense(4, activation="tanh"), (6, 4)),
    "convolution": (lambda: keras.layers.Conv2D(4, 3, padding="same"), (6, 3, 3, 4)),
}


class InFlow(keras.layers.Layer):
    """Calls a layer inside a function."""

    def __init__(self, layer, flow):
        super().__init__()
        self.layer, self.flow = layer, flow

    def build(self, input_shape):
        self.layer.build(input_shape)

    def call(self, inputs):
        return self.flow(self.layer, inputs)


# JAX takes no gradient of a `while_loop`.
@pytest.mark.parametrize("flow", [each for each in FLOWS if (BACKEND, each) != ("jax", "while_loop")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.often("dense-*", "lora-cond")
def test_a_layer_in_control_flow_is_conditioned_as_outside_of_it(kind, flow):
    make_layer, shape = KINDS[kind]
    random = np.random.default_rng(0)
    inputs, targets = (random.normal(size=shape).astype("float32") for _ in range(2))

    def step(function):
        keras.utils.set_random_seed(0)
        layer = make_layer()
        model = keras.Sequential([keras.Input(shape[1:]), keras.layers.Dense(4), InFlow(layer, function)])
        if kind == "lora":
            layer.enable_lora(2)
        capture_inputs(model).compile(paper_isaac(0.1, damping=0.1), loss="mse", jit_compile=BACKEND == "jax")
        model.train_on_batch(inputs, targets)
        return [to_numpy(weight) for weight in model.trainable_variables]

    for ours, theirs in zip(*map(step, FLOWS[flow]), strict=True):
        assert relative_error(ours, theirs) < 1e-6
