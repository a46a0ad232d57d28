"The reader of published pickles: hostile files of every kind are refused before anything runs; look-alikes are read exactly."
import importlib.util
import io
import os
import pickle
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from spectranb.core import BadInput
from spectranb.data.spectra import GapBasis, infill
from spectranb.published import (allowed, convert_published, find_activation, linear_layers, network_of, read_npy, read_pickle,
                                 read_pickled_tensors, read_published_vae, whitening_of)
from spectranb.vae import SpectrumVAE

ROOT = Path(__file__).resolve().parents[1]
RAN = []                                                             # what a hostile file managed to run


def touch(*what): RAN.append(what); return dict


@pytest.fixture(autouse=True)
def nothing_ran():
    RAN.clear()
    yield
    assert RAN == []


# Look-alikes ----------------------------------------------------------------------------------------------------------

SOURCE = """
from torch import nn
from torch.nn import functional as F
class InfoVAE(nn.Module):
    def __init__(self, a=12, b=7, k=5):
        super().__init__()
        self.ncode, self.alpha, self.lambd = k, 0.0, 31.5
        self.encd, self.d1, self.enc2, self.mu, self.lv = nn.Linear(1000, a), nn.Dropout(0.0), nn.Linear(a, b), nn.Linear(b, k), nn.Linear(b, k)
        self.decd, self.dec2, self.outp = nn.Linear(k, b), nn.Linear(b, a), nn.Linear(a, 1000)
    def encode(self, x):
        x = F.ACT(self.enc2(self.d1(F.ACT(self.encd(x)))))
        return self.mu(x), self.lv(x)
    def decode(self, z): return self.outp(F.ACT(self.dec2(F.ACT(self.decd(z)))))
"""


def toy(folder, act="leaky_relu", name="InfoVAE"):
    "An instance of a class that lives in a file which is deleted again with its module."
    file = folder / f"{name}.py"
    file.write_text(SOURCE.replace("ACT", act))
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(1)
    return module.InfoVAE().eval()


def save(net, path, new, name="InfoVAE"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(net, path, _use_new_zipfile_serialization=new)
    return path


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    "A folder as published, the module, its spectra, the PCA and a scaler."
    folder = tmp_path_factory.mktemp("published"); (folder / "64k").mkdir()
    net = toy(folder)
    with torch.no_grad(): net.encd.weight.mul_(40); net.mu.weight.mul_(5); net.outp.weight.mul_(0.05)      # latents of order 1, as trained ones
    save(net, folder / "64k/0001.pth", new=False); save(net, folder / "new.pth", new=True)
    sys.modules.pop("InfoVAE"); (folder / "InfoVAE.py").unlink()
    rng = np.random.default_rng(0)
    flux = 1 + 0.3 * np.cumsum(rng.normal(size=(60, 1000)), 1) / 30
    flux /= np.linalg.norm(flux, axis=1, keepdims=True)
    mean = flux.mean(0)
    np.save(folder / "meanspec.npy", mean)
    with torch.no_grad(): mu, lv = (a.numpy().astype(float) for a in net.encode(torch.from_numpy((flux - mean).astype("f4"))))
    pca = PCA(3).fit(mu)
    scaler = StandardScaler().fit(pca.transform(mu[:40]))
    (folder / "latent_pca.pkl").write_bytes(pickle.dumps(pca, 3).replace(b"sklearn.decomposition._pca\n", b"sklearn.decomposition.pca\n"))
    (folder / "scaler.pkl").write_bytes(pickle.dumps(scaler))
    return dict(folder=folder, net=net, flux=flux, mean=mean, mu=mu, lv=lv, pca=pca, scaler=scaler)


# Hostile files --------------------------------------------------------------------------------------------------------

def binary(text): return b"X" + struct.pack("<I", len(text)) + text.encode()

HERE = __name__


class Reduce:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


class NewObjEx:
    def __reduce_ex__(self, protocol):
        import copyreg
        return copyreg.__newobj_ex__, (dict, (), {"a": 1})


class SetState:
    def __setstate__(self, state): touch(state)
    def __reduce__(self): return SetState, (), dict(a=1)


class Slots(dict):
    def __setitem__(self, k, v): touch(k)
    def __reduce__(self): return Slots, (), None, None, iter([("a", 1)])


class Lists(list):
    def append(self, v): touch(v)
    def extend(self, v): touch(v)
    def __reduce__(self): return Lists, (), None, iter([1, 2])


def hostile():
    here = f"c{HERE}\ntouch\n".encode()
    yield "system", pickle.dumps(Reduce(os.system, "echo ran >&2"))
    for p in range(0, 6): yield f"reduce{p}", pickle.dumps(Reduce(touch, 1), p)
    for f in (eval, exec): yield f.__name__, pickle.dumps(Reduce(f, f"__import__('{HERE}').RAN.append(1)"))
    for f, args in ((getattr, (RAN, "append")), (print, ("x",)), (open, ("/etc/passwd",)), (subprocess.Popen, (["true"],)), (torch.load, ("x",)), (np.load, ("x",)),
                    (pickle.loads, (b"N.",)), (joblib.load, ("x",)), (importlib.import_module, ("antigravity",)), (map, (touch, [1]))):
        yield f"{f.__module__}.{f.__qualname__}", pickle.dumps(Reduce(f, *args))
    yield "newobj_ex", pickle.dumps(NewObjEx(), 4)
    for thing in (SetState(), Slots(), Lists()): yield type(thing).__name__, pickle.dumps(thing)
    yield "inst", b"(I1\ni" + f"{HERE}\ntouch\n".encode() + b"."
    yield "obj", b"(" + here + b"K\x01o."
    yield "newobj", b"\x80\x02" + here + b"K\x01\x85\x81."
    yield "stack_global", b"\x80\x04" + binary(HERE) + binary("touch") + b"\x93K\x01\x85R."
    yield "dotted", b"\x80\x04" + binary("torch.nn.modules.linear") + binary("math.sqrt") + b"\x93K\x01\x85R."
    yield "dunder", b"\x80\x04" + binary("torch.nn.modules.linear") + binary("__loader__") + b"\x93)R."
    yield "persistent", b"\x80\x02" + here + b"Q."
    yield "persistent module", b"\x80\x02X\x06\x00\x00\x00module" + here + b"NN" + b"(" + b"t" + b"Q."
    yield "text persistent", b"Pos.system\n."
    for code in (b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"): yield f"extension {code[0]:x}", b"\x80\x02" + code + b")R."
    yield "reconstructor", b"\x80\x02ccopyreg\n_reconstructor\n" + here + b"c__builtin__\nobject\nN\x87R."
    yield "buffers", b"\x80\x05\x97."
    yield "class called", b"\x80\x02ctorch.nn.modules.linear\nLinear\n)R."
    yield "function as object", b"\x80\x02c_codecs\nencode\n)\x81."
    yield "attributes of a function", b"\x80\x02c_codecs\nencode\n}" + binary("__code__") + b"K\x01sb."
    yield "attributes of a class", b"\x80\x02ctorch.nn.modules.linear\nLinear\n}" + binary("__init__") + b"K\x01sb."
    yield "record called", b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81)R."
    yield "text called", b"\x80\x02" + binary("touch") + b")R."
    yield "subclass of arrays", b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nctorch\nFloatStorage\nK\x00\x85C\x01b\x87R."
    yield "array of objects", pickle.dumps(np.array([Reduce(touch, 1)]))
    yield "array of None", pickle.dumps(np.array([None]))
    yield "records", pickle.dumps(np.zeros(2, [("a", "f4")]))
    yield "list as key", b"\x80\x02}]K\x01s."
    yield "cycle called", b"\x80\x02]q\x00h\x00ah\x00R."


HOSTILE = dict(hostile())


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused(kind, tmp_path, capfd):
    path = tmp_path / "bad.pkl"
    path.write_bytes(HOSTILE[kind])
    for read in (read_pickle, read_pickled_tensors, read_published_vae, whitening_of):
        with pytest.raises(BadInput) as e: read(path, *(["meanspec.npy"] * 2 if read is read_published_vae else []))
        assert e.value.remedy and "bad.pkl" in str(e.value)
    assert capfd.readouterr() == ("", "")


def test_hostile_pickles_are_hostile(tmp_path):
    "The payloads do run where they are unpickled: else the tests above would show nothing."
    for kind in ("reduce2", "eval", "SetState", "Slots", "stack_global", "inst", "obj"):
        try: pickle.loads(HOSTILE[kind])
        except Exception: pass                                       # the call itself is made
        assert RAN, kind
        RAN.clear()


@pytest.mark.parametrize("kind", ["reduce2", "system", "newobj", "stack_global", "array of objects", "attributes of a function"])
def test_hostile_inside_of_torch_files(kind, tmp_path, alike):
    "In the program of an archive, in each of the programs of the older format, and as the state of a module."
    bad = HOSTILE[kind]
    with zipfile.ZipFile(alike["folder"] / "new.pth") as old, zipfile.ZipFile(tmp_path / "a.pth", "w") as new:
        for i in old.infolist(): new.writestr(i.filename, bad if i.filename.endswith("data.pkl") else old.read(i))
    raw = (alike["folder"] / "64k/0001.pth").read_bytes()
    file = io.BytesIO(raw); starts = []
    for _ in range(3): starts.append(file.tell()); pickle.load(file)
    starts.append(file.tell())
    for k, at in enumerate(starts): (tmp_path / f"{k}.pth").write_bytes(raw[:at] + bad)
    for path in tmp_path.glob("*.pth"):
        with pytest.raises(BadInput): read_pickle(path)


def test_hostile_in_a_modules_state(tmp_path):
    for place in (lambda x: setattr(net, "extra", x), lambda x: net._forward_hooks.update(a=x), lambda x: net._modules.update(a=x),
                  lambda x: setattr(net, "more", dict(a=[(x,)]))):
        net = nn.Sequential(nn.Linear(2, 2)); place(Reduce(touch, 1))
        for new in (True, False):
            with pytest.raises(BadInput, match="touch"): read_pickled_tensors(save(net, tmp_path / "x.pth", new))


@pytest.mark.parametrize("asked", ["os.system", "builtins.eval", "builtins.getattr", "builtins.object", "torch.load", "torch.nn.modules.linear.math.sqrt", "sklearn.utils.x",
                                   "torch.storage._load_from_bytes", "torch.jit._pickle.build", "numpy.core.multiarray.fromfile", "numpy.load", "os.VAE.system",
                                   "nt.system", "VAE", "a b.VAE", "torch.nn.modules.linear.Linear\n", "torch.nn.modulesxlinear.Linear", "x." + "a" * 300 + "VAE"])
def test_names_that_are_refused(asked): assert allowed(*asked.rsplit(".", 1) if "." in asked else ("", asked)) is None


def test_names_that_are_kept():
    assert str(allowed("my.module", "Net", classes=["my.module.Net"])) == "my.module.Net"
    assert str(allowed("numpy.core.multiarray", "_reconstruct")) == "numpy._core.multiarray._reconstruct"


def test_npy(tmp_path):
    a = np.arange(6.0).reshape(2, 3)
    for b in (a, np.asfortranarray(a), a.astype(">f4"), a.astype(bool), a[:0]):
        np.save(tmp_path / "a.npy", b); assert np.array_equal(read_npy(tmp_path / "a.npy"), b)
    good = (np.save(tmp_path / "a.npy", a), (tmp_path / "a.npy").read_bytes())[1]
    bad = dict(shape=good.replace(b"(2, 3)", b"(9, 9)"), huge=good.replace(b"(2, 3), }      ", b"(999999999, 3)}"), short=good[:-1], long=good + b"x", empty=b"",
               magic=b"x" + good, header=good[:20], code=good.replace(b"'<f8'", b"f(1)x"), pickle=pickle.dumps(Reduce(touch, 1)))
    np.save(tmp_path / "o.npy", np.array([Reduce(touch, 1)]), allow_pickle=True); bad["objects"] = (tmp_path / "o.npy").read_bytes()
    np.save(tmp_path / "o.npy", np.array(["text"])); bad["text"] = (tmp_path / "o.npy").read_bytes()
    for kind, body in bad.items():
        (tmp_path / "b.npy").write_bytes(body)
        with pytest.raises(BadInput): print(kind, read_npy(tmp_path / "b.npy"))


# Files that want too much memory or time -------------------------------------------------------------------------------

def _reduce(module, name, *body): return f"c{module}\n{name}\n".encode() + b"".join(body) + b"R"

STORAGE = b"(" + binary("storage") + b"ctorch\nFloatStorage\n" + binary("0") + binary("cpu") + b"%s" + b"tQ"


def bombs():
    big = lambda n: b"\x8a\x08" + n.to_bytes(8, "little")
    yield "array of 8 EB", b"\x80\x02" + _reduce("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\nK\x00\x85C\x01b\x87") + (
        b"(K\x01" + big(2 ** 60) + b"\x85" + _reduce("numpy", "dtype", binary("f8") + b"\x89\x88\x87") + b"\x89C\x00tb.")
    yield "text of 4 GB", b"\x80\x02X\xff\xff\xff\xffabc."
    yield "bytes of 8 EB", b"\x80\x04\x8e" + (2 ** 62).to_bytes(8, "little") + b"abc."
    yield "number of 2 GB", b"\x80\x02\x8b\xff\xff\xff\x7fabc."
    yield "memory far out", b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff0."
    yield "endless", b"\x80\x02" + b"N" * 3_000_000
    yield "deep lists", b"\x80\x02" + b"]" * 400_000 + b"a" * 399_999 + b"."
    yield "deep tuples", b"\x80\x02)" + b"\x85" * 400_000 + b"."
    yield "billion laughs", b"\x80\x04]\x94" + b"".join(b"(h%ch%cl\x94" % (k, k) for k in range(60)) + b"."
    yield "copies of text", b"\x80\x02X\x00\x00\x10\x00" + b"a" * 2 ** 20 + b"q\x000" + (_reduce("_codecs", "encode", b"h\x00" + binary("latin1") + b"\x86")) * 9_000 + b"."
    yield "copies of pairs", b"\x80\x02](" + b"".join(binary(f"{k:07d}") + b"N\x86" for k in range(30_000)) + b"eq\x000" + _reduce("collections", "OrderedDict", b"h\x00\x85") * 20_000 + b"."


BOMBS = dict(bombs())

WATCHED = """
import resource, sys, time, pathlib
sys.path.insert(0, sys.argv[1])
from spectranb.published import read_pickled_tensors, BadInput
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20,) * 2)
for path in sorted(pathlib.Path(sys.argv[2]).iterdir()):
    start = time.process_time()
    try: said = f"read {len(read_pickled_tensors(path))}"
    except BadInput as e: said = f"BadInput {e}"
    print(path.name, round(time.process_time() - start, 1), 'MemoryError' in said, said[:140], sep='|')
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is set as on Linux")
def test_bombs(tmp_path):
    for kind, body in BOMBS.items(): (tmp_path / f"{kind}.pkl").write_bytes(body)
    with zipfile.ZipFile(tmp_path / "zip bomb.pth", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/data.pkl", b"\x80\x02N."); z.writestr("a/data/0", bytes(300 * 2 ** 20))
    program = b"\x80\x02" + _reduce("torch._utils", "_rebuild_tensor_v2", b"(" + STORAGE % b"K\x02" + b"K\x00\x8a\x06\x00\x00\x00\x00\x00\x01\x85K\x00\x85\x89Nt") + b"."
    with zipfile.ZipFile(tmp_path / "view.pth", "w") as z: z.writestr("a/data.pkl", program); z.writestr("a/data/0", bytes(8))
    with zipfile.ZipFile(tmp_path / "storage.pth", "w") as z: z.writestr("a/data.pkl", program.replace(b"K\x02t", b"J\xff\xff\xff\x7ft")); z.writestr("a/data/0", bytes(8))
    done = subprocess.run([sys.executable, "-c", WATCHED, ROOT, tmp_path], text=True, capture_output=True, timeout=100)
    rows = [r.split("|") for r in done.stdout.splitlines()]
    assert len(rows) == len(list(tmp_path.iterdir())), done.stderr
    for name, seconds, ran_out, said in rows:
        assert float(seconds) < 6 and ran_out == "False", (name, seconds, said)
        assert said.startswith("BadInput") or name in ("billion laughs.pkl", "memory far out.pkl"), (name, said)


# Damage ---------------------------------------------------------------------------------------------------------------

def small_files(folder):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    pca = PCA(2).fit(np.random.default_rng(0).normal(size=(30, 4)))
    save(net, folder / "new.pth", True); save(net, folder / "old.pth", False)
    for p in (2, 3, 4, 5): (folder / f"{p}.pkl").write_bytes(pickle.dumps(pca, p))
    joblib.dump(pca, folder / "pca.joblib")
    return sorted(folder.iterdir())


def test_fuzz(tmp_path):
    "Whatever byte changes, wherever a file ends: `BadInput`, or arrays as before (numbers and names in a pickle can change unseen)."
    rng, target, start, n, refused = np.random.default_rng(0), tmp_path / "x", time.process_time(), 0, 0
    (tmp_path / "f").mkdir()
    for path in small_files(tmp_path / "f"):
        raw = path.read_bytes()
        truth = read_pickled_tensors(path)
        for k in range(150):
            body = bytearray(raw)
            if k % 5 == 0: body = body[:rng.integers(len(raw))]
            else:
                for at in rng.integers(len(raw), size=1 + k % 3): body[at] = rng.integers(256)
            target.write_bytes(body)
            n += 1
            try: arrays = read_pickled_tensors(target)
            except BadInput: refused += 1; continue
            assert all(type(a) is np.ndarray and a.dtype.kind in "fiub" and a.nbytes <= len(raw) for a in arrays.values())
            if k % 5 == 0 or path.name == "new.pth": assert all(np.array_equal(a, truth[k]) for k, a in arrays.items() if k in truth)
    assert refused > n / 2 and time.process_time() - start < 60


def test_every_truncation_of_a_network(tmp_path):
    for new in (True, False):
        path = save(nn.Linear(2, 2), tmp_path / "a.pth", new)
        raw = path.read_bytes()
        for n in range(0, len(raw) - 1, 13):
            path.write_bytes(raw[:n])
            with pytest.raises(BadInput): read_pickle(path)


@pytest.mark.parametrize("what", ["missing", "folder", "empty", "text", "gzip", "joblib"])
def test_what_is_no_pickle(what, tmp_path):
    import gzip
    path = tmp_path / "x.pkl"
    if what == "folder": path.mkdir()
    if what == "joblib": joblib.dump(np.arange(5.0), path, compress=3)
    elif what in ("empty", "text", "gzip"): path.write_bytes(dict(empty=b"", text=b"hello", gzip=gzip.compress(b"hello"))[what])
    with pytest.raises(BadInput, match=dict(missing="not there", folder="not a file", gzip="compressed", joblib="compressed").get(what)) as e: read_pickle(path)
    assert e.value.remedy


# What is read is what was written ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_protocol(protocol, tmp_path):
    rng = np.random.default_rng(protocol)
    given = dict(c=rng.normal(size=(3, 4)), f=np.asfortranarray(rng.normal(size=(3, 4)).astype("f4")), big=rng.normal(size=5).astype(">f8"), i=np.arange(-3, 3, dtype="i2"),
                 b=np.array([True, False]), zero=np.zeros((0, 3)), scalar=np.array(2.5), view=rng.normal(size=(6, 4))[::2, ::-1], u=np.arange(300, dtype="u8"))
    for dump in (lambda f: f.write_bytes(pickle.dumps(given, protocol)), lambda f: joblib.dump(given, f, protocol=protocol)):
        dump(tmp_path / "a.pkl")
        found = read_pickled_tensors(tmp_path / "a.pkl")
        assert list(found) == list(given)
        for k, a in given.items(): assert np.array_equal(found[k], a) and found[k].shape == a.shape and found[k].dtype.newbyteorder("=") == a.dtype.newbyteorder("="), k
        assert not any(a.flags.writeable and a.size for a in found.values())


def test_plain_values(tmp_path):
    given = dict(a=[1, -2.5, None, True, "é", b"x", 10 ** 30, (1, (2,))], s={"x", "y"}, n=np.float64(0.25), m=np.int64(7))
    for p in (2, 3, 4, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(given, p)); assert read_pickle(tmp_path / "a.pkl") == given


@pytest.mark.parametrize("new", [True, False])
def test_tensors_and_views(new, tmp_path):
    base = torch.arange(24.).reshape(4, 6)
    given = {"base": base, "t": base.t(), "step": base[1::2, ::3], "half": base.half(), "double": base.double(), "i": torch.arange(5), "b": torch.tensor([True, False]),
             "scalar": torch.tensor(3.0), "none": torch.zeros(0, 3), "p": nn.Parameter(base[0])}
    found = read_pickled_tensors(save(given, tmp_path / "a.pth", new))
    assert list(found) == list(given) and all(np.array_equal(found[k], v.detach().numpy()) for k, v in given.items())


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kind", ["expanded", "bfloat16", "sparse"])
def test_tensors_that_are_refused(kind, new, tmp_path):
    tensor = dict(expanded=torch.zeros(1).expand(100), bfloat16=torch.zeros(3, dtype=torch.bfloat16), sparse=torch.eye(3).to_sparse())[kind]
    with pytest.raises(BadInput): read_pickled_tensors(save(dict(a=tensor), tmp_path / "a.pth", new))


def test_a_module_of_torch_1_1(tmp_path, monkeypatch):
    "It kept a reference to a backend that is no more, and made its mappings as `OrderedDict`."
    from collections import OrderedDict
    from torch.nn.backends.thnn import _get_thnn_function_backend
    class Backend:
        def __reduce__(self): return _get_thnn_function_backend, ()
    layer = nn.Linear(3, 2)
    layer.__dict__.update(_backend=Backend(), _buffers=OrderedDict(), _modules=OrderedDict(), _parameters=OrderedDict(layer._parameters))
    found = read_pickled_tensors(save(layer, tmp_path / "a.pth", False))
    assert list(found) == ["weight", "bias"] and np.array_equal(found["weight"], layer.weight.detach())


# The published chain ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network", ["64k/0001.pth", "64k", "new.pth"])
@pytest.mark.parametrize("scaled", [True, False])
def test_same_as_the_module(alike, network, scaled, tmp_path):
    folder, pca, flux = alike["folder"], alike["pca"], alike["flux"]
    given = dict(pca=folder / "latent_pca.pkl", meanspec=folder / "meanspec.npy") if network == "new.pth" else {}
    vae = convert_published(folder / network, tmp_path / "out", scaler=folder / "scaler.pkl" if scaled else None, **given)
    y = pca.transform(alike["mu"])
    expected = alike["scaler"].transform(y) if scaled else y / np.sqrt(pca.explained_variance_)
    for scale in (1e-17, 1.0, 1e5): assert np.allclose(vae.encode(flux * scale), expected, atol=3e-4)
    back = pca.inverse_transform(alike["scaler"].inverse_transform(expected) if scaled else expected * np.sqrt(pca.explained_variance_))
    with torch.no_grad(): decoded = alike["net"].decode(torch.from_numpy(back.astype("f4"))).numpy() + alike["mean"]
    assert np.allclose(vae.decode(expected), np.sqrt(1000) * decoded, atol=2e-5)
    with torch.no_grad(): lv = vae.net.encode(torch.from_numpy((np.sqrt(1000) * (flux - alike["mean"])).astype("f4")))[1].numpy()
    assert np.allclose(lv, alike["lv"], atol=1e-5)
    assert np.allclose((expected @ vae.unwhiten) @ vae.whiten.T, expected, atol=1e-12)
    assert vae.info["published"] == dict(ncode=5, alpha=0.0, lambd=31.5) and vae.info["files"]["network"].startswith(Path(network).stem if "." in network else "0001")
    assert vae.net.config["activation"] == "leaky_relu" and vae.net.config["hidden"] == [12, 7]


def test_gaps_are_filled(alike):
    "By the mean spectrum where there are no components: a spectrum like the mean comes out as it was."
    basis = GapBasis(np.ones(1000), np.linalg.qr(np.random.default_rng(0).normal(size=(1000, 4)))[0].T, np.full(4, 1e-3))
    ivar = np.full((2, 1000), 1e4); ivar[:, 300:350] = 0
    flux = np.sqrt(1000) * alike["mean"] * np.array([[1.0], [30.0]])
    for vae in (read_published_vae(alike["folder"] / "64k"), read_published_vae(alike["folder"] / "64k", basis=basis)):
        seen = np.where(ivar > 0, flux, np.nan)
        assert np.allclose(infill(seen, ivar, vae.basis), flux, rtol=0.02) and np.isfinite(vae.encode(seen, ivar)).all()
        assert np.allclose(vae.basis.mean, np.sqrt(1000) * alike["mean"])


def test_pipeline_of_pca_and_scaler(alike, tmp_path):
    pipe = make_pipeline(PCA(3, whiten=True), StandardScaler()).fit(alike["mu"])
    joblib.dump(pipe, tmp_path / "pca.pkl")
    centre, W, U = whitening_of(tmp_path / "pca.pkl", n_latent=5)
    assert np.allclose((alike["mu"] - centre) @ W.T, pipe.transform(alike["mu"]), atol=1e-9)


ACTS = [("relu", "relu"), ("leaky_relu", "leaky_relu"), ("tanh", "tanh"), ("elu", None), ("sigmoid", None)]


@pytest.mark.parametrize("written, found", ACTS)
def test_activation_from_the_source(written, found, tmp_path):
    path = save(toy(tmp_path, written), tmp_path / "a.pth", new=False)
    sys.modules.pop("InfoVAE")
    tree = read_pickle(path)
    if found: assert find_activation(tree, path) == found
    else:
        with pytest.raises(BadInput, match=written): find_activation(tree, path)


def test_activation_from_modules_and_names():
    def tree(*layers):
        file = io.BytesIO(); torch.save(nn.Sequential(*layers), file)
        return file.getvalue()
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pth"
        def find(*layers, names=()):
            path.write_bytes(tree(*layers)); return find_activation(read_pickle(path), path, names)
        assert find(nn.ReLU(), nn.ReLU()) == "relu" and find(nn.LeakyReLU()) == "leaky_relu" and find(nn.GELU()) == "gelu"
        assert find(names=("encd", "enc2", "mu", "lv", "decd", "dec2", "outp")) == "leaky_relu"
        for bad in ([], [nn.ReLU(), nn.Tanh()], [nn.LeakyReLU(0.2)], [nn.GELU("tanh")], [nn.ELU()]):
            with pytest.raises(BadInput, match="activation"): find(*bad)


def layers_of(*shapes): return [(f"l{i}", np.full(s, 0.1, "f4"), np.zeros(s[0], "f4")) for i, s in enumerate(shapes)]


def test_shapes_that_make_a_network():
    two = network_of(layers_of((8, 20), (3, 8), (3, 8), (8, 3), (20, 8)), "relu", n_wave=20)
    one = network_of(layers_of((8, 20), (6, 8), (8, 3), (20, 8)), "relu", n_wave=20)
    assert two.config == one.config and two.config["hidden"] == [8] and two.config["n_latent"] == 3
    assert network_of(layers_of((6, 20), (20, 3)), "relu", n_wave=20).config["hidden"] == []


@pytest.mark.parametrize("shapes", [[], [(20, 20)], [(8, 20), (3, 8), (8, 3), (20, 8)], [(8, 20), (3, 8), (3, 8), (9, 3), (20, 9)], [(8, 20), (3, 7), (3, 7), (8, 3), (20, 8)],
                                    [(8, 21), (3, 8), (3, 8), (8, 3), (20, 8)], [(8, 20), (3, 8), (3, 8), (8, 3), (21, 8)], [(3, 8), (8, 20), (3, 8), (8, 3), (20, 8)]])
def test_shapes_that_do_not(shapes):
    with pytest.raises(BadInput): network_of(layers_of(*shapes), "relu", n_wave=20)


def test_heads_by_name():
    for first, second, swapped in (("mu", "lv", False), ("lv", "mu", True), ("fc_logvar", "fc_mean", True), ("a", "b", False)):
        layers = layers_of((8, 20), (3, 8), (3, 8), (8, 3), (20, 8))
        layers[1], layers[2] = (first, np.full((3, 8), 1.0, "f4"), np.zeros(3)), (second, np.full((3, 8), 2.0, "f4"), np.zeros(3))
        assert network_of(layers, "relu", n_wave=20).encoder[-1].weight[0, 0].item() == (2.0 if swapped else 1.0)


def test_other_layers_are_refused(tmp_path):
    for other in (nn.BatchNorm1d(3), nn.Conv1d(1, 1, 3), nn.LayerNorm(3), nn.Bilinear(2, 2, 2), nn.Softmax(1), nn.MaxPool1d(2), nn.LSTM(2, 2)):
        path = save(nn.Sequential(nn.Linear(3, 3), other), tmp_path / "a.pth", True)
        if type(other) is nn.Softmax:
            with pytest.raises(BadInput): find_activation(read_pickle(path), path)
        else:
            with pytest.raises(BadInput): linear_layers(read_pickle(path), path)


def test_bad_companions(alike, tmp_path):
    network = alike["folder"] / "64k/0001.pth"
    def read(pca=alike["folder"] / "latent_pca.pkl", mean=alike["folder"] / "meanspec.npy", **more): return read_published_vae(network, pca, mean, **more)
    def refused(match, **given):
        with pytest.raises(BadInput, match=match) as e: read(**given)
        assert e.value.remedy
    def pca(change):
        thing = PCA(3).fit(alike["mu"]); change(thing)
        (tmp_path / "p.pkl").write_bytes(pickle.dumps(thing)); return tmp_path / "p.pkl"
    def mean(a): np.save(tmp_path / "m.npy", a); return tmp_path / "m.npy"
    refused("holds no PCA", pca=alike["folder"] / "scaler.pkl")
    refused("holds no StandardScaler", scaler=alike["folder"] / "latent_pca.pkl")
    refused("without components_", pca=pca(lambda p: p.__dict__.pop("components_")))
    refused("orthonormal", pca=pca(lambda p: setattr(p, "components_", p.components_ * 1.1)))
    refused("NaN", pca=pca(lambda p: setattr(p, "mean_", p.mean_ * np.nan)))
    refused("5 latents", pca=pca(lambda p: p.fit(np.random.default_rng(0).normal(size=(30, 4)))))
    refused("variances", pca=pca(lambda p: setattr(p, "explained_variance_", 0 * p.explained_variance_)))
    refused("Σf²", mean=mean(np.sqrt(1000) * alike["mean"]))
    refused("1000 finite", mean=mean(alike["mean"][:999])); refused("1000 finite", mean=mean(alike["mean"] * np.nan))
    refused("'step'", activation="step")
    (tmp_path / "alone.pth").write_bytes(network.read_bytes())
    with pytest.raises(BadInput, match="latent_pca.pkl"): read_published_vae(tmp_path / "alone.pth")
    (tmp_path / "other.pth").write_bytes(network.read_bytes())
    with pytest.raises(BadInput, match="2 files"): read_published_vae(tmp_path)


def test_weights_that_are_not_finite(alike, tmp_path):
    net = nn.Sequential(nn.Linear(3, 3)); net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(BadInput, match="NaN"): linear_layers(read_pickle(save(net, tmp_path / "a.pth", True)), "a.pth")


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_converted_folder_in_another_process(alike, tmp_path, activation):
    "The folder needs neither the pickles nor this module."
    vae = convert_published(alike["folder"] / "64k", tmp_path / "out", activation=activation)
    np.save(tmp_path / "t.npy", vae.encode(alike["flux"][:3])); np.save(tmp_path / "f.npy", alike["flux"][:3])
    code = ("import sys, numpy as np; sys.path.insert(0, sys.argv[1]); from spectranb.vae import SpectrumVAE; "
            "assert np.allclose(SpectrumVAE.load(sys.argv[2] + '/out').encode(np.load(sys.argv[2] + '/f.npy')), np.load(sys.argv[2] + '/t.npy'), atol=1e-6)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert isinstance(SpectrumVAE.load(tmp_path / "out"), SpectrumVAE)
