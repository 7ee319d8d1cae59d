"""All code that patches Keras or looks into its objects: steps, optimizers, calls, building, recomputation, masks, saving.

One patch is of a class: `keras.Model.make_train_function` checks that no model trains with `ISAAC` that was not captured. All
others are of instances, so that they keep their class.

Each line states one assumption about Keras and names the test in `tests/test_hooks.py` that fails if a new Keras breaks it.

- `fit` and `train_on_batch` run the `train_step` of the instance: `test_training_runs_the_train_step_of_the_instance`.
- In the NNX mode of JAX, they run its `compute_loss_and_updates`: `test_nnx_mode`, of `test_setups.py`.
- They call `make_train_function`, which keeps a step unless forced: `test_training_makes_its_step_once`.
- On JAX, they call it before they take the weights out of the model: `test_a_failed_check_leaves_the_weights_in_the_model`.
- It is the one of `keras.Model`: `test_a_check_runs_before_any_model_makes_its_step`.
- A model without a step is given a new one: `test_a_model_without_a_step_makes_one`.
- A step on JAX is given the optimizer's variables third: `test_a_jax_step_is_given_the_optimizer_variables_third`.
- A layer runs the `call` of the instance: `test_a_layer_runs_the_call_of_the_instance`.
- A quantized one, its `quantized_call`: `test_the_factors_of_a_quantized_kernel`, of `test_lora.py`.
- It is built by the `build` of the instance, before its `call`: `test_a_layer_is_built_by_the_build_of_the_instance`.
- It is recomputed by the `rematerialized_call` of the instance: `test_recomputation_runs_the_rematerialized_call`.
- Copies and files ask the instance for `get_compile_config`: `test_copies_ask_for_the_compile_config_of_the_instance`.
- An optimizer that holds others has them in its attributes: `test_found_inside_other_optimizers`, of `test_optimizer.py`.
- The garbage collector knows every model: `test_every_model_of_an_optimizer_is_found`.

Private attributes of Keras that the package relies on:

- `_keras_mask`, the mask of a tensor on TensorFlow and PyTorch: `test_masks_are_read_and_given`.
- `_model_variables_moving_average` of an optimizer, which the `SwapEMAWeights` callback reads (`optimizer_wrapper.py`):
  `test_callbacks_see_the_moving_average_inside_other_optimizers`, of `test_optimizer.py`.
"""

import contextlib
import functools
import gc
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras import ops

from keras_isaac import backend
from keras_isaac.optimizer_wrapper import OptimizerWrapper
from keras_isaac.scope import bind_scope

# A mode of JAX alone, which an older Keras does not have.
_IS_NNX = backend.IS_STATELESS and getattr(keras.config, "is_nnx_enabled", bool)()
# NNX does not run the `train_step` of an instance, but it runs what that step calls for the loss.
_STEP = "compute_loss_and_updates" if _IS_NNX else "train_step"

# Training steps.


def check_before_training(check: Callable[[keras.Model], None]) -> None:
    """Calls `check(model)` before any model that has no owner makes a training step, as it does after each `compile`."""
    plain_make = keras.Model.make_train_function

    @functools.wraps(plain_make)
    def make_train_function(model: keras.Model, *args: Any, **kwargs: Any) -> Any:
        if model.train_function is None and owner_of(model) is None:
            check(model)
        return plain_make(model, *args, **kwargs)

    keras.Model.make_train_function = make_train_function


def wrap_step(model: keras.Model, owner: Any) -> None:
    """Runs every training step of this model inside `owner.step`, from the next one on.

    Args:
        model: `keras.Model`.
        owner: object of three functions. `step(optimizer_values)` returns the context of a training step, given the tensors
            that `model.optimizer.variables` have in it, or `None` if the variables hold their values. `fit` and
            `train_on_batch` call `before_training(is_new)` before Keras takes the weights; `is_new` says whether a new step
            will be compiled. `before_saving()` is called before the compile configuration is read, to save or copy the model.
    """
    plain_step, plain_make, plain_config = getattr(model, _STEP), model.make_train_function, model.get_compile_config

    def renew() -> None:
        # JAX remembers what it compiled by the function, so that a new step needs a new one.
        @functools.wraps(plain_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            optimizer_values = None
            if _IS_NNX:
                optimizer_values = kwargs.get("optimizer_variables")
                if optimizer_values is None:
                    # A step of `evaluate`.
                    return plain_step(*args, **kwargs)
            elif backend.IS_STATELESS:
                optimizer_values = (args[0] if args else kwargs["state"])[2]
            with owner.step(optimizer_values):
                return plain_step(*args, **kwargs)

        setattr(model, _STEP, step)

    # A model's own `make_train_function` need not take `force`.
    @functools.wraps(plain_make)
    def make_train_function(*args: Any, **kwargs: Any) -> Any:
        is_new = model.train_function is None or bool(args and args[0]) or bool(kwargs.get("force"))
        owner.before_training(is_new)
        if is_new:
            renew()
        return plain_make(*args, **kwargs)

    def recompile() -> None:
        if model.train_function is not None:
            renew()
            model.train_function = None
            plain_make()

    @functools.wraps(plain_config)
    def get_compile_config() -> dict | None:
        owner.before_saving()
        return plain_config()

    renew()
    make_train_function.owner, make_train_function.recompile = owner, recompile  # type: ignore[attr-defined]
    model.make_train_function = make_train_function
    model.get_compile_config = get_compile_config


def owner_of(model: keras.Layer) -> Any:
    """Returns the owner of the training step of this model, or `None`."""
    return getattr(vars(model).get("make_train_function"), "owner", None)


def has_own_step(model: keras.Model) -> bool:
    """Returns whether a model that has no owner yet trains by a `train_step` that is not Keras'."""
    return "train_step" in vars(model) or type(model).train_step is not keras.Model.train_step


def recompile_step(model: keras.Model) -> None:
    """Recompiles the training step of a model that has an owner, if it is compiled already."""
    model.make_train_function.recompile()


def models_of(optimizer: keras.optimizers.Optimizer) -> list[keras.Model]:
    """Returns the living models that are compiled with this optimizer.

    Keras keeps no list of models, so this looks through all objects of the process.
    """
    # `isinstance` may run code of a proxy, so that only the type is asked.
    models = [each for each in gc.get_objects() if issubclass(type(each), keras.Model)]
    return [model for model in models if any(each is optimizer for each in isaacs_in(getattr(model, "optimizer", None)))]


# Optimizers.


def isaacs_in(optimizer: Any) -> list[Any]:
    """Returns the `ISAAC` optimizers in `optimizer`: itself, or those in its attributes, in lists and dictionaries too."""
    if isinstance(optimizer, OptimizerWrapper):
        return [optimizer]
    return [each for each in _innermost(optimizer, set()) if isinstance(each, OptimizerWrapper)]


def has_several(optimizer: Any) -> bool:
    """Returns whether an optimizer divides the variables among several, as `keras.optimizers.MultiOptimizer` does."""
    return len(_innermost(optimizer, set())) > 1


def _innermost(value: Any, seen: set[int]) -> list[keras.optimizers.Optimizer]:
    """Returns the optimizers in a value that update variables: `ISAAC`, and those that contain no others."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, OptimizerWrapper):
        return [value]
    is_optimizer = isinstance(value, keras.optimizers.Optimizer)
    if is_optimizer or isinstance(value, dict):
        parts = (vars(value) if is_optimizer else value).values()
    else:
        parts = value if isinstance(value, (list, tuple)) else ()
    inner = [each for part in parts for each in _innermost(part, seen)]
    return inner or ([value] if is_optimizer else [])


# Layers.


def wrap_call(layer: keras.Layer, function: Callable) -> bool:
    """Replaces the layer's `call` by `function(layer, *args, **kwargs)`; returns `False` if another one replaces it already."""
    if "call" not in vars(layer):
        # Keras calls a quantized layer by the other name.
        layer.call = layer.quantized_call = types.MethodType(function, layer)
    return getattr(layer.call, "__func__", None) is function


def unwrap_call(layer: keras.Layer) -> None:
    """Undoes `wrap_call`."""
    del layer.call, layer.quantized_call


def quantization(layer: keras.Layer) -> str | None:
    """Returns how a layer is quantized, such as `"int8"`, or `None`."""
    return getattr(layer, "quantization_mode", None)


def own_call(layer: keras.Layer) -> Callable:
    """Returns the function that computes `layer` in Keras: its `call`, or `quantized_call` if it is quantized."""
    return type(layer).call if quantization(layer) is None else type(layer).quantized_call


def after_build(layer: keras.Layer, function: Callable[[], None]) -> None:
    """Calls `function()` once the layer is built: then it has its path and its layers, and was not called yet."""
    plain_build = layer.build

    @functools.wraps(plain_build)
    def build(*args: Any, **kwargs: Any) -> None:
        layer.build = plain_build
        try:
            plain_build(*args, **kwargs)
        except Exception:
            layer.build = build
            raise
        function()

    layer.build = build


def keep_scope(layer: keras.Layer) -> None:
    """Recomputes this layer in the scope of its forward pass, where a `keras.RematScope` asks for recomputation."""
    if "rematerialized_call" not in vars(layer):
        layer.rematerialized_call = types.MethodType(_rematerialized_call, layer)


def _rematerialized_call(layer: keras.Layer, layer_call: Callable, *args: Any, **kwargs: Any) -> Any:
    # The backward pass may run after the scope is closed, or in another thread. Keras also drops the masks of the inputs.
    masks = keras.tree.map_structure(lambda value: mask_of(value) if ops.is_tensor(value) else None, (args, kwargs))

    # JAX caches a trace by its function. The `call` of a captured layer is the same function in each step, so a new function is
    # needed here.
    @bind_scope
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = keras.tree.map_structure(with_mask, (args, kwargs), masks)
        return layer_call(*args, **kwargs)

    return type(layer).rematerialized_call(layer, call, *args, **kwargs)


@contextlib.contextmanager
def with_attributes(layer: keras.Layer, **others: Any) -> Iterator[None]:
    """Gives this instance other attributes inside the `with` block, without what Keras does when one is set."""
    own = vars(layer)
    before = {name: own[name] for name in others if name in own}
    own.update(others)
    try:
        yield
    finally:
        for name in others:
            del own[name]
        own.update(before)


def call_with(layer: keras.Layer, values: Iterable[tuple[keras.Variable, Any]], *args: Any, **kwargs: Any) -> Any:
    """Returns the layer's own `call`, with tensors in the place of some of its variables.

    Args:
        layer: the layer.
        values: pairs of a variable and a tensor; the variables may be others than `layer.variables`, too.
        *args: arguments of `call`.
        **kwargs: keyword arguments of `call`.
    """
    values = list(values)
    replaced = {id(variable): value for variable, value in values}
    variables = list({id(variable): variable for variable in (*layer.variables, *(pair[0] for pair in values))}.values())
    state = [(variable, replaced.get(id(variable), variable.value)) for variable in variables]
    with keras.StatelessScope(state, collect_losses=True) as stateless:
        before = [stateless.get_current_value(variable) for variable in variables]
        outputs = own_call(layer)(layer, *args, **kwargs)
    # The layer keeps what the call assigned and added.
    for variable, value in zip(variables, before, strict=True):
        after = stateless.get_current_value(variable)
        if after is not value:
            variable.assign(after)
    for loss in stateless.losses:
        layer.add_loss(loss)
    return outputs


# Masks.


# A JAX tracer takes no attributes. Keras keeps its mask elsewhere, and hands it to a layer that asks or takes it from one that
# has it. Such a layer must not be recomputed, or it would leak the mask.


def mask_of(inputs: Any) -> Any:
    """Returns the mask that Keras carries with a tensor, or `None`."""
    if not backend.IS_STATELESS:
        return getattr(inputs, "_keras_mask", None)
    masks = []

    def read(inputs: Any, mask: Any = None) -> Any:
        masks.append(mask)
        return inputs

    with keras.RematScope(mode=None):
        keras.layers.Lambda(read, mask=lambda inputs, mask: mask, autocast=False, name="mask_of")(inputs)
    return masks[0]


def with_mask(inputs: Any, mask: Any) -> Any:
    """Returns `inputs`, with which Keras carries `mask`; as they are if that is `None`."""
    if mask is None:
        return inputs
    if not backend.IS_STATELESS:
        inputs._keras_mask = mask
        return inputs
    with keras.RematScope(mode=None):
        return keras.layers.Lambda(lambda inputs: inputs, mask=lambda *_: mask, autocast=False, name="with_mask")(inputs)
