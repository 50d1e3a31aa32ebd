"""Saved policies: opening one, and letting it act, by the functions of the script that trained it."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from plotting import runs


def prepare_jax() -> None:
    """Physics in full float32 and compiled programs kept on disk, as the scripts do."""
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gorl" / "jax"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)))
    jax.config.update("jax_default_matmul_precision", "highest")


def saved_steps(run: Path) -> list[int]:
    """Steps of which a run directory has a policy file, in order."""
    names = (re.fullmatch(r"policy_(\d+)\.npz", file.name) for file in run.glob("checkpoints/*"))
    return sorted(int(name[1]) for name in names if name)


def open_run(run: Path) -> tuple[ModuleType, Any]:
    """The script that made a run directory, and its arguments; ValueError if it is none of a script here."""
    stem = Path(runs.read_args(run)["versions"]["script"]).stem
    if (script := runs.script_of(stem)) is None:
        raise ValueError(f"its script, {stem}.py, is not here")
    if (args := script.load_args(str(run))) is None:
        raise ValueError(f"its args.json is not one of {stem}.py as it is here")
    return script, args


def open_policy(
    run: Path, step: int | None = None, seed: int | None = None
) -> tuple[ModuleType, Any, Callable[..., Any], int, int]:
    """Script, arguments, the policy f(obs, key, deterministic) -> u, its step and seed.

    By default the last step's and the first seed's; ValueError if there is no such policy or it is damaged.
    """
    script, args = open_run(run)
    if not (steps := saved_steps(run)):
        raise ValueError("it has no policy in checkpoints/policy_<step>.npz")
    step, seed = steps[-1] if step is None else step, args.seed if seed is None else seed
    prepare_jax()
    try:
        return script, args, script.load_policy(str(run), step=step, seed=seed), step, seed
    except ValueError:
        raise
    except Exception as error:  # a damaged archive: zipfile, zlib and NumPy each have their own
        raise ValueError(f"policy_{step}.npz is damaged ({error})") from None


def evaluate(
    script: ModuleType,
    args: Any,
    policy: Callable[..., Any],
    step: int,
    env_seed: int,
    episodes: int,
    deterministic: bool,
    record: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Undiscounted returns (episodes,), as the scripts' `evaluate` counts them, and what `record` has seen.

    Initial states and noise follow from `env_seed` and the step as in training's own evaluations, so that a
    run's row of eval.csv comes out again for its own seed. Recorded: the first episode's qpos, qvel,
    mocap_pos, mocap_quat (T, ...), up to where its physics broke, if they did.
    """
    import jax
    import jax.numpy as jnp

    args = replace(args, eval_envs=episodes)
    size = args.batch_size * args.num_minibatches * args.unroll_length
    env, seed_key, index = script.make_env(args), jax.random.PRNGKey(env_seed), 2 * (step // size)

    def one_step(carry: tuple, key: Any) -> tuple[tuple, dict]:
        envs, running, returns = carry
        data = envs.state.data
        names = ("qpos", "qvel", "mocap_pos", "mocap_quat") if record else ()
        seen = {name: getattr(data, name)[0] for name in names}
        u = policy(envs.state.obs, key, deterministic)
        envs, reward, _, broken = script.step_envs(args, env, envs, u)
        running &= ~broken
        reward = jnp.where(running, reward, 0.0)
        return (envs, running, returns + reward), (seen, running[0])

    @jax.jit
    def run() -> tuple[Any, dict]:
        envs = script.reset_envs(env, episodes, script.derive_key(seed_key, script.EVAL_RESET, index))
        keys = jax.random.split(script.derive_key(seed_key, script.EVAL_ACT, index), args.episode_length)
        start = (envs, jnp.ones(episodes, bool), jnp.zeros(episodes))
        carry, seen = jax.lax.scan(one_step, start, keys)
        return carry[2], seen

    returns, (seen, running) = run()
    return np.asarray(returns), {
        name: np.asarray(values)[np.asarray(running)] for name, values in seen.items()
    }
