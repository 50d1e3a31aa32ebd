"""Figure 7: what the policies' actions look like at a fixed state, as training goes on.

    python -m plotting.figure_7 --runs runs --out figures

The paper shows densities and leaves the number of peaks to the eye. Here two numbers go with each:
the *gain*, how much likelier a mixture of two Gaussians makes held-out samples than one Gaussian
does (nats a sample, over all dimensions of u; 0 if one is enough, more for two peaks, but also for
skewed or heavy-tailed samples), and the *dip* of the curve that is drawn, its deepest valley as a
share of the lower of the peaks around it (0: one peak).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import gaussian_kde
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from plotting import policies, runs, style
from plotting.paper import ACTIONS_TASK

# Times Scott's rule. App. E.7's "bandwidth factor of 0.8" could also be 0.8 standard deviations of
# the data, but that would smear two peaks into one, and the paper shows two.
BANDWIDTH = 0.8
THIRDS = (1 / 3, 2 / 3, 1.0)  # 60M (before the first refinement), 120M and 180M steps


def gain(samples: np.ndarray, seed: int = 0) -> float:
    """Nats a sample by which two Gaussians beat one on half of the samples (n, d), fitted on the
    others.
    """
    shuffled = np.random.default_rng(seed).permutation(samples)
    shuffled = (shuffled - shuffled.mean(0)) / np.maximum(shuffled.std(0), 1e-12)  # changes nothing
    train, test = np.array_split(shuffled, 2)
    # So small a fit takes fifty times as long on threads that wait for each other.
    with threadpool_limits(1):
        fits = [GaussianMixture(n, n_init=2 * n - 1, random_state=seed).fit(train) for n in (1, 2)]
        one, two = fits
        return float(two.score(test) - one.score(test))


def dip(density: np.ndarray) -> float:
    """The deepest valley of a density (m,) along a line, as a share of the lower of the peaks
    around it.

    Peaks under a twentieth of the highest do not count: single samples make some in the tails.
    """
    around = np.minimum(np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1])
    counts = around > density.max() / 20
    return float(np.max(1 - density[counts] / around[counts]))


def common_projection(groups: list[np.ndarray]) -> np.ndarray:
    """The first principal component (d,) of groups of samples (n, d), each about its mean, of equal
    variance.

    So the axis shows how policies spread and not how they differ, and no wide policy decides it
    alone. Its largest entry is positive.
    """
    covariances = [np.atleast_2d(np.cov(samples.T)) for samples in groups]
    mean = np.mean(
        [covariance / max(np.trace(covariance), 1e-12) for covariance in covariances], axis=0
    )
    axis = np.linalg.eigh(mean)[1][:, -1]
    return axis * np.sign(axis[np.argmax(np.abs(axis))])


def kernel_density(samples: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Density (m,) at x (m,) of samples (n,): Gaussian kernels, BANDWIDTH."""
    return gaussian_kde(samples, bw_method=lambda kde: BANDWIDTH * kde.scotts_factor())(x)


def fixed_observations(env: Any, seed: int, count: int) -> np.ndarray:
    """Initial observations (count, obs_dim) from PRNGKey(seed): no method's own, and all have seen
    such.
    """
    import jax

    keys = jax.random.split(jax.random.PRNGKey(seed), count)
    return np.asarray(jax.jit(jax.vmap(env.reset))(keys).obs)


def wanted_steps(group: runs.Group, run: Path) -> list[int | None]:
    """The saved policies' steps at a third, two thirds and the end of training; None where there is
    none.

    They are the ends of GoRL's stages, before the decoder is refined.
    """
    saved = policies.saved_steps(run)
    args = runs.read_args(run)
    steps = [runs.whole_iterations(args, group.total * sixths // 6) for sixths in (2, 4, 6)]
    return [step if step in saved else None for step in steps]


def draw(
    options: runs.Options,
    env_id: str | None = None,
    samples: int = 10_000,
    state_seed: int = 0,
    num_states: int = 1,
) -> list[Path]:
    """Draws Figure 7: densities of u (not of tanh(u), which makes two peaks of one) along one
    direction.

    Args:
        env_id: The task; default: HopperStand, as the paper, or the first that has been run.
        samples: Actions of each policy at each state.
        state_seed: The state is the first that the environment's reset gives for this seed.
        num_states: The JSON's gain is the mean over so many initial states; the first is drawn.

    State, direction and all numbers are written to figure_7.json. A line a seed.
    """
    if samples < 100 or num_states < 1:
        runs.wrong(
            "--samples, --num-states", f"{samples}, {num_states}", "at least 100 samples, 1 state"
        )
    tasks = [group.task for group in runs.load(options.runs, options.unfinished)]
    env_id = env_id or (ACTIONS_TASK if ACTIONS_TASK in tasks else next(iter(tasks), ACTIONS_TASK))
    mine = {g.label: g for g in runs.select(options, lambda group: group.task == env_id)}
    todo = [
        (label, seed, column, step, curve.run)
        for label, group in mine.items()
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
    for label, seed, column, step, run in todo:
        try:
            script, args, policy, *_ = policies.open_policy(run, step, seed)
        except ValueError as error:
            print(f"skipped {run}, step {step}, seed {seed}: {error}")
            continue
        if observations is None:
            observations = fixed_observations(script.make_env(args), state_seed, num_states)
        keys = jax.random.split(jax.random.PRNGKey(seed), num_states)
        repeated = [np.broadcast_to(obs, (samples, len(obs))) for obs in observations]
        drawn[label, seed, column] = np.stack(
            [policy(obs, key) for obs, key in zip(repeated, keys, strict=True)]
        )
    if not drawn:
        raise runs.CannotDraw(f"no policy on {env_id} could be read")
    axis = common_projection([u[0] for u in drawn.values()])
    gains = {key: [gain(u) for u in us] for key, us in drawn.items()}
    dips = {}

    labels = [label for label in mine if any(key[0] == label for key in drawn)]
    columns = sorted({column for *_, column in drawn})
    figure, panels = style.grid(len(labels), len(columns))
    for row, label in zip(panels, labels, strict=True):
        span = np.concatenate([u[0] @ axis for key, u in drawn.items() if key[0] == label])
        x = np.linspace(*np.quantile(span, [0.001, 0.999]), 400)
        pad = 0.15 * (x[-1] - x[0])
        x = np.linspace(x[0] - pad, x[-1] + pad, 400)
        colour = style.line(mine[label])["color"]
        for column, panel in zip(columns, row, strict=True):
            keys = [key for key in drawn if key[0] == label and key[2] == column]
            if not keys:
                panel.spines[:].set_visible(False)
                panel.set_xticks([])
            for key in keys:
                density = kernel_density(drawn[key][0] @ axis, x)
                dips[key] = dip(density)
                panel.plot(x, density, color=colour, linewidth=0.9, alpha=0.9)
                panel.fill_between(x, density, color=colour, alpha=0.12, linewidth=0)
            if keys:
                mean_gain, mean_dip = np.mean([(gains[key][0], dips[key]) for key in keys], axis=0)
                text = f"gain {mean_gain:.3f}\ndip {mean_dip:.2f}"
                where = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 6}
                panel.annotate(text, (0.98, 0.95), **where)
            panel.set(yticks=[], xlim=(x[0], x[-1]), ylim=(0, None))
            panel.grid(visible=False)
        row[0].set_ylabel(style.plain(label), fontsize=7.5 if len(label) < 14 else 5)
    totals = {mine[label].total for label in labels}
    for column, top, bottom in zip(columns, panels[0], panels[-1], strict=True):
        steps = f": {THIRDS[column] * min(totals) / 1e6:.3g}M steps" * (len(totals) == 1)
        top.set_title(("a third", "two thirds", "the end")[column] + steps)
        bottom.set_xlabel("u along the first principal component")
    counts = {len({seed for name, seed, _ in drawn if name == label}) for label in labels}
    kind = f"{env_id}: densities of {samples:,} u at one state, a line a seed, of"
    text = style.note([mine[label] for label in labels], kind, counts)
    text += " Gain: nats a sample by which two Gaussians describe held-out u better than one (0: "
    text += "one is enough). Dip: deepest valley between two peaks (0: one peak, 1: two apart)."
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
                "method": label,
                "seed": seed,
                "step": wanted_steps(mine[label], mine[label].curves[seed].run)[column],
                "run": str(mine[label].curves[seed].run),
                "u_mean": us[0].mean(0).tolist(),
                "u_std": us[0].std(0).tolist(),
                "gain": gains[label, seed, column][0],
                f"gain_mean_{num_states}_states": float(np.mean(gains[label, seed, column])),
                "dip": dips[label, seed, column],
            }
            for (label, seed, column), us in drawn.items()
        ],
    }
    files = style.save(figure, options.out, "figure_7")
    (file := options.out / "figure_7.json").write_text(json.dumps(record, indent=1))
    return [*files, file]


if __name__ == "__main__":
    sys.exit(runs.command(draw))
