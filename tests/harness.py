"""Runs one layer forward and backward on the backend in use, and returns NumPy arrays."""

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest
from oracle import relative_error

from keras_isaac import ISAAC, backend, capture_inputs
from keras_isaac.layers.products import product
from keras_isaac.scope import Conditioning

BACKEND = keras.backend.backend()
KERAS_VERSION = tuple(map(int, keras.__version__.split(".")[:2]))
# Keras compiles a step on JAX and TensorFlow, unless `run_eagerly`; on PyTorch it does not. On JAX an eager step takes long,
# since each operation is compiled by itself.
IS_COMPILED = BACKEND == "jax"
EAGER = pytest.param(False, marks=pytest.mark.slow if BACKEND == "jax" else (), id="eager")
MODES = [EAGER] if BACKEND == "torch" else [EAGER, pytest.param(True, id="compiled")]
each_mode = pytest.mark.parametrize("compiled", MODES)


# For what differs little between backends, or takes long where it is compiled.
slow_but_on_torch = pytest.mark.slow if BACKEND != "torch" else lambda test: test
masks_a_stack = pytest.mark.skipif(
    BACKEND == "jax" and KERAS_VERSION < (3, 10), reason="Keras 3.9's recurrent loop on JAX fails with a mask and stacked cells"
)


class Pass(NamedTuple):
    """What one forward and backward pass gave."""

    outputs: np.ndarray
    input_gradient: np.ndarray | None
    gradients: list


def paper_isaac(*args, **options):
    """`ISAAC` as in the paper by default: around SGD, with an absolute damping, on all rows."""
    if len(args) < 3:
        options = {"inner_optimizer": "sgd", **options}
    return ISAAC(*args, **{"relative_damping": False, "max_rows": 1024, **options})


def normal(*shapes, seed=0):
    """Float32 arrays of normally distributed numbers."""
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype("float32") for shape in shapes]


def to_numpy(tensor):
    """Float64 NumPy array of a tensor or variable; sparse gradients dense."""
    return np.asarray(keras.ops.convert_to_numpy(tensor)).astype("float64")


def conditioning(damping, output_damping=None, **options):
    """What an optimizer asks of a layer, by default as in the paper."""
    options = {"relative_damping": False, "preserve_norm": False, "weight_sharing": "expand", "max_rows": None, **options}
    return Conditioning(damping, output_damping, **options, per_replica=False, trains=lambda kernel: True, on_use=lambda: None)


def conditioned_gradient(
    rows, output_gradient, damping, output_damping=None, *, dtype="float32", compiled=IS_COMPILED, **options
):
    """The gradient of a kernel in the product of all `rows` and it, given that of the product, in NumPy."""
    options = {"max_rows": 1024, **options}
    rows, output_gradient = (keras.ops.convert_to_tensor(np.asarray(x, dtype)) for x in (rows, output_gradient))
    dampings = [keras.ops.convert_to_tensor(np.float32(x)) for x in (damping, output_damping) if x is not None]
    kernel = keras.ops.zeros((*rows.shape[:-2], rows.shape[-1], output_gradient.shape[-1]), dtype)
    return to_numpy(_gradient_function(compiled, tuple(options.items()))(kernel, rows, output_gradient, *dampings))


@functools.cache
def _gradient_function(compiled, options):
    """Compiled once for all tests of one shape and these options."""

    def gradient(kernel, rows, output_gradient, *dampings):
        def loss(kernel):
            products = product(rows, kernel, conditioning(*dampings, **dict(options)), None, len(rows.shape) - 2)
            return keras.ops.sum(products * output_gradient)

        return backend.gradients_of(lambda tensors: (loss(*tensors), None), [kernel])[1][0]

    return jit(gradient) if compiled else gradient


def jit(function):
    """Compiles `function` of tensors as Keras would on this backend (PyTorch is eager by default)."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


def run(layer, inputs, cotangent, optimizer=None, compiled=IS_COMPILED):
    """Returns the outputs of `layer` and the gradients of Σ outputs · cotangent, inside a training step.

    With an `optimizer` the pass runs under its `conditioning()`. Integer inputs have no gradient (`None`).
    """
    return step_of(layer, inputs, cotangent, optimizer, compiled)()


def plain_and_conditioned(layer, inputs, cotangent, compiled=IS_COMPILED, damping=0.3, **options):
    """The gradients of the layer, plain and captured. Its outputs and the gradient of its inputs are the plain ones."""
    plain = run(layer, inputs, cotangent, compiled=compiled)
    actual = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=damping, **options), compiled)
    for ours, theirs in ((actual.outputs, plain.outputs), (actual.input_gradient, plain.input_gradient)):
        assert theirs is None or relative_error(ours, theirs) < 1e-6
    return plain.gradients, actual.gradients


def step_of(layer, inputs, cotangent, optimizer=None, compiled=IS_COMPILED):
    """Returns a function without arguments that runs the step of `run`; it is compiled once, whatever the damping is set to."""
    if not layer.built:
        layer.build(inputs.shape)
    if optimizer is not None and not optimizer.built:
        optimizer.build(layer.trainable_variables)
    step = _STEP_OF[BACKEND](layer, inputs, cotangent, optimizer, compiled)

    def in_numpy():
        outputs, input_gradient, gradients = step()
        if input_gradient is not None:
            input_gradient = to_numpy(input_gradient)
        return Pass(to_numpy(outputs), input_gradient, [to_numpy(gradient) for gradient in gradients])

    return in_numpy


def _like(array, tensor):
    return keras.ops.convert_to_tensor(array, keras.backend.standardize_dtype(tensor.dtype))


def _step_of_jax(layer, inputs, cotangent, optimizer, compiled):
    import jax

    is_float = np.issubdtype(inputs.dtype, np.floating)

    def loss(trainable, inputs, fixed_inputs, state, optimizer_variables):
        scope = contextlib.nullcontext() if optimizer is None else optimizer.conditioning(optimizer_variables)
        with scope:
            x = inputs if is_float else fixed_inputs
            outputs, _ = layer.stateless_call(trainable, state, x)
        return keras.ops.sum(outputs * _like(cotangent, outputs)), outputs

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    grad = jax.jit(grad) if compiled else grad
    floats = keras.ops.convert_to_tensor(inputs if is_float else np.zeros(()))

    def step():
        state = [variable.value for variable in layer.non_trainable_variables]
        optimizer_variables = [] if optimizer is None else [variable.value for variable in optimizer.variables]
        trainable = [variable.value for variable in layer.trainable_variables]
        (gradients, input_gradient), outputs = grad(trainable, floats, None if is_float else inputs, state, optimizer_variables)
        return outputs, input_gradient if is_float else None, gradients

    return step


def _step_of_tensorflow(layer, inputs, cotangent, optimizer, compiled):
    import tensorflow as tf

    variables = [variable.value for variable in layer.trainable_variables]

    def step(inputs):
        scope = contextlib.nullcontext() if optimizer is None else optimizer.conditioning()
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            with scope:
                outputs = layer(inputs, training=True)
            loss = tf.reduce_sum(outputs * _like(cotangent, outputs))
        gradients = tape.gradient(loss, [inputs, *variables])
        return outputs, gradients[0], gradients[1:]

    inputs = tf.constant(inputs)
    if compiled:
        # The batch size is unknown to the trace, as in most data pipelines.
        step = tf.function(step, input_signature=[tf.TensorSpec([None, *inputs.shape[1:]], inputs.dtype)])
    return lambda: step(inputs)


def _step_of_torch(layer, inputs, cotangent, optimizer, compiled):
    # By default, the next Keras makes float32 of float64 arrays.
    inputs = keras.ops.convert_to_tensor(inputs, str(inputs.dtype))
    is_float = inputs.is_floating_point()

    def step():
        leaf = inputs.clone().requires_grad_(is_float)
        layer.zero_grad()
        scope = contextlib.nullcontext() if optimizer is None else optimizer.conditioning()
        with scope:
            outputs = layer(leaf, training=True)
        (outputs * _like(cotangent, outputs)).sum().backward()
        gradients = [variable.value.grad for variable in layer.trainable_variables]
        return outputs.detach(), leaf.grad, gradients

    return step


_STEP_OF = {"jax": _step_of_jax, "tensorflow": _step_of_tensorflow, "torch": _step_of_torch}


def start_python(*arguments, cwd=None, **environment):
    """Starts Python in a process of its own, in the folder of the tests by default."""
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    cwd, environment = cwd or Path(__file__).parent, {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment)


def run_python(*arguments, returncode=0, **options):
    """Runs Python as `start_python` does, and returns what it prints."""
    with start_python(*arguments, **options) as process:
        output, errors = process.communicate()
    assert process.returncode == returncode, output + errors
    return output + (errors if returncode else "")


def eager_gradients(compute_loss, variables, scope=None):
    """The loss, computed inside the scope, and its gradients, on TensorFlow and PyTorch (JAX differentiates functions)."""
    scope = scope or contextlib.nullcontext()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape, scope:
            loss = compute_loss()
        return loss, tape.gradient(loss, [variable.value for variable in variables])
    for variable in variables:
        variable.value.grad = None
    with scope:
        loss = compute_loss()
    loss.backward()
    return loss, [variable.value.grad for variable in variables]


def loss_gradients(compute_loss, variables, optimizer=None):
    """The gradients of `compute_loss()`, inside `optimizer.conditioning()` if there is one, compiled as Keras would."""
    if BACKEND == "jax":
        import jax

        def loss(values, optimizer_variables):
            scope = contextlib.nullcontext() if optimizer is None else optimizer.conditioning(optimizer_variables)
            with keras.StatelessScope(list(zip(variables, values, strict=True))), scope:
                return compute_loss()

        state = [] if optimizer is None else [variable.value for variable in optimizer.variables]
        return jax.jit(jax.grad(loss))([variable.value for variable in variables], state)

    def step():
        return eager_gradients(compute_loss, variables, None if optimizer is None else optimizer.conditioning())[1]

    return jit(step)()


def gradients_by(function, inputs):
    """The gradient of a scalar function by its inputs, a tensor or a list, which can be differentiated again."""
    if BACKEND == "jax":
        import jax

        return jax.grad(function)(inputs)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            value = function(inputs)
        return tape.gradient(value, inputs)
    import torch

    inputs = keras.tree.map_structure(lambda x: x if x.requires_grad else x.detach().requires_grad_(), inputs)
    gradients = torch.autograd.grad(function(inputs), keras.tree.flatten(inputs), create_graph=True)
    return keras.tree.pack_sequence_as(inputs, gradients)
