"""compat.verl: its signatures, numbers worked by hand, and the edges where verl raises or gives NaN."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_fast.compat import verl as v

INF, NAN = math.inf, math.nan
POLICY = "old_log_prob log_prob advantages response_mask loss_agg_mode config rollout_is_weights"
OUTCOME = "token_level_rewards response_mask index epsilon"

SIGNATURES = {
    "logprobs_from_logits": "logits labels inplace_backward",
    "logprobs_from_logits_naive": "logits labels",
    "logprobs_from_logits_v2": "logits labels",
    "logprobs_from_logits_flash_attn": "logits labels inplace_backward",
    "entropy_from_logits": "logits",
    "entropy_from_logits_with_chunking": "logits chunk_size",
    "calculate_sum_pi_squared_from_logits": "logits",
    "masked_sum": "values mask axis",
    "masked_mean": "values mask axis",
    "masked_var": "values mask unbiased",
    "masked_whiten": "values mask shift_mean",
    "clip_by_value": "x tensor_min tensor_max",
    "log_probs_from_logits_response": "input_ids logits response_length",
    "AdaptiveKLController": "init_kl_coef target_kl horizon",
    "AdaptiveKLController.update": "self current_kl n_steps",
    "compute_gae_advantage_return": "token_level_rewards values response_mask gamma lam",
    "compute_grpo_outcome_advantage": f"{OUTCOME} norm_adv_by_std_in_grpo config",
    "compute_grpo_vectorized_outcome_advantage": f"{OUTCOME} norm_adv_by_std_in_grpo config",
    "compute_grpo_passk_outcome_advantage": f"{OUTCOME} norm_adv_by_std_in_grpo config kwargs",
    "compute_rloo_outcome_advantage": f"{OUTCOME} config kwargs",
    "compute_rloo_vectorized_outcome_advantage": f"{OUTCOME} config kwargs",
    "compute_opo_outcome_advantage": f"{OUTCOME} config kwargs",
    "compute_gpg_outcome_advantage": f"{OUTCOME} f_norm alpha config kwargs",
    "compute_reinforce_plus_plus_outcome_advantage": "token_level_rewards response_mask config kwargs",
    "compute_reinforce_plus_plus_baseline_outcome_advantage": f"{OUTCOME} config kwargs",
    "compute_remax_outcome_advantage": "token_level_rewards reward_baselines response_mask config kwargs",
    "compute_rewards": "token_level_scores old_log_prob ref_log_prob kl_ratio",
    "agg_loss": "loss_mat loss_mask loss_agg_mode dp_size batch_num_tokens global_batch_size loss_scale_factor",
    "compute_policy_loss": "old_log_prob log_prob advantages response_mask cliprange cliprange_low cliprange_high "
    "clip_ratio_c loss_agg_mode",
    **{
        f"compute_policy_loss_{name}": POLICY
        for name in ("vanilla", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "cispo", "bypass_mode")
    },
    "compute_policy_loss_reinforce": POLICY.replace("old_", "rollout_"),
    "compute_entropy_loss": "logits response_mask loss_agg_mode",
    "compute_value_loss": "vpreds returns values response_mask cliprange_value loss_agg_mode dp_size "
    "batch_num_tokens global_batch_size loss_scale_factor",
    "kl_penalty": "logprob ref_logprob kl_penalty",
    "apply_kl_penalty": "data kl_ctrl kl_penalty",
    "linear_cross_entropy": "hidden weight labels temperature reduction dist_process_group",
    "FusedLinearForPPO": "chunk_size impl_backend",
    "FusedLinearForPPO.forward": "self hidden_states vocab_weights input_ids temperature",
}
POLICY_LOSSES = sorted(name for name in SIGNATURES if name.startswith("compute_policy_loss_"))


class Fields(SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


class Config(Fields):
    """The fields of verl's ActorConfig that its losses read."""

    def __init__(self, rollout_correction=None, **changes):
        policy = Fields(clip_cov_ratio=0.5, clip_cov_lb=0.0, clip_cov_ub=5.0, kl_cov_ratio=0.3, ppo_kl_coef=1.0)
        policy.rollout_correction = rollout_correction or {}
        fields = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "tau_pos": 1.0, "tau_neg": 2.0}
        super().__init__(**{**fields, "policy_loss": policy, "global_batch_info": {}, **changes})


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_verls_in_its_order(name):
    function = v
    for part in name.split("."):
        function = getattr(function, part)
    assert list(inspect.signature(function).parameters) == SIGNATURES[name].split()


LOSS, MASK = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN], [NAN] * 3]), torch.tensor([[1, 1, 0], [1, 0, 0], [0] * 3])


@pytest.mark.parametrize(
    "mode, arguments, expected",
    [
        ("token-mean", {}, 3.0),  # 9 / 3 tokens
        ("token-mean", {"batch_num_tokens": 18, "dp_size": 2}, 1.0),
        ("token-sum", {"dp_size": 2}, 18.0),
        ("seq-mean-token-sum", {}, 4.5),  # (3 + 6) / 2 sequences
        ("seq-mean-token-sum", {"global_batch_size": 6, "dp_size": 2}, 3.0),
        ("seq-mean-token-mean", {}, 3.75),  # (1.5 + 6) / 2
        ("seq-mean-token-sum-norm", {}, 1.5),  # 4.5 / 3 columns
        ("seq-mean-token-sum-norm", {"loss_scale_factor": 9, "global_batch_size": 2}, 0.5),
    ],
)
def test_aggregation_by_hand(mode, arguments, expected):
    assert v.agg_loss(LOSS, MASK, mode, **arguments).item() == pytest.approx(expected)
    values = LOSS.sqrt() * math.sqrt(2)  # 0.5 (value - 0)^2 is the loss again
    zero = torch.zeros(3, 3)
    assert v.compute_value_loss(values, zero, values, MASK, 9.0, mode, **arguments)[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_an_empty_mask_gives_zero_and_shards_need_the_global_number(mode):
    x = torch.full((2, 3), NAN, requires_grad=True)
    loss = v.agg_loss(x, torch.zeros(2, 3), mode)
    assert loss.item() == 0 and torch.autograd.grad(loss, x)[0].abs().sum() == 0
    if mode != "token-sum":
        with pytest.raises(ValueError, match="dp_size"):
            v.agg_loss(x, torch.zeros(2, 3), mode, dp_size=2)


def test_gae_carries_over_the_gap():
    rewards = torch.tensor([[0.0, 0.0, 9.0, 9.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.5, NAN, NAN, 0.5, 0.5]])
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    advantages, returns = v.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95)
    raw = torch.tensor([[0.428688, 0.45125, 0.0, 0.0, 0.475, 0.5]])
    torch.testing.assert_close(returns, raw + torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.5, 0.5]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(advantages, v.masked_whiten(raw, mask), atol=1e-4, rtol=0)


def test_rewards_in_integers():
    rewards, values, mask = torch.tensor([[0, 0, 1]]), torch.tensor([[0.5, 0.2, 0.1]]), torch.ones(1, 3)
    expected = v.compute_gae_advantage_return(rewards.float(), values, mask, 1.0, 0.95)
    torch.testing.assert_close(v.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95), expected)
    config = SimpleNamespace(gamma=0.5)
    returns = v.compute_reinforce_plus_plus_outcome_advantage(rewards, mask, config)[1]
    assert returns.tolist() == [[0.25, 0.5, 1]]


REWARDS = torch.tensor([[0.0, 1.0], [0.0, 3.0], [5.0, 0.0], [0.0, 0.0]])
TOKENS = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 1]])
PROMPTS = ["b", "b", "a", "b"]  # scores 1, 3, 0 of b: mean 4/3, std sqrt(7/3); 5 of a alone


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("grpo", {}, [x / (math.sqrt(7 / 3) + 1e-6) for x in (-1 / 3, 5 / 3)] + [5 / (1 + 1e-6), -4 / 3 / 1.527526]),
        ("grpo", {"norm_adv_by_std_in_grpo": False}, [-1 / 3, 5 / 3, 5, -4 / 3]),
        ("grpo_vectorized", {"norm_adv_by_std_in_grpo": False}, [-1 / 3, 5 / 3, 5, -4 / 3]),
        ("rloo", {}, [1 - 1.5, 3 - 0.5, 5, 0 - 2]),
        ("rloo_vectorized", {}, [1 - 1.5, 3 - 0.5, 0, 0 - 2]),
        ("opo", {}, [1 - 1.6, 3 - 1.6, 5, -1.6]),  # (2 * 1 + 2 * 3 + 1 * 0) / 5
        ("gpg", {"f_norm": 2.0}, [4 / 3 * x / 2 for x in (-1 / 3, 5 / 3, 5, -4 / 3)]),
    ],
)
def test_outcome_advantages_by_hand(name, options, expected):
    advantages, returns = getattr(v, f"compute_{name}_outcome_advantage")(REWARDS, TOKENS, PROMPTS, **options)
    torch.testing.assert_close(advantages, torch.tensor(expected)[:, None] * TOKENS)
    torch.testing.assert_close(returns, advantages)
    if name == "gpg":
        assert not v.compute_gpg_outcome_advantage(0 * REWARDS, TOKENS, PROMPTS)[0].any()  # alpha is not infinite


@pytest.mark.parametrize("name", ["grpo", "grpo_passk", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline"])
def test_padding_that_is_not_finite_leaves_the_group_alone(name):
    advantage = getattr(v, f"compute_{name}_outcome_advantage")
    rewards, mask = torch.tensor([[0.0, 1.0, 4.0], [3.0, NAN, -INF]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = advantage(torch.tensor([[5.0, 0.0, 0.0], [3.0, 0.0, 0.0]]), mask, [0, 0])
    torch.testing.assert_close(advantage(rewards, mask, [0, 0]), expected)  # the finite 4 counts, as in verl
    assert advantage(rewards, torch.ones(2, 3), [0, 0])[0].isnan().any()  # inside the mask nothing is hidden


def test_passk_rewards_the_best_by_its_lead():
    rewards, prompts = torch.tensor([[1.0], [3.0], [2.0], [7.0], [7.0]]), torch.tensor([4, 9, 4, 9, 9])
    config = {"norm_adv_by_std_in_grpo": False}
    advantages, _ = v.compute_grpo_passk_outcome_advantage(rewards, torch.ones(5, 1), prompts, config=config)
    assert advantages.squeeze(-1).tolist() == [0, 0, 1, 0, 0]  # a tie has no lead
    assert v.compute_grpo_passk_outcome_advantage(rewards[:0], torch.ones(0, 1), [])[0].shape == (0, 1)
    with pytest.raises(ValueError, match="at least 2"):
        v.compute_grpo_passk_outcome_advantage(rewards, torch.ones(5, 1), torch.arange(5))


def test_reinforce_plus_plus_carries_the_reward_over_an_observation():
    rewards, mask = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([[1, 1, 0, 1]])
    advantages, returns = v.compute_reinforce_plus_plus_outcome_advantage(rewards, mask, SimpleNamespace(gamma=0.5))
    assert returns.tolist() == [[0.25, 0.5, 0, 1]]
    torch.testing.assert_close(advantages, v.masked_whiten(returns, mask))
    with pytest.raises(ValueError, match="gamma"):
        v.compute_reinforce_plus_plus_outcome_advantage(rewards, mask)


def test_remax_and_reinforce_plus_plus_baseline():
    advantages, returns = v.compute_remax_outcome_advantage(REWARDS, torch.tensor([1.0, 1.0, 1.0, 1.0]), TOKENS)
    assert returns.tolist() == [[1, 1], [3, 3], [5, 0], [0, 0]]
    assert advantages.tolist() == [[0, 0], [2, 2], [4, 0], [0, -1]]
    whitened, _ = v.compute_reinforce_plus_plus_baseline_outcome_advantage(REWARDS, TOKENS, PROMPTS)
    assert v.masked_mean(whitened, TOKENS).item() == pytest.approx(0, abs=1e-6)
    assert v.masked_var(whitened, TOKENS).item() == pytest.approx(1, abs=1e-5)


def test_policy_loss_takes_the_old_logprobs_first_and_clips_twice():
    old, mask = torch.zeros(1, 3), torch.ones(1, 3)
    new = torch.tensor([[1.5, 0.5, 5.0]]).log()
    a = torch.tensor([[1.0, -1.0, -1.0]])
    loss, clipfrac, kl, lower = v.compute_policy_loss(old, new, a, mask, 0.2)
    assert loss.item() == pytest.approx((-1.2 + 0.8 + 3.0) / 3)  # dual clip 3 for the last
    assert clipfrac.item() == pytest.approx(2 / 3) and lower.item() == pytest.approx(1 / 3)
    assert kl.item() == pytest.approx(-new.mean().item())
    again, metrics = v.compute_policy_loss_vanilla(old, new, a, mask, config=Config(clip_ratio_low=0.2))
    assert again.item() == loss.item()
    assert metrics == pytest.approx(
        {"actor/pg_clipfrac": 2 / 3, "actor/ppo_kl": kl.item(), "actor/pg_clipfrac_lower": 1 / 3}
    )
    with pytest.raises(ValueError, match="cliprange"):
        v.compute_policy_loss(old, new, a, mask)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses_ignore_what_is_outside_the_mask(name):
    torch.manual_seed(2)
    old, new, a, weights = torch.randn(4, 3, 5).mul(0.3).unbind()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0]])
    weights = weights.exp()

    def run(fill):
        inputs = [torch.where(mask.bool(), x, fill) for x in (old, new, a, weights)]
        inputs[1].requires_grad_()
        torch.manual_seed(3)
        loss, metrics = getattr(v, name)(*inputs[:3], mask, config=Config(), rollout_is_weights=inputs[3])
        return loss, metrics, torch.autograd.grad(loss, inputs[1])[0]

    clean, dirty = run(0.0), run(NAN)
    assert clean[0].isfinite() and clean[0].item() == dirty[0].item() and clean[1] == dirty[1]
    assert torch.equal(clean[2], dirty[2]) and clean[2].abs().sum() > 0


@pytest.mark.parametrize("name", ["compute_policy_loss_reinforce", *POLICY_LOSSES])
def test_advantages_and_weights_one_a_response_or_in_integers(name):
    loss, config = getattr(v, name), Config({"loss_type": "ppo_clip"})
    old, new = torch.zeros(2, 2), torch.tensor([[0.3, -0.1], [0.5, 0.0]])
    mask, a, weights = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [2.0]])
    results = []
    for advantages in (a.repeat(1, 2), a, a.long()):
        torch.manual_seed(0)  # clip_cov draws
        given = weights.repeat(1, 2) if advantages is not a else weights
        results.append(loss(old, new, advantages, mask, config=config, rollout_is_weights=given))
    assert results[1] == results[0] == results[2]


def test_the_plain_losses_fit_what_they_are_given():
    old, new, a = torch.zeros(2, 2), torch.tensor([[0.3, -0.1], [0.5, 0.0]]), torch.tensor([[1.0], [-2.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    expected = v.compute_policy_loss(old, new, a.repeat(1, 2), mask, 0.2)
    assert (
        v.compute_policy_loss(old, new, a, mask, 0.2)
        == v.compute_policy_loss(old, new, a.long(), mask, 0.2)
        == expected
    )
    assert v.compute_value_loss(new, a.long(), old, mask, 0.5) == v.compute_value_loss(
        new, a.repeat(1, 2), old, mask, 0.5
    )


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses_of_an_empty_mask_are_zero(name):
    x = torch.randn(2, 3, requires_grad=True)
    loss, metrics = getattr(v, name)(x.detach(), x, torch.ones(2, 3), torch.zeros(2, 3), config=Config())
    assert loss.item() == 0 and torch.autograd.grad(loss, x)[0].abs().sum() == 0
    assert all(value == 0 for value in metrics.values())
    with pytest.raises(ValueError, match="config"):
        getattr(v, name)(x, x, x, x)


def test_one_token_under_each_policy_loss_by_hand():
    old, new = torch.zeros(1, 1), torch.tensor([[math.log(1.5)]])
    a, mask = torch.full((1, 1), 2.0), torch.ones(1, 1)
    expected = {
        "gspo": -2 * 1.2,
        "sapo": -2 * 4 / (1 + math.exp(-0.5)),
        "gpg": -2 * math.log(1.5),
        "clip_cov": -2 * 1.2,
        "kl_cov": -2 * 1.5 + math.log(1.5),
        "geo_mean": -2 * math.exp(0.2),  # log 1.5 = 0.405 is clipped to 0.2
        "cispo": -2 * 1.2 * math.log(1.5),
        "reinforce": -2 * math.log(1.5),
    }
    for name, value in expected.items():
        loss, _ = getattr(v, f"compute_policy_loss_{name}")(old, new, a, mask, config=Config())
        assert loss.item() == pytest.approx(value), name


def policy_loss(name, ratios, advantages, mask=None, mode="token-mean", **options):
    """-> the loss and its gradient by the new log-probabilities, log(ratios); the old ones are 0."""
    new = torch.tensor([ratios]).log().requires_grad_()
    mask = torch.ones(1, len(ratios)) if mask is None else torch.tensor([mask])
    loss, _ = getattr(v, f"compute_policy_loss_{name}")(
        torch.zeros_like(new), new, torch.tensor([advantages]), mask, mode, Config(**options)
    )
    return loss.item(), torch.autograd.grad(loss, new)[0][0].tolist()


def test_policy_losses_take_their_options_from_the_config():
    assert policy_loss("vanilla", [5.0], [-1.0], clip_ratio_c=2.0)[0] == pytest.approx(2.0)
    assert policy_loss("vanilla", [0.5], [-1.0], clip_ratio_low=0.4)[0] == pytest.approx(0.6)
    assert policy_loss("vanilla", [1.5], [1.0], clip_ratio_high=0.4)[0] == pytest.approx(-1.4)
    two = torch.log(torch.tensor([[1.1, 1.2], [0.9, 1.0]])), torch.ones(2, 2), torch.tensor([[1, 1], [1, 0]])
    of_sequences, of_tokens = (
        v.compute_policy_loss_sapo(torch.zeros(2, 2), *two, mode, Config())[0]
        for mode in ("seq-mean-token-mean", "token-mean")
    )
    assert of_sequences == of_tokens  # whatever the mode, as in verl


def test_policy_losses_at_their_limits_and_their_gradients_by_hand():
    mean = math.exp((0.1 - 0.04) / 2)  # of two ratios, the same for both tokens, each with its own gradient
    loss, grad = policy_loss("gspo", [math.exp(0.1), math.exp(-0.04)], [1.0, 1.0])
    assert loss == pytest.approx(-mean) and grad == pytest.approx([-mean / 2] * 2)
    assert policy_loss("gspo", [math.exp(12.0)], [-1.0])[0] == pytest.approx(math.exp(10.0))
    assert policy_loss("cispo", [1.1], [2.0])[1] == pytest.approx([-2 * 1.1])  # the ratio is a constant
    assert policy_loss("cispo", [1.5], [2.0])[1] == pytest.approx([-2 * 1.2])
    assert policy_loss("geo_mean", [1.5], [-2.0])[0] == pytest.approx(2 * 1.5)  # a clip that would help is not taken


def test_covariances_choose_among_tokens_that_count():
    between = {"clip_cov_lb": 0.1, "clip_cov_ub": 1.0, "clip_cov_ratio": 1.0}  # both have 0.2, but one is clipped
    loss, _ = policy_loss("clip_cov", [1.5, 1.0], [2.0, 1e-3], policy_loss=SimpleNamespace(**between))
    assert loss == pytest.approx(-2 * 1.2 / 2)
    loss, _ = policy_loss("kl_cov", [1.5, 1.4, 1.4, 9.0], [2.0, 1.9, 1.9, 9.0], [1, 1, 1, 0])
    assert loss == pytest.approx((-2 * 1.5 - 2 * 1.9 * 1.4 + math.log(1.5)) / 3)
    nothing = torch.zeros(0, 3)
    assert v.compute_policy_loss_kl_cov(nothing, nothing, nothing, nothing, config=Config())[0] == 0


@pytest.mark.parametrize("name", ["compute_policy_loss_reinforce", *POLICY_LOSSES])
def test_weights_of_the_rollout_are_constants(name):
    new, weights = torch.tensor([[0.1, 0.0]], requires_grad=True), torch.tensor([[0.5, 2.0]], requires_grad=True)
    ones = torch.ones(1, 2)
    loss, _ = getattr(v, name)(0 * ones, new, ones, ones, config=Config(), rollout_is_weights=weights)
    loss.backward()
    assert new.grad.any() and (weights.grad is None or not weights.grad.any())


def test_the_default_dtype_rounds_no_option_of_sapo():
    old, tau = torch.zeros(1, 1, dtype=torch.float64), 1.05
    new, advantages, config = old + math.log(1.5), old - 1, Config(tau_neg=tau)
    loss, _ = v.compute_policy_loss_sapo(old, new, advantages, torch.ones(1, 1), config=config)
    assert loss.item() == pytest.approx(4 / tau / (1 + math.exp(-0.5 * tau)), rel=1e-12)


ROLLOUT = torch.tensor([[0.5, 0.25, 1.0], [4.0, 1.0, NAN]]).log()  # of log-probs 0 the ratios are 2, 4, 1 and 1/4, 1
TURNS = torch.tensor([[1, 1, 1], [1, 1, 0]])


def rejecting(names, thresholds):
    return {"rollout_rs": names, "rollout_rs_threshold": thresholds}


@pytest.mark.parametrize(
    "options, weights",  # 0: rejected
    [
        ({"rollout_is": "token"}, [2, 2, 1, 0.25, 1]),  # the default limit is 2
        ({"rollout_is": "token", "rollout_is_threshold": 3}, [2, 3, 1, 0.25, 1]),
        ({"rollout_is": "sequence", "rollout_is_threshold": 5.0}, [5, 5, 5, 0.25, 0.25]),
        ({"rollout_is": "token", "rollout_is_batch_normalize": True}, [1.6, 1.6, 0.8, 0.2, 0.8]),
        ({"rollout_is": "sequence", "rollout_is_batch_normalize": True}, [16 / 9] * 3 + [2 / 9] * 2),
        (rejecting("token_k1", 2.5), [1, 0, 1, 0, 1]),
        (rejecting("token_k1", "0.2_3"), [1, 1, 1, 0, 1]),  # k1 is against the ratio: 4 is within 1/5 to 3
        (rejecting("seq_sum_k1", "5"), [0, 0, 0, 1, 1]),  # 1/8 and 4
        (rejecting("seq_mean_k1", "0.45_1.9"), [1, 1, 1, 0, 0]),  # 1/2 and 2
        (rejecting("token_k2", 0.9), [1, 0, 1, 0, 1]),  # log(4)^2 / 2 = 0.961
        (rejecting("seq_sum_k2", 1.0), [0, 0, 0, 1, 1]),  # 0.240 more in the first
        (rejecting("seq_mean_k3", 0.5), [0, 0, 0, 1, 1]),  # (0.307 + 1.614) / 3 and 0.636 / 2
        (rejecting("seq_max_k3", 1.0), [0, 0, 0, 1, 1]),
        (rejecting("token_k2, seq_max_k3", "0.5,1"), [0, 0, 0, 0, 1]),
    ],
)
def test_bypass_mode_weighs_and_rejects_by_hand(options, weights):
    new = torch.zeros(2, 3, requires_grad=True)
    config = Config({"loss_type": "reinforce", **options})
    loss, metrics = v.compute_policy_loss_bypass_mode(ROLLOUT, new, torch.ones(2, 3), TURNS, config=config)
    expected = torch.tensor(weights, dtype=torch.float32) / sum(w > 0 for w in weights)
    torch.testing.assert_close(-torch.autograd.grad(loss, new)[0][TURNS.bool()], expected)
    assert metrics["rollout_corr/kl"] == pytest.approx(-math.log(2) / 5)
    if "rollout_rs" in options:
        assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(weights.count(0) / 5)


def test_bypass_mode_drops_weights_outside_their_limits_and_keeps_the_token():
    new = torch.zeros(2, 3, requires_grad=True)
    config = Config({"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": "0.5_3"})
    loss, metrics = v.compute_policy_loss_bypass_mode(ROLLOUT, new, torch.ones(2, 3), TURNS, config=config)
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], -torch.tensor([[2, 0, 1], [0, 1, 0]]) / 5)
    assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(4 / 5)
    assert metrics["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(16 / 25 / (6 / 5))


def test_bypass_mode_is_ppo_against_the_rollout_unless_asked():
    args = torch.zeros(2, 3), torch.ones(2, 3), TURNS
    loss, metrics = v.compute_policy_loss_bypass_mode(ROLLOUT, *args, config=Config({"rollout_is": "token"}))
    plain, of_loss = v.compute_policy_loss_vanilla(ROLLOUT, *args, config=Config())
    assert (
        loss.item() == plain.item() == pytest.approx(-(1.2 + 1.2 + 1 + 0.25 + 1) / 5)
    )  # without the weights, which would count twice
    assert of_loss.items() <= metrics.items()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_bypass_mode_of_nothing_is_0(level, shape):
    config = Config({"loss_type": "reinforce", "rollout_is": level, **rejecting("token_k1,seq_max_k2", "2,1")})
    args = *torch.zeros(3, *shape), torch.ones(shape)
    loss, metrics = v.compute_policy_loss_bypass_mode(*args, config=config)
    assert loss == 0 and len(metrics) > 8 and all(value == 0 for value in metrics.values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "trpo"}, "loss_type"),
        ({"rollout_is": "batch"}, "rollout_is"),
        ({"rollout_is": "token", "rollout_is_threshold": "3_2"}, "rollout_is_threshold"),
        (rejecting("token_k4", 1), "token_k4"),
        (rejecting("token_k1,token_k2,token_k3", "1,2"), "one for each"),
        (rejecting("token_k1", None), "rollout_rs_threshold"),
        (rejecting("token_k1", 0.5), "1 or more"),
        (rejecting("token_k2", "1_2"), "one number"),
    ],
)
def test_bypass_mode_refuses_what_it_does_not_know(options, message):
    with pytest.raises(ValueError, match=message):
        v.compute_policy_loss_bypass_mode(ROLLOUT, ROLLOUT, ROLLOUT, TURNS, config=Config(options))


def test_value_loss_takes_the_old_values_last():
    one = torch.ones(1, 1)
    loss, clipfrac = v.compute_value_loss(2 * one, 3 * one, 0 * one, one, 0.5)
    assert loss.item() == pytest.approx(0.5 * 2.5**2) and clipfrac.item() == 1


def test_straight_through_estimators_have_the_gradient_of_k2():
    ref = torch.zeros(3)
    for name in ("k1+", "kl+", "k3+", "low_var_kl+", "abs+", "k2+", "mse+"):
        x = torch.tensor([0.5, -0.25, 2.0], requires_grad=True)
        kl = v.kl_penalty(x, ref, name)
        assert torch.equal(kl.detach(), v.kl_penalty(x.detach(), ref, name[:-1]))
        assert torch.autograd.grad(kl.sum(), x)[0].tolist() == [0.5, -0.25, 2.0]
    assert v.kl_penalty(torch.tensor([-1e30]), torch.zeros(1), "k3+").tolist() == [10.0]  # its k2 is infinite


def test_k3_is_clamped_and_full_is_exact():
    x = torch.tensor([-100.0, 100.0, 0.5])
    torch.testing.assert_close(
        v.kl_penalty(x, torch.zeros(3), "low_var_kl"), torch.tensor([10, 10, math.exp(-0.5) - 0.5])
    )
    logits, ref = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert v.kl_penalty(logits, ref, "full").item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="estimator"):
        v.kl_penalty(x, x, "k4")


def test_rewards_and_the_controllers_kl():
    batch = {
        "response_mask": torch.tensor([[1, 1], [1, 0]]),
        "token_level_scores": torch.tensor([[0.0, 1.0], [2.0, 0.0]]),
        "old_log_probs": torch.tensor([[0.5, 0.1], [0.3, NAN]]),
        "ref_log_prob": torch.zeros(2, 2),
    }
    controller = v.AdaptiveKLController(0.1, target_kl=0.1, horizon=10)
    _, metrics = v.apply_kl_penalty(SimpleNamespace(batch=batch), controller)
    torch.testing.assert_close(batch["token_level_rewards"], torch.tensor([[-0.05, 0.99], [1.97, 0.0]]))
    assert metrics == pytest.approx({"actor/reward_kl_penalty": 0.3, "actor/reward_kl_penalty_coeff": 0.1})
    assert controller.value == pytest.approx(0.1 * 1.04)  # + 0.2 * 2 / 10
    empty = {name: x[:0] for name, x in batch.items()}
    _, metrics = v.apply_kl_penalty(SimpleNamespace(batch=empty), controller)
    assert metrics["actor/reward_kl_penalty"] == 0 and controller.value == pytest.approx(0.1 * 1.04)
    plain = v.compute_rewards(batch["token_level_scores"][:1], batch["old_log_probs"][:1], torch.zeros(1, 2), 0.1)
    torch.testing.assert_close(plain, torch.tensor([[-0.05, 0.99]]))


def test_logprobs_of_the_response_and_their_dtype():
    torch.manual_seed(4)
    logits, ids = torch.randn(2, 5, 7, dtype=torch.bfloat16), torch.randint(0, 7, (2, 5))
    got = v.log_probs_from_logits_response(ids, logits, 2)
    want = logits.float().log_softmax(-1)[:, 2:4].gather(-1, ids[:, 3:, None]).squeeze(-1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    for name in ("logprobs_from_logits", "logprobs_from_logits_naive", "logprobs_from_logits_v2"):
        torch.testing.assert_close(getattr(v, name)(logits[:, 2:4], ids[:, 3:]), want)
    torch.testing.assert_close(v.logprobs_from_logits_flash_attn(logits[:, 3], ids[:, 4]), want[:, 1])


def test_the_gradient_overwrites_the_logits_only_on_request():
    labels = torch.tensor([0, 1])
    for inplace in (False, True):
        leaf = torch.randn(2, 3, requires_grad=True)
        logits = leaf * 1
        before = logits.detach().clone()
        v.logprobs_from_logits(logits, labels, inplace_backward=inplace).sum().backward()
        assert torch.equal(logits.detach(), before) is not inplace
        torch.testing.assert_close(leaf.grad, torch.eye(3)[:2] - before.softmax(-1))


def test_entropy_and_sum_of_squares_of_impossible_tokens():
    logits = torch.tensor([[-INF, 1.0, 1.0], [-INF, -INF, 0.0]])
    expected = torch.tensor([math.log(2), 0.0])
    torch.testing.assert_close(v.entropy_from_logits(logits), expected)
    torch.testing.assert_close(v.entropy_from_logits_with_chunking(logits, 1), expected)
    torch.testing.assert_close(v.calculate_sum_pi_squared_from_logits(logits), torch.tensor([0.5, 1.0]))
    both = torch.stack([logits, logits * NAN]).requires_grad_()
    loss = v.compute_entropy_loss(both, torch.tensor([[1, 1], [0, 0]]))
    assert loss.item() == pytest.approx(math.log(2) / 2)
    assert not torch.autograd.grad(loss, both)[0][1].any()  # what lies outside the mask is not read


def test_mask_statistics_by_hand():
    values, mask = torch.tensor([[1.0, 3.0, NAN]]), torch.tensor([[1, 1, 0]])
    assert v.masked_sum(values, mask).item() == 4 and v.masked_sum(values, mask, axis=-1).tolist() == [4]
    assert v.masked_mean(values, mask, axis=-1).tolist() == [2]
    assert (v.masked_var(values, mask).item(), v.masked_var(values, mask, unbiased=False).item()) == (2, 1)
    for count in (0, 1):  # verl raises for both
        few = torch.tensor([[count, 0, 0]])
        assert v.masked_var(values, few).item() == 0
        assert v.masked_whiten(values, few).tolist() == [[0, 0, 0]]
    low, high = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])
    assert v.clip_by_value(torch.tensor([5.0, 1.0]), low, high).tolist() == [1, 2]


def test_linear_forms_never_round_to_bf16():
    torch.manual_seed(5)
    hidden, weight = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(11, 8, dtype=torch.bfloat16)
    ids = torch.randint(0, 11, (2, 3))
    logp = (hidden.float() @ weight.float().T / 0.5).log_softmax(-1)
    want = logp.gather(-1, ids[..., None]).squeeze(-1)
    logprobs, entropy = v.FusedLinearForPPO()(hidden, weight, ids, temperature=0.5)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-5)
    flat, _ = v.linear_cross_entropy(hidden, weight, ids, 0.5)
    torch.testing.assert_close(flat, want.flatten(), atol=1e-5, rtol=1e-5)
    assert v.linear_cross_entropy(hidden, weight, ids, 0.5, "mean")[0].item() == pytest.approx(want.mean().item(), 1e-4)
    with pytest.raises(ValueError, match="dist_process_group"):
        v.linear_cross_entropy(hidden, weight, ids, 0.5, "none", object())
    logprobs, entropy = v.linear_cross_entropy(hidden[..., :0], weight[:, :0], ids)  # no width: all logits are 0
    torch.testing.assert_close(logprobs, torch.full((6,), -math.log(11)))
    torch.testing.assert_close(entropy, -logprobs)


def test_an_empty_batch_gives_empty_results():
    logits, labels = torch.zeros(0, 3, 7, dtype=torch.bfloat16), torch.zeros(0, 3, dtype=torch.long)
    assert v.logprobs_from_logits(logits, labels).shape == v.entropy_from_logits(logits).shape == (0, 3)
