"""Loading models, and looking at them: hidden states, log-probabilities of responses, scores, values.

    trunk      (B, T) tokens -> (B, T, D) hidden states; the lm_head runs only where its output is used
    policy     trunk + lm_head                                = AutoModelForCausalLM
    reward     trunk + scalar head, read at the last real token = AutoModelForSequenceClassification, num_labels=1
    value      trunk + scalar head, read at every token         = the same checkpoint format

Any of them may carry LoRA adapters (peft; add_lora, or a directory with an adapter_config.json): then only these are
trained and saved, and the policy under adapters_off is its own reference.

Padding may be on either side: positions count real tokens (position_ids_from_mask) and a reward is read where the mask
ends, so the pad token's identity (also pad == eos) plays no part. attention_mask is bool, (B, T), and True counts; None
means no padding on the left, and then the attention is plainly causal (what follows a token cannot change it).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.peft_utils import find_adapter_config_file

from .data.chat import ConfigError
from .ops import linear_token_logprobs


def load_policy(model: str | Path | PreTrainedModel, *, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """A causal language model as it is given, or by name or path; then on the GPU where there is one.

    A path with LoRA adapters gives their base model with the adapters on it, ready to train further. ConfigError for a
    reward model, over whose trunk transformers would draw an lm_head at random.
    """
    if has_scalar_head(model):
        name = repr(str(model)) if isinstance(model, (str, Path)) else type(model).__name__
        raise ConfigError(f"{name} is a reward model, which has no lm_head: give the language model")
    if isinstance(model, (str, Path)):
        if base := _adapter_base(model):
            policy = _with_saved_adapters(load_policy(base, dtype=dtype), model)
            with suppress(OSError):  # not from save_model, and then the base's
                unwrapped(policy).generation_config = GenerationConfig.from_pretrained(model)
            return policy
        with _loading("model", model):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(default_device())
    _check_is_model(model)
    check_lm_head_is_plain(model)
    return _learn_eos(model)


def _check_is_model(model: object) -> None:
    if not hasattr(model, "get_input_embeddings"):
        within = ": give what it wraps, its .module" if hasattr(model, "module") else ", by object, name or path"
        raise ConfigError(f"{type(model).__name__} is no model of transformers, which is needed{within}")


def load_tokenizer(source: str | PreTrainedTokenizerBase | PreTrainedModel) -> PreTrainedTokenizerBase:
    """A tokenizer as it is given, or by path, or by a model's own path; then eos pads where it has no pad token.

    One that was saved as a plain fast tokenizer is read as that. AutoTokenizer takes the class that goes with the
    config's model_type (Qwen2Tokenizer), which splits text in another way.
    """
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    path = source if isinstance(source, (str, Path)) else source.name_or_path
    if not path:
        raise ConfigError(f"{type(source).__name__} was not loaded from a path, so its tokenizer has to be given")
    with _loading("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path)
        if isinstance(tokenizer, PreTrainedTokenizerFast) and type(tokenizer) is not PreTrainedTokenizerFast:
            saved_as = get_tokenizer_config(path).get("tokenizer_class")
            if saved_as in ("PreTrainedTokenizerFast", "TokenizersBackend"):  # the same, of transformers 4 and 5
                tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _loading(what: str, path: str | Path) -> Iterator[None]:
    name = str(path)
    is_no_hub_name = name.count("/") > 1 or name.startswith((".", "~")) or Path(name).is_absolute()
    if is_no_hub_name and not Path(name).exists():
        raise ConfigError(f"no {what} can be loaded from {name!r}: there is no such directory")
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:  # nowhere, or holds no such thing, or torn
        raise ConfigError(f"no {what} can be loaded from {name!r}: {str(error).splitlines()[0]}") from error


def check_lengths(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int, advice: str = "lower max_length"
) -> None:
    """Raises ConfigError where the tokenizer has ids, or the data sequences, that the model cannot embed."""
    rows = model.get_input_embeddings().weight.shape[0]  # adapters on it hide num_embeddings
    positions = getattr(model.config, "max_position_embeddings", None)
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}: use the model's own tokenizer, or "
            f"call model.resize_token_embeddings({len(tokenizer)})"
        )
    if positions is not None and longest > positions:
        raise ConfigError(
            f"the longest sequence has {longest} tokens and {type(model).__name__} {positions} positions: {advice}"
        )


def learned_positions(model: nn.Module) -> int | None:
    """How many positions the model's table of them has, mostly a learned one; None where they are computed (rotary,
    ALiBi, sinusoids, a recurrence) and go on."""
    model = unwrapped(model)
    if model.config.model_type in ("gptj", "codegen"):  # rotary, from a table that ends
        return model.config.max_position_embeddings
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("wpe", "embed_positions"):
            return module.num_embeddings - getattr(module, "offset", 0)  # OPT's begin behind two rows for padding
    return None


def stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's eos, then those that the model's generation_config declares, such
    as the end of a turn in chat models whose eos ends the document (Gemma, Phi-3).

    A declared id that is an ordinary token of this tokenizer is left out: it is that of another one, as the 2 which a
    LlamaConfig has when nobody set it.
    """
    declared = getattr(getattr(unwrapped(model), "generation_config", None), "eos_token_id", None)
    declared = declared if isinstance(declared, list) else [declared]
    ends = [i for i in declared if i in tokenizer.added_tokens_decoder and i != tokenizer.eos_token_id]
    return [tokenizer.eos_token_id, *ends]


def stop_at_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer's eos among those at which transformers' generate() stops, and its pad: what training teaches.

    transformers saves no generation_config that has changed and says two things, such as a temperature without
    do_sample, which older checkpoints have: those sample then, and ConfigError for any other, before the run.
    """
    known = model.generation_config.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    if tokenizer.eos_token_id not in known:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *known] if known else tokenizer.eos_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
        try:
            model.generation_config.validate(strict=True)
        except ValueError as error:
            raise ConfigError(f"the model could not be saved, mend its generation_config: {error}") from error


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """A directory that load_policy or load_reward_model reads: the model, or its adapters and a config, and the
    tokenizer.

    A config.json beside adapters tells transformers that the whole model lies there. So a policy's have none, and
    AutoModelForCausalLM finds their base; a reward model's have it for the scale, and peft reads them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file")  # peft, of a base that is adapters
        model.save_pretrained(path)
    if has_adapters(model):
        whole = unwrapped(model)
        (whole.generation_config if whole.can_generate() else whole.config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def make_reference(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy in eval mode."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Every dropout rate to 0: the same tokens then score the same in train mode, and the first PPO ratio is 1.

    A rate is nn.Dropout's p, or a float that a module keeps for functional dropout under a name with "drop" in it
    (attention_dropout of Llama, dropout and layerdrop of OPT, hidden_dropout of Bloom).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _learn_eos(model: PreTrainedModel) -> PreTrainedModel:
    """An embedding built with padding_idx gives that token no gradient, and it may be eos. Masks keep padding out."""
    for module in model.get_input_embeddings().modules():  # adapters wrap it, and read the one that they wrap
        if hasattr(module, "padding_idx"):
            module.padding_idx = None
    return model


# --- adapters --------------------------------------------------------------------------------------------------------


def has_adapters(model: nn.Module) -> bool:
    """Whether it is a peft.PeftModel. (transformers' own models spell the method disable_adapters.)"""
    return hasattr(model, "disable_adapter")


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, whose layers carry the adapters if there are any."""
    return model.get_base_model() if has_adapters(model) else model


def checkpoint_activations(model: nn.Module) -> None:
    """Layers run again in the backward pass instead of keeping activations. transformers 5 changed the name."""
    model, options = unwrapped(model), {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def add_lora(
    model: PreTrainedModel, *, r: int, alpha: float, dropout: float = 0.0, target_modules: list[str] | None = None
) -> nn.Module:
    """The model with new LoRA adapters (Hu et al. 2021): W x + (alpha / r) B A x, of which only A and B learn.

    B starts at 0, so at first nothing changes. target_modules: names of linear layers, by default all of the trunk. A
    reward model's head is trained as a whole and saved with the adapters. ConfigError without peft, or for the lm_head,
    whose product runs fused in the loss.
    """
    if has_adapters(model):
        raise ConfigError("the model has adapters already, and they go on learning: set lora_r to 0")
    peft = _peft()
    scalar = has_scalar_head(model)
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules or "all-linear",
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM", modules_to_save=["score"] if scalar else None,
    )  # fmt: skip
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:  # no layer of that name
        raise ConfigError(f"lora_target_modules: {error}") from error
    check_lm_head_is_plain(adapted)
    return adapted


def check_base_is_saved(model: str | Path | PreTrainedModel) -> None:
    """ConfigError unless a model that is to get adapters can be found again: they are saved without the weights below.

    A path is taken at its word. An object has to hold, number for number, what the safetensors at its name_or_path do
    (read one by one): on those the adapters would come back, also where the object was trained or merged in memory.
    """
    if isinstance(model, (str, Path)) or _is_as_saved(model):
        return
    raise ConfigError(
        f"lora_r: adapters are saved without the weights below them, and those of this {type(model).__name__} are not "
        f"the ones at its name_or_path {model.name_or_path!r}: save it (save_pretrained, with its tokenizer) and give "
        "the path"
    )


def _is_as_saved(model: PreTrainedModel) -> bool:
    folder, state, found = Path(model.name_or_path), model.state_dict(), set()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model.name_or_path, local_files_only=True))
        except (OSError, ValueError):  # not there, or no name
            return False
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as saved:
            for name in state.keys() & saved.keys():
                if not torch.equal(saved.get_tensor(name).to(state[name]), state[name]):
                    return False
                found.add(state[name].data_ptr())  # of tied weights one is saved
    return all(x.data_ptr() in found or name.startswith("score.") for name, x in state.items())  # adapters bring a head


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as it did before its adapters learned: the reference policy at no memory."""
    if not has_adapters(model):
        raise ConfigError("adapters_off needs a model with adapters (add_lora); use make_reference(model)")
    with model.disable_adapter():
        yield


def merge_adapters(model: nn.Module) -> PreTrainedModel:
    """A plain transformers model with the same outputs; the one given keeps its adapters. Without any, itself."""
    check_adapters(model)
    return copy.deepcopy(model).merge_and_unload() if has_adapters(model) else model


def loadable(model: nn.Module) -> nn.Module:
    """The model as peft and transformers load it: a reward model's adapters on a base that has adapters itself are
    merged. Elsewhere they would come back in the place of those, without a word."""
    base = model.active_peft_config.base_model_name_or_path if has_adapters(model) else None
    return merge_adapters(model) if base and Path(base).is_dir() and _adapter_base(base) else model


def check_adapters(model: nn.Module) -> None:
    """ConfigError for adapters that cannot be trained here, nor merged: those that transformers put on a model without
    peft.PeftModel, and a learned prompt."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"this {type(model).__name__} has its adapters from transformers (from_pretrained on their directory, or "
            "add_adapter): give the path of the directory, or peft.PeftModel.from_pretrained(base, path, "
            "is_trainable=True); new ones are peft.get_peft_model(base, config), or lora_r"
        )
    check_no_prompt(model)


def check_no_prompt(model: nn.Module) -> None:
    """ConfigError for prompt and prefix tuning, which the trunk alone does not see."""
    if learns_a_prompt(model):
        raise ConfigError(
            f"{model.active_peft_config.peft_type.value} is not supported: hidden states are read without the tokens "
            "that it puts before the prompt; use LoRA, or another adapter of the layers"
        )


def learns_a_prompt(model: nn.Module) -> bool:
    return getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint has to hold: every weight, or beside adapters those that learn, for the rest is the base's."""
    if not has_adapters(model):
        return model.state_dict()
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    saved, here = ({name: x.shape for name, x in weights.items()} for weights in (state, trained_state(model)))
    if saved != here:
        what = "adapters, or none" if has_adapters(model) else "weights"
        raise ConfigError(
            f"the checkpoint has other {what}: resume with the same model, lora_r and lora_target_modules"
        )
    model.load_state_dict(state, strict=not has_adapters(model))


def check_lm_head_is_plain(model: nn.Module) -> None:
    """ConfigError for an adapter on the lm_head: the losses read its weight, and would not see the adapter."""
    if has_adapters(model) and hasattr(model.get_output_embeddings(), "base_layer"):
        raise ConfigError("LoRA on the lm_head is not supported: leave it out of lora_target_modules")


def _peft():
    try:
        import peft
    except ImportError:
        raise ConfigError("LoRA adapters need peft: pip install peft") from None
    return peft


def _adapter_base(path: str | Path) -> str | None:
    """The name or path of the model under the adapters that are saved there; None where there are no adapters."""
    with _loading("model", path):
        if find_adapter_config_file(str(path)) is None:
            return None
    peft = _peft()
    with _loading("adapters", path):
        base = peft.PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    if not base:
        raise ConfigError(
            f"the adapters in {str(path)!r} do not name their base model: load it yourself, and give "
            "peft.PeftModel.from_pretrained(base, path, is_trainable=True)"
        )
    return base


def _with_saved_adapters(model: PreTrainedModel, path: str | Path) -> nn.Module:
    with _loading("adapters", path):
        return _peft().PeftModel.from_pretrained(model, str(path), is_trainable=True)


# --- trunk and heads -------------------------------------------------------------------------------------------------


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, T) mask -> (B, T) int64: the number of real tokens before each; 0 on left padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(B, T) tokens -> (B, T, D), the trunk's last hidden state after its final norm; no lm_head."""
    check_no_prompt(model)
    inputs = {} if attention_mask is None else {
        "attention_mask": attention_mask.long(), "position_ids": position_ids_from_mask(attention_mask)
    }  # fmt: skip
    return unwrapped(model).base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state


def lm_head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None, float | None]:
    """(V, D) weight, (V,) bias or None, logit softcap or None: what linear_token_logprobs takes."""
    head = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None), getattr(model.config, "final_logit_softcapping", None)


@torch.no_grad()
def check_lm_head(model: PreTrainedModel) -> None:
    """Raises ConfigError where the logits are not lm_head(hidden_states), as in architectures that scale them."""
    if unwrapped(model).base_model is unwrapped(model):
        raise ConfigError(f"{type(model).__name__} is not supported: transformers does not say which part is its trunk")
    ids = torch.arange(2, device=model.device)[None]
    was_training = model.training
    model.eval()
    weight, bias, softcap = lm_head(model)
    ours = nn.functional.linear(hidden_states(model, ids), weight, bias).float()
    ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    model.train(was_training)
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
        raise ConfigError(
            f"{type(model).__name__} is not supported: it does more to its logits than lm_head, bias and softcap, and "
            "rlhf_fast computes log-probabilities from hidden states and would be wrong for it"
        )


def response_logprobs(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_length: int, *,
    temperature: float = 1.0, mask: Tensor | None = None, with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """(B, P + R) tokens -> (B, R) log-probability of each of the last R given what precedes it (and entropies).

    mask (B, R), default attention_mask[:, -R:]: what lies outside it is 0. No (B, T, V) tensor is made.
    """
    response = slice(input_ids.shape[1] - response_length, None)
    hidden = hidden_states(model, input_ids, attention_mask)[:, response.start - 1 : -1]
    weight, bias, softcap = lm_head(model)
    return linear_token_logprobs(
        hidden, weight, input_ids[:, response], bias=bias, temperature=temperature, softcap=softcap,
        mask=attention_mask[:, response] if mask is None else mask, with_entropy=with_entropy,
    )  # fmt: skip


# --- scalar heads ----------------------------------------------------------------------------------------------------


def load_reward_model(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *,
    dtype: torch.dtype | str = torch.float32,
) -> PreTrainedModel:  # fmt: skip
    """AutoModelForSequenceClassification with num_labels=1, from a reward model (its head is kept) or a language model.

    From a language model the trunk is taken over (copied, if an object is given; adapters merged) and the head drawn
    from a normal distribution with standard deviation 1 / sqrt(D + 1) (Stiennon et al. 2020), under the seed in force.
    The tokenizer's pad token enters the config, and the embedding grows if it is new (see with_own_pad). ConfigError
    for a classifier that is no decoder.
    """
    if isinstance(model, (str, Path)):
        base = _adapter_base(model)
        if base and has_scalar_head(model):
            reward = load_reward_model(base, tokenizer, dtype=dtype)
            if not Path(model, "config.json").is_file():  # not from save_model
                return _with_saved_adapters(reward, model)
            config = AutoConfig.from_pretrained(model)
            if config.vocab_size > reward.get_input_embeddings().weight.shape[0]:  # by the pad token of its training
                reward.resize_token_embeddings(config.vocab_size, mean_resizing=False)
            reward = _with_saved_adapters(reward, model)
            set_reward_scale(reward, *reward_scale(config))
            return reward
        if has_scalar_head(model):
            reward = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype).to(default_device())
        else:
            reward = scalar_head_on(load_policy(model, dtype=dtype))
            reward.name_or_path = str(model)  # where adapters that are put on it later find it again
    else:
        _check_is_model(model)
        reward = model if has_scalar_head(model) else scalar_head_on(model)
    _check_score(reward)
    if reward.config.num_labels != 1:
        raise ConfigError(f"a reward is one number; {type(reward).__name__} has num_labels={reward.config.num_labels}")
    if tokenizer is not None:
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            raise ConfigError("a reward model needs a pad token that is not eos: use with_own_pad(tokenizer)")
        if len(tokenizer) > reward.get_input_embeddings().weight.shape[0]:
            reward.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        reward.config.pad_token_id = tokenizer.pad_token_id
    return _learn_eos(reward)


def has_scalar_head(model: str | Path | PreTrainedModel) -> bool:
    """Whether it is a reward model already, or a language model that would get a new head."""
    if not isinstance(model, (str, Path)):
        return hasattr(model, "score")
    if _adapter_base(model):
        return _peft().PeftConfig.from_pretrained(str(model)).task_type == "SEQ_CLS"
    with _loading("model", model):
        config = AutoConfig.from_pretrained(model)
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def scalar_head_on(model: PreTrainedModel) -> PreTrainedModel:
    """AutoModelForSequenceClassification: a copy of the trunk under a new scalar head (see load_reward_model).
    ConfigError for an architecture for which transformers has none, or that is no decoder."""
    model = merge_adapters(model)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"no reward or value model can be made of {type(model).__name__}: transformers has no class for sequence "
            f"classification with {config.model_type}. (A reward may come from another architecture, and PPO needs no "
            "value model with advantage_estimator reinforce, rloo or group)"
        )
    scalar = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype).to(model.device)
    _check_score(scalar)
    scalar.base_model.load_state_dict(model.base_model.state_dict())
    scalar.score.float()  # it learns, over whatever trunk
    width = scalar.score.weight.shape[1]
    nn.init.normal_(scalar.score.weight, std=1 / math.sqrt(width + 1))
    return _learn_eos(scalar)


def _check_score(model: PreTrainedModel) -> None:
    if not hasattr(model, "score"):
        raise ConfigError(
            f"{type(model).__name__} is not supported: a reward is read at the last token by `score`, the head that "
            "decoders have, and encoders (BERT and the like) classify otherwise. Start from a decoder"
        )


def with_own_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer if its pad token is not eos, else a copy that pads with unk or bos, or with a new token <|pad|>.

    transformers reads a reward at the last token that is not pad, so a reward model's pad must not be eos.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer
    own = copy.deepcopy(tokenizer)
    spare = [t for t in (own.unk_token, own.bos_token) if t is not None and t != own.eos_token]
    own.add_special_tokens({"pad_token": spare[0] if spare else "<|pad|>"})
    return own


def score_tokens(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T) tokens, padded on either side -> (B,) float32 rewards, read at the last real token of each row."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (positions * attention_mask).argmax(-1)
    padded_left = not bool(attention_mask[:, 0].all())
    hidden = hidden_states(model, input_ids, attention_mask if padded_left else None)
    return scalar_head(model, hidden[torch.arange(len(last), device=last.device), last])


def scalar_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The head in float32 whatever the trunk's dtype: differences of rewards are what counts."""
    bias = model.score.bias if model.score.bias is None else model.score.bias.float()
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), model.score.weight.float(), bias).squeeze(-1)


def reward_scale(config) -> tuple[float, float]:
    """Mean and standard deviation of the raw reward on its reference set, as the config has them; 0 and 1 without."""
    return getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)


def is_trained_here(model: nn.Module) -> bool:
    """Whether RewardTrainer has trained this reward model, which then reads its score at an eos."""
    return hasattr(unwrapped(model).config, "reward_mean")


def set_reward_scale(model: nn.Module, mean: float, std: float) -> None:
    """Where the reward is used (RewardModelReward) it is (raw - mean) / std; forward and training stay raw."""
    config = unwrapped(model).config
    config.reward_mean, config.reward_std = mean, std


def rotary_limit(model: nn.Module) -> int | None:
    """Tokens beyond which the longest sequence of a forward pass rescales the rotary positions of all that are in it
    ("dynamic" and "longrope" embeddings); None where that never happens."""
    model = unwrapped(model)
    if getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", "default") not in ("dynamic", "longrope"):
        return None
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}  # 5, 4
    return (
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )


def trunk_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of the trunk, first to last; none where neither it nor its decoder (OPT) holds them itself."""
    lists = (m for m in _stack(model).children() if isinstance(m, nn.ModuleList))
    return max(lists, key=len, default=nn.ModuleList())


def _stack(model: PreTrainedModel) -> nn.Module:
    return getattr(model.base_model, "decoder", model.base_model)


def train_last_layers(model: PreTrainedModel, n: int) -> None:
    """Of the trunk only the last n layers and the final norm go on learning; embeddings and the others are frozen."""
    layers = trunk_layers(model)
    if not len(layers):
        raise ConfigError(f"train_last_layers is not supported for {type(model).__name__}, whose layers are not found")
    if n > len(layers):
        raise ConfigError(f"train_last_layers = {n}, and the model has {len(layers)} layers")
    model.base_model.requires_grad_(False)
    apart = (nn.Embedding, nn.Linear)  # the latter change the width of OPT's embeddings
    norms = [m for m in _stack(model).children() if m is not layers and not isinstance(m, apart)]
    for module in [*layers[len(layers) - n :], *norms]:
        module.requires_grad_(True)


class ValueModel(nn.Module):
    """V(s) at every token: forward(input_ids, attention_mask) -> (B, T) float32. `model` is the scalar-head model.

    A value is in the unit of the reward: a scale that its config has (set_reward_scale) is applied here and saved with
    the model. A score head of transformers has no bias that could take the mean up.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @classmethod
    def from_reward_model(cls, model: PreTrainedModel) -> ValueModel:
        """Starts as a copy of the reward model: the value of the last state is already what RewardModelReward gives."""
        if not has_scalar_head(model):
            raise ConfigError(f"{type(model).__name__} has no scalar head: give a reward model, or use from_policy")
        if isinstance(model, (str, Path)):
            raise ConfigError(f"a value model is the model itself, not a path: give load_reward_model({str(model)!r})")
        value = copy.deepcopy(merge_adapters(model)).requires_grad_(True)
        return cls(value)

    @classmethod
    def from_policy(cls, model: PreTrainedModel) -> ValueModel:
        """The policy's trunk under a head of zeros: the first values are 0, not noise."""
        value = scalar_head_on(model)
        nn.init.zeros_(value.score.weight)
        return cls(value)

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states of the trunk -> (...) values."""
        mean, std = reward_scale(self.model.config)
        return (scalar_head(self.model, hidden) - mean) / std

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(hidden_states(self.model, input_ids, attention_mask))

    def save_pretrained(self, path) -> None:
        self.model.save_pretrained(path)
