"""What the tests of reward models share: a simulated hand, demonstrations of it, a small OpenVLA."""

import copy
import json

import h5py
import numpy as np
import torch

from policy import build_tiny
from scripts import rprm
from support.cli import parse_command

FINE = 200  # Hz of the simulated hand
STROKE = 0.08


def pick_and_place(hz, noise=0.0, gripper_noise=0.0, held=0.045, seed=0):
    """A hand that reaches (stops at 2.0 s), closes, carries (stops at 4.8 s), opens, and leaves.

    Returns actions (T, 7), ee_pos (T, 3), gripper_states (T, 2).
    The fingers move at 0.15 m/s, so with `held` = 45 mm they stop 0.23 s after each command.
    """
    rng = np.random.default_rng(seed)
    phases = [  # seconds, peak speed, gripper closed
        (0.4, 0, False),
        (1.6, 0.25, False),
        (0.8, 0, True),
        (2.0, 0.25, True),
        (0.6, 0, False),
        (0.8, 0.2, False),
    ]
    position, opening, path, openings, commands = np.zeros(3), STROKE, [], [], []
    for seconds, speed, closed in phases:
        for phase in (np.arange(int(seconds * FINE)) + 0.5) / int(seconds * FINE):
            path.append(position.copy())
            openings.append(opening)
            commands.append(1.0 if closed else -1.0)
            position = position + speed * np.sin(np.pi * phase) * np.array([0.8, 0.6, 0.0]) / FINE
            opening += np.clip((held if closed else STROKE) - opening, -0.15 / FINE, 0.15 / FINE)
    path, openings, commands = (np.array(x)[:: FINE // hz] for x in (path, openings, commands))
    path = path + noise * rng.normal(size=path.shape)
    openings = openings + gripper_noise * rng.normal(size=len(openings))
    actions = np.zeros((len(path), 7))
    actions[:, 6] = commands
    return actions, path, np.stack([openings / 2, -openings / 2], axis=1)


WORDS = ["pick", "up", "the", "red", "green", "block", "and", "place", "it", "in", "basket"]
STATS = {"toy": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}}


def small_openvla():
    torch.manual_seed(0)
    model = build_tiny(
        0, WORDS, image_size=56, patch_size=14, vision_width=32, vision_blocks=2, vision_heads=2, width=64, layers=2,
        heads=2, mlp=128,
    )  # fmt: skip
    model.norm_stats = STATS
    return model


def copy_of(model):
    return copy.deepcopy(model)


def run(argv):
    """`python -m scripts.rprm ARGV` in this process."""
    rprm.main(*parse_command(rprm.COMMANDS, "", argv))


def write_demos(path, count, hz=5, broken=(), size=64):
    """Demonstrations in LIBERO's layout: frames whose brightness follows the speed, stored upside down."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "pick up the red block"})
        if hz != 20:
            data.attrs["action_repeat"] = 20 // hz
        for i in range(count):
            actions, ee_pos, gripper = pick_and_place(hz, noise=0.0002, seed=i)
            moving = np.append(np.linalg.norm(np.diff(ee_pos, axis=0), axis=1), 0) * hz
            frames = np.zeros((len(actions), size, size, 3), np.uint8)
            frames[:, size // 2 :] = (40 + 800 * moving).clip(0, 255).astype(np.uint8)[:, None, None, None]
            if i in broken:
                ee_pos[3] = np.nan
            demo = data.create_group(f"demo_{i}")
            demo["actions"] = actions
            demo["obs/ee_pos"], demo["obs/gripper_states"], demo["obs/agentview_rgb"] = (
                ee_pos,
                gripper,
                frames,
            )


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def make_qwen(path, kind_of_qwen="Qwen2.5-VL"):
    """A Qwen2-VL or its successor with random weights, in the layout of the hub."""
    import transformers  # late: seconds to import, and few tests need it
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = "<unk> 0 1 user assistant The task is to pick up the red green block , it completed ? Answer for yes or no"
    words = [*words.split(), ".", *"next action is Is one of progress unknown".split(), *map(str, range(256))]
    base = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>")
    )
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base,
        unk_token="<unk>",
        pad_token="<|end|>",
        eos_token="<|end|>",
        additional_special_tokens=special,
        chat_template=CHAT,
    )
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    torch.manual_seed(0)
    if kind_of_qwen == "Qwen2-VL":
        kind, vision = "Qwen2VL", dict(embed_dim=32, hidden_size=32, mlp_ratio=2)
    else:
        kind = "Qwen2_5_VL"
        vision = dict(hidden_size=32, intermediate_size=64, out_hidden_size=32, window_size=56)
        vision["fullatt_block_indexes"] = [0]
    config = getattr(transformers, f"{kind}Config")(
        text_config=dict(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(depth=1, num_heads=2, patch_size=14, initializer_range=0.5, **vision),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}).save_pretrained(path)
    return path
