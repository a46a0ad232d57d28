"The whole fetch against the stand-in archive: killed, repeated, grown, with faults that pass and faults that stay."
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from spectranb.cli import main
from spectranb.core import BadInput
from spectranb.data.fetch import Fetch, Plan, estimate, fetch_survey, requests_done
from spectranb.data.survey import Survey
from spectranb.download import Manners
from spectranb.standin import Sky, StandIn

HASTY = Manners(rate=5000, backoff=0.01, timeout=1.0, deadline=2.0, max_wait=0.05)
SKY = Sky.toy(40, seed=2)


def fetch(archive, out, n=12, size=32, manners=HASTY, **plan):
    with Fetch(out, Plan(n=n, size=size, **plan), manners, archive.archives, 1, False) as job: return job.run(), job


def same(a, b):
    "Two surveys hold the same galaxies and data."
    i = b.catalog.reset_index().set_index("object_id").loc[a.catalog["object_id"], "index"].to_numpy()
    assert len(a) == len(b) and np.array_equal(a.cutouts[:], b.cutouts[i], equal_nan=True)
    assert np.array_equal(a.ivar[:] > 0, b.ivar[i] > 0) and np.allclose(a.spectra[:], b.spectra[i], atol=1e-5)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "A fetch without faults."
    with StandIn(SKY) as archive: return fetch(archive, tmp_path_factory.mktemp("calm") / "real")[0]


def test_faults_leave_no_trace(calm, tmp_path):
    with StandIn(SKY, 0.1, seed=3, retry_after=0, hang=2.0, drip=0.1) as archive:
        survey, job = fetch(archive, tmp_path)
        asked = len(archive.log())
        again, _ = fetch(archive, tmp_path)
        assert len(archive.log()) == asked, "a second run asks for nothing"
    assert job.table["retries"].sum() > 0 and not len(job.rejects) and len(again) == 12
    same(calm, survey)
    assert survey.verify() and {"norm", "redshift", "flag_missing_band", "plate", "run2d"} <= set(survey.catalog)


def test_killed_and_killed_again(calm, tmp_path):
    rng, out, kills = random.Random(1), tmp_path / "real", 0
    with StandIn(SKY, 0.05, seed=3, latency=0.15, retry_after=0, hang=0.5, drip=0.1) as archive:
        command = [sys.executable, "-m", "spectranb.cli", "fetch", "--out", str(out), "--n", "12", "--size", "32", "--archive", archive.url, "--requests", "2",
                   "--rate", "1000", "--workers", "1", "--quiet"]
        for _ in range(6):
            run, before = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE), len(archive.log())
            while run.poll() is None and len(archive.log()) == before and time.sleep(0.02) is None: pass
            time.sleep(rng.uniform(0, 1.0))
            if run.poll() is None: run.send_signal(signal.SIGKILL); kills += 1
            run.wait()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "12 galaxies" in done.stdout, done.stderr
        complete = archive.log().query("complete and service in ['cutout', 'spectrum']")["key"].value_counts()
    assert kills >= 3 and complete.max() <= 2 and (complete > 1).sum() <= 2 * kills, "only what was under way at a kill came twice"
    same(calm, Survey.open(out / "survey"))
    assert not list(out.rglob("*.partial")) and not (out / "part.parquet").exists()


def test_killed_while_the_survey_is_written(calm, tmp_path, monkeypatch):
    import spectranb.data.fetch as module
    with StandIn(SKY) as archive:
        write = module._write_part
        monkeypatch.setattr(module, "_write_part", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): fetch(archive, tmp_path)
        assert (tmp_path / "part.parquet").exists() and (tmp_path / "survey.partial").exists()
        monkeypatch.setattr(module, "_write_part", write)
        survey, _ = fetch(archive, tmp_path)
    same(calm, survey)


def test_grows_and_never_shrinks(calm, tmp_path):
    with StandIn(SKY) as archive:
        fetch(archive, tmp_path, n=7)
        before = len(archive.log().query("service == 'spectrum'"))
        survey, _ = fetch(archive, tmp_path, n=12)
        assert len(archive.log().query("service == 'spectrum'")) - before == 5
        with pytest.raises(BadInput, match="was begun with n = 12, not 7"): fetch(archive, tmp_path, n=7)
        with pytest.raises(BadInput, match="was begun with size"): fetch(archive, tmp_path, n=12, size=48)
    assert set(survey.catalog["object_id"]) == set(calm.catalog["object_id"]) and survey.verify()


def test_what_stays_broken_is_listed(tmp_path):
    "Lasting faults: each galaxy is in the survey, flagged where a band is lacking, or in rejects.csv with its reason."
    kinds = dict(missing_band=0.2, empty_sky=0.15, nan_band=0.05, wrong_id=0.03, http500=0.02)
    quick = Manners(tries=2, rate=5000, backoff=0.01, timeout=20.0, deadline=40.0, give_up=1000)
    with StandIn(SKY, kinds, seed=5, lasting=("wrong_id", "http500"), max_repeat=99) as archive:
        survey, job = fetch(archive, tmp_path, n=30, manners=quick)
    rejects = pd.read_csv(tmp_path / "rejects.csv", dtype="str")
    catalog = pd.read_parquet(tmp_path / "catalog.parquet")
    assert set(survey.catalog["object_id"]) | set(rejects["object_id"]) == set(catalog["object_id"])
    assert not set(survey.catalog["object_id"]) & set(rejects["object_id"])
    assert rejects["reason"].str.contains("no Pan-STARRS coverage|HTTP 500|another|does not belong|skycell|of the object").all() and rejects["remedy"].notna().all()
    assert survey.catalog["flag_missing_band"].sum() == (np.isnan(survey.cutouts[:]).all(axis=(2, 3)).any(axis=1)).sum() > 0
    failed = rejects[rejects["remedy"] == "Run the same command again."]["object_id"]
    with StandIn(SKY, {k: v for k, v in kinds.items() if k in ("missing_band", "empty_sky", "nan_band")}, seed=5) as mended:
        grown, job = fetch(mended, tmp_path, n=30, manners=quick)
    assert set(grown.catalog["object_id"]) == set(survey.catalog["object_id"]) | set(failed) and len(failed)
    assert grown.verify()


def test_bad_spectra_are_rejects(tmp_path):
    "A redshift that the file does not trust: the catalogue said otherwise."
    with StandIn(SKY) as archive:
        bad = SKY.galaxies.query("zWarning != 0 or `class` != 'GALAXY'").drop_duplicates("galaxy")
        table = pd.concat([bad, SKY.galaxies.query("zWarning == 0 and `class` == 'GALAXY'").head(5)])
        table[["object_id", "ra", "dec", "plate", "mjd", "fiberid", "run2d"]].to_csv(tmp_path / "mine.csv", index=False)
        survey, job = fetch(archive, tmp_path / "real", n=None, table=str(tmp_path / "mine.csv"))
    assert len(bad) and len(survey) == 5 and set(job.rejects["object_id"]) == set(bad["object_id"])
    assert job.rejects["reason"].str.contains("ZWARNING|not a galaxy").all()


def test_published_targets_keep_low_redshift_quasars(tmp_path):
    sky = Sky.toy(30, seed=6, others=0.4)
    g = sky.galaxies
    quasars = g.loc[(g["class"] == "QSO") & (g["zWarning"] == 0) & (g["z"] < 0.36) & ((g["legacy_target1"] & (64 | 2 | 4)) > 0), "object_id"]
    with StandIn(sky) as archive: survey, job = fetch(archive, tmp_path, n=None, targets="published")
    kept = set(survey.catalog.loc[survey.catalog["spec_class"] == "QSO", "object_id"])
    assert kept == set(quasars) and len(kept)


def test_table_of_positions(tmp_path):
    good = SKY.galaxies.query("zWarning == 0 and `class` == 'GALAXY'").drop_duplicates("galaxy").head(4)
    table = pd.DataFrame(dict(name=["a", "b", "c", "d", "nowhere"], ra=[*good["ra"] + 0.1 / 3600, 200.0], dec=[*good["dec"], -10.0]))
    table.to_csv(tmp_path / "mine.csv", index=False)
    with StandIn(SKY) as archive: survey, job = fetch(archive, tmp_path / "real", n=None, table=str(tmp_path / "mine.csv"))
    assert set(survey.catalog["object_id"]) <= set(SKY.galaxies["object_id"]) and len(survey) + len(job.rejects) == 5 and len(survey) >= 3
    assert job.rejects["reason"].str.contains("no spectrum within|ambiguous").all()


def test_images_only(tmp_path):
    pd.DataFrame(dict(name=["a", "south"], ra=[SKY.galaxies["ra"][0], 30.0], dec=[SKY.galaxies["dec"][0], -60.0])).to_csv(tmp_path / "mine.csv", index=False)
    with StandIn(SKY) as archive:
        survey, job = fetch(archive, tmp_path / "real", n=None, table=str(tmp_path / "mine.csv"), images_only=True)
        assert "spectrum" not in set(archive.log()["service"])
    assert survey is None and len(list((tmp_path / "real" / "cutouts").rglob("*.fits"))) == 5
    assert job.rejects["reason"].tolist() == ["no Pan-STARRS coverage"]


def test_two_at_once(tmp_path):
    with StandIn(SKY) as archive, Fetch(tmp_path, Plan(n=3, size=32), HASTY, archive.archives, 1, False):
        with pytest.raises(BadInput, match="another fetch is at work"): fetch(archive, tmp_path, n=3)


def test_no_network_ends_with_a_reason(tmp_path, capsys):
    "An archive that does not answer, at the first step and at a later one."
    with StandIn(SKY) as archive:
        Fetch(tmp_path, Plan(n=3, size=32), HASTY, archive.archives, 1, False).__enter__().catalog()
        gone = archive.archives
    manners = Manners(tries=2, backoff=0.01, rate=1000, timeout=0.5)
    with pytest.raises(BadInput, match="file lists could not be had.*connection refused.*again later"):
        fetch_survey(tmp_path, Plan(n=3, size=32), manners, gone, 1, False)


def test_estimate_and_dry_run(tmp_path, capsys):
    cost = estimate(Plan(n=1000, size=224), Manners(workers=6, rate=1000))
    body = -(-224 ** 2 * 4 // 2880) * 2880 + 20160
    assert cost.GB["cutouts"] == pytest.approx(5000 * body / 1e9, abs=0.01) and cost.hours["cutouts"] == pytest.approx(5000 * 1.2 / 6 / 3600, abs=0.01)
    assert main(["fetch", "--n", "64000", "--out", str(tmp_path / "none"), "--dry-run"]) == 0
    assert "320000" in capsys.readouterr().out and not (tmp_path / "none").exists()
    with StandIn(SKY) as archive: fetch(archive, tmp_path / "real")
    assert requests_done(tmp_path / "real") == dict(sql=1, lists=1, spectra=12, cutouts=60)


def test_exit_status_tells_that_something_is_missing(tmp_path, capsys):
    with StandIn(SKY, dict(http500=0.08), lasting=("http500",), max_repeat=99, seed=1) as archive:
        ask = ["fetch", "--out", str(tmp_path), "--n", "6", "--size", "32", "--archive", archive.url, "--rate", "1000", "--workers", "1", "--quiet"]
        assert main([*ask, "--tries", "1"]) == 1
    out = capsys.readouterr().out
    assert "failed" in out and "HTTP 500 in all tries" in out


@pytest.mark.parametrize("wish", [dict(n=0), dict(size=8), dict(z_min=0.4, z_max=0.3)])
def test_wishes_that_make_no_sense(wish):
    with pytest.raises(BadInput): Plan(**wish)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="nothere"), StandIn(SKY) as archive: fetch(archive, tmp_path, n=None, table=str(tmp_path / "nothere.csv"))
