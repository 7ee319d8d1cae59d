"""`capture_inputs` and `release_inputs`: which layers condition the gradients of their kernels on their inputs."""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Sequence
from typing import TypeVar

import keras

from keras_isaac import keras_hooks, scope
from keras_isaac.captured_layer import capture, captured_alone, is_captured, release
from keras_isaac.layers import adapter_of
from keras_isaac.optimizer import isaacs_in, listeners
from keras_isaac.selection import Rule, Selection, check_rules, describe, raise_unsupported, walk
from keras_isaac.status import why_plain

# A layer, a model, or a model's class: what is given is returned.
Target = TypeVar("Target", bound=keras.Layer | type)


def capture_inputs(
    target: Target, include: Rule | Sequence[Rule] | None = None, exclude: Rule | Sequence[Rule] | None = None
) -> Target:
    """Lets layers condition the gradients of their kernels on their inputs, for the `ISAAC` optimizer.

    The target remains what it is: same object, same class, same weights, same saved file. Outside a training step, and
    under any optimizer but `keras_isaac.ISAAC`, a captured layer is the plain layer. Capture before or after `compile`, also
    after a `fit`: it holds from the next step on. Of several calls on a model, the last one's choice holds; `release_inputs`
    undoes it. A copy of a model that is compiled with `ISAAC` (`clone_model`, `load_model`, pickle, `copy.deepcopy`) is
    captured as the model was.

    Args:
        target: a `keras.Model` (all its supported layers, nested ones too, and ones that are built later), a `keras.Layer`
            (that layer, with what it contains, in the models that hold it when it is captured or when an `ISAAC` is made or
            built), or a subclass of `keras.Model`, as a class decorator (every instance).
        include: layers, or regular expressions that match a whole `layer.path`, or a list of them: capture these layers and
            what they contain, and no others. Defaults to `None`: all.
        exclude: likewise, layers to leave plain. Defaults to `None`: none.

    Returns:
        `target`.

    Raises:
        TypeError: if `target` is no model, layer or model class, or a rule is no layer or string.
        ValueError: if a rule matches no layer, or selects only layers that cannot be conditioned. Paths are known once a
            layer is built: for a model not built yet, the error comes in the first training step.

    Example:
    >>> import keras
    >>> from keras_isaac import capture_inputs
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(2, name="head")])
    >>> model = capture_inputs(model, exclude=".*/head")
    """
    if isinstance(target, type) and issubclass(target, keras.Model):
        return _capture_class(target, include, exclude)
    if isinstance(target, keras.Model):
        _capture_model(target, include, exclude)
        return target
    if isinstance(target, keras.Layer):
        if include is not None or exclude is not None:
            raise ValueError(
                "`include` and `exclude` choose among the layers of a model. "
                f"Received: target={describe(target)}, include={include}, exclude={exclude}"
            )
        _capture_layer(target)
        return target
    raise TypeError(
        "`capture_inputs` takes a `keras.Model`, a `keras.Layer` or, as a decorator, a subclass of `keras.Model`. "
        f"Received: target={target!r} (of type {type(target).__name__})"
    )


def release_inputs(target: Target) -> Target:
    """Takes back `capture_inputs`: the target trains with its plain gradients from the next step on.

    Args:
        target: a `keras.Model` or a `keras.Layer`, with all that it contains; or a decorated subclass of `keras.Model`, of
            which instances made from now on are plain.

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
        return target
    if not isinstance(target, keras.Layer):
        raise TypeError(
            "`release_inputs` takes a `keras.Model`, a `keras.Layer` or a subclass of `keras.Model`. "
            f"Received: target={target!r} (of type {type(target).__name__})"
        )
    for layer, _ in walk(target):
        release(layer)
        if isinstance(layer, keras.Model) and keras_hooks.owner_of(layer):
            for isaac in isaacs_in(getattr(layer, "optimizer", None)):
                isaac.forget()
            keras_hooks.unwrap_step(layer)
            keras_hooks.renew_step(layer)
    return target


class _Owner:
    """What is captured of one model: the rules of its last `capture_inputs`, and the scope around its training steps."""

    def __init__(self, model):
        # The model holds its owner.
        self._model = weakref.ref(model)
        self._selection = None

    def select(self, selection):
        """Captures by these rules, and by no earlier ones."""
        self._selection = selection
        for layer, _ in walk(self._model()):
            release(layer)
        self.before_compiling()

    def before_compiling(self):
        """Captures what was added to the model since, and has layers that are not built yet captured when they are."""
        for layer, containers in walk(self._model()):
            keras_hooks.keep_scope(layer)
            if self._selection is not None:
                self._capture_by_rules(layer, containers)
        if self._selection is not None:
            self._selection.check(self._model())

    def _capture_by_rules(self, layer, containers):
        selection = self._selection
        if selection.chooses(layer, containers):
            capture(layer)
        if not layer.built and layer not in selection.waiting:
            selection.waiting.add(layer)
            keras_hooks.after_build(layer, lambda: self._after_build(selection, layer, containers))

    def _after_build(self, selection, layer, containers):
        selection.waiting.discard(layer)
        if selection is self._selection:
            # It may have made layers as it was built.
            for each, within in walk(layer, containers):
                keras_hooks.keep_scope(each)
                self._capture_by_rules(each, within)
            selection.check(self._model())

    @contextlib.contextmanager
    def step(self, optimizer_values):
        """Opens the scope for one training step."""
        model = self._model()
        isaacs = isaacs_in(model.optimizer)
        if not isaacs:
            yield
            return
        has_several = hasattr(getattr(model.optimizer, "inner_optimizer", model.optimizer), "optimizers")
        if has_several and not model.optimizer.built and all(layer.built for layer, _ in walk(model)):
            # TensorFlow builds it at the end of the first step, but which optimizer trains a kernel is known once it is built.
            model.optimizer.build(model.trainable_variables)
        mapping = [] if optimizer_values is None else list(zip(model.optimizer.variables, optimizer_values, strict=True))
        with contextlib.ExitStack() as stack:
            for isaac in isaacs:
                isaac.participation.expect(functools.partial(why_plain, model))
                stack.enter_context(scope.open_scope(isaac.conditioning_of_step(mapping, model.optimizer)))
            yield

    def before_saving(self):
        """Tells the optimizer which layers its file or copy is to capture."""
        model = self._model()
        layers = [layer for layer, _ in walk(model) if adapter_of(layer)]
        captured = [layer for layer in layers if is_captured(layer)]
        for isaac in isaacs_in(getattr(model, "optimizer", None)):
            isaac.captured = True if layers == captured else frozenset(_path_in(model, layer) for layer in captured)


def _capture_model(model, include, exclude):
    selection = Selection(include, exclude)
    _owner_of(model).select(selection)
    keras_hooks.renew_step(model)


def _owner_of(model):
    """Returns the owner of the model's training step, which it becomes now if there is none."""
    owner = keras_hooks.owner_of(model)
    if owner is None:
        owner = _Owner(model)
        keras_hooks.wrap_step(model, owner)
    return owner


def _capture_layer(layer):
    captured = [capture(each) for each, _ in walk(layer)]
    if not any(captured):
        raise_unsupported([describe(layer)], f"target={describe(layer)}")
    captured_alone.add(layer)
    for model in _models_of([layer]):
        _owner_of(model)
        keras_hooks.renew_step(model)


def _models_of(layers):
    """Returns the living models that hold one of these layers: a layer does not know its models."""
    wanted = set(map(id, layers))
    return [model for model in keras_hooks.living_models() if any(id(layer) in wanted for layer, _ in walk(model))]


def _meet(isaac):
    """Finds the models that an `ISAAC`, made or built now, may train: those of layers captured alone, and copies."""
    for model in _models_of(captured_alone) if captured_alone else ():
        if keras_hooks.owner_of(model) is None:
            _owner_of(model)
            keras_hooks.renew_step(model)
    if isaac.built and isaac.captured is not None:
        for model in keras_hooks.living_models():
            if keras_hooks.owner_of(model) is None and isaac in isaacs_in(getattr(model, "optimizer", None)):
                _capture_copy(model, isaac.captured)


listeners.append(_meet)


def _capture_copy(model, captured):
    """Captures a copy of a captured model: all of it (`True`), or the layers at these paths."""
    layers = None if captured is True else [layer for layer, _ in walk(model) if _path_in(model, layer) in captured]
    if layers != []:
        _capture_model(model, layers, None)


def _path_in(model, layer):
    """Returns the path of a layer without the name of its model, which Keras may have chosen."""
    return None if layer.path is None else layer.path.removeprefix(f"{model.name}/")


def _capture_class(model_class, include, exclude):
    check_rules("include", include), check_rules("exclude", exclude)
    _release_class(model_class)
    plain_init = model_class.__init__

    @functools.wraps(plain_init)
    def init(self, *args, **kwargs):
        plain_init(self, *args, **kwargs)
        _capture_model(self, include, exclude)

    # Keras reads the arguments of `__init__` for `get_config`, and does not look behind a wrapper by itself.
    init.__signature__ = inspect.signature(plain_init)
    init.captures = True
    model_class.__init__ = init
    return model_class


def _release_class(model_class):
    init = vars(model_class).get("__init__")
    if getattr(init, "captures", False):
        model_class.__init__ = init.__wrapped__
