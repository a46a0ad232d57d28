"Table 1: trainings done once, ingredients, paired tests, tables, and what can be wrong with the input."
import copy, json
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from scipy import stats
from torch import nn

from spectranb.core import BadInput
from spectranb.deconv import FastDeconv
from spectranb.models import create_network
from spectranb.table1 import (BETTER, INGREDIENTS, NETWORKS, PUBLISHED, AverageWeights, FreshStatistics, GaussianLoss, Sample, ablation, ablation_frame, compare, export_results, joined,
                              load_results, make_sample, mean_sd, noise_floor, noisier, order_sentence, paired_test, read_run, read_runs, run_command, run_once, runs_frame, size_line, sky_noise, smaller,
                              table1, table1_frame, training_size, with_ingredients)
from spectranb.training import Batches, Images, InputTransform, make_learner

torch.set_num_threads(1)
QUICK = dict(epochs=2, crop=16, bin=1, batch_size=32)


@pytest.fixture(scope="module")
def toys():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((200, 6)).astype(np.float32)
    images = rng.normal(0, 0.1, (200, 5, 20, 20))
    images[:, :, 8:13, 8:13] += np.exp(latents[:, :5, None, None])
    return Sample(images.astype(np.float16), latents, np.arange(160), np.arange(160, 200), dict(simulated=True, n_train=160, n_valid=40))

@pytest.fixture(scope="module")
def done(toys, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return out, table1(toys, out, ("simple_deconv", "simple_cnn"), (0, 1), progress=False, **QUICK)


# --- a training, once ---
def test_result_is_that_of_its_predictions(done, toys):
    out, runs = done
    with np.load(out / "simple_cnn-2-0" / "predictions.npz") as f: error, rows, true = (f["predicted"] - f["true"]).astype(float), f["rows"], f["true"]
    row = runs.loc["simple_cnn-2-0"]
    assert np.array_equal(rows, toys.valid) and np.array_equal(true, toys.targets[toys.valid])
    assert row["mse"] == pytest.approx((error ** 2).mean(), rel=1e-6)
    assert row["published_mse"] == pytest.approx((error ** 2).mean(), rel=1e-6)              # 40 galaxies are one batch
    for k in range(6):
        assert row[f"rmse_{k + 1}"] == pytest.approx(np.sqrt((error[:, k] ** 2).mean()), rel=1e-6)
        assert row[f"r2_{k + 1}"] == pytest.approx(1 - (error[:, k] ** 2).mean() / true[:, k].astype(float).var(), rel=1e-5)
    assert row["mse"] == pytest.approx(pd.read_csv(out / "simple_cnn-2-0" / "history.csv")["mse"].iloc[-1], rel=0.02)    # the training's own figure

def test_finished_trainings_are_read_and_others_done_again(done, toys, monkeypatch):
    out, runs = done
    import spectranb.table1 as module
    trained, train = [], module.train_network
    monkeypatch.setattr(module, "train_network", lambda *a, **k: trained.append((a[4], k["seed"])) or train(*a, **k))
    (out / "simple_cnn-2-1" / "run.json").unlink()                                            # killed before it was finished
    again = table1(toys, out, ("simple_deconv", "simple_cnn"), (0, 1), progress=False, **QUICK)
    assert trained == [("simple_cnn", 1)]
    pd.testing.assert_series_equal(again["mse"], runs["mse"])                                 # and with the same result

def test_published_recipe(done):
    asked = json.loads((done[0] / "simple_cnn-2-0" / "run.json").read_text())["asked"]
    assert (asked["loss"], asked["rotate"], asked["band_dropout"]) == ("mse", 10.0, 0.0)
    import inspect
    defaults = {k: v.default for k, v in inspect.signature(table1).parameters.items()}
    assert defaults["networks"] == NETWORKS and len(NETWORKS) == 5 and defaults["split"] == "random" and defaults["epochs"] == 10 and len(defaults["seeds"]) >= 3

def test_foreign_and_damaged_folders_are_named(done, toys, tmp_path):
    with pytest.raises(BadInput, match="holds a training with batch_size = 32, not 16"): table1(toys, done[0], ("simple_cnn",), (0,), progress=False, **QUICK | dict(batch_size=16))
    with pytest.raises(BadInput, match="n_train = 160, not 80"): run_once(smaller(toys, 80), done[0] / "simple_cnn-2-0", "simple_cnn", **QUICK)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"): read_run(tmp_path)
    assert read_run(tmp_path / "nothing") is None and not len(read_runs(tmp_path / "nothing"))
    with pytest.raises(BadInput, match="holds no finished training"): export_results(tmp_path / "nothing", tmp_path / "text")
    with pytest.raises(BadInput, match="runs.csv"): load_results(tmp_path)
    with pytest.raises(BadInput, match="less than a batch"): run_once(smaller(toys, 20), tmp_path / "x", "simple_cnn", **QUICK | dict(batch_size=161))
    with pytest.raises(BadInput, match="160 training galaxies, 161 wanted"): smaller(toys, 161)
    with pytest.raises(BadInput, match="is no ingredient"): with_ingredients(("magic",), 128, 2)
    with pytest.raises(BadInput, match="rate-0.01, rate-0.003: set lr twice"): with_ingredients(("rate-0.01", "rate-0.003"), 128, 2)
    with pytest.raises(BadInput, match="cannot be taken away"): noisier(toys, 0.5)


# --- ingredients ---
class Toy:                                                            # a fastai learner of two numbers
    def learner(self, cbs, epochs=3, n=64):
        torch.manual_seed(0)
        images = Images(np.random.default_rng(0).normal(size=(n, 5, 4, 4)), np.arange(n), InputTransform(np.ones(5), np.zeros(5), np.ones(5), 4))
        batches = Batches(images, np.random.default_rng(1).normal(size=(n, 2)), 16, shuffle=True)
        net = nn.Sequential(nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 2))
        learn = make_learner(batches, Batches(images, batches.targets, 16), net, precision=torch.float32, cbs=cbs)
        learn.fit_one_cycle(epochs, 1e-2)
        return learn

def test_averaged_weights_are_the_average():
    from fastai.callback.core import Callback
    class Watch(Callback):
        order = 12                                                    # before `AverageWeights`
        def before_fit(self): self.seen = []
        def after_batch(self):
            if self.training: self.seen.append({k: v.double().clone() for k, v in self.model.state_dict().items()})
    watch, plain = Watch(), Watch()
    learn, reference = Toy().learner([watch, AverageWeights(0.5)]), Toy().learner([plain])
    mean = watch.seen[0]
    for state in watch.seen: mean = {k: mean[k] + (state[k] - mean[k]) / 6 for k in mean}          # half of 12 steps
    for k, v in learn.model.state_dict().items():
        if v.is_floating_point(): torch.testing.assert_close(v.double(), mean[k], rtol=1e-4, atol=1e-6)
    for a, b in zip(watch.seen, plain.seen):                                                       # the training itself is untouched
        for k in a: torch.testing.assert_close(a[k], b[k])
    assert not torch.allclose(learn.model[2].weight, reference.model[2].weight)

def test_gaussian_loss_learns_the_variance_and_leaves_it_behind(monkeypatch):
    full = []
    monkeypatch.setattr(GaussianLoss, "after_fit", lambda self: (full.append(self.model[-1].out_features), self.resize(True)))
    callback = GaussianLoss()
    learn = Toy().learner([callback])
    assert full == [4] and learn.model[-1].out_features == 2
    pred, y, callback.log_var = torch.randn(7, 2), torch.randn(7, 2), torch.randn(7, 2)
    reference = -torch.distributions.Normal(pred, (callback.log_var / 2).exp()).log_prob(y).mean() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(callback.loss_of(pred, y), reference.float())

def test_ingredients_combine():
    both = with_ingredients(("generalised-mean", "averaged-covariance", "batches-32", "full-resolution"), 128, 2)
    assert both == dict(crop=64, bin=1, batch_size=32, net_kwargs=dict(pool="gem", deconv=dict(average="covariance")))
    assert set(BETTER) <= set(INGREDIENTS)
    assert with_ingredients(("averaged-weights", "gaussian-loss"), 128, 2)["cbs"] == (AverageWeights, GaussianLoss)

def test_ablation_shares_the_base(done, toys):
    out, runs = done
    quick = {k: v for k, v in QUICK.items()}
    shares = ablation(toys, out, ("gaussian-loss",), ("gaussian-loss", "averaged-weights"), "simple_cnn", (0, 1), progress=False, **quick)
    assert list(shares["label"].unique()) == ["simple_cnn", "gaussian-loss", "gaussian-loss+averaged-weights"]
    assert shares.loc["simple_cnn-2-0", "mse"] == runs.loc["simple_cnn-2-0", "mse"]
    table = ablation_frame(shares, "simple_cnn")
    change = 100 * (shares["mse"].filter(like="gaussian-loss-2").to_numpy() / runs["mse"].filter(like="simple_cnn").to_numpy() - 1)
    assert table.loc["gaussian-loss", "change [%]"] == f"{change.mean():.1f} ± {change.std(ddof=1):.1f} (2)"


# --- size and noise ---
def test_what_changes_nothing_is_left_out(done, toys, tmp_path):
    "Unbinned images have their full resolution already."
    runs = ablation(toys, tmp_path, ("full-resolution", "rate-0.01"), ("full-resolution",), "simple_cnn", (0,), progress=False, **QUICK | dict(epochs=1))
    assert list(runs["label"]) == ["simple_cnn", "rate-0.01"]

def test_smaller_samples_nest_and_keep_the_length(toys):
    for seed in range(4):
        parts = [smaller(toys, n, seed) for n in (20, 40, 160)]
        assert set(parts[0].train) < set(parts[1].train) < set(parts[2].train) and [len(p.train) for p in parts] == [160] * 3
        assert (np.unique(parts[0].train, return_counts=True)[1] == 8).all() and parts[0].info["n_train"] == 20
    assert set(smaller(toys, 20, seed=4).train) != set(parts[0].train)

def test_noise_adds_in_quadrature_and_keeps_gaps(toys):
    cutouts = toys.cutouts.copy(); cutouts[3, 2] = np.nan
    from dataclasses import replace
    gappy = replace(toys, cutouts=cutouts)
    assert np.allclose(sky_noise(cutouts, 5), 0.1, rtol=0.03)
    for factor in (2, 4):
        after = noisier(gappy, factor, crop=20)
        assert np.allclose(sky_noise(after.cutouts, 5), 0.1 * factor, rtol=0.03) and np.isnan(after.cutouts[3, 2]).all() and np.isfinite(after.cutouts[4]).all()
        assert after.info["noise"] == factor
    assert noisier(toys, 1) is toys
    assert np.array_equal(noisier(toys, 2, 20).cutouts, noisier(toys, 2, 20).cutouts)

def test_size_experiment_takes_over_the_whole_sample(done, toys):
    runs = training_size(toys, done[0], (40, 160), "simple_cnn", (0,), progress=False, **QUICK)
    assert list(runs.index) == ["galaxies40-2-0", "simple_cnn-2-0"] and list(runs["n_train"]) == [40, 160]


# --- statistics ---
def test_paired_test_against_scipy():
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 7):
        a, b = rng.gamma(1, 1, (2, seeds, 300))
        test, t = paired_test(a, b), stats.ttest_rel(a.mean(1), b.mean(1))
        low, high = stats.bootstrap(((a - b).mean(0),), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
        assert (test["t"], test["p"]) == pytest.approx((t.statistic, t.pvalue))
        assert (test["boot_low"], test["boot_high"]) == pytest.approx((low, high), abs=0.15 * (high - low))
    assert np.isnan(paired_test(a[:1], b[:1])["p"]) and paired_test(a[:1], b[:1])["seeds"] == 1
    with pytest.raises(BadInput, match="meet"): paired_test(a, b[:, 1:])

def test_paired_test_is_calibrated():
    rng = np.random.default_rng(1)
    p = [paired_test(*rng.normal(size=(2, 3, 20)), n_boot=2)["p"] for _ in range(1000)]
    assert abs(np.mean(np.array(p) < 0.05) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 1000)

def test_compare_uses_common_seeds(done, toys):
    out, runs = done
    table1(toys, out, ("simple_cnn",), (2,), progress=False, **QUICK)                         # a seed that the other does not have
    test = compare(out, [("simple_deconv", "simple_cnn")], epochs=2).iloc[0]
    d = runs["mse"].filter(like="deconv").to_numpy() - runs["mse"].filter(like="cnn").to_numpy()
    assert test["seeds"] == 2 and test["difference"] == pytest.approx(d.mean(), rel=1e-5)


# --- tables ---
def test_published_figures():
    assert PUBLISHED.round(3).loc["xresnet18_hybrid"].tolist() == [0.506, 0.474] and PUBLISHED.round(3).loc["xresnet18_deconv"].tolist() == [0.541, 0.577]
    assert PUBLISHED[10].is_monotonic_increasing and tuple(PUBLISHED.index) == NETWORKS

def made_up(order, seeds=3, spread=1e-3):
    rng = np.random.default_rng(0)
    rows = {f"{a}-10-{s}": dict(asked=dict(arch=a, epochs=10, seed=s, n_train=4000, n_valid=1000, crop=128, bin=2, batch_size=128, simulated=True),
                                result=dict(mse=0.5 + 0.1 * i + spread * rng.normal(), published_mse=0.49 + 0.1 * i), cost=dict(parameters=7, seconds=60, device="D", threads=1)) for i, a in enumerate(order) for s in range(seeds)}
    return runs_frame(rows)

def test_order_is_computed():
    def tests(runs): return pd.DataFrame([dict(a=a, b=b) | paired_test(*(runs.loc[runs["label"] == x, ["mse"]].to_numpy() for x in (a, b))) for a, b in zip(NETWORKS, NETWORKS[1:])])
    good, bad = made_up(NETWORKS), made_up(NETWORKS[::-1])
    assert order_sentence(good, tests(good)).startswith("The published order holds, in 5 networks of 5.") and "not resolved" not in order_sentence(good, tests(good))
    said = order_sentence(bad, tests(bad))
    assert said.startswith(f"The published order does not hold: here it is {' < '.join(NETWORKS[::-1])}") and "xresnet18_hybrid > xresnet18 (" in said
    loud = made_up(NETWORKS, spread=1.0)
    assert "not resolved" in order_sentence(loud, tests(loud))

def test_table_and_its_size():
    runs = made_up(NETWORKS)
    table = table1_frame(runs)
    assert list(table.index) == list(NETWORKS) and table.loc["xresnet18", "Wu & Peek, 10 epochs*"] == "0.528"
    values = runs.loc[runs["label"] == "xresnet18", "mse"]
    assert table.loc["xresnet18", "MSE, 10 epochs"] == f"{values.mean():.3f} ± {values.std():.3f} (3)"
    assert size_line(runs) == "4,000 simulated galaxies to learn from, 1,000 to validate, 64 × 64 pixels of 0.5″, 10 epochs, batches of 128, seeds 0, 1, 2; D, 1 threads"
    assert mean_sd([]) == "–" and (table1_frame(runs.iloc[:0])["parameters"] == "–").all()

def test_text_and_back(done, tmp_path):
    out, _ = done
    kept = export_results(out, tmp_path, command="test", floor=0.1)
    assert kept.about == dict(command="test", floor=0.1) and set(kept.history["run"]) == set(kept.runs.index)
    pd.testing.assert_series_equal(kept.runs["mse"], read_runs(out)["mse"], rtol=1e-5)


# --- cut off ---
@pytest.mark.parametrize("cbs", [(), (AverageWeights,), (GaussianLoss, FreshStatistics)])
def test_a_training_that_was_cut_off_goes_on(toys, tmp_path, monkeypatch, cbs):
    "Weights, curves and figures to the last bit, whatever the callbacks keep; what was asked for must be the same."
    from fastai.callback.core import Callback
    from spectranb import table1
    settings, uncut = QUICK | dict(epochs=3, arch="simple_deconv", cbs=cbs), table1.train_network
    whole = run_once(toys, tmp_path / "whole", **settings)

    class CutOff(Callback):
        def after_batch(self):
            if self.epoch == 1 and self.training: raise KeyboardInterrupt
    monkeypatch.setattr(table1, "train_network", lambda *args, cbs=(), **kwargs: uncut(*args, cbs=[*cbs, CutOff()], **kwargs))
    with pytest.raises(KeyboardInterrupt): run_once(toys, tmp_path / "cut", **settings)
    monkeypatch.setattr(table1, "train_network", uncut)
    with pytest.raises(BadInput, match="seed = 0, not 1"): run_once(toys, tmp_path / "cut", **settings | dict(seed=1))
    before = np.random.get_state()[1].tolist()
    assert run_once(toys, tmp_path / "cut", **settings)["result"] == whole["result"] and np.random.get_state()[1].tolist() == before
    for name in ("weights.safetensors", "history.csv"): assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name in ("checkpoint.pt", ".checkpoint.pt.x.tmp.pt"): (tmp_path / "cut" / name).write_bytes(b"left by a kill")
    assert run_once(toys, tmp_path / "cut", **settings)["result"] == whole["result"]
    assert {str(f.relative_to(tmp_path / "cut")) for f in (tmp_path / "cut").rglob("*")} == {str(f.relative_to(tmp_path / "whole")) for f in (tmp_path / "whole").rglob("*")}


def test_a_checkpoint_of_other_callbacks():
    from spectranb.experiment import restore
    with pytest.raises(BadInput, match=r"made with the callbacks \['average_weights'\], not \[\]"): restore(SimpleNamespace(cbs=[]), dict(callbacks=dict(average_weights={})))


# --- a survey ---
@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    from spectranb.data.mock import simulate_survey
    return simulate_survey(tmp_path_factory.mktemp("mock") / "survey", 60, seed=3, size=32, n_workers=1, progress=False)

def test_sample_of_a_survey(survey):
    from spectranb.data.survey import split_random
    latents = np.random.default_rng(0).normal(5, 3, (60, 4)); latents[7, 1] = np.nan
    sample = make_sample(survey, latents=latents)
    train, valid = split_random(60)
    assert set(sample.train) == set(train) - {7} and set(sample.valid) == set(valid) - {7}      # the published split, without the galaxy that has no target
    assert np.allclose(sample.targets[sample.train].mean(0), 0, atol=1e-5) and np.allclose(sample.targets[sample.train].std(0), 1, atol=1e-5)
    assert sample.info["simulated"] and sample.info["n_train"] == len(sample.train)
    few = make_sample(survey, 20, 5, latents=latents)
    assert len(few.train) == 20 and len(few.valid) == 5 and set(few.train) < set(sample.train)
    other = make_sample(survey, latents=latents + 1e-3)
    assert sample.info["survey data"] == make_sample(survey, latents=latents).info["survey data"] != other.info["survey data"] and len(sample.info["survey data"]) == 12
    with pytest.raises(BadInput, match="in its training part, 100 wanted"): make_sample(survey, 100, latents=latents)
    with pytest.raises(BadInput, match="in its validation part, 100 wanted"): make_sample(survey, 10, 100, latents=latents)

def test_sample_that_teaches_nothing_of_a_class_or_latent(survey, monkeypatch):
    latents = np.random.default_rng(0).normal(5, 3, (60, 4))
    sample = make_sample(survey, latents=latents)
    catalog = survey.catalog.copy()
    catalog.loc[sample.valid[:2], "spec_class"] = "QSO"
    latents[sample.train, 2] = 1.1
    with pytest.raises(BadInput, match=r"latents: \[2\] \(counted from 0\) are the same for all 48 training"): make_sample(survey, latents=latents)
    monkeypatch.setattr(survey, "catalog", catalog)
    with pytest.raises(BadInput, match="2 of class QSO in the validation part"): make_sample(survey, latents=latents)

def test_fresh_statistics_are_the_mean_over_large_batches():
    "Against means taken by hand with the weights at rest, for both kinds of layer; a rest smaller than a batch is left out."
    rng = np.random.default_rng(0)
    cutouts, targets = rng.normal(size=(72, 5, 16, 16)), rng.normal(size=(72, 3)).astype(np.float32)
    transform = InputTransform.fit(cutouts, 16)
    batches = lambda shuffle: Batches(Images(cutouts, np.arange(72), transform), targets, 8, shuffle=shuffle)
    assert [len(x) for x in joined(batches(False), 20)] == [24, 24, 24] and [len(x) for x in joined(batches(False), 30)] == [32, 32]
    for name in "simple_cnn", "simple_deconv":
        torch.manual_seed(0)
        learn = make_learner(batches(False), batches(False), create_network(name, n_out=3), precision=torch.float32, cbs=[FreshStatistics(batch_size=24)])
        learn.fit(1, 1e-2)
        first, x = learn.model[0], transform(torch.from_numpy(cutouts.astype(np.float32)))
        assert not learn.model.training
        if name == "simple_cnn":
            y = first[0](x)
            assert torch.allclose(first[1].running_mean, y.mean((0, 2, 3)), atol=1e-5) and first[1].momentum == 0.1
            by_batch = torch.stack([part.var((0, 2, 3)) for part in y.split(24)]).mean(0)
            assert torch.allclose(first[1].running_var, by_batch, rtol=1e-4)
        else:
            roots = []
            for part in x.split(24):
                layer = copy.deepcopy(first[0]).train(); layer.momentum = 1.0
                layer(part); roots.append(layer.running_deconv)
            assert isinstance(first[0], FastDeconv) and torch.allclose(first[0].running_deconv, torch.stack(roots).mean(0), atol=1e-4)

def test_the_long_column_is_for_the_deep_networks(survey, tmp_path, monkeypatch):
    import spectranb.table1 as module
    asked = []
    def fake(folder, sample, arch, epochs, seed, **_): asked.append((folder.name, arch, epochs, seed)); return dict(asked={}, result={}, cost={})
    monkeypatch.setattr(module, "run_once", fake)
    module.table1(make_sample(survey, latents=np.random.default_rng(0).normal(size=(60, 2))), tmp_path, ("xresnet18", "simple_cnn"), (0, 1), epochs=10, long=50, progress=False)
    assert asked == [("xresnet18-10-0", "xresnet18", 10, 0), ("simple_cnn-10-0", "simple_cnn", 10, 0), ("xresnet18-10-1", "xresnet18", 10, 1), ("simple_cnn-10-1", "simple_cnn", 10, 1),
                     ("xresnet18-50-0", "xresnet18", 50, 0), ("xresnet18-50-1", "xresnet18", 50, 1)]

def test_floor_is_the_noise_of_the_targets(survey):
    class Mean:                                                       # a coder whose latents are two means over the spectrum
        def encode(self, flux, ivar=None, bad="raise"): return np.stack([flux[:, :500].mean(1), flux[:, 500:].mean(1)], 1)
    sample = make_sample(survey, latents=np.random.default_rng(0).normal(size=(60, 2)))
    code = lambda rows, a: Mean().encode(a[rows])
    reference = np.mean(((code(sample.valid, survey.spectra) - code(sample.valid, survey.arrays["noiseless"])) / code(sample.train, survey.spectra).std(0)) ** 2)
    assert noise_floor(survey, sample, Mean()) == pytest.approx(reference, rel=1e-5) and reference > 0

@pytest.mark.parametrize("what, said", [("table1", "1 of 5 networks are finished: there is no order yet."), ("noise", "noise of the spectra"), ("ablation", "rate-0.003")])
def test_command(survey, tmp_path, capsys, what, said):
    changes = dict(ingredients=["rate-0.003"], together=[]) if what == "ablation" else dict(ingredients=None, together=None)
    options = changes | dict(what=what, survey=survey.path, out=tmp_path, networks=["simple_cnn"], seeds=[0], epochs=1, crop=32, bin=2, batch_size=16, n=None, n_valid=None,
                   split="random", vae=None, keep=None, long=None, quiet=True)
    run_command(SimpleNamespace(**options))
    out = capsys.readouterr().out
    assert said in out and "48 simulated galaxies to learn from, 12 to validate, 16 × 16 pixels of 0.5″, 1 epochs" in out
    assert len(load_results(tmp_path / "tables").runs) == dict(table1=1, noise=3, ablation=2)[what]
