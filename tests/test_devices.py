"""A seed's numbers do not depend on how many seeds or devices there are."""

import shutil

import numpy as np
import pytest
from command import TABLES, run, states, table, toy
from conftest import GORL, name_of

import gorl_fm_ppo
import ppo_gaussian

TWO = [gorl_fm_ppo, ppo_gaussian]  # all scripts spread seeds by the same lines, by test_shared.py
COMMON = (
    "--num-envs 4 --batch-size 4 --num-minibatches 2 --unroll-length 5 --update-epochs 2 "
    "--eval-envs 4 --episode-length 20 --eval-every 40"
).split()
STAGES = (
    "--stage-timesteps 80 40 --decoder-epochs 2 --decoder-buffer-size 40 "
    "--decoder-batch-size 16 --decoder-steps 2"
).split()


def tiny(script, *arguments):
    sizes = STAGES if script in GORL else ["--total-timesteps", 120]
    return toy(script, *COMMON, *sizes, *arguments)


def on_devices(count, command):
    """Runs it on so many virtual devices."""
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
    done = run(command, XLA_FLAGS=f"{flags}{count}")
    assert done.returncode == 0
    assert done.stderr == ""
    return done


@pytest.fixture(scope="module", params=TWO, ids=name_of)
def by_devices(request, tmp_path_factory):
    """A script, and its run of two seeds on one device and on two."""
    run_dirs = {}
    for count in (1, 2):
        runs = tmp_path_factory.mktemp("runs")
        seeds = "--num-seeds", 2, "--runs-dir", runs
        done = on_devices(count, tiny(request.param, *seeds))
        assert f"steps on {count} x" in done.stdout
        run_dirs[count] = next(runs.iterdir())
    return request.param, run_dirs


def compare(rows, want):
    """The same numbers, but for the rounding of another order of sums."""
    assert len(rows) == len(want)
    for row, other in zip(rows, want, strict=True):
        assert list(row) == list(other)
        for name in row:
            got, expected = float(row[name]), float(other[name])
            np.testing.assert_allclose(got, expected, rtol=1e-2, atol=2e-3, err_msg=name)


def test_seeds_on_two_devices(by_devices):
    """Otherwise results depend on the machine."""
    script, run_dirs = by_devices
    for name in TABLES:
        compare(table(run_dirs[2], name), table(run_dirs[1], name))
    assert len(table(run_dirs[2], "train")) == 6
    assert bool(table(run_dirs[2], "decoder")) == (script in GORL)


def test_a_seed_is_the_same_beside_others(by_devices, tmp_path):
    """Otherwise a seed cannot be run again by itself."""
    script, run_dirs = by_devices
    on_devices(2, tiny(script, "--seed", 2, "--runs-dir", tmp_path))
    (alone,) = tmp_path.iterdir()
    for name in TABLES:
        rows = [row for row in table(run_dirs[2], name) if row["seed"] == "2"]
        compare(table(alone, name), rows)


def test_seeds_differ(by_devices):
    """Otherwise the comparisons above are of constants, and several seeds are one."""
    rows = table(by_devices[1][2], "train")
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        for name in ("reward_mean", "loss", "u_std"):
            assert one[name] != two[name]


def test_a_run_goes_on_with_other_devices(by_devices, tmp_path):
    """Otherwise a job that is requeued on another machine cannot resume."""
    script, run_dirs = by_devices
    run_dir = shutil.copytree(run_dirs[2], tmp_path / "run")
    states(run_dir)[-1].unlink()
    on_devices(1, toy(script, "--resume", run_dir))
    for name in TABLES:
        compare(table(run_dir, name), table(run_dirs[1], name))


def test_three_seeds_on_two_devices(tmp_path):
    """Otherwise a number of seeds that devices cannot share evenly ends in a traceback."""
    command = tiny(ppo_gaussian, "--num-seeds", 3, "--runs-dir", tmp_path)
    on_devices(2, command)
    (run_dir,) = tmp_path.iterdir()
    assert [row["seed"] for row in table(run_dir, "train")] == ["1", "2", "3"] * 3
    policy = np.load(run_dir / "checkpoints/policy_120.npz")
    assert {policy[name].shape[0] for name in policy.files if name != "meta"} == {3}
