"""What a `CurvatureMonitor` measures on one batch, for every conditioned kernel, without changing the model."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_isaac import backend, scope
from keras_isaac.backend import matmul, trace
from keras_isaac.captured_layer import choice_of
from keras_isaac.curvature import plan
from keras_isaac.curvature.conditioner import in_full_precision, summed_damping
from keras_isaac.curvature.record import KernelCall
from keras_isaac.layers.products import is_sparse
from keras_isaac.optimizer_wrapper import isaacs_in
from keras_isaac.summary import run_on_shapes

_TINY = 1e-37


def build_measure(model: keras.Model, data: tuple) -> Callable[[], dict[str, np.ndarray]]:
    """Returns a function that measures, and returns the five numbers of every conditioned kernel by the kernel's path."""
    optimizers = isaacs_in(model.optimizer)
    if not optimizers:
        raise ValueError(
            "Compile the model with `keras_isaac.ISAAC`: `CurvatureMonitor` measures what it does. "
            f"Received: optimizer={model.optimizer}"
        )
    data = keras.tree.map_structure(ops.convert_to_tensor, data)
    _build_model(model, data)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)

    calls: list[keras.Variable] = []

    def forward(data: tuple, is_open: bool) -> tuple[Any, list]:
        """Returns the loss, with or without conditioning, and the spectrum of each call, in the order of `calls`."""
        calls.clear()
        spectra = []

        def record(conditioning: scope.Conditioning, kernel: keras.Variable, call: KernelCall) -> None:
            if call.reason is None:
                calls.append(kernel)
                spectra.append(spectrum(conditioning, call))

        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with contextlib.ExitStack() as stack:
            for optimizer in optimizers if is_open else ():
                conditioning = optimizer.conditioning_of_step(outer_optimizer=model.optimizer, chooses=choice_of(model))
                recording = functools.partial(record, conditioning)
                stack.enter_context(scope.open_scope(dataclasses.replace(conditioning, on_use=lambda: None, record=recording)))
            outputs = model(x, training=True)
            loss = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=True)
        return model.optimizer.scale_loss(loss), spectra

    # A trace of shapes, to learn the order of the calls.
    run_on_shapes(lambda data: forward(data, is_open=True)[0], keras.tree.map_structure(_spec, data))
    if not calls:
        raise ValueError(
            f"Write `model = keras_isaac.capture_inputs(model)`: no kernel of '{model.name}' is conditioned. "
            "`keras_isaac.summary(model)` says why a kernel is plain."
        )
    places: dict[int, list[int]] = {}
    for place, kernel in enumerate(calls):
        places.setdefault(id(kernel), []).append(place)
    kernels = list({id(kernel): kernel for kernel in calls}.values())
    variables = list({id(variable): variable for variable in (*model.variables, *model.optimizer.variables)}.values())

    def measure(data: tuple, values: Sequence[Any]) -> Any:
        def loss_of(is_open: bool, tensors: Sequence[Any]) -> tuple[Any, list]:
            # Assignments of the forward pass are dropped, so that both passes have the same dropout masks.
            state = [*zip(variables, values, strict=True), *zip(kernels, tensors, strict=True)]
            with keras.StatelessScope(state, collect_losses=True):
                return forward(data, is_open)

        known = dict(zip(map(id, variables), values, strict=True))
        tensors = [known[id(kernel)] for kernel in kernels]
        spectra, conditioned = backend.gradients_of(functools.partial(loss_of, True), tensors)
        _, plain = backend.gradients_of(functools.partial(loss_of, False), tensors)
        gradients = zip(kernels, conditioned, plain, strict=True)
        return ops.stack([_numbers([spectra[place] for place in places[id(kernel)]], *pair) for kernel, *pair in gradients])

    run = backend.compiled(measure, variables)
    paths = [kernel.path for kernel in kernels]
    return lambda: dict(zip(paths, ops.convert_to_numpy(run(data)), strict=True))


def _build_model(model: keras.Model, data: tuple) -> None:
    """Builds a model that Keras would build in its first training step."""
    if not model.built and type(model).call is not keras.Model.call:
        # A model without a `call` has a custom `train_step` and consists of models that are built.
        model(keras.utils.unpack_x_y_sample_weight(data)[0])


def _spec(tensor: Any) -> keras.KerasTensor:
    return keras.KerasTensor(tensor.shape, keras.backend.standardize_dtype(tensor.dtype), sparse=is_sparse(tensor))


def spectrum(conditioning: scope.Conditioning, call: KernelCall) -> tuple[Any, Any, Any]:
    """Returns M's effective rank, its largest eigenvalue divided by the damping, and the number of failed inverses."""
    if call.rows is None:
        # One-hot rows: M is diagonal.
        frequency = call.frequency
        rank = _ratio(ops.square(ops.sum(frequency)), ops.sum(ops.square(frequency)))
        return rank, _ratio(ops.max(frequency), call.damping), ops.zeros((), "float32")
    (rows,) = in_full_precision(ops.stop_gradient(call.rows.values))
    form, transposed = plan.choose(call), ops.swapaxes(rows, -2, -1)
    # A sum over rows, not a mean, as in the conditioner.
    gram = matmul(transposed, rows) if form == plan.FEATURE else matmul(rows, transposed)
    total, squares = trace(gram), ops.sum(gram * gram, axis=(-2, -1), keepdims=True)
    damping = ops.cast(conditioning.damping, rows.dtype)
    counts = call.rows.num_sampled, call.rows.num_valid
    damping = summed_damping(total, damping, rows, *counts, conditioning.relative_damping)
    fallbacks = backend.is_indefinite(gram, total, damping, is_root=form == plan.WOODBURY)
    rank, eigenvalue = _ratio(total * total, squares), _ratio(_largest_eigenvalue(gram), damping)
    return ops.mean(rank), ops.max(eigenvalue), ops.sum(ops.cast(fallbacks, "float32"))


def _largest_eigenvalue(gram: Any) -> Any:
    """Returns the largest eigenvalue of `[..., k, k]`, as the mean of all eigenvalues weighted by their 512th powers."""
    power = gram / _length(gram)
    for _ in range(3):
        # No underflow: the largest eigenvalue is at least 1/√k of the norm, so its eighth power is at least 1/k⁴.
        for _ in range(3):
            power = matmul(power, power)
        power = power / _length(power)
    return ops.sum(power * gram, axis=(-2, -1), keepdims=True) / ops.maximum(trace(power), _TINY)


def _length(matrix: Any) -> Any:
    return ops.maximum(ops.sqrt(ops.sum(matrix * matrix, axis=(-2, -1), keepdims=True)), _TINY)


def _ratio(numerator: Any, denominator: Any) -> Any:
    return ops.cast(numerator / ops.maximum(denominator, _TINY), "float32")


def _numbers(spectra: Sequence[tuple[Any, Any, Any]], conditioned: Any, plain: Any) -> Any:
    """Returns the five numbers of a kernel as a tensor, from the spectra of its calls and its two gradients."""
    ranks, eigenvalues, fallbacks = zip(*spectra, strict=True)
    rank, eigenvalue = sum(ranks) / len(ranks), functools.reduce(ops.maximum, eigenvalues)
    conditioned, plain = (ops.reshape(ops.cast(each, "float32"), (-1,)) for each in (conditioned, plain))
    norms = [ops.sqrt(ops.sum(each * each)) for each in (conditioned, plain)]
    cosine = _ratio(ops.sum(conditioned * plain), norms[0] * norms[1])
    return ops.stack([rank, eigenvalue, _ratio(*norms), cosine, sum(fallbacks)])
