"""The layout of matrices under a `keras.distribution` (JAX): one program on all devices, over which the batch is split."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras

# Whether the leading axis of a matrix currently is one of replicas.
_is_by_replica = contextvars.ContextVar("keras_isaac_is_by_replica", default=False)


def num_replicas() -> int:
    """Returns over how many replicas a batch is spread."""
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.batch_dim_name is None:
        return 1
    mesh = distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]


@contextlib.contextmanager
def by_replica() -> Iterator[None]:
    """Makes `with_sharding` take the first axis of tensors as one of replicas inside the `with` block."""
    token = _is_by_replica.set(True)
    try:
        yield
    finally:
        _is_by_replica.reset(token)


def with_sharding(tensor: Any) -> Any:
    """Keeps `tensor` whole on every device, or, if its first axis is one of replicas, each replica's part on its devices."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return tensor
    first = distribution.batch_dim_name if _is_by_replica.get() else None
    layout = keras.distribution.TensorLayout([first, *[None] * (len(tensor.shape) - 1)], distribution.device_mesh)
    return keras.distribution.distribute_tensor(tensor, layout)
