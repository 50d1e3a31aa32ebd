"""GoRL(DIFF): PPO on a Gaussian latent policy; a diffusion decoder turns latents into actions.

Zhang et al., "GoRL: An Algorithm-Agnostic Framework for Online Reinforcement Learning with
Generative Policies" (2025). Sections, equations and appendices cited below are the paper's.

1. The encoder pi(latent | s), a diagonal Gaussian, is trained with PPO (Eq. 5) and a KL to N(0, I).
2. The decoder u = g(s, latent) is frozen meanwhile; the environment receives the action tanh(u).
3. Then denoising (Eq. 17) trains it to map fresh N(0, I) to recent u, weighted by advantage.
4. The encoder restarts as exactly N(0, I), which through the new decoder acts about as before.
5. Four stages of 60M, 60M, 30M and 30M steps. In the first, the decoder is u = 0.88 latent.

    python gorl_diff_ppo.py --env-id HopperStand --seed 1

Shapes: K seeds, N environments, S steps of each in an iteration, cut into B unrolls of T steps.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

# XLA's alarms of slow compilation and of cached programs: nothing that a user could act on.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "gorl" / "jax"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from brax.training.acme import running_statistics
from flax import linen as nn
from flax.training.train_state import TrainState as Network  # parameters and Adam's state
from jax import Array, P
from jax.scipy.stats import norm
from tqdm import tqdm

normalize = partial(running_statistics.normalize, max_abs_value=10.0)  # (obs, stats) -> inputs


@dataclass(frozen=True)
class Args:
    # Run
    env_id: str = "HopperStand"  # an environment of MuJoCo Playground
    seed: int = 1  # the first seed
    num_seeds: int = 1  # seeds seed, seed + 1, ... train together, spread over the local devices
    preset: Literal["paper", "cpu"] = "paper"  # cpu: CheetahRun, all four stages in minutes
    total_timesteps: int = 180_000_000  # environment steps of a seed, 2 : 2 : 1 : 1 into stages
    stage_timesteps: tuple[int, ...] = ()  # or the steps of each stage
    eval_every: int = 6_000_000  # environment steps between evaluations
    eval_envs: int = 128  # episodes of an evaluation
    impl: Literal["jax", "warp"] = "jax"  # physics; the paper's is jax
    runs_dir: str = "runs"  # where run directories are made
    exp_name: str = Path(__file__).stem  # part of the run directory's name
    resume: str | None = None  # a run directory to continue, with its own arguments
    checkpoint_minutes: float = 10.0  # between checkpoints, beside those at the ends of stages
    track: bool = False  # log to Weights & Biases, too
    wandb_project_name: str = "gorl"
    wandb_entity: str | None = None

    # PPO (App. E.2)
    num_envs: int = 2048  # parallel environments
    episode_length: int = 1000  # control steps until an episode is truncated
    unroll_length: int = 30  # steps between two bootstraps of the return
    batch_size: int = 1024  # unrolls in a minibatch
    num_minibatches: int = 32  # an iteration has batch_size * num_minibatches unrolls
    update_epochs: int = 16  # passes over them
    learning_rate: float = 1e-3  # Adam's, for encoder and critic
    gamma: float = 0.995  # discount
    gae_lambda: float = 0.95
    reward_scale: float = 10.0  # factor on the rewards that the critic sees
    vf_coef: float = 0.25  # weight of the critic's squared error
    ent_coef: float = 0.01  # weight of the latent policy's entropy
    clip_eps: tuple[float, ...] = (0.15, 0.3)  # clip range of each stage; the last one repeats

    # GoRL (App. E.4)
    kl_coef: float = 1e-3  # beta of Eq. 3
    decoder_epochs: int = 50
    decoder_batch_size: int = 8192  # pairs (s, u)
    decoder_learning_rate: float = 3e-4
    decoder_lr_ratio: float = 0.0  # the last rate over the first, by cosine decay; 1: no decay
    decoder_buffer_size: int = 10_000_000  # most recent pairs that train a decoder, of its stage
    decoder_data: Literal["recorded", "redrawn"] = "recorded"  # redrawn: u anew in each minibatch
    advantage_temperature: float = 0.5  # T of a pair's weight, min(exp(advantage / T), 20); 0: none
    decoder_steps: int = 10  # noise levels of the diffusion, and steps of DDIM
    decoder_from: str | None = None  # a policy file with the decoder to start from (Figure 6)

    @property
    def steps_per_iteration(self) -> int:
        return self.batch_size * self.num_minibatches * self.unroll_length

    @property
    def stage_ends(self) -> list[int]:  # iterations done by then, rounded from cumulative steps
        size = self.steps_per_iteration
        return [int(2 * steps + size) // (2 * size) for steps in np.cumsum(self.stage_timesteps)]

    @property
    def decoder_pairs(self) -> int:  # of each decoder: the buffer, or the shortest refined stage
        stages = np.diff([0, *self.stage_ends])[:-1] * self.steps_per_iteration
        return int(min([self.decoder_buffer_size, *stages]))

    def checked(self, given: set[str]) -> "Args":
        """The arguments with stages and their total; ends the program if they cannot be right."""
        ends = [self.total_timesteps * sixths // 6 for sixths in (0, 2, 4, 5, 6)]  # 2 : 2 : 1 : 1
        stages = self.stage_timesteps or tuple(np.diff(ends).tolist())
        valid = "--total-timesteps" not in given or self.total_timesteps == sum(stages)
        require(valid, self, "total_timesteps", f"the sum of --stage-timesteps, {sum(stages)}")
        args = replace(self, stage_timesteps=stages, total_timesteps=sum(stages))
        counts = ("stage_timesteps", "decoder_epochs", "decoder_batch_size", "decoder_buffer_size")
        weights = ("kl_coef", "decoder_learning_rate", "decoder_lr_ratio", "advantage_temperature")
        check_common(args, counts, weights)
        require(args.decoder_steps > 1, args, "decoder_steps", "at least 2: 1 forgets the latent")
        allowed = f"stages (see --total-timesteps) of {args.steps_per_iteration} steps or more each"
        require(min(np.diff([0, *args.stage_ends])) > 0, args, "stage_timesteps", allowed)
        require(args.eval_envs > 1, args, "eval_envs", "2 or more: refinements have two modes")
        valid = args.decoder_batch_size <= args.decoder_pairs // 2  # one minibatch is held out
        require(valid, args, "decoder_batch_size", f"at most half of {args.decoder_pairs} pairs")
        valid = args.decoder_data == "recorded" or args.advantage_temperature == 0
        require(valid, args, "decoder_data", "recorded, or redrawn at --advantage-temperature 0")
        return args


CPU_PRESET = dict(env_id="CheetahRun", total_timesteps=1_200_000, eval_every=200_000, num_envs=128)
CPU_PRESET |= dict(batch_size=32, num_minibatches=16, update_epochs=8, decoder_epochs=25)
CPU_PRESET |= dict(decoder_batch_size=256, decoder_buffer_size=40_000, decoder_learning_rate=3e-3)


# --- shared: checks, environment, layers ---
def require(valid: bool, args: Args, name: str, allowed: str) -> None:
    """Unless `valid`, ends the program with one line on stderr and exit status 2."""
    if not valid:
        error = f"--{name.replace('_', '-')}: got {getattr(args, name)}; takes {allowed}"
        print(f"{Path(sys.argv[0]).name}: {' '.join(error.split())}", file=sys.stderr)
        raise SystemExit(2)


def check_common(args: Args, more_counts: tuple = (), more_weights: tuple = ()) -> None:
    """Ends the program with one line at the first argument that cannot be right."""
    counts = ("num_seeds", "total_timesteps", "eval_every", "eval_envs", "num_envs", "batch_size")
    counts += ("episode_length", "unroll_length", "num_minibatches", "update_epochs", *more_counts)
    weights = ("seed", "learning_rate", "reward_scale", "vf_coef", "ent_coef", *more_weights)
    fractions = ("gamma", "gae_lambda", "clip_eps")
    for names, low, high in ((counts, 1, 2**31 - 1), (weights, 0, 2**30), (fractions, 0, 1)):
        for name in names:
            values = np.array(getattr(args, name))
            valid = values.size > 0 and ((low <= values) & (values <= high)).all()
            require(valid, args, name, f"numbers from {low} to {high}")
    unrolls = args.batch_size * args.num_minibatches
    allowed = f"a divisor of --batch-size times --num-minibatches, {unrolls}"
    require(unrolls % args.num_envs == 0, args, "num_envs", allowed)
    require("/" not in args.exp_name, args, "exp_name", "a name without slashes")


# === Environment ==================================================================================
class Envs(NamedTuple):
    state: Any  # Playground's states of N environments, (N, ...)
    first: Any  # the states that they are reset to
    steps: Array  # control steps since then, (N,)


def make_env(args: Args) -> Any:
    """An environment of Playground; ends the program if it is none that can be used."""
    import mujoco
    from mujoco_playground import registry

    mujoco.set_mju_user_warning(lambda text: None)  # of attributes in Playground's own files
    try:
        config = registry.get_default_config(args.env_id)
        config.impl = args.impl  # Playground's own default is warp
        if args.impl == "warp":  # a contact buffer serves all worlds, and Playground's is for 2048
            config.naconmax *= -(-max(args.num_envs, args.eval_envs) * args.num_seeds // 2048)
        env = registry.load(args.env_id, config=config)
        env.reset = jax.jit(jax.default_matmul_precision("highest")(env.reset))  # traced only once
        env.step = jax.jit(jax.default_matmul_precision("highest")(env.step))  # GPUs would round
        assert isinstance(env.observation_size, int), "its observation is not one flat array"
    except Exception as error:
        require(False, args, "env_id", f"one of {', '.join(registry.ALL_ENVS)}; error: {error}")
    return env


def reset_envs(env: Any, num_envs: int, key: Array) -> Envs:
    state = jax.vmap(env.reset)(jax.random.split(key, num_envs))
    state = jax.tree.map(lambda x: x.astype(x.dtype), state)  # drops weak types, as a step does
    return Envs(state=state, first=state, steps=jnp.zeros(num_envs, jnp.int32))


def step_envs(args: Args, env: Any, envs: Envs, u: Array) -> tuple:
    """Applies tanh(u); next environments, and reward, terminated, truncated, broken, (N,) each."""
    state = jax.vmap(env.step)(envs.state, jnp.tanh(u))
    steps = envs.steps + 1
    # Physics that breaks, NaN or beyond 1e6, is truncated; what that step returned is dropped.
    broken = ~jnp.isfinite(state.reward) | ~(jnp.abs(state.obs) < 1e6).all(axis=-1)
    terminated = (state.done > 0) & ~broken
    truncated = broken | ((steps >= args.episode_length) & ~terminated)
    ended = terminated | truncated

    def reset_ended(first, now):
        if now.shape[:1] != ended.shape:  # warp has arrays that all environments share
            return now
        return jnp.where(ended.reshape(-1, *[1] * (now.ndim - 1)), first, now)

    after_reset = jax.tree.map(reset_ended, envs.first, state)
    envs = Envs(after_reset, envs.first, jnp.where(ended, 0, steps))
    return envs, jnp.where(broken, 0.0, state.reward), terminated, truncated, broken


# === Networks =====================================================================================
class MLP(nn.Module):
    """SiLU network (..., n) -> (..., sizes[-1]): kernels LeCun-uniform, biases 0."""

    sizes: tuple[int, ...]
    zero_last: bool = False  # the last layer's kernel starts at 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.lecun_uniform()
        rows = x.reshape(-1, x.shape[-1])  # CPUs copy what has more than one batch axis
        for width in self.sizes[:-1]:
            rows = nn.silu(nn.Dense(width, kernel_init=init)(rows))
        last_init = nn.initializers.zeros if self.zero_last else init
        rows = nn.Dense(self.sizes[-1], kernel_init=last_init, name="last")(rows)
        return rows.reshape(*x.shape[:-1], -1)


def make_network(module: nn.Module, learning_rate: Any, key: Array, *inputs: Array) -> Network:
    params = module.init(key, *inputs)
    return Network.create(apply_fn=module.apply, params=params, tx=optax.adam(learning_rate))


# --- end shared ---
class Encoder(nn.Module):
    """Mean and std (..., action_dim) of pi(latent | s) at normalised observations (App. E.3)."""

    action_dim: int

    @nn.compact
    def __call__(self, obs: Array) -> tuple[Array, Array]:
        out = MLP((32, 32, 32, 32, 2 * self.action_dim), zero_last=True)(obs)
        mean, raw_std = jnp.split(out, 2, axis=-1)
        # softplus(log(e - 1)) = 1: an encoder whose output is 0 is exactly N(0, I).
        return mean, jnp.clip(nn.softplus(raw_std + np.log(np.e - 1)), 1e-3, 10.0)


class Denoiser(nn.Module):
    """v(a_t, t; s) of the diffusion (App. C): obs normalised, a (..., action_dim), t (...).

    With a_t = cos(phi) a_0 + sin(phi) noise, v = da / dphi = cos(phi) noise - sin(phi) a_0
    (Salimans & Ho, 2022). From the noise itself, the first step would divide by cos(phi_D) = 0.
    """

    @nn.compact
    def __call__(self, obs: Array, a: Array, t: Array) -> Array:
        angles = jnp.broadcast_to(t, a.shape[:-1])[..., None] * 2.0 ** jnp.arange(4)
        x = jnp.concatenate([obs, a, jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return MLP((64, 64, 64, 64, a.shape[-1]), zero_last=True)(x)


def noise_angles(steps: int) -> Array:  # phi_t of the cosine schedule (Eq. 16), t = 0 .. D
    x = (np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2
    return jnp.float32(np.arccos(np.cos(x) / np.cos(x[0])))


class Agent(NamedTuple):
    encoder: Network
    critic: Network
    stats: running_statistics.RunningStatisticsState  # of observations, for encoder and critic
    decoder: Network
    decoder_stats: running_statistics.RunningStatisticsState  # frozen as the decoder is


def init_agent(args: Args, env: Any, key: Array) -> Agent:
    """The encoder is exactly N(0, I), the decoder a multiple of the identity (section 3.2)."""
    keys = jax.random.split(key, 3)
    obs, u, t = jnp.zeros(env.observation_size), jnp.zeros(env.action_size), jnp.zeros(())
    stats = running_statistics.init_state(obs)
    steps = args.decoder_epochs * (args.decoder_pairs // args.decoder_batch_size - 1)
    lr = optax.cosine_decay_schedule(args.decoder_learning_rate, steps, args.decoder_lr_ratio)
    return Agent(
        encoder=make_network(Encoder(env.action_size), args.learning_rate, keys[0], obs),
        critic=make_network(MLP((256, 256, 256, 256, 256, 1)), args.learning_rate, keys[1], obs),
        stats=stats,
        decoder=make_network(Denoiser(), lr, keys[2], obs, u, t),
        decoder_stats=stats,
    )


def policy_part(agent: Agent) -> Agent:
    """What a policy file holds: no critic, no states of Adam."""
    encoder = agent.encoder.replace(opt_state=None)
    decoder = agent.decoder.replace(opt_state=None)
    return agent._replace(encoder=encoder, critic=None, decoder=decoder)


def decode(args: Args, agent: Agent, obs: Array, latent: Array) -> Array:
    """u = g(s, latent) at raw observations: deterministic DDIM from a_D = latent (App. C.1)."""
    obs = normalize(obs, agent.decoder_stats)
    phi = noise_angles(args.decoder_steps)
    a = latent
    for t in range(args.decoder_steps, 0, -1):
        v = agent.decoder.apply_fn(agent.decoder.params, obs, a, t / args.decoder_steps)
        turn = phi[t] - phi[t - 1]
        a = jnp.cos(turn) * a - jnp.sin(turn) * v  # a rotation; where v = 0, ten make 0.88 latent
    return a


def act(args: Args, agent: Agent, obs: Array, key: Array, deterministic: Any = False) -> tuple:
    """u (..., action_dim) at raw observations, its latent, and log pi(latent | s)."""
    mean, std = agent.encoder.apply_fn(agent.encoder.params, normalize(obs, agent.stats))
    latent = mean + std * jnp.where(deterministic, 0.0, jax.random.normal(key, mean.shape))
    log_prob = norm.logpdf(latent, mean, std).sum(-1)
    return decode(args, agent, obs, latent), latent, log_prob


# === Phase 1: PPO on the latent policy ============================================================
class Steps(NamedTuple):  # (S, N, ...), and for the update (B, T, ...)
    obs: Array  # for the update normalised and T + 1 of them
    u: Array
    latent: Array
    log_prob: Array
    reward: Array  # the task's; for the update scaled
    terminated: Array
    truncated: Array
    broken: Array


def rollout(args: Args, env: Any, agent: Agent, envs: Envs, key: Array) -> tuple:
    """Next environments, steps (S, N, ...), and those as unrolls (B, T, ...) for the update."""
    T = args.unroll_length

    def step(envs, key):
        u, latent, log_prob = act(args, agent, envs.state.obs, key)
        next_envs, *outcome = step_envs(args, env, envs, u)
        return next_envs, Steps(envs.state.obs, u, latent, log_prob, *outcome)

    def as_unrolls(x):  # (S, N, ...) -> (S / T, N, T, ...) -> (B, T, ...)
        return x.reshape(-1, T, *x.shape[1:]).swapaxes(1, 2).reshape(-1, T, *x.shape[2:])

    keys = jax.random.split(key, args.steps_per_iteration // args.num_envs)
    envs, steps = jax.lax.scan(step, envs, keys)
    unrolls = jax.tree.map(as_unrolls, steps)
    # Each unroll is followed by the first observation of the next: unused if its episode has ended.
    ends = jnp.concatenate([steps.obs[T::T], envs.state.obs[None]])
    obs = jnp.concatenate([unrolls.obs, ends.reshape(-1, 1, ends.shape[-1])], axis=1)
    obs = normalize(obs, agent.stats)
    return envs, steps, unrolls._replace(obs=obs, reward=args.reward_scale * unrolls.reward)


# --- shared: advantages, evaluation ---
def gae(args: Args, batch: Any, value: Array) -> tuple[Array, Array]:
    """Critic targets and advantages (B, T) of unrolls with values (B, T + 1), as Brax has them.

    A terminated step's target is its reward. A truncated step's is its value: it teaches nothing.
    """
    discount = args.gamma * (1.0 - batch.terminated)
    keep = 1.0 - batch.truncated
    delta = keep * (batch.reward + discount * value[:, 1:] - value[:, :-1])
    decay = keep * discount * args.gae_lambda

    # correction_t = delta_t + decay_t * correction_(t + 1): maps x -> delta + decay * x, composed.
    def compose(later, earlier):
        (delta, decay), (later_delta, later_decay) = earlier, later
        return delta + decay * later_delta, decay * later_decay

    correction, _ = jax.lax.associative_scan(compose, (delta, decay), reverse=True, axis=1)
    target = value[:, :-1] + correction
    # Brax's advantage: gae_lambda acts from the next step on.
    next_target = jnp.concatenate([target[:, 1:], value[:, -1:]], axis=1)
    return target, keep * (batch.reward + discount * next_target - value[:, :-1])


def evaluate(args: Args, env: Any, agent: Any, key: Array, deterministic: Any) -> Array:
    """Undiscounted returns of `eval_envs` episodes."""
    reset_key, act_key = jax.random.split(key)

    def env_step(carry, key):
        envs, running = carry
        u, *_ = act(args, agent, envs.state.obs, key, deterministic)
        envs, reward, terminated, truncated, _ = step_envs(args, env, envs, u)
        return (envs, running & ~terminated & ~truncated), jnp.where(running, reward, 0.0)

    start = reset_envs(env, args.eval_envs, reset_key), jnp.ones(args.eval_envs, bool)
    _, rewards = jax.lax.scan(env_step, start, jax.random.split(act_key, args.episode_length))
    return rewards.sum(axis=0)


# --- end shared ---
def ppo_loss(params: dict, args: Args, agent: Agent, batch: Steps, clip_eps: Any) -> tuple:
    """Clipped surrogate (Eq. 5), KL to the decoder's prior (Eq. 3), entropy bonus, critic error.

    The decoder is absent: to the latent policy it is part of the environment (Lemma 3.1).
    """
    # Targets and advantages are those of the critic as it is now, in every minibatch.
    value = agent.critic.apply_fn(params["critic"], batch.obs).squeeze(-1)
    target, advantage = gae(args, batch, jax.lax.stop_gradient(value))
    value_loss = jnp.square(target - value[:, :-1]).mean()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)

    mean, std = agent.encoder.apply_fn(params["encoder"], batch.obs[:, :-1])
    log_ratio = norm.logpdf(batch.latent, mean, std).sum(-1) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
    policy_loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean()

    log_std = jnp.log(std)
    entropy = (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum(-1).mean()
    latent_kl = (0.5 * (jnp.square(mean) + jnp.square(std) - 1) - log_std).sum(-1).mean()

    loss = policy_loss + args.vf_coef * value_loss
    loss = loss - args.ent_coef * entropy + args.kl_coef * latent_kl
    metrics = {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss}
    metrics |= {"entropy": entropy, "latent_kl": latent_kl, "latent_log_std": log_std.mean()}
    metrics |= {"approx_kl": (ratio - 1 - log_ratio).mean()}
    metrics |= {"clip_fraction": (ratio != clipped_ratio).mean()}
    return loss, metrics


def update(args: Args, agent: Agent, unrolls: Steps, clip_eps: Any, key: Array) -> tuple:
    """`update_epochs` passes over the unrolls, in new minibatches of whole unrolls each time."""

    def minibatch_step(agent, rows):
        batch = jax.tree.map(lambda x: x[rows], unrolls)
        params = {"encoder": agent.encoder.params, "critic": agent.critic.params}
        grads, metrics = jax.grad(ppo_loss, has_aux=True)(params, args, agent, batch, clip_eps)
        metrics["grad_norm_encoder"] = optax.tree.norm(grads["encoder"])
        metrics["grad_norm_critic"] = optax.tree.norm(grads["critic"])
        encoder = agent.encoder.apply_gradients(grads=grads["encoder"])
        critic = agent.critic.apply_gradients(grads=grads["critic"])
        return agent._replace(encoder=encoder, critic=critic), metrics

    keys = jax.random.split(key, args.update_epochs)
    rows = jax.vmap(lambda key: jax.random.permutation(key, len(unrolls.reward)))(keys)
    agent, metrics = jax.lax.scan(minibatch_step, agent, rows.reshape(-1, args.batch_size))
    return agent, jax.tree.map(jnp.mean, metrics)


class Pairs(NamedTuple):  # what a decoder is trained on, (n, ...)
    obs: Array
    u: Array
    reward: Array  # for the log only
    advantage: Array


class State(NamedTuple):  # all that changes in the training of a seed
    agent: Agent
    envs: Envs
    recent: Pairs  # the last decoder_pairs of them
    key: Array


def init_state(args: Args, env: Any, key: Array, stage: Any) -> State:
    """Untrained networks and environments just reset, from other random numbers each stage."""
    agent_key, reset_key, key = jax.random.split(jax.random.fold_in(key, stage), 3)
    agent = init_agent(args, env, agent_key)
    envs = reset_envs(env, args.num_envs, reset_key)
    n = args.decoder_pairs
    obs, u = jnp.zeros((n, env.observation_size)), jnp.zeros((n, env.action_size))
    state = State(agent, envs, Pairs(obs, u, jnp.zeros(n), jnp.zeros(n)), key)
    # Weak types would be gone after the first iteration, and everything be compiled again.
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), state)


def iteration(args: Args, env: Any, state: State, clip_eps: Any) -> tuple[State, dict]:
    """Rollout and PPO update of one seed, and metrics."""
    key, rollout_key, update_key = jax.random.split(state.key, 3)
    envs, steps, unrolls = rollout(args, env, state.agent, state.envs, rollout_key)
    agent, metrics = update(args, state.agent, unrolls, clip_eps, update_key)
    # Not before: rollout and update see the same statistics, so that ratios start at 1.
    agent = agent._replace(stats=running_statistics.update(agent.stats, steps.obs))

    value = agent.critic.apply_fn(agent.critic.params, unrolls.obs).squeeze(-1)
    _, advantage = gae(args, unrolls, value)
    advantage = advantage.reshape(-1, args.num_envs, args.unroll_length).swapaxes(1, 2)
    pairs = Pairs(steps.obs, steps.u, steps.reward, advantage)  # (S, N, ...) -> (S * N, ...)
    pairs = jax.tree.map(lambda x, old: x.reshape(-1, *old.shape[1:]), pairs, state.recent)
    recent = jax.tree.map(lambda *x: jnp.concatenate(x)[-args.decoder_pairs :], state.recent, pairs)
    metrics |= {"reward_mean": steps.reward.mean(), "nan_resets": steps.broken.sum()}
    metrics |= {"u_std": steps.u.std(), "u_beyond_5": (jnp.abs(steps.u) > 5).mean()}
    return State(agent, envs, recent, key), metrics


# === Phase 2: decoder refinement ==================================================================
def denoising_loss(params: Any, args: Args, decoder: Network, obs: Array, u: Array, key: Array):
    """Eq. 17 for each pair, its t weighted by 1 / alpha_bar_t, with 8 draws of t and of noise."""
    t_key, noise_key = jax.random.split(key)
    obs, u = jnp.repeat(obs[:, None], 8, axis=1), jnp.repeat(u[:, None], 8, axis=1)
    t = jax.random.randint(t_key, u.shape[:-1], 1, args.decoder_steps + 1)  # at 0 is no noise
    noise = jax.random.normal(noise_key, u.shape)
    phi = noise_angles(args.decoder_steps)[t][..., None]
    a = jnp.cos(phi) * u + jnp.sin(phi) * noise
    v = decoder.apply_fn(params, obs, a, t / args.decoder_steps)
    return jnp.square(v - (jnp.cos(phi) * noise - jnp.sin(phi) * u)).sum(-1).mean(axis=1)


def decoder_epoch(args: Args, decoder: Network, agent: Agent, pairs: Pairs, key: Array, epoch: Any):
    """One pass over recent pairs of the agent, (n, ...): the decoder, mean and held-out loss."""
    split_key, test_key, epochs_key = jax.random.split(key, 3)
    rows_key, loss_key = jax.random.split(jax.random.fold_in(epochs_key, epoch))
    rows = jax.random.permutation(split_key, len(pairs.u))
    held_out, rows = jnp.split(rows, [args.decoder_batch_size])  # the same in every epoch
    rows = jax.random.permutation(rows_key, rows)
    # High-reward data (Algorithm 1, line 17): an infinite temperature weighs all pairs alike.
    temperature = args.advantage_temperature if args.advantage_temperature > 0 else np.inf
    weight = jnp.minimum(jnp.exp(jax.nn.standardize(pairs.advantage) / temperature), 20.0)

    def loss(params, rows, key):
        u_key, noise_key = jax.random.split(key)
        obs, u = pairs.obs[rows], pairs.u[rows]
        if args.decoder_data == "redrawn":
            u, *_ = act(args, agent, obs, u_key)
        losses = denoising_loss(params, args, decoder, normalize(obs, agent.stats), u, noise_key)
        return (weight[rows] * losses).mean()

    def minibatch_step(decoder, rows_and_key):
        value, grads = jax.value_and_grad(loss)(decoder.params, *rows_and_key)
        return decoder.apply_gradients(grads=grads), value

    batches = len(rows) // len(held_out)
    xs = rows[: batches * len(held_out)].reshape(batches, -1), jax.random.split(loss_key, batches)
    decoder, losses = jax.lax.scan(minibatch_step, decoder, xs)
    return decoder, losses.mean(), loss(decoder.params, held_out, test_key)


# --- shared: files, seeds ---
def log(args: Args, run_dir: Path, table: str, **columns: Any) -> None:
    """Appends a row a seed to RUN_DIR/<table>.csv; columns are numbers, or arrays (K,)."""
    with (run_dir / f"{table}.csv").open("a") as file:
        if file.tell() == 0:
            print("seed", *columns, sep=",", file=file)
        for i in range(args.num_seeds):
            row = {name: np.broadcast_to(x, args.num_seeds)[i] for name, x in columns.items()}
            print(args.seed + i, *row.values(), sep=",", file=file)
            if args.track:
                import_module("wandb").log({f"{table}/seed_{args.seed + i}": row})


def save_arrays(args: Args, path: Path, tree: Any, **meta: Any) -> None:
    """A tree's leaves and `meta` in an .npz file, which has checksums; never half of it."""
    meta["run"] = [Path(__file__).name, args.env_id, args.seed, args.num_seeds]
    unfinished = path.with_name("unfinished.tmp")
    with unfinished.open("wb") as file:
        np.savez(file, *jax.device_get(jax.tree.leaves(tree)), meta=json.dumps(meta))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_arrays(args: Args, path: Path, like: Any) -> tuple[Any, dict]:
    """Tree and meta of a file; an error unless it is this run's, with the shapes of `like`."""
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        leaves = [file[f"arr_{i}"] for i in range(len(file.files) - 1)]
    run = [Path(__file__).name, args.env_id, args.seed, args.num_seeds]
    if meta["run"] != run or [x.shape for x in leaves] != [x.shape for x in jax.tree.leaves(like)]:
        raise OSError(f"{path} is of {meta['run']}, or has arrays of other sizes")
    return jax.tree.unflatten(jax.tree.structure(like), leaves), meta


def save_checkpoint(args: Args, run_dir: Path, state: Any, done: int, stage: int, start: float):
    """All that the rest of a run depends on, and how long its logs are; the newest two are kept."""
    logs = {path.name: path.stat().st_size for path in run_dir.glob("*.csv")}
    path = run_dir / f"checkpoints/state_{done:09}_{stage:02}.npz"
    save_arrays(args, path, state, logs=logs, done=done, stage=stage, wall_time=time.time() - start)
    for old in sorted(path.parent.glob("state_*.npz"))[:-2]:
        old.unlink()
    return time.time()


def load_checkpoint(args: Args, run_dir: Path, like: Any) -> tuple[Any, dict]:
    """State (None if there was none yet) and progress; the logs lose the rows that came later."""
    state = None
    progress = {"logs": {}, "done": 0, "stage": 0, "wall_time": 0.0}
    bad = []
    for path in sorted(run_dir.glob("checkpoints/state_*.npz"), reverse=True):
        try:
            state, progress = load_arrays(args, path, like)
            break
        except Exception as error:  # zipfile, zlib and NumPy have exceptions of their own
            print(f"{path} is no good ({error}); trying the one before", file=sys.stderr)
            bad.append(path)
    begun = (run_dir / "train.csv").exists()  # written after the first checkpoint
    require(state is not None or not begun, args, "resume", "a run with a good checkpoint")
    for path in bad:
        path.replace(path.with_suffix(".bad"))
    for name in {"eval.csv", "train.csv", "decoder.csv", "refine.csv"} & set(os.listdir(run_dir)):
        os.truncate(run_dir / name, progress["logs"].get(name, 0))
    return state, progress


def make_run_dir(args: Args, device: str) -> Path:
    """Creates RUNS_DIR/<env-id>__<exp-name>__<seed>__<unix time>/ with args.json in it."""
    how = {"shell": True, "cwd": Path(__file__).parent, "capture_output": True, "text": True}
    commit = subprocess.run("git describe --always --dirty", **how).stdout.strip() or None
    versions = {package.name: package.version for package in metadata.distributions()}
    versions |= {"script": Path(__file__).name, "git_commit": commit, "device": device}
    stored = asdict(args) | {"versions": versions | {"python": sys.version.split()[0]}}
    run_dir = Path(args.runs_dir, f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.0f}")
    try:
        (run_dir / "checkpoints").mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(stored, indent=1))
    except OSError as error:
        require(False, args, "runs_dir", f"a folder to write to ({error})")
    return run_dir


def load_args(run_dir: str | Path) -> Args:
    stored = json.loads((Path(run_dir) / "args.json").read_text())
    if stored.pop("versions")["script"] != Path(__file__).name:
        raise ValueError("it is another script's")
    return Args(**{k: tuple(x) if isinstance(x, list) else x for k, x in stored.items()})


def load_policy(run_dir: str | Path, step: int | None = None, seed: int | None = None) -> Callable:
    """A saved policy (obs, key, deterministic=False) -> u, by default the first seed's last one.

    Observations are raw, (..., obs_dim); the action is tanh(u). An error if there is no such one.
    """
    args = load_args(run_dir)
    env = make_env(args)
    init = jax.vmap(lambda key: policy_part(init_agent(args, env, key)))
    like = jax.eval_shape(init, jax.ShapeDtypeStruct((args.num_seeds, 2), np.uint32))
    files = {int(x.stem.split("_")[1]): x for x in Path(run_dir).glob("checkpoints/policy_*.npz")}
    agents, _ = load_arrays(args, files[max(files) if step is None else step], like)
    index = 0 if seed is None else range(args.seed, args.seed + args.num_seeds).index(seed)
    agent = jax.tree.map(lambda x: x[index], agents)
    policy = jax.jit(partial(act, args))
    return lambda obs, key, deterministic=False: policy(agent, obs, key, deterministic)[0]


def over_seeds(args: Args, f: Callable, in_axes: tuple, **options: Any) -> Callable:
    """Compiles f for all seeds, on as many local devices as can share them evenly."""
    num_devices = max(n for n in range(1, jax.local_device_count() + 1) if args.num_seeds % n == 0)
    many_seeds = jax.vmap(f, in_axes)

    @wraps(many_seeds)
    def one_seed(*xs):  # without `vmap` a CPU is 7% faster
        first = partial(jax.tree.map, lambda x: x[0])
        xs = [x if axis is None else first(x) for x, axis in zip(xs, in_axes, strict=True)]
        return jax.tree.map(lambda x: x[None], f(*xs))

    mapped = one_seed if args.num_seeds == num_devices else many_seeds
    if num_devices > 1:
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()[:num_devices]), ("K",))
        specs = tuple(P() if axis is None else P("K") for axis in in_axes)
        mapped = jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=P("K"), check_vma=False)
    return jax.jit(mapped, **options)


# --- end shared ---
# === Training =====================================================================================
def train(args: Args, env: Any, run_dir: Path) -> None:
    """Algorithm 1, from the newest checkpoint on."""
    init = over_seeds(args, partial(init_state, args, env), (0, None))
    iterate = over_seeds(args, partial(iteration, args, env), (0, None), donate_argnums=0)
    evaluate_seeds = over_seeds(args, partial(evaluate, args, env), (0, 0, None))
    refine = over_seeds(args, partial(decoder_epoch, args), (0, 0, 0, 0, None))
    fold_in = jax.vmap(jax.random.fold_in, (0, None))
    keys = jax.vmap(jax.random.PRNGKey)(np.arange(args.num_seeds) + args.seed)
    init_keys, eval_keys, decoder_keys = (fold_in(keys, purpose) for purpose in range(3))

    like = jax.eval_shape(init, init_keys, 0)
    state, progress = load_checkpoint(args, run_dir, like)
    done = progress["done"]  # iterations
    size = args.steps_per_iteration
    start_time = time.time() - progress["wall_time"]
    save_time = time.time()
    bar = tqdm(total=args.stage_ends[-1], initial=done, desc="compiling", file=sys.stdout)
    stop_signals = []  # SIGTERM, which schedulers send
    signal.signal(signal.SIGTERM, lambda number, frame: stop_signals.append(number))

    def returns(share):  # (K, eval_envs), that share of them deterministic, and those first
        deterministic = np.arange(args.eval_envs)[:, None] < share * args.eval_envs
        return jax.device_get(evaluate_seeds(state.agent, fold_in(eval_keys, done), deterministic))

    def log_returns(stage):
        r = returns(share=1)
        row = {"return_mean": r.mean(1), "return_std": r.std(1), "return_min": r.min(1)}
        row |= {"return_max": r.max(1), "wall_time": time.time() - start_time}
        log(args, run_dir, "eval", step=done * size, stage=stage, **row)
        bar.write(f"step {done * size:,}, stage {stage}: return {r.mean(1).round(1)}")
        bar.set_postfix_str(f"return {r.mean():.1f}")

    if state is None and args.decoder_from:
        try:
            given, _ = load_arrays(args, Path(args.decoder_from), policy_part(like.agent))
        except Exception as error:
            require(False, args, "decoder_from", f"a policy file of this task and seeds ({error})")
    if state is None:
        state = init(init_keys, 0)
        if args.decoder_from:
            decoder = state.agent.decoder.replace(params=given.decoder.params)
            agent = state.agent._replace(decoder=decoder, decoder_stats=given.decoder_stats)
            state = state._replace(agent=agent)
    state = over_seeds(args, lambda state: state, (0,))(state)  # files leave it on the host
    if not progress["logs"]:
        log_returns(stage=0)
        save_time = save_checkpoint(args, run_dir, state, done, 0, start_time)
    for stage in range(progress["stage"], len(args.stage_timesteps)):
        # Phase 1: PPO on the latent policy; the decoder is frozen.
        clip_eps = args.clip_eps[min(stage, len(args.clip_eps) - 1)]
        while done < args.stage_ends[stage]:
            start = time.time()
            state, metrics = iterate(state, clip_eps)
            metrics = jax.device_get(metrics)
            sps = args.num_seeds * size / (time.time() - start)
            done += 1
            log(args, run_dir, "train", step=done * size, stage=stage, sps=sps, **metrics)
            bar.set_description(f"stage {stage}, {sps:,.0f} steps/s")
            bar.update()
            norms = metrics["grad_norm_encoder"] + metrics["grad_norm_critic"]
            if not np.isfinite(metrics["loss"] + norms).all():
                raise FloatingPointError(f"iteration {done}: loss or gradient is not finite")

            stage_done = done == args.stage_ends[stage]
            if stage_done or done * size % args.eval_every < size:  # past a multiple of it
                log_returns(stage)
            if stage_done or stop_signals or time.time() - save_time > 60 * args.checkpoint_minutes:
                save_time = save_checkpoint(args, run_dir, state, done, stage, start_time)
                if stop_signals:
                    raise SystemExit(128 + signal.SIGTERM)
        path = run_dir / f"checkpoints/policy_{done * size}.npz"
        save_arrays(args, path, policy_part(state.agent))
        if stage == len(args.stage_timesteps) - 1:
            break

        # Phase 2: the decoder learns to turn N(0, I) into the recent u; the encoder is frozen.
        next_state = init(init_keys, stage + 1)
        decoder = next_state.agent.decoder.replace(params=state.agent.decoder.params)
        keys = fold_in(decoder_keys, stage)
        for epoch in range(args.decoder_epochs):
            decoder, loss, held_out = refine(decoder, state.agent, state.recent, keys, epoch)
            row = {"epoch": epoch, "loss": np.asarray(loss), "held_out_loss": np.asarray(held_out)}
            log(args, run_dir, "decoder", stage=stage + 1, **row)
            bar.set_description(f"decoder {stage + 1}, epoch {epoch}")
            if not np.isfinite(row["loss"] + row["held_out_loss"]).all():
                raise FloatingPointError(f"decoder {stage + 1}, epoch {epoch}: loss is not finite")
            if stop_signals:
                raise SystemExit(128 + signal.SIGTERM)

        row = {"pairs": args.decoder_pairs, "reward_mean": np.asarray(state.recent.reward.mean(1))}
        before = np.array_split(returns(share=0.5), 2, axis=1)  # deterministic, stochastic
        # The encoder restarts as exactly N(0, I) (section 3.2); critic and statistics carry on.
        agent = next_state.agent._replace(critic=state.agent.critic, stats=state.agent.stats)
        stats = jax.tree.map(jnp.copy, agent.stats)  # `iterate` takes no buffer twice
        state = next_state._replace(agent=agent._replace(decoder=decoder, decoder_stats=stats))
        after = np.array_split(returns(share=0.5), 2, axis=1)
        row |= {"return_before": before[1].mean(1), "return_after": after[1].mean(1)}
        row |= {"deterministic_before": before[0].mean(1), "deterministic_after": after[0].mean(1)}
        log(args, run_dir, "refine", step=done * size, stage=stage + 1, **row)
        save_time = save_checkpoint(args, run_dir, state, done, stage + 1, start_time)
    bar.close()


# --- shared: command line ---
def parse_args() -> Args:
    """The command line's arguments, over those of the preset or of the run that is resumed."""
    args = tyro.cli(Args)
    default = replace(Args(preset=args.preset), **(CPU_PRESET if args.preset == "cpu" else {}))
    if args.resume is not None:
        try:
            default = replace(load_args(args.resume), resume=args.resume)
        except Exception as error:
            require(False, args, "resume", f"a run of {Path(__file__).name} ({error})")
    args = tyro.cli(Args, default=default)
    given = {word.split("=")[0].replace("_", "-") for word in sys.argv[1:] if word[:2] == "--"}
    tracking = {"--track", "--no-track", "--wandb-project-name", "--wandb-entity"}
    others = " ".join(given - tracking - {"--resume"})
    require(args.resume is None or not others, args, "resume", f"a run, and no {others} beside it")
    return args.checked(given)


def main() -> None:
    args = parse_args()
    # Ctrl-C ends a run at once, inside compiled code, too: a run that is killed resumes exactly.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    env = make_env(args)
    device = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    run_dir = Path(args.resume or make_run_dir(args, device))
    resume = f"python {sys.argv[0]} --resume {run_dir}"
    print(f"{args.env_id}: {args.num_seeds} x {args.total_timesteps:,} steps on {device}")
    print(f"Run directory: {run_dir}\nWhatever stops it, go on with: {resume}", flush=True)
    if args.track:
        about = {"project": args.wandb_project_name, "entity": args.wandb_entity, "dir": run_dir}
        about |= {"id": run_dir.name, "resume": "allow", "config": asdict(args)}
        try:
            import_module("wandb").init(**about)
        except Exception as error:
            require(False, args, "track", f"wandb and a login, or WANDB_MODE=offline ({error})")
    try:
        train(args, env, run_dir)
    except (OSError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
        newest = max(run_dir.glob("checkpoints/state_*.npz"), default="none")
        reason = (str(error) or repr(error)).splitlines()[0]
        print(f"{sys.argv[0]}: {reason}; newest: {newest}; resume: {resume}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"Finished: {run_dir}\nTo draw, film and evaluate it:")
    for tool in ("figure_4 --runs", "video", "evaluate"):
        print(f"python -m plotting.{tool} {run_dir}")


if __name__ == "__main__":
    main()
# --- end shared ---
