"""Predictor, Prediction and FITS, with a tiny network of random weights: nothing here says how well spectra are predicted."""
import numpy as np
import pandas as pd
import pytest
import torch
from astropy import units as u
from astropy.io import fits
from astropy.table import Table

from spectranb.core import BANDS, REST_WAVELENGTH, BadInput, real_dir
from spectranb.data.cutouts import Cutout, read_cutout
from spectranb.models import create_network
from spectranb.predict import (ErrorModel, Predictor, band_code, bands_of, blank_bands, coverage, fixed_draws, id_hash, read_prediction,
                               reconstruction_sigma)
from spectranb.training import InputTransform, TrainedNetwork
from spectranb.vae import SpectrumVAE


@pytest.fixture(scope="session")
def predictor():
    rng = np.random.default_rng(0)
    tilt = rng.normal(size=(200, 1)) * np.linspace(-0.3, 0.3, 1000)
    vae = SpectrumVAE.fit(1 + tilt + 0.05 * rng.normal(size=(200, 1000)), np.full((200, 1000), 400.0), hidden=(16, 8), epochs=1, batch_size=64, progress=False)
    torch.manual_seed(0)
    transform = InputTransform(np.ones(5), np.zeros(5), np.ones(5), crop=32)
    network = TrainedNetwork(create_network("simple_cnn"), transform, "simple_cnn", pd.DataFrame(dict(epoch=[0], train_loss=[1.0], mse=[1.0])))
    covariance = np.zeros((32, 6, 6))
    for code in range(1, 32): covariance[code] = np.eye(6) * (1.2 - 0.2 * len(bands_of(code)))
    errors = ErrorModel(covariance, np.full(32, 10), np.full(1000, 0.02), 1.1)
    return Predictor(network, vae, errors, dict(simulated=True, n_train=0, note="random weights")).remember(["a", "b"], [0], [1])


@pytest.fixture
def cutouts():
    return np.random.default_rng(1).normal(1, 1, (6, 5, 40, 40)).astype(np.float32)


def test_kinds_of_input_agree(predictor, cutouts, tmp_path):
    np.save(tmp_path / "c.npy", cutouts)
    whole = predictor.predict(cutouts)
    for same in (list(cutouts), [Cutout(c) for c in cutouts], np.load(tmp_path / "c.npy", mmap_mode="r"), torch.from_numpy(cutouts), tuple(cutouts)):
        assert np.allclose(predictor.predict(same).flux, whole.flux, atol=1e-5)
    assert np.allclose(predictor.predict(cutouts, chunk=2).sigma, whole.sigma, atol=1e-5)
    assert np.allclose(predictor.predict(cutouts[0]).flux, whole.flux[:1], atol=1e-5)
    assert np.allclose(predictor.predict(Cutout(cutouts[3], name="x")).flux, whole.flux[3:4], atol=1e-5)
    some = predictor.predict(cutouts, rows=[4, 1])
    assert list(some.object_id) == ["4", "1"] and np.allclose(some.flux, whole.flux[[4, 1]], atol=1e-5) and list(some.index) == [4, 1]


def test_promises(predictor, cutouts):
    p = predictor.predict(cutouts)
    assert p.flux.shape == p.sigma.shape == (6, 1000) and p.latents.shape == (6, 6) and p.latent_cov.shape == (6, 6, 6)
    assert np.allclose(np.mean(p.flux.astype(float) ** 2, 1), 1, atol=1e-5) and (p.sigma >= 1.1 * 0.02 - 1e-6).all()
    assert np.array_equal(p.wavelength, REST_WAVELENGTH) and p.spectral_axis.unit == u.AA
    assert np.array_equal(p.sigma, predictor.predict(cutouts).sigma), "no chance is left in σ"


def test_ids_stay_text_and_positions_double(predictor, cutouts):
    ids = ["299489677444933632", "1237648720693755918", "28" * 14, "a b", "µ Cep", "5"]
    ra = 150.0 + np.arange(6) * 1e-9
    p = predictor.predict(cutouts, ids, ra, -ra / 10)
    assert list(p.object_id) == ids and p.ra.dtype == np.float64 and np.array_equal(p.ra, ra)
    assert list(predictor.predict(cutouts, np.array(ids)).object_id) == ids and list(predictor.predict(cutouts, range(6)).object_id) == list("012345")
    with pytest.raises(BadInput, match="floating-point"): predictor.predict(cutouts, np.arange(6) * 1e17)
    with pytest.raises(BadInput, match="5 entries for 6"): predictor.predict(cutouts, ids[:5])
    with pytest.raises(BadInput, match="ra: has 2"): predictor.predict(cutouts, ids, [1, 2], ra)


def test_missing_bands_are_named_and_cost(predictor, cutouts):
    p = predictor.predict(blank_bands(cutouts, "griz"))
    assert (p.bands == "griz").all() and (p.flags == "no y").all() and (p.sigma.mean() > predictor.predict(cutouts).sigma.mean())
    zero = cutouts.copy(); zero[:, 4] = 0
    q = predictor.predict(zero)
    assert np.allclose(q.flux, p.flux) and (q.flags == "no y; y is 0 everywhere").all()
    inf = cutouts.copy(); inf[:, 4] = np.inf
    assert np.allclose(predictor.predict(inf).flux, p.flux)
    assert zero[0, 4, 0, 0] == 0 and np.isinf(inf[0, 4, 0, 0]), "the caller's array is left alone"


def test_band_sets():
    assert band_code([True] * 5) == 31 and band_code(np.eye(5, dtype=bool)).tolist() == [1, 2, 4, 8, 16]
    assert [bands_of(c) for c in (0, 1, 31, 21)] == ["", "g", "grizy", "giy"]


BAD = {"no data": np.full((5, 40, 40), np.nan), "all zero": np.zeros((5, 40, 40)), "four bands": np.ones((4, 40, 40)), "flat": np.ones((40, 40)), "small": np.ones((5, 8, 8)),
       "text": "galaxy.fits", "nothing": None, "words": np.full((5, 40, 40), "x"), "ragged": [[1, 2], [3]]}

def test_rejects_have_reasons_and_the_rest_goes_on(predictor, cutouts):
    items = [cutouts[0], *BAD.values(), cutouts[1]]
    p = predictor.predict(items, ["first", *BAD, "last"])
    assert list(p.object_id) == ["first", "last"] and np.allclose(p.flux, predictor.predict(cutouts[:2]).flux, atol=1e-5)
    assert list(p.rejects["name"]) == list(BAD) and p.rejects["reason"].str.len().min() > 5
    assert "Traceback" not in p.rejects.to_csv()

@pytest.mark.parametrize("name", BAD)
def test_one_bad_object_alone_is_an_error(predictor, name):
    with pytest.raises(BadInput): predictor.predict([BAD[name]])

@pytest.mark.parametrize("shape", [(4, 4, 40, 40), (40, 40), (2, 2, 5, 40, 40), (0,)])
def test_wrong_arrays(predictor, shape):
    with pytest.raises(BadInput): predictor.predict(np.ones(shape))

def test_all_bad_is_an_empty_prediction(predictor, tmp_path):
    p = predictor.predict(np.full((3, 5, 40, 40), np.nan))
    assert len(p) == 0 and len(p.rejects) == 3 and p.flux.shape == (0, 1000)
    assert len(predictor.predict([])) == 0
    assert len(read_prediction(p.write_fits(tmp_path / "none.fits"))) == 0


def test_fits_round_trip(predictor, cutouts, tmp_path):
    ids = ["299489677444933632", "00012", "28" * 14, "a b", "x", "5"]
    p = predictor.predict(cutouts, ids, np.linspace(0, 360, 6, endpoint=False) + 1e-10, np.linspace(-89, 89, 6))
    path = p.write_fits(tmp_path / "deep" / "p.fits")
    q = read_prediction(path)
    for name in ("flux", "sigma", "latents", "latent_cov", "ra", "dec"): assert np.array_equal(getattr(p, name), getattr(q, name)) and getattr(q, name).dtype.isnative, name
    for name in ("object_id", "bands", "flags"): assert list(getattr(p, name)) == list(getattr(q, name))
    table, grid = Table.read(path, hdu="OBJECTS"), Table.read(path, hdu="WAVELENGTH")
    assert table["OBJECT_ID"].dtype.kind in "SU" and table["RA"].dtype.kind == "f" and table["RA"].dtype.itemsize == 8 and table["RA"].unit == u.deg and grid["WAVELENGTH"].unit == u.AA
    assert np.array_equal(grid["WAVELENGTH"], REST_WAVELENGTH) and np.array_equal(table["LATENT_COV"], p.latent_cov)
    with fits.open(path, checksum=True) as hdus: assert hdus[0].header["SIMULAT"] is True and hdus.verify("exception") is None


def test_specutils_opens_the_file_and_the_object(predictor, cutouts, tmp_path):
    specutils = pytest.importorskip("specutils")
    p = predictor.predict(cutouts)
    opened = specutils.Spectrum.read(p.write_fits(tmp_path / "p.fits"))
    assert np.allclose(opened.spectral_axis.to_value(u.AA), REST_WAVELENGTH, rtol=1e-12) and np.array_equal(opened.flux.value, p.flux)
    assert opened.uncertainty.uncertainty_type == "std" and np.array_equal(opened.uncertainty.array, p.sigma)
    one = p.to_specutils(3)
    assert np.array_equal(one.flux.value, p.flux[3]) and one.meta["object_id"] == "3" and np.array_equal(one.uncertainty.array, p.sigma[3])


@pytest.mark.parametrize("content", [b"", b"not FITS", b"SIMPLE  =                    T"])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "x.fits").write_bytes(content)
    with pytest.raises(BadInput): read_prediction(tmp_path / "x.fits")
    fits.PrimaryHDU(np.ones((3, 3))).writeto(tmp_path / "image.fits")
    with pytest.raises(BadInput): read_prediction(tmp_path / "image.fits")
    with pytest.raises(BadInput): read_prediction(tmp_path / "missing.fits")


def test_bundle_round_trip(predictor, cutouts, tmp_path):
    predictor.save(tmp_path / "model"); predictor.save(tmp_path / "model")
    again = Predictor.load(tmp_path / "model")
    p, q = predictor.predict(cutouts), again.predict(cutouts)
    assert np.allclose(p.flux, q.flux, atol=1e-6) and np.allclose(p.sigma, q.sigma, atol=1e-6) and np.allclose(p.latents, q.latents, atol=1e-6)
    assert again.info["note"] == "random weights" and again.unseen(["a", "b", "c"]).tolist() == [False, False, True] and again.unseen(["a", "b"], calibrated=False).tolist() == [False, True]
    assert {f.suffix for f in (tmp_path / "model").rglob("*") if f.is_file()} <= {".json", ".safetensors", ".csv"}
    assert [f.name for f in tmp_path.iterdir()] == ["model"], "nothing half-written is left"


def test_damaged_bundles(predictor, tmp_path):
    with pytest.raises(BadInput, match="no config.json"): Predictor.load(tmp_path)
    for name in ("calibration.safetensors", "network/weights.safetensors", "config.json"):
        folder = predictor.save(tmp_path / name.replace("/", "-"))
        (folder / name).write_bytes(b"{}")
        with pytest.raises(BadInput): Predictor.load(folder)
    (tmp_path / "other").mkdir(); (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match="not empty"): predictor.save(tmp_path / "other")
    assert (tmp_path / "other" / "letter.txt").exists()


def test_without_a_default_bundle(tmp_path, monkeypatch):
    import spectranb.predict as module
    monkeypatch.setattr(module, "default_bundle", lambda: tmp_path / "nowhere")
    with pytest.raises(BadInput, match="make demo"): Predictor.load()


def test_draws_and_errors():
    d = fixed_draws()
    assert np.allclose(d.mean(0), 0, atol=1e-12) and np.allclose(d.T @ d / len(d), np.eye(6)) and np.array_equal(d, fixed_draws())
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(2000, 1000)) * 0.1
    ivar = np.full(truth.shape, 1 / 0.05 ** 2)
    found = reconstruction_sigma(truth + 0.05 * rng.normal(size=truth.shape), ivar, np.zeros_like(truth))
    assert abs(found.mean() - 0.1) < 0.002
    judged = coverage(truth, np.zeros_like(truth), np.full_like(truth, 0.1))
    assert np.allclose(judged.loc["all"], [0.6827, 0.9545], atol=0.003)
    noisy = coverage(truth + 0.05 * rng.normal(size=truth.shape), np.zeros_like(truth), np.full_like(truth, 0.1), ivar)
    assert np.allclose(noisy.loc["all"], [0.6827, 0.9545], atol=0.003)


def test_id_hash_is_stable():
    assert id_hash(["299489677444933632"]).dtype == np.int64 and len(set(id_hash(map(str, range(10000))))) == 10000
    assert np.array_equal(id_hash(["a", "b"]), id_hash(np.array(["a", "b"])))


def test_real_cutout(predictor):
    folder = real_dir()
    if folder is None: pytest.skip("the folder with real example files is missing")
    p = predictor.predict(read_cutout(sorted((folder / "ps1_cutouts").glob("*.fits"))))
    assert p.bands[0] == "griz" and p.flags[0] == "no y" and abs(p.ra[0] - 27.9520) < 1e-3 and abs(p.dec[0] - 0.26348) < 1e-3
