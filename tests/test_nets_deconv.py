"Network deconvolution against the paper's equations in plain NumPy float64, and its behaviour in odd circumstances."
import copy, gc, json, math, time
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from scipy.linalg import sqrtm
from torch.nn import functional as F

from spectranb.core import BadInput
from spectranb.deconv import ChannelDeconv, Delinear, FastDeconv, find_bad_pixels, fold_deconv, inverse_sqrt, whitening_report, whitening_residual
from spectranb.fold import export_onnx, export_program

torch.set_num_threads(1)


# --- the reference: loops and NumPy, from arXiv:1905.11926 (Algorithm 1), with the published block dealing. Every line of it
# --- is an analytic function, so that f(x + ih)/h gives derivatives to all digits (complex step; Squire & Trapp 1998).
def np_inverse_sqrt(c, n_iter):
    norm = np.sqrt((c ** 2).sum()); y, z, eye = c / norm, np.eye(len(c)), np.eye(len(c))
    for _ in range(n_iter):
        t = 0.5 * (3 * eye - z @ y)
        y, z = y @ t, t @ z
    return z / np.sqrt(norm)

def np_patches(x, layer, stride):
    (kh, kw), (dh, dw), (ph, pw), (n, c, h, w) = layer.kernel_size, layer.dilation, layer.padding, x.shape
    x = np.pad(x, [(0, 0), (0, 0), (ph, ph), (pw, pw)])
    spanh, spanw = dh * (kh - 1) + 1, dw * (kw - 1) + 1
    return np.array([x[i, :, r:r + spanh:dh, s:s + spanw:dw].ravel() for i in range(n)
                     for r in range(0, h + 2 * ph - spanh + 1, stride[0]) for s in range(0, w + 2 * pw - spanw + 1, stride[1])])

def np_statistics(layer, x, every):
    step = [every * s for s in layer.stride]
    if layer.kernel_size == (1, 1): rows = x.transpose(0, 2, 3, 1).reshape(-1, x.shape[1])[::step[0] * step[1]]
    else: rows = np_patches(x, layer, step)
    if layer.groups > 1: parts = np.split(rows, layer.groups, axis=1)
    else:
        n = x.shape[1] // layer.block
        parts = [np.concatenate([rows[:, j::n] for j in range(n)])]
    means, covs = [part.sum(0) / len(part) for part in parts], []
    for part, mean in zip(parts, means): covs.append((part - mean).T @ (part - mean) / len(part))
    roots = [np_inverse_sqrt(cov + layer.eps * np.eye(len(cov)), layer.n_iter) for cov in covs]
    return np.array(means), np.array(covs), np.array(roots)

def np_fast_deconv(layer, x, means, roots, weight=None, bias=None):
    rows = np_patches(x, layer, layer.stride)
    weight = (layer.weight.detach().numpy() if weight is None else weight).reshape(layer.out_channels, -1)
    if bias is None: bias = layer.bias.detach().numpy()
    if layer.groups > 1:
        whitened = [(part - m) @ r for part, m, r in zip(np.split(rows, layer.groups, axis=1), means, roots)]
        out = np.concatenate([part @ w.T for part, w in zip(whitened, np.split(weight, layer.groups))], axis=1)
    else:
        n = x.shape[1] // layer.block
        out = sum((rows[:, j::n] - means[0]) @ roots[0] @ weight[:, j::n].T for j in range(n))
    size = [(x.shape[2 + a] + 2 * layer.padding[a] - layer.dilation[a] * (layer.kernel_size[a] - 1) - 1) // layer.stride[a] + 1 for a in (0, 1)]
    return (out + bias).reshape(len(x), *size, -1).transpose(0, 3, 1, 2)

def check_gradients(f, variables, gradients, rtol):
    "`gradients` of the analytic f(*variables) against complex steps in two random directions."
    rng = np.random.default_rng(0)
    for _ in range(2):
        directions = [rng.normal(size=v.shape) for v in variables]
        expected = f(*[v + 1e-30j * d for v, d in zip(variables, directions)]).imag / 1e-30
        terms = [float((g.numpy() * d).sum()) for g, d in zip(gradients, directions)]
        size = sum(float(np.sqrt((g.numpy() ** 2).sum() * (d ** 2).mean())) for g, d in zip(gradients, directions))
        assert abs(sum(terms) - expected) < rtol * (size + abs(expected))


@st.composite
def layers(draw):
    "A FastDeconv in float64 and a batch for it."
    c, out, groups = draw(st.sampled_from([(1, 2, 1), (5, 4, 1), (6, 8, 2), (8, 8, 8), (12, 6, 1), (12, 8, 4)]))
    small = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, dilation = draw(st.just((1, 1)) | small | st.just((3, 3))), draw(st.just((1, 1)) | st.tuples(st.integers(1, 2), st.integers(1, 2)))
    stride, padding = draw(st.just((1, 1)) | small), draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    if kernel == (1, 1): padding = (0, 0)                       # the published 1 × 1 layer takes its statistics without padding
    block = draw(st.sampled_from([b for b in range(1, c) if c % b == 0] + [64]))
    every = draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = FastDeconv(c, out, kernel, stride, padding, dilation, groups, block=block, sampling_stride=every).double()
    n, h, w = draw(st.integers(1, 3)), draw(st.integers(5, 12)), draw(st.integers(5, 12))
    mixed = torch.einsum("dc,nchw->ndhw", torch.randn(c, c, dtype=torch.float64), torch.randn(n, c, h, w, dtype=torch.float64))
    return layer, mixed + torch.randn(c, 1, 1, dtype=torch.float64), every

@given(layers())
@settings(max_examples=40, deadline=None)
def test_fast_deconv_equals_the_equations(case):
    layer, x, every = case
    before = [b.clone().numpy() for b in (layer.running_mean, layer.running_deconv)]
    x.requires_grad_()
    means, _, roots = np_statistics(layer, x.detach().numpy(), every)
    y = layer(x)
    scale = y.abs().max().item()
    np.testing.assert_allclose(y.detach().numpy(), np_fast_deconv(layer, x.detach().numpy(), means, roots), rtol=0, atol=1e-9 * max(scale, 1))
    np.testing.assert_allclose(layer.running_mean, 0.9 * before[0] + 0.1 * means.ravel(), atol=1e-12)
    np.testing.assert_allclose(layer.running_deconv, 0.9 * before[1] + 0.1 * roots.reshape(before[1].shape), rtol=1e-9, atol=1e-9 * np.abs(roots).max())
    # gradients
    cot = torch.randn_like(y)
    def loss(x, w, b):
        m, _, r = np_statistics(layer, x, every)
        return (np_fast_deconv(layer, x, m, r, w, b) * cot.numpy()).sum()
    variables = x, layer.weight, layer.bias
    check_gradients(loss, [v.detach().numpy() for v in variables], torch.autograd.grad((y * cot).sum(), variables), 1e-9)
    # evaluation
    layer.eval()
    running = layer.running_mean.numpy().reshape(max(layer.groups, 1), -1), layer.running_deconv.numpy().reshape(roots.shape)
    y = layer(x)
    np.testing.assert_allclose(y.detach().numpy(), np_fast_deconv(layer, x.detach().numpy(), *running), rtol=0, atol=1e-9 * max(y.abs().max().item(), 1))
    with torch.no_grad(): torch.testing.assert_close(fold_deconv(layer)(x), y, atol=1e-10 * max(y.abs().max().item(), 1), rtol=0)


@given(layers())
@settings(max_examples=8, deadline=None)
def test_averaging_the_covariance_equals_the_equations(case):
    layer, x, every = case
    twin = FastDeconv(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups,
                      block=layer.block, sampling_stride=every, average="covariance").double()
    twin.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(twin.eval()(x), layer.eval()(x))                                      # before any training step
    layer.train(), twin.train()
    average, mean = 0, 0
    for t in range(13):
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)                        # training does not change
        means, covs, roots = np_statistics(layer, x.numpy(), every)
        weight = max(1 / (t + 1), 0.1)                                                       # plain mean of ten, then exponential
        average, mean = average + weight * (covs - average), mean + weight * (means - mean)
        x = x + 0.1 * torch.randn_like(x)
    expected = np.array([np_inverse_sqrt(c + layer.eps * np.eye(len(c)), layer.n_iter) for c in average])
    np.testing.assert_allclose(twin.eval().running_deconv.numpy().reshape(expected.shape), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    np.testing.assert_allclose(twin.running_mean.numpy(), mean.ravel(), atol=1e-12)
    fresh = copy.deepcopy(layer).eval()
    again = FastDeconv(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups,
                       block=layer.block, average="covariance").double().eval()
    state = twin.state_dict() | dict(running_deconv=fresh.running_deconv)                     # as saved in the middle of an epoch
    again.load_state_dict(state)
    torch.testing.assert_close(again(x), twin(x), rtol=1e-12, atol=1e-12 * twin(x).abs().max().item())


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_by_finite_differences(groups):
    layer = FastDeconv(2, 2, 2, groups=groups, sampling_stride=1, n_iter=4).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    def f(x, w, b): return torch.func.functional_call(layer, dict(weight=w, bias=b), x)
    assert torch.autograd.gradcheck(f, (x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()), check_batched_grad=False)


@given(st.sampled_from([(5, 1, 1), (5, 3, 1), (32, 3, 1), (32, 3, 4), (64, 3, 64), (128, 1, 1)]), st.floats(0, 4), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_float32_is_good_to_1e5(case, decades, seed):
    "Outputs, gradients and buffers in float32 against float64, condition number of the covariance up to 1e4, five rounds."
    (c, k, groups), rng = case, np.random.default_rng(seed)
    torch.manual_seed(seed)
    layer = FastDeconv(c, 8 * groups if groups < 64 else 64, k, 1, k // 2, groups=groups, sampling_stride=1)
    q = np.linalg.qr(rng.normal(size=(c, c)))[0] * np.geomspace(10 ** (-decades / 2), 1, c)
    if groups > 1: q = np.diag(np.geomspace(10 ** (-decades / 2), 1, c))
    x = torch.tensor(np.einsum("dc,nchw->ndhw", q, rng.normal(size=(6, c, 17, 16))) + 0.3, dtype=torch.float32, requires_grad=True)
    low, high = layer, copy.deepcopy(layer).double()
    cov = high.batch_moments(x.detach().double())[1]
    eigenvalues = torch.linalg.eigvalsh(cov + 1e-5 * torch.eye(cov.shape[-1]))
    assert (eigenvalues[..., -1] / eigenvalues[..., 0]).max() < 3e4
    y, cot = low(x), None
    cot = torch.randn_like(y)
    wide = x.detach().double().requires_grad_()
    z = high(wide)
    got = [y, low.running_mean, low.running_deconv, *torch.autograd.grad((y * cot).sum(), (x, low.weight, low.bias))]
    want = [z, high.running_mean, high.running_deconv, *torch.autograd.grad((z * cot.double()).sum(), (wide, high.weight, high.bias))]
    for a, b in zip(got, want): assert (a - b).abs().max() < 1e-5 * b.abs().max()
    assert (low.eval()(x) - high.eval()(wide)).abs().max() < 1e-5 * high(wide).abs().max()


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


def np_channel_deconv(layer, x, running=None):
    "The batch's output and statistics; evaluation where `running` is given."
    kept, step, b = x.shape[1] // layer.block * layer.block, layer.sampling_stride ** 2 if min(x.shape[2:]) >= layer.sampling_stride else 1, layer.block
    rows = x[:, :kept].transpose(1, 0, 2, 3).reshape(b, -1)
    sample, rest = rows[:, ::step], x[:, kept:].reshape(len(x), -1)[:, ::step]
    if running is None:
        m2 = rest.sum() / rest.size if rest.size else 0
        running = [sample.sum(1, keepdims=True) / sample.shape[1], np_inverse_sqrt(sample @ sample.T / sample.shape[1] + layer.eps * np.eye(b), layer.n_iter),
                   np.reshape(m2, (1, 1)), np.reshape(((rest - m2) ** 2).sum() / (rest.size - 1) if rest.size else 1, (1, 1))]
    out = [(running[1] @ (rows - running[0])).reshape(kept, len(x), *x.shape[2:]).transpose(1, 0, 2, 3)]
    return np.concatenate(out + [(x[:, kept:] - running[2]) / np.sqrt(running[3] + layer.eps)], 1), running

@given(st.integers(1, 6), st.integers(0, 7), st.integers(1, 4), st.integers(2, 7), st.integers(2, 7), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_channel_deconv_equals_the_equations(block, more, n, h, w, every, seed):
    rng, c = np.random.default_rng(seed), block + more
    assume(n > 1 or h * w > 9)                                   # one number has no variance
    layer, averages = ChannelDeconv(block, sampling_stride=every).double(), None
    for t in range(3):
        x = rng.normal(size=(n, c, h, w)) + 1
        expected, batch = np_channel_deconv(layer, x)
        averages = batch if t == 0 else [a + 0.1 * (b - a) for a, b in zip(averages, batch)]
        if not c % block: averages[2], averages[3] = np.zeros((1, 1)), np.ones((1, 1))
        variable = torch.tensor(x, requires_grad=True)
        y = layer(variable)
        np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-9 * np.abs(expected).max())
        cot = torch.tensor(rng.normal(size=x.shape))
        check_gradients(lambda v: (np_channel_deconv(layer, v)[0] * cot.numpy()).sum(), [x], torch.autograd.grad((y * cot).sum(), [variable]), 1e-9)
    for a, b in zip((layer.running_mean1, layer.running_deconv, layer.running_mean2, layer.running_var), averages): np.testing.assert_allclose(a, b, atol=1e-9)
    assert layer.num_batches_tracked == 3
    expected = np_channel_deconv(layer, x, averages)[0]
    np.testing.assert_allclose(layer.eval()(torch.tensor(x)).numpy(), expected, atol=1e-9 * np.abs(expected).max())

def test_channel_deconv_of_a_matrix_and_of_one_number():
    assert ChannelDeconv(3)(torch.randn(10, 7)).shape == (10, 7)
    assert ChannelDeconv(2)(torch.randn(1, 3)).isfinite().all()


def np_delinear(layer, x, w, b, running=None):
    rows = x.reshape(-1, layer.block)
    if running is None:
        mean = rows.sum(0) / len(rows)
        running = mean, np_inverse_sqrt((rows - mean).T @ (rows - mean) / len(rows) + layer.eps * np.eye(layer.block), layer.n_iter)
    return ((rows - running[0]) @ running[1]).reshape(x.shape) @ w.T + b, running

@given(st.sampled_from([(24, 512), (24, 8), (24, 24), (6, 1), (7, 7)]), st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_delinear_equals_the_equations(shape, n, out, seed):
    (features, block), rng = shape, np.random.default_rng(seed)
    torch.manual_seed(seed)
    layer = Delinear(features, out, block=block).double()
    x = torch.tensor(rng.normal(size=(n, features)) @ rng.normal(size=(features, features)) + 1, requires_grad=True)
    variables = x, layer.weight, layer.bias
    arrays = [v.detach().numpy() for v in variables]
    y, (expected, (mean, root)) = layer(x), np_delinear(layer, *arrays)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=0, atol=1e-9 * max(1, np.abs(expected).max()))
    np.testing.assert_allclose(layer.running_mean.numpy(), 0.1 * mean, atol=1e-12)
    np.testing.assert_allclose(layer.running_deconv.numpy(), 0.9 * np.eye(layer.block) + 0.1 * root, rtol=1e-9, atol=1e-9 * np.abs(root).max())
    cot = torch.tensor(rng.normal(size=y.shape))
    check_gradients(lambda *v: (np_delinear(layer, *v)[0] * cot.numpy()).sum(), arrays, torch.autograd.grad((y * cot).sum(), variables), 1e-9)
    expected = np_delinear(layer, *arrays, running=(layer.running_mean.numpy(), layer.running_deconv.numpy()))[0]
    y = layer.eval()(x)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=0, atol=1e-9 * max(1, np.abs(expected).max()))
    torch.testing.assert_close(fold_deconv(layer)(x), y, atol=1e-10 * max(1, np.abs(expected).max()), rtol=0)


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
    averaged = FastDeconv(5, 8, 3, padding=1, average="covariance").bfloat16()
    assert averaged(x.bfloat16()).isfinite().all() and averaged.eval()(x.bfloat16()).isfinite().all()
    half = copy.deepcopy(layer).bfloat16()                                                # parameters in half precision too
    assert half(x.bfloat16()).isfinite().all() and half.eval()(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("make", [lambda: FastDeconv(5, 4, 3, padding=1), lambda: FastDeconv(8, 4, 3, groups=4), lambda: FastDeconv(8, 4, 1, block=4), lambda: Delinear(12, 3),
    lambda: ChannelDeconv(4), lambda: FastDeconv(5, 4, 3, freeze=True, freeze_iter=1), lambda: FastDeconv(5, 4, 3, average="covariance"), lambda: FastDeconv(5, 4, 3, n_iter=None),
    lambda: FastDeconv(5, 4, 3, freeze=True, freeze_iter=1, average="covariance")])
def test_traced_without_graph_breaks(make):
    torch.manual_seed(0)
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    layer = make()
    x = torch.randn(6, 12) if isinstance(layer, Delinear) else torch.randn(8, getattr(layer, "in_channels", 8), 15, 15)   # more patches than numbers in one: fewer leave variances to rounding
    traced, plain = copy.deepcopy(layer), copy.deepcopy(layer)
    compiled, report = torch.compile(traced, fullgraph=True, backend="aot_eager"), torch._dynamo.utils.counters
    for mode in (True, True, True, True, False):
        x = x + 0.1 * torch.randn_like(x)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        traced.train(mode), plain.train(mode)
        y, z = compiled(a), plain(b)
        torch.testing.assert_close(y, z, atol=1e-4, rtol=1e-4)
        y.square().mean().backward(), z.square().mean().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)
    assert not report["graph_break"]
    torch.testing.assert_close(traced.state_dict(), plain.state_dict(), atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3           # training and evaluation, and not one a batch


@pytest.mark.parametrize("average", ["deconv", "covariance"])
def test_exported_and_averaged(average):
    torch.manual_seed(0)
    net = nn.Sequential(FastDeconv(5, 8, 3, stride=2, padding=1, average=average), nn.Mish(), FastDeconv(8, 8, 3, groups=4, average=average), ChannelDeconv(4),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), Delinear(8, 3, average=average))
    mean = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True)
    x = torch.randn(6, 5, 13, 15)
    for _ in range(4):
        net(x + torch.randn(())).square().mean().backward()
        mean.update_parameters(net)
    assert list(mean.module.state_dict()) == list(net.state_dict())
    mean.eval(), net.eval()
    assert mean(x).isfinite().all()
    if average == "covariance":
        for layer in (mean.module[0], net[0]): torch.testing.assert_close(layer.running_deconv, layer.inverse_root(layer.running_cov))
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},), strict=False)
    for batch in (x, x[:1], x[:3]): torch.testing.assert_close(program.module()(batch), net(batch), atol=1e-5, rtol=1e-4)


def test_an_average_of_networks_may_be_evaluated_at_any_time():
    "The inverse of the averaged covariance is made anew when the average has moved, whoever moved it."
    torch.manual_seed(0)
    net = nn.Sequential(FastDeconv(5, 4, 3, average="covariance"), nn.Mish(), nn.Flatten(), Delinear(4 * 49, 3, average="covariance"))
    averaged, x = torch.optim.swa_utils.AveragedModel(net).eval(), torch.randn(8, 5, 9, 9)
    for _ in range(3): net(x := x + torch.randn_like(x)), averaged.update_parameters(net), averaged(x)
    fresh = copy.deepcopy(averaged)
    for layer in fresh.modules():
        if hasattr(layer, "refresh"): layer.refresh()
    assert torch.equal(averaged(x), fresh(x)) and not torch.equal(averaged.module[0].running_deconv, torch.eye(45))
    twin = copy.deepcopy(net).train()
    twin(x)
    assert torch.equal(twin.eval()(x), copy.deepcopy(twin).eval()(x))


def test_evaluation_and_training_before_one_gradient():
    torch.manual_seed(0)
    for layer in (FastDeconv(5, 4, 3), FastDeconv(5, 4, 3, freeze=True, freeze_iter=1), Delinear(5, 4), ChannelDeconv(5)):
        x = torch.randn(64, 5) if isinstance(layer, Delinear) else torch.randn(4, 5, 9, 9)
        x.requires_grad_()
        outputs = [layer.train(mode)(x).sum() for mode in (True, False, True, True, True, False, True)]
        sum(outputs).backward()
        assert x.grad.isfinite().all()


def test_many_rounds_do_not_diverge():
    "Fewer samples than dimensions: the smallest eigenvalues are rounding errors of either sign."
    torch.manual_seed(0)
    x = 10 * torch.randn(100, 288)
    cov = torch.cov(x.T) + 1e-5 * torch.eye(288)
    for n in (15, 16, 20, 30, 100, None): assert whitening_residual(cov, inverse_sqrt(cov, n)) < 2      # 1: the directions without samples stay as they are
    good = np.cov(np.random.default_rng(0).normal(size=(4, 99)))
    np.testing.assert_allclose(inverse_sqrt(torch.tensor(good), 40).numpy(), np.linalg.inv(sqrtm(good).real), rtol=1e-8, atol=1e-8)
    report = whitening_report(nn.Sequential(FastDeconv(5, 4, 3, n_iter=30)), torch.randn(1, 5, 7, 7).cumsum(3) * 100)
    assert report[0]["condition"] > 1e3 and math.isfinite(report[0]["batch_residual"])


def test_very_bright_and_very_faint_images():
    "Whitening divides the scale out, as far as eps is small beside it."
    torch.manual_seed(0)
    layer, x = FastDeconv(5, 4, 3), torch.randn(4, 5, 15, 15)
    expected = copy.deepcopy(layer)(1e3 * x)
    for scale in (1e6, 1e12, 1e17): torch.testing.assert_close(copy.deepcopy(layer)(scale * x), expected, rtol=1e-3, atol=1e-3)
    assert copy.deepcopy(layer)(1e-30 * x).isfinite().all()


def test_folding_leaves_alone_what_it_must():
    torch.manual_seed(0)
    class Skip(nn.Sequential):
        def forward(self, x): return x + super().forward(x)
    class Twice(nn.Sequential):
        def forward(self, x): return self[1](self[0](x)) + self[0](x)
    x = torch.randn(3, 4, 8, 8)
    for net in (Skip(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), Twice(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
                nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))):
        for _ in range(3): net.train()(x)
        torch.testing.assert_close(fold_deconv(net)(x), net.eval()(x))


def test_bad_exports_are_named(monkeypatch):
    from spectranb.models import simple_deconv
    def fail(*args, **kwargs): raise RuntimeError("dtype mismatch")
    net = simple_deconv()
    with pytest.raises(BadInput, match="4 channels"): export_program(net, torch.zeros(2, 4, 16, 16))
    with pytest.raises(BadInput, match="int64"): export_program(net, torch.zeros(2, 5, 16, 16, dtype=torch.long))
    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(BadInput, match="cannot be exported: RuntimeError: dtype mismatch"): export_program(net, torch.zeros(2, 5, 16, 16))


# --- several processes
def deconv_net():
    torch.manual_seed(0)
    return nn.Sequential(FastDeconv(3, 8, 3, 2, 1), nn.Mish(), FastDeconv(8, 8, 3, groups=2, average="covariance"), nn.Mish(), FastDeconv(8, 8, 1, sampling_stride=1),
                         ChannelDeconv(3), nn.Flatten(), Delinear(8 * 81, 8, block=8), nn.Mish(), nn.Linear(8, 2)).double()

def train_part(rank, folder):
    "One of two processes: three steps on its part of each batch, 3 images or 5; and a step of the published way, each by itself."
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net, alone, data = deconv_net(), FastDeconv(3, 8, 3, sync=False).double(), torch.load(f"{folder}/x.pt")
    parallel = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    optimizer, outputs = torch.optim.SGD(net.parameters(), 0.1), []
    for x in data:
        part = x[:3] if rank == 0 else x[3:]
        y, _ = parallel(part), alone(part)
        optimizer.zero_grad(), (y.square().sum() / 8 * 2).backward(), optimizer.step()           # DDP takes the mean of the two gradients
        outputs.append(y.detach())
    torch.save((outputs, net.eval().state_dict(), alone.state_dict()), f"{folder}/{rank}.pt")
    del parallel                                        # it would hold the group for longer than Python can wait for: pytorch#56297
    gc.collect()
    torch.distributed.destroy_process_group()

def in_two_processes(function, args, limit=120):
    "Both have to end within `limit` seconds; what hangs is killed and fails."
    both = torch.multiprocessing.spawn(function, args, nprocs=2, join=False)
    end = time.monotonic() + limit
    while not both.join(timeout=max(0, end - time.monotonic())):
        if time.monotonic() < end: continue
        for p in both.processes: p.kill()
        pytest.fail(f"two processes had not ended after {limit} s")

@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch was built without torch.distributed")
def test_two_processes_equal_one(tmp_path):
    torch.manual_seed(1)
    data = [torch.randn(8, 3, 21, 21, dtype=torch.float64) * torch.arange(1, 9).view(-1, 1, 1, 1) for _ in range(3)]
    torch.save(data, tmp_path / "x.pt")
    in_two_processes(train_part, (str(tmp_path),))
    net = deconv_net()
    optimizer, outputs = torch.optim.SGD(net.parameters(), 0.1), []
    for x in data:
        y = net(x)
        optimizer.zero_grad(), (y.square().sum() / 8).backward(), optimizer.step()
        outputs.append(y.detach())
    (first, state0, alone0), (second, state1, alone1) = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close([torch.cat(pair) for pair in zip(first, second)], outputs, atol=1e-9, rtol=1e-9)
    for state in (state0, state1): torch.testing.assert_close(dict(state), dict(net.eval().state_dict()), atol=1e-9, rtol=1e-9)
    assert (alone0["running_deconv"] - alone1["running_deconv"]).abs().max() > 1e-3


# --- the inverse root until converged
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_converged_inverse_root(dtype, tolerance):
    "A batch of condition numbers 1 … 1e4 and one of 1e12, which float32 cannot hold; no one disturbs the others."
    q = np.linalg.qr(np.random.default_rng(2).normal(size=(40, 40)))[0]
    c = torch.tensor(np.array([(q * np.geomspace(1 / k, 1, 40)) @ q.T * 7 for k in (1, 10, 1e2, 1e4, 1e12)]), dtype=dtype)
    d = inverse_sqrt(c, None)
    assert (whitening_residual(c, d)[:4] < tolerance).all() and d.isfinite().all()
    for one, expected in zip(c, d): torch.testing.assert_close(inverse_sqrt(one, None), expected, rtol=1e-3 if dtype == torch.float32 else 1e-6, atol=0.01)
    with torch.no_grad(): compiled = torch.compile(inverse_sqrt, backend="eager", fullgraph=True)(c[:4], None)
    torch.testing.assert_close(compiled, d[:4], rtol=1e-4, atol=1e-4)

def test_gradient_of_the_converged_inverse_root():
    "Against the eigendecomposition."
    torch.manual_seed(0)
    a = torch.randn(12, 30, dtype=torch.float64, requires_grad=True)
    g, c = torch.randn(12, 12, dtype=torch.float64), a @ a.mT / 30
    values, vectors = torch.linalg.eigh(c)
    exact = (vectors / values.sqrt()) @ vectors.mT
    torch.testing.assert_close(inverse_sqrt(c, None), exact)
    torch.testing.assert_close(*[torch.autograd.grad((root * g).sum(), a, retain_graph=True)[0] for root in (inverse_sqrt(c, None), exact)], rtol=1e-7, atol=1e-9)

def test_low_precision_products_do_not_reach_newton_schulz():
    torch.manual_seed(0)
    layer, x = FastDeconv(5, 4, 3, n_iter=15), torch.randn(4, 5, 16, 16)
    y = copy.deepcopy(layer)(x)
    torch.set_float32_matmul_precision("medium")
    try:
        assert inverse_sqrt.__globals__["exact"](torch.eye(3)).dtype == torch.float64
        z = layer(x)
    finally: torch.set_float32_matmul_precision("highest")
    assert z.dtype == torch.float32 and (y - z).abs().max() < 0.02 * y.std()


@pytest.mark.parametrize("n_iter", [5, 15, None])
def test_batch_of_one_and_constant_image(n_iter):
    layer = FastDeconv(3, 4, 3, padding=1, n_iter=n_iter)
    assert layer(torch.ones(1, 3, 7, 5)).isfinite().all() and layer(torch.zeros(1, 3, 7, 5)).isfinite().all()
    assert Delinear(6, 2, n_iter=n_iter)(torch.ones(1, 6)).isfinite().all() and ChannelDeconv(2, n_iter=n_iter)(torch.zeros(1, 3, 1, 1)).isfinite().all()


def test_one_bad_pixel(size=(31, 33)):
    "In evaluation it stays in its galaxy; in training, where the check is off, it leaves the averages alone."
    torch.manual_seed(0)
    layer, x = FastDeconv(5, 4, 3, padding=1), torch.randn(3, 5, *size)
    layer(x)
    before, clean = copy.deepcopy(layer.state_dict()), layer.eval()(x)
    x[1, 2, 0, 0] = torch.nan
    y = layer(x)
    assert y[1].isnan().any() and torch.equal(y[[0, 2]], clean[[0, 2]])
    compiled = torch.compile(layer.train(), backend="eager", fullgraph=True)
    assert compiled(x).isnan().all()
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
    assert "objects 1 of the batch; the first at index (1, 2, 0, 0)" in find_bad_pixels(x) and find_bad_pixels(x[:1]) == ""


def test_backward_inside_autocast():
    torch.manual_seed(0)
    layer, x = FastDeconv(5, 4, 3, sampling_stride=1), torch.randn(4, 5, 9, 9, requires_grad=True)
    (layer.batch_statistics(x)[1] ** 2).sum().backward()
    expected, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16): (layer.batch_statistics(x)[1] ** 2).sum().backward()
    torch.testing.assert_close(x.grad, expected, atol=0.02 * expected.abs().max().item(), rtol=0.02)


@pytest.mark.parametrize("x, words", [(torch.zeros(2, 4, 9, 9), "4 channels, made for 5"), (torch.zeros(5, 9, 9), "input of shape"),
    (torch.zeros(1, 5, 2, 9), "2 × 9 pixels is smaller"), (torch.zeros(1, 5, 9, 9, dtype=torch.int64), "torch.int64 image"),
    (torch.zeros(2, 9, 9, 5), r"x\.permute\(0, 3, 1, 2\)"), (torch.zeros(1, 5, 9, 9, dtype=torch.bool), "x.float"),
    (torch.full((1, 5, 9, 9), torch.nan), "405 NaN or Inf in a batch of shape .1, 5, 9, 9.: objects 0 of the batch; the first at index .0, 0, 0, 0."), (torch.full((1, 5, 9, 9), torch.inf), "NaN or Inf")])
def test_bad_images_are_named(x, words):
    layer = FastDeconv(5, 2, 3)
    with pytest.raises(BadInput, match=words): layer(x)
    assert torch.equal(layer.running_deconv, torch.eye(45))


@pytest.mark.parametrize("make, words", [(lambda: FastDeconv(5, 2, 3, block=0), "block=0"), (lambda: Delinear(8, 2)(torch.zeros(3, 7)), "7 features, made for 8"),
    (lambda: ChannelDeconv(4)(torch.zeros(2, 3, 8, 8)), "block=4"), (lambda: FastDeconv(64, 8, 3, block=48), "block=48 does not divide 64 channels. .* falls back to block=16"),
    (lambda: Delinear(64, 8, block=48), "block=48 does not divide"), (lambda: FastDeconv(6, 8, 3, groups=4), "groups=4 does not divide in_channels=6"),
    (lambda: FastDeconv(4, 6, 3, groups=4), "groups=4 does not divide out_channels=6"), (lambda: FastDeconv(4, 4, 3, sampling_stride=0), "sampling_stride=0"),
    (lambda: FastDeconv(4, 4, 3, n_iter=0), "n_iter=0"), (lambda: FastDeconv(4, 4, 3, average="cov"), "average='cov'"), (lambda: FastDeconv(4, 4, 3, momentum=2), "momentum=2"),
    (lambda: ChannelDeconv(0), "block=0"), (lambda: ChannelDeconv(2)(torch.zeros(2, 4, 3, 3, dtype=torch.int32)), "int32"), (lambda: Delinear(4, 2)(torch.zeros(2, 4, dtype=torch.int32)), "int32"),
    (lambda: Delinear(4, 2)(torch.full((2, 4), torch.nan)), "index .0, 0.")])
def test_bad_arguments_are_named(make, words):
    with pytest.raises(BadInput, match=words): make()

def test_published_blocks():
    assert FastDeconv(48, 8, 3).block == 48 and FastDeconv(96, 8, 3).block == 32 and FastDeconv(128, 8, 3).block == 64 and FastDeconv(8, 8, 3, block=100).block == 8
    assert FastDeconv(8, 8, 3, groups=2, block=3).block == 4 and Delinear(768, 3).block == 256


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


def test_fold_in_float32_is_good_to_1e5_and_linear_layers_fold():
    torch.manual_seed(0)
    net = nn.Sequential(FastDeconv(5, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.Mish(), FastDeconv(16, 16, 3, groups=2, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        Delinear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, track_running_stats=False))
    x = torch.randn(9, 5, 21, 22).cumsum(3) + 10
    for _ in range(40): net(x + torch.randn(9, 1, 1, 1))
    net.eval()
    folded, double = fold_deconv(net), copy.deepcopy(net).double()
    assert [type(m) for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [nn.BatchNorm1d]        # the one without averages
    with torch.no_grad():
        y, z = net(x), double(x.double())
        assert (folded(x) - y).abs().max() < 1e-5 * y.abs().max() and (fold_deconv(double)(x.double()) - z).abs().max() < 1e-10 * z.abs().max()


@pytest.mark.parametrize("average", ["deconv", "covariance"])
def test_onnx_equals_the_network(average, tmp_path):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = nn.Sequential(FastDeconv(5, 16, 3, 2, 1, average=average), nn.Mish(), FastDeconv(16, 16, 3, groups=4, average=average), nn.BatchNorm2d(16), nn.Mish(), ChannelDeconv(5),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), Delinear(16, 8, average=average), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x = torch.randn(6, 5, 19, 23)
    for _ in range(3): net(x + torch.randn(6, 1, 1, 1))
    keys = list(net.state_dict())
    session = onnxruntime.InferenceSession(str(export_onnx(net, x[:1], tmp_path / "net.onnx")), providers=["CPUExecutionProvider"])
    assert net.training and list(net.state_dict()) == keys and [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    with torch.no_grad(): y = net.eval()(x).numpy()
    for n in (6, 1, 4): np.testing.assert_allclose(session.run(None, {"cutouts": x[:n].numpy()})[0], y[:n], rtol=0, atol=1e-5 * np.abs(y).max())
    export_program(net, x, tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    for n in (6, 1): np.testing.assert_allclose(again(x[:n]).detach().numpy(), y[:n], rtol=0, atol=1e-5 * np.abs(y).max())

def test_onnx_of_the_hybrid_network(tmp_path):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    from spectranb.models import xresnet18_hybrid
    torch.manual_seed(0)
    net, x = xresnet18_hybrid(), torch.randn(4, 5, 64, 64)
    for _ in range(2): net(x)
    session = onnxruntime.InferenceSession(str(export_onnx(net, x, tmp_path / "net.onnx")), providers=["CPUExecutionProvider"])
    with torch.no_grad(): y = net.eval()(x).numpy()
    for n in (4, 1): np.testing.assert_allclose(session.run(None, {"cutouts": x[:n].numpy()})[0], y[:n], rtol=0, atol=1e-5 * np.abs(y).max())


def test_whitening_report():
    torch.manual_seed(0)
    net = nn.Sequential(FastDeconv(4, 8, 3, n_iter=None), nn.ReLU(), FastDeconv(8, 4, 3, groups=2, average="covariance"), nn.Flatten(), Delinear(4 * 81, 3, block=4))
    x = torch.randn(50, 4, 13, 13)
    net(x)
    before = copy.deepcopy(net.state_dict())
    report = whitening_report(net, x)
    assert [(line["layer"], line["dimensions"], line["matrices"]) for line in report] == [("0", 36, 1), ("2", 36, 2), ("4", 4, 1)]
    assert report[0]["batch_residual"] < 1e-3 < 0.1 < report[0]["average_residual"]           # a single batch leaves most of the identity in the average,
    assert abs(report[1]["average_residual"] - report[1]["batch_residual"]) < 1e-3            # but not in that of the covariance
    rows = x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).reshape(-1, 36).numpy()
    values = np.linalg.eigvalsh(np.cov(rows.T, ddof=0) + 1e-5 * np.eye(36))
    assert abs(report[0]["condition"] / (values[-1] / values[0]) - 1) < 1e-4
    assert net.training and all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))


def test_state_dict_keys_of_the_published_layers():
    published_keys = json.loads(Path(__file__).with_name("state_dict_keys.json").read_text())
    made = {"FastDeconv_5_32_s2": FastDeconv(5, 32, 3, stride=2, padding=1), "FastDeconv_g4": FastDeconv(32, 32, 3, padding=1, groups=4),
            "ChannelDeconv_16": ChannelDeconv(16), "Delinear": Delinear(128, 32)}
    for name, layer in made.items(): assert {k: str(tuple(v.shape)) for k, v in layer.state_dict().items()} == published_keys[name]
