"""The FPO authors' own code at the sizes of `fpo.py --preset cpu`, to compare learning curves.

    git clone https://github.com/akanazawa/fpo ../fpo && pip install jax_dataclasses
    python benchmark/authors_fpo.py --checkout ../fpo --runs-dir results/authors_fpo_cheetah_run

Their code needs Python 3.12. It is imported, not changed: policy, loss, optimiser, statistics and
rollouts are theirs, at their own defaults but for the sizes below, and so is the evaluation. It
comes after the update, as ours does; in their script, before it. `--ratio per-pair` is a switch of
theirs, and what the public GoRL code changes.

A run writes `<runs-dir>/seed_<seed>/eval.csv` with the columns of the scripts, `train.csv` with
some of their metrics (means over minibatches), and `args.json`.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import jax
import tyro
from mujoco_playground import dm_control_suite

EVAL = "seed,step,stage,return_mean,return_std,return_min,return_max,wall_time"
METRICS = ("clipped_ratio_mean", "policy_ratio_mean", "policy_loss", "v_loss")


@dataclass(frozen=True)
class Args:
    """The authors' FPO, by default on CheetahRun."""

    checkout: str  # their repository
    runs_dir: str  # where seed_<seed>/ are made
    seeds: tuple[int, ...] = (1, 2, 3)  # one run each, one after the other
    env_id: str = "CheetahRun"
    total_timesteps: int = 1_198_080  # 78 iterations, which is what 1.2M steps round to
    eval_every: int = 200_000
    num_envs: int = 128
    unroll_length: int = 30
    batch_size: int = 32
    num_minibatches: int = 16
    update_epochs: int = 8
    eval_envs: int = 128
    ratio: Literal["per-action", "per-pair"] = "per-action"


def main() -> None:
    args = tyro.cli(Args)
    sys.path.insert(0, str(Path(args.checkout) / "playground" / "src"))
    fpo, rollouts = (import_module(f"flow_policy.{name}") for name in ("fpo", "rollouts"))
    commits = []
    for folder in (Path(__file__).parent, args.checkout):
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
        commits.append(subprocess.run(git, capture_output=True, text=True).stdout.strip() or None)
    names = ("jax", "playground", "mujoco", "mujoco-mjx")
    versions = {name: version(name) for name in names} | {"script": Path(__file__).name}
    versions |= {"git_commit": commits[0], "theirs": commits[1]}
    versions["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"

    task = dm_control_suite.get_default_config(args.env_id)
    task.impl = "jax"
    env = dm_control_suite.load(args.env_id, config=task)
    config = fpo.FpoConfig(
        num_envs=args.num_envs,
        unroll_length=args.unroll_length,
        batch_size=args.batch_size,
        num_minibatches=args.num_minibatches,
        num_updates_per_batch=args.update_epochs,
        average_losses_before_exp=args.ratio == "per-action",
    )
    size = args.batch_size * args.num_minibatches * args.unroll_length
    for seed in args.seeds:
        run_dir = Path(args.runs_dir) / f"seed_{seed}"
        run_dir.mkdir(parents=True)
        about = asdict(args) | {"checkout": "fpo", "seed": seed, "versions": versions}
        (run_dir / "args.json").write_text(json.dumps(about, indent=1) + "\n")
        agent = fpo.FpoState.init(prng=jax.random.key(seed), env=env, config=config)
        key = jax.random.key(seed)
        envs = rollouts.BatchedRolloutState.init(env, prng=key, num_envs=args.num_envs)
        start = time.time()
        with (
            (run_dir / "eval.csv").open("w", buffering=1) as evals,
            (run_dir / "train.csv").open("w", buffering=1) as train,
        ):
            print(EVAL, file=evals)
            print("seed,step,stage,sps", *METRICS, sep=",", file=train)
            for done in range(args.total_timesteps // size + 1):
                step = done * size
                if done:
                    iteration_start = time.time()
                    envs, transitions = envs.rollout(
                        agent,
                        episode_length=config.episode_length,
                        iterations_per_env=config.iterations_per_env,
                    )
                    agent, metrics = agent.training_step(transitions)
                    metrics = [float(metrics[name].mean()) for name in METRICS]
                    sps = size / (time.time() - iteration_start)
                    print(seed, step, 0, f"{sps:.1f}", *metrics, sep=",", file=train)
                if step % args.eval_every < size or step == args.total_timesteps:
                    outputs = rollouts.eval_policy(
                        agent,
                        prng=jax.random.fold_in(agent.prng, done),
                        num_envs=args.eval_envs,
                        max_episode_length=config.episode_length,
                    )
                    scalars = outputs.scalar_metrics
                    row = [f"{scalars[f'reward_{x}']:.7g}" for x in ("mean", "std", "min", "max")]
                    print(seed, step, 0, *row, f"{time.time() - start:.7g}", sep=",", file=evals)
                    print(f"seed {seed}, step {step:,}: return {row[0]}", flush=True)


if __name__ == "__main__":
    main()
