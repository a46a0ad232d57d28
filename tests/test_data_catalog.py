"Identifiers, catalogue checks and cuts: what does not belong on a reader's page."
import contextlib
import subprocess
import sys
import time

import astropy.units as u
import numpy as np
import pandas as pd
import pytest
from astropy.coordinates import SkyCoord
from astropy.table import MaskedColumn, Table
from hypothesis import given, strategies as st

from spectranb.core import BadInput, real_dir
from spectranb.data.catalog import (SDSS_COLUMNS, Quota, SkyServer, check_catalog, choose_sample, clean_sample, drop_repeats, duplicates_on_sky, iau_name,
                                    identify_spectra, match_sky, query_sdss, read_catalog, read_published_csv, read_search_csv, read_user_table,
                                    rejects_table, run2d_number, sdss_sql, select_galaxies, specobjid_decode, specobjid_encode)

RUNS = st.sampled_from(["26", "103", "104"]) | st.builds("v{}_{}_{}".format, st.just(5), st.integers(5, 99), st.integers(0, 99))


@given(st.integers(0, 2 ** 14 - 1), st.integers(50000, 50000 + 2 ** 14 - 1), st.integers(0, 2 ** 12 - 1), RUNS)
def test_ids_round_trip(plate, mjd, fiberid, run2d):
    text = specobjid_encode(plate, mjd, fiberid, run2d)
    assert specobjid_decode(text) == dict(plate=plate, mjd=mjd, fiberid=fiberid, run2d=run2d)


def test_id_above_int64():
    text = specobjid_encode(12345, 58000, 999, "v5_13_2")
    assert int(text) > 2 ** 63 and specobjid_decode(text)["plate"] == 12345
    table = check_catalog(pd.DataFrame(dict(object_id=[text], ra=[1.0], dec=[2.0])))
    assert table["object_id"][0] == text


def test_known_versions():
    assert run2d_number("v5_13_2") == 1302 and run2d_number(26) == 26 and run2d_number(" v5_4_45") == 445
    with pytest.raises(BadInput, match="version"): run2d_number("trunk")


@pytest.mark.parametrize("bad", ["2.99E+17", "299489676975171584.0", "-5", "", "abc", str(2 ** 64), "299489676975171585"])
def test_damaged_ids_are_refused(bad):
    with pytest.raises(BadInput): specobjid_decode(bad)


@pytest.mark.parametrize("where", [(-1, 51602, 1, "26"), (16384, 51602, 1, "26"), (266, 49999, 1, "26"), (266, 51602, 4096, "26")])
def test_numbers_that_do_not_fit(where):
    with pytest.raises(BadInput): specobjid_encode(*where)


def rows(**changes):
    return pd.DataFrame(dict(object_id=["299489676975171584"], ra=[146.7], dec=[-1.0], redshift=[0.02], plate=[266], mjd=[51602], fiberid=[1],
                             run2d=["26"], spec_class=["GALAXY"]) | changes)


@pytest.mark.parametrize("changes, what", [
    (dict(object_id=[2.99489676975171584e17]), "floating"), (dict(object_id=["2.99E+17"]), "not an id"), (dict(object_id=[None]), "not an id"),
    (dict(fiberid=[2]), "is not the id of 266-51602-2"), (dict(dec=[91.0]), "not on the sky"), (dict(ra=[np.nan]), "not on the sky"),
    (dict(redshift=["unknown"]), "cannot be float64"), (dict(plate=[np.nan]), "cannot be int64")])
def test_bad_catalogues(changes, what):
    with pytest.raises(BadInput, match=what): check_catalog(rows(**changes))


def test_missing_columns():
    with pytest.raises(BadInput, match="lacks"): check_catalog(rows().drop(columns="ra"))


def test_run2d_read_as_float_is_mended():
    assert check_catalog(rows(run2d=[26.0]))["run2d"][0] == "26"


def test_input_is_not_changed():
    table = rows(ra=[-1.0]); before = table.copy()
    assert check_catalog(table)["ra"][0] == 359 and table.equals(before)


def test_sdssv_ids_are_left_alone():
    text = "1" * 28
    assert check_catalog(rows(object_id=[text]))["object_id"][0] == text


def test_files(tmp_path):
    with pytest.raises(BadInput, match="not there"): read_catalog(tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="not there"): read_catalog(tmp_path / "a.csv")
    (tmp_path / "b.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(BadInput, match="parquet"): read_catalog(tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("")
    with pytest.raises(BadInput, match="CSV"): read_catalog(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_bytes(b"\xff\xfe\x00\x01" * 100)
    with pytest.raises(BadInput): read_catalog(tmp_path / "d.csv")


HEADER = "SpecObjID,ra,dec,primTarget," + ",".join(f"VAE{i}" for i in range(1, 7))


def test_published_csv(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text(HEADER.upper() + "\n299489676975171585,1,2,96,1,2,3,4,5,6\n")
    table = read_published_csv(file)
    assert table["object_id"][0] == "299489676975171585"                        # odd: a float64 could not hold it
    file.write_text("SpecObjID,ra,dec\n1,2,3\n")
    with pytest.raises(BadInput, match="lacks.*primtarget"): read_published_csv(file)
    file.write_text(HEADER + "\n2.99E+17,1,2,96,1,2,3,4,5,6\n")
    with pytest.raises(BadInput, match="not an id"): read_published_csv(file)
    file.write_text(HEADER + "\n1,1,2,96,one,2,3,4,5,6\n")
    with pytest.raises(BadInput, match="not a number"): read_published_csv(file)


def test_target_bits():
    table = pd.DataFrame(dict(LEGACY_TARGET1=[0, 2, 32, 64, 128, 256, 96, 2 + 256]))
    assert select_galaxies(table)["LEGACY_TARGET1"].tolist() == [64, 128, 256, 96, 258]
    with pytest.raises(BadInput, match="legacy_target1"): select_galaxies(table.rename(columns={"LEGACY_TARGET1": "x"}))


def test_clean_sample_keeps_every_row_on_one_side():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(object_id=rng.integers(0, 800, 1000).astype(str), spec_class=rng.choice(["GALAXY", "QSO", "STAR"], 1000),
                              zwarning=rng.choice([0, 0, 4], 1000), redshift=rng.uniform(-0.1, 0.5, 1000)))
    table.loc[3, "redshift"] = np.nan
    kept, rejects = clean_sample(table)
    assert len(kept) + len(rejects) == 1000 and kept["object_id"].is_unique
    assert kept["redshift"].between(0, 0.36, inclusive="right").all() and (kept["zwarning"] == 0).all() and (rejects["reason"] != "").all()


def test_rejects_of_nothing(): assert rejects_table([]).shape == (0, 3)


# Tables that people have

FORM = """#Table1
objid,ra,dec,u,g,r,i,z,run2d,specobjid,class,{z},plate,mjd,fiberid
1237652943176138868,2.02344,14.83982,18.4,16.9,16.1,15.7,15.4,26,845594848269461504,GALAXY,0.0456,751,52251,160
1237648720693755918,146.71421,-1.04130,19.1,17.5,16.9,16.6,16.4,26,299489676975171584,GALAXY,0.0213,266,51602,1
"""


def write_text(folder, text, name="t.csv"):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("change", [lambda t: t, lambda t: t.replace("#Table1\n", ""), lambda t: t.upper().replace("#TABLE1", "#Table1"),
                                    lambda t: "\ufeff" + t.replace("\n", "\r\n"), lambda t: t.replace(",", "\t"), lambda t: t.replace(",", " , ")])
@pytest.mark.parametrize("z", ["redshift", "z", "z1", "specz"])
def test_search_form_in_any_form(tmp_path, change, z):
    table, rejects = read_search_csv(write_text(tmp_path, change(FORM.format(z=z))))
    assert table["object_id"].tolist() == ["845594848269461504", "299489676975171584"] and not len(rejects)
    assert table["redshift"].tolist() == [0.0456, 0.0213] and table["model_mag_z"].tolist() == [15.4, 16.4]
    assert table["best_obj_id"].tolist() == ["1237652943176138868", "1237648720693755918"] and table["spec_class"].tolist() == ["GALAXY"] * 2


def test_search_form_z_alone_is_told_by_its_values(tmp_path):
    head, rows = "specobjid,ra,dec,g,z\n", "845594848269461504,2.0,14.8,16.9,{}\n299489676975171584,146.7,-1.0,17.5,{}\n"
    assert read_search_csv(write_text(tmp_path, head + rows.format(0.05, 0.02)))[0]["redshift"].tolist() == [0.05, 0.02]
    assert read_search_csv(write_text(tmp_path, head + rows.format(15.4, 16.4)))[0]["model_mag_z"].tolist() == [15.4, 16.4]
    with pytest.raises(BadInput, match="neither a redshift nor a magnitude"): read_search_csv(write_text(tmp_path, head + rows.format(0.05, 16.4)))
    with pytest.raises(BadInput, match="two redshift columns"):
        read_search_csv(write_text(tmp_path, head.replace("g,z", "g,z,z1") + rows.format("0.05,0.06", "0.1,0.2")))


def test_search_form_leaves_out_and_lists(tmp_path):
    text = FORM.format(z="redshift") + """1,146.6,-0.7,21.0,18.0,18.1,17.7,17.4,26,299647456893757440,GALAXY,0.06,266,51602,575
2,146.6,-0.7,21.0,17.9,18.1,17.7,17.4,26,0,GALAXY,0.06,0,0,0
3,146.6,-0.7,21.0,17.9,18.1,17.7,17.4,26,4.1E+17,GALAXY,0.06,266,51602,575
4,146.6,-0.7,21.0,17.9,18.1,17.7,17.4,26,299489676975171584,GALAXY,0.06,266,51602,1
5,146.6,-0.7,21.0,-9999,18.1,17.7,17.4,26,299533932318189568,GALAXY,0.06,266,51602,162
6,146.6,-0.7,21.0,17.0,18.1,17.7,17.4,26,299533932318189568,GALAXY,0.06,266,51602,163
"""
    kept, rejects = read_search_csv(write_text(tmp_path, text))
    assert len(kept) == 2 and rejects["reason"].str.extract(r"(below 18|no spectrum|cannot be rebuilt|occurred before|not the id)")[0].tolist() == [
        "below 18", "no spectrum", "cannot be rebuilt", "occurred before", "below 18", "occurred before"]
    assert read_search_csv(write_text(tmp_path, text), g_max=17.0)[0]["model_mag_g"].tolist() == [16.9]      # the cut is g < g_max


@pytest.mark.parametrize("digits", [3, 6, 15])
def test_search_form_rebuilds_rounded_ids(tmp_path, digits):
    ids = ["845594848269461504", "299489676975171584"]
    text = FORM.format(z="redshift")
    for i in ids: text = text.replace(i, f"{float(i):.{digits - 1}E}")
    table, rejects = read_search_csv(write_text(tmp_path, text))
    assert table["object_id"].tolist() == ids and table.attrs["notes"] == ["2 rounded ids were rebuilt from plate, MJD, fibre and run2d"]
    table, rejects = read_search_csv(write_text(tmp_path, text.replace("run2d", "other")))
    assert not len(table) and rejects["reason"].str.contains("cannot be rebuilt").all()


def test_real_responses():
    real = real_dir()
    if real is None: pytest.skip("the real responses are missing")
    table, rejects = read_search_csv(real / "responses" / "xid_sp.txt", g_max=None)
    assert table.loc[0, ["object_id", "best_obj_id", "run2d"]].tolist() == ["845594848269461504", "1237652943176138868", "26"]
    assert table["redshift"][0] == 0.04559058 and not len(rejects)
    table, rejects = read_user_table(real / "responses" / "xid_im.txt")
    assert len(table) == 18 and table["object_id"][0] == "1237653651835781245" and duplicates_on_sky(table, 1.5).max() == 0


def user_tables(folder):
    "The same three galaxies in every format."
    ra, dec = np.array([146.2505, 0.001, 359.999]), np.array([0.570083333, -0.5, -89.5])
    data = dict(ID=np.array(["a", "b", "c"]), RAJ2000=ra, DEJ2000=dec, mag=np.array([17.0, 18.0, 19.0], ">f4"))
    yield "csv", lambda f: pd.DataFrame(data).astype({"mag": "f4"}).to_csv(f, index=False)
    yield "parquet", lambda f: pd.DataFrame(data).astype({"mag": "f4"}).to_parquet(f)
    for form, kind in ("ecsv", "ascii.ecsv"), ("fits", "fits"), ("vot", "votable"):
        yield form, lambda f, kind=kind: Table(data | dict(RAJ2000=ra.astype(">f8") * u.deg)).write(f, format=kind)
    yield "hours.ecsv", lambda f: Table(data | dict(RAJ2000=ra / 15 * u.hourangle)).write(f, format="ascii.ecsv")
    yield "radians.vot", lambda f: Table(data | dict(RAJ2000=np.radians(ra) * u.rad, DEJ2000=np.radians(dec) * u.rad)).write(f, format="votable")
    text = SkyCoord(ra, dec, unit="deg")
    for sep in ":", " ", "hms":
        names = [getattr(text, c).to_string(unit, sep="hms" if (sep, c) == ("hms", "ra") else "dms" if sep == "hms" else sep, precision=6, pad=True)
                 for c, unit in (("ra", u.hour), ("dec", u.deg))]
        yield f"{ord(sep[0])}.csv", lambda f, names=names: pd.DataFrame(data | dict(RAJ2000=names[0], DEJ2000=names[1])).to_csv(f, index=False)
    yield "sky.ecsv", lambda f: Table(dict(name=data["ID"], where=text)).write(f, format="ascii.ecsv")


def test_user_tables_of_every_kind(tmp_path):
    seen = []
    for name, write in user_tables(tmp_path):
        write(tmp_path / f"t.{name}")
        table, rejects = read_user_table(tmp_path / f"t.{name}"); seen.append(name)
        assert table["object_id"].tolist() == ["a", "b", "c"] and not len(rejects), name
        assert np.allclose(table["ra"], [146.2505, 0.001, 359.999], atol=1e-8) and np.allclose(table["dec"], [0.570083333, -0.5, -89.5], atol=1e-8), name
        assert table["ra"].dtype == np.float64 and all(d.isnative for d in table.dtypes if isinstance(d, np.dtype)), name
    assert len(seen) == 11


def test_user_tables_without_ids_with_gaps(tmp_path):
    t = Table(dict(ra=MaskedColumn([146.2505, 10.0, 20.0, 146.2505], mask=[0, 1, 0, 0]), dec=[0.570083334, 1.0, 95.0, 0.570083334],
                   mjd=MaskedColumn([1, 2, 3, 4], mask=[1, 0, 0, 0]), pics=np.zeros((4, 3))))
    t.write(tmp_path / "t.fits")
    table, rejects = read_user_table(tmp_path / "t.fits")
    assert table["object_id"].tolist() == ["J094500.12+003412.3"] and "user_mjd" in table and "pics" not in table
    assert rejects["object_id"].tolist() == ["row 1", "row 2", "J094500.12+003412.3"]
    assert rejects["reason"].str.extract("(position|before)")[0].tolist() == ["position", "position", "before"]


def test_user_table_ids_are_never_rounded(tmp_path):
    big = "12345678901234567891"
    table, _ = read_user_table(write_text(tmp_path, f"id,ra,dec\n{big},1,2\n007,3,4\n"))
    assert table["object_id"].tolist() == [big, "007"]
    assert read_user_table(write_text(tmp_path, "id,ra,dec\n007,3,4\n"))[0]["object_id"].tolist() == ["007"]
    with pytest.raises(BadInput, match="rounded"): read_user_table(write_text(tmp_path, "id,ra,dec\n1.23E+18,1,2\n"))
    Table(dict(id=[1.0e18, 2.0], ra=[1.0, 2.0], dec=[1.0, 2.0])).write(tmp_path / "f.fits")
    with pytest.raises(BadInput, match="53 bits"): read_user_table(tmp_path / "f.fits")
    table, _ = read_user_table(write_text(tmp_path, "key,X,Y\n5,1,2\n"), columns=dict(ra="X", dec="Y", object_id="key"))
    assert table.loc[0, ["object_id", "ra", "dec"]].tolist() == ["5", 1.0, 2.0]


@pytest.mark.parametrize("text, what", [("a,b\n1,2\n", "no column that is known to be ra"), ("", "holds no table"), ("#only\n#comments\n", "holds no table")])
def test_user_tables_that_cannot_be_read(tmp_path, text, what):
    with pytest.raises(BadInput, match=what): read_user_table(write_text(tmp_path, text))


def test_user_files_that_cannot_be_read(tmp_path):
    for name in "a.fits", "a.vot", "a.ecsv", "a.parquet", "a.csv", "a.xyz":
        with pytest.raises(BadInput, match="is not there"): read_user_table(tmp_path / name)
        (tmp_path / name).write_bytes(b"\xff\xfe\x00nonsense" * 50)
        with pytest.raises(BadInput): read_user_table(tmp_path / name)
    with pytest.raises(BadInput, match="no column 'X'"): read_user_table(write_text(tmp_path, "ra,dec\n1,2\n"), columns=dict(ra="X"))


@given(st.floats(0, 359.999), st.floats(-89.99, 89.99))
def test_names_are_cut_positions(ra, dec):
    name = iau_name([ra], [dec])[0]
    back = SkyCoord(f"{name[1:3]}h{name[3:5]}m{name[5:10]}s {name[10:13]}d{name[13:15]}m{name[15:]}s")
    assert -1e-7 <= ra - back.ra.deg < 0.15 / 3600 + 1e-7 and -1e-7 <= abs(dec) - abs(back.dec.deg) < 0.1 / 3600 + 1e-7


# Matches on the sky

def scatter(n, seed, low=-90):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(dict(ra=rng.uniform(0, 360, n), dec=np.degrees(np.arcsin(rng.uniform(np.sin(np.radians(low)), 1, n)))))


def test_matches_agree_with_every_pair_tried():
    a, b = scatter(300, 0, 89.9), scatter(400, 1, 89.9)                            # all within 0.1° of the pole
    all_pairs = SkyCoord(a["ra"].to_numpy()[:, None], a["dec"].to_numpy()[:, None], unit="deg").separation(
        SkyCoord(b["ra"].to_numpy()[None], b["dec"].to_numpy()[None], unit="deg")).arcsec
    near = all_pairs < 20
    alone = near & (near.sum(1) == 1)[:, None] & (near.sum(0) == 1)[None]
    pairs, ambiguous = match_sky(a, b, 20)
    assert sorted(zip(pairs["left"], pairs["right"])) == sorted(zip(*np.nonzero(alone))) and 5 < len(pairs) < near.sum()
    assert len(pairs) + len(ambiguous) == near.sum() and np.allclose(pairs["separation_arcsec"], all_pairs[pairs["left"], pairs["right"]])
    assert ambiguous["n_left"].tolist() == near.sum(1)[ambiguous["left"]].tolist() and ambiguous["n_right"].tolist() == near.sum(0)[ambiguous["right"]].tolist()


def test_matches_of_nothing_and_of_gaps():
    a = pd.DataFrame(dict(ra=[np.nan, 10.0, 20.0], dec=[0.0, 0.0, np.nan]), index=[7, 8, 9])
    pairs, ambiguous = match_sky(a, a, 1)
    assert pairs["left"].tolist() == [1] and pairs["right"].tolist() == [1] and not len(ambiguous)
    for empty in a[:0], a[:1]: assert not len(match_sky(a, empty)[0]) and not len(match_sky(empty, a)[1])
    with pytest.raises(BadInput, match="radius"): match_sky(a, a, 0)


def test_one_galaxy_many_rows():
    step = 1.4 / 3600
    table = pd.DataFrame(dict(object_id=list("abcdefg"), ra=[359.9999, 359.9999 + step, 359.9999 + 2 * step, 10.0, 20.0, 30.0, np.nan], dec=0.0,
                              best_obj_id=["1", "", "0", "5", "0", "5", ""], sn_median=[5, 7, 7, np.nan, 1, 2, 3]))
    assert duplicates_on_sky(table).tolist() == [0, 0, 0, 1, 2, 1, 3]                    # a chain across RA = 0; ids '' and '0' link nothing
    kept, rejects = drop_repeats(table)
    assert kept["object_id"].tolist() == ["b", "e", "f", "g"] and rejects["object_id"].tolist() == ["a", "c", "d"]
    assert "the galaxy of f" in rejects["reason"][2]


def test_choice_depends_on_ids_and_seed_alone():
    table = scatter(2000, 0).assign(object_id=[str(i) for i in range(2000)])
    small, large = choose_sample(table, 100, seed=3), choose_sample(table.sample(frac=1, random_state=0), 1000, seed=3)
    assert small.equals(large[:100]) and choose_sample(table, seed=3)[:1000].equals(large)
    import hashlib
    assert small["object_id"][0] == min(table["object_id"], key=lambda i: hashlib.sha256(f"3:{i}".encode()).hexdigest())
    other = set(choose_sample(table, 1000, seed=4)["object_id"])
    assert 400 < len(other & set(large["object_id"])) < 600                              # 500 expected, σ = 16
    with pytest.warns(UserWarning, match="there are 2,000"): assert len(choose_sample(table, 5000)) == 2000


# The archive

def test_sql():
    text = sdss_sql(plates=(266, 300))
    assert "s.plate BETWEEN 266 AND 300" in text and "s.z > 0 AND s.z < 0.36" in text and "LEFT JOIN PhotoObjAll AS p ON p.objID = s.bestObjID" in text
    for bad in (0.3, 0.1), (0, np.nan), (0, np.inf):
        with pytest.raises(BadInput, match="z_range"): sdss_sql(z_range=bad)
    with pytest.raises(BadInput, match="Known: galaxy, published"): sdss_sql("quasars")


@pytest.mark.parametrize("release, what", [("DR18", "all in DR17"), (20, "catalogid"), ("DR7", "older schema"), ("seven", "not a data release")])
def test_releases(release, what):
    with pytest.raises(BadInput, match=what): query_sdss(release=release)


@given(st.lists(st.floats(0, 30), min_size=1, max_size=80), st.integers(1, 9))
def test_quota_is_never_exceeded(gaps, n):
    quota, now, begun = Quota(n, 60.0), 0.0, []
    for gap in gaps: now += gap; now += quota.take(now); begun.append(now)
    assert all(b - a >= 60 - 1e-6 for a, b in zip(begun, begun[n:]))


@pytest.fixture(scope="module")
def sky():
    from spectranb.standin import Sky
    return Sky.toy(400, seed=1)


@pytest.fixture
def stand_in(sky):
    from spectranb.standin import StandIn
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(StandIn(sky, **options))


QUICK = dict(wait=0.05, backoff=0.01, page=60)


@pytest.fixture(scope="module")
def good(sky, tmp_path_factory):
    "The whole table, from an archive without faults."
    from spectranb.standin import StandIn
    with StandIn(sky) as archive: return query_sdss(archives=archive.archives, cache=tmp_path_factory.mktemp("good"), repeats=True, **QUICK)


def truth(sky):
    g = sky.galaxies
    g = g[g["sciencePrimary"] == 1]
    return g[(g["legacy_target1"] & 448 > 0) & (g["class"] == "GALAXY") & (g["zWarning"] == 0) & (g["z"] > 0) & (g["z"] < 0.36)].set_index("object_id")


def test_query_gives_what_the_archive_has(stand_in, sky, tmp_path):
    from astroquery.sdss import conf
    with conf.set_temp("skyserver_baseurl", "https://elsewhere"):
        table = query_sdss(archives=stand_in().archives, cache=tmp_path, repeats=True, **QUICK)
        assert conf.skyserver_baseurl == "https://elsewhere"
    want = truth(sky).loc[table["object_id"]]
    assert len(table) == len(truth(sky)) > 300 and list(table) == list(SDSS_COLUMNS) and table["object_id"].map(type).eq(str).all()
    for ours, theirs in dict(ra="ra", dec="dec", redshift="z", petro_mag_r="petroMag_r", model_mag_u="modelMag_u").items():
        assert np.allclose(table[ours], want[theirs], equal_nan=True), ours
    for ours, theirs in dict(plate="plate", mjd="mjd", fiberid="fiberid", run2d="run2d", spec_class="class", legacy_target1="legacy_target1").items():
        assert (table[ours].to_numpy() == want[theirs].to_numpy()).all(), ours
    assert (table["object_id"].map(int) > 2 ** 63).any()                                 # ids beyond int64 came through
    pd.testing.assert_frame_equal(check_catalog(table), table)


def test_published_targets(stand_in, sky, tmp_path):
    table = query_sdss(targets="published", archives=stand_in().archives, cache=tmp_path, repeats=True, **QUICK)
    g = sky.galaxies
    assert set(table["object_id"]) == set(g["object_id"][(g["sciencePrimary"] == 1) & (g["legacy_target1"] & 70 > 0) & (g["z"] > 0) & (g["z"] < 0.36)])


def test_a_sample_grows(stand_in, tmp_path):
    archive = stand_in()
    small, large = (query_sdss(n, archives=archive.archives, cache=tmp_path, seed=5, **QUICK) for n in (50, 200))
    pd.testing.assert_frame_equal(small, large[:50])
    kept, rejects = query_sdss(archives=archive.archives, cache=tmp_path, return_rejects=True, **QUICK)
    everything = query_sdss(archives=archive.archives, cache=tmp_path, repeats=True, **QUICK)
    assert len(kept) + len(rejects) == len(everything) and duplicates_on_sky(kept).max() == len(kept) - 1
    pages = archive.log()
    assert pages["query"].is_unique                                                     # nothing was asked twice


@pytest.mark.parametrize("fault", ["http500", "burst503", "rate429", "cut", "html200", "empty200", "sql_rate_limit", "sql_capped", "float_ids"])
def test_faults_change_nothing(stand_in, good, tmp_path, fault):
    bad = stand_in(faults={fault: 0.4}, seed=2, retry_after=0, max_repeat=2, burst=1)
    table = query_sdss(archives=bad.archives, cache=tmp_path / "bad", repeats=True, **QUICK)
    log = bad.log()
    assert (log["fault"] == fault).sum() >= 3 and table.attrs["retries"] >= 1
    pd.testing.assert_frame_equal(table, good)


def test_rounded_ids_for_good_are_rebuilt(stand_in, good, tmp_path):
    bad = stand_in(faults=dict(float_ids=1.0), max_repeat=1000)
    table = query_sdss(archives=bad.archives, cache=tmp_path / "bad", repeats=True, **QUICK)
    assert table["object_id"].tolist() == good["object_id"].tolist() and (table["best_obj_id"] == "").all()
    assert "rounded ids were rebuilt" in table.attrs["notes"][0]


def test_a_low_cap_of_rows_is_seen_and_got_round(stand_in, good, tmp_path):
    capped = stand_in(row_cap=60)
    table = query_sdss(archives=capped.archives, cache=tmp_path / "capped", repeats=True, **QUICK | dict(page=200))
    pd.testing.assert_frame_equal(table, good)
    asked = len(capped.log())
    query_sdss(archives=capped.archives, cache=tmp_path / "capped", **QUICK | dict(page=200))
    assert len(capped.log()) == asked and list(tmp_path.rglob("*.cut"))
    with pytest.raises(BadInput, match=r"plate \d+: came with 20 rows of \d+"):
        query_sdss(archives=stand_in(row_cap=20).archives, cache=tmp_path / "hopeless", **QUICK | dict(page=5))


def test_a_stopped_query_goes_on(stand_in, tmp_path):
    archive = stand_in()
    ask = lambda: query_sdss(archives=archive.archives, cache=tmp_path, **QUICK)
    want = ask()
    pages = sorted(tmp_path.rglob("plates-*.csv"))
    first = len(archive.log())
    assert len(pages) >= 4 and first == len(pages) + 2                                  # and two queries that count
    pages[0].unlink()                                                                   # never came
    pages[1].write_bytes(pages[1].read_bytes()[:-200])                                  # cut
    pages[2].write_text("<html>busy</html>")
    text = pages[3].read_text().splitlines()
    pages[3].write_text("\n".join(text + [text[-1]]) + "\n")                            # the same row twice: still whole
    pd.testing.assert_frame_equal(ask(), want)
    assert len(archive.log()) == first + 3 and not list(tmp_path.rglob("*.tmp*"))


def test_a_killed_query_goes_on(sky, tmp_path):
    from spectranb.standin import StandIn
    with StandIn(sky, latency=0.2) as archive:
        code = ("import sys; from spectranb.download import Archives; from spectranb.data.catalog import query_sdss\n"
                f"query_sdss(archives=Archives.at(sys.argv[1]), cache={str(tmp_path)!r}, page=60)")
        run = subprocess.Popen([sys.executable, "-c", code, archive.url])
        for _ in range(1200):
            if len(list(tmp_path.rglob("plates-*.csv"))) >= 2: break
            time.sleep(0.05)
        run.kill(); run.wait()
        time.sleep(0.5)
        kept, before = len(list(tmp_path.rglob("plates-*.csv"))), len(archive.log())
        table = query_sdss(archives=archive.archives, cache=tmp_path, repeats=True, **QUICK)
        pages = len(list(tmp_path.rglob("plates-*.csv")))
        assert len(table) == len(truth(sky)) and kept >= 2 and len(archive.log()) - before == pages - kept


def test_errors_of_the_archive_are_shown(stand_in, tmp_path):
    server = SkyServer(archives=stand_in().archives, **{k: v for k, v in QUICK.items() if k != "page"})
    with pytest.raises(BadInput, match="refuses the query: .*no such column: nonsense"): server.sql("SELECT nonsense FROM SpecObj")
    assert server.queries == 1                                                          # not asked again
    down = stand_in(faults=dict(http500=1.0), max_repeat=1000)
    with pytest.raises(BadInput, match="no whole answer in 3 attempts.*HTTP 500"): query_sdss(archives=down.archives, cache=tmp_path, tries=3, **QUICK)
    assert len(down.log()) == 3
    silent = stand_in(faults=dict(hang=1.0), max_repeat=1000, hang=5.0)
    with pytest.raises(BadInput, match="no whole answer in 2 attempts"): query_sdss(archives=silent.archives, cache=tmp_path, tries=2, timeout=0.3, **QUICK)


def test_over_the_limit_it_waits_as_told(stand_in):
    archive = stand_in(faults=dict(sql_rate_limit=1.0), max_repeat=2)
    server, began = SkyServer(archives=archive.archives, wait=0.4, backoff=0.01), time.monotonic()
    server.sql("SELECT COUNT(*) AS n FROM SpecObj")
    assert server.retries == 2 and time.monotonic() - began >= 0.8 and np.diff(archive.log()["time"]).min() >= 0.4


def test_a_row_that_contradicts_itself_is_listed(sky, tmp_path):
    from spectranb.standin import Sky, StandIn
    wrong = Sky.toy(60, seed=1)
    row = wrong.galaxies.index[wrong.galaxies["object_id"].isin(truth(wrong).index)][0]
    wrong.galaxies.loc[row, "mjd"] += 1
    with StandIn(wrong) as archive: table, rejects = query_sdss(archives=archive.archives, cache=tmp_path, repeats=True, return_rejects=True, **QUICK)
    assert len(table) == len(truth(wrong)) - 1 and rejects["object_id"].tolist() == [wrong.galaxies["object_id"][row]]
    assert "is not the id of" in rejects["reason"][0]


# Spectra for positions

def places(sky, n, shift=0.3):
    g = truth(sky)
    g = g[~g["galaxy"].duplicated(keep=False)].head(n)
    return g.index, pd.DataFrame(dict(object_id=[f"u{i}" for i in range(n)], ra=g["ra"].to_numpy(), dec=g["dec"].to_numpy() + shift / 3600, plate=7))


@pytest.mark.parametrize("faults", [0.0, dict(http500=0.2, html200=0.2, sql_rate_limit=0.2), dict(float_ids=1.0)])
def test_spectra_for_positions(stand_in, sky, tmp_path, faults):
    ids, table = places(sky, 50)
    table.loc[len(table)] = ["nowhere", 10.0, -80.0, 7]
    archive = stand_in(faults=faults, max_repeat=1000 if faults == dict(float_ids=1.0) else 2)
    call = dict(archives=archive.archives, cache=tmp_path, batch=20, wait=0.05, backoff=0.01)
    found, rejects = identify_spectra(table, **call)
    assert found["object_id"].tolist() == ids.tolist() and found["user_object_id"].tolist() == [f"u{i}" for i in range(50)]
    assert np.allclose(found["separation_arcsec"], 0.3, atol=1e-4) and (found["user_plate"] == 7).all() and (found["dec"] == table["dec"][:50]).all()
    assert (found["plate"].to_numpy() == sky.galaxies.set_index("object_id").loc[ids, "plate"].to_numpy()).all()
    assert rejects["object_id"].tolist() == ["nowhere"] and "no spectrum within 1″" in rejects["reason"][0]
    asked = len(archive.log())
    pd.testing.assert_frame_equal(identify_spectra(table, **call)[0], found)
    assert len(archive.log()) == asked and (faults or asked == 3)


def test_two_rows_for_one_spectrum_are_ambiguous(stand_in, sky, tmp_path):
    ids, table = places(sky, 3)
    table.loc[3] = ["again", table["ra"][0], table["dec"][0] - 0.5 / 3600, 7]
    found, rejects = identify_spectra(table, archives=stand_in().archives, cache=tmp_path, wait=0.05)
    assert found["object_id"].tolist() == ids[1:].tolist() and sorted(rejects["object_id"]) == ["again", "u0"]
    assert rejects["reason"].str.contains(f"ambiguous: {ids[0]} at 0.[23]0″, which another row").all()
    with pytest.raises(BadInput, match="radius"): identify_spectra(table, radius=200)
