"""Which policy `train.py` starts from, and which reward model goes with it, where nobody names one."""

import dataclasses
from pathlib import Path

import torch

from models.checkpoints import hub_cache, resolve_checkpoint
from models.memory import Needs
from support.errors import UserError
from support.files import read_json

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"  # checkpoints/<suite>/{policy,rprm}


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


def choose_model(model, suite, flags):
    """Resolve `--model` to (path or hub id, "tiny" or "7B", reason).

    flags: {name: value} of the command line with 7B's defaults, for what 7B would need of memory.
    """
    official = f"openvla/openvla-7b-finetuned-{suite.replace('_', '-')}"
    if model == "openvla-tiny":
        return shipped(suite, "policy"), "tiny", "asked for"
    if model != "auto":
        is_directory = Path(model).expanduser().is_dir()
        # Of a hub id, what is in the cache: nothing is fetched before the flags are known to be right.
        folder = resolve_checkpoint(model) if is_directory else hub_cache(model)
        small = folder is not None and "vision_configs" in read_json(folder / "config.json")
        return str(folder) if is_directory else model, "tiny" if small else "7B", "asked for"
    if not torch.cuda.is_available():
        return shipped(suite, "policy"), "tiny", "no GPU"
    folder = hub_cache(official)
    if folder is None:
        return (
            shipped(suite, "policy"),
            "tiny",
            f"a GPU, but no weights: `hf download {official}` fetches them",
        )
    memory = torch.cuda.get_device_properties(0).total_memory
    dtype = torch.float32 if flags.get("dtype") == "float32" else torch.bfloat16
    needs = Needs.of_flags(folder, dtype, flags)
    if memory < needs.total("cuda"):
        less = dataclasses.replace(needs, gradient_checkpointing=True).total("cuda")
        hint = "" if needs.gradient_checkpointing else f" ({less / 1e9:.0f} with --gradient-checkpointing)"
        reason = f"the GPU has {memory / 1e9:.0f} GB, OpenVLA-7B needs {needs.total('cuda') / 1e9:.0f}{hint}"
        return shipped(suite, "policy"), "tiny", reason
    return official, "7B", "GPU and weights are there"
