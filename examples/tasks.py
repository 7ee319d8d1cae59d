"""The six tasks of the experiments: data, a model, and what is reported of it."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from keras import layers


class Task(NamedTuple):
    """One task, as `evidence.py` trains it.

    Args:
        build: function of a seed, returns the model.
        loss: the loss.
        metric: name of what is reported of the held-out data: `"accuracy"` or `"loss"`.
        data: function without arguments, returns `(x, y), (x_test, y_test)`.
        batch_size: integer.
        steps: integer, how long it trains.
    """

    build: Callable
    loss: Callable
    metric: str
    data: Callable
    batch_size: int
    steps: int


@functools.cache
def images(num_train):
    """MNIST through `keras.datasets`, or of the `.npz` file that KERAS_ISAAC_IMAGES names; else scikit-learn's digits."""
    file = os.environ.get("KERAS_ISAAC_IMAGES")
    if file:
        with np.load(Path(file)) as arrays:
            x, y = arrays["x"], arrays["y"]
    else:
        try:
            (x, y), _ = keras.datasets.mnist.load_data()
        except Exception as error:  # Keras reports a missing network by an exception of no class of its own.
            from sklearn.datasets import load_digits

            print(f"MNIST cannot be loaded ({error}): scikit-learn's digits take its place.")
            x, y = load_digits(return_X_y=True)
            x = x.reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2)
            x = np.pad(x, ((0, 0), (2, 2), (2, 2)))
    order = np.random.default_rng(0).permutation(len(x))
    x = (x[order] / x.max()).astype("float32")[..., None]
    num_train = min(num_train, len(x) * 9 // 10)
    y = y[order].astype("int32")
    return (x[:num_train], y[:num_train]), (x[-1000:], y[-1000:])


def classifier(seed):
    """The paper's ReLU network of five dense layers, 400 wide."""
    keras.utils.set_random_seed(seed)
    hidden = [layers.Dense(400, activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), *hidden, layers.Dense(10, name="logits")])


def autoencoder(seed):
    """The paper's, 784-1000-500-30-500-1000-784."""
    keras.utils.set_random_seed(seed)
    widths = [(1000, "relu"), (500, "relu"), (30, None), (500, "relu"), (1000, "relu")]
    middle = [layers.Dense(width, activation=activation) for width, activation in widths]
    return keras.Sequential([keras.Input((784,)), *middle, layers.Dense(784, name="logits")])


def autoencoder_data():
    """Flat images, and themselves."""
    (x, _), (x_test, _) = images(9000)
    x, x_test = x.reshape(len(x), -1), x_test.reshape(len(x_test), -1)
    return (x, x), (x_test, x_test)


def cnn(seed):
    """Four convolutions."""
    keras.utils.set_random_seed(seed)
    options = {"padding": "same", "activation": "relu"}
    convolutions = [
        layers.Conv2D(width, 3, strides=strides, **options) for width, strides in ((16, 1), (32, 2), (32, 1), (64, 2))
    ]
    return keras.Sequential([keras.Input((28, 28, 1)), *convolutions, layers.Flatten(), layers.Dense(10, name="logits")])


CONTEXT, WIDTH, VOCABULARY = 64, 128, 128


def _causal_block(x):
    attended = layers.LayerNormalization()(x)
    attended = layers.MultiHeadAttention(4, WIDTH // 4)(attended, attended, use_causal_mask=True)
    x = layers.Add()([x, attended])
    hidden = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
    return layers.Add()([x, layers.Dense(WIDTH)(hidden)])


class _Positions(layers.Layer):
    """Adds a vector for each position."""

    def build(self, input_shape):
        self.embeddings = self.add_weight(shape=input_shape[1:], initializer="uniform")

    def call(self, inputs):
        return inputs + self.embeddings


def transformer(seed):
    """Characters, two blocks of width 128."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((CONTEXT,), dtype="int32")
    x = _Positions()(layers.Embedding(VOCABULARY, WIDTH)(inputs))
    x = _causal_block(_causal_block(x))
    return keras.Model(inputs, layers.Dense(VOCABULARY, name="logits")(layers.LayerNormalization()(x)))


def _windows(text, count, start):
    codes = np.frombuffer(text.encode("ascii", "replace"), "uint8").astype("int32") % VOCABULARY
    held_out = len(codes) * 9 // 10
    low, high = (0, held_out) if start == "train" else (held_out, len(codes))
    places = np.random.default_rng(0).integers(low, high - CONTEXT - 1, count)
    windows = codes[places[:, None] + np.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def prose():
    """Python's own help texts."""
    import pydoc_data.topics

    text = "".join(pydoc_data.topics.topics.values())
    return _windows(text, 16 * 400, "train"), _windows(text, 256, "test")


def code():
    """The source of some of Python's own modules."""
    import argparse
    import ast
    import inspect
    import statistics
    import tarfile

    text = "".join(inspect.getsource(module) for module in (argparse, ast, inspect, statistics, tarfile))
    return _windows(text, 16 * 200, "train"), _windows(text, 256, "test")


@functools.cache
def _pretrained_weights():
    model = transformer(0)
    model.compile(optimizer=keras.optimizers.AdamW(3e-3), loss=_cross_entropy())
    model.fit(*prose()[0], batch_size=16, verbose=0)
    return model.get_weights()


def fine_tuned(seed):
    """The transformer, trained on prose."""
    model = transformer(seed)
    model.set_weights(_pretrained_weights())
    return model


def lora(seed):
    """The transformer, trained on prose, with LoRA of rank 8 in its dense and attention layers."""
    model = fine_tuned(seed)
    keras.utils.set_random_seed(seed)
    # A container that is frozen has no trainable variables, so that what it contains is frozen one by one.
    pending = list(model.layers)
    while pending:
        layer = pending.pop()
        if isinstance(layer, layers.MultiHeadAttention):
            pending.extend(value for value in vars(layer).values() if isinstance(value, keras.Layer))
        elif isinstance(layer, (layers.Dense, layers.EinsumDense)) and layer.name != "logits" and hasattr(layer, "kernel"):
            layer.enable_lora(8)
            layer.bias.trainable = False
        else:
            layer.trainable = False
    return model


def regressor(seed):
    """Two hidden layers."""
    keras.utils.set_random_seed(seed)
    hidden = [layers.Dense(64, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((10,)), *hidden, layers.Dense(1, name="logits")])


def table():
    """scikit-learn's diabetes, standardized; features as they are given, of a scale of 0.05."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype("float32"), ((y - y.mean()) / y.std())[order, None].astype("float32")
    return (x[:352], y[:352]), (x[352:], y[352:])


def _cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


TASKS = {
    "classifier": Task(classifier, _cross_entropy, "accuracy", lambda: images(9000), 60, 900),
    "autoencoder": Task(autoencoder, keras.losses.MeanSquaredError, "loss", autoencoder_data, 60, 600),
    "cnn": Task(cnn, _cross_entropy, "accuracy", lambda: images(6000), 60, 400),
    "transformer": Task(transformer, _cross_entropy, "loss", prose, 16, 400),
    "lora": Task(lora, _cross_entropy, "loss", code, 16, 200),
    "tabular": Task(regressor, keras.losses.MeanSquaredError, "loss", table, 32, 330),
}
