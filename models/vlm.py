"""Any vision-language model of transformers as the judge of a robot's progress, beside the tiny one of reward_model.py.

Two ways to use one (Qwen2-VL, Qwen2.5-VL and whatever else the Auto classes load):

    asked in words, not trained    what the authors' release wraps (Qwen2-VL-2B): "is it completed?", seen in one picture
    tuned                          paper, section 3.4: next-token prediction of "1" or "0" on the pseudo labels (Eq. 3), with the
                                   action in the context. A LoRA adapter on the language model; the vision side stays as it was.

The action stands in the question as seven levels from 0 (lowest) to 255, the policy's own bins, since this model's
vocabulary has no action tokens. Either way the score is p("1") / (p("1") + p("0")) for the answer's first token.

    python reward_model.py train --vlm Qwen/Qwen2.5-VL-3B-Instruct --device cuda --lr 1e-4 --demos ... --out runs/vlm
    python train.py --reward-model runs/vlm                                  # or a stock one's name, asked zero-shot
"""

import json
from pathlib import Path

import numpy as np
import torch

from support.errors import UserError
from support.files import atomic_write, read_json
from policy import ActionTokenizer, explain_out_of_memory, normalize_actions, policy_convention, unnormalize_actions
from reward_model import prior_of, score_of

LEVELS = ActionTokenizer(256)  # its own numbering from 0 is all that counts here


class VLM:
    """A vision-language model that judges frames. info: content of rprm.json where it is a tuned one, else None.

    It has the methods that `reward_model.fit` wants of a judge, as `RewardModel` does; there, images are frames (n, H, W, 3)
    uint8 and actions are levels (n, 7) int64.
    """

    CHUNK = 8  # rows judged at a time
    STOCK = "The task is to {instruction}, is it completed? Answer 1 for yes or 0 for no."
    TUNED = "The task is to {instruction}. The next action is {action}. Is it one of progress? Answer 1 for yes or 0 for no."

    def __init__(self, model, tokenizer, image_processor, processor, info=None):
        self.model, self.tokenizer, self.info = model.eval().requires_grad_(False), tokenizer, info
        self.image_processor, self.processor = image_processor, processor
        self.prior = prior_of(info or {})
        pieces = [tokenizer.encode(text, add_special_tokens=False) for text in ("1", "0")]
        if any(len(piece) != 1 for piece in pieces) or pieces[0] == pieces[1]:
            raise UserError(f'this model\'s tokenizer does not write "1" and "0" as one token each: {pieces}')
        self.token_ids = [piece[0] for piece in pieces]

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """A stock model (directory or hub id), or the directory that `reward_model.py train --vlm` made: an adapter, merged here."""
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        info = read_json(Path(path) / "rprm.json") if (Path(path) / "rprm.json").is_file() else None
        base = path if info is None else info["vlm"]
        try:
            own = dict(trust_remote_code=False)  # never code that came with the weights
            tokenizer = AutoTokenizer.from_pretrained(base, **own)
            image_processor = AutoImageProcessor.from_pretrained(base, **own)
            # transformers builds a Qwen-VL processor only where torchvision is installed (for video). One image needs a
            # tokenizer, an image processor and the line of code in `_inputs`; every other family comes as a whole.
            processor = None if hasattr(image_processor, "merge_size") else AutoProcessor.from_pretrained(base, **own)
            own["use_safetensors"] = True  # nor a pickle
            model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, **own).to(device)
            if info is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, path).merge_and_unload()
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            raise UserError(f"no vision-language model at {path}: {error}") from error
        return cls(model, tokenizer, image_processor, processor, info)

    def _inputs(self, images, questions):
        """What the model reads, rows of different lengths padded on the left: the answer comes right after each question."""
        kind = {"type": "image"}
        chats = [[{"role": "user", "content": [kind, {"type": "text", "text": question}]}] for question in questions]
        padding = dict(padding=True, padding_side="left", return_tensors="pt")
        if self.processor is not None:
            texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
            return self.processor(images=[[image] for image in images], text=texts, **padding)
        texts = [self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        inputs = self.image_processor(images=images, return_tensors="pt")
        image_id = self.model.config.image_token_id
        image_token = self.tokenizer.convert_ids_to_tokens(image_id)
        patches = int(inputs["image_grid_thw"][0].prod()) // self.image_processor.merge_size**2  # of each image
        tokens = self.tokenizer([text.replace(image_token, image_token * patches) for text in texts], **padding)
        inputs.update(tokens)
        inputs["mm_token_type_ids"] = (tokens["input_ids"] == image_id).int()  # 1 at image tokens: for 2-D positions
        return inputs

    def _question(self, instruction, levels=None):
        if self.info is None:
            return self.STOCK.format(instruction=instruction)
        action = "unknown" if levels is None else " ".join(map(str, levels))
        return self.TUNED.format(instruction=instruction, action=action)

    def _logits(self, frames, questions):
        """(B, V) float32 logits of the answer's first token."""
        inputs = self._inputs(list(frames), questions).to(self.model.device, self.model.dtype)  # casts what is a float
        return self.model(**inputs, logits_to_keep=1).logits[:, -1].float()

    # ---- judging -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score_rows(self, frames, instructions, levels=None):
        """Scores (B,) float64 of frames (B, H, W, 3) uint8 upright, each with its instruction. levels (B, 7): the actions, for a
        tuned model; None: of the state alone. A stock one is not shown any action."""
        scores = []
        with explain_out_of_memory("use a smaller --reward-model, or --prm-mode none"):
            for i in range(0, len(frames), self.CHUNK):
                rows = range(i, min(i + self.CHUNK, len(frames)))
                questions = [self._question(instructions[r], None if levels is None else levels[r].tolist()) for r in rows]
                logits = self._logits(frames[i : i + self.CHUNK], questions)[:, self.token_ids].double()
                scores.append(score_of(logits, self.prior).cpu().numpy())
        return np.concatenate(scores)

    def score_frames(self, frames, instruction, actions=None, unnorm_key=None):
        """Scores (T,) float64 of a recording: frames (T, H, W, 3) uint8 upright, actions (T, 7) in file convention or None."""
        levels = None if actions is None or self.info is None else self.actions_of(actions, unnorm_key)
        return self.score_rows(frames, [instruction] * len(frames), levels)

    # ---- training (Eq. 3), by reward_model.fit -------------------------------------------------------------------------

    def to_be_tuned(self, path, statistics, rank):
        """Add a LoRA adapter of this rank to the language model, and take the question that has the action in it.

        path: what the stock model was loaded from. statistics: `OpenVLA.action_statistics` of the policy.
        """
        from peft import LoraConfig, get_peft_model

        head = self.model.get_output_embeddings()
        names = [
            name for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
            and not any(part in name for part in ("visual", "vision", "image", "projector", "connector"))
        ]
        if not names:
            raise UserError(f"{path}: found no linear layer of a language model to adapt")
        self.info = {"vlm": str(path), "action": dict(zip(("q01", "q99", "mask"), (x.tolist() for x in statistics), strict=True))}
        self.model = get_peft_model(self.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)).eval()
        return self

    def images_of(self, frames):
        return torch.from_numpy(np.ascontiguousarray(frames))

    def _statistics(self):
        return (np.array(self.info["action"][name]) for name in ("q01", "q99", "mask"))

    def actions_of(self, actions, unnorm_key=None):
        """Actions (n, 7) in file convention -> levels (n, 7) int64. (The statistics are those that the model was tuned with.)"""
        tokens = LEVELS.encode(normalize_actions(policy_convention(actions), *self._statistics()))
        return torch.from_numpy(LEVELS.levels(tokens))

    def values_of(self, levels, unnorm_key=None):
        return unnormalize_actions(LEVELS.decode(LEVELS.levels(levels)), *self._statistics())

    def trainable(self):
        return [p for name, p in self.model.named_parameters() if "lora_" in name]

    def verdicts(self, batch, hidden, whole_vocabulary=False):
        rows = zip(batch.instructions, batch.actions.tolist(), hidden.tolist(), strict=True)
        questions = [self._question(text, None if hide else levels) for text, levels, hide in rows]
        logits = self._logits(batch.images.numpy(), questions)
        return logits if whole_vocabulary else logits[:, self.token_ids]

    def save(self, directory, info):
        """The adapter in peft's format, and rprm.json, which names the stock model, last: only with it the directory counts."""
        try:
            self.model.save_pretrained(directory)
        except OSError as error:
            raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
        atomic_write(Path(directory) / "rprm.json", json.dumps({**info, **self.info, "prior": self.prior}, indent=1))
