"""A seed's numbers do not depend on how many seeds, devices or processes there are."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SCRIPTS, ended, name_of, processes

import gorl_fm_ppo

HERE = Path(__file__).parent
DEVICES = "--xla_force_host_platform_device_count="
# With the same arithmetic, these are exactly the same; the rest to rounding.
EXACT = re.compile(r"\['first'\]")


def run(count, *command):
    """Runs Python with so many virtual devices."""
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}{count}"}
    return subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What devices.py computes on one and on four devices."""
    folder = tmp_path_factory.mktemp("devices")

    def on(count):
        done = run(count, HERE / "devices.py", folder / f"{count}.npz")
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(folder / f"{count}.npz") as file:
            return dict(file)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((1, 4), pool.map(on, (1, 4)), strict=True))


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory):
    """The same of GoRL(FM) by 2 and by 4 processes, which have a device each."""
    found = {}
    for count in (2, 4):
        file = tmp_path_factory.mktemp("processes") / "out.npz"
        started = processes(count, HERE / "devices.py", file)
        assert [ended(process)[0] for process in started] == [0] * count
        with np.load(file) as arrays:
            found[count] = dict(arrays)
    return found


def of(arrays, prefix):
    found = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    assert found
    return found


def compare(got, want):
    assert set(got) == set(want)
    for name, array in want.items():
        if EXACT.search(name):
            np.testing.assert_allclose(got[name], array, rtol=1e-6, atol=1e-7, err_msg=name)
        else:
            scale = max(1.0, np.abs(np.float64(array)).max(initial=0))
            np.testing.assert_allclose(got[name], array, atol=1e-4 * scale, rtol=0, err_msg=name)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
@pytest.mark.parametrize(("devices", "seeds"), [(1, 4), (4, 1), (4, 2)])
def test_a_seed_is_the_same_beside_others_and_on_more_devices(computed, script, devices, seeds):
    """Otherwise results depend on the machine: initial states, a rollout, gradients on the same data."""
    want = of(computed[1], f"{script.__name__}/1/2/")
    assert any("gradient" in name for name in want) and any("first" in name for name in want)
    compare(of(computed[devices], f"{script.__name__}/{seeds}/2/"), want)


def test_three_seeds_on_two_devices_each(computed):
    """Otherwise seeds that share devices with others and environments with other devices mix."""
    compare(of(computed[4], "gorl_fm_ppo/6/2/"), of(computed[1], "gorl_fm_ppo/1/2/"))


@pytest.mark.parametrize(("count", "seeds"), [(2, 1), (4, 2)])
def test_a_seed_is_the_same_in_several_processes(computed, by_processes, count, seeds):
    """Otherwise a run over several hosts is another experiment."""
    compare(of(by_processes[count], f"gorl_fm_ppo/{seeds}/2/"), of(computed[1], "gorl_fm_ppo/1/2/"))


def test_seeds_differ(computed):
    """Otherwise the comparison above is one of constants, and several seeds are one."""
    one, two = (of(computed[1], f"ppo_gaussian/4/{seed}/") for seed in (1, 2))
    assert any(np.abs(one[k] - two[k]).max() > 0.1 for k in one if "first" in k)


def test_physics_in_two_processes(computed, by_processes):
    """Otherwise MuJoCo's model, which it puts on the first device of all, is out of the others' reach."""
    compare_physics(by_processes[2], computed)


def test_physics_on_four_devices(computed):
    """Otherwise MuJoCo's loops give other physics when environments lie on several devices.

    Accelerations at rest, where 200 steps of CheetahRun's reset lead, are differences of larger forces.
    """
    compare_physics(computed[4], computed)


def compare_physics(got, computed):
    want, got = (of(arrays, "real/ppo_gaussian/1/2/") for arrays in (computed[1], got))
    names = [k for k in want if k.endswith((".qpos", ".qvel", ".obs", "['obs']", "['reward']"))]
    assert len(names) >= 5 and set(got) == set(want), names
    compare({k: got[k] for k in names}, {k: want[k] for k in names})


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("seeds", [1, 2])
def test_every_program_is_compiled_once(computed, devices, seeds):
    """Otherwise minutes go into compiling the same program for another layout of the same data."""
    programs = of(computed[devices], f"gorl_fm_ppo/{seeds}/programs/")
    assert set(programs) == {"begin", "iteration", "evaluate", "decoder_epoch"}
    assert all(count == 1 for count in programs.values()), programs


TINY = "--num-envs 4 --unroll-length 5 --batch-size 4 --num-minibatches 2 --update-epochs 2 --eval-envs 4"
TINY = f"{TINY} --episode-length 20 --eval-every 80 --decoder-epochs 2 --decoder-batch-size 16".split()
TINY += ["--decoder-buffer-size", "80", "--num-seeds", "2"]


def test_a_run_goes_on_with_other_devices(tmp_path):
    """Otherwise a job that is requeued on another machine cannot resume."""
    command = HERE / "toy.py", "gorl_fm_ppo"
    stages = "--stage-timesteps", 80, 40
    for count, more in ((4, stages), (1, (*stages, 40)), (4, (*stages, 80))):
        resume = [x for run_dir in tmp_path.glob("moved/*") for x in ("--resume", run_dir)]
        done = run(count, *command, *TINY, "--runs-dir", tmp_path / "moved", *more, *resume)
        assert done.returncode == 0 and "finished" in done.stdout, done.stderr[-2000:]
    done = run(1, *command, *TINY, "--runs-dir", tmp_path / "stayed", *stages, 80)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [next(tmp_path.glob(f"{name}/*/eval.csv")) for name in ("moved", "stayed")]
    moved, stayed = (np.genfromtxt(file, delimiter=",", names=True) for file in files)
    moved = moved[np.isin(moved["step"], stayed["step"])]  # without the evaluations at the former ends
    np.testing.assert_array_equal(moved["step"], stayed["step"])
    np.testing.assert_allclose(moved["return_mean"], stayed["return_mean"], rtol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--num-envs", "6", "--batch-size", "6"], "--num-envs: got 6; takes a multiple of 4"),
        (["--batch-size", "6"], "--batch-size: got 6; takes a multiple of 4"),
        (["--eval-envs", "5"], "--eval-envs: got 5; takes a multiple of 4"),
        (["--impl", "warp"], "--impl: got warp; takes jax on several devices"),
        (["--decoder-batch-size", "18"], "--decoder-batch-size: got 18; takes a multiple of 4"),
        (["--decoder-buffer-size", "2000000000"], "--decoder-buffer-size: got 2000000000; takes fewer"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused(tmp_path, change, message):
    """Otherwise a user sees a traceback of JAX, or the machine runs out of memory, after minutes."""
    args = [*TINY[:-1], "3", "--runs-dir", tmp_path / "runs", "--stage-timesteps", 80, 80, *change]
    done = run(4, HERE / "toy.py", "gorl_fm_ppo", *args)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_decoders_data_are_counted(monkeypatch, make_args, capsys, point_mass):
    """Otherwise a ring that fits is refused, or one that does not is allocated; resuming needs two."""
    monkeypatch.setattr(gorl_fm_ppo, "make_env", lambda args: point_mass)
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2400}
    monkeypatch.setattr(os, "sysconf", pages.get)
    pair = 4 * (3 + 2 + 1)  # bytes of an observation, a u and a reward of the point mass
    fits = make_args(num_seeds=2, decoder_buffer_size=1200 // 2 // pair - 1, decoder_batch_size=4)
    gorl_fm_ppo.make_mesh(fits)
    too_large = make_args(num_seeds=2, decoder_buffer_size=1200 // 2 // pair, decoder_batch_size=4)
    with pytest.raises(SystemExit):
        gorl_fm_ppo.make_mesh(too_large)
    assert "--decoder-buffer-size" in capsys.readouterr().err


def test_one_set_of_decoder_data_at_a_time(monkeypatch, make_args, point_mass, tmp_path):
    """Otherwise a run that has trained for hours ends at its first refinement, for lack of memory."""
    capacity, found, each_seed = 7, [], gorl_fm_ppo.each_seed
    args = make_args(decoder_buffer_size=4 * capacity, decoder_batch_size=8, decoder_epochs=1)
    args = replace(args, clip_eps=(0.2,), kl_coef=(0.0,), max_grad_norm=(0.0,))

    def spy(args, f, *rest, **options):
        compiled = each_seed(args, f, *rest, **options)
        if f.func is not gorl_fm_ppo.begin:
            return compiled

        def begin(*xs):
            if not any(isinstance(x, jax.core.Tracer) for x in xs):  # one that allocates
                found.append(sum(x.shape == (1, capacity, 4, 3) for x in jax.live_arrays()))
            return compiled(*xs)

        return begin

    monkeypatch.setattr(gorl_fm_ppo, "make_env", lambda args: point_mass)
    monkeypatch.setattr(gorl_fm_ppo, "each_seed", spy)
    (tmp_path / "checkpoints").mkdir()
    assert gorl_fm_ppo.train(args, tmp_path, [], bool)
    assert found == [0] * 4  # at the start, and at the end of three refinements


def test_two_seeds_on_warp(tmp_path):
    """Otherwise the faster backend serves one seed only: arrays of its contacts have no environments."""
    args = [*TINY, "--env-id", "CartpoleBalance", "--impl", "warp", "--runs-dir", tmp_path]
    done = run(1, HERE.parent / "gorl_fm_ppo.py", *args, "--stage-timesteps", 40, 40)
    assert done.returncode == 0, done.stderr[-2000:]
    run_dir = next(tmp_path.glob("CartpoleBalance*"))
    resumed = run(1, HERE.parent / "gorl_fm_ppo.py", "--resume", run_dir, "--stage-timesteps", 40, 40, 40)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    table = np.genfromtxt(run_dir / "eval.csv", delimiter=",", names=True)
    assert set(table["seed"]) == {1, 2} and table["step"][-1] == 120 and (table["return_mean"] > 0).all()


def test_a_frozen_decoder_on_several_devices(tmp_path):
    """Otherwise Figure 6 cannot be made on a machine with several GPUs."""
    command = HERE / "toy.py", "gorl_fm_ppo", *TINY
    stages = "--stage-timesteps", 80, 40
    assert run(1, *command, *stages, "--runs-dir", tmp_path / "of").returncode == 0
    frozen = "--decoder-from", f"{next((tmp_path / 'of').iterdir())}:1", "--total-timesteps", 80
    done = run(4, *command, *frozen, "--runs-dir", tmp_path / "runs")
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr[-2000:]
    decoders = []
    for file in (next(tmp_path.glob(x)) for x in ("of/*/*/policy_120.npz", "runs/*/*/policy_80.npz")):
        with np.load(file) as arrays:
            decoders.append({name: arrays[name] for name in arrays.files if name.startswith(".decoder")})
    assert len(decoders[0]) > 8
    for name, array in decoders[0].items():
        np.testing.assert_array_equal(array, decoders[1][name])
