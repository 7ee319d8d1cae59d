"""The tables (in Markdown) and pictures of what `evidence.py` and `swap.py` stored in `results/`.

    python report.py [--pictures FOLDER] [--page RESULTS.md]

Of a searched method the table shows the setting with the lowest validation loss by its test loss: the mean over the seeds, and
the standard error.
"""

import argparse
import contextlib
import functools
import io
import math
import statistics
from pathlib import Path

from evidence import HORIZONS, NUM_CHECKS, load, searched, setting_of
from methods import BASES, METHODS, WITH_DEFAULTS
from swap import (
    SWAPPED,
    VERDICTS,
    isaac_config,
    load_measured,
    markdown,
    mean_and_error,
    mean_curve,
    pair,
    part_to,
    print_swap,
    setting_for,
    show,
    wrapped_name,
)
from tasks import KNOWN, UNSEEN

TUNED = ("AdamW", "Muon", "Keras Muon", "SOAP", "ISAAC + AdamW, tuned", "ISAAC + Muon, tuned")
OTHERS = ("AdamW", "momentum", "Lion", "ScheduleFreeAdamW", "K-FAC")
FIRST, LAST = "<!-- tables of report.py -->\n", "<!-- end of the tables -->\n"
# The picture of the project's first page.
PICTURED = ("cnn", "denoiser", "diamonds", "transformer")


@functools.cache
def default_config():
    """The arguments of `ISAAC()`."""
    return isaac_config({})


def best_setting(runs, method, horizon):
    """The learning rate and second number of the least validation loss, or `None` if there is no run."""
    losses = searched(runs, method, horizon)
    return min(losses, key=losses.get) if losses else None


def runs_of(runs, method, horizon, setting):
    """The runs of a setting by their seed, without those that diverged."""
    chosen = [run for run in runs if (run["method"], run["horizon"]) == (method, horizon) and run["train"]]
    return {run["seed"]: run for run in chosen if setting_of(run) == setting}


def best_runs(runs, method, horizon):
    """The runs of the best setting by their seed; empty if there is none."""
    return runs_of(runs, method, horizon, best_setting(runs, method, horizon))


def print_swaps(tasks, title):
    """Prints the tables of every wrapped optimizer, and before them how often it ended lower."""
    rows, printed = [], []
    cases = [(base, horizon, False) for base in BASES for horizon in HORIZONS]
    for case in [*cases, *((base, 1, True) for base in WITH_DEFAULTS)]:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            lines = print_swap(tasks, *case, default_config())
        if lines:
            base, horizon, at_defaults = case
            counts = [sum(each[-1] == verdict for each in lines) for verdict in VERDICTS]
            rows.append([base, "defaults" if at_defaults else "best", horizon, len(lines), *counts])
            printed.append(output.getvalue())
    if rows:
        print(f"\n{title}: on how many tasks the test loss of the wrapped optimizer is lower, level or higher")
        markdown(["optimizer", "setting", "horizon", "tasks", *VERDICTS], rows)
        print("".join(printed))


def print_times(tasks):
    """Prints the time of a step and the time to AdamW's last validation loss, each over AdamW's, at the best settings."""
    names, rows, sooner = ("Muon", "SOAP", wrapped_name("AdamW")), [], {}
    for task, milliseconds in load_measured("milliseconds", SWAPPED).items():
        setting = setting_for(task, "AdamW", 1, False) if task in tasks else None
        plain, wrapped = pair(task, "AdamW", 1, setting, default_config(), SWAPPED) if setting else ({}, {})
        if not plain:
            continue
        target, cells = mean_curve(plain.values())[-1], []
        for name in names:
            runs = wrapped if name == wrapped_name("AdamW") else best_runs(load(task), name, 1)
            if name not in milliseconds:
                cells += ["", ""]
                continue
            ratio = milliseconds[name] / milliseconds["AdamW"]
            spent = part_to(mean_curve(runs.values()), target) * ratio if runs else None
            cells += [f"{ratio:.2f}", "" if spent is None else "never" if math.isinf(spent) else f"{spent:.2f}"]
            if spent is not None:
                sooner.setdefault(name, []).append(spent < 1)
        rows.append([task, f"{milliseconds['AdamW']:g}", *cells])
    if rows:
        print("\nTime of a step on one CPU core, and time to AdamW's last validation loss, over AdamW's")
        markdown(["task", "AdamW, ms", *(f"{name}{part}" for name in names for part in (": step", ": time"))], rows)
        print("\nSooner than AdamW: " + "; ".join(f"{name} {sum(each)} of {len(each)}" for name, each in sooner.items()))


def print_memory(tasks):
    """Prints the peak memory over that of AdamW."""
    quantity, title = "megabytes", "Peak memory of a process of ten steps"
    measured = {task: each for task, each in load_measured(quantity, SWAPPED).items() if task in tasks and "AdamW" in each}
    for bases in (BASES[:3], BASES[3:6], BASES[6:]):
        columns = [name for base in bases for name in (base, wrapped_name(base)) if name != "AdamW"]
        columns = [name for name in columns if any(name in each for each in measured.values())]
        if columns:
            print(f"\n{title}, over that of AdamW")
            rows = []
            for task, known in measured.items():
                ratios = [f"{known[name] / known['AdamW']:.2f}" if name in known else "" for name in columns]
                rows.append([task, f"{known['AdamW']:g}", *ratios])
            markdown(["task", f"AdamW, {quantity}", *columns], rows)


def print_comparison(tasks, horizon, methods, title):
    """Prints the test loss of every task and method; the least is bold."""
    found = {}
    for task in tasks:
        runs = load(task)
        chosen = {method: best_runs(runs, method, horizon) for method in methods}
        means = {method: mean_and_error(run["loss"] for run in each.values()) for method, each in chosen.items() if each}
        if len(means) > 1:
            found[task] = means
    columns = [method for method in methods if any(method in means for means in found.values())]
    rows = []
    for task, means in found.items():
        cells = {method: show(*each) for method, each in means.items()}
        least = min(means, key=means.get)
        cells[least] = f"**{cells[least]}**"
        rows.append([task, *(cells.get(method, "") for method in columns)])
    if rows:
        print(f"\n{title}, horizon {horizon}")
        markdown(["task", *columns], rows)


def print_details(task):
    """Prints what was chosen on a task, and the losses."""
    runs, rows = load(task), []
    for horizon in HORIZONS:
        for method in METHODS:
            if chosen := list(best_runs(runs, method, horizon).values()):
                setting, losses = best_setting(runs, method, horizon), searched(runs, method, horizon)
                near = sum(loss <= 1.05 * losses[setting] for loss in losses.values())
                means = [f"{statistics.fmean(run[part][-1] for run in chosen):.3g}" for part in ("train", "validation")]
                test = show(*mean_and_error(run["loss"] for run in chosen))
                numbers = ", ".join(f"{number:g}" for number in setting)
                rows.append([method, horizon, numbers, f"{near} of {len(losses)}", len(chosen), *means, test])
    if rows:
        print(f"\n{task}")
        markdown(
            ["method", "horizon", "best setting", "within 5 % of it", "seeds", "train loss", "validation loss", "test loss"],
            rows,
        )


def save_picture(path, tasks, base="AdamW"):
    """Draws the validation loss by step of an optimizer at its best settings, plain and wrapped."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    curves = {}
    for task in tasks:
        setting = setting_for(task, base, 1, False)
        pairs = pair(task, base, 1, setting, default_config(), SWAPPED) if setting else ({}, {})
        plain, wrapped = (mean_curve(runs.values()) if runs else [] for runs in pairs)
        if plain and wrapped:
            curves[task] = {base: plain, f"ISAAC({base})": wrapped}
    if not curves:
        return
    columns = min(4, len(curves))
    num_rows = -(-len(curves) // columns)
    size = (2.8 * columns, 0.4 + 2.4 * num_rows)
    figure, axes = plt.subplots(num_rows, columns, figsize=size, constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    percent = [100 * (check + 1) / NUM_CHECKS for check in range(NUM_CHECKS)]
    for axis, (task, lines) in zip(axes.flat, curves.items(), strict=False):
        for (name, losses), style in zip(lines.items(), ("--", "-"), strict=True):
            axis.plot(percent, losses, style, label=name)
        axis.set(title=task, yscale="log", xlabel="% of the steps")
        axis.grid(alpha=0.3)
    axes.flat[0].set_ylabel("validation loss")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"saved {path}")


def print_tables():
    """Prints all tables except the details of each task."""
    print_swaps(KNOWN, "Known tasks")
    print_swaps(UNSEEN, "Unseen tasks")
    print_times(KNOWN + UNSEEN)
    print_memory(KNOWN + UNSEEN)
    for horizon in HORIZONS:
        print_comparison(KNOWN + UNSEEN, horizon, TUNED, "Each at its best setting: test loss")
        print_comparison(KNOWN + UNSEEN, horizon, OTHERS, "Other optimizers at their best setting: test loss")


def main():
    """Reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(), help="where they go (default: here)")
    parser.add_argument("--page", type=Path, help="replace the tables of this page, such as RESULTS.md")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        print_tables()
    print(output.getvalue())
    if arguments.page:
        before, rest = arguments.page.read_text().split(FIRST)
        arguments.page.write_text(f"{before}{FIRST}{output.getvalue()}{LAST}{rest.split(LAST)[1]}")
    for task in KNOWN + UNSEEN:
        print_details(task)
    save_picture(arguments.pictures / "swap.png", PICTURED)
    save_picture(arguments.pictures / "curves.png", KNOWN)


if __name__ == "__main__":
    main()
