"""Precisions, ways to compile and ways to train that Keras users have.

Each run is compared with one that is computed in another way: in NumPy, without capturing, or in another mode.
"""

import concurrent.futures
import functools
import importlib.util
import inspect
import json
import multiprocessing
import sys
from pathlib import Path

import keras
import numpy as np
import oracle
import pytest
from cases import CASES, data, each_case, expected_gradient
from harness import BACKEND, eager_gradients, gradients_by, loss_gradients, normal, paper_isaac, run, run_python, to_numpy
from keras import layers, ops
from keras.optimizers import SGD, Adam, LossScaleOptimizer
from models import (
    assert_close,
    assert_differ,
    assert_only_damping_matters,
    batches,
    captured,
    each_product,
    fit,
    mlp,
    numpy_training,
    oracle_fit,
    regression,
    sequences,
    trained,
    weights,
    with_random_weights,
)
from oracle import relative_error
from test_loops import custom_loop

from keras_isaac import ISAAC, capture_inputs, kernel_status

# At this damping the conditioned gradient is the plain one.
HUGE = 1e8


# Precision.


@pytest.fixture
def _float64():
    """JAX has float64 only where the process enables it."""
    if BACKEND == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
    yield
    if BACKEND == "jax":
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("wrapped", ["by hand", "by compile"])
def test_mixed_float16_skips_steps_that_overflow_halves_the_scale_and_goes_on(wrapped):
    inputs, targets = regression(16)
    float32 = captured(paper_isaac(damping=0.1))
    keras.config.set_dtype_policy("mixed_float16")
    model, isaac = capture_inputs(mlp()), paper_isaac(damping=0.1)
    model.compile(optimizer=LossScaleOptimizer(isaac) if wrapped == "by hand" else isaac, loss="mse")
    assert type(model.optimizer) is LossScaleOptimizer
    model.optimizer.build(model.trainable_variables)
    # Scaled by this much, the gradient of the output is above the largest float16.
    model.optimizer.dynamic_scale.assign(2.0**23)
    scales, num_steps = [2.0**23], 12
    for _ in range(num_steps):
        before = weights(model)
        model.train_on_batch(inputs, targets)
        scales.append(float(to_numpy(model.optimizer.dynamic_scale)))
        if scales[-1] == scales[-2]:
            assert_differ(weights(model), before)
            float32.train_on_batch(inputs, targets)
        else:
            assert scales[-1] == scales[-2] / 2
            assert_close(weights(model), before, 0)
    num_skipped = int(np.log2(scales[0] / scales[-1]))
    assert 2 <= num_skipped <= 8
    assert int(to_numpy(isaac.iterations)) == num_steps - num_skipped
    assert_close(weights(model), weights(float32), 5e-3)


# A few roundoffs of what the layer computes in.
TOLERANCES = {"mixed_float16": 2e-3, "mixed_bfloat16": 1.6e-2, "float64": 1e-12, "float32": 1e-5}


@pytest.mark.often("(4, 7)-mixed_float16", "(11, 7)-mixed_bfloat16", "(4, 7)-float64")
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("policy", TOLERANCES)
@pytest.mark.parametrize("shape", [(4, 7), (11, 7)], ids=str)
def test_the_conditioner_computes_in_float32_or_better(policy, shape):
    keras.config.set_dtype_policy(policy)
    random, dtype = np.random.default_rng(0), keras.config.dtype_policy().compute_dtype
    # What the layer would round is rounded here.
    inputs, cotangent = (to_numpy(ops.convert_to_tensor(random.normal(size=size), dtype)) for size in (shape, (shape[0], 5)))
    layer = capture_inputs(layers.Dense(5))
    given = inputs if dtype == "float64" else inputs.astype("float32")
    plain = keras.backend.standardize_dtype(layers.Dense(5)(given).dtype)
    # Keras 3.16 computes a plain layer's float64 in float32 on PyTorch.
    tolerance = TOLERANCES[plain if dtype == "float64" else policy]
    # The smaller damping is lost in a sum of float16 or bfloat16.
    for damping in (1.0, 2.0**-13):
        actual = run(layer, given, cotangent, paper_isaac(damping=damping), compiled=True)
        expected = oracle.conditioned_gradient(inputs, cotangent, damping)
        assert relative_error(actual.gradients[0], expected) < tolerance


KINDS = ("dense-sequence", "einsum-groups", "conv2d-groups", "reversible-embedding")


@pytest.mark.often("conv2d-groups-float64", "einsum-groups-mixed_float16", "reversible-embedding-mixed_float16")
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("policy", ["mixed_float16", "float64"])
@each_case([case for case in CASES if case.id in KINDS])
def test_every_kind_of_layer_in_every_precision(case, policy):
    keras.config.set_dtype_policy(policy)
    layer, inputs, cotangent = data(case)
    if policy == "float64" and inputs.dtype == "float32":
        inputs = inputs.astype("float64")
    plain = run(layer, inputs, cotangent, compiled=True)
    actual = run(capture_inputs(layer), inputs, cotangent, paper_isaac(damping=1.0), compiled=True)
    # Keras' own layers round float64 to float32 here and there, on JAX and PyTorch.
    tolerance = 1e-6 if policy == "float64" else 2 * TOLERANCES[policy]
    assert relative_error(actual.outputs, plain.outputs) < tolerance
    reading = case.read(layer, inputs)
    for variable, ours, theirs in zip(layer.trainable_variables, actual.gradients, plain.gradients, strict=True):
        expected = theirs
        if id(variable) in reading:
            expected = expected_gradient(*reading[id(variable)], theirs, 1.0)
            assert relative_error(ours, theirs) > 0.05
        assert np.linalg.norm(ours - expected) < tolerance * np.linalg.norm(theirs)


@pytest.mark.usefixtures("_float64")
def test_a_run_in_float64_is_numpys():
    # Powers of two, for Keras keeps the learning rate and the damping in float32.
    options = {"learning_rate": 0.25, "damping": 2.0**-5, "momentum": 0.5}
    model = capture_inputs(mlp(dtype="float64"))
    model.set_weights(mlp().get_weights())
    model.compile(optimizer=paper_isaac(**options), loss=keras.losses.MeanSquaredError(dtype="float64"))
    fit(model, regression(32), epochs=2)
    expected = numpy_training(mlp(), batches(regression(32), 16, 4), **options)
    # On the other backends `keras.ops.mean` returns float32, and so do losses.
    assert_close(weights(model), expected, 1e-14 if BACKEND == "tensorflow" else 1e-7)


def test_dtype_policies_of_single_layers():
    hidden = layers.Dense(8, activation="tanh", dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((6,)), hidden, layers.Dense(3, dtype="float32")])
    model.set_weights(mlp().get_weights())
    inputs, targets = regression()
    fit(captured(paper_isaac(0.1, 0.1), model), (inputs, targets))
    assert_close(weights(model), oracle_fit(mlp(), {"x": inputs, "y": targets}, 0.1, 0.1, loss="mse"), 1e-2)
    assert_differ(weights(model), trained(SGD(0.1)), 5e-2)


# Compilation; see also `test_training.py`.


def token_model(mode, names):
    """Layers with kernels that are recomputed in this mode, for `"full"` the model too, some of them on masked sequences."""
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 6, mask_zero=True)(tokens)
    # In the mode "larger_than", Keras fails at both.
    reshape, flatten = layers.Reshape((6, 1)), layers.Flatten()
    with keras.RematScope(mode=mode, layer_names=names, output_size_threshold=10):
        x = layers.Dense(6, activation="tanh", name="dense")(x)
        x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
        x = layers.Conv1D(4, 3, activation="tanh", name="conv")(reshape(layers.GlobalAveragePooling1D()(x)))
        outputs = layers.Dense(3, name="head")(flatten(x))
    with keras.RematScope(mode=mode if mode == "full" else None):
        return with_random_weights(keras.Model(tokens, outputs))


@functools.cache
def remat_run(is_conditioned, run_eagerly, mode=None, names=("dense", "attention", "conv", "head")):
    """Weights after four steps of the captured model."""
    optimizer = paper_isaac(0.1, damping=0.1) if is_conditioned else SGD(0.1)
    model = captured(optimizer, token_model(mode, list(names)), run_eagerly=run_eagerly)
    fit(model, sequences(32, length=5, vocabulary=9), epochs=2)
    return weights(model)


# In a compiled step for TensorFlow, Keras cannot recompute a layer whose `call` takes `training`.
REMAT = [("full",), ("activations",), ("larger_than",), ("list_of_layers",)]
REMAT = [(mode, BACKEND != "jax") for mode in REMAT]
REMAT += [(("activations",), False), (("list_of_layers", ("conv",)), False)] if BACKEND == "tensorflow" else []


@pytest.mark.often("full-*", "list_of_layers-*")
@pytest.mark.parametrize(("mode", "run_eagerly"), REMAT, ids=lambda value: value[0] if isinstance(value, tuple) else str(value))
def test_recomputed_layers_train_as_others(mode, run_eagerly):
    plain = remat_run(False, run_eagerly)
    assert_close(remat_run(False, run_eagerly, *mode), plain, 1e-5)
    conditioned = remat_run(True, run_eagerly, *mode)
    assert_close(conditioned, remat_run(True, run_eagerly), 1e-5)
    assert_differ(conditioned, plain, 1e-3)


@pytest.mark.parametrize("scope", ["layers", "model"])
def test_recomputed_in_a_loop_whose_backward_pass_comes_after_the_conditioning_scope(scope, request):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.run_functions_eagerly(True)
        request.addfinalizer(lambda: tf.config.run_functions_eagerly(False))

    def after(mode, mode_of_model):
        with keras.RematScope(mode=mode):
            stack = [layers.Dense(8, activation="tanh"), layers.Dense(3)]
        with keras.RematScope(mode=mode_of_model):
            model = keras.Sequential([keras.Input((6,)), *stack])
        model.set_weights(mlp().get_weights())
        train = getattr(custom_loop, f"train_{BACKEND}")
        train(capture_inputs(model), paper_isaac(damping=0.1), keras.losses.MeanSquaredError(), *regression(16), 3)
        return weights(model)

    assert_close(after("full" if scope == "layers" else None, "full" if scope == "model" else None), after(None, None))


@pytest.mark.skipif(BACKEND != "jax", reason="NNX is JAX's")
@pytest.mark.skipif(importlib.util.find_spec("flax") is None, reason="the NNX mode of Keras needs flax")
@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=["compiled", "eager"])
def test_nnx_mode(options):
    script = (
        "import json, sys, keras\n"
        "from harness import paper_isaac; from keras_isaac import capture_inputs; from models import trained\n"
        "assert keras.config.is_nnx_enabled()\n"
        "options = json.loads(sys.argv[1])\n"
        "result = trained(paper_isaac(damping=0.1, momentum=0.9), capture_inputs, None, options)\n"
        "print(json.dumps([w.tolist() for w in result]))"
    )
    output = run_python("-c", script, json.dumps(options), KERAS_NNX_ENABLED="true")
    actual = [np.asarray(weight) for weight in json.loads(output.splitlines()[-1])]
    assert_close(actual, trained(paper_isaac(damping=0.1, momentum=0.9), capture_inputs, None, options))


def in_other_processes(function, arguments):
    """Runs it where no coverage is measured: `torch.compile` cannot trace what SlipCover adds to the code."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return list(pool.map(function, arguments))


def weights_of_every_kind_of_product(how):
    """Returns the weights after three steps."""
    optimizer = SGD(0.3) if how == "plain" else paper_isaac(0.3, damping=0.1)
    model = captured(optimizer, each_product(), jit_compile=how == "compiled")
    inputs = np.random.default_rng(0).integers(0, 20, size=(8, 12)).astype("int32")
    for _ in range(3):
        model.train_on_batch(inputs, regression(8)[1])
    return weights(model)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile")
def test_torch_compile_conditions_every_kind_of_product_as_eager_does():
    eager, compiled, plain = in_other_processes(weights_of_every_kind_of_product, ("eager", "compiled", "plain"))
    assert_close(compiled, eager, 1e-4)
    for ours, theirs in zip(eager, plain, strict=True):
        if ours.ndim > 1:
            assert_differ([ours], [theirs], 1e-3)


def graph_breaks(is_captured):
    """Returns why `torch.compile` breaks the graph of a training step."""
    import torch

    hidden = inputs = keras.Input((10, 4))
    for layer in (layers.Conv1D(6, 3), layers.Dense(7), layers.Flatten(), layers.Dense(3)):
        hidden = layer(hidden)
    model = keras.Model(inputs, hidden)
    # 128 rows of the dense layer make 20 sums, after padding.
    optimizer = ISAAC(inner_optimizer=SGD(0.1), max_rows=20) if is_captured else SGD(0.1)
    (capture_inputs(model) if is_captured else model).compile(optimizer=optimizer, loss="mse", jit_compile=False)
    data = tuple(map(keras.ops.convert_to_tensor, (np.ones((16, 10, 4), "float32"), regression(16)[1])))
    # Builds the loss and the optimizer.
    model.train_step(data)
    torch.compile(model.train_step, backend="eager")(data)
    return set(torch._dynamo.utils.counters["graph_break"])


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile")
def test_torch_compile_breaks_the_graph_where_keras_does_and_nowhere_else():
    plain, captured = in_other_processes(graph_breaks, (False, True))
    assert plain
    assert captured == plain


# Training set-ups.


def branching():
    """Two inputs, two outputs, a trunk; random weights."""
    inputs = [keras.Input((6,), name="left"), keras.Input((4,), name="right")]
    trunk = layers.Concatenate()([layers.Dense(5, activation="tanh", name="l")(inputs[0]), inputs[1]])
    trunk = layers.Dense(24, activation="tanh", name="trunk")(trunk)
    outputs = {"value": layers.Dense(3, name="value")(trunk), "kind": layers.Dense(4, name="kind")(trunk)}
    return with_random_weights(keras.Model(inputs, outputs))


def branching_data(num=32):
    random = np.random.default_rng(1)
    inputs = [random.normal(size=(num, size)).astype("float32") for size in (6, 4)]
    return inputs, {"value": np.tanh(inputs[0][:, :3]), "kind": random.integers(0, 4, size=num)}


LOSSES = {
    "loss": {"value": "mse", "kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
    "loss_weights": {"value": 2.0, "kind": 0.5},
}


def test_several_inputs_and_outputs_with_loss_and_sample_weights():
    inputs, targets = branching_data()
    sample_weight = {name: np.linspace(0.1, 2, 32).astype("float32") ** power for power, name in enumerate(targets, 1)}
    model = captured(paper_isaac(0.3, damping=0.1), branching(), **LOSSES)
    model.fit(inputs, targets, sample_weight=sample_weight, batch_size=16, shuffle=False, verbose=0)
    data = {"x": inputs, "y": targets, "sample_weight": sample_weight}
    assert_close(weights(model), oracle_fit(branching(), data, 0.3, 0.1, **LOSSES), 1e-4)


def test_class_weights_and_weighted_rows_of_zero():
    inputs, targets = regression(32)
    labels = np.argmax(targets, axis=-1)
    class_weight = {0: 0.0, 1: 1.0, 2: 3.0}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = captured(paper_isaac(0.3, damping=0.1), loss=loss)
    fit(model, (inputs, labels), class_weight=class_weight, epochs=2)
    expected = oracle_fit(mlp(), {"x": inputs, "y": labels}, 0.3, 0.1, class_weight=class_weight, epochs=2, loss=loss)
    assert_close(weights(model), expected, 1e-4)


@pytest.mark.often("head")
@pytest.mark.parametrize("capture", ["model", "head"])
def test_transfer_learning_and_layers_frozen_and_unfrozen_between_compiles(capture):
    x, y = regression(32)
    conditioned = {"head"} if capture == "head" else {"hidden", "head"}

    def phases(model, train):
        hidden = model.get_layer("hidden")
        for trainable, rate in ((False, 0.3), (True, 0.1), (False, 0.1)):
            hidden.trainable = trainable
            before = to_numpy(hidden.kernel)
            train(model, rate)
            assert np.array_equal(to_numpy(hidden.kernel), before) == (not trainable)
        hidden.trainable = True
        return weights(model)

    def by_isaac(model, rate):
        model.compile(optimizer=paper_isaac(rate, damping=0.1), loss="mse")
        fit(model, (x, y))

    def by_oracle(model, rate):
        names = conditioned if model.get_layer("hidden").trainable else {"head"}
        oracle_fit(model, {"x": x, "y": y}, rate, 0.1, names, loss="mse")

    model = mlp()
    model.get_layer("hidden").trainable = False
    capture_inputs(model, include=".*head" if capture == "head" else None)
    assert [status.reason for status in kernel_status(model)] == ["frozen", None]
    actual = phases(model, by_isaac)
    assert [status.reason for status in kernel_status(model)] == ["not captured" if capture == "head" else None, None]
    assert_close(actual, phases(mlp(), by_oracle), 1e-4)


class Transposed(layers.Layer):
    """Multiplies by the transposed kernel of another layer."""

    def __init__(self, tied_to):
        super().__init__()
        self.tied_to = tied_to

    def call(self, inputs):
        return ops.matmul(inputs, ops.transpose(self.tied_to.kernel))


def test_a_kernel_tied_to_a_layer_that_is_not_captured_is_conditioned_where_it_is():
    encode = layers.Dense(4, activation="tanh", name="encode")
    inputs = keras.Input((6,))
    model = captured(paper_isaac(1.0, damping=0.1), keras.Model(inputs, Transposed(encode)(encode(inputs))))
    x = regression(16)[0]
    kernel = to_numpy(encode.kernel)
    hidden = np.tanh(x.astype("float64") @ kernel)
    output_gradient = 2 * (hidden @ kernel.T - x) / x.size
    hidden_gradient = (output_gradient @ kernel) * (1 - hidden**2)
    expected = oracle.conditioned_gradient(x, hidden_gradient, 0.1) + output_gradient.T @ hidden
    model.train_on_batch(x, x)
    assert relative_error(kernel - to_numpy(encode.kernel), expected) < 1e-4


def mean_squared_error(targets, outputs):
    return ops.mean(ops.square(targets - outputs))


class OwnStep:
    """The `train_step` that users write after Keras' guides."""

    @property
    def network(self):
        return self

    def train_step(self, *args):
        return (self.step_jax if BACKEND == "jax" else self.step)(*args)

    def step(self, data):
        x, y = data
        variables = self.trainable_variables
        loss, gradients = eager_gradients(lambda: mean_squared_error(y, self.network(x, training=True)), variables)
        self.optimizer.apply(gradients, variables)
        return {"loss": loss}

    def step_jax(self, state, data):
        import jax

        trainable, non_trainable, optimizer_variables, metrics_variables = state
        x, y = data

        def compute_loss(trainable, non_trainable):
            y_pred, non_trainable = self.network.stateless_call(trainable, non_trainable, x, training=True)
            return mean_squared_error(y, y_pred), non_trainable

        (loss, non_trainable), gradients = jax.value_and_grad(compute_loss, has_aux=True)(trainable, non_trainable)
        trainable, optimizer_variables = self.optimizer.stateless_apply(optimizer_variables, gradients, trainable)
        return {"loss": loss}, (trainable, non_trainable, optimizer_variables, metrics_variables)


class WithoutCall(OwnStep, keras.Model):
    """A model that has a `train_step` and no `call`."""

    def __init__(self, network):
        super().__init__()
        self._network = network
        # Backends other than TensorFlow would call it otherwise, captured or not.
        self.built = BACKEND != "tensorflow"

    @property
    def network(self):
        return self._network


class Own(OwnStep, keras.Model):
    """A functional model with its own step."""


OWN = {
    "instance": lambda plain: capture_inputs(Own(plain.inputs, plain.outputs)),
    "decorated": lambda plain: capture_inputs(type("Decorated", (Own,), {}))(plain.inputs, plain.outputs),
    "without call": lambda plain: capture_inputs(WithoutCall(plain)),
}


def assert_trains_as_captured(model):
    """The compiled model trains as Keras' own step trains a captured one."""
    fit(model, regression(32), epochs=2)
    assert_close(weights(model), trained(paper_isaac(damping=0.1), capture_inputs, regression(32), epochs=2), 1e-5)


@pytest.mark.often("decorated", "without call")
@pytest.mark.parametrize("own", OWN)
def test_a_subclass_with_its_own_train_step(own):
    model = OWN[own](mlp())
    model.compile(optimizer=paper_isaac(damping=0.1))
    assert_trains_as_captured(model)


class OwnScope(OwnStep, keras.Model):
    """Opens the scope in its own step."""

    def train_step(self, *args):
        with self.optimizer.conditioning(*([args[0][2]] if BACKEND == "jax" else [])):
            return super().train_step(*args)


def test_a_train_step_that_conditions_layers_that_are_captured_alone():
    plain = mlp()
    model = OwnScope(plain.inputs, plain.outputs)
    model.compile(optimizer=paper_isaac(damping=0.1))
    with pytest.raises(ValueError, match=r"Write `model = capture_inputs\(model\)`"):
        fit(model, regression(32))
    if BACKEND == "jax":
        assert_close(weights(model), weights(mlp()), 0)
    for layer in model.layers[1:]:
        capture_inputs(layer)
    assert_trains_as_captured(model)


class OwnTrainFunction(keras.Model):
    """Makes its training function as Keras' guides write it, without `force`."""

    def make_train_function(self):
        return super().make_train_function()


@pytest.mark.parametrize("when", ["before compile", "after fit"])
def test_a_model_with_a_make_train_function_of_its_own(when):
    plain = mlp()
    model = OwnTrainFunction(plain.inputs, plain.outputs)
    if when == "after fit":
        model.compile(optimizer=SGD(0.0), loss="mse")
        fit(model, regression(32))
    capture_inputs(model)
    model.compile(optimizer=paper_isaac(damping=0.1), loss="mse")
    fit(model, regression(32))
    capture_inputs(model, exclude=".*head")
    capture_inputs(model)
    fit(model, regression(32))
    assert_close(weights(model), trained(paper_isaac(damping=0.1), capture_inputs, regression(32), epochs=2), 1e-5)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, LossScaleOptimizer], ids=["itself", "loss scale"])
@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights:UserWarning")
def test_a_model_with_nothing_to_train_stays_as_it_is(wrap):
    """As under AdamW: a discriminator that is frozen in its own `compile`."""
    for optimizer in (wrap(keras.optimizers.AdamW()), wrap(ISAAC())):
        model = capture_inputs(mlp())
        model.trainable = False
        model.compile(optimizer=optimizer, loss="mse")
        before = [to_numpy(weight) for weight in model.weights]
        model.train_on_batch(*regression(16))
        fit(model, regression(16))
        assert_close([to_numpy(weight) for weight in model.weights], before, 0)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_a_penalty_on_the_gradient_with_respect_to_the_weights(penalty):
    """`test_derivatives.py` has penalties on that with respect to the inputs."""
    inputs, targets = keras.Input((4, 4, 2)), ops.convert_to_tensor(regression(8)[1])
    hidden = layers.Flatten()(layers.Conv2D(4, 2, activation="tanh")(inputs))
    model = with_random_weights(keras.Model(inputs, layers.Dense(3)(hidden)))
    variables = model.trainable_variables
    images = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(8, 4, 4, 2)), "float32")

    def loss(values):
        with keras.StatelessScope(list(zip(variables, values, strict=True))):
            return mean_squared_error(targets, model(images, training=True))

    def penalized_loss():
        values = [variable.value for variable in variables]
        inner = gradients_by(loss, values) if penalty else []
        return loss(values) + penalty * sum(ops.sum(ops.square(gradient)) for gradient in inner)

    def gradients(optimizer):
        if optimizer is not None:
            optimizer.build(variables)
        return [to_numpy(gradient) for gradient in loss_gradients(penalized_loss, variables, optimizer)]

    plain = gradients(None)
    capture_inputs(model)
    assert_close(gradients(paper_isaac(damping=HUGE)), plain, 1e-5)
    conditioned = gradients(paper_isaac(damping=0.1))
    assert all(np.isfinite(gradient).all() for gradient in conditioned)
    assert_differ(conditioned, plain, 1e-2)


def adversarial_loss(place, generator, discriminator, noise, real):
    """The generator's loss, or the discriminator's in the second place."""
    fake = discriminator(generator(noise, training=True), training=True)
    if place == 0:
        return ops.mean(ops.softplus(-fake))
    return ops.mean(ops.softplus(-discriminator(real, training=True)) + ops.softplus(fake))


class Gan(keras.Model):
    """A generator and a discriminator with an optimizer each, as in Keras' guides."""

    def __init__(self, optimizer):
        super().__init__()
        generator = keras.Sequential([keras.Input((4,)), layers.Dense(8, activation="tanh"), layers.Dense(6)])
        discriminator = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="tanh"), layers.Dense(1)])
        self.parts = with_random_weights(generator), with_random_weights(discriminator)
        self.optimizers = Adam(0.01), optimizer
        for model, each in zip(self.parts, self.optimizers, strict=True):
            each.build(model.trainable_variables)
        self.built = True

    def train_step(self, data):
        for place, (model, optimizer) in enumerate(zip(self.parts, self.optimizers, strict=True)):
            compute_loss = functools.partial(adversarial_loss, place, *self.parts, *data)
            isaac = optimizer if isinstance(optimizer, ISAAC) else None
            gradients = loss_gradients(compute_loss, model.trainable_variables, isaac)
            optimizer.apply([ops.stop_gradient(gradient) for gradient in gradients], model.trainable_variables)
        return {"loss": compute_loss()}


def play(optimizer):
    """Weights of both parts after each of two steps in a loop; the optimizer is the discriminator's."""
    gan, after = capture_inputs(Gan(optimizer)), []
    for _ in range(2):
        Gan.train_step(gan, tuple(map(ops.convert_to_tensor, normal((8, 4), (8, 6)))))
        after.append([weights(model) for model in gan.parts])
    return after


def test_a_gan_of_which_the_discriminator_has_isaac():
    plain, huge, isaac = play(SGD(0.1)), play(paper_isaac(0.1, HUGE)), play(paper_isaac(0.1, 0.1))
    for (generator, discriminator), expected in zip(huge, plain, strict=True):
        assert_close(generator, expected[0], 1e-4)
        assert_close(discriminator, expected[1], 1e-4)
    # The generator's gradient is computed through the captured discriminator, and is plain: the first step is the same.
    assert_close(isaac[0][0], plain[0][0])
    assert_differ(isaac[0][1], plain[0][1], 1e-2)
    assert_differ(isaac[-1][0], plain[-1][0])


@pytest.mark.skipif(BACKEND == "jax", reason="on JAX the state of a train step of Keras holds one optimizer")
def test_a_gan_in_fit():
    model = capture_inputs(Gan(paper_isaac(0.1, 0.1)))
    model.compile()
    fit(model, normal((8, 4), (8, 6)), epochs=2)
    for part, expected in zip(model.parts, play(paper_isaac(0.1, 0.1))[-1], strict=True):
        assert_close(weights(part), expected, 1e-4)


@pytest.mark.parametrize("given", ["function", "model"])
def test_scikit_learn_classifier(given):
    """Of a function that returns a captured model, or of a captured model, of which the wrapper trains a copy."""
    pytest.importorskip("sklearn")
    inputs, targets = regression(64)
    labels = np.argmax(targets, axis=-1)

    def fitted(optimizer):
        # A copy has weights of its own.
        keras.utils.set_random_seed(0)

        def build(X, y):  # noqa: N803
            loss = keras.losses.CategoricalCrossentropy(from_logits=True)
            return captured(optimizer, mlp(width=16), loss=loss)

        options = {"epochs": 10, "batch_size": 16, "verbose": 0, "shuffle": False}
        classifier = build if given == "function" else build(inputs, labels)
        return keras.wrappers.SKLearnClassifier(classifier, fit_kwargs=options).fit(inputs, labels)

    plain, huge, isaac = map(fitted, (SGD(0.3), paper_isaac(0.3, HUGE), paper_isaac(1.0, 0.1)))
    assert_close(weights(huge.model_), weights(plain.model_), 1e-4)
    assert_differ(weights(isaac.model_), weights(plain.model_), 1e-2)
    assert isaac.score(inputs, labels) > 0.9
    assert [status.reason for status in kernel_status(isaac.model_)] == [None] * 2


# Models that are built in their first step.


class Diffusion(OwnStep, keras.Model):
    """Called with two inputs, and only in its step, which therefore builds it."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, image, time):
        return self.dense(ops.concatenate([image, time], axis=-1))

    @property
    def network(self):
        return lambda image, training: self(image, image[:, :1])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends build a model before its first step")
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_model_that_only_its_own_step_can_call(run_eagerly):
    assert_only_damping_matters(Diffusion, regression(32), compile_options={"loss": None, "run_eagerly": run_eagerly})


class Teacher(keras.Model):
    """Calls a layer in its loss, and not in its `call`."""

    def __init__(self):
        super().__init__()
        self.student = keras.Sequential([layers.Dense(3)])
        self.teacher = layers.Dense(3)

    def call(self, inputs):
        return self.student(inputs)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.square(self.teacher(x) - y_pred))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="other backends build all variables before the first step")
@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.filterwarnings("ignore:`build.*was called on layer:UserWarning")
def test_variables_that_are_created_after_the_call(built, several, run_eagerly):
    def make():
        model = Teacher()
        if built:
            model.build((None, 6))
        return model

    def wrap(optimizer):
        optimizer_map = keras.optimizers.OptimizerMap(SGD(0.1), {".*": optimizer})
        return keras.optimizers.MultiOptimizer(optimizer_map) if several else optimizer

    assert_only_damping_matters(make, regression(32), wrap, {"loss": None, "run_eagerly": run_eagerly})


@pytest.mark.skipif(BACKEND != "torch", reason="elsewhere Python does not run in a step")
def test_a_dense_layer_takes_few_calls_of_the_package_in_a_step():
    """Eager PyTorch pays for each of them in every step."""
    root, calls = str(Path(inspect.getfile(ISAAC)).parent), []
    model = captured(ISAAC(inner_optimizer="sgd"), keras.Sequential([keras.Input((40,)), layers.Dense(40)]))
    x = np.random.default_rng(0).normal(size=(6, 40)).astype("float32")
    model.train_on_batch(x, x)
    data = (keras.ops.convert_to_tensor(x),) * 2

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(root):
            calls.append(frame.f_code)

    sys.setprofile(note)
    try:
        model.train_step(data)
    finally:
        sys.setprofile(None)
    assert 20 < len(calls) <= 42
    assert len(set(calls)) <= 39
    assert len({code.co_filename for code in calls}) <= 10
