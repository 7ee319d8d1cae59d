"""`optimizer.conditioning()` in training loops of one's own, as `examples/custom_loop.py` writes them."""

import sys
from pathlib import Path

import keras
import pytest
from harness import BACKEND, paper_isaac
from keras.optimizers.schedules import PiecewiseConstantDecay
from models import assert_close, assert_differ, fit, mlp, regression, weights

from keras_isaac import capture_inputs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import custom_loop


def loop(optimizer, num_steps=5):
    model = capture_inputs(mlp())
    train = getattr(custom_loop, f"train_{BACKEND}")
    losses = train(model, optimizer, keras.losses.MeanSquaredError(), *regression(16), num_steps)
    assert losses[-1] < losses[0]
    return weights(model)


def fitted(optimizer, num_steps=5):
    model = capture_inputs(mlp())
    model.compile(optimizer=optimizer, loss="mse")
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


def test_the_scheduled_damping_moves_in_the_compiled_loop():
    assert_differ(loop(paper_isaac(damping=PiecewiseConstantDecay([2], [0.05, 1e8]))), loop(paper_isaac(damping=0.05)))


def test_error_without_the_scope():
    model = capture_inputs(mlp())
    optimizer = paper_isaac()
    optimizer.build(model.trainable_variables)
    gradients = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
    with pytest.raises(ValueError, match=r"compute the loss inside `with optimizer.conditioning\(\):`"):
        optimizer.apply(gradients, model.trainable_variables)


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
    from keras_isaac import scope

    optimizer = paper_isaac()
    arguments = [[v.value for v in optimizer.variables]] if BACKEND == "jax" else []

    def step():
        with optimizer.conditioning(*arguments):
            assert scope.is_open()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        step()
    assert not scope.is_open()


def test_the_inner_of_two_scopes_goes_first():
    from keras_isaac import scope

    model = mlp()
    outer, inner = paper_isaac(damping=1.0), paper_isaac(damping=2.0)
    outer.build(model.trainable_variables)
    inner.build(model.layers[1].trainable_variables)

    def conditioning(optimizer):
        return optimizer.conditioning(*([[v.value for v in optimizer.variables]] if BACKEND == "jax" else []))

    with conditioning(outer), conditioning(inner):
        dampings = [float(scope.conditioning_of(layer.kernel).damping) for layer in model.layers]
    assert dampings == [1.0, 2.0]
