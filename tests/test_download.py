"Fetching from an archive that stumbles: every file whole and verified, or listed with its reason; nothing asked for twice."
import errno
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests

from spectranb.core import BadInput
from spectranb.data.cutouts import choose_files, cutout_requests, list_requests, read_file_list
from spectranb.data.spectra import spectrum_requests
from spectranb.download import Absent, Again, Archives, Manners, Pace, Request, Store, fetch_body
from spectranb.standin import Sky, StandIn

SIZE = 32
CALM = Manners(backoff=0.01, rate=5000, timeout=20.0, deadline=40.0, max_wait=0.05)       # a busy machine is no fault
HASTY = Manners(backoff=0.01, rate=5000, timeout=0.6, deadline=1.0, max_wait=0.05)        # where silence and trickles are the faults
SKY = Sky.toy(12, seed=3)
CATALOG = SKY.galaxies[["object_id", "ra", "dec", "plate", "mjd", "fiberid", "run2d"]].drop_duplicates("object_id").reset_index(drop=True)


def wanted(archives):
    "Requests for all cutouts of the toy sky, and the bodies that a faultless archive gives."
    ask = list_requests(CATALOG, archives=archives)[0]
    files, rejects = choose_files(CATALOG, [read_file_list(requests.post(ask.url, data=ask.fields, files=ask.upload).text)])
    assert not len(rejects)
    return list(cutout_requests(CATALOG, files, SIZE, archives))


@pytest.fixture(scope="module")
def good():
    "The right body of every cutout, by key."
    with StandIn(SKY) as archive:
        return {r.key: requests.get(r.url, params=r.params).content for r in wanted(archive.archives)}


def with_faults(archive, todo):
    "The same requests at another archive."
    base = todo[0].url.split("/ps1")[0]
    move = lambda r: Request(r.key, r.url.replace(base, archive.url), r.path, r.check, r.params, r.fields, r.upload, r.object_id)
    return [move(r) for r in todo]


@pytest.fixture(scope="module")
def todo():
    with StandIn(SKY) as archive: return wanted(archive.archives)


def check_all(folder, todo, good):
    assert all((folder / r.path).read_bytes() == good[r.key] for r in todo)
    assert not list((folder / ".part").iterdir())


PASSING = ["http500", "burst503", "rate429", "cut", "hang", "html200", "empty200", "truncated", "wrong_size", "wrong_filter", "wrong_id"]


@pytest.mark.parametrize("kind", PASSING)
def test_a_passing_fault_costs_one_retry_each(kind, tmp_path, todo, good):
    with StandIn(SKY, {kind: 0.15}, seed=1, retry_after=0, hang=5.0) as archive, Store(tmp_path) as store:
        counts = store.fetch(with_faults(archive, todo), HASTY if kind == "hang" else CALM, progress=False)
        faults = [f for f in archive.log()["fault"] if f]
    assert (counts.fetched, counts.failed, counts.absent) == (len(todo), 0, 0)
    assert (counts.retries >= len(faults) > 0 if kind == "hang" else counts.retries == len(faults) > 0) and set(faults) == {kind}
    check_all(tmp_path, todo, good)


def test_a_trickle_ends_at_the_deadline(tmp_path, todo, good):
    with StandIn(SKY, dict(drip=0.15), seed=1, drip=30.0) as archive, Store(tmp_path) as store:
        counts = store.fetch(with_faults(archive, todo), HASTY, progress=False)
    assert counts.fetched == len(todo) and counts.retries > 0 and counts.failed == 0
    check_all(tmp_path, todo, good)


def test_ten_percent_of_everything(tmp_path, todo, good):
    with StandIn(SKY, 0.1, seed=4, retry_after=0, hang=3.0, drip=0.1) as archive, Store(tmp_path) as store:
        counts = store.fetch(with_faults(archive, todo), HASTY, progress=False)
    assert counts.fetched == len(todo)
    check_all(tmp_path, todo, good)


REASONS = dict(http500="HTTP 500", html200="web page", truncated="cut off", wrong_size="not 32 × 32", wrong_filter="of band", wrong_id="skycell|another place",
               hang="timed out", cut="connection")


@pytest.mark.parametrize("kind", REASONS)
def test_a_lasting_fault_is_listed_and_asked_again(kind, tmp_path, todo, good):
    quick = Manners(tries=2, backoff=0.01, rate=5000, timeout=0.4 if kind == "hang" else 20.0, deadline=40.0, give_up=1000)
    with StandIn(SKY, {kind: 0.08 if kind in ("hang", "cut") else 0.2}, seed=2, lasting=(kind,) if kind not in ("hang", "cut") else (), max_repeat=9, hang=3.0) as archive, Store(tmp_path) as store:
        first = store.fetch(with_faults(archive, todo), quick, progress=False)
        lost = store.rejects()
        if kind in ("hang", "cut"): assert first.failed == len(lost)
        else: assert first.failed == len(lost) > 0 and first.retries == first.failed
        assert lost["reason"].str.contains(REASONS[kind]).all() and not lost["final"].any() and (lost["object_id"] != "").all()
        assert not any((tmp_path / r.path).exists() for r in todo if r.key in set(lost["key"]))
    with StandIn(SKY) as mended, Store(tmp_path) as store:
        second = store.fetch(with_faults(mended, todo), quick, progress=False)
        assert sorted(mended.log()["key"]) == sorted(lost["key"]), "asks for what is missing, and for nothing else"
    assert (second.fetched, second.already) == (len(lost), len(todo) - len(lost))
    check_all(tmp_path, todo, good)


def test_absent_is_final(tmp_path):
    with StandIn(SKY) as archive:
        gone = CATALOG.head(3).assign(mjd=50001)
        todo = list(spectrum_requests(CATALOG.tail(3), archives=archive.archives))
        lost = [Request(f"lost{i}", r.urls, f"lost{i}", object_id=f"{i}") for i, r in enumerate(spectrum_requests(gone.assign(object_id=""), archives=archive.archives))]
        with Store(tmp_path) as store:
            first = store.fetch(todo + lost, CALM, progress=False)
            asked = len(archive.log())
            second = store.fetch(todo + lost, CALM, progress=False)
            assert len(archive.log()) == asked, "nobody asks again for what is not there"
            third = store.fetch(todo + lost, CALM, progress=False, again=True)
            assert store.rejects()["final"].all() and store.rejects()["reason"].str.contains("404").all()
    assert (first.fetched, first.absent, first.retries) == (3, 3, 0) and asked == 3 + 2 * 3, "both root folders were tried"
    assert (second.already, second.absent, third.absent, third.already) == (3, 3, 3, 3)


def test_the_other_root_folder(tmp_path):
    with StandIn(SKY, dict(other_root=1.0)) as archive, Store(tmp_path) as store:
        counts = store.fetch(spectrum_requests(CATALOG, archives=archive.archives), CALM, progress=False)
        moved = (archive.log()["fault"] == "other_root").sum()
    assert counts.fetched == len(CATALOG) and counts.absent == counts.retries == 0 and moved > 0


def test_retry_after_holds_everybody(tmp_path, todo):
    with StandIn(SKY, dict(rate429=0.03), seed=1, retry_after=2) as archive, Store(tmp_path) as store:
        store.fetch(with_faults(archive, todo), Manners(workers=4, rate=200, backoff=0.01), progress=False)
        log = archive.log()
    told = log.loc[log["fault"] == "rate429", "time"]
    assert len(told)
    for t in told: assert ((log["time"] > t + 0.8) & (log["time"] < t + 1.8)).sum() <= 1, "only what was under way comes in the pause"


def test_no_more_at_once_and_no_faster_than_agreed(tmp_path, todo):
    with StandIn(SKY, latency=0.02) as archive, Store(tmp_path) as store:
        begin = time.monotonic()
        store.fetch(with_faults(archive, todo), Manners(workers=3, rate=100), progress=False)
        assert archive.most_active <= 3
    assert time.monotonic() - begin >= (len(todo) - 1) / 100


WORKER = """
import pickle
from spectranb.download import Manners, Store
todo = pickle.load(open({todo!r}, "rb"))
with Store({folder!r}) as store: store.fetch(todo, Manners(workers=3, backoff=0.01, rate=5000, timeout=5.0, deadline=10.0, max_wait=0.05), progress=False)
"""


def worker(tmp_path, archive, todo, folder):
    "A program that fetches."
    (tmp_path / "todo.pkl").write_bytes(pickle.dumps(with_faults(archive, todo)))
    return WORKER.format(todo=str(tmp_path / "todo.pkl"), folder=str(folder))


def test_killed_twenty_times(tmp_path, todo, good):
    "SIGKILL at random moments: what stood on disk is never asked for again, what stands in the end is whole."
    rng, folder = random.Random(5), tmp_path / "store"
    with StandIn(SKY, 0.1, seed=9, latency=0.25, retry_after=0, hang=0.3, drip=0.2) as archive:
        code = worker(tmp_path, archive, todo, folder)
        start, kills, on_disk = lambda: subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE), 0, []
        asked = lambda: archive.log().query("service == 'cutout'")
        while kills < 20:
            run, before = start(), len(asked())
            while run.poll() is None and len(asked()) == before: time.sleep(0.01)      # it has begun
            time.sleep(rng.uniform(0, 0.12))
            if run.poll() is not None: break
            run.send_signal(signal.SIGKILL); run.wait(); kills += 1
            on_disk.append((len(asked()), {f.name for f in folder.rglob("*.fits")}))
        assert kills == 20, "the files are too few for twenty kills"
        assert start().wait(60) == 0
        log = asked().reset_index(drop=True)
        for n, names in on_disk:
            later = set(log["key"][n + 3:])                          # what the workers had under way may still enter the log
            assert not {f"{name.removesuffix('.fits')}" for name in names} & later
    check_all(folder, todo, good)
    with Store(folder) as store: assert store.verify() == [] and len(store.rejects()) == 0


def test_killed_between_file_and_ledger(tmp_path, todo, good):
    with StandIn(SKY) as archive:
        with Store(tmp_path) as store: store.fetch(with_faults(archive, todo), CALM, progress=False)
        (tmp_path / "ledger.sqlite").unlink()
        asked = len(archive.log())
        with Store(tmp_path) as store: counts = store.fetch(with_faults(archive, todo), CALM, progress=False)
        assert (counts.already, counts.fetched) == (len(todo), 0) and len(archive.log()) == asked


def test_damage_is_found_and_mended(tmp_path, todo, good):
    with StandIn(SKY) as archive, Store(tmp_path) as store:
        store.fetch(with_faults(archive, todo), CALM, progress=False)
        flipped, short, gone = (tmp_path / r.path for r in todo[:3])
        flipped.write_bytes(bytes([*good[todo[0].key][:-1], good[todo[0].key][-1] ^ 1])); short.write_bytes(b"SIMPLE"); gone.unlink()
        with pytest.raises(BadInput, match="has changed"): store.read(todo[0].key)
        assert set(store.verify()) == {r.key for r in todo[:3]}
        counts = store.fetch(with_faults(archive, todo), CALM, progress=False)
        assert counts.fetched == 3
    check_all(tmp_path, todo, good)


def test_a_damaged_ledger_says_what_to_do(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(BadInput, match="ledger is damaged.*Delete ledger.sqlite"):
        with Store(tmp_path): pass
    (tmp_path / "ledger.sqlite").unlink()
    with Store(tmp_path) as store: assert len(store.table()) == 0


def test_two_at_once(tmp_path):
    with Store(tmp_path):
        with pytest.raises(BadInput, match=f"in use by process {os.getpid()}"):
            with Store(tmp_path): pass
    with Store(tmp_path): pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = f"from spectranb.download import Store\nimport time\nwith Store({str(tmp_path)!r}): print(1, flush=True); time.sleep(60)"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    run.stdout.readline()
    with pytest.raises(BadInput, match=f"process {run.pid}"):
        with Store(tmp_path): pass
    run.kill(); run.wait()
    with Store(tmp_path): pass


def test_full_disk(tmp_path, todo, good, monkeypatch):
    written, write = [], Path.write_bytes
    def fill(path, body):
        written.append(path)
        if len(written) > 7: raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, body)
    with StandIn(SKY) as archive:
        monkeypatch.setattr(Path, "write_bytes", fill)
        with Store(tmp_path) as store, pytest.raises(BadInput, match="disk is full.*make room and run the same command again"):
            store.fetch(with_faults(archive, todo), CALM, progress=False)
        monkeypatch.undo()
        assert sum(1 for _ in tmp_path.rglob("*.fits")) == 7
        with Store(tmp_path) as store: counts = store.fetch(with_faults(archive, todo), CALM, progress=False)
    assert (counts.already, counts.fetched) == (7, len(todo) - 7)
    check_all(tmp_path, todo, good)


def test_really_full_disk(tmp_path, todo):
    "A file system of 300 kB, where one can be mounted."
    small = tmp_path / "small"; small.mkdir()
    with StandIn(SKY) as archive:
        code = worker(tmp_path, archive, todo, small / "store")
        mount = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=300k none {small} && ls {small} && {sys.executable} - ; ls -R {small}"]
        try: run = subprocess.run(mount, input=code, capture_output=True, text=True, timeout=60)
        except FileNotFoundError: pytest.skip("no unshare")
        if "mount" in run.stderr or "unshare" in run.stderr: pytest.skip(f"no mounting here: {run.stderr.splitlines()[0]}")
    assert "BadInput" in run.stderr and ("disk is full" in run.stderr or "ledger cannot be written" in run.stderr)
    assert "make room" in run.stderr.lower() and run.stdout.count(".fits") > 3


def test_an_archive_that_is_down_ends_the_run(tmp_path, todo):
    with StandIn(SKY) as archive: moved = with_faults(archive, todo)
    with Store(tmp_path) as store:
        with pytest.raises(BadInput, match="5 requests in a row failed, the last one: connection refused.*again later"):
            store.fetch(moved, Manners(tries=2, backoff=0.01, rate=5000, give_up=5, workers=1), progress=False)
        assert len(store.rejects()) == 5


def test_locked_out_is_not_absent(tmp_path):
    "A client that is locked out is told 403 about files that exist."
    class Answer:
        def __enter__(self): return self
        def __exit__(self, *exc): pass
        status_code, headers = 403, {}
    class Session:
        def request(self, *args, **kwargs): return Answer()
    with pytest.raises(Again, match="403"): fetch_body(Session(), Request("a", "http://x", "a"), Manners(tries=2, backoff=0.01))


def test_too_long_a_pause_is_a_failure(tmp_path, todo):
    with StandIn(SKY, dict(rate429=1.0), retry_after=7200, max_repeat=99) as archive, Store(tmp_path) as store:
        counts = store.fetch(with_faults(archive, todo)[:2], Manners(rate=1000), progress=False)
        assert counts.failed == 2 and store.rejects()["reason"].str.contains("wait 7200 s").all()


def test_a_check_may_be_final(tmp_path, todo):
    def empty(body): raise Absent("every pixel is NaN")
    with StandIn(SKY) as archive, Store(tmp_path) as store:
        r = with_faults(archive, todo)[0]
        counts = store.fetch([Request(r.key, r.url, r.path, empty, r.params)], CALM, progress=False)
        assert counts.absent == 1 and len(archive.log()) == 1 and store.rejects()["reason"][0] == "every pixel is NaN"


def test_manners_are_checked():
    with pytest.raises(BadInput, match="rate"): Manners(rate=0)


def test_pace_is_shared():
    pace, taken = Pace(1000), []
    threads = [threading.Thread(target=lambda: taken.extend(pace.take() for _ in range(50))) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert pace.next >= time.monotonic() and len(taken) == 200


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be used as a folder"): Store(tmp_path / "file" / "store")
