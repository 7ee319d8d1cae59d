#!/usr/bin/env bash
# What a newcomer does, for each backend or for those named: builds a wheel, installs it into an empty environment with that
# backend alone, runs the README's Python as written, and digits.py for two epochs. Takes minutes, and downloads each backend.
set -euo pipefail
[ $# -gt 0 ] || set -- jax tensorflow torch
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 TF_CPP_MIN_LOG_LEVEL=3
unset PYTHONPATH

# Built from a copy, since a build leaves files beside its sources.
mkdir "$work/source"
cp -r pyproject.toml README.md LICENSE keras_isaac "$work/source"
python3 -m venv "$work/build"
"$work/build/bin/pip" wheel --quiet --no-deps --wheel-dir "$work" "$work/source"
wheel=$(echo "$work"/*.whl)

for backend in "$@"; do
  echo "== $backend"
  venv=$work/$backend
  python3 -m venv "$venv"
  # PyTorch first and by its exact version: its build for the CPU where the machine's index offers one.
  [ "$backend" != torch ] || "$venv/bin/pip" install --quiet "torch==2.13.0"
  "$venv/bin/pip" install --quiet -c constraints.txt "$wheel[$backend,examples]"
  cd "$work"
  KERAS_BACKEND=$backend "$venv/bin/python" - "$root/README.md" <<'PYTHON'
import importlib.util
import os
import re
import subprocess
import sys

import numpy as np

backend = os.environ["KERAS_BACKEND"]
others = {"tensorflow", "jax", "torch"} - {backend}
installed = [name for name in others if importlib.util.find_spec(name)]
assert not installed, f"not alone: {installed}"
with open(sys.argv[1]) as readme:
    snippets = re.findall(r"```python\n(.*?)```", readme.read(), re.DOTALL)
names = {}
for snippet in snippets:
    exec(snippet, names)
random = np.random.default_rng(0)
names["model"].fit(random.normal(size=(60, 64)), random.integers(0, 10, 60), verbose=0)
import keras_isaac

assert keras_isaac.__file__.startswith(sys.prefix), keras_isaac.__file__
assert os.path.exists(os.path.join(os.path.dirname(keras_isaac.__file__), "py.typed"))
keras_isaac.summary(names["model"])
for other in others:
    command = [sys.executable, "-c", "import keras_isaac"]
    result = subprocess.run(command, env={**os.environ, "KERAS_BACKEND": other}, capture_output=True, text=True)
    assert f"Keras is to run on {other}, which is not installed" in result.stderr, result.stderr
print(f"{len(snippets)} snippets of the README ran on {backend} alone")
PYTHON
  "$venv/bin/python" "$root/examples/digits.py" --backend "$backend" --epochs 2 --seeds 1 --picture "$work/digits.png"
  KERAS_BACKEND=$backend "$venv/bin/python" "$root/examples/recipes/keep_your_recipe.py"
  # An editable install works from the folder that holds the clone.
  mkdir -p "$work/holder"
  cp -r "$work/source" "$work/holder/keras_isaac"
  "$venv/bin/pip" install --quiet --no-deps -e "$work/holder/keras_isaac"
  cd "$work/holder"
  KERAS_BACKEND=$backend "$venv/bin/python" -c "from keras_isaac import ISAAC"
  cd "$root"
  rm -rf "$venv" "$work/holder"
done
