"""Make the network that ships with the package: simulate, train, calibrate, measure on other galaxies, write bundle and card.

    python benchmarks/ship_network.py [--n 10000] [--epochs 10] [--work FOLDER] [--out spectranb/bundled/predictor]

FOLDER keeps survey and network, so that an interrupted run goes on. The recipe has the lowest mean error over three seeds of `spectranb experiment ablation`
(`spectranb.table1.BETTER`) with bands left out in training, since real cutouts lack some. The VAE is the one that ships.
"""
import argparse
from pathlib import Path

from spectranb.core import BANDS, PIXEL_SCALE, BadInput, atomic_write, real_dir
from spectranb.data.cutouts import read_cutout
from spectranb.data.fluxcal import synthetic_photometry
from spectranb.data.mock import simulate_survey
from spectranb.data.survey import Survey
from spectranb.demo import calibrated_predictor, evaluate, usable_parts
from spectranb.predict import coverage
from spectranb.results import CEILING
from spectranb.table1 import BETTER, with_ingredients
from spectranb.training import TrainedNetwork, train_network
from spectranb.vae import SpectrumVAE

COMMAND, SEED, DROPOUT = "python benchmarks/ship_network.py", 81, 0.05
RECIPE = with_ingredients(BETTER, crop=128, bin=2)
MAGNITUDES = dict(g=15.32, r=14.48, i=14.08)                # of the spiral within 15″, measured independently from the same PS1 images
CARD = """# A network that learned from simulated galaxies

Everything here was learned from **{n_train:,} simulated galaxies** (`spectranb.data.mock`, seed {seed}), not from observed ones. `Predictor.load()`
without arguments opens it: *grizy* cutouts of {field:.0f}″ (or larger) in, rest-frame spectra from 3388 to 8310 Å with errors out.

| | |
|---|---|
| network | {arch}, {parameters:,} parameters, float16 on disk; images of {crop} × {crop} pixels of 0.25″{binned} |
| recipe | {epochs} epochs, {recipe}, turns of up to 10°, {dropout:.0%} of the bands left out; {seconds:.0f} s on {machine}, shared with other work |
| spectra | the VAE of `bundled/vae`, six latents |
| errors | calibrated on {n_calibration:,} galaxies of the same simulation, for each set of bands |
| command | `{command}` |
| versions | torch {torch}, numpy {numpy}, python {python} |

## Measured on {n_held:,} simulated galaxies of other patches of the sky

Half of them calibrated the errors; the shares within ±σ are of the other half.

| | |
|---|---|
{metrics}
| observed flux within ±1σ / ±2σ (wanted: 68.3 % / 95.4 %) | {inside1:.1%} / {inside2:.1%} |
| one band missing: factor on the MSE | {removal} |

## On a real galaxy

{real}

## Do not use it for

- science with single galaxies: what it says of a real galaxy is what a simulated one with this image would have;
- images of other surveys, other filters, other pixels than 0.25″, or without the source in the centre;
- redshifts above 0.36, *r* < 13.5 or *r* > 17.8, stars, quasars, mergers: none were simulated;
- quoted errors on real data: they are calibrated on simulated galaxies only.

Train on a real survey with `spectranb train`; see the tutorial [real_survey](../../../nbs/tutorials/real_survey.ipynb).
Licence of the weights: Apache-2.0, as the package.
"""


def train(survey, latents, parts, a, network_folder):
    "`TrainedNetwork`, from the folder if it is there."
    try: return TrainedNetwork.load(network_folder)
    except BadInput: pass
    recipe = RECIPE | dict(cbs=[make() for make in RECIPE.get("cbs", ())])
    network = train_network(survey.cutouts, latents, *parts, epochs=a.epochs, rotate=10.0, band_dropout=DROPOUT, **recipe)
    network.save(network_folder)
    return network


def metrics_rows(table, arch):
    "Lines of the card."
    latent, names = table["latent_mse"].drop(CEILING, errors="ignore"), {arch: "**this network**"}
    return "\n".join(f"| latent MSE, {names.get(name, name)} | {value:.3f} |" for name, value in latent.sort_values().items())


def real_galaxy(predictor, redshifts=(0.02, 0.04)):
    "Text: what it makes of the Pan-STARRS cutouts among the real files."
    folder = real_dir()
    if folder is None: return "Not tried: the folder of real files was not there."
    image = read_cutout(sorted((folder / "ps1_cutouts").glob("*.fits")), name="PS1 barred spiral")
    p, colour = predictor.predict(image, tta=True), lambda a, b: MAGNITUDES[a] - MAGNITUDES[b]
    colours = [synthetic_photometry(p.flux, [z], filters="ps1").mag[0] for z in redshifts]
    said = "; ".join(f"z = {z:g}: {m[0] - m[1]:.2f} and {m[1] - m[2]:.2f}" for z, m in zip(redshifts, colours))
    return (f"A barred spiral of r = 14.5 (Pan-STARRS stack cutouts, no *y*; flag: \"{p.flags[0]}\"). Its colours within 15″ are g − r = {colour('g', 'r'):.2f} and r − i = {colour('r', 'i'):.2f}; "
            f"those of the predicted spectrum, put at an assumed redshift (its own is not among the files): {said}. Mean σ of the predicted flux {p.sigma.mean():.1%} of its rms. There is no spectrum of it to compare with.")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=10_000, help="simulated galaxies (default: 10000)")
    p.add_argument("--epochs", type=int, default=10, help="(default: 10)")
    p.add_argument("--work", default="ship_network", metavar="FOLDER", help="for survey and network (default: ship_network)")
    p.add_argument("--out", default="spectranb/bundled/predictor", metavar="FOLDER", help="(default: spectranb/bundled/predictor)")
    a = p.parse_args()
    folder, vae = Path(a.work) / "survey", SpectrumVAE.load()
    survey = Survey.open(folder) if (folder / "survey.json").exists() else simulate_survey(folder, a.n, seed=SEED, size=RECIPE["crop"])
    train_idx, held = usable_parts(survey, "healpix", 12345)
    calibrate, test = held[::2], held[1::2]
    network = train(survey, vae.encode(survey.spectra, survey.ivar), (train_idx, held), a, Path(a.work) / "network")
    predictor = calibrated_predictor(network, vae, survey, train_idx, calibrate, n_test=len(test), split="healpix", split_seed=12345, note="learned from simulated galaxies only",
                                     command=COMMAND if (a.n, a.epochs) == (10_000, 10) else f"{COMMAND} --n {a.n} --epochs {a.epochs}")
    info = predictor.info
    result = evaluate(predictor, survey)
    judged = coverage(survey.spectra[result.rows][result.test], result.prediction.flux[result.test], result.prediction.sigma[result.test], survey.ivar[result.rows][result.test])
    info["metrics"] = dict(latent_mse=result.metrics["latent_mse"].to_dict(), sigma_factor=predictor.errors.scale)
    config, ratio = network.config, result.removal["ratio to all"]
    rows = dict(n_held=len(result.rows), metrics=metrics_rows(result.metrics, network.arch), inside1=judged.loc["all", "within 1σ"], inside2=judged.loc["all", "within 2σ"],
                removal=", ".join(f"*{b}* {ratio[b]:.2f}" for b in BANDS), real=real_galaxy(predictor))
    what = dict(seed=SEED, arch=network.arch, parameters=sum(q.numel() for q in network.net.parameters()), epochs=config["epochs"], recipe=", ".join(BETTER),
                seconds=config["seconds"], field=network.transform.crop * PIXEL_SCALE, crop=network.transform.crop, binned="" if network.transform.bin == 1 else f", summed {network.transform.bin} × {network.transform.bin}", dropout=DROPOUT)
    card = CARD.format(**info | what | rows)
    predictor.save(a.out, half=True)
    with atomic_write(Path(a.out) / "README.md") as tmp: Path(tmp).write_text(card)
    print(card)
