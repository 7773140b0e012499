"""A real server: `transformers serve` with a tiny model on loopback. Needs what transformers[serving] installs."""

import importlib.util
import math
import os
import socket
import subprocess
import sys
import time

import pytest
from helpers import attempts, tiny_model, tiny_tokenizer
from transformers import pipelines

from rlhf_fast.judges import Constitution, HTTPGenerator, HTTPJudge, Ledger, Pair, Principle, Server
from rlhf_fast.trainers.constitutional import label, sample_pairs

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("openai", "fastapi", "uvicorn"))
    or not hasattr(pipelines, "DecisionPipeline"),
    reason="needs openai, fastapi, uvicorn and transformers 5",
)

ASK = [{"role": "user", "content": "say hello"}]
KIND = Principle("kind", compare="Choose the kinder reply.")
HOUSE = Constitution("house", (KIND,), compare_layout="chat")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(server, model, tokenizer)"""
    root, tokenizer = tmp_path_factory.mktemp("served"), tiny_tokenizer()
    model = tiny_model(tokenizer, max_position_embeddings=1024)
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(root), "--device", "cpu",
               "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, **quiet)
    try:
        for _ in range(1200):  # it imports torch first
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "transformers serve did not start"
                time.sleep(0.1)
        yield Server(f"http://127.0.0.1:{port}/v1", str(root), timeout=60, concurrency=2), model, tokenizer
    finally:
        process.kill()
        process.wait()


def test_what_it_says_it_supports_is_not_believed(served):
    """It takes `logprobs` and answers 200 without them; the probe sees that, and finds the endpoint that has them."""
    server, _, _ = served
    judge = HTTPJudge(server, Constitution("c", (KIND,)))
    assert judge.describe()["mode"] == "systemone"
    tried = judge.backend.found
    assert tried["top_k"] == tried["chat"] == "no log-probabilities in the reply" and "HTTP 400" in tried["echo"]
    with pytest.raises(ValueError, match="chat: no log-probabilities in the reply"):
        HTTPJudge(server, HOUSE, mode="chat")


def test_its_probabilities_are_the_model_s(served, tmp_path):
    server, model, tokenizer = served
    judge = HTTPJudge(server, HOUSE)
    with Ledger(tmp_path) as ledger:
        one, two = judge.compare([Pair(ASK, "hello", "no", [KIND]), Pair(ASK, "no", "hello", [KIND])], ledger)
    assert one.status == "ok" and one.logit == -two.logit != 0
    assert sum(attempts(tmp_path).values()) == 2 + len(judge.backend.found)  # two orders, asked once, behind the probe
    assert one.votes[0].kind == "normalised"
    decide = pipelines.DecisionPipeline(model=model, tokenizer=tokenizer, device="cpu")
    question = judge._question(ASK, "hello", "no", KIND.compare)
    (prompt,) = judge.backend.prompt([], question, (" (A)", " (B)"), None)
    criteria = {"A": "(A)", "B": "(B)"}
    question = {"type": "choice", "instructions": "Choose the answer.", "criteria": criteria}
    answer = decide({"state": prompt["content"], "questions": {"answer": question}})["answer"]["probabilities"]
    assert one.votes[0].logit_ab == pytest.approx(math.log(answer["A"] / answer["B"]), abs=1e-5)


def test_it_writes_pairs_and_labels_them_without_a_second_call(served, tmp_path):
    server, _, _ = served
    prompts = [{"prompt": f"say {n}"} for n in range(4)]
    constitution = Constitution("house", (KIND,), critique_layout="chat", compare_layout="chat")
    pairs = sample_pairs(prompts, HTTPGenerator(server, 6), constitution, output_dir=tmp_path / "pairs")
    assert pairs.counts == {"inputs": 4, "ok": 4, "failed": 0}
    judge = HTTPJudge(server, constitution)
    first = label(pairs.rows, constitution, judge, output_dir=tmp_path / "label", tie_margin=0)
    assert sum(v for k, v in first.counts.items() if k != "inputs") == 4 and first.counts["failed"] == 0
    before = (tmp_path / "label" / "comparisons.jsonl").read_bytes()
    label(pairs.rows, constitution, judge, output_dir=tmp_path / "label", tie_margin=0)
    assert (tmp_path / "label" / "comparisons.jsonl").read_bytes() == before
    # The probe; then one principle in two orders for each pair, where equal replies need one.
    assert sum(attempts(tmp_path / "label").values()) <= 2 + 8
