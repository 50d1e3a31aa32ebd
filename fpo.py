"""FPO, flow policy optimisation, as a baseline of GoRL.

McAllister et al., "Flow Matching Policy Gradients" (2025), in the PPO pipeline of Zhang et al.,
"GoRL: An Algorithm-Agnostic Framework for Online Reinforcement Learning with Generative Policies"
(2025). Appendices cited below are the latter's.

1. The actor is a velocity field: ten Euler steps take noise (tau = 1) to u (tau = 0) of tanh(u).
2. With each u, 8 pairs (tau, noise) are drawn and kept, and the flow-matching loss of u at them.
3. Likelihoods are intractable: exp(old loss - new loss) at the same pairs stands in for a ratio.
4. From there on it is PPO: clipped ratio, advantages from a critic by GAE. No entropy bonus.
5. 180M environment steps.

    python fpo.py --env-id HopperStand --seed 1

Shapes: K seeds, N environments, T steps in an unroll, B unrolls in an iteration.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
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
from flax import linen as nn
from flax.training.train_state import TrainState as Network  # parameters and Adam's state
from jax import Array, P
from jax.sharding import Mesh
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    # Run
    env_id: str = "HopperStand"  # an environment of MuJoCo Playground
    seed: int = 1  # the first seed
    num_seeds: int = 1  # seeds seed, seed + 1, ... train together, spread over the local devices
    preset: Literal["paper", "cpu"] = "paper"  # cpu: CheetahRun, in minutes
    total_timesteps: int = 180_000_000  # environment steps of a seed
    eval_every: int = 6_000_000  # environment steps between evaluations
    eval_envs: int = 128  # episodes of an evaluation
    impl: Literal["jax", "warp"] = "jax"  # physics; the paper's is jax
    runs_dir: str = "runs"  # where run directories are made
    exp_name: str = Path(__file__).stem  # part of the run directory's name
    resume: str | None = None  # a run directory to continue, with its own arguments
    checkpoint_minutes: float = 10.0  # between checkpoints
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
    learning_rate: float = 3e-4  # Adam's, for actor and critic
    gamma: float = 0.995  # discount
    gae_lambda: float = 0.95
    reward_scale: float = 10.0  # factor on the rewards that the critic sees
    vf_coef: float = 0.25  # weight of the critic's squared error
    ent_coef: float = 0.0  # must be 0: the entropy of a flow is intractable
    clip_eps: float = 0.05  # clip range of the ratio

    # FPO (App. E.3)
    flow_steps: int = 10  # Euler steps from noise to u
    samples_per_action: int = 8  # pairs (tau, noise)
    ratio: Literal["per-action", "per-pair"] = "per-action"  # exp of the pairs' mean, or of each

    @property
    def steps_per_iteration(self) -> int:
        return self.batch_size * self.num_minibatches * self.unroll_length

    @property
    def policy_iterations(self) -> list[int]:
        """Iterations done when policies are saved, where GoRL's stages end; the last is the end."""
        size = self.steps_per_iteration
        ends = [self.total_timesteps * sixths // 6 for sixths in (2, 4, 5, 6)]
        return [(2 * steps + size) // (2 * size) for steps in ends]

    def check(self) -> None:
        check_common(self, ("flow_steps", "samples_per_action"))
        require(self.ent_coef == 0, "ent_coef", self.ent_coef, "0: a flow's entropy is intractable")
        takes = f"at least one iteration, {self.steps_per_iteration} steps"
        ok = self.policy_iterations[-1] > 0
        require(ok, "total_timesteps", self.total_timesteps, takes)


CPU_PRESET = {"env_id": "CheetahRun", "total_timesteps": 1_200_000, "eval_every": 200_000}
CPU_PRESET |= {"num_envs": 128, "batch_size": 32, "num_minibatches": 16, "update_epochs": 8}


# --- shared: checks, environment, statistics, layers ---
def require(ok: bool, argument: str, got: Any, takes: str) -> None:
    """Unless `ok`, ends the program with one line on stderr and exit status 2."""
    if not ok:
        name = argument.replace("_", "-")
        print(f"{Path(sys.argv[0]).name}: --{name}: got {got}; takes {takes}", file=sys.stderr)
        raise SystemExit(2)


def check_common(args: "Args", more_counts: tuple = (), more_weights: tuple = ()) -> None:
    """Ends the program with one line at the first argument that cannot be right."""
    counts = ("num_seeds", "total_timesteps", "eval_every", "eval_envs", "num_envs", "batch_size")
    counts += ("episode_length", "unroll_length", "num_minibatches", "update_epochs", *more_counts)
    weights = ("seed", "learning_rate", "reward_scale", "vf_coef", "ent_coef", *more_weights)
    fractions = ("gamma", "gae_lambda", "clip_eps")
    for names, low, high in ((counts, 1, 2**31 - 1), (weights, 0, 2**30), (fractions, 0, 1)):
        for name in names:
            got = np.ravel(getattr(args, name))
            ok = got.size > 0 and ((low <= got) & (got <= high)).all()
            require(ok, name, getattr(args, name), f"numbers from {low} to {high}")
    unrolls = args.batch_size * args.num_minibatches
    takes = f"a divisor of --batch-size times --num-minibatches, {unrolls}"
    require(unrolls % args.num_envs == 0, "num_envs", args.num_envs, takes)
    require("/" not in args.exp_name, "exp_name", args.exp_name, "a name without slashes")


# === Environment ==================================================================================
class Envs(NamedTuple):
    state: Any  # Playground's states of N environments, (N, ...)
    first: Any  # the states that they are reset to
    steps: Array  # control steps since then, (N,)


def make_env(args: "Args") -> Any:
    """An environment of Playground; ends the program if it is none that can be used."""
    import mujoco  # these take seconds, for which --help need not wait
    from mujoco_playground import registry

    mujoco.set_mju_user_warning(lambda text: None)  # of attributes in Playground's own files
    try:
        config = registry.get_default_config(args.env_id)
        config.impl = args.impl  # Playground's own default is warp
        if args.impl == "warp":  # a contact buffer serves all worlds, and Playground's is for 2048
            worlds = max(args.num_envs, args.eval_envs) * args.num_seeds
            config.naconmax *= -(-worlds // 2048)
        env = registry.load(args.env_id, config=config)
        env.reset, env.step = jax.jit(env.reset), jax.jit(env.step)  # each is traced only once
        assert isinstance(env.observation_size, int), "its observation is not one flat array"
    except Exception as error:
        known = args.env_id in registry.ALL_ENVS
        takes = "a task that can be built here" if known else ", ".join(registry.ALL_ENVS)
        require(False, "env_id", f"{args.env_id} ({error})", takes)
    return env


def reset_envs(env: Any, num_envs: int, key: Array) -> Envs:
    with jax.default_matmul_precision("highest"):  # physics; GPUs multiply in less by default
        state = jax.vmap(env.reset)(jax.random.split(key, num_envs))
    # Weak types would be gone after the first step, and everything be compiled again.
    state = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)
    return Envs(state=state, first=state, steps=jnp.zeros(num_envs, jnp.int32))


def step_envs(args: "Args", env: Any, envs: Envs, u: Array) -> tuple:
    """Applies tanh(u); next environments, and reward, terminated, truncated, broken, (N,) each."""
    with jax.default_matmul_precision("highest"):
        state = jax.vmap(env.step)(envs.state, jnp.tanh(u))
    steps = envs.steps + 1
    # Physics that breaks, NaN or beyond 1e6, is truncated; what that step returned is dropped.
    broken = ~jnp.isfinite(state.reward) | ~(jnp.abs(state.obs) < 1e6).all(axis=-1)
    reward = jnp.where(broken, 0.0, state.reward)
    terminated = (state.done > 0) & ~broken
    truncated = broken | ((steps >= args.episode_length) & ~terminated)
    ended = terminated | truncated

    def reset_ended(first, now):
        if now.shape[:1] != ended.shape:  # warp has arrays that all environments share
            return now
        return jnp.where(ended.reshape(-1, *[1] * (now.ndim - 1)), first, now)

    state = jax.tree.map(reset_ended, envs.first, state)
    envs = Envs(state, envs.first, jnp.where(ended, 0, steps))
    return envs, reward, terminated, truncated, broken


# === Networks =====================================================================================
class RunningStats(NamedTuple):
    count: Array  # of all observations so far
    mean: Array  # (obs_dim,)
    var: Array


def merge_stats(stats: RunningStats, obs: Array) -> RunningStats:
    """Adds observations (steps, N, obs_dim), by the formula of Chan et al. (1979)."""
    size = obs.shape[0] * obs.shape[1]
    mean = obs.mean(axis=1).mean(axis=0)  # one axis at a time, against float32's rounding
    var = jnp.square(obs - mean).mean(axis=1).mean(axis=0)
    share = size / (stats.count + size)
    delta = mean - stats.mean
    # Without the old variance, the std would shrink with every batch, and normalised inputs grow.
    var = stats.var + share * (var - stats.var + (1 - share) * jnp.square(delta))
    return RunningStats(stats.count + size, stats.mean + share * delta, var)


def normalize(stats: RunningStats, obs: Array) -> Array:
    std = jnp.maximum(jnp.sqrt(stats.var), 1e-6)
    return jnp.clip((obs - stats.mean) / std, -10.0, 10.0)


class MLP(nn.Module):
    """SiLU network (..., n) -> (..., sizes[-1]): kernels LeCun-uniform, biases 0."""

    sizes: tuple[int, ...]
    zero_last: bool = False  # the last layer's kernel starts at 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        *batch_shape, width = x.shape
        x = x.reshape(-1, width)  # CPUs copy what has more than one batch axis
        for size in self.sizes[:-1]:
            x = nn.silu(nn.Dense(size, kernel_init=nn.initializers.lecun_uniform())(x))
        last_init = nn.initializers.zeros if self.zero_last else nn.initializers.lecun_uniform()
        last = nn.Dense(self.sizes[-1], kernel_init=last_init, name="last")
        return last(x).reshape(*batch_shape, -1)


def make_network(module: nn.Module, learning_rate: float, key: Array, *inputs: Array) -> Network:
    params = module.init(key, *inputs)
    network = Network.create(apply_fn=module.apply, params=params, tx=optax.adam(learning_rate))
    return network.replace(step=jnp.int32(0))  # not weakly typed, as a checkpoint has it


# --- end shared ---
class Velocity(nn.Module):
    """v(x, tau; s) of the flow: obs normalised, x (..., action_dim), tau (...) in [0, 1]."""

    @nn.compact
    def __call__(self, obs: Array, x: Array, tau: Array) -> Array:
        angles = jnp.broadcast_to(tau, x.shape[:-1])[..., None] * 2.0 ** jnp.arange(4)
        inputs = jnp.concatenate([obs, x, jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return 0.25 * MLP((32, 32, 32, 32, x.shape[-1]))(inputs)


class Agent(NamedTuple):
    actor: Network
    critic: Network
    stats: RunningStats  # of observations


def init_agent(args: Args, env: Any, key: Array) -> Agent:
    keys = jax.random.split(key)
    obs, u, tau = jnp.zeros(env.observation_size), jnp.zeros(env.action_size), jnp.zeros(())
    critic = MLP((256, 256, 256, 256, 256, 1))
    return Agent(
        actor=make_network(Velocity(), args.learning_rate, keys[0], obs, u, tau),
        critic=make_network(critic, args.learning_rate, keys[1], obs),
        stats=RunningStats(jnp.zeros(()), jnp.zeros_like(obs), jnp.ones_like(obs)),
    )


def policy_part(agent: Agent) -> Agent:
    """What a policy file holds: no critic, no state of Adam."""
    return agent._replace(actor=agent.actor.replace(opt_state=None), critic=None)


def flow_loss(actor: Network, params: Any, obs: Array, u: Array, tau: Array, noise: Array) -> Array:
    """Flow-matching loss (..., P) of u at pairs (tau, noise), (..., P, ...); obs normalised.

    The path is x = (1 - tau) u + tau noise, its velocity v = noise - u. FPO compares the noise with
    the one that v implies, x + (1 - tau) v: 1 - tau times the velocity's error. At tau = 1, where
    sampling starts, that is 0 for any network: the sampler's first step is never trained.
    """
    obs = jnp.broadcast_to(obs[..., None, :], (*noise.shape[:-1], obs.shape[-1]))
    x = (1 - tau[..., None]) * u[..., None, :] + tau[..., None] * noise
    implied_noise = x + (1 - tau[..., None]) * actor.apply_fn(params, obs, x, tau)
    return jnp.square(noise - implied_noise).mean(-1)


def act(args: Args, agent: Agent, obs: Array, key: Array, deterministic: Any = False) -> tuple:
    """u (..., action_dim) at raw observations, its pairs tau, noise, and their loss.

    Evaluation, too, starts from random noise.
    """
    obs = normalize(agent.stats, obs)
    start_key, tau_key, noise_key = jax.random.split(key, 3)
    taus = 1 - jnp.arange(args.flow_steps) / args.flow_steps  # where Euler steps start

    def euler_step(x, tau):
        return x - agent.actor.apply_fn(agent.actor.params, obs, x, tau) / args.flow_steps, None

    u_shape = (*obs.shape[:-1], *agent.actor.params["params"]["MLP_0"]["last"]["bias"].shape)
    start = jax.random.normal(start_key, u_shape)
    u, _ = jax.lax.scan(euler_step, start, taus)
    pairs = (*u.shape[:-1], args.samples_per_action)
    tau = jax.random.choice(tau_key, taus, pairs)
    noise = jax.random.normal(noise_key, (*pairs, u.shape[-1]))
    return u, tau, noise, flow_loss(agent.actor, agent.actor.params, obs, u, tau, noise)


# === FPO ==========================================================================================
class Steps(NamedTuple):  # (B / N * T, N, ...), and for the update (B, T, ...)
    obs: Array  # for the update normalised and T + 1 of them
    u: Array
    tau: Array
    noise: Array
    flow_loss: Array
    reward: Array  # the task's; for the update scaled
    terminated: Array
    truncated: Array
    broken: Array


def rollout(args: Args, env: Any, agent: Agent, envs: Envs, key: Array) -> tuple[Envs, Steps]:
    def step(envs, key):
        sample = act(args, agent, envs.state.obs, key)
        next_envs, *outcome = step_envs(args, env, envs, sample[0])
        return next_envs, Steps(envs.state.obs, *sample, *outcome)

    keys = jax.random.split(key, args.steps_per_iteration // args.num_envs)
    return jax.lax.scan(step, envs, keys)


# --- shared: advantages, evaluation ---
def as_unrolls(args: "Args", stats: RunningStats, steps: Any, envs: Envs) -> Any:
    """Steps (B / N * T, N, ...) that led to `envs`, as unrolls (B, T, ...) for the update."""

    def cut(x):
        x = x.reshape(-1, args.unroll_length, *x.shape[1:])
        return x.swapaxes(1, 2).reshape(-1, args.unroll_length, *x.shape[3:])

    # An unroll ends where the next one starts: in a new episode if the old one has ended there,
    # but then nothing is bootstrapped from it.
    starts = steps.obs[args.unroll_length :: args.unroll_length]
    ends = jnp.concatenate([starts, envs.state.obs[None]]).reshape(-1, 1, starts.shape[-1])
    unrolls = jax.tree.map(cut, steps)
    obs = normalize(stats, jnp.concatenate([unrolls.obs, ends], axis=1))
    return unrolls._replace(obs=obs, reward=args.reward_scale * unrolls.reward)


def gae(args: "Args", reward: Array, terminated: Array, truncated: Array, value: Array) -> tuple:
    """Critic targets and advantages (T, B) of unrolls with values (T + 1, B), as Brax has them.

    A terminated step's target is its reward. A truncated step's is its value: it teaches nothing.
    """
    discount = args.gamma * (1.0 - terminated)
    keep = 1.0 - truncated
    delta = keep * (reward + discount * value[1:] - value[:-1])
    decay = keep * discount * args.gae_lambda

    # correction_t = delta_t + decay_t * correction_(t + 1): maps x -> delta + decay * x, composed.
    def compose(later, earlier):
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    correction, _ = jax.lax.associative_scan(compose, (delta, decay), reverse=True)
    target = value[:-1] + correction
    next_target = jnp.concatenate([target[1:], value[-1:]])
    return target, keep * (reward + discount * next_target - value[:-1])


def evaluate(
    args: "Args", env: Any, agent: Any, key: Array, step: Any, deterministic: Any
) -> Array:
    """Undiscounted returns of `eval_envs` episodes, at a step of the training."""
    reset_key, act_key = jax.random.split(jax.random.fold_in(key, step))

    def env_step(carry, key):
        envs, running = carry
        u, *_ = act(args, agent, envs.state.obs, key, deterministic)
        envs, reward, terminated, truncated, _ = step_envs(args, env, envs, u)
        return (envs, running & ~terminated & ~truncated), jnp.where(running, reward, 0.0)

    start = reset_envs(env, args.eval_envs, reset_key), jnp.ones(args.eval_envs, bool)
    _, rewards = jax.lax.scan(env_step, start, jax.random.split(act_key, args.episode_length))
    return rewards.sum(axis=0)


# --- end shared ---
def fpo_loss(params: dict, args: Args, agent: Agent, batch: Steps) -> tuple:
    """PPO's clipped surrogate with FPO's ratio, and the critic's error."""
    # Targets and advantages are those of the critic as it is now, in every minibatch.
    value = agent.critic.apply_fn(params["critic"], batch.obs).squeeze(-1).T
    data = batch.reward.T, batch.terminated.T, batch.truncated.T
    target, advantage = gae(args, *data, jax.lax.stop_gradient(value))
    error = target - value[:-1]
    value_loss = jnp.square(error).mean()
    advantage = ((advantage - advantage.mean()) / (advantage.std() + 1e-8)).T

    pairs = batch.u, batch.tau, batch.noise
    new_loss = flow_loss(agent.actor, params["actor"], batch.obs[:, :-1], *pairs)
    log_ratio = batch.flow_loss - new_loss  # (B, T, samples_per_action)
    metrics = {"flow_loss": new_loss.mean(), "log_ratio_std": log_ratio.std()}
    if args.ratio == "per-action":
        log_ratio = log_ratio.mean(-1)
    else:
        log_ratio = jnp.clip(log_ratio, -3.0, 3.0)
        advantage = advantage[..., None]
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_eps, 1 + args.clip_eps)
    policy_loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean()

    loss = policy_loss + args.vf_coef * value_loss
    metrics |= {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss}
    metrics |= {"explained_variance": 1 - error.var() / target.var()}
    metrics |= {"approx_kl": (ratio - 1 - log_ratio).mean()}
    metrics |= {"clip_fraction": (ratio != clipped_ratio).mean()}
    return loss, metrics


def update(args: Args, agent: Agent, unrolls: Steps, key: Array) -> tuple:
    """`update_epochs` passes over the unrolls, in new minibatches of whole unrolls each time."""

    def minibatch_step(agent, rows):
        batch = jax.tree.map(lambda x: x[rows], unrolls)
        params = {"actor": agent.actor.params, "critic": agent.critic.params}
        grads, metrics = jax.grad(fpo_loss, has_aux=True)(params, args, agent, batch)
        metrics["grad_norm_actor"] = optax.tree.norm(grads["actor"])
        metrics["grad_norm_critic"] = optax.tree.norm(grads["critic"])
        actor = agent.actor.apply_gradients(grads=grads["actor"])
        critic = agent.critic.apply_gradients(grads=grads["critic"])
        return agent._replace(actor=actor, critic=critic), metrics

    keys = jax.random.split(key, args.update_epochs)
    rows = jax.vmap(lambda key: jax.random.permutation(key, len(unrolls.reward)))(keys)
    agent, metrics = jax.lax.scan(minibatch_step, agent, rows.reshape(-1, args.batch_size))
    return agent, jax.tree.map(jnp.mean, metrics)


class State(NamedTuple):  # all that changes in the training of a seed
    agent: Agent
    envs: Envs
    key: Array


def init_state(args: Args, env: Any, key: Array) -> State:
    """Untrained networks, and environments that have just been reset."""
    agent_key, reset_key, key = jax.random.split(key, 3)
    agent = init_agent(args, env, agent_key)
    return State(agent, reset_envs(env, args.num_envs, reset_key), key)


def iteration(args: Args, env: Any, state: State) -> tuple[State, dict]:
    """Rollout and PPO update of one seed, and metrics."""
    key, rollout_key, update_key = jax.random.split(state.key, 3)
    envs, steps = rollout(args, env, state.agent, state.envs, rollout_key)
    unrolls = as_unrolls(args, state.agent.stats, steps, envs)
    agent, metrics = update(args, state.agent, unrolls, update_key)
    # Not before: rollout and update see the same statistics, so that ratios start at 1.
    agent = agent._replace(stats=merge_stats(agent.stats, steps.obs))
    metrics |= {"reward_mean": steps.reward.mean(), "nan_resets": steps.broken.sum()}
    metrics |= {"u_std": steps.u.std(), "u_beyond_5": (jnp.abs(steps.u) > 5).mean()}
    return State(agent, envs, key), metrics


# === Files ========================================================================================
# --- shared: files, seeds ---
def log(args: "Args", run_dir: Path, table: str, **columns: Any) -> None:
    """Appends a row a seed to RUN_DIR/<table>.csv; columns are numbers, or arrays (K,)."""
    with (run_dir / f"{table}.csv").open("a") as file:
        if file.tell() == 0:
            print("seed", *columns, sep=",", file=file)
        for i in range(args.num_seeds):
            row = {name: np.broadcast_to(x, args.num_seeds)[i] for name, x in columns.items()}
            print(args.seed + i, *row.values(), sep=",", file=file)
            if args.track:
                import wandb

                wandb.log({f"{table}/seed_{args.seed + i}": row})


def save_arrays(args: "Args", path: Path, tree: Any, **meta: Any) -> None:
    """A tree's leaves and `meta` in an .npz file, which has checksums; never half of it."""
    meta["run"] = [Path(__file__).name, args.env_id, args.seed, args.num_seeds]
    unfinished = path.with_name("unfinished.tmp")
    with unfinished.open("wb") as file:
        np.savez(file, *jax.device_get(jax.tree.leaves(tree)), meta=json.dumps(meta))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_arrays(args: "Args", path: Path, like: Any) -> tuple[Any, dict]:
    """Tree and meta of a file; OSError unless it is this run's and has the shapes of `like`."""
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        leaves = [file[f"arr_{i}"] for i in range(len(file.files) - 1)]
    run = [Path(__file__).name, args.env_id, args.seed, args.num_seeds]
    shapes = [x.shape for x in jax.tree.leaves(like)]
    if meta["run"] != run or [x.shape for x in leaves] != shapes:
        raise OSError(f"{path} is of {meta['run']}, or has arrays of other sizes")
    return jax.tree.unflatten(jax.tree.structure(like), leaves), meta


def save_checkpoint(args: "Args", run_dir: Path, state: Any, **progress: Any) -> None:
    """All that the rest of a run depends on, and how long its logs are; the newest two are kept."""
    logs = {path.name: path.stat().st_size for path in run_dir.glob("*.csv")}
    path = run_dir / f"checkpoints/state_{progress['done']:09}_{progress['stage']:02}.npz"
    save_arrays(args, path, state, logs=logs, **progress)
    for old in sorted(path.parent.glob("state_*.npz"))[:-2]:
        old.unlink()


def load_checkpoint(args: "Args", run_dir: Path, like: Any) -> tuple[Any, dict]:
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
    # The first checkpoint is older than the first row of train.csv.
    lost = state is None and (bad or (run_dir / "train.csv").exists())
    require(not lost, "resume", run_dir, "a run with a good checkpoint")
    for path in bad:
        path.replace(path.with_suffix(".bad"))
    for path in [run_dir / f"{table}.csv" for table in ("eval", "train", "decoder", "refine")]:
        if path.exists():
            os.truncate(path, progress["logs"].get(path.name, 0))
    return state, progress


def make_run_dir(args: "Args", device: str) -> Path:
    """Creates RUNS_DIR/<env-id>__<exp-name>__<seed>__<unix time>/ with args.json in it."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {"script": Path(__file__).name, "git_commit": commit or None}
    versions |= {"device": device, "python": sys.version.split()[0]}
    versions |= {package.name: package.version for package in metadata.distributions()}
    run_dir = Path(args.runs_dir) / name
    try:
        (run_dir / "checkpoints").mkdir(parents=True)
        stored = json.dumps(asdict(args) | {"versions": versions}, indent=1)
        (run_dir / "args.json").write_text(stored)
    except OSError as error:
        require(False, "runs_dir", f"{args.runs_dir} ({error})", "a folder to write to")
    return run_dir


def load_args(run_dir: str | Path) -> "Args":
    stored = json.loads((Path(run_dir) / "args.json").read_text())
    if stored.pop("versions")["script"] != Path(__file__).name:
        raise ValueError("it is another script's")
    return Args(**{k: tuple(x) if isinstance(x, list) else x for k, x in stored.items()})


def load_agents(args: "Args", env: Any, path: str | Path) -> Any:
    """All seeds' agents (K, ...), as far as acting needs them, from a policy file."""
    init = jax.vmap(lambda key: policy_part(init_agent(args, env, key)))
    keys = jax.ShapeDtypeStruct((args.num_seeds, 2), np.uint32)
    return load_arrays(args, Path(path), like=jax.eval_shape(init, keys))[0]


def load_policy(run_dir: str | Path, step: int | None = None, seed: int | None = None) -> Callable:
    """A saved policy (obs, key, deterministic=False) -> u, by default the first seed's last one.

    Observations are raw, (..., obs_dim); the action is tanh(u). An error if there is no such one.
    """
    args = load_args(run_dir)
    files = {int(p.stem[7:]): p for p in Path(run_dir).glob("checkpoints/policy_*.npz")}
    agents = load_agents(args, make_env(args), files[max(files) if step is None else step])
    seeds = range(args.seed, args.seed + args.num_seeds)
    index = 0 if seed is None else seeds.index(seed)
    agent = jax.tree.map(lambda x: x[index], agents)
    return jax.jit(
        lambda obs, key, deterministic=False: act(args, agent, obs, key, deterministic)[0]
    )


def over_seeds(args: "Args", f: Callable, in_axes: tuple, **options: Any) -> Callable:
    """Compiles f for all seeds: `vmap`, and on as many local devices as can share them evenly."""
    counts = range(1, jax.local_device_count() + 1)
    num_devices = max(count for count in counts if args.num_seeds % count == 0)
    mesh = Mesh(np.array(jax.local_devices()[:num_devices]), ("seeds",))
    specs = tuple(P() if axis is None else P("seeds") for axis in in_axes)
    mapped = jax.vmap(f, in_axes)
    mapped = jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=P("seeds"), check_vma=False)
    return jax.jit(mapped, **options)


# --- end shared ---
# === Training =====================================================================================
def train(args: Args, env: Any, run_dir: Path) -> None:
    """All iterations, from the newest checkpoint on."""
    init = over_seeds(args, partial(init_state, args, env), (0,))
    iterate = over_seeds(args, partial(iteration, args, env), (0,), donate_argnums=0)
    evaluate_seeds = over_seeds(args, partial(evaluate, args, env), (0, 0, None, None))
    on_devices = over_seeds(args, lambda state: state, (0,))  # arrays from files are on the host
    fold_in = jax.vmap(jax.random.fold_in, (0, None))
    keys = jax.vmap(jax.random.PRNGKey)(np.arange(args.num_seeds) + args.seed)
    init_keys, eval_keys = (fold_in(keys, purpose) for purpose in range(2))

    state, progress = load_checkpoint(args, run_dir, like=jax.eval_shape(init, init_keys))
    done = progress["done"]  # iterations
    size = args.steps_per_iteration
    start_time = time.time() - progress["wall_time"]
    save_time = time.time()
    last = args.policy_iterations[-1]
    all_seeds = args.num_seeds * size  # steps of an iteration
    counts = {"total": last * all_seeds, "initial": done * all_seeds}
    bar = tqdm(**counts, desc="compiling", unit=" steps", unit_scale=True, file=sys.stdout)
    stop_signals = []  # SIGTERM, which schedulers send
    signal.signal(signal.SIGTERM, lambda number, frame: stop_signals.append(number))

    def log_returns():
        r = np.asarray(evaluate_seeds(state.agent, eval_keys, done * size, True))  # (K, eval_envs)
        row = {"return_mean": r.mean(1), "return_std": r.std(1), "return_min": r.min(1)}
        row |= {"return_max": r.max(1), "wall_time": time.time() - start_time}
        log(args, run_dir, "eval", step=done * size, stage=0, **row)
        bar.write(f"step {done * size:,}: return {r.mean(1).round(1)}")
        bar.set_postfix_str(f"return {r.mean():.1f}")

    def save():
        wall_time = time.time() - start_time
        save_checkpoint(args, run_dir, state, done=done, stage=0, wall_time=wall_time)
        return time.time()

    if state is None:
        state = init(init_keys)
        log_returns()
        save_time = save()
    else:
        state = on_devices(state)
    while done < last:
        start = time.time()
        state, metrics = iterate(state)
        metrics = jax.device_get(metrics)
        sps = all_seeds / (time.time() - start)
        done += 1
        log(args, run_dir, "train", step=done * size, stage=0, sps=sps, **metrics)
        bar.set_description("training")
        bar.update(all_seeds)
        norms = metrics["grad_norm_actor"] + metrics["grad_norm_critic"]
        if not np.isfinite(metrics["loss"] + norms).all():
            raise FloatingPointError(f"iteration {done}: loss or gradient is not finite")

        if done == last or done * size % args.eval_every < size:
            log_returns()
        if done in args.policy_iterations:
            path = run_dir / f"checkpoints/policy_{done * size}.npz"
            save_arrays(args, path, policy_part(state.agent))
        late = time.time() - save_time > 60 * args.checkpoint_minutes
        if done in args.policy_iterations or late or stop_signals:
            save_time = save()
        if stop_signals:
            raise SystemExit(128 + signal.SIGTERM)
    bar.close()


def parse_args() -> Args:
    """The command line's arguments, over those of the preset or of the run that is resumed."""
    args, _ = parse_common()
    args.check()
    return args


# --- shared: command line ---
def parse_common() -> tuple["Args", set[str]]:
    args = tyro.cli(Args)
    given = {word.split("=")[0].replace("_", "-") for word in sys.argv[1:] if word[:2] == "--"}
    default = replace(Args(preset=args.preset), **CPU_PRESET if args.preset == "cpu" else {})
    if args.resume is not None:
        tracking = {"--track", "--no-track", "--wandb-project-name", "--wandb-entity"}
        others = given - tracking - {"--resume"}
        require(not others, "resume", " ".join(others), "only arguments of tracking beside it")
        try:
            default = replace(load_args(args.resume), resume=args.resume)
        except Exception as error:
            require(False, "resume", f"{args.resume} ({error})", f"a run of {Path(__file__).name}")
    return tyro.cli(Args, default=default), given


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
        try:
            import wandb

            run = wandb.init(id=run_dir.name, resume="allow", config=asdict(args), **about)
        except Exception as error:
            takes = "the package wandb and a login (wandb login), or WANDB_MODE=offline"
            require(False, "track", f"True ({error})", takes)
        offline = f"offline; to upload: wandb sync {Path(run.dir).parent}"
        print(f"W&B: {offline if run.offline else run.url}")
    try:
        train(args, env, run_dir)
    except (OSError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
        newest = max(run_dir.glob("checkpoints/state_*.npz"), default="none")
        reason = (str(error) or repr(error)).splitlines()[0]
        print(f"{sys.argv[0]}: {reason}; newest: {newest}; resume: {resume}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"Finished: {run_dir}\nCurve: python -m plotting.figure_4 --runs {run_dir}")
    print(f"Film: python -m plotting.video {run_dir}")
    print(f"More episodes: python -m plotting.evaluate {run_dir}")


if __name__ == "__main__":
    main()
# --- end shared ---
