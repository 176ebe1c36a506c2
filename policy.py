"""The policy: OpenVLA, from the official 7B checkpoints down to a model that a laptop trains. One class, two sizes.

The idea. OpenVLA turns "which action?" into "which next token?". Two vision towers (DINOv2 for geometry, SigLIP for
semantics) each cut the image into patches; their features are joined per patch and projected to the width of a
Llama, which then reads one sequence:

    BOS  patch_1 ... patch_P  "In: What action should the robot take to {instruction}?\\nOut:"  suffix  a_1 ... a_7

a_1 ... a_7 are the action: dx dy dz droll dpitch dyaw gripper, each one of 256 bins, each bin one token at the end
of the vocabulary. The probability of an action is the product of the probabilities of its 7 tokens (Eq. 1 of the
paper), and that is all that PPO needs from the policy: tokens to act with, log-probs to learn from.

Reading order: action tokens, image preprocessing, vision tower, Llama, OpenVLA, then the actor-critic (LoRA), then
openvla-tiny.

Rows of a batch are independent. Prompts differ in length and are padded on the RIGHT; the action tokens go straight
behind each row's own prompt, over the padding. With a causal mask nothing real ever sees padding, so a row needs no
mask and gets the very positions it would get alone. That is why batched results equal single ones.

Tensors carry the official names (`vision_backbone.featurizer.*`, `projector.*`, `language_model.*`), so checkpoints
load and save without a name map, and the code runs without timm, torchvision or remote code.
"""

import contextlib
import copy
import functools
import io
import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.errors import UserError
from support.files import read_json, sync_directory
from support.quiet import silence_third_party

ACTION_DIM = 7
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"

# --------------------------------------------------------------------------------------------------------------------
# Action tokens
# --------------------------------------------------------------------------------------------------------------------


class ActionTokenizer:
    """Continuous values in [-1, 1] <-> the last 256 tokens of the vocabulary.

    256 edges make 255 intervals, but `digitize` can answer 256 (x == 1): 256 token ids, of which the two lowest
    decode to the same centre. That asymmetry is the official code's, and checkpoints have learned it.
    """

    def __init__(self, vocab_end, bins=256):
        self.vocab_end, self.bins = vocab_end, bins  # ids vocab_end - bins ... vocab_end - 1; Llama: 31744 ... 31999
        self.first = vocab_end - bins
        self.edges = np.linspace(-1.0, 1.0, bins)
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2  # (255,)

    def encode(self, x):
        """x: array in [-1, 1] (clipped) -> token ids, int64. Larger values have SMALLER ids."""
        return (self.vocab_end - np.digitize(np.clip(x, -1.0, 1.0), self.edges)).astype(np.int64)

    def decode(self, tokens):
        """Token ids -> bin centres, float64. Ids that are no action tokens decode to the nearest end, as officially."""
        return self.centres[np.clip(self.vocab_end - _numpy(tokens) - 1, 0, self.bins - 2)]

    def levels(self, tokens):
        """Token ids -> 0 (lowest value) ... bins - 1 (highest): how an action is written for a model without these tokens."""
        return self.vocab_end - 1 - tokens

    def token_to_bin(self, tokens):
        """Token ids -> index into the last axis of `action_logits` (0 ... 255, in token id order)."""
        return tokens - self.first

    def bin_to_token(self, bins):
        return bins + self.first


def policy_convention(actions):
    """Actions (n, 7) of a LIBERO file, gripper -1 open and +1 close -> the policy's, gripper 1 open and 0 close."""
    return np.concatenate([actions[:, :6], (1.0 - actions[:, 6:]) / 2.0], axis=1)


def normalize_actions(actions, low, high, mask):
    """Actions (..., 7) -> [-1, 1] where the mask is true and the value lies between the quantiles `low` and `high`."""
    return np.where(mask, 2 * (actions - low) / np.maximum(high - low, 1e-8) - 1, actions)


def unnormalize_actions(x, low, high, mask):
    """Inverse of `normalize_actions`."""
    return np.where(mask, 0.5 * (x + 1) * (high - low) + low, x)


def _numpy(x):
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


# --------------------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------------------
# The official evaluation sends every frame through JPEG, a Lanczos resize and a crop, all in TensorFlow, and the
# policy has only ever seen the result. Every step below reproduces TensorFlow's pixels (at most 1 grey level off);
# each shortcut that looks harmless (Pillow's decoder, Pillow's Lanczos) moves pixels by up to 17 levels.

DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_SIDE = math.sqrt(0.9)  # the crop keeps 90 % of the AREA


@functools.lru_cache(maxsize=8)
def _lanczos_matrix(size_in, size_out):
    """(size_out, size_in) float32: antialiased Lanczos-3 as one matrix, so that a resize is two matrix products."""
    scale = size_in / size_out
    stretch = max(scale, 1.0)  # antialiasing: when shrinking, the kernel is as wide as 3 OUTPUT pixels
    centre = (torch.arange(size_out, dtype=torch.float64)[:, None] + 0.5) * scale
    x = ((torch.arange(size_in, dtype=torch.float64)[None] + 0.5) - centre) / stretch
    weights = torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)
    return (weights / weights.sum(1, keepdim=True)).float()


def _crop_matrix(size, start):
    """start (B,) in pixels -> (B, size, size): bilinear crop of CROP_SIDE x size from `start` on, scaled up to size."""
    position = start[:, None] + torch.arange(size) * CROP_SIDE  # (B, size)
    return (1 - (position[:, :, None] - torch.arange(size)).abs()).clamp_min(0)  # a hat function interpolates linearly


def resize_frames(frames, image_size, jpeg=True):
    """frames (B, H, W, 3) uint8 upright -> (B, 3, image_size, image_size) uint8: JPEG round trip, then Lanczos-3."""
    frames = np.ascontiguousarray(_numpy(frames))
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be uint8 (B, H, W, 3), not {frames.dtype} {frames.shape}")
    if jpeg:
        frames = np.stack([_jpeg_round_trip(frame) for frame in frames])
    batch, height, width, _ = frames.shape
    x = torch.from_numpy(frames).view(batch, height, width * 3).float()
    x = (_lanczos_matrix(height, image_size) @ x).view(batch, image_size, width, 3)  # rows first: no transposed copy
    x = x.transpose(2, 3).contiguous() @ _lanczos_matrix(width, image_size).T  # (B, S, 3, S)
    return x.transpose(1, 2).round().clamp_(0, 255).to(torch.uint8, memory_format=torch.contiguous_format)


def _jpeg_round_trip(frame):
    data = io.BytesIO()
    Image.fromarray(frame).save(data, "JPEG", quality=95, subsampling=2)  # the bytes equal TensorFlow's
    return simplejpeg.decode_jpeg(data.getvalue(), fastdct=True, fastupsample=False)  # the fast DCT, as TensorFlow


def crop_and_normalize(images, crop="center", jitter=0.0, generator=None):
    """images (B, 3, S, S) uint8 from `resize_frames` -> pixel_values (B, 6, S, S) float32, DINOv2's channels first.

    crop: "center" (evaluation), "random" (training: the same 90 % of the area, anywhere), "none".
    jitter: 0 = off; 1 = the official training recipe (brightness +-0.2, contrast and saturation 0.8 ... 1.2,
        hue +-0.05).
    generator: CPU torch.Generator for the two random parts.
    """
    size, x = images.shape[-1], images.float()
    if crop != "none":
        if crop not in ("center", "random"):
            raise ValueError(f"crop must be center, random or none, not {crop!r}")
        where = torch.rand(2, len(images), generator=generator) if crop == "random" else torch.full((2, 1), 0.5)
        rows, columns = (_crop_matrix(size, w * (1 - CROP_SIDE) * (size - 1)) for w in where)
        x = rows[:, None] @ x @ columns[:, None].mT
        x = x.mul_(255.5 / 255).floor_()  # TensorFlow's float -> uint8: truncate x * 255.5
    x = x / 255
    if jitter:
        x = _color_jitter(x, jitter, generator)
    mean, std = torch.tensor((DINO_MEAN, DINO_STD)).view(2, 3, 1, 1)
    return torch.cat(((x - mean) / std, (x - 0.5) / 0.5), dim=1)


def _color_jitter(x, strength, generator):
    """Brightness, contrast, saturation, hue, in the official order. All are affine in RGB: one 3x3."""
    u = (torch.rand(4, len(x), 1, 1, generator=generator) * 2 - 1) * strength
    brightness, contrast, saturation, angle = u[0] * 0.2, 1 + u[1] * 0.2, 1 + u[2] * 0.2, u[3] * 0.05 * 2 * math.pi
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    turn = torch.eye(3).repeat(len(x), 1, 1)  # hue turns, saturation stretches the two chroma axes
    turn[:, 1:2, 1:2], turn[:, 1:2, 2:] = saturation * angle.cos(), -saturation * angle.sin()
    turn[:, 2:, 1:2], turn[:, 2:, 2:] = saturation * angle.sin(), saturation * angle.cos()
    mean = x.mean((2, 3))[:, :, None]  # (B, 3, 1): contrast pivots on each channel's mean
    y = (x.flatten(2) - mean) * contrast + mean + brightness
    return (torch.linalg.inv(to_yiq) @ turn @ to_yiq @ y).clamp(0, 1).view_as(x)


def preprocess_images(frames, image_size=224, crop="center", jitter=0.0, jpeg=True, generator=None):
    """frames (B, H, W, 3) uint8, upright (already rotated by 180 degrees) -> pixel_values (B, 6, S, S) float32."""
    return crop_and_normalize(resize_frames(frames, image_size, jpeg), crop, jitter, generator)


# --------------------------------------------------------------------------------------------------------------------
# Vision tower: a ViT up to its second-to-last block
# --------------------------------------------------------------------------------------------------------------------


CHECKPOINTING = dict(use_reentrant=False, preserve_rng_state=False)  # nothing in these blocks is random


class Scale(nn.Module):  # DINOv2's LayerScale, under its official tensor name
    def __init__(self, width):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale_factor


class VisionAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, tokens, head_dim)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # exact GELU, not tanh


class VisionBlock(nn.Module):
    def __init__(self, size, scaled):
        super().__init__()
        width = size["hidden_size"]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, size["num_attention_heads"])
        self.mlp = VisionMLP(width, size["intermediate_size"])
        self.ls1, self.ls2 = (Scale(width), Scale(width)) if scaled else (nn.Identity(), nn.Identity())

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTower(nn.Module):
    """Patch features of the second-to-last block, without the final norm: the last block is not even built.

    With register tokens it is a DINOv2 (class token, registers, LayerScale), without them a SigLIP (patches only).
    """

    def __init__(self, size):
        super().__init__()
        width, patch, registers = size["hidden_size"], size["patch_size"], size["num_register_tokens"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (size["image_size"] // patch) ** 2, width))
        self.extra_tokens = 1 + registers if registers else 0
        if registers:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, registers, width))
        blocks = size["num_hidden_layers"] - 1
        self.blocks = nn.ModuleList(VisionBlock(size, scaled=registers > 0) for _ in range(blocks))

    def forward(self, images, gradient_checkpointing=False):
        """images (B, 3, S, S), normalised for this tower -> (B, patches, width)."""
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed  # positions for patches only
        if self.extra_tokens:
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), self.reg_token.expand(len(x), -1, -1), x), dim=1)
        for block in self.blocks:
            x = checkpoint(block, x, **CHECKPOINTING) if gradient_checkpointing else block(x)
        return x[:, self.extra_tokens :]


class Projector(nn.Module):
    """Per patch, both towers' features -> the Llama's width."""

    def __init__(self, vision_width, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(vision_width, 4 * vision_width), nn.Linear(4 * vision_width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x):
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


# --------------------------------------------------------------------------------------------------------------------
# Llama
# --------------------------------------------------------------------------------------------------------------------


def _rotate(x, cos, sin):
    """Rotary positions: (x_i, x_{i + half}) turn by position x frequency_i. `sin` carries the sign of rotate-half."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class LlamaAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin, cache=None, slots=None, mask=None, at=None):
        """Causal attention over x (B, S, d), in one of three ways:
        plain: every position asks, and `cache`, if given, is filled;
        at (B, n): only these positions ask -> (B, n, d); all S are keys and values;
        slots (B,): x is one new token per row, its key and value go to that cache slot; it sees what `mask` allows.
        """
        q, k, v = (linear(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # each (B, heads, tokens, head_dim)
                   for linear, source in ((self.q_proj, _pick(x, at)), (self.k_proj, x), (self.v_proj, x)))
        q, k = _rotate(q, *((cos, sin) if at is None else (cos[at][:, None], sin[at][:, None]))), _rotate(k, cos, sin)
        if slots is not None:
            rows = torch.arange(len(x), device=x.device)
            cache[0][rows, :, slots], cache[1][rows, :, slots] = k[:, :, 0], v[:, :, 0]
            k, v = cache
        elif cache is not None:
            cache[0][:, :, : x.shape[1]], cache[1][:, :, : x.shape[1]] = k, v
        if at is not None:
            mask = (torch.arange(x.shape[1], device=x.device) <= at[:, :, None])[:, None]  # (B, 1, n, S)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _pick(x, at):
    """x (B, S, d) at positions `at` (B, n) -> (B, n, d); all of x for None."""
    return x if at is None else x.gather(1, at[:, :, None].expand(-1, -1, x.shape[-1]))


class LlamaMLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, text):
        super().__init__()
        width, eps = text["hidden_size"], text["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.self_attn = LlamaAttention(width, text["num_attention_heads"])
        self.mlp = LlamaMLP(width, text["intermediate_size"])

    def forward(self, x, cos, sin, cache=None, slots=None, mask=None, at=None):
        x = _pick(x, at) + self.self_attn(self.input_layernorm(x), cos, sin, cache, slots, mask, at)
        return x + self.mlp(self.post_attention_layernorm(x))


# --------------------------------------------------------------------------------------------------------------------
# OpenVLA
# --------------------------------------------------------------------------------------------------------------------

# The official config.json leaves these out: they are transformers 4.40.1's Llama defaults and timm's model definitions.
LLAMA_DEFAULTS = dict(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064,
    rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=2048, pad_token_id=32000,
)
TIMM_TOWERS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14,
        image_size=224, num_register_tokens=4,
    ),
    "vit_so400m_patch14_siglip_224": dict(
        hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304, patch_size=14,
        image_size=224, num_register_tokens=0,
    ),
}
# What belongs to an official checkpoint besides config and weights; saving brings along what loading found.
SIDE_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "generation_config.json", "configuration_prismatic.py", "modeling_prismatic.py",
    "processing_prismatic.py",
)


class Output(NamedTuple):
    logits: torch.Tensor  # (B, 1 + P + L - 1, vocabulary)


class Actions(NamedTuple):
    tokens: torch.Tensor  # (B, 7) int64
    logprobs: torch.Tensor  # (B, 7) float32


class Evaluation(NamedTuple):
    log_probs: torch.Tensor  # (B, 7) float32, of the given tokens
    entropy: torch.Tensor  # (B, 7) float32, of each step's distribution, in nats


@contextlib.contextmanager
def explain_out_of_memory(advice):
    """Turn an out-of-memory error (of CUDA, a page long, or of the CPU's allocator) into one line that names the flag
    to lower."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own
        on_cpu = "DefaultCPUAllocator" in str(error)
        library = any(words in str(error) for words in ("CUDA error: out of memory", "STATUS_ALLOC_FAILED"))  # cuBLAS etc.
        if not (on_cpu or library or isinstance(error, torch.OutOfMemoryError)):
            raise
        raise UserError(f"the {'machine' if on_cpu else 'GPU'} is out of memory: {advice}") from error


def _tower_sizes(config):
    if "vision_configs" in config:
        return config["vision_configs"]
    for name in (names := config.get("timm_model_ids", [])):
        if name not in TIMM_TOWERS:
            raise UserError(f"config.json: no sizes for vision tower {name!r}; known: {', '.join(TIMM_TOWERS)}")
    return [TIMM_TOWERS[name] for name in names]


def _check_config(config):
    """Raise UserError unless every number that the model relies on is there and possible. (A number of layers that is a
    typing error would otherwise be built, layer by layer, until the memory is full.)"""

    def whole(table, name, low, high, default=None):
        value = table.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"config.json: {name} is {value!r}, not a whole number from {low} to {high}")
        return value

    def transformer(table):
        width, heads = whole(table, "hidden_size", 1, 2**16), whole(table, "num_attention_heads", 1, 2**10)
        whole(table, "num_hidden_layers", 1, 1000), whole(table, "intermediate_size", 1, 2**18)
        if width % (2 * heads):
            raise UserError(f"config.json: {heads} attention heads do not divide the width {width} into even parts")

    towers, text = _tower_sizes(config), config.get("text_config", {})
    if not isinstance(towers, list) or len(towers) != 2 or not all(isinstance(x, dict) for x in [*towers, text]):
        raise UserError("config.json is not an OpenVLA configuration: two vision towers and a text_config are expected")
    for tower in towers:
        transformer(tower)
        whole(tower, "patch_size", 1, whole(tower, "image_size", 1, 4096)), whole(tower, "num_register_tokens", 0, 1000)
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
    for name in ("rms_norm_eps", "rope_theta"):
        if not isinstance(text[name], (int, float)) or not 0 < text[name] < math.inf:
            raise UserError(f"config.json: {name} is {text[name]!r}, not a positive number")
    if not isinstance(config.get("norm_stats", {}), dict):
        raise UserError("config.json: norm_stats is no table")


class OpenVLA(nn.Module):
    """OpenVLA of any size. `config` is the dict of config.json: the official fields, and for openvla-tiny also
    `vision_configs` (tower sizes), `action_repeat` (control steps per decision; 1 if absent), `suffix_token_id`."""

    def __init__(self, config):
        super().__init__()
        _check_config(config)
        self.config = config
        text = self.text = {**LLAMA_DEFAULTS, **config.get("text_config", {})}
        towers = _tower_sizes(config)
        self.vision_backbone = nn.Module()
        self.vision_backbone.featurizer = VisionTower(towers[0])  # DINOv2
        self.vision_backbone.fused_featurizer = VisionTower(towers[1])  # SigLIP
        self.projector = Projector(towers[0]["hidden_size"] + towers[1]["hidden_size"], text["hidden_size"])
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.embed_tokens = nn.Embedding(text["vocab_size"], text["hidden_size"])
        self.language_model.model.layers = nn.ModuleList(LlamaLayer(text) for _ in range(text["num_hidden_layers"]))
        self.language_model.model.norm = nn.RMSNorm(text["hidden_size"], text["rms_norm_eps"])
        self.language_model.lm_head = nn.Linear(text["hidden_size"], text["vocab_size"], bias=False)

        self.image_size = towers[0]["image_size"]
        self.num_patches = (towers[0]["image_size"] // towers[0]["patch_size"]) ** 2
        self.action_repeat = config.get("action_repeat", 1)
        vocab_end = text["vocab_size"] - config["pad_to_multiple_of"]  # 32000: the rows behind it are padding
        self.action_tokenizer = ActionTokenizer(vocab_end, config["n_action_bins"])
        self.suffix_token_id = config.get("suffix_token_id", 29871)
        self.norm_stats = config.get("norm_stats", {})
        self.gradient_checkpointing = False
        self._compiled_step, self._kept_cache = None, None  # see `compile_decoding`
        self.unused = {}  # name -> CPU tensor: in the file, not computed with (last blocks, final norms, attn_pool)
        self.side_files = {}  # name -> bytes, of SIDE_FILES
        self._rope_tables = {}

    @property
    def device(self):
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self):
        return self.language_model.lm_head.weight.dtype

    # ---- text and images in ----------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self):
        if "tokenizer.json" not in self.side_files:
            raise UserError("the checkpoint directory has no tokenizer.json, so instructions cannot be tokenized")
        try:
            tokenizer = Tokenizer.from_str(self.side_files["tokenizer.json"].decode())
            tokenizer.no_padding()  # a file may ask for either; `tokenize` pads, behind the suffix token
            tokenizer.no_truncation()
            tokenizer.encode_batch([PROMPT])
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"the checkpoint's tokenizer.json cannot be used: {error}") from error
        if max(tokenizer.get_vocab().values(), default=0) >= self.text["vocab_size"]:
            raise UserError("the checkpoint's tokenizer.json has more tokens than its config.json")
        return tokenizer

    def tokenize(self, instructions):
        """B instructions -> input_ids (B, L) int64, attention_mask (B, L) int64, padded on the right, on the model's
        device.

        The suffix token (29871, an empty piece, in Llama's vocabulary) is what the official model was trained to see
        before the first action token; without it success rates collapse.
        """
        prompts = [PROMPT.format(instruction=text.lower()) for text in instructions]
        rows = [encoded.ids + [self.suffix_token_id] for encoded in self.tokenizer.encode_batch(prompts)]
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.text["pad_token_id"])
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return ids.to(self.device), mask.to(self.device)

    def preprocess(self, frames, center_crop=True):
        """frames (B, 256, 256, 3) uint8 upright -> pixel_values (B, 6, S, S) float32 on the model's device."""
        return preprocess_images(frames, self.image_size, "center" if center_crop else "none").to(self.device)

    def embed_images(self, pixel_values):
        """pixel_values (B, 6, S, S) -> patch embeddings (B, P, d), as they enter the language model."""
        dino, siglip = pixel_values.to(self.dtype).split(3, dim=1)
        vision, checkpointing = self.vision_backbone, self.gradient_checkpointing and torch.is_grad_enabled()
        features = (vision.featurizer(dino, checkpointing), vision.fused_featurizer(siglip, checkpointing))
        return self.projector(torch.cat(features, dim=-1))

    # ---- the sequence ----------------------------------------------------------------------------------------------

    def _rope(self, device):
        """(cos, sin), each (max positions, head_dim): angles in float32, then the model's dtype."""
        key = (device, self.dtype)
        if key not in self._rope_tables:
            half = self.text["hidden_size"] // self.text["num_attention_heads"] // 2
            frequency = self.text["rope_theta"] ** -(torch.arange(half, dtype=torch.float32, device=device) / half)
            angle = torch.arange(self.text["max_position_embeddings"], device=device)[:, None] * frequency
            cos, sin = angle.cos(), angle.sin()
            self._rope_tables[key] = torch.cat((cos, cos), -1).to(self.dtype), torch.cat((-sin, sin), -1).to(self.dtype)
        return self._rope_tables[key]

    def _states(self, input_ids, attention_mask, pixel_values, patch_embeddings, count, offset=0, tokens=None,
                cache=None):
        """Run the language model once over BOS, patches, prompt and (optionally) `tokens` (B, K) behind each prompt.

        Returns the normed states (B, count, d) from `offset` behind each row's last prompt token on (the state at
        offset k predicts action token k), or of the whole sequence for count None; and last (B,), the position of that
        token. The last layer computes only the states asked for, which saves most of a quarter of openvla-tiny's work.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if (attention_mask.diff(dim=1) > 0).any() or not attention_mask[:, 0].all():
            raise ValueError("attention_mask must be right-padded: ones, then zeros (as `tokenize` returns it)")
        lengths = attention_mask.sum(1)
        if patch_embeddings is None:
            patch_embeddings = self.embed_images(pixel_values)
        patches, limit = patch_embeddings.shape[1], self.text["max_position_embeddings"]
        if patches + input_ids.shape[1] + ACTION_DIM > limit:
            raise UserError(f"prompt too long: {patches} patches + {input_ids.shape[1]} prompt tokens + {ACTION_DIM} "
                            f"action tokens exceed the model's {limit} positions; shorten the instruction")
        if tokens is not None:  # over the padding, so that every row's sequence is gapless
            steps = torch.arange(tokens.shape[1], device=lengths.device)
            input_ids = F.pad(input_ids, (0, len(steps)), value=self.text["pad_token_id"])
            input_ids = input_ids.scatter(1, lengths[:, None] + steps, tokens)
        x = self.language_model.model.embed_tokens(input_ids)
        x = torch.cat((x[:, :1], patch_embeddings.to(x.dtype), x[:, 1:]), dim=1)
        last = patches + lengths - 1
        at = None if count is None else last[:, None] + offset + torch.arange(count, device=last.device)
        cos, sin = (table[: x.shape[1]] for table in self._rope(x.device))
        layers = self.language_model.model.layers
        for i, layer in enumerate(layers):
            args = (x, cos, sin, None if cache is None else cache[i], None, None, at if i == len(layers) - 1 else None)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *args, **CHECKPOINTING)
            else:
                x = layer(*args)
        return self.language_model.model.norm(x), last

    def _logits(self, states, whole_vocabulary):
        """Normed states (..., d) -> float32 logits over the 256 action tokens, or over the whole vocabulary.

        The 256 rows of 32,064 are multiplied in float32: in bfloat16 a logit of 16 comes in steps of 1/8, and two ways
        to compute the same state (cached and merged in a rollout, neither in an update) would round to different ones.
        """
        weight = self.language_model.lm_head.weight
        if whole_vocabulary:  # as the official code
            return F.linear(states, weight).float()
        weight = weight[self.action_tokenizer.first : self.action_tokenizer.vocab_end]
        return F.linear(states.float(), weight.float())

    def forward(self, input_ids, pixel_values=None, attention_mask=None, *, patch_embeddings=None):
        """Logits over the whole multimodal sequence (BOS, patches, text), as the official model returns them."""
        states, _ = self._states(input_ids, attention_mask, pixel_values, patch_embeddings, count=None)
        return Output(self.language_model.lm_head(states))

    def prompt_state(self, input_ids, attention_mask=None, *, pixel_values=None, patch_embeddings=None):
        """(B, d): the normed state of the prompt's last token, which is what the value head reads."""
        return self._states(input_ids, attention_mask, pixel_values, patch_embeddings, count=1)[0][:, 0]

    def _teacher_forced(self, input_ids, attention_mask, action_tokens, pixel_values, patch_embeddings):
        return self._states(input_ids, attention_mask, pixel_values, patch_embeddings, count=ACTION_DIM,
                            tokens=action_tokens[:, :-1])[0]  # (B, 7, d)

    def action_logits(self, input_ids, attention_mask, action_tokens, *, pixel_values=None, patch_embeddings=None):
        """(B, 7, 256) float32: teacher-forced logits of the action bins, in token id order."""
        states = self._teacher_forced(input_ids, attention_mask, action_tokens, pixel_values, patch_embeddings)
        return self._logits(states, whole_vocabulary=False)

    def action_log_probs(self, input_ids, attention_mask, action_tokens, *, pixel_values=None, patch_embeddings=None,
                         temperature=1.0, whole_vocabulary=False):
        """log pi(token_i | earlier tokens, image, prompt), Eq. 1's summands, and the entropies, at `temperature`.

        The same distribution that `generate_actions` samples from: same temperature, same set of tokens.
        """
        states = self._teacher_forced(input_ids, attention_mask, action_tokens, pixel_values, patch_embeddings)
        log_p = _log_softmax(self._logits(states, whole_vocabulary), temperature)  # (B, 7, tokens)
        index = action_tokens if whole_vocabulary else self.action_tokenizer.token_to_bin(action_tokens)
        return Evaluation(log_p.gather(-1, index[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1))

    def text_after_actions_logits(self, input_ids, attention_mask, action_tokens, *, token_ids, pixel_values=None,
                                  patch_embeddings=None):
        """(B, len(token_ids)) float32: next-token logits behind prompt + 7 action tokens, for the RPRM."""
        states, _ = self._states(input_ids, attention_mask, pixel_values, patch_embeddings, count=1, offset=ACTION_DIM,
                                 tokens=action_tokens)
        return F.linear(states[:, 0], self.language_model.lm_head.weight[token_ids]).float()

    # ---- acting ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_actions(self, input_ids, pixel_values=None, attention_mask=None, *, patch_embeddings=None,
                         temperature=0.0, whole_vocabulary=False, generator=None):
        """Sample (temperature > 0) or pick greedily (0) the 7 action tokens of every row.

        generator: None, one torch.Generator, or a list with one per row (a row's tokens then do not depend on its
            batch); on the CPU, whatever the model's device.
        whole_vocabulary: sample over all tokens, as officially, instead of the 256 action tokens. The tail of a
            32,000-word vocabulary at temperature 1.5 is noise, and a word there decodes to an extreme action.
        logprobs are those of the chosen tokens in the very distribution sampled from; greedy ones at temperature 1.

        The prompt runs once; each further token is one position through a key-value cache of fixed size. Row i's new
        token takes slot last_i + 1 + k, over the padding, and sees the slots up to its own.
        """
        batch = len(input_ids)
        patches = self.num_patches if patch_embeddings is None else patch_embeddings.shape[1]
        cache = self._cache(batch, patches + input_ids.shape[1] + ACTION_DIM - 1)
        spare = (0, cache.shape[2] - batch)  # rows that nobody asked for: none unless compiled
        state, last = self._states(input_ids, attention_mask, pixel_values, patch_embeddings, count=1, cache=cache[:, :, :batch])
        uniforms = _uniforms(batch, generator).to(self.device) if temperature > 0 else None
        next_state = self._compiled_step or self._next_state
        first = 0 if whole_vocabulary else self.action_tokenizer.first
        tokens, log_probs = [], []
        for k in range(ACTION_DIM):
            log_p = _log_softmax(self._logits(state[:, 0], whole_vocabulary), temperature)  # (B, tokens)
            choice = log_p.argmax(-1) if uniforms is None else _sample(log_p, uniforms[:, k])
            log_probs.append(log_p.gather(-1, choice[:, None])[:, 0])
            tokens.append(choice + first)
            if k + 1 < ACTION_DIM:
                token, slot = F.pad(tokens[-1], spare), F.pad(last + 1 + k, spare)
                if self._compiled_step is not None:
                    torch.compiler.cudagraph_mark_step_begin()  # the last state has been used: a graph may overwrite it
                state = next_state(token, slot, cache, *self._rope(self.device))[:batch]
        return Actions(torch.stack(tokens, 1), torch.stack(log_probs, 1))

    def _next_state(self, tokens, slot, cache, table_cos, table_sin):
        """One new token (B,) per row through all layers, at cache slot and position `slot` (B,) -> normed state (B, 1, d)."""
        mask = (torch.arange(cache.shape[-2], device=slot.device) <= slot[:, None])[:, None, None]  # (B, 1, 1, slots)
        cos, sin = table_cos[slot][:, None, None], table_sin[slot][:, None, None]
        x = self.language_model.model.embed_tokens(tokens)[:, None]
        for i, layer in enumerate(self.language_model.model.layers):
            x = layer(x, cos, sin, cache[i], slot, mask)
        return self.language_model.model.norm(x)

    def _cache(self, batch, slots):
        """Zeros for keys and values: (layers, 2, batch, heads, slots, head_dim).

        Compiled code and CUDA graphs are made for one shape and one address. So compiled decoding keeps the largest cache
        that was needed, and smaller batches (an evaluation's last episodes) use a part of it.
        """
        text, kept = self.text, self._kept_cache
        if self._compiled_step is not None:
            slots = -(-slots // 64) * 64  # prompts differ by a few tokens
            if kept is not None and kept.shape[2] >= batch and kept.shape[4] >= slots:
                return kept.zero_()
            if kept is not None:
                batch, slots = max(batch, kept.shape[2]), max(slots, kept.shape[4])
        heads = text["num_attention_heads"]
        shape = (text["num_hidden_layers"], 2, batch, heads, slots, text["hidden_size"] // heads)
        self._kept_cache = None  # its memory first
        cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if self._compiled_step is not None:
            torch._dynamo.mark_static_address(cache)
            self._kept_cache = cache
        return cache

    def compile_decoding(self):
        """Let torch.compile fuse the pass that each of the action tokens 2 to 7 takes; on a GPU also record it as a CUDA
        graph. One position per row is so little arithmetic that launching it, kernel by kernel, takes as long.

        Same distribution up to rounding. The first decision takes longer by a compilation (tens of seconds), as does the
        first of a larger batch. Weights may change in place afterwards (`merge_policy(into=...)`), but not move.
        Raises UserError where torch.compile does not work, for example without a C++ compiler.
        """
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=self.device))
        except Exception as error:  # of many kinds: no compiler, no headers, no Triton
            reason = str(error).strip().splitlines() or [repr(error)]
            raise UserError(f"torch.compile does not work here ({reason[0]}); leave out --compile-decoding, or install "
                            "what it needs (on Debian: apt-get install g++ python3-dev)") from error
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self._compiled_step = torch.compile(self._next_state, mode=mode, dynamic=False, fullgraph=True)

    def action_statistics(self, unnorm_key):
        """(q01, q99, mask), each (7,): values between the two quantiles become -1 ... 1 where the mask is true."""
        if unnorm_key is None and len(self.norm_stats) == 1:
            unnorm_key = next(iter(self.norm_stats))
        for key in (unnorm_key, f"{unnorm_key}_no_noops"):  # official checkpoints use either name
            if key in self.norm_stats:
                try:
                    stats = self.norm_stats[key]["action"]
                    low, high = np.array(stats["q01"], float), np.array(stats["q99"], float)
                    mask = np.array(stats.get("mask", np.ones(len(low))), bool)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    raise UserError(f"the action statistics {key!r} cannot be read: {error!r}") from error
                if not low.shape == high.shape == mask.shape == (ACTION_DIM,) or not np.isfinite([low, high]).all():
                    raise UserError(f"the action statistics {key!r} are not {ACTION_DIM} finite numbers each")
                return low, high, mask
        raise UserError(f"no action statistics for unnorm_key {unnorm_key!r} in this checkpoint; it has: "
                        f"{', '.join(sorted(self.norm_stats)) or 'none'}")

    def decode_actions(self, tokens, unnorm_key=None):
        """tokens (B, 7) -> actions (B, 7) float64 in policy convention (gripper 0 = close ... 1 = open)."""
        low, high, mask = self.action_statistics(unnorm_key)
        return unnormalize_actions(self.action_tokenizer.decode(tokens), low, high, mask)

    def encode_actions(self, actions, unnorm_key=None):
        """actions (B, 7) in policy convention -> tokens (B, 7) int64 numpy: inverse of `decode_actions`, clipped."""
        low, high, mask = self.action_statistics(unnorm_key)
        return self.action_tokenizer.encode(normalize_actions(actions, low, high, mask))

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config, seed=0, dtype=torch.float32, device="cpu"):
        """Random weights. Built on the device itself, so that even 7B never pass through host memory.

        Matrices get a standard deviation of 1 / sqrt(fan-in). At Llama's width that is the usual 0.02, but at the width
        of openvla-tiny it is 0.09, and 0.02 would leave the image too quiet: memorising 32 images, the loss began to
        depend on the image after 100 steps with this, and not within 150 with 0.02.
        """
        with torch.device("meta"):
            model = cls(config)
        with explain_out_of_memory("this model does not fit; use --model openvla-tiny or a larger GPU"):
            model.to(dtype).to_empty(device=device)
        generator = torch.Generator(device).manual_seed(seed)
        for name, p in model.named_parameters():
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "scale_factor")):
                nn.init.ones_(p)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("pos_embed"):
                # As large as the patch features that they are added to: where the gripper is, is what has to be learnt.
                # At 0.02 openvla-tiny ignored the image for 64,000 samples, at 0.5 for fewer than 10,000.
                nn.init.normal_(p, std=0.5, generator=generator)
            elif name.endswith(("embed_tokens.weight", "lm_head.weight", "cls_token", "reg_token")):
                nn.init.normal_(p, std=0.02, generator=generator)
            else:
                nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
        return model

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a directory in the official layout, or a hub id. One tensor at a time: beside the model, host memory
        holds no more than one shard. Raises UserError for everything that can be wrong with the files."""
        folder = _checkpoint_folder(path)
        config = read_json(folder / "config.json")
        try:
            with torch.device("meta"):
                model = cls(config)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}/config.json is not an OpenVLA configuration: {error!r}") from error
        expected, found = {name: p.shape for name, p in model.named_parameters()}, {}
        with explain_out_of_memory("the weights do not fit; use --model openvla-tiny or a larger GPU"):
            for shard in _shards(folder):
                try:
                    with safe_open(shard, framework="pt") as file:
                        for name in file.keys():
                            tensor = file.get_tensor(name)
                            if name not in expected:
                                model.unused[name] = tensor.clone()
                                continue
                            if tensor.shape != expected[name]:
                                raise UserError(f"{shard}: {name} has shape {tuple(tensor.shape)}, but config.json "
                                                f"implies {tuple(expected[name])}")
                            found[name] = tensor.to(device, dtype, copy=True)  # a copy: the original is the mapped file
                except (SafetensorError, OSError) as error:
                    raise UserError(f"{shard} cannot be read (truncated?): {error}; get it again") from error
        if missing := sorted(expected.keys() - found.keys()):
            raise UserError(f"{folder}: {len(missing)} tensors are missing from the weights, the first is {missing[0]}")
        model.load_state_dict(found, assign=True)
        for name in SIDE_FILES:
            if (folder / name).is_file():
                model.side_files[name] = (folder / name).read_bytes()
        if (folder / "dataset_statistics.json").is_file():  # a fine-tuned checkpoint's own statistics go first
            model.norm_stats = read_json(folder / "dataset_statistics.json")
        return model

    def save_pretrained(self, directory, max_shard_bytes=5_000_000_000):
        """Write the official layout, unused tensors included, so that the official code loads it. Loading what this
        wrote gives every tensor back bit for bit (at the dtype that the model has)."""
        tensors = {name: p.detach() for name, p in self.named_parameters()} | self.unused
        if any("lora_" in name for name in tensors):
            raise ValueError("this model carries LoRA adapters: save ActorCritic.merge_policy() or save_adapters()")
        shards, size = [{}], 0
        for name in sorted(tensors):
            if size and size + tensors[name].nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = tensors[name]
            size += tensors[name].nbytes
        names = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        with _replace_files(directory, stale=("model*.safetensors*", "dataset_statistics.json")) as part:
            for name, shard in zip(names, shards):
                shard = {key: tensor.cpu().contiguous() for key, tensor in shard.items()}
                save_file(shard, part / name, {"format": "pt"})
            if len(shards) > 1:
                weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
                index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
                (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
            for name, data in self.side_files.items():
                (part / name).write_bytes(data)
            # norm_stats go into config.json, also where dataset_statistics.json had overridden it.
            (part / "config.json").write_text(json.dumps({**self.config, "norm_stats": self.norm_stats}, indent=1))


@contextlib.contextmanager
def _replace_files(directory, stale=()):
    """Yield an empty directory beside `directory`; afterwards move everything in, config.json last, and drop what
    else fits the stale patterns.

    A full disk or a crash while writing gigabytes then leaves the old checkpoint as it was.
    """
    directory = Path(directory)
    part = directory.with_name(directory.name + ".part")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
        files = sorted((f for f in part.rglob("*") if f.is_file()), key=lambda file: file.name == "config.json")
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
        raise UserError(f"cannot write to {directory}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _log_softmax(logits, temperature):
    return F.log_softmax(logits / (temperature or 1.0), dim=-1)  # temperature 0 means greedy: report its log-probs at 1


def _uniforms(batch, generator):
    """(B, 7) float64 on the CPU. Per-row generators make a row's draw independent of the batch and of the device."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([torch.rand(ACTION_DIM, dtype=torch.float64, generator=g) for g in generator])
    return torch.rand(batch, ACTION_DIM, dtype=torch.float64, generator=generator)


def _sample(log_p, u):
    """Inverse CDF: the first token whose cumulative probability exceeds u. In float64 for the tail of 32,064 tokens."""
    cdf = log_p.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0].clamp_max(log_p.shape[-1] - 1)


def _checkpoint_folder(path):
    folder = Path(path)
    if not folder.is_dir():
        if len(folder.parts) != 2 or folder.is_absolute() or str(path).startswith(".") or folder.parent.is_dir():
            raise UserError(f"no checkpoint at {path}: not a directory (nor a hub id such as openvla/openvla-7b)")
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.py", "*.txt", "*.model"]
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=patterns))
        except Exception as error:  # the hub client raises many kinds; each means "not available", and says why
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"no directory {path} here, and the model hub did not give it: {reason}") from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no config.json")
    return folder


def _shards(folder):
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


# --------------------------------------------------------------------------------------------------------------------
# Actor-critic: two LoRA adapters on one frozen backbone
# --------------------------------------------------------------------------------------------------------------------

# Full-match patterns over module names. (A list of suffixes would also catch `patch_embed.proj`, a convolution.)
LORA_TARGETS = {
    "all": r".*(attn\.qkv|attn\.proj|mlp\.fc[12]|projector\.fc[123]|[qkvo]_proj|gate_proj|up_proj|down_proj)",
    "language": r"language_model\..*([qkvo]_proj|gate_proj|up_proj|down_proj)",
}
CRITICS = ("adapter", "shared", "separate")


class ActorCritic(nn.Module):
    """Policy and value model for PPO. The paper's critic is "homogeneous": a second OpenVLA with a value head. Here
    that second OpenVLA is a second LoRA adapter, which costs megabytes instead of 15 GB.

    lora_rank, lora_alpha: of both adapters. No dropout, it would make the ratio of Eq. 2 noisy.
    targets: "all" linear layers as in the release, or "language": the vision side then never changes
        (`vision_frozen`), so patch embeddings are constants that a caller may compute once and pass everywhere as
        `patch_embeddings`.
    critic: "adapter" (default), "shared" (the value head reads the policy adapter's state; the value loss reaches
        that adapter), "separate" (a second copy of the backbone, as in the release).
    whole_vocabulary: sample over all tokens instead of the 256 action tokens; `evaluate_actions` follows.

    Takes the model over: its weights freeze and its linear layers get adapters (set `gradient_checkpointing` before).
    Only adapters and value head have gradients. They stay float32 on a bfloat16 backbone: at a learning rate of 2e-5
    an Adam step is smaller than bfloat16's rounding.
    Raises UserError for an unknown `targets` or `critic` and a rank below 1.
    """

    def __init__(self, model, lora_rank=32, lora_alpha=16, targets="all", critic="adapter", whole_vocabulary=False):
        super().__init__()
        from peft import LoraConfig  # not at the top: it takes seconds to import, and only training needs it

        if targets not in LORA_TARGETS or critic not in CRITICS or lora_rank < 1:
            raise UserError(f"LoRA targets {targets!r}, critic {critic!r}, rank {lora_rank}: targets can be "
                            f"{' or '.join(LORA_TARGETS)}, critic {', '.join(CRITICS)}, rank 1 or more")
        self.critic, self.vision_frozen, self.whole_vocabulary = critic, targets == "language", whole_vocabulary
        self.lora_config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=LORA_TARGETS[targets])
        model.requires_grad_(False)
        with explain_out_of_memory("the critic does not fit; use --critic adapter"):
            self.critic_model = copy.deepcopy(model) if critic == "separate" else None
        self.model = _add_adapter(model, self.lora_config, "policy")
        if critic != "shared":
            _add_adapter(self.critic_model or model, self.lora_config, "critic")
        width = model.text["hidden_size"]
        hidden = max(width // 4, 128), max(width // 8, 64)  # 4096 -> 1024 -> 512 -> 1, as in the release
        self.value_head = nn.Sequential(nn.Linear(width, hidden[0], bias=False), nn.ReLU(),
                                        nn.Linear(hidden[0], hidden[1], bias=False), nn.ReLU(),
                                        nn.Linear(hidden[1], 1, bias=False)).to(model.device)
        nn.init.normal_(self.value_head[-1].weight, std=0.01)  # first values near 0, where most returns are
        for parameter in (*self._lora_parameters("policy").values(), *self._lora_parameters("critic").values()):
            parameter.data = parameter.data.float()
        self._layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        self._switched = [p for name, p in model.named_parameters() if "lora_" in name]
        self._active = None
        self._merged, self._merged_is_current = [None], False  # in a list: not a submodule, so not in state_dict
        self.sharded = False
        self._use("policy")

    def _use(self, adapter):
        """Switch the shared backbone to an adapter. peft freezes the one that it switches off; both must stay
        trainable, or gradients that are still to come would be dropped without a word."""
        if self.critic == "adapter" and adapter != self._active:
            for layer in self._layers.values():
                layer.set_adapter(adapter)
            for parameter in self._switched:
                parameter.requires_grad_(True)
            self._active = adapter

    def _lora_parameters(self, adapter):
        """{plain tensor name: parameter} of one adapter."""
        model = self.critic_model if (adapter, self.critic) == ("critic", "separate") else self.model
        return {name.replace(f".{adapter}.", "."): p for name, p in model.named_parameters()
                if "lora_" in name and f".{adapter}." in name}

    def policy_parameters(self):
        return list(self._lora_parameters("policy").values())

    def critic_parameters(self):
        return [*self._lora_parameters("critic").values(), *self.value_head.parameters()]

    def _check_images(self, patch_embeddings):
        if patch_embeddings is not None and not self.vision_frozen:
            raise ValueError("LoRA trains the vision side (targets='all'): pass pixel_values, not patch_embeddings")

    @torch.no_grad()
    def embed_images(self, pixel_values):
        """Patch embeddings (B, P, d), constants of the run. Only where `vision_frozen`."""
        if not self.vision_frozen:
            raise ValueError("LoRA trains the vision side (targets='all'): there are no constant patch embeddings")
        with explain_out_of_memory("lower --num-envs"):
            return self.model.embed_images(pixel_values)

    @torch.no_grad()
    def act(self, input_ids, attention_mask=None, *, pixel_values=None, patch_embeddings=None, temperature=1.0,
            generator=None):
        """One decision per row, for a rollout -> tokens (B, 7) int64, logprobs (B, 7) float32, values (B,) float32.

        The log-probs are of exactly these tokens at this temperature: Eq. 2's behaviour policy. `generator` as in
        `generate_actions`.
        """
        self._check_images(patch_embeddings)
        with explain_out_of_memory("lower --num-envs"):
            if self._merged_is_current:
                policy = self._merged[0]
            else:
                self._use("policy")
                policy = self.model
            images = dict(pixel_values=pixel_values, patch_embeddings=patch_embeddings)
            actions = policy.generate_actions(input_ids, attention_mask=attention_mask, **images, generator=generator,
                                              temperature=temperature, whole_vocabulary=self.whole_vocabulary)
            values = self.value(input_ids, attention_mask, **images)
        return *actions, values

    def evaluate_actions(self, input_ids, attention_mask, action_tokens, *, pixel_values=None, patch_embeddings=None,
                         temperature=1.0):
        """Log-probs and entropies (B, 7) of given actions under the current policy, with gradients."""
        self._check_images(patch_embeddings)
        self._use("policy")
        self._merged_is_current &= not torch.is_grad_enabled()  # an update follows: the merged copy will be out of date
        with explain_out_of_memory("lower --micro-batch-size, or turn on --gradient-checkpointing"):
            return self.model.action_log_probs(input_ids, attention_mask, action_tokens, pixel_values=pixel_values,
                                               patch_embeddings=patch_embeddings, temperature=temperature,
                                               whole_vocabulary=self.whole_vocabulary)

    def value(self, input_ids, attention_mask=None, *, pixel_values=None, patch_embeddings=None):
        """V(o) (B,) float32, read from the prompt's last state: before any action token, so of o alone."""
        self._check_images(patch_embeddings)
        self._use("policy" if self.critic == "shared" else "critic")
        model = self.critic_model if self.critic == "separate" else self.model
        state = model.prompt_state(input_ids, attention_mask, pixel_values=pixel_values,
                                   patch_embeddings=patch_embeddings)
        return self.value_head(state.float())[:, 0]

    # ---- a backbone spread over several GPUs -----------------------------------------------------------------------

    def shard(self, device):
        """Spread the frozen weights of every block over the ranks (FSDP2) and move everything to `device`, this rank's.

        A rank keeps 1 / W of each block, and fetches the rest of a block when it is that block's turn, in the forward
        pass and again in the backward pass. Adapters, value head, embeddings, head and projector (0.7 of 15 GB at 7B)
        stay whole on every rank: adapters are what the optimiser steps on and what `World.sum_gradients_` sums.
        The price: every forward pass is a meeting of all ranks, and moves the whole backbone over the wires. So do each
        of the 7 passes that decode an action, because there is no room for a merged copy: LoRA stays unmerged.
        Give the model on the CPU; one block at a time moves to the device, where the whole need not fit.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        kind = torch.device(device).type
        mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
        for model in (self.model, *([self.critic_model] if self.critic_model is not None else [])):
            towers = model.vision_backbone
            blocks = (towers.featurizer.blocks, towers.fused_featurizer.blocks, model.language_model.model.layers)
            for block in (block for group in blocks for block in group):
                adapters = {p for name, p in block.named_parameters() if "lora_" in name}
                # Each block is a root of its own, and a root would keep its weights gathered if not told otherwise.
                fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
        for parameter in self.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        self.sharded = True

    def evaluation_model(self):
        """The current policy as an OpenVLA to evaluate: the merged copy that rollouts use where they use one (7B twice is
        enough), or where there is no room for one the model itself."""
        if self.sharded:
            self._use("policy")
            return self.model
        return self.merge_policy() if self.critic == "shared" else self.merge_for_rollout()

    @contextlib.contextmanager
    def without_adapters(self):
        """The model itself as it was before training, its adapters switched off: `start_policy` of a sharded model."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield self.model
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)
            for parameter in self._switched:
                parameter.requires_grad_(True)

    # ---- merging and files -----------------------------------------------------------------------------------------

    def start_policy(self):
        """The policy as it was before any training: a plain OpenVLA on the frozen backbone's own tensors, which costs
        no memory."""
        source, base = self.model, self._base_tensors()
        with torch.device("meta"):
            plain = OpenVLA(source.config)
        plain.load_state_dict(base, assign=True)
        plain.norm_stats, plain.unused, plain.side_files = source.norm_stats, source.unused, source.side_files
        return plain.requires_grad_(False)

    def _base_tensors(self):
        """{plain tensor name: frozen parameter} of the backbone. Sharded ones are gathered into host memory, one at a time."""
        base = {name.replace(".base_layer.", "."): p for name, p in self.model.named_parameters() if "lora_" not in name}
        if self.sharded:
            base = {name: nn.Parameter((p.full_tensor() if hasattr(p, "full_tensor") else p).cpu(), requires_grad=False)
                    for name, p in base.items()}
        return base

    @torch.no_grad()
    def merge_policy(self, into=None):
        """A plain OpenVLA with W + scaling x B A in place of W and its policy adapter: saveable, and faster in
        rollouts.

        A copy, instead of peft's merge and unmerge in place: in bfloat16 W + D - D is not W, and a backbone that
        drifts with every rollout would drift the critic too. Weights without an adapter are shared with this model.
        into: an earlier result of this method, refreshed in place (same memory, so compiled code and CUDA graphs
        stay valid).
        A sharded model is gathered into host memory, one tensor at a time; all ranks must call this then.
        """
        base = self._base_tensors()
        merged = self.start_policy() if into is None else into
        for name, layer in self._layers.items():
            weight, module = base[f"{name}.weight"], merged.get_submodule(name)
            total = (weight.float() + layer.get_delta_weight("policy").to(weight.device).float()).to(weight.dtype)
            if into is None:
                module.weight = nn.Parameter(total, requires_grad=False)
            else:
                module.weight.copy_(total)
        return merged

    def compile_decoding(self):
        """`OpenVLA.compile_decoding` for the merged copy, which rollouts and evaluations use. Raises UserError where there
        is none."""
        if self.critic == "shared" or self.sharded:
            raise UserError("--compile-decoding needs the merged copy of the policy, which --critic shared and --shard do without")
        self.merge_for_rollout().compile_decoding()

    def merge_for_rollout(self):
        """Let `act` use a merged copy until the next `evaluate_actions` with gradients. Costs a set of weights.

        Returns that copy, a plain OpenVLA; the next call refreshes it in place."""
        with explain_out_of_memory("no room for a merged copy of the policy; --critic shared acts without one"):
            self._merged[0] = self.merge_policy(self._merged[0])
        self._merged_is_current = True
        return self._merged[0]

    def save_adapters(self, directory):
        """policy/ and critic/ in peft's format (it reads them on the official model too), and the value head."""
        with _replace_files(directory) as part:
            for adapter in ("policy", "critic"):
                if tensors := self._lora_parameters(adapter):
                    (part / adapter).mkdir()
                    self.lora_config.save_pretrained(part / adapter)
                    tensors = {f"base_model.model.{name}": p.detach().cpu() for name, p in tensors.items()}
                    save_file(tensors, part / adapter / "adapter_model.safetensors")
            head = {name: p.detach().cpu() for name, p in self.value_head.named_parameters()}
            save_file(head, part / "value_head.safetensors")

    @torch.no_grad()
    def load_adapters(self, directory):
        """Read what `save_adapters` wrote. Raises UserError if a file is missing, damaged or does not fit."""
        directory = Path(directory)
        files = {directory / "value_head.safetensors": dict(self.value_head.named_parameters())}
        for adapter in ("policy", "critic"):
            if parameters := self._lora_parameters(adapter):
                files[directory / adapter / "adapter_model.safetensors"] = {
                    f"base_model.model.{name}": p for name, p in parameters.items()}
        loaded = []
        for path, parameters in files.items():  # check everything before changing anything
            try:
                tensors = load_file(path)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read: {error}") from error
            if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
                raise UserError(f"{path} was saved with another LoRA rank, other LoRA targets or another model size")
            loaded += [(parameters[name], tensor) for name, tensor in tensors.items()]
        for parameter, tensor in loaded:
            parameter.copy_(tensor)
        self._merged_is_current = False


def _add_adapter(model, config, name):
    from peft import inject_adapter_in_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two are the point here
        return inject_adapter_in_model(config, model, name)


# --------------------------------------------------------------------------------------------------------------------
# openvla-tiny
# --------------------------------------------------------------------------------------------------------------------

# Ids 0, 1, 2 as in Llama; <act> plays 29871's part; "1" and "0" are the reward model's answers, success and no success.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<act>", "1", "0")


def libero_words():
    """All words of the instructions of LIBERO's five suites, sorted."""
    silence_third_party()
    from libero.libero import benchmark

    suites = [benchmark.get_benchmark(name)() for name in
              ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")]
    return sorted({word for suite in suites for task in suite.tasks for word in task.language.lower().split()})


def tiny_tokenizer(words, action_bins=256):
    """One token a word, laid out like Llama's vocabulary: specials, words, spare ids up to a multiple of 64, the 256
    action tokens, then PAD as the first of the 64 padding rows."""
    template = PROMPT.format(instruction="").lower().replace(":", " : ").replace("?", " ? ").split()
    vocabulary = list(SPECIAL_TOKENS) + sorted({*words, *template, "task", "is", "it", "completed"})
    vocabulary += [f"<spare_{i}>" for i in range(-len(vocabulary) % 64)]
    vocabulary += [f"<action_{i}>" for i in range(action_bins)] + ["<pad>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # splits "?" and ":" off
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def tiny_config(words=None, image_size=112, patch_size=16, vision_width=(96, 48), vision_blocks=(4, 2),
                vision_heads=(4, 2), width=128, layers=3, heads=4, mlp=256, action_repeat=4, max_positions=256):
    """config.json of openvla-tiny: the official fields with small numbers. A tower's last block is never computed.

    vision_width, vision_blocks, vision_heads: of the DINOv2-like and the SigLIP-like tower (one number serves both).
    The second tower is the smaller: at this size two towers see no more than one, and training is short of samples per
    second (1.7 times as many as with two equal towers and a fourth language layer).
    """
    tokenizer = tiny_tokenizer(libero_words() if words is None else words)
    pairs = [x if isinstance(x, tuple) else (x, x) for x in (vision_width, vision_blocks, vision_heads)]
    towers = [dict(hidden_size=w, num_hidden_layers=b, num_attention_heads=h, intermediate_size=4 * w,
                   patch_size=patch_size, image_size=image_size) for w, b, h in zip(*pairs, strict=True)]
    pad = tokenizer.token_to_id("<pad>")
    return {
        "model_type": "openvla", "arch_specifier": "no-align+fused-gelu-mlp", "image_sizes": [image_size, image_size],
        "n_action_bins": 256, "pad_to_multiple_of": 64, "pad_token_id": pad, "norm_stats": {},
        "vision_configs": [{**towers[0], "num_register_tokens": 4}, {**towers[1], "num_register_tokens": 0}],
        "text_config": {
            "model_type": "llama", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": pad + 64, "pad_token_id": pad,
            "bos_token_id": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": max_positions,
        },
        "suffix_token_id": tokenizer.token_to_id("<act>"), "success_token_id": tokenizer.token_to_id("1"),
        "no_success_token_id": tokenizer.token_to_id("0"), "action_repeat": action_repeat,
    }


def build_tiny(seed=0, words=None, device="cpu", **sizes):
    """openvla-tiny with random weights and its tokenizer. `sizes` are keywords of `tiny_config`."""
    words = libero_words() if words is None else words
    model = OpenVLA.from_config(tiny_config(words, **sizes), seed=seed, device=device)
    model.side_files["tokenizer.json"] = tiny_tokenizer(words).to_str(pretty=True).encode()
    return model
