"""The invariants of every captured layer, over the table of cases."""

import keras
import numpy as np
import pytest
from cases import CALLED, CASES, OFTEN, PRODUCTS, assert_conditioned, data, each_case
from harness import BACKEND, each_mode, paper_isaac, run, step_of, to_numpy
from models import assert_close, captured
from oracle import relative_error

from keras_isaac import capture_inputs

# An older Keras has not both.
each_table = pytest.mark.parametrize(
    "kind", [each for each in ("Embedding", "ReversibleEmbedding") if hasattr(keras.layers, each)]
)


@each_case()
@pytest.mark.often(*OFTEN)
def test_output_outside_a_training_step_is_the_plain_layers(case):
    layer, inputs, _ = data(case)
    plain = keras.ops.convert_to_numpy(layer(inputs))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(capture_inputs(layer)(inputs)), plain)


@each_case([*CASES, *CALLED])
@each_mode
@pytest.mark.often("compiled-*", *(f"eager-{name}" for name in OFTEN if name != "steps-conv2d-groups"))
def test_only_kernel_gradients_differ_from_the_plain_layers_and_are_the_oracles(case, compiled):
    layer, inputs, cotangent = data(case)
    plain = run(layer, inputs, cotangent, compiled=compiled)
    reading = case.read(layer, inputs)
    capture_inputs(layer)
    assert_close(run(layer, inputs, cotangent, compiled=compiled).gradients, plain.gradients, 0)
    optimizer = paper_isaac()
    step = step_of(layer, inputs, cotangent, optimizer, compiled)
    for damping in (1e-4, 0.1, 1.0, 30.0):
        optimizer.damping = damping
        conditioned = step()
        assert relative_error(conditioned.outputs, plain.outputs) < 1e-6
        if plain.input_gradient is not None:
            assert relative_error(conditioned.input_gradient, plain.input_gradient) < 1e-6
        assert_conditioned(layer, reading, plain.gradients, conditioned.gradients, damping)


@each_case()
@pytest.mark.often(*OFTEN)
def test_huge_damping_gives_the_plain_gradient_and_any_a_direction_of_increase(case):
    layer, inputs, cotangent = data(case)
    plain = run(layer, inputs, cotangent)
    capture_inputs(layer)
    optimizer = paper_isaac()
    step = step_of(layer, inputs, cotangent, optimizer)
    for damping in (1e-6, 1e-2, 1.0, 1e2, 1e8):
        optimizer.damping = damping
        for actual, theirs in zip(step().gradients, plain.gradients, strict=True):
            assert np.sum(actual * theirs) > 0
            if damping == 1e8:
                assert relative_error(actual, theirs) < 1e-6


class Counter(keras.layers.Layer):
    """Counts how often Python runs it: once a trace where the step is compiled, once a step where it is eager."""

    count = 0

    def call(self, inputs):
        Counter.count += 1
        return inputs


@each_case()
@pytest.mark.often(*OFTEN)
def test_second_step_compiles_nothing(case):
    layer, inputs, _ = data(case)
    model = keras.Sequential([keras.Input(inputs.shape[1:], dtype=inputs.dtype.name), Counter(), layer])
    captured(paper_isaac(learning_rate=1e-3), model)
    targets = np.zeros(layer.compute_output_shape(inputs.shape), "float32")
    before = Counter.count
    model.train_on_batch(inputs, targets)
    first = Counter.count
    for _ in range(3):
        model.train_on_batch(inputs, targets)
    assert first > before
    # Eager PyTorch runs the layer's Python code in each step, and compiles nothing to begin with.
    assert Counter.count == (first + 3 if BACKEND == "torch" else first)


def _updated_weights(case, compiled):
    """Returns the trainable weights after one training step from the weights of the case, traced anew if `compiled`."""
    keras.utils.set_random_seed(0)
    layer, inputs, cotangent = data(case)
    model = capture_inputs(keras.Sequential([keras.Input(inputs.shape[1:], dtype=inputs.dtype.name), layer]))
    # The loss is linear in the outputs, so the gradient of a factor of LoRA does not depend on the factor. Only the order
    # of the graph makes its update wait for the gradients that read it.
    loss = lambda targets, outputs: keras.ops.sum(targets * outputs) / len(inputs)  # noqa: E731
    model.compile(paper_isaac(learning_rate=1.0, damping=0.3), loss, run_eagerly=not compiled, jit_compile=False)
    model.train_on_batch(inputs, cotangent)
    return [to_numpy(weight) for weight in model.trainable_variables]


@pytest.mark.skipif(BACKEND == "jax", reason="JAX traces functions without variables")
@each_case(PRODUCTS)
@pytest.mark.parametrize("num_traces", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.often(*(f"5-{name}" for name in OFTEN), "5-*lora*")
def test_every_trace_of_a_step_gives_the_result_of_the_eager_step(case, num_traces):
    first = _updated_weights(case, compiled=True)
    # A graph may add the terms of a sum in another order.
    assert_close(first, _updated_weights(case, compiled=False), 1e-6)
    for _ in range(num_traces - 1):
        assert_close(_updated_weights(case, compiled=True), first, 0)


@each_case()
@pytest.mark.often(*OFTEN)
def test_saved_file_is_the_plain_models(case, tmp_path):
    layer, inputs, _ = data(case)
    model = keras.Sequential([keras.Input(inputs.shape[1:], dtype=inputs.dtype.name), layer])
    before, paths, config = model.predict(inputs, verbose=0), [w.path for w in model.weights], model.get_config()
    capture_inputs(model)
    assert [w.path for w in model.weights] == paths
    assert model.get_config() == config
    assert type(model) is keras.Sequential
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert "call" not in vars(loaded.layers[-1])
    np.testing.assert_allclose(loaded.predict(inputs, verbose=0), before, atol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has ragged tensors")
@each_table
@pytest.mark.parametrize("preserve_norm", [False, True])
def test_ragged_and_sparse_tokens_are_conditioned_as_dense_ones(kind, preserve_norm):
    import tensorflow as tf

    layer = capture_inputs(getattr(keras.layers, kind)(5, 3))
    layer.build((None, None))
    ragged = tf.ragged.constant([[1, 3, 3], [4]])
    sparse = tf.sparse.from_dense([[1, 3, 3], [4, 0, 0]])
    optimizer = paper_isaac(damping=0.1, preserve_norm=preserve_norm)
    for tokens, dense in [(ragged, ragged.flat_values), (sparse, tf.sparse.to_dense(sparse))]:
        outputs, gradients = [], []
        for each in (tokens, dense):
            with tf.GradientTape() as tape, optimizer.conditioning():
                output = layer(each)
                loss = tf.reduce_sum(tf.exp(getattr(output, "flat_values", output)))
            outputs.append(output)
            gradients.append(to_numpy(tape.gradient(loss, layer.embeddings.value)))
        assert type(outputs[0]) is type(tokens if tokens is ragged else dense)
        np.testing.assert_array_equal(*gradients)
        assert np.abs(gradients[0]).max() > 0


@pytest.mark.skipif(BACKEND != "jax", reason="the sparse tensors of JAX")
@each_table
def test_sparse_tokens_of_jax_are_conditioned_as_dense_ones(kind):
    from jax.experimental.sparse import BCOO

    layer = capture_inputs(getattr(keras.layers, kind)(5, 3))
    tokens, cotangent = np.array([[1, 3, 3], [4, 0, 0]]), np.random.default_rng(0).normal(size=(2, 3, 3)).astype("float32")
    sparse, dense = (run(layer, each, cotangent, paper_isaac(damping=0.1)) for each in (BCOO.fromdense(tokens), tokens))
    np.testing.assert_array_equal(sparse.outputs, dense.outputs)
    np.testing.assert_array_equal(*(each.gradients[0] for each in (sparse, dense)))


@each_table
@pytest.mark.parametrize("options", [{}, {"preserve_norm": True}], ids=["as it comes", "preserve_norm"])
@pytest.mark.parametrize("rank", [None, 2], ids=["table", "LoRA"])
def test_negative_tokens_count_from_the_end_of_the_table_as_keras_looks_them_up(kind, options, rank):
    layer = getattr(keras.layers, kind)(5, 3)
    layer.build((None, None))
    if rank:
        layer.enable_lora(rank)
    capture_inputs(layer)
    cotangent = np.random.default_rng(0).normal(size=(2, 3, 3)).astype("float32")
    tokens = np.array([[1, -2, 3], [4, 0, -1]], "int32")
    negative, positive = (
        run(layer, each, cotangent, paper_isaac(damping=0.1, **options)) for each in (tokens, tokens % layer.input_dim)
    )
    np.testing.assert_array_equal(negative.outputs, positive.outputs)
    assert_close(negative.gradients, positive.gradients, 1e-6)
