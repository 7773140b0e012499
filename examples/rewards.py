"""Rewards as Python functions, for `rlhf-fast ppo --reward examples/rewards.py:NAME`, or in a list with a reward model.

A reward gets B prompts (text or messages), B responses (text) and the other columns of the data; it returns B numbers.
"""


def finished(prompts, responses, **columns):
    """1.0 for a response that finishes its last sentence, else 0.0."""
    return [float(response.rstrip().endswith((".", "!", "?", "。", "！", "？"))) for response in responses]


def no_repetition(prompts, responses, **columns):
    """The share of distinct sequences among all three-word sequences; 1.0 if there are none."""
    scores = []
    for response in responses:
        words = response.split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        scores.append(len(set(triples)) / len(triples) if triples else 1.0)
    return scores
