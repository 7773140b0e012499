"""An OpenAI-compatible server on loopback that knows the truth, is biased as told, and fails by script."""

import hashlib
import json
import math
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def worth(reply):
    """The truth about a reply: the number that it begins with."""
    return float(re.match(r"-?[\d.]+", reply)[0])


class FakeServer(ThreadingHTTPServer):
    """P(first) = sigmoid((worth of the first - worth of the second) * sharpness + bias), for each question.

    script: (text of the prompt, how often it was asked before) -> a fault, None, or a reply (status, content, headers)
    modes: what it supports, of "echo", "top_k", "chat"; what it does not, it ignores without a word, or has `otherwise`
    """

    daemon_threads = True

    def __init__(self, script=None, *, bias=0.0, sharpness=1.0, modes=("chat",), mass=0.9, on_request=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.bias, self.sharpness, self.modes, self.mass = script, bias, sharpness, modes, mass
        self.asked, self.answered, self.lock, self.on_request = Counter(), Counter(), threading.Lock(), on_request
        self.largest, self.running, self.headers_seen = 0, 0, []
        self.bodies = []  # of the requests, as they came
        self.otherwise = None  # status with which it refuses what it does not support
        self.usage = True  # whether replies say how many tokens they took
        self.at_first = []  # faults of the first requests, whatever they ask

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def logit(self, text):
        found = [re.findall(rf" \({x}\) \[\[\[(.*?)\]\]\]", text, re.S) for x in "AB"]
        if not all(found):
            return 0.0  # not a comparison
        a, b = (options[-1] for options in found)
        return (worth(a) - worth(b)) * self.sharpness + self.bias

    def handle_error(self, request, client_address):  # a client that was killed, or timed out, is no news
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.path.endswith("/completions"):
            return self.reply(404, {"error": {"message": "no such path"}})
        server.bodies.append(body)
        prompt = body.get("prompt")
        text = "\n\n".join(m["content"] for m in body["messages"]) if "messages" in body else prompt
        text = text[0] if isinstance(text, list) else text
        key = hashlib.sha256(json.dumps([self.path, text, body.get("seed")]).encode()).hexdigest()
        with server.lock:
            before = server.asked[key]
            server.asked[key] += 1
            server.running += 1
            server.largest = max(server.largest, server.running)
            total = sum(server.asked.values())
            at_first = server.at_first.pop(0) if server.at_first else None
        try:
            if server.on_request:
                server.on_request(total)
            if at_first:
                return self.fail(at_first, body, text)
            if self.server.otherwise and self.mode(body) not in self.server.modes:
                return self.reply(self.server.otherwise, {"error": {"message": f"no {self.mode(body)}"}})
            if "alphabet" in text:  # the probe
                return self.reply(200, self.answer(body, text, 2.0))
            fault = server.script(text, before) if server.script else None
            if isinstance(fault, tuple):
                return self.reply(*fault)
            if fault:
                return self.fail(fault, body, text)
            reply = self.answer(body, text, server.logit(text))
            with server.lock:
                server.answered[key] += 1
            self.reply(200, reply)
        finally:
            with server.lock:
                server.running -= 1

    def mode(self, body):
        return "chat" if "messages" in body else "echo" if body.get("echo") else "top_k"

    def fail(self, fault, body, text):
        answers = {
            "429": (429, {"error": {"message": "slow down", "code": "rate_limit"}}, {"Retry-After": "0.05"}),
            "429 bare": (429, {"error": {"message": "60 requests a minute"}}, {}),
            "429 large": (429, {"error": {"message": "Request too large: limit 30000, requested 36278"}}, {}),
            "429 long": (429, {"error": {"message": "come back tomorrow"}}, {"Retry-After": "86400"}),
            "quota": (429, {"error": {"message": "insufficient_quota"}}, {}),
            "503": (503, {"error": {"message": "loading"}}, {"Retry-After": "1"}),
            "500": (500, {"error": {"message": "oops"}}, {}),
            "404": (404, {"error": {"message": "no such model"}}, {}),
            "401": (401, {"error": {"message": "bad key"}}, {}),
            "too_long": (400, {"error": {"message": "This model's maximum context length is 16 tokens"}}, {}),
            "filter": (400, {"error": {"message": "flagged by the content filter"}}, {}),
            "bad": (400, {"error": {"message": "no such parameter"}}, {}),
            "echo": (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "messages"], "input": text}]}, {}),
        }
        if fault in answers:
            code, content, headers = answers[fault]
            return self.reply(code, content, headers)
        if fault == "cut":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault == "time-out":
            time.sleep(1.0)
        reply = self.answer(body, text, self.server.logit(text))
        if fault == "missing":
            reply["choices"][0].pop("logprobs", None)
        if fault == "refusal":
            reply["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I can't judge that."}
        if fault == "sentence" and body["max_tokens"] > 1:
            reply["choices"][0]["message"]["content"] += " better"
        if fault == "torn":
            return self.reply(200, json.dumps(reply)[:-20])
        if fault == "empty":
            reply["choices"] = []
        if fault == "shape":
            reply = {"choices": ["yes"], "usage": "much"}
        if fault == "no label":
            for position in reply["choices"][0]["logprobs"]["content"]:
                position["top_logprobs"] = [{"token": "I", "logprob": -0.1}, {"token": "The", "logprob": -3.0}]
        self.reply(200, reply)

    def answer(self, body, text, logit):
        p, mass, modes = 1 / (1 + math.exp(-logit)), self.server.mass, self.server.modes
        top = {"A": math.log(p * mass), "B": math.log((1 - p) * mass), "The": math.log((1 - mass) * 0.9)}
        choice = {"index": 0, "finish_reason": "length"}
        choices = [choice]
        if self.path.endswith("/chat/completions"):
            draw = int(hashlib.sha256(f"{body.get('seed')}{text}".encode()).hexdigest()[:8], 16) / 2**32
            said = "A" if draw < p else "B"
            choice["message"] = {"role": "assistant", "content": said}
            if body.get("logprobs") and "chat" in modes:
                listed = sorted(({"token": t, "logprob": lp} for t, lp in top.items()), key=lambda x: -x["logprob"])
                listed = listed[: body["top_logprobs"]]
                choice["logprobs"] = {"content": [{"token": said, "logprob": top[said], "top_logprobs": listed}]}
        elif isinstance(body["prompt"], list) and "echo" in modes:
            choices = []
            for number, prompt in enumerate(body["prompt"]):
                parts = re.findall(r"\s?\w+|\W", prompt + " on")
                label = {"A": top["A"], "B": top["B"]}[prompt[-2]]
                scores = [None, *[-1.0] * (len(parts) - 1)]
                scores[-3] = label  # " (" "A" ")" " on": the letter stands third from behind
                scores[-2] = 0.0
                got = {"tokens": parts, "token_logprobs": scores}
                choices.append({"index": number, "text": "".join(parts), "logprobs": got, "finish_reason": "length"})
        else:
            choice["text"] = "A"
            if body.get("logprobs") and "top_k" in modes:
                listed = dict(sorted(top.items(), key=lambda x: -x[1])[: body["logprobs"]])
                choice["logprobs"] = {"tokens": ["A"], "token_logprobs": [top["A"]], "top_logprobs": [listed]}
        usage = {"usage": {"prompt_tokens": len(text) // 4, "completion_tokens": 1}} if self.server.usage else {}
        return {"choices": choices, **usage}

    def reply(self, code, content, headers=None):
        if isinstance(content, Iterator):  # parts of a reply that does not say how long it is
            return self.drip(code, content)
        data = content.encode() if isinstance(content, str) else content
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def drip(self, code, parts):
        self.close_connection = True
        self.send_response(code)
        self.end_headers()
        for part in parts:
            self.wfile.write(part)
            time.sleep(0.05)


def serving(script=None, **options):
    return running(FakeServer(script, **options))


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
