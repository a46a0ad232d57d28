"""Filling the gaps of many spectra: time and peak memory of learning the basis and of filling, beside the plain iteration.

    python benchmarks/infill.py [--n 64000] [--components 10] [--plain]

The spectra are simulated ones, drawn from smooth components with a line or two, with the gaps that redshift makes and 2 %
of bins lost at random. Set OMP_NUM_THREADS to the cores to be used. With --plain the textbook iteration (fill with the
PCA's own prediction, PCA again) runs on the same spectra, as many rounds; its error in the gaps is printed beside ours.
"""
import argparse
import os
import resource
import time

import numpy as np

from spectranb.core import N_WAVE, REST_WAVELENGTH
from spectranb.data.spectra import fit_gap_basis, infill


def spectra(n, k, seed=0, noise=0.05, chunk=4096):
    "flux, ivar and noiseless flux, (n, 1000) float32, of mean square near 1."
    rng = np.random.default_rng(seed)
    x = np.linspace(-1, 1, N_WAVE)
    shapes = [np.cos(np.pi * j * (x + 1) / 2) / (1 + j) for j in range(1, k - 1)]
    lines = [np.exp(-0.5 * ((REST_WAVELENGTH - lam) / 5) ** 2) for lam in (5008.24, 6564.63)]
    basis = np.array([*shapes, *lines])[:k]
    flux, ivar, truth = (np.empty((n, N_WAVE), np.float32) for _ in range(3))
    for i in range(0, n, chunk):
        s = slice(i, min(i + chunk, n))
        m = s.stop - s.start
        truth[s] = 1 + 0.25 * rng.normal(size=(m, len(basis))) @ basis
        lam = REST_WAVELENGTH * (1 + rng.uniform(0.02, 0.3, (m, 1)))
        good = (lam > 3820) & (lam < 9180) & (rng.random((m, N_WAVE)) > 0.02)
        flux[s] = np.where(good, truth[s] + rng.normal(0, noise, (m, N_WAVE)), 0)
        ivar[s] = good / noise ** 2
    return flux, ivar, truth


def plain(flux, ivar, k, rounds):
    "Iterative PCA as usually written: gaps start at the mean and are read off the components, round after round."
    good, x = ivar > 0, flux.copy()
    mean = (flux * good).sum(0) / np.maximum(good.sum(0), 1)
    x[~good] = np.broadcast_to(mean, x.shape)[~good]
    for _ in range(rounds):
        centre = x.mean(0)
        _, v = np.linalg.eigh(np.cov((x - centre).T))
        v = v[:, ::-1][:, :k]
        x[~good] = (centre + (x - centre) @ v @ v.T)[~good]
    return x


def gap_error(filled, truth, ivar): return float(np.sqrt(np.mean((filled - truth)[ivar == 0] ** 2)))


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=64_000)
    p.add_argument("--components", type=int, default=10)
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--plain", action="store_true")
    a = p.parse_args()
    flux, ivar, truth = spectra(a.n, a.components)
    before = peak()
    t = [time.perf_counter()]
    basis = fit_gap_basis(flux, ivar, a.components, a.rounds); t.append(time.perf_counter())
    filled = infill(flux, ivar, basis); t.append(time.perf_counter())
    print(f"{a.n:,} spectra, {a.components} components, {np.mean(ivar == 0):.0%} of the bins missing, {os.environ.get('OMP_NUM_THREADS', 'all')} threads")
    print(f"basis {t[1] - t[0]:.1f} s, filling {t[2] - t[1]:.1f} s; peak memory {peak():.2f} GB ({before:.2f} GB before, spectra and truth included)")
    print(f"rms error in the gaps {gap_error(filled, truth, ivar):.4f} (noise 0.05)")
    if a.plain:
        start = time.perf_counter()
        other = gap_error(plain(flux, ivar, a.components, a.rounds), truth, ivar)
        seconds = time.perf_counter() - start
        print(f"plain iteration: {seconds:.1f} s, rms error {other:.4f}: {seconds / (t[2] - t[0]):.2f} times the time, "
              f"{other / gap_error(filled, truth, ivar):.1f} times the error")
