"""Trains every method on every task, searches each one's best setting, and stores the runs in `results/TASK.jsonl`.

    python evidence.py                                    # all that is missing: it resumes where it was stopped
    python evidence.py --tasks cnn,lora --methods "AdamW;Muon" --horizon 4

- The learning rate warms up over 5 % of the steps and then falls to zero by a cosine (with ScheduleFreeAdamW, which needs no
  schedule, it stays constant).
- Each method gets the same number of settings, over its learning rate and weight decay (K-FAC: its damping; tuned ISAAC: the
  damping too). The first is `Method.start`; each further one is a neighbour of the best so far, so the search has no edge.
- A horizon multiplies the task's steps. The search at 4 starts from the best setting at 1.
- The best setting has the lowest validation loss with one seed. It is then trained with other seeds and measured on test data.

`swap.py` wraps these optimizers in ISAAC at the same settings. `report.py` prints and draws what both stored.

KERAS_ISAAC_RESULTS names another folder for the results. MNIST is read through `keras.datasets`, or from the `.npz` file that
KERAS_ISAAC_IMAGES names. Some texts are Python's own, so resume with the Python that began (3.11 in `results/`).
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
from tasks import KNOWN, TASKS, UNSEEN, batches

from keras_isaac import ISAAC, capture_inputs

RESULTS = Path(os.environ.get("KERAS_ISAAC_RESULTS", Path(__file__).parent / "results"))
HORIZONS = (1, 4, 16)
NUM_CHECKS = 10
CHUNK = 500


class Trainer:
    """One task under one method, compiled once for all settings, horizons and seeds.

    With `isaac`, arguments of `ISAAC`, the method's optimizer is wrapped in it.
    """

    def __init__(self, task, method, isaac=None):
        self.task, self.method = task, method
        parts = task.data()
        jax.config.update("jax_enable_x64", parts[0][0].dtype == "float64")
        self.parts = [[jax.numpy.asarray(each) for each in part] for part in parts]
        self.model, optimizer = task.build(0), method.make()
        self.optimizer = optimizer if isaac is None else ISAAC(inner_optimizer=optimizer, **isaac)
        self.is_isaac = isinstance(self.optimizer, ISAAC)
        self.inner = self.optimizer.inner_optimizer if self.is_isaac else self.optimizer
        if self.is_isaac:
            self.model = capture_inputs(self.model)
        self.optimizer.build(self.model.trainable_variables)
        self.initial = [variable.value for variable in self.optimizer.variables]
        # One jitted step rather than a loop inside XLA, where convolutions on a CPU are ten times slower.
        self.step = jax.jit(self._step)
        self.measures = jax.jit(self._measures)

    def _step(self, state, number, places, setting, total, x, y):
        """Trains one step; returns the state after it, and the batch's loss."""
        trainable, others, optimizer_variables = state
        learning_rate, weight_decay, *damping = setting
        set_to = {id(self.optimizer.learning_rate): learning_rate * self._schedule(number, total)}
        if damping:
            set_to[id(self.optimizer.damping)] = damping[0]
        # Not variables: they are read while the step is traced. Keras' Muon has one for the kernels it leaves to AdamW.
        self.inner.weight_decay = weight_decay
        if hasattr(self.inner, "adam_weight_decay"):
            self.inner.adam_weight_decay = weight_decay
        optimizer_variables = [
            set_to.get(id(variable), value)
            for variable, value in zip(self.optimizer.variables, optimizer_variables, strict=True)
        ]
        scope = self.optimizer.conditioning(optimizer_variables) if self.is_isaac else contextlib.nullcontext()

        def loss_of(trainable):
            call, updated = self._call(trainable, others)
            return self.task.loss(call, x[places], y[places]), updated

        with scope:
            (loss, (*_, others)), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        trainable, optimizer_variables = self.optimizer.stateless_apply(optimizer_variables, gradients, trainable)
        return (trainable, others, optimizer_variables), loss

    def _call(self, trainable, others, training=True):
        """Returns the model's call with these weights, and a list that receives its updated non-trainable weights."""
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
        if isinstance(self.inner, ScheduleFreeAdamW):
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
        state = self.start(seed)
        (x, y), validation, _ = self.parts
        num_steps = self.task.steps // NUM_CHECKS * horizon
        total = num_steps * NUM_CHECKS
        order = batches(len(x), total, self.task.batch_size, seed)
        train_losses, validation_losses = [], []
        for check in range(NUM_CHECKS):
            losses = []
            for number in range(check * num_steps, (check + 1) * num_steps):
                state, loss = self.step(state, float(number), order[number], setting, float(total), x, y)
                losses.append(loss)
            train_losses.append(float(np.mean(losses)))
            if not train_losses[-1] < 10 * train_losses[0]:
                break
            validation_losses.append(self.evaluate(state, *validation)["loss"])
        return state, train_losses, validation_losses


def make_trainer(task, method, *options):
    """Returns what trains a task under a method; options are those of `Trainer`."""
    module, name = method.trainer.split(".")
    return getattr(importlib.import_module(module), name)(task, method, *options)


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
    """Yields the settings next to one: learning rates 1, 3, 10, 30, ..., and ten times more or less of another number."""
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


def add_run(path, trainer, names, setting, seed, horizon):
    """Trains, appends the run to a file, and prints its last validation loss."""
    start = time.perf_counter()
    names |= {"horizon": horizon, **dict(zip(NUMBERS, setting, strict=False)), "seed": seed}
    run = {**names, **trainer.run(setting, seed, horizon)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(run) + "\n")
    isaac = names.pop("isaac", None)
    label = f"{'ISAAC + ' if isaac else ''}{' '.join(map(str, names.values()))}"
    print(f"{path.stem}: {label}: {final(run):.4g} ({time.perf_counter() - start:.0f} s)", flush=True)


def time_steps(task, trainers, repetitions=7):
    """Measures the steps of several trainers in turns; returns their medians, in milliseconds."""
    times = {name: [] for name in trainers}
    num_steps = 2 * SOAP().basis_every
    # The first turn compiles.
    for _ in range(repetitions + 1):
        for name, trainer in trainers.items():
            (x, y), state = trainer.parts[0], trainer.start(0)
            order = batches(len(x), num_steps, task.batch_size, 0)
            setting = tuple(1e-4 for _ in trainer.method.start)
            start = time.perf_counter()
            for number, places in enumerate(order):
                state, loss = trainer.step(state, float(number), places, setting, float(num_steps), x, y)
            float(loss)
            times[name].append(1000 * (time.perf_counter() - start) / num_steps)
    return {name: float(f"{statistics.median(each[1:]):.3g}") for name, each in times.items()}


def tasks_of(names):
    """Returns the list of tasks that an argument names: "known", "unseen", or names separated by commas."""
    return [task for name in names.split(",") for task in {"known": KNOWN, "unseen": UNSEEN}.get(name, [name])]


def main():
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="known", help="known, unseen, or names separated by ',' (default: %(default)s)")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ';' (default: all)")
    parser.add_argument("--horizon", type=int, default=1, choices=HORIZONS, help="times the task's steps")
    parser.add_argument("--settings", type=int, default=9, help="how many, of each method (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many, of the best setting (default: %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="starts no run after these (default: none)")
    arguments = parser.parse_args()
    started = time.perf_counter()
    for task in tasks_of(arguments.tasks):
        for method in arguments.methods.split(";"):
            if method == "K-FAC" and task not in KFAC_TASKS:
                continue
            trainer = None
            for setting, seed in missing(task, method, arguments.horizon, arguments.settings, arguments.seeds):
                if time.perf_counter() - started > arguments.max_seconds:
                    print("out of time")
                    return
                trainer = trainer or make_trainer(TASKS[task], METHODS[method])
                add_run(RESULTS / f"{task}.jsonl", trainer, {"method": method}, setting, seed, arguments.horizon)


if __name__ == "__main__":
    main()
