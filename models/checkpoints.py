"""OpenVLA's checkpoints in the official layout: what config.json may say, which files there are, reading and
writing them.

    config.json                        sizes, action bins, action statistics (norm_stats)
    model-0000k-of-0000n.safetensors   weights under the official names, with model.safetensors.index.json;
                                       or model.safetensors alone
    dataset_statistics.json            of a fine-tuned checkpoint: overrides config.json's statistics
    tokenizer.json, *.py, ...          `SIDE_FILES`: read as they are, written as they were
"""

import contextlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from support.errors import UserError
from support.files import read_json, sync_directory

# The official config.json leaves these out: they are transformers 4.40.1's Llama defaults and timm's model definitions.
LLAMA_DEFAULTS = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064,
    rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=2048, pad_token_id=32000,
)  # fmt: skip
TIMM_TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14,
        image_size=224, num_register_tokens=4,
    ),
    "vit_so400m_patch14_siglip_224": dict(
        hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, patch_size=14,
        image_size=224, num_register_tokens=0,
    ),
}  # fmt: skip
# What belongs to an official checkpoint besides config and weights; saving brings along what loading found.
SIDE_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "generation_config.json", "configuration_prismatic.py", "modeling_prismatic.py",
    "processing_prismatic.py",
)  # fmt: skip
HUB_FILES = ["*.safetensors", "*.json", "*.py", "*.txt", "*.model", "*.jinja"]
MAX_SHARD_BYTES = 5_000_000_000
ACTION_DIM = 7
# The names of number formats in safetensors' headers.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# config.json
# --------------------------------------------------------------------------------------------------------------------


def tower_sizes(config):
    """Sizes of the two vision towers: `vision_configs` of openvla-tiny, else timm's of the models named."""
    if "vision_configs" in config:
        return config["vision_configs"]
    for name in (names := config.get("timm_model_ids", [])):
        if name not in TIMM_TOWERS:
            raise UserError(
                f"config.json: no sizes for vision tower {name!r}; known: {', '.join(TIMM_TOWERS)}"
            )
    return [TIMM_TOWERS[name] for name in names]


def check_config(config):
    """Raise UserError unless every number that the model relies on is there and possible. (A number of layers
    that is a typing error would otherwise be built, layer by layer, until the memory is full.)"""

    def whole(table, name, low, high, default=None):
        value = table.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"config.json: {name} is {value!r}, not a whole number from {low} to {high}")
        return value

    def transformer(table):
        width, heads = whole(table, "hidden_size", 1, 2**16), whole(table, "num_attention_heads", 1, 2**10)
        whole(table, "num_hidden_layers", 1, 1000), whole(table, "intermediate_size", 1, 2**18)
        if width % (2 * heads):
            raise UserError(
                f"config.json: {heads} attention heads do not divide the width {width} into even parts"
            )

    if "quantization_config" in config:
        raise UserError(
            "config.json: quantised weights (quantization_config) are not supported; give the checkpoint that "
            "they were made of"
        )
    towers, text = tower_sizes(config), config.get("text_config", {})
    if (
        not isinstance(towers, list)
        or len(towers) != 2
        or not all(isinstance(x, dict) for x in [*towers, text])
    ):
        raise UserError(
            "config.json is not an OpenVLA configuration: two vision towers and a text_config are expected"
        )
    for tower in towers:
        transformer(tower)
        (
            whole(tower, "patch_size", 1, whole(tower, "image_size", 1, 4096)),
            whole(tower, "num_register_tokens", 0, 1000),
        )
    if len({(t["image_size"], t["image_size"] // t["patch_size"]) for t in towers}) != 1:
        raise UserError("config.json: the two vision towers need the same image size and number of patches")
    text = {**LLAMA_DEFAULTS, **text}
    transformer(text)
    if text.get("num_key_value_heads", text["num_attention_heads"]) != text["num_attention_heads"]:
        raise UserError("config.json: grouped key-value heads are not supported (OpenVLA's Llama 2 has none)")
    vocabulary = whole(text, "vocab_size", 1, 2**24)
    whole(text, "max_position_embeddings", 1, 2**20), whole(text, "pad_token_id", 0, vocabulary - 1)
    whole(config, "n_action_bins", 2, vocabulary - whole(config, "pad_to_multiple_of", 0, vocabulary))
    whole(config, "suffix_token_id", 0, vocabulary - 1, 29871), whole(config, "action_repeat", 1, 1000, 1)
    temperature = config.get("sampling_temperature", 0.0)
    if type(temperature) not in (int, float) or not 0 <= temperature < math.inf:
        raise UserError(f"config.json: sampling_temperature is {temperature!r}, not a number from 0")
    for name in ("rms_norm_eps", "rope_theta"):
        if not isinstance(text[name], (int, float)) or not 0 < text[name] < math.inf:
            raise UserError(f"config.json: {name} is {text[name]!r}, not a positive number")
    if not isinstance(config.get("norm_stats", {}), dict):
        raise UserError("config.json: norm_stats is no table")


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def resolve_checkpoint(name, kind="policy"):
    """What a person calls a checkpoint -> its directory, a Path. kind: "policy" or "reward model".

    A directory is itself, or where it is a run's (or `checkpoints/<suite>`) its `policy` or `rprm`; any other name of
    the form owner/name is looked for in the hub's cache, then on the hub, whatever else lies in the current directory.
    Raises UserError that says what was tried, and for a policy of another kind than is understood here.
    """
    path = Path(name).expanduser()
    folder = _own_or_inner(path, kind) if path.is_dir() else _from_hub(str(name), kind)
    if kind == "policy":
        refuse_relatives(folder)
    return folder


def _own_or_inner(folder, kind):
    inner = folder / {"policy": "policy", "reward model": "rprm"}[kind]
    has_config = (folder / "config.json").is_file()
    # train.py's settings, not a model's
    is_run = has_config and "total_steps" in read_json(folder / "config.json")
    if inner.is_dir() and (is_run or not has_config):
        return inner
    if is_run and kind == "reward model":
        raise UserError(f"the run {folder} holds no reward model: give one that `scripts.rprm train` made")
    if is_run:
        raise UserError(
            f"the run {folder} has no {inner.name}/: it is saved at the end. `python -m models.merge --run {folder} "
            "--out DIR` makes one of its newest checkpoint"
        )
    if not has_config and not (folder / "rprm.json").is_file():
        raise UserError(f"{folder} is not a {kind}: it has no config.json")
    return folder


def _from_hub(name, kind):
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise UserError(f"no checkpoint at {name}: not a directory (nor a hub id such as openvla/openvla-7b)")
    if folder := hub_cache(name):
        return folder
    from huggingface_hub import snapshot_download  # late: only who names a hub id waits for its import

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        weight_files(folder)  # offline, it answers with what there is, be it an interrupted download
        return folder
    except Exception as error:  # the hub client raises many kinds; each means "not available", and says why
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no directory {name} here, no {kind} of that name (not all of it) in the hub's cache, and the model hub "
            f"did not give it: "
            f"{reason}"
        ) from error


def hub_cache(name):
    """Directory of a repository in the hub's cache if all of its weights are there; None for an interrupted
    download."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        weight_files(folder)
    except Exception:  # of many kinds: not there, or not all of it
        return None
    return folder if (folder / "config.json").is_file() else None


def refuse_relatives(folder):
    """Raise UserError for directories that have OpenVLA's config.json and tensor names and are another model:
    played as a policy they never succeed, without a word."""
    if (folder / "rprm.json").is_file():
        raise UserError(f"{folder} is a reward model (rprm.json), where a policy is needed")
    for pattern in (
        "action_head--*",
        "proprio_projector--*",
        "noisy_action_projector--*",
        "vision_backbone--*",
    ):
        for path in sorted(folder.glob(pattern)):
            raise UserError(
                f"{folder} is an OpenVLA-OFT checkpoint ({path.name}): its actions come from parts that are not "
                "implemented here"
            )
    if (folder / "lora_adapter").is_dir():
        raise UserError(
            f"{folder} holds an unmerged adapter (lora_adapter/), without which its weights are not the policy that "
            "was trained. If plain OpenVLA was fine-tuned: `python -m models.merge --adapter .../lora_adapter --base "
            "openvla/openvla-7b --out DIR`"
        )


def weight_files(folder):
    """The safetensors files of a checkpoint, sorted. Raises UserError if one that the index names is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        files = read_json(index).get("weight_map")
        names = list(files.values()) if isinstance(files, dict) else []
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise UserError(f"{index}: weight_map must name files of this directory")
    for name in (names := sorted(set(names))):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: the weights file {name} is missing")
    return [folder / name for name in names]


def read_tensors(folder, shapes):
    """Yield (name, tensor) of every tensor in a checkpoint, one at a time. A tensor is the mapped file: copy
    what you keep.

    shapes: {name: shape} of those that must be there. Raises UserError for a damaged file, another shape, a
    missing tensor.
    """
    missing = set(shapes)
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    tensor = file.get_tensor(name)
                    if name in shapes and tensor.shape != shapes[name]:
                        raise UserError(
                            f"{path}: {name} has shape {tuple(tensor.shape)}, but config.json implies "
                            f"{tuple(shapes[name])}"
                        )
                    if name in shapes and not tensor.is_floating_point():
                        raise UserError(
                            f"{path}: {name} is {tensor.dtype}: quantised weights are not supported"
                        )
                    missing.discard(name)
                    yield name, tensor
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read (truncated?): {error}; get it again") from error
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} tensors are missing from the weights, the first is {min(missing)}"
        )


class Entry(NamedTuple):
    """A tensor of a checkpoint, by the header of its file."""

    path: Path
    dtype: torch.dtype
    shape: tuple

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_table(folder):
    """{tensor name: Entry} of a checkpoint. Reads headers, no weights."""
    table = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:  # which also finds what is too short for its header
                for name in file.keys():
                    part = file.get_slice(name)  # reads nothing yet
                    table[name] = Entry(path, DTYPES[part.get_dtype()], tuple(part.get_shape()))
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path} cannot be read (truncated?): {error!r}; get it again") from error
    return table


def read_side_files(folder):
    """{name: bytes} of those of SIDE_FILES that are there."""
    return {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}


def read_tokenizer(data, vocab_size, prompt):
    """The tokenizer of a tokenizer.json (bytes, None where the checkpoint has none), tried on `prompt`."""
    if data is None:
        raise UserError("the checkpoint directory has no tokenizer.json, so instructions cannot be tokenized")
    try:
        tokenizer = Tokenizer.from_str(data.decode())
        tokenizer.no_padding()  # a file may ask for either; OpenVLA.tokenize pads, behind the suffix token
        tokenizer.no_truncation()
        tokenizer.encode_batch([prompt])
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"the checkpoint's tokenizer.json cannot be used: {error}") from error
    if max(tokenizer.get_vocab().values(), default=0) >= vocab_size:
        raise UserError("the checkpoint's tokenizer.json has more tokens than its config.json")
    return tokenizer


# --------------------------------------------------------------------------------------------------------------------
# Action statistics (norm_stats): which values the ends of the action bins stand for
# --------------------------------------------------------------------------------------------------------------------


def read_norm_stats(folder, config):
    """{key: {"action": {"q01", "q99", "mask"}}}: a fine-tuned checkpoint's own, else those of config.json."""
    own = folder / "dataset_statistics.json"
    return read_json(own) if own.is_file() else config.get("norm_stats", {})


def find_statistics(norm_stats, suite, given=None):
    """The key of `norm_stats` that serves `suite`, or `given` itself (`--unnorm-key`). Raises UserError if
    there is none.

    In this order: the suite's name, with `_no_noops` behind it (official checkpoints use either), the same of
    the suite that it is a variant of (libero_object for LIBERO-PRO's libero_object_swap), and the only entry
    there is.
    """
    candidates = [suite, f"{suite}_no_noops"] if given is None else [given]
    if given is None:
        bases = {key.removesuffix("_no_noops") for key in norm_stats}
        base = max((base for base in bases if suite.startswith(f"{base}_")), key=len, default=suite)
        candidates += [base, f"{base}_no_noops"]
    for key in candidates:
        if key in norm_stats:
            return key
    if given is None and len(norm_stats) == 1:
        (key,) = norm_stats
        print(
            f"no action statistics for {suite} in this checkpoint; using the only ones there are, {key}",
            file=sys.stderr,
        )
        return key
    known = ", ".join(sorted(norm_stats)) or "none"
    raise UserError(
        f"no action statistics for {suite if given is None else given!r} in this checkpoint; it has: {known} "
        "(--unnorm-key chooses)"
    )


def read_statistics(norm_stats, key=None):
    """(q01, q99, mask), each (7,), of the entry `key`, or of `key` with `_no_noops`; None: the only one."""
    if key is None and len(norm_stats) == 1:
        (key,) = norm_stats
    key = key if key in norm_stats else f"{key}_no_noops"
    if key not in norm_stats:
        known = ", ".join(sorted(norm_stats)) or "none"
        raise UserError(
            f"no action statistics {key.removesuffix('_no_noops')!r} in this checkpoint; it has: {known}"
        )
    try:
        entry = norm_stats[key]["action"]
        low, high = np.array(entry["q01"], float), np.array(entry["q99"], float)
        mask = np.array(entry.get("mask", np.ones(len(low))), bool)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the action statistics {key!r} cannot be read: {error!r}") from error
    if not low.shape == high.shape == mask.shape == (ACTION_DIM,) or not np.isfinite([low, high]).all():
        raise UserError(f"the action statistics {key!r} are not {ACTION_DIM} finite numbers each")
    return low, high, mask


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def write_checkpoint(directory, config, tensors, final, side_files, max_shard_bytes=MAX_SHARD_BYTES):
    """Write the official layout. Besides the model, only one tensor is ever in memory.

    tensors: {name: x}, x with dtype, shape and nbytes of the tensor final(name, x), which is computed when
    its turn has come, in the order of the names. side_files: {name: bytes}.
    """
    shards = plan_shards({name: tensor.nbytes for name, tensor in tensors.items()}, max_shard_bytes)
    with replace_files(directory, stale=("model*.safetensors*", "dataset_statistics.json")) as part:
        for file, names in shards.items():
            write_safetensors(part / file, {name: tensors[name] for name in names}, final)
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            total = sum(tensor.nbytes for tensor in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for name, data in side_files.items():
            (part / name).write_bytes(data)
        (part / "config.json").write_text(json.dumps(config, indent=1))


def plan_shards(sizes, max_shard_bytes):
    """{tensor name: bytes} -> {file name: [tensor names]}, each file at most `max_shard_bytes` (or one tensor)."""
    shards, size = [[]], 0
    for name in sorted(sizes):
        if size and size + sizes[name] > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sizes[name]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def write_safetensors(path, tensors, final):
    """One file, tensor by tensor: the header's length, the header, the numbers. (The library's `save_file`
    wants all of them in memory and makes a second copy of each: 10 GB for a shard of 5.)"""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that numbers are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            data = final(name, tensor).detach().cpu().contiguous()
            file.write(data.reshape(-1).view(torch.uint8).numpy())


@contextlib.contextmanager
def replace_files(directory, stale=()):
    """Yield an empty directory inside `directory`; afterwards move everything in, config.json or rprm.json last, and drop
    what else fits the stale patterns.

    A full disk or a crash while writing gigabytes then leaves the old checkpoint as it was.
    """
    directory = Path(directory)
    part = directory / ".part"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        files = sorted(
            (f for f in part.rglob("*") if f.is_file()),
            key=lambda file: file.name in ("config.json", "rprm.json"),
        )
        for file in files:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        moved = {directory / file.relative_to(part) for file in files}
        for file in files:
            (directory / file.relative_to(part)).parent.mkdir(exist_ok=True)
            os.replace(file, directory / file.relative_to(part))
        for old in {old for pattern in stale for old in directory.glob(pattern)} - moved:
            old.unlink()
        sync_directory(directory)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write to {directory}: {getattr(error, 'strerror', None) or error}"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
