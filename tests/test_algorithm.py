"""Each formula against an oracle: NumPy and SciPy in float64, closed forms, Brax."""

import sys
from collections import deque
from dataclasses import replace
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from brax.training.agents.ppo.losses import compute_gae
from conftest import trained
from scipy import integrate, stats

import gorl_fm_ppo as gorl

OBS, ACT = 5, 3
KEY = jax.random.PRNGKey(0)


def rng(seed=0):
    return np.random.default_rng(seed)


def all_close(got, want, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


def all_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


# --- advantages ---


def gae_data(steps=12, envs=64):
    """Rewards, values and truncations: inside, at the end, at the start, several in a row, none at all."""
    r = rng()
    truncated = (r.random((steps, envs)) < 0.15).astype(np.float32)
    truncated[:, 0], truncated[:, 1], truncated[-1, 2:10], truncated[0, 10:14] = 0, 1, 1, 1
    truncated[4:7, 14:18] = 1
    reward, value = r.normal(size=(steps, envs)), r.normal(size=(steps + 1, envs)) * 5
    return reward.astype(np.float32), truncated, value.astype(np.float32)


def numpy_gae(reward, truncated, value, gamma, lam):
    """Every sum written out, forward in time, up to the step that was truncated."""
    reward, value = np.float64(reward), np.float64(value)
    steps, envs = reward.shape
    target, advantage = value[:-1].copy(), np.zeros((steps, envs))
    for n in range(envs):
        for t in range(steps):
            for k in range(t, steps):
                if truncated[k, n]:
                    break
                delta = reward[k, n] + gamma * value[k + 1, n] - value[k, n]
                target[t, n] += (gamma * lam) ** (k - t) * delta
        for t in range(steps):
            following = target[t + 1, n] if t + 1 < steps else value[-1, n]
            if not truncated[t, n]:
                advantage[t, n] = reward[t, n] + gamma * following - value[t, n]
    return target, advantage


@pytest.mark.parametrize(("gamma", "lam"), [(0.995, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_braxs(make_args, gamma, lam):
    """Otherwise advantages and critic targets are not those of the PPO that the paper builds on."""
    reward, truncated, value = gae_data()
    want = compute_gae(truncated, np.zeros_like(reward), reward, value[:-1], value[-1], lam, gamma)
    got = gorl.gae(make_args(gamma=gamma, gae_lambda=lam), reward, truncated, value)
    all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("gamma", "lam"), [(0.995, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_its_definition(make_args, gamma, lam):
    """Otherwise the policy follows returns that are not the discounted rewards."""
    data = gae_data()
    got = gorl.gae(make_args(gamma=gamma, gae_lambda=lam), *data)
    all_close(got, numpy_gae(*data, gamma, lam), rtol=2e-5, atol=2e-5)


def test_gae_ignores_what_follows_a_truncated_step(make_args):
    """Otherwise an episode's value leaks in from the state that the environment was reset to."""
    reward, truncated, value = gae_data()
    gae = jax.jit(partial(gorl.gae, make_args()))
    before = gae(reward, truncated, value)
    for t, n in np.argwhere(truncated):
        changed, rewards = value.copy(), reward.copy()
        changed[t + 1 :, n] += 1e3
        rewards[t:, n] -= 1e3
        for got, want in zip(gae(rewards, truncated, changed), before, strict=True):
            np.testing.assert_array_equal(got[: t + 1, n], want[: t + 1, n])
    target, advantage = before
    np.testing.assert_array_equal(target[truncated > 0], value[:-1][truncated > 0])
    assert not advantage[truncated > 0].any()


# --- running statistics ---


def init_stats(obs_dim):
    return gorl.init_agent(gorl.Args(), obs_dim, 1, KEY).stats


def relative_error(got, mean, var):
    """Largest error of the mean, in standard deviations, and of the standard deviation."""
    std = np.sqrt(var)
    return max(np.abs((got.mean - mean) / std).max(), np.abs(np.sqrt(np.float64(got.var)) / std - 1).max())


def test_statistics_of_uneven_batches():
    """Otherwise networks see observations shifted or scaled by how rollouts were cut into batches."""
    r, state, seen = rng(), init_stats(OBS), []
    for i in range(15):
        shape = (*r.integers(1, 9, size=r.integers(1, 4)), OBS)
        obs = (r.normal(size=shape) * np.array([0.1, 1, 3, 10, 100]) + i * 0.1).astype(np.float32)
        seen.append(obs.reshape(-1, OBS))
        state = gorl.merge_stats(state, jnp.array(obs))
        everything = np.float64(np.concatenate(seen))
        assert state.count == len(everything)
        np.testing.assert_allclose(state.mean, everything.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.var, everything.var(0), rtol=1e-4, atol=1e-9)


def forgetting_merge(state, obs):
    """The public code's bug: the old squared deviations are not added, the count is the total."""
    size, count = obs[..., 0].size, state.count + obs[..., 0].size
    delta = obs.reshape(-1, obs.shape[-1]).mean(0) - state.mean
    m2 = jnp.square(obs - state.mean - delta).sum((0, 1, 2)) + delta**2 * state.count * size / count
    return gorl.RunningStats(count=count, mean=state.mean + delta * size / count, var=m2 / count)


@pytest.mark.parametrize(("merge", "passes"), [(gorl.merge_stats, True), (forgetting_merge, False)])
def test_statistics_after_200_million_observations(merge, passes):
    """Otherwise the standard deviation shrinks in a full run, and normalised observations grow with it."""
    base = rng().normal(size=(16, 30, 2048, 2)).astype(np.float32)
    base[..., 1] = base[..., 1] ** 3
    merge, state = jax.jit(merge), init_stats(2)
    sums = np.zeros((3, 2))
    mean_0, var_0 = np.float64(base).mean((0, 1, 2)), np.float64(base).var((0, 1, 2))
    batches = 204 if passes else 50
    for i in range(batches):
        scale, shift = 2.0 ** (i % 5 - 2), np.float32([0.03, 3.0]) * (i % 7)  # powers of 2: exact moments
        mean, var = mean_0 * scale + shift, var_0 * scale**2
        sums += base[..., 0].size * np.array([[1, 1], mean, var + mean**2])
        state = merge(state, base * np.float32(scale) + shift)
    assert not passes or state.count == sums[0, 0] > 2e8
    mean = sums[1] / sums[0]
    error = relative_error(state, mean, sums[2] / sums[0] - mean**2)
    assert error < 1e-5 if passes else error > 0.5


def test_normalize():
    """Otherwise a constant observation divides by zero, or an outlier saturates the networks."""
    state = gorl.RunningStats(jnp.float32(9), jnp.array([1.0, -2.0, 3.0]), jnp.array([4.0, 0.0, 0.25]))
    obs = jnp.array([[2.0, -2.0, 3.1], [1e9, -1.0, -1e9]])
    want = [[0.5, 0.0, 0.2], [10.0, 10.0, -10.0]]
    np.testing.assert_allclose(gorl.normalize(state, obs), want, rtol=1e-5)


# --- loss ---


def numpy_mlp(layers, x):
    for i, layer in enumerate(layers):
        x = x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
        x = x if i == len(layers) - 1 else x / (1 + np.exp(-x))
    return x


def numpy_distribution(encoder, obs):
    mean, raw = np.split(numpy_mlp(encoder, np.float64(obs)), 2, axis=-1)
    return mean, np.clip(np.logaddexp(0, raw + np.log(np.e - 1)), 1e-3, 10)


@pytest.fixture(scope="module")
def agent(make_args):
    return trained(gorl.init_agent(make_args(), OBS, ACT, KEY), KEY)


def loss_batch(agent, steps=6, rows=32):
    r, keys = rng(3), jax.random.split(KEY, 3)
    obs = jax.random.normal(keys[0], (rows, steps, OBS))
    latent = jax.random.normal(keys[1], (rows, steps, ACT))
    truncated = jnp.array(r.random((rows, steps)) < 0.1)
    reward = jnp.array(r.random((rows, steps)), jnp.float32)
    mean, std = numpy_distribution(agent.params["encoder"], obs)
    log_prob = stats.norm.logpdf(latent, mean + 0.1, std).sum(-1)  # of an older policy: ratios around 1
    drawn = {"latent": latent, "log_prob": jnp.array(log_prob, jnp.float32)}
    batch = gorl.Transitions(obs, None, drawn, reward, truncated)
    return batch, jax.random.normal(keys[2], (rows, OBS))


def constant_encoder(encoder, mean, std):
    """The encoder whose distribution is N(mean, std^2) at every observation."""
    raw = np.log(np.expm1(std)) - np.log(np.e - 1)
    last = {"kernel": jnp.zeros((32, 2 * len(mean))), "bias": jnp.array([*mean, *raw], jnp.float32)}
    return [*encoder[:-1], last]


@pytest.mark.parametrize(("mean", "std"), [((0, 1.5, -0.7), (1, 0.3, 2)), ((0, 0, 2), (1, 1, 0.1))])
def test_kl_and_entropy_are_the_integrals(make_args, agent, mean, std):
    """Otherwise beta and the entropy coefficient do not mean what they mean in the paper."""
    params = agent.params | {"encoder": constant_encoder(agent.params["encoder"], mean, std)}
    _, metrics = gorl.loss_fn(params, make_args(), *loss_batch(agent), None)

    def expectation(m, s, f):
        return integrate.quad(lambda x: stats.norm.pdf(x, m, s) * f(x), m - 12 * s, m + 12 * s, points=[m])[0]

    pairs = list(zip(mean, std, strict=True))
    log_density = [partial(stats.norm.logpdf, loc=m, scale=s) for m, s in pairs]
    entropy = -sum(expectation(*p, f) for p, f in zip(pairs, log_density, strict=True))
    cross = -sum(expectation(*p, stats.norm.logpdf) for p in pairs)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics["latent_kl"], cross - entropy, rtol=1e-4)


@pytest.mark.parametrize(("up", "down"), [(0.5, 0.5), (0.9, 0.9), (1, 1), (1.2, 1.2), (2, 2), (0.5, 2)])
def test_clipped_surrogate(make_args, up, down):
    """Otherwise PPO either ignores its clip range or stops learning inside it."""
    args, advantage = make_args(clip_eps=0.3), jnp.array([[1.0], [-1.0]])

    def policy_loss(log_ratio):
        return gorl.clipped_surrogate(args, log_ratio, advantage)["policy_loss"]

    loss, slope = jax.value_and_grad(policy_loss)(jnp.log(jnp.array([[up], [down]])))
    np.testing.assert_allclose(loss, -(min(up, 1.3) - max(down, 0.7)) / 2, rtol=1e-5, atol=1e-6)
    want = [[-up / 2 if up < 1.3 else 0], [down / 2 if down > 0.7 else 0]]
    np.testing.assert_allclose(slope, want, rtol=1e-5)


def test_latent_distribution(agent):
    """Otherwise the encoder is not App. E.3's, or its std leaves [1e-3, 10]."""
    obs, encoder = rng().normal(size=(20, OBS)) * 3, agent.params["encoder"]
    all_close(
        gorl.latent_distribution(encoder, jnp.array(obs, jnp.float32)),
        numpy_distribution(encoder, obs),
        rtol=1e-4,
        atol=1e-5,
    )
    for raw, std in [(-100.0, 1e-3), (100.0, 10.0)]:
        last = {"kernel": jnp.zeros((32, 2 * ACT)), "bias": jnp.full(2 * ACT, raw)}
        np.testing.assert_allclose(gorl.latent_distribution([*encoder[:-1], last], jnp.ones(OBS))[1], std)


@pytest.mark.parametrize("penalty", ["kl", "l2"])
def test_loss_and_its_terms(make_args, agent, penalty):
    """Otherwise a coefficient on the command line weighs something else, or a logged column is wrong."""
    args = make_args(latent_penalty=penalty, ent_coef=0.2, reward_scale=3.0, kl_coef=0.7)
    batch, last_obs = loss_batch(agent)
    loss, metrics = gorl.loss_fn(agent.params, args, batch, last_obs, None)

    obs = np.concatenate([batch.obs, last_obs[:, None]], axis=1)
    value = numpy_mlp(agent.params["critic"], np.float64(obs))[..., 0].T
    target, advantage = numpy_gae(3 * np.float64(batch.reward.T), batch.truncated.T, value, 0.995, 0.95)
    advantage = ((advantage - advantage.mean()) / advantage.std()).T
    mean, std = numpy_distribution(agent.params["encoder"], batch.obs)
    ratio = np.exp(stats.norm.logpdf(batch.drawn["latent"], mean, std).sum(-1) - batch.drawn["log_prob"])
    bounded = np.where(advantage > 0, np.minimum(ratio, 1.2), np.maximum(ratio, 0.8))
    kl = (mean**2 / 2 + std**2 / 2 - 0.5 - np.log(std)).sum(-1).mean()
    want = {
        "policy_loss": -(bounded * advantage).mean(),
        "value_loss": ((target - value[:-1]) ** 2).mean(),
        "explained_variance": 1 - (target - value[:-1]).var() / target.var(),
        "approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "clip_fraction": (np.abs(ratio - 1) > 0.2).mean(),
        "entropy": stats.norm(mean, std).entropy().sum(-1).mean(),
        "latent_kl": kl,
        "latent_l2": (mean**2).mean() + (np.log(std) ** 2).mean(),
        "latent_log_std": np.log(std).mean(),
        "latent_beyond_3": (np.abs(batch.drawn["latent"]) > 3).mean(),
    }
    assert 0.1 < want["clip_fraction"] < 0.9
    assert metrics.keys() == want.keys()
    all_close(metrics, want, rtol=1e-3, atol=1e-4)
    total = want["policy_loss"] + 0.25 * want["value_loss"] - 0.2 * want["entropy"]
    total += 0.7 * want[f"latent_{penalty}"]
    np.testing.assert_allclose(loss, total, rtol=1e-4)


def test_critic_learns_nothing_from_truncated_steps(make_args, agent):
    """Otherwise the time limit, which the critic cannot see, distorts its values."""
    batch, last_obs = loss_batch(agent)
    grad = jax.grad(gorl.loss_fn, has_aux=True)
    all_truncated = batch._replace(truncated=jnp.ones_like(batch.truncated))
    grads, metrics = grad(agent.params, make_args(), all_truncated, last_obs, None)
    assert metrics["value_loss"] == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["critic"]))
    grads, _ = grad(agent.params, make_args(), batch, last_obs, None)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["critic"]))


def test_targets_are_constants(make_args, agent):
    """Otherwise the critic changes its targets to fit its values, which is not TD learning."""
    batch, last_obs = loss_batch(agent)
    args = make_args(vf_coef=1.0, ent_coef=0.0)
    obs = jnp.concatenate([batch.obs, last_obs[:, None]], axis=1)
    value = numpy_mlp(agent.params["critic"], np.float64(obs))[..., 0].T
    target, _ = numpy_gae(10 * np.float64(batch.reward.T), batch.truncated.T, value, 0.995, 0.95)

    def fixed_targets(critic):
        return jnp.square(gorl.mlp(critic, batch.obs)[..., 0].T - target).mean()

    got = jax.grad(gorl.loss_fn, has_aux=True)(agent.params, args, batch, last_obs, None)[0]["critic"]
    want = jax.grad(fixed_targets)(agent.params["critic"])
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(want))
    all_close(got, want, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("max_norm", [1e-3, 0.0])
def test_gradient_norm_is_joint(make_args, agent, max_norm):
    """Otherwise --max-grad-norm bounds something else than encoder and critic together."""
    sizes = {"batch_size": 32, "num_minibatches": 1, "update_epochs": 1, "learning_rate": 1e-3}
    args = make_args(**sizes, kl_coef=0.01, max_grad_norm=max_norm)
    fresh = {name: optax.adam(1e-3).init(layers) for name, layers in agent.params.items()}
    batch, last_obs = loss_batch(agent)
    new, metrics = gorl.update(args, agent.replace(opt=fresh), batch, last_obs, KEY)

    grads, _ = jax.grad(gorl.loss_fn, has_aux=True)(agent.params, args, batch, last_obs, None)
    both = np.sqrt(sum(np.square(np.float64(g)).sum() for g in jax.tree.leaves(grads)))
    assert both > 0.1
    first_moments = jax.tree.leaves({name: opt[0].mu for name, opt in new.opt.items()})
    got = np.sqrt(sum(np.square(np.float64(m) / 0.1).sum() for m in first_moments))  # after one step: 0.1 * g
    np.testing.assert_allclose(got, min(max_norm or np.inf, both), rtol=1e-3)
    for name in grads:
        norm = np.sqrt(sum(np.square(np.float64(g)).sum() for g in jax.tree.leaves(grads[name])))
        np.testing.assert_allclose(metrics[f"grad_norm_{name}"], norm, rtol=1e-3)


# --- policy gradient through a frozen decoder ---


def test_latent_gradient_is_the_gradient_of_the_return(make_args):
    """Lemma 3.1: otherwise PPO on latents does not improve the actions that the decoder makes of them."""
    args = make_args(ent_coef=0.0, vf_coef=0.0, reward_scale=1.0)
    agent = gorl.init_agent(args, 2, 1, KEY)
    agent = agent.replace(decoder=trained(agent, KEY).decoder)
    encoder, critic = agent.params["encoder"], agent.params["critic"]
    raw = jnp.array([0.4, -0.3])  # mean, and the std's pre-activation, at every observation
    last = {"kernel": jnp.zeros((32, 2)), "bias": raw}
    critic = [*critic[:-1], jax.tree.map(jnp.zeros_like, critic[-1])]
    params = {"encoder": [*encoder[:-1], last], "critic": critic}
    obs = jnp.array([0.5, -1.0])

    def reward(decoder, latent):
        u = gorl.decode(args, decoder, jnp.broadcast_to(obs, (*latent.shape[:-1], 2)), latent)[..., 0]
        return jnp.sin(2 * u) + 0.3 * u

    nodes, weights = np.polynomial.hermite_e.hermegauss(80)

    def expected_reward(raw, decoder):
        """By reparameterisation: the derivative goes through the decoder."""
        std = jnp.log1p(jnp.exp(raw[1] + jnp.log(jnp.e - 1)))
        latent = raw[0] + std * jnp.array(nodes, jnp.float32)[:, None]
        return (jnp.array(weights / weights.sum(), jnp.float32) * reward(decoder, latent)).sum()

    mean, std = (np.float64(x) for x in gorl.latent_distribution(params["encoder"], obs))
    latent = jnp.array(stats.norm(mean, std).ppf((np.arange(20_000) + 0.5)[:, None] / 20_000), jnp.float32)
    rewards = reward(agent.decoder, latent)
    log_prob = jnp.array(stats.norm(mean, std).logpdf(latent)[:, 0], jnp.float32)
    rows = [
        jnp.broadcast_to(obs, (len(latent), 1, 2)),
        None,
        {"latent": latent[:, None], "log_prob": log_prob[:, None]},
        *(x[:, None] for x in (rewards, rewards > 9)),
    ]
    batch, last_obs = gorl.Transitions(*rows), jnp.zeros((len(latent), 2))
    grads, _ = jax.grad(gorl.loss_fn, has_aux=True)(params, args, batch, last_obs, None)
    got = -grads["encoder"][-1]["bias"] * rewards.std()  # loss_fn divides advantages by their deviation

    want = jax.grad(expected_reward)(raw, agent.decoder)
    assert (jnp.abs(want) > 0.05).all()
    np.testing.assert_allclose(got, want, rtol=0.01, atol=0.002)
    identity = gorl.init_agent(args, 2, 1, KEY).decoder
    assert jnp.abs(jax.grad(expected_reward)(raw, identity) - want).max() > 0.1


# --- stages ---


def test_reinitialised_encoder_is_the_prior(make_args, agent):
    """Otherwise a stage does not begin with the policy that the decoder was just trained to imitate."""
    fresh = gorl.init_agent(make_args(), OBS, ACT, jax.random.PRNGKey(5))
    new = gorl.start_stage(make_args(), agent, agent.decoder, fresh)
    obs = jnp.concatenate([jax.random.normal(KEY, (100, OBS)), jnp.array([[10.0], [-10.0]]) * jnp.ones(OBS)])
    mean, std = gorl.latent_distribution(new.params["encoder"], obs)
    assert (mean == 0).all() and (std == 1).all()
    assert all(layer["kernel"].any() for layer in new.params["encoder"][:-1])
    adam = optax.adam(1e-3).init(new.params["encoder"])
    all_equal(new.opt["encoder"], adam)


@pytest.mark.parametrize("reinit", [False, True])
def test_what_carries_on_between_stages(make_args, agent, reinit):
    """Otherwise a stage throws away its critic, or --reinit-critic does nothing."""
    fresh = gorl.init_agent(make_args(), OBS, ACT, jax.random.PRNGKey(5))
    new = gorl.start_stage(make_args(reinit_critic=reinit), agent, "the decoder", fresh)
    want = fresh if reinit else agent
    parts = [(a.params["critic"], a.opt["critic"], a.stats) for a in (new, want)]
    all_equal(*parts)
    assert new.decoder == "the decoder"


def split_total(total):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x.py", "--total-timesteps", str(total)])
        return gorl.parse_args().stage_timesteps


def test_stage_ends_at_the_papers_sizes():
    """Otherwise a full run is not the paper's 60M, 60M, 30M and 30M steps."""
    assert split_total(180_000_000) == (60_000_000, 60_000_000, 30_000_000, 30_000_000)
    args = replace(gorl.Args(), stage_timesteps=split_total(180_000_000))
    assert gorl.stage_ends(args) == [61, 122, 153, 183]


def test_stage_ends_round_cumulatively():
    """Otherwise each stage's rounding adds up, and runs of other budgets are too long or too short."""
    r = rng()
    for _ in range(10):
        total = int(r.integers(10, 10**6)) * int(r.choice([1, 10**3, 10**10]))
        stages = split_total(total)
        assert sum(stages) == total and max(stages[:2]) - 2 * min(stages[2:]) <= 3
        assert all(abs(6 * s - share * total) <= 6 for s, share in zip(stages, (2, 2, 1, 1), strict=True))
    for _ in range(200):
        stages = tuple(int(s) for s in r.integers(1, 10**9, size=r.integers(1, 8)))
        sizes = [int(n) for n in r.integers(1, 40, 3)]
        args = replace(
            gorl.Args(),
            stage_timesteps=stages,
            batch_size=sizes[0],
            num_minibatches=sizes[1],
            unroll_length=sizes[2],
        )
        size = sizes[0] * sizes[1] * sizes[2]
        ends = gorl.stage_ends(args)
        for end, budget in zip(ends, accumulate(stages), strict=True):
            assert isinstance(end, int) and abs(2 * (end * size - budget)) <= size


# --- minibatches ---


def labels(unrolls=3, steps=5, envs=4):
    """(U, T, N): 1000 * environment + its step number."""
    step = np.arange(unrolls * steps).reshape(unrolls, steps, 1)
    return 1000 * np.arange(envs) + step


def test_unrolls_are_consecutive_steps_of_one_environment():
    """Otherwise GAE adds up rewards of different environments or times."""
    x = labels()
    rows = np.asarray(gorl.as_unrolls(jnp.array(np.stack([x, -x], axis=-1))))
    assert rows.shape == (12, 5, 2)
    assert (np.diff(rows[..., 0], axis=1) == 1).all() and (rows[..., 1] == -rows[..., 0]).all()
    assert set(rows[:, 0, 0]) == {1000 * n + 5 * u for n in range(4) for u in range(3)}
    np.testing.assert_array_equal(gorl.as_unrolls(jnp.array(x)), rows[..., 0])


def test_every_unroll_is_used_once_an_epoch(make_args, monkeypatch):
    """Otherwise some experience counts twice and some never, or bootstraps from another unroll's end."""
    seen = []

    def loss_fn(params, args, batch, last_obs, key):
        jax.debug.callback(
            lambda *x: seen.append([np.array(a) for a in x]), batch.obs, last_obs, ordered=True
        )
        return jnp.sum(params["encoder"]), {}

    monkeypatch.setattr(gorl, "loss_fn", loss_fn)
    args = make_args(batch_size=4, num_minibatches=3, update_epochs=4)
    params = {"encoder": jnp.ones(2)}
    agent = gorl.Agent(params, {"encoder": optax.adam(1e-3).init(jnp.ones(2))}, None, None)
    rows = gorl.as_unrolls(jnp.array(labels()))
    last_obs = rows[:, -1] + 1
    jax.jit(gorl.update, static_argnums=0)(
        args,
        agent,
        gorl.Transitions(rows, rows, rows, rows, rows),
        last_obs,
        KEY,
    )
    jax.effects_barrier()
    assert len(seen) == 12 and all(b.shape == (4, 5) for b, _ in seen)
    assert all((np.diff(np.column_stack(x)) == 1).all() for x in seen)
    epochs = [np.concatenate([b[:, 0] for b, _ in seen[i : i + 3]]) for i in range(0, 12, 3)]
    assert all(sorted(e) == sorted(rows[:, 0].tolist()) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4


# --- ring ---


@pytest.mark.parametrize(
    ("capacity", "unrolls", "steps"), [(7, 3, 4), (12, 3, 4), (17, 3, 2), (10, 2, 2), (5, 1, 1)]
)
def test_ring_keeps_the_latest_steps(capacity, unrolls, steps):
    """Otherwise the decoder trains on old or never written pairs, or on observations with another's u."""
    envs = 3
    ring = {"obs": jnp.zeros((capacity, envs, 2)), "u": jnp.zeros((capacity, envs, 1))}
    ring["reward"] = jnp.zeros((capacity, envs))
    model, write = deque(maxlen=capacity), jax.jit(gorl.record)
    for i in range(7):
        x = labels(unrolls, steps, envs) + i * unrolls * steps + 1.0
        new = {"obs": np.stack([x, x + 0.5], axis=-1), "u": -x[..., None], "reward": 2 * x}
        model.extend(x.reshape(-1, envs))
        ring = write(ring, i, jax.tree.map(lambda a: jnp.array(a, jnp.float32), new))
        valid = ring["obs"][: len(model), :, 0]
        np.testing.assert_array_equal(np.sort(valid, axis=0), np.array(model))
        assert (ring["obs"][: len(model), :, 1] == valid + 0.5).all()
        assert (ring["u"][: len(model), :, 0] == -valid).all()
        assert (ring["reward"][: len(model)] == 2 * valid).all()
        assert not ring["reward"][len(model) :].any()


def test_networks_differ_between_seeds():
    """Otherwise seeds, and the networks of one seed, start as copies of each other."""
    agents = [gorl.init_agent(gorl.Args(), OBS, ACT, jax.random.PRNGKey(seed)) for seed in (0, 1)]
    for network in ("encoder", "critic"):
        a, b = (agent.params[network][0]["kernel"] for agent in agents)
        assert (a != b).mean() > 0.99
        limit = np.sqrt(3 / OBS)  # LeCun uniform
        assert 0.9 * limit < jnp.abs(a).max() <= limit
