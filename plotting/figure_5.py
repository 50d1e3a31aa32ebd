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
from plotting.paper import BETAS, METHODS


def beta(group: runs.Group) -> float | None:
    """A group's beta; None if its stages have different ones."""
    values = set(runs.items(runs.value_of(group, "kl_coef")))
    return values.pop() if len(values) == 1 else None


def sweep(options: runs.Options, method: str, env_id: str) -> dict[float, runs.Group]:
    """The runs that differ in beta alone, by beta; CannotDraw if under two.

    Of several such sweeps, the one of the most betas, then the longest.
    """

    def drawable(group: runs.Group) -> bool:
        mine = (group.method, group.task) == (method, env_id)
        return mine and beta(group) is not None and "decoder_from" not in group.settings

    sweeps: dict[str, dict[float, runs.Group]] = {}
    for group in sorted(runs.pool(options, drawable), key=runs.plainness):
        sweeps.setdefault(runs.without(group, "kl_coef"), {}).setdefault(beta(group), group)
    found = max(sweeps.values(), key=len, default={})
    if len(found) < 2:
        have = f"only beta {', '.join(map(str, found))}" if found else "none"
        what = f"runs of {method}.py on {env_id} that differ in --kl-coef alone"
        raise runs.CannotDraw(f"a sweep needs two {what}; there: {have}")
    runs.report(list(found.values()), runs.load(options.runs, options.unfinished), "no such sweep")
    return dict(sorted(found.items()))


def draw(
    options: runs.Options,
    method: Literal["gorl_fm_ppo", "gorl_diff_ppo"] = "gorl_fm_ppo",
    env_id: str = "CheetahRun",
) -> list[Path]:
    """Draws Figure 5: learning curves by beta, and the final returns against beta."""
    groups = sweep(options, method, env_id)
    figure, (left, right) = style.panels(2)
    colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.92, len(groups)))
    for colour, (value, group) in zip(colours, groups.items(), strict=True):
        steps, returns = runs.align(group)
        style.band(
            left, steps, *runs.mean_std(returns), label=f"$\\beta$ = {value:g}", color=colour
        )
    ends = [runs.mean_std(runs.final_returns(group)) for group in groups.values()]
    at = np.arange(len(groups))
    right.errorbar(
        at, [e[0] for e in ends], [e[1] for e in ends], color="#333333", fmt="none", elinewidth=0.8
    )
    right.scatter(at, [e[0] for e in ends], color=colours, s=18, zorder=3)
    right.set_xticks(at, [f"{value:g}" for value in groups])
    right.set(xlabel=r"$\beta$", ylabel="final return")
    left.set(title=f"{METHODS[method]}, {env_id}", xlim=(0, None))
    style.from_zero(left)
    style.from_zero(right)
    text = style.note(groups.values(), swept=("kl_coef",))
    if missing := [f"{value:g}" for value in BETAS if value not in groups]:
        text += f" Of the paper's sweep, {', '.join(missing)} have not been run."
    style.finish(figure, [left], text, columns=4)
    return style.save(figure, options.out, "figure_5")


if __name__ == "__main__":
    sys.exit(runs.command(draw))
