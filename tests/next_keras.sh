#!/usr/bin/env bash
# Runs the tests on the Keras of last night, `keras-nightly`, in an environment of its own: `bash tests/next_keras.sh [backend ...]`.
# Without names, each backend in turn. What Keras has changed shows here before it is released.
set -euo pipefail
[ $# -gt 0 ] || set -- jax tensorflow torch
cd "$(dirname "$0")/.."

venv=${KERAS_ISAAC_VENV:-.venv_next}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/pip" install --quiet "torch==2.13.0"
"$venv/bin/pip" install --quiet -c constraints.txt -e ".[jax,tensorflow,torch,test]"
"$venv/bin/pip" install --quiet -c constraints.txt --no-deps keras-hub regex sentencepiece tokenizers
# Both packages write into the folder `keras`.
"$venv/bin/pip" uninstall --quiet --yes keras keras-nightly
"$venv/bin/pip" install --quiet --pre --no-deps keras-nightly
"$venv/bin/python" -c "import importlib.metadata as m; print('keras-nightly', m.version('keras-nightly'))"

export TF_CPP_MIN_LOG_LEVEL=3 OMP_NUM_THREADS=1
failed=0
for backend in "$@"; do
  echo "== $backend"
  KERAS_BACKEND=$backend "$venv/bin/python" -m pytest -n 2 -m "not slow" || failed=1
done
exit $failed
