"""Any vision-language model of transformers as a reward model, beside the small one of reward_model.py.

Two ways to use one (Qwen2-VL, Qwen2.5-VL and whatever else the Auto classes load):

    stock    what the authors' release wraps (Qwen2-VL-2B): "is it completed?", from one picture, not trained
    tuned    paper, section 3.4: next-token prediction of "1" or "0" on the pseudo labels (Eq. 3), with the action in the
             context. A LoRA adapter on the language model; the vision side stays as it was.

The action stands in the question as seven bins from 0 (lowest value) to 255, the policy's own, since this model's vocabulary
has no action tokens. Either way the score is p("1") / (p("1") + p("0")) for the answer's first token.

    python -m scripts.rprm train --vlm Qwen/Qwen2.5-VL-3B-Instruct --device cuda --lr 1e-4 --demos ... --out runs/vlm
    python train.py --reward-model runs/vlm                                  # or a stock one's name
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from models.answer import answer_token_ids, prior_of, score_of
from models.checkpoints import replace_files
from support.errors import UserError
from support.files import read_json

EDGES = np.linspace(-1.0, 1.0, 256)  # of the policy's bins: `policy.ActionTokenizer`
# 256 bins, the highest two share one
CENTRES = np.append((EDGES[:-1] + EDGES[1:]) / 2, (EDGES[-2] + EDGES[-1]) / 2)


class VLM:
    """A vision-language model that scores frames, with the methods of a `reward_model.RPRM`. There, images are frames
    (n, H, W, 3) uint8 and actions are bins (n, 7) int64.

    info: content of rprm.json where it is a tuned one, else None.
    """

    CHUNK = ROWS = 8  # pictures with their questions at a time
    STOCK = "The task is to {instruction}, is it completed? Answer 1 for yes or 0 for no."
    TUNED = "The task is to {instruction}. The next action is {action}. Is it one of progress? Answer 1 for yes or 0 for no."

    def __init__(self, model, tokenizer, image_processor, processor, info=None):
        self.model, self.tokenizer, self.info = model.eval().requires_grad_(False), tokenizer, info
        self.image_processor, self.processor = image_processor, processor
        self.prior = prior_of(info or {})
        self.token_ids = answer_token_ids(lambda text: tokenizer.encode(text, add_special_tokens=False))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """A stock model (directory or hub id), or what `python -m scripts.rprm train --vlm` made: an adapter, merged here."""
        # Late: transformers takes seconds to import, and few runs use a model of its kind.
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

        info = read_json(Path(path) / "rprm.json") if (Path(path) / "rprm.json").is_file() else None
        base = path if info is None else info["vlm"]
        try:
            own = dict(trust_remote_code=False)  # never code that came with the weights
            tokenizer = AutoTokenizer.from_pretrained(base, **own)
            image_processor = AutoImageProcessor.from_pretrained(base, **own)
            # transformers builds a Qwen-VL processor only where torchvision is installed (for video). One image needs a
            # tokenizer, an image processor and the line of code in `_inputs`; every other family comes as a whole.
            processor = (
                None if hasattr(image_processor, "merge_size") else AutoProcessor.from_pretrained(base, **own)
            )
            own["use_safetensors"] = True  # nor a pickle
            model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, **own).to(device)
            if info is not None:
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, path).merge_and_unload()
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise UserError(f"no vision-language model at {path}: {error}") from error
        return cls(model, tokenizer, image_processor, processor, info)

    def _inputs(self, images, questions):
        """What the model reads. Rows of different lengths are padded on the left: the answer follows each question."""
        kind = {"type": "image"}
        chats = [
            [{"role": "user", "content": [kind, {"type": "text", "text": question}]}]
            for question in questions
        ]
        padding = dict(padding=True, padding_side="left", return_tensors="pt")
        if self.processor is not None:
            texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
            return self.processor(images=[[image] for image in images], text=texts, **padding)
        template = self.tokenizer.apply_chat_template
        texts = [template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        inputs = self.image_processor(images=images, return_tensors="pt")
        image_id = self.model.config.image_token_id
        image_token = self.tokenizer.convert_ids_to_tokens(image_id)
        # of each image
        patches = int(inputs["image_grid_thw"][0].prod()) // self.image_processor.merge_size**2
        tokens = self.tokenizer(
            [text.replace(image_token, image_token * patches) for text in texts], **padding
        )
        inputs.update(tokens)
        inputs["mm_token_type_ids"] = (
            tokens["input_ids"] == image_id
        ).int()  # 1 at image tokens: for 2-D positions
        return inputs

    def _question(self, instruction, bins=None):
        if self.info is None:
            return self.STOCK.format(instruction=instruction)
        action = "unknown" if bins is None else " ".join(map(str, bins))
        return self.TUNED.format(instruction=instruction, action=action)

    def _logits(self, frames, questions):
        """(B, V) float32 logits of the answer's first token."""
        # casts what is a float
        inputs = self._inputs(list(frames), questions).to(self.model.device, self.model.dtype)
        return self.model(**inputs, logits_to_keep=1).logits[:, -1].float()

    # ---- scoring -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score_frames(self, frames, instructions, bins=None):
        """Scores (B,) float64 of frames (B, H, W, 3) uint8 upright, each with its instruction. bins (B, 7): the actions,
        for a tuned model; None: of the state alone. A stock one is not shown any action."""
        scores = []
        for i in range(0, len(frames), self.CHUNK):
            rows = range(i, min(i + self.CHUNK, len(frames)))
            questions = [
                self._question(instructions[r], None if bins is None else bins[r].tolist()) for r in rows
            ]
            logits = self._logits(frames[i : i + self.CHUNK], questions)[:, self.token_ids].double()
            scores.append(score_of(logits, self.prior).cpu().numpy())
        return np.concatenate(scores)

    # ---- training (Eq. 3), by reward_model.fit -----------------------------------------------------------------------

    def add_adapter(self, path, statistics, rank):
        """Add a LoRA adapter of this rank to the language model, and take the question that has the action in it.

        path: what the stock model was loaded from. statistics: `OpenVLA.action_statistics` of the policy.
        """
        from peft import LoraConfig, get_peft_model  # late: seconds to import

        head = self.model.get_output_embeddings()
        vision = ("visual", "vision", "image", "projector", "connector")
        linear = [
            name for name, m in self.model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head
        ]
        names = [name for name in linear if not any(part in name for part in vision)]
        if not names:
            raise UserError(f"{path}: found no linear layer of a language model to adapt")
        keys = ("q01", "q99", "mask")
        self.info = {
            "vlm": str(path),
            "action": dict(zip(keys, (x.tolist() for x in statistics), strict=True)),
        }
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        self.model = get_peft_model(self.model, config).eval()
        self.parameters = [p for name, p in self.model.named_parameters() if "lora_" in name]
        return self

    def encode_images(self, frames):
        return torch.from_numpy(np.ascontiguousarray(frames))

    def encode_actions(self, actions, suite=None):
        """Actions (n, 7) in the policy's convention -> bins (n, 7) int64, by the statistics that it was tuned with; None
        for a stock model, which is shown none."""
        if self.info is None:
            return None
        low, high, mask = self.action_statistics()
        x = np.where(mask, 2 * (actions - low) / np.maximum(high - low, 1e-8) - 1, actions)
        return torch.from_numpy(np.digitize(np.clip(x, -1.0, 1.0), EDGES).astype(np.int64) - 1)

    def decode_actions(self, bins, suite=None):
        low, high, mask = self.action_statistics()
        x = CENTRES[bins.numpy()]
        return np.where(mask, 0.5 * (x + 1) * (high - low) + low, x)

    def action_statistics(self, unnorm_key=None):
        """(q01, q99, mask), each (7,), that it was tuned with: it has but these; None for a stock model."""
        if self.info is None:
            return None
        return tuple(np.array(self.info["action"][name]) for name in ("q01", "q99", "mask"))

    def answer_logits(self, batch, hidden, whole_vocabulary=False):
        rows = zip(batch.instructions, batch.actions.tolist(), hidden.tolist(), strict=True)
        questions = [self._question(text, None if hide else bins) for text, bins, hide in rows]
        logits = self._logits(batch.images.numpy(), questions)
        return logits if whole_vocabulary else logits[:, self.token_ids]

    def save(self, directory, info):
        """The adapter in peft's format, and rprm.json, which names the stock model, last: only with it the directory counts."""
        content = {**info, **self.info, "prior": self.prior}
        with replace_files(directory) as part:
            self.model.save_pretrained(part)
            (part / "rprm.json").write_text(json.dumps(content, indent=1))
