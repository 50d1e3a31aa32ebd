"""Environments and rollouts: resets, terminal states, broken physics, ratios of 1, seeds."""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from brax.training.acme import running_statistics
from conftest import trained
from mujoco_playground import registry
from mujoco_playground._src import mjx_env
from oracles import numpy_gae, numpy_mlp, with_output
from scipy import stats
from toy import PointMass, Walled

import gorl_fm_ppo as gorl

KEY = jax.random.PRNGKey(0)
CLIP_EPS = 0.2


class NanReward(PointMass):
    def step(self, state, action):
        new = super().step(state, action)
        reward = jnp.where(jnp.isnan(new.obs[0]), jnp.nan, 1.0)
        return new.replace(reward=reward, obs=jnp.zeros(3), done=jnp.zeros(()))


class NanObs(PointMass):
    def step(self, state, action):
        return super().step(state, action).replace(reward=jnp.ones(()), done=jnp.zeros(()))


class HugeObs(PointMass):
    """Physics that blows up in finite numbers."""

    def step(self, state, action):
        new = super().step(state, action)
        obs = jnp.where(jnp.isnan(new.obs), 1e10, new.obs)
        return new.replace(reward=jnp.ones(()), done=jnp.zeros(()), obs=obs)


@pytest.fixture(params=[PointMass, NanReward, NanObs, HugeObs])
def nan_env(request):
    return request.param()


def is_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def burning(envs, index, fuse):
    """The environments, of which one breaks in its `fuse`-th step."""
    data = envs.state.data | {"fuse": envs.state.data["fuse"].at[index].set(fuse)}
    return envs._replace(state=envs.state.replace(data=data))


def start(args, env):
    """A state in the middle of a training."""
    state = gorl.init_state(args, env, KEY, 0)
    return state._replace(agent=trained(state.agent, KEY))


def pushing(args, env, mean):
    """An agent whose deterministic u is `mean` everywhere."""
    agent = gorl.init_agent(args, env, KEY)
    params = with_output(agent.encoder.params, [*mean, 0.0, 0.0])
    return agent._replace(encoder=agent.encoder.replace(params=params))


# --- ends of episodes ---


def test_time_limit(make_args, point_mass):
    """Otherwise episodes are longer or shorter than --episode-length, or never start again."""
    args = make_args(episode_length=3)
    envs = gorl.reset_envs(point_mass, 4, KEY)
    step = jax.jit(partial(gorl.step_envs, args, point_mass))
    for i in range(1, 10):
        moved = np.float64(envs.state.data["x"]) + 0.1 * np.tanh(0.5)
        envs, reward, terminated, truncated, broken = step(envs, jnp.full((4, 2), 0.5))
        np.testing.assert_allclose(reward, np.exp(-np.square(moved).sum(-1)), rtol=1e-5)
        assert (truncated == (i % 3 == 0)).all()
        assert not terminated.any()
        assert not broken.any()
        assert (envs.steps == i % 3).all()
        if i % 3 == 0:
            jax.tree.map(np.testing.assert_array_equal, envs.state, envs.first)
        else:
            np.testing.assert_allclose(envs.state.data["x"], moved, rtol=1e-5)


def test_terminal_state(make_args):
    """Otherwise an episode goes on behind its end, or its end is taken for the time limit."""
    env = Walled()
    args = make_args(episode_length=8)
    envs = gorl.reset_envs(env, 64, KEY)
    step = jax.jit(partial(gorl.step_envs, args, env))
    u = jnp.tile(jnp.array([2.0, 0.5]), (64, 1))
    x = first = np.float64(envs.state.data["x"])
    steps = np.zeros(64)
    both = 0
    for _ in range(30):
        x = x + 0.1 * np.tanh([2.0, 0.5])
        steps += 1
        envs, reward, terminated, truncated, broken = step(envs, u)
        outside = (np.abs(x) > 1).any(-1)
        np.testing.assert_allclose(reward, np.exp(-np.square(x).sum(-1)), rtol=1e-4)
        np.testing.assert_array_equal(terminated, outside)
        np.testing.assert_array_equal(truncated, (steps == 8) & ~outside)
        assert not broken.any()
        both += (outside & (steps == 8)).sum()
        x = np.where((outside | (steps == 8))[:, None], first, x)
        steps = np.where(outside | (steps == 8), 0, steps)
        np.testing.assert_allclose(envs.state.data["x"], x, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(envs.steps, steps)
    assert both > 0


def test_targets_and_advantages_around_terminal_states(make_args):
    """Otherwise returns reach over an episode's end, or bootstrap from where it started again."""
    env = Walled()
    args = make_args(num_envs=32, batch_size=32, num_minibatches=4, episode_length=9)
    args = replace(args, stage_timesteps=())
    state = start(args, env)
    rollout = jax.jit(partial(gorl.rollout, args, env))
    envs, steps, unrolls = rollout(state.agent, state.envs, KEY)
    value = gorl.MLP((256,) * 5 + (1,)).apply(state.agent.critic.params, unrolls.obs)[..., 0]
    got = gorl.gae(args, unrolls, value)

    # From the positions and actions alone.
    x = np.float64(steps.obs[..., :2]) + 0.1 * np.tanh(np.float64(steps.u))
    reward = 10 * np.exp(-np.square(x).sum(-1))
    terminated = (np.abs(x) > 1).any(-1)
    truncated = np.zeros_like(terminated)
    age = np.zeros(32)
    for t in range(len(x)):
        age += 1
        truncated[t] = (age == 9) & ~terminated[t]
        age[terminated[t] | truncated[t]] = 0
    assert terminated.mean() > 0.02
    assert truncated.mean() > 0.02

    obs = np.concatenate([steps.obs, envs.state.obs[None]])
    obs = np.clip((obs - state.agent.stats.mean) / state.agent.stats.std, -10, 10)
    all_values = numpy_mlp(state.agent.critic.params["params"], np.float64(obs))[..., 0]
    pieces = []
    for begin in range(0, 20, 5):
        now = slice(begin, begin + 5)
        data = reward[now], terminated[now], truncated[now], all_values[begin : begin + 6]
        pieces.append(numpy_gae(*data, args.gamma, args.gae_lambda))
    for ours, *theirs in zip(got, *pieces, strict=True):
        np.testing.assert_allclose(ours.T, np.concatenate(theirs, axis=1), rtol=1e-4, atol=1e-3)
    ends = unrolls.terminated
    np.testing.assert_allclose(got[0][ends], unrolls.reward[ends], rtol=1e-4, atol=1e-4)


def test_evaluation_ends_at_a_terminal_state(make_args):
    """Otherwise returns count the rewards of a second episode."""
    env = Walled()
    args = make_args(eval_envs=32, episode_length=12)
    agent = pushing(args, env, mean=[1.0, -0.5])
    got = jax.jit(partial(gorl.evaluate, args, env))(agent, KEY, True)
    reset_key, _ = jax.random.split(KEY)
    x = np.float64(gorl.reset_envs(env, 32, reset_key).state.data["x"])
    want = np.zeros(32)
    running = np.ones(32, bool)
    for _ in range(12):
        x = x + 0.1 * np.tanh([1.0, -0.5])
        want += running * np.exp(-np.square(x).sum(-1))
        running &= ~(np.abs(x) > 1).any(-1)
    assert 0.2 < running.mean() < 0.8
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_initial_states_differ(make_args, point_mass):
    """Otherwise environments, seeds, stages or evaluations replay the same episodes."""
    args = make_args(episode_length=1)

    def rewards(seed, index):
        """Of the first states of a stage, and of an evaluation, whose action is 0."""
        key = jax.random.PRNGKey(seed)
        state = gorl.init_state(args, point_mass, jax.random.fold_in(key, 0), index)
        eval_key = jax.random.fold_in(jax.random.fold_in(key, 1), index)
        returns = gorl.evaluate(args, point_mass, state.agent, eval_key, True)
        return state.envs.state.reward, returns

    indices = jnp.arange(3)
    over_indices = jax.vmap(rewards, (None, 0))
    seen = jnp.array(jax.jit(jax.vmap(over_indices, (0, None)))(indices, indices))
    assert len(set(seen.ravel().tolist())) == 3 * 3 * 2 * 4


# --- broken physics ---


def test_a_broken_step_is_dropped(make_args, nan_env):
    """Otherwise one broken simulation makes every weight NaN, or is taken for a terminal state."""
    args = make_args()
    envs = burning(gorl.reset_envs(nan_env, 4, KEY), index=2, fuse=3)
    step = jax.jit(partial(gorl.step_envs, args, nan_env))
    for i in range(1, 6):
        envs, reward, terminated, truncated, broken = step(envs, jnp.ones((4, 2)))
        assert broken.tolist() == truncated.tolist() == [False, False, i == 3, False]
        assert not terminated.any()
        assert (reward[2] == 0) == (i == 3)
        assert is_finite((envs, reward))
        if i == 3:
            now, first = jax.tree.map(lambda x: x[2], (envs.state, envs.first))
            jax.tree.map(np.testing.assert_array_equal, now, first)
            assert envs.steps.tolist() == [3, 3, 0, 3]


def test_broken_physics_reaches_nothing(make_args, nan_env):
    """Otherwise a NaN in one of 2048 environments ends in losses, statistics or decoder data."""
    args = make_args()
    state = start(args, nan_env)
    run = jax.jit(partial(gorl.iteration, args, nan_env))
    clean, clean_metrics = run(state, CLIP_EPS)
    got, metrics = run(state._replace(envs=burning(state.envs, index=2, fuse=3)), CLIP_EPS)
    assert clean_metrics["nan_resets"] == 0
    assert metrics["nan_resets"] == 1
    assert is_finite(got)
    assert is_finite(metrics)
    kernels = [x.agent.encoder.params["params"]["MLP_0"]["Dense_0"]["kernel"] for x in (clean, got)]
    assert (kernels[0] != kernels[1]).any()
    assert (jnp.abs(got.agent.stats.mean) < 10).all()
    assert (got.agent.stats.std < 10).all()


def test_broken_physics_ends_an_evaluation_episode(make_args, point_mass, monkeypatch):
    """Otherwise the logged return is NaN, or counts rewards after the physics broke."""
    args = make_args(episode_length=20)
    reset_envs = gorl.reset_envs

    def reset(env, num_envs, key):
        return burning(reset_envs(env, num_envs, key), index=1, fuse=5)

    monkeypatch.setattr(gorl, "reset_envs", reset)
    agent = pushing(args, point_mass, mean=[0.0, 0.0])
    got = jax.jit(partial(gorl.evaluate, args, point_mass))(agent, KEY, True)
    reset_key, _ = jax.random.split(KEY)
    x = np.float64(reset_envs(point_mass, 4, reset_key).state.data["x"])
    np.testing.assert_allclose(got, np.exp(-np.square(x).sum(-1)) * [20, 4, 20, 20], rtol=1e-5)


# --- rollout and iteration ---


def test_rollout_records_what_happened(make_args, point_mass):
    """Otherwise the update or the decoder learns from actions that were never taken."""
    args = make_args(batch_size=6, episode_length=7, stage_timesteps=())
    state = start(args, point_mass)
    agent = state.agent
    end, steps, _ = jax.jit(partial(gorl.rollout, args, point_mass))(agent, state.envs, KEY)
    assert steps.obs.shape == (15, 4, 3)
    assert steps.u.shape == steps.latent.shape == (15, 4, 2)
    normed = gorl.normalize(steps.obs, agent.stats)
    mean, std = agent.encoder.apply_fn(agent.encoder.params, normed)
    log_prob = stats.norm(np.float64(mean), np.float64(std)).logpdf(steps.latent).sum(-1)
    np.testing.assert_allclose(steps.log_prob, log_prob, rtol=1e-5, atol=1e-5)
    u = gorl.decode(args, agent, steps.obs, steps.latent)
    np.testing.assert_allclose(steps.u, u, rtol=1e-4, atol=1e-4)
    noise = np.ravel((steps.latent - mean) / std)
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert len(set(noise.tolist())) > 0.99 * noise.size

    moved = np.float64(steps.obs[..., :2]) + 0.1 * np.tanh(steps.u)
    truncated = np.broadcast_to(np.arange(1, 16)[:, None] % 7 == 0, (15, 4))
    following = np.concatenate([steps.obs, end.state.obs[None]])[1:, :, :2]
    want = np.where(truncated[..., None], state.envs.first.obs[..., :2], moved)
    np.testing.assert_allclose(following, want, atol=1e-5)
    np.testing.assert_array_equal(steps.truncated, truncated)
    np.testing.assert_allclose(steps.reward, np.exp(-np.square(moved).sum(-1)), rtol=1e-4)
    assert not steps.terminated.any()
    assert not steps.broken.any()


def test_iteration(make_args, point_mass):
    """Otherwise observations are not normalised, the decoder moves, or a logged column is wrong."""
    args = make_args()
    state = start(args, point_mass)
    empty = running_statistics.init_state(jnp.zeros(3))
    state = state._replace(agent=state.agent._replace(stats=empty))
    run = jax.jit(partial(gorl.iteration, args, point_mass))
    new, metrics = run(state, CLIP_EPS)
    obs, u, reward, advantage = (np.float64(x[-40:]) for x in new.recent)
    assert new.agent.stats.count.lo == 40
    np.testing.assert_allclose(new.agent.stats.mean, obs.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.agent.stats.std, obs.std(0), rtol=1e-4)
    for name in ("decoder", "decoder_stats"):
        parts = [getattr(x.agent, name) for x in (state, new)]
        jax.tree.map(np.testing.assert_array_equal, *parts)
    np.testing.assert_allclose(metrics["reward_mean"], reward.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["u_std"], u.std(), rtol=1e-4)
    np.testing.assert_allclose(metrics["u_beyond_5"], (np.abs(u) > 5).mean(), rtol=1e-5)
    # Advantages are those of the critic after the update, at observations as it was trained on.
    keys = jax.random.split(state.key, 3)
    _, _, unrolls = gorl.rollout(args, point_mass, state.agent, state.envs, keys[1])
    value = new.agent.critic.apply_fn(new.agent.critic.params, unrolls.obs)[..., 0]
    _, by_unroll = gorl.gae(args, unrolls, value)
    want = [by_unroll[4 * (i // 5) + j, i % 5] for i in range(10) for j in range(4)]
    np.testing.assert_allclose(advantage, want, rtol=1e-3, atol=1e-4)

    again, _ = run(new, CLIP_EPS)
    assert (again.recent.u[-40:] != new.recent.u[-40:]).mean() > 0.9
    both = np.concatenate([obs, again.recent.obs[-40:]])
    assert again.agent.stats.count.lo == 80
    np.testing.assert_allclose(again.agent.stats.mean, both.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again.agent.stats.std, both.std(0), rtol=1e-4)


def test_a_decoder_learns_from_its_stage_alone(make_args, point_mass, monkeypatch, tmp_path):
    """Otherwise a decoder is trained on the stage before, or on pairs that were never written."""
    args = make_args(decoder_buffer_size=100)  # stages have 80, 80, 40 and 40 pairs
    sizes = []
    traces = []
    iteration = gorl.iteration

    def traced_iteration(*args):
        traces.append(args)
        return iteration(*args)

    def decoder_epoch(args, decoder, agent, pairs, key, epoch):
        sizes.append(len(pairs.u))
        empty = (pairs.reward == 0).mean()  # the reward of no real pair is 0
        return decoder, empty, empty

    monkeypatch.setattr(gorl, "decoder_epoch", decoder_epoch)
    monkeypatch.setattr(gorl, "iteration", traced_iteration)
    (tmp_path / "checkpoints").mkdir()
    gorl.train(args, point_mass, tmp_path)
    losses = np.genfromtxt(tmp_path / "decoder.csv", delimiter=",", names=True)["loss"]
    assert set(sizes) == {40}
    assert len(losses) == 6
    assert (losses == 0).all()
    assert len(traces) == 1  # or minutes would go into compiling each stage again


# --- Playground ---


def the_line(args, capsys):
    """What is said of an environment that cannot be used."""
    with pytest.raises(SystemExit) as caught:
        gorl.make_env(args)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"--env-id: got {args.env_id}" in lines[0]
    return lines[0]


@pytest.mark.parametrize("env_id", ["Go1JoystickFlatTerrain", "PandaPickCube", "LeapCubeReorient"])
def test_robots_without_a_network(make_args, capsys, monkeypatch, env_id):
    """Otherwise a robot whose model Playground would have to download ends in a traceback."""

    def offline():
        raise OSError("no network")

    monkeypatch.setattr(mjx_env, "ensure_menagerie_exists", offline)
    assert "no network" in the_line(make_args(env_id=env_id), capsys)


def test_reacher_of_another_mujoco(make_args, capsys, monkeypatch):
    """Otherwise a task that Playground cannot build with this MuJoCo ends in a traceback."""
    monkeypatch.delattr(mujoco.MjSpec, "find_body", raising=False)  # as in MuJoCo 3.17
    assert "find_body" in the_line(make_args(env_id="ReacherEasy"), capsys)


def test_no_flat_observation(make_args, capsys, monkeypatch):
    """Otherwise an environment with a dictionary of observations fails inside the networks."""
    env = PointMass()
    env.observation_size = {"state": (3,)}
    monkeypatch.setattr(registry, "load", lambda env_id, config: env)
    assert "flat" in the_line(make_args(env_id="CheetahRun"), capsys)


def test_no_environment(make_args, capsys):
    """Otherwise a slip of the pen ends in a traceback."""
    assert "HopperStand" in the_line(make_args(env_id="HopperStnad"), capsys)


@pytest.fixture(scope="module")
def cheetah(make_args):
    """CheetahRun, a compiled rollout, and two seeds' agents, environments and keys."""
    args = make_args(env_id="CheetahRun", num_envs=8, num_minibatches=2, unroll_length=10)
    env = gorl.make_env(args)
    keys = jax.vmap(jax.random.PRNGKey)(jnp.array([1, 2]))
    states = jax.jit(jax.vmap(partial(gorl.init_state, args, env), (0, None)))(keys, 0)
    rollout = jax.jit(jax.vmap(partial(gorl.rollout, args, env)))
    return args, rollout, (states.agent, states.envs, keys)


def gradients(args, agents, unrolls):
    """The loss's gradients and metrics at each seed's own rollout."""

    def of_seed(agent, unrolls):
        params = {"encoder": agent.encoder.params, "critic": agent.critic.params}
        return jax.grad(gorl.ppo_loss, has_aux=True)(params, args, agent, unrolls, 1e-4)

    return jax.jit(jax.vmap(of_seed))(agents, unrolls)


@pytest.mark.parametrize("restarted", [True, False])
def test_ratio_starts_at_one(cheetah, restarted):
    """Otherwise PPO's first update already treats the rollout as another policy's."""
    args, rollout, (agents, envs, keys) = cheetah
    agents = agents if restarted else jax.vmap(trained)(agents, keys)
    _, steps, unrolls = rollout(agents, envs, keys)
    _, metrics = gradients(args, agents, unrolls)
    assert (metrics["clip_fraction"] == 0).all()  # at a clip range of 1e-4
    assert (np.abs(metrics["approx_kl"]) < 1e-6).all()
    if restarted:
        np.testing.assert_allclose(metrics["latent_kl"], 0, atol=1e-12)
        want = stats.norm.logpdf(np.float64(steps.latent)).sum(-1)
        np.testing.assert_allclose(steps.log_prob, want, rtol=1e-6, atol=1e-6)
    assert (steps.obs[0] != steps.obs[1]).mean() > 0.9
    assert (steps.u[0] != steps.u[1]).all()


def test_nan_in_the_real_physics(cheetah):
    """Otherwise a NaN in MuJoCo's state reaches the networks, or counts as a terminal state."""
    args, rollout, (agents, envs, keys) = cheetah
    data = envs.state.data.replace(qpos=envs.state.data.qpos.at[0, 3].set(jnp.nan))
    end, steps, unrolls = rollout(agents, envs._replace(state=envs.state.replace(data=data)), keys)
    assert steps.broken.sum((1, 2)).tolist() == [1, 0]
    assert steps.truncated[0, 0].tolist() == [i == 3 for i in range(8)]
    assert steps.reward[0, 0, 3] == 0
    assert not steps.terminated.any()
    np.testing.assert_array_equal(steps.obs[0, 1, 3], envs.first.obs[0, 3])
    assert is_finite((end.state.obs, steps))
    assert is_finite(gradients(args, agents, unrolls))


second = partial(jax.tree.map, lambda x: x[1:])
close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4))


def test_a_seed_starts_the_same_alone(make_args, point_mass):
    """Otherwise the run of one of --num-seeds seeds cannot be repeated alone."""
    init = jax.jit(jax.vmap(partial(gorl.init_state, make_args(), point_mass), (0, None)))
    keys = jax.vmap(jax.random.PRNGKey)(jnp.array([1, 2]))
    both = jax.tree.leaves(init(keys, 0))
    alone = jax.tree.leaves(init(keys[1:], 0))
    jax.tree.map(np.testing.assert_array_equal, second(both), alone)


def test_a_seed_does_not_depend_on_its_neighbours(cheetah):
    """Otherwise --num-seeds changes results by more than rounding."""
    args, rollout, (agents, envs, keys) = cheetah
    agents = jax.vmap(trained)(agents, keys)
    both = rollout(agents, envs, keys)
    alone = rollout(*second((agents, envs, keys)))
    assert alone[1].reward.shape == (1, 10, 8)
    close(second(both[1]), alone[1])
    grads = gradients(args, agents, both[2])
    close(second(grads), gradients(args, *second((agents, both[2]))))


def test_the_scripts_own_name_stands_first(make_args, capsys, monkeypatch):
    """Otherwise a user of several scripts does not see which of them complains."""
    monkeypatch.setattr(sys, "argv", ["somewhere/my_algo.py"])
    assert the_line(make_args(env_id="Nothing"), capsys).startswith("my_algo.py: --env-id")
