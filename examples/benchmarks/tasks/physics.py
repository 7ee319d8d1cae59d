"""Equations, solved by a network without data, in float64, on JAX."""

import jax
import keras
import numpy as np
from keras import layers, ops


def network(seed):
    """Three layers of tanh."""
    keras.utils.set_random_seed(seed)
    hidden = [layers.Dense(64, activation="tanh", dtype="float64") for _ in range(3)]
    return keras.Sequential([keras.Input((2,), dtype="float64"), *hidden, layers.Dense(1, dtype="float64", name="logits")])


def _derivatives(function, x):
    """Returns the first and the second derivatives by each of the two coordinates."""

    def slope(direction):
        return lambda x: jax.jvp(function, (x,), (direction,))[1]

    directions = [ops.broadcast_to(axis, ops.shape(x)) for axis in np.eye(2)]
    return [jax.jvp(slope(direction), (x,), (direction,)) for direction in directions]


def _relative_error(u, exact):
    return ops.mean(ops.square(u - exact)) / ops.mean(ops.square(exact))


def _on_square(call, x):
    """The network's output times a factor that is zero on the edges of the unit square."""
    return call(x) * ops.prod(x * (1 - x), axis=-1, keepdims=True)


def poisson_residual(call, x, y):
    """The mean squared residual of -Δu = f."""
    (_, first), (_, second) = _derivatives(lambda x: _on_square(call, x), x)
    return ops.mean(ops.square(first + second + y))


def poisson_error(call, x, y):
    """The squared error of u, over the mean square of u."""
    return _relative_error(_on_square(call, x), y)


def poisson():
    """Points of the square with f for training, with u for what is held out: u = sin(πx) sin(πy) + sin(4πx) sin(2πy) / 4."""
    parts, random = [], np.random.default_rng(0)
    for count in (20_000, 500, 2000):
        x = random.uniform(size=(count, 2))
        waves = [scale * np.prod(np.sin(np.pi * np.array(k) * x), axis=1) for k, scale in (((1, 1), 1.0), ((4, 2), 0.25))]
        y = sum(waves) if parts else np.pi**2 * (2 * waves[0] + 20 * waves[1])
        parts.append((x, y[:, None]))
    return parts


VISCOSITY = 0.1 / np.pi


def _from_sine(call, x):
    """The network's output, changed to be -sin πx at t = 0 and zero at x = -1 and 1."""
    time, place = x[:, :1], x[:, 1:]
    return time * (1 - place**2) * call(x) - ops.sin(np.pi * place)


def burgers_residual(call, x, y):
    """The mean squared residual of u_t + u u_x = viscosity u_xx."""
    (by_time, _), (by_place, twice_by_place) = _derivatives(lambda x: _from_sine(call, x), x)
    return ops.mean(ops.square(by_time + _from_sine(call, x) * by_place - VISCOSITY * twice_by_place))


def burgers_error(call, x, y):
    """The squared error of u, over the mean square of u."""
    return _relative_error(_from_sine(call, x), y)


def burgers_solution(x):
    """Returns u at points `[rows, 2]` of time and place, by Cole and Hopf's transform: an integral."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    places = x[:, 1:] - ops.sqrt(4 * VISCOSITY * x[:, :1]) * nodes
    kernel = weights * ops.exp(-ops.cos(np.pi * places) / (2 * np.pi * VISCOSITY))
    return -ops.sum(ops.sin(np.pi * places) * kernel, axis=1, keepdims=True) / ops.sum(kernel, axis=1, keepdims=True)


def burgers():
    """Points of time 0 to 1 and place -1 to 1, with u where they are held out."""
    random = np.random.default_rng(0)
    points = [random.uniform((0, -1), (1, 1), size=(count, 2)) for count in (20_000, 500, 2000)]
    with jax.enable_x64():
        solutions = [np.asarray(burgers_solution(x)) for x in points[1:]]
    return list(zip(points, [np.zeros((len(points[0]), 1)), *solutions], strict=True))
