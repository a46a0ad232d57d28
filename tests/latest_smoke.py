"""The installed library with the newest fastai and fastcore: every module imports, and its main parts run.

`make test-latest` runs this from the environment .venv-latest, where the library is installed as its users get it.
"""
import importlib
import pkgutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

import spectranb

CHECKOUT = Path(__file__).resolve().parents[1]
assert CHECKOUT / "spectranb" != Path(spectranb.__file__).parent, "this must test the installed library, not the checkout"
assert int(version("fastcore").split(".")[0]) >= 2, f"fastcore {version('fastcore')} is not the newest"


def check_imports():
    names = [m.name for m in pkgutil.walk_packages(spectranb.__path__, "spectranb.")]
    for name in names:
        importlib.import_module(name)
    return f"{len(names)} modules import"


def check_dev_message():
    from spectranb.core import BadInput
    from spectranb.dev import need
    try:
        need("nbdev.clean")
    except BadInput as e:
        assert "pip install" in str(e)
        return "a missing development tool is named"
    return "the development tools are installed"


def check_core():
    from spectranb.core import REST_WAVELENGTH, air_to_vac, vac_to_air
    assert np.allclose(air_to_vac(vac_to_air(REST_WAVELENGTH)), REST_WAVELENGTH)
    return "the wavelength grid goes to air and back"


def check_network():
    import torch
    from spectranb.deconv import fold_deconv
    from spectranb.models import xresnet18_hybrid
    torch.manual_seed(0)
    net, cutouts = xresnet18_hybrid(), torch.randn(4, 5, 64, 64)
    net(cutouts).square().mean().backward()
    net.eval()
    with torch.no_grad():
        assert torch.allclose(fold_deconv(net)(cutouts), net(cutouts), atol=1e-4)
    return "xresnet18_hybrid runs forward, backward and folded"


def check_survey():
    import pandas as pd
    from spectranb.data.survey import Survey, SurveyWriter
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path, n = Path(folder) / "survey", 5
        rows = pd.DataFrame(dict(object_id=[str(i) for i in range(n)], ra=np.linspace(1, 300, n), dec=np.zeros(n),
                                 redshift=np.full(n, 0.1), norm=np.ones(n)))
        writer = SurveyWriter(path, n, size=16, provenance=dict(seed=0))
        writer.write(0, rows, rng.normal(size=(n, 1000)), np.ones((n, 1000)), cutouts=rng.normal(size=(n, 5, 16, 16)))
        writer.finish()
        survey = Survey.open(path)
        assert len(survey) == n and survey.cutouts[2].shape == (5, 16, 16) and list(survey.catalog.object_id) == list(rows.object_id)
    return "a survey is written and opened"


def check_spectra():
    from spectranb.data.spectra import infill
    flux, ivar = np.ones((20, 1000)), np.ones((20, 1000))
    flux *= np.random.default_rng(0).normal(1, 0.01, size=flux.shape)
    flux[:, 300:320], ivar[:, 300:320] = np.nan, 0
    flux[0, 300:320], ivar[0, 300:320] = 1, 1
    assert np.isfinite(infill(flux, ivar)).all()
    return "gaps in spectra are filled"


def check_chain():
    from spectranb.predict import Predictor, calibrate_errors
    from spectranb.training import train_network
    from spectranb.vae import SpectrumVAE
    rng = np.random.default_rng(0)
    slope = rng.normal(size=(160, 1)).astype("f4")
    flux = (1 + 0.2 * slope * np.linspace(-1, 1, 1000) + 0.02 * rng.normal(size=(160, 1000))).astype("f4")
    cutouts = (rng.normal(size=(160, 5, 32, 32)) + slope[:, :, None, None]).astype("f4")
    ivar, train, valid = np.full_like(flux, 2500), np.arange(120), np.arange(120, 160)
    vae = SpectrumVAE.fit(flux[train], ivar[train], hidden=(16,), epochs=2, progress=False)
    network = train_network(cutouts, vae.encode(flux, ivar), train, valid, arch="simple_cnn", crop=32, bin=1, epochs=1, batch_size=32, progress=False)
    predictor = Predictor(network, vae, calibrate_errors(network, vae, cutouts, flux, ivar, valid), dict(simulated=True))
    with tempfile.TemporaryDirectory() as folder:
        predictor.save(folder)
        prediction = Predictor.load(folder).predict(cutouts[:3], progress=False)
        prediction.write_fits(Path(folder) / "p.fits")
    assert prediction.flux.shape == (3, 1000) and np.isfinite(prediction.sigma).all()
    return "a VAE and a network are trained, saved, loaded and predict"


def main():
    print(f"Python {sys.version.split()[0]}, " + ", ".join(f"{p} {version(p)}" for p in ("spectranb", "torch", "fastai", "fastcore")))
    counts = dict(passed=0, failed=0)
    for check in [f for name, f in globals().items() if name.startswith("check_")]:
        try:
            print(f"ok     {check()}")
            counts["passed"] += 1
        except Exception as e:
            print(f"FAILED {check.__name__}: {type(e).__name__}: {e}")
            counts["failed"] += 1
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
