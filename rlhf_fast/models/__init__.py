"""Models: where they come from, and what the trainers read from them.

    trunk      (B, T) tokens -> (B, T, D) hidden states
    policy     trunk + lm_head                                  = AutoModelForCausalLM
    reward     trunk + scalar head, read at the last real token = AutoModelForSequenceClassification, num_labels=1
    value      trunk + scalar head, read at every token         = the same checkpoint format

    loading    a policy, a reward model or a tokenizer from a directory or the hub, and back to a directory
    tokens     what a tokenizer and a model have to agree on: vocabulary, positions, pad, the tokens that end an answer
    adapters   LoRA (peft): any of the models may carry adapters, and then only these are trained and saved
    language   the trunk and the lm_head
    scalar     the scalar head: rewards and values

attention_mask is bool, (B, T), and True counts. Padding may be on either side, because positions count real tokens only
and a reward is read where the mask ends: which token pads makes no difference, and it may be eos. None as a mask means
that nothing is padded on the left; the attention is then plainly causal, and what follows a token cannot change it.
"""

from .adapters import (
    adapters_off,
    add_lora,
    check_adapters,
    check_base_is_saved,
    has_adapters,
    learns_a_prompt,
    load_trained_state,
    merge_adapters,
    rows_like,
    trained_state,
    unwrapped,
    whole,
)
from .language import (
    answer_room,
    check_lm_head,
    checkpoint_activations,
    disable_dropout,
    evaluating,
    hidden_states,
    learned_positions,
    lm_head,
    position_ids_from_mask,
    rotary_limit,
    starts_as_its_base,
    train_last_layers,
    trunk_layers,
    trunk_stack,
)
from .loading import (
    has_scalar_head,
    load_config,
    load_policy,
    load_reward_model,
    load_tokenizer,
    loadable,
    make_reference,
    save_model,
    save_quietly,
)
from .scalar import (
    ValueModel,
    check_score,
    is_trained_here,
    reward_scale,
    scalar_head,
    scalar_head_on,
    score_tokens,
    set_reward_scale,
)
from .tokens import check_lengths, check_positions, stop_at_eos, stop_ids, with_own_pad

__all__ = [
    "ValueModel",
    "adapters_off",
    "add_lora",
    "answer_room",
    "check_adapters",
    "check_base_is_saved",
    "check_lengths",
    "check_lm_head",
    "check_positions",
    "check_score",
    "checkpoint_activations",
    "disable_dropout",
    "evaluating",
    "has_adapters",
    "has_scalar_head",
    "hidden_states",
    "is_trained_here",
    "learned_positions",
    "learns_a_prompt",
    "lm_head",
    "load_config",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "load_trained_state",
    "loadable",
    "make_reference",
    "merge_adapters",
    "position_ids_from_mask",
    "reward_scale",
    "rotary_limit",
    "rows_like",
    "save_model",
    "save_quietly",
    "scalar_head",
    "scalar_head_on",
    "score_tokens",
    "set_reward_scale",
    "starts_as_its_base",
    "stop_at_eos",
    "stop_ids",
    "train_last_layers",
    "trained_state",
    "trunk_layers",
    "trunk_stack",
    "unwrapped",
    "whole",
    "with_own_pad",
]  # fmt: skip
