"""openvla-tiny: the official layout with small numbers, and a tokenizer of one token a word.

1.3 M parameters instead of 7.5 billion, everything else the same: two towers, a projector, a Llama, action
tokens at the end of the vocabulary. `policy.build_tiny` makes one with random weights; `sft.py` trains it.
"""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from support.quiet import silence_third_party

# Ids 0, 1, 2 as in Llama; <act> plays 29871's part; "1" and "0" are the reward model's answers, success and no success.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<act>", "1", "0")


def libero_words():
    """All words of the instructions of LIBERO's five suites, sorted."""
    silence_third_party()
    from libero.libero import benchmark

    suites = [
        benchmark.get_benchmark(name)()
        for name in ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    ]
    return sorted(
        {word for suite in suites for task in suite.tasks for word in task.language.lower().split()}
    )


def tiny_tokenizer(words, prompt):
    """One token a word of `words` (a list) and of the template `prompt`, laid out like Llama's vocabulary:
    specials, words, spare ids up to a multiple of 64, the 256 action tokens, then PAD as the first of the 64
    padding rows."""
    template = prompt.format(instruction="").lower().replace(":", " : ").replace("?", " ? ").split()
    vocabulary = list(SPECIAL_TOKENS) + sorted({*words, *template, "task", "is", "it", "completed"})
    vocabulary += [f"<spare_{i}>" for i in range(-len(vocabulary) % 64)]
    vocabulary += [f"<action_{i}>" for i in range(256)] + ["<pad>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # splits "?" and ":" off
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def tiny_config(
    tokenizer,
    image_size=112,
    patch_size=16,
    vision_width=(96, 48),
    vision_blocks=(4, 2),
    vision_heads=(4, 2),
    width=128,
    layers=3,
    heads=4,
    mlp=256,
    action_repeat=4,
    sampling_temperature=0.6,
    max_positions=256,
):
    """config.json of openvla-tiny for a `tiny_tokenizer`: the official fields with small numbers. A tower's
    last block is never computed.

    vision_width, vision_blocks, vision_heads: of the DINOv2-like and the SigLIP-like tower (one number serves
    both).
    The second tower is the smaller: at this size two towers see no more than one, and training is short of
    samples per second (1.7 times as many as with two equal towers and a fourth language layer).
    """
    pairs = [x if isinstance(x, tuple) else (x, x) for x in (vision_width, vision_blocks, vision_heads)]
    towers = [
        dict(
            hidden_size=w,
            num_hidden_layers=b,
            num_attention_heads=h,
            intermediate_size=4 * w,
            patch_size=patch_size,
            image_size=image_size,
        )
        for w, b, h in zip(*pairs, strict=True)
    ]
    pad = tokenizer.token_to_id("<pad>")
    return {
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_sizes": [image_size, image_size],
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "pad_token_id": pad,
        "norm_stats": {},
        "vision_configs": [{**towers[0], "num_register_tokens": 4}, {**towers[1], "num_register_tokens": 0}],
        "text_config": {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": pad + 64,
            "pad_token_id": pad,
            "bos_token_id": 1,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": max_positions,
        },
        "suffix_token_id": tokenizer.token_to_id("<act>"),
        "action_repeat": action_repeat,
        "sampling_temperature": sampling_temperature,
    }


def draw_weights_(model, generator):
    """Fill an OpenVLA of any size with random weights.

    Matrices get a standard deviation of 1 / sqrt(fan-in). At Llama's width that is the usual 0.02, but at the
    width of openvla-tiny it is 0.09, and 0.02 would leave the image too quiet: memorising 32 images, the loss
    began to depend on the image after 100 steps with this, and not within 150 with 0.02.
    """
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "scale_factor")):
            nn.init.ones_(p)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        elif name.endswith("pos_embed"):
            # As large as the patch features that they are added to: where the gripper is, is what has to be
            # learnt. At 0.02 openvla-tiny ignored the image for 64,000 samples, at 0.5 for fewer than 10,000.
            nn.init.normal_(p, std=0.5, generator=generator)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight", "cls_token", "reg_token")):
            nn.init.normal_(p, std=0.02, generator=generator)
        else:
            nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
