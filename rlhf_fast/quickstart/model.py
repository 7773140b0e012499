"""The quickstart's model: a byte-level BPE tokenizer trained on the task's text, and a Llama of a million weights."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Splits English words like GPT-2, and digits one by one. Japanese has no spaces, so it is split where the script
# changes: a noun is then not merged with the particle after it, and is always the same token.
WORDS = r" ?[A-Za-z]+|[一-龯々]+|[ぁ-ん]+|[ァ-ヴー]+|[0-9]|[^\sA-Za-z一-龯々ぁ-んァ-ヴー0-9]|\s+"


def train_tokenizer(texts: list[str], vocab_size: int = 1024, max_length: int = 256) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`: it can encode any UTF-8 text, and frequent words are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, END, USER, ASSISTANT],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    hidden: int = 128,
    layers: int = 4,
    initializer_range: float | None = None,
) -> LlamaForCausalLM:
    """A Llama with random weights, small enough for two CPU cores to train in a minute.

    initializer_range: the standard deviation of the weights. The default, 1 / sqrt(hidden), keeps activations at unit
    scale; with the usual 0.02 a narrow model learns a small, regular task far later. On free text 0.02 generalises
    better.
    """
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=initializer_range or hidden**-0.5,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
