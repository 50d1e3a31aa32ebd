"""Memory that compiled iterations ask for at the paper's sizes, by script and number of seeds; none is run.

    python benchmark/memory.py --out results/throughput/memory.json -- --env-id HopperStand

After `--` come the arguments of the scripts. In GB: the state (arguments of the iteration, updated in place),
the decoder's data in it, and temporaries, by the compiler's own accounting for the device at hand.
"""

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from throughput import ROOT, programs

sys.path.insert(0, str(ROOT))
SCRIPTS = ("ppo_gaussian", "gorl_fm_ppo", "gorl_diff_ppo", "fpo", "dppo")


@dataclass(frozen=True)
class Bench:
    """Memory of compiled iterations."""

    scripts: tuple[str, ...] = SCRIPTS
    seeds: tuple[int, ...] = (1, 5)
    out: str | None = None  # a file for the JSON


def memory(script: Any, args: Any) -> dict[str, float]:
    found, now = programs(script, args), (0, 0)
    keys = jnp.zeros((args.num_seeds, 2), jnp.uint32)
    state = jax.eval_shape(lambda: found["begin"](keys, 0))
    ring = {}
    if hasattr(state, "ring"):
        state, ring = state.replace(learner=None), state.ring
    stats = found["iteration"].lower(state, keys, 0, *[now] * bool(ring)).compile().memory_analysis()
    sizes = {"state": stats.argument_size_in_bytes, "temporary": stats.temp_size_in_bytes}
    sizes["not_in_place"] = stats.output_size_in_bytes - stats.alias_size_in_bytes
    sizes |= {"total": sum(sizes.values()), "decoder_data": sum(x.size * 4 for x in ring.values())}
    return {name: size / 1e9 for name, size in sizes.items()}


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    command = " ".join(["python benchmark/memory.py", *sys.argv[1:]])
    bench, rest = tyro.cli(Bench, args=sys.argv[1:at]), sys.argv[at + 1 :]
    commit = subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty")
    result: dict[str, Any] = {"command": command, "commit": commit, "jax": jax.__version__}
    result["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    jax.config.update("jax_default_matmul_precision", "highest")
    for name in bench.scripts:
        script = importlib.import_module(name)
        sys.argv = [f"{name}.py", *rest]
        args = script.parse_args()
        script.check(args)
        for seeds in bench.seeds:
            result[f"{name}, {seeds} seeds"] = found = memory(script, replace(args, num_seeds=seeds))
            print(name, seeds, {key: round(gb, 3) for key, gb in found.items()}, flush=True)
    if bench.out:
        Path(bench.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
