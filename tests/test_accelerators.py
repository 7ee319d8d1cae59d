"""The counts of `examples/benchmarks/accelerators.py` on short programs with known counts; no compiler is needed."""

import importlib
import json
import re
import sys
from pathlib import Path

import keras
import pytest
from harness import BACKEND
from test_examples import run

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def hlo():
    return importlib.import_module("hlo")


@pytest.fixture
def accelerators():
    return importlib.import_module("accelerators")


# As of a TPU: types with tiles and memory spaces, copies in two halves, cycles, and no trips with the loops.
PROGRAM = """
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

FileNames
1 "step.py"

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %e = f32[8,4]{1,0} exponential(%p)
}

%inner_body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = (s32[], f32[8,4]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%s), index=1
  %fusion.3 = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100","size":"7"}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %fusion.3)
}

%inner_condition (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%outer_body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %while.1 = (s32[], f32[8,4]{1,0}) while(%s), condition=%inner_condition, body=%inner_body, metadata={op_name="jit(step)"}
}

%outer_condition (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %limits = s32[2]{0} constant({5, 6})
  ROOT %any = pred[] custom-call(%s, %limits), custom_call_target="AnyLeft"
}

%short (a: f32[8,4]) -> f32[8,4] {
  ROOT %a = f32[8,4]{1,0} parameter(0)
}

%long (b: f32[8,4]) -> f32[8,4] {
  %b = f32[8,4]{1,0} parameter(0)
  %fusion.4 = f32[8,4]{1,0} fusion(%b), kind=kLoop, calls=%fused
  ROOT %fusion.5 = f32[8,4]{1,0} fusion(%fusion.4), kind=kLoop, calls=%fused
}

ENTRY %main.9 (x.1: f32[8,4], flag: s32[]) -> f32[8,4] {
  %x.1 = f32[8,4]{1,0:T(8,128)} parameter(0), metadata={op_name="x (of the batch)"}
  %flag = s32[] parameter(1)
  %copy-start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x.1)
  %copy-done = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %zero = s32[] constant(0)
  %state = (s32[], f32[8,4]{1,0}) tuple(%zero, %copy-done)
  %while.2 = (s32[], f32[8,4]{1,0}) while(%state), OTHERS
  %y = f32[8,4]{1,0} get-tuple-element(%while.2), index=1
  %factor = (bf16[8,4]{1,0}, /*index=1*/pred[8]{0}) custom-call(%y), custom_call_target="Cholesky"
  %joined = f32[8,4]{1,0} custom-call(%y, %y), custom_call_target="ConcatBitcast"
  ROOT %conditional = f32[8,4]{1,0} conditional(%flag, %y, %joined), branch_computations={%short, %long}
}
"""
KNOWN = 'condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}'
UNKNOWN = "condition=%outer_condition, body=%outer_body"


def test_counts_loops_branches_calls_and_cycles(hlo):
    counts = hlo.count(PROGRAM.replace("OTHERS", KNOWN))
    # The loop in the loop runs five times, and the longer branch is the one counted.
    assert counts.operations == {"copy-start": 1, "fusion": 5 * 3 + 2, "Cholesky": 1}
    assert counts.loops == {5: 1, 3: 5}
    assert counts.calls == {"Cholesky": 1}
    assert counts.cycles == 5 * 3 * 100
    array, scalar = 8 * 4 * 4, 4
    copied, factored = 2 * array + scalar, array + 8 * 4 * 2 + 8
    assert counts.bytes == copied + 17 * 2 * array + factored


def test_counts_a_loop_of_unknown_trips_as_one(hlo):
    counts = hlo.count(PROGRAM.replace("OTHERS", UNKNOWN))
    assert counts.loops == {None: 1, 3: 1}
    assert counts.cycles == 3 * 100


def test_takes_only_the_text_of_a_module(hlo):
    with pytest.raises(ValueError, match=r"has an `ENTRY` computation. Received: 'digraph"):
        hlo.count("digraph {}")


@pytest.mark.skipif(BACKEND != "jax", reason="JAX compiles")
def test_counts_what_jax_compiles(hlo):
    import jax
    import jax.numpy as jnp

    def looped(x):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ x), x)

    counts = hlo.count(jax.jit(looped).lower(jnp.ones((40, 40))).compile().as_text())
    assert counts.loops == {7: 1}
    assert counts.operations.total() >= 2 * 7
    # Of every trip, at least the product's two operands and its result.
    assert counts.bytes >= 7 * 3 * 40 * 40 * 4


@pytest.mark.skipif(BACKEND != "jax", reason="JAX compiles")
def test_counts_the_plain_and_the_captured_step_in_the_same_way(accelerators, capsys):
    """Here for the CPU, where the captured step eliminates in loops."""
    import jax

    benchmark = accelerators.overhead.dense((6, 8, 3), 4)
    results = []
    for step in ("plain", "captured"):
        counts = accelerators.count_compiled(benchmark, step == "captured", "sgd", jax.devices("cpu")[0])
        results.append({"model": "small", "step": step, **counts})
    plain, captured = results
    assert plain["loops"] == []
    assert sum(each["runs"] for each in captured["loops"]) >= 2
    assert plain["operations"] < captured["operations"]
    num_parameters = 6 * 8 + 8 + 8 * 3 + 3
    for result in results:
        assert result["operations"] == sum(result["by_name"].values())
        assert result["memory"] > num_parameters * 4
    json.dumps(results)
    accelerators.print_table(results, "cuda", "Counts")
    ratio = captured["operations"] / plain["operations"]
    table = capsys.readouterr().out
    assert f"{captured['operations']} ({ratio:.2f})" in table
    # A CPU's program has no estimates.
    assert "launches" in table
    assert "cycles" not in table


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")
def test_torch_prints_and_saves_the_path_of_cuda_tensors(tmp_path):
    arguments = ("--platform", "torch", "--models", "mlp-100", "--inner", "sgd", "--json", "torch.json")
    output = run("benchmarks/accelerators.py", *arguments, cwd=tmp_path)
    plain, captured = json.loads((tmp_path / "torch.json").read_text())["results"]
    assert plain["operations"] < captured["operations"]
    # On the CPU's path, five inverses would read numbers. Keras reads one itself.
    assert plain["reads"] == captured["reads"] == sum(captured["read_by"].values())
    assert not [place for place in captured["read_by"] if place.startswith("keras_isaac")]
    assert captured["by_name"]["linalg_cholesky_ex"] == 5
    for each in (plain, captured):
        assert each["operations"] == sum(each["by_name"].values())
        assert each["copies"] == sum(each["copied_by"].values())
        assert re.search(rf"mlp-100 +{each['step']} +{each['operations']} .*{each['reads']} +{each['copies']} ", output), output


TORCH = {
    "a product": (lambda torch, x: x @ x, {"mm": 1}, 0, 0),
    "views": (lambda torch, x: x[1:].T.reshape(4, 3, 1), {}, 0, 0),
    "arithmetic with a number": (lambda torch, x: x * 2, {"mul": 1}, 0, 0),
    "a number": (lambda torch, x: torch.as_tensor(2.0), {}, 0, 1),
    "an index from the host": (lambda torch, x: x[[0, 1]], {"index": 1}, 0, 1),
    "a value read": (lambda torch, x: x[0, 0].item(), {}, 1, 0),
    "a condition": (lambda torch, x: bool(x[0, 0] > 0), {"gt": 1}, 1, 0),
    "an array read": (lambda torch, x: x.numpy(), {}, 1, 0),
    "a mask": (lambda torch, x: x[x > 0], {"gt": 1, "index": 1}, 1, 0),
    "a Cholesky factor": (lambda torch, x: torch.linalg.cholesky_ex(x @ x.T), {"mm": 1, "linalg_cholesky_ex": 1}, 0, 0),
    "a backward pass": (lambda torch, x: (x @ x.clone().requires_grad_()).backward(x), {"clone": 1, "mm": 2}, 0, 0),
}


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")
@pytest.mark.parametrize("case", TORCH)
def test_torch_tells_operations_from_reads_and_copies(accelerators, case):
    import torch

    function, operations, reads, copies = TORCH[case]
    x = torch.randn(4, 4)
    calls = accelerators.torch_calls(lambda: function(torch, x))
    assert calls["operations"] == operations
    assert calls["reads"].total() == reads
    assert calls["copies"].total() == copies


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")
def test_torch_names_the_place_that_reads(accelerators):
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    calls = accelerators.torch_calls(layer.count_params)
    assert calls["reads"] == {}
    calls = accelerators.torch_calls(layer.get_weights)
    assert {place.split(":")[0] for place in calls["reads"]} == {"keras/layer.py"}
    assert calls["reads"].total() == 2


@pytest.mark.parametrize(("platform", "package"), [("tpu", "jax[tpu]"), ("cuda", "jax[cuda13]"), ("torch", "torch")])
def test_says_what_to_install(accelerators, monkeypatch, platform, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["accelerators.py", "--platform", platform])
    with pytest.raises(SystemExit, match=re.escape(f'which is not installed: pip install "{package}"')):
        accelerators.main()


def test_says_which_models_it_takes(accelerators, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accelerators.py", "--platform", "tpu", "--models", "mlp-400,resnet"])
    with pytest.raises(SystemExit):
        accelerators.parse_arguments()
    assert re.search(r"--models must be of mlp-100, .*mlp-4096-1024. Received: resnet", capsys.readouterr().err)


def test_builds_a_model_of_every_kind(accelerators):
    """Tokens, classes and reconstruction; what the optimizer holds is there before the first step."""
    for name in ("mlp-100", "autoencoder", "transformer"):
        model, (x, _) = accelerators.build(accelerators.MODELS[name], True, "adamw")
        assert len(x) == accelerators.MODELS[name].batch
        assert model.optimizer.built
        assert keras.ops.convert_to_numpy(model.optimizer.iterations) == 0
