"""The ops, the functions that `import rlhf_fast` offers to any training loop. Each op has a file of its own."""

from ._dispatch import backends, use_backend
from ._native import empty_cache
from .cross_entropy import cross_entropy
from .dpo_loss import dpo_loss
from .gae import gae
from .kl_divergence import kl_divergence
from .kl_penalty import kl_penalty
from .linear_cross_entropy import linear_cross_entropy
from .linear_ppo_loss import linear_ppo_loss
from .linear_token_logprobs import linear_token_logprobs
from .masked_mean import masked_mean
from .masked_whiten import masked_whiten
from .pairwise_loss import pairwise_loss
from .ppo_loss import ppo_loss
from .ranking_loss import ranking_loss
from .token_logprobs import token_logprobs, token_logprobs_and_entropy
from .value_loss import value_loss

__all__ = [
    "backends",
    "cross_entropy",
    "dpo_loss",
    "empty_cache",
    "gae",
    "kl_divergence",
    "kl_penalty",
    "linear_cross_entropy",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "masked_mean",
    "masked_whiten",
    "pairwise_loss",
    "ppo_loss",
    "ranking_loss",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "use_backend",
    "value_loss",
]
