"""OpenVLA-7B with random weights: memory and times of everything that train.py does with it, in minutes.

python -m bench gpu                               # on a GPU; 15 GB of disk, removed at the end
python -m bench gpu --size small --device cpu     # the same steps with a model of 10 M parameters
python -m bench gpu --only-weights                # write the weights and leave them, for a run of train.py
"""

import contextlib
import gc
import json
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from bench.decode import OURS, compare
from bench.model import choose_device, device_flag, load, observations
from bench.update import rollout_buffer, updater
from models.checkpoints import LLAMA_DEFAULTS, TIMM_TOWERS
from models.tiny import libero_words, tiny_tokenizer
from policy import PROMPT, ActorCritic, OpenVLA
from support.cli import flag
from support.errors import UserError
from support.files import atomic_write


@dataclass
class Args:
    size: str = flag("7B", "small: the same steps with a model of 10 M parameters", choices=("7B", "small"))
    device: str = device_flag()
    num_envs: int = flag(10, "environments whose frames one rollout step takes", min=1)
    samples: int = flag(64, "decisions per update, one mini-batch", min=2)
    micro_batch_size: int = flag(8, "decisions per backward pass", min=1)
    rounds: int = flag(3, "repetitions; medians are reported", min=1)
    directory: Path = flag(
        Path("runs/random-openvla"), "where the weights go (7B: 15 GB), removed at the end"
    )
    only_weights: bool = flag(False, "write the weights there in bfloat16, with a tokenizer, and leave them")
    out: Path = flag(Path("runs/bench-gpu.json"), "where the numbers go, after every stage")


def random_config(size):
    """config.json in the official layout: 7B's, or one with towers and a Llama of a few narrow layers."""
    config = {
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_sizes": [224, 224],
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "timm_model_ids": list(TIMM_TOWERS),
        "norm_stats": {"libero_object": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}},
        "text_config": {"vocab_size": LLAMA_DEFAULTS["vocab_size"], "pad_token_id": 32000},
    }
    if size == "small":
        narrow = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
        config["vision_configs"] = [{**tower, **narrow} for tower in TIMM_TOWERS.values()]
        config["text_config"] |= {**narrow, "hidden_size": 128}
    return config


def random_checkpoint(directory, config, dtype, device, max_shard_bytes=5_000_000_000):
    """Write random weights in the official layout, with the tensors that official files hold and nobody computes with:
    last block and final norm of both towers, and SigLIP's pooling head."""
    model = OpenVLA.from_config(config, dtype=dtype, device=device)

    def unused(name, *shape):
        model.unused[name] = torch.randn(shape).to(dtype)

    for tower_name in ("featurizer", "fused_featurizer"):
        tower, prefix = getattr(model.vision_backbone, tower_name), f"vision_backbone.{tower_name}."
        width = tower.pos_embed.shape[-1]
        for name, p in tower.blocks[-1].named_parameters():
            unused(f"{prefix}blocks.{len(tower.blocks)}.{name}", *p.shape)
        unused(f"{prefix}norm.weight", width)
        unused(f"{prefix}norm.bias", width)
    pool, hidden = "vision_backbone.fused_featurizer.attn_pool.", tower.blocks[0].mlp.fc1.out_features
    unused(f"{pool}latent", 1, 1, width)
    for name, rows, columns in (
        ("q", width, width),
        ("kv", 2 * width, width),
        ("proj", width, width),
        ("mlp.fc1", hidden, width),
        ("mlp.fc2", width, hidden),
    ):
        unused(f"{pool}{name}.weight", rows, columns)
        unused(f"{pool}{name}.bias", rows)
    unused(f"{pool}norm.weight", width)
    unused(f"{pool}norm.bias", width)
    # Words of LIBERO, with ids below 32,000: what train.py needs to go through all its motions.
    model.side_files["tokenizer.json"] = tiny_tokenizer(libero_words(), PROMPT).to_str().encode()
    model.save_pretrained(directory, max_shard_bytes)


def anonymous_memory():
    """Bytes of host memory that are this process's own: without the pages of files that it has mapped."""
    info = psutil.Process().memory_info()
    return info.rss - info.shared


@contextlib.contextmanager
def stage(report, name, args, device):
    """Time and peak memory of a stage: a line on the terminal, an entry in `report["stages"]`, and the file renewed, so
    that whatever happens next, this much is kept. Yields the entry, to which the stage may add."""
    entry, stop, host = {}, threading.Event(), [anonymous_memory()]

    def watch():
        while not stop.wait(0.02):
            host.append(anonymous_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watcher.start()
    began = time.perf_counter()
    try:
        yield entry
        if device == "cuda":
            torch.cuda.synchronize()
    finally:
        stop.set()
        watcher.join()
    entry["seconds"] = time.perf_counter() - began
    entry["host_gb"] = (max(host) - host[0]) / 1e9  # growth at the peak
    if device == "cuda":
        entry["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        entry["gpu_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    report["stages"][name] = entry
    atomic_write(args.out, json.dumps(report, indent=2) + "\n")
    gpu = f"{entry['gpu_gb']:8.1f}" if device == "cuda" else "       -"
    print(
        f"{name:44s}{entry['seconds']:8.1f}{gpu}{entry['host_gb']:8.1f}  {entry.get('note', '')}", flush=True
    )


def median_ms(run, rounds, device):
    """Median time of `run()` in ms by the clock, after one call that warms up."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times[1:]))


def measure(args):
    """Every stage is one that `train.py` goes through."""
    device, dtype, name = choose_device(args.device)
    if device == "cpu" and args.size == "7B" and not args.only_weights:
        raise UserError("no GPU here, and 7B need one; --size small runs the same steps on a CPU")
    if args.directory.exists():
        raise UserError(f"{args.directory} exists already: remove it, or give another --directory")
    config, shard = random_config(args.size), 5_000_000_000 if args.size == "7B" else 10_000_000
    if args.only_weights:
        random_checkpoint(args.directory, config, torch.bfloat16, device, shard)
        return dict(size=args.size, directory=str(args.directory), stages={})
    report = dict(
        size=args.size,
        device=name,
        dtype=str(dtype),
        num_envs=args.num_envs,
        samples=args.samples,
        micro_batch_size=args.micro_batch_size,
        stages={},
    )
    if device == "cuda":
        report["gpu_memory_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    print(f"{args.size}, {name}, {dtype}\n{'stage':44s}{'s':>8s}{'GPU GB':>8s}{'host GB':>8s}  (peaks)")
    N = args.num_envs
    frames = np.random.default_rng(0).integers(0, 256, (N, 256, 256, 3), dtype=np.uint8)
    try:
        with stage(report, "make the weights and save them", args, device) as entry:
            random_checkpoint(args.directory, config, dtype, device, shard)
            files = sorted(args.directory.glob("*.safetensors"))
            entry["file_gb"] = sum(file.stat().st_size for file in files) / 1e9
            entry["note"] = f"{len(files)} shards, {entry['file_gb']:.2f} GB"
        with stage(report, "load", args, device):
            model = load(args.directory, device, dtype)
        with stage(report, "actor-critic, all layers", args, device) as entry:
            actor_critic = ActorCritic(model)
            parameters = sum(p.numel() for p in actor_critic.parameters() if p.requires_grad)
            entry["note"] = f"{parameters / 1e6:.1f} M trained parameters"
        with stage(report, "merge for rollouts", args, device):
            merged = actor_critic.evaluation_policy()
        with stage(report, f"rollout steps of {N} environments", args, device) as entry, torch.no_grad():
            ids, mask, pixels = observations(model, N)
            parts = {
                "preprocess": lambda: model.preprocess(frames).to(dtype),
                "towers": lambda: merged.embed_images(pixels),
                "prompt": lambda: merged.prompt_state(ids, mask, pixel_values=pixels),  # with towers
                "tokens": lambda: merged.generate_actions(ids, pixels, mask, temperature=1.5),  # with both
                "value": lambda: actor_critic.value(ids, mask, pixel_values=pixels),
                "decision": lambda: actor_critic.act(ids, mask, pixel_values=pixels, temperature=1.5),
            }
            entry["ms"] = {part: median_ms(run, args.rounds, device) for part, run in parts.items()}
            entry["note"] = "ms: " + ", ".join(f"{part} {ms:.0f}" for part, ms in entry["ms"].items())
        with stage(report, "decode against transformers", args, device) as entry, torch.no_grad():
            entry |= compare(merged, N, args.rounds, device)
            entry["note"] = (
                f"{entry['rates'][OURS]['per_s']:.1f} actions/s, {entry['ratio_to_one']:.2f} x one at a "
                f"time, {entry['ratio_to_batched']:.2f} x transformers' batch"
            )
        for targets, checkpointing in (
            ("all", True),
            ("language", True),
            ("language", False),
            ("all", False),
        ):
            model = actor_critic.base_policy()
            del actor_critic, merged
            gc.collect()
            label = f"update, {targets} layers" + (", checkpointing" if checkpointing else "")
            with stage(report, label, args, device) as entry:
                model.gradient_checkpointing = checkpointing
                actor_critic = ActorCritic(model, targets=targets)
                merged = actor_critic.evaluation_policy()  # in memory during updates, as in training
                kind = "patch_embeddings" if targets == "language" else "pixel_values"
                try:
                    buffer = rollout_buffer(actor_critic, model, args.samples, kind)
                    run = updater(actor_critic, buffer, args.micro_batch_size)
                    entry["samples_per_s"] = 1e3 * buffer.size / median_ms(run, args.rounds, device)
                    entry["note"] = f"{entry['samples_per_s']:.2f} samples/s"
                except (UserError, torch.OutOfMemoryError) as exc:
                    if "out of memory" not in str(exc):
                        raise
                    entry["note"] = "out of memory"
                buffer = run = None
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)
    return report


def show(r):
    if not r["stages"]:
        return print(f"random weights of size {r['size']} in {r['directory']}")
    print(
        "seconds by the clock; GPU GB: peak of allocated memory (the process takes somewhat more); host GB: growth of\n"
        "the process's own memory at its peak. An update stage holds weights, merged copy, adapters, optimisers and\n"
        "activations; language layers: with cached features."
    )
