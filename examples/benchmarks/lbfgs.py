"""SciPy's L-BFGS on the two equations, on one fixed set of points, where the other optimizers use batches.

    python lbfgs.py [--points 256 1024] [--evaluations 2000] [--seeds 3]

It prints the relative squared error of the solution, with the seconds that it took, for each number of points.
"""

import argparse
import os
import time

os.environ["KERAS_BACKEND"] = "jax"

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.optimize import minimize
from tasks import TASKS

EQUATIONS = ("poisson", "burgers")


def train(task, num_points, num_evaluations, seed=0):
    """Returns the validation and the test loss after as many evaluations of the loss and its gradient, and the seconds."""
    (x, y), *held_out = task.data()
    model = task.build(seed)
    start, unravel = ravel_pytree([variable.value for variable in model.trainable_variables])

    def call_of(weights):
        return lambda inputs: model.stateless_call(unravel(weights), [], inputs)[0]

    @jax.jit
    def loss_and_gradient(weights):
        return jax.value_and_grad(lambda weights: task.loss(call_of(weights), x[:num_points], y[:num_points]))(weights)

    loss_and_gradient(start)
    began = time.perf_counter()
    options = {"maxfun": num_evaluations, "maxiter": num_evaluations, "maxcor": 50, "ftol": 0.0, "gtol": 0.0}
    best = minimize(loss_and_gradient, np.asarray(start), jac=True, method="L-BFGS-B", options=options).x
    seconds = time.perf_counter() - began
    return *(float(task.held_out(call_of(best), *part)) for part in held_out), seconds


def main():
    """Prints a line for each equation and number of points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="*", default=(256, 1024), help="default: 256 1024")
    parser.add_argument("--evaluations", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    for name in EQUATIONS:
        for num_points in arguments.points:
            runs = [train(TASKS[name], num_points, arguments.evaluations, seed) for seed in range(arguments.seeds)]
            validation, test, seconds = (np.mean(each) for each in zip(*runs, strict=True))
            print(f"{name}, {num_points} points: test {test:.3g}, validation {validation:.3g} ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
