"""What a `CurvatureMonitor` measures on one batch, for every conditioned kernel, without changing the model."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_isaac import backend, scope
from keras_isaac.backend import damped_inverse_root, damped_projection, matmul, transpose
from keras_isaac.curvature import plan
from keras_isaac.curvature.conditioner import gram_of, in_full_precision
from keras_isaac.curvature.rows import KernelCall
from keras_isaac.keras_hooks import isaacs_in
from keras_isaac.selection import choice_of

_TINY = 1e-37


def build_measure(model: keras.Model, data: tuple) -> Callable[[], dict[str, np.ndarray]]:
    """Returns a function that measures, and returns the five numbers of every conditioned kernel by the kernel's path."""
    isaacs, optimizer = isaacs_in(model.optimizer), model.optimizer
    if not isaacs:
        raise ValueError(
            "Compile the model with `keras_isaac.ISAAC`: `CurvatureMonitor` measures what it does. "
            f"Received: optimizer={optimizer}"
        )
    data = keras.tree.map_structure(ops.convert_to_tensor, data)
    if not model.built and type(model).call is not keras.Model.call:
        # A model without a `call` has a custom `train_step` and consists of models that are built.
        model(keras.utils.unpack_x_y_sample_weight(data)[0])
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    kernels = model.trainable_variables
    variables = list({id(variable): variable for variable in (*model.variables, *optimizer.variables)}.values())
    paths: list[str] = []

    def measure(data: tuple, values: Sequence[Any]) -> Any:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

        def loss_of(is_open: bool, tensors: Sequence[Any]) -> tuple[Any, dict[int, list]]:
            """Returns the loss, with or without conditioning, and the spectra of each kernel's calls, by its id."""
            spectra: dict[int, list] = {}

            def record(conditioning: scope.Conditioning, call: KernelCall) -> None:
                if call.reason is None:
                    spectra.setdefault(id(conditioning.kernel), []).append(spectrum(conditioning, call))

            state = [*zip(variables, values, strict=True), *zip(kernels, tensors, strict=True)]
            # Assignments of the forward pass are dropped, so that both passes have the same dropout masks.
            with keras.StatelessScope(state, collect_losses=True):
                conditionings = []
                for isaac in isaacs if is_open else ():
                    conditioning = isaac.conditioning_of_step(outer_optimizer=optimizer, chooses=choice_of(model))
                    conditionings.append(dataclasses.replace(conditioning, on_use=lambda: None, record=record))
                with scope.open_scope(*conditionings):
                    outputs = model(x, training=True)
                    loss = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=True)
                    return optimizer.scale_loss(loss), spectra

        known = dict(zip(map(id, variables), values, strict=True))
        tensors = [known[id(kernel)] for kernel in kernels]
        spectra, conditioned = backend.gradients_of(functools.partial(loss_of, True), tensors)
        _, plain = backend.gradients_of(functools.partial(loss_of, False), tensors)
        gradients = [each for each in zip(kernels, conditioned, plain, strict=True) if id(each[0]) in spectra]
        if not gradients:
            raise ValueError(
                f"Write `model = keras_isaac.capture_inputs(model)`: no kernel of '{model.name}' is conditioned. "
                "`keras_isaac.summary(model)` says why a kernel is plain."
            )
        paths[:] = [kernel.path for kernel, *_ in gradients]
        return ops.stack([_numbers(spectra[id(kernel)], *pair) for kernel, *pair in gradients])

    compiled = backend.compiled(measure)

    def measured() -> dict[str, np.ndarray]:
        numbers = ops.convert_to_numpy(compiled(data, [variable.value for variable in variables]))
        return dict(zip(paths, numbers, strict=True))

    return measured


def spectrum(conditioning: scope.Conditioning, call: KernelCall) -> tuple[Any, Any, Any]:
    """Returns M's effective rank, its largest eigenvalue divided by the damping, and the number of failed inverses."""
    if call.rows is None:
        # One-hot rows: M is diagonal.
        frequency = call.frequency
        rank = _ratio(ops.square(ops.sum(frequency)), ops.sum(ops.square(frequency)))
        return rank, _ratio(ops.max(frequency), call.damping), ops.zeros((), "float32")
    (rows,) = in_full_precision(ops.stop_gradient(call.rows.values))
    form, damping = plan.choose(call), ops.cast(conditioning.damping, rows.dtype)
    counts = call.rows.num_sampled, call.rows.num_valid
    damped, total, damping = gram_of(form, rows, damping, conditioning.relative_damping, *counts)
    # A sum over rows, not a mean, as in the conditioner.
    rows = transpose(rows) if form == plan.FEATURE else rows
    gram = matmul(rows, transpose(rows))
    _, fallbacks = (damped_inverse_root if form == plan.WOODBURY else damped_projection)(damped, total, damping, rows)
    rank = _ratio(total * total, ops.sum(gram * gram, axis=(-2, -1), keepdims=True))
    return ops.mean(rank), ops.max(_ratio(_largest_eigenvalue(gram), damping)), ops.sum(ops.cast(fallbacks, "float32"))


def _largest_eigenvalue(gram: Any) -> Any:
    """Returns the largest eigenvalue of `[..., k, k]`, as the mean of all eigenvalues weighted by their 512th powers."""
    power = gram / _length(gram)
    for _ in range(3):
        # No underflow: the largest eigenvalue is at least 1/√k of the norm, so its eighth power is at least 1/k⁴.
        for _ in range(3):
            power = matmul(power, power)
        power = power / _length(power)
    return ops.sum(power * gram, axis=(-2, -1), keepdims=True) / ops.maximum(
        ops.trace(power, axis1=-2, axis2=-1)[..., None, None], _TINY
    )


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
