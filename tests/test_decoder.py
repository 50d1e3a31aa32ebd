"""The decoders: identity at first, the losses and their optima, what they read and what not."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brax.training.acme import running_statistics
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
    sizes = {"decoder_steps": 10, "decoder_buffer_size": 100_000, "stage_timesteps": ()}
    return partial(make_args, **sizes)


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
        return gorl.flow_matching_loss(params, agent.decoder, obs, u, key).mean()
    return gorl.denoising_loss(params, args, agent.decoder, obs, u, key).mean()


def train(gorl, args, agent, obs, u, epochs, advantage=None):
    """The agent with a refined decoder, and loss and held-out loss of each epoch."""
    args = replace(args, decoder_epochs=epochs, decoder_buffer_size=len(u))
    advantage = np.zeros(len(u)) if advantage is None else advantage
    pairs = gorl.Pairs(*(jnp.float32(x) for x in (obs, u, np.zeros(len(u)), advantage)))
    epoch = jax.jit(partial(gorl.decoder_epoch, args))
    decoder = new_agent(gorl, args).decoder.replace(params=agent.decoder.params)
    losses = []
    for i in range(epochs):
        decoder, *loss = epoch(decoder, agent, pairs, KEY, i)
        losses.append(loss)
    return agent._replace(decoder=decoder), np.array(losses)


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
    assert new.decoder.step == 2 * 3


def energy_distance(x, y):
    within = pdist(x).sum() / len(x) ** 2 + pdist(y).sum() / len(y) ** 2
    return 2 * cdist(x, y).mean() - 2 * within


def test_decoder_learns_two_modes(gorl, make_args, agent):
    """Otherwise the policy has lost what GoRL is for: several modes, others in each state."""
    r = np.random.default_rng(0)

    def draw(obs):
        mode = np.stack([1.5 + 0.5 * obs[:, 0], -1 + 0.5 * obs[:, 1]], axis=-1)
        return r.choice([-1, 1], (len(obs), 1)) * mode + 0.1 * r.normal(size=mode.shape)

    obs = r.uniform(-1, 1, (2**13, OBS))
    args = make_args(gorl, decoder_batch_size=256, decoder_learning_rate=3e-3)
    agent, _ = train(gorl, args, new_agent(gorl, args), obs, draw(obs), 20)
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


@pytest.fixture
def seen_by(gorl, make_args, agent, monkeypatch):
    """obs, u, key of the batches that an epoch's loss sees, the held-out one last; its losses."""

    def run(args, pairs, agent=agent, key=KEY, epoch=0):
        seen = []

        def loss(params, *rest):
            *_, obs, u, key = rest
            record = obs[:, 0], u[:, 0], key
            jax.debug.callback(
                lambda *x: seen.append(list(map(np.array, x))), *record, ordered=True
            )
            return obs[:, 0] + sum(leaf.sum() for leaf in jax.tree.leaves(params))

        name = "flow_matching_loss" if gorl is fm else "denoising_loss"
        monkeypatch.setattr(gorl, name, loss)
        decoder = jax.tree.map(jnp.zeros_like, agent.decoder)
        args = replace(args, decoder_learning_rate=0.0, decoder_buffer_size=len(pairs.u))
        decoder = decoder.replace(tx=new_agent(gorl, args).decoder.tx)
        _, *losses = gorl.decoder_epoch(args, decoder, agent, pairs, key, epoch)
        jax.block_until_ready(losses)
        jax.effects_barrier()
        return seen, np.array(losses)

    return run


def test_an_epoch_uses_every_pair_once(gorl, make_args, agent, seen_by):
    """Otherwise the decoder imitates some actions more than others, or pairs u with another's s."""
    args = make_args(gorl, decoder_batch_size=4)
    obs = jnp.arange(19.0)[:, None] * jnp.ones(OBS)
    pairs = gorl.Pairs(obs, obs[:, :ACT] / 100, jnp.zeros(19), jnp.zeros(19))
    scale = agent.stats.replace(std=jnp.full(OBS, 1e2))
    orders, keys = [], []
    for epoch in range(3):
        seen, _ = seen_by(args, pairs, agent._replace(stats=scale), epoch=epoch)
        assert len(seen) == 4  # batches of 4, one held out; 3 wait for the next epoch's shuffle
        for obs, u, _ in seen:
            np.testing.assert_allclose(obs, u, rtol=1e-6)
        keys.append([tuple(key.tolist()) for *_, key in seen])
        orders.append(np.round(100 * np.concatenate([u for _, u, _ in seen])).astype(int))
        assert len(set(orders[-1])) == 16
    assert (orders[0][-4:] == orders[1][-4:]).all()
    assert (orders[0][-4:] == orders[2][-4:]).all()
    assert (orders[0] != orders[1]).any()
    assert len({key for epoch in keys for key in epoch[:3]}) == 9  # noise is drawn anew
    assert len({epoch[3] for epoch in keys}) == 1  # but that of the held-out loss
    trained_on = set(np.concatenate([order[:-4] for order in orders]))
    assert trained_on == set(range(19)) - set(orders[0][-4:])


@pytest.mark.parametrize("temperature", [0.5, 0.25])
def test_weights_of_the_pairs(gorl, make_args, agent, seen_by, temperature):
    """Otherwise another loss is minimised than min(exp(A / T), 20) times the pair's, in float64."""
    args = make_args(gorl, decoder_batch_size=64, advantage_temperature=temperature)
    r = np.random.default_rng(0)
    obs = r.uniform(0.5, 2, (256, OBS))
    raw = 3 + 7 * r.standard_t(3, 256)
    pairs = gorl.Pairs(*(jnp.float32(x) for x in (obs, obs[:, :ACT], raw, raw)))
    seen, losses = seen_by(args, pairs)
    advantage = (raw - raw.mean()) / raw.std()
    weights = np.minimum(np.exp(advantage / temperature), 20)
    weight = dict(zip(np.float32(obs[:, 0]), weights, strict=True))
    assert max(weight.values()) == 20
    assert min(weight.values()) < 0.5
    want = [np.mean([weight[x] * x for x in batch]) for batch, *_ in seen]
    np.testing.assert_allclose(losses, [np.mean(want[:-1]), want[-1]], rtol=1e-4)


def test_an_infinite_temperature_weighs_nothing(gorl, make_args, agent):
    """Otherwise T does not fade out the weights."""
    r = np.random.default_rng(0)
    data = r.normal(size=(64, OBS)), r.normal(size=(64, ACT))
    runs = [
        train(gorl, make_args(gorl, advantage_temperature=t), agent, *data, 2, r.normal(size=64))
        for t in (0.0, 1e9)
    ]
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=1e-5)
    params = [jax.tree.leaves(new.decoder.params) for new, _ in runs]
    for a, b in zip(*params, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_weights_move_the_distribution(gorl, make_args, agent):
    """Otherwise the decoder does not learn the weighted data: three actions, exact weights."""
    r = np.random.default_rng(0)
    label = r.integers(0, 3, 2**13)
    u = 2.0 * (label - 1)[:, None] * np.ones(ACT)
    advantage = np.array([-1.0, 0.5, 1.0])[label] + 0.3 * r.normal(size=len(label))
    args = make_args(gorl, decoder_batch_size=256, decoder_learning_rate=3e-3)
    args = replace(args, advantage_temperature=1.0)
    agent, _ = train(gorl, args, agent, np.zeros((len(u), OBS)), u, 15, advantage)
    latent = jax.random.normal(jax.random.PRNGKey(1), (5000, ACT))
    got = np.asarray(gorl.decode(args, agent, jnp.zeros((5000, OBS)), latent))
    nearest = np.clip(np.round(got[:, 0] / 2), -1, 1).astype(int) + 1
    weight = np.minimum(np.exp((advantage - advantage.mean()) / advantage.std()), 20)
    want = np.bincount(label, weight) / weight.sum()
    assert want[2] > 3 * want[0]
    np.testing.assert_allclose(np.bincount(nearest, minlength=3) / 5000, want, atol=0.04)


@pytest.mark.parametrize("refined", [False, True])
def test_redrawn_pairs_are_the_frozen_policys(gorl, make_args, agent, seen_by, refined):
    """Otherwise the decoder learns another policy than that of the stage that ended."""
    args = make_args(gorl, decoder_batch_size=8_000, decoder_data="redrawn")
    frozen = trained(agent, KEY)
    if not refined:  # stage 0, where u is a multiple of the latent
        frozen = frozen._replace(decoder=agent.decoder)
    state = frozen.stats.mean + 0.5
    n = 16_000
    pairs = gorl.Pairs(state * jnp.ones((n, 1)), jnp.full((n, ACT), 9.0), *jnp.zeros((2, n)))
    (_, first, key), (_, held_out, _) = seen_by(args, pairs, frozen)[0]
    (_, second, _), (_, held_out_again, _) = seen_by(args, pairs, frozen, epoch=1)[0]
    draws = [first, second]
    np.testing.assert_array_equal(held_out, held_out_again)
    assert (first != second).mean() > 0.99  # anew whenever a pair is seen
    noise = jax.random.normal(jax.random.split(key)[1], (len(first), 8, ACT))[:, 0, 0]
    correlation = np.corrcoef([first, second, noise])  # the loss draws its noise so
    assert np.abs(correlation - np.eye(3)).max() < 0.05
    normed = gorl.normalize(state, frozen.stats)
    mean, std = (x[0] for x in frozen.encoder.apply_fn(frozen.encoder.params, normed))
    if refined:
        latent = jax.random.normal(jax.random.PRNGKey(1), (n, ACT)) * std + mean
        u = np.asarray(gorl.decode(args, frozen, pairs.obs, latent))[:, 0]
        assert stats.ks_2samp(draws[0], u).pvalue > 1e-3
        return
    turns = np.diff(np.arccos(np.sqrt(cosine_alpha_bar(10))))
    scale = 1 if gorl is fm else np.prod(np.cos(turns))
    assert abs(mean) > 0.01
    assert stats.kstest(draws[0], "norm", (scale * mean, scale * std)).pvalue > 1e-3


def test_held_out_loss_shows_overfitting(gorl, make_args, agent):
    """Otherwise a reader cannot see that a decoder was trained on too few pairs."""
    r = np.random.default_rng(0)
    args = make_args(gorl, decoder_batch_size=32, decoder_learning_rate=3e-3)
    few = r.normal(size=(64, OBS)), r.normal(size=(64, ACT))
    _, losses = train(gorl, args, agent, *few, 600)
    train_loss, held_out_loss = losses[-20:].mean(0)
    assert train_loss < 0.6 * losses[0, 0]
    assert held_out_loss > 1.5 * train_loss


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_learning_rate_of_a_refinement(gorl, make_args, final):
    """Otherwise a refinement does not end at its final rate: Adam's steps at a constant slope."""
    args = make_args(gorl, decoder_epochs=5, decoder_buffer_size=60, decoder_lr_ratio=final)
    args = replace(args, decoder_learning_rate=1e-2)
    decoder = new_agent(gorl, args).decoder
    before = jax.tree.leaves(decoder.params)[0]
    ones = jax.tree.map(jnp.ones_like, decoder.params)
    steps = 5 * (60 // 16 - 1)
    for i in range(steps + 1):
        decoder = decoder.apply_gradients(grads=ones)
        after = jax.tree.leaves(decoder.params)[0]
        cosine = (1 + np.cos(np.pi * i / steps)) / 2
        rate = 1e-2 * (final + (1 - final) * cosine)
        np.testing.assert_allclose(before - after, rate, rtol=1e-3, atol=1e-7)
        before = after


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
    normed = (obs - agent.decoder_stats.mean) / agent.decoder_stats.std
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
    stats = running_statistics.update(agent.stats, 5 + jnp.ones((1, 1000, OBS)))
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
    normed = gorl.normalize(obs, agent.stats)
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
