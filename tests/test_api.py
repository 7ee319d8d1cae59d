"""The page of reference."""

import importlib
import inspect
from pathlib import Path

import keras_isaac


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
