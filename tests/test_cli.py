"""The command: help, exit statuses, and what bad files do to it. The model has random weights."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits

from spectranb.cli import main
from spectranb.core import BadInput, real_dir
from spectranb.demo import Job, Recipe, find_cutouts, galaxy_of, safe_name
from spectranb.predict import read_prediction
from test_predict import predictor  # noqa: F401  a fixture

COMMANDS = "simulate", "train", "predict", "evaluate", "demo"


def shell(*argv):
    try: return main([str(a) for a in argv])
    except SystemExit as e: return e.code


def write_band(path, band, data, exptime=100.0, **cards):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = fits.Header({"EXPTIME": exptime, "HIERARCH FPA.FILTERID": f"{band}.00000", **cards})
    fits.PrimaryHDU(np.asarray(data, np.float32), header).writeto(path)


def write_galaxy(folder, name, bands="grizy", seed=0, size=48):
    rng = np.random.default_rng(seed)
    for b in bands: write_band(folder / f"{name}_{b}.fits", b, rng.normal(100, 30, (size, size)))


@pytest.fixture
def model(predictor, tmp_path):  # noqa: F811
    return predictor.save(tmp_path / "model")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, capsys):
    assert shell(command, "--help") == 0
    text = capsys.readouterr().out
    assert "example:" in text and f"spectranb {command}" in text and "FOLDER" in text


def test_main_help_and_version(capsys):
    assert shell("--help") == 0
    text = capsys.readouterr().out
    assert all(c in text for c in COMMANDS)
    assert shell("--version") == 0 and capsys.readouterr().out.startswith("spectranb ")
    assert shell() == 2 and shell("paint") == 2 and shell("predict") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_states_the_true_defaults(capsys):
    shell("train", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, value in vars(Recipe()).items():
        stated = re.search(rf"--{name.replace('_', '-')} [^(]*\(default: ([^)]*)\)", text).group(1)
        assert stated == str(value) or value is None, name


def test_help_is_quick_and_light():
    """--help must not import torch."""
    code = "import sys\nfrom spectranb.cli import make_parser\nmake_parser()\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize("argv", [["evaluate", "nowhere"], ["train", "nowhere", "--out", "run"], ["predict", "nowhere.fits"], ["simulate", "--n", "3"], ["predict", "x", "--model", "nowhere"]])
def test_bad_arguments_are_one_line(argv, model, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if argv[0] in ("predict", "evaluate") and "--model" not in argv: argv = [*argv, "--model", model]
    assert shell(*argv) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("spectranb: ") and len(err.splitlines()) == 1


def test_predict_files(model, tmp_path, capsys):
    write_galaxy(tmp_path / "in", "A"); write_galaxy(tmp_path / "in", "B", "griz", 1)
    assert shell("predict", *sorted((tmp_path / "in").glob("*.fits")), "--model", model, "--out", tmp_path / "out", "--quiet") == 0
    p = read_prediction(tmp_path / "out" / "predictions.fits")
    assert list(p.object_id) == ["A", "B"] and list(p.bands) == ["grizy", "griz"] and p.flags[1] == "no y"
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"predictions.fits", "rejects.csv", "A.png", "B.png"}
    assert "2 spectra" in capsys.readouterr().out and len(pd.read_csv(tmp_path / "out" / "rejects.csv")) == 0


def test_bad_files_are_listed_and_the_rest_is_predicted(model, tmp_path, capsys):
    folder = tmp_path / "in"
    for k, name in enumerate(["good", "also-good"]): write_galaxy(folder / name, "x", seed=k)
    write_band(folder / "nan" / "x_g.fits", "g", np.full((48, 48), np.nan))
    write_band(folder / "twice" / "x.g.fits", "g", np.ones((48, 48))); write_band(folder / "twice" / "y_x.fits", "g", np.ones((48, 48)))
    write_band(folder / "cube" / "x_g.fits", "g", np.ones((3, 48, 48)))
    write_band(folder / "oblong" / "x_g.fits", "g", np.ones((48, 48))); write_band(folder / "oblong" / "x_r.fits", "r", np.ones((20, 48)))
    (folder / "corrupt").mkdir(); (folder / "corrupt" / "x_g.fits").write_bytes(b"<html>502 Bad Gateway</html>")
    (folder / "cut").mkdir(); (folder / "cut" / "x_g.fits").write_bytes((folder / "good" / "x_g.fits").read_bytes()[:6000])
    (folder / "empty").mkdir(); fits.PrimaryHDU().writeto(folder / "empty" / "x_g.fits")
    write_band(folder / "noband" / "x.fits", "Q", np.ones((48, 48)))
    write_band(folder / "zero-exposure" / "x_g.fits", "g", np.ones((48, 48)), exptime=0.0)
    assert shell("predict", folder, "--model", model, "--out", tmp_path / "out", "--quiet") == 0
    rejects = pd.read_csv(tmp_path / "out" / "rejects.csv", keep_default_na=False).set_index("name")
    assert set(rejects.index) == {"nan", "twice", "cube", "oblong", "corrupt", "cut", "empty", "noband", "zero-exposure"}
    for name, word in {"nan": "NaN", "twice": "twice", "cube": "two dimensions", "oblong": "shape", "empty": "no image", "corrupt": "FITS", "cut": "FITS", "noband": "band", "zero-exposure": "EXPTIME"}.items():
        assert word in rejects.loc[name, "reason"], name
    assert set(read_prediction(tmp_path / "out" / "predictions.fits").object_id) == {"good", "also-good"}
    err = capsys.readouterr().err
    assert err.count("left out: ") == 9 and "Traceback" not in err


def test_nothing_usable_is_status_2(model, tmp_path, capsys):
    (tmp_path / "x_g.fits").write_bytes(b"nothing")
    assert shell("predict", tmp_path / "x_g.fits", "--model", model, "--out", tmp_path / "out") == 2
    assert shell("predict", tmp_path / "model", "--model", model, "--out", tmp_path / "out") == 2      # a folder without FITS files
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "survey"
    if shell("simulate", "--out", path, "--n", 24, "--size", 40, "--seed", 9, "--workers", 1, "--quiet"): pytest.skip("no templates: the extra [mock] is not installed")
    return path


def test_simulate_refuses_to_overwrite(survey, capsys):
    assert shell("simulate", "--out", survey, "--n", 24, "--quiet") == 2 and "exists already" in capsys.readouterr().err


def test_predict_a_survey(survey, model, tmp_path):
    assert shell("predict", survey, "--model", model, "--out", tmp_path / "out", "--plots", 1, "--quiet") == 0
    p = read_prediction(tmp_path / "out" / "predictions.fits")
    catalog = pd.read_parquet(survey / "catalog.parquet")
    assert list(p.object_id) == list(catalog["object_id"]) and np.array_equal(p.ra, catalog["ra"]) and len(list((tmp_path / "out").glob("*.png"))) == 1


def test_evaluate_writes_a_report(survey, model, tmp_path, capsys):
    assert shell("evaluate", survey, "--model", model, "--out", tmp_path / "report", "--quiet") == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "http" not in page and "Simulated galaxies" in page and page.count("<img") == page.count(' alt="')
    assert "simple_cnn" in capsys.readouterr().out and (tmp_path / "report" / "metrics.csv").exists()


def test_foreign_survey_is_named(survey, model, tmp_path, capsys):
    shutil.copytree(survey, tmp_path / "copy"); (tmp_path / "copy" / "ivar.npy").unlink()
    assert shell("evaluate", tmp_path / "copy", "--model", model) == 2 and "ivar.npy" in capsys.readouterr().err


def test_real_cutouts(model, tmp_path):
    folder = real_dir()
    if folder is None: pytest.skip("the folder with real example files is missing")
    assert shell("predict", folder / "ps1_cutouts", "--model", model, "--out", tmp_path / "out", "--quiet") == 0
    p = read_prediction(tmp_path / "out" / "predictions.fits")
    assert len(p) == 1 and p.bands[0] == "griz" and p.object_id[0] == "PS1"


@pytest.mark.parametrize("name, galaxy", [("NGC1_g.fits", "NGC1"), ("a.b.stk.r.unconv.fits", "a.b.stk.unconv"), ("y_12.fits.gz", "12"), ("z.fits", "in"), ("NGC628.fits", None),
                                          ("grizy.fits", None), ("g-r_i.fit", "g-r"), ("x y_z.FITS", "x y")])
def test_galaxy_of(name, galaxy): assert galaxy_of(Path("in") / name) == galaxy


def test_find_cutouts(tmp_path):
    for f in "one/a_g.fits", "one/a_r.fits", "two/p.fits", "two/q.fits", "top_g.fits", "top_i.fits", "notes.txt":
        (tmp_path / f).parent.mkdir(exist_ok=True); (tmp_path / f).touch()
    found = find_cutouts([tmp_path])
    assert {k: len(v) for k, v in found.items()} == {"top": 2, "one": 2, "two": 2}
    assert {k: len(v) for k, v in find_cutouts([tmp_path / "two" / "p.fits", tmp_path / "two" / "q.fits"]).items()} == {"p": 2}
    with pytest.raises(BadInput, match="not there"): find_cutouts([tmp_path / "none"])


def test_safe_name():
    assert safe_name("../../etc/passwd") == "etc_passwd" and safe_name("NGC 628") == "NGC_628" and safe_name("///") == "galaxy"


def test_job_resumes_and_refuses(tmp_path):
    lines = []
    def make(**settings): return Job(tmp_path / "job", settings, lines.append)
    assert make(a=1).step("s", lambda: 5, lambda: 6) == 5 and make(a=1).step("s", lambda: 5, lambda: 6) == 6
    def lost(): raise BadInput("x", "gone")
    assert make(a=1).step("s", lambda: 7, lost) == 7, "a product that was lost is made again"
    with pytest.raises(BadInput, match="a = 1, not 2"): make(a=2)
    def fail(): raise RuntimeError
    with pytest.raises(RuntimeError): make(a=1).step("t", fail)
    assert "t" not in make(a=1).steps and make(a=1).steps["s"]["seconds"] >= 0 and len(make(a=1).times()) == 1
    (tmp_path / "other").mkdir(); (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(BadInput, match="not empty"): Job(tmp_path / "other", {})
    (tmp_path / "job" / "job.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"): make(a=1)
