"""The tasks of the experiments: data in three parts, a model, a loss, and what is measured of held-out data."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tasks import dynamics, images, physics, signals, tables, texts
from tasks.losses import accuracy, cross_entropy, squared_error


class Task(NamedTuple):
    """One task, as `evidence.py` trains it.

    Args:
        build: function of a seed, returns the model.
        loss: function of `call` (a function of x, such as the model), x and y, which returns the training loss.
        data: function without arguments, returns `(x, y)` of the training, the validation and the test part.
        batch_size: integer.
        steps: integer, how long it trains at horizon 1.
        measures: dictionary of more functions of this kind, for held-out data.
        held_out: the loss of held-out data, if it is not the training loss.
    """

    build: Callable
    loss: Callable
    data: Callable
    batch_size: int
    steps: int
    measures: dict = {}  # noqa: RUF012 (nobody changes it)
    held_out: Callable | None = None


def batches(num_samples, num_steps, batch_size, seed):
    """Returns which samples make the batch of each step, `[steps, batch]`, the same for all methods."""
    orders = np.random.default_rng(seed)
    num_epochs = -(-num_steps * batch_size // num_samples)
    places = np.concatenate([orders.permutation(num_samples) for _ in range(num_epochs)])
    return places[: num_steps * batch_size].reshape(num_steps, batch_size)


ACCURACY = {"accuracy": accuracy}
TASKS = {
    "diabetes": Task(tables.regressor(10, 64), squared_error, tables.diabetes, 32, 330),
    "diamonds": Task(tables.regressor(26, 128), squared_error, tables.diamonds, 64, 1500),
    "classifier": Task(images.classifier, cross_entropy, images.digits, 60, 900, ACCURACY),
    "cnn": Task(images.cnn, cross_entropy, images.digits, 60, 400, ACCURACY),
    "autoencoder": Task(images.autoencoder, squared_error, images.flat_digits, 60, 600),
    "denoiser": Task(images.denoiser, squared_error, images.photographs, 16, 400),
    "lora": Task(texts.lora, cross_entropy, texts.code, 16, 200),
    "transformer": Task(texts.transformer, cross_entropy, texts.prose, 16, 400),
    "lstm": Task(texts.lstm, cross_entropy, texts.prose, 16, 400),
    "python": Task(texts.transformer, cross_entropy, texts.library, 16, 400),
    "poisson": Task(physics.network, physics.poisson_residual, physics.poisson, 64, 2000, {}, physics.poisson_error),
    "burgers": Task(physics.network, physics.burgers_residual, physics.burgers, 64, 2000, {}, physics.burgers_error),
    "reviews": Task(texts.encoder, cross_entropy, texts.reviews, 16, 100, ACCURACY),
    "reviews-lora": Task(functools.partial(texts.encoder, rank=8), cross_entropy, texts.reviews, 16, 100, ACCURACY),
    "mnist1d-mlp": Task(signals.mlp, cross_entropy, signals.mnist1d, 100, 2000, ACCURACY),
    "mnist1d-cnn": Task(signals.cnn, cross_entropy, signals.mnist1d, 100, 2000, ACCURACY),
    # nanoGPT's configuration for a CPU.
    "shakespeare": Task(functools.partial(texts.transformer, num_blocks=4), cross_entropy, texts.shakespeare, 12, 2000),
    "movies": Task(tables.regressor(16, 128), squared_error, tables.movies, 64, 1500),
    "lorenz": Task(dynamics.forecaster, squared_error, dynamics.lorenz, 64, 2000, {}, dynamics.forecast_error),
}
# Tasks that no choice of a default has seen. They are trained last and reported apart.
UNSEEN = ["mnist1d-mlp", "mnist1d-cnn", "shakespeare", "movies", "lorenz"]
KNOWN = [name for name in TASKS if name not in UNSEEN]
