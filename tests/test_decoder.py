"""The decoders: identity at first, the losses and their optima, what they read and what not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GORL, name_of, trained
from oracles import numpy_velocity, sizes
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
def make_args(make_args):
    """The paper's ten steps, which the numbers below are of."""
    return partial(make_args, decoder_steps=10)


@pytest.fixture
def agent(gorl, make_args):
    return new_agent(gorl, make_args(gorl))


def new_agent(gorl, args):
    return jax.jit(partial(gorl.init_agent, args, sizes(OBS, ACT)))(KEY)


def with_field(agent, field):
    """The agent whose decoder's network is `field(obs, a, t)`."""
    decoder = agent.decoder.replace(apply_fn=lambda params, obs, a, t: field(obs, a, t))
    return agent._replace(decoder=decoder)


def loss_of(gorl, args, agent, obs, u, key):
    params = agent.decoder.params
    if gorl is fm:
        return gorl.flow_matching_loss(params, agent.decoder, obs, u, key)
    return gorl.denoising_loss(params, args, agent.decoder, obs, u, key)


def train(gorl, args, agent, obs, u, epochs):
    pairs = gorl.Pairs(jnp.float32(obs), jnp.float32(u), jnp.zeros(len(u)))
    epoch = jax.jit(partial(gorl.decoder_epoch, args))
    decoder = agent.decoder
    for key in jax.random.split(KEY, epochs):
        decoder, loss = epoch(decoder, agent.stats, pairs, key)
    return agent._replace(decoder=decoder), loss


def test_first_decoder_is_the_identity(gorl, make_args, agent):
    """Otherwise stage 0 is not PPO in the action space."""
    far = jnp.array([[1e6], [-1e6]]) * jnp.ones(OBS)
    obs = jnp.concatenate([jax.random.normal(KEY, (50, OBS)), far])
    latent = 3 * jax.random.normal(KEY, (52, ACT))
    got = gorl.decode(make_args(gorl), agent, obs, latent)
    if gorl is fm:
        np.testing.assert_array_equal(got, latent)
    else:  # a multiple of it, the product of the cosines of ten turns
        turns = np.diff(np.arccos(np.sqrt(cosine_alpha_bar(10))))
        scale = np.prod(np.cos(turns))
        assert 0.88 < scale < 0.89
        np.testing.assert_allclose(got, scale * latent, rtol=1e-5)


def test_all_layers_learn(gorl, make_args, agent):
    """Otherwise a decoder that starts as the identity stays a linear map, or stays as it is."""
    obs = jax.random.normal(KEY, (64, OBS))
    u = jax.random.normal(KEY, (64, ACT)) + 1
    new, _ = train(gorl, make_args(gorl), agent, obs, u, 2)
    before = agent.decoder.params["params"]["MLP_0"]
    after = new.decoder.params["params"]["MLP_0"]
    assert len(before) == 5
    for name, layer in before.items():
        assert layer["kernel"].any() == (name != "last")
        assert (layer["kernel"] != after[name]["kernel"]).mean() > 0.9
        assert (layer["bias"] != after[name]["bias"]).mean() > 0.9
    assert new.decoder.step == 8


def energy_distance(x, y):
    within = pdist(x).sum() / len(x) ** 2 + pdist(y).sum() / len(y) ** 2
    return 2 * cdist(x, y).mean() - 2 * within


def test_decoder_learns_two_modes(gorl, make_args, agent):
    """Otherwise the policy has lost what GoRL is for: several modes, others in each state."""
    r = np.random.default_rng(0)

    def draw(obs):
        mode = np.stack([1.5 + 0.5 * obs[:, 0], -1 + 0.5 * obs[:, 1]], axis=-1)
        return r.choice([-1, 1], (len(obs), 1)) * mode + 0.1 * r.normal(size=mode.shape)

    obs = r.uniform(-1, 1, (2**14, OBS))
    args = make_args(gorl, decoder_batch_size=256, decoder_learning_rate=2e-3)
    agent, _ = train(gorl, args, new_agent(gorl, args), obs, draw(obs), 25)
    for state in ([0.8, -0.8, 0.3], [-0.8, 0.8, 0.3]):
        states = np.tile(state, (1500, 1))
        latent = jax.random.normal(jax.random.PRNGKey(1), (1500, ACT))
        got = np.asarray(gorl.decode(args, agent, jnp.float32(states), latent))
        want = draw(states)
        gaussian = r.multivariate_normal(want.mean(0), np.cov(want.T), 1500)
        assert energy_distance(draw(states), want) < 0.02
        assert energy_distance(got, want) < 0.25 * energy_distance(gaussian, want)
        assert 0.4 < (got[:, 0] > 0).mean() < 0.6
        for sign in (1, -1):
            mode = want[np.sign(want[:, 0]) == sign].mean(0)
            ours = got[np.sign(got[:, 0]) == sign].mean(0)
            np.testing.assert_allclose(ours, mode, atol=0.2)


def test_an_epoch_uses_every_pair_once(gorl, make_args, agent, monkeypatch):
    """Otherwise the decoder imitates some actions more than others, or pairs u with another's s."""
    args = make_args(gorl, decoder_batch_size=4)
    obs = jnp.arange(19.0)[:, None] * jnp.ones(OBS)
    pairs = gorl.Pairs(obs, obs[:, :ACT] / 100, jnp.zeros(19))
    seen = []

    def loss(params, *rest):
        *_, obs, u, _ = rest
        jax.debug.callback(lambda *x: seen.append(x), obs[:, 0], u[:, 0], ordered=True)
        return sum(leaf.sum() for leaf in jax.tree.leaves(params))

    name = "flow_matching_loss" if gorl is fm else "denoising_loss"
    monkeypatch.setattr(gorl, name, loss)
    scale = gorl.RunningStats(jnp.float32(1), jnp.zeros(OBS), jnp.full(OBS, 1e4))
    jax.block_until_ready(gorl.decoder_epoch(args, agent.decoder, scale, pairs, KEY))
    jax.effects_barrier()
    assert len(seen) == 4  # batches of 4; the rest of 3 waits for the next epoch's shuffle
    for obs, u in seen:
        np.testing.assert_allclose(obs, u, rtol=1e-6)
    labels = np.round(100 * np.concatenate([u for _, u in seen]))
    assert len(set(labels.tolist())) == 16
    assert sorted(labels) != labels.tolist()


# --- losses ---


def cosine_alpha_bar(steps):
    """Nichol & Dhariwal (2021), Eq. 17, in float64."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / (1 + 0.008) * np.pi / 2) ** 2
    return f / f[0]


def levels(gorl, t, steps=10):
    """Weights of u and of noise in the decoder's input at time t, from the paper's equations."""
    if gorl is fm:  # Eq. 18
        return t, 1 - t
    alpha_bar = cosine_alpha_bar(steps)[np.round(t * steps).astype(int)]  # Eq. 16
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def target(gorl, t, u, noise):
    """What the network is trained on: Eq. 18's velocity, or v of Salimans & Ho (2022)."""
    if gorl is fm:
        return u - noise
    data, other = levels(gorl, t)
    return data * noise - other * u


@pytest.fixture
def drawn(gorl, make_args, agent):
    """What the loss draws for 4096 pairs: noise (NaN where unresolved), t, and obs, u, the loss."""

    def draw(key):
        seen = []

        def field(obs, a, t):
            seen.append([np.float64(x) for x in (obs, a, t)])
            return jnp.zeros_like(a)

        keys = jax.random.split(jax.random.PRNGKey(9))
        obs = jax.random.normal(keys[0], (4096, OBS))
        u = 2 + 3 * jax.random.normal(keys[1], (4096, ACT))
        loss = loss_of(gorl, make_args(gorl), with_field(agent, field), obs, u, key)
        seen_obs, a, t = seen[-1]
        np.testing.assert_array_equal(seen_obs, np.repeat(obs[:, None], 8, axis=1))
        u = np.float64(u)[:, None]
        data, other = levels(gorl, t[..., None])
        resolved = np.broadcast_to(other > 0.01, a.shape)
        noise = np.where(resolved, (a - data * u) / np.where(resolved, other, 1), np.nan)
        return noise, t[..., None], np.asarray(obs), u, loss

    return draw


def test_decoder_input_is_fresh_noise(gorl, drawn):
    """Otherwise the decoder learns to invert the encoder, not to turn N(0, I) into actions."""
    noise, t, obs, u, _ = drawn(KEY)
    assert noise.shape == (4096, 8, ACT)
    assert t.shape == (4096, 8, 1)
    if gorl is fm:
        assert stats.kstest(t.ravel(), "uniform").pvalue > 1e-3
    else:  # 1 to 10, all as often; 0 carries no noise
        values, counts = np.unique(np.round(t * 10, 4), return_counts=True)
        assert values.tolist() == list(range(1, 11))
        assert stats.chisquare(counts).pvalue > 1e-3
    for i in range(ACT):
        values = noise[..., i].ravel()
        assert stats.kstest(values[np.isfinite(values)], "norm").pvalue > 1e-3
    good = np.isfinite(noise).all(axis=(1, 2))
    columns = [noise[good].reshape(-1, 8 * ACT), t[good, :, 0], obs[good], u[good, 0]]
    correlation = np.corrcoef(np.hstack(columns).T)
    correlation -= np.eye(len(correlation))
    assert np.abs(correlation).max() < 5 / np.sqrt(good.sum())
    other, *_ = drawn(jax.random.PRNGKey(1))
    assert np.abs(np.nanmean(noise * other, axis=(0, 1))).max() < 0.05


def test_loss_of_a_zero_network(gorl, drawn):
    """Otherwise the target is another one than u - noise (Eq. 18), or v (Eq. 17)."""
    noise, t, _, u, loss = drawn(KEY)
    want = np.square(target(gorl, t, u, noise)).sum(-1)
    assert np.isfinite(want).mean() > 0.98
    np.testing.assert_allclose(loss, np.nanmean(want), rtol=0.01)


def test_v_is_the_noise_prediction_of_the_paper(drawn, gorl):
    """Otherwise the diffusion decoder is not trained on Eq. 17 weighted by 1 / alpha_bar."""
    if gorl is fm:
        pytest.skip("diffusion only")
    noise, t, _, u, _ = drawn(KEY)
    data, other = levels(diff, t)
    a = data * u + other * noise
    v = np.random.default_rng(0).normal(size=noise.shape)
    predicted_noise = other * a + data * v
    weight = np.where(t < 0.95, data**2, np.nan)  # at t = 1, alpha_bar is 0
    want = np.square(noise - predicted_noise) / weight
    got = np.where(np.isfinite(want), np.square(v - target(diff, t, u, noise)), np.nan)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def moments(gorl, t, std):
    """Of data N(., std^2) at time t: variance of a, covariance with the target, its variance."""
    data, other = levels(gorl, t)
    variance = data**2 * std**2 + other**2
    if gorl is fm:
        return variance, data * std**2 - other, std**2 + 1
    return variance, data * other * (1 - std**2), data**2 + other**2 * std**2


@pytest.mark.parametrize("std", [0.0, 0.3, 2.0])
def test_loss_of_the_optimal_network(gorl, make_args, agent, std):
    """Otherwise minimising the loss does not lead to the data: of N(1, std^2), in closed form."""

    def optimal(obs, a, t):
        t = np.float64(t)[..., None]
        variance, covariance, _ = moments(gorl, t, std)
        data, other = levels(gorl, t)
        mean_target = 1 if gorl is fm else -other
        return mean_target + covariance / variance * (a - data)

    def residual(t):
        variance, covariance, total = moments(gorl, np.float64(t), std)
        return total - covariance**2 / variance

    u = 1 + std * jax.random.normal(KEY, (20_000, ACT))
    obs = jnp.zeros((20_000, OBS))
    loss = loss_of(gorl, make_args(gorl), with_field(agent, optimal), obs, u, KEY)
    if gorl is fm:
        want, _ = integrate.quad(residual, 0, 1)
    else:
        want = np.mean([residual(t / 10) for t in range(1, 11)])
    np.testing.assert_allclose(loss, ACT * want, rtol=0.02, atol=1e-5)


# --- sampling ---


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_noise_schedule(steps):
    """Otherwise noise levels are not those of the cosine schedule, and a_D is not pure noise."""
    phi = diff.noise_angles(steps)
    np.testing.assert_allclose(np.cos(np.float64(phi)) ** 2, cosine_alpha_bar(steps), atol=3e-7)
    assert phi[0] == 0
    assert abs(phi[-1] - np.pi / 2) < 1e-6
    assert (np.diff(phi) > 0).all()


@pytest.mark.parametrize(("steps", "tolerance"), [(10, 0.22), (200, 0.013)])
@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_ddim_samples_the_gaussian_that_its_predictor_knows(make_args, steps, tolerance, std):
    """Otherwise sampling does not invert the noising. Ten steps narrow it by 12 to 21%."""
    latent = jnp.linspace(-3, 3, 25)[:, None] * jnp.ones(ACT)
    alpha_bar = cosine_alpha_bar(steps)

    def expectations(t, a):
        """E[noise | a_t] (the minimiser of Eq. 17) and E[a_0 | a_t], data from N(1.5, std^2)."""
        keep = alpha_bar[t]
        variance = keep * std**2 + 1 - keep
        rest = np.float64(a) - np.sqrt(keep) * 1.5
        noise = np.sqrt(1 - keep) / variance * rest
        return noise, 1.5 + np.sqrt(keep) * std**2 / variance * rest

    def exact(obs, a, t):
        t = round(float(t) * steps)
        noise, a_0 = expectations(t, a)
        return jnp.float32(np.sqrt(alpha_bar[t]) * noise - np.sqrt(1 - alpha_bar[t]) * a_0)

    args = make_args(diff, decoder_steps=steps)
    agent = with_field(new_agent(diff, args), exact)
    with jax.disable_jit():  # the predictor looks its time up
        got = np.asarray(diff.decode(args, agent, jnp.zeros((25, OBS)), latent))
    want = np.float64(latent)
    for t in range(steps, 0, -1):  # Song et al. (2021), Eq. 12, without noise
        noise, a_0 = expectations(t, want)
        want = np.sqrt(alpha_bar[t - 1]) * a_0 + np.sqrt(1 - alpha_bar[t - 1]) * noise
    np.testing.assert_allclose(got, want, atol=1e-4)
    # It is linear, so that N(0, 1) becomes N(mean, slope^2).
    slope, mean = np.polyfit(latent[:, 0], got[:, 0], 1)
    np.testing.assert_allclose(mean, 1.5, atol=1e-4)
    assert abs(slope / std - 1) < tolerance


@pytest.mark.parametrize(
    ("std", "want"), [(0.3, (0.82, 0.79)), (1, (0.88, 0.88)), (2, (0.86, 0.86))]
)
def test_ten_steps_narrow_what_they_sample(gorl, make_args, agent, std, want):
    """The README's numbers: of the best network there is, u has that share of the data's std."""

    def optimal(obs, a, t):
        variance, covariance, _ = moments(gorl, np.float64(t), std)
        return jnp.float32(covariance / variance * np.float64(a))

    data = jnp.zeros((1, OBS)), jnp.ones((1, ACT))
    with jax.disable_jit():  # the predictor looks its time up
        u = gorl.decode(make_args(gorl), with_field(agent, optimal), *data)
    np.testing.assert_allclose(u / std, want[gorl is diff], atol=0.006)


def test_network(gorl, make_args, agent):
    """Otherwise the decoder is not App. C's: time enters as eight numbers, layers are 64 wide."""
    network = trained(agent, KEY).decoder
    r = np.random.default_rng(0)
    obs, a, t = r.normal(size=(7, OBS)), r.normal(size=(7, ACT)), np.linspace(0, 1, 7)
    got = network.apply_fn(network.params, *(jnp.float32(x) for x in (obs, a, t)))
    np.testing.assert_allclose(got, numpy_velocity(network.params, obs, a, t), rtol=1e-3, atol=1e-5)
    layers = network.params["params"]["MLP_0"]
    assert [layer["bias"].size for layer in layers.values()] == [64, 64, 64, 64, ACT]


@pytest.mark.parametrize("steps", [1, 10])
def test_decode_follows_its_field(gorl, make_args, agent, steps):
    """Otherwise it goes for the wrong time, from the wrong end or by the wrong statistics."""
    args = make_args(gorl, decoder_steps=steps)
    latent = jax.random.normal(KEY, (20, ACT))
    obs = jax.random.normal(KEY, (20, OBS))
    agent = trained(agent, KEY)
    normed = (obs - agent.decoder_stats.mean) / jnp.sqrt(agent.decoder_stats.var)
    fields = [lambda obs, a, t: a, lambda obs, a, t: t + 0 * a, lambda obs, a, t: obs[:, :ACT]]
    for field in fields:
        a = np.float64(latent)
        for i in range(steps):
            if gorl is fm:  # Euler, from 0 to 1
                a = a + field(normed, a, i / steps) / steps
            else:  # DDIM, from D to 0
                phi = np.arccos(np.sqrt(cosine_alpha_bar(steps)))
                turn = phi[steps - i] - phi[steps - i - 1]
                a = np.cos(turn) * a - np.sin(turn) * field(normed, a, (steps - i) / steps)
        got = gorl.decode(args, with_field(agent, field), obs, latent)
        np.testing.assert_allclose(got, a, rtol=1e-4, atol=1e-5)


# --- the policy ---


def test_decoder_does_not_move_with_the_statistics(gorl, make_args, agent):
    """Otherwise the map that the encoder trains on moves under it."""
    args = make_args(gorl)
    agent = trained(agent, KEY)
    prior = agent._replace(encoder=new_agent(gorl, args).encoder)
    stats = gorl.merge_stats(agent.stats, 5 + jnp.ones((1, 1000, OBS)))
    obs = jax.random.normal(KEY, (20, OBS))
    before, *_ = gorl.act(args, prior, obs, KEY)
    after, *_ = gorl.act(args, prior._replace(stats=stats), obs, KEY)
    np.testing.assert_array_equal(before, after)
    other, *_ = gorl.act(args, prior._replace(decoder_stats=stats), obs, KEY)
    assert jnp.abs(other - before).max() > 1e-3


def test_evaluation_policy_decodes_the_mean(gorl, make_args, agent):
    """Otherwise evaluations measure another policy than the paper's."""
    args = make_args(gorl)
    agent = trained(agent, KEY)
    obs = jax.random.normal(KEY, (20, OBS))
    normed = gorl.normalize(agent.stats, obs)
    mean, std = agent.encoder.apply_fn(agent.encoder.params, normed)
    want = gorl.decode(args, agent, obs, mean)
    got, *_ = gorl.act(args, agent, obs, KEY, deterministic=True)
    np.testing.assert_allclose(got, want, rtol=1e-6)

    many = jnp.broadcast_to(obs[0], (20_000, OBS))
    latent = jax.random.normal(KEY, (20_000, ACT)) * std[0] + mean[0]
    want = np.asarray(gorl.decode(args, agent, many, latent))
    got = np.asarray(gorl.act(args, agent, many, jax.random.PRNGKey(1))[0])
    for i in range(ACT):
        assert stats.ks_2samp(got[:, i], want[:, i]).pvalue > 1e-3
