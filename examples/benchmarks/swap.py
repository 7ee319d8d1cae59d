"""Wraps each optimizer in `ISAAC` and changes nothing else: the same learning rate, weight decay, batches and seeds.

    python swap.py                                        # all that is missing: it resumes where it was stopped
    python swap.py --defaults                             # the same at the optimizers' own defaults
    python swap.py --bases AdamW --tasks cnn --seeds 2 --isaac max_rows=64,damping=0.3 --results other
    taskset -c 0 python swap.py --time                    # milliseconds a step, plain and wrapped, on one core
    python swap.py --memory                               # peak memory of a process, plain and wrapped

The search of `evidence.py` in `results/` gives the plain optimizer's best setting. The wrapped one takes it too, and all other
arguments of `ISAAC` have their defaults, or the values that `--isaac` gives. Both are trained here, since runs on another
machine differ by rounding, which grows. Each run is a line of `results/swap/TASK.jsonl` and records all arguments of `ISAAC`
(plain: null); only runs with the same arguments are reused. `--results` is where the wrapped runs go.
"""

import argparse
import ast
import concurrent.futures
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

from evidence import (
    METHODS,
    NUM_CHECKS,
    NUMBERS,
    RESULTS,
    TASKS,
    add_run,
    load,
    make_trainer,
    searched,
    tasks_of,
    time_steps,
)
from methods import BASES, WITH_DEFAULTS

from keras_isaac import ISAAC

SWAPPED = RESULTS / "swap"
# What `get_config` says of other things than the conditioning.
OTHER_ARGUMENTS = ("name", "learning_rate", "inner_optimizer", "captured")


def isaac_config(options):
    """All arguments of `ISAAC` that concern the conditioning, given or default."""
    return {name: value for name, value in ISAAC(**options).get_config().items() if name not in OTHER_ARGUMENTS}


def setting_for(task, base, horizon, at_defaults):
    """Returns the optimizer's own defaults or its best setting; `None` if there was no search."""
    losses = searched(load(task), base, horizon)
    return METHODS[base].start if at_defaults else min(losses, key=losses.get, default=None)


def runs_at(folder, task, **wanted):
    """The runs of a task with these values, by their seed."""
    path = folder / f"{task}.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {run["seed"]: run for run in runs if wanted.items() <= run.items()}


def pair(task, base, horizon, setting, config, folder):
    """Returns the plain and the wrapped runs, each by their seed."""
    wanted = {"base": base, "horizon": horizon, **dict(zip(NUMBERS, setting, strict=False))}
    return runs_at(SWAPPED, task, isaac=None, **wanted), runs_at(folder, task, isaac=config, **wanted)


def loss_of(run):
    """The test loss; infinite where the run diverged."""
    return run["loss"] if run["train"] else math.inf


def part_to(losses, target):
    """After which part of the steps the loss falls to `target`, between checks by its logarithm; infinite if never."""
    for check, loss in enumerate(losses):
        if loss <= target:
            before = math.log(losses[check - 1]) if check else math.inf
            share = (before - math.log(target)) / (before - math.log(loss)) if loss < target and check else 1.0
            return (check + share) / NUM_CHECKS
    return math.inf


def mean_curve(runs):
    """The geometric mean of the validation losses at each check; empty if a run diverged."""
    if not all(run["train"] for run in runs):
        return []
    return [statistics.geometric_mean(losses) for losses in zip(*(run["validation"] for run in runs), strict=True)]


def mean_and_error(values):
    """The mean and its standard error (NaN for a single value)."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def show(mean, error):
    """As a cell."""
    return f"{mean:.3g}" if math.isnan(error) else f"{mean:.3g} ± {error:.1g}"


def markdown(header, rows):
    """Prints a table, its first column to the left."""
    print("\n| " + " | ".join(header) + " |")
    print("| --- |" + " ---: |" * (len(header) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def verdict(plain, wrapped):
    """Compares the losses of the same seeds: "level" if the mean difference is within its standard error.

    A run that diverged has an infinite loss. With a single seed there is no error, and no verdict.
    """
    if len(plain) < 2:
        return ""
    if any(map(math.isinf, plain + wrapped)):
        worse, better = sum(map(math.isinf, wrapped)), sum(map(math.isinf, plain))
        return "level" if worse == better else "higher" if worse > better else "lower"
    mean, error = mean_and_error(new - old for new, old in zip(wrapped, plain, strict=True))
    return "level" if abs(mean) <= error else "lower" if mean < 0 else "higher"


VERDICTS = ("lower", "level", "higher")
HEADER = ("task", "plain", "wrapped", "change", "p", "steps to the plain loss", "time", "wrapped is")


def line(task, plain, wrapped, milliseconds):
    """Returns the cells of one comparison, of the seeds that both have."""
    from scipy.stats import ttest_rel

    seeds = sorted(plain.keys() & wrapped.keys())
    plain, wrapped = ([runs[seed] for seed in seeds] for runs in (plain, wrapped))
    old, new = ([loss_of(run) for run in runs] for runs in (plain, wrapped))
    cells = [task]
    for losses in (old, new):
        diverged = sum(map(math.isinf, losses))
        cells.append(f"{diverged} of {len(losses)} diverged" if diverged else show(*mean_and_error(losses)))
    change = p_value = ""
    if math.isfinite(sum(old) + sum(new)):
        ratio = sum(new) / sum(old)
        change = f"{100 * (ratio - 1):+.1f} %" if ratio < 3 else f"{ratio:.2g} times"
        p_value = f"{ttest_rel(new, old).pvalue:.2g}" if len(seeds) > 1 else ""
    curves = [mean_curve(runs) for runs in (plain, wrapped)]
    part = part_to(curves[1], curves[0][-1]) if all(curves) else math.inf
    steps, spent = ("never", "never") if math.isinf(part) else (f"{100 * part:.0f} %", "")
    if math.isfinite(part) and milliseconds:
        spent = f"{100 * part * milliseconds[1] / milliseconds[0]:.0f} %"
    return [*cells, change, p_value, steps, spent, verdict(old, new)]


def load_measured(quantity, folder):
    """What was measured, "milliseconds" of a step or "megabytes" of a process, by task and optimizer."""
    path = folder / f"{quantity}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def print_swap(tasks, base, horizon, at_defaults, config, folder=SWAPPED):
    """Prints a line for every task that has both runs, and counts; returns the lines."""
    rows, times = [], load_measured("milliseconds", folder)
    for task in tasks:
        setting = setting_for(task, base, horizon, at_defaults)
        plain, wrapped = pair(task, base, horizon, setting, config, folder) if setting else ({}, {})
        if plain.keys() & wrapped.keys():
            known = times.get(task, {})
            milliseconds = [known[name] for name in (base, wrapped_name(base))] if wrapped_name(base) in known else None
            rows.append(line(task, plain, wrapped, milliseconds))
    if rows:
        where = "its own defaults" if at_defaults else "its best settings"
        print(f"\n{base} at {where}, plain and wrapped in ISAAC: test loss, horizon {horizon}")
        markdown(HEADER, rows)
        print(f"\n{'; '.join(f'{sum(row[-1] == each for row in rows)} {each}' for each in VERDICTS)}")
    return rows


def wrapped_name(base):
    """What the wrapped optimizer is called in the times."""
    return f"ISAAC + {base}"


def measure_task(quantity, task, bases, options, folder):
    """Measures the optimizers on a task, plain and wrapped, and stores the results."""
    cases = [(base, each) for base in bases for each in ((), (options,))]
    names = [wrapped_name(base) if each else base for base, each in cases]
    if quantity == "milliseconds":
        trainers = [make_trainer(TASKS[task], METHODS[base], *each) for base, each in cases]
        results = time_steps(TASKS[task], dict(zip(names, trainers, strict=True)))
    else:
        # A process each, or one's peak would hide the next one's.
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            results = {name: pool.submit(peak_memory, task, *case).result() for name, case in zip(names, cases, strict=True)}
    kept = load_measured(quantity, folder)
    kept[task] = kept.get(task, {}) | results
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{quantity}.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(task, kept[task], flush=True)


def peak_memory(task, base, options):
    """Trains ten steps, and returns the peak memory of this process in megabytes."""
    trainer = make_trainer(TASKS[task]._replace(steps=NUM_CHECKS), METHODS[base], *options)
    trainer.run(METHODS[base].start, 0)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def parse_options(text):
    """Returns the arguments of `ISAAC` in `name=value,name=value`; values are Python literals or words."""

    def value_of(word):
        try:
            return ast.literal_eval(word)
        except ValueError:
            return word

    return {name: value_of(value) for name, value in (each.split("=") for each in filter(None, text.split(",")))}


def main():
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", help=f"separated by ';' (default: {';'.join(BASES)}, or those with defaults)")
    parser.add_argument("--tasks", default="known", help="known, unseen, or names separated by ',' (default: %(default)s)")
    parser.add_argument("--horizons", default="1,4", help="separated by ',' (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--defaults", action="store_true", help="train at the optimizers' own defaults, at horizon 1")
    parser.add_argument("--isaac", type=parse_options, default={}, help="arguments of ISAAC, as in max_rows=64,damping=0.3")
    parser.add_argument("--results", type=Path, default=SWAPPED, help="where the wrapped runs go (default: %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="starts no run after these (default: none)")
    parser.add_argument("--time", action="store_true", help="measure the time of a step instead; needs an idle machine")
    parser.add_argument("--memory", action="store_true", help="measure the peak memory instead, in a process each")
    arguments = parser.parse_args()
    started, tasks = time.perf_counter(), tasks_of(arguments.tasks)
    bases = arguments.bases.split(";") if arguments.bases else WITH_DEFAULTS if arguments.defaults else BASES
    horizons = [1] if arguments.defaults else [int(each) for each in arguments.horizons.split(",")]
    if arguments.time or arguments.memory:
        for task in tasks:
            quantity = "milliseconds" if arguments.time else "megabytes"
            measure_task(quantity, task, bases, arguments.isaac, arguments.results)
        return
    config = isaac_config(arguments.isaac)
    for task in tasks:
        for base in bases:
            trainers = [None, None]
            for horizon in horizons:
                setting = setting_for(task, base, horizon, arguments.defaults)
                if setting is None:
                    print(f"{task}: no search of {base} at horizon {horizon} yet; evidence.py makes it", flush=True)
                    continue
                known = pair(task, base, horizon, setting, config, arguments.results)
                for seed, is_wrapped in ((seed, is_wrapped) for seed in range(arguments.seeds) for is_wrapped in (0, 1)):
                    if seed in known[is_wrapped]:
                        continue
                    if time.perf_counter() - started > arguments.max_seconds:
                        print("out of time")
                        return
                    if trainers[is_wrapped] is None:
                        options = (arguments.isaac,) if is_wrapped else ()
                        trainers[is_wrapped] = make_trainer(TASKS[task], METHODS[base], *options)
                    names = {"base": base, "isaac": config if is_wrapped else None}
                    folder = arguments.results if is_wrapped else SWAPPED
                    add_run(folder / f"{task}.jsonl", trainers[is_wrapped], names, setting, seed, horizon)
    for base in bases:
        for horizon in horizons:
            print_swap(tasks, base, horizon, arguments.defaults, config, arguments.results)


if __name__ == "__main__":
    main()
