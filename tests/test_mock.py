"""The simulated survey against GalSim, against itself made in pieces, and against bad template files."""
import subprocess
import sys

import numpy as np
import pytest

from spectranb.core import PIXEL_SCALE, BadInput
from spectranb.data import mock
from spectranb.data.mock import load_templates, moffat, simulate_object, simulate_spectra, simulate_survey, smooth_maps


@pytest.fixture(scope="module")
def templates():
    try:
        return load_templates()
    except BadInput as why:
        pytest.skip(str(why))


def structure(**changed):
    s = dict(arcsec_per_kpc=1.0, pa=0.5, sersic_n=2.5, bulge_kpc=1.5, bulge_q=0.7, disc_h_kpc=2.0, inclination=0.9,
             barred=False, bar_pa=0.0, sf_scale=1.0, n_arms=2, arm_contrast=1.0, pitch=0.4, arm_phase=0.0,
             n_knots=20, knot_seed=3, offset=np.zeros(2), bar_share=0.0, dusty=True)
    return s | changed


@pytest.mark.parametrize("n, radius", [(1.0, 2.0), (2.5, 1.5), (4.0, 2.5)])
def test_bulge_agrees_with_galsim_in_apertures(n, radius):
    galsim = pytest.importorskip("galsim")
    half = 60
    ours = mock.component_maps(structure(sersic_n=n, bulge_kpc=radius), half)[0]
    theirs = galsim.Sersic(n=n, half_light_radius=radius * np.sqrt(0.7), trunc=0).shear(q=0.7, beta=0.5 * galsim.radians)
    image = theirs.drawImage(nx=2 * half + 1, ny=2 * half + 1, scale=PIXEL_SCALE, method="auto" if n < 1 else "real_space").array
    yy, xx = np.mgrid[-half:half + 1, -half:half + 1] * PIXEL_SCALE
    for r in (1.5, 3.0, 6.0, 12.0):
        inside = np.hypot(xx, yy) < r
        assert ours[inside].sum() == pytest.approx(image[inside].sum(), rel=0.015)


def test_rendering_is_linear_in_the_fluxes_and_keeps_them():
    maps = np.zeros((7, 65, 65), "f4")
    maps[1, 32, 32] = 1
    flux = np.zeros((7, 5))
    flux[1] = 1e4                                                     # so bright that noise and neighbours do not matter
    image = mock.render_cutout(np.random.default_rng(0), maps, flux, 96)
    assert np.nansum(image, axis=(1, 2)) == pytest.approx(flux[1], rel=0.06)    # zero points scatter by 1.2 %, wings leave the field


def test_moffat_has_unit_flux():
    t = np.arange(-200, 201) * 0.1
    assert moffat(t[:, None] ** 2 + t**2, 1.2, 3.2).sum() * 0.01 == pytest.approx(1, abs=2e-3)


def test_light_of_image_is_light_of_spectrum(templates):
    """The r band of the noiseless fibre spectrum is what the fibre aperture collects from the noiseless maps."""
    for index in range(6):
        gal = mock.draw_galaxy(np.random.default_rng([3, index]), templates)
        gal.truth["ebv"] = 0.0
        gal.broad = None
        s = gal.structure
        s["arcsec_per_kpc"] = (1 + gal.z) ** 2 / mock.luminosity_distance(gal.z) * 206.265
        maps = mock.component_maps(s, mock.FIBRE_HALF)
        shares = np.tensordot(maps, mock.fibre_aperture(), ((1, 2), (0, 1))).astype(float)
        photometry = mock.component_photometry(gal, shares)[0]
        image_r = np.tensordot(photometry[:, 1], maps, 1)
        in_fibre = np.sum(image_r * mock.fibre_aperture())
        spectrum, _ = mock.fibre_spectrum(gal, shares)
        from_spectrum = mock.filter_weights(gal.z)[1] @ spectrum
        assert from_spectrum == pytest.approx(in_fibre, rel=0.01)


def test_same_bytes_in_pieces_and_by_any_number_of_workers(templates, tmp_path):
    whole = simulate_survey(tmp_path / "a", 150, seed=4, size=32, n_workers=2, progress=False)
    alone = simulate_survey(tmp_path / "b", 150, seed=4, size=32, n_workers=1, progress=False)
    for name in whole.info["files"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    spectra = simulate_spectra(40, seed=4, start=100)
    assert np.array_equal(spectra["flux"], whole.spectra[100:140]) and np.array_equal(spectra["ivar"], whole.ivar[100:140])
    assert whole.catalog.object_id[0] == "sim4-00000000" and alone.verify()


def test_a_broken_off_simulation_resumes(templates, tmp_path, monkeypatch):
    calls = []
    real = mock._write_chunk

    def breaks(writer, first, start, *rest):
        if start == 128: raise KeyboardInterrupt
        calls.append(start)
        return real(writer, first, start, *rest)

    monkeypatch.setattr(mock, "_write_chunk", breaks)
    with pytest.raises(KeyboardInterrupt):
        simulate_survey(tmp_path / "s", 200, seed=6, size=32, n_workers=1, progress=False)
    assert not (tmp_path / "s").exists() and calls == [0, 64]
    monkeypatch.setattr(mock, "_write_chunk", lambda *a: (calls.append(a[2]), real(*a))[1])
    survey = simulate_survey(tmp_path / "s", 200, seed=6, size=32, n_workers=1, progress=False)
    assert calls == [0, 64, 128, 192]                                 # nothing is made twice
    fresh = simulate_survey(tmp_path / "t", 200, seed=6, size=32, n_workers=1, progress=False)
    assert np.array_equal(survey.cutouts[:].view("u2"), fresh.cutouts[:].view("u2"))


def test_a_resumed_simulation_must_be_the_same_one(templates, tmp_path, monkeypatch):
    monkeypatch.setattr(mock, "_write_chunk", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): simulate_survey(tmp_path / "s", 10, seed=6, size=32, n_workers=1, progress=False)
    monkeypatch.undo()
    with pytest.raises(BadInput, match="provenance"): simulate_survey(tmp_path / "s", 10, seed=7, size=32, progress=False)


def test_spectrum_does_not_depend_on_the_image(templates):
    a, b = simulate_object(2, 5, templates, 0), simulate_object(2, 5, templates, 48)
    assert np.array_equal(a.flux, b.flux) and a.row == b.row and a.truth == b.truth


def test_noise_has_the_size_that_ivar_says(templates, monkeypatch):
    monkeypatch.setattr(mock.MOCK, "calibration", 0.0)
    chi2 = []
    for i in range(40):
        o = simulate_object(9, i, templates, 0)
        good = o.ivar > 0
        chi2.append(np.mean(((o.flux - o.noiseless) ** 2 * o.ivar)[good]))
    assert np.mean(chi2) == pytest.approx(1, abs=4 * np.sqrt(2 / 40 / 900))


def test_missing_extra_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("SPECTRANB_CACHE", str(tmp_path))
    monkeypatch.delenv("SPECTRANB_TEMPLATES", raising=False)
    monkeypatch.setattr(mock.importlib.util, "find_spec", lambda name: None)
    load_templates.cache_clear()
    with pytest.raises(BadInput, match=r"pip install spectranb\[mock\].*--templates"): simulate_spectra(1)
    load_templates.cache_clear()


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 broken"])
def test_a_foreign_template_file_is_refused(tmp_path, content):
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="t.npz"): load_templates(str(path))
    with pytest.raises(BadInput, match="does not exist"): load_templates(str(tmp_path / "none.npz"))


def test_a_pickled_template_file_is_not_executed(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, sed_loglam=np.array([dict()], dtype=object))
    with pytest.raises(BadInput, match="evil"): load_templates(str(path))


def test_stellar_lines_stand_at_vacuum_wavelengths(templates):
    "Against the air wavelengths of the MILES library, 83 km/s off, a third of a bin: Ca K of old stars, Balmer lines of A stars."
    lam, ssp = mock.SED_WAVELENGTH, templates.ssp.reshape(7, 51, -1)
    for vacuum, air, age in ((3934.78, 3933.66, 9e9), (4862.69, 4861.33, 3e8), (4341.69, 4340.47, 3e8)):
        k = np.abs(lam - vacuum) < 18
        for z in (3, 4, 5):
            f = ssp[z, np.searchsorted(mock.AGE, age)][k]
            depth = np.maximum(1 - f / np.interp(lam[k], lam[k][[0, -1]], f[[0, -1]]), 0)
            centre = (depth * lam[k]).sum() / depth.sum()
            assert abs(centre - vacuum) < abs(centre - air)


def test_a_template_file_with_air_wavelengths_is_refused(templates, tmp_path):
    with np.load(templates.path) as f: arrays = {k: f[k] for k in f.files if k != "vacuum"}
    np.savez(tmp_path / "v1.npz", **arrays)
    with pytest.raises(BadInput, match="in air"): load_templates(str(tmp_path / "v1.npz"))


def test_bagpipes_is_never_imported(templates):
    code = "import sys, spectranb.data.mock as m; m.simulate_spectra(1, n_workers=1); assert 'bagpipes' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
