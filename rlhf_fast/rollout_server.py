"""PPO's answers from a vLLM or SGLang server: tokens in, tokens and their log-probabilities out, new weights each step.

    GET  /v1/models         which engine it is (owned_by), and the name of its model
    POST /v1/completions    the prompt as token ids, return_token_ids, logprobs 0; one request and one seed per answer

    weights                 vLLM                                                SGLang
    all                     /pause, reload_weights by /collective_rpc,          /update_weights_from_disk
                            /reset_prefix_cache, /resume
    LoRA adapters           /v1/load_lora_adapter                               /load_lora_adapter

The weights go through a directory that the server can read. They are sent before the first request that needs them,
and only after all answers of the previous rollout have arrived. vLLM is paused while it reads them, SGLang locks
itself, and adapters get a new name each time. So no answer, and no prefix cache that it uses, mixes two policies. After
a failure the server gets the weights again, because it may have been restarted.

The log-probabilities must be those at the sampling temperature. vLLM returns these only with --logprobs-mode
processed_logprobs; SGLang does unless SGLANG_RETURN_ORIGINAL_LOGPROB is set. The first call checks this by asking at
two temperatures.

Written against the code of vLLM 0.33.0 and SGLang 0.5.23 (docs/ppo.md says which parts have been run).
"""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from .data.chat import Text, encode_prompt
from .errors import ConfigError
from .judges.ledger import Answer, Usage
from .judges.server import Server, Unreadable, short
from .judges.stages import seed_for
from .models import has_adapters, save_model, save_quietly, stop_ids

START = {  # (engine, whether the policy has adapters) -> the command that starts its server
    ("vllm", False): "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs",
    ("vllm", True): "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank RANK "
    "--logprobs-mode processed_logprobs",
    ("sglang", False): "python -m sglang.launch_server --model-path MODEL",
    ("sglang", True): "python -m sglang.launch_server --model-path BASE --enable-lora --max-lora-rank RANK "
    "--lora-target-modules all",
}
_UNCUT = {  # sent explicitly, or vLLM takes these from the model's generation_config
    "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip
_KEPT = "the steps before are kept, and --resume continues from there"
_NONE = "no step is done yet: start the run again"
_NAME = re.compile(r"policy-[0-9a-f]{8}-\d+")  # our directories of weights; a user's own policy-2 does not match


class _Answers:
    """Takes the place of a ledger in Server.call_all. It keeps the last attempts only, because a failed rollout is
    repeated as a whole."""

    def __init__(self, count: int):
        self.last: list[Answer] = [Answer("failed", reason="not asked")] * count

    def usage(self) -> Usage:
        return Usage()

    def begin(self, i: int) -> int:
        return i

    def end(self, attempt: int, i: int, answer: Answer, **about) -> None:
        self.last[i] = answer


@dataclass
class RolloutServer:
    """A rollout_func of PPOTrainer that samples from a server. START lists the commands that start one.

    With several processes the first one sends the requests for all. A seed is derived from the run's seed, the step,
    the row and the prompt, so a resumed run sends the requests that it would have sent without the interruption.

    Raises ConfigError if the server is another engine, cannot load new weights, does not respond, answers without token
    ids or with log-probabilities at another temperature, or ends an answer at another token or before response_length.
    """

    base_url: str  # http://host:port/v1 of a single server, not of a load balancer
    weights_dir: str | None = None  # used by this run only; the server reads it at the same path; null: in output_dir
    concurrency: int = 256  # requests at once
    timeout: float = 600.0  # seconds, for an answer and for loading the weights
    max_tries: int = 6  # per answer
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    _engine: str | None = field(default=None, init=False)  # "vllm" or "sglang"
    _step: int | None = field(default=None, init=False)  # the step whose policy the server has; None if not known
    _adapter: dict = field(default_factory=dict, init=False)  # the field of a request that names the adapter

    def __post_init__(self):
        self._server = Server(
            self.base_url, "", api_key_env=self.api_key_env, concurrency=self.concurrency, timeout=self.timeout,
            max_tries=self.max_tries,
        )  # fmt: skip
        self._met = lambda: None  # -> the trainer whose policy the server has, or None; a weak reference

    def __call__(self, prompts: Sequence[Text], trainer) -> dict[str, list]:
        config, self._server.kept = trainer.config, _KEPT if trainer.step else _NONE
        ids = [encode_prompt(trainer.tokenizer, prompt) for prompt in prompts]
        common = {"max_tokens": config.response_length, "temperature": config.temperature,
                  "stop_token_ids": stop_ids(trainer.policy, trainer.tokenizer)}  # fmt: skip
        if new := self._met() is not trainer:
            self._meet(trainer)
        current = self._step == trainer.step and trainer.whole  # else an update failed halfway
        self._step = None  # until all answers have arrived
        if not current:
            self._give_weights(trainer)
        if new:
            # Only now: with weights of an earlier run that it could load only in part, vLLM would crash at a request.
            self._probe({**common, "prompt": ids[0]}, trainer)
            self._met = weakref.ref(trainer)
        # 31 bits, which the integers of every engine can hold.
        seeds = [seed_for(config.seed, trainer.step, i, row) >> 32 for i, row in enumerate(ids)]
        requests = [{**common, "prompt": row, "seed": seed} for row, seed in zip(ids, seeds, strict=True)]
        answers = _Answers(len(requests))
        self._server.call_all(requests, answers, self._send, self._read, abandon=True)
        if bad := [(i, answer) for i, answer in enumerate(answers.last) if answer.status != "ok"]:
            i, answer = bad[0]
            longer = f": {_LONGER}" if answer.status == "too_long" else ""
            raise ConfigError(
                f"rollout_server: {len(bad)} of {len(requests)} answers failed, the first one for prompt {i}: "
                f"{answer.reason}{longer}; {self._server.kept}"
            )
        self._step = trainer.step
        completions, logprobs = zip(*(answer.value for answer in answers.last), strict=True)
        return {"completion_ids": list(completions), "logprobs": list(logprobs)}

    @property
    def _root(self) -> str:
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def _adapters(self) -> str:
        return f"{self._root}/v1" if self._engine == "vllm" else self._root

    def _send(self, request: dict) -> tuple[str, dict]:
        return "/completions", {"logprobs": 0, "return_token_ids": True, **_UNCUT, **request, **self._adapter}

    def _read(self, request: dict, reply: dict) -> Answer:
        """Value: (token ids, log-probabilities). A wrong answer is not tried again, because the seed determines it."""
        choice = reply["choices"][0]
        ids, reason, stops = choice.get("token_ids"), choice["finish_reason"], request["stop_token_ids"]
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if reason not in ("stop", "length"):
            raise Unreadable(f"the answer was broken off ({short(str(reason))})")
        if not ids or not logprobs:
            missing = " and ".join(
                name for name, value in (("token ids", ids), ("log-probabilities", logprobs)) if not value
            )
            return _no(
                f"the answer has no {missing}; return_token_ids needs vLLM 0.10.2 or SGLang 0.5.17, or later versions"
            )
        if len(ids) != len(logprobs) or not all(map(math.isfinite, logprobs)):
            return _no(
                f"the answer has {len(ids)} tokens and {len(logprobs)} log-probabilities, or some are not finite"
            )
        if stops_at := [i for i, token in enumerate(ids) if token in stops]:
            if stops_at[0] != len(ids) - 1:
                return _no(f"the answer continues after the token {ids[stops_at[0]]}, one of stop_token_ids")
        elif reason == "stop":
            return _no(
                f"the server stopped at the token {short(str(ids[-1]))}, which ends no answer of the policy (only "
                f"{stops} do): start it with the policy's own directory, whose generation_config declares these"
            )
        elif len(ids) != request["max_tokens"]:
            return _no(f"the answer was cut after {len(ids)} of {request['max_tokens']} tokens: {_LONGER}")
        return Answer("ok", (ids, logprobs))

    def _meet(self, trainer) -> None:
        """Finds out which engine it is, and its model."""
        self._unload()  # the adapter of another trainer
        self._step = None
        try:
            card = json.loads(self._server.call("/models"))["data"][0]
            self._engine, self._server.model = short(str(card.get("owned_by"))), str(card["id"])
        except (ConfigError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            why = error if isinstance(error, ConfigError) else "it lists no model"
            hint = "" if self._root != self.base_url.rstrip("/") else "; the address of both ends in /v1"
            raise ConfigError(f"rollout_server: {self.base_url} is not a vLLM or SGLang server: {why}{hint}") from None
        if (self._engine, has_adapters(trainer.policy)) not in START:
            raise ConfigError(
                f"rollout_server: {self.base_url} calls itself {self._engine!r}, but only a vLLM or SGLang server can "
                "load new weights: start one of these (docs/ppo.md), or write a rollout_func"
            )

    def _probe(self, request: dict, trainer) -> None:
        """Requests two answers of one token. ConfigError if they are not what PPO needs."""
        start, gaps = START[self._engine, has_adapters(trainer.policy)], []
        for temperature in (0.5, 2.0):  # vLLM accepts at most 2
            probe = {**request, "max_tokens": 1, "temperature": temperature, "seed": 0, "logprobs": 3,
                     "return_tokens_as_token_ids": True}  # fmt: skip
            answer = self._server.probe(probe, self._send, self._read_gap)[-1].answer
            if answer.status != "ok":
                raise ConfigError(f"rollout_server: {self.base_url}: {answer.reason}; start it as {start}")
            gaps.append(answer.value)
        # The gap between the log-probabilities of two tokens is the gap between their logits / temperature, however
        # confident the model is.
        if trainer.config.temperature != 1 and gaps[0] < 2 * gaps[1]:
            raise ConfigError(
                f"rollout_server: {self.base_url} returns log-probabilities at temperature 1, but PPO needs those at "
                f"{trainer.config.temperature}: start it as {start}, and without SGLANG_RETURN_ORIGINAL_LOGPROB"
            )
        if trainer.config.importance_cap is None:
            warnings.warn(
                "rollout_server: the probabilities of another engine differ a little from the policy's, and nothing "
                "corrects for it: set importance_cap: 2",
                stacklevel=2,
            )

    def _read_gap(self, request: dict, reply: dict) -> Answer:
        """Value: the gap between the log-probabilities of the most likely and the third most likely token. (vLLM also
        lists the sampled one.)"""
        answer = self._read(request, reply)
        if answer.status != "ok":
            return answer
        best = sorted(reply["choices"][0]["logprobs"]["top_logprobs"][0].values())[-3:]
        gap = best[-1] - best[0]
        return Answer("ok", gap) if math.isfinite(gap) else _no("log-probabilities are not finite")

    def _give_weights(self, trainer) -> None:
        """Sends the policy's weights, or its adapters, to the server. If this fails, nothing is sampled until they have
        been sent again; until then vLLM stays paused."""
        lora, name = has_adapters(trainer.policy), f"policy-{secrets.token_hex(4)}-{trainer.step}"
        root, path = self._root, Path(self.weights_dir or Path(trainer.config.output_dir, "rollout_weights"), name)
        path = path.absolute()  # not resolve(): links may point elsewhere on the server's machine
        try:
            for old in path.parent.glob("policy-*"):  # already loaded by the server, or left by a killed process
                if _NAME.fullmatch(old.name):
                    shutil.rmtree(old)
            save_quietly(partial(save_model, trainer.policy, trainer.tokenizer), path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"rollout_server: the policy's weights cannot be written to {path} ({error}): give another weights_dir "
                f"(rollout_options), or free disk space; {self._server.kept}"
            ) from error
        path = str(path)
        if lora:
            calls = [(f"{self._adapters}/load_lora_adapter", {"lora_name": name, "lora_path": path})]
        elif self._engine == "sglang":
            calls = [(f"{root}/update_weights_from_disk", {"model_path": path, "flush_cache": True})]
        else:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            calls = [(f"{root}/pause?mode=wait", {}), (f"{root}/collective_rpc", reload),
                     (f"{root}/reset_prefix_cache", {}), (f"{root}/resume", {})]  # fmt: skip
        for url, body in calls:
            try:
                reply = self._server.call(url, body)
                if '"success":false' in reply.replace(" ", ""):  # vLLM, while its prefix cache is in use
                    raise ConfigError(f"{url}: {short(reply)}")
            except ConfigError as error:
                raise ConfigError(
                    f"rollout_server: the server did not load the policy's weights in {path}: {error}. It must be able "
                    f"to read that path (weights_dir), and be started as {START[self._engine, lora]}; "
                    f"{self._server.kept}"
                ) from None
        self._unload()
        if lora:
            self._adapter = {"model" if self._engine == "vllm" else "lora_path": name}

    def _unload(self) -> None:
        """Unloads the adapter that this object has loaded into the server, if any."""
        for name in self._adapter.values():
            with suppress(ConfigError):  # a restarted server no longer has it
                self._server.call(f"{self._adapters}/unload_lora_adapter", {"lora_name": name})
        self._adapter = {}


_LONGER = "start the server with a longer context (vLLM: --max-model-len, SGLang: --context-length)"


def _no(reason: str) -> Answer:
    return Answer("unparsed", reason=reason)
