"""The hybrid network beside the published algorithm and beside plain batch normalisation: images a second, memory, accuracy.

    python benchmarks/networks.py                      # 224 × 224, batch 32 on a CPU, 128 on a GPU
    python benchmarks/networks.py --ablation           # what each step buys: predicted from the step before, then measured
    python benchmarks/networks.py --scaling --figure scaling.png
    python benchmarks/networks.py --profile            # which operations the time goes to

Contenders, all with the paper's arguments (5 bands, 6 latents, 64 groups, reduction 8, self-attention, Mish):

(a) the published algorithm as written, from arXiv:1905.11926 (algorithm 1): `unfold`, `addmm` covariance, five Newton–Schulz
    rounds, running average of the inverse root, in each of the hybrid's three deconvolution layers; the rest is made of
    fastai's own layers; NCHW, float32, eager, PyTorch's Mish;
(b) ours: the same weights in channels_last and bfloat16 autocast, eager and compiled; folded for inference. On a CPU all but the compiled are timed
    a second time with freed memory kept by the process, as `train_network` does (after a step that is not counted);
(c) xresnet18 with BatchNorm, made of fastai's layers: in float32 as (a), and under the settings of (b). Our own xresnet18
    under the same settings stands beside it, because it shares our quicker Mish and convolutions and fastai's does not.

A training step is forward, mean squared error, backward and AdamW. Contenders take turns within each round, the order moves
on by one each round, and a ratio is the median over rounds of two times of the same round. The weights are those after a short
training on toy galaxies, so that |Δ latent| is measured on latents of unit variance. A compiled contender needs a C++ compiler (on a CPU)
or Triton (on a GPU); without, it is left out and the reason printed.
"""
import argparse
import contextlib
import copy
import ctypes
import gc
import math
import os
import platform
import shutil
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

PAPER = dict(groups=64, reduction=8, act_cls=nn.Mish)


# --- (a) and (c): the published algorithm, fastai's layers ---

def newton_schulz(cov, rounds=5):
    "Coupled iteration of the paper's algorithm 1, as written."
    scale, eye = cov.norm(), torch.eye(len(cov), device=cov.device)
    y, z = cov / scale, eye
    for _ in range(rounds):
        t = 0.5 * (3.0 * eye - z @ y)
        y, z = y @ t, t @ z
    return z / scale.sqrt()


class PublishedDeconv(nn.Module):
    "One layer of network deconvolution, every step of the paper in the order of the paper; groups=1."
    def __init__(self, ni, nf, ks=3, stride=1, block=64, every=3, eps=1e-5, momentum=0.1):
        super().__init__()
        self.stride, self.padding, self.step, self.eps, self.momentum = stride, ks // 2, every * stride, eps, momentum
        block = math.gcd(min(block, ni), ni)
        self.features, self.blocks, self.ks = block * ks ** 2, ni // block, ks
        self.weight, self.bias = nn.Parameter(torch.empty(nf, ni, ks, ks)), nn.Parameter(torch.zeros(nf))
        nn.init.kaiming_uniform_(self.weight)
        self.register_buffer("running_mean", torch.zeros(self.features))
        self.register_buffer("running_deconv", torch.eye(self.features))

    def forward(self, x):
        mean, root = self.running_mean, self.running_deconv
        if self.training:
            patches = F.unfold(x, self.ks, 1, self.padding, self.step).transpose(1, 2).contiguous()
            patches = patches.view(-1, self.features, self.blocks).transpose(1, 2).contiguous().view(-1, self.features)
            mean = patches.mean(0)
            patches = patches - mean
            eye = torch.eye(self.features, device=x.device)
            root = newton_schulz(torch.addmm(eye, patches.t(), patches, beta=self.eps, alpha=1 / len(patches)))
            self.running_mean.mul_(1 - self.momentum).add_(mean.detach() * self.momentum)
            self.running_deconv.mul_(1 - self.momentum).add_(root.detach() * self.momentum)
        weight = self.weight.view(-1, self.features, self.blocks).transpose(1, 2).contiguous().view(-1, self.features) @ root
        bias = self.bias - (weight @ mean.unsqueeze(1)).view(len(self.weight), -1).sum(1)
        weight = weight.view(len(self.weight), -1, self.features).transpose(1, 2).contiguous().view(self.weight.shape)
        return F.conv2d(x, weight, bias, self.stride, self.padding)


def fastai_network(deconv):
    "xresnet18 of fastai's layers; with `deconv` its stem is the published hybrid's."
    from fastai.layers import ConvLayer, ResBlock
    def stem(ni, nf, stride):
        return nn.Sequential(PublishedDeconv(ni, nf, 3, stride), nn.Mish()) if deconv else ConvLayer(ni, nf, 3, stride, act_cls=nn.Mish)
    widths = (64, 64, 128, 256, 512)
    stages = [nn.Sequential(ResBlock(1, a, b, stride=2 if i else 1, **PAPER), ResBlock(1, b, b, sa=i == 0, **PAPER))
              for i, (a, b) in enumerate(zip(widths, widths[1:]))]
    return nn.Sequential(stem(5, 32, 2), stem(32, 32, 1), stem(32, 64, 1), nn.MaxPool2d(3, 2, 1), *stages,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(512, 6))


# --- data, machine ---

def toy_galaxies(n, size, seed=0):
    "Exponential discs of random size, shape, colour and flux: images (n, 5, size, size), properties of unit variance (n, 6)."
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(n, 6, generator=g) * 2 - 1
    grid = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    radius, e1, e2, colour, flux, steep = truth.T[..., None, None]
    r = ((1 + 0.5 * e1) * x ** 2 + (1 - 0.5 * e1) * y ** 2 + e2 * x * y + 1e-4).sqrt() / (0.1 * (1 + 0.6 * radius))
    bands = 10 ** (0.3 * flux[:, None] + 0.2 * colour[:, None] * torch.linspace(-1, 1, 5)[:, None, None])
    images = torch.asinh(5 * bands * (-r ** (1 + 0.4 * steep))[:, None].exp() + 0.1 * torch.randn(n, 5, size, size, generator=g))
    return 2 * images, truth * math.sqrt(3)


def compiler_missing(device):
    "Why `torch.compile` cannot be used, or an empty text."
    if device == "cuda": return "" if torch.utils._triton.has_triton() else "no Triton"
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return "" if any(n and shutil.which(n) for n in names) else "no C++ compiler on the path"


class Kept:
    "f, to be timed when freed memory stays with the process: after a step that is not counted, on a CPU."
    def __init__(self, f): self.f = f
    def __call__(self): return self.f()


class Clock:
    "Seconds of wall or of processor time that f() takes."
    def __init__(self, kind, device): self.now, self.device = dict(wall=time.perf_counter, processor=time.process_time)[kind], device
    def __call__(self, f):
        from spectranb.training import keep_memory
        if not isinstance(f, Kept): return self.time(f)
        with keep_memory():
            f()
            return self.time(f)
    def time(self, f):
        self.sync(); start = self.now(); f(); self.sync()
        return self.now() - start
    def sync(self):
        if self.device == "cuda": torch.cuda.synchronize()


def peak_memory(f, device):
    "MiB that f() needs at its peak beyond what was there before; nan where the system does not tell."
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated(); f()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)                          # what is free goes back first, or it would hide the need
        with open("/proc/self/clear_refs", "w") as c: c.write("5")
        def status(key): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
        before = status("VmRSS:"); f()
        return (status("VmHWM:") - before) / 1024
    except OSError: return math.nan


# --- contenders ---

def prepare(net, opts, fold=False):
    "A network of its own with the settings `opts`: any of channels_last, half (whole network in bfloat16), compile."
    from spectranb.deconv import fold_deconv
    net = fold_deconv(net) if fold else copy.deepcopy(net)
    if "half" in opts: net = net.bfloat16()
    net = net.to(memory_format=torch.channels_last if "channels_last" in opts else torch.contiguous_format)
    return torch.compile(net) if "compile" in opts else net


def autocast(opts, device): return torch.autocast(device, torch.bfloat16) if "bf16" in opts else contextlib.nullcontext()

def laid_out(x, opts):
    x = x.contiguous(memory_format=torch.channels_last) if "channels_last" in opts else x
    return x.bfloat16() if "half" in opts else x


def training(net, opts, x, y, lr=1e-4):
    "A function that takes one training step and returns the loss."
    net, x, device = prepare(net.train(), opts).train(), laid_out(x, opts), x.device.type
    optimiser = torch.optim.AdamW(net.parameters(), lr, fused=device == "cuda")
    def step():
        with autocast(opts, device): out = net(x)
        loss = F.mse_loss(out.float(), y)
        loss.backward(); optimiser.step(); optimiser.zero_grad()
        return loss
    return step


def inference(net, opts, x, fold=False):
    "A function that returns the latents of x."
    from spectranb.models import HalfPrecision
    net, x, device = net.eval(), laid_out(x, opts), x.device.type
    if fold and "bf16" in opts:                                          # HalfPrecision does the folding, the layout and the autocast
        net, opts, fold = HalfPrecision(net), tuple(o for o in opts if o == "compile"), False
        x = laid_out(x, ("channels_last",))
        if opts: net = torch.compile(net)
    else: net = prepare(net, opts, fold).eval()
    def step():
        with torch.no_grad(), autocast(opts, device): return net(x).float()
    return step


OURS = ("channels_last", "bf16")

def training_contenders(nets, x, y, compiled):
    "{name: step}; with the memory kept only on a CPU."
    runs = {"(a) published, float32": training(nets["published"], (), x, y), "(b) ours": training(nets["hybrid"], OURS, x, y)}
    if compiled: runs["(b) ours, compiled"] = training(nets["hybrid"], (*OURS, "compile"), x, y)
    runs |= {"(c) BatchNorm, float32": training(nets["fastai"], (), x, y), "(c) BatchNorm, our settings": training(nets["fastai"], OURS, x, y),
             "(c') our xresnet18, our settings": training(nets["xresnet18"], OURS, x, y)}
    if compiled: runs["(c') our xresnet18, compiled"] = training(nets["xresnet18"], (*OURS, "compile"), x, y)
    return runs | with_kept_memory(runs, x)


def inference_contenders(nets, x, compiled):
    runs = {"(a) published, float32": inference(nets["published"], (), x), "(b) ours, folded": inference(nets["hybrid"], OURS, x, True)}
    if compiled: runs["(b) ours, folded, compiled"] = inference(nets["hybrid"], (*OURS, "compile"), x, True)
    runs |= {"(c) BatchNorm, float32": inference(nets["fastai"], (), x), "(c) BatchNorm, our settings": inference(nets["fastai"], OURS, x)}
    return runs | with_kept_memory(runs, x)


def with_kept_memory(runs, x): return {} if x.is_cuda else {f"{n}, memory kept": Kept(f) for n, f in runs.items() if "compiled" not in n or "folded" in n}


def interleave(runs, rounds, clock):
    "{name: seconds of each round}; every contender once a round, in an order that moves on by one."
    times, names = {n: [] for n in runs}, list(runs)
    for i in range(rounds):
        for name in names[i % len(names):] + names[:i % len(names)]: times[name].append(clock(runs[name]))
    return times


def ratio(times, a, b): return statistics.median(s / t for s, t in zip(times[a], times[b]))


def take_averages(net, parts, x):
    "Make the statistics of the batch x the running averages of these parts of the network."
    normalising = [m for part in parts for m in part.modules() if hasattr(m, "momentum")]
    before = [m.momentum for m in normalising]
    for m in normalising: m.momentum = 1.0
    with torch.no_grad(): net(x)
    for m, momentum in zip(normalising, before): m.momentum = momentum


def settle(net, args, steps):
    """Train `net` for a few steps on small toy galaxies, then as many at the full size with the stem's averages fixed; learning rate falling to 0.

    Five rounds on changing batches give averaged inverse roots that evaluate badly this early, and latents far off would say nothing about rounding.
    """
    net = sampled(net.to(args.device), 1).train()
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    for i in range(2 * steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * math.cos(math.pi / 4 * i / steps) ** 2
        if i == steps:
            net, parameters = sampled(net, 3), optimiser.state_dict()
            optimiser = torch.optim.AdamW(net.parameters()); optimiser.load_state_dict(parameters)
            take_averages(net, list(net)[:3], toy_galaxies(32, args.size, seed=1000)[0].to(args.device))
            for layer in list(net)[:3]: layer.eval()
        x, y = (t.to(args.device) for t in toy_galaxies(16 if i < steps else 8, min(args.size, 64) if i < steps else args.size, seed=i))
        loss = F.mse_loss(net(x), y); loss.backward(); optimiser.step(); optimiser.zero_grad()
    take_averages(net, list(net)[3:], toy_galaxies(32, args.size, seed=1000)[0].to(args.device))
    return net.train()


def settled_networks(args):
    "The four networks after a short training, float32, on the device."
    from spectranb.models import xresnet18, xresnet18_hybrid
    torch.manual_seed(0)
    nets = dict(hybrid=settle(xresnet18_hybrid(), args, args.settle), xresnet18=settle(xresnet18(), args, 4))
    for twin, name, deconv in (("published", "hybrid", True), ("fastai", "xresnet18", False)):
        nets[twin] = fastai_network(deconv).to(args.device)
        nets[twin].load_state_dict(nets[name].state_dict())
    return nets


# --- reports ---

def show(title, times, base, batch, memory=None):
    print(f"\n{title}\n{'':40s} {'images/s':>9s} {'best':>8s} {'× ' + base.split()[0]:>7s}" + (f" {'peak MiB':>9s}" if memory else ""))
    for name, t in times.items():
        print(f"{name:40s} {batch / statistics.median(t):9.1f} {batch / min(t):8.1f} {ratio(times, base, name):7.2f}" + (f" {memory[name]:9.0f}" if memory else ""))


def compare(args, clock, compiled):
    nets = settled_networks(args)
    x, y = (t.to(args.device) for t in toy_galaxies(args.batch, args.size, seed=12345))
    if "inference" in args.only:
        runs = inference_contenders(nets, x, "inference" in compiled)
        latents = {name: f() for name, f in runs.items() if not isinstance(f, Kept)}      # also the warm-up, where compilation happens
        memory = {name: math.nan if isinstance(f, Kept) else peak_memory(f, args.device) for name, f in runs.items()}
        times = interleave(runs, args.rounds, clock)
        a = "(a) published, float32"
        show("Inference", times, a, args.batch, memory)
        best = max((n for n in runs if n.startswith("(b)")), key=lambda n: ratio(times, a, n))
        print(f"target: (b) ≥ 3 × (a): {ratio(times, a, best):.2f}, {best}; latents of standard deviation {latents[a].std():.2f}")
        print("|Δ latent| against (a): " + ", ".join(f"{n}: mean {d.mean():.4f}, rms {d.square().mean().sqrt():.4f}, max {d.max():.4f}"
                                                    for n in latents if n.startswith("(b)") for d in [(latents[n] - latents[a]).abs()]))
    if "training" in args.only:
        runs = training_contenders(nets, x, y, "training" in compiled)
        for f in runs.values(): f()
        memory = {name: math.nan if isinstance(f, Kept) else peak_memory(f, args.device) for name, f in runs.items()}
        times = interleave(runs, args.rounds, clock)
        show("Training", times, a := "(a) published, float32", args.batch, memory)
        best = max((n for n in runs if n.startswith("(b)")), key=lambda n: ratio(times, a, n))
        print(f"target: (b) ≥ 2.5 × (a): {ratio(times, a, best):.2f}, {best}")
        for b, c in (("(b) ours", "(c) BatchNorm, our settings"), ("(b) ours, memory kept", "(c) BatchNorm, our settings, memory kept"), ("(b) ours", "(c') our xresnet18, our settings"),
                     ("(b) ours, memory kept", "(c') our xresnet18, our settings, memory kept"), ("(b) ours, compiled", "(c') our xresnet18, compiled")):
            if b in runs and c in runs: print(f"target: at most 5 % slower than BatchNorm: {b} takes {100 * (ratio(times, b, c) - 1):+.1f} % of {c}")
        print(f"published algorithm beside BatchNorm, both float32: {100 * (ratio(times, a, '(c) BatchNorm, float32') - 1):+.1f} %")


def with_plain(net, ours, plain):
    "A copy with PyTorch's layer in place of our class of that name."
    net = copy.deepcopy(net)
    for m in net.modules():
        if type(m) is ours: m.__class__ = plain
    return net

def sampled(net, every):
    "A copy whose deconvolution statistics use every so many-th patch."
    from spectranb.deconv import FastDeconv
    net = copy.deepcopy(net)
    for m in net.modules():
        if isinstance(m, FastDeconv): m.sampling_stride = tuple(every * s for s in m.stride)
    return net


# Each prediction is a sentence about the step before, and the ratio that follows from the shares of its time (a profile by operation).
def ablation_steps(nets, compiled):
    "[(name, network, settings, prediction from the shares of the step before, its reason)] for training."
    from spectranb.models import Conv2d, Mish
    hybrid = nets["hybrid"]
    bare = with_plain(with_plain(hybrid, Mish, nn.Mish), Conv2d, nn.Conv2d)
    steps = [("published", nets["published"], (), None, "the start"),
             ("cheaper gradient of the covariance", bare, (), lambda s: 1 / (1 - s["patches"] / 3), "one product of three with the patches goes"),
             ("channels_last", bare, ("channels_last",), lambda s: 1 / (1 - 0.15 * s["convolution"] - 0.8 * s["pooling"]), "no reordering around convolutions; vectorised pooling"),
             ("bf16 autocast", bare, OURS, lambda s: 1 / (1 - s["convolution"] / 2), "twice the multiplications a cycle; half the memory; the covariance stays in float32, the product of its gradient does not"),
             ("grouped convolutions in float32", with_plain(hybrid, Mish, nn.Mish), OURS, lambda s: 1.1, "their bf16 gradient is slow (measured layer by layer in 08_models)"),
             ("fused Mish", hybrid, OURS, lambda s: 1 / (1 - 0.5 * s["mish"]), "one exponential of the three functions twice"),
             ("freed memory kept", hybrid, (*OURS, "keep"), lambda s: 1.14, "0.2 of 1.5 s go to 60,000 fresh pages a step (system time of the step before)"),
             ("statistics of every 6th patch (option)", sampled(hybrid, 6), (*OURS, "keep"), lambda s: 1 / (1 - 0.75 * s["patches"]), "a quarter of the patches; changes the results")]
    if "training" in compiled: steps.append(("compiled, statistics of every 3rd", hybrid, (*OURS, "compile"), lambda s: 1 / (1 - 0.7 * s["other"] - 0.5 * s["mish"]), "loops over pixels fused"))
    return steps


KINDS = dict(convolution=("convolution", "conv2d"), mish=("mish", "sigmoid", "addcmul", "reciprocal", "square"), pooling=("pool",), patches=("im2col", "col2im", "addmm", "aten::mm", "aten::bmm", "unfold", "patches"), norm=("batch_norm",))

def shares(step, device, rounds=2):
    "{kind of operation: share of the time of step()}"
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")) as p:
        for _ in range(rounds): step()
    total = dict.fromkeys([*KINDS, "other"], 0.0)
    for e in p.key_averages():
        t = e.self_device_time_total if device == "cuda" else e.self_cpu_time_total
        total[next((k for k, words in KINDS.items() if any(w in e.key.lower() for w in words)), "other")] += t
    return {k: v / sum(total.values()) for k, v in total.items()}


def ablation(args, clock, compiled):
    from spectranb.models import Mish
    nets = settled_networks(args)
    x, y = (t.to(args.device) for t in toy_galaxies(args.batch, args.size, seed=12345))
    runs, expected, before = {}, {}, None
    steps = ablation_steps(nets, compiled)
    for name, net, opts, prediction, _ in steps:
        runs[name] = training(net, opts, x, y)
        if "keep" in opts: runs[name] = Kept(runs[name])
        runs[name]()
        expected[name] = prediction(before) if prediction else 1.0
        if "option" not in name: before = shares(runs[name], args.device)
    times = interleave(runs, args.rounds, clock)
    print(f"\nTraining, step by step\n{'':40s} {'images/s':>9s} {'predicted':>10s} {'measured':>9s} {'× start':>8s}  why")
    previous = steps[0][0]
    for name, _, _, _, why in steps:
        print(f"{name:40s} {args.batch / statistics.median(times[name]):9.1f} {expected[name]:10.2f} {ratio(times, previous, name):9.2f} {ratio(times, 'published', name):8.2f}  {why}")
        if "option" not in name: previous = name
    sampling_accuracy(nets["hybrid"], x)
    folds = {"published, float32": (nets["published"], (), False), "ours, float32": (with_plain(nets["hybrid"], Mish, nn.Mish), (), False), "folded": (with_plain(nets["hybrid"], Mish, nn.Mish), (), True),
             "channels_last": (with_plain(nets["hybrid"], Mish, nn.Mish), ("channels_last",), True), "bf16 autocast": (with_plain(nets["hybrid"], Mish, nn.Mish), OURS, True),
             "Mish with one exponential": (nets["hybrid"], OURS, True)} | ({"compiled": (nets["hybrid"], (*OURS, "compile"), True)} if "inference" in compiled else {})
    runs = {name: inference(net, opts, x, fold) for name, (net, opts, fold) in folds.items()}
    reference, differences = next(iter(runs.values()))(), {}
    for name, f in runs.items(): differences[name] = (f() - reference).abs().max()
    times = interleave(runs, args.rounds, clock)
    predicted = dict(zip(folds, [1, 1, 1.05, 1.25, 1.45, 1.2, 1.5]))
    print(f"\nInference, step by step\n{'':40s} {'images/s':>9s} {'predicted':>10s} {'measured':>9s} {'× start':>8s}  max |Δ latent|")
    previous = next(iter(runs))
    for name in runs:
        print(f"{name:40s} {args.batch / statistics.median(times[name]):9.1f} {predicted[name]:10.2f} {ratio(times, previous, name):9.2f} {ratio(times, next(iter(runs)), name):8.2f}  {differences[name]:.1e}")
        previous = name


def sampling_accuracy(net, x):
    "Print how far the latents of a training batch move when the statistics come from fewer patches."
    with torch.no_grad():
        full = sampled(net, 1).train()(x)
        for every in (2, 3, 6, 12):
            moved = (sampled(net, every).train()(x) - full).abs()
            print(f"statistics of every {every:2d}th patch instead of all: latents of a training batch move by {moved.mean():.4f} on average, {moved.max():.4f} at most")


def scaling(args, clock):
    "Time against batch, image size and width; a figure."
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from spectranb.models import xresnet18, xresnet18_hybrid
    gpu = args.device == "cuda"
    axes_of = dict(batch=[1, 2, 4, 8, 16, 32] + [64, 128, 256] * gpu, size=[64, 96, 128, 192, 256, 384, 512], width=[1, 2, 3, 4])
    still = dict(batch=args.batch if gpu else 8, size=args.size if gpu else 128, width=1)
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.3), sharey=True)
    kinds = {"published hybrid": None, "our hybrid": xresnet18_hybrid, "our hybrid, inference": xresnet18_hybrid, "our xresnet18": xresnet18}
    for ax, (axis, values) in zip(axes, axes_of.items()):
        curves = {k: [] for k in kinds}
        for value in values:
            v = still | {axis: value}
            x, y = (t.to(args.device) for t in toy_galaxies(v["batch"], v["size"]))
            runs = {}
            for kind, make in kinds.items():
                if make is None and axis == "width": continue
                net = (make(widen=v["width"]) if make else fastai_network(True)).to(args.device)
                if make: net.train(); net(x[:2])
                runs[kind] = inference(net, OURS, x, True) if "inference" in kind else training(net, OURS if make else (), x, y)
            for f in runs.values(): f()
            for kind, t in interleave(runs, max(3, args.rounds // 2), clock).items(): curves[kind].append(1e3 * min(t))
        draw_scaling(ax, axis, values, curves, still)
    axes[0].set(ylabel="time of a step [ms]")
    fig.tight_layout(); fig.savefig(args.figure, dpi=130)
    print(f"figure: {args.figure}")


def draw_scaling(ax, axis, values, curves, still):
    "One panel: time of a step against batch, size or width, and the power law it should follow."
    for i, (kind, ms) in enumerate(curves.items()):
        if not ms: continue
        power = math.log(ms[-1] / ms[-3]) / math.log(values[-1] / values[-3])
        print(f"{axis:6s} {kind:22s} " + " ".join(f"{v}: {t:.0f} ms" for v, t in zip(values, ms)) + f"   grows as {axis}^{power:.2f} at the end")
        ax.loglog(values, ms, "o-", ms=3, color=f"C{i}", label=kind)
    ideal = dict(batch=1, size=2, width=2)[axis]
    top = curves["our hybrid"][-1]
    ax.loglog(values, [top * (v / values[-1]) ** ideal for v in values], "k:", lw=1, label=f"∝ {axis}" + f"$^{ideal}$" * (ideal > 1))
    units = dict(batch=" images a batch", size=" pixels", width=" × the width")
    ax.set(xlabel=dict(batch="images a batch", size="image size [pixels]", width="width of the stages")[axis], title=", ".join(f"{w}{units[k]}" for k, w in still.items() if k != axis))
    ax.set_xticks(values, values); ax.minorticks_off(); ax.legend(fontsize=7)


def profile_report(args, compiled):
    nets = settled_networks(args)
    x, y = (t.to(args.device) for t in toy_galaxies(args.batch, args.size, seed=12345))
    runs = {"training: " + k: v for k, v in training_contenders(nets, x, y, "training" in compiled).items()} | {"inference: " + k: v for k, v in inference_contenders(nets, x, "inference" in compiled).items()}
    for name, f in runs.items():
        if isinstance(f, Kept): continue
        f(); print(f"{name:50s} " + "  ".join(f"{k} {100 * v:.0f} %" for k, v in shares(f, args.device).items()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=224, help="pixels on a side")
    p.add_argument("--batch", type=int, default=0, help="images a step (32 on a CPU, 128 on a GPU)")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--settle", type=int, default=30, help="steps of the short training on toy galaxies before anything is timed")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    p.add_argument("--threads", type=int, default=0, help="of PyTorch (default: as it is)")
    p.add_argument("--clock", default="wall", choices=["wall", "processor"], help="`processor` when the machine has other work (CPU only)")
    p.add_argument("--only", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    p.add_argument("--compile", nargs="*", choices=["inference", "training"], help="what is also timed compiled (default: both on a GPU; inference on a CPU, where compiling a training step takes minutes)")
    p.add_argument("--ablation", action="store_true", help="what each step buys")
    p.add_argument("--scaling", action="store_true", help="time against batch, image size and width")
    p.add_argument("--profile", action="store_true", help="share of the time by kind of operation")
    p.add_argument("--figure", default="networks_scaling.png", help="where --scaling draws")
    args = p.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    args.batch = args.batch or (128 if args.device == "cuda" else 32)
    if args.device == "cuda": torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False; args.clock = "wall"
    if args.compile is None: args.compile = ["inference", "training"] if args.device == "cuda" else ["inference"]
    missing = compiler_missing(args.device) if args.compile else "asked not to"
    if missing: print(f"compiled contenders are left out: {missing}")
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start"
    print(f"torch {torch.__version__}, {platform.machine()}, {where}; {args.size} × {args.size} pixels, batch {args.batch}, {args.rounds} rounds, {args.clock} clock")
    clock = Clock(args.clock, args.device)
    compiled = [] if missing else args.compile
    if args.ablation: ablation(args, clock, compiled)
    elif args.scaling: scaling(args, clock)
    elif args.profile: profile_report(args, compiled)
    else: compare(args, clock, compiled)


if __name__ == "__main__": main()
