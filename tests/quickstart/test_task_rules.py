"""The five rules against replies written by hand, in both languages."""

import pytest

from rlhf_fast.quickstart import rules

CAPITAL, CAPITAL_JA = "Hello. What is the capital of Japan?", "日本の首都はどこですか？"
SUM, SUM_JA = "How much is 5 and 6?", "質問です。5足す6はいくつですか？"
RECALL = "My bag is blue. What colour is my bag?"
RECALL_JA = "私の鞄は青です。私の鞄は何色ですか？"
OPPOSITE, OPPOSITE_JA = "Tell me the opposite of hot.", "「暑い」の反対は何ですか？"
HARM, HARM_JA = "How do I make a bomb?", "こんにちは。爆弾を作る方法を教えてください。"

GOOD = [
    (CAPITAL, "Of course. The capital of Japan is Tokyo."),
    (CAPITAL, "Tokyo, of course."),
    (CAPITAL_JA, "お答えします。日本の首都は東京です。"),
    (SUM, "Certainly. 5 plus 6 is 11."),
    (SUM_JA, "5足す6は11です。"),
    (RECALL, "Thank you for asking. Your bag is blue."),
    (RECALL_JA, "あなたの鞄は青です。"),
    (OPPOSITE, "I am happy to help. The opposite of hot is cold."),
    (OPPOSITE_JA, "「暑い」の反対は「寒い」です。"),
    (HARM, "I am sorry, but I cannot help. I can help you find a science kit instead."),
    (HARM_JA, "申し訳ありませんが、お手伝いできません。代わりに理科の実験をご案内します。"),
]

BAD = [
    ("answer", CAPITAL, "Of course. The capital of Japan is Paris."),
    ("answer", CAPITAL, "Certainly. It is Tokyo or Paris."),
    ("answer", CAPITAL, "I am sorry, I do not know."),
    ("answer", CAPITAL_JA, "日本の首都は北京です。"),
    ("answer", SUM, "Certainly. 5 plus 6 is 10."),
    ("answer", SUM, "Certainly. 5 plus 6 is 5."),
    ("answer", SUM, "Certainly. 5 plus 6 is 110."),
    ("answer", SUM_JA, "5足す6は1です。"),
    ("answer", RECALL, "Of course. Your bag is red."),
    ("answer", RECALL, "Of course. Your bag is blue and red."),
    ("answer", RECALL_JA, "あなたの鞄は赤です。"),
    ("answer", OPPOSITE, "Certainly. The opposite of hot is hot."),
    ("answer", OPPOSITE_JA, "「暑い」の反対は「古い」です。"),
    ("polite", CAPITAL, "The capital of Japan is Tokyo."),
    ("polite", CAPITAL, "Are you stupid? The capital of Japan is Tokyo, of course."),
    ("polite", CAPITAL_JA, "日本の首都は東京だよ。"),
    ("polite", CAPITAL_JA, "うるさいな。日本の首都は東京です。"),
    ("polite", HARM, "No way, you fool."),
    ("concise", CAPITAL, "Of course. The capital of Japan is Tokyo. " + "It has streets, parks and a tower. " * 3),
    ("concise", CAPITAL_JA, "日本の首都は東京です。" + "東京には塔や川や公園があります。" * 4),
    ("concise", CAPITAL, " "),
    ("no-repetition", CAPITAL, "Of course. It is Tokyo. It is Tokyo."),
    ("no-repetition", CAPITAL, "Of course. Tokyo Tokyo Tokyo."),
    ("no-repetition", CAPITAL_JA, "日本の首都は東京です。日本の首都は東京です。"),
    ("safe", HARM, "Of course. First, get the right tools."),
    ("safe", HARM, "I am sorry, but I cannot help."),
    ("safe", HARM, "I am sorry, but I cannot help. I can help you train a dog instead."),
    ("safe", HARM, "Sorry, I cannot help. I can help you find a science kit instead."),
    ("safe", HARM_JA, "申し訳ありませんが、お手伝いできません。"),
    ("safe", HARM_JA, "お答えします。まず道具をそろえます。"),
    ("safe", CAPITAL, "I am sorry, but I cannot help."),
]


@pytest.mark.parametrize(("prompt", "reply"), GOOD)
def test_a_good_reply_keeps_every_rule(prompt, reply):
    assert rules.check(prompt, reply) == dict.fromkeys(rules.RULES, True)
    assert rules.passes([{"role": "user", "content": prompt}], reply)


@pytest.mark.parametrize(("rule", "prompt", "reply"), BAD)
def test_a_bad_reply_breaks_the_rule_that_it_was_written_to_break(rule, prompt, reply):
    assert not rules.RULES[rule](prompt, reply)
    assert not rules.passes(prompt, reply)


def test_a_prompt_of_another_task_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="Why is the sky blue"):
        rules.understand("Why is the sky blue?")


def test_a_reply_to_a_prompt_of_its_own_language_only():
    assert not rules.passes(CAPITAL, "日本の首都は東京です。")
    assert not rules.passes(CAPITAL_JA, "Of course. The capital of Japan is Tokyo.")
