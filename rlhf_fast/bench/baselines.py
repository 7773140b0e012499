"""What people use today for the same numbers: PyTorch as written in papers, torch.compile of it, and the peers.

Each table maps a name to a function with the arguments of our op. Peers appear where their package is installed, and
the kernels that only run on a GPU only there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..ops import reference

SEQUENCE = 512  # tokens; rows of logits are so many to a sequence for a peer that loops over sequences


def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


class Absent:
    """Stands where a peer would, so that the result says that it was not measured."""

    def __init__(self, module: str):
        self.module = module

    def __call__(self, *inputs):
        raise ModuleNotFoundError(f"{self.module} is not installed")


def add_peer(table: dict[str, Callable], name: str, module: str, load: Callable[[], Callable]) -> None:
    """Adds what load() imports, or Absent. A module that is there and cannot be imported fails when it is called."""
    if not find_spec(module):
        table[name] = Absent(module)
        return
    try:
        table[name] = load()
    except Exception as error:

        def broken(*inputs, error=error):
            raise error

        table[name] = broken


def log_softmax_gather(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def negative_cross_entropy(logits, labels):
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def eager_cross_entropy(logits, labels):
    return -F.cross_entropy(logits, labels, reduction="none")


def log_softmax_gather_and_entropy(logits, labels):
    logp = logits.log_softmax(-1)
    return logp.gather(-1, labels[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def logprobs_and_entropy_in_two_reads(logits, labels):
    """As one writes it for a compiler: a read for the maximum, and one for both sums. log_softmax makes it three."""
    logits = logits.float()
    below = logits - logits.amax(-1, keepdim=True)
    weights = below.exp()
    total = weights.sum(-1)
    log_total = total.log()
    label = below.gather(-1, labels[..., None]).squeeze(-1)
    return label - log_total, log_total - (weights * below).sum(-1) / total


def in_sequences(function: Callable) -> Callable:
    """TRL's functions loop over the first axis of (B, T, V): of rows alone that would be a Python loop over tokens."""

    def call(logits, labels):
        sequences = max(len(labels) // SEQUENCE, 1)
        outputs = function(logits.view(sequences, -1, logits.shape[-1]), labels.view(sequences, -1))
        return tuple(x.view_as(labels) for x in outputs) if isinstance(outputs, tuple) else outputs.view_as(labels)

    return call


def token_logprobs(device: torch.device) -> dict[str, Callable]:
    """(logits, labels) -> log-probabilities. Cross-entropy without a reduction is their negative."""
    table = {
        "eager": log_softmax_gather,
        "eager cross_entropy": eager_cross_entropy,
        "compile log_softmax": compiled(log_softmax_gather),
        "compile cross_entropy": compiled(negative_cross_entropy),
    }

    def trl():
        from trl.trainer.utils import selective_log_softmax

        return in_sequences(selective_log_softmax)

    def liger():
        from liger_kernel.transformers.functional import liger_cross_entropy

        # Where a gradient is wanted Liger writes it over the logits in its forward: then it gets a copy, as a caller
        # who still needs them gives it.
        return lambda x, y: -liger_cross_entropy(x.clone() if x.requires_grad else x, y, reduction="none")

    def quack():
        from quack.cross_entropy import cross_entropy

        return lambda x, y: -cross_entropy(x, y, reduction="none")

    add_peer(table, "TRL", "trl", trl)
    if device.type == "cuda":
        add_peer(table, "Liger cross_entropy", "liger_kernel", liger)
        add_peer(table, "quack cross_entropy", "quack", quack)
    return table


def token_logprobs_in_place(device: torch.device) -> dict[str, Callable]:
    """The same, of those that write the gradient over the logits; Liger's does so where it gives one number."""

    def liger():
        from liger_kernel.transformers.functional import liger_cross_entropy

        return lambda x, y: -liger_cross_entropy(x, y, reduction="sum")

    def quack():
        from quack.cross_entropy import cross_entropy

        return lambda x, y: -cross_entropy(x, y, reduction="none", inplace_backward=True)

    table: dict[str, Callable] = {}
    if device.type == "cuda":
        add_peer(table, "Liger cross_entropy in place", "liger_kernel", liger)
        add_peer(table, "quack cross_entropy in place", "quack", quack)
    return table


def token_logprobs_and_entropy(device: torch.device) -> dict[str, Callable]:
    """(logits, labels) -> log-probabilities and entropies."""
    table = {
        "eager": log_softmax_gather_and_entropy,
        "compile log_softmax": compiled(log_softmax_gather_and_entropy),
        "compile two reads": compiled(logprobs_and_entropy_in_two_reads),
    }

    def trl():
        from trl.trainer.utils import selective_log_softmax_and_entropy

        return in_sequences(selective_log_softmax_and_entropy)

    add_peer(table, "TRL", "trl", trl)
    return table


def matmul_cross_entropy(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def trl_linear_token_logprobs() -> Callable:
    """TRL's log-probabilities from hidden states, in its own chunks: (hidden, weight, labels), any leading axes."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk_size

    def logprobs(hidden, weight, labels):
        inputs = hidden.reshape(-1, hidden.shape[-1]), weight, None, labels.reshape(-1)
        return ChunkedLogProbFunction.apply(*inputs, 1.0, chunk_size, None, 1.0, ())[0].view_as(labels)

    return logprobs


def chunked_token_logprobs() -> Callable:
    """Log-probabilities by four chunks of the tokens, compiled, each computed again in the backward: what is written
    where all logits at once are too much.
    """
    of_chunk = compiled(matmul_token_logprobs)

    def logprobs(hidden, weight, labels):
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        size = -(-len(targets) // 4)
        chunks = zip(rows.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(of_chunk, x, weight, y, use_reentrant=False) for x, y in chunks]).view_as(labels)

    return logprobs


def linear_cross_entropy(device: torch.device) -> dict[str, Callable]:
    """(hidden, weight, labels) -> mean loss."""
    chunked = chunked_token_logprobs()
    table = {
        "eager": matmul_cross_entropy,
        "compile": compiled(matmul_cross_entropy),
        "compile in chunks": lambda x, w, y: -chunked(x, w, y).mean(),
    }

    def trl():
        logprobs = trl_linear_token_logprobs()
        return lambda x, w, y: -logprobs(x, w, y).mean()

    def liger():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy

    def quack():
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy

    def cce():
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy

    add_peer(table, "TRL", "trl", trl)
    if device.type == "cuda":
        add_peer(table, "Liger", "liger_kernel", liger)
        add_peer(table, "quack", "quack", quack)
        add_peer(table, "cut-cross-entropy", "cut_cross_entropy", cce)
    return table


def matmul_ppo_loss(hidden, weight, labels, old_logprobs, advantages, mask):
    logprobs = log_softmax_gather((hidden @ weight.T).float(), labels)
    return reference.ppo_loss(logprobs, old_logprobs, advantages, mask)


def linear_ppo_loss(device: torch.device) -> dict[str, Callable]:
    """(hidden, weight, labels, old_logprobs, advantages, mask) -> loss and statistics."""
    chunked = chunked_token_logprobs()
    table = {
        "eager": matmul_ppo_loss,
        "compile": compiled(matmul_ppo_loss),
        "compile in chunks": lambda x, w, y, *rest: reference.ppo_loss(chunked(x, w, y), *rest),
    }

    def liger():  # one advantage a sequence, no statistics but the share of clipped tokens
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False)
        return lambda x, w, y, old, a, m: loss(x, w, y, m, a[:, 0], old_per_token_logps=old)[0]

    def trl():
        logprobs = trl_linear_token_logprobs()
        return lambda x, w, y, *rest: reference.ppo_loss(logprobs(x, w, y), *rest)

    add_peer(table, "TRL", "trl", trl)
    if device.type == "cuda":
        add_peer(table, "Liger GRPO", "liger_kernel", liger)
    return table


def ppo_from_logits(device: torch.device) -> dict[str, Callable]:
    """(logits (1, N + 1, V), labels, old_logprobs, advantages, mask, each (1, N)) -> loss, its gradient in place."""

    def liger():
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        options = dict(temperature=1.0, beta=0.0, eps_high=0.2, inplace=True, reduce=True)
        return lambda x, y, old, a, m: triton_grpo_loss(x, old, None, y, a[:, 0], m, **options)[0]

    table: dict[str, Callable] = {}
    if device.type == "cuda":
        add_peer(table, "Liger GRPO in place", "liger_kernel", liger)
    return table


def matmul_token_logprobs(hidden, weight, labels):
    return log_softmax_gather((hidden @ weight.T).float(), labels)


def linear_token_logprobs(device: torch.device) -> dict[str, Callable]:
    """(hidden, weight, labels) -> log-probabilities."""
    table = {
        "eager": matmul_token_logprobs,
        "compile": compiled(matmul_token_logprobs),
        "compile in chunks": chunked_token_logprobs(),
    }
    add_peer(table, "TRL", "trl", trl_linear_token_logprobs)
    return table


def plain_kl_divergence(logits, ref_logits):
    logp, logq = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def kl_divergence(device: torch.device) -> dict[str, Callable]:
    """(logits, ref_logits) -> exact KL divergences."""
    return {"eager": plain_kl_divergence, "compile": compiled(plain_kl_divergence)}


def plain_masked_mean(values, mask):
    return (values * mask).sum() / mask.sum()


def masked_mean(device: torch.device) -> dict[str, Callable]:
    """(values, mask) -> mean, as verl and TRL write it: NaN for an empty mask, and behind one."""
    return {"eager": plain_masked_mean, "compile": compiled(plain_masked_mean)}


def plain_and_compiled(name: str) -> Callable[[torch.device], dict[str, Callable]]:
    """The specification of a small op, with all of our statistics; LOSS_ALONE has what a loop without them runs."""
    function = getattr(reference, name)
    return lambda device: {"eager": function, "compile": compiled(function)}


def gae_loop_without_gaps(rewards, values, mask, gamma=1.0, lam=0.95):
    """The loop of TRL's PPO: no mask within it, which a mask without gaps does not need."""
    rewards, values = rewards * mask, values * mask
    advantage, columns = 0.0, []
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        advantage = rewards[:, t] + gamma * next_values - values[:, t] + gamma * lam * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1) * mask
    return advantages, (advantages + values) * mask


@cache
def discounts(steps: int, decay: float, device: torch.device) -> torch.Tensor:
    """(T, T): decay^(s - t) where s >= t, else 0."""
    at = torch.arange(steps, device=device)
    return torch.tril(decay ** (at[:, None] - at).clamp(min=0).float())


def gae_as_product(rewards, values, mask, gamma=1.0, lam=0.95):
    """The same without a loop, A = delta M with a matrix of discounts that is kept: T times the arithmetic."""
    rewards, values = rewards * mask, values * mask
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages = (delta @ discounts(rewards.shape[1], gamma * lam, rewards.device)) * mask
    return advantages, (advantages + values) * mask


def gae(device: torch.device) -> dict[str, Callable]:
    """(rewards, values, mask) -> advantages and returns. The first is verl's loop, with gaps; the others know none."""
    return {"eager": reference.gae, "eager TRL's loop": gae_loop_without_gaps, "eager product": gae_as_product}


def plain_ppo_loss(logprobs, old_logprobs, advantages, mask):
    ratio = (logprobs - old_logprobs).exp()
    return plain_masked_mean(torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)), mask)


def plain_value_loss(values, old_values, returns, mask):
    clipped = values.clamp(old_values - 0.2, old_values + 0.2)
    return 0.5 * plain_masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


def plain_pairwise_loss(chosen, rejected):
    return -F.logsigmoid(chosen - rejected).mean()


def plain_dpo_loss(chosen, rejected, ref_chosen, ref_rejected):
    return -F.logsigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


# What a loop that logs nothing runs: no soft labels, no statistics, NaN for an empty mask.
LOSS_ALONE = {
    "ppo_loss": plain_ppo_loss,
    "value_loss": plain_value_loss,
    "pairwise_loss": plain_pairwise_loss,
    "dpo_loss": plain_dpo_loss,
}


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *others):
        ctx.save_for_backward(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, *[None] * (len(ctx.needs_input_grad) - 1)


class _BareLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *others):
        loss, stats, grad = x.new_empty(()), x.new_empty(12), torch.empty_like(x)
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(grad)
        return loss, stats

    @staticmethod
    def backward(ctx, grad, _):
        return ctx.saved_tensors[0] * grad, *[None] * (len(ctx.needs_input_grad) - 1)


class _BareRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels):
        logprobs, state = logits.new_empty(labels.shape), logits.new_empty((*labels.shape, 2))
        ctx.save_for_backward(logits, labels, state)
        return logprobs

    @staticmethod
    def backward(ctx, grad):
        logits, *_ = ctx.saved_tensors
        return torch.empty_like(logits), None


def bare_functions(op: str) -> dict[str, Callable]:
    """The least that a call can cost, nothing computed: with one output, one saved tensor and one product, and with as
    many tensors as the op has (a loss: its statistics and its gradient too; token_logprobs: what its backward reads).
    """
    same = _BareRows if op == "token_logprobs" else _BareLoss
    return {"bare autograd.Function": _Bare.apply, "bare, as many tensors": same.apply}
