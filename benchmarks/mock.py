"""What a simulated galaxy costs, beside GalSim drawing the two smooth Sérsic components of the same galaxies.

    python benchmarks/mock.py [--n 40] [--size 224]

One process, one thread, the two interleaved galaxy by galaxy. Ours draws everything (population, seven components,
neighbours, PSF, noise, spectrum); GalSim draws bulge and disc in five bands through a Moffat PSF, without noise.
"""
import argparse
import time

import numpy as np
from threadpoolctl import threadpool_limits

from spectranb.core import PIXEL_SCALE
from spectranb.data.mock import DEPTH, PSF_FWHM, draw_galaxy, load_templates, luminosity_distance, simulate_object


def galsim_bands(gal, size):
    "Bulge and disc of `gal` in the five bands by GalSim."
    import galsim
    s, k = gal.structure, (1 + gal.z) ** 2 / luminosity_distance(gal.z) * 206.265
    n = float(np.clip(s["sersic_n"], 0.5, 6))
    bulge = galsim.Sersic(n=n, half_light_radius=s["bulge_kpc"] * k).shear(q=s["bulge_q"], beta=s["pa"] * galsim.radians)
    q = float(np.sqrt(np.cos(s["inclination"]) ** 2 + 0.04 * np.sin(s["inclination"]) ** 2))
    disc = galsim.Exponential(scale_radius=s["disc_h_kpc"] * k).shear(q=q, beta=s["pa"] * galsim.radians)
    for fwhm in PSF_FWHM:
        psf = galsim.Moffat(beta=3.2, fwhm=fwhm)
        galsim.Convolve([bulge + disc, psf]).drawImage(nx=size, ny=size, scale=PIXEL_SCALE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=40, help="galaxies (default 40)")
    parser.add_argument("--size", type=int, default=224, help="pixels of a cutout (default 224)")
    args = parser.parse_args()
    templates, ours, theirs = load_templates(), [], []
    with threadpool_limits(1):
        simulate_object(0, 0, templates, args.size)                  # PSF library and tables
        for i in range(args.n):
            begin = time.process_time()
            simulate_object(0, i, templates, args.size)
            middle = time.process_time()
            galsim_bands(draw_galaxy(np.random.default_rng([0, i]), templates), args.size)
            ours.append(middle - begin)
            theirs.append(time.process_time() - middle)
    a, b = np.median(ours) * 1e3, np.median(theirs) * 1e3
    print(f"{args.n} galaxies of {args.size} px, {len(DEPTH)} bands; processor time per galaxy, median (16–84 %)")
    for name, t in (("spectranb, everything", ours), ("GalSim, bulge and disc", theirs)):
        lo, hi = np.percentile(t, [16, 84]) * 1e3
        print(f"  {name:24s} {np.median(t) * 1e3:7.1f} ms ({lo:.1f}–{hi:.1f})")
    print(f"  ratio {b / a:.1f}")


if __name__ == "__main__":
    main()
