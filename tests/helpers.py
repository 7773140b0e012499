"""Tiny models and a tokenizer made on the spot, so that no test downloads anything; what a ledger has recorded."""

from __future__ import annotations

import sqlite3
from collections import Counter

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = ["the cat sat on the mat", "what is two plus two? four", "please say hello to the world", "0 1 2 3 4 5 6 7 8 9"]


def tiny_tokenizer(*, pad: str = "<pad>", eos: str = "<eos>", chat_template: str | None = CHAT_TEMPLATE):
    """Byte-level BPE of some 300 entries with role tokens; pad=eos makes the two the same token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([pad, eos, "<|system|>", "<|user|>", "<|assistant|>"]))
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos)
    fast.chat_template = chat_template
    return fast


def tiny_model(tokenizer, *, seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A random two-layer Llama of width 32 in float32 over the tokenizer's vocabulary, in eval mode."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, **(sizes | overrides),
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def word_tokenizer(words, eos: str = "<eos>"):
    """One token a word, in the order given, eos last; eos also pads."""
    vocabulary = {word: i for i, word in enumerate([*words, eos])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos)


def attempts(directory) -> Counter:
    """How many attempts of each status the ledger in a directory has, as docs/constitutional.md asks for it."""
    db = sqlite3.connect(f"{directory}/ledger.sqlite")
    return Counter(dict(db.execute("select status, count(*) from attempts group by status")))
