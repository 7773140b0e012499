"""`rlhf-fast info` says what runs on which device."""

import json
import re

import pytest
import torch

import rlhf_fast as rf
from rlhf_fast import info
from rlhf_fast.ops import _dispatch, _native


def test_the_report_names_versions_build_and_every_op(capsys):
    info.main()
    text = capsys.readouterr().out
    for word in ("torch", "CPU", "build", "in use:", "token_logprobs", "native"):
        assert word in text


def test_json_is_the_same_report(capsys):
    info.main(as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["build"]["instruction_set_in_use"] in data["build"]["instruction_sets"]
    assert data["backends"]["token_logprobs"]["cpu"] == {"backend": "native", "why": None}
    cuda = data["backends"]["token_logprobs"]["cuda"]
    assert cuda["why"] or cuda["backend"] == "native"  # a worse backend always says why


@pytest.mark.parametrize("op", sorted(rf.backends()))
def test_a_cuda_tensor_without_cuda_kernels_is_refused_with_how_to_build_them(op, monkeypatch):
    """The error of every op for a CUDA tensor, in a build without nvcc, on a machine without Triton."""
    unavailable = {"native": _native.HOW_TO_BUILD, "triton": "triton is not installed"}
    monkeypatch.setattr(_native, "unavailable", lambda device, backend: unavailable[backend])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "RLHF_FAST_CUDA=1" in _native.HOW_TO_BUILD
    mine, how = [kernel for name, kernel in _dispatch._OPS.items() if name.startswith(op)], _native.HOW_TO_BUILD
    assert mine
    for kernel in mine:
        with pytest.raises(RuntimeError, match=f"{kernel.public} got a CUDA tensor.*{re.escape(how)}"):
            kernel._choose("cuda")


@pytest.mark.parametrize("op", ["value_loss", "masked_mean", "masked_whiten", "ranking_loss"])
def test_where_triton_runs_an_op_without_a_kernel_in_it_is_plain_pytorch_and_says_so(op, monkeypatch):
    unavailable = {"native": _native.HOW_TO_BUILD, "triton": None}
    monkeypatch.setattr(_native, "unavailable", lambda device, backend: unavailable[backend])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kernel = _dispatch._OPS[op]
    monkeypatch.setattr(kernel, "_chosen", {})
    with pytest.warns(
        UserWarning, match=f"{op} runs in plain PyTorch on cuda: native: {re.escape(_native.HOW_TO_BUILD)}; triton"
    ):
        assert kernel.backend_on("cuda") == "reference"
    assert kernel.backend_on("cuda") == "reference"  # said once
    assert {rf.backends()[name]["cuda"]["backend"] for name in rf.backends()} == {"triton", "reference"}
    assert rf.backends()["ppo_loss"]["cuda"]["backend"] == "triton"
