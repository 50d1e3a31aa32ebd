"""What benchmark/throughput.py says of runs: the right programs, the right figures, in the right
order.

Run as a program, it is the benchmark on a PointMass. Nothing here depends on how fast anything is.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from toy import PointMass

from benchmark import scaling, throughput

ROOT, TESTS = throughput.ROOT, Path(__file__).parent
SIZES = (
    "--num-envs 4 --unroll-length 5 --batch-size 4 --num-minibatches 2 --update-epochs 2 "
    "--eval-envs 4 --episode-length 20"
).split()


def positive(x):
    """Whether all numbers in nested dicts and lists are above 0."""
    if isinstance(x, dict):
        return all(map(positive, x.values()))
    return (
        all(map(positive, x)) if isinstance(x, list) else x is None or isinstance(x, str) or x > 0
    )


def bench(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *map(str, argv)])
    throughput.main()


def toy(*command, **env):
    """A program of this folder on a PointMass, in a process of its own."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}", **env}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(("name", "seeds"), [("gorl_fm_ppo", 2), ("ppo_gaussian", 1)])
def test_measure(name, seeds, make_args, monkeypatch):
    """Otherwise a figure of the README is of other work than it says, or missing."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "make_env", lambda args: PointMass())
    args = make_args(script, num_seeds=seeds)
    run = throughput.Run(script, args, samples=1000)
    result = throughput.measure(run, script, args, repeats=2)
    phases = {"iteration", "evaluate", "physics", "rollout"}
    if name == "gorl_fm_ppo":
        phases.add("decoder_epoch")
    timed = {k for k, v in result.items() if isinstance(v, dict) and "all_seconds" in v}
    assert timed == phases and positive(result)
    assert result["steps_per_iteration"] == 40 * seeds
    for phase in phases:
        assert len(result[phase]["all_seconds"]) == 2
        assert result[phase]["seconds"] == min(result[phase]["all_seconds"])
    for phase in ("physics", "rollout", "iteration"):
        assert result[phase]["sps"] == pytest.approx(40 * seeds / result[phase]["seconds"])
    sps = 4 * 20 * seeds / result["evaluate"]["seconds"]
    assert result["evaluate"]["sps"] == pytest.approx(sps)
    share = result["rollout"]["seconds"] / result["iteration"]["seconds"]
    assert result["rollout_share"] == pytest.approx(share)
    if name == "gorl_fm_ppo":  # 40 pairs are a batch of 16, one held out and 8 others
        seconds = result["decoder_epoch"]["seconds"] / (16e-6 * seeds)
        assert result["decoder_seconds_per_million_samples_and_epoch"] == pytest.approx(seconds)


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
    """Otherwise the benchmark measures programs that no user runs: a run's cache must serve it."""
    args = ["--seed", "3", "--runs-dir", tmp_path, *SIZES, "--stage-timesteps", "40", "40"]
    args += ["--decoder-batch-size", "16", "--decoder-epochs", "1", "--decoder-buffer-size", "40"]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/cache",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    toy(TESTS / "toy.py", "gorl_fm_ppo", *args, **cache)
    # The others are of single operations.
    names = ("init_state", "iteration", "evaluate", "decoder_epoch")

    def programs():
        return {file.name for name in names for file in (tmp_path / "cache").glob(f"jit_{name}-*")}

    before = programs()
    command = ["--compile-only", "--scripts", "gorl_fm_ppo", "--decoder-samples", 40]
    result = json.loads(toy(TESTS / "test_benchmark.py", *command, "--", *args, **cache).stdout)
    assert len(before) >= len(names) and programs() - before == set()
    assert set(result) == {*names, "make_env", "start_up"}
    total = sum(result[name] for name in ("make_env", "init_state", "iteration", "evaluate"))
    assert result["start_up"] == pytest.approx(total)


def test_one_script(tmp_path):
    """Otherwise `--out` lacks a figure, or start-up is not that with an empty and a full cache."""
    out = tmp_path / "folder" / "result.json"
    command = [TESTS / "test_benchmark.py", "--scripts", "ppo_gaussian", "--repeats", "1"]
    env = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TOY_CACHES": f"{tmp_path}/caches",
    }
    done = toy(*command, "--out", out, "--", *SIZES, "--total-timesteps", "80", **env)
    result = json.loads(out.read_text())
    assert positive(result) and "{" not in done.stdout
    names = {"command", "commit", "device", "versions", "env_id", "num_envs"}
    assert names | {"peak_host_memory_gb"} <= set(result)
    parts = {"make_env", "init_state", "iteration", "evaluate", "start_up"}
    assert set(result["start_up_seconds"]["cold"]) == parts
    assert set(result["start_up_seconds"]["warm"]) == parts
    # Files in the cache as each one starts:
    cold, warm = map(int, (tmp_path / "caches").read_text().split())
    assert cold == 0 < warm
    for word in ("start-up", "physics", "rollout share", "peak host memory"):
        assert word in done.stdout


# A: a script that logs that it ran and writes what a run writes. The speed of the first iteration
# does not count.
FAKE = """
import json, pathlib, sys
log, *_, runs_dir = sys.argv[1:]
with open(log, "a") as file:
    file.write("A")
run_dir = pathlib.Path(runs_dir) / "Env__fake__1__1"
run_dir.mkdir()
speeds = [(40, 7), (80, 1000), (120, 2000), (160, 9000)]
rows = [f"{seed},{step},{sps}" for step, sps in speeds for seed in (1, 2)][: int(sys.argv[2])]
(run_dir / "train.csv").write_text("\\n".join(["seed,step,sps", *rows]) + "\\n")
args = {"env_id": "Env", "versions": {"device": "1 x fake"}}
(run_dir / "args.json").write_text(json.dumps(args))
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
    """Otherwise two programs are not compared in turn, or their ratio is upside down or of the
    wrong runs.
    """
    b = "open(log, 'a').write('B'); print('sps: 9'); "
    b += "print('sps:', f'{open(log).read().count(chr(66))},000')"
    fake(b, "--versus-sps", r"sps:\s*([\d.,]+)", "--out", str(tmp_path / "out.json"))
    assert (tmp_path / "log").read_text() == "ABABAB"
    result = json.loads((tmp_path / "out.json").read_text())
    assert [run["run"] for run in result["runs"]] == [*"ABABAB"]
    assert [run["sps"] for run in result["runs"]] == [2000, 1000, 2000, 2000, 2000, 3000]
    assert result["b_over_a"]["sps"] == {
        "pairs": [0.5, 1, 1.5],
        "median": 1,
        "min": 0.5,
        "max": 1.5,
    }
    seconds = [run["seconds"] for run in result["runs"]]
    pairs = [seconds[i + 1] / seconds[i] for i in (0, 2, 4)]
    want = {
        "pairs": pairs,
        "median": statistics.median(pairs),
        "min": min(pairs),
        "max": max(pairs),
    }
    assert result["b_over_a"]["seconds"] == want
    assert result["device"] == "1 x fake" and result["a_args"]["env_id"] == "Env"
    assert result["commands"]["A"].startswith("python fake.py ") and "-c" in result["commands"]["B"]
    text = capsys.readouterr().out
    assert "B / A" in text and "2,000" in text and "\n{" not in text


def test_versus_without_speeds(fake, tmp_path, capsys):
    """Otherwise commands that print no speed cannot be compared, nor runs of one iteration; JSON is
    lost.
    """
    fake("open(log, 'a').write('B')", "--rounds", "2", rows=2)
    assert (tmp_path / "log").read_text() == "ABAB"
    text = capsys.readouterr().out
    result = json.loads(text[text.index("\n{") :])
    assert set(result["b_over_a"]) == {"seconds"} and result["runs"][0]["sps"] is None
    assert "B / A" in text[: text.index("\n{")]


@pytest.mark.parametrize(
    ("b", "options", "rows", "words"),
    [
        (
            "print(1, 'no', file=sys.stderr); sys.exit('disk full')",
            [],
            8,
            ["B", "status 1", "disk full"],
        ),
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
    script = importlib.import_module(sys.argv[sys.argv.index("--scripts") + 1])
    script.make_env = lambda args: PointMass()
    throughput.SELF[1] = __file__
    if "TOY_CACHES" in os.environ and "--compile-only" in sys.argv:
        cached = list(Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*"))
        with Path(os.environ["TOY_CACHES"]).open("a") as file:
            file.write(f"{len(cached)} ")
    throughput.main()


@pytest.mark.parametrize(("name", "one"), [("gorl_fm_ppo", "num_envs"), ("fpo", "num_seeds")])
def test_scaling_measures_what_it_says(name, one, make_args, monkeypatch):
    """Otherwise a point of the figure is of another number of environments or seeds."""
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "make_env", lambda args: PointMass())
    calls = {"rollout": [], "iteration": []}
    for function in calls:
        original = getattr(script, function)

        def noted(args, *rest, function=function, original=original):
            calls[function].append((args.num_envs, args.num_seeds))
            return original(args, *rest)

        noted.__name__ = function
        monkeypatch.setattr(script, function, noted)
    args = make_args(script, num_envs=4, num_seeds=1)
    bench = scaling.Bench(**{one: (2,)}, script=name, one=one, repeats=1)
    row = scaling.measure(bench, script, args)
    assert row["number"] == 2 and row["sps"] > 0 and row["peak_host_memory_gb"] > 0
    want = (2, 1) if one == "num_envs" else (4, 2)
    assert set(calls["rollout"]) == {want} and bool(calls["iteration"]) == (one == "num_seeds")


def test_scaling_asks_for_the_same_steps_and_draws(tmp_path, monkeypatch):
    """Otherwise rollouts of other lengths are compared, or the figure lacks a point."""
    commands = []

    def run_process(what, command):
        commands.append(command)
        number = int(command[command.index("--") - 1])
        row = {"number": number, "sps": 10.0 * number, "peak_host_memory_gb": 1.0}
        return 1.0, f"noise\n{json.dumps(row)}\n", ""

    monkeypatch.setattr(throughput, "run_process", run_process)
    out = tmp_path / "scaling.json"
    argv = ["--num-envs", "8", "16", "--num-seeds", "1", "3", "--out", out]
    monkeypatch.setattr(sys, "argv", list(map(str, ["scaling.py", *argv, "--", "--preset", "cpu"])))
    scaling.main()
    result = json.loads(out.read_text())
    assert [row["number"] for row in result["num_envs"]] == [8, 16]
    assert [row["number"] for row in result["num_seeds"]] == [1, 3]
    for command, number in zip(commands[:2], ("8", "16"), strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["x.py", *command[command.index("--") + 1 :]])
            args = importlib.import_module("gorl_fm_ppo").parse_args()
        assert (args.num_envs, args.steps_per_iteration) == (int(number), 16 * 30)
    assert all("--batch-size" not in command for command in commands[2:])
    argv = ["scaling.py", "--draw", str(out), "--figure", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    scaling.main()
    without = (tmp_path / "scaling.png").stat().st_size
    sheets = sorted((ROOT / "results/throughput").glob("gpu_kernels_scaling_*.json"))
    monkeypatch.setattr(sys, "argv", [*argv, "--kernels", *map(str, sheets)])
    scaling.main()
    assert (tmp_path / "scaling.png").stat().st_size > without > 10_000


@pytest.mark.parametrize(
    ("flag", "argv"),
    [
        ("--script", "--script no_such_script"),
        ("--num-envs", "--num-envs 64 100"),
        ("--num-seeds", "--num-seeds 0"),
        ("--draw", "--draw results/README.md --figure there"),
        ("--draw", "--draw results/README.md"),
    ],
)
def test_scaling_says_what_is_wrong(flag, argv, monkeypatch, capsys):
    """Otherwise a mistake is found after minutes of compilation, or ends in a traceback."""
    monkeypatch.setattr(sys, "argv", ["scaling.py", *argv.split()])
    with pytest.raises(SystemExit) as stop:
        scaling.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flag in error and error.count("\n") == 1
