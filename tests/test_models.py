"""Models looked at through their trunk: the same numbers as transformers gives, whatever the padding."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from functools import partial

import pytest
import tokenizers
import torch
import transformers
from helpers import tiny_model, tiny_tokenizer, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    CpmAntConfig,
    CpmAntForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MarianConfig,
    MarianForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from rlhf_fast import (
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    linear_token_logprobs,
    models,
)
from rlhf_fast.errors import ConfigError
from rlhf_fast.jobs import answer
from rlhf_fast.models import language
from rlhf_fast.rewards import RewardModelReward, make_reward

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


def llama(tokenizer):
    return tiny_model(tokenizer)


def gpt2(tokenizer):
    """Absolute positions: without position_ids, left padding would change every score."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0)
    config.eos_token_id = config.bos_token_id = config.pad_token_id = tokenizer.eos_token_id
    return GPT2LMHeadModel(config).eval()


def gemma2(tokenizer):
    """A capped softmax, small enough a cap that it bends these logits."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, head_dim=8, final_logit_softcapping=0.1, pad_token_id=0, **SMALL
    )
    return Gemma2ForCausalLM(config).eval()


def cohere(tokenizer):
    """Logits times a factor. transformers has no scalar head for it."""
    torch.manual_seed(0)
    config = CohereConfig(vocab_size=len(tokenizer), hidden_size=32, logit_scale=0.3, pad_token_id=0, **SMALL)
    return CohereForCausalLM(config).eval()


def granite(tokenizer):
    """Logits divided by a factor; no scalar head either."""
    torch.manual_seed(0)
    config = GraniteConfig(vocab_size=len(tokenizer), hidden_size=32, logits_scaling=7.0, pad_token_id=0, **SMALL)
    return GraniteForCausalLM(config).eval()


def olmoe(tokenizer):
    """A mixture of experts without a scalar head."""
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_experts=4, num_experts_per_tok=2, pad_token_id=0, **SMALL
    )
    return OlmoeForCausalLM(config).eval()


def recurrent_gemma(tokenizer):
    """A softcap under another name."""
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=len(tokenizer), hidden_size=32, lru_width=32, logits_soft_cap=0.1, pad_token_id=0,
        **SMALL | {"num_hidden_layers": 3},
    )  # fmt: skip
    return RecurrentGemmaForCausalLM(config).eval()


def gemma4(tokenizer):
    """A model that also reads images: its config has one for text, with the softcap."""
    if not hasattr(transformers, "Gemma4ForConditionalGeneration"):
        pytest.skip("this transformers has none")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    text = {
        **sizes, "vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer), "num_hidden_layers": 2,
        "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "final_logit_softcapping": 0.1,
    }  # fmt: skip
    config = transformers.Gemma4Config(text_config=text, vision_config={**sizes, "num_hidden_layers": 1})
    return transformers.Gemma4ForConditionalGeneration(config).eval()


def sequences(tokenizer):
    """Three sequences of 3, 6 and 9 tokens that end in eos, of which the model may have seen one before the end."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(5, len(tokenizer), (n,), generator=generator) for n in (2, 5, 8)]
    return [torch.cat([row, torch.tensor([tokenizer.eos_token_id])]) for row in rows]


def padded(rows, pad, side, extra=0):
    width = max(map(len, rows)) + extra
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, True
    return ids, mask


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("build", [llama, gpt2, granite])
def test_rewards_do_not_know_padding(build, pad):
    tokenizer = tiny_tokenizer(pad=pad)
    model = models.load_reward_model(build(tokenizer)).eval()
    rows = sequences(tokenizer)
    with torch.no_grad():
        alone = torch.cat([models.score_tokens(model, row[None], torch.ones(1, len(row)).bool()) for row in rows])
        assert alone.std() > 0.1
        for side, extra in (("left", 0), ("right", 0), ("left", 5), ("right", 5)):
            scores = models.score_tokens(model, *padded(rows, tokenizer.pad_token_id, side, extra))
            torch.testing.assert_close(scores, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("build", [llama, gpt2, cohere, olmoe])
def test_the_checkpoint_is_a_transformers_model_with_the_same_scores(build, pad, tmp_path):
    tokenizer = models.with_own_pad(tiny_tokenizer(pad=pad))
    model = models.load_reward_model(build(tokenizer), tokenizer).eval()
    model.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.num_labels == 1 and theirs.config.pad_token_id == tokenizer.pad_token_id
    ids, mask = padded(sequences(tokenizer), tokenizer.pad_token_id, "right")
    with torch.no_grad():
        scores = models.score_tokens(model, ids, mask)
        torch.testing.assert_close(theirs(ids, attention_mask=mask.long()).logits[:, 0], scores, rtol=0, atol=1e-6)
        again = models.load_reward_model(str(tmp_path), tokenizer).eval()
        for parameter in again.parameters():
            # transformers leaves them at the offsets of the file, and on some CPUs the last bits of a product
            # depend on how its operands are aligned.
            parameter.data = parameter.data.clone()
        assert torch.equal(models.score_tokens(again, ids, mask), scores)


def test_a_new_head_is_drawn_as_documented_and_the_trunk_is_a_copy():
    tokenizer = tiny_tokenizer()
    policy = tiny_model(tokenizer, hidden_size=512)
    reward = models.load_reward_model(policy)
    assert reward.score.weight.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
    assert reward.score.bias is None
    trunk, copy = policy.base_model.state_dict(), reward.base_model.state_dict()
    assert all(torch.equal(trunk[k], copy[k]) and trunk[k].data_ptr() != copy[k].data_ptr() for k in trunk)


def test_a_reward_model_goes_on_with_its_head():
    reward = models.load_reward_model(tiny_model(tiny_tokenizer()))
    assert models.load_reward_model(reward) is reward


def test_a_classifier_of_two_labels_is_no_reward_model():
    policy = tiny_model(tokenizer := tiny_tokenizer())
    policy.config.num_labels = 2
    classifier = AutoModelForSequenceClassification.from_config(policy.config)
    takers = (models.load_reward_model, models.ValueModel.from_reward_model, partial(make_reward, tokenizer=tokenizer))
    for take in takers:
        with pytest.raises(ConfigError, match="num_labels=2"):
            take(classifier)


def test_the_last_layers_are_found_in_a_decoder_within_the_trunk():
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=300, num_hidden_layers=3, max_position_embeddings=64, **sizes)
    reward = models.load_reward_model(OPTForCausalLM(config))
    models.train_last_layers(reward, 2)
    learns = {name for name, p in reward.named_parameters() if p.requires_grad}
    assert {name.split(".")[3] for name in learns if ".layers." in name} == {"1", "2"}
    assert not {name for name in learns if "embed" in name or "project" in name}
    assert "model.decoder.final_layer_norm.weight" in learns and "score.weight" in learns
    with pytest.raises(ConfigError, match="train_last_layers = 4, and the model has 3 layers"):
        models.train_last_layers(reward, 4)
    reward.model.decoder.layers = torch.nn.Sequential(*reward.model.decoder.layers)
    with pytest.raises(ConfigError, match="not supported for OPTForSequenceClassification"):
        models.train_last_layers(reward, 1)


def test_an_encoder_is_no_reward_model(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=300, is_decoder=True, num_labels=1, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    for given in (tmp_path, BertForSequenceClassification(config), BertLMHeadModel(config)):
        with pytest.raises(ConfigError, match="BertForSequenceClassification is not supported: a reward"):
            models.load_reward_model(given)


def test_a_reward_models_pad_is_not_eos():
    tokenizer = tiny_tokenizer(pad="<eos>")
    with pytest.raises(ConfigError, match=r"with_own_pad\(tokenizer\)"):
        models.load_reward_model(tiny_model(tokenizer), tokenizer)
    own = models.with_own_pad(tokenizer)
    assert own.pad_token == "<|pad|>" and tokenizer.pad_token == "<eos>"
    assert models.load_reward_model(tiny_model(tokenizer), own).get_input_embeddings().num_embeddings == len(own)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    assert models.with_own_pad(tokenizer).pad_token == "<bos>"
    fine = tiny_tokenizer()
    assert models.with_own_pad(fine) is fine


def test_eos_learns_its_embedding_where_it_is_also_pad():
    tokenizer = tiny_tokenizer(pad="<eos>")
    eos, policy = tokenizer.eos_token_id, tiny_model(tokenizer)
    assert policy.get_input_embeddings().padding_idx == eos
    value = models.ValueModel.from_policy(policy)
    for model in (models.load_policy(policy), models.load_reward_model(policy), value.model):
        hidden = models.hidden_states(model, torch.tensor([[7, eos, 8]]))
        hidden[0, -1].square().sum().backward()
        assert model.get_input_embeddings().weight.grad[eos].abs().max() > 0


@pytest.mark.parametrize("build", [llama, gpt2, gemma2, cohere, granite, gemma4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_from_hidden_states_are_those_of_the_logits(build, temperature):
    tokenizer = tiny_tokenizer()
    model = build(tokenizer)
    ids = torch.randint(5, len(tokenizer), (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :2] = False  # left padding of the prompt
    mask[1, -2:] = False  # right padding of the response
    hidden, weight, bias, softcap = models.lm_head(model, models.hidden_states(model, ids, mask)[:, 4:8])
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, ids[:, 5:], bias=bias, temperature=temperature, softcap=softcap, mask=mask[:, 5:],
        with_entropy=True,
    )  # fmt: skip
    positions = language.position_ids_from_mask(mask)
    logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits / temperature
    everything = logits[:, 4:8].log_softmax(-1)
    expected = everything.gather(-1, ids[:, 5:, None]).squeeze(-1) * mask[:, 5:]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(everything.exp() * everything).sum(-1) * mask[:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [models.scalar_head_on, models.ValueModel.from_policy])
def test_a_scalar_head_is_made_on_the_models_device(make):
    """Random weights of a trunk, which the model's replace, take a CPU two minutes for seven billion."""
    model = tiny_model(tiny_tokenizer()).to("meta")
    before = torch.get_rng_state()
    made = make(model)
    assert {p.device.type for p in made.parameters()} == {"meta"} and torch.equal(torch.get_rng_state(), before)


def test_what_is_loaded_applies_the_softcap_of_its_attention(tmp_path):
    """transformers 4 would leave it out."""
    tokenizer = tiny_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, head_dim=8, attn_logit_softcapping=1e-3, query_pre_attn_scalar=1,
        pad_token_id=0, **SMALL,
    )  # fmt: skip
    ids = torch.arange(5, 20)[None]
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    expected = models.hidden_states(model, ids)
    model.save_pretrained(tmp_path)
    policy, reward = models.load_policy(tmp_path), models.load_reward_model(tmp_path)
    reward.save_pretrained(tmp_path / "reward")
    critic = models.ValueModel.from_policy(policy).model
    for loaded in (policy, critic, reward, models.load_reward_model(tmp_path / "reward")):
        torch.testing.assert_close(models.hidden_states(loaded.eval(), ids), expected)


def test_a_given_model_whose_attention_leaves_out_its_softcap_is_warned_of():
    """transformers 4 makes one silently; transformers 5 refuses to run it."""
    model = gemma2(tokenizer := tiny_tokenizer())
    reward = models.load_reward_model(model)
    for attention in ("eager", "sdpa"):
        for given in (model, reward):
            given.config._attn_implementation_internal = attention
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            models.load_policy(model)
            for take in (models.load_reward_model, models.ValueModel, partial(make_reward, tokenizer=tokenizer)):
                take(reward)
        of_softcap = [str(w.message) for w in told if "leaves out the attn_logit_softcapping" in str(w.message)]
        assert len(of_softcap) == (attention == "sdpa")  # once


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1]]).bool()
    assert language.position_ids_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2], [0, 0, 1, 2]]


def test_logits_that_lm_head_alone_does_not_explain_are_refused():
    for build in (llama, gpt2, gemma2, cohere, granite, recurrent_gemma):
        models.check_lm_head(build(tiny_tokenizer()))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertLMHeadModel(BertConfig(vocab_size=64, is_decoder=True, **sizes))  # a layer between trunk and head
    with pytest.raises(ConfigError, match="BertLMHeadModel is not supported: it does more to its logits"):
        models.check_lm_head(bert.eval())


def test_a_model_that_reads_later_tokens_is_refused(tmp_path):
    """transformers' CPM-Ant attends to the whole text, and XLNet does unless a mask says otherwise."""
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    xlnet = XLNetLMHeadModel(XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, **sizes))
    cpmant = CpmAntForCausalLM(
        CpmAntConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, dim_head=8, dim_ff=64, **sizes)
    )
    why = "is not supported: what it computes at a token depends on the tokens that follow.*Use a decoder"
    text, prompt = [{"text": "the cat sat"}], [{"prompt": "the cat"}]
    config = PPOConfig(str(tmp_path), batch_size=2, minibatch_size=2, advantage_estimator="reinforce")
    for model in (xlnet, cpmant):
        with pytest.raises(ConfigError, match=f"{type(model).__name__} {why}"):
            SFTTrainer(SFTConfig(str(tmp_path)), model, train_dataset=text, tokenizer=tokenizer)
        with pytest.raises(ConfigError, match=f"{type(model).__name__} {why}"):
            PPOTrainer(config, model, reward=lambda *_, **__: 0, train_dataset=prompt, tokenizer=tokenizer)
    pairs = [{"prompt": "the ", "chosen": "cat", "rejected": "sat on it"}]
    with pytest.raises(ConfigError, match=f"CpmAntForSequenceClassification {why}"):
        RewardTrainer(RewardConfig(str(tmp_path)), cpmant, train_dataset=pairs, tokenizer=tokenizer)


def test_a_model_that_keeps_the_state_of_its_last_forward_is_copied():
    model, ids = recurrent_gemma(tiny_tokenizer()), torch.arange(5, 20)[None]
    reward = models.load_reward_model(model)
    expected, _ = models.hidden_states(model, ids), models.hidden_states(reward, ids)  # with a graph, as in training
    for copied in (models.make_reference(model), models.ValueModel.from_reward_model(reward).model):
        torch.testing.assert_close(models.hidden_states(copied, ids), expected)


def test_weights_that_are_nan_or_not_in_memory_are_refused():
    model = llama(tokenizer := tiny_tokenizer())
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(ConfigError, match="the logits of LlamaForCausalLM are NaN"):
        models.check_lm_head(model)
    for load in (models.load_policy, models.load_reward_model):
        with pytest.raises(ConfigError, match="some weights of this LlamaForCausalLM are not in memory"):
            load(llama(tokenizer).to("meta"))


def test_architectures_without_a_trunk_are_refused_in_words():
    config = Llama4TextConfig(vocab_size=64, hidden_size=32, head_dim=8, num_local_experts=1, pad_token_id=0, **SMALL)
    with pytest.raises(ConfigError, match="Llama4ForCausalLM is not supported: transformers does not say"):
        models.check_lm_head(Llama4ForCausalLM(config))
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    marian = MarianForCausalLM(MarianConfig(vocab_size=64, pad_token_id=0, decoder_vocab_size=64, **sizes))
    for make in (models.load_reward_model, models.ValueModel.from_policy):
        with pytest.raises(ConfigError, match="made from MarianForCausalLM, whose trunk is no model of transformers"):
            make(marian)


def test_an_architecture_without_a_scalar_head_gets_one_over_its_own_trunk(tmp_path):
    tokenizer = tiny_tokenizer()
    policy = granite(tokenizer)
    value = models.ValueModel.from_policy(policy)
    assert type(value.model.base_model) is type(policy.base_model)
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(models.hidden_states(value.model, ids), models.hidden_states(policy, ids))
    reward = models.load_reward_model(policy, tokenizer).eval()
    models.save_model(reward, tokenizer, tmp_path)
    script = f"""if True:
        import torch
        from rlhf_fast import models
        reward = models.load_reward_model({str(tmp_path)!r}).eval()
        ids = torch.tensor([[7, 8, 9]])
        print(repr(models.score_tokens(reward, ids, torch.ones_like(ids)).item()))
    """  # a process that has made none of these
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    with torch.no_grad():
        assert float(done.stdout) == models.score_tokens(reward, ids, torch.ones_like(ids)).item()


def test_what_is_no_transformers_model_is_refused_in_words(tokenizer):
    wrapped = torch.nn.Sequential()
    wrapped.module = tiny_model(tokenizer)
    for load in (models.load_policy, models.load_reward_model, models.load_tokenizer):
        with pytest.raises(ConfigError, match=r"Sequential is not a transformers model.*: give what it wraps, its .mo"):
            load(wrapped)
        with pytest.raises(ConfigError, match=r"Linear is not a transformers model.*: give a model.*, as object, name"):
            load(torch.nn.Linear(2, 2))


def test_the_trunk_makes_no_logits(monkeypatch):
    model = tiny_model(tiny_tokenizer())
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("the lm_head ran"))
    assert models.hidden_states(model, torch.tensor([[5, 6, 7]])).shape == (1, 3, 32)


def test_the_scalar_head_works_in_float32_over_a_bfloat16_trunk():
    tokenizer = tiny_tokenizer()
    model = models.load_reward_model(tiny_model(tokenizer).bfloat16()).eval()
    ids, mask = padded(sequences(tokenizer), tokenizer.pad_token_id, "right")
    with torch.no_grad():
        scores = models.score_tokens(model, ids, mask)
        last = models.hidden_states(model, ids)[range(3), mask.sum(1) - 1]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, (last.double() @ model.score.weight.double().T)[:, 0].float())


def test_a_value_model_starts_at_the_reward_or_at_zero(tmp_path):
    tokenizer = tiny_tokenizer()
    reward = models.load_reward_model(tiny_model(tokenizer)).requires_grad_(False).eval()
    ids, mask = padded(sequences(tokenizer), tokenizer.pad_token_id, "left")
    value = models.ValueModel.from_reward_model(reward)
    with torch.no_grad():
        torch.testing.assert_close(value(ids, mask)[:, -1], models.score_tokens(reward, ids, mask), rtol=0, atol=1e-6)
    assert all(p.requires_grad for p in value.parameters())
    assert not {p.data_ptr() for p in value.parameters()} & {p.data_ptr() for p in reward.parameters()}
    assert models.ValueModel.from_policy(tiny_model(tokenizer))(ids, mask).abs().max() == 0
    # In the unit of the reward that PPO gets, also after it is saved.
    models.set_reward_scale(reward, 5.0, 0.1)
    prompts, responses = ["say ", "the "], ["hello", "cat sat"]
    served = RewardModelReward(reward, tokenizer)
    models.ValueModel.from_reward_model(reward).model.save_pretrained(tmp_path)
    value = models.ValueModel.from_reward_model(models.load_reward_model(tmp_path))
    for prompt, response, score in zip(prompts, responses, served(prompts, responses), strict=True):
        last = value(torch.from_numpy(served.encode(prompt, response))[None])[0, -1]
        torch.testing.assert_close(last, score, rtol=1e-4, atol=1e-4)


def test_a_reference_is_frozen_and_apart():
    policy = tiny_model(tiny_tokenizer()).train()
    reference = models.make_reference(policy)
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    with torch.no_grad():
        policy.lm_head.weight.add_(1.0)
    assert not torch.equal(policy.lm_head.weight, reference.lm_head.weight)
    assert all(p.requires_grad for p in policy.parameters())


def test_without_dropout_train_mode_answers_like_eval_mode():
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, attn_pdrop=0.5)
    model, ids = GPT2LMHeadModel(config).train(), torch.tensor([[5, 6, 7, 8]])
    assert not torch.equal(models.hidden_states(model, ids), models.hidden_states(model, ids))
    models.disable_dropout(model)
    assert torch.equal(models.hidden_states(model, ids), models.hidden_states(model.eval(), ids))
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32}
    for model in (  # rates kept outside any nn.Dropout
        tiny_model(tokenizer, attention_dropout=0.5),
        OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                                 num_attention_heads=4, dropout=0.5, layerdrop=0.5)),
        BloomForCausalLM(BloomConfig(**sizes, n_layer=1, n_head=4, hidden_dropout=0.5)),
    ):  # fmt: skip
        model.train()
        random = [models.hidden_states(model, ids) for _ in range(8)]
        assert any(not torch.equal(h, random[0]) for h in random)
        models.disable_dropout(model)
        whole = models.hidden_states(model.eval(), ids)
        assert all(torch.equal(models.hidden_states(model.train(), ids), whole) for _ in range(8))


def test_tokenizers_and_models_are_found_by_path(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    with pytest.raises(ConfigError, match="give its tokenizer"):
        models.load_tokenizer(model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = models.load_policy(str(tmp_path))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert models.load_tokenizer(tmp_path).pad_token == "<eos>"
    assert models.load_tokenizer(loaded).eos_token == "<eos>"
    assert models.load_tokenizer(tokenizer) is tokenizer


def test_a_tokenizer_reads_from_its_directory_as_it_did_in_training(tmp_path):
    """Also where AutoTokenizer would take the class of the model_type, which splits digits apart."""
    tokenizer, text = tiny_tokenizer(), "what is two? 12 the cat's hello"
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, **SMALL)
    models.save_model(Qwen2ForCausalLM(config), tokenizer, tmp_path)
    loaded = models.load_tokenizer(tmp_path)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.chat_template == tokenizer.chat_template and loaded.pad_token == "<pad>"


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path):
    """transformers 5.0 makes one for a directory that holds none."""
    words = tokenizers.models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="<unk>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no tokenizer can be loaded from .*: it would have no vocabulary"):
        models.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("config.json", []), ("config.json", None), ("config.json", {"hidden_size": "wide"}),
        ("config.json", {"hidden_act": "none of them"}), ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"pad_token_id": 9999}), ("generation_config.json", []), ("tokenizer_config.json", []),
        ("tokenizer_config.json", {"eos_token": 5}), ("tokenizer.json", None),
    ],
)  # fmt: skip
def test_a_file_of_a_model_that_somebody_broke_is_one_line(tokenizer, model, tmp_path, name, changed):
    models.save_model(model, tokenizer, tmp_path)
    whole = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(whole | changed if isinstance(changed, dict) else changed))
    with pytest.raises(ConfigError, match=r"no (tokenizer|model) can be loaded from .*: restore") as refused:
        models.load_tokenizer(tmp_path), models.load_policy(tmp_path)
    assert "\n" not in str(refused.value)


OWN = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoModelForSequenceClassification": "own.Own"}


@pytest.mark.parametrize(("name", "changed", "message"), [
    ("config.json", {"model_type": "own", "auto_map": OWN}, "has no class for it, and the code that comes with it"),
    ("config.json", {"model_type": "own", "auto_map": {k: f"someone/else--{v}" for k, v in OWN.items()}}, "auto_map"),
    ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}, "auto_map"),
    ("config.json", {"attn_implementation": "someone/kernel"}, "names the kernel someone/kernel .* never run"),
])  # fmt: skip
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(
    tokenizer, model, tmp_path, name, changed, message, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    models.save_model(model, tokenizer, tmp_path)
    (tmp_path / name).write_text(json.dumps(json.loads((tmp_path / name).read_text()) | changed))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for load in (models.load_policy, models.load_reward_model) if name == "config.json" else (models.load_tokenizer,):
        with pytest.raises(ConfigError, match=message):
            load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["model", "adapters"])
def test_a_pickle_that_would_run_code_is_refused(tokenizer, tmp_path, kind):
    path, ran = str(tmp_path / kind), tmp_path / "ran"
    base = tiny_model(tokenizer)
    models.save_model(base, tokenizer, tmp_path / "model")
    if kind == "adapters":
        pytest.importorskip("peft")
        models.save_model(models.add_lora(models.load_policy(str(tmp_path / "model")), r=2, alpha=2), tokenizer, path)
    (weights,) = (tmp_path / kind).glob("*model.safetensors")
    weights.unlink()
    torch.save(
        {"weight": Command(str(ran))}, tmp_path / kind / {"model": "pytorch_model.bin"}.get(kind, "adapter_model.bin")
    )
    with pytest.raises(ConfigError, match="are a pickle that holds more than tensors"):
        models.load_policy(path)
    assert not ran.exists()


def test_a_directory_that_holds_only_a_model_has_no_tokenizer(tokenizer, model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="which holds none: copy the model's there"):
        models.load_tokenizer(tmp_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no eos token"):
        answer(str(tmp_path), ["hi"], None, max_new_tokens=2, temperature=1.0, top_p=1.0, bf16=False, seed=0)


def test_a_model_that_cannot_be_saved_leaves_the_progress_bars_as_they_were(tmp_path):
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled()  # another test in this process may have disabled them
    try:
        for shown in (True, False):
            (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
            with pytest.raises(OSError, match="disk full"):
                models.save_quietly(lambda path: (_ for _ in ()).throw(OSError("disk full")), tmp_path)
            assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_what_ends_an_answer():
    tokenizer, model = tiny_tokenizer(), tiny_model(tiny_tokenizer())
    eos, end_of_turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert models.stop_ids(model, tokenizer) == [eos]
    model.generation_config.eos_token_id = [end_of_turn, eos, 99]  # 99 is a word, and so another tokenizer's end
    assert models.stop_ids(model, tokenizer) == [eos, end_of_turn]
    assert models.stop_ids(models.add_lora(model, r=2, alpha=4), tokenizer) == [eos, end_of_turn]
    model.generation_config.eos_token_id = None
    assert models.stop_ids(model, tokenizer) == [eos]


def test_generate_stops_where_training_says(tmp_path):
    tokenizer, model = tiny_tokenizer(), tiny_model(tiny_tokenizer())
    model.generation_config.eos_token_id = 9
    models.stop_at_eos(model, tokenizer)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [tokenizer.eos_token_id, 9]
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("declared", [2, [0, 2]])
def test_generate_does_not_stop_at_an_eos_that_nobody_chose(declared):
    """LlamaConfig's default, 2, is any token of another tokenizer. Where it is a special token, it is kept."""
    tokenizer, model = tiny_tokenizer(), tiny_model(tiny_tokenizer())
    assert tokenizer.convert_ids_to_tokens(2) == "<|system|>"
    model.generation_config.eos_token_id = declared
    models.stop_at_eos(model, tokenizer)
    assert 2 in model.generation_config.eos_token_id
    words = word_tokenizer(["a", "b", "c", "d"])
    model.generation_config.eos_token_id = declared if declared == 2 else [words.eos_token_id, 2]
    models.stop_at_eos(model, words)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == words.eos_token_id


def test_a_generation_config_that_could_not_be_saved_is_mended_or_refused_before_the_run(tmp_path):
    tokenizer, model = tiny_tokenizer(), tiny_model(tiny_tokenizer())
    model.generation_config.temperature = 0.9  # without do_sample, as in Llama 2's
    models.stop_at_eos(model, tokenizer)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert saved.do_sample and saved.temperature == 0.9
    model.generation_config.early_stopping = True  # without beams
    with pytest.raises(ConfigError, match=r"(?s)could not be saved; fix its generation_config.*early_stopping"):
        models.stop_at_eos(model, tokenizer)


def test_what_the_model_cannot_embed_is_refused():
    tokenizer, model = tiny_tokenizer(), tiny_model(tiny_tokenizer(), max_position_embeddings=16)
    models.check_lengths(model, tokenizer, 16)
    with pytest.raises(ConfigError, match="17 tokens and LlamaForCausalLM has 16 positions: lower max_length"):
        models.check_lengths(model, tokenizer, 17)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match=r"301 tokens and the model embeds 300.*resize_token_embeddings\(301\)"):
        models.check_lengths(model, tokenizer, 4)


def test_the_directory_of_a_run_that_has_not_ended_names_its_newest_checkpoint(tokenizer, model, tmp_path):
    for step in ("checkpoint-9", "checkpoint-10"):
        models.save_model(model, tokenizer, tmp_path / step)
    (tmp_path / "run_config.json").write_text("{}")
    newest = re.escape(repr(str(tmp_path / "checkpoint-10")))
    for load in (models.load_policy, models.load_reward_model, models.load_tokenizer):
        with pytest.raises(ConfigError, match=f"its run has not ended.*give its newest checkpoint, {newest}"):
            load(tmp_path)
    models.save_model(model, tokenizer, tmp_path)
    assert models.load_policy(tmp_path) and models.load_tokenizer(tmp_path)
