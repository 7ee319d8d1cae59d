"""Compares ISAAC with other optimizers under one protocol, on Keras with JAX; `report.py` prints and draws what came out.

    python evidence.py                                    # all that is missing: it resumes where it was stopped
    python evidence.py --tasks cnn,lora --methods "AdamW;ISAAC + AdamW" --horizon 4
    taskset -c 0 python evidence.py --time                # milliseconds a step, on one core

- The learning rate warms up over 5 % of the steps and then falls to zero by a cosine, whatever the method (of
  ScheduleFreeAdamW, which is made for it, it stays).
- Each method gets the same number of settings, over its learning rate and a second number: the damping of ISAAC and K-FAC, the
  weight decay of the others; but "ISAAC()" its defaults alone. The first setting is what `METHODS` says, the default of most;
  each further one is a neighbour of the best so far, so that no grid ends.
- A horizon is how many times the task's steps are trained. The search at 4 starts from the best setting at 1.
- The best is chosen by the loss of validation data, with one seed; with others, it is then measured on test data.

The text of some tasks comes with Python, so that they are to be resumed with the Python that began them (3.11 in `results/`).

Each run is a line of `results/TASK.jsonl` (or of the folder that KERAS_ISAAC_RESULTS names). MNIST comes through
`keras.datasets`, or from the `.npz` file that KERAS_ISAAC_IMAGES names.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import statistics
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import jax
import numpy as np
from baselines import SOAP
from keras.optimizers import ScheduleFreeAdamW
from methods import KFAC_TASKS, METHODS
from tasks import TASKS, batches

from keras_isaac import ISAAC, capture_inputs

RESULTS = Path(os.environ.get("KERAS_ISAAC_RESULTS", Path(__file__).parent / "results"))
HORIZONS = (1, 4, 16)
NUM_CHECKS = 10
CHUNK = 500


class Trainer:
    """One task under one method, compiled once for all settings, horizons and seeds."""

    def __init__(self, task, method):
        self.task, self.method = task, method
        parts = task.data()
        jax.config.update("jax_enable_x64", parts[0][0].dtype == "float64")
        self.parts = [[jax.numpy.asarray(each) for each in part] for part in parts]
        self.model = capture_inputs(task.build(0), exclude=method.exclude)
        self.optimizer = method.make()
        self.optimizer.build(self.model.trainable_variables)
        self.initial = [variable.value for variable in self.optimizer.variables]
        self.is_isaac = isinstance(self.optimizer, ISAAC)
        # Not a loop in XLA, where convolutions on a CPU take ten times as long.
        self.step = jax.jit(self._step)
        self.measures = jax.jit(self._measures)

    def _step(self, state, number, places, learning_rate, second, total, x, y):
        """Trains one step; returns the state after it, and the batch's loss."""
        trainable, others, optimizer_variables = state
        set_to = {id(self.optimizer.learning_rate): learning_rate * self._schedule(number, total)}
        scope = contextlib.nullcontext()
        damping, decays = second, self.optimizer
        if self.method.damping is not None:
            damping, decays = self.method.damping, self.optimizer.inner_optimizer
        if self.method.tunes_damping:
            second, damping = second
        if self.is_isaac:
            set_to[id(self.optimizer.damping)] = damping * self._schedule(number, total) ** self.method.damping_power
        if not self.is_isaac or self.method.damping is not None:
            # It is no variable: it is read while the step is traced.
            decays.weight_decay = second
        optimizer_variables = [
            set_to.get(id(variable), value)
            for variable, value in zip(self.optimizer.variables, optimizer_variables, strict=True)
        ]
        if self.is_isaac:
            scope = self.optimizer.conditioning(optimizer_variables)

        def loss_of(trainable):
            call, updated = self._call(trainable, others)
            return self.task.loss(call, x[places], y[places]), updated

        with scope:
            (loss, (*_, others)), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        trainable, optimizer_variables = self.optimizer.stateless_apply(optimizer_variables, gradients, trainable)
        return (trainable, others, optimizer_variables), loss

    def _call(self, trainable, others, training=True):
        """Returns the model's call with these weights, and a list of what its other weights become."""
        updated = []

        def call(x):
            outputs, new = self.model.stateless_call(trainable, others, x, training=training)
            updated.append(new)
            return outputs

        return call, updated

    def _schedule(self, number, total):
        warm_up = jax.numpy.ceil(0.05 * total)
        falling = 0.5 * (1 + jax.numpy.cos(math.pi * (number - warm_up) / (total - warm_up)))
        return jax.numpy.where(number < warm_up, (number + 1) / warm_up, 1.0 if self.method.is_constant else falling)

    def _measures(self, trainable, others, x, y):
        call, _ = self._call(trainable, others, training=False)
        measures = {"loss": self.task.held_out or self.task.loss, **self.task.measures}
        return {name: measure(call, x, y) for name, measure in measures.items()}

    def evaluate(self, state, x, y):
        """Returns the measures of held-out data."""
        chunks = [slice(start, start + CHUNK) for start in range(0, len(x), CHUNK)]
        results = [self.measures(*state[:2], x[chunk], y[chunk]) for chunk in chunks]
        weights = [len(x[chunk]) / len(x) for chunk in chunks]
        return {
            name: sum(weight * float(each[name]) for weight, each in zip(weights, results, strict=True)) for name in results[0]
        }

    def start(self, seed):
        """Returns the state before the first step: weights, other variables of the model, variables of the optimizer."""
        model = self.task.build(seed)
        values = [[variable.value for variable in each] for each in (model.trainable_variables, model.non_trainable_variables)]
        initial = list(self.initial)
        if isinstance(self.optimizer, ScheduleFreeAdamW):
            # Its momentum starts as a copy of the weights.
            places = [place for place, variable in enumerate(self.optimizer.variables) if variable.name.endswith("momentum")]
            for place, value in zip(places, values[0], strict=True):
                initial[place] = value
        return (*values, initial)

    def run(self, setting, seed, horizon=1):
        """Returns the training loss and the validation loss after each tenth of the steps, and the measures of test data."""
        state, train_losses, validation_losses = self.train(setting, seed, horizon)
        if len(validation_losses) < NUM_CHECKS:
            return {"train": None}
        result = {"train": train_losses, "validation": validation_losses, **self.evaluate(state, *self.parts[2])}
        return {name: [float(f"{x:.4g}") for x in v] if np.ndim(v) else float(f"{v:.4g}") for name, v in result.items()}

    def train(self, setting, seed, horizon=1):
        """Returns the last state, and the training and validation losses of each tenth of the steps, until one diverges."""
        learning_rate, *second = setting
        second = second if self.method.tunes_damping else second[0]
        state = self.start(seed)
        (x, y), validation, _ = self.parts
        num_steps = self.task.steps // NUM_CHECKS * horizon
        total = num_steps * NUM_CHECKS
        order = batches(len(x), total, self.task.batch_size, seed)
        train_losses, validation_losses = [], []
        for check in range(NUM_CHECKS):
            losses = []
            for number in range(check * num_steps, (check + 1) * num_steps):
                state, loss = self.step(state, float(number), order[number], learning_rate, second, float(total), x, y)
                losses.append(loss)
            train_losses.append(float(np.mean(losses)))
            if not train_losses[-1] < 10 * train_losses[0]:
                break
            validation_losses.append(self.evaluate(state, *validation)["loss"])
        return state, train_losses, validation_losses


def make_trainer(task, method):
    """Returns what trains a task under a method."""
    module, name = method.trainer.split(".")
    return getattr(importlib.import_module(module), name)(task, method)


def load(task):
    """The runs of a task, as a list of dictionaries."""
    path = RESULTS / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def final(run):
    """The validation loss at the end; infinite where the run diverged."""
    return run["validation"][-1] if run["train"] else math.inf


NUMBERS = ("rate", "second", "damping")


def setting_of(run):
    """The learning rate, the second number and, if there is one, the third."""
    return tuple(run[name] for name in NUMBERS if name in run)


def searched(runs, method, horizon, seed=0):
    """The validation losses of a seed by its setting; of the first seed, they are the search for the best."""
    chosen = [run for run in runs if (run["method"], run["horizon"], run["seed"]) == (method, horizon, seed)]
    return {setting_of(run): final(run) for run in chosen}


def neighbours(rate, *others):
    """Yields the settings beside one: the learning rates 1, 3, 10, 30, ..., and ten times more or less of another number."""
    place = round(2 * math.log10(rate))
    for other in (place + 1, place - 1):
        yield float(f"{(3 if other % 2 else 1) * 10.0 ** (other // 2):g}"), *others
    for place, number in enumerate(others):
        for other in (10 * number, number / 10):
            yield rate, *others[:place], float(f"{other:g}"), *others[place + 1 :]


def next_setting(losses, start, num_settings):
    """Returns the setting to try next, or `None` once there are as many as are wanted."""
    if not losses:
        return start
    if len(losses) < num_settings:
        for setting in sorted(losses, key=losses.get):
            for each in neighbours(*setting):
                if each not in losses:
                    return each
    return None


def missing(task, method, horizon, num_settings, num_seeds):
    """Yields the runs `(setting, seed)` to make; each must be made before the next is asked for."""
    start = METHODS[method].start
    num_settings = num_settings if METHODS[method].is_tuned else 1
    earlier = [each for each in HORIZONS if each < horizon]
    if earlier:
        losses = searched(load(task), method, earlier[-1])
        start = min(losses, key=losses.get) if losses else start
    while setting := next_setting(losses := searched(load(task), method, horizon), start, num_settings):
        yield setting, 0
    best = min(losses, key=losses.get)
    for seed in range(1, num_seeds):
        if best not in searched(load(task), method, horizon, seed):
            yield best, seed


def time_steps(task, methods, repetitions=7):
    """Measures the methods' steps in turns, and keeps the medians, in milliseconds."""
    trainers = {method: make_trainer(TASKS[task], METHODS[method]) for method in methods}
    times = {method: [] for method in methods}
    num_steps = 2 * SOAP().basis_every
    for _ in range(repetitions + 1):
        for method, trainer in trainers.items():
            (x, y), state = trainer.parts[0], trainer.start(0)
            order = batches(len(x), num_steps, trainer.task.batch_size, 0)
            start = time.perf_counter()
            for number, places in enumerate(order):
                second = (1.0, 1.0) if trainer.method.tunes_damping else 1.0
                state, loss = trainer.step(state, float(number), places, 1e-4, second, float(num_steps), x, y)
            float(loss)
            times[method].append(1000 * (time.perf_counter() - start) / num_steps)
    path = RESULTS / "milliseconds.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    # The first turn compiles.
    medians = {method: float(f"{statistics.median(each[1:]):.3g}") for method, each in times.items()}
    kept[task] = kept.get(task, {}) | medians
    path.write_text(json.dumps(kept, indent=1) + "\n")


def main():
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS), help="separated by ',' (default: all)")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ';' (default: all)")
    parser.add_argument("--horizon", type=int, default=1, choices=HORIZONS, help="times the task's steps")
    parser.add_argument("--settings", type=int, default=9, help="how many, of each method (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many, of the best setting (default: %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="starts no run after these (default: none)")
    parser.add_argument("--time", action="store_true", help="measure the time of a step instead; wants a quiet machine")
    arguments = parser.parse_args()
    started = time.perf_counter()
    RESULTS.mkdir(exist_ok=True)
    for task in arguments.tasks.split(","):
        methods = [each for each in arguments.methods.split(";") if each != "K-FAC" or task in KFAC_TASKS]
        if arguments.time:
            time_steps(task, methods)
            continue
        for method in methods:
            trainer = None
            for setting, seed in missing(task, method, arguments.horizon, arguments.settings, arguments.seeds):
                start = time.perf_counter()
                if start - started > arguments.max_seconds:
                    print("out of time")
                    return
                trainer = trainer or make_trainer(TASKS[task], METHODS[method])
                names = {
                    "method": method,
                    "horizon": arguments.horizon,
                    **dict(zip(NUMBERS, setting, strict=False)),
                    "seed": seed,
                }
                run = {**names, **trainer.run(setting, seed, arguments.horizon)}
                with (RESULTS / f"{task}.jsonl").open("a") as file:
                    file.write(json.dumps(run) + "\n")
                seconds = time.perf_counter() - start
                print(f"{task}: {' '.join(map(str, names.values()))}: {final(run):.4g} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
