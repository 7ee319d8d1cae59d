"""What `ISAAC` takes: the checks of its arguments, and the inner optimizer that they name."""

import difflib
import inspect
import math
import numbers

import keras
from keras import ops

LearningRateSchedule = keras.optimizers.schedules.LearningRateSchedule
# The paper's experiments use plain gradient steps, for which Keras' own default of 0.01 is too small.
_SGD_LEARNING_RATE = 0.1


def check_damping(damping):
    """Raises `ValueError` unless it is a number above 0 or a schedule."""
    if not isinstance(damping, LearningRateSchedule):
        check_number("damping", damping, "a finite number above 0 or a `keras.optimizers.schedules.LearningRateSchedule`")


def check_number(name, value, wanted):
    """Raises `ValueError` unless it is a finite number above 0."""
    # Tensors and NumPy scalars are numbers to a user; a boolean is a slip.
    number = value
    if hasattr(value, "shape") and tuple(value.shape) == ():
        number = ops.convert_to_numpy(value).item()
    if not isinstance(number, numbers.Real) or isinstance(number, bool) or not 0 < number < math.inf:
        raise ValueError(f"`{name}` must be {wanted}. Received: {name}={value!r}")


def check_weight_sharing(weight_sharing, max_rows):
    """Raises `ValueError` unless both are of those that there are."""
    if weight_sharing not in ("expand", "reduce"):
        raise ValueError(f'`weight_sharing` must be "expand" or "reduce". Received: weight_sharing={weight_sharing!r}')
    is_integer = isinstance(max_rows, numbers.Integral) and not isinstance(max_rows, bool)
    if max_rows is not None and not (is_integer and max_rows > 0):
        raise ValueError(f"`max_rows` must be an integer above 0, or `None` for all rows. Received: max_rows={max_rows!r}")


def check_flags(**flags):
    """Raises `ValueError` unless all are booleans."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            hint = " The damping itself goes into `damping`." if name == "relative_damping" else ""
            raise ValueError(f"`{name}` must be `True` or `False`.{hint} Received: {name}={flag!r}")


def build_inner_optimizer(inner_optimizer, learning_rate, kwargs):
    """Returns the optimizer of that name or class, with these arguments; an instance as it is, and then none may be given."""
    if isinstance(learning_rate, (str, keras.optimizers.Optimizer)):
        name = (
            repr(learning_rate) if isinstance(learning_rate, str) else f"keras.optimizers.{type(learning_rate).__name__}(...)"
        )
        raise ValueError(
            f"`learning_rate` comes first. To hand the gradients to another optimizer, write `ISAAC(inner_optimizer={name})`. "
            f"Received: learning_rate={learning_rate!r}"
        )
    if isinstance(inner_optimizer, keras.optimizers.Optimizer):
        given = {} if learning_rate is None else {"learning_rate": learning_rate}
        given.update(kwargs)
        if given:
            raise ValueError(
                f"`{'`, `'.join(given)}` cannot be given beside an `inner_optimizer` instance, which has its own. Write for "
                f"example `ISAAC(inner_optimizer=keras.optimizers.{type(inner_optimizer).__name__}("
                f"{', '.join(f'{name}={value!r}' for name, value in given.items())}))`. "
                f"Received: inner_optimizer={inner_optimizer}"
            )
        return inner_optimizer
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
        received = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        raise type(error)(
            "`ISAAC` hands the arguments that are not its own to the inner optimizer, and "
            f"{optimizer_class.__name__} says: {error}. Another takes its place by name: `ISAAC(inner_optimizer='sgd')`. "
            f"Received: {received}"
        ) from error


def _class_of_name(name):
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


def public_config(optimizer):
    """Returns the serialized optimizer, which names the class of `keras.optimizers` where Keras uses one of its backend's."""
    config = keras.saving.serialize_keras_object(optimizer)
    name, module = type(optimizer).__name__, type(optimizer).__module__
    public_class = getattr(keras.optimizers, name, None)
    if module.startswith("keras.") and public_class in type(optimizer).__mro__[1:]:
        config = {**config, "module": "keras.optimizers", "registered_name": None}
    return config
