"""Tables worked by hand, checked for the specification and for the public functions."""

import math

import pytest
import torch

import rlhf_fast
from rlhf_fast.ops import reference

NAN, INF = math.nan, math.inf


@pytest.fixture(params=[reference, rlhf_fast], ids=["reference", "public"])
def ops(request):
    return request.param


def row(*values):
    """A (1, T) batch."""
    return torch.tensor([values])


def tokens(*flags):
    return torch.tensor([flags], dtype=torch.bool)


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("d, passes", [(1.0, 1.0), (-1.0, 1.0), (1.5, 0.0)])
def test_the_gradient_passes_at_a_bound_and_not_beyond(ops, d, passes):
    """torch.clamp passes it at the bound up to torch 2.13, but not later. Differences of bfloat16 numbers may lie
    exactly on a bound."""
    logprobs, zero, all_of_it = row(d).requires_grad_(), row(0.0), tokens(True)
    kl = ops.kl_penalty(logprobs, zero, estimator="k2", input_clamp=1.0).sum()
    assert gradient(kl, logprobs)[0].item() == d * passes
    loss, _ = ops.ppo_loss(logprobs, zero, row(-math.copysign(1.0, d)), all_of_it, cliprange=0.1, log_ratio_clamp=1.0)
    grad = math.copysign(math.exp(math.copysign(1.0, d)), d) * passes  # the ratio is not clipped
    assert gradient(loss, logprobs)[0].item() == pytest.approx(grad)


# ---- PPO: ratio 1.5 against cliprange 0.2 counts as 1.2 ----


@pytest.mark.parametrize(
    "log_ratio, advantage, loss, grad",
    [
        (math.log(1.5), 1.0, -1.2, 0.0),  # clipped at 1 + 0.2: -1.2 A and no gradient
        (math.log(1.5), -1.0, 1.5, 1.5),  # a bad action that became likelier is not clipped
        (math.log(0.5), 1.0, -0.5, -0.5),  # a good action that became unlikelier is not clipped
        (math.log(0.5), -1.0, 0.8, 0.0),  # clipped at 1 - 0.2
        (math.log(1.1), 2.0, -2.2, -2.2),
        (0.0, 3.0, -3.0, -3.0),  # ratio 1: the policy gradient, -A
        (-INF, 1.0, 0.0, 0.0),
        (-INF, -1.0, 0.8, 0.0),
        (50.0, 1.0, -1.2, 0.0),
        (100.0, 1.0, -1.2, 0.0),  # exp(100) overflows float32, but the clipped loss does not depend on it
        (100.0, 0.0, 0.0, 0.0),
        (INF, 1.0, -1.2, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(ops, log_ratio, advantage, loss, grad):
    logprobs = row(log_ratio).requires_grad_()
    result, _ = ops.ppo_loss(logprobs, row(0.0), row(advantage), tokens(1), cliprange=0.2)
    torch.testing.assert_close(result, torch.tensor(loss))
    torch.testing.assert_close(gradient(result, logprobs)[0], row(grad))


@pytest.mark.parametrize("log_ratio", [math.log(4.0), 50.0, 100.0, INF])
def test_dual_clip_bounds_the_loss_of_a_bad_action(ops, log_ratio):
    logprobs = row(log_ratio).requires_grad_()
    loss, stats = ops.ppo_loss(logprobs, row(0.0), row(-2.0), tokens(1), dual_clip=3.0)
    assert loss.item() == 6.0
    assert gradient(loss, logprobs)[0].item() == 0.0
    assert stats["dual_clipfrac"].item() == 1.0


def test_asymmetric_clip_and_log_ratio_clamp(ops):
    logprobs = row(math.log(1.25), 50.0).requires_grad_()
    loss, stats = ops.ppo_loss(
        logprobs, row(0.0, 0.0), row(1.0, -1.0), tokens(1, 1), cliprange=0.2, cliprange_high=0.28, log_ratio_clamp=2.0
    )
    # 1.25 < 1.28 is not clipped; the second ratio is exp(2), and the clamp stops its gradient.
    assert loss.item() == pytest.approx((-1.25 + math.exp(2.0)) / 2)
    torch.testing.assert_close(gradient(loss, logprobs)[0], row(-1.25 / 2, 0.0))
    assert stats["clipfrac_high"].item() == 0.0
    assert stats["ratio_max"].item() == pytest.approx(math.exp(2.0))
    assert stats["max_abs_log_ratio"].item() == 50.0  # what was measured, not what the clamp left


def test_statistics_by_hand(ops):
    log_ratio = [math.log(1.5), math.log(0.5), 0.0, 7.0]
    _, stats = ops.ppo_loss(row(*log_ratio), row(0.0, 0.0, 0.0, 0.0), row(1.0, -1.0, 1.0, 9.0), tokens(1, 1, 1, 0))
    d = log_ratio[:3]
    expected = {
        "policy_loss": (-1.2 + 0.8 - 1.0) / 3,
        "kl": 0.0,
        "entropy": 0.0,
        "approx_kl_k1": -sum(d) / 3,
        "approx_kl_k2": sum(x * x / 2 for x in d) / 3,
        "approx_kl_k3": sum(math.exp(x) - 1 - x for x in d) / 3,
        "clipfrac_high": 1 / 3,
        "clipfrac_low": 1 / 3,
        "dual_clipfrac": 0.0,
        "ratio_mean": 1.0,
        "ratio_var": (0.25 + 0.25) / 3,
        "ratio_min": 0.5,
        "ratio_max": 1.5,
        "max_abs_log_ratio": -math.log(0.5),
        "num_tokens": 3.0,
    }
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert tuple(stats) == reference.PPO_STATS


def test_the_first_minibatch_has_ratio_exactly_one(ops):
    logprobs = -torch.rand(4, 33) * 20
    _, stats = ops.ppo_loss(logprobs, logprobs.clone(), torch.randn(4, 33), torch.ones(4, 33, dtype=torch.bool))
    for name, value in [("max_abs_log_ratio", 0), ("ratio_min", 1), ("ratio_max", 1), ("ratio_mean", 1)]:
        assert stats[name].item() == value
    for name in ("ratio_var", "approx_kl_k1", "approx_kl_k2", "approx_kl_k3", "clipfrac_high", "clipfrac_low"):
        assert stats[name].item() == 0.0


def test_without_old_logprobs_every_ratio_is_one_and_the_gradient_is_that_of_the_policy(ops):
    logprobs, advantages, mask = row(-1.0, -2.0, NAN).requires_grad_(), row(3.0, -5.0, 1.0), tokens(1, 1, 0)
    loss, stats = ops.ppo_loss(logprobs, None, advantages, mask, cliprange=0.0, dual_clip=1.5)
    assert loss.item() == 1.0 and stats["ratio_min"] == stats["ratio_max"] == 1 and stats["max_abs_log_ratio"] == 0
    assert torch.equal(*gradient(loss, logprobs), row(-1.5, 2.5, 0.0))


def some_rollout():
    g = torch.Generator().manual_seed(3)
    old, mask = -torch.rand(6, 9, generator=g), torch.rand(6, 9, generator=g) < 0.7
    logprobs = (old + 0.3 * torch.randn(6, 9, generator=g)).requires_grad_()
    return logprobs, old, torch.randn(6, 1, generator=g).expand(6, 9), mask


def test_gspo_as_docs_ops_has_it(ops):
    """Zheng et al. 2025, eq. 5 and 7."""
    logprobs, old, advantages, mask = some_rollout()
    mean = lambda x: ops.masked_mean(x, mask, dim=1)[:, None]  # noqa: E731
    given = advantages.masked_fill(~mask, NAN)  # as a tool's tokens in front have none
    loss, stats = ops.ppo_loss(
        mean(logprobs), mean(old), mean(given), mask.any(1, keepdim=True), cliprange=0.03, cliprange_high=0.04
    )
    ratio = (((logprobs - old) * mask).sum(1) / mask.sum(1)).exp()
    want = -torch.min(ratio * advantages[:, 0], ratio.clamp(0.97, 1.04) * advantages[:, 0]).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient(loss, logprobs), gradient(want, logprobs))
    assert stats["num_tokens"] == 6 and 0 < stats["clipfrac_low"] + stats["clipfrac_high"] < 1


def test_cispo_as_docs_ops_has_it(ops):
    """MiniMax 2025, eq. 4 and 5, without the lower bound, as there."""
    logprobs, old, advantages, mask = some_rollout()
    weights = (logprobs - old).detach().exp().clamp(max=1.2)
    assert (weights == 1.2).any()
    loss, _ = ops.ppo_loss(logprobs, None, advantages, mask, importance_weights=weights)
    want = -(weights * advantages * logprobs)[mask].mean()
    torch.testing.assert_close(gradient(loss, logprobs), gradient(want, logprobs))


def test_the_logprobs_of_a_linear_loss(ops):
    hidden, weight, labels = torch.randn(1, 3, 4).requires_grad_(), torch.randn(5, 4), torch.tensor([[4, 0, -100]])
    mask = tokens(1, 1, 0)
    loss, stats, logprobs = ops.linear_ppo_loss(
        hidden, weight, labels, None, row(1.0, 2.0, NAN), mask, temperature=0.5, with_logprobs=True
    )
    assert loss.item() == -1.5 and stats["ratio_mean"] == 1 and not logprobs.requires_grad
    want = torch.log_softmax(hidden.detach() @ weight.T / 0.5, -1)[0, [0, 1], [4, 0]]
    torch.testing.assert_close(logprobs, torch.cat([want, torch.zeros(1)])[None])


def test_kl_and_entropy_terms(ops):
    logprobs, entropy = row(-1.0, -2.0).requires_grad_(), row(3.0, 5.0).requires_grad_()
    loss, stats = ops.ppo_loss(
        logprobs, row(-1.0, -2.0), row(1.0, 1.0), tokens(1, 1), ref_logprobs=row(-1.5, -1.5), kl_coef=0.1,
        kl_estimator="k2", entropy=entropy, entropy_coef=0.01,
    )  # fmt: skip
    assert stats["kl"].item() == pytest.approx(0.125)
    assert stats["entropy"].item() == pytest.approx(4.0)
    assert loss.item() == pytest.approx(-1.0 + 0.1 * 0.125 - 0.01 * 4.0)
    grad_logprobs, grad_entropy = gradient(loss, logprobs, entropy)
    torch.testing.assert_close(grad_logprobs, row(-0.5 + 0.1 * 0.5 / 2, -0.5 - 0.1 * 0.5 / 2))
    torch.testing.assert_close(grad_entropy, row(-0.005, -0.005))


def test_a_term_with_coefficient_zero_is_only_a_statistic(ops):
    logprobs = row(-INF, -1.0).requires_grad_()
    loss, stats = ops.ppo_loss(
        logprobs, row(-1.0, -1.0), row(1.0, 1.0), tokens(1, 1), ref_logprobs=row(-1.0, -1.0), kl_estimator="k3"
    )
    assert stats["kl"].item() == INF  # and 0 * inf stays out of the loss
    assert loss.item() == -0.5
    torch.testing.assert_close(gradient(loss, logprobs)[0], row(0.0, -0.5))


def test_importance_weights_scale_the_surrogate_only(ops):
    logprobs = row(0.0, 0.0).requires_grad_()
    loss, stats = ops.ppo_loss(
        logprobs, row(0.0, 0.0), row(1.0, 1.0), tokens(1, 1), importance_weights=row(2.0, 0.5),
        ref_logprobs=row(0.0, -1.0), kl_coef=1.0, kl_estimator="k1",
    )  # fmt: skip
    assert stats["policy_loss"].item() == pytest.approx(-1.25)
    assert loss.item() == pytest.approx(-1.25 + 0.5)
    torch.testing.assert_close(gradient(loss, logprobs)[0], row(-1.0 + 0.5, -0.25 + 0.5))


@pytest.mark.parametrize(
    "mode, normalizer, expected",
    [
        ("token-mean", None, 10 / 4),
        ("token-mean", 8, 10 / 8),
        ("seq-mean-token-sum", None, 10 / 2),  # the third sequence has no token and does not count
        ("seq-mean-token-sum", 5.0, 10 / 5),
        ("seq-mean-token-mean", None, (6 / 3 + 4) / 2),
        ("seq-mean-token-mean", 4, (6 / 3 + 4) / 4),
        ("seq-mean-token-sum-norm", None, 10 / 3),  # T = 3
        ("seq-mean-token-sum-norm", torch.tensor(20), 10 / 20),
    ],
)
def test_aggregation_modes_by_hand(ops, mode, normalizer, expected):
    losses = torch.tensor([[1.0, 2.0, 3.0], [NAN, 4.0, NAN], [NAN, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    zero = torch.zeros(3, 3)
    loss, _ = ops.ppo_loss(zero, zero, -losses, mask, loss_agg_mode=mode, normalizer=normalizer)
    assert loss.item() == pytest.approx(expected)
    # 0.5 (v - R)^2 = the same losses for v = 0
    loss, _ = ops.value_loss(zero, zero, (2 * losses).sqrt(), mask, loss_agg_mode=mode, normalizer=normalizer)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", reference.AGGREGATIONS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradient_accumulation_equals_the_full_batch(ops, mode, as_tensor):
    torch.manual_seed(0)
    logprobs = -torch.rand(6, 9).double().requires_grad_()
    old, advantages, mask = -torch.rand(6, 9).double(), torch.randn(6, 9).double(), torch.rand(6, 9) > 0.4
    mask[2] = False
    full, _ = ops.ppo_loss(logprobs, old, advantages, mask, loss_agg_mode=mode)
    normalizer = {"token-mean": mask.sum(), "seq-mean-token-sum-norm": torch.tensor(9)}.get(mode, mask.any(1).sum())
    normalizer = normalizer if as_tensor else normalizer.item()
    parts = [
        ops.ppo_loss(logprobs[i], old[i], advantages[i], mask[i], loss_agg_mode=mode, normalizer=normalizer)[0]
        for i in (slice(0, 1), slice(1, 3), slice(3, 6))
    ]
    torch.testing.assert_close(sum(parts), full)
    torch.testing.assert_close(gradient(sum(parts), logprobs)[0], gradient(full, logprobs)[0])


def cross_entropies(ops, logits, labels, **options):
    """cross_entropy, and linear_cross_entropy of the same logits."""
    eye = torch.eye(logits.shape[-1])
    return ops.cross_entropy(logits, labels, **options), ops.linear_cross_entropy(logits, eye, labels, **options)


@pytest.mark.parametrize("normalizer", [None, 0, torch.tensor(0.0)])
def test_a_cross_entropy_without_a_label_is_0(ops, normalizer):
    logits = torch.full((2, 3), NAN, requires_grad=True)
    for loss in cross_entropies(ops, logits, torch.tensor([-100, -100]), normalizer=normalizer):
        assert loss.item() == 0.0
        assert torch.equal(gradient(loss, logits)[0], torch.zeros(2, 3))


@pytest.mark.parametrize("normalizer", [torch.tensor([4.0]), torch.tensor([[4]]), torch.tensor(4.0).double()])
def test_a_normalizer_is_one_number_and_data_whatever_its_shape_and_dtype(ops, normalizer):
    """all_reduce and NumPy return such tensors."""
    normalizer = normalizer.requires_grad_(normalizer.is_floating_point())
    logits = torch.zeros(2, 3, requires_grad=True)
    losses = cross_entropies(ops, logits, torch.tensor([0, 2]), normalizer=normalizer)
    zero, all_of_it = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    losses += (ops.ppo_loss(logits, zero, zero - 1, all_of_it, normalizer=normalizer)[0],)
    losses += (ops.value_loss(logits, zero, zero + 1, all_of_it, normalizer=normalizer)[0],)
    for loss, expected in zip(losses, [math.log(3) / 2, math.log(3) / 2, 6 / 4, 3 / 4], strict=True):
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        assert loss.item() == pytest.approx(expected)
        loss.backward()
    assert normalizer.grad is None


def test_an_unsigned_label_is_not_the_ignore_index(ops):
    """Byte tokenizers keep labels as uint8, in which -100 would be 156."""
    logits = torch.zeros(2, 256)
    for loss in cross_entropies(ops, logits, torch.tensor([156, 7], dtype=torch.uint8), normalizer=1):
        assert loss.item() == pytest.approx(2 * math.log(256))


@pytest.mark.parametrize("normalizer", [None, 0, torch.tensor(0.0)])
@pytest.mark.parametrize("mode", reference.AGGREGATIONS)
def test_an_empty_mask_costs_nothing_and_moves_nothing(ops, mode, normalizer):
    nan, nothing = torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool)
    x, entropy = nan.clone().requires_grad_(), nan.clone().requires_grad_()
    loss, stats = ops.ppo_loss(
        x, nan, nan, nothing, ref_logprobs=nan, kl_coef=0.1, entropy=entropy, entropy_coef=0.1, importance_weights=nan,
        loss_agg_mode=mode, normalizer=normalizer,
    )  # fmt: skip
    assert loss.item() == 0.0
    assert all(value.item() == 0.0 for value in stats.values())
    for grad in gradient(loss, x, entropy):
        assert torch.equal(grad, torch.zeros(2, 3))
    loss, stats = ops.value_loss(x, nan, nan, nothing, loss_agg_mode=mode, normalizer=normalizer)
    assert loss.item() == 0.0
    assert all(value.item() == 0.0 for value in stats.values())
    assert torch.equal(gradient(loss, x)[0], torch.zeros(2, 3))


def test_nan_outside_the_mask_reaches_nothing(ops):
    """With NaN outside the mask every masked op gives bitwise the same result as with zeros there."""
    torch.manual_seed(1)
    mask = torch.rand(3, 7) > 0.5
    clean = [torch.where(mask, torch.randn(3, 7), 0.0) for _ in range(6)]
    dirty = [torch.where(mask, x, NAN) for x in clean]

    def run(x):
        logprobs, entropy = x[0].clone().requires_grad_(), x[5].clone().requires_grad_()
        loss, stats = ops.ppo_loss(
            logprobs, x[1], x[2], mask, dual_clip=2.0, log_ratio_clamp=1.5, ref_logprobs=x[3], kl_coef=0.1,
            importance_weights=x[4], entropy=entropy, entropy_coef=0.1, loss_agg_mode="seq-mean-token-mean",
        )  # fmt: skip
        values = x[0].clone().requires_grad_()
        vloss, vstats = ops.value_loss(values, x[1], x[2], mask)
        mean, white = ops.masked_mean(values, mask), ops.masked_whiten(values, mask)
        return [
            loss, *stats.values(), *gradient(loss, logprobs, entropy),
            vloss, *vstats.values(), *gradient(vloss, values),
            *ops.gae(x[0], x[1], mask), *ops.gae(x[0], x[1], mask, gap_mode="zero"), mean, *gradient(mean, values),
            white, *gradient(white.square().sum() + white[mask][0], values),
        ]  # fmt: skip

    for a, b in zip(run(clean), run(dirty), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


# ---- value loss ----


def test_value_loss_by_hand(ops):
    values = row(1.0, 0.1, 0.5, NAN).requires_grad_()
    # old 0, clip 0.2, return 2: error 1 against (0.2 - 2)^2 = 3.24; return 0: 0.01 unclipped; 0.25 against 0.04
    loss, stats = ops.value_loss(
        values, row(0.0, 0.0, 0.0, 9.0), row(2.0, 0.0, 0.0, 9.0), tokens(1, 1, 1, 0), cliprange_value=0.2
    )
    assert loss.item() == pytest.approx(0.5 * (3.24 + 0.01 + 0.25) / 3)
    torch.testing.assert_close(gradient(loss, values)[0], row(0.0, 0.1 / 3, 0.5 / 3, 0.0))
    expected = {
        "value_loss": 3.5 / 6,
        "clipfrac": 1 / 3,
        "values_mean": 1.6 / 3,
        "returns_mean": 2 / 3,
        "returns_var": (4 / 3) - (2 / 3) ** 2,
        "error_mean": 0.4 / 3,
        "error_var": (1 + 0.01 + 0.25) / 3 - (0.4 / 3) ** 2,
        "num_tokens": 3.0,
    }
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected, rel=1e-6)
    unclipped, _ = ops.value_loss(row(1.0), row(0.0), row(2.0), tokens(1), cliprange_value=None)
    assert unclipped.item() == 0.5


@pytest.mark.parametrize("unknown, slope", [("values", NAN), ("old_values", 0.0), ("returns", NAN)])
def test_a_value_that_is_nan_shows_in_the_loss(ops, unknown, slope):
    """As in torch.max. A NaN in old_values must not switch the clip off; its bounds hold the value as a constant."""
    inputs = {name: row(1.0, 1.0) for name in ("values", "old_values", "returns")} | {unknown: row(NAN, 1.0)}
    values = inputs["values"].requires_grad_()
    loss, _ = ops.value_loss(**inputs, mask=tokens(1, 1))
    assert loss.isnan()
    torch.testing.assert_close(gradient(loss, values)[0], row(slope, 0.0), equal_nan=True)


# ---- KL estimators ----


@pytest.mark.parametrize(
    "estimator, d, kl, grad",
    [
        ("k1", 0.5, 0.5, 1.0),
        ("kl", -0.5, -0.5, 1.0),
        ("k2", -3.0, 4.5, -3.0),
        ("mse", 2.0, 2.0, 2.0),
        ("k3", 1.0, math.exp(-1.0), 1 - math.exp(-1.0)),
        ("low_var_kl", -1.0, math.e - 2, 1 - math.e),
        ("k3", 0.0, 0.0, 0.0),
        ("k3", 50.0, 49.0, 1.0),
        ("k3", INF, INF, 1.0),
        ("k3", -100.0, INF, -INF),
        ("k3", -INF, INF, -INF),
        ("abs", -2.0, 2.0, -1.0),
        ("abs", 0.0, 0.0, 0.0),
    ],
)
def test_kl_estimators_by_hand(ops, estimator, d, kl, grad):
    logprobs, ref = row(d).requires_grad_(), row(0.0).requires_grad_()
    result = ops.kl_penalty(logprobs, ref, estimator=estimator)
    torch.testing.assert_close(result, row(kl), equal_nan=False)
    if math.isfinite(d):
        of_logprobs, of_ref = gradient(result.sum(), logprobs, ref)
        torch.testing.assert_close(of_logprobs, row(grad))
        torch.testing.assert_close(of_ref, row(-grad))


@pytest.mark.parametrize("lowest", [-1e4, torch.finfo(torch.float32).min, -INF])
def test_what_p_forbids_adds_nothing_to_the_divergence_whatever_q_says(ops, lowest):
    """Models write the padding of a vocabulary like this. It is longer than the block that a kernel reads at once."""
    padding = torch.arange(9001) < 9000
    logits = torch.where(padding, lowest, 0.0).requires_grad_()
    kl = ops.kl_divergence(logits, torch.where(padding, -INF, 0.0))
    assert kl.item() == 0.0
    assert torch.equal(gradient(kl, logits)[0], torch.zeros(9001))


def test_kl_clamps_stop_value_and_gradient(ops):
    d = row(-INF, -100.0, -3.0, 3.0, 30.0).requires_grad_()
    zero = torch.zeros(1, 5)
    kl = ops.kl_penalty(d, zero, estimator="k1", input_clamp=20.0, output_clamp=10.0)
    torch.testing.assert_close(kl, row(-10.0, -10.0, -3.0, 3.0, 10.0))
    torch.testing.assert_close(gradient(kl.sum(), d)[0], row(0.0, 0.0, 1.0, 1.0, 0.0))
    kl = ops.kl_penalty(d, zero, estimator="k3", output_clamp=10.0)
    torch.testing.assert_close(kl, row(10.0, 10.0, 10.0, math.exp(-3.0) + 2, 10.0))
    torch.testing.assert_close(gradient(kl.sum(), d)[0], row(0.0, 0.0, 0.0, 1 - math.exp(-3.0), 0.0))
    kl = ops.kl_penalty(d, zero, estimator="k2", input_clamp=4.0)
    torch.testing.assert_close(kl, row(8.0, 8.0, 4.5, 4.5, 8.0))
    torch.testing.assert_close(gradient(kl.sum(), d)[0], row(0.0, 0.0, -3.0, 3.0, 0.0))


# ---- GAE ----


def test_advantage_by_hand(ops):
    advantages, returns = ops.gae(row(10.0), row(7.0), tokens(1))  # R = 10, b = 7
    assert advantages.item() == 3.0
    assert returns.item() == 10.0


@pytest.mark.parametrize(
    "gap_mode, expected",
    [("carry", [0.4287, 0.4512, 0, 0, 0.4750, 0.5]), ("zero", [0.3406, 0.3585, 0, 0, 0.4750, 0.5])],
)
def test_gae_across_a_gap(ops, gap_mode, expected):
    """Six tokens, V = 0.5 everywhere, reward 1 at the end, two masked positions in the middle (NaN there)."""
    mask = tokens(1, 1, 0, 0, 1, 1)
    values, rewards = row(0.5, 0.5, NAN, NAN, 0.5, 0.5), row(0.0, 0.0, NAN, NAN, 0.0, 1.0)
    advantages, returns = ops.gae(rewards, values, mask, gamma=1.0, lam=0.95, gap_mode=gap_mode)
    torch.testing.assert_close(advantages, row(*expected), atol=6e-5, rtol=0)
    torch.testing.assert_close(returns, torch.where(mask, advantages + 0.5, 0.0))


def test_gae_discounts_and_ignores_padding_on_either_side(ops):
    rewards, values = row(1.0, 2.0, 4.0), row(0.5, 1.0, 2.0)
    advantages, _ = ops.gae(rewards, values, tokens(1, 1, 1), gamma=0.5, lam=0.5)
    last = 4.0 - 2.0
    middle = 2.0 + 0.5 * 2.0 - 1.0 + 0.25 * last
    first = 1.0 + 0.5 * 1.0 - 0.5 + 0.25 * middle
    torch.testing.assert_close(advantages, row(first, middle, last))
    padded, _ = ops.gae(
        row(NAN, 1.0, 2.0, 4.0, NAN), row(NAN, 0.5, 1.0, 2.0, NAN), tokens(0, 1, 1, 1, 0), gamma=0.5, lam=0.5
    )
    torch.testing.assert_close(padded, row(0.0, first, middle, last, 0.0))


# ---- Bradley-Terry ----


def test_preference_probability_by_hand(ops):
    loss, stats = ops.pairwise_loss(torch.tensor([2.0]), torch.tensor([0.5]))
    assert math.exp(-loss.item()) == pytest.approx(0.8176, abs=5e-5)  # sigma(1.5)
    assert stats["margin"].item() == 1.5
    assert stats["accuracy"].item() == 1.0


@pytest.mark.parametrize("d, loss, grad", [(100.0, 0.0, 0.0), (-100.0, 100.0, -1.0), (0.0, math.log(2.0), -0.5)])
def test_pairwise_loss_does_not_overflow(ops, d, loss, grad):
    chosen, rejected = torch.tensor([d]).requires_grad_(), torch.tensor([0.0]).requires_grad_()
    result, _ = ops.pairwise_loss(chosen, rejected)
    assert result.item() == pytest.approx(loss, rel=1e-6, abs=1e-30)
    of_chosen, of_rejected = gradient(result, chosen, rejected)
    assert of_chosen.item() == pytest.approx(grad, rel=1e-6, abs=1e-30)
    assert of_rejected.item() == pytest.approx(-grad, rel=1e-6, abs=1e-30)


def test_soft_labels_margin_centre_and_weights_by_hand(ops):
    chosen, rejected = torch.tensor([1.0, 0.0, 5.0]).requires_grad_(), torch.tensor([0.0, 2.0, 5.0])
    margin, p, w = torch.tensor([0.5, 0.0, 0.0]), torch.tensor([0.9, 0.25, 1.0]), torch.tensor([2.0, 1.0, 0.0])
    loss, stats = ops.pairwise_loss(chosen, rejected, margin=margin, target_prob=p, center_coef=0.01, weights=w)
    nls = lambda x: math.log1p(math.exp(-x))  # noqa: E731
    first = 0.9 * nls(0.5) + 0.1 * nls(-0.5) + 0.01
    second = 0.25 * nls(-2.0) + 0.75 * nls(2.0) + 0.04
    assert loss.item() == pytest.approx((2 * first + second) / 3)
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = [2 / 3 * (sigma(0.5) - 0.9 + 0.02), 1 / 3 * (sigma(-2.0) - 0.25 + 0.04), 0.0]
    torch.testing.assert_close(gradient(loss, chosen)[0], torch.tensor(expected))
    mean = 13 / 6
    std = math.sqrt(sum((x - mean) ** 2 for x in [1, 0, 5, 0, 2, 5]) / 6)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {
            "accuracy": 2 / 3,
            "margin": (2 * 1.0 - 2.0) / 3,
            "chosen_mean": 2 / 3,
            "rejected_mean": 2 / 3,
            "reward_mean": mean,
            "reward_std": std,
            "num_pairs": 3.0,
        },
        abs=1e-6,
    )


def test_a_tie_counts_one_half_a_nan_is_seen_and_an_empty_batch_is_nothing(ops):
    assert ops.pairwise_loss(torch.ones(1), torch.ones(1))[1]["accuracy"].item() == 0.5
    assert ops.pairwise_loss(torch.tensor([1.0, NAN]), torch.ones(2))[1]["accuracy"].isnan()
    assert ops.ranking_loss(torch.tensor([[1.0, NAN]]), torch.tensor([[0, 1]]))[1]["accuracy"].isnan()
    empty = torch.zeros(0, requires_grad=True)
    loss, stats = ops.pairwise_loss(empty, torch.zeros(0))
    assert loss.item() == 0.0
    assert all(value.item() == 0.0 for value in stats.values())
    assert gradient(loss, empty)[0].shape == (0,)


def test_ranking_loss_takes_all_pairs(ops):
    # r = 3 > 2 > 0 in this order of ranks; the second prompt has a tie (no pair) and padding, the third one response
    rewards = torch.tensor([[2.0, 3.0, 0.0], [1.0, 1.5, NAN], [0.0, NAN, NAN]]).requires_grad_()
    ranks = torch.tensor([[1, 0, 2], [0, 0, -1], [0, -1, -1]])
    loss, stats = ops.ranking_loss(rewards, ranks)
    nls = lambda x: math.log1p(math.exp(-x))  # noqa: E731
    assert loss.item() == pytest.approx((nls(1.0) + nls(3.0) + nls(2.0)) / 3)
    assert stats["num_pairs"].item() == 3.0
    assert stats["accuracy"].item() == 1.0
    assert stats["margin"].item() == pytest.approx(2.0)
    s = lambda x: -1 / (1 + math.exp(x)) / 3  # noqa: E731
    expected = torch.tensor([[s(2.0) - s(1.0), s(1.0) + s(3.0), -s(3.0) - s(2.0)], [0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(gradient(loss, rewards)[0], expected)


def test_counts_are_ranks_of_responses_that_stand_best_first(ops):
    rewards = torch.tensor([[3.0, 2.0, 0.0], [1.0, 1.5, NAN], [0.0, NAN, NAN], [NAN, NAN, NAN]]).requires_grad_()
    ranks = torch.tensor([[0, 1, 2], [0, 1, -1], [0, -1, -1], [-1, -1, -1]])
    (loss, stats), (want, _) = ops.ranking_loss(rewards, torch.tensor([3, 2, 1, 0])), ops.ranking_loss(rewards, ranks)
    assert stats["num_pairs"].item() == 4.0
    assert loss.item() == want.item() > 0
    assert torch.equal(gradient(loss, rewards)[0], gradient(want, rewards)[0])


def test_two_ranked_responses_are_one_pair(ops):
    chosen, rejected = torch.randn(5), torch.randn(5)
    ranked, _ = ops.ranking_loss(torch.stack([chosen, rejected], 1), torch.tensor([[0, 1]]).expand(5, 2))
    torch.testing.assert_close(ranked, ops.pairwise_loss(chosen, rejected)[0])


def test_dpo_is_the_pairwise_loss_of_implicit_rewards(ops):
    chosen, rejected = torch.tensor([-10.0]).requires_grad_(), torch.tensor([-12.0]).requires_grad_()
    ref_chosen, ref_rejected = torch.tensor([-11.0]), torch.tensor([-10.0])
    loss, stats = ops.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.1 * (1.0 + 2.0))))
    assert stats["chosen_mean"].item() == pytest.approx(0.1)
    assert stats["rejected_mean"].item() == pytest.approx(-0.2)
    grad = -0.1 / (1 + math.exp(0.3))
    of_chosen, of_rejected = gradient(loss, chosen, rejected)
    assert of_chosen.item() == pytest.approx(grad)
    assert of_rejected.item() == pytest.approx(-grad)
    smooth, _ = ops.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.25)
    assert smooth.item() == pytest.approx(0.75 * math.log1p(math.exp(-0.3)) + 0.25 * math.log1p(math.exp(0.3)))


# ---- masked statistics ----


def test_masked_mean_by_hand(ops):
    values, mask = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN]]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert ops.masked_mean(values, mask).item() == 1.5
    torch.testing.assert_close(ops.masked_mean(values, mask, dim=-1), torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(ops.masked_mean(values, mask, dim=0), torch.tensor([1.0, 2.0, 0.0]))
    assert ops.masked_mean(torch.tensor([1.0, 3.0])).item() == 2.0
    assert ops.masked_mean(torch.zeros(0, 3)).item() == 0.0
    number = torch.tensor(3.0)  # torch.mean takes dim=0 and -1 of a tensor without axes
    assert ops.masked_mean(number, dim=0) == ops.masked_mean(number, number > 2, (-1,)) == number.mean(0)
    assert ops.masked_mean(number, number < 2, dim=-1).item() == 0.0


def test_results_have_the_precision_of_the_first_argument_and_labels_any_integer_type(ops):
    x, y, mask, ranks = (
        torch.randn(2, 3),
        torch.randn(2, 3).double(),
        tokens(1, 1, 0).expand(2, 3),
        torch.tensor([0, 1]),
    )
    results = [
        *ops.ppo_loss(x, y, y, mask, ref_logprobs=y, kl_coef=0.1), *ops.value_loss(x, y, y, mask), *ops.gae(x, y, mask),
        ops.kl_penalty(x, y, estimator="k3"), *ops.pairwise_loss(x[0], y[0]), *ops.dpo_loss(x[0], y[0], y[0], y[0]),
        ops.token_logprobs(x, ranks.to(torch.uint8)), ops.cross_entropy(x, ranks.to(torch.int32)),
        ops.linear_token_logprobs(x, torch.randn(5, 3), ranks.to(torch.uint8)),
    ]  # fmt: skip
    for tensor in (t for r in results for t in (r.values() if isinstance(r, dict) else [r])):
        assert tensor.dtype == torch.float32
    assert ops.linear_token_logprobs(y, torch.randn(5, 3), ranks).dtype == torch.float64
    assert ops.linear_cross_entropy(y, torch.randn(5, 3), ranks).dtype == torch.float64


def test_a_margin_or_label_of_all_pairs_may_be_a_tensor(ops):
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([0.5, 1.0])
    loss, _ = ops.pairwise_loss(chosen, rejected, margin=torch.tensor(0.5), target_prob=torch.tensor(0.8))
    assert loss.item() == pytest.approx(ops.pairwise_loss(chosen, rejected, margin=0.5, target_prob=0.8)[0].item())


def test_no_axis_in_particular_is_all_of_them(ops):
    values = torch.arange(6.0).view(2, 3)
    assert ops.masked_mean(values, values > 1, ()).item() == 3.5


def test_a_bool_counts_once_whatever_its_byte(ops):
    """numpy's mask.view(bool) of 0 and 255 makes such bytes."""
    mask = torch.tensor([[255, 0, 3]], dtype=torch.uint8).view(torch.bool)
    x = torch.tensor([[1.0, 5.0, 3.0]], requires_grad=True)
    assert ops.masked_mean(x, mask).item() == 2.0
    torch.testing.assert_close(ops.masked_whiten(x, mask).detach(), torch.tensor([[-0.5, 0.0, 0.5]]).mul(2**0.5))
    for loss, stats in (
        ops.value_loss(x, torch.zeros(1, 3), torch.zeros(1, 3), mask, cliprange_value=None),
        ops.ppo_loss(torch.zeros(1, 3), torch.zeros(1, 3), -x.detach(), mask),
    ):
        assert loss.item() in (2.5, 2.0) and stats["num_tokens"].item() == 2


def test_margins_and_labels_of_a_data_set_may_be_integers(ops):
    chosen, rejected, margin, first = row(2.0, 0.0)[0], row(1.0, 1.0)[0], torch.tensor([1, 0]), torch.tensor([1, 0])
    loss, _ = ops.pairwise_loss(chosen, rejected, margin=margin, target_prob=first, weights=torch.tensor([1, 3]))
    assert loss.item() == pytest.approx((math.log(2) + 3 * math.log(1 + math.exp(-1))) / 4)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
def test_values_of_any_dtype_are_numbers(ops, dtype):
    values = torch.tensor([0.0, 0.0, 1.0, 1.0]).to(dtype)
    assert ops.masked_mean(values).item() == 0.5
    root = math.sqrt(3) / 2  # unbiased variance 1/3
    torch.testing.assert_close(ops.masked_whiten(values), torch.tensor([-root, -root, root, root]))


def test_masked_whiten_by_hand(ops):
    values, mask = row(1.0, 3.0, NAN), tokens(1, 1, 0)
    half = 1 / math.sqrt(2.0)  # mean 2, unbiased variance 2
    torch.testing.assert_close(ops.masked_whiten(values, mask), row(-half, half, 0.0))
    torch.testing.assert_close(ops.masked_whiten(values, mask, shift_mean=False), row(2 - half, 2 + half, 0.0))
    torch.testing.assert_close(ops.masked_whiten(values, tokens(1, 0, 0)), row(0.0, 0.0, 0.0))
    torch.testing.assert_close(ops.masked_whiten(values, tokens(0, 0, 0)), row(0.0, 0.0, 0.0))
    # A mask shared by all rows counts once per row.
    torch.testing.assert_close(
        ops.masked_whiten(values.expand(2, 3), mask), ops.masked_whiten(values.expand(2, 3), mask.expand(2, 3))
    )
