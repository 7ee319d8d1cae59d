"""Gradient-boosted trees of scikit-learn on the tables of `evidence.py`, chosen on validation data as the networks are.

    python trees.py

It searches nine settings of learning rate and leaves, as many as `evidence.py`; validation data choose the number of trees.
"""

import itertools

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
from tasks import TASKS

LEARNING_RATES, LEAVES = (0.03, 0.1, 0.3), (15, 31, 63)
NUM_TREES = 1000


def best_of(parts):
    """Returns the learning rate, the leaves, the number of trees, and the mean squared errors of validation and test data."""
    (x, y), *held_out = parts
    results = []
    for learning_rate, leaves in itertools.product(LEARNING_RATES, LEAVES):
        trees = HistGradientBoostingRegressor(
            learning_rate=learning_rate, max_leaf_nodes=leaves, max_iter=NUM_TREES, early_stopping=False, random_state=0
        ).fit(x, y[:, 0])
        errors = [
            [np.mean(np.square(each - y_part[:, 0])) for each in trees.staged_predict(x_part)] for x_part, y_part in held_out
        ]
        count = int(np.argmin(errors[0]))
        results.append((errors[0][count], errors[1][count], learning_rate, leaves, count + 1))
    validation, test, *setting = min(results)
    return *setting, validation, test


def main():
    """Prints a line for each table."""
    for task in ("diabetes", "diamonds"):
        learning_rate, leaves, count, validation, test = best_of(TASKS[task].data())
        print(f"{task}: test {test:.3g}, validation {validation:.3g}: {count} trees of {leaves} leaves, rate {learning_rate}")


if __name__ == "__main__":
    main()
