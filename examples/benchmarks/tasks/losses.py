"""Losses and measures: functions of `call` (a function of x, such as the model), x and y."""

import keras
from keras import ops


def cross_entropy(call, x, y):
    """The mean cross-entropy of logits."""
    return ops.mean(keras.losses.sparse_categorical_crossentropy(y, call(x), from_logits=True))


def squared_error(call, x, y):
    """The mean squared error."""
    return ops.mean(ops.square(call(x) - y))


def accuracy(call, x, y):
    """The share of correct classes."""
    return ops.mean(ops.cast(ops.equal(ops.argmax(call(x), axis=-1), y), "float32"))
