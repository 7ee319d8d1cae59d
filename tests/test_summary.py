import inspect
import re

import keras
import numpy as np
import pytest
from cases import OFTEN, data, each_case
from harness import paper_isaac
from keras import layers
from models import assert_close, captured, mlp, sequence_network, sequences, weights

import keras_isaac
from keras_isaac import capture_inputs, kernel_status
from keras_isaac.curvature import conditioner


@each_case()
@pytest.mark.often(*OFTEN)
def test_the_rows_are_those_of_training(case):
    layer, inputs, _ = data(case)
    tensor = keras.Input(batch_shape=inputs.shape, dtype=inputs.dtype)
    model = keras.Model(tensor, layer(tensor))
    # The layer is not captured.
    found = {status.path: status for status in keras_isaac.summary(model)}
    kernels = {id(kernel): kernel for kernel in layer.trainable_variables}
    for key, (rows, matrix_of) in case.read(layer, inputs).items():
        kernel = kernels[key]
        status = found[kernel.path]
        groups, num_rows, num_in = rows.shape
        # A table counts tokens; the rows of LoRA's second factor are vectors that were looked up.
        is_table = case.vocabulary and not kernel.name.endswith("_b")
        if is_table:
            num_rows = inputs.size
        assert (status.groups, status.rows, status.num_in) == (groups, num_rows, num_in)
        assert matrix_of(np.zeros(kernel.shape)).shape == (groups, num_in, status.num_out)
        products = 0 if is_table else 3 * groups * num_rows * num_in * status.num_out
        assert (status.calls, status.multiplications, status.added) == (1, products, 0)
        assert status.reason == "not captured"


@pytest.mark.parametrize(
    ("options", "forms"),
    [
        ({}, {"diagonal", "feature", "sample"}),
        ({"max_rows": 5}, {"diagonal", "sample", "Woodbury"}),
        ({"weight_sharing": "reduce"}, {"diagonal", "sample", "Woodbury"}),
    ],
    ids=["all-rows", "max-rows", "reduce"],
)
def test_a_step_computes_the_inverses_of_the_table(options, forms, monkeypatch):
    def recording(function):
        def recorded(matrix, *arguments):
            sizes.append(matrix.shape[-1])
            return function(matrix, *arguments)

        return recorded

    sizes = []
    for name in ("sample_side", "condition"):
        # Without the traces that calls of the same shape share.
        monkeypatch.setattr(conditioner, name, inspect.unwrap(getattr(conditioner, name)))
    for name in ("damped_inverse_root", "damped_projection"):
        monkeypatch.setattr(conditioner, name, recording(getattr(conditioner, name)))
    x, y = sequences(num=4)
    model = captured(paper_isaac(**options), sequence_network())
    found = keras_isaac.summary(model, batch_size=4)
    assert sizes == []
    model.train_on_batch(x, y)
    assert {status.form for status in found} == forms
    size_of = {"sample": "rows", "Woodbury": "num_sampled", "feature": "num_in"}
    assert sorted(sizes) == sorted(getattr(status, size_of[status.form]) for status in found if status.form != "diagonal")


def test_multiplications():
    """The expected numbers are worked out by hand."""
    inputs = keras.Input((16, 20))
    hidden = layers.Dense(12, name="long")(inputs)
    hidden = layers.Dense(12, name="long_too", trainable=False)(hidden)
    model = capture_inputs(keras.Model(inputs, layers.Dense(3, name="wide")(layers.Flatten()(hidden))))
    long, frozen, wide = keras_isaac.summary(model, batch_size=5)
    # No more than the budget's 64 rows of 80.
    assert (long.form, long.num_sampled) == ("feature", 64)
    assert (long.multiplications, long.added) == (3 * 80 * 20 * 12, 64 * 20**2 + 20**3 + 20**2 * 12)
    assert (frozen.reason, frozen.multiplications, frozen.added) == ("frozen", 2 * 80 * 12 * 12, 0)
    assert (wide.form, wide.added) == ("sample", 5**2 * 192 + 5**3 + 5**2 * 3)
    model.compile(optimizer=paper_isaac(max_rows=10, output_damping=1.0))
    long, _, wide = keras_isaac.summary(model, batch_size=5)
    assert (long.form, long.num_sampled) == ("Woodbury", 10)
    outputs = 2 * 10**2 * 12 + 10**3 + 2 * 10 * 12 * 20
    assert long.added == 2 * 10**2 * 20 + 10**3 + 2 * 10 * 20 * 12 + outputs
    # Five rows and three outputs: the feature side.
    assert wide.added == 5**2 * 192 + 5**3 + 5**2 * 3 + 5 * 3**2 + 3**3 + 3**2 * 192


def test_the_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    model = capture_inputs(mlp(features=200, width=100), exclude=".*head")
    model.compile(optimizer="sgd")
    keras_isaac.summary(model, batch_size=60)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 90
    text = " ".join(printed.split())
    # P takes 60² · 200 + 60³ + 60² · 100 multiplications, the layer 3 · 60 · 200 · 100, and the head 3 · 60 · 100 · 3.
    assert re.search(r"hidden/\S+ 60 x 200 x 100 sample \+35.5% ", text)
    assert re.search(r"head/\S+ 60 x 100 x 3 plain: not captured", text)
    assert "The model is compiled with SGD, which conditions nothing. Under ISAAC: 1 of 2 trainable kernels are" in text
    assert text.endswith("(20,000 of 20,300 parameters, 98.5%). Multiplications added to a step: +35.5%.")


def test_a_long_name_wraps_and_no_column_is_lost(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    hidden = layers.Dense(64, name="position_embedding")
    model = keras.Sequential([keras.Input((48, 64)), hidden, layers.Dense(128, name="d" * 50)], name="decoder_of_a_transformer")
    capture_inputs(model).compile(optimizer=paper_isaac(max_rows=1024))
    keras_isaac.summary(model, batch_size=16)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["Kernel", "(layer)", "Rows,", "in,", "out", "Form", "Added"]
    assert re.search(r"^decoder_of_a_transformer\S+ +768 x 64 x 64 +feature +\+\d+.\d%$", lines[3]), lines
    names = "".join(line.split(" ")[0] for line in lines[3:-2]).split("(Dense)")
    assert names[:2] == [f"decoder_of_a_transformer/{name}/kernel" for name in ("position_embedding", "d" * 50)]


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (layers.Conv1D(4, 3, name="costly"), "write ISAAC(max_rows=288) or capture_inputs(model, exclude=...)."),
        (layers.Dense(40, name="costly"), "write ISAAC(max_rows=320) or capture_inputs(model, exclude=...)."),
    ],
    ids=["convolution", "dense"],
)
def test_a_high_cost_names_the_costliest_kernel_and_a_remedy(layer, advice, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    inputs = keras.Input((20, 40))
    model = capture_inputs(keras.Model(inputs, layers.Dense(3, name="head")(layer(inputs)[:, 0])))
    model.compile(optimizer=paper_isaac(max_rows=1024))
    _, head = keras_isaac.summary(model, batch_size=32)
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Costliest: costly/kernel \(\+[\d.]+%\)\. To lower this, " + re.escape(advice), text), text
    # Half of what the small kernel itself takes, or more, but little of the whole.
    assert head.added > 0.5 * head.multiplications
    assert re.search(r"head/kernel 32 x \d+ x 3 (feature|sample) \+[0-9]\.\d%", text), text


def test_the_budget_of_rows_is_explained_where_it_applies(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    inputs = keras.Input((20, 40))
    model = capture_inputs(keras.Model(inputs, layers.Dense(40)(inputs)))
    budget = "as many as add 10% to a layer whose positions share its kernel and 100% to another."
    for options, batch_size, is_explained in (({}, 32, True), ({}, 2, False), ({"max_rows": 128}, 32, False)):
        model.compile(optimizer=keras_isaac.ISAAC(**options))
        (status,) = keras_isaac.summary(model, batch_size)
        assert (status.num_sampled < status.rows) == (batch_size == 32)
        assert (budget in " ".join(capsys.readouterr().out.split())) == is_explained


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": np.ones((64, 8))}, TypeError, r"`batch_size` must be an integer\. .*array.* \(of type ndarray\)"),
        ({"batch_size": "64"}, TypeError, r"`batch_size` must be an integer\. .*batch_size='64' \(of type str\)"),
        ({"batch_size": 64.0}, TypeError, r"`batch_size` must be an integer\. .*batch_size=64.0 \(of type float\)"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be above 0. Received: batch_size=0"),
        ({"inputs": "abc"}, TypeError, r"`inputs` must be an array or a nest of arrays: write `summary\(model, inputs=x\)`"),
        ({"inputs": (None, 6)}, TypeError, "`inputs` must be an array or a nest of arrays"),
        ({"inputs": [[1.0] * 6]}, TypeError, "`inputs` must be an array or a nest of arrays"),
        ({"model": layers.Dense(3)}, TypeError, r"`summary` takes a `keras.Model`\. Received: model=.* \(of type Dense\)"),
    ],
    ids=["array", "string", "float", "zero", "inputs-string", "inputs-shape", "inputs-list", "layer"],
)
def test_error_arguments_of_another_kind(arguments, error, message):
    with pytest.raises(error, match=message):
        keras_isaac.summary(**{"model": mlp(), **arguments})


def test_inputs_that_do_not_fit_are_keras_own_error():
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 6") as error:
        keras_isaac.summary(mlp(), inputs=np.ones((2, 5), "float32"))
    # Without Keras' advice on how to write the layer that the package traces.
    assert "compute_output_s" not in str(error.value)


def test_an_integer_of_numpy_is_a_batch_size(capsys):
    assert keras_isaac.summary(mlp(), np.int64(5))[0].rows == 5
    assert "batch size 5" in capsys.readouterr().out


def test_frozen_kernels_are_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(4, name="a_long_name_of_a_layer", trainable=False), layers.Dense(3, name="head")],
        name="a_long_name_of_a_model",
    )
    assert [status.reason for status in keras_isaac.summary(capture_inputs(model))] == ["frozen", None]
    printed = capsys.readouterr().out
    assert "a_long_name_of_a_model/head/kernel" in printed
    assert "a_long_name_of_a_layer" not in printed
    assert "Not shown: 1 frozen (24 parameters)" in " ".join(printed.split())
    keras_isaac.summary(model, show_frozen=True)
    printed = capsys.readouterr().out
    assert "a_long_name_of_a_model/a_long_name_of_a_layer/kernel" in printed
    assert "Not shown" not in printed


def test_a_notebook_prints_the_table_alone():
    statuses = keras_isaac.summary(mlp())
    # IPython calls this instead of printing the list.
    assert statuses._ipython_display_() is None
    assert isinstance(statuses, list)


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.table, self.unused, self.top = layers.Embedding(9, 3), layers.Dense(2), layers.Dense(3)

    def call(self, inputs):
        if not self.unused.built:
            self.unused(keras.ops.ones((1, 3)))
        return self.top(self.top(self.table(inputs["tokens"])))


def test_a_subclassed_model_and_shared_layers():
    model = Own()
    tokens = {"tokens": np.ones((3, 4), "int32")}
    with pytest.raises(ValueError, match=r"`summary` needs a model that is built\. Give '.*' an `Input`, or call it"):
        keras_isaac.summary(model)
    model(tokens)
    before = weights(model)
    table, unused, top = keras_isaac.summary(capture_inputs(model), batch_size=8)
    assert (table.form, table.rows, table.added) == ("diagonal", 32, 9 + 32 * 3)
    assert unused.reason == "not called in training"
    assert (top.calls, top.rows, top.multiplications) == (2, 32, 2 * 3 * 32 * 3 * 3)
    assert top.added == 2 * (32 * 3**2 + 3**3 + 3**2 * 3)
    assert_close(weights(model), before, 0)


def test_unknown_sizes():
    model = capture_inputs(keras.Sequential([keras.Input((None, 4)), layers.Dense(3)]))
    with pytest.raises(ValueError, match=r"Write `summary\(model, inputs=x\)` with a batch of inputs.*\(None, None, 4\)"):
        keras_isaac.summary(model)
    assert keras_isaac.summary(model, inputs=np.ones((2, 5, 4)))[0].rows == 10
    assert keras_isaac.summary(model, batch_size=8, inputs=np.ones((2, 5, 4)))[0].rows == 40


@pytest.mark.skipif(not hasattr(keras.optimizers, "OptimizerMap"), reason="an older Keras has no OptimizerMap")
def test_kernels_of_another_optimizer_are_plain():
    model = capture_inputs(mlp())
    inner = keras.optimizers.OptimizerMap(keras.optimizers.SGD(), {".*head.*": paper_isaac()})
    model.compile(optimizer=keras.optimizers.MultiOptimizer(inner), loss="mse")
    model.optimizer.build(model.trainable_variables)
    hidden, head = keras_isaac.summary(model)
    assert (hidden.reason, hidden.added) == ("trained by another optimizer", 0)
    assert (head.reason, head.form) == (None, "feature")


def test_every_kernel_is_accounted_for():
    inputs = keras.Input((8, 6))
    hidden = layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    hidden = layers.LayerNormalization()(hidden)
    hidden = layers.LSTM(4, name="lstm")(hidden)
    hidden = layers.Dense(4, name="frozen", trainable=False)(hidden)
    hidden = layers.Dense(4, name="excluded")(hidden)
    low_rank = layers.Dense(4, name="lora")
    model = keras.Model(inputs, layers.Dense(2, name="head")(low_rank(hidden)))
    low_rank.enable_lora(2)
    assert {status.reason for status in kernel_status(model) if "head" in status.path} == {"not captured"}
    capture_inputs(model, exclude="excluded")
    reasons = {status.path: status.reason for status in kernel_status(model)}
    assert set(reasons) == {w.path for w in model.weights if len(w.shape) >= 2 and w.name != "bias"}
    assert [reasons[f"attention/{part}/kernel"] for part in ("query", "key", "value", "attention_output")] == [None] * 4
    assert reasons["lstm/lstm_cell/kernel"] is reasons["lstm/lstm_cell/recurrent_kernel"] is None
    assert reasons["frozen/kernel"] == reasons["lora/kernel"] == "frozen"
    assert reasons["excluded/kernel"] == "not captured"
    assert reasons["lora/lora_kernel_a"] is reasons["lora/lora_kernel_b"] is None
    assert reasons["head/kernel"] is None
