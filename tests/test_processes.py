"""Training over two processes on this machine, as over two machines: they train as one does, and stay equal to the bit.

Run as a script, this file is such a process: `python test_processes.py FUNCTION ARGUMENTS...` prints a JSON object.
"""

import json
import socket
import sys

import keras
import numpy as np
import pytest
from harness import BACKEND, paper_isaac, start_python
from models import assert_close, assert_differ, captured, fit, mlp, regression
from replicas import (
    BATCH_SIZE,
    NUM_STEPS,
    OPTIONS,
    assert_replicas_average,
    finish,
    network_and_data,
    numpy_training,
    weights_as_lists,
)

from keras_isaac import capture_inputs

# Epochs that make more than fifty steps.
MORE_EPOCHS = 8


def fit_half(model, data, rank):
    """Fits on one half of each batch; returns the weights after one epoch, and after all."""
    half = [np.concatenate(np.split(array, 2 * NUM_STEPS)[rank::2]) for array in data]
    fit(model, half, batch_size=BATCH_SIZE // 2)
    after_one = weights_as_lists(model)
    fit(model, half, batch_size=BATCH_SIZE // 2, epochs=MORE_EPOCHS)
    return after_one, weights_as_lists(model)


# JAX: one program over the devices of all processes, each of which feeds its part of the batch.


def jax_distributed(width, rank, port):
    """Fits on this process's half of each batch."""
    keras.distribution.initialize(f"127.0.0.1:{port},127.0.0.1", 2, int(rank))
    assert len(keras.distribution.list_devices()) == 2
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    model = captured(paper_isaac(**OPTIONS), mlp(width=int(width)))
    return fit_half(model, regression(NUM_STEPS * BATCH_SIZE), int(rank))


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is JAX's")
@pytest.mark.parametrize("width", [pytest.param(8, marks=pytest.mark.slow), 32])
def test_jax_processes_condition_on_the_rows_of_all(width):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one, other = finish(*(start_python(__file__, "jax_distributed", width, rank, port) for rank in (0, 1)))
    assert one == other
    actual = [np.asarray(weight) for weight in one[0]]
    assert_close(actual, numpy_training(width, 1), 1e-4)
    assert_differ(actual, numpy_training(width, 2), 1e-2)


# PyTorch: a process a device, whose gradients are averaged while the backward pass runs.


def torch_distributed(training, network, rank, port):
    """Trains this process's half of each batch, with Keras' model inside DistributedDataParallel."""
    import torch

    store = torch.distributed.TCPStore("127.0.0.1", int(port), is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=int(rank), world_size=2)
    trained = TRAINING[training](*network_and_data(network), int(rank))
    # If the module outlived the group, its destructor could wait for a thread of the group that waits for Python's lock.
    torch.distributed.destroy_process_group()
    return trained


def torch_loop(model, data, rank):
    """A training loop; returns the weights after each epoch."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    distributed = DistributedDataParallel(capture_inputs(model))
    optimizer, loss_fn = paper_isaac(**OPTIONS), keras.losses.MeanSquaredError()
    variables = model.trainable_variables
    optimizer.build(variables)
    inputs, targets = (torch.tensor(array).chunk(2 * NUM_STEPS)[rank::2] for array in data)
    after_each = []
    for _ in range(1 + MORE_EPOCHS):
        for x, y in zip(inputs, targets, strict=True):
            model.zero_grad()
            with optimizer.conditioning():
                loss = loss_fn(y, distributed(x))
            loss.backward()
            with torch.no_grad():
                optimizer.apply([variable.value.grad for variable in variables], variables)
        after_each.append(weights_as_lists(model))
    return after_each


def torch_fit(model, data, rank):
    """Keras' own training, which puts the model into the module by itself."""
    capture_inputs(model).compile(optimizer=paper_isaac(**OPTIONS), loss="mse")
    return fit_half(model, data, rank)


TRAINING = {"loop": torch_loop, "fit": torch_fit}
# Since Keras 3.16.
fits = pytest.param("fit", marks=pytest.mark.skipif(not hasattr(keras.Model, "_initialize_ddp"), reason="an older Keras"))


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's module")
@pytest.mark.parametrize("training", ["loop", fits])
@pytest.mark.parametrize("network", [pytest.param(8, marks=pytest.mark.slow), 32, "sequence"])
def test_distributed_processes_condition_on_their_own_rows(network, training):
    import torch

    # The processes find each other by a store of this process, which outlives them.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        start_python(__file__, "torch_distributed", training, network, rank, store.port, GLOO_SOCKET_IFNAME="lo")
        for rank in (0, 1)
    ]
    one, other = finish(*processes)
    assert one == other
    assert_replicas_average(one[0], network, 2)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
