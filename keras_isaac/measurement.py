"""What a `CurvatureMonitor` measures: four numbers of every conditioned kernel, on one batch and without a training step."""

import contextlib
import dataclasses
import functools

import keras
from keras import ops

from keras_isaac import scope
from keras_isaac.capture import prepare
from keras_isaac.inverse import trace
from keras_isaac.operations import carried
from keras_isaac.optimizer import isaacs_in
from keras_isaac.summary import run_on_shapes

_TINY = 1e-37


def measurement(model, data):
    """Returns a function that measures, and returns the four numbers of every conditioned kernel by its path."""
    optimizers = isaacs_in(model.optimizer)
    if not optimizers:
        raise ValueError(
            "`CurvatureMonitor` shows what `ISAAC` does: compile the model with `keras_isaac.ISAAC`. "
            f"Received: optimizer={model.optimizer}"
        )
    data = keras.tree.map_structure(ops.convert_to_tensor, data)
    prepare(model, data)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)

    found = []

    def forward(data, twins=()):
        """Returns the loss, and the rank and the eigenvalue of each meeting, in the order of the twins."""
        found.clear()
        spectra, twins = [], iter(twins)

        def observe(conditioning, kernel, condition, matrix, output_rows=None, **known):
            if output_rows is not None:
                return matrix
            found.append((kernel, tuple(matrix.shape), keras.backend.standardize_dtype(matrix.dtype)))
            spectra.append(_spectrum(conditioning, **known))
            # The gradients of the twins are those of the kernel, as it comes from the layer and as it is conditioned.
            matrix = condition(carried(matrix, next(twins, ops.zeros_like(matrix)), lambda gradient: gradient))
            return carried(matrix, next(twins, ops.zeros_like(matrix)), lambda gradient: gradient)

        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with contextlib.ExitStack() as stack:
            for optimizer in optimizers:
                conditioning = optimizer.conditioning_of_step(outer_optimizer=model.optimizer)
                observed = functools.partial(observe, conditioning)
                stack.enter_context(scope.open_scope(dataclasses.replace(conditioning, on_use=lambda: None, observe=observed)))
            outputs = model(x, training=True)
            loss = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=True)
        return model.optimizer.scale_loss(loss), spectra

    # Once without values, to know what the kernels meet.
    run_on_shapes(lambda data: forward(data)[0], keras.tree.map_structure(_spec, data))
    if not found:
        raise ValueError(
            f"No kernel of '{model.name}' is conditioned, so that there is nothing to monitor. Write "
            "`model = keras_isaac.capture_inputs(model)`; `keras_isaac.summary(model)` says why a kernel is plain."
        )
    meetings = list(found)
    calls = {}
    for place, (kernel, *_) in enumerate(meetings):
        calls.setdefault(kernel.path, []).append(place)

    variables = list({id(variable): variable for variable in (*model.variables, *model.optimizer.variables)}.values())

    def measure(data, values):
        # What a forward pass assigns is forgotten.
        with keras.StatelessScope(list(zip(variables, values, strict=True)), collect_losses=True):
            twins = [ops.zeros(shape, dtype) for _, shape, dtype in meetings for _ in range(2)]
            spectra, gradients = _gradients(functools.partial(forward, data), twins)
            gradients = [ops.cast(gradient, "float32") for gradient in gradients]
            return ops.stack([_numbers(places, spectra, gradients[::2], gradients[1::2]) for places in calls.values()])

    run = _compiled(measure, variables)
    return lambda: dict(zip(calls, ops.convert_to_numpy(run(data)), strict=True))


def _spec(tensor):
    return keras.KerasTensor(tensor.shape, keras.backend.standardize_dtype(tensor.dtype))


def _spectrum(conditioning, rows, num_rows=None, frequency=None, damping=None, is_product=False):
    """Returns the effective rank of M = XᵀX/r, and its largest eigenvalue over the damping in force, as float32."""
    if frequency is not None:
        # One-hot rows: M is diagonal.
        return _ratio(ops.square(ops.sum(frequency)), ops.sum(ops.square(frequency))), _ratio(ops.max(frequency), damping)
    rows = ops.cast(rows, "float32")
    num_rows = ops.maximum(ops.cast(rows.shape[-2] if num_rows is None else num_rows, "float32"), 1.0)
    transposed = ops.swapaxes(rows, -2, -1)
    # The smaller of the two that have these eigenvalues.
    gram = (rows @ transposed if rows.shape[-2] < rows.shape[-1] else transposed @ rows) / num_rows
    sum_of_all, squares = trace(gram)[..., 0, 0], ops.sum(gram * gram, axis=(-2, -1))
    damping = ops.cast(conditioning.damping, "float32")
    if conditioning.relative_damping:
        damping = damping * sum_of_all / ops.minimum(num_rows, float(rows.shape[-1]))
    return ops.mean(_ratio(sum_of_all * sum_of_all, squares)), ops.max(_ratio(_largest_eigenvalue(gram), damping))


def _largest_eigenvalue(gram):
    """Returns the largest eigenvalue of `[..., k, k]`: the mean of all, weighted by their 32nd powers, in few operations."""
    power = gram / _length(gram)
    power = power @ power
    power = power @ power
    # No less than 1/k² is left of the largest so far, and no less than 1/k⁴ in the end.
    power = power / _length(power)
    for _ in range(3):
        power = power @ power
    return ops.sum(power * gram, axis=(-2, -1)) / ops.maximum(trace(power)[..., 0, 0], _TINY)


def _length(matrix):
    return ops.maximum(ops.sqrt(ops.sum(matrix * matrix, axis=(-2, -1), keepdims=True)), _TINY)


def _ratio(numerator, denominator):
    return ops.cast(numerator / ops.maximum(denominator, _TINY), "float32")


def _numbers(places, spectra, conditioned, plain):
    """Returns the four numbers of a kernel, given the places of its calls, as a tensor."""
    rank = sum(spectra[place][0] for place in places) / len(places)
    eigenvalue = functools.reduce(ops.maximum, (spectra[place][1] for place in places))
    conditioned, plain = (ops.reshape(sum(each[place] for place in places), (-1,)) for each in (conditioned, plain))
    lengths = [ops.sqrt(ops.sum(each * each)) for each in (conditioned, plain)]
    cosine = _ratio(ops.sum(conditioned * plain), lengths[0] * lengths[1])
    return ops.stack([rank, eigenvalue, _ratio(*lengths), cosine])


# Each backend has `_gradients(function, tensors)`, which returns what `function` returns beside a loss, and the gradients of
# that loss; and `_compiled(measure, variables)`, which returns `measure` as a function of the data, the present values given.

if keras.backend.backend() == "jax":
    import jax

    def _gradients(function, tensors):
        gradients, beside = jax.grad(function, has_aux=True)(tensors)
        return beside, gradients

    def _compiled(measure, variables):
        compiled = jax.jit(measure)
        return lambda data: compiled(data, [variable.value for variable in variables])

elif keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def _gradients(function, tensors):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tensors)
            loss, beside = function(tensors)
        gradients = tape.gradient(loss, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # A table has sparse ones.
        return beside, [tf.convert_to_tensor(gradient) for gradient in gradients]

    def _compiled(measure, variables):
        return tf.function(lambda data: measure(data, [variable.value for variable in variables]), autograph=False)

else:
    import torch

    def _gradients(function, tensors):
        loss, beside = function([tensor.requires_grad_() for tensor in tensors])
        return beside, torch.autograd.grad(loss, tensors, materialize_grads=True)

    def _compiled(measure, variables):
        def run(data):
            # Dropout without a seed draws from PyTorch's own.
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices=devices), torch.enable_grad():
                return measure(data, [variable.value for variable in variables]).detach()

        return run
