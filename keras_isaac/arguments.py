"""The arguments of `ISAAC`: their checks, the damping variable, and the inner optimizer that they name."""

import difflib
import inspect
import math
import numbers
from typing import Any

import keras
from keras import ops

from keras_isaac.optimizer_wrapper import isaacs_in

LearningRateSchedule = keras.optimizers.schedules.LearningRateSchedule
# That of the paper's experiments.
_SGD_LEARNING_RATE = 0.1


def check_damping(damping: Any) -> None:
    """Raises `ValueError` unless it is a number above 0 or a schedule."""
    if not isinstance(damping, LearningRateSchedule):
        check_number("damping", damping, "a finite number above 0 or a `keras.optimizers.schedules.LearningRateSchedule`")


def check_number(name: str, value: Any, wanted: str) -> None:
    """Raises `ValueError` unless it is a finite number above 0."""
    # Tensors and NumPy scalars are numbers to a user; a boolean is a mistake.
    number = value
    if hasattr(value, "shape") and tuple(value.shape) == ():
        number = ops.convert_to_numpy(value).item()
    if not isinstance(number, numbers.Real) or isinstance(number, bool) or not 0 < float(number) < math.inf:
        raise ValueError(f"`{name}` must be {wanted}. Received: {name}={value!r}")


def check_weight_sharing(weight_sharing: Any, max_rows: Any) -> None:
    """Raises `ValueError` unless both have a valid value."""
    if weight_sharing not in ("expand", "reduce"):
        raise ValueError(f'`weight_sharing` must be "expand" or "reduce". Received: weight_sharing={weight_sharing!r}')
    is_integer = isinstance(max_rows, numbers.Integral) and not isinstance(max_rows, bool)
    if max_rows is not None and not (is_integer and max_rows > 0):
        raise ValueError(f"`max_rows` must be an integer above 0, or `None` for a budget. Received: max_rows={max_rows!r}")


def check_flags(**flags: Any) -> None:
    """Raises `ValueError` unless all are booleans."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            hint = " The damping itself is the argument `damping`." if name == "relative_damping" else ""
            raise ValueError(f"`{name}` must be `True` or `False`.{hint} Received: {name}={flag!r}")


def build_damping(damping: Any, optimizer_name: str) -> keras.Variable | keras.optimizers.schedules.LearningRateSchedule:
    """Returns the damping as a variable under the optimizer's name; a schedule is returned as it is."""
    check_damping(damping)
    if isinstance(damping, LearningRateSchedule):
        return damping
    with keras.name_scope(optimizer_name):
        return keras.Variable(
            initializer=keras.initializers.Constant(float(damping)),
            shape=(),
            dtype=keras.backend.floatx(),
            trainable=False,
            # Layers read it, and would round it to their compute dtype: 1e-8 is 0 in float16.
            autocast=False,
            aggregation="only_first_replica",
            name="damping",
        )


def build_inner_optimizer(inner_optimizer: Any, learning_rate: Any, kwargs: dict[str, Any]) -> keras.optimizers.Optimizer:
    """Returns the optimizer of that name or class with these arguments; or an instance, for which none may be given."""
    if isinstance(learning_rate, (str, keras.optimizers.Optimizer)):
        is_name = isinstance(learning_rate, str)
        name = repr(learning_rate) if is_name else f"keras.optimizers.{type(learning_rate).__name__}(...)"
        raise ValueError(
            f"Write `ISAAC(inner_optimizer={name})`: the first argument is `learning_rate`. "
            f"Received: learning_rate={_shown(learning_rate)}"
        )
    if isinstance(inner_optimizer, keras.optimizers.Optimizer):
        return _check_instance(inner_optimizer, learning_rate, kwargs)
    optimizer_class = inner_optimizer
    if isinstance(inner_optimizer, str):
        optimizer_class = _class_of_name(inner_optimizer)
    if not (inspect.isclass(optimizer_class) and issubclass(optimizer_class, keras.optimizers.Optimizer)):
        raise TypeError(
            "`inner_optimizer` must be the name of a Keras optimizer, its class or an instance. "
            f"Received: inner_optimizer={inner_optimizer!r}"
        )
    if learning_rate is None and issubclass(optimizer_class, keras.optimizers.SGD):
        learning_rate = _SGD_LEARNING_RATE
    if learning_rate is not None:
        kwargs = {"learning_rate": learning_rate, **kwargs}
    try:
        return optimizer_class(**kwargs)
    except (TypeError, ValueError) as error:
        name = optimizer_class.__name__
        raise type(error)(
            f"Give `ISAAC` its own arguments and those of {name}, or choose another inner optimizer: "
            f"`ISAAC(inner_optimizer='sgd', ...)`. {name} says: {error}. "
            f"Received: {', '.join(f'{key}={value!r}' for key, value in kwargs.items())}"
        ) from error


def _check_instance(
    inner_optimizer: keras.optimizers.Optimizer, learning_rate: Any, kwargs: dict[str, Any]
) -> keras.optimizers.Optimizer:
    """Returns the optimizer, if it may stand inside `ISAAC`, and has all its arguments already."""
    name = type(inner_optimizer).__name__
    if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer) or isaacs_in(inner_optimizer):
        raise ValueError(
            f"Put `{name}` around `ISAAC` instead: `keras.optimizers.LossScaleOptimizer(ISAAC(...))`. "
            f"Received: inner_optimizer={_shown(inner_optimizer)}"
        )
    given = {} if learning_rate is None else {"learning_rate": learning_rate}
    given.update(kwargs)
    if given:
        arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(
            f"Write `ISAAC(inner_optimizer=keras.optimizers.{name}({arguments}))`: an instance has its own "
            f"`{'`, `'.join(given)}`. Received: inner_optimizer={_shown(inner_optimizer)}, {arguments}"
        )
    return inner_optimizer


def _shown(value: Any) -> str:
    return f"<{type(value).__name__} optimizer>" if isinstance(value, keras.optimizers.Optimizer) else repr(value)


def _class_of_name(name: str) -> type[keras.optimizers.Optimizer]:
    """Returns the optimizer class of that name."""
    try:
        return type(keras.optimizers.get(name))
    except ValueError as error:
        names = [key.lower() for key, value in vars(keras.optimizers).items() if inspect.isclass(value)]
        near = difflib.get_close_matches(name.lower(), names)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"`inner_optimizer` must be the name of a Keras optimizer, its class or an instance.{hint} "
            f"Received: inner_optimizer={name!r}"
        ) from error


def public_config(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Returns the serialized optimizer, with the class of `keras.optimizers` where Keras uses one of its backend's."""
    config = keras.saving.serialize_keras_object(optimizer)
    name, module = type(optimizer).__name__, type(optimizer).__module__
    public_class = getattr(keras.optimizers, name, None)
    if module.startswith("keras.") and public_class in type(optimizer).__mro__[1:]:
        config = {**config, "module": "keras.optimizers", "registered_name": None}
    return config
