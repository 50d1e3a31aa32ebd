"""Figure 3: what the six tasks look like.

python -m plotting.figure_3 --out figures
"""

import sys
from pathlib import Path

import numpy as np

from plotting import render, runs, style
from plotting.paper import TASKS


def picture(env_id: str, seconds: float, height: int, width: int) -> np.ndarray:
    """The task (height, width, 3), seconds of small random actions from its default pose on."""
    import mujoco
    from mujoco_playground import dm_control_suite

    config = dm_control_suite.get_default_config(env_id)
    config.impl = "jax"
    model = dm_control_suite.load(env_id, config=config).mj_model
    data, random = mujoco.MjData(model), np.random.default_rng(0)
    while data.time < seconds:
        data.ctrl[:] = 0.9 * data.ctrl + 0.1 * random.normal(size=model.nu)
        mujoco.mj_step(model, data)
    state = {
        name: getattr(data, name)[None] for name in ("qpos", "qvel", "mocap_pos", "mocap_quat")
    }
    return next(render.frames(env_id, model, state, height, width))


def draw(options: runs.Options, seconds: float = 0.2) -> list[Path]:
    """Renders a frame of each of the paper's tasks; no logs are read. CannotDraw without OpenGL."""
    render.pick_backend()
    figure, axes = style.panels(len(TASKS), height=1.6)
    for panel, task in zip(axes, TASKS, strict=True):
        panel.imshow(picture(task, seconds, 480, 640))
        panel.set(title=task, xlabel="", ylabel="")
        panel.set_axis_off()
    return style.save(figure, options.out, "figure_3")


if __name__ == "__main__":
    sys.exit(runs.command(draw))
