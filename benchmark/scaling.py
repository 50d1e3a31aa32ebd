r"""How cost grows with environments and with seeds: steps/s, and the memory of a process.

    python benchmark/scaling.py --out results/throughput/scaling.json --figure results/figures \
        -- --preset cpu
    python benchmark/scaling.py --draw results/throughput/scaling.json --figure results/figures \
        --kernels results/throughput/gpu_kernels_scaling_*.json

After `--` come the script's arguments. With more environments, rollouts of one seed are timed, all
of as many steps as 30 of the most environments are; with more seeds, whole iterations. Each number
of environments or seeds has a process of its own, whose memory is its largest ever, compilation
included. The fastest of `--repeats` calls counts, after one that is not timed. `sps` are
environment steps a second of all seeds.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in the scripts

import jax
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmark import throughput  # noqa: E402


@dataclass(frozen=True)
class Bench:
    """Times a script with more and more environments, then with more and more seeds."""

    script: str = "gorl_fm_ppo"  # of this repository
    num_envs: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    num_seeds: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 2  # timed calls
    out: str | None = None  # a file for the JSON, which is printed otherwise
    figure: str | None = None  # a folder for scaling.png and scaling.pdf
    draw: str | None = None  # a JSON of before to draw, and nothing is timed
    kernels: tuple[str, ...] = ()  # JSONs of gpu_kernels.py to draw below, of other such numbers
    one: str | None = None  # num_envs or num_seeds, of one number: how the benchmark calls itself


def measure(bench: Bench, script: Any, args: Any) -> dict[str, Any]:
    """One number of environments or of seeds, in this process."""
    (number,) = getattr(bench, bench.one)
    args = replace(args, **{bench.one: number})
    env = script.make_env(args)
    gorl = hasattr(script, "decoder_epoch")
    keys = jax.vmap(jax.random.PRNGKey)(np.arange(args.num_seeds) + args.seed)
    stage = (0,) if gorl else ()
    init = script.over_seeds(args, partial(script.init_state, args, env), (0, *[None] * gorl))
    state = init(keys, *stage)
    if bench.one == "num_envs":
        rollout = script.over_seeds(args, partial(script.rollout, args, env), (0, 0, 0))
        call = partial(rollout, state.agent, state.envs, keys)
    else:
        clip_eps = (args.clip_eps[0],) if gorl else ()
        axes = (0, *[None] * gorl)
        iterate = script.over_seeds(args, partial(script.iteration, args, env), axes)
        call = partial(iterate, state, *clip_eps)
    throughput.in_turn({number: call}, 1)
    seconds = throughput.in_turn({number: call}, bench.repeats)[number]["seconds"]
    steps = args.steps_per_iteration * args.num_seeds
    return {"number": number, "sps": steps / seconds, **throughput.peaks()}


def timings(bench: Bench, rest: list[str]) -> dict[str, Any]:
    """All numbers of environments, then all numbers of seeds, a process each."""
    result: dict[str, Any] = {"num_envs": [], "num_seeds": []}
    unrolls = str(max(bench.num_envs, default=1))
    same_steps = ["--unroll-length", "30", "--num-minibatches", "1", "--batch-size", unrolls]
    for name, numbers in result.items():
        sizes = same_steps if name == "num_envs" else []
        for number in getattr(bench, name):
            flag = f"--{name.replace('_', '-')}"
            own = ["--one", name, "--script", bench.script, "--repeats", str(bench.repeats)]
            command = [sys.executable, __file__, *own, flag, str(number), "--", *rest, *sizes]
            if name == "num_envs":  # or the script itself would refuse the number it is given
                command += [flag, str(number)]
            _, out, _ = throughput.run_process(f"{flag} {number}", command)
            numbers.append(json.loads(out.splitlines()[-1]))
            print(flag, numbers[-1], file=sys.stderr, flush=True)
    return result


def control_step(sheet: dict[str, Any]) -> int:
    """Kernels of a control step, in a sheet of gpu_kernels.py."""
    return sheet["programs"]["iteration"]["kernels_of_one"]["control step"]


def draw(result: dict[str, Any], folder: Path, kernels: list[dict[str, Any]]) -> list[Path]:
    """Steps/s, memory and, if there are any, kernels, against environments and against seeds."""
    from plotting import style

    rows = 3 if kernels else 2
    figure, axes = style.plt.subplots(rows, 2, figsize=(style.WIDTH, 1.6 * rows), sharex="col")
    columns = {"num_envs": "environments (rollouts of one seed)", "num_seeds": "seeds (iterations)"}
    most = max((sheet["num_seeds"], sheet["num_envs"]) for sheet in kernels) if kernels else (0, 0)
    fixed = {"num_envs": ("num_seeds", 1), "num_seeds": ("num_envs", most[1])}
    for (name, label), (speed, memory, *third) in zip(columns.items(), axes.T, strict=True):
        numbers = [row["number"] for row in result[name]]
        look = {"marker": "o", "markersize": 3, "color": "#0072B2"}
        speed.plot(numbers, [row["sps"] / 1000 for row in result[name]], **look)
        memory.plot(numbers, [row["peak_host_memory_gb"] for row in result[name]], **look)
        for panel in third:
            other, value = fixed[name]
            sheets = [sheet for sheet in kernels if sheet[other] == value]
            points = sorted((sheet[name], control_step(sheet)) for sheet in sheets)
            panel.plot(*zip(*points, strict=True), **look)
        for panel in (speed, memory, *third):
            panel.set_ylim(0, 1.1 * panel.dataLim.y1)
            panel.set_xscale("log", base=2)
            panel.set_xticks(numbers, [str(number) for number in numbers])
        axes[-1, list(columns).index(name)].set_xlabel(label)
    if kernels:
        axes[2, 0].set_ylabel("H100: kernels of a step")
    axes[0, 0].set_ylabel("1000 steps/s")
    axes[1, 0].set_ylabel("memory at most (GB)")
    text = f"{result['script']} on {result['env_id']}, {result['device']}, steps of all seeds."
    style.finish(figure, list(axes.flat), text)
    return style.save(figure, folder, "scaling")


def check(bench: Bench) -> None:
    """All that can be wrong with the benchmark's own arguments, before anything takes time."""
    if not bench.script.isidentifier() or not (ROOT / f"{bench.script}.py").is_file():
        throughput.fail(f"--script: got {bench.script}; takes a script of this repository")
    for name in ("num_envs", "num_seeds", "repeats"):
        if np.min(getattr(bench, name), initial=1) < 1:
            flag = f"--{name.replace('_', '-')}"
            throughput.fail(f"{flag}: got {getattr(bench, name)}; takes numbers of at least 1")
    most = max(bench.num_envs, default=1)
    if bench.one is None and any(most % number for number in bench.num_envs):
        throughput.fail(f"--num-envs: got {bench.num_envs}; takes divisors of the largest")
    if bench.draw and not bench.figure:
        throughput.fail("--draw: takes --figure beside it, the folder to draw to")


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    bench, rest = tyro.cli(Bench, args=sys.argv[1:at]), sys.argv[at + 1 :]
    check(bench)
    if bench.draw:
        try:
            result = json.loads(Path(bench.draw).read_text())
            kernels = [json.loads(Path(file).read_text()) for file in bench.kernels]
        except (OSError, ValueError) as error:
            throughput.fail(f"--draw or --kernels: takes files of these benchmarks ({error})")
        print(*draw(result, Path(bench.figure), kernels), sep="\n")
        return
    script, args = throughput.load(bench.script, rest)
    if bench.one:
        print(json.dumps(measure(bench, script, args)))
        return
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    result = {
        "command": shlex.join(["python", "benchmark/scaling.py", *sys.argv[1:]]),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None,
        "versions": {name: version(name) for name in throughput.PACKAGES},
        "script": bench.script,
        "env_id": args.env_id,
    }
    result["versions"]["python"] = platform.python_version()
    result |= timings(bench, rest)  # before this process takes the device's memory
    kind = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    result["device"] = f"{os.cpu_count()} cores" if jax.default_backend() == "cpu" else kind
    text = json.dumps(result, indent=1) + "\n"
    if bench.out is None:
        print(text, end="")
    else:
        Path(bench.out).write_text(text)
    if bench.figure:
        draw(result, Path(bench.figure), [])


if __name__ == "__main__":
    main()
