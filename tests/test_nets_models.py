"The networks: published names, shapes and counts; equality with fastai's layers; checkpoints; bad input."
import copy, json
from pathlib import Path

import numpy as np, pytest, torch
from fastcore.foundation import L
from torch import nn

from spectranb.core import BadInput
from spectranb.deconv import FastDeconv, fold_deconv
from spectranb import models
from spectranb.models import ARCHITECTURES, Mish, ResidualBlock, SelfAttention, create_network, load_checkpoint, simple_cnn, xresnet18, xresnet18_hybrid

torch.set_num_threads(1)
KEYS = json.loads(Path(__file__).with_name("state_dict_keys.json").read_text())
COUNTS = dict(xresnet18_hybrid=6_734_743, xresnet18=6_734_871, xresnet18_deconv=6_730_007, simple_cnn=29_734, simple_deconv=29_606,
              xresnet34_hybrid=12_013_823, xresnet50_hybrid=28_652_423)      # published printouts and rebuilt networks


@pytest.mark.parametrize("name", [n for n in KEYS if n in ARCHITECTURES])
def test_state_dict_is_the_published_one(name):
    assert {k: str(tuple(v.shape)) for k, v in create_network(name).state_dict().items()} == KEYS[name]

@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name): assert sum(p.numel() for p in ARCHITECTURES[name]().parameters()) == COUNTS[name]


@pytest.mark.parametrize("expansion, ni, nf, stride, groups, reduction, sa", [(1, 64, 64, 1, 64, 16, True), (1, 64, 128, 2, 64, 16, False), (4, 16, 64, 1, 1, 8, True), (4, 64, 128, 2, 32, None, False)])
def test_block_equals_fastai(expansion, ni, nf, stride, groups, reduction, sa):
    from fastai.layers import ResBlock
    torch.manual_seed(0)
    theirs = ResBlock(expansion, ni, nf, stride=stride, groups=groups, reduction=reduction, sa=sa, act_cls=nn.Mish)
    ours = ResidualBlock(expansion, ni, nf, stride, groups, reduction, sa)
    for p in theirs.parameters(): nn.init.normal_(p, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, ni * expansion, 9, 8, requires_grad=True)
    for mode in (True, True, False):
        a, b = theirs.train(mode)(x), ours.train(mode)(x)
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
        (ga,), (gb,) = torch.autograd.grad(a.square().mean(), x), torch.autograd.grad(b.square().mean(), x)
        torch.testing.assert_close(gb, ga, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["xresnet18_hybrid", "xresnet18_deconv", "xresnet50_hybrid", "simple_deconv"])
def test_networks_run_copy_and_fold(name):
    torch.manual_seed(0)
    net, x = create_network(name), torch.randn(3, 5, 33, 40)
    assert net.eval()(x).isfinite().all()                                # before any training step
    for _ in range(2): net.train()(x.to(memory_format=torch.channels_last)).square().mean().backward()
    twin = copy.deepcopy(net)                                            # after a backward pass
    net.eval(), twin.eval()
    with torch.no_grad():
        y = net(x)
        assert torch.equal(twin(x), y) and net(x[:1]).shape == (1, 6)
        assert (fold_deconv(net)(x) - y).abs().max() < 1e-4 * y.abs().max()
        net, x = net.double(), x.double()
        torch.testing.assert_close(fold_deconv(net)(x), net(x), atol=1e-10, rtol=1e-10)


def test_hybrid_is_traced_without_graph_breaks():
    torch.manual_seed(0)
    net, x = xresnet18_hybrid(), torch.randn(2, 5, 32, 32)
    expected = copy.deepcopy(net)(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(x), expected)


def test_arguments_reach_the_network():
    net = xresnet18_hybrid(c_in=3, n_out=10, sa=False, act_cls=nn.ReLU, groups=1, reduction=0, stem_szs=(16, 16, 32), widen=0.5, p=0.2)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    kinds = [type(m) for m in net.modules()]
    assert SelfAttention not in kinds and Mish not in kinds and nn.Sigmoid not in kinds and net[10].p == 0.2
    assert sum(k is FastDeconv for k in kinds) == 3 and net[7][0].convpath[0][0].out_channels == 256
    assert simple_cnn(widths=(8, 8, 8), n_out=2)(torch.zeros(2, 5, 16, 16)).shape == (2, 2)


def test_starts_near_unit_scale():
    torch.manual_seed(0)
    y = xresnet18(sa=True)(torch.randn(32, 5, 64, 64))
    assert 0.05 < y.std() < 5


@pytest.mark.parametrize("x, words", [(torch.zeros(2, 4, 64, 64), "4 channels, made for 5"), (torch.zeros(2, 5, 31, 64), "31 × 64 pixels is smaller"),
    (torch.zeros(5, 64, 64), "Add the batch axis"), (torch.full((2, 5, 32, 32), torch.nan), "NaN or Inf"), (torch.zeros(2, 5, 32, 32, dtype=torch.int32), "int32 image")])
def test_bad_images_are_named(x, words):
    with pytest.raises(BadInput, match=words): xresnet18_hybrid()(x)

def test_bad_arguments_are_named():
    with pytest.raises(BadInput, match="groups=64 does not divide"): xresnet18(widen=0.7)
    with pytest.raises(BadInput, match="Choose from xresnet18"): create_network("resnet")


def test_checkpoints(tmp_path):
    net = simple_cnn()
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    torch.save({"model": net.state_dict(), "opt": {"hypers": L({"lr": 0.03}), "state": [L(1, 2)]}}, tmp_path / "fastai.pth")
    for name in ("plain.pth", "fastai.pth"):
        loaded = load_checkpoint(simple_cnn(), tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    with pytest.raises(BadInput, match="does not fit"): load_checkpoint(simple_cnn(n_out=7), tmp_path / "plain.pth")
    class Thing: __reduce__ = lambda self: (print, ("the file ran a program",))
    torch.save({"model": net.state_dict(), "opt": Thing()}, tmp_path / "evil.pth")
    with pytest.raises(BadInput, match="cannot be read"): load_checkpoint(simple_cnn(), tmp_path / "evil.pth")
    (tmp_path / "short.pth").write_bytes((tmp_path / "plain.pth").read_bytes()[:500])
    with pytest.raises(BadInput, match="cannot be read"): load_checkpoint(simple_cnn(), tmp_path / "short.pth")


@pytest.mark.parametrize("dtype, shape", [(torch.float64, (3, 8, 5, 7)), (torch.float32, (200_001,)), (torch.bfloat16, (4, 16, 40, 40)), (torch.float32, (0, 3))])
def test_quick_mish(dtype, shape):
    torch.manual_seed(0)
    x = (10 * torch.randn(shape, dtype=dtype)).requires_grad_()
    if x.ndim == 4: x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y, expected = models.Mish()(x), nn.functional.mish(x.double())
    g = torch.randn_like(y)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
    (got,), (want,) = torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g.double())
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)
    assert y.stride() == x.stride() and y.dtype == dtype
    assert models.Mish()(x.detach().mT if x.ndim == 4 else x.detach()).isfinite().all()

def test_quick_mish_passes_on_nan_and_large_numbers():
    y = models.Mish()(torch.tensor([torch.nan, 1e30, -1e30, torch.inf]))
    assert y[0].isnan() and y[1] == 1e30 and y[2].abs() == 0 and y[3] == torch.inf


@pytest.mark.parametrize("args, size", [((512, 512, 3, 1, 1), (2, 2)), ((512, 64, 3, 1, 1), (3, 1)), ((64, 128, 3, 2, 1, 1, 64), (9, 8)), ((512, 32, 3, 1, 1), (4, 4))])
def test_quick_convolutions(args, size):
    torch.manual_seed(0)
    ours = models.Conv2d(*args, bias=False)
    theirs = nn.Conv2d(*args, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, args[0], *size, requires_grad=True)
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    g = torch.randn_like(b)
    for u, v in zip(torch.autograd.grad(a, (x, ours.weight), g), torch.autograd.grad(b, (x, theirs.weight), g)): torch.testing.assert_close(u, v, atol=1e-4, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16): low = ours(x.bfloat16())
    assert low.dtype == torch.bfloat16 and (low.float() - b).abs().max() < 0.05 * b.abs().max()
