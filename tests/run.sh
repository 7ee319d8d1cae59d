#!/usr/bin/env bash
# Sets up a virtual environment with the tested versions and runs all the tests: the form and the types of the code, then each
# backend in a run of its own, two processes wide, since Keras fixes its backend when it is imported. Arguments go to pytest;
# without any, the slow tests are left out, and XLA optimizes little, since tests compile far longer than they run. With `-m ""`
# all tests run on what users run. SlipCover measures which lines and branches of the package the three runs execute; on Python
# 3.11 it costs a few percent of the time, where coverage.py, which traces each call, costs half.
set -euo pipefail
[ $# -gt 0 ] || {
  set -- -m "not slow"
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1
}
cd "$(dirname "$0")/.."

venv=${KERAS_ISAAC_VENV:-.venv}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
# PyTorch first and by its exact version: its build for the CPU where the machine's index offers one.
"$venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0"
"$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e ".[jax,tensorflow,torch,test]"
# KerasHub without its dependencies: it asks for the whole of TensorFlow, which does not go beside tensorflow-cpu.
"$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt --no-deps keras-hub regex sentencepiece tokenizers
# Both packages write into the folder `keras`.
[ -z "${KERAS_ISAAC_KERAS:-}" ] || {
  "$venv/bin/pip" uninstall --quiet --yes keras "$KERAS_ISAAC_KERAS"
  "$venv/bin/pip" install --quiet --disable-pip-version-check --pre --no-deps "$KERAS_ISAAC_KERAS"
}

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"

export TF_CPP_MIN_LOG_LEVEL=3 OMP_NUM_THREADS=1
# Many tests train the same small network: JAX compiles it once.
JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
coverage=$(mktemp -d)
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR" "$coverage"' EXIT
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
failed=0
for backend in ${KERAS_ISAAC_BACKENDS:-jax tensorflow torch}; do
  echo "== $backend"
  slipcover=(-m slipcover --branch --source keras_isaac --json --out "$coverage/$backend.json")
  KERAS_BACKEND=$backend "$venv/bin/python" "${slipcover[@]}" -m pytest -n 2 "$@" || failed=1
done
echo "== lines and branches of the package that these tests execute"
"$venv/bin/python" -m slipcover --branch --merge "$coverage"/*.json --out "$coverage/all.json"
exit $failed
