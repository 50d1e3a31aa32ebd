"""Saved policies: opening one, and letting it act, by functions of the script that trained it."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from plotting import runs


def saved_steps(run: Path) -> list[int]:
    """Steps of which a run directory has a policy file, in order."""
    names = (re.fullmatch(r"policy_(\d+)\.npz", file.name) for file in run.glob("checkpoints/*"))
    return sorted(int(name[1]) for name in names if name)


def made_once(make_env: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`make_env`, which remembers what it has made: arguments of a fork need not be hashable."""
    made: dict[str, Any] = {}

    @wraps(make_env)
    def remembering(args: Any) -> Any:
        if repr(args) not in made:
            made[repr(args)] = make_env(args)
        return made[repr(args)]

    remembering.made = made
    return remembering


def open_run(run: Path) -> tuple[ModuleType, Any]:
    """The script that made a run directory, and its arguments; ValueError if it is none of a script
    here.
    """
    stem = Path(runs.read_args(run)["versions"]["script"]).stem
    script = runs.script_of(stem)
    if script is None:
        raise ValueError(f"its script, {stem}.py, is not here")
    if not hasattr(script.make_env, "made"):
        script.make_env = made_once(script.make_env)  # seconds, which each policy would take anew
    try:
        return script, script.load_args(run)
    except Exception as error:  # a fork's script may do anything
        text = f"its args.json is not one of {stem}.py as it is here ({error})"
        raise ValueError(text) from None


def open_policy(
    run: Path, step: int | None = None, seed: int | None = None
) -> tuple[ModuleType, Any, Callable[..., Any], int, int]:
    """Script, arguments, the policy f(obs, key, deterministic) -> u, its step and seed.

    By default the last step's and the first seed's; ValueError if there is no such policy or it is
    damaged.
    """
    script, args = open_run(run)
    steps = saved_steps(run)
    seeds = range(args.seed, args.seed + args.num_seeds)
    if not steps:
        raise ValueError("it has no policy in checkpoints/policy_<step>.npz")
    step = steps[-1] if step is None else step
    seed = args.seed if seed is None else seed
    if step not in steps or seed not in seeds:
        have = f"but steps {', '.join(map(str, steps))}, seeds {', '.join(map(str, seeds))}"
        raise ValueError(f"it has no step {step}, seed {seed}, {have}")
    try:
        return script, args, script.load_policy(run, step=step, seed=seed), step, seed
    except Exception as error:  # zipfile, zlib and NumPy each have their own
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
    """Undiscounted returns (episodes,), as the scripts' `evaluate` counts them, and what `record`
    has seen.

    Initial states and noise follow from `env_seed` and the step as in training's own evaluations,
    so that a run's row of eval.csv comes out again for its own seed. Recorded: the first episode's
    qpos, qvel, mocap_pos, mocap_quat (T, ...) before each of its steps.
    """
    import jax
    import jax.numpy as jnp

    args = replace(args, eval_envs=episodes)
    env = script.make_env(args)
    eval_key = jax.random.fold_in(jax.random.PRNGKey(env_seed), 1)
    iterations = step // args.steps_per_iteration
    reset_key, act_key = jax.random.split(jax.random.fold_in(eval_key, iterations))
    names = ("qpos", "qvel", "mocap_pos", "mocap_quat") if record else ()

    def env_step(carry: tuple, key: Any) -> tuple[tuple, tuple]:
        envs, running = carry
        seen = {name: getattr(envs.state.data, name)[0] for name in names}
        u = policy(envs.state.obs, key, deterministic)
        envs, reward, terminated, truncated, _ = script.step_envs(args, env, envs, u)
        reward = jnp.where(running, reward, 0.0)
        return (envs, running & ~terminated & ~truncated), (reward, seen, running[0])

    @jax.jit
    def run() -> tuple[Any, dict, Any]:
        start = script.reset_envs(env, episodes, reset_key), jnp.ones(episodes, bool)
        keys = jax.random.split(act_key, args.episode_length)
        _, (rewards, seen, running) = jax.lax.scan(env_step, start, keys)
        return rewards.sum(axis=0), seen, running

    returns, seen, running = jax.device_get(run())
    return returns, {name: values[running] for name, values in seen.items()}
