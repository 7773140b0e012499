import os
import signal

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: no test waits for a hub that it cannot reach

from helpers import tiny_model, tiny_tokenizer

from rlhf_fast.ops import _native

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.fixture(params=["amx", "avx512", "avx2", "portable"])
def isa(request):
    """Every instruction set of the CPU kernels that this machine runs."""
    native = _native._C
    if native is None or not native.isas().get(request.param, False):
        pytest.skip(f"this CPU or this build does not run {request.param}")
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)
