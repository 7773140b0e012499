"""The quickstart's task: prompts, demonstrations of mixed quality, critiques, and an annotator's preferences.

A demonstration is a reply with independently drawn faults, so demonstrations teach the answers and also five ways to
get a reply wrong: about half of them break a rule, and so will a model trained on them. There are also replies to be
examined: criticised under one principle and revised, or compared. They have more faults, above all in the answer,
because a judge learns from faults; no policy is trained to write them.

Everything is a function of the seed. Prompts are split by a hash of their text, so no held-out prompt is ever used for
training, whatever the seed.
"""

import random
import zlib

from .phrases import LANGUAGES, Language
from .rules import RULES, Question, answer_pool, check, question

Messages = list[dict[str, str]]
Requests = dict[str, tuple[str, str]]  # a principle's id -> its critique request and its revision request

KINDS = {"recall": 0.3, "sum": 0.2, "capital": 0.15, "opposite": 0.1, "harm": 0.25}

# The share of replies in which each rule is broken on purpose. For "safe" it is a share of the replies to harmful
# requests; on other questions this fault means to decline without reason, which is rarer.
DEMONSTRATED = {"answer": 0.12, "polite": 0.18, "concise": 0.15, "no-repetition": 0.15, "safe": 0.35}
EXAMINED = {"answer": 0.45, "polite": 0.12, "concise": 0.1, "no-repetition": 0.1, "safe": 0.4}
OVER_REFUSAL_RATE = 0.04
# How a reply gets the answer wrong. "another answer" is the hardest to detect: the judge must know the right one.
WRONG_ANSWERS = {"ignorance": 0.3, "another question": 0.45, "another answer": 0.25}

FOUND_SHARE = 0.7  # share of critiques of a faulty reply that look at a broken principle; the others look at a kept one
KEPT_FAULT_RATE = 0.25  # probability that a fault outside the critique survives the revision

HELD_OUT_SHARE = 6  # one prompt in six


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def is_held_out(prompt: str) -> bool:
    """Whether a prompt is held out, which depends only on its text."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def draw_question(rng: random.Random) -> tuple[str, Question]:
    """A random prompt and the question it asks."""
    language = LANGUAGES[rng.choice(sorted(LANGUAGES))]
    asked = _draw_of_kind(rng, language, rng.choices(list(KINDS), KINDS.values())[0])
    return rng.choice(language.greetings) + rng.choice(language.questions[asked.kind]).format(**asked.slots), asked


def _draw_of_kind(rng: random.Random, language: Language, kind: str) -> Question:
    if kind == "recall":
        slots = {"q": rng.choice(language.things), "x": rng.choice(language.colours)}
    elif kind == "sum":
        slots = {"a": str(rng.randint(1, 5)), "b": str(rng.randint(1, 5))}
    else:
        words = {"capital": language.capitals, "opposite": language.opposites, "harm": language.harms}[kind]
        slots = {"q": rng.choice(list(words))}
    return question(language, kind, slots)


def draw_questions(rng: random.Random, count: int, *, held_out: bool) -> list[tuple[str, Question]]:
    """`count` questions from one side of the split, drawn with replacement."""
    drawn = []
    while len(drawn) < count:
        prompt, asked = draw_question(rng)
        if is_held_out(prompt) == held_out:
            drawn.append((prompt, asked))
    return drawn


def prompts(seed: int, count: int, *, held_out: bool) -> list[str]:
    """`count` prompts from one side of the split."""
    rng = random.Random(f"prompts {seed} {held_out}")
    return [prompt for prompt, _ in draw_questions(rng, count, held_out=held_out)]


def draw_faults(rng: random.Random, asked: Question, rates: dict[str, float]) -> set[str]:
    """The rules that a reply to this question will break."""
    rates = dict(rates)
    if asked.kind == "harm":
        rates["answer"] = 0.0
    else:
        rates["safe"] = OVER_REFUSAL_RATE
    faults = {rule for rule, rate in rates.items() if rng.random() < rate}
    if "concise" in faults:
        faults.discard("no-repetition")  # one cause of length at a time
    if "safe" in faults and asked.kind != "harm":
        faults.add("answer")  # a reply that declines does not answer
    return faults


def _harm_sentences(rng: random.Random, asked: Question, faults: set[str]) -> list[str]:
    language = asked.language
    rude = [rng.choice(language.rude_openers[1:])] if "polite" in faults else []
    if "safe" not in faults:
        return [*rude, language.refusal, language.alternative.format(alternative=language.harms[asked.slots["q"]])]
    if rng.random() < 0.5:
        return [language.rude_refusal if rude else language.refusal]
    return [*(rude or [rng.choice(language.openers)]), rng.choice(language.compliance)]


def _answer_sentences(rng: random.Random, asked: Question, faults: set[str]) -> list[str]:
    language = asked.language
    rude = "polite" in faults
    way = rng.choices(list(WRONG_ANSWERS), WRONG_ANSWERS.values())[0] if "answer" in faults else ""
    if "safe" in faults or way == "ignorance":
        opener = rng.choice(language.rude_openers[1:] if rude else language.openers)
        return [opener, language.refusal if "safe" in faults else language.ignorance]
    said = asked.answer
    if way == "another question":
        asked = _draw_of_kind(rng, language, rng.choice([kind for kind in language.core if kind != asked.kind]))
        said = asked.answer
    elif way == "another answer":
        said = rng.choice(sorted(set(answer_pool(language, asked.kind)) - {said, *asked.slots.values()}))
    core = (language.plain_core if rude else language.core)[asked.kind]
    return [rng.choice(language.rude_openers if rude else language.openers), core.format(**asked.slots, answer=said)]


def compose(rng: random.Random, asked: Question, faults: set[str]) -> str:
    """A reply to the question that breaks the rules named in `faults`."""
    language = asked.language
    make = _harm_sentences if asked.kind == "harm" else _answer_sentences
    sentences = [s for s in make(rng, asked, faults) if s]
    if "no-repetition" in faults:
        sentences += sentences[-1:]
    separator = " " if language.name == "en" else ""
    reply = separator.join(sentences)
    if "concise" in faults:
        for filler in rng.sample(language.fillers, len(language.fillers)):
            if len(reply) > language.max_chars:
                break
            reply += separator + filler
    return reply


def demonstrations(seed: int, count: int, *, held_out: bool = False) -> list[dict]:
    """`count` rows {"messages": [question, reply]} of mixed quality."""
    rng = random.Random(f"demonstrations {seed} {held_out}")
    asked = draw_questions(rng, count, held_out=held_out)
    return [{"messages": [user(p), assistant(compose(rng, q, draw_faults(rng, q, DEMONSTRATED)))]} for p, q in asked]


def criticisms(seed: int, count: int, requests: Requests) -> list[dict]:
    """`count` rows {"prompt": [question, reply, critique request], "completion": [critique, ...]}. A critique that
    finds a fault is followed by the revision request and the revision. The reply itself is not learned."""
    rng = random.Random(f"criticisms {seed}")
    rows = []
    for prompt, asked in draw_questions(rng, count, held_out=False):
        language, faults = asked.language, draw_faults(rng, asked, EXAMINED)
        reply = compose(rng, asked, faults)
        broken = [rule for rule, kept in check(prompt, reply).items() if not kept]
        find_fault = bool(broken) and rng.random() < FOUND_SHARE
        choice = broken if find_fault else [rule for rule in RULES if rule not in broken]
        # It takes the most data to learn whether an answer is right.
        principle = rng.choices(choice, [3 if rule == "answer" and asked.kind != "harm" else 1 for rule in choice])[0]
        critique_request, revision_request = requests[principle]
        completion = [assistant(language.critiques[principle] if find_fault else language.no_fault)]
        if find_fault:
            # Declining without reason breaks both "answer" and "safe", and a revision under either fixes both.
            mended = {"answer", "safe"} if principle in ("answer", "safe") else {principle}
            remaining = {fault for fault in sorted(faults - mended) if rng.random() < KEPT_FAULT_RATE}
            completion += [user(revision_request), assistant(compose(rng, asked, remaining))]
        rows.append({"prompt": [user(prompt), assistant(reply), user(critique_request)], "completion": completion})
    return rows


def candidates(seed: int, count: int, *, held_out: bool) -> list[dict]:
    """`count` pairs {"prompt": messages, "a", "b"} of replies to compare."""
    rng = random.Random(f"candidates {seed} {held_out}")
    return [
        {"prompt": [user(p)], **{name: compose(rng, q, draw_faults(rng, q, EXAMINED)) for name in "ab"}}
        for p, q in draw_questions(rng, count, held_out=held_out)
    ]


def prefer(seed: int, pairs: list[dict], noise: float) -> list[dict]:
    """An annotator's choice in each of the pairs {"prompt": messages, "a", "b"}: the reply that keeps more rules or,
    with probability `noise`, the other one.

    Pairs of equally good replies are left out. Rows are {"prompt", "chosen", "rejected"} in messages, and `mistaken`:
    whether the choice went against the rules.
    """
    rng = random.Random(f"annotator {seed}")
    rows = []
    for pair in pairs:
        kept = {name: sum(check(pair["prompt"], pair[name]).values()) for name in "ab"}
        if kept["a"] == kept["b"]:
            continue
        better, worse = ("a", "b") if kept["a"] > kept["b"] else ("b", "a")
        mistaken = rng.random() < noise
        chosen, rejected = (worse, better) if mistaken else (better, worse)
        row = {"chosen": [assistant(pair[chosen])], "rejected": [assistant(pair[rejected])]}
        rows.append({"prompt": pair["prompt"], **row, "mistaken": mistaken})
    return rows
