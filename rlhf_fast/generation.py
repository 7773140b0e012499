"""Sampling from a causal language model: prompts in, answers and the log-probability of every answer token out.

Tokens are drawn by inverse transform: u[i, t] is a uniform number for row i at step t, and the token is the first whose
cumulative probability exceeds it. All u are drawn before the first step, so an answer depends neither on the batch size
nor on when other rows finish (up to the rounding of the matrix products).

Prompts are batched by length, and finished rows leave the batch. decoder.py runs llama and its kin (qwen, mistral,
gemma, phi3, olmo, smollm3, granite), gpt2 and gpt_neox. Other models go through transformers' generate() with the same
sampling, and a warning says so once; one prompt at a time if a batch changes what they compute.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from . import parallel
from .data.chat import Text, decode_responses, encode_prompt, is_conversation
from .data.collate import pad
from .decoder import Decoder, why_no_decoder
from .errors import ConfigError
from .models import answer_room, evaluating, learned_positions, stop_ids, unwrapped
from .ops import _layer

BLOCK = 128  # tokens of the vocabulary per block; sample() finds the block first, then the token in it
IGNORED_SETTINGS = {  # of a generation_config: those that we have no option for, at the values that change nothing
    "repetition_penalty": 1.0, "typical_p": 1.0, "guidance_scale": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0,
    "min_length": 0, "min_new_tokens": 0, "min_p": 0.0, "top_h": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "penalty_alpha": 0.0, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "sequence_bias": None, "exponential_decay_length_penalty": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "stop_strings": None, "watermarking_config": None,
}  # fmt: skip


# --- one token -------------------------------------------------------------------------------------------------------


def sample(
    logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(B, V) logits, (B,) uniforms in [0, 1) -> (B,) tokens and their (B,) log-probabilities under
    softmax(logits / temperature).

    top_k keeps the k most likely tokens, and any that tie with the last of them. From these top_p keeps the smallest
    set whose probabilities add up to top_p (Holtzman et al. 2020). The log-probabilities are those of the whole
    distribution, before top_k and top_p.
    """
    rows, vocab = logits.shape
    if top_k is None and top_p == 1.0 and _layer.runs_on(logits):
        return _layer.sample_tokens(logits.contiguous(), uniforms.double().contiguous(), temperature)
    z = logits.float() if logits.dtype.itemsize < 4 else logits
    largest = z.amax(-1, keepdim=True)
    weights = z.new_empty(rows, -(-vocab // BLOCK) * BLOCK)
    weights[:, vocab:] = 0.0
    # Subtract before dividing: z / t - largest / t would round both terms, and lose digits when they are close.
    torch.sub(z, largest, out=weights[:, :vocab]).div_(temperature).exp_()
    blocks = weights.view(rows, -1, BLOCK)
    sums = blocks.sum(-1).double()
    total = sums.sum(-1)
    if top_k is not None or top_p < 1.0:
        _truncate(weights, top_k, top_p)
        sums = blocks.sum(-1).double()

    # First the block, then the token: a cumulative sum over the whole vocabulary would cost more than the logits.
    cdf = sums.cumsum(-1)
    target = uniforms.double().clamp(max=1 - 1e-12)[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, target, right=True)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    # The fraction of the block below the target. It stays below 1, or a token of probability 0 could be chosen.
    share = (1 - (cdf.gather(1, block) - target) / sums.gather(1, block)).clamp_(0.0, 1 - 1e-9)
    token = block * BLOCK + torch.searchsorted(inside, share * inside[:, -1:], right=True)
    return token.squeeze(1), ((z.gather(1, token) - largest).squeeze(1) / temperature - total.log()).float()


def _truncate(weights: Tensor, top_k: int | None, top_p: float) -> None:
    """Sets the weights that top_k and top_p exclude to 0."""
    if top_k is not None and top_k < weights.shape[1]:
        weights.masked_fill_(weights < weights.topk(top_k).values[:, -1:], 0.0)
    if top_p < 1.0:
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        out = before >= top_p * ordered.sum(-1, keepdim=True, dtype=torch.float64)
        weights.scatter_(1, order, ordered.masked_fill_(out, 0.0))


def most_likely(logits: Tensor, _, *, temperature: float) -> tuple[Tensor, Tensor]:
    """sample() made greedy: the token with the largest logit, the first one if several are equal."""
    z = logits.float()
    return logits.argmax(-1), -((z - z.amax(-1, keepdim=True)) / temperature).logsumexp(-1)


# --- many answers ----------------------------------------------------------------------------------------------------


TOLD_EVERY = 600.0  # seconds


def batches(rows: list[int], batch_size: int, what: str) -> Iterator[list[int]]:
    """The rows in batches. A loop of more than 5 seconds shows a progress bar, which disappears at the end; where there
    is no terminal (a batch job), it writes a line every ten minutes instead."""
    first = parallel.rank() == 0
    steps, told = range(0, len(rows), batch_size), time.monotonic()
    bar = tqdm(steps, what, delay=5, leave=False, unit="batch", disable=None if first else True)
    for start in bar:
        yield rows[start : start + batch_size]
        if bar.disable and first and time.monotonic() - told >= TOLD_EVERY:
            told = time.monotonic()
            print(f"{what} {min(start + batch_size, len(rows))}/{len(rows)}", file=sys.stderr, flush=True)


@torch.no_grad()
def generate_with_logprobs(
    model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos_token_id: int | Sequence[int],
    temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0, do_sample: bool = True,
    batch_size: int = 128, generator: torch.Generator | Sequence[torch.Generator] | Tensor | None = None,
    bf16: bool = False,
) -> tuple[list[list[int]], list[array]]:  # fmt: skip
    """N prompts as token ids -> N responses of at most max_new_tokens ids, which end with eos unless they were cut, and
    the log-probability of every response token under softmax(logits / temperature).

    eos_token_id: one id, or several; any of them ends an answer (models.stop_ids).
    max_new_tokens: ConfigError if a model with learned positions (gpt2) has too few of them (models.answer_room).
    top_k, top_p: used only with do_sample; without it the most likely token is taken.
    generator: one generator, one per prompt, or a Tensor (N, max_new_tokens) of the uniform numbers themselves. With
    the last two an answer does not depend on the other prompts of the call.
    bf16: multiply in bfloat16, as under autocast. During the call this takes 2 more bytes per weight.

    The model's generation_config is not read (no sampling settings, no penalties), because PPO needs the
    log-probabilities of the model itself. If logits are NaN the log-probability is NaN, and the token is arbitrary.
    """
    stops = _checked_stops(eos_token_id, max_new_tokens, batch_size, temperature, top_p, top_k)
    longest = max(map(len, prompts), default=0)
    _check_readable(model, prompts, longest, max_new_tokens)
    drawn, choose = None, partial(most_likely, temperature=temperature)
    if do_sample:
        drawn = draw_uniforms(len(prompts), max_new_tokens, generator)
        choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)
    answer, reason = _answer_batch, why_no_decoder(model, longest + max_new_tokens)
    if reason is not None:
        name = type(model).__name__
        _warn_once(f"{name} generates through transformers' generate(), which is slower, because {reason}")
        answer = _answer_batch_by_transformers
        if _depends_on_batch(model, prompts, stops, min(max_new_tokens, 2)):
            _warn_once(f"{name} answers one prompt at a time, because a batch changes what it computes")
            batch_size = 1
    # Of many answers a token takes 12 bytes: a reference to the one int of its id, and a float32.
    responses, logprobs, ints = [[]] * len(prompts), [array("f")] * len(prompts), {}
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with evaluating(model):
        for rows in batches(longest_first, batch_size, "generating"):
            tokens, logps = answer(
                model, [prompts[i] for i in rows], max_new_tokens, stops, choose,
                None if drawn is None else drawn[rows].to(model.device), bf16,
            )  # fmt: skip
            # Up to and including the first stop. A row without one gets its width + 1, which a slice allows.
            lengths = (~_ends(tokens, stops)).cumprod(1).sum(1).add_(1).tolist()
            for i, row, logp, length in zip(rows, tokens.tolist(), logps.tolist(), lengths, strict=True):
                responses[i], logprobs[i] = [ints.setdefault(x, x) for x in row[:length]], array("f", logp[:length])
    return responses, logprobs


def _checked_stops(eos_token_id, max_new_tokens, batch_size, temperature, top_p, top_k) -> list[int]:
    """eos_token_id as a list. ConfigError if it is empty, or if a number is out of range."""
    try:
        stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    except TypeError:  # None, or a tensor of no dimensions
        stops = []
    if (
        max_new_tokens < 1 or batch_size < 1 or not temperature > 0 or not 0 < top_p <= 1
        or (top_k is not None and top_k < 1) or not stops or None in stops
    ):  # fmt: skip
        raise ConfigError(
            "generate: needs max_new_tokens >= 1, batch_size >= 1, temperature > 0 (greedy is do_sample=False), "
            "0 < top_p <= 1, top_k >= 1 or None, and eos_token_id an int or a list of int; "
            f"got {max_new_tokens}, {batch_size}, {temperature}, {top_p}, {top_k}, {eos_token_id!r}"
        )
    return stops


def _check_readable(model, prompts: Sequence[Sequence[int]], longest: int, max_new_tokens: int) -> None:
    """ConfigError for a prompt without tokens, for tokens that the model does not embed, and if the longest prompt
    leaves no room for an answer of max_new_tokens."""
    name, embedded = type(model).__name__, model.get_input_embeddings().weight.shape[0]
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"generate: prompt {i} has no tokens; a model needs at least one, for example bos")
    if (largest := max((int(max(prompt)) for prompt in prompts), default=0)) >= embedded:
        raise ConfigError(
            f"generate: the prompts contain token {largest}, but {name} embeds only {embedded} tokens: use the model's "
            "own tokenizer"
        )
    if max_new_tokens > answer_room(model, longest):
        raise ConfigError(
            f"generate: the longest prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, together more "
            f"than the {learned_positions(model)} positions of {name}: shorten the prompt or lower max_new_tokens"
        )


def _ends(tokens: Tensor, stops: list[int]) -> Tensor:
    """Which tokens end an answer."""
    ends = tokens == stops[0]
    for stop in stops[1:]:
        ends |= tokens == stop
    return ends


def draw_uniforms(rows: int, columns: int, generator) -> Tensor:
    """(rows, columns) numbers in [0, 1), one for every token that may be sampled."""
    if isinstance(generator, Tensor):
        return generator
    if not isinstance(generator, Sequence):
        return torch.rand(rows, columns, dtype=torch.float64, generator=generator)
    drawn = [torch.rand(1, columns, dtype=torch.float64, generator=g) for g in generator]
    return torch.cat(drawn) if drawn else torch.empty(0, columns, dtype=torch.float64)


def generate_tokens(model, prompts: Sequence[Sequence[int]], **options) -> list[list[int]]:
    """The responses of generate_with_logprobs. Warns once per model about the settings of its generation_config that
    transformers would apply and we ignore. ConfigError if logits are NaN."""
    _warn_of_ignored_settings(model)
    responses, logprobs = generate_with_logprobs(model, prompts, **options)
    for i, logps in enumerate(logprobs):
        if any(map(math.isnan, logps)):
            raise ConfigError(
                f"generate: the logits of {type(model).__name__} are NaN for prompt {i} ({len(prompts[i])} tokens): "
                "check that its weights are finite, and that its activations do not overflow in this dtype"
            )
    return responses


def _warn_of_ignored_settings(model) -> None:
    owner = unwrapped(model)
    config = getattr(owner, "generation_config", None)
    given = {name: getattr(config, name, None) for name in IGNORED_SETTINGS}
    ignored = [name for name, value in given.items() if value and value != IGNORED_SETTINGS[name]]
    if ignored:
        _warn_once(
            f"{', '.join(ignored)} in the generation_config of {type(owner).__name__} {owner.config.name_or_path!r} "
            "will be ignored: answers are sampled from the model's own distribution"
        )


@lru_cache(None)
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)


def _answer_batch(model, prompts, max_new_tokens, stops, choose, uniforms, bf16) -> tuple[Tensor, Tensor]:
    """-> (B, max_new_tokens) tokens and their log-probabilities. What a row holds after its first stop token means
    nothing."""
    different = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}  # each is read once
    ids, mask = (x.to(model.device) for x in pad(list(different), stops[0], left=True))
    decoder = Decoder(model, ids, mask, max_new_tokens, bf16)
    step = _Graph(decoder) if ids.is_cuda else decoder.step
    # Finished rows leave only once they are a large share of the batch, because removing them costs about a step: the
    # buffers are moved, and on CUDA a graph is captured for the new batch size. On CUDA even counting the finished rows
    # makes the host wait, so this happens at every eighth step only.
    min_share, every = (0.5, 8) if ids.is_cuda else (0.125, 1)
    tokens = torch.full((len(prompts), max_new_tokens), stops[0], device=ids.device)
    logprobs = torch.zeros(tokens.shape, dtype=torch.float32, device=ids.device)
    alive = torch.arange(len(prompts), device=ids.device)  # (rows in the batch,): the prompt that each row answers
    done = torch.zeros_like(alive, dtype=torch.bool)
    logits = decoder.start()
    if len(different) < len(prompts):
        copies = torch.tensor([different[tuple(prompt)] for prompt in prompts], device=ids.device)
        decoder.repeat(copies)
        logits = logits[copies]
    for t in range(max_new_tokens):
        token, logprob = choose(logits, None if uniforms is None else uniforms[alive, t])
        tokens[alive, t], logprobs[alive, t] = token, logprob
        done |= _ends(token, stops)
        if t + 1 == max_new_tokens:
            break
        if (t + 1) % every == 0:
            finished = int(done.sum())
            if finished == len(alive):
                break
            if finished >= min_share * len(alive):
                kept = (~done).nonzero().squeeze(1)
                decoder.keep(kept)
                alive, done, token = alive[kept], done[kept], token[kept]
                step = _Graph(decoder) if ids.is_cuda else decoder.step
        logits = step(token)
    return tokens, logprobs


class _Graph:
    """Decoder.step as a CUDA graph: one launch per token instead of about twenty per layer.

    The first call runs without a graph, and so initialises the libraries. The second call captures the graph, and later
    calls replay it. decoder.keep() changes shapes, so a new _Graph is needed after it.
    """

    def __init__(self, decoder: Decoder):
        self.decoder, self.graph, self.tokens, self.logits = decoder, None, None, None

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.tokens is None:
            self.tokens = tokens.clone()
            return self.decoder.step(self.tokens)
        self.tokens.copy_(tokens)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records the kernels without running them
                self.logits = self.decoder.step(self.tokens)
        self.graph.replay()
        return self.logits


class _Chooser:
    """A logits processor for generate() that chooses the token our way and makes every other token impossible."""

    def __init__(self, choose, uniforms: Tensor | None):
        self.choose, self.uniforms, self.logprobs = choose, uniforms, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = None if self.uniforms is None else self.uniforms[:, len(self.logprobs)]
        token, logprob = self.choose(scores, column)
        self.logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


def _answer_batch_by_transformers(
    model, prompts, max_new_tokens, stops, choose, uniforms, bf16
) -> tuple[Tensor, Tensor]:
    """_answer_batch for any model that has generate()."""
    ids, mask = (x.to(model.device) for x in pad(prompts, stops[0], left=True))
    chooser, owner = _Chooser(choose, uniforms), unwrapped(model)
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=stops[0])
    # generate() takes whatever `config` does not set, such as a penalty, from the model's own generation_config, and
    # that would change the logits that we choose from.
    settings, owner.generation_config = owner.generation_config, GenerationConfig()
    rounds = bf16 and model.get_input_embeddings().weight.dtype == torch.float32  # else it is in half precision
    try:
        # Not autocast(enabled=bf16): False would disable an autocast of the caller.
        with torch.autocast(model.device.type, torch.bfloat16) if rounds else nullcontext():
            out = model.generate(
                input_ids=ids, attention_mask=mask.long(), generation_config=config, logits_processor=[chooser]
            )
    finally:
        owner.generation_config = settings
    tokens = torch.full((len(prompts), max_new_tokens), stops[0], device=ids.device)
    logprobs = torch.zeros(tokens.shape, dtype=torch.float32, device=ids.device)
    steps = len(chooser.logprobs)
    tokens[:, :steps], logprobs[:, :steps] = out[:, ids.shape[1] :], torch.stack(chooser.logprobs, 1)
    return tokens, logprobs


@torch.no_grad()
def _depends_on_batch(model, prompts, stops: list[int], steps: int) -> bool:
    """Whether generate() computes something else for a prompt in a batch than alone, in its first `steps` tokens and
    beyond rounding: BART's decoder counts positions from the padding on, RWKV has no attention mask, RecurrentGemma's
    convolution reads the padding."""
    if len(prompts) < 2:
        return False
    shortest, longest = min(prompts, key=len), max(prompts, key=len)
    token = next(t for t in (*shortest, *range(len(stops) + 1)) if t not in stops)  # any that ends no answer

    def logits(batch) -> Tensor:  # after the shortest prompt, (steps, V)
        seen = []

        def choose(scores: Tensor, _) -> tuple[Tensor, Tensor]:
            seen.append(scores[-1])
            return torch.full((len(batch),), token, device=scores.device), scores.new_zeros(len(batch))

        _answer_batch_by_transformers(model, batch, steps, stops, choose, None, False)  # padded as the answers will be
        return torch.stack(seen).float()

    with evaluating(model):
        alone, together = logits([shortest]), logits([longest, shortest])
    spread = (alone - alone.mean(-1, keepdim=True)).norm()
    return bool((together - alone).norm() > 0.05 * spread)  # rounding in half precision: 0.02


def generate_text(
    model, tokenizer, prompts: Sequence[Text], *, max_new_tokens: int, temperature: float = 1.0,
    top_k: int | None = None, top_p: float = 1.0, do_sample: bool = True, batch_size: int = 128,
    seed: int | Sequence[int] = 0, bf16: bool = False,
) -> list[str]:  # fmt: skip
    """One answer per prompt (text or messages), decoded without special tokens.

    seed: one for all prompts, or one per prompt; then an answer depends only on its own prompt and seed.
    bf16: multiply in bfloat16, which is faster if the hardware supports it.

    From the model's generation_config only the tokens that end an answer are used. The arguments replace its sampling
    settings. Penalties and similar settings are ignored, and a warning names them once per model.
    """
    options = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "do_sample": do_sample, "batch_size": batch_size, "bf16": bf16,
    }  # fmt: skip
    return generate_answers(model, tokenizer, _checked_prompts(prompts), seed, **options)[0]


def generate_answers(
    model, tokenizer, prompts: Sequence[Text], seed: int | Sequence[int], **options
) -> tuple[list[str], list[bool]]:
    """The texts of generate_text, and whether each was cut at max_new_tokens. options: those of generate_tokens."""
    one = isinstance(seed, int)
    generator = torch.Generator().manual_seed(seed) if one else [torch.Generator().manual_seed(s) for s in seed]
    encoded, stops = [encode_prompt(tokenizer, prompt) for prompt in prompts], stop_ids(model, tokenizer)
    responses = generate_tokens(model, encoded, eos_token_id=stops, generator=generator, **options)
    texts = decode_responses(tokenizer, prompts, encoded, responses, stops)
    return texts, [ids[-1] not in stops for ids in responses]


def _checked_prompts(prompts) -> list[Text]:
    """The prompts as a list. ConfigError for one that is neither text nor messages, and for a single prompt instead of
    a list: its characters or turns would be answered one by one."""
    if isinstance(prompts, (str, Mapping)) or (is_conversation(prompts) and len(prompts)):
        raise ConfigError(f"generate: prompts must be a list, got a single prompt: {prompts!r:.80}; pass [prompt]")
    prompts = list(prompts)
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not (is_conversation(prompt) and len(prompt)):
            raise ConfigError(
                f"generate: prompt {i} must be text or a list of {{'role', 'content'}} messages, got {prompt!r:.80}"
            )
    return prompts
