"Training: stretch, augmentation, loaders, reproducibility, bundles, and everything that can be wrong with the input."
import copy, json

import numpy as np, pandas as pd, pytest, torch
from torch import nn

from spectranb.core import BadInput
from spectranb.training import (Batches, Images, InputTransform, PublishedMSE, TrainedNetwork, TrueMSE, apply_d4, bin_pixels, centre_crop, check_training_data, drop_bands,
                                fast_precision, make_learner, rotate, train_network)

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


# --- augmentation ---
def test_d4_is_a_group_and_drawn_evenly():
    x = torch.randn(8, 5, 7, 7)
    views = apply_d4(x[:1].expand(8, -1, -1, -1), torch.arange(8))
    assert len({v.numpy().tobytes() for v in views}) == 8
    again = {w.numpy().tobytes() for k in range(8) for w in apply_d4(views, torch.full((8,), k))}
    assert again == {v.numpy().tobytes() for v in views}                        # closed under composition
    counts = torch.bincount(torch.randint(8, (80_000,), generator=torch.Generator().manual_seed(0)), minlength=8)
    assert (counts - 10_000).abs().max() < 5 * 100
    x[0, 0, 2, 3] = torch.nan
    assert apply_d4(x, torch.arange(8)).isnan().sum() == 1

def test_each_image_has_its_own_symmetry(toy):
    images = Images(toy[0], np.arange(64), InputTransform.fit(toy[0], crop=16))
    (x, _), = Batches(images, toy[1][:64], 64, augment=True)
    plain = images[np.arange(64)]
    kind = [[torch.equal(apply_d4(plain[i:i + 1], torch.tensor([k]))[0], x[i]) for k in range(8)].index(True) for i in range(64)]
    assert set(kind) == set(range(8))

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


# --- metrics ---
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
    assert list(h.columns) == ["epoch", "train_loss", "valid_loss", "mse", "published_mse"] and h.epoch.tolist() == [1, 2] and np.isfinite(h.to_numpy()).all()
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

def test_other_targets_and_networks(toy):
    net = train_network(toy[0], toy[1][:, :2], np.arange(128), np.arange(128, 160), net_kwargs=dict(widths=(8, 8, 8)), **SMALL | dict(arch="simple_deconv"))
    assert net.predict(toy[0][:3]).shape == (3, 2)

@pytest.mark.parametrize("change, words", [
    (dict(targets=np.full((160, 6), np.nan)), "160 rows have NaN"), (dict(targets=np.ones((160, 6))), r"column \[0, 1, 2, 3, 4, 5\] is constant"),
    (dict(valid_idx=np.arange(120, 160)), "8 galaxies are in both parts"), (dict(train_idx=np.arange(20)), "less than a batch of 32"),
    (dict(targets=np.ones((159, 6))), "159 rows for 160 cutouts"), (dict(valid_idx=np.array([150, 160])), "of 160 galaxies"), (dict(cutouts=np.zeros((160, 20, 20))), "bands, H, W"),
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
