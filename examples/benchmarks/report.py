"""The tables (in Markdown) and pictures of what `evidence.py` keeps in `results/`.

    python report.py [--pictures FOLDER]

A method stands with the setting of the least validation loss, by its test loss: the mean over the seeds that there are, and its
standard error. "Better" is a paired test over the seeds, which set weights and batches for all methods alike.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from evidence import HORIZONS, NUM_CHECKS, RESULTS, load, neighbours, searched, setting_of
from methods import METHODS, TRIED

AROUND_ADAMW = ("ISAAC()", "ISAAC + AdamW", "ISAAC + AdamW, decay", "ISAAC + AdamW, all")
AROUND_MUON = ("ISAAC + Muon", "ISAAC + Muon, decay", "ISAAC + Muon, hidden", "ISAAC + Muon, all")
PAIRS = [(method, "AdamW") for method in AROUND_ADAMW]
PAIRS += [(method, other) for other in ("Muon", "SOAP") for method in (*AROUND_ADAMW, *AROUND_MUON[1:])]
# What the project's first page shows.
OVERVIEW = ("AdamW", "Muon", "ISAAC()", "ISAAC + AdamW, all")
# Defaults (of AdamW and Muon, Keras' own), and these two at a rate about that of ISAAC().
UNTUNED = {f"{method.removesuffix('()')}()": (method, METHODS[method].start) for method in ("AdamW", "Muon", "SOAP", "ISAAC()")}
UNTUNED |= {f"{method}(0.003)": (method, (0.003, METHODS[method].second)) for method in ("AdamW", "Muon")}
OTHERS = ("momentum", "Lion", "ScheduleFreeAdamW", "K-FAC")
COMPARED = [method for method in METHODS if method not in TRIED + OTHERS + AROUND_MUON]


def best_setting(runs, method, horizon):
    """The learning rate and second number of the least validation loss, or `None` if there is no run."""
    losses = searched(runs, method, horizon)
    return min(losses, key=losses.get) if losses else None


def runs_of(runs, method, horizon, setting):
    """The runs of a setting by their seed, but those that diverged."""
    chosen = [run for run in runs if (run["method"], run["horizon"]) == (method, horizon) and run["train"]]
    return {run["seed"]: run for run in chosen if setting_of(run) == setting}


def best_runs(runs, method, horizon):
    """The runs of the best setting by their seed; empty if there is none."""
    return runs_of(runs, method, horizon, best_setting(runs, method, horizon))


def mean_and_error(values):
    """The mean, and its standard error (NaN for a single value)."""
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


def print_untuned(tasks):
    """Prints the test loss of settings that are the same on all tasks, of the first seed; the least is bold."""
    rows = []
    for task in tasks:
        runs = load(task)
        found = {name: runs_of(runs, method, 1, setting) for name, (method, setting) in UNTUNED.items()}
        losses = {name: each[0]["loss"] for name, each in found.items() if 0 in each}
        if len(losses) > 1:
            cells = {name: f"{loss:.3g}" for name, loss in losses.items()}
            least = min(losses, key=losses.get)
            cells[least] = f"**{cells[least]}**"
            rows.append([task, *(cells.get(name, "") for name in UNTUNED)])
    if rows:
        print("\nTest loss without tuning, of one seed")
        markdown(["task", *UNTUNED], rows)


def part_to(losses, target):
    """After which part of the steps the loss falls to `target`, between checks by its logarithm; infinite if never."""
    for check, loss in enumerate(losses):
        if loss <= target:
            before = math.log(losses[check - 1]) if check else math.inf
            share = (before - math.log(target)) / (before - math.log(loss)) if loss < target and check else 1.0
            return (check + share) / NUM_CHECKS
    return math.inf


def times_of(task):
    """The milliseconds of a step by method, where they were measured; ISAAC's do not depend on what is tuned."""
    path = RESULTS / "milliseconds.json"
    known = json.loads(path.read_text()).get(task, {}) if path.exists() else {}
    bases = {method: "ISAAC + AdamW" if method == "ISAAC()" else method.split(",")[0] for method in METHODS}
    return {method: known[base] for method, base in bases.items() if base in known}


def print_speed(tasks, horizon, methods=("Muon", "ISAAC()", "ISAAC + AdamW, all")):
    """Prints after which part of AdamW's steps, and of its time, methods reach the validation loss at which it ends."""
    rows = []
    for task in tasks:
        runs, milliseconds = load(task), times_of(task)
        curves = {method: [loss for _, loss in draw_losses(runs, method, horizon)] for method in ("AdamW", *methods)}
        if not all(curves.values()):
            continue
        cells = [task]
        for method in methods:
            part = part_to(curves[method], curves["AdamW"][-1])
            cell = "never" if math.isinf(part) else f"{100 * part:.0f} %"
            if math.isfinite(part) and method in milliseconds:
                cell += f" ({100 * part * milliseconds[method] / milliseconds['AdamW']:.0f} %)"
            cells.append(cell)
        rows.append(cells)
    if rows:
        print(f"\nSteps (and time) to the last validation loss of AdamW, of AdamW's own, horizon {horizon}")
        markdown(["task", *methods], rows)


def print_times(tasks, methods=("Muon", "SOAP", "ISAAC + AdamW")):
    """Prints the time of a step, of AdamW's."""
    times = {task: times_of(task) for task in tasks}
    rows = [
        [task, *(f"{known[method] / known['AdamW']:.2f}" if method in known else "" for method in methods)]
        for task, known in times.items()
        if "AdamW" in known
    ]
    if rows:
        print("\nTime of a step, of AdamW's, on one CPU core")
        markdown(["task", *methods], rows)


def print_details(task):
    """Prints what was chosen on a task, and what came of it."""
    runs, rows, milliseconds = load(task), [], times_of(task)
    for horizon in HORIZONS:
        curves = {method: [loss for _, loss in draw_losses(runs, method, horizon)] for method in METHODS}
        target = min((curve[-1] for method, curve in curves.items() if curve and "ISAAC" not in method), default=0.0)
        for method in METHODS:
            if not (chosen := best_runs(runs, method, horizon)):
                continue
            setting, losses = best_setting(runs, method, horizon), searched(runs, method, horizon)
            near = sum(loss <= 1.05 * losses[setting] for loss in losses.values())
            is_inside = not METHODS[method].is_tuned or all(each in losses for each in neighbours(*setting))
            near = f"{near} of {len(losses)}{'' if is_inside else ' (edge)'}"
            cells = [horizon, method, ", ".join(f"{number:g}" for number in setting), near, len(chosen)]
            for measure in ("train", "validation"):
                cells.append(f"{statistics.fmean(run[measure][-1] for run in chosen.values()):.3g}")
            for measure in ("loss", "accuracy"):
                values = [run[measure] for run in chosen.values() if measure in run]
                cells.append(show(*mean_and_error(values)) if values else "")
            part = part_to(curves[method], target)
            cells += ["never" if math.isinf(part) else f"{100 * part:.0f} %", milliseconds.get(method, "")]
            rows.append(cells)
    print(f"\n{task}")
    header = ["horizon", "method", "rate, second, third", "settings within 5 %", "seeds", "train", "validation", "test"]
    header += ["accuracy", "steps to the best baseline's validation loss", "ms a step"]
    markdown(header, rows)


def print_pairs(tasks, horizon, baseline):
    """Prints the change of the test loss from one method to others, and the p-values of paired t-tests."""
    from scipy.stats import ttest_rel

    rows, pairs = [], [pair for pair in PAIRS if pair[1] == baseline]
    for task in tasks:
        cells, runs = [task], load(task)
        for pair in pairs:
            new, old = (best_runs(runs, method, horizon) for method in pair)
            seeds = sorted(new.keys() & old.keys())
            if not seeds:
                cells.append("")
                continue
            new, old = ([each[seed]["loss"] for seed in seeds] for each in (new, old))
            ratio = sum(new) / sum(old)
            cell = f"{100 * (ratio - 1):+.1f} %" if ratio < 3 else f"{ratio:.2g} times"
            cells.append(cell if len(seeds) < 2 else f"{cell} (p = {ttest_rel(new, old).pvalue:.2g})")
        if any(cells[1:]):
            rows.append(cells)
    if rows:
        print(f"\nChange of the test loss from {baseline}'s, horizon {horizon}")
        columns = zip(["task", *(new for new, _ in pairs)], *rows, strict=True)
        header, *rows = zip(*(column for column in columns if any(column[1:])), strict=True)
        markdown(header, rows)


def save_pictures(tasks, folder):
    """Draws the validation loss by step and by learning rate at horizon 1, and the test loss by horizon."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    for name, (draw, label) in DRAWINGS.items():
        points = {task: {method: draw(load(task), method) for method in OVERVIEW} for task in tasks}
        # One point is no line.
        shown = [task for task, lines in points.items() if any(len(line) > 1 for line in lines.values())]
        columns = max(1, min(4, len(shown)))
        rows = max(1, math.ceil(len(shown) / columns))
        size = (3.2 * columns, 0.6 + 2.6 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False)
        for axis in axes.flat[len(shown) :]:
            axis.set_axis_off()
        for axis, task in zip(axes.flat, shown, strict=False):
            for place, (method, line) in enumerate(points[task].items()):
                if line:
                    style = {"linewidth": 2.2} if "ISAAC" in method else {"linewidth": 1.2, "linestyle": "--"}
                    marker = None if draw is draw_losses else "o"
                    axis.plot(*zip(*line, strict=True), color=f"C{place}", marker=marker, label=method, **style)
            axis.set(title=task, yscale="log", xscale="linear" if draw is draw_losses else "log", xlabel=label)
            if draw is draw_horizons:
                horizons = sorted({horizon for line in points[task].values() for horizon, _ in line})
                axis.set_xticks(horizons, horizons)
                axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
            axis.grid(alpha=0.3)
        handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 5))
        figure.savefig(folder / f"{name}.png", dpi=80)
        plt.close(figure)
        print(f"saved {folder / name}.png")


def draw_losses(runs, method, horizon=1):
    """Returns points of the validation loss after each part of the steps."""
    losses = zip(*(run["validation"] for run in best_runs(runs, method, horizon).values()), strict=True)
    return [(100 * (check + 1) / NUM_CHECKS, statistics.geometric_mean(each)) for check, each in enumerate(losses)]


def draw_rates(runs, method):
    """Returns points of the validation loss at each learning rate, with the best of the other number."""
    losses = {}
    for (rate, *_), loss in searched(runs, method, 1).items():
        losses[rate] = min(loss, losses.get(rate, math.inf))
    return sorted((rate, loss) for rate, loss in losses.items() if math.isfinite(loss))


def draw_horizons(runs, method):
    """Returns points of the test loss at each horizon."""
    found = {horizon: best_runs(runs, method, horizon).values() for horizon in HORIZONS}
    return [(horizon, statistics.fmean(run["loss"] for run in each)) for horizon, each in found.items() if each]


DRAWINGS = {
    "evidence": (draw_losses, "% of the steps; validation loss"),
    "rates": (draw_rates, "learning rate; validation loss"),
    "horizons": (draw_horizons, "horizon; test loss"),
}


def main():
    """Reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(), help="where they go (default: here)")
    arguments = parser.parse_args()
    tasks = [path.stem for path in sorted(RESULTS.glob("*.jsonl"))]
    for horizon in HORIZONS:
        print_comparison(tasks, horizon, OVERVIEW, "In short")
        print_comparison(tasks, horizon, COMPARED, "Test loss")
        print_comparison(tasks, horizon, ["Muon", *AROUND_MUON], "Around Muon: test loss")
        tried = [task for task in tasks if any(run["method"] in TRIED for run in load(task))]
        print_comparison(tried, horizon, ["ISAAC + AdamW", *TRIED], "What was tried: test loss")
        other = [task for task in tasks if any(run["method"] in OTHERS for run in load(task))]
        print_comparison(other, horizon, ["AdamW", *OTHERS, "ISAAC()", "ISAAC + AdamW, all"], "Other baselines: test loss")
        for baseline in ("AdamW", "Muon", "SOAP"):
            print_pairs(tasks, horizon, baseline)
        print_speed(tasks, horizon)
    print_untuned(tasks)
    print_times(tasks)
    for task in tasks:
        print_details(task)
    save_pictures(tasks, arguments.pictures)


if __name__ == "__main__":
    main()
