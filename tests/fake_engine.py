"""The endpoints of a vLLM or SGLang server that a PPO run asks, on loopback, over a tiny model of transformers.

Its answers are sampled by the seed of the request alone. Statuses and bodies are those of vLLM 0.33.0 and SGLang
0.5.23, and it dies where vLLM does: asked while weights that it could not read have left the model in halves. It is as
strict as an engine would be silent: `broken` notes what an engine would have mixed up.
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
    "return_tokens_as_token_ids",
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
        self.busy = False  # vLLM's prefix cache is in use, and not emptied
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
        on_v1 = part == "lora" and self.engine == "vllm"
        command = getattr(self, f"{self.engine}_{name.removeprefix('/')}", None)
        if part not in self.routes or command is None or path.startswith("/v1") != on_v1:
            return 404, {"detail": "Not Found"}
        if self.running:
            self.broken.append(f"{name} while {self.running} answers were on their way")
        return command(body, path)

    def error(self, message, code=400):
        content = {"message": message, "type": "BadRequestError", "param": None, "code": code}
        return {"error": content} if self.engine == "vllm" else {"object": "error", **content}

    def load(self, path):
        """-> a model, or the error of a path that holds none."""
        try:
            return load_policy(path)
        except Exception as failure:
            return failure

    def vllm_pause(self, body, path):
        mode = path.partition("mode=")[2] or "abort"
        if mode not in ("abort", "wait", "keep"):
            return 400, self.error(f"Input should be 'abort', 'wait' or 'keep', not {mode}")
        self.paused, self.stale = True, False  # the caches are emptied on the way
        return 200, {"status": "paused"}

    def vllm_resume(self, body, path):
        if self.stale:
            self.broken.append("resumed with the prefix cache of older weights")
        self.paused = False
        return 200, {"status": "resumed"}

    def vllm_collective_rpc(self, body, path):
        if not self.paused:
            self.broken.append("weights were read while it answered")
        assert body["method"] == "reload_weights" and set(body["kwargs"]) == {"weights_path"}
        loaded = self.load(body["kwargs"]["weights_path"])
        if isinstance(loaded, Exception):
            self.base = None
            return 500, self.error(f"Call to collective_rpc method failed: Worker failed with error '{loaded}'", 500)
        self.base, self.stale = (self.base if self.deaf else loaded), True
        return 200, {"results": [None]}

    def vllm_reset_prefix_cache(self, body, path):
        self.stale = self.stale and self.busy
        return 200, {"success": not self.busy}

    def vllm_load_lora_adapter(self, body, path):
        name = body["lora_name"]
        if name in self.adapters:
            return 400, self.error(f"The lora adapter '{name}' has already been loaded.")
        loaded = self.load(body["lora_path"])
        if isinstance(loaded, Exception):
            return 404, self.error(f"Loading lora {name} failed: No adapter found for {body['lora_path']}", 404)
        self.adapters[name] = loaded
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def vllm_unload_lora_adapter(self, body, path):
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, self.error(f"The lora adapter '{body['lora_name']}' cannot be found.", 404)
        return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def sglang_update_weights_from_disk(self, body, path):
        loaded = self.load(body["model_path"])
        if isinstance(loaded, Exception):  # it goes back to the weights that it had
            return 400, {"success": False, "message": f"Failed to update weights: {loaded}", "num_paused_requests": 0}
        self.base = self.base if self.deaf else loaded
        return 200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def sglang_load_lora_adapter(self, body, path):
        loaded = self.load(body["lora_path"])
        if isinstance(loaded, Exception) or body["lora_name"] in self.adapters:
            return 400, {"success": False, "error_message": str(loaded), "loaded_adapters": None}
        self.adapters[body["lora_name"]] = loaded
        return 200, {"success": True, "error_message": None, "loaded_adapters": {}}

    def sglang_unload_lora_adapter(self, body, path):
        if self.adapters.pop(body["lora_name"], None) is None:
            return 400, {"success": False, "error_message": f"{body['lora_name']} is not loaded"}
        return 200, {"success": True, "error_message": None, "loaded_adapters": {}}

    def answer(self, body):
        """-> (status, content): one choice, or why there is none."""
        if self.engine == "vllm" and not 0 <= body["temperature"] <= 2:
            return 400, self.error(f"temperature must be in [0, 2], got {body['temperature']}.")
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
        ids, logprobs = responses[0], logprobs[0].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        table = (logits if self.raw else logits / temperature).log_softmax(-1)
        if self.raw:
            logprobs = table.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        choice = {
            "index": 0, "text": "?", "finish_reason": "stop" if ids[-1] in stops else "length", "token_ids": ids,
            "logprobs": {"token_logprobs": logprobs, "top_logprobs": self.top_logprobs(table, ids, body)},
        }  # fmt: skip
        return 200, {"object": "text_completion", "choices": [self.mend(choice) if self.mend else choice]}

    def top_logprobs(self, table, ids, body):
        """The likeliest tokens; before them vLLM names the sampled one, and calls a token by its id where it is asked
        to. Else two tokens of one text are one entry."""
        lists = []
        for row, token in zip(table, ids, strict=True):
            best = row.topk(body["logprobs"]).indices.tolist()
            by_id = self.engine == "vllm" and body.get("return_tokens_as_token_ids")
            named = [token, *best] if self.engine == "vllm" else best
            lists.append({f"token_id:{i}" if by_id else f"text {i % 8}": float(row[i]) for i in named})
        return lists if self.engine == "vllm" or body["logprobs"] else []


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
                return self.reply(503, server.error("Generation is paused. Please retry after it resumes.", 503))
            if server.base is None:
                server.broken.append("asked with a model in halves")
                server.gone = True
                return self.reply(500, server.error("The server had an error while processing your request.", 500))
            if fault == "time-out":
                time.sleep(2.0)
            if fault == "500":
                return self.reply(500, server.error("oops", 500))
            if fault == "400":
                return self.reply(400, server.error("This model's maximum context length is 16 tokens"))
            with server.lock:
                status, content = server.answer(body)
            if callable(fault):
                content["choices"] = [fault(choice) for choice in content["choices"]]
            self.reply(status, content)
        finally:
            with server.lock:
                server.running -= 1

    def reply(self, code, content):
        data = json.dumps(content, separators=(",", ":")).encode()  # as both of them write it
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serving(model, engine="vllm", **options):
    return running(FakeEngine(model, engine, **options))
