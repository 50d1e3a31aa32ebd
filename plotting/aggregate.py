"""What holds over tasks: interquartile mean and probability of improvement, with bootstrap
intervals.

    python -m plotting.aggregate --runs results runs --out figures

Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (2021), by
their library, rliable. The paper has no such figure; with five seeds a task, mean and std say less
than it seems.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from plotting import runs, style
from plotting.paper import METHODS

BASELINE = "ppo_gaussian"


def scores(groups: dict[tuple[str, str], runs.Group]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Final returns (K, T) by method over the T tasks that all have; the K seeds may differ by
    method.

    A method's seeds are those that all its tasks have. Names what is left out; CannotDraw if no
    task is common to two methods, or a method has under two seeds.
    """
    methods = list(dict.fromkeys(method for method, _ in groups))
    every = list(dict.fromkeys(task for _, task in groups))
    tasks = [task for task in every if all((method, task) in groups for method in methods)]
    if len(methods) < 2 or not tasks:
        text = "an aggregate needs two methods, and a task that all methods have run"
        raise runs.CannotDraw(text)
    others = [task for task in every if task not in tasks]
    if others:
        print(f"left out, since not all methods have run them: {', '.join(others)}")
    by_method = {}
    for method in methods:
        mine = [groups[method, task] for task in tasks]
        seeds = sorted(set.intersection(*(set(group.curves) for group in mine)))
        if len(seeds) < 2:
            raise runs.CannotDraw(
                f"an aggregate needs two seeds that {method} has run on {', '.join(tasks)}"
            )
        ends = [dict(zip(sorted(g.curves), runs.final_returns(g), strict=True)) for g in mine]
        by_method[method] = np.array([[end[seed] for end in ends] for seed in seeds])
    return by_method, tasks


def statistics(by_method: dict[str, np.ndarray], reps: int, seed: int = 0) -> tuple[dict, dict]:
    """By method: IQM of the returns (K, T), and P(it is better than PPO), each (estimate, low,
    high) at 95%.

    The bootstrap draws seeds anew within each task.
    """
    from rliable import library, metrics  # takes seconds to import

    np.random.seed(seed)  # noqa: NPY002  (the generator that rliable draws from)
    iqm, iqm_range = library.get_interval_estimates(
        by_method, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=reps
    )
    baseline, better, better_range = by_method.get(BASELINE), {}, {}
    pairs = {
        m: (x, baseline) for m, x in by_method.items() if baseline is not None and m != BASELINE
    }
    if pairs:
        better, better_range = library.get_interval_estimates(
            pairs, metrics.probability_of_improvement, reps=reps
        )
    return (
        {m: (float(iqm[m][0]), *map(float, iqm_range[m][:, 0])) for m in iqm},
        {m: (float(better[m]), *map(float, better_range[m].ravel())) for m in better},
    )


def draw(options: runs.Options, reps: int = 2000) -> list[Path]:
    """Draws IQM of the final returns, and probability of improvement over PPO; writes both as text,
    too.

    Args:
        reps: Bootstrap samples.
    """
    if reps < 100:
        runs.wrong("--reps", reps, "a number of bootstrap samples, at least 100")
    groups, preset = runs.select(replace(options, unfinished=False))
    by_method, tasks = scores(groups)
    iqm, better = statistics(by_method, reps)
    figure, axes = style.panels(2 if better else 1, height=1.2)
    titles = ("interquartile mean of the final return", f"P(better than {METHODS[BASELINE]})")
    for panel, values, title in zip(axes, (iqm, better), titles, strict=False):
        names = list(values)[::-1]
        for at, method in enumerate(names):
            estimate, low, high = values[method]
            colour = style.line(method)["color"]
            panel.plot(
                [low, high], [at, at], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt"
            )
            panel.plot(
                [estimate], [at], marker="|", markersize=9, markeredgewidth=1.8, color=colour
            )
        panel.set_yticks(range(len(names)), [style.label(m) for m in names])
        panel.set(title=title, xlabel="", ylabel="", ylim=(-0.6, len(names) - 0.4))
        panel.grid(axis="y", visible=False)
    axes[0].set(xlabel="return", xlim=(0, None))
    if better:
        axes[1].set(xlabel="probability", xlim=(-0.02, 1.02))
        axes[1].axvline(0.5, color="#777777", linewidth=0.8, dashes=(2, 2))
    what = f"estimate and 95% bootstrap interval, stratified by task ({', '.join(tasks)}), of"
    mine = [groups[method, task] for method in by_method for task in tasks]
    text = style.note(mine, preset, what, {len(x) for x in by_method.values()})
    if min(x.size for x in by_method.values()) < 4:
        text += "; of fewer than four returns the interquartile mean is the mean"
    if any(low == high for _, low, high in better.values()):
        text += "; an interval of 0 or 1 alone: all these seeds are below, or above, all of PPO's"
    style.finish(figure, [], text)
    lines = [text]
    for method in iqm:
        estimate, low, high = iqm[method]
        line = f"{style.label(method):12s} IQM {estimate:.1f} [{low:.1f}, {high:.1f}]"
        if method in better:
            p, low, high = better[method]
            line += f"   P(better than {METHODS[BASELINE]}) {p:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(line)
    files = style.save(figure, options.out, "aggregate")
    (file := options.out / "aggregate.txt").write_text("\n".join(lines) + "\n")
    print("\n" + file.read_text())
    return [*files, file]


if __name__ == "__main__":
    sys.exit(runs.command(draw))
