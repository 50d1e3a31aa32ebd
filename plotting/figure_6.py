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
from plotting.paper import METHODS, STAGE_TASKS, TASKS


def by_stage(options: runs.Options, method: str) -> dict[str, dict[int | str, runs.Group]]:
    """Runs of one stage on a frozen decoder, by task and decoder's stage.

    Of several settings of a task, the one with the most stages is drawn, then the longest. A
    decoder whose run is not at hand goes by its file's name. CannotDraw if there is no such run.
    """

    def drawable(group: runs.Group) -> bool:
        frozen = group.method == method and "decoder_from" in group.settings
        return frozen and not runs.refinements(group)

    found: dict[str, dict[str, dict[int | str, runs.Group]]] = {}
    for group in sorted(runs.pool(options, drawable), key=runs.plainness):
        alike = found.setdefault(group.task, {})
        stages = alike.setdefault(runs.without(group, "decoder_from"), {})
        stages.setdefault(group.settings["decoder_from"], group)
    if not found:
        text = f"no finished run of {method}.py of one stage with --decoder-from POLICY_FILE"
        raise runs.CannotDraw(text)
    best = {}
    for task in sorted(found, key=[*TASKS, *found].index):
        stages = max(found[task].values(), key=len)
        order = sorted(stages, key=lambda stage: (isinstance(stage, str), stage))
        best[task] = {stage: stages[stage] for stage in order}
    drawn = [group for stages in best.values() for group in stages.values()]
    runs.report(drawn, runs.load(options.runs, options.unfinished), "on no such decoder")
    return best


def draw(
    options: runs.Options, method: Literal["gorl_fm_ppo", "gorl_diff_ppo"] = "gorl_fm_ppo"
) -> list[Path]:
    """Draws Figure 6: a panel a task, a learning curve a decoder."""
    tasks = by_stage(options, method)
    figure, axes = style.panels(len(tasks))
    for panel, (task, stages) in zip(axes, tasks.items(), strict=True):
        for i, (stage, group) in enumerate(stages.items()):
            steps, returns = runs.align(group)
            name = f"decoder of {stage}" if isinstance(stage, str) else f"decoder of stage {stage}"
            if stage == 0:
                name += " (untrained)"
            colour = plt.get_cmap("viridis")(0.9 * i / max(1, len(stages) - 1))
            style.band(panel, steps, *runs.mean_std(returns), label=name, color=colour)
        panel.set(title=f"{METHODS[method]}, {task}", xlim=(0, None))
        style.from_zero(panel)
    every = [group for stages in tasks.values() for group in stages.values()]
    text = style.note(every, paper=60_000_000, swept=("decoder_from", "stage_timesteps"))
    if missing := [task for task in STAGE_TASKS if task not in tasks]:
        text += f" Of the paper's tasks, {' and '.join(missing)} not run."
    style.finish(figure, axes, text, columns=4 if len(tasks) > 1 else 2)
    return style.save(figure, options.out, "figure_6")


if __name__ == "__main__":
    sys.exit(runs.command(draw))
