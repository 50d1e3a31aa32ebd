"""Shared fixtures: a compilation cache for this process and its children, environments that compile fast."""

import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from toy import PointMass

import dppo
import fpo
import gorl_diff_ppo
import gorl_fm_ppo
import ppo_gaussian

GORL = [gorl_fm_ppo, gorl_diff_ppo]
SCRIPTS = [*GORL, ppo_gaussian, fpo, dppo]

# Half the compilation time; read when the first array is made, and by child processes.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Compiled programs are kept between sessions; MuJoCo's log file goes to a temporary directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gorl" / "tests"
    cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    jax.config.update("jax_compilation_cache_dir", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # for child processes
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield cache
    os.chdir(before)


class NanReward(PointMass):
    def step(self, state, action):
        new = super().step(state, action)
        reward = jnp.where(jnp.isnan(new.obs[0]), jnp.nan, 1.0)
        return new.replace(reward=reward, obs=jnp.zeros(3), done=jnp.zeros(()))


class NanObs(PointMass):
    def step(self, state, action):
        return super().step(state, action).replace(reward=jnp.ones(()), done=jnp.zeros(()))


class HugeObs(PointMass):
    """Physics that blows up in finite numbers."""

    def step(self, state, action):
        new = super().step(state, action)
        obs = jnp.where(jnp.isnan(new.obs), 1e10, new.obs)
        return new.replace(reward=jnp.ones(()), done=jnp.zeros(()), obs=obs)


class NanDone(PointMass):
    def step(self, state, action):
        return super().step(state, action).replace(reward=jnp.ones(()), obs=jnp.zeros(3))


@pytest.fixture
def point_mass():
    return PointMass()


@pytest.fixture(params=[PointMass, NanReward, NanObs, HugeObs, NanDone])
def nan_env(request):
    return request.param()


def name_of(script):
    return script.__name__


@pytest.fixture(params=SCRIPTS, ids=name_of)
def script(request):
    return request.param


@pytest.fixture(scope="session")
def make_args():
    """Arguments small enough to run in milliseconds on a PointMass, of GoRL(FM) or another script."""

    def make(script=gorl_fm_ppo, **changes):
        sizes = {"num_envs": 4, "unroll_length": 5, "batch_size": 4, "num_minibatches": 2, "update_epochs": 2}
        sizes |= {"total_timesteps": 240, "eval_envs": 4, "episode_length": 20}
        if script in GORL:  # coefficients as in an iteration: those of its stage
            sizes |= {
                "stage_timesteps": (80, 80, 40, 40),
                "kl_coef": 0.0,
                "clip_eps": 0.2,
                "max_grad_norm": 1.0,
            }
        return replace(script.Args(), **sizes | changes)

    return make


def randomize(tree, key, scale):
    """The tree with noise on every floating leaf: networks and statistics as after some training."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    new = [
        x + scale * jax.random.normal(k, x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def trained(agent, key):
    """An agent with weights, Adam states and statistics (positive variance and count) as after training."""
    keys, obs_dim = jax.random.split(key, 4), agent.stats.mean.shape
    mean, var = (
        jax.random.normal(keys[0], obs_dim),
        jax.random.uniform(keys[1], obs_dim, minval=0.5, maxval=2.0),
    )
    stats = agent.stats._replace(count=jnp.float32(1000), mean=mean, var=var)
    params, opt = randomize(agent.params, keys[2], 0.05), randomize(agent.opt, keys[2], 0.05)
    opt = jax.tree.map(lambda x: x + 7 if x.dtype == jnp.int32 else jnp.abs(x), opt)
    agent = agent.replace(params=params, opt=opt, stats=stats)
    if not hasattr(agent, "decoder"):
        return agent
    net = randomize(agent.decoder["net"], keys[3], 0.1)
    return agent.replace(decoder={"net": net, "stats": stats._replace(mean=mean + 0.5)})


def processes(count, *command, flag=(), each=((),) * 4):
    """Python `count` times, each told where the first is, their number and its own; see `ended`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address, started = f"localhost:{free.getsockname()[1]}", []
    for i in range(count):
        files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        line = [sys.executable, *map(str, command), *each[i], *flag, address, str(count), str(i)]
        started.append(subprocess.Popen(line, stdout=files[0], stderr=files[1]))
        started[-1].files = files
    return started


def ended(process, timeout=300):
    """Exit status, standard output and errors of a process that is awaited."""
    try:
        process.wait(timeout)
    finally:
        process.kill()
        for file in process.files:
            file.seek(0)
        out, err = (file.read() for file in process.files)
        # JAX 0.10 says of each program in its cache, in kilobytes, that it was compiled for this machine.
        err = "".join(line for line in err.splitlines(True) if "cpu_aot_loader" not in line)
        print(out[-2000:], err[:4000])  # pytest shows it if the test fails
    return process.returncode, out, err
