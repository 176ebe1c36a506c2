"""The policy: OpenVLA, from the official 7B checkpoints down to a model that a laptop trains. One class, two sizes.

The idea. OpenVLA turns "which action?" into "which next token?". Two vision towers (DINOv2 for geometry, SigLIP for
semantics) each cut the image into patches; their features are joined per patch and projected to the width of a
Llama, which then reads one sequence:

    BOS  patch_1 ... patch_P  "In: What action should the robot take to {instruction}?\\nOut:"  suffix  a_1 ... a_7

a_1 ... a_7 are the action: dx dy dz droll dpitch dyaw gripper, each one of 256 bins, each bin one token at the end
of the vocabulary. The probability of an action is the product of the probabilities of its 7 tokens (Eq. 1 of the
paper), and that is all that PPO needs from the policy: tokens to act with, log-probs to learn from.

Reading order: action tokens, OpenVLA (the sequence, teacher forcing, batched decoding), then the actor-critic. What
they are made of stands in models/: backbone (ViT, Llama layer), images, sampling, adapters, checkpoints, sharding, tiny.

Rows of a batch are independent. Prompts differ in length and are padded on the RIGHT; the action tokens go straight
behind each row's own prompt, over the padding. With a causal mask nothing real ever sees padding, so a row needs no
mask and gets the very positions it would get alone. That is why batched results equal single ones.

Tensors carry the official names (`vision_backbone.featurizer.*`, `projector.*`, `language_model.*`), so checkpoints
load and save without a name map, and the code runs without timm, torchvision or remote code.
"""

import contextlib
import copy
import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models import checkpoints
from models.adapters import LORA_TARGETS, Adapter, MergedCopy, load_adapters, save_adapters
from models.backbone import LlamaLayer, Projector, VisionTower, run_block
from models.checkpoints import LLAMA_DEFAULTS, MAX_SHARD_BYTES, resolve_checkpoint
from models.images import preprocess_images
from models.sampling import most_likely, sampler
from models.sharding import move_whole_parameters, shard_backbone
from models.tiny import draw_weights_, libero_words, tiny_config, tiny_tokenizer
from support.errors import UserError, explain_out_of_memory
from support.files import read_json

ACTION_DIM = 7
NO_TOKEN = -1  # where there is no distribution to choose a token from
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
        self.vocab_end, self.bins = vocab_end, bins
        self.first = vocab_end - bins  # ids first ... vocab_end - 1; Llama: 31744 ... 31999
        self.edges = np.linspace(-1.0, 1.0, bins)
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2  # (255,)

    def encode(self, x):
        """x: array in [-1, 1] (clipped) -> token ids, int64. Larger values have SMALLER ids."""
        return (self.vocab_end - np.digitize(np.clip(x, -1.0, 1.0), self.edges)).astype(np.int64)

    def decode(self, tokens):
        """Token ids -> bin centres, float64. Ids that are no action tokens decode to the nearest end, as officially."""
        return self.centres[np.clip(self.vocab_end - _numpy(tokens) - 1, 0, self.bins - 2)]

    def ascending_bins(self, tokens):
        """Token ids, a tensor -> 0 (lowest value) ... bins - 1 (highest): for models without these tokens (a VLM). Other ids,
        which --whole-vocabulary may sample, are the nearest end, as in `decode`."""
        return (self.vocab_end - 1 - tokens).clamp(0, self.bins - 1)

    def token_to_bin(self, tokens):
        """Token ids -> index into the last axis of `action_logits` (0 ... 255, in token id order)."""
        return tokens - self.first

    def bin_to_token(self, bins):
        return bins + self.first


def policy_convention(actions):
    """Actions (n, 7) of a LIBERO file, gripper -1 open and +1 close -> the policy's, gripper 1 open and 0 close."""
    return np.concatenate([actions[:, :6], (1.0 - actions[:, 6:]) / 2.0], axis=1)


def normalize_actions(actions, low, high, mask):
    """Actions (..., 7) -> [-1, 1] where the mask (7,) is true and the value lies between the quantiles `low` and `high` (7,)."""
    return np.where(mask, 2 * (actions - low) / np.maximum(high - low, 1e-8) - 1, actions)


def unnormalize_actions(x, low, high, mask):
    """Inverse of `normalize_actions`."""
    return np.where(mask, 0.5 * (x + 1) * (high - low) + low, x)


def _numpy(x):
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


# --------------------------------------------------------------------------------------------------------------------
# OpenVLA
# --------------------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    logits: torch.Tensor  # (B, P + L, vocabulary): BOS, patches, rest of the prompt


class Actions(NamedTuple):
    tokens: torch.Tensor  # (B, 7) int64
    log_probs: torch.Tensor  # (B, 7) float32


class Evaluation(NamedTuple):
    log_probs: torch.Tensor  # (B, 7) float32, of the given tokens
    entropy: torch.Tensor  # (B, 7) float32, of each step's distribution, in nats


class OpenVLA(nn.Module):
    """OpenVLA of any size. `config` is the dict of config.json: the official fields, and for openvla-tiny also
    `vision_configs` (tower sizes), `action_repeat` (control steps per decision; 1 if absent), `suffix_token_id`,
    `sampling_temperature` (at which it acts; official checkpoints have none: 0, greedily).

    Methods that read images take them as keyword `images`: pixel_values (B, 6, S, S), or patch_embeddings (B, P, d),
    which `embed_images` made of them.
    """

    def __init__(self, config):
        super().__init__()
        checkpoints.check_config(config)
        self.config = config
        text = self.text = {**LLAMA_DEFAULTS, **config.get("text_config", {})}
        width, (dino, siglip) = text["hidden_size"], checkpoints.tower_sizes(config)
        self.vision_backbone = nn.Module()
        self.vision_backbone.featurizer = VisionTower(dino)
        self.vision_backbone.fused_featurizer = VisionTower(siglip)
        self.projector = Projector(dino["hidden_size"] + siglip["hidden_size"], width)
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        # (Not nn.Embedding itself: it draws normal numbers, and on device "meta" that imports torch's compiler, a second.)
        embeddings = nn.Embedding.from_pretrained(torch.empty(text["vocab_size"], width), freeze=False)
        self.language_model.model.embed_tokens = embeddings
        layers = [LlamaLayer(text) for _ in range(text["num_hidden_layers"])]
        self.language_model.model.layers = nn.ModuleList(layers)
        self.language_model.model.norm = nn.RMSNorm(width, text["rms_norm_eps"])
        self.language_model.lm_head = nn.Linear(width, text["vocab_size"], bias=False)

        self.image_size = dino["image_size"]
        self.num_patches = (dino["image_size"] // dino["patch_size"]) ** 2
        self.action_repeat = config.get("action_repeat", 1)
        vocab_end = text["vocab_size"] - config["pad_to_multiple_of"]  # 32000: the rows behind it are padding
        self.action_tokenizer = ActionTokenizer(vocab_end, config["n_action_bins"])
        self.suffix_token_id = config.get("suffix_token_id", 29871)
        self.norm_stats = config.get("norm_stats", {})
        self.gradient_checkpointing = False
        # True: every forward pass is a meeting of all ranks (models/sharding.py).
        self.needs_all_ranks = False
        self.active_adapter = None  # models/adapters.py
        self.unused = {}  # name -> CPU tensor: in the file, not computed with (last blocks, final norms, attn_pool)
        self.side_files = {}  # name -> bytes: tokenizer and whatever else came with the weights
        self._rope_tables = {}

    @property
    def device(self):
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self):
        return self.language_model.lm_head.weight.dtype

    @property
    def sampling_temperature(self):
        """The temperature (0 or more; 0 is greedy) that this policy is meant to act at: config.json's, else 0, as for official
        checkpoints. Raises UserError for an openvla-tiny from before it stood there: acting greedily, that one gets stuck
        without a word (4.4 instead of 34.6 % on libero_10)."""
        # `action_repeat` marks an openvla-tiny: official checkpoints have neither entry.
        if "action_repeat" in self.config and "sampling_temperature" not in self.config:
            raise UserError(
                "the policy's config.json does not say at which temperature it acts: give --temperature, or write "
                '"sampling_temperature": 0.6 into it (openvla-tiny; 0 is greedy)'
            )
        return self.config.get("sampling_temperature", 0.0)

    def temperature_or_own(self, given):
        """`given`, or where that is None `sampling_temperature`."""
        return self.sampling_temperature if given is None else given

    # ---- text and images in ----------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self):
        return checkpoints.read_tokenizer(
            self.side_files.get("tokenizer.json"), self.text["vocab_size"], PROMPT
        )

    def tokenize(self, instructions):
        """B instructions -> input_ids, attention_mask, each (B, L) int64, padded on the right, on the model's device.

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

    def preprocess(self, frames):
        """frames (B, 256, 256, 3) uint8 upright -> pixel_values (B, 6, S, S) float32 on the model's device."""
        return preprocess_images(frames, self.image_size).to(self.device)

    def embed_images(self, pixel_values):
        """pixel_values (B, 6, S, S) -> patch embeddings (B, P, d), as they enter the language model."""
        dino, siglip = pixel_values.to(self.dtype).split(3, dim=1)
        vision, checkpointing = self.vision_backbone, self.gradient_checkpointing
        features = (vision.featurizer(dino, checkpointing), vision.fused_featurizer(siglip, checkpointing))
        return self.projector(torch.cat(features, dim=-1))

    # ---- the sequence ----------------------------------------------------------------------------------------------

    def _rope(self, device):
        """(cos, sin), each (max positions, head_dim): angles in float32, then the model's dtype."""
        key = (device, self.dtype)
        if key not in self._rope_tables:
            half = self.text["hidden_size"] // self.text["num_attention_heads"] // 2
            steps = torch.arange(half, dtype=torch.float32, device=device) / half
            positions = torch.arange(self.text["max_position_embeddings"], device=device)
            angle = positions[:, None] * self.text["rope_theta"] ** -steps
            cos, sin = angle.cos(), angle.sin()
            tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
            self._rope_tables[key] = tuple(table.to(self.dtype) for table in tables)
        return self._rope_tables[key]

    def _states(self, input_ids, attention_mask, images, count, offset=0, tokens=None, cache=None):
        """Run the language model once over BOS, patches, prompt and (optionally) `tokens` (B, K) behind each prompt.

        Let last (B,) be the position of each row's last prompt token; the state at last + k predicts a_{k+1}. Returns the
        normed states (B, count, d) from last + offset on, or of the whole sequence for count None, and last. The final
        layer computes queries and MLP only for the states asked for. cache: (layers, 2, B, heads, >= S, head_dim), to be
        filled.
        """
        patches = self._patch_embeddings(**images)  # (B, P, d)
        P, limit = patches.shape[1], self.text["max_position_embeddings"]
        if P + input_ids.shape[1] + ACTION_DIM > limit:
            raise UserError(
                f"prompt too long: {P} patches + {input_ids.shape[1]} prompt tokens + {ACTION_DIM} action tokens "
                f"exceed the model's {limit} positions; shorten the instruction"
            )
        lengths = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).sum(1)  # (B,)
        if tokens is not None:  # over the padding, so that every row's sequence is gapless
            steps = torch.arange(tokens.shape[1], device=lengths.device)
            input_ids = F.pad(input_ids, (0, len(steps)), value=self.text["pad_token_id"])
            input_ids = input_ids.scatter(1, lengths[:, None] + steps, tokens)
        x = self.language_model.model.embed_tokens(input_ids)
        x = torch.cat((x[:, :1], patches.to(x.dtype), x[:, 1:]), dim=1)  # (B, S, d)
        last = P + lengths - 1
        at = None if count is None else last[:, None] + offset + torch.arange(count, device=last.device)
        cos, sin = (table[: x.shape[1]] for table in self._rope(x.device))
        run = functools.partial(run_block, gradient_checkpointing=self.gradient_checkpointing)
        *inner, final = self.language_model.model.layers
        caches = [None] * (len(inner) + 1) if cache is None else cache
        for layer, own in zip(inner, caches):
            x = run(layer, x, cos, sin, own)
        x = run(final, x, cos, sin, caches[-1], at)
        return self.language_model.model.norm(x), last

    def _patch_embeddings(self, pixel_values=None, patch_embeddings=None):
        return self.embed_images(pixel_values) if patch_embeddings is None else patch_embeddings

    def forward(self, input_ids, pixel_values=None, attention_mask=None, *, patch_embeddings=None):
        """Logits over the whole multimodal sequence (BOS, patches, text), as the official model returns them."""
        check_right_padded(attention_mask)
        images = dict(pixel_values=pixel_values, patch_embeddings=patch_embeddings)
        return Output(
            self.language_model.lm_head(self._states(input_ids, attention_mask, images, count=None)[0])
        )

    def prompt_state(self, input_ids, attention_mask=None, **images):
        """(B, d): the normed state of the prompt's last token, which is what the value head reads."""
        return self._states(input_ids, attention_mask, images, count=1)[0][:, 0]

    # ---- log-probs of given actions: teacher forcing ---------------------------------------------------------------

    def _action_head(self, whole_vocabulary=False):
        """What an action token is chosen from: head matrix (tokens, d), and the id that its first row stands for.

        The 256 rows of 32,064 are float32: in bfloat16 a logit of 16 comes in steps of 1/8, and two ways to compute
        the same state (cached and merged in a rollout, neither in an update) would round to different ones.
        """
        weight, tokenizer = self.language_model.lm_head.weight, self.action_tokenizer
        if whole_vocabulary:  # as the official code
            return weight, 0
        return weight[tokenizer.first : tokenizer.vocab_end].float(), tokenizer.first

    def _teacher_forced(self, input_ids, attention_mask, action_tokens, images):
        tokens = action_tokens[:, :-1]  # the last one predicts nothing
        where = dict(count=ACTION_DIM, tokens=tokens)
        return self._states(input_ids, attention_mask, images, **where)[0]  # (B, 7, d)

    def action_logits(self, input_ids, attention_mask, action_tokens, **images):
        """(B, 7, 256) float32: teacher-forced logits of the action bins, in token id order."""
        states = self._teacher_forced(input_ids, attention_mask, action_tokens, images)
        return _logits(states, self._action_head()[0])

    def action_log_probs(
        self, input_ids, attention_mask, action_tokens, *, temperature=1.0, whole_vocabulary=False, **images
    ):
        """log pi(token_i | earlier tokens, image, prompt), Eq. 1's summands, and the entropies, at `temperature`.

        action_tokens (B, 7) int64. Returns Evaluation: log_probs and entropy in nats, each (B, 7) float32.

        The same distribution that `generate_actions` samples from: same temperature, same set of tokens.
        """
        head, first = self._action_head(whole_vocabulary)
        states = self._teacher_forced(input_ids, attention_mask, action_tokens, images)
        log_p = _log_softmax(_logits(states, head), temperature)  # (B, 7, tokens)
        log_probs = log_p.gather(-1, (action_tokens - first)[..., None])[..., 0]
        return Evaluation(log_probs, -(log_p.exp() * log_p).sum(-1))

    def text_after_actions_logits(self, input_ids, attention_mask, action_tokens, *, token_ids, **images):
        """(B, n) float32: next-token logits of the n `token_ids` behind prompt + 7 action tokens, for the RPRM."""
        position = dict(count=1, offset=ACTION_DIM, tokens=action_tokens)
        states, _ = self._states(input_ids, attention_mask, images, **position)
        return _logits(states[:, 0], self.language_model.lm_head.weight[token_ids].float())

    # ---- acting: batched decoding ----------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_actions(
        self,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        *,
        patch_embeddings=None,
        temperature=0.0,
        whole_vocabulary=False,
        generator=None,
    ):
        """Sample (temperature > 0) or pick greedily (0) the 7 action tokens of every row.

        Returns Actions: tokens (B, 7) int64 and log_probs (B, 7) float32, those of the chosen tokens in the very distribution
        sampled from; greedy ones at temperature 1. Where that distribution is not finite (NaN weights) the token is NO_TOKEN,
        which `decode_actions` refuses.

        generator: None, one torch.Generator, or a list with one per row (a row's tokens then do not depend on its
            batch); on the CPU, whatever the model's device.
        whole_vocabulary: sample over all tokens, as officially, instead of the 256 action tokens. The tail of a
            32,000-word vocabulary at temperature 1.5 is noise, and a word there decodes to an extreme action.

        The prompt runs once; each further token is one position through a key-value cache of fixed size. Of row i the token
        a_k (k = 1 ... 6) takes slot last_i + k, over the padding, and sees the slots up to its own.
        """
        check_right_padded(attention_mask)
        batch = len(input_ids)
        patches = self.num_patches if patch_embeddings is None else patch_embeddings.shape[1]
        cache = self._empty_cache(batch, patches + input_ids.shape[1] + ACTION_DIM - 1)
        images = dict(pixel_values=pixel_values, patch_embeddings=patch_embeddings)
        state, last = self._states(input_ids, attention_mask, images, count=1, cache=cache)
        head, first = self._action_head(whole_vocabulary)
        draw = sampler(batch, generator, self.device) if temperature > 0 else most_likely
        tokens, log_probs = [], []
        for k in range(ACTION_DIM):
            if k > 0:
                state = self._next_state(tokens[-1], last + k, cache)  # (B, 1, d)
            log_p = _log_softmax(_logits(state[:, 0], head), temperature)  # (B, tokens)
            choice = draw(log_p, k)  # (B,)
            tokens.append(choice + first)
            log_probs.append(log_p.gather(-1, choice[:, None])[:, 0])
        tokens, log_probs = torch.stack(tokens, 1), torch.stack(log_probs, 1)
        return Actions(tokens.where(log_probs.isfinite(), NO_TOKEN), log_probs)

    def _next_state(self, tokens, slot, cache):
        """One new token (B,) per row through all layers, at cache slot and position `slot` (B,) -> state (B, 1, d)."""
        seen = torch.arange(cache.shape[-2], device=slot.device) <= slot[:, None]  # (B, slots)
        cos, sin = (table[slot][:, None, None] for table in self._rope(slot.device))
        x = self.language_model.model.embed_tokens(tokens)[:, None]
        for layer, own in zip(self.language_model.model.layers, cache, strict=True):
            x = layer(x, cos, sin, own, slot=slot, mask=seen[:, None, None])
        return self.language_model.model.norm(x)

    def _empty_cache(self, batch, slots):
        """Zeros for keys and values: (layers, 2, batch, heads, slots, head_dim)."""
        layers, heads = self.text["num_hidden_layers"], self.text["num_attention_heads"]
        shape = (layers, 2, batch, heads, slots, self.text["hidden_size"] // heads)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    # ---- tokens <-> actions ----------------------------------------------------------------------------------------

    def unnorm_key_for(self, suite, given=None):
        """The key of the action statistics that serve `suite`; `given` (`--unnorm-key`) goes first."""
        return checkpoints.find_statistics(self.norm_stats, suite, given)

    def action_statistics(self, unnorm_key=None):
        """(q01, q99, mask), each (7,): values between the two quantiles become -1 ... 1 where the mask is true."""
        return checkpoints.read_statistics(self.norm_stats, unnorm_key)

    def decode_actions(self, tokens, unnorm_key=None):
        """tokens (B, 7) -> actions (B, 7) float64 in policy convention (gripper 0 = close ... 1 = open)."""
        tokens = _numpy(tokens)
        if (tokens == NO_TOKEN).any():
            raise UserError(
                "the policy's log-probabilities are not finite: its weights hold NaN or infinity, or the "
                "temperature is too near to 0"
            )
        low, high, mask = self.action_statistics(unnorm_key)
        return unnormalize_actions(self.action_tokenizer.decode(tokens), low, high, mask)

    def encode_actions(self, actions, unnorm_key=None):
        """actions (B, 7) in policy convention -> tokens (B, 7) int64 numpy: inverse of `decode_actions`, clipped."""
        low, high, mask = self.action_statistics(unnorm_key)
        return self.action_tokenizer.encode(normalize_actions(actions, low, high, mask))

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config, seed=0, dtype=torch.float32, device="cpu"):
        """Random weights. Built on the device itself, so that even 7B never pass through host memory."""
        with torch.device("meta"):
            model = cls(config)
        with explain_out_of_memory("this model does not fit; use --model openvla-tiny or a larger GPU"):
            model.to(dtype).to_empty(device=device)
        draw_weights_(model, torch.Generator(device).manual_seed(seed))
        return model

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", kind="policy"):
        """Load a directory in the official layout, or a hub id. One tensor at a time: beside the model, host memory
        holds no more than one shard. kind: "policy", or "reward model" for the OpenVLA that an RPRM is. Raises UserError
        for everything that can be wrong with the files."""
        folder = resolve_checkpoint(path, kind)
        config = read_json(folder / "config.json")
        try:
            with torch.device("meta"):
                model = cls(config)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder}/config.json is not an OpenVLA configuration: {error!r}") from error
        shapes, found = {name: p.shape for name, p in model.named_parameters()}, {}
        with explain_out_of_memory("the weights do not fit; use --model openvla-tiny or a larger GPU"):
            for name, tensor in checkpoints.read_tensors(folder, shapes):
                if name in shapes:
                    found[name] = tensor.to(device, dtype, copy=True)  # the original is the mapped file
                else:
                    model.unused[name] = tensor.clone()
        model.load_state_dict(found, assign=True)
        model.side_files = checkpoints.read_side_files(folder)
        model.norm_stats = checkpoints.read_norm_stats(folder, config)
        return model

    def save_pretrained(self, directory, max_shard_bytes=MAX_SHARD_BYTES):
        """Write the official layout, unused tensors included, so that the official code loads it. Loading what this
        wrote gives every tensor back bit for bit (at the dtype that the model has)."""
        tensors = dict(self.named_parameters())
        if any("lora_" in name for name in tensors):
            raise ValueError("this model carries LoRA adapters: use ActorCritic.save_policy()")
        self.write(directory, tensors, lambda name, tensor: tensor, max_shard_bytes)

    def write(self, directory, parameters, final, max_shard_bytes=MAX_SHARD_BYTES):
        """Write {name: tensor} as this model's weights, each as final(name, tensor), computed in its turn."""
        tensors = parameters | self.unused
        config = {**self.config, "norm_stats": self.norm_stats}  # a dataset_statistics.json may be newer
        checkpoints.write_checkpoint(directory, config, tensors, final, self.side_files, max_shard_bytes)


def check_right_padded(attention_mask):
    """Raise ValueError unless every row of the mask (B, L) is ones, then zeros. It looks at masks in host memory only:
    `tokenize` makes right ones, and on a GPU the host would wait for the device in every decision."""
    if attention_mask is None or attention_mask.device.type != "cpu":
        return
    if (attention_mask.diff(dim=1) > 0).any() or not attention_mask[:, 0].all():
        raise ValueError("attention_mask must be right-padded: ones, then zeros (as `tokenize` returns it)")


def _logits(states, head):
    """Normed states (..., d) and a head matrix (tokens, d) -> float32 (..., tokens)."""
    return F.linear(states.to(head.dtype), head).float()


def _log_softmax(logits, temperature):  # temperature 0 means greedy: report its log-probs at 1
    return F.log_softmax(logits / (temperature or 1.0), dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# Actor-critic: LoRA adapters on one frozen backbone
# --------------------------------------------------------------------------------------------------------------------

CRITICS = ("adapter", "shared", "separate", "none")


class ActorCritic(nn.Module):
    """Policy and value model for PPO. The paper's critic is "homogeneous": a second OpenVLA with a value head. Here
    that second OpenVLA is a second LoRA adapter, which costs megabytes instead of 15 GB.

    lora_rank, lora_alpha: of both adapters. No dropout, it would make the ratio of Eq. 2 noisy.
    targets: "all" linear layers as in the release, or "language": the vision side then never changes
        (`vision_frozen`), so patch embeddings are constants that a caller may compute once and pass everywhere as
        `patch_embeddings`.
    critic: "adapter" (default), "shared" (the value head reads the policy adapter's state; the value loss reaches
        that adapter), "separate" (a second copy of the backbone, as in the release), "none" (values are 0 and nothing
        learns them: for advantages that need no critic).
    whole_vocabulary: sample over all tokens instead of the 256 action tokens; `evaluate_actions` follows.

    Takes the model over: its weights freeze and its linear layers get adapters (set `gradient_checkpointing` before: a separate
    critic is a copy).
    Only adapters and value head have gradients.
    Raises UserError for an unknown `targets` or `critic` and a rank below 1.
    """

    def __init__(
        self, model, lora_rank=32, lora_alpha=16, targets="all", critic="adapter", whole_vocabulary=False
    ):
        super().__init__()
        from peft import LoraConfig  # not at the top: it takes seconds to import, and only training needs it

        if targets not in LORA_TARGETS or critic not in CRITICS or lora_rank < 1:
            raise UserError(
                f"LoRA targets {targets!r}, critic {critic!r}, rank {lora_rank}: targets can be "
                f"{' or '.join(LORA_TARGETS)}, critic {', '.join(CRITICS)}, rank 1 or more"
            )
        self.model, self.vision_frozen, self.whole_vocabulary = model, targets == "language", whole_vocabulary
        model.requires_grad_(False)
        lora = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=LORA_TARGETS[targets])

        # The variants, resolved: whose state the value head reads, and which adapter the critic trains alone.
        with explain_out_of_memory("the critic does not fit; use --critic adapter"):
            self.critic_model = copy.deepcopy(model) if critic == "separate" else None
        self.policy = Adapter(model, "policy", lora)
        self.adapters = [self.policy]
        if critic in ("adapter", "separate"):
            self.adapters.append(Adapter(self.critic_model or model, "critic", lora))
        self.critic = self.adapters[-1]
        self.value_head = None if critic == "none" else _value_head(model.text["hidden_size"], model.device)
        # Rollouts act with a merged copy of the weights, unless the variant was chosen for its memory.
        self._merged = None if critic == "shared" else MergedCopy(self.policy)
        self._merged_is_current = False
        self.policy.activate()

    @property
    def needs_all_ranks(self):
        """Is every forward pass a meeting of all ranks? (A sharded backbone; else each rank computes for itself.)"""
        return self.model.needs_all_ranks

    def policy_parameters(self):
        """List of float32 parameters that learn by Eq. 2: the policy adapter's."""
        return list(self.policy.named_parameters().values())

    def critic_parameters(self):
        """List of float32 parameters that learn the value; empty for critic "none"."""
        adapters = [p for adapter in self.adapters[1:] for p in adapter.named_parameters().values()]
        return adapters + list(self.value_head.parameters() if self.value_head is not None else ())

    def _check_images(self, pixel_values=None, patch_embeddings=None):
        if patch_embeddings is not None and not self.vision_frozen:
            raise ValueError("targets='all' trains the vision side: pass pixel_values, not patch_embeddings")

    @torch.no_grad()
    def embed_images(self, pixel_values):
        """Patch embeddings (B, P, d), constants of the run. Only where `vision_frozen`."""
        if not self.vision_frozen:
            raise ValueError("targets='all' trains the vision side: there are no constant patch embeddings")
        with explain_out_of_memory("lower --num-envs"):
            return self.model.embed_images(pixel_values)

    @torch.no_grad()
    def act(self, input_ids, attention_mask=None, *, temperature=1.0, generator=None, **images):
        """One decision per row, for a rollout -> tokens (B, 7) int64, log_probs (B, 7) float32, values (B,) float32.

        The log-probs are of exactly these tokens at this temperature: Eq. 2's behaviour policy. `generator` as in
        `generate_actions`.
        """
        self._check_images(**images)
        sampling = dict(temperature=temperature, whole_vocabulary=self.whole_vocabulary, generator=generator)
        with explain_out_of_memory("lower --num-envs"):
            policy = self._merged.model if self._merged_is_current else self.policy.activate()
            actions = policy.generate_actions(input_ids, attention_mask=attention_mask, **images, **sampling)
            values = self.value(input_ids, attention_mask, **images)
        return *actions, values

    def evaluate_actions(self, input_ids, attention_mask, action_tokens, *, temperature=1.0, **images):
        """Log-probs and entropies (B, 7) of given actions under the current policy, with gradients."""
        self._check_images(**images)
        if torch.is_grad_enabled():  # an update follows: the merged copy will be out of date
            self._merged_is_current = False
        sampling = dict(temperature=temperature, whole_vocabulary=self.whole_vocabulary)
        with explain_out_of_memory("lower --micro-batch-size, or turn on --gradient-checkpointing"):
            model = self.policy.activate()
            return model.action_log_probs(input_ids, attention_mask, action_tokens, **images, **sampling)

    def value(self, input_ids, attention_mask=None, **images):
        """V(o) (B,) float32, read from the prompt's last state: before any action token, so of o alone."""
        self._check_images(**images)
        if self.value_head is None:
            return torch.zeros(len(input_ids), device=input_ids.device)
        state = self.critic.activate().prompt_state(input_ids, attention_mask, **images)
        return self.value_head(state.float())[:, 0]

    # ---- the policy as a plain model: to act with, to evaluate, to save --------------------------------------------

    def merge_for_rollout(self):
        """Let `act` use a copy with the adapter merged into the weights until the next `evaluate_actions` with
        gradients: faster, at the price of a set of weights. Called again, it refreshes the copy in place.

        Does nothing where there is no such copy: with a shared critic, and where the backbone is sharded.
        """
        if self._merged is not None:
            with explain_out_of_memory("no room for a merged policy; --critic shared acts without one"):
                self._merged.refresh()
            self._merged_is_current = True

    def evaluation_policy(self):
        """The current policy as an OpenVLA to evaluate: the merged copy where rollouts use one, else the backbone with
        its adapter."""
        self.merge_for_rollout()
        return self.policy.activate() if self._merged is None else self._merged.model

    @contextlib.contextmanager
    def start_policy(self):
        """The policy before training, as an OpenVLA: this model, its adapters switched off until the context ends."""
        self.policy.switch_all(False)
        try:
            yield self.model
        finally:
            self.policy.switch_all(True)

    def base_policy(self):
        """The policy before training as a plain OpenVLA on the frozen backbone's own tensors, which costs no memory."""
        return self.policy.plain_model()

    def shard(self, ranks):
        """Spread the frozen weights over the ranks and move everything to `ranks.device` (models/sharding.py). Give the
        model on the CPU. On one rank it only moves."""
        if ranks.size == 1:
            self.to(ranks.device)
            return
        for model in filter(None, (self.model, self.critic_model)):
            shard_backbone(model, ranks.device)
        move_whole_parameters(self, ranks.device)
        self._merged = None

    def save_policy(self, directory):
        """Write the current policy, adapter merged, in the official layout. Every rank calls this; the first writes."""
        self.policy.save_merged(directory)

    def save_adapters(self, directory):
        """policy/ and critic/ in peft's format (it reads them on the official model too), and the value head."""
        save_adapters(directory, self.adapters, self.value_head)

    def load_adapters(self, directory):
        """Read what `save_adapters` wrote. Raises UserError if a file is missing, damaged, does not fit, or was trained
        on another base."""
        load_adapters(directory, self.adapters, self.value_head)
        self._merged_is_current = False


def _value_head(width, device):
    hidden = max(width // 4, 128), max(width // 8, 64)  # 4096 -> 1024 -> 512 -> 1, as in the release
    sizes = zip((width, *hidden), (*hidden, 1))
    first, second, third = (nn.Linear(*size, bias=False) for size in sizes)
    head = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third).to(device)
    nn.init.normal_(head[-1].weight, std=0.01)  # first values near 0, where most returns are
    return head


# --------------------------------------------------------------------------------------------------------------------
# openvla-tiny
# --------------------------------------------------------------------------------------------------------------------


def build_tiny(seed=0, words=None, device="cpu", **sizes):
    """openvla-tiny with random weights. words: that it knows (default: LIBERO's). sizes: keywords of `tiny_config`."""
    tokenizer = tiny_tokenizer(libero_words() if words is None else words, PROMPT)
    model = OpenVLA.from_config(tiny_config(tokenizer, **sizes), seed=seed, device=device)
    model.side_files["tokenizer.json"] = tokenizer.to_str(pretty=True).encode()
    return model
