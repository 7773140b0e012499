"""A packed row gives the hidden states, loss and gradients of its sequences alone, for every kind of attention."""

import math
import re
from bisect import bisect_left
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rlhf_fast
from rlhf_fast import SFTConfig, SFTTrainer, models
from rlhf_fast import packing as packing_module
from rlhf_fast.data import collate
from rlhf_fast.data.chat import Encoded
from rlhf_fast.data.collate import Packed, pack_comparisons, pack_rows, pack_sft, pack_sorted
from rlhf_fast.data.formats import Comparison
from rlhf_fast.decoder import why_no_decoder
from rlhf_fast.errors import ConfigError
from rlhf_fast.ops import linear_cross_entropy
from rlhf_fast.packing import packed_attention, packed_hidden_states, packing, why_not_packed

V = 97
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=32, **SIZES, **options))


def qwen2(**options):
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=V, hidden_size=32, **SIZES, **options))


def gpt2(**options):
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, **options))


def gpt_neox(**options):
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=V, hidden_size=32, **sizes, **options))


def sliding(**options):
    return MistralForCausalLM(MistralConfig(vocab_size=V, hidden_size=32, sliding_window=5, **SIZES, **options))


def olmo3(**options):
    return Olmo3ForCausalLM(Olmo3Config(vocab_size=V, hidden_size=32, sliding_window=5, **SIZES, **options))


def gemma(**options):
    return GemmaForCausalLM(GemmaConfig(vocab_size=V, hidden_size=32, head_dim=8, **SIZES, **options))


def gemma2(attn_implementation="eager", **options):
    sizes = {"vocab_size": V, "hidden_size": 32, "head_dim": 8, **SIZES}
    model = Gemma2ForCausalLM(Gemma2Config(sliding_window=5, attn_logit_softcapping=1.5, **sizes, **options))
    model.config._attn_implementation_internal = (
        attn_implementation  # transformers 4 would take sdpa, 5 would refuse it
    )
    return model


def phi3(**options):
    return Phi3ForCausalLM(Phi3Config(vocab_size=V, hidden_size=32, **SIZES, **options))


def sliding_in_transformers(**options):  # the others run in our forward
    return Starcoder2ForCausalLM(Starcoder2Config(vocab_size=V, hidden_size=32, sliding_window=5, **SIZES, **options))


ARCHITECTURES = [llama, qwen2, gpt2, sliding, olmo3, gemma, gemma2, phi3, sliding_in_transformers]


def build(architecture, **options):
    torch.manual_seed(0)
    special = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": None}
    model = architecture(**special, **options).eval()
    with torch.no_grad():
        for weight in model.parameters():  # larger than transformers' initial weights, so that attention is sharp
            weight.mul_(4) if weight.ndim > 1 else None
    return model


def sequences(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=generator) for n in lengths]


def alone(model, rows):
    return torch.cat([model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows])


def together(model, packed):
    with packing(model):
        return packed_hidden_states(model, packed, torch.arange(packed.input_ids.shape[1]))


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1)):  # fmt: skip
    """flash_attn's kernel for several lengths, by its definition: (tokens, heads, d), each sequence alone."""
    assert causal and dropout_p == 0 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    rows = []
    for start, end in pairwise(cu_seqlens_q.tolist()):
        at = torch.arange(end - start)
        distance = at[:, None] - at
        seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        heads = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        out = scaled_dot_product_attention(*heads, attn_mask=seen, scale=softmax_scale, enable_gqa=True)
        rows.append(out.transpose(0, 1))
    return torch.cat(rows)


@pytest.fixture
def use_flash(monkeypatch):
    """A model on transformers' own path to flash attention, with the function above in place of the kernel."""
    if not hasattr(flash_utils, "_loaded_implementation"):
        pytest.skip("transformers 4 looks for flash attention in another way")
    called = []

    def kernel(*arguments, **options):
        called.append(True)
        return flash_attn_varlen_func(*arguments, **options)

    def use(model):
        model.config._attn_implementation_internal = "flash_attention_2"  # the setter requires the package
        return called

    monkeypatch.setattr(flash_utils, "_loaded_implementation", "flash_attention_2")
    monkeypatch.setattr(flash_utils, "_flash_fn", None)  # the kernel for whole rows is never called
    monkeypatch.setattr(flash_utils, "_flash_varlen_fn", kernel)
    process = flash_utils._lazy_define_process_function(flash_attn_varlen_func)
    monkeypatch.setattr(flash_utils, "_process_flash_kwargs_fn", process)
    return use


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_hidden_states_are_those_of_the_sequences_alone(architecture, attention):
    if (architecture, attention) == (gemma2, "sdpa"):
        pytest.skip("sdpa has no softcap")
    model = build(architecture, attn_implementation=attention)
    rows = sequences(9, 1, 17, 6)  # 6 is one more than sliding's window
    expected = alone(model, rows)
    assert expected.std() > 0.1
    torch.testing.assert_close(together(model, Packed.of(rows)), expected, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == attention
    assert why_not_packed(model, 64) is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_not_a_bit_leaks_between_sequences(architecture):
    model = build(architecture)
    a, b, c = sequences(9, 12, 5)
    (other,) = sequences(9, seed=1)
    first, second = (together(model, Packed.of([x, b, c])) for x in (a, other))
    assert not torch.equal(first[:9], second[:9]) and torch.equal(first[9:], second[9:])
    after = together(model, Packed.of([a, b, other[:5]]))
    assert torch.equal(after[:21], first[:21]) and not torch.equal(after[21:], first[21:])


@pytest.mark.parametrize("shared", [13, 3])  # more and fewer tokens than what follows
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_what_two_sequences_share_is_computed_once(architecture, shared):
    model = build(architecture)
    a, b, c, d = sequences(20, 7, 5, 9)
    rows = [a, torch.cat([a[:shared], b]), torch.cat([a[:shared], c]), d]
    packed = Packed.of(rows, [(0, 0), (0, shared), (0, shared), (0, 0)])
    assert packed.lengths == [20, 7, 5, 9] and packed.position_ids[0, 20] == shared
    expected = alone(model, rows).split([20, shared, 7, shared, 5, 9])
    own = torch.cat([expected[i] for i in (0, 2, 4, 5)])
    torch.testing.assert_close(together(model, packed), own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("native", [True, False])
def test_attention_takes_what_transformers_passes_and_refuses_what_it_cannot(native):
    packed, q = Packed.of(sequences(9, 6)), torch.randn(1, 4, 15, 8, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(15)[:, None] - torch.arange(15)
    same = (torch.arange(15) < 9)[:, None] == (torch.arange(15) < 9)
    for window in (None, 5, 3):  # one after another, as layers of several kinds
        for x in (q, q.double()):
            seen = same & (distance >= 0) & (distance < (window or 15))
            for softcap in (None, 1.5):
                scores = 0.7 * x @ x.mT
                scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ x
                options = {"scaling": 0.7, "sliding_window": window, "softcap": softcap}
                with nullcontext() if native else rlhf_fast.use_backend("reference"):
                    found, _ = packed_attention(None, x, x, x, None, packed=packed, **options)
                torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    for softcap in (None, 1.5):
        assert not packed_attention(None, q, q, q, None, packed=packed, dropout=1.0, softcap=softcap)[0].any()
    for name in ("s_aux", "position_bias"):
        with pytest.raises(NotImplementedError, match=name):
            packed_attention(None, q, q, q, None, packed=packed, **{name: 1.0})


def test_values_of_another_size_than_keys():
    """As deepseek's are."""
    packed, generator = Packed.of(sequences(9, 6)), torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 4, 15, 8, generator=generator)
    same = (torch.arange(15) < 9)[:, None] == (torch.arange(15) < 9)
    weights = (0.7 * q @ k.mT).masked_fill(~same.tril(), -torch.inf).softmax(-1)
    for size in (3, 12):
        v = torch.randn(1, 4, 15, size, generator=generator)
        found, _ = packed_attention(None, q, k, v, None, packed=packed, scaling=0.7)
        torch.testing.assert_close(found, (weights @ v).transpose(1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["queries", "keys", "values", "heads"])
def test_what_does_not_fit_the_row_is_refused(wrong):
    """why_not_packed tries any model, so none may make native code write past the end of a tensor."""
    packed, shapes = Packed.of(sequences(9, 6)), {name: [1, 4, 15, 8] for name in ("queries", "keys", "values")}
    if wrong == "heads":
        shapes["queries"][1] = 3
    else:
        shapes[wrong][2] = 14
    with pytest.raises(RuntimeError, match=r"split_with_sizes expects|must divide"):
        packed_attention(None, *map(torch.zeros, shapes.values()), None, packed=packed)


@pytest.mark.parametrize("native", [True, False])  # a table, a mask
def test_what_is_made_belongs_to_what_was_read_and_not_to_its_address(native):
    (row,) = sequences(20)
    packed, x = Packed.of([row]), torch.randn(1, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    for first in range(15):  # each tensor of positions is freed before the next
        read = torch.arange(first, 20, 3)
        q, fresh = x[:, :, read], Packed.of([row])
        with nullcontext() if native else rlhf_fast.use_backend("reference"):
            found, expected = (packed_attention(None, q, x, x, None, packed=p, read=read)[0] for p in (packed, fresh))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("native", [True, False])
def test_layers_share_what_attention_makes(native, monkeypatch):
    """Else each layer would make a table of the sequences of its own, and keep a mask for its backward."""
    made, name = [], "_table" if native else "_mask"
    make = getattr(packing_module, name)
    monkeypatch.setattr(packing_module, name, lambda *arguments: made.append(make(*arguments)) or made[-1])
    if not native:
        monkeypatch.setattr(packing_module, "_runs_natively", lambda *tensors: False)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=32, **(SIZES | {"num_hidden_layers": 4})))
    tokens = torch.arange(20)
    packed = Packed.of([tokens, tokens, tokens.flip(0)], [(0, 0), (0, 12), (0, 0)])
    with packing(model):
        for read in (torch.arange(4, 30, 3), torch.arange(2, 40, 5)):
            before = len(made)
            expected = packed_hidden_states(model, Packed.of([tokens, tokens, tokens.flip(0)], packed.prefixes), read)
            count, made[before:] = len(made) - before, []
            torch.testing.assert_close(packed_hidden_states(model, packed, read), expected, atol=0, rtol=0)
    # A table for all queries and one for what is read; a mask for the shared prefix, and of each sequence that is read.
    assert (count, len(made)) == ((2, 1 + 2) if native else (4, 1 + 2 * 3))


def test_threads_can_take_the_sequences_that_share_nothing_one_by_one():
    packed = Packed.of(sequences(9, 6, 5, 4), [(0, 0), (0, 0), (0, 3), (1, 2)])
    _, families = packing_module._table(packed, packed.lengths)
    assert families.tolist() == [0, 2, 4]
    _, families = packing_module._table(Packed.of(sequences(9, 6, 5, 4)), [9, 6, 5, 4])
    assert families.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_the_last_mlp_runs_only_for_what_is_read(architecture):
    model = build(architecture)
    packed, read, seen = Packed.of(sequences(9, 1, 17, 4)), torch.tensor([2, 8, 9, 26, 30]), []
    whole = together(model, packed)
    mlp = models.trunk_layers(model)[-1].mlp
    down = getattr(mlp, "down_proj", None) or mlp.c_proj
    hook = down.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape[-2]))
    with packing(model):
        some = packed_hidden_states(model, packed, read)
    hook.remove()
    torch.testing.assert_close(some, whole[read], rtol=1e-5, atol=1e-6)
    assert seen == [5] and not mlp._forward_hooks and not mlp._forward_pre_hooks


def test_a_last_mlp_that_also_returns_router_logits():
    class Routed(torch.nn.Module):
        def forward(self, x):
            return 2 * x, x[..., :1]

    model, x, read = build(llama), torch.randn(1, 5, 32), torch.tensor([1, 4])
    models.trunk_layers(model)[-1].mlp = mlp = Routed()
    with packing_module._last_mlp_for(model, read, 5):
        out, logits = mlp(x)
    assert torch.equal(out[:, read], 2 * x[:, read]) and not out[:, [0, 2, 3]].any()
    assert torch.equal(logits, x[:, read, :1])


@pytest.mark.parametrize("architecture", [llama, qwen2, gpt2, gpt_neox, sliding])
def test_what_is_read_may_lie_anywhere(architecture):
    """In our forward the last layer computes only what is read: nothing of a sequence, all of it, or the part after a
    shared beginning. Hidden states and gradients are those of the whole row, indexed."""
    model = build(architecture)
    a, b, c, d = sequences(20, 7, 5, 9)
    packed = Packed.of([a, torch.cat([a[:13], b]), c, torch.cat([a[:13], d])], [(0, 0), (0, 13), (0, 0), (0, 13)])
    read = torch.tensor([3, 11, 19, *range(20, 27), 32, 34, 40])
    direction = torch.randn(len(read), 32, generator=torch.Generator().manual_seed(0))
    results = []
    for own in (True, False):
        with packing(model), pytest.MonkeyPatch.context() as patch:
            if not own:
                patch.setattr("rlhf_fast.packing.runs_here", lambda model: False)
            hidden = packed_hidden_states(model, packed, read)
            results.append((hidden.detach(), gradients(model, (hidden * direction).sum())))
    (hidden, found), (expected, wanted) = results
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_of_which_nothing_is_read(architecture):
    model = build(architecture)
    with packing(model):
        hidden = packed_hidden_states(model, Packed.of(sequences(3, 4)), torch.empty(0, dtype=torch.long))
        assert hidden.shape == (0, 32)
        hidden.sum().backward()


def gradients(model, loss):
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_transformers_on_each_sequence(architecture, checkpointing, flash, use_flash):
    if flash and architecture is gemma2:
        pytest.skip("the flash attention of this test has no softcap")
    model = build(architecture)
    if flash:
        model.double()  # in float32 transformers looks for an nn.Linear to get a dtype, and gpt2 has none
    generator = np.random.default_rng(0)
    examples = [Encoded(row.numpy().astype(np.int32), generator.random(len(row)) < 0.5) for row in sequences(9, 2, 17)]
    total, expected = sum(e.num_labels for e in examples), 0.0
    for e in examples:
        ids, mask = torch.from_numpy(e.input_ids).long(), torch.from_numpy(e.response_mask)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        expected += torch.nn.functional.cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum") / total
    wanted = gradients(model, expected)
    if checkpointing:
        model.train()  # these have no dropout, and only train mode recomputes
        models.checkpoint_activations(model)
        for module in model.modules():
            module.p = 0.0
    packed, batch = pack_sft(examples)
    called = use_flash(model) if flash else []
    with packing(model):
        hidden, weight, bias, softcap = models.lm_head(model, packed_hidden_states(model, packed, batch["positions"]))
        loss = linear_cross_entropy(hidden, weight, batch["labels"], bias=bias, softcap=softcap, normalizer=total)
        found = gradients(model, loss)
    assert len(called) == (2 + 2 * checkpointing) * flash  # layers, twice if they are recomputed
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert max(g.abs().max() for g in wanted.values()) > 0.1
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", [x for x in ARCHITECTURES if x is not gemma2])  # without softcap
@torch.no_grad()
def test_flash_attention_sees_each_sequence_alone(architecture, use_flash):
    model = build(architecture).double()
    rows = sequences(9, 1, 17)
    expected = alone(model, rows)
    called = use_flash(model)
    row = together(model, Packed.of(rows))
    torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)
    other = together(model, Packed.of([sequences(9, seed=1)[0], *rows[1:]]))
    assert not torch.equal(other[:9], row[:9]) and torch.equal(other[9:], row[9:]) and len(called) == 4
    with pytest.raises(NotImplementedError, match="without shared prefixes"):
        together(model, Packed.of(rows[:1] * 2, [(0, 0), (0, 3)]))


def test_the_look_at_flash_attention_is_as_narrow_as_the_training(monkeypatch):
    """A float32 model under bf16 autocast: transformers passes 16 bits to the kernel, which accepts nothing else."""

    def only_16_bits(module, query, key, value, attention_mask, cu_seq_lens_q=None, **options):
        assert torch.is_autocast_enabled("cpu"), "FlashAttention only supports fp16 and bf16"
        query, key, value = (x.bfloat16() for x in (query, key, value))
        lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
        packed = Packed.of([torch.zeros(length) for length in lengths])
        options = {name: value for name, value in options.items() if name in ("scaling", "dropout")}
        return packed_attention(module, query, key, value, None, packed=packed, **options)

    model = build(llama)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", only_16_bits)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert "only supports fp16" in why_not_packed(model, 64)
    assert why_not_packed(model, 64, bf16=True) is None


def test_models_that_cannot_be_packed_say_why():
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4))
    # In transformers 4 Bloom does not pass our keywords on, and MPT ignores positions
    assert re.search(
        "lets one sequence in a row attend to another|does not run on .* unexpected", why_not_packed(bloom, 64)
    )
    assert "leaves out the softcap" in why_not_packed(build(gemma2, attn_implementation="sdpa"), 64)
    mpt = MptForCausalLM(MptConfig(vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_seq_len=64))
    assert re.match("MptForCausalLM (does not run on .*'NoneType'|lets one sequence)", why_not_packed(mpt, 64))
    assert bloom.training and bloom.config._attn_implementation == "eager"


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
def test_whether_a_model_can_be_packed_does_not_depend_on_the_size_of_its_outputs(size):
    torch.manual_seed(0)
    bloom, model = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)), build(llama)
    bloom.transformer.ln_f.weight.data.mul_(size)
    model.model.norm.weight.data.mul_(size)
    assert why_not_packed(bloom, 64) is not None and why_not_packed(model, 64) is None


def test_a_vocabulary_of_four_tokens_does_not_speak_against_packing():
    assert why_not_packed(LlamaForCausalLM(LlamaConfig(vocab_size=4, hidden_size=32, **SIZES)), 64) is None


def test_outside_of_packing_it_is_refused():
    with pytest.raises(RuntimeError, match="call it within packing"):
        packed_hidden_states(build(gpt2), Packed.of(sequences(3, 4)), torch.arange(7))


def test_dropout_does_not_speak_against_packing():
    model = build(gpt2, attn_pdrop=0.5).train()
    assert why_not_packed(model, 64) is None and model.training


def test_an_error_without_a_message_is_told_by_its_type(monkeypatch):
    def silent(*args, **options):
        raise StopIteration  # as transformers does before the kernel in a float32 gpt2

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", silent)
    model = build(llama)
    model.config._attn_implementation_internal = "flash_attention_2"
    assert "in one row (StopIteration())" in why_not_packed(model, 64)


def test_a_model_that_is_nan_is_refused_in_words():
    model = llama()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ConfigError, match="the outputs of LlamaForCausalLM are not finite"):
        why_not_packed(model, 64)


def test_an_attention_from_elsewhere_is_not_replaced(monkeypatch):
    """Nor trusted if the test sequences show no difference: this one differs only beyond their length."""

    def within_nine(module, query, key, value, attention_mask, *, scaling, **options):
        distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
        mask = (distance >= 0) & (distance < 9)
        return scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True).transpose(
            1, 2
        ), None

    model = build(llama)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "within_nine", within_nine)
    model.config._attn_implementation_internal = "within_nine"
    assert "LlamaForCausalLM uses within_nine as its attention" in why_not_packed(model, 64)


ROPES = {
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [8.0] * 4,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_positions_that_the_longest_sequence_rescales_are_packed_only_below_that_length(kind, tmp_path):
    most = 16 if kind == "dynamic" else 64
    model = build(llama, max_position_embeddings=most, rope_scaling={"rope_type": kind, **ROPES[kind]})
    if "original_max_position_embeddings" in ROPES[kind]:  # transformers 4 looks for it here, as in Phi-3
        model.config.original_max_position_embeddings = ROPES[kind]["original_max_position_embeddings"]
    short, other, long = (torch.arange(3, 3 + n) for n in (12, 16, 57))

    def packed(*sequences):
        with packing(model):
            return packed_hidden_states(model, Packed.of(sequences), torch.arange(12))

    def padded(*sequences):
        return models.hidden_states(model, torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True))[0, :12]

    assert why_not_packed(model, 16) is None
    with torch.no_grad():
        alone = padded(short)
        torch.testing.assert_close(packed(short, other), alone, rtol=1e-5, atol=1e-5)
        for together in (packed, padded):  # both are as the warning says
            assert (together(short, long) - alone).abs().max() > 0.01 * alone.abs().max()
    assert "beyond 16 tokens LlamaForCausalLM scales its rotary positions" in why_not_packed(model, 57)
    assert why_no_decoder(model) is not None


def test_a_trainer_packs_such_a_model_by_the_lengths_of_its_data(tmp_path):
    tokenizer = tiny_tokenizer()
    for n, packs in ((1, True), (20, False)):
        rope = {"rope_type": "longrope", **ROPES["longrope"]}
        model, data = tiny_model(tokenizer, rope_scaling=rope), [{"prompt": "a", "completion": "b" * n}]
        with nullcontext() if packs else pytest.warns(UserWarning, match="beyond 16 tokens .* but batch sizes of 1 do"):
            sft = SFTTrainer(SFTConfig(str(tmp_path / "run")), model, train_dataset=data, tokenizer=tokenizer)
        assert sft.packed is packs


def test_rows_are_filled_by_best_fit():
    assert pack_rows([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack_rows([30, 1], 10) == [[0], [1]]
    lengths = np.random.default_rng(0).integers(1, 50, 500).tolist()
    rows = pack_rows(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    assert len(rows) <= 1.02 * sum(lengths) / 100


def test_the_search_for_a_row_does_not_grow_with_the_rows(monkeypatch):
    """A list of all rows, from which each sequence took one, made 400,000 sequences take a minute."""
    searched = []
    monkeypatch.setattr(collate, "bisect_left", lambda room, *x: searched.append(len(room)) or bisect_left(room, *x))
    lengths = np.random.default_rng(0).integers(20, 60, 5000).tolist()
    rows = pack_rows(lengths, 64)
    assert len(rows) > 2000 and max(searched) <= 64
    plain: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = [64 - sum(lengths[j] for j in row) - lengths[i] for row in plain]
        best = min((x for x in left if x >= 0), default=None)
        plain[left.index(best)].append(i) if best is not None else plain.append([i])
    assert rows == plain


def test_responses_share_their_prompt_but_keep_a_token_of_their_own():
    prompt = np.arange(20)
    items = [
        Comparison([np.r_[prompt, 50, 51], np.r_[prompt, 60]], [0, 1]),
        Comparison([prompt[:5], np.r_[prompt[:5], 7]], [0, 1]),  # too little to share
        Comparison([prompt, np.r_[prompt, 7], np.r_[prompt, 8]], [0, 1, 2]),  # the first is a prefix of the others
        Comparison([np.r_[prompt, 7, 8], np.r_[prompt, 7, 9], np.r_[prompt, 6, 5]], [0, 1, 2]),  # the last less
    ]
    packed, batch = pack_comparisons(items, width=3)
    assert packed.lengths == [22, 1, 5, 6, 20, 2, 2, 22, 2, 2]
    assert packed.prefixes == [(0, 0), (0, 20), (2, 0), (2, 0), (4, 0), (4, 19), (4, 19), (7, 0), (7, 20), (7, 20)]
    assert packed.input_ids[0, batch["last"]].tolist() == [51, 60, 4, 7, 19, 7, 8, 8, 9, 5]
    assert batch["slot"].tolist() == [[0, 1, 0], [2, 3, 2], [4, 5, 6], [7, 8, 9]]
    unshared, _ = pack_comparisons(items, width=3, share=False)
    assert unshared.lengths == [22, 21, 5, 6, 20, 21, 21, 22, 22, 22]


def test_sorted_sequences_share_with_the_one_that_saves_most():
    system, asked, other = range(20), range(50, 90), range(100, 140)
    rows = [
        [*system, *asked, 1], [*system, *asked, 2, 3], [*system, *asked, 2, 3],
        [*system, *other], [*system, *other, 7], [*system, *other, 7, 8], [200], [200, 201],
    ]  # fmt: skip
    packed, last = pack_sorted(rows)
    assert packed.prefixes == [(0, 0), (0, 60), (0, 60), (3, 0), (3, 60), (3, 60), (6, 0), (7, 0)]
    assert packed.lengths == [61, 2, 2, 60, 1, 2, 1, 2] and packed.input_ids[0, last].tolist() == [r[-1] for r in rows]
    packed, _ = pack_sorted(rows[2:5])  # 20 tokens less, or 40 more that the last one would save
    assert packed.prefixes == [(0, 0), (1, 0), (1, 60)]
    packed, _ = pack_sorted(rows[2:5] + rows[6:])  # also if those after it have nothing in common with any
    assert packed.prefixes == [(0, 0), (1, 0), (1, 60), (3, 0), (4, 0)]
    packed, _ = pack_sorted(rows[2:4])
    assert packed.prefixes == [(0, 0), (0, 20)]
    # What the last two share saves nothing by sharing with the second.
    packed, _ = pack_sorted([[*system, 1], [*system, 2], [*other, *asked, 1], [*other, *asked, 2]])
    assert packed.prefixes == [(0, 0), (0, 20), (2, 0), (2, 80)]
    packed, _ = pack_sorted([[*system, 1]] * 2)
    assert packed.prefixes == [(0, 0), (0, 20)] and packed.lengths == [21, 1]
    assert pack_sorted([[5]])[0].lengths == [1]


def test_a_trainer_fills_its_rows_and_learns_the_same(tmp_path):
    """All examples in one step, packed or one by one: the same loss and the same new weights."""
    tokenizer = tiny_tokenizer()
    data = [{"prompt": f"say {'the cat ' * (i % 5)}", "completion": f"{i} sat"} for i in range(12)]
    seen = []
    for packs in (False, True):
        config = SFTConfig(str(tmp_path / str(packs)), packing=packs, max_length=60, per_device_train_batch_size=12)
        sft = SFTTrainer(config, tiny_model(tokenizer), train_dataset=data, tokenizer=tokenizer)
        (metrics,) = list(sft)
        seen.append((len(sft.rows), metrics["loss"], torch.cat([p.detach().flatten() for p in sft.model.parameters()])))
    (rows, loss, weights), (fewer, same_loss, same_weights) = seen
    assert rows == 12 and fewer < 6
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(same_weights, weights, rtol=0, atol=1e-6)


def test_a_model_that_cannot_be_packed_is_padded_or_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    data = [{"prompt": "say ", "completion": "the cat " * n} for n in (1, 5)]
    losses = {}
    with pytest.warns(UserWarning, match=r"batches are padded.*BloomForCausalLM"):
        for size in (1, 2):
            torch.manual_seed(0)
            sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2 // size}
            sft = SFTTrainer(
                SFTConfig(str(tmp_path / "run"), **sizes),
                BloomForCausalLM(config),
                train_dataset=data,
                tokenizer=tokenizer,
            )
            losses[size] = next(iter(sft))["loss"].item()
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    with pytest.raises(ConfigError, match=r"packing: .*set packing to false"):
        SFTTrainer(
            SFTConfig(str(tmp_path / "run"), packing=True),
            BloomForCausalLM(config),
            train_dataset=data,
            tokenizer=tokenizer,
        )


# -- attention in native code (csrc/cpu/attention.cpp) -------------------------------------------------------------


def reference_attention(q, k, v, packed, read, scale, window, softcap=None):
    """(1, H, M, d), (1, G, N, d) twice -> (1, M, H, d), by its definition: each sequence with a mask of its own."""
    starts, position = np.cumsum([0, *packed.lengths]), packed.position_ids[0]
    outputs = []
    for token, head in zip(read.tolist(), q[0].transpose(0, 1), strict=True):
        i = int(np.searchsorted(starts, token, side="right")) - 1
        parent, shared = packed.prefixes[i]
        keys = [*range(starts[parent], starts[parent] + shared), *range(starts[i], token + 1)][-window:]
        assert len(keys) == min(window, int(position[token]) + 1)
        group = q.shape[1] // k.shape[1]
        key, value = (x[0, :, keys].repeat_interleave(group, 0) for x in (k, v))
        scores = scale * head[:, None] @ key.mT
        weights = (scores if softcap is None else softcap * (scores / softcap).tanh()).softmax(-1)
        outputs.append((weights @ value)[:, 0])
    return torch.stack(outputs)[None]


ROWS = {
    "one sequence": ([50], None),
    "short ones": ([1, 3, 1, 2], None),
    "more than a block of queries, and than a chain of keys": ([300, 100], None),
    "shared beginnings": ([60, 70, 23, 61, 9], [(0, 0), (0, 50), (0, 1), (3, 0), (3, 5)]),
    "siblings that share more or less": ([200, 170, 203, 140, 75], [(0, 0), (0, 130), (0, 200), (0, 64), (0, 70)]),
    "a family in two places": ([20, 30, 40, 33], [(0, 0), (1, 0), (0, 19), (1, 30)]),
}
HEADS = [(2, 2, 64), (4, 1, 8), (6, 2, 20), (1, 1, 160), (3, 3, 1)]


def row_of(name, heads, dtype=torch.float32, seed=0):
    """-> Packed, q, k, v, and the gradient of the output."""
    lengths, prefixes = ROWS[name]
    whole = sequences(*lengths)
    if prefixes:
        whole = [
            torch.cat([whole[p][:n], x[n:]]) if n < len(x) else x for x, (p, n) in zip(whole, prefixes, strict=True)
        ]
        prefixes = [(p, min(n, len(x) - 1)) for x, (p, n) in zip(whole, prefixes, strict=True)]
    packed = Packed.of(whole, prefixes)
    (h, g, d), n = heads, packed.input_ids.shape[1]
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(1, size, n, d, generator=generator).to(dtype) for size in (h, g, g, h))
    return packed, q, k, v, grad.transpose(1, 2)


def attended(packed, q, k, v, grad, read=None, **options):
    """-> output and the gradients of q, k, v."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out, _ = packed_attention(None, q, k, v, None, packed=packed, read=read, **options)
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.fixture
def native_calls(monkeypatch):
    called, attention = [], packing_module._layer.packed_attention
    monkeypatch.setattr(packing_module._layer, "packed_attention", lambda *x: called.append(len(x[0])) or attention(*x))
    return called


@pytest.mark.parametrize("window, softcap", [(None, None), (7, None), (None, 2.0), (7, 50.0)])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ROWS)
def test_attention_and_its_gradients_are_at_least_as_exact_as_pytorchs(name, heads, window, softcap, isa, native_calls):
    packed, *inputs = row_of(name, heads)
    n, scale = packed.input_ids.shape[1], 1.7 * heads[2] ** -0.5
    for read in (None, torch.arange(n)[torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.4]):
        q, k, v, grad = inputs
        if read is not None:
            q, grad = q[:, :, read], grad[:, read]
        options = {"read": read, "scaling": scale, "sliding_window": window, "softcap": softcap}
        native_calls.clear()
        found = attended(packed, q, k, v, grad, **options)
        assert native_calls == [q.shape[2]]
        with rlhf_fast.use_backend("reference"):
            peers = attended(packed, q, k, v, grad, **options)
        assert native_calls == [q.shape[2]]
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        read = torch.arange(n) if read is None else read
        exact = reference_attention(*wide, packed, read, scale, window or n, softcap)
        exact.backward(grad.double())
        largest = max(x.grad.abs().max() for x in wide)
        for ours, theirs, right in zip(found, peers, [exact.detach(), *(x.grad for x in wide)], strict=True):
            error, allowed = ((x - right).abs().max() for x in (ours, theirs))
            # Both round capped scores, and where a gradient of three numbers cancels, eager's error may be 0 by luck.
            size = right.abs().max() if softcap is None else largest
            assert error <= 2 * allowed + 6e-7 * size, (error, allowed)


@pytest.mark.parametrize("window, softcap", [(None, None), (140, None), (7, 2.0)])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ROWS)
def test_attention_under_autocast_is_no_less_exact_than_pytorchs(name, heads, window, softcap, isa, native_calls):
    packed, *inputs = row_of(name, heads)
    n, scale = packed.input_ids.shape[1], 1.7 * heads[2] ** -0.5
    for read in (torch.arange(n), torch.arange(n)[torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.4]):
        q, k, v, grad = inputs[0][:, :, read], *inputs[1:3], inputs[3][:, read]
        options = {"read": read, "scaling": scale, "sliding_window": window, "softcap": softcap}
        native_calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            found = attended(packed, q, k, v, grad, **options)
            assert native_calls == [len(read)]
            with rlhf_fast.use_backend("reference"):
                peers = attended(packed, q, k, v, grad, **options)
            assert native_calls == [len(read)]
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        exact = reference_attention(*wide, packed, read, scale, window or n, softcap)
        exact.backward(grad.double())
        size = max(x.grad.norm() for x in wide)
        for ours, theirs, right in zip(found, peers, [exact.detach(), *(x.grad for x in wide)], strict=True):
            assert ours.dtype == torch.float32
            error, allowed = ((x - right).norm() for x in (ours, theirs))
            # Where few numbers are added up eager may be lucky: half a last bit of bfloat16 is 2e-3.
            assert error <= 1.5 * allowed + 2e-3 * size, (error, allowed)


def test_autocast_reaches_attention_and_its_backward(native_calls):
    """On a CPU that multiplies bfloat16: results differ from those in float32, by its rounding."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx512_bf16" not in cpuinfo.read_text():
        pytest.skip("this CPU does not multiply bfloat16")
    packed, *inputs = row_of("one sequence", (2, 2, 64))
    exact = attended(packed, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = attended(packed, *inputs)
        mixed = attended(packed, *(x.bfloat16() for x in inputs[:2]), *inputs[2:])
    assert native_calls == [50] * 3
    for x, y, z in zip(found, exact, mixed, strict=True):
        assert 5e-4 < (x - y).norm() / y.norm() < 1e-2
        torch.testing.assert_close(z.float(), x, rtol=1e-2, atol=1e-2)  # factors that are bfloat16 already


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("heads", [(4, 2, 64), (1, 1, 160)])  # the second in spans of 128 keys
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_bits_of_a_sequence_are_its_own(threads, heads, bf16, isa):
    """Whatever else is in the row, is read, and computes: old log-probabilities and new ones must be equal."""
    packed, q, k, v, grad = row_of("more than a block of queries, and than a chain of keys", heads)
    read = torch.tensor([*range(290, 310, 3), 399])
    before, alone = torch.get_num_threads(), Packed.of([packed.input_ids[0, 300:]])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        whole = attended(packed, q, k, v, grad)
        torch.set_num_threads(threads)
        try:
            second = attended(alone, *(x[:, :, 300:] for x in (q, k, v)), grad[:, 300:])
            some = packed_attention(None, q[:, :, read], k, v, None, packed=packed, read=read)[0]
        finally:
            torch.set_num_threads(before)
    assert torch.equal(second[0], whole[0][:, 300:]) and torch.equal(some, whole[0][:, read])
    assert all(torch.equal(x, y[:, :, 300:]) for x, y in zip(second[1:], whole[1:], strict=True))


@pytest.mark.parametrize("window", [7, 140])
def test_a_window_passes_over_spans_of_keys_that_no_query_sees(window, isa, native_calls):
    """The first queries and the last ones, each in a block of their own: what lies between gets a gradient of 0."""
    packed, q, k, v, grad = row_of("more than a block of queries, and than a chain of keys", (1, 1, 160))
    read = torch.tensor([*range(40, 88), 299])
    found = attended(packed, q[:, :, read], k, v, grad[:, read], read=read, scaling=0.1, sliding_window=window)
    assert native_calls == [49] and not any(x[0, 0, 88 : 300 - window].any() for x in found[2:])
    wide = [x.double().requires_grad_() for x in (q[:, :, read], k, v)]
    exact = reference_attention(*wide, packed, read, 0.1, window)
    exact.backward(grad[:, read].double())
    for ours, right in zip(found, [exact.detach(), *(x.grad for x in wide)], strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=2e-6)


def test_attention_reads_heads_wherever_they_lie(native_calls):
    """As the products of a layer leave them: every head in its own place of a token's row, queries beside keys."""
    packed, q, k, v, grad = row_of("shared beginnings", (4, 2, 16))
    expected = attended(packed, q, k, v, grad, scaling=0.25)
    together = torch.cat([x[0].transpose(0, 1).flatten(1) for x in (q, k, v)], 1)  # (N, (4 + 2 + 2) 16)
    parts = [x.unflatten(1, (-1, 16)).transpose(0, 1)[None] for x in together.split([64, 32, 32], 1)]
    out, _ = packed_attention(None, *parts, None, packed=packed, scaling=0.25)
    assert torch.equal(out, expected[0]) and not any(x.is_contiguous() for x in parts)
    default, _ = packed_attention(None, *parts, None, packed=packed)
    assert torch.equal(default, out) and native_calls == [len(together)] * 3
    apart = [torch.stack([x, x], -1)[..., 0] for x in parts]  # the numbers of a head not side by side
    out, _ = packed_attention(None, *apart, None, packed=packed, scaling=0.25)
    torch.testing.assert_close(out, expected[0])


def test_large_scores_and_what_is_not_a_number(isa):
    packed, q, k, v, _ = row_of("short ones", (2, 2, 8))
    for softcap in (None, 30.0):
        out, _ = packed_attention(None, 1e4 * q, 1e4 * k, v, None, packed=packed, scaling=1.0, softcap=softcap)
        exact = reference_attention(1e4 * q, 1e4 * k, v, packed, torch.arange(7), 1.0, 7, softcap)
        torch.testing.assert_close(out, exact)
    k[0, 1, 2] = torch.nan  # of the second sequence, its second token
    out, _ = packed_attention(None, q, k, v, None, packed=packed)
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 2, 1], [0, 3, 1]]


def test_whoever_watches_sees_pytorchs_attention(native_calls):
    """Forward mode lost its tangents, a trace had numbers of memory that was not yet written."""
    packed, q, k, v, _ = row_of("shared beginnings", (2, 2, 8))
    expected = packed_attention(None, q, k, v, None, packed=packed)[0]
    native_calls.clear()

    def attend(q):
        return packed_attention(None, q, k, v, None, packed=packed)[0]

    torch.testing.assert_close(make_fx(attend)(q)(q), expected)
    torch.testing.assert_close(torch.func.vmap(attend)(torch.stack([q, q]))[1], expected)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(attend, (q,), (q,))
    assert not native_calls


def test_a_compiled_trunk_attends_through_pytorch(native_calls):
    packed, q, k, v, _ = row_of("shared beginnings", (2, 2, 8))

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(q, k, v):
        return packed_attention(None, q, k, v, None, packed=packed)[0]

    torch.testing.assert_close(compiled(q, k, v), packed_attention(None, q, k, v, None, packed=packed)[0])
    assert native_calls == [q.shape[2]]
