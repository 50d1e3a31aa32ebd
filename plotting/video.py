"""Renders an episode of a saved policy, without a display.

python -m plotting.video runs/HopperStand__gorl_fm_ppo__1__1795398135
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import tyro

from plotting import policies, render, runs


def video(
    run_dir: Annotated[Path, tyro.conf.Positional],
    step: int | None = None,
    seed: int | None = None,
    stochastic: bool = False,
    env_seed: int | None = None,
    seconds: float | None = None,
    height: int = 480,
    width: int = 640,
    out: Path | None = None,
) -> list[Path]:
    """An episode of a saved policy as an MP4 (H.264), in real time, at most 50 frames a second; or
    as a GIF, at most 20.

    Args:
        run_dir: A run directory with checkpoints/policy_<step>.npz.
        step: Which policy; default: the last.
        seed: Which seed's policy; default: the run's first.
        stochastic: Sample latents and actions, as in training; default: the evaluation policy.
        env_seed: Initial state and noise; default: the policy's seed.
        seconds: Of it, the first so many; default: all.
        height: Of the picture, an even number of pixels.
        width: Likewise.
        out: The file, .mp4 or .gif; default: RUN_DIR/video_<step>_seed_<seed>.mp4.
    """
    for name, pixels in (("--height", height), ("--width", width)):
        if pixels < 16 or pixels % 2:
            runs.wrong(
                name, pixels, "an even number of pixels, at least 16 (H.264 takes no odd one)"
            )
    if seconds is not None and not seconds > 0:
        runs.wrong("--seconds", seconds, "a number above 0")
    if not 0 <= (env_seed or 0) < 2**31:
        runs.wrong("--env-seed", env_seed, "a number from 0 to 2147483647")
    print(f"rendering with {render.pick_backend()}")
    try:
        script, args, policy, step, seed = policies.open_policy(run_dir, step, seed)
    except ValueError as error:
        runs.wrong("RUN_DIR, --step, --seed", f"{run_dir} ({error})", "a run with such a policy")
    import imageio_ffmpeg  # brings an ffmpeg; IMAGEIO_FFMPEG_EXE names another

    env_seed = seed if env_seed is None else env_seed
    file = out or run_dir / f"video_{step}_seed_{seed}.mp4"
    if file.suffix not in (".mp4", ".gif") or file.is_dir() or not os.access(file.parent, os.W_OK):
        runs.wrong("--out", file, "a file .mp4 or .gif in a folder that can be written to")
    about = f"{script.__name__}, {args.env_id}, step {step:,}, seed {seed}"
    print(f"{about}, environment seed {env_seed}: running")
    returns, seen = policies.evaluate(
        script, args, policy, step, env_seed, 1, not stochastic, record=True
    )
    env = script.make_env(args)
    gif = file.suffix == ".gif"
    every = max(1, round(1 / ((20 if gif else 50) * env.dt)))  # control steps a frame
    if seconds is not None:
        seen = {name: values[: max(1, round(seconds / env.dt))] for name, values in seen.items()}
    aside = file.with_name(f"unfinished_{file.name}")
    how = {"fps": 1 / (env.dt * every), "macro_block_size": 2, "ffmpeg_log_level": "error"}
    if gif:  # of 128 colours that are chosen for all frames
        palette = "split[a][b];[a]palettegen=max_colors=128[p];[b][p]paletteuse=dither=none"
        how |= {
            "codec": "gif",
            "pix_fmt_out": "pal8",
            "output_params": ["-filter_complex", palette],
        }
    else:
        how |= {"codec": "libx264", "quality": 7}
    writer = imageio_ffmpeg.write_frames(str(aside), (width, height), **how)
    # JAX warns of any child process; this one starts another program at once.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        writer.send(None)
    states = {name: values[::every] for name, values in seen.items()}
    try:
        for picture in render.frames(args.env_id, env.mj_model, states, height, width):
            writer.send(picture.tobytes())
        writer.close()
        aside.replace(file)
    finally:
        writer.close()
        aside.unlink(missing_ok=True)
    print(f"return {returns[0]:.1f}, {len(states['qpos'])} frames")
    return [file]


if __name__ == "__main__":
    sys.exit(runs.command(video))
