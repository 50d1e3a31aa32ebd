"""Evaluates a saved policy.

python -m plotting.evaluate runs/HopperStand__gorl_fm_ppo__1__1795398135 --episodes 512 --stochastic
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from plotting import policies, runs

COLUMNS = ("seed", "step", "deterministic", "env_seed", "episodes")
COLUMNS += tuple(f"return_{name}" for name in ("mean", "std", "min", "max", "iqm"))


def evaluate(
    run_dir: Annotated[Path, tyro.conf.Positional],
    step: int | None = None,
    seed: int | None = None,
    episodes: int = 128,
    stochastic: bool = False,
    env_seed: int | None = None,
    out: Path | None = None,
) -> list[Path]:
    """Returns of a saved policy over fresh episodes: printed, and added as a row to
    RUN_DIR/evaluations.csv.

    Args:
        run_dir: A run directory with checkpoints/policy_<step>.npz.
        step: Which policy; default: the last.
        seed: Which seed's policy; default: the run's first.
        episodes: How many episodes, in parallel.
        stochastic: Sample latents and actions, as in training; default: the evaluation policy.
        env_seed: Initial states and noise; default: the policy's seed, which with the run's
            --eval-envs episodes gives eval.csv's row again, up to rounding, which a chaotic
            simulation amplifies.
        out: The CSV file to add to.
    """
    if episodes < 1:
        runs.wrong("--episodes", episodes, "a number above 0")
    if not 0 <= (env_seed or 0) < 2**31:
        runs.wrong("--env-seed", env_seed, "a number from 0 to 2147483647")
    try:
        script, args, policy, step, seed = policies.open_policy(run_dir, step, seed)
    except ValueError as error:
        runs.wrong("RUN_DIR, --step, --seed", f"{run_dir} ({error})", "a run with such a policy")
    env_seed, file = seed if env_seed is None else env_seed, out or run_dir / "evaluations.csv"
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        runs.wrong("--out", file, "a file that can be written, in a folder that is there")
    if file.exists() and file.read_bytes().split(b"\n")[0] not in (b"", ",".join(COLUMNS).encode()):
        runs.wrong("--out", file, "a new file, or one that this command has written")
    about = f"{script.__name__}, {args.env_id}, step {step:,}, seed {seed}"
    print(f"{about}, environment seed {env_seed}: running")
    returns, _ = policies.evaluate(script, args, policy, step, env_seed, episodes, not stochastic)
    middle = np.sort(returns)[episodes // 4 : episodes - episodes // 4]
    numbers = (returns.mean(), returns.std(), returns.min(), returns.max(), middle.mean())
    row = dict(
        zip(COLUMNS, (seed, step, int(not stochastic), env_seed, episodes, *numbers), strict=True)
    )
    print(
        ", ".join(
            f"{k.removeprefix('return_')} {v:.1f}" for k, v in row.items() if k.startswith("return")
        )
    )
    if episodes > 1:
        print(f"standard error of the mean {returns.std(ddof=1) / np.sqrt(episodes):.2g}")
    with file.open("a") as rows:
        header = "" if file.stat().st_size else ",".join(COLUMNS) + "\n"
        rows.write(
            header + ",".join(str(v) if type(v) is int else f"{v:.7g}" for v in row.values()) + "\n"
        )
    return [file]


if __name__ == "__main__":
    sys.exit(runs.command(evaluate))
