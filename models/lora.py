"""One LoRA adapter on an OpenVLA's language model: added for training, saved in peft's format, merged when loaded."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.errors import UserError

LANGUAGE = r"language_model\..*([qkvo]_proj|gate_proj|up_proj|down_proj)"
NAME = "rprm"


def add_adapter(model, rank, scale=2.0):
    """Freeze `model`, give the linear layers of its language model adapters -> (their parameters, peft's configuration).

    They are float32 on a model of any dtype: at a low learning rate an Adam step is smaller than bfloat16's rounding.
    """
    from peft import (
        LoraConfig,
        inject_adapter_in_model,
    )  # late: seconds to import, and only training needs it

    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=LANGUAGE)
    inject_adapter_in_model(config, model, NAME).requires_grad_(False)
    parameters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters, config


def save_adapter(model, config, directory):
    """Write adapter_config.json and adapter_model.safetensors."""
    names = {name.replace(f".{NAME}.", "."): p for name, p in model.named_parameters() if "lora_" in name}
    tensors = {f"base_model.model.{name}": p.detach().cpu().contiguous() for name, p in names.items()}
    try:
        config.save_pretrained(directory)
        save_file(tensors, Path(directory) / "adapter_model.safetensors")
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error


@torch.no_grad()
def merge_adapter(model, directory, scale=2.0):
    """W + scale x B A in place of W, for every layer that the adapter in `directory` has."""
    path = Path(directory) / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
        for a_name in (name for name in tensors if name.endswith(".lora_A.weight")):
            layer = a_name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = model.get_submodule(layer).weight
            a, b = (
                tensors[name].to(weight.device).float()
                for name in (a_name, a_name.replace(".lora_A.", ".lora_B."))
            )
            weight.copy_(weight.float() + scale * (b @ a))
    except (OSError, SafetensorError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is no adapter of the policy that its rprm.json names: {error}") from error
