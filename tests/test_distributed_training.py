"""Two processes on a CPU give the losses of one: network deconvolution, frozen batch norm, the RMSE objective, a run that is taken over."""
import json
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from spectranb.core import BadInput
from spectranb.data.mock import simulate_survey
from spectranb.experiment import Run, as_config, claimed, run_experiment
from spectranb.loading import InputTransform
from spectranb.training import make_batches

pytest.importorskip("accelerate")
torch.set_num_threads(1)
SMALL = dict(stem_szs=[4, 4, 8], widen=0.125, groups=1)
NETWORKS = dict(deconv=(dict(arch="xresnet18_deconv", kwargs=SMALL | dict(deconv=dict(sampling_stride=1))), "mse", 1e-3),
                hybrid=(dict(arch="xresnet18_hybrid", kwargs=SMALL, frozen_norm=True), "rmse", 1e-2))
SCRIPT = """
import gc, json, sys, warnings, torch
warnings.simplefilter("ignore"); torch.set_num_threads(1)
from spectranb.experiment import run_experiment
for config, folder in json.load(open(sys.argv[1])): run_experiment(config, folder, progress=False)
gc.collect()                                            # a network that still held the group might hang the end of the process
assert not any(isinstance(x, torch.nn.parallel.DistributedDataParallel) for x in gc.get_objects())
"""


def config(folder, network, loss, lr):
    data = dict(survey=str(folder / "survey"), latents=str(folder / "latents.npy"), split="random", crop=32, batch_size=8, n_train=32, augment=False, band_dropout=0.0)
    return as_config(dict(data=data, network=network, schedule=dict(epochs=2, lr=lr, loss=loss, precision="float32"), seeds=[0]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "By name: the run of one process and that of two; 'taken over' was begun by one process and ended by two."
    folder = tmp_path_factory.mktemp("distributed")
    survey = simulate_survey(folder / "survey", 48, seed=8, size=32, n_workers=1, progress=False)
    rng = np.random.default_rng(0)
    light = np.nan_to_num(np.asarray(survey.cutouts[:], np.float32)).sum((2, 3))
    np.save(folder / "latents.npy", np.column_stack([rng.normal(size=48), (light[:, 2] - light[:, 2].mean()) / light[:, 2].std()]).astype(np.float32))
    configs = {name: config(folder, *args) for name, args in NETWORKS.items()}
    alone = {name: run_experiment(c, folder / f"{name}-1", progress=False) for name, c in configs.items()}
    from fastai.callback.core import Callback

    class Halt(Callback):
        def before_train(self):
            if self.epoch == 1: raise BadInput("test", "halt")
    with pytest.raises(BadInput, match="halt"): run_experiment(configs["hybrid"], folder / "taken", progress=False, cbs=[Halt()])
    jobs = [(asdict(c), str(folder / f"{name}-2")) for name, c in configs.items()] + [(asdict(configs["hybrid"]), str(folder / "taken"))]
    (folder / "jobs.json").write_text(json.dumps(jobs)); (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
               "--dynamo_backend", "no", "--main_process_port", "0", str(folder / "script.py"), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: (alone[name], Run.load(folder / f"{name}-2")) for name in configs} | {"taken over": (alone["hybrid"], Run.load(folder / "taken"))}


@pytest.mark.parametrize("name", ["deconv", "hybrid", "taken over"])
def test_two_processes_give_the_losses_of_one(runs, name):
    one, two = runs[name]
    assert (one.info["processes"], two.info["processes"]) == (1, 2) and two.finished
    for column in ("train_loss", "valid_loss", "mse", "published_mse"):
        assert two.metrics[column].to_numpy() == pytest.approx(one.metrics[column].to_numpy(), abs=1e-5)
    for column in one.metrics.filter(regex="rmse_|r2_"): assert two.metrics[column].to_numpy() == pytest.approx(one.metrics[column].to_numpy(), abs=1e-4)
    assert one.metrics.mse.iloc[0] != one.metrics.mse.iloc[1]                  # it did learn something


@pytest.mark.parametrize("name", ["deconv", "hybrid"])
def test_the_networks_are_the_same(runs, name):
    one, two = (r.network().net.state_dict() for r in runs[name])
    assert list(one) == list(two) and all(torch.allclose(one[k].double(), two[k].double(), rtol=1e-2, atol=1e-3) for k in one)


def test_only_one_process_writes(runs):
    folder = runs["hybrid"][1].folder
    assert len(list((folder / "tensorboard").glob("*"))) <= 1 and runs["hybrid"][1].info["sessions"] == 1
    assert runs["taken over"][1].info["sessions"] == 2


def test_a_process_that_comes_late_to_a_folder(runs, tmp_path, monkeypatch):
    "The first process may have written some files by then; the others take them as they are."
    (tmp_path / "config.toml").write_text("")
    monkeypatch.setenv("RANK", "1"); monkeypatch.setenv("WORLD_SIZE", "2")
    with claimed(tmp_path, {}) as info: assert info == {}
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(BadInput, match="not empty"), claimed(tmp_path, {}): pass


def test_a_batch_that_cannot_be_shared(runs):
    x, y = np.random.default_rng(0).normal(size=(20, 5, 32, 32)).astype(np.float32), np.zeros((20, 2), np.float32)
    with pytest.raises(BadInput, match="shared"):
        make_batches(x, y, np.arange(16), np.arange(16, 20), InputTransform.fit(x, 32), batch_size=7, rank=0, world=2)
