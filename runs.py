"""What a training run leaves behind and survives on: metrics, curve, videos, checkpoints, signals.

Nothing here is about the method; train.py stays readable without it. Three promises:

* Everything that `--resume` needs is written once per iteration, into a temporary name, synced, then renamed: a kill or a
  full disk at any moment leaves the previous state whole.
* A line of metrics.jsonl is synced before the next iteration starts. Lines newer than the checkpoint are dropped at resume.
* Ctrl-C and SIGTERM end a run between two decisions, never inside a write.
"""

import json
import os
import pickle
import shutil
import signal
import sys

import numpy as np

from common import UserError, atomic_write, sync_directory, wilson_interval


class Stop:
    """Ctrl-C and SIGTERM set a flag that the loop reads after every decision; a second one ends the process at once."""

    def __init__(self, say=print):
        self.requested, self.say = False, say
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._request)

    def check(self, *_):
        """Leave whatever is running, if somebody asked for it."""
        if self.requested:
            raise KeyboardInterrupt

    def _request(self, number, frame):
        if self.requested:
            os._exit(128 + number)  # workers leave by themselves when their pipe closes
        self.requested = True
        self.say("\nstopping after this decision (once more: at once)", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Logging
# --------------------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl (one synced line per iteration, the source of truth), TensorBoard, and the terminal's line."""

    def __init__(self, out, lines):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.lines = out / "metrics.jsonl", lines
        # Lines after the checkpoint that a run resumes from (or half a line, after a crash) belong to no saved state.
        atomic_write(self.path, "".join(json.dumps(x) + "\n" for x in lines))
        self.file = open(self.path, "a")
        purge = lines[-1]["charts/decisions"] + 1 if lines else None
        self.board = SummaryWriter(out / "tensorboard", purge_step=purge)

    def write(self, metrics):
        self.lines.append(metrics)
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and "/" in name:
                self.board.add_scalar(name, value, metrics["charts/decisions"])
        self.board.flush()

    def close(self):
        self.file.close()
        self.board.close()


def terminal_line(m, iterations, seconds_left):
    success = f"{100 * m['charts/success_rate']:3.0f} %" if m["charts/episodes"] else "  - "
    phase = (
        "warm-up"
        if "losses/policy_loss" not in m
        else f"kl {m['losses/approx_kl']:.3f} clip {100 * m['losses/clipfrac']:2.0f} % ent {m['losses/entropy']:.1f}"
    )
    evaluated = f"  eval {100 * m['eval/success_rate']:.0f} %" if "eval/success_rate" in m else ""
    return (
        f"it {m['iteration']:4d}/{iterations}  {m['charts/decisions']:>9,} decisions  success {success} of {m['charts/episodes']:3d}  "
        f"ev {m['losses/explained_variance']:5.2f}  {phase}  rollout {m['time/rollout']:.1f} s (inference {m['time/inference']:.1f}) "
        f"update {m['time/update']:.1f} s  left {seconds_left / 60:.0f} min{evaluated}"
    )


def plot_curve(lines, path, title):
    """Success against decisions: training episodes (running mean), and evaluations with Wilson 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = np.array([m["charts/decisions"] for m in lines])
    wins = np.array([m["charts/successes"] for m in lines], float)
    episodes = np.array([m["charts/episodes"] for m in lines], float)
    fig, ax = plt.subplots(figsize=(7, 4), dpi=130)
    if len(x):
        window = np.ones(min(15, len(x)))
        mean = np.convolve(wins, window)[: len(x)] / np.maximum(np.convolve(episodes, window)[: len(x)], 1)
        ax.plot(
            x,
            100 * mean,
            color="0.6",
            lw=1.2,
            label=f"training episodes, sampled actions (mean of {len(window)} iterations)",
        )
    points = [
        (m.get("eval/at", m["charts/decisions"]), m["eval/successes"], m["eval/episodes"])
        for m in lines
        if "eval/episodes" in m
    ]
    if points:
        at, k, n = map(np.array, zip(*points, strict=True))
        low, high = np.array([wilson_interval(a, b) for a, b in zip(k.tolist(), n.tolist(), strict=True)]).T
        rate = k / n
        ax.errorbar(
            at,
            100 * rate,
            yerr=100 * np.stack([rate - low, high - rate]).clip(0),
            fmt="o-",
            ms=4,
            capsize=3,
            color="C0",
            label="evaluation on test states (95 % interval)",
        )
    ax.set(xlabel="decisions", ylabel="success rate (%)", ylim=(0, 100), title=title)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=8)
    fig.tight_layout()
    temporary = path.with_suffix(".tmp.png")
    fig.savefig(temporary)
    plt.close(fig)
    os.replace(temporary, path)


def write_video(path, frames, rewards, values, scores, ended, fps):
    """Rollout of one environment as mp4: decision, reward, value and RPRM score drawn on, the scores as a strip below."""
    import imageio
    from PIL import Image, ImageDraw

    T, width, strip, drawn, step = len(frames), 384, 48, [], 0
    for t in range(T):
        canvas = Image.new("RGB", (width, width + strip), (20, 20, 20))
        canvas.paste(Image.fromarray(frames[t]).resize((width, width)), (0, 0))
        pen = ImageDraw.Draw(canvas)
        pen.rectangle((0, 0, width, 15), fill=(0, 0, 0))
        pen.text(
            (4, 2),
            f"decision {step:2d}   reward {rewards[t]:+.2f}   value {values[t]:+.2f}   RPRM {scores[t]:.2f}"
            + ("   success" if ended[t] > 0 else "   cut" if ended[t] < 0 else ""),
            fill=(255, 255, 255),
        )
        for k in range(T):  # the whole strip in grey, what has happened in green
            x0, x1 = k * width // T, (k + 1) * width // T - 1
            top = width + strip - 4 - int((strip - 8) * float(scores[k]))
            pen.rectangle((x0, top, max(x0, x1), width + strip - 4), fill=(70, 170, 90) if k <= t else (70, 70, 70))
        drawn.append(np.asarray(canvas))
        step = 0 if ended[t] else step + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.mp4")
    imageio.mimwrite(temporary, drawn, fps=fps, macro_block_size=None)
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------


def save_checkpoint(out, iteration, actor_critic, state, keep, best):
    """Write checkpoints/<iteration>/ atomically: everything into a temporary directory, synced, then renamed.

    adapters/: LoRA and value head (safetensors). state.pt: optimisers, generators, environments, counters (tensors and
    plain values only, read back with weights_only=True). The newest `keep` and the best stay.
    """
    import torch

    root = out / "checkpoints"
    root.mkdir(exist_ok=True)
    for left_over in root.glob("*.tmp"):
        shutil.rmtree(left_over)
    final, temporary = root / f"{iteration:06d}", root / f"{iteration:06d}.tmp"
    try:
        temporary.mkdir()
        actor_critic.save_adapters(temporary / "adapters")
        with open(temporary / "state.pt", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        sync_directory(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_directory(root)
    except OSError as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write the checkpoint {final}: {exc.strerror or exc}; the previous one is intact. Free some "
            f"space, then: python train.py --resume {out}"
        ) from exc
    saved = sorted(p for p in root.iterdir() if p.name.isdigit())
    for old in saved[:-keep]:
        if int(old.name) != best:
            shutil.rmtree(old)


def load_checkpoint(out, actor_critic):
    """The newest readable checkpoint: loads the adapters and returns its state. A damaged one is named and passed over."""
    import torch

    saved = sorted((p for p in (out / "checkpoints").glob("*") if p.name.isdigit()), reverse=True)
    for path in saved:
        try:
            state = torch.load(path / "state.pt", weights_only=True)
            actor_critic.load_adapters(path / "adapters")
            return state
        except (UserError, OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as exc:
            print(f"warning: {path} is damaged ({type(exc).__name__}); trying the one before", file=sys.stderr)
    raise UserError(f"{out} holds no readable checkpoint: start the run again without --resume")


def to_tensors(tree):
    """numpy arrays -> tensors, so that `weights_only` can read them back (uint32 generator words become int64)."""
    import torch

    if isinstance(tree, dict):
        return {k: to_tensors(v) for k, v in tree.items()}
    if isinstance(tree, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(tree))
    return tree


def to_numpy(tree):
    import torch

    if isinstance(tree, dict):
        return {k: to_numpy(v) for k, v in tree.items()}
    return tree.numpy() if isinstance(tree, torch.Tensor) else tree


def before_after_table(rows):
    """Markdown table of start and trained policy per task, with Wilson 95 % intervals."""

    def cell(r):
        return f"{100 * r['success_rate']:5.1f} % [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"

    lines = ["", "| task | episodes | start policy | after RL | |", "|---:|---:|---:|---:|---|"]
    start, trained = rows["start"], rows["trained"]
    for a, b in zip([*start["tasks"], start["total"]], [*trained["tasks"], trained["total"]], strict=True):
        name = "all" if a["task_id"] is None else a["task_id"]
        lines.append(f"| {name} | {a['episodes']} | {cell(a)} | {cell(b)} | {a['instruction']} |")
    return "\n".join(lines)
