"""Figure 4: learning curves, a panel a task, five methods, mean and one std over seeds.

python -m plotting.figure_4 --runs runs --out figures
"""

import sys
from pathlib import Path

import numpy as np

from plotting import runs, style
from plotting.paper import TOTAL_TIMESTEPS, reported


def draw(options: runs.Options) -> list[Path]:
    """Draws Figure 4: return of the evaluation policy against environment steps, unsmoothed.

    The paper smooths (Gaussian, sigma 100). Where runs have the paper's length, its final returns
    (Table 1) stand right of the curves. Raises CannotDraw if no run is to be drawn.
    """
    groups = runs.select(options)
    tasks = list(dict.fromkeys(group.task for group in groups))
    figure, axes = style.panels(len(tasks))
    for panel, task in zip(axes, tasks, strict=True):
        mine = [group for group in groups if group.task == task]
        for i, group in enumerate(mine):
            steps, returns = runs.align(group)
            look = style.line(group)
            style.band(
                panel, steps, *runs.mean_std(returns), label=style.plain(group.label), **look
            )
            for step, after in runs.after_refinements(group).items():
                label = "right after a refinement"
                ring = {"color": look["color"], "markerfacecolor": "white", "markersize": 3.5}
                panel.plot(step / 1e6, np.mean(after), "o", label=label, zorder=3, **ring)
            if group.reached == TOTAL_TIMESTEPS and (paper := reported(group.name, task)):
                at = TOTAL_TIMESTEPS / 1e6 * (1.03 + 0.03 * i)
                marker = {
                    "fmt": "D",
                    "markersize": 2.5,
                    "elinewidth": 0.7,
                    "label": "the paper's Table 1",
                }
                panel.errorbar(at, *paper, color=look["color"], **marker)
        refined = {(step, g.reached) for g in mine for step in runs.refinements(g)}
        for step in sorted({step for step, reached in refined if step <= reached}):
            line = panel.axvline(
                step / 1e6, color="#777777", linewidth=0.8, dashes=(2, 2), zorder=0
            )
            line.set_label("decoder refined (GoRL)")
        panel.set(title=task, xlim=(0, None))
        style.from_zero(panel)
    style.finish(figure, axes, style.note(groups), columns=3)
    return style.save(figure, options.out, "figure_4")


if __name__ == "__main__":
    sys.exit(runs.command(draw))
