"""compat.openrlhf: its signatures, numbers worked by hand, and the edges where OpenRLHF overflows or gives NaN."""

import inspect
import math

import pytest
import torch

from rlhf_fast.compat import openrlhf as o

INF, NAN = math.inf, math.nan
GLOBAL = "dp_size batch_num_tokens global_batch_size"

SIGNATURES = {
    "aggregate_loss": f"loss loss_mask token_level_loss {GLOBAL}",
    "GPTLMLoss": "ring_attn_group",
    "GPTLMLoss.forward": "self logits labels",
    "SFTLoss": "token_level_loss",
    "SFTLoss.forward": f"self per_token_logps loss_mask {GLOBAL}",
    "PolicyLoss": "clip_eps_low clip_eps_high dual_clip token_level_loss policy_loss_type enable_vllm_is_correction "
    "vllm_is_truncated_threshold vllm_is_correction_type",
    "PolicyLoss.forward": f"self log_probs old_log_probs advantages action_mask rollout_log_probs {GLOBAL}",
    "ValueLoss": "clip_eps token_level_loss",
    "ValueLoss.forward": f"self values old_values returns action_mask {GLOBAL}",
    "PairWiseLoss.forward": "self chosen_reward reject_reward margin",
    "LogExpLoss.forward": "self chosen_reward reject_reward margin",
    "DPOLoss": "beta label_smoothing ipo",
    "DPOLoss.forward": "self policy_chosen_logps policy_rejected_logps reference_chosen_logps reference_rejected_logps",
    "compute_approx_kl": "log_probs log_probs_base kl_estimator",
    "compute_reward": "r kl_coef kl action_mask reward_clip_range",
    "log_probs_from_logits": "logits labels temperature",
    "masked_mean": "tensor mask dim",
    "masked_normalize": "tensor mask dim eps",
    "compute_entropy": "logits",
    "AdaptiveKLController": "init_kl_coef target horizon",
    "AdaptiveKLController.update": "self current n_steps",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_openrlhfs_in_its_order(name):
    function = o
    for part in name.split("."):
        function = getattr(function, part)
    assert list(inspect.signature(function).parameters) == SIGNATURES[name].split()


LOSS, MASK = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN], [NAN] * 3]), torch.tensor([[1, 1, 0], [1, 0, 0], [0] * 3])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({}, 3.0),  # 9 / 3 tokens
        ({"batch_num_tokens": 18, "dp_size": 2}, 1.0),  # 9 / 18 * 2
        ({"token_level_loss": False}, 3.75),  # (1.5 + 6) / 2 sequences
        ({"token_level_loss": False, "global_batch_size": 15, "dp_size": 2}, 1.0),
    ],
)
def test_aggregation_by_hand(arguments, expected):
    assert o.aggregate_loss(LOSS, MASK, **arguments).item() == pytest.approx(expected)
    assert o.SFTLoss(arguments.pop("token_level_loss", True))(-LOSS, MASK, **arguments).item() == pytest.approx(
        expected
    )


@pytest.mark.parametrize("token_level", [True, False])
def test_an_empty_mask_gives_zero(token_level):
    x, mask = torch.full((2, 3), NAN, requires_grad=True), torch.zeros(2, 3)
    losses = [
        o.aggregate_loss(x, mask, token_level),
        o.PolicyLoss(token_level_loss=token_level)(x, x.detach(), x.detach(), mask)[0],
        o.ValueLoss(0.2, token_level)(x, x.detach(), x.detach(), mask),
    ]
    for loss in losses:
        assert loss.item() == 0
        assert torch.autograd.grad(loss, x)[0].abs().sum() == 0


def test_the_log_ratio_is_clamped_to_20_and_dual_clip_bounds_it():
    new, old, a = torch.tensor([[50.0]], requires_grad=True), torch.zeros(1, 1), -torch.ones(1, 1)
    loss, clip_ratio, ppo_kl, vllm_kl = o.PolicyLoss()(new, old, a, torch.ones(1, 1))
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-5)  # 4.85e8
    assert torch.autograd.grad(loss, new)[0].item() == 0  # the clamp holds
    assert (clip_ratio.item(), ppo_kl.item(), vllm_kl) == (0, -50, None)
    assert o.PolicyLoss(dual_clip=3.0)(new, old, a, torch.ones(1, 1))[0].item() == 3


def test_policy_loss_without_a_mask_counts_everything():
    new = torch.tensor([[math.log(1.5), 0.0]])
    loss, clip_ratio, *_ = o.PolicyLoss(0.2, 0.2)(new, torch.zeros(1, 2), torch.ones(1, 2))
    assert loss.item() == pytest.approx(-(1.2 + 1.0) / 2)
    assert clip_ratio.item() == 0.5


@pytest.mark.parametrize(
    "kind, weights",
    [
        ("tis", [[2.0, 1.0], [0.5, 1.0]]),
        ("icepop", [[0.0, 1.0], [0.0, 1.0]]),
        ("seq-mask-tis", [[4.0, 1.0], [0.0, 0.0]]),
    ],
)
def test_rollout_correction_by_hand(kind, weights):
    old = torch.zeros(2, 2)
    rollout = -torch.tensor([[4.0, 1.0], [0.2, 1.0]]).log()  # the ratios old / rollout
    rows = {"seq-mask-tis": [0.5, 2.0]}  # geometric means: 2 and 0.447
    policy = o.PolicyLoss(
        enable_vllm_is_correction=True,
        vllm_is_truncated_threshold=rows.get(kind, [0.5, 2.0]),
        vllm_is_correction_type=kind,
    )
    loss, _, _, vllm_kl = policy(old, old, torch.ones(2, 2), torch.ones(2, 2), rollout)
    assert loss.item() == pytest.approx(-torch.tensor(weights).mean().item())
    assert vllm_kl.item() == pytest.approx(rollout.mean().item())


def test_gspo_has_one_ratio_a_sequence():
    new = torch.tensor([[0.3, 0.1, NAN], [-0.9, -0.1, 0.1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    loss, clip_ratio, ppo_kl, _ = o.PolicyLoss(policy_loss_type="gspo")(new, torch.zeros(2, 3), torch.ones(2, 3), mask)
    assert loss.item() == pytest.approx(-(1.2 + math.exp(-0.3)) / 2)  # exp(0.2) = 1.22 is clipped
    assert clip_ratio.item() == pytest.approx(2 / 5)
    assert ppo_kl.item() == pytest.approx(0.5 / 5)
    corrected = o.PolicyLoss(policy_loss_type="gspo", enable_vllm_is_correction=True)  # the ratio to the rollout's
    loss, *_ = corrected(new, torch.full((2, 3), 9.0), torch.ones(2, 3), mask, torch.full((2, 3), -0.1))
    assert loss.item() == pytest.approx(-(1.2 + math.exp(-0.2)) / 2)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_advantages_one_a_response_or_in_integers(kind):
    new, old, mask = torch.tensor([[0.3, -0.1], [0.5, 0.0]]), torch.zeros(2, 2), torch.tensor([[1, 1], [1, 0]])
    policy, a = o.PolicyLoss(policy_loss_type=kind), torch.tensor([[1.0], [-2.0]])
    expected = policy(new, old, a.repeat(1, 2), mask)
    assert policy(new, old, a, mask) == policy(new, old, a.long().repeat(1, 2), mask) == expected
    with pytest.raises(ValueError, match=r"advantages \(3, 1\) must have the shape"):
        policy(new, old, torch.ones(3, 1), mask)


def test_policy_loss_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="policy_loss_type"):
        o.PolicyLoss(policy_loss_type="trpo")
    with pytest.raises(ValueError, match="vllm_is_correction_type"):
        o.PolicyLoss(vllm_is_correction_type="clip")
    with pytest.raises(ValueError, match="threshold"):
        o.PolicyLoss(enable_vllm_is_correction=True)
    with pytest.raises(ValueError, match="ring_attn_group"):
        o.GPTLMLoss(ring_attn_group=object())


def test_value_loss_order_is_new_old_returns():
    loss = o.ValueLoss(clip_eps=0.5)(torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[3.0]]))
    assert loss.item() == pytest.approx(0.5 * 2.5**2)
    for old in (torch.tensor([[0.0]]), None):  # without a clip it is not read
        assert o.ValueLoss()(torch.tensor([[2.0]]), old, torch.tensor([[3.0]])).item() == 0.5
    assert o.ValueLoss()(torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[3]])).item() == 0.5


@pytest.mark.parametrize("cls", [o.PairWiseLoss, o.LogExpLoss])
def test_pairwise_losses_by_hand(cls):
    chosen, rejected = torch.tensor([2.0]), torch.tensor([0.5])
    assert math.exp(-cls()(chosen, rejected).item()) == pytest.approx(0.8176, abs=5e-5)
    assert cls()(chosen, rejected, torch.tensor([1.5])).item() == pytest.approx(math.log(2))
    assert cls()(torch.tensor([0.0]), torch.tensor([100.0])).item() == 100  # OpenRLHF's LogExpLoss: inf
    assert cls()(torch.zeros(0), torch.zeros(0)).item() == 0
    pair = torch.tensor([[2.0], [3.0]]), torch.tensor([[0.5], [1.5]])
    for margin in (torch.tensor(1.5), torch.tensor([1.5]), torch.tensor([[1.5], [1.5]]), 1.5):
        assert cls()(*pair, margin).item() == pytest.approx(math.log(2))


def test_dpo_and_ipo_by_hand():
    logps = [torch.tensor([x], requires_grad=i < 2) for i, x in enumerate([-1.0, -3.0, -2.0, -2.0])]
    loss, chosen, rejected = o.DPOLoss(beta=0.5)(*logps)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.0)))  # beta (1 - -1) = 1
    assert (chosen.item(), rejected.item()) == (0.5, -0.5) and not chosen.requires_grad
    smooth = o.DPOLoss(0.5, label_smoothing=0.1)(*logps)[0].item()
    assert smooth == pytest.approx(0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1)))
    assert o.DPOLoss(0.5, ipo=True)(*logps)[0].item() == pytest.approx((2 - 1) ** 2)
    for ipo in (False, True):
        columns = o.DPOLoss(0.5, ipo=ipo)(*(x[:, None] for x in logps))
        assert columns[0] == o.DPOLoss(0.5, ipo=ipo)(*logps)[0]
        assert columns[1].tolist() == [[0.5]] and columns[2].tolist() == [[-0.5]]


def test_next_token_loss_shifts_and_survives_no_label():
    logits = torch.tensor([[[0.0, math.log(3.0)], [NAN, NAN]]], requires_grad=True)
    assert o.GPTLMLoss()(logits, torch.tensor([[0, 1]])).item() == pytest.approx(-math.log(0.75))
    nothing = o.GPTLMLoss()(logits, torch.tensor([[0, -100]]))
    assert nothing.item() == 0 and torch.autograd.grad(nothing, logits)[0].abs().sum() == 0


def test_kl_estimates_stop_at_10():
    x = torch.tensor([0.5, -200.0, 30.0], requires_grad=True)
    zero = torch.zeros(3)
    assert o.compute_approx_kl(x, zero).tolist() == [0.5, -10, 10]
    assert o.compute_approx_kl(x, zero, "k2").tolist() == [0.125, 10, 10]
    k3 = o.compute_approx_kl(x, zero, "k3")
    torch.testing.assert_close(k3, torch.tensor([math.exp(-0.5) - 0.5, 10.0, 10.0]))
    assert torch.autograd.grad(k3.sum(), x)[0].isfinite().all()
    with pytest.raises(ValueError, match="kl_estimator"):
        o.compute_approx_kl(x, zero, "abs")


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates_against_one_row_for_all(kind):
    new, old = torch.tensor([[0.5, 1.0], [0.2, -1.0]]), torch.tensor([[0.1, 0.3]], requires_grad=True)
    got, want = o.compute_approx_kl(new, old, kind), o.compute_approx_kl(new, old.repeat(2, 1), kind)
    assert torch.equal(got, want) and torch.equal(
        o.compute_approx_kl(old, new, kind)[1], o.compute_approx_kl(old[0], new[1], kind)
    )
    grads = [torch.autograd.grad(kl.sum(), old)[0] for kl in (got, want)]
    torch.testing.assert_close(*grads)


def test_the_score_lands_on_the_last_action():
    kl = torch.tensor([[1.0, 1.0, NAN], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    got = o.compute_reward(torch.tensor([5.0, 50.0, 7.0]), 0.1, kl, mask, (-10.0, 10.0))
    torch.testing.assert_close(got, torch.tensor([[-0.1, 4.9, 0.0], [-0.1, 0.0, 9.9], [0.0, 0.0, 0.0]]))
    assert o.compute_reward(1.0, -1.0, torch.ones(1, 2)).tolist() == [[0, 1]]
    assert o.compute_reward(0.3, 0.0, torch.ones(1, 2, dtype=torch.float64)).tolist() == [[0, 0.3]]


def test_temperature_leaves_the_logits_alone():
    logits = torch.tensor([[[0.0, 2 * math.log(3.0)]]])
    before = logits.clone()
    assert o.log_probs_from_logits(logits, torch.tensor([[1]]), temperature=2.0).item() == pytest.approx(math.log(0.75))
    assert torch.equal(logits, before)
    assert o.log_probs_from_logits(logits.bfloat16(), torch.tensor([[1]])).dtype == torch.float32


def test_mask_statistics_by_hand():
    x, mask = torch.tensor([[1.0, 3.0, NAN], [NAN, NAN, NAN]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert o.masked_mean(x, mask).item() == 2 and o.masked_mean(x, mask, dim=1).tolist() == [2, 0]
    assert o.masked_mean(torch.tensor([1.0, 2.0]), None).item() == 1.5
    assert o.masked_normalize(x, mask).tolist() == [[-1, 1, 0], [0, 0, 0]]
    assert o.masked_normalize(x, mask, eps=4.0).tolist() == [[-0.5, 0.5, 0], [0, 0, 0]]  # the least variance


def test_entropy_of_impossible_tokens_is_finite():
    assert o.compute_entropy(torch.tensor([[-INF, 1.0, 1.0]])).item() == pytest.approx(math.log(2))


def test_the_controller_moves_by_a_fifth_at_most():
    controller = o.AdaptiveKLController(0.1, target=6.0, horizon=100)
    controller.update(60.0, 10)
    assert controller.value == pytest.approx(0.1 * 1.02)
    controller.update(5.4, 10)
    assert controller.value == pytest.approx(0.1 * 1.02 * 0.99)


def test_an_empty_batch_gives_empty_results():
    logits, labels = torch.zeros(0, 3, 7, dtype=torch.bfloat16), torch.zeros(0, 3, dtype=torch.long)
    assert o.log_probs_from_logits(logits, labels).shape == o.compute_entropy(logits).shape == (0, 3)
