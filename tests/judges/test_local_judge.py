"""Label scoring against the slow and obvious way, and what a judge must keep whatever its model thinks."""

import inspect
import math
import re

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from rlhf_fast.judges import Answer, Constitution, LocalJudge, ModelCheck, Pair, Principle, Reply, RuleCheck
from rlhf_fast.judges.layouts import COMPARE_LABELS, compare_question, render_turns
from rlhf_fast.judges.scoring import _batches, encode, label_logprobs

ASK = [{"role": "user", "content": "say hello"}]
KIND = Principle("kind", compare="Choose the kinder reply.")
SHORT = Principle("short", compare="Choose the shorter reply.", weight=3.0)
PAIRS = [("hello", "go away"), ("hello hello hello hello hello", "what"), ("the cat", "the mat sat on the cat")]


def constitution(*principles, **fields):
    return Constitution("test", principles or (KIND, SHORT), **fields)


def judge(model, tokenizer, layout="anthropic", **fields):
    shots = ({"conversation": ASK, "better": "hello", "worse": "no"},) * 2
    return LocalJudge(
        model, tokenizer, constitution(compare_layout=layout, compare_few_shots=shots), min_label_mass=0.0, **fields
    )


def scripted(judge, logprobs):
    """In place of the model: prompt -> (log p(A), log p(B)), or None where only the prompt matters."""

    def score(request):
        scores = logprobs(request["prompt"]) or (-1.0, -1.0)
        return Answer("ok", {"logprobs": list(scores), "mass": sum(map(math.exp, scores)), "kind": "exact"})

    judge.backend._scores = lambda requests: list(map(score, requests))


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer, max_position_embeddings=2048)


def small(config_class, **fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_class(vocab_size=300, max_position_embeddings=2048, **sizes, **fields)
    config.pad_token_id = None
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=["separate", "merged"])
def any_tokenizer(request):
    """Labels of equal length, and labels of which one is a single token and the other is several."""
    tokenizer = tiny_tokenizer()
    if request.param == "merged":
        tokenizer.add_tokens([" (A)"])
        lengths = [len(tokenizer(label)["input_ids"]) for label in (" (A)", " (B)")]
        assert lengths[0] == 1 < lengths[1]
    return tokenizer


@torch.no_grad()
def naive_logprob(model, prompt_and_label, other):
    """One sequence through the whole model; the label is where it stops agreeing with the other sequence."""
    start = next(i for i, (x, y) in enumerate(zip(prompt_and_label, other, strict=False)) if x != y)
    logprobs = model(torch.tensor([prompt_and_label])).logits[0].log_softmax(-1)
    return sum(logprobs[i - 1, prompt_and_label[i]].item() for i in range(start, len(prompt_and_label)))


def test_label_scores_are_the_naive_ones(any_tokenizer):
    model = tiny_model(any_tokenizer)
    prompts = ["the answer is:", "x", "what is two plus two? the answer is:", "the cat"]
    questions = [[encode(any_tokenizer, p + label, True) for label in (" (A)", " (B)")] for p in prompts]
    expected = [[naive_logprob(model, a, b), naive_logprob(model, b, a)] for a, b in questions]
    for budget in (1, 40, 10_000):  # one row a batch, some, all
        torch.testing.assert_close(
            torch.tensor(label_logprobs(model, questions, budget)), torch.tensor(expected), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("tails", [[[5], [6, 7, 8], [6, 9, 9]], [[6, 7], [4, 7], [3, 7]]])
def test_a_label_that_ends_where_others_go_on(model, tails):
    """The row of the one-token label is the beginning of the other two, so what they share must stop before its end;
    and always before the last token of the prefix, where the first token of a label is read."""
    prefix = list(range(100, 140))
    with torch.no_grad():
        logprobs = [model(torch.tensor([prefix + tail])).logits[0].log_softmax(-1) for tail in tails]
    expected = [
        sum(lp[len(prefix) - 1 + i, token].item() for i, token in enumerate(tail))
        for lp, tail in zip(logprobs, tails, strict=True)
    ]
    (got,) = label_logprobs(model, [[prefix + tail for tail in tails]], 10_000)
    assert got == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="question 1: needs labels that differ after a prefix"):
        label_logprobs(model, [[[1, 2], [1, 3]], [[1, 2], [1, 2, 3]]], 10_000)


def test_a_capped_head_is_read_with_its_cap():
    config = {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 0.05}
    model, question = small(Gemma2Config, **config), [[100, 101, 5], [100, 101, 6]]
    (got,) = label_logprobs(model, [question], 100)
    assert got == pytest.approx((naive_logprob(model, *question), naive_logprob(model, *question[::-1])), abs=1e-5)
    model.config.final_logit_softcapping = None
    assert got != pytest.approx(label_logprobs(model, [question], 100)[0], abs=1e-3)


def test_a_batch_has_no_more_cells_than_its_budget():
    rows = [(1,) * n for n in (1, 3, 3, 2, 9)]
    assert [list(map(len, batch)) for batch in _batches(rows, 6)] == [[9], [3, 3], [2, 1]]


@pytest.mark.parametrize("layout", ["anthropic", "principle_last"])
@pytest.mark.parametrize(
    "model",
    [
        lambda: small(LlamaConfig, num_key_value_heads=2),
        lambda: small(Qwen3Config, num_key_value_heads=2, head_dim=8),
        lambda: small(MistralConfig, num_key_value_heads=2, sliding_window=64),
        lambda: small(GPT2Config),
    ],
    ids=["llama", "qwen3", "mistral-sliding-window", "gpt2"],
)
def test_what_questions_share_is_computed_once_and_changes_nothing(model, layout, tokenizer):
    model, cells = model(), []
    principles = [
        Principle(f"p{i}", compare=f"Choose the reply that has more {word}.") for i, word in enumerate("xyzuvw")
    ]
    this = judge(model, tokenizer, layout)
    questions = []
    scripted(
        this, lambda prompt: questions.append([encode(tokenizer, prompt + label, True) for label in COMPARE_LABELS])
    )
    this.compare([Pair(ASK, a, b, principles) for a, b in PAIRS])
    assert len(questions) == 2 * len(PAIRS) * len(principles)

    expected = torch.tensor([[naive_logprob(model, a, b), naive_logprob(model, b, a)] for a, b in questions])
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: cells.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for budget in (1, 100_000):
        cells.clear()
        got = torch.tensor(label_logprobs(model, questions, budget))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    naive = sum(len(sequence) for question in questions for sequence in question) / 2  # one row a question
    assert sum(cells) < naive / {"anthropic": 2.5, "principle_last": 8}[layout]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.filterwarnings("error:.*past_key_values. is deprecated:FutureWarning")
def test_the_cache_is_passed_by_the_name_that_the_model_has_for_it(model, name, monkeypatch):
    """transformers 5.24 renamed the argument. Models that came with their own code keep the name they were written
    with, and one that takes **kwargs would ignore the other."""
    forward, seen = model.base_model.forward, []
    (theirs,) = {"past_key_values", "cache"} & {*inspect.signature(forward).parameters}

    def run(given, input_ids, position_ids, use_cache):
        seen.append(given)
        given = {} if given is None else {theirs: given}
        return forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache, **given)

    def before(input_ids, position_ids, past_key_values=None, use_cache=None, **ignored):
        return run(past_key_values, input_ids, position_ids, use_cache)

    def after(input_ids, position_ids, cache=None, use_cache=None, **ignored):
        return run(cache, input_ids, position_ids, use_cache)

    shared = list(range(100, 140))
    questions = [[[*shared, n, 5], [*shared, n, 6]] for n in range(10, 14)]
    expected = [[naive_logprob(model, a, b), naive_logprob(model, b, a)] for a, b in questions]
    monkeypatch.setattr(model.base_model, "forward", {"past_key_values": before, "cache": after}[name])
    got = label_logprobs(model, questions, 10_000)
    assert any(cache is not None for cache in seen)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=0, atol=1e-5)


def test_a_model_with_a_recurrent_state_is_scored_without_sharing():
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    config = Lfm2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    shared = list(range(100, 140))
    questions = [[[*shared, n, 5], [*shared, n, 6, 7, n]] for n in range(10, 14)]
    expected = torch.tensor([[naive_logprob(model, a, b), naive_logprob(model, b, a)] for a, b in questions])
    for budget in (1, 100_000):
        got = torch.tensor(label_logprobs(model, questions, budget))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["anthropic", "principle_last", "chat"])
def test_swapping_the_replies_negates_every_logit(model, tokenizer, layout):
    this = judge(model, tokenizer, layout)
    forward = this.compare([Pair(ASK, a, b, [KIND, SHORT]) for a, b in PAIRS])
    backward = this.compare([Pair(ASK, b, a, [KIND, SHORT]) for a, b in PAIRS])
    for ab, ba in zip(forward, backward, strict=True):
        assert ab.status == "ok" and ab.logit != 0
        assert ab.logit == pytest.approx(-ba.logit, abs=1e-6)
        for v, w in zip(ab.votes, ba.votes, strict=True):
            assert (v.logit_ab, v.logit_ba) == pytest.approx((-w.logit_ba, -w.logit_ab), abs=1e-6)


def test_the_verdict_is_the_weighted_mean_of_the_votes(model, tokenizer):
    (verdict,) = judge(model, tokenizer).compare([Pair(ASK, *PAIRS[0], [KIND, SHORT])])
    kind, short = verdict.votes
    assert verdict.logit == pytest.approx((kind.logit + 3 * short.logit) / 4)
    assert kind.logit == (kind.logit_ab + kind.logit_ba) / 2
    assert 0 < kind.label_mass < 1


def test_dropout_plays_no_part_and_the_mode_stays(tokenizer):
    model = tiny_model(tokenizer, max_position_embeddings=2048, attention_dropout=0.5).train()
    ask = [Pair(ASK, *PAIRS[0], [KIND])]
    this = judge(model, tokenizer)
    assert this.compare(ask) == this.compare(ask) and model.training


def test_a_model_that_scales_its_logits_is_read_with_its_factor(tokenizer):
    model = small(CohereConfig, num_key_value_heads=2, logit_scale=0.2)
    questions = [[encode(tokenizer, "the answer is:" + label, True) for label in (" (A)", " (B)")]]
    expected = [naive_logprob(model, *questions[0]), naive_logprob(model, *questions[0][::-1])]
    assert label_logprobs(model, questions, 10_000) == [pytest.approx(expected, abs=1e-5)]


def test_a_model_with_more_than_an_lm_head_is_refused(tokenizer):
    with pytest.raises(ValueError, match="lm_head"):
        judge(small(BertConfig, is_decoder=True), tokenizer)


def test_a_reply_against_itself_is_exactly_even(model, tokenizer):
    (verdict,) = judge(model, tokenizer).compare([Pair(ASK, "hello", "hello", [KIND, SHORT])])
    assert verdict.logit == 0 and verdict.order_gap != 0  # the random model prefers a position, the mean cancels it


def test_a_planted_order_bias_is_found_and_cancelled(model, tokenizer):
    """A judge that knows the truth s and adds b to whatever stands first."""
    truth, bias = {"hello": 1.5, "go away": -0.5}, 2.0

    def score(prompt):
        a, b = (prompt.rsplit(f" ({x}) [[[", 1)[1].split("]]]")[0] for x in "AB")
        logit = truth[a] - truth[b] + bias
        return tuple(-math.log1p(math.exp(-sign * logit)) for sign in (1, -1))

    this = judge(model, tokenizer)
    scripted(this, score)
    for a, b in (("hello", "go away"), ("go away", "hello")):
        (verdict,) = this.compare([Pair(ASK, a, b, [KIND])])
        assert verdict.logit == pytest.approx(truth[a] - truth[b])
        assert verdict.order_gap == pytest.approx(2 * bias)
        assert verdict.votes[0].label_mass == pytest.approx(1)


def test_what_cannot_be_answered_says_so(tokenizer):
    model = tiny_model(tokenizer, max_position_embeddings=256)
    long, strict = "the cat " * 300, LocalJudge(model, tokenizer, constitution(), min_label_mass=0.5)
    answers = strict.compare([Pair(ASK, "hello", long, [KIND]), Pair(ASK, "hello", "no", [KIND])])
    assert [v.status for v in answers] == ["too_long", "unparsed"]
    assert "256" in answers[0].reason and "0.5" in answers[1].reason
    asked = Principle("asked", check=ModelCheck("Is it rude?"))
    (checks,), (short,) = strict.check([Reply(ASK, long, [asked])]), strict.check([Reply(ASK, "no", [asked])])
    assert (checks[0].status, short[0].status) == ("too_long", "unparsed")
    assert checks[0].satisfied is short[0].satisfied is None


def test_labels_need_their_mass_in_both_orders(model, tokenizer):
    """0.9 in one order does not make up for 0.01 in the other."""
    this = LocalJudge(model, tokenizer, constitution(), min_label_mass=0.1)
    scripted(this, lambda prompt: [math.log((0.45 if " (A) [[[hello" in prompt else 0.005) * p) for p in (1.2, 0.8)])
    (verdict,) = this.compare([Pair(ASK, "hello", "no", [KIND])])
    assert verdict.status == "unparsed" and "label mass 0.01 is below 0.1" in verdict.reason


@pytest.mark.parametrize("least", [0.1, 0.0])
def test_a_model_that_gives_nan_says_nothing(model, tokenizer, least):
    this = LocalJudge(model, tokenizer, constitution(), min_label_mass=least)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    ((check,),) = this.check([Reply(ASK, "hello", [Principle("asked", check=ModelCheck("Is it rude?"))])])
    assert (check.status, check.satisfied, check.score) == ("unparsed", None, None) and "nan" in check.reason
    (verdict,) = this.compare([Pair(ASK, "hello", "no", [KIND])])
    assert verdict.status == "unparsed" and "nan" in verdict.reason


def test_nan_in_one_order_is_no_vote(model, tokenizer):
    this = LocalJudge(model, tokenizer, constitution(), min_label_mass=0.1)
    scripted(this, lambda prompt: [math.log(0.5) if " (A) [[[hello" in prompt else math.nan] * 2)
    (verdict,) = this.compare([Pair(ASK, "hello", "no", [KIND])])
    assert verdict.status == "unparsed"


def test_checks_are_yes_against_no(model, tokenizer):
    asked = {v: Principle(f"if-{v}", check=ModelCheck("Is it rude?", v)) for v in ("yes", "no")}
    ruled = Principle("ruled", check=RuleCheck("any", {}, lambda c, y: len(y) < 3))
    (checks,) = judge(model, tokenizer).check([Reply(ASK, "hello", [asked["yes"], ruled, asked["no"]])])
    if_yes, by_rule, if_no = checks
    assert if_yes.score == pytest.approx(1 - if_no.score) and 0 < if_yes.score < 1
    assert if_yes.satisfied == (if_yes.score > 0.5) and by_rule.satisfied is False


def test_a_threshold_moves_the_check(model, tokenizer):
    def satisfied(threshold):
        asked = Principle("asked", check=ModelCheck("Is it rude?", "yes", threshold))
        return judge(model, tokenizer).check([Reply(ASK, "hello", [asked])])[0][0].satisfied

    assert (satisfied(0.999), satisfied(0.001)) == (True, False)


def test_few_shots_stand_in_front_in_the_same_format(model, tokenizer):
    seen = []
    this = judge(model, tokenizer)
    scripted(this, seen.append)
    this.compare([Pair(ASK, "a1", "b1", [KIND])])
    question = compare_question(ASK, "a1", "b1", KIND.compare)
    assert seen[0].endswith(question + "\n\nThe answer is:") and seen[0].count("The answer is: (") == 2
    answers = [shot[0] for shot in seen[0].split("The answer is: (")[1:]]
    for shot, answer in zip(seen[0].split("The answer is: (")[:2], answers, strict=True):
        assert f" ({answer}) [[[hello]]]" in shot  # the label given is that of the better reply


def test_a_japanese_constitution_is_put_in_japanese(model, tokenizer):
    """Between the texts of others stands no English: comparisons, their few-shots, checks and rationales."""
    ask = [{"role": "user", "content": "こんにちは"}, {"role": "assistant", "content": "はい"}, *ASK]
    ask[-1] = {"role": "user", "content": "数を言ってください"}
    kind = Principle("kind", compare="親切なほうの返答を選んでください。", check=ModelCheck("失礼ですか。"))
    shots = ({"conversation": ask, "better": "七です", "worse": "いやです"},)
    seen = []
    for layout in ("anthropic", "principle_last", "chat"):
        for cot_tokens in (0, 2):
            fields = {"language": "ja", "compare_layout": layout, "compare_few_shots": shots}
            this = LocalJudge(
                model, tokenizer, Constitution("ja", (kind,), **fields), min_label_mass=0.0, cot_tokens=cot_tokens
            )
            this.backend._texts = lambda requests: [
                seen.append(r["prompt"]) or Answer("ok", {"text": "長いほうです"}) for r in requests
            ]
            scripted(this, seen.append)
            (verdict,) = this.compare([Pair(ask, "七", "八", [kind])])
            ((check,),) = this.check([Reply(ask, "七", [kind])])
            assert verdict.votes and check.status == "ok"
    for prompt in seen:
        words = re.sub(r"<\|\w+\|>|<eos>|\([AB]\)", "", prompt)
        assert not re.search("[A-Za-z]", words) and "人間: こんにちは" in prompt and "アシスタント: はい" in prompt
    assert sum("親切" in p and "答えは:" in p for p in seen) and sum("順を追って" in p for p in seen)
    assert any(p.endswith("失礼ですか。\n (A) はい\n (B) いいえ\n\n答えは:") for p in seen)


def test_yes_is_the_first_label_in_every_language(model, tokenizer):
    asked = Principle("asked", check=ModelCheck("失礼ですか。", "yes"))
    this = LocalJudge(model, tokenizer, Constitution("ja", (asked,), language="ja"), min_label_mass=0.0)
    scripted(this, lambda prompt: (-0.1, -3.0))  # はい
    ((check,),) = this.check([Reply(ASK, "hello", [asked])])
    assert check.satisfied is False and check.score == pytest.approx(1 / (1 + math.exp(2.9)))


def test_an_end_token_that_the_tokenizer_adds_is_left_out(tokenizer):
    class Closing:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, add_special_tokens):
            ids = tokenizer(text)["input_ids"]
            return {"input_ids": [*ids, self.eos_token_id] if add_special_tokens else ids}

    assert (
        encode(Closing(), "the cat", True) == encode(Closing(), "the cat", False) == tokenizer("the cat")["input_ids"]
    )
    assert encode(Closing(), "", True) == [tokenizer.eos_token_id]  # else nothing would be left to read


def test_transcripts_name_the_speakers():
    turns = [("Human", "hi"), ("Assistant", " two\n\nlines")]
    assert render_turns(turns) == "\n\nHuman: hi\n\nAssistant:  two\n\nlines"
