r"""Our scripts and the public GoRL code's, whole iterations in turn, in one process: steps/s and
their ratio.

    git clone https://github.com/bennidict23/GoRL ../GoRL && pip install jax_dataclasses
    python benchmark/public_gorl.py --checkout ../GoRL --out results/throughput/public.json

The public code is imported, not changed; of Playground's configuration it is given what it knows,
and the physics backend of ours (Playground's default is another). Both sides do the same
environment steps, minibatches and epochs with the same networks; shuffling, targets and advantages
are alike; it computes more metrics. The first two iterations of both are not counted (it compiles
twice). `decoder_*` is a gradient step at `--decoder-batch-size`: theirs as it trains, without
`jit`; `their_jitted` is the same in `jit`.

With the versions that it pins, in an environment of its own (and `optax`), whole processes in turn:

    python benchmark/throughput.py --scripts ppo_gaussian --rounds 2 --versus \
        'OTHER_ENV/bin/python benchmark/public_gorl.py --alone --checkout ../GoRL --methods ppo' \
        --versus-sps 'steps/s: ([0-9.]+)' -- --env-id CheetahRun --num-envs 256 --batch-size 64 \
        --total-timesteps 245760 --eval-every 180000000
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OURS = {"ppo": "ppo_gaussian", "fpo": "fpo", "dppo": "dppo", "latent_ppo": "gorl_fm_ppo"}


@dataclass(frozen=True)
class Bench:
    """Times the public GoRL code beside ours."""

    checkout: str  # the public repository
    methods: tuple[str, ...] = tuple(OURS)  # iterations to time
    decoders: tuple[str, ...] = ("fm", "diffusion")  # decoder trainings to time
    env_id: str = "CheetahRun"
    num_envs: int = 256
    batch_size: int = 64
    num_minibatches: int = 32
    update_epochs: int = 16
    decoder_batch_size: int = 8192
    rounds: int = 3  # timed iterations of each
    alone: bool = False  # only theirs: in an environment with the versions that it pins
    out: str | None = None  # a file for the JSON


def theirs(bench: Bench, method: str, env: Any) -> Callable[[], Any]:
    """An iteration of the public code, rollout and update, as its training scripts have it."""
    from mujoco_playground.config import dm_control_suite_params

    sizes = {"num_envs": bench.num_envs, "batch_size": bench.batch_size, "unroll_length": 30}
    sizes |= {
        "num_minibatches": bench.num_minibatches,
        "num_updates_per_batch": bench.update_epochs,
    }
    rollouts, options = import_module("flow_policy.rollouts").BatchedRolloutState, {}
    if method in ("fpo", "dppo"):
        fpo = import_module("flow_policy.fpo")
        denoising = {"loss_mode": "denoising_mdp", "clipping_epsilon": 0.2, "sde_sigma": 0.05}
        config = fpo.FpoConfig(**sizes, **(denoising if method == "dppo" else {"loss_mode": "fpo"}))
        agent = fpo.FpoState.init(prng=jax.random.key(0), env=env, config=config)
    else:
        name, module = ("Ppo", "ppo") if method == "ppo" else ("Encoder", "encoder_ppo")
        module = import_module(f"flow_policy.{module}")
        known = {f.name for f in fields(getattr(module, f"{name}Config"))}
        tuned = dict(dm_control_suite_params.brax_ppo_config(bench.env_id))
        extra = {"clipping_epsilon": 0.15, "z_dim": env.action_size, "max_grad_norm": 0.5}
        extra |= {"z_regularization": 5e-4, "use_tanh_jacobian_for_z": False}
        tuned = (
            {k: v for k, v in tuned.items() if k in known}
            | sizes
            | (extra if name == "Encoder" else {})
        )
        config = getattr(module, f"{name}Config")(**tuned)
        agent = getattr(module, f"{name}State").init(prng=jax.random.key(0), env=env, config=config)
    if method == "latent_ppo":
        decoder = their_decoder(bench, "fm", env.observation_size, env.action_size)
        agent = import_module("flow_policy.agent").EncoderFMAgent(
            ppo_z_state=agent, fm_state=decoder
        )
        rollouts = import_module("flow_policy.rollout_encoder").BatchedRolloutStateEncoderFM
        options = {"apply_tanh_in_rollout": True}
    state = [agent, rollouts.init(env, prng=jax.random.key(1), num_envs=bench.num_envs)]
    options |= {
        "episode_length": config.episode_length,
        "iterations_per_env": config.iterations_per_env,
    }

    def iteration() -> Any:
        state[1], transitions = state[1].rollout(state[0], **options)
        state[0], metrics = state[0].training_step(transitions)
        return jax.tree.leaves((state, metrics))

    return iteration


def their_decoder(bench: Bench, kind: str, obs_dim: int, action_dim: int) -> Any:
    name, module = ("FM", "fm") if kind == "fm" else ("Diffusion", "diffusion")
    module = import_module(f"flow_policy.decoder_{module}")
    steps = {"flow_steps" if kind == "fm" else "diffusion_steps": 10}
    if kind != "fm":
        steps |= {"beta_schedule": "cosine"}
    shared = {"hidden_dims": (64,) * 4, "timestep_embed_dim": 8, "n_samples_per_action": 8}
    config = getattr(module, f"Decoder{name}Config")(**shared, **steps)
    return getattr(module, f"Decoder{name}State").init(
        jax.random.PRNGKey(0), obs_dim, action_dim, config
    )


def ours(bench: Bench, method: str) -> tuple[Callable[[], Any], Any]:
    """An iteration of our script, as its `train` compiles it, and the environment."""
    script = import_module(OURS[method])
    sizes = {"batch_size": bench.batch_size, "num_minibatches": bench.num_minibatches}
    sizes |= {"num_envs": bench.num_envs, "update_epochs": bench.update_epochs}
    args = replace(script.Args(), env_id=bench.env_id, **sizes)
    env = script.make_env(args)
    keys = jax.vmap(jax.random.PRNGKey)(np.arange(1))
    gorl = hasattr(script, "decoder_epoch")
    first = (keys, 0) if gorl else (keys,)
    clip_eps = (args.clip_eps[0],) if gorl else ()
    init = script.over_seeds(args, partial(script.init_state, args, env), (0, None)[: len(first)])
    axes = (0, None)[: 1 + len(clip_eps)]
    iterate = script.over_seeds(args, partial(script.iteration, args, env), axes, donate_argnums=0)
    state = [init(*first)]

    def iteration() -> Any:
        state[0], metrics = iterate(state[0], *clip_eps)
        return metrics

    return iteration, env


def in_turn(
    calls: dict[str, Callable[[], Any]], rounds: int, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call in every round, after `warm` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: x[warm:] for name, x in seconds.items()}


def summary(seconds: dict[str, list[float]], steps: int | None = None) -> dict[str, Any]:
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    result: dict[str, Any] = {
        "seconds": seconds,
        "theirs_over_ours": {"pairs": ratios, "median": median(ratios)},
    }
    if steps:
        result["sps"] = {name: steps / median(x) for name, x in seconds.items()}
    return result


def decoder(bench: Bench, kind: str, obs_dim: int = 17, action_dim: int = 6) -> dict[str, Any]:
    """Seconds of a decoder's gradient step: ours is an epoch of 10 of them, theirs 10 calls."""
    script = import_module(f"gorl_{kind[:4]}_ppo")
    size, steps = bench.decoder_batch_size, 10
    args = replace(script.Args(), decoder_batch_size=size)
    rng, key = np.random.default_rng(0), jax.random.PRNGKey(0)
    pairs = (steps + 1) * size  # ours holds a minibatch out
    obs = np.float32(rng.normal(size=(pairs, obs_dim)))
    u = np.float32(rng.normal(size=(pairs, action_dim)))
    env = SimpleNamespace(observation_size=obs_dim, action_size=action_dim)
    agent = script.init_agent(args, env, key)
    pairs = script.Pairs(jnp.array(obs), jnp.array(u), *jnp.zeros((2, pairs)))
    epoch = jax.jit(partial(script.decoder_epoch, args))
    mine = [agent.decoder]
    their = their_decoder(bench, kind, obs_dim, action_dim)
    states, jitted = [their, their], jax.jit(type(their).train_step)

    def our_steps() -> Any:
        mine[0], loss, _ = epoch(mine[0], agent, pairs, key, 0)
        return loss

    def their_steps(i: int) -> Any:
        step = (type(their).train_step, jitted)[i]
        for rows in rng.permutation(steps * size).reshape(steps, size):
            states[i], metrics = step(states[i], jnp.array(obs[rows]), jnp.array(u[rows]))
            float(metrics["loss"])  # as its training does
        return jax.tree.leaves(states[i])

    calls = {
        "ours": our_steps,
        "theirs": partial(their_steps, 0),
        "their_jitted": partial(their_steps, 1),
    }
    seconds = {
        name: [x / steps for x in found] for name, found in in_turn(calls, bench.rounds, 1).items()
    }
    return summary(seconds)


def main() -> None:
    bench = tyro.cli(Bench)
    source = Path(bench.checkout) / "src"
    if not (source / "flow_policy").is_dir():
        print(
            f"public_gorl.py: --checkout: got {bench.checkout}; takes its repository",
            file=sys.stderr,
        )
        raise SystemExit(2)
    sys.path.insert(0, str(source))
    commits = {
        name: subprocess.getoutput(f"git -C '{path}' describe --always --dirty")
        for name, path in (("ours", ROOT), ("theirs", bench.checkout))
    }
    packages = ("jax", "mujoco-mjx", "playground", "optax")
    result: dict[str, Any] = {
        "command": " ".join(["python benchmark/public_gorl.py", *sys.argv[1:]])
    }
    result |= {"commits": commits, "versions": {name: version(name) for name in packages}}
    result |= {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
    result |= {"python": platform.python_version(), "processor_cores": len(os.sched_getaffinity(0))}
    start, steps = time.perf_counter(), bench.batch_size * bench.num_minibatches * 30
    if bench.alone:
        from mujoco_playground import dm_control_suite

        config = dm_control_suite.get_default_config(bench.env_id)
        if "impl" in config:
            config.impl = "jax"
        env = dm_control_suite.load(bench.env_id, config=config)
        for method in bench.methods:
            seconds = in_turn({"theirs": theirs(bench, method, env)}, bench.rounds)["theirs"]
            print(f"{method}: {seconds}; steps/s: {steps / median(seconds):.1f}", flush=True)
        return
    for method in bench.methods:
        mine, env = ours(bench, method)
        calls = {"ours": mine, "theirs": theirs(bench, method, env)}
        result[method] = summary(in_turn(calls, bench.rounds), steps)
        print(method, json.dumps(result[method]), flush=True)
    for kind in bench.decoders:
        result[f"decoder_{kind}"] = decoder(bench, kind)
        print(f"decoder_{kind}", json.dumps(result[f"decoder_{kind}"]), flush=True)
    result["wall_seconds"] = time.perf_counter() - start
    if bench.out:
        Path(bench.out).parent.mkdir(parents=True, exist_ok=True)
        Path(bench.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
