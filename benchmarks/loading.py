"""Loading images: one file a galaxy as published, beside ours, beside what the network takes.

    python benchmarks/loading.py                              # 224 × 224; batch 32 on a CPU, 128 on a GPU
    python benchmarks/loading.py --size 64 --n 512 --rounds 3

Images a second, from disk to batches that the network can take, each with the stretch, the eight symmetries of the square and turns of up to 10°:

(i)   as published: one .npy a galaxy, read by `np.load` in a map-style Dataset, each image stretched (NumPy's arcsinh) and turned by
      itself on the processor, put together by torch's DataLoader (`--workers` processes; 0: in this one);
(ii)  ours, stretched images resident on the device (`Images`, `Batches`);
(iii) ours, read ahead from the memory map, stretched and turned on the device batch by batch.

Beside them the training step of xresnet18_hybrid (forward, mean squared error, backward, RAdam + Lookahead; channels_last and the
precision of `fast_precision`) on a batch that is there already, and the same step fed by (iii), which shows what is lost by
waiting. The loader should deliver at least 1.5 times what the step takes.

Contenders take turns within each round, the order moves on by one each round, and a ratio is the median over rounds of two times
of the same round: other work on the machine changes the figures and hardly the ratios. On a CPU all run with freed memory kept by
the process (`keep_memory`), as `train_network` does. `--cold` drops the files from the system's
cache before each turn, as when a survey is larger than memory. The images are noise with a blob; they lie in a temporary folder that is removed.
"""
import argparse
import contextlib
import mmap
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

TARGET = 1.5
SEED = 1


def make_images(folder, n, size):
    "The same n cutouts as one array and as one file each; the memory map and the files."
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:size, :size] - size // 2
    whole = np.lib.format.open_memmap(folder / "cutouts.npy", "w+", np.float16, (n, 5, size, size))
    (folder / "each").mkdir()
    files = [folder / "each" / f"{i:06d}.npy" for i in range(n)]
    blob = np.exp(-np.hypot(x, y) / 8)
    for i, file in enumerate(files):
        whole[i] = rng.normal(0, 0.05, (5, size, size)) + rng.lognormal(0, 1, (5, 1, 1)) * blob
        np.save(file, whole[i])
    whole.flush()
    return np.load(folder / "cutouts.npy", mmap_mode="r"), files


def forget(mapped, files):
    "Drop files, one of them mapped, from the system's cache of the disk."
    mapped._mmap.madvise(mmap.MADV_DONTNEED)                             # pages that a process has mapped are not dropped
    for file in files:
        with open(file, "rb") as f:
            os.fsync(f.fileno()); os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class OneFileEach(Dataset):
    "As published: a galaxy is a file; stretch and augmentation image by image."
    def __init__(self, files, targets, transform): self.files, self.targets, self.transform = files, targets, transform
    def __len__(self): return len(self.files)

    def __getitem__(self, i):
        from spectranb.loading import rotate
        softening, mean, std = (v.numpy() for v in (self.transform.softening, self.transform.mean, self.transform.std))
        x = torch.from_numpy((np.arcsinh(np.load(self.files[i]).astype(np.float32) / softening) - mean) / std)[None]
        x = torch.rot90(x, int(torch.randint(4, ())), (-2, -1))
        if torch.rand(()) < 0.5: x = x.flip(-1)
        x = rotate(x, 20 * torch.rand(1) - 10)
        return x[0].nan_to_num(0, 0, 0), self.targets[i]


def contenders(args, cutouts, files):
    "{name: function that takes all its batches once and gives their number of images}."
    from spectranb.loading import Batches, Images, InputTransform
    transform, targets, idx = InputTransform.fit(cutouts, crop=args.size), torch.randn(args.n, 6), np.arange(args.n)
    published = DataLoader(OneFileEach(files, targets, transform), args.batch, shuffle=True, drop_last=True, num_workers=args.workers, persistent_workers=args.workers > 0,
                           pin_memory=args.device == "cuda")
    settings = dict(batch_size=args.batch, augment=True, rotate=10, shuffle=True, seed=SEED, ahead=args.ahead)
    start = time.perf_counter()
    resident = Batches(Images(cutouts, idx, transform, args.device, keep=1e18), targets, **settings)
    print(f"(ii) was made resident in {time.perf_counter() - start:.1f} s: {resident.images.kept.nbytes / 1e6:.0f} MB")
    ahead = Batches(Images(cutouts, idx, transform, args.device, keep=0), targets, **settings)
    def take(batches):
        n = 0
        for x, y in batches: n += len(x.to(args.device, non_blocking=True))
        return n
    return {"(i) one file a galaxy": lambda: take(published), "(ii) ours, resident": lambda: take(resident), "(iii) ours, read ahead": lambda: take(ahead)}, ahead


class Training:
    "Steps of the hybrid, each on the next of the given batches."
    def __init__(self, args):
        from fastai.optimizer import ranger
        from spectranb.models import xresnet18_hybrid
        from spectranb.training import fast_precision
        self.net = xresnet18_hybrid().to(args.device, memory_format=torch.channels_last).train()
        self.opt = ranger(list(self.net.parameters()), lr=1e-3, wd=1e-2)
        self.device, self.precision = args.device, fast_precision(args.device)

    def __call__(self, batches):
        n = 0
        for x, y in batches:
            with torch.autocast(self.device, self.precision, enabled=self.precision != torch.float32): out = self.net(x)
            F.mse_loss(out.float(), y).backward()
            self.opt.step(); self.opt.zero_grad()
            n += len(x)
        return n


def few(batches, k):
    "The first k batches, from the beginning of an epoch."
    stream = iter(batches)
    for _ in range(k): yield next(stream)
    stream.close()


def measure(args, runs, before):
    "{name: [(seconds, processor seconds of this process) for an image] by round}; contenders take turns."
    sync = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    figures, names = {name: [] for name in runs}, list(runs)
    for r in range(args.rounds + 1):                                     # the first round warms up and is not counted
        for name in names[r % len(names):] + names[:r % len(names)]:
            before(); sync()
            start, cpu = time.perf_counter(), time.process_time()
            n = runs[name](); sync()
            if r: figures[name].append(((time.perf_counter() - start) / n, (time.process_time() - cpu) / n))
    return figures


def report(args, figures):
    "The table, ratios, and whether the loader keeps ahead."
    step = "training step, batch at hand"
    def ratio(a, b, column=0): return statistics.median(y[column] / x[column] for x, y in zip(figures[a], figures[b]))     # how many times a's speed is b's
    print(f"\n{'':32s} {'images/s':>9s} {'worst … best':>17s} {'CPU ms/image':>13s} {'× (i)':>7s} {'× step':>7s}")
    for name, rows in figures.items():
        speeds = sorted(1 / wall for wall, _ in rows)
        print(f"{name:32s} {statistics.median(speeds):9.1f} {speeds[0]:8.1f} … {speeds[-1]:6.1f} {1e3 * statistics.median(cpu for _, cpu in rows):13.2f} {ratio(name, '(i) one file a galaxy'):7.2f} {ratio(name, step):7.2f}")
    for name in "(ii) ours, resident", "(iii) ours, read ahead":
        times = ratio(name, step)
        print(f"{name} delivers {times:.1f} times what the step takes: {'at least' if times >= TARGET else 'LESS than'} {TARGET}")
    print(f"fed by (iii) a step runs at {ratio('training step, fed by (iii)', step):.2f} of its speed with the batch at hand")
    if args.workers: print(f"the processor time of (i) is that of this process without its {args.workers} workers")


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=224, help="pixels on a side")
    p.add_argument("--n", type=int, default=0, help="galaxies (8 batches)")
    p.add_argument("--batch", type=int, default=0, help="images a batch (32 on a CPU, 128 on a GPU)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=2, help="training steps a turn")
    p.add_argument("--workers", type=int, default=0, help="processes of (i); 0: this one")
    p.add_argument("--ahead", type=int, default=2, help="batches read ahead by (iii)")
    p.add_argument("--threads", type=int, default=0, help="of PyTorch (default: as it is)")
    p.add_argument("--cold", action="store_true", help="drop the files from the system's cache before each turn")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--folder", help="where the temporary folder is made (default: the system's)")
    args = p.parse_args()
    args.batch = args.batch or (128 if args.device == "cuda" else 32)
    args.n = args.n or 8 * args.batch
    if args.n < args.batch: p.error(f"--n {args.n} is less than a batch of {args.batch}")
    if args.steps * args.batch > args.n: args.steps = args.n // args.batch
    if args.threads: torch.set_num_threads(args.threads)
    return args


def main():
    from spectranb.training import keep_memory
    args = parse()
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {where}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start")
    print(f"{args.n} galaxies of {args.size} × {args.size} pixels, batch {args.batch}, {args.rounds} rounds, {args.workers} workers for (i), {args.ahead} batches read ahead by (iii)" + (", cold files" if args.cold else ""))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        cutouts, files = make_images(Path(folder), args.n, args.size)
        runs, ahead = contenders(args, cutouts, files)
        train, (batch,) = Training(args), list(few(ahead, 1))
        runs |= {"training step, batch at hand": lambda: train([batch] * args.steps), "training step, fed by (iii)": lambda: train(few(ahead, args.steps))}
        with keep_memory() if args.device == "cpu" else contextlib.nullcontext():
            figures = measure(args, runs, (lambda: forget(cutouts, [Path(folder) / "cutouts.npy", *files])) if args.cold else (lambda: None))
    report(args, figures)
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"load {os.getloadavg()[0]:.1f} at the end; peak memory {peak:.2f} GiB" + (" of the GPU" if args.device == "cuda" else ""))


if __name__ == "__main__": main()
