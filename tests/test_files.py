"""Checkpoints, and runs of the whole training loop on an environment that compiles fast."""

import csv
import json
import shutil
import sys
from zipfile import ZIP_STORED, ZipFile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PointMass

import gorl_fm_ppo as gorl

TREE = {"net": [{"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}], "count": np.int32(7)}
LIKE = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE))
TINY = (
    "--num-envs 4 --batch-size 4 --num-minibatches 2 --unroll-length 5 --update-epochs 2 --num-seeds 2 "
    "--stage-timesteps 80 80 40 40 --eval-every 40 --eval-envs 3 --episode-length 20 --decoder-epochs 2 "
    "--decoder-buffer-size 60 --decoder-batch-size 16 --clip-eps 0.1 0.2 --kl-coef 1 2 3"
).split()


@pytest.fixture
def saved(tmp_path):
    gorl.save_arrays(tmp_path / "x.npz", TREE, done=3, bytes={"eval.csv": 5})
    return tmp_path / "x.npz"


def test_arrays_round_trip(saved):
    """Otherwise resuming or loading a policy changes its numbers."""
    tree, meta = gorl.load_arrays(saved, LIKE)
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
            tree, meta = gorl.load_arrays(saved, LIKE)
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
        gorl.load_arrays(saved, LIKE)


@pytest.mark.parametrize(
    "leaf", [jax.ShapeDtypeStruct((3, 2), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.int32)]
)
def test_another_networks_file_raises(saved, leaf):
    """Otherwise the message does not say what differs, or weights are broadcast."""
    with pytest.raises(ValueError, match=r"net.*kernel.*float32\(2, 3\)"):
        gorl.load_arrays(saved, LIKE | {"net": [{"kernel": leaf}]})
    with pytest.raises((KeyError, ValueError)):
        gorl.load_arrays(saved, LIKE | {"more": LIKE["count"]})


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
        gorl.load_arrays(saved, LIKE)


# --- the training loop ---


@pytest.fixture
def run(monkeypatch):
    """main() on a PointMass; a killed run ends after that many checkpoints."""

    def main(*arguments, kill_after=None):
        saves, save = [], gorl.save_arrays

        def save_and_die(path, *tree, **meta):
            save(path, *tree, **meta)
            saves.append(path) if path.stem.startswith("state") else None
            if len(saves) == kill_after:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(gorl, "make_env", lambda args: PointMass())
            patch.setattr(gorl, "save_arrays", save_and_die)
            patch.setattr(sys, "argv", ["gorl_fm_ppo.py", *map(str, arguments)])
            gorl.main()

    return main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gorl, "make_env", lambda args: PointMass())
        patch.setattr(sys, "argv", ["gorl_fm_ppo.py", *TINY, "--runs-dir", str(runs)])
        gorl.main()
    return next(runs.iterdir())


def table(run_dir, name):
    with (run_dir / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "time" not in k and "sps" not in k} for row in rows]


def same_tables(a, b):
    for name in ("eval", "train", "decoder", "refine"):
        assert table(a, name) == table(b, name)


@pytest.mark.parametrize("kill_after", [1, 2, 3, 4])
def test_resuming_at_every_checkpoint(finished, run, tmp_path, kill_after):
    """Otherwise what a run computes depends on where it was killed."""
    with pytest.raises(KeyboardInterrupt):
        run(*TINY, "--runs-dir", tmp_path, kill_after=kill_after)
    run_dir = next(tmp_path.iterdir())
    run("--resume", run_dir)
    same_tables(run_dir, finished)
    last = [d / "checkpoints" / "policy_240.npz" for d in (run_dir, finished)]
    with np.load(last[0]) as a, np.load(last[1]) as b:
        assert a.files == b.files and all((a[name] == b[name]).all() for name in a.files)


def test_damaged_checkpoints(finished, run, tmp_path, capsys):
    """Otherwise a half-written file costs the whole run, or a run with no good file silently starts again."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    new = max(run_dir.glob("checkpoints/state_*.npz"))
    new.write_bytes(new.read_bytes()[:-100])
    run("--resume", run_dir)
    assert new.name in capsys.readouterr().err
    same_tables(run_dir, finished)
    for file in run_dir.glob("checkpoints/state_*.npz"):
        file.write_bytes(b"")
    before = (run_dir / "eval.csv").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        run("--resume", run_dir)
    assert stopped.value.code == 2 and "--resume" in capsys.readouterr().err
    assert (run_dir / "eval.csv").read_bytes() == before


def test_killed_before_the_first_checkpoint(finished, run, tmp_path):
    """Otherwise --resume of such a run fails, or doubles the rows of step 0."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    run("--resume", run_dir)
    same_tables(run_dir, finished)


def test_a_longer_budget_on_resuming(finished, run, tmp_path):
    """Otherwise a finished run that is prolonged is not the longer run from the start."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    run("--resume", run_dir, "--total-timesteps", 320)
    longer = [*TINY]
    at = longer.index("--stage-timesteps")
    longer[at + 1 : at + 5] = ["80", "80", "40", "120"]
    run(*longer, "--runs-dir", tmp_path / "runs")
    rows = [row for row in table(next((tmp_path / "runs").iterdir()), "train") if int(row["step"]) > 240]
    assert [row for row in table(run_dir, "train") if int(row["step"]) > 240] == rows and len(rows) == 4
    assert json.loads((run_dir / "args.json").read_text())["stage_timesteps"] == [80, 80, 40, 120]


def test_coefficients_of_stages(run, tmp_path, monkeypatch):
    """Otherwise a stage trains with another stage's clip range, gradient norm or beta."""
    update = gorl.update

    def logged(args, *x):
        coefs = {name: getattr(args, name) for name in ("clip_eps", "kl_coef", "max_grad_norm")}
        agent, metrics = update(args, *x)
        return agent, metrics | coefs

    monkeypatch.setattr(gorl, "update", logged)
    run(*TINY, "--runs-dir", tmp_path, "--max-grad-norm", "0.5")
    rows = table(next(tmp_path.iterdir()), "train")[::2]
    got = [tuple(float(r[k]) for k in ("stage", "clip_eps", "kl_coef", "max_grad_norm")) for r in rows]
    stages = {0: (0.1, 1), 1: (0.2, 2), 2: (0.2, 3), 3: (0.2, 3)}
    assert got == [(s, *stages[s], 0.5) for s in (0, 0, 1, 1, 2, 3)]


def test_decoder_training_of_each_stage(run, tmp_path, monkeypatch):
    """Otherwise a refinement sees stale pairs or statistics, repeats its noise, or keeps Adam's state."""
    calls, pairs_seen, decoder_epoch = [], [], gorl.decoder_epoch

    def epoch(args, pairs, decoder, opt, ring, key):
        jax.debug.callback(lambda *x: calls.append(jax.tree.map(np.array, x)), decoder, opt, key)
        pairs_seen.append(pairs)
        return decoder_epoch(args, pairs, decoder, opt, ring, key)

    monkeypatch.setattr(gorl, "decoder_epoch", epoch)
    run(*TINY, "--runs-dir", tmp_path, "--num-seeds", 1)
    jax.effects_barrier()
    assert pairs_seen == [60, 40] and len(calls) == 6  # traced for stages of 80 and of 40 steps
    assert len({tuple(key.ravel().tolist()) for *_, key in calls}) == 6
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
