"""Where a script's time goes: physics alone, rollout, update, whole iterations, decoder training, memory.

    python benchmark/throughput.py --out results/throughput/cheetah.json -- --env-id CheetahRun

What follows `--` are the script's own arguments. All figures come from one process and the same sizes; `sps`
What follows `--` are the arguments of the script. All figures are of one process and the same sizes; `sps`
persistent compilation cache they are mostly tracing.
"""

import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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
    """Times a script's phases."""

    script: str = "gorl_fm_ppo"  # the script, without .py
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


def measure(bench: Bench, script: Any, args: Any) -> dict[str, Any]:
    env = script.make_env(args)
    size = args.batch_size * args.num_minibatches * args.unroll_length * args.num_seeds
    keys = jax.vmap(jax.random.PRNGKey)(args.seed + jnp.arange(args.num_seeds))
    coefs = {name: jnp.float32(getattr(args, name)[0]) for name in ("clip_eps", "max_grad_norm", "kl_coef")}
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
    _, steps, last_obs, u, _ = rollout(agent, envs, keys)

    def unrolls(x: jax.Array) -> jax.Array:
        return jax.vmap(script.as_unrolls)(x)

    batch = jax.tree.map(unrolls, steps)
    last = last_obs.reshape(args.num_seeds, -1, env.observation_size)
    update = jax.jit(jax.vmap(partial(script.update, args), in_axes=(0, 0, 0, None, 0)))
    phase("update", lambda: update(agent, batch, last, coefs, keys))

    rows = max(1, min(bench.decoder_samples, args.decoder_buffer_size) // args.num_envs)
    tiles = -(-rows // (u.shape[1] * u.shape[2]))

    def ring_of(x: jax.Array) -> jax.Array:
        x = x.reshape(args.num_seeds, -1, *x.shape[3:])
        return jnp.concatenate([x] * tiles, axis=1)[:, :rows]

    ring, pairs = {"obs": ring_of(steps.obs), "u": ring_of(u)}, rows * args.num_envs
    opt = jax.vmap(script.optax.adam(args.decoder_learning_rate).init)(agent.decoder.flow)
    epoch = jax.jit(jax.vmap(partial(script.decoder_epoch, args, pairs)))
    phase("decoder_epoch", lambda: epoch(agent.decoder, opt, ring, keys), steps=None)
    samples = pairs * args.num_seeds / 1e6
    result["decoder_seconds_per_million_samples_and_epoch"] = result["decoder_epoch"]["seconds"] / samples

    iterate = jax.jit(
        jax.vmap(partial(script.iteration, args, env), in_axes=(0, 0, None, None)), donate_argnums=0
    )
    capacity = args.decoder_buffer_size // args.num_envs
    shape = (args.num_seeds, capacity, args.num_envs)
    ring = {"obs": jnp.zeros((*shape, env.observation_size)), "u": jnp.zeros((*shape, env.action_size))}
    ring["reward"] = jnp.zeros(shape)
    state = script.TrainState(agent, envs, ring, jnp.zeros(args.num_seeds, jnp.int32))
    state = jax.tree.map(jnp.copy, state)  # its buffers are donated

    def one_iteration() -> Any:
        nonlocal state
        state, metrics = iterate(state, keys, 0, coefs)
        return metrics

    phase("iteration", one_iteration)
    result["training_over_physics"] = result["iteration"]["sps"] / result["physics"]["sps"]
    return result


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    bench, rest = tyro.cli(Bench, args=sys.argv[1:at]), sys.argv[at + 1 :]
    script = importlib.import_module(bench.script)
    command = " ".join(["python benchmark/throughput.py", *sys.argv[1:]])
    sys.argv = [f"{bench.script}.py", *rest]
    args = script.parse_args()
    script.check(args)
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
        result |= measure(bench, script, args)
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
