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

import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata, util
from itertools import accumulate, count, pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import struct
from jax import Array, P, lax
from jax.experimental import multihost_utils as hosts
from jax.scipy.stats import norm
from mujoco import mjx
from mujoco_playground import MjxEnv, dm_control_suite
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    """GoRL(FM): latent PPO with a flow-matching decoder on MuJoCo Playground's DM Control suite."""
    env_id: str = "HopperStand"  # a task of MuJoCo Playground's DM Control suite
    seed: int = 1  # the first seed
    num_seeds: int = 1  # seeds seed .. seed + num_seeds - 1 train together
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
    decoder_from: str | None = None  # RUN_DIR:STAGE: one stage, on the decoder that this stage had (Figure 6)
    episode_length: int = 1000  # control steps until an episode is cut off
    eval_every: int = 6_000_000  # environment steps between evaluations (ends of stages are evaluated, too)
    eval_envs: int = 128  # episodes an evaluation
    impl: Literal["jax", "warp"] = "jax"  # physics backend; the paper's is jax
    distributed: tuple[str, ...] | None = None  # one run by a job's processes (bare), or HOST:PORT NUMBER ID
    runs_dir: str = "runs"  # where run directories are made
    exp_name: str = Path(__file__).stem  # part of the run directory's name
    resume: str | None = None  # a run directory to continue; its arguments are taken over
    checkpoint_minutes: float = 30.0  # a checkpoint at least this often, beside those at evaluations
    checkpoint_env_state: bool = True  # with environments and decoder data, to resume exactly; else a few MB
    track: bool = False  # log to Weights & Biases (WANDB_MODE=offline works, too)
    wandb_project_name: str = "gorl"  # Weights & Biases project
    wandb_entity: str | None = None  # Weights & Biases user or team
TABLES = ("eval", "train", "decoder", "refine")  # CSV files of a run
CPU_PRESET = dict(env_id="CheetahRun", total_timesteps=1_200_000, num_envs=128, batch_size=32,
                  num_minibatches=16, update_epochs=8, eval_every=200_000, decoder_epochs=10,
                  decoder_batch_size=1024, decoder_buffer_size=100_000)
# --- shared: argument checks, environment, statistics, networks ---
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
    for name, got in vars(args).items():
        numbers = got if isinstance(got, tuple) else [got] if type(got) in (int, float) else []
        zero = name in ("seed", "gae_lambda", "vf_coef", "ent_coef", "kl_coef", "max_grad_norm")
        top = 1 if name in ("gamma", "gae_lambda", "clip_eps") else 2**31 - 1
        ok = got != () and all((n > 0 or (zero and n == 0)) and n <= top for n in numbers)  # false for NaN
        require(ok, name, got, f"numbers {'of at least' if zero else 'above'} 0, at most {top}")
    require(not args.track or util.find_spec("wandb"), "track", True, "the wandb package (pip install wandb)")
    got, takes = args.num_envs, "a divisor of --batch-size times --num-minibatches, an iteration's unrolls"
    require(args.batch_size * args.num_minibatches % got == 0, "num_envs", got, takes)
    require("/" not in args.exp_name, "exp_name", args.exp_name, "a name without slashes")
def make_mesh(args: "Args") -> Any:
    """All devices, in rows that have some seeds each and share their environments; checks what that asks."""
    rows, every, env = np.gcd(args.num_seeds, jax.device_count()), jax.device_count(), make_env(args)
    for name in ("num_envs", "batch_size", "eval_envs", "decoder_batch_size"):
        got, takes = getattr(args, name, 0), f"a multiple of {every // rows}, a seed's devices"
        require(got % (every // rows) == 0, name, got, takes)
    require(args.impl == "jax" or every == 1, "impl", args.impl, "jax on several devices (or show JAX one)")
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    has = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", host) * every / args.num_seeds
    got, takes = getattr(args, "decoder_buffer_size", 0), f"fewer, as a seed has {has / 1e9:.1f} GB"
    require(8 * got * (env.observation_size + env.action_size + 1) < has, "decoder_buffer_size", got, takes)
    return jax.make_mesh((rows, every // rows), ("seeds", "envs"), (jax.sharding.AxisType.Auto,) * 2)
def spread(x: Any, *axes: str) -> Any:
    """x with its leading axes laid over these of the mesh; over none, there is a copy on each device."""
    return x if jax.sharding.get_abstract_mesh().size <= 1 else lax.with_sharding_constraint(x, P(*axes))
def each_seed(args: "Args", f: Any, axes: tuple, out: Any, **options: Any) -> Any:
    """f, a partial, mapped over seeds, compiled; one seed goes without `vmap`, as that is slower on CPUs."""
    def single(*xs: Any) -> Any:
        xs = (jax.tree.map(lambda y: y[0], x) if axis == 0 else x for x, axis in zip(xs, axes, strict=True))
        return jax.tree.map(lambda y: y[None], f(*xs))
    single.__name__ = f.func.__name__
    mapped = single if args.num_seeds == 1 else jax.vmap(f, axes, spmd_axis_name="seeds")
    return jax.jit(mapped, out_shardings=out, **options)

Envs = namedtuple("Envs", "state first steps")  # now, what resets lead to, control steps since one: (N, ...)
def make_env(args: "Args") -> MjxEnv:
    config = dm_control_suite.get_default_config(args.env_id)
    config.impl = args.impl  # Playground 0.2 itself defaults to warp
    if args.impl == "warp":  # its contact buffer serves all worlds, and Playground's is for 2048
        config.naconmax *= -(-max(args.num_envs, args.eval_envs) * args.num_seeds // 2048)
    env, here = dm_control_suite.load(args.env_id, config=config), jax.local_devices()[0]  # this process's
    env._mjx_model = jax.device_put(jax.device_get(mjx.put_model(env.mj_model, here, args.impl)))  # untied
    env.reset, env.step = jax.jit(env.reset), jax.jit(env.step)  # traced once for training and evaluation
    return env
def each_env(f: Any) -> Any:
    """`reset` or `step` of many; each device's share by itself, since physics loops until all are done."""
    def many(*x: Any) -> Any:  # the two differ in weak types, for which an iteration would compile twice
        return jax.tree.map(lambda y: lax.convert_element_type(y, y.dtype), jax.vmap(f)(*x))
    specs = {"in_specs": P("envs"), "out_specs": P("envs"), "check_vma": False}
    return many if jax.sharding.get_abstract_mesh().size <= 1 else jax.shard_map(many, **specs)
def reset_envs(env: MjxEnv, num_envs: int, key: Array) -> Envs:
    state = each_env(env.reset)(jax.random.split(key, num_envs))
    return Envs(state, state, jnp.zeros(num_envs, jnp.int32))
def step_envs(args: "Args", env: MjxEnv, envs: Envs, u: Array) -> tuple[Envs, Array, Array, Array]:
    """Steps with tanh(u), u (N, action_dim), and resets: environments; reward, truncated, broken, of (N,)."""
    state = each_env(env.step)(envs.state, jnp.tanh(u))
    # Broken physics, NaN or beyond 1e6, is truncated as at the time limit; what it returned is dropped.
    broken = (state.done > 0) | ~jnp.isfinite(state.reward) | ~(jnp.abs(state.obs) < 1e6).all(-1)
    truncated = broken | (envs.steps + 1 >= args.episode_length)
    def reset_done(first: Array, now: Array) -> Array:
        done = truncated.reshape(-1, *[1] * (now.ndim - 1))
        return jnp.where(done, first, now) if now.shape[:1] == truncated.shape else now
    reward, steps = jnp.where(broken, 0.0, state.reward), jnp.where(truncated, 0, envs.steps + 1)
    state = jax.tree.map(reset_done, envs.first, state)
    return Envs(state, envs.first, steps), reward, truncated, broken

RunningStats = namedtuple("RunningStats", "count mean var")  # of all observations so far, (obs_dim,) each
def merge_stats(stats: RunningStats, obs: Array) -> RunningStats:
    """Adds observations (..., obs_dim): Chan et al. (1979), in variances instead of sums of squares."""
    axes, size = tuple(range(obs.ndim - 2)), obs.size // obs.shape[-1]
    mean = obs.mean(-2).mean(axes)  # in two stages, against float32's rounding
    var = jnp.square(obs - mean).mean(-2).mean(axes)
    share, delta = size / (stats.count + size), mean - stats.mean
    # Without the old variance's share, the std would shrink with every batch, and normalised inputs grow.
    var = stats.var + share * (var - stats.var + (1 - share) * jnp.square(delta))
    return RunningStats(count=stats.count + size, mean=stats.mean + share * delta, var=var)
def normalize(stats: RunningStats, obs: Array) -> Array:
    """Observations (..., obs_dim) in standard deviations, clipped to +-10."""
    return jnp.clip((obs - stats.mean) / jnp.maximum(jnp.sqrt(stats.var), 1e-6), -10.0, 10.0)
def init_mlp(key: Array, sizes: tuple[int, ...], zero_last: bool = False) -> list[dict[str, Array]]:
    """LeCun-uniform kernels and zero biases; with `zero_last` the network's output starts at exactly 0."""
    init, keys = jax.nn.initializers.lecun_uniform(), jax.random.split(key, len(sizes) - 1)
    kernels = [init(k, shape) for k, shape in zip(keys, pairwise(sizes), strict=True)]
    kernels[-1] *= not zero_last
    return [{"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for kernel in kernels]
silu = jax.custom_jvp(jax.nn.silu)  # its slope is kept for the backward pass, not its sigmoid made again
silu.defjvps(lambda x_dot, y, x: (y + jax.nn.sigmoid(x) * (1 - y)) * x_dot)
def mlp(layers: list[dict[str, Array]], x: Array) -> Array:
    """SiLU network, (..., sizes[0]) -> (..., sizes[-1]); with one batch axis, as CPUs copy what has more."""
    *axes, x = *x.shape[:-1], x.reshape(-1, x.shape[-1])
    for layer in layers[:-1]:
        x = silu(x @ layer["kernel"] + layer["bias"])
    return (x @ layers[-1]["kernel"] + layers[-1]["bias"]).reshape(*axes, -1)
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
def start_stage(args: Args, agent: Agent, decoder: Any, fresh: Agent) -> Agent:
    """Encoder and its Adam state start afresh, at N(0, I) (section 3.2); critic and statistics carry on."""
    old = fresh if args.reinit_critic else agent
    params, opt = ({**getattr(old, k), "encoder": getattr(fresh, k)["encoder"]} for k in ("params", "opt"))
    return old.replace(params=params, opt=opt, decoder=decoder)
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
# --- shared: rollout, advantages, update, evaluation ---
Transitions = namedtuple("Transitions", "obs u drawn reward truncated")  # (U, T, N, ...); drawn: see `act`
def rollout(args: "Args", env: MjxEnv, agent: Any, envs: Envs, key: Array) -> tuple[Envs, Any, Array, dict]:
    """U unrolls of T steps: environments, transitions, last next observations (U, N, obs_dim), metrics."""
    def step(envs: Envs, key: Array) -> tuple[Envs, tuple]:
        u, drawn = act(args, agent, envs.state.obs, key, False)
        after, reward, truncated, broken = step_envs(args, env, envs, u)
        return after, (Transitions(envs.state.obs, u, drawn, reward, truncated), broken)
    def unroll(envs: Envs, key: Array) -> tuple[Envs, tuple]:
        envs, outputs = lax.scan(step, envs, jax.random.split(key, args.unroll_length))
        return envs, (*outputs, envs.state.obs)  # a reset state's after truncation, which is not bootstrapped
    keys = jax.random.split(key, args.batch_size * args.num_minibatches // args.num_envs)
    envs, (steps, broken, last_obs) = lax.scan(unroll, envs, keys)
    metrics = {"reward_mean": steps.reward.mean(), "nan_resets": broken.sum(), "u_std": steps.u.std()}
    return envs, steps, last_obs, metrics | {"u_beyond_5": (jnp.abs(steps.u) > 5).mean()}
def gae(args: "Args", reward: Array, truncated: Array, value: Array) -> tuple[Array, Array]:
    """Brax's GAE: critic targets and advantages (T, N) of rewards, truncated (T, N) and value (T + 1, N).
    Truncated steps teach nothing: advantage 0, target the value itself, no sum across. Of an advantage
    r + gamma * target' - value, an error k > 0 steps later weighs gamma^k lambda^(k-1)."""
    going_on, value = 1.0 - truncated, lax.stop_gradient(value)
    delta = (reward + args.gamma * value[1:] - value[:-1]) * going_on
    def backward(acc: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
        return (acc := x[0] + args.gamma * args.gae_lambda * x[1] * acc), acc
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
# Leaves (U, T, N, ...) -> (U * N, T, ...).
as_unrolls = partial(jax.tree.map, lambda x: jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], *x.shape[3:]))
def update(args: "Args", agent: Any, batch: Any, last_obs: Array, key: Array) -> tuple[Any, dict]:
    """`update_epochs` passes over B unrolls, in new minibatches of whole unrolls each time; see `loss_fn`."""
    limit, adam, data = args.max_grad_norm, optax.adam(args.learning_rate), spread((batch, last_obs))
    def minibatch_step(agent: Any, x: tuple[Array, Array]) -> tuple[Any, dict]:
        minibatch, last = spread(jax.tree.map(lambda leaf: leaf[x[0]], data), "envs")
        loss = partial(loss_fn, args=args, batch=minibatch, last_obs=last, key=x[1])
        grads, metrics = jax.grad(loss, has_aux=True)(agent.params)
        scale = jnp.where(limit > 0, jnp.minimum(1.0, limit / optax.tree.norm(grads)), 1.0)
        metrics |= {f"grad_norm_{name}": optax.tree.norm(grad) for name, grad in grads.items()}
        new = {k: adam.update(optax.tree.scale(scale, grad), agent.opt[k]) for k, grad in grads.items()}
        params = {k: optax.apply_updates(agent.params[k], step) for k, (step, _) in new.items()}
        return agent.replace(params=params, opt={k: opt for k, (_, opt) in new.items()}), metrics
    def epoch(agent: Any, key: Array) -> tuple[Any, dict]:
        rows_key, key = jax.random.split(key)
        rows = jax.random.permutation(rows_key, len(last_obs)).reshape(args.num_minibatches, args.batch_size)
        return lax.scan(minibatch_step, agent, (rows, jax.random.split(key, args.num_minibatches)))
    agent, metrics = lax.scan(epoch, agent, jax.random.split(key, args.update_epochs))
    return agent, jax.tree.map(jnp.mean, metrics)
INIT, RESET, TRAIN, EVAL_RESET, EVAL_ACT, DECODER = range(6)
def derive_key(seed_key: Array, purpose: int, index: Any) -> Array:
    """The key for a purpose at a point of a run: it depends on the seed, not on how many run beside it."""
    return jax.random.fold_in(jax.random.fold_in(seed_key, purpose), index)
def evaluate(args: "Args", env: MjxEnv, agent: Any, seed_key: Array, index: Any, deterministic: Any) -> Array:
    """Undiscounted returns (eval_envs,) of one episode each; broken physics ends its episode."""
    def step(envs: Envs, key: Array) -> tuple[Envs, tuple]:
        u, _ = act(args, agent, envs.state.obs, key, deterministic)
        envs, reward, _, broken = step_envs(args, env, envs, u)
        return envs, (reward, broken)
    envs = reset_envs(env, args.eval_envs, derive_key(seed_key, EVAL_RESET, index))
    keys = jax.random.split(derive_key(seed_key, EVAL_ACT, index), args.episode_length)
    _, (reward, broken) = lax.scan(step, envs, keys)
    return jnp.where(jnp.cumsum(broken, axis=0) > 0, 0.0, reward).sum(0)
# --- end shared ---
def loss_fn(params: Any, args: Args, batch: Transitions, last_obs: Array, key: Any) -> tuple[Array, dict]:
    """Latent PPO (Eq. 3, 5) on batches (batch_size, T, ...). The decoder is environment to it (Lemma 3.1)."""
    advantage, metrics = critic_terms(args, params["critic"], batch, last_obs)
    mean, std = latent_distribution(params["encoder"], batch.obs)
    log_std, log_prob = jnp.log(std), norm.logpdf(batch.drawn["latent"], mean, std).sum(-1)
    metrics |= clipped_surrogate(args, log_prob - batch.drawn["log_prob"], advantage) | {
        "entropy": (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum(-1).mean(),
        "latent_kl": (0.5 * (jnp.square(mean) + jnp.square(std) - 1) - log_std).sum(-1).mean(),  # Eq. 3
        "latent_l2": jnp.square(mean).mean() + jnp.square(log_std).mean(),  # App. E.4
        "latent_log_std": log_std.mean(), "latent_beyond_3": (jnp.abs(batch.drawn["latent"]) > 3).mean()}
    loss = metrics["policy_loss"] + args.vf_coef * metrics["value_loss"] - args.ent_coef * metrics["entropy"]
    return loss + args.kl_coef * metrics[f"latent_{args.latent_penalty}"], metrics
def record(ring: dict[str, Array], written: Any, new: dict[str, Array]) -> dict[str, Array]:
    """Writes steps (U, T, N, ...) over a ring's (C, N, ...) oldest rows, the stage's `written` + 1st such."""
    capacity, steps = len(ring["reward"]), new["reward"].shape[0] * new["reward"].shape[1]
    rows = ((written + 1) * steps - (kept := min(capacity, steps)) + jnp.arange(kept)) % capacity
    new = {name: x.reshape(steps, *x.shape[2:])[-kept:] for name, x in new.items()}
    return {name: ring[name].at[rows].set(new[name], unique_indices=True) for name in ring}

def decoder_loss(net: Any, args: Args, obs: Array, u: Array, key: Array) -> Array:
    """Conditional flow matching (Eq. 6, 18, 20) from fresh noise, 8 draws a pair; obs normalised."""
    tau_key, noise_key = jax.random.split(key)
    obs, u = (jnp.repeat(x[:, None], 8, axis=1) for x in (obs, u))
    tau, noise = jax.random.uniform(tau_key, (*u.shape[:2], 1)), jax.random.normal(noise_key, u.shape)
    v = velocity(net, obs, (1 - tau) * noise + tau * u, tau)
    return jnp.square(v - (u - noise)).sum(-1).mean()
def decoder_epoch(args: Args, pairs: int, decoder: Any, opt: Any, ring: Any, seed_key: Any, i: Any) -> tuple:
    """One shuffled pass over the ring's first `pairs` entries: decoder, Adam state and mean loss after it."""
    adam, batches = optax.adam(args.decoder_learning_rate), pairs // args.decoder_batch_size
    rows_key, key = jax.random.split(derive_key(seed_key, DECODER, i))
    rows = jax.random.permutation(rows_key, pairs)[: batches * args.decoder_batch_size].reshape(batches, -1)
    def step(carry: tuple[Any, Any], x: tuple[Any, Array]) -> tuple[tuple[Any, Any], Array]:
        (net, opt), (at, key) = carry, x
        obs, u = spread((ring["obs"][at], ring["u"][at]), "envs")
        loss, grads = jax.value_and_grad(decoder_loss)(net, args, normalize(decoder["stats"], obs), u, key)
        steps, opt = adam.update(grads, opt)
        return (optax.apply_updates(net, steps), opt), loss
    x = jnp.divmod(rows, args.num_envs), jax.random.split(key, batches)
    (net, opt), losses = lax.scan(step, (decoder["net"], opt), x)
    return decoder | {"net": net}, opt, losses.mean()

@struct.dataclass
class TrainState:
    """All that changes in a run. Random keys are not in it: they follow from seed and iteration."""
    agent: Agent
    envs: Envs
    ring: Any  # "obs", "u", "reward": the stage's latest C steps of every environment, (C, N, ...)
    learner: Any  # in a refinement, the next decoder and its Adam state; else None
def begin(args: Args, env: MjxEnv, seed_key: Array, index: Any) -> TrainState:
    """A seed's first state, untrained, or that of one of its stages: each `index` gives others."""
    agent = init_agent(args, env.observation_size, env.action_size, derive_key(seed_key, INIT, index))
    envs = reset_envs(env, args.num_envs, derive_key(seed_key, RESET, index))
    like = {"obs": envs.state.obs, "u": jnp.zeros((args.num_envs, env.action_size)), "reward": envs.steps}
    ring = {k: jnp.zeros((args.decoder_buffer_size // args.num_envs, *x.shape)) for k, x in like.items()}
    learner = agent.decoder, optax.adam(args.decoder_learning_rate).init(agent.decoder["net"])
    return TrainState(agent=agent, envs=envs, ring=ring, learner=learner)
def iteration(args: Args, env: MjxEnv, state: TrainState, seed_key: Array, index: Any, now: Any) -> tuple:
    """Rollout, update, statistics and recording, for one seed: the next state, and metrics."""
    stage, recorded = now  # `recorded`: iterations in the ring so far
    # The stage's value of each coefficient, or the last: JAX clamps an index beyond it.
    args = replace(args, **{k: jnp.array(v)[stage] for k, v in vars(args).items() if isinstance(v, tuple)})
    agent, (rollout_key, update_key) = state.agent, jax.random.split(derive_key(seed_key, TRAIN, index))
    envs, steps, last_obs, rollout_metrics = rollout(args, env, agent, state.envs, rollout_key)
    batch = as_unrolls(steps._replace(obs=normalize(agent.stats, steps.obs)))
    last_obs = normalize(agent.stats, last_obs).reshape(-1, last_obs.shape[-1])
    agent, metrics = update(args, agent, batch, last_obs, update_key)
    agent = agent.replace(stats=merge_stats(agent.stats, steps.obs))  # not before, so ratios started at 1
    ring = record(state.ring, recorded, {k: getattr(steps, k) for k in state.ring})
    return state.replace(agent=agent, envs=envs, ring=ring), metrics | rollout_metrics

def train(args: Args, run_dir: Path, caught: list[int], report: Any) -> bool:
    """Algorithm 1 from the newest good checkpoint: true at its end, false if `caught` has a signal before."""
    env, seeds = make_env(args), np.arange(args.seed, args.seed + args.num_seeds)
    seed_keys = np.asarray(jax.vmap(jax.random.PRNGKey)(seeds))  # on no device, as a restored state
    size, ends = args.batch_size * args.num_minibatches * args.unroll_length, stage_ends(args)
    jax.set_mesh(make_mesh(args))
    split, axes = P("seeds"), (0, 0, None, None)  # the axes over devices; those of arguments over seeds
    where = TrainState(agent=split, envs=P("seeds", "envs"), ring=P("seeds", None, "envs"), learner=split)
    where = where if args.impl == "jax" else split  # warp has one device, and arrays without environments
    of_pass = (None, 0, 0, 0, 0, None), (split, split, P())
    fresh = partial(each_seed(args, partial(begin, args, env), (0, None), where), seed_keys)
    iterate = each_seed(args, partial(iteration, args, env), axes, (where, P()), donate_argnums=0)
    returns = each_seed(args, partial(evaluate, args, env), axes, P())
    decoder_pass = each_seed(args, partial(decoder_epoch, args), *of_pass, static_argnums=0)
    run = [Path(__file__).name, args.env_id, args.seed, args.num_seeds]
    state, meta = restore(run_dir, jax.eval_shape(fresh, 0), run)
    hosts.assert_equal(hash(tuple(f"{args}{meta}".encode())) % 2**31, "arguments or checkpoints differ")
    # Iterations done; the stage; epochs done of the refinement after it; its iterations recorded in the ring.
    done, stage, epoch, recorded = (meta.get(k, 0) for k in ("done", "stage", "epoch", "recorded"))
    start, saved_at, exact = time.time() - meta.get("wall_time", 0.0), time.time(), args.checkpoint_env_state
    row = partial(log, run_dir, report, seed=seeds)  # to a CSV file, and as a dict to `report`
    look = {"unit": " steps", "unit_scale": True, "mininterval": 0.5 if sys.stdout.isatty() else 30.0}
    bar = tqdm(total=ends[-1] * size * len(seeds), initial=done * size * len(seeds), file=sys.stdout, **look)
    evaluating, refined, place = not state, False, jax.jit(lambda state: state, out_shardings=where)
    state = place(state) if state else fresh(0).replace(learner=None)
    if evaluating and args.decoder_from:
        state = place(state.replace(agent=state.agent.replace(decoder=frozen_decoder(args, env))))
    if state.envs is None:
        bar.write("The checkpoint has no environments: fresh episodes, and decoder data from here on only.")
        state, recorded = state.replace(envs=fresh(10**6 + done).envs), 0  # no stage has that index
    state = state.replace(ring=fresh(0).ring) if state.ring is None else state
    ok = stage == len(ends) - 1 or (recorded + ends[stage] - done) * size >= args.decoder_batch_size
    require(ok, "resume", run_dir, "a run with decoder data in its checkpoint, to add a stage")
    write_args(args, run_dir)
    while True:
        step, mine = done * size, [sum(caught[:1]), time.time() - saved_at > 60 * args.checkpoint_minutes]
        stopping, late = hosts.process_allgather(np.array(mine)).max(0).tolist()  # all agree
        caught += [stopping] * (stopping > 0 and not caught)
        if evaluating:
            r = np.asarray(returns(state.agent, seed_keys, 2 * done, True))
            stats = {f"return_{name}": getattr(r, name)(1) for name in ("mean", "std", "min", "max")}
            row("eval", step=step, stage=stage, **stats, wall_time=time.time() - start)
            bar.write(f"step {step:,}, stage {stage}: return {r.mean(1).round(1)} +- {r.std(1).round(1)}")
            bar.set_postfix_str(f"return {r.mean():.1f}")
        if evaluating or refined or stopping or late:
            saved_at, refined, left = time.time(), False, (ends[stage] - done) * size
            # No ring while the stage's rest overwrites all of it; a rest without one must fill a batch.
            if exact or left >= args.decoder_batch_size or done == ends[-1]:
                no = ["envs"] * (not exact) + ["ring"] * (not exact or left >= args.decoder_buffer_size)
                at = {"run": run, "done": done, "stage": stage, "epoch": epoch, "recorded": recorded}
                name, at["wall_time"] = f"{step:012}_{stage:02}_{epoch:06}", saved_at - start
                save_state(run_dir, name, state.replace(**dict.fromkeys(no)), **at)  # no name keeps the ring
        if stopping or done == ends[-1]:
            return hosts.sync_global_devices("saved") or done == ends[-1]
        if done < ends[stage]:  # Phase 1 of Algorithm 1
            began, (state, metrics) = time.time(), iterate(state, seed_keys, done, (stage, recorded))
            metrics, done, recorded = jax.device_get(metrics), done + 1, recorded + 1
            clock = {"sps": size * len(seeds) / (time.time() - began), "wall_time": time.time() - start}
            row("train", step=done * size, stage=stage, **clock, **metrics, iteration=done)
            bar.update(size * len(seeds))
            if done in ends or done * size // 60_000_000 > step // 60_000_000:
                save_arrays(run_dir / "checkpoints" / f"policy_{done * size}.npz", state.agent.policy())
            evaluating = done in ends or done * size // args.eval_every > step // args.eval_every
            continue
        pairs = min(recorded * size, state.ring["reward"][0].size)  # Phase 2, an epoch of it
        if epoch == 0:
            decoder, opt = jax.jit(lambda i: fresh(i).learner, out_shardings=split)(stage + 1)  # no ring
            net = decoder["net"] if args.decoder_from_scratch else state.agent.decoder["net"]
            decoder = {"net": net, "stats": jax.tree.map(jnp.copy, state.agent.stats)}  # both get donated
            state = state.replace(learner=(decoder, opt))
        index = (stage + 1) * args.decoder_epochs + epoch
        *learner, loss = decoder_pass(pairs, *state.learner, state.ring, seed_keys, index)
        row("decoder", stage=stage + 1, epoch=epoch, loss=loss)
        state, epoch, evaluating = state.replace(learner=tuple(learner)), epoch + 1, False
        bar.set_postfix_str(f"decoder {stage + 1}, epoch {epoch}/{args.decoder_epochs}")
        if refined := epoch == args.decoder_epochs:  # the next stage: the encoder starts again at N(0, I)
            mean = jax.jit(lambda x, n=pairs: x.reshape(len(seeds), -1)[:, :n].mean(1), out_shardings=P())
            state, reward = state.replace(ring=None), mean(state.ring["reward"])  # before there is a new ring
            new = fresh(stage + 1)
            agent = start_stage(args, state.agent, learner[0], new.agent)
            r = [np.asarray(returns(a, seed_keys, 2 * done + 1, False)).mean(1) for a in (state.agent, agent)]
            data = {"pairs": pairs, "reward_mean": reward, "return_before": r[0], "return_after": r[1]}
            row("refine", step=step, stage=stage + 1, **data)  # returns: of the same initial states and noise
            bar.write(f"decoder {stage + 1}: stochastic return {r[0].round(1)} before, {r[1].round(1)} after")
            state, stage, epoch, recorded = new.replace(agent=agent, learner=None), stage + 1, 0, 0
def frozen_decoder(args: Args, env: MjxEnv) -> Any:
    """--decoder-from's RUN_DIR:STAGE: these seeds' decoders (K, ...) there, saved before a refinement."""
    run_dir, _, stage = args.decoder_from.rpartition(":")
    with suppress(Exception):  # whatever a damaged file does, the message below says what was looked for
        of, at = load_args(run_dir), np.arange(args.seed, args.seed + args.num_seeds)
        done = dict(enumerate(stage_ends(of)))[int(stage)]
        step = done * of.batch_size * of.num_minibatches * of.unroll_length
        agents = load_agents(of, env, Path(run_dir) / "checkpoints" / f"policy_{step}.npz")
        same = (of.env_id, of.decoder_steps, of.decoder_from) == (args.env_id, args.decoder_steps, None)
        if same and of.seed <= args.seed:
            return jax.tree.map(lambda x: x[at - of.seed], agents.decoder)
    takes = f"RUN_DIR:STAGE, a finished stage (0, 1, ...) of a {Path(__file__).name} run on {args.env_id}"
    takes += f" with --decoder-steps {args.decoder_steps}, seeds {at} and decoders of its own"
    require(False, "decoder_from", args.decoder_from, takes)
def stage_ends(args: Args) -> list[int]:
    """Iterations done when each stage ends: cumulative budgets, rounded to iterations in integers."""
    size = args.batch_size * args.num_minibatches * args.unroll_length
    return [(2 * budget + size) // (2 * size) for budget in accumulate(args.stage_timesteps)]
def check(args: Args) -> None:
    """Checks every argument, before anything compiles."""
    check_common(args)
    if args.decoder_from is not None and args.resume is None:
        frozen_decoder(args, make_env(args))
    size, stages = args.batch_size * args.num_minibatches * args.unroll_length, args.stage_timesteps
    for m, (start, end) in enumerate(pairwise([0, *stage_ends(args)])):
        require(m == 0 or args.decoder_from is None, "stage_timesteps", stages, "one, with --decoder-from")
        takes = f"at least one iteration, {size} steps, a stage (a lower --batch-size makes it shorter)"
        require(end > start, "--stage-timesteps, --total-timesteps", f"{stages[m]} for stage {m}", takes)
        got, capacity = args.decoder_batch_size, args.decoder_buffer_size // args.num_envs * args.num_envs
        pairs, name = min((end - start) * size, capacity), "--decoder-batch-size, --decoder-buffer-size"
        require(got <= pairs, name, got, f"a batch of at most the {pairs} pairs that stage {m} records")
def parse_args() -> Args:
    """Arguments: the command line's over the preset's, or over those of the run that is resumed."""
    args = tyro.cli(Args)
    preset = replace(Args(preset=args.preset), **CPU_PRESET if args.preset == "cpu" else {})
    base = preset if args.resume is None else load_args(args.resume)
    require(base is not None, "resume", args.resume, f"a run of {Path(__file__).name}, with its args.json")
    no = -(2**63)  # not given: budgets are checked against each other, and may grow on resuming
    new = tyro.cli(Args, default=replace(base, resume=args.resume, total_timesteps=no, stage_timesteps=(no,)))
    stages, total = new.stage_timesteps, new.total_timesteps
    sixths = [(base.total_timesteps if total == no else total) * n // 6 for n in (0, 2, 4, 5, 6)]  # App. E.4
    old = base.stage_timesteps or tuple(b - a for a, b in pairwise(sixths[: 2 if new.decoder_from else 5]))
    stages = (*old[:-1], old[-1] + max(0, total - sum(old))) if stages == (no,) else stages
    ok, takes = total == no or 0 < total == sum(stages), "a number above 0, the sum of all stages' steps"
    require(ok, "total_timesteps", total, f"{takes} ({sum(stages)}; resuming, that or more)")
    args = replace(new, stage_timesteps=stages, total_timesteps=sum(stages))
    for k, stored in asdict(replace(base, distributed=new.distributed)).items() if args.resume else ():
        ok = getattr(args, k) == stored or k.startswith(("track", "wandb", "checkpoint", "total", "resume"))
        ok |= "stage" in k and stages[: len(old) - 1] == old[:-1] and stages[len(old) - 1 :] >= old[-1:]
        require(ok, k, getattr(args, k), f"the resumed run's, {stored} (a budget may be longer)")
    return args
# --- shared: run directory, main ---
def make_run_dir(args: "Args") -> Path:
    """Creates runs/<env-id>__<exp-name>__<seed>__<unix time>/, exclusively (on collision -2, -3, ...)."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    for n in count(1):
        run_dir = Path(args.runs_dir) / (name if n == 1 else f"{name}-{n}")
        try:
            _ = jax.process_index() or (run_dir / "checkpoints").mkdir(parents=True)  # by the first only
            made = hosts.broadcast_one_to_all(np.frombuffer(bytes(run_dir).ljust(4096), np.uint8))
            return Path(os.fsdecode(bytes(made)).rstrip())
        except OSError as error:
            require(run_dir.exists(), "runs_dir", f"{args.runs_dir}, {error.strerror}", "a writable folder")
def write_file(path: Path, write: Any) -> None:
    """A file by write(file), aside, then renamed, by the first process only."""
    if jax.process_index() == 0:
        with (aside := path.with_name("unfinished.tmp")).open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
def write_args(args: "Args", run_dir: Path) -> None:
    """args.json: the arguments and, as "versions", what else a rerun needs to give the same numbers."""
    failed, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).parent}" describe --always --dirty')
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "mujoco", "mujoco-mjx", "playground", "warp-lang")
    versions = {name: metadata.version(name) for name in packages} | {"python": sys.version.split()[0]}
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    versions |= {"script": Path(__file__).name, "git_commit": None if failed else commit, "device": device}
    text = json.dumps(asdict(args) | {"versions": versions}, indent=1)
    write_file(run_dir / "args.json", lambda file: file.write(text.encode()))
def load_args(run_dir: str) -> "Args | None":
    """The arguments of a run of this script; None if it is none."""
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        stored = json.loads((Path(run_dir) / "args.json").read_text())
        if stored.pop("versions")["script"] == Path(__file__).name:
            return Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
def log(run_dir: Path, report: Any, name: str, **columns: Any) -> None:
    """A row a seed to a CSV file, and reported; FloatingPointError if a loss or a gradient is not finite."""
    table = np.column_stack([np.broadcast_to(v, len(columns["seed"])) for v in columns.values()])
    formats = ["%d" if np.asarray(v).dtype.kind in "iu" else "%.7g" for v in columns.values()]
    with (Path(os.devnull) if jax.process_index() else run_dir / f"{name}.csv").open("a") as file:
        np.savetxt(file, table, formats, ",", header="" if file.tell() else ",".join(columns), comments="")
    for row in (dict(zip(columns, numbers, strict=True)) for numbers in table.tolist()):
        report({k if k == "step" else f"{name}/{k}/seed_{row['seed']:.0f}": v for k, v in row.items()})
        if bad := [k for k in row if ("loss" in k or "norm" in k or "std" in k) and not np.isfinite(row[k])]:
            at = [f"{k} {row[k]:.0f}" for k in ("seed", "iteration", "stage", "epoch") if k in row]
            raise FloatingPointError(f"{', '.join(at)}: {', '.join(bad)} not finite")
def save_arrays(path: Path, tree: Any, **meta: Any) -> None:
    """An .npz file of the tree's leaves by name (checksums, no pickle); by all processes, as it gathers."""
    leaves = {jax.tree_util.keystr(name): leaf for name, leaf in jax.tree.leaves_with_path(tree)}
    write_file(path, partial(np.savez, meta=json.dumps(meta), **hosts.process_allgather(leaves, tiled=True)))
def load_arrays(path: Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """The tree `like`, of shapes and types, from a file, and the file's meta; ValueError if they differ."""
    def load(name: tuple, leaf: Any) -> np.ndarray:
        array = file[name := jax.tree_util.keystr(name)]
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} is {array.dtype}{array.shape}, not {leaf.dtype}{leaf.shape}")
        return array
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        return jax.tree.map_with_path(load, like.replace(**dict.fromkeys(meta.get("without", [])))), meta
def save_state(run_dir: Path, name: str, state: Any, **meta: Any) -> None:
    """A checkpoint to resume from, without parts that are None; it and the newest before it are kept."""
    meta["bytes"] = {path.name: path.stat().st_size for path in run_dir.glob("*.csv") if path.stem in TABLES}
    meta["without"] = [name for name, part in vars(state).items() if part is None]
    save_arrays(run_dir / "checkpoints" / f"state_{name}.npz", state, **meta)
    for old in () if jax.process_index() else sorted(run_dir.glob("checkpoints/state_*.npz"))[:-2]:
        old.unlink()
def restore(run_dir: Path, like: Any, run: list[Any]) -> tuple[Any, dict[str, Any]]:
    """State and meta of the newest good checkpoint, if there is one; CSV files lose what came after."""
    sizes = {path.name: path.stat().st_size for path in run_dir.glob("*.csv") if path.stem in TABLES}
    for i, file in enumerate(files := sorted(run_dir.glob("checkpoints/state_*.npz"), reverse=True)):
        try:
            state, meta = load_arrays(file, like)
            if meta["run"] == run and all(sizes.get(k, 0) >= n for k, n in meta["bytes"].items()):
                break
            raise ValueError(f"it is of {meta['run']}, or CSV files have lost rows since")
        except Exception as error:
            print(f"{files[i]}: damaged or another run's ({error}); trying the one before", file=sys.stderr)
    else:  # a run's first checkpoint is older than the first row of train.csv
        require(not files and "train.csv" not in sizes, "resume", run_dir, "a run with a good checkpoint")
        i, state, meta = 0, None, {"bytes": {}}
    for bad in () if jax.process_index() else files[:i]:
        bad.replace(bad.with_suffix(".bad"))  # or it might be taken later, beside other rows than its own
    for name in () if jax.process_index() else sizes:
        os.truncate(run_dir / name, meta["bytes"].get(name, 0))
    return state, meta
def track(args: "Args", run_dir: Path, rows: SimpleQueue) -> None:
    """A thread's work: rows to Weights & Biases until None comes, offline once that fails; nobody waits."""
    os.environ.setdefault("WANDB_SILENT", "true")  # it would ask for a login
    row, about = rows.get(), {"project": args.wandb_project_name, "entity": args.wandb_entity, "dir": run_dir}
    caps = {"init_timeout": 20, "finish_timeout": 20, "x_transaction_log_flush_interval": 1, "console": "off"}
    about |= {"id": run_dir.name, "name": run_dir.name, "config": asdict(args), "settings": caps}
    for mode in (None, "offline") if row else ():  # None: as WANDB_MODE says
        try:
            import wandb
            wandb.init(resume="allow", mode=mode, **about).define_metric("*", step_metric="step")
            while row is not None:
                wandb.log(row)
                row = rows.get()
            return wandb.teardown()
        except Exception as error:
            print(f"Weights & Biases: {error}; rows go to {run_dir}/wandb, if that works", file=sys.stderr)
            with suppress(BaseException):
                wandb.teardown()  # or the id stays in use
def load_agents(args: "Args", env: MjxEnv, file: Path) -> Any:
    """All seeds' agents (K, ...), without critics, from a policy file of a run with these arguments."""
    init, keys = partial(init_agent, args, env.observation_size, env.action_size), (args.num_seeds, 2)
    like = jax.eval_shape(jax.vmap(lambda key: init(key).policy()), jax.ShapeDtypeStruct(keys, np.uint32))
    return load_arrays(file, like)[0]
def load_policy(run_dir: str, step: int | None = None, seed: int | None = None) -> Any:
    """A policy f(obs, key, deterministic=False) -> u, of raw observations (..., obs_dim); it acts tanh(u).
    By default it is the last step's, of the run's first seed. ValueError if the run has no such policy."""
    if (args := load_args(run_dir)) is None:
        raise ValueError(f"{run_dir} is not a run of {Path(__file__).name}, with its args.json")
    files = {int(f.stem.split("_")[1]): f for f in Path(run_dir).glob("checkpoints/policy_*.npz")}
    seeds, seed = range(args.seed, args.seed + args.num_seeds), args.seed if seed is None else seed
    step = max(files, default=None) if step is None else step
    if step not in files or seed not in seeds:
        raise ValueError(f"{run_dir} has no step {step}, seed {seed}, but steps {sorted(files)}, {seeds}")
    agents = load_agents(args, make_env(args), files[step])
    agent = jax.tree.map(lambda x: x[seeds.index(seed)], agents)
    policy = jax.jit(lambda obs, key, deterministic=False: act(args, agent, obs, key, deterministic)[0])
    return jax.default_matmul_precision("highest")(policy)

def main() -> int:
    args, caught, rows = parse_args(), [], SimpleQueue()
    if args.distributed is not None:  # before devices are used; the first process alone writes and prints
        limits = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 55}
        try:
            jax.distributed.initialize(*args.distributed[:1], *map(int, args.distributed[1:]), **limits)
        except Exception as error:
            takes = "none in a job of Slurm, Open MPI or Kubernetes, or HOST:PORT NUMBER ID (HOST's is 0)"
            require(False, "distributed", f"{' '.join(args.distributed)} ({error!r})", takes)
        os.dup2(os.open(os.devnull, os.O_WRONLY) if jax.process_index() else 1, 1)
    many = "" if args.distributed is None else " ".join(["", "--distributed", *args.distributed])
    check(args := replace(args, distributed=None))  # where a run runs is not a property of it
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gorl" / "jax"
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache)))
    jax.config.update("jax_default_matmul_precision", "highest")  # for physics; GPUs default to less
    def stop(number: int, _: Any) -> None:
        os._exit(128 + number) if caught and number == signal.SIGINT else caught.append(number)
        print("Stopping after this iteration or epoch; another Ctrl-C stops at once.", file=sys.stderr)
    _ = signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)
    make_mesh(args)  # before the run has a directory: it checks that devices and memory fit
    run_dir = Path(args.resume).resolve() if args.resume else make_run_dir(args)
    (tracker := Thread(target=track, args=(args, run_dir, rows), daemon=True)).start()
    n, device = args.num_seeds, f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"{args.env_id}, {n} seed(s) from {args.seed}, {args.total_timesteps:,} steps, {device}; {run_dir}")
    if jax.default_backend() == "cpu" and args.preset != "cpu":
        print(f"On a CPU: {args.total_timesteps * n / 1.8e7:.0f} hours at 5000 steps/s. See --preset cpu.")
    resume = f"go on with: {sys.executable} {sys.argv[0]} --resume {run_dir}{many}"
    def work() -> int:  # it reports errors itself, as they may hold locks
        try:
            end = train(args, run_dir, caught, rows.put if args.track and not jax.process_index() else bool)
            print(f"finished: {run_dir}" if end else f"stopped by {signal.Signals(caught[0]).name}; {resume}")
            return 0 if end else 128 + caught[0]
        except (OSError, FloatingPointError, AssertionError, ValueError, jax.errors.JaxRuntimeError) as error:
            newest = max(run_dir.glob("checkpoints/state_*.npz"), default="none")
            print(f"{sys.argv[0]}: {error}; newest checkpoint: {newest}; {resume}", file=sys.stderr)
            _ = isinstance(error, (AssertionError, ValueError)) and sys.excepthook(*sys.exc_info())  # a bug?
            return 1
        finally:
            rows.put(None)
            tracker.join(30)
    with ThreadPoolExecutor(1) as pool:  # so that this thread hears signals while compiled code runs
        return pool.submit(work).result()
if __name__ == "__main__":
    sys.exit(main())
# --- end shared ---
