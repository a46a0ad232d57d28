"Reading, rebinning and filling spectra: properties, variants of the file, damage."
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from hypothesis import given, settings, strategies as st

from spectranb.core import REST_EDGES, REST_WAVELENGTH, BadInput, real_dir
from spectranb.data.catalog import specobjid_encode
from spectranb.data.spectra import (GapBasis, check_galaxy, check_spectrum_file, fit_gap_basis, infill, masked_ivar, normalise, read_astroml_npz, read_galaxies, read_npz,
                                    read_published_npz, read_sdss_spectrum, rebin_to_rest, spectrum_name, spectrum_requests, spectrum_urls, to_rest_frame, zwarning_text)
from spectranb.download import Archives

LOGLAM = 3.58 + 1e-4 * np.arange(3840)
EDGES = 10 ** (3.58 + 1e-4 * (np.arange(3841) - 0.5))
Z = st.floats(0.0, 0.36)
sprung = []


def spring(): sprung.append(1)


class Trap:
    "Unpickling it is noticed."
    def __reduce__(self): return spring, ()


def spec_file(path, n=3840, capitals=False, table="SPECOBJ", id_as="text", coeff0=True, loglam0=3.5804, named=True, extra=False, drop=(), **values):
    "A FITS file laid out as SDSS does."
    rng = np.random.default_rng(1)
    v = dict(plate=266, mjd=51602, fiberid=1, run2d="26", z=0.1, zwarning=0, cls="GALAXY", plug_ra=146.7, plug_dec=-1.0, flux=None, ivar=None) | values
    case = str.upper if capitals else str.lower
    flux = (1 + rng.normal(0, 0.1, n)).astype(np.float32) if v["flux"] is None else np.asarray(v["flux"], np.float32)
    ivar = np.full(n, 100, np.float32) if v["ivar"] is None else np.asarray(v["ivar"], np.float32)
    mask = np.zeros(n, np.int32)
    if n > 30: mask[[10, 20, 30]] = 1 << 22, 1 << 23, -2 ** 31
    columns = dict(flux=("E", flux), loglam=("E", (loglam0 + 1e-4 * np.arange(n)).astype(np.float32)), ivar=("E", ivar), and_mask=("J", mask), wdisp=("E", np.ones(n)),
                   sky=("E", np.ones(n)), model=("E", flux))
    coadd = fits.BinTableHDU.from_columns([fits.Column(case(k), f, array=a) for k, (f, a) in columns.items() if k not in drop], name="COADD" if named else "")
    number = int(specobjid_encode(v["plate"], v["mjd"], v["fiberid"], v["run2d"])) if "object_id" not in v else v["object_id"]
    ids = {"text": ("22A", [f"{number:>22}"]), "int64": ("K", np.array([number & 2 ** 64 - 1], np.uint64).astype(np.int64)), "none": None}[id_as]
    row = dict(plate=("J", [v["plate"]]), mjd=("J", [v["mjd"]]), fiberid=("J", [v["fiberid"]]), run2d=("10A", [v["run2d"]]), z=("E", [v["z"]]), zwarning=("J", [v["zwarning"]]),
               plug_ra=("D", [v["plug_ra"]]), plug_dec=("D", [v["plug_dec"]]), sn_median_all=("E", [10.0]), **{"class": ("8A", [v["cls"]])}) | ({"specobjid": ids} if ids else {})
    spall = fits.BinTableHDU.from_columns([fits.Column(case(k), f, array=np.array(a)) for k, (f, a) in row.items()], name=table if named else "")
    lines = fits.BinTableHDU.from_columns([fits.Column("LINENAME", "13A", array=["H_alpha"])], name="SPZLINE" if named else "")
    primary = fits.PrimaryHDU()
    if coeff0: primary.header.update(COEFF0=3.5785, COEFF1=1e-4)
    more = [fits.BinTableHDU.from_columns([fits.Column("flux", "E", array=np.zeros(3))], name="B1-1")] if extra else []
    fits.HDUList([primary, coadd, spall, lines, *more]).writeto(path, overwrite=True)
    return path


@pytest.mark.parametrize("variant", [dict(), dict(capitals=True), dict(table="SPALL"), dict(id_as="int64"), dict(id_as="none"), dict(coeff0=False),
                                     dict(named=False), dict(extra=True), dict(drop=("wdisp", "sky", "model"))])
def test_every_layout_gives_the_same_spectrum(tmp_path, variant):
    one, other = read_sdss_spectrum(spec_file(tmp_path / "a.fits")), read_sdss_spectrum(spec_file(tmp_path / "b.fits", **variant))
    assert np.array_equal(one.flux, other.flux) and np.array_equal(one.and_mask, other.and_mask)
    assert np.abs(other.loglam - (3.5804 + 1e-4 * np.arange(3840))).max() < 1e-12        # not the header's 3.5785
    assert other.object_id == one.object_id == "299489676975171584" and other.run2d == "26"
    assert all(np.allclose(a, b) for a, b in zip(to_rest_frame(one), to_rest_frame(other)))


def test_id_beyond_int64(tmp_path):
    where = dict(plate=9000, mjd=57000, fiberid=500, run2d="v5_13_2")
    for form in "text", "int64":
        assert read_sdss_spectrum(spec_file(tmp_path / "a.fits", id_as=form, **where)).object_id == specobjid_encode(**where)


def test_foreign_id(tmp_path):
    with pytest.raises(BadInput, match="does not belong to 266-51602-1"): read_sdss_spectrum(spec_file(tmp_path / "a.fits", object_id=299489676975171584 + (1 << 38)))


def test_long_ids_stay_text(tmp_path):
    assert read_sdss_spectrum(spec_file(tmp_path / "a.fits", object_id=int("12" * 11))).object_id == "12" * 11


def test_pixel_bits(tmp_path):
    s = read_sdss_spectrum(spec_file(tmp_path / "a.fits"))
    assert np.flatnonzero(masked_ivar(s) == 0).tolist() == [10] and np.flatnonzero(masked_ivar(s, (23,)) == 0).tolist() == [20]
    s.flux[40], s.ivar[50], s.ivar[60] = np.nan, np.inf, -1
    assert np.flatnonzero(masked_ivar(s) == 0).tolist() == [10, 40, 50, 60]


@pytest.mark.parametrize("values, why", [
    (dict(cls="STAR"), "STAR"), (dict(cls="QSO"), "QSO"), (dict(zwarning=4), "another redshift fits almost as well"), (dict(z=0.5), "outside 0.0 to 0.36"),
    (dict(z=-0.001), "outside"), (dict(z=np.nan), "outside"), (dict(ivar=np.zeros(3840)), "ivar is 0 everywhere"), (dict(flux=np.full(3840, np.nan)), "NaN everywhere"),
    (dict(ivar=np.where(np.arange(3840) < 1, 1, 0)), "no good pixel")])
def test_refusals_name_file_and_reason(tmp_path, values, why):
    file = spec_file(tmp_path / "spec-x.fits", **values)
    with pytest.raises(BadInput, match=why) as e: check_galaxy(read_sdss_spectrum(file))
    assert e.value.name == "spec-x.fits" and e.value.remedy
    kept, rejects = read_galaxies([file, spec_file(tmp_path / "good.fits"), tmp_path / "absent.fits"])
    assert [s.name for s in kept] == ["good.fits"] and len(rejects) == 2


def test_damaged_files(tmp_path):
    whole = spec_file(tmp_path / "a.fits").read_bytes()
    bad = tmp_path / "bad.fits"
    for content in b"", b"<html>404 Not Found</html>", whole[:100], whole[:2880], whole[:9000], whole[:len(whole) // 2], whole[:-2880]:
        bad.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(BadInput, match="bad.fits"): read_sdss_spectrum(bad)
    fits.writeto(bad, np.zeros((5, 5)), overwrite=True)
    with pytest.raises(BadInput, match="no table COADD"): read_sdss_spectrum(bad)
    for column in "flux", "ivar", "loglam", "and_mask":
        with pytest.raises(BadInput, match=column.upper()): read_sdss_spectrum(spec_file(bad, drop=(column,)))
    with pytest.raises(BadInput, match="no pixels"): read_sdss_spectrum(spec_file(bad, n=0, flux=[], ivar=[]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2 ** 31), st.integers(1, 40))
def test_random_damage_gives_a_spectrum_or_bad_input(tmp_path_factory, seed, n):
    folder = tmp_path_factory.mktemp("fuzz")
    data = bytearray(spec_file(folder / "a.fits", n=300, flux=np.ones(300), ivar=np.ones(300)).read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, 9000, n): data[at] = rng.integers(0, 256)        # the headers and the start of the table
    (folder / "b.fits").write_bytes(bytes(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: check_galaxy(read_sdss_spectrum(folder / "b.fits"))
        except BadInput: pass


@settings(max_examples=40, deadline=None)
@given(Z, st.integers(0, 10 ** 6))
def test_flat_stays_flat_with_any_gaps(z, seed):
    rng = np.random.default_rng(seed)
    ivar = np.where(rng.random(3840) < 0.2, 0, rng.uniform(0.1, 10, 3840))
    flux, out = rebin_to_rest(np.where(ivar > 0, 3.5, np.nan)[None], ivar[None], LOGLAM, z)
    assert np.isfinite(flux).all() and np.isfinite(out).all() and (out >= 0).all() and (out > 0).sum() > 500
    assert np.allclose(flux[out > 0], 3.5, rtol=1e-12) and (flux[out == 0] == 0).all()


@settings(max_examples=40, deadline=None)
@given(Z, st.integers(0, 10 ** 6), st.integers(250, 450), st.integers(451, 700))
def test_flux_over_any_interval_is_conserved(z, seed, a, b):
    flux = np.random.default_rng(seed).normal(size=3840)
    rest, _ = rebin_to_rest(flux[None], np.ones((1, 3840)), LOGLAM, z)
    low, high = REST_EDGES[[a, b]] * (1 + z)
    overlap = np.clip(np.minimum(EDGES[1:], high) - np.maximum(EDGES[:-1], low), 0, None)
    assert np.isclose((rest[0, a:b] * np.diff(REST_EDGES)[a:b]).sum() * (1 + z), (overlap * flux).sum(), rtol=1e-9, atol=1e-8)


def test_no_factor_one_plus_z():
    for z in 0.0, 0.3: assert np.allclose(rebin_to_rest(np.ones((1, 3840)), np.ones((1, 3840)), LOGLAM, z)[0][0, 300:600], 1)


def test_errors_are_those_of_the_scatter():
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.05, 0.5, 3840)
    flux, ivar = rebin_to_rest(rng.normal(0, sigma, (4000, 3840)), np.broadcast_to(sigma ** -2, (4000, 3840)), LOGLAM, 0.1)
    good = ivar[0] > 0
    ratio = flux[:, good].std(0) * np.sqrt(ivar[0, good])
    assert abs(ratio.mean() - 1) < 0.002 and np.abs(ratio - 1).max() < 5 / np.sqrt(8000)


def test_sigma_shrinks_by_the_number_of_pixels():
    edges = 10 ** (np.log10(REST_EDGES[0]) + 0.00039 / 13 * np.arange(13001))          # 13 pixels to a bin, exactly
    flux, ivar = rebin_to_rest(np.ones((1, 13000)), np.full((1, 13000), 4.0), np.log10(edges), 0.0)
    assert np.allclose(ivar, 4 * 13, rtol=1e-4) and np.allclose(flux, 1)


def test_feature_stays_where_it_is():
    z = 0.137
    line = np.exp(-0.5 * ((10 ** LOGLAM - 6564.632 * (1 + z)) / 4) ** 2)
    rest, ivar = rebin_to_rest(line[None], np.ones((1, 3840)), LOGLAM, z)
    assert abs((rest * REST_WAVELENGTH).sum() / rest.sum() - 6564.632) < 0.05


def test_batch_is_the_sum_of_its_parts():
    rng = np.random.default_rng(2)
    flux, ivar, z = rng.normal(size=(300, 3840)), rng.uniform(0, 1, (300, 3840)).round(1), rng.uniform(0, 0.36, 300)
    together = rebin_to_rest(flux, ivar, LOGLAM, z)
    for i in 0, 255, 256, 299: assert all(np.array_equal(a[i], b[0]) for a, b in zip(together, rebin_to_rest(flux[i:i + 1], ivar[i:i + 1], LOGLAM, z[i])))
    by_edges = rebin_to_rest(flux[:3], ivar[:3], np.log10(EDGES), z[:3])
    assert np.allclose(by_edges[0], together[0][:3], atol=1e-9)
    assert rebin_to_rest(flux[:1].astype(np.float32), ivar[:1].astype(np.float32), LOGLAM, 0.1)[0].dtype == np.float32
    with pytest.raises(ValueError): rebin_to_rest(flux, ivar, LOGLAM[:100], z)


def test_outside_the_grid():
    flux, ivar = rebin_to_rest(np.ones((1, 3840)), np.ones((1, 3840)), LOGLAM, 3.0)
    assert not flux.any() and not ivar.any()


def population(n, seed=0, noise=0.03):
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 1, 1000)
    a = rng.normal(size=(n, 3)) * (0.3, 0.15, 0.08)
    truth = 1 + a @ np.stack([x, x ** 2 - 1 / 3, np.exp(-0.5 * ((x - 0.3) / 0.01) ** 2)])
    truth /= np.sqrt(np.mean(truth ** 2, 1, keepdims=True))
    first = rng.integers(0, 200, (n, 1)); last = rng.integers(750, 1000, (n, 1))
    good = (np.arange(1000) >= first) & (np.arange(1000) <= last) & (rng.random((n, 1000)) > 0.02)
    return truth, np.where(good, truth + rng.normal(0, noise, truth.shape), 0), good / noise ** 2


@pytest.fixture(scope="module")
def learnt():
    truth, flux, ivar = population(1500)
    return truth, flux, ivar, fit_gap_basis(flux, ivar, n_components=3)


def test_basis_recovers_the_population(learnt):
    truth, flux, ivar, basis = learnt
    gap = ivar == 0
    assert np.sqrt(np.mean((infill(flux, ivar, basis) - truth)[gap] ** 2)) < 0.012
    assert np.allclose(basis.components @ basis.components.T, np.eye(3), atol=1e-6) and (np.diff(basis.variance) <= 0).all()
    _, s, _ = np.linalg.svd(truth - truth.mean(0), full_matrices=False)
    assert np.allclose(basis.variance[:2], s[:2] ** 2 / len(truth), rtol=0.05)


def test_infill_scales_with_the_flux(learnt):
    _, flux, ivar, basis = learnt
    one = infill(flux[:50], ivar[:50], basis)
    for c in 1e-3, 1e3: assert np.allclose(infill(c * flux[:50], ivar[:50] / c ** 2, basis) / c, one, rtol=1e-3, atol=1e-4)
    assert np.allclose(infill(flux[3], ivar[3], basis), one[3], atol=1e-5)


def test_huge_gaps_stay_inside_the_population(learnt):
    truth, flux, ivar, basis = learnt
    few = np.zeros_like(ivar[:200]); few[:, 480:500] = ivar[:200, 480:500]
    filled = infill(flux[:200], few, basis)
    assert np.isfinite(filled).all() and (np.abs(filled) < 4).all()


def test_spectra_without_data(learnt):
    _, flux, ivar, basis = learnt
    flux, ivar = flux[:120].copy(), ivar[:120].copy()
    ivar[5] = 0
    for b in basis, None:
        filled = infill(flux, ivar, b)
        assert not filled[5].any() and np.isfinite(filled).all()
    scaled, scaled_ivar, norm = normalise(flux, ivar, basis)
    assert norm[5] == 0 and not scaled[5].any() and not scaled_ivar[5].any() and np.isfinite(scaled).all()
    with pytest.raises(BadInput, match="cannot teach"): fit_gap_basis(flux, np.zeros_like(ivar))


def test_bins_that_nobody_has(learnt):
    _, flux, ivar, _ = learnt
    ivar = ivar.copy(); ivar[:, 400:420] = 0
    basis = fit_gap_basis(flux, ivar, n_components=3)
    assert np.abs(basis.components[:, 402:418]).max() < 1e-3 and np.isfinite(basis.mean).all()
    assert np.abs(basis.mean[400:420] - np.interp(np.arange(400, 420), [399, 420], basis.mean[[399, 420]])).max() < 0.05


def test_noise_only(learnt):
    "A sky fibre: no light, but no reason to break."
    basis = learnt[3]
    noise = np.random.default_rng(0).normal(0, 1, (20, 1000))
    filled = infill(noise, np.where(np.arange(1000) < 700, 1.0, 0) * np.ones((20, 1)), basis)
    assert np.isfinite(filled).all() and np.abs(filled[:, 700:]).max() < 10


def test_few_spectra_get_straight_lines():
    flux, ivar = np.linspace(1, 2, 1000), np.ones(1000)
    ivar[300:400] = 0; ivar[:50] = 0; ivar[970:] = 0
    filled = infill(np.where(ivar > 0, flux, 99), ivar)
    assert np.allclose(filled[300:400], flux[300:400]) and np.allclose(filled[:50], flux[50:70].mean(), atol=1e-3) and filled[-1] < 2


def test_normalise_keeps_physics(learnt):
    _, flux, ivar, basis = learnt
    scaled, scaled_ivar, norm = normalise(5 * flux, ivar / 25, basis)
    good = ivar > 0
    assert np.allclose((scaled * norm[:, None])[good], 5 * flux[good], rtol=1e-5) and np.allclose((scaled_ivar / norm[:, None] ** 2), ivar / 25, rtol=1e-5)
    assert np.allclose(np.mean(infill(scaled, scaled_ivar, basis) ** 2, 1), 1, atol=2e-3)


def test_basis_is_the_same_twice(learnt):
    _, flux, ivar, basis = learnt
    again = fit_gap_basis(flux, ivar, n_components=3)
    assert np.array_equal(again.components, basis.components) and isinstance(again, GapBasis)


def test_zwarning_in_words():
    assert zwarning_text(0) == "none" and zwarning_text(5).startswith("sky fibre") and "bit 31" in zwarning_text(1 << 31)


@pytest.mark.skipif(real_dir() is None, reason="the real example spectra are missing")
def test_real_repeats_agree():
    "Two observations of one galaxy on the lattice they share (measured independently: 0.9 and 0.8 after one free scale)."
    folder = real_dir() / "sdss_spectra"
    for a, b in ("0266-51602-0166", "0266-51630-0174"), ("0266-51602-0526", "0266-51630-0525"):
        (f, v), (g, w) = (to_rest_frame(read_sdss_spectrum(folder / f"spec-{k}.fits")) for k in (a, b))
        good = (v > 0) & (w > 0)
        ratio = (f / np.where(g == 0, 1, g))[good]
        assert np.median(np.abs(ratio / np.median(ratio) - 1)) < 0.02


# addresses, requests, checks of what comes back

SAS = "https://data.sdss.org/sas"
LEGACY = dict(plate=266, mjd=51602, fiberid=1, run2d="26")
BOSS = dict(plate=10000, mjd=57346, fiberid=7, run2d="v5_13_2")          # a plate of five digits
FIELD = dict(field=15000, mjd=59146, catalogid="4375786564", run2d="v6_0_4")


@pytest.mark.parametrize("row, release, lite, first, second", [                 # after the table of folders in SDSS's own documentation and astroquery
    (LEGACY, "DR9", True, "dr9/sdss/spectro/redux/26/spectra/lite/0266/spec-0266-51602-0001.fits", "dr9/boss/"),
    (LEGACY, "DR17", True, "dr17/sdss/spectro/redux/26/spectra/lite/0266/spec-0266-51602-0001.fits", "dr17/eboss/"),
    (LEGACY, "dr17", False, "dr17/sdss/spectro/redux/26/spectra/0266/spec-0266-51602-0001.fits", "dr17/eboss/"),
    (BOSS | dict(run2d="v5_7_0"), "DR12", True, "dr12/boss/spectro/redux/v5_7_0/spectra/lite/10000/spec-10000-57346-0007.fits", "dr12/sdss/"),
    (BOSS | dict(run2d="v5_9_0"), "DR13", True, "dr13/eboss/spectro/redux/v5_9_0/spectra/lite/10000/spec-10000-57346-0007.fits", "dr13/sdss/"),
    (BOSS | dict(run2d="v5_10_0"), 15, False, "dr15/eboss/spectro/redux/v5_10_0/spectra/10000/spec-10000-57346-0007.fits", "dr15/sdss/"),
    (BOSS, "DR16", False, "dr16/eboss/spectro/redux/v5_13_2/spectra/full/10000/spec-10000-57346-0007.fits", "dr16/sdss/"),
    (BOSS, "DR17", True, "dr17/eboss/spectro/redux/v5_13_2/spectra/lite/10000/spec-10000-57346-0007.fits", "dr17/sdss/"),
    (BOSS, "DR18", False, "dr18/spectro/sdss/redux/v5_13_2/spectra/full/10000/spec-10000-57346-0007.fits", "dr18/spectro/boss/"),
    (LEGACY, "DR18", False, "dr18/spectro/sdss/redux/26/spectra/0266/spec-0266-51602-0001.fits", "dr18/spectro/boss/"),
    (FIELD, "DR18", True, "dr18/spectro/sdss/redux/v6_0_4/spectra/lite/15000p/59146/spec-15000-59146-04375786564.fits", "dr18/spectro/boss/"),
    (FIELD, "DR18", False, "dr18/spectro/sdss/redux/v6_0_4/spectra/full/15000p/59146/spec-15000-59146-04375786564.fits", "dr18/spectro/boss/"),
    (FIELD | dict(run2d="v6_1_3"), "DR19", True, "dr19/spectro/boss/redux/v6_1_3/spectra/lite/015000/59146/spec-015000-59146-4375786564.fits", "dr19/spectro/sdss/")])
def test_addresses(row, release, lite, first, second):
    urls = spectrum_urls(row, release, lite)
    assert urls[0] == f"{SAS}/{first}" and urls[1].startswith(f"{SAS}/{second}") and len(set(urls)) == len(urls)
    assert spectrum_urls(row, release, lite, Archives.at("http://127.0.0.1:9"))[0] == f"http://127.0.0.1:9/sas/{first}"


def test_an_id_is_enough_and_rows_of_any_kind_will_do():
    want = spectrum_urls(LEGACY)
    for row in (dict(object_id="299489676975171584"), dict(object_id="299489676975171584", plate=np.nan, run2d=None), LEGACY | dict(run2d=26), LEGACY | dict(run2d=26.0, plate=266.0),
                pd.Series(LEGACY), pd.DataFrame([LEGACY]).iloc[0], {k: str(v) for k, v in LEGACY.items()}, LEGACY | dict(object_id="my galaxy"),
                dict(object_id="299489676975171584", catalogid="4375786564"), LEGACY | dict(catalogid=4375786564)):
        assert spectrum_urls(row) == want
    assert "/10000/spec-10000-57346-0007.fits" in spectrum_urls(dict(object_id=specobjid_encode(**BOSS)))[0]


@pytest.mark.parametrize("row, release, why", [
    (dict(object_id="mine"), "DR17", "mine: plate, mjd, fiberid, run2d unknown"), (LEGACY | dict(run2d=np.nan), "DR17", "run2d unknown"), (dict(plate=266, mjd=51602), "DR17", "fiberid, run2d unknown"),
    (LEGACY | dict(mjd="x"), "DR17", "mjd is 'x', not a whole number"), (LEGACY | dict(plate=-1), "DR17", "not a whole number"), (LEGACY | dict(fiberid=1.5), "DR17", "not a whole number"),
    (dict(catalogid="4375786564", field=15000, run2d="v6_0_4"), "DR18", "mjd unknown"), (FIELD, "DR17", "of SDSS-V, which DR17 does not hold"),
    (LEGACY | dict(run2d="v6_0_4"), "DR18", "no field and catalogid"), (LEGACY, "DR8", "DR8: is not a release"), (LEGACY, "final", "not a release"),
    (LEGACY | dict(object_id="299489676975171584", fiberid=2), "DR17", "packs fiberid 1, but the table says 2")])
def test_rows_without_an_address(row, release, why):
    with pytest.raises(BadInput, match=why) as e: spectrum_urls(row, release)
    assert e.value.remedy


def test_requests_of_a_catalogue(tmp_path):
    ids = [specobjid_encode(266, 51602, f, "26") for f in (1, 2, 3)]
    catalog = pd.DataFrame(dict(object_id=[*ids, "mine"], ra=0.0))
    requests = []
    with pytest.raises(BadInput, match="mine: plate"):
        for r in spectrum_requests(catalog): requests.append(r)
    errors = []
    assert [r.key for r in spectrum_requests(catalog, errors=errors)] == ids == [r.key for r in requests] and [e.name for e in errors] == ["mine"]
    assert requests[1].path == "0266/spec-0266-51602-0002.fits" and requests[1].object_id == ids[1] and isinstance(requests[1].url, tuple)
    body = spec_file(tmp_path / "a.fits", fiberid=2).read_bytes()
    pickle.loads(pickle.dumps(requests[1])).check(body)
    with pytest.raises(BadInput, match="file is that of 266-51602-2"): requests[0].check(body)
    fields = next(spectrum_requests(pd.DataFrame([FIELD]), "DR18"))
    assert fields.key == "15000-59146-04375786564" and fields.path == "15000/spec-15000-59146-04375786564.fits"


def test_requests_are_made_as_asked_for():
    n = 20_000
    catalog = pd.DataFrame(dict(object_id=specobjid_encode(np.full(n, 266), np.full(n, 51602), np.arange(n) % 640, np.full(n, "26"))))
    assert sum(1 for _ in spectrum_requests(catalog)) == n and next(spectrum_requests(catalog)).key == catalog["object_id"][0]


def test_whole_files_only(tmp_path):
    body = spec_file(tmp_path / "a.fits", extra=True).read_bytes()
    right = check_spectrum_file(body, "299489676975171584", **LEGACY)
    assert np.array_equal(right.flux, read_sdss_spectrum(tmp_path / "a.fits").flux) and right.name == "299489676975171584"
    with fits.open(tmp_path / "a.fits") as h: ends = [i["datLoc"] + i["datSpan"] for i in (x.fileinfo() for x in h)]
    for cut in (0, 1, 80, 2879, 2880, *ends[:3], *(e - 2880 for e in ends[1:]), *(e - 1 for e in ends), len(body) // 2):
        with pytest.raises(BadInput): check_spectrum_file(body[:cut], **LEGACY)
    for bad, why in ((b"<!DOCTYPE html><html><head><title>503 Service\nUnavailable</title>", "HTML page that says '503 Service"), (b"\n<html>", "HTML page"), (b"", "empty"), (b"not found", "begins b'not found'"),
                     (body + b"\0" * 2880, "bytes long")):
        with pytest.raises(BadInput, match=why): check_spectrum_file(bad, **LEGACY)


@pytest.mark.parametrize("other", [dict(plate=267), dict(mjd=51603), dict(fiberid=11), dict(run2d="103")])
def test_anothers_file(tmp_path, other):
    body = spec_file(tmp_path / "a.fits", **other).read_bytes()
    for asked in LEGACY, dict(object_id="299489676975171584"):
        with pytest.raises(BadInput, match="the file is that of"): check_spectrum_file(body, **asked)
    (key, value), = other.items()
    check_spectrum_file(body, **LEGACY | other)
    check_spectrum_file(body, "a user's name", **{k: v for k, v in LEGACY.items() if k != key})


def test_a_field_of_sdss_v(tmp_path):
    body = field_file(tmp_path / "v.fits").read_bytes()
    s = check_spectrum_file(body, **FIELD)
    assert s.catalogid == "4375786564" and s.plate == 15000 and to_rest_frame(s)[1].any()
    for wrong in dict(catalogid="4375786565"), dict(field=15001), dict(mjd=59147):
        with pytest.raises(BadInput, match="15000-59146-4375786564"): check_spectrum_file(body, **FIELD | wrong)


def field_file(path):
    "A file as SDSS-V lays it out: capitals, no plate and fibre, a 28-digit id."
    spec_file(path, capitals=True, table="SPALL", id_as="none", run2d="v6_0_4", mjd=59146)
    with fits.open(path) as h:
        old = h["SPALL"].data
        keep = [fits.Column(n, f, array=old[n]) for n, f in zip(old.names, old.columns.formats) if n not in ("PLATE", "FIBERID")]
        more = [fits.Column("FIELD", "J", array=[15000]), fits.Column("CATALOGID", "K", array=[4375786564]), fits.Column("SPECOBJID", "29A", array=["1234567890123456789012345678"])]
        fits.HDUList([h[0], h[1], fits.BinTableHDU.from_columns(keep + more, name="SPALL"), h[3]]).writeto(path.with_suffix(".new"))
    return path.with_suffix(".new")


@pytest.mark.skipif(real_dir() is None, reason="the real example spectra are missing")
def test_the_real_files_pass_their_own_checks_and_no_others():
    files = sorted((real_dir() / "sdss_spectra").glob("spec-*.fits"))
    bodies = [f.read_bytes() for f in files]
    ids = [read_sdss_spectrum(f).object_id for f in files]
    for i, (f, body) in enumerate(zip(files, bodies)):
        row = dict(object_id=ids[i])
        assert all(u.endswith("/" + f.name) for u in spectrum_urls(row)[:2]) and spectrum_name(row) == f.name
        assert check_spectrum_file(body, ids[i]).object_id == ids[i]
        with pytest.raises(BadInput, match="the file is that of"): check_spectrum_file(body, ids[i - 1])
        with pytest.raises(BadInput): check_spectrum_file(body[:-2880], ids[i])


# specutils as an independent rebinning

@settings(max_examples=8, deadline=None)
@given(Z, st.integers(0, 10 ** 6))
def test_rebin_agrees_with_specutils(z, seed):
    from astropy import units as u
    from astropy.nddata import InverseVariance
    from specutils import Spectrum
    from specutils.manipulation import FluxConservingResampler
    rng = np.random.default_rng(seed)
    loglam = 3.58 + 3e-4 * np.arange(1280)                           # coarse pixels: cheap, and every bin edge cuts one
    flux, ivar = np.cumsum(rng.normal(size=1280)) + 100, rng.uniform(0.5, 2, 1280)
    theirs = FluxConservingResampler()(Spectrum(flux=flux * u.Jy, spectral_axis=10 ** loglam * u.AA, uncertainty=InverseVariance(ivar / u.Jy ** 2)), REST_WAVELENGTH * (1 + z) * u.AA)
    ours, ours_ivar = (a[0] for a in rebin_to_rest(flux[None], ivar[None], loglam, z))
    inner = np.flatnonzero(ours_ivar)[2:-2]
    assert len(inner) > 500
    assert np.allclose(ours[inner], theirs.flux.value[inner], rtol=2e-4)       # its edges are midway in λ, ours in log λ: 1e-4 of a pixel's step
    assert np.allclose(ours_ivar[inner], theirs.uncertainty.array[inner], rtol=5e-3)


# what others have published

def corrected(n=40, p=1000, k=10, coeff0=3.53, coeff1=0.00039, errors=True, seed=0):
    "Arrays with the names and shapes of astroML's compute_sdss_pca script."
    rng = np.random.default_rng(seed)
    mu, evecs = 0.03 + 0.005 * np.sin(np.arange(p) / 60), np.linalg.qr(rng.normal(size=(p, k + 2)))[0].T
    coeffs, norms = 0.05 * rng.normal(size=(n, k)), rng.uniform(100, 2000, n)
    mask = rng.random((n, p)) < 0.1
    whole = (mu + coeffs @ evecs[:k]) * norms[:, None]
    out = dict(spectra=np.where(mask, 0, whole).astype("f4"), mask=mask, coeff0=coeff0, coeff1=coeff1, spec_cln=np.full(n, 2), lineindex_cln=np.arange(n) % 8,
               log_NII_Ha=np.zeros(n, "f4"), log_OIII_Hb=np.zeros(n, "f4"), z=rng.uniform(0, 0.36, n).astype("f4"), zerr=np.zeros(n, "f4"), plate=np.full(n, 266), mjd=np.full(n, 51602),
               fiber=1 + np.arange(n), mu=mu, evecs=evecs, evals=np.ones(k + 2), norms=norms, coeffs=coeffs)
    if errors: out["spec_err"] = rng.uniform(0.2, 2, (n, p)).astype("f4")
    return out, whole


def test_published_spectra(tmp_path):
    arrays, whole = corrected()
    np.savez(tmp_path / "spec64k.npz", **arrays)
    flux, ivar, table = read_published_npz(tmp_path / "spec64k.npz")
    assert flux.dtype == np.float32 and np.allclose(flux, whole, rtol=1e-5, atol=1e-3)
    bad = arrays["mask"] | (arrays["spec_err"] < 0.25)
    assert np.array_equal(ivar == 0, bad) and np.allclose(ivar[~bad], arrays["spec_err"][~bad] ** -2.0, rtol=1e-5)
    assert table["object_id"].tolist() == list(specobjid_encode(table["plate"], table["mjd"], table["fiberid"], table["run2d"])) and table["object_id"][0] == "299489676975171584"
    assert table["published_class"].tolist() == [2 <= i % 8 <= 6 for i in range(40)] and np.allclose(table["norm"], arrays["norms"] / 1000 ** 0.5)
    assert np.allclose(table["redshift"], arrays["z"]) and "fiber" not in table


def test_astroml_fills_as_we_do(tmp_path):
    pytest.importorskip("astroML")
    arrays, whole = corrected()
    np.savez(tmp_path / "spec64k.npz", **arrays)
    (f, v, t), (g, w, u) = read_published_npz(tmp_path / "spec64k.npz"), read_astroml_npz(tmp_path / "spec64k.npz")
    assert np.allclose(f, g, rtol=1e-6, atol=1e-4) and np.array_equal(v, w) and t["object_id"].equals(u["object_id"])
    assert np.array_equal(read_astroml_npz(arrays)[0], g)


def test_astroml_on_its_own_grid(tmp_path):
    pytest.importorskip("astroML")
    arrays, whole = corrected(coeff0=3.5, coeff1=0.0004, errors=False)
    for k in "plate", "mjd", "fiber", "spec_err": arrays.pop(k, None)
    np.savez(tmp_path / "spec4000.npz", **arrays)
    flux, ivar, table = read_astroml_npz(tmp_path / "spec4000.npz")
    inside = REST_WAVELENGTH < 10 ** (3.5 + 0.0004 * 998)
    assert flux.shape == ivar.shape == (40, 1000) and not ivar[:, ~inside][:, 3:].any() and not flux[:, ~inside][:, 3:].any()
    smooth = np.array([np.interp(REST_WAVELENGTH[inside], 10 ** (3.5 + 0.0004 * np.arange(1000)), row) for row in arrays["mu"] * arrays["norms"][:, None]])
    arrays["coeffs"][:] = 0; arrays["spectra"] = (arrays["mu"] * arrays["norms"][:, None]).astype("f4")
    assert np.allclose(read_astroml_npz(arrays)[0][:, inside], smooth, rtol=2e-3)       # a smooth spectrum stays in its place
    assert table["object_id"][3] == "spec4000-00003" and 0.85 < (ivar[:, inside] > 0).mean() < 0.96


@pytest.mark.parametrize("change, why", [
    (dict(mask=None), "lacks mask .it holds .*Expected: spectra, mask"), (dict(mu=np.zeros(7)), "'mu' has shape .7,."), (dict(z=np.zeros(3)), "'z' has shape"),
    (dict(spectra=np.zeros(5)), "'spectra' has shape"), (dict(evecs=np.zeros((2, 1000))), "'evecs'"), (dict(spec_err=np.zeros((40, 3))), "'spec_err'"),
    (dict(z=np.array([None] * 40)), "array 'z' holds Python objects"), (dict(plate=np.array([Trap()] * 40, object)), "array 'plate' holds Python objects")])
def test_published_files_that_do_not_fit(tmp_path, change, why):
    arrays = {k: v for k, v in (corrected()[0] | change).items() if v is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadInput, match=why): read_published_npz(tmp_path / "a.npz")
    assert not sprung


def test_the_trap_works():
    pickle.loads(pickle.dumps(Trap()))
    assert sprung.pop() == 1


def test_files_that_are_no_npz(tmp_path):
    file = tmp_path / "a.npz"
    with pytest.raises(BadInput, match="is not there"): read_npz(file)
    np.save(tmp_path / "b.npy", np.zeros(3))
    for content, why in ((b"", "not a readable"), (b"<html>", "Python objects|not a readable"), (pickle.dumps(Trap()), "Python objects"), ((tmp_path / "b.npy").read_bytes(), "one array")):
        file.write_bytes(content)
        with pytest.raises(BadInput, match=why): read_npz(file)
    np.savez(file, **corrected()[0])
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BadInput, match="not a readable"): read_npz(file)
    assert not sprung


def test_checks_in_threads_leave_the_warning_filters_alone():
    import warnings
    from concurrent.futures import ThreadPoolExecutor
    from spectranb.data.spectra import check_spectrum_file
    body = b"SIMPLE  =                    T" + b" " * 2850
    def check(i):
        try: check_spectrum_file(body, "spec")
        except BadInput: return True
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool: assert all(pool.map(check, range(300)))
    assert list(warnings.filters) == before
