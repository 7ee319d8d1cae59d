"""Small models and data for the tests of training."""

import keras
import numpy as np
from harness import to_numpy


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
    random = np.random.default_rng(seed)
    for weight in model.trainable_variables:
        weight.assign(random.normal(size=weight.shape) / np.sqrt(weight.shape[0]))
    return model


def weights(model):
    """Float64 copies of the trainable weights."""
    return [to_numpy(weight) for weight in model.trainable_variables]


def fit(model, data, **kwargs):
    """A silent `fit` in the order of the data."""
    return model.fit(*data, **{"verbose": 0, "shuffle": False, "batch_size": 16, **kwargs})


def trained(optimizer, capture=None, data=None, compile_options=None, **kwargs):
    """Weights of `mlp()` after a `fit` under `optimizer`, its layers captured by `capture`."""
    model = mlp()
    if capture is not None:
        capture(model)
    model.compile(optimizer=optimizer, loss="mse", **(compile_options or {}))
    fit(model, data or regression(), **kwargs)
    return weights(model)


def assert_close(actual, expected, tolerance=1e-6):
    """Lists of arrays agree, relative to the largest entry of each."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), 1e-30))


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
    model = keras.Model(tokens, keras.layers.Dense(outputs)(keras.layers.GlobalAveragePooling1D()(x)))
    random = np.random.default_rng(seed)
    for weight in model.trainable_variables:
        weight.assign(random.normal(size=weight.shape) / np.sqrt(weight.shape[0]))
    return model


def sequences(num=48, length=6, vocabulary=7, outputs=3, seed=0):
    """Tokens, and targets in [-1, 1]."""
    random = np.random.default_rng(seed)
    return random.integers(0, vocabulary, (num, length)).astype("int32"), random.uniform(-1, 1, (num, outputs)).astype(
        "float32"
    )
