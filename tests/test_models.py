"""Whole models: captured, they compute what they computed, and train."""

import keras
import numpy as np
import pytest
from harness import BACKEND
from keras import layers
from models import assert_differ, weights

from keras_isaac import ISAAC, capture_inputs, kernel_status


def transformer():
    """Tied embeddings, attention with a mask, a nested block that is used twice."""
    table = layers.ReversibleEmbedding(20, 16, mask_zero=True, name="table")
    attended = keras.Input((None, 16))
    hidden = layers.LayerNormalization()(attended)
    hidden = layers.Add()([layers.MultiHeadAttention(2, 8)(hidden, hidden, use_causal_mask=True), attended])
    branch = layers.Dense(32, activation="gelu")(layers.LayerNormalization()(hidden))
    block = keras.Model(attended, layers.Add()([layers.Dense(16)(branch), hidden]), name="block")
    inputs = keras.Input((12,), dtype="int32")
    return keras.Model(inputs, table(block(block(table(inputs))), reverse=True))


def convolutional():
    """Depthwise separable and residual convolutions with normalization."""
    inputs = keras.Input((16, 16, 3))
    hidden = layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    for _ in range(2):
        branch = layers.Activation("relu")(layers.BatchNormalization()(hidden))
        branch = layers.SeparableConv2D(8, 3, padding="same")(branch)
        hidden = layers.Add()([hidden, layers.Dropout(0.1)(layers.Conv2D(8, 3, padding="same")(branch))])
    hidden = layers.Conv2D(16, 3, strides=2, padding="same", groups=2)(hidden)
    return keras.Model(inputs, layers.Dense(20)(layers.GlobalAveragePooling2D()(hidden)))


def mobilenet():
    return keras.applications.MobileNet((32, 32, 3), alpha=0.25, weights=None, classes=20, classifier_activation=None)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (transformer, {}),
        (transformer, {"weight_sharing": "reduce"}),
        (transformer, {"max_rows": 16}),
        (convolutional, {}),
        (convolutional, {"weight_sharing": "reduce"}),
        (convolutional, {"max_rows": 16}),
        (mobilenet, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning")
def test_a_whole_model_trains_and_computes_what_it_computed(build, options):
    model = build()
    random = np.random.default_rng(0)
    shape = model.input_shape[1:]
    if len(shape) == 1:
        inputs = random.integers(1, 20, size=(8, *shape)).astype("int32")
        inputs[:, 9:] = 0
        targets = inputs
    else:
        inputs, targets = random.normal(size=(8, *shape)).astype("float32"), random.integers(0, 20, size=8)
    plain = model.predict_on_batch(inputs)
    capture_inputs(model)
    np.testing.assert_array_equal(model.predict_on_batch(inputs), plain)
    conditioned = [status for status in kernel_status(model) if status.reason is None]
    assert len(conditioned) == len([w for w in model.trainable_weights if len(w.shape) >= 2 and w.name != "bias"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=ISAAC(damping=0.3, inner_optimizer="adam", learning_rate=0.003, **options), loss=loss)
    before = weights(model)
    losses = [float(model.train_on_batch(inputs, targets)) for _ in range(12)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    for weight, new, old in zip(model.trainable_weights, weights(model), before, strict=True):
        if len(weight.shape) >= 2 and weight.name != "bias":
            assert_differ([new], [old], 1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.data")
def test_images_of_unknown_size_train():
    import tensorflow as tf

    inputs = keras.Input((None, None, 3))
    hidden = layers.GlobalAveragePooling2D()(layers.SeparableConv2D(4, 3)(layers.Conv2D(4, 3, activation="relu")(inputs)))
    model = capture_inputs(keras.Model(inputs, layers.Dense(2)(hidden)))
    model.compile(optimizer=ISAAC(damping=0.3), loss="mse")
    sizes = [(8, 9), (10, 7)]
    spec = (tf.TensorSpec((None, None, None, 3)), tf.TensorSpec((None, 2)))
    dataset = tf.data.Dataset.from_generator(
        lambda: ((np.ones((4, *size, 3), "float32"), np.ones((4, 2), "float32")) for size in sizes), output_signature=spec
    )
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(sizes)))
    before = weights(model)
    model.fit(dataset, verbose=0, shuffle=False)
    assert_differ(weights(model), before)
