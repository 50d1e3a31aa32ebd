"""What several tests compare with: networks and advantages in float64, written out."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np


def sizes(obs_dim, action_dim):
    """As much of an environment as networks need."""
    return SimpleNamespace(observation_size=obs_dim, action_size=action_dim)


def numpy_mlp(layers, x):
    """The SiLU network that has these layers."""
    for i in range(len(layers) - 1):
        layer = layers[f"Dense_{i}"]
        x = x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
        x = x / (1 + np.exp(-x))
    return x @ np.float64(layers["last"]["kernel"]) + np.float64(layers["last"]["bias"])


def numpy_velocity(params, obs, a, t):
    """App. C's network: time enters as cos and sin of t * 2^k, k = 0 .. 3."""
    t = np.broadcast_to(t, a.shape[:-1])[..., None]
    angles = [f(t * 2**k) for f in (np.cos, np.sin) for k in range(4)]
    obs = np.broadcast_to(obs, (*a.shape[:-1], obs.shape[-1]))
    inputs = np.concatenate([obs, a, *angles], axis=-1)
    return numpy_mlp(params["params"]["MLP_0"], inputs)


def with_output(params, bias):
    """The network's parameters, changed so that its output is `bias` for every input."""
    layers = params["params"]["MLP_0"]
    kernel = jnp.zeros_like(layers["last"]["kernel"])
    last = {"kernel": kernel, "bias": jnp.array(bias, jnp.float32)}
    return {"params": {"MLP_0": layers | {"last": last}}}


def numpy_gae(reward, terminated, truncated, value, gamma, lam):
    """Every sum written out, forward in time, up to an episode's end."""
    reward = np.float64(reward)
    value = np.float64(value)
    target = value[:-1].copy()
    advantage = np.zeros_like(target)
    for t, n in np.ndindex(reward.shape):
        for k in range(t, len(reward)):
            if truncated[k, n]:
                break
            following = 0 if terminated[k, n] else value[k + 1, n]
            delta = reward[k, n] + gamma * following - value[k, n]
            target[t, n] += (gamma * lam) ** (k - t) * delta
            if terminated[k, n]:
                break
    next_target = np.concatenate([target[1:], value[-1:]])
    for t, n in np.ndindex(reward.shape):
        if not truncated[t, n]:
            following = 0 if terminated[t, n] else next_target[t, n]
            advantage[t, n] = reward[t, n] + gamma * following - value[t, n]
    return target, advantage
