"""What `keras_hooks.py` assumes of Keras, an assumption a test: one that fails says what a new Keras does otherwise."""

import keras
import numpy as np
import pytest
from harness import BACKEND, to_numpy
from models import COPIES, assert_close, fit, mlp, regression, weights

from keras_isaac import ISAAC, keras_hooks

IS_NNX = BACKEND == "jax" and getattr(keras.config, "is_nnx_enabled", bool)()


def replace(thing, name, calls):
    """Notes the arguments of a method of this instance, and calls it."""
    plain = getattr(thing, name)

    def method(*args, **kwargs):
        calls.append((args, kwargs))
        return plain(*args, **kwargs)

    setattr(thing, name, method)


def train(model, how):
    if how == "fit":
        fit(model, regression(16))
    else:
        model.train_on_batch(*regression(16))


@pytest.mark.skipif(IS_NNX, reason="NNX runs the `train_step` of the class")
@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_training_runs_the_train_step_of_the_instance(how):
    model, calls = mlp(), []
    replace(model, "train_step", calls)
    model.compile(optimizer="sgd", loss="mse")
    train(model, how)
    assert calls


@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_training_makes_its_step_once(how):
    model, calls = mlp(), []
    replace(model, "make_train_function", calls)
    model.compile(optimizer="sgd", loss="mse")
    assert model.train_function is None
    train(model, how)
    assert calls
    made = model.train_function
    train(model, how)
    assert model.train_function is made
    model.make_train_function(force=True)
    assert model.train_function is not made
    model.compile(optimizer="sgd", loss="mse")
    assert model.train_function is None


@pytest.mark.skipif(BACKEND != "jax" or IS_NNX, reason="state is explicit on JAX alone")
def test_a_jax_step_is_given_the_optimizer_variables_third():
    model, calls = mlp(), []
    replace(model, "train_step", calls)
    model.compile(optimizer="adam", loss="mse", run_eagerly=True)
    model.train_on_batch(*regression(16))
    (state, _), _ = calls[0]
    assert [np.shape(value) for value in state[2]] == [variable.shape for variable in model.optimizer.variables]
    before = [to_numpy(variable) for variable in model.optimizer.variables]
    model.train_on_batch(*regression(16))
    (state, _), _ = calls[1]
    assert all(np.array_equal(to_numpy(value), old) for value, old in zip(state[2], before, strict=True))


def test_a_layer_runs_the_call_of_the_instance():
    model, calls = mlp(), []
    replace(model.layers[0], "call", calls)
    model.compile(optimizer="sgd", loss="mse")
    fit(model, regression(16))
    assert calls


@pytest.mark.parametrize("container", ["Sequential", "functional", "subclass"])
def test_a_layer_is_built_by_the_build_of_the_instance(container):
    """And has its path then, and was not called."""
    layer, order = keras.layers.Dense(3), []

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def call(self, inputs):
            return self.layer(inputs)

    keras_hooks.after_build(layer, lambda: order.append(("built", layer.path is not None)))
    plain_call = layer.call
    layer.call = lambda *args, **kwargs: order.append("called") or plain_call(*args, **kwargs)
    if container == "functional":
        inputs = keras.Input((6,))
        model = keras.Model(inputs, layer(inputs))
    else:
        model = keras.Sequential([layer]) if container == "Sequential" else Own()
    model.compile(optimizer="sgd", loss="mse")
    fit(model, regression(16))
    assert order[:2] == [("built", True), "called"]
    assert order.count(("built", True)) == 1


def test_a_build_that_fails_may_be_tried_again():
    layer, order = keras.layers.Dense(3), []
    keras_hooks.after_build(layer, lambda: order.append("first"))
    keras_hooks.after_build(layer, lambda: order.append("second"))
    with pytest.raises((TypeError, ValueError, IndexError)):
        layer.build(())
    assert not order
    layer.build((None, 6))
    assert sorted(order) == ["first", "second"]


def test_recomputation_runs_the_rematerialized_call():
    calls = []
    with keras.RematScope(mode="full"):
        layer = keras.layers.Dense(3)
        layer.build((None, 6))
        replace(layer, "rematerialized_call", calls)
        outputs = layer(np.ones((2, 6), "float32"))
    assert calls
    assert outputs.shape == (2, 3)


def test_masks_are_read_and_given():
    tokens = np.array([[1, 2, 0]])
    embedded = keras.layers.Embedding(5, 4, mask_zero=True)(tokens)
    assert to_numpy(keras_hooks.mask_of(embedded)).tolist() == [[1, 1, 0]]
    plain = keras.ops.ones((1, 3, 4))
    assert keras_hooks.mask_of(plain) is None
    given = keras_hooks.with_mask(plain, keras.ops.convert_to_tensor([[True, False, False]]))
    assert to_numpy(keras_hooks.mask_of(given)).tolist() == [[1, 0, 0]]
    seen = []

    class Reader(keras.layers.Layer):
        def compute_mask(self, inputs, previous_mask):
            return previous_mask

        def call(self, inputs, mask=None):
            seen.append(mask)
            return inputs

    Reader()(given)
    assert to_numpy(seen[0]).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("copied", COPIES)
def test_copies_ask_for_the_compile_config_of_the_instance(copied):
    model, calls = mlp(), []
    model.compile(optimizer="sgd", loss="mse")
    replace(model, "get_compile_config", calls)
    assert COPIES[copied](model).optimizer.built
    assert calls


class Owner:
    """Counts what `keras_hooks` calls."""

    def __init__(self):
        self.steps, self.trainings, self.savings = 0, [], 0

    def step(self, optimizer_values):
        assert (optimizer_values is None) == (BACKEND != "jax")
        self.steps += 1
        return keras.name_scope("step")

    def before_training(self, is_new):
        self.trainings.append(is_new)

    def before_saving(self):
        self.savings += 1


def test_an_owner_wraps_the_step_and_is_called_before_training_and_saving():
    model, owner, calls = mlp(), Owner(), []
    replace(model, keras_hooks._STEP, calls)
    keras_hooks.wrap_step(model, owner)
    assert keras_hooks.owner_of(model) is owner
    model.compile(optimizer="sgd", loss="mse")
    fit(model, regression(16))
    fit(model, regression(16))
    model.get_compile_config()
    assert owner.steps
    assert calls
    assert owner.trainings == [True, False]
    assert owner.savings == 1
    steps = owner.steps
    keras_hooks.recompile_step(model)
    fit(model, regression(16))
    assert owner.steps > steps
    assert owner.trainings == [True, False, False]


def test_a_model_without_a_step_makes_one():
    model = mlp()
    model.compile(optimizer="sgd", loss="mse")
    fit(model, regression(16))
    model.train_function, made = None, model.train_function
    model.make_train_function()
    assert model.train_function not in (None, made)


@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_a_failed_check_leaves_the_weights_in_the_model(how):
    model = mlp()
    keras_hooks.wrap_step(model, owner := Owner())
    model.compile(optimizer="sgd", loss="mse")
    train(model, how)
    before = weights(model)
    owner.before_training = lambda is_new: [][0]
    with pytest.raises(IndexError):
        train(model, how)
    assert_close(weights(model), before, 0)


def test_every_model_of_an_optimizer_is_found():
    model, other = mlp(), mlp()
    isaac = ISAAC()
    model.compile(optimizer=keras.optimizers.LossScaleOptimizer(isaac), loss="mse")
    other.compile(optimizer=ISAAC(), loss="mse")
    assert keras_hooks.models_of(isaac) == [model]
    assert keras_hooks.models_of(ISAAC()) == []
    # Not deleted, since `gc.collect` does nothing while another thread collects, as that of pytest-xdist may.
    model.compile(optimizer="sgd", loss="mse")
    assert keras_hooks.models_of(isaac) == []


@pytest.mark.parametrize("kind", ["Sequential", "functional", "subclass"])
@pytest.mark.parametrize("how", ["fit", "train_on_batch"])
def test_a_check_runs_before_any_model_makes_its_step(how, kind, monkeypatch):
    # Undone after the test.
    monkeypatch.setattr(keras.Model, "make_train_function", keras.Model.make_train_function)
    checked = []
    keras_hooks.check_before_training(checked.append)
    model = mlp()
    if kind != "Sequential":
        model_class = keras.Model if kind == "functional" else type("Mine", (keras.Model,), {})
        model = model_class(model.inputs[0], model.outputs[0])
    model.compile(optimizer="sgd", loss="mse")
    train(model, how)
    train(model, how)
    assert checked == [model]
    model.compile(optimizer="sgd", loss="mse")
    train(model, how)
    assert checked == [model] * 2
