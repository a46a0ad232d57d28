"Training: stretch, augmentation, loaders, reproducibility, bundles, and everything that can be wrong with the input."
import json, subprocess, sys, threading, time

import numpy as np, pandas as pd, pytest, torch
from scipy import ndimage
from scipy.stats import chi2
from sklearn.metrics import r2_score, root_mean_squared_error
from torch import nn

from spectranb.core import BadInput
from spectranb.loading import asinh, read_ahead, resident_bytes
from spectranb.training import (PUBLISHED, Batches, Images, InputTransform, LatentR2, LatentRMSE, PublishedMSE, TrainedNetwork, TrueMSE, apply_d4, bin_pixels, centre_crop,
                                check_training_data, drop_bands, fast_precision, make_batches, make_learner, peak_lr, rotate, train_network)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(0)
    cutouts = rng.normal(0, 0.1, (160, 5, 20, 20))
    targets = rng.normal(size=(160, 6)).astype(np.float32)
    cutouts[:, :, 9:12, 9:12] += np.exp(targets[:, :5, None, None])
    return cutouts.astype(np.float16), targets

SMALL = dict(arch="simple_cnn", crop=16, epochs=2, batch_size=32, progress=False)

@pytest.fixture(scope="module")
def trained(toy): return train_network(*toy, np.arange(128), np.arange(128, 160), **SMALL)


# --- the stretch ---
def test_transform_keeps_missing_apart_from_zero_flux(toy):
    transform = InputTransform.fit(toy[0], crop=20)
    x = torch.zeros(1, 5, 20, 20); x[0, 4] = torch.nan
    y = transform(x)
    assert (y[0, 4] == 0).all() and torch.allclose(y[0, 0], (-transform.mean / transform.std)[0].expand(20, 20))
    assert transform(torch.full((1, 5, 20, 20), torch.inf)).isfinite().all()

def test_transform_is_fitted_past_missing_data(toy):
    cutouts = toy[0].astype(np.float32)
    reference = InputTransform.fit(cutouts, crop=20)
    cutouts[::3, 2] = np.nan; cutouts[:, :, 0, :] = np.nan
    gappy = InputTransform.fit(cutouts, crop=20)
    assert torch.allclose(gappy.softening, reference.softening, rtol=0.1) and gappy.std.isfinite().all()

@pytest.mark.parametrize("size, crop, bin", [(20, 16, 2), (21, 20, 1), (20, 20, 4)])
def test_transform_sizes(size, crop, bin):
    t = InputTransform(np.ones(5), np.zeros(5), np.ones(5), crop, bin)
    x = torch.rand(2, 5, size, size)
    assert t(x).shape == (2, 5, t.size, t.size)
    torch.testing.assert_close(bin_pixels(centre_crop(x, crop), bin).sum(), centre_crop(x, crop).sum())

def test_transform_complains():
    with pytest.raises(BadInput, match="no multiple"): InputTransform(np.ones(5), np.ones(5), np.ones(5), crop=15, bin=2)
    with pytest.raises(BadInput, match="smaller than the crop of 64"): InputTransform.fit(np.zeros((3, 5, 20, 20), np.float32))
    with pytest.raises(BadInput, match="no data in band y"): InputTransform.fit(np.where(np.arange(5)[None, :, None, None] == 4, np.nan, np.random.rand(9, 5, 20, 20)), crop=16)
    with pytest.raises(BadInput, match="pixels of a band are equal"): InputTransform.fit(np.zeros((3, 5, 20, 20), np.float32), crop=16)


def test_stretch_is_lupton_s_asinh_and_goes_with_the_model(toy, trained, tmp_path):
    softening, mean, std = [np.array(v)[:, None, None] for v in ([.1, .2, .3, .4, .5], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5])]
    t = InputTransform(softening, mean, std, crop=20)
    np.testing.assert_allclose(t(torch.from_numpy(toy[0])), (np.arcsinh(toy[0].astype(float) / softening) - mean) / std, rtol=1e-5, atol=1e-5)
    trained.save(tmp_path)
    loaded = TrainedNetwork.load(tmp_path).transform
    assert torch.equal(loaded.softening, trained.transform.softening) and (loaded.softening > 0).all() and torch.equal(loaded.std, trained.transform.std)

def test_asinh_is_exact_to_rounding():
    x = torch.cat([-torch.logspace(-30, 15, 5000), torch.zeros(1), torch.logspace(-30, 15, 5000)])
    np.testing.assert_allclose(asinh(x).double(), np.arcsinh(x.double().numpy()), rtol=5e-7)
    assert asinh(torch.tensor(torch.nan)).isnan() and asinh(torch.tensor(-torch.inf)) == -torch.inf
    x = torch.linspace(-3, 3, 7).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(asinh(x).sum(), x)[0], 1 / (1 + x ** 2).sqrt())


# --- augmentation ---
def test_d4_is_a_group():
    x = torch.randn(8, 5, 7, 7)
    views = apply_d4(x[:1].expand(8, -1, -1, -1), torch.arange(8))
    assert len({v.numpy().tobytes() for v in views}) == 8
    again = {w.numpy().tobytes() for k in range(8) for w in apply_d4(views, torch.full((8,), k))}
    assert again == {v.numpy().tobytes() for v in views}                        # closed under composition
    x[0, 0, 2, 3] = torch.nan
    assert apply_d4(x, torch.arange(8)).isnan().sum() == 1

def test_each_image_has_its_own_symmetry(toy):
    images = Images(toy[0], np.arange(64), InputTransform.fit(toy[0], crop=16))
    (x, _), = Batches(images, toy[1][:64], 64, augment=True)
    plain = images[np.arange(64)]
    kind = [[torch.equal(apply_d4(plain[i:i + 1], torch.tensor([k]))[0], x[i]) for k in range(8)].index(True) for i in range(64)]
    assert set(kind) == set(range(8))

@pytest.mark.parametrize("world", [1, 4])
def test_all_symmetries_equally_often(world):
    n, rng = 64, np.random.default_rng(0)
    images = Images(rng.normal(size=(n, 5, 4, 4)).astype(np.float32), np.arange(n), InputTransform(np.full(5, 1e3), np.zeros(5), np.full(5, 1e-3), crop=4))
    views = torch.stack([apply_d4(images[np.arange(n)], torch.full((n,), k)) for k in range(8)], 1)
    counts, loader = torch.zeros(8), Batches(images, np.arange(n)[:, None], 32, augment=True, shuffle=True, rank=world - 1, world=world)
    for _ in range(100):
        for x, y in loader: counts += torch.bincount((views[y[:, 0].long()] - x[:, None]).abs().amax((2, 3, 4)).argmin(1), minlength=8)
    assert counts.sum() == 100 * n / world
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < chi2.ppf(0.9999, 7)

@pytest.mark.parametrize("size", [224, 112, 65])
def test_a_galaxy_at_the_centre_stays_there(size):
    places = np.array([(size // 2 + a, size // 2 + b) for a in (-.5, 0, .5) for b in (-.5, 0, .5)])
    row, column = np.mgrid[:size, :size]
    x = torch.from_numpy(np.stack([np.exp(-((row - r) ** 2 + (column - c) ** 2) / 40) for r, c in places]))[:, None].float()
    angle = np.linspace(-10, 10, 9)
    turned = rotate(x, torch.from_numpy(angle))[:, 0].numpy()
    found = np.array([ndimage.center_of_mass(t) for t in turned])
    middle, a = (size - 1) / 2, np.radians(angle)
    d = places - middle                                                          # rows count upwards: counter-clockwise on the array turns (row, column) so
    expected = middle + np.stack([d[:, 0] * np.cos(a) - d[:, 1] * np.sin(a), d[:, 0] * np.sin(a) + d[:, 1] * np.cos(a)], 1)
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert np.linalg.norm(found - places, axis=1).max() < 0.25

def test_a_mirror_and_a_turn_are_one_matrix():
    x, element, degrees = torch.randn(64, 2, 31, 31), torch.arange(8).repeat(8), torch.linspace(-170, 170, 64)
    torch.testing.assert_close(rotate(x, degrees, element), rotate(apply_d4(x, element), degrees), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(rotate(x, torch.zeros(64), element), apply_d4(x, element), atol=1e-4, rtol=1e-4)

def test_rotation_agrees_with_scipy():
    x = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(64, 64)), 3)
    ours = rotate(torch.from_numpy(x)[None, None], torch.tensor([8.0]))[0, 0].numpy()
    theirs = ndimage.rotate(x, 8, reshape=False, order=1)
    assert np.abs(ours - theirs)[10:-10, 10:-10].max() < 1e-5

def test_missing_pixels_stay_missing_through_everything():
    cutouts = np.random.default_rng(0).normal(1, 0.1, (40, 5, 32, 32)).astype(np.float16)
    cutouts[:, 4], cutouts[:, 1, 8:24, 8:24] = np.nan, np.nan
    images = Images(cutouts, np.arange(40), InputTransform(np.ones(5), np.full(5, 20.0), np.ones(5), crop=32))        # what is there is near -19
    for x, _ in Batches(images, np.zeros((40, 1)), 20, augment=True, rotate=10, shuffle=True):
        assert (x[:, 4] == 0).all() and (x[:, 1, 12:20, 12:20] == 0).all() and x.isfinite().all()
        assert (x[:, (0, 2, 3)] < -18).all() and ((x[:, 1] == 0) | (x[:, 1] < -18)).all()      # no mixture of data and nothing
        assert ((x[:, 1] == 0).sum((1, 2)) >= 16 * 16).all()

def test_rotation_turns_about_the_centre_and_keeps_the_mask():
    x = torch.randn(2, 1, 21, 21)
    torch.testing.assert_close(rotate(x, torch.zeros(2)), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(x, torch.tensor([90.0, 180.0])), torch.stack([x[0].rot90(1, (-2, -1)), x[1].rot90(2, (-2, -1))]), atol=1e-4, rtol=1e-4)
    x[:, :, 4, 6] = torch.nan; x[1] = torch.nan
    y = rotate(x, torch.tensor([10.0, -10.0]))
    assert 1 <= y[0].isnan().sum() <= 9 and y[1].isnan().all()

def test_band_dropout():
    g = torch.Generator().manual_seed(1)
    x = drop_bands(torch.ones(5000, 5, 1, 1), 0.95, g)[:, :, 0, 0]
    assert x.sum(1).min() == 1 and (x.mean(0) > 0.15).all()                     # never all of them; no favourite
    assert torch.equal(drop_bands(torch.ones(9, 5, 2, 2), 0.0), torch.ones(9, 5, 2, 2))


# --- loaders ---
def test_kept_and_streamed_images_agree(tmp_path, toy):
    np.save(tmp_path / "c.npy", toy[0])
    mapped = np.load(tmp_path / "c.npy", mmap_mode="r")
    transform = InputTransform.fit(mapped, crop=16, bin=2)
    idx = np.random.default_rng(0).permutation(160)[:70]
    kept, streamed = Images(mapped, idx, transform), Images(mapped, idx, transform, keep=0)
    pick = np.array([5, 69, 0, 5])
    expected = transform.stretch(torch.from_numpy(toy[0][idx[pick]].astype(np.float32)))
    torch.testing.assert_close(streamed[pick], expected)
    torch.testing.assert_close(kept[pick], expected, atol=5e-3, rtol=2e-3)

def test_batches_cover_every_galaxy_and_repeat(toy):
    images = Images(toy[0], np.arange(100), InputTransform.fit(toy[0], crop=16))
    targets = np.arange(100.0)[:, None]
    valid = torch.cat([y for _, y in Batches(images, targets, 32)])
    assert torch.equal(valid[:, 0], torch.arange(100.0))
    train = Batches(images, targets, 32, shuffle=True, seed=3)
    first, second = [torch.cat([y for _, y in train])[:, 0] for _ in range(2)]
    assert len(first) == 96 and len(set(first.tolist())) == 96 and not torch.equal(first, second)
    train.epoch = 1                                                             # continue in the middle
    assert torch.equal(torch.cat([y for _, y in train])[:, 0], second)


def mapped(tmp_path, cutouts):
    np.save(tmp_path / "c.npy", cutouts)
    return np.load(tmp_path / "c.npy", mmap_mode="r")

AUGMENTED = dict(augment=True, rotate=10, band_dropout=0.3, shuffle=True, seed=7)

@pytest.mark.parametrize("keep", [0, 1e9])
def test_processes_share_each_batch(tmp_path, toy, keep):
    images = Images(mapped(tmp_path, toy[0]), np.arange(100), InputTransform.fit(toy[0], crop=16), keep=keep)
    targets = np.arange(100.0)[:, None]
    single = list(Batches(images, targets, 24, **AUGMENTED))
    shares = [list(Batches(images, targets, 24, **AUGMENTED, rank=r, world=4)) for r in range(4)]
    assert [len(s) for s in shares] == [4] * 4 and all(len(y) == 6 for s in shares for _, y in s)
    for k, (x, y) in enumerate(single):
        parts = [s[k] for s in shares]
        assert sorted(torch.cat([y for _, y in parts])[:, 0].tolist()) == sorted(y[:, 0].tolist())           # disjoint, and together the same
        found = {int(t): image for xs, ys in parts for image, t in zip(xs, ys[:, 0])}
        assert all(torch.equal(found[int(t)], image) for image, t in zip(x, y[:, 0]))                        # turned alike too
    valid = [Batches(images, targets, 12, rank=r, world=6) for r in range(6)]                                # 100 = 8 · 12 + 4: the last batch is for four
    assert [len(v) for v in valid] == [len(list(v)) for v in valid] == [9, 9, 9, 9, 8, 8]
    assert sorted(t for v in valid for _, y in v for t in y[:, 0].tolist()) == list(range(100))

def test_state_goes_on_in_another_process_s_place(toy):
    images = Images(toy[0], np.arange(100), InputTransform.fit(toy[0], crop=16))
    a, b = [Batches(images, toy[1][:100], 32, **AUGMENTED) for _ in range(2)]
    list(a); list(a)
    state = json.loads(json.dumps(a.state_dict()))                              # numbers only
    b.load_state_dict(state)
    for (x, y), (u, v) in zip(a, b, strict=True): assert torch.equal(x, u) and torch.equal(y, v)
    for name, value in dict(seed=8, images=99, batch_size=16).items():
        with pytest.raises(BadInput, match=f"made with {name} = {value}"): a.load_state_dict(state | {name: value})

@pytest.mark.parametrize("change, words", [(dict(batch_size=30, world=4), "30 cannot be shared by process 0 of 4"), (dict(rank=2, world=2), "process 2 of 2"),
                                           (dict(batch_size=128), "100 are less than a batch of 128"), (dict(targets=np.zeros((99, 1))), "99 rows for 100 images")])
def test_bad_batches_are_named(toy, change, words):
    images = Images(toy[0], np.arange(100), InputTransform.fit(toy[0], crop=16))
    with pytest.raises(BadInput, match=words): Batches(**dict(images=images, targets=np.zeros((100, 1)), batch_size=32, shuffle=True) | change)

def test_rows_are_read_in_the_order_of_the_disk(toy):
    class Noted(np.ndarray):
        def __getitem__(self, i): rows.append(i); return super().__getitem__(i)
    images, rows = Images(toy[0], np.arange(159, -1, -1), InputTransform.fit(toy[0], crop=16), keep=0), []
    images.cutouts = images.cutouts.view(Noted)
    pick = np.random.default_rng(0).permutation(160)[:50]
    raw = images.fetch(pick)
    assert rows == sorted(rows) and len(rows) == 50 and np.array_equal(raw.numpy(), toy[0][159 - pick, :, 2:18, 2:18])

def test_what_may_stay_in_memory(toy):
    transform, bytes_ = InputTransform.fit(toy[0], crop=16), 160 * 5 * 16 * 16 * 2
    assert Images(toy[0], np.arange(160), transform, keep=bytes_).kept.nbytes == bytes_ and Images(toy[0], np.arange(160), transform, keep=bytes_ - 1).kept is None
    assert resident_bytes("cpu") == 2e9

@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_read_ahead_keeps_order_and_depth(depth):
    running, most, lock = 0, 0, threading.Lock()
    def work(k):
        nonlocal running, most
        with lock: running += 1; most = max(most, running)
        time.sleep(0.001 * (k % 3))
        with lock: running -= 1
        return -k
    assert list(read_ahead(work, range(30), depth)) == [-k for k in range(30)] and most <= max(1, depth)

def test_read_ahead_reads_no_further_than_asked():
    begun = []
    stream = read_ahead(begun.append, range(100), 3)
    next(stream); time.sleep(0.05)
    assert len(begun) == 4
    stream.close()
    assert len(begun) == 4

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("keep", [0, None])
def test_batches_on_a_gpu_are_those_on_the_processor(tmp_path, toy, keep):
    cutouts, transform = mapped(tmp_path, toy[0]), InputTransform.fit(toy[0], crop=16)
    here, there = [Images(cutouts, np.arange(160), transform, device, keep) for device in ("cpu", "cuda")]
    assert there.fetch(np.arange(3)).is_pinned() and (there.kept is None) == (keep == 0)
    for (x, y), (u, v) in zip(Batches(here, toy[1], 32, **AUGMENTED), Batches(there, toy[1], 32, **AUGMENTED), strict=True):
        assert u.is_cuda and torch.equal(y, v.cpu())
        torch.testing.assert_close(x, u.cpu(), atol=0.02, rtol=0.01)

class Broken(Images):
    def fetch(self, positions):
        if 40 in positions: raise OSError("input/output error")
        return super().fetch(positions)

def test_an_error_while_reading_reaches_the_user(toy):
    before = threading.active_count()
    transform = InputTransform.fit(toy[0], crop=16)
    loader = Batches(Broken(toy[0], np.arange(100), transform, keep=0), toy[1][:100], 16)
    seen = []
    with pytest.raises(OSError, match="input/output"):
        for x, _ in loader: seen.append(len(x))
    assert seen == [16, 16] and threading.active_count() == before
    with pytest.raises(OSError, match="input/output"): Broken(toy[0], np.arange(100), transform)               # while they are made resident
    train, valid = Batches(Broken(toy[0], np.arange(100), transform, keep=0), toy[1][:100], 16, shuffle=True), Batches(Images(toy[0], np.arange(100, 160), transform), toy[1][100:], 16)
    from spectranb.models import simple_cnn
    with pytest.raises(OSError, match="input/output"): make_learner(train, valid, simple_cnn()).fit(1, 1e-3)
    assert threading.active_count() == before

def test_an_early_stop_leaves_no_thread(toy):
    loader = Batches(Images(toy[0], np.arange(160), InputTransform.fit(toy[0], crop=16), keep=0), toy[1], 16)
    before = threading.active_count()
    for _ in loader: break
    stream = iter(loader); next(stream); stream.close()
    assert threading.active_count() == before

def test_a_program_that_stops_in_mid_epoch_ends():
    program = "import time; from spectranb.loading import read_ahead; s = read_ahead(lambda k: time.sleep(0.01), range(10**6)); next(s); raise SystemExit(3)"
    assert subprocess.run([sys.executable, "-c", program], timeout=100).returncode == 3


# --- metrics ---
def test_latent_metrics_agree_with_sklearn():
    rng = np.random.default_rng(0)
    target = rng.normal(3, 1, (90, 6)); pred = target + rng.normal(0, 0.5, (90, 6))
    for k in range(6):
        for metric, reference in ((LatentRMSE(k), root_mean_squared_error), (LatentR2(k), r2_score)):
            metric.reset()
            assert metric.value is None
            for a in range(0, 90, 32): metric.accumulate(type("Learn", (), dict(pred=torch.tensor(pred[a:a + 32]), y=torch.tensor(target[a:a + 32]))))
            assert metric.value == pytest.approx(reference(target[:, k], pred[:, k])) and metric.name in (f"rmse_{k + 1}", f"r2_{k + 1}")

def test_metrics_by_hand(toy):
    true, published = TrueMSE(), PublishedMSE()
    class Learn: pass
    pred, target = np.random.default_rng(0).normal(size=(2, 70, 6))
    for m in (true, published): m.reset()
    for a in range(0, 70, 32):
        learn = Learn(); learn.pred, learn.y = torch.tensor(pred[a:a + 32]), torch.tensor(target[a:a + 32])
        for m in (true, published): m.accumulate(learn)
    e2 = (pred - target) ** 2
    assert true.value == pytest.approx(e2.mean())
    assert published.value == pytest.approx((sum(np.sqrt(e2[a:a + 32].mean()) * len(e2[a:a + 32]) for a in range(0, 70, 32)) / 70) ** 2)


# --- training ---
def test_it_learns_and_reports(trained, toy):
    h = trained.history
    assert list(h.columns) == ["epoch", "train_loss", "valid_loss", "mse", "published_mse", *(f"rmse_{k}" for k in range(1, 7)), *(f"r2_{k}" for k in range(1, 7))] and h.epoch.tolist() == [1, 2] and np.isfinite(h.to_numpy()).all()
    longer = train_network(*toy, np.arange(128), np.arange(128, 160), **SMALL | dict(epochs=12, batch_size=16, loss="rmse", band_dropout=0))
    assert longer.history.mse.iloc[-1] < 0.75 * longer.history.mse.iloc[0]
    assert longer.config["lr"] == 0.03 and longer.config["n_train"] == 128

def test_seed_decides_everything(toy):
    def train(seed): return train_network(*toy, np.arange(96), np.arange(128, 160), seed=seed, rotate=10, **SMALL)
    before = torch.random.get_rng_state()
    a, b, c = train(1), train(1), train(2)
    assert torch.equal(before, torch.random.get_rng_state())                    # the caller's random numbers are left alone
    assert all(torch.equal(u, v) for u, v in zip(a.net.state_dict().values(), b.net.state_dict().values())) and a.history.equals(b.history)
    assert not torch.equal(a.net[-1].weight, c.net[-1].weight)

def test_seed_decides_the_first_weights(toy):
    a, b = [train_network(*toy, np.arange(96), np.arange(128, 160), seed=s, **SMALL | dict(lr=1e-30)) for s in (1, 2)]
    assert not torch.allclose(a.net[0][0].weight, b.net[0][0].weight)

def test_bfloat16_trains_like_float32(toy):
    low, high = [train_network(*toy, np.arange(128), np.arange(128, 160), precision=p, **SMALL) for p in (torch.bfloat16, torch.float32)]
    assert abs(low.history.mse.iloc[-1] - high.history.mse.iloc[-1]) < 0.05
    assert all(p.dtype == torch.float32 for p in low.net.parameters())

def test_fast_precision_answers(): assert fast_precision("cpu") in (torch.bfloat16, torch.float32)

def test_nan_loss_stops_with_a_reason(toy):
    with pytest.raises(BadInput, match="in epoch 1, batch"): train_network(*toy, np.arange(128), np.arange(128, 160), **SMALL | dict(lr=1e30))

def test_a_dead_network_is_noticed(toy):
    class Dead(nn.Module):
        def __init__(self): super().__init__(); self.out = nn.Parameter(torch.zeros(6))
        def forward(self, x): return self.out.expand(len(x), 6)
    transform = InputTransform.fit(toy[0], crop=16)
    learn = make_learner(*make_batches(*toy, np.arange(128), np.arange(128, 160), transform, batch_size=32), Dead())
    with pytest.raises(BadInput, match="all 32 validation galaxies got the same prediction in 2 epochs, up to epoch 2"): learn.fit(4, 1e-3)
    learn.fit(1, 1e-3)                                                          # one epoch is no proof

def test_published_settings(toy):
    assert (PUBLISHED["crop"], PUBLISHED["batch_size"], PUBLISHED["wd"], PUBLISHED["rotate"], PUBLISHED["epochs"]) == (224, 128, 1e-2, 10, 10)
    assert [peak_lr(a) for a in ("xresnet18", "xresnet18_hybrid", "xresnet18_deconv", "simple_cnn", "simple_deconv")] == [3e-2, 3e-2, 3e-3, 3e-2, 3e-2]
    net = train_network(*toy, np.arange(128), np.arange(128, 160), "simple_cnn", **PUBLISHED | dict(crop=16, batch_size=32, epochs=1), progress=False)
    assert net.config["loss"] == "rmse" and len(net.history) == 1 and "classes" not in net.config

def test_streamed_training_is_resident_training(toy, tmp_path):
    "Two processes' worth of what may differ: where the images are, not what is learned."
    cutouts = mapped(tmp_path, toy[0])
    a, b = [train_network(cutouts, toy[1], np.arange(128), np.arange(128, 160), keep=keep, rotate=10, **SMALL) for keep in (None, 0)]
    np.testing.assert_allclose(a.history, b.history, rtol=0.02, atol=0.01)      # float16 beside float32 images

CLASSES = np.array(["GALAXY"] * 150 + ["QSO"] * 10)

def test_a_class_left_out_is_named(toy):
    with pytest.raises(BadInput, match="10 of class QSO in the validation part, none in the training part"):
        train_network(*toy, np.arange(128), np.arange(128, 160), classes=CLASSES, **SMALL)
    with pytest.warns(UserWarning, match=r"no galaxy to validate on of class QSO \(10 in the training part\)"): check_training_data(*toy, np.arange(32, 160), np.arange(32), classes=CLASSES)
    check_training_data(*toy, np.arange(10, 155), np.r_[:10, 155:160], classes=CLASSES)

def test_other_targets_and_networks(toy):
    net = train_network(toy[0], toy[1][:, :2], np.arange(128), np.arange(128, 160), net_kwargs=dict(widths=(8, 8, 8)), **SMALL | dict(arch="simple_deconv"))
    assert net.predict(toy[0][:3]).shape == (3, 2)

@pytest.mark.parametrize("change, words", [
    (dict(targets=np.full((160, 6), np.nan)), "160 rows have NaN"), (dict(targets=np.ones((160, 6))), r"column \[0, 1, 2, 3, 4, 5\] is constant"),
    (dict(valid_idx=np.arange(120, 160)), "8 galaxies are in both parts"), (dict(train_idx=np.arange(20)), "less than a batch of 32"),
    (dict(targets=np.ones((159, 6))), "159 rows for 160 cutouts"), (dict(valid_idx=np.array([], int)), "no galaxies to validate on"),
    (dict(targets=np.where(np.arange(160)[:, None] < 128, 1.0, np.random.randn(160, 6))), "is constant"), (dict(targets=np.where(np.arange(960).reshape(160, 6) == 300, np.nan, 1.0)), "1 rows have NaN"), (dict(valid_idx=np.array([150, 160])), "of 160 galaxies"), (dict(cutouts=np.zeros((160, 20, 20))), "bands, H, W"),
    (dict(arch="resnet"), "no network known"), (dict(crop=64), "smaller than the crop")])
def test_bad_training_data_is_named(toy, change, words):
    good = dict(cutouts=toy[0], targets=toy[1], train_idx=np.arange(128), valid_idx=np.arange(128, 160), **SMALL)
    with pytest.raises(BadInput, match=words): train_network(**good | change)


# --- prediction and bundles ---
def test_predict(trained, toy):
    one, all_ = trained.predict(toy[0][7]), trained.predict(toy[0], batch_size=50)
    assert one.shape == (1, 6) and all_.shape == (160, 6) and all_.dtype == np.float32
    np.testing.assert_allclose(one[0], all_[7], atol=1e-5)
    with torch.no_grad(): direct = trained.net(trained.transform(torch.from_numpy(toy[0].astype(np.float32))))
    np.testing.assert_allclose(all_, direct, atol=1e-4)
    turned = np.ascontiguousarray(np.rot90(toy[0], axes=(2, 3)))
    np.testing.assert_allclose(trained.predict(turned, tta=True), trained.predict(toy[0], tta=True), atol=1e-4)      # the same from every side
    gap = toy[0][:4].astype(np.float32); gap[1, 3] = np.nan; gap[2] = np.nan
    out = trained.predict(gap)
    assert np.isfinite(out[[0, 1, 3]]).all() and np.isnan(out[2]).all() and np.allclose(out[0], all_[0], atol=1e-5)
    assert trained.predict(toy[0][:0].reshape(0, 5, 20, 20)).shape == (0, 6)

@pytest.mark.parametrize("x, words", [(np.zeros((2, 4, 20, 20)), r"shape \(2, 4, 20, 20\)"), (np.zeros((20, 20)), r"shape \(20, 20\)"), (np.zeros((1, 5, 10, 10)), "smaller than the crop of 16")])
def test_predict_names_bad_cutouts(trained, x, words):
    with pytest.raises(BadInput, match=words): trained.predict(x)

def test_bundle_round_trip(trained, toy, tmp_path):
    trained.save(tmp_path / "a" / "b")
    loaded = TrainedNetwork.load(tmp_path / "a" / "b")
    assert np.array_equal(loaded.predict(toy[0]), trained.predict(toy[0])) and loaded.arch == "simple_cnn" and loaded.config["epochs"] == 2
    pd.testing.assert_frame_equal(loaded.history, trained.history)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["history.csv", "network.json", "weights.safetensors"]
    trained.save(tmp_path / "a" / "b")                                          # a second time over the first

def test_half_a_bundle_is_nearly_as_good(trained, toy, tmp_path):
    trained.save(tmp_path / "whole"); trained.save(tmp_path / "half", half=True)
    whole, half = [TrainedNetwork.load(tmp_path / name) for name in ("whole", "half")]
    sizes = [(tmp_path / name / "weights.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.62 * sizes[0] and all(p.dtype == torch.float32 for p in half.net.parameters())
    for (name, a), b in zip(whole.net.named_buffers(), half.net.buffers()): assert torch.equal(a, b), name      # statistics as they were
    assert 0 < np.abs(whole.predict(toy[0]) - half.predict(toy[0])).max() < 0.01

def test_photometry_knows_the_stretch_and_travels_along(toy, tmp_path):
    network = train_network(*toy, np.arange(128), np.arange(128, 160), **SMALL, net_kwargs=dict(photometry=True))
    for name in ("softening", "mean", "std"): assert torch.equal(getattr(network.net.photometry, name), getattr(network.transform, name))
    network.save(tmp_path / "n")
    assert np.array_equal(TrainedNetwork.load(tmp_path / "n").predict(toy[0]), network.predict(toy[0]))
    images = toy[0][:8, :, 2:18, 2:18].astype(np.float64)
    found = network.net.photometry(network.transform(torch.from_numpy(images.astype(np.float32))))[:, 4:25:5]       # the largest circle
    circle = np.hypot(*np.mgrid[-7.5:8, -7.5:8]) < 7.5
    noise = network.transform.softening[:, 0, 0].numpy() / 5 * np.sqrt(circle.sum())
    assert np.allclose(found, np.arcsinh(images[..., circle].sum(-1) / (2 * noise)), atol=1e-3)

@pytest.mark.parametrize("spoil", ["weights.safetensors", "network.json", "arch", "truncate"])
def test_spoiled_bundles_are_named(trained, tmp_path, spoil):
    trained.save(tmp_path)
    if spoil == "arch":
        info = json.loads((tmp_path / "network.json").read_text())
        (tmp_path / "network.json").write_text(json.dumps(info | dict(arch="simple_deconv")))
    elif spoil == "truncate": (tmp_path / "weights.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:1000])
    else: (tmp_path / spoil).unlink()
    with pytest.raises(BadInput, match="no trained network"): TrainedNetwork.load(tmp_path)

def test_learner_of_ones_own(toy):
    transform = InputTransform.fit(toy[0], crop=16)
    train, valid = [Batches(Images(toy[0], idx, transform), toy[1][idx], 32, shuffle=s) for idx, s in ((np.arange(128), True), (np.arange(128, 160), False))]
    from spectranb.models import simple_cnn
    learn = make_learner(train, valid, simple_cnn())
    learn.lr_find(num_it=8, show_plot=False)
    learn.fit(1, 1e-3)
    assert len(learn.recorder.values) == 1
