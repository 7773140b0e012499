"""The trunk and the lm_head of a language model: hidden states, positions, layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import ConfigError
from .adapters import adapters_off, check_no_prompt, has_adapters, unwrapped


@contextmanager
def evaluating(*models) -> Iterator[None]:
    """Puts the models in eval mode (no dropout) inside the block, and restores each model's mode afterwards."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) mask -> (B, T) int64: the number of real tokens before each; 0 on left padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(B, T) tokens -> (B, T, D), the trunk's last hidden states after its final norm. The lm_head does not run."""
    check_no_prompt(model)
    inputs = {} if attention_mask is None else {
        "attention_mask": attention_mask.long(), "position_ids": position_ids_from_mask(attention_mask)
    }  # fmt: skip
    return unwrapped(model).base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state


def lm_head(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None, float | None]:
    """(..., D) hidden states -> hidden, (V, D) weight, (V,) bias or None, logit softcap or None: the arguments of
    linear_token_logprobs. hidden is multiplied by the factor of architectures that scale their logits."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()  # of models that read images, a part
    factor = logit_factor(config)
    hidden = hidden if factor == 1.0 else factor * hidden
    return hidden, head.weight, getattr(head, "bias", None), logit_softcap(config)


def logit_factor(config: PretrainedConfig) -> float:
    """What the architecture multiplies its logits by (Granite, Cohere, Falcon-H1); 1 for all others."""
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # two meanings of one name
        return scaling if config.model_type == "hyperclovax" else 1 / scaling
    name = "logit_scale" if config.model_type.startswith("cohere") else "lm_head_multiplier"  # MPT ignores its own
    factor = getattr(config, name, None)
    return 1.0 if factor is None else factor


def logit_softcap(config: PretrainedConfig) -> float | None:
    """c if the architecture replaces its logits x by c tanh(x / c) (Gemma 2); None for all others."""
    return getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)


def loses_softcap(config: PretrainedConfig) -> bool:
    """Whether the attention of the model leaves out the softcap of its scores: transformers 4 runs Gemma 2 by sdpa
    unless it is told not to, and sdpa has none. (transformers 5 refuses.)"""
    return bool(getattr(config, "attn_logit_softcapping", None)) and config._attn_implementation == "sdpa"


def warn_of_lost_softcap(model: PreTrainedModel) -> None:
    """Warns, once, if loses_softcap."""
    config = unwrapped(model).config
    if loses_softcap(config):
        warnings.warn(
            f"sdpa attention leaves out the attn_logit_softcapping of this {config.model_type} model, so it computes "
            "something else than it was trained to: load it with attn_implementation='eager', or give its path",
            stacklevel=1,  # one place for all callers, so that it is shown once
        )


@torch.no_grad()
def check_lm_head(model: PreTrainedModel) -> None:
    """ConfigError if the logits are NaN, or are not lm_head(hidden_states), as in BERT, or depend on later tokens."""
    if unwrapped(model).base_model is unwrapped(model):
        raise ConfigError(
            f"{type(model).__name__} is not supported: transformers does not say which part is its trunk. Use a model "
            "whose base_model is a module of its own"
        )
    ids = _some_tokens(model)
    with evaluating(model):
        hidden, weight, bias, softcap = lm_head(model, hidden_states(model, ids))
        ours = nn.functional.linear(hidden, weight, bias)
        theirs = model(input_ids=ids, use_cache=False).logits.float()
    tolerance = 1e-3 if ours.dtype == torch.float32 else 1e-2
    ours = ours.float()
    if bool(theirs.isnan().any()):
        raise ConfigError(
            f"the logits of {type(model).__name__} are NaN: it may have diverged in an earlier training run. Use "
            "another checkpoint"
        )
    ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
    if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())):
        raise ConfigError(
            f"{type(model).__name__} is not supported: it does more to its logits than lm_head, bias, factor and "
            "softcap. rlhf_fast computes log-probabilities from the hidden states, and they would be wrong for this "
            "model"
        )
    check_causal(model)


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """ConfigError if the hidden state at a token depends on later tokens, as in CPM-Ant and XLNet."""
    ids = _some_tokens(model)
    half = ids.shape[1] // 2
    with evaluating(model):
        a, b = (hidden_states(model, torch.cat([ids[:, :half], rest], 1)) for rest in (ids[:, half:], ids[:, :half]))
    rounds = a.dtype.itemsize < 4 or torch.is_autocast_enabled(a.device.type)
    a, b, tolerance = a[:, :half].float(), b[:, :half].float(), 1e-2 if rounds else 1e-4
    if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()), equal_nan=True):
        raise ConfigError(
            f"{type(model).__name__} is not supported: what it computes at a token depends on the tokens that follow, "
            "so it could read what it learns to predict. Use a decoder, whose attention is causal"
        )


def _some_tokens(model: PreTrainedModel) -> Tensor:
    """(1, T) tokens from all over the vocabulary, about 16 and no more than the model has positions."""
    vocab = model.get_input_embeddings().weight.shape[0]
    return torch.arange(0, vocab, max(1, vocab // 16), device=model.device)[None, : learned_positions(model) or 16]


def starts_as_its_base(policy: nn.Module) -> bool:
    """Whether the policy has adapters that change nothing yet. Without them it is then its own reference."""
    if not has_adapters(policy):
        return False
    embed = policy.get_input_embeddings()
    tokens = torch.arange(embed.weight.shape[0], device=policy.device)
    outputs = [  # also the head and the embedding of every token: adapters may have changed only these
        lambda: hidden_states(policy, tokens[None, :2]),
        lambda: policy.get_output_embeddings().weight,
        *(partial(embed, rows) for rows in tokens.split(4096)),
    ]
    with evaluating(policy):
        for output in outputs:
            with adapters_off(policy):
                base = output()
            if not torch.equal(base, output()):
                return False
    return True


# --- positions -------------------------------------------------------------------------------------------------------


def learned_positions(model: nn.Module) -> int | None:
    """The number of positions if they are stored in a table (usually a learned one); the model cannot run beyond it.
    None if positions are computed (rotary, ALiBi, sinusoids, a recurrence) and so have no end."""
    model = unwrapped(model)
    if model.config.model_type in ("gptj", "codegen"):  # rotary, but computed once, as a table
        return model.config.max_position_embeddings
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("wpe", "embed_positions"):
            return module.num_embeddings - getattr(module, "offset", 0)  # OPT's table begins with two padding rows
    return None


def answer_room(model: nn.Module, prompt_length: int) -> float:
    """The longest answer, in tokens, to a prompt of prompt_length tokens; inf if the model's positions have no end.

    The last token of an answer is sampled and never read, so it needs no position.
    """
    positions = learned_positions(model)
    return math.inf if positions is None else positions + 1 - prompt_length


def rotary_limit(model: nn.Module) -> int | None:
    """The length beyond which the longest sequence of a batch changes the rotary positions of the whole batch
    ("dynamic" and "longrope" embeddings). None if that never happens."""
    model = unwrapped(model)
    kinds = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", None)
    kinds = kinds if isinstance(kinds, dict) else {None: kinds}  # gemma3, olmo3: one for each type of layer
    scaled = [layer_type for layer_type, kind in kinds.items() if kind in ("dynamic", "longrope")]
    if not scaled:
        return None
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}  # transformers 5, 4
    return min(
        rope.get(kind, rope).get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for kind in scaled
    )


# --- layers ----------------------------------------------------------------------------------------------------------


def trunk_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of the trunk, first to last. Empty if neither the trunk nor its decoder (OPT has one) has a list of
    blocks."""
    lists = (m for m in trunk_stack(model).children() if isinstance(m, nn.ModuleList))
    return max(lists, key=len, default=nn.ModuleList())


def trunk_stack(model: PreTrainedModel) -> nn.Module:
    """The module whose forward runs the layers: the trunk, or its decoder, which OPT's trunk bypasses."""
    return getattr(model.base_model, "decoder", model.base_model)


def train_last_layers(model: PreTrainedModel, n: int) -> None:
    """Freezes the trunk except its last n layers and its final norm."""
    layers = trunk_layers(model)
    if not len(layers):
        raise ConfigError(
            f"train_last_layers is not supported for {type(model).__name__}, whose layers are not found: use "
            "freeze_trunk or lora_r"
        )
    if n > len(layers):
        raise ConfigError(
            f"train_last_layers = {n}, and the model has {len(layers)} layers: set it to {len(layers)} or less "
            "(0 trains all)"
        )
    model.base_model.requires_grad_(False)
    apart = (nn.Embedding, nn.Linear)  # OPT's linear layers here change the width of its embeddings
    norms = [m for m in trunk_stack(model).children() if m is not layers and not isinstance(m, apart)]
    for module in [*layers[len(layers) - n :], *norms]:
        module.requires_grad_(True)


def checkpoint_activations(model: nn.Module) -> None:
    """Recomputes the layers in the backward pass instead of keeping their activations."""
    model, options = unwrapped(model), {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name in transformers 5
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout rate to 0, so that equal tokens score equally in train mode and the first PPO ratio is 1.

    A rate is nn.Dropout's p, or a float attribute for functional dropout whose name contains "drop"
    (attention_dropout of Llama, dropout and layerdrop of OPT, hidden_dropout of Bloom).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def let_pad_learn(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the pad token's embedding receive gradients like any other -> the same model.

    An embedding with a padding_idx gives that token no gradient, but the pad token may be eos, which has to be learned.
    Masks keep real padding out of every loss.
    """
    for module in model.get_input_embeddings().modules():  # adapters wrap the embedding, and both have a padding_idx
        if hasattr(module, "padding_idx"):
            module.padding_idx = None
    return model
