"""The tokenizer and the model that the quickstart makes from nothing."""

import pytest

from rlhf_fast.quickstart import model, task

TEXTS = ["My cat is red. What colour is my cat?", "私の帽子は赤、猫は青です。", "12足す3は15です。", "新しい字 😀\n"]


@pytest.fixture(scope="module")
def tokenizer():
    rows = task.demonstrations(0, 1500)
    return model.train_tokenizer([message["content"] for row in rows for message in row["messages"]])


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_noun_is_the_same_token_in_the_question_and_in_the_answer(tokenizer):
    question, reply = tokenizer("私の帽子は赤です。")["input_ids"], tokenizer("あなたの帽子は赤です。")["input_ids"]
    for word in ("帽子", "赤"):
        (token,) = tokenizer(word)["input_ids"]
        assert token in question
        assert token in reply


def test_a_chat_ends_every_turn_and_asks_for_the_reply(tokenizer):
    messages = [task.user("What is 3 plus 4?"), task.assistant("7.")]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>What is 3 plus 4?<|end|><|assistant|>7.<|end|>"
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>What is 3 plus 4?<|end|><|assistant|>"


def test_the_tokenizer_is_a_function_of_its_text_and_loads_again(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token, loaded.eos_token) == (model.PAD, model.END)


def test_the_model_is_tiny_and_a_function_of_the_seed(tokenizer):
    first, same, other = (model.tiny_llama(tokenizer, seed) for seed in (0, 0, 1))
    assert 0.5e6 < sum(p.numel() for p in first.parameters()) < 2e6
    assert first.lm_head.weight.equal(same.lm_head.weight)
    assert not first.lm_head.weight.equal(other.lm_head.weight)
