"""Types of every public name, and the page of reference."""

import importlib
import inspect
from pathlib import Path

import pytest

import keras_isaac
from keras_isaac import layers

FUNCTIONS = [
    *(keras_isaac.capture_inputs, keras_isaac.release_inputs, keras_isaac.kernel_status, keras_isaac.summary),
    *(keras_isaac.register_layer, keras_isaac.register_adapter, layers.call_with, layers.conditioned, layers.mask_of),
    *(layers.sampled_rows, keras_isaac.ISAAC.__init__, keras_isaac.ISAAC.conditioning),
    *(keras_isaac.callbacks.CurvatureMonitor.__init__, keras_isaac.callbacks.CurvatureMonitor.plot),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_every_public_function_is_annotated(function):
    signature = inspect.signature(function)
    untyped = [each.name for each in signature.parameters.values() if each.annotation is each.empty and each.name != "self"]
    assert not untyped
    assert signature.return_annotation is not signature.empty


def test_every_public_name_is_checked_for_types():
    functions = {getattr(each, "__wrapped__", each).__qualname__ for each in FUNCTIONS}
    names = {*keras_isaac.__all__, *layers.__all__} - {"callbacks", "KernelStatus"}
    assert names <= {name.removesuffix(".__init__") for name in functions}


def test_the_page_of_reference_is_current(monkeypatch):
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    api = importlib.import_module("api")
    assert api.PAGE.read_text() == api.page(), "To update the page: python examples/api.py"


def test_the_page_of_reference_has_the_signature_of_every_function():
    page = (Path(__file__).parents[1] / "examples" / "api.md").read_text()
    functions = [name for name in keras_isaac.__all__ if inspect.isfunction(getattr(keras_isaac, name))]
    assert {"summary", "kernel_status", "capture_inputs"} <= set(functions)
    for name in functions:
        assert f"\n{name}(" in page
