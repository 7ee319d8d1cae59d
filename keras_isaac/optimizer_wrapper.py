"""An optimizer around another one, as Keras and its callbacks expect it; and the search for `ISAAC` in an optimizer."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras


class OptimizerWrapper(keras.optimizers.Optimizer):
    """Optimizer that leaves everything but the gradients to an inner one. `ISAAC` is its only subclass.

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
        inner_optimizer = getattr(self, "inner_optimizer", None)
        return None if inner_optimizer is None else inner_optimizer.loss_scale_factor

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

    def scale_loss(self, loss: Any) -> Any:
        """Scales the loss as the inner optimizer does."""
        return self.inner_optimizer.scale_loss(loss)

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


def _innermost(optimizer: Any) -> list[keras.optimizers.Optimizer]:
    """Returns the optimizers in `optimizer` that hold no others, and `ISAAC`: those that update variables."""
    innermost: dict[int, Any] = {}
    seen: set[int] = set()

    def visit(value: Any) -> bool:
        """Looks into a value; returns whether there is an optimizer in it."""
        if isinstance(value, keras.optimizers.Optimizer):
            if id(value) not in seen:
                seen.add(id(value))
                inner = [] if isinstance(value, OptimizerWrapper) else [visit(each) for each in vars(value).values()]
                if not any(inner):
                    innermost[id(value)] = value
            return True
        if isinstance(value, (list, tuple, dict)) and id(value) not in seen:
            seen.add(id(value))
            return any([visit(each) for each in (value.values() if isinstance(value, dict) else value)])
        return False

    visit(optimizer)
    return list(innermost.values())


def isaacs_in(optimizer: Any) -> list[Any]:
    """Returns the `ISAAC` optimizers in `optimizer`: itself, or those in its attributes, in lists and dictionaries too."""
    if isinstance(optimizer, OptimizerWrapper):
        return [optimizer]
    return [each for each in _innermost(optimizer) if isinstance(each, OptimizerWrapper)]


def has_several(optimizer: Any) -> bool:
    """Returns whether an optimizer divides the variables among several, as `keras.optimizers.MultiOptimizer` does."""
    return not isinstance(optimizer, OptimizerWrapper) and len(_innermost(optimizer)) > 1
