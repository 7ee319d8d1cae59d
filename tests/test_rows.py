"""Which rows condition a kernel: `weight_sharing`, `max_rows`, sums and masks, each against its float64 formula."""

import itertools

import keras
import numpy as np
import oracle
import pytest
from harness import (
    BACKEND,
    IS_COMPILED,
    conditioning,
    each_mode,
    jit,
    normal,
    paper_isaac,
    plain_and_conditioned,
    run,
    to_numpy,
)
from keras import layers, ops
from oracle import relative_error
from readings import Calling
from readings import patches as numpy_patches

from keras_isaac import capture_inputs
from keras_isaac.curvature import plan
from keras_isaac.curvature.rows import KernelCall, Rows, condensed, sampled_rows
from keras_isaac.layers.patches import Window, patches


def layer_and_data(layer, *shape):
    layer.build(shape)
    return layer, *normal(shape, layer.compute_output_shape(shape))


def kernel_gradients(layer, inputs, cotangent, compiled=IS_COMPILED, **options):
    """The gradient of the first kernel, plain and conditioned."""
    return [gradients[0] for gradients in plain_and_conditioned(layer, inputs, cotangent, compiled, **options)]


def sums(rows, num_sums):
    """Sums of rows that are `num_sums` apart, under fixed random signs, scaled so that their covariance is the rows'."""
    num_rows = len(rows)
    if num_sums >= num_rows:
        return rows
    index, signs = np.arange(num_rows), np.random.default_rng(0).choice([-1, 1], 2048)
    signs = signs[-1 - index // 2048] * signs[index % 2048]
    total = np.zeros((num_sums, rows.shape[1]))
    np.add.at(total, index % num_sums, signs[:, None] * rows)
    return total * np.sqrt(num_sums / num_rows)


@pytest.mark.often("8-1-*", "64-5-*", "8-20-*", "64-None-*")
@each_mode
@pytest.mark.parametrize("max_rows", [1, 5, 8, 20, 39, 40, 1000, None])
@pytest.mark.parametrize("features", [8, 64])
def test_max_rows_in_a_sequence(max_rows, features, compiled):
    layer, inputs, cotangent = layer_and_data(layers.Dense(3), 4, 10, features)
    plain, conditioned = kernel_gradients(layer, inputs, cotangent, compiled, max_rows=max_rows)
    rows = sums(inputs.reshape(40, features), max_rows or 40)
    assert relative_error(conditioned, oracle.condition(rows, plain, 0.3)) < 2e-5


def test_sums_of_rows_have_the_covariance_of_the_rows():
    """Its mean over many signs, and to within what so many sums can tell, under the signs in use."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(1024, 8)) * 2.0 ** -np.arange(8) + 0.5
    covariance = rows.T @ rows / len(rows)
    values = ops.convert_to_tensor(rows[None].astype("float32"))
    kept = condensed(Rows(values, 1024, 1024, 1024, is_shared=True), (1, 8, 4), conditioning(1.0, max_rows=64))
    summed = to_numpy(kept.values)[0]
    assert summed.shape == (64, 8)
    assert relative_error(summed.T @ summed / kept.num_sampled, covariance) < 2 * np.sqrt(2 / 64)


def test_the_damping_has_the_same_unit_for_any_number_of_rows():
    """The rows are equal, so that any number of them estimates their covariance exactly, up to the signs."""
    layer, inputs, cotangent = layer_and_data(layers.Dense(3), 8, 32, 48)
    inputs[:] = np.repeat(inputs.reshape(256, 48)[::64], 64, axis=0).reshape(8, 32, 48)
    plain = run(layer, inputs, cotangent).gradients[0]
    capture_inputs(layer)
    norms = []
    for max_rows in (8, 16, 32, 64, 128, None):
        optimizer = paper_isaac(damping=1.0, relative_damping=True, max_rows=max_rows)
        norms.append(np.linalg.norm(run(layer, inputs, cotangent, optimizer).gradients[0]) / np.linalg.norm(plain))
    # Signs leave some noise. With the unit of the rows taken, 8 rows would have 6 times the damping of 48.
    assert max(norms) / min(norms) < 1.25


def test_the_budget_bounds_what_conditioning_adds():
    for num_total, num_in, num_out in itertools.product((100, 2_000, 50_000), (27, 128, 1024), (8, 128, 4096)):
        kept = plan.num_kept(num_total, num_in, num_out, True, None)
        assert plan.MIN_ROWS <= kept <= plan.NUM_READ
        rows = Rows(np.zeros((kept, num_in)), kept, num_total, num_total, is_shared=True)
        added = plan.added_multiplications(KernelCall((num_in, num_out), rows))
        assert kept == plan.MIN_ROWS or added <= plan.BUDGET * 3 * num_total * num_in * num_out
    assert plan.num_kept(50_000, 128, 128, True, None) > plan.num_kept(2_000, 128, 128, True, None)
    assert plan.num_kept(None, 128, 128, True, None) == plan.MIN_ROWS
    assert plan.num_kept(2_000, 128, 128, True, 7) == 7


@each_mode
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(("batch", "features", "units", "num_sums"), [(40, 32, 1, 8), (40, 32, 32, None), (5000, 32, 2, 512)])
def test_a_narrow_layer_of_a_plain_batch_is_conditioned_on_sums(batch, features, units, num_sums, has_mask, compiled):
    """As many as double its multiplications, where their number is known. One mask value for each sample leaves some out."""
    if BACKEND == "tensorflow" and compiled:
        # As in `fit`, a graph of TensorFlow does not know the batch size, and all samples condition the kernel.
        num_sums = None
    layer, inputs, cotangent = layer_and_data(layers.Dense(units), batch, features)
    mask = np.arange(batch) % 4 > 0
    if has_mask:
        layer = keras.Sequential([layers.Masking(), layer])
        inputs[~mask] = 0
    plain, conditioned = kernel_gradients(layer, inputs, cotangent, compiled, max_rows=None)
    num_valid = mask.sum() if has_mask else batch
    damping = 0.3 * num_valid / batch
    rows = inputs if num_sums is None else sums(inputs, num_sums)
    assert relative_error(conditioned, oracle.condition(rows, plain, damping)) < 5e-5
    _, exact = kernel_gradients(layer, inputs, cotangent, compiled, max_rows=1024)
    assert relative_error(exact, oracle.condition(inputs, plain, damping)) < 5e-5


def test_the_budget_of_a_plain_batch_is_what_the_layer_itself_costs():
    for num_total, num_in, num_out in itertools.product((4, 60, 1000), (2, 64, 1024), (1, 64, 1024)):
        kept = plan.num_kept(num_total, num_in, num_out, False, None)
        rows = Rows(np.zeros((kept or num_total, num_in)), num_total, num_total, num_total)
        added = plan.added_multiplications(KernelCall((num_in, num_out), rows, has_product=kept is None))
        assert kept == plan.PLAIN_MIN_ROWS or added <= plan.PLAIN_BUDGET * 3 * num_total * num_in * num_out
    assert plan.num_kept(60, 400, 400, False, None) is None
    assert plan.num_kept(60, 400, 1, False, None) == plan.PLAIN_MIN_ROWS
    assert plan.num_kept(None, 400, 1, False, None) is None
    assert plan.num_kept(60, 400, 1, False, 1024) is None


def test_rows_are_spread_over_samples_and_positions(monkeypatch):
    monkeypatch.setattr(plan, "NUM_READ", 128)
    positions = np.arange(64 * 16).reshape(64, 16, 1).astype("float32")
    rows = sampled_rows(ops.convert_to_tensor(positions), conditioning(1.0))
    chosen = to_numpy(rows.values).astype(int).ravel()
    assert (rows.num_sampled, rows.num_valid, rows.num_total) == (128, 64 * 16, 64 * 16)
    assert len(set(chosen)) == 128
    # Every sample has its share, and no position of the sequence is favoured.
    np.testing.assert_array_equal(np.bincount(chosen // 16, minlength=64), 2)
    assert np.bincount(chosen % 16, minlength=16).max() <= 128 / 16 + 2
    assert np.bincount(chosen % 16, minlength=16).min() >= 128 / 16 - 2


@each_mode
def test_a_layer_without_shared_positions_uses_its_whole_batch(compiled):
    layer, inputs, cotangent = layer_and_data(layers.Dense(3), 20, 8)
    plain, conditioned = kernel_gradients(layer, inputs, cotangent, compiled, max_rows=2)
    assert relative_error(conditioned, oracle.condition(inputs, plain, 0.3)) < 2e-5


# A layer, the shape of its inputs, and how many features its kernel reads from each mean over positions.
REDUCED = {
    "dense": (lambda: layers.Dense(3), (4, 10, 8)),
    "einsum": (lambda: layers.EinsumDense("abcd,cde->abe", (5, 3)), (4, 5, 2, 3)),
    "convolution": (lambda: layers.Conv2D(3, 3, padding="same", strides=2), (4, 5, 6, 2)),
}


@each_mode
@pytest.mark.parametrize("max_rows", [2, 1024])
@pytest.mark.parametrize("kind", REDUCED)
@pytest.mark.often("*-1024-*", "dense-2-*")
def test_reduce_takes_the_mean_of_each_samples_positions(kind, max_rows, compiled):
    make, shape = REDUCED[kind]
    layer, inputs, cotangent = layer_and_data(make(), *shape)
    positions = (numpy_patches(layer, inputs) if kind == "convolution" else inputs).astype("float64")
    options = {"weight_sharing": "reduce", "max_rows": max_rows}
    plain, conditioned = (each.reshape(-1, 3) for each in kernel_gradients(layer, inputs, cotangent, compiled, **options))
    rows = sums(positions.reshape(4, -1, len(plain)).mean(axis=1), max_rows)
    assert relative_error(conditioned, oracle.condition(rows, plain, 0.3)) < 2e-5


@each_mode
@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("kind", ["reduced", "masked"])
def test_groups_of_a_sequence_whether_reduced_or_masked(kind, samples, compiled):
    """As many samples as groups, too: no axis of samples stands for that of the groups."""
    layer, inputs, cotangent = layer_and_data(layers.EinsumDense("abcd,ecd->aceb", (2, 3, 4)), samples, 4, 2, 5)
    options, rows = {"weight_sharing": "reduce"}, inputs.mean(axis=1)
    if kind == "masked":
        inputs[0, 1:] = 0
        options, rows = {}, np.concatenate([inputs[0, :1], *inputs[1:]])
        layer = keras.Sequential([keras.Input(inputs.shape[1:]), layers.Masking(), layer])
    plain, conditioned = kernel_gradients(layer, inputs, cotangent, compiled, **options)
    for group in range(2):
        # The kernel is [out, groups, in].
        expected = oracle.condition(rows[:, group].astype("float64"), plain[:, group].T, 0.3).T
        assert relative_error(conditioned[:, group], expected) < 2e-5


@pytest.mark.often("*-7-compiled")
@each_mode
@pytest.mark.parametrize("max_rows", [1, 7, 30, 64, 1000])
@pytest.mark.parametrize(
    ("shape", "strides", "dilation_rate", "padding"),
    [
        ((8, 9, 8, 2), (1, 1), (1, 1), "same"),
        ((100, 4, 4, 2), (1, 1), (1, 1), "same"),
        ((8, 9, 8, 2), (3, 2), (1, 1), "same"),
        ((8, 9, 8, 2), (1, 1), (2, 3), "valid"),
    ],
    ids=["few samples", "many", "strides", "dilated"],
)
def test_max_rows_in_a_convolution(shape, strides, dilation_rate, padding, max_rows, compiled, monkeypatch):
    monkeypatch.setattr(plan, "NUM_READ", 100)
    layer = layers.Conv2D(3, 3, strides=strides, padding=padding, dilation_rate=dilation_rate)
    layer, inputs, cotangent = layer_and_data(layer, *shape)
    options = Window((3, 3), strides, dilation_rate, padding), conditioning(1.0, max_rows=max_rows)
    kept = to_numpy(jit(lambda x: patches(x, *options).values)(ops.convert_to_tensor(inputs)))
    every = {patch.tobytes() for patch in numpy_patches(layer, inputs)}
    limit = min(max(100, max_rows), len(every))
    assert limit / 3 <= len(kept) <= limit
    assert {patch.astype("float32").tobytes() for patch in kept} <= every
    plain, conditioned = kernel_gradients(layer, inputs, cotangent, compiled, max_rows=max_rows)
    expected = oracle.condition(sums(kept.reshape(-1, 18), max_rows), plain.reshape(18, 3), 0.3)
    assert relative_error(conditioned.reshape(18, 3), expected) < 2e-5


def test_kept_patches_of_a_convolution_are_on_an_even_grid(monkeypatch):
    monkeypatch.setattr(plan, "NUM_READ", 4 * 16)
    image = np.stack(np.meshgrid(np.arange(12), np.arange(12), indexing="ij"), -1).astype("float32")
    images = ops.convert_to_tensor(np.stack([image] * 4))
    kept = to_numpy(patches(images, Window((1, 1), (1, 1), (1, 1), "valid"), conditioning(1.0)).values)
    grid = {tuple(place) for place in kept.reshape(-1, 2).astype(int)}
    assert grid == set(itertools.product([1, 4, 7, 10], repeat=2))


def masked_gradients(layer, tokens, compiled=IS_COMPILED, **options):
    """The gradient of a kernel that reads an embedding of the tokens, plain and conditioned; and the table."""
    inputs, table = keras.Input((6,), dtype="int32"), layers.Embedding(9, 8, mask_zero=True, trainable=False)
    model = keras.Model(inputs, layer(table(inputs)))
    (cotangent,) = normal(model.compute_output_shape(tokens.shape))
    return *kernel_gradients(model, tokens, cotangent, compiled, **options), to_numpy(table.embeddings)


def padded_tokens():
    tokens = np.random.default_rng(0).integers(1, 9, size=(4, 6)).astype("int32")
    tokens[0, 3:] = tokens[1, 1:] = 0
    return tokens


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    "layer",
    [lambda: layers.Dense(3), lambda: layers.EinsumDense("abc,cde->abde", (6, 1, 3))],
    ids=["dense", "einsum"],
)
@each_mode
@pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning")
def test_masked_rows_do_not_count(layer, weight_sharing, compiled):
    tokens = padded_tokens()
    plain, conditioned, table = masked_gradients(layer(), tokens, compiled, weight_sharing=weight_sharing)
    if weight_sharing == "expand":
        rows = table[tokens[tokens != 0]]
    else:
        rows = np.stack([table[sample[sample != 0]].mean(0) for sample in tokens])
    assert relative_error(conditioned.reshape(8, 3), oracle.condition(rows, plain.reshape(8, 3), 0.3)) < 2e-5


@each_mode
@pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning")
def test_a_mask_over_groups_counts_the_rows_of_each(compiled):
    """Each of the six positions has its own kernel."""
    tokens = padded_tokens()
    tokens[:, 5] = 0
    plain, conditioned, table = masked_gradients(layers.EinsumDense("abc,bcd->abd", (6, 3)), tokens, compiled)
    for position in range(6):
        rows = table[tokens[:, position][tokens[:, position] != 0]]
        expected = oracle.condition(rows, plain[position], 0.3) if len(rows) else plain[position]
        assert relative_error(conditioned[position], expected) < 2e-5


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_a_wholly_masked_batch_keeps_the_plain_gradient(weight_sharing):
    plain, conditioned, _ = masked_gradients(layers.Dense(3), np.zeros((4, 6), "int32"), weight_sharing=weight_sharing)
    assert relative_error(conditioned, plain) < 1e-6


@pytest.mark.parametrize("tie_weights", [True, False])
@each_mode
def test_reversible_embedding_in_reverse(tie_weights, compiled):
    table = layers.ReversibleEmbedding(7, 4, tie_weights=tie_weights, logit_soft_cap=30.0)
    layer, inputs = Calling(table, reverse=True), normal((3, 5, 4))[0]
    table.build((None, None))
    # If it is not tied, the table has no part in the reverse.
    table.embeddings.trainable = tie_weights
    plain, conditioned = kernel_gradients(layer, inputs, *normal((3, 35), seed=1), compiled)
    if tie_weights:
        plain, conditioned = plain.T, conditioned.T
    assert relative_error(conditioned, oracle.condition(inputs.reshape(15, 4), plain, 0.3)) < 2e-5


def test_error_options_that_are_none():
    with pytest.raises(ValueError, match=r"`weight_sharing` must be .expand. or .reduce.\. Received: weight_sharing='sum'"):
        paper_isaac(weight_sharing="sum")
    for max_rows in (0, -3, 2.5, True, "all"):
        with pytest.raises(ValueError, match="`max_rows` must be an integer above 0, or `None`"):
            paper_isaac(max_rows=max_rows)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow alone traces sizes that are open")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: layers.Conv2D(4, (2, 3), strides=2, groups=2, padding="same"), (4, 7, 6, 4)),
        (lambda: layers.Conv2D(3, 2, dilation_rate=2, activation="tanh"), (4, 7, 6, 2)),
        (lambda: layers.Conv1D(3, 3, padding="causal", dilation_rate=2), (4, 9, 2)),
        (lambda: layers.SeparableConv1D(3, 3, padding="same"), (4, 9, 2)),
        (lambda: layers.DepthwiseConv2D(3, strides=2, padding="same"), (4, 7, 6, 2)),
    ],
    ids=["conv2d-groups", "conv2d-dilated", "conv1d-causal", "separable1d", "depthwise2d"],
)
@pytest.mark.parametrize("options", [{}, {"max_rows": 10}, {"weight_sharing": "reduce"}], ids=str)
def test_patches_of_open_sizes_are_those_of_known_sizes(layer, shape, options):
    import tensorflow as tf

    layer, inputs, _ = layer_and_data(capture_inputs(layer()), *shape)
    optimizer = paper_isaac(damping=0.3, **options)
    optimizer.build(layer.trainable_variables)
    variables = [variable.value for variable in layer.trainable_variables]

    def gradients(inputs):
        with tf.GradientTape(persistent=True) as tape:
            with optimizer.conditioning():
                loss = tf.reduce_sum(tf.sin(layer(inputs)))
            plain_loss = tf.reduce_sum(tf.sin(layer(inputs)))
        return tape.gradient(loss, variables), tape.gradient(plain_loss, variables)

    expected, plain = gradients(tf.constant(inputs))
    actual, _ = tf.function(gradients, input_signature=[tf.TensorSpec((None,) * (len(shape) - 1) + shape[-1:])])(inputs)
    for variable, *each in zip(variables, actual, expected, plain, strict=True):
        actual_gradient, expected_gradient, plain_gradient = map(to_numpy, each)
        assert relative_error(actual_gradient, expected_gradient) < 2e-5
        assert len(variable.shape) == 1 or relative_error(expected_gradient, plain_gradient) > 1e-2
