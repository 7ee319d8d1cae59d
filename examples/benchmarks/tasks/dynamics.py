"""A forecast: the network learns one step of the Lorenz system and is scored by repeating it."""

import keras
import numpy as np
from keras import layers, ops

TIME_STEP, NUM_STEPS = 0.05, 10
# Mean and scale of the state, and scale of its change in a step, so that the network sees and returns numbers near 1.
MEAN, SCALE, CHANGE = np.array([0.0, 0.0, 23.5]), np.array([8.0, 9.0, 8.6]), 0.3


def _slope(state):
    x, y, z = np.moveaxis(state, -1, 0)
    return np.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=-1)


def _advance(state, num_parts=10):
    """Returns the state a time step later, by the classical Runge-Kutta method."""
    step = TIME_STEP / num_parts
    for _ in range(num_parts):
        k1 = _slope(state)
        k2 = _slope(state + step / 2 * k1)
        k3 = _slope(state + step / 2 * k2)
        k4 = _slope(state + step * k3)
        state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def lorenz():
    """States on the attractor; targets are the next state's change for training, and the next ten states for the rest."""
    random = np.random.default_rng(0)
    state = random.normal(size=(400 + 200 + 200, 3)) * SCALE + MEAN
    states = []
    # The first steps lead to the attractor.
    for number in range(100 + 50 + NUM_STEPS):
        state = _advance(state)
        if number >= 100:
            states.append((state - MEAN) / SCALE)
    states = np.stack(states, axis=1).astype("float32")
    training, *held_out = np.split(states, [400, 600])
    x, following = training[:, :50].reshape(-1, 3), training[:, 1:51].reshape(-1, 3)
    parts = [(x, (following - x) / CHANGE)]
    for part in held_out:
        starts = range(0, 50, 10)
        x = np.concatenate([part[:, start] for start in starts])
        parts.append((x, np.concatenate([part[:, start + 1 : start + 1 + NUM_STEPS] for start in starts])))
    return parts


def forecaster(seed):
    """Three hidden layers, 128 wide."""
    keras.utils.set_random_seed(seed)
    hidden = [layers.Dense(128, activation="gelu") for _ in range(3)]
    return keras.Sequential([keras.Input((3,)), *hidden, layers.Dense(3, name="logits")])


def forecast_error(call, x, y):
    """The mean squared error of ten predicted states, each predicted from the one before."""
    errors = []
    for step in range(NUM_STEPS):
        x = x + CHANGE * call(x)
        errors.append(ops.mean(ops.square(x - y[:, step])))
    return sum(errors) / NUM_STEPS
