"""Loads models and tokenizers from a directory or the hub, and saves them to a directory.

A directory may hold a whole model, or LoRA adapters (with an adapter_config.json) that name their base model. Code that
comes with a model is never run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import ConfigError
from .adapters import check_lm_head_is_plain, copied, has_adapters, import_peft, merge_adapters, unwrapped
from .language import let_pad_learn, warn_of_lost_softcap
from .scalar import check_score, register_scalar_class, reward_scale, scalar_head_on, set_reward_scale

_NO_CODE = {"trust_remote_code": False}  # None, the default of transformers, asks on standard input


def load_config(model: str | Path | PreTrainedModel) -> PretrainedConfig:
    """The config of the model that load_policy gives, without reading its weights; for adapters the base's config."""
    if not isinstance(model, (str, Path)):
        _check_is_model(model)
        return model.config
    if base := _adapter_base(model):
        with _base_of(model):
            return load_config(base)
    with _loading("model", model):
        return AutoConfig.from_pretrained(model, **_NO_CODE)


def load_policy(model: str | Path | PreTrainedModel, *, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """A causal language model: the given object, or one loaded by name or path, onto the GPU if there is one.

    A path with LoRA adapters gives their base model with the adapters on it, ready for further training. ConfigError
    for a reward model, because transformers would put a random lm_head on its trunk.
    """
    if has_scalar_head(model):
        name = repr(str(model)) if isinstance(model, (str, Path)) else type(model).__name__
        raise ConfigError(f"{name} is a reward model, which has no lm_head: give the language model")
    if isinstance(model, (str, Path)):
        if base := _adapter_base(model):
            with _base_of(model):
                policy = load_policy(base, dtype=dtype)
            policy = _with_saved_adapters(policy, model)
            # Only save_model saves one with adapters; otherwise the base's is kept.
            with _loading("model", model), suppress(OSError):
                unwrapped(policy).generation_config = GenerationConfig.from_pretrained(model)
            return policy
        with _loading("model", model):
            model = _from_pretrained(AutoModelForCausalLM, model, dtype)
    _check_is_model(model)
    check_lm_head_is_plain(model)
    warn_of_lost_softcap(model)
    return let_pad_learn(model)


def _check_is_model(model: object, what: str = "model") -> None:
    if not hasattr(model, "get_input_embeddings"):
        advice = "what it wraps, its .module" if hasattr(model, "module") else f"a {what}, as object, name or path"
        raise ConfigError(f"{type(model).__name__} is not a transformers {what}: give {advice}")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ConfigError(f"the layers of this {type(model).__name__} are sharded: save it and give its path")
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError(
            f"some weights of this {type(model).__name__} are not in memory (device_map offloads what does not fit): "
            "load it without device_map, or give its path"
        )


def load_reward_model(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *,
    dtype: torch.dtype | str = torch.float32,
) -> PreTrainedModel:  # fmt: skip
    """AutoModelForSequenceClassification with num_labels=1, from a reward model or a language model.

    A reward model keeps its head. A language model's trunk is copied and gets a new head (scalar_head_on). The
    tokenizer's pad token is written into the config, and the embedding grows if the token is new (with_own_pad).
    ConfigError for a classifier that is not a decoder.
    """
    if not isinstance(model, (str, Path)):
        _check_is_model(model)
        reward = model if has_scalar_head(model) else scalar_head_on(model)
    elif not has_scalar_head(model):
        reward = scalar_head_on(load_policy(model, dtype=dtype))
        reward.name_or_path = str(model)  # read by check_base_is_saved
    elif base := _adapter_base(model):
        return _reward_model_with_adapters(model, base, tokenizer, dtype)
    else:
        register_scalar_class(load_config(model))
        with _loading("model", model):
            reward = _from_pretrained(AutoModelForSequenceClassification, model, dtype)
    check_score(reward)
    if tokenizer is not None:
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            raise ConfigError("a reward model needs a pad token that is not eos: use with_own_pad(tokenizer)")
        # Only for the pad token: a tokenizer with other tokens that are not embedded may be another model's.
        if len(tokenizer) - 1 == tokenizer.pad_token_id == reward.get_input_embeddings().weight.shape[0]:
            reward.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        reward.config.pad_token_id = tokenizer.pad_token_id
    return let_pad_learn(reward)


def _reward_model_with_adapters(path: str | Path, base: str, tokenizer, dtype) -> nn.Module:
    with _base_of(path):
        reward = load_reward_model(base, tokenizer, dtype=dtype)
    if not Path(path, "config.json").is_file():  # peft saved the adapters; save_model would have added a config
        return _with_saved_adapters(reward, path)
    with _loading("model", path):
        config = AutoConfig.from_pretrained(path, **_NO_CODE)
    if config.vocab_size > reward.get_input_embeddings().weight.shape[0]:  # a pad token was added for the training
        reward.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    reward = _with_saved_adapters(reward, path)
    set_reward_scale(reward, *reward_scale(config))
    return reward


def load_tokenizer(source: str | PreTrainedTokenizerBase | PreTrainedModel) -> PreTrainedTokenizerBase:
    """A tokenizer: the given object, or loaded from a path or from a model's own path. If it has no pad token, eos
    pads. Adapters that were saved without a tokenizer (as peft does) use their base model's.

    A tokenizer that was saved as a plain fast tokenizer is loaded as one. AutoTokenizer would instead choose the class
    of the config's model_type (such as Qwen2Tokenizer), which splits text differently.
    """
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    if source == "":
        raise ConfigError("the name of a model is empty: give a directory, or a name on the hub")
    path = source
    if not isinstance(source, (str, Path)):
        _check_is_model(source, "model or tokenizer")
        path = source.name_or_path
        if not path:
            raise ConfigError(f"this {type(source).__name__} was not loaded from a path: give its tokenizer too")
    with _loading("tokenizer", path):
        saved = get_tokenizer_config(path)
    if not saved and (base := _adapter_base(path)):
        with _base_of(path):
            return load_tokenizer(base)
    files = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken")
    if not saved and Path(path).is_dir() and not any(chain(*map(Path(path).glob, files))):
        raise ConfigError(f"no tokenizer can be loaded from {str(path)!r}, which holds none: copy the model's there")
    with _loading("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, **_NO_CODE)
        plain = saved.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")  # of transformers 4, 5
        if plain and isinstance(tokenizer, PreTrainedTokenizerFast) and type(tokenizer) is not PreTrainedTokenizerFast:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers 5.0 makes one where there is no tokenizer
        raise ConfigError(
            f"no tokenizer can be loaded from {str(path)!r}: it would have no vocabulary. Save the tokenizer there"
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_scalar_head(model: str | Path | PreTrainedModel) -> bool:
    """Whether the model is a reward model. Of a path only the config is read, not the weights."""
    if not isinstance(model, (str, Path)):
        return hasattr(model, "score")
    if _adapter_base(model):
        return import_peft().PeftConfig.from_pretrained(str(model)).task_type == "SEQ_CLS"
    with _loading("model", model):
        config = AutoConfig.from_pretrained(model, **_NO_CODE)
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Writes a directory that load_policy or load_reward_model reads: the model (or its adapters) and the tokenizer.

    A config.json next to adapters tells transformers that the directory holds a whole model. So a policy's adapters are
    saved without one, and AutoModelForCausalLM finds their base. A reward model's adapters are saved with one, for the
    scale; peft reads them.
    """
    with warnings.catch_warnings():
        # peft warns about a base that is itself adapters, and looks for its config.json on the hub
        warnings.filterwarnings("ignore", "Could not find a config file|Unable to fetch remote file")
        model.save_pretrained(path)
    if has_adapters(model):
        whole = unwrapped(model)
        (whole.generation_config if whole.can_generate() else whole.config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def save_quietly(save_model: Callable[[Path], None], path: Path) -> None:
    """save_model(path) without the progress bar of transformers, which would overwrite ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        save_model(path)
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def loadable(model: nn.Module) -> nn.Module:
    """The model in a form that peft and transformers load correctly. Adapters whose base has adapters itself are
    merged into it; when loaded elsewhere, they would silently replace those of the base."""
    base = model.active_peft_config.base_model_name_or_path if has_adapters(model) else None
    return merge_adapters(model) if base and Path(base).is_dir() and _adapter_base(base) else model


def make_reference(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy in eval mode."""
    return copied(model).eval().requires_grad_(False)


def _from_pretrained(kind: type, path: str | Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """kind.from_pretrained, onto the GPU if there is one. ConfigError where the files lack weights, for which
    transformers would put random ones, or have them in other shapes.

    transformers 4 runs Gemma 2 by sdpa, which silently leaves out the softcap of its attention. Eager attention has it.
    """
    config = AutoConfig.from_pretrained(path, **_NO_CODE)
    if "/" in str(config._attn_implementation):  # transformers would load it with the library kernels
        raise ConfigError(
            f"its config.json names the kernel {config._attn_implementation} as its attention, which is code from the "
            "hub, and never run: take attn_implementation out of it"
        )
    capped = getattr(config, "attn_logit_softcapping", None)
    attention = {"attn_implementation": "eager"} if capped else {}
    try:
        model, found = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **attention, **_NO_CODE)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error) and "size mismatch" not in str(error):  # transformers 5, 4
            raise
        raise ConfigError("its weights have other shapes than its config.json says") from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"its files lack {len(missing)} weights, among them {missing[0]}, which would be random: save or copy all "
            "of the model"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _loading(what: str, path: str | Path) -> Iterator[None]:
    """Turns errors of transformers inside the block into a one-line ConfigError. The hub is never asked for a path that
    does not exist."""
    name = str(path)
    is_no_hub_name = name.count("/") > 1 or name.startswith((".", "~")) or Path(name).is_absolute()
    if is_no_hub_name and not Path(name).is_dir():
        raise ConfigError(f"no {what} can be loaded from {name!r}: there is no such directory")
    if newest := _checkpoint_of_unfinished_run(Path(name)):
        raise ConfigError(
            f"no {what} can be loaded from {name!r}: its run has not ended. Resume it, or give its newest checkpoint, "
            f"{str(newest)!r}"
        )
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # missing, of another kind, or truncated
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"no {what} can be loaded from {name!r}: this version of transformers has no class for it, and "
                "the code that comes with it (auto_map) is never run. In Python, load it yourself and give the object"
            ) from error
        first, _, others = str(error).partition("\n")
        reason = f"{first} {others}" if first.rstrip().endswith(":") else first
        raise ConfigError(f"no {what} can be loaded from {name!r}: {' '.join(reason.split())}") from error
    except UnpicklingError as error:  # torch's own message says how to load it all the same
        raise ConfigError(
            f"no {what} can be loaded from {name!r}: its weights are a pickle that holds more than tensors, which "
            "could run code: have them saved as safetensors"
        ) from error
    except (RuntimeError, MemoryError):  # no room for the weights
        raise
    except Exception as error:  # transformers takes a value that cannot be for what it should be
        raise ConfigError(
            f"no {what} can be loaded from {name!r}: one of its files is not as it was saved "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}): restore config.json and the other .json "
            "files there"
        ) from error


def _adapter_base(path: str | Path) -> str | None:
    """The name or path of the base model of the adapters saved at path; None if there are no adapters."""
    with _loading("model", path):
        if find_adapter_config_file(str(path)) is None:
            return None
    peft = import_peft()
    with _loading("adapters", path):
        base = peft.PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not base:
        raise ConfigError(
            f"the adapters in {str(path)!r} do not name their base model: load it yourself and give "
            "peft.PeftModel.from_pretrained(base, path, is_trainable=True)"
        )
    return base


def _checkpoint_of_unfinished_run(path: Path) -> Path | None:
    """The newest checkpoint-N in a directory with neither a model nor a tokenizer of its own; None if there is none."""
    if any(chain(*map(path.glob, ("config.json", "adapter_config.json", "tokenizer*")))):
        return None
    found = [p for p in path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return max(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), default=None)


@contextmanager
def _base_of(path: str | Path) -> Iterator[None]:
    """Prefixes a ConfigError inside the block with the adapters that it is about: their base may be a path on the
    machine where they were trained."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            f"the base model of the adapters in {str(path)!r} (base_model_name_or_path of their adapter_config.json): "
            f"{error}"
        ) from error


def _with_saved_adapters(model: PreTrainedModel, path: str | Path) -> nn.Module:
    with _loading("adapters", path):
        return import_peft().PeftModel.from_pretrained(model, str(path), is_trainable=True)
