"""`optimizer.conditioning()` in custom training loops, as `examples/custom_loop.py` writes them."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from harness import BACKEND, eager_gradients, jit, paper_isaac
from keras.optimizers.schedules import PiecewiseConstantDecay
from models import assert_close, assert_differ, captured, fit, mlp, regression, weights

from keras_isaac import capture_inputs, release_inputs, scope

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import custom_loop


def loop(optimizer, num_steps=5):
    model = capture_inputs(mlp())
    train = getattr(custom_loop, f"train_{BACKEND}")
    losses = train(model, optimizer, keras.losses.MeanSquaredError(), *regression(16), num_steps)
    assert losses[-1] < losses[0]
    return weights(model)


def fitted(optimizer, num_steps=5):
    model = captured(optimizer)
    fit(model, regression(16), epochs=num_steps)
    return weights(model)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: paper_isaac(damping=0.1, momentum=0.9),
        lambda: paper_isaac(damping=0.1, inner_optimizer="adam", learning_rate=0.01),
        lambda: paper_isaac(damping=PiecewiseConstantDecay([2], [0.05, 1e8])),
    ],
    ids=["momentum", "adam", "damping schedule"],
)
def test_the_loop_does_what_fit_does(optimizer):
    assert_close(loop(optimizer()), fitted(optimizer()), 1e-5)


@pytest.mark.skipif(BACKEND != "jax", reason="state is explicit on JAX alone")
def test_error_jax_without_the_optimizer_variables():
    optimizer = paper_isaac()
    optimizer.build(mlp().trainable_variables)
    message = r"Write `with optimizer.conditioning\(optimizer_variables\):` with the same list of 3 tensors"
    for variables, received in (((), "None"), (([],), "a list of length 0")):
        with (
            pytest.raises(ValueError, match=f"{message}.* Received: optimizer_variables={received}"),
            optimizer.conditioning(*variables),
        ):
            pass


def test_the_scope_is_closed_after_an_exception():
    optimizer = paper_isaac()
    arguments = [[v.value for v in optimizer.variables]] if BACKEND == "jax" else []

    def step():
        with optimizer.conditioning(*arguments):
            assert scope.open_scopes()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        step()
    assert not scope.open_scopes()


def test_the_inner_of_two_scopes_goes_first():
    model = mlp()
    outer, inner = paper_isaac(damping=1.0), paper_isaac(damping=2.0)
    outer.build(model.trainable_variables)
    inner.build(model.layers[1].trainable_variables)

    def conditioning(optimizer):
        return optimizer.conditioning(*([[v.value for v in optimizer.variables]] if BACKEND == "jax" else []))

    with conditioning(outer), conditioning(inner):
        dampings = [float(scope.conditioning_of(layer.kernel, scope.open_scopes()).damping) for layer in model.layers]
    assert dampings == [1.0, 2.0]


@pytest.mark.skipif(BACKEND == "jax", reason="JAX reads the damping from explicit state")
def test_a_loop_conditions_what_is_captured_alone_and_what_any_model_chooses():
    layer, inputs = keras.layers.Dense(3), keras.Input((6,))
    models = [keras.Model(inputs, layer(inputs)) for _ in range(2)]
    optimizer = paper_isaac(damping=0.1)
    optimizer.build(layer.trainable_variables)

    def is_conditioned():
        used = []
        conditioning = dataclasses.replace(optimizer.conditioning_of_step(), on_use=lambda: used.append(1))
        with scope.open_scope(conditioning):
            models[0](np.ones((2, 6), "float32"))
        return bool(used)

    steps = [
        (lambda: None, False),
        (lambda: capture_inputs(models[0]), True),
        (lambda: capture_inputs(models[1], exclude=layer), True),
        (lambda: release_inputs(models[0]), False),
        (lambda: capture_inputs(layer), True),
        (lambda: release_inputs(models[1]), True),
        (lambda: release_inputs(layer), False),
        (lambda: capture_inputs(models[1]), True),
    ]
    for change, expected in steps:
        change()
        assert is_conditioned() == expected


class Loop:
    """A custom step for each backend: compiled on JAX and TensorFlow, eager on PyTorch."""

    def __init__(self, optimizer):
        self.model, self.optimizer = capture_inputs(mlp()), optimizer
        optimizer.build(self.model.trainable_variables)
        self.inputs, self.targets = (keras.ops.convert_to_tensor(array) for array in regression(16))

    def loss(self, outputs):
        return keras.ops.mean(keras.ops.square(outputs - self.targets))

    def step(self, scope):
        """One step, in the scope that `scope` returns when it is given the optimizer's variables."""
        (self.step_jax if BACKEND == "jax" else self.step_of_tape)(scope)

    def body(self, scope):
        """A step on JAX, of its state."""
        import jax

        def loss(trainable, optimizer_variables):
            with scope(optimizer_variables):
                return self.loss(self.model.stateless_call(trainable, [], self.inputs)[0])

        def body(state, _):
            trainable, optimizer_variables = state
            gradients = jax.grad(loss)(trainable, optimizer_variables)
            return self.optimizer.stateless_apply(optimizer_variables, gradients, trainable), None

        return body

    @property
    def state(self):
        return [v.value for v in self.model.trainable_variables], [v.value for v in self.optimizer.variables]

    def step_jax(self, scope):
        import jax

        jax.jit(self.body(scope))(self.state, None)

    def step_of_tape(self, scope):
        variables = self.model.trainable_variables

        def step():
            _, gradients = eager_gradients(lambda: self.loss(self.model(self.inputs)), variables, scope(None))
            self.optimizer.apply(gradients, variables)

        jit(step)()


def forgotten(optimizer_variables):
    """Stands where `conditioning()` should."""
    return contextlib.nullcontext()


@pytest.mark.parametrize("wrap", [lambda isaac: isaac, keras.optimizers.LossScaleOptimizer], ids=["isaac", "loss scale"])
def test_error_in_each_step_that_forgets_the_scope(wrap):
    isaac = paper_isaac()
    loop = Loop(wrap(isaac))

    def scope(optimizer_variables):
        return isaac.conditioning(optimizer_variables and optimizer_variables[-len(isaac.variables) :])

    for _ in range(2):
        with pytest.raises(ValueError, match=r"compute the loss inside `with optimizer.conditioning\(\):`"):
            loop.step(forgotten)
        loop.step(scope)
        loop.step(scope)
    # To look at the outputs in between is no step.
    loop.model(loop.inputs)
    loop.model(loop.inputs, training=False)
    loop.step(scope)


@pytest.mark.skipif(BACKEND != "jax", reason="`scan` is JAX's")
def test_error_of_a_scan_that_forgets_the_scope():
    import jax

    optimizer = paper_isaac()
    loop = Loop(optimizer)
    (trainable, _), _ = jax.lax.scan(loop.body(optimizer.conditioning), loop.state, length=3)
    assert_differ([np.asarray(value) for value in trainable], weights(loop.model))
    with pytest.raises(ValueError, match="No captured layer took part in this step"):
        jax.lax.scan(loop.body(forgotten), loop.state, length=3)


@pytest.mark.skipif(BACKEND == "torch", reason="an eager step runs Python as a whole")
def test_gradients_that_were_compiled_apart_are_applied_again_and_again():
    """Python runs the forward pass once, and that raises no error."""
    optimizer = paper_isaac(damping=0.1)
    loop = Loop(optimizer)
    variables = loop.model.trainable_variables
    if BACKEND == "jax":
        import jax

        def loss(trainable, optimizer_variables):
            with optimizer.conditioning(optimizer_variables):
                return loop.loss(loop.model.stateless_call(trainable, [], loop.inputs)[0])

        gradients = jax.jit(jax.grad(loss))
    else:

        @jit
        def gradients(_, __):
            return eager_gradients(lambda: loop.loss(loop.model(loop.inputs)), variables, optimizer.conditioning())[1]

    losses = []
    for _ in range(4):
        optimizer.apply(gradients(*loop.state), variables)
        losses.append(float(loop.loss(loop.model(loop.inputs))))
    assert losses == sorted(losses, reverse=True)


def test_several_forward_passes_a_step_and_several_applies_a_pass():
    optimizer = paper_isaac()
    loop = Loop(optimizer)
    variables, before = loop.model.trainable_variables, weights(loop.model)
    for _ in range(2):
        with optimizer.conditioning([variable.value for variable in optimizer.variables]):
            loop.model(loop.inputs)
            loop.model(loop.inputs)
        for variable in variables:
            optimizer.apply([keras.ops.ones(variable.shape)], [variable])
    # Each variable has moved twice, by the learning rate of 0.1.
    assert_close(weights(loop.model), [weight - 0.2 for weight in before], 1e-6)
