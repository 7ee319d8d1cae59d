"""Trains one classifier with SGD, AdamW, Muon and ISAAC, and compares their test losses over three seeds.

python digits.py --backend jax  # about two minutes on two CPU cores

Every optimizer has Keras' default settings. ISAAC runs around AdamW, as in the README, and around Muon. The data are
scikit-learn's images of digits, so there is nothing to download.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", choices=["jax", "tensorflow", "torch"], help="default: the one that Keras is set to")
parser.add_argument("--epochs", type=int, default=15, help="default: %(default)s")
parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
parser.add_argument(
    "--picture", type=Path, default=Path(__file__).parent / "output" / "digits.png", help="default: %(default)s"
)
arguments = parser.parse_args()
if arguments.backend:
    # Keras reads it when it is imported.
    os.environ["KERAS_BACKEND"] = arguments.backend

import keras  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

from keras_isaac import ISAAC, capture_inputs  # noqa: E402

BATCH_SIZE = 60
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(momentum=0.9),
    "AdamW": lambda: keras.optimizers.AdamW(),
    "ISAAC()": lambda: ISAAC(),
    "Muon": lambda: keras.optimizers.Muon(),
    "ISAAC(Muon)": lambda: ISAAC(inner_optimizer=keras.optimizers.Muon()),
}


def load_data(seed):
    """Returns `(x_train, y_train), (x_test, y_test)`, a random split of 1,797 images of 8 x 8 pixels."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order].astype("float32") / 16, y[order]
    return (x[:1440], y[:1440]), (x[1440:], y[1440:])


def build_model():
    """Returns a classifier whose layers can be conditioned. Other optimizers train it as if it were not captured."""
    hidden = [keras.layers.Dense(256, activation="relu") for _ in range(3)]
    return capture_inputs(keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)]))


def train(build_optimizer, seed):
    """Returns the training losses by epoch, the seconds of a step, the test loss and the test accuracy."""
    (x, y), test_data = load_data(seed)
    keras.utils.set_random_seed(seed)
    model = build_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=build_optimizer(), loss=loss, metrics=["accuracy"])
    # The first epoch compiles, so its time does not count.
    first = model.fit(x, y, batch_size=BATCH_SIZE, epochs=1, verbose=0)
    start = time.perf_counter()
    rest = model.fit(x, y, batch_size=BATCH_SIZE, initial_epoch=1, epochs=arguments.epochs, verbose=0)
    seconds = (time.perf_counter() - start) / (arguments.epochs - 1) / (len(x) / BATCH_SIZE)
    losses = first.history["loss"] + rest.history["loss"]
    return losses, seconds, *model.evaluate(*test_data, verbose=0)


def save_picture(results, path):
    """Plots the training loss by epoch and by second."""
    figure = Figure(figsize=(9, 3.4), constrained_layout=True)
    by_epoch, by_second = figure.subplots(1, 2, sharey=True)
    for name, runs in results.items():
        losses = np.mean([losses for losses, *_ in runs], axis=0)
        epochs = np.arange(1, len(losses) + 1)
        seconds_of_epoch = statistics.median(seconds for _, seconds, *_ in runs) * 1440 / BATCH_SIZE
        style = {"linewidth": 2.2} if "ISAAC" in name else {"linestyle": "--"}
        by_epoch.plot(epochs, losses, label=name, **style)
        by_second.plot(epochs * seconds_of_epoch, losses, **style)
    by_epoch.set(xlabel="epoch", ylabel="training loss", yscale="log")
    by_second.set(xlabel="seconds, without compiling", xscale="log")
    by_epoch.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    print(f"Picture: {path.resolve()}")


def main():
    """Trains with every optimizer and seed, and prints the results."""
    results = {name: [] for name in OPTIMIZERS}
    for seed in range(arguments.seeds):
        for name, build_optimizer in OPTIMIZERS.items():
            results[name].append(train(build_optimizer, seed))
            print(f"seed {seed}, {name}: test loss {results[name][-1][2]:.4f}", flush=True)
    print(f"\nMean over seeds +- standard error, {arguments.epochs} epochs, {keras.backend.backend()}:\n")
    print(f"{'optimizer':12}  {'test loss':>17}  {'test accuracy':>13}  {'ms a step':>9}")
    for name, runs in results.items():
        _, seconds, losses, accuracies = zip(*runs, strict=True)
        loss = f"{np.mean(losses):.4f}"
        if len(losses) > 1:
            loss += f" +- {np.std(losses, ddof=1) / len(losses) ** 0.5:.4f}"
        print(f"{name:12}  {loss:>17}  {np.mean(accuracies):13.4f}  {1000 * statistics.median(seconds):9.2f}")
    save_picture(results, arguments.picture)


if __name__ == "__main__":
    main()
