"Traversals, sliders, interpolation, correlations and classes: a toy decoder whose answers are known, no simulator needed."
import base64
import builtins
import io
import sys
import types

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from scipy.stats import spearmanr

from spectranb.core import N_WAVE, REST_WAVELENGTH, BadInput
from spectranb.data.spectra import GapBasis
from spectranb.vae import as_spectra, fill_and_normalise
from spectranb.explore import (CLASSES, LatentExplorer, SpectrumStage, galaxy_class, interpolate, latent_correlations, mix, plot_correlations,
                               plot_interpolation, plot_latent_map, plot_traversals, traverse, truth_quantities, unit_spectra)

X = np.linspace(-1, 1, N_WAVE)
PEAK = int(np.abs(REST_WAVELENGTH - 6564.6).argmin())


class Toy:
    "Three latents: slope, curvature, and a line whose strength is quadratic; encodes by position in a list."
    n_out = 3
    basis = GapBasis(np.ones(N_WAVE), np.linalg.qr(np.stack([X, X ** 2, X ** 3], 1))[0].T, np.full(3, 10.0))

    def decode(self, z):
        z = np.asarray(z, float)
        s, c, line = z[..., :1], z[..., 1:2], z[..., 2:]
        return (1.5 + 0.2 * s * X + 0.1 * c * X ** 2 + 0.3 * line ** 2 * np.exp(-0.5 * ((REST_WAVELENGTH - REST_WAVELENGTH[PEAK]) / 8) ** 2)).astype(np.float32)

    def prepare(self, flux, ivar=None): return fill_and_normalise(*as_spectra(flux, ivar), self.basis)

    def encode(self, flux, ivar=None): return np.array([[0.5, -0.25, 1.0], [-4.2, 0.0, 0.3]])[:len(np.atleast_2d(flux))]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def vae(): return Toy()


@pytest.fixture
def spectra(vae):                   # flux and ivar of two galaxies, with gaps
    flux, ivar = 3e-17 * vae.decode([[0.5, -0.25, 1.0], [-4.2, 0, 0.3]]), np.full((2, N_WAVE), 1e36)
    flux[:, 100:150] = 1e-10; ivar[:, 100:150] = 0
    return flux, ivar


@pytest.fixture
def explorer(vae, spectra):
    pytest.importorskip("ipywidgets")
    return LatentExplorer(vae, reference=spectra)


def pixels(png): return np.round(255 * imread(io.BytesIO(png))[..., :3]).astype(int)


# traversals and the way between two galaxies ------------------------------------------------------------------------------

def test_traversal_moves_one_latent_and_no_other(vae):
    start, values = np.array([0.3, -1, 2]), (-2, 0.5, 7)
    spectra = traverse(vae, values, start)
    assert spectra.shape == (3, 3, N_WAVE)
    for k in range(3):
        for m, v in enumerate(values): assert np.array_equal(spectra[k, m], vae.decode(np.where(np.arange(3) == k, v, start)))


def test_traversal_knows_no_linearity(vae):
    low, mid, high = traverse(vae, (-2, 0, 2))[2]
    assert np.array_equal(low, high) and high.max() > mid.max() + 1                        # the line is quadratic in its latent


@pytest.mark.parametrize("values, start, said", [((), None, "values"), ([[1, 2]], None, "values"), ((0, np.nan), None, "values"),
                                                 ((0,), np.zeros(2), "start"), ((0,), np.zeros((1, 3)), "start"), ((0,), [0, np.inf, 0], "start")])
def test_bad_traversals(vae, values, start, said):
    with pytest.raises(BadInput, match=said) as e: traverse(vae, values, start)
    assert e.value.remedy


@pytest.mark.parametrize("values", [(-2, -1, 0, 1, 2), (0,), (3, 1)])
def test_the_figure_has_a_panel_a_latent(vae, values):
    fig = plot_traversals(vae, values, start=[0.3, 0, 0])
    fig.canvas.draw()
    panels = [ax for block in fig.subfigs[1].subfigs for ax in block.axes]
    assert [t.get_text() for ax in panels for t in ax.texts if t.get_text().startswith("latent")] == ["latent 1", "latent 2", "latent 3"]
    drawn = [line.get_ydata() for line in panels[0].lines if len(line.get_ydata()) == N_WAVE]
    assert len(drawn) == len(values) and {d.tobytes() for d in drawn} == {x.tobytes() for x in traverse(vae, values, [0.3, 0, 0])[0]}


def test_interpolation_is_straight_in_latents_and_mixing_in_flux(vae):
    a, b = np.array([1, 0, 2.0]), np.array([-1, 2, 0.0])
    line, mixed = interpolate(vae, a, b, 5), mix(vae, a, b, 5)
    assert np.allclose(line[2], vae.decode((a + b) / 2)) and np.allclose(line[1], vae.decode(0.75 * a + 0.25 * b))
    assert np.allclose(mixed[1], 0.75 * vae.decode(a) + 0.25 * vae.decode(b)) and np.allclose(mixed[[0, -1]], line[[0, -1]])
    assert np.isclose((mixed - line)[2, PEAK], 0.3, atol=0.01)                             # the line: 0.3·1² against 0.3·(2² + 0²)/2
    assert len(plot_interpolation(vae, a, b, 5).axes) == 3 and len(plot_interpolation(vae, a, a, 2).axes) == 3


def test_bad_ends(vae):
    with pytest.raises(BadInput, match="b: has shape"): interpolate(vae, np.zeros(3), np.zeros(6))
    with pytest.raises(BadInput, match="n: is 1"): interpolate(vae, np.zeros(3), np.zeros(3), 1)


# the stage ----------------------------------------------------------------------------------------------------------------

def test_blitting_draws_what_a_full_draw_draws(vae):
    flux = vae.decode(np.zeros(3))
    stage = SpectrumStage()
    stage.png(3 * flux); stage.png(flux * 0.1)
    blitted = stage.pixels(flux).copy()
    stage.line.set_animated(False)
    stage.canvas.draw()
    whole = np.asarray(stage.canvas.buffer_rgba())
    assert (np.abs(blitted.astype(int) - whole).max(2) > 60).mean() < 0.001                 # the frame is drawn under the line, not over it


def test_the_scale_depends_on_the_spectrum_alone(vae):
    stage, flux = SpectrumStage(base=2), np.full(N_WAVE, 1.5)
    assert stage.limits(flux)[0] == stage.limits(flux * 0.01)[0] == (0, 0.06)
    for factor in (1, 1.4, 3, 10, 1000):
        for low in (0, -0.1, -1.0):
            y = factor * np.append(flux, low)
            (bottom, top) = stage.limits(y)[1]
            assert bottom <= y.min() and y.max() <= top <= 2.2 * max(y.max(), 2)
    first = stage.png(flux)
    for factor in (4, 0.5, -1, 9): stage.png(factor * flux)
    assert stage.png(flux) == first == SpectrumStage(base=2).png(flux)


def test_gaps_are_gaps(vae, spectra):
    seen = unit_spectra(vae, *spectra)
    assert np.isnan(seen[:, 100:150]).all() and np.isfinite(np.delete(seen, np.s_[100:150], 1)).all()
    assert np.allclose(np.nanmean(seen ** 2, 1), 1, atol=0.05)                              # the absurd flux in the gap has no say


# the explorer -------------------------------------------------------------------------------------------------------------

def test_a_slider_changes_the_picture_and_reset_brings_it_back(explorer, vae):
    first = explorer.image.value
    seen = [first]
    for slider in explorer.sliders:
        slider.value = 1.3
        assert explorer.image.value not in seen
        seen.append(explorer.image.value)
    assert np.allclose(explorer.spectrum, vae.decode([1.3, 1.3, 1.3]))
    explorer.reset_button.click()
    assert explorer.image.value == first and not explorer.values.any()


def test_the_picture_shows_the_spectrum_of_the_sliders(explorer, vae):
    explorer.set_latents([1.0, 2.0, 0.5])
    assert explorer.image.value == SpectrumStage(explorer.stage.base).png(vae.decode([1.0, 2.0, 0.5]))


def test_many_sliders_are_one_redraw(explorer, monkeypatch):
    drawn = []
    monkeypatch.setattr(explorer.stage, "png", lambda flux: drawn.append(flux) or b"")
    explorer.set_latents([1, 1, 1]); explorer.reset()
    assert len(drawn) == 2


def test_a_start_of_its_own(vae):
    pytest.importorskip("ipywidgets")
    e = LatentExplorer(vae, start=[0.5, 5.5, 0])
    assert e.values.tolist() == [0.5, 5.5, 0] and e.limit == 6
    e.sliders[0].value = -1; e.reset()
    assert e.values.tolist() == [0.5, 5.5, 0]
    with pytest.raises(BadInput, match="start"): LatentExplorer(vae, start=[1, 2])


def test_a_galaxy_behind(explorer):
    without = explorer.image.value
    explorer.galaxy.value = 1                                                              # as by hand
    assert explorer.values.tolist() == [-4.2, 0, 0.3] and explorer.limit == 5
    shown = pixels(explorer.image.value)
    explorer.show_galaxy(-1)
    assert explorer.image.value == without and not explorer.values.any()
    explorer.set_latents([-4.2, 0, 0.3])
    grey = pixels(explorer.image.value)
    assert (np.abs(shown - grey).max(2) > 20).sum() > 20                                   # the galaxy's own line, where ours does not cover it
    with pytest.raises(BadInput, match="galaxy 2"): explorer.show_galaxy(2)


def test_without_a_kernel_only_a_picture_is_shown(explorer):
    assert getattr(getattr(builtins, "get_ipython", lambda: None)(), "kernel", None) is None
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png"} and "0x" not in bundle["text/plain"]
    first = base64.b64decode(bundle["image/png"])
    assert pixels(first).shape[1] > 900
    explorer.sliders[0].value = 2
    assert explorer.still() != first
    explorer.reset()
    assert explorer.still() == first


def test_with_a_kernel_there_are_sliders_and_the_picture(explorer, monkeypatch):
    monkeypatch.setattr(builtins, "get_ipython", lambda: types.SimpleNamespace(kernel=object()), raising=False)
    bundle = explorer._repr_mimebundle_()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.box.model_id and "image/png" in bundle


def test_without_ipywidgets_the_remedy_is_named(vae, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(BadInput, match="pip install ipywidgets"): LatentExplorer(vae)
    assert traverse(vae).shape == (3, 5, N_WAVE) and plot_traversals(vae)                  # all else goes on


# correlations -------------------------------------------------------------------------------------------------------------

def test_correlations_are_scipys_quantity_by_quantity():
    rng = np.random.default_rng(1)
    z, q = rng.normal(size=(200, 3)), rng.normal(size=200)
    q = q + z[:, 1]; q[:30] = np.nan; q[30] = np.inf; z[40, 2] = np.nan
    table = latent_correlations(z, pd.DataFrame(dict(q=q, square=z[:, 0] ** 2, name="x", yes=z[:, 1] > 1)))
    good = np.isfinite(q) & np.isfinite(z).all(1)
    assert list(table.index) == ["q", "square", "yes"] and table["n"].tolist() == [168, 199, 199]
    for k in range(3): assert np.isclose(table.loc["q", ("rho", k + 1)], spearmanr(z[good, k], q[good])[0])
    assert table.loc["q", "rho"].idxmax() == 2 and (table["error"].to_numpy(float) > 0).all()
    assert np.allclose(latent_correlations(z, dict(q=np.exp(q)))["rho"], table.loc[["q"], "rho"])          # ranks only


def test_correlations_that_cannot_be_are_nan():
    z = np.random.default_rng(0).normal(size=(50, 2)); z[:, 1] = 3
    few = np.full(50, np.nan); few[:9] = np.arange(9)
    table = latent_correlations(z, dict(constant=np.ones(50), few=few, nothing=few * np.nan, same=z[:, 0]))
    rho = table["rho"].to_numpy(float)
    assert np.isnan(rho[:3]).all() and np.isclose(rho[3, 0], 1) and np.isnan(rho[3, 1]) and table["n"].tolist() == [50, 9, 0, 50]
    assert abs(table.loc["same", ("error", 1)]) < 1e-9
    plot_correlations(table).figure.canvas.draw()


def test_bad_correlations():
    with pytest.raises(BadInput, match="latents"): latent_correlations(np.zeros(5), dict(a=np.zeros(5)))
    with pytest.raises(BadInput, match="a: has not one value"): latent_correlations(np.zeros((5, 2)), dict(a=np.zeros(4)))
    with pytest.raises(BadInput, match="no column of numbers"): latent_correlations(np.zeros((5, 2)), dict(a=["x"] * 5))


def test_truth_quantities():
    flux = ("Hbeta", "Halpha", "OIII5008", "NII6585", "SII6718")
    truth = pd.DataFrame({f"flux_{name}": [1.0 + k, 0.0] for k, name in enumerate(flux)} | dict(agn=["type 2", "retired"], kind="quiescent")
                         | {c: [1.0, 2.0] for c in ("age_mass_gyr", "log_sfr", "log_mass", "log_z_star", "a_v_disc", "sigma_v", "fibre_r")})
    q = truth_quantities(truth)
    assert np.isclose(q["log [N II] / Hα"][0], np.log10(4 / 2)) and np.isclose(q["log [O III] / Hβ"][0], np.log10(3)) and np.isnan(q["log Hα / Hβ"][1])
    assert q["active nucleus"].tolist() == [1, 0] and q["log specific SFR"].tolist() == [0, 0]
    with pytest.raises(BadInput, match="sigma_v"): truth_quantities(truth.drop(columns="sigma_v"))


# classes ------------------------------------------------------------------------------------------------------------------

def test_classes():
    truth = pd.DataFrame([("star-forming", "none", "star-forming"), ("starburst", "none", "star-forming"), ("quiescent", "retired", "quiescent"),
                          ("quiescent", "type 2", "AGN"), ("starburst", "type 1", "AGN"), ("green valley", "none", "green valley"),
                          ("post-starburst", "none", "post-starburst"), ("post-starburst", "type 2", "post-starburst")], columns=["kind", "agn", "class"])
    assert galaxy_class(truth).tolist() == truth["class"].tolist() and set(truth["class"]) == set(CLASSES)
    with pytest.raises(BadInput, match="agn"): galaxy_class(truth[["kind"]])
    with pytest.raises(BadInput, match="irregular"): galaxy_class(truth.assign(kind="irregular"))


def test_rare_classes_lie_on_top():
    rng = np.random.default_rng(0)
    classes = rng.permutation(np.repeat(["post-starburst", "quiescent", "star-forming", "odd"], [4, 500, 600, 30]))
    z = rng.normal(size=(len(classes), 3))
    drawn = sorted(plot_latent_map(z, classes, 3, 1).collections, key=lambda c: c.get_zorder())
    assert [c.get_label() for c in drawn] == ["star-forming (600)", "quiescent (500)", "odd (30)", "post-starburst (4)"]
    assert drawn[-1].get_sizes()[0] > 4 * drawn[0].get_sizes()[0]
    assert np.array_equal(drawn[-1].get_offsets(), z[classes == "post-starburst"][:, [2, 0]])


def test_latents_are_counted_from_one():
    z, classes = np.zeros((5, 3)), ["AGN"] * 5
    for i, j in ((0, 1), (1, 4)):
        with pytest.raises(BadInput, match="counted from 1 to 3"): plot_latent_map(z, classes, i, j)
    with pytest.raises(BadInput, match="classes"): plot_latent_map(z, classes[:4])
