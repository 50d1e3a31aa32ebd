"""Brax's own PPO with the hyperparameters of `ppo_gaussian.py --preset cpu`, to compare learning
curves.

    python benchmark/brax_ppo.py --runs-dir results/brax_ppo_cheetah_run --seeds 1 2 3

Brax 0.14.2's `train` calls `jax.device_put_replicated`, which JAX 0.10 no longer has: it needs an
environment of its own, `pip install jax==0.9.2 brax==0.14.2 playground==0.2.0 mujoco==3.17.0
mujoco-mjx==3.17.0 warp-lang==1.19.0 tyro`.

A run writes `<runs-dir>/seed_<seed>/eval.csv` with the columns of the scripts, and `args.json`.
"""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import tyro
from brax.training.agents.ppo import networks, train
from mujoco_playground import dm_control_suite, wrapper

HEADER = "seed,step,stage,return_mean,return_std,return_min,return_max,wall_time\n"


@dataclass(frozen=True)
class Args:
    """Brax's PPO on CheetahRun."""

    runs_dir: str  # where seed_<seed>/ are made
    seeds: tuple[int, ...] = (1, 2, 3)  # one run each, one after the other
    env_id: str = "CheetahRun"
    total_timesteps: int = 1_198_080  # 78 iterations, which is what 1.2M steps round to
    evaluations: int = 6  # besides the one at step 0
    num_envs: int = 128
    unroll_length: int = 30
    batch_size: int = 32
    num_minibatches: int = 16
    update_epochs: int = 8
    learning_rate: float = 1e-3
    gamma: float = 0.995
    gae_lambda: float = 0.95
    reward_scale: float = 10.0
    vf_coef: float = 0.25  # Brax halves its own coefficient once more
    ent_coef: float = 0.01
    clip_eps: float = 0.3
    episode_length: int = 1000
    eval_envs: int = 128


def progress(
    write: Callable[[str], object], seed: int, start: float, step: int, metrics: dict
) -> None:
    """One row of eval.csv. Brax reports mean and standard deviation only."""
    mean, std = (float(metrics[f"eval/episode_reward{suffix}"]) for suffix in ("", "_std"))
    write(f"{seed},{step},0,{mean:.7g},{std:.7g},nan,nan,{time.time() - start:.7g}\n")
    sps = metrics.get("training/sps", 0.0)  # since the evaluation before, compilation included
    print(
        f"seed {seed}, step {step:,}: return {mean:.1f} +- {std:.1f}; steps/s: {sps:.1f}",
        flush=True,
    )


def main() -> None:
    args = tyro.cli(Args)
    failed, commit = subprocess.getstatusoutput(
        f'git -C "{Path(__file__).parent}" describe --always --dirty'
    )
    versions = {
        name: version(name) for name in ("jax", "brax", "playground", "mujoco", "mujoco-mjx")
    }
    versions |= {"script": Path(__file__).name, "git_commit": None if failed else commit}
    versions["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    config = dm_control_suite.get_default_config(args.env_id)
    config.impl = "jax"
    env = dm_control_suite.load(args.env_id, config=config)
    for seed in args.seeds:
        run_dir = Path(args.runs_dir) / f"seed_{seed}"
        run_dir.mkdir(parents=True)
        about = asdict(args) | {"seed": seed, "versions": versions}
        (run_dir / "args.json").write_text(json.dumps(about, indent=1) + "\n")
        with (run_dir / "eval.csv").open("w", buffering=1) as file:
            file.write(HEADER)
            train.train(
                env,
                num_timesteps=args.total_timesteps,
                num_envs=args.num_envs,
                episode_length=args.episode_length,
                wrap_env_fn=wrapper.wrap_for_brax_training,
                learning_rate=args.learning_rate,
                entropy_cost=args.ent_coef,
                discounting=args.gamma,
                unroll_length=args.unroll_length,
                batch_size=args.batch_size,
                num_minibatches=args.num_minibatches,
                num_updates_per_batch=args.update_epochs,
                normalize_observations=True,
                reward_scaling=args.reward_scale,
                clipping_epsilon=args.clip_eps,
                gae_lambda=args.gae_lambda,
                vf_loss_coefficient=2 * args.vf_coef,
                network_factory=networks.make_ppo_networks,
                seed=seed,
                num_evals=args.evaluations + 1,
                num_eval_envs=args.eval_envs,
                deterministic_eval=True,
                progress_fn=partial(progress, file.write, seed, time.time()),
            )


if __name__ == "__main__":
    main()
