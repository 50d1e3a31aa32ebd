"""Environments that compile in no time, and a script, run by its command line, on one of them.

python tests/toy.py gorl_fm_ppo --seed 1
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as the scripts, which come after JAX here

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

    observation_size = 3
    action_size = 2

    def reset(self, key):
        data = {"x": jax.random.uniform(key, (2,), minval=-1), "fuse": jnp.int32(10**6)}
        return self.observe(data, 0.0)

    def observe(self, data, done):
        x = data["x"]
        obs = jnp.append(x, x.sum())
        return State(data, obs, jnp.exp(-jnp.square(x).sum()), jnp.float32(done))

    def step(self, state, action):
        fuse = state.data["fuse"] - 1
        x = jnp.where(fuse == 0, jnp.nan, state.data["x"] + 0.1 * action)
        return self.observe({"x": x, "fuse": fuse}, jnp.isnan(x).any())


class Walled(PointMass):
    """An episode is over, in a real terminal state, where the point has left the square."""

    def step(self, state, action):
        state = super().step(state, action)
        outside = (jnp.abs(state.data["x"]) > 1).any()
        return state.replace(done=jnp.maximum(state.done, outside))


def main():
    script = importlib.import_module(sys.argv[1])
    script.make_env = lambda args: PointMass()
    sys.argv = [script.__file__, *sys.argv[2:]]
    script.main()


if __name__ == "__main__":
    sys.path[:0] = [
        str(Path(__file__).parent.parent),
        str(Path(__file__).parent / "fake_playground"),
    ]
    main()
