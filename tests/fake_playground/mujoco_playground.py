"""Playground's place, for programs that start scripts: its tasks are all the point mass of `toy.py`."""

import sys
from pathlib import Path
from types import SimpleNamespace

import mujoco

sys.path.append(str(Path(__file__).parent.parent))
from toy import PointMass

MjxEnv = PointMass


class Env(PointMass):
    """What `make_env` also touches."""

    _mjx_model, mj_model = (), mujoco.MjModel.from_xml_string("<mujoco/>")


TASKS = ("CheetahRun", "FingerSpin", "FingerTurnHard", "FishSwim", "HopperStand", "WalkerWalk")
dm_control_suite = SimpleNamespace(
    ALL_ENVS=TASKS,
    get_default_config=lambda env_id: SimpleNamespace(impl="warp"),
    load=lambda env_id, config: Env(),
)
