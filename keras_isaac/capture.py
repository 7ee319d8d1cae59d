"""`capture_inputs`: which layers are captured, and how a model's training step opens the conditioning scope."""

import contextlib
import dataclasses
import functools
import gc
import inspect
import re
import types
import weakref

import keras

from keras_isaac import scope
from keras_isaac.layers import adapter_of, kernels_of, supported_kinds
from keras_isaac.layers.calls import mask_of, own_call, with_mask
from keras_isaac.optimizer import isaacs_in

_IS_NNX = keras.backend.backend() == "jax" and getattr(keras.config, "is_nnx_enabled", bool)()
# The method in which the scope is opened. In the NNX mode of JAX, Keras calls the `train_step` of the class and passes over
# that of the instance, but not over what it calls for the loss.
_STEP = "compute_loss_and_updates" if _IS_NNX else "train_step"

# Layers that were captured by themselves, and of which no model is known yet.
_without_model = weakref.WeakSet()


def capture_inputs(target, include=None, exclude=None):
    """Lets layers condition the gradients of their kernels on their inputs, for the `ISAAC` optimizer.

    The target remains what it is: same object, same class, same weights, same saved file. Outside a training step, and
    under any optimizer but `keras_isaac.ISAAC`, a captured layer is the plain layer. Capture before or after `compile`, also
    after a `fit`: it holds from the next step on. Capturing twice is capturing once.

    Args:
        target: a `keras.Model` (all its supported layers, nested ones too, and ones that are built later), a `keras.Layer`
            (that layer, with what it contains), or a subclass of `keras.Model`, as a class decorator (every instance).
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
        selection = _Selection(_rules("include", include), _rules("exclude", exclude))
        _capture_model(target, selection)
        return target
    if isinstance(target, keras.Layer):
        if include is not None or exclude is not None:
            raise ValueError(
                "`include` and `exclude` choose among the layers of a model. "
                f"Received: target={_describe(target)}, include={include}, exclude={exclude}"
            )
        _capture_layer(target)
        return target
    raise TypeError(
        "`capture_inputs` takes a `keras.Model`, a `keras.Layer` or, as a decorator, a subclass of `keras.Model`. "
        f"Received: target={target!r} (of type {type(target).__name__})"
    )


@dataclasses.dataclass(frozen=True)
class _Selection:
    """One call's `include` and `exclude`, applied to a model again whenever its layers may have changed."""

    include: tuple | None
    exclude: tuple | None

    def apply(self, model):
        """Captures the selected layers of `model`; raises if a rule matched nothing although all paths are known."""
        matched, chosen = set(), set()
        layers = list(walk(model))
        by_path = any(isinstance(rule, str) for rule in (*(self.include or ()), *(self.exclude or ())))
        for layer, containers in layers:
            _keep_scope(layer)
            included = _matching(self.include, layer, containers)
            excluded = _matching(self.exclude, layer, containers)
            matched |= included | excluded
            # A layer has no path before it is built, so that it is too early to tell.
            decided = not by_path or layer.path is not None
            if decided and (self.include is None or included) and not excluded:
                _capture(layer)
            if adapter_of(layer):
                chosen |= included
        if not all(layer.built for layer, _ in layers):
            return
        for name, rules in (("include", self.include), ("exclude", self.exclude)):
            for rule in rules or ():
                if rule not in matched:
                    paths = [layer.path for layer, _ in layers if adapter_of(layer)]
                    raise ValueError(
                        f"`{name}` matches no layer of {_describe(model)}. A string is a regular expression that must match a "
                        f"whole `layer.path`, one of: {', '.join(map(repr, paths))}. Received: {name}={_describe(rule)}"
                    )
                if name == "include" and rule not in chosen:
                    kinds = {_describe(layer) for layer, above in layers if rule in _matching((rule,), layer, above)}
                    _raise_unsupported(sorted(kinds), f"include={_describe(rule)}")


def _capture_model(model, selection):
    selections = _open_in(model)
    if selection not in selections:
        selections.append(selection)
    selection.apply(model)
    _renew(model)


def _capture_layer(layer):
    captured = [_capture(each) for each, _ in walk(layer)]
    if not any(captured):
        _raise_unsupported([_describe(layer)], f"target={_describe(layer)}")
    _without_model.add(layer)
    _find_models(layer)


def _capture_class(model_class, include, exclude):
    selection = _Selection(_rules("include", include), _rules("exclude", exclude))
    plain_init = model_class.__init__
    if getattr(plain_init, "keras_isaac_selection", None) == selection:
        return model_class

    @functools.wraps(plain_init)
    def init(self, *args, **kwargs):
        plain_init(self, *args, **kwargs)
        _capture_model(self, selection)

    # Keras reads the arguments of `__init__` for `get_config`, and does not look behind a wrapper by itself.
    init.__signature__ = inspect.signature(plain_init)
    init.keras_isaac_selection = selection
    model_class.__init__ = init
    return model_class


def _open_in(model):
    """Has the training step of this instance open the scope, once; returns the list of its selections."""
    plain_step, plain_make = getattr(model, _STEP), model.make_train_function
    selections = getattr(plain_step, "keras_isaac_selections", None)
    if selections is not None:
        return selections
    selections = []
    setattr(model, _STEP, _opening(model, plain_step, selections))

    @functools.wraps(plain_make)
    def make_train_function(force=False):
        if force or model.train_function is None:
            # JAX remembers what it compiled by the function: with the same one, a change of the layers or of the loss would
            # not reach the compiled step.
            setattr(model, _STEP, _opening(model, plain_step, selections))
            if _IS_NNX and model.built:
                # NNX lets nobody change a layer inside of a traced step.
                for selection in selections:
                    selection.apply(model)
        return plain_make(force=force)

    model.make_train_function = make_train_function
    return selections


def _opening(model, plain_step, selections):
    """Returns `plain_step` of `model`, run with the conditioning scope open."""
    is_first = True

    @functools.wraps(plain_step)
    def train_step(*args, **kwargs):
        nonlocal is_first
        optimizers = isaacs_in(model.optimizer)
        if not optimizers or (_IS_NNX and kwargs.get("optimizer_variables") is None):
            return plain_step(*args, **kwargs)
        if is_first:
            prepare(model, args[-1] if args else kwargs["data"])
            is_first = False
        if not model.optimizer.built and model.built:
            # Which of several optimizers trains a kernel is known once they are built.
            model.optimizer.build(model.trainable_variables)
        state_mapping = []
        if keras.backend.backend() == "jax":
            values = kwargs["optimizer_variables"] if _IS_NNX else (args[0] if args else kwargs["state"])[2]
            state_mapping = list(zip(model.optimizer.variables, values, strict=True))
        with contextlib.ExitStack() as stack:
            for optimizer in optimizers:
                stack.enter_context(scope.opened(optimizer.conditioning_of_step(state_mapping, model.optimizer)))
            return plain_step(*args, **kwargs)

    train_step.keras_isaac_selections = selections
    return train_step


def prepare(model, data):
    """Builds the model on `data`, where that is left to its first training step, and captures what was chosen of it."""
    if not model.built and type(model).call is not keras.Model.call:
        # TensorFlow builds a model in its first step: do so before it, so that the layers are there to be captured.
        # A model that has no `call` is one of built models, and of a `train_step` of its own.
        model(keras.utils.unpack_x_y_sample_weight(data)[0])
    for selection in getattr(getattr(model, _STEP), "keras_isaac_selections", ()):
        selection.apply(model)


def _renew(model):
    """Has a step that was compiled before traced anew."""
    if model.train_function is not None:
        model.make_train_function(force=True)


def _capture(layer):
    """Wraps the `call` of this layer, once; returns whether the layer can be conditioned."""
    if adapter_of(layer) is None:
        return False
    if "call" not in vars(layer):
        _wrap_call(layer)
        _keep_scope(layer)
    # Somebody else's `call` on the instance is not the layer that the adapter knows.
    return is_captured(layer)


def _wrap_call(layer):
    # Keras calls a quantized layer by the other name.
    layer.call = layer.quantized_call = types.MethodType(_captured_call, layer)


def is_captured(layer):
    """Whether this layer's `call` is wrapped."""
    return getattr(vars(layer).get("call"), "__func__", None) is _captured_call


@contextlib.contextmanager
def captured_throughout(root):
    """Captures every supported layer in `root` inside the `with` block, to see what it would do."""
    layers = [layer for layer, _ in walk(root) if adapter_of(layer) and "call" not in vars(layer)]
    for layer in layers:
        _wrap_call(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.call, layer.quantized_call


def _captured_call(layer, *args, **kwargs):
    if scope.is_open():
        adapter = adapter_of(layer)
        conditionings = {}
        for kernel in kernels_of(layer):
            conditioning = scope.conditioning_of(kernel)
            if conditioning is not None:
                conditioning.on_use()
                conditionings[id(kernel)] = conditioning.of_kernel(kernel)
        if conditionings:
            return adapter.call(layer, lambda kernel: conditionings.get(id(kernel)), *args, **kwargs)
    elif layer in _without_model:
        for optimizer, outer_optimizer in _find_models(layer):
            # TensorFlow builds a model in its first step, so that this may be that step, and too late to open it as a whole.
            with scope.opened(optimizer.conditioning_of_step(outer_optimizer=outer_optimizer)):
                return _captured_call(layer, *args, **kwargs)
    return own_call(layer)(layer, *args, **kwargs)


def _keep_scope(layer):
    """Has this layer recomputed in the scope of its forward pass, if a `keras.RematScope` says that it is to be recomputed."""
    if "rematerialized_call" not in vars(layer):
        layer.rematerialized_call = types.MethodType(_rematerialized_call, layer)


def _rematerialized_call(layer, layer_call, *args, **kwargs):
    # The backward pass may run after the scope is closed, or in a thread of its own, and Keras loses the masks on the way.
    masks = keras.tree.map_structure(lambda value: mask_of(value) if keras.ops.is_tensor(value) else None, (args, kwargs))

    # JAX remembers a trace by its function: a captured layer's `call` is the same one every time, where Keras' is a new bound
    # method, and so needs a new one here.
    @scope.kept
    def call(*args, **kwargs):
        args, kwargs = keras.tree.map_structure(with_mask, (args, kwargs), masks)
        return layer_call(*args, **kwargs)

    return type(layer).rematerialized_call(layer, call, *args, **kwargs)


def _find_models(layer):
    """Opens the scope in the training steps of the models that hold a layer captured by itself.

    A layer does not know its models, and Keras has no public way to ask. So the living models are looked through, once when
    the layer is captured and then in its calls until one is found. Returns their `ISAAC` optimizers, each with the model's, but
    none on JAX, where the damping is in the step's state, and where a model calls its layers before it compiles its step.
    """
    models = [x for x in gc.get_objects() if issubclass(type(x), keras.Model) and hasattr(x, "train_function")]
    models = [model for model in models if any(each is layer for each, _ in walk(model))]
    for model in models:
        _open_in(model)
        _renew(model)
    if models:
        _without_model.discard(layer)
    if keras.backend.backend() == "jax":
        return []
    return [(isaac, model.optimizer) for model in models for isaac in isaacs_in(getattr(model, "optimizer", None))]


def walk(root):
    """Yields `root` and every layer in it, each with the layers that contain it, outermost first."""
    seen = {id(root)}
    stack = [(root, ())]
    while stack:
        layer, containers = stack.pop()
        yield layer, containers
        values = list(vars(layer).values())
        while values:
            value = values.pop()
            if isinstance(value, (list, tuple, set, dict)):
                if id(value) not in seen:
                    seen.add(id(value))
                    values.extend(value.values() if isinstance(value, dict) else value)
            elif isinstance(value, keras.Layer) and id(value) not in seen:
                seen.add(id(value))
                stack.append((value, (*containers, layer)))


def _rules(name, rules):
    if rules is None:
        return None
    rules = tuple(rules) if isinstance(rules, (list, tuple, set)) else (rules,)
    for rule in rules:
        if not isinstance(rule, (str, keras.Layer)):
            raise TypeError(
                f"`{name}` takes layers and regular expressions of layer paths, or a list of them. "
                f"Received: {name}={rule!r} (of type {type(rule).__name__})"
            )
        if isinstance(rule, str):
            try:
                re.compile(rule)
            except re.error as error:
                raise ValueError(
                    f"`{name}` takes regular expressions, in which any characters are `.*` and not `*`. "
                    f"Received: {name}={rule!r} ({error})"
                ) from error
    return rules


def _matching(rules, layer, containers):
    """Returns the rules that name `layer` or a layer that contains it."""
    candidates = (layer, *containers)
    return {rule for rule in rules or () if any(_names(rule, candidate) for candidate in candidates)}


def _names(rule, layer):
    if isinstance(rule, str):
        return layer.path is not None and re.fullmatch(rule, layer.path) is not None
    return rule is layer


def _describe(layer):
    if isinstance(layer, str):
        return repr(layer)
    return f"{type(layer).__name__} layer '{layer.path or layer.name}'"


def _raise_unsupported(kinds, received):
    raise ValueError(
        f"There is no conditioned form of {', '.join(kinds)}. Supported: {', '.join(supported_kinds())}, and subclasses that "
        "keep their `call`; a layer of your own is made known by `keras_isaac.register_layer`. Leave it out, and it trains "
        f"with its plain gradient. Received: {received}"
    )
