"""What decode, update and gpu share: a model on a device, observations, and transformers' Llama on the same weights."""

import time

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from bench.common import machine, take_turns
from policy import OpenVLA
from support.cli import flag
from support.errors import UserError


def device_flag():
    text = "where to run; auto: the GPU where there is one"
    return flag("auto", text, choices=("auto", "cpu", "cuda"))


def choose_device(name):
    """(device, dtype, what the device calls itself): bfloat16 on a GPU, float32 on a CPU, which is slow at less."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU here that torch can use; --device cpu runs on the processor")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return "cuda", torch.bfloat16, torch.cuda.get_device_name()
    torch.set_num_threads(1)
    return "cpu", torch.float32, f"{machine()['cpu']}, one core"


def load(path, device, dtype):
    return OpenVLA.from_pretrained(path, dtype=dtype, device=device).eval().requires_grad_(False)


def observations(model, batch, seed=0):
    """Random pictures and prompts of LIBERO's lengths, mixed: input_ids, attention_mask (B, L), pixel_values.

    Random ids and not words, so that weights without a tokenizer can be measured too. Speed does not depend on them.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = 20 + torch.arange(batch) % 9  # "In: What action should the robot take to ...": 20 to 28 tokens
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(3, model.action_tokenizer.first, mask.shape, generator=generator)
    ids[:, 0] = 1  # BOS
    ids = torch.where(mask.bool(), ids, model.text["pad_token_id"])
    ids[torch.arange(batch), lengths - 1] = model.suffix_token_id
    frames = torch.randint(0, 256, (batch, 256, 256, 3), generator=generator, dtype=torch.uint8).numpy()
    return ids.to(model.device), mask.to(model.device), model.preprocess(frames).to(model.dtype)


def transformers_llama(model):
    """transformers' own Llama on the very tensors of `model` (a plain OpenVLA): no copy, so 7B fit beside it."""
    text = model.text
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "pad_token_id",
    )
    config = LlamaConfig(
        **{name: text[name] for name in names},
        num_key_value_heads=text["num_attention_heads"],
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
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


def generate(model, llama, input_ids, attention_mask, pixel_values, greedy=False):
    """Seven tokens per row by transformers' `generate`, fed with embeddings padded on its side, the left: (B, 7)."""
    x = model.language_model.model.embed_tokens(input_ids)
    x = torch.cat((x[:, :1], model.embed_images(pixel_values), x[:, 1:]), dim=1)  # BOS, patches, text
    mask = torch.cat(
        (attention_mask.new_ones(len(x), x.shape[1] - attention_mask.shape[1]), attention_mask), dim=1
    )
    if not attention_mask.all():
        order = mask.argsort(dim=1, stable=True)  # padding first
        x, mask = x.gather(1, order[:, :, None].expand_as(x)), mask.gather(1, order)
    how = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    with torch.no_grad():
        return llama.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=7, use_cache=True, **how)


def turns(variants, rounds, device):
    """`take_turns` with progress: on a GPU seconds by the clock; on a CPU of CPU time of one thread, which hold on a busy
    machine."""
    clock, after = (
        (time.perf_counter, torch.cuda.synchronize) if device == "cuda" else (time.process_time, lambda: None)
    )
    return take_turns(
        variants, rounds, clock, after, lambda numbers: tqdm(numbers, desc="round", leave=False)
    )
