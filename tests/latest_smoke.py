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
