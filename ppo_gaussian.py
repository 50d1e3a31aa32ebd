"""Gaussian PPO, the baseline of GoRL, laid out as in Brax.

Schulman et al., "Proximal Policy Optimization Algorithms" (2017), in the pipeline of Zhang et al.,
"GoRL: An Algorithm-Agnostic Framework for Online Reinforcement Learning with Generative Policies"
(2025). Sections, equations and appendices cited below are the latter's.

1. The actor is a diagonal Gaussian over u; the environment receives the action tanh(u) (App. E.3).
2. 183 iterations: 16 unrolls of 30 steps in each of 2048 environments, then 16 epochs over them.
3. Targets and advantages (GAE) are recomputed with the current critic in every minibatch.
4. The actor follows the clipped likelihood ratio (section 2.1), with a bonus for entropy.

    python ppo_gaussian.py --env-id HopperStand --seed 1

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
    learning_rate: float = 1e-3  # Adam's, for actor and critic
    gamma: float = 0.995  # discount
    gae_lambda: float = 0.95
    reward_scale: float = 10.0  # factor on the rewards that the critic sees
    vf_coef: float = 0.25  # weight of the critic's squared error
    ent_coef: float = 0.01  # weight of the policy's entropy
    clip_eps: float = 0.3  # clip range of the ratio (the public GoRL code: 0.1)

    @property
    def steps_per_iteration(self) -> int:
        return self.batch_size * self.num_minibatches * self.unroll_length

    @property
    def policy_iterations(self) -> list[int]:
        """Iterations done when policies are saved, where GoRL's stages end; the last is the end."""
        size = self.steps_per_iteration
        ends = [self.total_timesteps * sixths // 6 for sixths in (2, 4, 5, 6)]
        return [(2 * steps + size) // (2 * size) for steps in ends]

    def checked(self, given: set[str]) -> "Args":
        """The arguments; ends the program if they cannot be right."""
        check_common(self)
        allowed = f"at least one iteration, {self.steps_per_iteration} steps"
        require(self.policy_iterations[-1] > 0, self, "total_timesteps", allowed)
        return self


CPU_PRESET = dict(env_id="CheetahRun", total_timesteps=1_200_000, eval_every=200_000, num_envs=128)
CPU_PRESET |= dict(batch_size=32, num_minibatches=16, update_epochs=8)


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
class Actor(nn.Module):
    """Mean and std (..., action_dim) of pi(u | s) at normalised observations (App. E.3)."""

    action_dim: int

    @nn.compact
    def __call__(self, obs: Array) -> tuple[Array, Array]:
        out = MLP((32, 32, 32, 32, 2 * self.action_dim))(obs)
        mean, raw_std = jnp.split(out, 2, axis=-1)
        return mean, jnp.clip(nn.softplus(raw_std), 1e-3, 10.0)


class Agent(NamedTuple):
    actor: Network
    critic: Network
    stats: running_statistics.RunningStatisticsState  # of observations


def init_agent(args: Args, env: Any, key: Array) -> Agent:
    keys = jax.random.split(key)
    obs = jnp.zeros(env.observation_size)
    return Agent(
        actor=make_network(Actor(env.action_size), args.learning_rate, keys[0], obs),
        critic=make_network(MLP((256, 256, 256, 256, 256, 1)), args.learning_rate, keys[1], obs),
        stats=running_statistics.init_state(obs),
    )


def policy_part(agent: Agent) -> Agent:
    """What a policy file holds: no critic, no state of Adam."""
    return agent._replace(actor=agent.actor.replace(opt_state=None), critic=None)


def log_prob_of_action(u: Array, mean: Array, std: Array) -> Array:
    """Log-density of the action tanh(u), for u (..., action_dim) from N(mean, std^2)."""
    log_det = 2.0 * (np.log(2.0) - u - nn.softplus(-2.0 * u))  # log(1 - tanh(u)^2)
    return (norm.logpdf(u, mean, std) - log_det).sum(-1)


def act(args: Args, agent: Agent, obs: Array, key: Array, deterministic: Any = False) -> tuple:
    """u (..., action_dim) at raw observations, and log pi(tanh(u) | s)."""
    mean, std = agent.actor.apply_fn(agent.actor.params, normalize(obs, agent.stats))
    u = mean + std * jnp.where(deterministic, 0.0, jax.random.normal(key, mean.shape))
    return u, log_prob_of_action(u, mean, std)


# === PPO ==========================================================================================
class Steps(NamedTuple):  # (S, N, ...), and for the update (B, T, ...)
    obs: Array  # for the update normalised and T + 1 of them
    u: Array
    log_prob: Array
    reward: Array  # the task's; for the update scaled
    terminated: Array
    truncated: Array
    broken: Array


def rollout(args: Args, env: Any, agent: Agent, envs: Envs, key: Array) -> tuple:
    """Next environments, steps (S, N, ...), and those as unrolls (B, T, ...) for the update."""
    T = args.unroll_length

    def step(envs, key):
        u, log_prob = act(args, agent, envs.state.obs, key)
        next_envs, *outcome = step_envs(args, env, envs, u)
        return next_envs, Steps(envs.state.obs, u, log_prob, *outcome)

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
def ppo_loss(params: dict, args: Args, agent: Agent, batch: Steps, key: Array) -> tuple:
    """Clipped surrogate (section 2.1), entropy bonus, critic error."""
    # Targets and advantages are those of the critic as it is now, in every minibatch.
    value = agent.critic.apply_fn(params["critic"], batch.obs).squeeze(-1)
    target, advantage = gae(args, batch, jax.lax.stop_gradient(value))
    value_loss = jnp.square(target - value[:, :-1]).mean()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)

    mean, std = agent.actor.apply_fn(params["actor"], batch.obs[:, :-1])
    log_ratio = log_prob_of_action(batch.u, mean, std) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    clipped_ratio = jnp.clip(ratio, 1 - args.clip_eps, 1 + args.clip_eps)
    policy_loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean()

    fresh_u = mean + std * jax.random.normal(key, mean.shape)
    entropy = -log_prob_of_action(fresh_u, mean, std).mean()

    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    metrics = {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss}
    metrics |= {"entropy": entropy, "log_std": jnp.log(std).mean()}
    metrics |= {"approx_kl": (ratio - 1 - log_ratio).mean()}
    metrics |= {"clip_fraction": (ratio != clipped_ratio).mean()}
    return loss, metrics


def update(args: Args, agent: Agent, unrolls: Steps, key: Array) -> tuple:
    """`update_epochs` passes over the unrolls, in new minibatches of whole unrolls each time."""

    def minibatch_step(agent, rows):
        key = jax.random.fold_in(loss_key, agent.actor.step)
        batch = jax.tree.map(lambda x: x[rows], unrolls)
        params = {"actor": agent.actor.params, "critic": agent.critic.params}
        grads, metrics = jax.grad(ppo_loss, has_aux=True)(params, args, agent, batch, key)
        metrics["grad_norm_actor"] = optax.tree.norm(grads["actor"])
        metrics["grad_norm_critic"] = optax.tree.norm(grads["critic"])
        actor = agent.actor.apply_gradients(grads=grads["actor"])
        critic = agent.critic.apply_gradients(grads=grads["critic"])
        return agent._replace(actor=actor, critic=critic), metrics

    rows_key, loss_key = jax.random.split(key)
    keys = jax.random.split(rows_key, args.update_epochs)
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
    state = State(agent, reset_envs(env, args.num_envs, reset_key), key)
    # Weak types would be gone after the first iteration, and everything be compiled again.
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), state)


def iteration(args: Args, env: Any, state: State) -> tuple[State, dict]:
    """Rollout and PPO update of one seed, and metrics."""
    key, rollout_key, update_key = jax.random.split(state.key, 3)
    envs, steps, unrolls = rollout(args, env, state.agent, state.envs, rollout_key)
    agent, metrics = update(args, state.agent, unrolls, update_key)
    # Not before: rollout and update see the same statistics, so that ratios start at 1.
    agent = agent._replace(stats=running_statistics.update(agent.stats, steps.obs))
    metrics |= {"reward_mean": steps.reward.mean(), "nan_resets": steps.broken.sum()}
    metrics |= {"u_std": steps.u.std(), "u_beyond_5": (jnp.abs(steps.u) > 5).mean()}
    return State(agent, envs, key), metrics


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
    """All iterations, from the newest checkpoint on."""
    init = over_seeds(args, partial(init_state, args, env), (0,))
    iterate = over_seeds(args, partial(iteration, args, env), (0,), donate_argnums=0)
    evaluate_seeds = over_seeds(args, partial(evaluate, args, env), (0, 0, None))
    fold_in = jax.vmap(jax.random.fold_in, (0, None))
    keys = jax.vmap(jax.random.PRNGKey)(np.arange(args.num_seeds) + args.seed)
    init_keys, eval_keys = (fold_in(keys, purpose) for purpose in range(2))

    state, progress = load_checkpoint(args, run_dir, like=jax.eval_shape(init, init_keys))
    done = progress["done"]  # iterations
    size = args.steps_per_iteration
    start_time = time.time() - progress["wall_time"]
    save_time = time.time()
    last = args.policy_iterations[-1]
    bar = tqdm(total=last, initial=done, desc="compiling", file=sys.stdout)
    stop_signals = []  # SIGTERM, which schedulers send
    signal.signal(signal.SIGTERM, lambda number, frame: stop_signals.append(number))

    def log_returns():
        r = jax.device_get(evaluate_seeds(state.agent, fold_in(eval_keys, done), True))
        row = {"return_mean": r.mean(1), "return_std": r.std(1), "return_min": r.min(1)}
        row |= {"return_max": r.max(1), "wall_time": time.time() - start_time}
        log(args, run_dir, "eval", step=done * size, stage=0, **row)
        bar.write(f"step {done * size:,}: return {r.mean(1).round(1)}")
        bar.set_postfix_str(f"return {r.mean():.1f}")

    if state is None:
        state = init(init_keys)
        log_returns()
        save_time = save_checkpoint(args, run_dir, state, done, 0, start_time)
    state = over_seeds(args, lambda state: state, (0,))(state)  # files leave it on the host
    while done < last:
        start = time.time()
        state, metrics = iterate(state)
        metrics = jax.device_get(metrics)
        sps = args.num_seeds * size / (time.time() - start)
        done += 1
        log(args, run_dir, "train", step=done * size, stage=0, sps=sps, **metrics)
        bar.set_description(f"training, {sps:,.0f} steps/s")
        bar.update()
        norms = metrics["grad_norm_actor"] + metrics["grad_norm_critic"]
        if not np.isfinite(metrics["loss"] + norms).all():
            raise FloatingPointError(f"iteration {done}: loss or gradient is not finite")

        if done == last or done * size % args.eval_every < size:  # past a multiple of it
            log_returns()
        if done in args.policy_iterations:
            path = run_dir / f"checkpoints/policy_{done * size}.npz"
            save_arrays(args, path, policy_part(state.agent))
        late = time.time() - save_time > 60 * args.checkpoint_minutes
        if done in args.policy_iterations or late or stop_signals:
            save_time = save_checkpoint(args, run_dir, state, done, 0, start_time)
            if stop_signals:
                raise SystemExit(128 + signal.SIGTERM)
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
