"""Counts what a training step executes on an accelerator, without one: plain, and captured with ISAAC.

    python accelerators.py --platform tpu                                  # a TPU v5e
    python accelerators.py --platform cuda --models mlp-400,transformer    # an H100
    python accelerators.py --platform torch --inner sgd --json torch.json  # PyTorch's eager step on CUDA tensors

Nothing runs on a device, and nothing is timed. For `tpu` and `cuda`, JAX compiles the whole step of `fit`. The script counts,
in the optimized program, operations (each is a launch on a GPU), loops and their trips, library calls, cycles as the TPU's
compiler estimates them (without library calls), bytes read and written, and the memory of arguments and temporaries. For
`torch`, Keras' eager step runs on the CPU along the path of CUDA tensors. The script counts the operators that compute, and
everything that waits for a GPU: values that the host reads, and Python numbers and NumPy arrays copied to the device.

The compilers come with JAX and need neither a device nor a driver. From a clone, install each in its own environment:

    pip install "jax[tpu]==0.10.2" -e .     # 1.4 GB
    pip install "jax[cuda13]==0.10.2" -e .  # 4.5 GB

The default models take about four minutes on two cores with `tpu` (the transformer, three), two with `cuda`, one with `torch`.
"""

import argparse
import collections
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import time
import traceback
from pathlib import Path
from unittest import mock

import hlo
import overhead

# Of `overhead.py`, and dense layers by width and batch.
MODELS = overhead.MODELS | {
    "mlp-400-256": overhead.dense((784, *[400] * 4, 10), 256),
    "mlp-4096-1024": overhead.dense((4096, *[4096] * 4, 10), 1024),
}
DEFAULT = ("mlp-400", "mlp-400-256", "mlp-4096-1024", "transformer")
PACKAGES = {"tpu": ("libtpu", "jax[tpu]"), "cuda": ("jax_cuda13_plugin", "jax[cuda13]"), "torch": ("torch", "torch")}
# What the compilers would ask a device for.
ENVIRONMENTS = {
    "tpu": {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        # Several processes may compile at a time, since none takes a device.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    "cuda": {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": "--xla_gpu_autotune_level=0"},
    "torch": {},
}
# The facts of an H100 SXM that XLA compiles by, as a text of its `GpuTargetConfigProto`.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"  device_vendor: "NVIDIA Corporation"  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  memory_bandwidth: 3352320000000  device_memory_size: 84942979072  l2_cache_size: 52428800
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
}
platform_name: "CUDA"  device_description_str: "NVIDIA H100 80GB HBM3"  dnn_version_info { major: 9 minor: 10 patch: 0 }
"""


def parse_arguments():
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=list(PACKAGES), required=True)
    parser.add_argument("--models", default=",".join(DEFAULT), help=f"of {', '.join(MODELS)}; or all (default: %(default)s)")
    parser.add_argument("--inner", choices=["adamw", "sgd"], default="adamw", help="the optimizer (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="save the results here too, with the operations by name")
    arguments = parser.parse_args()
    arguments.models = list(MODELS) if arguments.models == "all" else arguments.models.split(",")
    if unknown := set(arguments.models) - set(MODELS):
        parser.error(f"--models must be of {', '.join(MODELS)}. Received: {', '.join(sorted(unknown))}")
    return arguments


def check_installed(platform):
    """Raises if the platform's compiler, or PyTorch, is missing."""
    module, package = PACKAGES[platform]
    if not importlib.util.find_spec(module):
        raise SystemExit(f'--platform {platform} needs {module}, which is not installed: pip install "{package}"')


def build(benchmark, is_captured, inner):
    """Returns the model, plain or captured, and a batch."""
    import keras

    from keras_isaac import ISAAC, capture_inputs

    model = benchmark.build()
    optimizer = {"adamw": keras.optimizers.AdamW, "sgd": keras.optimizers.SGD}[inner](overhead.LEARNING_RATE)
    if is_captured:
        model, optimizer = capture_inputs(model), ISAAC(inner_optimizer=optimizer)
    loss = "mse" if benchmark.classes is None else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    data = benchmark.data(1)
    x, y = data if len(data) == 2 else (data, data)
    # Builds what the step's state holds, without a step of this size on the CPU.
    model.test_on_batch(x[:1], y[:1])
    optimizer.build(model.trainable_variables)
    return model, (x, y)


def find_accelerator(platform):
    """Returns a device that programs can be compiled for, but not run on, and its name."""
    from jax.experimental import topologies

    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0], "TPU v5e"
    description = {"topology_name": "h100", "topology": "1x1x1", "target_config": H100}
    return topologies.get_topology_desc(platform="cuda", **description).devices[0], "H100"


def count_compiled(benchmark, is_captured, inner, device):
    """Returns what one step of `fit` executes when it is compiled for the device."""
    import jax

    model, (x, y) = build(benchmark, is_captured, inner)

    def step(state, x, y):
        return model.train_step(state, (x, y))

    def describe(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables, model.metrics_variables)
    state = [[variable.value for variable in group] for group in groups]
    start = time.perf_counter()
    # As in `fit`, the state is updated in place.
    compiled = jax.jit(step, donate_argnums=0).lower(*jax.tree.map(describe, (state, x, y))).compile()
    seconds = time.perf_counter() - start
    counts, memory = hlo.count(compiled.as_text()), compiled.memory_analysis()
    return {
        "operations": counts.operations.total(),
        # JSON has no integers for keys.
        "loops": [{"trips": trips, "runs": runs} for trips, runs in sorted(counts.loops.items(), key=str)],
        "calls": counts.calls,
        "cycles": counts.cycles,
        "bytes": counts.bytes,
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "compile_s": seconds,
        "by_name": counts.operations,
    }


def take_path_of_cuda():
    """Lets the package treat CPU tensors as it treats those on a GPU."""
    from keras_isaac.backend import torch

    torch._HOST = None


def count_torch(benchmark, is_captured, inner):
    """Returns what one eager step of PyTorch executes, reads and copies."""
    import torch

    model, batch = build(benchmark, is_captured, inner)
    batch = [torch.as_tensor(each) for each in batch]
    # The first step may set up what later ones find.
    model.train_step(batch)
    calls = torch_calls(lambda: model.train_step(batch))
    totals = {name: counter.total() for name, counter in calls.items()}
    return totals | {"by_name": calls["operations"], "read_by": calls["reads"], "copied_by": calls["copies"]}


def torch_calls(function):
    """Returns what PyTorch does in a call of `function`: counters of `operations` by name, of `reads` and `copies` by place.

    A fused `_foreach` operator is one operation, although it may launch several kernels.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    operations, reads, copies = (collections.Counter() for _ in range(3))
    # The host must know their values, or how long their results are.
    reading = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "_linalg_check_errors"}

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name, kwargs = operator.overloadpacket.__name__, kwargs or {}
            by_mask = name in ("index", "index_put", "index_put_") and any(
                getattr(index, "dtype", None) == torch.bool for index in args[1]
            )
            repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
            if name in reading or name.startswith("unique") or by_mask or repeats:
                reads[caller()] += 1
            if name == "lift_fresh":
                # The last that happens to a tensor made from numbers or an array.
                copies[caller()] += 1
            elif not (operator.is_view or name.startswith("empty") or name in ("_unsafe_view", "_local_scalar_dense")):
                operations[name] += 1
            return operator(*args, **kwargs)

    def recorded(method):
        def record(*args, **kwargs):
            reads[caller()] += 1
            return method(*args, **kwargs)

        return record

    with contextlib.ExitStack() as stack:
        # No operator on a CPU corresponds to these.
        for name in ("numpy", "tolist"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, recorded(getattr(torch.Tensor, name))))
        stack.enter_context(Operators())
        function()
    return {"operations": operations, "reads": reads, "copies": copies}


def caller():
    """Returns the file and the line of Keras or `keras_isaac` that asked for what PyTorch does."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        # Keras' own operations were asked by another.
        if "keras_isaac" in parts[-2:-1] or ("keras" in parts and not {"backend", "ops", "utils"} & set(parts)):
            return f"{'keras' if 'keras' in parts else 'keras_isaac'}/{parts[-1]}:{frame.lineno}"
    return "elsewhere"


def print_table(results, platform, title):
    """Prints a line for each result; for a captured step, also the ratio to the plain one."""
    from rich import box, console, table

    columns = {"operations": "launches" if platform == "cuda" else "operations"}
    if platform == "torch":
        columns |= {"reads": "reads by the host", "copies": "copies to the device", "places": "where"}
    else:
        columns |= {"loops": "loops x trips", "calls": "library calls", "cycles": "estimated cycles"}
        columns |= {"bytes": "MB moved", "memory": "MB of memory", "compile_s": "compiled in, s"}
    plain = {result["model"]: result for result in results if result["step"] == "plain"}
    rows = []
    for result in results:
        cells = {}
        for key in ("operations", "cycles", "bytes", "memory"):
            if value := result.get(key):
                cells[key] = f"{value / 1e6:,.1f}" if key in ("bytes", "memory") else f"{value:,}"
                if result["step"] == "captured":
                    cells[key] += f" ({value / plain[result['model']][key]:.2f})"
        if platform == "torch":
            cells |= {key: str(result[key]) for key in ("reads", "copies")}
            places = [f"read {count} x {place}" for place, count in result["read_by"].items()]
            cells["places"] = "\n".join(places + [f"copied {count} x {place}" for place, count in result["copied_by"].items()])
        else:
            cells["loops"] = "\n".join(f"{each['runs']} x {each['trips'] or '?'}" for each in result["loops"])
            cells["calls"] = "\n".join(f"{count} x {target}" for target, count in result["calls"].items())
            cells["compile_s"] = f"{result['compile_s']:.1f}"
        rows.append(cells)
    columns = {key: column for key, column in columns.items() if any(cells.get(key) for cells in rows)}
    lines = table.Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("model", "step"):
        lines.add_column(column, no_wrap=True)
    for key, column in columns.items():
        lines.add_column(column, justify="left" if key in ("calls", "places") else "right")
    for result, cells in zip(results, rows, strict=True):
        lines.add_row(result["model"], result["step"], *(cells.get(key, "") for key in columns))
    console.Console(width=140).print(lines)


def main():
    """Counts the steps of each model."""
    arguments = parse_arguments()
    check_installed(arguments.platform)
    # Keras and JAX read these when they are imported, and the compilers when they are loaded.
    os.environ.update(ENVIRONMENTS[arguments.platform], KERAS_BACKEND="torch" if arguments.platform == "torch" else "jax")
    import keras

    if arguments.platform == "torch":
        take_path_of_cuda()
        target, count = f"PyTorch {importlib.metadata.version('torch')}", count_torch
    else:
        device, target = find_accelerator(arguments.platform)
        target, count = f"{target}, JAX {importlib.metadata.version('jax')}", functools.partial(count_compiled, device=device)
    results = []
    for name in arguments.models:
        for step in ("plain", "captured"):
            print(f"{name}: {step}", flush=True)
            counts = count(MODELS[name], step == "captured", arguments.inner)
            results.append({"model": name, "step": step, **counts})
    title = f"One training step with {arguments.inner}: {target}, Keras {keras.version()}"
    print_table(results, arguments.platform, title)
    if arguments.json:
        record = {"platform": arguments.platform, "target": target, "keras": keras.version(), "inner": arguments.inner}
        arguments.json.write_text(json.dumps({**record, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
