import copy
import math
import random
import re
import warnings
from functools import partial

import pytest
import torch
import transformers
from helpers import tiny_model, tiny_tokenizer
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_fast import generation
from rlhf_fast.data.collate import pad
from rlhf_fast.decoder import Decoder, why_no_decoder
from rlhf_fast.decoder_layers import product_of
from rlhf_fast.errors import ConfigError
from rlhf_fast.generation import generate_tokens, generate_with_logprobs, most_likely, sample
from rlhf_fast.models import add_lora, check_lm_head
from rlhf_fast.ops import _layer

EOS, VOCAB = 2, 60
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
LONGROPE = {"short_factor": [1.1] * 4, "long_factor": [3.0] * 4}
LONGROPE = (
    {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONGROPE}}
    if transformers.__version__ >= "5" else {"rope_scaling": {"type": "longrope", **LONGROPE}}
)  # fmt: skip
ARCHITECTURES = {
    "llama": lambda tokens: LlamaForCausalLM(LlamaConfig(**SIZES, **tokens)),
    "llama3 rope": lambda tokens: LlamaForCausalLM(LlamaConfig(**SIZES, **tokens, rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    })),
    "qwen2": lambda tokens: Qwen2ForCausalLM(Qwen2Config(**SIZES, **tokens)),
    "qwen3": lambda tokens: Qwen3ForCausalLM(Qwen3Config(**SIZES, **tokens, head_dim=8)),
    "gpt2": lambda tokens: GPT2LMHeadModel(GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=4, **tokens)),
    "gpt_neox": lambda tokens: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX, **tokens)),
    "gpt_neox in series": lambda tokens: GPTNeoXForCausalLM(GPTNeoXConfig(
        **NEOX, **tokens, use_parallel_residual=False, rotary_pct=1.0, hidden_act="gelu_new",
    )),
    "mistral": lambda tokens: MistralForCausalLM(MistralConfig(**SIZES, **tokens, sliding_window=None)),
    "window": lambda tokens: MistralForCausalLM(MistralConfig(**SIZES, **tokens, sliding_window=6)),
    "window in a layer": lambda tokens: Qwen2ForCausalLM(Qwen2Config(
        **SIZES, **tokens, use_sliding_window=True, sliding_window=6, max_window_layers=1,
    )),
    "ministral": lambda tokens: MinistralForCausalLM(MinistralConfig(
        **SIZES, **tokens, head_dim=8, sliding_window=6, layer_types=["full_attention", "sliding_attention"],
    )),
    "smollm3": lambda tokens: SmolLM3ForCausalLM(SmolLM3Config(
        **SIZES, **tokens, pad_token_id=0, no_rope_layers=[1, 0],
    )),
    "phi3": lambda tokens: Phi3ForCausalLM(Phi3Config(**SIZES, **tokens, pad_token_id=0)),
    "phi3 in part": lambda tokens: Phi3ForCausalLM(Phi3Config(
        **SIZES, **tokens, pad_token_id=0, partial_rotary_factor=0.5,
    )),
    "granite": lambda tokens: GraniteForCausalLM(GraniteConfig(
        **SIZES, **tokens, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.7,
        logits_scaling=1.5,
    )),
    "gemma": lambda tokens: GemmaForCausalLM(GemmaConfig(**SIZES, **tokens, head_dim=8, tie_word_embeddings=False)),
    "gemma2": lambda tokens: Gemma2ForCausalLM._from_config(Gemma2Config(
        **SIZES, **tokens, head_dim=16, query_pre_attn_scalar=12, sliding_window=6, attn_logit_softcapping=1.5,
        final_logit_softcapping=4.0, tie_word_embeddings=False,
    ), attn_implementation="eager"),
    "gemma3": lambda tokens: Gemma3ForCausalLM(Gemma3TextConfig(
        **SIZES, **tokens, head_dim=8, query_pre_attn_scalar=12, sliding_window=6, tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=4.0,
    )),
    "longrope": lambda tokens: Phi3ForCausalLM(Phi3Config(
        **SIZES, **tokens, pad_token_id=0, original_max_position_embeddings=52, **LONGROPE,
    )),
    "olmo2": lambda tokens: Olmo2ForCausalLM(Olmo2Config(**SIZES, **tokens)),
    "olmo3": lambda tokens: Olmo3ForCausalLM(Olmo3Config(
        **SIZES, **tokens, sliding_window=6, layer_types=["sliding_attention", "full_attention"],
    )),
    "stablelm": lambda tokens: StableLmForCausalLM(StableLmConfig(**SIZES, **tokens)),  # by generate()
}  # fmt: skip
BY_GENERATE = {"stablelm"} if transformers.__version__ >= "5" else {"stablelm", "gemma3", "olmo3"}


def with_opinions(name):
    """A random model far from uniform, with biases and norms that differ from their initial values."""
    torch.manual_seed(9 if "neox" in name else 5)  # with these, rows of all models end at different times
    tokens = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": EOS}
    model = ARCHITECTURES[name](tokens).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def by_transformers(model, prompts, max_new_tokens):
    """Greedy answers of generate(), cut after their first eos."""
    ids, mask = (x.to(model.device) for x in pad(prompts, 0, left=True))
    out = model.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=EOS,
        pad_token_id=0,
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in out]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight.mul_(20)  # a random model is nearly uniform; this one is not
    return model


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 12))] for _ in range(23)]


def both(model, prompts, batch_size=64, seed=0, **options):
    options = {"max_new_tokens": 16, "eos_token_id": EOS, **options}
    return generate_with_logprobs(
        model, prompts, batch_size=batch_size, generator=torch.Generator().manual_seed(seed), **options
    )


def sampled(*arguments, **options):
    return both(*arguments, **options)[0]


@pytest.mark.filterwarnings("ignore:.*generates through transformers")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_transformers(name, prompts):
    model = with_opinions(name)
    longest = max(map(len, prompts)) + 24
    assert (why_no_decoder(model, longest) is None) == (name not in BY_GENERATE)
    expected = by_transformers(model, prompts, 24)
    assert len({len(row) for row in expected}) > 2  # rows end at different times, so some leave the batch
    for batch_size in (5, 64):
        assert generate_tokens(
            model, prompts, max_new_tokens=24, eos_token_id=EOS, do_sample=False, batch_size=batch_size
        ) == expected  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_prompts_of_one_length_need_no_padding(name, prompts):
    model, prompts = with_opinions(name), [prompt[:5] for prompt in prompts if len(prompt) >= 5]
    expected = by_transformers(model, prompts, 8)
    assert generate_tokens(model, prompts, max_new_tokens=8, eos_token_id=EOS, do_sample=False) == expected


@pytest.mark.filterwarnings("ignore:.*generates through transformers")
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gpt_neox", "mistral", "granite", "gemma2", "window", "stablelm"])
def test_the_log_probabilities_are_those_of_the_model_on_the_whole_text(name, prompts):
    model, temperature = with_opinions(name), 0.8
    answers, logprobs = generate_with_logprobs(
        model, prompts, max_new_tokens=12, eos_token_id=EOS, temperature=temperature, top_k=5, top_p=0.9,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    for prompt, answer, logprob in zip(prompts, answers, logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprob), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:.*generates through transformers")
@pytest.mark.parametrize("name", ["llama", "granite", "gemma2", "gemma3", "phi3", "olmo2"])
def test_a_model_with_adapters_is_decoded_with_them(name, prompts):
    peft = pytest.importorskip("peft")
    model = with_opinions(name)
    plain = generate_tokens(model, prompts, max_new_tokens=8, eos_token_id=EOS, do_sample=False)
    targets = ["q_proj", "v_proj", "qkv_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    assert (why_no_decoder(adapted, 20) is None) == (name not in BY_GENERATE)
    answers = generate_tokens(adapted, prompts, max_new_tokens=8, eos_token_id=EOS, do_sample=False)
    assert answers == by_transformers(adapted, prompts, 8) != plain
    with adapted.disable_adapter():
        assert generate_tokens(adapted, prompts, max_new_tokens=8, eos_token_id=EOS, do_sample=False) == plain


def twice(module, given, output):
    return 2 * output


def with_a_forward_of_its_own(module):
    before = module.forward
    module.forward = lambda x: 2 * before(x)


def with_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old one: a hook that writes a plain attribute
        torch.nn.utils.weight_norm(module).weight_g.data.mul_(3)


def attend_half_as_sharply(model):
    def attend(*inputs, scaling, **options):
        return sdpa_attention_forward(*inputs, scaling=scaling / 2, **options)

    AttentionInterface.register("half_as_sharp", attend)
    AttentionMaskInterface.register("half_as_sharp", sdpa_mask)
    model.set_attn_implementation("half_as_sharp")


ALTERATIONS = {
    "hook on a projection": lambda model: model.model.layers[0].self_attn.q_proj.register_forward_hook(twice),
    "hook on the output": lambda model: model.model.layers[1].self_attn.o_proj.register_forward_hook(twice),
    "hook before a product": lambda model: model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda module, given: (2 * given[0],)
    ),
    "hook on the head": lambda model: model.lm_head.register_forward_hook(lambda module, given, x: 0.5 * x),
    "hook on the embeddings": lambda model: model.model.embed_tokens.register_forward_hook(twice),
    "hook on a layer": lambda model: model.model.layers[0].register_forward_hook(twice),
    "hook on a norm": lambda model: model.model.layers[1].input_layernorm.register_forward_hook(twice),
    "hook on the last norm": lambda model: model.model.norm.register_forward_hook(lambda module, given, x: x.flip(-1)),
    "another forward": lambda model: with_a_forward_of_its_own(model.model.layers[0].mlp.down_proj),
    "another forward of the mlp": lambda model: with_a_forward_of_its_own(model.model.layers[0].mlp),
    "weight norm": lambda model: with_weight_norm(model.model.layers[0].mlp.up_proj),
    "another activation": lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.GELU()),
    "another attention": attend_half_as_sharply,
    "fewer layers": lambda model: setattr(model.config, "num_hidden_layers", 1),
    "embeddings of another dtype": lambda model: model.model.embed_tokens.bfloat16(),
}


@pytest.mark.filterwarnings("ignore:.*generates through transformers")
@pytest.mark.parametrize("name", ALTERATIONS)
def test_what_alters_a_module_is_heard(name, prompts):
    model = with_opinions("llama")
    options = {"max_new_tokens": 8, "eos_token_id": EOS, "do_sample": False, "batch_size": 12}
    before = generate_with_logprobs(model, prompts, **options)
    ALTERATIONS[name](model)
    answers, logprobs = generate_with_logprobs(model, prompts, **options)
    assert logprobs != before[1]
    for prompt, answer, logprob in zip(prompts, answers, logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprob), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("longrope", {}, "rescales its rotary positions beyond 52 tokens"),
        ("gemma2", {"_attn_implementation_internal": "sdpa"}, "sdpa attention does not apply the attn_logit_soft"),
        ("gemma3", {"attn_logit_softcapping": 3.0}, "attention does not apply the attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "is not causal"),
    ],
)
def test_what_the_decoder_does_not_compute(name, change, reason):
    if name in BY_GENERATE:
        pytest.skip("our decoder needs transformers 5 for it")
    model, length = with_opinions(name), 52 if change else 53
    assert why_no_decoder(model, 52) is None
    model.config.update(change)
    assert reason in why_no_decoder(model, length)


@pytest.mark.parametrize(
    "architecture",
    [(LlamaForCausalLM, LlamaConfig), (MistralForCausalLM, MistralConfig), (GraniteForCausalLM, GraniteConfig)],
)
@pytest.mark.parametrize("window", [1, 6])
def test_a_window_is_that_of_the_forward_over_the_whole_text(architecture, window, prompts):
    """Not that of generate()'s cache, which keeps all tokens for a window of 1, and applies one that llama ignores."""
    build, config = architecture
    torch.manual_seed(5)
    model = build(config(
        **SIZES, vocab_size=VOCAB, sliding_window=window, layer_types=["sliding_attention"] * 2,
    )).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    assert why_no_decoder(model) is None
    answers = generate_tokens(model, prompts, max_new_tokens=8, eos_token_id=EOS, do_sample=False)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.skipif(transformers.__version__ < "5", reason="one kind of positions for each type of layer")
def test_the_limit_of_rotary_positions_is_the_smallest_of_all_layers():
    limits = {"full_attention": 100, "sliding_attention": 52}
    model = Gemma3ForCausalLM(Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=100, layer_types=list(limits), rope_parameters={
            kind: {**LONGROPE["rope_parameters"], "factor": 4.0, "original_max_position_embeddings": limit}
            for kind, limit in limits.items()
        },
    ))  # fmt: skip
    assert why_no_decoder(model, 52) is None
    assert "beyond 52 tokens" in why_no_decoder(model, 53)


def test_a_longer_text_before_does_not_rescale_an_answer_that_ends_at_the_limit(prompts):
    model = LlamaForCausalLM(LlamaConfig(
        **{**SIZES, "max_position_embeddings": 36}, vocab_size=VOCAB, bos_token_id=1, eos_token_id=EOS,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ))  # fmt: skip
    options = {"max_new_tokens": 36 - max(map(len, prompts)), "eos_token_id": EOS, "do_sample": False}
    expected = generate_with_logprobs(model, prompts, **options)
    with torch.no_grad():
        model(input_ids=torch.arange(50)[None])
    assert generate_with_logprobs(model, prompts, **options) == expected


def test_hooks_that_only_record_leave_it_to_us(prompts):
    model = with_opinions("llama")
    model(input_ids=torch.tensor([prompts[0]]), output_hidden_states=True)  # transformers 5 adds hooks to the layers
    for layer in model.model.layers:
        layer.forward = layer.forward  # transformers 4 restores it like this
    assert why_no_decoder(model) is None


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"])
def test_what_transformers_ships_for_the_same_attention_leaves_it_to_us(name):
    model = with_opinions("llama")
    model.config._attn_implementation_internal = name  # the setter requires flash attention to be installed
    assert why_no_decoder(model) is None


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_under_autocast(name, prompts):
    """Its products return bfloat16, which must not reach our float32 kernels."""
    model = with_opinions(name)
    ids, mask = pad(prompts[:6], EOS, left=True)
    exact = Decoder(model, ids, mask, 4)
    with torch.no_grad():
        expected = [exact.start(), exact.step(ids[:, -1])]
        with torch.autocast("cpu", torch.bfloat16):
            decoder = Decoder(model, ids, mask, 4)
            got = [decoder.start(), decoder.step(ids[:, -1])]
    for ours, theirs in zip(got, expected, strict=True):
        assert float((ours - theirs).abs().max()) < 0.05 * float(theirs.abs().max())


def log_probability_errors(model, prompts, **options):
    """Errors of log-probabilities of sampled tokens against the model in float32: those of generation, and those of the
    model under autocast on the whole text."""
    answers, logprobs = generate_with_logprobs(
        model, prompts, max_new_tokens=12, eos_token_id=EOS, generator=torch.Generator().manual_seed(0), **options
    )
    ours, theirs = [], []
    for prompt, answer, logprob in zip(prompts, answers, logprobs, strict=True):
        found = []
        for enabled in (False, True):
            text = torch.tensor([prompt + answer], device=model.device)
            with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=enabled):
                logits = model(input_ids=text).logits[0, len(prompt) - 1 : -1].double().cpu()
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
        ours.append(torch.tensor(logprob) - found[0])
        theirs.append(found[1] - found[0])
    return torch.cat(ours), torch.cat(theirs)


@pytest.mark.filterwarnings("ignore:.*generates through transformers")
@pytest.mark.parametrize("batch_size", [64, 200])  # few rows (FEW), and more
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_is_no_less_exact_than_autocast(name, batch_size, prompts):
    model = with_opinions(name)
    before = copy.deepcopy(model.state_dict())
    prompts = (prompts * 9)[:batch_size]
    ours, theirs = log_probability_errors(model, prompts, bf16=True, batch_size=batch_size)
    assert 1e-4 < ours.square().mean().sqrt() < 1.5 * theirs.square().mean().sqrt()
    assert all(torch.equal(x, before[name]) and x.dtype == torch.float32 for name, x in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_with_adapters_and_with_a_frozen_model_in_bfloat16(dtype, prompts):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(with_opinions("llama").to(dtype), config, autocast_adapter_dtype=True).eval()
    assert why_no_decoder(model) is None
    ours, theirs = log_probability_errors(model, prompts, bf16=True)
    assert ours.square().mean().sqrt() < 1.5 * theirs.square().mean().sqrt() + 0.02 * (dtype == torch.bfloat16)
    with model.disable_adapter():
        plain, _ = log_probability_errors(model, prompts, bf16=True)
    assert not torch.equal(plain, ours)


@pytest.mark.filterwarnings("ignore:.*generates through transformers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "llama3 rope"])
def test_bf16_of_a_model_in_half_precision(name, dtype, prompts):
    """Its norms and biases are in bfloat16 too, which the native layer does not take: the modules run unchanged."""
    model = with_opinions(name)
    rounded = copy.deepcopy(model).to(dtype)
    options = {"max_new_tokens": 8, "eos_token_id": EOS, "generator": torch.rand(len(prompts), 8, dtype=torch.float64)}
    answers, logprobs = generate_with_logprobs(rounded, prompts, bf16=True, **options)
    assert (answers, logprobs) == generate_with_logprobs(rounded, prompts, **options)
    with torch.no_grad():
        for prompt, answer, logprob in zip(prompts, answers, logprobs, strict=True):
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
            assert (torch.tensor(logprob) - expected).abs().max() < 0.5


@pytest.mark.filterwarnings("ignore:.*generates through transformers")
@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_an_autocast_of_the_caller_counts(name, prompts):
    """Also for models that go through transformers' generate()."""
    model, options = with_opinions(name), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": EOS}
    exact = generate_with_logprobs(model, prompts, **options)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert generate_with_logprobs(model, prompts, **options)[1] != exact


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in BY_GENERATE])
@torch.no_grad()
def test_bf16_in_the_form_of_cuda_graphs(name, prompts, monkeypatch):
    """As on CUDA: attention reads the whole buffer under a mask, and products return bfloat16."""
    model = with_opinions(name)
    ids, mask = pad(prompts[:6], EOS, left=True)
    exact = Decoder(model, ids, mask, 8)
    expected = [exact.start(), *(exact.step(ids[:, -1]) for _ in range(5))]
    monkeypatch.setattr("rlhf_fast.decoder_layers._widened", lambda x: x)
    monkeypatch.setattr(_layer, "runs_on", lambda *_: False)
    fixed = Decoder(model, ids, mask, 8, bf16=True)
    fixed.fixed = True
    got = [fixed.start(), *(fixed.step(ids[:, -1]) for _ in range(5))]
    assert {x.dtype for x in [*got, *fixed.keys, *fixed.values]} == {torch.bfloat16}
    for ours, theirs in zip(got, expected, strict=True):
        assert float((ours - theirs).abs().max()) < 0.08 * float(theirs.abs().max())


def test_a_model_that_a_batch_changes_answers_prompts_one_by_one(prompts):
    """RWKV has no attention mask, and transformers' batches of it go wrong after the first token."""
    generation._warn_once.cache_clear()
    torch.manual_seed(5)
    config = RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=EOS)
    model = RwkvForCausalLM(config).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    expected = [by_transformers(model, [prompt], 8)[0] for prompt in prompts]
    with pytest.warns(UserWarning, match="RwkvForCausalLM answers one prompt at a time"):
        assert sampled(model, prompts, max_new_tokens=8, do_sample=False) == expected
    shifted = model.head.register_forward_hook(lambda module, given, x: x + 1000)  # which changes no probability
    for start in ([EOS], [EOS, *prompts[0]]):  # what ends an answer may begin a prompt
        generation._warn_once.cache_clear()
        with pytest.warns(UserWarning, match="RwkvForCausalLM answers one prompt at a time"):
            sampled(model, [start, start], max_new_tokens=2, do_sample=False)
    shifted.remove()
    twice = [prompts[0], prompts[0]]  # of one length
    assert sampled(model, twice, max_new_tokens=8, do_sample=False) == [expected[0], expected[0]]
    uniforms = torch.rand(len(prompts), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = generate_with_logprobs(model, prompts, max_new_tokens=8, eos_token_id=EOS, generator=uniforms)[0]
    for i in (0, 3, 11):
        options = {"max_new_tokens": 8, "eos_token_id": EOS, "generator": uniforms[i : i + 1]}
        assert generate_with_logprobs(model, prompts[i : i + 1], **options)[0] == [together[i]]


def test_the_padding_of_a_batch_is_the_one_that_its_answers_would_read(prompts):
    """RecurrentGemma's convolution reads it: id 0, whose embedding is zero, changes nothing, and eos does."""
    torch.manual_seed(5)
    config = RecurrentGemmaConfig(
        vocab_size=VOCAB, hidden_size=32, lru_width=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    model = RecurrentGemmaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    expected = [by_transformers(model, [prompt], 8)[0] for prompt in prompts]
    generation._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="RecurrentGemmaForCausalLM answers one prompt at a time"):
        assert sampled(model, prompts, max_new_tokens=8, do_sample=False) == expected


def test_the_last_position_of_a_model_by_transformers_is_used():
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=32, eos_token_id=EOS,
        word_embed_proj_dim=32, max_position_embeddings=12,
    )  # fmt: skip
    generation._warn_once.cache_clear()
    model = OPTForCausalLM(config).train()  # its dropout is not what a batch changes
    check_lm_head(model)
    with pytest.warns(UserWarning, match="OPTForCausalLM generates through transformers") as told:
        answers = sampled(model, [[5] * 12, [6] * 4], max_new_tokens=1)
    assert list(map(len, answers)) == [1, 1]
    assert sum("OPTForCausalLM" in str(warning.message) for warning in told) == 1


def test_falling_back_is_said_once_with_its_reason(prompts):
    generation._warn_once.cache_clear()
    model = with_opinions("stablelm")
    with pytest.warns(UserWarning) as told:
        sampled(model, prompts)
    ours = [str(warning.message) for warning in told if "StableLmForCausalLM" in str(warning.message)]
    assert len(ours) == 1  # and none that a batch changes what it computes
    assert re.match("StableLmForCausalLM generates through transformers.*its architecture is stablelm", ours[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled(model, prompts[:2])
        assert sampled(model, []) == []


@pytest.mark.filterwarnings("ignore:.*generates through transformers")
def test_the_fallback_draws_what_the_decoder_draws(model, prompts, monkeypatch):
    ours, logprobs = both(model, prompts, top_p=0.9)
    monkeypatch.setattr(generation, "why_no_decoder", lambda *_: "a test asks for it")
    first = ours[0][0]
    habits = {"no_repeat_ngram_size": 1, "suppress_tokens": [first], "repetition_penalty": 3.0, "min_new_tokens": 8}
    monkeypatch.setattr(model, "generation_config", config := GenerationConfig(**habits))
    theirs, their_logprobs = both(model, prompts, top_p=0.9)
    assert ours == theirs and model.generation_config is config and config.suppress_tokens == [first]
    for a, b in zip(logprobs, their_logprobs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_ignored_settings_are_named_once(model, prompts, monkeypatch):
    generation._warn_once.cache_clear()
    options = {"max_new_tokens": 2, "eos_token_id": EOS}
    replaced = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.8, "max_length": 9, "eos_token_id": 7}
    idle = {"repetition_penalty": 1.0, "num_beams": 1, "suppress_tokens": [], "min_new_tokens": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(model, "generation_config", GenerationConfig(**replaced, **idle))
        generate_tokens(model, prompts[:1], **options)
        habits = {"repetition_penalty": 1.1, "suppress_tokens": [5], "min_new_tokens": 1}
        monkeypatch.setattr(model, "generation_config", GenerationConfig(**replaced, **habits))
        generate_with_logprobs(model, prompts[:1], **options)  # PPO's rollouts
    with pytest.warns(
        UserWarning, match="repetition_penalty, min_new_tokens, suppress_tokens in the generation_config"
    ):
        generate_tokens(model, prompts[:1], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_tokens(model, prompts[:1], **options)


@pytest.mark.parametrize("name", ["qwen2", "window", "window in a layer"])
def test_attention_over_the_whole_buffer_under_a_mask_is_the_same(name, prompts):
    """The form that CUDA graphs replay, on the CPU: constant shapes at every step, and rows that leave the batch."""
    model = with_opinions(name)
    ids, mask = pad(prompts[:6], EOS, left=True)
    decoders = [Decoder(model, ids, mask, 8) for _ in range(2)]
    decoders[1].fixed = True
    with torch.no_grad():
        logits = [decoder.start() for decoder in decoders]
        for step in range(6):
            torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
            if step == 3:
                for decoder in decoders:
                    decoder.keep(torch.tensor([1, 2, 5]))
                logits = [x[[1, 2, 5]] for x in logits]
            logits = [d.step(x.argmax(-1)) for d, x in zip(decoders, logits, strict=True)]


@pytest.mark.parametrize("fixed", [False, True], ids=["", "in the form of CUDA graphs"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "window", "window in a layer"])
def test_a_prompt_that_is_asked_several_times_is_read_once(name, fixed, prompts, monkeypatch):
    class Fixed(Decoder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.fixed = fixed

    monkeypatch.setattr(generation, "Decoder", Fixed)
    model, several = with_opinions(name), [prompts[i] for i in (2, 0, 0, 1, 2, 0)]
    read = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, x: read.append(x[0].numel()))
    answers, logprobs = generate_with_logprobs(
        model, several, max_new_tokens=6, eos_token_id=EOS, generator=torch.Generator().manual_seed(3)
    )
    assert read[0] == sum(map(len, prompts[:3])) and len(set(map(tuple, answers))) > 3
    assert len(read) == max(map(len, answers)) == 6  # nobody reads the last token
    drawn = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for i, prompt in enumerate(several):
        alone, logps = generate_with_logprobs(
            model, [prompt], max_new_tokens=6, eos_token_id=EOS, generator=drawn[i : i + 1]
        )
        assert alone[0] == answers[i] and logps[0] == pytest.approx(logprobs[i], abs=1e-5)


@pytest.mark.parametrize(("every", "lines"), [(0, ["scoring 4/9", "scoring 8/9", "scoring 9/9"]), (600, [])])
def test_where_no_bar_can_be_drawn_a_long_loop_says_how_far_it_is(every, lines, monkeypatch, capsys):
    monkeypatch.setattr(generation, "TOLD_EVERY", every)
    assert list(map(len, generation.batches(list(range(9)), 4, "scoring"))) == [4, 4, 1]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_token_of_many_answers_takes_twelve_bytes(model, prompts, monkeypatch):
    """A list of Python's ints and one of its floats took 68."""
    tokens = torch.arange(1000, 1008).expand(len(prompts), 8)
    monkeypatch.setattr(
        generation, "_answer_batch", lambda _, some, *__: (tokens[: len(some)], -tokens[: len(some)] / 7)
    )
    options = {"max_new_tokens": 8, "eos_token_id": 1007, "batch_size": 4}
    answers, logprobs = generate_with_logprobs(model, prompts, **options)
    assert answers == tokens.tolist() and len({id(token) for answer in answers for token in answer}) == 8
    assert {row.itemsize for row in logprobs} == {4} and logprobs[-1].tolist() == (-tokens[-1] / 7).tolist()


def test_an_answer_does_not_depend_on_its_batch(model, prompts):
    read, rows, expected = [], len(prompts), []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, x: read.append(x[0].numel()))
    together = sampled(model, prompts)
    hook.remove()
    for step in range(1, max(map(len, together))):
        left = sum(len(row) > step for row in together)
        rows = left if rows - left >= rows / 8 else rows  # rows leave once an eighth of the batch has finished
        expected.append(rows)
    assert read[1:] == expected and len(set(expected)) > 1
    assert together == sampled(model, prompts, batch_size=4)
    assert together[:9] == sampled(model, prompts[:9])
    assert together != sampled(model, prompts, seed=1)


def test_eos_is_the_last_token_and_appears_once(model, prompts):
    for row in sampled(model, prompts, max_new_tokens=40):
        assert EOS not in row[:-1] and 1 <= len(row) <= 40
        assert row[-1] == EOS or len(row) == 40


@pytest.mark.parametrize("eos", [[], (), None, [None], torch.tensor(EOS)])
def test_without_an_eos_it_is_refused(model, prompts, eos):
    with pytest.raises(generation.ConfigError, match="eos_token_id an int or a list of int"):
        sampled(model, prompts, eos_token_id=eos)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(model, prompts, temperature):
    with pytest.raises(ConfigError, match=f"temperature > 0.* got 4, 128, {temperature}"):
        generate_tokens(model, prompts, max_new_tokens=4, eos_token_id=EOS, temperature=temperature)


def test_learned_positions_end_and_rotary_ones_go_on():
    prompt = [3] * 120  # of 128 positions
    options = {"eos_token_id": VOCAB, "do_sample": False}
    for name, longest in (("gpt2", 9), ("llama", 10)):  # the last token is never read
        (answer,) = generate_tokens(with_opinions(name), [prompt], max_new_tokens=longest, **options)
        assert len(answer) == longest
    with pytest.raises(generation.ConfigError, match=r"has 120 tokens .* is 10, .* 128 positions of GPT2LMHeadModel"):
        generate_tokens(with_opinions("gpt2"), [[3], prompt], max_new_tokens=10, **options)


@pytest.mark.filterwarnings("ignore:.*generates through transformers")
@pytest.mark.parametrize("name", ["llama", "stablelm"])
def test_an_answer_ends_at_the_first_of_several_eos(name, prompts):
    model, ends = with_opinions(name), (0, 7, 8, 9, 10)
    to_the_end = sampled(model, prompts, max_new_tokens=40, eos_token_id=0)
    answers, logprobs = both(model, prompts, max_new_tokens=40, eos_token_id=ends)
    for answer, logprob, whole in zip(answers, logprobs, to_the_end, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), len(whole) - 1)
        assert answer == whole[: first + 1] and len(logprob) == len(answer)
    assert len({answer[-1] for answer in answers} & set(ends)) > 2


@pytest.mark.parametrize("vocab", [4, 128, 300])  # within a block of the vocabulary, exactly one, several
def test_sampled_frequencies_are_the_softmax_at_the_temperature(vocab):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2)) * 2
    logits[[0, vocab // 2, vocab - 1]] = -torch.inf
    uniforms = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    uniforms = uniforms[:, None].expand(-1, 2).contiguous()[:, 1]  # a column: not contiguous
    tokens, logprobs = sample(logits.expand(len(uniforms), -1), uniforms, temperature=0.5)
    expected = torch.softmax(logits.double() / 0.5, -1)
    frequencies = torch.bincount(tokens, minlength=vocab).double() / len(uniforms)
    torch.testing.assert_close(
        frequencies, expected, atol=1.1e-5, rtol=0
    )  # a token's interval, to a uniform at each end
    assert (tokens.diff() >= 0).all()  # the first token whose cumulative probability exceeds u
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 300}])  # by the kernel, by PyTorch
@pytest.mark.parametrize("temperature", [1.0, 0.01, 1e-6, 1e-38])
def test_log_probabilities_at_low_temperatures_are_exact_and_never_above_0(temperature, options):
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(4)) * 5 + 100
    uniforms = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    tokens, logprobs = sample(logits, uniforms, temperature=temperature, **options)
    assert logprobs.max() <= 0
    exact = torch.log_softmax(logits.double() / temperature, -1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), exact, atol=1e-6, rtol=1e-5)
    largest, logprob = most_likely(logits, None, temperature=temperature)
    exact = torch.log_softmax(logits.double() / temperature, -1).gather(-1, largest[:, None]).squeeze(-1)
    torch.testing.assert_close(logprob.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_sampled_in_float32(dtype):
    logits = 3 * torch.randn(500, 300, generator=torch.Generator().manual_seed(4)).to(dtype)
    uniforms = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for choose in (partial(sample, top_k=300), partial(most_likely, temperature=1.0)):
        for ours, expected in zip(choose(logits, uniforms), choose(logits.float(), uniforms), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("do_sample", [True, False])
def test_logits_that_are_nan_are_refused(model, prompts, do_sample):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[17] = torch.nan
    with pytest.raises(ConfigError, match="the logits of LlamaForCausalLM are NaN for prompt"):
        generate_tokens(broken, prompts, max_new_tokens=4, eos_token_id=EOS, do_sample=do_sample)
    answers, logprobs = both(broken, prompts, do_sample=do_sample)  # PPO counts non-finite values
    assert all(all(map(math.isnan, logps)) for logps in logprobs) and len(answers) == len(prompts)


@pytest.mark.parametrize("options", [{}, {"top_k": 300}])  # by the kernel, by PyTorch
@pytest.mark.parametrize("u", [0.0, 1 - 2**-53, 1.0])
def test_the_extreme_uniforms_fall_on_tokens_that_can_be(u, options):
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 131], logits[0, 257] = 0.0, 3.0
    token, _ = sample(logits, torch.tensor([u], dtype=torch.float64), **options)
    assert token.item() == (131 if u == 0.0 else 257)
    logits[0, [5, 131, 257]] = torch.tensor([0.0, -36.55, 0.0])  # one that is less than the sum's last bit
    token, _ = sample(logits, torch.tensor([0.5], dtype=torch.float64), **options)
    assert token.item() in (5, 131, 257)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    uniforms = torch.linspace(0, 0.999, 1000, dtype=torch.float64)
    draw = lambda **options: torch.bincount(sample(logits.expand(1000, -1), uniforms, **options)[0], minlength=3)  # noqa: E731
    assert draw(top_p=0.45).tolist() == [0, 1000, 0]
    assert draw(top_p=0.6)[0] == 0 and abs(draw(top_p=0.6)[1] - 625) <= 1  # 0.5 / 0.8
    assert (draw(top_p=0.9) > 0).all()
    assert sample(torch.zeros(1000, 4), uniforms, top_p=0.5)[0].unique().tolist() == [0, 1]  # which reach it exactly
    assert draw(top_k=1).tolist() == [0, 1000, 0]
    assert draw(top_k=2)[0] == 0 and abs(draw(top_k=2)[1] - 625) <= 1
    assert draw(top_k=2, top_p=0.6).tolist() == [0, 1000, 0]  # 0.625 of what top_k keeps reaches 0.6
    assert (draw(top_k=999) - draw()).abs().max() <= 1  # 0.7 is one of the uniforms


def test_the_mode_of_the_model_is_as_before_and_dropout_plays_no_part(model, prompts):
    pytest.importorskip("peft")
    adapted = add_lora(copy.deepcopy(model), r=2, alpha=2.0, dropout=0.5)
    for name, p in adapted.named_parameters():
        torch.nn.init.normal_(p) if "lora_B" in name else None
    expected = sampled(adapted.eval(), prompts[:4])
    assert sampled(adapted.train(), prompts[:4]) == expected and adapted.training


def test_an_answer_is_cut_unless_it_ends_with_one_of_the_stops(monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(generation, "stop_ids", lambda *_: [2, 3])
    monkeypatch.setattr(generation, "generate_tokens", lambda *_, **__: [[5, 2], [5, 3], [5, 5]])
    assert generation.generate_answers(None, tokenizer, ["a"] * 3, 0)[1] == [False, False, True]


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"batch_size": 0}, {"top_k": 0}],
)
def test_wrong_options_are_refused(model, prompts, wrong):
    with pytest.raises(ValueError, match="generate: needs"):
        sampled(model, prompts, **wrong)


def test_an_empty_prompt_is_named(model):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        sampled(model, [[5], []])
    with pytest.raises(ConfigError, match=rf"contain token {VOCAB}, but LlamaForCausalLM embeds only {VOCAB} tokens"):
        sampled(model, [[5], [VOCAB]])


def test_each_option_of_a_text_reaches_the_sampling(monkeypatch):
    model = tiny_model(tokenizer := tiny_tokenizer())
    answer = partial(generation.generate_text, model, tokenizer, max_new_tokens=8)
    prompts = ["hello", "cat"]
    greedy = answer(prompts, do_sample=False)
    assert answer(prompts, top_k=1) == answer(prompts, top_p=1e-9) == answer(prompts, temperature=1e-6) == greedy
    drawn = [answer(prompts, seed=seed) for seed in (0, 1, [3, 4])]
    assert len(set(map(tuple, [greedy, *drawn]))) == 4
    assert answer(prompts) == drawn[0] and answer(["cat"], seed=[4]) == answer(["cat"], seed=4) == drawn[2][1:]
    assert answer([], seed=[]) == []
    seen = {}
    monkeypatch.setattr(generation, "generate_tokens", lambda *_, **given: seen.update(given) or [[5]])
    for option in ({"bf16": True}, {"batch_size": 3}):  # which change rounding only
        answer(["cat"], **option)
        assert seen | option == seen


def test_what_ends_an_answer_is_no_part_of_its_text():
    model, tokenizer = tiny_model(tiny_tokenizer()), tiny_tokenizer()
    options = {"max_new_tokens": 8, "do_sample": False}
    prompt, eos = tokenizer("hello")["input_ids"], tokenizer.eos_token_id
    (ids,) = generate_tokens(model, [prompt], eos_token_id=eos, **options)
    tokenizer.add_tokens(tokenizer.convert_ids_to_tokens(ids[3]))  # an added token need not be a special one
    model.generation_config.eos_token_id = [eos, ids[3]]
    assert ids[3] not in [eos, *ids[:3]]
    assert generation.generate_text(model, tokenizer, ["hello"], **options) == [tokenizer.decode(ids[:3])]


def test_prompts_are_a_list_of_texts_or_messages():
    model = tiny_model(tokenizer := tiny_tokenizer())
    turn = {"role": "user", "content": "hello"}
    answer = partial(generation.generate_text, model, tokenizer, max_new_tokens=2, do_sample=False)
    assert answer(iter(["hello", [turn]])) == answer(["hello"]) + answer([[turn]])
    for one in ("hello", [turn], {"prompt": "hello"}):  # else its characters, turns or keys would be answered
        with pytest.raises(ConfigError, match="prompts must be a list, got a single prompt"):
            answer(one)
    for strange in (None, {"prompt": "hello"}, [], [5]):
        with pytest.raises(ConfigError, match="prompt 1 must be text or a list"):
            answer(["hello", strange])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_copies_of_a_row_share_its_prompt_to_the_last_bit(family, bf16, prompts, monkeypatch):
    """Also after rows have left, among them the one that has the columns of a prompt."""
    model = with_opinions(family)
    ids, mask = pad(prompts[:3], EOS, left=True)
    rows = torch.tensor([0, 0, 2, 2, 2, 1, 0, 2, 1, 1])
    shared, copied = (Decoder(model, ids, mask, 8, bf16) for _ in range(2))
    for decoder in (shared, copied):
        decoder.start()
        with monkeypatch.context() as patch:
            if decoder is copied:
                patch.setattr(_layer, "runs_on", lambda *_: False)
            decoder.repeat(rows)
    assert copied.back is None and shared.back is not None
    for buffer in (*shared.keys, *shared.values):
        buffer[shared.back > 0, :, : ids.shape[1]] = torch.nan  # read by nobody
    tokens = torch.arange(len(rows)) + 3
    for kept in (None, [0, 1, 3, 4, 5, 6, 8], [1, 2, 3, 5, 6], [4, 0, 2], [1]):  # the first row with a prompt leaves
        if kept is not None:
            tokens = tokens[kept]
            for decoder in (shared, copied):
                decoder.keep(torch.tensor(kept))
        found, expected = (decoder.step(tokens) for decoder in (shared, copied))
        assert torch.equal(found, expected)
        tokens = found.argmax(-1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rows", [1, 5, 128, 129])
@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_few_rows_go_through_a_layer_in_one_call(family, rows, bf16, monkeypatch):
    """And get the same logits on it, also after some rows have left."""
    model, calls = with_opinions(family), []
    if family == "llama":
        model.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(
            torch.linspace(-1, 1, model.config.hidden_size)
        )
    prompts = [[5 + (i + j) % 20 for j in range(3 + i % 4)] for i in range(rows)]
    ids, mask = pad(prompts, EOS, left=True)
    decoders = [Decoder(model, ids, mask, 4, bf16) for _ in range(2)]
    for layer in decoders[1].network.layers:
        layer["weights"] = None
    whole = _layer.decode_layer
    monkeypatch.setattr(_layer, "decode_layer", lambda *args: (calls.append(len(args[1])), whole(*args)))
    first, _ = (decoder.start() for decoder in decoders)
    tokens, kept = first.argmax(-1), torch.arange(0, rows, 2)
    error = {"rtol": 1e-4, "atol": 1e-4} if not bf16 else {"rtol": 0.05, "atol": 0.05 * float(first.abs().max())}
    torch.testing.assert_close(*(decoder.step(tokens) for decoder in decoders), **error)
    for decoder in decoders:
        decoder.keep(kept)
    torch.testing.assert_close(*(decoder.step(tokens[kept]) for decoder in decoders), **error)
    layers = len(model.model.layers)
    assert calls == [n for n in (rows, len(kept)) for _ in range(layers) if n <= 128]


@torch.no_grad()
def test_a_layer_that_is_more_than_its_weights_is_run_by_its_modules():
    model = with_opinions("llama")
    layers = model.model.layers
    layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.ones(model.config.intermediate_size))
    ids = torch.arange(5, 29).view(4, 6)
    decoder = Decoder(model, ids, torch.ones_like(ids, dtype=torch.bool), 2)
    assert [layer["weights"] is None for layer in decoder.network.layers] == [True] + [False] * (len(layers) - 1)
    for eps in (layers[1].input_layernorm.variance_epsilon, 1.0):  # at last another than that of its other norm
        layers[1].input_layernorm.variance_epsilon = eps
        decoder = Decoder(model, ids, torch.ones_like(ids, dtype=torch.bool), 2)
        tokens = decoder.start().argmax(-1)
        expected = model(input_ids=torch.cat([ids, tokens[:, None]], 1)).logits[:, -1]
        torch.testing.assert_close(decoder.step(tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
@torch.no_grad()
def test_gpt2_scales_its_attention_as_its_config_says(options):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **options
    )
    model, ids = GPT2LMHeadModel(config).eval(), torch.arange(5, 29).view(4, 6)
    model.set_attn_implementation("eager")  # the other one of transformers 4 leaves the factors out
    logits = Decoder(model, ids, torch.ones_like(ids, dtype=torch.bool), 2).start()
    torch.testing.assert_close(logits, model(input_ids=ids).logits[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_alters_a_module_of_gpt2_is_heard():
    model, x = with_opinions("gpt2"), torch.randn(3, 32)
    block = model.transformer.h[0]
    before = product_of(block.attn.c_attn, True)(x)
    block.attn.c_attn.register_forward_hook(twice)
    torch.testing.assert_close(product_of(block.attn.c_attn, True)(x), 2 * before, rtol=0.03, atol=0.1)
    assert why_no_decoder(model) is None
    block.mlp.register_forward_hook(twice)
    assert "GPT2MLP has a hook" in why_no_decoder(model)
    pythia = with_opinions("gpt_neox")
    pythia.gpt_neox.layers[1].input_layernorm.register_forward_hook(twice)  # it is called, so it may do what it likes
    pythia.gpt_neox.layers[1].mlp.dense_h_to_4h.register_forward_hook(twice)
    assert why_no_decoder(pythia) is None
    pythia.gpt_neox.layers[0].attention.register_forward_hook(twice)
    assert "GPTNeoXAttention has a hook" in why_no_decoder(pythia)


def test_long_work_goes_in_batches_under_a_bar_that_counts_them(monkeypatch):
    seen, bar = {}, generation.tqdm

    def watched(steps, what, **options):
        seen.update(options, steps=len(steps), what=what)
        return bar(steps, what, **options)

    monkeypatch.setattr(generation, "tqdm", watched)
    assert list(generation.batches([7, 5, 3, 2, 1], 2, "scoring")) == [[7, 5], [3, 2], [1]] and seen["steps"] == 3
    assert list(generation.batches([], 2, "scoring")) == []
    assert seen["what"] == "scoring" and seen["delay"] > 0  # a short call shows nothing
    assert seen["leave"] is False and seen["disable"] is None  # without a terminal there is no bar
    monkeypatch.setattr(generation.parallel, "rank", lambda: 1)
    assert list(generation.batches([1], 2, "scoring")) == [[1]] and seen["disable"] is True  # the first process has one
