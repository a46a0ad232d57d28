"The survey on disk: interrupted, written by many, damaged, split."
import multiprocessing as mp
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from astropy import units as u
from hypothesis import given, settings, strategies as st

from spectranb.core import BadInput
from spectranb.data.survey import Survey, SurveyWriter, append_survey, file_checksum, sky_cell, split_random, split_sky, to_float16

N, SIZE = 40, 12


def chunk(start, stop):
    "Rows that depend on their number only."
    k = np.arange(start, stop)
    rng = [np.random.default_rng([7, i]) for i in k]
    rows = pd.DataFrame(dict(object_id=[f"g{i:05d}" for i in k], ra=(k * 37.7) % 360, dec=(k * 11.3) % 80, redshift=0.1, norm=2.0))
    array = lambda *shape: np.array([r.normal(size=shape) for r in rng])
    return dict(rows=rows, flux=array(1000), ivar=np.abs(array(1000)), cutouts=array(5, SIZE, SIZE), arrays=dict(clean=array(1000)),
                tables=dict(truth=rows[["object_id"]].assign(mass=k * 0.1)))


def writer(path, **kwargs): return SurveyWriter(path, N, SIZE, **{"provenance": dict(seed=7), "arrays": dict(clean=(1000,)), **kwargs})


def make(path, pieces=16):
    w = writer(path)
    for start, stop in w.todo(pieces): w.write(start, **chunk(start, stop))
    return w.finish()


@pytest.fixture(scope="module")
def survey(tmp_path_factory): return make(tmp_path_factory.mktemp("survey") / "s")


@pytest.fixture
def copied(survey, tmp_path): return shutil.copytree(survey.path, tmp_path / "s")


def test_same_bytes_whatever_the_pieces(survey, tmp_path):
    for pieces in 1, 7, N: assert make(tmp_path / f"s{pieces}", pieces).info == survey.info


def test_contents(survey):
    want = chunk(0, N)
    assert np.array_equal(survey.spectra, want["flux"].astype(np.float32)) and np.array_equal(survey.ivar, want["ivar"].astype(np.float32))
    assert np.array_equal(survey.cutouts, want["cutouts"].astype(np.float16)) and np.array_equal(survey.arrays["clean"], want["arrays"]["clean"].astype(np.float32))
    assert survey.catalog["object_id"].tolist() == want["rows"]["object_id"].tolist() and survey.truth["mass"][3] == pytest.approx(0.3)
    assert len(survey) == N and survey.size == SIZE and survey.summary(plot=False).loc["galaxies"].item() == str(N)


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_data_survey import writer, chunk
import spectranb.data.survey as module
w = writer({path!r})
real = module._write_rows
def slow(path, start, values):
    real(path, start, values)
    if start >= 16: print("half-way through a chunk", flush=True); time.sleep(60)
module._write_rows = slow
for start, stop in w.todo(8): w.write(start, **chunk(start, stop))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_midway_resumes(survey, tmp_path):
    path = tmp_path / "killed"
    code = KILLED.format(tests=os.path.dirname(__file__), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert "half-way" in process.stdout.readline()
    process.kill(); process.wait()
    with pytest.raises(BadInput, match="unfinished"): Survey.open(path)
    w = writer(path)
    assert w.done() == [(0, 8), (8, 16)]                             # the chunk that was being written does not count
    with pytest.raises(BadInput, match="not written"): w.finish()
    for start, stop in w.todo(8): w.write(start, **chunk(start, stop))
    assert w.finish().info == survey.info


def work(job):
    path, start, stop = job
    writer(path).write(start, **chunk(start, stop))


def test_many_processes(survey, tmp_path):
    path = tmp_path / "many"
    jobs = [(path, a, b) for a, b in writer(path).todo(5)]
    with mp.get_context("spawn").Pool(2) as pool: pool.map(work, jobs)
    assert writer(path).finish().info == survey.info


def test_interrupted_finish(survey, tmp_path, monkeypatch):
    path = tmp_path / "s"
    w = writer(path)
    for start, stop in w.todo(16): w.write(start, **chunk(start, stop))
    with monkeypatch.context() as m:
        m.setattr(os, "rename", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): w.finish()
    again = writer(path)
    assert again.todo() == [] and again.finish().info == survey.info


def test_other_settings_do_not_resume(tmp_path):
    writer(tmp_path / "s")
    for other in dict(provenance=dict(seed=8)), dict(arrays={}):
        with pytest.raises(BadInput, match="was begun with"): writer(tmp_path / "s", **other)
    (tmp_path / "s.partial" / "progress.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"): writer(tmp_path / "s")


def test_no_overwriting(copied):
    with pytest.raises(BadInput, match="exists already"): writer(copied)


def test_no_room(tmp_path):
    with pytest.raises(BadInput, match="GB are free"): SurveyWriter(tmp_path / "s", 10 ** 12)


def test_bad_chunks(tmp_path):
    w = writer(tmp_path / "s")
    good = chunk(0, 8)
    def refused(what, start=0, **changes):
        with pytest.raises(BadInput, match=what): w.write(start, **(good | changes))
    refused("cutouts has shape", cutouts=good["cutouts"][:, :, :-1])
    refused("spectra has shape", flux=good["flux"][:, :-1])
    refused("arrays", cutouts=None)
    refused("arrays", arrays=None)
    refused("outside", start=36)
    refused("not finite", flux=np.where(np.arange(1000) == 3, np.nan, good["flux"]))
    refused("negative", ivar=-good["ivar"])
    refused("lacks", rows=good["rows"].drop(columns="norm"))
    refused("not text", rows=good["rows"].assign(object_id=np.arange(8)))
    refused("table truth", tables=dict(truth=good["rows"][:3]))
    assert w.done() == []
    w.write(0, **good); w.write(0, **good)                           # the same chunk again is no harm
    refused("overlaps", start=4)


def test_repeated_id(tmp_path):
    w = writer(tmp_path / "s")
    for start, stop in w.todo(20): w.write(start, **(chunk(start, stop) | dict(rows=chunk(0, 20)["rows"])))
    with pytest.raises(BadInput, match="g00000 occurs twice"): w.finish()


def test_spectra_only(tmp_path):
    w = SurveyWriter(tmp_path / "s", 5, size=0)
    c = chunk(0, 5)
    w.write(0, c["rows"], c["flux"], c["ivar"])
    s = w.finish()
    assert s.cutouts is None and s.truth is None and s.arrays == {} and not (s.path / "cutouts.npy").exists() and len(s.summary(plot=False))


FILES = ["catalog.parquet", "cutouts.npy", "spectra.npy", "ivar.npy", "clean.npy", "truth.parquet"]


@pytest.mark.parametrize("name", FILES + ["survey.json"])
def test_missing_file(copied, name):
    (copied / name).unlink()
    with pytest.raises(BadInput, match=name): Survey.open(copied)


@pytest.mark.parametrize("name", FILES)
def test_truncated_file(copied, name):
    data = (copied / name).read_bytes(); (copied / name).write_bytes(data[:-1])
    with pytest.raises(BadInput, match=name): Survey.open(copied)


def test_foreign_files(copied):
    (copied / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="notes.txt.*does not belong"): Survey.open(copied)
    (copied / "notes.txt").rename(copied / ".notes"); Survey.open(copied)        # hidden files are nobody's business
    np.save(copied / "spectra.npy", np.zeros((N, 1000), np.float32))             # right name, right length, other content
    with pytest.raises(BadInput, match="spectra.npy"): Survey.open(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "spectranb survey", "version": 2}'])
def test_damaged_description(copied, text):
    (copied / "survey.json").write_text(text)
    with pytest.raises(BadInput, match="survey.json"): Survey.open(copied)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_any_flipped_bit_is_found(survey, name, where, bit):
    file = survey.path / name
    with file.open("r+b") as f:
        at = int(where * file.stat().st_size)
        f.seek(at); byte = f.read(1)[0]
        f.seek(at); f.write(bytes([byte ^ 1 << bit]))
    try:
        with pytest.raises(BadInput, match=name): survey.verify()
    finally:
        with file.open("r+b") as f: f.seek(at); f.write(bytes([byte]))
    assert survey.verify()


def test_pickles_as_a_path(survey):
    survey.cutouts, survey.catalog
    text = pickle.dumps(survey)
    assert len(text) < 1000 and np.array_equal(pickle.loads(text).spectra[3], survey.spectra[3])


def test_opens_fast(tmp_path):
    n = 64_000
    w = SurveyWriter(tmp_path / "s", n, size=4)
    rows = pd.DataFrame(dict(object_id=np.arange(n).astype(str).astype(object), ra=1.0, dec=2.0, redshift=.1, norm=1.))
    w.write(0, rows, np.zeros((n, 1000), np.float32), np.zeros((n, 1000), np.float32), cutouts=np.zeros((n, 5, 4, 4), np.float16))
    w.finish()
    start = time.perf_counter(); s = Survey.open(tmp_path / "s"); s.catalog, s.cutouts[n - 1], s.spectra[n - 1]
    assert time.perf_counter() - start < 1


def test_float16():
    image = np.full((2, 5, 3, 3), 1.0); image[1, 2, 0, 0] = np.inf; image[1, 2, 0, 1] = np.nan
    half, clipped = to_float16(image)
    assert half[1, 2, 0, 0] == 65504 and np.isnan(half[1, 2, 0, 1]) and clipped.tolist() == [0, 1]


SKY = st.integers(0, 10 ** 6).map(lambda s: (np.random.default_rng(s).uniform(0, 30, 400), np.random.default_rng(s + 1).uniform(-10, 10, 400)))


@settings(max_examples=20, deadline=None)
@given(SKY, st.integers(0, 99), st.sampled_from([0.5, 0.8]))
def test_split_is_a_partition_by_cells(sky, seed, fraction):
    ra, dec = sky
    train, valid = split_sky(ra, dec, seed=seed, fraction=fraction)
    assert sorted([*train, *valid]) == list(range(400))
    again = split_sky(ra[:200], dec[:200], seed=seed, fraction=fraction, radius=0)
    alone = split_sky(ra, dec, seed=seed, fraction=fraction, radius=0)
    assert np.array_equal(again[1], alone[1][alone[1] < 200])        # more galaxies move none of the old
    cells = sky_cell(ra, dec)
    assert not set(cells[alone[0]]) & set(cells[alone[1]])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10 ** 6))
def test_no_close_pair_is_separated(seed):
    rng = np.random.default_rng(seed)
    ra, dec = rng.uniform(0, 360, 3000), np.degrees(np.arcsin(rng.uniform(-1, 1, 3000)))
    twins = np.concatenate([ra, ra + rng.uniform(-5, 5, 3000) / 3600]), np.concatenate([dec, np.clip(dec + rng.uniform(-5, 5, 3000) / 3600, -90, 90)])
    train, _ = split_sky(*twins, seed=seed)
    side = np.isin(np.arange(6000), train)
    near_pole = np.abs(dec) > 89
    assert (side[:3000] == side[3000:])[~near_pole].all()


def test_random_split_is_the_published_one():
    import torch
    torch.manual_seed(12345)
    order = torch.randperm(64_000).numpy()
    train, valid = split_random(64_000)
    assert np.array_equal(valid, order[:12_800]) and np.array_equal(train, order[12_800:])
    before = torch.get_rng_state(); split_random(100)
    assert torch.equal(torch.get_rng_state(), before)                # the caller's random numbers are left alone


def test_one_patch_of_sky(tmp_path):
    w = SurveyWriter(tmp_path / "s", 8, size=0)
    c = chunk(0, 8)
    w.write(0, c["rows"].assign(ra=10.0, dec=20.0), c["flux"], c["ivar"])
    s = w.finish()
    with pytest.raises(BadInput, match="kind='random'"): s.split()
    with pytest.raises(BadInput, match="not a kind"): s.split("sky")
    assert len(s.split("random")[1]) == 1


# ---- growing ----

M = 11                                                               # galaxies of the second part


def part(path, first, n, lists=None, **kwargs):
    "A survey of the galaxies first, …, first + n - 1 of `chunk`."
    w = SurveyWriter(path, n, SIZE, **{"provenance": dict(seed=7, first=first), "arrays": dict(clean=(1000,)), **kwargs})
    w.write(0, **chunk(first, first + n))
    return w.finish(lists=lists)


@pytest.fixture(scope="module")
def more(tmp_path_factory): return part(tmp_path_factory.mktemp("more") / "m", N, M)


@pytest.fixture(scope="module")
def longer(survey, more, tmp_path_factory):
    "What an append must give, however it is interrupted."
    return Survey.open(shutil.copytree(survey.path, tmp_path_factory.mktemp("longer") / "s")).append(more)


def content(path): return {f.name: f.read_bytes() for f in path.iterdir() if f.is_file()}


def test_appended_is_the_longer_survey(longer, survey, tmp_path):
    want = chunk(0, N + M)
    whole = part(tmp_path / "whole", 0, N + M)
    for name in ("spectra", "ivar", "clean", "cutouts"):             # the same bytes as if written in one go, header included
        assert (longer.path / f"{name}.npy").read_bytes() == (whole.path / f"{name}.npy").read_bytes()
    assert (longer.path / "catalog.parquet").read_bytes() == (whole.path / "catalog.parquet").read_bytes()
    assert len(longer) == N + M and longer.catalog["object_id"].tolist() == want["rows"]["object_id"].tolist()
    assert longer.truth["mass"].iloc[-1] == pytest.approx(5.0) and longer.verify() == list(longer.info["files"])
    assert [(p["n"], p["provenance"]) for p in longer.info["parts"]] == [(N, survey.info["provenance"]), (M, dict(seed=7, first=N))]
    parts = longer.info["files"]["ivar.npy"]["parts"]
    assert parts[0]["sha256"] == file_checksum(survey.path / "ivar.npy") and not [*longer.path.glob(".*")]


def test_append_to_appended(longer, tmp_path):
    "Parts of parts: the pieces stay known one by one."
    third = Survey.open(shutil.copytree(longer.path, tmp_path / "s")).append(part(tmp_path / "a", 60, 2).append(part(tmp_path / "b", 70, 3)))
    assert [p["n"] for p in third.info["parts"]] == [p["n"] for p in third.info["files"]["cutouts.npy"]["parts"]] == [N, M, 2, 3]
    assert np.array_equal(third.spectra[-3:], chunk(70, 73)["flux"].astype(np.float32)) and third.verify()


def test_repeated_galaxies_are_refused_untouched(copied, more, tmp_path):
    before = content(copied)
    with pytest.raises(BadInput, match="3 of its galaxies.*g00037, g00038, g00039"):
        Survey.open(copied).append(part(tmp_path / "o", N - 3, 5))
    with pytest.raises(BadInput, match="40 of its galaxies.* and 35 more"): append_survey(copied, Survey.open(copied))
    assert content(copied) == before
    s = append_survey(copied, more)
    with pytest.raises(BadInput, match="g00040"): s.append(more)


def test_unfit_surveys_are_refused_untouched(copied, tmp_path):
    before = content(copied)
    rows = chunk(90, 92)
    def other(name, size=SIZE, arrays=("clean",), tables=True, provenance=None, change=lambda r: r):
        w = SurveyWriter(tmp_path / name, 2, size, provenance=provenance, arrays={a: (1000,) for a in arrays})
        w.write(0, change(rows["rows"]), rows["flux"], rows["ivar"], cutouts=rows["cutouts"][..., :size, :size] if size else None,
                arrays={a: rows["ivar"] for a in arrays}, tables=rows["tables"] if tables else None)
        return w.finish()
    def refused(what, *args, **kwargs):
        with pytest.raises(BadInput, match=what): append_survey(copied, other(*args, **kwargs))
    refused("size 6", "a", size=6)
    refused("arrays", "b", arrays=())
    refused("tables", "c", tables=False)
    refused("columns of catalog.*snr", "d", change=lambda r: r.assign(snr=1.0))
    refused("simulated", "e", provenance=dict(simulated=True))
    assert content(copied) == before and not [*copied.glob(".*")]
    with pytest.raises(BadInput, match="no such folder"): append_survey(tmp_path / "nowhere", Survey.open(copied))


def test_a_damaged_part_does_not_enter(copied, more, tmp_path):
    damaged = shutil.copytree(more.path, tmp_path / "m")
    opened = Survey.open(damaged)
    with (damaged / "ivar.npy").open("r+b") as f: f.seek(30_000); f.write(b"x")
    before = content(copied)
    with pytest.raises(BadInput, match="ivar.npy: changed"): append_survey(copied, opened)
    assert content(copied) == before and Survey.open(copied).verify()


class Crash(BaseException): pass


def calls_until_crash(monkeypatch, k):
    "Let the k-th call of fsync, replace, write or rename of an append raise; returns the counter."
    count = [0]
    def hurt(real):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == k: raise Crash
            return real(*args, **kwargs)
        return call
    for name in ("fsync", "replace"): monkeypatch.setattr(os, name, hurt(getattr(os, name)))
    return count


def test_crash_at_every_write(survey, more, longer, tmp_path, monkeypatch):
    k, crashes, undone, want, old = 0, 0, 0, content(longer.path), content(survey.path)
    while True:
        k += 1
        path = shutil.copytree(survey.path, tmp_path / f"s{k}")
        with monkeypatch.context() as m:
            count = calls_until_crash(m, k)
            try: append_survey(path, more)
            except Crash: crashes += 1
        if count[0] < k: break
        grown = (path / "survey.json").read_bytes() == want["survey.json"]
        assert grown or (path / "survey.json").read_bytes() == old["survey.json"]      # never anything between
        twin = shutil.copytree(path, tmp_path / "twin")
        assert content(Survey.recover(twin).path) == (want if grown else old) and not [*twin.glob(".*")]
        shutil.rmtree(twin)
        if grown: assert len(Survey.open(path)) == N + M
        elif content(path) != old or (path / ".append").exists():
            undone += 1
            with pytest.raises(BadInput, match="append_survey.*Survey.recover"): Survey.open(path)
        assert len(append_survey(path, more)) == N + M and content(path) == want and not [*path.glob(".*")]
        shutil.rmtree(path)
    assert crashes == k - 1 >= 15 and undone >= 8 and content(path) == want


def test_crash_while_undoing(survey, more, longer, tmp_path, monkeypatch):
    old = content(survey.path)
    for k in range(1, 30):
        path = shutil.copytree(survey.path, tmp_path / f"s{k}")
        with monkeypatch.context() as m:
            calls_until_crash(m, 14)                                 # well inside: arrays are longer, a table may be new
            with pytest.raises(Crash): append_survey(path, more)
        with monkeypatch.context() as m:
            count = calls_until_crash(m, k)
            try: Survey.recover(path)
            except Crash: pass
        assert content(Survey.recover(path).path) == old and Survey.open(path).verify()
        shutil.rmtree(path)
        if count[0] < k: break
    assert k > 8


KILLED_APPEND = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import spectranb.data.survey as module
other = module.Survey.open({other!r})
real = os.fsync, os.replace
def slow(f):
    def call(*args):
        time.sleep(0.002); return f(*args)
    return call
os.fsync, os.replace = map(slow, real)
print("ready", flush=True)
module.append_survey(Path({path!r}), other)
print("done", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_sigkill_at_random_moments(copied, more, longer):
    rng, kills, tests = np.random.default_rng(0), 0, os.path.dirname(__file__)
    for attempt in range(40):
        code = KILLED_APPEND.format(tests=tests, other=str(more.path), path=str(copied))
        if kills >= 6: break
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.08)); process.kill()
        if "done" in process.communicate()[0]: break
        kills += 1
        described = len(longer) if (copied / "survey.json").read_bytes() == (longer.path / "survey.json").read_bytes() else N
        if described == len(longer): break
    assert kills >= 1
    append_survey(copied, more) if described == N else Survey.recover(copied)
    assert content(copied) == content(longer.path) and Survey.open(copied).verify()


def test_two_appends_at_once(copied, more, monkeypatch):
    real = os.fsync
    def meanwhile(fd):
        monkeypatch.setattr(os, "fsync", real)
        for attempt in (lambda: append_survey(copied, more)), (lambda: Survey.recover(copied)):
            with pytest.raises(BadInput, match="another process is appending"): attempt()
        return real(fd)
    monkeypatch.setattr(os, "fsync", meanwhile)
    assert len(append_survey(copied, more)) == N + M and os.fsync is real


def test_readers_keep_what_they_opened(copied, more):
    early = Survey.open(copied)
    append_survey(copied, more)
    assert len(early) == N and len(early.catalog) == len(early.truth) == len(early.cutouts) == len(early.arrays["clean"]) == N
    assert np.array_equal(early.spectra, chunk(0, N)["flux"].astype(np.float32)) and isinstance(early.spectra, np.memmap)
    assert len(pickle.loads(pickle.dumps(early))) == N + M           # a new process opens the survey as it is now


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FILES), st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_any_flipped_bit_is_found_after_an_append(longer, name, where, bit): test_any_flipped_bit_is_found.hypothesis.inner_test(longer, name, where, bit)


@pytest.mark.parametrize("name", FILES)
def test_flipped_header_or_lost_tail_is_found(longer, tmp_path, name):
    path = shutil.copytree(longer.path, tmp_path / "s")
    raw = (path / name).read_bytes()
    (path / name).write_bytes(raw[:20] + bytes([raw[20] ^ 1]) + raw[21:])
    with pytest.raises(BadInput, match=name): longer.__class__(path, longer.info).verify()
    with pytest.raises(BadInput, match=name): Survey.open(path)
    (path / name).write_bytes(raw + b"x")
    with pytest.raises(BadInput, match=name): Survey.open(path)


def test_rejects_are_joined(tmp_path):
    rejects = lambda *ids: dict(rejects=pd.DataFrame(dict(object_id=list(ids), reason="no z band")))
    a, b, c = part(tmp_path / "a", 0, 3, lists=rejects("x", "y")), part(tmp_path / "b", 5, 3), part(tmp_path / "c", 9, 3, lists=rejects("z"))
    a.append(b).append(c)
    assert a.tables["rejects"]["object_id"].tolist() == ["x", "y", "z"] and len(a) == 9 and len(a.truth) == 9
    assert a.summary(plot=False).loc["rejects"].item() == "3; 3 × no z band"
    b = part(tmp_path / "d", 20, 3).append(part(tmp_path / "e", 30, 3, lists=rejects("w")))
    assert b.tables["rejects"]["object_id"].tolist() == ["w"] and b.verify()


# ---- repeats ----

def test_duplicates_against_brute_force(tmp_path):
    from astropy.coordinates import SkyCoord
    rng = np.random.default_rng(3)
    ra, dec = rng.uniform(0, 360, 200), np.degrees(np.arcsin(rng.uniform(-1, 1, 200)))
    ra[:2], dec[:2] = [359.9999, 0.0001], 0.0                       # 0.72″ apart, across 0h
    copies = rng.choice(np.arange(2, 200), 40, replace=False)
    shift = SkyCoord(ra[copies], dec[copies], unit="deg").directional_offset_by(rng.uniform(0, 360, 40) * u.deg, rng.uniform(0, 3, 40) * u.arcsec)
    ra, dec = np.append(ra, shift.ra.deg), np.append(dec, shift.dec.deg)
    w, c = SurveyWriter(tmp_path / "s", 240, size=0), chunk(0, 240)
    w.write(0, c["rows"].assign(ra=ra, dec=dec), c["flux"], c["ivar"])
    s = w.finish()
    found = s.duplicates()
    sky = SkyCoord(ra, dec, unit="deg")
    separation = sky[:, None].separation(sky[None]).arcsec
    twins = {tuple(p) for p in np.argwhere(np.triu(separation < 1.5, 1)).tolist()}
    assert {tuple(g["row"]) for _, g in found.groupby("group")} == twins and (0, 1) in twins and 10 < len(twins) < 35
    second = found.groupby("group").nth(1)
    assert np.allclose(second["separation"], [separation[p] for p in sorted(twins)], atol=1e-5)
    assert found["object_id"].tolist() == s.catalog["object_id"].iloc[found["row"]].tolist()
    train, valid = s.split()
    side = np.isin(np.arange(240), train)
    assert all(side[a] == side[b] for a, b in s.duplicates(radius=30.0).groupby("group")["row"].agg(list))   # no repeat astride the split


def test_duplicates_are_chained(tmp_path):
    w, c = SurveyWriter(tmp_path / "s", 5, size=0), chunk(0, 5)
    w.write(0, c["rows"].assign(ra=10.0, dec=np.array([0, 1, 2, 50, 51.4]) / 3600), c["flux"], c["ivar"])
    found = w.finish().duplicates()
    assert found["group"].tolist() == [0, 0, 0, 1, 1] and np.allclose(found["separation"], [0, 1, 2, 0, 1.4], atol=1e-6)
