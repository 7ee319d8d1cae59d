"""What several devices are to give, by training on parts of each batch; and processes of their own for them."""

import functools
import json

import keras
import models
import numpy as np
import pytest
from harness import eager_gradients, paper_isaac, to_numpy
from models import assert_close, assert_differ, batches, mlp, regression, sequence_network, sequences, weights

from keras_isaac import capture_inputs

OPTIONS = {"learning_rate": 0.2, "damping": 0.05, "momentum": 0.9}
NUM_STEPS, BATCH_SIZE = 6, 16
# Hidden layers narrower and wider than the batch: the head's inverse is [in, in], and [rows, rows].
each_width = pytest.mark.parametrize("width", [8, 32])
each_network = pytest.mark.parametrize("network", [8, 32, "sequence"])


def finish(*processes):
    """Waits for the processes, and returns what each printed."""
    results = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            results.append(json.loads(output.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return results


def numpy_training(width, num_replicas):
    """Weights of an `mlp` of so much width after one epoch on so many replicas."""
    data = batches(regression(NUM_STEPS * BATCH_SIZE), BATCH_SIZE, NUM_STEPS)
    return models.numpy_training(mlp(width=width), data, **OPTIONS, num_replicas=num_replicas)


def one_device_training(num_replicas):
    """Weights of `sequence_network` by a loop on one device: the mean of the gradients of each part of the batch."""
    model, optimizer, loss_fn = capture_inputs(sequence_network()), paper_isaac(**OPTIONS), keras.losses.MeanSquaredError()
    variables = model.trainable_variables
    optimizer.build(variables)
    inputs, targets = sequences(NUM_STEPS * BATCH_SIZE)
    for x, y in zip(np.split(inputs, NUM_STEPS), np.split(targets, NUM_STEPS), strict=True):
        gradients = []
        for part, part_y in zip(np.split(x, num_replicas), np.split(y, num_replicas), strict=True):
            loss = functools.partial(lambda x, y: loss_fn(y, model(x, training=True)), part, part_y)
            gradients.append(eager_gradients(loss, variables, optimizer.conditioning())[1])
        means = [np.mean([to_numpy(each) for each in parts], axis=0) for parts in zip(*gradients, strict=True)]
        optimizer.apply([keras.ops.cast(mean, "float32") for mean in means], variables)
    return weights(model)


def assert_replicas_average(actual, network, num_replicas):
    """The weights are those of so many replicas, which one device with the whole batch does not give."""
    training = one_device_training if network == "sequence" else lambda replicas: numpy_training(network, replicas)
    expected = training(num_replicas)
    assert_close([np.asarray(weight) for weight in actual], expected, 1e-4)
    assert_differ(training(1), expected, 1e-3)


def weights_as_lists(model):
    """The weights, as JSON takes them."""
    return [weight.tolist() for weight in weights(model)]


def network_and_data(network):
    """The `sequence` network, or an `mlp` of so much width, and its data."""
    if network == "sequence":
        return sequence_network(), sequences(NUM_STEPS * BATCH_SIZE)
    return mlp(width=int(network)), regression(NUM_STEPS * BATCH_SIZE)
