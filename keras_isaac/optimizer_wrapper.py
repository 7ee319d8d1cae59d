"""What an optimizer around another one takes from it, as Keras and its callbacks expect."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras


class OptimizerWrapper(keras.optimizers.Optimizer):
    """Optimizer that leaves all but a step's own work to an inner one. `ISAAC` is its only subclass.

    Args:
        inner_optimizer: the Keras optimizer.
        name: string, or `None`: chosen by Keras.
    """

    def __init__(self, inner_optimizer: keras.optimizers.Optimizer, name: str | None = None) -> None:
        # The base class requires a learning rate. As in LossScaleOptimizer, only the inner optimizer's is used.
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer

    def apply_gradients(self, grads_and_vars: Iterable[tuple]) -> Any:
        """Applies pairs of gradient and variable; returns the iterations."""
        grads, trainable_variables = zip(*grads_and_vars, strict=True)
        self.apply(list(grads), trainable_variables)
        return self.iterations

    @property
    def learning_rate(self) -> Any:
        """The inner optimizer's learning rate."""
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The inner optimizer's iterations."""
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self) -> float | None:
        """The inner optimizer's static loss scale, which LossScaleOptimizer and MultiOptimizer set."""
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, loss_scale_factor: float | None) -> None:
        # The base class sets it before there is an inner optimizer.
        if hasattr(self, "inner_optimizer"):
            self.inner_optimizer.loss_scale_factor = loss_scale_factor

    # Callbacks read these of the model's optimizer, or of the inner optimizer of a LossScaleOptimizer.

    @property
    def use_ema(self) -> bool:
        """Whether the inner optimizer averages the weights."""
        # The base class reads it as it builds, and would create an average of its own.
        return self.built and self.inner_optimizer.use_ema

    @use_ema.setter
    def use_ema(self, use_ema: bool) -> None:
        # The base class sets it before there is an inner optimizer.
        if hasattr(self, "inner_optimizer"):
            self.inner_optimizer.use_ema = use_ema

    @property
    def _model_variables_moving_average(self) -> list:
        return self.inner_optimizer._model_variables_moving_average

    def finalize_variable_values(self, var_list: Sequence) -> None:
        """Assigns the moving average of the weights, if the inner optimizer has one."""
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list: list | None = None, var_names: list[str] | None = None) -> None:
        """Excludes variables from the inner optimizer's weight decay."""
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights: Sequence) -> None:
        """Sets all variables, in the order of `variables`."""
        for variable, weight in zip(self.variables, weights, strict=True):
            variable.assign(weight)
