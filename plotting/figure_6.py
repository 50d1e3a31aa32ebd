"""Figure 6: the encoder trained anew on each frozen decoder of a GoRL run, stage by stage.

for stage in 0 1 2 3; do
    python gorl_fm_ppo.py --env-id HopperStand --num-seeds 5 --decoder-from RUN_DIR:$stage
done
python -m plotting.figure_6
"""

import sys
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt

from plotting import runs, style
from plotting.paper import STAGE_TASKS, TASKS


def by_stage(options: runs.Options, method: str) -> tuple[dict[str, dict[int, runs.Group]], str]:
    """Runs on a frozen decoder, by task and decoder's stage, and their preset; CannotDraw if there is none.

    Beside decoder and --where they may differ from the preset in length alone. Of several lengths of a task,
    the one with the most stages is drawn, or the longest of those.
    """
    groups = runs.load(options.runs, options.unfinished)
    where, free = runs.asked(options, groups), ("decoder_from", "total_timesteps", "stage_timesteps")
    mine = [g for g in groups if g.method == method and "decoder_from" in g.settings]
    mine = [g for g in mine if runs.as_asked(g, where, free)]
    preset = runs.pick_preset(mine, options)
    found: dict[str, dict[int, dict[int, runs.Group]]] = {}
    for group in (g for g in mine if g.preset == preset):
        stages = found.setdefault(group.task, {}).setdefault(group.total, {})
        if stages.setdefault(group.settings["decoder_from"], group) is not group:
            print(f"left out: {group}")
    if not found:
        raise runs.CannotDraw(f"no finished run of {method}.py with --decoder-from RUN_DIR:STAGE")
    best = {}
    for task in sorted(found, key=[*TASKS, *found].index):
        total = max(found[task], key=lambda total: (len(found[task][total]), total))
        best[task] = dict(sorted(found[task][total].items()))
        for other in set(found[task]) - {total}:
            print(f"left out: {task}, runs of {other / 1e6:g}M steps")
    return best, preset


def draw(
    options: runs.Options, method: Literal["gorl_fm_ppo", "gorl_diff_ppo"] = "gorl_fm_ppo"
) -> list[Path]:
    """Draws Figure 6: a panel a task, a learning curve a decoder."""
    tasks, preset = by_stage(options, method)
    figure, axes = style.panels(len(tasks))
    for panel, (task, stages) in zip(axes, tasks.items(), strict=True):
        for stage, group in stages.items():
            print(f"drawn: {group}")
            steps, returns = runs.align(group)
            name = f"decoder of stage {stage}" + " (identity)" * (stage == 0)
            colour = plt.get_cmap("viridis")(min(stage, 3) / 3.3)
            style.band(panel, steps, *runs.mean_std(returns), label=name, color=colour)
        panel.set(title=f"{style.label(method)}, {task}", xlim=(0, None), ylim=(0, None))
    every = [group for stages in tasks.values() for group in stages.values()]
    text = style.note(every, preset, paper=60_000_000)
    if missing := [task for task in STAGE_TASKS if task not in tasks]:
        text += f"; {' and '.join(missing)} not run"
    style.finish(figure, axes, text, columns=4 if len(tasks) > 1 else 2)
    return style.save(figure, options.out, "figure_6")


if __name__ == "__main__":
    sys.exit(runs.command(draw))
