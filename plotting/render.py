"""Pictures of MuJoCo scenes on machines without a display."""

import contextlib
import os
import subprocess
import sys
from typing import Any

import numpy as np

from plotting.runs import CannotDraw

CAMERA = {
    "HopperStand": "cam0",
    "FingerSpin": "cam0",
    "FingerTurnHard": "cam0",
    "FishSwim": "tracking_x",
}
PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco/>")
mujoco.Renderer(model, 8, 8).update_scene(mujoco.MjData(model))
"""


def pick_backend() -> str:
    """The OpenGL backend that works here, EGL (GPU or software) or OSMesa, put into MUJOCO_GL.

    MuJoCo reads MUJOCO_GL when it is imported, so this comes before. CannotDraw if neither works; a
    backend that the user has set is taken as it is, if it works.
    """
    if "mujoco" in sys.modules and "MUJOCO_GL" not in os.environ:
        raise RuntimeError("pick_backend has to be called before mujoco is imported")
    asked = os.environ.get("MUJOCO_GL")
    for backend in [asked] if asked else ["egl", "osmesa"]:
        environment, probe = os.environ | {"MUJOCO_GL": backend}, [sys.executable, "-c", PROBE]
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hang
            if (
                subprocess.run(probe, env=environment, capture_output=True, timeout=60).returncode
                == 0
            ):
                os.environ["MUJOCO_GL"] = backend
                return backend
    tried = f"MUJOCO_GL={asked}" if asked else "EGL and OSMesa"
    raise CannotDraw(
        f"no OpenGL without a display ({tried} tried): install libegl1 with a driver, or libosmesa6"
    )


def frames(env_id: str, model: Any, states: dict[str, np.ndarray], height: int, width: int) -> Any:
    """Yields a picture (height, width, 3), uint8, for each row of the states' arrays (T, ...).

    `states` has what MuJoCo needs to place everything: qpos, qvel, mocap_pos, mocap_quat.
    """
    import mujoco

    camera = CAMERA.get(env_id, 0 if model.ncam else -1)
    model.vis.global_.offwidth, model.vis.global_.offheight = max(width, 640), max(height, 480)
    with mujoco.Renderer(model, height, width) as renderer:
        data = mujoco.MjData(model)
        for i in range(len(states["qpos"])):
            for name, values in states.items():
                getattr(data, name)[:] = values[i]
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, camera)
            yield renderer.render()
