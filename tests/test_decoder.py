"""The decoder: identity at first, flow matching's loss and optimum, what it reads and what it does not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import trained
from scipy import integrate, stats
from scipy.spatial.distance import cdist, pdist

import gorl_fm_ppo as gorl

OBS, ACT = 3, 2
KEY = jax.random.PRNGKey(0)


@pytest.fixture
def agent(make_args):
    return jax.jit(partial(gorl.init_agent, make_args(), OBS, ACT))(KEY)


def ring_of(obs, u, envs=4):
    rows = len(obs) // envs
    obs, u = (jnp.array(x, jnp.float32).reshape(rows, envs, -1) for x in (obs, u))
    return {"obs": obs, "u": u, "reward": jnp.zeros((rows, envs))}


def train(args, decoder, ring, epochs):
    pairs = ring["reward"].size
    opt = optax.adam(args.decoder_learning_rate).init(decoder["net"])
    epoch = jax.jit(partial(gorl.decoder_epoch, args, pairs))
    for key in jax.random.split(KEY, epochs):
        decoder, opt, loss = epoch(decoder, opt, ring, key)
    return decoder, loss


def test_first_decoder_is_the_identity(make_args, agent):
    """Otherwise stage 0 is not PPO in the action space."""
    obs = jnp.concatenate([jax.random.normal(KEY, (50, OBS)), jnp.array([[1e6], [-1e6]]) * jnp.ones(OBS)])
    latent = 3 * jax.random.normal(KEY, (52, ACT))
    np.testing.assert_array_equal(gorl.decode(make_args(), agent.decoder, obs, latent), latent)


def test_all_layers_learn(make_args, agent):
    """Otherwise a decoder that starts as the identity stays a linear map, or stays the identity."""
    assert all(layer["kernel"].any() for layer in agent.decoder["net"][:-1])
    args = make_args(decoder_batch_size=16)
    ring = ring_of(jax.random.normal(KEY, (64, OBS)), jax.random.normal(KEY, (64, ACT)) + 1)
    decoder, _ = train(args, agent.decoder, ring, 2)
    for old, new in zip(agent.decoder["net"], decoder["net"], strict=True):
        assert (old["kernel"] != new["kernel"]).mean() > 0.9 and (old["bias"] != new["bias"]).mean() > 0.9
    jax.tree.map(np.testing.assert_array_equal, decoder["stats"], agent.decoder["stats"])


def energy_distance(x, y):
    return 2 * cdist(x, y).mean() - 2 * pdist(x).sum() / len(x) ** 2 - 2 * pdist(y).sum() / len(y) ** 2


def test_decoder_learns_two_modes(make_args, agent):
    """Otherwise the policy has lost what GoRL is for: more than one mode, different in each state."""
    r, n = np.random.default_rng(0), 2**14

    def draw(obs):
        mode = np.stack([1.5 + 0.5 * obs[:, 0], -1 + 0.5 * obs[:, 1]], axis=-1)
        return r.choice([-1, 1], (len(obs), 1)) * mode + 0.1 * r.normal(size=mode.shape)

    obs = r.uniform(-1, 1, (n, OBS))
    args = make_args(decoder_batch_size=256, decoder_learning_rate=2e-3)
    decoder, _ = train(args, agent.decoder, ring_of(obs, draw(obs)), 25)
    for state in ([0.8, -0.8, 0.3], [-0.8, 0.8, 0.3]):
        states = np.tile(state, (1500, 1))
        latent = jax.random.normal(jax.random.PRNGKey(1), (1500, ACT))
        got = np.asarray(gorl.decode(args, decoder, jnp.array(states, jnp.float32), latent))
        want, again = draw(states), draw(states)
        gaussian = r.multivariate_normal(want.mean(0), np.cov(want.T), 1500)
        assert energy_distance(again, want) < 0.01
        assert energy_distance(got, want) < 0.25 * energy_distance(gaussian, want)
        assert 0.4 < (got[:, 0] > 0).mean() < 0.6
        for sign in (1, -1):
            side = np.sign(got[:, 0]) == sign
            np.testing.assert_allclose(got[side].mean(0), want[np.sign(want[:, 0]) == sign].mean(0), atol=0.2)


@pytest.fixture
def drawn(agent, monkeypatch):
    """What the loss draws for 4096 pairs: a_tau, tau, and from both the noise; and obs and u."""
    seen = []
    monkeypatch.setattr(gorl, "velocity", lambda flow, *x: seen.append(x) or jnp.zeros_like(x[1]))

    def draw(key):
        keys = jax.random.split(jax.random.PRNGKey(9))
        obs, u = jax.random.normal(keys[0], (4096, OBS)), 2 + 3 * jax.random.normal(keys[1], (4096, ACT))
        loss = gorl.flow_matching_loss(None, obs, u, key)
        seen_obs, a, tau = (np.float64(x) for x in seen[-1])
        np.testing.assert_array_equal(seen_obs, np.broadcast_to(obs, (8, *obs.shape)))
        good = np.broadcast_to(tau < 0.99, a.shape)
        return np.where(good, (a - tau * u) / (1 - tau), np.nan), tau, np.asarray(obs), np.asarray(u), loss

    return draw


def test_decoder_input_is_fresh_noise(drawn):
    """Otherwise the decoder learns to invert the encoder's latents, not to turn N(0, I) into actions."""
    noise, tau, obs, u, _ = drawn(KEY)
    assert noise.shape == (8, 4096, ACT) and tau.shape == (8, 4096, 1)
    assert stats.kstest(tau.ravel(), "uniform").pvalue > 1e-3
    for i in range(ACT):
        values = noise[..., i].ravel()
        assert stats.kstest(values[np.isfinite(values)], "norm").pvalue > 1e-3
    good = np.isfinite(noise).all(-1).all(0)
    columns = [*noise[:, good].transpose(0, 2, 1).reshape(8 * ACT, -1), *tau[:, good, 0], *obs[good].T]
    correlation = np.corrcoef(np.vstack([*columns, *u[good].T])) - np.eye(len(columns) + ACT)
    assert np.abs(correlation).max() < 5 / np.sqrt(good.sum())
    other = drawn(jax.random.PRNGKey(1))[0]
    assert np.nanmax(np.abs(np.nanmean(noise * other, axis=(0, 1)))) < 0.05


def test_loss_of_a_zero_velocity(drawn):
    """Otherwise the target is not u - noise: E|u - noise|^2 = |u|^2 + dimension."""
    *_, u, loss = drawn(KEY)
    want = np.square(np.float64(u)).sum(-1).mean() + ACT
    error = np.sqrt(4 * np.square(np.float64(u)).mean() + 2) * np.sqrt(ACT / (8 * 4096))
    assert abs(loss - want) < 5 * error


@pytest.mark.parametrize("std", [0.0, 0.3, 2.0])
def test_loss_of_the_optimal_velocity(monkeypatch, std):
    """Otherwise minimising the loss does not give the flow to the data: of N(1, std^2), in closed form."""

    def optimal(flow, obs, a, t):
        """E[u - noise | a_t = a], of jointly Gaussian u and noise."""
        covariance, variance = t * std**2 - (1 - t), (1 - t) ** 2 + t**2 * std**2
        return 1 + covariance / variance * (a - t)

    def residual(t):
        return std**2 + 1 - (t * std**2 - (1 - t)) ** 2 / ((1 - t) ** 2 + t**2 * std**2)

    monkeypatch.setattr(gorl, "velocity", optimal)
    u = 1 + std * jax.random.normal(KEY, (20_000, ACT))
    loss = gorl.flow_matching_loss(None, jnp.zeros((20_000, OBS)), u, KEY)
    np.testing.assert_allclose(loss, ACT * integrate.quad(residual, 0, 1)[0], rtol=0.02, atol=1e-6)


def test_time_embedding(monkeypatch):
    """Otherwise saved decoders read time differently, or the flow cannot tell times apart."""
    monkeypatch.setattr(gorl, "mlp", lambda flow, x: x)
    obs, a, t = np.ones((7, OBS)), 2 * np.ones((7, ACT)), np.linspace(0, 1, 7)[:, None]
    got = gorl.velocity(None, jnp.array(obs), jnp.array(a), jnp.array(t, jnp.float32))
    want = np.concatenate(
        [obs, a, *(np.cos(t * 2**k) for k in range(4)), *(np.sin(t * 2**k) for k in range(4))], 1
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10])
def test_decode_is_eulers_method(make_args, agent, monkeypatch, steps):
    """Otherwise the flow is followed for the wrong time, from the wrong end or with the wrong statistics."""
    latent, args = jax.random.normal(KEY, (20, ACT)), make_args(decoder_steps=steps)
    obs, decoder = jax.random.normal(KEY, (20, OBS)), trained(agent, KEY).decoder
    normed = (obs - decoder["stats"].mean) / jnp.sqrt(decoder["stats"].var)
    fields = {
        "growth": (lambda flow, obs, a, t: a, latent * (1 + 1 / steps) ** steps),
        "time": (lambda flow, obs, a, t: t + 0 * a, latent + (steps - 1) / (2 * steps)),
        "obs": (lambda flow, obs, a, t: obs[:, :ACT], latent + normed[:, :ACT]),
    }
    for field, want in fields.values():
        monkeypatch.setattr(gorl, "velocity", field)
        np.testing.assert_allclose(gorl.decode(args, decoder, obs, latent), want, rtol=1e-5, atol=1e-5)


def test_decoder_does_not_move_with_the_statistics(make_args, agent):
    """Otherwise the map that the encoder trains on moves under it."""
    agent, args = trained(agent, KEY), make_args()
    fresh = gorl.init_agent(args, OBS, ACT, KEY)
    agent = gorl.start_stage(args, agent, fresh)
    moved = agent.replace(stats=gorl.merge_stats(agent.stats, 5 + jnp.ones((1000, OBS))))
    obs = jax.random.normal(KEY, (20, OBS))
    before, after = (gorl.act(args, a, obs, KEY, False) for a in (agent, moved))
    np.testing.assert_array_equal(before, after)
    other = agent.replace(decoder=agent.decoder.replace(stats=moved.stats))
    assert jnp.abs(gorl.act(args, other, obs, KEY, False) - before).max() > 1e-3


def test_evaluation_policy_decodes_the_mean(make_args, agent):
    """Otherwise evaluations measure another policy than the paper's."""
    agent, args = trained(agent, KEY), make_args()
    obs = jax.random.normal(KEY, (20, OBS))
    mean, std = gorl.latent_distribution(agent.params["encoder"], gorl.normalize(agent.stats, obs))
    want = gorl.decode(args, agent.decoder, obs, mean)
    np.testing.assert_allclose(gorl.act(args, agent, obs, KEY, True), want, rtol=1e-6)
    many = jnp.broadcast_to(obs[0], (20_000, OBS))
    latent = jax.random.normal(KEY, (20_000, ACT)) * std[0] + mean[0]
    got, want = (
        np.asarray(x)
        for x in (
            gorl.act(args, agent, many, jax.random.PRNGKey(1), False),
            gorl.decode(args, agent.decoder, many, latent),
        )
    )
    for i in range(ACT):
        assert stats.ks_2samp(got[:, i], want[:, i]).pvalue > 1e-3
