"""Our forward of the trunk against transformers', and the parts of a layer against their formulas in float64."""

from functools import partial

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from test_generation import ARCHITECTURES, BY_GENERATE, attend_half_as_sharply, with_opinions
from torch.nn import functional as F

from rlhf_fast.models import add_lora, hidden_states
from rlhf_fast.ops import _layer
from rlhf_fast.trunk import hidden_states_at, runs_here

OURS = [
    "llama", "llama3 rope", "mistral", "qwen2", "qwen3", "gpt2", "window", "window in a layer", "ministral", "smollm3",
    "phi3", "phi3 in part", "granite", "gemma", "gemma2", "gemma3", "olmo2", "olmo3", "llama with lora",
    "gpt2 with lora", "gemma3 with lora", "phi3 with lora",
]  # fmt: skip
OURS = [name for name in OURS if name.removesuffix(" with lora") not in BY_GENERATE]  # gemma3 and olmo3 need version 5
POSITIONS = torch.tensor([0, 5, 6, 8, 11, 19, 26])  # of 3 rows of 9 tokens


def outputs_and_gradients(model, how):
    ids = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    hidden = how(model, ids)
    hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)))
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def through_transformers(model, ids):
    return hidden_states(model, ids).flatten(0, 1)[POSITIONS]


@pytest.mark.parametrize("name", OURS)
def test_it_is_the_forward_of_transformers_and_so_is_its_gradient(name):
    if name.endswith("lora"):
        pytest.importorskip("peft")
        model = add_lora(with_opinions(name.removesuffix(" with lora")), r=2, alpha=4.0)
        for module_name, p in model.named_parameters():
            if "lora_B" in module_name:
                torch.nn.init.normal_(p)
    else:
        model = with_opinions(name)
    assert runs_here(model)
    ours, our_gradients = outputs_and_gradients(model, lambda model, ids: hidden_states_at(model, ids, POSITIONS))
    theirs, their_gradients = outputs_and_gradients(model, through_transformers)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for parameter, gradient in their_gradients.items():
        if gradient is None:  # the lm_head has none in either
            assert our_gradients[parameter] is None
            continue
        scale = float(gradient.abs().max()) or 1.0
        assert float((our_gradients[parameter] - gradient).abs().max()) < 2e-4 * scale, parameter


@pytest.mark.parametrize("name", [*ARCHITECTURES, "llama with another scale and epsilon"])
@torch.no_grad()
def test_hidden_states_are_those_of_transformers_whoever_runs_the_model(name):
    model = with_opinions(name.removesuffix(" with another scale and epsilon"))
    if name.endswith("epsilon"):
        for module in model.modules():
            vars(module).update(
                {k: x for k, x in {"scaling": 1.0, "variance_epsilon": 0.1}.items() if hasattr(module, k)}
            )
    if model.base_model is model:
        pytest.skip("has no trunk of its own, as gemma3 in transformers 4")
    ids = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = through_transformers(model, ids)
    torch.testing.assert_close(hidden_states_at(model, ids, POSITIONS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gpt2", "phi3", "gemma", "gemma2", "olmo2", "llama with lora"]
)
def test_in_bfloat16_it_is_no_less_exact_than_transformers(name):
    model = with_opinions(name.removesuffix(" with lora"))
    if name.endswith("lora"):
        pytest.importorskip("peft")
        model = add_lora(model, r=2, alpha=4.0)
    exact = outputs_and_gradients(model, through_transformers)
    errors = []
    for how in (lambda model, ids: hidden_states_at(model, ids, POSITIONS), through_transformers):
        with torch.autocast("cpu", torch.bfloat16):
            assert runs_here(model)
            hidden, gradients = outputs_and_gradients(model, how)
        assert hidden.dtype == torch.float32
        pairs = [(hidden, exact[0]), *((gradients[name], g) for name, g in exact[1].items() if g is not None)]
        errors.append(torch.stack([(x - y).norm() / y.norm() for x, y in pairs if y.any()]))
    ours, theirs = errors
    assert 1e-4 < ours[0] < 1.2 * theirs[0] and ours.mean() < 1.2 * theirs.mean()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_window_that_the_architecture_ignores_is_ignored(name):
    model = with_opinions(name)
    model.config.sliding_window, model.config.layer_types = 3, ["sliding_attention"] * 2
    ids = torch.arange(27).view(3, 9)
    assert runs_here(model)
    found = hidden_states_at(model, ids, POSITIONS)
    torch.testing.assert_close(found, through_transformers(model, ids), rtol=1e-4, atol=1e-4)


def test_products_in_bfloat16_meet_few_numbers_of_rows():
    """For each of them oneDNN would compile code and keep it."""
    sizes = {rows + _layer.spare_rows(rows) for rows in range(1024, 2049)}
    assert len(sizes) == 9 and all(0 <= _layer.spare_rows(rows) <= max(15, rows / 8) for rows in range(5000))
    model, seen = tiny_model(tiny_tokenizer()), set()
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, given: seen.add(len(given[0])))
    with torch.autocast("cpu", torch.bfloat16):
        for width in range(65, 129):
            ids = torch.arange(2 * width).view(2, width)
            assert hidden_states_at(model, ids, torch.arange(width)).shape == (width, 32)
    assert len(seen) == 8
    assert hidden_states_at(model, ids, torch.arange(0)).shape == (0, 32)


def test_what_follows_a_token_does_not_change_its_bits():
    model = tiny_model(tiny_tokenizer())
    ids = torch.arange(10, 28).view(2, 9)
    changed = ids.clone()
    changed[:, 6:] = 3
    before = torch.tensor([0, 5, 9, 14])
    assert torch.equal(hidden_states_at(model, ids, before), hidden_states_at(model, changed, before))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.gradient_checkpointing_enable(),
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model.base_model.layers[0].self_attn, "attention_dropout", 0.1),
        lambda model: setattr(model.config, "num_hidden_layers", 1),
        attend_half_as_sharply,
        lambda model: model.base_model.layers[1].register_forward_hook(lambda module, given, x: 2 * x),
        lambda model: model.base_model.norm.register_full_backward_hook(lambda module, before, after: None),
    ],
    ids=[
        "checkpointing",
        "bfloat16",
        "dropout",
        "fewer layers",
        "another attention",
        "hook",
        "backward hook",
    ],
)
def test_what_it_does_not_do_goes_through_transformers(change):
    model = tiny_model(tiny_tokenizer()).train()
    assert runs_here(model)
    change(model)
    assert not runs_here(model)
    assert hidden_states_at(model, torch.arange(18).view(2, 9), torch.tensor([3, 4])).shape == (2, 32)


@pytest.mark.parametrize("activation", [torch.nn.GELU(), torch.nn.ReLU()])
def test_another_activation_is_that_of_the_module(activation):
    model = with_opinions("llama")
    model.base_model.layers[1].mlp.act_fn = activation
    assert runs_here(model)
    ids = torch.arange(27).view(3, 9)
    found = hidden_states_at(model, ids, POSITIONS)
    torch.testing.assert_close(found, through_transformers(model, ids), rtol=1e-4, atol=1e-4)


def test_dropout_of_attention_is_in_the_way_only_in_training():
    gpt2, phi3 = with_opinions("gpt2"), with_opinions("phi3")
    phi3.config.resid_pdrop = 0.1
    for model in (tiny_model(tiny_tokenizer(), attention_dropout=0.1), gpt2, phi3):
        assert runs_here(model.eval()) and not runs_here(model.train())
    for layer in gpt2.base_model.h:
        layer.attn.attn_dropout.p = 0.0
    assert runs_here(gpt2)


def test_gpt2_drops_what_transformers_would():
    model = with_opinions("gpt2").train()
    ids = torch.arange(18).view(2, 9)
    for parts in (["drop"], ["h.0.attn.resid_dropout"], ["h.1.mlp.dropout"], []):
        for name, module in model.base_model.named_modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 1.0 if name in parts else 0.0
        assert runs_here(model)
        expected = hidden_states(model, ids).flatten(0, 1)[3:8]
        torch.testing.assert_close(hidden_states_at(model, ids, torch.arange(3, 8)), expected, rtol=1e-4, atol=1e-4)


gelu = partial(F.gelu, approximate="tanh")


def rms_norm(x, w):
    return w * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotary(x, cos, sin):
    half = x.shape[-1] // 2
    tables = [t.repeat(len(x) // len(t), 1)[:, None] for t in (cos, sin)]
    return x * tables[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * tables[1]


ANGLES = torch.rand(7, 5).repeat(1, 2)
PARTS = {
    "rms_norm": (lambda x, w: _layer.rms_norm(x, w, 1e-6), rms_norm, [(300, 37), (37,)]),
    "rotary": (_layer.rotary, rotary, [(21, 3, 10)]),
    "silu": (partial(_layer.glu, activation="silu"), lambda gate, up: F.silu(gate) * up, [(300, 37), (300, 37)]),
    "gelu": (partial(_layer.glu, activation="gelu"), lambda gate, up: gelu(gate) * up, [(300, 37), (300, 37)]),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_and_its_gradient_are_their_formula(name, isa):
    ours, formula, shapes = PARTS[name]
    generator = torch.Generator().manual_seed(3)
    inputs = [(4 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    tables = [ANGLES.cos(), ANGLES.sin()] if name == "rotary" else []
    y, z = ours(*inputs, *tables), formula(*exact, *(t.double() for t in tables))
    with torch.no_grad():  # as in generation
        assert torch.equal(ours(*inputs, *tables), y)
    grad = torch.randn(y.shape, generator=generator)
    y.backward(grad)
    z.backward(grad.double())
    for got, expected in [(y, z), *((x.grad, e.grad) for x, e in zip(inputs, exact, strict=True))]:
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows, depth, width", [(1, 1, 1), (5, 37, 50), (64, 33, 32), (100, 64, 129)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_bfloat16_is_that_of_autocast(rows, depth, width, bias, isa):
    generator = torch.Generator().manual_seed(6)
    x, weight = torch.randn(rows, depth, generator=generator), torch.randn(width, depth, generator=generator)
    leaves = [x, weight, torch.randn(width, generator=generator)] if bias else [x, weight]
    grad, results = torch.randn(rows, width, generator=generator).bfloat16(), []
    for linear in (_layer.bf16_linear, F.linear):
        inputs = [t.clone().requires_grad_() for t in leaves]
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(*inputs) if bias else linear(*inputs, None)
        assert y.dtype == torch.bfloat16
        results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("columns", [3, 37, 1200])
def test_in_bfloat16_a_part_is_its_float32_rounded(columns, isa):
    generator = torch.Generator().manual_seed(5)
    x, gate, up, grad = (4 * torch.randn(140, columns, generator=generator) for _ in range(4))
    gate, up, grad = gate.bfloat16(), up.bfloat16(), grad.bfloat16()
    gate[0, 0], up[0, 1], weight = torch.inf, torch.nan, torch.randn(columns, generator=generator)
    for part, inputs in (
        (lambda x, w, dtype: _layer.rms_norm(x, w, 1e-6, dtype), (x, weight)),
        (lambda gate, up, dtype: _layer.glu(gate.to(dtype), up.to(dtype), "silu"), (gate, up)),
        (lambda gate, up, dtype: _layer.glu(gate.to(dtype), up.to(dtype), "gelu"), (gate, up)),
    ):
        y, grads = [], []
        for dtype in (torch.bfloat16, torch.float32):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y.append(part(*leaves, dtype))
            assert y[-1].dtype == dtype
            grads.append(torch.autograd.grad(y[-1], leaves, grad.to(dtype)))
        for ours, exact in [(y[0], y[1]), *zip(*grads, strict=True)]:
            last_bit = 2**-8 if ours.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(ours, exact.to(ours.dtype), rtol=last_bit, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dim, filled", [(10, 37), (64, 33), (72, 150), (256, 20), (128, 1), (5, 3)])
def test_attention_of_one_query_is_its_formula(dim, filled, padded, softcap, isa):
    rows, heads, key_heads, capacity = 3, 6, 2, filled + 4
    generator = torch.Generator().manual_seed(4)
    q = 2 * torch.randn(rows, heads + 1, dim, generator=generator)[:, :heads]  # strided rows
    keys, values = torch.randn(2, rows, key_heads, capacity, dim, generator=generator)
    keys[:, :, filled:] = values[:, :, filled:] = torch.nan  # not filled yet
    bias = torch.zeros(rows, capacity)
    bias[1, : filled // 2] = -torch.inf
    y = _layer.attend(q, keys, values, bias if padded else None, None, 0, filled, 0.3, softcap)
    k, v = (x.double().repeat_interleave(heads // key_heads, 1)[:, :, :filled] for x in (keys, values))
    scores = 0.3 * torch.einsum("bhd,bhtd->bht", q.double(), k)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    if padded:
        scores = scores + bias[:, None, :filled]
    torch.testing.assert_close(y.double(), torch.einsum("bht,bhtd->bhd", scores.softmax(-1), v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("filled", [20, 21, 39, 300])
@pytest.mark.parametrize("dim, softcap", [(10, None), (64, None), (64, 1.5)])
def test_rows_that_share_columns_get_the_bits_of_rows_that_have_copies(dim, softcap, filled, isa):
    """The columns in one of the rows, wherever it lies; the others hold NaN in their place, which nobody reads."""
    shared, rows, heads, key_heads, capacity = 20, 23, 6, 2, filled + 3
    generator = torch.Generator().manual_seed(9)
    holders = torch.tensor([0] * 11 + [11, 11, 13, 0, 13, 16, 16, 16, 13, 13, 21, 22])
    q = torch.randn(rows, heads, dim, generator=generator)
    keys, values = torch.randn(2, rows, key_heads, capacity, dim, generator=generator)
    bias = torch.zeros(rows, capacity)
    bias[holders == 13, :7] = -torch.inf
    for x in (keys, values):
        x[:, :, :shared] = x[holders, :, :shared]
    copies = _layer.attend(q, keys, values, bias, None, 0, filled, 0.3, softcap)
    back = torch.arange(rows) - holders
    for x in (keys, values):
        x[:, :, filled:] = torch.nan
        x[back > 0, :, :shared] = torch.nan
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(_layer.attend(q, keys, values, bias, back, shared, filled, 0.3, softcap), copies)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows, depth, width", [(1, 1, 1), (5, 37, 50), (16, 64, 48), (33, 130, 97), (70, 20, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_few_rows_is_a_product(rows, depth, width, dtype, isa):
    """With a weight in bfloat16, x is rounded to bfloat16 too; CPUs with bfloat16 instructions use those."""
    generator = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in [(rows, depth), (width, depth), (width,)])
    weight = weight.to(dtype)
    for given in (bias, None):
        y = _layer.few_rows_linear(x, weight, given)
        exact = F.linear(x.to(dtype).double(), weight.double(), None if given is None else given.double())
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            assert torch.equal(_layer.few_rows_linear(x, weight, given), y)
        finally:
            torch.set_num_threads(before)
        alone = torch.cat([_layer.few_rows_linear(row[None], weight, given) for row in x])
        assert torch.equal(alone, y)  # independent of the other rows


@pytest.mark.parametrize(
    "which, dtype", [(0, torch.bfloat16), (1, torch.float16), (1, torch.float64), (2, torch.bfloat16)]
)
def test_another_dtype_is_refused_where_it_would_be_read_as_float32(which, dtype):
    tensors = [torch.ones(4, 8), torch.ones(3, 8), torch.ones(3)]
    tensors[which] = tensors[which].to(dtype)
    with pytest.raises(TypeError, match="needs float32"):
        _layer.few_rows_linear(*tensors)


def test_the_matrices_of_a_layer_have_one_dtype():
    x, matrix, vector = torch.ones(4, 8), torch.ones(8, 8), torch.ones(8)
    weights = [vector, matrix, matrix, matrix, *[None] * 5, matrix, None, vector, matrix, matrix, matrix]
    buffers = torch.zeros(2, 4, 1, 3, 8)
    for i in (1, 9, 14):
        mixed = (*weights[:i], matrix.bfloat16(), *weights[i + 1 :])
        with pytest.raises(TypeError, match="in one dtype"):
            _layer.decode_layer(mixed, x, x, x, *buffers, None, None, 0, 1, 1.0, 1e-5)
    with pytest.raises(TypeError, match="where None is"):
        _layer.decode_layer((*weights[:14], None), x, x, x, *buffers, None, None, 0, 1, 1.0, 1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_is_a_whole_layer(qk_norm, bias, dtype, isa):
    rows, width, heads, kept, dim, intermediate, capacity, filled = 5, 24, 4, 2, 10, 37, 9, 7
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    norm, mlp_norm = 1 + draw(width), 1 + draw(width)
    q, k, v, output = draw(heads * dim, width), *draw(2, kept * dim, width), draw(width, heads * dim)
    biases = [draw(n) for n in (heads * dim, kept * dim, kept * dim, width)] if bias else [None] * 4
    norms = [1 + draw(dim), 1 + draw(dim)] if qk_norm else [None, None]
    gate, up, down = *draw(2, intermediate, width), draw(width, intermediate)
    q, k, v, output, gate, up, down = (matrix.to(dtype) for matrix in (q, k, v, output, gate, up, down))
    x, keys, values = 3 * draw(rows, width), *draw(2, rows, kept, capacity, dim)
    cos, sin = ANGLES.cos()[:rows].contiguous(), ANGLES.sin()[:rows].contiguous()
    keys[:, :, filled - 1 :] = values[:, :, filled - 1 :] = torch.nan
    mask = torch.zeros(rows, capacity)
    mask[2, :3] = -torch.inf

    def to(t):
        return None if t is None else t.double()

    def rms(t, w):
        return t if w is None else F.rms_norm(t, w.shape, to(w), 1e-5)

    h, (old_keys, old_values) = rms(to(x), norm), (to(t)[:, :, : filled - 1] for t in (keys, values))

    def heads_of(w, b):
        return F.linear(h, to(w), to(b)).view(rows, -1, dim)

    def turn(t):
        return rotary(t, to(cos), to(sin))

    new_key, new_value = turn(rms(heads_of(k, biases[1]), norms[1])), heads_of(v, biases[2])
    all_keys = torch.cat([old_keys, new_key[:, :, None]], 2).repeat_interleave(heads // kept, 1)
    all_values = torch.cat([old_values, new_value[:, :, None]], 2).repeat_interleave(heads // kept, 1)
    scores = 0.3 * torch.einsum("bhd,bhtd->bht", turn(rms(heads_of(q, biases[0]), norms[0])), all_keys)
    attended = torch.einsum("bht,bhtd->bhd", (scores + to(mask)[:, None, :filled]).softmax(-1), all_values)
    middle = to(x) + F.linear(attended.reshape(rows, -1), to(output), to(biases[3]))
    h = rms(middle, mlp_norm)
    expected = middle + (F.silu(h @ to(gate).T) * (h @ to(up).T)) @ to(down).T

    weights = (norm, q, k, v, *biases[:3], *norms, output, biases[3], mlp_norm, gate, up, down)
    _layer.decode_layer(weights, x, cos, sin, keys, values, mask, None, 0, filled, 0.3, 1e-5)
    for got, exact in ((x, expected), (keys[:, :, filled - 1], new_key), (values[:, :, filled - 1], new_value)):
        # With weights in bfloat16 the other factor is rounded too, to 8 bits.
        error = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(got.double(), exact, **error)
    assert keys[:, :, filled:].isnan().all()  # not touched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width, dim, intermediate", [(40, 96, 24, 300), (40, 192, 48, 900), (9, 384, 96, 1100)])
def test_a_row_goes_through_a_layer_alone(rows, width, dim, intermediate, dtype, isa):
    """With any number of threads (they share the rows or, if these are few, the outputs), and with any other rows; also
    where rows read their first columns in another row."""
    heads, capacity = 4, 60
    generator = torch.Generator().manual_seed(8)

    def draw(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    q, k, v, output = draw(4, heads * dim, width)
    mlp = (*draw(2, intermediate, width), draw(width, intermediate))
    q, k, v, output, *mlp = (matrix.to(dtype) for matrix in (q, k, v, output, *mlp))
    weights = (1 + draw(width), q, k, v, None, None, None, None, None, output, None, 1 + draw(width), *mlp)
    x, buffers, angles = draw(rows, width), draw(2, rows, heads, capacity, dim), draw(rows, dim)
    shared, back = 25, torch.arange(rows) % 6  # groups of six, whose first row has the columns
    buffers[..., :shared, :] = buffers[:, torch.arange(rows) - back, :, :shared]

    def through(take, back=None):
        y, (keys, values) = x[take].clone(), buffers[:, take].clone()
        tables = angles[take].cos(), angles[take].sin()
        if back is not None:
            keys[back > 0, :, :shared] = values[back > 0, :, :shared] = torch.nan
        _layer.decode_layer(weights, y, *tables, keys, values, None, back, shared, capacity, 0.2, 1e-5)
        return (y, keys, values) if back is None else (y, keys[:, :, shared:], values[:, :, shared:])

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(through(slice(None)))
            y, *own = through(slice(None), back)
            assert torch.equal(y, results[0][0])
            assert all(torch.equal(a, b[:, :, shared:]) for a, b in zip(own, results[0][1:], strict=True))
    finally:
        torch.set_num_threads(before)
    for other in [*results[1:], [torch.cat(parts) for parts in zip(*(through([i]) for i in range(rows)), strict=True)]]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 1000])
def test_a_sampled_token_is_where_the_cumulative_probability_passes_the_uniform(vocab, isa):
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(500, vocab, generator=generator)
    logits[:, vocab // 2 + 1 :: 3] = -torch.inf
    uniforms = torch.rand(500, dtype=torch.float64, generator=generator)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    tokens, logprobs = _layer.sample_tokens(logits, uniforms, 0.7)
    exact = (logits.double() / 0.7).log_softmax(-1)
    cdf = exact.exp().cumsum(-1)
    assert (cdf.gather(1, tokens[:, None])[:, 0] > uniforms - 1e-6).all()
    below = torch.cat([torch.zeros(500, 1, dtype=torch.float64), cdf], 1).gather(1, tokens[:, None])[:, 0]
    assert (below <= uniforms + 1e-6).all()
    torch.testing.assert_close(logprobs.double(), exact.gather(1, tokens[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    assert logprobs.isfinite().all()  # so no token of probability 0


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gates_at_their_ends(activation, isa):
    gate = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1e30]], requires_grad=True)
    y = _layer.glu(gate, torch.ones_like(gate), activation)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([[0.0, 0, 0, 100, 1e30]]), rtol=0, atol=1e-30)
    torch.testing.assert_close(gate.grad, torch.tensor([[0.0, 0, 0.5, 1, 1]]), rtol=0, atol=1e-30)


def test_the_number_of_threads_changes_no_bit():
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.ones(64, requires_grad=True)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([*torch.autograd.grad(_layer.rms_norm(x, weight, 1e-6).square().sum(), [x, weight])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
