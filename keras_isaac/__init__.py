"""ISAAC for Keras 3: second-order progress from the layers' inputs, on TensorFlow, JAX and PyTorch."""

from keras_isaac.capture import capture_inputs
from keras_isaac.layers import register_layer
from keras_isaac.optimizer import ISAAC
from keras_isaac.summary import kernel_status, summary

__all__ = ["ISAAC", "capture_inputs", "kernel_status", "register_layer", "summary"]
__version__ = "0.1.0"
