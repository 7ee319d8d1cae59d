"""The table of cases: one row a layer configuration. Every law in `test_layers.py` is tested over every row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import oracle
import pytest
from harness import to_numpy
from keras import layers


class Case(NamedTuple):
    """One layer, the shape of its inputs, and the float64 formula of its conditioned kernel gradient."""

    id: str
    layer: Callable[[], keras.Layer]
    input_shape: tuple
    kernel_gradient: Callable[..., Any]


def dense(layer, inputs, cotangent, damping):
    """Rows are all positions; the cotangent passes through the activation to the product's output."""
    kernel = to_numpy(layer.kernel)
    rows = np.asarray(inputs, "float64").reshape(-1, kernel.shape[0])
    cotangent = np.asarray(cotangent, "float64").reshape(-1, kernel.shape[1])
    outputs = rows @ kernel + (0.0 if layer.bias is None else to_numpy(layer.bias))
    derivative = {"linear": lambda z: 1.0, "tanh": lambda z: 1 - np.tanh(z) ** 2, "relu": lambda z: z > 0}
    return oracle.conditioned_gradient(rows, cotangent * derivative[layer.activation.__name__](outputs), damping)


CASES = [
    Case("dense-fewer-rows", lambda: layers.Dense(5), (4, 7), dense),
    Case("dense-as-many-rows", lambda: layers.Dense(5), (7, 7), dense),
    Case("dense-more-rows", lambda: layers.Dense(5), (11, 7), dense),
    Case("dense-one-row", lambda: layers.Dense(5), (1, 7), dense),
    Case("dense-one-feature", lambda: layers.Dense(3), (4, 1), dense),
    Case("dense-one-unit", lambda: layers.Dense(1), (4, 7), dense),
    Case("dense-wide-output", lambda: layers.Dense(19), (4, 7), dense),
    Case("dense-no-bias", lambda: layers.Dense(5, use_bias=False), (4, 7), dense),
    Case("dense-tanh", lambda: layers.Dense(5, activation="tanh"), (4, 7), dense),
    Case("dense-relu", lambda: layers.Dense(5, activation="relu"), (4, 7), dense),
    Case("dense-sequence", lambda: layers.Dense(5), (2, 3, 9), dense),
    Case("dense-long-sequence", lambda: layers.Dense(5, activation="tanh"), (3, 5, 4), dense),
    Case("dense-rank-5", lambda: layers.Dense(3), (2, 2, 1, 2, 9), dense),
    Case("dense-blocked-inverse", lambda: layers.Dense(6), (70, 90), dense),
]


def each_case():
    """Parametrizes a test over the table."""
    return pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


def data(case, seed=0):
    """Returns the built layer with random weights, inputs and a cotangent of its outputs."""
    random = np.random.default_rng(seed)
    layer = case.layer()
    layer.build(case.input_shape)
    for weight in layer.trainable_variables:
        weight.assign(random.normal(size=weight.shape) / np.sqrt(weight.shape[0]))
    inputs = random.normal(size=case.input_shape).astype("float32")
    cotangent = random.normal(size=layer.compute_output_shape(case.input_shape)).astype("float32")
    return layer, inputs, cotangent
