"""The Rollout that PPO learns from: answers to prompts, with the log-probabilities, values and scores of the models.

generation.py samples the answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import parallel
from .data.chat import Text, decode_responses
from .data.collate import MIN_SHARED, Packed, pad
from .data.formats import Prompt
from .errors import ConfigError
from .generation import draw_uniforms, generate_with_logprobs
from .models import stop_ids
from .ops import kl_penalty, masked_mean


@dataclass
class Rollout:
    """B answers and what the models compute for each of their tokens. P prompt columns, R response columns.

    tokens         p0 p1 p2 | r0 r1 r2 e  .      prompt_ids padded on the left, response_ids on the right; e = eos
    logprobs                | l0 l1 l2 l3 .      l[i] = log p(r[i] given everything before it), at the temperature
    values                  | v0 v1 v2 v3 .      v[i] = value of the state in which r[i] is chosen
    rewards                 | k0 k1 k2 k3+s .    k = -kl_coef * KL, s = score
    response_mask           |  1  1  1  1  0     eos counts, padding never does, even if pad and eos are the same token

    If a tool writes into the response, the model reads the tool's tokens t but is not trained on them:

    tokens         p0 p1 p2 | r0 t0 t1 r1 e
    response_mask           |  1  0  0  1  1
    present                 |  1  1  1  1  1     None if it equals response_mask

    Outside response_mask every float tensor is 0, and no statistic counts it.
    """

    prompt_ids: Tensor  # (B, P) int64
    prompt_mask: Tensor  # (B, P) bool
    response_ids: Tensor  # (B, R) int64
    response_mask: Tensor  # (B, R) bool
    ended: Tensor  # (B,) bool: the response ends with eos and was not cut off
    prompts: list[Text]
    responses: list[str]  # decoded without special tokens
    columns: dict[str, list] = field(default_factory=dict)  # other columns of the prompt rows, for reward functions
    present: Tensor | None = None  # (B, R) bool: the response tokens that the model reads, see above
    rollout_logprobs: Tensor | None = None  # (B, R) of the engine that sampled, if it returned them
    logprobs: Tensor | None = None  # (B, R) float32, like all that follow unless noted
    ref_logprobs: Tensor | None = None  # None without a reference
    values: Tensor | None = None
    raw_scores: Tensor | None = None  # (B,) as the reward returned them
    scores: Tensor | None = None  # (B,) used for training: raw_scores scaled, clipped, minus penalties
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    value_error: Tensor | None = None  # () mean of (returns - values)^2, if the advantages were whitened
    importance_weights: Tensor | None = None  # (B, R) exp(logprobs - rollout_logprobs), capped, with importance_cap

    @property
    def lengths(self) -> Tensor:
        """(B,) numbers of tokens, prompt plus response."""
        return self.prompt_mask.sum(1) + self.read_mask.sum(1)

    @property
    def read_mask(self) -> Tensor:
        """(B, R) bool: all response tokens that the model reads, including a tool's."""
        return self.response_mask if self.present is None else self.present

    def kl(self, estimator: str) -> Tensor | None:
        """(B, R) KL to the reference, nats; None without one."""
        if self.ref_logprobs is None:
            return None
        return kl_penalty(self.logprobs, self.ref_logprobs, estimator=estimator)

    def scatter(self, rows: Tensor, x: Tensor) -> Tensor:
        """(N, ...), one entry per response token of b rows -> (b, R, ...), 0 outside response_mask."""
        mask = self.response_mask[rows]
        if bool(mask.all()):
            return x.view(*mask.shape, *x.shape[1:])
        return x.new_zeros(*mask.shape, *x.shape[1:]).index_put((mask,), x)

    def texts_and_tokens(self, rows: Tensor | None = None) -> dict:
        """Texts, tokens and scores of some rows (default: all), to save a batch that produced a NaN for inspection."""
        scores = self.raw_scores if self.scores is None else self.scores
        rows = torch.arange(len(scores)) if rows is None else rows.cpu()
        return {
            "prompts": [self.prompts[i] for i in rows.tolist()],
            "responses": [self.responses[i] for i in rows.tolist()],
            **{name: getattr(self, name).cpu()[rows] for name in ("prompt_ids", "response_ids", "response_mask")},
            "scores": scores.cpu()[rows],
        }


def generate(
    model, tokenizer, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 1.0,
    batch_size: int = 128, generator: torch.Generator | None = None, bf16: bool = False,
) -> Rollout:  # fmt: skip
    """Samples one response per prompt (a data.formats.Prompt) -> a Rollout with rollout_logprobs, but without the
    log-probabilities, values and scores that the models compute later. With several processes (parallel.py) each
    answers its share, and every process gets all answers.

    There is no top_p: the log-probabilities of a truncated distribution are not the policy's.
    """
    stops = stop_ids(model, tokenizer)
    drawn = draw_uniforms(len(prompts), max_new_tokens, generator)

    def answer(rows: Sequence[int]) -> list[tuple[list[int], Sequence[float]]]:
        answers = generate_with_logprobs(
            model, [prompts[i].tokens for i in rows], max_new_tokens=max_new_tokens, eos_token_id=stops,
            temperature=temperature, batch_size=batch_size, generator=drawn[list(rows)], bf16=bf16,
        )  # fmt: skip
        return list(zip(*answers, strict=True))

    answers = parallel.map_shares(answer, range(len(prompts)))
    responses, logprobs = ([row[k] for row in answers] for k in (0, 1))
    return make_rollout(tokenizer, prompts, responses, logprobs=logprobs, stop_token_ids=stops, device=model.device)


def check_rollout_lists(returned, rows: int, embedded: int, with_logprobs: bool) -> None:
    """Checks what a rollout_func returned, before the iteration has changed anything. ConfigError unless it has lists
    for make_rollout with `rows` rows each, tokens that the models embed, and log-probabilities if with_logprobs."""
    if not isinstance(returned, Mapping) or returned.get("completion_ids") is None:
        got = f"keys {', '.join(map(repr, returned))}" if isinstance(returned, Mapping) else type(returned).__name__
        raise ConfigError(
            'PPOTrainer: rollout_func must return {"completion_ids": [[token, ...], ...], ...}, one list of tokens '
            f"per prompt, got {got}"
        )
    if taken := {"tokenizer", "prompts", "responses", "stop_token_ids", "device"}.intersection(returned):
        raise ConfigError(
            f"PPOTrainer: rollout_func may not return {min(taken)!r}, because the trainer sets it itself; rename it"
        )
    needs = {"completion_ids": "tokens", "prompt_ids": "tokens", "logprobs": "finite numbers", "env_mask": "0 and 1"}
    for name, values in returned.items():
        if values is None and name in needs:
            continue
        _check_rows(name, values, rows)
        for i, row in enumerate(values if name in needs else ()):
            x = _row(row, whole=needs[name] == "tokens")
            if x is None or (name == "prompt_ids" and not len(x)):
                raise ConfigError(
                    f"PPOTrainer: rollout_func returned {row!r:.80} in {name}, row {i}, which must be a list of "
                    f"{needs[name]}"
                )
            if needs[name] == "tokens" and (strange := [token for token in x.tolist() if not 0 <= token < embedded]):
                raise ConfigError(
                    f"PPOTrainer: rollout_func returned the token {strange[0]} in {name}, but the models embed only "
                    f"{embedded} tokens: use the policy's tokenizer in the engine"
                )
    if with_logprobs and returned.get("logprobs") is None:
        raise ConfigError(
            "PPOTrainer: importance_cap needs the engine's log-probabilities, but rollout_func returned no "
            '"logprobs": return them, or leave importance_cap out'
        )


def _check_rows(name: str, values, rows: int) -> None:
    count = len(values) if isinstance(values, Sized) and getattr(values, "ndim", 1) else "no"
    if count != rows:
        raise ConfigError(f"rollout_func: {name} has {count} rows for {rows} prompts")


def _row(row, whole: bool) -> Tensor | None:
    """The row as a tensor (T,); None if it is not a list of finite numbers. whole: they must be integers (tokens)."""
    try:
        x = torch.as_tensor(row)
    except (OverflowError, RuntimeError, TypeError, ValueError):  # what torch raises for text, None or ragged lists
        return None
    broken = not bool(x.isfinite().all()) or (whole and x.is_floating_point())
    return None if x.ndim != 1 or (broken and len(x)) else x


def make_rollout(
    tokenizer, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]], *,
    prompt_ids: Sequence[Sequence[int]] | None = None, logprobs: Sequence[Sequence[float]] | None = None,
    env_mask: Sequence[Sequence[int]] | None = None, stop_token_ids: Sequence[int] | None = None, device=None,
    **columns,
) -> Rollout:  # fmt: skip
    """A Rollout from lists. The arguments have the names of TRL's GRPOTrainer.rollout_func.

    completion_ids: all tokens after the prompt, including a tool's.
    env_mask: 1 on the tokens that the model sampled; default all.
    logprobs: the engine's log-probabilities, one per token of completion_ids.
    prompt_ids: the prompts as the engine read them; default those of `prompts`.
    stop_token_ids: the tokens that end a response (models.stop_ids); default the tokenizer's eos. A response that does
    not end with one was cut off.
    columns: lists of B for the reward functions, added to the dataset's columns or replacing them.
    """
    eos = tokenizer.eos_token_id
    stops = [eos] if stop_token_ids is None else stop_token_ids
    prompt_ids = [prompt.tokens for prompt in prompts] if prompt_ids is None else prompt_ids
    for name, rows in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids), *columns.items()):
        _check_rows(name, rows, len(prompts))
    for name, rows in (("logprobs", logprobs), ("env_mask", env_mask)):
        if rows is not None and [len(row) for row in rows] != [len(row) for row in completion_ids]:
            raise ConfigError(f"rollout_func: {name} must have one number for each token of completion_ids")
    response_ids, present = pad(completion_ids, eos)
    response_mask = present if env_mask is None else pad(env_mask, 0)[0].bool()
    if not bool(response_mask.any(1).all()):
        row = int((~response_mask.any(1)).nonzero()[0])
        raise ConfigError(
            f"rollout_func: response {row} has no token that the model sampled: return at least one, with 1 in its "
            "env_mask"
        )
    ended = torch.tensor([row[-1] in stops for row in completion_ids], dtype=torch.bool)
    tensors = (*pad(prompt_ids, eos, left=True), response_ids, response_mask, ended)
    rollout = Rollout(
        *(x.to(device) for x in tensors),
        prompts=(texts := [prompt.prompt for prompt in prompts]),
        responses=decode_responses(tokenizer, texts, prompt_ids, completion_ids, stops),
        columns={key: [prompt.columns.get(key) for prompt in prompts] for key in prompts[0].columns} | columns,
        present=None if env_mask is None else present.to(device),
    )
    if logprobs is not None:
        flat = torch.tensor([x for row in logprobs for x in row], dtype=torch.float32)
        padded = torch.zeros(present.shape, dtype=torch.float32).masked_scatter(present, flat)
        rollout.rollout_logprobs = padded.masked_fill(~response_mask, 0.0).to(device)
    return rollout


def right_padded(rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """b rows with all padding moved to the right -> input_ids (b, T), positions (N,), labels (N,).

    Without padding on the left, a causal model needs neither a mask nor position ids. labels are the N response tokens
    in the order of response_mask[rows]. positions are the indices of the hidden states, among b * T, that predict them.
    """
    mask = torch.cat([rollout.prompt_mask[rows], rollout.read_mask[rows]], 1)
    ids = torch.cat([rollout.prompt_ids[rows], rollout.response_ids[rows]], 1)
    width = int(mask.sum(1).max())
    real_first = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    row, column = rollout.response_mask[rows].nonzero(as_tuple=True)
    positions = row * width + rollout.prompt_mask[rows].sum(1)[row] - 1 + column
    return ids.gather(1, real_first), positions, rollout.response_ids[rows][row, column]


def packed_rows(rollout: Rollout, rows: Tensor) -> tuple[Packed, Tensor, Tensor]:
    """b rows end to end -> Packed, positions (N,) in it, labels (N,); positions and labels as in right_padded.

    Neighbours with the same prompt share it, all but its last token, which predicts the first of each response:

    tokens      p0 p1 p2 a0 a1 | p2 b0 b1 b2      responses a0 a1 a2 and b0 b1 b2 b3; no token follows the last ones
    positions         x  x  x    x  x  x  x
    """
    prompt_lengths, read_lengths = (mask[rows].sum(1).tolist() for mask in (rollout.prompt_mask, rollout.read_mask))
    sequences, prefixes, positions, labels = [], [], [], []
    first, before, start = 0, None, 0
    for i, size, read in zip(rows.tolist(), prompt_lengths, read_lengths, strict=True):
        prompt, response = rollout.prompt_ids[i, -size:], rollout.response_ids[i, :read]
        same = before is not None and size > MIN_SHARED and torch.equal(prompt, before)
        first, before, shared = (first, before, size - 1) if same else (len(sequences), prompt, 0)
        sequences.append(torch.cat([prompt, response[:-1]]))
        prefixes.append((first, shared))
        learned = rollout.response_mask[i, :read].nonzero().squeeze(1)
        positions.append(start + size - 1 - shared + learned)
        labels.append(response[learned])
        start += len(sequences[-1]) - shared
    return Packed.of(sequences, prefixes), torch.cat(positions), torch.cat(labels)


def shared_prompts(rollout: Rollout, group: int) -> Tensor:
    """(B,) how many tokens packed_rows leaves out of each row if it follows the row before: all of the prompt but its
    last token. 0 for the first row of a group, for a prompt that is too short to be shared, and for one that differs
    from the prompt before, because a rollout_func has changed it."""
    prompts, ids = rollout.prompt_mask.sum(1), rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1)
    alone = (torch.arange(len(prompts), device=prompts.device) % group == 0) | (prompts <= MIN_SHARED)
    alone |= (ids != ids.roll(1, 0)).any(1)
    return (prompts - 1).masked_fill(alone, 0)


def minibatches(
    lengths: Tensor, minibatch_size: int, micro_batch_size: int | None = None, *, micro_batch_tokens: int | None = None,
    generator: torch.Generator | None = None, group: int = 1, shared: Tensor | None = None,
) -> list[list[Tensor]]:  # fmt: skip
    """(B,) lengths -> [minibatch][micro-batch] -> row numbers. Every row occurs once; a generator shuffles them.

    group: this many consecutive rows (the responses to one prompt) are shuffled as one, so a minibatch has whole groups
    if its size is a multiple of theirs.
    shared: (B,) for packed_rows, how many of its tokens each row shares with the one before it (shared_prompts). Then
    micro-batches too have whole groups, if they may have as many rows, and tokens are counted as they are packed.

    Before a minibatch is split, its rows are sorted by length (with `shared` its groups, each by its longest row). So a
    micro-batch has little padding, and one long row makes few of them small. A micro-batch has at most micro_batch_size
    rows and micro_batch_tokens tokens, padding included, but at least one row.
    """
    together = shared is not None
    groups = torch.arange(len(lengths) // group)
    if generator is not None:
        groups = torch.randperm(len(groups), generator=generator)
    order = (groups[:, None] * group + torch.arange(group)).flatten()
    plan, widths = [], lengths.view(-1, group).amax(1).repeat_interleave(group) if together else lengths
    for rows in order.to(lengths.device).split(minibatch_size):
        rows = rows[widths[rows].argsort(descending=True, stable=True)]  # stable, so that groups stay together
        if together:  # the row that it shares with may be in another minibatch
            repeats = shared[rows].masked_fill(rows.roll(1) != rows - 1, 0)
        sizes, start, longest = [], 0, widths[rows].tolist()
        while start < len(rows):
            max_rows = micro_batch_size or len(rows)
            if micro_batch_tokens is not None and not together:
                max_rows = min(max_rows, max(1, micro_batch_tokens // longest[start]))
            elif micro_batch_tokens is not None:
                # Nothing comes before the first row of a micro-batch.
                packed = (lengths[rows[start:]] - repeats[start:]).cumsum(0) + repeats[start]
                max_rows = min(max_rows, max(1, int((packed <= micro_batch_tokens).sum())))
            if together and max_rows > group:
                max_rows -= (start + max_rows) % group
            sizes.append(min(max_rows, len(rows) - start))
            start += sizes[-1]
        plan.append(list(rows.split(sizes)))
    return plan


def repetition(ids: Tensor, mask: Tensor) -> Tensor:
    """(B, T) tokens -> (B,) the share of pairs of adjacent tokens that occur earlier in the same row."""
    real = mask[:, 1:] & mask[:, :-1]
    pairs = (ids[:, :-1] << 32) + ids[:, 1:]
    padding = -1 - torch.arange(pairs.shape[1], device=ids.device)  # all different, and smaller than any pair
    pairs = torch.where(real, pairs, padding).sort(1).values
    return (pairs[:, 1:] == pairs[:, :-1]).sum(1) / real.sum(1).clamp(min=1)


def rollout_metrics(rollout: Rollout, kl_coef: float, kl_estimator: str, *, shaped: bool = False) -> dict:
    """The log's metrics of a rollout: sums over the tokens of a response, averaged over responses.

    Without a reference there is nothing about a KL.
    shaped: the scores differ from what the reward returned (PPOConfig.shapes_scores). Then the mean of the raw scores
    is logged too, as objective/raw_scores.
    """
    mask, scores, kl, metrics = rollout.response_mask, rollout.scores.mean(), rollout.kl(kl_estimator), {}
    if kl is not None:
        of_responses = kl.sum(1).mean()
        metrics |= {
            "objective/kl": of_responses,
            "objective/kl_per_token": masked_mean(kl, mask),
            "objective/kl_coef": kl_coef,
            "objective/non_score_reward": -kl_coef * of_responses,
            "objective/rlhf_reward": -kl_coef * of_responses + scores,
        }
    if rollout.values is not None:
        metrics["critic/vf_explained_var"] = _explained_variance(rollout.values, rollout.returns, mask)
    if rollout.rollout_logprobs is not None:
        difference = (rollout.logprobs - rollout.rollout_logprobs)[mask]
        metrics["sampling/sampling_logp_difference/mean"] = difference.abs().mean()
        metrics["sampling/sampling_logp_difference/max"] = difference.abs().max()
    if rollout.importance_weights is not None:
        metrics["sampling/importance_sampling_ratio/mean"] = masked_mean(rollout.importance_weights, mask)
    if shaped:
        metrics["objective/raw_scores"] = rollout.raw_scores.mean()
    return {
        "objective/entropy": -rollout.logprobs[mask].sum() / len(mask),
        "objective/scores": scores,
        "objective/score_length_correlation": correlation(rollout.raw_scores, mask.sum(1).float()),
        "val/num_eos_tokens": rollout.ended.sum(),
        **metrics,
        **text_metrics(rollout),
    }


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """() 1 - Var[returns - values] / Var[returns]. NaN (null in the log) if all returns are equal up to rounding, so
    that there is nothing to explain."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    varies = variance(returns) > 1e-12 * masked_mean(returns.square(), mask)
    return torch.where(varies, 1 - variance(returns - values) / variance(returns), torch.nan)


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of two (B,) tensors; 0 if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt().clamp(min=1e-12)


def text_metrics(rollout: Rollout) -> dict:
    """Signs of reward hacking that need no model: length, endings, repetition within and across responses."""
    lengths = rollout.response_mask.sum(1)
    return {
        "response_length/mean": lengths.float().mean(),
        "response_length/max": lengths.max(),
        "response/ended": rollout.ended.float().mean(),
        "response/repetition": repetition(rollout.response_ids, rollout.response_mask).mean(),
        "response/unique": len(set(rollout.responses)) / len(rollout.responses),
    }
