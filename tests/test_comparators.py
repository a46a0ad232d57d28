"Comparators of the VAE: exact solutions, masks, scale, bad input, scores of pure noise, moments of known distributions. Toy spectra, no simulator needed."
import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.optimize import lsq_linear, nnls

from spectranb.comparators import (EMISSION_LINES, KINDS, LinearCoder, SpectrumAE, SpectrumNMF, SpectrumPCA, compare_coders, latent_statistics,
                                   nonnegative_solve, plot_components, reconstruction_scores, wavelength_kinds)
from spectranb.core import N_WAVE, REST_WAVELENGTH, BadInput
from spectranb.data.spectra import GapBasis
from spectranb.vae import SpectrumVAE, TrainingSet

QUICK = dict(hidden=(32, 8), epochs=3, progress=False)


def templates(k=3):
    "Smooth, positive, each with a hole where it is exactly zero."
    x = np.linspace(0, 1, N_WAVE)
    return np.array([np.maximum(0, 0.3 + np.sin(2 * np.pi * (j + 1) * x + j)) for j in range(k)])


def additive(n=300, k=3, seed=0, snr=None, gaps=True):
    "Non-negative sums of the templates, of mean square 1, with gaps; flux, ivar, truth. snr None: no noise."
    rng = np.random.default_rng(seed)
    amounts = rng.exponential(size=(n, k)) * (rng.uniform(size=(n, k)) < 0.7) + 0.02
    truth = amounts @ templates(k)
    truth /= np.sqrt(np.mean(truth ** 2, 1, keepdims=True))
    sigma = 1 / (snr or 30)
    seen = np.ones(truth.shape, bool)
    if gaps:
        for row, (start, length) in enumerate(zip(rng.integers(0, N_WAVE, n), rng.integers(0, 300, n))): seen[row, start:start + length] = False
    flux = truth + (rng.normal(0, sigma, truth.shape) if snr else 0)
    return np.where(seen, flux, 0), seen / sigma ** 2, truth


@pytest.fixture(scope="module")
def noisy(): return additive(400, snr=15)


@pytest.fixture(scope="module")
def coders(noisy):
    data = TrainingSet.make(*noisy[:2], progress=False)
    return dict(pca=SpectrumPCA.fit(data, n_components=3), nmf=SpectrumNMF.fit(data, n_components=3))


# non-negative least squares -------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(-2, 2))
def test_nonnegative_solution_is_scipys(seed, k, shift):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.5, 1, (20, 15, k)), rng.normal(shift, 1, (20, 15))
    matrix, right = np.einsum("npi,npj->nij", a, a), np.einsum("npi,np->ni", a, b)
    known = np.array([nnls(*row)[0] for row in zip(a, b)])
    for start in (None, rng.normal(size=(20, k)), known):
        assert np.allclose(nonnegative_solve(matrix, right, start), known, atol=1e-8)


def test_nonnegative_solution_of_nearly_equal_templates():
    rng = np.random.default_rng(1)
    a = rng.uniform(size=(50, 40, 1)) + 1e-3 * rng.normal(size=(50, 40, 8))
    b = rng.normal(1, 1, (50, 40))
    got = nonnegative_solve(np.einsum("npi,npj->nij", a, a), np.einsum("npi,np->ni", a, b))
    best = np.array([lsq_linear(m, v, (0, np.inf), method="bvls").cost for m, v in zip(a, b)])
    assert (got >= 0).all() and np.allclose(0.5 * np.sum((np.einsum("npi,ni->np", a, got) - b) ** 2, 1), best, rtol=1e-6)


def test_nothing_to_gain_gives_zero():
    assert np.array_equal(nonnegative_solve(np.eye(3)[None], -np.ones((1, 3))), np.zeros((1, 3)))


# NMF ------------------------------------------------------------------------------------------------------------------

def test_nmf_recovers_what_is_a_non_negative_sum():
    "Sums of three templates, with gaps, without noise: reconstructed under the mask too."
    flux, ivar, truth = additive(300)
    nmf = SpectrumNMF.fit(flux, ivar, 3, rounds=150, tol=0)
    x, w = nmf.prepare(flux, ivar)
    model = nmf.decode(nmf.encode(flux, ivar))
    scale = np.sum(model * truth, 1, keepdims=True) / np.sum(truth ** 2, 1, keepdims=True)
    assert (nmf.rows >= 0).all() and np.sqrt(np.mean((model - scale * truth) ** 2)) < 0.01
    assert nmf.history[-1] < 1e-2
    assert np.allclose(np.mean(nmf.rows ** 2, 1), 1) and nmf.n_out == 3


def test_nmf_loss_never_rises_and_is_the_one_it_says(noisy):
    nmf = SpectrumNMF.fit(*noisy[:2], 3, tol=0, rounds=40)
    assert (np.diff(nmf.history) < 1e-5 * nmf.history[0]).all()        # rounding of float32
    assert abs(reconstruction_scores(nmf, *noisy[:2])["wmse all"].mean() / nmf.history[-1] - 1) < 0.02   # mean over spectra, not over bins


def test_nmf_of_noise_below_zero_is_not_biased():
    rng = np.random.default_rng(3)
    truth = np.where(np.arange(N_WAVE) < 500, 1.4, 0.05)
    flux = truth + rng.normal(0, 0.3, (600, N_WAVE))
    row = SpectrumNMF.fit(flux, np.full(flux.shape, 1 / 0.09), 1).rows[0]
    assert abs(row[500:].mean() / row[:500].mean() - 0.05 / 1.4) < 0.004                # set to zero first: 0.146 / 1.4 = 0.10


def test_nmf_same_seed_same_bytes(noisy):
    a, b = (SpectrumNMF.fit(*noisy[:2], 3, rounds=3, seed=4) for _ in range(2))
    assert np.array_equal(a.rows, b.rows)


def test_bins_that_no_spectrum_has_stay_finite(noisy):
    flux, ivar = noisy[0].copy(), noisy[1].copy()
    ivar[:, 700:720] = 0
    nmf = SpectrumNMF.fit(flux, ivar, 3, rounds=10)
    assert np.isfinite(nmf.rows).all() and np.isfinite(nmf.decode(nmf.encode(flux[:5], ivar[:5]))).all()


def test_spectra_given_or_prepared_make_no_difference(noisy):
    data = TrainingSet.make(*noisy[:2], progress=False)
    for cls in (SpectrumPCA, SpectrumNMF):
        a, b = cls.fit(data, n_components=3), cls.fit(*noisy[:2], n_components=3)
        assert np.array_equal(a.rows, b.rows) and len(a.rejects) == 0


# encoding: least squares ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, mean, solve", [("pca", True, lambda A, y: np.linalg.lstsq(A, y, rcond=None)[0]), ("nmf", False, lambda A, y: nnls(A, y)[0])])
def test_encoding_is_the_weighted_least_squares_of_numpy_and_scipy(coders, noisy, name, mean, solve):
    coder = coders[name]
    x, w = coder.prepare(*noisy[:2])
    got = coder.encode(*noisy[:2])
    for i in range(0, 400, 57):
        root = np.sqrt(w[i].astype(float))
        assert np.allclose(got[i], solve((root * coder.rows).T, root * (x[i] - coder.mean if mean else x[i])), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pca", "nmf"])
def test_masked_bins_may_hold_anything(coders, noisy, name):
    flux, ivar, _ = noisy
    coder, expected = coders[name], coders[name].encode(flux[:20], ivar[:20])
    for junk in (np.nan, np.inf, -1e30, 1e30):
        assert np.array_equal(coder.encode(np.where(ivar[:20] > 0, flux[:20], junk), ivar[:20]), expected)


@pytest.mark.parametrize("name", ["pca", "nmf"])
@pytest.mark.parametrize("scale", [1e-17, 1e-3, 1e12])
def test_any_scale(coders, noisy, name, scale):
    flux, ivar, _ = noisy
    assert np.allclose(coders[name].encode(flux[:20] * scale, ivar[:20] / scale ** 2), coders[name].encode(flux[:20], ivar[:20]), atol=1e-3)


@pytest.mark.parametrize("name", ["pca", "nmf"])
def test_one_spectrum_chunks_and_no_ivar(coders, noisy, name):
    flux, ivar, truth = noisy
    coder = coders[name]
    all_, one = coder.encode(flux, ivar), coder.encode(flux[7], ivar[7])
    assert one.shape == (3,) and np.allclose(one, all_[7], atol=1e-4) and coder.decode(one).shape == (N_WAVE,)
    assert np.allclose(coder.encode(flux, ivar, chunk=33), all_, atol=1e-4)
    assert np.allclose(coder.decode(coder.encode(truth[7])), truth[7], atol=0.1)
    assert coder.decode(all_).dtype == np.float32


def test_fewer_bins_than_components_is_finite(coders, noisy):
    flux, ivar = noisy[0][:1].copy(), np.zeros((1, N_WAVE))
    ivar[0, 500:502], flux[0, 500:502] = 1e6, 1
    for coder in coders.values(): assert np.isfinite(coder.encode(flux, ivar)).all()


def test_perfect_data_have_no_infinite_weight(coders, noisy):
    for coder in coders.values():
        assert np.isfinite(coder.encode(noisy[2][:3], np.full((3, N_WAVE), 1e30))).all()


def test_pca_of_a_plane_is_the_plane():
    "Two parameters along straight lines: two components reconstruct exactly, also in the gaps."
    rng = np.random.default_rng(2)
    x = np.linspace(-1, 1, N_WAVE)
    truth = 1 + rng.normal(0, 0.2, (300, 1)) * np.sin(4 * x) + rng.normal(0, 0.1, (300, 1)) * x
    ivar = np.where(rng.uniform(size=truth.shape) < 0.1, 0, 1e4)
    pca = SpectrumPCA.fit(np.where(ivar > 0, truth, np.nan), ivar, 3, n_iter=30)
    model = pca.decode(pca.encode(truth, ivar))
    norm = np.sqrt(np.mean(truth ** 2, 1, keepdims=True))
    assert np.sqrt(np.mean((model - truth / norm) ** 2)) < 2e-3


def test_pca_least_squares_rounds(noisy):
    "They lower the loss to below that of the NMF, keep the components orthogonal and the coefficients standardised."
    data = TrainingSet.make(*noisy[:2], progress=False)
    loss = lambda coder: reconstruction_scores(coder, *noisy[:2])["wmse all"].mean()
    rough, pca = (SpectrumPCA.fit(data, n_components=2, polish=n) for n in (0, 8))
    assert loss(pca) < loss(rough) and loss(pca) < loss(SpectrumNMF.fit(data, n_components=2))
    assert np.allclose(pca.components.components @ pca.components.components.T, np.eye(2), atol=1e-9)
    c = pca.encode(*noisy[:2])
    assert np.abs(c.mean(0)).max() < 0.05 and np.abs(np.cov(c.T) - np.eye(2)).max() < 0.05


def test_pca_of_complete_data_of_equal_weight_is_an_svd():
    flux, ivar, truth = additive(300, k=4, snr=30, gaps=False)
    pca = SpectrumPCA.fit(flux, ivar, 2, polish=60)
    x, _ = pca.prepare(flux, ivar)
    known = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2]
    assert np.linalg.svd(known @ pca.components.components.T, compute_uv=False).min() > 1 - 1e-3


# bad input ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["pca", "nmf"])
def test_bad_spectra_are_named_and_the_rest_goes_on(coders, noisy, name):
    flux, ivar = noisy[0][:5].copy(), noisy[1][:5].copy()
    flux[1, np.flatnonzero(ivar[1])[0]] = np.nan; ivar[2] = 0; flux[3] *= -1
    with pytest.raises(BadInput, match="spectrum 1: .*2 more") as e: coders[name].encode(flux, ivar)
    assert e.value.remedy
    latents = coders[name].encode(flux, ivar, bad="nan")
    assert np.isnan(latents[1:4]).all() and np.allclose(latents[[0, 4]], coders[name].encode(flux[[0, 4]], ivar[[0, 4]]), atol=1e-4)
    with pytest.raises(BadInput, match="bad"): coders[name].encode(flux, ivar, bad="skip")


@pytest.mark.parametrize("name", ["pca", "nmf"])
def test_wrong_shapes(coders, name):
    with pytest.raises(BadInput, match="999 bins"): coders[name].encode(np.ones((2, 999)))
    with pytest.raises(BadInput, match="empty"): coders[name].encode(np.ones((0, 1000)))
    for wrong in (np.ones((2, 4)), np.ones(2), np.ones((2, 2, 3)), 1.0):
        with pytest.raises(BadInput, match="coefficients"): coders[name].decode(wrong)


def test_too_few_to_learn_from(noisy):
    for cls in (SpectrumPCA, SpectrumNMF):
        with pytest.raises(BadInput, match="too few"): cls.fit(noisy[0][:50], noisy[1][:50])


def test_bad_spectra_are_left_out_of_the_fit(noisy):
    flux, ivar = noisy[0].copy(), noisy[1].copy()
    ivar[11] = 0
    nmf = SpectrumNMF.fit(flux, ivar, 2, rounds=2)
    assert list(nmf.rejects["name"]) == ["spectrum 11"] and np.isfinite(nmf.rows).all()


# the plain autoencoder ------------------------------------------------------------------------------------------------

def test_autoencoder_has_no_noise_and_comes_back_from_disk(noisy, tmp_path):
    ae = SpectrumAE.fit(*noisy[:2], n_latent=3, **QUICK)
    assert isinstance(ae, SpectrumAE) and not ae.net.variational and ae.n_out == 3
    latents = ae.encode(*noisy[:2])
    assert np.abs(np.cov(latents.T) - np.eye(3)).max() < 0.02
    with pytest.raises(BadInput, match="plain autoencoder"): ae.posterior(*noisy[:2])
    ae.save(tmp_path)
    again = SpectrumAE.load(tmp_path)
    assert isinstance(again, SpectrumAE) and np.array_equal(again.encode(*noisy[:2]), latents)


def test_autoencoder_keeps_all_its_latents_and_cannot_be_made_variational(noisy):
    data = TrainingSet.make(*noisy[:2], progress=False)
    assert SpectrumAE.fit(data, n_latent=8, **QUICK).n_out == 8
    assert not SpectrumAE.fit(data, n_latent=2, variational=True, **QUICK).net.variational


# scores ---------------------------------------------------------------------------------------------------------------

def test_kinds_of_wavelength():
    kinds = wavelength_kinds()
    assert tuple(kinds) == KINDS and kinds["all"].all()
    assert np.array_equal(kinds["continuum"].astype(int) + kinds["break"] + kinds["lines"], np.ones(N_WAVE))
    for lam in EMISSION_LINES.values():                                                  # 600 km/s: in at 300, out at 900 unless another line is near
        at = lambda v: kinds["lines"][np.argmin(np.abs(REST_WAVELENGTH - lam * (1 + v / 299792.458)))]
        assert at(0) and at(300) and at(-300)
    assert not kinds["lines"][np.argmin(np.abs(REST_WAVELENGTH - 5008.24 * (1 + 900 / 299792.458)))]
    assert REST_WAVELENGTH[kinds["break"]].min() >= 3850 and REST_WAVELENGTH[kinds["break"]].max() <= 4100


class Flat(LinearCoder):
    "Returns ones; spectra are taken as they are."
    n_out = 1
    def prepare(self, flux, ivar=None): return flux, ivar
    def encode(self, flux, ivar=None, bad="raise"): return np.ones((len(flux), 1))
    def decode(self, c): return np.ones((len(c), N_WAVE))


def test_scores_of_pure_noise():
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.02, 0.3, (3000, N_WAVE))
    seen = rng.uniform(size=sigma.shape) < 0.9
    flux = np.where(seen, 1 + rng.normal(size=sigma.shape) * sigma, np.nan)
    scores = reconstruction_scores(Flat(), flux, np.where(seen, sigma ** -2.0, 0))
    for kind, mask in wavelength_kinds().items():
        n = 0.9 * mask.sum()
        chi2 = scores[f"chi2 {kind}"]
        assert abs(chi2.mean() - 1) < 5 * np.sqrt(2 / n / 3000) and abs(chi2.std() / np.sqrt(2 / n) - 1) < 0.08
        softened = np.mean(sigma[:, mask] ** 2 / (sigma[:, mask] ** 2 + 5e-4))
        assert abs(scores[f"wmse {kind}"].mean() - softened) < 5 * np.sqrt(2 / n / 3000)


def test_scores_see_only_their_own_bins():
    kinds, ivar = wavelength_kinds(), np.full((2, N_WAVE), 100.0)
    for kind in ("continuum", "break", "lines"):
        flux = np.ones((2, N_WAVE)); flux[0, kinds[kind]] += 0.1                         # one σ off, everywhere in this kind
        got = reconstruction_scores(Flat(), flux, ivar).loc[0]
        for other in ("continuum", "break", "lines"): assert np.isclose(got[f"chi2 {other}"], float(other == kind))
        assert np.isclose(got["chi2 all"], kinds[kind].mean()) and np.isclose(got[f"wmse {kind}"], 0.01 / (0.01 + 5e-4))


def test_no_data_in_a_kind_is_no_score_and_bad_spectra_have_none(coders, noisy):
    flux, ivar = noisy[0][:4].copy(), noisy[1][:4].copy()
    ivar[0, wavelength_kinds()["break"]] = 0; ivar[2] = 0
    scores = reconstruction_scores(coders["pca"], flux, ivar)
    assert scores.loc[2].isna().all() and scores.loc[0, ["chi2 break", "wmse break"]].isna().all() and scores.loc[0].notna().sum() == 6
    assert len(scores) == 4 and scores.loc[[1, 3]].notna().all().all()


def test_scores_do_not_depend_on_scale_or_chunks(coders, noisy):
    a = reconstruction_scores(coders["nmf"], *noisy[:2])
    assert np.allclose(a, reconstruction_scores(coders["nmf"], noisy[0] * 1e-17, noisy[1] / 1e-17 ** 2), rtol=1e-2, equal_nan=True)
    assert np.allclose(a, reconstruction_scores(coders["nmf"], *noisy[:2], chunk=61), rtol=1e-3, equal_nan=True)


def test_table_and_figure(coders, noisy):
    matplotlib.use("agg")
    extra = SpectrumVAE.fit(*noisy[:2], n_latent=2, n_out=2, **QUICK)
    table = compare_coders(dict(coders, vae=extra), *noisy)
    assert list(table["method"]) == ["PCA", "NMF", "VAE"] and list(table["latents [number]"]) == [3, 3, 2] and (table["spectra [number]"] == 400).all()
    assert table.loc["nmf", "reduced χ², all [per bin]"] == pytest.approx(reconstruction_scores(coders["nmf"], *noisy[:2])["chi2 all"].mean())
    assert 0 < table.loc["nmf", "rms from truth, data [norm]"] < 0.02
    brighter = compare_coders(coders, 7 * noisy[0], noisy[1] / 49, 7 * noisy[2])
    assert np.allclose(brighter.iloc[:, 1:].astype(float), table.iloc[:2, 1:].astype(float), rtol=1e-2)
    assert "rms from truth, data [norm]" not in compare_coders(coders, *noisy[:2])
    fig, axes = plot_components(table)
    assert [a.get_title() for a in axes] == list(KINDS) and {a.get_yscale() for a in axes} == {"log"}
    assert axes[3].lines[0].get_ydata()[0] == table.loc["pca", "reduced χ², lines [per bin]"]
    plot_components(table, "weighted MSE")


def test_distance_from_truth_counts_data_and_gaps_apart():
    flux, ivar = np.ones((3, N_WAVE)), np.full((3, N_WAVE), 100.0)
    ivar[:, :200] = 0
    truth = np.where(ivar > 0, 1.3, 0.5)
    row = compare_coders(dict(flat=Flat()), flux, ivar, truth).loc["flat"]
    assert row["rms from truth, data [norm]"] == pytest.approx(0.3) and row["rms from truth, gaps [norm]"] == pytest.approx(0.5)
    assert np.isnan(compare_coders(dict(flat=Flat()), flux, np.full((3, N_WAVE), 1.0), truth).loc["flat", "rms from truth, gaps [norm]"])


# latents --------------------------------------------------------------------------------------------------------------

def test_moments_are_scipys_and_those_of_known_distributions():
    rng = np.random.default_rng(0)
    t = np.column_stack([rng.uniform(size=100_000), rng.normal(2, 3, 100_000), rng.logistic(size=100_000)])
    each, _ = latent_statistics(t)
    assert np.allclose(each["skewness"], stats.skew(t)) and np.allclose(each["excess kurtosis"], stats.kurtosis(t))
    assert np.allclose(each["excess kurtosis"], [-1.2, 0, 1.2], atol=0.1) and np.allclose(each["skewness"], 0, atol=0.05)
    assert np.allclose(each["mean"], [0.5, 2, 0], atol=0.05) and np.allclose(each["std"], [12 ** -0.5, 3, np.pi / 3 ** 0.5], rtol=0.02)
    assert np.allclose(each["largest |t| [σ]"], np.abs(stats.zscore(t)).max(0)) and abs(each.loc[1, "largest |t| [σ]"] - 3 ** 0.5) < 0.02


def test_correlations_are_scipys():
    rng = np.random.default_rng(1)
    t = rng.normal(size=(2000, 3)); t[:, 2] = np.exp(2 * t[:, 0])                        # rises throughout, but is bent
    _, together = latent_statistics(t)
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert together["mean |Pearson|"] == pytest.approx(np.mean([abs(stats.pearsonr(t[:, i], t[:, j])[0]) for i, j in pairs]))
    assert together["mean |Spearman|"] == pytest.approx(np.mean([abs(stats.spearmanr(t[:, i], t[:, j])[0]) for i, j in pairs]))
    assert together["largest |Spearman|"] == pytest.approx(1) and together["spectra"] == 2000


@pytest.mark.parametrize("shift, variance, d", [(0, 1, 6), (0.5, 1, 6), (0, 0.3, 4), (1, 2, 2)])
def test_mmd_has_its_closed_form_value(shift, variance, d):
    mean = lambda delta, v: ((1 + 2 * v / d) ** -0.5 * np.exp(-delta ** 2 / (d + 2 * v))) ** d
    known = mean(0, 2 * variance) + mean(0, 2) - 2 * mean(shift, 1 + variance)
    _, together = latent_statistics(shift + variance ** 0.5 * np.random.default_rng(2).normal(size=(10_000, d)))
    assert abs(together["MMD²"] - known) < 4 * together["error of MMD²"] and together["error of MMD²"] < 0.01


def test_latents_that_do_not_vary_or_are_not_numbers():
    t = np.random.default_rng(3).normal(size=(100, 3)); t[:, 1] = 0.7; t[5, 0] = np.nan
    each, together = latent_statistics(t)
    assert together["spectra"] == 99 and each.loc[2, ["skewness", "excess kurtosis"]].isna().all() and each.loc[[1, 3]].notna().all().all()
    assert 0 <= together["mean |Pearson|"] < 0.4
    alone, together = latent_statistics(t[:, 2])
    assert len(alone) == 1 and np.isnan(together["mean |Pearson|"])
    for wrong in (np.ones((3, 2)), np.full((50, 2), np.nan), np.ones((2, 3, 4)), np.ones((50, 0))):
        with pytest.raises(BadInput, match="latents"): latent_statistics(wrong)
