"Metrics against closed forms, features of images whose answer is known, baselines that must not see what they predict."
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st

from spectranb.core import PIXEL_SCALE, BadInput
from spectranb.results import (APERTURES, BASELINES, CEILING, FEATURE_SETS, GROWTH, aperture_photometry, asinh_mag, bootstrap, fit_boosting, fit_ridge,
                               format_table, latent_metrics, latent_mse, light_radii, measure_features, metrics_table, published_mse, ring_masks,
                               run_baselines, select_features, spectral_metrics, table_html, table_markdown, tune_boosting, unit_rms)

def grid(size): return (np.indices((size, size)) - size // 2) * PIXEL_SCALE

def galaxies(n=12, size=97, seed=0):                                 # inclined exponentials, each its own, with a clump and noise
    rng, (y, x) = np.random.default_rng(seed), grid(size)
    h, q, a = rng.uniform(0.6, 2, (n, 1, 1)), rng.uniform(0.4, 1, (n, 1, 1)), rng.uniform(0, np.pi, (n, 1, 1))
    u, v = np.cos(a) * x + np.sin(a) * y, (np.cos(a) * y - np.sin(a) * x) / q
    image = np.exp(-np.hypot(u, v) / h) + 0.3 * np.exp(-((x - 1.5) ** 2 + (y - 0.7) ** 2))
    scale = rng.uniform(5, 50, (n, 5, 1, 1))
    return (scale * image[:, None] + 0.02 * rng.standard_normal((n, 5, size, size))).astype(np.float32)

# metrics

def test_mean_predictor_scores_one():
    y = np.random.default_rng(0).normal(3, 5, (500, 6))
    y = (y - y.mean(0)) / y.std(0)
    assert latent_mse(np.zeros_like(y), y) == pytest.approx(1, abs=1e-12)
    assert np.allclose(latent_metrics(np.zeros_like(y), y)["r2"], 0)

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 150), st.integers(0, 2**32 - 1))
def test_published_mse_is_square_of_mean_batch_rmse(n, batch, seed):
    p, y = np.random.default_rng(seed).standard_normal((2, n, 3)) ** 3
    rmse = np.array([np.sqrt(np.square(p[i:i + batch] - y[i:i + batch]).mean()) for i in range(0, n, batch)])
    size = [len(p[i:i + batch]) for i in range(0, n, batch)]
    assert published_mse(p, y, batch) == pytest.approx(np.average(rmse, weights=size) ** 2)
    assert published_mse(p, y, batch) <= latent_mse(p, y) * (1 + 1e-12)

def test_published_mse_agrees_with_training():
    from types import SimpleNamespace
    from spectranb.training import PublishedMSE
    p, y = torch.randn(2, 300, 6, generator=torch.Generator().manual_seed(0))
    metric = PublishedMSE(); metric.reset()
    for i in range(0, 300, 128): metric.accumulate(SimpleNamespace(pred=p[i:i + 128], y=y[i:i + 128]))
    assert published_mse(p.numpy(), y.numpy()) == pytest.approx(metric.value, rel=1e-5)

def test_published_figures():                                        # RMSE and R² of each latent, hybrid, 50 epochs (Wu & Peek's printout)
    rmse = np.array([0.370, 0.662, 0.714, 0.729, 0.736, 0.818])
    y = np.random.default_rng(0).choice([-1.0, 1.0], (4000, 6))      # unit variance
    m = latent_metrics(y + rmse, y)
    assert np.allclose(m["rmse"][:6], rmse) and np.allclose(m["r2"][:6], [.863, .562, .491, .469, .459, .331], atol=2e-3)

def test_perfect_prediction_of_noisy_spectra():
    rng = np.random.default_rng(1)
    truth = unit_rms(1 + 0.3 * np.sin(np.linspace(0, 9, 1000) + rng.uniform(0, 6, (300, 1))))
    ivar = rng.uniform(100, 900, truth.shape) * (rng.random(truth.shape) > 0.1)
    flux = np.where(ivar > 0, truth + rng.standard_normal(truth.shape) / np.sqrt(np.maximum(ivar, 1)), -99)
    m = spectral_metrics(truth, flux, ivar, truth)
    assert m["deviation"].mean() == pytest.approx(np.sqrt(2 / np.pi), abs=0.005)
    assert m["chi2"].mean() == pytest.approx(1, abs=3 * np.sqrt(2 / 270_000)) and m["chi2"].std() == pytest.approx(np.sqrt(2 / 900), rel=0.2)
    assert m["rms_truth"].max() < 1e-12

def test_spectral_metrics_known_offset_and_scale():
    flux, ivar = np.ones((3, 1000)), np.full((3, 1000), 100.0)
    ivar[2] = 0
    wrong = np.ones((3, 1000)); wrong[:, ::2] *= 3                   # rms √5
    m = spectral_metrics(wrong, flux, ivar)
    off = np.abs(np.array([1, 3]) / np.sqrt(5) - 1)
    assert m["deviation"][0] == pytest.approx(10 * off.mean()) and m["chi2"][0] == pytest.approx(100 * np.square(off).mean())
    assert m.loc[2, ["deviation", "chi2", "residual"]].isna().all()
    free = spectral_metrics(wrong, 1.3 * wrong, ivar, free_scale=True)
    assert free["chi2"][:2].max() < 1e-9 < spectral_metrics(wrong, 1.3 * wrong, ivar)["chi2"][0]
    with pytest.raises(BadInput, match="shape"): spectral_metrics(wrong[:2], flux, ivar)

def test_bootstrap_of_mean_and_median():
    x = np.random.default_rng(2).standard_normal(4000)
    assert bootstrap(x, n_boot=800) == pytest.approx(1 / np.sqrt(4000), rel=0.12)
    assert bootstrap(x, np.median, n_boot=800) == pytest.approx(np.sqrt(np.pi / 2 / 4000), rel=0.15)
    assert bootstrap(x, seed=3) == bootstrap(x, seed=3) and bootstrap(np.ones(50)) == 0

# features

def test_rings_add_up_to_discs():
    assert np.allclose(ring_masks(GROWTH).sum(1).cumsum() * PIXEL_SCALE**2, np.pi * np.square(GROWTH), rtol=1e-5)

@pytest.mark.parametrize("size", [64, 96, 97, 224])
def test_aperture_flux_of_gaussian(size):
    (y, x), s = grid(size), 1.2
    image = np.tile(np.exp(-(x**2 + y**2) / 2 / s**2) * PIXEL_SCALE**2 / (2 * np.pi * s**2), (1, 5, 1, 1))
    expected = 1 - np.exp(-np.square(APERTURES) / 2 / s**2)
    inside = np.array(APERTURES) <= size // 2 * PIXEL_SCALE
    flux = aperture_photometry(image)[0]
    assert np.allclose(flux[:, inside], expected[inside], atol=2e-3)

def test_aperture_beyond_the_image_is_nan():
    flux = aperture_photometry(np.ones((1, 5, 40, 40)))[0, 0]        # ±5″
    assert np.isfinite(flux[:6]).all() and np.isnan(flux[-1])

def test_half_light_radius_of_exponential():
    y, x = grid(97)
    for h in (0.8, 1.2, 1.6):
        image = np.exp(-np.hypot(x, y) / h) * np.ones((1, 5, 1, 1))
        r20, r50, r80, r90 = light_radii(aperture_photometry(image, GROWTH)[:, 0])[0]
        assert np.allclose([r20 / h, r50 / h, r80 / h, r90 / h], [0.824, 1.678, 2.994, 3.890], rtol=0.03)

def test_turning_and_mirroring_change_nothing():
    images = galaxies()
    one = measure_features(images)
    for other in (np.rot90(images, 1, (2, 3)), np.rot90(images, 2, (2, 3)), images[..., ::-1], images.swapaxes(2, 3)):
        assert np.allclose(measure_features(other), one, rtol=3e-3, atol=3e-3, equal_nan=True)

def test_brightness_shifts_magnitudes_and_leaves_shapes():
    images = galaxies()
    one, ten = measure_features(images), measure_features(10 * images)
    mags = [c for c in one if c.startswith("mag_")]
    assert np.allclose((one - ten)[mags], 2.5, atol=0.02) and np.allclose(one.drop(columns=mags), ten.drop(columns=mags), rtol=1e-3, atol=1e-3)

def test_position_angle_free_ellipticity_and_symmetry():
    y, x = grid(97)
    round_, long = (np.exp(-np.hypot(x, y / q) / 1.5) * np.ones((1, 5, 1, 1)) for q in (1, 0.4))
    f = measure_features(np.concatenate([round_, long]))
    assert f["ellipticity_r_2"][0] < 1e-5 < 0.2 < f["ellipticity_r_2"][1]
    assert (f[["lopsided_r_2", "asymmetry_r_6", "m1_r_2"]].to_numpy() < 1e-4).all() and f["m2_r_2"][1] > 0.2 > 1e-3 > f["m2_r_2"][0]

def test_missing_band_is_nan_in_its_columns_only():
    images = galaxies()
    whole = measure_features(images)
    images[:, 4] = np.nan
    blind = measure_features(images)
    mine = [c for c in blind if c.startswith("mag_y")]
    assert blind[mine].isna().all().all() and np.allclose(blind.drop(columns=mine), whole.drop(columns=mine))
    for kind in FEATURE_SETS: assert select_features(blind, kind).notna().any(axis=1).all()

def test_no_warnings_and_no_infinities_for_odd_images(recwarn):
    images = np.stack([np.zeros((5, 96, 96)), np.full((5, 96, 96), np.nan), -np.ones((5, 96, 96)), np.full((5, 96, 96), 6e4)]).astype(np.float16)
    f = measure_features(images)
    assert not np.isinf(f.to_numpy()).any() and f.iloc[1].isna().all() and not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]

def test_chunks_and_memory_maps(tmp_path):
    images = galaxies().astype(np.float16)
    np.save(tmp_path / "c.npy", images)
    a, b = measure_features(images), measure_features(np.load(tmp_path / "c.npy", mmap_mode="r"), chunk=5)
    assert np.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) and all(t == np.float32 for t in a.dtypes)
    with pytest.raises(BadInput): measure_features(images[:, :4])
    with pytest.raises(BadInput): select_features(a, "everything")

def test_asinh_mag_limits():
    f = np.array([1e2, 1e3, 1e5])
    assert np.allclose(asinh_mag(f), 22.5 - 2.5 * np.log10(f), atol=2e-4) and np.isclose(asinh_mag(-f[0]) - 22.5, 22.5 - asinh_mag(f[0]))

# baselines and table

@pytest.fixture(scope="module")
def toy():
    rng = np.random.default_rng(5)
    features = measure_features(galaxies(260, seed=7))
    y = np.stack([features["mag_g_3"] - features["mag_r_3"], features["logr50_r"], rng.standard_normal(260)], axis=1).astype(float)
    return features, (y - y[:200].mean(0)) / y[:200].std(0)

def test_baselines_learn_what_is_there_and_nothing_else(toy):
    features, y = toy
    table, p = run_baselines(features, y, np.arange(200), np.arange(200, 260))
    assert list(table.index) == list(BASELINES) and all(v.shape == (60, 3) for v in p.values())
    mse = {k: np.square(v - y[200:]).mean(0) for k, v in p.items()}
    assert mse["ridge: colours"][0] < 1e-3 and mse["boosting: apertures + shape"][1] < 0.5 < mse["ridge: colours"][1]
    assert all(m[2] > 0.6 * y[200:, 2].var() for m in mse.values())
    assert np.allclose(p["always the mean"], y[:200].mean(0))

def test_validation_targets_are_not_seen(toy):
    features, y = toy[0], toy[1][:, :1]
    other = y.copy(); other[200:] = 1e6
    same = [run_baselines(features, t, np.arange(200), np.arange(200, 260), seed=4)[1] for t in (y, other)]
    assert all(np.array_equal(same[0][k], same[1][k]) for k in BASELINES)

def test_ridge_and_boosting_stand_gaps(toy):
    features, y = toy
    x = select_features(features, "colours + magnitudes").to_numpy().copy()
    x[:, 4] = np.nan; x[::7, 0] = np.nan
    for fit in (fit_ridge, fit_boosting): assert np.isfinite(fit(x[:200], y[:200])[0].predict(x[200:])).all()

def test_boosting_of_noise_stops_early():
    rng = np.random.default_rng(0)
    assert tune_boosting(rng.standard_normal((400, 3)), rng.standard_normal(400))["max_iter"] < 30

class Lines:
    def decode(self, z): return 1 + 0.1 * z @ np.sin(np.outer([1, 2, 3], np.linspace(0, 6, 1000)))

def test_metrics_table(toy):
    y, vae = toy[1][200:], Lines()
    flux = unit_rms(vae.decode(y)); ivar = np.full(flux.shape, 400.0)
    table = metrics_table(dict(mean=np.zeros_like(y), half=y / 2), y, vae, flux, ivar, flux)
    assert list(table.index) == ["mean", "half", CEILING] and table.loc[CEILING, "latent_mse"] == 0 and table.loc[CEILING, "chi2"] < 1e-6
    assert table.loc["half", "latent_mse"] == pytest.approx(table.loc["mean", "latent_mse"] / 4)
    text = format_table(table)
    assert "±" in text.iloc[0, 0] and table_markdown(table).count("\n") == 4 and table_html(table).count("<tr") == 4
    assert "rms_truth" not in metrics_table({}, y, vae, flux, ivar)
