"""A `transformers` causal language model as a judge, in this process (model_judge.py explains how it judges)."""

import math
from collections.abc import Sequence
from functools import partial

from ..generation import generate_tokens
from ..models import check_lm_head, evaluating, positions_of, stop_ids
from .constitution import Constitution
from .generator import describe_model
from .layouts import COMPARE_LAYOUTS, WORDS
from .ledger import Answer, Tries
from .model_judge import ModelJudge
from .scoring import encode, label_logprobs


class LocalBackend:
    """Scores labels with one model, computing shared prefixes of questions once. Writes rationales greedily."""

    def __init__(self, model, tokenizer, constitution: Constitution, tokens_per_batch: int):
        check_lm_head(model)
        self.model, self.tokenizer, self.tokens_per_batch = model, tokenizer, tokens_per_batch
        render = COMPARE_LAYOUTS[constitution.compare_layout][1]
        self._render = partial(render, tokenizer, words=WORDS[constitution.language])
        self.max_length = positions_of(model.config)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._special = sorted({*tokenizer.all_special_tokens, *(str(t) for t in added if t.special)})

    def describe(self) -> dict:
        return {"backend": "local", **describe_model(self.model)}

    def special_tokens(self) -> Sequence[str]:
        return self._special

    def prompt(self, shots, question: str, labels, rationale: str | None) -> str:
        return self._render(shots, question, rationale)

    def ask_for_rationale(self, shots, question: str) -> str:
        return self._render(shots, question, asking=True)

    def answer(self, requests: Sequence[dict], tries: Tries) -> None:
        tries.all(self._scores(requests) if "labels" in requests[0] else self._texts(requests))

    def _scores(self, requests: Sequence[dict]) -> list[Answer]:
        encoded = [[self._encode(r, label) for label in r["labels"]] for r in requests]
        answers = [Answer("too_long", reason=f"the question is longer than {self.max_length} tokens")] * len(requests)
        fits = [i for i, rows in enumerate(encoded) if max(map(len, rows)) <= self.max_length]
        with evaluating(self.model):
            scores = label_logprobs(self.model, [encoded[i] for i in fits], self.tokens_per_batch)
        for i, logprobs in zip(fits, scores, strict=True):
            value = {"logprobs": list(logprobs), "mass": sum(map(math.exp, logprobs)), "kind": "exact"}
            answers[i] = Answer("ok", value)
        return answers

    def _texts(self, requests: Sequence[dict]) -> list[Answer]:
        budget = requests[0]["max_tokens"]
        reason = f"the question and a rationale of {budget} tokens are longer than {self.max_length} tokens"
        encoded, answers = [self._encode(r) for r in requests], [Answer("too_long", reason=reason)] * len(requests)
        fits = [i for i, ids in enumerate(encoded) if len(ids) + budget <= self.max_length]
        written = generate_tokens(
            self.model, [encoded[i] for i in fits], max_new_tokens=budget,
            eos_token_id=stop_ids(self.model, self.tokenizer), do_sample=False,
        )  # fmt: skip
        for i, tokens in zip(fits, written, strict=True):
            answers[i] = Answer("ok", {"text": self.tokenizer.decode(tokens, skip_special_tokens=True)})
        return answers

    def _encode(self, request: dict, label: str = "") -> list[int]:
        # A chat template has already written the special tokens.
        return encode(self.tokenizer, request["prompt"] + label, request["layout"] != "chat")


class LocalJudge(ModelJudge):
    """Judges with a model and its tokenizer. tokens_per_batch limits rows times columns of one forward pass.

    The other arguments are those of `ModelJudge`.
    """

    def __init__(
        self, model, tokenizer, constitution: Constitution, *, min_label_mass: float = 0.1, cot_tokens: int = 0,
        tokens_per_batch: int = 8192, seed: int = 0,
    ):  # fmt: skip
        backend = LocalBackend(model, tokenizer, constitution, tokens_per_batch)
        super().__init__(
            backend, constitution, min_label_mass=min_label_mass, cot_tokens=cot_tokens, votes=0, seed=seed
        )
