"""Merge a run's policy adapter into the policy that the run started from; write the result in the official layout.

    python -m models.merge --run runs/libero_object-seed0 --out policy              # its newest checkpoint
    python -m models.merge --run runs/x/checkpoints/000040 --out policy             # another one
    python -m models.merge --adapter lora --base openvla/openvla-7b --out policy    # an adapter in peft's format

From file to file, tensor by tensor: no model is built, and memory holds one shard. `train.py` writes the same at its end.
"""

from dataclasses import dataclass
from pathlib import Path

from support.cli import flag, parse_args


@dataclass
class Args:
    run: str | None = flag(None, "run directory, or one of its checkpoints")
    adapter: str | None = flag(
        None, "instead: directory with adapter_config.json and adapter_model.safetensors"
    )
    base: str | None = flag(
        None, "policy that the adapter was trained on", default="the one that the run started from"
    )
    out: str = flag("runs/merged", "directory of the checkpoint to write")


if __name__ == "__main__":
    args = parse_args(Args, "Merge a LoRA adapter into its base policy.")

import torch
from safetensors import safe_open

from models.adapters import base_fingerprint, read_tensors
from models.checkpoints import (
    MAX_SHARD_BYTES,
    read_norm_stats,
    read_side_files,
    resolve_checkpoint,
    tensor_table,
    write_checkpoint,
)
from support.errors import UserError, main_guard
from support.files import read_json


def find_adapter(run):
    """A run directory (its newest checkpoint), or one of its checkpoints -> (adapter directory, the run's settings)."""
    path = Path(run).resolve()  # "." has no parents
    saved = sorted(p for p in (path / "checkpoints").glob("*") if p.name.isdigit())
    if (path / "config.json").is_file() and saved:
        path = saved[-1]
    adapter, config = path / "adapters" / "policy", path.parent.parent / "config.json"
    if not adapter.is_dir() or not config.is_file():
        raise UserError(f"{run} is neither a run directory with checkpoints nor one of a run's checkpoints")
    return adapter, read_json(config)


def read_adapter(directory):
    """{name of a base tensor: (A (r, in), B (out, r))} in float32, the scale of their product, the base's fingerprint or None."""
    config, path = read_json(directory / "adapter_config.json"), directory / "adapter_model.safetensors"
    for key in (
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "fan_in_fan_out",
    ):
        if config.get(key):
            raise UserError(f"{directory}/adapter_config.json: {key} is not supported")
    try:
        scale = config["lora_alpha"] / config["r"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{directory}/adapter_config.json holds no lora_alpha and r: {error!r}") from error
    tensors, base = read_tensors(path)
    tensors = {name.removeprefix("base_model.model."): tensor.float() for name, tensor in tensors.items()}
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    if len(tensors) != 2 * len(layers) or not all(f"{layer}.lora_B.weight" in tensors for layer in layers):
        raise UserError(f"{path} holds other tensors than pairs of lora_A and lora_B")
    pairs = {
        layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers
    }
    return pairs, scale, base


def merge(adapter, base, out, max_shard_bytes=MAX_SHARD_BYTES, temperature=None):
    """Write `base` (directory or hub id) with the adapter in the directory `adapter` merged: W + scale x B A for W.
    temperature: at which the merged policy is meant to act (default: as the base)."""
    adapter = Path(adapter).resolve()
    folder = resolve_checkpoint(base)
    table, (pairs, scale, fingerprint) = tensor_table(folder), read_adapter(adapter)
    files = {}

    def read(name):
        path = table[name].path
        if path not in files:
            files.clear()  # one open file: names of a shard are next to each other in most checkpoints
            files[path] = safe_open(path, framework="pt")
        return files[path].get_tensor(name)

    for layer, (a, b) in pairs.items():
        shape = table[f"{layer}.weight"].shape if f"{layer}.weight" in table else None
        if shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise UserError(
                f"{adapter} does not fit {base}: {layer} is {(b.shape[0], a.shape[1])} in one and {shape} in the other"
            )
    if fingerprint and fingerprint != base_fingerprint(pairs, read):
        raise UserError(f"{adapter} was trained on other weights than those of {base}")

    def merged(name, _):
        weight = read(name)
        if name.removesuffix(".weight") not in pairs or not name.endswith(".weight"):
            return weight
        a, b = pairs[name.removesuffix(".weight")]
        return (weight.float() + (b @ a) * scale).to(weight.dtype)

    config = read_json(folder / "config.json")
    config["norm_stats"] = read_norm_stats(folder, config)
    if adapter.parent.name == "adapters":  # sft.py's are beside it: of the data that it learnt from
        config["norm_stats"] = read_norm_stats(adapter.parent.parent, config)
    if temperature is not None and temperature != config.get("sampling_temperature", 0.0):
        config["sampling_temperature"] = temperature
    write_checkpoint(out, config, table, merged, read_side_files(folder), max_shard_bytes)


@main_guard
@torch.no_grad()
def main(args):
    if (args.run is None) == (args.adapter is None):
        raise UserError("give either --run or --adapter (see --help)")
    adapter, settings = find_adapter(args.run) if args.run else (args.adapter, {})
    base = args.base or settings.get("model")
    if base is None:
        raise UserError("--base is needed: which policy was this adapter trained on?")
    merge(adapter, base, args.out, temperature=settings.get("eval_temperature"))
    print(f"{adapter} merged into {base}: {args.out}")


if __name__ == "__main__":
    main(args)
