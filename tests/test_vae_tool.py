"The shell commands of the spectrum VAE: fit (killed and resumed), encode, convert, bad input. Simulated spectra."
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from spectranb.cli import main
from spectranb.core import BadInput, real_dir
from spectranb.data.mock import simulate_survey
from spectranb.vae import SpectrumVAE
from spectranb.vae_tool import read_spectra, split_off

SMALL = ["--hidden", "32", "--batch-size", "32", "--held-out", "0.2"]


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    path = tmp_path_factory.mktemp("tool") / "survey"
    simulate_survey(path, 400, seed=9, size=0)
    return path


@pytest.fixture(scope="module")
def coder(survey, tmp_path_factory):
    out = tmp_path_factory.mktemp("tool") / "coder"
    assert main(["vae", "fit", str(survey), "--out", str(out), "--epochs", "4", "--quiet", *SMALL]) == 0
    return out


def test_fit_says_what_it_did(coder, survey, capsys):
    vae = SpectrumVAE.load(coder)
    assert vae.info["held_out"]["n"] == 80 and vae.info["n_train"] == 320 and vae.info["spectra"] == [str(survey)]
    assert sorted(p.name for p in coder.iterdir()) == ["config.json", "rejects.csv", "weights.safetensors"]


def test_killed_and_started_again_it_ends_the_same(survey, tmp_path):
    command = [sys.executable, "-m", "spectranb.cli", "vae", "fit", str(survey), "--epochs", "30", "--quiet", *SMALL, "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert subprocess.run([*command, str(whole)], capture_output=True).returncode == 0
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (killed / "training.pt").exists(): time.sleep(0.01)
    process.kill(); process.wait()
    assert not (killed / "config.json").exists()
    assert subprocess.run([*command, str(killed)], capture_output=True).returncode == 0
    assert (killed / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def test_a_finished_coder_is_not_written_over(coder, survey, capsys):
    assert main(["vae", "fit", str(survey), "--out", str(coder), "--quiet"]) == 2
    assert "finished coder already" in capsys.readouterr().err


def test_encode_a_survey(coder, survey, tmp_path, capsys):
    assert main(["vae", "encode", str(survey), "--vae", str(coder), "--out", str(tmp_path), "--plots", "0"]) == 0
    table, (names, flux, ivar, _) = pd.read_parquet(tmp_path / "latents.parquet"), read_spectra([survey])
    assert table.name.tolist() == names.name.tolist() and np.allclose(table.filter(like="latent_"), SpectrumVAE.load(coder).encode(flux, ivar))
    assert "400 spectra" in capsys.readouterr().out


def test_encode_goes_on_without_bad_spectra(coder, survey):
    from spectranb.vae_tool import latent_table
    names, flux, ivar, _ = read_spectra([survey])
    flux, ivar = np.array(flux[:20]), np.array(ivar[:20])
    ivar[3] = 0; flux[7] *= -1
    table = latent_table(SpectrumVAE.load(coder), names[:20], flux, ivar, chunk=6)
    assert table.latent_1.isna().to_numpy().nonzero()[0].tolist() == [3, 7] and len(table) == 20


def test_nothing_there(coder, tmp_path, capsys):
    assert main(["vae", "encode", str(tmp_path / "none"), "--vae", str(coder)]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["vae", "encode", str(tmp_path / "empty"), "--vae", str(coder)]) == 2
    said = capsys.readouterr().err
    assert "does not exist" in said and "holds no good galaxy spectrum" in said and said.count("\n") == 2


def test_convert_refuses_a_folder_without_a_network(tmp_path, capsys):
    assert main(["vae", "convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists() and capsys.readouterr().err.startswith("spectranb: ")


def test_split_does_not_depend_on_anything_but_seed_and_number():
    train, held = split_off(1000, 0.25, 3)
    assert len(held) == 250 and not np.intersect1d(train, held).size and not np.array_equal(held, split_off(1000, 0.25, 4)[1])


@pytest.mark.skipif(real_dir() is None, reason="the real example spectra are missing")
def test_real_files(coder, tmp_path):
    assert main(["vae", "encode", str(real_dir() / "sdss_spectra"), "--vae", str(coder), "--out", str(tmp_path), "--plots", "2"]) == 0
    assert len(pd.read_parquet(tmp_path / "latents.parquet")) == 8 and len(pd.read_csv(tmp_path / "rejects.csv")) == 4
    assert (tmp_path / "reconstructions.png").stat().st_size > 20_000
