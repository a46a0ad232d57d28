"""The stand-in archive: answers as the real services give them, checked with the clients and libraries that others wrote."""
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import requests
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS

from spectranb.core import BANDS, BadInput, real_dir
from spectranb.data.catalog import specobjid_decode
from spectranb.data.cutouts import read_cutout
from spectranb.data.spectra import check_galaxy, read_sdss_spectrum, to_rest_frame
from spectranb.standin import (FAULTS, NEW_COLUMNS, OLD_COLUMNS, SKYCELL, Catalogue, Faults, Sky, StandIn, asinh_scaled,
    find_skycell, list_rows,
                               projcell_centre, skycell_corner, spectrum_path, stack_name, tangent, to_sqlite)


@pytest.fixture(scope="module")
def sky():
    return Sky.toy(60, seed=4, south=1, sdssv=2)


@pytest.fixture(scope="module")
def archive(sky):
    with StandIn(sky) as running: yield running
    assert running.errors == []


@pytest.fixture
def sdss(archive):
    from astroquery.sdss import SDSS, conf
    with conf.set_temp("skyserver_baseurl", archive.archives.skyserver), conf.set_temp("sas_baseurl",
        archive.archives.sas): yield SDSS


def good(sky, k=5):
    g = sky.galaxies
    return g[(g["class"] == "GALAXY") & (g.zWarning == 0) & (g.catalogid == 0) & (g.dec > -30)].iloc[k]


def names(archive, **params):
    text = requests.get(archive.url + "/ps1/cgi-bin/ps1filenames.py", params=params, timeout=5).text
    return pd.read_csv(io.StringIO(text), sep=" ", dtype=dict(filter=str))


def cut(archive, o, band="r", size=224, row=None, **params):
    params = dict(ra=o.ra, dec=o.dec, size=size, format="fits", red=(row or list_rows(o.ra, o.dec, band)[0])["filename"]) | params
    return requests.get(archive.url + "/ps1/cgi-bin/fitscut.cgi", params=params, timeout=5)


def spec(archive, o, release=17, **kwargs):
    return requests.get(f"{archive.url}/sas/" + spectrum_path(release, o.run2d, o.plate, o.mjd, o.fiberid, **kwargs), timeout=5)


def values(content):
    with fits.open(io.BytesIO(content)) as hdus: return hdus[0].data.astype(float), hdus[0].header.copy()


# Where things are

@pytest.mark.parametrize("ra, dec", [(0.01, 0.0), (359.99, 1.0), (123.4, 56.7), (200.0, -29.0), (10.0, 68.0),
    (332.6004516572, 2.1998090576)])
def test_projection_is_that_of_astropy(ra, dec):
    projcell, subcell, x, y = find_skycell(ra, dec)
    ra0, dec0 = projcell_centre(projcell)
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.cdelt = ["RA---TAN", "DEC--TAN"], [ra0, dec0], [-0.25 / 3600, 0.25 / 3600]
    assert np.allclose(wcs.wcs_world2pix(ra, dec, 0), (x - 1, y - 1), atol=1e-6)
    left, low = skycell_corner(subcell)
    assert 0 <= x - left < SKYCELL[0] and 0 <= y - low < SKYCELL[1]


def test_projection_cells_of_real_files():
    assert find_skycell(27.952, 0.26348)[:2] == (1329, 5) and find_skycell(332.6004516572, 2.1998090576)[:2] == (1405, 53)
    assert tangent(10, 20, 10, 20) == (0, 0)


# Lists of images

def test_list_by_position(archive, sky):
    o = good(sky)
    table = names(archive, ra=o.ra, dec=o.dec, filters="gri", type="stack")
    assert tuple(table.columns) == NEW_COLUMNS and list(table["filter"]) == ["g", "r", "i"]
    assert table.ra[0] == o.ra and table.filename[0].endswith(table.shortname[0]) and (table.mjd == 0).all()
    assert names(archive, ra=o.ra, dec=-40).empty
    assert list(names(archive, ra=o.ra, dec=o.dec, type="stack,stack.wt").type.unique()) == ["stack", "stack.wt"]


def test_list_by_upload(archive, sky):
    some = sky.galaxies[["ra", "dec"]].drop_duplicates().iloc[:20]
    lines = "\n".join(f"{o.ra} {o.dec}" for o in some.itertuples())
    text = requests.post(archive.url + "/ps1/cgi-bin/ps1filenames.py", data=dict(filters="grizy", type="stack"),
        files=dict(file=("list.txt", lines))).text
    table = pd.read_csv(io.StringIO(text), sep=" ")
    assert len(table) == 5 * (some.dec > -31.8).sum() < 100 and set(table.ra) == set(some.ra[some.dec > -31.8])


def test_list_by_skycell_gives_the_cells_centre(archive):
    table = names(archive, skycell="1405.053", filters="g")
    assert np.allclose(table[["ra", "dec"]].iloc[0], [332.6004516572, 2.1998090576], atol=3e-4)      # a real answer, to 1″
    assert table.filename[0] == "/rings.v3.skycell/1405/053/rings.v3.skycell.1405.053.stk.g.unconv.fits"


# Cutouts

@pytest.mark.parametrize("size", [1, 63, 64, 224, 241])
def test_target_stands_at_half_the_size(archive, sky, size):
    o = good(sky)
    for band in BANDS:
        data, header = values(cut(archive, o, band, size).content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x, y = WCS(header).all_world2pix(o.ra, o.dec, 0)
        assert data.shape == (size, size) and max(abs(x - size // 2), abs(y - size // 2)) <= 0.5 + 1e-6
        assert header["FPA.FILTERID"][0] == band and header["PC001001"] == -1 and header["RADESYS"] == "FK5"


def test_cutout_is_what_our_reader_expects(archive, sky, tmp_path):
    o, files = good(sky), {}
    for band in BANDS:
        files[band] = tmp_path / f"{band}.fits"
        files[band].write_bytes(cut(archive, o, band).content)
    cutout = read_cutout(files)
    assert abs(cutout.dec - o.dec) * 3600 < 0.2 and not cutout.flags["missing_bands"]
    inside = np.hypot(*np.ogrid[-112:112, -112:112]) < 100
    mag = 22.5 - 2.5 * np.log10(cutout.data[1][inside].sum())
    assert abs(mag - o.modelMag_r) < 0.05


def test_bands_share_noise_free_grid_and_files_are_reproducible(archive, sky):
    o = good(sky)
    assert cut(archive, o).content == cut(archive, o).content
    assert Sky.toy(60, seed=4, south=1, sdssv=2).cutout(list_rows(o.ra, o.dec, "r")[0]["filename"], o.ra, o.dec) == cut(archive,
        o).content


def test_parameters_in_any_case_and_by_pixel(archive, sky):
    o = good(sky)
    row = list_rows(o.ra, o.dec, "r")[0]
    upper = requests.get(archive.url + "/ps1/cgi-bin/fitscut.cgi", params=dict(RA=o.ra, DEC=o.dec, SIZE=224, FORMAT="fits",
        Red=row["filename"]))
    assert upper.content == cut(archive, o).content
    by_wcs = requests.get(archive.url + "/ps1/cgi-bin/fitscut.cgi", params=dict(x=o.ra, y=o.dec, wcs=1, size=224, format="fits",
        red=row["filename"]))
    assert by_wcs.content == upper.content


def test_beyond_the_cells_edge_is_nan(archive):
    name = stack_name(1405, 53, "g")
    page = requests.get(archive.url + "/ps1/cgi-bin/fitscut.cgi", params=dict(x=5, y=3000, size=100, format="fits", red=name))
    data, _ = values(page.content)                                   # pixels -45 … 54 of the cell
    assert data.shape == (100, 100) and np.isnan(data[:, :45]).all() and np.isfinite(data[:, 45:]).all()
    far = requests.get(archive.url + "/ps1/cgi-bin/fitscut.cgi", params=dict(x=-500, y=3000, size=100, format="fits", red=name))
    assert far.status_code == 500 and not far.content.startswith(b"SIMPLE")


def test_hips2fits_is_resampled_and_nan_outside(archive, sky):
    o = good(sky)
    ask = dict(hips="CDS/P/PanSTARRS/DR1/r", ra=o.ra, dec=o.dec, width=121, height=101, fov=121 * 0.25 / 3600, projection="TAN",
        coordsys="icrs", format="fits")
    data, header = values(requests.get(archive.url + "/hips", params=ask).content)
    assert data.shape == (101, 121) and np.allclose(WCS(header).all_pix2world(60, 50, 0), (o.ra, o.dec), atol=1e-8)
    stack, about = values(cut(archive, o).content)
    ours, theirs = data[10:91, 20:101].sum(), stack[112 - 40:112 + 41, 112 - 40:112 + 41].sum() / about["EXPTIME"]
    assert abs(ours / theirs - 1) < 0.02
    south, _ = values(requests.get(archive.url + "/hips", params=ask | dict(dec=-40)).content)
    assert np.isnan(south).all()


# Spectra

def test_spectra_pass_our_readers_and_only_good_galaxies_pass_the_check(archive, sky, tmp_path):
    for o in sky.galaxies.itertuples():
        if o.catalogid: continue
        (tmp_path / "s.fits").write_bytes(spec(archive, o).content)
        s = read_sdss_spectrum(tmp_path / "s.fits")
        assert s.object_id == o.object_id and s.run2d == o.run2d and abs(s.redshift - o.z) < 1e-6 and s.ra == o.ra
        if sky.galaxies["class"][o.row] == "GALAXY" and not o.zWarning: check_galaxy(s)
        else:
            with pytest.raises(BadInput): check_galaxy(s)


def test_spectrum_has_the_layout_of_the_real_files(archive, sky):
    for o in [good(sky, 0), sky.galaxies[(sky.galaxies.run2d == "v5_13_2") & (sky.galaxies.plate >= 8192)].iloc[0]]:
        with fits.open(io.BytesIO(spec(archive, o).content)) as hdus:
            hdus.verify("exception")
            assert [h.name for h in hdus] == ["PRIMARY", "COADD", "SPECOBJ" if o.run2d == "26" else "SPALL", "SPZLINE"]
            assert hdus[1].columns.names == ["flux", "loglam", "ivar", "and_mask", "or_mask", "wdisp", "sky", "model"]
            assert np.allclose(hdus[1].data["loglam"], hdus[0].header["COEFF0"] + 1e-4 * np.arange(len(hdus[1].data)), atol=5e-7)
            stored = str(hdus[2].data["SPECOBJID"][0]).strip()
            assert int(stored) % (1 << 64) == int(o.object_id)
        with fits.open(io.BytesIO(spec(archive, o, full=True).content)) as hdus: assert len(hdus) > 4


def test_roots_of_the_releases(archive, sky):
    legacy, boss = good(sky, 0), sky.galaxies[sky.galaxies.run2d == "v5_13_2"].iloc[0]
    v = sky.galaxies[sky.galaxies.catalogid > 0].iloc[0]
    name = f"{v.plate}p/{v.mjd}/spec-{v.plate}-{v.mjd}-{v.catalogid:011d}.fits"
    p, b = f"{legacy.plate:04d}/spec-{legacy.plate:04d}-{legacy.mjd}-{legacy.fiberid:04d}.fits", f"{boss.plate:04d}/spec-{boss.plate:04d}-{boss.mjd}-{boss.fiberid:04d}.fits"
    there = [f"dr9/sdss/spectro/redux/26/spectra/lite/{p}", f"dr15/sdss/spectro/redux/26/spectra/{p}",
        f"dr17/sdss/spectro/redux/26/spectra/lite/{p}",
             f"dr18/spectro/sdss/redux/26/spectra/lite/{p}", f"dr12/boss/spectro/redux/v5_13_2/spectra/lite/{b}",
                 f"dr14/eboss/spectro/redux/v5_13_2/spectra/{b}",
             f"dr17/eboss/spectro/redux/v5_13_2/spectra/full/{b}", f"dr18/spectro/sdss/redux/v5_13_2/spectra/lite/{b}",
                 f"dr18/spectro/sdss/redux/v6_0_4/spectra/lite/{name}",
             f"dr19/spectro/boss/redux/v6_1_3/spectra/lite/{v.plate:06d}/{v.mjd}/spec-{v.plate:06d}-{v.mjd}-{v.catalogid}.fits"]
    missing = [f"dr17/eboss/spectro/redux/26/spectra/lite/{p}", f"dr17/sdss/spectro/redux/v5_13_2/spectra/lite/{b}",
        f"dr17/eboss/spectro/redux/v5_13_2/spectra/{b}",
               f"dr17/spectro/sdss/redux/v6_0_4/spectra/lite/{name}", f"dr17/sdss/spectro/redux/103/spectra/lite/{p}"]
    for path in there: assert requests.get(f"{archive.url}/sas/{path}").content[:6] == b"SIMPLE", path
    for path in missing:
        page = requests.get(f"{archive.url}/sas/{path}")
        assert page.status_code == 404 and b"<html>" in page.content, path


def test_survey_comes_back_as_it_went_in(tmp_path):
    class Survey:                                                    # what one shows of itself
        def __len__(self): return 2
        size = 32
        catalog = pd.DataFrame(dict(object_id=["sim-a", "sim-b"], ra=[150.0, 200.0], dec=[2.0, 40.0], redshift=[0.05, 0.2],
            norm=[10.0, 3.0]))
        rng = np.random.default_rng(0)
        cutouts = rng.normal(size=(2, 5, 32, 32)).astype("f2")
        spectra, ivar = 1 + 0.1 * rng.normal(size=(2, 1000)).astype("f4"), np.full((2, 1000), 100.0, "f4")
    Toy = Survey()
    sky = Sky.from_survey(Toy)
    for k, o in enumerate(sky.galaxies.itertuples()):
        for b, row in enumerate(list_rows(o.ra, o.dec)):
            data, header = values(sky.cutout(row["filename"], o.ra, o.dec, 48))
            inner = data[8:40, 8:40] / header["EXPTIME"] / 10
            assert np.allclose(inner, Toy.cutouts[k, b].astype(float), rtol=1e-5) and np.isnan(data[:8]).all()
        (tmp_path / "s.fits").write_bytes(sky.spec_file(k))
        s = check_galaxy(read_sdss_spectrum(tmp_path / "s.fits"))
        flux, ivar = to_rest_frame(s)
        ok, norm = ivar > 0, Toy.catalog.norm[k]
        assert ok.sum() > 700 and abs(np.median(ivar[ok] * norm ** 2 / 100) - 1) < 0.15
        assert np.std(flux[ok] / norm - Toy.spectra[k][ok]) < 0.5 * 0.1
    assert specobjid_decode(sky.galaxies.object_id.tolist()).plate.tolist() == sky.galaxies.plate.tolist()


# The catalogue

def test_astroquery_sql(sdss, sky):
    sql = """SELECT TOP 500 CAST(s.specObjID AS VARCHAR(20)) AS object_id, s.specObjID, s.plate, s.z, p.petroMag_r -- a comment
             FROM SpecObj AS s LEFT JOIN PhotoObjAll AS p ON p.objID = s.bestObjID
             WHERE (s.legacy_target1 & (64|128|256)) > 0 AND s.class = 'galaxy' AND s.zWarning = 0 AND s.z BETWEEN 0.02 AND 0.36 ORDER BY s.specObjID"""
    table = sdss.query_sql(sql, cache=False)
    g = sky.galaxies
    want = g[(g.sciencePrimary == 1) & (g["class"] == "GALAXY") & (g.zWarning == 0) & (g.legacy_target1 > 0) & (g.z > 0.02)]
    ids = sorted(map(int, want.object_id))
    assert [int(i) for i in table["specObjID"]] == ids and max(ids) >= 1 << 63
    assert np.allclose(table["z"], want.set_index(want.object_id.map(int)).z[ids])


def test_astroquery_sql_error_and_empty(sdss):
    from astroquery.exceptions import RemoteServiceError
    with pytest.raises(RemoteServiceError, match="no such column"): sdss.query_sql("SELECT nonsense FROM SpecObj", cache=False)
    assert sdss.query_sql("SELECT z FROM SpecObj WHERE z > 90", cache=False) is None
    with pytest.raises(RemoteServiceError): sdss.query_sql("DROP TABLE SpecObjAll", cache=False)


@pytest.mark.filterwarnings("ignore")
def test_astroquery_crossid(sdss, sky):
    some = sky.galaxies[(sky.galaxies.catalogid == 0) & (sky.galaxies.sciencePrimary == 1)].iloc[3:7]
    places = SkyCoord(list(some.ra) + [1.0], list(some.dec + 0.5 / 3600) + [-80.0], unit="deg")
    photo = sdss.query_crossid(places, radius="2 arcsec", photoobj_fields=["ra", "dec", "objid"], cache=False)
    assert np.allclose(photo["ra"], some.ra) and [str(i) for i in photo["objid"]] == list(some.bestObjID)
    spectra = sdss.query_crossid(places, radius="2 arcsec", specobj_fields=["plate", "mjd", "fiberID", "run2d"], spectro=True,
        cache=False)
    assert {(p, f) for p, f in zip(spectra["plate"], spectra["fiberID"])} >= set(zip(some.plate, some.fiberid))


def test_answers_look_like_the_real_ones(archive, sky):
    if (folder := real_dir()) is None: pytest.skip("the folder of real files is not there")
    o = good(sky)
    real = (folder / "responses/xid_sp.txt").read_text().splitlines()
    sql = f"SELECT {', '.join(('p.' if k < 7 else 's.') + c for k, c in enumerate(real[1].split(',')))} FROM PhotoObjAll p JOIN SpecObjAll s ON p.objid = s.bestobjid"
    ours = requests.get(archive.url + "/skyserver/dr17/en/tools/search/x_results.aspx",
                        params=dict(searchtool="SQL", format="csv", cmd=f"{sql} WHERE s.plate = {o.plate}")).text.splitlines()
    assert ours[:2] == real[:2] and len(ours[2].split(",")) == len(real[2].split(","))
    for a, b in zip(ours[2].split(","), real[2].split(",")): assert bool(re.fullmatch(r"-?\d+",
        a)) == bool(re.fullmatch(r"-?\d+", b))


def test_rest_service_and_row_cap(sky):
    ask = dict(cmd="SELECT specObjID, z FROM SpecObjAll ORDER BY specObjID", format="json")
    with StandIn(sky, row_cap=7) as archive:
        table = requests.get(archive.url + "/skyserver/dr17/SkyServerWS/SearchTools/SqlSearch", params=ask).json()
        count = requests.get(archive.url + "/skyserver/dr17/SkyServerWS/SearchTools/SqlSearch",
            params=ask | dict(cmd="SELECT COUNT(*) AS n FROM SpecObjAll"))
    assert table[0]["TableName"] == "Table1" and len(table[0]["Rows"]) == 7 and count.json()[0]["Rows"] == [dict(n=len(sky))]


@pytest.mark.parametrize("sql, want", [
    ("SELECT TOP 3 z FROM SpecObj", "SELECT z FROM SpecObj LIMIT 3"), ("select distinct top (3) z from t",
        "SELECT distinct z from t LIMIT 3"),
    ("SELECT ISNULL(z, 0) FROM dbo.SpecObj", "SELECT IFNULL(z, 0) FROM SpecObj"),
    ("SELECT CONVERT(VARCHAR(20), specObjID) FROM t", "SELECT CAST( specObjID AS VARCHAR(20)) FROM t"),
    ("SELECT z FROM t ORDER BY z OFFSET 10 ROWS FETCH NEXT 5 ROWS ONLY", "SELECT z FROM t ORDER BY z LIMIT 5 OFFSET 10"),
    ("SELECT z FROM t WHERE specObjID > 9815595779754317824", "SELECT z FROM t WHERE specObjID > '9815595779754317824'")])
def test_dialect(sql, want):
    assert to_sqlite(sql).split() == want.split()


def test_ids_compare_as_numbers(sky):
    rows = Catalogue(sky).query("SELECT specObjID FROM SpecObjAll WHERE specObjID > 999999999999999999 AND specObjID < 9223372036854775808 ORDER BY specObjID")[1]
    ids = [int(i) for i in sky.galaxies.object_id]
    assert [int(r[0]) for r in rows] == sorted(i for i in ids if 999999999999999999 < i < 1 << 63)


def test_toy_sky_needs_cuts():
    g = Sky.toy(200, seed=1).galaxies
    assert set(g["class"]) == {"GALAXY", "STAR",
        "QSO"} and (g.zWarning > 0).any() and g.galaxy.duplicated().any() and g.object_id.is_unique
    assert (g.legacy_target1 & 448 > 0).all() and (g.groupby("plate").size() > 1).all()
    clean = g[(g["class"] == "GALAXY") & (g.zWarning == 0)]
    assert clean.galaxy.nunique() == 200 and (clean.object_id.map(int) >= 1 << 63).any()


# Faults

def faulty(sky, kind, ask, **options):
    "What a client sees of a fault, and of the same request once more."
    with StandIn(sky, {kind: 1.0}, max_repeat=1, **options) as archive:
        seen = []
        for _ in range(2):
            try: seen.append(ask(archive))
            except requests.RequestException as e: seen.append(e)
        log = archive.log()
        assert archive.errors == [] and len(log) == 2
    return *seen, log


@pytest.mark.parametrize("kind, status", [("http500", 500), ("burst503", 503), ("rate429", 429)])
def test_status_faults(sky, kind, status):
    first, second, log = faulty(sky, kind, lambda a: cut(a, good(sky)))
    assert first.status_code == status and "html" in first.headers["Content-Type"] and (first.headers.get("Retry-After") == "1") == (status == 429)
    assert second.status_code == 200 and log.complete.tolist() == [False, True] and log.fault.tolist() == [kind, ""]


def test_burst_takes_the_next_requests_too(sky):
    o = good(sky)
    with StandIn(sky, dict(burst503=0.02), seed=1, burst=3, max_repeat=9) as archive:
        status = "".join("x" if cut(archive, o, size=8 + k % 40,
            dec=o.dec + k / 36000).status_code == 503 else "." for k in range(150))
    assert "xxxx" in status and status.count(".") > 50


def test_cut_is_a_reset(sky):
    first, second, log = faulty(sky, "cut", lambda a: cut(a, good(sky)))
    assert isinstance(first, requests.RequestException) and second.status_code == 200
    assert log.complete.tolist() == [False, True] and 0 < log.bytes[0] < log.bytes[1]
    with StandIn(sky, dict(cut=1.0)) as archive, socket.create_connection(("127.0.0.1", archive.server.server_port)) as client:
        client.sendall(b"GET /skyserver/dr17/SkyServerWS/SearchTools/SqlSearch?cmd=SELECT+z+FROM+SpecObj HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            while client.recv(4096): pass


def test_hang_outlasts_a_timeout(sky):
    ask = lambda a: requests.get(a.url + "/sas/" + spectrum_path(17, o.run2d, o.plate, o.mjd, o.fiberid), timeout=0.3)
    for k in range(2):
        o = good(sky, k)
        first, second, log = faulty(sky, "hang", ask, hang=20, seed=k)
        assert isinstance(first, requests.RequestException) and second.status_code == 200


def test_drip_is_slow_but_whole(sky):
    start = time.monotonic()
    first, second, log = faulty(sky, "drip", lambda a: cut(a, good(sky)), drip=0.4)
    assert time.monotonic() - start > 0.7 and first.content == second.content and log.complete.all() and (log.fault == "drip").all()


def test_bodies_that_are_not_what_was_asked_for(sky):
    o = good(sky)
    page, fine, _ = faulty(sky, "html200", lambda a: cut(a, o))
    assert page.status_code == 200 and page.text.startswith("<!DOCTYPE") and fine.content.startswith(b"SIMPLE")
    assert faulty(sky, "empty200", lambda a: cut(a, o))[0].content == b""
    short, _, _ = faulty(sky, "truncated", lambda a: cut(a, o))
    assert len(short.content) < len(fine.content) and fine.content.startswith(short.content) and int(short.headers["Content-Length"]) == len(short.content)
    assert values(faulty(sky, "wrong_size", lambda a: cut(a, o))[0].content)[0].shape == (200, 200)
    assert values(faulty(sky, "wrong_filter", lambda a: cut(a, o, "r"))[0].content)[1]["FPA.FILTERID"][0] == "i"


def test_wrong_id(sky, tmp_path):
    o = good(sky)
    image, fine, log = faulty(sky, "wrong_id", lambda a: cut(a, o))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apart = [np.hypot(*(WCS(values(f.content)[1]).all_world2pix(o.ra, o.dec, 0) - np.array([112, 112]))) for f in (image,
            fine)]
    assert apart[0] > 300 and apart[1] < 1
    other, _, _ = faulty(sky, "wrong_id", lambda a: spec(a, o))
    (tmp_path / "s.fits").write_bytes(other.content)
    assert read_sdss_spectrum(tmp_path / "s.fits").object_id != o.object_id
    always = faulty(sky, "wrong_id", lambda a: spec(a, o), lasting=("wrong_id",))
    assert always[0].content == always[1].content == other.content and not always[2].complete.any()


def test_lists_with_odd_rows(sky):
    o = good(sky)
    ask = lambda a: names(a, ra=o.ra, dec=o.dec)
    plain = faulty(sky, "http500", lambda a: requests.get(a.url))[1]
    assert plain.status_code == 404
    assert tuple(faulty(sky, "nine_columns", ask)[0].columns) == OLD_COLUMNS
    twice = faulty(sky, "duplicate_rows", ask)[0]
    assert len(twice) == 10 and twice.duplicated().sum() == 5
    flagged = faulty(sky, "badflag", ask)[0]
    assert list(flagged.badflag) == [1, 0] * 5 and (flagged.subcell[::2].to_numpy() != flagged.subcell[1::2].to_numpy()).all()
    lacking, again, _ = faulty(sky, "missing_band", ask)
    assert len(lacking) == 4 and lacking.equals(again)
    assert faulty(sky, "empty_sky", ask)[1].empty


def test_images_with_lasting_faults(sky):
    o = good(sky)
    with StandIn(sky) as archive: linear, header = values(cut(archive, o).content)
    blank, again, _ = faulty(sky, "nan_band", lambda a: cut(a, o))
    assert np.isnan(values(blank.content)[0]).all() and blank.content == again.content
    edge = values(faulty(sky, "nan_edge", lambda a: cut(a, o))[0].content)[0]
    assert np.isnan(edge[:, :74]).all() and np.isfinite(edge[:, 74:]).all()
    scaled, about = values(faulty(sky, "bsoften", lambda a: cut(a, o))[0].content)
    x = scaled / 1.0857362
    assert np.abs(scaled).max() < 20 and np.allclose(about["BOFFSET"] + about["BSOFTEN"] * (np.exp(x) - np.exp(-x)), linear,
        atol=0.05, rtol=1e-4)
    assert asinh_scaled(np.float32(2.0))[0] == 0 and "BSOFTEN" not in header


def test_spectrum_in_the_other_root(sky):
    o = good(sky)
    first, second, _ = faulty(sky, "other_root", lambda a: spec(a, o))
    there, _, log = faulty(sky, "other_root", lambda a: spec(a, o, other=True))
    assert first.status_code == second.status_code == 404 and there.content.startswith(b"SIMPLE") and log.complete.all()


def test_tables_that_lie(sky):
    ask = lambda a: requests.get(a.url + "/skyserver/dr17/en/tools/search/x_results.aspx",
                                 params=dict(searchtool="SQL", format="csv",
                                     cmd="SELECT TOP 10 specObjID, z FROM SpecObj ORDER BY z")).text.splitlines()
    limit, whole, _ = faulty(sky, "sql_rate_limit", ask)
    assert limit[0] == "#Table1" and limit[1].startswith('"ERROR: Maximum 60 queries allowed per minute.') and len(whole) == 12
    assert faulty(sky, "sql_capped", ask)[0] == whole[:7]
    floats = faulty(sky, "float_ids", ask)[0]
    assert "E+" in floats[2] and floats[2].split(",")[1] == whole[2].split(",")[1]


def test_draws_repeat_and_end(sky):
    run = lambda seed: [Faults(sky, 0.5, seed, max_repeat=2).draw("cutout", f"{k}.r") for k in range(300)]
    assert run(1) == run(1) != run(2) and len(set(run(1))) > 8
    one = Faults(sky, dict(http500=1.0), max_repeat=3)
    assert [one.draw("cutout", "a.r") for _ in range(9)] == (["http500"] * 3 + [""]) * 2 + ["http500"]
    with pytest.raises(BadInput): Faults(sky, dict(nonsense=1.0))


def test_every_fault_is_drawn_for_its_services_only(sky):
    for service in ("names", "cutout", "spectrum", "sql", "hips"):
        faults = Faults(sky, 0.999, max_repeat=10 ** 6, burst=0)
        met = {faults.draw(service, str(k)) for k in range(3000)} - {""}
        assert met == {k for k, f in FAULTS.items() if service in f[0] and f[1] != "lasting"}


# The server

def test_log_and_stats(sky, tmp_path):
    with StandIn(sky, log=tmp_path / "log.jsonl") as archive:
        o = good(sky)
        cut(archive, o); spec(archive, o)
        archive.log()                                                # which waits for the last line
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        stats = requests.get(archive.url + "/_stats").json()
        assert [x["key"] for x in requests.get(archive.url + "/_log").json()] == [f"{o.object_id}.r", f"{o.object_id}.spec"]
    assert [x["key"] for x in lines] == archive.log().key.tolist() and all(x["complete"] for x in lines)
    assert stats["requests"] == 2 and stats["services"] == dict(cutout=1, spectrum=1)


def test_one_release_alone(sky):
    o = good(sky)
    with StandIn(sky, release=17) as archive: assert [spec(archive, o, r).status_code for r in (16, 17)] == [404, 200]


def test_connections_are_kept_and_many_clients_served(sky):
    o = good(sky)
    with StandIn(sky, latency=0.05) as archive:
        def work(): requests.get(archive.url + "/ps1/cgi-bin/ps1filenames.py", params=dict(ra=o.ra, dec=o.dec))
        threads = [threading.Thread(target=work) for _ in range(12)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert archive.stats()["most_active"] > 3 and archive.stats()["complete"] == 12
        with requests.Session() as s:
            ports = set()
            for _ in range(3):
                with s.get(archive.url + "/_stats",
                    stream=True) as r: ports.add(r.raw.connection.sock.getsockname()[1]); r.content
        assert len(ports) == 1


def test_ends_cleanly_and_says_nothing_of_lost_clients(sky, capfd):
    before = threading.active_count()
    with StandIn(sky, dict(hang=1.0), hang=60) as archive:
        for text in b"", b"GET / HT", b"nonsense\r\n\r\n", b"GET /ps1/cgi-bin/ps1filenames.py?ra=150&dec=2 HTTP/1.1\r\nHost: x\r\n\r\n":
            client = socket.create_connection(("127.0.0.1", archive.server.server_port))
            client.sendall(text)
            if text: client.close()
        time.sleep(0.2)
        start = time.monotonic()
    assert time.monotonic() - start < 3 and threading.active_count() == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("path", ["/ps1/cgi-bin/fitscut.cgi", "/ps1/cgi-bin/fitscut.cgi?ra=x&dec=1&red=y&format=fits",
    "/ps1/cgi-bin/ps1filenames.py?ra=abc&dec=1",
    "/ps1/cgi-bin/ps1filenames.py", "/hips", "/hips?hips=CDS/P/DSS2/red", "/sas/", "/sas/dr17/x/spec-1-2-3.fits",
        "/skyserver/dr17/en/tools/search/x_results.aspx?cmd=%27",
    "/skyserver/dr17/en/tools/search/X_Results.aspx?searchtool=CrossID", "/", "/%00"])
def test_nonsense_is_answered(archive, path):
    page = requests.get(archive.url + path)
    assert not page.content.startswith(b"SIMPLE") and archive.errors == []


def test_command(tmp_path):
    p = subprocess.Popen([sys.executable, "-m", "spectranb.standin", "--galaxies", "5", "--faults", "http500=1", "--log",
        tmp_path / "log"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = p.stdout.readline().strip()
    assert requests.get(url + "/ps1/cgi-bin/ps1filenames.py", params=dict(ra=1, dec=2)).status_code == 500
    p.send_signal(signal.SIGTERM)
    assert p.wait(5) == 0 and p.stderr.read() == "" and len((tmp_path / "log").read_text().splitlines()) == 1


def test_command_line_sets_what_faults_take():
    "The options of the faults reach the faults: a drip of 0.5 s, a silence of 0.3 s, and one fault in a row."
    p = subprocess.Popen([sys.executable, "-m", "spectranb.standin", "--galaxies", "5", "--faults", "http500=0.4,drip=0.4,hang=0.2", "--drip", "0.5",
        "--hang", "0.3", "--max-repeat", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    g, url, met = Sky.toy(5).galaxies.iloc[0], p.stdout.readline().strip(), []
    try:
        for _ in range(10):
            start = time.monotonic()
            try: kind = requests.get(url + "/sas/" + spectrum_path(17, g.run2d, g.plate, g.mjd, g.fiberid), timeout=15).status_code
            except requests.RequestException: kind = "hang"
            met.append((kind, time.monotonic() - start))
    finally: p.send_signal(signal.SIGTERM); p.wait(5)
    kinds = [k for k, _ in met]
    assert {200, 500, "hang"} == set(kinds) and not any({a, b} <= {500, "hang"} for a, b in zip(kinds, kinds[1:])), "never two in a row"
    assert all(t > 0.25 for k, t in met if k == "hang") and 0.4 < max(t for _, t in met) < 10, "the defaults are 20 and 30 s"


def test_help_names_every_option(capsys):
    from spectranb.standin import make_parser
    with pytest.raises(SystemExit): make_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{o} " in text for o in ("hang", "drip", "max-repeat", "faults", "latency", "survey")) and "(30)" in text


# Real files

def test_real_files_byte_for_byte(tmp_path):
    if (folder := real_dir()) is None: pytest.skip("the folder of real files is not there")
    sky = Sky.toy(10).add_real(folder)
    with StandIn(sky) as archive:
        for path in (folder / "sdss_spectra").glob("*.fits"):
            s = read_sdss_spectrum(path)
            assert spec(archive, s).content == path.read_bytes()
        rows = {r["filter"]: r for r in sky.list(27.9520, 0.26348)}
        assert "".join(rows) == "griz"
        place = pd.Series(dict(ra=27.9520, dec=0.26348))
        for band, row in rows.items(): assert cut(archive, place, size=240,
            row=row).content == (folder / f"ps1_cutouts/PS1_{band}.fits").read_bytes()
    g = sky.galaxies[sky.galaxies.object_id.isin([k for k in sky.real])]
    assert len(g) == 12 and g.galaxy.nunique() == 10                 # two galaxies were observed twice
