"""A run's checkpoints: whole or absent, with checksums, read back without unpickling; and what a numerical error leaves behind."""

import hashlib
import json
import os
import shlex
import shutil
import sys

import numpy as np
import torch

from support.errors import UserError
from support.files import atomic_write, sync_directory


def save_checkpoint(out, iteration, actor_critic, state, keep, best):
    """Write checkpoints/<iteration>/ atomically: everything into a temporary directory, synced, then renamed.

    adapters/: LoRA and value head (safetensors). state.pt: optimisers, generators, environments, counters (tensors and
    plain values only, read back with weights_only=True). sha256.json: of each file. The newest `keep` and the best
    stay.
    """
    root = out / "checkpoints"
    final, temporary = root / f"{iteration:06d}", root / f"{iteration:06d}.tmp"

    def write():
        root.mkdir(parents=True, exist_ok=True)
        for left_over in root.glob("*.tmp"):
            shutil.rmtree(left_over)
        temporary.mkdir()
        actor_critic.save_adapters(temporary / "adapters")
        torch.save(state, temporary / "state.pt")
        atomic_write(temporary / "sha256.json", json.dumps(checksums(temporary, sync=True)))
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_directory(root)
        saved = sorted(p for p in root.iterdir() if p.name.isdigit())
        older = [p for p in saved if int(p.name) <= iteration]
        newer = saved[len(older) :]  # damaged ones, which the run fell back from: their future did not happen
        for old in older[:-keep] + newer:
            if int(old.name) != best:
                shutil.rmtree(old, ignore_errors=True)

    failures = (OSError, RuntimeError, UserError)  # torch.save reports a full disk as RuntimeError
    try:
        try:
            write()
        except failures:
            if root.exists():
                raise
            write()  # somebody deleted or moved the run's directory meanwhile: once more, as `Run._bring_back_directory` does
    except failures as exc:
        shutil.rmtree(temporary, ignore_errors=True)
        why = getattr(exc, "strerror", None) or str(exc).strip().splitlines()[0]
        # None at the start, and none where somebody deleted the directory.
        earlier = any(path.name.isdigit() for path in root.glob("*"))
        next_step = (
            f"the previous one is intact. Free some space, then: python train.py --resume {shlex.quote(str(out))}"
            if earlier
            else "there is no other. Free some space, then start again"
        )
        raise UserError(f"cannot write the checkpoint {final}: {why}; {next_step}") from exc


def checksums(directory, sync=False):
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


def load_checkpoint(out, actor_critic, frozen=None):
    """The newest readable checkpoint: loads the adapters and returns its state. A damaged one is named and passed over.

    Checksums come first: a flipped bit in the middle of a tensor would load without a complaint.
    frozen: {name or path: fingerprint} of the weights that checkpoints leave out, as they are now; UserError where the run
    began with others.
    """
    saved = sorted((p for p in (out / "checkpoints").glob("*") if p.name.isdigit()), reverse=True)
    for path in saved:
        try:
            if json.loads((path / "sha256.json").read_text()) != checksums(path):
                raise UserError("a file differs from its checksum")
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            changed = (
                []
                if frozen is None
                else [x for x, y in zip(frozen, state["weights"], strict=True) if frozen[x] != y]
            )
            if not changed:
                actor_critic.load_adapters(path / "adapters")
        except Exception as exc:
            # Readers raise nearly every kind for damaged bytes; whichever it is gets printed.
            reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
            print(f"warning: {path} is damaged ({reason}); trying the one before", file=sys.stderr)
            continue
        if changed:
            raise UserError(f"{changed[0] or 'no reward model'} is not what {out} began with: put that back")
        return state
    raise UserError(f"{out} holds no readable checkpoint: start again with another --out")


def save_debug_bundle(path, error, iteration, buffer, actor_critic, optimizers, generators):
    """What led to a NumericsError, as a file for `torch.load(…, weights_only=True)`. Returns where, in words.

    "quantity", "indices" (t * N + n in the rollout), "minibatch": every field of the buffer at those indices (without
    indices: of the whole rollout); "trainable": adapters and value head; "not_finite": their names where weight or
    gradient is not; "optimizers": {name: state}; "generators": {name: state}, torch's global one included.
    The checkpoint before it is untouched: resuming from it meets the same error again, for a debugger.
    """
    rows = torch.arange(buffer.size) if error.indices is None else error.indices.cpu()
    t, n = rows // buffer.num_envs, rows % buffer.num_envs
    trainable = {name: p for name, p in actor_critic.named_parameters() if p.requires_grad}
    bad = [
        k
        for k, p in trainable.items()
        if not all(torch.isfinite(x).all() for x in (p, p.grad) if x is not None)
    ]
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
    """numpy arrays -> tensors, so that `weights_only` can read them back."""
    if isinstance(tree, dict):
        return {k: to_tensors(v) for k, v in tree.items()}
    if isinstance(tree, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(tree))
    return tree


def to_numpy(tree):
    if isinstance(tree, dict):
        return {k: to_numpy(v) for k, v in tree.items()}
    return tree.numpy() if isinstance(tree, torch.Tensor) else tree
