"""A language model as a judge, wherever it runs. Labels are scored, so no written answer has to be parsed.

    logit(a over b) = log p(" (A)" | question) - log p(" (B)" | question)      with a shown as (A), and
    logit(a over b) = log p(" (B)" | question) - log p(" (A)" | question)      with a shown as (B)

A vote is the mean of the two. Averaging the logits exactly cancels anything that favours a position: an order bias, or
a reply that says "The answer is (A)". The pair's logit is the mean of its votes, weighted by the principles' weights. A
pair has a logit only if all of its principles voted.

With `cot_tokens` the model first writes a rationale for each question, and the labels are scored after it (section 4.1
of arXiv 2212.08073).
"""

import math
import random
from collections.abc import Sequence
from typing import Protocol

from .constitution import Constitution, ModelCheck, Principle, RuleCheck
from .layouts import COMPARE_LABELS, COMPARE_LAYOUTS, WORDS, Shot, check_question, cut_at_head, defuse
from .ledger import Answer, Backend, Ledger
from .protocol import UNDECIDED, Check, Messages, Missing, Pair, Reply, Verdict, Vote, decide, sigmoid
from .rule_judge import check_rule
from .stages import seed_for


class ScoringBackend(Backend, Protocol):
    """A backend that answers three kinds of requests.

    {"prompt", "labels"}                     value {"logprobs": one per label, "mass", "kind", "slack"}
    {"prompt", "labels", "seed"}             value {"label": the index of the sampled label}, for `votes`
    {"prompt", "max_tokens", "seed"}         value {"text"}
    """

    def prompt(self, shots: Sequence[Shot], question: str, labels, rationale: str | None):
        """The prompt that a label continues. It ends with `rationale`, if there is one."""
        ...

    def ask_for_rationale(self, shots: Sequence[Shot], question: str):
        """The prompt that a rationale continues."""
        ...

    def special_tokens(self) -> Sequence[str]:
        """Strings with a meaning for the tokenizer, which must not come from a reply."""
        ...


class ModelJudge:
    """Judges through a backend, in the constitution's `layout.compare` and language, and with its few-shots.

    A principle whose check is a rule is checked by the rule. Comparisons use the principles with a `compare` text.
    min_label_mass: an answer is "unparsed" if the model gave the labels less total probability than this, because it
    did not treat the question as a choice between them.
    The few-shots use principles drawn at random, as in the paper, once for the life of the judge (seed).
    votes: samples per question; 0 scores the labels instead.
    """

    def __init__(
        self, backend: ScoringBackend, constitution: Constitution, *, min_label_mass: float, cot_tokens: int, seed: int,
        votes: int,
    ):  # fmt: skip
        self.backend, self.layout = backend, constitution.compare_layout
        self.min_label_mass, self.cot_tokens, self.seed, self.votes = min_label_mass, cot_tokens, seed, votes
        self._question, self._words = COMPARE_LAYOUTS[self.layout][0], WORDS[constitution.language]
        self._shots = self._draw_shots(constitution)

    def _draw_shots(self, constitution: Constitution) -> list[Shot]:
        principles, draw, shots = self.comparable(constitution.principles), random.Random(self.seed), []
        for shot in constitution.cot_few_shots if self.cot_tokens else constitution.compare_few_shots:
            if self.cot_tokens:  # the order is fixed, because the rationale refers to it
                replies, first = (shot["a"], shot["b"]), shot["better"] == "a"
            else:
                first = draw.random() < 0.5  # the better reply is (A) in half of them
                replies = (shot["better"], shot["worse"]) if first else (shot["worse"], shot["better"])
            if principles:
                instruction = draw.choice(principles).compare
                question = self._question(shot["conversation"], *replies, instruction, self._words)
                shots.append(Shot(question, COMPARE_LABELS[0 if first else 1], shot.get("rationale")))
        return shots

    def compare(self, pairs: Sequence[Pair], ledger: Ledger | None = None) -> list[Verdict]:
        questions = []
        for pair in pairs:
            conversation, a, b = self._defused(pair.conversation, pair.a, pair.b)
            for principle in pair.principles:
                for order, replies in (("ab", (a, b)), ("ba", (b, a))):
                    question = self._question(conversation, *replies, principle.compare, self._words)
                    questions.append((f"compare/{principle.id}/{order}", question))
        answers = iter(self._answers(questions, self._shots, COMPARE_LABELS, self.cot_tokens, ledger))
        return [self._verdict(pair, [(next(answers), next(answers)) for _ in pair.principles]) for pair in pairs]

    def _verdict(self, pair: Pair, answers: Sequence[tuple[Answer, Answer]]) -> Verdict:
        """answers: (with a first, with b first) for each principle."""
        results = [self._vote(p, ab, ba) for p, (ab, ba) in zip(pair.principles, answers, strict=True)]
        votes = tuple(r for r in results if isinstance(r, Vote))
        missing = tuple(r for r in results if isinstance(r, Missing))
        return decide(votes, missing, {p.id: p.weight for p in pair.principles})

    def _vote(self, principle: Principle, ab: Answer, ba: Answer) -> Vote | Missing:
        keys = (ab.key, ba.key)
        for status in UNDECIDED:
            for answer in (ab, ba):
                if answer.status == status:
                    return Missing(principle.id, status, answer.reason, keys)
        if reason := self._no_choice(ab) or self._no_choice(ba):
            return Missing(principle.id, "unparsed", reason, keys)
        mass = min(ab.value["mass"], ba.value["mass"])
        (ab_a, ab_b), (ba_a, ba_b) = ab.value["logprobs"], ba.value["logprobs"]
        kind, slack = ab.value["kind"], max(ab.value.get("slack", 0.0), ba.value.get("slack", 0.0))
        return Vote(principle.id, ab_a - ab_b, ba_b - ba_a, mass, kind, slack, keys)

    def _no_choice(self, answer: Answer) -> str:
        """Why an answer does not choose between the labels; "" if it does. NaN is no evidence, for or against."""
        mass, (first, second) = answer.value["mass"], answer.value["logprobs"]
        if math.isnan(first - second):
            return f"the labels have log-probabilities {first}, {second}"
        return "" if mass >= self.min_label_mass else f"label mass {mass:.3g} is below {self.min_label_mass}"

    def check(self, replies: Sequence[Reply], ledger: Ledger | None = None) -> list[list[Check]]:
        """Rules run here. For a question, P(violated) is the probability of the answer in `violation_if`."""
        questions = []
        for conversation, reply, principles in replies:
            conversation, reply = self._defused(conversation, reply)
            questions += [
                (f"check/{p.id}", check_question(conversation, reply, p.check.ask, self._words))
                for p in principles
                if isinstance(p.check, ModelCheck)
            ]
        answers = iter(self._answers(questions, [], self._words.check_labels, 0, ledger))
        return [
            [
                check_rule(p, r.conversation, r.reply)
                if isinstance(p.check, RuleCheck)
                else self._check(p, next(answers))
                for p in r.principles
            ]
            for r in replies
        ]

    def _check(self, principle: Principle, answer: Answer) -> Check:
        if answer.status != "ok":
            return Check(principle.id, None, None, answer.status, f"{principle.id}: {answer.reason}")
        if reason := self._no_choice(answer):
            return Check(principle.id, None, None, "unparsed", f"{principle.id}: {reason}")
        yes, no = answer.value["logprobs"]
        violation = sigmoid(yes - no if principle.check.violation_if == "yes" else no - yes)
        return Check(principle.id, 1 - violation, violation < principle.check.threshold)

    def _answers(self, questions, shots, labels, cot_tokens: int, ledger: Ledger | None) -> list[Answer]:
        ledger = ledger or Ledger(None)
        rationales: list[Answer | None] = [None] * len(questions)
        if cot_tokens:
            rationales = ledger.ask(self.backend, [
                {"prompt": self.backend.ask_for_rationale(shots, question), "max_tokens": cot_tokens,
                 "seed": seed_for(self.seed, question), "layout": self.layout, "about": f"rationale/{about}"}
                for about, question in questions
            ])  # fmt: skip
        asked = [i for i, r in enumerate(rationales) if r is None or r.status == "ok"]
        texts = {i: cut_at_head(rationales[i].value["text"]) for i in asked if rationales[i]}
        requests = [
            {"prompt": self.backend.prompt(shots, questions[i][1], labels, texts.get(i)),
             "labels": list(labels), "layout": self.layout, "about": questions[i][0]} for i in asked
        ]  # fmt: skip
        if self.votes:
            cast = [{**r, "seed": seed_for(self.seed, r["prompt"], k)} for r in requests for k in range(self.votes)]
            ballots = ledger.ask(self.backend, cast)
            scores = [_counted(ballots[k : k + self.votes]) for k in range(0, len(ballots), self.votes)]
        else:
            scores = ledger.ask(self.backend, requests)
        answers = list(rationales)
        for i, score in zip(asked, scores, strict=True):
            answers[i] = score
        return answers

    def _defused(self, conversation: Messages, *replies: str) -> tuple:
        special = self.backend.special_tokens()
        safe = [{**m, "content": defuse(m["content"], special)} for m in conversation]
        return safe, *(defuse(reply, special) for reply in replies)

    def comparable(self, principles: Sequence[Principle]) -> list[Principle]:
        """The principles with a `compare` text and a weight above 0."""
        return [p for p in principles if p.compare and p.weight > 0]

    def describe(self) -> dict:
        """JSON-ready provenance, stored with every label."""
        return {
            **self.backend.describe(),
            "combine": "logit",
            "layout": self.layout,
            "few_shots": len(self._shots),
            "min_label_mass": self.min_label_mass,
            "cot_tokens": self.cot_tokens,
            "seed": self.seed,
        }


def _counted(answers: Sequence[Answer]) -> Answer:
    """k samples of one question -> its answer. P = (n_A + 1/2) / (n + 1), where n samples chose a label."""
    counts = [sum(a.status == "ok" and a.value["label"] == i for a in answers) for i in (0, 1)]
    n = sum(counts)
    others = [a for a in answers if a.status != "ok"]
    if failed := [a for a in others if a.status == "failed"]:
        return failed[0]  # a vote that was not cast is not the judge's answer
    if not n:
        return others[0]
    logprobs = [math.log((c + 0.5) / (n + 1)) for c in counts]
    value = {"logprobs": logprobs, "mass": n / len(answers), "kind": "votes", "counts": counts}
    return Answer("ok", value, key="+".join(a.key for a in answers))
