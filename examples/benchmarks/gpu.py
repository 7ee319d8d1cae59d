"""The first ten minutes on a GPU: AdamW and Muon, plain and wrapped in ISAAC, by step and by wall clock.

    KERAS_BACKEND=jax python gpu.py --json gpu-jax.json
    KERAS_BACKEND=torch python gpu.py --policy mixed_bfloat16 --json gpu-torch.json
    KERAS_BACKEND=jax python gpu.py --tiny                # on a CPU, in a minute: checks that the script runs

`gpt` is a character transformer of 31 million parameters on the source of Python's standard library. `mlp` has 55 million
parameters (five dense layers, 4,096 wide) and learns the outputs of a random network. Every optimizer runs in a process of its
own, with the same weights, batches, learning rate and weight decay. The first chunk of steps compiles and is not timed.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import statistics
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

import overhead

MODELS, OPTIMIZERS = ("gpt", "mlp"), ("AdamW", "ISAAC + AdamW", "Muon", "ISAAC + Muon")


class Sizes(NamedTuple):
    """What `--tiny` changes."""

    width: int
    blocks: int
    tokens: int
    batch: int
    hidden: int
    rows: int


LARGE = Sizes(width=512, blocks=10, tokens=256, batch=32, hidden=4096, rows=1024)
TINY = Sizes(width=16, blocks=1, tokens=16, batch=4, hidden=32, rows=16)


def texts(sizes, num_samples):
    """Returns windows of source code, and the same windows one character later."""
    import numpy as np

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    codes = np.frombuffer(b"".join(file.read_bytes() for file in files), "uint8").astype("int32") % 128
    places = np.random.default_rng(0).integers(0, len(codes) - sizes.tokens - 1, num_samples)
    windows = codes[places[:, None] + np.arange(sizes.tokens + 1)]
    return windows[:, :-1], windows[:, 1:]


def teacher(sizes, num_samples):
    """Returns random inputs, and the outputs of a random network for them."""
    import numpy as np

    random = np.random.default_rng(0)
    x = random.normal(size=(num_samples, sizes.hidden // 4)).astype("float32")
    first, second = (
        random.normal(size=(x.shape[1], num)).astype("float32") / math.sqrt(x.shape[1]) for num in (x.shape[1], 16)
    )
    return x, np.tanh(2 * x @ first) @ second


def make(name, sizes, num_steps):
    """Returns the model, its loss, its batch size, and the data of all steps."""
    import keras

    keras.utils.set_random_seed(0)
    if name == "gpt":
        benchmark = overhead.transformer(sizes.batch, sizes.tokens, sizes.width, max(1, sizes.width // 64), sizes.blocks)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        return benchmark.build(), loss, sizes.batch, texts(sizes, sizes.batch * num_steps)
    benchmark = overhead.dense((sizes.hidden // 4, *[sizes.hidden] * 4, 16), sizes.rows)
    return benchmark.build(), "mse", sizes.rows, teacher(sizes, sizes.rows * num_steps)


def train(name, contender, arguments):
    """Trains, and returns the losses, the seconds of every chunk of steps, and the peak memory."""
    import keras
    from baselines import Muon

    from keras_isaac import ISAAC, capture_inputs

    keras.config.set_dtype_policy(arguments.policy)
    num_steps = arguments.chunks * arguments.steps
    model, loss, batch_size, (x, y) = make(name, TINY if arguments.tiny else LARGE, num_steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, num_steps, warmup_target=arguments.learning_rate, warmup_steps=max(1, num_steps // 20)
    )
    optimizer = Muon(schedule, exclude="embedding") if "Muon" in contender else keras.optimizers.AdamW(schedule)
    if "ISAAC" in contender:
        model, optimizer = capture_inputs(model), ISAAC(inner_optimizer=optimizer)
    model.compile(optimizer, loss)
    device, synchronize, peak_memory = overhead.find_device()
    seconds, losses = [], []

    class Stopwatch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.start = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            synchronize()
            seconds.append(time.perf_counter() - self.start)
            losses.append(float(logs["loss"]))

    for chunk in range(arguments.chunks):
        part = slice(chunk * arguments.steps * batch_size, (chunk + 1) * arguments.steps * batch_size)
        model.fit(x[part], y[part], batch_size=batch_size, shuffle=False, verbose=0, callbacks=[Stopwatch()])
    result = {"model": name, "optimizer": contender, "parameters": model.count_params(), "losses": losses, "seconds": seconds}
    return result | {"device": device, "backend": keras.backend.backend(), "peak_mb": round(peak_memory() / 2**20)}


def milliseconds(result, num_steps):
    """The median time of a step, without the first chunk."""
    return 1000 * statistics.median(result["seconds"][1:]) / num_steps


def seconds_to(result, target, num_steps):
    """The seconds of steps until the mean loss of a chunk is at most `target`; infinite if never."""
    for chunk, loss in enumerate(result["losses"]):
        if loss <= target:
            return (chunk + 1) * num_steps * milliseconds(result, num_steps) / 1000
    return math.inf


def print_table(results, num_steps):
    """Prints a line for every run; the wrapped optimizers are compared with the plain ones."""
    first = results[0]
    print(
        f"\n{first['backend']} on {first['device']}; {first['model']} has {first['parameters'] / 1e6:.1f} million parameters\n"
    )
    print("| model | optimizer | ms a step | over plain | peak MB | last loss | seconds to the plain last loss |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    plain = {result["optimizer"]: result for result in results}
    for result in results:
        base = plain.get(result["optimizer"].removeprefix("ISAAC + "), result)
        time_of = milliseconds(result, num_steps)
        ratio, seconds = time_of / milliseconds(base, num_steps), seconds_to(result, base["losses"][-1], num_steps)
        cells = [result["model"], result["optimizer"], f"{time_of:.2f}", f"{ratio:.2f}", result["peak_mb"]]
        cells += [f"{result['losses'][-1]:.4g}", "never" if math.isinf(seconds) else f"{seconds:.1f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


def main():
    """Trains every model under every optimizer, and prints a table after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="separated by ',' (default: %(default)s)")
    parser.add_argument("--optimizers", default=";".join(OPTIMIZERS), help="separated by ';' (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=12, help="at least 2; the first is not timed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="of a chunk (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its peak (default: %(default)s)")
    parser.add_argument("--policy", default="float32", help="Keras' dtype policy (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny size, to check the script on a CPU")
    parser.add_argument("--json", type=Path, help="save the results here, after every run")
    arguments = parser.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    results = []
    for name in arguments.models.split(","):
        for contender in arguments.optimizers.split(";"):
            # A process each: memory that one holds would count as the next one's.
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                result = pool.submit(train, name, contender, arguments).result()
            results.append(result)
            print(
                f"{name}, {contender}: {milliseconds(result, arguments.steps):.2f} ms, loss {result['losses'][-1]:.4g}",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        print_table([result for result in results if result["model"] == name], arguments.steps)


if __name__ == "__main__":
    main()
