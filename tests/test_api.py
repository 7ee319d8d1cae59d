"""What editors and readers are told: types of every public name, and the page of reference."""

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
def test_every_public_function_tells_its_types(function):
    signature = inspect.signature(function)
    untyped = [each.name for each in signature.parameters.values() if each.annotation is each.empty and each.name != "self"]
    assert not untyped
    assert signature.return_annotation is not signature.empty


def test_every_public_name_is_checked_for_types():
    functions = {getattr(each, "__wrapped__", each).__qualname__ for each in FUNCTIONS}
    names = {*keras_isaac.__all__, *layers.__all__} - {"callbacks"}
    assert names <= {name.removesuffix(".__init__") for name in functions}


def test_the_page_of_reference_is_current(monkeypatch):
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    api = importlib.import_module("api")
    assert api.PAGE.read_text() == api.page(), "Write it anew: python examples/api.py"
