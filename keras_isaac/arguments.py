"""The arguments of `ISAAC`: their checks, and the inner optimizer that they name."""

import difflib
import inspect
import math
import numbers
from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_isaac.keras_hooks import isaacs_in

# That of the paper's experiments.
_SGD_LEARNING_RATE = 0.1


def check_number(name: str, value: Any, other: str) -> None:
    """Raises `ValueError` unless it is a finite number above 0; `other` says what else the argument may be."""
    # Tensors and NumPy scalars are numbers to a user; a boolean is a mistake.
    number = value
    if hasattr(value, "shape") and tuple(value.shape) == ():
        number = ops.convert_to_numpy(value).item()
    if not isinstance(number, numbers.Real) or isinstance(number, bool) or not 0 < float(number) < math.inf:
        raise ValueError(f"`{name}` must be a finite number above 0 or {other}. Received: {name}={value!r}")


def check_damping(damping: Any) -> None:
    """Raises `ValueError` unless it is a number above 0 or a schedule."""
    if not isinstance(damping, LearningRateSchedule):
        check_number("damping", damping, "a `keras.optimizers.schedules.LearningRateSchedule`")


def check_options(output_damping: Any, weight_sharing: Any, max_rows: Any, **flags: Any) -> None:
    """Raises `ValueError` unless these arguments have valid values, and all flags are booleans."""
    if output_damping is not None:
        check_number("output_damping", output_damping, "`None`")
    if weight_sharing not in ("expand", "reduce"):
        raise ValueError(f'`weight_sharing` must be "expand" or "reduce". Received: weight_sharing={weight_sharing!r}')
    is_integer = isinstance(max_rows, numbers.Integral) and not isinstance(max_rows, bool)
    if max_rows is not None and not (is_integer and max_rows > 0):
        raise ValueError(f"`max_rows` must be an integer above 0, or `None` for a budget. Received: max_rows={max_rows!r}")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            hint = " The damping itself is the argument `damping`." if name == "relative_damping" else ""
            raise ValueError(f"`{name}` must be `True` or `False`.{hint} Received: {name}={flag!r}")


def build_inner_optimizer(inner_optimizer: Any, learning_rate: Any, kwargs: dict[str, Any]) -> keras.optimizers.Optimizer:
    """Returns the optimizer of that name or class with these arguments; or an instance, for which none may be given."""
    if isinstance(learning_rate, (str, keras.optimizers.Optimizer)):
        name = received = repr(learning_rate)
        if not isinstance(learning_rate, str):
            name, received = f"keras.optimizers.{type(learning_rate).__name__}(...)", _shown(learning_rate)
        raise ValueError(
            f"Write `ISAAC(inner_optimizer={name})`: the first argument is `learning_rate`. Received: learning_rate={received}"
        )
    if learning_rate is not None:
        kwargs = {"learning_rate": learning_rate, **kwargs}
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    if isinstance(inner_optimizer, keras.optimizers.Optimizer):
        name = type(inner_optimizer).__name__
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer) or isaacs_in(inner_optimizer):
            raise ValueError(
                f"Put `{name}` around `ISAAC` instead: `keras.optimizers.LossScaleOptimizer(ISAAC(...))`. "
                f"Received: inner_optimizer={_shown(inner_optimizer)}"
            )
        if kwargs:
            raise ValueError(
                f"Write `ISAAC(inner_optimizer=keras.optimizers.{name}({given}))`: an instance has its own "
                f"`{'`, `'.join(kwargs)}`. Received: inner_optimizer={_shown(inner_optimizer)}, {given}"
            )
        return inner_optimizer
    optimizer_class = _class_of(inner_optimizer)
    if learning_rate is None and issubclass(optimizer_class, keras.optimizers.SGD):
        kwargs = {"learning_rate": _SGD_LEARNING_RATE, **kwargs}
    try:
        return optimizer_class(**kwargs)
    except (TypeError, ValueError) as error:
        name = optimizer_class.__name__
        raise type(error)(
            f"Give `ISAAC` its own arguments and those of {name}, or choose another inner optimizer: "
            f"`ISAAC(inner_optimizer='sgd', ...)`. {name} says: {error}. Received: {given}"
        ) from error


def _class_of(inner_optimizer: Any) -> type[keras.optimizers.Optimizer]:
    """Returns the optimizer class of this name, or this class."""
    hint = ""
    if isinstance(inner_optimizer, str):
        try:
            return type(keras.optimizers.get(inner_optimizer))
        except ValueError:
            names = [key.lower() for key, value in vars(keras.optimizers).items() if inspect.isclass(value)]
            near = difflib.get_close_matches(inner_optimizer.lower(), names)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    if inspect.isclass(inner_optimizer) and issubclass(inner_optimizer, keras.optimizers.Optimizer):
        return inner_optimizer
    raise (ValueError if isinstance(inner_optimizer, str) else TypeError)(
        f"`inner_optimizer` must be the name of a Keras optimizer, its class or an instance.{hint} "
        f"Received: inner_optimizer={inner_optimizer!r}"
    )


def _shown(optimizer: keras.optimizers.Optimizer) -> str:
    return f"<{type(optimizer).__name__} optimizer>"
