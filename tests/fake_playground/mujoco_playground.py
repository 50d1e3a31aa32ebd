"""In Playground's place, for programs that start scripts: all tasks are the toy's point mass."""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parent.parent))
from toy import PointMass

ALL_ENVS = ("CheetahRun", "FingerSpin", "FingerTurnHard", "FishSwim", "HopperStand", "WalkerWalk")
registry = SimpleNamespace(
    ALL_ENVS=ALL_ENVS,
    get_default_config=lambda env_id: SimpleNamespace(impl="warp"),
    load=lambda env_id, config: PointMass(),
)
