"""GoRL(FM): PPO on a Gaussian latent policy, actions from a flow-matching decoder, on MuJoCo Playground.

Zhang et al., "GoRL: An Algorithm-Agnostic Framework for Online Reinforcement Learning with Generative
Policies" (2025); sections, equations and appendices cited below are the paper's. The method in five lines:

  1. The encoder pi(latent | s), a diagonal Gaussian, is trained with PPO (Eq. 5) and a KL penalty to N(0, I) (Eq. 3).
  2. The decoder u = g(s, latent) makes actions tanh(u) of latents. It is frozen meanwhile; in stage 0 it is the identity.
  3. After a stage it is trained by flow matching (Eq. 6) to map *fresh* N(0, I) noise to the latest rollouts' actions.
  4. The encoder then restarts as exactly N(0, I), which by (3) acts like the policy just trained, and PPO goes on.
  5. Four stages: 60M, 60M, 30M and 30M environment steps. No likelihood of the decoder is ever needed.

    python gorl_fm_ppo.py --env-id HopperStand --seed 1

Axes in comments: K seeds, N environments, U unrolls an environment and iteration, T steps an unroll, B = U * N.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2; python_version < '3.12'",
#   "jax==0.12.0.1; python_version >= '3.12'",
#   "flax==0.12.8; python_version < '3.12'",
#   "flax==0.12.12; python_version >= '3.12'",
#   "optax==0.2.8",
#   "orbax-checkpoint==0.12.8",
#   "mujoco==3.17.0",
#   "mujoco-mjx==3.17.0",
#   "playground==0.2.0",
#   "tyro==1.0.17",
#   "tqdm==4.70.1",
#   "wandb==0.31.0",
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
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import serialization, struct
from jax import lax
from mujoco_playground import MjxEnv, State, dm_control_suite
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    """GoRL(FM): latent PPO with a flow-matching decoder on MuJoCo Playground's DM Control suite."""

    env_id: str = "HopperStand"  # a task of MuJoCo Playground's DM Control suite
    seed: int = 1  # the first seed
    num_seeds: int = 1  # seeds seed .. seed + num_seeds - 1 train together in this process
    preset: Literal["paper", "cpu"] = "paper"  # cpu: CheetahRun, all four stages, about 10 minutes on 2 cores
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
    clip_eps: tuple[float, ...] = (0.15, 0.3)  # PPO's clip range, one value or one per stage (the last repeats)
    max_grad_norm: tuple[float, ...] = (0.5, 1.0)  # of encoder and critic jointly, likewise; inf for none
    kl_coef: tuple[float, ...] = (1e-3,)  # beta of Eq. 3, likewise
    latent_penalty: Literal["kl", "l2"] = "kl"  # Eq. 3's KL, or App. E.4's L2 on mean and log-scale
    reinit_critic: bool = False  # start critic and observation statistics again, too, at each stage
    decoder_epochs: int = 50  # epochs of a decoder refinement
    decoder_batch_size: int = 8192  # (observation, u) pairs a decoder minibatch
    decoder_learning_rate: float = 3e-4  # Adam's, for the decoder
    decoder_buffer_size: int = 10_000_000  # most recent pairs of a stage, to train the decoder on
    decoder_steps: int = 10  # Euler steps of the flow
    decoder_from_scratch: bool = False  # train each decoder from fresh weights, not from its predecessor's
    episode_length: int = 1000  # control steps until an episode is cut off
    eval_every: int = 6_000_000  # environment steps between evaluations (ends of stages are evaluated, too)
    eval_envs: int = 128  # episodes an evaluation
    impl: Literal["jax", "warp"] = "jax"  # physics backend; the paper's is jax
    runs_dir: str = "runs"  # where run directories are made
    exp_name: str = Path(__file__).stem  # part of the run directory's name
    resume: str | None = None  # a run directory to continue; its arguments are taken over
    checkpoint_minutes: float = 30.0  # a checkpoint at least this often, beside those at evaluations
    checkpoint_env_state: bool = True  # exact resume; without it a few MB, fresh episodes, decoder data recollected
    track: bool = False  # log to Weights & Biases (WANDB_MODE=offline works, too)
    wandb_project_name: str = "gorl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases user or team


STAGE_SHARES = (2, 2, 1, 1)  # of the total: 60M, 60M, 30M, 30M steps (App. E.4)
PRESETS = {
    "paper": {},
    "cpu": dict(env_id="CheetahRun", total_timesteps=1_200_000, num_envs=128, batch_size=32, num_minibatches=16,
                update_epochs=8, decoder_epochs=10, decoder_batch_size=1024, decoder_buffer_size=100_000,
                eval_every=200_000),
}  # fmt: skip


# --- shared: argument checks ---
def require(ok: bool, argument: str, got: Any, takes: str) -> None:
    """Ends the program with one line on stderr and exit status 2 unless `ok`."""
    if not ok:
        argument = argument if " " in argument else "--" + argument.replace("_", "-")
        print(f"{Path(sys.argv[0]).name}: {argument}: got {got}; takes {takes}", file=sys.stderr)
        raise SystemExit(2)


def check_common(args: "Args") -> None:
    """Checks the arguments that all scripts have, before any device is touched."""
    tasks = ", ".join(sorted(dm_control_suite.ALL_ENVS))
    require(args.env_id in dm_control_suite.ALL_ENVS, "env_id", args.env_id, f"one of {tasks}")
    for field in fields(args):
        got = getattr(args, field.name)
        if field.type is int:
            lowest = 0 if field.name == "seed" else 1
            require(lowest <= got < 2**31, field.name, got, f"an integer of at least {lowest}")
        elif field.type is float:
            zero = field.name in ("gae_lambda", "vf_coef", "ent_coef")
            ok = np.isfinite(got) and (got > 0 or zero and got == 0)
            require(ok, field.name, got, f"a number {'of at least' if zero else 'above'} 0")
    require(args.gamma <= 1, "gamma", args.gamma, "a number in (0, 1]")
    require(args.gae_lambda <= 1, "gae_lambda", args.gae_lambda, "a number in [0, 1]")
    unrolls = args.batch_size * args.num_minibatches
    takes = f"a product that --num-envs ({args.num_envs}) divides, since an iteration is whole unrolls"
    require(unrolls % args.num_envs == 0, "--batch-size times --num-minibatches", unrolls, takes)
    require(args.exp_name not in ("", ".", "..") and "/" not in args.exp_name, "exp_name", args.exp_name, "a name")


def steps_per_iteration(args: "Args") -> int:
    return args.batch_size * args.num_minibatches * args.unroll_length


# --- end shared ---


def split_total(total: int) -> tuple[int, ...]:
    """A budget in the paper's proportions."""
    ends = [total * sum(STAGE_SHARES[:m]) // sum(STAGE_SHARES) for m in range(len(STAGE_SHARES) + 1)]
    return tuple(end - start for start, end in zip(ends[:-1], ends[1:], strict=True))


def stage_ends(args: Args) -> list[int]:
    """Iterations done when each stage ends: cumulative budgets, rounded to iterations in integers."""
    size, stages = steps_per_iteration(args), args.stage_timesteps
    return [(2 * sum(stages[: m + 1]) + size) // (2 * size) for m in range(len(stages))]


def check(args: Args) -> None:
    """Checks every argument, before anything compiles."""
    check_common(args)
    size, ends, stages = steps_per_iteration(args), stage_ends(args), args.stage_timesteps
    require(len(stages) > 0, "stage_timesteps", "an empty list", "the environment steps of each stage")
    for m, (budget, start, end) in enumerate(zip(stages, [0] + ends[:-1], ends, strict=True)):
        ok = budget > 0 and end > start
        takes = f"at least one iteration a stage, {size} steps (a lower --batch-size makes it shorter)"
        name = "total_timesteps" if stages == split_total(args.total_timesteps) else "stage_timesteps"
        require(ok, name, f"{budget} steps for stage {m}", takes)
        pairs = min((end - start) * size, args.decoder_buffer_size // args.num_envs * args.num_envs)
        ok = args.decoder_batch_size <= pairs or m == len(stages) - 1
        require(ok, "decoder_batch_size", args.decoder_batch_size, f"at most stage {m}'s {pairs} decoder pairs")
    ok = args.decoder_buffer_size >= args.num_envs
    require(ok, "decoder_buffer_size", args.decoder_buffer_size, f"at least --num-envs, {args.num_envs}")
    for name in ("clip_eps", "max_grad_norm", "kl_coef"):
        values, zero = getattr(args, name), name == "kl_coef"
        ok = len(values) > 0 and all(v > 0 or zero and v == 0 for v in values)
        require(ok, name, list(values), f"one number {'of at least' if zero else 'above'} 0, or one per stage")


# --- shared: environment ---
@struct.dataclass
class Envs:
    """A batch of environments, and the states they are reset to. All leaves lead with (N,)."""

    state: State
    first: State
    steps: jax.Array  # control steps since the last reset


def make_env(args: "Args") -> MjxEnv:
    config = dm_control_suite.get_default_config(args.env_id)
    config.impl = args.impl  # Playground 0.2 itself defaults to warp
    if args.impl == "warp":  # whose contact buffer serves all worlds; Playground's size is for 2048
        config.naconmax *= -(-max(args.num_envs, args.eval_envs) * args.num_seeds // 2048)
    return dm_control_suite.load(args.env_id, config=config)


def strong_types(tree: Any) -> Any:
    """`reset` and `step` differ in weak types, for which a jitted iteration would compile twice."""
    return jax.tree.map(lambda x: lax.convert_element_type(x, x.dtype), tree)


def reset_envs(env: MjxEnv, num_envs: int, key: jax.Array) -> Envs:
    state = strong_types(jax.vmap(env.reset)(jax.random.split(key, num_envs)))
    return Envs(state=state, first=state, steps=jnp.zeros(num_envs, jnp.int32))


def step_envs(args: "Args", env: MjxEnv, envs: Envs, u: jax.Array) -> tuple[Envs, jax.Array, jax.Array, jax.Array]:
    """Steps every environment with the action tanh(u), u (N, action_dim), and resets those that are done.

    Returns:
        The environments; reward (N,), in [0, 1]; truncated (N,), bool: the time limit was reached, or the physics
        went NaN; broken (N,), bool: the latter. A broken step's reward and next observation are dropped.
    """
    state = strong_types(jax.vmap(env.step)(envs.state, jnp.tanh(u)))
    broken = (state.done > 0) | ~jnp.isfinite(state.reward) | ~jnp.isfinite(state.obs).all(-1)
    truncated = broken | (envs.steps + 1 >= args.episode_length)

    def reset_done(first: jax.Array, now: jax.Array) -> jax.Array:
        return jnp.where(truncated.reshape(-1, *[1] * (now.ndim - 1)), first, now)

    state, reward = jax.tree.map(reset_done, envs.first, state), jnp.where(broken, 0.0, state.reward)
    return envs.replace(state=state, steps=jnp.where(truncated, 0, envs.steps + 1)), reward, truncated, broken


# --- end shared ---


# --- shared: running statistics ---
@struct.dataclass
class RunningStats:
    """Mean and variance, (obs_dim,) each, of all observations so far."""

    count: jax.Array
    mean: jax.Array
    var: jax.Array


def init_stats(obs_dim: int) -> RunningStats:
    return RunningStats(count=jnp.zeros(()), mean=jnp.zeros(obs_dim), var=jnp.ones(obs_dim))


def merge_stats(stats: RunningStats, obs: jax.Array) -> RunningStats:
    """Adds observations (..., obs_dim): Chan et al. (1979), in variances instead of sums of squares.

    The old variance keeps its share of the total count. Were it dropped, the standard deviation would shrink with
    every batch, and normalised observations grow without bound.
    """
    size, obs_dim = obs.size // obs.shape[-1], obs.shape[-1]
    mean = obs.mean(-2).reshape(-1, obs_dim).mean(0)  # in two stages, against float32's rounding
    var = jnp.square(obs - mean).mean(-2).reshape(-1, obs_dim).mean(0)
    count, delta = stats.count + size, mean - stats.mean
    share = size / count
    new_var = stats.var + share * (var - stats.var + (1 - share) * jnp.square(delta))
    return RunningStats(count=count, mean=stats.mean + share * delta, var=new_var)


def normalize(stats: RunningStats, obs: jax.Array) -> jax.Array:
    """Observations (..., obs_dim) in standard deviations, clipped to +-10."""
    return jnp.clip((obs - stats.mean) / jnp.maximum(jnp.sqrt(stats.var), 1e-6), -10.0, 10.0)


# --- end shared ---


# --- shared: networks ---
def init_mlp(key: jax.Array, sizes: tuple[int, ...], zero_last: bool = False) -> list[dict[str, jax.Array]]:
    """Layers of LeCun-uniform kernels and zero biases; with `zero_last` the output starts at exactly 0."""
    init, shapes = jax.nn.initializers.lecun_uniform(), list(zip(sizes[:-1], sizes[1:], strict=True))
    kernels = [init(k, shape) for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)]
    kernels[-1] *= not zero_last
    return [{"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for kernel in kernels]


def mlp(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """SiLU network, (..., sizes[0]) -> (..., sizes[-1])."""
    for layer in layers[:-1]:
        x = jax.nn.silu(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


# --- end shared ---


@struct.dataclass
class Decoder:
    """The map g. Its observation statistics are its own, of the moment it was trained: it must not move after."""

    params: Any
    stats: RunningStats


@struct.dataclass
class Agent:
    """One seed's networks. A policy file holds the same without critic and Adam states."""

    params: dict[str, Any]  # "encoder", "critic"
    opt: dict[str, Any]  # an Adam state for each
    stats: RunningStats
    decoder: Decoder

    def policy(self) -> "Agent":
        return self.replace(params={"encoder": self.params["encoder"]}, opt={})


def init_agent(args: Args, obs_dim: int, action_dim: int, key: jax.Array) -> Agent:
    """Encoder exactly N(0, I), decoder exactly the identity; sizes of App. E.3 and E.4."""
    encoder_key, critic_key, decoder_key = jax.random.split(key, 3)
    params = {
        "encoder": init_mlp(encoder_key, (obs_dim, 32, 32, 32, 32, 2 * action_dim), zero_last=True),
        "critic": init_mlp(critic_key, (obs_dim, 256, 256, 256, 256, 256, 1)),
    }
    opt = {name: optax.adam(args.learning_rate).init(layers) for name, layers in params.items()}
    flow = init_mlp(decoder_key, (obs_dim + action_dim + 8, 64, 64, 64, 64, action_dim), zero_last=True)
    stats = init_stats(obs_dim)
    return Agent(params=params, opt=opt, stats=stats, decoder=Decoder(params=flow, stats=stats))


def start_stage(args: Args, agent: Agent, fresh: Agent) -> Agent:
    """Re-initialises the encoder to N(0, I) with a fresh Adam state (section 3.2); critic and statistics carry on."""
    if args.reinit_critic:
        return fresh.replace(decoder=agent.decoder)
    params, opt = {**agent.params, "encoder": fresh.params["encoder"]}, {**agent.opt, "encoder": fresh.opt["encoder"]}
    return agent.replace(params=params, opt=opt)


def latent_distribution(encoder: Any, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and std, (..., action_dim) each, of pi(latent | s) at normalised observations (App. E.3).

    The softplus is shifted so that a network of output 0 is exactly N(0, I).
    """
    mean, raw = jnp.split(mlp(encoder, obs), 2, axis=-1)
    return mean, jnp.clip(jax.nn.softplus(raw + np.log(np.e - 1)), 1e-3, 10.0)


def gaussian_log_prob(mean: jax.Array, std: jax.Array, x: jax.Array) -> jax.Array:
    """Log-density of diagonal Gaussians, summed over the last axis."""
    return (-0.5 * jnp.square((x - mean) / std) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


def velocity(flow: Any, obs: jax.Array, a: jax.Array, t: jax.Array) -> jax.Array:
    """v(a_t, t, s) (App. C.2) at normalised observations; a (..., action_dim), t (..., 1)."""
    angles = t * 2.0 ** jnp.arange(4)
    return mlp(flow, jnp.concatenate([obs, a, jnp.cos(angles), jnp.sin(angles)], axis=-1))


def decode(args: Args, decoder: Decoder, obs: jax.Array, latent: jax.Array) -> jax.Array:
    """u = g(s, latent) at raw observations: Euler's method from t = 0 to 1 (Eq. 19)."""
    obs = normalize(decoder.stats, obs)

    def euler_step(a: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        t = jnp.broadcast_to(t, a[..., :1].shape)
        return a + velocity(decoder.params, obs, a, t) / args.decoder_steps, None

    return lax.scan(euler_step, latent, jnp.arange(args.decoder_steps) / args.decoder_steps)[0]


def act(args: Args, agent: Agent, obs: jax.Array, key: jax.Array, deterministic: Any) -> jax.Array:
    """u (..., action_dim) at raw observations; the evaluation policy decodes the latent's mean."""
    mean, std = latent_distribution(agent.params["encoder"], normalize(agent.stats, obs))
    noise = jnp.where(deterministic, 0.0, jax.random.normal(key, mean.shape))
    return decode(args, agent.decoder, obs, mean + std * noise)


@struct.dataclass
class Transitions:
    """What the update reads of a rollout, (U, T, N, ...)."""

    obs: jax.Array
    latent: jax.Array
    log_prob: jax.Array  # of the latent, when it was drawn
    reward: jax.Array
    truncated: jax.Array  # 1.0 or 0.0


def rollout(args: Args, env: MjxEnv, agent: Agent, envs: Envs, key: jax.Array) -> tuple[Envs, Any, Any, Any, dict]:
    """U consecutive unrolls of T steps in every environment.

    Returns:
        The environments; transitions; the observation after each unroll (U, N, obs_dim), to bootstrap from; u
        (U, T, N, action_dim), for the decoder; metrics.
    """

    def step(envs: Envs, key: jax.Array) -> tuple[Envs, tuple]:
        obs = envs.state.obs
        mean, std = latent_distribution(agent.params["encoder"], normalize(agent.stats, obs))
        latent = mean + std * jax.random.normal(key, mean.shape)
        u = decode(args, agent.decoder, obs, latent)
        envs, reward, truncated, broken = step_envs(args, env, envs, u)
        log_prob = gaussian_log_prob(mean, std, latent)
        return envs, (Transitions(obs, latent, log_prob, reward, truncated.astype(jnp.float32)), u, broken)

    def unroll(envs: Envs, key: jax.Array) -> tuple[Envs, tuple]:
        envs, outputs = lax.scan(step, envs, jax.random.split(key, args.unroll_length))
        return envs, (*outputs, envs.state.obs)  # a reset state's after truncation, which is not bootstrapped

    num_unrolls = args.batch_size * args.num_minibatches // args.num_envs
    envs, (transitions, u, broken, last_obs) = lax.scan(unroll, envs, jax.random.split(key, num_unrolls))
    metrics = {
        "reward_mean": transitions.reward.mean(),
        "nan_resets": broken.sum(),
        "latent_beyond_3": (jnp.abs(transitions.latent) > 3).mean(),
        "u_beyond_5": (jnp.abs(u) > 5).mean(),
    }
    return envs, transitions, last_obs, u, metrics


# --- shared: advantages ---
def gae(reward: Any, truncated: Any, value: Any, gamma: float, gae_lambda: float) -> tuple[jax.Array, jax.Array]:
    """Critic targets and advantages, (T, N) each, by generalised advantage estimation as Brax has it.

    No sum crosses a truncated step; its advantage is 0 and its target its own value, so that it teaches nothing. As
    in Brax the advantage is r + gamma * target' - value: its tail has the weight gamma, not gamma * lambda.

    Args:
        reward, truncated: (T, N). value: (T + 1, N), the bootstrap value last.
    """
    going_on = 1.0 - truncated
    delta = (reward + gamma * value[1:] - value[:-1]) * going_on

    def backward(acc: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        acc = x[0] + gamma * gae_lambda * x[1] * acc
        return acc, acc

    target = value[:-1] + lax.scan(backward, jnp.zeros_like(value[0]), (delta, going_on), reverse=True)[1]
    next_target = jnp.concatenate([target[1:], value[-1:]])
    return target, (reward + gamma * next_target - value[:-1]) * going_on


# --- end shared ---


def clipped_surrogate(ratio: jax.Array, advantage: jax.Array, clip_eps: Any) -> jax.Array:
    """PPO's objective (Eq. 5), to be maximised."""
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * advantage).mean()


def kl_to_prior(mean: jax.Array, std: jax.Array) -> jax.Array:
    """KL(N(mean, std^2) || N(0, I)) (Eq. 3), summed over latent dimensions."""
    return (0.5 * (jnp.square(mean) + jnp.square(std) - 1) - jnp.log(std)).sum(-1)


def loss_fn(params: Any, args: Args, batch: Transitions, last_obs: Any, coefs: Any, key: Any) -> tuple[Any, dict]:
    """Latent PPO (Eq. 3, 5). The decoder is not in it: its effect is all in the advantages (Lemma 3.1).

    Args:
        batch: leaves (batch_size, T, ...). last_obs: (batch_size, obs_dim). Observations are normalised.
        coefs: the stage's clip_eps and kl_coef.
    """
    del key  # other methods' losses draw samples
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
def update(args: "Args", agent: Any, batch: Any, last_obs: Any, coefs: Any, key: jax.Array) -> tuple[Any, dict]:
    """`update_epochs` passes over the iteration's B unrolls, in new minibatches of whole unrolls each time.

    Args:
        batch: leaves (B, T, ...). last_obs: (B, obs_dim). Observations are normalised.
    Returns:
        The agent, and the metrics' means over minibatches.
    """
    adam = optax.adam(args.learning_rate)

    def minibatch_step(agent: Any, x: tuple[jax.Array, jax.Array]) -> tuple[Any, dict]:
        rows, key = x
        minibatch = jax.tree.map(lambda leaf: leaf[rows], batch)
        grads, metrics = jax.grad(loss_fn, has_aux=True)(agent.params, args, minibatch, last_obs[rows], coefs, key)
        norm = optax.global_norm(grads)
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, coefs["max_grad_norm"] / (norm + 1e-8)), grads)
        params, opt = {}, {}
        for name in grads:
            steps, opt[name] = adam.update(grads[name], agent.opt[name])
            params[name] = optax.apply_updates(agent.params[name], steps)
            metrics[f"grad_share_{name}"] = optax.global_norm(grads[name]) / optax.global_norm(grads)
        return agent.replace(params=params, opt=opt), metrics | {"grad_norm": norm}

    def epoch(agent: Any, key: jax.Array) -> tuple[Any, dict]:
        rows_key, key = jax.random.split(key)
        rows = jax.random.permutation(rows_key, len(last_obs)).reshape(args.num_minibatches, args.batch_size)
        return lax.scan(minibatch_step, agent, (rows, jax.random.split(key, args.num_minibatches)))

    agent, metrics = lax.scan(epoch, agent, jax.random.split(key, args.update_epochs))
    return agent, jax.tree.map(jnp.mean, metrics)


def as_unrolls(x: jax.Array) -> jax.Array:
    """(U, T, N, ...) -> (U * N, T, ...)."""
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], *x.shape[3:])


# --- end shared ---


def record(ring: dict[str, jax.Array], recorded: jax.Array, new: dict[str, jax.Array]) -> tuple[dict, jax.Array]:
    """Writes steps (U, T, N, ...) over the oldest rows of a ring (C, N, ...); `recorded` counts the rows ever written."""
    capacity, steps = len(ring["reward"]), new["reward"].shape[0] * new["reward"].shape[1]
    kept = min(capacity, steps)
    rows = (recorded + steps - kept + jnp.arange(kept)) % capacity

    def write(ring: jax.Array, new: jax.Array) -> jax.Array:
        return ring.at[rows].set(new.reshape(steps, *new.shape[2:])[-kept:], unique_indices=True)

    return jax.tree.map(write, ring, new), recorded + steps


def flow_matching_loss(flow: Any, obs: jax.Array, u: jax.Array, key: jax.Array) -> jax.Array:
    """Conditional flow matching (Eq. 6, 18, 20) from fresh noise, 8 (tau, noise) draws a sample.

    Args:
        obs: (batch, obs_dim), normalised. u: (batch, action_dim).
    """
    tau_key, noise_key = jax.random.split(key)
    tau = jax.random.uniform(tau_key, (8, len(u), 1))
    noise = jax.random.normal(noise_key, (8, *u.shape))
    v = velocity(flow, jnp.broadcast_to(obs, (8, *obs.shape)), (1 - tau) * noise + tau * u, tau)
    return jnp.square(v - (u - noise)).sum(-1).mean()


def decoder_epoch(
    args: Args, pairs: int, decoder: Decoder, opt: Any, ring: dict[str, jax.Array], key: jax.Array
) -> tuple[Decoder, Any, jax.Array]:
    """One shuffled pass over the ring's first `pairs` entries; returns decoder, Adam's state and the mean loss."""
    obs, u = (ring[name].reshape(-1, ring[name].shape[-1]) for name in ("obs", "u"))
    rows_key, key = jax.random.split(key)
    batches = pairs // args.decoder_batch_size
    rows = jax.random.permutation(rows_key, pairs)[: batches * args.decoder_batch_size].reshape(batches, -1)

    def step(carry: tuple[Any, Any], x: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], jax.Array]:
        (flow, opt), (rows, key) = carry, x
        loss, grads = jax.value_and_grad(flow_matching_loss)(flow, normalize(decoder.stats, obs[rows]), u[rows], key)
        steps, opt = optax.adam(args.decoder_learning_rate).update(grads, opt)
        return (optax.apply_updates(flow, steps), opt), loss

    (flow, opt), losses = lax.scan(step, (decoder.params, opt), (rows, jax.random.split(key, batches)))
    return decoder.replace(params=flow), opt, losses.mean()


@struct.dataclass
class TrainState:
    """All that changes in a run, for one seed. Random keys follow from seed and iteration, and are not in it."""

    agent: Agent
    envs: Envs
    ring: dict[str, jax.Array]  # "obs", "u", "reward": the stage's latest C steps of every environment
    recorded: jax.Array


def iteration(
    args: Args, env: MjxEnv, state: TrainState, seed_key: jax.Array, index: jax.Array, coefs: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Rollout, PPO update, observation statistics and recording, for one seed."""
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


# --- shared: random keys and evaluation ---
INIT, RESET, TRAIN, EVAL_RESET, EVAL_ACT, DECODER = range(6)


def derive_key(seed_key: jax.Array, purpose: int, index: Any) -> jax.Array:
    """The key for a purpose at a point of the run; it depends on the seed, not on how many run beside it."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, purpose), index)


def evaluate(args: "Args", env: MjxEnv, agent: Any, envs: Envs, key: jax.Array, deterministic: Any) -> jax.Array:
    """Undiscounted returns (eval_envs,) of one episode each; a NaN state ends its episode."""

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        envs, running, returns = carry
        u = act(args, agent, envs.state.obs, key, deterministic)
        envs, reward, _, broken = step_envs(args, env, envs, u)
        running &= ~broken
        return (envs, running, returns + jnp.where(running, reward, 0.0)), None

    start = (envs, jnp.ones(args.eval_envs, bool), jnp.zeros(args.eval_envs))
    return lax.scan(step, start, jax.random.split(key, args.episode_length))[0][2]


# --- end shared ---


# --- shared: run directory ---
def make_run_dir(args: "Args") -> Path:
    """Creates runs/<env-id>__<exp-name>__<seed>__<unix time>/, exclusively."""
    run_dir = base = Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    for attempt in range(2, 1000):
        try:
            run_dir.mkdir(parents=True)
            (run_dir / "checkpoints").mkdir()
            return run_dir
        except FileExistsError:
            run_dir = base.with_name(f"{base.name}-{attempt}")
        except OSError as error:
            break
    require(False, "runs_dir", f"{args.runs_dir} ({error.strerror})", "a directory that can be written to")


def write_args(args: "Args", run_dir: Path) -> dict[str, Any]:
    """args.json: the arguments, and under "versions" what else a rerun needs to give the same numbers."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "mujoco", "mujoco-mjx", "playground", "warp-lang")
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    found = {package: version(package) for package in packages} | {"python": sys.version.split()[0]}
    found |= {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "git_commit": commit or "unknown"}
    config = asdict(args) | {"versions": found}
    replace_file(run_dir / "args.json", json.dumps(config, indent=1).encode())
    return config


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file aside, then renames it: it is old or new at any moment, never half."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(content)
    aside.replace(path)


def load_args(run_dir: str) -> "Args":
    takes = f"a run directory of {Path(__file__).name}, with its args.json"
    try:
        stored = json.loads((Path(run_dir) / "args.json").read_text())
        stored = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items() if name != "versions"}
    except (OSError, ValueError, AttributeError):
        stored = {}
    require(set(stored) == {field.name for field in fields(Args)}, "resume", run_dir, takes)
    return Args(**stored)


def write_rows(run_dir: Path, name: str, rows: list[dict[str, Any]], wandb_run: Any) -> None:
    """Appends to a CSV file of the run, and to Weights & Biases."""
    with (run_dir / f"{name}.csv").open("a", newline="") as file:
        lines = [[f"{v:.7g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
        csv.writer(file).writerows(lines if file.tell() else [list(rows[0]), *lines])
    if wandb_run:
        values = {f"{name}/{k}/seed_{r['seed']}": v for r in rows for k, v in r.items() if k not in ("seed", "step")}
        wandb_run.log(values | {"step": rows[0]["step"]} if "step" in rows[0] else values)


def drop_rows(run_dir: Path, name: str, column: str, last: int) -> None:
    """Removes what a killed run wrote after its checkpoint: rows beyond `last`, and a half-written one."""
    path = run_dir / f"{name}.csv"
    if path.exists():
        with path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        rows = [row for row in rows if len(row) == len(header) and int(row[header.index(column)]) <= last]
        replace_file(path, "".join(",".join(row) + "\r\n" for row in [header, *rows] if rows).encode())


def save_policy(run_dir: Path, step: int, agent: Any) -> None:
    """checkpoints/policy_<step>.msgpack: all seeds' policies, without the critic."""
    content = serialization.to_bytes(jax.device_get(agent.policy()))
    replace_file(run_dir / "checkpoints" / f"policy_{step}.msgpack", content)


def load_policy(run_dir: str, step: int | None = None, seed: int | None = None) -> Callable:
    """A trained policy as f(obs, key, deterministic=False) -> u.

    Args:
        run_dir: a run of this script. step: of a saved policy (default: the last). seed: default the run's first.
    Returns:
        A function of raw observations (..., obs_dim); the action is tanh(u), u (..., action_dim).
    Raises:
        ValueError: the run has no policy of that step or seed.
    """
    args = load_args(run_dir)
    files = {int(file.stem.split("_")[1]): file for file in Path(run_dir).glob("checkpoints/policy_*.msgpack")}
    seeds = range(args.seed, args.seed + args.num_seeds)
    if not files or step is not None and step not in files or seed is not None and seed not in seeds:
        raise ValueError(f"{run_dir} has no step {step}, seed {seed}: its steps are {sorted(files)}, seeds {[*seeds]}")
    stored = serialization.msgpack_restore(files[max(files) if step is None else step].read_bytes())
    env = make_env(args)
    agent = init_agent(args, env.observation_size, env.action_size, jax.random.PRNGKey(0)).policy()
    index = 0 if seed is None else seed - args.seed
    agent = serialization.from_state_dict(agent, jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), stored))
    jitted = jax.jit(partial(act, args))

    def policy(obs: jax.Array, key: jax.Array, deterministic: bool = False) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jitted(agent, obs, key, deterministic)

    return policy


def start_wandb(args: "Args", run_dir: Path) -> Any:
    """A Weights & Biases run named after the run directory; resuming continues it."""
    import wandb

    config = json.loads((run_dir / "args.json").read_text())
    where = dict(project=args.wandb_project_name, entity=args.wandb_entity, dir=run_dir)
    return wandb.init(**where, name=run_dir.name, id=run_dir.name, config=config, resume="allow")


def leaf_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def save(manager: ocp.CheckpointManager, step: int, parts: dict[str, Any], meta: dict[str, Any]) -> None:
    """Starts writing a checkpoint: a flat dictionary of arrays (Orbax takes none of size 0), and counters as JSON."""
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(parts) if leaf.size}
    items = {"arrays": ocp.args.StandardSave(leaves), "meta": ocp.args.JsonSave(meta | {"parts": list(parts)})}
    manager.save(step, args=ocp.args.Composite(**items))


def restore(manager: ocp.CheckpointManager, step: int, state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts of the state that a checkpoint has, and its counters; `state` gives shapes and types."""
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    parts = {name: getattr(state, name) for name in meta["parts"]}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), parts)
    leaves = {leaf_name(path): x for path, x in jax.tree.leaves_with_path(shapes) if x.size}
    arrays = manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(leaves)))["arrays"]
    empty = {leaf_name(path): jnp.zeros(x.shape, x.dtype) for path, x in jax.tree.leaves_with_path(shapes) if not x.size}
    return jax.tree.map_with_path(lambda path, _: (arrays | empty)[leaf_name(path)], parts), meta


# --- end shared ---


def stage_coefs(args: Args, stage: int) -> dict[str, jax.Array]:
    """Coefficients that may change with the stage: traced, so that all stages share one compiled iteration."""
    values = {name: getattr(args, name) for name in ("clip_eps", "max_grad_norm", "kl_coef")}
    return {name: jnp.float32(v[min(stage, len(v) - 1)]) for name, v in values.items()}


def train(args: Args, run_dir: Path) -> None:
    """Trains all seeds in `run_dir`, from its last checkpoint if it has one."""
    env = make_env(args)
    obs_dim, action_dim = env.observation_size, env.action_size
    seeds = list(range(args.seed, args.seed + args.num_seeds))
    seed_keys = jax.vmap(jax.random.PRNGKey)(jnp.array(seeds))
    size, ends = steps_per_iteration(args), stage_ends(args)
    rows, capacity = size // args.num_envs, args.decoder_buffer_size // args.num_envs  # of the decoder's ring

    # Each phase is compiled once and runs all seeds.
    iterate = jax.jit(jax.vmap(partial(iteration, args, env), in_axes=(0, 0, None, None)), donate_argnums=0)
    episodes = jax.jit(jax.vmap(partial(evaluate, args, env), in_axes=(0, 0, 0, None)))
    reset = jax.jit(lambda n, keys: jax.vmap(partial(reset_envs, env, n))(keys), static_argnums=0)
    init = jax.jit(jax.vmap(partial(init_agent, args, obs_dim, action_dim)))
    decoder_pass = jax.jit(
        lambda pairs, *x: jax.vmap(partial(decoder_epoch, args, pairs))(*x), static_argnums=0, donate_argnums=(1, 2)
    )
    keys = jax.jit(lambda purpose, index: jax.vmap(lambda k: derive_key(k, purpose, index))(seed_keys))

    def empty_ring() -> dict[str, jax.Array]:
        shape = (args.num_seeds, capacity, args.num_envs)
        return {"obs": jnp.zeros((*shape, obs_dim)), "u": jnp.zeros((*shape, action_dim)), "reward": jnp.zeros(shape)}

    def begin() -> TrainState:
        envs = reset(args.num_envs, keys(RESET, 0))
        return TrainState(init(keys(INIT, 0)), envs, empty_ring(), jnp.zeros(args.num_seeds, jnp.int32))

    def returns(agent: Agent, index: int, deterministic: bool) -> np.ndarray:
        envs = reset(args.eval_envs, keys(EVAL_RESET, index))
        return np.asarray(episodes(agent, envs, keys(EVAL_ACT, index), deterministic))

    def log(name: str, columns: dict[str, Any]) -> None:
        """One row a seed; arrays lead with the seeds."""
        per_seed = [{k: float(v[i]) if np.ndim(v) else v for k, v in columns.items()} for i in range(len(seeds))]
        write_rows(run_dir, name, [{"seed": s} | row for s, row in zip(seeds, per_seed, strict=True)], wandb_run)

    def refine(state: TrainState) -> TrainState:
        """Phase 2 of Algorithm 1 at the end of a stage, and the re-initialisation that begins the next."""
        before = returns(state.agent, 2 * done + 1, deterministic=False)
        pairs = min(int(state.recorded[0]), capacity) * args.num_envs
        fresh = init(keys(INIT, stage + 1))
        decoder = fresh.decoder if args.decoder_from_scratch else state.agent.decoder
        decoder = Decoder(jax.tree.map(jnp.copy, decoder.params), jax.tree.map(jnp.copy, state.agent.stats))
        opt = jax.vmap(optax.adam(args.decoder_learning_rate).init)(decoder.params)
        for epoch in range(args.decoder_epochs):
            key = keys(DECODER, (stage + 1) * 10_000 + epoch)
            decoder, opt, loss = decoder_pass(pairs, decoder, opt, state.ring, key)
            log("decoder", {"stage": stage + 1, "epoch": epoch, "loss": loss})
            bar.set_postfix_str(f"decoder {stage + 1}, epoch {epoch + 1}/{args.decoder_epochs}")
        agent = start_stage(args, state.agent.replace(decoder=decoder), fresh)
        after = returns(agent, 2 * done + 1, deterministic=False)
        reward = state.ring["reward"].sum((1, 2)) / pairs
        columns = {"step": done * size, "stage": stage + 1, "pairs": pairs, "pairs_reward_mean": reward}
        columns |= {"return_before": before.mean(1), "return_before_std": before.std(1)}
        log("refine", columns | {"return_after": after.mean(1), "return_after_std": after.std(1)})
        bar.write(f"decoder {stage + 1} trained: stochastic return {before.mean():.1f} before, {after.mean():.1f} after")
        envs = reset(args.num_envs, keys(RESET, stage + 1))
        return TrainState(agent, envs, jax.tree.map(jnp.zeros_like, state.ring), jnp.zeros_like(state.recorded))

    def checkpoint() -> None:
        parts = {"agent": state.agent, "recorded": state.recorded}
        if args.checkpoint_env_state:
            parts["envs"] = state.envs
            if (ends[stage] - done) * rows < capacity:  # else the rest of the stage overwrites it all
                parts["ring"] = state.ring
        save(manager, done * size, parts, {"iteration": done, "stage": stage, "wall_time": time.time() - start})

    options = ocp.CheckpointManagerOptions(max_to_keep=2, step_prefix="state")
    manager = ocp.CheckpointManager((run_dir / "checkpoints").absolute(), options=options)
    done, stage, start, saved_at = 0, 0, time.time(), time.time()  # done: iterations
    if (latest := manager.latest_step()) is None:
        state = begin()
    else:
        parts, meta = restore(manager, latest, jax.eval_shape(begin))
        done, stage, start = meta["iteration"], meta["stage"], start - meta["wall_time"]
        if "envs" not in parts:
            print("the checkpoint has no environment state: episodes start afresh, decoder data are collected anew")
            at_start = done == ([0] + ends)[stage]
            parts["envs"] = reset(args.num_envs, keys(RESET, stage if at_start else 10_000 + done))
            parts["recorded"] = jnp.zeros_like(parts["recorded"])
        state = TrainState(**({"ring": empty_ring()} | parts))
    for name, column, last in [("eval", "step", done * size), ("train", "step", done * size), ("decoder", "stage", stage),
                               ("refine", "stage", stage)]:  # fmt: skip
        drop_rows(run_dir, name, column, last if latest is not None else -1)
    wandb_run = start_wandb(args, run_dir) if args.track else None
    total = ends[-1] * size
    interval = 0.5 if sys.stdout.isatty() else 30.0
    bar = tqdm(total=total * len(seeds), initial=done * size * len(seeds), unit="step", unit_scale=True, file=sys.stdout,
               mininterval=interval, maxinterval=interval, dynamic_ncols=True)  # fmt: skip

    def evaluation() -> None:
        r, now = returns(state.agent, 2 * done, deterministic=True), time.time() - start
        columns = {"step": done * size, "stage": stage, "return_mean": r.mean(1), "return_std": r.std(1)}
        log("eval", columns | {"return_min": r.min(1), "return_max": r.max(1), "wall_time": now})
        bar.set_postfix_str(f"return {r.mean():.1f}")
        text = ", ".join(f"{mean:.1f} +- {std:.1f}" for mean, std in zip(r.mean(1), r.std(1), strict=True))
        bar.write(f"step {done * size:,}/{total:,} stage {stage}: return {text} after {now:.0f} s")

    if latest is None:
        evaluation()
    while done < ends[-1]:
        if done == ends[stage]:
            state = refine(state)
            stage += 1
            if not args.checkpoint_env_state:
                checkpoint()
        began = time.time()
        state, metrics = iterate(state, seed_keys, done, stage_coefs(args, stage))
        metrics = jax.tree.map(np.asarray, metrics)
        done += 1
        sps = size * len(seeds) / (time.time() - began)
        log("train", {"step": done * size, "stage": stage, "sps": sps, "wall_time": time.time() - start} | metrics)
        bar.update(size * len(seeds))
        ends_stage = done in ends
        evaluated = ends_stage or done * size // args.eval_every > (done - 1) * size // args.eval_every
        if ends_stage or done * size // 60_000_000 > (done - 1) * size // 60_000_000:
            save_policy(run_dir, done * size, state.agent)
        if evaluated:
            evaluation()
        if evaluated or time.time() - saved_at > 60 * args.checkpoint_minutes:
            # Without the ring a stage's end cannot be resumed: the checkpoint then follows the refinement.
            if args.checkpoint_env_state or not ends_stage or done == ends[-1]:
                checkpoint()
                saved_at = time.time()
    manager.wait_until_finished()
    manager.close()
    bar.close()
    print(f"finished {total:,} steps; logs and policies are in {run_dir}")


def parse_args() -> Args:
    """Arguments: the command line's over the preset's, or over those of the run that is resumed."""
    args = tyro.cli(Args)
    require(args.total_timesteps > 0, "total_timesteps", args.total_timesteps, "an integer of at least 1")
    base = load_args(args.resume) if args.resume else replace(Args(), preset=args.preset, **PRESETS[args.preset])
    # 0 and (0,) stand for "not given": budgets are checked against each other, and may grow on resuming.
    given = tyro.cli(Args, default=replace(base, total_timesteps=0, stage_timesteps=(0,), resume=args.resume))
    old, stages, total = base.stage_timesteps or split_total(base.total_timesteps), given.stage_timesteps, given.total_timesteps
    if stages == (0,):
        stages = old if not total else split_total(total)
        if args.resume and total > sum(old):
            stages = (*old[:-1], old[-1] + total - sum(old))
    require(total in (0, sum(stages)), "total_timesteps", total, f"the sum of --stage-timesteps, {sum(stages)}, or nothing")
    if args.resume:
        free = ("resume", "track", "wandb_project_name", "wandb_entity", "checkpoint_minutes", "checkpoint_env_state")
        for name in {field.name for field in fields(Args)} - {*free, "total_timesteps", "stage_timesteps"}:
            stored, got = getattr(base, name), getattr(given, name)
            require(got == stored, name, got, f"what the resumed run has, {stored}")
        ok = stages[: len(old) - 1] == old[:-1] and len(stages) >= len(old) and stages[len(old) - 1] >= old[-1]
        require(ok, "stage_timesteps", list(stages), f"the resumed run's {list(old)}, to which steps may be added")
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
    with jax.default_matmul_precision("highest"):  # physics wants full float32; GPUs default to less
        train(args, run_dir)


if __name__ == "__main__":
    main()
