"""Measures what a training step costs on a captured model with ISAAC, compared with the plain model; both use SGD.

    python overhead.py --backend jax                          # about five minutes on two cores
    python overhead.py --backend torch --models mlp-1600,transformer --json overhead.json
    python overhead.py --backend tensorflow --growth overhead.png
    python overhead.py --backend torch --models mlp-400 --jit # the step of `torch.compile`

The contenders take turns in one process, an epoch of `fit` each, so a busy machine slows both; the ratio is the median over the
turns. The first step and the peak memory are measured in a separate process each. The floor is the ratio of the numbers of
multiplications. On PyTorch the authors' package (`pip install isaac`) is measured too.
"""

import argparse
import concurrent.futures
import dataclasses
import gc
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
# More than any model here has.
ALL_ROWS = 2**30


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One model at one size.

    Args:
        build: function that returns the Keras model; of dense layers it takes a function that makes a layer, optionally.
        products: for each kernel, the first layer's first, `(rows, in, out)`.
        batch: integer, samples a step.
        input_shape: tuple, of one sample.
        classes: integer, how many classes; `None` if the model reproduces its inputs.
        embeds: whether the inputs are tokens, so that the first kernel needs an input gradient too, for the embedding.
        attention: integer, the multiplications of a plain step that involve no kernel.
        shares: whether positions share the kernels, so that `max_rows` matters.
    """

    build: Callable
    products: list
    batch: int
    input_shape: tuple
    classes: int | None
    embeds: bool = False
    attention: int = 0
    shares: bool = True

    @property
    def variants(self):
        """The `max_rows` to compare, by name."""
        return {"ISAAC": None, "all rows": ALL_ROWS} if self.shares else {"ISAAC": None}

    def floor(self, variant):
        """The multiplications of a conditioned step over those of a plain one."""
        # Forward, kernel gradient, input gradient.
        plain = self.attention + sum(3 * math.prod(product) for product in self.products)
        plain -= 0 if self.embeds else math.prod(self.products[0])
        options = self.shares, self.variants[variant]
        return 1 + sum(added_multiplications(*product, *options) for product in self.products) / plain

    def data(self, steps):
        """Random inputs and targets; the time does not depend on them."""
        import numpy as np

        random, shape = np.random.default_rng(0), (steps * self.batch, *self.input_shape)
        if self.embeds:
            return [random.integers(0, self.classes, shape, dtype="int32") for _ in range(2)]
        x = random.standard_normal(shape, dtype="float32")
        return x, x if self.classes is None else random.integers(0, self.classes, len(x), dtype="int32")


def added_multiplications(rows, num_in, num_out, shares, max_rows):
    """Gram matrix, inverse, and their products with the gradients, in the form that the conditioner takes."""
    import keras

    from keras_isaac.curvature import plan
    from keras_isaac.curvature.rows import KernelCall, Rows

    kept = min(rows, plan.num_kept(rows, num_in, num_out, shares, max_rows) or rows)
    sampled = Rows(keras.KerasTensor((kept, num_in)), kept, rows, rows)
    return plan.added_multiplications(KernelCall((num_in, num_out), sampled, has_product=kept == rows))


def dense(sizes, batch, tokens=None):
    """A stack of ReLU layers, on vectors or on sequences of them."""
    shapes = list(itertools.pairwise(sizes))
    input_shape = (sizes[0],) if tokens is None else (tokens, sizes[0])

    def build(make_layer=None):
        import keras

        make_layer = make_layer or (lambda _, num_out, activation: keras.layers.Dense(num_out, activation))
        layers = [make_layer(*shape, "relu") for shape in shapes[:-1]] + [make_layer(*shapes[-1], None)]
        return keras.Sequential([keras.Input(input_shape), *layers])

    products = [(batch * (tokens or 1), *shape) for shape in shapes]
    classes = None if sizes[0] == sizes[-1] else sizes[-1]
    return Benchmark(build, products, batch, input_shape, classes, shares=tokens is not None)


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
MODELS["autoencoder"] = dense((784, 1000, 500, 30, 500, 1000, 784), 60)
MODELS |= {"transformer": transformer(), "cnn": cnn()}
GROWTH = {f"width {width}": dense((784, *[width] * 4, 10), 60) for width in (50, 100, 200, 400, 800, 1600)}
GROWTH |= {f"batch {batch}": dense((784, *[400] * 4, 10), batch) for batch in (15, 30, 60, 120, 240, 480, 960, 1920)}
GROWTH |= {f"tokens {tokens}": dense([256] * 4, 4, tokens) for tokens in (16, 32, 64, 128, 256, 512, 1024)}


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", choices=["jax", "tensorflow", "torch"], help="default: the environment's, as Keras reads it"
    )
    names = ",".join(name for name in MODELS if name != "mlp-6400")
    parser.add_argument("--models", default=names, help=f"of {', '.join(MODELS)}; or all (default: all but mlp-6400)")
    parser.add_argument("--repetitions", type=int, default=15, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of a turn (default: as many as last 1/3 to 2/3 of a second)")
    parser.add_argument(
        "--processes", type=int, default=1, help="of each contender for first step and memory (default: %(default)s)"
    )
    parser.add_argument("--jit", action="store_true", help="train with `jit_compile=True`")
    parser.add_argument("--json", type=Path, help="save the results here too")
    parser.add_argument("--growth", type=Path, help="vary width, batch and tokens instead, and save the picture here")
    arguments = parser.parse_args()
    if arguments.jit:
        os.environ["KERAS_ISAAC_JIT"] = "1"
    arguments.models = list(MODELS) if arguments.models == "all" else arguments.models.split(",")
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"--models must be of {', '.join(MODELS)}. Received: {', '.join(sorted(unknown))}")
    if arguments.repetitions < 2:
        parser.error(f"--repetitions must be at least 2, for quartiles. Received: {arguments.repetitions}")
    return arguments


def find_device():
    """Returns the device's name, what waits for it, and what reads its peak memory in bytes (on a CPU, the process's)."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(), torch.cuda.synchronize, torch.cuda.max_memory_allocated
    if keras.backend.backend() == "jax":
        import jax

        if jax.default_backend() == "gpu":
            device = jax.devices()[0]
            # The step is one computation there, so that its loss waits for all of it.
            return device.device_kind, lambda: None, lambda: device.memory_stats()["peak_bytes_in_use"]
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{os.cpu_count()} CPU cores", lambda: None, lambda: unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_trainer(benchmark, contender):
    """Returns the function of data that trains the contender for an epoch and returns the seconds."""
    import keras

    from keras_isaac import ISAAC, capture_inputs

    if contender.endswith("loop"):
        return make_torch_loop(benchmark, contender)
    optimizer, capture, make_layer = keras.optimizers.SGD(LEARNING_RATE), lambda model: model, ()
    if contender in benchmark.variants:
        max_rows = benchmark.variants[contender]
        optimizer, capture = ISAAC(LEARNING_RATE, inner_optimizer="sgd", max_rows=max_rows), capture_inputs
    elif contender == "package in fit":
        make_layer = [lambda *layer: keras.layers.TorchModuleWrapper(make_torch_layer(contender, *layer))]
    model = capture(benchmark.build(*make_layer))
    loss = "mse" if benchmark.classes is None else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Spawned processes read it too.
    model.compile(optimizer=optimizer, loss=loss, jit_compile="KERAS_ISAAC_JIT" in os.environ or "auto")
    _, synchronize, _ = find_device()

    def train(x, y):
        times = []

        def tick(epoch, logs):
            synchronize()
            times.append(time.perf_counter())

        # What `fit` does before its first epoch does not grow with the steps.
        stopwatch = keras.callbacks.LambdaCallback(on_epoch_begin=tick, on_epoch_end=tick)
        model.fit(x, y, batch_size=benchmark.batch, verbose=0, callbacks=[stopwatch])
        return times[1] - times[0]

    return train


def make_torch_layer(contender, num_in, num_out, activation):
    """Returns a dense layer of PyTorch's, or of the package's."""
    import torch

    if contender.startswith("package"):
        import isaac

        layer = isaac.Linear(num_in, num_out, DAMPING, inv_type="inverse")
    else:
        layer = torch.nn.Linear(num_in, num_out)
    return torch.nn.Sequential(layer, torch.nn.ReLU()) if activation else layer


def make_torch_loop(benchmark, contender):
    """Does as `make_trainer`, without Keras."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    *first, last = [product[1:] for product in benchmark.products]
    layers = [make_torch_layer(contender, *shape, "relu") for shape in first] + [make_torch_layer(contender, *last, None)]
    model = torch.nn.Sequential(*layers).to(device)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    loss_fn = torch.nn.MSELoss() if benchmark.classes is None else torch.nn.CrossEntropyLoss()
    _, synchronize, _ = find_device()

    def train(x, y):
        x, y = torch.as_tensor(x), torch.as_tensor(y if benchmark.classes is None else y.astype("int64"))
        start = time.perf_counter()
        for x_batch, y_batch in zip(x.split(benchmark.batch), y.split(benchmark.batch), strict=True):
            optimizer.zero_grad()
            loss_fn(model(x_batch.to(device)), y_batch.to(device)).backward()
            optimizer.step()
        synchronize()
        return time.perf_counter() - start

    return train


def measure_first_step(name, contender):
    """Returns the seconds to the end of the first step, and the peak memory of a few in MB, compilation included."""
    # What the framework sets up once is no part of it.
    make_trainer(dense((2, 2), 1), "plain")(*dense((2, 2), 1).data(1))
    train, data = make_trainer(MODELS[name], contender), MODELS[name].data(1)
    # A pass of the garbage collector over all that was imported would fall on one or the other by chance.
    gc.collect()
    gc.freeze()
    start = time.perf_counter()
    train(*data)
    seconds = time.perf_counter() - start
    train(*MODELS[name].data(3))
    _, _, peak_memory = find_device()
    return seconds, peak_memory() / 2**20


def measure_in_processes(name, num_processes):
    """Returns the medians of `measure_first_step` over fresh processes, for each contender."""
    measured = {contender: [] for contender in ("plain", *MODELS[name].variants)}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for _, contender in itertools.product(range(num_processes), measured):
            measured[contender].append(pool.submit(measure_first_step, name, contender).result())
    return {contender: [statistics.median(each) for each in zip(*pairs, strict=True)] for contender, pairs in measured.items()}


def measure(name, benchmark, arguments, package, fresh):
    """Lets the contenders take turns; returns a dictionary of results for each that has a plain one."""
    plain_of = {"plain": None, **dict.fromkeys(benchmark.variants, "plain")}
    if package and not benchmark.shares:
        plain_of |= {"package in fit": "plain", "plain loop": None, "package in loop": "plain loop"}
    trainers = {contender: make_trainer(benchmark, contender) for contender in plain_of}
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
    for contender, baseline in plain_of.items():
        if baseline is None:
            continue
        plain, captured = milliseconds[baseline], milliseconds[contender]
        result = {"model": name, "contender": contender, "steps": steps}
        result |= {"plain_ms": quartiles(plain), "captured_ms": quartiles(captured)}
        # Pairs are neighbors in time, which a busy machine slows alike.
        result["ratio"] = quartiles([ours / theirs for ours, theirs in zip(captured, plain, strict=True)])
        result["added_ms"] = result["captured_ms"][1] - result["plain_ms"][1]
        result["floor"] = benchmark.floor(contender if contender in benchmark.variants else "ISAAC")
        pairs = zip(fresh["plain"], fresh[contender], strict=True) if contender in fresh else (None, None)
        result |= dict(zip(("first_step_s", "memory_mb"), pairs, strict=True))
        results.append(result)
    return results


def quartiles(values):
    """Returns the lower quartile, the median and the upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def print_table(results, title):
    """Prints two lines for each result: medians, and below them quartiles or the change."""
    from rich import box, console, table

    lines = table.Table(title=title, box=box.SIMPLE_HEAD, caption="first step and peak memory: plain → captured")
    for column in ("model", "contender"):
        lines.add_column(column, no_wrap=True)
    for column in ("plain ms", "captured ms", "ratio", "added ms", "floor", "first step, s", "peak memory, MB"):
        lines.add_column(column, justify="right", no_wrap=True)
    for result in results:
        cells = []
        for key in ("plain_ms", "captured_ms", "ratio"):
            digits = 3 if key == "ratio" else 0 if result[key][1] > 100 else 2
            low, median, high = (f"{value:.{digits}f}" for value in result[key])
            cells.append(f"{median}\n({low}-{high})")
        cells += [f"{result['added_ms']:.2f}", f"{result['floor']:.3f}"]
        for key, digits in (("first_step_s", 2), ("memory_mb", 0)):
            plain, captured = result[key] or (1, 1)
            cells.append(f"{plain:.{digits}f} → {captured:.{digits}f}\n({captured / plain - 1:+.1%})" if result[key] else "")
        lines.add_row(result["model"], result["contender"], *cells)
    console.Console(width=140).print(lines)


def save_picture(results, path, title):
    """Saves the ratios, measured and by the floor, against what grows."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"width": "width, at batch 60", "batch": "batch, at width 400", "tokens": "tokens, at batch 4 and width 256"}
    colors = {"ISAAC": "#0072b2", "all rows": "#d55e00"}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), constrained_layout=True)
    for axis, (quantity, label) in zip(axes, labels.items(), strict=True):
        chosen = [result for result in results if result["model"].startswith(quantity)]
        for contender in dict.fromkeys(result["contender"] for result in chosen):
            line = [result for result in chosen if result["contender"] == contender]
            values, color = [int(result["model"].split()[1]) for result in line], colors[contender]
            axis.plot(values, [result["ratio"][1] for result in line], "o-", color=color, markersize=4, label=contender)
            axis.plot(values, [result["floor"] for result in line], "--", color=color, label=f"{contender}, floor")
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, values)
        axis.set(xlabel=label)
        axis.margins(y=0.2)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    axes[0].set(ylabel="captured step / plain step")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=72)
    print(f"saved {path}")


def main():
    """Runs the benchmark."""
    arguments = parse_arguments()
    if arguments.backend:
        # Keras fixes its backend when it is imported.
        os.environ["KERAS_BACKEND"] = arguments.backend
    if arguments.growth and not importlib.util.find_spec("matplotlib"):
        raise SystemExit("--growth draws with Matplotlib, which is not installed: pip install matplotlib")
    benchmarks = GROWTH if arguments.growth else {name: MODELS[name] for name in arguments.models}
    fresh = {}
    if not arguments.growth and arguments.processes:
        # Before Keras is imported here: Linux counts a process's peak from the size of its parent.
        for name in benchmarks:
            print(f"{name}: first step and memory", flush=True)
            fresh[name] = measure_in_processes(name, arguments.processes)
    import keras

    package = keras.backend.backend() == "torch" and not arguments.growth
    if package and not importlib.util.find_spec("isaac"):
        package = False
        print("The authors' package is left out: it is not installed (pip install isaac).")
    results = []
    for name, benchmark in benchmarks.items():
        print(f"{name}: time of a step", flush=True)
        for result in measure(name, benchmark, arguments, package, fresh.get(name, {})):
            (_, plain, _), (_, captured, _), (_, ratio, _) = (result[key] for key in ("plain_ms", "captured_ms", "ratio"))
            print(f"  {result['contender']}: {plain:.2f} → {captured:.2f} ms ({ratio:.3f})", flush=True)
            results.append(result)
    device, _, _ = find_device()
    title = f"The cost of a captured step: Keras {keras.version()}, {keras.backend.backend()}, {device}"
    print_table(results, title)
    if arguments.json:
        record = {"backend": keras.backend.backend(), "keras": keras.version(), "device": device}
        arguments.json.write_text(json.dumps({**record, "results": results}, indent=1) + "\n")
    if arguments.growth:
        save_picture(results, arguments.growth, title)


if __name__ == "__main__":
    main()
