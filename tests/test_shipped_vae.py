"The VAE that comes with the package: its files, its card, and what it makes of real spectra."
import json
from pathlib import Path

import numpy as np
import pytest

import spectranb
from spectranb.anomaly import kept_score, score_table
from spectranb.core import BadInput, real_dir
from spectranb.data.spectra import check_galaxy, read_galaxies, read_sdss_spectrum, to_rest_frame
from spectranb.vae import SpectrumVAE

FOLDER = Path(spectranb.__file__).parent / "bundled" / "vae"
needs_real = pytest.mark.skipif(real_dir() is None, reason="the real example spectra are missing")


@pytest.fixture(scope="module")
def vae(): return SpectrumVAE.load()


@pytest.fixture(scope="module")
def real():
    kept, rejects = read_galaxies(sorted((real_dir() / "sdss_spectra").glob("spec-*.fits")))
    return kept, *map(np.array, zip(*map(to_rest_frame, kept)))


def test_files_and_card(vae):
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 16e6
    card, config = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "config.json").read_text())
    assert "simulated" in card.splitlines()[0] and "Do not use it for" in card and config["info"]["command"] in card
    assert config["info"]["n_train"] >= 48_000 and {"posterior", "anomaly", "metrics", "data"} <= set(config["info"])
    chi2 = config["info"]["metrics"]["chi2_all"]
    assert any(f"{chi2 + rounding:.3f}" in card for rounding in (-5e-5, 0, 5e-5))


def test_it_travels_with_the_package():
    patterns = (Path(__file__).parents[1] / "MANIFEST.in").read_text()
    assert all(f"*{f.suffix}" in patterns for f in FOLDER.iterdir())


def test_round_trip(vae):
    t = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * 0.7
    spectra = vae.decode(t)
    assert vae.n_out == 6 and spectra.shape == (50, 1000) and np.abs(vae.encode(spectra)[:, 0] - t[:, 0]).mean() < 0.1


@needs_real
def test_real_galaxies_are_followed(vae, real):
    spectra, flux, ivar = real
    x, scaled = vae.prepare(flux, ivar); model = vae.decode(vae.encode(flux, ivar))
    off = np.nanmedian(np.where(scaled > 0, np.abs(x - model) / np.abs(x), np.nan), axis=1)
    bright = np.array([s.sn_median > 20 for s in spectra])
    assert bright.sum() == 7 and (off[bright] < 0.04).all()


@needs_real
def test_what_does_not_belong_stands_out(vae, real):
    spectra, flux, ivar = real
    score, folder = kept_score(vae), real_dir() / "sdss_spectra"
    assert not score_table(score, flux, ivar).anomalous.any()
    for dz in (0.05, 0.1):
        moved = score_table(score, *map(np.array, zip(*(to_rest_frame(s, s.redshift + dz) for s in spectra))))
        assert moved.anomalous.all()
    for name in ("4055-55359-0001", "1944-53385-0606"):              # a star, an empty fibre
        odd = score_table(score, *(a[None] for a in to_rest_frame(read_sdss_spectrum(folder / f"spec-{name}.fits"))))
        assert odd.anomalous.all()


@needs_real
def test_the_quasar_is_refused_with_its_reason():
    with pytest.raises(BadInput, match="z = 2.9.* is outside|no good pixel falls on the rest-frame grid"):
        check_galaxy(read_sdss_spectrum(real_dir() / "sdss_spectra" / "spec-4055-55359-0010.fits"), classes=("GALAXY", "QSO"))
    with pytest.raises(BadInput, match="no good pixel falls on the rest-frame grid"):
        check_galaxy(read_sdss_spectrum(real_dir() / "sdss_spectra" / "spec-4055-55359-0010.fits"), z_range=(0, 5), classes=("GALAXY", "QSO"))


@needs_real
@pytest.mark.parametrize("a, b", [("0266-51602-0166", "0266-51630-0174"), ("0266-51602-0526", "0266-51630-0525")])
def test_a_galaxy_observed_twice_gets_the_same_latents(vae, real, a, b):
    names = [s.name[5:20] for s in real[0]]
    rows = [names.index(a), names.index(b)]
    mean, cov = vae.posterior(real[1][rows], real[2][rows], smooth=True)
    step = mean[0] - mean[1]
    assert np.sqrt(step @ np.linalg.solve(cov.sum(0), step)) < 3 and np.linalg.norm(step) < 0.75
