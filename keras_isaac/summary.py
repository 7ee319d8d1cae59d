"""`summary`: a table of a model's kernels, with the form in which each is conditioned and what that costs."""

import contextlib
import dataclasses
import math
import numbers
from typing import Any

import keras
import rich.box
import rich.console
import rich.table

from keras_isaac import scope
from keras_isaac.curvature import plan
from keras_isaac.curvature.rows import KernelCall
from keras_isaac.keras_hooks import isaacs_in
from keras_isaac.layers.products import is_sparse
from keras_isaac.optimizer import ISAAC
from keras_isaac.status import KernelStatus, statuses_of
from keras_isaac.training import captured_throughout

# From this share on, the cost is worth advice.
_COSTLY = 0.1


class _Printed(list):
    """A list that a notebook does not print after the table."""

    def _ipython_display_(self) -> None:
        pass


def summary(
    model: keras.Model, batch_size: int | None = None, inputs: Any = None, show_frozen: bool = False
) -> list[KernelStatus]:
    """Prints which kernels of a model are conditioned, in which form and at what cost, in a table like `model.summary()`.

    The cost is counted in multiplications. It is given as a share of those of the whole model: the forward and the two
    backward products of every kernel in the table. A model that computes more than these products, such as attention scores,
    slows down by less.

    Args:
        model: `keras.Model`, built, captured or not. The table shows the options of the `ISAAC` that it is compiled with, or
            those of `ISAAC()`.
        batch_size: integer. Defaults to `None`: the model's own if it is fixed, else 32, as in `fit`.
        inputs: the inputs that the model is called on, an array or a nest of arrays. Required if other sizes than the batch's
            are unknown, such as the length of a sequence. Defaults to `None`.
        show_frozen: boolean, whether the table has a row for each frozen kernel. Defaults to `False`: one line counts them.

    Returns:
        List of `KernelStatus`, the table as data, including frozen kernels.

    Raises:
        TypeError: if `model` is not a `keras.Model`, `batch_size` not an integer, or `inputs` not arrays.
        ValueError: if the model is not built, if `batch_size` is below 1, or if sizes are unknown.

    Example:
    >>> import keras
    >>> import keras_isaac
    >>> inputs = keras.Input((64,))
    >>> hidden = keras.layers.Dense(256, name="hidden")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(8, name="top")(hidden), name="small")
    >>> kernels = keras_isaac.summary(keras_isaac.capture_inputs(model, exclude="top"), batch_size=60)
    Kernels of 'small', batch size 60
    Kernel (layer)   Rows, in, out   Form                   Added
    ─────────────────────────────────────────────────────────────
    hidden/kernel    60 x 64 x 256   sample                +20.4%
    (Dense)
    top/kernel        60 x 256 x 8   plain: not captured
    (Dense)
    1 of 2 trainable kernels are conditioned (16,384 of 18,432 parameters, 88.9%).
    Multiplications added to a step: +20.4%.
    >>> kernels[0].rows, kernels[0].form, kernels[1].reason
    (60, 'sample', 'not captured')
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`summary` takes a `keras.Model`. Received: model={model!r} (of type {type(model).__name__})")
    specs = _input_specs(model, batch_size, inputs)
    calls = _kernel_calls(model, specs)
    statuses = [_with_arithmetic(status, calls.get(kernel, [])) for kernel, status in statuses_of(model).items()]
    _print(model, statuses, keras.tree.flatten(specs)[0].shape[0], show_frozen)
    return _Printed(statuses)


def _input_specs(model: keras.Model, batch_size: Any, inputs: Any) -> Any:
    """Returns the model's inputs as `KerasTensor`s of known shapes."""
    if batch_size is not None and (not isinstance(batch_size, numbers.Integral) or isinstance(batch_size, bool)):
        raise TypeError(
            "`batch_size` must be an integer. To pass a batch of data, write `summary(model, inputs=x)`. "
            f"Received: batch_size={repr(batch_size).splitlines()[0]:.50} (of type {type(batch_size).__name__})"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be above 0. Received: batch_size={batch_size}")
    if not model.built:
        raise ValueError(
            f"`summary` needs a model that is built. Give '{model.name}' an `Input`, or call it on a batch first. "
            f"Received: model={model.name} (not built)"
        )
    inputs = _own_inputs(model) if inputs is None else inputs
    unknown = []

    def spec(tensor: Any) -> keras.KerasTensor:
        if not hasattr(tensor, "shape"):
            raise TypeError(
                "`inputs` must be an array or a nest of arrays: write `summary(model, inputs=x)` with a batch of inputs. "
                f"Received: inputs that contain {tensor!r:.50} (of type {type(tensor).__name__})"
            )
        if None in tensor.shape[1:]:
            unknown.append(tuple(tensor.shape))
        shape = (batch_size or tensor.shape[0] or 32, *tensor.shape[1:])
        return keras.KerasTensor(shape, keras.backend.standardize_dtype(tensor.dtype), sparse=is_sparse(tensor))

    specs = None if inputs is None else keras.tree.map_structure(spec, inputs)
    if specs is None or unknown:
        raise ValueError(
            f"Write `summary(model, inputs=x)` with a batch of inputs: the sizes of the inputs of '{model.name}' are not all "
            f"known. Received: inputs=None, of shapes {unknown or 'unknown'}"
        )
    return specs


def _own_inputs(model: keras.Model) -> Any:
    with contextlib.suppress(AttributeError, ValueError):
        return model.input
    # A subclassed model has the shapes that it was built with.
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        return None
    # JAX does not take Keras' own kind of dictionary.
    shapes = dict(shapes) if isinstance(shapes, dict) else shapes
    return keras.tree.map_shape_structure(lambda shape: keras.KerasTensor((None, *shape[1:]), model.compute_dtype), shapes)


def _kernel_calls(model: keras.Model, specs: Any) -> dict[int, list[KernelCall]]:
    """Returns the `KernelCall`s of a training step on inputs of these specs, by the kernel's id.

    It traces shapes and computes no values. Kernels that `ISAAC` would leave plain are traced as if it conditioned them, to
    know their rows.
    """
    calls: dict[int, list[KernelCall]] = {}
    errors = []

    def record(conditioning: scope.Conditioning, call: KernelCall) -> None:
        calls.setdefault(id(conditioning.kernel), []).append(call)

    optimizer = getattr(model, "optimizer", None)
    compiled = [isaac.conditioning_of_step(outer_optimizer=optimizer) for isaac in isaacs_in(optimizer)]
    others = dataclasses.replace((compiled or [ISAAC().conditioning_of_step()])[0], trains=lambda kernel: True)
    recording: dict[str, Any] = {"record": record, "on_use": lambda: None, "chooses": lambda layer: True}
    conditionings = [dataclasses.replace(conditioning, **recording) for conditioning in (*compiled, others)]

    class Step(keras.Layer):
        """Keras traces its call to infer the shape of its output. No variable changes."""

        def call(self, inputs: Any) -> Any:
            # Keras may trace twice on PyTorch.
            calls.clear()
            with scope.open_scope(*conditionings):
                try:
                    model(inputs, training=True)
                except Exception as error:
                    # Raised below, without Keras' advice on how to write `Step`.
                    errors.append(error)
            return inputs

    with captured_throughout(model):
        Step().compute_output_spec(specs)
    if errors:
        raise errors[-1]
    return calls


def _with_arithmetic(status: KernelStatus, calls: list[KernelCall]) -> KernelStatus:
    """Returns the status with the sizes and the cost of the kernel's calls."""
    if not calls:
        # The layer is not called in a step, or has no conditioned form.
        return status if status.reason else status._replace(reason="not called in training")
    plain, calls = [call for call in calls if call.reason], [call for call in calls if not call.reason]
    if not calls:
        return status._replace(calls=len(plain), reason=status.reason or plain[0].reason)
    if plain and not status.reason:
        status = status._replace(note=f"{len(plain)} of {len(plain) + len(calls)} calls plain: {plain[0].reason}")
    first = calls[0]
    products = [math.prod(call.shape) * call.num_total for call in calls if call.frequency is None]
    status = status._replace(
        calls=len(calls),
        groups=math.prod(first.shape[:-2]),
        rows=first.num_total,
        num_in=first.num_in,
        num_out=first.num_out,
        multiplications=sum(products) * (3 if status.trainable else 2),
    )
    if status.reason:
        return status._replace(added=0)
    added = sum(plan.added_multiplications(call) for call in calls)
    return status._replace(form=plan.choose(first), num_sampled=first.num_rows, added=added)


def _print(model: keras.Model, statuses: list[KernelStatus], batch_size: int, show_frozen: bool) -> None:
    total = sum(status.multiplications or 0 for status in statuses)
    trainable = [status for status in statuses if status.trainable]
    conditioned = [status for status in trainable if status.reason is None]
    shown, hidden = statuses, []
    if not show_frozen:
        shown, hidden = trainable, [status for status in statuses if not status.trainable]
    optimizer = getattr(model, "optimizer", None)
    lines = []
    if hidden:
        lines.append(
            f"Not shown: {len(hidden)} frozen ({_num_params(hidden):,} parameters); summary(..., show_frozen=True) shows all."
        )
    if optimizer is not None and not isaacs_in(optimizer):
        lines.append(f"The model is compiled with {type(optimizer).__name__}, which conditions nothing. Under ISAAC:")
    share = 100 * _num_params(conditioned) / max(_num_params(trainable), 1)
    lines.append(
        f"{len(conditioned)} of {len(trainable)} trainable kernels are conditioned "
        f"({_num_params(conditioned):,} of {_num_params(trainable):,} parameters, {share:.1f}%)."
    )
    is_reduced = any(status.num_sampled != status.rows for status in conditioned if status.form != plan.DIAGONAL)
    if is_reduced and all(isaac.max_rows is None for isaac in isaacs_in(optimizer)):
        lines.append(
            f"Sums of rows bound the cost: as many as add {100 * plan.BUDGET:.0f}% to a layer whose positions share its kernel "
            f"and {100 * plan.PLAIN_BUDGET:.0f}% to another. ISAAC(max_rows=...) sets another number."
        )
    lines.append(_cost(conditioned, total, batch_size))
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("Kernel (layer)", overflow="fold")
    table.add_column("Rows, in, out", justify="right", overflow="fold")
    table.add_column("Form", max_width=19, overflow="fold")
    table.add_column("Added", justify="right", overflow="fold")
    for each in shown:
        table.add_row(f"{each.path}\n({each.layer})", _size(each), _form(each), _share(each.added, total))
    console = rich.console.Console(markup=False, highlight=False, emoji=False, color_system=None, force_jupyter=False)
    with console.capture() as captured:
        console.print(f"Kernels of '{model.name}', batch size {batch_size}", table, *lines, sep="\n")
    print("\n".join(map(str.rstrip, captured.get().splitlines())))


def _num_params(statuses: list[KernelStatus]) -> int:
    return sum(status.num_params for status in statuses)


def _cost(conditioned: list[KernelStatus], total: int, batch_size: int) -> str:
    """Returns a sentence on the cost of all kernels and, if it is high, on the costliest one and how to lower it."""
    added = sum(status.added or 0 for status in conditioned)
    cost = f"Multiplications added to a step: {_share(added, total) or 'none'}."
    if not total or added < _COSTLY * total:
        return cost
    costliest = max(conditioned, key=lambda status: status.added or 0)
    remedies = []
    # Only positions of sequences and images are summed or sampled.
    if costliest.num_sampled and costliest.rows and costliest.rows > batch_size:
        remedies.append(f"ISAAC(max_rows={max(costliest.num_sampled // 2, 1)})")
    if len(conditioned) > 1:
        remedies.append("capture_inputs(model, exclude=...)")
    if not remedies:
        return cost
    return (
        f"{cost} Costliest: {costliest.path} ({_share(costliest.added, total)}). To lower this, write {' or '.join(remedies)}."
    )


def _size(status: KernelStatus) -> str:
    if status.rows is None:
        return ""
    size = f"{status.rows:,} x {status.num_in:,} x {status.num_out:,}"
    size = size if status.groups == 1 else f"{size}\n{status.groups:,} groups"
    return size if status.calls == 1 else f"{size}\n{status.calls} calls"


def _form(status: KernelStatus) -> str:
    if status.reason:
        return f"plain: {status.reason}"
    form = str(status.form)
    if form != plan.DIAGONAL and status.num_sampled != status.rows:
        form = f"{form}\n{status.num_sampled:,} rows"
    return f"{form}\n{status.note}" if status.note else form


def _share(added: int | None, total: int) -> str:
    if not added or not total:
        return ""
    return f"+{100 * added / total:.1f}%" if added >= 0.0005 * total else "<0.1%"
