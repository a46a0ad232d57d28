"The networks: published names, shapes and counts; equality with fastai's layers; checkpoints; bad input."
import collections, copy, json, math, pickle
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


def small_deconv(): return models.XResNet((1, 1), stem=models.deconv_layer, body=models.deconv_layer, stem_pool="blur", pool="gem")

@pytest.mark.parametrize("make, backend", [(xresnet18_hybrid, "aot_eager"), (small_deconv, "eager")])
def test_traced_without_graph_breaks(make, backend):
    "Forward, backward and buffers of a whole training step, then the evaluation."
    torch.manual_seed(0)
    net, x = make(), torch.randn(4, 5, 40, 40)
    twin = copy.deepcopy(net)
    traced = torch.compile(twin, fullgraph=True, backend=backend)
    expected, y = net(x), traced(x)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-3)
    for out in (expected, y): out.square().mean().backward()
    for (key, a), b in zip(net.named_parameters(), twin.parameters()): torch.testing.assert_close(b.grad, a.grad, atol=2e-3 * a.grad.abs().max().item() + 1e-7, rtol=1e-2, msg=key)
    torch.testing.assert_close(twin.state_dict(), net.state_dict(), atol=1e-4, rtol=1e-3)
    with torch.no_grad(): torch.testing.assert_close(traced.eval()(x), net.eval()(x), atol=1e-3, rtol=1e-3)


def after_a_batch(name, **kwargs):
    "A network whose running averages are one batch's statistics, in eval mode, and other images."
    torch.manual_seed(0)
    net = create_network(name, **kwargs)
    for m in net.modules():
        if hasattr(m, "momentum"): m.momentum = 1.0
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d): m.weight.uniform_(0.5, 1)
            if isinstance(m, SelfAttention): m.gamma.fill_(0.01)
        net(torch.randn(8, 5, 64, 64))
    return net.eval(), torch.randn(3, 5, 64, 64)


@pytest.mark.parametrize("name, kwargs", [("xresnet18_hybrid", {}), ("simple_deconv", dict(pool="gem"))])
def test_folded_network_is_exported(name, kwargs):
    net, x = after_a_batch(name, **kwargs)
    folded = fold_deconv(net)
    program = torch.export.export(folded, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    with torch.no_grad():
        expected = net(x)
        for images in (x, x[:1], torch.cat([x, x.flip(-1)])): torch.testing.assert_close(program.module()(images), folded(images))
        assert (program.module()(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_half_precision_evaluation():
    "Close to float32, takes and gives float32, and the bias makes good what rounding the weights shifts."
    net, x = after_a_batch("xresnet18_hybrid")
    with torch.no_grad():
        half = models.HalfPrecision(net)
        y, expected = half(x), net(x)
        assert y.dtype == torch.float32 and (y - expected).square().mean().sqrt() < 0.06 * expected.std()
        h = nn.Sequential(*list(net)[:1])(torch.randn(8, 5, 64, 64))
        rounded = nn.functional.conv2d(h, half.rest[0][0].weight.bfloat16().float(), half.rest[0][0].bias, padding=1)[..., 1:-1, 1:-1]
        plain = fold_deconv(net)[1][0]
        naive = nn.functional.conv2d(h, plain.weight.bfloat16().float(), plain.bias, padding=1)[..., 1:-1, 1:-1]
        exact = net[1][0](h)[..., 1:-1, 1:-1]
        shift = [(a - exact).mean((0, 2, 3)).abs().mean() for a in (rounded, naive)]
        assert shift[0] < 0.5 * shift[1]
        with pytest.raises(BadInput, match="4 channels"): half(x[:, :4])


def test_folded_network_runs_in_onnxruntime(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    net, x = after_a_batch("xresnet18_hybrid")
    file = str(tmp_path / "net.onnx")
    torch.onnx.export(fold_deconv(net), (x,), file, dynamo=True, input_names=["images"], dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},), verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for images in (x, x[:1]):
        got, = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad(): expected = net(images).numpy()
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    kinds = {node.op_type for node in pytest.importorskip("onnx").load(file).graph.node}
    assert "BatchNormalization" not in kinds and "Conv" in kinds


def test_arguments_reach_the_network():
    net = xresnet18_hybrid(c_in=3, n_out=10, sa=False, act_cls=nn.ReLU, groups=1, reduction=0, stem_szs=(16, 16, 32), widen=0.5, p=0.2)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    kinds = [type(m) for m in net.modules()]
    assert SelfAttention not in kinds and Mish not in kinds and nn.Sigmoid not in kinds and net[10].p == 0.2
    assert sum(k is FastDeconv for k in kinds) == 3 and net[7][0].convpath[0][0].out_channels == 256
    assert simple_cnn(widths=(8, 8, 8), n_out=2)(torch.zeros(2, 5, 16, 16)).shape == (2, 2)


@pytest.mark.parametrize("stem, body", [(0, 0), (1, 0), (3, 0), (2, 3), (3, 8)])
def test_number_of_deconvolution_layers(stem, body):
    net = create_network("xresnet18", stem_deconv=stem, body_deconv=body)
    assert [isinstance(net[i][0], FastDeconv) for i in range(3)] == [i < stem for i in range(3)]
    blocks = [m for m in net.modules() if isinstance(m, ResidualBlock)]
    for i, block in enumerate(blocks):
        kinds = [isinstance(m, (FastDeconv, nn.Conv2d)) and isinstance(m, FastDeconv) for path in (block.convpath[0], block.convpath[1], *[p for p in block.idpath if isinstance(p, nn.Sequential)]) for m in path[:1]]
        assert kinds == [i < body] * len(kinds)
    assert net(torch.randn(2, 5, 40, 40)).shape == (2, 6)
    same = {(0, 0): "xresnet18", (3, 0): "xresnet18_hybrid", (3, 8): "xresnet18_deconv"}.get((stem, body))
    if same: assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in create_network(same).state_dict().items()}


def test_options_of_the_deconvolution_layers():
    net = create_network("xresnet18_hybrid", body_deconv=1, deconv=dict(average="covariance", n_iter=15, sampling_stride=2))
    layers = [m for m in net.modules() if isinstance(m, FastDeconv)]
    assert len(layers) == 5 and all(m.average == "covariance" and m.n_iter == 15 and "running_cov" in m.state_dict() for m in layers)
    assert create_network("simple_cnn", n_deconv=1, deconv=dict(n_iter=None))[0][0].n_iter is None
    with pytest.raises(BadInput, match="cannot be built.*colour"): create_network("simple_deconv", deconv=dict(colour=1))
    with pytest.raises(BadInput, match="average='median'"): create_network("simple_deconv", deconv=dict(average="median"))


def test_gem_is_the_generalised_mean():
    gem, x = models.GeM(2.5).double(), torch.rand(2, 3, 4, 5, dtype=torch.float64) - 0.2
    v = x.numpy().clip(1e-6)
    np.testing.assert_allclose(gem(x).detach().numpy()[..., 0, 0], (v ** 2.5).mean((2, 3)) ** (1 / 2.5), rtol=1e-5)
    y = models.GeM()(torch.full((2, 3, 4, 4), -1.0, requires_grad=True))                 # nothing positive at all
    y.sum().backward()
    net = create_network("xresnet18_hybrid", pool="gem")
    assert y.isfinite().all() and "8.p" in net.state_dict() and sum(p.numel() for p in net.parameters()) == COUNTS["xresnet18_hybrid"] + 1
    with torch.autocast("cpu", torch.bfloat16): out = net(torch.randn(2, 5, 40, 40))
    out.float().sum().backward()
    assert out.isfinite().all() and net[8].p.grad.isfinite()


def test_blur_pool_keeps_names_and_passes_a_constant():
    "Binomial average of the running maximum, by hand; no parameter or buffer is saved."
    x = torch.randn(1, 2, 8, 8)
    top = nn.functional.max_pool2d(x, 3, 1, 1)
    k = np.outer([1, 2, 1], [1, 2, 1]) / 16
    y = models.BlurPool()(x)
    assert y.shape == (1, 2, 4, 4) and models.BlurPool()(torch.ones(1, 2, 9, 9)).sub(1).abs().max() < 1e-6
    assert math.isclose(y[0, 1, 2, 1].item(), (top[0, 1, 3:6, 1:4].numpy() * k).sum(), rel_tol=1e-5)
    assert create_network("xresnet18", stem_pool="blur").state_dict().keys() == create_network("xresnet18").state_dict().keys()
    x = torch.randn(2, 5, 64, 64)
    net = create_network("xresnet18", stem_pool="none").eval()
    assert nn.Sequential(*list(net)[:4])(x).shape[-1] == 32 and net(x).shape == (2, 6)


def test_dropout_in_the_head():
    torch.manual_seed(0)
    net, x = create_network("simple_cnn", p=0.5), torch.randn(4, 5, 32, 32)
    assert not torch.equal(net(x), net(x)) and torch.equal(net.eval()(x), net(x))


def test_registry():
    @models.architecture
    def own_network(**kwargs): return models.SimpleNet(**kwargs)
    try:
        assert create_network("own_network", n_out=2)(torch.zeros(2, 5, 8, 8)).shape == (2, 2)
        with pytest.raises(BadInput, match="architecture already"): models.architecture(own_network)
    finally: del ARCHITECTURES["own_network"]
    with pytest.raises(BadInput, match="xresnet18_hybrid.*simple_deconv"): create_network("own_network")
    with pytest.raises(BadInput, match="cannot be built.*colour"): create_network("xresnet18", colour=1)


@pytest.mark.parametrize("shape", [(64, 64), (45, 45), (40, 56)])
def test_photometry_agrees_with_photutils(shape):
    from photutils.aperture import CircularAperture, aperture_photometry
    rng, radii = np.random.default_rng(0), (1 / 8, 1 / 2, 15 / 16)
    softening, mean, std = np.array([0.5, 1.0, 2.0]), rng.normal(size=3), rng.uniform(1, 2, 3)
    flux = rng.gamma(0.3, 3, (2, 3, *shape)) - 0.1
    stretched = (np.arcsinh(flux / softening[:, None, None]) - mean[:, None, None]) / std[:, None, None]
    measure = models.AperturePhotometry(3, radii)
    measure.set_stretch(softening, mean, std)
    centre, R = ((shape[1] - 1) / 2, (shape[0] - 1) / 2), [r * min(shape) / 2 for r in radii]
    circles = [CircularAperture(centre, r) for r in R]
    area = np.array([c.to_mask(method="center").data.sum() for c in circles])
    F = np.array([[[aperture_photometry(band, c, method="center")["aperture_sum"][0] for c in circles] for band in image] for image in flux])
    a = np.arcsinh(F / (2 * softening[:, None] / 5 * np.sqrt(area)))
    wanted = np.concatenate([a.reshape(2, -1), (a[:, 1:] - a[:, :-1]).reshape(2, -1), (a[:, :, 1:] - a[:, :, :-1]).reshape(2, -1)], 1)
    found = measure(torch.from_numpy(stretched.astype(np.float32)))
    assert found.shape == (2, measure.n_features) and np.allclose(found, wanted, atol=2e-4)


def test_photometry_is_for_every_network():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 64, 64)
    for name in ("simple_deconv", "xresnet18_hybrid"):
        plain, net = create_network(name, n_out=3), create_network(name, n_out=3, photometry=True)
        assert list(net.net.state_dict()) == list(plain.state_dict())
        net.net.load_state_dict(plain.state_dict())
        assert torch.equal(net.eval()(x), plain.eval()(x))              # silent at first
        nn.init.normal_(net.head[-1].weight)
        assert not torch.allclose(net(x), plain(x)) and torch.allclose(fold_deconv(net)(x), net(x), atol=1e-4)
        net.train()(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        with torch.autocast("cpu", torch.bfloat16): assert net.photometry(x).dtype == torch.float32
    with pytest.raises(BadInput, match="cannot be built.*colour"): create_network("xresnet18", photometry=True, colour=1)
    with pytest.raises(BadInput, match="NaN"): net(torch.full((2, 5, 64, 64), torch.nan))


def test_initial_weights_have_the_published_distributions():
    "He-normal with BatchNorm; He-uniform where an activation follows a deconvolution; PyTorch's default where none does; biases and last gains 0."
    torch.manual_seed(0)
    def check(weight, kind):
        w, fan_in = weight.detach().flatten(), weight[0].numel()
        variance = {"he normal": 2 / fan_in, "he uniform": 2 / fan_in, "default": 1 / (3 * fan_in)}[kind]
        n, kurtosis = len(w), (w ** 4).mean() / w.var() ** 2
        assert abs(w.var() / variance - 1) < 6 * math.sqrt(2 / n) and abs(kurtosis - (3 if "normal" in kind else 1.8)) < 6 * math.sqrt(24 / n)
        if "normal" not in kind: assert w.abs().max() <= math.sqrt(3 * variance) * 1.0001
    hybrid, deconv = xresnet18_hybrid(), create_network("xresnet18_deconv")
    for i in range(3): check(hybrid[i][0].weight, "he uniform"); check(deconv[i][0].weight, "he uniform")
    check(hybrid[5][0].convpath[1][0].weight, "he normal"); check(hybrid[11].weight, "he normal"); check(hybrid[4][1].convpath[3].conv.weight_orig, "he normal")
    check(deconv[5][0].convpath[0][0].weight, "he uniform"); check(deconv[5][0].convpath[1][0].weight, "default"); check(deconv[5][0].idpath[1][0].weight, "default")
    for net in (hybrid, deconv):
        assert all((p == 0).all() for k, p in net.named_parameters() if k.endswith("bias"))
        assert all((b.convpath[1][1].weight == 0).all() for b in net.modules() if isinstance(b, ResidualBlock) and len(b.convpath[1]) > 1)


def test_starts_near_unit_scale():
    torch.manual_seed(0)
    y = xresnet18(sa=True)(torch.randn(32, 5, 64, 64))
    assert 0.05 < y.std() < 5


NAN = torch.randn(4, 5, 32, 32)
NAN[1, 2, 3, 4], NAN[3, 0, 0, 0] = torch.nan, -torch.inf

@pytest.mark.parametrize("name", ["xresnet18_hybrid", "xresnet18", "simple_cnn"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("x, words", [(torch.zeros(2, 4, 64, 64), "4 channels, made for 5.*c_in=4"), (torch.zeros(2, 5, 2, 64), "2 × 64 pixels is smaller.*larger cutouts"),
    (torch.zeros(5, 64, 64), "Add the batch axis"), (NAN, "2 NaN or Inf.*objects 1, 3 of the batch.*Mask bad pixels"), (torch.zeros(2, 5, 32, 32, dtype=torch.int32), "int32 image.*float"),
    (np.zeros((2, 5, 32, 32)), "ndarray instead of a tensor.*as_tensor"), (torch.zeros(2, 5, 32, 32, dtype=torch.float64), "float64 images, torch.float32 weights"),
    (torch.zeros(2, 5, 32, 32, dtype=torch.bfloat16), "bfloat16 images.*autocast"), (torch.zeros(0, 5, 32, 32), "without images"), (torch.zeros(2, 5, 32, 32, device="meta"), "images on meta")])
def test_bad_images_are_named(name, train, x, words):
    net = create_network(name).train(train)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(BadInput, match=f"(?s)(?i){words}"): net(x)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)                 # averages are not poisoned

def test_smallest_image():
    with pytest.raises(BadInput, match="XResNet.*31 × 64 pixels is smaller"): xresnet18_hybrid()(torch.zeros(2, 5, 31, 64))
    for net in (xresnet18_hybrid(), create_network("simple_deconv")): assert net(torch.randn(2, 5, 32, 32)).isfinite().all()

def test_extreme_but_finite_images_pass():
    "The sum of the pixels overflows; no pixel does."
    x = torch.full((2, 5, 32, 32), 3e38)
    models.check_batch(xresnet18(), x, 32)


def test_bad_arguments_are_named():
    with pytest.raises(BadInput, match="groups=64 does not divide"): xresnet18(widen=0.7)
    with pytest.raises(BadInput, match="Choose from xresnet18"): create_network("resnet")
    with pytest.raises(BadInput, match="stem_deconv=4, there are 3"): xresnet18(stem_deconv=4)
    with pytest.raises(BadInput, match="body_deconv=-1"): xresnet18(body_deconv=-1)
    with pytest.raises(BadInput, match="pool='median'.*'gem'"): xresnet18(pool="median")
    with pytest.raises(BadInput, match="stem_pool='gem'.*'blur'"): xresnet18(stem_pool="gem")


def fastai2_file(path, net, **opt):
    "What `learn.save` of fastai 2 writes: the model's and the optimiser's state, lists of fastai's class L in the latter."
    hypers = L([dict(wd=0.01, sqr_mom=0.99, lr=0.03, mom=0.95)])
    state = [dict(count=3, since_k=1, grad_avg=torch.zeros(2), sqr_avg=torch.ones(2), slow_weights=torch.zeros(2))]
    torch.save({"model": net.state_dict(), "opt": dict(state=L(state), hypers=hypers) | opt}, path)
    return path

@pytest.mark.parametrize("name", ["simple_cnn", "xresnet18_hybrid"])
def test_checkpoint_of_fastai_loads(tmp_path, name):
    torch.manual_seed(0)
    net = create_network(name)
    net(torch.randn(3, 5, 40, 40))
    plain = tmp_path / "plain.pth"
    torch.save(net.state_dict(), plain)
    for path in (plain, fastai2_file(tmp_path / "fastai.pth", net)):
        other = create_network(name)
        assert load_checkpoint(other, path) is other
        assert list(other.state_dict()) == list(net.state_dict())                        # nothing of `opt` has come along
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), net.state_dict().values()))
        assert models.read_checkpoint(path).keys() == net.state_dict().keys()
    x = torch.randn(2, 5, 32, 32)
    assert torch.equal(other.eval()(x), net.eval()(x))
    with pytest.raises(pickle.UnpicklingError, match="fastcore"): torch.load(tmp_path / "fastai.pth", weights_only=True)   # L is not allowed for good


def test_checkpoints_load_strictly(tmp_path):
    net, path = simple_cnn(), tmp_path / "x.pth"
    state = net.state_dict()
    for broken in ({k: v for k, v in state.items() if k != "0.0.weight"}, state | {"extra": torch.zeros(1)}, state | {"0.0.weight": torch.zeros(1)}):
        torch.save({"model": broken, "opt": {}}, path)
        with pytest.raises(BadInput, match="does not fit"): load_checkpoint(simple_cnn(), path)
    with pytest.raises(BadInput, match="does not fit"): load_checkpoint(simple_cnn(n_out=7), fastai2_file(path, net))


class Program: __reduce__ = lambda self: (print, ("the file ran a program",))

@pytest.mark.parametrize("thing", [Program(), Path("x"), collections.Counter(a=1), L, np.float64(1), print], ids=lambda t: getattr(t, "__name__", type(t).__name__))
@pytest.mark.parametrize("where", ["opt", "model", "inside L"])
def test_other_globals_are_refused(tmp_path, capsys, thing, where):
    "Every class or function but L, wherever it stands; L itself as a value is no harm, and is refused or dropped, and so is a number of NumPy."
    net, path = simple_cnn(), tmp_path / "evil.pth"
    if where == "opt": fastai2_file(path, net, extra=thing)
    elif where == "inside L": fastai2_file(path, net, state=L([thing]))
    else: torch.save({"model": net.state_dict() | {"extra": thing}, "opt": L()}, path)
    harmless = thing is L or type(thing) in (collections.Counter, np.float64)
    if harmless and where != "model": load_checkpoint(simple_cnn(), path); return
    with pytest.raises(BadInput, match="no state_dict" if harmless else "cannot be read as a checkpoint: it asks for"): load_checkpoint(simple_cnn(), path)
    assert "ran a program" not in capsys.readouterr().out


def test_what_fastai_saves_after_a_one_cycle_training_loads(tmp_path):
    "A schedule leaves NumPy numbers among the optimiser's settings."
    from fastai.data.core import DataLoaders
    from fastai.callback.schedule import Learner
    from fastai.optimizer import ranger
    data = [(torch.randn(5, 8, 8), torch.randn(6)) for _ in range(8)]
    learn = Learner(DataLoaders(*[torch.utils.data.DataLoader(data, 4)] * 2), simple_cnn(), nn.MSELoss(), opt_func=ranger, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    path = learn.save("after")
    with pytest.raises(pickle.UnpicklingError): torch.load(path, weights_only=True)
    loaded = load_checkpoint(simple_cnn(), path)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(loaded.state_dict().values(), learn.model.state_dict().values()))


def test_nothing_is_loaded_onto_meta(tmp_path):
    torch.save(simple_cnn().state_dict(), tmp_path / "x.pth")
    with torch.device("meta"): net = create_network("xresnet18_hybrid", stem_pool="blur", deconv=dict(freeze=True)), simple_cnn()
    with pytest.raises(BadInput, match="to_empty"): load_checkpoint(net[1], tmp_path / "x.pth")
    other = create_network("xresnet18_hybrid", stem_pool="blur", deconv=dict(freeze=True))
    filled = net[0].to_empty(device="cpu")
    filled.load_state_dict(other.state_dict())
    x = torch.randn(2, 5, 40, 40)
    assert torch.equal(filled.eval()(x), other.eval()(x)) and filled.train()(x).isfinite().all()


def test_transformations_and_gradients_of_torch_func():
    torch.manual_seed(0)
    net, x = simple_cnn(act_cls=Mish).double().eval(), torch.randn(3, 5, 16, 16, dtype=torch.float64)
    assert torch.allclose(torch.func.vmap(lambda one: net(one[None])[0])(x), net(x))
    leaf = x.clone().requires_grad_()
    usual, = torch.autograd.grad(net(leaf).sum(), leaf)
    assert torch.allclose(torch.func.grad(lambda v: net(v).sum())(x), usual)
    assert torch.allclose(torch.func.jvp(net, (x,), (x,))[1].sum(), (usual * x).sum())


def test_attention_survives_half_precision():
    torch.manual_seed(0)
    layer, x = SelfAttention(64).eval(), Mish()(4 * torch.randn(2, 64, 56, 56))
    with torch.autocast("cpu", torch.float16): low = layer(x.half())
    assert low.isfinite().all() and torch.allclose(low.float(), x, atol=0.02)              # gamma is 0 at the start
    with torch.no_grad(): layer.gamma += 1e-4
    with torch.autocast("cpu", torch.float16): low = layer(x.half())
    assert (low.float() - layer(x)).abs().max() < 2 ** -9 * layer(x).abs().max()           # two steps of float16 at the largest value


def test_blur_is_the_binomial_convolution():
    torch.manual_seed(0)
    for size in ((9, 12), (8, 7), (33, 32)):
        x, kernel = torch.randn(2, 3, *size), torch.tensor([0.25, 0.5, 0.25])
        padded = nn.functional.pad(nn.functional.max_pool2d(x, 3, 1, 1), (1, 1, 1, 1), mode="replicate")
        direct = nn.functional.conv2d(padded, torch.outer(kernel, kernel)[None, None].expand(3, 1, 3, 3), stride=2, groups=3)
        torch.testing.assert_close(models.BlurPool()(x), direct)


def test_one_small_image_in_training():
    with pytest.raises(BadInput, match="Use two images"): xresnet18_hybrid()(torch.randn(1, 5, 32, 32))
    with pytest.raises(BadInput, match="Use two images"): simple_cnn()(torch.randn(1, 5, 4, 4))
    assert xresnet18_hybrid().eval()(torch.randn(1, 5, 32, 32)).shape == (1, 6) and xresnet18_hybrid()(torch.randn(1, 5, 33, 32)).shape == (1, 6)


@pytest.mark.parametrize("kwargs, words", [(dict(c_in=0), "c_in=0"), (dict(groups=0), "groups=0"), (dict(stem_szs=()), "stem_szs"), (dict(reduction=100), "reduction=100"),
    (dict(deconv=dict(momentum=None)), "momentum=None"), (dict(deconv=dict(block=None)), "block=None"), (dict(deconv=dict(freeze_iter=0)), "freeze_iter=0")])
def test_impossible_arguments_are_named(kwargs, words):
    with pytest.raises(BadInput, match=words): xresnet18_hybrid(**kwargs)


def test_damaged_and_foreign_files(tmp_path):
    net, path = simple_cnn(), tmp_path / "x.pth"
    torch.save(net.state_dict(), path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(BadInput, match="cannot be read"): load_checkpoint(net, path)
    with pytest.raises(BadInput, match="is not there"): load_checkpoint(net, tmp_path / "absent.pth")
    with pytest.raises(BadInput, match="is a folder"): load_checkpoint(net, tmp_path)
    for text in ("", "epoch,loss"):
        (tmp_path / "text.pth").write_text(text)
        with pytest.raises(BadInput, match=r"cannot be read as a checkpoint: \w+Error"): load_checkpoint(net, tmp_path / "text.pth")
    torch.save([1, 2], path)
    with pytest.raises(BadInput, match="holds a list"): load_checkpoint(net, path)


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
