"""The bodies of test_device.py that no GPU is needed for, on the CPU: they call what they mean, and would fail."""

from __future__ import annotations

import battery
import pytest
import torch
from cases import CASES

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("test", battery.OF_THE_CONTRACT, ids=lambda test: test.__name__)
def test_a_test_of_the_contract_on_a_device(test):
    test(battery.on_device(BY_NAME["token_logprobs"], "cpu", "padded"))


def test_an_argument_that_an_op_writes_to_is_found():
    case = BY_NAME["value_loss"]
    battery.no_argument_is_modified(case, "cpu")

    def careless(**inputs):
        inputs["returns"].add_(1)
        return case.op(**inputs)

    with pytest.raises(AssertionError, match="returns"):
        battery.no_argument_is_modified(case._replace(op=careless), "cpu")


@pytest.mark.parametrize("op", ["token_logprobs", "token_logprobs_and_entropy", "kl_divergence"])
def test_rows_in_a_graph(op):
    battery.rows_in_a_graph(op, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_least_number_is_an_impossible_token(dtype):
    battery.least_numbers_are_impossible_tokens(dtype, "cpu")


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_cross_entropy", "linear_ppo_loss"])
def test_of_many_elements(op):
    torch.manual_seed(0)
    battery.head_of_many(op, 40, 32, 1003, "cpu")
    battery.kl_divergence_of_many(12, 1003, "cpu")
    assert battery.far_rows(16384, 151936) == (0, 14134, 14135, 16383)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_generation(architecture):
    battery.generates_as_transformers(architecture, "cpu")
    battery.bf16_generates_as_exactly_as_autocast(architecture, "cpu")


@pytest.mark.parametrize("share_trunk", [False, True])
def test_iterations_of_ppo(share_trunk, tmp_path):
    battery.ppo_iterations("cpu", tmp_path, 1e-4, share_trunk=share_trunk)
