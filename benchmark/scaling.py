"""Steps/s of one run in 1, 2, 4 ... processes on this machine, which talk over loopback.

    python benchmark/scaling.py -- --preset cpu --stage-timesteps 122880
    python benchmark/scaling.py --cores 1 -- --preset cpu --stage-timesteps 122880 --num-seeds 4

After `--` come the arguments of the script; the work is the same in any number of processes. Each number is
tried in turn, `--rounds` times; `sps` is the median of train.csv's without the first iteration, of all
seeds. Process i sees GPU i only (CUDA_VISIBLE_DEVICES) and, with `--cores N`, has N CPU cores to itself as
far as there are enough. Prints a table, and JSON into `--out`.
"""

import csv
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NoReturn

import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Scaling:
    """Times the same run in several numbers of processes."""

    script: str = "gorl_fm_ppo"
    processes: tuple[int, ...] = (1, 2, 4)  # how many do one run
    rounds: int = 2  # runs of each
    cores: int = 0  # CPU cores of a process (Linux); 0: all of them share all
    out: str | None = None  # a file for the JSON


def fail(message: str, status: int = 2) -> NoReturn:
    print(f"scaling.py: {message}", file=sys.stderr)
    raise SystemExit(status)


def environment(bench: Scaling, i: int) -> tuple[dict[str, str], list[int]]:
    """Process i's variables and CPU cores."""
    cores = sorted(os.sched_getaffinity(0))
    mine = [cores[(i * bench.cores + k) % len(cores)] for k in range(bench.cores)] or cores
    return os.environ | {"CUDA_VISIBLE_DEVICES": str(i)}, mine


def time_run(bench: Scaling, count: int, rest: list[str]) -> dict[str, float]:
    """Steps/s of a run in so many processes, and its wall seconds."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        began, started = time.time(), []
        for i in range(count):
            line = [sys.executable, str(ROOT / f"{bench.script}.py"), *rest, "--runs-dir", f"{folder}/runs"]
            line += ["--distributed", address, str(count), str(i)] if count > 1 else []
            env, cores = environment(bench, i)
            take = partial(os.sched_setaffinity, 0, cores)
            with Path(folder, f"{i}.log").open("w") as log:
                both = {"stdout": log, "stderr": subprocess.STDOUT}
                started.append(subprocess.Popen(line, env=env, preexec_fn=take, **both))
        codes = [process.wait() for process in started]
        if any(codes):
            texts = [Path(folder, f"{i}.log").read_text()[-1000:] for i in range(count)]
            fail(f"{count} processes ended with {codes}: " + "\n".join(texts), status=1)
        seconds = time.time() - began
        rows = list(csv.DictReader(next(Path(folder, "runs").glob("*/train.csv")).open()))
    later = [float(row["sps"]) for row in rows if row["step"] != rows[0]["step"]]
    if not later:
        fail("--stage-timesteps, --total-timesteps: takes two iterations at least", status=1)
    return {"sps": median(later), "seconds": seconds}


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    bench, rest = tyro.cli(Scaling, args=sys.argv[1:at]), sys.argv[at + 1 :]
    if not (ROOT / f"{bench.script}.py").exists():
        fail(f"--script: got {bench.script}; takes the name of a script beside README.md, without .py")
    if min(bench.processes, default=0) < 1 or bench.rounds < 1 or bench.cores < 0:
        fail("--processes, --rounds: take numbers above 0, --cores at least 0")
    runs = []
    for count in bench.processes * bench.rounds:
        runs.append({"processes": count} | time_run(bench, count, rest))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    sps = {n: median(run["sps"] for run in runs if run["processes"] == n) for n in bench.processes}
    table = {n: {"sps": x, "over_first": x / sps[bench.processes[0]]} for n, x in sps.items()}
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    result = {
        "command": shlex.join(["python", "benchmark/scaling.py", *sys.argv[1:]]),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{len(os.sched_getaffinity(0))} CPU cores",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "playground", "mujoco-mjx")},
        "scaling": table,
        "runs": runs,
    }
    for n, row in table.items():
        print(f"{n} process(es): {row['sps']:,.0f} steps/s, {row['over_first']:.2f} of the first")
    if bench.out:
        Path(bench.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
