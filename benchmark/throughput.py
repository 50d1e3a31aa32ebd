r"""Where a script's time and memory go: start-up, physics, rollout, update, decoder training, checkpoints.

    python benchmark/throughput.py -- --env-id CheetahRun
    python benchmark/throughput.py --scripts ppo_gaussian fpo dppo -- --env-id CheetahRun
    python benchmark/throughput.py --scripts ppo_gaussian --versus 'python other.py --task cheetah' \
        --versus-sps 'steps/s: ([0-9.,]+)' -- --env-id CheetahRun --total-timesteps 3000000

After `--` come the arguments of the script or scripts. Prints tables, and JSON unless `--out` takes it.

One script: seconds to trace and lower, and to compile, a run's programs, in a process with an empty cache
(cold) and in another with that cache filled (warm). Start-up is their sum but for the decoder epoch, which
comes later. Then phases, one of each in turn, so that other work on the machine slows all of them; the
fastest of `--repeats` counts. `sps` are environment steps a second of all seeds. Several scripts: their whole
iterations, in turn.

`--versus` runs processes, A B A B: A is the first script, in a temporary `--runs-dir`, B the command (no
shell). Wall seconds include start-up and evaluations; compilation caches are left as they are, so the first
round may be cold. A's `sps` is the median of train.csv's, without the first iteration.
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
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, NoReturn
from unittest.mock import patch

import jax
import jax.numpy as jnp
import tyro
from jax import lax

ROOT, SELF = Path(__file__).resolve().parent.parent, [sys.executable, __file__]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "mujoco", "mujoco-mjx", "playground", "warp-lang")


@dataclass(frozen=True)
class Bench:
    """Times a script's compilation and phases, several scripts in turn, or a script and another command."""

    scripts: tuple[str, ...] = ("gorl_fm_ppo",)  # of more than one, whole iterations only
    repeats: int = 2  # timed calls of each phase, after one that is not timed
    decoder_samples: int = 1_000_000  # pairs of the timed decoder epoch (at least a batch, at most the ring)
    versus: str | None = None  # another command, timed in turn with the first script
    versus_sps: str | None = None  # a regular expression: group 1 of its last match is the command's steps/s
    rounds: int = 3  # runs of each with --versus
    out: str | None = None  # a file for the JSON, which is printed otherwise
    compile_only: bool = False  # print compile seconds as JSON: how the benchmark calls itself


def fail(message: str, status: int = 2) -> NoReturn:
    print(f"throughput.py: {message}", file=sys.stderr)
    raise SystemExit(status)


def check(bench: Bench) -> None:
    """All that can be wrong with the benchmark's own arguments, before anything takes time."""
    for name in bench.scripts:
        if not name.isidentifier() or not (ROOT / f"{name}.py").is_file():
            fail(f"--scripts: got {name}; takes names of this repository's scripts, as gorl_fm_ppo")
    for name in ("repeats", "decoder_samples", "rounds"):
        if (got := getattr(bench, name)) < 1:
            fail(f"--{name.replace('_', '-')}: got {got}; takes a number of at least 1")
    try:
        if bench.versus is not None and not shutil.which((shlex.split(bench.versus) or [""])[0]):
            fail(f"--versus: got {bench.versus!r}; takes a command, and its first word is none")
        if bench.versus_sps is not None and not (bench.versus and re.compile(bench.versus_sps).groups):
            fail(f"--versus-sps: got {bench.versus_sps!r}; takes an expression with a group, and --versus")
        if bench.out:
            Path(bench.out).parent.mkdir(parents=True, exist_ok=True)
            Path(bench.out).open("a").close()
    except (re.error, ValueError, OSError) as error:
        fail(f"--versus, --versus-sps or --out: {error}")


def load(name: str, rest: list[str]) -> tuple[Any, Any]:
    """A script and its checked arguments; it ends the program itself if they are wrong."""
    script, before = importlib.import_module(name), sys.argv
    sys.argv = [f"{name}.py", *rest]
    try:
        script.check(args := script.parse_args())
    finally:
        sys.argv = before
    return script, args


def run_process(what: str, command: list[str], **options: Any) -> tuple[float, str, str]:
    """A command's wall seconds, stdout and stderr. If it fails, so does the benchmark, in one line."""
    start, options = time.perf_counter(), options | {"stdin": subprocess.DEVNULL, "capture_output": True}
    try:
        done = subprocess.run(command, text=True, errors="replace", **options)
    except OSError as error:
        fail(f"{what}: {command[0]}: {error.strerror}")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if re.search(r"\w", line)] or ["no message"]
        fail(f"{what} failed with status {done.returncode}: {lines[-1].strip()}", status=1)
    return time.perf_counter() - start, done.stdout, done.stderr


class Stop(Exception):
    """Ends `train` once it has made its programs."""


def programs(script: Any, args: Any) -> dict[str, Any]:
    """The jitted programs that the script's own `train` makes, by the function that each maps over seeds."""
    found, each_seed = {}, script.each_seed

    def note(args: Any, f: Any, *rest: Any, **options: Any) -> Any:
        found[f.func.__name__] = program = each_seed(args, f, *rest, **options)
        return program

    with patch.object(script, "each_seed", note), patch.object(script, "restore", side_effect=Stop):
        with suppress(Stop):
            script.train(args, Path(), [], bool)
        jax.clear_caches()  # of traces that `train` has made: they are to be timed
    return found


class Run:
    """A run's state and compiled programs, and calls of them."""

    def __init__(self, script: Any, args: Any, samples: int = 0) -> None:
        """Compiles `begin` and the iteration; with `samples`, evaluation and a decoder epoch of so many."""
        self.gorl, self.done, self.seconds, self.memory = hasattr(script, "decoder_epoch"), 0, {}, {}
        self.keys = keys = jax.vmap(jax.random.PRNGKey)(args.seed + jnp.arange(args.num_seeds))
        self.steps = args.batch_size * args.num_minibatches * args.unroll_length * args.num_seeds
        self.programs = programs(script, args)
        self.begin = self.compile("begin", keys, 0)
        self.state = self.begin(keys, 0)
        if self.gorl:
            self.state = self.state.replace(learner=None)
        self.iterate = self.compile("iteration", self.state, keys, *self.now())
        self.calls = {"begin": lambda: self.begin(keys, 0), "iteration": self.iteration}
        if samples:
            evaluate = self.compile("evaluate", self.state.agent, keys, 0, True)
            self.calls["evaluate"] = lambda: evaluate(self.state.agent, keys, 0, True)
        self.start_up = sum(seconds["total"] for seconds in self.seconds.values())
        if samples and self.gorl:
            batch, fresh = args.decoder_batch_size, self.begin(keys, 1)
            stats = jax.tree.map(jnp.copy, fresh.agent.stats)  # as `train` does: it may lie elsewhere then
            learner = {"net": fresh.agent.decoder["net"], "stats": stats}, fresh.learner[1]
            pairs = min(max(samples, batch), args.decoder_buffer_size // args.num_envs * args.num_envs)
            self.samples = pairs // batch * batch * args.num_seeds  # what fills no batch is left out
            rest = keys, args.decoder_epochs
            epoch = self.compile("decoder_epoch", pairs, *learner, self.state.ring, *rest)
            self.calls["decoder_epoch"] = lambda: epoch(*learner, self.state.ring, *rest)

    def compile(self, name: str, *example: Any) -> Callable:
        """Ahead of time; keeps its seconds and its own accounting of memory, in GB of this process."""
        start = time.perf_counter()
        lowered = self.programs[name].lower(*example)
        middle = time.perf_counter()
        program = lowered.compile()
        end = time.perf_counter()
        self.seconds[name] = {"trace_lower": middle - start, "compile": end - middle, "total": end - start}
        if stats := program.memory_analysis():
            parts, gb = ("argument", "output", "alias", "temp"), jax.local_device_count() / 1e9
            sizes = {k: getattr(stats, f"{k}_size_in_bytes") * gb for k in parts}
            self.memory[name] = sizes | {"total": sum(sizes.values()) - 2 * sizes["alias"]}
        return program

    def now(self) -> tuple:
        """The iteration's index; with a decoder, the stage and how many iterations the ring has, too."""
        return (self.done, (0, self.done)) if self.gorl else (self.done,)

    def iteration(self) -> Any:
        self.state, metrics = self.iterate(self.state, self.keys, *self.now())
        self.done += 1
        return metrics


def cold_and_warm(bench: Bench, rest: list[str], cache: str) -> dict[str, Any]:
    """Compile seconds of two processes, one after the other, that share a cache, at first empty."""
    env = dict(os.environ, JAX_COMPILATION_CACHE_DIR=cache, WARP_CACHE_PATH=f"{cache}/warp")
    command = [*SELF, "--compile-only", "--scripts", bench.scripts[0]]
    command += ["--decoder-samples", str(bench.decoder_samples), "--", *rest]
    return {k: json.loads(run_process(k, command, env=env)[1].splitlines()[-1]) for k in ("cold", "warm")}


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of each call, `rounds` times one of each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name in [*calls] * rounds:
        start = time.perf_counter()
        jax.block_until_ready(calls[name]())
        seconds[name].append(time.perf_counter() - start)
        print(f"{name}: {seconds[name][-1]:.3g} s", file=sys.stderr, flush=True)
    return {name: {"seconds": min(s), "all_seconds": s} for name, s in seconds.items()}


def each_seed(args: Any, f: Callable) -> Callable:
    """f mapped over seeds as the scripts map theirs: a single one without `vmap`."""
    if args.num_seeds > 1:
        return jax.jit(jax.vmap(f, spmd_axis_name="seeds"))
    first, all_seeds = (partial(jax.tree.map, index) for index in (lambda x: x[0], lambda x: x[None]))
    return jax.jit(lambda *xs: all_seeds(f(*map(first, xs))))


def physics_only(script: Any, args: Any, env: Any, envs: Any, key: jax.Array) -> Any:
    """As many environment steps as an iteration has, with random actions and no network."""

    def step(envs: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        u = jax.random.normal(key, (args.num_envs, env.action_size))
        envs, reward, *_ = script.step_envs(args, env, envs, u)
        return envs, reward.mean()

    steps = args.batch_size * args.num_minibatches * args.unroll_length // args.num_envs
    return lax.scan(step, envs, jax.random.split(key, steps))


def update_only(script: Any, args: Any, agent: Any, steps: Any, last_obs: jax.Array, key: jax.Array) -> Any:
    """What an iteration does with a rollout, with the coefficients of stage 0."""
    args = replace(args, **{name: v[0] for name, v in vars(args).items() if isinstance(v, tuple)})
    batch = script.as_unrolls(steps._replace(obs=script.normalize(agent.stats, steps.obs)))
    last_obs = script.normalize(agent.stats, last_obs).reshape(-1, last_obs.shape[-1])
    return script.update(args, agent, batch, last_obs, key)


def peaks() -> dict[str, float | None]:
    """GB that this process has held at most, on the host and (None on CPUs) on the device that held most."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices())
    return {"peak_host_memory_gb": host / 1e9, "peak_device_memory_gb": device / 1e9 or None}


def measure(run: Run, script: Any, args: Any, repeats: int) -> dict[str, Any]:
    """Phases of one script. Peaks are those of what a run does, before its parts are timed alone."""
    in_turn(run.calls, 1)
    about = {"steps_per_iteration": run.steps, "memory_gb": run.memory} | peaks()
    env = script.make_env(args)
    physics = each_seed(args, partial(physics_only, script, args, env))
    rollout = each_seed(args, partial(script.rollout, args, env))
    update = each_seed(args, partial(update_only, script, args))
    agent, envs = attrgetter("agent", "envs")(run.begin(run.keys, 1))  # the iteration takes its own's buffers
    _, steps, last_obs, _ = rollout(agent, envs, run.keys)
    parts = {
        "physics": lambda: physics(envs, run.keys),
        "rollout": lambda: rollout(agent, envs, run.keys),
        "update": lambda: update(agent, steps, last_obs, run.keys),
    }
    in_turn(parts, 1)
    result: dict[str, Any] = in_turn(run.calls | parts, repeats)
    seconds = {name: phase["seconds"] for name, phase in result.items()}
    counts = dict.fromkeys(("iteration", *parts), run.steps)
    for name, count in (counts | {"evaluate": args.eval_envs * args.episode_length * args.num_seeds}).items():
        result[name]["sps"] = count / seconds[name]
    result["training_over_physics"] = result["iteration"]["sps"] / result["physics"]["sps"]
    result["rollout_share"] = seconds["rollout"] / (seconds["rollout"] + seconds["update"])
    if run.gorl:
        per_million = seconds["decoder_epoch"] / run.samples * 1e6
        result["decoder_seconds_per_million_samples_and_epoch"] = per_million
    return about | result | {"checkpoint": checkpoint(script, run.state, result["iteration"]["sps"])}


def checkpoint(script: Any, state: Any, sps: float) -> dict[str, float]:
    """Seconds and bytes of a checkpoint with everything, and without the decoder's ring; seconds to load.

    `slowdown_worst`: of a run with one of everything for every 6M steps of a seed.
    """
    result, seeds = {}, len(jax.tree.leaves(state)[0])
    parts = {"whole": state} | ({"without_ring": state.replace(ring=None)} if hasattr(state, "ring") else {})
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            file, start = Path(folder) / f"{name}.npz", time.perf_counter()
            script.save_arrays(file, part, without=[k for k, v in vars(part).items() if v is None])
            result[f"{name}_save_seconds"] = time.perf_counter() - start
            result[f"{name}_bytes"], start = file.stat().st_size, time.perf_counter()
            script.load_arrays(file, jax.eval_shape(lambda: state))
            result[f"{name}_load_seconds"] = time.perf_counter() - start
    return result | {"slowdown_worst": 1 + result["whole_save_seconds"] * sps / (6_000_000 * seeds)}


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
    found = next((matches for text in texts if (matches := [*re.finditer(pattern, text)])), None)
    try:
        return float(found[-1][1].replace(",", ""))
    except (TypeError, AttributeError, ValueError):
        fail(f"--versus-sps: no number in B's output is {pattern!r}", status=1)


def own_run(runs_dir: Path) -> tuple[float | None, dict[str, Any]]:
    """Steps/s of a finished run without its first iteration (None if it had no other), and its args.json."""
    if not (found := list(runs_dir.glob("*/train.csv"))):
        fail("A left no train.csv in its --runs-dir (--resume cannot be timed)", status=1)
    rows = list(csv.DictReader(found[0].read_text().splitlines()))
    later = [float(row["sps"]) for row in rows if row["step"] != rows[0]["step"]]
    args = json.loads((found[0].parent / "args.json").read_text()) | {"runs_dir": "runs"}  # not tempfile's
    return median(later) if later else None, args


def versus(bench: Bench, rest: list[str]) -> dict[str, Any]:
    """Whole processes in turn, A B A B; ratios are B's figure over that of the A before it."""
    runs, script = [], f"{bench.scripts[0]}.py"
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
        ratios[key] = {"pairs": pairs, "median": median(pairs), "min": min(pairs), "max": max(pairs)}
    commands = {"A": shlex.join(["python", script, *rest]), "B": bench.versus}
    return {"commands": commands, "runs": runs, "b_over_a": ratios, "a_args": args}


def table(*rows: tuple) -> str:
    """Aligned columns of texts and numbers."""
    numbers = [[f"{x:,.0f}" if isinstance(x, float) and x >= 1000 else x for x in row] for row in rows]
    cells = [
        ["-" if x is None else f"{x:.3g}" if isinstance(x, float) else str(x) for x in r] for r in numbers
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
    return "\n".join("  ".join(line) for line in lines)


def report(result: dict[str, Any]) -> str:
    """The result for a reader."""
    if "b_over_a" in result:
        ratios = [(key, r["median"], r["min"], r["max"]) for key, r in result["b_over_a"].items()]
        tables = [[("run", "s", "steps/s"), *(tuple(run.values()) for run in result["runs"])]]
        tables += [[("B / A", "median", "min", "max"), *ratios]]
    elif "scripts" in result:
        rows = [(k, r["seconds"], r["sps"], r["over_first"]) for k, r in result["scripts"].items()]
        tables = [[("iteration", "s", "steps/s", "over the first"), *rows]]
    else:
        cold, warm = (result["compile_seconds"][when] for when in ("cold", "warm"))
        compiled = [(k, *cold[k].values(), *warm[k].values()) for k in cold if k != "start_up"]
        compiled += [("start-up", "", "", cold["start_up"], "", "", warm["start_up"])]
        phases = [(k, v) for k, v in result.items() if isinstance(v, dict) and "all_seconds" in v]
        memory = [(k, *sizes.values()) for k, sizes in result["memory_gb"].items()]
        tables = [[("compile, s", "cold: trace", "XLA", "sum", "warm: trace", "XLA", "sum"), *compiled]]
        tables += [[("phase", "s", "steps/s"), *((k, v["seconds"], v.get("sps")) for k, v in phases)]]
        tables += [[("program, GB", "arguments", "outputs", "in place", "temporary", "total"), *memory]]
    single = ("training_over_physics", "rollout_share", "decoder_seconds_per_million_samples_and_epoch")
    single += ("peak_host_memory_gb", "peak_device_memory_gb")
    tables += [[(k.replace("_", " "), result[k]) for k in single if k in result]]
    return "\n\n".join(table(*rows) for rows in tables if rows)


def timings(bench: Bench, rest: list[str]) -> dict[str, Any]:
    """What is asked for: two commands, several scripts, one process's compilation, or one script."""
    if bench.versus:
        return versus(bench, rest)
    scripts = {name: load(name, rest) for name in bench.scripts}
    script, args = scripts[bench.scripts[0]]
    about = {"env_id": args.env_id, "num_envs": args.num_envs, "num_seeds": args.num_seeds}
    if len(scripts) > 1:
        return about | compare(scripts, bench.repeats)
    with tempfile.TemporaryDirectory() as cache:
        if not bench.compile_only:  # the other processes first: this one will hold the device's memory
            about["compile_seconds"] = cold_and_warm(bench, rest, cache)
            jax.config.update("jax_compilation_cache_dir", cache)
        run = Run(script, args, bench.decoder_samples)
        if bench.compile_only:
            return run.seconds | {"start_up": run.start_up}
        return about | measure(run, script, args, bench.repeats)


def main() -> None:
    start, at = time.perf_counter(), sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    bench, rest = tyro.cli(Bench, args=sys.argv[1:at]), sys.argv[at + 1 :]
    check(bench)
    sys.path.insert(0, str(ROOT))
    with jax.default_matmul_precision("highest"):  # as in the scripts
        result = timings(bench, rest)
    if bench.compile_only:
        return print(json.dumps(result))
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    about = {
        "command": shlex.join(["python", "benchmark/throughput.py", *sys.argv[1:]]),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "processor_cores": os.cpu_count(),
    }
    if bench.versus:  # asked of A: this process leaves the device alone
        about["device"] = result["a_args"]["versions"]["device"]
    else:
        about["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    result = about | result | {"wall_seconds": time.perf_counter() - start}
    print(f"{result['command']}\n{result['device']}, commit {result['commit']}\n\n{report(result)}")
    text = json.dumps(result, indent=1) + "\n"
    print(f"\n{text}", end="") if bench.out is None else Path(bench.out).write_text(text)


if __name__ == "__main__":
    main()
