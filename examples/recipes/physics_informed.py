"""A physics-informed network: it solves Poisson's equation -Δu = f on the unit square, without any data of u.

    python physics_informed.py --backend jax

The model's output is the left side of the equation, so that `fit` trains on points and values of f, in float64. ISAAC
conditions the whole gradient, with what flows through the derivatives by the inputs.
"""

import argparse
import math
import os

import numpy as np


def parse_arguments():
    """Reads the command line, and sets what Keras and JAX read when they are imported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["jax", "tensorflow", "torch"], help="default: the environment's")
    parser.add_argument("--width", type=int, default=64, help="of the hidden layers (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="of 1,024 points (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.backend:
        os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ["JAX_ENABLE_X64"] = "1"
    return arguments


def derivative(function, x):
    """Returns the derivative of `function(x)`, whose rows depend on those of `x` alone; with what it itself depends on."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.grad(lambda x: function(x).sum())(x)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x)
    import torch

    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]


def build_models(width):
    """Returns the network for u, which is zero on the boundary, and the model of -Δu, which has the same weights."""
    import keras

    points = keras.Input((2,))
    hidden = keras.Sequential([keras.layers.Dense(width, "tanh") for _ in range(3)])(points)
    bubble = 16 * keras.ops.prod(points * (1 - points), axis=-1, keepdims=True)
    solution = keras.Model(points, bubble * keras.layers.Dense(1)(hidden))

    class NegativeLaplacian(keras.Model):
        def __init__(self):
            super().__init__()
            self.solution = solution

        def call(self, points):
            second = [derivative(lambda x, i=i: derivative(self.solution, x)[:, i], points)[:, i] for i in range(2)]
            return -keras.ops.expand_dims(sum(second), -1)

    return solution, NegativeLaplacian()


def main():
    """Trains with Adam and with ISAAC around it, and prints the error of u."""
    arguments = parse_arguments()
    import keras

    from keras_isaac import ISAAC, capture_inputs

    keras.config.set_floatx("float64")
    points = np.random.default_rng(0).uniform(size=(1024, 2))
    exact = np.prod(np.sin(math.pi * points * (1, 2)), axis=1, keepdims=True)  # u = sin(πx) sin(2πy), and so f = 5π²u.
    steps = arguments.epochs * len(points) // 64
    rate = keras.optimizers.schedules.CosineDecay(1e-2, steps)
    for optimizer in (keras.optimizers.Adam(rate), ISAAC(rate, inner_optimizer="adam")):
        keras.utils.set_random_seed(0)
        solution, model = build_models(arguments.width)
        capture_inputs(model).compile(optimizer, "mse")

        def error(solution=solution):
            return np.linalg.norm(solution.predict(points, verbose=0) - exact) / np.linalg.norm(exact)

        before = error()
        model.fit(points, 5 * math.pi**2 * exact, batch_size=64, epochs=arguments.epochs, verbose=0)
        print(f"{type(optimizer).__name__:6}  relative error of u: {before:.2e} at first, {error():.2e} after {steps} steps")


if __name__ == "__main__":
    main()
