"""Whole models: captured, they compute what they computed, and train."""

import keras
import numpy as np
import pytest
from harness import paper_isaac
from keras import layers
from models import assert_differ, keras_hub, weights

from keras_isaac import capture_inputs, kernel_status


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


def hub():
    """KerasHub's models."""
    return keras_hub().models


def language_model(backbone):
    """KerasHub's Transformer `backbone`, and its table of tokens in reverse."""
    size = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32, "max_sequence_length": 12}
    model = getattr(hub(), backbone)(vocabulary_size=20, dropout=0.1, **size)
    hidden = model.output if backbone == "GPT2Backbone" else model.output["sequence_output"]
    return keras.Model(model.input, model.token_embedding(hidden, reverse=True))


def bert():
    return language_model("BertBackbone")


def gpt2():
    return language_model("GPT2Backbone")


def examples_for(model, num=8):
    """Random inputs and targets: images and labels, or tokens (two of them padding) to be returned."""
    random = np.random.default_rng(0)
    if not isinstance(model.input, dict) and len(model.input_shape) > 2:
        return random.normal(size=(num, *model.input_shape[1:])).astype("float32"), random.integers(0, 20, size=num)
    tokens = random.integers(1, 20, size=(num, 12)).astype("int32")
    tokens[:, 9:] = 0
    inputs = {"token_ids": tokens, "segment_ids": tokens % 2, "padding_mask": (tokens != 0).astype("int32")}
    return ({name: inputs[name] for name in model.input} if isinstance(model.input, dict) else tokens), tokens


@pytest.mark.often("transformer-options0", "convolutional-options5", "bert*")
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
        (bert, {}),
        (gpt2, {"weight_sharing": "reduce"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning")
def test_a_whole_model_trains_and_computes_what_it_computed(build, options):
    plain = build()
    keras.utils.set_random_seed(0)  # As the fixture did before: the same weights, and the same dropout.
    model = build()
    inputs, targets = examples_for(model)
    expected = plain.predict_on_batch(inputs)
    capture_inputs(model)
    np.testing.assert_array_equal(model.predict_on_batch(inputs), expected)
    is_kernel = {w.path: len(w.shape) >= 2 and w.name != "bias" for w in model.trainable_weights}
    reasons = {status.path: status.reason for status in kernel_status(model)}
    assert set(reasons) == {path for path in is_kernel if is_kernel[path]}
    assert {path: reason for path, reason in reasons.items() if reason is not None} == PLAIN.get(build, {})

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain.compile(optimizer="sgd", loss=loss)
    model.compile(optimizer=paper_isaac(damping=0.3, inner_optimizer="adam", learning_rate=0.003, **options), loss=loss)
    before = weights(model)
    keras.utils.set_random_seed(0)  # On PyTorch, a dropout without a seed of its own draws from the global generator.
    first_loss = float(plain.train_on_batch(inputs, targets))
    keras.utils.set_random_seed(0)
    losses = [float(model.train_on_batch(inputs, targets)) for _ in range(12)]
    assert losses[0] == pytest.approx(first_loss, rel=1e-5)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    for path, new, old in zip(is_kernel, weights(model), before, strict=True):
        if is_kernel[path]:
            assert_differ([new], [old], 1e-5)


# Why a kernel of a model keeps its plain gradient.
PLAIN = {build: {"position_embedding/embeddings": "no conditioned form of PositionEmbedding"} for build in (bert, gpt2)}
