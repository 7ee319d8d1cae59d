#!/usr/bin/env bash
# Runs the tests on the Keras of last night, `keras-nightly`, in an environment of its own: what Keras changes shows here before
# it is released. Arguments go to pytest; KERAS_ISAAC_BACKENDS="torch jax" chooses backends.
set -euo pipefail
cd "$(dirname "$0")/.."
export KERAS_ISAAC_VENV=${KERAS_ISAAC_VENV:-.venv_next} KERAS_ISAAC_KERAS=keras-nightly
exec bash tests/run.sh "$@"
