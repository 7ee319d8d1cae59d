"""A fuzzer: compares training steps of captured layers and networks with plain ones, over random shapes, options and bad data.

`python tests/fuzz.py --cases 2000 --seed 0` runs that many cases on Keras' backend and lists each that broke an invariant, with
the command that repeats it alone (`--only`). The invariants of one training step:

- the captured layer raises no error that the plain one does not;
- its outputs and all gradients but the kernels' are the plain layer's;
- the conditioned gradient of a kernel is finite where the plain one is, and not where the data are not;
- it is no longer than the plain gradient, or as long where it preserves the norm, and never points against it;
- without an output damping and as it comes, it has no less of the plain gradient's direction than the largest curvature
  leaves, and is the float64 oracle's to the accuracy that the condition number and the dtype allow;
- weights keep their shapes and dtypes, and are finite after the step where the plain network's are.
"""

import argparse
import dataclasses
import sys
import warnings

import cases
import keras
import ml_dtypes
import numpy as np
from harness import BACKEND, paper_isaac, run, to_numpy
from keras import layers
from readings import dense

from keras_isaac import capture_inputs

TABLE = {case.id: case for case in cases.PRODUCTS if case.id != "dense-blocked-inverse"}
# (Significant bits, smallest normal number) of what a layer computes in.
PRECISION = {
    "float16": (2.0**-10, 2.0**-14),
    "bfloat16": (2.0**-7, 2.0**-126),
    "float32": (2.0**-23, 2.0**-126),
    # Keras' products of float64 are float32 on PyTorch.
    "float64": (2.0**-23, 2.0**-126) if BACKEND == "torch" else (2.0**-52, 2.0**-1022),
}
DATA = ["fine"] * 10 + [
    "NaN",
    "infinity",
    "denormal",
    "zeros",
    "constant",
    "duplicates",
    "nearly duplicates",
    "1e30",
    "1e-30",
    "columns of many scales",
    "integers",
    "empty",
    "large gradient",
    "small gradient",
]
INNER = {
    "sgd": {},
    "momentum": {"class_name": "sgd", "momentum": 0.9, "nesterov": True},
    "clipped": {"class_name": "sgd", "global_clipnorm": 0.1},
    **{name: {} for name in ("adam", "adamw", "rmsprop", "lion", "adagrad", "nadam", "adafactor")},
}


@dataclasses.dataclass
class Draw:
    """One case: a kind of network, `dense` of random shape, or a row of the table in `cases.py`; and what is done to it."""

    subject: str
    batch: int
    policy: str
    data: str
    damping: float
    max_rows: int | None
    weight_sharing: str
    compiled: bool
    output_damping: float | None = None
    relative_damping: bool = False
    preserve_norm: bool = False
    inner: str = "sgd"
    widths: tuple = ()
    seed: tuple = ()

    @property
    def options(self):
        """Arguments of `ISAAC`."""
        names = ("damping", "output_damping", "relative_damping", "preserve_norm", "max_rows", "weight_sharing")
        return {name: getattr(self, name) for name in names}

    @property
    def precision(self):
        """What the layer computes in."""
        return PRECISION[self.policy.removeprefix("mixed_")]


def draw(seed, index):
    """Draws case `index` of a run."""
    random = np.random.default_rng((seed, index))

    def choice(*options):
        return options[random.integers(len(options))]

    policies = ["float32"] * 4 + ["float64", "mixed_bfloat16", "mixed_float16"]
    subjects = [("dense network", "sequence network", "image network"), *[("dense",)] * 2, *[tuple(TABLE)] * 5]
    drawn = Draw(
        subject=choice(*choice(*subjects)),
        batch=choice(1, 2, 3, 5, 8, 17),
        # JAX has no float64 by default.
        policy=choice(*(policy for policy in policies if (policy, BACKEND) != ("float64", "jax"))),
        data=choice(*DATA),
        damping=float(np.float32(10.0 ** random.uniform(-8, 8))),
        max_rows=choice(1024, 1, 3, 8, 1024, 1024),
        weight_sharing=choice("expand", "expand", "reduce"),
        # Eager JAX compiles each operation for each new shape, which takes longer.
        compiled=bool(random.random() < (0.9 if BACKEND == "jax" else 0.2)),
        output_damping=float(np.float32(10.0 ** random.uniform(-8, 8))) if random.random() < 0.2 else None,
        inner=choice(*INNER),
        widths=tuple(choice(1, 3, 4, 7, 16) for _ in range(random.integers(1, 5))),
        relative_damping=bool(random.random() < 0.3),
        preserve_norm=bool(random.random() < 0.3),
        seed=(seed, index),
    )
    # An error elsewhere.
    has_outputs = drawn.subject.startswith(("dense-", "einsum-")) and "lora" not in drawn.subject
    if not has_outputs or drawn.weight_sharing == "reduce":
        drawn = dataclasses.replace(drawn, output_damping=None)
    return drawn


def spoiled(inputs, kind, random):
    """Makes the inputs what the case is about."""
    inputs = inputs.copy()
    if np.issubdtype(inputs.dtype, np.integer):
        if kind in ("constant", "duplicates", "zeros"):
            inputs[...] = 0 if kind == "zeros" else inputs.flat[0]
        if kind in ("NaN", "infinity"):
            # The last token, and one that the table does not have.
            inputs.flat[random.integers(inputs.size)] = -1 if kind == "NaN" else 100
        return inputs.astype("float32") if kind == "integers" else inputs
    if kind in ("NaN", "infinity"):
        inputs.flat[random.integers(inputs.size)] = np.nan if kind == "NaN" else random.choice([-np.inf, np.inf])
    if kind in ("zeros", "denormal", "1e30", "1e-30"):
        inputs *= {"zeros": 0.0, "denormal": 1e-40, "1e30": 1e30, "1e-30": 1e-30}[kind]
    if kind == "constant":
        inputs[...] = inputs.flat[0]
    if kind in ("duplicates", "nearly duplicates"):
        inputs[...] = inputs[:1] * (1 if kind == "duplicates" else 1 + 1e-6 * random.normal(size=inputs.shape))
    if kind == "columns of many scales":
        inputs *= 10.0 ** random.uniform(-3, 3, size=inputs.shape[-1])
    return np.round(inputs * 3).astype("int32") if kind == "integers" else inputs.astype("float32")


class Holder(keras.Layer):
    """Calls its layer as a model does, with the dtype policy in force, which `stateless_call` on JAX passes over."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def build(self, input_shape):
        """The layer is built."""

    def call(self, inputs):
        """The layer's own."""
        return self.layer(inputs)


def attempt(function):
    """Returns the result and no error, or no result and the error."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def broken_invariants(drawn):
    """Runs the case, and returns a description of each invariant that it broke."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(drawn.policy)
    with np.errstate(all="ignore"):
        return list((_network if drawn.subject.endswith("network") else _layer)(drawn))


def _layer(drawn):
    random = np.random.default_rng((*drawn.seed, 1))
    if drawn.subject == "dense":
        shape = (1, *drawn.widths[1:3], drawn.widths[0])
        case = cases.Case("dense", lambda: layers.Dense(drawn.widths[-1]), shape, dense)
    else:
        case = TABLE[drawn.subject]
    batch = 0 if drawn.data == "empty" else drawn.batch
    case = case._replace(input_shape=(max(batch, 1), *case.input_shape[1:]))
    layer, inputs, cotangent = cases.data(case, (*drawn.seed, 2))
    inputs, cotangent = spoiled(inputs, drawn.data, random)[:batch], cotangent[:batch]
    cotangent = cotangent * np.float32({"large gradient": 1e30, "small gradient": 1e-30}.get(drawn.data, 1))
    optimizer = paper_isaac(**drawn.options)

    holder = Holder(layer)
    plain, error = attempt(lambda: run(holder, inputs, cotangent, compiled=drawn.compiled))
    if error is not None:
        return
    capture_inputs(layer)
    captured, error = attempt(lambda: run(holder, inputs, cotangent, optimizer, drawn.compiled))
    if error is not None:
        yield f"raises {type(error).__name__}: {error}"
        return

    epsilon, smallest = drawn.precision
    pairs = [("outputs", captured.outputs, plain.outputs), ("input gradient", captured.input_gradient, plain.input_gradient)]
    kernels = case.read(layer, np.zeros(case.input_shape, "int32")).keys()
    for variable, ours, theirs in zip(layer.trainable_variables, captured.gradients, plain.gradients, strict=True):
        name = variable.name
        if id(variable) not in kernels:
            pairs.append((f"gradient of {name}", ours, theirs))
            continue
        if ours.shape != theirs.shape:
            yield f"gradient of {name} has shape {ours.shape}, not {theirs.shape}"
            continue
        if not len(inputs):
            # TensorFlow's gradient of a depthwise kernel is what was in memory, and differs from call to call.
            if not theirs.any() and BACKEND != "tensorflow":
                pairs.append((f"gradient of {name}", ours, theirs))
            continue
        if not np.isfinite(theirs).all():
            if drawn.data in ("NaN", "infinity") and np.isfinite(ours).all():
                yield f"gradient of {name} is finite, where the plain one is not"
            continue
        if not np.isfinite(ours).all():
            yield f"gradient of {name} is not finite, where the plain one is"
            continue
        if case.vocabulary is None:
            dtype = {"bfloat16": ml_dtypes.bfloat16}.get(layer.compute_dtype, layer.compute_dtype)
            seen = inputs.astype(dtype).astype("float64")
        elif drawn.data == "infinity":
            # What tokens beyond the table mean is the backend's affair.
            continue
        else:
            seen = inputs.astype("int32")
            # Negative ones count from its end.
            seen = np.where(seen < 0, seen + case.vocabulary, seen)
        if name == "lora_kernel_b" and drawn.weight_sharing == "reduce" and drawn.subject.startswith("einsum"):
            # A sample has a row for each of the first factor's outputs; only its positions are reduced.
            continue
        rows, matrix_of = case.read(layer, seen)[id(variable)]
        # LoRA's factors are float32 in a float64 layer.
        precision = max(drawn.precision, PRECISION[variable.dtype])
        length, norm = (np.linalg.norm(gradient.astype("float64")) for gradient in (ours, theirs))
        # In float32, beyond these lengths the squares overflow or vanish.
        if drawn.preserve_norm and length > 1e-15 and norm < 1e15 and abs(length - norm) > max(1e-3, 64 * epsilon) * norm:
            yield f"gradient of {name} is not as long as the plain one: {length / norm}"
        # The input of LoRA's second factor is what is looked up in the first.
        is_table = case.vocabulary is not None and name != "lora_embeddings_b"
        broken = _broken_by_kernel(drawn, case, is_table, rows, matrix_of, precision, ours, theirs)
        yield from (f"gradient of {name} {what}" for what in broken)
    for name, ours, theirs in pairs:
        if theirs is None:
            continue
        scale = np.max(np.abs(theirs), initial=smallest, where=np.isfinite(theirs))
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=0, atol=32 * epsilon * scale, equal_nan=True):
            yield f"{name}: {ours.ravel()[:4]} is not the plain layer's {theirs.ravel()[:4]}"


def _broken_by_kernel(drawn, case, is_table, rows, matrix_of, precision, ours, theirs):
    """Describes what a conditioned gradient breaks, one group of the kernel after another."""
    epsilon, smallest = precision
    places = matrix_of(np.arange(theirs.size).reshape(theirs.shape))
    is_product = case.read is dense or case.id in ("einsum-attention-output", "einsum-groups")
    # Tokens have no axis of features.
    unshared = is_table or len(case.input_shape) == (2 if case.vocabulary is None else 1)
    is_reduced = drawn.weight_sharing == "reduce" and not unshared
    if is_reduced:
        rows = rows.reshape(len(rows), drawn.batch, -1, rows.shape[-1]).mean(axis=2)
    has_all_rows = unshared or drawn.max_rows is None or rows.shape[1] <= drawn.max_rows
    for number, (group, place) in enumerate(zip(rows, places, strict=True)):
        where = f"(group {number}) " if len(rows) > 1 else ""
        plain, conditioned = theirs.ravel()[place], ours.ravel()[place]
        norm, length = np.linalg.norm(plain), np.linalg.norm(conditioned)
        if norm < 1e3 * smallest * np.sqrt(plain.size):
            # Nothing but zeros and denormals, which a processor may flush.
            if length > 1e4 * smallest * plain.size:
                yield f"{where}is {length}, where the plain one is {norm}"
            continue
        if not np.isfinite(group).all():
            continue
        tolerance = 64 * epsilon
        if not drawn.preserve_norm and length > norm * (1 + tolerance):
            yield f"{where}is longer than the plain one: {length / norm}"
        # Padding alone is no rows, and leaves the gradient as it is, as a row of zeros does.
        group = group if len(group) else np.zeros((1, group.shape[1]))
        _, singular, right = np.linalg.svd(group / np.sqrt(max(len(group), 1)), full_matrices=False)
        eigenvalues = singular**2
        damping = drawn.damping * (eigenvalues.sum() / min(group.shape) if drawn.relative_damping else 1)
        resolved = max(damping, min(epsilon, PRECISION["float32"][0]) * eigenvalues.mean())
        # What underflows has no direction, and what a small damping leaves of nearly nothing is rounding.
        noise = max(tolerance * length, 10 * np.sqrt(epsilon) * norm)
        if length > 1e3 * smallest and np.sum(conditioned * plain) < -noise * norm:
            yield f"{where}points against the plain one: cosine {np.sum(conditioned * plain) / norm / length}"
        # Where XXᵀ overflows, the inverse is taken to vanish; where it underflows too, there is no mean
        # eigenvalue.
        overflows = drawn.policy != "float64" and len(group) * eigenvalues.sum() > 1e36
        overflows = overflows or (drawn.relative_damping and not 1e-30 < eigenvalues.sum() < 1e36)
        if not has_all_rows or overflows or drawn.output_damping is not None or drawn.preserve_norm:
            continue
        least = damping / (damping + eigenvalues.sum())
        if least > 1e3 * epsilon and np.sum(conditioned * plain) < 0.9 * least * norm**2:
            yield f"{where}has too little of the plain one: {np.sum(conditioned * plain) / norm**2}, at least {least}"
        inside = right @ plain
        expected = right.T @ ((damping / (damping + eigenvalues))[:, None] * inside)
        # The scale of a ternary kernel depends on it too.
        spanned = not is_reduced and case.id != "ternary-dense"
        if not spanned or is_table:
            # Tokens of padding have a gradient, and are no rows.
            expected += plain - right.T @ inside
        kappa = (eigenvalues.max() + resolved) / (eigenvalues.min() + resolved)
        exact = spanned and (is_table or is_product or len(group) >= group.shape[1])
        scale = np.linalg.norm(expected) if exact else norm
        bound = 100 * epsilon * (1 if is_table else kappa)
        error = np.linalg.norm(conditioned - expected)
        if bound < 0.5 and error > bound * scale + 1e3 * smallest * np.sqrt(plain.size):
            yield f"{where}is not the oracle's: error {error / scale:.1e}, bound {bound:.1e}, condition {kappa:.1e}"


def _network(drawn):
    random = np.random.default_rng((*drawn.seed, 1))
    batch = 0 if drawn.data == "empty" else drawn.batch
    kind = drawn.subject.split()[0]
    shape = {"dense": (5,), "sequence": (4,), "image": (5, 4, 2)}[kind]
    inputs = random.integers(0, 6, (drawn.batch, *shape)).astype("int32")
    if kind != "sequence":
        inputs = random.normal(size=(drawn.batch, *shape)).astype("float32")
    inputs = spoiled(inputs, drawn.data, random)[:batch]
    targets = random.normal(size=(batch, 2)).astype("float32")
    targets = targets * np.float32({"large gradient": 1e30, "small gradient": 1e-30}.get(drawn.data, 1))
    # Two optimizers of which the one is the other inside ISAAC; with so large a damping their steps are the same.
    is_infinite = random.random() < 0.3
    options = (
        {**drawn.options, "damping": 1e30, "output_damping": None, "relative_damping": False} if is_infinite else drawn.options
    )

    def trained(captured):
        keras.utils.set_random_seed(0)
        model = _build(kind, drawn, inputs.shape[1:], inputs.dtype.name)
        config = {"learning_rate": 0.01, "class_name": drawn.inner, **INNER[drawn.inner]}
        inner = keras.optimizers.get({"class_name": config.pop("class_name"), "config": config})
        if captured:
            capture_inputs(model)
            inner = paper_isaac(inner_optimizer=inner, **options)
        eager = {} if drawn.compiled else {"run_eagerly": True}
        model.compile(optimizer=inner, loss="mse", jit_compile=False if BACKEND != "jax" or eager else "auto", **eager)
        before = [(weight.path, tuple(weight.shape), weight.dtype) for weight in model.weights]
        # A step of 1e28 leaves weights in which what comes next is chance.
        for _ in range(1 if drawn.data == "large gradient" else 2):
            model.train_on_batch(inputs, targets)
        return before, model

    plain, error = attempt(lambda: trained(captured=False))
    if error is not None:
        return
    captured, error = attempt(lambda: trained(captured=True))
    if error is not None:
        yield f"raises {type(error).__name__}: {error}"
        return
    # TensorFlow's norm of a sparse gradient takes the gradients of a token apart. One that preserves the norm is dense.
    is_other_norm = (BACKEND, kind, drawn.inner, drawn.preserve_norm) == ("tensorflow", "sequence", "clipped", True)
    before, model = captured
    if [(weight.path, tuple(weight.shape), weight.dtype) for weight in model.weights] != before:
        yield "weights changed their shapes or dtypes"
    for ours, theirs in zip(model.trainable_variables, plain[1].trainable_variables, strict=True):
        path, ours, theirs = ours.path, to_numpy(ours), to_numpy(theirs)
        if np.isfinite(theirs).all() and not np.isfinite(ours).all():
            yield f"{path} is not finite, where the plain network's is"
        if drawn.data in ("NaN", "infinity") and np.isfinite(ours).all() and not np.isfinite(theirs).all():
            yield f"{path} is finite, where the plain network's is not"
        comparable = drawn.policy in ("float32", "float64") and drawn.inner in ("sgd", "momentum", "clipped")
        comparable = comparable and np.isfinite(theirs).all() and not is_other_norm
        if is_infinite and comparable and not np.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
            yield f"{path} is not the plain network's at an infinite damping: {ours.ravel()[:4]}, not {theirs.ravel()[:4]}"


def _build(kind, drawn, shape, dtype):
    x = inputs = keras.Input(shape, dtype=dtype)
    if kind == "sequence":
        x = layers.Embedding(6, 4, mask_zero=drawn.batch % 2 == 1)(x)
    for number, width in enumerate(drawn.widths):
        if kind == "dense":
            x = layers.Dense(width, activation="tanh")(x)
        elif kind == "sequence":
            x = layers.MultiHeadAttention(2, width)(x, x) if number % 2 else layers.Conv1D(width, 2, padding="same")(x)
        else:
            x = layers.Conv2D(width, 2, padding="same", activation="relu")(x)
    if kind != "dense":
        x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(2, dtype=None if drawn.policy == "float64" else "float32")(x))


def main():
    """Runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--only", type=int, help="the number of the one case to run")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    numbers = range(arguments.first, arguments.cases) if arguments.only is None else [arguments.only]
    progress, findings = keras.utils.Progbar(len(numbers), unit_name="case"), 0
    for count, number in enumerate(numbers, 1):
        if count % 50 == 0:
            keras.utils.clear_session()
        drawn = draw(arguments.seed, number)
        broken = broken_invariants(drawn)
        if broken:
            findings += 1
            print(f"\n--seed {arguments.seed} --only {number}: {drawn}", *broken, sep="\n    ", flush=True)
        progress.update(count)
    print(f"\n{findings} of {len(numbers)} cases broke an invariant on {BACKEND}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
