"""What a training run leaves behind and survives on: metrics, curve, videos, checkpoints, signals.

Nothing here is about the method; train.py stays readable without it. Three promises:

* Everything that `--resume` needs is written once per iteration, into a temporary name, synced, then renamed: a kill or a
  full disk at any moment leaves the previous state whole.
* A line of metrics.jsonl is synced before the next iteration starts. Lines newer than the checkpoint are dropped at resume.
* Ctrl-C and SIGTERM end a run between two decisions; after 10 seconds (a long update, a hung driver) wherever it is.
  That is safe because of the first promise.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import threading

import numpy as np

from support.errors import UserError
from support.files import atomic_write, sync_directory


class Stop:
    """Ctrl-C and SIGTERM set a flag that the loop reads after every decision; a second one ends the process at once.

    Until `begin` nothing is worth saving, and the first one interrupts whatever is being built or loaded.
    """

    GRACE = 10.0  # seconds from the first signal until the process ends wherever it is

    def __init__(self, out, say=print):
        self.hint = f"stopped; every finished iteration is saved. Go on with: python train.py --resume {out}"
        self.begun = self.requested = False
        self.say = say  # of several ranks, one speaks
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._request)

    def begin(self):
        # Python runs handlers between two bytecodes of the main thread, so never while that thread hangs in a driver.
        # But the number of each signal comes out of this socket at once, where another thread waits for it.
        self._alarm = socket.socketpair()
        self._alarm[1].setblocking(False)
        signal.set_wakeup_fd(self._alarm[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._guard, daemon=True).start()
        self.begun = True

    def check(self, *_):
        """Leave whatever is running, if somebody asked for it."""
        if self.requested:
            raise KeyboardInterrupt

    def _request(self, number, frame):
        if not self.begun:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self.say("\nstopping after this decision (once more: at once)", file=sys.stderr, flush=True)

    def _guard(self):
        """End the process at the second signal at once, and some time after the first wherever it is."""
        self._next_signal()
        late = threading.Timer(self.GRACE, self._leave)
        late.daemon = True
        late.start()
        os._exit(128 + self._next_signal())  # workers leave by themselves when their pipe closes

    def _next_signal(self):
        while (number := self._alarm[0].recv(1)[0]) not in (signal.SIGINT, signal.SIGTERM):
            pass
        return number

    def _leave(self):
        self.say(self.hint, file=sys.stderr, flush=True)
        os._exit(130)


# --------------------------------------------------------------------------------------------------------------------
# Logging
# --------------------------------------------------------------------------------------------------------------------


class Metrics:
    """metrics.jsonl (one synced line per iteration, the source of truth), TensorBoard, and the terminal's line."""

    KEYS = {"iteration", "charts/decisions", "charts/successes", "charts/episodes"}  # what the curve needs

    def __init__(self, out, lines):
        self.path, self.lines = out / "metrics.jsonl", lines
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
                if known and (lines[-1]["iteration"] if lines else 0) < m["iteration"] <= last:
                    lines.append(m)
        if len(lines) < last:
            print(f"warning: {out}/metrics.jsonl holds {len(lines)} of {last} iterations", file=sys.stderr)
        return lines

    def open(self):
        from torch.utils.tensorboard import SummaryWriter

        lines, out = self.lines, self.path.parent
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
        with contextlib.suppress(OSError):  # on a full disk the last line stays in the buffer, and was reported
            self.file.close()
            self.board.close()


def terminal_line(m, iterations, seconds_left):
    success = f"{100 * m['charts/success_rate']:3.0f} %" if m["charts/episodes"] else "  - "
    phase = (
        "warm-up"
        if "losses/policy_loss" not in m
        else f"kl {m['losses/approx_kl']:.3f} clip {100 * m['losses/clipfrac']:2.0f} % ent {m['losses/entropy']:.1f}"
    )
    what = "start policy" if m.get("eval/at") == 0 else "eval"
    evaluated = f"  {what} {100 * m['eval/success_rate']:.0f} %" if "eval/success_rate" in m else ""
    return (
        f"it {m['iteration']:4d}/{iterations}  {m['charts/decisions']:>9,} decisions  success {success} of {m['charts/episodes']:3d}  "
        f"ev {m['losses/explained_variance']:5.2f}  {phase}  rollout {m['time/rollout']:.1f} s (inference {m['time/inference']:.1f}) "
        f"update {m['time/update']:.1f} s  left {seconds_left / 60:.0f} min{evaluated}"
    )


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------------


def save_checkpoint(out, iteration, actor_critic, state, keep, best):
    """Write checkpoints/<iteration>/ atomically: everything into a temporary directory, synced, then renamed.

    adapters/: LoRA and value head (safetensors). state.pt: optimisers, generators, environments, counters (tensors and
    plain values only, read back with weights_only=True). sha256.json: of each file. The newest `keep` and the best
    stay.
    """
    import torch

    root = out / "checkpoints"
    final, temporary = root / f"{iteration:06d}", root / f"{iteration:06d}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left_over in root.glob("*.tmp"):
            shutil.rmtree(left_over)
        temporary.mkdir()
        actor_critic.save_adapters(temporary / "adapters")
        torch.save(state, temporary / "state.pt")
        atomic_write(temporary / "sha256.json", json.dumps(_checksums(temporary, sync=True)))
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_directory(root)
    except (OSError, RuntimeError, UserError) as exc:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        why = getattr(exc, "strerror", None) or str(exc).strip().splitlines()[0]
        raise UserError(
            f"cannot write the checkpoint {final}: {why}; the previous one is intact. Free some "
            f"space, then: python train.py --resume {out}"
        ) from exc
    saved = sorted(p for p in root.iterdir() if p.name.isdigit())
    older = [p for p in saved if int(p.name) <= iteration]
    newer = saved[len(older) :]  # damaged ones, which the run fell back from: their future did not happen
    for old in older[:-keep] + newer:
        if int(old.name) != best:
            shutil.rmtree(old, ignore_errors=True)


def _checksums(directory, sync=False):
    """{relative name: SHA-256} of the files below `directory`; sync: flush each to the disk."""
    sums = {}
    for path in sorted(p for p in directory.rglob("*") if p.name != "sha256.json"):
        if path.is_file():
            with open(path, "rb") as file:
                sums[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
                if sync:
                    os.fsync(file.fileno())
        elif sync:
            sync_directory(path)
    return sums


def load_checkpoint(out, actor_critic):
    """The newest readable checkpoint: loads the adapters and returns its state. A damaged one is named and passed over.

    Checksums come first: a flipped bit in the middle of a tensor would load without a complaint.
    """
    import torch

    saved = sorted((p for p in (out / "checkpoints").glob("*") if p.name.isdigit()), reverse=True)
    for path in saved:
        try:
            if json.loads((path / "sha256.json").read_text()) != _checksums(path):
                raise UserError("a file differs from its checksum")
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            actor_critic.load_adapters(path / "adapters")
            return state
        except Exception as exc:  # readers raise nearly every kind for damaged bytes; whichever it is gets printed
            reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
            print(f"warning: {path} is damaged ({reason}); trying the one before", file=sys.stderr)
    raise UserError(f"{out} holds no readable checkpoint: start again with another --out")


def restore_directory(out, config, metrics):
    """Make a run directory that somebody deleted again, from memory: hours of training are worth more than an exit.

    The next checkpoint makes it resumable. Videos, TensorBoard's past and older checkpoints are gone. Moving the
    directory away amounts to the same.
    """
    if not (out / "config.json").exists():
        print(f"warning: {out} has vanished; writing it again", file=sys.stderr)
        metrics.close()
        atomic_write(out / "config.json", config)
        metrics.open()


def save_debug_bundle(path, error, iteration, buffer, actor_critic, optimizers, generators):
    """What led to a NumericsError, as a file for `torch.load(…, weights_only=True)`. Returns where, in words.

    "quantity", "indices" (t * N + n in the rollout), "minibatch": every field of the buffer at those indices (without
    indices: of the whole rollout); "trainable": adapters and value head; "not_finite": their names where weight or
    gradient is not; "optimizers": {name: state}; "generators": {name: state}, torch's global one included.
    The checkpoint before it is untouched: resuming from it meets the same error again, for a debugger.
    """
    import torch

    rows = torch.arange(buffer.size) if error.indices is None else error.indices.cpu()
    t, n = rows // buffer.num_envs, rows % buffer.num_envs
    trainable = {name: p for name, p in actor_critic.named_parameters() if p.requires_grad}
    bad = [k for k, p in trainable.items() if not all(torch.isfinite(x).all() for x in (p, p.grad) if x is not None)]
    bundle = {
        "iteration": iteration,
        "quantity": error.quantity,
        "indices": rows,
        "minibatch": {name: x[t, n].cpu() for name, x in vars(buffer).items() if isinstance(x, torch.Tensor)},
        "trainable": {name: p.detach().cpu() for name, p in trainable.items()},
        "not_finite": bad,
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "generators": {**generators, "torch": torch.get_rng_state()},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(bundle, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as exc:  # a full disk: the error that it was for matters more
        return f"It could not be saved for debugging ({str(exc).strip().splitlines()[0]})"
    return f"Its mini-batch, weights and optimisers are in {path} (torch.load, weights_only=True)"


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
