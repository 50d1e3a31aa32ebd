"""Figure 1: where two actions are equally good, which of them does a method find?

    python -m plotting.figure_1 --out figures

A task with one state, one action and a reward with two equal peaks. The first panel is the paper's
statement, computed: the best policy of a temperature above 0 has two peaks; the Gaussian closest to
it (maximum likelihood) covers both and the gap between them; the flow that GoRL's decoder training
(gorl_fm_ppo.py's `decoder_epoch`) makes of the same samples does not. The others are where
reinforcement learning itself arrives: each script, trained on the reward.
"""

import contextlib
import io
import json
import signal
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from plotting import runs, style
from plotting.figure_7 import dip, kernel_density

PEAK = 1.2  # u of the reward's two peaks, but for the sign
WIDTH = 0.5  # of a peak
TEMPERATURE = 0.2  # of the best policy
# What a panel shows: a script and what is told apart of its settings.
METHODS = {
    "PPO": ("ppo_gaussian", {}),
    "FPO": ("fpo", {}),
    "DPPO": ("dppo", {}),
    "GoRL(FM), plain data": ("gorl_fm_ppo", {"advantage_temperature": 0.0}),
    "GoRL(FM), high-reward data": ("gorl_fm_ppo", {"advantage_temperature": 0.5}),
}
DECODER = {"decoder_epochs": 10, "decoder_batch_size": 256, "decoder_learning_rate": 3e-3}
SIZES = {"num_envs": 512, "unroll_length": 2, "batch_size": 256, "num_minibatches": 4}
SIZES |= {"update_epochs": 2, "eval_envs": 1, "episode_length": 100}


def reward(u: Any) -> Any:
    """Two equal peaks of height 1 in u."""
    import jax.numpy as jnp

    return jnp.exp(-0.5 * jnp.square((jnp.abs(u) - PEAK) / WIDTH))


def best_policy(x: np.ndarray) -> np.ndarray:
    """Density (m,) on an even grid x (m,): exp(reward / temperature), normalised, on |u| <= 4."""
    density = np.exp(np.asarray(reward(x), float) / TEMPERATURE) * (np.abs(x) <= 4)
    return density / (density.sum() * (x[1] - x[0]))


def two_peaks() -> Any:
    """The task, with what the scripts use of Playground's interface."""
    import jax
    import jax.numpy as jnp
    from flax import struct

    @struct.dataclass
    class State:
        data: Any
        obs: jax.Array
        reward: jax.Array
        done: jax.Array

    class TwoPeaks:
        observation_size, action_size = 1, 1

        def reset(self, key: jax.Array) -> State:
            return State(jnp.zeros(1), jnp.zeros(1), jnp.zeros(()), jnp.zeros(()))

        def step(self, state: State, action: jax.Array) -> State:
            u = jnp.arctanh(jnp.clip(action[0], -0.999999, 0.999999))
            return state.replace(reward=reward(u))

    return TwoPeaks()


def fitted_flow(samples: np.ndarray, draws: int) -> np.ndarray:
    """u (draws,) of a flow that gorl_fm_ppo.py's decoder training makes of samples (n,)."""
    import jax
    import jax.numpy as jnp

    script = runs.script_of("gorl_fm_ppo")
    plain = {"advantage_temperature": 0.0, "decoder_buffer_size": len(samples)}
    args = replace(script.Args(), **DECODER | plain)
    key = jax.random.PRNGKey(0)
    agent = script.init_agent(args, two_peaks(), key)
    u = jnp.asarray(samples, jnp.float32)[:, None]
    none = jnp.zeros(len(u))
    pairs = script.Pairs(obs=jnp.zeros_like(u), u=u, reward=none, advantage=none)
    epoch = jax.jit(partial(script.decoder_epoch, args))
    decoder = agent.decoder
    for i in range(args.decoder_epochs):
        decoder, *_ = epoch(decoder, agent, pairs, key, i)
    agent = agent._replace(decoder=decoder)
    latent = jax.random.normal(jax.random.PRNGKey(1), (draws, 1))
    return np.asarray(script.decode(args, agent, jnp.zeros((draws, 1)), latent))[:, 0]


def trained(
    script: ModuleType, settings: dict[str, Any], iterations: int, seeds: int, draws: int
) -> np.ndarray:
    """u (seeds, draws) of a script's stochastic policies after training on the task."""
    import jax

    steps = iterations * SIZES["batch_size"] * SIZES["num_minibatches"] * SIZES["unroll_length"]
    # The next state is always the same one: what counts is this step's reward.
    changes = SIZES | {"num_seeds": seeds, "total_timesteps": steps, "eval_every": steps}
    changes |= {"gamma": 0.0} | settings
    if hasattr(script, "decode"):
        stages = {"stage_timesteps": tuple(runs.default_stages(steps))}
        changes |= stages | DECODER | {"decoder_buffer_size": 16_384}
    before = script.make_env, signal.getsignal(signal.SIGTERM)
    script.make_env = lambda args: two_peaks()  # for load_policy
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            args = replace(script.Args(), **changes, runs_dir=folder)
            run_dir = script.make_run_dir(args, "this one")
            script.train(args, two_peaks(), run_dir)
            each = [script.load_policy(run_dir, seed=args.seed + i) for i in range(seeds)]
            obs = np.zeros((draws, 1), np.float32)
            return np.stack([policy(obs, jax.random.PRNGKey(0))[:, 0] for policy in each])
    finally:
        script.make_env = before[0]
        signal.signal(signal.SIGTERM, before[1])  # that of `train` would go on holding it up


def draw(
    options: runs.Options, iterations: int = 96, seeds: int = 3, draws: int = 10_000
) -> list[Path]:
    """Trains and draws Figure 1 (minutes on a CPU); numbers go to figure_1.json. Reads no logs.

    Args:
        iterations: Training iterations of each method, of 2048 steps each.
        seeds: A line each.
        draws: Actions that each density is made of.
    """
    if min(iterations, seeds) < 1 or draws < 100 or iterations % 6:
        got = f"{iterations}, {seeds}, {draws}"
        takes = "a multiple of 6, at least 1, at least 100"
        runs.wrong("--iterations, --seeds, --draws", got, takes)
    # Before JAX is imported: they tell it where compiled programs are kept.
    scripts = {method: runs.script_of(method) for method, _ in METHODS.values()}
    x = np.linspace(-4, 4, 801)
    best = best_policy(x)
    samples = np.random.default_rng(0).choice(x, 16_384, p=best / best.sum())
    flow = fitted_flow(samples, draws)
    gaussian = np.random.default_rng(1).normal(samples.mean(), samples.std(), draws)
    figure, panels = style.panels(1 + len(METHODS), height=1.3)
    among = {"mean_reward": np.asarray(reward(x)), "between_peaks": np.abs(x) < PEAK / 2}
    of_best = {name: float((best * f).sum() * (x[1] - x[0])) for name, f in among.items()}
    record: dict[str, Any] = {
        "reward_peaks": [-PEAK, PEAK],
        "reward_width": WIDTH,
        "temperature": TEMPERATURE,
        "best policy": of_best,
    }

    def add(panel: Any, method: str, name: str, u: np.ndarray, label: str | None = None) -> None:
        density = kernel_density(u, x)
        got = {
            "mean_reward": float(np.mean(reward(u))),
            "between_peaks": float((np.abs(u) < PEAK / 2).mean()),
            "dip": dip(density),
            "mean": float(u.mean()),
            "std": float(u.std()),
        }
        record.setdefault(name, []).append(got)
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in got.items()))
        look = style.method_line(method) | {"linewidth": 1.1, "label": label}
        panel.plot(x, density / density.max(), **look)

    shade = {"alpha": 0.35, "linewidth": 0}
    first, *others = panels
    name = f"best policy at temperature {TEMPERATURE}"
    first.fill_between(x, best / best.max(), color="#56B4E9", label=name, **shade)
    for method, name, u in (
        ("ppo_gaussian", "Gaussian closest to it", gaussian),
        ("gorl_fm_ppo", "GoRL(FM)'s decoder trained on it", flow),
    ):
        add(first, method, name, u, label=name)
    first.set_title("fitted to the best policy's actions")
    for panel, (name, (method, settings)) in zip(others, METHODS.items(), strict=True):
        first_panel = panel is others[0]
        label = "reward" if first_panel else None
        panel.fill_between(x, np.asarray(reward(x)), color="#CC79A7", label=label, **shade)
        for u in trained(scripts[method], settings, iterations, seeds, draws):
            add(panel, method, name, u)
        mean = np.mean([seed["mean_reward"] for seed in record[name]])
        panel.set_title(f"{name}: {mean:.2f}")
    for panel in panels:
        panel.set(xlabel="u", ylabel="", xlim=(-4, 4), ylim=(0, None), yticks=[])
        panel.grid(visible=False)
    text = "Densities of u, scaled to a top of 1. One state, one action, a reward with two equal "
    text += f"peaks of 1. Each method's title has its mean reward over {seeds} seeds, a line each."
    style.finish(figure, panels, text, columns=2)
    files = style.save(figure, options.out, "figure_1")
    (file := options.out / "figure_1.json").write_text(json.dumps(record, indent=1))
    return [*files, file]


if __name__ == "__main__":
    sys.exit(runs.command(draw))
