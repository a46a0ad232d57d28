"Network deconvolution against the paper's equations in plain NumPy float64, and its behaviour in odd circumstances."
import copy, json, math
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from spectranb.core import BadInput
from spectranb.deconv import ChannelDeconv, Delinear, FastDeconv, fold_deconv, inverse_sqrt, whitening_residual

torch.set_num_threads(1)


# --- the reference: loops and NumPy, from arXiv:1905.11926 (Algorithm 1), with the published block dealing ---
def np_inverse_sqrt(c, n_iter):
    norm = np.sqrt((c ** 2).sum()); y, z, eye = c / norm, np.eye(len(c)), np.eye(len(c))
    for _ in range(n_iter):
        t = 0.5 * (3 * eye - z @ y)
        y, z = y @ t, t @ z
    return z / np.sqrt(norm)

def np_patches(x, k, stride, padding, dilation):
    n, c, h, w = x.shape
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    span = dilation * (k - 1) + 1
    return np.array([x[i, :, r:r + span:dilation, s:s + span:dilation].ravel() for i in range(n)
                     for r in range(0, h + 2 * padding - span + 1, stride) for s in range(0, w + 2 * padding - span + 1, stride)])

def np_statistics(layer, x, every):
    k, s = layer.kernel_size[0], every * layer.stride[0]
    if k == 1: rows = x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1])[::s * s]
    else: rows = np_patches(x, k, s, layer.padding[0], layer.dilation[0])
    if layer.groups > 1: parts = np.split(rows, layer.groups, axis=1)
    else:
        n = x.shape[1] // layer.block
        parts = [np.concatenate([rows[:, j::n] for j in range(n)])]
    means, roots = [], []
    for part in parts:
        mean = part.mean(0)
        cov = (part - mean).T @ (part - mean) / len(part) + layer.eps * np.eye(part.shape[1])
        means.append(mean); roots.append(np_inverse_sqrt(cov, layer.n_iter))
    return np.array(means), np.array(roots)

def np_fast_deconv(layer, x, means, roots):
    k = layer.kernel_size[0]
    rows = np_patches(x, k, layer.stride[0], layer.padding[0], layer.dilation[0])
    weight, bias = layer.weight.detach().numpy().reshape(layer.out_channels, -1), layer.bias.detach().numpy()
    if layer.groups > 1:
        whitened = [(part - m) @ r for part, m, r in zip(np.split(rows, layer.groups, axis=1), means, roots)]
        out = np.concatenate([part @ w.T for part, w in zip(whitened, np.split(weight, layer.groups))], axis=1)
    else:
        n = x.shape[1] // layer.block
        out = sum((rows[:, j::n] - means[0]) @ roots[0] @ weight[:, j::n].T for j in range(n))
    size = [(length + 2 * layer.padding[0] - layer.dilation[0] * (k - 1) - 1) // layer.stride[0] + 1 for length in x.shape[2:]]
    return (out + bias).reshape(len(x), *size, -1).transpose(0, 3, 1, 2)


shapes = st.tuples(st.sampled_from([(5, 4, 1), (6, 8, 2), (8, 8, 8), (12, 6, 1)]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]),
                   st.sampled_from([0, 1]), st.sampled_from([1, 2]), st.sampled_from([4, 6, 64]), st.integers(9, 13), st.integers(1, 3))

@given(shapes, st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_fast_deconv_equals_the_equations(shape, seed):
    (c, out, groups), k, stride, padding, dilation, block, size, n = shape
    if k == 1: padding = 0
    torch.manual_seed(seed)
    layer = FastDeconv(c, out, k, stride, padding, dilation, groups, block=block, sampling_stride=2).double()
    before = [b.clone().numpy() for b in (layer.running_mean, layer.running_deconv)]
    x = torch.randn(n, c, size, size + 1, dtype=torch.float64) + 0.5
    means, roots = np_statistics(layer, x.numpy(), 2)
    y = layer(x)
    np.testing.assert_allclose(y.detach().numpy(), np_fast_deconv(layer, x.numpy(), means, roots), atol=1e-9 * y.abs().max().item())
    np.testing.assert_allclose(layer.running_mean, 0.9 * before[0] + 0.1 * means.ravel(), atol=1e-12)
    np.testing.assert_allclose(layer.running_deconv, 0.9 * before[1] + 0.1 * roots.reshape(before[1].shape), rtol=1e-9, atol=1e-9)
    layer.eval()
    running = layer.running_mean.numpy().reshape(max(groups, 1), -1), layer.running_deconv.numpy().reshape(roots.shape)
    np.testing.assert_allclose(layer(x).detach().numpy(), np_fast_deconv(layer, x.numpy(), *running), atol=1e-9)
    with torch.no_grad(): torch.testing.assert_close(fold_deconv(layer)(x), layer(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_flow_through_the_statistics(groups):
    layer = FastDeconv(2, 2, 2, groups=groups, sampling_stride=1, n_iter=4).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    def f(x, w, b): return torch.func.functional_call(layer, dict(weight=w, bias=b), x)
    assert torch.autograd.gradcheck(f, (x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()), check_batched_grad=False)


def test_float32_agrees_with_float64_at_condition_1e4():
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(45, 45)))
    c = (q * np.geomspace(1e-4, 1, 45)) @ q.T
    reference = np_inverse_sqrt(c, 5)
    got = inverse_sqrt(torch.tensor(c, dtype=torch.float32), 5).numpy()
    assert np.abs(got - reference).max() < 1e-5 * np.abs(reference).max()


@pytest.mark.parametrize("d, residual", [(45, 0.78), (288, 0.90), (576, 0.93)])    # shared oracle, condition number 100
def test_published_iteration_count(d, residual):
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))
    c = torch.tensor((q * np.geomspace(1e-2, 1, d)) @ q.T, dtype=torch.float32)
    assert abs(whitening_residual(c, inverse_sqrt(c, 5)) - residual) < 0.01
    assert whitening_residual(c, inverse_sqrt(c, 15)) < 1e-3


def test_batched_inverse_sqrt():
    x = torch.randn(3, 20, 6, dtype=torch.float64)
    c = x.mT @ x / 20
    each = torch.stack([inverse_sqrt(m, 6) for m in c])
    torch.testing.assert_close(inverse_sqrt(c, 6), each)


def test_channel_deconv_equals_the_equations():
    rng = np.random.default_rng(3)
    for c, block, size in ((8, 4, 6), (7, 3, 6), (6, 6, 2)):
        layer = ChannelDeconv(block, n_iter=5).double()
        mean = None
        for step_no in range(2):
            x = rng.normal(size=(4, c, size, size)) + 1
            kept, step = c // block * block, 9 if size >= 3 else 1
            rows = x[:, :kept].transpose(1, 0, 2, 3).reshape(block, -1)
            sample = rows[:, ::step]
            m, d = sample.mean(1, keepdims=True), np_inverse_sqrt(sample @ sample.T / sample.shape[1] + 1e-2 * np.eye(block), 5)
            expected = [(d @ (rows - m)).reshape(kept, 4, size, size).transpose(1, 0, 2, 3)]
            if kept < c:
                rest = x[:, kept:].reshape(4, -1)[:, ::step]
                expected.append((x[:, kept:] - rest.mean()) / np.sqrt(rest.var(ddof=1) + 1e-2))
            np.testing.assert_allclose(layer(torch.tensor(x)).numpy(), np.concatenate(expected, 1), atol=1e-10)
            mean = m if step_no == 0 else 0.9 * mean + 0.1 * m
            np.testing.assert_allclose(layer.running_mean1.numpy(), mean, atol=1e-12)
        assert layer.num_batches_tracked == 2
        x = torch.tensor(x)
        out = layer.eval()(x)
        rows = x[:, :kept].transpose(0, 1).reshape(block, -1)
        torch.testing.assert_close(out[:, :kept], (layer.running_deconv @ (rows - layer.running_mean1)).reshape(kept, 4, size, size).transpose(0, 1))
    assert ChannelDeconv(3)(torch.randn(10, 7)).shape == (10, 7)


@pytest.mark.parametrize("block", [512, 8, 12])
def test_delinear_equals_the_equations(block):
    torch.manual_seed(0)
    layer = Delinear(24, 5, block=block).double()
    x = torch.randn(50, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    b = math.gcd(min(block, 24), 24)
    rows = x.numpy().reshape(-1, b)
    mean = rows.mean(0)
    root = np_inverse_sqrt((rows - mean).T @ (rows - mean) / len(rows) + 1e-5 * np.eye(b), 5)
    expected = ((rows - mean) @ root).reshape(50, 24) @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(layer.running_mean.numpy(), 0.1 * mean, atol=1e-12)
    torch.testing.assert_close(fold_deconv(layer)(x), layer.eval()(x), atol=1e-10, rtol=1e-10)


def test_freeze_follows_the_published_counter():
    layer, x = FastDeconv(2, 2, 3, freeze=True, freeze_iter=2), torch.randn(4, 2, 9, 9)
    changed = []
    for _ in range(25):
        before = layer.running_mean.clone(); layer(x + torch.rand(())); changed.append(not torch.equal(before, layer.running_mean))
    assert changed == [i % 20 <= 2 for i in range(25)]           # batches 0…2 update, up to batch 20, where the count begins again
    assert "counter" not in layer.state_dict()


@pytest.mark.parametrize("make", [lambda: FastDeconv(8, 4, 3, padding=1), lambda: FastDeconv(8, 4, 3, groups=4), lambda: FastDeconv(8, 4, 1),
                                  lambda: FastDeconv(8, 4, (3, 1), padding=(1, 0), bias=False), lambda: ChannelDeconv(4)])
def test_channels_last_and_copies(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(3, 8, 11, 12, requires_grad=True)
    assert torch.isfinite(copy.deepcopy(layer).eval()(x)).all()                          # before any training step
    y = layer(x); y.sum().backward()
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x.to(memory_format=torch.channels_last)), layer(x), atol=1e-5, rtol=1e-4)
    assert list(twin.state_dict()) == list(layer.state_dict())


def test_statistics_stay_float32_under_autocast():
    torch.manual_seed(0)
    layer = FastDeconv(5, 8, 3, padding=1, n_iter=15)
    low, x = copy.deepcopy(layer), torch.randn(8, 5, 24, 24) * torch.logspace(-1.5, 0, 5)[:, None, None]
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16): z = low(x)
    assert z.dtype == torch.bfloat16 and (z.float() - y).std() < 0.01 * y.std()
    torch.testing.assert_close(low.running_deconv, layer.running_deconv)
    half = copy.deepcopy(layer).bfloat16()                                                # parameters in half precision too
    assert half(x.bfloat16()).isfinite().all() and half.eval()(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("make", [lambda: FastDeconv(5, 4, 3, padding=1), lambda: FastDeconv(8, 4, 3, groups=4), lambda: Delinear(12, 3), lambda: ChannelDeconv(4)])
def test_traced_without_graph_breaks(make):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(6, 12) if isinstance(layer, Delinear) else torch.randn(2, getattr(layer, "in_channels", 8), 9, 9)
    traced, plain = copy.deepcopy(layer), copy.deepcopy(layer)
    for mode in (True, False):
        y = torch.compile(traced.train(mode), fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(y, plain.train(mode)(x))
    torch.testing.assert_close(traced.state_dict(), plain.state_dict())


def test_batch_of_one_and_constant_image():
    layer = FastDeconv(3, 4, 3, padding=1, n_iter=15)
    assert layer(torch.ones(1, 3, 7, 5)).isfinite().all()


@pytest.mark.parametrize("x, words", [(torch.zeros(2, 4, 9, 9), "4 channels, made for 5"), (torch.zeros(5, 9, 9), "input of shape"),
    (torch.zeros(1, 5, 2, 9), "2 × 9 pixels is smaller"), (torch.zeros(1, 5, 9, 9, dtype=torch.int64), "torch.int64 image"),
    (torch.full((1, 5, 9, 9), torch.nan), "NaN or Inf"), (torch.full((1, 5, 9, 9), torch.inf), "NaN or Inf")])
def test_bad_images_are_named(x, words):
    layer = FastDeconv(5, 2, 3)
    with pytest.raises(BadInput, match=words): layer(x)
    assert torch.equal(layer.running_deconv, torch.eye(45))


def test_bad_arguments_are_named():
    with pytest.raises(BadInput, match="block=0"): FastDeconv(5, 2, 3, block=0)
    with pytest.raises(BadInput, match="7 features, made for 8"): Delinear(8, 2)(torch.zeros(3, 7))
    with pytest.raises(BadInput, match="block=4"): ChannelDeconv(4)(torch.zeros(2, 3, 8, 8))
    assert FastDeconv(48, 8, 3).block == 48 and FastDeconv(96, 8, 3).block == 32 and FastDeconv(128, 8, 3).block == 64


def test_fold_leaves_the_model_alone_and_folds_batchnorm():
    torch.manual_seed(0)
    net = nn.Sequential(FastDeconv(5, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()), nn.Flatten(), nn.Linear(8 * 25, 3))
    x = torch.randn(6, 5, 9, 9)
    for _ in range(3): net(x)
    keys, training = list(net.state_dict()), net.training
    folded = fold_deconv(net)
    assert list(net.state_dict()) == keys and net.training == training
    assert not any("running" in k for k in folded.state_dict())
    y = net.eval()(x)
    assert (folded(x) - y).abs().max() < 1e-5 * y.abs().max()


def test_state_dict_keys_of_the_published_layers():
    published_keys = json.loads(Path(__file__).with_name("state_dict_keys.json").read_text())
    made = {"FastDeconv_5_32_s2": FastDeconv(5, 32, 3, stride=2, padding=1), "FastDeconv_g4": FastDeconv(32, 32, 3, padding=1, groups=4),
            "ChannelDeconv_16": ChannelDeconv(16), "Delinear": Delinear(128, 32)}
    for name, layer in made.items(): assert {k: str(tuple(v.shape)) for k, v in layer.state_dict().items()} == published_keys[name]
