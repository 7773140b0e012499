"""LoRA adapters under the same functions as whole models: what they compute, what is saved, what comes back."""

import sys

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_fast import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, models
from rlhf_fast.errors import ConfigError
from rlhf_fast.rewards import RewardModelReward

peft = pytest.importorskip("peft")
IDS = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(tmp_path, model, tokenizer):
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def with_lora(model, **options):
    """Adapters whose B is not 0, so that they show."""
    adapted = models.add_lora(model, r=4, alpha=8, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3) if "lora_B" in name else None
    return adapted.eval()


def hidden(model):
    with torch.no_grad():
        return models.hidden_states(model, IDS)


def test_new_adapters_change_nothing_and_only_they_learn(base):
    policy = models.load_policy(base)
    before = hidden(policy)
    adapted = models.add_lora(policy, r=4, alpha=8)
    assert torch.equal(hidden(adapted.eval()), before)
    learning = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    assert set(models.trained_state(adapted)) == set(learning)


def test_the_policy_without_its_adapters_is_its_own_reference(base):
    before = hidden(models.load_policy(base))
    adapted = with_lora(models.load_policy(base))
    after = hidden(adapted)
    assert (after - before).abs().max() > 0.1
    with models.adapters_off(adapted):
        assert torch.equal(hidden(adapted), before)
    assert torch.equal(hidden(adapted), after)
    with pytest.raises(ConfigError, match="make_reference"), models.adapters_off(models.load_policy(base)):
        pass


def test_hidden_states_are_those_of_the_adapted_model(base):
    adapted = with_lora(models.load_policy(base))
    with torch.no_grad():
        theirs = adapted(input_ids=IDS).logits
        ours = torch.nn.functional.linear(*models.lm_head(adapted, hidden(adapted))[:2])
    torch.testing.assert_close(ours, theirs)
    assert (hidden(models.merge_adapters(adapted)) - hidden(adapted)).abs().max() < 1e-5
    assert models.has_adapters(adapted)  # merging was done on a copy


def test_a_policy_comes_back_from_its_adapters_and_learns_on(base, tmp_path):
    adapted = with_lora(models.load_policy(base))
    adapted.save_pretrained(tmp_path / "lora")
    again = models.load_policy(tmp_path / "lora")
    assert torch.equal(hidden(again.eval()), hidden(adapted))
    assert set(models.trained_state(again)) == set(models.trained_state(adapted))
    assert models.load_tokenizer(tmp_path / "lora").get_vocab() == models.load_tokenizer(base).get_vocab()
    # As peft and transformers load it, without this package.
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert torch.equal(hidden(theirs.eval()), hidden(adapted))


def test_adapters_bring_the_generation_config_of_their_training(base, tmp_path, tokenizer):
    config, data = SFTConfig(str(tmp_path / "sft"), max_steps=1, lora_r=2), [{"prompt": "say ", "completion": "cat"}]
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.update(eos_token_id=9, do_sample=True, temperature=0.6)
    SFTTrainer(config, model, train_dataset=data, tokenizer=tokenizer).train()
    loaded = models.load_policy(tmp_path / "sft").generation_config
    assert loaded.eos_token_id == [tokenizer.eos_token_id, 9] and loaded.pad_token_id == tokenizer.pad_token_id
    assert (loaded.do_sample, loaded.temperature) == (True, 0.6)
    (tmp_path / "sft" / "generation_config.json").unlink()  # as peft alone saves
    assert models.load_policy(tmp_path / "sft").generation_config.eos_token_id == tokenizer.eos_token_id


def test_transformers_and_peft_read_what_the_trainers_save_of_adapters(base, tmp_path):
    """Without this package; a reward model's too whose base has adapters itself, which they would leave out."""
    data = [{"prompt": "say ", "completion": "cat"}]
    SFTTrainer(
        SFTConfig(str(tmp_path / "sft"), learning_rate=0.1, max_steps=3, lora_r=2), base, train_dataset=data
    ).train()
    ours = hidden(models.load_policy(tmp_path / "sft").eval())
    assert (ours - hidden(models.load_policy(base))).abs().max() > 0.01
    for read in (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        torch.testing.assert_close(hidden(read.from_pretrained(tmp_path / "sft").eval()), ours, rtol=0, atol=1e-6)

    pairs = [{"prompt": "say ", "chosen": "cat", "rejected": "mat"}]
    for name, read in (
        ("base", peft.AutoPeftModelForSequenceClassification),
        ("sft", AutoModelForSequenceClassification),
    ):
        config = RewardConfig(str(tmp_path / f"rm-{name}"), learning_rate=0.1, max_steps=3, lora_r=2)
        RewardTrainer(config, str(tmp_path / name), train_dataset=pairs).train()
        theirs = read.from_pretrained(config.output_dir, num_labels=1).eval()
        ours = models.load_reward_model(config.output_dir).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_peft_reads_a_reward_models_adapters_as_the_docs_say(tmp_path, pad):
    """If eos pads, the base's config names it, and the reward model has a pad token that the base does not embed."""
    tokenizer = tiny_tokenizer(pad=pad)
    for part in (tiny_model(tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "base")
    config = RewardConfig(str(tmp_path / "rm"), learning_rate=0.1, max_steps=3, lora_r=2)
    pairs = [{"prompt": "say ", "chosen": "the cat", "rejected": "mat"}]
    RewardTrainer(config, str(tmp_path / "base"), train_dataset=pairs).train()
    ours = RewardModelReward.load(config.output_dir)(["say ", "say "], ["the cat", "mat"])
    tokenizer = AutoTokenizer.from_pretrained(config.output_dir)
    batch = tokenizer([f"say {answer}{tokenizer.eos_token}" for answer in ("the cat", "mat")], padding=True)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(config.output_dir, num_labels=1).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        theirs = model(**batch.convert_to_tensors("pt")).logits[:, 0]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 8]}],
    ids=["a matrix", "rows of its own"],
)
def test_adapters_on_the_embeddings_learn_like_others(base, tmp_path, tokenizer, options):
    data = [{"prompt": "say ", "completion": "the cat", "chosen": "cat", "rejected": "sat"}]
    given = {"train_dataset": data, "tokenizer": tokenizer}
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options)
    peft.get_peft_model(models.load_policy(base), lora).save_pretrained(tmp_path / "lora")
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=["score"], **options)
    peft.get_peft_model(models.load_reward_model(base, tokenizer), lora).save_pretrained(tmp_path / "rm")
    sft = SFTTrainer(SFTConfig(str(tmp_path / "a"), max_steps=1), str(tmp_path / "lora"), **given)
    assert sft.packed and torch.isfinite(next(iter(sft))["grad_norm"])
    reward = RewardTrainer(RewardConfig(str(tmp_path / "b"), max_steps=1), str(tmp_path / "rm"), **given)
    assert reward.packed and torch.isfinite(next(iter(reward))["grad_norm"])
    zero = lambda prompts, responses, **columns: [0.0] * len(responses)  # noqa: E731
    config = PPOConfig(str(tmp_path / "c"), batch_size=4, minibatch_size=4, total_episodes=4)
    ppo = PPOTrainer(config, str(tmp_path / "lora"), reward=zero, **given)
    assert float(next(iter(ppo))["policy/first_minibatch_max_abs_log_ratio"]) == 0


@pytest.mark.parametrize(
    ("options", "learning"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [0]}, "trainable_tokens_delta"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "embed_tokens.modules_to_save"),
    ],
)
def test_eos_learns_under_adapters_on_the_embeddings_where_it_is_also_pad(options, learning):
    tokenizer = tiny_tokenizer(pad="<eos>")
    eos, lora = tokenizer.eos_token_id, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options)
    assert eos == 0
    model = models.load_policy(peft.get_peft_model(tiny_model(tokenizer), lora))
    for name, weight in model.named_parameters():
        if "lora_embedding_B" in name:  # at 0 A would have no gradient
            torch.nn.init.ones_(weight)
    models.hidden_states(model, torch.tensor([[7, eos, 8]]))[0, -1].square().sum().backward()
    (grad,) = (p.grad for name, p in model.named_parameters() if learning in name)
    assert (grad.T if "lora" in learning else grad)[eos].abs().max() > 0


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_reward_model_keeps_its_head_with_its_adapters(tmp_path, pad):
    """On top of a policy that is itself adapters, whose merged trunk it must find again."""
    tokenizer = tiny_tokenizer(pad=pad)
    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    with_lora(models.load_policy(tmp_path / "base")).save_pretrained(tmp_path / "sft")
    own = models.with_own_pad(tokenizer)
    reward = with_lora(models.load_reward_model(tmp_path / "sft", own))
    assert any("score" in name for name in models.trained_state(reward))
    mask = torch.ones_like(IDS, dtype=torch.bool)
    with torch.no_grad():
        scores = models.score_tokens(reward, IDS, mask)
        reward.save_pretrained(tmp_path / "rm")
        own.save_pretrained(tmp_path / "rm")
        torch.manual_seed(99)  # a head drawn anew would be another
        again = models.load_reward_model(tmp_path / "rm", own).eval()
        assert torch.equal(models.score_tokens(again, IDS, mask), scores)
        served = RewardModelReward.load(tmp_path / "rm")
        assert not models.has_adapters(served.model)
        torch.testing.assert_close(models.score_tokens(served.model, IDS, mask), scores, rtol=0, atol=1e-5)
        values = models.ValueModel.from_reward_model(again)(IDS)
        torch.testing.assert_close(values[:, -1], scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "gpt2"])
def test_a_model_object_whose_weights_have_other_names_on_disk_gets_adapters(tmp_path, tokenizer, name):
    """transformers 5 renames the head of GPT-NeoX and joins Mixtral's experts; gpt2 on the hub is a trunk alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "num_key_value_heads": 2} if name == "mixtral" else {}
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), pad_token_id=0, **sizes, **experts)
    model = AutoModelForCausalLM.from_config(config)
    (model.base_model if name == "gpt2" else model).save_pretrained(tmp_path)
    for kind in (torch.float32, torch.bfloat16):
        models.check_base_is_saved(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=kind))
    models.check_base_is_saved(models.load_reward_model(tmp_path, tokenizer))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    for x in models.trunk_layers(trained)[1].parameters():
        with torch.no_grad():
            before = x.clone()
            x.view(-1)[-1] += 0.5
        with pytest.raises(ConfigError, match="adapters are saved without the base model's weights"):
            models.check_base_is_saved(trained)
        x.data.copy_(before)
    models.check_base_is_saved(trained)


def test_a_model_object_gets_adapters_only_if_they_will_find_it_again(tmp_path, base, tokenizer):
    def refused(model):
        with pytest.raises(ConfigError, match=r"adapters are saved without the base model's weights.*give the path"):
            models.check_base_is_saved(model)

    models.check_base_is_saved(base)
    for dtype in (torch.float32, torch.bfloat16):
        models.check_base_is_saved(AutoModelForCausalLM.from_pretrained(base, dtype=dtype))
    models.check_base_is_saved(models.load_reward_model(base, tokenizer))  # its head is saved with the adapters
    tied = tiny_model(tokenizer, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied", max_shard_size="20KB")
    assert len(list((tmp_path / "tied").glob("*.safetensors"))) > 1
    models.check_base_is_saved(AutoModelForCausalLM.from_pretrained(tmp_path / "tied"))
    refused(tiny_model(tokenizer))  # comes from nowhere
    trained = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    refused(trained)
    adapted = with_lora(models.load_policy(base))
    refused(adapted)
    refused(models.merge_adapters(adapted))
    longer = AutoModelForCausalLM.from_pretrained(base)
    longer.resize_token_embeddings(len(tokenizer) + 1)
    refused(longer)


def test_adapters_on_a_policy_that_was_trained_in_memory_are_refused(tmp_path, base, tokenizer):
    """They would name the model as it was before, and be loaded on it without a word."""
    data = [{"prompt": "say ", "completion": "the cat", "chosen": "cat", "rejected": "sat"}]
    policy = AutoModelForCausalLM.from_pretrained(base)
    zero = lambda prompts, responses, **columns: [0.0] * len(responses)  # noqa: E731
    list(SFTTrainer(SFTConfig(str(tmp_path / "a"), max_steps=1), policy, train_dataset=data, tokenizer=tokenizer))
    options = {"train_dataset": data, "tokenizer": tokenizer}
    makers = [
        lambda model: SFTTrainer(SFTConfig(str(tmp_path / "b"), lora_r=2), model, **options),
        lambda model: RewardTrainer(RewardConfig(str(tmp_path / "b"), lora_r=2), model, **options),
        lambda model: PPOTrainer(PPOConfig(str(tmp_path / "b"), lora_r=2), model, reward=zero, **options),
    ]
    for make in makers:
        with pytest.raises(ConfigError, match="give the path"):
            make(policy)
        make(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    rm = makers[1](half)  # a frozen base may be in bfloat16: adapters and head learn in float32
    assert {p.dtype for p in rm.model.parameters() if p.requires_grad} == {torch.float32}
    assert rm.model.dtype == torch.bfloat16
    config = PPOConfig(
        str(tmp_path / "c"), lora_r=2, share_trunk=True, batch_size=4, minibatch_size=4, total_episodes=4
    )
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ppo = PPOTrainer(config, half, reward=lambda p, r, **c: [float(len(x)) for x in r], **options)
    assert float(next(iter(ppo))["policy/first_minibatch_max_abs_log_ratio"]) == 0
    with pytest.raises(ConfigError, match="already has adapters"):
        makers[0](with_lora(models.load_policy(base)))
    with pytest.raises(ConfigError, match="give the path"):
        makers[1](with_lora(models.load_policy(base)))  # its trunk would be merged


def test_what_is_frozen_is_refused_with_the_way_on_and_a_base_that_is_gone_is_named_as_one(base, tmp_path, tokenizer):
    with_lora(models.load_policy(base)).save_pretrained(tmp_path / "lora")
    frozen = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    config, data = SFTConfig(str(tmp_path / "a")), [{"prompt": "say ", "completion": "the cat"}]
    with pytest.raises(ConfigError, match="load adapters that are to learn with"):
        SFTTrainer(config, frozen, train_dataset=data, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"call its requires_grad_\(True\)"):
        SFTTrainer(config, models.merge_adapters(frozen), train_dataset=data, tokenizer=tokenizer)
    base.rename(tmp_path / "moved")
    for load in (models.load_policy, models.load_tokenizer):
        with pytest.raises(ConfigError, match=r"the base model of the adapters in .*no such directory"):
            load(tmp_path / "lora")


def test_adapters_without_a_peft_model_are_refused_with_the_way_on(base, tmp_path, tokenizer):
    data = [{"prompt": "say ", "completion": "the cat", "chosen": "cat", "rejected": "sat"}]
    given = {"train_dataset": data, "tokenizer": tokenizer}
    zero = lambda prompts, responses, **columns: [0.0] * len(responses)  # noqa: E731
    rloo = {"advantage_estimator": "rloo", "num_generations": 4}
    makers = [
        lambda model: SFTTrainer(SFTConfig(str(tmp_path / "b")), model, **given),
        lambda model: RewardTrainer(RewardConfig(str(tmp_path / "b")), model, **given),
        lambda model: PPOTrainer(PPOConfig(str(tmp_path / "b")), model, reward=zero, **given),
        lambda model: PPOTrainer(PPOConfig(str(tmp_path / "b"), **rloo), model, reward=zero, **given),
        lambda model: PPOTrainer(PPOConfig(str(tmp_path / "b"), lora_r=2), model, reward=zero, **given),
    ]
    with_lora(models.load_policy(base)).save_pretrained(tmp_path / "lora")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
        added = AutoModelForCausalLM.from_pretrained(base)
        added.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    except ValueError as error:  # transformers 5.24 wants peft 0.22 for adapters without one of peft's models
        pytest.skip(str(error))
    prompt, prefix = (
        peft.get_peft_model(models.load_policy(base), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
        for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig)
    )
    for make in makers:
        for model in (loaded, added):
            with pytest.raises(ConfigError, match=r"give the path of the directory, or peft\.PeftModel\.from_"):
                make(model)
        for model, name in ((prompt, "PROMPT_TUNING"), (prefix, "PREFIX_TUNING")):
            with pytest.raises(ConfigError, match=f"{name} is not supported"):
                make(model)
    references = {"reward": zero, **given}
    PPOTrainer(PPOConfig(str(tmp_path / "b")), base, ref_model=loaded, **references)  # is only read, and read right
    with pytest.raises(ConfigError, match="PROMPT_TUNING is not supported"):
        PPOTrainer(PPOConfig(str(tmp_path / "b")), base, ref_model=prompt, **references)


def test_what_would_be_wrong_is_refused(base, tmp_path, monkeypatch):
    policy = models.load_policy(base)
    with pytest.raises(ConfigError, match="lm_head is not supported"):
        models.add_lora(models.load_policy(base), r=4, alpha=8, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match=r"lora_target_modules: .*no_such"):
        models.add_lora(models.load_policy(base), r=4, alpha=8, target_modules=["no_such"])
    adapted = models.add_lora(policy, r=4, alpha=8)
    with pytest.raises(ConfigError, match="already has adapters"):
        models.add_lora(adapted, r=4, alpha=8)
    with pytest.raises(ConfigError, match="has other adapters"):
        models.load_trained_state(adapted, {})
    adapted.save_pretrained(tmp_path / "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (
        lambda: models.add_lora(models.load_policy(base), r=4, alpha=8),
        lambda: models.load_policy(tmp_path / "lora"),
    ):
        with pytest.raises(ConfigError, match=r"pip install peft"):
            call()
