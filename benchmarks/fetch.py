"""A whole fetch against the stand-in archive with injected faults, and its speed beside one request at a time.

    python benchmarks/fetch.py --n 2000 --faults 0.1 --latency 0.2

The archive is `spectranb.standin` in a process of its own on this machine; galaxies and faults are simulated. The second part fetches
the same cutouts from it twice: one request after the other, as published code does, and with spectranb's workers; both without faults.
"""
import argparse
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from spectranb.data.cutouts import choose_files, cutout_requests, list_requests, read_file_list
from spectranb.data.fetch import Fetch, Plan
from spectranb.data.mock import simulate_survey
from spectranb.data.survey import Survey
from spectranb.download import Archives, Manners, Store


@contextmanager
def archive(survey, faults, latency, log):
    "The stand-in in a process of its own; gives its address."
    command = [sys.executable, "-m", "spectranb.standin", "--survey", str(survey), "--faults", str(faults), "--latency", str(latency), "--log", str(log)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        try: yield run.stdout.readline().strip()
        finally: run.terminate()


def whole_run(url, out, n, size, log):
    "Fetch everything; print what happened."
    begin = time.monotonic()
    with Fetch(out, Plan(n=n, size=size), Manners(rate=1000, timeout=5, deadline=20, backoff=0.2), Archives.at(url)) as job: survey = job.run()
    seconds = time.monotonic() - begin
    survey.verify()
    print(job.summary())
    told = pd.read_json(log, lines=True, dtype=dict(key="str"))
    faults = told.loc[told["fault"] != "", "fault"].value_counts()
    print(f"whole run: {seconds:.0f} s for {len(survey):,} galaxies, {len(told):,} requests reached the archive, {faults.sum():,} met a fault; survey verified")
    print(faults.to_string())
    return len(told)


def again(url, out, n, size, log, before):
    "The same command once more: how many requests it makes."
    with Fetch(out, Plan(n=n, size=size), Manners(rate=1000), Archives.at(url), progress=False) as job: job.run()
    print(f"second run of the same command: {len(pd.read_json(log, lines=True)) - before} requests")


def ratio(url, out, n_files, size):
    "Seconds for the same cutouts, one at a time and with six workers."
    catalog = pd.read_parquet(out / "catalog.parquet").head(-(-n_files // 5))
    with tempfile.TemporaryDirectory() as folder, Store(folder) as store:
        ask = list_requests(catalog, archives=Archives.at(url))
        store.fetch(ask, progress=False)
        files, _ = choose_files(catalog, [read_file_list(store.read(r.key)) for r in ask])
        todo = list(cutout_requests(catalog, files, size, Archives.at(url)))[:n_files]
        begin = time.monotonic()
        for r in todo: urllib.request.urlopen(f"{r.url}?{urllib.parse.urlencode(r.params)}").read()
        serial, begin = time.monotonic() - begin, time.monotonic()
        counts = store.fetch(todo, Manners(rate=1000), progress=False)
        ours = time.monotonic() - begin
        assert counts.fetched == len(todo)
    print(f"{len(todo)} cutouts: one at a time {serial:.1f} s, six workers with checks and ledger {ours:.1f} s, ratio {serial / ours:.2f}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=2000, help="galaxies")
    p.add_argument("--size", type=int, default=224, help="pixels")
    p.add_argument("--faults", type=float, default=0.1, help="share of requests that meet a fault")
    p.add_argument("--latency", type=float, default=0.2, help="s that the archive thinks about an answer")
    p.add_argument("--serial", type=int, default=150, help="cutouts in the comparison")
    p.add_argument("--out", default=None, help="folder (default: a temporary one)")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(a.out or temporary)
        out.mkdir(parents=True, exist_ok=True)
        survey = out / "sky"
        if not survey.exists(): simulate_survey(survey, a.n, seed=3, size=a.size)
        log = out / "log.jsonl"
        with archive(survey, a.faults, a.latency, log) as url:
            n_requests = whole_run(url, out / "fetched", a.n, a.size, log)
            again(url, out / "fetched", a.n, a.size, log, n_requests)
        with archive(survey, 0, a.latency, out / "log2.jsonl") as url: ratio(url, out / "fetched", a.serial, a.size)


if __name__ == "__main__": main()
