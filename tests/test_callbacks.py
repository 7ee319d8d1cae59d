"""The monitor's numbers, compared with NumPy, where they are kept, and that training does not change."""

import csv
import sys

import keras
import numpy as np
import oracle
import pytest
from harness import BACKEND, conditioning, paper_isaac, to_numpy
from keras import layers
from models import Subclassed, assert_close, captured, fit, mlp, regression, sequences, with_random_weights

from keras_isaac import capture_inputs, measurement
from keras_isaac.callbacks import CurvatureMonitor
from keras_isaac.curvature.rows import KernelCall, Rows

# PyTorch executes one step at a time.
STEPS = 1 if BACKEND == "torch" else 2
QUANTITIES = ("effective_rank", "damped_eigenvalue", "norm_ratio", "cosine")


def expected_spectrum(rows, damping, is_relative=False):
    """The effective rank and the largest eigenvalue over the damping, by singular values in float64."""
    eigenvalues = np.linalg.svd(rows / np.sqrt(len(rows)), compute_uv=False) ** 2
    unit = eigenvalues.sum() / min(rows.shape) if is_relative else 1
    return [eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), eigenvalues.max() / (damping * unit)]


def expected_numbers(rows, gradient, damping):
    """The spectrum, and the norm and the cosine of the conditioned gradient over the plain one's."""
    conditioned = oracle.condition(rows, gradient, damping)
    norms = np.linalg.norm(conditioned), np.linalg.norm(gradient)
    return [*expected_spectrum(rows, damping), norms[0] / norms[1], (conditioned * gradient).sum() / np.prod(norms)]


def numbers(monitor, path, step=-1):
    short = path.removesuffix("/kernel").split("sequential/")[-1]
    return [monitor.history[f"{short}/{quantity}"][step] for quantity in QUANTITIES]


def monitored(model, data, batch, epochs=1, **kwargs):
    monitor = CurvatureMonitor(batch, every_steps=2)
    fit(model, data, epochs=epochs, callbacks=[monitor], **kwargs)
    return monitor


@pytest.mark.often("fewer-rows-relative", "more-rows-")
@pytest.mark.parametrize("options", [{}, {"relative_damping": True}, {"preserve_norm": True}], ids=["", "relative", "norm"])
@pytest.mark.parametrize("num", [4, 16], ids=["fewer-rows", "more-rows"])
def test_dense_layers_after_some_steps(num, options):
    data = regression(64)
    x, y = (each[:num] for each in data)
    model, other = (captured(paper_isaac(0.1, damping=0.2, **options)) for _ in range(2))
    monitor = monitored(model, data, (x, y), batch_size=16)
    assert monitor.history["step"] == [0, 2]
    # The second measurement sees the state after two steps.
    fit(other, [each[:32] for each in data], batch_size=16)
    kernel, bias, top, top_bias = (to_numpy(weight) for weight in other.trainable_variables)
    hidden = np.tanh(x @ kernel + bias)
    error = 2 * (hidden @ top + top_bias - y) / y.size
    gradients = {"head": (hidden, hidden.T @ error), "hidden": (x, x.T @ (error @ top.T * (1 - hidden**2)))}
    for name, (rows, gradient) in gradients.items():
        unit = (rows**2).sum() / len(rows) / min(rows.shape) if "relative_damping" in options else 1
        expected = expected_numbers(rows, gradient, 0.2 * unit)
        if "preserve_norm" in options:
            expected[2] = 1
        path = model.get_layer(name).kernel.path
        np.testing.assert_allclose(numbers(monitor, path), expected, rtol=2e-3)


@pytest.mark.often("relative")
@pytest.mark.parametrize("relative", [False, True], ids=["", "relative"])
def test_tables_groups_and_shared_layers(relative):
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(7, 4, name="table")(tokens)
    x = layers.DepthwiseConv1D(2, name="depthwise")(x)
    shared = layers.Dense(4, name="shared")
    x = shared(shared(x))
    model = with_random_weights(keras.Model(tokens, layers.Dense(3)(layers.Flatten()(x))))
    captured(paper_isaac(damping=0.2, relative_damping=relative), model)
    x, y = sequences(8)
    table = to_numpy(model.get_layer("table").embeddings)
    monitor = monitored(model, (x, y), (x, y))
    frequency = np.bincount(x.ravel(), minlength=7) / x.size
    rank, eigenvalue, *_ = numbers(monitor, "table/embeddings", 0)
    np.testing.assert_allclose(
        [rank, eigenvalue], [1 / (frequency**2).sum(), frequency.max() / (0.2 / 7 if relative else 0.2)], rtol=1e-5
    )
    patches = np.stack([table[x][:, :-1], table[x][:, 1:]], axis=-1).reshape(-1, 4, 2)
    ranks, eigenvalues = zip(*(expected_spectrum(patches[:, channel], 0.2, relative) for channel in range(4)), strict=True)
    rank, eigenvalue, *_ = numbers(monitor, "depthwise/kernel", 0)
    np.testing.assert_allclose(rank, np.mean(ranks), rtol=1e-4)
    np.testing.assert_allclose(eigenvalue, max(eigenvalues), rtol=2e-3)
    assert len(monitor.history) == 1 + 4 * 5
    for path in ("table/embeddings", "depthwise/kernel", "shared/kernel"):
        _, _, norm_ratio, cosine = numbers(monitor, path, 0)
        assert 0 < norm_ratio < 1
        assert norm_ratio < cosine < 1


@pytest.mark.often("relative-reduce")
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("relative", [False, True], ids=["", "relative"])
def test_masked_positions_do_not_count_and_a_nest_of_inputs_is_taken(relative, weight_sharing):
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    x = layers.Embedding(7, 4, mask_zero=True, name="table")(tokens)
    model = with_random_weights(keras.Model({"tokens": tokens}, layers.Dense(3, name="head")(x)))
    captured(paper_isaac(damping=0.2, relative_damping=relative, weight_sharing=weight_sharing), model)
    x, _ = sequences(8)
    x[:, 0], x[0, 3:] = 5, 0
    y = np.zeros((8, 6, 3), "float32")
    embedded, is_token = to_numpy(model.get_layer("table").embeddings)[x], (x != 0)[..., None]
    rows = embedded[x != 0] if weight_sharing == "expand" else (embedded * is_token).sum(1) / is_token.sum(1)
    monitor = CurvatureMonitor(({"tokens": x}, y, np.ones((8, 6), "float32")))
    model.fit({"tokens": x}, y, batch_size=8, verbose=0, callbacks=[monitor])
    np.testing.assert_allclose(numbers(monitor, "head/kernel")[:2], expected_spectrum(rows, 0.2, relative), rtol=2e-3)


@pytest.mark.parametrize("size", [3, 40, 200])
def test_the_largest_eigenvalue_of_a_flat_spectrum(size):
    """Most eigenvalues are close to the largest."""
    spectrum = np.linspace(1.0, 0.9, size)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    rows = rotation * np.sqrt(size * spectrum)[:, None]
    rows = Rows(keras.ops.convert_to_tensor(rows.astype("float32")), size, size, size)
    call = KernelCall((size, 2), rows)
    _, eigenvalue, _ = measurement.spectrum(conditioning(keras.ops.convert_to_tensor(np.float32(0.1))), call)
    assert float(to_numpy(eigenvalue)) == pytest.approx(10, rel=1e-2)


@pytest.mark.often("feature", "Woodbury")
@pytest.mark.parametrize(("num", "max_rows"), [(4, None), (16, None), (16, 2)], ids=["sample", "feature", "Woodbury"])
def test_failed_inverses_are_counted(num, max_rows):
    """The rows overflow in two of three layers."""
    stack = [
        layers.Dense(8, name="first"),
        layers.Dense(8, name="second"),
        layers.Activation("tanh"),
        layers.Dense(2, name="third"),
    ]
    model = captured(paper_isaac(damping=0.1, max_rows=max_rows), keras.Sequential([keras.Input((3, 6)), *stack]))
    x, y = np.random.default_rng(0).normal(size=(num, 3, 6)).astype("float32"), np.zeros((num, 3, 2), "float32")
    expected = {1.0: [0, 0, 0], 1e30: [1, 1, 0]}
    for scale, counts in expected.items():
        monitor = CurvatureMonitor((scale * x, y))
        model.fit(x, y, batch_size=num, callbacks=[monitor], verbose=0)
        assert [monitor.history[f"{name}/fallbacks"][0] for name in ("first", "second", "third")] == counts


def noisy():
    """A network whose forward pass changes all kinds of state."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, kernel_regularizer="l2", activity_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.GaussianNoise(0.1, seed=3),
            layers.Dense(3),
        ]
    )
    return capture_inputs(with_random_weights(model))


@pytest.mark.parametrize("around", ["ISAAC", "LossScaleOptimizer"])
def test_monitoring_does_not_change_training(around):
    runs = []
    for watched in (False, True):
        keras.utils.set_random_seed(1)
        model = noisy()
        optimizer = paper_isaac(0.1, damping=0.3, momentum=0.9, output_damping=1.0 if around == "ISAAC" else None)
        if around == "LossScaleOptimizer":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
        monitor = CurvatureMonitor(regression(8), every_steps=1)
        history = fit(model, regression(64), epochs=2, callbacks=[monitor] if watched else [], validation_data=regression(8))
        state = [to_numpy(v) for v in (*model.variables, *model.optimizer.variables, *model.metrics_variables)]
        losses = {key: values for key, values in history.history.items() if "/" not in key}
        runs.append((losses, state))
    assert runs[0][0] == runs[1][0]
    assert_close(runs[1][1], runs[0][1], 0)
    assert monitor.history["step"] == list(range(8))


def test_progress_lines_are_short_unless_the_numbers_are_logged(capsys):
    model = keras.Sequential([keras.Input((6,)), *[layers.Dense(6) for _ in range(20)], layers.Dense(3)])
    captured(paper_isaac(), model)
    monitor = CurvatureMonitor(regression(8))
    history = fit(model, regression(16), callbacks=[monitor], verbose=2)
    assert list(history.history) == ["loss"]
    assert max(map(len, capsys.readouterr().out.splitlines())) < 100
    assert len(monitor.history) == 1 + 21 * 5


def test_logs_have_the_same_keys_every_epoch(tmp_path):
    model = captured(paper_isaac(), steps_per_execution=STEPS)
    monitor, logger = CurvatureMonitor(regression(8), every_steps=5, log=True), keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(model, regression(64), epochs=3, callbacks=[monitor, logger])
    # Four steps an epoch, one or two at a time.
    assert monitor.history["step"] == [0, 4 + STEPS, *([10] if STEPS == 1 else [])]
    keys = [key for key in monitor.history if key != "step"]
    assert len(keys) == 10
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    for key in keys:
        first, second, *rest = monitor.history[key]
        expected = [first, second, rest[0] if rest else second]
        assert history.history[key] == expected
        assert [float(row[key]) for row in rows] == expected


@pytest.mark.parametrize("eagerly", [False, True], ids=["compiled", "eager"])
def test_a_model_that_is_not_built(eagerly):
    model = captured(paper_isaac(), Subclassed(), run_eagerly=eagerly)
    monitor = monitored(model, regression(32), (*regression(8), np.ones(8, "float32")))
    assert len(monitor.history) == 11


def test_plot(monkeypatch):
    pytest.importorskip("matplotlib")
    model = captured(paper_isaac())
    monitor = CurvatureMonitor(regression(8))
    with pytest.raises(ValueError, match=r"Write `model.fit\(..., callbacks=\[monitor\]\)` first: there is nothing to plot"):
        monitor.plot()
    fit(model, regression(16), callbacks=[monitor])
    axes = monitor.plot().axes
    assert [axis.get_xlabel() for axis in axes] == ["step"] * 4
    assert [axis.get_ylabel() for axis in axes] == [
        "effective rank of the inputs",
        "largest eigenvalue / damping",
        "norm / plain gradient's norm",
        "cosine to the plain gradient",
    ]
    lines = [line for axis in axes for line in axis.get_lines()]
    drawn = {(*line.get_xdata(), *line.get_ydata()) for line in lines}
    assert drawn == {(0, values[0]) for key, values in monitor.history.items() if key.split("/")[-1] in QUANTITIES}
    assert monitor.plot()._repr_png_().startswith(b"\x89PNG")
    assert monitor.plot().get_suptitle() == ""
    monitor.history["hidden/fallbacks"] = [2.0]
    assert monitor.plot().get_suptitle() == "2 inverses failed, and a bound replaced them"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Write `pip install matplotlib`: `plot` needs Matplotlib"):
        monitor.plot()


def test_the_plot_shades_where_the_damping_is_too_high_or_too_low():
    pytest.importorskip("matplotlib")
    for damping, reached in ((1e8, "damping too high"), (1.0, None), (1e-8, "damping too low")):
        model = captured(paper_isaac(damping=damping))
        monitor = CurvatureMonitor(regression(8))
        fit(model, regression(16), callbacks=[monitor])
        axis = monitor.plot().axes[1]
        bands = {text.get_text(): text.get_position()[1] for text in axis.texts}
        assert bands.keys() == {"damping too high", "damping too low"}
        assert len(axis.patches) == 2
        values = monitor.history["hidden/damped_eigenvalue"]
        shaded = {
            name
            for name, patch in zip(bands, axis.patches, strict=True)
            if patch.get_y() <= values[0] <= patch.get_y() + patch.get_height()
        }
        assert shaded == ({reached} if reached else set())
        # The bands are in the picture, and so is the line.
        bottom, top = axis.get_ylim()
        assert all(bottom <= value <= top for value in (*bands.values(), *values))


def test_error_arguments_and_models_that_cannot_be_monitored():
    for data, received in (([1, 2], "list"), (np.ones(3), "ndarray"), ((1,), "tuple and length 1")):
        with pytest.raises(TypeError, match=rf"`data` must be a tuple `\(x, y\)`.* Received: data of type {received}"):
            CurvatureMonitor(data)
    with pytest.raises(TypeError, match=r"write `numpy.asarray\(x\)` for a list\. .* contain 1.5 \(of type float\)"):
        CurvatureMonitor(([1.5], [2.5]))
    for every_steps in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"`every_steps` must be an integer above 0. Received: every_steps={every_steps}"):
            CurvatureMonitor(regression(8), every_steps)
    with pytest.raises(ValueError, match=r"`log` must be a boolean\. Received: log='cosine'"):
        CurvatureMonitor(regression(8), log="cosine")
    for optimizer, capture, message in (
        ("sgd", capture_inputs, "Compile the model with `keras_isaac.ISAAC`"),
        # On JAX, the model raises before the callback does.
        (paper_isaac(), lambda model: model, r"Write `model = (keras_isaac\.)?capture_inputs\(model\)`"),
    ):
        model = capture(mlp())
        model.compile(optimizer=optimizer, loss="mse")
        with pytest.raises(ValueError, match=message):
            fit(model, regression(16), callbacks=[CurvatureMonitor(regression(8))])
    # Keras' own message on inputs that do not fit, as in `fit`.
    model = captured(paper_isaac())
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 6") as error:
        fit(model, regression(16), callbacks=[CurvatureMonitor(regression(8, features=5))])
    assert "Function" not in str(error.value)
