"The anomaly score: fixed on known galaxies, one-sided, scale-free, and what real files get. Toy spectra; real files where they are."
import numpy as np
import pytest

from spectranb.anomaly import STATISTICS, AnomalyScore, anomaly_statistics, keep_score, kept_score, score_table
from spectranb.core import BadInput
from spectranb.vae import SpectrumVAE
from test_vae import toys


@pytest.fixture(scope="module")
def score():
    flux, ivar, _ = toys(2400)
    vae = SpectrumVAE.fit(flux[:1400], ivar[:1400], hidden=(64, 16), epochs=10, progress=False)
    return AnomalyScore.fit(vae, flux[1400:], ivar[1400:], rate=0.01)


def test_rate_of_false_alarms_on_galaxies_it_was_not_fixed_on(score):
    flux, ivar, _ = toys(2000, seed=7)
    assert 0.002 < score_table(score, flux, ivar).anomalous.mean() < 0.03


def test_roll_of_a_galaxy_is_a_wrong_redshift(score):
    flux, ivar, _ = toys(50, seed=8, snr=60)
    moved = score_table(score, np.roll(flux, 60, 1), np.roll(ivar, 60, 1))
    assert moved.anomalous.all() and moved.reason.str.contains("residual").all() and (moved.misfit > 2).all()


def test_noise_has_no_signal_and_negative_flux_still_has_a_score(score):
    rng = np.random.default_rng(0)
    flux = np.stack([rng.normal(0.05, 1, 1000), rng.normal(-0.2, 1, 1000)])
    table = score_table(score, flux, np.ones_like(flux), ["dark", "below zero"])
    assert table.anomalous.all() and np.isfinite(table.score).all() and table.reason.str.contains("signal").all()
    assert "positive" in table.reason[1] and table.name.tolist() == ["dark", "below zero"]


def test_high_signal_and_a_good_fit_are_no_anomaly(score):
    flux, ivar, truth = toys(20, seed=9)
    bright = score_table(score, truth, ivar * 1e4)
    assert (score.terms(truth, ivar * 1e4)[:, 2] < 0).all()          # much signal counts for nothing
    assert not score_table(score, truth, ivar).anomalous.any() and len(bright) == 20


def test_unreadable_spectra_are_infinitely_odd(score):
    flux, ivar, _ = toys(4)
    ivar[0] = 0; ivar[1, 3] = np.nan
    flux[2, np.flatnonzero(ivar[2])[9]] = np.nan
    table = score_table(score, flux, ivar)
    assert np.isinf(table.score[:2]).all() and table.anomalous.tolist()[:3] == [True] * 3 and not table.anomalous[3]
    assert "masked" in table.reason[0] and "ivar is NaN" in table.reason[1] and "flux is NaN" in table.reason[2]


@pytest.mark.parametrize("scale", [1e-17, 1.0, 3e5])
def test_scale_does_not_matter(score, scale):
    flux, ivar, _ = toys(30, seed=3)
    assert np.allclose(score.terms(flux * scale, ivar.astype(float) / scale ** 2), score.terms(flux, ivar), atol=0.05)


def test_too_few_for_a_rate(score):
    flux, ivar, _ = toys(200)
    with pytest.raises(BadInput, match="200 usable spectra do not fix a rate of 0.01.*500 or more"): AnomalyScore.fit(score.vae, flux, ivar, rate=0.01)


def test_kept_with_the_coder(score, tmp_path):
    with pytest.raises(BadInput, match="carries no anomaly score"): kept_score(score.vae)
    keep_score(score); score.vae.save(tmp_path)
    again, flux = kept_score(SpectrumVAE.load(tmp_path)), toys(30, seed=4)[:2]
    assert again.threshold == score.threshold and score_table(again, *flux).equals(score_table(score, *flux))
    del score.vae.info["anomaly"]


def test_statistics_are_named_in_order(score):
    flux, ivar, _ = toys(10)
    table = score_table(score, flux, ivar)
    assert np.allclose(np.log10(table[list(STATISTICS)]), anomaly_statistics(score.vae, flux, ivar))
