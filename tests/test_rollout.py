import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast.rollout import generate_tokens, pad, sample

EOS, VOCAB = 2, 60


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.mul_(20)  # a random model is nearly uniform; this one has opinions
    return model


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 12))] for _ in range(23)]


def sampled(model, prompts, batch_size=64, seed=0, **options):
    options = {"max_new_tokens": 16, "eos_token_id": EOS, **options}
    return generate_tokens(
        model, prompts, batch_size=batch_size, generator=torch.Generator().manual_seed(seed), **options
    )


@pytest.mark.parametrize("batch_size", [5, 64])
def test_greedy_equals_transformers(model, prompts, batch_size):
    ours = sampled(model, prompts, batch_size, do_sample=False)
    ids, mask = pad(prompts, 0, left=True)
    theirs = model.eval().generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=16, do_sample=False, eos_token_id=EOS, pad_token_id=0
    )
    for row, expected in zip(ours, theirs[:, ids.shape[1] :].tolist(), strict=True):
        assert row == expected[: len(row)]
        assert set(expected[len(row) :]) <= {0} and (row[-1] == EOS or len(row) == 16)


def test_an_answer_does_not_depend_on_its_batch(model, prompts):
    together = sampled(model, prompts)
    assert len({len(row) for row in together}) > 1  # some rows left the batch early, so compaction was at work
    assert together == sampled(model, prompts, batch_size=4)
    assert together[:9] == sampled(model, prompts[:9])
    assert together != sampled(model, prompts, seed=1)


def test_eos_is_the_last_token_and_appears_once(model, prompts):
    for row in sampled(model, prompts, max_new_tokens=40):
        assert EOS not in row[:-1] and 1 <= len(row) <= 40
        assert row[-1] == EOS or len(row) == 40


def test_sampled_frequencies_are_the_softmax_at_the_temperature():
    logits = torch.tensor([1.0, 0.0, -1.0, -torch.inf])
    uniforms = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits.expand(len(uniforms), -1), uniforms, temperature=0.5)
    frequencies = torch.bincount(tokens, minlength=4) / len(uniforms)
    torch.testing.assert_close(frequencies, torch.softmax(logits / 0.5, -1), atol=0.005, rtol=0)
    assert frequencies[3] == 0


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    uniforms = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    counts = lambda top_p: torch.bincount(sample(logits.expand(1000, -1), uniforms, top_p=top_p), minlength=3)  # noqa: E731
    assert counts(0.45).tolist() == [0, 1000, 0]
    assert counts(0.6)[0] == 0 and abs(counts(0.6)[1] - 625) <= 1  # 0.5 / 0.8
    assert (counts(0.9) > 0).all()


def test_the_mode_of_the_model_is_as_before(model, prompts):
    model.train()
    sampled(model, prompts[:2])
    assert model.training
    model.eval()


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"batch_size": 0}])
def test_wrong_options_are_refused(model, prompts, wrong):
    with pytest.raises(ValueError, match="generate: needs"):
        sampled(model, prompts, **wrong)


def test_an_empty_prompt_is_named(model):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        sampled(model, [[5], []])
