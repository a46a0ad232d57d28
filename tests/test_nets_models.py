"The networks: published names, shapes and counts; equality with fastai's layers; checkpoints; bad input."
import copy, json
from pathlib import Path

import numpy as np, pytest, torch
from fastcore.foundation import L
from torch import nn

from spectranb.core import BadInput
from spectranb.deconv import FastDeconv, fold_deconv
from spectranb.models import ARCHITECTURES, ResidualBlock, SelfAttention, create_network, load_checkpoint, simple_cnn, xresnet18, xresnet18_hybrid

torch.set_num_threads(1)
KEYS = json.loads(Path(__file__).with_name("state_dict_keys.json").read_text())
COUNTS = dict(xresnet18_hybrid=6_734_743, xresnet18=6_734_871, xresnet18_deconv=6_730_007, simple_cnn=29_734, simple_deconv=29_606,
              xresnet34_hybrid=12_013_823, xresnet50_hybrid=28_652_423)      # published printouts and rebuilt networks


@pytest.mark.parametrize("name", [n for n in KEYS if n in ARCHITECTURES])
def test_state_dict_is_the_published_one(name):
    assert {k: str(tuple(v.shape)) for k, v in create_network(name).state_dict().items()} == KEYS[name]

@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name): assert sum(p.numel() for p in ARCHITECTURES[name]().parameters()) == COUNTS[name]


@pytest.mark.parametrize("expansion, ni, nf, stride, groups, reduction, sa", [(1, 64, 64, 1, 64, 8, True), (1, 64, 128, 2, 64, 8, False), (4, 16, 64, 1, 1, 8, True), (4, 64, 128, 2, 32, None, False)])
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
    assert SelfAttention not in kinds and nn.Mish not in kinds and nn.Sigmoid not in kinds and net[10].p == 0.2
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
