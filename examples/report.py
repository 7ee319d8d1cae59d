"""The tables and pictures of what `evidence.py` keeps in `results/`: who needs how many steps and seconds.

    python report.py [--pictures FOLDER]

A method stands with the learning rate and damping of its grid that gave the least training loss in the first seed; the losses
are geometric means over the seeds that there are. "Steps to AdamW" are those after which the loss is below the least of tuned
AdamW, as a part of all steps; "seconds" likewise, by the times of a step as `evidence.py --time` measured them.
"""

import argparse
import math
import statistics
from pathlib import Path

from evidence import BY_DEFAULT, METHODS, NUM_CHECKS, RATES, RESULTS, SEEDS, best, final_loss, key, load

REFERENCES = ("AdamW", "Muon")
PICTURED = ("SGD", "AdamW", "Muon", "ISAAC, norm", "ISAAC + AdamW")
TUNED = ("AdamW", "ISAAC + AdamW")
SOONEST = ("ISAAC + AdamW", "ISAAC + Muon")


def chosen(results, method):
    """Returns the best rate and damping of a method, and its runs with all seeds; `None` if there is none."""
    if not any(name.startswith(f"{method} | ") for name in results["runs"]):
        return None
    setting = best(results, method)
    runs = runs_of(results, method, *setting)
    return (setting, runs) if runs else None


def runs_of(results, *setting):
    """Returns the runs of a method with a learning rate and a damping, of all seeds, but those that diverged."""
    runs = [results["runs"].get(key(*setting, seed)) for seed in SEEDS]
    return [run for run in runs if run and run["losses"]]


def curve(runs):
    """The geometric mean of the runs' losses, at each check."""
    return [math.exp(statistics.fmean(math.log(max(loss, 1e-12)) for loss in losses)) for losses in zip_losses(runs)]


def zip_losses(runs):
    """The losses of all runs, check by check."""
    return zip(*(run["losses"] for run in runs), strict=True)


def part_to(losses, target):
    """After which part of the steps the loss falls to `target`, between checks by its logarithm; infinite if never."""
    for check in range(1, len(losses)):
        if losses[check] <= target:
            before, after = math.log(losses[check - 1]), math.log(max(losses[check], 1e-12))
            share = (before - math.log(target)) / (before - after) if before > after else 1.0
            return (check - 1 + min(max(share, 0.0), 1.0)) / NUM_CHECKS
    return math.inf


def percent(part):
    """As a cell."""
    return "never" if math.isinf(part) else f"{100 * part:.0f} %"


def rows_of(results):
    """A line of the table for each method that has results."""
    curves = {}
    for method in METHODS:
        found = chosen(results, method)
        if found:
            curves[method] = (*found, curve(found[1]))
    milliseconds = results["milliseconds"]
    for method, (setting, runs, losses) in curves.items():
        held_out = "accuracy" if "accuracy" in runs[0] else "loss"
        cells = [method, f"{setting[0]:g}", "" if setting[1] is None else f"{setting[1]:g}", str(len(runs))]
        cells += [f"{losses[-1]:.3g}", f"{statistics.fmean(run[held_out] for run in runs):.4g}"]
        cells += [f"{milliseconds[method]:.1f}" if method in milliseconds else ""]
        for reference in REFERENCES:
            part = part_to(losses, min(curves[reference][2])) if reference in curves else math.nan
            cells.append("" if math.isnan(part) else percent(part))
            is_timed = method in milliseconds and reference in milliseconds and not math.isnan(part)
            cells.append(percent(part * milliseconds[method] / milliseconds[reference]) if is_timed else "")
        yield cells


def print_table(task, results):
    """Prints the table of a task."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=task)
    table.add_column("method", no_wrap=True)
    columns = ["rate", "damping", "seeds", "train loss", "held out", "ms a step"]
    columns += [f"{what} to {reference}" for reference in REFERENCES for what in ("steps", "seconds")]
    for column in columns:
        table.add_column(column, justify="right")
    for cells in rows_of(results):
        table.add_row(*cells)
    Console(width=150).print(table)


def print_defaults(tasks, what, loss_of):
    """Prints what comes of the optimizers without arguments, and of the best of their grids."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{what} without arguments, and tuned (and of how many seeds)")
    for column in ("task", *BY_DEFAULT, *(f"{method}, tuned" for method in TUNED)):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in tasks:
        results = load(task)
        settings = [*BY_DEFAULT.values(), *((method, *best(results, method)) for method in TUNED)]
        runs = [runs_of(results, *setting) for setting in settings]
        means = [statistics.geometric_mean(max(loss_of(run), 1e-12) for run in each) if each else None for each in runs]
        table.add_row(task, *(f"{mean:.3g} ({len(each)})" if each else "" for mean, each in zip(means, runs, strict=True)))
    Console(width=150).print(table)


def soonest(results, method, target):
    """After which part of the steps a method is at a loss, by the setting of its grid that is there first, and that setting."""
    parts = {(math.inf, None)}
    for rate in RATES[METHODS[method].optimizer]:
        for damping in METHODS[method].dampings:
            runs = [results["runs"].get(key(method, rate, damping, seed)) for seed in SEEDS]
            runs = [run for run in runs if run and run["losses"]]
            if runs:
                parts.add((part_to(curve(runs), target), (rate, damping)))
    return min(parts, key=lambda each: each[0])


def print_soonest(tasks, method):
    """Prints how soon a method tuned for it is at the least loss of the references."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"steps of {method} to the least loss of a tuned optimizer, by the setting that is there first")
    table.add_column("task")
    for reference in REFERENCES:
        table.add_column(reference, justify="right")
        table.add_column("rate, damping", justify="right")
    for task in tasks:
        results, cells = load(task), [task]
        if not chosen(results, method):
            continue
        for reference in REFERENCES:
            found = chosen(results, reference)
            part, setting = soonest(results, method, min(curve(found[1]))) if found else (None, None)
            cells += ["" if part is None else percent(part), f"{setting[0]:g}, {setting[1]:g}" if setting else ""]
        table.add_row(*cells)
    Console(width=150).print(table)


def save_pictures(tasks, folder):
    """Saves the loss by step, and the last loss by learning rate."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    for name, draw in (("evidence", draw_losses), ("rates", draw_rates)):
        figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), constrained_layout=True, squeeze=False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            draw(axis, load(task))
            axis.set(title=task, yscale="log")
            axis.grid(alpha=0.3)
        handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        figure.savefig(folder / f"{name}.png", dpi=80)
        plt.close(figure)
        print(f"saved {folder / name}.png")


def _style(method):
    return {"linewidth": 2.2} if "ISAAC" in method else {"linewidth": 1.2, "linestyle": "--"}


def draw_losses(axis, results):
    """The training loss of each tuned method."""
    for method in PICTURED:
        found = method in METHODS and chosen(results, method)
        color = f"C{PICTURED.index(method)}"
        if found:
            losses = curve(found[1])
            axis.plot(
                [100 * check / NUM_CHECKS for check in range(len(losses))], losses, label=method, color=color, **_style(method)
            )
    axis.set(xlabel="% of the steps", ylabel="training loss")


def draw_rates(axis, results):
    """The last training loss at each learning rate, with the best damping."""
    for method in PICTURED:
        if method not in METHODS or len(RATES[METHODS[method].optimizer]) == 1:
            continue
        points = []
        for rate in RATES[METHODS[method].optimizer]:
            runs = [results["runs"].get(key(method, rate, damping, SEEDS[0])) for damping in METHODS[method].dampings]
            loss = min(map(final_loss, runs))
            if math.isfinite(loss):
                points.append((rate, loss))
        if points:
            color = f"C{PICTURED.index(method)}"
            axis.plot(*zip(*points, strict=True), marker="o", label=method, color=color, **_style(method))
    axis.set(xlabel="learning rate", ylabel="last training loss", xscale="log")


def main():
    """Reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(), help="where they go (default: here)")
    arguments = parser.parse_args()
    tasks = [path.stem for path in sorted(RESULTS.glob("*.json"))]
    for task in tasks:
        print_table(task, load(task))
    print_defaults(tasks, "training loss", final_loss)
    print_defaults(tasks, "held-out loss", lambda run: run["loss"])
    for method in SOONEST:
        print_soonest(tasks, method)
    save_pictures(tasks, arguments.pictures)


if __name__ == "__main__":
    main()
