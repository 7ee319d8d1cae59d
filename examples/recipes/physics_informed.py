"""A physics-informed network: it solves Poisson's equation -Δu = f on the unit square, without any data of u.

    python physics_informed.py

The model's output is the left side of the equation, so `fit` trains on points and values of f, in float64. ISAAC conditions the
whole gradient, including what flows through the derivatives with respect to the inputs.
"""

import math
import os

os.environ["JAX_ENABLE_X64"] = "1"

import keras
import numpy as np

from keras_isaac import ISAAC, capture_inputs

WIDTH, EPOCHS = 64, 60
keras.config.set_floatx("float64")


def derivative(function, x):
    """Returns the derivative of `function`, whose rows depend on the same rows of `x` only."""
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


def build_solution():
    """The network for u, which is zero on the boundary."""
    points = keras.Input((2,))
    hidden = keras.Sequential([keras.layers.Dense(WIDTH, "tanh") for _ in range(3)])(points)
    bubble = 16 * keras.ops.prod(points * (1 - points), axis=-1, keepdims=True)
    return keras.Model(points, bubble * keras.layers.Dense(1)(hidden))


class NegativeLaplacian(keras.Model):
    """-Δu, with the weights of u."""

    def __init__(self, solution):
        super().__init__()
        self.solution = solution

    def call(self, points):
        """Differentiates twice by each coordinate."""
        second = [derivative(lambda x, i=i: derivative(self.solution, x)[:, i], points)[:, i] for i in range(2)]
        return -keras.ops.expand_dims(sum(second), -1)


points = np.random.default_rng(0).uniform(size=(1024, 2))
exact = np.prod(np.sin(math.pi * points * (1, 2)), axis=1, keepdims=True)  # u = sin(πx) sin(2πy), so f = 5π²u
num_steps = EPOCHS * len(points) // 64
for name in ("Adam", "ISAAC"):
    keras.utils.set_random_seed(0)
    solution = build_solution()
    model = capture_inputs(NegativeLaplacian(solution))
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-2, num_steps))
    if name == "ISAAC":
        optimizer = ISAAC(inner_optimizer=optimizer)
    model.compile(optimizer, "mse")
    model.fit(points, 5 * math.pi**2 * exact, batch_size=64, epochs=EPOCHS, verbose=0)
    error = np.linalg.norm(solution.predict(points, verbose=0) - exact) / np.linalg.norm(exact)
    print(f"{name:6} relative error of u: {error:.2e} after {num_steps} steps")
