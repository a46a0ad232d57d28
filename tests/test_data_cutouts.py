"Cutouts: every way in which a set of files can be wrong."
import warnings

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given, settings, strategies as st

from spectranb.core import BANDS, BadInput, nanomaggies_to_mag, real_dir
from spectranb.data.cutouts import Cutout, band_of, calibrate, check_cutout, crop_or_pad, lupton_rgb, read_cutout, read_cutouts, show_cutouts


def band_file(path, band="g", data=None, size=40, exptime=500.0, where=0, drop=(), wcs=True, **cards):
    "A FITS file with the header cards of a Pan-STARRS stack cutout."
    header = fits.Header()
    if wcs: header.update(CTYPE1="RA---TAN", CTYPE2="DEC--TAN", CRVAL1=28.0, CRVAL2=2.0, CRPIX1=-571.0 + where, CRPIX2=25134.0, CDELT1=6.94444461259988e-05, CDELT2=6.94444461259988e-05,
                          PC001001=-1.0, PC001002=0.0, PC002001=0.0, PC002002=1.0)
    header["EXPTIME"] = exptime
    header["HIERARCH FPA.FILTERID"] = f"{band}.00000"
    header["HIERARCH FPA.ZP"] = 25.0
    header.update(cards)
    for card in drop: del header[card]
    fits.writeto(path, np.full((size, size), exptime * 10, np.float32) if data is None else data, header, overwrite=True)
    return path


@pytest.fixture
def files(tmp_path): return {b: band_file(tmp_path / f"{b}.fits", b, exptime=100.0 * k) for k, b in enumerate(BANDS, 1)}


def refused(files, what, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadInput, match=what) as e: read_cutout(files, **kwargs)
    assert e.value.name
    return e.value


def test_five_bands_in_order(files):
    for given_as in files, list(files.values())[::-1], dict(reversed(files.items())):
        c = read_cutout(given_as)
        assert c.data.shape == (5, 40, 40) and c.data.dtype == np.float32 and np.allclose(c.data, 1) and c.flags["missing_bands"] == []
        assert [c.header[b]["exptime"] for b in BANDS] == [100, 200, 300, 400, 500]
    assert np.asarray(c).shape == (5, 40, 40) and np.asarray(c, dtype=float).dtype == float
    assert read_cutout(str(files["g"])).bands_present == ("g",)


def test_position_is_that_of_the_middle_pixel(files):
    c = read_cutout(files)
    for size in 20, 21, 64: assert np.allclose([crop_or_pad(c, size).ra, crop_or_pad(c, size).dec], [c.ra, c.dec], atol=1e-9)
    assert np.isnan(read_cutout(band_file(files["g"], wcs=False)).ra)


def test_no_image(tmp_path, files):
    fits.PrimaryHDU().writeto(files["r"], overwrite=True)
    assert "r.fits" in refused(files, "holds no image").name
    fits.HDUList([fits.PrimaryHDU(), fits.BinTableHDU.from_columns([fits.Column("a", "E", array=[1.0])])]).writeto(files["r"], overwrite=True)
    refused(files, "holds no image")


def test_wrong_shapes(files):
    for shape in (3, 40, 40), (40,):
        band_file(files["r"], "r", np.zeros(shape, np.float32))
        refused(files, "not two dimensions")
    band_file(files["r"], "r", size=41)
    refused(files, "differ in shape")
    refused([band_file(files["r"], "r", np.zeros((40, 30), np.float32))], "not square")
    assert read_cutout([files["r"]], size=16).data.shape == (5, 16, 16)


def test_all_nan(files):
    nan = np.full((40, 40), np.nan, np.float32)
    band_file(files["z"], "z", nan)
    assert read_cutout(files).flags["missing_bands"] == ["z"]        # one band without data is a missing band
    refused({b: band_file(f, b, nan) for b, f in files.items()}, "NaN everywhere", name="object 7")


def test_a_band_twice(files):
    refused([files["g"], files["r"], files["g"]], "band g occurs twice")
    refused({"g": files["g"], "r": files["g"]}, "is a g image, given as r")


def test_headers_that_do_not_say(tmp_path):
    file = band_file(tmp_path / "a.fits", drop=["FPA.FILTERID"])
    refused([file], "names no grizy band")
    assert read_cutout({"i": file}).bands_present == ("i",)
    refused({"u": file}, "not one of the bands")
    refused([], "no files")
    for bad in dict(drop=["EXPTIME"]), dict(exptime=0.0), dict(exptime=-3.0): refused([band_file(tmp_path / "b.fits", data=np.ones((9, 9), np.float32), **bad)], "EXPTIME")
    refused([band_file(tmp_path / "b.fits", data=np.ones((9, 9), np.float32), EXPTIME="NaN")], "EXPTIME")


def test_damaged_files(files):
    whole = files["g"].read_bytes()
    for content in b"", b"<html>busy</html>", whole[:100], whole[:2880], whole[:len(whole) - 2880]:
        files["g"].write_bytes(content)
        assert "g.fits" in refused(files, "").name
    files["g"].unlink()
    refused(files, "not there")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2 ** 31), st.integers(1, 30))
def test_random_damage_gives_a_cutout_or_bad_input(tmp_path_factory, seed, n):
    folder = tmp_path_factory.mktemp("fuzz")
    data = bytearray(band_file(folder / "g.fits", size=20).read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(data), n): data[at] = rng.integers(0, 256)
    (folder / "g.fits").write_bytes(bytes(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: assert read_cutout([folder / "g.fits"], size=20).data.shape == (5, 20, 20)
        except BadInput: pass


def test_grids(tmp_path, files):
    band_file(files["r"], "r", where=1)
    refused(files, "1.0 pixels apart")
    band_file(files["r"], "r", where=0.05); read_cutout(files)       # a twentieth of a pixel is no difference
    refused([band_file(tmp_path / "a.fits", CDELT1=7.28e-5, CDELT2=7.28e-5)], "pixels are 0.262")
    refused([band_file(tmp_path / "a.fits", PC001001=1.0)], "mirrored")


def test_asinh_stacks(tmp_path):
    counts = np.linspace(-50, 1e5, 400).reshape(20, 20)
    stored = (1.0857362 * np.arcsinh((counts - 2.5) / (2 * 30))).astype(np.float32)
    c = read_cutout([band_file(tmp_path / "a.fits", data=stored, exptime=100.0, BOFFSET=2.5, BSOFTEN=30.0)])
    assert np.allclose(c.data[0], counts / 1000, rtol=1e-5, atol=1e-5)


def test_compressed_image_in_an_extension(tmp_path):
    with fits.open(band_file(tmp_path / "a.fits")) as h: image, header = h[0].data, h[0].header
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(image, header)]).writeto(tmp_path / "b.fits")
    assert np.allclose(read_cutout([tmp_path / "b.fits"]).data[0], 1, atol=1e-3)


def test_calibration():
    assert np.isnan(calibrate([np.inf, -np.inf, np.nan], 10)).all()
    assert nanomaggies_to_mag(calibrate(50.0, 1, zero_point=27.0)) == pytest.approx(27 - 2.5 * np.log10(50), abs=1e-6)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 40))
def test_crop_or_pad_keeps_the_middle(h, w, size):
    image = np.arange(1.0, h * w + 1).reshape(1, h, w)
    new = crop_or_pad(image, size)
    assert new.shape == (1, size, size) and new[0, size // 2, size // 2] == image[0, h // 2, w // 2]
    dy, dx = np.mgrid[:size, :size] - size // 2
    y, x = dy + h // 2, dx + w // 2
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    assert np.isnan(new[0][~inside]).all() and np.array_equal(new[0][inside], image[0, y[inside], x[inside]])


def test_flags_follow_a_crop():
    data = np.ones((5, 40, 40), np.float32); data[1, :5] = np.nan
    c = Cutout(data, flags=check_cutout(data))
    assert c.flags["nan_fraction"]["r"] == 0.125 and crop_or_pad(c, 20).flags["nan_fraction"]["r"] == 0
    data[2, 20, 20] = 1e5
    assert check_cutout(data)["n_above_float16"] == 1


def test_batch_goes_on(files, tmp_path):
    (tmp_path / "bad.fits").write_text("no")
    kept, rejects = read_cutouts({"one": files, "two": [tmp_path / "bad.fits"], "three": [files["g"], files["g"]]}, size=32)
    assert [c.name for c in kept] == ["one"] and rejects["name"].tolist() == ["two", "three"] and "bad.fits" in rejects["reason"][0]


def test_bands_by_header():
    assert band_of({"FPA.FILTERID": "y.00000"}) == "y" and band_of({"FILTER": "R"}) == "r" and band_of({"FILTER": "red"}) is None and band_of({}) is None


def test_pictures():
    import matplotlib; matplotlib.use("Agg")
    rng = np.random.default_rng(0)
    data = rng.normal(0.5, 0.1, (3, 5, 20, 20)).astype(np.float32)
    data[1, :, :, :5] = np.nan; data[2] = np.nan
    pictures = [lupton_rgb(d) for d in data]
    assert all(p.shape == (20, 20, 3) and p.dtype == np.uint8 for p in pictures)
    assert (pictures[1][:, :5] == 128).all() and (pictures[2] == 128).all()
    for missing in range(5):
        d = data[0].copy(); d[missing] = np.nan
        assert (lupton_rgb(d) != 128).any()
    assert len(show_cutouts(data, ["a", "b", "c"]).axes) == 3 and Cutout(data[0]).show()


@pytest.mark.skipif(real_dir() is None, reason="the real example cutouts are missing")
def test_real_bands_share_their_grid():
    c = read_cutout(sorted((real_dir() / "ps1_cutouts").glob("*.fits")), size=224)
    assert c.bands_present == ("g", "r", "i", "z") and c.data.shape == (5, 224, 224)
    assert abs(c.ra - 27.9520) < 1e-4 and abs(c.dec - 0.26348) < 1e-4
