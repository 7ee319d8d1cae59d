"""Layers on sparse inputs keep their sparse product and their plain gradient, and say so."""

import contextlib

import keras
import numpy as np
import pytest
from harness import BACKEND, normal, paper_isaac, to_numpy
from keras import layers
from models import captured

import keras_isaac
from keras_isaac import capture_inputs, kernel_status
from keras_isaac.callbacks import CurvatureMonitor

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="Keras has no sparse tensors on PyTorch")

PLAIN = r"Dense layer 'wide' trains with its plain gradient, because its inputs are sparse. To condition it, pass dense inputs"


def one_hot(num=8, features=6):
    """Random one-hot rows, as a sparse tensor."""
    dense = np.eye(features, dtype="float32")[np.random.default_rng(0).integers(0, features, num)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.sparse.from_dense(dense)
    from jax.experimental.sparse import BCOO

    return BCOO.fromdense(dense)


def wide_and_deep():
    sparse, dense = keras.Input((6,), sparse=True), keras.Input((4,))
    outputs = layers.Dense(3, name="wide")(sparse) + layers.Dense(3, name="deep")(dense)
    return keras.Model([sparse, dense], outputs)


def wide_and_deep_data():
    dense, targets = normal((8, 4), (8, 3))
    return [one_hot(), dense], targets


def test_a_sparse_layer_trains_as_the_inner_optimizer_alone_would_train_it():
    x, y = wide_and_deep_data()
    steps = {}
    for name in ("plain", "conditioned"):
        keras.utils.set_random_seed(0)
        model = wide_and_deep()
        before = [to_numpy(weight) for weight in model.trainable_variables]
        if name == "plain":
            model.compile("sgd", "mse")
            model.train_on_batch(x, y)
        else:
            capture_inputs(model).compile(paper_isaac(0.01, damping=0.1), "mse")
            with pytest.warns(UserWarning, match=PLAIN):
                model.train_on_batch(x, y)
        steps[name] = {
            weight.path: to_numpy(weight) - start for weight, start in zip(model.trainable_variables, before, strict=True)
        }
    plain, conditioned = steps["plain"], steps["conditioned"]
    np.testing.assert_allclose(conditioned["wide/kernel"], plain["wide/kernel"], rtol=1e-5, atol=1e-8)
    assert np.abs(plain["wide/kernel"]).max() > 1e-4
    # The layer on dense inputs is conditioned.
    assert np.linalg.norm(conditioned["deep/kernel"]) < 0.9 * np.linalg.norm(plain["deep/kernel"])


def test_status_summary_and_monitor_say_that_it_is_plain(capsys):
    x, y = wide_and_deep_data()
    model = capture_inputs(wide_and_deep())
    assert {status.path: status.reason for status in kernel_status(model)} == {
        "wide/kernel": "sparse inputs",
        "deep/kernel": None,
    }
    model.compile(paper_isaac(damping=0.1), "mse")
    with pytest.warns(UserWarning, match=PLAIN):
        wide, deep = sorted(keras_isaac.summary(model, batch_size=8), key=lambda status: status.path, reverse=True)
    assert (wide.path, wide.reason, deep.form) == ("wide/kernel", "sparse inputs", "feature")
    assert "plain: sparse" in capsys.readouterr().out
    monitor = CurvatureMonitor((x, y))
    with pytest.warns(UserWarning, match=PLAIN):
        model.fit(x, y, batch_size=8, verbose=0, callbacks=[monitor])
    assert {key.split("/")[0] for key in monitor.history} == {"step", "deep"}


class Own(keras.Model):
    """Of which only a call shows that its inputs are sparse; the second call of `twice` is on dense ones."""

    def __init__(self):
        super().__init__()
        self.wide, self.twice = layers.Dense(3, name="wide"), layers.Dense(6, name="twice")

    def call(self, inputs):
        return self.wide(inputs) + self.twice(self.twice(inputs))[:, :3]


def test_what_only_a_call_shows_is_in_the_summary():
    sparse = one_hot()
    model = Own()
    model(sparse)
    capture_inputs(model)
    with pytest.warns(UserWarning, match="because its inputs are sparse"):
        wide, twice = keras_isaac.summary(model, inputs=sparse)
    assert (wide.reason, wide.calls) == ("sparse inputs", 1)
    assert (twice.reason, twice.note, twice.calls) == (None, "1 of 2 calls plain: sparse inputs", 1)


def test_a_model_of_sparse_inputs_alone_trains_and_warns():
    inputs = keras.Input((6,), sparse=True)
    model = captured(keras_isaac.ISAAC(), keras.Model(inputs, layers.Dense(3, name="wide")(inputs)))
    before = to_numpy(model.trainable_variables[0])
    with pytest.warns(UserWarning, match=PLAIN):
        model.train_on_batch(one_hot(), normal((8, 3))[0])
    assert np.abs(to_numpy(model.trainable_variables[0]) - before).max() > 1e-4


class Scores(layers.Layer):
    def build(self, input_shape):
        self.weight = self.add_weight(shape=(input_shape[-1], 3))

    def call(self, inputs):
        return keras.ops.matmul(inputs, self.weight)


def test_a_registered_layer_on_sparse_inputs_is_plain_unless_its_rows_are_dense():
    for rows, reason in ((lambda layer, inputs: inputs, "sparse inputs"), (lambda layer, inputs: keras.ops.ones((8, 6)), None)):
        keras_isaac.register_layer(Scores, kernel="weight", rows=rows)
        inputs = keras.Input((6,), sparse=True)
        model = captured(paper_isaac(), keras.Model(inputs, Scores()(inputs)))
        is_plain = pytest.warns(UserWarning, match="Scores layer '.*' trains with its plain gradient")
        with contextlib.nullcontext() if reason is None else is_plain:
            assert np.isfinite(model.train_on_batch(one_hot(), normal((8, 3))[0]))
        with contextlib.nullcontext() if reason is None else is_plain:
            assert [status.reason for status in keras_isaac.summary(model, batch_size=8)] == [reason]
