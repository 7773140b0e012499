"""Makes many calls to an OpenAI-compatible server at once, records each try, and never pays for an answer twice.

    200 that can be read              the answer
    408, 409, 425, 5xx, time-out,     retried after Retry-After, or a random time below backoff * 2^tries (full jitter),
    no connection, truncated JSON     at most max_tries times; then the question has failed
    429                               retried, with no call for any question before Retry-After, or before a wait that
                                      doubles from backoff to 60 s; after ten minutes of nothing else the run stops
    400 that names length or safety   too_long or refused, unless it may only repeat the words of the question
    other 4xx                         failed, not retried
    401, 403, 404, 405, no quota,     the run stops, because the next question would fail too
    ten questions in a row failed

A reply is read up to MAX_REPLY bytes, within the time-out, and as UTF-8, whatever its headers say.

A 429 halves the number n of simultaneous calls. It grows by one again after n good answers. Standard error says what is
waited for, and for how long.
"""

import email.utils
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from tqdm import tqdm

from ..errors import ConfigError
from ..terminal import visible
from .ledger import Answer, Call, Tries

_STOP = {401, 403, 404, 405}
_AGAIN = {408, 409, 425, 429}
_TOO_LONG = re.compile(
    r"context.?length|maximum context|max_model_len|too (?:long|many tokens)|reduce the length"
    r"|request too large|tokens must be reduced",  # OpenAI's 429 to a question above the tokens per minute
    re.I,
)
_REFUSED = re.compile(r"content.?(?:filter|management|policy)|safety|responsible.?ai", re.I)
_NO_QUOTA = re.compile(r"insufficient_quota|billing", re.I)
FAILURES_IN_A_ROW = 10
PROBES = 3
MAX_REPLY = 2**26  # bytes; a prompt of 128k tokens, echoed for two labels, takes about 2e7
_MAX_RAW = 10_000  # characters of an error in the ledger
_MAX_WAIT = 60.0  # seconds, because limits are per minute
_PATIENCE = 600.0  # seconds
_TOLD_AFTER, _TOLD_EVERY = 5.0, 30.0  # seconds


class Unreadable(Exception):
    """A 200 without the requested content. The message says what is missing."""


@dataclass
class Server:
    """A server, its credentials and its limits. The key is read from the environment variable `api_key_env`, if set.

    max_requests, max_total_tokens and max_cost limit the calls of one judge or generator in one ledger, including
    earlier runs. Prices are per 1,000,000 tokens, in the unit of max_cost. The cost of a call is known only afterwards,
    so the last two limits may be exceeded by the calls in flight. They require a server that reports token usage; one
    that does not is refused at its first answer.

    extra_body is merged into every request and overrides its fields; null removes one. OpenAI's reasoning models need
    {max_tokens: null, max_completion_tokens: 512}, and Qwen3 on vLLM answers without reasoning with
    {chat_template_kwargs: {enable_thinking: false}}.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    max_tries: int = 6
    timeout: float = 120.0  # seconds of one try
    backoff: float = 0.5  # seconds; the longest wait is 60
    requests_per_minute: float | None = None
    max_requests: int | None = None
    max_total_tokens: int | None = None
    max_cost: float | None = None
    price_prompt: float = 0.0
    price_completion: float = 0.0
    extra_body: dict = field(default_factory=dict)
    kept = "every answer is in the ledger, and the same command (cai train: with --resume) continues from there"
    _client: object = field(default=None, init=False, repr=False)

    def __post_init__(self):
        if self.concurrency < 1 or self.max_tries < 1 or self.timeout <= 0:
            raise ConfigError(
                f"server: needs concurrency >= 1, max_tries >= 1 and timeout > 0, got {self.concurrency}, "
                f"{self.max_tries}, {self.timeout}"
            )
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise ConfigError(f"server: requests_per_minute = {self.requests_per_minute} must be above 0")
        if min(self.backoff, self.price_prompt, self.price_completion) < 0:
            raise ConfigError("server: backoff, price_prompt and price_completion must be 0 or more")
        if self.max_cost is not None and not (self.price_prompt or self.price_completion):
            raise ConfigError("server: max_cost needs price_prompt and price_completion, for 1,000,000 tokens each")
        if not isinstance(self.extra_body, dict):
            raise ConfigError(f"server: extra_body must map the names of fields to values, got {self.extra_body!r}")
        if re.search("[@?#]", self.base_url):  # not repeated here: errors are recorded too
            raise ConfigError(
                "server: base_url is recorded with every answer, so it may hold no user name, no password and no query "
                f"(?...): put the key into the environment variable {self.api_key_env} (api_key_env)"
            )
        try:
            import openai
        except ImportError:
            raise ConfigError("a server needs the openai client: pip install openai") from None
        self.openai = openai
        # A local server needs no key. strip(), because a key that was read from a file may end with a newline.
        key = os.environ.get(self.api_key_env, "").strip() or "none"
        if not key.isascii():
            raise ConfigError(
                f"server: the key in {self.api_key_env} has characters beyond ASCII, which no header can hold: check it"
            )
        self._client = openai.OpenAI(
            base_url=self.base_url, api_key=key, max_retries=0, timeout=self.timeout,
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [self._receive]}),
        )  # fmt: skip
        self._key = key.encode()
        self._gate, self._budget = threading.Condition(), threading.Lock()
        self._active, self._allowed, self._not_before, self._failures = 0, float(self.concurrency), 0.0, 0
        self._limited_since: float | None = None  # the first 429 since an answer
        self._failing_since: float | None = None  # the first try of any kind that failed since an answer
        self._quiet_until = 0.0

    def describe(self) -> dict:
        more = {"extra_body": self.extra_body} if self.extra_body else {}
        return {"backend": "http", "base_url": self.base_url, "model": self.model, **more}

    def probe(self, request: dict, send, read) -> list[Call]:
        """The calls of one question that finds out what the server can do. After a 429 we wait as in a run; what may be
        a fault of the moment is tried again, PROBES times in all.

        The outcome of the last call is in its answer and is never raised. Raises ConfigError after ten minutes of
        nothing but 429.
        """
        calls, number = [], 0
        while number < PROBES:
            self._enter(threading.Event())
            started = time.time()
            try:
                answer, again, wait, about = self._try(*send(request), request, read)
            finally:
                self._leave()
            calls.append(Call(request, answer, started, seconds := time.time() - started, about))
            if again and about.get("http_status") == 429:
                self._pace(answer, 429, again, wait, last=False)
                self._tell(answer, wait, seconds)
                continue
            number += 1
            if not again or seconds >= self.timeout or not _may_pass(about):
                break
            if number < PROBES:
                self._tell(answer, min(wait, _MAX_WAIT), seconds)
                time.sleep(min(wait, _MAX_WAIT) or self._jitter(number - 1))
        self._limited_since = self._failing_since = None  # any other answer ends it, also an error
        self._must_be_counted(answer, about)
        return calls

    def call(self, path: str, body: dict | None = None) -> str:
        """The text of the reply to a POST, or to a GET if there is no body. One try; ConfigError if it fails."""
        try:
            return self._send(path, body).text
        except Unreadable as error:
            raise ConfigError(f"{path}: {error}") from None
        except self.openai.APIStatusError as error:
            raise ConfigError(f"{path}: HTTP {error.status_code}: {short(error.response.text)}") from None
        except self.openai.APITimeoutError:
            raise ConfigError(f"{path}: no answer within {self.timeout:g} s") from None
        except self.openai.APIError as error:
            reason = short(str(error.__cause__ or error))
            raise ConfigError(f"{path} of {self.base_url} cannot be reached: {reason}") from None

    def _receive(self, response) -> None:
        """Reads a reply in place of httpx, which would read any number of bytes for any time."""
        content, end, cut = bytearray(), time.monotonic() + self.timeout, ""
        for part in response.iter_bytes():
            content += part
            if len(content) > MAX_REPLY:
                cut = f"the reply is longer than {MAX_REPLY >> 20} MB"
            elif time.monotonic() > end:
                cut = f"the reply had not ended after {self.timeout:g} s"
            if cut:
                break
        response.close()
        # Some repeat the key, and errors are recorded and printed. A short one may be a word of their text.
        if (response.is_error or not content.lstrip().startswith(b"{")) and len(self._key) >= 8:
            content = content.replace(self._key, b"(the key)")
        response.encoding, response._content = "utf-8", bytes(content)  # what response.read() sets
        response.extensions["cut"] = cut

    def _send(self, path: str, body: dict | None):
        """The raw reply, because the client's own types hide what a server leaves out or adds."""
        options = {"headers": {"X-Stainless-Raw-Response": "true"}}  # what the client's with_raw_response sets
        if body is None:
            reply = self._client.get(path, cast_to=object, options=options).http_response
        else:
            reply = self._client.post(path, body=body, cast_to=object, options=options).http_response
        if cut := reply.extensions["cut"]:
            raise Unreadable(cut)
        return reply

    def call_all(
        self, requests: Sequence[dict], tries: Tries, send: Callable[[dict], tuple[str, dict]],
        read: Callable[[dict, dict], Answer], *, abandon: bool = False,
    ) -> None:  # fmt: skip
        """Answers every request of a ledger. send: request -> (path, body); read: (request, reply) -> Answer.

        If one request fails in a way that ends them all, and on Ctrl-C, the calls in flight are first awaited and
        recorded. abandon: do not wait on Ctrl-C, for answers that nobody keeps.
        """
        stop, waiting, ended = threading.Event(), SimpleQueue(), SimpleQueue()
        for question in enumerate(requests):
            waiting.put(question)

        def work() -> None:
            failure = None
            try:
                while not stop.is_set():
                    self._until_answered(*waiting.get_nowait(), tries, send, read, stop)
            except Empty:
                pass
            except BaseException as error:
                failure = error
            ended.put(failure)

        threads = []  # daemons: a process does not wait for them at its end, as it would for an executor's
        try:
            for _ in range(min(self.concurrency, len(requests))):
                thread = threading.Thread(target=work, daemon=True)
                thread.start()
                threads.append(thread)
            for _ in threads:
                if failure := ended.get():
                    raise failure
        except BaseException as error:
            stop.set()  # send nothing new
            if not (abandon and isinstance(error, KeyboardInterrupt)):
                for thread in threads:
                    thread.join()
            raise

    def _until_answered(self, i: int, request: dict, tries: Tries, send, read, stop: threading.Event) -> None:
        path, body = send(request)
        number = 0  # tries so far; a 429 does not count, because it is not about the question
        while self._enter(stop):
            started = time.monotonic()
            try:
                attempt = self._begin(i, tries)
                answer, again, wait, about = self._try(path, body, request, read)
                tries.end(attempt, i, answer, **about)
            finally:
                self._leave()
            self._must_be_counted(answer, about)
            limited = again and about.get("http_status") == 429
            number += not limited
            last = not again or number == self.max_tries
            self._pace(answer, about.get("http_status"), again, wait, last)
            if not last:
                self._tell(answer, wait, time.monotonic() - started)
            if last or (not limited and stop.wait(wait or self._jitter(number - 1))):
                return

    def _try(self, path: str, body: dict, request: dict, read) -> tuple[Answer, bool, float, dict]:
        """(answer, whether to try again, seconds that the server asked to wait, other columns for the ledger)."""
        about: dict = {}
        body = {"model": self.model, **body, **self.extra_body}
        body = {name: value for name, value in body.items() if value is not None}
        try:
            response = self._send(path, body)
            about = {"raw": response.text, "http_status": response.status_code}
            reply = _json(response.text)
            about |= _usage(reply)
            return _read(read, request, reply), False, 0.0, about
        except Unreadable as error:
            return Answer("failed", reason=str(error)), True, 0.0, about
        except self.openai.APIStatusError as error:
            text, code = error.response.text, error.status_code
            about = {"raw": text[:_MAX_RAW], "http_status": code}
            reason = f"HTTP {code}: {short(text)}"
            if code in (404, 405):  # an unknown model, or an endpoint that the server does not have
                reason = f"HTTP {code} from {path}: {short(text)}"
            if code == 401:
                unset = "" if os.environ.get(self.api_key_env, "").strip() else ", which is not set"
                reason += f" (the key is read from the variable {self.api_key_env}{unset})"
            if code in (400, 413, 422, 429) and _says(_TOO_LONG, text, body):
                return Answer("too_long", reason=reason), False, 0.0, about
            if code in (400, 403, 422) and _says(_REFUSED, text, body):
                return Answer("refused", reason=reason), False, 0.0, about
            again = code >= 500 or (code in _AGAIN and not _NO_QUOTA.search(text))
            return Answer("failed", reason=reason), again, _retry_after(error.response.headers), about
        except self.openai.APITimeoutError:
            return Answer("failed", reason=f"no answer within {self.timeout:g} s"), True, 0.0, about
        except self.openai.APIError as error:
            reason = f"{type(error).__name__}: {short(str(error.__cause__ or error))}"
            return Answer("failed", reason=reason), True, 0.0, about

    # -- how fast --

    def _enter(self, stop: threading.Event) -> bool:
        """Waits for a free slot, and for the time set by the server or by requests_per_minute. False if stopped."""
        with self._gate:
            while not stop.is_set():
                now = time.monotonic()
                if self._active < max(1, int(self._allowed)) and now >= self._not_before:
                    self._active += 1
                    if self.requests_per_minute:
                        self._not_before = now + 60 / self.requests_per_minute
                    return True
                self._gate.wait(min(max(self._not_before - now, 0.05), 0.5))
        return False

    def _leave(self) -> None:
        with self._gate:
            self._active -= 1
            self._gate.notify_all()

    def _pace(self, answer: Answer, status: int | None, again: bool, wait: float, last: bool) -> None:
        """Adapts the pace to the result of a try. last: the last try of its question. ConfigError if the run should
        stop."""
        with self._gate:
            if answer.status != "failed":
                self._failures, self._limited_since, self._failing_since = 0, None, None
                self._allowed = min(self.concurrency, self._allowed + 1 / max(self._allowed, 1))
                return
            self._failures += last
            if status in _STOP or (status == 429 and not again):
                raise ConfigError(f"{self.base_url}: {answer.reason}; {self.kept}")
            if wait > _PATIENCE:
                raise ConfigError(f"{self.base_url} asks to wait for {wait:.0f} s ({answer.reason}); {self.kept}")
            now = time.monotonic()
            if status == 429:
                self._allowed = max(1.0, self._allowed / 2)
                self._limited_since = now if self._limited_since is None else self._limited_since
                limited = now - self._limited_since
                if limited > _PATIENCE:
                    raise ConfigError(
                        f"{self.base_url} has refused every call for {limited / 60:.0f} minutes ({answer.reason}): set "
                        f"requests_per_minute to what it allows; {self.kept}"
                    )
                # Wait as long as the limit has lasted, so that waits double, however many calls were refused together.
                wait = wait or random.uniform(0.5, 1) * min(_MAX_WAIT, max(self.backoff, limited))
            self._not_before = max(self._not_before, now + wait)
            if self._failures >= FAILURES_IN_A_ROW:
                raise ConfigError(
                    f"{self.base_url}: {self._failures} questions in a row failed ({answer.reason}); {self.kept}"
                )

    def _tell(self, answer: Answer, wait: float, seconds: float) -> None:
        """Says what a try failed with that is repeated, once this takes long. seconds: of the try."""
        with self._gate:
            now = time.monotonic()
            if self._failing_since is None:
                self._failing_since = now - seconds
            lasted, wait = now - self._failing_since, max(wait, self._not_before - now)
            if lasted + wait < _TOLD_AFTER or now < self._quiet_until:
                return
            self._quiet_until = now + _TOLD_EVERY
            limit = f", for {_PATIENCE / 60:.0f} minutes at most" if self._limited_since is not None else ""
        soon = f" in {wait:.0f} s" if wait >= 1 else ""
        told = f"{self.base_url}: {answer.reason}; no answer for {lasted:.0f} s, trying again{soon}{limit}"
        tqdm.write(visible(told), file=sys.stderr)

    def _jitter(self, number: int) -> float:
        return random.uniform(0, min(_MAX_WAIT, self.backoff * 2**number))

    def _must_be_counted(self, answer: Answer, about: dict) -> None:
        """ConfigError for an answer without usage if a limit depends on it, because the limit would have no effect."""
        bounds = [name for name in ("max_total_tokens", "max_cost") if getattr(self, name) is not None]
        if bounds and answer.status == "ok" and not {"prompt_tokens", "completion_tokens"} <= set(about):
            raise ConfigError(
                f"{self.base_url} does not report how many tokens an answer took, so {bounds[0]} cannot be enforced: "
                "leave it out and set max_requests"
            )

    def _begin(self, i: int, tries: Tries) -> int:
        with self._budget:
            spent = tries.usage()
            cost = (spent.prompt_tokens * self.price_prompt + spent.completion_tokens * self.price_completion) / 1e6
            for name, value, bound in (
                ("max_requests", spent.requests, self.max_requests),
                ("max_total_tokens", spent.prompt_tokens + spent.completion_tokens, self.max_total_tokens),
                ("max_cost", cost, self.max_cost),
            ):
                if bound is not None and value >= bound:
                    raise ConfigError(f"the budget is spent: {name} = {bound}, {value:g} used; raise it: {self.kept}")
            return tries.begin(i)


def _may_pass(about: dict) -> bool:
    """Whether a failed try may succeed if it is repeated. What a server answers in whole JSON with a 200 is all it has
    to say, and a 501 says that it never will. Without a status there was no connection."""
    code = about.get("http_status")
    if code != 200:
        return code != 501
    try:
        json.loads(about["raw"])
    except (ValueError, RecursionError):
        return True
    return False


def _json(text: str) -> dict:
    try:
        reply = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: brackets in a thousand others
        raise Unreadable(f"the reply is not JSON: {short(text)}") from None
    if not isinstance(reply, dict):
        raise Unreadable(f"the reply is not a JSON object: {short(text)}")
    return reply


def _read(read, request: dict, reply: dict) -> Answer:
    """Reads a reply. One of an unexpected shape is a failed try, and does not end the run."""
    try:
        return read(request, reply)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"the reply has another shape: {type(error).__name__}: {short(str(error))}") from None


def _says(pattern: re.Pattern, error: str, body: dict) -> bool:
    """Whether an error contains such words that were not in the request; many servers echo it in some field."""
    sent = json.dumps(body, ensure_ascii=False).casefold()
    return any(found[0].casefold() not in sent for found in pattern.finditer(error))


def _usage(reply: dict) -> dict[str, int | None]:
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        return {}
    found = {"prompt_tokens": usage.get("prompt_tokens", usage.get("input_tokens")),
             "completion_tokens": usage.get("completion_tokens", usage.get("output_tokens"))}  # fmt: skip
    # A number that no answer can take is none. Negative ones would raise the limits, and SQLite's end at 2^63.
    return {name: value for name, value in found.items() if type(value) is int and 0 <= value < 2**31}


def short(text: str) -> str:
    """At most 200 characters of what a server says, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."


def _retry_after(headers) -> float:
    """Seconds, from any of the three forms of the header; 0 without one, and for NaN."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return 0.0
        try:
            return max(0.0, float(value))  # in this order: a comparison with NaN is false
        except ValueError:
            return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0
