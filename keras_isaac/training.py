"""The training steps of captured models: the choice of layers, the scope, and the checks that `ISAAC` conditions something.

In the scope, the `call` of a captured layer is conditioned if the innermost `ISAAC` that trains a kernel of it chooses it.
Everywhere else it is the plain `call`.
"""

import contextlib
import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_isaac import backend, keras_hooks, scope
from keras_isaac.keras_hooks import has_several, isaacs_in
from keras_isaac.layers import ADAPTERS, adapter_of
from keras_isaac.selection import (
    Containers,
    Rule,
    captured_alone,
    captured_by,
    check_matches,
    is_chosen,
    matches,
    shorten,
    walk,
)
from keras_isaac.training_errors import WEIGHTS_ARE_LOST, check_is_captured, nothing_to_condition, paths_of, reused_error


class CapturedModel:
    """The owner of a captured model's training step (see `keras_hooks.wrap_step`), which knows the layers it chooses."""

    def __init__(self, model: keras.Model) -> None:
        # The model holds its owner.
        self._model: Callable[[], keras.Model] = weakref.ref(model)
        self.is_captured = False
        self._include: tuple[Rule, ...] | None = None
        self._exclude: tuple[Rule, ...] | None = None
        # By the layer's id: every layer that can be conditioned, with the layers that contain it, and whether it is chosen.
        self._layers: dict[int, tuple[keras.Layer, Containers]] = {}
        self._choices: dict[int, bool] = {}
        self._has_own_step = keras_hooks.has_own_step(model)
        keras_hooks.wrap_step(model, self)

    def select(self, include: tuple[Rule, ...] | None, exclude: tuple[Rule, ...] | None) -> None:
        """Chooses layers by these rules, and by no earlier ones."""
        model = self._model()
        check_matches(model, include, exclude)
        self.is_captured, self._include, self._exclude = True, include, exclude
        self._find_layers()
        keras_hooks.recompile_step(model)

    def release(self) -> None:
        """Chooses no layer any more."""
        model = self._model()
        self.is_captured = False
        self._layers, self._choices = {}, {}
        for isaac in isaacs_in(getattr(model, "optimizer", None)):
            isaac.step_check.forget()
        keras_hooks.recompile_step(model)

    def chooses(self, layer: keras.Layer) -> bool:
        """Returns whether this model chooses the layer."""
        choice = self._choices.get(id(layer))
        if choice is None and id(layer) in self._layers:
            _, containers = self._layers[id(layer)]
            choice = self._include is None or matches(self._include, layer, containers)
            choice = choice and not matches(self._exclude or (), layer, containers)
            # A layer has its path once it is built.
            if layer.built:
                self._choices[id(layer)] = choice
        return bool(choice)

    def _find_layers(self) -> None:
        """Captures all layers that the model has now."""
        self._layers, self._choices = {}, {}
        self._add(self._model())

    def _add(self, root: keras.Layer, containers: Containers = ()) -> None:
        """Captures all layers in `root`, and those that they create when they are built."""
        for layer, within in walk(root, containers):
            if capture_layer(layer, self):
                self._layers[id(layer)] = layer, within
            if layer.built:
                self.chooses(layer)
            else:
                keras_hooks.after_build(layer, functools.partial(self._after_build, layer, within))

    def _after_build(self, layer: keras.Layer, containers: Containers) -> None:
        model = self._model()
        if self.is_captured:
            self._add(layer, containers)
            if layer is model:
                check_matches(model, self._include, self._exclude)

    @contextlib.contextmanager
    def step(self, optimizer_values: list | None) -> Iterator[None]:
        """Opens the scope of every `ISAAC` of the model for one training step."""
        model = self._model()
        isaacs = isaacs_in(model.optimizer)
        if not self.is_captured:
            # Released by a callback of this `fit`, which goes on with plain gradients.
            for isaac in isaacs:
                isaac.step_check.note_use()
            yield
            return
        if isaacs and not model.optimizer.built and has_several(model.optimizer) and is_built(model):
            # TensorFlow builds it at the end of the first step, but which optimizer trains a kernel is known once it is built.
            model.optimizer.build(model.trainable_variables)
        mapping = [] if optimizer_values is None else list(zip(model.optimizer.variables, optimizer_values, strict=True))
        conditionings = []
        for isaac in isaacs:
            isaac.step_check.begin(model)
            conditionings.append(isaac.conditioning_of_step(mapping, model.optimizer, self.chooses))
        with scope.open_scope(*conditionings) if isaacs else contextlib.nullcontext():
            yield

    def before_training(self, is_new: bool) -> None:
        """Finds the layers that were added since, and raises if `ISAAC` could condition nothing in the step."""
        model = self._model()
        if not self.is_captured:
            check_is_captured(model, self._has_own_step)
            return
        if is_new:
            self._find_layers()
            check_matches(model, self._include, self._exclude)
        isaacs = isaacs_in(model.optimizer)
        if isaacs and not self._has_own_step and not has_several(model.optimizer):
            self._check_variables(model, isaacs[0].step_check.trained)
        if isaacs and is_new and model.trainable_variables and is_built(model):
            advice = nothing_to_condition(model)
            if advice is not None:
                raise ValueError(advice)

    @staticmethod
    def _check_variables(model: keras.Model, trained: dict[int, keras.Variable]) -> None:
        """Raises if a built optimizer trains another model, and warns of variables that are new since it was built."""
        variables = model.trainable_variables
        unknown = [variable for variable in variables if trained and id(variable) not in trained]
        if unknown and len(unknown) == len(variables):
            raise reused_error(f"'{model.name}'", variables)
        if unknown:
            message = (
                f"Compile '{model.name}' again, `model.compile(optimizer=ISAAC(...), ...)`, to train what was added or "
                f"unfrozen since its optimizer was built: {shorten([variable.path for variable in unknown])}."
            )
            # Elsewhere Keras trains on without them, or raises.
            if backend.IS_STATELESS:
                raise ValueError(message)
            warnings.warn(f"{message} They would keep their values.", stacklevel=2)

    def before_saving(self) -> None:
        """Tells the optimizer which layers its file or copy is to capture."""
        model = self._model()
        layers = [layer for layer, _ in walk(model) if adapter_of(layer)]
        chosen = [layer for layer in layers if self.chooses(layer)]
        for isaac in isaacs_in(getattr(model, "optimizer", None)):
            isaac.captured = None
            if self.is_captured:
                isaac.captured = True if layers == chosen else frozenset(_path_in(model, layer) for layer in chosen)


# Before Keras takes the weights out of the model, as it does on JAX.
keras_hooks.check_before_training(lambda model: check_is_captured(model, keras_hooks.has_own_step(model)))


def is_built(model: keras.Model) -> bool:
    """Returns whether all layers of a model are built."""
    return all(layer.built for layer, _ in walk(model))


def capture_copy(isaac: keras.optimizers.Optimizer) -> None:
    """Captures the model of a copied `ISAAC` as the original was."""
    captured = isaac.captured
    # Searching takes long in large processes.
    for model in [] if captured is None else keras_hooks.models_of(isaac):
        if keras_hooks.owner_of(model) is None:
            layers = [layer for layer, _ in walk(model) if captured is True or _path_in(model, layer) in captured]
            if layers:
                CapturedModel(model).select(None if captured is True else tuple(layers), None)


def _path_in(model: keras.Model, layer: keras.Layer) -> str | None:
    """Returns the path of a layer without the name of its model, which Keras may have chosen."""
    return None if layer.path is None else layer.path.removeprefix(f"{model.name}/")


def capture_layer(layer: keras.Layer, model: Any = None) -> bool:
    """Wraps the `call` of this layer once, for a `CapturedModel` or alone; returns whether the layer can be conditioned."""
    keras_hooks.keep_scope(layer)
    if adapter_of(layer) is None:
        if backend.untraced(type(layer).call) is not None:
            keras_hooks.wrap_call(layer, _traced_call)
        return False
    if not keras_hooks.wrap_call(layer, _captured_call):
        return False
    if model is None:
        captured_alone.add(layer)
    else:
        captured_by.setdefault(layer, weakref.WeakSet()).add(model)
    return True


@contextlib.contextmanager
def captured_throughout(root: keras.Layer) -> Iterator[None]:
    """Wraps every supported layer in `root` inside the `with` block, to see what it would do."""
    layers = [layer for layer, _ in walk(root) if adapter_of(layer) and "call" not in vars(layer)]
    for layer in layers:
        keras_hooks.wrap_call(layer, _captured_call)
    try:
        yield
    finally:
        for layer in layers:
            keras_hooks.unwrap_call(layer)


def _captured_call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
    scopes = scope.open_scopes()
    if scopes:
        adapter, conditionings = ADAPTERS[type(layer).call], {}
        for kernel in adapter.kernels(layer):
            # A kernel that the layer computes is no variable. See `kernels_of`.
            conditioning = scope.conditioning_of(kernel, scopes) if isinstance(kernel, keras.Variable) else None
            if conditioning is not None and conditioning.chooses(layer):
                conditioning.on_use()
                if conditioning.record is not None or conditioning.output_damping is not None:
                    conditioning = dataclasses.replace(conditioning, kernel=kernel)
                conditionings[id(kernel)] = conditioning
        if conditionings:
            return adapter.call(layer, lambda kernel: conditionings.get(id(kernel)), *args, **kwargs)
    elif scope.closed and backend.scopes_of_recomputation() is None and is_chosen(layer):
        # A backward pass outside of the scope recomputes the forward pass.
        raise ValueError(
            f"Call `loss.backward()` inside `with optimizer.conditioning():`. It recomputes layer '{layer.path}' "
            "(`torch.utils.checkpoint`), which is conditioned only inside of that block."
        )
    elif (
        kwargs.get("training") is not False and backend.is_tracing(args[0] if args else layer.variables[0]) and is_chosen(layer)
    ):
        scope.plain_calls.add("called")
    return keras_hooks.own_call(layer)(layer, *args, **kwargs)


def _traced_call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Any:
    """Runs the `call` of a layer that is a `tf.function`: the layers in it may have been traced outside of the scope."""
    function = (backend.untraced(type(layer).call) if scope.open_scopes() else None) or type(layer).call
    return function(layer, *args, **kwargs)


class StepCheck:
    """Whether a captured layer conditions a gradient in the current step of an `ISAAC`."""

    def __init__(self) -> None:
        # The variables that the optimizer was built for, by id; none before.
        self.trained: dict[int, keras.Variable] = {}
        # Whether a layer did so since the last check, and whether one ever did.
        self._has_now = self._has_ever = False
        self._model: weakref.ref[keras.Model] | None = None

    def begin(self, model: keras.Model) -> None:
        """Notes that a step of a captured model begins: a layer has to condition a gradient before the check."""
        self._has_now, self._model = False, weakref.ref(model)

    def note_use(self) -> None:
        """Notes that a layer conditions a gradient."""
        self._has_now = self._has_ever = True

    def forget(self) -> None:
        """Forgets all uses, because the model is not captured any more."""
        self._has_ever = False

    def check(self, variables: Sequence | None) -> None:
        """Raises if the gradients of this step are not conditioned, as far as Python sees the step.

        Args:
            variables: the variables whose gradients are applied, or `None` for those that the optimizer was built for.
        """
        scope.closed.discard(self)
        if variables is None:
            variables = list(self.trained.values())
        was_called = bool(scope.plain_calls and variables) and backend.is_tracing(variables[0])
        scope.plain_calls.clear()
        model = None if self._model is None else self._model()
        was_missed = not self._has_now and (model is not None or was_called)
        self._has_now, self._model = False, None
        if self._has_ever and not was_missed:
            return
        if self.trained and not any(id(variable) in self.trained for variable in variables):
            raise reused_error("this step", variables)
        received = f"Received gradients for: {paths_of(variables)}"
        if model is None:
            raise ValueError(
                "Write `model = capture_inputs(model)` (from `keras_isaac`) before training; in a loop of your own, compute "
                "the loss inside `with optimizer.conditioning():`. No captured layer took part in this step. "
                f"{received}.{WEIGHTS_ARE_LOST}"
            )
        advice = nothing_to_condition(model) or (
            f"Call a captured layer in the training step of '{model.name}', or compile with the inner optimizer: none that "
            "`ISAAC` could condition took part in it."
        )
        raise ValueError(f"{advice} {received}.{WEIGHTS_ARE_LOST}")
