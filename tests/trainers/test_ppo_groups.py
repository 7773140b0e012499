"""Several responses to a prompt: it is computed once for all of them, and nothing else changes."""

from contextlib import nullcontext

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_fast.data.formats import Prompt
from rlhf_fast.packing import packed_hidden_states, packing
from rlhf_fast.rollout import make_rollout, minibatches, packed_rows, right_padded, shared_prompts
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer
from rlhf_fast.trunk import hidden_states_at

WORDS = ("one", "two", "three", "four", "cat", "sat", "on", "mat")
LONG = [{"prompt": " ".join([f"say {word}", *WORDS[:k] * 3])} for k, word in enumerate(WORDS)]  # 2 to 23 words


def score(prompts, responses, **columns):
    return [len(set(response)) / 10 + (sum(map(ord, response)) % 97) / 970 for response in responses]


def make_trainer(tmp_path, model=None, prompts=LONG, **options):
    tokenizer = tiny_tokenizer()
    defaults = {
        "output_dir": str(tmp_path), "total_episodes": 64, "batch_size": 32, "minibatch_size": 16, "num_generations": 4,
        "advantage_estimator": "group", "scale_advantages": "group", "response_length": 7, "num_ppo_epochs": 2,
        "temperature": 0.8, "learning_rate": 3e-3,
    }  # fmt: skip
    model = tiny_model(tokenizer) if model is None else model
    return PPOTrainer(
        PPOConfig(**(defaults | options)), model, tokenizer=tokenizer, reward=score, train_dataset=prompts
    )


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer()), **sizes, attn_pdrop=0.0, resid_pdrop=0.0))


def gpt_neox():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tiny_tokenizer()), max_position_embeddings=64, **sizes))


def a_rollout(trainer, mask=None):
    """Four responses of 1 to 7 tokens to each of four prompts, two of which are short."""
    prompts = [trainer.prompts[i] for i in (0, 3, 5, 7) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    answers = [torch.randint(3, 20, (1 + i % 7,), generator=generator).tolist() for i in range(16)]
    return make_rollout(trainer.tokenizer, prompts, answers, env_mask=mask and [mask(row) for row in answers])


@pytest.mark.parametrize(
    "build", [lambda: tiny_model(tiny_tokenizer()), gpt2, gpt_neox], ids=["llama", "gpt2", "gpt_neox"]
)
@pytest.mark.parametrize("tool", [False, True])
def test_the_hidden_states_are_those_of_a_row_for_each_response(tmp_path, build, tool):
    """llama and gpt2 run in trunk.py, gpt_neox through transformers. A tool's tokens are read and not learned."""
    trainer = make_trainer(tmp_path, build())
    mask = (lambda row: [j % 3 != 1 or len(row) < 3 for j in range(len(row))]) if tool else None
    rollout, rows = a_rollout(trainer, mask), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    rows = torch.cat([torch.arange(8), rows[rows > 7]])  # two groups as they are, the others out of order
    row, where, labels = packed_rows(rollout, rows)
    ids, positions, expected_labels = right_padded(rollout, rows)
    assert torch.equal(labels, expected_labels) and (where.diff() > 0).all()
    tokens = rollout.lengths[rows].sum() - len(rows)  # the last token of each predicts nothing
    longest = int(rollout.prompt_mask[4:8].sum(1)[0])
    assert longest > 10 and row.input_ids.shape[1] <= tokens - 3 * (longest - 1) * (longest > 16)
    seen = []
    for context, read, *inputs in (
        (packing(trainer.policy), packed_hidden_states, row, where),
        (nullcontext(), hidden_states_at, ids, positions),
    ):
        with context:
            hidden = read(trainer.policy, *inputs)
            (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        seen.append([hidden.detach(), *(p.grad for p in trainer.policy.parameters() if p.grad is not None)])
        trainer.policy.zero_grad()
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_row_holds_each_prompt_once(tmp_path):
    trainer = make_trainer(tmp_path)
    rollout = a_rollout(trainer)
    row = packed_rows(rollout, torch.arange(16))[0]
    of_prompts, of_responses = rollout.prompt_mask.sum(1).tolist(), rollout.response_mask.sum(1).tolist()
    shared = [0 if i % 4 == 0 or of_prompts[i] <= 16 else of_prompts[i] - 1 for i in range(16)]
    assert min(shared) == 0 and max(shared) > 16
    lengths = [p + r - 1 - s for p, r, s in zip(of_prompts, of_responses, shared, strict=True)]
    assert row.lengths == lengths and row.input_ids.shape == (1, sum(lengths))
    assert [n for _, n in row.prefixes] == shared and row.prefixes[15] == (12, shared[15])
    assert shared_prompts(rollout, 4).tolist() == shared


def test_a_prompt_of_17_tokens_is_shared_and_one_of_16_is_not():
    prompts = [Prompt("", list(range(3, 3 + n)), {}) for n in (16, 16, 17, 17)]
    rollout = make_rollout(tiny_tokenizer(), prompts, [[5]] * 4)
    row = packed_rows(rollout, torch.arange(4))[0]
    assert [n for _, n in row.prefixes] == shared_prompts(rollout, 2).tolist() == [0, 0, 0, 16]


@pytest.mark.parametrize("options", [
    {}, {"advantage_estimator": "gae", "scale_advantages": "batch"},
    {"advantage_estimator": "gae", "scale_advantages": "batch", "share_trunk": True}, {"micro_batch_size": 8},
    {"micro_batch_size": 3}, {"micro_batch_tokens": 100}, {"lora_r": 2}, {"bf16": True},
], ids=str)  # fmt: skip
def test_a_run_is_that_of_a_row_for_each_response(tmp_path, options, monkeypatch):
    monkeypatch.setattr("rlhf_fast.trainers.common.bf16_supported", lambda device: True)
    runs, saved = [], tmp_path / "base"  # adapters need a base that is saved
    tiny_model(tiny_tokenizer()).save_pretrained(saved)
    for alone in (False, True):
        with monkeypatch.context() as patch:
            if alone:
                patch.setattr("rlhf_fast.trainers.ppo.packs", lambda *_: False)
            trainer = make_trainer(tmp_path, saved if "lora_r" in options else None, **options)
        assert trainer.packed is not alone
        read = []  # tokens, in generation too
        trainer.policy.get_input_embeddings().register_forward_pre_hook(
            lambda _, x, read=read: read.append(x[0].numel())
        )
        metrics = next(iter(trainer))
        assert metrics["policy/first_minibatch_max_abs_log_ratio"] == 0.0
        runs.append(({k: float(v) for k, v in metrics.items() if not k.startswith(("timing", "perf"))}, sum(read)))
    (ours, few), (theirs, many) = runs
    tolerance = 2e-2 if options.get("bf16") else 2e-4
    assert ours == pytest.approx(theirs, rel=10 * tolerance, abs=tolerance)
    assert few < (0.97 if "micro_batch_tokens" in options else 0.8) * many  # few rows fit into 100 tokens


def test_groups_stay_together():
    lengths = torch.tensor([9, 3, 4, 2, 8, 8, 1, 5, 6, 7, 2, 2])
    generator, none = torch.Generator().manual_seed(0), torch.zeros(12, dtype=torch.int64)
    plan = minibatches(lengths, 8, 5, generator=generator, group=4, shared=none)
    assert [[len(rows) for rows in minibatch] for minibatch in plan] == [[4, 4], [4]]
    groups = [rows.tolist() for minibatch in plan for rows in minibatch]
    assert sorted(groups) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] != groups
    (minibatch,) = minibatches(lengths, 12, 6, group=4, shared=none)
    assert [len(rows) for rows in minibatch] == [4, 4, 4]
    # With padding the rows of a minibatch of whole groups are sorted by length.
    first, second = minibatches(lengths, 8, 4, group=4)
    assert [lengths[rows].tolist() for rows in first] == [[9, 8, 8, 5], [4, 3, 2, 1]] and len(second) == 1


def test_the_tokens_of_a_micro_batch_are_counted_as_they_are_packed():
    lengths, none = torch.tensor([9, 3, 4, 2, 8, 8, 1, 5, 6, 7, 2, 2]), torch.zeros(12, dtype=torch.int64)

    def split(tokens, shared=none, **options):
        (minibatch,) = minibatches(lengths, 12, micro_batch_tokens=tokens, group=4, shared=shared, **options)
        assert sorted(torch.cat(minibatch).tolist()) == list(range(12))
        return [rows.tolist() for rows in minibatch]

    assert split(57) == [list(range(12))]
    # The groups have 18, 22 and 17 tokens: whole ones if two have room, else as many rows as have.
    assert split(40) == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11]]
    assert split(39) == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert split(21) == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10], [11]]
    assert split(8) == [[0], [1, 2], [3], [4], [5], [6, 7], [8], [9], [10, 11]]
    assert split(40, micro_batch_size=5) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    # A group that was split ends a micro-batch, and the next one ends where a group does.
    wide = torch.tensor([30] * 4 + [10] * 4 + [8] * 4)
    (minibatch,) = minibatches(wide, 12, micro_batch_tokens=91, group=4, shared=none)
    assert [len(rows) for rows in minibatch] == [3, 5, 4]
    # What a row shares with the one before it is not there, unless it is the first of its micro-batch.
    shared = torch.tensor([0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1])
    assert split(51, shared) == [list(range(12))] and len(split(50, shared)) == 2
    alone = torch.tensor([0, 8, 8, 8])
    for tokens, expected in ((12, [[0, 1], [2, 3]]), (11, [[0], [1], [2], [3]])):
        (minibatch,) = minibatches(torch.full((4,), 10), 4, micro_batch_tokens=tokens, group=4, shared=alone)
        assert [rows.tolist() for rows in minibatch] == expected


def packed_and_padded(rollout, plan):
    """The tokens of each micro-batch: packed, and with padding."""
    rows = [rows for minibatch in plan for rows in minibatch]
    packed = [packed_rows(rollout, some)[0].input_ids.shape[1] for some in rows]
    return packed, [len(some) * int(rollout.lengths[some].max()) for some in rows]


def test_no_more_tokens_are_packed_than_were_counted(tmp_path):
    """The longest micro-batch is one of them; a shared prompt counts once."""
    trainer = make_trainer(tmp_path, micro_batch_tokens=100)
    rollout = trainer._rollout(trainer._next_prompts(), torch.Generator().manual_seed(0))
    packed, padded = packed_and_padded(rollout, trainer._minibatches(rollout, None, 4))
    assert max(packed) <= 100 < max(padded)


def test_a_prompt_counts_again_where_a_minibatch_has_the_rest_of_its_group():
    prompts = [Prompt("", list(range(3, 3 + n)), {}) for n in (20, 30, 40) for _ in range(3)]
    rollout = make_rollout(tiny_tokenizer(), prompts, [[5, 6]] * 9)
    plan = minibatches(rollout.lengths, 4, micro_batch_tokens=66, group=3, shared=shared_prompts(rollout, 3))
    # The second minibatch would pack 42 + 3 + 32 + 3 tokens: the first of the second group is in the minibatch before.
    assert [[rows.tolist() for rows in minibatch] for minibatch in plan][1:] == [[[6, 7], [4, 5]], [[8]]]
    assert max(packed_and_padded(rollout, plan)[0]) <= 66


def test_prompts_that_an_engine_has_changed_are_counted_one_by_one(tmp_path):
    trainer = make_trainer(tmp_path, micro_batch_tokens=100)
    read = [list(range(5 + i, 25 + i)) for i in range(32)]  # as after a first turn, which differs
    rollout = make_rollout(trainer.tokenizer, trainer._next_prompts(), [[5, 6, 7]] * 32, prompt_ids=read)
    assert max(packed_and_padded(rollout, trainer._minibatches(rollout, None, 4))[0]) <= 100


def test_what_cannot_be_packed_is_said(tmp_path, recwarn):
    assert make_trainer(tmp_path).packed and not recwarn.list
    AttentionInterface.register("another", lambda *arguments, **options: sdpa_attention_forward(*arguments, **options))
    model = tiny_model(tiny_tokenizer())
    model.config._attn_implementation = "another"
    with pytest.warns(UserWarning, match="responses are padded, .* prompt again: LlamaForCausalLM uses another"):
        assert not make_trainer(tmp_path, model).packed
