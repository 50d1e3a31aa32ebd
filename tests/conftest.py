"""What tests share: a place for compiled programs, small arguments, an agent as after training."""

import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # command.py takes it away from scripts
# Read when JAX is imported, and by the scripts that tests start. Half the compilation time:
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "gorl" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

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


def name_of(script):
    return script.__name__


@pytest.fixture(scope="session", autouse=True)
def working_directory(tmp_path_factory):
    """Otherwise MuJoCo's log file, and runs of a forgotten --runs-dir, stay in the repository."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)


@pytest.fixture
def point_mass():
    return PointMass()


@pytest.fixture(params=SCRIPTS, ids=name_of)
def script(request):
    return request.param


@pytest.fixture(scope="session")
def make_args():
    """Arguments small enough to run in milliseconds on a PointMass, by default of GoRL(FM)."""

    def make(script=gorl_fm_ppo, **changes):
        sizes = {"num_envs": 4, "unroll_length": 5, "batch_size": 4, "num_minibatches": 2}
        sizes |= {"update_epochs": 2, "total_timesteps": 240, "eval_envs": 4, "episode_length": 20}
        if script in GORL:
            sizes |= {"stage_timesteps": (80, 80, 40, 40), "decoder_epochs": 2}
            sizes |= {"decoder_batch_size": 16, "decoder_buffer_size": 60}
        samplers = {gorl_fm_ppo: "decoder_steps", gorl_diff_ppo: "decoder_steps"}
        samplers |= {fpo: "flow_steps", dppo: "denoising_steps"}
        if script in samplers:
            sizes[samplers[script]] = 3  # half of what ten take to compile
        return replace(script.Args(), **sizes | changes)

    return make


def randomize(tree, key, scale):
    """The tree with noise on every array of it."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.map(lambda x, n: x + scale * n, tree, jax.tree.unflatten(structure, noise))


def trained_network(network, key, scale):
    """Parameters and Adam's moments as after seven steps."""
    keys = jax.random.split(key, 3)
    adam = network.opt_state[0]
    mu = randomize(adam.mu, keys[0], 0.05)
    nu = jax.tree.map(jnp.abs, randomize(adam.nu, keys[1], 0.05))
    adam = adam._replace(count=adam.count + 7, mu=mu, nu=nu)
    params = randomize(network.params, keys[2], scale)
    opt_state = (adam, *network.opt_state[1:])
    return network.replace(step=network.step + 7, params=params, opt_state=opt_state)


def trained(agent, key):
    """The agent with networks and statistics as after training, decoder and its own included."""
    keys = jax.random.split(key, 5)
    obs_shape = agent.stats.mean.shape
    mean = jax.random.normal(keys[0], obs_shape)
    var = jax.random.uniform(keys[1], obs_shape, minval=0.5, maxval=2.0)
    stats = agent.stats.replace(mean=mean, std=jnp.sqrt(var), summed_variance=1000 * var)
    stats = stats.replace(count=stats.count + 1000)
    policy = "encoder" if "encoder" in agent._fields else "actor"
    policy_network = trained_network(getattr(agent, policy), keys[2], 0.05)
    critic = trained_network(agent.critic, keys[3], 0.05)
    agent = agent._replace(**{policy: policy_network}, critic=critic, stats=stats)
    if policy == "actor":
        return agent
    decoder = trained_network(agent.decoder, keys[4], 0.1)
    return agent._replace(decoder=decoder, decoder_stats=stats.replace(mean=mean + 0.5))


def ended(process, timeout=300):
    """Exit status, output and errors of a process, which has its open files as `files`."""
    try:
        process.wait(timeout)
    finally:
        process.kill()
        for file in process.files:
            file.seek(0)
        out, err = (file.read() for file in process.files)
        print(out[-2000:], err[:4000])  # pytest shows it if the test fails
    return process.returncode, out, err
