"""ISAAC for Keras 3: second-order progress from the layers' inputs, on TensorFlow, JAX and PyTorch."""

from keras_isaac.capture import capture_inputs
from keras_isaac.optimizer import ISAAC

__all__ = ["ISAAC", "capture_inputs"]
__version__ = "0.1.0"
