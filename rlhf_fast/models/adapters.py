"""LoRA adapters (peft) on any of the models: adding, switching off, merging, checkpointing and refusing them.

A model with adapters is a peft.PeftModel around the transformers model. With its adapters switched off, the policy is
the model that training began with, so it is its own reference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..errors import ConfigError


def import_peft():
    """The peft library. ConfigError if it is not installed."""
    try:
        import peft
    except ImportError:
        raise ConfigError("LoRA adapters need peft: pip install peft") from None
    return peft


def has_adapters(model: nn.Module) -> bool:
    """Whether the model is a peft.PeftModel. (transformers' own models spell the method disable_adapters.)"""
    return hasattr(model, "disable_adapter")


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself; its layers contain the adapters, if there are any."""
    return model.get_base_model() if has_adapters(model) else model


def add_lora(
    model: PreTrainedModel, *, r: int, alpha: float, dropout: float = 0.0, target_modules: list[str] | None = None
) -> nn.Module:
    """The model with new LoRA adapters (Hu et al. 2021): W x + (alpha / r) B A x, where only A and B are trained.

    B starts at 0, so at first nothing changes. target_modules: names of linear layers; the default is all linear layers
    of the trunk. A reward model's head is trained in full and saved with the adapters. ConfigError without peft, or for
    the lm_head, whose product is fused into the loss.
    """
    if has_adapters(model):
        raise ConfigError("the model already has adapters, which continue to be trained: set lora_r to 0")
    peft = import_peft()
    is_reward_model = hasattr(model, "score")
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules or "all-linear",
        task_type="SEQ_CLS" if is_reward_model else "CAUSAL_LM",
        modules_to_save=["score"] if is_reward_model else None,
    )  # fmt: skip
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:  # no layer of that name
        raise ConfigError(f"lora_target_modules: {error}") from error
    check_lm_head_is_plain(adapted)
    return adapted


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switches the adapters off inside the block: the model is then its own reference policy, at no cost in memory."""
    if not has_adapters(model):
        raise ConfigError("adapters_off needs a model with adapters (add_lora); use make_reference(model)")
    with model.disable_adapter():
        yield


def merge_adapters(model: nn.Module) -> PreTrainedModel:
    """A plain transformers model with the same outputs; the given model keeps its adapters. A model without adapters is
    returned itself."""
    check_adapters(model)
    return copied(model).merge_and_unload() if has_adapters(model) else model


def copied(model: nn.Module) -> nn.Module:
    """A deep copy. What the last forward left on a module (RecurrentGemma: its state) is copied without its graph,
    which torch cannot copy."""
    left = [x for m in model.modules() for x in vars(m).values() if isinstance(x, Tensor) and not x.is_leaf]
    return copy.deepcopy(model, {id(x): x.detach().clone() for x in left})


# --- in a checkpoint -------------------------------------------------------------------------------------------------


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has to hold: every weight, or only the trainable ones if the model has adapters."""
    return {name: whole(x) for name, x in _trained(model).items()}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    if not has_adapters(model):
        return model.state_dict()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a trained_state. ConfigError if its names or shapes differ from the model's."""
    here = _trained(model)
    if {name: x.shape for name, x in state.items()} != {name: x.shape for name, x in here.items()}:
        what = "adapters, or none" if has_adapters(model) else "weights"
        raise ConfigError(
            f"the checkpoint has other {what}: resume with the same model, lora_r and lora_target_modules"
        )
    state = {name: rows_like(here[name], x) for name, x in state.items()}
    model.load_state_dict(state, strict=not has_adapters(model))


def whole(x: Tensor) -> Tensor:
    """The full tensor, if x is sharded by rows over the processes (sharding.py): on the CPU in the first process, empty
    in the others. Any other x is returned itself. All processes call this together."""
    if not isinstance(x, DTensor):
        return x
    rows = x.full_tensor()
    return rows.new_empty(0) if x.device_mesh.get_rank() else rows.cpu()


def rows_like(like: Tensor, x: Tensor) -> Tensor:
    """x, sharded by rows in the same way as `like` if that is sharded."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


# --- what is refused -------------------------------------------------------------------------------------------------


def check_base_is_saved(model: str | Path | PreTrainedModel) -> None:
    """ConfigError unless the base model of new adapters can be loaded again, because only the adapters will be saved.

    A path passes. An object passes if every weight equals the one in the safetensors files at its name_or_path, because
    the saved adapters will be loaded on top of those. A model that was trained or merged in memory does not pass.
    """
    if isinstance(model, (str, Path)) or _is_as_saved(model):
        return
    raise ConfigError(
        f"lora_r: adapters are saved without the base model's weights, and the weights of this {type(model).__name__} "
        f"differ from those at its name_or_path {model.name_or_path!r}: save it (save_pretrained, with its tokenizer) "
        "and give the path"
    )


def _is_as_saved(model: PreTrainedModel) -> bool:
    """Whether every weight equals the one saved at name_or_path; a scalar head may be new."""
    folder, state, found = Path(model.name_or_path), _state_as_saved(model), set()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model.name_or_path, local_files_only=True))
        except (OSError, ValueError):  # not in the cache, or not the name of a model
            return False
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as saved:
            names = set(saved.keys())
            for name, x in state.items():
                if name not in names:  # a trunk that was saved alone, as gpt2's on the hub
                    name = name.removeprefix(f"{model.base_model_prefix}.")
                if name in names:
                    if not torch.equal(saved.get_tensor(name).to(x), x):
                        return False
                    found.add(x.data_ptr())  # tied weights are saved under one of their names
    # A new head passes, because it is saved with the adapters.
    return all(x.data_ptr() in found or name.startswith("score.") for name, x in state.items())


def _state_as_saved(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights under the names, and in the parts, in which they are saved. transformers 5 renames some when it loads
    them (the head of GPT-NeoX), and joins a layer's experts."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4
        return model.state_dict()
    return revert_weight_conversion(model, model.state_dict())


def check_adapters(model: nn.Module) -> None:
    """ConfigError for adapters that can neither be trained here nor merged: prompt tuning, and adapters that
    transformers itself added to the model, without a peft.PeftModel around it."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"the adapters of this {type(model).__name__} were added by transformers (from_pretrained on their "
            "directory, or add_adapter): give the path of the directory, or peft.PeftModel.from_pretrained(base, path, "
            "is_trainable=True); for new adapters use peft.get_peft_model(base, config), or lora_r"
        )
    check_no_prompt(model)


def check_no_prompt(model: nn.Module) -> None:
    """ConfigError for prompt and prefix tuning, which act outside the trunk; we run the trunk only."""
    if learns_a_prompt(model):
        raise ConfigError(
            f"{model.active_peft_config.peft_type.value} is not supported: hidden states are computed without the "
            "tokens that it puts before the prompt. Use LoRA, or another adapter of the layers"
        )


def learns_a_prompt(model: nn.Module) -> bool:
    """Whether the model's adapter puts learned tokens before the prompt (prompt and prefix tuning)."""
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def check_lm_head_is_plain(model: nn.Module) -> None:
    """ConfigError for an adapter on the lm_head: the losses read the weight itself and would not see the adapter."""
    if has_adapters(model) and hasattr(model.get_output_embeddings(), "base_layer"):
        raise ConfigError("LoRA on the lm_head is not supported: leave it out of lora_target_modules")
