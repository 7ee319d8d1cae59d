"""Writes the reference of all public names, `examples/api.md`, from their docstrings, by griffe2md: python examples/api.py.

To install: pip install griffe2md.
"""

import re
from pathlib import Path

import griffe
import griffe2md

import keras_isaac
import keras_isaac.layers

PAGE = Path(__file__).with_name("api.md")
HEAD = """# Reference

Every public name of `keras_isaac`, from its docstring, by `python examples/api.py`; the examples run in the tests.
"""
# Links to headings that this page does not have.
LINK = r"\[([^\[\]]*)\]\(#[^)]*\)"
EXAMPLE = r"**Example:**\n\n```python\n\1\n```\n"
# Members that optimizers and callbacks of Keras have too are in Keras' own reference.
MEMBERS = {"ISAAC": ["conditioning", "damping"], "CurvatureMonitor": ["plot"], "KernelStatus": []}


def names():
    """Yields the dotted path of every public object."""
    for name in keras_isaac.__all__:
        # The function `summary` hides the module of that name.
        yield {"callbacks": "callbacks.CurvatureMonitor", "summary": "summary.summary"}.get(name, name)
    for name in keras_isaac.layers.__all__:
        if name not in keras_isaac.__all__:
            yield f"layers.{name}"


def page():
    """Returns the page's text."""
    options = {"warn_missing_types": False, "warn_unknown_params": False}
    package = griffe.load("keras_isaac", docstring_parser="google", docstring_options=options, resolve_aliases=True)
    return "\n".join([HEAD, *(section(package, name) for name in names())])


def section(package, name):
    """Returns the part of one name."""
    found = package[name]
    found = found.final_target if found.is_alias else found
    members = MEMBERS.get(found.name, [])
    for each in (found, *(found.members[member] for member in members)):
        # griffe does not know Keras' format of examples.
        each.docstring.value = re.sub(r"^Example:\n((?:.+\n?)+)", EXAMPLE, each.docstring.value, flags=re.MULTILINE)
    config = {
        **griffe2md.default_config,
        "filters": [f"!^(?!({'|'.join(members)})$)"] if members else ["!.*"],
        "heading_level": 2,
        "merge_init_into_class": True,
        "show_bases": False,
        "show_object_full_path": False,
        "show_root_full_path": False,
        "show_root_members_full_path": False,
        "show_signature_annotations": True,
        "summary": False,
    }
    text = griffe2md.render_object_docs(found, config)
    text = re.sub(r"<code>(.*?)</code>", lambda match: "`" + re.sub(LINK, r"\1", match[1]) + "`", text)
    return text.strip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"Wrote {PAGE}")
