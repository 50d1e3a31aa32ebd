"""GoRL(FM): PPO on a Gaussian latent policy, actions from a flow-matching decoder, on MuJoCo Playground.

Zhang et al., "GoRL: An Algorithm-Agnostic Framework for Online Reinforcement Learning with Generative
Policies" (2025); sections, equations and appendices cited below are the paper's. The method in five lines:

  1. The encoder pi(latent | s), a diagonal Gaussian, is trained with PPO (Eq. 5) and a KL to N(0, I) (Eq. 3).
  2. The decoder u = g(s, latent) makes actions tanh(u). It is frozen meanwhile; in stage 0 it is the identity.
  3. After a stage, flow matching (Eq. 6) trains it to map *fresh* N(0, I) noise to the latest rollouts' u.
  4. The encoder restarts as exactly N(0, I), which by (3) acts like the policy just trained; PPO goes on.
  5. Four stages of 60M, 60M, 30M and 30M environment steps. No likelihood of the decoder is ever needed.

    python gorl_fm_ppo.py --env-id HopperStand --seed 1

Axes in comments: K seeds, N environments, U unrolls of an environment in an iteration, T steps, B = U * N.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2; python_version < '3.12'", "jax==0.12.0.1; python_version >= '3.12'",
#   "flax==0.12.8; python_version < '3.12'", "flax==0.12.12; python_version >= '3.12'",
#   "optax==0.2.8", "playground==0.2.0", "mujoco==3.17.0", "mujoco-mjx==3.17.0",
#   "tyro==1.0.17", "tqdm==4.70.1", "wandb==0.31.0",
# ]
# ///

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import struct
from jax import Array, lax
from mujoco_playground import MjxEnv, State, dm_control_suite
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    """GoRL(FM): latent PPO with a flow-matching decoder on MuJoCo Playground's DM Control suite."""

    env_id: str = "HopperStand"  # a task of MuJoCo Playground's DM Control suite
    seed: int = 1  # the first seed
    num_seeds: int = 1  # seeds seed .. seed + num_seeds - 1 train together in this process
    preset: Literal["paper", "cpu"] = "paper"  # cpu: CheetahRun, all four stages in 10 minutes on 2 cores
    total_timesteps: int = 180_000_000  # environment steps of a seed, split 2 : 2 : 1 : 1 into stages
    stage_timesteps: tuple[int, ...] = ()  # environment steps of each stage; their sum is then the total
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
    clip_eps: tuple[float, ...] = (
        0.15,
        0.3,
    )  # PPO's clip range: one value, or one a stage (the last repeats)
    max_grad_norm: tuple[float, ...] = (0.5, 1.0)  # of encoder and critic jointly, likewise; inf for none
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


STAGE_SHARES = (2, 2, 1, 1)  # of the total: 60M, 60M, 30M, 30M steps (App. E.4)
PRESETS = {
    "paper": {},
    "cpu": dict(env_id="CheetahRun", total_timesteps=1_200_000, num_envs=128, batch_size=32,
                num_minibatches=16, update_epochs=8, eval_every=200_000, decoder_epochs=10,
                decoder_batch_size=1024, decoder_buffer_size=100_000),
}  # fmt: skip


# --- shared: argument checks ---
def require(ok: bool, argument: str, got: Any, takes: str) -> None:
    """Unless `ok`, ends the program with one line on stderr and exit status 2."""
    if not ok:
        argument = "--" + argument.replace("_", "-") if argument.isidentifier() else argument
        print(f"{Path(sys.argv[0]).name}: {argument}: got {got}; takes {takes}", file=sys.stderr)
        raise SystemExit(2)


def check_common(args: "Args") -> None:
    """Checks the arguments that all scripts have, before any device is touched."""
    tasks = ", ".join(sorted(dm_control_suite.ALL_ENVS))
    require(args.env_id in dm_control_suite.ALL_ENVS, "env_id", args.env_id, f"one of {tasks}")
    for name, got in asdict(args).items():
        numbers = got if isinstance(got, tuple) else [got] if type(got) in (int, float) else []
        zero = name in ("seed", "gae_lambda", "vf_coef", "ent_coef", "kl_coef")
        ok = all(n > 0 or (zero and n == 0) for n in numbers)  # also false for NaN
        ok = ok and all(n < 2**31 for n in numbers if name not in ("max_grad_norm", "total_timesteps"))
        require(ok and got != (), name, got, f"{'numbers of at least' if zero else 'numbers above'} 0")
    require(args.gamma <= 1, "gamma", args.gamma, "a number in (0, 1]")
    require(args.gae_lambda <= 1, "gae_lambda", args.gae_lambda, "a number in [0, 1]")
    unrolls = args.batch_size * args.num_minibatches
    takes = f"a product that --num-envs ({args.num_envs}) divides: an iteration is whole unrolls"
    require(unrolls % args.num_envs == 0, "--batch-size times --num-minibatches", unrolls, takes)
    ok = args.exp_name not in ("", ".", "..") and "/" not in args.exp_name
    require(ok, "exp_name", repr(args.exp_name), "a name without slashes")


# --- end shared ---


def split_total(total: int) -> tuple[int, ...]:
    """Stage budgets in the paper's proportions."""
    ends = [total * sum(STAGE_SHARES[:m]) // sum(STAGE_SHARES) for m in range(len(STAGE_SHARES) + 1)]
    return tuple(end - start for start, end in pairwise(ends))


def stage_ends(args: Args) -> list[int]:
    """Iterations done when each stage ends: cumulative budgets, rounded to iterations in integers."""
    size = args.batch_size * args.num_minibatches * args.unroll_length
    budgets = [sum(args.stage_timesteps[: m + 1]) for m in range(len(args.stage_timesteps))]
    return [(2 * budget + size) // (2 * size) for budget in budgets]


def check(args: Args) -> None:
    """Checks every argument, before anything compiles."""
    check_common(args)
    size, stages = args.batch_size * args.num_minibatches * args.unroll_length, args.stage_timesteps
    for m, (start, end) in enumerate(pairwise([0, *stage_ends(args)])):
        name = "total_timesteps" if stages == split_total(args.total_timesteps) else "stage_timesteps"
        takes = f"at least one iteration, {size} steps, a stage (a lower --batch-size makes it shorter)"
        require(end > start, name, f"{stages[m]} steps for stage {m}", takes)
        pairs = min((end - start) * size, args.decoder_buffer_size // args.num_envs * args.num_envs)
        require(
            pairs > 0, "decoder_buffer_size", args.decoder_buffer_size, f"--num-envs, {args.num_envs}, up"
        )
        ok, takes = args.decoder_batch_size <= pairs, f"at most the {pairs} pairs that stage {m} records"
        require(ok or m == len(stages) - 1, "decoder_batch_size", args.decoder_batch_size, takes)


# --- shared: environment ---
@struct.dataclass
class Envs:
    """A batch of environments, and the states they are reset to; every leaf leads with (N,)."""

    state: State
    first: State
    steps: Array  # control steps since the last reset


def make_env(args: "Args") -> MjxEnv:
    config = dm_control_suite.get_default_config(args.env_id)
    config.impl = args.impl  # Playground 0.2 itself defaults to warp
    if args.impl == "warp":  # its contact buffer serves all worlds, and Playground's is for 2048
        config.naconmax *= -(-max(args.num_envs, args.eval_envs) * args.num_seeds // 2048)
    return dm_control_suite.load(args.env_id, config=config)


def strong_types(tree: Any) -> Any:
    """`reset` and `step` differ in weak types, for which a jitted iteration would compile twice."""
    return jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), tree)


def reset_envs(env: MjxEnv, num_envs: int, key: Array) -> Envs:
    state = strong_types(jax.vmap(env.reset)(jax.random.split(key, num_envs)))
    return Envs(state=state, first=state, steps=jnp.zeros(num_envs, jnp.int32))


def step_envs(args: "Args", env: MjxEnv, envs: Envs, u: Array) -> tuple[Envs, Array, Array, Array]:
    """Steps every environment with the action tanh(u), u (N, action_dim), and resets those that are done.

    Returns:
        The environments; reward (N,), in [0, 1]; truncated (N,), bool: the time limit is reached, or the
        physics went NaN; broken (N,), bool: the latter, whose reward and next observation are dropped.
    """
    state = strong_types(jax.vmap(env.step)(envs.state, jnp.tanh(u)))
    broken = (state.done > 0) | ~jnp.isfinite(state.reward) | ~jnp.isfinite(state.obs).all(-1)
    truncated = broken | (envs.steps + 1 >= args.episode_length)

    def reset_done(first: Array, now: Array) -> Array:
        return jnp.where(truncated.reshape(-1, *[1] * (now.ndim - 1)), first, now)

    reward, steps = jnp.where(broken, 0.0, state.reward), jnp.where(truncated, 0, envs.steps + 1)
    state = jax.tree.map(reset_done, envs.first, state)
    return envs.replace(state=state, steps=steps), reward, truncated, broken


# --- end shared ---


# --- shared: running statistics ---
@struct.dataclass
class RunningStats:
    """Mean and variance, (obs_dim,) each, of all observations so far."""

    count: Array
    mean: Array
    var: Array


def init_stats(obs_dim: int) -> RunningStats:
    return RunningStats(count=jnp.zeros(()), mean=jnp.zeros(obs_dim), var=jnp.ones(obs_dim))


def merge_stats(stats: RunningStats, obs: Array) -> RunningStats:
    """Adds observations (..., obs_dim): Chan et al. (1979), in variances instead of sums of squares.

    The old variance keeps its share of the total count. Were it dropped, the standard deviation would
    shrink with every batch, and normalised observations would grow without bound.
    """
    size, obs_dim = obs.size // obs.shape[-1], obs.shape[-1]
    mean = obs.mean(-2).reshape(-1, obs_dim).mean(0)  # in two stages, against float32's rounding
    var = jnp.square(obs - mean).mean(-2).reshape(-1, obs_dim).mean(0)
    count, delta = stats.count + size, mean - stats.mean
    share = size / count
    var = stats.var + share * (var - stats.var + (1 - share) * jnp.square(delta))
    return RunningStats(count=count, mean=stats.mean + share * delta, var=var)


def normalize(stats: RunningStats, obs: Array) -> Array:
    """Observations (..., obs_dim) in standard deviations, clipped to +-10."""
    return jnp.clip((obs - stats.mean) / jnp.maximum(jnp.sqrt(stats.var), 1e-6), -10.0, 10.0)


# --- end shared ---


# --- shared: networks ---
def init_mlp(key: Array, sizes: tuple[int, ...], zero_last: bool = False) -> list[dict[str, Array]]:
    """LeCun-uniform kernels and zero biases; with `zero_last` the network's output starts at exactly 0."""
    init, keys = jax.nn.initializers.lecun_uniform(), jax.random.split(key, len(sizes) - 1)
    layers = [
        {"kernel": init(k, s), "bias": jnp.zeros(s[1])} for k, s in zip(keys, pairwise(sizes), strict=True)
    ]
    layers[-1]["kernel"] *= not zero_last
    return layers


def mlp(layers: list[dict[str, Array]], x: Array) -> Array:
    """SiLU network, (..., sizes[0]) -> (..., sizes[-1])."""
    for layer in layers[:-1]:
        x = jax.nn.silu(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


# --- end shared ---


@struct.dataclass
class Decoder:
    """The map g. The observation statistics are its own, of when it was trained: it must not move after."""

    flow: Any
    stats: RunningStats


@struct.dataclass
class Agent:
    """One seed's networks, or all seeds' with leading axes (K,). A policy has no critic and no Adam states."""

    params: dict[str, Any]  # "encoder", "critic"
    opt: dict[str, Any]  # an Adam state for each
    stats: RunningStats
    decoder: Decoder

    def policy(self) -> "Agent":
        return self.replace(params={"encoder": self.params["encoder"]}, opt={})


def init_agent(args: Args, obs_dim: int, action_dim: int, key: Array) -> Agent:
    """Encoder exactly N(0, I), decoder exactly the identity; sizes of App. E.3 and E.4."""
    encoder_key, critic_key, decoder_key = jax.random.split(key, 3)
    params = {
        "encoder": init_mlp(encoder_key, (obs_dim, 32, 32, 32, 32, 2 * action_dim), zero_last=True),
        "critic": init_mlp(critic_key, (obs_dim, 256, 256, 256, 256, 256, 1)),
    }
    opt = {name: optax.adam(args.learning_rate).init(layers) for name, layers in params.items()}
    flow = init_mlp(decoder_key, (obs_dim + action_dim + 8, 64, 64, 64, 64, action_dim), zero_last=True)
    stats = init_stats(obs_dim)
    return Agent(params=params, opt=opt, stats=stats, decoder=Decoder(flow=flow, stats=stats))


def start_stage(args: Args, agent: Agent, fresh: Agent) -> Agent:
    """Encoder and its Adam state start afresh, at N(0, I) (section 3.2); critic and statistics carry on."""
    if args.reinit_critic:
        return fresh.replace(decoder=agent.decoder)
    params = agent.params | {"encoder": fresh.params["encoder"]}
    return agent.replace(params=params, opt=agent.opt | {"encoder": fresh.opt["encoder"]})


def latent_distribution(encoder: Any, obs: Array) -> tuple[Array, Array]:
    """Mean and std, (..., action_dim) each, of pi(latent | s) at normalised observations (App. E.3)."""
    mean, raw = jnp.split(mlp(encoder, obs), 2, axis=-1)
    # Shifted: a network of output 0 is N(0, I).
    return mean, jnp.clip(jax.nn.softplus(raw + np.log(np.e - 1)), 1e-3, 10.0)


def gaussian_log_prob(mean: Array, std: Array, x: Array) -> Array:
    """Log-density of diagonal Gaussians, summed over the last axis."""
    return (-0.5 * jnp.square((x - mean) / std) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


def velocity(flow: Any, obs: Array, a: Array, t: Array) -> Array:
    """v(a_t, t, s) (App. C.2) at normalised observations; a (..., action_dim), t (..., 1)."""
    angles = t * 2.0 ** jnp.arange(4)
    return mlp(flow, jnp.concatenate([obs, a, jnp.cos(angles), jnp.sin(angles)], axis=-1))


def decode(args: Args, decoder: Decoder, obs: Array, latent: Array) -> Array:
    """u = g(s, latent) at raw observations: Euler's method from t = 0 to 1 (Eq. 19)."""
    obs = normalize(decoder.stats, obs)

    def euler_step(a: Array, t: Array) -> tuple[Array, None]:
        v = velocity(decoder.flow, obs, a, jnp.broadcast_to(t, a[..., :1].shape))
        return a + v / args.decoder_steps, None

    return lax.scan(euler_step, latent, jnp.arange(args.decoder_steps) / args.decoder_steps)[0]


def act(args: Args, agent: Agent, obs: Array, key: Array, deterministic: Any) -> Array:
    """u (..., action_dim) at raw observations; the evaluation policy decodes the latent's mean."""
    mean, std = latent_distribution(agent.params["encoder"], normalize(agent.stats, obs))
    noise = jnp.where(deterministic, 0.0, jax.random.normal(key, mean.shape))
    return decode(args, agent.decoder, obs, mean + std * noise)


@struct.dataclass
class Transitions:
    """What the update reads of a rollout, (U, T, N, ...)."""

    obs: Array
    latent: Array
    log_prob: Array  # of the latent, when it was drawn
    reward: Array
    truncated: Array  # 1.0 or 0.0


def rollout(
    args: Args, env: MjxEnv, agent: Agent, envs: Envs, key: Array
) -> tuple[Envs, Any, Any, Any, dict]:
    """U consecutive unrolls of T steps in every environment.

    Returns:
        The environments; transitions; the observation after each unroll (U, N, obs_dim), to bootstrap from;
        u (U, T, N, action_dim), for the decoder; metrics.
    """

    def step(envs: Envs, key: Array) -> tuple[Envs, tuple]:
        obs = envs.state.obs
        mean, std = latent_distribution(agent.params["encoder"], normalize(agent.stats, obs))
        latent = mean + std * jax.random.normal(key, mean.shape)
        u, log_prob = decode(args, agent.decoder, obs, latent), gaussian_log_prob(mean, std, latent)
        envs, reward, truncated, broken = step_envs(args, env, envs, u)
        return envs, (Transitions(obs, latent, log_prob, reward, truncated.astype(jnp.float32)), u, broken)

    def unroll(envs: Envs, key: Array) -> tuple[Envs, tuple]:
        envs, outputs = lax.scan(step, envs, jax.random.split(key, args.unroll_length))
        return envs, (*outputs, envs.state.obs)  # a reset state's after truncation, which is not bootstrapped

    keys = jax.random.split(key, args.batch_size * args.num_minibatches // args.num_envs)
    envs, (transitions, u, broken, last_obs) = lax.scan(unroll, envs, keys)
    metrics = {
        "reward_mean": transitions.reward.mean(),
        "nan_resets": broken.sum(),
        "latent_beyond_3": (jnp.abs(transitions.latent) > 3).mean(),
        "u_beyond_5": (jnp.abs(u) > 5).mean(),
    }
    return envs, transitions, last_obs, u, metrics


# --- shared: advantages ---
def gae(
    reward: Array, truncated: Array, value: Array, gamma: float, gae_lambda: float
) -> tuple[Array, Array]:
    """Critic targets and advantages, (T, N) each, by generalised advantage estimation as Brax has it.

    No sum crosses a truncated step: its advantage is 0 and its target its own value, so it teaches nothing.
    As in Brax the advantage is r + gamma * target' - value: its tail weighs gamma, not gamma * lambda.

    Args:
        reward, truncated: (T, N). value: (T + 1, N), the bootstrap value last.
    """
    going_on = 1.0 - truncated
    delta = (reward + gamma * value[1:] - value[:-1]) * going_on

    def backward(acc: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        acc = x[0] + gamma * gae_lambda * x[1] * acc
        return acc, acc

    target = value[:-1] + lax.scan(backward, jnp.zeros_like(value[0]), (delta, going_on), reverse=True)[1]
    next_target = jnp.concatenate([target[1:], value[-1:]])
    return target, (reward + gamma * next_target - value[:-1]) * going_on


# --- end shared ---


def clipped_surrogate(ratio: Array, advantage: Array, clip_eps: Any) -> Array:
    """PPO's objective (Eq. 5), to be maximised."""
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantage).mean()


def kl_to_prior(mean: Array, std: Array) -> Array:
    """KL(N(mean, std^2) || N(0, I)) (Eq. 3), summed over latent dimensions."""
    return (0.5 * (jnp.square(mean) + jnp.square(std) - 1) - jnp.log(std)).sum(-1)


def loss_fn(
    params: Any, args: Args, batch: Transitions, last_obs: Array, coefs: dict, key: Any
) -> tuple[Any, dict]:
    """Latent PPO (Eq. 3, 5). The decoder is not in it: its effect is all in the advantages (Lemma 3.1).

    Args:
        batch: leaves (batch_size, T, ...). last_obs: (batch_size, obs_dim). Observations are normalised.
        coefs: the stage's clip_eps and kl_coef. key: unused, other methods' losses draw samples.
    """
    value = mlp(params["critic"], jnp.concatenate([batch.obs, last_obs[:, None]], axis=1))[..., 0].T
    reward = args.reward_scale * batch.reward.T
    target, advantage = gae(reward, batch.truncated.T, lax.stop_gradient(value), args.gamma, args.gae_lambda)
    value_loss = jnp.square(target - value[:-1]).mean()
    advantage = ((advantage - advantage.mean()) / (advantage.std() + 1e-8)).T

    mean, std = latent_distribution(params["encoder"], batch.obs)
    log_ratio = gaussian_log_prob(mean, std, batch.latent) - batch.log_prob
    ratio, log_std, kl = jnp.exp(log_ratio), jnp.log(std), kl_to_prior(mean, std).mean()
    policy_loss = -clipped_surrogate(ratio, advantage, coefs["clip_eps"])
    entropy = (log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e)).sum(-1).mean()
    penalty = kl if args.latent_penalty == "kl" else jnp.square(mean).mean() + jnp.square(log_std).mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy + coefs["kl_coef"] * penalty
    return loss, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "explained_variance": 1 - (target - value[:-1]).var() / target.var(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clip_fraction": (jnp.abs(ratio - 1) > coefs["clip_eps"]).mean(),
        "entropy": entropy,
        "latent_kl": kl,
        "latent_log_std": log_std.mean(),
    }


# --- shared: update ---
def update(
    args: "Args", agent: Any, batch: Any, last_obs: Array, coefs: dict, key: Array
) -> tuple[Any, dict]:
    """`update_epochs` passes over the iteration's B unrolls, in new minibatches of whole unrolls each time.

    Args:
        batch: leaves (B, T, ...). last_obs: (B, obs_dim). Observations are normalised.
    Returns:
        The agent, and the metrics' means over minibatches.
    """
    adam = optax.adam(args.learning_rate)

    def minibatch_step(agent: Any, x: tuple[Array, Array]) -> tuple[Any, dict]:
        rows, key = x
        minibatch = jax.tree.map(lambda leaf: leaf[rows], batch)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(
            agent.params, args, minibatch, last_obs[rows], coefs, key
        )
        norms = {name: optax.global_norm(g) for name, g in grads.items()}
        norm = optax.global_norm(norms)
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, coefs["max_grad_norm"] / (norm + 1e-8)), grads)
        params, opt = {}, {}
        for name in grads:
            steps, opt[name] = adam.update(grads[name], agent.opt[name])
            params[name] = optax.apply_updates(agent.params[name], steps)
        return agent.replace(params=params, opt=opt), metrics | {
            f"grad_norm_{n}": v for n, v in norms.items()
        }

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


def record(ring: dict[str, Array], recorded: Array, new: dict[str, Array]) -> tuple[dict[str, Array], Array]:
    """Writes steps (U, T, N, ...) over a ring's (C, N, ...) oldest rows; `recorded` rows were ever written."""
    capacity, steps = len(ring["reward"]), new["reward"].shape[0] * new["reward"].shape[1]
    kept = min(capacity, steps)
    rows = (recorded + steps - kept + jnp.arange(kept)) % capacity
    new = {name: x.reshape(steps, *x.shape[2:])[-kept:] for name, x in new.items()}
    return {name: ring[name].at[rows].set(new[name], unique_indices=True) for name in ring}, recorded + steps


def flow_matching_loss(flow: Any, obs: Array, u: Array, key: Array) -> Array:
    """Conditional flow matching (Eq. 6, 18, 20) from fresh noise, 8 (tau, noise) draws a sample.

    Args:
        obs: (batch, obs_dim), normalised. u: (batch, action_dim).
    """
    tau_key, noise_key = jax.random.split(key)
    tau, noise = jax.random.uniform(tau_key, (8, len(u), 1)), jax.random.normal(noise_key, (8, *u.shape))
    v = velocity(flow, jnp.broadcast_to(obs, (8, *obs.shape)), (1 - tau) * noise + tau * u, tau)
    return jnp.square(v - (u - noise)).sum(-1).mean()


def decoder_epoch(
    args: Args, pairs: int, decoder: Decoder, opt: Any, ring: dict[str, Array], key: Array
) -> tuple:
    """One shuffled pass over the ring's first `pairs` entries: decoder, Adam state and mean loss after it."""
    adam = optax.adam(args.decoder_learning_rate)
    obs, u = (ring[name].reshape(-1, ring[name].shape[-1]) for name in ("obs", "u"))
    rows_key, key = jax.random.split(key)
    batches, used = (
        pairs // args.decoder_batch_size,
        pairs // args.decoder_batch_size * args.decoder_batch_size,
    )

    def step(carry: tuple[Any, Any], x: tuple[Array, Array]) -> tuple[tuple[Any, Any], Array]:
        (flow, opt), (rows, key) = carry, x
        batch = normalize(decoder.stats, obs[rows]), u[rows]
        loss, grads = jax.value_and_grad(flow_matching_loss)(flow, *batch, key)
        steps, opt = adam.update(grads, opt)
        return (optax.apply_updates(flow, steps), opt), loss

    rows = jax.random.permutation(rows_key, pairs)[:used].reshape(batches, -1)
    (flow, opt), losses = lax.scan(step, (decoder.flow, opt), (rows, jax.random.split(key, batches)))
    return decoder.replace(flow=flow), opt, losses.mean()


# --- shared: random keys and evaluation ---
INIT, RESET, TRAIN, EVAL_RESET, EVAL_ACT, DECODER = range(6)


def derive_key(seed_key: Array, purpose: int, index: Any) -> Array:
    """The key for a purpose at a point of a run: it depends on the seed, not on how many run beside it."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, purpose), index)


def evaluate(args: "Args", env: MjxEnv, agent: Any, envs: Envs, key: Array, deterministic: Any) -> Array:
    """Undiscounted returns (eval_envs,) of one episode each; a NaN state ends its episode."""

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        envs, running, returns = carry
        envs, reward, _, broken = step_envs(
            args, env, envs, act(args, agent, envs.state.obs, key, deterministic)
        )
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
    recorded: Array


def iteration(
    args: Args, env: MjxEnv, state: TrainState, seed_key: Array, index: Array, coefs: dict
) -> tuple:
    """Rollout, update, statistics and recording, for one seed: the next state, and metrics."""
    rollout_key, update_key = jax.random.split(derive_key(seed_key, TRAIN, index))
    agent = state.agent
    envs, steps, last_obs, u, rollout_metrics = rollout(args, env, agent, state.envs, rollout_key)
    batch = jax.tree.map(as_unrolls, steps.replace(obs=normalize(agent.stats, steps.obs)))
    last_obs = normalize(agent.stats, last_obs).reshape(-1, last_obs.shape[-1])
    agent, metrics = update(args, agent, batch, last_obs, coefs, update_key)
    # Only now do the statistics move: rollout and update saw the same ones, so that every ratio started at 1.
    agent = agent.replace(stats=merge_stats(agent.stats, steps.obs))
    ring, recorded = record(state.ring, state.recorded, {"obs": steps.obs, "u": u, "reward": steps.reward})
    return TrainState(agent=agent, envs=envs, ring=ring, recorded=recorded), metrics | rollout_metrics


# --- shared: run directory ---
def make_run_dir(args: "Args") -> Path:
    """Creates runs/<env-id>__<exp-name>__<seed>__<unix time>/, exclusively (on collision -2, -3, ...)."""
    run_dir = base = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    attempt = 1
    while True:
        try:
            (run_dir / "checkpoints").mkdir(parents=True)
            return run_dir
        except FileExistsError:
            attempt += 1
            run_dir = base.with_name(f"{base.name}-{attempt}")
        except OSError as error:
            require(False, "runs_dir", f"{args.runs_dir} ({error.strerror})", "a directory to write to")


def write_args(args: "Args", run_dir: Path) -> None:
    """args.json: the arguments and, as "versions", what else a rerun needs to give the same numbers."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "mujoco", "mujoco-mjx", "playground", "warp-lang")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    versions = {package: version(package) for package in packages} | {"python": sys.version.split()[0]}
    versions |= {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git_commit": commit or None,
    }
    content = json.dumps(asdict(args) | {"versions": versions}, indent=1)
    replace_file(run_dir / "args.json", lambda file: file.write(content.encode()))


def load_args(run_dir: str) -> "Args":
    try:
        stored = json.loads((Path(run_dir) / "args.json").read_text())
        stored = {
            name: tuple(v) if isinstance(v, list) else v for name, v in stored.items() if name != "versions"
        }
    except (OSError, ValueError, AttributeError):
        stored = {}
    ok = set(stored) == {field.name for field in fields(Args)}
    require(ok, "resume", run_dir, f"a run directory of {Path(__file__).name}, with its args.json")
    return Args(**stored)


def replace_file(path: Path, write: Callable) -> None:
    """Writes a file aside, flushes it to disk and renames it: at no moment is it half written."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_rows(run_dir: Path, name: str, rows: list[dict[str, Any]], wandb_run: Any) -> None:
    """Appends to a CSV file of the run, and to Weights & Biases."""
    with (run_dir / f"{name}.csv").open("a", newline="") as file:
        lines = [[f"{v:.7g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
        csv.writer(file).writerows(lines if file.tell() else [list(rows[0]), *lines])
    if wandb_run:
        wandb_run.log(
            {f"{name}/{k}/seed_{row['seed']}": v for row in rows for k, v in row.items() if k != "seed"}
        )


def drop_rows(run_dir: Path, name: str, column: str, last: int) -> None:
    """Removes what a killed run wrote after its checkpoint: rows beyond `last`, a half-written one."""
    if (path := run_dir / f"{name}.csv").exists():
        with path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        rows = [row for row in rows if len(row) == len(header) and int(row[header.index(column)]) <= last]
        text = "".join(",".join(row) + "\r\n" for row in [header, *rows] if rows)
        replace_file(path, lambda file: file.write(text.encode()))


def array_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def save_arrays(path: Path, tree: Any, **meta: Any) -> None:
    """An .npz file of the tree's leaves by name: no pickle, a checksum for each array."""
    arrays = {array_name(p): np.asarray(leaf) for p, leaf in jax.tree.leaves_with_path(tree)}
    replace_file(path, lambda file: np.savez(file, meta=json.dumps(meta), **arrays))


def load_arrays(path: Path, like: Callable) -> tuple[Any, dict[str, Any]]:
    """The tree `like(meta)`, of shapes and types, filled from `path`; and meta. ValueError if they differ."""

    def load(path: tuple, leaf: Any) -> Array:
        array = file[array_name(path)]
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{array_name(path)} is {array.dtype}{array.shape}, not {leaf.dtype}{leaf.shape}"
            )
        return jnp.array(array)

    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        return jax.tree.map_with_path(load, like(meta)), meta


def load_policy(run_dir: str, step: int | None = None, seed: int | None = None) -> Callable:
    """A trained policy as f(obs, key, deterministic=False) -> u.

    Args:
        run_dir: a run of this script. step: of a saved policy; the last by default. seed: the first by default.
    Returns:
        A function of raw observations (..., obs_dim); u is (..., action_dim), and the action is tanh(u).
    Raises:
        ValueError: the run has no policy of that step or seed.
    """
    args = load_args(run_dir)
    files = {int(file.stem.split("_")[1]): file for file in Path(run_dir).glob("checkpoints/policy_*.npz")}
    seeds, step = (
        range(args.seed, args.seed + args.num_seeds),
        max(files, default=None) if step is None else step,
    )
    if step not in files or (seed or args.seed) not in seeds:
        raise ValueError(
            f"no step {step}, seed {seed} in {run_dir}: steps {sorted(files)}, seeds {list(seeds)}"
        )
    env = make_env(args)
    init = jax.vmap(lambda key: init_agent(args, env.observation_size, env.action_size, key).policy())
    like = jax.eval_shape(init, jnp.zeros((args.num_seeds, 2), jnp.uint32))
    agents, _ = load_arrays(files[step], lambda meta: like)
    agent, jitted = (
        jax.tree.map(lambda x: x[(seed or args.seed) - args.seed], agents),
        jax.jit(partial(act, args)),
    )

    def policy(obs: Array, key: Array, deterministic: bool = False) -> Array:
        with jax.default_matmul_precision("highest"):
            return jitted(agent, obs, key, deterministic)

    return policy


def state_files(run_dir: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(run_dir.glob("checkpoints/state_*.npz"), key=lambda f: -int(f.stem.split("_")[1]))


def start_wandb(args: "Args", run_dir: Path) -> Any:
    """A Weights & Biases run named after the run directory; resuming continues it."""
    import wandb

    config, names = (
        json.loads((run_dir / "args.json").read_text()),
        {"name": run_dir.name, "id": run_dir.name},
    )
    where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "dir": run_dir}
    return wandb.init(**where, **names, config=config, resume="allow")


# --- end shared ---


def stage_coefs(args: Args, stage: int) -> dict[str, Array]:
    """Coefficients that may change with the stage: traced, so that all stages share one compiled iteration."""
    values = {name: getattr(args, name) for name in ("clip_eps", "max_grad_norm", "kl_coef")}
    return {name: jnp.float32(v[min(stage, len(v) - 1)]) for name, v in values.items()}


def train(args: Args, run_dir: Path) -> None:
    """Trains all seeds in `run_dir`, from its newest good checkpoint if it has one."""
    env, seeds = make_env(args), range(args.seed, args.seed + args.num_seeds)
    seed_keys = jax.vmap(jax.random.PRNGKey)(jnp.array(seeds))
    size, ends = args.batch_size * args.num_minibatches * args.unroll_length, stage_ends(args)
    rows, capacity = size // args.num_envs, args.decoder_buffer_size // args.num_envs  # of the ring

    # Each phase is compiled once and runs all seeds.
    iterate = jax.jit(jax.vmap(partial(iteration, args, env), in_axes=(0, 0, None, None)), donate_argnums=0)
    episodes = jax.jit(jax.vmap(partial(evaluate, args, env), in_axes=(0, 0, 0, None)))
    init = jax.jit(jax.vmap(partial(init_agent, args, env.observation_size, env.action_size)))
    reset = jax.jit(lambda n, keys: jax.vmap(partial(reset_envs, env, n))(keys), static_argnums=0)
    decoder_pass = jax.jit(lambda n, *x: jax.vmap(partial(decoder_epoch, args, n))(*x), static_argnums=0)
    keys = jax.jit(jax.vmap(derive_key, in_axes=(0, None, None)))

    def empty_ring() -> dict[str, Array]:
        shapes = {"obs": (env.observation_size,), "u": (env.action_size,), "reward": ()}
        return {
            name: jnp.zeros((len(seeds), capacity, args.num_envs, *shape)) for name, shape in shapes.items()
        }

    def begin() -> TrainState:
        envs = reset(args.num_envs, keys(seed_keys, RESET, 0))
        return TrainState(
            init(keys(seed_keys, INIT, 0)), envs, empty_ring(), jnp.zeros(len(seeds), jnp.int32)
        )

    def returns(agent: Agent, index: int, deterministic: bool) -> np.ndarray:
        envs = reset(args.eval_envs, keys(seed_keys, EVAL_RESET, index))
        return np.asarray(episodes(agent, envs, keys(seed_keys, EVAL_ACT, index), deterministic))

    def log(name: str, columns: dict[str, Any]) -> None:
        """A row for each seed; arrays lead with the seeds."""
        columns = {"seed": np.array(seeds)} | {k: np.broadcast_to(v, len(seeds)) for k, v in columns.items()}
        write_rows(
            run_dir,
            name,
            [{k: v[i].item() for k, v in columns.items()} for i in range(len(seeds))],
            wandb_run,
        )

    def reached(every: int) -> bool:
        return done * size // every > (done - 1) * size // every

    def evaluation(state: TrainState) -> None:
        r, now = returns(state.agent, 2 * done, deterministic=True), time.time() - start
        columns = {"step": done * size, "stage": stage, "return_mean": r.mean(1), "return_std": r.std(1)}
        log("eval", columns | {"return_min": r.min(1), "return_max": r.max(1), "wall_time": now})
        text = ", ".join(f"{mean:.1f} +- {std:.1f}" for mean, std in zip(r.mean(1), r.std(1), strict=True))
        bar.write(f"step {done * size:,}, stage {stage}, {now:.0f} s: return {text}")
        bar.set_postfix_str(f"return {r.mean():.1f}")

    def refine(state: TrainState) -> TrainState:
        """Phase 2 of Algorithm 1 at the end of a stage, and the re-initialisation that begins the next."""
        before = returns(state.agent, 2 * done + 1, deterministic=False)
        pairs, fresh = (
            min(int(state.recorded[0]), capacity) * args.num_envs,
            init(keys(seed_keys, INIT, stage + 1)),
        )
        decoder = fresh.decoder if args.decoder_from_scratch else state.agent.decoder
        decoder = decoder.replace(stats=jax.tree.map(jnp.copy, state.agent.stats))
        opt = jax.vmap(optax.adam(args.decoder_learning_rate).init)(decoder.flow)
        for epoch in range(args.decoder_epochs):
            key = keys(seed_keys, DECODER, (stage + 1) * args.decoder_epochs + epoch)
            decoder, opt, loss = decoder_pass(pairs, decoder, opt, state.ring, key)
            log("decoder", {"stage": stage + 1, "epoch": epoch, "loss": loss})
            bar.set_postfix_str(f"decoder {stage + 1}, epoch {epoch + 1}/{args.decoder_epochs}")
        agent = start_stage(args, state.agent.replace(decoder=decoder), fresh)
        after = returns(agent, 2 * done + 1, deterministic=False)  # the same initial states and noise
        columns = {"step": done * size, "stage": stage + 1, "pairs": pairs}
        columns |= {"pairs_reward_mean": state.ring["reward"].sum((1, 2)) / pairs}
        columns |= {"return_before_mean": before.mean(1), "return_before_std": before.std(1)}
        log("refine", columns | {"return_after_mean": after.mean(1), "return_after_std": after.std(1)})
        bar.write(
            f"decoder {stage + 1}: stochastic return {before.mean():.1f} before, {after.mean():.1f} after"
        )
        envs = reset(args.num_envs, keys(seed_keys, RESET, stage + 1))
        return TrainState(agent, envs, empty_ring(), jnp.zeros_like(state.recorded))

    def checkpoint(state: TrainState) -> None:
        # The ring is left out while the rest of the stage will overwrite it all.
        parts = vars(state) | ({"ring": None} if (ends[stage] - done) * rows >= capacity else {})
        meta = {
            "done": done,
            "stage": stage,
            "wall_time": time.time() - start,
            "ring": parts["ring"] is not None,
        }
        save_arrays(run_dir / "checkpoints" / f"state_{done * size}.npz", parts, **meta)
        for old in state_files(run_dir)[2:]:
            old.unlink()

    def like(meta: dict[str, Any]) -> dict[str, Any]:
        return vars(jax.eval_shape(begin)) | ({} if meta["ring"] else {"ring": None})

    state, done, stage, start = None, 0, 0, time.time()
    for file in state_files(run_dir):
        try:
            parts, meta = load_arrays(file, like)
            state = TrainState(**parts | {"ring": parts["ring"] or empty_ring()})
            done, stage, start = meta["done"], meta["stage"], start - meta["wall_time"]
            break
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            print(
                f"warning: {file} is damaged or another run's ({error}); trying the one before",
                file=sys.stderr,
            )
    for name, column, last in [("eval", "step", done * size), ("train", "step", done * size),
                               ("decoder", "stage", stage), ("refine", "stage", stage)]:  # fmt: skip
        drop_rows(run_dir, name, column, last if state else -1)
    total, where = ends[-1] * size, f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"{args.exp_name} on {args.env_id}, seeds {list(seeds)}: {total:,} steps each, {where}, {run_dir}")
    if jax.default_backend() == "cpu":
        hours = [total * len(seeds) / sps / 3600 for sps in (5000, 1000)]
        print(
            f"on a CPU this takes about {hours[0]:.1f} to {hours[1]:.1f} hours; --preset cpu takes 10 minutes"
        )
    wandb_run = start_wandb(args, run_dir) if args.track else None
    interval = 0.5 if sys.stdout.isatty() else 30.0
    bar = tqdm(total=total * len(seeds), initial=done * size * len(seeds), unit=" steps", unit_scale=True,
               file=sys.stdout, mininterval=interval, maxinterval=interval)  # fmt: skip
    if state is None:
        state = begin()
        evaluation(state)
    saved_at = time.time()
    while done < ends[-1]:
        if done == ends[stage]:
            state = refine(state)
            stage += 1
        began = time.time()
        state, metrics = iterate(state, seed_keys, done, stage_coefs(args, stage))
        metrics, done = jax.tree.map(np.asarray, metrics), done + 1
        clock = {"sps": size * len(seeds) / (time.time() - began), "wall_time": time.time() - start}
        log("train", {"step": done * size, "stage": stage} | clock | metrics)
        bar.update(size * len(seeds))
        ended = done in ends
        if ended or reached(60_000_000):
            policy_file = run_dir / "checkpoints" / f"policy_{done * size}.npz"
            save_arrays(policy_file, state.agent.policy())
        if ended or reached(args.eval_every):
            evaluation(state)
        if ended or reached(args.eval_every) or time.time() - saved_at > 60 * args.checkpoint_minutes:
            checkpoint(state)
            saved_at = time.time()
    bar.close()
    print(f"finished: {done * size:,} steps a seed in {time.time() - start:.0f} s; see {run_dir}")


def parse_args() -> Args:
    """Arguments: the command line's over the preset's, or over those of the run that is resumed."""
    args = tyro.cli(Args)
    base = (
        load_args(args.resume) if args.resume else replace(Args(), preset=args.preset, **PRESETS[args.preset])
    )
    # Defaults that stand for "not given": budgets are checked against each other, and may grow on resuming.
    given = tyro.cli(
        Args, default=replace(base, total_timesteps=-1, stage_timesteps=(-1,), resume=args.resume)
    )
    old, total = base.stage_timesteps or split_total(base.total_timesteps), given.total_timesteps
    stages = given.stage_timesteps
    if stages == (-1,):
        stages = old if total == -1 else split_total(total)
        if args.resume and total > sum(old):
            stages = (*old[:-1], old[-1] + total - sum(old))
    require(
        total in (-1, sum(stages)), "total_timesteps", total, f"the sum of --stage-timesteps, {sum(stages)}"
    )
    if args.resume:
        may_differ = {"resume", "checkpoint_minutes", "track", "wandb_project_name", "wandb_entity"}
        for name in asdict(base).keys() - may_differ - {"total_timesteps", "stage_timesteps"}:
            stored, got = getattr(base, name), getattr(given, name)
            require(got == stored, name, got, f"what the run was started with, {stored}, on resuming")
        longer = [new >= budget for new, budget in zip(stages, old, strict=False)]
        ok = len(stages) >= len(old) and all(longer) and stages[: len(old) - 1] == old[:-1]
        require(
            ok, "stage_timesteps", list(stages), f"the resumed run's {list(old)} with steps added at the end"
        )
    return replace(given, stage_timesteps=stages, total_timesteps=sum(stages))


# --- shared: main ---
def main() -> None:
    args = parse_args()
    check(args)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gorl" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    run_dir = Path(args.resume) if args.resume else make_run_dir(args)
    write_args(args, run_dir)
    with jax.default_matmul_precision("highest"):  # physics wants full float32, and GPUs default to less
        train(args, run_dir)


if __name__ == "__main__":
    main()
# --- end shared ---
