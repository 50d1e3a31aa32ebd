"""The decoders: identity at first, the losses and their optima, what they read and what they do not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GORL, name_of, trained
from scipy import integrate, stats
from scipy.spatial.distance import cdist, pdist

import gorl_diff_ppo as diff
import gorl_fm_ppo as fm

OBS, ACT = 3, 2
KEY = jax.random.PRNGKey(0)


@pytest.fixture(params=GORL, ids=name_of)
def gorl(request):
    return request.param


@pytest.fixture
def agent(gorl, make_args):
    return jax.jit(partial(gorl.init_agent, make_args(gorl), OBS, ACT))(KEY)


def ring_of(obs, u, envs=4):
    rows = len(obs) // envs
    obs, u = (jnp.array(x, jnp.float32).reshape(rows, envs, -1) for x in (obs, u))
    return {"obs": obs, "u": u, "reward": jnp.zeros((rows, envs))}


def train(gorl, args, decoder, ring, epochs):
    pairs = ring["reward"].size
    opt = optax.adam(args.decoder_learning_rate).init(decoder["net"])
    epoch = jax.jit(partial(gorl.decoder_epoch, args, pairs))
    for i in range(epochs):
        decoder, opt, loss = epoch(decoder, opt, ring, KEY, i)
    return decoder, loss


def test_first_decoder_is_the_identity(gorl, make_args, agent):
    """Otherwise stage 0 is not PPO in the action space."""
    obs = jnp.concatenate([jax.random.normal(KEY, (50, OBS)), jnp.array([[1e6], [-1e6]]) * jnp.ones(OBS)])
    latent = 3 * jax.random.normal(KEY, (52, ACT))
    got = gorl.decode(make_args(gorl), agent.decoder, obs, latent)
    if gorl is fm:
        np.testing.assert_array_equal(got, latent)
    else:  # a multiple of it, the product of the cosines of ten turns
        alpha_bar = cosine_alpha_bar(10)
        scale = np.prod(np.cos(np.diff(np.arccos(np.sqrt(alpha_bar)))))
        assert 0.88 < scale < 0.89
        np.testing.assert_allclose(got, scale * latent, rtol=1e-5)


def test_all_layers_learn(gorl, make_args, agent):
    """Otherwise a decoder that starts as the identity stays a linear map, or stays the identity."""
    assert all(layer["kernel"].any() for layer in agent.decoder["net"][:-1])
    args = make_args(gorl, decoder_batch_size=16)
    ring = ring_of(jax.random.normal(KEY, (64, OBS)), jax.random.normal(KEY, (64, ACT)) + 1)
    decoder, _ = train(gorl, args, agent.decoder, ring, 2)
    for old, new in zip(agent.decoder["net"], decoder["net"], strict=True):
        assert (old["kernel"] != new["kernel"]).mean() > 0.9 and (old["bias"] != new["bias"]).mean() > 0.9
    jax.tree.map(np.testing.assert_array_equal, decoder["stats"], agent.decoder["stats"])


def energy_distance(x, y):
    return 2 * cdist(x, y).mean() - 2 * pdist(x).sum() / len(x) ** 2 - 2 * pdist(y).sum() / len(y) ** 2


def test_decoder_learns_two_modes(gorl, make_args, agent):
    """Otherwise the policy has lost what GoRL is for: more than one mode, different in each state."""
    r, n = np.random.default_rng(0), 2**14

    def draw(obs):
        mode = np.stack([1.5 + 0.5 * obs[:, 0], -1 + 0.5 * obs[:, 1]], axis=-1)
        return r.choice([-1, 1], (len(obs), 1)) * mode + 0.1 * r.normal(size=mode.shape)

    obs = r.uniform(-1, 1, (n, OBS))
    args = make_args(gorl, decoder_batch_size=256, decoder_learning_rate=2e-3)
    decoder, _ = train(gorl, args, agent.decoder, ring_of(obs, draw(obs)), 25)
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


def cosine_alpha_bar(steps):
    """Nichol & Dhariwal (2021), Eq. 17, in float64."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / (1 + 0.008) * np.pi / 2) ** 2
    return f / f[0]


def levels(gorl, t, steps=10):
    """Weights of u and of noise in the decoder's input at time t, in float64, from the paper's equations."""
    if gorl is fm:  # Eq. 18
        return t, 1 - t
    alpha_bar = cosine_alpha_bar(steps)[np.round(t * steps).astype(int)]  # Eq. 16
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def target(gorl, t, u, noise):
    """What the network is trained on: Eq. 18's velocity, or v of Salimans & Ho (2022)."""
    data, other = levels(gorl, t)
    return u - noise if gorl is fm else data * noise - other * u


@pytest.fixture
def drawn(gorl, make_args, monkeypatch):
    """What the loss draws for 4096 pairs: noise (NaN where unresolved), t, and obs, u, and the loss."""
    seen = []

    def zero(net, *x):
        seen.append(x)
        return jnp.zeros_like(x[1])

    monkeypatch.setattr(gorl, "velocity", zero)

    def draw(key):
        keys = jax.random.split(jax.random.PRNGKey(9))
        obs, u = jax.random.normal(keys[0], (4096, OBS)), 2 + 3 * jax.random.normal(keys[1], (4096, ACT))
        loss = gorl.decoder_loss(None, make_args(gorl), obs, u, key)
        seen_obs, a, t = (np.float64(x).swapaxes(0, 1) for x in seen[-1])  # draws first
        np.testing.assert_array_equal(seen_obs, np.broadcast_to(obs, (8, *obs.shape)))
        data, other = levels(gorl, t)
        good = np.broadcast_to(other > 0.01, a.shape)
        return (
            np.where(good, (a - data * u) / np.where(good, other, 1), np.nan),
            t,
            np.asarray(obs),
            np.float64(u),
            loss,
        )

    return draw


def test_decoder_input_is_fresh_noise(gorl, drawn):
    """Otherwise the decoder learns to invert the encoder's latents, not to turn N(0, I) into actions."""
    noise, t, obs, u, _ = drawn(KEY)
    assert noise.shape == (8, 4096, ACT) and t.shape == (8, 4096, 1)
    if gorl is fm:
        assert stats.kstest(t.ravel(), "uniform").pvalue > 1e-3
    else:  # 1 to 10, all as often; 0 carries no noise
        values, counts = np.unique(np.round(t * 10, 4), return_counts=True)
        assert values.tolist() == list(range(1, 11)) and stats.chisquare(counts).pvalue > 1e-3
    for i in range(ACT):
        values = noise[..., i].ravel()
        assert stats.kstest(values[np.isfinite(values)], "norm").pvalue > 1e-3
    good = np.isfinite(noise).all(-1).all(0)
    columns = [*noise[:, good].transpose(0, 2, 1).reshape(8 * ACT, -1), *t[:, good, 0], *obs[good].T]
    correlation = np.corrcoef(np.vstack([*columns, *np.asarray(u)[good].T])) - np.eye(len(columns) + ACT)
    assert np.abs(correlation).max() < 5 / np.sqrt(good.sum())
    other = drawn(jax.random.PRNGKey(1))[0]
    assert np.nanmax(np.abs(np.nanmean(noise * other, axis=(0, 1)))) < 0.05


def test_loss_of_a_zero_network(gorl, drawn):
    """Otherwise the target is another one than u - noise (Eq. 18), or v (Eq. 17)."""
    noise, t, _, u, loss = drawn(KEY)
    want = np.square(target(gorl, t, np.float64(u), noise)).sum(-1)
    assert np.isfinite(want).mean() > 0.98
    np.testing.assert_allclose(loss, np.nanmean(want), rtol=0.01)


def test_v_is_the_noise_prediction_of_the_paper(drawn, gorl):
    """Otherwise the diffusion decoder is not trained on Eq. 17 weighted by 1 / alpha_bar."""
    if gorl is fm:
        pytest.skip("diffusion only")
    noise, t, _, u, _ = drawn(KEY)
    data, other = levels(diff, t)
    a, v = data * u + other * noise, np.random.default_rng(0).normal(size=noise.shape)
    predicted_noise = other * a + data * v
    weight = np.where(t < 0.95, data**2, np.nan)  # at t = 1, alpha_bar is 0: the weight is infinite
    want = np.square(noise - predicted_noise) / weight
    got = np.where(np.isfinite(want), np.square(v - target(diff, t, u, noise)), np.nan)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("std", [0.0, 0.3, 2.0])
def test_loss_of_the_optimal_network(gorl, make_args, monkeypatch, std):
    """Otherwise minimising the loss does not lead to the data: of N(1, std^2), in closed form."""

    def moments(t):
        """Variance of a, covariance with the target, variance of the target."""
        data, other = levels(gorl, t)
        if gorl is fm:
            return data**2 * std**2 + other**2, data * std**2 - other, std**2 + 1
        return data**2 * std**2 + other**2, data * other * (1 - std**2), data**2 + other**2 * std**2

    def optimal(net, obs, a, t):
        t = np.float64(t)
        variance, covariance, _ = moments(t)
        mean = levels(gorl, t)[0]  # of a; the target's is -its noise weight for v, 1 for the flow
        return (1 if gorl is fm else -levels(gorl, t)[1]) + covariance / variance * (a - mean)

    monkeypatch.setattr(gorl, "velocity", optimal)
    u = 1 + std * jax.random.normal(KEY, (20_000, ACT))
    loss = gorl.decoder_loss(None, make_args(gorl), jnp.zeros((20_000, OBS)), u, KEY)

    def residual(t):
        variance, covariance, total = moments(np.float64(t))
        return total - covariance**2 / variance

    average = (
        integrate.quad(residual, 0, 1)[0] if gorl is fm else np.mean([residual(t / 10) for t in range(1, 11)])
    )
    np.testing.assert_allclose(loss, ACT * average, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_noise_schedule(steps):
    """Otherwise noise levels are not those of the cosine schedule, and a_T is not pure noise."""
    phi = diff.noise_angles(steps)
    np.testing.assert_allclose(np.cos(np.float64(phi)) ** 2, cosine_alpha_bar(steps), atol=3e-7)
    assert phi[0] == 0 and abs(phi[-1] - np.pi / 2) < 1e-6 and (np.diff(phi) > 0).all()


@pytest.mark.parametrize(("steps", "tolerance"), [(10, 0.22), (200, 0.013)])
@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_ddim_samples_the_gaussian_that_its_predictor_knows(make_args, monkeypatch, steps, tolerance, std):
    """Otherwise sampling does not invert the noising. The mean is exact; ten steps narrow it by 12 to 21%."""
    latent = jnp.linspace(-3, 3, 25)[:, None] * jnp.ones(ACT)
    alpha_bar = cosine_alpha_bar(steps)

    def expectations(t, a):
        """E[noise | a_t] (the minimiser of Eq. 17) and E[a_0 | a_t] for the target N(1.5, std^2)."""
        keep, a = alpha_bar[t], np.float64(a)
        variance, rest = keep * std**2 + 1 - keep, a - np.sqrt(keep) * 1.5
        return np.sqrt(1 - keep) / variance * rest, 1.5 + np.sqrt(keep) * std**2 / variance * rest

    def exact(net, obs, a, t):
        t = round(float(t[0, 0]) * steps)
        noise, a_0 = expectations(t, a)
        return jnp.float32(np.sqrt(alpha_bar[t]) * noise - np.sqrt(1 - alpha_bar[t]) * a_0)

    monkeypatch.setattr(diff, "velocity", exact)
    decoder = {"net": None, "stats": diff.init_agent(make_args(diff), OBS, ACT, KEY).stats}
    args = make_args(diff, decoder_steps=steps)
    with jax.disable_jit():  # the predictor looks its time up
        got = np.asarray(diff.decode(args, decoder, jnp.zeros((25, OBS)), latent))
    want = np.float64(latent)
    for t in range(steps, 0, -1):  # Song et al. (2021), Eq. 12, without noise
        noise, a_0 = expectations(t, want)
        want = np.sqrt(alpha_bar[t - 1]) * a_0 + np.sqrt(1 - alpha_bar[t - 1]) * noise
    np.testing.assert_allclose(got, want, atol=1e-4)
    slope, mean = np.polyfit(latent[:, 0], got[:, 0], 1)  # linear: N(0, 1) becomes N(mean, slope^2)
    np.testing.assert_allclose(mean, 1.5, atol=1e-4)
    assert abs(slope / std - 1) < tolerance


@pytest.mark.parametrize(("std", "want"), [(0.3, (0.82, 0.79)), (1.0, (0.88, 0.88)), (2.0, (0.86, 0.86))])
def test_ten_steps_narrow_what_they_sample(gorl, make_args, monkeypatch, std, want):
    """The README's numbers: with the best network there is, u has that share of the data's std."""

    def optimal(net, obs, a, t):
        """Of data N(0, std^2), at time t."""
        angle = jnp.interp(10 * t, jnp.arange(11), diff.noise_angles(10))
        data, other = (t, 1 - t) if gorl is fm else (jnp.cos(angle), jnp.sin(angle))
        variance = data**2 * std**2 + other**2
        covariance = data * std**2 - other if gorl is fm else data * other * (1 - std**2)
        return covariance / variance * a

    monkeypatch.setattr(gorl, "velocity", optimal)
    decoder = {"net": None, "stats": gorl.init_agent(make_args(gorl), OBS, ACT, KEY).stats}
    u = gorl.decode(make_args(gorl), decoder, jnp.zeros((1, OBS)), jnp.ones((1, ACT)))
    np.testing.assert_allclose(u / std, want[gorl is diff], atol=0.006)


def test_time_embedding(gorl, monkeypatch):
    """Otherwise saved decoders read time differently, or the flow cannot tell times apart."""
    monkeypatch.setattr(gorl, "mlp", lambda net, x: x)
    obs, a, t = np.ones((7, OBS)), 2 * np.ones((7, ACT)), np.linspace(0, 1, 7)[:, None]
    got = gorl.velocity(None, jnp.array(obs), jnp.array(a), jnp.array(t, jnp.float32))
    want = np.concatenate(
        [obs, a, *(np.cos(t * 2**k) for k in range(4)), *(np.sin(t * 2**k) for k in range(4))], 1
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10])
def test_decode_follows_its_field(gorl, make_args, agent, monkeypatch, steps):
    """Otherwise the field is followed for the wrong time, from the wrong end or with the wrong statistics."""
    latent, args = jax.random.normal(KEY, (20, ACT)), make_args(gorl, decoder_steps=steps)
    obs, decoder = jax.random.normal(KEY, (20, OBS)), trained(agent, KEY).decoder
    normed = (obs - decoder["stats"].mean) / jnp.sqrt(decoder["stats"].var)
    fields = {
        "growth": lambda net, obs, a, t: a,
        "time": lambda net, obs, a, t: t + 0 * a,
        "obs": lambda net, obs, a, t: obs[:, :ACT],
    }
    for field in fields.values():
        a = np.float64(latent)
        for i in range(steps):
            if gorl is fm:  # Euler, from 0 to 1
                a = a + field(None, normed, a, i / steps) / steps
            else:  # DDIM, from T to 0
                phi = np.arccos(np.sqrt(cosine_alpha_bar(steps)))
                turn = phi[steps - i] - phi[steps - i - 1]
                a = np.cos(turn) * a - np.sin(turn) * field(None, normed, a, (steps - i) / steps)
        monkeypatch.setattr(gorl, "velocity", field)
        np.testing.assert_allclose(gorl.decode(args, decoder, obs, latent), a, rtol=1e-4, atol=1e-5)


def test_decoder_does_not_move_with_the_statistics(gorl, make_args, agent):
    """Otherwise the map that the encoder trains on moves under it."""
    agent, args = trained(agent, KEY), make_args(gorl)
    fresh = gorl.init_agent(args, OBS, ACT, KEY)
    agent = gorl.start_stage(args, agent, agent.decoder, fresh)
    moved = agent.replace(stats=gorl.merge_stats(agent.stats, 5 + jnp.ones((1000, OBS))))
    obs = jax.random.normal(KEY, (20, OBS))
    before, after = (gorl.act(args, a, obs, KEY, False)[0] for a in (agent, moved))
    np.testing.assert_array_equal(before, after)
    other = agent.replace(decoder=agent.decoder | {"stats": moved.stats})
    assert jnp.abs(gorl.act(args, other, obs, KEY, False)[0] - before).max() > 1e-3


def test_evaluation_policy_decodes_the_mean(gorl, make_args, agent):
    """Otherwise evaluations measure another policy than the paper's."""
    agent, args = trained(agent, KEY), make_args(gorl)
    obs = jax.random.normal(KEY, (20, OBS))
    mean, std = gorl.latent_distribution(agent.params["encoder"], gorl.normalize(agent.stats, obs))
    want = gorl.decode(args, agent.decoder, obs, mean)
    np.testing.assert_allclose(gorl.act(args, agent, obs, KEY, True)[0], want, rtol=1e-6)
    many = jnp.broadcast_to(obs[0], (20_000, OBS))
    latent = jax.random.normal(KEY, (20_000, ACT)) * std[0] + mean[0]
    got, want = (
        np.asarray(x)
        for x in (
            gorl.act(args, agent, many, jax.random.PRNGKey(1), False)[0],
            gorl.decode(args, agent.decoder, many, latent),
        )
    )
    for i in range(ACT):
        assert stats.ks_2samp(got[:, i], want[:, i]).pvalue > 1e-3
