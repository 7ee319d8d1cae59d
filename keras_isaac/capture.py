"""`capture_inputs` and `release_inputs`: which layers condition the gradients of their kernels on their inputs."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, TypeVar

import keras

from keras_isaac import keras_hooks
from keras_isaac.selection import Rule, captured_alone, check_rules, describe, raise_unsupported, walk
from keras_isaac.training import CapturedModel, capture_layer

# A layer, a model, or a model's class, which is returned.
Target = TypeVar("Target", bound=keras.Layer | type)


def capture_inputs(
    target: Target, include: Rule | Sequence[Rule] | None = None, exclude: Rule | Sequence[Rule] | None = None
) -> Target:
    """Captures layers, so that the `ISAAC` optimizer conditions the gradients of their kernels on their inputs.

    The target stays what it is: same object, same class, same weights, same saved file. Outside a training step, and
    under any optimizer but `keras_isaac.ISAAC`, a captured layer is the plain layer. Capture before or after `compile`, also
    after a `fit`: it holds from the next step on. The last call on a model replaces its earlier choice, and `release_inputs`
    undoes it. Models that share a layer choose for themselves. A copy of a captured model that is compiled with `ISAAC`
    (`clone_model`, `load_model`, pickle, `copy.deepcopy`) is captured, too.

    Args:
        target: a `keras.Model` (all its supported layers, nested ones too, and ones that are built later); a subclass of
            `keras.Model`, as a class decorator (every instance); or a `keras.Layer`, with the layers that it contains, for
            training loops with `optimizer.conditioning()`. In `fit`, `include` chooses single layers.
        include: layers, or regular expressions that match a whole `layer.path`, or a list of them: capture these layers and
            what they contain, and no others. Defaults to `None`: all.
        exclude: likewise, layers to leave plain. Defaults to `None`: none.

    Returns:
        `target`.

    Raises:
        TypeError: if `target` is no model, layer or model class, or a rule is no layer or string.
        ValueError: if a rule matches no layer, or selects only layers that cannot be conditioned. Paths are known once a
            layer is built: for a model not built yet, the error comes in the first training step, on JAX before Keras
            3.14 as a `RuntimeError` that quotes it.

    Example:
    >>> import keras
    >>> from keras_isaac import capture_inputs
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(2, name="head")])
    >>> model = capture_inputs(model, exclude=".*/head")
    """
    if isinstance(target, type) and issubclass(target, keras.Model):
        _capture_class(target, check_rules("include", include), check_rules("exclude", exclude))
    elif isinstance(target, keras.Model):
        rules = check_rules("include", include), check_rules("exclude", exclude)
        (keras_hooks.owner_of(target) or CapturedModel(target)).select(*rules)
    elif isinstance(target, keras.Layer):
        if include is not None or exclude is not None:
            raise ValueError(
                "Give `include` and `exclude` with a model, whose layers they choose. "
                f"Received: target={describe(target)}, include={include}, exclude={exclude}"
            )
        captured = [capture_layer(layer) for layer, _ in walk(target)]
        if not any(captured):
            raise_unsupported([describe(target)], f"target={describe(target)}")
    else:
        raise TypeError(
            "Give `capture_inputs` a `keras.Model`, a `keras.Layer` or, as a decorator, a subclass of `keras.Model`. "
            f"Received: target={target!r} (of type {type(target).__name__})"
        )
    return target


def release_inputs(target: Target) -> Target:
    """Undoes `capture_inputs`: the target trains with its plain gradients from the next step on.

    Args:
        target: a `keras.Model`, a `keras.Layer` or a decorated subclass of `keras.Model`, as it was captured. Releasing a layer
            does not change the choice of a model that holds it, nor does releasing a class change its instances.

    Returns:
        `target`.

    Raises:
        TypeError: if `target` is no model, layer or model class.

    Example:
    >>> import keras
    >>> from keras_isaac import capture_inputs, kernel_status, release_inputs
    >>> model = capture_inputs(keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)]))
    >>> [status.reason for status in kernel_status(release_inputs(model))]
    ['not captured']
    """
    if isinstance(target, type) and issubclass(target, keras.Model):
        _release_class(target)
    elif isinstance(target, keras.Model):
        owner = keras_hooks.owner_of(target)
        if owner is not None:
            owner.release()
    elif isinstance(target, keras.Layer):
        for layer, _ in walk(target):
            captured_alone.discard(layer)
    else:
        raise TypeError(
            "Give `release_inputs` a `keras.Model`, a `keras.Layer` or a subclass of `keras.Model`. "
            f"Received: target={target!r} (of type {type(target).__name__})"
        )
    return target


def _capture_class(model_class: Any, include: tuple[Rule, ...] | None, exclude: tuple[Rule, ...] | None) -> None:
    _release_class(model_class)
    plain_init = model_class.__init__

    @functools.wraps(plain_init)
    def init(self: keras.Model, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        capture_inputs(self, include, exclude)

    # Keras reads the arguments of `__init__` for `get_config`, and does not look behind a wrapper by itself.
    init.__signature__ = inspect.signature(plain_init)  # type: ignore[attr-defined]
    init.captures = True  # type: ignore[attr-defined]
    model_class.__init__ = init


def _release_class(model_class: Any) -> None:
    init = vars(model_class).get("__init__")
    if getattr(init, "captures", False):
        model_class.__init__ = init.__wrapped__
