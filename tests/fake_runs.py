"""Run directories with known returns, as the scripts write them, without running anything."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from plotting import runs


def write_run(folder, stem, task, returns, seeds=(1,), preset="paper", every=None, **changes):
    """A finished run in `folder`: args.json, and an eval.csv of `returns(seed, steps)`; the step
    grid.

    The grid has a step every `every` iterations (default: as --eval-every) and the last.
    """
    script = runs.script_of(stem)
    args = script.Args(preset=preset)
    args = replace(
        args, **(script.CPU_PRESET if preset == "cpu" else {}) | {"env_id": task} | changes
    )
    args = asdict(replace(args, seed=seeds[0], num_seeds=len(seeds)))
    if "stage_timesteps" in args and "stage_timesteps" not in changes:
        args["stage_timesteps"] = runs.default_stages(args["total_timesteps"])
    args["versions"] = {
        "script": f"{stem}.py",
        "git_commit": "0123456",
        "device": "1 x test",
        "jax": "0.0",
    }
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args, indent=1))
    size, end = (
        args["batch_size"] * args["num_minibatches"] * args["unroll_length"],
        runs.last_step(args),
    )
    grid = np.arange(0, end, size * (every or max(1, round(args["eval_every"] / size))))
    grid = np.append(grid[grid < end], end)
    lines = ["seed,step,stage,return_mean,return_std,return_min,return_max,wall_time"]
    values = {seed: returns(seed, grid) for seed in seeds}
    for i, step in enumerate(grid):
        lines += [f"{seed},{step},0,{values[seed][i]:.7g},1,0,2,{i}" for seed in seeds]
    (folder / "eval.csv").write_text("\n".join(lines) + "\n")
    return grid
