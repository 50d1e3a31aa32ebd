r"""Where a script's time goes: start-up, physics, rollout, iteration, evaluation, decoder training.

    python benchmark/throughput.py -- --env-id CheetahRun
    python benchmark/throughput.py --scripts ppo_gaussian fpo dppo -- --env-id CheetahRun
    python benchmark/throughput.py --scripts ppo_gaussian --versus 'python other.py --task a' \
        --versus-sps 'steps/s: ([0-9.,]+)' -- --env-id CheetahRun --total-timesteps 3000000

After `--` come the arguments of the script or scripts. Prints tables, and JSON unless `--out` takes
it.

One script: seconds to make its environment and to compile the programs of its `train`, in a process
with an empty cache (cold) and in another with that cache filled (warm). Start-up is their sum but
for the decoder epoch, which comes later. Then phases, one of each in turn, so that other work on
the machine slows all of them; the fastest of `--repeats` counts. `sps` are environment steps a
second of all seeds. Several scripts: their whole iterations, in turn.

`--versus` runs processes, A B A B: A is the first script, in a temporary `--runs-dir`, B the
command (no shell). Wall seconds include start-up and evaluations; compilation caches are left as
they are, so the first round may be cold. A's `sps` is the median of train.csv's, without the first
iteration.
"""

import csv
import importlib
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NoReturn
from unittest.mock import patch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in the scripts

import jax
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
SELF = [sys.executable, __file__]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "mujoco", "mujoco-mjx", "playground")


@dataclass(frozen=True)
class Bench:
    """Times a script's start-up and phases, several scripts in turn, or a script and a command."""

    scripts: tuple[str, ...] = ("gorl_fm_ppo",)  # of more than one, whole iterations only
    repeats: int = 2  # timed calls of each phase, after one that is not timed
    decoder_samples: int = 1_000_000  # pairs of the timed decoder epoch, at most the buffer's
    versus: str | None = None  # another command, timed in turn with the first script
    versus_sps: str | None = None  # a regular expression, whose last match's group is B's steps/s
    rounds: int = 3  # runs of each with --versus
    out: str | None = None  # a file for the JSON, which is printed otherwise
    compile_only: bool = False  # print start-up as JSON: how the benchmark calls itself


def fail(message: str, status: int = 2) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def check(bench: Bench) -> None:
    """All that can be wrong with the benchmark's own arguments, before anything takes time."""
    for name in bench.scripts:
        if not name.isidentifier() or not (ROOT / f"{name}.py").is_file():
            fail(f"--scripts: got {name}; takes names of this repository's scripts, as gorl_fm_ppo")
    for name in ("repeats", "decoder_samples", "rounds"):
        value = getattr(bench, name)
        if value < 1:
            fail(f"--{name.replace('_', '-')}: got {value}; takes a number of at least 1")
    try:
        if bench.versus is not None and not shutil.which((shlex.split(bench.versus) or [""])[0]):
            fail(f"--versus: got {bench.versus!r}; takes a command, and its first word is none")
        if bench.versus_sps is not None and not (
            bench.versus and re.compile(bench.versus_sps).groups
        ):
            takes = "an expression with a group, and --versus"
            fail(f"--versus-sps: got {bench.versus_sps!r}; takes {takes}")
        if bench.out:
            Path(bench.out).parent.mkdir(parents=True, exist_ok=True)
            Path(bench.out).open("a").close()
    except (re.error, ValueError, OSError) as error:
        fail(f"--versus, --versus-sps or --out: {error}")


def load(name: str, rest: list[str]) -> tuple[Any, Any]:
    """A script and its checked arguments; it ends the program itself if they are wrong."""
    script = importlib.import_module(name)
    with patch.object(sys, "argv", [f"{name}.py", *rest]):
        return script, script.parse_args()


def run_process(what: str, command: list[str], **options: Any) -> tuple[float, str, str]:
    """A command's wall seconds, stdout and stderr; if it fails, so does the benchmark."""
    start = time.perf_counter()
    options |= {"stdin": subprocess.DEVNULL, "capture_output": True}
    try:
        done = subprocess.run(command, text=True, errors="replace", **options)
    except OSError as error:
        fail(f"{what}: {command[0]}: {error.strerror}")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if re.search(r"\w", line)]
        message = lines[-1].strip() if lines else "no message"
        fail(f"{what} failed with status {done.returncode}: {message}", status=1)
    return time.perf_counter() - start, done.stdout, done.stderr


# --- one script ---


class Stop(Exception):
    """Ends `train` once it has made its programs."""


def programs(script: Any, args: Any, env: Any) -> dict[str, Any]:
    """The jitted programs that the script's own `train` makes, by the function that they map."""
    found = {}
    over_seeds = script.over_seeds

    def note(args: Any, f: Any, *rest: Any, **options: Any) -> Any:
        program = over_seeds(args, f, *rest, **options)
        if isinstance(f, partial):  # the other one only puts checkpoints on the devices
            found[f.func.__name__] = program
        return program

    stop = patch.object(script, "load_checkpoint", side_effect=Stop)
    with patch.object(script, "over_seeds", note), stop, suppress(Stop):
        script.train(args, env, Path())
    jax.clear_caches()  # of traces that `train` has made: they are to be timed
    return found


class Run:
    """A run's state and compiled programs, and calls of them."""

    def __init__(self, script: Any, args: Any, samples: int = 0) -> None:
        """Compiles `init_state` and `iteration`; with `samples`, also evaluation and decoder."""
        start = time.perf_counter()
        self.env = script.make_env(args)
        self.seconds = {"make_env": time.perf_counter() - start}
        self.gorl = hasattr(script, "decoder_epoch")
        self.steps = args.steps_per_iteration * args.num_seeds
        self.programs = programs(script, args, self.env)
        self.keys = jax.vmap(jax.random.PRNGKey)(np.arange(args.num_seeds) + args.seed)
        first = (self.keys, 0) if self.gorl else (self.keys,)
        self.clip_eps = (args.clip_eps[0],) if self.gorl else ()
        self.init = self.compile("init_state", *first)
        self.state = self.init(*first)
        self.iterate = self.compile("iteration", self.state, *self.clip_eps)
        self.calls = {"iteration": self.iteration}
        if samples == 0:
            return
        fresh = self.init(*first)  # an iteration takes its state's memory
        # Of GoRL's evaluations some are half deterministic: it has a value for each episode.
        deterministic = np.ones((args.eval_envs, 1), bool) if self.gorl else True
        given = (fresh.agent, self.keys, deterministic)
        evaluate = self.compile("evaluate", *given)
        self.calls["evaluate"] = lambda: evaluate(*given)
        self.fresh = fresh
        self.seconds["start_up"] = sum(self.seconds.values())
        if self.gorl:
            pairs = jax.tree.map(lambda x: x[:, -samples:], fresh.recent)
            batch = args.decoder_batch_size
            self.samples = (pairs.u.shape[1] // batch - 1) * batch * args.num_seeds
            learner = (fresh.agent.decoder, fresh.agent, pairs, self.keys, 0)
            epoch = self.compile("decoder_epoch", *learner)
            self.calls["decoder_epoch"] = lambda: epoch(*learner)

    def compile(self, name: str, *example: Any) -> Callable:
        start = time.perf_counter()
        program = self.programs[name].lower(*example).compile()
        self.seconds[name] = time.perf_counter() - start
        return program

    def iteration(self) -> Any:
        self.state, metrics = self.iterate(self.state, *self.clip_eps)
        return metrics


def cold_and_warm(bench: Bench, rest: list[str], cache: str) -> dict[str, Any]:
    """Start-up of two processes, one after the other, that share a cache, at first empty."""
    env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=cache, WARP_CACHE_PATH=f"{cache}/warp")
    command = [*SELF, "--compile-only", "--scripts", bench.scripts[0]]
    command += ["--decoder-samples", str(bench.decoder_samples), "--", *rest]
    found = {}
    for name in ("cold", "warm"):
        _, out, _ = run_process(name, command, env=env)
        found[name] = json.loads(out.splitlines()[-1])
    return found


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of each call, `rounds` times one of each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in [*calls] * rounds:
        start = time.perf_counter()
        jax.block_until_ready(calls[name]())
        seconds[name].append(time.perf_counter() - start)
        print(f"{name}: {seconds[name][-1]:.3g} s", file=sys.stderr, flush=True)
    return {name: {"seconds": min(s), "all_seconds": s} for name, s in seconds.items()}


def physics_only(script: Any, args: Any, env: Any, envs: Any, key: jax.Array) -> Any:
    """As many environment steps as an iteration has, with random actions and no network."""

    def step(envs: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        u = jax.random.normal(key, (args.num_envs, env.action_size))
        envs, reward, *_ = script.step_envs(args, env, envs, u)
        return envs, reward.mean()

    return jax.lax.scan(
        step, envs, jax.random.split(key, args.steps_per_iteration // args.num_envs)
    )


def peaks() -> dict[str, float | None]:
    """GB this process has held at most, on the host and (None on CPUs) on the fullest device."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max(x.get("peak_bytes_in_use", 0) for x in stats)
    return {"peak_host_memory_gb": host / 1e9, "peak_device_memory_gb": device / 1e9 or None}


def measure(run: Run, script: Any, args: Any, repeats: int) -> dict[str, Any]:
    """Phases of one script. Peaks are those before its parts are timed alone."""
    in_turn(run.calls, 1)
    result: dict[str, Any] = {"steps_per_iteration": run.steps} | peaks()
    agent, envs = run.fresh.agent, run.fresh.envs
    physics = script.over_seeds(args, partial(physics_only, script, args, run.env), (0, 0))
    rollout = script.over_seeds(args, partial(script.rollout, args, run.env), (0, 0, 0))
    parts = {
        "physics": lambda: physics(envs, run.keys),
        "rollout": lambda: rollout(agent, envs, run.keys),
    }
    in_turn(parts, 1)
    phases = in_turn(run.calls | parts, repeats)
    for name in ("iteration", *parts):
        phases[name]["sps"] = run.steps / phases[name]["seconds"]
    steps = args.eval_envs * args.episode_length * args.num_seeds
    phases["evaluate"]["sps"] = steps / phases["evaluate"]["seconds"]
    result |= phases
    result["rollout_share"] = phases["rollout"]["seconds"] / phases["iteration"]["seconds"]
    if run.gorl:
        seconds = phases["decoder_epoch"]["seconds"] / run.samples * 1e6
        result["decoder_seconds_per_million_samples_and_epoch"] = seconds
    return result


# --- several scripts, or processes ---


def compare(scripts: dict[str, tuple[Any, Any]], repeats: int) -> dict[str, Any]:
    """Whole iterations of several scripts, one of each in turn."""
    runs = {name: Run(script, args) for name, (script, args) in scripts.items()}
    calls = {name: run.iteration for name, run in runs.items()}
    in_turn(calls, 1)
    result = in_turn(calls, repeats)
    for name, run in runs.items():
        result[name]["sps"] = run.steps / result[name]["seconds"]
        result[name]["over_first"] = result[name]["sps"] / result[next(iter(runs))]["sps"]
    return {"scripts": result} | peaks()


def last_number(pattern: str, *texts: str) -> float:
    """Group 1 of the last match, in the first text that has one."""
    found = [match[1] for text in texts for match in [*re.finditer(pattern, text)][-1:]]
    try:
        return float(found[0].replace(",", ""))
    except (IndexError, AttributeError, ValueError):
        fail(f"--versus-sps: no number in B's output is {pattern!r}", status=1)


def own_run(runs_dir: Path) -> tuple[float | None, dict[str, Any]]:
    """Steps/s of a finished run without its first iteration, None if it had no other, and args."""
    files = list(runs_dir.glob("*/train.csv"))
    if not files:
        fail("A left no train.csv in its --runs-dir (--resume cannot be timed)", status=1)
    rows = list(csv.DictReader(files[0].read_text().splitlines()))
    later = [float(row["sps"]) for row in rows if row["step"] != rows[0]["step"]]
    args = json.loads((files[0].parent / "args.json").read_text())
    args["runs_dir"] = "runs"  # not tempfile's
    keep = {*PACKAGES, "python", "script", "git_commit", "device"}
    args["versions"] = {k: v for k, v in args["versions"].items() if k in keep}
    return median(later) if later else None, args


def versus(bench: Bench, rest: list[str]) -> dict[str, Any]:
    """Whole processes in turn, A B A B; ratios are B's figure over that of the A before it."""
    script = f"{bench.scripts[0]}.py"
    runs = []
    for name in "AB" * bench.rounds:
        with tempfile.TemporaryDirectory() as folder:
            ours = [sys.executable, str(ROOT / script), *rest, "--runs-dir", folder]
            seconds, *output = run_process(name, ours if name == "A" else shlex.split(bench.versus))
            if name == "A":
                sps, args = own_run(Path(folder))
            else:
                sps = last_number(bench.versus_sps, *output) if bench.versus_sps else None
        if bench.versus_sps and sps is None:
            fail("--versus-sps: A needs at least two iterations (--total-timesteps)", status=1)
        runs.append({"run": name, "seconds": seconds, "sps": sps})
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    ratios = {}
    for key in ("seconds", "sps") if bench.versus_sps else ("seconds",):
        pairs = [b[key] / a[key] for a, b in zip(runs[::2], runs[1::2], strict=True)]
        ratios[key] = {"pairs": pairs, "median": median(pairs)}
        ratios[key] |= {"min": min(pairs), "max": max(pairs)}
    commands = {"A": shlex.join(["python", script, *rest]), "B": bench.versus}
    return {"commands": commands, "runs": runs, "b_over_a": ratios, "a_args": args}


# --- for a reader ---


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(*rows: tuple) -> str:
    """Aligned columns of texts and numbers."""
    cells = [[cell(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        lines.append("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    """The result as tables."""
    if "b_over_a" in result:
        ratios = [(key, r["median"], r["min"], r["max"]) for key, r in result["b_over_a"].items()]
        tables = [[("run", "s", "steps/s"), *(tuple(run.values()) for run in result["runs"])]]
        tables += [[("B / A", "median", "min", "max"), *ratios]]
    elif "scripts" in result:
        rows = [(k, r["seconds"], r["sps"], r["over_first"]) for k, r in result["scripts"].items()]
        tables = [[("iteration", "s", "steps/s", "over the first"), *rows]]
    else:
        cold, warm = (result["start_up_seconds"][name] for name in ("cold", "warm"))
        tables = [[("start-up, s", "cold", "warm"), *((k, cold[k], warm[k]) for k in cold)]]
        phases = [(k, v) for k, v in result.items() if isinstance(v, dict) and "all_seconds" in v]
        rows = [(k, v["seconds"], v.get("sps")) for k, v in phases]
        tables += [[("phase", "s", "steps/s"), *rows]]
    single = ("rollout_share", "decoder_seconds_per_million_samples_and_epoch")
    single += ("peak_host_memory_gb", "peak_device_memory_gb")
    rows = [(k.replace("_", " "), result[k]) for k in single if k in result]
    return "\n\n".join(table(*rows) for rows in [*tables, rows] if rows)


def timings(bench: Bench, rest: list[str]) -> dict[str, Any]:
    """What is asked for: two commands, several scripts, one process's start-up, or one script."""
    if bench.versus:
        return versus(bench, rest)
    scripts = {name: load(name, rest) for name in bench.scripts}
    script, args = scripts[bench.scripts[0]]
    about = {"env_id": args.env_id, "num_envs": args.num_envs, "num_seeds": args.num_seeds}
    if len(scripts) > 1:
        return about | compare(scripts, bench.repeats)
    if bench.compile_only:
        return Run(script, args, bench.decoder_samples).seconds
    with tempfile.TemporaryDirectory() as cache:
        # The other processes first: this one will hold the device's memory.
        about["start_up_seconds"] = cold_and_warm(bench, rest, cache)
        jax.config.update("jax_compilation_cache_dir", cache)
        run = Run(script, args, bench.decoder_samples)
        return about | measure(run, script, args, bench.repeats)


def main() -> None:
    start = time.perf_counter()
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    bench, rest = tyro.cli(Bench, args=sys.argv[1:at]), sys.argv[at + 1 :]
    check(bench)
    sys.path.insert(0, str(ROOT))
    result = timings(bench, rest)
    if bench.compile_only:
        print(json.dumps(result))
        return
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    about = {
        "command": shlex.join(["python", "benchmark/throughput.py", *sys.argv[1:]]),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None,
        "versions": {name: version(name) for name in PACKAGES},
        "processor_cores": os.cpu_count(),
    }
    about["versions"]["python"] = platform.python_version()
    if bench.versus:  # asked of A: this process leaves the device alone
        about["device"] = result["a_args"]["versions"]["device"]
    else:
        about["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    result = about | result | {"wall_seconds": time.perf_counter() - start}
    print(f"{result['command']}\n{result['device']}, commit {result['commit']}\n\n{report(result)}")
    text = json.dumps(result, indent=1) + "\n"
    if bench.out is None:
        print(f"\n{text}", end="")
    else:
        Path(bench.out).write_text(text)


if __name__ == "__main__":
    main()
