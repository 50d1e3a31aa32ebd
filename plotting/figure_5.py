"""Figure 5: how much latent regularisation GoRL needs: a sweep of beta (Eq. 3) on CheetahRun.

for beta in 0 1e-4 5e-4 1e-3 5e-3 1e-2 5e-2 1e-1; do
    python gorl_fm_ppo.py --env-id CheetahRun --num-seeds 5 --kl-coef $beta
done
python -m plotting.figure_5
"""

import sys
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np

from plotting import runs, style
from plotting.paper import BETAS


def sweep(options: runs.Options, method: str, env_id: str) -> tuple[dict[float, runs.Group], str]:
    """The runs that differ in beta alone (and --where), by beta, and their preset; CannotDraw if
    under two.

    A beta for each stage is no value of the sweep.
    """
    groups = runs.load(options.runs, options.unfinished)
    where, found = runs.asked(options, groups), {}
    mine = [g for g in groups if (g.method, g.task) == (method, env_id)]
    mine = [g for g in mine if runs.as_asked(g, where, free=("kl_coef",))]
    preset = runs.pick_preset(mine, options)
    mine.sort(
        key=lambda g: len(runs.items(g.settings.get("kl_coef", [])))
    )  # one value before one a stage
    for group in (g for g in mine if g.preset == preset):
        betas = set(
            runs.items(group.settings.get("kl_coef", runs.preset_args(method, preset)["kl_coef"]))
        )
        if len(betas) != 1 or betas & set(found):
            print(f"left out: {group}")
        else:
            found[betas.pop()] = group
    if len(found) < 2:
        have = f"only beta {', '.join(map(str, found))}" if found else "none"
        what = f"runs of {method}.py on {env_id}, preset {preset}, with two values of --kl-coef"
        raise runs.CannotDraw(f"a sweep needs {what}; there: {have}")
    return dict(sorted(found.items())), preset


def draw(
    options: runs.Options,
    method: Literal["gorl_fm_ppo", "gorl_diff_ppo"] = "gorl_fm_ppo",
    env_id: str = "CheetahRun",
) -> list[Path]:
    """Draws Figure 5: learning curves by beta, and the final returns against beta."""
    groups, preset = sweep(options, method, env_id)
    figure, (left, right) = style.panels(2)
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.92, len(groups)))
    for colour, (beta, group) in zip(colours, groups.items(), strict=True):
        print(f"drawn: {group}")
        steps, returns = runs.align(group)
        style.band(left, steps, *runs.mean_std(returns), label=f"$\\beta$ = {beta:g}", color=colour)
    ends = [runs.mean_std(runs.final_returns(group)) for group in groups.values()]
    at = np.arange(len(groups))
    right.errorbar(
        at, [e[0] for e in ends], [e[1] for e in ends], color="#333333", fmt="none", elinewidth=0.8
    )
    right.scatter(at, [e[0] for e in ends], color=colours, s=18, zorder=3)
    right.set_xticks(at, [f"{beta:g}" for beta in groups])
    right.set(xlabel=r"$\beta$", ylabel="final return", ylim=(0, None))
    left.set(title=f"{style.label(method)}, {env_id}", xlim=(0, None), ylim=(0, None))
    text = style.note(groups.values(), preset)
    if missing := [f"{beta:g}" for beta in BETAS if beta not in groups]:
        text += f"; of the paper's sweep, {', '.join(missing)} not run"
    style.finish(figure, [left], text, columns=4)
    return style.save(figure, options.out, "figure_5")


if __name__ == "__main__":
    sys.exit(runs.command(draw))
