"""Trains six tasks with first-order optimizers and with ISAAC, every method over its grid, and says which needs how much.

    python evidence.py                                    # all: resumes where it was stopped
    python evidence.py --tasks cnn --methods "ISAAC + AdamW;AdamW"
    python evidence.py --time                             # milliseconds a step, on a quiet machine
    python report.py                                      # the tables and pictures of what is in results/

Each run is kept in `results/TASK.json` (or in the folder that KERAS_ISAAC_RESULTS names) as soon as it is done. The grid is run
with one seed; the best learning rate (and damping) of each method, by its training loss at the end, then with two more. MNIST
comes through `keras.datasets`, or from the `.npz` file that KERAS_ISAAC_IMAGES names.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(os.environ.get("KERAS_ISAAC_RESULTS", Path(__file__).parent / "results"))
SEEDS = (0, 1, 2)
NUM_CHECKS = 20
RATES = {
    "sgd": (10.0, 3.0, 1.0, 0.3, 0.1, 0.03),
    "adamw": (0.01, 0.003, 0.001, 0.0003, 0.0001),
    "muon": (0.01, 0.003, 0.001, 0.0003, 0.0001),
    "kfac": (10.0, 3.0, 1.0, 0.3, 0.1, 0.03),
}


class Method(NamedTuple):
    """An optimizer, by the grid of its learning rates; with `isaac`, arguments of `ISAAC`, around it."""

    optimizer: str
    options: dict
    isaac: dict | None = None
    dampings: tuple = (None,)


NORM = {"preserve_norm": True}
METHODS = {
    "SGD": Method("sgd", {}),
    "momentum": Method("sgd", {"momentum": 0.9}),
    "AdamW": Method("adamw", {}),
    "Muon": Method("muon", {}),
    "ISAAC": Method("sgd", {}, {}, (1.0,)),
    "ISAAC, norm": Method("sgd", {}, NORM, (0.1, 1.0)),
    "ISAAC + momentum, norm": Method("sgd", {"momentum": 0.9}, NORM, (1.0,)),
    "ISAAC + AdamW": Method("adamw", {}, {}, (0.01, 0.1, 1.0)),
    "ISAAC + AdamW, norm": Method("adamw", {}, NORM, (0.1, 1.0)),
    "ISAAC + AdamW, absolute": Method("adamw", {}, {"relative_damping": False}, (0.1, 1.0)),
    "ISAAC + AdamW, 256 rows": Method("adamw", {}, {"max_rows": 256}, (0.1, 1.0)),
    "ISAAC + AdamW, all rows": Method("adamw", {}, {"max_rows": None}, (0.1, 1.0)),
    "ISAAC + Muon": Method("muon", {}, {}, (1.0,)),
    "K-FAC": Method("kfac", {}, None, (0.1, 0.01)),
}
# What stands for a call without arguments, and what its defaults might have been: method, learning rate, damping. Of those
# too, all seeds are run.
BY_DEFAULT = {
    "AdamW()": ("AdamW", 0.001, None),
    "ISAAC()": ("ISAAC + AdamW", 0.001, 1.0),
    "its norm preserved": ("ISAAC + AdamW, norm", 0.001, 1.0),
    "an absolute damping": ("ISAAC + AdamW, absolute", 0.001, 1.0),
    "into SGD": ("ISAAC", 0.1, 1.0),
}
# Where no kernel is shared over positions, rows are not capped, and a batch of text has as many as stand for all. K-FAC is of
# dense layers, and trains the paper's networks.
OF_POSITIONS = ("ISAAC + AdamW, 256 rows", "ISAAC + AdamW, all rows")
LEFT_OUT = {"classifier": OF_POSITIONS, "autoencoder": OF_POSITIONS, "tabular": (*OF_POSITIONS, "K-FAC")}
LEFT_OUT |= {"cnn": ("K-FAC",)} | dict.fromkeys(("transformer", "lora"), (OF_POSITIONS[1], "K-FAC"))


class Trainer:
    """One task under one method, compiled once for all learning rates, dampings and seeds.

    `choose`, a function of the model, names the layers to capture; without it, all are.
    """

    def __init__(self, task, method, choose=None):
        import keras

        from keras_isaac import ISAAC, capture_inputs

        self.task, self.keras = task, keras
        self.train_data, self.test_data = task.data()
        model = task.build(SEEDS[0])
        self.model = capture_inputs(model, include=choose and choose(model))
        options = dict(method.options)
        if method.optimizer == "muon":
            options["exclude_layers"] = ["logits"]
        classes = {"sgd": keras.optimizers.SGD, "adamw": keras.optimizers.AdamW, "muon": keras.optimizers.Muon}
        optimizer = classes[method.optimizer](1e-3, **options)
        self.optimizer = optimizer if method.isaac is None else ISAAC(inner_optimizer=optimizer, **method.isaac)
        metrics = ["accuracy"] if task.metric == "accuracy" else []
        self.model.compile(optimizer=self.optimizer, loss=task.loss(), metrics=metrics)
        self.optimizer.build(self.model.trainable_variables)
        self.initial = [keras.ops.convert_to_numpy(variable) for variable in self.optimizer.variables]

    def reset(self, learning_rate, damping, seed):
        """Sets weights and optimizer back."""
        self.model.set_weights(self.task.build(seed).get_weights())
        for variable, value in zip(self.optimizer.variables, self.initial, strict=True):
            variable.assign(value)
        self.optimizer.learning_rate = learning_rate
        if damping is not None:
            self.optimizer.damping = damping

    def fit(self, first_step, last_step, seed):
        """Trains some steps."""
        x, y = self.train_data
        order = batches(self.task, len(x), first_step, last_step, seed)
        self.model.fit(x[order], y[order], batch_size=self.task.batch_size, shuffle=False, verbose=0)

    def evaluate(self, x, y):
        """Returns loss and metric."""
        return self.model.evaluate(x, y, batch_size=256, verbose=0, return_dict=True)

    def run(self, learning_rate, damping, seed):
        """Returns the training loss after each twentieth of the steps, and of the held-out data loss and metric."""
        self.reset(learning_rate, damping, seed)
        x, y = self.train_data
        losses = []
        for check in range(NUM_CHECKS + 1):
            if check:
                self.fit(*(self.task.steps * each // NUM_CHECKS for each in (check - 1, check)), seed)
            loss = self.evaluate(x[:1024], y[:1024])["loss"]
            losses.append(float(f"{loss:.4g}"))
            if not loss < 100 * losses[0]:
                return {"losses": None}
        return {"losses": losses, **{name: float(f"{value:.4g}") for name, value in self.evaluate(*self.test_data).items()}}


def batches(task, num_samples, first_step, last_step, seed):
    """Returns which samples make the batches of some steps, the same for all methods."""
    import numpy as np

    places = np.arange(first_step * task.batch_size, last_step * task.batch_size)
    orders = np.random.default_rng(seed)
    return np.concatenate([orders.permutation(num_samples) for _ in range(places[-1] // num_samples + 1)])[places]


def make_trainer(task, method):
    """Returns what trains a task under a method."""
    if method.optimizer == "kfac":
        from kfac import KfacTrainer

        return KfacTrainer(task)
    return Trainer(task, method)


def key(method, learning_rate, damping, seed):
    """Names a run."""
    return f"{method} | {learning_rate:g} | {'' if damping is None else f'{damping:g}'} | {seed}"


def final_loss(run):
    """The training loss at the end, infinite where it diverged."""
    return run["losses"][-1] if run and run["losses"] else float("inf")


def load(task):
    """The results of a task."""
    path = RESULTS / f"{task}.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": {}, "milliseconds": {}}


def save(task, results):
    """Keeps them, one run a line."""
    RESULTS.mkdir(exist_ok=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in results["runs"].items()]
    head = f'{{"milliseconds": {json.dumps(results["milliseconds"])},\n "runs": {{\n'
    (RESULTS / f"{task}.json").write_text(head + ",\n".join(lines) + "\n}}\n")


def best(results, method):
    """The learning rate and damping of the least training loss in the first seed."""
    grid = [(rate, damping) for rate in RATES[METHODS[method].optimizer] for damping in METHODS[method].dampings]
    done = {each: final_loss(results["runs"].get(key(method, *each, SEEDS[0]))) for each in grid}
    return min(done, key=done.get)


def run_grid(task_name, method_name, num_seeds, max_seconds):
    """Runs what is missing of a method's grid, then its best and what is the default with the other seeds."""
    from tasks import TASKS

    method, results = METHODS[method_name], load(task_name)
    trainer, started = None, time.perf_counter()

    def wanted():
        for damping in method.dampings:
            yield from ((rate, damping, SEEDS[0]) for rate in RATES[method.optimizer])
        settings = [best(load(task_name), method_name), *(each[1:] for each in BY_DEFAULT.values() if each[0] == method_name)]
        for seed in SEEDS[1:num_seeds]:
            yield from ((*setting, seed) for setting in dict.fromkeys(settings))

    for each in wanted():
        name = key(method_name, *each)
        if name in results["runs"]:
            continue
        if time.perf_counter() - started > max_seconds:
            print(f"{task_name}: {method_name}: out of time")
            return
        trainer = trainer or make_trainer(TASKS[task_name], method)
        start = time.perf_counter()
        run = trainer.run(*each)
        # Another process may have added runs of another method.
        results = load(task_name)
        results["runs"][name] = run
        save(task_name, results)
        print(f"{task_name}: {name}: {final_loss(run):.4g} ({time.perf_counter() - start:.0f} s)", flush=True)


def time_steps(task_name, methods, repetitions=7):
    """Measures the methods' steps in turns: milliseconds, medians."""
    from tasks import TASKS

    trainers = {name: make_trainer(TASKS[task_name], METHODS[name]) for name in methods}
    times = {name: [] for name in trainers}
    # As many steps of a turn as the first method makes in half a second.
    first, steps, seconds = next(iter(trainers.values())), 2, 0.0
    first.reset(1e-4, None, SEEDS[0])
    first.fit(0, 1, SEEDS[0])
    while seconds < 0.5 and steps < 500:
        steps *= 2
        start = time.perf_counter()
        first.fit(0, steps, SEEDS[0])
        seconds = time.perf_counter() - start
    for repetition in range(repetitions + 1):
        for name, trainer in trainers.items():
            if repetition == 0:
                trainer.reset(1e-4, None, SEEDS[0])
            start = time.perf_counter()
            trainer.fit(0, 1 if repetition == 0 else steps + 1, SEEDS[0])
            long = time.perf_counter() - start
            start = time.perf_counter()
            trainer.fit(0, 1, SEEDS[0])
            if repetition:
                times[name].append((long - (time.perf_counter() - start)) / steps)
    results = load(task_name)
    results["milliseconds"] |= {name: float(f"{1000 * statistics.median(each):.4g}") for name, each in times.items()}
    save(task_name, results)


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["jax", "tensorflow", "torch"], help="default: as Keras reads it")
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="default: all")
    parser.add_argument("--methods", type=lambda text: text.split(";"), help="separated by ';' (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, of the best of each grid (default: %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=1e9, help="for one method of one task (default: none)")
    parser.add_argument("--time", action="store_true", help="measure the time of a step instead; wants a quiet machine")
    return parser.parse_args()


def main():
    """Runs what is missing."""
    arguments = parse_arguments()
    if arguments.backend:
        # Keras fixes its backend when it is imported.
        os.environ["KERAS_BACKEND"] = arguments.backend
    from tasks import TASKS

    for task in arguments.tasks or TASKS:
        methods = [name for name in arguments.methods or METHODS if name not in LEFT_OUT[task]]
        if arguments.time:
            time_steps(task, methods)
            continue
        for method in methods:
            run_grid(task, method, arguments.seeds, arguments.max_seconds)


if __name__ == "__main__":
    main()
