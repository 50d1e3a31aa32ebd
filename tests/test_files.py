"""Checkpoints, and runs of the whole training loop on an environment that compiles fast."""

import json
import shutil
import sys
from typing import NamedTuple
from zipfile import ZipFile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import TABLES, few_steps, policies, states, table
from conftest import GORL, SCRIPTS, name_of
from toy import PointMass

import gorl_fm_ppo
import ppo_gaussian

COMMON = (
    "--num-envs 4 --batch-size 4 --num-minibatches 2 --unroll-length 5 --update-epochs 2 "
    "--num-seeds 2 --total-timesteps 240 --eval-every 40 --eval-envs 3 --episode-length 20"
).split()
DECODER = "--decoder-epochs 2 --decoder-buffer-size 60 --decoder-batch-size 16".split()
STAGES = "--stage-timesteps 80 80 40 40 --clip-eps 0.1 0.2".split()
TWO = [gorl_fm_ppo, ppo_gaussian]  # other loops are those of one of these, by test_shared.py


# --- arrays in a file ---
class Tree(NamedTuple):
    layers: list
    count: np.int32


ARGS = gorl_fm_ppo.Args()
TREE = Tree([{"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}], np.int32(7))
LIKE = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE))


@pytest.fixture
def saved(tmp_path):
    gorl_fm_ppo.save_arrays(ARGS, tmp_path / "x.npz", TREE, done=3, logs={"eval.csv": 5})
    return tmp_path / "x.npz"


def test_arrays_round_trip(saved):
    """Otherwise resuming or loading a policy changes its numbers."""
    tree, meta = gorl_fm_ppo.load_arrays(ARGS, saved, LIKE)
    jax.tree.map(np.testing.assert_array_equal, tree, TREE)
    assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(lambda x: x.dtype, LIKE)
    assert meta["done"] == 3
    assert meta["logs"] == {"eval.csv": 5}
    assert [path.name for path in saved.parent.iterdir()] == ["x.npz"]


def test_no_damaged_byte_changes_a_number(saved):
    """Otherwise a run goes on from wrong weights, and nobody notices."""
    _, meta = gorl_fm_ppo.load_arrays(ARGS, saved, LIKE)
    content = saved.read_bytes()
    raised = 0
    for i in range(len(content)):
        saved.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        try:
            tree, found = gorl_fm_ppo.load_arrays(ARGS, saved, LIKE)
        except Exception:
            raised += 1
        else:  # a date or another byte that nothing is read from
            jax.tree.map(np.testing.assert_array_equal, tree, TREE)
            assert found == meta
    assert raised > len(content) / 2


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_file_raises(saved, kept):
    """Otherwise a full disk ends in a policy of half its weights."""
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(Exception, match=r"."):
        gorl_fm_ppo.load_arrays(ARGS, saved, LIKE)


def test_a_half_written_file_is_never_seen(saved, monkeypatch):
    """Otherwise a kill during a checkpoint costs the checkpoint that was there."""
    before = saved.read_bytes()

    def full_disk(file, *arrays, **named):
        file.write(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        gorl_fm_ppo.save_arrays(ARGS, saved, TREE, done=4)
    assert saved.read_bytes() == before
    assert not states(saved.parent.parent)


def test_another_networks_file_raises(saved):
    """Otherwise weights are broadcast, or those of another layer."""
    wide = LIKE._replace(layers=[{"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}])
    more = LIKE._replace(layers=[*LIKE.layers, LIKE.count])
    for like in (wide, more):
        with pytest.raises((OSError, KeyError), match="sizes"):
            gorl_fm_ppo.load_arrays(ARGS, saved, like)


class Exploit:
    def __reduce__(self):
        return pytest.fail, ("code of the file was run",)


def test_pickles_are_refused(saved):
    """Otherwise loading a stranger's checkpoint runs the stranger's code."""
    array = np.empty((), object)
    array[()] = Exploit()
    with ZipFile(saved) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    evil = saved.with_name("evil.npy")
    np.save(evil, array, allow_pickle=True)
    for name in contents:
        with ZipFile(saved, "w") as file:
            for other, content in contents.items():
                file.writestr(other, evil.read_bytes() if other == name else content)
        with pytest.raises(ValueError, match="allow_pickle"):
            gorl_fm_ppo.load_arrays(ARGS, saved, LIKE)


# --- the training loop ---
def run(script, *arguments):
    """main() on a point mass: what it has compiled, each with all that it was compiled for."""
    compiled = {}
    over_seeds = script.over_seeds

    def spy(args, f, *rest, **options):
        name = getattr(f, "func", f).__name__
        compiled[name] = over_seeds(args, f, *rest, **options)
        return compiled[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_env", lambda args: PointMass())
        patch.setattr(script, "over_seeds", spy)
        patch.setattr(script.signal, "signal", lambda *_: None)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        try:
            script.main()
        finally:
            programs = {name: f._cache_size() for name, f in compiled.items()}
    return programs


def refused(capsys, script, *arguments):
    """The one line with which main() ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    return error


def tiny(script):
    stages = [*STAGES, *DECODER] if script in GORL else []
    return [*COMMON, *stages, *few_steps(script)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directories of a run of each script, made as they are asked for, and its programs."""
    made = {}

    def get(script):
        if script not in made:
            folder = tmp_path_factory.mktemp("runs")
            programs = run(script, *tiny(script), "--runs-dir", folder)
            made[script] = next(folder.iterdir()), programs
        return made[script]

    return get


def header(run_dir, name):
    with (run_dir / f"{name}.csv").open() as file:
        return file.readline().rstrip()


def test_files_of_a_run(script, runs):
    """Otherwise plots and tools cannot read all methods' runs alike."""
    run_dir, _ = runs(script)
    assert run_dir.name.startswith(f"HopperStand__{script.__name__}__1__")
    columns = "seed,step,stage,return_mean,return_std,return_min,return_max,wall_time"
    assert header(run_dir, "eval") == columns
    assert header(run_dir, "train").startswith("seed,step,stage,sps,")
    evals = table(run_dir, "eval")
    assert [row["seed"] for row in evals] == ["1", "2"] * 7
    assert [int(row["step"]) for row in evals[::2]] == list(range(0, 241, 40))
    train = table(run_dir, "train")
    assert [int(row["step"]) for row in train[::2]] == list(range(40, 241, 40))
    for row in evals + train:
        assert np.isfinite([float(x) for x in row.values()]).all()
    for row in evals:
        assert float(row["return_min"]) <= float(row["return_mean"]) <= float(row["return_max"])
    names = {"loss", "policy_loss", "value_loss", "approx_kl", "clip_fraction", "nan_resets"}
    names |= {"reward_mean", "u_std", "u_beyond_5", "grad_norm_critic"}
    assert names <= set(train[0])
    assert policies(run_dir) == sorted(f"policy_{step}.npz" for step in (80, 160, 200, 240))
    assert len(states(run_dir)) == 2
    assert not list(run_dir.glob("checkpoints/*.tmp"))


def test_stages_of_a_run(script, runs):
    """Otherwise the logs do not say to which stage and decoder a row belongs."""
    run_dir, _ = runs(script)
    evals = [int(row["stage"]) for row in table(run_dir, "eval")[::2]]
    train = [int(row["stage"]) for row in table(run_dir, "train")[::2]]
    if script not in GORL:
        assert evals == [0] * 7
        assert train == [0] * 6
        assert not (run_dir / "decoder.csv").exists()
        assert not (run_dir / "refine.csv").exists()
        return
    assert evals == [0, 0, 0, 1, 1, 2, 3]
    assert train == [0, 0, 1, 1, 2, 3]
    assert header(run_dir, "decoder") == "seed,stage,epoch,loss,held_out_loss"
    decoder = [(int(row["stage"]), int(row["epoch"])) for row in table(run_dir, "decoder")[::2]]
    assert decoder == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    refine = table(run_dir, "refine")[::2]
    assert [row["step"] for row in refine] == ["80", "160", "200"]
    assert [row["stage"] for row in refine] == ["1", "2", "3"]
    assert [row["pairs"] for row in refine] == ["40", "40", "40"]  # the shortest stage has 40


@pytest.mark.parametrize("gorl", GORL, ids=name_of)
def test_columns_of_a_refinement(gorl, runs):
    """Otherwise old and new logs have different columns."""
    run_dir, _ = runs(gorl)
    before = "return_before,return_after,deterministic_before,deterministic_after"
    assert header(run_dir, "refine") == f"seed,step,stage,pairs,reward_mean,{before}"
    rows = table(run_dir, "refine")
    # As drawn from N(0, I), the new decoder's actions are about the old policy's; those differ.
    assert all(row["return_before"] != row["deterministic_before"] for row in rows)


@pytest.mark.parametrize("gorl", GORL, ids=name_of)
def test_modes_of_a_refinement(gorl, make_args, point_mass, tmp_path, monkeypatch):
    """Otherwise a column of refine.csv holds the other mode's episodes, or those after it."""

    def evaluate(args, env, agent, key, deterministic):
        restarted = (agent.encoder.params["params"]["MLP_0"]["last"]["kernel"] == 0).all()
        return jnp.where(deterministic[:, 0], 1.0, 2.0) * jnp.where(restarted, 10.0, 1.0)

    monkeypatch.setattr(gorl, "evaluate", evaluate)
    (tmp_path / "checkpoints").mkdir()
    gorl.train(make_args(gorl, eval_envs=5, decoder_epochs=1), point_mass, tmp_path)
    modes = ("return_before", "return_after", "deterministic_before", "deterministic_after")
    rows = table(tmp_path, "refine")
    assert len(rows) == 3
    assert all([float(row[mode]) for mode in modes] == [2, 20, 1, 10] for row in rows)
    # The first evaluation is of an encoder that is as new; all episodes are deterministic.
    rows = table(tmp_path, "eval")
    returns = [(float(row["return_min"]), float(row["return_max"])) for row in rows]
    assert returns[0] == (10, 10) and set(returns[1:]) == {(1, 1)}


def test_arguments_of_a_run(script, runs):
    """Otherwise tools cannot tell what was run, and with which packages."""
    run_dir, _ = runs(script)
    stored = json.loads((run_dir / "args.json").read_text(), parse_constant=pytest.fail)
    versions = stored.pop("versions")
    assert list(stored) == list(script.Args.__dataclass_fields__)
    assert stored["num_envs"] == 4
    assert versions["script"] == f"{script.__name__}.py"
    assert {"jax", "flax", "numpy", "device", "git_commit", "python"} <= set(versions)


def test_a_machine_without_git(script, make_args, tmp_path, monkeypatch, capfd):
    """Otherwise a container without it ends in a traceback."""
    monkeypatch.setenv("PATH", "")
    run_dir = script.make_run_dir(make_args(script, runs_dir=str(tmp_path)), "toy")
    stored = json.loads((run_dir / "args.json").read_text())
    assert stored["versions"]["git_commit"] is None
    assert capfd.readouterr().err == ""


def test_every_program_is_compiled_once(script, runs):
    """Otherwise each run pays for the physics' compilation twice."""
    _, programs = runs(script)
    once = {"init_state": 1, "iteration": 1, "evaluate": 1, "<lambda>": 1}
    if script in GORL:
        once["decoder_epoch"] = 1
    assert programs == once


def test_seeds_differ(script, runs):
    """Otherwise five seeds are one seed five times."""
    rows = table(runs(script)[0], "train")
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert one["step"] == two["step"]
        assert one["reward_mean"] != two["reward_mean"]


def test_policies_of_a_run(script, runs, monkeypatch):
    """Otherwise a saved policy acts differently from the trained one, or not at all."""
    run_dir, _ = runs(script)
    monkeypatch.setattr(script, "make_env", lambda args: PointMass())
    keys = jax.random.split(jax.random.PRNGKey(0))
    obs = jnp.array(np.random.default_rng(0).normal(size=(2, 3, 3)), jnp.float32)
    policy = script.load_policy(str(run_dir))
    u = policy(obs, keys[0], deterministic=True)
    assert u.shape == (2, 3, 2)
    np.testing.assert_array_equal(u, policy(obs, keys[0], deterministic=True))
    starts_from_noise = script.__name__ in ("fpo", "dppo")
    same = np.array_equal(u, policy(obs, keys[1], deterministic=True))
    assert same != starts_from_noise
    assert not np.allclose(policy(obs, keys[1]), policy(obs, keys[0]))
    np.testing.assert_array_equal(u, script.load_policy(run_dir, 240, 1)(obs, keys[0], True))
    for other in ({"seed": 2}, {"step": 160}):
        assert not np.allclose(u, script.load_policy(run_dir, **other)(obs, keys[0], True))
    with pytest.raises(KeyError):
        script.load_policy(run_dir, step=161)
    for seed in (0, 3):  # 0 is not the last one, as a list's -1 would be
        with pytest.raises((IndexError, ValueError)):
            script.load_policy(run_dir, seed=seed)


def test_policy_files_are_small(script):
    """Otherwise five seeds' policies of four stages and six tasks do not fit into a repository."""
    args = script.Args(num_seeds=5)
    env = PointMass()
    env.observation_size = 24
    env.action_size = 6

    def policy():
        return script.policy_part(script.init_agent(args, env, jax.random.PRNGKey(0)))

    leaves = jax.tree.leaves(jax.eval_shape(policy))
    assert 5 * 4 * sum(x.size for x in leaves) < 900_000


# --- resuming ---
@pytest.fixture
def copied(runs, tmp_path):
    def copy(script):
        return shutil.copytree(runs(script)[0], tmp_path / "run")

    return copy


def contents(run_dir):
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", TWO, ids=name_of)
def test_resuming_what_is_finished(script, copied, capsys):
    """Otherwise a restarted job trains again, or fails."""
    run_dir = copied(script)
    before = contents(run_dir)
    programs = run(script, "--resume", run_dir)
    assert "Finished" in capsys.readouterr().out
    assert contents(run_dir) == before
    assert programs.pop("<lambda>") == 1  # puts the state on the devices
    assert not any(programs.values())


@pytest.mark.parametrize("script", TWO, ids=name_of)
def test_killed_before_the_first_checkpoint(script, copied, runs):
    """Otherwise --resume of such a run fails, or doubles rows, or cuts a user's file."""
    run_dir = copied(script)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    for name in TABLES[1:]:
        (run_dir / f"{name}.csv").unlink(missing_ok=True)
    (run_dir / "notes.csv").write_text("mine")
    run(script, "--resume", run_dir)
    assert (run_dir / "notes.csv").read_text() == "mine"
    for name in TABLES:
        assert table(run_dir, name) == table(runs(script)[0], name)


@pytest.mark.parametrize("script", TWO, ids=name_of)
def test_lost_checkpoints(script, copied, capsys):
    """Otherwise a run that has trained for days starts again, and its log is gone."""
    run_dir = copied(script)
    for path in states(run_dir):
        path.unlink()
    before = contents(run_dir)
    assert "--resume" in refused(capsys, script, "--resume", run_dir)
    assert contents(run_dir) == before


CHANGES = ["--gamma 0.9", "--num-seeds 3", "--total_timesteps=320", "--runs-dir x", "--seed=1"]


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_with_other_arguments(script, change, runs, capsys):
    """Otherwise one run's log mixes two settings."""
    error = refused(capsys, script, "--resume", runs(script)[0], *change.split())
    assert "--resume: got" in error
    assert change.replace("_", "-").split("=")[0].split()[0] in error


def test_another_scripts_run_is_refused(script, runs, capsys):
    """Otherwise a run goes on with another method's weights, or ends in a traceback."""
    other = SCRIPTS[SCRIPTS.index(script) - 1]
    error = refused(capsys, script, "--resume", runs(other)[0])
    assert "--resume" in error
    assert f"{script.__name__}.py" in error


# --- stages and decoders ---
def test_what_each_stage_trains_with(tmp_path, monkeypatch):
    """Otherwise a stage has another one's clip range, stale pairs, old noise or Adam's state."""
    gorl = gorl_fm_ppo
    calls = []
    update = gorl.update
    decoder_epoch = gorl.decoder_epoch

    def logged_update(args, agent, unrolls, clip_eps, key):
        agent, metrics = update(args, agent, unrolls, clip_eps, key)
        return agent, metrics | {"clip_eps": clip_eps}

    def logged_epoch(args, decoder, agent, pairs, key, epoch):
        count, key_of_epoch = agent.stats.count, jax.random.fold_in(key, epoch)
        leaves = decoder.opt_state[0].count, decoder.params, count, pairs.u, key_of_epoch
        jax.debug.callback(lambda *x: calls.append(jax.tree.map(np.array, x)), *leaves)
        return decoder_epoch(args, decoder, agent, pairs, key, epoch)

    monkeypatch.setattr(gorl, "update", logged_update)
    logged_epoch.__name__ = "decoder_epoch"
    monkeypatch.setattr(gorl, "decoder_epoch", logged_epoch)
    run(gorl, *tiny(gorl), "--num-seeds", 1, "--runs-dir", tmp_path)
    jax.effects_barrier()
    rows = table(next(tmp_path.iterdir()), "train")
    clips = [float(row["clip_eps"]) for row in rows]
    np.testing.assert_allclose(clips, [0.1, 0.1, 0.2, 0.2, 0.2, 0.2])
    counts, params, seen, u, keys = zip(*calls, strict=True)
    assert [int(count.item()) for count in counts] == [0, 1, 0, 1, 0, 1]
    assert [int(count.lo.item()) for count in seen] == [80, 80, 160, 160, 200, 200]
    assert [x.size // 2 for x in u] == 6 * [40]
    assert all(x.any(axis=-1).all() for x in u)  # no zeros of a buffer that is not full
    assert len({tuple(key.ravel().tolist()) for key in keys}) == 6
    last = [x["params"]["MLP_0"]["last"]["kernel"].any() for x in params]
    assert last == [False, True, True, True, True, True]  # refined, not made anew


def decoder_of(gorl, run_dir, step):
    """A policy file's decoder and its statistics, of all seeds."""
    args = gorl.load_args(run_dir)
    agent = jax.eval_shape(lambda: gorl.init_agent(args, PointMass(), jax.random.PRNGKey(0)))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), agent)
    path = run_dir / f"checkpoints/policy_{step}.npz"
    agents, _ = gorl.load_arrays(args, path, gorl.policy_part(like))
    return jax.tree.leaves((agents.decoder.params, agents.decoder_stats))


def test_a_decoder_to_start_from(runs, tmp_path):
    """Otherwise Figure 6 is of another stage's decoder, or of one that moves, or is not used."""
    gorl = gorl_fm_ppo
    run_dir, _ = runs(gorl)
    one_stage = "--stage-timesteps", 80, *DECODER, *few_steps(gorl), "--runs-dir", tmp_path
    given = run_dir / "checkpoints/policy_200.npz"
    common = COMMON[: COMMON.index("--total-timesteps")]
    common += COMMON[COMMON.index("--eval-every") :]
    run(gorl, *common, *one_stage, "--decoder-from", given)
    (frozen,) = tmp_path.iterdir()
    assert not table(frozen, "decoder")
    assert not table(frozen, "refine")
    assert len(table(frozen, "train")) == 4
    want = decoder_of(gorl, run_dir, 200)
    other = decoder_of(gorl, run_dir, 160)
    assert len(want) > 8
    differ = 0
    for got, x, y in zip(decoder_of(gorl, frozen, 80), want, other, strict=True):
        np.testing.assert_array_equal(got, x)
        differ += not np.array_equal(x, y)
    assert differ == len(want) - 2  # all but the upper half of the count, and a constant
    first, plain = (table(x, "eval")[0]["return_mean"] for x in (frozen, run_dir))
    assert first != plain  # it acts through that decoder from the start


@pytest.mark.parametrize("wrong", ["missing", "damaged", "seeds", "task", "script"])
def test_a_wrong_decoder(wrong, runs, tmp_path, capsys):
    """Otherwise a mistake in --decoder-from ends in a traceback, or trains on another one."""
    script = gorl_fm_ppo
    path = shutil.copy(runs(script)[0] / "checkpoints/policy_200.npz", tmp_path / "policy.npz")
    more = {"seeds": ["--seed", 2], "task": ["--env-id", "CheetahRun"]}.get(wrong, [])
    if wrong == "missing":
        path.unlink()
    if wrong == "damaged":
        path.write_bytes(path.read_bytes()[:-1000])
    if wrong == "script":
        script = GORL[1]
    command = [*tiny(script), *more, "--decoder-from", path, "--runs-dir", tmp_path / "runs"]
    assert f"--decoder-from: got {path}" in refused(capsys, script, *command)
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))
