"""Images: MNIST's classifiers and autoencoder, and the noise of photographs."""

import functools
import os
from pathlib import Path

import keras
import numpy as np
from keras import layers


@functools.cache
def digits():
    """MNIST from `keras.datasets` or from the `.npz` file that KERAS_ISAAC_IMAGES names; otherwise scikit-learn's digits."""
    file = os.environ.get("KERAS_ISAAC_IMAGES")
    if file:
        with np.load(Path(file)) as arrays:
            x, y = arrays["x"], arrays["y"]
    else:
        try:
            (x, y), _ = keras.datasets.mnist.load_data()
        except Exception as error:  # Keras reports a failed download with a plain Exception.
            from sklearn.datasets import load_digits

            print(f"MNIST cannot be loaded ({error}): using scikit-learn's digits instead.")
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


def flat_digits():
    """Flat images, and themselves."""
    flat = [x.reshape(len(x), -1) for x, _ in digits()]
    return [(x, x) for x in flat]


def cnn(seed):
    """Four convolutions."""
    keras.utils.set_random_seed(seed)
    options = {"padding": "same", "activation": "relu"}
    convolutions = [
        layers.Conv2D(width, 3, strides=strides, **options) for width, strides in ((16, 1), (32, 2), (32, 1), (64, 2))
    ]
    return keras.Sequential([keras.Input((28, 28, 1)), *convolutions, layers.Flatten(), layers.Dense(10, name="logits")])


@functools.cache
def photographs():
    """Windows of scikit-learn's two photographs, with noise and without; strips at the right are held out."""
    from sklearn.datasets import load_sample_images

    random, parts = np.random.default_rng(0), []
    photos = np.stack(load_sample_images().images) / 255
    for start, stop, count in ((0, 448, 4000), (448, 544, 256), (544, 640, 512)):
        rows, columns = (random.integers(0, size - 24, count) for size in (photos.shape[1], stop - start))
        places = zip(random.integers(0, 2, count), rows, start + columns, strict=True)
        clean = np.stack([photos[photo, row : row + 24, column : column + 24] for photo, row, column in places])
        parts.append(tuple(each.astype("float32") for each in (clean + random.normal(0, 0.1, clean.shape), clean)))
    return parts


def denoiser(seed):
    """Five convolutions, 32 wide, whose output is added to the input."""
    keras.utils.set_random_seed(seed)
    inputs = x = keras.Input((24, 24, 3))
    for _ in range(4):
        x = layers.Conv2D(32, 3, padding="same", activation="relu")(x)
    return keras.Model(inputs, layers.Add()([inputs, layers.Conv2D(3, 3, padding="same", name="logits")(x)]))
