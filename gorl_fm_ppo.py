"""GoRL(FM): PPO on a Gaussian latent policy, actions from a flow-matching decoder, on MuJoCo Playground.

Zhang et al., "GoRL: An Algorithm-Agnostic Framework for Online Reinforcement Learning with Generative
Policies" (2025); sections, equations and appendices cited below are the paper's. The method in five lines:

  1. The encoder pi(latent | s), a diagonal Gaussian, is trained with PPO (Eq. 5) and a KL to N(0, I) (Eq. 3).
  2. The decoder u = g(s, latent) makes actions tanh(u). It is frozen meanwhile; in stage 0, the identity.
  3. After a stage, flow matching (Eq. 6) trains it to map *fresh* N(0, I) noise to the latest rollouts' u.
  4. The encoder restarts as exactly N(0, I), which by (3) acts about like the policy just trained.
  5. Four stages of 60M, 60M, 30M and 30M environment steps. No likelihood of the decoder is ever needed.

    python gorl_fm_ppo.py --env-id HopperStand --seed 1

Axes in comments: K seeds, N environments, U unrolls of an environment in an iteration, T steps, B = U * N.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.1; python_version < '3.12'", "jax==0.12.0.1; python_version >= '3.12'",
#   "flax==0.12.8; python_version < '3.12'", "flax==0.12.12; python_version >= '3.12'",
#   "optax==0.2.8", "playground==0.2.0", "mujoco==3.17.0", "mujoco-mjx==3.17.0", "warp-lang==1.19.0",
#   "tyro==1.0.17", "tqdm==4.70.1", "wandb==0.31.0",
# ]
# ///

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import struct
from jax import Array, lax
from jax.scipy.stats import norm
from mujoco_playground import MjxEnv, State, dm_control_suite
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    """GoRL(FM): latent PPO with a flow-matching decoder on MuJoCo Playground's DM Control suite."""

    env_id: str = "HopperStand"  # a task of MuJoCo Playground's DM Control suite
    seed: int = 1  # the first seed
    num_seeds: int = 1  # seeds seed .. seed + num_seeds - 1 train together in this process
    preset: Literal["paper", "cpu"] = "paper"  # cpu: CheetahRun, all four stages in 10 minutes on 2 cores
    stage_timesteps: tuple[int, ...] = ()  # environment steps of each stage; their sum is then the total
    total_timesteps: int = 180_000_000  # environment steps of a seed, split 2 : 2 : 1 : 1 into stages
    num_envs: int = 2048  # parallel environments of a seed
    unroll_length: int = 30  # steps between two bootstraps of the return
    batch_size: int = 1024  # unrolls a minibatch
    num_minibatches: int = 32  # an iteration takes batch_size * num_minibatches * unroll_length steps
    update_epochs: int = 16  # passes over the data of an iteration
    learning_rate: float = 1e-3  # Adam's, for encoder and critic
    gamma: float = 0.995  # discount
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    reward_scale: float = 10.0  # factor on the rewards that the critic sees
    vf_coef: float = 0.25  # weight of the critic's mean squared error
    ent_coef: float = 0.01  # weight of the latent policy's entropy
    clip_eps: tuple[float, ...] = (0.15, 0.3)  # PPO's clip range, of each stage (the last repeats)
    max_grad_norm: tuple[float, ...] = (0.0,)  # of all gradients jointly, likewise; 0 for none
    kl_coef: tuple[float, ...] = (1e-3,)  # beta of Eq. 3, likewise
    latent_penalty: Literal["kl", "l2"] = "kl"  # Eq. 3's KL, or App. E.4's L2 on mean and log-scale
    reinit_critic: bool = False  # restart critic and observation statistics, too, at each stage
    decoder_epochs: int = 50  # epochs of a decoder refinement
    decoder_batch_size: int = 8192  # (observation, u) pairs a decoder minibatch
    decoder_learning_rate: float = 3e-4  # Adam's, for the decoder
    decoder_buffer_size: int = 10_000_000  # most recent pairs of a stage, to train the decoder on
    decoder_steps: int = 10  # Euler steps of the flow
    decoder_from_scratch: bool = False  # train each decoder from fresh weights, not its predecessor's
    episode_length: int = 1000  # control steps until an episode is cut off
    eval_every: int = 6_000_000  # environment steps between evaluations (ends of stages are evaluated, too)
    eval_envs: int = 128  # episodes an evaluation
    impl: Literal["jax", "warp"] = "jax"  # physics backend; the paper's is jax
    runs_dir: str = "runs"  # where run directories are made
    exp_name: str = Path(__file__).stem  # part of the run directory's name
    resume: str | None = None  # a run directory to continue; its arguments are taken over
    checkpoint_minutes: float = 30.0  # a checkpoint at least this often, beside those at evaluations
    track: bool = False  # log to Weights & Biases (WANDB_MODE=offline works, too)
    wandb_project_name: str = "gorl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases user or team

STAGE_COEFFICIENTS = ("clip_eps", "max_grad_norm", "kl_coef")
CPU_PRESET = dict(env_id="CheetahRun", total_timesteps=1_200_000, num_envs=128, batch_size=32,
                  num_minibatches=16, update_epochs=8, eval_every=200_000, decoder_epochs=10,
                  decoder_batch_size=1024, decoder_buffer_size=100_000)  # fmt: skip

# --- shared: argument checks ---
def require(ok: bool, argument: str, got: Any, takes: str) -> None:
    """Unless `ok`, ends the program with one line on stderr and exit status 2."""
    if not ok:
        argument = "--" + argument.replace("_", "-") if argument.isidentifier() else argument
        print(f"{Path(sys.argv[0]).name}: {argument}: got {got}; takes {takes}", file=sys.stderr)
        raise SystemExit(2)

def check_common(args: "Args") -> None:
    """Checks the arguments that all scripts have, before any device is touched."""
    # Playground 0.2 builds the Reacher with a function that MuJoCo 3.17 no longer has.
    tasks = sorted(task for task in dm_control_suite.ALL_ENVS if "Reacher" not in task)
    require(args.env_id in tasks, "env_id", args.env_id, f"one of {', '.join(tasks)}")
    for name, got in asdict(args).items():
        numbers = got if isinstance(got, tuple) else [got] if type(got) in (int, float) else []
        zero = name in ("seed", "gae_lambda", "vf_coef", "ent_coef", "kl_coef", "max_grad_norm")
        ok = all(n > 0 or (zero and n == 0) for n in numbers)  # also false for NaN
        ok = ok and all(n < 2**31 for n in numbers) and got != ()
        require(ok, name, got, f"{'numbers of at least' if zero else 'numbers above'} 0, below 2^31")
    for name in ("gamma", "gae_lambda", "clip_eps"):
        require(np.max(getattr(args, name)) <= 1, name, getattr(args, name), "at most 1")
    require(not args.track or find_spec("wandb"), "track", True, "the wandb package (pip install wandb)")
    unrolls = args.batch_size * args.num_minibatches
    takes = f"a product that --num-envs ({args.num_envs}) divides: an iteration is whole unrolls"
    require(unrolls % args.num_envs == 0, "--batch-size times --num-minibatches", unrolls, takes)
    require("/" not in args.exp_name, "exp_name", args.exp_name, "a name without slashes")
# --- end shared ---

def split_total(total: int) -> tuple[int, ...]:
    """Stage budgets in the proportions of App. E.4's 60M, 60M, 30M and 30M steps."""
    return tuple(end - start for start, end in pairwise(total * sixths // 6 for sixths in (0, 2, 4, 5, 6)))

def stage_ends(args: Args) -> list[int]:
    """Iterations done when each stage ends: cumulative budgets, rounded to iterations in integers."""
    size = args.batch_size * args.num_minibatches * args.unroll_length
    return [(2 * budget + size) // (2 * size) for budget in accumulate(args.stage_timesteps)]

def check(args: Args) -> None:
    """Checks every argument, before anything compiles."""
    check_common(args)
    size, stages = args.batch_size * args.num_minibatches * args.unroll_length, args.stage_timesteps
    for m, (start, end) in enumerate(pairwise([0, *stage_ends(args)])):
        name = "total_timesteps" if stages == split_total(args.total_timesteps) else "stage_timesteps"
        takes = f"at least one iteration, {size} steps, a stage (a lower --batch-size makes it shorter)"
        require(end > start, name, f"{stages[m]} steps for stage {m}", takes)
        pairs = min((end - start) * size, args.decoder_buffer_size // args.num_envs * args.num_envs)
        require(pairs > 0, "decoder_buffer_size", args.decoder_buffer_size, f"at least {args.num_envs}")
        ok, takes = args.decoder_batch_size <= pairs, f"at most the {pairs} pairs that stage {m} records"
        require(ok or m == len(stages) - 1, "decoder_batch_size", args.decoder_batch_size, takes)

# --- shared: environment, statistics, networks ---
@struct.dataclass
class Envs:
    """Environments, and the states they are reset to; leaves are (N, ...), Warp's contacts excepted."""
    state: State
    first: State
    steps: Array  # control steps since the last reset

def make_env(args: "Args") -> MjxEnv:
    config = dm_control_suite.get_default_config(args.env_id)
    config.impl = args.impl  # Playground 0.2 itself defaults to warp
    if args.impl == "warp":  # its contact buffer serves all worlds, and Playground's is for 2048
        config.naconmax *= -(-max(args.num_envs, args.eval_envs) * args.num_seeds // 2048)
    return dm_control_suite.load(args.env_id, config=config)

# `reset` and `step` differ in weak types, for which a jitted iteration would compile twice.
strong_types = partial(jax.tree.map, lambda x: lax.convert_element_type(x, x.dtype))

def reset_envs(env: MjxEnv, num_envs: int, key: Array) -> Envs:
    state = strong_types(jax.vmap(env.reset)(jax.random.split(key, num_envs)))
    return Envs(state=state, first=state, steps=jnp.zeros(num_envs, jnp.int32))

def step_envs(args: "Args", env: MjxEnv, envs: Envs, u: Array) -> tuple[Envs, Array, Array, Array]:
    """Steps with tanh(u), u (N, action_dim), resets what is done: environments, reward, truncated, broken.

    Truncated (N,), bool: the time limit is reached, or the environment broke. Broken (N,), bool: its physics
    went NaN or beyond 1e6; reward and next observation are dropped. Reward is (N,), in [0, 1].
    """
    state = strong_types(jax.vmap(env.step)(envs.state, jnp.tanh(u)))
    broken = (state.done > 0) | ~jnp.isfinite(state.reward) | ~(jnp.abs(state.obs) < 1e6).all(-1)
    truncated = broken | (envs.steps + 1 >= args.episode_length)
    def reset_done(first: Array, now: Array) -> Array:
        done = truncated.reshape(-1, *[1] * (now.ndim - 1))
        return jnp.where(done, first, now) if now.shape[:1] == truncated.shape else now
    reward, steps = jnp.where(broken, 0.0, state.reward), jnp.where(truncated, 0, envs.steps + 1)
    state = jax.tree.map(reset_done, envs.first, state)
    return envs.replace(state=state, steps=steps), reward, truncated, broken

@struct.dataclass
class RunningStats:
    """Mean and variance, (obs_dim,) each, of all observations so far."""
    count: Array
    mean: Array
    var: Array

def merge_stats(stats: RunningStats, obs: Array) -> RunningStats:
    """Adds observations (..., obs_dim): Chan et al. (1979), in variances instead of sums of squares."""
    axes, size = tuple(range(obs.ndim - 2)), obs.size // obs.shape[-1]
    mean = obs.mean(-2).mean(axes)  # in two stages, against float32's rounding
    var = jnp.square(obs - mean).mean(-2).mean(axes)
    count, delta = stats.count + size, mean - stats.mean
    share = size / count
    # Without the old variance's share, the std would shrink with every batch, and normalised inputs grow.
    var = stats.var + share * (var - stats.var + (1 - share) * jnp.square(delta))
    return RunningStats(count=count, mean=stats.mean + share * delta, var=var)

def normalize(stats: RunningStats, obs: Array) -> Array:
    """Observations (..., obs_dim) in standard deviations, clipped to +-10."""
    return jnp.clip((obs - stats.mean) / jnp.maximum(jnp.sqrt(stats.var), 1e-6), -10.0, 10.0)

def init_mlp(key: Array, sizes: tuple[int, ...], zero_last: bool = False) -> list[dict[str, Array]]:
    """LeCun-uniform kernels and zero biases; with `zero_last` the network's output starts at exactly 0."""
    init, keys = jax.nn.initializers.lecun_uniform(), jax.random.split(key, len(sizes) - 1)
    kernels = [init(k, shape) for k, shape in zip(keys, pairwise(sizes), strict=True)]
    kernels[-1] *= not zero_last
    return [{"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for kernel in kernels]

def mlp(layers: list[dict[str, Array]], x: Array) -> Array:
    """SiLU network, (..., sizes[0]) -> (..., sizes[-1])."""
    for layer in layers[:-1]:
        x = jax.nn.silu(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]
# --- end shared ---

@struct.dataclass
class Agent:
    """One seed's networks, or all seeds' with axes (K,) in front. A policy lacks critic and Adam states."""
    params: dict[str, Any]  # "encoder", "critic"
    opt: dict[str, Any]  # an Adam state for each
    stats: RunningStats
    decoder: dict[str, Any]  # "net", and its own "stats", of when it was trained: it must not move after
    def policy(self) -> "Agent":
        return self.replace(params={"encoder": self.params["encoder"]}, opt={})

def init_agent(args: Args, obs_dim: int, action_dim: int, key: Array) -> Agent:
    """Encoder exactly N(0, I), decoder exactly the identity; sizes of App. E.3 and E.4."""
    encoder_key, critic_key, decoder_key = jax.random.split(key, 3)
    encoder = init_mlp(encoder_key, (obs_dim, 32, 32, 32, 32, 2 * action_dim), zero_last=True)
    params = {"encoder": encoder, "critic": init_mlp(critic_key, (obs_dim, 256, 256, 256, 256, 256, 1))}
    opt = {name: optax.adam(args.learning_rate).init(layers) for name, layers in params.items()}
    net = init_mlp(decoder_key, (obs_dim + action_dim + 8, 64, 64, 64, 64, action_dim), zero_last=True)
    stats = RunningStats(count=jnp.zeros(()), mean=jnp.zeros(obs_dim), var=jnp.ones(obs_dim))
    return Agent(params=params, opt=opt, stats=stats, decoder={"net": net, "stats": stats})

def start_stage(args: Args, agent: Agent, fresh: Agent) -> Agent:
    """Encoder and its Adam state start afresh, at N(0, I) (section 3.2); critic and statistics carry on."""
    if args.reinit_critic:
        return fresh.replace(decoder=agent.decoder)
    params = agent.params | {"encoder": fresh.params["encoder"]}
    return agent.replace(params=params, opt=agent.opt | {"encoder": fresh.opt["encoder"]})

def latent_distribution(encoder: Any, obs: Array) -> tuple[Array, Array]:
    """Mean and std, (..., action_dim) each, of pi(latent | s) at normalised observations (App. E.3)."""
    mean, raw = jnp.split(mlp(encoder, obs), 2, axis=-1)
    return mean, jnp.clip(jax.nn.softplus(raw + np.log(np.e - 1)), 1e-3, 10.0)  # of output 0: N(0, I)

def velocity(net: Any, obs: Array, a: Array, t: Array) -> Array:
    """The network at normalised observations, a_t (..., action_dim), time t (..., 1) in [0, 1] (App. C)."""
    angles = t * 2.0 ** jnp.arange(4)
    return mlp(net, jnp.concatenate([obs, a, jnp.cos(angles), jnp.sin(angles)], axis=-1))

def decode(args: Args, decoder: Any, obs: Array, latent: Array) -> Array:
    """u = g(s, latent) at raw observations: Euler's method from t = 0 to 1 (Eq. 19)."""
    obs = normalize(decoder["stats"], obs)
    def euler_step(a: Array, t: Array) -> tuple[Array, None]:
        v = velocity(decoder["net"], obs, a, jnp.broadcast_to(t, a[..., :1].shape))
        return a + v / args.decoder_steps, None
    return lax.scan(euler_step, latent, jnp.arange(args.decoder_steps) / args.decoder_steps)[0]

def act(args: Args, agent: Agent, obs: Array, key: Array, deterministic: Any) -> tuple[Array, dict]:
    """u (..., action_dim) at raw observations and how it was drawn; evaluation decodes the latent's mean."""
    mean, std = latent_distribution(agent.params["encoder"], normalize(agent.stats, obs))
    latent = mean + std * jnp.where(deterministic, 0.0, jax.random.normal(key, mean.shape))
    log_prob = norm.logpdf(latent, mean, std).sum(-1)
    return decode(args, agent.decoder, obs, latent), {"latent": latent, "log_prob": log_prob}

# --- shared: rollout ---
@struct.dataclass
class Transitions:
    """What a rollout leaves, (U, T, N, ...)."""
    obs: Array
    u: Array
    drawn: dict[str, Array]  # the second output of `act`
    reward: Array
    truncated: Array  # bool

def rollout(args: "Args", env: MjxEnv, agent: Any, envs: Envs, key: Array) -> tuple[Envs, Any, Array, dict]:
    """U unrolls of T steps: environments, transitions, last next observations (U, N, obs_dim), metrics."""
    def step(envs: Envs, key: Array) -> tuple[Envs, tuple]:
        obs = envs.state.obs
        u, drawn = act(args, agent, obs, key, False)
        envs, reward, truncated, broken = step_envs(args, env, envs, u)
        return envs, (Transitions(obs, u, drawn, reward, truncated), broken)
    def unroll(envs: Envs, key: Array) -> tuple[Envs, tuple]:
        envs, outputs = lax.scan(step, envs, jax.random.split(key, args.unroll_length))
        return envs, (*outputs, envs.state.obs)  # a reset state's after truncation, which is not bootstrapped
    keys = jax.random.split(key, args.batch_size * args.num_minibatches // args.num_envs)
    envs, (steps, broken, last_obs) = lax.scan(unroll, envs, keys)
    metrics = {"reward_mean": steps.reward.mean(), "nan_resets": broken.sum(), "u_std": steps.u.std()}
    return envs, steps, last_obs, metrics | {"u_beyond_5": (jnp.abs(steps.u) > 5).mean()}
# --- end shared ---

# --- shared: advantages ---
def gae(args: "Args", reward: Array, truncated: Array, value: Array) -> tuple[Array, Array]:
    """Brax's GAE: critic targets and advantages (T, N) of rewards, truncated (T, N) and value (T + 1, N).

    No sum crosses a truncated step: its advantage is 0, its target its own value, so it teaches nothing. The
    advantage is r + gamma * target' - value: an error k > 0 steps later weighs gamma^k lambda^(k-1).
    """
    going_on, value = 1.0 - truncated, lax.stop_gradient(value)
    delta = (reward + args.gamma * value[1:] - value[:-1]) * going_on
    def backward(acc: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        acc = x[0] + args.gamma * args.gae_lambda * x[1] * acc
        return acc, acc
    target = value[:-1] + lax.scan(backward, jnp.zeros_like(value[0]), (delta, going_on), reverse=True)[1]
    return target, (reward + args.gamma * jnp.concatenate([target[1:], value[-1:]]) - value[:-1]) * going_on

def critic_terms(args: "Args", critic: Any, batch: Any, last_obs: Array) -> tuple[Array, dict]:
    """Normalised advantages (batch_size, T) and the critic's error, by targets of the critic as it is now."""
    value = mlp(critic, jnp.concatenate([batch.obs, last_obs[:, None]], axis=1))[..., 0].T
    target, advantage = gae(args, args.reward_scale * batch.reward.T, batch.truncated.T, value)
    advantage, error = (advantage - advantage.mean()) / (advantage.std() + 1e-8), target - value[:-1]
    metrics = {"value_loss": jnp.square(error).mean(), "explained_variance": 1 - error.var() / target.var()}
    return advantage.T, metrics

def clipped_surrogate(args: "Args", log_ratio: Array, advantage: Array) -> dict[str, Array]:
    """PPO's loss (Eq. 5) of ratios new / old, and how far they went; shapes broadcast."""
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - args.clip_eps, 1 + args.clip_eps)
    far = {"approx_kl": (ratio - 1 - log_ratio).mean(), "clip_fraction": (clipped != ratio).mean()}
    return far | {"policy_loss": -jnp.minimum(ratio * advantage, clipped * advantage).mean()}
# --- end shared ---

def loss_fn(params: Any, args: Args, batch: Transitions, last_obs: Array, key: Any) -> tuple[Array, dict]:
    """Latent PPO (Eq. 3, 5) and metrics. The decoder is all in the advantages (Lemma 3.1), not in the loss.

    Batch leaves are (batch_size, T, ...), last_obs is (batch_size, obs_dim), observations are normalised.
    """
    advantage, metrics = critic_terms(args, params["critic"], batch, last_obs)
    mean, std = latent_distribution(params["encoder"], batch.obs)
    log_std, log_prob = jnp.log(std), norm.logpdf(batch.drawn["latent"], mean, std).sum(-1)
    metrics |= clipped_surrogate(args, log_prob - batch.drawn["log_prob"], advantage) | {
        "entropy": (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum(-1).mean(),
        "latent_kl": (0.5 * (jnp.square(mean) + jnp.square(std) - 1) - log_std).sum(-1).mean(),  # Eq. 3
        "latent_l2": jnp.square(mean).mean() + jnp.square(log_std).mean(),  # App. E.4
        "latent_log_std": log_std.mean(),
        "latent_beyond_3": (jnp.abs(batch.drawn["latent"]) > 3).mean(),
    }
    loss = metrics["policy_loss"] + args.vf_coef * metrics["value_loss"] - args.ent_coef * metrics["entropy"]
    return loss + args.kl_coef * metrics[f"latent_{args.latent_penalty}"], metrics

# --- shared: update ---
def update(args: "Args", agent: Any, batch: Any, last_obs: Array, key: Array) -> tuple[Any, dict]:
    """`update_epochs` passes over B unrolls, in new minibatches of whole unrolls each time; see `loss_fn`."""
    limit, adam = args.max_grad_norm, optax.adam(args.learning_rate)
    def minibatch_step(agent: Any, x: tuple[Array, Array]) -> tuple[Any, dict]:
        rows, key = x
        minibatch = jax.tree.map(lambda leaf: leaf[rows], batch)
        loss = partial(loss_fn, args=args, batch=minibatch, last_obs=last_obs[rows], key=key)
        grads, metrics = jax.grad(loss, has_aux=True)(agent.params)
        scale = jnp.where(limit > 0, jnp.minimum(1.0, limit / optax.tree.norm(grads)), 1.0)
        params, opt = {}, {}
        for name, grad in grads.items():
            step, opt[name] = adam.update(jax.tree.map(lambda g: scale * g, grad), agent.opt[name])
            params[name] = optax.apply_updates(agent.params[name], step)
            metrics[f"grad_norm_{name}"] = optax.tree.norm(grad)
        return agent.replace(params=params, opt=opt), metrics
    def epoch(agent: Any, key: Array) -> tuple[Any, dict]:
        rows_key, key = jax.random.split(key)
        rows = jax.random.permutation(rows_key, len(last_obs)).reshape(args.num_minibatches, args.batch_size)
        return lax.scan(minibatch_step, agent, (rows, jax.random.split(key, args.num_minibatches)))
    agent, metrics = lax.scan(epoch, agent, jax.random.split(key, args.update_epochs))
    return agent, jax.tree.map(jnp.mean, metrics)

def as_unrolls(x: Array) -> Array:
    """(U, T, N, ...) -> (U * N, T, ...)."""
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], *x.shape[3:])
# --- end shared ---

def record(ring: dict[str, Array], written: Any, new: dict[str, Array]) -> dict[str, Array]:
    """Writes steps (U, T, N, ...) over a ring's (C, N, ...) oldest rows, the stage's `written` + 1st such."""
    capacity, steps = len(ring["reward"]), new["reward"].shape[0] * new["reward"].shape[1]
    kept = min(capacity, steps)
    rows = ((written + 1) * steps - kept + jnp.arange(kept)) % capacity
    new = {name: x.reshape(steps, *x.shape[2:])[-kept:] for name, x in new.items()}
    return {name: ring[name].at[rows].set(new[name], unique_indices=True) for name in ring}

def decoder_loss(net: Any, args: Args, obs: Array, u: Array, key: Array) -> Array:
    """Conditional flow matching (Eq. 6, 18, 20) from fresh noise, 8 draws a pair; obs normalised."""
    tau_key, noise_key = jax.random.split(key)
    tau, noise = jax.random.uniform(tau_key, (8, len(u), 1)), jax.random.normal(noise_key, (8, *u.shape))
    v = velocity(net, jnp.broadcast_to(obs, (8, *obs.shape)), (1 - tau) * noise + tau * u, tau)
    return jnp.square(v - (u - noise)).sum(-1).mean()

def decoder_epoch(args: Args, pairs: int, decoder: Any, opt: Any, ring: Any, key: Array) -> tuple:
    """One shuffled pass over the ring's first `pairs` entries: decoder, Adam state and mean loss after it."""
    adam = optax.adam(args.decoder_learning_rate)
    obs, u = (ring[name].reshape(-1, ring[name].shape[-1]) for name in ("obs", "u"))
    batches, (rows_key, key) = pairs // args.decoder_batch_size, jax.random.split(key)
    rows = jax.random.permutation(rows_key, pairs)[: batches * args.decoder_batch_size].reshape(batches, -1)
    def step(carry: tuple[Any, Any], x: tuple[Array, Array]) -> tuple[tuple[Any, Any], Array]:
        (net, opt), (rows, key) = carry, x
        batch = normalize(decoder["stats"], obs[rows]), u[rows]
        loss, grads = jax.value_and_grad(decoder_loss)(net, args, *batch, key)
        steps, opt = adam.update(grads, opt)
        return (optax.apply_updates(net, steps), opt), loss
    (net, opt), losses = lax.scan(step, (decoder["net"], opt), (rows, jax.random.split(key, batches)))
    return decoder | {"net": net}, opt, losses.mean()

# --- shared: random keys and evaluation ---
INIT, RESET, TRAIN, EVAL_RESET, EVAL_ACT, DECODER = range(6)

def derive_key(seed_key: Array, purpose: int, index: Any) -> Array:
    """The key for a purpose at a point of a run: it depends on the seed, not on how many run beside it."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, purpose), index)

def evaluate(args: "Args", env: MjxEnv, agent: Any, envs: Envs, key: Array, deterministic: Any) -> Array:
    """Undiscounted returns (eval_envs,) of one episode each; broken physics ends its episode."""
    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        envs, running, returns = carry
        u, _ = act(args, agent, envs.state.obs, key, deterministic)
        envs, reward, _, broken = step_envs(args, env, envs, u)
        running &= ~broken
        return (envs, running, returns + jnp.where(running, reward, 0.0)), None
    start = envs, jnp.ones(args.eval_envs, bool), jnp.zeros(args.eval_envs)
    return lax.scan(step, start, jax.random.split(key, args.episode_length))[0][2]
# --- end shared ---

@struct.dataclass
class TrainState:
    """All that changes in a run. Random keys are not in it: they follow from seed and iteration."""
    agent: Agent
    envs: Envs
    ring: dict[str, Array]  # "obs", "u", "reward": the stage's latest C steps of every environment

def iteration(args: Args, env: MjxEnv, state: TrainState, seed_key: Array, index: Any, stage: Any) -> tuple:
    """Rollout, update, statistics and recording, for one seed: the next state, and metrics."""
    # The stage's value of each coefficient, or the last: JAX clamps an index beyond it.
    args = replace(args, **{k: jnp.array(getattr(args, k))[stage] for k in STAGE_COEFFICIENTS})
    agent, (rollout_key, update_key) = state.agent, jax.random.split(derive_key(seed_key, TRAIN, index))
    envs, steps, last_obs, rollout_metrics = rollout(args, env, agent, state.envs, rollout_key)
    batch = jax.tree.map(as_unrolls, steps.replace(obs=normalize(agent.stats, steps.obs)))
    last_obs = normalize(agent.stats, last_obs).reshape(-1, last_obs.shape[-1])
    agent, metrics = update(args, agent, batch, last_obs, update_key)
    # Only now do the statistics move: rollout and update saw the same ones, so that every ratio started at 1.
    agent = agent.replace(stats=merge_stats(agent.stats, steps.obs))
    before = jnp.array([0, *stage_ends(args)])[stage]  # iterations before this stage
    ring = record(state.ring, index - before, {k: getattr(steps, k) for k in state.ring})
    return TrainState(agent=agent, envs=envs, ring=ring), metrics | rollout_metrics

# --- shared: run directory ---
def make_run_dir(args: "Args") -> Path:
    """Creates runs/<env-id>__<exp-name>__<seed>__<unix time>/, exclusively (on collision -2, -3, ...)."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    for n in count(1):
        run_dir = Path(args.runs_dir) / (name if n == 1 else f"{name}-{n}")
        try:
            (run_dir / "checkpoints").mkdir(parents=True)
            return run_dir
        except OSError as error:
            problem = f"{args.runs_dir} ({error.strerror})"
            require(os.path.exists(run_dir), "runs_dir", problem, "a directory to write to")

def write_args(args: "Args", run_dir: Path) -> None:
    """args.json: the arguments and, as "versions", what else a rerun needs to give the same numbers."""
    failed, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).parent}" describe --always --dirty')
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "mujoco", "mujoco-mjx", "playground", "warp-lang")
    versions = {package: version(package) for package in packages} | {"python": sys.version.split()[0]}
    versions |= {"script": Path(__file__).name, "git_commit": None if failed else commit}
    versions["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    (aside := run_dir / "args.tmp").write_text(json.dumps(asdict(args) | {"versions": versions}, indent=1))
    aside.replace(run_dir / "args.json")

def load_args(run_dir: str) -> "Args":
    """The arguments of a run of this script; ValueError if it is none."""
    try:
        stored = json.loads((Path(run_dir) / "args.json").read_text())
        if stored.pop("versions")["script"] == Path(__file__).name:
            return Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        pass
    raise ValueError(f"{run_dir} is not a run of {Path(__file__).name}, with its args.json")

def log(run_dir: Path, wandb_run: Any, name: str, **columns: Any) -> None:
    """Appends a row for each seed to a CSV file, and to Weights & Biases; arrays lead with the seeds."""
    columns = {k: np.broadcast_to(v, len(columns["seed"])).tolist() for k, v in columns.items()}
    with (run_dir / f"{name}.csv").open("a") as file:
        rows = zip(*columns.values(), strict=True)
        lines = [[f"{v:.7g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
        file.writelines(",".join(line) + "\n" for line in (lines if file.tell() else [columns, *lines]))
    for i, seed in enumerate(columns["seed"]) if wandb_run else ():
        wandb_run.log({k if k == "step" else f"{name}/{k}/seed_{seed}": v[i] for k, v in columns.items()})

def save_arrays(path: Path, tree: Any, **meta: Any) -> None:
    """An .npz file of the tree's leaves by name, written aside, then renamed: checksums, and no pickle."""
    arrays = {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in jax.tree.leaves_with_path(tree)}
    with (aside := path.with_suffix(".tmp")).open("wb") as file:
        np.savez(file, meta=json.dumps(meta), **arrays)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)

def load_arrays(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """The tree `like`, of shapes and types, from a file, and the file's meta; ValueError if they differ."""
    def load(name: tuple, leaf: Any) -> Array:
        array = file[name := jax.tree_util.keystr(name)]
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} is {array.dtype}{array.shape}, not {leaf.dtype}{leaf.shape}")
        return jnp.array(array)
    with np.load(path, allow_pickle=False) as file:
        return jax.tree.map_with_path(load, like), json.loads(str(file["meta"]))

def save_state(run_dir: Path, step: int, state: Any, **meta: Any) -> None:
    """A checkpoint to resume from; it and the newest one before it are kept."""
    meta["bytes"] = {path.name: path.stat().st_size for path in run_dir.glob("*.csv")}
    save_arrays(file := run_dir / "checkpoints" / f"state_{step:012}.npz", state, **meta)
    for old in sorted(f for f in file.parent.glob("state_*.npz") if f.name <= file.name)[:-2]:
        old.unlink()  # a damaged one may be newer

def restore(run_dir: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """The newest good checkpoint's state and meta, None if there is none; CSV files lose what came after."""
    state, meta = None, {"done": 0, "stage": 0, "wall_time": 0.0, "bytes": {}}
    files = sorted(run_dir.glob("checkpoints/state_*.npz"), reverse=True)
    for file in files:
        try:
            state, meta = load_arrays(file, like)
            break
        except Exception as error:
            print(f"{file}: damaged or another run's ({error}); trying the one before", file=sys.stderr)
    require(state is not None or not files, "resume", run_dir, "a run with a checkpoint that can be read")
    for path in run_dir.glob("*.csv"):
        os.truncate(path, min(path.stat().st_size, meta["bytes"].get(path.name, 0)))
    return state, meta

def start_wandb(args: "Args", run_dir: Path) -> Any:
    """The Weights & Biases run of the run directory's name."""
    import wandb
    where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "dir": run_dir}
    config = json.loads((run_dir / "args.json").read_text())
    run = wandb.init(**where, name=run_dir.name, id=run_dir.name, config=config, resume="allow")
    run.define_metric("*", step_metric="step")
    return run

def progress_bar(args: "Args", run_dir: Path, done: int, total: int) -> tqdm:
    """Says what runs where and for how long, of `total` steps a seed; the progress bar."""
    seeds, device = f"{args.num_seeds} seed(s) from {args.seed}", jax.devices()[0].device_kind
    print(f"{args.env_id}, {seeds}: {total:,} steps each on {jax.device_count()} x {device}; {run_dir}")
    if jax.default_backend() == "cpu" and args.preset != "cpu":
        print(f"On a CPU: {total * args.num_seeds / 1.8e7:.0f} hours at 5000 steps/s. --preset cpu is short.")
    look = {"unit": " steps", "unit_scale": True, "mininterval": 0.5 if sys.stdout.isatty() else 30.0}
    return tqdm(total=total * args.num_seeds, initial=done * args.num_seeds, file=sys.stdout, **look)

def load_policy(run_dir: str, step: int | None = None, seed: int | None = None) -> Any:
    """A trained policy f(obs, key, deterministic=False) -> u, of raw observations (..., obs_dim).

    The action is tanh(u). By default it is the last step's, of the run's first seed; others: ValueError.
    """
    args = load_args(run_dir)
    files = {int(f.stem.split("_")[1]): f for f in Path(run_dir).glob("checkpoints/policy_*.npz")}
    seeds, seed = range(args.seed, args.seed + args.num_seeds), args.seed if seed is None else seed
    step = max(files, default=None) if step is None else step
    if step not in files or seed not in seeds:
        raise ValueError(f"{run_dir} has no step {step}, seed {seed}, but steps {sorted(files)}, {seeds}")
    env, keys = make_env(args), jnp.zeros((len(seeds), 2), jnp.uint32)
    init = jax.vmap(partial(init_agent, args, env.observation_size, env.action_size))
    agents, _ = load_arrays(files[step], jax.eval_shape(lambda keys: init(keys).policy(), keys))
    agent, jitted = jax.tree.map(lambda x: x[seeds.index(seed)], agents), jax.jit(partial(act, args))
    def policy(obs: Array, key: Array, deterministic: bool = False) -> Array:
        with jax.default_matmul_precision("highest"):
            return jitted(agent, obs, key, deterministic)[0]
    return policy
# --- end shared ---

def train(args: Args, run_dir: Path) -> None:
    """Trains all seeds in `run_dir`, from its newest good checkpoint. Each phase compiles once, for all."""
    env, seeds = make_env(args), np.arange(args.seed, args.seed + args.num_seeds)
    seed_keys = jax.vmap(jax.random.PRNGKey)(jnp.array(seeds))
    size, ends = args.batch_size * args.num_minibatches * args.unroll_length, stage_ends(args)
    iterate = jax.jit(jax.vmap(partial(iteration, args, env), in_axes=(0, 0, None, None)), donate_argnums=0)
    episodes = jax.jit(jax.vmap(partial(evaluate, args, env), in_axes=(0, 0, 0, None)))
    init = jax.jit(jax.vmap(partial(init_agent, args, env.observation_size, env.action_size)))
    reset = jax.jit(lambda n, keys: jax.vmap(partial(reset_envs, env, n))(keys), static_argnums=0)
    decoder_pass = jax.jit(lambda n, *x: jax.vmap(partial(decoder_epoch, args, n))(*x), static_argnums=0)
    keys = partial(jax.jit(jax.vmap(derive_key, in_axes=(0, None, None))), seed_keys)
    def begin() -> TrainState:
        rows = (len(seeds), args.decoder_buffer_size // args.num_envs, args.num_envs)
        shapes = {"obs": (env.observation_size,), "u": (env.action_size,), "reward": ()}
        ring = {name: jnp.zeros(rows + shape) for name, shape in shapes.items()}
        return TrainState(init(keys(INIT, 0)), reset(args.num_envs, keys(RESET, 0)), ring)
    def returns(agent: Agent, index: int, deterministic: bool) -> np.ndarray:
        envs = reset(args.eval_envs, keys(EVAL_RESET, index))
        return np.asarray(episodes(agent, envs, keys(EVAL_ACT, index), deterministic))
    def evaluation(state: TrainState) -> None:
        r, now = returns(state.agent, 2 * done, deterministic=True), time.time() - start
        stats = {f"return_{name}": getattr(r, name)(1) for name in ("mean", "std", "min", "max")}
        row("eval", step=done * size, stage=stage, **stats, wall_time=now)
        text = ", ".join(f"{mean:.1f} +- {std:.1f}" for mean, std in zip(r.mean(1), r.std(1), strict=True))
        bar.write(f"step {done * size:,}, stage {stage}, {now:.0f} s: return {text}")
        bar.set_postfix_str(f"return {r.mean():.1f}")
    def refine(state: TrainState) -> TrainState:
        """Phase 2 of Algorithm 1, after a stage, and the re-initialisation that begins the next."""
        before = returns(state.agent, 2 * done + 1, deterministic=False)
        fresh, ring = init(keys(INIT, stage + 1)), state.ring
        recorded = min((done - [0, *ends][stage]) * size // args.num_envs, ring["reward"].shape[1])
        pairs = recorded * args.num_envs
        decoder = fresh.decoder if args.decoder_from_scratch else state.agent.decoder
        decoder = decoder | {"stats": jax.tree.map(jnp.copy, state.agent.stats)}
        opt = jax.vmap(optax.adam(args.decoder_learning_rate).init)(decoder["net"])
        for epoch in range(args.decoder_epochs):
            key = keys(DECODER, (stage + 1) * args.decoder_epochs + epoch)
            decoder, opt, loss = decoder_pass(pairs, decoder, opt, ring, key)
            row("decoder", stage=stage + 1, epoch=epoch, loss=loss)
            bar.set_postfix_str(f"decoder {stage + 1}, epoch {epoch + 1}/{args.decoder_epochs}")
        agent = start_stage(args, state.agent.replace(decoder=decoder), fresh)
        after = returns(agent, 2 * done + 1, deterministic=False)  # the same initial states and noise
        data = {"reward_mean": ring["reward"][:, :recorded].mean((1, 2)), "return_before": before.mean(1)}
        row("refine", step=done * size, stage=stage + 1, pairs=pairs, **data, return_after=after.mean(1))
        bar.write(f"decoder {stage + 1}: stochastic return from {before.mean():.1f} to {after.mean():.1f}")
        return state.replace(agent=agent, envs=reset(args.num_envs, keys(RESET, stage + 1)))
    state, meta = restore(run_dir, jax.eval_shape(begin))
    done, stage, start = meta["done"], meta["stage"], time.time() - meta["wall_time"]  # done: iterations
    row = partial(log, run_dir, start_wandb(args, run_dir) if args.track else None, seed=seeds)
    bar, saved_at = progress_bar(args, run_dir, done * size, ends[-1] * size), time.time()
    if state is None:
        state = begin()
        evaluation(state)
    while done < ends[-1]:
        if done == ends[stage]:
            state, stage = refine(state), stage + 1
        began, before = time.time(), done * size
        state, metrics = iterate(state, seed_keys, done, stage)
        metrics, done, step = jax.tree.map(np.asarray, metrics), done + 1, before + size
        clock = {"sps": size * len(seeds) / (time.time() - began), "wall_time": time.time() - start}
        row("train", step=step, stage=stage, **clock, **metrics)
        bar.update(size * len(seeds))
        if done in ends or step // 60_000_000 > before // 60_000_000:
            save_arrays(run_dir / "checkpoints" / f"policy_{step}.npz", state.agent.policy())
        if evaluated := done in ends or step // args.eval_every > before // args.eval_every:
            evaluation(state)
        if evaluated or time.time() - saved_at > 60 * args.checkpoint_minutes:
            save_state(run_dir, step, state, done=done, stage=stage, wall_time=time.time() - start)
            saved_at = time.time()
    bar.close()
    print(f"finished: {done * size:,} steps a seed in {time.time() - start:.0f} s; see {run_dir}")

def parse_args() -> Args:
    """Arguments: the command line's over the preset's, or over those of the run that is resumed."""
    args = tyro.cli(Args)
    try:
        base = Args(preset=args.preset) if args.resume is None else load_args(args.resume)
    except ValueError:
        require(False, "resume", args.resume, f"a run of {Path(__file__).name}, with its args.json")
    base = replace(base, **CPU_PRESET if args.preset == "cpu" and not args.resume else {}, resume=args.resume)
    unset = -(2**63)  # not given: budgets are checked against each other, and may grow on resuming
    given = tyro.cli(Args, default=replace(base, total_timesteps=unset, stage_timesteps=(unset,)))
    old, stages, total = base.stage_timesteps, given.stage_timesteps, given.total_timesteps
    if stages == (unset,) and args.resume:
        stages = (*old[:-1], old[-1] + max(0, total - sum(old)))
    elif stages == (unset,):
        stages = split_total(base.total_timesteps if total == unset else total)
    ok, takes = total == unset or 0 < total == sum(stages), "a number above 0, the sum of all stages' steps"
    require(ok, "total_timesteps", total, f"{takes} ({sum(stages)}; resuming, that or more)")
    args = replace(given, stage_timesteps=stages, total_timesteps=sum(stages))
    for k, stored in asdict(base).items() if args.resume else ():
        ok = getattr(args, k) == stored or k.startswith(("track", "wandb", "checkpoint", "total"))
        ok |= "stage" in k and stages[: len(old) - 1] == old[:-1] and stages[len(old) - 1 :] >= old[-1:]
        require(ok, k, getattr(args, k), f"the resumed run's, {stored} (a budget may be longer)")
    return args

# --- shared: main ---
def main() -> None:
    args = parse_args()
    check(args)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gorl" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    run_dir = Path(args.resume) if args.resume else make_run_dir(args)
    require(os.access(run_dir, os.W_OK), "resume", run_dir, "a directory to write to")
    write_args(args, run_dir)
    with jax.default_matmul_precision("highest"):  # physics wants full float32, and GPUs default to less
        train(args, run_dir)

if __name__ == "__main__":
    main()
# --- end shared ---
