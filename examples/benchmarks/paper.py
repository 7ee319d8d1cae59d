"""Repeats the experiments of the ISAAC paper at a size of minutes, and draws them.

    python paper.py --backend jax                         # all, about half an hour on two cores; resumes where it was stopped
    python paper.py --experiments map,layers

- `map` (the paper's E1): a ReLU network of five layers, 100 wide, at every input damping λ_a and output damping λ_g, up to
  the infinite one of ISAAC proper.
- `layers` (its Fig. 5): which of the five layers of a network 400 wide are conditioned.
- `adam` (its Fig. 4): fine-tuning a transformer at batch 8 with AdamW on conditioned gradients; here one of characters.
- `residual` (its Fig. 6): a residual network with batch normalization, of which the last layer alone is conditioned.

Each run is kept in `results/paper/EXPERIMENT.json` as soon as it is done, one seed each. Losses are of the training data at the
end, at the best learning rate of each setting. Conditioned gradients have the norm of plain ones in `map` and `layers`,
so that SGD's learning rates suit every damping; the paper tuned them.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(os.environ.get("KERAS_ISAAC_RESULTS", Path(__file__).parent / "results")) / "paper"
NUM_CHECKS = 20
RATES = {"sgd": (3.0, 1.0, 0.3, 0.1, 0.03), "adamw": (0.003, 0.001, 0.0003, 0.0001)}
EXPONENTS = range(-6, 7, 2)
OUTPUT_DAMPINGS = (*(10.0**exponent for exponent in EXPONENTS), None)
CHOSEN = {
    "none": (),
    "first": (0,),
    "last": (4,),
    "first three": (0, 1, 2),
    "last three": (2, 3, 4),
    "odd": (0, 2, 4),
    "even": (1, 3),
    "all": (0, 1, 2, 3, 4),
}


class Method(NamedTuple):
    """An optimizer, by its name and arguments; with `isaac`, arguments of `ISAAC`, around it."""

    optimizer: str
    options: dict
    isaac: dict | None = None


FINE_TUNING = {
    "AdamW": (Method("adamw", {}), None),
    "ISAAC + AdamW": (Method("adamw", {}, {}), 1.0),
    "ISAAC + AdamW, norm": (Method("adamw", {}, {"preserve_norm": True}), 1.0),
}
RESIDUAL = {
    "SGD": (Method("sgd", {}), None),
    "ISAAC in the last layer": (Method("sgd", {}, {}), 1.0),
    "ISAAC in the last layer, norm": (Method("sgd", {}, {"preserve_norm": True}), 1.0),
}


def narrow_classifier(seed):
    """The paper's, 100 wide."""
    import keras

    keras.utils.set_random_seed(seed)
    hidden = [keras.layers.Dense(100, activation="relu") for _ in range(4)]
    return keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten(), *hidden, keras.layers.Dense(10)])


def residual_network(seed):
    """Three residual blocks, normalized."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(seed)

    def convolution(x, width, strides=1):
        return layers.BatchNormalization()(layers.Conv2D(width, 3, strides, padding="same", use_bias=False)(x))

    inputs = keras.Input((28, 28, 1))
    x = layers.ReLU()(convolution(inputs, 8, 2))
    for width, strides in ((8, 1), (16, 2), (32, 2)):
        y = convolution(layers.ReLU()(convolution(x, width, strides)), width)
        x = layers.ReLU()(y + (x if strides == 1 else layers.Conv2D(width, 1, strides)(x)))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def dense_layers(model):
    """In their order."""
    import keras

    return [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]


def map_settings():
    """Yields `(name, task, method, damping, rates, choose)` of every setting of the map."""
    from tasks import TASKS

    task = TASKS["classifier"]._replace(build=narrow_classifier, steps=300)
    for output_damping in OUTPUT_DAMPINGS:
        options = {"relative_damping": False, "preserve_norm": True, "output_damping": output_damping}
        for exponent in EXPONENTS:
            name = f"λ_g {'infinite' if output_damping is None else f'{output_damping:g}'}"
            yield name, task, Method("sgd", {}, options), 10.0**exponent, (0.3, 0.1), None


def layers_settings():
    """Likewise, of the choices of layers."""
    from tasks import TASKS

    for name, places in CHOSEN.items():
        # A choice of no layer is the plain optimizer.
        method = Method("sgd", {}, {"preserve_norm": True} if places else None)
        choose = (lambda model, places=places: [dense_layers(model)[place] for place in places]) if places else None
        yield name, TASKS["classifier"], method, 1.0 if places else None, (1.0, 0.3, 0.1), choose


def adam_settings():
    """Likewise, of fine-tuning."""
    from tasks import TASKS
    from tasks.texts import fine_tuned

    task = TASKS["lora"]._replace(build=fine_tuned, batch_size=8)
    for name, (method, damping) in FINE_TUNING.items():
        yield name, task, method, damping, RATES["adamw"], None


def residual_settings():
    """Likewise, of the residual network."""
    from tasks import TASKS

    task = TASKS["cnn"]._replace(build=residual_network, batch_size=100, steps=200)
    for name, (method, damping) in RESIDUAL.items():
        yield name, task, method, damping, RATES["sgd"], dense_layers if method.isaac is not None else None


EXPERIMENTS = {"map": map_settings, "layers": layers_settings, "adam": adam_settings, "residual": residual_settings}


class Trainer:
    """One task under one method at constant rates, compiled once for all rates and dampings.

    `choose`, a function of the model, names the layers to capture; without it, all are.
    """

    def __init__(self, task, method, choose=None):
        import keras

        from keras_isaac import ISAAC, capture_inputs

        self.task = task
        self.data = task.data()[0]
        model = task.build(0)
        self.model = capture_inputs(model, include=choose and choose(model))
        optimizer = keras.optimizers.get({"class_name": method.optimizer, "config": method.options})
        if method.isaac is not None:
            # All rows condition a kernel, as in the paper.
            optimizer = ISAAC(inner_optimizer=optimizer, max_rows=1024, **method.isaac)
        self.optimizer = optimizer
        self.model.compile(optimizer=self.optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        self.optimizer.build(self.model.trainable_variables)
        self.initial = [keras.ops.convert_to_numpy(variable) for variable in self.optimizer.variables]

    def run(self, learning_rate, damping):
        """Returns the training loss after each twentieth of the steps."""
        from tasks import batches

        self.model.set_weights(self.task.build(0).get_weights())
        for variable, value in zip(self.optimizer.variables, self.initial, strict=True):
            variable.assign(value)
        self.optimizer.learning_rate = learning_rate
        if damping is not None:
            self.optimizer.damping = damping
        x, y = self.data
        order, losses = batches(len(x), self.task.steps, self.task.batch_size, 0), []
        for check in range(NUM_CHECKS + 1):
            if check:
                first, last = (self.task.steps * each // NUM_CHECKS for each in (check - 1, check))
                places = order[first:last].reshape(-1)
                self.model.fit(x[places], y[places], batch_size=self.task.batch_size, shuffle=False, verbose=0)
            losses.append(float(f"{self.model.evaluate(x[:1024], y[:1024], batch_size=256, verbose=0):.4g}"))
            if not losses[-1] < 100 * losses[0]:
                return {"losses": None}
        return {"losses": losses}


def load(experiment):
    """The runs of an experiment."""
    path = RESULTS / f"{experiment}.json"
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def save(experiment, runs):
    """Keeps them, one run a line."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items())
    (RESULTS / f"{experiment}.json").write_text('{"runs": {\n' + lines + "\n}}\n")


def final_loss(run):
    """The training loss at the end, infinite where it diverged."""
    return run["losses"][-1] if run["losses"] else math.inf


def run(experiment):
    """Runs what is missing of an experiment."""
    trainer, trained = None, None
    for name, task, method, damping, rates, choose in EXPERIMENTS[experiment]():
        for rate in rates:
            runs = load(experiment)
            run_name = f"{name} | {rate:g} | {'' if damping is None else f'{damping:g}'} | 0"
            if run_name in runs:
                continue
            if trained != name:
                trainer, trained = Trainer(task, method, choose), name
            runs[run_name] = trainer.run(rate, damping)
            save(experiment, runs)
            print(f"{experiment}: {run_name}: {final_loss(runs[run_name]):.4g}", flush=True)


def losses_of(experiment):
    """The last loss of every run: a dictionary by setting and damping of one by learning rate."""
    losses = {}
    for run_name, each in load(experiment).items():
        name, rate, damping, _ = run_name.split(" | ")
        losses.setdefault((name, damping), {})[float(rate)] = final_loss(each)
    return losses


def _cell(loss):
    return f"{loss:.3g}" if math.isfinite(loss) else "diverged"


def print_table(experiment):
    """Prints the best loss of every setting, and its learning rate."""
    from rich.console import Console
    from rich.table import Table

    losses = losses_of(experiment)
    table = Table(title=experiment)
    table.add_column("", no_wrap=True)
    if experiment == "map":
        dampings = sorted({damping for _, damping in losses}, key=float)
        for damping in dampings:
            table.add_column(f"λ_a {damping}", justify="right")
        for name in dict.fromkeys(name for name, _ in losses):
            table.add_row(name, *(_cell(min(losses[name, damping].values())) for damping in dampings))
    else:
        rates = sorted({rate for each in losses.values() for rate in each})
        for rate in rates:
            table.add_column(f"{rate:g}", justify="right")
        for (name, _), each in losses.items():
            table.add_row(name, *(_cell(each[rate]) for rate in rates))
    Console(width=120).print(table)


def save_picture(path):
    """Draws the four."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), constrained_layout=True)
    losses = losses_of("map")
    names = list(dict.fromkeys(name for name, _ in losses))
    dampings = sorted({damping for _, damping in losses}, key=float)
    values = np.array([[min(losses[name, damping].values()) for damping in dampings] for name in names])
    picture = axes[0].imshow(np.log10(values), origin="lower", cmap="viridis_r")
    axes[0].set_xticks(range(len(dampings)), dampings, rotation=90)
    axes[0].set_yticks(range(len(names)), [name.removeprefix("λ_g ") for name in names])
    axes[0].set(xlabel="λ_a", ylabel="λ_g", title="λ_a and λ_g (white: diverged)")
    figure.colorbar(picture, ax=axes[0], label="log10 of the training loss")
    best = {name: min(each.values()) for (name, _), each in losses_of("layers").items()}
    axes[1].barh(list(best), list(best.values()), color=["#999999" if name == "none" else "#0072b2" for name in best])
    axes[1].invert_yaxis()
    axes[1].set(xlabel="training loss", title="conditioned layers of five")
    for axis, experiment, title in ((axes[2], "adam", "fine-tuning, batch 8"), (axes[3], "residual", "residual network")):
        for (name, _), each in losses_of(experiment).items():
            points = sorted((rate, loss) for rate, loss in each.items() if math.isfinite(loss))
            axis.plot(*zip(*points, strict=True), "o-" if "ISAAC" in name else "o--", label=name)
        axis.set(xscale="log", xlabel="learning rate", ylabel="training loss", title=title)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=72)
    print(f"saved {path}")


def main():
    """Runs what is missing, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["jax", "tensorflow", "torch"], help="default: as Keras reads it")
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS), help="default: all four")
    parser.add_argument("--picture", type=Path, default=Path("paper.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.backend:
        # Keras fixes its backend when it is imported.
        os.environ["KERAS_BACKEND"] = arguments.backend
    experiments = arguments.experiments.split(",")
    if unknown := set(experiments) - set(EXPERIMENTS):
        parser.error(f"--experiments must be of {', '.join(EXPERIMENTS)}. Received: {', '.join(sorted(unknown))}")
    for experiment in experiments:
        run(experiment)
        print_table(experiment)
    if all((RESULTS / f"{experiment}.json").exists() for experiment in EXPERIMENTS):
        save_picture(arguments.picture)


if __name__ == "__main__":
    main()
