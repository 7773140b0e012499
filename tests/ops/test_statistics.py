"""The statistics of a loss are a dict of scalar tensors, which are made on first use."""

import copy
import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree
from transformers.trainer_pt_utils import nested_detach

import rlhf_fast as rf
from rlhf_fast.ops import _statistics
from rlhf_fast.ops.reference import PAIRWISE_STATS, PPO_STATS, RANKING_STATS, VALUE_STATS

CHOSEN, REJECTED = torch.tensor([2.0, 0.0]), torch.tensor([0.5, 1.0])
WANTED = {"accuracy": 0.5, "margin": 0.25, "chosen_mean": 1.0, "num_pairs": 2.0}


@dataclasses.dataclass
class Output:
    stats: dict


def statistics() -> dict:
    stats = rf.pairwise_loss(CHOSEN, REJECTED)[1]
    assert isinstance(stats, _statistics.Statistics) and stats._unsplit is not None  # not used yet
    return stats


@pytest.mark.parametrize(
    "look",
    [
        dict, lambda s: {**s}, lambda s: {} | s, lambda s: s | {}, lambda s: {k: s[k] for k in s},
        lambda s: dict(s.items()), lambda s: dict(zip(s.keys(), s.values(), strict=True)), copy.copy, copy.deepcopy,
        lambda s: s.copy(), lambda s: pickle.loads(pickle.dumps(s)), lambda s: {k: s.get(k) for k in PAIRWISE_STATS},
        lambda s: (lambda **kwargs: kwargs)(**s), lambda s: _pytree.tree_map(lambda t: t, s),
        lambda s: type(s)(s), lambda s: type(s)((k, v) for k, v in s.items()),
        lambda s: dataclasses.asdict(Output(s))["stats"], lambda s: send_to_device(s, "cpu"), nested_detach,
    ],
)  # fmt: skip
def test_every_way_to_read_a_dict_reads_them(look):
    seen = look(statistics())
    assert isinstance(seen, dict) and tuple(seen) == PAIRWISE_STATS
    for name, value in WANTED.items():
        assert seen[name].shape == () and seen[name].item() == value
    assert not any(value.requires_grad for value in seen.values())


def test_json_reads_them_too_or_says_that_they_are_tensors():
    assert json.loads(json.dumps(statistics(), default=float)) == {k: v.item() for k, v in statistics().items()}
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        json.dumps(statistics())


def test_a_checkpoint_that_holds_them_loads_as_torch_loads_by_default(tmp_path):
    torch.save({"step": 3, "stats": statistics()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["stats"]
    assert tuple(loaded) == PAIRWISE_STATS and loaded["margin"] == 0.25


def test_they_are_a_dict_before_anybody_looks():
    assert len(statistics()) == len(PAIRWISE_STATS) and bool(statistics()) and "margin" in statistics()
    assert statistics().get("nothing", 7) == 7 and "margin" in repr(statistics())
    stats = statistics()
    stats["margin"] = torch.tensor(9.0)  # what is set stays set
    assert stats["margin"] == 9 and stats.pop("accuracy") == 0.5 and len(stats) == len(PAIRWISE_STATS) - 1
    with pytest.raises(KeyError):
        statistics()["nothing"]


def test_in_a_graph_and_under_fake_tensors_they_are_cut_at_once():
    def statistics_of(chosen):
        return rf.pairwise_loss(chosen, REJECTED)[1]

    stats = torch.compile(statistics_of, fullgraph=True, backend="eager")(CHOSEN)
    assert type(stats) is dict and stats["margin"].item() == 0.25
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        stats = statistics_of(mode.from_tensor(CHOSEN))
    assert type(stats) is dict and stats["margin"].shape == ()


def test_an_unclamped_k1_is_a_subtraction_for_autograd_too():
    x, y = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    kl = rf.kl_penalty(x, y)
    assert torch.equal(kl, x - y)
    factor = torch.ones(2, 3, requires_grad=True)
    grads = torch.autograd.grad((kl * factor).sum(), (x, y), create_graph=True)
    assert torch.equal(grads[0], factor) and torch.equal(grads[1], -factor)
    assert torch.equal(torch.autograd.grad(grads[0].sum(), factor)[0], torch.ones(2, 3))


def test_docs_ops_md_names_all_of_them_in_their_order():
    docs = (Path(__file__).parents[2] / "docs/ops.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in docs.split("## Statistics")[1].split("\n## ")[0].splitlines() if row[:1] == "|"]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[1])]
    assert named == [*PPO_STATS, *VALUE_STATS, *PAIRWISE_STATS, *RANKING_STATS]
