"""What the ops refuse. The message must name the op, the argument and what is wrong with it.

A row is (op, what replaces its valid arguments, exception, words of the message in order). Every op has rows.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch

import rlhf_fast as rf
from rlhf_fast import ops
from rlhf_fast.ops._inputs import check_policy, check_term

B, T, V, D = 2, 3, 5, 4
token, meta = torch.zeros(B, T), torch.zeros(B, T, device="meta")
mask = torch.ones(B, T, dtype=torch.bool)
pair, pair_meta = torch.zeros(B), torch.zeros(B, device="meta")
labels = torch.zeros(B, T, dtype=torch.int64)
logits, hidden, weight = torch.zeros(B, T, V), torch.zeros(B, T, D), torch.zeros(V, D)
from_logits = {"logits": logits, "labels": labels}
from_hidden = {"hidden": hidden, "weight": weight, "labels": labels}
ppo = {"old_logprobs": token, "advantages": token, "mask": mask}
VALID = {
    "token_logprobs": from_logits,
    "token_logprobs_and_entropy": from_logits,
    "cross_entropy": from_logits,
    "linear_token_logprobs": from_hidden,
    "linear_cross_entropy": from_hidden,
    "linear_ppo_loss": from_hidden | ppo,
    "kl_divergence": {"logits": logits, "ref_logits": logits},
    "ppo_loss": {"logprobs": token} | ppo,
    "value_loss": {"values": token, "old_values": token, "returns": token, "mask": mask},
    "kl_penalty": {"logprobs": token, "ref_logprobs": token},
    "gae": {"rewards": token, "values": token, "mask": mask},
    "pairwise_loss": {"chosen": pair, "rejected": pair},
    "ranking_loss": {"rewards": token, "ranks": labels},
    "dpo_loss": {f"{ref}{which}_logprobs": pair for ref in ("", "ref_") for which in ("chosen", "rejected")},
    "masked_mean": {"values": token, "mask": mask},
    "masked_whiten": {"values": token, "mask": mask},
}

FLOATS = "needs float32, bfloat16, float16 or float64"
long, wide = torch.zeros(B, T + 1), torch.ones(B, T + 1, dtype=torch.bool)
too_many = 2**30 + 1
huge = torch.zeros(1, 1, too_many, device="meta")
no_label, of_it = torch.zeros(1, 1, dtype=torch.int64, device="meta"), f"a vocabulary of {too_many} is more than"
ROWS = [
    ("token_logprobs", {"logits": logits.numpy()}, TypeError, "logits is of type ndarray; needs a tensor"),
    ("token_logprobs", {"labels": labels.tolist()}, TypeError, "labels is of type list; needs a tensor"),
    ("gae", {"rewards": token.numpy()}, TypeError, "rewards is of type ndarray; needs a tensor"),
    ("gae", {"values": token.tolist()}, TypeError, "values is of type list; needs a tensor"),
    ("cross_entropy", {"labels": labels.numpy()}, TypeError, "labels is of type ndarray; needs a tensor"),
    ("kl_divergence", {"ref_logits": logits.numpy()}, TypeError, "ref_logits is of type ndarray; needs a tensor"),
    ("masked_mean", {"mask": mask.numpy()}, TypeError, "mask is of type ndarray; needs a tensor"),
    ("masked_mean", {"mask": mask.tolist()}, TypeError, "mask is of type list; needs a tensor"),
    ("masked_mean", {"values": token.numpy(), "mask": None}, TypeError, "values is of type ndarray; needs a tensor"),
    ("masked_whiten", {"values": token.numpy(), "mask": None}, TypeError, "values is of type ndarray; needs a tensor"),
    ("masked_whiten", {"values": token.tolist()}, TypeError, "values is of type list; needs a tensor"),
    ("pairwise_loss", {"weights": pair.tolist()}, TypeError, "weights is of type list; needs a tensor"),
    ("ranking_loss", {"ranks": labels.numpy()}, TypeError, "ranks is of type ndarray; needs a tensor"),
    ("token_logprobs", {"logits": huge, "labels": no_label}, ValueError, of_it),
    ("kl_divergence", {"logits": huge, "ref_logits": huge}, ValueError, of_it),
    (
        "linear_token_logprobs",
        {"hidden": huge[..., :1], "weight": huge[0].T, "labels": no_label},
        ValueError,
        of_it,
    ),
    # Tensors of (B, T): every one has the shape, the device and a floating dtype of the first.
    ("ppo_loss", {"logprobs": pair}, ValueError, "logprobs is (2,); needs (B, T)"),
    ("ppo_loss", {"old_logprobs": long}, ValueError, "old_logprobs (2, 4) must have the shape of logprobs (2, 3)"),
    (
        "ppo_loss",
        {"advantages": pair},
        ValueError,
        "advantages (2,) must have the shape of logprobs (2, 3): advantages.reshape(-1, 1).expand_as(logprobs), if",
    ),
    ("ppo_loss", {"mask": wide}, ValueError, "mask (2, 4) must have the shape of logprobs (2, 3)"),
    ("ppo_loss", {"ref_logprobs": long}, ValueError, "ref_logprobs (2, 4) must have the shape of logprobs"),
    ("ppo_loss", {"entropy": long}, ValueError, "entropy (2, 4) must have the shape of logprobs"),
    ("ppo_loss", {"importance_weights": long}, ValueError, "importance_weights (2, 4) must have the shape of logprobs"),
    ("ppo_loss", {"logprobs": labels}, TypeError, f"logprobs is torch.int64; {FLOATS}"),
    ("ppo_loss", {"advantages": mask}, TypeError, f"advantages is torch.bool; {FLOATS}"),
    ("ppo_loss", {"old_logprobs": meta}, ValueError, "old_logprobs is on meta, logprobs on cpu; move them"),
    ("ppo_loss", {"mask": meta}, ValueError, "mask is on meta, logprobs on cpu; move them"),
    ("ppo_loss", {"dual_clip": 1.0}, ValueError, "dual_clip 1.0 must be > 1"),
    ("ppo_loss", {"dual_clip": float("nan")}, ValueError, "dual_clip nan must be > 1"),
    ("ppo_loss", {"cliprange": -0.2}, ValueError, "cliprange -0.2 must be >= 0"),
    ("ppo_loss", {"cliprange_high": -0.2}, ValueError, "cliprange_high -0.2 must be >= 0"),
    ("ppo_loss", {"log_ratio_clamp": -20.0}, ValueError, "log_ratio_clamp -20.0 must be >= 0"),
    ("linear_ppo_loss", {"log_ratio_clamp": -20.0}, ValueError, "log_ratio_clamp -20.0 must be >= 0"),
    ("kl_penalty", {"input_clamp": float("nan")}, ValueError, "input_clamp nan must be >= 0"),
    ("kl_penalty", {"output_clamp": -10.0}, ValueError, "output_clamp -10.0 must be >= 0"),
    ("ppo_loss", {"kl_coef": 0.5}, ValueError, "kl_coef 0.5 needs ref_logprobs"),
    ("ppo_loss", {"entropy_coef": 0.5}, ValueError, "entropy_coef 0.5 needs entropy"),
    ("ppo_loss", {"mask": None}, ValueError, "needs a mask (B, T)"),
    ("ppo_loss", {"kl_estimator": "k4"}, ValueError, "kl_estimator 'k4' must be one of k1, kl, k2"),
    ("ppo_loss", {"loss_agg_mode": "mean"}, ValueError, "loss_agg_mode 'mean' must be one of token-mean, seq-mean"),
    ("ppo_loss", {"normalizer": pair}, ValueError, "normalizer is (2,) on cpu; needs one number on cpu"),
    ("ppo_loss", {"normalizer": meta.sum()}, ValueError, "normalizer is () on meta; needs one number on cpu"),
    ("value_loss", {"values": pair}, ValueError, "values is (2,); needs (B, T)"),
    ("value_loss", {"old_values": long}, ValueError, "old_values (2, 4) must have the shape of values (2, 3)"),
    ("value_loss", {"returns": labels}, TypeError, f"returns is torch.int64; {FLOATS}"),
    ("value_loss", {"returns": meta}, ValueError, "returns is on meta, values on cpu"),
    ("value_loss", {"mask": wide}, ValueError, "mask (2, 4) must have the shape of values"),
    ("value_loss", {"mask": None}, ValueError, "needs a mask (B, T)"),
    ("value_loss", {"cliprange_value": -0.2}, ValueError, "cliprange_value -0.2 must be >= 0"),
    ("value_loss", {"loss_agg_mode": "sum"}, ValueError, "loss_agg_mode 'sum' must be one of token-mean"),
    ("value_loss", {"normalizer": pair}, ValueError, "normalizer is (2,) on cpu; needs one number on cpu"),
    ("kl_penalty", {"ref_logprobs": long}, ValueError, "ref_logprobs (2, 4) must have the shape of logprobs (2, 3)"),
    ("kl_penalty", {"logprobs": labels}, TypeError, f"logprobs is torch.int64; {FLOATS}"),
    ("kl_penalty", {"ref_logprobs": meta}, ValueError, "ref_logprobs is on meta, logprobs on cpu"),
    ("kl_penalty", {"estimator": "k0"}, ValueError, "estimator 'k0' must be one of k1, kl, k2"),
    ("gae", {"rewards": pair}, ValueError, "rewards is (2,); needs (B, T)"),
    ("gae", {"values": long}, ValueError, "values (2, 4) must have the shape of rewards (2, 3)"),
    ("gae", {"values": labels}, TypeError, f"values is torch.int64; {FLOATS}"),
    ("gae", {"values": meta}, ValueError, "values is on meta, rewards on cpu"),
    ("gae", {"mask": wide}, ValueError, "mask (2, 4) must have the shape of rewards"),
    ("gae", {"mask": None}, ValueError, "needs a mask (B, T)"),
    ("gae", {"gap_mode": "skip"}, ValueError, "gap_mode 'skip' must be 'carry' or 'zero'"),
    # Pairs and rankings.
    ("pairwise_loss", {"chosen": token}, ValueError, "chosen is (2, 3); needs (B,)"),
    ("pairwise_loss", {"rejected": pair[:1]}, ValueError, "rejected (1,) must have the shape of chosen (2,)"),
    ("pairwise_loss", {"weights": pair[:1]}, ValueError, "weights (1,) must have the shape of chosen (2,)"),
    ("pairwise_loss", {"margin": pair[:1]}, ValueError, "margin (1,) must have the shape of chosen (2,)"),
    ("pairwise_loss", {"target_prob": 1.2}, ValueError, "target_prob 1.2 must be a probability"),
    ("dpo_loss", {"label_smoothing": 10}, ValueError, "label_smoothing 10 must be a probability"),
    ("pairwise_loss", {"target_prob": pair[:1]}, ValueError, "target_prob (1,) must have the shape of chosen (2,)"),
    ("pairwise_loss", {"rejected": pair.long()}, TypeError, f"rejected is torch.int64; {FLOATS}"),
    ("pairwise_loss", {"margin": pair_meta}, ValueError, "margin is on meta, chosen on cpu"),
    ("dpo_loss", {"chosen_logprobs": token}, ValueError, "chosen_logprobs is (2, 3); needs (B,)"),
    ("dpo_loss", {"ref_chosen_logprobs": pair[:1]}, ValueError, "ref_chosen_logprobs (1,) must have the shape of"),
    ("dpo_loss", {"rejected_logprobs": pair.int()}, TypeError, f"rejected_logprobs is torch.int32; {FLOATS}"),
    ("dpo_loss", {"ref_rejected_logprobs": pair_meta}, ValueError, "ref_rejected_logprobs is on meta, chosen_logprobs"),
    ("ranking_loss", {"rewards": pair}, ValueError, "rewards is (2,); needs (B, T)"),
    ("ranking_loss", {"rewards": labels}, TypeError, f"rewards is torch.int64; {FLOATS}"),
    (
        "ranking_loss",
        {"ranks": labels[:1]},
        ValueError,
        "ranks (1, 3) on cpu must have the shape and device",
    ),
    ("ranking_loss", {"ranks": meta.long()}, ValueError, "ranks (2, 3) on meta must have the shape and device of"),
    ("ranking_loss", {"ranks": token}, TypeError, "ranks is torch.float32; needs integers"),
    ("ranking_loss", {"ranks": mask}, TypeError, "ranks is torch.bool; needs integers"),
    # Masked reductions.
    ("masked_mean", {"mask": wide}, ValueError, "mask (2, 4) cannot be broadcast to values (2, 3)"),
    ("masked_mean", {"dim": 2}, IndexError, "masked_mean: dim 2 is not among the 2 axes of values (2, 3)"),
    ("masked_mean", {"dim": (1, -1)}, RuntimeError, "masked_mean: dim (1, -1) names an axis twice"),
    ("masked_mean", {"mask": meta}, ValueError, "mask is on meta, values on cpu"),
    ("masked_whiten", {"mask": wide}, ValueError, "mask (2, 4) cannot be broadcast to values (2, 3)"),
    ("masked_whiten", {"mask": meta}, ValueError, "mask is on meta, values on cpu"),
    ("masked_whiten", {"eps": 0.0}, ValueError, "eps 0.0 must be > 0"),
    # From logits.
    ("kl_divergence", {"ref_logits": logits[..., 1:]}, ValueError, "logits (2, 3, 5) and ref_logits (2, 3, 4) must be"),
    ("kl_divergence", {"mask": wide}, ValueError, "mask (2, 4) must be logits (2, 3, 5) without the last axis"),
    ("kl_divergence", {"ref_logits": logits.to("meta")}, ValueError, "ref_logits is on meta, logits on cpu"),
    ("kl_divergence", {"ref_logits": logits.long()}, TypeError, f"ref_logits is torch.int64; {FLOATS}"),
    *(
        (op, bad, error, words)
        for op in ("token_logprobs", "token_logprobs_and_entropy")
        for bad, error, words in (
            ({"labels": labels[:1]}, ValueError, "labels (1, 3) must be logits (2, 3, 5) without the vocabulary axis"),
            ({"mask": wide}, ValueError, "mask (2, 4) must have the shape of labels (2, 3)"),
            ({"logits": logits.long()}, TypeError, f"logits is torch.int64; {FLOATS}"),
            ({"labels": token}, TypeError, "labels is torch.float32; needs integer token ids"),
            ({"labels": mask}, TypeError, "labels is torch.bool; needs integer token ids"),
            ({"labels": meta.long()}, ValueError, "labels is on meta, logits on cpu"),
            ({"mask": meta.bool()}, ValueError, "mask is on meta, logits on cpu"),
            ({"temperature": 0.0}, ValueError, "temperature 0.0 must be > 0 and finite"),
            ({"temperature": math.inf}, ValueError, "temperature inf must be > 0 and finite"),
            ({"temperature": pair}, ValueError, "temperature is (2,); needs one number. For one temperature per row"),
            ({"logits": logits[..., :0]}, ValueError, "logits (2, 3, 0) have an empty vocabulary"),
            ({"labels": labels + V}, IndexError, "label 5 at row 0 is outside the vocabulary of 5; a label that does"),
            ({"labels": labels - 1}, IndexError, "label -1 at row 0 is outside the vocabulary of 5"),
        )
    ),
    (
        "cross_entropy",
        {"labels": labels[:1]},
        ValueError,
        "cross_entropy: labels (1, 3) must be logits (2, 3, 5) without",
    ),
    ("cross_entropy", {"labels": labels + V}, IndexError, "label 5 at row 0 is outside the vocabulary of 5"),
    # From hidden states.
    *(
        (op, bad, error, words)
        for op in ("linear_token_logprobs", "linear_cross_entropy", "linear_ppo_loss")
        for bad, error, words in (
            (
                {"weight": logits},
                ValueError,
                "hidden (2, 3, 4) must be (..., D), weight (2, 3, 5) (V, D)",
            ),
            ({"hidden": hidden[0, 0, 0], "labels": labels[0, 0]}, ValueError, "hidden () must be (..., D)"),
            ({"labels": labels[:1]}, ValueError, "labels (1, 3) (...)"),
            ({"bias": pair}, ValueError, "bias (2,) must be (V,) = (5,)"),
            ({"labels": token}, TypeError, "labels is torch.float32; needs integer token ids"),
            ({"weight": weight.to("meta")}, ValueError, "weight is on meta, hidden on cpu"),
            ({"weight": weight.long()}, TypeError, f"weight is torch.int64; {FLOATS}"),
            ({"weight": weight.to(torch.float8_e4m3fn)}, TypeError, f"weight is torch.float8_e4m3fn; {FLOATS}"),
            ({"hidden": hidden.to(torch.float8_e5m2)}, TypeError, f"hidden is torch.float8_e5m2; {FLOATS}"),
            ({"bias": torch.zeros(V, dtype=torch.complex64)}, TypeError, f"bias is torch.complex64; {FLOATS}"),
            ({"weight": torch.nn.Linear(D, V)}, TypeError, "weight is of type Linear; needs a tensor"),
            ({"labels": labels.numpy()}, TypeError, "labels is of type ndarray; needs a tensor"),
            ({"softcap": 0.0}, ValueError, "softcap 0.0 must be > 0"),
            ({"softcap": math.inf}, ValueError, "softcap inf must be > 0 and finite"),
            ({"labels": labels + V}, IndexError, "label 5 at row 0 is outside the vocabulary of 5"),
            ({"labels": labels - 1}, IndexError, "label -1 at row 0 is outside the vocabulary of 5"),
        )
    ),
    ("linear_token_logprobs", {"temperature": 0.0}, ValueError, "temperature 0.0 must be > 0"),
    ("linear_token_logprobs", {"temperature": pair}, ValueError, "temperature is (2,); needs one number"),
    ("linear_token_logprobs", {"mask": wide}, ValueError, "mask (2, 4) must have the shape of labels (2, 3)"),
    ("linear_token_logprobs", {"mask": mask.T}, ValueError, "mask (3, 2) must have the shape of labels (2, 3)"),
    ("linear_token_logprobs", {"mask": mask.to("meta")}, ValueError, "mask is on meta, hidden on cpu"),
    ("linear_cross_entropy", {"normalizer": pair}, ValueError, "normalizer is (2,) on cpu; needs one number on cpu"),
    ("linear_ppo_loss", {"old_logprobs": long}, ValueError, "old_logprobs (2, 4) must have the shape of advantages"),
    ("linear_ppo_loss", {"advantages": long}, ValueError, "old_logprobs (2, 3) must have the shape of advantages"),
    ("linear_ppo_loss", {"advantages": None}, TypeError, "advantages is None"),
    ("linear_ppo_loss", {"temperature": 0.0}, ValueError, "temperature 0.0 must be > 0"),
    ("linear_ppo_loss", {"temperature": pair}, ValueError, "temperature is (2,); needs one number"),
    ("linear_ppo_loss", {"kl_coef": 0.5}, ValueError, "kl_coef 0.5 needs ref_logprobs"),
    ("linear_ppo_loss", {"mask": None}, ValueError, "needs a mask (B, T)"),
    ("linear_ppo_loss", {"dual_clip": 0.5}, ValueError, "dual_clip 0.5 must be > 1"),
    ("linear_ppo_loss", {"kl_estimator": "k4"}, ValueError, "kl_estimator 'k4' must be one of k1"),
    ("linear_ppo_loss", {"loss_agg_mode": "mean"}, ValueError, "loss_agg_mode 'mean' must be one of token-mean"),
    ("linear_ppo_loss", {"normalizer": pair}, ValueError, "normalizer is (2,) on cpu; needs one number on cpu"),
]

# The error says which option is not a number. For example a YAML's 1e-5 arrives as a string.
NUMBERS = {
    "token_logprobs": ("temperature",),
    "token_logprobs_and_entropy": ("temperature",),
    "cross_entropy": ("normalizer",),
    "linear_token_logprobs": ("temperature", "softcap"),
    "linear_cross_entropy": ("softcap", "normalizer"),
    "linear_ppo_loss": ("temperature", "softcap", "cliprange", "dual_clip", "kl_coef", "entropy_coef", "normalizer"),
    "ppo_loss": ("cliprange", "cliprange_high", "log_ratio_clamp", "kl_coef", "entropy_coef", "normalizer"),
    "value_loss": ("cliprange_value", "normalizer"),
    "kl_penalty": ("input_clamp", "output_clamp"),
    "gae": ("gamma", "lam"),
    "pairwise_loss": ("margin", "target_prob", "center_coef"),
    "dpo_loss": ("beta", "label_smoothing"),
    "masked_whiten": ("eps",),
}
OPTIONAL = ("softcap", "dual_clip", "cliprange_high", "log_ratio_clamp", "normalizer", "cliprange_value", "margin")
OPTIONAL += ("input_clamp", "output_clamp", "target_prob")
ROWS += [
    (op, {name: bad}, TypeError, f"{name} is {words}; needs one number")
    for op, names in NUMBERS.items()
    for name in names
    for bad, words in (("1e-5x", "'1e-5x' of type str"), ([0.1], "[0.1] of type list"), (None, "None of type NoneType"))
    if bad is not None or name not in OPTIONAL
]
ROWS += [
    ("ppo_loss", {"cliprange": pair}, TypeError, "cliprange is (2,) on cpu; needs one number"),
    ("dpo_loss", {"beta": pair}, TypeError, "beta is (2,) on cpu; needs one number"),
    ("cross_entropy", {"normalizer": pair}, ValueError, "normalizer is (2,) on cpu; needs one number on cpu"),
    ("value_loss", {"normalizer": pair.numpy()}, TypeError, "normalizer is array([0., 0.]"),
    ("cross_entropy", {"ignore_index": None}, TypeError, "ignore_index None must be an integer; to count every label"),
    ("linear_cross_entropy", {"ignore_index": -100.0}, TypeError, "ignore_index -100.0 must be an integer"),
    ("ppo_loss", {"loss_agg_mode": ["token-mean"]}, ValueError, "loss_agg_mode ['token-mean'] must be one of"),
    ("kl_penalty", {"estimator": ["k1"]}, ValueError, "estimator ['k1'] must be one of"),
    ("masked_mean", {"dim": "rows"}, TypeError, "dim 'rows' must be an axis, a tuple of axes or None"),
    ("masked_mean", {"dim": (0.5,)}, TypeError, "dim (0.5,) must be an axis, a tuple of axes or None"),
    # Converting complex numbers to real ones would lose half of them.
    ("masked_mean", {"values": token * 1j}, TypeError, "values is torch.complex64; needs real numbers"),
    ("masked_whiten", {"values": token * 1j}, TypeError, "values is torch.complex64; needs real numbers"),
    ("pairwise_loss", {"margin": pair * 1j}, TypeError, f"margin is torch.complex64; {FLOATS}"),
    ("ranking_loss", {"ranks": token * 1j}, TypeError, "ranks is torch.complex64; needs integers"),
    ("token_logprobs", {"logits": logits.to_sparse()}, TypeError, "logits is torch.sparse_coo; needs a dense tensor"),
    ("ppo_loss", {"advantages": token.to_sparse()}, TypeError, "advantages is torch.sparse_coo; needs a dense tensor"),
    ("linear_ppo_loss", {"weight": weight.to_sparse()}, TypeError, "weight is torch.sparse_coo; needs a dense"),
    ("gae", {"rewards": torch.nested.nested_tensor([pair])}, TypeError, "rewards is nested; needs a dense tensor"),
]


def test_every_op_has_valid_arguments_and_rows():
    public = {*ops.__all__} - {"backends", "empty_cache", "use_backend"}
    assert public == VALID.keys() == {row[0] for row in ROWS}
    for name, arguments in VALID.items():
        getattr(rf, name)(**arguments)


@pytest.mark.parametrize(("op", "bad", "error", "words"), ROWS, ids=[f"{row[0]}-{'-'.join(row[1])}" for row in ROWS])
def test_the_message_says_what_was_wrong_with_which_argument(op, bad, error, words):
    with pytest.raises(error, match=f"^.*{re.escape(words)}") as caught:
        getattr(rf, op)(**(VALID[op] | bad))
    assert str(caught.value).startswith(f"{op}: ")


@pytest.mark.parametrize(("op", "name"), [("ppo_loss", "cliprange"), ("token_logprobs", "temperature"), ("gae", "lam")])
def test_an_option_of_another_value_for_each_example_of_a_vmap(op, name):
    with pytest.raises(TypeError, match=f"^{op}: {name} is batched by vmap; needs one number"):
        torch.vmap(lambda number: getattr(rf, op)(**VALID[op] | {name: number})[0])(torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "linear_cross_entropy", "linear_ppo_loss"])
def test_a_device_that_has_failed_is_not_blamed_on_the_normalizer(op, monkeypatch):
    def failed(*args, **kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "full", failed)  # the first call of a loss that uses the device
    with pytest.raises(RuntimeError, match="device-side assert triggered"):
        getattr(rf, op)(**VALID[op] | {"normalizer": 5})


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in NUMBERS.items() for name in names])
def test_a_tensor_is_read_as_a_number_also_in_a_compiled_graph(op, name):
    torch._dynamo.reset()
    value = 1.5 if name == "dual_clip" else 0.5
    terms = {"kl_coef": {"ref_logprobs": token}, "entropy_coef": {"entropy": token} if op == "ppo_loss" else {}}
    call = lambda number: getattr(rf, op)(**VALID[op] | terms.get(name, {}) | {name: number})  # noqa: E731
    torch.testing.assert_close(torch.compile(call, backend="eager")(torch.tensor(value)), call(value))


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in VALID for name in VALID[op] if name not in ("mask", "old_logprobs")]
)
def test_none_for_an_argument_that_is_needed(op, name):
    """Without the check a kernel would get address 0."""
    with pytest.raises(TypeError, match=f"^{op}: {name} is None; needs a tensor"):
        getattr(rf, op)(**(VALID[op] | {name: None}))


def test_a_sharded_tensor_is_refused_with_the_way_on():
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # Not gloo: in torch 2.6 its end waits for a thread that may wait for the GIL.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(weight.clone().requires_grad_(), mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"^linear_cross_entropy: weight is a DTensor.*inside the forward"):
            rf.linear_cross_entropy(hidden, sharded, labels)
        with pytest.raises(TypeError, match=r"^token_logprobs: logits is a DTensor.* logits\.full_tensor\(\)"):
            rf.token_logprobs(distribute_tensor(logits, mesh, [Replicate()]), labels)
    finally:
        torch.distributed.destroy_process_group()


OF_LABELS = {
    "token_logprobs": lambda x, y: rf.token_logprobs(x, y).sum(),
    "entropy": lambda x, y: sum(t.sum() for t in rf.token_logprobs_and_entropy(x, y)),
    "a slice": lambda x, y: rf.token_logprobs(x[:, ::2], y[:, ::2]).sum(),
    "in place": lambda x, y: rf.token_logprobs(x.clone(), y, inplace_backward=True).sum(),
    "cross_entropy": lambda x, y: rf.cross_entropy(x, y),
    "linear": lambda x, y: rf.linear_token_logprobs(x, torch.ones(7, x.shape[-1], requires_grad=True), y).sum(),
}


@pytest.mark.parametrize("op", OF_LABELS)
def test_labels_that_are_overwritten_before_the_backward_are_not_read_beyond_the_row(op):
    """A loader may refill its arrays: numpy changes the memory of a tensor without changing its version."""
    x, y = torch.randn(3, 4, 7, requires_grad=True), torch.ones(3, 4, dtype=torch.int64)
    loss = OF_LABELS[op](x, y)
    y.numpy()[1] = 10**9
    with pytest.raises(IndexError, match=r"label 1000000000 at row [24] is outside the vocabulary of 7"):
        loss.backward()


def test_a_refusal_has_the_name_of_the_function_and_not_of_its_kernel():
    with pytest.raises(NotImplementedError, match=r"^token_logprobs has no derivative for torch.func"):
        torch.func.grad(lambda x: rf.token_logprobs(x, labels).sum())(logits)
    with pytest.raises(NotImplementedError, match=r"^token_logprobs has no forward-mode derivative"):
        torch.func.jvp(lambda x: rf.token_logprobs(x, labels), (logits,), (logits,))
    with pytest.raises(NotImplementedError, match=r"^dpo_loss has no derivative for torch.func"):
        torch.func.grad(lambda x: rf.dpo_loss(x, pair, pair, pair)[0])(pair)
    with pytest.raises(NotImplementedError, match=r"^dpo_loss has no forward-mode derivative"):
        torch.func.jvp(lambda x: rf.dpo_loss(x, pair, pair, pair)[0], (pair,), (pair,))


def test_a_first_call_that_is_compiled_warns_of_nothing():
    """Dynamo traces the choice of the kernel, and would warn about a cached function in it."""
    code = """
import torch, rlhf_fast as rf
labels = torch.tensor([1, 0])
torch.compile(lambda x: rf.token_logprobs(x, labels).sum(), fullgraph=True, backend="eager")(torch.randn(2, 3))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "lru_cache" not in done.stderr, done.stderr


def test_a_build_that_is_older_than_the_source_tree_is_said_to_be():
    code = """
import sys, types
old = sys.modules["rlhf_fast._C"] = types.ModuleType("rlhf_fast._C")
old.route = old.alike = old.labelled = lambda given: 1 / 0
import torch, rlhf_fast as rf
rewards, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
try:
    rf.gae(rewards, rewards, mask)
except RuntimeError as error:
    print(error)
with rf.use_backend("reference"):
    print(rf.gae(rewards, rewards, mask)[0].sum().item(), rf.empty_cache())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        "rlhf_fast._C is not built (the existing one was built from another version of the source tree); run pip"
        in done.stdout
    )
    assert done.stdout.endswith("0.0 0\n")


def test_the_smallest_options_of_a_policy_loss_are_allowed():
    check_policy("op", 0.0, 0.0, None, 0.0)


def test_a_term_of_a_negative_coefficient_needs_its_tensor_too():
    with pytest.raises(ValueError, match=r"op: kl_coef -0.1 needs ref_logprobs"):
        check_term("op", "kl_coef", -0.1, "ref_logprobs", None)
