"""Large CPU gradients reuse the memory of the previous step (csrc/memory.h), without a visible difference."""

import gc
import io
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rlhf_fast
from rlhf_fast.ops import _native

SHAPE = (64, 1000)
BYTES = 4 * 64 * 1000

pytestmark = pytest.mark.skipif(
    _native._empties(torch.empty(0), 0) is None, reason="needs the native build and torch 2.10"
)


@pytest.fixture(autouse=True)
def small_is_large():
    before = _native._C.keep_from(1024)  # bytes: less than any gradient below, more than the other outputs
    gc.collect()
    _native.empty_cache()
    yield
    _native._C.keep_from(before)
    gc.collect()
    _native.empty_cache()


def gradient(seed=0, shape=SHAPE, dtype=torch.float32, mask=None):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    rlhf_fast.token_logprobs(logits, labels, mask=mask).sum().backward()
    return logits.grad


def test_a_freed_gradient_s_memory_is_the_next_one_s_and_holds_its_values():
    first = gradient()
    expected, address = first.clone(), first.data_ptr()
    first.fill_(torch.nan)
    del first
    second = gradient()
    assert second.data_ptr() == address and torch.equal(second, expected)
    assert second.is_contiguous() and second.shape == SHAPE and not second.requires_grad


def test_masked_rows_are_zero_in_used_memory():
    gradient().fill_(torch.nan)
    mask = torch.arange(SHAPE[0]) % 3 == 0
    grad = gradient(mask=mask)
    assert grad.isfinite().all() and not grad[~mask].any() and grad[mask].any()


def test_what_is_in_use_is_nobody_else_s():
    first = gradient(0)
    before = first.clone()
    second = gradient(1)
    assert second.data_ptr() != first.data_ptr() and torch.equal(first, before)
    row = first[3]  # a view holds the whole
    del first
    gradient(2)
    assert torch.equal(row, before[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype):
    used = gradient(dtype=dtype)
    assert used.dtype == dtype
    with rlhf_fast.use_backend("reference"):
        expected = gradient(dtype=dtype)
    torch.testing.assert_close(used, expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)


def test_no_more_is_kept_than_was_in_use_at_once():
    one = gradient()
    del one
    assert _native.empty_cache() == BYTES and _native.empty_cache() == 0
    one, two = gradient(0), gradient(1)
    del one, two
    larger = gradient(shape=(64, 1500))  # neither is large enough: the older one makes room
    del larger
    assert _native.empty_cache() <= 2 * BYTES


SIZES = """
import random, torch
from rlhf_fast.ops import _native

def resident():
    return int(open("/proc/self/statm").read().split()[1]) / 256

like, before, most = torch.empty(0), resident(), 0
random.seed(0)
for _ in range(300):
    (x,) = _native.empties(like, torch.float32, random.randint(8 << 18, 32 << 18))
    x.fill_(1)
    most = max(most, resident() - before)
    del x
print(most)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_gradients_of_many_sizes_do_not_fill_memory_with_holes():
    command = [sys.executable, "-c", SIZES]
    assert float(subprocess.check_output(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)) < 150  # MiB


def test_a_small_one_does_not_sit_in_a_large_one_s_place():
    large = gradient()
    address = large.data_ptr()
    del large
    small = gradient(shape=(4, 1000))
    assert small.data_ptr() != address


def test_both_gradients_of_kl_and_the_weight_s_of_a_linear_loss():
    for _ in range(2):
        a, b = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))
        rlhf_fast.kl_divergence(a, b).sum().backward()
        exact = [x.detach().double().requires_grad_() for x in (a, b)]
        p, q = (x.log_softmax(-1) for x in exact)
        (p.exp() * (p - q)).sum().backward()
        for x, e in zip((a, b), exact, strict=True):
            torch.testing.assert_close(x.grad.double(), e.grad, rtol=1e-4, atol=1e-6)
    weights = []
    for _ in range(2):
        hidden, weight = torch.ones(8, 16), torch.linspace(-1, 1, 100 * 16).view(100, 16).requires_grad_()
        rlhf_fast.linear_cross_entropy(hidden, weight, torch.arange(8)).backward()
        weights.append(weight.grad.clone())
        address, weight.grad = weight.grad.data_ptr(), None
    assert torch.equal(*weights) and address


def test_it_is_an_ordinary_tensor():
    grad = gradient()
    file = io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    assert torch.equal(torch.load(file), grad)
    shared = grad.clone().share_memory_()
    assert torch.equal(shared, grad) and torch.equal(torch.from_numpy(grad.numpy()), grad)
    grad.add_(1).mul_(2)
    assert torch.equal(grad, (shared + 1) * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ours", [True, False])
def test_empties_are_what_torch_s_are(dtype, ours, monkeypatch):
    if not ours:  # a torch without DLPack's exchange table
        monkeypatch.setattr(_native, "_empties", lambda *given: None)
    like, turned = torch.zeros(3, 5, dtype=dtype), torch.zeros(4, 3).T
    given = (), 7, (2, 3, 4), like, turned, (turned, 2), None, 0, (2, 0), (0, 2), (1,) * 8, 500
    shapes = [(), (7,), (2, 3, 4), (3, 5), (3, 4), (3, 4, 2), None, (0,), (2, 0), (0, 2), (1,) * 8, (500,)]
    assert (_native._empties(like, _native.DTYPE_CODES[dtype], *given) is not None) == ours
    for x, shape in zip(_native.empties(like, dtype, *given), shapes, strict=True):
        if shape is None:
            assert x is None
            continue
        expected = torch.empty(shape, dtype=dtype)
        assert type(x) is torch.Tensor and x.dtype == dtype and x.is_cpu and x.is_leaf and not x.requires_grad
        assert x.shape == expected.shape and x.stride() == expected.stride() and x.is_contiguous()
        assert torch.equal(x.fill_(1), expected.fill_(1)) and x._version == 1
    with torch.inference_mode():
        assert _native.empties(like, dtype, like)[0].is_inference()


def test_empties_of_what_is_no_plain_cpu_tensor_are_torch_s():
    with FakeTensorMode() as mode:
        fake = torch.empty(2, 3)
        (x,) = _native.empties(fake, torch.float32, (fake, 2))
        assert isinstance(x, type(fake)) and x.fake_mode is mode and x.shape == (2, 3, 2)
    (x,) = _native.empties(torch.empty(2, device="meta"), torch.float32, 5)
    assert x.is_meta and x.shape == (5,)


def test_what_has_more_axes_than_ours_is_torch_s():
    some, deep = _native.empties(torch.empty(0), torch.float32, 3, torch.zeros((1,) * 9))
    assert some.shape == (3,) and deep.shape == (1,) * 9


@pytest.mark.parametrize("shape", [(2**31, 2**31), (2**30, 2**31), 2**62, (2**20, 2**30), 2**70, -1])
def test_what_no_memory_holds_is_torch_s_error(shape):
    """For sizes whose number of bytes overflows, torch's C function lets its C++ exception through."""
    with pytest.raises((RuntimeError, OverflowError, TypeError)) as ours:
        _native.empties(torch.empty(0), torch.float32, shape)
    with pytest.raises(ours.type) as theirs:
        torch.empty(shape)
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_an_op_on_what_no_memory_holds_raises_as_torch_does():
    wide = torch.zeros(1).expand(2**31, 2**31)
    with pytest.raises(RuntimeError, match="overflow"):
        rlhf_fast.kl_penalty(wide, wide, estimator="k3")


def test_threads_free_and_take_at_once():
    failures = []

    def work(seed):
        expected = gradient(seed).clone()
        for _ in range(50):
            if not torch.equal(gradient(seed), expected):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    gc.collect()
    assert _native.empty_cache() <= 8 * BYTES


def test_derivatives_and_the_library_op():
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 6])
    assert torch.autograd.gradcheck(lambda x: rlhf_fast.token_logprobs(x, labels), (logits,))
    compiled = torch.compile(lambda x: rlhf_fast.token_logprobs(x, labels).sum(), fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(logits), logits)
    (plain,) = torch.autograd.grad(torch.log_softmax(logits, -1)[range(3), labels].sum(), logits)
    torch.testing.assert_close(ours, plain)
