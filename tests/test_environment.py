"""Environments and rollouts: resets, NaN physics, ratios of exactly 1, seeds side by side."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PointMass, trained
from scipy import stats

import gorl_fm_ppo as gorl

KEY = jax.random.PRNGKey(0)
gorl_reset = gorl.reset_envs
STAGED = {"clip_eps": (1e-4,), "kl_coef": (0.0,), "max_grad_norm": (1.0,)}


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def burning(envs, index, fuse):
    """The environments, of which one goes NaN in its `fuse`-th step."""
    data = envs.state.data | {"fuse": envs.state.data["fuse"].at[index].set(fuse)}
    return envs._replace(state=envs.state.replace(data=data))


def start(args, env, key=KEY):
    agent = gorl.init_agent(args, env.observation_size, env.action_size, key)
    return trained(agent, key), gorl.reset_envs(env, args.num_envs, key)


def train_state(args, env):
    agent, envs = start(args, env)
    ring = {"obs": jnp.zeros((30, 4, 3)), "u": jnp.zeros((30, 4, 2)), "reward": jnp.zeros((30, 4))}
    return gorl.TrainState(agent, envs, ring, None)


def test_time_limit(make_args, point_mass):
    """Otherwise episodes are longer or shorter than --episode-length, or go on from where they ended."""
    args = make_args(episode_length=3)
    envs = gorl.reset_envs(point_mass, 4, KEY)
    step = jax.jit(partial(gorl.step_envs, args, point_mass))
    for i in range(1, 10):
        x = envs.state.data["x"]
        envs, reward, truncated, broken = step(envs, jnp.full((4, 2), 0.5))
        moved = np.float64(x) + 0.1 * np.tanh(0.5)
        np.testing.assert_allclose(reward, np.exp(-np.square(moved).sum(-1)), rtol=1e-5)
        assert (truncated == (i % 3 == 0)).all() and not broken.any() and (envs.steps == i % 3).all()
        if i % 3 == 0:
            jax.tree.map(np.testing.assert_array_equal, envs.state, envs.first)
        else:
            np.testing.assert_allclose(envs.state.data["x"], moved, rtol=1e-5)


def test_initial_states_differ(point_mass):
    """Otherwise environments, seeds, stages or evaluations replay the same episodes."""
    seen = []
    for seed in range(3):
        for purpose in (gorl.RESET, gorl.EVAL_RESET):
            for index in range(3):
                key = gorl.derive_key(jax.random.PRNGKey(seed), purpose, index)
                seen += gorl.reset_envs(point_mass, 4, key).state.data["x"][:, 0].tolist()
    assert len(set(seen)) == 3 * 2 * 3 * 4


def test_keys_of_different_purposes_differ():
    """Otherwise the noise of two parts of a run is the same."""
    purposes = gorl.INIT, gorl.RESET, gorl.TRAIN, gorl.EVAL_RESET, gorl.EVAL_ACT, gorl.DECODER
    triples = [(s, p, i) for s in range(4) for p in purposes for i in range(50)]
    keys = jax.vmap(lambda s, p, i: gorl.derive_key(jax.random.PRNGKey(s), p, i))(*jnp.array(triples).T)
    assert len({tuple(k) for k in np.asarray(keys).tolist()}) == len(triples)


def test_nan_step_is_dropped(make_args, nan_env):
    """Otherwise one broken simulation makes every weight NaN."""
    args = make_args()
    envs = burning(gorl.reset_envs(nan_env, 4, KEY), 2, 3)
    step = jax.jit(partial(gorl.step_envs, args, nan_env))
    for i in range(1, 6):
        envs, reward, truncated, broken = step(envs, jnp.ones((4, 2)))
        assert broken.tolist() == truncated.tolist() == [False, False, i == 3, False]
        assert (reward[2] == 0) == (i == 3) and finite((envs, reward))
        if i == 3:
            one = jax.tree.map(lambda x: x[2], (envs.state, envs.first))
            jax.tree.map(np.testing.assert_array_equal, *one)
            assert envs.steps.tolist() == [3, 3, 0, 3]


def test_nan_reaches_nothing(make_args, nan_env):
    """Otherwise a NaN in one of 2048 environments ends in losses, statistics or decoder data."""
    args = make_args(**STAGED)
    state = train_state(args, nan_env)
    run = jax.jit(partial(gorl.iteration, args, nan_env))
    clean, clean_metrics = run(state, KEY, 0, (0, 0))
    got, metrics = run(state.replace(envs=burning(state.envs, 2, 3)), KEY, 0, (0, 0))
    assert clean_metrics["nan_resets"] == 0 and metrics["nan_resets"] == 1
    assert finite(got) and finite(metrics)
    assert (jax.tree.leaves(clean.agent)[0] != jax.tree.leaves(got.agent)[0]).any()
    assert (jnp.abs(got.agent.stats.mean) < 10).all() and (got.agent.stats.var < 100).all()


def test_nan_ends_an_evaluation_episode(make_args, point_mass, monkeypatch):
    """Otherwise the logged return is NaN, or counts rewards after the physics broke."""
    args = make_args(episode_length=20)
    agent = gorl.init_agent(args, 3, 2, KEY)  # its deterministic action is 0: nothing moves
    envs = gorl.reset_envs(point_mass, 4, gorl.derive_key(KEY, gorl.EVAL_RESET, 7))
    monkeypatch.setattr(gorl, "reset_envs", lambda env, n, key: burning(gorl_reset(env, n, key), 1, 5))
    got = jax.jit(partial(gorl.evaluate, args, point_mass))(agent, KEY, 7, True)
    want = np.exp(-np.square(np.float64(envs.state.data["x"])).sum(-1)) * [20, 4, 20, 20]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_rollout_records_what_happened(make_args, point_mass):
    """Otherwise the update or the decoder learns from actions that were never taken."""
    args = make_args(batch_size=6, num_minibatches=2, episode_length=7)
    agent, envs = start(args, point_mass)
    end, steps, last_obs, metrics = jax.jit(partial(gorl.rollout, args, point_mass))(agent, envs, KEY)
    u, latent = steps.u, steps.drawn["latent"]
    assert steps.obs.shape == (3, 5, 4, 3) and u.shape == (3, 5, 4, 2) and last_obs.shape == (3, 4, 3)
    normed = gorl.normalize(agent.stats, steps.obs)
    mean, std = gorl.latent_distribution(agent.params["encoder"], normed)
    want = stats.norm(np.float64(mean), np.float64(std)).logpdf(latent).sum(-1)
    np.testing.assert_allclose(steps.drawn["log_prob"], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gorl.decode(args, agent.decoder, steps.obs, latent), u, rtol=1e-4, atol=1e-4)
    noise = np.asarray((latent - mean) / std).ravel()
    assert stats.kstest(noise, "norm").pvalue > 1e-3 and len(set(noise.tolist())) > 0.99 * noise.size

    following = np.concatenate([steps.obs.reshape(15, 4, 3), end.state.obs[None]])
    x, actions = following[:-1, :, :2], np.tanh(u.reshape(15, 4, 2))
    truncated = (np.arange(1, 16) % 7 == 0)[:, None]
    first = np.asarray(envs.first.obs)[..., :2]
    np.testing.assert_allclose(
        following[1:, :, :2], np.where(truncated[..., None], first, x + 0.1 * actions), atol=1e-5
    )
    np.testing.assert_array_equal(steps.truncated.reshape(15, 4), np.broadcast_to(truncated, (15, 4)))
    np.testing.assert_array_equal(last_obs, following[5::5])
    np.testing.assert_allclose(
        steps.reward.reshape(15, 4), np.exp(-np.square(x + 0.1 * actions).sum(-1)), rtol=1e-4
    )
    np.testing.assert_allclose(metrics["reward_mean"], steps.reward.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["u_std"], np.float64(u).std(), rtol=1e-4)
    np.testing.assert_allclose(metrics["u_beyond_5"], (np.abs(u) > 5).mean(), rtol=1e-5)


def test_iteration_moves_statistics_and_leaves_the_decoder(make_args, point_mass):
    """Otherwise observations are never normalised, or the decoder changes under the encoder."""
    args = make_args(**STAGED)
    state = train_state(args, point_mass)
    state = state.replace(agent=state.agent.replace(stats=state.agent.stats._replace(count=jnp.float32(0))))
    run = jax.jit(partial(gorl.iteration, args, point_mass))
    new, _ = run(state, KEY, 0, (0, 0))
    seen = np.float64(new.ring["obs"][:10].reshape(-1, 3))
    assert new.agent.stats.count == 40 and not new.ring["obs"][10:].any()
    np.testing.assert_allclose(new.agent.stats.mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.agent.stats.var, seen.var(0), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, new.agent.decoder, state.agent.decoder)
    again, _ = run(state, KEY, 1, (0, 1))
    assert (again.ring["u"][10:20] != new.ring["u"][:10]).mean() > 0.9


def test_a_stage_records_from_the_start_of_the_ring(make_args, point_mass):
    """Otherwise a decoder is trained on the stage before, or on rows that were never written."""
    args = make_args(**STAGED)  # stages end after 2, 4, 5 and 6 iterations of 10 steps
    state, run = train_state(args, point_mass), jax.jit(partial(gorl.iteration, args, point_mass))
    for index, stage, first in [(0, 0, 0), (1, 0, 10), (2, 1, 0), (3, 1, 10), (4, 2, 0), (5, 3, 0)]:
        ring = run(state, KEY, index, (stage, first // 10))[0].ring
        written = np.asarray(ring["obs"]).any((1, 2)).nonzero()[0]
        np.testing.assert_array_equal(written, np.arange(first, first + 10))


# --- the real physics ---


@pytest.fixture(scope="module")
def cheetah(make_args):
    """CheetahRun, a compiled rollout, and keys, agents and environments of two seeds."""
    args = make_args(env_id="CheetahRun", num_envs=8, batch_size=8, num_minibatches=1, unroll_length=30)
    env, keys = gorl.make_env(args), jax.vmap(jax.random.PRNGKey)(jnp.array([1, 2]))
    agents = jax.jit(jax.vmap(partial(gorl.init_agent, args, env.observation_size, env.action_size)))(keys)
    envs = jax.jit(jax.vmap(partial(gorl.reset_envs, env, 8)))(keys)
    return args, jax.jit(jax.vmap(partial(gorl.rollout, args, env))), keys, agents, envs


def metrics_of(args, agents, steps, last_obs):
    """loss_fn's metrics and gradients at each seed's own rollout."""

    def one(agent, steps, last_obs):
        batch = gorl.as_unrolls(steps._replace(obs=gorl.normalize(agent.stats, steps.obs)))
        last_obs = gorl.normalize(agent.stats, last_obs).reshape(-1, last_obs.shape[-1])
        return jax.grad(gorl.loss_fn, has_aux=True)(agent.params, args, batch, last_obs, None)

    return jax.jit(jax.vmap(one))(agents, steps, last_obs)


@pytest.mark.parametrize("restarted", [True, False])
def test_ratio_starts_at_one(cheetah, restarted):
    """Otherwise PPO's first update already treats the rollout as another policy's."""
    args, rollout, keys, agents, envs = cheetah
    agents = agents if restarted else jax.vmap(trained)(agents, keys)
    _, steps, last_obs, _ = rollout(agents, envs, keys)
    _, metrics = metrics_of(replace(args, clip_eps=1e-4), agents, steps, last_obs)
    assert (metrics["clip_fraction"] == 0).all()  # at a clip range of 1e-4
    assert (np.abs(metrics["approx_kl"]) < 1e-6).all()
    if restarted:
        np.testing.assert_allclose(metrics["latent_kl"], 0, atol=1e-12)
        want = stats.norm.logpdf(np.float64(steps.drawn["latent"])).sum(-1)
        np.testing.assert_allclose(steps.drawn["log_prob"], want, rtol=1e-6, atol=1e-6)
    assert (steps.obs[0] != steps.obs[1]).mean() > 0.9 and (steps.u[0] != steps.u[1]).all()


def test_nan_in_the_real_physics(cheetah):
    """Otherwise Playground's own signal of a NaN state is missed."""
    args, rollout, keys, agents, envs = cheetah
    data = envs.state.data.replace(qpos=envs.state.data.qpos.at[0, 3].set(jnp.nan))
    broken = envs._replace(state=envs.state.replace(data=data))
    end, steps, last_obs, metrics = rollout(agents, broken, keys)
    assert metrics["nan_resets"].tolist() == [1, 0]
    assert steps.truncated[0, 0, 0].tolist() == [i == 3 for i in range(8)] and steps.reward[0, 0, 0, 3] == 0
    np.testing.assert_array_equal(steps.obs[0, 0, 1, 3], envs.first.obs[0, 3])
    assert finite((end.state.obs, steps, last_obs, metrics))
    assert finite(metrics_of(args, agents, steps, last_obs))


second = partial(jax.tree.map, lambda x: x[1:])
close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4))


def test_a_seed_starts_the_same_alone(make_args, point_mass):
    """Otherwise the run of one of --num-seeds seeds cannot be repeated alone."""

    def begin(seeds):
        keys = jax.vmap(gorl.derive_key, (0, None, None))(
            jax.vmap(jax.random.PRNGKey)(jnp.array(seeds)), 1, 3
        )
        agents = jax.vmap(partial(gorl.init_agent, make_args(), 3, 2))(keys)
        return keys, agents, jax.vmap(partial(gorl.reset_envs, point_mass, 4))(keys)

    jax.tree.map(np.testing.assert_array_equal, second(begin([1, 2])), begin([2]))


def test_a_seed_does_not_depend_on_its_neighbours(cheetah):
    """Otherwise --num-seeds changes results by more than rounding."""
    args, rollout, keys, agents, envs = cheetah
    agents = jax.vmap(trained)(agents, keys)
    both, alone = rollout(agents, envs, keys), rollout(*second((agents, envs, keys)))
    assert alone[1].reward.shape == (1, 1, 30, 8)
    close(second(both[1:]), alone[1:])
    grads = metrics_of(args, agents, both[1], both[2])
    close(second(grads), metrics_of(args, *second((agents, both[1], both[2]))))


def test_point_mass_is_no_easier():
    """The cheap environment of these tests has the interface and types that the real ones have."""
    state = PointMass().reset(KEY)
    assert state.obs.shape == (3,) and state.obs.dtype == state.reward.dtype == jnp.float32
