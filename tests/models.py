"""Small models and data for the tests of training."""

import copy
import pickle

import keras
import numpy as np
import oracle
import pytest
from harness import paper_isaac, to_numpy

from keras_isaac import capture_inputs


def regression(num=48, features=6, outputs=3, seed=0):
    """Inputs and targets of a smooth function."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(num, features)).astype("float32")
    return inputs, np.tanh(inputs @ random.normal(size=(features, outputs))).astype("float32")


def mlp(features=6, outputs=3, width=8, seed=0, **kwargs):
    """A two-layer network whose weights are the same on every backend."""
    model = keras.Sequential(
        [
            keras.Input((features,)),
            keras.layers.Dense(width, activation="tanh", name="hidden", **kwargs),
            keras.layers.Dense(outputs, name="head", **kwargs),
        ]
    )
    return with_random_weights(model, seed)


class Subclassed(keras.Model):
    """A network that is built when it is called."""

    def __init__(self):
        super().__init__()
        self.body = keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3, name="head")])

    def call(self, inputs):
        return self.body(inputs)


# Ways to copy a model.
COPIES = {
    "clone": keras.models.clone_model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def with_random_weights(model, seed=0):
    """The model, its trainable weights drawn in a way that is the same on every backend."""
    random = np.random.default_rng(seed)
    for weight in model.trainable_variables:
        num_inputs = np.prod(weight.shape[:-1]) if len(weight.shape) > 1 else weight.shape[0]
        weight.assign(random.normal(size=weight.shape) / np.sqrt(num_inputs))
    return model


def weights(model):
    """Float64 copies of the trainable weights."""
    return [to_numpy(weight) for weight in model.trainable_variables]


def fit(model, data, **kwargs):
    """A silent `fit` in the order of the data."""
    return model.fit(*data, **{"verbose": 0, "shuffle": False, "batch_size": 16, **kwargs})


def captured(optimizer, model=None, **options):
    """The model, by default `mlp()`, captured and compiled."""
    model = capture_inputs(mlp() if model is None else model)
    model.compile(optimizer=optimizer, **{"loss": "mse", **options})
    return model


def trained(optimizer, capture=None, data=None, compile_options=None, **kwargs):
    """Weights of `mlp()` after a `fit` under `optimizer`, its layers captured by `capture`."""
    model = mlp()
    if capture is not None:
        capture(model)
    model.compile(optimizer=optimizer, loss="mse", **(compile_options or {}))
    fit(model, data or regression(), **kwargs)
    return weights(model)


def batches(data, size, num_steps):
    """The first `num_steps` batches of each array in `data`, over and over."""
    starts = [step * size % len(data[0]) for step in range(num_steps)]
    return [[array[start : start + size] for array in data] for start in starts]


def numpy_training(model, batches, learning_rate, damping, momentum, num_replicas=1):
    """Trains an `mlp()` under the mean squared error in float64, by SGD with momentum on conditioned gradients.

    Every replica conditions on its part of each batch, and the gradients are averaged.
    """
    parameters = weights(model)
    velocity = [np.zeros_like(p) for p in parameters]
    for batch in batches:
        kernel, bias, head_kernel, head_bias = parameters
        gradients = []
        for x, y in zip(*(np.split(array.astype("float64"), num_replicas) for array in batch), strict=True):
            hidden = np.tanh(x @ kernel + bias)
            output_gradient = 2 * (hidden @ head_kernel + head_bias - y) / y.size
            hidden_gradient = (output_gradient @ head_kernel.T) * (1 - hidden**2)
            conditioned = oracle.conditioned_gradient(x, hidden_gradient, damping)
            conditioned_head = oracle.conditioned_gradient(hidden, output_gradient, damping)
            gradients.append([conditioned, hidden_gradient.sum(0), conditioned_head, output_gradient.sum(0)])
        means = [np.mean(gradient, axis=0) for gradient in zip(*gradients, strict=True)]
        velocity = [momentum * v - learning_rate * g for v, g in zip(velocity, means, strict=True)]
        parameters = [p + v for p, v in zip(parameters, velocity, strict=True)]
    return parameters


def keras_hub():
    """KerasHub, which is only tested where it is installed, and for this Keras."""
    return pytest.importorskip("keras_hub", reason="KerasHub is not installed, or not for this Keras", exc_type=ImportError)


def assert_close(actual, expected, tolerance=1e-6):
    """Lists of arrays agree, relative to the largest entry of each."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), 1e-30))


def assert_only_damping_matters(make, data=None, wrap=lambda optimizer: optimizer, compile_options=None, **fit_options):
    """At a huge damping, a captured model trains as the plain one does under SGD; at a small one, it does not.

    Args:
        make: function that returns a model.
        data: inputs and targets. Defaults to `None`: `regression()`.
        wrap: function that returns an optimizer around the given one.
        compile_options: dictionary of arguments of `compile`.
        **fit_options: arguments of `fit`.
    """

    def after(optimizer, capture):
        keras.utils.set_random_seed(0)
        model = capture(make())
        model.compile(optimizer=wrap(optimizer), **{"loss": "mse", **(compile_options or {})})
        fit(model, data or regression(), **fit_options)
        return [to_numpy(weight) for weight in model.weights]

    plain = after(keras.optimizers.SGD(0.1), lambda model: model)
    assert_close(after(paper_isaac(0.1, 1e8), capture_inputs), plain, 1e-5)
    assert_differ(after(paper_isaac(0.1, 0.1), capture_inputs), plain, 1e-3)


def assert_differ(actual, expected, at_least=1e-4):
    """Some weight differs by more than rounding."""
    assert max(np.abs(ours - theirs).max() for ours, theirs in zip(actual, expected, strict=True)) > at_least


def sequence_network(length=6, vocabulary=7, outputs=3, seed=0):
    """An embedding, a convolution, attention and two dense layers, whose weights are the same on every backend."""
    tokens = keras.Input((length,), dtype="int32")
    x = keras.layers.Embedding(vocabulary, 4)(tokens)
    x = keras.layers.Conv1D(6, 3, padding="same", activation="tanh")(x)
    x = keras.layers.MultiHeadAttention(2, 3)(x, x)
    x = keras.layers.Dense(5, activation="tanh")(x)
    return with_random_weights(keras.Model(tokens, keras.layers.Dense(outputs)(keras.layers.GlobalAveragePooling1D()(x))), seed)


def each_product():
    """An embedding, a convolution, an einsum and a dense layer, for 12 tokens of 20; random weights."""
    tokens = keras.Input((12,), dtype="int32")
    hidden = keras.layers.Conv1D(6, 3, activation="tanh")(keras.layers.Embedding(20, 8)(tokens))
    hidden = keras.layers.EinsumDense("abc,cde->abde", (None, 2, 4), activation="tanh")(hidden)
    hidden = keras.layers.GlobalAveragePooling1D()(keras.layers.Reshape((10, 8))(hidden))
    return with_random_weights(keras.Model(tokens, keras.layers.Dense(3)(hidden)))


def sequences(num=48, length=6, vocabulary=7, outputs=3, seed=0):
    """Tokens, and targets in [-1, 1]."""
    random = np.random.default_rng(seed)
    return random.integers(0, vocabulary, (num, length)).astype("int32"), random.uniform(-1, 1, (num, outputs)).astype(
        "float32"
    )


def oracle_fit(model, data, learning_rate, damping, conditioned=None, class_weight=None, epochs=1, **compile_options):
    """Trains by SGD with gradients that NumPy conditions in float64; returns the trainable weights.

    Keras computes the plain gradient of each batch of 16, as the difference that one step of plain SGD makes. Then it is
    conditioned on the inputs of its layer, which is a `Dense` that is called once.

    Args:
        model: a functional model, not captured; it is trained.
        data: dictionary of arrays, or nests of them, the arguments of `train_on_batch`.
        learning_rate: of SGD.
        damping: float.
        conditioned: names of the layers to condition. Defaults to `None`: all `Dense` that are trainable.
        class_weight: dictionary, or `None`.
        epochs: integer.
        **compile_options: loss and more.
    """
    model.compile(optimizer=keras.optimizers.SGD(1.0), **compile_options)
    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    if conditioned is not None:
        dense = [layer for layer in dense if layer.name in conditioned]
    inputs = model.inputs if len(model.inputs) > 1 else model.inputs[0]
    for start in [*range(0, len(keras.tree.flatten(data)[0]), 16)] * epochs:
        batch = keras.tree.map_structure(lambda array, start=start: array[start : start + 16], data)
        rows = {id(layer.kernel): keras.Model(inputs, layer.input).predict_on_batch(batch["x"]) for layer in dense}
        before = weights(model)
        model.train_on_batch(**batch, class_weight=class_weight)
        for weight, old, new in zip(model.trainable_variables, before, weights(model), strict=True):
            step = old - new
            if id(weight) in rows:
                step = oracle.condition(rows[id(weight)], step, damping)
            weight.assign(old - learning_rate * step)
    return weights(model)
