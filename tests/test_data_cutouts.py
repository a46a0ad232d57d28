"Cutouts: what the archive is asked, what it may answer, every way in which a set of files can be wrong."
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given, settings, strategies as st

from spectranb.core import BANDS, BadInput, nanomaggies_to_mag, real_dir
from spectranb.data.cutouts import (NO_COVERAGE, Cutout, band_of, batches, calibrate, check_cutout, check_file_list, check_ps1_file, choose_files, crop_or_pad, cutout_path,
                                    cutout_requests, header_wcs, list_requests, lupton_rgb, read_cutout, read_cutouts, read_file_list, show_cutouts)
from spectranb.download import Archives, Manners, Store


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


def test_old_form_of_the_matrix_in_many_threads(files):
    "The old names of the matrix's cards mean the same and are not worth a word, however many threads read at once."
    header = fits.getheader(files["g"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        expected = WCS(header)
        assert len(said) == 4 and "deprecated" in str(said[0].message)
        with ThreadPoolExecutor(8) as pool: found = list(pool.map(lambda _: [header_wcs(header) for _ in range(20)], range(8)))
    assert len(said) == 4, said[4].message
    assert np.array_equal(found[3][5].wcs.pc, expected.wcs.pc) and np.array_equal(found[7][19].wcs_pix2world(5, 9, 0), expected.wcs_pix2world(5, 9, 0))
    assert "PC001001" in header, "the caller's header is left alone"


def test_both_forms_of_the_matrix_in_one_header(files):
    header = fits.getheader(files["g"]); header["PC1_1"], header["PC001001"] = -1.0, 7.0
    with warnings.catch_warnings(): warnings.simplefilter("error"); header_wcs(header)
    assert np.array_equal(header_wcs(header).wcs.pc, [[-1, 0], [0, 1]])


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


# ---- the list of files

HEAD = "projcell subcell ra dec filter mjd type filename shortname badflag".split()


def lines(rows, head=HEAD):
    "A file list; each row a dict over these defaults."
    text = " ".join(head) + "\n"
    for r in rows:
        r = dict(projcell=1405, subcell=53, mjd=0.0, type="stack", badflag=0) | r
        r = dict(filename=f"/rings/{r['projcell']:04d}/{r['subcell']:03d}/{r['filter']}.fits", shortname=f"{r['filter']}.fits") | r
        text += " ".join(str(r[h]) for h in head) + "\n"
    return text


def five(ra, dec, bands="grizy", **kw): return [dict(ra=ra, dec=dec, filter=b, **kw) for b in bands]


def galaxies(*places): return pd.DataFrame([(f"g{k}", *p) for k, p in enumerate(places)], columns=["object_id", "ra", "dec"])


def test_columns_are_read_by_name():
    rows = five(332.6, 2.2, badflag=3)
    full = read_file_list(lines(rows))
    for head in HEAD[::-1], HEAD[3:] + HEAD[:3]: assert read_file_list(lines(rows, head))[full.columns].equals(full)
    nine = read_file_list(lines(rows, HEAD[:-1]).encode())
    assert (nine["badflag"] == 0).all() and (full["badflag"] == 3).all() and nine["filename"].equals(full["filename"])
    assert len(read_file_list(lines([]))) == 0 and len(read_file_list(lines([]).strip())) == 0        # a header alone: nothing there
    assert read_file_list(lines(rows).replace("\n", "\r\n"))["badflag"].tolist() == [3] * 5


@pytest.mark.parametrize("text, what", [("", "empty"), ("  \n", "empty"), ("<html><head><title>Service &amp; more</title>", "web page .'Service & more'"),
    ("<!DOCTYPE HTML>\n<p>busy", "web page"), ("Error 500", "no column"), ("\0\1\2", "no column"), (lines(five(1, 2))[:-3], "9 values for 10 columns"),
    (lines(five("x", 2)), "column ra"), (lines(five("nan", 2)), "no number"), (lines(five(1, 2, badflag="-")), "column badflag")])
def test_what_is_no_file_list(text, what):
    with pytest.raises(BadInput, match=what): read_file_list(text)


def test_a_list_for_others_is_refused():
    ra, dec = np.array([359.81, 20.0]), np.array([1.0, 2.0])
    check_file_list(lines(five(-0.19, 1.0)).encode(), ra, dec)
    with pytest.raises(BadInput, match="not asked for"): check_file_list(lines(five(20.0, 2.0) + five(20.0, 2.001)).encode(), ra, dec)
    check_file_list(lines([]).encode(), np.full(50, 10.0), np.full(50, -40.0))
    with pytest.raises(BadInput, match="covers"): check_file_list(lines([]).encode(), np.full(50, 10.0), np.full(50, 40.0))


def test_rows_go_to_objects_by_position():
    "Shuffled, with missing bands, and RA written in another way."
    rng = np.random.default_rng(0)
    places = np.column_stack([rng.uniform(0, 360, 200), np.degrees(np.arcsin(rng.uniform(-0.4, 1, 200)))])
    catalog, rows = galaxies(*places), []
    lacks = ["".join(rng.choice(list("grizy"), rng.integers(0, 3), replace=False)) for _ in places]
    for k, (ra, dec) in enumerate(places):
        rows += five(round(ra, 7) - 360 * (k % 2), round(dec, 7), [b for b in "grizy" if b not in lacks[k]], shortname=f"g{k}")
    table = read_file_list(lines([rows[i] for i in rng.permutation(len(rows))]))
    files, rejects = choose_files(catalog, [table[:300], table[300:]])
    by_id = files.groupby("object_id")
    assert len(rejects) == 0 and by_id.ngroups == 200 and files["object_id"].drop_duplicates().tolist() == catalog["object_id"].tolist()
    for k in range(200):
        own = by_id.get_group(f"g{k}")
        assert "".join(own["band"]) == "".join(b for b in "grizy" if b not in lacks[k]) and set(own["missing_bands"]) == {"".join(sorted(lacks[k], key="grizy".index))}


def test_the_pole_and_twins():
    catalog = galaxies((10.0, 90.0), (20.0, 30.0), (20.0, 30.0))
    files, rejects = choose_files(catalog, [read_file_list(lines(five(200.0, 90.0) + five(20.0, 30.0)))])
    assert files["object_id"].value_counts().tolist() == [5, 5, 5] and len(rejects) == 0        # RA means nothing at the pole; two spectra of one place
    with pytest.raises(BadInput, match="occurs twice"): choose_files(catalog.assign(object_id="a"), [])


def test_no_coverage_and_wrong_lists():
    catalog = galaxies((10.0, 5.0), (50.0, -40.0), (60.0, 40.0))
    files, rejects = choose_files(catalog, [read_file_list(lines(five(10.0, 5.0)))])
    assert rejects["name"].tolist() == ["g1", "g2"] and set(rejects["reason"]) == {NO_COVERAGE} and "-31" in rejects["remedy"][0].replace("−", "-") and "31" not in rejects["remedy"][1]
    files, rejects = choose_files(catalog, [])
    assert len(files) == 0 and len(rejects) == 3 and list(cutout_requests(catalog, files)) == []
    with pytest.raises(BadInput, match="other positions"): choose_files(catalog, [read_file_list(lines(five(10.0, 5.1)))])


def test_several_files_a_band():
    "Good before bad, first before later, one cell for all bands, other kinds of files left alone."
    at = dict(ra=10.0, dec=5.0)
    choose = lambda rows: choose_files(galaxies((10.0, 5.0)), [read_file_list(lines(rows))])[0].set_index("band")
    f = choose([dict(at, filter="g", filename="bad", badflag=1), dict(at, filter="g", filename="good"), dict(at, filter="g", filename="later"), dict(at, filter="r", filename="only", badflag=7)])
    assert f["filename"].to_dict() == dict(g="good", r="only") and f["badflag"].to_dict() == dict(g=0, r=7) and set(f["missing_bands"]) == {"izy"}
    other = five(10.0, 5.0, "gr", projcell=1406, subcell=1)
    f = choose(other + five(10.0, 5.0, "rizy"))                      # four bands of one cell rather than two of another
    assert set(f["projcell"]) == {1405} and set(f["missing_bands"]) == {"g"}
    assert set(choose(other + five(10.0, 5.0, "gr"))["projcell"]) == {1406}                     # as good: the first
    assert set(choose(five(10.0, 5.0, "grizy", badflag=2) + other)["projcell"]) == {1406}       # two good ones rather than five bad
    f = choose(five(10.0, 5.0, "g") * 3 + five(10.0, 5.0, "r", type="stack.mask") + five(10.0, 5.0, "w"))
    assert f.index.tolist() == ["g"]


def test_64000_objects_take_seconds():
    rng = np.random.default_rng(1)
    n = 64_000
    catalog = pd.DataFrame(dict(object_id=[str(k) for k in range(n)], ra=rng.uniform(0, 360, n), dec=rng.uniform(-25, 80, n)))
    table = pd.DataFrame(dict(ra=np.repeat(catalog["ra"], 5) - 1e-8, dec=np.repeat(catalog["dec"], 5), band=np.tile(list("grizy"), n), filename="x",
                              projcell=np.repeat(np.arange(n) % 2000, 5), subcell=7, badflag=0)).sample(frac=1, random_state=0, ignore_index=True)
    start = time.perf_counter()
    files, rejects = choose_files(catalog, [table])
    assert len(files) == 5 * n and len(rejects) == 0 and time.perf_counter() - start < 150      # a loop over pairs would take hours
    shards = pd.Series([r.path[:2] for r in cutout_requests(catalog[:2000], files[:10_000])]).value_counts()
    assert shards.size == 256 and shards.max() < 200                 # 39 expected


# ---- requests

def test_batches_keep_their_names():
    catalog = galaxies(*[(10 + k / 7, k / 3) for k in range(25)])
    first = list_requests(catalog, 10)
    assert [r.key for r in list_requests(catalog, 10)] == [r.key for r in first] and len({r.path for r in first}) == 3 == len(list(batches(catalog, 10)))
    moved = catalog.assign(ra=catalog["ra"] + np.where(catalog.index == 12, 1e-6, 0))
    assert [a.key == b.key for a, b in zip(list_requests(moved, 10), first)] == [True, False, True]
    assert all(a.key != b.key for a, b in zip(list_requests(catalog, 10, bands="gri"), first))
    r = list_requests(catalog.assign(ra=catalog["ra"] - 360), 10, Archives.at("http://x"))[0]
    assert r.key == first[0].key and r.url == "http://x/ps1/cgi-bin/ps1filenames.py" and first[0].url.startswith("https://ps1images.stsci.edu/cgi-bin/")
    assert r.fields == dict(filters="grizy", type="stack") and r.upload["file"][1].splitlines()[1] == "10.14285714 0.33333333"
    with pytest.raises(BadInput, match="no column"): first[0].check(b"oops")
    pickle.dumps(first[0])


def test_cutout_requests_come_sorted_and_can_be_stored():
    catalog = galaxies((10.0, 5.0), (359.81, 1.0)).assign(object_id=["../a b/ü", "7"])
    files, _ = choose_files(catalog, [read_file_list(lines(five(10.0, 5.0, projcell=2000) + five(-0.19, 1.0)))])
    made = list(cutout_requests(catalog, files, 100, Archives.at("http://x/")))
    assert [r.key for r in made] == [f"7.{b}" for b in "giryz"] + [f"../a b/ü.{b}" for b in "giryz"]      # by cell, then filter
    assert made[0].params == dict(ra="359.81000000", dec="1.00000000", size=100, format="fits", red=files.query("object_id == '7'")["filename"].iloc[0]) and made[0].object_id == "7"
    paths = [r.path for r in made]
    assert len(set(paths)) == 10 and all(p.count("/") == 1 and p.isascii() and ".." not in p and " " not in p for p in paths) and cutout_path("7", "g") == made[0].path
    assert cutout_path("a/b", "g") != cutout_path("a_b", "g") and len(cutout_path("x" * 500, "g")) < 120
    pickle.dumps(made[0])


# ---- the check of a file

TARGET = dict(band="g", size=40, skycell="skycell.1405.053")


def served(tmp_path, **kw):
    "Bytes of a good cutout and the position at pixel index 20."
    path = band_file(tmp_path / "served.fits", SKYCELL="skycell.1405.053", **kw)
    c = read_cutout({"g": path} if kw.get("band", "g") == "g" else [path])
    return path.read_bytes(), c.ra, c.dec


def said(body, ra, dec, **kw):
    with pytest.raises(BadInput) as e: check_ps1_file(body, ra, dec, **{**TARGET, **kw}, name="object 7")
    assert e.value.name == "object 7"
    return e.value.what


def test_a_good_file_passes(tmp_path):
    body, ra, dec = served(tmp_path)
    check_ps1_file(body, ra, dec, **TARGET); check_ps1_file(body, ra - 360, dec, "g", 40)
    for shift in -0.9, 0.9: check_ps1_file(body, ra, dec + shift * 0.25 / 3600, **TARGET)
    nan = band_file(tmp_path / "nan.fits", data=np.full((40, 40), np.nan, np.float32), SKYCELL="skycell.1405.053").read_bytes()
    check_ps1_file(nan, ra, dec, **TARGET)                           # what the archive has: asking again would not help


def test_what_the_check_refuses(tmp_path):
    body, ra, dec = served(tmp_path)
    assert "empty" in said(b"", ra, dec) and "begin as a FITS" in said(b"\0" * 5760, ra, dec)
    assert "'Proxy Error'" in said(b"<html><title>Proxy\n Error</title></html>", ra, dec) and "web page" in said(b"<!doctype html>" + b" " * 9000, ra, dec)
    for cut in range(2880, len(body), 2880): assert "cut off" in said(body[:cut], ra, dec) or "no end" in said(body[:cut], ra, dec)
    for cut in 100, len(body) - 1, len(body) // 2 + 7: assert "2880" in said(body[:cut], ra, dec)
    assert "40 × 40" in said(body, ra, dec, size=41) and "band g, not r" in said(body, ra, dec, band="r") and "skycell.1405.053" in said(body, ra, dec, skycell="skycell.1405.054")
    for d_ra, d_dec in (0, 1.2), (0, -1.2), (1.2, 0), (-1.2, 0): assert "another place" in said(body, ra + d_ra * 0.25 / 3600, dec + d_dec * 0.25 / 3600)
    assert "another place" in said(body, ra + 180, -dec)
    for bad, what in (dict(drop=["EXPTIME"]), "exposure"), (dict(wcs=False), "coordinate"), (dict(BITPIX=1), ""):
        if "BITPIX" in bad: other = body.replace(b"BITPIX  =                  -32", b"BITPIX  =                   32")
        else: other = band_file(tmp_path / "b.fits", SKYCELL="skycell.1405.053", data=np.ones((40, 40), np.float32), **bad).read_bytes()
        assert what in said(other, ra, dec)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2 ** 31), st.integers(1, 20))
def test_random_damage_passes_or_is_bad_input(tmp_path_factory, seed, n):
    body, ra, dec = served(tmp_path_factory.mktemp("fuzz"))
    rng, damaged = np.random.default_rng(seed), bytearray(body)
    for at in rng.integers(0, 5760, n): damaged[at] = rng.integers(0, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: check_ps1_file(bytes(damaged), ra, dec, **TARGET)
        except BadInput: pass


def test_the_quick_way_reads_what_astropy_reads(tmp_path):
    "A plain file is read from its bytes; the same file behind another layout goes through astropy."
    rng = np.random.default_rng(2)
    image = rng.normal(0, 9, (40, 40)).astype(np.float32); image[3, :7] = np.nan
    path = band_file(tmp_path / "a.fits", data=image, **{"HIERARCH CELL.SATURATION": 1.2e6})
    with fits.open(path) as h: fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(h[0].data, h[0].header)]).writeto(tmp_path / "b.fits")
    a, b = read_cutout([path], name="x"), read_cutout([tmp_path / "b.fits"], name="x")
    assert np.array_equal(a.data, b.data, equal_nan=True) and np.allclose(a.data[0], image / 5000, equal_nan=True)
    assert {**a.header["g"], "file": 0} == {**b.header["g"], "file": 0} and a.header["g"]["saturation"] == pytest.approx(1.2e6 / 5000)
    assert np.allclose([a.ra, a.dec], [b.ra, b.dec], atol=1e-12)


# ---- against the stand-in archive (simulated galaxies)

standin = pytest.importorskip("spectranb.standin")
SEED = 1
QUICK = dict(rate=1e4, backoff=0.01, max_wait=0.1, max_pause=0.2, timeout=5)


def round_trip(folder, n=6, tries=6, faults=0.0, **options):
    "Lists and cutouts of a toy sky, through a store."
    sky = standin.Sky.toy(n, seed=SEED)
    targets = sky.galaxies.drop_duplicates("galaxy").query("dec > -28").head(n)
    with standin.StandIn(sky, faults, seed=1, **options) as archive, Store(folder) as store:
        manners = Manners(**QUICK, tries=tries)
        questions = list_requests(targets, 4, archive.archives)
        store.fetch(questions, manners, progress=False)
        files, rejects = choose_files(targets, [store.path(q.key) for q in questions if store.have(q.key)])
        store.fetch(cutout_requests(targets, files, 64, archive.archives), manners, progress=False)
        paths = {i: {b: store.path(f"{i}.{b}") for b in rows["band"] if store.have(f"{i}.{b}")} for i, rows in files.groupby("object_id")}
        return targets, files, rejects, paths, store.rejects(), archive.log()


def test_round_trip(tmp_path):
    targets, files, rejects, paths, lost, log = round_trip(tmp_path)
    cutouts, bad = read_cutouts(paths, 64)
    assert len(files) == 5 * len(targets) and len(rejects) == len(lost) == len(bad) == 0 and len(log) == 2 + len(files)
    place = targets.set_index("object_id")
    for c in cutouts: assert c.bands_present == tuple(BANDS) and np.hypot((c.ra - place.ra[c.name]) * np.cos(np.radians(c.dec)), c.dec - place.dec[c.name]) * 3600 < 0.18


@pytest.mark.parametrize("fault", ["html200", "empty200", "truncated", "wrong_size", "wrong_filter", "wrong_id", "duplicate_rows", "nine_columns", "bsoften", "badflag", "nan_edge"])
def test_faults_are_overcome(tmp_path, fault):
    targets, files, rejects, paths, lost, log = round_trip(tmp_path / "b", n=4, faults={fault: 1.0 if fault in ("duplicate_rows", "nine_columns", "badflag", "nan_edge", "bsoften") else 0.4})
    assert log["fault"].str.contains(fault).any()
    _, clean_files, _, clean, _, _ = round_trip(tmp_path / "a", n=4)
    assert len(rejects) == len(lost) == 0 and len(files) == len(clean_files) == 5 * len(targets)
    for i in paths:
        a, b = read_cutout(paths[i]).data, read_cutout(clean[i]).data
        both = np.isfinite(a) & np.isfinite(b)
        assert both.mean() > 0.3 and np.allclose(a[both], b[both], rtol=1e-4, atol=2e-4)        # asinh in float32 costs some digits


@pytest.mark.parametrize("fault", ["missing_band", "nan_band"])
def test_faults_that_stay_are_flagged(tmp_path, fault):
    targets, files, rejects, paths, lost, log = round_trip(tmp_path, n=6, faults={fault: 0.5})
    cutouts, bad = read_cutouts(paths, 64)
    short = [c for c in cutouts if c.flags["missing_bands"]]
    assert short and len(lost) == 0
    if fault == "missing_band": assert {c.name: "".join(c.flags["missing_bands"]) for c in short} == files[files["missing_bands"] != ""].set_index("object_id")["missing_bands"].to_dict()
    else: assert all(b in c.header for c in short for b in c.flags["missing_bands"])               # a file was there, and nothing in it


def test_objects_fetched_under_a_wrong_id_are_listed(tmp_path):
    targets, files, rejects, paths, lost, log = round_trip(tmp_path, n=6, tries=2, faults=dict(wrong_id=0.5), lasting=("wrong_id",))
    wrong = log[log["fault"].str.contains("wrong_id")]
    assert 0 < len(lost) < len(files) and lost["reason"].str.contains("another place|of skycell").all() and len(wrong) == 2 * len(lost)
    for i, own in paths.items():
        if own: assert abs(read_cutout(own).dec - targets.set_index("object_id").dec[i]) * 3600 < 0.2


def test_an_empty_sky_is_a_reject(tmp_path):
    targets, files, rejects, paths, lost, log = round_trip(tmp_path, n=6, faults=dict(empty_sky=0.5))
    assert 0 < len(rejects) < 6 and set(rejects["name"]) | set(files["object_id"]) == set(targets["object_id"]) and set(rejects["reason"]) == {NO_COVERAGE}


@pytest.mark.skipif(real_dir() is None, reason="the real example cutouts are missing")
def test_real_files_pass_their_check():
    for b in "griz":
        body = (real_dir() / "ps1_cutouts" / f"PS1_{b}.fits").read_bytes()
        check_ps1_file(body, 27.9520, 0.26348, b, 240, "skycell.1329.005")
        start = time.perf_counter()
        for _ in range(20): check_ps1_file(body, 27.9520, 0.26348, b, 240, "skycell.1329.005")
        assert time.perf_counter() - start < 20 * 0.02               # 1.4 ms on the machine where it was written
