r"""Figure 6: the encoder trained anew on each frozen decoder of a GoRL run, stage by stage.

for step in 59965440 119930880 150405120 179896320; do  # the ends of stages 0 to 3
    python gorl_fm_ppo.py --env-id HopperStand --num-seeds 5 --stage-timesteps 60000000 \
        --decoder-from RUN_DIR/checkpoints/policy_$step.npz
done
python -m plotting.figure_6
"""

import sys
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt

from plotting import runs, style
from plotting.paper import STAGE_TASKS, TASKS


def by_stage(
    options: runs.Options, method: str
) -> tuple[dict[str, dict[int | str, runs.Group]], str]:
    """Runs of one stage on a frozen decoder, by task and decoder's stage, and their preset.

    Beside decoder and --where they may differ from the preset in length alone. Of several lengths
    of a task, the one with the most stages is drawn, or the longest of those. A decoder whose run
    is not at hand goes by its file's name. CannotDraw if there is no such run.
    """
    groups = runs.load(options.runs, options.unfinished)
    where = runs.asked(options, groups)
    free = ("decoder_from", "total_timesteps", "stage_timesteps")
    mine = [g for g in groups if g.method == method and "decoder_from" in g.settings]
    mine = [g for g in mine if not runs.refinements(g) and runs.as_asked(g, where, free)]
    preset = runs.pick_preset(mine, options)
    found: dict[str, dict[int, dict[int | str, runs.Group]]] = {}
    for group in (g for g in mine if g.preset == preset):
        stages = found.setdefault(group.task, {}).setdefault(group.total, {})
        if stages.setdefault(group.settings["decoder_from"], group) is not group:
            print(f"left out: {group}")
    if not found:
        text = f"no finished run of {method}.py of one stage with --decoder-from POLICY_FILE"
        raise runs.CannotDraw(text)
    best = {}
    for task in sorted(found, key=[*TASKS, *found].index):
        total = max(found[task], key=lambda total: (len(found[task][total]), total))
        stages = sorted(found[task][total], key=lambda stage: (isinstance(stage, str), stage))
        best[task] = {stage: found[task][total][stage] for stage in stages}
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
        for i, (stage, group) in enumerate(stages.items()):
            print(f"drawn: {group}")
            steps, returns = runs.align(group)
            name = f"decoder of {stage}" if isinstance(stage, str) else f"decoder of stage {stage}"
            if stage == 0:
                name += " (identity)"
            colour = plt.get_cmap("viridis")(min(i if isinstance(stage, str) else stage, 3) / 3.3)
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
