"""Rewards as Python functions, for `rlhf-fast ppo --reward examples/rewards.py:NAME` or in a list beside a model.

A reward gets B prompts (text or messages), B responses (text) and the data's other columns; it returns B numbers.
"""


def finished(prompts, responses, **columns):
    """1.0 for a response that ends its last sentence."""
    return [float(response.rstrip().endswith((".", "!", "?", "。", "！", "？"))) for response in responses]


def no_repetition(prompts, responses, **columns):
    """Of the three-word sequences the share that are different; 1.0 where there is none."""
    scores = []
    for response in responses:
        words = response.split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        scores.append(len(set(triples)) / len(triples) if triples else 1.0)
    return scores
