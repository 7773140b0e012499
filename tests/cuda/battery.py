"""Bodies of test_device.py that a device runs as an argument: test_battery.py runs each of them once on the CPU."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

import rlhf_fast as rf
from rlhf_fast.generation import generate_tokens
from rlhf_fast.ops import reference
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
import test_contract
import test_generation
from cases import Sampler
from helpers import tiny_model, tiny_tokenizer
from test_contract import cast, lay_out, run, tensors_of

# Tests of the contract that a case on another device passes as it is.
OF_THE_CONTRACT = (
    test_contract.test_what_the_mask_hides_never_matters,
    test_contract.test_a_mask_of_numbers_counts_like_one_of_bools,
    test_contract.test_a_row_does_not_depend_on_its_batch,
)


def on_device(case, device: str, layout: str = "contiguous"):
    """The case with an op that moves its arguments to the device and its results back, so that CPU tensors drive it."""

    def op(**inputs):
        def there(x):
            return lay_out(x.to(device), layout) if x.is_floating_point() else x.to(device)

        outputs = case.op(**{k: there(x) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()})
        return tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, outputs)

    return case._replace(op=op)


def no_argument_is_modified(case, device: str) -> None:
    for seed in range(6):
        inputs = cast(case.inputs(Sampler(random.Random(seed))), torch.float32)
        there = {k: v.to(device) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        before = {k: v.clone() for k, v in there.items()}
        run(case.op, case, inputs | there)
        for name, value in before.items():
            assert torch.equal(there[name].nan_to_num(nan=7.0), value.nan_to_num(nan=7.0)), name


def captured(call: Callable[[], dict], device: str) -> tuple[dict, Callable]:
    """The tensors that a replay of the call fills, and the replay; a CPU has no graphs and calls again."""
    if device == "cpu":
        results: dict = {}
        return results, lambda: results.update(call())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay


def rows_in_a_graph(op: str, device: str) -> None:
    """Forward and gradient of a row op, captured over zeros and replayed over other logits: the same bits."""
    g = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 24, 5003, generator=g).to(device)
    labels, mask = torch.randint(5003, (24,), generator=g).to(device), (torch.rand(24, generator=g) < 0.8).to(device)
    static = torch.zeros_like(logits)

    def call(x):
        leaf = x.detach().requires_grad_()
        out = rf.kl_divergence(leaf, other, mask) if op == "kl_divergence" else getattr(rf, op)(leaf, labels, mask=mask)
        outputs = tensors_of(out)
        (grad,) = torch.autograd.grad(sum(o.sum() for o in outputs.values()), leaf)
        return {name: o.detach() for name, o in outputs.items()} | {"grad": grad}

    want = call(logits)
    results, replay = captured(lambda: call(static), device)
    replay()
    static.copy_(logits)
    replay()
    for name, value in want.items():
        assert torch.equal(results[name], value), name


def least_numbers_are_impossible_tokens(dtype: torch.dtype, device: str) -> None:
    """Logits masked by finfo.min, a whole leading block of them or each second one, give the bits that -inf gives; so
    they do where the reference's are masked by the other of the two, and at a temperature that makes a choice greedy.
    """
    g = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 2, 5003, generator=g).to(device, dtype)
    hidden = torch.zeros(2, 5003, dtype=torch.bool, device=device)
    hidden[0, :4999], hidden[1, ::2] = True, True
    labels = torch.tensor([5001, 1], device=device)

    def results(impossible: float, to_reference: float) -> list[torch.Tensor]:
        x = logits.masked_fill(hidden, impossible).requires_grad_()
        y = other.masked_fill(hidden, to_reference)
        outputs = *rf.token_logprobs_and_entropy(x, labels), rf.kl_divergence(x, y)
        (grad,) = torch.autograd.grad(sum(o.sum() for o in outputs), x)
        greedy = rf.token_logprobs_and_entropy(x, labels, temperature=1e-12)
        (greedy_grad,) = torch.autograd.grad(sum(1e6 * o.sum() for o in greedy), x)  # as by a loss scale
        return [*(o.detach() for o in (*outputs, *greedy)), grad, greedy_grad]

    least, wants = torch.finfo(dtype).min, results(-torch.inf, -torch.inf)
    for masks in ((-torch.inf, least), (least, -torch.inf), (least, least)):
        for got, want in zip(results(*masks), wants, strict=True):
            assert want.isfinite().all() and torch.equal(got, want)


def far_rows(rows: int, vocab: int) -> tuple[int, ...]:
    """The first row, those about the 2^31st element, and the last."""
    at = min(2**31 // vocab, rows - 2)
    return tuple(dict.fromkeys((0, at, at + 1, rows - 1)))


def kl_divergence_of_many(rows: int, vocab: int, device: str) -> None:
    logits = torch.randn(rows, vocab, device=device, dtype=torch.bfloat16).requires_grad_()
    ref_logits = torch.randn(rows, vocab, device=device, dtype=torch.bfloat16)
    kl = rf.kl_divergence(logits, ref_logits)
    (grad,) = torch.autograd.grad(kl.sum(), logits)
    for row in far_rows(rows, vocab):
        x = logits[row].detach().double().requires_grad_()
        want = reference.kl_divergence(x, ref_logits[row].double())
        (want_grad,) = torch.autograd.grad(want, x)
        torch.testing.assert_close(kl[row].detach().double(), want.detach(), rtol=1e-5, atol=0)
        assert (grad[row].double() - want_grad).norm() <= 2**-8 * want_grad.norm()


def head_of_many(op: str, rows: int, width: int, vocab: int, device: str) -> None:
    """A linear op with its gradients: more logits, or more weights, than 32 bits count.

    All three have the gradient of the mean cross entropy: PPO because its ratios are 1 and its advantages too.
    """
    hidden = torch.randn(1, rows, width, device=device).bfloat16()
    weight = torch.empty(vocab, width, device=device, dtype=torch.bfloat16)
    parts = weight.split(4096)
    for part in parts:
        part.copy_(torch.randn(part.shape, device=device) / width**0.5)
    labels = torch.randint(vocab, (1, rows), device=device)
    labels[0, -1] = vocab - 1
    with torch.no_grad():
        logprobs = rf.linear_token_logprobs(hidden, weight, labels)
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    if op == "linear_ppo_loss":
        ones = torch.ones_like(logprobs)
        loss, _ = rf.linear_ppo_loss(*leaves, labels, logprobs, ones, ones.bool())
    elif op == "linear_cross_entropy":
        loss = rf.linear_cross_entropy(*leaves, labels)
    else:
        loss = -rf.linear_token_logprobs(*leaves, labels).mean()
    grad_hidden, grad_weight = torch.autograd.grad(loss, leaves)

    x, labels = hidden[0].float(), labels[0]
    lse = torch.full((rows,), -torch.inf, device=device, dtype=torch.float64)
    for part in parts:
        lse = torch.logaddexp(lse, (x @ part.float().T).double().logsumexp(-1))
    picked = (x * weight[labels].float()).sum(-1)
    torch.testing.assert_close(logprobs[0].double(), picked - lse, rtol=0.01, atol=0)
    for row in far_rows(rows, vocab):  # p W - W[label]
        want = -weight[labels[row]].double()
        for part in parts:
            want += ((part.float() @ x[row]).double() - lse[row]).exp() @ part.double()
        assert (rows * grad_hidden[0, row].double() - want).norm() <= 0.02 * want.norm(), row
    for token in (0, vocab - 1):
        dz = ((x @ weight[token].float()).double() - lse).exp() - (labels == token).double()
        want = dz @ x.double()
        assert (rows * grad_weight[token].double() - want).norm() <= 0.02 * want.norm(), token


# How many CUDA graphs each captures, and its steps
GRAPHS = {
    "llama": 2, "llama3 rope": 1, "mistral": 2, "qwen2": 1, "qwen3": 2, "gpt2": 3, "gpt_neox": 3, "smollm3": 2,
    "phi3 in part": 1, "granite": 1, "gemma": 1, "gemma2": 2, "gemma3": 1, "olmo3": 1,
    "window": 2, "window in a layer": 1,
}  # fmt: skip
STEPS = {"gpt2": 23}


def _model_and_prompts(architecture: str, device: str):
    rng = random.Random(0)
    prompts = [[rng.randrange(3, test_generation.VOCAB) for _ in range(rng.randint(1, 12))] for _ in range(23)]
    return test_generation.with_opinions(architecture).to(device), prompts


def generates_as_transformers(architecture: str, device: str) -> None:
    """Greedy, prompts padded on the left; answers end at different times, so a GPU captures its graph several times."""
    model, prompts = _model_and_prompts(architecture, device)
    want = test_generation.by_transformers(model, prompts, 40)
    options = {"max_new_tokens": 40, "eos_token_id": test_generation.EOS, "do_sample": False}
    assert generate_tokens(model, prompts, **options) == want and len({len(row) for row in want}) > 2


def bf16_generates_as_exactly_as_autocast(architecture: str, device: str) -> None:
    model, prompts = _model_and_prompts(architecture, device)
    ours, theirs = test_generation.log_probability_errors(model, prompts, bf16=True)
    assert 1e-4 < ours.square().mean().sqrt() < 1.5 * theirs.square().mean().sqrt()


def ppo_iterations(device: str, folder: Path, tolerance: float, **options) -> None:
    """The rollout's log-probabilities, those that scoring finds and those of the first update are the same numbers, as
    far as the products' precision goes; and the policy and its critic learn."""
    tokenizer = tiny_tokenizer()
    config = PPOConfig(
        output_dir=str(folder), total_episodes=32, batch_size=16, minibatch_size=8, micro_batch_size=3,
        num_ppo_epochs=2, response_length=9, learning_rate=3e-3, temperature=0.8, **options,
    )  # fmt: skip
    trainer = PPOTrainer(
        config, tiny_model(tokenizer).to(device), tokenizer=tokenizer,
        reward=lambda prompts, responses, **columns: [float(len(response)) for response in responses],
        train_dataset=[{"prompt": "say " + "word " * i} for i in range(1, 9)],
    )  # fmt: skip
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    for step, metrics in enumerate(trainer):
        assert metrics["sampling/sampling_logp_difference/max"] <= tolerance
        assert metrics["policy/first_minibatch_max_abs_log_ratio"] <= 1e-5 < metrics["policy/max_abs_log_ratio"]
        assert step or abs(metrics["objective/kl"]) <= 1e-4
    trained = [*trainer.policy.parameters(), *trainer.value_model.parameters()]
    assert all(p.isfinite().all() and p.device.type == torch.device(device).type for p in trained)
    assert all((a != b).any() for a, b in zip(before, trainer.policy.parameters(), strict=True))
