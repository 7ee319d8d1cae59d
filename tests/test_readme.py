"""The README's Python runs as it is written."""

import re
from pathlib import Path

import numpy as np


def test_the_readmes_python_runs():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(snippets) >= 2
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)
    random = np.random.default_rng(0)
    namespace["model"].fit(random.normal(size=(20, 64)), random.integers(0, 10, 20), verbose=0)
