"""The replicas of a `keras.distribution`, which is JAX's: one program over all devices, with one batch over them."""

import contextlib
import contextvars

import keras
from keras import ops

# Whether the leading axis of a matrix is one of replicas now.
_is_by_replica = contextvars.ContextVar("keras_isaac_is_by_replica", default=False)


def mean_over_replicas(function, rows, output_gradient):
    """Returns the mean of `function` of each replica's rows and its gradients of a loss that is a mean over them.

    Each device computes its own, so that only the result crosses devices, as a gradient does. Without a distribution there is
    one replica.

    Args:
        function: function of tensors `[..., rows, in]` and `[..., rows, out]`.
        rows: tensor `[..., rows, in]`, of the samples of the batch in order.
        output_gradient: tensor `[..., rows, out]`, of a loss that is a mean over the batch.

    Raises:
        ValueError: if the rows cannot be split evenly.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.batch_dim_name is None:
        return function(rows, output_gradient)
    mesh = distribution.device_mesh
    num_replicas = mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]
    if rows.shape[-2] % num_replicas:
        raise ValueError(
            f"`per_replica=True` splits the rows of a layer evenly over the {num_replicas} replicas of the distribution. Train "
            f"on batches of a multiple of {num_replicas} samples. Received: a batch that makes {rows.shape[-2]} rows"
        )

    def split(tensor):
        shape = tuple(tensor.shape)
        tensor = ops.reshape(tensor, (*shape[:-2], num_replicas, shape[-2] // num_replicas, shape[-1]))
        return laid_out(ops.moveaxis(tensor, -3, 0))

    with _by_replica():
        return ops.mean(function(split(rows), split(output_gradient * num_replicas)), axis=0)


@contextlib.contextmanager
def _by_replica():
    token = _is_by_replica.set(True)
    try:
        yield
    finally:
        _is_by_replica.reset(token)


def laid_out(tensor):
    """Keeps `tensor` whole on every device, or where its first axis is one of replicas, each device's own there."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return tensor
    first = distribution.batch_dim_name if _is_by_replica.get() else None
    layout = keras.distribution.TensorLayout([first, *[None] * (len(tensor.shape) - 1)], distribution.device_mesh)
    return keras.distribution.distribute_tensor(tensor, layout)
