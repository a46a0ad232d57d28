"Identifiers, catalogue checks and cuts: what does not belong on a reader's page."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st

from spectranb.core import BadInput
from spectranb.data.catalog import (check_catalog, clean_sample, read_catalog, read_published_csv, rejects_table, run2d_number,
                                    select_galaxies, specobjid_decode, specobjid_encode)

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
