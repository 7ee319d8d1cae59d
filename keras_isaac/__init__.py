"""ISAAC for Keras 3: second-order progress from the layers' inputs, on TensorFlow, JAX and PyTorch."""

try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    missing = str(error.name).partition(".")[0]
    if missing not in ("tensorflow", "jax", "torch"):
        raise
    raise ModuleNotFoundError(
        f"Keras is to run on {missing}, which is not installed. Install it, or set the environment variable KERAS_BACKEND to "
        "jax, torch or tensorflow, whichever is installed, before Keras is imported.",
        name=missing,
    ) from error

from keras_isaac import callbacks
from keras_isaac.capture import capture_inputs, release_inputs
from keras_isaac.layers import register_adapter, register_layer
from keras_isaac.optimizer import ISAAC
from keras_isaac.status import KernelStatus, kernel_status
from keras_isaac.summary import summary

__all__ = [
    "ISAAC",
    "KernelStatus",
    "callbacks",
    "capture_inputs",
    "kernel_status",
    "register_adapter",
    "register_layer",
    "release_inputs",
    "summary",
]
__version__ = "0.2.0"
