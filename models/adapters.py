"""LoRA adapters on a frozen OpenVLA: W + scaling x B A in place of every weight W that has one (peft's layers
and file format).

One frozen backbone can carry several adapters, of which one is active at a time. An `Adapter` is the backbone
seen through one of them.
"""

import hashlib
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from models.checkpoints import replace_files
from models.sharding import is_first_rank, whole_tensor
from support.errors import UserError

# Full-match patterns over module names. (A list of suffixes would also catch `patch_embed.proj`, a convolution.)
LORA_TARGETS = {
    "all": r".*(attn\.qkv|attn\.proj|mlp\.fc[12]|projector\.fc[123]|[qkvo]_proj|gate_proj|up_proj|down_proj)",
    "language": r"language_model\..*([qkvo]_proj|gate_proj|up_proj|down_proj)",
}


class Adapter:
    """`model` with an adapter of its own, under `name`. Adding it leaves the frozen weights and other
    adapters as they are.

    Adapters stay float32 on a bfloat16 backbone: at a learning rate of 2e-5 an Adam step is smaller than
    bfloat16's rounding.
    """

    def __init__(self, model, name, config):
        # not at the top: it takes seconds to import, and only training needs it
        from peft import inject_adapter_in_model

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two are the point here
            inject_adapter_in_model(config, model, name)
        self.model, self.name, self.config = model, name, config
        self.layers = {k: module for k, module in model.named_modules() if hasattr(module, "lora_A")}
        for parameter in self.named_parameters().values():
            parameter.data = parameter.data.float()
        model.active_adapter = None  # peft has just chosen one itself
        self.base_fingerprint = base_fingerprint(self.layers, self.base_tensors().__getitem__)

    def named_parameters(self):
        """{plain tensor name: parameter} of this adapter."""
        return {
            name.replace(f".{self.name}.", "."): p
            for name, p in self.model.named_parameters()
            if "lora_" in name and f".{self.name}." in name
        }

    def activate(self):
        """The backbone with this adapter switched on, and every other one off."""
        if self.model.active_adapter != self.name:
            for layer in self.layers.values():
                layer.set_adapter(self.name)
            self.model.active_adapter = self.name
            self._keep_trainable()
        return self.model

    def switch_all(self, on):
        """Switch every adapter of the backbone off, and back on again."""
        for layer in self.layers.values():
            layer.enable_adapters(on)
        self._keep_trainable()

    def _keep_trainable(self):
        # peft freezes the adapter that it switches off. Gradients that are still to come would be dropped
        # without a word.
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)

    # ---- merging -----------------------------------------------------------------------------------------------------

    def base_tensors(self):
        """{plain tensor name: frozen parameter} of the backbone."""
        return {
            k.replace(".base_layer.", "."): p for k, p in self.model.named_parameters() if "lora_" not in k
        }

    @torch.no_grad()
    def merged(self, name, base):
        """The tensor `name` of a plain model that behaves as this adapter does: `base` + scaling x B A where
        there is an adapter.

        A new tensor, instead of peft's merge and unmerge in place: in bfloat16 W + D - D is not W, and a
        backbone that drifts with every rollout would drift the critic too. A sharded tensor is gathered into
        host memory; all ranks must call this then.
        """
        weight, layer = whole_tensor(base), self.layers.get(name.removesuffix(".weight"))
        if layer is None or not name.endswith(".weight"):
            return weight
        return (weight.float() + layer.get_delta_weight(self.name).to(weight.device).float()).to(weight.dtype)

    def plain_model(self):
        """The backbone without adapters: a plain model of its class on the frozen tensors themselves, which costs no
        memory."""
        model = self.model
        with torch.device("meta"):
            plain = type(model)(model.config)
        plain.load_state_dict(self.base_tensors(), assign=True)
        plain.norm_stats, plain.side_files, plain.unused = model.norm_stats, model.side_files, model.unused
        return plain.requires_grad_(False)

    def save_merged(self, directory):
        """Write the backbone with this adapter merged, in the official layout. Weights are merged tensor by tensor while
        shards are written: besides the model, only one shard is in memory. Every rank calls this; the first writes."""
        base = self.base_tensors()
        if is_first_rank():
            self.model.write(directory, base, self.merged)
        elif self.model.needs_all_ranks:  # to gather what the first one writes, in its order
            for name in sorted(base):
                self.merged(name, base[name])


class MergedCopy:
    """The backbone with an adapter merged into its weights, as the plain model `model` (None before the first `refresh`).
    It has the adapted weights of its own, and shares all others with the backbone."""

    def __init__(self, adapter):
        self.adapter, self.model = adapter, None

    @torch.no_grad()
    def refresh(self):
        """Merge the adapter as it is now, in place: the tensors keep their addresses."""
        if self.model is None:
            model = self.adapter.plain_model()
            for name in self.adapter.layers:
                module = model.get_submodule(name)
                module.weight = nn.Parameter(torch.empty_like(module.weight), requires_grad=False)
            self.model = model
        base = self.adapter.base_tensors()
        for name in self.adapter.layers:
            merged = self.adapter.merged(f"{name}.weight", base[f"{name}.weight"])
            self.model.get_submodule(name).weight.copy_(merged)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def save_adapters(directory, adapters, value_head=None):
    """Write each adapter in peft's format under its name, and the value head beside them. Nothing is replaced
    before all are written."""
    with replace_files(directory) as part:
        for adapter in adapters:
            save_adapter(part / adapter.name, adapter)
        if value_head is not None:
            head = {name: p.detach().cpu() for name, p in value_head.named_parameters()}
            save_file(head, part / "value_head.safetensors")


@torch.no_grad()
def load_adapters(directory, adapters, value_head=None):
    """Read what `save_adapters` wrote. Raises UserError, with nothing changed, if a file is missing, damaged, does not fit,
    or was trained on another base."""
    directory, loaded = Path(directory), []
    for adapter in adapters:  # check everything before changing anything
        file = directory / adapter.name / "adapter_model.safetensors"
        parameters = {f"base_model.model.{name}": p for name, p in adapter.named_parameters().items()}
        loaded += read_tensors_for(file, parameters, adapter.base_fingerprint)
    if value_head is not None:
        parameters = dict(value_head.named_parameters())
        loaded += read_tensors_for(directory / "value_head.safetensors", parameters)
    for parameter, tensor in loaded:
        parameter.copy_(tensor)


# Matrices without an adapter of their own that a base is told by all the same.
LANDMARKS = (
    "vision_backbone.featurizer.patch_embed.proj",
    "projector.fc3",
    "language_model.model.embed_tokens",
    "language_model.lm_head",
)


def base_fingerprint(layers, tensor_of):
    """Tells apart the weights that adapters of `layers` (names) may stand on, whatever file, device or number format they
    are in: a hash over some numbers of each matrix. tensor_of(name) -> tensor. None on device "meta"."""
    digest = hashlib.sha256()
    for layer in sorted({*layers, *LANDMARKS}):
        weight = tensor_of(f"{layer}.weight").detach().flatten()
        if weight.is_meta:
            return None
        sample = weight[:: max(1, weight.numel() // 16)].bfloat16().float().cpu()
        digest.update(layer.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(directory, adapter):
    """Write an adapter in peft's format (which reads it on the official model too), with the fingerprint of its base."""
    directory.mkdir()
    adapter.config.save_pretrained(directory)
    tensors = {f"base_model.model.{name}": p.detach().cpu() for name, p in adapter.named_parameters().items()}
    save_file(
        tensors, directory / "adapter_model.safetensors", {"base_weights": adapter.base_fingerprint or ""}
    )


def read_tensors(path):
    """({name: tensor}, fingerprint of the base or None) of a safetensors file. Raises UserError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            # absent in files from before it was stored
            return tensors, (file.metadata() or {}).get("base_weights")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def read_tensors_for(path, parameters, fingerprint=None):
    """[(parameter, tensor)] for {name: parameter} from a safetensors file. Changes nothing.

    fingerprint: `base_fingerprint` of what the parameters stand on.
    Raises UserError if the file is missing, damaged, does not fit, or belongs to another base.
    """
    tensors, base = read_tensors(path)
    if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
        raise UserError(f"{path} was saved with another LoRA rank, other LoRA targets or another model size")
    if base and fingerprint and base != fingerprint:
        raise UserError(
            f"{path} was trained on other weights than these: give the checkpoint that its run started from (not the "
            "policy that it was merged into, which would have it twice)"
        )
    return [(parameters[name], tensor) for name, tensor in tensors.items()]
