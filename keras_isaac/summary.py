"""`summary`: what is conditioned in a model, on which side, and what it costs, as a table."""

import contextlib
import dataclasses
import math
from typing import Any

import keras
import rich.box
import rich.console
import rich.markup
import rich.table

from keras_isaac import scope
from keras_isaac.captured_layer import captured_throughout
from keras_isaac.curvature import plan
from keras_isaac.layers.calls import is_sparse
from keras_isaac.optimizer import ISAAC, isaacs_in
from keras_isaac.status import KernelStatus, statuses_of


class _Printed(list):
    """What a notebook is not to print again."""

    def _ipython_display_(self):
        pass


def summary(
    model: keras.Model, batch_size: int | None = None, inputs: Any = None, show_frozen: bool = False
) -> list[KernelStatus]:
    """Prints which kernels of a model are conditioned, on which side and at what cost, in a table like `model.summary()`.

    The cost is counted in multiplications, and given as a share of the kernel's own training step (its forward and its two
    backward products) and of that of all kernels in the table together. A model that computes more than those, such as
    attention's scores, adds less.

    Args:
        model: `keras.Model`, built, captured or not. The `ISAAC` that it is compiled with says which rows stand for all;
            without one, `ISAAC()` does.
        batch_size: integer. Defaults to `None`: the model's own if it is fixed, else 32, as in `fit`.
        inputs: what the model is called on, an array or a nest of arrays. Needed where the model leaves more sizes open than
            the batch's, such as the length of a sequence. Defaults to `None`.
        show_frozen: boolean, whether the table has a row for each kernel that does not train. Defaults to `False`: they are
            counted in one line.

    Returns:
        List of `KernelStatus`, the table as data, with the frozen kernels.

    Raises:
        TypeError: if `model` is no `keras.Model`.
        ValueError: if the model is not built, or leaves sizes open.

    Example:
    >>> import keras
    >>> import keras_isaac
    >>> inputs = keras.Input((64,))
    >>> hidden = keras.layers.Dense(256, name="hidden")(inputs)
    >>> model = keras.Model(inputs, keras.layers.Dense(8, name="top")(hidden), name="small")
    >>> kernels = keras_isaac.summary(keras_isaac.capture_inputs(model, exclude="top"), batch_size=60)
    Kernels of 'small', batch size 60
     Kernel (layer)  Rows, in, out  Side                   Added  of model
     ──────────────────────────────────────────────────────────────────────
     hidden/kernel   60 x 64 x 256  sample               +22.9 %   +20.4 %
     (Dense)
     top/kernel       60 x 256 x 8  plain: not captured
     (Dense)
    1 of 2 trainable kernels are conditioned (16,384 of 18,432 parameters, 88.9 %).
    Multiplications added to a step: +20.4 %.
    >>> kernels[0].rows, kernels[0].side, kernels[1].reason
    (60, 'sample', 'not captured')
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`summary` takes a `keras.Model`. Received: model={model!r} (of type {type(model).__name__})")
    specs = _input_specs(model, batch_size, inputs)
    calls = _kernel_calls(model, specs)
    statuses = [_with_arithmetic(status, calls.get(kernel, [])) for kernel, status in statuses_of(model).items()]
    _print(model, statuses, keras.tree.flatten(specs)[0].shape[0], show_frozen)
    return _Printed(statuses)


def _kernel_calls(model, specs):
    """Returns the list of `KernelCall`s of each kernel, by its id, in a training step on inputs of these specs.

    Nothing is computed but shapes. The layers tell by themselves, as they do in training; those that would not be conditioned
    too, as if they were.
    """
    calls = {}

    def record(kernel, call):
        calls.setdefault(id(kernel), []).append(call)

    optimizer = getattr(model, "optimizer", None)
    asked = [isaac.conditioning_of_step(outer_optimizer=optimizer) for isaac in isaacs_in(optimizer)]
    others = dataclasses.replace((asked or [ISAAC().conditioning_of_step()])[0], trains=lambda kernel: True)

    def step(inputs):
        # PyTorch tries twice, the first time without memory behind its tensors.
        calls.clear()
        with contextlib.ExitStack() as stack:
            for conditioning in (others, *asked):
                stack.enter_context(scope.open_scope(dataclasses.replace(conditioning, record=record, on_use=lambda: None)))
            return model(inputs, training=True)

    with captured_throughout(model):
        run_on_shapes(step, specs)
    return calls


def run_on_shapes(function, specs):
    """Runs a function of tensors on a nest of `KerasTensor`s, as Keras does to know a layer's output: no variable changes."""

    class Function(keras.Layer):
        def call(self, inputs):
            return function(inputs)

    Function().compute_output_spec(specs)


def _input_specs(model, batch_size, inputs):
    """Returns what the model is called on as `KerasTensor`s, no size being open."""
    if not model.built:
        raise ValueError(
            f"`summary` reads a model that is built. Give '{model.name}' an `Input`, or call it on a batch first. "
            f"Received: model={model.name} (not built)"
        )
    if inputs is None:
        inputs = _own_inputs(model)
    open_sizes = []

    def spec(tensor):
        first, *rest = tensor.shape
        if None in rest:
            open_sizes.append(tuple(tensor.shape))
        shape = (batch_size or first or 32, *rest)
        return keras.KerasTensor(shape, keras.backend.standardize_dtype(tensor.dtype), sparse=is_sparse(tensor))

    specs = None if inputs is None else keras.tree.map_structure(spec, inputs)
    if specs is None or open_sizes:
        raise ValueError(
            f"The sizes of the inputs of '{model.name}' are not all known, and the rows depend on them. Write "
            "`summary(model, inputs=x)`, with a batch of inputs. "
            f"Received: inputs=None, of shapes {open_sizes if open_sizes else 'unknown'}"
        )
    return specs


def _own_inputs(model):
    with contextlib.suppress(AttributeError, ValueError):
        return model.input
    # A model with a `call` of its own knows the shapes that it was built with.
    shapes = (model.get_build_config() or {}).get("input_shape")
    if shapes is None:
        return None
    # JAX takes no dictionary of Keras' own.
    shapes = dict(shapes) if isinstance(shapes, dict) else shapes
    return keras.tree.map_shape_structure(lambda shape: keras.KerasTensor((None, *shape[1:]), model.compute_dtype), shapes)


def _with_arithmetic(status, calls):
    """Returns the status, with what is known of the kernel's calls."""
    if not calls:
        # Nothing of a step goes through it, or nothing is known of its layer.
        return status if status.reason else status._replace(reason="not called in training")
    plain, calls = [call for call in calls if call.reason], [call for call in calls if not call.reason]
    if not calls:
        return status._replace(calls=len(plain), reason=status.reason or plain[0].reason)
    if plain and not status.reason:
        status = status._replace(note=f"{len(plain)} of {len(plain) + len(calls)} calls plain: {plain[0].reason}")
    first = calls[0]
    products = [math.prod(call.shape) * call.num_represented for call in calls if call.frequency is None]
    status = status._replace(
        calls=len(calls),
        groups=math.prod(first.shape[:-2]),
        rows=first.num_represented,
        num_in=first.num_in,
        num_out=first.num_out,
        multiplications=sum(products) * (3 if status.trainable else 2),
    )
    if status.reason:
        return status._replace(added=0)
    added = sum(plan.added_multiplications(call) for call in calls)
    return status._replace(side=plan.choose(first), num_sampled=first.num_rows, added=added)


def _print(model, statuses, batch_size, show_frozen):
    total = sum(status.multiplications or 0 for status in statuses)
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
        title=f"Kernels of '{model.name}', batch size {batch_size}",
    )
    table.add_column("Kernel (layer)", no_wrap=True)
    table.add_column("Rows, in, out", justify="right", no_wrap=True)
    table.add_column("Side", min_width=15, max_width=19)
    table.add_column("Added", justify="right", no_wrap=True)
    table.add_column("of model", justify="right", no_wrap=True)
    hidden = [] if show_frozen else [status for status in statuses if status.reason == "frozen"]
    for status in statuses if show_frozen else [status for status in statuses if status.reason != "frozen"]:
        kernel = f"{status.path}\n({status.layer})"
        shares = _share(status.added, status.multiplications), _share(status.added, total)
        table.add_row(*map(rich.markup.escape, (kernel, _size(status), _side(status), *shares)))
    trainable = [status for status in statuses if status.trainable]
    conditioned = [status for status in trainable if status.reason is None]
    params, all_params = (sum(status.num_params for status in part) for part in (conditioned, trainable))
    optimizer = getattr(model, "optimizer", None)
    console = rich.console.Console(highlight=False)
    # A name is never broken, nor left out.
    widest = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=widest).minimum)
    with console.capture() as printed:
        console.print(table)
        if hidden:
            console.print(
                f"Not shown: {len(hidden)} frozen ({sum(status.num_params for status in hidden):,} parameters); "
                "summary(..., show_frozen=True) shows all."
            )
        if optimizer is not None and not isaacs_in(optimizer):
            console.print(f"The model is compiled with {type(optimizer).__name__}, which conditions nothing. Under ISAAC:")
        console.print(
            f"{len(conditioned)} of {len(trainable)} trainable kernels are conditioned "
            f"({params:,} of {all_params:,} parameters, {100 * params / max(all_params, 1):.1f} %). "
            f"Multiplications added to a step: {_share(sum(status.added or 0 for status in statuses), total) or 'none'}."
        )
    print("\n".join(line.rstrip() for line in printed.get().splitlines() if line.strip()))


def _size(status):
    if status.rows is None:
        return ""
    size = f"{status.rows:,} x {status.num_in:,} x {status.num_out:,}"
    size = size if status.groups == 1 else f"{size}\n{status.groups:,} groups"
    return size if status.calls == 1 else f"{size}\n{status.calls} calls"


def _side(status):
    if status.reason:
        return f"plain: {status.reason}"
    side = status.side
    if side != "diagonal" and status.num_sampled != status.rows:
        side = f"{side}\n{status.num_sampled:,} rows"
    return f"{side}\n{status.note}" if status.note else side


def _share(added, multiplications):
    return f"+{100 * added / multiplications:.1f} %" if added and multiplications else ""
