"""The benchmarks run, on small settings, and compute what they say."""

import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from harness import run_python, slow_but_on_torch
from test_examples import EXAMPLES, run

BENCHMARKS = EXAMPLES / "benchmarks"
on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="the comparison runs on JAX")


@pytest.mark.slow
@on_jax
def test_evidence_resumes_and_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_ISAAC_RESULTS", str(tmp_path / "results"))
    arguments = ("--tasks", "diabetes", "--methods", "AdamW;ISAAC + AdamW, tuned", "--settings", 3, "--seeds", 2)
    assert run("benchmarks/evidence.py", *arguments, "--max-seconds", 0.0, cwd=tmp_path) == "out of time\n"
    lines = run("benchmarks/evidence.py", *arguments, cwd=tmp_path).splitlines()
    # Of each method three settings, and a second seed of the best.
    assert [line.split(" 1 ")[0] for line in lines] == ["diabetes: AdamW"] * 4 + ["diabetes: ISAAC + AdamW, tuned"] * 4
    assert run("benchmarks/evidence.py", *arguments, cwd=tmp_path) == ""
    runs = [json.loads(line) for line in (tmp_path / "results" / "diabetes.jsonl").read_text().splitlines()]
    adamw = [each for each in runs if each["method"] == "AdamW"]
    best = min(adamw[:3], key=lambda each: each["validation"][-1])
    assert (adamw[3]["rate"], adamw[3]["second"], adamw[3]["seed"]) == (best["rate"], best["second"], 1)
    assert best["train"][-1] < best["train"][0]
    report = run("benchmarks/report.py", cwd=tmp_path)
    mean = re.search(r"\| diabetes \| \**([\d.]+) ± [\d.e-]+\** \|", report)
    assert mean, report
    assert math.isclose(float(mean.group(1)), (best["loss"] + adamw[3]["loss"]) / 2, rel_tol=1e-2)
    # The setting that was chosen is trained again, as it was.
    output = run("benchmarks/flatness.py", "--tasks", "diabetes", "--methods", "AdamW;Muon", "--seeds", 1, cwd=tmp_path)
    (cells,) = re.findall(r"\| diabetes \| AdamW \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", output)
    assert math.isclose(float(cells[0]), best["loss"], rel_tol=1e-2)


@on_jax
def test_swap_changes_nothing_but_the_wrapping(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_ISAAC_RESULTS", str(tmp_path / "results"))
    run_program(tmp_path, Path(__file__).parent / "swap_program.py")


FLATNESS = """
import jax.numpy as jnp
import numpy as np
from flatness import STEP, largest_eigenvalue, rise

def loss(vector):
    return 0.5 * jnp.sum(jnp.array([1.0, -3.0, 7.0, 0.0]) * vector**2)

np.testing.assert_allclose(largest_eigenvalue(loss, jnp.ones(4)), 7.0, rtol=1e-4)
weights = [jnp.full((10, 10), 2.0), jnp.full((3,), 5.0)]
risen = rise(lambda weights: sum(jnp.sum(weight**2) for weight in weights), weights, num_draws=2000)
np.testing.assert_allclose(risen, STEP**2 * (400 + 75), rtol=0.25)
"""


@on_jax
def test_flatness_is_that_of_a_quadratic_loss(tmp_path):
    run_program(tmp_path, "-c", FLATNESS)


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run_program(folder, *arguments):
    """Runs Python on JAX in a folder, with the benchmarks on its path."""
    path = os.pathsep.join([str(BENCHMARKS), *sys.path])
    run_python(*arguments, cwd=folder, PYTHONPATH=path, KERAS_BACKEND="jax")


def steps_of(optimizer, gradients):
    kernel = keras.Variable(np.linspace(-1, 1, gradients[0].size).reshape(gradients[0].shape).astype("float32"))
    optimizer.build([kernel])
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")], [kernel])
    return keras.ops.convert_to_numpy(kernel)


@on_jax
def test_muon_steps_as_keras_own_and_on_matrices_of_more_axes():
    gradients = np.random.default_rng(0).normal(size=(3, 6, 4))
    muon = importlib.import_module("baselines").Muon
    expected = steps_of(keras.optimizers.Muon(0.1), gradients)
    assert np.allclose(steps_of(muon(0.1), gradients), expected, atol=1e-5)
    assert np.allclose(steps_of(muon(0.1), gradients.reshape(3, 3, 2, 4)).reshape(6, 4), expected, atol=1e-5)


@on_jax
def test_soap_steps_as_the_paper_says():
    gradients = np.random.default_rng(0).normal(size=(8, 5, 5))
    kernel, momentum, second, factors, bases = np.linspace(-1, 1, 25).reshape(5, 5), 0.0, 0.0, [0.0, 0.0], None
    for step, gradient in enumerate(gradients):
        momentum = 0.95 * momentum + 0.05 * gradient
        if step:
            left, right = bases
            second = 0.95 * second + 0.05 * (left.T @ gradient @ right) ** 2
            update = (left.T @ momentum @ right / (1 - 0.95 ** (step + 1))) / np.sqrt(second / (1 - 0.95**step))
            kernel = kernel - 0.1 * left @ update @ right.T
        factors = [0.95 * factors[0] + 0.05 * gradient @ gradient.T, 0.95 * factors[1] + 0.05 * gradient.T @ gradient]
        if step == 0:
            bases = [np.linalg.eigh(factor)[1][:, ::-1] for factor in factors]
        elif step % 3 == 0:
            orders = [np.argsort(-np.diag(q.T @ factor @ q)) for q, factor in zip(bases, factors, strict=True)]
            second = second[orders[0]][:, orders[1]]
            bases = [np.linalg.qr(f @ q[:, order])[0] for f, q, order in zip(factors, bases, orders, strict=True)]
    soap = importlib.import_module("baselines").SOAP(0.1, weight_decay=0.0, basis_every=3)
    assert np.allclose(steps_of(soap, gradients), kernel, atol=1e-4)


KFAC = """
import keras, numpy as np
import evidence, methods, tasks

def build(seed):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)])

x = np.random.default_rng(0).normal(size=(120, 6)).astype("float32")
data = (x, (x[:, 0] > x[:, 1]).astype("int32"))
task = tasks.TASKS["classifier"]._replace(build=build, data=lambda: (data, data, data), batch_size=12, steps=40)
trainer = evidence.make_trainer(task, methods.METHODS["K-FAC"])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
expected = float(loss(data[1], build(0)(data[0])))
assert abs(trainer.evaluate(trainer.start(0), *trainer.parts[0])["loss"] - expected) < 1e-3
run = trainer.run((0.3, 0.1), 0)
assert run["loss"] < expected / 2, run
"""


@pytest.mark.skipif(importlib.util.find_spec("curvlinops") is None, reason="K-FAC is of curvlinops, which is not installed")
def test_kfac_starts_from_the_tasks_model_and_learns(tmp_path):
    run_program(tmp_path, "-c", KFAC)


PHYSICS = """
import jax, numpy as np
from keras import ops
from tasks import TASKS, physics

jax.config.update("jax_enable_x64", True)

def poisson(x):
    u = sum(s * ops.prod(ops.sin(np.pi * np.array(k) * x), -1, keepdims=True) for k, s in (((1, 1), 1.0), ((4, 2), 0.25)))
    return u / ops.prod(x * (1 - x), axis=-1, keepdims=True)

def burgers(x):
    return (physics.burgers_solution(x) + ops.sin(np.pi * x[:, 1:])) / (x[:, :1] * (1 - x[:, 1:] ** 2))

for name, call in (("poisson", poisson), ("burgers", burgers)):
    (x, y), _, test = TASKS[name].data()
    x, y = (part[(x[:, :1] > 0.05).all(1)][:200] for part in (x, y))
    assert TASKS[name].loss(call, x, y) < 1e-8, name
    assert TASKS[name].loss(lambda x: 1.01 * call(x), x, y) > 1e-4, name
    assert TASKS[name].held_out(call, *test) < 1e-12, name
    assert abs(TASKS[name].held_out(lambda x: 0 * x[:, :1], *test) - (1.0 if name == "poisson" else 0.5)) < 0.5, name
"""


@slow_but_on_torch
def test_the_equations_are_those_that_their_solutions_solve(tmp_path):
    run_program(tmp_path, "-c", PHYSICS)


LORENZ = """
import numpy as np
from tasks import TASKS, dynamics

def exact(x):
    state = np.asarray(x, "float64") * dynamics.SCALE + dynamics.MEAN
    return (dynamics._advance(state, 100) - state) / dynamics.SCALE / dynamics.CHANGE

(x, y), _, test = TASKS["lorenz"].data()
assert TASKS["lorenz"].loss(exact, x, y) < 1e-9
assert TASKS["lorenz"].held_out(exact, *test) < 1e-6
# An error of a hundredth in each step grows.
assert TASKS["lorenz"].held_out(lambda x: 1.01 * exact(x), *test) > 1e-4
# Without a forecast, the error is that of two states of the attractor.
assert 0.5 < TASKS["lorenz"].held_out(lambda x: 0 * x, *test) < 3
"""


@slow_but_on_torch
def test_the_forecast_repeats_the_step(tmp_path):
    run_program(tmp_path, "-c", LORENZ)


@slow_but_on_torch
def test_lbfgs_lowers_the_error_with_more_evaluations(tmp_path):
    outputs = [
        run("benchmarks/lbfgs.py", "--points", 256, "--evaluations", count, "--seeds", 1, cwd=tmp_path) for count in (1, 100)
    ]
    first, later = (dict(re.findall(r"(\w+), 256 points: test ([\d.e+-]+)", output)) for output in outputs)
    assert first.keys() == later.keys() == {"poisson", "burgers"}
    assert all(float(later[name]) < float(first[name]) / 2 for name in first), outputs


def test_trees_are_chosen_on_validation_data(monkeypatch):
    trees = importlib.import_module("trees")
    monkeypatch.setattr(trees, "NUM_TREES", 20)
    x = np.random.default_rng(0).normal(size=(300, 3))
    y = np.sign(x[:, :1] - np.median(x[:, 0]))
    # Where the signs are turned, the least that can be learnt is best.
    assert trees.best_of([(x, y), (x, -y), (x, y)])[:3] == (0.03, 15, 1)
    *_, validation, test = trees.best_of([(x, y), (x, y), (x, -y)])
    assert validation < 0.1
    assert test > 3


@slow_but_on_torch
def test_the_papers_experiments_are_kept_whole(tmp_path, monkeypatch):
    shutil.copytree(BENCHMARKS / "results", tmp_path / "results")
    monkeypatch.setenv("KERAS_ISAAC_RESULTS", str(tmp_path / "results"))
    output = run("benchmarks/paper.py", cwd=tmp_path)
    # Nothing is left to run.
    assert not re.search(r"^\w+: .*: ", output, re.MULTILINE), output
    for row in ("λ_g infinite", "first three", "ISAAC \\+ AdamW, norm", "ISAAC in the last layer"):
        assert re.search(rf"│ {row} +│( +([\d.e-]+|diverged) │)+", output), output
    assert (tmp_path / "paper.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def overhead():
    return importlib.import_module("overhead")


@pytest.mark.slow
def test_overhead_prints_and_saves_what_it_measured(tmp_path):
    arguments = ("--models", "mlp-100", "--repetitions", 2, "--steps", 2, "--json", "overhead.json")
    output = run("benchmarks/overhead.py", *arguments, cwd=tmp_path)
    record = json.loads((tmp_path / "overhead.json").read_text())
    assert record["backend"] == keras.backend.backend()
    results = {result["contender"]: result for result in record["results"]}
    with_package = keras.backend.backend() == "torch" and importlib.util.find_spec("isaac")
    assert list(results) == ["ISAAC", *(["package in fit", "package in loop"] if with_package else [])]
    for contender, result in results.items():
        assert result["model"] == "mlp-100"
        assert result["steps"] == 2
        for low, median, high in (result["plain_ms"], result["captured_ms"], result["ratio"]):
            assert 0 < low <= median <= high
        assert math.isclose(result["added_ms"], result["captured_ms"][1] - result["plain_ms"][1])
        for key in ("first_step_s", "memory_mb"):
            assert result[key] is None if "package" in contender else min(result[key]) > 0
        assert re.search(rf"mlp-100 +{contender} .* {result['added_ms']:.2f} +1\.420 ", output), output


def test_overhead_has_the_floors_of_the_arithmetic(overhead):
    """Worked out by hand from the forms of the conditioner."""
    floors = {
        f"{name}, {variant}": round(each.floor(variant), 2 if each.floor(variant) > 1.01 else 3)
        for name, each in overhead.MODELS.items()
        for variant in each.variants
    }
    assert floors == {
        "mlp-100, ISAAC": 1.42,
        "mlp-400, ISAAC": 1.11,
        "mlp-1600, ISAAC": 1.03,
        "mlp-6400, ISAAC": 1.007,
        "autoencoder, ISAAC": 1.06,
        "transformer, ISAAC": 1.07,
        "transformer, all rows": 1.84,
        "cnn, ISAAC": 1.05,
        "cnn, all rows": 3.58,
    }


@pytest.mark.parametrize("name", ["mlp-400", "autoencoder", "transformer", "cnn", "tokens 16"])
def test_overhead_counts_the_products_of_the_model(overhead, name):
    benchmark = (overhead.MODELS | overhead.GROWTH)[name]
    products = []
    for layer in benchmark.build().layers:
        rows = benchmark.batch * math.prod(layer.output.shape[1:-1])
        for kernel in (weight.shape for weight in layer.trainable_variables if weight.name == "kernel"):
            # Of the kernels of three axes, those of attention, as wide as it is long: [in, heads, out] or [heads, in, out].
            num_in = math.isqrt(math.prod(kernel)) if len(kernel) == 3 else math.prod(kernel[:-1])
            products.append((rows, num_in, math.prod(kernel) // num_in))
    assert sorted(products) == sorted(benchmark.products)


@pytest.mark.slow
def test_gpu_runs_at_a_tiny_size(tmp_path):
    arguments = ("--tiny", "--chunks", 3, "--steps", 4, "--optimizers", "AdamW;ISAAC + Muon", "--json", "gpu.json")
    output = run("benchmarks/gpu.py", *arguments, cwd=tmp_path)
    results = json.loads((tmp_path / "gpu.json").read_text())
    names = [(model, optimizer) for model in ("gpt", "mlp") for optimizer in ("AdamW", "ISAAC + Muon")]
    assert [(result["model"], result["optimizer"]) for result in results] == names
    for result in results:
        assert result["backend"] == keras.backend.backend()
        assert len(result["losses"]) == len(result["seconds"]) == 3
        assert min(result["losses"]) > 0
        assert result["peak_mb"] > 0
        assert re.search(rf"\| {result['model']} \| {re.escape(result['optimizer'])} \| [\d.]+ \| [\d.]+ \|", output), output
