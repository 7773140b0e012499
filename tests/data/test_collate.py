import numpy as np
import torch

from rlhf_fast.data.chat import Encoded
from rlhf_fast.data.collate import collate_comparisons, collate_sft, pad
from rlhf_fast.data.formats import Comparison


def test_padding_on_the_right_by_hand():
    ids, mask = pad([np.array([5, 6], np.int32), np.array([7], np.int32)], 9)
    assert ids.tolist() == [[5, 6], [7, 9]] and ids.dtype == torch.int64
    assert mask.tolist() == [[True, True], [True, False]]
    assert [x.tolist() for x in pad([[]], 9)] == [[[9]], [[False]]]  # one column at least


def test_positions_point_at_the_token_before_each_label():
    examples = [
        Encoded(np.array([5, 6, 7, 1], np.int32), np.array([0, 0, 1, 1], bool)),
        Encoded(np.array([1, 8], np.int32), np.array([1, 1], bool)),  # its first token has no predecessor
    ]
    batch = collate_sft(examples, pad_token_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [1, 8, 1, 1]]
    assert batch["positions"].tolist() == [1, 2, 4]  # tokens 6, 7 of row 0; token 1 of row 1
    assert batch["labels"].tolist() == [7, 1, 8]
    assert batch["input_ids"].flatten()[batch["positions"]].tolist() == [6, 7, 1]


def test_responses_of_uneven_prompts_share_one_batch():
    tokens = [np.array([k], np.int32) for k in range(5)]
    items = [Comparison(tokens[:3], [0, 1, 1]), Comparison(tokens[3:], [0, 1], margin=0.5, chosen_prob=0.9, weight=2.0)]
    batch = collate_comparisons(items, pad_token_id=0, width=3)
    assert batch["input_ids"].flatten().tolist() == [0, 1, 2, 3, 4]
    assert batch["slot"].tolist() == [[0, 1, 2], [3, 4, 3]]
    assert batch["ranks"].tolist() == [[0, 1, 1], [0, 1, -1]]
    assert torch.equal(batch["chosen_prob"], torch.tensor([1.0, 0.9]))
    assert batch["margin"].tolist() == [0.0, 0.5] and batch["weight"].tolist() == [1.0, 2.0]
