"Flags of cutouts: every fault at several strengths and places, and none where there is none."
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from spectranb.core import BANDS, real_dir
from spectranb.data.cutouts import Cutout, read_cutout
from spectranb.data.quality import ARTEFACTS, LIMITS, _longest, _steps, flags_table, noise, quality_flags

SIGMA = np.array([0.006, 0.008, 0.009, 0.02, 0.046])                 # nanomaggies per pixel: PS1 stacks
COLOURS = np.array([0.5, 1.0, 1.4, 1.8, 2.0])
Y, X = np.indices((224, 224))


def moffat(flux, x, y, fwhm=1.2):
    "A star, nanomaggies."
    r2 = ((X - x) ** 2 + (Y - y) ** 2) * 0.25**2
    profile = (1 + r2 / (fwhm / 2) ** 2 * (2 ** (1 / 3) - 1)) ** -3
    return flux * profile / profile.sum()


def galaxy(seed=0, flux=150.0, re=3.0, at=(112, 112), clumps=0):
    "An exponential disc in five bands with correlated noise; `clumps` bright knots in its arms."
    rng = np.random.default_rng(seed)
    q, a = rng.uniform(0.4, 1), rng.uniform(0, np.pi)
    dx, dy = (X - at[0]) * 0.25, (Y - at[1]) * 0.25
    r = np.hypot(np.cos(a) * dx + np.sin(a) * dy, (np.cos(a) * dy - np.sin(a) * dx) / q) + 0.3
    disc = np.exp(-1.68 * r / re); disc *= flux / disc.sum()
    for _ in range(clumps):
        t, d = rng.uniform(0, 2 * np.pi), rng.uniform(1, 2) * re * 4
        disc += moffat(flux * 0.01, at[0] + d * np.cos(t), at[1] + d * np.sin(t))
    white = rng.standard_normal((5, 225, 225))
    shared = (white[:, 1:, 1:] + 0.4 * white[:, :-1, 1:] + 0.4 * white[:, 1:, :-1] + 0.16 * white[:, :-1, :-1]) / 1.16
    return (disc * COLOURS[:, None, None] + shared * SIGMA[:, None, None]).astype(np.float32)


def flags(image): return {f for f in LIMITS if quality_flags(image)[f]}


@pytest.mark.parametrize("seed, kw", [(0, {}), (1, dict(flux=5000.0, re=12.0)), (2, dict(flux=20.0, re=1.5)), (3, dict(clumps=8, re=5.0)), (4, dict(flux=1000, clumps=15, re=8.0)), (5, dict(flux=30, re=5.0)), (6, dict(at=(112.5, 111.5)))])
def test_good_images_have_no_flags(seed, kw): assert flags(galaxy(seed, **kw)) == set()


def test_noise():
    rng = np.random.default_rng(0)
    for sigma in 1e-3, 5.0: assert noise(rng.normal(3, sigma, (224, 224))) == pytest.approx(sigma, rel=0.03)
    holes = rng.normal(0, 1, (224, 224)); holes[rng.random((224, 224)) < 0.6] = np.nan
    assert noise(holes) == pytest.approx(1, rel=0.05) and np.isnan(noise(np.full((9, 9), np.nan)))


@pytest.mark.parametrize("bands", ["g", "gy", "riz", "grizy"])
def test_missing_bands(bands):
    image = galaxy(1)
    gone = [BANDS.index(b) for b in bands]
    image[gone] = np.nan
    q = quality_flags(Cutout(image, header={bands[0]: {}}))
    assert q["n_missing"] == len(bands) and q["missing_band"] and q["missing_bands"] == bands and q["empty_bands"] == bands[0]
    if bands != "grizy": assert flags(image) == {"missing_band"}


@pytest.mark.parametrize("columns", [5, 30, 100])
def test_missing_pixels(columns):
    image = galaxy(2); image[1:3, :, :columns] = np.nan
    q = quality_flags(image)
    assert q["nan_fraction"] == pytest.approx(columns / 224) and q["centre_nan_fraction"] == 0 and flags(image) == {"many_nan"}
    image = galaxy(2); image[3, 112, 120] = np.nan
    assert flags(image) == {"centre_nan"} and quality_flags(image)["n_saturated"] == 0


@pytest.mark.parametrize("band", range(5))
def test_saturation(band):
    image = galaxy(3); image[band, 111:114, 111:114] = 150.0
    assert flags(image) >= {"saturated_core"} and quality_flags(image)["n_saturated"] == 9
    image = galaxy(3) + moffat(3e4, 150, 60).astype("f4"); image[:, moffat(3e4, 150, 60) > 50] = np.nan
    q = quality_flags(image)                                         # a saturated star beside it
    assert q["bright_neighbour"] and q["neighbour_ratio"] == np.inf and not q["saturated_core"]
    level = {b: dict(saturation=2.0) for b in BANDS}                 # the header's own level counts
    bright = galaxy(3); bright[:, 112, 112] = 1.9
    assert quality_flags(Cutout(bright, header=level))["saturated_core"] and not quality_flags(bright)["saturated_core"]


@pytest.mark.parametrize("shift", [0, 3, 5, 12, 20])
def test_offset(shift):
    q = quality_flags(galaxy(4, at=(112 + shift * 0.6, 112 - shift * 0.8)))
    assert q["offset"] == pytest.approx(shift * 0.25, abs=0.36) and q["off_centre"] == (shift > 9)


def test_nothing_at_the_target():
    q = quality_flags(galaxy(5, flux=0.0))
    assert np.isnan(q["offset"]) and q["off_centre"] and not q["artefact"]


@pytest.mark.parametrize("x, y", [(160, 112), (30, 30), (200, 112)])
def test_neighbours(x, y):
    own = galaxy(6)
    ratio = lambda flux: quality_flags(own + COLOURS[:, None, None] * moffat(flux, x, y))["neighbour_ratio"]
    assert ratio(1000.0) > 1 > ratio(20.0) > 0 and ratio(1000.0) == pytest.approx(10 * ratio(100.0), rel=0.1)
    assert flags((own + COLOURS[:, None, None] * moffat(2000.0, x, y)).astype("f4")) == {"bright_neighbour"}


@pytest.mark.parametrize("band", range(5))
@pytest.mark.parametrize("depth, found", [(0.3, False), (3.0, True)])
def test_negative_bowls(band, depth, found):
    image = galaxy(7); image[band] -= (depth * SIGMA[band] * np.exp(-((X - 50) ** 2 + (Y - 170) ** 2) / 800)).astype("f4")
    assert flags(image) == ({"negative_sky"} if found else set())
    image = galaxy(7) - (0.3 + 2 * found) * SIGMA[:, None, None]     # the whole sky too low
    assert ("negative_sky" in flags(image)) == found


@pytest.mark.parametrize("band, angle", list(zip(range(5), [0, 20, 45, 90, 133])))
def test_trails(band, angle):
    t = np.radians(angle)
    across = (X - 80) * np.sin(t) - (Y - 60) * np.cos(t)
    image = galaxy(8); image[band] += (5 * SIGMA[band] * np.exp(-(across / 2.5) ** 2)).astype("f4")
    q = quality_flags(image)
    assert q["trail"] and q["trail_length"] > 20
    everywhere = galaxy(8) + (5 * SIGMA[:, None, None] * np.exp(-(across / 2.5) ** 2)).astype("f4")
    assert not quality_flags(everywhere)["trail"]                    # in all bands it is in the sky: an edge-on neighbour


def test_length_of_a_line():
    mask = np.zeros((224, 224), bool); mask[50, 20:141] = True
    assert _longest(mask) == pytest.approx(121 * 0.25, rel=0.02)
    mask[10:60, 10:60] = True
    assert _longest(mask) == 0 or _longest(mask) < 121 * 0.25        # a block is no trail


@pytest.mark.parametrize("band", range(5))
def test_ghosts(band):
    image = galaxy(9); image[band] += (3 * SIGMA[band] * (np.hypot(X - 60, Y - 60) < 30)).astype("f4")
    q = quality_flags(image)
    assert q["ghost"] and q["single_band_fraction"] == pytest.approx(np.pi * 30**2 / 224**2, rel=0.35)


@pytest.mark.parametrize("axis, band", [(1, 0), (2, 1), (1, 2), (2, 3), (1, 4)])
def test_steps(axis, band):
    for height in 0.1, 1.0, -1.0:
        image = galaxy(10); image[band][(Y if axis == 1 else X) > 150] += height * SIGMA[band]
        q = quality_flags(image)
        assert q["step"] == (abs(height) == 1) and (abs(height) < 1 or 0.6 < q["sky_step"] < 1.2)
    image = galaxy(10); image[band] += SIGMA[band] * (Y / 30)        # a slope is no step
    assert not quality_flags(image)["step"]
    row = galaxy(10); np.moveaxis(row, axis, 0)[77, band] += 2 * SIGMA[band]
    assert quality_flags(row)["step"]


def test_steps_in_closed_form():
    p = np.zeros(200); p[90:] = 0.7
    assert _steps(p) == pytest.approx(0.7) and _steps(np.arange(200.0)) == pytest.approx(0, abs=1e-9) and _steps(np.full(200, np.nan)) == 0
    p = np.zeros(200); p[100] = 3
    assert _steps(p) == pytest.approx(1.5) and _steps(np.zeros(30)) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2 ** 31), st.sampled_from([8, 31, 64, 100]), st.floats(0, 1))
def test_anything_gets_flags(seed, size, share):
    rng = np.random.default_rng(seed)
    image = rng.normal(0, 1, (5, size, size)).astype(np.float32) * 10.0 ** rng.integers(-4, 5)
    image[rng.random(image.shape) < share] = np.nan
    image[rng.random(5) < 0.2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = quality_flags(image)
    assert set(LIMITS) <= set(q) and all(isinstance(q[f], bool) for f in (*LIMITS, "artefact", "flagged"))


def test_constant_and_float16_images():
    assert quality_flags(np.zeros((5, 64, 64)))["off_centre"]
    image = galaxy(11)
    assert flags(image.astype(np.float16)) == flags(image) == set()


def test_table():
    bad = galaxy(12); bad[4] = np.nan
    t = flags_table([Cutout(galaxy(12), "a"), Cutout(bad, "b")])
    assert t["name"].tolist() == ["a", "b"] and t["missing_band"].tolist() == [False, True] and t["flagged"].tolist() == [False, True] and t["missing_bands"].tolist() == ["", "y"]
    assert t[list(LIMITS)].dtypes.eq(bool).all() and len(flags_table([])) == 0 and list(flags_table([])) == list(t)
    assert flags_table(np.stack([galaxy(12), bad]))["name"].tolist() == ["0", "1"]


@pytest.mark.skipif(real_dir() is None, reason="the real example cutouts are missing")
def test_the_real_spiral_lacks_only_y():
    q = quality_flags(read_cutout(sorted((real_dir() / "ps1_cutouts").glob("*.fits")), size=224))
    assert [f for f in LIMITS if q[f]] == ["missing_band"] and not any(q[f] for f in ARTEFACTS) and 1.4 < q["offset"] < 1.7
