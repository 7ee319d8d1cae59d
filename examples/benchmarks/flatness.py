"""How flat the minima are in which the methods of `evidence.py` end: its best setting of each is trained again.

    python flatness.py [--tasks diamonds,classifier] [--methods "AdamW;Muon"] [--seeds 3]

Of the mean loss of training data it prints the largest eigenvalue of the Hessian, by power iteration, and by how much the loss
rises when every weight moves at random by a twentieth of its tensor's length (which, unlike the first, no scale of weights
changes), with the test loss.
"""

import argparse
import os
import statistics

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
from evidence import load, make_trainer
from jax.flatten_util import ravel_pytree
from methods import METHODS
from report import best_setting
from swap import markdown
from tasks import TASKS

NUM_SAMPLES, NUM_ITERATIONS, NUM_DRAWS, STEP = 500, 30, 10, 0.05


def largest_eigenvalue(loss, weights, num_iterations=NUM_ITERATIONS):
    """Returns the Hessian's eigenvalue of the largest size at these weights, a vector."""
    product = jax.jit(lambda vector: jax.jvp(jax.grad(loss), (weights,), (vector,))[1])
    vector, value = jax.random.normal(jax.random.key(0), weights.shape, weights.dtype), 0.0
    for _ in range(num_iterations):
        vector = vector / jnp.linalg.norm(vector)
        turned = product(vector)
        vector, value = turned, float(vector @ turned)
    return value


def rise(loss, weights, num_draws=NUM_DRAWS, step=STEP):
    """Returns by how much the loss rises, in the mean, when each tensor moves by a part of its length."""

    @jax.jit
    def moved(key):
        keys = jax.random.split(key, len(weights))
        moves = [jax.random.normal(key, weight.shape, weight.dtype) for key, weight in zip(keys, weights, strict=True)]
        lengths = [step * jnp.linalg.norm(weight) / jnp.linalg.norm(move) for weight, move in zip(weights, moves, strict=True)]
        return loss([weight + length * move for weight, length, move in zip(weights, lengths, moves, strict=True)])

    return statistics.fmean(float(moved(key)) for key in jax.random.split(jax.random.key(0), num_draws)) - float(loss(weights))


def measure(trainer, setting, seed):
    """Trains, and returns the test loss, the largest eigenvalue and the rise."""
    (trainable, others, variables), *_ = trainer.train(setting, seed)
    x, y = (part[:NUM_SAMPLES] for part in trainer.parts[0])

    def loss(trainable):
        call, _ = trainer._call(trainable, others, training=False)
        return trainer.task.loss(call, x, y)

    flat, unravel = ravel_pytree(trainable)
    test = trainer.evaluate((trainable, others, variables), *trainer.parts[2])["loss"]
    return test, largest_eigenvalue(lambda vector: loss(unravel(vector)), flat), rise(loss, trainable)


def main():
    """Prints a line for each task and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="diabetes,diamonds,classifier,cnn", help="default: %(default)s")
    parser.add_argument("--methods", default="AdamW;Muon;ISAAC + AdamW, tuned", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    arguments = parser.parse_args()
    rows = []
    for task in arguments.tasks.split(","):
        for method in arguments.methods.split(";"):
            if (setting := best_setting(load(task), method, 1)) is None:
                continue
            trainer = make_trainer(TASKS[task], METHODS[method])
            results = [measure(trainer, setting, seed) for seed in range(arguments.seeds)]
            rows.append([task, method, *(f"{statistics.fmean(each):.3g}" for each in zip(*results, strict=True))])
            print(*rows[-1], flush=True)
    markdown(["task", "method", "test loss", "largest eigenvalue", "rise of the training loss"], rows)


if __name__ == "__main__":
    main()
