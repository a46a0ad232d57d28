"The network that comes with the package: its files, its card, what it makes of simulated galaxies and of a real one."
import json
from pathlib import Path

import numpy as np
import pytest

import spectranb
from spectranb.core import real_dir
from spectranb.data.cutouts import read_cutout
from spectranb.data.fluxcal import synthetic_photometry
from spectranb.data.mock import simulate_survey
from spectranb.predict import Predictor

FOLDER = Path(spectranb.__file__).parent / "bundled" / "predictor"
needs_real = pytest.mark.skipif(real_dir() is None, reason="the real example images are missing")


@pytest.fixture(scope="module")
def predictor(): return Predictor.load()


def test_files_and_card(predictor):
    files = [f for f in FOLDER.rglob("*") if f.is_file()]
    assert all(f.stat().st_size <= 16e6 for f in files)
    card, config = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "config.json").read_text())
    assert "simulated" in card.splitlines()[0] and "Do not use it for" in card and config["info"]["command"] in card
    assert predictor.info["simulated"] and f"{predictor.info['n_train']:,} simulated galaxies" in card
    assert f"{config['info']['metrics']['latent_mse'][predictor.network.arch]:.3f}" in card
    patterns = (Path(__file__).parents[1] / "MANIFEST.in").read_text()
    assert all(f"*{f.suffix}" in patterns for f in files)


def test_it_predicts_galaxies_it_has_not_seen(predictor, tmp_path):
    survey = simulate_survey(tmp_path / "survey", 96, seed=4711, size=predictor.size, n_workers=1, progress=False)
    assert predictor.unseen(survey.catalog["object_id"]).all()
    p, true = predictor.predict(survey.cutouts), predictor.vae.encode(survey.spectra, survey.ivar)
    error, clean = np.square(p.latents - true).mean(), predictor.vae.encode(survey.arrays["noiseless"])
    assert error < 0.8 * np.square(true - true.mean(0)).mean() and np.square(p.latents - clean).mean() < error
    off = np.abs(survey.arrays["noiseless"][:] - p.flux) / p.sigma
    assert 0.5 < (off < 1).mean() < 0.9


@needs_real
def test_a_real_galaxy_has_nearly_its_colour(predictor):
    "15 arcsec magnitudes measured independently: g 15.32, r 14.48, i 14.08. A colour of the whole galaxy, not of its centre; redshift assumed."
    image = read_cutout(sorted((real_dir() / "ps1_cutouts").glob("*.fits")), name="spiral")
    p = predictor.predict(image)
    assert "no y" in p.flags[0] and np.isfinite(p.flux).all() and (p.sigma > 0).all()
    g, r, i = synthetic_photometry(p.flux, [0.03]).mag[0][:3]
    assert abs((g - r) - 0.84) < 0.25 and abs((r - i) - 0.40) < 0.2
