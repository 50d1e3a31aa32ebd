"""An environment that compiles in no time, and a script as a user runs it, by its command line, on that.

python tests/toy.py gorl_fm_ppo --seed 1
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class State:
    """As Playground's."""

    data: Any
    obs: jax.Array
    reward: jax.Array
    done: jax.Array


class PointMass:
    """A point pushed in the plane; it goes NaN when its fuse is down."""

    observation_size, action_size = 3, 2

    def reset(self, key):
        data = {"x": jax.random.uniform(key, (2,), minval=-1), "fuse": jnp.int32(10**6)}
        return self.observe(data, 0.0)

    def observe(self, data, done):
        obs = jnp.append(data["x"], data["x"].sum())
        return State(data, obs, jnp.exp(-jnp.square(data["x"]).sum()), jnp.float32(done))

    def step(self, state, action):
        fuse = state.data["fuse"] - 1
        x = jnp.where(fuse == 0, jnp.nan, state.data["x"] + 0.1 * action)
        return self.observe({"x": x, "fuse": fuse}, jnp.isnan(x).any())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    playground = sys.modules["mujoco_playground"] = ModuleType("mujoco_playground")  # takes seconds to import
    playground.MjxEnv, playground.dm_control_suite = PointMass, ModuleType("dm_control_suite")
    sys.modules["mujoco"] = ModuleType("mujoco")
    sys.modules["mujoco"].mjx = None
    playground.dm_control_suite.ALL_ENVS = ["HopperHop", "HopperStand"]
    script = importlib.import_module(sys.argv[1])
    script.make_env = lambda args: PointMass()
    sys.argv = [script.__file__, *sys.argv[2:]]
    sys.exit(script.main())
