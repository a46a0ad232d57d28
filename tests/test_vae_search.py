"The search for a VAE: kills, damage, foreign folders, pruning, proposals, the front. Toy spectra, small networks."
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from spectranb import vae_search
from spectranb.core import REST_LOGLAM, REST_WAVELENGTH, BadInput
from spectranb.vae import InfoVAE, SpectrumVAE, TrainingSet
from spectranb.vae_search import (SearchSpace, best_trial, fit_best, measure_vae, noise_floor, pareto_front, plot_search, read_trials,
                                  search_score, search_vae)

pytest.importorskip("optuna")
SPACE = SearchSpace(hidden=(8, 48), n_latent=(2, 6))
QUICK = dict(epochs=3, space=SPACE, seed=5, batch_size=64, valid=0.2, progress=False)
SAME = lambda a, b: a.drop(columns="seconds").equals(b.drop(columns="seconds"))


def toys(n, seed=0, snr=20):
    "Continuum of bent slope, a break, lines of independent strength, gaps; (n, 1000) flux, ivar."
    rng = np.random.default_rng(seed)
    age, x = rng.uniform(0, 1, (n, 1)), np.log(REST_WAVELENGTH / 5500)
    flux = np.exp((2 * age - 1) * x - age ** 2 * x ** 2) * np.where(REST_WAVELENGTH < 3995, 1 - 0.5 * age, 1)
    for lam in (3728.5, 4862.7, 6564.6): flux = flux + rng.lognormal(-1, 0.5, (n, 1)) * np.exp(-0.5 * ((REST_LOGLAM - np.log10(lam)) / 5e-4) ** 2)
    seen = REST_WAVELENGTH * (1 + rng.uniform(0.01, 0.2, (n, 1))) > 3820
    return np.where(seen, flux + rng.normal(0, 1 / snr, flux.shape), 0).astype(np.float32), (seen * float(snr ** 2)).astype(np.float32)


@pytest.fixture(scope="module")
def data(): return TrainingSet.make(*toys(300), progress=False)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "A search that nothing interrupted: its folder and its trials."
    out = tmp_path_factory.mktemp("whole") / "search"
    return out, search_vae(data, out, n_trials=14, **QUICK)


@pytest.fixture
def copy(whole, tmp_path):
    "A folder with the first eight of its trials."
    out = tmp_path / "copy"; out.mkdir()
    (out / "search.json").write_bytes((whole[0] / "search.json").read_bytes())
    (out / "trials.jsonl").write_bytes(b"".join((whole[0] / "trials.jsonl").read_bytes().splitlines(True)[:8]))
    return out


# killed, interrupted, resumed ------------------------------------------------------------------------------------------

CHILD = """
import sys; sys.path.insert(0, {tests!r})
from test_vae_search import QUICK, TrainingSet, search_vae, toys
search_vae(TrainingSet.make(*toys(300), progress=False), {out!r}, n_trials=14, **QUICK)
"""


def test_a_killed_search_goes_on_as_if_nothing_had_been(whole, data, tmp_path):
    out = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", CHILD.format(tests=os.path.dirname(__file__), out=str(out))], env=os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads())))
    ledger, deadline = out / "trials.jsonl", time.time() + 120
    while not (ledger.exists() and ledger.read_bytes().count(b"\n") >= 4):
        assert child.poll() is None and time.time() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL); child.wait()
    n = len(read_trials(out))
    assert 4 <= n < 14
    before = ledger.read_bytes()
    resumed = search_vae(data, out, n_trials=14, **QUICK)
    assert ledger.read_bytes().startswith(before[:before.rfind(b"\n") + 1])      # what was done is not done again
    assert resumed.number.tolist() == list(range(14))
    settings = ["number", "lam", "hidden", "n_latent", "lr"]         # another process may round the last digits otherwise, so only the proposals that no result has part in
    assert resumed[settings][:10].equals(whole[1][settings][:10])


def test_ctrl_c_inside_a_trial(copy, data, whole, monkeypatch):
    def stop(*args, **kw): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(vae_search, "train_vae", stop)
        with pytest.raises(KeyboardInterrupt): search_vae(data, copy, n_trials=14, **QUICK)
    assert len(read_trials(copy)) == 8
    assert SAME(search_vae(data, copy, n_trials=14, **QUICK), whole[1])


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_half_a_line_is_done_again(copy, data, whole, cut):
    raw = (copy / "trials.jsonl").read_bytes()
    (copy / "trials.jsonl").write_bytes(raw[:-cut])
    assert len(read_trials(copy)) == 7
    assert SAME(search_vae(data, copy, n_trials=9, **QUICK), whole[1].head(9).assign(front=pareto_front(whole[1].head(9))))


def test_same_seed_same_proposals_another_seed_others(whole, data, tmp_path):
    names = ["lam", "hidden", "n_latent", "lr"]
    assert SAME(search_vae(data, tmp_path / "again", n_trials=2, **QUICK), whole[1].head(2).assign(front=pareto_front(whole[1].head(2))))
    other = search_vae(data, tmp_path / "other", n_trials=2, **QUICK | dict(seed=6))
    assert not (other[names] == whole[1][names].head(2)).all(axis=1).any()


def test_random_proposals_do_not_depend_on_results(data, tmp_path):
    names, kw = ["lam", "hidden", "n_latent", "lr"], QUICK | dict(sampler="random", epochs=1)
    a, b = search_vae(data, tmp_path / "a", n_trials=12, **kw), search_vae(data, tmp_path / "b", n_trials=12, **kw | dict(batch_size=100))
    assert a[names].equals(b[names]) and not a.reconstruction.equals(b.reconstruction) and a.lam.is_unique


def test_more_trials_later_and_fewer_asked_for(copy, data, whole):
    assert len(search_vae(data, copy, n_trials=3, **QUICK)) == 8
    assert SAME(search_vae(data, copy, n_trials=14, **QUICK), whole[1])
    assert SAME(pd.read_csv(copy / "trials.csv", keep_default_na=False, dtype=dict(reason=str)).astype(whole[1].dtypes.to_dict()), whole[1])


# what a search finds ---------------------------------------------------------------------------------------------------

def test_pruned_trials_end_early_and_proposals_lie_in_the_space(whole):
    t = whole[1]
    pruned = t.state == "pruned"
    assert pruned.any() and (t.epochs[pruned] < 3).all() and (t.epochs[t.state == "complete"] == 3).all() and not pruned[:5].any()
    assert t.lam.between(1, 1e5).all() and t.lr.between(1e-3, 1e-2).all() and t.n_latent.between(2, 6).all()
    first, second = t.hidden.str.split("-", expand=True).astype(int).to_numpy().T
    assert (first <= 48).all() and (second >= 8).all() and (second <= first).all() and t.lam.max() / t.lam.min() > 30


def test_the_pruner_is_the_median_rule(whole):
    lines = [json.loads(line) for line in (whole[0] / "trials.jsonl").read_text().splitlines()]
    for r in lines[5:]:
        done = [q["scores"] for q in lines[:r["number"]] if q["state"] == "complete"]
        if len(done) < 5: continue
        worse = [min(r["scores"][:e + 1]) > np.median([d[e] for d in done]) for e in range(1, r["epochs"])]    # from epoch 1 on
        assert worse[:-1] == [False] * (len(worse) - 1) and (worse[-1:] == [True]) == (r["state"] == "pruned") or r["epochs"] == 3


@pytest.mark.parametrize("seed", range(5))
def test_front_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    t = pd.DataFrame(dict(state=rng.choice(["complete", "complete", "pruned", "failed"], 60), reconstruction=rng.integers(0, 12, 60) / 2.0, mmd=rng.integers(-1, 9, 60) / 9))
    t.loc[t.state == "failed", ["reconstruction", "mmd"]] = np.nan
    t.index = t.index[::-1] * 3                                      # any index will do
    done = [(i, r.reconstruction, r.mmd) for i, r in enumerate(t.itertuples()) if r.state == "complete"]
    brute = {i for i, a, b in done if not any(c <= a and d <= b and (c < a or d < b) for _, c, d in done)}
    assert set(np.flatnonzero(pareto_front(t))) == brute


def test_measures_by_hand(data):
    net = InfoVAE(1000, (16,), 3, linear=False)
    x, w = data.x[:50], data.weight[:50]
    seen = measure_vae(net, x, w, lam=7.0)
    with torch.no_grad(): mu, logvar = net.encode(x); missed = x - net.decode(mu)
    assert np.isclose(seen["reconstruction"], 0.5 * float((w * missed ** 2).sum()) / 50, rtol=1e-5)
    assert np.isclose(seen["kl"], float(0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum()) / 50, rtol=1e-5)
    n_good = (w > 0).sum(1).float().mean()
    assert np.isclose(noise_floor(w), float(n_good) / 2 * (1 / 400) / (1 / 400 + 5e-4), rtol=0.15)       # S/N near 20 in all bins
    assert np.isclose(search_score(seen["chi2"], seen["mmd"]), np.log(seen["reconstruction"] / noise_floor(w)) + 5 * seen["mmd"])
    assert seen == measure_vae(net, x, w, lam=7.0) and seen["mmd"] != measure_vae(net, x, w, lam=7.0, seed=1)["mmd"]


def test_no_spectrum_stands_on_both_sides(data):
    train, x, weight = vae_search._held_back(data, 250, 0.2, seed=3)
    rows = torch.cat([train.x, x])
    assert len(train) == 200 and len(x) == len(weight) == 50 and len(torch.unique(rows, dim=0)) == 250
    assert not torch.equal(x, vae_search._held_back(data, 250, 0.2, seed=4)[1])


def test_failures_are_noted_and_the_search_goes_on(data, tmp_path):
    wild = SearchSpace(hidden=(8, 16), n_latent=(2, 4), lr=(1e-3, 1e2))
    t = search_vae(data, tmp_path / "wild", n_trials=6, **QUICK | dict(space=wild))
    failed = t[t.state == "failed"]
    assert len(failed) and len(failed) < 6 and failed.reason.str.contains("no longer finite").all() and not failed.front.any()
    assert SAME(search_vae(data, tmp_path / "wild", n_trials=6, **QUICK | dict(space=wild)), t)
    all_wrong = search_vae(data, tmp_path / "wrong", n_trials=2, **QUICK | dict(space=SearchSpace(hidden=(8, 16), n_latent=(2, 4), lr=(1e9, 1e9))))
    with pytest.raises(BadInput, match="first failed because.*no longer finite"): best_trial(all_wrong)


def test_choice_figure_and_full_training(whole, data):
    out, t = whole
    done = t[t.state == "complete"]
    limit = float(done.mmd.median())
    choice = best_trial(t, limit)
    assert choice.mmd <= limit and choice.reconstruction == done.reconstruction[done.mmd <= limit].min() and best_trial(t).score == done.score.min()
    with pytest.raises(BadInput, match="the lowest is"): best_trial(t, -1.0)
    vae = fit_best(out, data, max_mmd=limit, epochs=1, progress=False)
    assert isinstance(vae, SpectrumVAE) and vae.n_out == min(6, choice.n_latent) and vae.info["search"]["trial"] == choice.number
    assert "-".join(map(str, vae.net.config["hidden"])) == choice.hidden and vae.info["lam"] == choice.lam and vae.info["training"]["lr"] == choice.lr
    import matplotlib.pyplot as plt
    for some in (t, t[t.state != "pruned"], done.head(1)): assert plot_search(some).get_xlabel()
    plt.close("all")


def test_arrays_in_place_of_a_training_set(data, whole, tmp_path):
    assert SAME(search_vae(toys(300), tmp_path / "arrays", n_trials=1, **QUICK).drop(columns="front"), whole[1].head(1).drop(columns="front"))


# what is refused -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, word", [(dict(seed=9), "seed 5, not 9"), (dict(epochs=4), "epochs 3, not 4"), (dict(space=SearchSpace()), "space"),
                                          (dict(sampler="random"), "sampler"), (dict(mmd_cost=1.0), "mmd_cost"), (dict(linear=False), "linear"), (dict(n_train=200), "n_train None")])
def test_another_search_is_refused_by_name(copy, data, change, word):
    before = (copy / "trials.jsonl").read_bytes()
    with pytest.raises(BadInput, match=f"copy: holds another search .*{word}"): search_vae(data, copy, n_trials=9, **QUICK | change)
    assert (copy / "trials.jsonl").read_bytes() == before


def test_other_spectra_are_refused(copy):
    for flux, ivar in (toys(300, seed=1), toys(299)):
        with pytest.raises(BadInput, match="other spectra"): search_vae((flux, ivar), copy, n_trials=9, **QUICK)


def test_one_process_at_a_time(copy, data):
    with FileLock(copy / ".lock"):
        with pytest.raises(BadInput, match="in use"): search_vae(data, copy, n_trials=9, **QUICK)
    assert len(read_trials(copy)) == 8


def damaged(raw, how):
    lines = raw.splitlines(True)
    if how == "digit": lines[2] = lines[2].replace(b'"lam": ', b'"lam": 1', 1)
    if how == "garbage": lines[2] = b"\x00\xff" * 40 + b"\n"
    if how == "lost": del lines[2]
    if how == "twice": lines.insert(2, lines[1])
    if how == "joined": lines[2] = lines[2][:-1]
    if how == "list": lines[2] = b"[1, 2]\n"
    return b"".join(lines)


@pytest.mark.parametrize("how", ["digit", "garbage", "lost", "twice", "joined", "list"])
def test_a_damaged_line_is_named(copy, data, how):
    path = copy / "trials.jsonl"
    path.write_bytes(bad := damaged(path.read_bytes(), how))
    for use in (lambda: read_trials(copy), lambda: search_vae(data, copy, n_trials=9, **QUICK)):
        with pytest.raises(BadInput, match="trials.jsonl, line 3: is damaged.*Delete it"): use()
    assert path.read_bytes() == bad


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}', "\x00"])
def test_a_damaged_description_is_named(copy, data, text):
    (copy / "search.json").write_text(text)
    with pytest.raises(BadInput, match="search.json"): read_trials(copy)
    with pytest.raises(BadInput, match="search.json"): search_vae(data, copy, n_trials=9, **QUICK)


def test_no_search_there(tmp_path, data):
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "thesis.tex").write_text("x"); (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="holds files, but no search"): search_vae(data, tmp_path / "mine", **QUICK)
    with pytest.raises(BadInput, match="search.json is missing"): read_trials(tmp_path / "nothing")
    with pytest.raises(BadInput, match="file"): search_vae(data, tmp_path / "file", **QUICK)


@pytest.mark.parametrize("kw", [dict(lam=(10, 1)), dict(lam=(0, 1)), dict(hidden=(10.5, 20)), dict(n_latent=(0, 3)), dict(lr=(1e-3, np.nan)), dict(lr=(1e-3, np.inf)), dict(hidden=(5,)), dict(lam=("1", "2"))])
def test_spaces_that_make_no_sense(kw):
    with pytest.raises(BadInput, match=f"SearchSpace.{next(iter(kw))}"): SearchSpace(**kw)


@pytest.mark.parametrize("kw, word", [(dict(sampler="grid"), "sampler"), (dict(seed=-1), "seed"), (dict(epochs=0), "epochs"), (dict(n_train=50), "too few"), (dict(valid=0.01), "too few"), (dict(space=SearchSpace(n_latent=(2, 40))), "10 components")])
def test_calls_that_make_no_sense(data, tmp_path, kw, word):
    with pytest.raises(BadInput, match=word): search_vae(data, tmp_path / "s", n_trials=1, **QUICK | kw)


def test_without_optuna(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(BadInput, match=r"pip install 'spectranb\[search\]'"): search_vae(data, tmp_path / "s", n_trials=1, **QUICK)
