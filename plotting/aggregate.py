"""What holds over tasks: interquartile mean and probability of improvement, with bootstrap
intervals.

    python -m plotting.aggregate --runs runs --out figures

Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021), by
their library, rliable. The paper has no such figure; with five seeds a task, mean and std say less
than it seems.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from plotting import runs, style

BASELINE = "PPO"


def area(group: runs.Group) -> np.ndarray:
    """Seeds' areas under their learning curves over the steps (K,), trapezoids: mean returns."""
    steps, returns = runs.align(group)
    return np.trapezoid(returns, steps, axis=1) / (steps[-1] - steps[0])


def scores(
    groups: list[runs.Group], score: Callable[[runs.Group], np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Scores (K, T) by label over the T tasks that all have; the K seeds may differ by method.

    A method's seeds are those that all its tasks have. CannotDraw if no task is common to two
    methods, or a method's tasks have under two seeds in common.
    """
    by_task = {(group.label, group.task): group for group in groups}
    labels = list(dict.fromkeys(group.label for group in groups))
    every = list(dict.fromkeys(group.task for group in groups))
    tasks = [task for task in every if all((label, task) in by_task for label in labels)]
    if len(labels) < 2 or not tasks:
        text = "an aggregate needs two methods, and a task that all have run with two seeds"
        raise runs.CannotDraw(text)
    if others := [task for task in every if task not in tasks]:
        print(f"left out, since not all methods have run them: {', '.join(others)}")
    by_label = {}
    for label in labels:
        mine = [by_task[label, task] for task in tasks]
        seeds = sorted(set.intersection(*(set(group.curves) for group in mine)))
        if len(seeds) < 2:
            where = ", ".join(tasks)
            raise runs.CannotDraw(f"an aggregate needs two seeds that {label} has run on {where}")
        values = [dict(zip(sorted(g.curves), score(g), strict=True)) for g in mine]
        by_label[label] = np.array([[value[seed] for value in values] for seed in seeds])
    return by_label, tasks


def statistics(
    by_label: dict[str, np.ndarray], reps: int, baselines: dict[str, str | None] | None = None
) -> tuple[dict, dict]:
    """By label: IQM of scores (K, T), and P(better than PPO), each (estimate, low, high) at 95%.

    The bootstrap draws seeds anew within each task, the same for whatever stands beside a label.
    `baselines`: PPO's label for each, if not PPO.
    """
    from rliable import library, metrics  # takes seconds to import

    def estimate(scores: Any, statistic: Callable) -> tuple[float, float, float]:
        np.random.seed(0)  # noqa: NPY002  (rliable draws from this generator)
        value, interval = library.get_interval_estimates({"it": scores}, statistic, reps=reps)
        return float(np.squeeze(value["it"])), *map(float, interval["it"].ravel())

    def iqm(x: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(x)])

    better = {}
    for label, x in by_label.items():
        baseline = (baselines or {}).get(label, BASELINE)
        if baseline != label and baseline in by_label:
            pair = x, by_label[baseline]
            better[label] = estimate(pair, metrics.probability_of_improvement)
    return {label: estimate(x, iqm) for label, x in by_label.items()}, better


def draw(options: runs.Options, reps: int = 2000) -> list[Path]:
    """Draws IQM of the final returns, and probability of improvement over PPO by final return and
    by area under the learning curve; writes all as text, too.

    Args:
        reps: Bootstrap samples.
    """
    if reps < 100:
        runs.wrong("--reps", reps, "a number of bootstrap samples, at least 100")
    groups = runs.select(options, lambda group: group.finished and len(group.curves) > 1)
    last, tasks = scores(groups, runs.final_returns)
    baselines = {group.source: group.label for group in groups if group.name == BASELINE}
    baselines = {group.label: baselines.get(group.source) for group in groups}
    iqm, better = statistics(last, reps, baselines)
    iqm_area, better_area = statistics(scores(groups, area)[0], reps, baselines)
    if not better:
        print(f"no runs of {BASELINE} to compare with")
    columns = {"IQM of the last return": iqm, f"P(last return above {BASELINE}'s)": better}
    columns |= {"IQM of the area": iqm_area, f"P(area above {BASELINE}'s)": better_area}
    drawn = {title: values for title, values in columns.items() if values}
    del drawn["IQM of the area"]  # in the text only
    figure, axes = style.panels(len(drawn), height=1.2)
    looks = {group.label: style.line(group) for group in groups}
    for panel, (title, values) in zip(axes, drawn.items(), strict=True):
        names = list(values)[::-1]
        for at, name in enumerate(names):
            estimate, low, high = values[name]
            colour = looks[name]["color"]
            panel.plot(
                [low, high], [at, at], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt"
            )
            panel.plot(
                [estimate], [at], marker="|", markersize=9, markeredgewidth=1.8, color=colour
            )
        panel.set_yticks(range(len(names)), map(style.plain, names))
        panel.set(title=title, xlabel="probability", ylabel="", ylim=(-0.6, len(names) - 0.4))
        panel.grid(axis="y", visible=False)
        if values is iqm:
            panel.set_xlabel("return")
            panel.set_xlim(left=min(0.0, panel.dataLim.x0))
        else:
            panel.set_xlim(-0.02, 1.02)
            panel.axvline(0.5, color="#777777", linewidth=0.8, dashes=(2, 2))
    what = f"Estimates and 95% bootstrap intervals, stratified by task ({', '.join(tasks)}), of"
    text = style.note([g for g in groups if g.task in tasks], what, {len(x) for x in last.values()})
    text += " The area under a learning curve is its mean return over the steps."
    if min(x.size for x in last.values()) < 4:
        text += " Of fewer than four returns the interquartile mean (IQM) is the mean."
    if any(low == high for _, low, high in (*better.values(), *better_area.values())):
        text += " An interval of 0 or 1 alone: all seeds are below, or above, all of PPO's."
    style.finish(figure, [], text)
    lines = [text]
    for name in iqm:
        line = f"{name}:"
        for title, values in columns.items():
            if name in values:
                digits = 1 if title.startswith("IQM") else 2
                estimate, low, high = (f"{value:.{digits}f}" for value in values[name])
                line += f" {title} {estimate} [{low}, {high}];"
        lines.append(line[:-1])
    files = style.save(figure, options.out, "aggregate")
    (file := options.out / "aggregate.txt").write_text("\n".join(lines) + "\n")
    print("\n" + file.read_text())
    return [*files, file]


if __name__ == "__main__":
    sys.exit(runs.command(draw))
