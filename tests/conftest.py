"""Every test starts from the same seed, a fresh Keras state and float32."""

import fnmatch
import gc
import os

# TensorFlow convolves images with the channels first on a CPU by oneDNN alone, which it turns on by itself for some processors.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import pytest

if keras.backend.backend() == "torch":
    import torch

    # On a GPU cuDNN's recurrent layers round to TF32, which the oracles do not.
    torch.backends.cudnn.allow_tf32 = False


# A program that a test runs with the folder of the benchmarks on its path. Doctests would import it.
collect_ignore = ["swap_program.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks slow what `often` leaves out, where every case is compiled; PyTorch, which compiles nothing, runs all of them."""
    if keras.backend.backend() == "torch":
        return
    for item in items:
        marker = item.get_closest_marker("often")
        if marker is not None:
            name = item.callspec.id if hasattr(item, "callspec") else ""
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in marker.args):
                item.add_marker("slow")


def pytest_collection_finish():
    """Leaves what the imports made, half a million objects, out of every later search for garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_state():
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("float32")
