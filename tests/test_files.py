"""Checkpoints, and runs of the whole training loop on an environment that compiles fast."""

import csv
import json
import shutil
import sys
from contextlib import nullcontext
from zipfile import ZIP_STORED, ZipFile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GORL, SCRIPTS, PointMass, name_of
from flax import struct

import gorl_fm_ppo
import ppo_gaussian


@struct.dataclass
class Tree:
    net: list
    count: np.int32


TREE = Tree([{"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}], np.int32(7))
LIKE = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE))
COMMON = (
    "--num-envs 4 --batch-size 4 --num-minibatches 2 --unroll-length 5 --update-epochs 2 --num-seeds 2 "
    "--total-timesteps 240 --eval-every 40 --eval-envs 3 --episode-length 20"
).split()
DECODER = "--decoder-epochs 2 --decoder-buffer-size 60 --decoder-batch-size 16".split()
STAGES = "--stage-timesteps 80 80 40 40 --clip-eps 0.1 0.2 --kl-coef 1 2 3".split()
TINY = [*COMMON, *STAGES, *DECODER]
TWO = [
    gorl_fm_ppo,
    ppo_gaussian,
]  # the others' loops are to the letter those of one of these (test_shared.py)
TABLES = "eval", "train", "decoder", "refine"


@pytest.fixture
def saved(tmp_path):
    gorl_fm_ppo.save_arrays(tmp_path / "x.npz", TREE, done=3, bytes={"eval.csv": 5})
    return tmp_path / "x.npz"


def test_arrays_round_trip(saved):
    """Otherwise resuming or loading a policy changes its numbers."""
    tree, meta = gorl_fm_ppo.load_arrays(saved, LIKE)
    jax.tree.map(np.testing.assert_array_equal, tree, TREE)
    assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(lambda x: x.dtype, LIKE)
    assert meta == {"done": 3, "bytes": {"eval.csv": 5}} and [f.name for f in saved.parent.iterdir()] == [
        "x.npz"
    ]


def test_no_damaged_byte_changes_a_number(saved):
    """Otherwise a run goes on from wrong weights, and nobody notices."""
    content, raised = saved.read_bytes(), 0
    for i in range(len(content)):
        saved.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            tree, meta = gorl_fm_ppo.load_arrays(saved, LIKE)
        except Exception:
            raised += 1
        else:  # a date or another byte that nothing is read from
            jax.tree.map(np.testing.assert_array_equal, tree, TREE)
            assert meta == {"done": 3, "bytes": {"eval.csv": 5}}
    assert raised > len(content) / 2


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_file_raises(saved, kept):
    """Otherwise a full disk ends in a policy of half its weights."""
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(Exception, match=r"."):
        gorl_fm_ppo.load_arrays(saved, LIKE)


@pytest.mark.parametrize(
    "leaf", [jax.ShapeDtypeStruct((3, 2), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.int32)]
)
def test_another_networks_file_raises(saved, leaf):
    """Otherwise the message does not say what differs, or weights are broadcast."""
    with pytest.raises(ValueError, match=r"net.*kernel.*float32\(2, 3\)"):
        gorl_fm_ppo.load_arrays(saved, LIKE.replace(net=[{"kernel": leaf}]))
    with pytest.raises((KeyError, ValueError)):
        gorl_fm_ppo.load_arrays(saved, LIKE.replace(net=[*LIKE.net, LIKE.count]))


class Exploit:
    def __reduce__(self):
        return pytest.fail, ("code of the file was run",)


def test_pickles_are_refused(saved):
    """Otherwise loading a stranger's checkpoint runs the stranger's code."""
    array = np.empty((), object)
    array[()] = Exploit()
    with ZipFile(saved) as file:
        name = next(name for name in file.namelist() if "kernel" in name)
        others = {other: file.read(other) for other in file.namelist() if other != name}
    np.save(saved.with_name("evil.npy"), array, allow_pickle=True)
    with ZipFile(saved, "w", ZIP_STORED) as file:
        file.write(saved.with_name("evil.npy"), name)
        for other, content in others.items():
            file.writestr(other, content)
    with pytest.raises(ValueError, match="allow_pickle"):
        gorl_fm_ppo.load_arrays(saved, LIKE)


# --- the training loop ---


def run(script, *arguments):
    """main() on a PointMass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_env", lambda args: PointMass())
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        patch.setattr(script.signal, "signal", lambda *_: None)
        assert script.main() == 0


@pytest.fixture(scope="module", params=SCRIPTS, ids=name_of)
def finished(request, tmp_path_factory):
    """A script, its tiny arguments and the directory of its finished run."""
    script, runs = request.param, tmp_path_factory.mktemp("runs")
    tiny = TINY if script in GORL else COMMON
    run(script, *tiny, "--runs-dir", runs)
    return script, tiny, next(runs.iterdir())


def table(run_dir, name):
    if not (run_dir / f"{name}.csv").exists():
        return []
    with (run_dir / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "time" not in k and "sps" not in k} for row in rows]


def same_tables(a, b):
    for name in TABLES:
        assert table(a, name) == table(b, name)


def test_files_of_a_finished_run(finished):
    """Otherwise plots and tools cannot read all methods' runs alike."""
    script, _, run_dir = finished
    evals, train = table(run_dir, "eval"), table(run_dir, "train")
    assert [int(row["step"]) for row in evals if row["seed"] == "1"] == list(range(0, 241, 40))
    assert len(train) == 12 and list(train[0])[:3] == ["seed", "step", "stage"]
    stages = [int(row["stage"]) for row in train if row["seed"] == "2"]
    assert stages == ([0, 0, 1, 1, 2, 3] if script in GORL else [0] * 6)
    assert all(np.isfinite(float(v)) for row in train + evals for v in row.values())
    want = {"approx_kl", "clip_fraction", "explained_variance", "nan_resets", "u_std"}
    assert want <= set(train[0])
    policies = {f.name for f in run_dir.glob("checkpoints/policy_*")}
    steps = (80, 160, 200, 240) if script in GORL else (240,)
    assert policies == {f"policy_{step}.npz" for step in steps}
    assert bool(table(run_dir, "decoder")) == (script in GORL)
    stored = json.loads((run_dir / "args.json").read_text(), parse_constant=pytest.fail)  # no Infinity
    assert stored["versions"]["script"] == f"{script.__name__}.py"


def test_policies_of_a_finished_run(finished, monkeypatch):
    """Otherwise a saved policy acts differently from the trained one, or not at all."""
    script, _, run_dir = finished
    monkeypatch.setattr(script, "make_env", lambda args: PointMass())
    keys, obs = jax.random.split(jax.random.PRNGKey(0)), np.random.default_rng(0).normal(size=(2, 3, 3))
    policy, obs = script.load_policy(str(run_dir)), jnp.array(obs, jnp.float32)
    u = policy(obs, keys[0], deterministic=True)
    assert u.shape == (2, 3, 2)
    np.testing.assert_array_equal(u, policy(obs, keys[0], deterministic=True))
    draws_start_noise = script.__name__ in ("fpo", "dppo")
    assert np.array_equal(u, policy(obs, keys[1], deterministic=True)) != draws_start_noise
    assert not np.allclose(policy(obs, keys[1]), policy(obs, keys[0]))
    assert not np.allclose(u, script.load_policy(str(run_dir), seed=2)(obs, keys[0], True))
    for wrong in ({"step": 161}, {"seed": 3}):
        with pytest.raises(ValueError, match="240"):
            script.load_policy(str(run_dir), **wrong)


@pytest.mark.parametrize("finished", TWO, indirect=True, ids=name_of)
def test_killed_before_the_first_checkpoint(finished, tmp_path):
    """Otherwise --resume of such a run fails, or doubles the rows of step 0."""
    script, _, finished_dir = finished
    run_dir = shutil.copytree(finished_dir, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    (run_dir / "notes.csv").write_text("mine")
    before = {path.name: path.read_text() for path in run_dir.glob("*.csv")}
    with pytest.raises(SystemExit):  # it has trained, so that its checkpoints are lost
        run(script, "--resume", run_dir)
    assert before == {path.name: path.read_text() for path in run_dir.glob("*.csv")}
    for name in TABLES[1:]:
        (run_dir / f"{name}.csv").unlink(missing_ok=True)
    run(script, "--resume", run_dir)
    assert (run_dir / "notes.csv").read_text() == "mine"
    same_tables(run_dir, finished_dir)


@pytest.mark.parametrize("finished", TWO, indirect=True, ids=name_of)
def test_a_longer_budget_on_resuming(finished, tmp_path):
    """Otherwise a finished run that is prolonged is not the longer run from the start."""
    script, tiny, finished_dir = finished
    run_dir = shutil.copytree(finished_dir, tmp_path / "run")
    run(script, "--resume", run_dir, "--total-timesteps", 320)
    longer = ["--total-timesteps", "320"]
    if script in GORL:
        longer += ["--stage-timesteps", "80", "80", "40", "120"]
    run(script, *tiny, *longer, "--runs-dir", tmp_path / "runs")
    rows = [row for row in table(next((tmp_path / "runs").iterdir()), "train") if int(row["step"]) > 240]
    assert [row for row in table(run_dir, "train") if int(row["step"]) > 240] == rows and len(rows) == 4
    stored = json.loads((run_dir / "args.json").read_text())
    assert stored["total_timesteps"] == 320
    assert stored.get("stage_timesteps", [80, 80, 40, 120]) == [80, 80, 40, 120]


@pytest.mark.parametrize(
    "change", ["--gamma 0.9", "--num-seeds 3", "--total-timesteps 200", "--clip-eps 0.4"]
)
def test_resuming_with_other_arguments(finished, change, monkeypatch, capsys):
    """Otherwise one run's log mixes two settings."""
    script, _, run_dir = finished
    monkeypatch.setattr(sys, "argv", ["x.py", "--resume", str(run_dir), *change.split()])
    with pytest.raises(SystemExit) as stopped:
        script.parse_args()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and change.split()[0] in error and error.count("\n") == 1


def test_another_scripts_run_is_refused(finished, monkeypatch, capsys):
    """Otherwise a run goes on with another method's weights, or ends in a traceback."""
    script, _, run_dir = finished
    for other in SCRIPTS:
        monkeypatch.setattr(sys, "argv", ["x.py", "--resume", str(run_dir)])
        if other is script:
            assert other.parse_args().resume == str(run_dir)
            continue
        with pytest.raises(SystemExit) as stopped:
            other.parse_args()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "--resume" in error and other.__name__ in error


@pytest.fixture(params=GORL, ids=name_of)
def gorl(request):
    return request.param


def test_coefficients_of_stages(gorl, tmp_path, monkeypatch):
    """Otherwise a stage trains with another stage's clip range, gradient norm or beta."""
    update = gorl.update

    def logged(args, *x):
        coefs = {name: getattr(args, name) for name in ("clip_eps", "kl_coef", "max_grad_norm")}
        agent, metrics = update(args, *x)
        return agent, metrics | coefs

    monkeypatch.setattr(gorl, "update", logged)
    run(gorl, *TINY, "--runs-dir", tmp_path, "--max-grad-norm", "0.5")
    rows = table(next(tmp_path.iterdir()), "train")[::2]
    got = [tuple(float(r[k]) for k in ("stage", "clip_eps", "kl_coef", "max_grad_norm")) for r in rows]
    stages = {0: (0.1, 1), 1: (0.2, 2), 2: (0.2, 3), 3: (0.2, 3)}
    assert got == [(s, *stages[s], 0.5) for s in (0, 0, 1, 1, 2, 3)]


def test_decoder_training_of_each_stage(gorl, tmp_path, monkeypatch):
    """Otherwise a refinement sees stale pairs or statistics, repeats its noise, or keeps Adam's state."""
    calls, pairs_seen, decoder_epoch = [], [], gorl.decoder_epoch

    def epoch(args, pairs, decoder, opt, ring, *key):
        jax.debug.callback(lambda *x: calls.append(jax.tree.map(np.array, x)), decoder, opt, key)
        pairs_seen.append(pairs)
        return decoder_epoch(args, pairs, decoder, opt, ring, *key)

    monkeypatch.setattr(gorl, "decoder_epoch", epoch)
    run(gorl, *TINY, "--runs-dir", tmp_path, "--num-seeds", 1)
    jax.effects_barrier()
    assert pairs_seen == [60, 40] and len(calls) == 6  # traced for stages of 80 and of 40 steps
    assert len({(*seed_key.ravel().tolist(), int(index.item())) for *_, (seed_key, index) in calls}) == 6
    assert [int(opt[0].count.item()) for _, opt, _ in calls] == [0, 3, 0, 3, 0, 2]
    assert [d["stats"].count.item() for d, *_ in calls] == [80, 80, 160, 160, 200, 200]
    last = [decoder["net"][-1]["kernel"] for decoder, *_ in calls]
    assert [kernel.any() for kernel in last] == [
        False,
        True,
        True,
        True,
        True,
        True,
    ]  # refined, not made anew


def frozen_run(script, runs, decoder_from, *more):
    """The directory of a tiny run of one stage on a frozen decoder."""
    run(
        script,
        *COMMON,
        "--total-timesteps",
        120,
        "--decoder-from",
        decoder_from,
        *DECODER,
        "--runs-dir",
        runs,
        *more,
    )
    return next(runs.iterdir())


@pytest.mark.parametrize("finished", GORL, indirect=True, ids=name_of)
def test_a_frozen_decoder(finished, tmp_path):
    """Otherwise Figure 6 is of another stage's or seed's decoder, or of one that moves, or is not used."""
    script, _, of = finished
    of = shutil.copytree(of, tmp_path / "of:it")  # a colon in its name
    run_dir = frozen_run(script, tmp_path / "runs", f"{of}:2", "--seed", 2, "--num-seeds", 1)
    assert not table(run_dir, "decoder") and not table(run_dir, "refine")
    assert {row["stage"] for row in table(run_dir, "train") + table(run_dir, "eval")} == {"0"}
    env, args = PointMass(), script.load_args(str(run_dir))
    assert args.stage_timesteps == (120,)

    def decoder(run_dir, step):
        with np.load(run_dir / "checkpoints" / f"policy_{step}.npz") as file:
            return {name: file[name] for name in file.files if name.startswith(".decoder")}

    def same(run_dir):
        got, want = decoder(run_dir, 120), decoder(of, 200)
        return got.keys() == want.keys() and all(np.array_equal(got[k], want[k][1:2]) for k in got)

    assert same(run_dir) and len(decoder(of, 200)) > 8
    assert not any(
        np.array_equal(x, decoder(of, 160)[k]) for k, x in decoder(of, 200).items() if "kernel" in k
    )
    # The first evaluation: the latent's mean 0 through that decoder.
    key = jax.random.PRNGKey(2)
    agent = script.init_agent(
        args, env.observation_size, env.action_size, script.derive_key(key, script.INIT, 0)
    )
    like = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.stack([x, x]), agent.policy()))
    stage_2, _ = script.load_arrays(of / "checkpoints" / "policy_200.npz", like)
    returns = {
        name: float(script.evaluate(args, env, agent.replace(decoder=d), key, 0, True).mean())
        for name, d in (
            ("frozen", jax.tree.map(lambda x: x[1], stage_2.decoder)),
            ("identity", agent.decoder),
        )
    }
    assert float(table(run_dir, "eval")[0]["return_mean"]) == pytest.approx(returns["frozen"], rel=1e-5)
    assert returns["frozen"] != pytest.approx(returns["identity"], rel=1e-4)
    shutil.rmtree(of)  # a checkpoint has its decoder in it
    before = decoder(run_dir, 120)
    run(script, "--resume", run_dir, "--total-timesteps", 160)
    assert int(table(run_dir, "train")[-1]["step"]) == 160
    assert all(np.array_equal(x, before[name]) for name, x in decoder(run_dir, 160).items())


@pytest.mark.parametrize("finished", GORL, indirect=True, ids=name_of)
def test_the_decoder_of_stage_0_is_the_first_one(finished, tmp_path):
    """Otherwise Figure 6's curve of stage 0 is not that of PPO through the identity."""
    script, _, of = finished
    frozen = frozen_run(script, tmp_path / "frozen", f"{of}:0")
    run(
        script,
        *COMMON,
        "--stage-timesteps",
        120,
        "--total-timesteps",
        120,
        *DECODER,
        "--runs-dir",
        tmp_path / "plain",
    )
    same_tables(frozen, next((tmp_path / "plain").iterdir()))


@pytest.mark.parametrize(
    ("decoder_from", "more"),
    [
        ("of:4", ""),
        ("of:-1", ""),
        ("of:first", ""),
        ("of", ""),
        ("nowhere:0", ""),
        (":0", ""),
        ("of:1", "--num-seeds 3"),
        ("of:1", "--seed 0"),
        ("of:1", "--env-id CheetahRun"),
        ("of:1", "--decoder-steps 5"),
        ("damaged:1", ""),
        ("ppo:0", ""),
        ("unfinished:3", ""),
        ("frozen:0", ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("finished", [gorl_fm_ppo], indirect=True, ids=name_of)
def test_a_decoder_that_is_not_there(finished, decoder_from, more, tmp_path, monkeypatch, capsys):
    """Otherwise a mistake in --decoder-from ends in a traceback, or trains on another one, after minutes."""
    script, _, of = finished
    shutil.copytree(of, tmp_path / "of")
    for name in ("damaged", "unfinished", "frozen"):
        shutil.copytree(of, tmp_path / name)
    (tmp_path / "unfinished/checkpoints/policy_240.npz").unlink()
    args = json.loads((of / "args.json").read_text())
    (tmp_path / "frozen/args.json").write_text(json.dumps(args | {"decoder_from": "of:1"}))
    (tmp_path / "damaged/checkpoints/policy_160.npz").write_bytes(b"no")
    shutil.copytree(of, tmp_path / "ppo")
    (tmp_path / "ppo/args.json").write_text(
        (of / "args.json").read_text().replace("gorl_fm_ppo.py", "ppo_gaussian.py")
    )
    monkeypatch.setattr(script, "make_env", lambda args: PointMass())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["x.py", *COMMON, *DECODER, "--decoder-from", decoder_from, *more.split()]
    )
    with pytest.raises(SystemExit) as stopped:
        script.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"--decoder-from: got {decoder_from}; takes RUN_DIR:STAGE" in error
    assert error.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "stages"),
    [
        ("", (60_000_000,)),
        ("--preset cpu", (400_000,)),
        ("--total-timesteps 5000000", (5_000_000,)),
        ("--stage-timesteps 7000000", (7_000_000,)),
        ("--stage-timesteps 7000000 7000000", None),
    ],
)
def test_a_frozen_decoder_takes_one_stage(gorl, more, stages, monkeypatch, capsys):
    """Otherwise the encoder is trained for another time than a stage, or its decoder is refined after all."""
    monkeypatch.setattr(gorl, "frozen_decoder", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["x.py", "--decoder-from", "x:1", *more.split()])
    args = gorl.parse_args()
    if stages:
        assert args.stage_timesteps == stages and args.total_timesteps == stages[0]
    with pytest.raises(SystemExit) if stages is None else nullcontext():
        gorl.check(args)
    assert ("--stage-timesteps" in capsys.readouterr().err) == (stages is None)
