"""An OpenAI-compatible server as a judge and as a generator (server.py makes the calls, model_judge.py judges).

The judge tries at its creation what the server supports, the best mode first, and never changes the mode during a run:

    echo         /completions with the prompt echoed: the exact log-probability of each whole label
    top_k        /completions, log-probabilities of the k likeliest first tokens
    chat         /chat/completions, the same with at most 20
    systemone    /systemone of `transformers serve`: probabilities of the labels, which add up to 1 by construction
    votes        /chat/completions, k samples per question; P = (n_A + 1/2) / (n + 1), where n of them are valid. Only
                 on request

A label that is not among the k likeliest tokens has no log-probability, but its probability is at most u, the mass that
those tokens leave over. (The least likely of them bounds a single token only, and a label may consist of several.) We
set it to u, the value that moves P least from 1/2. `slack` is the largest possible error of P; if it exceeds max_slack,
the answer is unparsed. A reply without log-probabilities is a failed try, not a vote.
"""

import json
import math
import re
from collections.abc import Sequence

from ..disk import json_line
from ..errors import ConfigError
from .constitution import Constitution
from .layouts import COMPARE_LABELS, WORDS, text_prompt
from .ledger import Answer, Call, Ledger, Tries
from .model_judge import ModelJudge
from .scoring import common_prefix
from .server import Server, Unreadable, short

MODES = ("echo", "top_k", "chat", "systemone", "votes")

_ROUNDING = 0.01  # how far above 0 a log-probability may be
_REFUSAL = re.compile(
    r"\b(?:I|we) (?:can ?not|can't|can’t|won't|am unable|must decline)|\bI'm (?:sorry|unable)|申し訳|お答えできません",
    re.I,
)


class HTTPBackend:
    """Scores or samples labels through a server in `mode`. `found` has the result of each mode that was tried."""

    def __init__(
        self, server: Server, constitution: Constitution, *, mode: str, votes: int, vote_tokens: int, top_k: int,
        max_slack: float,
    ):  # fmt: skip
        if mode not in ("auto", *MODES):
            raise ConfigError(f"HTTPJudge: mode = {mode!r}, needs auto or one of {', '.join(MODES)}")
        if (mode == "votes") != (votes > 0):
            raise ConfigError(
                f"HTTPJudge: votes = {votes} and mode = {mode!r} do not go together: mode: votes needs votes: 1 or "
                "more samples per question, every other mode needs votes: 0"
            )
        self.server, self.words = server, WORDS[constitution.language]
        self.votes, self.vote_tokens = votes, vote_tokens
        self.top_k, self.max_slack = top_k, max_slack
        self.calls: list[Call] = []  # of the probe, until there is a ledger to record them
        texts = [] if constitution.compare_layout == "chat" else ["echo", "top_k"]
        self.mode, self.found = self._probe([*texts, "chat", "systemone"] if mode == "auto" else [mode])

    def _probe(self, wanted: Sequence[str]) -> tuple[str, dict[str, str]]:
        """(the first mode that works, the result of each mode that was tried)."""
        question = "\n\nWhich letter comes first in the alphabet?\n (A) A\n (B) B"
        found = {}
        for name in wanted:
            self.mode = name
            labels = list(COMPARE_LABELS)
            prompt = self.prompt([], question, labels, None)
            request = {"prompt": prompt, "labels": labels, "about": f"probe/{name}"}
            self.calls += self.server.probe(request, self._send, self._read)
            answer, code = self.calls[-1].answer, self.calls[-1].about.get("http_status")
            if answer.status == "ok" or (name == "votes" and code == 200 and answer.status != "failed"):
                return name, {**found, name: "yes"}
            if code is None:
                raise ConfigError(f"{self.server.base_url} cannot be reached: {answer.reason}")
            if code in (401, 429) or code > 501:  # llama.cpp answers 500 or 501 to a mode that it does not have
                raise ConfigError(f"{self.server.base_url}: {answer.reason}")
            found[name] = answer.reason
        if self.mode == "votes":
            raise ConfigError(
                f"{self.server.base_url} does not answer for {self.server.model!r}: {found['votes']}. The server "
                "option extra_body adds fields to every request, or removes them"
            )
        told = "; ".join(f"{name}: {reason}" for name, reason in found.items())
        raise ConfigError(
            f"{self.server.base_url} gives no log-probabilities for {self.server.model!r} ({told}). With mode: votes "
            "and, for example, votes: 8, labels are counted from samples; this is coarser and makes that many calls "
            "per question"
        )

    def describe(self) -> dict:
        counted = {"votes": self.votes, "vote_tokens": self.vote_tokens} if self.votes else {}
        return self.server.describe() | {"mode": self.mode, "top_k": self.top_k, "max_slack": self.max_slack} | counted

    def special_tokens(self) -> Sequence[str]:
        return ()  # the server's tokenizer is unknown; `defuse` knows the common tokens

    def prompt(self, shots, question: str, labels, rationale: str | None):
        """Text for /completions. Messages for the other modes, which ask for the letter only."""
        if self.mode in ("echo", "top_k"):
            # top_k sees only the first token, so the prompt must end right before the letter.
            begun = " (" if self.mode == "top_k" and all(label.startswith(" (") for label in labels) else ""
            return text_prompt(None, shots, question, rationale, words=self.words) + begun
        only = self.words.only.format(*map(_bare, labels))
        if rationale is not None:
            return [*self.ask_for_rationale(shots, question), _assistant(rationale), _user(only)]
        messages = []
        for shot in shots:
            messages += [_user(f"{shot.question.strip()}\n\n{only}"), _assistant(_bare(shot.label))]
        return [*messages, _user(f"{question.strip()}\n\n{only}")]

    def ask_for_rationale(self, shots, question: str):
        if self.mode in ("echo", "top_k"):
            return text_prompt(None, shots, question, asking=True, words=self.words)
        messages = []
        for shot in shots:
            only = self.words.only.format(*map(_bare, COMPARE_LABELS))
            messages += [_user(f"{shot.question.strip()}\n\n{self.words.think}"), _assistant(shot.rationale)]
            messages += [_user(only), _assistant(_bare(shot.label))]
        return [*messages, _user(f"{question.strip()}\n\n{self.words.think}")]

    def answer(self, requests: Sequence[dict], tries: Tries) -> None:
        self.server.call_all(requests, tries, self._send, self._read)

    # -- one request, in each of the modes --

    def _send(self, request: dict) -> tuple[str, dict]:
        prompt = request["prompt"]
        if "labels" not in request:
            return _text_call(prompt, request["max_tokens"], temperature=0, seed=request["seed"])
        if self.mode == "echo":
            return "/completions", {"prompt": [prompt + label for label in request["labels"]], "echo": True,
                                    "max_tokens": 1, "logprobs": 1, "temperature": 0}  # fmt: skip
        if self.mode == "top_k":
            return "/completions", {"prompt": prompt, "max_tokens": 1, "logprobs": self.top_k, "temperature": 0}
        if self.mode == "chat":
            # The second token distinguishes a label from "A better reply", which begins with one.
            return "/chat/completions", {"messages": prompt, "max_tokens": 2, "temperature": 0, "logprobs": True,
                                         "top_logprobs": min(self.top_k, 20)}  # fmt: skip
        if self.mode == "systemone":
            criteria = {_bare(label): label.strip() for label in request["labels"]}
            question = {"type": "choice", "instructions": self.words.choose, "criteria": criteria}
            state = "\n\n".join(m["content"] for m in prompt)
            return "/systemone", {"state": state, "questions": {"answer": question}}
        return "/chat/completions", {"messages": prompt, "max_tokens": self.vote_tokens, "temperature": 1.0,
                                     "seed": request.get("seed", 0) % 2**31}  # fmt: skip

    def _read(self, request: dict, reply: dict) -> Answer:
        if "labels" not in request:
            return read_text(reply)
        labels = request["labels"]
        if self.mode == "systemone":
            return _read_systemone(labels, reply)
        if self.mode == "echo":
            return _read_echo(labels, reply)
        if self.mode == "votes":
            return _read_vote(labels, reply)
        return _read_top(labels, reply, self.max_slack)


class HTTPJudge(ModelJudge):
    """Judges through a server. mode "auto" uses the best mode that gives log-probabilities, and refuses a server
    without them.

    votes: samples per question, for mode "votes". vote_tokens: the maximum length of a sample. top_k: how many tokens
    to request if the mode has such a number; the OpenAI API allows 5 for top_k and 20 for chat. max_slack: see the
    module's docstring. The other arguments are those of `ModelJudge`.
    """

    def __init__(
        self, server: Server, constitution: Constitution, *, mode: str = "auto", votes: int = 0, vote_tokens: int = 16,
        top_k: int = 20, max_slack: float = 0.05, min_label_mass: float = 0.1, cot_tokens: int = 0, seed: int = 0,
    ):  # fmt: skip
        backend = HTTPBackend(
            server, constitution, mode=mode, votes=votes, vote_tokens=vote_tokens, top_k=top_k, max_slack=max_slack
        )
        super().__init__(
            backend, constitution, min_label_mass=min_label_mass, cot_tokens=cot_tokens, votes=votes, seed=seed
        )

    def _answers(self, questions, shots, labels, cot_tokens: int, ledger: Ledger | None) -> list[Answer]:
        if ledger:
            ledger.note(self.backend, self.backend.calls)
            self.backend.calls = []
        return super()._answers(questions, shots, labels, cot_tokens, ledger)


class HTTPGenerator:
    """A server as a generator, for `revise` and `sample_pairs`. temperature 0 takes the most likely token."""

    def __init__(self, server: Server, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0):
        self.server, self.sampling = server, {"temperature": temperature, "top_p": top_p}
        self.max_new_tokens = max_new_tokens

    def describe(self) -> dict:
        """JSON-ready provenance, stored in run.json."""
        return {**self.server.describe(), "max_new_tokens": self.max_new_tokens, **self.sampling}

    def answer(self, requests: Sequence[dict], tries: Tries) -> None:
        """Requests {"prompt", "seed"} -> {"text"}; text prompts go to /completions, messages to /chat/completions."""

        def send(request: dict) -> tuple[str, dict]:
            return _text_call(request["prompt"], self.max_new_tokens, seed=request["seed"], **self.sampling)

        try:
            self.server.call_all(requests, tries, send, lambda request, reply: read_text(reply))
        except ConfigError as error:
            if re.search(r"HTTP 40[45] from /completions", str(error)):
                raise ConfigError(
                    f"{error}. Under the constitution's layout {{critique: anthropic}} prompts are text, for "
                    "/completions; under {critique: chat} they are messages, for /chat/completions"
                ) from None
            raise


def _text_call(prompt, max_tokens: int, *, seed: int, **sampling) -> tuple[str, dict]:
    body = {"max_tokens": max_tokens, "seed": seed % 2**31, **sampling}
    if isinstance(prompt, str):
        return "/completions", {"prompt": prompt, **body}
    messages = json.loads(json_line(prompt))  # a date in a key of a message becomes text, as in the files of the stage
    return "/chat/completions", {"messages": messages, **body}


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _bare(label: str) -> str:
    return label.strip(" ()")


# -- what comes back --


def _choice(reply: dict, number: int = 0) -> dict:
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) <= number:
        raise Unreadable("the reply has no choices")
    return choices[number]


def read_text(reply: dict) -> Answer:
    """{"text", "finish_reason"} of a chat or text completion."""
    choice = _choice(reply)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if choice.get("finish_reason") == "content_filter":
        return Answer("refused", reason="content filter")
    if isinstance(message, dict) and message.get("refusal"):
        return Answer("refused", reason=short(str(message["refusal"])))
    if not isinstance(text, str):
        raise Unreadable("the reply has no text")
    return Answer("ok", {"text": text, "finish_reason": choice.get("finish_reason")})


def _read_vote(labels: Sequence[str], reply: dict) -> Answer:
    """{"label": index}, if the text is one of the labels and nothing else."""
    answer = read_text(reply)
    if answer.status != "ok":
        return answer
    text = answer.value["text"]
    said = re.sub(r"[\W_]+", " ", text).strip().casefold().removeprefix("the answer is").strip()
    bare = [_bare(label).casefold() for label in labels]
    if said in bare:
        return Answer("ok", {"label": bare.index(said)})
    status = "refused" if _REFUSAL.search(text) else "unparsed"
    return Answer(status, reason=f"answered {text[:200]!r}")


def _read_echo(labels: Sequence[str], reply: dict) -> Answer:
    """Sums the log-probabilities after the tokens that all the echoed texts have in common."""
    rows = []
    for number, label in enumerate(labels):
        got = _choice(reply, number).get("logprobs") or {}
        tokens, scores = got.get("tokens"), got.get("token_logprobs")
        if not tokens or not scores or len(tokens) != len(scores):
            raise Unreadable("no log-probabilities of the echoed prompt")
        # The last token, if there is one, was generated and not echoed. Offsets do not help: some count a bos token.
        keep = next((n for n in (len(tokens) - 1, len(tokens)) if "".join(tokens[:n]).endswith(label.strip())), 0)
        if not keep:
            raise Unreadable("the prompt was not echoed")
        rows.append((tokens[:keep], scores[:keep]))
    same = common_prefix([tokens for tokens, _ in rows])
    tails = [scores[same:] for _, scores in rows]
    if any(not tail or None in tail for tail in tails):
        raise Unreadable("the labels have no log-probabilities of their own")
    logprobs = [float(sum(tail)) for tail in tails]
    if not all(map(math.isfinite, logprobs)) or max(logprobs) > _ROUNDING:
        raise Unreadable(f"{logprobs} are no log-probabilities")
    return Answer("ok", {"logprobs": logprobs, "mass": min(sum(map(math.exp, logprobs)), 1.0), "kind": "exact"})


def _read_top(labels: Sequence[str], reply: dict, max_slack: float) -> Answer:
    """The likeliest alternatives of the first token. All spellings of a label ("A", " A", "(A") count as that label."""
    choice = _choice(reply)
    message = choice.get("message") or {}
    if choice.get("finish_reason") == "content_filter" or message.get("refusal"):
        return Answer("refused", reason="content filter or refusal")
    top = _top_of(choice)
    bare = [_bare(label) for label in labels]

    def written(word: str) -> list[bool]:
        return [word == label or (len(label) > 1 and word.casefold() == label.casefold()) for label in bare]

    begun = re.match(r"\W*(\w+)\W+\w", message.get("content") or "")
    if begun and any(written(begun[1])):
        return Answer("unparsed", reason=f"began {short(message['content'])!r}, although only a label was asked for")
    seen = [0.0] * len(labels)
    for token, logprob in top.items():
        for i, is_label in enumerate(written(token.strip(" \n(\"'*▁Ġ").rstrip(")\"'*.:"))):
            seen[i] += math.exp(logprob) if is_label else 0.0
    if not any(seen):
        likeliest = max(top, key=top.get)
        return Answer(
            "unparsed", reason=f"neither label is among the {len(top)} likeliest; {short(likeliest)!r} is the first"
        )
    unseen = max(1 - sum(map(math.exp, top.values())), 1e-12)
    mass, slack, kind = sum(seen), 0.0, "exact"
    if not all(seen):
        kind, slack = "top_k", unseen / (mass + unseen)
        seen = [p or unseen for p in seen]
        if slack > max_slack:
            reason = f"one label is not among the {len(top)} likeliest, so P is known only to within {slack:.3g}"
            return Answer("unparsed", reason=reason)
    return Answer("ok", {"logprobs": list(map(math.log, seen)), "mass": min(mass, 1.0), "kind": kind, "slack": slack})


def _top_of(choice: dict) -> dict[str, float]:
    """token -> log-probability at the first position, from the form of either API."""
    got = choice.get("logprobs") or {}
    if got.get("content"):
        pairs = [(t.get("token"), t.get("logprob")) for t in got["content"][0].get("top_logprobs") or []]
    else:
        first = (got.get("top_logprobs") or [None])[0]
        pairs = list(first.items()) if isinstance(first, dict) else []
    top: dict[str, float] = {}
    for token, logprob in pairs:
        if isinstance(token, str) and isinstance(logprob, (int, float)) and not math.isnan(logprob):
            top[token] = max(top.get(token, -math.inf), float(logprob))
    if max(top.values(), default=0.0) > _ROUNDING:
        raise Unreadable(f"a log-probability of {max(top.values())} is none")
    if len(top) < 2:
        raise Unreadable("no log-probabilities in the reply")
    return top


def _read_systemone(labels: Sequence[str], reply: dict) -> Answer:
    try:
        probabilities = reply["answers"]["answer"]["probabilities"]
        values = [float(probabilities[_bare(label)]) for label in labels]
    except (KeyError, TypeError, ValueError):
        raise Unreadable("no probabilities in the reply") from None
    if not all(0 < p <= 1 for p in values):
        raise Unreadable(f"probabilities {values} have no logarithms")
    return Answer("ok", {"logprobs": list(map(math.log, values)), "mass": 1.0, "kind": "normalised"})
