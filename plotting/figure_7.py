"""Figure 7: what the policies' actions look like at a fixed state, as training goes on.

    python -m plotting.figure_7 --runs results runs --out figures

The paper shows densities and leaves the number of peaks to the eye. Here two numbers go with each, over all
dimensions of u: the *gain*, how much likelier a mixture of two Gaussians makes held-out samples than one does
(nats a sample; about 0 if one is enough), and the *dip* between the mixture's two peaks (1 minus
the lowest density on the ridge between them over the lower peak's; 0 if there is one peak).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import gaussian_kde, multivariate_normal
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from plotting import policies, runs, style
from plotting.paper import ACTIONS_TASK, METHODS

# Times Scott's rule. App. E.7's "bandwidth factor of 0.8" could also be 0.8 standard deviations of the data,
# but that would smear two peaks into one, and the paper shows two.
BANDWIDTH = 0.8
THIRDS = (1 / 3, 2 / 3, 1.0)  # 60M (before the first refinement), 120M and 180M steps


def bimodality(samples: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Gain (nats a sample) and dip of samples (n, d): fitted on one half of them, scored on the other."""
    half = len(samples) // 2
    shuffled = np.random.default_rng(seed).permutation(samples)
    shuffled = (shuffled - shuffled.mean(0)) / np.maximum(shuffled.std(0), 1e-12)  # changes neither number
    train, test = shuffled[:half], shuffled[half:]
    with threadpool_limits(1):  # so small a fit takes fifty times as long on threads that wait for each other
        one, two = (GaussianMixture(n, n_init=2 * n - 1, random_state=seed).fit(train) for n in (1, 2))
        gain = two.score(test) - one.score(test)
    return float(gain), dip(two.weights_, two.means_, two.covariances_)


def dip(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> float:
    """The dip between the peaks of a mixture of two Gaussians (2,), (2, d), (2, d, d); 0 if it has one peak.

    All stationary points lie on the ridge x(a) (Ray and Lindsay 2005, "The topography of multivariate normal
    mixtures", Eq. 4), so it is enough to look there.
    """
    precisions = np.linalg.inv(covariances)
    share = np.linspace(0, 1, 2001)[:, None, None]
    weighted = (1 - share) * precisions[0] + share * precisions[1]
    towards = (1 - share[..., 0]) * (precisions[0] @ means[0]) + share[..., 0] * (precisions[1] @ means[1])
    ridge = np.linalg.solve(weighted, towards[..., None])[..., 0]
    parts = zip(weights, means, covariances, strict=True)
    density = sum(w * multivariate_normal(mean, cov).pdf(ridge) for w, mean, cov in parts)
    # Going up, then down, then up again: the lower of the best before and the best after each point.
    lower_peak = np.minimum(np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1])
    return float(np.max(1 - density / lower_peak))


def common_projection(groups: list[np.ndarray]) -> np.ndarray:
    """The first principal component (d,) of groups of samples (n, d), each about its mean, equally weighted.

    About their own means, so that the axis shows how policies spread and not how they differ; its largest
    entry is positive.
    """
    covariance = np.mean([np.cov(samples.T).reshape(samples.shape[1], -1) for samples in groups], axis=0)
    axis = np.linalg.eigh(covariance)[1][:, -1]
    return axis * np.sign(axis[np.argmax(np.abs(axis))])


def kernel_density(samples: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Density (m,) at x (m,) of samples (n,): Gaussian kernels, BANDWIDTH."""
    return gaussian_kde(samples, bw_method=lambda kde: BANDWIDTH * kde.scotts_factor())(x)


def fixed_observations(env: Any, seed: int, count: int) -> np.ndarray:
    """Initial observations (count, obs_dim) from PRNGKey(seed): no method's own, and all have seen such."""
    import jax

    keys = jax.random.split(jax.random.PRNGKey(seed), count)
    return np.asarray(jax.jit(jax.vmap(env.reset))(keys).obs)


def wanted_steps(group: runs.Group, run: Path) -> list[int | None]:
    """The saved policies' steps at a third, two thirds and the end of training; None where there is none."""
    saved, args = policies.saved_steps(run), runs.read_args(run)
    size = args["batch_size"] * args["num_minibatches"] * args["unroll_length"]
    steps = [int((2 * third * group.total + size) // (2 * size) * size) for third in THIRDS]
    return [step if step in saved else None for step in steps]


def draw(
    options: runs.Options,
    env_id: str = ACTIONS_TASK,
    samples: int = 10_000,
    state_seed: int = 0,
    num_states: int = 16,
) -> list[Path]:
    """Draws Figure 7: densities of u (not of tanh(u), which makes two peaks of one) along one direction.

    Args:
        env_id: The task.
        samples: Actions of each policy at each state.
        state_seed: The state is the first that the environment's reset gives for this seed.
        num_states: Gain and dip are also taken at this many of its initial states; the first one is drawn.

    State, direction and all numbers are written to figure_7.json. A line a seed.
    """
    if samples < 100 or num_states < 1:
        runs.wrong("--samples, --num-states", f"{samples}, {num_states}", "at least 100 samples, 1 state")
    groups, preset = runs.select(options)
    mine = {method: group for (method, task), group in groups.items() if task == env_id}
    todo = [
        (method, seed, column, step, curve.run)
        for method, group in mine.items()
        for seed, curve in sorted(group.curves.items())
        for column, step in enumerate(wanted_steps(group, curve.run))
        if step is not None
    ]
    if not todo:
        raise runs.CannotDraw(
            f"no saved policy of a finished run on {env_id} (checkpoints/policy_<step>.npz)"
        )
    import jax

    drawn: dict[tuple[str, int, int], np.ndarray] = {}
    observations = None
    for method, seed, column, step, run in todo:
        try:
            script, args, policy, *_ = policies.open_policy(run, step, seed)
        except ValueError as error:
            print(f"skipped {run}, step {step}, seed {seed}: {error}")
            continue
        if observations is None:
            observations = fixed_observations(script.make_env(args), state_seed, num_states)
        keys = jax.random.split(jax.random.PRNGKey(seed), num_states)
        repeated = [np.broadcast_to(obs, (samples, len(obs))) for obs in observations]
        drawn[method, seed, column] = np.stack(
            [policy(obs, key) for obs, key in zip(repeated, keys, strict=True)]
        )
    if not drawn:
        raise runs.CannotDraw(f"no policy on {env_id} could be read")
    axis = common_projection([u[0] for u in drawn.values()])
    numbers = {key: np.array([bimodality(u) for u in us]) for key, us in drawn.items()}

    methods = [m for m in [*METHODS, *mine] if any(key[0] == m for key in drawn)]
    methods = list(dict.fromkeys(methods))
    figure, panels = style.grid(len(methods), len(THIRDS))
    for row, method in zip(panels, methods, strict=True):
        span = np.concatenate([u[0] @ axis for key, u in drawn.items() if key[0] == method])
        x = np.linspace(*np.quantile(span, [0.001, 0.999]), 400)
        pad = 0.15 * (x[-1] - x[0])
        x = np.linspace(x[0] - pad, x[-1] + pad, 400)
        for column, panel in enumerate(row):
            keys = [key for key in drawn if key[0] == method and key[2] == column]
            for key in keys:
                density = kernel_density(drawn[key][0] @ axis, x)
                panel.plot(x, density, color=style.line(method)["color"], linewidth=0.9, alpha=0.9)
                panel.fill_between(x, density, color=style.line(method)["color"], alpha=0.12, linewidth=0)
            text = "no policy saved"
            if keys:
                gain, dips = np.mean([numbers[key][0] for key in keys], axis=0)
                text = f"gain {gain:.3f}\ndip {dips:.2f}"
            panel.annotate(text, (0.98, 0.95), xycoords="axes fraction", ha="right", va="top", fontsize=6)
            panel.set(yticks=[], xlim=(x[0], x[-1]), ylim=(0, None))
            panel.grid(visible=False)
            if row is panels[0]:
                panel.set_title(f"{THIRDS[column] * mine[method].total / 1e6:.3g}M steps")
        row[0].set_ylabel(style.label(method))
    for panel in panels[-1]:
        panel.set_xlabel("u along the first principal component")
    counts, total = (
        {len(group.curves) for group in mine.values()},
        min(group.total for group in mine.values()),
    )
    kind = f"{env_id}, density of {samples:,} u at one state, a line a seed: "
    text = kind + style.note(counts, total, preset).replace("mean and std over ", "")
    style.finish(figure, [], text)
    record = {
        "env_id": env_id,
        "state_seed": state_seed,
        "observation": observations[0].tolist(),
        "projection": axis.tolist(),
        "samples": samples,
        "bandwidth": BANDWIDTH,
        "policies": [
            {
                "method": method,
                "seed": seed,
                "step": wanted_steps(mine[method], mine[method].curves[seed].run)[column],
                "run": str(mine[method].curves[seed].run),
                "u_mean": us[0].mean(0).tolist(),
                "u_std": us[0].std(0).tolist(),
                "gain": numbers[method, seed, column][0, 0],
                "dip": numbers[method, seed, column][0, 1],
                f"gain_mean_{num_states}_states": numbers[method, seed, column][:, 0].mean(),
                f"dip_mean_{num_states}_states": numbers[method, seed, column][:, 1].mean(),
            }
            for (method, seed, column), us in drawn.items()
        ],
    }
    for line in record["policies"]:
        values = ", ".join(f"{k} {v:.3f}" for k, v in line.items() if k.startswith(("gain", "dip")))
        print(f"{style.label(line['method'])}, seed {line['seed']}, step {line['step']:,}: {values}")
    files = style.save(figure, options.out, "figure_7")
    (file := options.out / "figure_7.json").write_text(json.dumps(record, indent=1))
    return [*files, file]


if __name__ == "__main__":
    sys.exit(runs.command(draw))
