"Exchange with the Multimodal Universe: read by plain h5py and pyarrow, foreign files built as its scripts build them, interruptions."
import json
import sys
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from astropy.coordinates import SkyCoord

from spectranb.core import BANDS, REST_WAVELENGTH, BadInput, real_dir
from spectranb.data import exchange
from spectranb.data.exchange import band_letter, from_multimodal_universe, open_exchange, sky_noise, to_multimodal_universe
from spectranb.data.spectra import read_sdss_spectrum, rebin_to_rest
from spectranb.data.survey import SurveyWriter, sky_cell

h5py = pytest.importorskip("h5py")
N, SIZE = 150, 12
FORMATS = "hdf5", "parquet"


def build(path, n=N, size=SIZE, seed=0, spread=3.0):
    "A survey with everything that may go wrong on the way: NaN bands, clipped pixels, empty spectra, odd columns."
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(dict(object_id=[f"{28 * '9'}{i:05d}" if i % 2 else f"{i:07d}" for i in range(n)], ra=(359.5 + rng.uniform(0, spread, n)) % 360,
                             dec=rng.uniform(-spread / 2, spread / 2, n), redshift=rng.uniform(0.01, 0.3, n), norm=rng.uniform(1e-3, 300, n),
                             zwarning=0, flag_odd=rng.random(n) < 0.3, mag_r=np.where(rng.random(n) < 0.1, np.nan, 17.0),
                             run2d=["26" if i % 3 else None for i in range(n)], spec_class="GALAXY", plate=np.arange(n, dtype=np.int32)))
    flux, ivar = rng.normal(1, 0.3, (n, 1000)), rng.uniform(1, 1000, (n, 1000)) * (rng.random((n, 1000)) > 0.1)
    flux[7], ivar[7], rows.loc[7, "norm"] = 0, 0, 0.0                # a spectrum without data
    images = rng.normal(0, 0.02, (n, 5, size, size)) + 3
    if size: images[3, 4] = np.nan; images[4, :, 0, 0] = np.nan; images[5, 2, 6, 6] = 1e6; images[6] = np.nan; images[8, 0] = 0.5
    w = SurveyWriter(path, n, size, provenance=dict(simulated=True, seed=seed))
    w.write(0, rows, flux, ivar, cutouts=images if size else None)
    return w.finish()


@pytest.fixture(scope="module")
def survey(tmp_path_factory): return build(tmp_path_factory.mktemp("survey") / "s")


@pytest.fixture(scope="module")
def exported(survey, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return {f: to_multimodal_universe(survey, folder / f, f, progress=False) for f in FORMATS}


# ---- what others find in our files ----

def their_reader(file, bands=5):
    "An example a galaxy, by the steps of the project's loading scripts for SDSS (spectra) and HSC (images)."
    with h5py.File(file, "r") as data:
        order = np.argsort(data["object_id"][:])
        ids = data["object_id"][:][order]
        for key in data["object_id"][:]:
            i = order[np.searchsorted(ids, key)]
            example = dict(spectrum={k: data[f"spectrum_{k}"][i] for k in ("flux", "ivar", "lsf_sigma", "lambda", "mask")})
            example["image"] = [dict(band=data["image_band"][i][j].decode("utf-8"), flux=data["image_array"][i][j], ivar=data["image_ivar"][i][j],
                                     mask=data["image_mask"][i][j], psf_fwhm=data["image_psf_fwhm"][i][j], scale=data["image_scale"][i][j]) for j in range(bands)]
            for name in ("VDISP", "VDISP_ERR", "Z", "Z_ERR"): example[name] = data[name][i].astype("float32")
            for name in ("SPECTROFLUX", "SPECTROFLUX_IVAR", "SPECTROSYNFLUX", "SPECTROSYNFLUX_IVAR"):
                example |= {f"{name}_{b}": data[name][i][n].astype("float32") for n, b in enumerate("UGRIZ")}
            example["ZWARNING"] = bool(data["ZWARNING"][i])
            yield key.decode(), {k: data[k][i] for k in ("ra", "dec", "healpix")}, example


def test_their_reader_finds_our_galaxies(survey, exported):
    row = {i: k for k, i in enumerate(survey.catalog["object_id"])}
    seen, c = [], survey.catalog
    for file in sorted(exported["hdf5"].glob("healpix=*/001-of-001.hdf5")):
        for object_id, where, example in their_reader(file):
            i = row[object_id]; seen.append(i)
            assert where == dict(ra=c["ra"][i], dec=c["dec"][i], healpix=int(file.parent.name.split("=")[1]))
            spectrum, image, norm = example["spectrum"], example["image"], c["norm"][i] or 1
            assert np.allclose(spectrum["flux"], survey.spectra[i] * norm, rtol=2e-7) and np.array_equal(spectrum["mask"], survey.ivar[i] == 0)
            assert np.allclose(spectrum["ivar"] * norm ** 2, survey.ivar[i], rtol=3e-7)
            assert np.allclose(spectrum["lambda"], REST_WAVELENGTH * (1 + c["redshift"][i]), rtol=1e-7) and np.isnan(spectrum["lsf_sigma"]).all()
            assert [b["band"] for b in image] == ["ps1-g", "ps1-r", "ps1-i", "ps1-z", "ps1-y"] and abs(example["Z"] - c["redshift"][i]) < 1e-7
            for b, ours in zip(image, survey.cutouts[i]):
                good = np.isfinite(ours)
                assert np.array_equal(b["mask"], good) and np.array_equal(b["flux"][good], ours[good].astype(np.float32))
                assert (b["flux"][~good] == 0).all() and (b["ivar"][~good] == 0).all() and (b["ivar"][good] > 0).all()
                assert b["flux"].dtype == b["ivar"].dtype == np.float32 and b["mask"].dtype == bool and b["scale"] == 0.25
    assert sorted(seen) == list(range(N)) and not [*exported["hdf5"].rglob("*.tmp*")]


def test_cells_are_those_of_healpy_numbering(survey, exported):
    from astropy_healpix import HEALPix
    cells = HEALPix(nside=16, order="nested", frame="icrs").skycoord_to_healpix(SkyCoord(survey.catalog["ra"], survey.catalog["dec"], unit="deg"))
    assert {f.parent.name for f in exported["hdf5"].rglob("*.hdf5")} == {f"healpix={c}" for c in set(cells.tolist())} and len(set(cells)) > 1


def test_parquet_by_pyarrow_and_pandas(survey, exported):
    table = pa.dataset.dataset(exported["parquet"]).to_table()
    nested = lambda t, depth: nested(pa.list_(t), depth - 1) if depth else t
    image, spectrum = (table.schema.field(f).type for f in ("image", "spectrum"))
    assert {f.name: f.type for f in image} == dict(band=nested(pa.string(), 1), flux=nested(pa.float32(), 3), ivar=nested(pa.float32(), 3),
                                                   mask=nested(pa.bool_(), 3), psf_fwhm=nested(pa.float32(), 1), scale=nested(pa.float32(), 1))
    assert {f.name: f.type for f in spectrum} == {n: nested(pa.bool_() if n == "mask" else pa.float32(), 1) for n in ("flux", "ivar", "lambda", "mask", "lsf_sigma")}
    for name, kind in dict(object_id=pa.string(), ra=pa.float64(), healpix=pa.int64(), Z=pa.float32(), ZWARNING=pa.bool_(), SPECTROFLUX_U=pa.float32()).items():
        assert table.schema.field(name).type == kind
    frame = pd.read_parquet(exported["parquet"]).set_index("object_id").loc[survey.catalog["object_id"]]
    assert len(frame) == N and np.array_equal(frame["ra"], survey.catalog["ra"])
    flux = np.array([np.array([[list(r) for r in band] for band in x["flux"]]) for x in frame["image"][:20]], np.float32)
    assert np.array_equal(flux, np.nan_to_num(survey.cutouts[:20].astype(np.float32)))
    groups = [pq.ParquetFile(f).metadata.row_group(0).num_rows for f in exported["parquet"].glob("*.parquet")]
    assert max(groups) <= 64


def test_parquet_by_datasets(survey, exported, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("parquet", data_files=[str(f) for f in sorted(exported["parquet"].glob("*.parquet"))], cache_dir=str(tmp_path))["train"]
    one = rows[0]
    i = survey.catalog["object_id"].tolist().index(one["object_id"])
    assert len(rows) == N and np.array_equal(np.array(one["image"]["flux"], np.float32), np.nan_to_num(survey.cutouts[i].astype(np.float32)))
    assert np.allclose(one["spectrum"]["lambda"], REST_WAVELENGTH * (1 + survey.catalog["redshift"][i]), rtol=1e-7)


def test_sky_noise():
    rng = np.random.default_rng(1)
    sigma = np.array([0.01, 0.02, 0.03, 0.04, 0.05])
    images = rng.normal(5, sigma[:, None, None], (20, 5, 128, 128))
    images[:, :, 30:100, 30:100] += 1e4; images[:, :, :2, :9] += 50; images[0, 2] = np.nan; images[1, 1] = 0.5
    found = sky_noise(images)
    assert np.isnan(found[0, 2]) and found[1, 1] == np.float32(1e-6) and np.allclose(np.nanmedian(found, axis=0), sigma, rtol=0.02)


def test_seeing_is_written(survey, tmp_path):
    path = to_multimodal_universe(survey, tmp_path / "x", "parquet", psf_fwhm=dict(zip(BANDS, (1.3, 1.2, 1.1, 1.0, 0.9))), progress=False)
    assert open_exchange(path)[0].take("image_psf_fwhm", np.arange(1))[0].tolist() == pytest.approx([1.3, 1.2, 1.1, 1.0, 0.9])


def test_memory_is_that_of_a_block(tmp_path):
    s = build(tmp_path / "s", n=640, size=32, spread=0.5)
    whole = 640 * 5 * 32 * 32 * 9                                    # flux, ivar and mask of the cell
    s.catalog, s.cutouts[:].sum()
    tracemalloc.start()
    to_multimodal_universe(s, tmp_path / "x", progress=False)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert len([*(tmp_path / "x").glob("healpix=*")]) <= 3 and peak < 0.5 * whole


# ---- there and back ----

@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(survey, exported, tmp_path, format):
    back = from_multimodal_universe(exported[format], tmp_path / "back", progress=False)
    order = survey.catalog.reset_index().set_index("object_id").loc[back.catalog["object_id"], "index"].to_numpy()
    assert sorted(order) == list(range(N)) and "rejects" not in back.tables and back.verify()
    assert np.array_equal(back.cutouts, survey.cutouts[order], equal_nan=True)
    assert np.allclose(back.spectra, survey.spectra[order], rtol=2e-7, atol=0) and np.allclose(back.ivar, survey.ivar[order], rtol=4e-7, atol=0)
    want = survey.catalog.iloc[order].reset_index(drop=True).assign(run2d=lambda t: t["run2d"].fillna(""))
    pd.testing.assert_frame_equal(back.catalog[want.columns], want)
    assert back.catalog["n_clipped"].sum() == 1 and back.info["provenance"]["simulated"] is True
    assert str(tmp_path) not in json.dumps(back.info)


@pytest.mark.parametrize("format", FORMATS)
def test_cutouts_of_another_size(survey, exported, tmp_path, format):
    back = from_multimodal_universe(exported[format], tmp_path / "small", size=6, progress=False)
    order = survey.catalog.reset_index().set_index("object_id").loc[back.catalog["object_id"], "index"].to_numpy()
    assert np.array_equal(back.cutouts, survey.cutouts[order][:, :, 3:9, 3:9], equal_nan=True)
    large = from_multimodal_universe(exported[format], tmp_path / "large", size=16, progress=False)
    assert np.array_equal(large.cutouts[:, :, 2:14, 2:14], survey.cutouts[order], equal_nan=True) and np.isnan(large.cutouts[:, :, 0]).all()


def test_spectra_only(tmp_path):
    s = build(tmp_path / "s", n=10, size=0)
    for format in FORMATS:
        back = from_multimodal_universe(to_multimodal_universe(s, tmp_path / format, format, progress=False), tmp_path / f"{format}_back", progress=False)
        assert back.size == 0 and len(back) == 10 and not any(n.startswith("image") for n in open_exchange(tmp_path / format)[0].names)


# ---- interrupted, and refused ----

class Crash(BaseException): pass


@pytest.mark.parametrize("format", FORMATS)
def test_interrupted_export_goes_on(survey, exported, tmp_path, monkeypatch, format):
    name, count = f"_write_{format}", [0]
    real = getattr(exchange, name)
    def hurt(path, scalars, blocks):
        count[0] += 1
        if count[0] == 2:
            path.write_bytes(b"half")
            raise Crash
        real(path, scalars, blocks)
    with monkeypatch.context() as m:
        m.setattr(exchange, name, hurt)
        with pytest.raises(Crash): to_multimodal_universe(survey, tmp_path / "x", format, progress=False)
    partial = tmp_path / "x.partial"
    assert not (tmp_path / "x").exists() and len([f for f in partial.rglob("*") if f.suffix in (".hdf5", ".parquet")]) == 1
    with pytest.raises(BadInput, match=f"of {N} galaxies"): from_multimodal_universe(partial, tmp_path / "b", progress=False)
    with pytest.raises(BadInput, match="another survey"): to_multimodal_universe(build(tmp_path / "o", n=9), tmp_path / "x", format, progress=False)
    first = next(f for f in partial.rglob("*") if f.suffix in (".hdf5", ".parquet")); stamp = first.stat().st_mtime_ns
    done = to_multimodal_universe(survey, tmp_path / "x", format, progress=False)
    assert (done / first.relative_to(partial)).stat().st_mtime_ns == stamp and not partial.exists()
    for a, b in zip(open_exchange(done), open_exchange(exported[format])):
        assert a.n == b.n and all(np.array_equal(a.take(k, np.arange(a.n)), b.take(k, np.arange(b.n)), equal_nan=k not in ("object_id", "image_band"))
                                  for k in ("object_id", "spectrum_flux", "image_flux"))
    with pytest.raises(BadInput, match="exists already"): to_multimodal_universe(survey, tmp_path / "x", format, progress=False)


def test_interrupted_import_goes_on(exported, tmp_path, monkeypatch):
    whole = from_multimodal_universe(exported["hdf5"], tmp_path / "whole", progress=False)
    real, count = SurveyWriter.write, [0]
    def hurt(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 3: raise Crash
        return real(self, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(SurveyWriter, "write", hurt)
        with pytest.raises(Crash): from_multimodal_universe(exported["hdf5"], tmp_path / "x", progress=False)
    assert len([*(tmp_path / "x.partial" / "chunks").glob("catalog*")]) == 2
    assert from_multimodal_universe(exported["hdf5"], tmp_path / "x", progress=False).info == whole.info


def test_without_h5py(survey, exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(BadInput, match="pip install h5py"): to_multimodal_universe(survey, tmp_path / "x", progress=False)
    with pytest.raises(BadInput, match="pip install h5py"): open_exchange(exported["hdf5"])
    assert not [*tmp_path.iterdir()] and to_multimodal_universe(survey, tmp_path / "p", "parquet", progress=False).exists()


def test_bad_input_is_named(survey, exported, tmp_path):
    def refused(what, path, **kwargs):
        with pytest.raises(BadInput, match=what): from_multimodal_universe(path, tmp_path / "out", progress=False, **kwargs)
    refused("is not there", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir(); refused("holds no .hdf5", tmp_path / "empty")
    for suffix in FORMATS:
        (tmp_path / f"a.{suffix}").write_bytes(b"no such thing"); refused("is not a readable", tmp_path / f"a.{suffix}")
    with h5py.File(tmp_path / "b.hdf5", "w") as f: f["x"] = 1
    refused("no dataset object_id", tmp_path / "b.hdf5")
    with h5py.File(tmp_path / "c.hdf5", "w") as f: f["object_id"], f["ra"], f["dec"], f["Z"] = [b"1"], [1.0], [2.0], [0.1]
    refused("holds no spectra", tmp_path / "c.hdf5")
    with pytest.raises(BadInput, match="is not a known format"): to_multimodal_universe(survey, tmp_path / "y", "fits")


# ---- foreign files ----

def sdss_file(path, spectra, ids=None, pad=None, **columns):
    "HDF5 of spectra (loglam, flux, ivar) padded as the project's SDSS script pads them: flux by its edge, ivar by 0, λ by -1, mask by True."
    longest = max(len(s[0]) for s in spectra) if pad is None else pad
    fill = lambda v, **kw: np.pad(v, (0, longest - len(v)), **kw)
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(spectra)
    with h5py.File(path, "w") as f:
        f["spectrum_lambda"] = np.array([fill(10 ** s[0].astype(np.float32), constant_values=-1) for s in spectra], np.float32)
        f["spectrum_flux"] = np.array([fill(s[1], mode="edge") for s in spectra], ">f4")
        f["spectrum_ivar"] = np.array([fill(s[2]) for s in spectra], ">f4")
        f["spectrum_mask"] = np.array([fill(s[2] <= 1e-6, constant_values=True) for s in spectra])
        f["object_id"] = np.array([f"{i:>22}".encode() for i in (ids or range(n))], "S22")       # SPECOBJID of specObj-dr17.fits: 22 characters
        for name, values in (dict(ra=np.arange(n) * 1.0, dec=np.zeros(n), ZWARNING=np.zeros(n, np.int32), VDISP=np.full(n, 150.0, np.float32)) | columns).items():
            f[name] = values
    return path


def power_law(start, n, slope=-1.0, noise=0.0, seed=0):
    loglam = start + 1e-4 * np.arange(n)
    flux = 10 ** (slope * (loglam - 3.7)) * 20
    return loglam, flux + noise * np.random.default_rng(seed).normal(size=n), np.full(n, 1 / max(noise, 0.5) ** 2)


def test_foreign_spectra_keep_their_shape(tmp_path):
    "f ∝ λ^-1 with starts and lengths that differ: in every good bin the mean of the power law over the bin, in closed form."
    z = np.linspace(0.02, 0.3, 6)
    spectra = [power_law(3.58 + 0.0007 * i, 3700 + 13 * i) for i in range(6)]
    path = sdss_file(tmp_path / "sdss" / "healpix=5" / "001-of-001.hdf5", spectra, ids=[3 * 10 ** 18 + i for i in range(6)], Z=z.astype(np.float32))
    s = from_multimodal_universe(tmp_path / "sdss", tmp_path / "s", progress=False)
    assert s.catalog["object_id"].tolist() == [str(3 * 10 ** 18 + i) for i in range(6)] and s.size == 0 and path.exists()
    edges = 10 ** (3.53 + 0.00039 * (np.arange(1001) - 0.5))
    mean = np.log(edges[1:] / edges[:-1]) / np.diff(edges)           # ∫ λ^-1 over the bin, divided by its width
    for i in range(6):
        truth = 20 * 10 ** 3.7 * mean / (1 + np.float32(z[i]))
        good = s.ivar[i] > 0
        assert good.sum() > 600 and np.allclose(s.spectra[i][good] * s.catalog["norm"][i], truth[good], rtol=2e-4)
    assert s.catalog["vdisp"].tolist() == [150.0] * 6


def test_masks_are_only_used_on_request(tmp_path):
    loglam, flux, ivar = power_law(3.58, 3800)
    path = sdss_file(tmp_path / "a.hdf5", [(loglam, flux, ivar)] * 2, Z=[0.1, 0.1])
    with h5py.File(path, "r+") as f: f["spectrum_mask"][1, 500:2500] = True
    off, on = (from_multimodal_universe(path, tmp_path / f"s{m}", use_mask=m, progress=False) for m in (False, True))
    good = (off.ivar[:] > 0).sum(1), (on.ivar[:] > 0).sum(1)
    assert good[0][0] == good[0][1] == good[1][0] and good[1][1] < good[1][0] - 400


def test_rejects_have_reasons(tmp_path):
    n, z = 8, np.array([0.1, 0.1, np.nan, 0.5, 0.1, 0.1, 0.1, 0.1], np.float32)
    spectra = [power_law(3.58, 3800) for _ in range(n)]
    spectra[4] = spectra[4][0], spectra[4][1], spectra[4][2] * 0
    path = sdss_file(tmp_path / "a.hdf5", spectra, ids=[0, 1, 2, 3, 4, 5, 1, 7], Z=z, ZWARNING=np.array([0, 4, 0, 0, 0, 0, 0, 0]),
                     CLASS=np.array([b"GALAXY"] * 5 + [b"STAR  "] + [b"GALAXY"] * 2), ra=np.array([0, 1, 2, 3, 4, 5, 6, np.nan]))
    s = from_multimodal_universe(path, tmp_path / "s", progress=False)
    reasons = dict(zip(*s.tables["rejects"].iloc[:, :2].to_numpy().T))
    assert s.catalog["object_id"].tolist() == ["0", "1"] and s.catalog["ra"].tolist() == [0, 6]      # the second 1: the first is no good
    assert "ZWARNING" in reasons["1"] and "not within" in reasons["2"] and "not within" in reasons["3"]
    assert "no good pixel" in reasons["4"] and "not a galaxy" in reasons["5"] and "position" in reasons["7"] and len(s) + len(s.tables["rejects"]) == n
    with pytest.raises(BadInput, match="none of 8 rows"): from_multimodal_universe(path, tmp_path / "t", z_range=(2, 3), progress=False)


def test_many_foreign_spectra_learn_their_gaps(tmp_path):
    spectra = [power_law(3.58, 3800, slope=-1 + 0.02 * (i % 30), noise=0.3, seed=i) for i in range(160)]
    for i, (_, flux, ivar) in enumerate(spectra): ivar[1000 + i:1100 + i] = 0; flux[1000 + i:1100 + i] = 1e4
    sdss_file(tmp_path / "a.hdf5", spectra, Z=np.full(160, 0.05, np.float32))
    s = from_multimodal_universe(tmp_path / "a.hdf5", tmp_path / "s", progress=False)
    level = (s.spectra[:] * s.catalog["norm"].to_numpy()[:, None])[:, 400:900]
    assert len(s) == 160 and (s.ivar[:] == 0).any(1).all() and level.max() < 40
    assert np.allclose(s.catalog["norm"], [np.sqrt(np.mean(np.interp(REST_WAVELENGTH * 1.05, 10 ** a, b) ** 2)) for a, b, _ in
                                           (power_law(3.5, 4600, slope=-1 + 0.02 * (i % 30)) for i in range(160))], rtol=0.02)


def legacy_files(folder, ra, dec, size=20, scale=0.25, seed=0):
    "Images as in the Legacy Survey's files: four bands in another order of ours, one mask for all bands, no y."
    rng = np.random.default_rng(seed)
    flux = rng.normal(1, 0.1, (len(ra), 4, size, size)).astype(np.float32)
    cells = sky_cell(ra, dec)
    for cell in np.unique(cells):
        at = np.flatnonzero(cells == cell)
        path = folder / f"healpix={cell}" / "001-of-001.hdf5"; path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as f:
            f["image_array"], f["image_ivar"] = flux[at], np.where(flux[at] > 1.35, 0, 100).astype(np.float32)
            f["image_mask"] = np.ones((len(at), size, size), bool)
            f["image_band"] = np.array([[b"des-z", b"des-g", b"des-i", b"des-r"]] * len(at)).astype(h5py.string_dtype("utf-8", 5))
            f["image_psf_fwhm"], f["image_scale"] = np.tile([0.9, 1.2, 1.0, 1.1], (len(at), 1)), np.full((len(at), 4), scale, np.float32)
            f["object_id"] = np.array([f"brick-{i}".encode() for i in at])
            f["RA"], f["DEC"] = ra[at], dec[at]
    return flux


def test_images_from_another_folder(tmp_path):
    rng = np.random.default_rng(5)
    ra, dec = rng.uniform(0, 20, 90), rng.uniform(-10, 10, 90)
    order = rng.permutation(90)                                      # the images are in another order, and ten of them are missing
    flux = legacy_files(tmp_path / "images", ra[order][:80] + 0.3 / 3600, dec[order][:80])
    sdss_file(tmp_path / "a.hdf5", [power_law(3.58, 3800)] * 90, Z=np.full(90, 0.1, np.float32), ra=ra, dec=dec)
    s = from_multimodal_universe(tmp_path / "a.hdf5", tmp_path / "s", images=tmp_path / "images", size=10, flux_scale=2.0, progress=False)
    assert len(s) == 80 and set(s.tables["rejects"]["reason"]) == {"no image within 1.0″"} and s.cutouts.shape == (80, 5, 10, 10)
    place = {str(g): k for k, g in enumerate(order[:80])}
    theirs = flux[[place[i] for i in s.catalog["object_id"]]][:, :, 5:15, 5:15]
    want = np.where(theirs > 1.35, np.nan, 2 * theirs)[:, [1, 3, 2, 0]].astype(np.float16)
    assert np.array_equal(s.cutouts[:, :4], want, equal_nan=True) and np.isnan(s.cutouts[:, 4]).all()
    assert s.catalog["psf_fwhm_r"].tolist() == pytest.approx([1.1] * 80) and s.catalog["psf_fwhm_y"].isna().all()


def test_another_pixel_scale_is_refused(tmp_path):
    ra, dec = np.array([1.0]), np.array([2.0])
    legacy_files(tmp_path / "images", ra, dec, scale=0.262)
    sdss_file(tmp_path / "a.hdf5", [power_law(3.58, 3800)], Z=np.array([0.1]), ra=ra, dec=dec)
    kwargs = dict(images=tmp_path / "images", progress=False)
    with pytest.raises(BadInput, match="4.8% from 0.25″"): from_multimodal_universe(tmp_path / "a.hdf5", tmp_path / "s", **kwargs)
    assert len(from_multimodal_universe(tmp_path / "a.hdf5", tmp_path / "t", scale_tolerance=0.1, **kwargs)) == 1


def test_parquet_of_others(tmp_path):
    "Lists of structures, ragged spectra, ids written as pictures of bytes, one large row group: as found on the hub."
    rng, rows = np.random.default_rng(2), []
    for i in range(70):
        loglam, flux, ivar = power_law(3.58 + 0.001 * (i % 3), 3700 + i)
        image = [dict(band=b, flux=rng.normal(size=(8, 8)).tolist(), ivar=np.ones((8, 8)).tolist(), scale=0.25) for b in ("HSC-G", "HSC-R")]
        rows.append(dict(object_id=f"b'  {i}'", ra=float(i), dec=1.0, Z=0.1, ZWARNING=False, image=image,
                         spectrum=dict(flux=flux.tolist(), ivar=ivar.tolist(), lsf_sigma=None, mask=(ivar == 0).tolist(), **{"lambda": (10 ** loglam).tolist()})))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    s = from_multimodal_universe(tmp_path / "a.parquet", tmp_path / "s", progress=False)
    assert s.catalog["object_id"].tolist() == [str(i) for i in range(70)] and s.size == 8 and np.isnan(s.cutouts[:, 2:]).all()
    assert np.array_equal(s.cutouts[69, 1], np.array(rows[69]["image"][1]["flux"], np.float16))
    flux, ivar = rebin_to_rest(np.array(rows[5]["spectrum"]["flux"])[None], np.array(rows[5]["spectrum"]["ivar"])[None], np.log10(rows[5]["spectrum"]["lambda"]), [0.1])
    assert np.allclose(s.spectra[5] * s.catalog["norm"][5], flux[0], rtol=1e-5) and np.array_equal(s.ivar[5] > 0, ivar[0] > 0)


def test_numbers_as_ids(tmp_path):
    path = sdss_file(tmp_path / "a.hdf5", [power_law(3.58, 3800)] * 2, Z=[0.1, 0.1])
    with h5py.File(path, "r+") as f: del f["object_id"]; f["object_id"] = np.array([2 ** 63 - 1, 39627000000000001], np.int64)
    assert from_multimodal_universe(path, tmp_path / "s", progress=False).catalog["object_id"].tolist() == [str(2 ** 63 - 1), "39627000000000001"]
    with h5py.File(path, "r+") as f: del f["object_id"]; f["object_id"] = np.array([1e18, 2e18])
    with pytest.raises(BadInput, match="last digits are lost"): from_multimodal_universe(path, tmp_path / "t", progress=False)


def test_band_letters():
    names = dict(g="g", G="g", **{"DES-G": "g", "des-z": "z", "hsc-y": "y", "HSC-I2": "i", "ps1_r": "r", "i.00000": "i", "u": None, "jwst-f115w": None, "VIS": None, "NISP-J": None})
    assert {n: band_letter(n) for n in names} == names


def test_real_spectra_come_through(tmp_path):
    "Real SDSS files, put into the layout as the project's script does it from the plates, against the file read directly."
    real = real_dir(__file__)
    if real is None: pytest.skip("no real files")
    spectra = [s for s in map(read_sdss_spectrum, sorted((real / "sdss_spectra").glob("spec-*.fits"))) if s.spec_class == "GALAXY" and 0 < s.redshift < 0.36]
    assert len(spectra) >= 3
    sdss_file(tmp_path / "sdss" / "healpix=1" / "001-of-001.hdf5", [(s.loglam, s.flux, np.where(np.isfinite(s.flux), s.ivar, 0)) for s in spectra],
              ids=[f"{s.object_id}-{i}" for i, s in enumerate(spectra)], Z=np.array([s.redshift for s in spectra], np.float32),
              ra=np.array([s.ra for s in spectra]), dec=np.array([s.dec for s in spectra]))
    out = from_multimodal_universe(tmp_path / "sdss", tmp_path / "s", progress=False)
    assert len(out) == len(spectra)
    for s, flux, ivar, norm in zip(spectra, out.spectra, out.ivar, out.catalog["norm"]):
        want, weight = rebin_to_rest(s.flux[None].astype(float), s.ivar[None].astype(float), s.loglam, [s.redshift])
        both = (ivar > 0) & (weight[0] > 0)
        assert both.sum() > 0.99 * (weight[0] > 0).sum() > 500
        assert np.abs((flux[both] * norm - want[0][both]) * np.sqrt(weight[0][both])).max() < 0.02     # σ: float32 wavelengths and Z
