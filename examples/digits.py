"""Trains one classifier with SGD, Adam, Muon, ISAAC and ISAAC around Adam, and shows how they compare.

    python digits.py                                   # scikit-learn's digits, nothing to download
    python digits.py --data fashion_mnist --epochs 5   # through keras.datasets
    python digits.py --data FILE.npz                   # arrays `x` [examples, ...] and `y` [examples]

It prints a table and saves a picture of the training loss by step and by second. The optimizers take turns, an epoch each,
so that a busy machine slows them alike.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

# The learning rate of each method: the best training loss after 10 epochs on the default data, seed 0, of the grid below, as
# `python digits.py --backend jax --tune` prints it; the damping likewise, of {0.01, 0.1, 0.3, 1}.
LEARNING_RATES = {"SGD": 0.3, "Adam": 0.003, "Muon": 0.003, "ISAAC": 3.0, "ISAAC + Adam": 0.003}
GRID = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist, fashion_mnist or FILE.npz (default: %(default)s)")
    parser.add_argument(
        "--backend", choices=["jax", "tensorflow", "torch"], help="default: the environment's, as Keras reads it"
    )
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--damping", type=float, default=0.3, help="of both ISAACs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--picture", type=Path, default=Path("digits.png"), help="where it goes (default: %(default)s)")
    parser.add_argument(
        "--tune", action="store_true", help="print the training loss of every learning rate of the grid instead"
    )
    return parser.parse_args()


def load_data(name, seed):
    """Returns `(x_train, y_train), (x_test, y_test)`: rows of floats in [0, 1], and integer classes."""
    import keras
    import numpy as np

    if name in ("mnist", "fashion_mnist"):
        (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    else:
        if name == "digits":
            from sklearn.datasets import load_digits

            x, y = load_digits(return_X_y=True)
        elif name.endswith(".npz") and Path(name).exists():
            with np.load(name) as arrays:
                x, y = arrays["x"], arrays["y"]
        else:
            raise SystemExit(f"--data must be digits, mnist, fashion_mnist or an existing .npz file. Received: {name}")
        order = np.random.default_rng(seed).permutation(len(x))
        split = len(x) * 4 // 5
        x_train, y_train, x_test, y_test = x[order[:split]], y[order[:split]], x[order[split:]], y[order[split:]]
    scale = float(x_train.max()) or 1.0
    x_train, x_test = (x.reshape(len(x), -1).astype("float32") / scale for x in (x_train, x_test))
    return (x_train, y_train.ravel().astype("int32")), (x_test, y_test.ravel().astype("int32"))


def build_optimizer(method, damping, learning_rate=None):
    """Returns the optimizer of that name."""
    import keras

    from keras_isaac import ISAAC

    learning_rate = learning_rate or LEARNING_RATES[method]
    return {
        "SGD": lambda: keras.optimizers.SGD(learning_rate),
        "Adam": lambda: keras.optimizers.Adam(learning_rate),
        # Muon leaves the last layer and the biases to Adam.
        "Muon": lambda: keras.optimizers.Muon(
            learning_rate, exclude_layers=["last"], weight_decay=None, adam_weight_decay=None
        ),
        "ISAAC": lambda: ISAAC(learning_rate, damping, "sgd", relative_damping=False),
        "ISAAC + Adam": lambda: ISAAC(learning_rate, damping, "adam", relative_damping=False),
    }[method]()


def build_model(optimizer, num_features, num_classes, seed):
    """Returns the compiled classifier; `capture_inputs` leaves the other optimizers as they were."""
    import keras

    from keras_isaac import capture_inputs

    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((num_features,)),
            keras.layers.Dense(256, activation="relu", name="first"),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(num_classes, name="last"),
        ]
    )
    model = capture_inputs(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    return model


def train(optimizers, data, arguments, verbose=1):
    """Trains a model under each optimizer, an epoch in turn; returns a dictionary of results for each."""
    import numpy as np

    (x_train, y_train), test_data = data
    num_classes = int(y_train.max()) + 1
    models = {name: build_model(each, x_train.shape[1], num_classes, arguments.seed) for name, each in optimizers.items()}
    results = {name: {"losses": [], "epoch_seconds": []} for name in models}
    steps = -(-len(x_train) // arguments.batch_size)
    for epoch in range(arguments.epochs):
        for name, model in models.items():
            if verbose:
                print(f"{name}", flush=True)
            else:
                print(".", end="", flush=True)
            if epoch == 0:
                results[name]["losses"].append(model.evaluate(x_train, y_train, verbose=0, batch_size=512)[0])
            # The same order of the images for all.
            order = np.random.default_rng(arguments.seed + epoch).permutation(len(x_train))
            start = time.perf_counter()
            model.fit(
                x_train[order],
                y_train[order],
                batch_size=arguments.batch_size,
                initial_epoch=epoch,
                epochs=epoch + 1,
                shuffle=False,
                verbose=verbose,
            )
            results[name]["epoch_seconds"].append(time.perf_counter() - start)
            results[name]["losses"].append(model.evaluate(x_train, y_train, verbose=0, batch_size=512)[0])
    for name, model in models.items():
        # The first epoch compiles.
        seconds = results[name]["epoch_seconds"]
        results[name]["step_seconds"] = statistics.median(seconds[1:] or seconds) / steps
        results[name]["accuracy"] = model.evaluate(*test_data, verbose=0, batch_size=512)[1]
        results[name]["steps"] = steps
    return results


def print_table(results, title):
    """Prints a line for each method."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("optimizer")
    for column in ("learning rate", "train loss", "test accuracy", "ms a step", "ratio to SGD"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        milliseconds = 1000 * result["step_seconds"]
        ratio = result["step_seconds"] / results["SGD"]["step_seconds"]
        cells = (f"{LEARNING_RATES[name]:g}", f"{result['losses'][-1]:.2g}", f"{result['accuracy']:.4f}", f"{milliseconds:.2f}")
        table.add_row(name, *cells, f"{ratio:.2f}")
    Console(width=100).print(table)


def save_picture(results, path, title):
    """Saves the training loss by step and by second."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, constrained_layout=True)
    for name, result in results.items():
        style = {"linewidth": 2.2} if "ISAAC" in name else {"linewidth": 1.2, "linestyle": "--"}
        steps = [epoch * result["steps"] for epoch in range(len(result["losses"]))]
        axes[0].plot(steps, result["losses"], label=name, **style)
        axes[1].plot([step * result["step_seconds"] for step in steps], result["losses"], label=name, **style)
    axes[0].set(xlabel="step", ylabel="training loss", yscale="log", title=title)
    axes[1].set(xlabel="seconds (steps x median time of a step)")
    axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    print(f"saved {path}")


def tune(data, arguments):
    """Prints the training loss of each method at each learning rate of the grid."""
    for method in LEARNING_RATES:
        optimizers = {rate: build_optimizer(method, arguments.damping, rate) for rate in GRID}
        results = train(optimizers, data, arguments, verbose=0)
        print(f"\n{method:13}", *(f"{rate:g}: {result['losses'][-1]:.2g}" for rate, result in results.items()), sep="   ")


def main():
    """Runs the comparison."""
    arguments = parse_arguments()
    if arguments.backend:
        # Keras fixes its backend when it is imported.
        os.environ["KERAS_BACKEND"] = arguments.backend
    import keras

    data = load_data(arguments.data, arguments.seed)
    if arguments.tune:
        tune(data, arguments)
        return
    optimizers = {method: build_optimizer(method, arguments.damping) for method in LEARNING_RATES}
    results = train(optimizers, data, arguments)
    name = Path(arguments.data).stem
    title = (
        f"{name}: {len(data[0][0])} images, batch {arguments.batch_size}, {arguments.epochs} epochs, {keras.backend.backend()}"
    )
    print_table(results, title)
    save_picture(results, arguments.picture, title)


if __name__ == "__main__":
    main()
