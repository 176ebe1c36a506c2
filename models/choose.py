"""Which policy `train.py` starts from, and which reward model goes with it, where nobody names one."""

from pathlib import Path

import torch

from models.checkpoints import resolve_checkpoint
from support.errors import UserError
from support.files import read_json

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"  # checkpoints/<suite>/{policy,rprm}
# Bytes: weights 15.0 GB, their merged copy for rollouts 14.5, adapters with optimiser 3.5, activations of a micro-batch
# of 8: 30 or, with --gradient-checkpointing, 2 (docs/gpu.md has the sums).
GPU_MEMORY_7B = {False: 66e9, True: 44e9}


def downloaded(repo_id, cache=None):
    """Are all shards of this repository in the hub's cache (default: its usual place)? An interrupted download is not."""
    from huggingface_hub import try_to_load_from_cache

    def path(name):  # None or a mark where it is not there
        found = try_to_load_from_cache(repo_id, name, cache_dir=cache)
        return found if isinstance(found, str) else None

    index = path("model.safetensors.index.json")
    shards = read_json(index).get("weight_map") if index else None
    return isinstance(shards, dict) and len(shards) > 0 and all(path(name) for name in shards.values())


def shipped(suite, kind):
    """Directory of the tiny policy or reward model (`kind`: "policy", "rprm") of a suite; UserError where there is none."""
    path = SHIPPED / suite / kind
    if not path.is_dir():
        there = sorted(p.parent.name for p in SHIPPED.glob(f"*/{kind}"))
        raise UserError(
            f"no {kind} for {suite} in {SHIPPED}, only for {', '.join(there) or 'none'}: `make start SUITE={suite}` makes it "
            "(hours on a CPU), or name a checkpoint, such as OpenVLA-7B's, with --model"
        )
    return str(path)


def choose_model(model, suite, gradient_checkpointing):
    """Resolve `--model` to (path or hub id, "tiny" or "7B", reason)."""
    official = f"openvla/openvla-7b-finetuned-{suite.replace('_', '-')}"
    if model == "openvla-tiny":
        return shipped(suite, "policy"), "tiny", "asked for"
    if model != "auto":
        folder = resolve_checkpoint(model) if Path(model).is_dir() else None  # else a hub id: not now
        small = folder is not None and "vision_configs" in read_json(folder / "config.json")
        return str(folder or model), "tiny" if small else "7B", "asked for"
    if not torch.cuda.is_available():
        return shipped(suite, "policy"), "tiny", "no GPU"
    memory = torch.cuda.get_device_properties(0).total_memory
    needed = GPU_MEMORY_7B[gradient_checkpointing]
    if memory < needed:
        hint = (
            ""
            if gradient_checkpointing
            else f" ({GPU_MEMORY_7B[True] / 1e9:.0f} with --gradient-checkpointing)"
        )
        reason = f"the GPU has {memory / 1e9:.0f} GB, OpenVLA-7B needs {needed / 1e9:.0f}{hint}"
        return shipped(suite, "policy"), "tiny", reason
    if downloaded(official):
        return official, "7B", "GPU and weights are there"
    return shipped(suite, "policy"), "tiny", f"a GPU, but no weights: `hf download {official}` fetches them"
