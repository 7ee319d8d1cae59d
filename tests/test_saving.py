"""Saved, resumed, copied and shipped: a captured model as the plain one; see also `test_training.py`."""

import importlib.util

import keras
import numpy as np
import pytest
from harness import BACKEND, paper_isaac, run_python, to_numpy
from models import (
    COPIES,
    assert_close,
    assert_differ,
    captured,
    each_product,
    fit,
    mlp,
    regression,
    weights,
)
from test_training import OPTIMIZERS

from keras_isaac import ISAAC, capture_inputs, kernel_status


def compiled(optimizer):
    """The captured network under an optimizer of `OPTIMIZERS`."""
    return captured(eval(OPTIMIZERS[optimizer]))


def state(model):
    """All variables from which training continues."""
    return [to_numpy(variable) for variable in (*model.variables, *model.optimizer.variables)]


class LowerDamping(keras.callbacks.Callback):
    """Lowers the damping after the first epoch, where it is not a schedule."""

    def on_epoch_end(self, epoch, logs=None):
        isaac = self.model.optimizer
        isaac = getattr(isaac, "inner_optimizer", isaac) if not isinstance(isaac, ISAAC) else isaac
        if epoch == 0 and isinstance(isaac.damping, keras.Variable):
            isaac.damping = 0.2


class InterruptedRunError(Exception):
    """Simulates a process that dies."""


class Interruption(keras.callbacks.Callback):
    """Interrupts the run in the middle of its third epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (2, 1):
            raise InterruptedRunError


@pytest.mark.often("accumulation")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_backup_and_restore_continues_bit_for_bit_after_an_interruption(optimizer, tmp_path):
    data = regression()
    uninterrupted = compiled(optimizer)
    fit(uninterrupted, data, epochs=4, callbacks=[LowerDamping()])

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(InterruptedRunError):
        fit(compiled(optimizer), data, epochs=4, callbacks=[LowerDamping(), backup, Interruption()])
    keras.utils.clear_session()
    resumed, epochs = compiled(optimizer), []
    count = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epochs.append(epoch))
    fit(resumed, data, epochs=4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup"), LowerDamping(), count])
    assert epochs == [2, 3]
    assert_close(state(resumed), state(uninterrupted), 0)


def test_a_checkpoint_of_the_weights_of_the_best_epoch(tmp_path):
    data, validation_data, model = regression(), regression(16, seed=3), compiled("adam")
    path = tmp_path / "best.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(path, monitor="val_loss", save_best_only=True, save_weights_only=True)
    losses = fit(model, data, epochs=3, validation_data=validation_data, callbacks=[checkpoint]).history["val_loss"]
    expected = compiled("adam")
    fit(expected, data, epochs=int(np.argmin(losses)) + 1, validation_data=validation_data)
    loaded = compiled("adam")
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(path)
    assert_close(state(loaded), state(expected), 0)
    fit(loaded, data)
    fit(expected, data)
    assert_close(state(loaded), state(expected), 0)


def several_kinds():
    """A fitted model with a product of each kind, and its inputs."""
    model = captured(paper_isaac(damping=0.1, inner_optimizer="adam"), each_product())
    inputs = np.random.default_rng(0).integers(0, 20, size=(48, 12)).astype("int32")
    fit(model, (inputs, regression(48)[1]))
    return model, inputs[:8]


def served_saved_model(path, inputs):
    import tensorflow as tf

    served = tf.saved_model.load(path)
    return served.serve(inputs)


def served_onnx(path, inputs):
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(str(path))
    return session.run(None, {session.input_names[0]: inputs})[0]


def served_torch(path, inputs):
    import torch

    # Keras exports a batch of one where the batch size is open.
    program = torch.export.load(path).module()
    return torch.cat([program(torch.tensor(row[None])).detach() for row in inputs])


ONNX = {"jax": "jax2onnx", "tensorflow": "tf2onnx", "torch": "onnxscript"}
FORMATS = [("tf_saved_model", "exported", served_saved_model, ["torch_xla"] if BACKEND == "torch" else [])]
FORMATS += [("onnx", "model.onnx", served_onnx, ["onnx", ONNX[BACKEND]])]
FORMATS += [("torch", "model.pt2", served_torch, [])] if BACKEND == "torch" else []


@pytest.mark.parametrize(("file_format", "name", "serve", "packages"), FORMATS, ids=[row[0] for row in FORMATS])
@pytest.mark.filterwarnings("ignore")
def test_export_equals_predict(file_format, name, serve, packages, tmp_path):
    for package in packages:
        pytest.importorskip(package, reason=f"Keras exports {file_format} through {package}")
    model, inputs = several_kinds()
    model.export(tmp_path / name, format=file_format, verbose=False)
    np.testing.assert_allclose(serve(tmp_path / name, inputs), model.predict(inputs, verbose=0), atol=1e-5)
    # The captured model trains on.
    before = weights(model)
    model.train_on_batch(inputs, regression(8)[1])
    assert_differ(weights(model), before)


@pytest.mark.often("deepcopy-adam", "pickle-loss scale")
@pytest.mark.parametrize(("copied", "optimizer"), [("deepcopy", "adam"), *(("pickle", optimizer) for optimizer in OPTIMIZERS)])
def test_a_copy_of_a_fitted_model_is_captured_and_continues_bit_for_bit(copied, optimizer):
    model = compiled(optimizer)
    for _ in range(3):
        model.train_on_batch(*regression(16))
    other = COPIES[copied](model)
    assert [status.reason for status in kernel_status(other)] == [None] * 2
    assert_close(state(other), state(model), 0)
    for _ in range(3):
        model.train_on_batch(*regression(16))
    assert_differ(weights(other), weights(model))
    for _ in range(3):
        other.train_on_batch(*regression(16))
    assert_close(state(other), state(model), 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled_too", [True, False])
def test_a_legacy_file_trains_on(compiled_too, tmp_path):
    """Keras builds the optimizer in such a file for no variables."""
    model, data = capture_inputs(mlp()), regression(16)
    model.compile(optimizer=paper_isaac(damping=0.1), loss=keras.losses.MeanSquaredError())
    fit(model, data)
    model.save(tmp_path / "model.h5")
    loaded = capture_inputs(keras.models.load_model(tmp_path / "model.h5", compile=compiled_too))
    if not compiled_too:
        loaded.compile(optimizer=paper_isaac(damping=0.1), loss="mse")
    fit(model, data)
    fit(loaded, data)
    assert_close(weights(loaded), weights(model), 1e-6)


OTHERS = [name for name in ("jax", "tensorflow", "torch") if name != BACKEND and importlib.util.find_spec(name)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
def test_a_saved_model_resumes_on_another_backend(backend, tmp_path):
    model = compiled("adam")
    fit(model, regression())
    model.save(tmp_path / "model.keras")
    script = (
        "import sys, keras; from models import fit, regression\n"
        "model = keras.models.load_model(sys.argv[1]); fit(model, regression()); model.save_weights(sys.argv[2])"
    )
    files = tmp_path / "model.keras", tmp_path / "other.weights.h5"
    run_python("-c", "import keras_isaac; " + script, *files, KERAS_BACKEND=backend)
    fit(model, regression())
    other = mlp()
    other.load_weights(tmp_path / "other.weights.h5")
    assert_close(weights(other), weights(model), 1e-5)
