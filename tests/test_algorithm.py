"""Each formula against an oracle: NumPy and SciPy in float64, closed forms, Brax."""

import sys
from collections import deque
from dataclasses import replace
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from brax.training.acme import running_statistics
from brax.training.agents.ppo.losses import compute_gae
from conftest import GORL, trained, trained_network
from oracles import numpy_gae, numpy_mlp, sizes, with_output
from scipy import integrate, stats
from toy import PointMass

import gorl_fm_ppo as gorl

OBS, ACT = 5, 3
KEY = jax.random.PRNGKey(0)
CLIP_EPS = 0.2


def rng(seed=0):
    return np.random.default_rng(seed)


def all_close(got, want, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


def all_equal(got, want):
    """Of trees that may have come from different calls: their leaves."""
    leaves = jax.tree.leaves(got), jax.tree.leaves(want)
    jax.tree.map(np.testing.assert_array_equal, *leaves)


# --- advantages ---


def gae_data(steps=12, envs=64):
    """Rewards, ends of both kinds (inside, first, last, in a row, none, all), values."""
    r = rng()
    terminated, truncated = (r.random((2, steps, envs)) < 0.1).astype(np.float32)
    for i, ends in enumerate((terminated, truncated)):
        ends[:, :2] = 0
        ends[:, 2 + i] = 1
        ends[-1, 10 * i + 10 : 10 * i + 14] = 1
        ends[0, 10 * i + 14 : 10 * i + 18] = 1
        ends[4:7, 10 * i + 18 : 10 * i + 20] = 1
    terminated *= 1 - truncated
    reward = r.normal(size=(steps, envs)).astype(np.float32)
    value = 5 * r.normal(size=(steps + 1, envs)).astype(np.float32)
    return reward, terminated, truncated, value


def gae(args, reward, terminated, truncated, value):
    """The scripts' own, time first, as the oracles have it."""
    batch = SimpleNamespace(reward=reward.T, terminated=terminated.T, truncated=truncated.T)
    return [x.T for x in gorl.gae(args, batch, value.T)]


@pytest.mark.parametrize(("gamma", "lam"), [(0.995, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_braxs(make_args, gamma, lam):
    """Otherwise advantages and critic targets are not those of the PPO that the paper builds on."""
    reward, terminated, truncated, value = gae_data()
    want = compute_gae(truncated, terminated, reward, value[:-1], value[-1], lam, gamma)
    got = gae(make_args(gamma=gamma, gae_lambda=lam), reward, terminated, truncated, value)
    all_close(tuple(got), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("gamma", "lam"), [(0.995, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_gae_is_its_definition(make_args, gamma, lam):
    """Otherwise the policy follows returns that are not the discounted rewards."""
    data = gae_data()
    got = gae(make_args(gamma=gamma, gae_lambda=lam), *data)
    all_close(tuple(got), numpy_gae(*data, gamma, lam), rtol=2e-5, atol=2e-5)


def test_gae_ignores_what_follows_an_end(make_args):
    """Otherwise an episode's value leaks in from the state that the environment was reset to."""
    reward, terminated, truncated, value = gae_data()
    compiled = jax.jit(partial(gae, make_args()))
    before = compiled(reward, terminated, truncated, value)
    for ends, own_step in ((terminated, 1), (truncated, 0)):
        for t, n in np.argwhere(ends):
            values = value.copy()
            values[t + 1 :, n] += 1e3
            rewards = reward.copy()
            rewards[t + own_step :, n] -= 1e3  # a truncated step's own reward counts no more
            after = compiled(rewards, terminated, truncated, values)
            for got, want in zip(after, before, strict=True):
                np.testing.assert_array_equal(got[: t + 1, n], want[: t + 1, n])
    target, advantage = before
    truncated = truncated > 0
    terminated = terminated > 0
    np.testing.assert_array_equal(target[truncated], value[:-1][truncated])
    assert not advantage[truncated].any()
    np.testing.assert_allclose(target[terminated], reward[terminated], atol=1e-5)
    want = reward[terminated] - value[:-1][terminated]
    np.testing.assert_allclose(advantage[terminated], want, atol=1e-5)


# --- running statistics ---


def no_stats(obs_dim):
    return running_statistics.init_state(jnp.zeros(obs_dim))


def test_statistics_of_uneven_batches():
    """Otherwise networks see observations shifted or scaled by how rollouts were cut."""
    r = rng()
    state = no_stats(OBS)
    seen = []
    for i in range(15):
        scale = np.array([0.1, 1, 3, 10, 100])
        obs = r.normal(size=(*r.integers(1, 9, size=2), OBS)) * scale + i * 0.1
        obs = obs.astype(np.float32)
        seen.append(obs.reshape(-1, OBS))
        state = running_statistics.update(state, jnp.array(obs))
        everything = np.float64(np.concatenate(seen))
        assert state.count.lo == len(everything)
        np.testing.assert_allclose(state.mean, everything.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.std, everything.std(0), rtol=1e-4, atol=1e-6)


def forgetting_merge(state, obs):
    """The public code's bug: the old squared deviations are not added, the count is the total."""
    forgetful = state.replace(summed_variance=jnp.zeros_like(state.mean))
    return running_statistics.update(forgetful, obs)


MERGES = [(running_statistics.update, True), (forgetting_merge, False)]


@pytest.mark.parametrize(("merge", "passes"), MERGES)
def test_statistics_after_200_million_observations(merge, passes):
    """Otherwise the std shrinks in a full run, and normalised observations grow with it."""
    base = rng().normal(size=(480, 2048, 2)).astype(np.float32)
    base[..., 1] = base[..., 1] ** 3
    merge = jax.jit(merge)
    state = no_stats(2)
    sums = np.zeros((3, 2))
    mean_0 = np.float64(base).mean((0, 1))
    var_0 = np.float64(base).var((0, 1))
    for i in range(204 if passes else 50):
        scale = 2.0 ** (i % 5 - 2)  # powers of 2: exact moments
        shift = np.float32([0.03, 3.0]) * (i % 7)
        mean = mean_0 * scale + shift
        sums += base[..., 0].size * np.array([[1, 1], mean, var_0 * scale**2 + mean**2])
        state = merge(state, base * np.float32(scale) + shift)
    mean = sums[1] / sums[0]
    std = np.sqrt(sums[2] / sums[0] - mean**2)
    mean_error = np.abs((state.mean - mean) / std).max()
    std_error = np.abs(state.std / std - 1).max()
    if passes:
        assert state.count.lo == sums[0, 0] > 2e8
        assert max(mean_error, std_error) < 1e-5
    else:
        assert max(mean_error, std_error) > 0.5


def test_normalize():
    """Otherwise a constant observation divides by zero, or an outlier saturates the networks."""
    seen = jnp.array([[[3.0, -2.0, 3.5], [-1.0, -2.0, 2.5]]])
    stats = running_statistics.update(no_stats(3), seen)
    obs = jnp.array([[2.0, -2.0, 3.1], [1e9, -1.0, -1e9]])
    got = gorl.normalize(obs, stats)
    np.testing.assert_allclose(got, [[0.5, 0.0, 0.2], [10.0, 10.0, -10.0]], rtol=1e-5)


# --- loss ---


def numpy_encoder(params, obs):
    mean, raw = np.split(numpy_mlp(params["params"]["MLP_0"], np.float64(obs)), 2, axis=-1)
    return mean, np.clip(np.logaddexp(0, raw + np.log(np.e - 1)), 1e-3, 10)


def params_of(agent):
    return {"encoder": agent.encoder.params, "critic": agent.critic.params}


@pytest.fixture(scope="module")
def agent(make_args):
    return trained(gorl.init_agent(make_args(), sizes(OBS, ACT), KEY), KEY)


@pytest.fixture(scope="module")
def batch(agent, rows=32, steps=6):
    r = rng(3)
    keys = jax.random.split(KEY)
    obs = jax.random.normal(keys[0], (rows, steps + 1, OBS))
    latent = jax.random.normal(keys[1], (rows, steps, ACT))
    mean, std = numpy_encoder(agent.encoder.params, obs[:, :-1])
    log_prob = stats.norm.logpdf(latent, mean + 0.1, std).sum(-1)  # of an older policy
    reward = 3 * r.random((rows, steps))
    truncated = r.random((rows, steps)) < 0.1
    terminated = (r.random((rows, steps)) < 0.1) & ~truncated
    log_prob, reward = jnp.float32(log_prob), jnp.float32(reward)
    ends = jnp.array(terminated), jnp.array(truncated), jnp.zeros_like(truncated)
    return gorl.Steps(obs, latent, latent, log_prob, reward, *ends)


def numpy_targets(args, agent, batch):
    """Targets, advantages and values, (T, B)."""
    value = numpy_mlp(agent.critic.params["params"], np.float64(batch.obs))[..., 0].T
    data = batch.reward.T, batch.terminated.T, batch.truncated.T
    return *numpy_gae(*data, value, args.gamma, args.gae_lambda), value


@pytest.mark.parametrize(("mean", "std"), [((0, 1.5, -0.7), (1, 0.3, 2)), ((0, 0, 2), (1, 1, 0.1))])
def test_kl_and_entropy_are_the_integrals(make_args, agent, batch, mean, std):
    """Otherwise beta and the entropy coefficient do not mean what they mean in the paper."""
    raw = np.log(np.expm1(std)) - np.log(np.e - 1)
    encoder = with_output(agent.encoder.params, [*mean, *raw])
    params = params_of(agent) | {"encoder": encoder}
    _, metrics = gorl.ppo_loss(params, make_args(), agent, batch, CLIP_EPS)

    def expectation(m, s, f):
        def integrand(x):
            return stats.norm.pdf(x, m, s) * f(x)

        return integrate.quad(integrand, m - 12 * s, m + 12 * s, points=[m])[0]

    entropy = 0
    cross_entropy = 0
    for m, s in zip(mean, std, strict=True):
        entropy -= expectation(m, s, partial(stats.norm.logpdf, loc=m, scale=s))
        cross_entropy -= expectation(m, s, stats.norm.logpdf)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(metrics["latent_kl"], cross_entropy - entropy, rtol=1e-4)


@pytest.mark.parametrize(("up", "down"), [(0.5, 0.5), (0.9, 0.9), (1, 1), (1.2, 1.2), (0.5, 2)])
def test_clipped_surrogate(make_args, agent, up, down):
    """Otherwise PPO either ignores its clip range or stops learning inside it."""
    args = make_args()
    critic = jax.tree.map(jnp.zeros_like, agent.critic.params)
    params = params_of(agent) | {"critic": critic}
    obs, latent = jnp.ones((2, 2, OBS)), jnp.ones((2, 1, ACT))
    reward, no = jnp.array([[1.0], [-1.0]]), jnp.zeros((2, 1), bool)  # advantages of 1 and -1
    mean, std = numpy_encoder(agent.encoder.params, obs[:, :-1])
    new_log_prob = stats.norm.logpdf(latent, mean, std).sum(-1)

    def policy_loss(log_prob):
        batch = gorl.Steps(obs, latent, latent, log_prob, reward, no, no, no)
        return gorl.ppo_loss(params, args, agent, batch, 0.3)[1]["policy_loss"]

    log_prob = jnp.float32(new_log_prob - np.log([[up], [down]]))
    loss, slope = jax.value_and_grad(policy_loss)(log_prob)
    np.testing.assert_allclose(loss, -(min(up, 1.3) - max(down, 0.7)) / 2, rtol=1e-4, atol=1e-5)
    want = [[up / 2 if up < 1.3 else 0], [-down / 2 if down > 0.7 else 0]]
    np.testing.assert_allclose(slope, want, rtol=1e-4)


def test_encoder(agent):
    """Otherwise the encoder is not App. E.3's, or its std leaves [1e-3, 10]."""
    obs = 3 * rng().normal(size=(20, OBS))
    got = agent.encoder.apply_fn(agent.encoder.params, jnp.float32(obs))
    all_close(got, numpy_encoder(agent.encoder.params, obs), rtol=1e-4, atol=1e-5)
    widths = [layer["bias"].size for layer in agent.encoder.params["params"]["MLP_0"].values()]
    assert widths == [32, 32, 32, 32, 2 * ACT]
    for raw, std in [(-100.0, 1e-3), (100.0, 10.0)]:
        params = with_output(agent.encoder.params, [raw] * 2 * ACT)
        np.testing.assert_allclose(agent.encoder.apply_fn(params, jnp.ones(OBS))[1], std)


def test_loss_and_its_terms(make_args, agent, batch):
    """Otherwise a coefficient on the command line weighs something else, or a column is wrong."""
    args = make_args(ent_coef=0.2, kl_coef=0.7)
    loss, metrics = gorl.ppo_loss(params_of(agent), args, agent, batch, CLIP_EPS)

    target, advantage, value = numpy_targets(args, agent, batch)
    error = target - value[:-1]
    advantage = ((advantage - advantage.mean()) / advantage.std()).T
    mean, std = numpy_encoder(agent.encoder.params, batch.obs[:, :-1])
    ratio = np.exp(stats.norm.logpdf(batch.latent, mean, std).sum(-1) - batch.log_prob)
    bounded = np.where(advantage > 0, np.minimum(ratio, 1.2), np.maximum(ratio, 0.8))
    want = {
        "policy_loss": -(bounded * advantage).mean(),
        "value_loss": (error**2).mean(),
        "approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "clip_fraction": (np.abs(ratio - 1) > 0.2).mean(),
        "entropy": stats.norm(mean, std).entropy().sum(-1).mean(),
        "latent_kl": (mean**2 / 2 + std**2 / 2 - 0.5 - np.log(std)).sum(-1).mean(),
        "latent_log_std": np.log(std).mean(),
    }
    total = want["policy_loss"] + 0.25 * want["value_loss"]
    want["loss"] = total - 0.2 * want["entropy"] + 0.7 * want["latent_kl"]
    assert 0.1 < want["clip_fraction"] < 0.9
    assert metrics.keys() == want.keys()
    all_close(metrics, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-4)


def gradients(args, agent, batch):
    loss = jax.grad(gorl.ppo_loss, has_aux=True)
    return loss(params_of(agent), args, agent, batch, CLIP_EPS)


def test_critic_learns_nothing_from_truncated_steps(make_args, agent, batch):
    """Otherwise the time limit, which the critic cannot see, distorts its values."""
    everywhere = jnp.ones_like(batch.truncated)
    grads, metrics = gradients(make_args(), agent, batch._replace(truncated=everywhere))
    assert metrics["value_loss"] == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["critic"]))
    grads, _ = gradients(make_args(), agent, batch)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads["critic"]))


def test_targets_are_constants(make_args, agent, batch):
    """Otherwise the critic changes its targets to fit its values, which is not TD learning."""
    args = make_args(vf_coef=1.0, ent_coef=0.0)
    target, _, _ = numpy_targets(args, agent, batch)

    def fixed_targets(critic):
        value = agent.critic.apply_fn(critic, batch.obs[:, :-1])[..., 0].T
        return jnp.square(value - target).mean()

    grads, _ = gradients(args, agent, batch)
    want = jax.grad(fixed_targets)(agent.critic.params)
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(want))
    all_close(grads["critic"], want, rtol=1e-3, atol=1e-5 * scale)


def test_an_update_is_adams_step(make_args, agent, batch):
    """Otherwise --learning-rate is not Adam's, or the logged norm is not the gradient's."""
    changes = {"batch_size": 32, "num_minibatches": 1, "update_epochs": 1}
    args = make_args(**changes, learning_rate=0.01, stage_timesteps=())
    fresh = gorl.init_agent(args, sizes(OBS, ACT), KEY)
    agent = agent._replace(
        encoder=fresh.encoder.replace(params=agent.encoder.params),
        critic=fresh.critic.replace(params=agent.critic.params),
    )
    new, metrics = gorl.update(args, agent, batch, CLIP_EPS, KEY)
    grads, _ = gradients(args, agent, batch)
    for name, grad in grads.items():
        norm = np.sqrt(sum(np.square(np.float64(g)).sum() for g in jax.tree.leaves(grad)))
        np.testing.assert_allclose(metrics[f"grad_norm_{name}"], norm, rtol=1e-3)
        before, after = getattr(agent, name), getattr(new, name)
        adam = optax.adam(0.01)
        step, _ = adam.update(grad, adam.init(before.params))
        want = optax.apply_updates(before.params, step)
        moved = jax.tree.map(
            lambda a, b, g: (a - b) * (jnp.abs(g) > 1e-4), after.params, want, grad
        )
        assert max(jnp.abs(x).max() for x in jax.tree.leaves(moved)) < 1e-4
        assert after.step == 1


# --- policy gradient through a frozen decoder ---


def test_latent_gradient_is_the_gradient_of_the_return(make_args):
    """Lemma 3.1: otherwise PPO on latents does not improve the actions that are made of them."""
    args = make_args(ent_coef=0.0, vf_coef=0.0, kl_coef=0.0)
    identity = gorl.init_agent(args, sizes(2, 1), KEY)
    agent = identity._replace(decoder=trained_network(identity.decoder, KEY, 0.3))
    raw = jnp.array([0.4, -0.3])  # mean, and the std's pre-activation, at every observation
    encoder = with_output(agent.encoder.params, raw)
    params = {"encoder": encoder, "critic": jax.tree.map(jnp.zeros_like, agent.critic.params)}
    obs = jnp.array([0.5, -1.0])

    def reward(agent, latent):
        many = jnp.broadcast_to(obs, (*latent.shape[:-1], 2))
        u = gorl.decode(args, agent, many, latent)[..., 0]
        return jnp.sin(2 * u) + 0.3 * u

    nodes, weights = np.polynomial.hermite_e.hermegauss(80)

    def expected_reward(raw, agent):
        """By reparameterisation: the derivative goes through the decoder."""
        std = jnp.log1p(jnp.exp(raw[1] + jnp.log(jnp.e - 1)))
        latent = raw[0] + std * jnp.array(nodes, jnp.float32)[:, None]
        return (jnp.array(weights / weights.sum(), jnp.float32) * reward(agent, latent)).sum()

    size = 20_000
    mean, std = (np.float64(x) for x in agent.encoder.apply_fn(encoder, obs))
    quantiles = (np.arange(size) + 0.5)[:, None] / size
    latent = jnp.float32(stats.norm(mean, std).ppf(quantiles))
    rewards = reward(agent, latent)
    log_prob = jnp.float32(stats.norm(mean, std).logpdf(latent))
    latent = latent[:, None]
    no = jnp.zeros((size, 1), bool)
    many = jnp.broadcast_to(obs, (size, 2, 2))
    batch = gorl.Steps(many, latent, latent, log_prob, rewards[:, None], no, no, no)
    grads, _ = jax.grad(gorl.ppo_loss, has_aux=True)(params, args, agent, batch, CLIP_EPS)
    got = -grads["encoder"]["params"]["MLP_0"]["last"]["bias"]
    got = got * rewards.std()  # the loss divides advantages by their deviation

    want = jax.grad(expected_reward)(raw, agent)
    assert (jnp.abs(want) > 0.05).all()
    np.testing.assert_allclose(got, want, rtol=0.01, atol=0.002)
    assert jnp.abs(jax.grad(expected_reward)(raw, identity) - want).max() > 0.1


# --- stages ---


@pytest.fixture(scope="module")
def restarted(make_args, tmp_path_factory):
    """The states before and after a refinement in a whole training, and an untrained one."""
    args = make_args(seed=3)
    env = PointMass()
    saved = {}

    def save_checkpoint(args, run_dir, state, done, stage, start):
        saved[done, stage] = jax.tree.map(lambda x: np.array(x[0]), state)
        return start

    folder = tmp_path_factory.mktemp("restarted")
    (folder / "checkpoints").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gorl, "save_checkpoint", save_checkpoint)
        gorl.train(args, env, folder)
    key = jax.random.fold_in(jax.random.PRNGKey(3), 0)
    end = args.stage_ends[1]
    return saved[end, 1], saved[end, 2], jax.jit(partial(gorl.init_state, args, env))(key, 2)


def test_restarted_encoder_is_the_prior(restarted):
    """Otherwise a stage does not begin with the policy that the decoder has learnt to imitate."""
    old, new, fresh = restarted
    far = jnp.array([[10.0], [-10.0]]) * jnp.ones(3)
    obs = jnp.concatenate([jax.random.normal(KEY, (100, 3)), far])
    encoder = new.agent.encoder
    mean, std = encoder.apply_fn(encoder.params, obs)
    assert (mean == 0).all()
    assert (std == 1).all()
    assert (encoder.apply_fn(old.agent.encoder.params, obs)[0] != 0).all()
    layers = encoder.params["params"]["MLP_0"]
    assert all(layer["kernel"].any() for name, layer in layers.items() if name != "last")
    all_equal(encoder.opt_state, optax.adam(1e-3).init(encoder.params))
    all_close(jax.tree.leaves(encoder), jax.tree.leaves(fresh.agent.encoder), rtol=1e-6)


def test_what_carries_on_between_stages(restarted):
    """Otherwise a stage throws away its critic, or begins with the episodes of the one before."""
    old, new, fresh = restarted
    all_equal(new.agent.critic, old.agent.critic)
    all_equal(new.agent.stats, old.agent.stats)
    all_equal(new.agent.decoder_stats, old.agent.stats)  # those it was trained with
    assert old.agent.critic.step == 2 * old.agent.encoder.step > 0
    began, ended = (jax.tree.leaves(x.agent.decoder.params) for x in (old, new))
    assert all((a != b).any() for a, b in zip(began, ended, strict=True))
    assert max(np.abs(a - b).max() for a, b in zip(began, ended, strict=True)) < 0.01  # refined
    assert new.agent.decoder.step == 2 * (40 // 16 - 1)  # Adam's state is new: two epochs
    all_close((new.envs, new.recent), (fresh.envs, fresh.recent), rtol=1e-6)
    all_equal(new.key, fresh.key)
    assert (fresh.envs.state.obs != old.envs.state.obs).all()
    assert (fresh.key != old.key).any()


TINY = "--num-envs 1 --batch-size 1 --num-minibatches 1 --unroll-length 1 --decoder-batch-size 1"


def split_total(total, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x.py", "--total-timesteps", str(total), *more])
        return gorl.parse_args().stage_timesteps


def test_stages_of_the_papers_sizes(script):
    """Otherwise a full run is not the paper's 60M, 60M, 30M and 30M steps."""
    want = [61, 122, 153, 183]
    if script not in GORL:
        assert script.Args().policy_iterations == want
        return
    stages = split_total(180_000_000)
    assert stages == (60_000_000, 60_000_000, 30_000_000, 30_000_000)
    assert replace(script.Args(), stage_timesteps=stages).stage_ends == want


def test_stage_ends_round_cumulatively():
    """Otherwise each stage's rounding adds up, and runs of other budgets are too long or short."""
    r = rng()
    for _ in range(5):
        total = int(r.integers(10, 10**5)) * int(r.choice([1, 10**2, 10**4]))
        stages = split_total(total, *TINY.split())
        assert sum(stages) == total
        for steps, share in zip(stages, (2, 2, 1, 1), strict=True):
            assert abs(6 * steps - share * total) <= 6
    for _ in range(200):
        stages = tuple(int(s) for s in r.integers(1, 10**9, size=r.integers(1, 8)))
        names = ("batch_size", "num_minibatches", "unroll_length")
        changes = dict(zip(names, r.integers(1, 40, 3).tolist(), strict=True))
        args = replace(gorl.Args(), stage_timesteps=stages, **changes)
        for end, budget in zip(args.stage_ends, accumulate(stages), strict=True):
            assert isinstance(end, int)
            assert abs(2 * (end * args.steps_per_iteration - budget)) <= args.steps_per_iteration


# --- unrolls, minibatches, recent pairs ---


def labelled(steps=15, envs=4):
    """Steps (steps, N, ...) in which every number is 1000 * environment + time."""
    x = jnp.float32(1000 * np.arange(envs) + np.arange(steps + 1)[:, None])
    after = SimpleNamespace(state=SimpleNamespace(obs=x[-1:].T))
    x = x[:-1]
    return gorl.Steps(x[..., None], x[..., None], x[..., None], x, x, x, x, x), after


def cut(args):
    """The labels as unrolls; statistics divide by 1000, since normalised values end at 10."""
    stats = no_stats(1).replace(std=jnp.full(1, 1e3))
    steps, after = labelled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "scan", lambda *_: (after, steps))
        _, whole, unrolls = gorl.rollout(args, None, SimpleNamespace(stats=stats), None, KEY)
    assert whole is steps
    return unrolls._replace(obs=jnp.round(1000 * unrolls.obs))


def test_unrolls_are_consecutive_steps_of_one_environment(make_args):
    """Otherwise GAE adds up rewards of different environments or times."""
    unrolls = cut(make_args(reward_scale=10.0))
    assert unrolls.obs.shape == (12, 6, 1)
    assert (jnp.diff(unrolls.obs, axis=1) == 1).all()
    starts = set(np.ravel(unrolls.obs[:, 0]).tolist())
    assert starts == {1000 * n + t for n in range(4) for t in (0, 5, 10)}
    for x in (unrolls.u, unrolls.latent):
        np.testing.assert_array_equal(x, unrolls.obs[:, :-1])
    for x in (unrolls.log_prob, unrolls.reward / 10, *unrolls[5:]):
        np.testing.assert_array_equal(x, unrolls.obs[:, :-1, 0])


def test_every_unroll_is_used_once_an_epoch(make_args, agent, monkeypatch):
    """Otherwise some experience counts twice and some never."""
    seen = []

    def ppo_loss(params, args, agent, batch, clip_eps):
        jax.debug.callback(
            lambda *x: seen.append(x), batch.obs[..., 0], batch.log_prob, ordered=True
        )
        return sum(leaf.sum() for leaf in jax.tree.leaves(params)), {}

    monkeypatch.setattr(gorl, "ppo_loss", ppo_loss)
    args = make_args(batch_size=4, num_minibatches=3, update_epochs=4)
    unrolls = cut(args)
    jax.block_until_ready(jax.jit(partial(gorl.update, args))(agent, unrolls, CLIP_EPS, KEY))
    jax.effects_barrier()
    assert len(seen) == 12
    for obs, log_prob in seen:
        assert obs.shape == (4, 6)
        np.testing.assert_array_equal(obs[:, :-1], log_prob)
    starts = np.array([obs[:, 0] for obs, _ in seen]).reshape(4, 12)
    for epoch in starts:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(unrolls.obs[:, 0, 0]))
    assert len({tuple(epoch) for epoch in starts.tolist()}) == 4


@pytest.mark.parametrize("capacity", [7, 60, 100, 200])
def test_recent_pairs(make_args, point_mass, monkeypatch, capacity):
    """Otherwise the decoder trains on old pairs, or on observations with another's u."""
    args = make_args(decoder_buffer_size=capacity, decoder_batch_size=2, stage_timesteps=())
    state = gorl.init_state(args, point_mass, KEY, 0)
    want = deque(np.zeros(capacity), maxlen=capacity)
    monkeypatch.setattr(gorl, "update", lambda args, agent, *rest: (agent, {}))
    monkeypatch.setattr(gorl, "gae", lambda args, unrolls, value: (None, 3 * unrolls.reward))
    for i in range(4):
        x = jnp.arange(60.0).reshape(15, 4) + 60 * i + 1
        vectors = x[..., None] * jnp.ones(3)
        steps = gorl.Steps(vectors, -vectors[..., :2], vectors, x, 2 * x, x, x, x)
        cut = np.stack([x[t : t + 5, n] for t in range(0, 15, 5) for n in range(4)])  # unrolls
        unrolls = steps._replace(obs=jnp.zeros((12, 6, 3)), reward=jnp.array(cut))
        monkeypatch.setattr(gorl, "rollout", lambda *x, out=(state.envs, steps, unrolls): out)
        state, _ = gorl.iteration(args, point_mass, state, CLIP_EPS)
        want.extend(np.ravel(x))
        np.testing.assert_array_equal(state.recent.obs[:, 2], want)
        np.testing.assert_array_equal(state.recent.u[:, 1], -np.array(want))
        np.testing.assert_array_equal(state.recent.reward, 2 * np.array(want))
        np.testing.assert_array_equal(state.recent.advantage, 3 * np.array(want))


def test_networks_differ_between_seeds():
    """Otherwise seeds, and the networks of one seed, start as copies of each other."""
    keys = jax.random.PRNGKey(0), jax.random.PRNGKey(1)
    a, b = (gorl.init_agent(gorl.Args(), sizes(OBS, ACT), key) for key in keys)
    first_layers = []
    for agent in (a, b):
        first_layers.append(agent.encoder.params["params"]["MLP_0"]["Dense_0"]["kernel"])
        first_layers.append(agent.critic.params["params"]["Dense_0"]["kernel"])
    limit = np.sqrt(3 / OBS)  # LeCun uniform
    for kernel in first_layers:
        assert 0.9 * limit < jnp.abs(kernel).max() <= limit
    assert len({float(kernel[0, 0]) for kernel in first_layers}) == 4
    assert (first_layers[0] != first_layers[2]).mean() > 0.99
