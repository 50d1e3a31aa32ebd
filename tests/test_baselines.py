"""Gaussian PPO, FPO and DPPO against SciPy, NumPy in float64, closed forms, finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GORL, name_of, trained
from oracles import numpy_gae, numpy_mlp, numpy_velocity, sizes, with_output
from scipy import integrate, stats
from toy import Walled

import dppo
import fpo
import ppo_gaussian as ppo

OBS, ACT = 5, 3
KEY = jax.random.PRNGKey(0)
BASELINES = [ppo, fpo, dppo]


def agent_of(script, make_args, env=None, **changes):
    args = make_args(script, **changes)
    return args, trained(script.init_agent(args, env or sizes(OBS, ACT), KEY), KEY)


def rolled_out(script, args, agent):
    """Unrolls of the walled point mass, as the update sees them."""
    env = Walled()

    @jax.jit
    def roll(agent):
        envs = script.reset_envs(env, args.num_envs, KEY)
        return script.rollout(args, env, agent, envs, KEY)[2]

    return roll(agent)


def params_of(agent):
    policy = agent._fields[0]  # encoder or actor
    return {policy: getattr(agent, policy).params, "critic": agent.critic.params}


def loss_of(script, args, agent, batch, params=None, key=KEY):
    """Gradients and metrics of a script's loss."""
    if script in GORL:
        loss, more = script.ppo_loss, (1e-4,)
    elif script is ppo:
        loss, more = script.ppo_loss, (key,)
    else:
        loss, more = getattr(script, f"{script.__name__}_loss"), ()
    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    return grad(params or params_of(agent), args, agent, batch, *more)


def test_ratios_start_at_one(script, make_args):
    """Otherwise the first update already treats the rollout as another policy's."""
    changes = {"stage_timesteps": ()} if script in GORL else {"clip_eps": 1e-4}
    args, agent = agent_of(script, make_args, Walled(), batch_size=32, **changes)
    batch = rolled_out(script, args, agent)
    _, metrics = loss_of(script, args, agent, batch)
    assert metrics["clip_fraction"] == 0
    assert abs(metrics["approx_kl"]) < 1e-7
    other = jax.tree.map(lambda x: x + 0.02, params_of(agent))
    _, metrics = loss_of(script, args, agent, batch, other)
    assert metrics["clip_fraction"] > 0.5
    assert metrics["approx_kl"] > 1e-6


def targets_and_advantages(args, agent, batch):
    """In float64, (T, B), and the critic's errors."""
    value = numpy_mlp(agent.critic.params["params"], np.float64(batch.obs))[..., 0].T
    data = batch.reward.T, batch.terminated.T, batch.truncated.T
    target, advantage = numpy_gae(*data, value, args.gamma, args.gae_lambda)
    return target, advantage, target - value[:-1]


def normalized_advantage(args, agent, batch):
    _, advantage, _ = targets_and_advantages(args, agent, batch)
    return ((advantage - advantage.mean()) / advantage.std()).T


@pytest.mark.parametrize("script", BASELINES, ids=name_of)
def test_loss_is_its_terms(script, make_args):
    """Otherwise a coefficient weighs something else, or a terminal state is not the critic's."""
    changes = {"ent_coef": 0.2} if script is ppo else {}
    sizes = {"num_envs": 32, "batch_size": 32, "episode_length": 9}
    args, agent = agent_of(script, make_args, Walled(), vf_coef=0.7, **sizes, **changes)
    batch = rolled_out(script, args, agent)
    assert batch.terminated.any()
    assert batch.truncated.any()
    _, metrics = loss_of(script, args, agent, batch)
    _, _, error = targets_and_advantages(args, agent, batch)
    np.testing.assert_allclose(metrics["value_loss"], np.square(error).mean(), rtol=1e-3)
    want = metrics["policy_loss"] + 0.7 * metrics["value_loss"]
    if script is ppo:
        want -= 0.2 * metrics["entropy"]
    np.testing.assert_allclose(metrics["loss"], want, rtol=1e-6)
    assert all(np.isfinite(x) for x in metrics.values())


def without_critic(agent):
    """Its values are 0 everywhere, at no cost."""

    def zero(params, obs):
        return params["value"] * jnp.zeros((*obs.shape[:-1], 1))

    params = {"value": jnp.zeros(())}
    opt_state = agent.critic.tx.init(params)
    critic = agent.critic.replace(apply_fn=zero, params=params, opt_state=opt_state)
    return agent._replace(critic=critic)


# --- Gaussian PPO ---


def test_gaussian_actor(make_args):
    """Otherwise the actor is not App. E.3's, or its std leaves [1e-3, 10]."""
    _, agent = agent_of(ppo, make_args)
    obs = np.random.default_rng(0).normal(size=(20, OBS))
    actor = agent.actor
    mean, raw = np.split(numpy_mlp(actor.params["params"]["MLP_0"], obs), 2, axis=-1)
    got = actor.apply_fn(actor.params, jnp.float32(obs))
    np.testing.assert_allclose(got[0], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], np.clip(np.logaddexp(0, raw), 1e-3, 10), rtol=1e-4)
    for raw, std in [(-100.0, 1e-3), (100.0, 10.0)]:
        params = with_output(actor.params, [raw] * 2 * ACT)
        np.testing.assert_allclose(actor.apply_fn(params, jnp.ones(OBS))[1], std)


def test_log_density_of_a_tanh_gaussian():
    """Otherwise the entropy is not that of the actions, and the bonus pushes u into saturation."""
    r = np.random.default_rng(0)
    mean, std = r.normal(size=(50, ACT)), r.uniform(0.05, 2, size=(50, ACT))
    u = mean + 2 * std * r.normal(size=mean.shape)
    want = (stats.norm.logpdf(u, mean, std) + 2 * np.log(np.cosh(u))).sum(-1)
    got = ppo.log_prob_of_action(*(jnp.float32(x) for x in (u, mean, std)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    far = ppo.log_prob_of_action(jnp.array([40.0, -40.0]), jnp.zeros(2), jnp.ones(2))
    want = 2 * (stats.norm.logpdf(40) + 2 * 40 - 2 * np.log(2))
    np.testing.assert_allclose(far, want, rtol=1e-5)

    actions = np.linspace(-0.99999, 0.99999, 200_001)
    u = jnp.float32(np.arctanh(actions))[:, None]
    density = np.exp(ppo.log_prob_of_action(u, jnp.array([0.3]), jnp.array([0.7])))
    assert abs(integrate.trapezoid(density, actions) - 1) < 1e-3


def tanh_entropy(mean, std):
    """Entropy of tanh(u), u from N(mean, std^2), by quadrature."""

    def integrand(z):
        return stats.norm.pdf(z) * -2 * np.log(np.cosh(mean + std * z))

    return stats.norm(mean, std).entropy() + integrate.quad(integrand, -12, 12)[0]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.3), (-0.5, 2.0)])
def test_entropy_and_its_gradient(make_args, mean, std):
    """Otherwise the entropy bonus does not widen the distribution of actions, or only that of u."""
    args, agent = agent_of(ppo, make_args, sizes(OBS, 1), ent_coef=1.0, vf_coef=0.0)
    agent = without_critic(agent)
    raw = np.log(np.expm1(std))
    size = 100_000
    u, zeros = jnp.zeros((size, 1, 1)), jnp.zeros((size, 1))  # advantages are all equal: 0
    log_prob = ppo.log_prob_of_action(u, jnp.float32(mean), jnp.float32(std))
    ends = [zeros > 1] * 3
    batch = ppo.Steps(jnp.zeros((size, 2, OBS)), u, log_prob, zeros, *ends)
    params = params_of(agent) | {"actor": with_output(agent.actor.params, [mean, raw])}
    grads, metrics = loss_of(ppo, args, agent, batch, params)
    np.testing.assert_allclose(metrics["entropy"], tanh_entropy(mean, std), atol=0.03)
    h = 1e-4
    slope = 1 / (1 + np.exp(-raw))  # of softplus
    want = [
        (tanh_entropy(mean + h, std) - tanh_entropy(mean - h, std)) / (2 * h),
        slope * (tanh_entropy(mean, std + h) - tanh_entropy(mean, std - h)) / (2 * h),
    ]
    got = grads["actor"]["params"]["MLP_0"]["last"]["bias"]
    np.testing.assert_allclose(-got, want, atol=0.03)


def test_gaussian_actions(make_args):
    """Otherwise actions are not drawn from the distribution whose density PPO uses."""
    args, agent = agent_of(ppo, make_args)
    obs = jnp.broadcast_to(jax.random.normal(KEY, (OBS,)), (20_000, OBS))
    mean, std = agent.actor.apply_fn(agent.actor.params, ppo.normalize(obs, agent.stats))
    u, log_prob = ppo.act(args, agent, obs, KEY)
    for i in range(ACT):
        assert stats.kstest(np.asarray((u - mean) / std)[:, i], "norm").pvalue > 1e-3
    np.testing.assert_array_equal(log_prob, ppo.log_prob_of_action(u, mean, std))
    np.testing.assert_array_equal(ppo.act(args, agent, obs, KEY, deterministic=True)[0], mean)


# --- FPO ---


def fpo_pairs(make_args, **changes):
    """Arguments, agent, normalised observations, and u, tau, noise, loss."""
    args, agent = agent_of(fpo, make_args, **changes)
    obs = jax.random.normal(KEY, (4000, OBS))
    drawn = jax.jit(partial(fpo.act, args))(agent, obs, KEY)
    return args, agent, fpo.normalize(obs, agent.stats), *drawn


def test_flow_loss_is_that_of_the_predicted_noise(make_args):
    """Otherwise the ratio is not FPO's: squared error of the noise that the velocity implies."""
    _, agent, obs, u, tau, noise, got = fpo_pairs(make_args)
    obs, u, tau, noise = (np.float64(x) for x in (obs, u, tau, noise))
    u, weight = u[:, None], tau[..., None]
    x_tau = (1 - weight) * u + weight * noise
    v = 0.25 * numpy_velocity(agent.actor.params, obs[:, None], x_tau, tau)
    # As in FPO's own code: the prediction at tau = 0, and from it the one at tau = 1.
    x_0 = x_tau - weight * v
    want = ((noise - (x_0 + v)) ** 2).mean(-1)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_flow_loss_is_zero_at_the_start_of_sampling(make_args):
    """The script's docstring says so: the sampler's first step is never trained."""
    _, agent, obs, u, tau, noise, _ = fpo_pairs(make_args)
    tau = jnp.ones_like(tau)

    def mean_loss(params):
        return fpo.flow_loss(agent.actor, params, obs, u, tau, noise).mean()

    loss, grads = jax.value_and_grad(mean_loss)(agent.actor.params)
    assert loss == 0
    assert not any(x.any() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("samples", [1, 8])
def test_pairs_are_drawn_as_in_fpo(make_args, samples):
    """Otherwise losses are compared at times that the sampler never visits, or at too few pairs."""
    _, _, _, u, tau, noise, loss = fpo_pairs(make_args, samples_per_action=samples, flow_steps=10)
    assert tau.shape == loss.shape == (4000, samples)
    assert noise.shape == (4000, samples, ACT)
    values, counts = np.unique(np.round(tau, 5), return_counts=True)
    # Where a step of the sampler starts: at 1, but not at 0.
    np.testing.assert_allclose(values, np.arange(1, 11) / 10, atol=1e-6)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(np.ravel(noise), "norm").pvalue > 1e-3
    columns = np.column_stack([noise[:, 0], tau[:, 0], u])
    correlation = np.corrcoef(columns.T)[: ACT + 1, ACT + 1 :]
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)


@pytest.mark.parametrize("form", ["per-action", "per-pair"])
def test_ratio_forms(make_args, form):
    """Otherwise FPO's ratio is averaged after exp, or a pair's difference is not bounded."""
    changes = {"ratio": form, "clip_eps": 0.05, "batch_size": 32}
    args, agent = agent_of(fpo, make_args, Walled(), **changes)
    batch = rolled_out(fpo, args, agent)
    old = np.random.default_rng(0).exponential(2.0, batch.flow_loss.shape)  # beyond 3, too
    batch = batch._replace(flow_loss=jnp.float32(old))
    _, metrics = loss_of(fpo, args, agent, batch)
    pairs = batch.obs[:, :-1], batch.u, batch.tau, batch.noise
    difference = old - np.float64(fpo.flow_loss(agent.actor, agent.actor.params, *pairs))
    advantage = normalized_advantage(args, agent, batch)
    if form == "per-action":
        ratio = np.exp(difference.mean(-1))
    else:
        assert (np.abs(difference) > 3).mean() > 0.05
        ratio = np.exp(np.clip(difference, -3, 3))
        advantage = advantage[..., None]
    want = -np.minimum(ratio * advantage, np.clip(ratio, 0.95, 1.05) * advantage).mean()
    np.testing.assert_allclose(metrics["policy_loss"], want, rtol=1e-3)
    clipped = (np.abs(ratio - 1) > 0.05).mean()
    np.testing.assert_allclose(metrics["clip_fraction"], clipped, atol=2e-3)


def test_pairs_are_kept(make_args):
    """Otherwise old and new loss are of different pairs, and the ratio is mostly noise."""
    args, agent = agent_of(fpo, make_args, Walled())
    batch = rolled_out(fpo, args, agent)
    assert loss_of(fpo, args, agent, batch)[1]["log_ratio_std"] < 1e-5
    redrawn = batch._replace(noise=batch.noise[::-1])
    assert loss_of(fpo, args, agent, redrawn)[1]["log_ratio_std"] > 0.1


def with_field(network, field):
    """The network, its output replaced by `field(obs, a, t)`."""
    return network.replace(apply_fn=lambda params, obs, a, t: field(obs, a, t))


@pytest.mark.parametrize("steps", [1, 10])
def test_flow_sampling(make_args, steps):
    """Otherwise the flow is followed for the wrong time, from the wrong end, or without noise."""
    args, agent = agent_of(fpo, make_args, flow_steps=steps)
    obs = jnp.zeros((5000, OBS))
    for field in (lambda x, tau: 0 * x + 2, lambda x, tau: x / 4, lambda x, tau: tau + 0 * x):
        actor = with_field(agent.actor, lambda obs, x, tau, f=field: f(x, jnp.mean(tau)))
        u = np.asarray(fpo.act(args, agent._replace(actor=actor), obs, KEY, True)[0])
        low, high = -6.0, 6.0  # carried along by Euler's method
        for i in range(steps):
            low = low - field(low, 1 - i / steps) / steps
            high = high - field(high, 1 - i / steps) / steps
        scale, shift = (high - low) / 12, (high + low) / 2
        assert stats.kstest(((u - shift) / scale).ravel(), "norm").pvalue > 1e-3
    assert not np.allclose(u[0], u[1])


def test_velocity_of_fpo(make_args):
    """Otherwise FPO's field is not a quarter of App. E.3's network, time and all."""
    _, agent = agent_of(fpo, make_args)
    r = np.random.default_rng(0)
    obs, x, tau = r.normal(size=(20, OBS)), r.normal(size=(20, ACT)), r.random(20)
    got = agent.actor.apply_fn(agent.actor.params, *(jnp.float32(x) for x in (obs, x, tau)))
    want = 0.25 * numpy_velocity(agent.actor.params, obs, x, tau)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


# --- DPPO ---


def alpha_bars(steps):
    """The cosine schedule's, (steps + 1,), in float64 (Nichol & Dhariwal, 2021)."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return f / f[0]


def numpy_denoising(args, v_of, chain):
    """Means and stds of a_(t-1) given the chain's a_t, from the noise and the a_0 that v implies.

    By Ho et al. (2020), Eq. 7, for DDPM, and by Song et al. (2021), Eq. 12, for DDIM.
    """
    keep = alpha_bars(args.denoising_steps)
    means, stds = [], []
    for i, t in enumerate(range(args.denoising_steps, 0, -1)):
        a = np.float64(chain[..., i, :])
        v = v_of(a, t)
        noise = np.sqrt(1 - keep[t]) * a + np.sqrt(keep[t]) * v
        a_0 = np.sqrt(keep[t]) * a - np.sqrt(1 - keep[t]) * v
        if args.denoising_noise == "ddpm":
            beta = 1 - keep[t] / keep[t - 1]
            from_a_0 = np.sqrt(keep[t - 1]) * beta / (1 - keep[t])
            from_a = np.sqrt(1 - beta) * (1 - keep[t - 1]) / (1 - keep[t])
            means.append(from_a_0 * a_0 + from_a * a)
            std = np.sqrt((1 - keep[t - 1]) / (1 - keep[t]) * beta)
        else:
            means.append(np.sqrt(keep[t - 1]) * a_0 + np.sqrt(1 - keep[t - 1]) * noise)
            std = 0
        stds.append(max(std, args.denoising_std))
    return np.stack(means, axis=-2), np.array(stds)[:, None]


def denoising_of(args, agent, obs, chain):
    """The same, with the agent's network at raw observations."""
    params, obs = agent.actor.params, np.float64(dppo.normalize(obs, agent.stats))
    steps = args.denoising_steps
    return numpy_denoising(args, lambda a, t: numpy_velocity(params, obs, a, t / steps), chain)


@pytest.mark.parametrize(
    ("noise", "steps", "std"), [("ddpm", 10, 0.05), ("ddpm", 4, 0.5), ("ddim", 10, 0.05)]
)
def test_log_likelihood_of_every_denoising_step(make_args, noise, steps, std):
    """Otherwise PPO's ratios are not those of the policy that acted."""
    changes = {"denoising_steps": steps, "denoising_std": std, "denoising_noise": noise}
    args, agent = agent_of(dppo, make_args, **changes)
    obs = jax.random.normal(KEY, (4000, OBS))
    u, chain, log_prob = jax.jit(partial(dppo.act, args))(agent, obs, KEY)
    chain = np.float64(chain)
    assert chain.shape == (4000, steps + 1, ACT)
    assert log_prob.shape == (4000, steps)
    np.testing.assert_array_equal(chain[:, -1], u)
    means, stds = denoising_of(args, agent, obs, chain)
    want = stats.norm(means, stds).logpdf(chain[:, 1:]).sum(-1)
    np.testing.assert_allclose(log_prob, want, rtol=1e-3, atol=2e-3)
    sampled = (chain[:, 1:] - means) / stds
    sampled = np.concatenate([chain[:, :1], sampled], axis=1)  # a_D, and the noise of each step
    for sample in sampled.transpose(1, 0, 2):
        assert stats.kstest(sample.ravel(), "norm").pvalue > 1e-4
    correlation = np.corrcoef(sampled.reshape(4000, -1).T) - np.eye((steps + 1) * ACT)
    assert np.abs(correlation).max() < 6 / np.sqrt(4000)


@pytest.mark.parametrize("noise", ["ddpm", "ddim"])
def test_dppo_samples_the_gaussian_that_its_predictor_knows(make_args, noise):
    """Otherwise the chain is not the diffusion's: with many small steps it ends in the data."""
    steps, mean, std = 150, 1.5, 0.4
    changes = {"denoising_steps": steps, "denoising_std": 1e-3, "denoising_noise": noise}
    args, agent = agent_of(dppo, make_args, **changes)
    angles = np.arccos(np.sqrt(alpha_bars(steps)))

    def exact(params, obs, a, t):
        """E[v | a_t], data from N(mean, std^2)."""
        phi = angles[round(float(t) * steps)]
        rest = np.float64(a) - np.cos(phi) * mean
        rest /= np.square(std * np.cos(phi)) + np.square(np.sin(phi))
        a_0 = mean + std**2 * np.cos(phi) * rest
        return jnp.float32(np.cos(phi) * np.sin(phi) * rest - np.sin(phi) * a_0)

    agent = agent._replace(actor=agent.actor.replace(apply_fn=exact))
    with pytest.MonkeyPatch.context() as patch:  # the likelihoods are another test's
        patch.setattr(dppo, "denoising_log_prob", lambda *rest: None)
        u, *_ = dppo.act(args, agent, jnp.zeros((20_000, OBS)), KEY)
    assert abs(u.mean() - mean) < 0.01
    assert abs(u.std() / std - 1) < 0.03  # 0.98 with 150 steps, 0.88 and less with ten


def test_untrained_dppo_explores(make_args):
    """Otherwise training starts from a policy that hardly tries anything."""
    args = make_args(dppo, denoising_steps=10)
    agent = dppo.init_agent(args, sizes(OBS, ACT), KEY)
    u, *_ = jax.jit(partial(dppo.act, args))(agent, jnp.ones((20_000, OBS)), KEY)
    assert abs(u.mean()) < 0.02
    assert abs(u.std() - 0.826) < 0.01  # a_0 = cos(phi_t) a_t at each step, and its noise


def test_dppo_clips_the_ratio_of_every_step(make_args):
    """Otherwise an update goes further than PPO's, or a step has another step's advantage."""
    args, agent = agent_of(dppo, make_args, Walled(), clip_eps=0.2, batch_size=32)
    batch = rolled_out(dppo, args, agent)
    log_ratio = np.random.default_rng(0).normal(0, 0.3, batch.log_prob.shape)
    batch = batch._replace(log_prob=batch.log_prob - jnp.float32(log_ratio))
    _, metrics = loss_of(dppo, args, agent, batch)
    advantage, ratio = normalized_advantage(args, agent, batch)[..., None], np.exp(log_ratio)
    want = {
        "policy_loss": -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clip_fraction": (np.abs(ratio - 1) > 0.2).mean(),
        "log_ratio_std": log_ratio.std(),
    }
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-3)


def test_dppo_is_evaluated_with_the_start_noise_only(make_args):
    """Otherwise evaluation adds the exploration noise, or starts all from the same a_D."""
    args, agent = agent_of(dppo, make_args)
    obs = jnp.ones((50, OBS))
    u, chain, _ = dppo.act(args, agent, obs, KEY, deterministic=True)
    means, _ = denoising_of(args, agent, obs, chain)
    np.testing.assert_allclose(chain[:, 1:], means, rtol=1e-4, atol=1e-4)
    assert len(set(np.asarray(u[:, 0]).tolist())) == 50
    other, *_ = dppo.act(args, agent, obs, jax.random.PRNGKey(1), deterministic=True)
    assert not np.allclose(u, other)


def one_step_batch(script, obs, sample, reward):
    """Episodes that end with their only step: the advantage is the reward, at a critic of 0."""
    obs = jnp.stack([obs, obs], axis=1)
    yes = jnp.ones((len(obs), 1), bool)
    rows = [x[:, None] for x in (*sample, reward)]
    return script.Steps(obs, *rows, yes, ~yes, ~yes)


def test_denoising_gradient_is_the_gradient_of_the_reward(make_args):
    """Otherwise the steps' ratios do not add up to the policy gradient (in a one-step problem)."""
    changes = {"denoising_steps": 4, "denoising_std": 0.3, "vf_coef": 0.0}
    args, agent = agent_of(dppo, make_args, sizes(1, 1), **changes)
    agent = without_critic(agent)
    size = 100_000
    obs = jnp.ones((size, 1))

    @jax.jit
    def act(params):
        moved = agent._replace(actor=agent.actor.replace(params=params))
        sample = dppo.act(args, moved, obs, KEY)
        u = sample[0][:, 0]
        return jnp.sin(2 * u) + 0.5 * u, sample

    actor = agent.actor.params
    reward, sample = act(actor)
    batch = one_step_batch(dppo, dppo.normalize(obs, agent.stats), sample, reward)
    grads = loss_of(dppo, args, agent, batch)[0]["actor"]

    def moved(direction, h):
        return jax.tree.map(lambda x, d: x + h * d, actor, direction)

    @jax.jit
    def by_sample(direction):
        """d log p of each whole chain, times its centred reward: the score-function estimate."""

        def log_prob(h):
            data = agent.actor, moved(direction, h), batch.obs[:, :-1], batch.chain
            return dppo.denoising_log_prob(args, *data).sum(-1)[:, 0]

        return jax.jvp(log_prob, (0.0,), (1.0,))[1] * (reward - reward.mean())

    def random_like(x, r):
        return jnp.float32(r.normal(size=x.shape))

    for seed in range(4):
        r = np.random.default_rng(seed)
        direction = jax.tree.map(partial(random_like, r=r), actor)
        products = jax.tree.map(lambda g, d: jnp.vdot(g, d), grads, direction)
        # The loss divides by the rewards' deviation, and by the number of denoising steps.
        got = -sum(jax.tree.leaves(products)) * reward.std() * args.denoising_steps
        error = by_sample(direction).std() / np.sqrt(size)
        h = 1e-2  # common random numbers: the same noise on both sides
        up, down = (act(moved(direction, x))[0].mean() for x in (h, -h))
        want = (up - down) / (2 * h)
        assert abs(got - want) < 5 * error + 0.01 * abs(want), (got, want, error)
        assert abs(want) > 8 * error  # a test of a gradient that is not lost in noise


# --- learning, in one dimension ---


@pytest.mark.parametrize("script", BASELINES, ids=name_of)
def test_rewarded_actions_become_more_likely(script, make_args):
    """Otherwise the update does not raise the probability of actions of positive advantage."""
    changes = {"batch_size": 256, "num_minibatches": 8, "update_epochs": 4, "learning_rate": 1e-3}
    args = make_args(script, **changes)
    agent = without_critic(script.init_agent(args, sizes(1, 1), KEY))
    obs = jnp.zeros((2048, 1))

    @jax.jit
    def step(agent, key):
        act_key, update_key = jax.random.split(key)
        sample = script.act(args, agent, obs, act_key)
        u = sample[0][:, 0]
        rewarded = (u > 0.8) & (u < 1.6)
        batch = one_step_batch(script, obs, sample, rewarded.astype(jnp.float32))
        agent, _ = script.update(args, agent, batch, update_key)
        return agent, rewarded.mean()

    # Without the Python int that a new TrainState counts in, the second call compiles nothing.
    agent = jax.tree.map(jnp.asarray, agent)
    shares = []
    for key in jax.random.split(KEY, 30):
        agent, share = step(agent, key)
        shares.append(float(share))
    counts, _ = np.histogram(script.act(args, agent, obs, KEY)[0], bins=[-9, 0.8, 1.6, 9])
    assert shares[0] < 0.25
    assert counts[1] / 2048 > 2 * shares[0], shares


def test_optimiser_is_adam(make_args, script):
    """Otherwise a learning rate on the command line is not that of the paper's Adam."""
    changes = {"decoder_learning_rate": 0.2} if script in GORL else {}
    args = make_args(script, learning_rate=0.1, **changes)
    agent = script.init_agent(args, sizes(3, 2), KEY)
    rates = {agent._fields[0]: 0.1, "critic": 0.1, "decoder": 0.2}
    for name in set(rates) & set(agent._fields):
        network = getattr(agent, name)
        ones = jax.tree.map(jnp.ones_like, network.params)
        moved = network.apply_gradients(grads=ones).params
        step, _ = optax.adam(rates[name]).update(ones, optax.adam(rates[name]).init(ones))
        want = optax.apply_updates(network.params, step)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), moved, want)
