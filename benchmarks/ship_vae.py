"""Make the spectrum VAE that ships with the package: simulate, train, measure on other galaxies, write weights and card.

    python benchmarks/ship_vae.py [--n 52000] [--epochs 40] [--work FOLDER] [--out spectranb/bundled/vae]

FOLDER keeps the simulated spectra and the training's checkpoint, so that an interrupted run goes on. Everything is
simulated: seed 71 to train on (5 % of it held back for the history), seed 72 to measure. On two cores the simulation
takes about ten minutes and an epoch five to ten seconds.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from spectranb.anomaly import AnomalyScore, keep_score, score_table
from spectranb.comparators import SpectrumPCA, compare_coders, latent_statistics
from spectranb.core import REST_WAVELENGTH, atomic_write
from spectranb.data.mock import calibration_error, simulate_spectra
from spectranb.vae import SpectrumVAE, TrainingSet, calibrate_posterior

COMMAND = "python benchmarks/ship_vae.py"
CARD = """# A spectrum VAE that learned from simulated galaxies

These weights were trained on **{n:,} simulated spectra** (`spectranb.data.mock`, seed 71), not on observed ones.
They turn a rest-frame galaxy spectrum (1000 bins, log10 λ = 3.53 + 0.00039 i, vacuum Å, 3388 to 8310 Å) into {k} latents and back.

| | |
|---|---|
| network | {network} |
| loss | InfoVAE, α = {alpha}, λ = {lam} (Portillo et al. 2020; Zhao et al. 2019) |
| training | {epochs} epochs, Adam in one cycle to 3e-3, batches of 128, seed {seed}; {seconds:.0f} s on one thread of a shared machine |
| command | `{command}` |
| versions | torch {torch}, numpy {numpy}, python {python} |

## Measured on {held:,} simulated spectra of another seed (72)

| | |
|---|---|
| mean reduced χ², all bins | {chi2_all:.3f} (1 is perfect; a PCA of six components, fitted to 12,000 of the same training spectra: {pca_all:.3f}) |
| mean reduced χ², continuum / 4000 Å break / lines | {chi2_continuum:.3f} / {chi2_break:.3f} / {chi2_lines:.3f} (PCA: {pca_continuum:.3f} / {pca_break:.3f} / {pca_lines:.3f}) |
| latents: MMD² to a standard normal, mean absolute correlation | {mmd}, {correlation} |
| encoder's σ, factor to calibrate it, by latent | {factor} |
| σ of latents by errors of flux calibration (5.5 % rms, smooth), by latent | {smooth} |
| anomaly score: threshold for {rate:.1%} of simulated galaxies | {threshold:.2f} |

## Do not use it for

- spectra off its grid, at observed wavelengths, or in air wavelengths: they are refused or, worse, encoded;
- measuring stellar populations or abundances: latents follow the simulation's stellar library, which has solar abundance ratios;
- quasars, stars, redshifts above 0.36, or a redshift that is in doubt: look at the anomaly score first;
- statements about real galaxies' line ratios: no real star-forming galaxy has been held against it;
- comparison with published latents: each training has latents of its own.

Licence of the weights: Apache-2.0, as the package.
"""


def spectra(n, seed, path):
    "dict of arrays and tables, from the file if it is there."
    tables = {name: path.with_name(f"{path.stem}_{name}.parquet") for name in ("catalog", "truth")}
    if path.is_file() and all(f.is_file() for f in tables.values()):
        with np.load(path) as z: return {k: z[k][:n] for k in ("flux", "ivar", "noiseless")} | {k: pd.read_parquet(f)[:n] for k, f in tables.items()}
    d = simulate_spectra(n, seed=seed, progress=True)
    for name, f in tables.items(): d[name].to_parquet(f)
    with atomic_write(path) as tmp:
        with open(tmp, "wb") as file: np.savez(file, **{k: d[k] for k in ("flux", "ivar", "noiseless")})
    return d


def measure(vae, held, train):
    "Calibrated posterior, anomaly score and figures of the card; `vae.info` is changed."
    rng = np.random.default_rng(0)
    some = rng.choice(len(held["flux"]), min(150, len(held["flux"])), replace=False)
    z = held["catalog"].redshift.to_numpy()
    distort = lambda g, i: calibration_error(g, REST_WAVELENGTH * (1 + z[some[i]]))
    calibrated = calibrate_posterior(vae, held["noiseless"][some], held["ivar"][some], distort, n_draws=60)
    score = AnomalyScore.fit(vae, held["flux"], held["ivar"], rate=0.005); keep_score(score)
    pca = SpectrumPCA.fit(train["flux"][:12000], train["ivar"][:12000], 6)
    table = compare_coders({"vae": vae, "pca": pca}, held["flux"], held["ivar"])
    kinds = ("all", "continuum", "break", "lines")
    figures = {f"{a}_{k}": float(table.loc[b, f"reduced χ², {k} [per bin]"]) for a, b in (("chi2", "vae"), ("pca", "pca")) for k in kinds}
    return figures, calibrated, score, latent_statistics(vae.encode(held["flux"], held["ivar"]))


def write_card(vae, out, held, figures, calibrated, score, statistics):
    numbers = lambda column: ", ".join(f"{v:.2f}" for v in calibrated[column])
    info, config = vae.info, vae.net.config
    sizes = "-".join(map(str, (config["n_wave"], *config["hidden"], config["n_latent"])))
    together = statistics[1]
    card = CARD.format(n=info["n_train"], k=vae.n_out, network=f"{sizes} and back, {config['activation']}, with a linear path; {sum(p.numel() for p in vae.net.parameters()):,} parameters",
        alpha=info["alpha"], lam=info["lam"], epochs=len(vae.history), seed=info["seed"], seconds=vae.history.seconds.iloc[-1], command=info["command"], torch=info["torch"], numpy=info["numpy"],
        python=info["python"], held=len(held["flux"]), factor=numbers("factor"), smooth=numbers("σ of calibration"), rate=score.rate, threshold=score.threshold,
        mmd=f"{together['MMD²']:.4f} ± {together['error of MMD²']:.4f}", correlation=f"{together['mean |Spearman|']:.3f} (ranks)", **figures)
    with atomic_write(Path(out) / "README.md") as tmp: Path(tmp).write_text(card)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=52_000, help="simulated spectra to train on (default: 52000)")
    p.add_argument("--held", type=int, default=4000, help="simulated spectra to measure on (default: 4000)")
    p.add_argument("--epochs", type=int, default=40, help="(default: 40)")
    p.add_argument("--work", default="ship_vae", metavar="FOLDER", help="for spectra and checkpoint (default: ship_vae)")
    p.add_argument("--out", default="spectranb/bundled/vae", metavar="FOLDER", help="for weights and card (default: spectranb/bundled/vae)")
    a = p.parse_args()
    work = Path(a.work); work.mkdir(parents=True, exist_ok=True)
    held, train = spectra(a.held, 72, work / "test.npz"), spectra(a.n, 71, work / "train.npz")
    vae = SpectrumVAE.fit(TrainingSet.make(train["flux"], train["ivar"]), epochs=a.epochs, valid=0.05, seed=0, checkpoint=work / "ship.pt")
    vae.info |= dict(data=f"{a.n:,} simulated spectra, spectranb.data.mock, seed 71", command=COMMAND if (a.n, a.epochs) == (52_000, 40) else f"{COMMAND} --n {a.n} --epochs {a.epochs}")
    figures, calibrated, score, statistics = measure(vae, held, train)
    vae.info["metrics"] = dict(data=f"{a.held:,} simulated spectra, seed 72", **{k: round(v, 4) for k, v in figures.items()})
    vae.save(a.out); write_card(vae, a.out, held, figures, calibrated, score, statistics)
    print(Path(a.out, "README.md").read_text()); print(calibrated.round(3)); print(*statistics, sep="\n")
    print(score_table(score, held["flux"], held["ivar"]).anomalous.mean())
