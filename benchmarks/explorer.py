"""A slider of the latent explorer: from its new value to the new picture, beside drawing a fresh matplotlib figure each time.

    python benchmarks/explorer.py [--moves 200] [--naive 20] [--vae FOLDER]

The network has the published size, 1000-549-110-6, trained for an instant on simple simulated spectra: how long a redraw
takes does not depend on its weights. `--vae` takes a saved one instead. Sliders are moved in turn, at random, as a hand does;
what is timed is the slider's own callback, which decodes, draws and puts the PNG into the image widget. Both ways
alternate. The way to the browser and its screen is not in it. Set OMP_NUM_THREADS to the cores to be used.
"""
import argparse
import io
import os
import time

import numpy as np

from infill import spectra
from spectranb.core import REST_WAVELENGTH
from spectranb.explore import LatentExplorer, plot_spectrum_axes
from spectranb.vae import SpectrumVAE


def published_size():
    "A network of the published layers, ReLU, six latents."
    flux, ivar, _ = spectra(400, 6)
    return SpectrumVAE.fit(flux, ivar, hidden=(549, 110), n_latent=6, activation="relu", linear=False, epochs=3, progress=False)


def fresh_figure(flux):
    "The same picture as plainly written: figure, axes, labels, line, savefig."
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(9.0, 3.2), dpi=100)
    plot_spectrum_axes(ax)
    ax.plot(REST_WAVELENGTH, flux, lw=1)
    fig.savefig(out := io.BytesIO(), format="png")
    plt.close(fig)
    return out.getvalue()


def timed(work):
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def measure(explorer, moves, naive, seed=0):
    "ms of each redraw, by the explorer and by fresh figures."
    rng, ours, theirs = np.random.default_rng(seed), [], []
    every = max(1, moves // max(naive, 1))
    for k in range(moves):
        slider, value, before = explorer.sliders[rng.integers(len(explorer.sliders))], rng.uniform(-3, 3), explorer.image.value
        ours.append(timed(lambda: setattr(slider, "value", value)))
        assert explorer.image.value != before, "the picture has not changed"
        if k % every == 0: theirs.append(timed(lambda: fresh_figure(explorer.vae.decode(explorer.values))))
    return np.array(ours), np.array(theirs)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--moves", type=int, default=200, help="redraws by the explorer")
    p.add_argument("--naive", type=int, default=20, help="redraws by fresh figures")
    p.add_argument("--vae", help="folder of a saved SpectrumVAE")
    a = p.parse_args()
    vae = SpectrumVAE.load(a.vae) if a.vae else published_size()
    explorer = LatentExplorer(vae)
    measure(explorer, 10, 1, seed=1)                                           # warm
    ours, theirs = measure(explorer, a.moves, a.naive)
    print(f"{vae}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, picture of {len(explorer.image.value) / 1e3:.0f} kB")
    for name, ms in (("explorer", ours), ("fresh figure", theirs)):
        print(f"{name:12s}: median {np.median(ms):6.1f} ms, 95th percentile {np.percentile(ms, 95):6.1f} ms ({len(ms)} redraws)")
    print(f"ratio of medians {np.median(theirs) / np.median(ours):.1f}; {np.mean(ours < 50):.0%} of the explorer's redraws below 50 ms")
