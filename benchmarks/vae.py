"""Training the spectrum VAE: seconds an epoch, and seconds to the same validation loss, beside the published kind of loop.

    python benchmarks/vae.py [--n 48000] [--rounds 3] [--epochs 30] [--spectra FILE.npz] [--only epochs|loss]

The other side is the loop as it is published, written anew from its description: a `DataLoader` that fetches one spectrum
at a time, batches of 64, the encoder run twice a step (once for the reconstruction, once for the sample that the MMD
sees), leaky ReLU layers 1000-549-110-10, Adam 1e-3 with the plateau schedule. Epochs of the two take turns. For the second
comparison each is trained from its start and its validation loss (the same function for both, on the same spectra held
back; its time is not counted) is followed: the published loop until it stops by itself or has run --epochs, ours until it reaches that loss.

Spectra are simulated (seed 71; about 10 ms each on two cores) or read from FILE, which is written when missing.
"""
import argparse
import os
import platform
import resource
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from spectranb.data.mock import simulate_spectra
from spectranb.data.spectra import fit_gap_basis
from spectranb.vae import InfoVAE, TrainingSet, _epoch, kl_divergence, start_from_pca, train_vae

LAM, HELD = 100.0, 4000


def spectra(n, path):
    "TrainingSet of n simulated spectra."
    if path and Path(path).is_file(): d = np.load(path)
    else:
        d = simulate_spectra(n, seed=71, progress=True)
        if path: np.savez(path, flux=d["flux"], ivar=d["ivar"])
    return TrainingSet.make(d["flux"][:n], d["ivar"][:n])


def published_network(seed=0):
    torch.manual_seed(seed)
    return InfoVAE(activation="leaky_relu", linear=False)


def our_network(data, seed=0):
    torch.manual_seed(seed); net = InfoVAE()
    start_from_pca(net, data.basis.loadings, data.weight.mean(0, dtype=torch.float64))
    return net


def kernel_mean(x, y): return torch.exp(-((x[:, None] - y[None]) ** 2).mean(2)).mean()


class PublishedLoop:
    "One epoch a call."
    def __init__(self, net, x, weight, batch_size=64):
        self.net, self.rows = net, DataLoader(TensorDataset(x, weight), batch_size, shuffle=True)
        self.optimiser = torch.optim.Adam(net.parameters(), 1e-3)

    def step(self, x, weight):
        decoded, mu, logvar, _ = self.net(x)
        again = self.net.encode(x)                                   # the second run of the encoder, for the MMD's sample
        z = again[0] + (again[1] / 2).exp() * torch.randn_like(again[0])
        prior = torch.randn(200, z.shape[1])
        gap = kernel_mean(z, z) + kernel_mean(prior, prior) - 2 * kernel_mean(z, prior)
        loss = (weight * (x - decoded) ** 2).sum() / 2 + kl_divergence(mu, logvar).sum() + (LAM - 1) * gap * len(x) * z.shape[1]
        self.optimiser.zero_grad(); (loss / len(x)).backward(); self.optimiser.step()
        return loss.item()

    def epoch(self):
        self.net.train()
        for x, weight in self.rows: self.step(x, weight)


def seconds(call):
    start = time.perf_counter(); call()
    return time.perf_counter() - start


def compare_epochs(data, rounds):
    "Median seconds an epoch over the first n - HELD spectra, taking turns."
    x, weight = data.x[HELD:], data.weight[HELD:]
    loop, nets = PublishedLoop(published_network(), x, weight), (published_network(), our_network(data), our_network(data))
    ours = lambda net, size: train_vae(net, x, weight, epochs=1, batch_size=size, lr=1e-3, valid=0, lam=LAM, progress=False)
    calls = {"published loop, batch 64": loop.epoch, "ours, same network, batch 64": lambda: ours(nets[0], 64),
             "ours, GELU and linear path, batch 64": lambda: ours(nets[1], 64), "ours, GELU and linear path, batch 128 (default)": lambda: ours(nets[2], 128)}
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items(): times[name].append(seconds(call))
    base = np.median(times["published loop, batch 64"])
    print(f"\nan epoch of {len(x):,} × 1000 spectra, median of {rounds} (range), taking turns")
    for name, t in times.items(): print(f"  {name:48s} {np.median(t):6.2f} s ({min(t):.2f}-{max(t):.2f})   {base / np.median(t):5.2f} ×")


@torch.no_grad()
def held_loss(net, data):
    "Mean loss of the spectra held back, with fixed random numbers."
    return _epoch(net.eval(), data.x, data.weight, torch.arange(HELD), 1000, None, torch.Generator().manual_seed(0), lam=LAM)[-1]


def published_to_its_end(data, epochs):
    "Seconds of training and validation loss after each epoch; stops after 10 epochs without an improvement of 1e-3."
    loop = PublishedLoop(published_network(), data.x[HELD:], data.weight[HELD:])
    plan, spent, best, since, rows = torch.optim.lr_scheduler.ReduceLROnPlateau(loop.optimiser, patience=5, threshold=1e-3), 0.0, np.inf, 0, []
    for epoch in range(epochs):
        spent += seconds(loop.epoch); loss = held_loss(loop.net, data); plan.step(loss); rows.append((spent, loss))
        since = 0 if loss < best * (1 - 1e-3) else since + 1; best = min(best, loss)
        print(f"  published loop, epoch {epoch + 1}: {spent:.1f} s, validation loss {loss:.2f}", flush=True)
        if since >= 10: break
    return rows


def ours_to(data, target, epochs, batch_size, net):
    "Seconds of training until the validation loss is at most `target`, and the loss at the end."
    spent, last, reached = 0.0, [time.perf_counter()], []
    def callback(epoch, row):
        nonlocal spent
        spent += time.perf_counter() - last[0]; loss = held_loss(net, data); net.train()
        print(f"  ours, epoch {epoch + 1} of {epochs}: {spent:.1f} s, validation loss {loss:.2f}", flush=True)
        if loss <= target and not reached: reached.append(spent)
        last[0] = time.perf_counter()
    train_vae(net, data.x[HELD:], data.weight[HELD:], epochs=epochs, batch_size=batch_size, lam=LAM, valid=0, callback=callback, progress=False)
    return reached[0] if reached else float("nan"), spent, held_loss(net, data)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n", type=int, default=48_000, help="spectra to train on (default: 48000)")
    p.add_argument("--rounds", type=int, default=3, help="epochs of each loop in the first comparison (default: 3)")
    p.add_argument("--epochs", type=int, default=30, help="at most so many of the published loop in the second comparison (default: 30)")
    p.add_argument("--ours", type=int, default=12, help="epochs of our schedule in the second comparison (default: 12)")
    p.add_argument("--spectra", metavar="FILE", help="npz with flux and ivar; written when missing")
    p.add_argument("--only", choices=("epochs", "loss"), help="one of the two comparisons")
    a = p.parse_args()
    data = spectra(a.n + HELD, a.spectra)
    print(f"{data}; {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores; {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
    if a.only != "loss": compare_epochs(data, a.rounds)
    if a.only != "epochs":
        rows = published_to_its_end(data, a.epochs)
        target = min(loss for _, loss in rows); spent = next(s for s, loss in rows if loss == target)
        print(f"published loop: best validation loss {target:.2f} after {spent:.0f} s, stopped after {len(rows)} epochs and {rows[-1][0]:.0f} s")
        reached, total, final = ours_to(data, target, a.ours, 128, our_network(data))
        print(f"ours, {a.ours} epochs of one cycle, batch 128: that loss reached after {reached:.1f} s ({spent / reached:.1f} ×); at the end {final:.2f} after {total:.0f} s")
