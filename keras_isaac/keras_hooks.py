"""Every hold on Keras: training steps, calls, building, recomputation, masks, compiling and saving.

Each line states one assumption about Keras, and names the test of `tests/test_hooks.py` that fails if a new Keras breaks it.

- `fit` and `train_on_batch` run the `train_step` of the instance: `test_training_runs_the_train_step_of_the_instance`.
- In the NNX mode of JAX, they run its `compute_loss_and_updates`: `test_nnx_mode`, of `test_setups.py`.
- They call `make_train_function`, which keeps a step unless forced: `test_training_makes_its_step_once`.
- A step on JAX is given the optimizer's variables third: `test_a_jax_step_is_given_the_optimizer_variables_third`.
- A layer runs the `call` of the instance: `test_a_layer_runs_the_call_of_the_instance`.
- A quantized one, its `quantized_call`: `test_factors_beside_a_quantized_kernel`, of `test_lora.py`.
- It is built by the `build` of the instance, before its `call`: `test_a_layer_is_built_by_the_build_of_the_instance`.
- It is recomputed by the `rematerialized_call` of the instance: `test_recomputation_runs_the_rematerialized_call`.
- Masks travel as `_keras_mask` on TensorFlow and PyTorch: `test_masks_are_read_and_given`.
- Copies and files ask the instance for `get_compile_config`: `test_copies_ask_for_the_compile_config_of_the_instance`.
- The garbage collector knows every model: `test_every_living_model_is_found`.
"""

import functools
import gc
import types
from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_isaac import backend
from keras_isaac.scope import bind_scope

# A mode of JAX alone, which an older Keras does not have.
_IS_NNX = backend.IS_STATELESS and getattr(keras.config, "is_nnx_enabled", bool)()
# NNX passes over the `train_step` of an instance, but not over what that step calls for the loss.
_STEP = "compute_loss_and_updates" if _IS_NNX else "train_step"

# Training steps.


def wrap_step(model, owner):
    """Runs every training step of this model inside `owner.step`, from the next one on.

    Args:
        model: `keras.Model`.
        owner: object with `step(optimizer_values)`, a context manager, given the values that stand for the variables of
            `model.optimizer` in this step, or `None` where they stand for themselves; `before_compiling()`, called before a
            step is compiled; and `before_saving()`, called before the model's compile configuration is read.
    """
    plain_step, plain_make, plain_config = getattr(model, _STEP), model.make_train_function, model.get_compile_config
    replaced = {name: vars(model)[name] for name in (_STEP, "make_train_function", "get_compile_config") if name in vars(model)}

    def wrap():
        @functools.wraps(plain_step)
        def step(*args, **kwargs):
            if _IS_NNX and kwargs.get("optimizer_variables") is None:
                # It is a step of `evaluate`.
                return plain_step(*args, **kwargs)
            with owner.step(_optimizer_values(args, kwargs)):
                return plain_step(*args, **kwargs)

        setattr(model, _STEP, step)

    @functools.wraps(plain_make)
    def make_train_function(force=False):
        if force or model.train_function is None:
            # JAX remembers what it compiled by the function: with the same one, a change of the layers or of the loss would
            # not reach the compiled step.
            wrap()
            owner.before_compiling()
        return plain_make(force=force)

    @functools.wraps(plain_config)
    def get_compile_config():
        owner.before_saving()
        return plain_config()

    wrap()
    make_train_function.owner, make_train_function.replaced = owner, replaced
    model.make_train_function = make_train_function
    model.get_compile_config = get_compile_config


def unwrap_step(model):
    """Takes back `wrap_step`."""
    replaced = model.make_train_function.replaced
    for name in (_STEP, "make_train_function", "get_compile_config"):
        if name in replaced:
            setattr(model, name, replaced[name])
        else:
            delattr(model, name)


def owner_of(model):
    """Returns the `owner` that wraps the training step of this model, or `None`."""
    return getattr(vars(model).get("make_train_function"), "owner", None)


def renew_step(model):
    """Has a step that was compiled before compiled anew."""
    if model.train_function is not None:
        model.make_train_function(force=True)


def _optimizer_values(args, kwargs):
    """Returns the tensors that stand for `optimizer.variables` in a step that is given these arguments."""
    if not backend.IS_STATELESS:
        return None
    return kwargs["optimizer_variables"] if _IS_NNX else (args[0] if args else kwargs["state"])[2]


def living_models():
    """Returns every `keras.Model` of this process. Keras keeps no list, so this looks through all objects."""
    # A proxy's `isinstance` may run code: only the type is asked.
    return [each for each in gc.get_objects() if issubclass(type(each), keras.Model) and hasattr(each, "train_function")]


# Layers.


def wrap_call(layer, function):
    """Has `function(layer, *args, **kwargs)` run for the layer's `call`, unless somebody else's already does."""
    if "call" not in vars(layer):
        # Keras calls a quantized layer by the other name.
        layer.call = layer.quantized_call = types.MethodType(function, layer)


def runs(layer, function):
    """Whether `function` runs for the layer's `call`."""
    return getattr(vars(layer).get("call"), "__func__", None) is function


def unwrap_call(layer):
    """Takes back `wrap_call`."""
    del layer.call, layer.quantized_call


def quantization(layer):
    """Returns how a layer is quantized, such as `"int8"`, or `None`."""
    return getattr(layer, "quantization_mode", None)


def own_call(layer):
    """Returns the function that computes `layer` in Keras: its `call`, or `quantized_call` if it is quantized."""
    return type(layer).call if quantization(layer) is None else type(layer).quantized_call


def after_build(layer, function):
    """Calls `function()` once, as soon as this layer is built: it has its path and its layers then, and was not called yet."""
    plain_build = layer.build

    @functools.wraps(plain_build)
    def build(*args, **kwargs):
        layer.build = plain_build
        try:
            plain_build(*args, **kwargs)
        except Exception:
            layer.build = build
            raise
        function()

    layer.build = build


def keep_scope(layer):
    """Has this layer recomputed in the scope of its forward pass, if a `keras.RematScope` says that it is to be recomputed."""
    if "rematerialized_call" not in vars(layer):
        layer.rematerialized_call = types.MethodType(_rematerialized_call, layer)


def drop_scope(layer):
    """Takes back `keep_scope`."""
    if getattr(vars(layer).get("rematerialized_call"), "__func__", None) is _rematerialized_call:
        del layer.rematerialized_call


def _rematerialized_call(layer, layer_call, *args, **kwargs):
    # The backward pass may run after the scope is closed, or in a thread of its own, and Keras loses the masks on the way.
    masks = keras.tree.map_structure(lambda value: mask_of(value) if ops.is_tensor(value) else None, (args, kwargs))

    # JAX remembers a trace by its function: a captured layer's `call` is the same one every time, where Keras' is a new bound
    # method, and so needs a new one here.
    @bind_scope
    def call(*args, **kwargs):
        args, kwargs = keras.tree.map_structure(with_mask, (args, kwargs), masks)
        return layer_call(*args, **kwargs)

    return type(layer).rematerialized_call(layer, call, *args, **kwargs)


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
    # What the call did beside its result is the layer's to keep.
    for variable, value in zip(variables, before, strict=True):
        after = stateless.get_current_value(variable)
        if after is not value:
            variable.assign(after)
    for loss in stateless.losses:
        layer.add_loss(loss)
    return outputs


# Masks.


class _MaskReader(keras.layers.Layer):
    """Shows the mask that Keras carries with its input."""

    def __init__(self, show):
        super().__init__(autocast=False)
        self.show = show
        self.supports_masking = True

    def call(self, inputs, mask=None):
        self.show(mask)
        return inputs


class _MaskGiver(keras.layers.Layer):
    """Has Keras carry a mask with its output."""

    def __init__(self, mask):
        super().__init__(autocast=False)
        self.mask = mask
        self.supports_masking = True

    def call(self, inputs):
        return inputs

    def compute_mask(self, inputs, previous_mask):
        return self.mask


# A JAX tracer takes no attributes. Keras keeps its mask elsewhere, and hands it to a layer that asks or takes it from one that
# has it. Such a layer is not to be computed again, lest the mask stay in there.


def mask_of(inputs: Any) -> Any:
    """Returns the mask that Keras carries with a tensor, or `None`."""
    if backend.TENSORS_TAKE_ATTRIBUTES:
        return getattr(inputs, "_keras_mask", None)
    masks: list = []
    with keras.RematScope(mode=None):
        _MaskReader(masks.append)(inputs)
    return masks[0]


def with_mask(inputs, mask):
    """Returns `inputs`, with which Keras carries `mask`; as they are if that is `None`."""
    if mask is None:
        return inputs
    if backend.TENSORS_TAKE_ATTRIBUTES:
        inputs._keras_mask = mask
        return inputs
    with keras.RematScope(mode=None):
        return _MaskGiver(mask)(inputs)
