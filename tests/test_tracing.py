"""Captured layers in control flow, in functions that the user traces, and in recomputation."""

import contextlib

import keras
import numpy as np
import pytest
from harness import BACKEND, eager_gradients, loss_gradients, normal, paper_isaac, to_numpy
from keras import ops
from models import assert_close, weights

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
    inputs, targets = normal(shape, shape)

    def step(function):
        keras.utils.set_random_seed(0)
        layer = make_layer()
        model = keras.Sequential([keras.Input(shape[1:]), keras.layers.Dense(4), InFlow(layer, function)])
        if kind == "lora":
            layer.enable_lora(2)
        capture_inputs(model).compile(paper_isaac(0.1, damping=0.1), loss="mse", jit_compile=BACKEND == "jax")
        model.train_on_batch(inputs, targets)
        return weights(model)

    assert_close(*map(step, FLOWS[flow]))


def gradients_of_a_loop(run_block, is_inside):
    """Returns the gradients of a loop in which a block runs by `run_block`, taken inside of the scope or after it."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)]
    for layer, size in zip(layers, (6, 8, 8), strict=True):
        layer.build((None, size))
        capture_inputs(layer)
    optimizer = paper_isaac(damping=0.05)
    variables = [variable for layer in layers for variable in layer.trainable_variables]
    optimizer.build(variables)
    inputs = ops.convert_to_tensor(normal((16, 6))[0])

    def loss(inputs):
        return ops.mean(layers[2](run_block(lambda x: layers[1](layers[0](x)), inputs)) ** 2)

    with optimizer.conditioning() if is_inside else contextlib.nullcontext():
        scope = None if is_inside else optimizer.conditioning()
        return [to_numpy(gradient) for gradient in eager_gradients(lambda: loss(inputs), variables, scope)[1]]


def plainly(block, inputs):
    return block(inputs)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="`tf.recompute_grad`")
@pytest.mark.parametrize("is_inside", [True, False])
def test_recomputation_by_tensorflow_is_conditioned(is_inside):
    import tensorflow as tf

    recomputed = gradients_of_a_loop(lambda block, inputs: tf.recompute_grad(block)(inputs), is_inside)
    assert_close(recomputed, gradients_of_a_loop(plainly, True), 0)


@pytest.mark.skipif(BACKEND != "torch", reason="`torch.utils.checkpoint`")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_by_torch_is_conditioned_inside_of_the_scope_and_an_error_after_it(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    def run_block(block, inputs):
        return checkpoint(block, inputs.requires_grad_(), use_reentrant=use_reentrant)

    assert_close(gradients_of_a_loop(run_block, True), gradients_of_a_loop(plainly, True), 0)
    with pytest.raises(ValueError, match=r"Call `loss.backward\(\)` inside `with optimizer.conditioning\(\):`"):
        gradients_of_a_loop(run_block, False)


@pytest.mark.skipif(BACKEND != "jax", reason="`jax.jit` and `jax.checkpoint` keep traces by function")
@pytest.mark.parametrize("transform", ["jit", "checkpoint"])
@pytest.mark.parametrize("is_traced_outside_first", [True, False])
def test_a_forward_pass_that_the_user_traces_is_conditioned_inside_of_the_scope_alone(transform, is_traced_outside_first):
    import jax

    inputs = normal((16, 6))[0]

    def gradients(transform):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)])
        capture_inputs(model)
        optimizer, variables = paper_isaac(damping=0.05), model.trainable_variables
        optimizer.build(variables)
        forward = transform(lambda weights: model.stateless_call(weights, [], inputs, training=True)[0])

        def loss():
            return (forward([variable.value for variable in variables]) ** 2).mean()

        scopes = [None, optimizer] if is_traced_outside_first else [optimizer, None]
        return [list(map(to_numpy, loss_gradients(loss, variables, scope))) for scope in scopes]

    for actual, expected in zip(gradients(getattr(jax, transform)), gradients(lambda function: function), strict=True):
        assert_close(actual, expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="`tf.function` on `call`")
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("predicts_first", [False, True])
@pytest.mark.parametrize("kind", ["layer", "model"])
def test_a_call_that_is_a_tf_function_is_conditioned_as_any_other(kind, predicts_first, run_eagerly):
    import tensorflow as tf

    def train(decorate):
        base = {"layer": keras.layers.Layer, "model": keras.Model}[kind]

        class Block(base):
            def __init__(self):
                super().__init__()
                self.first, self.second = keras.layers.Dense(6, activation="tanh"), keras.layers.Dense(2)

            def build(self, input_shape):
                self.first.build(input_shape)
                self.second.build(input_shape)
                self.built = True

            @decorate
            def call(self, inputs):
                hidden = self.first(inputs)
                return self.second(hidden)

        keras.utils.set_random_seed(0)
        model = Block() if kind == "model" else keras.Sequential([keras.Input((6,)), Block()])
        model.build((None, 6))
        capture_inputs(model).compile(paper_isaac(0.1, damping=0.1), loss="mse", run_eagerly=run_eagerly)
        inputs = normal((16, 6))[0]
        if predicts_first:
            model.predict(inputs, verbose=0)
        model.train_on_batch(inputs, inputs[:, :2])
        model.evaluate(inputs, inputs[:, :2], verbose=0)
        model.train_on_batch(inputs, inputs[:, :2])
        return weights(model)

    assert_close(train(tf.function), train(lambda function: function))


@pytest.mark.skipif(BACKEND != "jax", reason="`jax.shard_map`")
@pytest.mark.parametrize("options", [{}, {"preserve_norm": True}], ids=["as it comes", "preserve_norm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.often("dense-as it comes", "lora-preserve_norm")
def test_a_step_in_shard_map_with_checked_axes_is_conditioned(kind, options):
    import jax
    from jax.sharding import Mesh, PartitionSpec

    make_layer, shape = KINDS[kind]
    layer = make_layer()
    layer.build(shape)
    if kind == "lora":
        layer.enable_lora(2)
    capture_inputs(layer)
    optimizer = paper_isaac(damping=0.1, **options)
    optimizer.build(layer.trainable_variables)
    weights, state, optimizer_variables = (
        [variable.value for variable in variables]
        for variables in (layer.trainable_variables, layer.non_trainable_variables, optimizer.variables)
    )
    inputs = normal(shape)[0]

    def gradients(weights, state, optimizer_variables, inputs):
        def loss(weights):
            with optimizer.conditioning(optimizer_variables):
                return ops.sum(layer.stateless_call(weights, state, inputs)[0] ** 2)

        return jax.grad(loss)(weights)

    # One device is enough: the types of values that differ between devices are checked all the same.
    everywhere, divided = PartitionSpec(), PartitionSpec("batch")
    sharded = jax.shard_map(
        gradients,
        mesh=Mesh(np.array(jax.devices()[:1]), ("batch",)),
        in_specs=(everywhere, everywhere, everywhere, divided),
        out_specs=everywhere,
        check_vma=True,
    )
    arguments = weights, state, optimizer_variables, inputs
    ours, theirs = (list(map(to_numpy, jax.jit(function)(*arguments))) for function in (sharded, gradients))
    assert_close(ours, theirs)
