"""What a training run leaves behind and survives on: directory, settings, metrics, films, checkpoints, signals.

Nothing here is about the method; train.py stays readable without it. Three promises:

* Everything that `--resume` needs is written once per iteration, into a temporary name, synced, then renamed: a kill or a
  full disk at any moment leaves the previous state whole.
* A line of metrics.jsonl is synced before the next iteration starts. Lines newer than the checkpoint are dropped at resume.
* Ctrl-C and SIGTERM end a run between two decisions; after 10 seconds (a long update, a hung driver) wherever it is.
  That is safe because of the first promise.

`Run` is what `train.main` calls by name, in the order of its methods; it never calls back. The rest are its parts.
"""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from support import report
from support.checkpoints import load_checkpoint, save_checkpoint, save_debug_bundle, to_numpy, to_tensors
from support.cli import parse_settings
from support.distributed import restarted_after
from support.errors import UserError, explain_out_of_memory
from support.files import atomic_write, fingerprint, read_json
from support.numerics import NumericsError
from support.signals import Stop
from support.tracking import Tracker

# What the flags of earlier versions are called now.
RENAMED = [("lam", "gae_lambda")]


class Run:
    """One training run on this rank.

    args: settings; with --resume (or restarted by torchrun) those of the run that goes on, which `self.args` then holds.
    Attributes: out (directory), args, resumed (bool), iteration (the present one; 0 before the loop), total.
    """

    def __init__(self, args, ranks):
        self.ranks = ranks
        out = Path(args.out or f"runs/{args.suite}-seed{args.seed}")
        # By torchrun, after a rank had died. (On the nodes that lost no rank, it does not count that as a restart.)
        restarted = ranks.any(restarted_after(out / "config.json"))
        if (
            restarted
            and args.resume is None
            and any(p.name.isdigit() for p in (out / "checkpoints").glob("*"))
        ):
            args.resume = str(out)
        self.resumed = args.resume is not None
        if self.resumed:
            out = Path(args.resume)
            args = parse_settings(type(args), read_json(out / "config.json"), out / "config.json", RENAMED)
        elif (out / "config.json").exists() and not restarted:
            raise UserError(
                f"{out} already holds a run: continue it with --resume {shlex.quote(str(out))}, or choose another --out"
            )
        args.out = str(out)
        self.out, self.args = out, args
        self._stop = Stop(out, ranks.print0)
        self._pace, self._evaluation_time = [], 0.0
        self.iteration = 0
        self._best, self._best_rate = -1, -1.0  # no checkpoint is the best before one was evaluated
        self._metrics = None

    # ---- before the loop ---------------------------------------------------------------------------------------------

    def start(self, iterations, actor_critic, optimizers, generator, samplers, envs, rollout):
        """Begin, or with --resume go on: bring everything back to where the newest readable checkpoint left it.

        iterations: of the whole run. optimizers: of policy and critic. generator: of the mini-batch order. samplers: one
        generator per environment of this rank.
        """
        self.total, self.first = iterations, 1
        self.generator, self.samplers, self.envs, self.rollout = generator, samplers, envs, rollout
        self.actor_critic = actor_critic
        self.optimizers = dict(zip(("policy", "critic"), optimizers, strict=True))
        args, lines = self.args, []
        # What checkpoints leave out, because it is frozen.
        self._frozen = [args.model, args.reward_model if args.prm_mode != "none" else None]
        self._fingerprints = [None if path is None else fingerprint(path) for path in self._frozen]
        self._config = json.dumps(asdict(args), indent=1)
        if self.resumed:
            self._restore()
            lines = Metrics.read(self.out, self.first - 1)
            if self.first <= iterations and self.ranks.is_main_process:  # of a shorter run, which goes on now
                (self.out / "results.json").unlink(missing_ok=True)
            # The start policy is evaluated after its checkpoint was written.
            if self._best < 0 and lines and lines[0]["iteration"] == 0:
                self._best, self._best_rate = 0, lines[0]["eval/success_rate"]
        else:
            envs.reset(seed=args.seed)
        if self.ranks.is_main_process:
            self._metrics = Metrics(self.out, lines, asdict(args), args.track)
        if not self.resumed:
            self.save()
            if self.ranks.is_main_process:
                atomic_write(self.out / "config.json", self._config)  # last: with it, a run can be resumed
        self._stop.begin()  # from here on there is something to go on with

    def make_directory(self):
        self.ranks.barrier()  # every rank has seen whether there is a run already
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UserError(f"cannot write to {self.out}: {exc.strerror}; choose another --out") from exc

    def _restore(self):
        out, frozen = self.out, dict(zip(self._frozen, self._fingerprints, strict=True))
        state = load_checkpoint(out, self.actor_critic, frozen)
        own = self.ranks.share(self.args.num_envs)
        try:
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state[f"{name}_optimizer"])
            self.generator.set_state(state["generator"])
            # Saved for the environments of all ranks, whose number may be another one now.
            for sampler, saved in zip(self.samplers, state["samplers"][own.start : own.stop], strict=True):
                sampler.set_state(saved.clone())  # given a row of a larger tensor, torch 2.13 crashes
            saved = to_numpy(state["envs"])
            self.envs.set_state(saved if self.ranks.size == 1 else self.envs.split_state(saved, own))
            self.first, self._best, self._best_rate = (
                state["iteration"] + 1,
                state["best"],
                state["best_rate"],
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as exc:
            raise UserError(
                f"the checkpoint in {out} does not fit its config.json or this code ({exc!r})"
            ) from exc
        if len(found := set(self.ranks.gather(state["iteration"]))) > 1:
            raise UserError(
                f"ranks read different checkpoints of {out} ({sorted(found)}): all need to see the same files"
            )
        self.iteration = state["iteration"]
        goes_on = f"resumed at iteration {self.first} of {self.total}"
        self.ranks.print0(
            goes_on if self.first <= self.total else f"resumed: all {self.total} iterations are done"
        )

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def __enter__(self):
        return self

    def iterations(self):
        """The numbers of the iterations that are still to do; each starts the clocks of its parts."""
        for self.iteration in range(self.first, self.total + 1):
            self._began = self._last_lap = time.time()
            self._seconds = {}
            yield self.iteration

    def lap(self, part, **seconds):
        """Book the time since the last lap under time/`part`, and what somebody else measured, in seconds."""
        now = time.time()
        for name, spent in {part: now - self._last_lap, **seconds}.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + spent
        self._last_lap = now

    def check(self):
        """Leave here, between two decisions, if somebody asked for it (Ctrl-C, SIGTERM)."""
        self._stop.check()

    def start_evaluation_due(self):
        """Is the start policy still to be evaluated? (Not in a run that went on from a later iteration.)"""
        due = self.first == 1 and self.args.start_episodes > 0 and not (self._metrics and self._metrics.lines)
        return self.ranks.gather(due)[0]  # the main process has the log

    def log_start(self, evaluation):
        """Iteration 0: the start policy."""
        m = _evaluation_metrics(evaluation)
        self._best, self._best_rate = 0, m["eval/success_rate"]
        if self.ranks.is_main_process:
            zeros = dict.fromkeys(("iteration", "charts/decisions", "charts/episodes", "charts/successes"), 0)
            self._metrics.write({**zeros, **m})
            report.draw(self.out)
            self.ranks.print0(
                f"start policy {100 * m['eval/success_rate']:.0f} % of {m['eval/episodes']} test episodes"
            )

    def evaluation_due(self):
        """Is this iteration one after which the policy is evaluated?"""
        self._pace.append(time.time() - self._began)
        return (
            bool(self.args.eval_every)
            and self.iteration % self.args.eval_every == 0
            and self.iteration < self.total
        )

    def log(self, losses, curriculum, learning_rate, evaluation=None):
        """Metrics of this iteration to metrics.jsonl, TensorBoard and the terminal; now and then a film and a plot."""
        args, rollout, seconds = self.args, self.rollout, self._seconds
        # Counts and (T, N) tables of all ranks. (Seconds stay those of this one.)
        names = (
            "terminated",
            "truncated",
            "lost",
            "episode_lengths",
            "sparse_rewards",
            "prm_scores",
            "rewards",
            "values",
        )
        parts = self.ranks.gather([getattr(rollout, name) for name in names])
        whole = {
            name: torch.cat(tables, dim=1)
            for name, tables in zip(names, zip(*parts, strict=True), strict=True)
        }
        ended = whole["terminated"] | whole["truncated"]
        episodes, successes = int(ended.sum()), int(whole["terminated"].sum())
        decisions = args.num_envs * args.num_steps
        m = {
            "iteration": self.iteration,
            "charts/decisions": self.iteration * decisions,
            "charts/episodes": episodes,
            "charts/successes": successes,
            "charts/success_rate": successes / episodes if episodes else 0.0,
            "charts/episodic_length": float(whole["episode_lengths"][ended].double().mean()) if episodes else 0.0,
            "charts/sparse_return": whole["sparse_rewards"].sum().item() / args.num_envs,
            "charts/prm_score": whole["prm_scores"].mean().item(),
            "charts/reward": whole["rewards"].mean().item(),
            "charts/value": whole["values"].mean().item(),
            "charts/lost_episodes": int(whole["lost"].sum()),
            "charts/learning_rate": learning_rate,
            **losses,
            **{f"curriculum/task_{t}": p for t, p in zip(curriculum.task_ids, curriculum.probabilities().tolist(), strict=True)},
            "time/rollout": sum(seconds.get(part, 0.0) for part in ("inference", "environments", "slowest_rank")),
            **{f"time/{part}": spent for part, spent in seconds.items()},
            "charts/SPS": decisions / self._pace[-1],
        }  # fmt: skip
        if evaluation is not None:
            m.update(_evaluation_metrics(evaluation))
            self._evaluation_time = time.time() - self._began - self._pace[-1]
            if m["eval/success_rate"] > self._best_rate:
                self._best, self._best_rate = self.iteration, m["eval/success_rate"]
        # Before the first step the update must reproduce the rollout's log-probs (ppo.py); bfloat16 rounds them.
        mismatch = losses.get("losses/first_ratio_error", 0.0)
        if mismatch > (1e-3 if rollout.images.dtype == torch.float32 else 0.5):
            self.ranks.print0(
                f"warning: rollout and update disagree: a first ratio is off by {mismatch:.1e}",
                file=sys.stderr,
            )
        if self.ranks.is_main_process:
            self._bring_back_directory()
            if args.video_every and (self.iteration % args.video_every == 0 or self.iteration == 1):
                self._film()
            self._metrics.write(m)
            if evaluation is not None or self.iteration % 10 == 0:
                report.draw(self.out)
            self.ranks.print0(terminal_line(m, self.total, self._seconds_left(), args.advantage_floor))

    def save(self):
        """Write the checkpoint of this iteration; every rank has a part of it."""
        parts = self.ranks.gather(
            ([s.get_state() for s in self.samplers], self.envs.get_state()), everywhere=False
        )
        if not self.ranks.is_main_process:
            return
        samplers, envs = zip(*parts, strict=True)
        state = {
            "iteration": self.iteration,
            "weights": self._fingerprints,
            "best": self._best,
            "best_rate": self._best_rate,
            "policy_optimizer": self.optimizers["policy"].state_dict(),
            "critic_optimizer": self.optimizers["critic"].state_dict(),
            "generator": self.generator.get_state(),
            "samplers": torch.stack([state for part in samplers for state in part]),
            "envs": to_tensors(envs[0] if len(envs) == 1 else self.envs.merge_states(envs)),
        }
        save_checkpoint(self.out, self.iteration, self.actor_critic, state, self.args.keep, self._best)

    # ---- after the loop ----------------------------------------------------------------------------------------------

    def finish(self, before=None, after=None):
        """The comparison of start and trained policy (eval.EvalResult each) to results.json, as a table and as a film."""
        if not self.ranks.is_main_process:
            return
        out = self.out
        if before is not None:
            rows = {"start": before.to_dict(), "trained": after.to_dict()}
            atomic_write(out / "results.json", json.dumps(rows, indent=1))
            report.before_after_gif(out / "before_after.gif", out / "videos/start", out / "videos/trained")
            self.ranks.print0(report.before_after_table(rows))
            if self._metrics.lines:  # else somebody emptied the file, and all iterations were done
                self._metrics.tracker.log(
                    _evaluation_metrics(after), self._metrics.lines[-1]["charts/decisions"]
                )
        report.draw(out)
        self.ranks.print0(
            f"policy: {out / 'policy'}   curve: {out / 'success.png'}   videos: {out / 'videos'}"
        )

    def __exit__(self, kind, exc, traceback):
        """However the loop ends: in one line that names what to do, with the last checkpoint whole."""
        out, hint = self.out, f"python train.py --resume {shlex.quote(str(self.out))}"
        if self._metrics:
            self._metrics.close()
        if isinstance(exc, NumericsError):
            where = self._save_debug_bundle(exc)
            raise UserError(
                f"iteration {self.iteration}: {exc}. {where}; the checkpoint before it is intact: try a lower lr in "
                f"{out}/config.json, then {hint}"
            ) from exc
        if isinstance(exc, RuntimeError):
            with explain_out_of_memory(
                "lower --num-envs or --micro-batch-size, or turn on --gradient-checkpointing"
            ):
                raise exc
        is_broken_pipe = isinstance(exc, BrokenPipeError)  # `python train.py | head`
        if isinstance(exc, OSError) and not is_broken_pipe:
            raise UserError(
                f"{exc.strerror or exc}: {exc.filename or out}; the newest checkpoint is intact. Once that is mended: {hint}"
            ) from exc
        if kind is KeyboardInterrupt:
            self.ranks.check_others()
            if self._stop.begun:
                self.ranks.print0(self._stop.hint, file=sys.stderr)
                sys.exit(130)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _seconds_left(self):
        every = self.args.eval_every
        evaluations = sum(i % every == 0 for i in range(self.iteration + 1, self.total)) if every else 0
        return (
            float(np.mean(self._pace[-20:])) * (self.total - self.iteration)
            + self._evaluation_time * evaluations
        )

    def _film(self):
        """The first environment's part of the rollout as mp4, with rewards, values and RPRM scores."""
        r, repeat = self.rollout, self.envs.action_repeat
        report.write_video(
            self.out / "videos" / f"rollout_{self.iteration:05d}.mp4",
            list(r.frames[:-1, 0]),
            r.rewards[:, 0].tolist(),
            r.values[:, 0].tolist(),
            r.prm_scores[:, 0].tolist(),
            (r.terminated[:, 0].int() - r.truncated[:, 0].int()).tolist(),
            fps=20 / repeat,
            # decisions of that episode before
            first=max(0, math.ceil(int(r.episode_lengths[0, 0]) / repeat) - 1),
        )

    def _bring_back_directory(self):
        """Make a run directory that somebody deleted again, from memory: hours of training are worth more than an exit.

        The next checkpoint makes it resumable. Videos, TensorBoard's past and older checkpoints are gone. Moving the
        directory away amounts to the same.
        """
        if not (self.out / "config.json").exists():
            print(f"warning: {self.out} has vanished; writing it again", file=sys.stderr)
            self._metrics.close()
            atomic_write(self.out / "config.json", self._config)
            self._metrics.open()

    def _save_debug_bundle(self, error):
        generators = {f"sampler_{i}": sampler.get_state() for i, sampler in enumerate(self.samplers)}
        generators["minibatches"] = self.generator.get_state()
        name = f"{self.iteration:06d}" + (f"-rank{self.ranks.rank}" if self.ranks.size > 1 else "")
        path = self.out / "debug" / f"{name}.pt"
        return save_debug_bundle(
            path, error, self.iteration, self.rollout, self.actor_critic, self.optimizers, generators
        )


def _evaluation_metrics(evaluation):
    total = evaluation.row()  # of an EvalResult (support/episodes.py): all tasks together
    return {f"eval/{name}": total[name] for name in ("success_rate", "successes", "episodes")}


# --------------------------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl: one synced line per iteration, the source of truth. The same goes to a `Tracker`, to be watched."""

    KEYS = {"iteration", "charts/decisions", "charts/successes", "charts/episodes"}  # what the curve needs

    def __init__(self, out, lines, config, track=False):
        self.path, self.lines, self.config, self.track = out / "metrics.jsonl", lines, config, track
        self.open()

    @classmethod
    def read(cls, out, last):
        """Lines up to iteration `last` of an earlier run. Fewer, and a warning, where somebody damaged the file."""
        lines, texts = [], []
        with contextlib.suppress(OSError):
            texts = (out / "metrics.jsonl").read_text(errors="replace").splitlines()
        for text in texts:
            with contextlib.suppress(ValueError, RecursionError):  # half a line, written in a crash
                m = json.loads(text)
                known = isinstance(m, dict) and cls.KEYS <= m.keys() and type(m["iteration"]) is int
                if known and (lines[-1]["iteration"] if lines else -1) < m["iteration"] <= last:
                    lines.append(m)
        if (
            found := sum(m["iteration"] > 0 for m in lines)
        ) < last:  # (0 is the start policy, which need not be there)
            print(f"warning: {out}/metrics.jsonl holds {found} of {last} iterations", file=sys.stderr)
        return lines

    def open(self):
        # Lines after the checkpoint that a run resumes from (or half a line, after a crash) belong to no saved state.
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.file = open(self.path, "a")
        step = self.lines[-1]["charts/decisions"] if self.lines else None
        self.tracker = Tracker(self.path.parent, self.config, self.track, step)

    def write(self, metrics):
        self.lines.append(metrics)
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.tracker.log(metrics, metrics["charts/decisions"])

    def close(self):
        # On a full disk the last line stays in the buffer, and was reported.
        with contextlib.suppress(OSError):
            self.file.close()
            self.tracker.close()


def terminal_line(m, iterations, seconds_left, floor):
    success = f"{100 * m['charts/success_rate']:3.0f} %" if m["charts/episodes"] else "  - "
    phase = (
        "warm-up"
        if "losses/policy_loss" not in m
        else f"kl {m['losses/approx_kl']:.3f} clip {100 * m['losses/clipfrac']:2.0f} % ent {m['losses/entropy']:.1f}"
    )
    if m["losses/advantage_std"] < floor:
        phase = "no reward: no policy step"
    evaluated = f"  eval {100 * m['eval/success_rate']:.0f} %" if "eval/success_rate" in m else ""
    return (
        f"it {m['iteration']:4d}/{iterations}  {m['charts/decisions']:>9,} decisions  success {success} of "
        f"{m['charts/episodes']:3d}  ev {m['losses/explained_variance']:5.2f}  {phase}  rollout {m['time/rollout']:.1f} s "
        f"(inference {m['time/inference']:.1f}) update {m['time/update']:.1f} s  left {seconds_left / 60:.0f} min{evaluated}"
    )
