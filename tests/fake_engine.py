"""The endpoints of a vLLM or SGLang server that a PPO run asks, on loopback, over a tiny model of transformers.

Its answers are sampled by the seed of the request alone. It is as strict as an engine would be silent: it answers with
503 while it is paused, and notes in `broken` what an engine would have mixed up.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from fake_server import running

from rlhf_fast.generation import generate_with_logprobs
from rlhf_fast.models import load_policy

FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "seed", "stop_token_ids", "logprobs", "return_token_ids", "top_p",
    "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "lora_path",
}  # fmt: skip
UNCUT = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class FakeEngine(ThreadingHTTPServer):
    """engine: what owned_by says. routes: the parts that it was started with, of "dev" and "lora". raw: its
    log-probabilities leave the temperature out. deaf: it says that it takes new weights over, and does not."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self, model, engine="vllm", *, routes=("dev", "lora"), raw=False, deaf=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.first = self.base = model
        self.engine, self.routes, self.raw, self.deaf = engine, routes, raw, deaf
        self.adapters, self.paused, self.stale, self.running, self.lock = {}, False, False, 0, threading.Lock()
        self.calls, self.asked, self.broken = [], [], []
        self.faults = []  # of the next answers that are not the first two, which are asked to get acquainted
        self.gone = False  # it closes every connection without a word
        self.mend = None  # (choice) -> what is sent in its place, from the first answer on

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):  # a client that was killed
        pass

    def command(self, path, body):
        """-> (status, content) of what is no question."""
        name = path.removeprefix("/v1").split("?")[0]
        part = "lora" if "lora" in name else "dev"
        known = {
            "vllm": {"/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", "/load_lora_adapter",
                     "/unload_lora_adapter"},
            "sglang": {"/update_weights_from_disk", "/load_lora_adapter", "/unload_lora_adapter"},
        }  # fmt: skip
        on_v1 = part == "lora" and self.engine == "vllm"
        if part not in self.routes or name not in known.get(self.engine, ()) or path.startswith("/v1") != on_v1:
            return 404, {"detail": "Not Found"}
        if self.running:
            self.broken.append(f"{name} while {self.running} answers were on their way")
        if name in ("/pause", "/resume"):
            if name == "/resume" and self.stale:
                self.broken.append("resumed with the prefix cache of older weights")
            self.paused = name == "/pause"
        elif name == "/reset_prefix_cache":
            self.stale = False
        elif name == "/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return 400, {"error": {"message": "already loaded"}}
            self.adapters[body["lora_name"]] = load_policy(body["lora_path"])
        elif name == "/unload_lora_adapter":
            if self.adapters.pop(body["lora_name"], None) is None:
                return 404, {"error": {"message": "no such adapter"}}
        else:
            if self.engine == "vllm" and not self.paused:
                self.broken.append("weights were read while it answered")
            assert self.engine == "sglang" or body["method"] == "reload_weights"
            path = body["model_path"] if self.engine == "sglang" else body["kwargs"]["weights_path"]
            try:
                loaded = load_policy(path)
            except Exception as error:
                return 400, {"success": False, "message": str(error)}
            self.base = self.base if self.deaf else loaded
            self.stale = self.engine == "vllm"
        return 200, {"success": True}

    def answer(self, body):
        """-> one choice."""
        assert set(body) <= FIELDS and {name: body.get(name) for name in UNCUT} == UNCUT
        assert body["return_token_ids"] is True and all(isinstance(token, int) for token in body["prompt"])
        model = self.base
        if adapter := body.get("lora_path") or (body["model"] != "tiny" and body["model"]):
            model = self.adapters[adapter]
        generator = [torch.Generator().manual_seed(body["seed"])]
        stops, prompt, temperature = body["stop_token_ids"], body["prompt"], body["temperature"]
        responses, logprobs = generate_with_logprobs(
            model, [prompt], max_new_tokens=body["max_tokens"], eos_token_id=stops, temperature=temperature,
            generator=generator,
        )  # fmt: skip
        ids, logprobs = responses[0], logprobs[0]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        table = (logits if self.raw else logits / temperature).log_softmax(-1)
        if self.raw:
            logprobs = table.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        top = [{f"token {int(row.argmax())}": float(row.max())} for row in table] if body["logprobs"] else []
        return {
            "index": 0, "text": "?", "finish_reason": "stop" if ids[-1] in stops else "length", "token_ids": ids,
            "logprobs": {"token_logprobs": logprobs, "top_logprobs": top},
        }  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.server.gone:
            self.close_connection = True
            return
        card = {"id": "tiny", "object": "model", "owned_by": self.server.engine}
        self.reply(*((200, {"data": [card]}) if self.path == "/v1/models" else (404, {})))

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["content-length"])))
        if server.gone:
            self.close_connection = True
            return
        if self.path != "/v1/completions":
            with server.lock:
                server.calls.append((self.path, body))
                return self.reply(*server.command(self.path, body))
        with server.lock:
            server.asked.append(body)
            server.running += 1
            fault = server.faults.pop(0) if server.faults and len(server.asked) > 2 else None
        try:
            if server.paused:
                server.broken.append("asked while it was paused")
                return self.reply(503, {"error": {"message": "paused"}})
            if fault == "time-out":
                time.sleep(1.0)
            if fault == "500":
                return self.reply(500, {"error": {"message": "oops"}})
            if fault == "400":
                message = "This model's maximum context length is 16 tokens"
                return self.reply(400, {"error": {"message": message}})
            with server.lock:
                choice = server.answer(body)
            if server.mend:
                choice = server.mend(choice)
            if callable(fault):
                choice = fault(choice)
            self.reply(200, {"choices": [choice]})
        finally:
            with server.lock:
                server.running -= 1

    def reply(self, code, content):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serving(model, engine="vllm", **options):
    return running(FakeEngine(model, engine, **options))
