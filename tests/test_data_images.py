"Images of any survey: flux kept on any grid, zero points never guessed, hips2fits answers checked."
import importlib

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings, strategies as st

from spectranb.core import BadInput, nanomaggies_to_mag, real_dir
from spectranb.data.cutouts import choose_files, cutout_requests, list_requests, read_cutout
from spectranb.data.images import PS1_HIPS, check_hips_file, header_zero_point, hips_requests, resample, resample_cutout, target_wcs
from spectranb.download import Absent, Archives, Manners, Store

pytest.importorskip("reproject")
Y, X = np.indices((224, 224))
PLACE = 150.0, 20.0


def grid(scale, angle, mirror, size, at):
    "A tangent plane about `at`, its tangent point away from the middle of the pixels."
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    w = WCS(naxis=2)
    w.wcs.ctype, w.wcs.crval, w.wcs.crpix = ["RA---TAN", "DEC--TAN"], list(at), [size * 0.55, size * 0.47]
    w.wcs.cd = scale / 3600 * np.array([[-mirror * c, s], [mirror * s, c]])
    return w


def gaussian(wcs, size, ra, dec, scale, total=100.0, sigma=1.2):
    "Flux per pixel of a Gaussian at a position, by its values at the pixel centres."
    x0, y0 = wcs.world_to_pixel_values(ra, dec)
    y, x = np.indices((size, size))
    return total * scale**2 / (2 * np.pi * sigma**2) * np.exp(-((x - x0) ** 2 + (y - y0) ** 2) * scale**2 / 2 / sigma**2)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.08, 0.5), st.floats(0, 360), st.sampled_from([1, -1]), st.floats(-80, 80), st.floats(-5, 5))
def test_flux_and_place_are_kept(scale, angle, mirror, dec, off):
    size = int(70 / scale)
    w = grid(scale, angle, mirror, size, (10.0, dec))
    dec_t, ra_t = dec + off / 3600, 10.0 + off / 3600 / np.cos(np.radians(dec))
    new = resample(gaussian(w, size, ra_t, dec_t, scale), w, ra_t, dec_t, 128)
    total, (y, x) = np.nansum(new), np.indices(new.shape)
    assert total == pytest.approx(100, rel=0.01)
    assert np.allclose([np.nansum(new * x) / total, np.nansum(new * y) / total], 64, atol=0.05)


def test_distance_from_the_tangent_point_is_accounted_for():
    "Degrees from it the pixels of a tangent plane cover less sky: 1/cos³ of the distance."
    w = WCS(naxis=2)
    w.wcs.ctype, w.wcs.crval, w.wcs.crpix, w.wcs.cdelt = ["RA---TAN", "DEC--TAN"], [150, 20], [0.5, 0.5], [-0.2 / 3600, 0.2 / 3600]
    x0, y0 = w.world_to_pixel_values(150.0, 30.0)
    w.wcs.crpix -= np.round([x0 - 200, y0 - 200])
    shrunk = np.cos(np.radians(10)) ** 3
    image = np.ones((400, 400))                                      # constant flux per pixel, of 0.04 × shrunk arcsec²
    new = resample(image, w, 150.0, 30.0, 64)
    assert np.isfinite(new).all() and np.allclose(new, 0.0625 / 0.04 / shrunk, rtol=2e-3)


def test_north_is_up_and_east_is_left():
    w = grid(0.2, 200, -1, 500, PLACE)
    image = sum(gaussian(w, 500, ra, dec, 0.2, f) for ra, dec, f in ((150 + 10 / 3600 / np.cos(np.radians(20)), 20.0, 50), (150.0, 20 + 15 / 3600, 200)))
    new = resample(image, w, *PLACE)
    assert new[112, 112 - 40] == pytest.approx(50 * 0.0625 / (2 * np.pi * 1.44), rel=0.03) and np.unravel_index(new.argmax(), new.shape) == (172, 112)


def test_the_same_grid_changes_nothing():
    image = np.random.default_rng(0).normal(size=(224, 224))
    new = resample(image, target_wcs(*PLACE), *PLACE)
    assert np.allclose(new[2:-2, 2:-2], image[2:-2, 2:-2], atol=1e-4)


def test_missing_parts_are_nan():
    for scale in 0.15, 0.4:
        size = int(80 / scale); w = grid(scale, 0, 1, size, PLACE)
        image = gaussian(w, size, *PLACE, scale)
        holed = image.copy(); holed[:, : size // 3] = np.nan
        a, b = resample(image, w, *PLACE), resample(holed, w, *PLACE)
        both = np.isfinite(a) & np.isfinite(b)
        assert np.isnan(b).mean() == pytest.approx((80 / 3 - 16) / 56, abs=0.02) and np.allclose(a[both], b[both], rtol=1e-4, atol=1e-6)
    small = grid(0.2, 0, 1, 100, PLACE)                              # 20 arcsec of the 56 wanted
    assert np.isfinite(resample(np.ones((100, 100)), small, *PLACE)).mean() == pytest.approx((20 / 56) ** 2, rel=0.05)


def test_a_large_tile_is_cut_first():
    w = grid(0.25, 3, 1, 6000, PLACE)
    new = resample(np.ones((6000, 6000), np.float32), w, 150.1, 20.1, 64)
    assert np.allclose(new, 1, rtol=1e-3)


@pytest.mark.parametrize("ra, dec", [(150.0, 21.0), (330.0, -20.0), (150.0, -70.0)])
def test_elsewhere(ra, dec):
    with pytest.raises(BadInput, match="does not show this place"): resample(np.ones((100, 100)), grid(0.25, 0, 1, 100, PLACE), ra, dec)


def written(path, scale=0.262, w=True, band=None, total=100.0, **cards):
    size = int(70 / scale)
    wcs = grid(scale, 20, 1, size, PLACE)
    header = wcs.to_header() if w else fits.Header()
    header.update(cards)
    if band: header["FILTER"] = band
    fits.writeto(path, gaussian(wcs, size, *PLACE, scale, total).astype("f4"), header, overwrite=True)
    return path


@pytest.mark.parametrize("cards, given, mag", [(dict(BUNIT="nanomaggy"), None, 17.5), (dict(BUNIT="uJy"), None, 18.9), (dict(BUNIT="nJy"), None, 26.4), (dict(MAGZERO=27.0), None, 22.0), (dict(MAGZPT=30.0, BUNIT="adu"), None, 25.0),
    (dict(MAGZERO=27.0), 22.5, 17.5), (dict(MAGZERO=27.0), dict(g=25.0), 20.0), (dict(MAGZERO=27.0), dict(r=25.0), 22.0), (dict(EXPTIME=100.0, **{"HIERARCH FPA.ZP": 25.0}), None, 25.0)])
def test_zero_points(tmp_path, cards, given, mag):
    c = resample_cutout({"g": written(tmp_path / "g.fits", **cards)}, *PLACE, zero_point=given)
    assert nanomaggies_to_mag(np.nansum(c.data[0])) == pytest.approx(mag, abs=0.01) and nanomaggies_to_mag(100) + c.header["g"]["zero_point"] - 22.5 == pytest.approx(mag, abs=1e-3)


@pytest.mark.parametrize("cards", [{}, dict(BUNIT="adu"), dict(BUNIT="MJy/sr"), dict(BUNIT="???"), dict(MAGZERO="NaN"), dict(EXPTIME=100.0), dict(BUNIT="erg s-1 cm-2")])
def test_no_zero_point_is_guessed(tmp_path, cards):
    with pytest.raises(BadInput, match="no AB zero point"): resample_cutout({"g": written(tmp_path / "g.fits", **cards)}, *PLACE)
    assert header_zero_point(fits.Header(cards)) is None


def test_what_is_refused(tmp_path):
    good = dict(zero_point=22.5)
    with pytest.raises(BadInput, match="WCS"): resample_cutout({"g": written(tmp_path / "a.fits", w=False)}, *PLACE, **good)
    with pytest.raises(BadInput, match="names no grizy"): resample_cutout([written(tmp_path / "a.fits")], *PLACE, **good)
    with pytest.raises(BadInput, match="occurs twice"): resample_cutout([written(tmp_path / f"{k}.fits", band="r") for k in "ab"], *PLACE, **good)
    with pytest.raises(BadInput, match="not one of the bands"): resample_cutout({"u": written(tmp_path / "a.fits")}, *PLACE, **good)
    with pytest.raises(BadInput, match="a.fits: does not show"): resample_cutout({"g": written(tmp_path / "a.fits")}, 10.0, 10.0, **good)
    with pytest.raises(BadInput, match="not there"): resample_cutout({"g": tmp_path / "absent.fits"}, *PLACE, **good)
    with pytest.raises(BadInput, match="NaN everywhere"): resample_cutout({}, *PLACE, **good)
    c = resample_cutout([written(tmp_path / f"{b}.fits", band=b) for b in "yz"], *PLACE, name="seven", **good)
    assert c.name == "seven" and c.bands_present == ("z", "y") and abs(c.ra - 150) < 1e-9 and abs(c.dec - 20) < 1e-9 and c.data.dtype == np.float32


def test_without_reproject(tmp_path, monkeypatch):
    real_import = importlib.import_module
    def absent(name, *a):
        if name == "reproject": raise ImportError(name)
        return real_import(name, *a)
    monkeypatch.setattr("spectranb.data.images.importlib.import_module", absent)
    with pytest.raises(BadInput, match="pip install"): resample_cutout({"g": written(tmp_path / "g.fits")}, *PLACE, zero_point=22.5)


# ---- hips2fits

def hips_body(values=None, ra=150.0, dec=20.0, size=64, shift=0.5):
    w = target_wcs(ra, dec, size); w.wcs.crpix -= shift
    return fits_bytes(np.ones((size, size), np.float32) if values is None else values, w.to_header())


def fits_bytes(values, header):
    import io
    out = io.BytesIO(); fits.PrimaryHDU(values, header).writeto(out)
    return out.getvalue()


def test_hips_answers():
    check = lambda body: check_hips_file(body, 150.0, 20.0, 64, "CDS/P/x", "object 7")
    check(hips_body()); check(hips_body(shift=0)); check(hips_body(np.ones((64, 64), np.int16)))
    with pytest.raises(Absent, match="outside the footprint of CDS/P/x"): check(hips_body(np.full((64, 64), np.nan, np.float32)))
    for body, what in ((b"", "empty"), (b"<html><title>Busy</title>", "Busy"), (b"{'error': 1}", "readable"), (hips_body()[:9000], "readable"), (hips_body(size=60), "60 × 60"),
                       (hips_body(dec=20.01), "another place"), (hips_body(ra=330.0, dec=-20.0), "another place"), (fits_bytes(np.ones((64, 64)), fits.Header()), "coordinate")):
        with pytest.raises(BadInput, match=what) as e: check(body)
        assert e.value.name == "object 7"


def test_hips_requests():
    catalog = pd.DataFrame(dict(object_id=["1", "2"], ra=[370.0, 20.0], dec=[1.0, 2.0]))
    made = list(hips_requests(catalog, {"g": "CDS/P/PanSTARRS/DR1/g", "r": "CDS/P/other"}, 100))
    assert [r.key for r in made] == ["1.hips.g", "2.hips.g", "1.hips.r", "2.hips.r"] and len({r.path for r in made}) == 4 and made[0].url == Archives().hips
    assert made[0].params == dict(hips="CDS/P/PanSTARRS/DR1/g", ra="10.00000000", dec="1.00000000", width=100, height=100, fov="0.0069444444", projection="TAN", coordsys="icrs", format="fits")


def test_hips_and_cutouts_of_one_galaxy_agree(tmp_path):
    "The stand-in serves the same simulated sky both ways."
    from spectranb.standin import Sky, StandIn
    sky = Sky.toy(3, seed=1)
    targets = sky.galaxies.drop_duplicates("galaxy").head(3)
    manners = Manners(rate=1e4)
    with StandIn(sky) as archive, Store(tmp_path) as store:
        store.fetch(hips_requests(targets, {b: PS1_HIPS[b] for b in "gi"}, archives=archive.archives), manners, progress=False)
        questions = list_requests(targets, archives=archive.archives, bands="gi")
        store.fetch(questions, manners, progress=False)
        files, _ = choose_files(targets, [store.path(q.key) for q in questions], "gi")
        store.fetch(cutout_requests(targets, files, archives=archive.archives), manners, progress=False)
        for o in targets.itertuples():
            a = resample_cutout({b: store.path(f"{o.object_id}.hips.{b}") for b in "gi"}, o.ra, o.dec, zero_point=25.0)
            b = read_cutout({b: store.path(f"{o.object_id}.{b}") for b in "gi"})
            inside = np.hypot(X - 112, Y - 112) < 40
            for k in 0, 2: assert np.nansum(a.data[k][inside]) == pytest.approx(np.nansum(b.data[k][inside]), rel=0.02)


@pytest.mark.skipif(real_dir() is None, reason="the real example cutouts are missing")
def test_the_real_galaxy_keeps_its_magnitudes():
    paths = sorted((real_dir() / "ps1_cutouts").glob("*.fits"))
    c = resample_cutout(paths, 27.9520, 0.26348)
    inside = np.hypot(X - 112, Y - 112) <= 60
    for k, mag in enumerate((15.32, 14.48, 14.08, 13.84)): assert nanomaggies_to_mag(c.data[k][inside].sum()) == pytest.approx(mag, abs=0.05)
