"""Where a script's time goes: physics alone, rollout, update, whole iterations, decoder training, memory.

    python benchmark/throughput.py --out results/throughput/cheetah.json -- --env-id CheetahRun
    python benchmark/throughput.py --scripts ppo_gaussian fpo dppo -- --env-id CheetahRun

What follows `--` are the arguments of the scripts. All figures are of one process and the same sizes; `sps`
are environment steps a second of all seeds. Each phase is timed after a first call that compiles it
(`cold_seconds`; with a warm persistent compilation cache that is mostly tracing). Of several scripts, the
repetitions take turns, so that whatever else the machine does slows all of them; `over_first` are their
speeds over the first one's.
"""

import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax import lax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Bench:
    """Times the phases of scripts."""

    scripts: tuple[str, ...] = ("gorl_fm_ppo",)  # without .py; of more than one, whole iterations only
    repeats: int = 2  # timed calls of each phase, after one that compiles
    decoder_samples: int = 1_000_000  # pairs of the timed decoder epoch (at most the ring)
    out: str | None = None  # a JSON file to write as well


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the first call, and of the fastest of the others."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return seconds[0], min(seconds[1:])


def physics_only(script: Any, args: Any, env: Any, envs: Any, key: jax.Array) -> Any:
    """As many environment steps as an iteration has, with random actions and no network."""

    def step(envs: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        u = jax.random.normal(key, (args.num_envs, env.action_size))
        envs, reward, *_ = script.step_envs(args, env, envs, u)
        return envs, reward.mean()

    steps = args.batch_size * args.num_minibatches * args.unroll_length // args.num_envs
    return lax.scan(step, envs, jax.random.split(key, steps))


def begin(script: Any, args: Any, env: Any, keys: jax.Array) -> Any:
    """The state of a run before its first iteration."""
    state = jax.jit(jax.vmap(partial(script.begin, args, env), in_axes=(0, None)))(keys, 0)
    return state.replace(learner=None) if hasattr(state, "learner") else state


def iterate(script: Any, args: Any, env: Any) -> Callable:
    """A compiled iteration of all seeds: (state, keys) -> (state, metrics)."""
    first = (0, (0, 0)) if hasattr(args, "stage_timesteps") else (0,)  # iteration; stage, ring
    one = jax.vmap(lambda state, key: script.iteration(args, env, state, key, *first))
    return jax.jit(one, donate_argnums=0)


def measure(bench: Bench, script: Any, args: Any) -> dict[str, Any]:
    env = script.make_env(args)
    size = args.batch_size * args.num_minibatches * args.unroll_length * args.num_seeds
    keys = jax.vmap(jax.random.PRNGKey)(args.seed + jnp.arange(args.num_seeds))
    result: dict[str, Any] = {"steps_per_iteration": size}

    def phase(name: str, call: Callable[[], Any], steps: int | None = size) -> None:
        cold, seconds = timed(call, bench.repeats)
        result[name] = {"cold_seconds": cold, "seconds": seconds} | (
            {"sps": steps / seconds} if steps else {}
        )
        print(f"{name}: {json.dumps(result[name])}", flush=True)

    reset = jax.jit(jax.vmap(partial(script.reset_envs, env, args.num_envs)))
    phase("reset", lambda: reset(keys), steps=None)
    envs = reset(keys)
    physics = jax.jit(jax.vmap(partial(physics_only, script, args, env)))
    phase("physics", lambda: physics(envs, keys))

    agent = jax.vmap(partial(script.init_agent, args, env.observation_size, env.action_size))(keys)
    rollout = jax.jit(jax.vmap(partial(script.rollout, args, env)))
    phase("rollout", lambda: rollout(agent, envs, keys))
    _, steps, last_obs, _ = rollout(agent, envs, keys)

    batch = jax.vmap(script.as_unrolls)(steps)
    last = last_obs.reshape(args.num_seeds, -1, env.observation_size)
    first = {name: value[0] for name, value in asdict(args).items() if isinstance(value, tuple)}
    of_stage = replace(args, **first)
    update = jax.jit(jax.vmap(partial(script.update, of_stage)))
    phase("update", lambda: update(agent, batch, last, keys))

    if hasattr(script, "decoder_epoch"):
        rows = max(1, min(bench.decoder_samples, args.decoder_buffer_size) // args.num_envs)
        tiles = -(-rows // (steps.u.shape[1] * steps.u.shape[2]))

        def ring_of(x: jax.Array) -> jax.Array:
            x = x.reshape(args.num_seeds, -1, *x.shape[3:])
            return jnp.concatenate([x] * tiles, axis=1)[:, :rows]

        ring, pairs = {"obs": ring_of(steps.obs), "u": ring_of(steps.u)}, rows * args.num_envs
        opt = jax.vmap(script.optax.adam(args.decoder_learning_rate).init)(agent.decoder["net"])
        epoch = jax.jit(jax.vmap(partial(script.decoder_epoch, args, pairs)))
        index = jnp.zeros(args.num_seeds, jnp.int32)
        phase("decoder_epoch", lambda: epoch(agent.decoder, opt, ring, keys, index), steps=None)
        samples = pairs * args.num_seeds / 1e6
        result["decoder_seconds_per_million_samples_and_epoch"] = result["decoder_epoch"]["seconds"] / samples

    state, iteration = begin(script, args, env, keys), iterate(script, args, env)

    def one_iteration() -> Any:
        nonlocal state
        state, metrics = iteration(state, keys)
        return metrics

    phase("iteration", one_iteration)
    result["checkpoint"] = checkpoint(script, state, result["iteration"]["sps"])
    print(f"checkpoint: {json.dumps(result['checkpoint'])}", flush=True)
    result["training_over_physics"] = result["iteration"]["sps"] / result["physics"]["sps"]
    return result


def checkpoint(script: Any, state: Any, sps: float) -> dict[str, float]:
    """Seconds and bytes of a checkpoint with everything, and without the decoder's ring; seconds to load.

    `slowdown_worst`: of a run with one of everything for every 6M steps of a seed.
    """
    result = {}
    parts = {"whole": state} | ({"without_ring": state.replace(ring=None)} if hasattr(state, "ring") else {})
    with tempfile.TemporaryDirectory() as folder:
        (run_dir := Path(folder)).joinpath("checkpoints").mkdir()
        for name, part in parts.items():
            start = time.perf_counter()
            script.save_state(run_dir, name, part, run=[])
            result[f"{name}_save_seconds"] = time.perf_counter() - start
            file = run_dir / "checkpoints" / f"state_{name}.npz"
            result[f"{name}_bytes"] = file.stat().st_size
            start = time.perf_counter()
            jax.block_until_ready(script.load_arrays(file, jax.eval_shape(lambda: state))[0])
            result[f"{name}_load_seconds"] = time.perf_counter() - start
    seeds = len(jax.tree.leaves(state)[0])
    result["slowdown_worst"] = 1 + result["whole_save_seconds"] * sps / (6_000_000 * seeds)
    return result


def compare(bench: Bench, scripts: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    """Whole iterations of several scripts, one of each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in scripts}
    runs = {}
    for name, script in scripts.items():
        env = script.make_env(args[name])
        keys = jax.vmap(jax.random.PRNGKey)(args[name].seed + jnp.arange(args[name].num_seeds))
        runs[name] = [iterate(script, args[name], env), begin(script, args[name], env, keys), keys]
    for _ in range(1 + bench.repeats):
        for name, (iteration, state, keys) in runs.items():
            start = time.perf_counter()
            state, _ = jax.block_until_ready(iteration(state, keys))
            seconds[name].append(time.perf_counter() - start)
            runs[name][1] = state
    result: dict[str, Any] = {}
    for name, (cold, *warm) in seconds.items():
        a = args[name]
        size = a.batch_size * a.num_minibatches * a.unroll_length * a.num_seeds
        result[name] = {"cold_seconds": cold, "seconds": warm, "sps": size / min(warm)}
    first = next(iter(result.values()))["sps"]
    return {"scripts": result, "over_first": {name: r["sps"] / first for name, r in result.items()}}


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    bench, rest = tyro.cli(Bench, args=sys.argv[1:at]), sys.argv[at + 1 :]
    command = " ".join(["python benchmark/throughput.py", *sys.argv[1:]])
    scripts = {name: importlib.import_module(name) for name in bench.scripts}
    parsed = {}
    for name, script in scripts.items():
        sys.argv = [f"{name}.py", *rest]
        parsed[name] = script.parse_args()
        script.check(parsed[name])
    args = parsed[bench.scripts[0]]
    failed, commit = subprocess.getstatusoutput(f"git -C '{ROOT}' describe --always --dirty")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    about = {
        "command": command,
        "commit": None if failed else commit,
        "device": device,
        "jax": jax.__version__,
    }
    about |= {"python": platform.python_version(), "processor_cores": len(os.sched_getaffinity(0))}
    start = time.perf_counter()
    with jax.default_matmul_precision("highest"):
        result = about | {"env_id": args.env_id, "num_envs": args.num_envs, "num_seeds": args.num_seeds}
        if len(scripts) > 1:
            result |= compare(bench, scripts, parsed)
        else:
            result |= measure(bench, scripts[bench.scripts[0]], args)
    result["peak_host_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    stats = jax.devices()[0].memory_stats() or {}
    result["peak_device_memory_gb"] = stats.get("peak_bytes_in_use", 0) / 1e9 or None
    result["wall_seconds"] = time.perf_counter() - start
    print(json.dumps(result, indent=1))
    if bench.out:
        Path(bench.out).parent.mkdir(parents=True, exist_ok=True)
        Path(bench.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
