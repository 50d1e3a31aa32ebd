"""Gaussian PPO, FPO and DPPO against SciPy, NumPy in float64, closed forms and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import PointMass, name_of, trained
from scipy import integrate, stats

import dppo
import fpo
import gorl_diff_ppo
import gorl_fm_ppo
import ppo_gaussian as ppo

OBS, ACT, T = 5, 3, 10
KEY = jax.random.PRNGKey(0)


def numpy_mlp(layers, x):
    for i, layer in enumerate(layers):
        x = x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
        x = x if i == len(layers) - 1 else x / (1 + np.exp(-x))
    return x


def numpy_velocity(net, obs, a, t):
    """App. C's network in float64: time enters as cos and sin of t * 2^k, k = 0 .. 3."""
    t = np.broadcast_to(t, (*a.shape[:-1], 1))
    angles = [f(t * 2**k) for f in (np.cos, np.sin) for k in range(4)]
    obs = np.broadcast_to(obs, (*a.shape[:-1], obs.shape[-1]))
    return numpy_mlp(net, np.concatenate([obs, a, *angles], axis=-1))


def agent_of(script, make_args, obs_dim=OBS, action_dim=ACT, **changes):
    args = make_args(script, **changes)
    return args, trained(script.init_agent(args, obs_dim, action_dim, KEY), KEY)


def rolled_out(script, args, agent, env=None):
    """A rollout on the PointMass, as the update sees it."""
    env = env or PointMass()
    envs = script.reset_envs(env, args.num_envs, KEY)
    _, steps, last_obs, _ = jax.jit(partial(script.rollout, args, env))(agent, envs, KEY)
    batch = script.as_unrolls(steps._replace(obs=script.normalize(agent.stats, steps.obs)))
    return batch, script.normalize(agent.stats, last_obs).reshape(-1, last_obs.shape[-1])


@pytest.mark.parametrize("script", [ppo, fpo, dppo, gorl_fm_ppo, gorl_diff_ppo], ids=lambda x: x.__name__)
def test_ratios_start_at_one(script, make_args):
    """Otherwise the first update already treats the rollout as another policy's."""
    args, agent = agent_of(script, make_args, 3, 2, clip_eps=1e-4, batch_size=32)
    batch, last_obs = rolled_out(script, args, agent)
    loss = jax.jit(jax.grad(script.loss_fn, has_aux=True), static_argnums=1)
    _, metrics = loss(agent.params, args, batch, last_obs, KEY)
    assert metrics["clip_fraction"] == 0 and abs(metrics["approx_kl"]) < 1e-7
    other = jax.tree.map(lambda x: x + 0.02, agent.params)
    _, metrics = loss(other, args, batch, last_obs, KEY)
    assert metrics["clip_fraction"] > 0.5 and metrics["approx_kl"] > 1e-6


@pytest.mark.parametrize("script", [ppo, fpo, dppo], ids=name_of)
def test_loss_is_its_terms(script, make_args):
    """Otherwise a coefficient on the command line weighs something else, or a baseline has a hidden term."""
    more = {"ent_coef": 0.2} if script is ppo else {}
    args, agent = agent_of(script, make_args, 3, 2, vf_coef=0.7, **more)
    batch, last_obs = rolled_out(script, args, agent)
    loss, metrics = script.loss_fn(agent.params, args, batch, last_obs, KEY)
    want = metrics["policy_loss"] + 0.7 * metrics["value_loss"]
    want -= 0.2 * metrics["entropy"] if script is ppo else 0
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert metrics["value_loss"] > 0 and all(np.isfinite(v) for v in metrics.values())


# --- Gaussian PPO ---


def test_gaussian_distribution(make_args):
    """Otherwise the actor is not App. E.3's, or its std leaves [1e-3, 10]."""
    _, agent = agent_of(ppo, make_args)
    obs, actor = np.random.default_rng(0).normal(size=(20, OBS)), agent.params["actor"]
    mean, raw = np.split(numpy_mlp(actor, obs), 2, axis=-1)
    got = ppo.distribution(actor, jnp.array(obs, jnp.float32))
    np.testing.assert_allclose(got[0], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], np.clip(np.logaddexp(0, raw), 1e-3, 10), rtol=1e-4)
    for raw, std in [(-100.0, 1e-3), (100.0, 10.0)]:
        last = {"kernel": jnp.zeros((32, 2 * ACT)), "bias": jnp.full(2 * ACT, raw)}
        np.testing.assert_allclose(ppo.distribution([*actor[:-1], last], jnp.ones(OBS))[1], std)


def test_log_density_of_a_tanh_gaussian():
    """Otherwise the logged entropy is not that of the actions, and the bonus pushes u into saturation."""
    r = np.random.default_rng(0)
    mean, std = r.normal(size=(50, ACT)), r.uniform(0.05, 2, size=(50, ACT))
    u = mean + 2 * std * r.normal(size=mean.shape)
    want = (stats.norm.logpdf(u, mean, std) + 2 * np.log(np.cosh(u))).sum(-1)
    got = ppo.log_prob_tanh(*(jnp.array(x, jnp.float32) for x in (u, mean, std)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    far = ppo.log_prob_tanh(jnp.array([40.0, -40.0]), jnp.zeros(2), jnp.ones(2))
    np.testing.assert_allclose(far, 2 * (stats.norm.logpdf(40) + 2 * 40 - 2 * np.log(2)), rtol=1e-5)

    def density(action):
        u = jnp.array([np.arctanh(action)], jnp.float32)
        return float(jnp.exp(ppo.log_prob_tanh(u, jnp.array([0.3]), jnp.array([0.7]))))

    assert abs(integrate.quad(density, -0.99999, 0.99999, limit=200)[0] - 1) < 1e-3


def tanh_entropy(mean, std):
    """Entropy of tanh(u), u from N(mean, std^2), by quadrature."""

    def integrand(z):
        return stats.norm.pdf(z) * -2 * np.log(np.cosh(mean + std * z))

    return stats.norm(mean, std).entropy() + integrate.quad(integrand, -12, 12)[0]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.3), (-0.5, 2.0)])
def test_entropy_and_its_gradient(make_args, mean, std):
    """Otherwise the entropy bonus does not widen the distribution of actions, or only that of u."""
    args, agent = agent_of(ppo, make_args, OBS, 1, ent_coef=1.0, vf_coef=0.0)
    raw, size = np.log(np.expm1(std)), 100_000
    actor = [*agent.params["actor"][:-1], {"kernel": jnp.zeros((32, 2)), "bias": jnp.array([mean, raw])}]
    obs, zeros = jnp.zeros((size, 1, OBS)), jnp.zeros((size, 1))
    drawn = {"log_prob": ppo.log_prob_tanh(zeros[..., None], jnp.float32(mean), jnp.float32(std))}
    batch = ppo.Transitions(obs, zeros[..., None], drawn, zeros, zeros > 1)  # advantages are all equal: 0

    def entropy(actor):
        params = {"actor": actor, "critic": jax.tree.map(jnp.zeros_like, agent.params["critic"])}
        return -ppo.loss_fn(params, args, batch, jnp.zeros((size, OBS)), KEY)[0]

    got, grad = jax.value_and_grad(entropy)(actor)
    np.testing.assert_allclose(got, tanh_entropy(mean, std), atol=0.03)
    h, slope = 1e-4, 1 / (1 + np.exp(-raw))  # of softplus
    want = [
        (tanh_entropy(mean + h, std) - tanh_entropy(mean - h, std)) / (2 * h),
        slope * (tanh_entropy(mean, std + h) - tanh_entropy(mean, std - h)) / (2 * h),
    ]
    np.testing.assert_allclose(grad[-1]["bias"], want, atol=0.03)


def test_gaussian_actions(make_args):
    """Otherwise actions are not drawn from the distribution whose density PPO uses."""
    args, agent = agent_of(ppo, make_args)
    obs = jnp.broadcast_to(jax.random.normal(KEY, (OBS,)), (20_000, OBS))
    mean, std = ppo.distribution(agent.params["actor"], ppo.normalize(agent.stats, obs))
    u, drawn = ppo.act(args, agent, obs, KEY, False)
    for i in range(ACT):
        assert stats.kstest(np.asarray((u - mean) / std)[:, i], "norm").pvalue > 1e-3
    np.testing.assert_array_equal(drawn["log_prob"], ppo.log_prob_tanh(u, mean, std))
    np.testing.assert_array_equal(ppo.act(args, agent, obs, KEY, True)[0], mean)


# --- FPO ---


def fpo_pairs(make_args, **changes):
    args, agent = agent_of(fpo, make_args, **changes)
    obs = jax.random.normal(KEY, (4000, OBS))
    u, drawn = jax.jit(partial(fpo.act, args))(agent, obs, KEY, False)
    return args, agent, fpo.normalize(agent.stats, obs), u, drawn


def test_flow_loss_is_that_of_the_predicted_noise(make_args):
    """Otherwise the ratio is not FPO's: mean squared error of the noise that the velocity implies."""
    _args, agent, obs, u, drawn = fpo_pairs(make_args)
    tau, noise, x = np.float64(drawn["tau"]), np.float64(drawn["noise"]), np.float64(u)[:, None]
    x_tau = (1 - tau) * x + tau * noise
    v = 0.25 * numpy_velocity(agent.params["actor"], np.float64(obs)[:, None], x_tau, tau)
    x_0 = x_tau - tau * v  # as in FPO's own code: the prediction at tau = 0, and from it the one at tau = 1
    want = ((noise - (x_0 + v)) ** 2).mean(-1)
    np.testing.assert_allclose(drawn["loss"], want, rtol=1e-3, atol=1e-5)
    got = fpo.flow_loss(make_args(fpo, target="velocity"), agent.params["actor"], obs, u, drawn)
    np.testing.assert_allclose(got, ((noise - x - v) ** 2).mean(-1), rtol=1e-3, atol=1e-5)


def test_flow_loss_is_zero_at_the_start_of_sampling(make_args):
    """FPO's loss trains the sampler's first step with no pair; --target velocity does."""
    _args, agent, obs, u, drawn = fpo_pairs(make_args)
    end = drawn | {"tau": jnp.ones_like(drawn["tau"])}

    def loss(target):
        def mean_loss(actor):
            return fpo.flow_loss(make_args(fpo, target=target), actor, obs, u, end).mean()

        return jax.value_and_grad(mean_loss)(agent.params["actor"])

    noise, velocity = loss("noise"), loss("velocity")
    assert noise[0] == 0 and not any(x.any() for x in jax.tree.leaves(noise[1]))
    assert velocity[0] > 0.1 and all(x.any() for x in jax.tree.leaves(velocity[1]))


@pytest.mark.parametrize("samples", [1, 8])
def test_pairs_are_drawn_as_in_fpo(make_args, samples):
    """Otherwise losses are compared at times that the sampler never visits, or at too few pairs."""
    _, _, _, u, drawn = fpo_pairs(make_args, samples_per_action=samples)
    tau, noise = np.asarray(drawn["tau"]), np.asarray(drawn["noise"])
    assert tau.shape == (4000, samples, 1) and noise.shape == (4000, samples, ACT) == (
        *drawn["loss"].shape,
        ACT,
    )
    values, counts = np.unique(np.round(tau, 5), return_counts=True)
    np.testing.assert_allclose(values, np.arange(1, 11) / 10, atol=1e-6)  # 1 is a step's start, 0 is not
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    columns = np.column_stack([noise[:, 0], tau[:, 0], u])
    correlation = np.corrcoef(columns.T)[: ACT + 1, ACT + 1 :]
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


@pytest.mark.parametrize("ratio", ["per-action", "per-pair"])
def test_ratio_forms(make_args, ratio):
    """Otherwise FPO's ratio is averaged after exp, or a pair's difference is not bounded."""
    args, agent = agent_of(fpo, make_args, 3, 2, ratio=ratio, clip_eps=0.05, batch_size=32)
    batch, last_obs = rolled_out(fpo, args, agent)
    old = np.random.default_rng(0).exponential(2.0, batch.drawn["loss"].shape)  # differences beyond 3, too
    batch = batch._replace(drawn=batch.drawn | {"loss": jnp.array(old, jnp.float32)})
    _, metrics = fpo.loss_fn(agent.params, args, batch, last_obs, KEY)
    advantage, _ = fpo.critic_terms(args, agent.params["critic"], batch, last_obs)
    new = np.float64(fpo.flow_loss(args, agent.params["actor"], batch.obs, batch.u, batch.drawn))
    difference, advantage = old - new, np.float64(advantage)
    if ratio == "per-action":
        rho = np.exp(difference.mean(-1))
    else:
        assert (np.abs(difference) > 3).mean() > 0.05
        rho, advantage = np.exp(np.clip(difference, -3, 3)), advantage[..., None]
    want = -np.minimum(rho * advantage, np.clip(rho, 0.95, 1.05) * advantage).mean()
    np.testing.assert_allclose(metrics["policy_loss"], want, rtol=1e-3)
    np.testing.assert_allclose(metrics["clip_fraction"], (np.abs(rho - 1) > 0.05).mean(), atol=2e-3)


def test_pairs_are_kept(make_args):
    """Otherwise old and new loss are of different pairs, and the ratio is mostly noise."""
    args, agent = agent_of(fpo, make_args, 3, 2)
    batch, last_obs = rolled_out(fpo, args, agent)
    losses = [
        fpo.loss_fn(jax.tree.map(lambda x: x + 0.01, agent.params), args, batch, last_obs, key)[0]
        for key in (KEY, jax.random.PRNGKey(1), None)
    ]
    assert losses[0] == losses[1] == losses[2]
    redrawn = batch._replace(drawn=batch.drawn | {"noise": batch.drawn["noise"][::-1]})
    moved = fpo.loss_fn(agent.params, args, redrawn, last_obs, KEY)[1]
    assert moved["log_ratio_std"] > 0.1


@pytest.mark.parametrize("steps", [1, 10])
def test_flow_sampling(make_args, monkeypatch, steps):
    """Otherwise the flow is followed for the wrong time, from the wrong end, or evaluated without noise."""
    args, agent = agent_of(fpo, make_args, flow_steps=steps)
    obs = jnp.zeros((5000, OBS))
    for field in (lambda x, tau: 0 * x + 2, lambda x, tau: x, lambda x, tau: tau + 0 * x):
        monkeypatch.setattr(fpo, "velocity", lambda net, obs, x, tau, field=field: field(x, tau))
        u = np.asarray(fpo.act(args, agent, obs, KEY, True)[0])
        want = [-6.0, 6.0]  # carried along by Euler's method
        for i in range(steps):
            want = [x - 0.25 * field(x, 1 - i / steps) / steps for x in want]
        scale, shift = (want[1] - want[0]) / 12, (want[1] + want[0]) / 2
        assert stats.kstest(((u - shift) / scale).ravel(), "norm").pvalue > 1e-3
    assert not np.allclose(u[0], u[1])


# --- DPPO ---


def ddim_means(args, actor, obs, chain):
    """Means of a_(t-1), by DDIM in its usual form, from the noise and the a_0 that v implies; float64."""
    steps = args.denoising_steps
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    keep, means = f / f[0], []
    for i, t in enumerate(range(steps, 0, -1)):
        a = np.float64(chain[..., i, :])
        v = numpy_velocity(actor, np.float64(obs), a, np.float64(t / steps))
        noise = np.sqrt(1 - keep[t]) * a + np.sqrt(keep[t]) * v
        a_0 = np.sqrt(keep[t]) * a - np.sqrt(1 - keep[t]) * v
        means.append(np.sqrt(keep[t - 1]) * a_0 + np.sqrt(1 - keep[t - 1]) * noise)
    return np.stack(means, axis=-2)


@pytest.mark.parametrize(("steps", "std"), [(10, 0.05), (4, 0.5)])
def test_log_likelihood_of_every_denoising_step(make_args, steps, std):
    """Otherwise PPO's ratios are not those of the policy that acted."""
    args, agent = agent_of(dppo, make_args, denoising_steps=steps, denoising_std=std)
    obs = jax.random.normal(KEY, (4000, OBS))
    u, drawn = jax.jit(partial(dppo.act, args))(agent, obs, KEY, False)
    chain, normed = np.float64(drawn["chain"]), dppo.normalize(agent.stats, obs)
    assert chain.shape == (4000, steps + 1, ACT) and drawn["log_prob"].shape == (4000, steps)
    np.testing.assert_array_equal(chain[:, -1], u)
    means = ddim_means(args, agent.params["actor"], normed, chain)
    want = stats.norm(means, std).logpdf(chain[:, 1:]).sum(-1)
    np.testing.assert_allclose(drawn["log_prob"], want, rtol=1e-3, atol=2e-3)
    noise = (chain[:, 1:] - means) / std
    for sample in (chain[:, 0], *noise.transpose(1, 0, 2)):
        assert stats.kstest(sample.ravel(), "norm").pvalue > 1e-4
    assert np.abs(np.corrcoef(noise.reshape(4000, -1).T) - np.eye(steps * ACT)).max() < 6 / np.sqrt(4000)


def test_dppo_is_evaluated_with_the_start_noise_only(make_args):
    """Otherwise evaluation adds the exploration noise, or starts all episodes from the same a_T."""
    args, agent = agent_of(dppo, make_args)
    obs = jnp.ones((50, OBS))
    u, drawn = dppo.act(args, agent, obs, KEY, True)
    means = ddim_means(args, agent.params["actor"], dppo.normalize(agent.stats, obs), drawn["chain"])
    np.testing.assert_allclose(drawn["chain"][:, 1:], means, rtol=1e-4, atol=1e-4)
    assert len(set(np.asarray(u[:, 0]).tolist())) == 50
    assert not np.allclose(u, dppo.act(args, agent, obs, jax.random.PRNGKey(1), True)[0])


def one_step_batch(script, obs, u, drawn, reward):
    """Episodes of a single step, whose advantage is the reward (with a critic of 0)."""

    def row(x):
        return x[:, None]

    truncated = jnp.zeros(len(u), bool)
    return script.Transitions(row(obs), row(u), jax.tree.map(row, drawn), row(reward), row(truncated))


def test_denoising_gradient_is_the_gradient_of_the_reward(make_args):
    """Otherwise the ten steps' ratios do not add up to the policy gradient (in a one-step problem)."""
    args, agent = agent_of(dppo, make_args, 1, 1, denoising_std=0.3, reward_scale=1.0, vf_coef=0.0)
    critic = jax.tree.map(jnp.zeros_like, agent.params["critic"])
    agent, size = agent.replace(params=agent.params | {"critic": critic}), 100_000
    obs = jnp.ones((size, 1))

    def rewards(actor):
        u, drawn = dppo.act(args, agent.replace(params={"actor": actor}), obs, KEY, False)
        return jnp.sin(2 * u[:, 0]) + 0.5 * u[:, 0], u, drawn

    actor = agent.params["actor"]
    reward, u, drawn = jax.jit(rewards)(actor)
    batch = one_step_batch(dppo, dppo.normalize(agent.stats, obs), u, drawn, reward)
    loss = jax.jit(jax.grad(dppo.loss_fn, has_aux=True), static_argnums=1)
    grads = loss(agent.params, args, batch, jnp.zeros((size, 1)), KEY)[0]["actor"]

    @jax.jit
    def by_sample(direction):
        """d log p of each whole chain, times its centred reward: the score-function estimate."""

        def log_prob(h):
            moved = jax.tree.map(lambda x, d: x + h * d, actor, direction)
            return dppo.denoising_log_prob(args, moved, batch.obs, batch.drawn["chain"]).sum(-1)[:, 0]

        return jax.jvp(log_prob, (0.0,), (1.0,))[1] * (reward - reward.mean())

    for seed in range(4):
        keys = iter(jax.random.split(jax.random.PRNGKey(seed), 100))
        direction = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), actor)  # noqa: B023
        got = -sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
        got *= reward.std() * T  # the loss divides by both
        error = by_sample(direction).std() / np.sqrt(size)
        h = 1e-2  # common random numbers: the same noise on both sides
        up, down = (
            jax.jit(rewards)(jax.tree.map(lambda x, d: x + s * h * d, actor, direction))[0].mean()  # noqa: B023
            for s in (1, -1)
        )
        want = (up - down) / (2 * h)
        assert abs(got - want) < 5 * error + 0.01 * abs(want), (got, want, error)
        assert abs(want) > 8 * error  # a test of a gradient that is not lost in noise


# --- learning, in one dimension ---


@pytest.mark.parametrize("script", [ppo, fpo, dppo], ids=name_of)
def test_rewarded_actions_become_more_likely(script, make_args):
    """Otherwise the update does not raise the probability of actions of positive advantage."""
    sizes = {"num_envs": 2048, "batch_size": 256, "num_minibatches": 8, "update_epochs": 4}
    args = make_args(script, **sizes, learning_rate=1e-3, reward_scale=1.0)
    agent = script.init_agent(args, 1, 1, KEY)
    critic = jax.tree.map(jnp.zeros_like, agent.params["critic"])
    agent = agent.replace(params=agent.params | {"critic": critic})
    obs = jnp.zeros((2048, 1))

    @jax.jit
    def step(agent, key):
        act_key, update_key = jax.random.split(key)
        u, drawn = script.act(args, agent, obs, act_key, False)
        rewarded = (u[:, 0] > 0.8) & (u[:, 0] < 1.6)
        batch = one_step_batch(script, obs, u, drawn, rewarded.astype(jnp.float32))
        agent, _ = script.update(args, agent, batch, obs, update_key)
        return agent, rewarded.mean()

    share = []
    for key in jax.random.split(KEY, 30):
        agent, rewarded = step(agent, key)
        share.append(float(rewarded))
    counts, _ = np.histogram(script.act(args, agent, obs, KEY, False)[0], bins=[-9, 0.8, 1.6, 9])
    assert share[0] < 0.25
    assert counts[1] / 2048 > 2 * share[0], share


def test_optimiser_is_adam(make_args, script):
    """Otherwise the learning rate on the command line is not that of the paper's Adam."""
    args = make_args(script, learning_rate=0.1)
    agent = script.init_agent(args, 3, 2, KEY)
    for name, opt in agent.opt.items():
        want = optax.adam(0.1).init(agent.params[name])
        jax.tree.map(np.testing.assert_array_equal, opt, want)
