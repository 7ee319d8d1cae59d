"""What a `CurvatureMonitor` measures: the numbers of every conditioned kernel, on one batch and without a training step."""

import contextlib
import dataclasses
import functools

import keras
from keras import ops

from keras_isaac import backend, scope
from keras_isaac.backend import matmul, trace
from keras_isaac.curvature import plan
from keras_isaac.curvature.conditioner import in_full_precision, summed_damping
from keras_isaac.layers.calls import is_sparse
from keras_isaac.optimizer import isaacs_in
from keras_isaac.summary import run_on_shapes

_TINY = 1e-37


def measurement(model, data):
    """Returns a function that measures, and returns the numbers of every conditioned kernel by its path."""
    optimizers = isaacs_in(model.optimizer)
    if not optimizers:
        raise ValueError(
            "`CurvatureMonitor` shows what `ISAAC` does: compile the model with `keras_isaac.ISAAC`. "
            f"Received: optimizer={model.optimizer}"
        )
    data = keras.tree.map_structure(ops.convert_to_tensor, data)
    _prepare(model, data)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)

    calls = []

    def forward(data, is_open):
        """Returns the loss, with or without conditioning, and what the calls' rows tell, in the order of `calls`."""
        calls.clear()
        told = []

        def record(conditioning, kernel, call):
            if call.reason is not None:
                return
            calls.append(kernel)
            told.append(spectrum(conditioning, call))

        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with contextlib.ExitStack() as stack:
            for optimizer in optimizers if is_open else ():
                conditioning = optimizer.conditioning_of_step(outer_optimizer=model.optimizer)
                recording = functools.partial(record, conditioning)
                stack.enter_context(scope.open_scope(dataclasses.replace(conditioning, on_use=lambda: None, record=recording)))
            outputs = model(x, training=True)
            loss = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=True)
        return model.optimizer.scale_loss(loss), told

    # Once without values, to know what the kernels meet.
    run_on_shapes(lambda data: forward(data, is_open=True)[0], keras.tree.map_structure(_spec, data))
    if not calls:
        raise ValueError(
            f"No kernel of '{model.name}' is conditioned, so that there is nothing to monitor. Write "
            "`model = keras_isaac.capture_inputs(model)`; `keras_isaac.summary(model)` says why a kernel is plain."
        )
    places = {}
    for place, kernel in enumerate(calls):
        places.setdefault(id(kernel), []).append(place)
    kernels = list({id(kernel): kernel for kernel in calls}.values())
    variables = list({id(variable): variable for variable in (*model.variables, *model.optimizer.variables)}.values())

    def measure(data, values):
        def loss_of(is_open, tensors):
            # What a forward pass assigns is forgotten, so that both see the same masks of dropout.
            state = [*zip(variables, values, strict=True), *zip(kernels, tensors, strict=True)]
            with keras.StatelessScope(state, collect_losses=True):
                return forward(data, is_open)

        known = dict(zip(map(id, variables), values, strict=True))
        tensors = [known[id(kernel)] for kernel in kernels]
        told, conditioned = backend.gradients_of(functools.partial(loss_of, True), tensors)
        _, plain = backend.gradients_of(functools.partial(loss_of, False), tensors)
        numbers = zip(kernels, conditioned, plain, strict=True)
        return ops.stack([_numbers([told[place] for place in places[id(kernel)]], *pair) for kernel, *pair in numbers])

    run = backend.compiled(measure, variables)
    paths = [kernel.path for kernel in kernels]
    return lambda: dict(zip(paths, ops.convert_to_numpy(run(data)), strict=True))


def _prepare(model, data):
    """Builds the model on `data`, where Keras leaves that to its first training step."""
    if not model.built and type(model).call is not keras.Model.call:
        # A model that has no `call` is one of built models, and of a `train_step` of its own.
        model(keras.utils.unpack_x_y_sample_weight(data)[0])


def _spec(tensor):
    return keras.KerasTensor(tensor.shape, keras.backend.standardize_dtype(tensor.dtype), sparse=is_sparse(tensor))


def spectrum(conditioning, call):
    """Returns M's effective rank, its largest eigenvalue over the damping in force, and how many inverses fail, as float32."""
    if call.frequency is not None:
        # One-hot rows: M is diagonal.
        frequency = call.frequency
        rank = _ratio(ops.square(ops.sum(frequency)), ops.sum(ops.square(frequency)))
        return rank, _ratio(ops.max(frequency), call.damping), ops.zeros((), "float32")
    (rows,) = in_full_precision(ops.stop_gradient(call.rows))
    form, transposed = plan.choose(call), ops.swapaxes(rows, -2, -1)
    # A sum over rows, as the conditioner has it.
    gram = matmul(transposed, rows) if form == plan.FEATURE else matmul(rows, transposed)
    total, squares = trace(gram), ops.sum(gram * gram, axis=(-2, -1), keepdims=True)
    damping = ops.cast(conditioning.damping, rows.dtype)
    counted = None if call.num_counted is None else backend.clip(ops.cast(call.num_counted, rows.dtype), 1)
    damping = summed_damping(total, damping, rows, counted, conditioning.relative_damping)
    fallbacks = backend.is_indefinite(gram, total, damping, is_root=form == plan.WOODBURY)
    rank, eigenvalue = _ratio(total * total, squares), _ratio(_largest_eigenvalue(gram), damping)
    return ops.mean(rank), ops.max(eigenvalue), ops.sum(ops.cast(fallbacks, "float32"))


def _largest_eigenvalue(gram):
    """Returns the largest eigenvalue of `[..., k, k]`: the mean of all, weighted by their 512th powers, in few operations."""
    power = gram / _length(gram)
    for _ in range(3):
        # The largest is no less than 1/√k of the length, and 1/k⁴ of it is left.
        for _ in range(3):
            power = matmul(power, power)
        power = power / _length(power)
    return ops.sum(power * gram, axis=(-2, -1), keepdims=True) / ops.maximum(trace(power), _TINY)


def _length(matrix):
    return ops.maximum(ops.sqrt(ops.sum(matrix * matrix, axis=(-2, -1), keepdims=True)), _TINY)


def _ratio(numerator, denominator):
    return ops.cast(numerator / ops.maximum(denominator, _TINY), "float32")


def _numbers(told, conditioned, plain):
    """Returns the numbers of a kernel, given what its calls told and its gradients, as a tensor."""
    ranks, eigenvalues, fallbacks = zip(*told, strict=True)
    rank, eigenvalue = sum(ranks) / len(ranks), functools.reduce(ops.maximum, eigenvalues)
    conditioned, plain = (ops.reshape(ops.cast(each, "float32"), (-1,)) for each in (conditioned, plain))
    lengths = [ops.sqrt(ops.sum(each * each)) for each in (conditioned, plain)]
    cosine = _ratio(ops.sum(conditioned * plain), lengths[0] * lengths[1])
    return ops.stack([rank, eigenvalue, _ratio(*lengths), cosine, sum(fallbacks)])
