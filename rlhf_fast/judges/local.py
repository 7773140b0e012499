"""A `transformers` causal language model as a judge. It writes nothing that must be parsed: the labels are scored.

    logit(a over b) = log p(" (A)" | question) - log p(" (B)" | question)      with a shown as (A), and
    logit(a over b) = log p(" (B)" | question) - log p(" (A)" | question)      with a shown as (B)

A vote is the mean of the two. Averaging logits cancels an order bias that is added to them exactly; averaging
probabilities only shrinks it. The pair's logit is the mean of its votes, weighted by the principles' weights.
"""

import math
import random
from collections.abc import Sequence

from ..models import check_lm_head
from ..rollout import evaluating
from .constitution import Constitution, ModelCheck, Principle, RuleCheck
from .generator import describe_model
from .layouts import CHECK_LABELS, COMPARE_LABELS, COMPARE_LAYOUTS, check_question
from .protocol import Check, Pair, Reply, Verdict, Vote
from .rule_judge import check_rule
from .scoring import encode, label_logprobs


class LocalJudge:
    """Judges with one model, in the constitution's `layout.compare` and with its few-shots.

    A principle whose check is a rule is checked by the rule; comparisons use the principles with a `compare` text.
    min_label_mass: an answer on which the model put less probability than this is "unparsed": it did not take the
    question for a choice between the labels. tokens_per_batch bounds rows times columns of one forward pass.
    The few-shots are shown under principles drawn at random, as in the paper, once for the life of the judge (seed).
    """

    def __init__(
        self,
        model,
        tokenizer,
        constitution: Constitution,
        *,
        min_label_mass: float = 0.1,
        tokens_per_batch: int = 8192,
        seed: int = 0,
    ):
        check_lm_head(model)
        self.model, self.tokenizer, self.layout = model, tokenizer, constitution.compare_layout
        self.min_label_mass, self.tokens_per_batch, self.seed = min_label_mass, tokens_per_batch, seed
        self._question, self._prompt = COMPARE_LAYOUTS[self.layout]
        self._shots = self._draw_shots(constitution)

    def _draw_shots(self, constitution: Constitution) -> list[tuple[str, str]]:
        principles = self.comparable(constitution.principles)
        draw = random.Random(self.seed)
        shots = []
        for shot in constitution.compare_few_shots if principles else ():
            first = draw.random() < 0.5  # the better reply is (A) in half of them
            replies = (shot["better"], shot["worse"]) if first else (shot["worse"], shot["better"])
            question = self._question(shot["conversation"], *replies, draw.choice(principles).compare)
            shots.append((question, COMPARE_LABELS[0 if first else 1]))
        return shots

    def compare(self, pairs: Sequence[Pair]) -> list[Verdict]:
        prompts = [
            self._prompt(self.tokenizer, self._shots, self._question(pair.conversation, *replies, principle.compare))
            for pair in pairs
            for principle in pair.principles
            for replies in ((pair.a, pair.b), (pair.b, pair.a))
        ]
        scores = iter(self._score(prompts, COMPARE_LABELS))
        return [self._verdict(pair, [(next(scores), next(scores)) for _ in pair.principles]) for pair in pairs]

    def _verdict(self, pair: Pair, scores: list[tuple]) -> Verdict:
        """scores: one ((log p(A), log p(B)) with a first, the same with b first) a principle; None is too long."""
        if any(order is None for both in scores for order in both):
            return Verdict("too_long", reason=f"a question is longer than {self._max_length()} tokens")
        votes = tuple(
            Vote(p.id, ab[0] - ab[1], ba[1] - ba[0], sum(map(math.exp, (*ab, *ba))) / 2)
            for p, (ab, ba) in zip(pair.principles, scores, strict=True)
        )
        weights = [p.weight for p in pair.principles]
        logit = sum(w * v.logit for w, v in zip(weights, votes, strict=True)) / sum(weights)
        mass = sum(v.label_mass for v in votes) / len(votes)
        if mass < self.min_label_mass:
            return Verdict("unparsed", logit, votes, f"label mass {mass:.3g} is below {self.min_label_mass}")
        return Verdict("ok", logit, votes)

    def check(self, replies: Sequence[Reply]) -> list[list[Check]]:
        asked = [(r, p) for r in replies for p in r.principles if isinstance(p.check, ModelCheck)]
        prompts = [
            self._prompt(self.tokenizer, [], check_question(r.conversation, r.reply, p.check.ask)) for r, p in asked
        ]
        scores = iter(self._score(prompts, CHECK_LABELS))
        return [
            [
                check_rule(p, r.conversation, r.reply)
                if isinstance(p.check, RuleCheck)
                else self._check(p, next(scores))
                for p in r.principles
            ]
            for r in replies
        ]

    def _check(self, principle: Principle, score: tuple[float, ...] | None) -> Check:
        if score is None:
            reason = f"{principle.id}: the question is longer than {self._max_length()} tokens"
            return Check(principle.id, None, None, "too_long", reason)
        yes, no = map(math.exp, score)
        if yes + no < self.min_label_mass:
            reason = f"{principle.id}: label mass {yes + no:.3g} is below {self.min_label_mass}"
            return Check(principle.id, None, None, "unparsed", reason)
        violation = (yes if principle.check.violation_if == "yes" else no) / (yes + no)
        return Check(principle.id, 1 - violation, violation < principle.check.threshold)

    def comparable(self, principles: Sequence[Principle]) -> list[Principle]:
        """Those with a `compare` text."""
        return [p for p in principles if p.compare and p.weight > 0]

    def describe(self) -> dict:
        """JSON-ready provenance, stored with every label."""
        return {
            "backend": "local",
            **describe_model(self.model),
            "layout": self.layout,
            "few_shots": len(self._shots),
            "min_label_mass": self.min_label_mass,
            "seed": self.seed,
        }

    def _max_length(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    def _score(self, prompts: Sequence[str], labels: Sequence[str]) -> list[tuple[float, ...] | None]:
        special = self.layout != "chat"  # a chat template brings its own
        encoded = [[encode(self.tokenizer, prompt + label, special) for label in labels] for prompt in prompts]
        longest = self._max_length() or math.inf
        fits = [i for i, rows in enumerate(encoded) if max(map(len, rows)) <= longest]
        with evaluating(self.model):
            known = iter(label_logprobs(self.model, [encoded[i] for i in fits], self.tokens_per_batch))
        scores: list[tuple[float, ...] | None] = [None] * len(prompts)
        for i in fits:
            scores[i] = next(known)
        return scores
