"""Models: loading and saving them, and the parts that the trainers use.

    trunk      (B, T) tokens -> (B, T, D) hidden states
    policy     trunk + lm_head                                  = AutoModelForCausalLM
    reward     trunk + scalar head, read at the last real token = AutoModelForSequenceClassification, num_labels=1
    value      trunk + scalar head, read at every token         = the same checkpoint format

    loading    load a policy, a reward model or a tokenizer from a directory or the hub, and save it to a directory
    tokens     what a tokenizer and a model have to agree on: vocabulary, positions, padding, stop tokens
    adapters   LoRA (peft): any of the models may have adapters, and then only these are trained and saved
    language   the trunk and the lm_head
    scalar     the scalar head: rewards and values

attention_mask is bool, (B, T), and True means a real token. Padding may be on either side, because positions count real
tokens only and a reward is read where the mask ends. The pad token makes no difference, and it may be eos. A mask of
None means that no row is padded on the left; attention is then simply causal, and nothing after a token can change it.
"""

# ruff: noqa: F401 - names are re-exported

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
    check_causal,
    check_lm_head,
    checkpoint_activations,
    disable_dropout,
    evaluating,
    hidden_states,
    learned_positions,
    lm_head,
    logit_factor,
    logit_softcap,
    loses_softcap,
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
    has_reward_scale,
    reward_scale,
    scalar_head,
    scalar_head_on,
    score_tokens,
    set_reward_scale,
)
from .tokens import check_lengths, check_positions, positions_of, stop_at_eos, stop_ids, with_own_pad

# The names for scripts, which type checkers then take for public. The package itself also uses the others.
__all__ = [
    "ValueModel", "add_lora", "load_policy", "load_reward_model", "load_tokenizer", "make_reference", "merge_adapters",
    "save_model", "with_own_pad",
]  # fmt: skip
