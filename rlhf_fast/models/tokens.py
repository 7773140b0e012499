"""What a tokenizer and a model have to agree on: vocabulary, positions, padding, stop tokens."""

from __future__ import annotations

import copy
import math

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError
from .adapters import unwrapped


def check_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int, advice: str = "lower max_length"
) -> None:
    """ConfigError if the tokenizer has ids without an embedding in the model, or if a sequence of `longest` tokens
    exceeds the model's positions."""
    rows = model.get_input_embeddings().weight.shape[0]  # adapters on the embedding hide its num_embeddings
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}: use the model's own tokenizer, or "
            f"call model.resize_token_embeddings({len(tokenizer)})"
        )
    check_positions(model.config, longest, advice, type(model).__name__)


def check_positions(config: PretrainedConfig, longest: int, advice: str, name: str = "the model") -> None:
    """ConfigError if a sequence of `longest` tokens exceeds the positions of a model with this config."""
    if longest > (positions := positions_of(config)):
        raise ConfigError(f"the longest sequence has {longest} tokens and {name} has {positions} positions: {advice}")


def positions_of(config: PretrainedConfig) -> float:
    """The number of positions that the config names; inf if it names none (XLNet's is -1)."""
    positions = getattr(config, "max_position_embeddings", None) or -1
    return math.inf if positions < 0 else positions


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's eos, then those declared in the model's generation_config. Chat
    models whose eos is the end of a document (Gemma, Phi-3) declare the end of a turn there.

    A declared id counts only if it is a special token of this tokenizer. LlamaConfig, for example, declares 2 by
    default, whatever that token is.
    """
    declared = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    ends = [i for i in declared if i in tokenizer.added_tokens_decoder and i != tokenizer.eos_token_id]
    return [tokenizer.eos_token_id, *ends]


def stop_at_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes transformers' generate() also stop at the tokenizer's eos, as training teaches, and pad with its pad token.
    An eos that nobody chose (the default of the config's class) is dropped unless it is a special token: generate()
    would stop in the middle of an answer.

    transformers refuses to save a changed generation_config that contradicts itself, and some older checkpoints have
    one: a temperature without do_sample. These get do_sample here. Any other contradiction is a ConfigError, now and
    not only when the trained model is saved.
    """
    known = model.generation_config.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    default = getattr(type(model.config)(), "eos_token_id", None)
    known = [i for i in known if i != default or i in tokenizer.added_tokens_decoder]
    ends = known if tokenizer.eos_token_id in known else [tokenizer.eos_token_id, *known]
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.config.eos_token_id = model.generation_config.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            raise ConfigError(f"the model could not be saved; fix its generation_config: {error}") from error


def with_own_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer if its pad token is not eos, else a copy that pads with unk or bos, or with a new token <|pad|>.

    transformers reads a reward at the last token that is not pad, so a reward model's pad token must not be eos.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    own = copy.deepcopy(tokenizer)
    spare = [t for t in (own.unk_token, own.bos_token) if t is not None and t != own.eos_token]
    own.add_special_tokens({"pad_token": spare[0] if spare else "<|pad|>"})
    return own
