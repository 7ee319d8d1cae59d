"""Losses that hold derivatives by the inputs: every part of a kernel's gradient is conditioned, once, under any transform."""

import numpy as np
import oracle
import pytest
from cases import OFTEN, PRODUCTS, RECURRENT, Case, assert_conditioned, data, each_case
from harness import BACKEND, gradients_by, loss_gradients, normal, paper_isaac, to_numpy
from keras import layers, ops
from oracle import relative_error
from readings import dense

from keras_isaac import capture_inputs

# PyTorch's own transforms.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
DAMPING = 0.3
FLOAT_CASES = [case for case in PRODUCTS if case.vocabulary is None]
if BACKEND == "tensorflow":
    # It has no second derivative of a convolution with the channels first on a CPU, plain or captured.
    FLOAT_CASES = [case for case in FLOAT_CASES if case.id != "conv2d-channels-first"]


def gradients(layer, inputs, loss, optimizer=None):
    """The gradients of `loss(call, inputs)` by the trainable variables, `call` being the layer's."""
    inputs = ops.convert_to_tensor(inputs)
    return [to_numpy(each) for each in loss_gradients(lambda: loss(layer, inputs), layer.trainable_variables, optimizer)]


def forward_jax(function, inputs, direction):
    import jax

    return jax.jvp(function, (inputs,), (direction,))


def forward_tensorflow(function, inputs, direction):
    import tensorflow as tf

    with tf.autodiff.ForwardAccumulator(inputs, direction) as accumulator:
        outputs = function(inputs)
    return outputs, accumulator.jvp(outputs)


def forward_torch(function, inputs, direction):
    import torch

    return torch.func.jvp(function, (inputs,), (direction,))


def dual_torch(function, inputs, direction):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(inputs, direction)))


FORWARD = {"jax": [forward_jax], "tensorflow": [forward_tensorflow], "torch": [forward_torch, dual_torch]}[BACKEND]


def reverse_loss(cotangent):
    """Of the outputs and of their first and second derivatives by the inputs."""
    cotangent = ops.convert_to_tensor(cotangent)

    def loss(call, inputs):
        def score(x):
            return ops.sum(cotangent * ops.square(call(x)))

        def slope(x):
            return ops.sum(gradients_by(score, x) * ops.sin(x))

        first, second = gradients_by(score, inputs), gradients_by(slope, inputs)
        return ops.sum(cotangent * call(inputs)) + ops.sum(ops.square(first)) + ops.sum(ops.square(second))

    return loss


def check(layer, inputs, loss, reading, **options):
    """That the gradients of the kernels are the oracle's conditioner, applied to the whole of the plain ones."""
    plain = gradients(layer, inputs, loss)
    optimizer = paper_isaac(damping=DAMPING, **options)
    optimizer.build(layer.trainable_variables)
    conditioned = gradients(capture_inputs(layer), inputs, loss, optimizer)
    assert_conditioned(layer, reading, plain, conditioned, DAMPING, 1e-4, **options)
    assert all(np.sum(ours * theirs) > 0 for ours, theirs in zip(conditioned, plain, strict=True))


@each_case([*FLOAT_CASES, *(case for case in RECURRENT if case.id == "lstm")])
@pytest.mark.often(*OFTEN)
def test_every_part_of_a_kernels_gradient_is_conditioned_once(case):
    layer, inputs, cotangent = data(case)
    check(layer, inputs, reverse_loss(cotangent), case.read(layer, inputs))


SOME = [case for case in FLOAT_CASES if case.id in ("dense-fewer-rows", "dense-more-rows", "einsum-groups", "conv2d-groups")]


@pytest.mark.parametrize("num", [4, 11], ids=["fewer-rows", "more-rows"])
def test_a_norm_is_that_of_the_whole_gradient(num):
    layer, inputs, _ = data(Case("", lambda: layers.Dense(5, use_bias=False), (num, 7), dense))
    slope = ops.convert_to_tensor(np.sin(inputs))

    def loss(call, x):
        # In one call of the layer, so that all of the gradient passes one gate.
        return ops.sum(ops.square(gradients_by(lambda x: ops.sum(ops.tanh(call(x))), x) * slope))

    check(layer, inputs, loss, dense(layer, inputs), preserve_norm=True)


@each_case(SOME)
@pytest.mark.parametrize("forward", FORWARD)
def test_forward_mode_trains_as_the_plain_layer(case, forward):
    layer, inputs, cotangent = data(case)
    cotangent = ops.convert_to_tensor(cotangent)

    def loss(call, x):
        outputs, tangent = forward(call, x, ops.sin(x))
        return ops.sum(cotangent * outputs) + ops.sum(ops.square(tangent))

    check(layer, inputs, loss, case.read(layer, inputs))


@pytest.mark.skipif(BACKEND == "tensorflow", reason="its accumulators do not nest over a tape")
@each_case(SOME)
def test_forward_mode_over_forward_and_reverse_mode(case):
    layer, inputs, cotangent = data(case)
    cotangent = ops.convert_to_tensor(cotangent)

    def loss(call, x):
        def tangent(x):
            return FORWARD[0](lambda x: ops.sum(cotangent * ops.tanh(call(x))), x, ops.ones_like(x))[1]

        _, second = FORWARD[0](tangent, x, ops.ones_like(x))
        return ops.square(second)

    check(layer, inputs, loss, case.read(layer, inputs))


@pytest.mark.parametrize("rows", [2, 11], ids=["fewer-rows", "more-rows"])
@pytest.mark.parametrize("options", [{}, {"preserve_norm": True}], ids=["", "norm"])
def test_a_mapped_call_is_conditioned_on_its_own_rows(rows, options):
    layer, _, _ = data(Case("", lambda: layers.Dense(5, use_bias=False), (rows, 7), dense))
    inputs, cotangent = normal((3, rows, 7), (3, rows, 5), seed=1)
    optimizer = paper_isaac(damping=DAMPING, **options)
    optimizer.build(layer.trainable_variables)
    capture_inputs(layer)
    weights = ops.convert_to_tensor(cotangent)

    def loss(call, x):
        return ops.sum(ops.vectorized_map(call, x) * weights)

    if BACKEND == "tensorflow" and options:
        with pytest.raises(ValueError, match=r"`tf.vectorized_map` keeps no custom gradient"):
            gradients(layer, inputs, loss, optimizer)
        return
    plain = [x.T.astype("float64") @ y for x, y in zip(inputs, cotangent, strict=True)]
    conditioned = [oracle.condition(x, each, DAMPING) for x, each in zip(inputs, plain, strict=True)]
    if "preserve_norm" in options:
        # Each mapped call keeps its own.
        conditioned = [y * np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(plain, conditioned, strict=True)]
    expected = sum(conditioned)
    assert relative_error(gradients(layer, inputs, loss, optimizer)[0], expected) < 5e-5


def transforms():
    """Each of the backend's transforms of a scalar function of the inputs, as a function that returns a tensor."""
    if BACKEND == "jax":
        import jax

        return {
            "grad": jax.grad,
            "hessian": jax.hessian,
            "jacrev": lambda f: jax.jacrev(jax.grad(f)),
            "jacfwd": lambda f: jax.jacfwd(jax.jacfwd(f)),
            "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
            "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(x[:, None]),
            "hvp": lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,))[1],
        }
    if BACKEND == "torch":
        from torch import func

        return {
            "grad": func.grad,
            "hessian": func.hessian,
            "jacrev": lambda f: func.jacrev(func.grad(f)),
            "jacfwd": lambda f: func.jacfwd(func.jacfwd(f)),
            "vjp": lambda f: lambda x: func.vjp(f, x)[1](ops.ones(()))[0],
            "vmap of grad": lambda f: lambda x: func.vmap(func.grad(f))(x[:, None]),
            "hvp": lambda f: lambda x: func.jvp(func.grad(f), (x,), (x,))[1],
        }
    import tensorflow as tf

    def jacobian(f):
        def of(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                first = gradients_by(f, x)
            return tape.jacobian(first, x)

        return of

    return {"jacobian": jacobian}


@pytest.mark.often("more-rows-*", "fewer-rows-hessian", "fewer-rows-jacobian")
@pytest.mark.parametrize("transform", transforms())
@pytest.mark.parametrize("num", [3, 9], ids=["fewer-rows", "more-rows"])
def test_a_transform_gives_the_plain_derivative_and_a_conditioned_gradient(transform, num):
    layer, inputs, _ = data(Case("", lambda: layers.Dense(4, use_bias=False), (num, 7), dense))
    of = transforms()[transform]

    def loss(call, x):
        return ops.sum(ops.square(of(lambda x: ops.sum(ops.tanh(call(x))))(x)))

    if transform == "vmap of grad":
        # Each row is a call of its own.
        expected = sum(oracle.condition(row, gradients(layer, row, loss)[0], DAMPING) for row in np.split(inputs, num))
        optimizer = paper_isaac(damping=DAMPING)
        optimizer.build(layer.trainable_variables)
        assert relative_error(gradients(capture_inputs(layer), inputs, loss, optimizer)[0], expected) < 1e-4
    else:
        check(layer, inputs, loss, dense(layer, inputs))
