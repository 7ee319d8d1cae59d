"""A short run of the fuzzer, on the same cases each time; `python tests/fuzz.py` runs others."""

import dataclasses

import fuzz
import pytest
from harness import paper_isaac


@pytest.mark.often("[05]", "*[05]")
@pytest.mark.parametrize("number", range(40))
@pytest.mark.filterwarnings("ignore")
def test_a_drawn_case_keeps_the_invariants(number):
    drawn = fuzz.draw(0, number)
    assert fuzz.broken_invariants(drawn) == [], drawn


@pytest.mark.parametrize("subject", ["dense", "dense-rank-5", "conv2d-groups", "embedding"])
def test_the_fuzzer_notices_a_wrong_damping(subject, monkeypatch):
    drawn = fuzz.draw(0, 0)
    absolute = {"damping": 0.5, "output_damping": None, "relative_damping": False, "preserve_norm": False}
    drawn = dataclasses.replace(drawn, subject=subject, policy="float32", data="fine", **absolute)
    assert fuzz.broken_invariants(drawn) == []
    monkeypatch.setattr(fuzz, "paper_isaac", lambda damping, **kwargs: paper_isaac(damping=1.1 * damping, **kwargs))
    assert any("is not the oracle's" in what for what in fuzz.broken_invariants(drawn))


@pytest.mark.often("expand-dense network", "reduce-conv2d-groups", "expand-embedding")
@pytest.mark.parametrize(
    "subject",
    ["dense-fewer-rows", "dense-sequence", "einsum-lora", "conv2d-groups", "transpose2d", "embedding", "dense network"],
)
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.filterwarnings("ignore")
def test_an_empty_batch_does_what_it_does_to_the_plain_layer(subject, weight_sharing):
    drawn = dataclasses.replace(fuzz.draw(0, 0), subject=subject, data="empty", policy="float32", weight_sharing=weight_sharing)
    assert fuzz.broken_invariants(drawn) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(fuzz.BACKEND == "jax", reason="JAX has no float64 by default")
@pytest.mark.parametrize("subject", ["dense", "dense network", "image network", "sequence network", "embedding"])
def test_float64_keeps_the_invariants(subject):
    drawn = dataclasses.replace(fuzz.draw(0, 0), subject=subject, data="fine", policy="float64", batch=5, widths=(3, 4))
    assert fuzz.broken_invariants(drawn) == []
