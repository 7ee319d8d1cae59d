"""`capture_inputs` and `release_inputs`: which layers condition the gradients of their kernels on their inputs."""

import contextlib
import difflib
import functools
import inspect
import re
import weakref

import keras

from keras_isaac import keras_hooks, scope
from keras_isaac.layers import adapter_of, kernels_of, supported_kinds
from keras_isaac.optimizer import isaacs_in, listeners

# Layers that were captured by themselves. Models that hold them may be made later.
_alone = weakref.WeakSet()


def capture_inputs(target, include=None, exclude=None):
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
                f"Received: target={_describe(target)}, include={include}, exclude={exclude}"
            )
        _capture_layer(target)
        return target
    raise TypeError(
        "`capture_inputs` takes a `keras.Model`, a `keras.Layer` or, as a decorator, a subclass of `keras.Model`. "
        f"Received: target={target!r} (of type {type(target).__name__})"
    )


def release_inputs(target):
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
        _release(layer)
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
            _release(layer)
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
            _capture(layer)
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
                isaac.expect_part(functools.partial(_why_plain, model))
                stack.enter_context(scope.open_scope(isaac.conditioning_of_step(mapping, model.optimizer)))
            yield

    def before_saving(self):
        """Tells the optimizer which layers its file or copy is to capture."""
        model = self._model()
        layers = [layer for layer, _ in walk(model) if adapter_of(layer)]
        captured = [layer for layer in layers if is_captured(layer)]
        for isaac in isaacs_in(getattr(model, "optimizer", None)):
            isaac.captured = True if layers == captured else frozenset(_path_in(model, layer) for layer in captured)


class _Selection:
    """The rules of one call, and what came of them so far."""

    def __init__(self, include, exclude):
        self.include, self.exclude = _rules("include", include), _rules("exclude", exclude)
        self.waiting = weakref.WeakSet()
        self._by_path = any(isinstance(rule, str) for rule in (*(self.include or ()), *(self.exclude or ())))
        self._decided, self._matched, self._chosen = weakref.WeakSet(), set(), set()

    def chooses(self, layer, containers):
        """Whether `layer` is to be captured; it is asked once a layer, so that a later choice for that layer holds."""
        # A layer has no path before it is built, so that it is too early to tell.
        if layer in self._decided or (self._by_path and layer.path is None):
            return False
        self._decided.add(layer)
        included, excluded = _matching(self.include, layer, containers), _matching(self.exclude, layer, containers)
        self._matched |= included | excluded
        if adapter_of(layer):
            self._chosen |= included
        return (self.include is None or bool(included)) and not excluded

    def check(self, model):
        """Raises if a rule matched nothing, or nothing that can be conditioned, although all layers are built."""
        if any(not layer.built for layer in self.waiting):
            return
        layers = list(walk(model)) if self.include or self.exclude else ()
        for name, rules in (("include", self.include), ("exclude", self.exclude)):
            for rule in rules or ():
                if rule not in self._matched:
                    _raise_unmatched(name, rule, model, [layer.path for layer, _ in layers if adapter_of(layer)])
                if name == "include" and rule not in self._chosen:
                    kinds = {_describe(layer) for layer, above in layers if rule in _matching((rule,), layer, above)}
                    _raise_unsupported(sorted(kinds), f"include={_describe(rule)}")


def _capture_model(model, include, exclude):
    selection = _Selection(include, exclude)
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
    captured = [_capture(each) for each, _ in walk(layer)]
    if not any(captured):
        _raise_unsupported([_describe(layer)], f"target={_describe(layer)}")
    _alone.add(layer)
    for model in _models_of([layer]):
        _owner_of(model)
        keras_hooks.renew_step(model)


def _models_of(layers):
    """Returns the living models that hold one of these layers: a layer does not know its models."""
    wanted = set(map(id, layers))
    return [model for model in keras_hooks.living_models() if any(id(layer) in wanted for layer, _ in walk(model))]


def _meet(isaac):
    """Finds the models that an `ISAAC`, made or built now, may train: those of layers captured alone, and copies."""
    for model in _models_of(_alone) if _alone else ():
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
    _rules("include", include), _rules("exclude", exclude)
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


def _capture(layer):
    """Wraps the `call` of this layer, once; returns whether the layer can be conditioned."""
    if adapter_of(layer) is None:
        return False
    keras_hooks.wrap_call(layer, _captured_call)
    keras_hooks.keep_scope(layer)
    # Somebody else's `call` on the instance is not the layer that the adapter knows.
    return is_captured(layer)


def _release(layer):
    if is_captured(layer):
        keras_hooks.unwrap_call(layer)
    keras_hooks.drop_scope(layer)
    _alone.discard(layer)


def is_captured(layer):
    """Whether this layer's `call` is wrapped."""
    return keras_hooks.runs(layer, _captured_call)


@contextlib.contextmanager
def captured_throughout(root):
    """Captures every supported layer in `root` inside the `with` block, to see what it would do."""
    layers = [layer for layer, _ in walk(root) if adapter_of(layer) and "call" not in vars(layer)]
    for layer in layers:
        keras_hooks.wrap_call(layer, _captured_call)
    try:
        yield
    finally:
        for layer in layers:
            keras_hooks.unwrap_call(layer)


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
    elif kwargs.get("training") is not False and keras_hooks.sees_step(args[0] if args else layer.variables[0]):
        scope.note_plain_call()
    return keras_hooks.own_call(layer)(layer, *args, **kwargs)


def walk(root, containers=()):
    """Yields `root` and every layer in it, each with the layers that contain it, outermost first."""
    seen = {id(root)}
    stack = [(root, containers)]
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


def _raise_unmatched(name, rule, model, paths):
    hint = ""
    if isinstance(rule, str):
        nearest = sorted(paths, key=lambda path: difflib.SequenceMatcher(None, rule, path).ratio(), reverse=True)
        hint = "A string is a regular expression that must match a whole `layer.path`. "
        hint += f"The nearest: {', '.join(map(repr, nearest[:3]))}. "
    raise ValueError(f"`{name}` matches no layer of {_describe(model)}. {hint}Received: {name}={_describe(rule)}")


def _why_plain(model):
    """Returns why no kernel of the model can be conditioned, or `None` if one can."""
    # Imported here, since `summary.py` looks into this file.
    from keras_isaac.summary import kernel_status

    statuses = sorted(kernel_status(model), key=lambda status: not status.trainable)
    if not statuses or any(status.reason is None for status in statuses):
        return None
    reasons = [f"'{status.path}' ({status.reason})" for status in statuses]
    return (
        f"All kernels of '{model.name}' are plain: {', '.join(reasons[:5])}{', ...' if len(reasons) > 5 else ''}. "
        f"`capture_inputs(model)` captures all that it can: {', '.join(supported_kinds())}; a layer of your own is made known "
        "by `keras_isaac.register_layer`."
    )


def prepare(model, data):
    """Builds the model on `data`, where Keras leaves that to its first training step."""
    if not model.built and type(model).call is not keras.Model.call:
        # A model that has no `call` is one of built models, and of a `train_step` of its own.
        model(keras.utils.unpack_x_y_sample_weight(data)[0])
