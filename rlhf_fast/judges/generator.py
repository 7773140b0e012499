"""Generators, such as a language model, and the requests of phase 1 that are put to them.

A generator is any function (prompts, seeds) -> texts. A prompt is a string or messages, and a text that was stopped at
the length limit is a `Cut`. A seed is a function of (run seed, item, purpose), so no text depends on the rest of its
batch.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.chat import encode_prompt
from ..errors import ConfigError
from ..generation import generate_answers
from ..models import learned_positions, positions_of
from .constitution import Constitution, Principle
from .layouts import CRITIQUE_LAYOUTS, Turn
from .ledger import Answer, Ledger, Tries
from .protocol import Messages
from .stages import seed_for

Generate = Callable[[Sequence[str | Messages], Sequence[int]], list[str]]


class Cut(str):
    """A text that was stopped at the generator's length limit."""


@dataclass
class TextGenerator:
    """A causal language model of `transformers` as a generator. temperature 0 takes the most likely token. bf16: the
    model multiplies in bfloat16."""

    model: object
    tokenizer: object
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 128
    bf16: bool = False

    def __call__(self, prompts: Sequence[str | Messages], seeds: Sequence[int]) -> list[str]:
        texts, cut = generate_answers(
            self.model, self.tokenizer, prompts, seeds, max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0, temperature=self.temperature or 1.0, top_p=self.top_p,
            batch_size=self.batch_size, bf16=self.bf16,
        )  # fmt: skip
        return [Cut(text) if is_cut else text for text, is_cut in zip(texts, cut, strict=True)]

    def answer(self, requests: Sequence[dict], tries: Tries) -> None:
        """Requests {"prompt", "seed"} -> {"text"}; "too_long" if the model has no positions for max_new_tokens, also if
        they are rotary and it could go on: it was not trained beyond max_position_embeddings."""
        positions = learned_positions(self.model) or positions_of(self.model.config)
        reason = f"the prompt and an answer of {self.max_new_tokens} tokens are longer than {positions} positions"
        answers = [Answer("too_long", reason=reason)] * len(requests)
        lengths = [len(encode_prompt(self.tokenizer, r["prompt"])) for r in requests]
        # The last token of an answer is never read, so it needs no position.
        fits = [i for i, length in enumerate(lengths) if length + self.max_new_tokens <= positions + 1]
        texts = self([requests[i]["prompt"] for i in fits], [requests[i]["seed"] for i in fits])
        for i, text in zip(fits, texts, strict=True):
            answers[i] = _answer_of(text)
        tries.all(answers)

    def describe(self) -> dict:
        """JSON-ready provenance, stored in run.json."""
        sampling = {k: getattr(self, k) for k in ("max_new_tokens", "temperature", "top_p", "bf16")}
        return {**describe_model(self.model), **sampling}


def describe_model(model) -> dict:
    """Name, dtype and a digest of the weights, because a retrained model under an old name is another model."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters()):
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]  # about 64 values, evenly spaced
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    dtype = str(model.dtype).removeprefix("torch.")
    name = model.config.name_or_path
    name = str(Path(name)) if name else name  # runs/sft/ is runs/sft
    return {"model": name, "dtype": dtype, "weights": digest.hexdigest()}


def _answer_of(text: str) -> Answer:
    return Answer("ok", {"text": text, "finish_reason": "length" if isinstance(text, Cut) else "stop"})


class _Function:
    """Any generator as a backend of the ledger. It answers a whole batch, or raises. ConfigError for a generator that
    nothing distinguishes from others."""

    def __init__(self, generate: Generate):
        if not hasattr(generate, "describe") and not hasattr(generate, "__qualname__"):
            raise ConfigError(
                "generate must be a function of prompts and seeds, or have a describe(), got "
                f"{type(generate).__name__}: wrap a model in TextGenerator, anything else in a def"
            )
        self.generate = generate

    def describe(self) -> dict:
        generate = self.generate
        return generate.describe() if hasattr(generate, "describe") else {"function": generate.__qualname__}

    def answer(self, requests: Sequence[dict], tries: Tries) -> None:
        texts = self.generate([r["prompt"] for r in requests], [r["seed"] for r in requests])
        # Checked before they are recorded: an answer in the ledger is never asked for again.
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"generate must return a list of texts, one for each prompt, got {texts!r:.80}")
        if len(texts) != len(requests):
            raise ConfigError(f"generate: got {len(requests)} prompts, returned {len(texts)} texts")
        tries.all(list(map(_answer_of, texts)))


class Writer:
    """Puts prompts and the constitution's requests to a generator, in the constitution's layout, with its few-shots.

    A text that was not written (a server refused, or failed on every try) is "", and its item is in `failures`, item id
    -> reason. Nothing more is asked for such an item, and its record must say that it failed.
    """

    def __init__(self, generate: Generate, constitution: Constitution, ledger: Ledger, seed: int):
        self.seed, self.few_shots, self.ledger = seed, constitution.critique_few_shots, ledger
        self.backend = generate if hasattr(generate, "answer") else _Function(generate)
        self.render, self.clean = CRITIQUE_LAYOUTS[constitution.critique_layout]
        self.settings = {"constitution_sha256": constitution.sha256, "generator": self.backend.describe()}
        self.failures: dict[str, str] = {}

    def or_failed(self, record: dict) -> dict:
        """The record of an item; if the item has failed, the record says so, whatever was written before."""
        reason = self.failures.get(record["id"])
        return record if reason is None else {**record, "status": "failed", "reason": reason}

    def answer(self, items: Sequence[dict], name: str) -> list[str]:
        """First replies to items {"id", "prompt"}. name distinguishes several replies to one item."""
        prompts = [self.render([], item["prompt"], []) for item in items]
        return self._ask([(item["id"], name) for item in items], prompts)

    def revise(self, tasks: Sequence[tuple[str, int, Messages, str, Principle]]) -> list[tuple[str | None, str]]:
        """(critique or None, revision) for each (id, step, conversation, reply, principle)."""
        turns: list[list[Turn]] = [[("Assistant", reply)] for *_, reply, _ in tasks]
        critical = [i for i, (*_, principle) in enumerate(tasks) if principle.critique]
        for i in critical:
            turns[i].append(("CritiqueRequest", tasks[i][-1].critique))
        critiques: list[str | None] = [None] * len(tasks)
        for i, critique in zip(critical, self._next_turn(tasks, turns, critical, "critique"), strict=True):
            critiques[i] = critique
            turns[i].append(("Critique", critique))
        for (*_, principle), so_far in zip(tasks, turns, strict=True):
            so_far.append(("RevisionRequest", principle.revise))
        return list(zip(critiques, self._next_turn(tasks, turns, range(len(tasks)), "revision"), strict=True))

    def _next_turn(self, tasks, turns: Sequence[Sequence[Turn]], which: Sequence[int], name: str) -> list[str]:
        keys = [(tasks[i][0], name, tasks[i][1]) for i in which]
        return self._ask(keys, [self.render(self.few_shots, tasks[i][2], turns[i]) for i in which])

    def _ask(self, keys: Sequence[tuple], prompts: Sequence[str | Messages]) -> list[str]:
        asked = [i for i, key in enumerate(keys) if key[0] not in self.failures]
        requests = [
            {"prompt": prompts[i], "seed": seed_for(self.seed, *keys[i]), "about": "/".join(map(str, keys[i]))}
            for i in asked
        ]
        texts = [""] * len(prompts)
        for i, answer in zip(asked, self.ledger.ask(self.backend, requests), strict=True):
            if answer.status == "ok":
                text = answer.value["text"]
                whole = answer.value.get("finish_reason") != "length" or self.clean(text) != text.strip()
                texts[i] = self.clean(text) if whole else Cut(self.clean(text))
            else:
                self.failures[keys[i][0]] = f"{keys[i][1]}: {answer.status}: {answer.reason}"
        return texts
