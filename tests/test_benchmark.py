"""What benchmark/throughput.py says of runs: the right programs, the right figures, in the right order.

Run as a program, it is the benchmark on a PointMass. Nothing here depends on how fast anything is.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from toy import PointMass

from benchmark import throughput

ROOT, TESTS = throughput.ROOT, Path(__file__).parent
SIZES = "--num-envs 4 --unroll-length 5 --batch-size 4 --num-minibatches 2 --update-epochs 2 --eval-envs 4"
SIZES = [*SIZES.split(), "--episode-length", "20"]


def positive(x):
    """Whether all numbers in nested dicts and lists are above 0 (0 is allowed for bytes of memory)."""
    if isinstance(x, dict):
        return all(positive(v) for k, v in x.items() if k != "memory_gb")
    return all(map(positive, x)) if isinstance(x, list) else x is None or isinstance(x, str) or x > 0


def bench(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *map(str, argv)])
    throughput.main()


def toy(*command, **env):
    """A program of this folder on a PointMass, in a process of its own."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}", **env}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(("name", "seeds"), [("gorl_fm_ppo", 2), ("ppo_gaussian", 1)])
def test_measure(name, seeds, make_args, monkeypatch):
    """Otherwise a figure of the README is of other work than it says, or missing."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "make_env", lambda args: PointMass())
    gorl = {"decoder_batch_size": 16, "decoder_buffer_size": 100} if name == "gorl_fm_ppo" else {}
    args = make_args(script, num_seeds=seeds, **gorl)
    run = throughput.Run(script, args, samples=1000)
    result = throughput.measure(run, script, args, repeats=2)
    phases = {"begin", "iteration", "evaluate", "physics", "rollout", "update"}
    phases |= {"decoder_epoch"} if gorl else set()
    assert phases == {k for k, v in result.items() if "all_seconds" in (v if isinstance(v, dict) else {})}
    assert positive(result)
    assert result["steps_per_iteration"] == 40 * seeds
    for phase in phases:
        assert len(result[phase]["all_seconds"]) == 2
        assert result[phase]["seconds"] == min(result[phase]["all_seconds"])
    for phase in ("physics", "rollout", "update", "iteration"):
        assert result[phase]["sps"] == pytest.approx(40 * seeds / result[phase]["seconds"])
    assert result["evaluate"]["sps"] == pytest.approx(4 * 20 * seeds / result["evaluate"]["seconds"])
    ratio = result["iteration"]["sps"] / result["physics"]["sps"]
    assert result["training_over_physics"] == pytest.approx(ratio)
    split = [result[name]["seconds"] for name in ("rollout", "update")]
    assert result["rollout_share"] == pytest.approx(split[0] / sum(split))
    if gorl:  # 25 rows of 4 pairs, in 6 batches of 16
        seconds = result["decoder_epoch"]["seconds"] / (96e-6 * seeds)
        assert result["decoder_seconds_per_million_samples_and_epoch"] == pytest.approx(seconds)
    assert set(result["memory_gb"]) == {"begin", "iteration", "evaluate"} | (
        {"decoder_epoch"} if gorl else set()
    )
    sizes = result["memory_gb"]["iteration"]
    assert sizes["argument"] > 0 and sizes["alias"] > 0  # donated
    total = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    assert sizes["total"] == pytest.approx(total)
    saved = result["checkpoint"]
    assert not gorl or saved["without_ring_bytes"] < saved["whole_bytes"]


def test_compare(make_args, monkeypatch):
    """Otherwise the speeds of the five scripts are compared with the wrong one's."""
    script = importlib.import_module("ppo_gaussian")
    monkeypatch.setattr(script, "make_env", lambda args: PointMass())
    scripts = {"one": (script, make_args(script)), "other": (script, make_args(script, seed=2))}
    result = throughput.compare(scripts, repeats=2)
    first, second = result["scripts"].values()
    assert first["over_first"] == 1
    assert second["over_first"] == pytest.approx(first["seconds"] / second["seconds"])
    assert "other" in throughput.report(result)


def test_programs_are_those_of_a_run(tmp_path):
    """Otherwise the benchmark measures programs that no user runs: what a run has cached must serve it."""
    args = ["--seed", "3", "--runs-dir", tmp_path, *SIZES, "--stage-timesteps", "40", "40"]
    args += ["--decoder-batch-size", "16", "--decoder-epochs", "1"]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/cache",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    toy(TESTS / "toy.py", "gorl_fm_ppo", *args, **cache)

    names = ("begin", "iteration", "evaluate", "decoder_epoch")  # the others are of single operations

    def programs():
        return {file.name for name in names for file in (tmp_path / "cache").glob(f"jit_{name}-*-cache")}

    before = programs()
    command = [
        TESTS / "test_benchmark.py",
        "--compile-only",
        "--scripts",
        "gorl_fm_ppo",
        "--decoder-samples",
        40,
    ]
    result = json.loads(toy(*command, "--", *args, **cache).stdout)
    assert len(before) >= len(names) and programs() == before
    assert set(result) == {*names, "start_up"}
    total = sum(result[program]["total"] for program in ("begin", "iteration", "evaluate"))
    assert result["start_up"] == pytest.approx(total)


def test_one_script(tmp_path):
    """Otherwise `--out` lacks a figure, or start-up is not that with an empty cache and then a full one."""
    out = tmp_path / "folder" / "result.json"
    command = [TESTS / "test_benchmark.py", "--scripts", "ppo_gaussian", "--repeats", "1", "--out", out]
    env = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "TOY_CACHES": f"{tmp_path}/caches"}
    done = toy(*command, "--", *SIZES, "--total-timesteps", "80", **env)
    result = json.loads(out.read_text())
    assert positive(result) and "{" not in done.stdout
    assert {"command", "commit", "device", "versions", "env_id", "num_envs", "peak_host_memory_gb"} <= set(
        result
    )
    for when in ("cold", "warm"):
        assert set(result["compile_seconds"][when]) == {"begin", "iteration", "evaluate", "start_up"}
        for program in ("begin", "iteration", "evaluate"):
            parts = result["compile_seconds"][when][program]
            assert parts["total"] == pytest.approx(parts["trace_lower"] + parts["compile"])
    cold, warm = map(int, (tmp_path / "caches").read_text().split())  # files in the cache as each one starts
    assert cold == 0 < warm
    for word in ("start-up", "physics", "training over physics", "in place", "peak host memory"):
        assert word in done.stdout


# A: a script that logs that it ran and writes what a run writes. The first iteration's speed does not count.
FAKE = """
import json, pathlib, sys
log, *_, runs_dir = sys.argv[1:]
with open(log, "a") as file:
    file.write("A")
run_dir = pathlib.Path(runs_dir) / "Env__fake__1__1"
run_dir.mkdir()
rows = [(1, 40, 7), (2, 40, 7), (1, 80, 1000), (2, 80, 1000), (1, 120, 2000), (2, 120, 2000), (1, 160, 9000)]
rows = [f"{seed},{step},{sps}" for seed, step, sps in rows + [(2, 160, 9000)]][: int(sys.argv[2])]
(run_dir / "train.csv").write_text("\\n".join(["seed,step,sps", *rows]) + "\\n")
(run_dir / "args.json").write_text(json.dumps({"env_id": "Env", "versions": {"device": "1 x fake"}}))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The benchmark with a fake A, as a function of B's code, rows that A writes, and options."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(throughput, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(b, *options, rows=8):
        command = f"{sys.executable} -c \"import sys; log = '{tmp_path}/log'; {b}\""
        options = ["--scripts", "fake", "--versus", command, *options, "--", tmp_path / "log", rows]
        bench(monkeypatch, *options)

    return run


def test_versus(fake, tmp_path, capsys):
    """Otherwise two programs are not compared in turn, or their ratio is upside down or of the wrong runs."""
    b = "open(log, 'a').write('B'); print('sps: 9'); print('sps:', f'{open(log).read().count(chr(66))},000')"
    fake(b, "--versus-sps", r"sps:\s*([\d.,]+)", "--out", str(tmp_path / "out.json"))
    assert (tmp_path / "log").read_text() == "ABABAB"
    result = json.loads((tmp_path / "out.json").read_text())
    assert [run["run"] for run in result["runs"]] == [*"ABABAB"]
    assert [run["sps"] for run in result["runs"]] == [2000, 1000, 2000, 2000, 2000, 3000]
    assert result["b_over_a"]["sps"] == {"pairs": [0.5, 1, 1.5], "median": 1, "min": 0.5, "max": 1.5}
    seconds = [run["seconds"] for run in result["runs"]]
    pairs = [seconds[i + 1] / seconds[i] for i in (0, 2, 4)]
    want = {"pairs": pairs, "median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
    assert result["b_over_a"]["seconds"] == want
    assert result["device"] == "1 x fake" and result["a_args"]["env_id"] == "Env"
    assert result["commands"]["A"].startswith("python fake.py ") and "-c" in result["commands"]["B"]
    text = capsys.readouterr().out
    assert "B / A" in text and "2,000" in text and "\n{" not in text


def test_versus_without_speeds(fake, tmp_path, capsys):
    """Otherwise commands that print no speed cannot be compared, nor runs of one iteration; JSON is lost."""
    fake("open(log, 'a').write('B')", "--rounds", "2", rows=2)
    assert (tmp_path / "log").read_text() == "ABAB"
    text = capsys.readouterr().out
    result = json.loads(text[text.index("\n{") :])
    assert set(result["b_over_a"]) == {"seconds"} and result["runs"][0]["sps"] is None
    assert "B / A" in text[: text.index("\n{")]


@pytest.mark.parametrize(
    ("b", "options", "rows", "words"),
    [
        ("print(1, 'no', file=sys.stderr); sys.exit('disk full')", [], 8, ["B", "status 1", "disk full"]),
        ("sys.exit(7)", [], 8, ["B", "status 7"]),
        ("pass", [], "eight", ["A", "status 1", "ValueError"]),
        ("print('sps: fast')", ["--versus-sps", "sps: (.*)"], 8, ["--versus-sps", "no number"]),
        ("print('quiet')", ["--versus-sps", "sps: (.*)"], 8, ["--versus-sps", "no number"]),
        ("print('sps: 1')", ["--versus-sps", "sps: (.*)"], 2, ["--versus-sps", "two iterations"]),
    ],
)
def test_failing_run(fake, b, options, rows, words, capsys):
    """Otherwise a failed command is taken for a fast one, or its message is lost in a traceback."""
    with pytest.raises(SystemExit) as ended:
        fake(b, *options, rows=rows)
    captured = capsys.readouterr()
    message = [line for line in captured.err.splitlines() if not line.startswith('{"run"')]
    assert ended.value.code == 1 and len(message) == 1 and not captured.out
    assert all(word in message[0] for word in words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--scripts", "ppo_gausian"], ["--scripts", "ppo_gausian"]),
        (["--scripts", "../main"], ["--scripts"]),
        (["--repeats", "0"], ["--repeats", "0"]),
        (["--versus", "no-such-command --x 1"], ["--versus", "no-such-command"]),
        (["--versus", ""], ["--versus"]),
        (["--versus", "echo 'open"], ["--versus", "quotation"]),
        (["--versus-sps", "(.)"], ["--versus-sps", "--versus"]),
        (["--versus", "echo", "--versus-sps", "sps"], ["--versus-sps", "group"]),
        (["--versus", "echo", "--versus-sps", "(sps"], ["--versus-sps"]),
        (["--out", "/dev/null/x.json"], ["--out", "/dev/null"]),
        (["--scripts", "ppo_gaussian", "--", "--num-envs", "-1"], ["--num-envs", "-1"]),
    ],
)
def test_wrong_arguments(argv, words, monkeypatch, capsys):
    """Otherwise a typing error is found after an hour of timing, or shown as a traceback."""
    with pytest.raises(SystemExit) as ended:
        bench(monkeypatch, *argv)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.err.count("\n") == 1 and not captured.out
    assert all(word in captured.err for word in words)


if __name__ == "__main__":
    playground = sys.modules["mujoco_playground"] = ModuleType("mujoco_playground")  # takes seconds to import
    playground.MjxEnv, playground.dm_control_suite = PointMass, ModuleType("dm_control_suite")
    playground.dm_control_suite.ALL_ENVS = ["HopperStand"]
    importlib.import_module(sys.argv[sys.argv.index("--scripts") + 1]).make_env = lambda args: PointMass()
    throughput.SELF[1] = __file__
    if "TOY_CACHES" in os.environ and "--compile-only" in sys.argv:  # how many programs are cached already
        folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
        with Path(os.environ["TOY_CACHES"]).open("a") as file:
            file.write(f"{len(list(folder.glob('*')))} ")
    throughput.main()


def scaling(*arguments):
    """benchmark/scaling.py with a point mass in Playground's place."""
    environment = os.environ | {"PYTHONPATH": str(TESTS / "fake_playground")}
    line = [sys.executable, ROOT / "benchmark/scaling.py", "--script", "ppo_gaussian", *arguments]
    return subprocess.run([*map(str, line)], env=environment, capture_output=True, text=True)


def test_scaling(tmp_path):
    """Otherwise a ratio in the README is of other runs than it says."""
    out, sizes = tmp_path / "out.json", [*SIZES, "--eval-every", "80", "--total-timesteps", "120"]
    done = scaling("--processes", "1", "2", "--rounds", "1", "--cores", "1", "--out", out, "--", *sizes)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [run["processes"] for run in result["runs"]] == [1, 2]
    sps = [run["sps"] for run in result["runs"]]
    assert positive(result["runs"]) and result["scaling"]["2"]["over_first"] == pytest.approx(sps[1] / sps[0])
    assert "--processes 1 2" in result["command"] and "2 process(es)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--processes", "0"], 2, "--processes"),
        (["--script", "nothing"], 2, "--script: got nothing"),
        (["--processes", "1", "--", *SIZES, "--total-timesteps", "40"], 1, "two iterations"),
        (["--processes", "2", "--", *SIZES, "--num-envs", "3"], 1, "--num-envs: got 3"),
    ],
)
def test_scaling_refuses(arguments, status, message):
    """Otherwise a mistake costs the time of a run, or a traceback says nothing."""
    done = scaling(*arguments)
    assert done.returncode == status and message in done.stderr, done.stderr
