"""Training on more than one device, each engine in processes of its own, on virtual devices of the CPU.

Run as a script, this file is such a process: `python test_devices.py FUNCTION ARGUMENTS...` prints a JSON object.
"""

import json
import re
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from harness import BACKEND, conditioned_gradient, normal, paper_isaac, start_python, to_numpy
from models import assert_close, assert_differ, fit
from replicas import (
    BATCH_SIZE,
    OPTIONS,
    assert_replicas_average,
    each_network,
    each_width,
    finish,
    network_and_data,
    numpy_training,
    weights_as_lists,
)

from keras_isaac import capture_inputs
from keras_isaac.layers.products import product

# JAX: one program over all devices.


def jax_distributions(dumps):
    """Fits networks on one device and over four: their losses, weights, and what the compiled step sends between devices."""
    devices = keras.distribution.list_devices()
    assert len(devices) == 4
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*hidden/kernel"] = (None, "model")
    layouts[".*hidden/bias"] = ("model",)
    layouts[".*head/kernel"] = ("model", None)
    layouts[".*(query|key|value)/kernel"] = (None, "model", None)
    layouts[".*attention_output/kernel"] = ("model", None, None)
    distributions = {
        "one": None,
        "data": keras.distribution.DataParallel(devices=devices),
        "model": keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"),
    }
    results, seen = {}, set()
    for kind, distribution in distributions.items():
        keras.distribution.set_distribution(distribution)
        for network in (8, 32, "sequence"):
            # The plain step is there to compare what is sent.
            kinds = ("captured",) if kind == "one" or network == "sequence" else ("captured", "plain", "per replica")
            for trained in kinds:
                model, data = network_and_data(network)
                is_split = any(not v.value.sharding.is_fully_replicated for v in model.trainable_variables)
                assert is_split == (kind == "model")
                model.compile(optimizer=keras.optimizers.SGD(0.2), loss="mse")
                if trained != "plain":
                    optimizer = paper_isaac(**OPTIONS, per_replica=trained == "per replica")
                    capture_inputs(model).compile(optimizer=optimizer, loss="mse")
                history = fit(model, data, batch_size=BATCH_SIZE)
                (module,) = set(Path(dumps).glob("*jit_train_step*after_optimizations.txt")) - seen
                seen.add(module)
                results[f"{kind} {network} {trained}"] = {
                    "losses": history.history["loss"],
                    "weights": weights_as_lists(model),
                    "sent": collectives(module.read_text()),
                }
    keras.distribution.set_distribution(distributions["data"])
    return {**results, **jax_replicas_of_groups()}


def jax_replicas_of_groups():
    """The gradient of a kernel of two groups over four replicas, at once and by parts; and what an uneven batch says."""
    import jax

    rows, kernel, cotangent = normal((2, 24, 5), (2, 5, 3), (2, 24, 3))
    conditioning = paper_isaac(damping=0.1, output_damping=1e-3, per_replica=True, max_rows=None).conditioning_of_step()

    def loss(kernel, rows, cotangent):
        return keras.ops.sum(product(rows, kernel, conditioning, None, num_groups=1) * cotangent)

    try:
        jax.grad(loss)(kernel, rows[:, :6], cotangent[:, :6])
    except ValueError as error:
        message = str(error)
    parts = zip(np.split(rows, 4, axis=1), np.split(4 * cotangent, 4, axis=1), strict=True)
    parts = [conditioned_gradient(*part, 0.1, 1e-3) for part in parts]
    return {
        "groups": to_numpy(jax.jit(jax.grad(loss))(kernel, rows, cotangent)).tolist(),
        "groups by parts": np.mean(parts, axis=0).tolist(),
        "uneven": message,
    }


def collectives(module):
    """Lists `(operation, shapes of its results, whether it is in a loop)` of a compiled module."""
    found, in_entry = [], False
    for line in module.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            in_entry = line.startswith("ENTRY")
        match = re.search(r" = (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", line)
        if match:
            shapes = [[int(size) for size in sizes.split(",") if size] for sizes in re.findall(r"\w\[([\d,]*)\]", match[1])]
            found.append((match[2], shapes, not in_entry))
    return found


@pytest.fixture(scope="module")
def jax_results(tmp_path_factory):
    dumps = tmp_path_factory.mktemp("dumps")
    flags = (
        f"--xla_force_host_platform_device_count=4 --xla_dump_to={dumps} --xla_dump_hlo_as_text "
        "--xla_dump_hlo_module_re=jit_train_step"
    )
    (results,) = finish(start_python(__file__, "jax_distributions", dumps, XLA_FLAGS=flags))
    return results


needs_jax = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is JAX's")


def num_elements(sent):
    return sum(int(np.prod(shape)) for _, shapes, _ in sent for shape in shapes)


@needs_jax
@each_network
@pytest.mark.parametrize("kind", ["data", "model"])
def test_jax_distributions_train_as_one_device_does(jax_results, kind, network):
    """The batch is one over all devices: its global rows make the curvature."""
    one, several = jax_results[f"one {network} captured"], jax_results[f"{kind} {network} captured"]
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=1e-5)
    ours, theirs = ([np.asarray(weight) for weight in result["weights"]] for result in (several, one))
    assert_close(ours, theirs, 1e-5)
    if network != "sequence":
        assert_close(ours, numpy_training(network, 1), 1e-4)
        assert_differ(ours, numpy_training(network, 4), 1e-2)
    assert several["sent"]
    assert not one["sent"]


@needs_jax
def test_jax_devices_send_the_curvature_where_features_are_few(jax_results):
    """More than in the plain step: `[in, in]` for each layer, and scalars."""
    (plain,), captured = jax_results["data 8 plain"]["sent"], jax_results["data 8 captured"]["sent"]
    kernels = [sorted(shape) for shape in plain[1]]
    assert kernels.count([3, 8]) == kernels.count([6, 8]) == 1
    shapes = [sorted(shape) for _, shapes, _ in captured for shape in shapes]
    for shape in kernels:
        shapes.remove(shape)
    assert [shape for shape in shapes if shape] == [[6, 6], [8, 8]]
    assert {operation for operation, _, _ in captured} == {"all-reduce"}
    assert not any(in_loop for _, _, in_loop in captured)


@needs_jax
@pytest.mark.parametrize(("kind", "width"), [("data", 32), ("model", 8), ("model", 32)])
def test_jax_devices_send_rows_and_their_products_once_where_rows_are_few(jax_results, kind, width):
    """More than in the plain step: `[rows, in]`, `[rows, rows]` and `[rows, out]` for each layer, and scalars."""
    captured = jax_results[f"{kind} {width} captured"]["sent"]
    assert not any(in_loop for _, _, in_loop in captured)
    added = num_elements(captured) - num_elements(jax_results[f"{kind} {width} plain"]["sent"])
    largest = sum(BATCH_SIZE * num_in + BATCH_SIZE**2 + BATCH_SIZE * num_out for num_in, num_out in ((6, width), (width, 3)))
    assert 0 < added < largest + 16


@needs_jax
@each_width
@pytest.mark.parametrize(("kind", "num_replicas"), [("data", 4), ("model", 2)])
def test_jax_replicas_condition_on_their_own_rows_on_request(jax_results, kind, num_replicas, width):
    """Under data parallelism, no device sends anything but the gradients of the plain step."""
    actual = [np.asarray(weight) for weight in jax_results[f"{kind} {width} per replica"]["weights"]]
    assert_close(actual, numpy_training(width, num_replicas), 1e-4)
    assert_differ(actual, numpy_training(width, 1), 1e-2)
    if kind == "data":
        sent, plain = (
            [sorted(map(sorted, shapes)) for _, shapes, _ in jax_results[f"data {width} {trained}"]["sent"]]
            for trained in ("per replica", "plain")
        )
        assert sent == plain


@needs_jax
def test_jax_replicas_of_groups_and_with_an_output_damping(jax_results):
    assert_close([np.asarray(jax_results["groups"])], [np.asarray(jax_results["groups by parts"])], 1e-5)
    assert "Train on batches of a multiple of 4 samples: `per_replica=True` splits" in jax_results["uneven"]


# TensorFlow: a replica a device, each tracing the step in a thread of its own.


def tensorflow_mirrored(network):
    """Fits a network made, captured and compiled under a strategy of two replicas."""
    import tensorflow as tf

    (device,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    assert strategy.num_replicas_in_sync == 2
    with strategy.scope():
        model, data = network_and_data(network)
        capture_inputs(model).compile(optimizer=paper_isaac(**OPTIONS), loss="mse")
        fit(model, data, batch_size=BATCH_SIZE)
        after_one = weights_as_lists(model)
        # More than fifty steps.
        fit(model, data, batch_size=BATCH_SIZE, epochs=8)
    replicas = [[variable.value.values[replica].numpy().tolist() for variable in model.variables] for replica in (0, 1)]
    return after_one, replicas


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's strategy")
@pytest.mark.often("32", "sequence")
@each_network
def test_mirrored_replicas_condition_on_their_own_rows(network):
    ((actual, (one, other)),) = finish(start_python(__file__, "tensorflow_mirrored", network))
    assert one == other
    assert_replicas_average(actual, network, 2)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
