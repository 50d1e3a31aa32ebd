"""What seeds compute, for test_devices.py, on as many devices as XLA_FLAGS gives this process.

python tests/devices.py out.npz: rollouts and gradients of all scripts on a point mass, physics of CheetahRun,
and how often a whole run compiles its programs; arrays by `script/number of seeds/seed/what`. For
several processes, python tests/devices.py out.npz HOST:PORT NUMBER ID: of GoRL(FM), one seed on
two and two seeds on four, and physics on two.
"""

import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils as hosts

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from conftest import SCRIPTS, trained  # noqa: E402
from toy import PointMass  # noqa: E402

import gorl_fm_ppo  # noqa: E402
import ppo_gaussian  # noqa: E402

SIZES = {"num_envs": 8, "unroll_length": 5, "batch_size": 8, "num_minibatches": 1, "update_epochs": 1}
SIZES |= {"eval_envs": 8, "episode_length": 20}
DECODER = {"decoder_batch_size": 40, "decoder_buffer_size": 80, "decoder_epochs": 3}


def make_args(script: Any, **changes: Any) -> Any:
    fields = script.Args.__dataclass_fields__
    sizes = SIZES | {k: v for k, v in DECODER.items() if k in fields} | {"max_grad_norm": 0.0} | changes
    return replace(script.Args(), **sizes)


def one_unroll_and_gradient(script: Any, args: Any, env: Any, key: jax.Array) -> dict[str, Any]:
    """Of a seed: initial states, a rollout, and gradients of an update and a decoder step, on fixed data."""
    state = script.begin(args, env, key, 0)
    agent = trained(state.agent, jax.random.PRNGKey(5))
    envs, steps, last_obs, _ = script.rollout(args, env, agent, state.envs, jax.random.fold_in(key, 1))
    obs = jax.random.normal(
        jax.random.PRNGKey(6), (args.batch_size, args.unroll_length, env.observation_size)
    )
    u, drawn = script.act(args, agent, obs, jax.random.PRNGKey(7), False)
    reward, truncated = jax.random.uniform(jax.random.PRNGKey(8), u.shape[:2]), jnp.zeros(u.shape[:2], bool)
    batch = script.Transitions(obs + 0.1, u, drawn, reward, truncated.at[0, 2].set(True))
    opt = jax.tree.map(jnp.zeros_like, agent.opt)
    updated, _ = script.update(args, agent.replace(opt=opt), batch, obs[:, -1], jax.random.PRNGKey(9))
    out = {"first": state.envs.state, "steps": steps, "last_obs": last_obs, "envs": envs.state}
    # Adam's first moment is a tenth of the gradient.
    out["gradient"] = jax.tree.map(lambda m: 10 * m, {k: x[0].mu for k, x in updated.opt.items()})
    if hasattr(script, "decoder_epoch"):
        rows = args.decoder_buffer_size // args.num_envs
        key = jax.random.PRNGKey(10)
        ring = {"obs": jax.random.normal(key, (rows, args.num_envs, env.observation_size))}
        ring["u"] = 1 + jax.random.normal(key, (rows, args.num_envs, env.action_size))
        ring = script.spread(ring, None, "envs")
        opt = jax.tree.map(jnp.zeros_like, state.learner[1])
        _, opt, loss = script.decoder_epoch(args, 40, agent.decoder, opt, ring, key, 0)
        out |= {"decoder_loss": loss, "decoder_gradient": jax.tree.map(lambda m: 10 * m, opt[0].mu)}
    return out


def gathered(tree: Any) -> dict[str, np.ndarray]:
    """All seeds' arrays by name; of the leaves, since MJX's data of NumPy arrays have fewer."""
    leaves = {jax.tree_util.keystr(name): leaf for name, leaf in jax.tree.leaves_with_path(tree)}
    return hosts.process_allgather(leaves, tiled=True)


def of_seeds(script: Any, args: Any, env: Any, f: Any, first: int, num_seeds: int) -> dict[str, np.ndarray]:
    """What f gives for each seed, on all devices; fails unless environments lie on all of them."""
    args = replace(args, num_seeds=num_seeds)
    script.make_env = lambda args: env
    with jax.set_mesh(script.make_mesh(args)):
        keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(first, first + num_seeds))
        out = script.each_seed(args, partial(f, script, args, env), (0,), None)(keys)
    obs = out["envs"].obs
    places = obs.sharding.devices_indices_map(obs.shape).values()
    assert len({str(index) for index in places}) == jax.device_count(), obs.sharding
    return {
        f"{script.__name__}/{num_seeds}/{first + i}/{name}": array[i]
        for name, array in gathered(out).items()
        for i in range(num_seeds)
    }


def physics(script: Any, args: Any, env: Any, key: jax.Array) -> dict[str, Any]:
    envs = script.reset_envs(env, args.num_envs, key)
    u = jax.random.normal(key, (args.num_envs, env.action_size))
    after, reward, *_ = script.step_envs(args, env, envs, u)
    return {"envs": envs.state, "obs": after.state.obs, "reward": reward}


def compilations(script: Any, num_seeds: int) -> dict[str, np.ndarray]:
    """How many programs each of a run's jitted functions has at its end."""
    made, each_seed = {}, script.each_seed

    def spy(args: Any, f: Any, *rest: Any, **options: Any) -> Any:
        made[f.func.__name__] = each_seed(args, f, *rest, **options)
        return made[f.func.__name__]

    script.each_seed, script.make_env = spy, lambda args: PointMass()
    args = make_args(script, num_seeds=num_seeds, eval_every=80, stage_timesteps=(80, 80, 40))
    args = replace(args, max_grad_norm=(0.0,))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "checkpoints").mkdir()
        assert script.train(args, Path(folder), [], bool)
    script.each_seed = each_seed
    return {f"{script.__name__}/{num_seeds}/programs/{k}": np.array(f._cache_size()) for k, f in made.items()}


def main() -> None:
    out, *where = sys.argv[1:]
    found: dict[str, np.ndarray] = {}
    if where:
        jax.distributed.initialize(where[0], int(where[1]), int(where[2]))
    jax.config.update("jax_default_matmul_precision", "highest")
    cheetah = replace(ppo_gaussian.Args(), env_id="CheetahRun", **SIZES)
    env = ppo_gaussian.make_env(cheetah)  # `of_seeds` puts other environments in its place
    several = [(2, 1), (1, 4 if jax.device_count() == 1 else 2)]  # the first seed and their number
    for script in [gorl_fm_ppo] if where else SCRIPTS:
        coefficients = {"kl_coef": 0.0, "clip_eps": 0.2} if hasattr(script, "stage_ends") else {}
        args = make_args(script, **coefficients)
        for first, num_seeds in several[jax.process_count() == 4 : 1 if jax.process_count() == 2 else 2]:
            found |= of_seeds(script, args, PointMass(), one_unroll_and_gradient, first, num_seeds)
    if jax.process_count() < 4:
        found |= {f"real/{k}": v for k, v in of_seeds(ppo_gaussian, cheetah, env, physics, 2, 1).items()}
    if jax.local_device_count() == 4:  # two rows of two devices, three seeds each
        args = make_args(gorl_fm_ppo, kl_coef=0.0, clip_eps=0.2)
        found |= of_seeds(gorl_fm_ppo, args, PointMass(), one_unroll_and_gradient, 1, 6)
    if not where:
        found |= compilations(gorl_fm_ppo, 1) | compilations(gorl_fm_ppo, 2)
    if jax.process_index() == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    main()
