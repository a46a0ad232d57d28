"""Experiments: configurations, runs that are killed and continued, checkpoints of others, full disks, splits that leak."""
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback

import spectranb.experiment as ex
from spectranb.core import BadInput
from spectranb.data.mock import simulate_survey
from spectranb.data.survey import Survey
from spectranb.experiment import (ExperimentConfig, Run, as_config, check_split, leaking_rows, read_config, run_experiment, run_train_config,
                                  toml_value, write_config)

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    "A survey of 48 galaxies, and targets that are nothing but numbers."
    folder = tmp_path_factory.mktemp("data")
    simulate_survey(folder / "survey", 48, seed=8, size=48, n_workers=1, progress=False)
    np.save(folder / "latents.npy", np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32))
    return folder


def config(data, arch="simple_cnn", kwargs=None, epochs=3, **more):
    d = dict(survey=str(data / "survey"), latents=str(data / "latents.npy"), split="random", crop=32, batch_size=8, rotate=10.0, band_dropout=0.1) | more
    return as_config(dict(data=d, network=dict(arch=arch, kwargs=kwargs or {}), schedule=dict(epochs=epochs, lr=3e-3, precision="float32"), seeds=[0]))


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    return run_experiment(config(data), tmp_path_factory.mktemp("runs") / "straight", progress=False)


def numbers(run): return run.metrics.drop(columns=["seconds", "peak_gb"])


class Halt(Callback):
    "An error in the middle of an epoch."
    def __init__(self, epoch): self.at = epoch
    def before_batch(self):
        if self.training and self.epoch == self.at and self.iter == 2: raise BadInput("test", "halt")


def halted(conf, folder, epoch=1):
    with pytest.raises(BadInput, match="halt"): run_experiment(conf, folder, progress=False, cbs=[Halt(epoch)])
    return folder


# Configurations

def test_a_configuration_is_read_back_as_it_was_written(tmp_path, data):
    conf = config(data, "xresnet18_hybrid", dict(stem_szs=[8, 8, 16], widen=0.25, deconv=dict(sampling_stride=1)), n_train=20)
    conf = replace(conf, out='a "strange" näme\\with\ttab\x7f', seeds=(3, 1))
    write_config(tmp_path / "c.toml", conf)
    assert read_config(tmp_path / "c.toml") == conf


@pytest.mark.parametrize("value", [True, 0, -5, 1e-5, 2.5e30, "", 'quote " and \\ and \n and \x01 \x7f é 星', [1, 2], [], {"a b": {"c": [True, "x"]}}])
def test_values_are_toml(value):
    import tomllib
    back = tomllib.loads(f"x = {toml_value(value)}")["x"]
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("section, key, value, said", [
    ("data", "batchsize", 8, "batch_size"), ("dta", "crop", 8, r"\[data\]"), ("data", "crop", "64", "whole number"), ("data", "crop", 64.0, "whole number"),
    ("data", "crop", True, "whole number"), ("data", "augment", 1, "true or false"), ("data", "bin", 0, "between 1"), ("data", "bin", 3, "multiple"),
    ("data", "split", "sky", "healpix, random"), ("data", "train_fraction", 1, "between"), ("data", "band_dropout", float("nan"), "between"),
    ("data", "n_train", 0, "between 1"), ("network", "arch", "resnet", "xresnet18_hybrid"), ("network", "kwargs", [1], "table"),
    ("schedule", "epochs", 2.5, "whole number"), ("schedule", "lr", "fast", "a number"), ("schedule", "lr", 0.0, "between"), ("schedule", "loss", "l1", "mse, rmse"),
    ("schedule", "precision", "float16", "bfloat16")])
def test_a_bad_setting_is_named_with_what_is_allowed(data, section, key, value, said):
    tree = asdict(config(data))
    tree.setdefault(section, {})[key] = value
    with pytest.raises(BadInput, match=said) as e: as_config(tree)
    assert (section if section == "dta" else f"{section}.{key}") in str(e.value) or said == "multiple"


@pytest.mark.parametrize("seeds", [[], "0", [0, 0], [-1], [1.0], [True]])
def test_seeds(data, seeds):
    with pytest.raises(BadInput, match="seeds"): as_config(asdict(config(data)) | dict(seeds=seeds))


def test_files_that_are_no_configuration(tmp_path):
    (tmp_path / "c.toml").write_text("epochs: 10")
    for path, said in [(tmp_path / "c.toml", "not TOML"), (tmp_path / "missing.toml", "cannot be read"), (tmp_path, "cannot be read")]:
        with pytest.raises(BadInput, match=said): read_config(path)
    (tmp_path / "c.toml").write_text('seeds = [1]\n[schedule]\nepochs = 1')
    with pytest.raises(BadInput, match="survey"): read_config(tmp_path / "c.toml")


# Killed and continued

KILL = """
import os, signal, sys, torch
import spectranb.experiment as ex
from fastai.callback.core import Callback
torch.set_num_threads(1)
def die(*a): os.kill(os.getpid(), signal.SIGKILL)
class Kill(Callback):
    def before_batch(self):
        if self.training and self.epoch == 2 and self.iter == 2: die()
real, calls = os.fsync, []
def fsync(f):                                           # while the third checkpoint is on its way to the disk
    calls.append(f)
    return die() if len(calls) == 3 else real(f)
if sys.argv[3] == "writing": os.fsync = fsync
ex.run_experiment(sys.argv[1], sys.argv[2], progress=False, cbs=[Kill()] if sys.argv[3] == "batch" else [])
"""


@pytest.fixture(scope="session")
def rich(data, tmp_path_factory):
    "A network with dropout, batch norm, network deconvolution and spectral norm; its configuration, and a run that nothing disturbed."
    conf = config(data, "xresnet18_hybrid", dict(stem_szs=[4, 4, 8], widen=0.125, groups=1, p=0.3), epochs=4)
    folder = tmp_path_factory.mktemp("rich")
    write_config(folder / "rich.toml", conf)
    return folder / "rich.toml", run_experiment(conf, folder / "straight", progress=False)


@pytest.mark.parametrize("when", ["batch", "writing"])
def test_killed_and_started_again_gives_the_same_bits(rich, tmp_path, when):
    path, straight = rich
    folder = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILL, str(path), str(folder), when], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = Run.load(folder)
    assert len(left.metrics) == 2 and not left.finished and not (folder / "network").exists()
    assert bool(list(folder.glob(".checkpoint*.tmp*"))) == (when == "writing")
    torch.manual_seed(77)                               # whatever state the new process is in
    run = run_experiment(path, folder, progress=False)
    assert numbers(run).equals(numbers(straight)) and run.info["sessions"] == 2
    assert all(torch.equal(a, b) for a, b in zip(run.network().net.state_dict().values(), straight.network().net.state_dict().values()))
    assert not list(folder.glob(".*.tmp*"))


def test_the_schedule_goes_on_exactly(data, tmp_path):
    class Rates(Callback):
        def __init__(self): self.seen = []
        def before_step(self): self.seen.append((self.opt.hypers[-1]["lr"], self.opt.hypers[-1]["mom"]))
    conf, n = config(data, epochs=4), 38 // 8
    folder, rates = halted(conf, tmp_path / "run", 2), Rates()
    run_experiment(conf, folder, progress=False, cbs=[rates])
    assert len(rates.seen) == 2 * n
    cos = lambda a, b, t: b + (a - b) * (1 + math.cos(math.pi * t)) / 2
    for i, (lr, mom) in enumerate(rates.seen):          # Smith & Topin's cycle: a quarter up, then down
        t = (2 * n + i) / (4 * n)
        assert lr == pytest.approx(cos(3e-3, 3e-8, (t - 0.25) / 0.75), rel=1e-6) and mom == pytest.approx(cos(0.85, 0.95, (t - 0.25) / 0.75), rel=1e-6)


def test_the_caller_keeps_its_random_state(data, tmp_path):
    torch.manual_seed(1); np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run_experiment(config(data, epochs=1), tmp_path / "run", progress=False)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_a_finished_run_is_returned_without_training(data, straight):
    files = {p: p.stat().st_mtime_ns for p in straight.folder.iterdir() if p.name != ".lock"}
    again = run_experiment(config(data), straight.folder, progress=False, cbs=[Halt(0)])
    assert again.metrics.equals(straight.metrics) and files == {p: p.stat().st_mtime_ns for p in straight.folder.iterdir() if p.name != ".lock"}


def test_killed_between_the_last_epoch_and_the_bundle(data, straight, tmp_path):
    folder = shutil.copytree(straight.folder, tmp_path / "run")
    shutil.rmtree(folder / "network"); (folder / "metrics.csv").unlink()
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | dict(finished=False)))
    run = run_experiment(config(data), folder, progress=False, cbs=[Halt(0)])
    assert run.finished and numbers(run).equals(numbers(straight)) and run.network().predict(np.ones((1, 5, 48, 48))).shape == (1, 3)


# Whose folder, whose checkpoint

def other_survey(data, tmp_path):
    folder = shutil.copytree(data / "survey", tmp_path / "other")
    info = json.loads((folder / "survey.json").read_text())
    info["files"]["cutouts.npy"]["sha256"] = "0" * 64
    (folder / "survey.json").write_text(json.dumps(info))
    return str(folder)


def test_what_differs_is_named(data, straight, tmp_path):
    conf = config(data)
    np.save(tmp_path / "other.npy", np.ones((48, 3)))
    for new, seed, said in [(replace(conf, schedule=replace(conf.schedule, epochs=9, wd=0.1)), 0, "schedule.epochs = 3, not 9; schedule.wd = 0.01, not 0.1"),
                            (config(data, "simple_deconv"), 0, "network.arch = simple_cnn, not simple_deconv"), (conf, 4, "seed = 0, not 4"),
                            (config(data, survey=other_survey(data, tmp_path)), 0, r"another survey \(cutouts.npy\)"),
                            (config(data, latents=str(tmp_path / "other.npy")), 0, "other latents")]:
        with pytest.raises(BadInput, match=said): run_experiment(new, straight.folder, seed, progress=False)


def test_a_survey_may_be_moved(data, straight, tmp_path):
    moved = shutil.copytree(data / "survey", tmp_path / "moved")
    assert run_experiment(config(data, survey=str(moved)), straight.folder, progress=False).finished


def test_checkpoints_of_others(data, straight, tmp_path):
    for conf, said in [(config(data, "simple_deconv"), "network.arch = simple_cnn, not simple_deconv"), (config(data, survey=other_survey(data, tmp_path)), "another survey")]:
        folder = halted(conf, tmp_path / said[:7], 0)
        shutil.copy(straight.folder / "checkpoint.pt", folder)
        with pytest.raises(BadInput, match=said): run_experiment(conf, folder, progress=False)
    conf = config(data)
    folder = halted(conf, tmp_path / "shape", 1)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    name = next(iter(state["model"]))
    state["model"][name] = state["model"][name][:1]
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(BadInput, match=f"{name} has shape"): run_experiment(conf, folder, progress=False)
    (folder / "checkpoint.pt").write_bytes(b"PK nothing")
    with pytest.raises(BadInput, match="damaged"): run_experiment(conf, folder, progress=False)


def test_a_checkpoint_that_would_run_code_is_refused(data, tmp_path):
    conf = config(data)
    folder = halted(conf, tmp_path / "run", 1)

    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path / 'ran'}",)
    torch.save(dict(model=Evil()), folder / "checkpoint.pt")
    with pytest.raises(BadInput, match="damaged"): run_experiment(conf, folder, progress=False)
    assert not (tmp_path / "ran").exists()


def test_folders_that_are_no_run(data, tmp_path):
    (tmp_path / "full").mkdir(); (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"): run_experiment(config(data), tmp_path / "full", progress=False)
    with pytest.raises(BadInput, match="no run"): Run.load(tmp_path)


def test_two_commands_in_one_folder(data, tmp_path):
    from filelock import FileLock
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        with pytest.raises(BadInput, match="another command"): run_experiment(config(data), tmp_path / "run", progress=False)


# The disk

def test_a_full_disk_leaves_the_last_checkpoint_usable(data, straight, tmp_path, monkeypatch):
    real, written = ex.atomic_write, []

    @contextlib.contextmanager
    def full(path):
        written.append(Path(path).name)
        if written.count("checkpoint.pt") == 2: yield Path("/dev/full")         # the kernel's own "No space left on device"
        else:
            with real(path) as tmp: yield tmp
    monkeypatch.setattr(ex, "atomic_write", full)
    with pytest.raises(BadInput, match="epoch 2 could not be written .No space left") as e: run_experiment(config(data), tmp_path / "run", progress=False)
    assert "same command" in e.value.remedy and len(Run.load(tmp_path / "run").metrics) == 1
    monkeypatch.undo()
    assert numbers(run_experiment(config(data), tmp_path / "run", progress=False)).equals(numbers(straight))


# Early failures

@pytest.mark.parametrize("spoil, said", [(lambda t: t[:40], "shape"), (lambda t: np.where(np.arange(48)[:, None] == 5, np.nan, t), "NaN"),
                                         (lambda t: t * [1, 0, 1], r"column \[1\] is constant"), (lambda t: t * 1e30, "loss became inf in epoch 1, batch 1")])
def test_targets_that_teach_nothing(data, tmp_path, spoil, said):
    np.save(tmp_path / "t.npy", spoil(np.load(data / "latents.npy")).astype(np.float32))
    with pytest.raises(BadInput, match=said): run_experiment(config(data, latents=str(tmp_path / "t.npy")), tmp_path / "run", progress=False)


def test_settings_that_do_not_fit_the_survey(data, tmp_path):
    for more, said in [(dict(batch_size=64), "less than a batch"), (dict(n_train=40), "data.n_train: is 40, there are 39"), (dict(latents="nowhere"), "nowhere"),
                       (dict(crop=64), "smaller than the crop"), (dict(survey="nowhere"), "nowhere")]:
        with pytest.raises(BadInput, match=said): run_experiment(config(data, **more), tmp_path / str(len(said)), progress=False)
    with pytest.raises(BadInput, match="cannot be built"): run_experiment(config(data, kwargs=dict(colour=1)), tmp_path / "net", progress=False)


def test_outputs_that_stand_still(data, tmp_path):
    class Still(Callback):
        def before_validate(self):
            last = [m for m in self.learn.model.modules() if isinstance(m, torch.nn.Linear)][-1]
            with torch.no_grad(): last.weight[1] = 0
    with pytest.warns(UserWarning, match="output 2 is the same"): run_experiment(config(data, epochs=1), tmp_path / "run", progress=False, cbs=[Still()])


def sky(survey, **columns):
    "The survey with other entries in its catalogue."
    other = Survey.open(survey.path)
    other.__dict__["catalog"] = survey.catalog.assign(**columns)
    return other


def test_leaking_splits(data):
    survey = Survey.open(data / "survey")
    n, train, valid = len(survey), np.arange(40), np.arange(40, 48)
    apart = dict(ra=np.linspace(10, 200, n), dec=np.zeros(n))
    assert len(leaking_rows(sky(survey, **apart), train, valid, "healpix")[0]) == 0
    ra = apart["ra"].copy(); ra[45] = ra[7] + 0.9 / 3600                         # the same galaxy, seen again
    twice = sky(survey, ra=ra, dec=apart["dec"])
    assert leaking_rows(twice, train, valid, "random")[0].tolist() == [7]
    ra[45] = ra[7] + 1.1 / 3600
    assert len(leaking_rows(sky(survey, ra=ra, dec=apart["dec"]), train, valid, "random")[0]) == 0
    with pytest.raises(BadInput, match="leaks"): check_split(twice, train, valid, "random")
    kept, notes = check_split(twice, train, valid, "random", "drop")
    assert 7 not in kept and len(kept) == 39 and "left out" in notes[0]
    ids = survey.catalog["object_id"].copy(); ids[45] = ids[3]
    assert leaking_rows(sky(survey, object_id=ids, **apart), train, valid, "random")[0].tolist() == [3]
    assert leaking_rows(survey, train, [3, 45], "random")[0].tolist() == [3]
    ra[45] = ra[7] + 0.1                                                        # six minutes of arc away: the same cell of 3.7 degrees, another galaxy
    rows, what = leaking_rows(sky(survey, ra=ra, dec=apart["dec"]), train, valid, "healpix")
    assert 7 in rows and "HEALPix" in what
    from astropy_healpix import HEALPix
    from astropy import units as u
    cell = HEALPix(16, "nested").lonlat_to_healpix(ra * u.deg, apart["dec"] * u.deg)
    assert rows.tolist() == [i for i in train if cell[i] in cell[valid] and i != 45]
    ra[45] = ra[7] + 30 / 3600                                                  # neighbours across a border stay together on purpose
    assert len(leaking_rows(sky(survey, ra=ra, dec=apart["dec"]), np.append(train, 45), np.arange(40, 45), "healpix")[0]) == 0


def test_a_class_that_is_left_out(data, tmp_path):
    survey = Survey.open(data / "survey")
    classes = np.where(np.arange(48) < 2, "odd", "common")
    notes = check_split(sky(survey, spec_class=classes), np.arange(2, 40), np.r_[0, 1, 40:48], "random")[1]
    assert notes == ["spec_class odd is missing on the training side"]
    notes = check_split(sky(survey, spec_class=classes), np.arange(40), np.arange(40, 48), "random")[1]
    assert notes == ["spec_class odd is missing on the validation side"]


def test_larger_training_sets_contain_the_smaller(data):
    survey, usable = Survey.open(data / "survey"), np.ones(48, bool)
    sets = [set(ex.choose_galaxies(config(data, n_train=n).data, survey, usable)[0]) for n in (5, 20, None)]
    assert [len(s) for s in sets] == [5, 20, 39] and sets[0] < sets[1] < sets[2]


# What is kept

def test_the_folder(data, straight):
    info, state = straight.info, torch.load(straight.folder / "checkpoint.pt", weights_only=True)
    assert read_config(straight.folder / "config.toml") == config(data)
    assert {"command", "spectranb", "python", "torch", "fastai", "numpy", "commit", "device", "threads", "seconds", "peak_gb", "seed"} <= set(info)
    assert info["n_train"] == 39 and info["n_valid"] == 9 and info["parameters"] == sum(p.numel() for p in straight.network().net.parameters())
    assert {"model", "optimiser", "schedule", "random", "sampler"} <= set(state) and state["optimiser"]["slow_weights"] and state["sampler"][0]["epoch"] == 3
    last, survey = straight.metrics.iloc[-1], Survey.open(data / "survey")
    _, valid = survey.split("random")
    error = straight.network().predict(survey.cutouts[np.sort(valid)]) - np.load(data / "latents.npy")[np.sort(valid)]
    assert last["mse"] == pytest.approx(np.square(error).mean(), rel=1e-4)
    assert [last[f"rmse_{k}"] for k in (1, 2, 3)] == pytest.approx(np.sqrt(np.square(error).mean(0)), rel=1e-4)
    assert straight.final["mse"] == last["mse"] and straight.final["seed"] == 0


def test_tensorboard(data, straight, tmp_path, monkeypatch):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = halted(config(data), tmp_path / "run", 2)
    run_experiment(config(data), folder, progress=False)
    events = loader.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("mse")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("mse")] == pytest.approx(straight.metrics["mse"], rel=1e-6)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = run_experiment(config(data, epochs=1), tmp_path / "without", progress=False)
    assert not (run.folder / "tensorboard").exists() and any("tensorboard" in note for note in run.info["notes"])


def test_all_seeds_of_a_file(data, tmp_path):
    conf = replace(config(data, epochs=1), seeds=(5, 2), out=str(tmp_path / "runs"))
    write_config(tmp_path / "c.toml", conf)
    said = []
    runs = run_train_config(tmp_path / "c.toml", progress=False, log=said.append)
    table = pd.read_csv(tmp_path / "runs" / "summary.csv")
    assert table.seed.tolist() == [5, 2] and table.mse.tolist() == pytest.approx([r.final["mse"] for r in runs]) and runs[0].final["mse"] != runs[1].final["mse"]
    assert f"{table.mse.mean():.3f} ± {table.mse.std():.3f}" in said[-1]


def test_targets_from_the_survey_itself(data, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = run_experiment(config(data, epochs=1, latents=None), tmp_path / "run", progress=False)
    assert run.network().predict(np.ones((1, 5, 48, 48))).shape == (1, 6) and run.info["identity"]["targets"] == "shipped VAE"
