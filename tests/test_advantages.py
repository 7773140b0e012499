import itertools

import pytest
import torch

from rlhf_fast import gae
from rlhf_fast.advantages import (
    KLController,
    batch_mean_baseline,
    group_mean_baseline,
    kl_shaped_rewards,
    leave_one_out_baseline,
)


def test_reward_10_over_baseline_7_gives_advantage_3():
    scores = torch.tensor([10.0, 4.0])
    assert (scores - batch_mean_baseline(scores)).tolist() == [3.0, -3.0]
    assert (scores - group_mean_baseline(scores, 2)).tolist() == [3.0, -3.0]
    scores = torch.tensor([10.0, 7.0])
    assert (scores - leave_one_out_baseline(scores, 2)).tolist() == [3.0, -3.0]


def test_groups_are_neighbours_and_do_not_mix():
    scores = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0, 60.0])
    assert group_mean_baseline(scores, 3).tolist() == [3.0] * 3 + [30.0] * 3
    assert leave_one_out_baseline(scores, 3).tolist() == [4.0, 3.5, 1.5, 40.0, 35.0, 15.0]


@pytest.mark.parametrize("baseline", [group_mean_baseline, leave_one_out_baseline])
def test_a_ragged_group_is_refused(baseline):
    with pytest.raises(ValueError, match="group_size 2"):
        baseline(torch.zeros(5), 2)


def test_leave_one_out_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out_baseline(torch.zeros(4), 1)


def test_the_score_lands_on_the_last_token_and_kl_on_every_token():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    kl = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.0, torch.nan], [99.0, 99.0, 99.0]])
    scores = torch.tensor([5.0, 7.0, 9.0])
    rewards = kl_shaped_rewards(scores, mask, kl, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 0.0, 5.1], [-0.05, 7.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(kl_shaped_rewards(scores, mask), torch.tensor([[0.0, 0, 5], [0, 7, 0], [0, 0, 0]]))


def test_undiscounted_return_is_score_minus_kl():
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    kl = torch.tensor([[0.5, -0.2, 0.1, 0.0]])
    rewards = kl_shaped_rewards(torch.tensor([2.0]), mask, kl, kl_coef=0.05)
    _, returns = gae(rewards, torch.zeros(1, 4), mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns[0, 0], 2.0 - 0.05 * kl.sum())


@pytest.mark.parametrize(
    ("baseline", "bias"),
    [(None, 1.0), (batch_mean_baseline, 2 / 3), (lambda s: group_mean_baseline(s, 3), 2 / 3),
     (lambda s: leave_one_out_baseline(s, 3), 1.0)],
    ids=["none", "batch mean", "group mean", "leave one out"],
)  # fmt: skip
def test_reinforce_is_the_gradient_of_the_expected_reward_and_baselines_make_it_quieter(baseline, bias):
    """Exact, by enumerating every draw of 3 answers from a policy over 3 actions. A baseline that contains its own
    answer shrinks the gradient by (n - 1) / n; leave-one-out does not."""
    logits = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([10.0, 7.0, 4.0], dtype=torch.float64)
    (exact,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    mean, square = torch.zeros(3, dtype=torch.float64), 0.0
    for actions in itertools.product(range(3), repeat=3):
        actions = torch.tensor(actions)
        logprobs, scores = logits.log_softmax(0)[actions], reward[actions]
        advantages = scores if baseline is None else scores - baseline(scores)
        (gradient,) = torch.autograd.grad((logprobs * advantages).mean(), logits)
        probability = logprobs.sum().exp().item()
        mean += probability * gradient
        square += probability * gradient.square().sum().item()
    torch.testing.assert_close(mean, bias * exact)
    variance = square - mean.square().sum().item()
    assert (variance < 3.0) == (baseline is not None)


def test_a_fixed_coefficient_stays():
    controller = KLController(0.05)
    controller.update(100.0, 64)
    assert controller.kl_coef == 0.05


@pytest.mark.parametrize(("kl", "factor"), [(12.0, 1.002), (6.0, 1.0), (6.6, 1.001), (0.0, 0.998)])
def test_an_adaptive_coefficient_moves_toward_its_target(kl, factor):
    controller = KLController(0.2, target=6.0, horizon=10_000)
    controller.update(float("nan"), 100)
    assert controller.kl_coef == 0.2
    controller.update(kl, 100)  # an error beyond 20 % counts as 20 %
    assert controller.kl_coef == pytest.approx(0.2 * factor)
