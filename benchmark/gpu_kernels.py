r"""Kernels and memory of a script's programs on an NVIDIA H100, counted on a machine without one.

    pip install -r requirements.txt "jax[cuda13]"
    python benchmark/gpu_kernels.py gorl_fm_ppo -- --env-id HopperStand

After `--` come the script's arguments. XLA compiles each program for a description of the device.
A kernel is here an instruction of the compiled program that starts something on the device: a
fusion, a copy, a product of matrices, a sort or a call of a library, which counts as one though it
may start several. Those in a loop count once for each pass. Where the number of passes depends on
the data, as in MJX's Newton solver, `--open-passes` are assumed (HopperStand's limit is 4); such a
loop also asks the host before each pass, which takes longer than a kernel and is not counted.
Nothing is tuned without the device, so that its own program may differ in its products. CUDA graphs
start many kernels at once: the counts are of kernels, not of launches.

A control step steps all environments of all seeds once. Memory is the program's: its arguments,
results and temporaries. Prints a table, and writes JSON with `--out`.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in the scripts

import jax
import tyro
from jax.experimental import topologies

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("iteration", "evaluate", "decoder_epoch")

# What XLA asks about a device. The numbers are those of NVIDIA's H100 SXM.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Count:
    """Counts a script's kernels on an H100 that is not there."""

    script: tyro.conf.Positional[str]  # of this repository, as gorl_fm_ppo
    programs: tuple[str, ...] = PROGRAMS  # of these three; only GoRL has decoder_epoch
    open_passes: int = 4  # assumed of a loop that ends when its data say so
    out: str | None = None  # a file for the JSON


# --- the compiled program ---
# Instructions for which nothing is started on the device.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
FREE |= {"partition-id", "replica-id", "opt-barrier", "add-dependency"}
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][a-z0-9\-]*)\(")


def computations(text: str) -> dict[str, list[tuple[str, str]]]:
    """(operation, line) of each instruction, by computation; the entry's name is ENTRY."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        if match := HEAD.match(line):
            instructions = found.setdefault("ENTRY" if match[1] else match[2], [])
        elif match := INSTRUCTION.match(line):
            instructions.append((match[1], line))
    return found


def called(line: str, *names: str) -> list[str]:
    """The computations that an instruction names as one of its attributes."""
    found = [re.search(rf" {name}=(\{{[^}}]*\}}|[^, ]+)", line) for name in names]
    return [word for match in found if match for word in re.findall(r"[\w.\-]+", match[1])]


class Loop(NamedTuple):
    depth: int
    passes: int | None  # None: it depends on the data
    kernels: int  # of one pass, with those of the loops within
    name: str  # where the loop stands in the traced program


def count(text: str, open_passes: int) -> tuple[int, list[Loop]]:
    """Kernels of a compiled module's text, and its loops, each after the one that it stands in."""
    module = computations(text)

    def walk(computation: str, depth: int) -> tuple[int, list[Loop]]:
        kernels = 0
        loops: list[Loop] = []
        for operation, line in module[computation]:
            if operation == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                passes = int(known[1]) if known else None
                # XLA counts passes itself where it can, and asks the loop's condition otherwise.
                names = called(line, "body", *(() if known else ("condition",)))
                parts = [walk(name, depth + 1) for name in names]
                one_pass = sum(part[0] for part in parts)
                kernels += 0 if known else parts[1][0]  # it is asked once more than it goes on
                name = re.search(r'op_name="([^"]*)"', line)
                loops.append(Loop(depth, passes, one_pass, name[1] if name else ""))
                loops += [loop for part in parts for loop in part[1]]
                kernels += one_pass * (open_passes if passes is None else passes)
            elif operation in ("call", "conditional"):
                names = ("to_apply", "branch_computations", "true_computation", "false_computation")
                parts = [walk(name, depth) for name in called(line, *names)]
                kernels += max((part[0] for part in parts), default=0)
                loops += [loop for part in parts for loop in part[1]]
            elif operation not in FREE and not operation.endswith("-done"):
                kernels += 1
        return kernels, loops

    return walk("ENTRY", 0)


# --- the scripts' programs ---
def examples(script: Any, args: Any, env: Any) -> dict[str, tuple]:
    """Each program: its function of a seed, examples of its arguments for all, axes of seeds."""
    gorl = hasattr(script, "decoder_epoch")
    keys = jax.ShapeDtypeStruct((args.num_seeds, 2), "uint32")
    init = partial(script.init_state, args, env, **({"stage": 0} if gorl else {}))
    state = jax.eval_shape(jax.vmap(init), keys)
    deterministic = jax.ShapeDtypeStruct((args.eval_envs, 1), "bool") if gorl else True
    found = {
        "iteration": (script.iteration, (state, 0.2) if gorl else (state,), (0, None)[: 1 + gorl]),
        "evaluate": (script.evaluate, (state.agent, keys, deterministic), (0, 0, None)),
    }
    if gorl:
        learner = (state.agent.decoder, state.agent, state.recent, keys, 0)
        found["decoder_epoch"] = (script.decoder_epoch, learner, (0, 0, 0, 0, None))
    return found


def repeated(name: str, args: Any) -> dict[str, int]:
    """What a program's outer loops repeat, and how often."""
    if name == "iteration":
        minibatches = args.update_epochs * args.num_minibatches
        steps = args.steps_per_iteration // args.num_envs
        return {"control step": steps, "minibatch": minibatches}
    if name == "evaluate":
        return {"control step of an evaluation": args.episode_length}
    return {"minibatch of a decoder": args.decoder_pairs // args.decoder_batch_size - 1}


def compile_for_h100(f: Any, xs: tuple, axes: tuple, num_seeds: int, donate: tuple) -> Any:
    """A function of one seed, for all as in the scripts, compiled for an H100."""
    topology = {"platform": "cuda", "target_config": H100, "topology": "1x1x1"}
    device = topologies.get_topology_desc(**topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shape(x):
        x = jax.api_util.shaped_abstractify(x)
        weak = {"weak_type": x.weak_type}
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, **weak)

    def one_seed(*xs):
        xs = [
            x if a is None else jax.tree.map(lambda y: y[0], x)
            for x, a in zip(xs, axes, strict=True)
        ]
        return jax.tree.map(lambda y: y[None], f(*xs))

    mapped = one_seed if num_seeds == 1 else jax.vmap(f, axes)
    jitted = jax.jit(mapped, out_shardings=sharding, donate_argnums=donate)
    traced = jitted.trace(*jax.tree.map(shape, xs))
    return traced.lower(lowering_platforms=("cuda",)).compile()


def measure(bench: Count, script: Any, args: Any) -> dict[str, Any]:
    """Kernels, loops, memory and seconds of compilation of each program."""
    env = script.make_env(args)
    found = examples(script, args, env)
    result = {}
    for name in [name for name in bench.programs if name in found]:
        f, xs, axes = found[name]
        f = partial(f, args) if name == "decoder_epoch" else partial(f, args, env)
        start = time.perf_counter()
        donate = (0,) if name == "iteration" else ()
        program = compile_for_h100(f, xs, axes, args.num_seeds, donate)
        kernels, loops = count(program.as_text(), bench.open_passes)
        memory = program.memory_analysis()
        sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes)
        total = sum(sizes) - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        outer = [loop for loop in loops if loop.depth == 0]
        of_one = {}
        for what, passes in repeated(name, args).items():
            found_loops = [loop.kernels for loop in outer if loop.passes == passes]
            of_one[what] = found_loops[0] if len(found_loops) == 1 else None  # not told apart
        result[name] = {
            "kernels": kernels,
            "kernels_of_one": of_one,
            "memory_gb": total / 1e9,
            "compile_seconds": time.perf_counter() - start,
            "loops": [loop._asdict() for loop in loops],
        }
        print(f"{name}: {kernels:,} kernels", file=sys.stderr, flush=True)
    return result


# --- for a reader ---
def report(programs: dict[str, Any]) -> str:
    lines = [f"{'':32}{'kernels':>12}{'GB':>10}"]
    for name, found in programs.items():
        lines.append(f"{name:32}{found['kernels']:12,}{found['memory_gb']:10.3f}")
        for what, n in found["kernels_of_one"].items():
            lines.append(f"  {what:30}{'-' if n is None else format(n, ','):>12}")
    return "\n".join(lines)


def fail(message: str) -> NoReturn:
    print(f"gpu_kernels.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(bench: Count) -> None:
    if not bench.script.isidentifier() or not (ROOT / f"{bench.script}.py").is_file():
        fail(f"SCRIPT: got {bench.script}; takes a script of this repository, as gorl_fm_ppo")
    if not bench.programs or set(bench.programs) - set(PROGRAMS):
        fail(f"--programs: got {' '.join(bench.programs)}; takes some of {' '.join(PROGRAMS)}")
    if bench.open_passes < 1:
        fail(f"--open-passes: got {bench.open_passes}; takes a number of at least 1")
    try:
        if bench.out:
            Path(bench.out).open("a").close()
    except OSError as error:
        fail(f"--out: got {bench.out}; takes a file to write to ({error})")
    try:
        version("jax-cuda13-plugin")
    except PackageNotFoundError:
        fail('needs JAX\'s CUDA wheels (no GPU): pip install -r requirements.txt "jax[cuda13]"')


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    bench, rest = tyro.cli(Count, args=sys.argv[1:at]), sys.argv[at + 1 :]
    check(bench)
    jax.config.update("jax_platforms", "cpu")  # where values live; the GPU is only described
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # which would ask a driver
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(bench.script)
    with patch.object(sys, "argv", [f"{bench.script}.py", *rest]):
        args = script.parse_args()
    programs = measure(bench, script, args)
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    about = {
        "command": shlex.join(["python", "benchmark/gpu_kernels.py", *sys.argv[1:]]),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "mujoco-mjx", "playground")},
        "env_id": args.env_id,
        "num_envs": args.num_envs,
        "num_seeds": args.num_seeds,
        "open_passes": bench.open_passes,
    }
    print(f"{about['command']}\n\n{report(programs)}")
    if bench.out:
        Path(bench.out).write_text(json.dumps(about | {"programs": programs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
