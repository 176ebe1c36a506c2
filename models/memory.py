"""Number formats, and what a model needs of memory: decided and estimated from a checkpoint's headers, before
minutes go into loading.

dtype = choose_dtype(args.dtype, folder, device)
check_memory(Needs(folder, dtype, num_envs=args.num_envs, ...), device)
"""

import dataclasses
import functools
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from models.adapters import LORA_TARGETS
from models.checkpoints import LLAMA_DEFAULTS, tensor_table, tower_sizes
from support.errors import UserError
from support.files import read_json

DTYPES = ("auto", "bfloat16", "float32")
SMALL_MODEL = 1e9  # parameters; below, float32 is affordable and exact
SMALL_NEED = 1e9  # bytes; below, nobody needs to be warned
TEXT_TOKENS = 40  # of a prompt and its action, generously
RESERVE = 1.5e9  # bytes: CUDA's context and libraries, or the interpreter with its simulator

# --------------------------------------------------------------------------------------------------------------------
# Number formats
# --------------------------------------------------------------------------------------------------------------------


def choose_dtype(asked, folder, device):
    """`--dtype` -> torch dtype of the frozen weights (adapters are float32 in any case).

    auto: float32 for a small model; else bfloat16 on a GPU, and on a CPU that computes it well.
    """
    if asked != "auto":
        return getattr(torch, asked)
    if sum(math.prod(entry.shape) for entry in tensor_table(Path(folder)).values()) < SMALL_MODEL:
        return torch.float32
    if torch.device(device).type == "cpu" and not cpu_computes_bfloat16_well():
        return torch.float32
    return torch.bfloat16


@functools.cache
def cpu_computes_bfloat16_well():
    """Measured: is a matrix product in bfloat16 at most twice as slow as in float32? With AVX512-bf16 or AMX
    it is several times as fast, on older CPUs up to 80 times as slow."""

    def seconds(dtype):
        x, weight = torch.ones(64, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            x @ weight
            times.append(time.perf_counter() - began)
        return min(times)

    return seconds(torch.bfloat16) < 2 * seconds(torch.float32)


# --------------------------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """What decides how much memory a policy takes. The defaults are evaluation's; training gives the rest as
    its flags have them.

    folder: of the checkpoint. dtype: of the weights. shards: ranks that share the backbone's blocks (1: each
    holds all).
    """

    folder: Path
    dtype: torch.dtype
    num_envs: int = 1
    num_steps: int = 0
    critic: str | None = None  # None: no training
    lora_rank: int = 0
    lora_targets: str = "all"
    micro_batch_size: int = 0
    gradient_checkpointing: bool = False
    shards: int = 1

    @classmethod
    def of_flags(cls, folder, dtype, flags, **others):
        """flags: {name: value} of a script's command line, of which those that count are taken."""
        taken = {f.name: flags[f.name] for f in dataclasses.fields(cls) if f.name in flags}
        return cls(**(taken | dict(folder=folder, dtype=dtype) | others))

    def total(self, device):
        """Bytes in all, with a reserve for libraries."""
        return sum(self.parts(device).values()) + RESERVE

    def parts(self, device):
        """{part: bytes} on `device` at the peak of an update, when everything is there at once."""
        table, size = tensor_table(Path(self.folder)), self.dtype.itemsize
        config = read_json(Path(self.folder) / "config.json")
        text, towers = {**LLAMA_DEFAULTS, **config.get("text_config", {})}, tower_sizes(config)
        shapes = {name: entry.shape for name, entry in table.items()}
        weights = size * sum(map(math.prod, shapes.values()))
        blocks = size * sum(
            math.prod(shape) for name, shape in shapes.items() if re.search(r"\.(blocks|layers)\.\d", name)
        )
        patches = (towers[0]["image_size"] // towers[0]["patch_size"]) ** 2
        tokens, width = patches + TEXT_TOKENS, text["hidden_size"]
        cache = self.num_envs * text["num_hidden_layers"] * 2 * tokens * width * size
        parts = {"weights": weights - blocks + blocks / self.shards, "decoding": cache}
        if self.critic is None:
            return parts

        pattern = re.compile(LORA_TARGETS[self.lora_targets])
        adapted = [
            s for name, s in shapes.items() if len(s) == 2 and pattern.fullmatch(name.removesuffix(".weight"))
        ]
        adapters = 2 if self.critic in ("adapter", "separate") else 1
        numbers = adapters * self.lora_rank * sum(map(sum, adapted))
        parts["adapters and optimiser"] = 16 * numbers  # float32: weight, gradient, two moments
        if self.critic == "separate":
            parts["the critic's weights"] = parts["weights"]
        if self.critic != "shared" and self.shards == 1:
            parts["the merged copy for rollouts"] = size * sum(map(math.prod, adapted))
        stacks = [(tokens, width, text["intermediate_size"], text["num_hidden_layers"], 7, 4)]
        if self.lora_targets == "all":
            stacks += [
                (patches, t["hidden_size"], t["intermediate_size"], t["num_hidden_layers"] - 1, 4, 2)
                for t in towers
            ]
        parts["activations of a micro-batch"] = self.micro_batch_size * self._activations(stacks)
        if torch.device(device).type == "cpu":  # elsewhere the rollout stays in host memory
            image = patches * width if self.lora_targets == "language" else 6 * towers[0]["image_size"] ** 2
            parts["the rollout"] = (self.num_steps + 1) * self.num_envs * (image * size + 256 * 256 * 3)
        return parts

    def _activations(self, stacks):
        """Bytes of one sample. stacks: (tokens, width, MLP width, blocks, linear layers, MLP-wide tensors) of
        each transformer.

        Each linear layer with an adapter keeps its input in float32, and a block about 12 tensors of its
        width in the weights' format (within 3 % of what is saved for the backward pass at 7B). Gradient
        checkpointing keeps a block's input alone, and one block.
        """
        size, total, largest = self.dtype.itemsize, 0, 0
        for tokens, width, hidden, blocks, linear, wide in stacks:
            block = tokens * (4 * ((linear - 1) * width + hidden) + size * (12 * width + wide * hidden))
            total += blocks * (tokens * width * size if self.gradient_checkpointing else block)
            largest = max(largest, block)
        return total + largest if self.gradient_checkpointing else total


# What helps, in the order in which it costs least: flag, change of `Needs`.
REMEDIES = (
    ("--dtype bfloat16", dict(dtype=torch.bfloat16)),
    ("--gradient-checkpointing", dict(gradient_checkpointing=True)),
    ("--critic adapter", dict(critic="adapter")),
    ("--micro-batch-size 1", dict(micro_batch_size=1)),
    ("--critic shared", dict(critic="shared")),
    ("--lora-rank 8", dict(lora_rank=8)),
    ("--num-envs 1", dict(num_envs=1)),
)


def free_memory(device):
    """Bytes that are free on the GPU, or available on the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(needs, device, free=None):
    """Raise UserError, one line, if `needs` will not fit on `device`: what needs how much, and which flags
    help. free: bytes."""
    free = free_memory(device) if free is None else free
    if needs.total(device) <= free or needs.total(device) - RESERVE < SMALL_NEED:
        return
    parts = ", ".join(f"{name} {part / 1e9:.1f}" for name, part in needs.parts(device).items() if part > 5e7)
    where = "GPU" if torch.device(device).type == "cuda" else "machine"
    line = f"{needs.folder} with these flags needs about {needs.total(device) / 1e9:.0f} GB ({parts}), "
    line += f"and the {where} has {free / 1e9:.0f} free"
    flags, best = [], needs
    for flag, change in REMEDIES:
        if needs.critic is None and flag not in ("--dtype bfloat16", "--num-envs 1"):
            continue
        changed = dataclasses.replace(best, **change)
        if changed.total(device) < best.total(device):
            flags, best = [*flags, flag], changed
        if best.total(device) <= free:
            raise UserError(f"{line}; {' '.join(flags)} makes it {best.total(device) / 1e9:.0f}")
    least = f", and at least {best.total(device) / 1e9:.0f} with {' '.join(flags)}" if flags else ""
    raise UserError(f"{line}{least}: use --model openvla-tiny, more memory, or --shard on several GPUs")
