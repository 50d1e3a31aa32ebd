"""What benchmark/gpu_kernels.py counts: on a text made by hand, and on programs for the CPU."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from toy import PointMass

import gorl_fm_ppo
from benchmark import gpu_kernels

# Seven passes of a copy, a loop that ends when it likes (2 kernels, and 1 in its condition, asked
# once more), a called computation (2), the dearer of two branches (1), an asynchronous fusion (1).
TEXT = """
HloModule jit_f, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %inside.1 = f32[4]{0} add(%p, %p)
  ROOT %inside.2 = f32[4]{0} multiply(%inside.1, %p)
}

%graph (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %a.1 = f32[4]{0} fusion(%q), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/body=%x"}
  ROOT %a.2 = (f32[4]{0}, s32[]) custom-call(%a.1), custom_call_target="cusolver_potrf_ffi"
}

%open_body (r: (f32[4], s32[])) -> (f32[4], s32[]) {
  %r = (f32[4]{0}, s32[]) parameter(0)
  %r.0 = f32[4]{0} get-tuple-element(%r), index=0
  %r.1 = f32[4]{0} sort(%r.0), dimensions={0}, to_apply=%fused
  %r.2 = s32[] copy(%r.0)
  ROOT %r.3 = (f32[4]{0}, s32[]) tuple(%r.1, %r.2)
}

%open_condition (s: (f32[4], s32[])) -> pred[] {
  %s = (f32[4]{0}, s32[]) parameter(0)
  ROOT %s.1 = pred[] fusion(%s), kind=kLoop, calls=%fused
}

%branch_0 (t: f32[4]) -> f32[4] {
  ROOT %t = f32[4]{0} parameter(0)
}

%branch_1 (v: f32[4]) -> f32[4] {
  %v = f32[4]{0} parameter(0)
  ROOT %v.1 = f32[4]{0} negate(%v)
}

%body (w: (f32[4], s32[])) -> (f32[4], s32[]) {
  %w = (f32[4]{0}, /*index=1*/s32[]) parameter(0)
  %copy.1 = f32[4]{0} copy(%w)
  %while.1 = (f32[4]{0}, s32[]) while(%w), OPEN
  %call.1 = f32[4]{0} call(%copy.1), to_apply=%graph
  %cond.1 = f32[4]{0} conditional(%i, %call.1, %call.1), branch_computations={%branch_0, %branch_1}
  %fusion-start = ((f32[4]{0}), f32[4]{0}, u32[]) fusion-start(%cond.1), kind=kLoop, calls=%fused
  %fusion-done = f32[4]{0} fusion-done(%fusion-start)
  ROOT %w.1 = (f32[4]{0}, s32[]) tuple(%fusion-done, %i)
}

%condition (x: (f32[4], s32[])) -> pred[] {
  %x = (f32[4]{0}, s32[]) parameter(0)
  ROOT %x.1 = pred[] fusion(%x), kind=kLoop, calls=%fused
}

ENTRY %main.1 (y: f32[4]) -> f32[4] {
  %y = f32[4]{0} parameter(0), metadata={op_name="y"}
  %bitcast.1 = f32[4]{0} bitcast(%y)
  %y.1 = f32[4]{0} dot(%y, %y), lhs_contracting_dims={0}
  %while.2 = (f32[4]{0}, s32[]) while(%y.1), SEVEN
  ROOT %y.2 = f32[4]{0} get-tuple-element(%while.2), index=0
}
"""
OPEN = 'condition=%open_condition, body=%open_body, metadata={op_name="jit(f)/solve"}'
SEVEN = 'condition=%condition, body=%body, metadata={op_name="jit(f)/while"}'
SEVEN += ', backend_config={"known_trip_count":{"n":"7"}}'
TEXT = TEXT.replace("OPEN", OPEN).replace("SEVEN", SEVEN)


def test_count():
    """Otherwise a change that saves no launch is kept, or one that saves many is not."""
    kernels, loops = gpu_kernels.count(TEXT, open_passes=4)
    one_pass = 1 + 4 * (2 + 1) + 1 + 2 + 1 + 1
    assert kernels == 1 + 7 * one_pass
    outer, inner = loops
    assert outer == (0, 7, one_pass, "jit(f)/while")
    assert inner == (1, None, 3, "jit(f)/solve")
    assert gpu_kernels.count(TEXT, open_passes=10)[0] == 1 + 7 * (one_pass + 6 * 3)


def test_loops_of_a_compiled_program():
    """Otherwise the notation has changed, and loops are not found."""

    def f(x, n):
        def body(x, _):
            x, _ = jax.lax.while_loop(lambda s: s[1] < n, lambda s: (s[0] @ s[0], s[1] + 1), (x, 0))
            return x, jnp.sort(x).sum()

        return jax.lax.scan(body, x, length=7)

    text = jax.jit(f).lower(jnp.ones((8, 8)), 3).compile().as_text()
    kernels, loops = gpu_kernels.count(text, open_passes=4)
    (outer,) = [loop for loop in loops if loop.depth == 0]
    (inner,) = [loop for loop in loops if loop.passes is None]
    assert outer.passes == 7
    assert inner.depth == 1
    assert inner.name.startswith(outer.name)
    assert kernels >= 7 * outer.kernels >= 7 * 4 * inner.kernels > 0


def test_programs_of_a_script(make_args, monkeypatch):
    """Otherwise a control step or a minibatch is counted that is none."""
    args = make_args(gorl_fm_ppo, num_envs=2, num_seeds=2, decoder_batch_size=8)
    monkeypatch.setattr(gorl_fm_ppo, "make_env", lambda args: PointMass())

    def for_the_cpu(f, xs, axes, num_seeds, donate):
        return jax.jit(jax.vmap(f, axes), donate_argnums=donate).lower(*xs).compile()

    monkeypatch.setattr(gpu_kernels, "compile_for_h100", for_the_cpu)
    found = gpu_kernels.measure(gpu_kernels.Count("gorl_fm_ppo"), gorl_fm_ppo, args)
    assert list(found) == ["iteration", "evaluate", "decoder_epoch"]
    assert all(program["memory_gb"] > 0 for program in found.values())
    # Loops of 20 control steps, 4 minibatches, 20 control steps and 4 minibatches of a decoder:
    whats = ["control step", "minibatch", "control step of an evaluation", "minibatch of a decoder"]
    of_one = {
        what: n for program in found.values() for what, n in program["kernels_of_one"].items()
    }
    assert list(of_one) == whats
    assert min(of_one.values()) > 0
    assert all(what in gpu_kernels.report(found) for what in whats)


def test_programs_of_all_scripts(script, make_args):
    """Otherwise the benchmark calls functions of a script as they are not."""
    args = make_args(script, num_seeds=2)
    env = PointMass()
    for name, (f, xs, axes) in gpu_kernels.examples(script, args, env).items():
        given = (args,) if name == "decoder_epoch" else (args, env)
        jax.eval_shape(jax.vmap(partial(f, *given), axes), *xs)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["ppo_gausian"], ["SCRIPT", "ppo_gausian"]),
        (["dppo", "--programs", "rollout"], ["--programs", "rollout", "evaluate"]),
        (["dppo", "--open-passes", "0"], ["--open-passes", "0"]),
        (["dppo", "--out", "/dev/null/x.json"], ["--out", "/dev/null"]),
        (["dppo"], ["jax[cuda13]"]),
    ],
)
def test_wrong_arguments(argv, words, monkeypatch, capsys):
    """Otherwise what is missing is found after minutes, or shown as a traceback."""
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", *argv])
    monkeypatch.setattr(gpu_kernels, "version", partial(missing, gpu_kernels.version))
    with pytest.raises(SystemExit) as ended:
        gpu_kernels.main()
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.err.count("\n") == 1 and not captured.out
    assert all(word in captured.err for word in words)


def missing(version, package):
    if package == "jax-cuda13-plugin":
        raise gpu_kernels.PackageNotFoundError(package)
    return version(package)
