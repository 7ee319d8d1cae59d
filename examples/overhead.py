"""Measures what a training step costs on a captured model under ISAAC, beside the plain model; SGD takes both gradients.

    python overhead.py --backend jax                          # about five minutes on two cores
    python overhead.py --backend torch --models mlp-1600,transformer --json overhead.json
    python overhead.py --backend tensorflow --growth overhead.png

The contenders take turns in one process, an epoch of `fit` each, so that a busy machine slows them alike. The ratio is the
median over the turns. The first step and the peak memory are measured in processes of their own. The floor is the ratio that
counting multiplications gives. On PyTorch the authors' package (`pip install isaac`) is measured beside.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

LEARNING_RATE, DAMPING = 1e-3, 1.0


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One model at one size.

    Args:
        build: function that returns the Keras model; for a stack of dense layers it may be given what makes a layer of
            `(in, out, activation)`.
        products: for each kernel, the first layer's first, `(rows, in, out)`.
        batch: integer, samples a step.
        input_shape: tuple, of one sample.
        classes: integer, what the model tells apart; `None` if it reproduces its inputs.
        embeds: whether the inputs are tokens, so that the first kernel too has an input gradient, for the embedding.
        attention: integer, the multiplications of a plain step in which no kernel takes part.
        variants: dictionary, by name, the `max_rows` that are compared.
    """

    build: Callable
    products: list
    batch: int
    input_shape: tuple
    classes: int | None
    embeds: bool = False
    attention: int = 0
    variants: dict = dataclasses.field(default_factory=lambda: {"256 rows": 256, "all rows": None})

    def floor(self, variant):
        """The multiplications of a conditioned step over those of a plain one."""
        # Forward, kernel gradient, input gradient.
        plain = self.attention + sum(3 * math.prod(product) for product in self.products)
        plain -= 0 if self.embeds else math.prod(self.products[0])
        return 1 + sum(added_multiplications(*product, self.variants[variant]) for product in self.products) / plain

    def data(self, steps):
        """Random inputs and targets; the time does not depend on them."""
        import numpy as np

        random, shape = np.random.default_rng(0), (steps * self.batch, *self.input_shape)
        if self.embeds:
            return [random.integers(0, self.classes, shape, dtype="int32") for _ in range(2)]
        x = random.standard_normal(shape, dtype="float32")
        return x, x if self.classes is None else random.integers(0, self.classes, len(x), dtype="int32")


def added_multiplications(rows, num_in, num_out, max_rows):
    """Gram matrix, inverse, and their products with the gradients, in the cheapest of the forms that apply."""
    few = rows if max_rows is None else min(rows, max_rows)
    feature_side = few * num_in**2 + num_in**3 + num_in**2 * num_out
    woodbury = few**2 * num_in + few**3 + 2 * few * num_in * num_out + few**2 * num_out
    sample_side = rows**2 * num_in + rows**3 + rows**2 * min(num_in, num_out)
    return min(feature_side, woodbury, *([sample_side] if few == rows else []))


def dense(sizes, batch, tokens=None):
    """A stack of ReLU layers, on vectors or on sequences of them."""
    pairs = list(itertools.pairwise(sizes))
    input_shape = (sizes[0],) if tokens is None else (tokens, sizes[0])

    def build(make_layer=None):
        import keras

        make_layer = make_layer or (lambda _, num_out, activation: keras.layers.Dense(num_out, activation))
        layers = [make_layer(*pair, "relu") for pair in pairs[:-1]] + [make_layer(*pairs[-1], None)]
        return keras.Sequential([keras.Input(input_shape), *layers])

    products = [(batch * (tokens or 1), *pair) for pair in pairs]
    # Rows of vectors are not shared over positions: all count.
    variants = {"variants": {"ISAAC": None}} if tokens is None else {}
    return Benchmark(build, products, batch, input_shape, None if sizes[0] == sizes[-1] else sizes[-1], **variants)


def transformer(batch=16, tokens=128, width=256, heads=4, blocks=2, vocabulary=128):
    """A small causal transformer with learned positions."""

    def build():
        import keras
        from keras import layers, ops

        inputs = keras.Input((tokens,), dtype="int32")
        positions = layers.Embedding(tokens, width)(ops.cumsum(ops.ones_like(inputs), axis=-1) - 1)
        x = layers.Embedding(vocabulary, width)(inputs) + positions
        for _ in range(blocks):
            y = layers.LayerNormalization()(x)
            x = x + layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
            y = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
            x = x + layers.Dense(width)(y)
        return keras.Model(inputs, layers.Dense(vocabulary)(layers.LayerNormalization()(x)))

    rows = batch * tokens
    # Query, key, value and output; feed-forward.
    block = [(rows, width, width)] * 4 + [(rows, width, 4 * width), (rows, 4 * width, width)]
    # Queries by keys and weights by values, each forward and for two gradients.
    attention = blocks * 2 * 3 * rows * tokens * width
    products = block * blocks + [(rows, width, vocabulary)]
    return Benchmark(build, products, batch, (tokens,), vocabulary, embeds=True, attention=attention)


def cnn(batch=32, size=32, classes=10):
    """A small residual network of 3x3 convolutions, all at full resolution."""

    def build():
        import keras
        from keras import layers

        inputs = keras.Input((size, size, 3))
        x = layers.Conv2D(32, 3, padding="same", activation="relu")(inputs)
        for channels in (32, 64):
            y = layers.Conv2D(channels, 3, padding="same", activation="relu")(x)
            y = layers.Conv2D(channels, 3, padding="same")(y)
            x = layers.ReLU()(y + (x if channels == 32 else layers.Conv2D(channels, 1)(x)))
        return keras.Model(inputs, layers.Dense(classes)(layers.GlobalAveragePooling2D()(x)))

    kernels = [(9 * 3, 32), (9 * 32, 32), (9 * 32, 32), (9 * 32, 64), (9 * 64, 64), (32, 64)]
    products = [(batch * size * size, *kernel) for kernel in kernels] + [(batch, 64, classes)]
    return Benchmark(build, products, batch, (size, size, 3), classes)


MODELS = {f"mlp-{width}": dense((784, *[width] * 4, 10), 60) for width in (100, 400, 1600, 6400)}
MODELS |= {
    "autoencoder": dense((784, 1000, 500, 30, 500, 1000, 784), 60),
    "transformer": transformer(),
    "cnn": cnn(),
}
GROWTH = {
    "width": {width: dense((784, *[width] * 4, 10), 60) for width in (50, 100, 200, 400, 800, 1600)},
    "batch": {batch: dense((784, *[400] * 4, 10), batch) for batch in (15, 30, 60, 120, 240, 480, 960, 1920)},
    "tokens": {tokens: dense((256, 256, 256, 256), 4, tokens) for tokens in (16, 32, 64, 128, 256, 512, 1024)},
}


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", choices=["jax", "tensorflow", "torch"], help="default: the environment's, as Keras reads it"
    )
    names = ",".join(name for name in MODELS if name != "mlp-6400")
    parser.add_argument("--models", default=names, help=f"of {', '.join(MODELS)}; or all (default: all but mlp-6400)")
    parser.add_argument("--repetitions", type=int, default=15, help="turns of each contender (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, help="of a turn (default: a power of two that lasts a third to two thirds of a second)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="a contender, for first step and memory (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="where to save the results too")
    parser.add_argument(
        "--growth", type=Path, help="instead, measure the growth with width, batch and tokens into this picture"
    )
    arguments = parser.parse_args()
    arguments.models = list(MODELS) if arguments.models == "all" else arguments.models.split(",")
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"--models must be of {', '.join(MODELS)}. Received: {', '.join(sorted(unknown))}")
    if arguments.repetitions < 2:
        parser.error(f"--repetitions must be at least 2, for quartiles. Received: {arguments.repetitions}")
    return arguments


def make_trainer(benchmark, contender):
    """Returns the function of data that trains the contender for an epoch and returns the seconds."""
    import keras

    from keras_isaac import ISAAC, capture_inputs

    if contender.endswith("loop"):
        return make_torch_loop(benchmark, contender)
    model, optimizer = None, keras.optimizers.SGD(LEARNING_RATE)
    if contender == "package in fit":
        model = benchmark.build(lambda *layer: keras.layers.TorchModuleWrapper(make_torch_layer(contender, *layer)))
    elif contender in benchmark.variants:
        model = capture_inputs(benchmark.build())
        optimizer = ISAAC(LEARNING_RATE, DAMPING, max_rows=benchmark.variants[contender])
    else:
        model = benchmark.build()
    loss = "mse" if benchmark.classes is None else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss)

    class Stopwatch(keras.callbacks.Callback):
        # Of the epoch: what `fit` does before it does not grow with the steps.
        def on_epoch_begin(self, epoch, logs=None):
            self.start = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            synchronize()
            self.seconds = time.perf_counter() - self.start

    stopwatch = Stopwatch()

    def train(x, y):
        model.fit(x, y, batch_size=benchmark.batch, verbose=0, callbacks=[stopwatch])
        return stopwatch.seconds

    return train


def make_torch_layer(contender, num_in, num_out, activation):
    """Returns a dense layer of PyTorch's or of the package's."""
    import torch

    if contender.startswith("package"):
        import isaac

        layer = isaac.Linear(num_in, num_out, DAMPING, inv_type="inverse")
    else:
        layer = torch.nn.Linear(num_in, num_out)
    return torch.nn.Sequential(layer, torch.nn.ReLU()) if activation else layer


def make_torch_loop(benchmark, contender):
    """As `make_trainer`, in PyTorch without Keras."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = [product[1:] for product in benchmark.products]
    layers = [make_torch_layer(contender, *pair, "relu") for pair in pairs[:-1]]
    model = torch.nn.Sequential(*layers, make_torch_layer(contender, *pairs[-1], None)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    loss_fn = torch.nn.MSELoss() if benchmark.classes is None else torch.nn.CrossEntropyLoss()

    def train(x, y):
        x, y = (torch.as_tensor(array) for array in (x, y))
        y = y if benchmark.classes is None else y.long()
        start = time.perf_counter()
        for x_batch, y_batch in zip(x.split(benchmark.batch), y.split(benchmark.batch), strict=True):
            optimizer.zero_grad()
            loss = loss_fn(model(x_batch.to(device)), y_batch.to(device))
            loss.backward()
            optimizer.step()
        loss.item()
        synchronize()
        return time.perf_counter() - start

    return train


def synchronize():
    """Waits for the last update, which no result of `fit` depends on where the device runs on its own."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()


def find_gpu():
    """Returns the name of the backend's GPU and a function of its peak memory in bytes, or `None`."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return (torch.cuda.get_device_name(), torch.cuda.max_memory_allocated) if torch.cuda.is_available() else None
    if keras.backend.backend() == "jax":
        import jax

        device = jax.devices()[0]
        return (device.device_kind, lambda: device.memory_stats()["peak_bytes_in_use"]) if device.platform == "gpu" else None
    import tensorflow as tf

    if not (devices := tf.config.list_physical_devices("GPU")):
        return None
    name = tf.config.experimental.get_device_details(devices[0]).get("device_name", "GPU")
    return name, lambda: tf.config.experimental.get_memory_info("GPU:0")["peak"]


def measure_fresh(name, contender):
    """In a fresh process, returns the seconds to the first step and the peak memory in MB of a few steps."""
    import resource

    # What the framework sets up once is no part of it.
    make_trainer(dense((2, 1), 1), "plain")(*dense((2, 1), 1).data(1))
    benchmark = MODELS[name]
    train = make_trainer(benchmark, contender)
    data = benchmark.data(1)
    start = time.perf_counter()
    train(*data)
    seconds = time.perf_counter() - start
    train(*benchmark.data(3))
    if gpu := find_gpu():
        return seconds, gpu[1]() / 2**20
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure_in_processes(name, num_processes):
    """Returns `(first-step seconds, peak MB)` for each contender, medians over processes of one contender each."""
    contenders = ["plain", *MODELS[name].variants]
    context = multiprocessing.get_context("spawn")
    results = {contender: [] for contender in contenders}
    with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for _, contender in itertools.product(range(num_processes), contenders):
            results[contender].append(pool.submit(measure_fresh, name, contender).result())
    return {
        contender: [statistics.median(values) for values in zip(*pairs, strict=True)] for contender, pairs in results.items()
    }


def measure(name, benchmark, arguments, fresh=None, package=False):
    """Lets the contenders take turns; returns a dictionary for each that is compared to a plain one."""
    compared_to = {"plain": None, **dict.fromkeys(benchmark.variants, "plain")}
    if package:
        compared_to |= {"plain loop": None, "package in loop": "plain loop", "package in fit": "plain"}
    trainers = {contender: make_trainer(benchmark, contender) for contender in compared_to}
    trainers["plain"](*benchmark.data(1))
    steps = arguments.steps or 1
    while not arguments.steps and trainers["plain"](*benchmark.data(steps)) < 1 / 3:
        steps *= 2
    data = benchmark.data(steps)
    for train in trainers.values():
        train(*data)
    milliseconds = {contender: [] for contender in trainers}
    for turn in range(arguments.repetitions):
        for contender in list(trainers)[:: 1 if turn % 2 else -1]:
            milliseconds[contender].append(1000 * trainers[contender](*data) / steps)
    results = []
    for contender, baseline in compared_to.items():
        if baseline:
            plain, ours = milliseconds[baseline], milliseconds[contender]
            result = {"model": name, "contender": contender, "steps": steps}
            result |= {"plain_ms": quartiles(plain), "captured_ms": quartiles(ours)}
            # Neighbors in time, which a busy machine slows alike.
            result["ratio"] = quartiles([b / a for a, b in zip(plain, ours, strict=True)])
            result["added_ms"] = result["captured_ms"][1] - result["plain_ms"][1]
            result["floor"] = benchmark.floor(contender if contender in benchmark.variants else "ISAAC")
            measured = fresh and baseline == "plain" and contender in fresh
            for key, place in (("first_step_s", 0), ("memory_mb", 1)):
                result[key] = [fresh["plain"][place], fresh[contender][place]] if measured else None
            results.append(result)
    return results


def quartiles(values):
    """Returns the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def print_table(results, title):
    """Prints a line for each result."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption="median (quartiles); first step and memory: plain → captured")
    for column in ("model", "contender"):
        table.add_column(column)
    for column in ("plain ms a step", "ms a step", "ratio", "added ms", "floor", "first step, s", "peak memory, MB"):
        table.add_column(column, justify="right")
    for result in results:
        low, median, high = zip(*(result[key] for key in ("plain_ms", "captured_ms", "ratio")), strict=True)
        cells = [f"{m:.2f} ({a:.2f} to {b:.2f})" for a, m, b in zip(low, median, high, strict=True)]
        cells += [f"{result['added_ms']:.2f}", f"{result['floor']:.3f}"]
        for key, form in (("first_step_s", ".2f"), ("memory_mb", ".0f")):
            plain, ours = result[key] or (None, None)
            cells.append(f"{plain:{form}} → {ours:{form}} ({100 * (ours / plain - 1):+.1f} %)" if plain else "")
        table.add_row(result["model"], result["contender"], *cells)
    Console(width=max(150, Console().width)).print(table)


def save_picture(results, path, title):
    """Saves the ratios, measured and by the floor, against what grows."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("--growth draws with Matplotlib: pip install matplotlib") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"width": "width, at batch 60", "batch": "batch, at width 400", "tokens": "tokens, at batch 4 and width 256"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    for axis, (quantity, label) in zip(axes, labels.items(), strict=True):
        for contender, color in (("ISAAC", "C0"), ("256 rows", "C0"), ("all rows", "C1")):
            points = [(*r["model"].split(), r) for r in results if r["contender"] == contender]
            points = [(int(value), r["ratio"], r["floor"]) for name, value, r in points if name == quantity]
            if points:
                values, ratios, floors = zip(*points, strict=True)
                low, median, high = zip(*ratios, strict=True)
                axis.fill_between(values, low, high, color=color, alpha=0.2, linewidth=0)
                axis.plot(values, median, "o-", color=color, markersize=4, label=f"{contender}, measured")
                axis.plot(values, floors, "--", color=color, label=f"{contender}, floor")
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, values)
        axis.set(xlabel=label, ylim=(0.9, None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0].set(ylabel="captured / plain step")
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
    print(f"saved {path}")


def main():
    """Runs the benchmark."""
    arguments = parse_arguments()
    if arguments.backend:
        # Keras fixes its backend when it is imported.
        os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    benchmarks = {name: MODELS[name] for name in arguments.models}
    if arguments.growth:
        benchmarks = {f"{quantity} {value}": each for quantity, row in GROWTH.items() for value, each in row.items()}
    fresh = {}
    if arguments.processes and not arguments.growth:
        # Before this process grows: a child's peak begins at the size of its parent.
        for name in benchmarks:
            print(f"{name}: first step and memory", flush=True)
            fresh[name] = measure_in_processes(name, arguments.processes)
    import keras

    gpu = find_gpu()
    package = keras.backend.backend() == "torch" and not arguments.growth
    if package and not importlib.util.find_spec("isaac"):
        package = False
        print("The authors' package is not installed (pip install isaac): left out.")
    results = []
    for name, benchmark in benchmarks.items():
        print(f"{name}: taking turns", flush=True)
        results += measure(name, benchmark, arguments, fresh.get(name), package and "ISAAC" in benchmark.variants)
    device = gpu[0] if gpu else f"{os.cpu_count()} CPU cores"
    title = f"Keras {keras.version()}, {keras.backend.backend()}, {device}"
    print_table(results, title)
    if arguments.json:
        record = {"backend": keras.backend.backend(), "device": device, "keras": keras.version()}
        record |= {"repetitions": arguments.repetitions, "results": results}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.growth:
        save_picture(results, arguments.growth, title)


if __name__ == "__main__":
    main()
