"The spectrum VAE: bad input, round trips, scale, masks, determinism, damaged folders. Toy spectra, no simulator needed."
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectranb.core import REST_LOGLAM, REST_WAVELENGTH, BadInput
from spectranb.data.spectra import fit_gap_basis
import spectranb.vae as vae_module
from spectranb.vae import InfoVAE, SpectrumVAE, TrainingSet, calibrate_posterior, latent_scatter, check_spectra, info_vae_loss, kl_divergence, latent_pca, mmd, pixel_weights, reduced_chi2, start_from_pca, train_vae

QUICK = dict(hidden=(64, 16), epochs=8, progress=False)


def toys(n, seed=0, snr=20):
    "Continuum of bent slope, a break, lines of independent strength, gaps; (n, 1000) flux, ivar, truth."
    rng = np.random.default_rng(seed)
    age, x = rng.uniform(0, 1, (n, 1)), np.log(REST_WAVELENGTH / 5500)
    truth = np.exp((2 * age - 1) * x - age ** 2 * x ** 2) * np.where(REST_WAVELENGTH < 3995, 1 - 0.5 * age, 1)
    for lam in (3728.5, 4862.7, 5008.2, 6564.6):
        truth = truth + rng.lognormal(-1, 0.5, (n, 1)) * (1 - age) * np.exp(-0.5 * ((REST_LOGLAM - np.log10(lam)) / 5e-4) ** 2)
    truth /= np.sqrt(np.mean(truth ** 2, 1, keepdims=True))
    z = rng.uniform(0.01, 0.2, (n, 1))
    seen = (REST_WAVELENGTH * (1 + z) > 3820) & (REST_WAVELENGTH * (1 + z) < 9180)
    flux = truth + rng.normal(0, 1 / snr, truth.shape)
    return np.where(seen, flux, 0).astype(np.float32), (seen * float(snr ** 2)).astype(np.float32), truth


@pytest.fixture(scope="module")
def data(): return toys(1200)


@pytest.fixture(scope="module")
def vae(data): return SpectrumVAE.fit(*data[:2], **QUICK)


# what comes in --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(0, 1000), (1000, 0), (0,), (3, 999), (3, 3840), (2, 3, 1000), ()])
def test_wrong_shapes_say_what_is_expected(vae, shape):
    with pytest.raises(BadInput) as e: vae.encode(np.ones(shape))
    assert "1000" in str(e.value) and e.value.remedy


def test_wrong_length_names_the_grid(vae):
    with pytest.raises(BadInput, match="999 bins.*3388.4 to 8310.2 Å, rest frame, vacuum"): vae.encode(np.ones(999))


def test_ivar_of_another_shape(vae):
    with pytest.raises(BadInput, match="ivar"): vae.encode(np.ones((2, 1000)), np.ones((3, 1000)))


def test_text_is_refused(vae):
    with pytest.raises(BadInput, match="Give numbers"): vae.encode(np.full((2, 1000), "1.0"))


def spoiled(data, how):
    flux, ivar = data[0][:4].copy(), data[1][:4].copy()
    if how == "nan": flux[2, np.flatnonzero(ivar[2])[5]] = np.nan
    if how == "inf": flux[2, np.flatnonzero(ivar[2])[5]] = np.inf
    if how == "ivar": ivar[2, 5] = np.nan
    if how == "minus": ivar[2, 5] = -1
    if how == "masked": ivar[2] = 0
    if how == "negative": flux[2] *= -1
    if how == "zero": flux[2] = 0
    return flux, ivar


@pytest.mark.parametrize("how,word", [("nan", "flux is NaN"), ("inf", "infinite"), ("ivar", "ivar is NaN"), ("minus", "negative"),
                                      ("masked", "masked"), ("negative", "not positive"), ("zero", "not positive")])
def test_bad_rows_are_named_and_the_rest_goes_on(vae, data, how, word):
    flux, ivar = spoiled(data, how)
    with pytest.raises(BadInput, match=f"spectrum 2: .*{word}"): vae.encode(flux, ivar)
    latents = vae.encode(flux, ivar, bad="nan")
    assert np.isnan(latents[2]).all()
    assert np.allclose(latents[[0, 1, 3]], vae.encode(data[0][:4], data[1][:4])[[0, 1, 3]], atol=1e-4)
    usable, rejects = check_spectra(flux, ivar, names="abcd")
    assert usable.tolist() == [True, True, False, True] and rejects["name"].tolist() == ["c"] and word in rejects.reason[0] and rejects.remedy[0]


def test_fit_leaves_bad_rows_out(data):
    flux, ivar = data[0][:300].copy(), data[1][:300].copy()
    ivar[7], flux[9] = 0, -1
    vae = SpectrumVAE.fit(flux, ivar, **QUICK | dict(epochs=1))
    assert vae.info["n_train"] == 298 and vae.rejects["name"].tolist() == ["spectrum 7", "spectrum 9"]


def test_too_few_to_train(data):
    with pytest.raises(BadInput, match="too few"): SpectrumVAE.fit(data[0][:50], data[1][:50], **QUICK)


def test_more_outputs_than_latents(data):
    with pytest.raises(BadInput, match="n_out"): SpectrumVAE.fit(*data[:2], n_latent=4, n_out=6, **QUICK)


def test_unknown_schedule(data):
    with pytest.raises(BadInput, match="onecycle"): SpectrumVAE.fit(data[0][:200], data[1][:200], schedule="cosine", **QUICK)


def test_absurd_learning_rate_says_so(data):
    with pytest.raises(BadInput, match="no longer finite"): SpectrumVAE.fit(data[0][:200], data[1][:200], lr=1e6, **QUICK)


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 6)])
def test_latents_of_a_wrong_shape(vae, shape):
    with pytest.raises(BadInput, match="latents"): vae.decode(np.zeros(shape))


# invariances ----------------------------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(st.floats(-20, 20))
def test_any_positive_scale(vae, data, exponent):
    flux, ivar = data[0][:5].astype(float), data[1][:5].astype(float)
    c = 10.0 ** exponent
    assert np.allclose(vae.encode(flux * c, ivar / c ** 2), vae.encode(flux, ivar), atol=2e-3)
    assert np.allclose(vae.encode(flux * c), vae.encode(flux), atol=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30, 1e6])
def test_masked_bins_have_no_influence(vae, data, value):
    flux, ivar = data[0][:20].copy(), data[1][:20]
    before = vae.encode(flux, ivar)
    flux[ivar == 0] = value
    assert (ivar == 0).any() and np.array_equal(vae.encode(flux, ivar), before)


def test_masked_bins_have_no_influence_on_training(data):
    flux, ivar = data[0][:300].copy(), data[1][:300]
    one = SpectrumVAE.fit(flux, ivar, **QUICK | dict(epochs=2))
    flux[ivar == 0] = 77
    two = SpectrumVAE.fit(flux, ivar, **QUICK | dict(epochs=2))
    assert all(torch.equal(a, b) for a, b in zip(one.net.state_dict().values(), two.net.state_dict().values()))


def test_the_order_and_company_of_spectra_do_not_matter(vae, data):
    flux, ivar = data[0][:50], data[1][:50]
    together = vae.encode(flux, ivar)
    assert np.allclose(vae.encode(flux[::-1], ivar[::-1])[::-1], together, atol=1e-4)
    assert np.allclose(vae.encode(flux, ivar, chunk=7), together, atol=1e-4)
    assert np.allclose(vae.encode(flux[3], ivar[3]), together[3], atol=1e-4) and vae.encode(flux[3], ivar[3]).shape == (6,)


def test_the_input_is_not_changed(vae, data):
    flux, ivar = data[0][:5].copy(), data[1][:5].copy()
    vae.encode(flux, ivar)
    assert np.array_equal(flux, data[0][:5]) and np.array_equal(ivar, data[1][:5])


def test_latents_are_white_over_the_training_set(vae, data):
    t = vae.encode(*data[:2])
    assert t.dtype == np.float32 and np.abs(t.mean(0)).max() < 1e-3 and np.abs(np.cov(t.T, bias=True) - np.eye(6)).max() < 1e-2


# the coder ------------------------------------------------------------------------------------------------------------

def test_it_learns(vae, data):
    flux, ivar, truth = toys(300, seed=5)
    model = vae.decode(vae.encode(flux, ivar))
    assert model.shape == (300, 1000) and model.dtype == np.float32
    assert np.abs(np.mean(model.astype(float) ** 2, 1) - 1).mean() < 0.02
    assert np.sqrt(np.mean((model - truth) ** 2)) < 0.4 * np.sqrt(np.mean((vae.basis.mean - truth) ** 2))


def test_decode_undoes_the_whitening(vae, data):
    "What the network decodes from its own latents is what `decode` makes of ours; the latents' scale must matter for it."
    from spectranb.data.spectra import normalise
    flux, ivar = data[0][:50], np.full((50, 1000), 400.0)
    x = normalise(flux, ivar, vae.basis)[0] - vae.basis.mean
    with torch.no_grad():
        mu = vae.net.encode(torch.from_numpy(x.astype(np.float32)))[0]
        known = vae.net.decode(mu).numpy() + vae.basis.mean
    t = vae.encode(flux, ivar)
    assert np.allclose(vae.decode(t), known, atol=1e-3)
    assert np.abs(vae.decode(t) - vae.decode(t * 1.1)).max() > 0.02


def test_fewer_outputs_than_latents(data):
    vae = SpectrumVAE.fit(*data[:2], n_latent=10, n_out=6, **QUICK)
    t = vae.encode(*data[:2])
    assert t.shape == (1200, 6) and np.abs(np.cov(t.T, bias=True) - np.eye(6)).max() < 1e-2
    mu = t @ vae.unwhiten + vae.centre                               # what decode gives the network
    assert np.allclose((mu - vae.centre) @ vae.whiten.T, t, atol=1e-4)


def test_latent_pca_inverts_exactly():
    mu = np.random.default_rng(0).normal(size=(500, 6)) @ np.diag([5, 3, 2, 1, .5, .1]) + 3
    mixed = lambda m: m @ np.random.default_rng(1).normal(size=(6, 40))
    for decode in (None, mixed):
        centre, W, U = latent_pca(mu, 6, decode, chunk=99)
        t = (mu - centre) @ W.T
        assert np.allclose(np.cov(t.T, bias=True), np.eye(6)) and np.allclose(t @ U + centre, mu)
    effect = np.linalg.norm(mixed(centre + np.eye(6) @ U) - mixed(centre[None]), axis=1)
    assert (np.diff(effect) < 0).all()                               # most important first


def test_the_published_network_and_schedule(data):
    vae = SpectrumVAE.fit(*data[:2], n_latent=10, linear=False, schedule="plateau", lr=1e-3, **QUICK | dict(hidden=(549, 110), epochs=3))
    assert sum(p.numel() for p in vae.net.parameters()) == 1000 * 549 + 549 + 549 * 110 + 110 + 110 * 20 + 20 + 10 * 110 + 110 + 110 * 549 + 549 + 549 * 1000 + 1000
    assert len(vae.history) == 3 and np.isfinite(vae.history.to_numpy()).all()


def test_plateau_stops_early():
    x = torch.zeros(200, 30)
    net = InfoVAE(30, (8,), 2)
    history = train_vae(net, x, torch.zeros_like(x), epochs=500, schedule="plateau", lr=0.0, valid=0.2, progress=False)
    assert len(history) < 40


def test_start_from_pca_is_a_pca(data):
    flux, ivar, _ = data
    basis = fit_gap_basis(flux, ivar, 6, n_iter=4)
    net = InfoVAE(n_latent=6)
    start_from_pca(net, basis.loadings, np.ones(1000))
    a = np.random.default_rng(0).normal(size=(9, 6))
    x = torch.from_numpy((a @ basis.loadings).astype(np.float32))
    with torch.no_grad(): assert np.allclose(net.linear_in(x), a, atol=1e-3) and np.allclose(net.linear_out(net.linear_in(x)), x, atol=1e-3)


def test_same_seed_same_network_other_seed_another(data):
    made = []
    for elsewhere, seed in enumerate((1, 1, 2)):
        torch.manual_seed(elsewhere)
        state = torch.random.get_rng_state()
        made.append(SpectrumVAE.fit(data[0][:300], data[1][:300], seed=seed, **QUICK | dict(epochs=2)))
        assert torch.equal(torch.random.get_rng_state(), state)      # nobody else's random numbers are touched
    a, b, c = made
    assert np.array_equal(a.encode(*data[:2]), b.encode(*data[:2])) and not np.allclose(a.encode(*data[:2]), c.encode(*data[:2]))


@pytest.mark.parametrize("delta,s2,d", [(0, 1, 6), (0.7, 1, 6), (0, 0.25, 10), (1, 2, 1)])
def test_mmd_has_its_closed_form(delta, s2, d):
    mean = lambda m, v: ((1 + 2 * v / d) ** -0.5 * np.exp(-m ** 2 / (d + 2 * v))) ** d
    known = mean(0, 2 * s2) + mean(0, 2) - 2 * mean(delta, 1 + s2)
    g = torch.Generator().manual_seed(3)
    drawn = torch.stack([mmd(delta + s2 ** 0.5 * torch.randn(300, d, generator=g), torch.randn(200, d, generator=g)) for _ in range(80)])
    assert abs(drawn.mean() - known) < 4 * drawn.std() / 80 ** 0.5 and drawn.std() < 0.05


def test_loss_by_hand():
    g = torch.Generator().manual_seed(0)
    x, hat, w = (torch.rand(5, 7, generator=g) for _ in range(3))
    mu, logvar, z = (torch.randn(5, 3, generator=g) for _ in range(3))
    loss, parts = info_vae_loss(x, hat, w, mu, logvar, z, alpha=0.25, lam=4, generator=torch.Generator().manual_seed(1))
    prior = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    known = (w * (x - hat) ** 2).sum() / 2 / 5 + 0.75 * kl_divergence(mu, logvar).mean() + 3.25 * 3 * mmd(z, prior)
    assert torch.isclose(loss, known) and torch.isclose(parts[1], kl_divergence(mu, logvar).mean())


def test_weights_and_chi2_ignore_masked_bins():
    ivar = np.array([[0.0, 4.0, 1e12]])
    assert pixel_weights(ivar)[0, 0] == 0 and pixel_weights(ivar)[0, 2] <= 2000
    assert reduced_chi2(np.array([[np.nan, 1.0, 2.0]]), ivar, np.array([[0, 0.5, 2.0]]))[0] == pytest.approx(0.5)
    assert np.isnan(reduced_chi2(np.ones((1, 3)), np.zeros((1, 3)), np.ones((1, 3)))[0])


# on disk --------------------------------------------------------------------------------------------------------------

def test_save_and_load(vae, data, tmp_path):
    vae.save(tmp_path / "new" / "vae")
    again = SpectrumVAE.load(tmp_path / "new" / "vae")
    t = vae.encode(*data[:2])
    assert np.array_equal(again.encode(*data[:2]), t) and np.array_equal(again.decode(t), vae.decode(t))
    assert again.info["seed"] == vae.info["seed"] and len(again.history) == len(vae.history) and repr(again) == repr(vae)
    assert sorted(p.name for p in (tmp_path / "new" / "vae").iterdir()) == ["config.json", "weights.safetensors"]


@pytest.mark.parametrize("damage", ["no weights", "no config", "flipped byte", "foreign", "not json", "empty", "a list"])
def test_damaged_folders_are_named(vae, tmp_path, damage):
    folder = tmp_path / "vae"
    vae.save(folder)
    config, weights = folder / "config.json", folder / "weights.safetensors"
    if damage == "no weights": weights.unlink()
    if damage == "no config": config.unlink()
    if damage == "flipped byte": raw = bytearray(weights.read_bytes()); raw[-50] ^= 1; weights.write_bytes(raw)
    if damage == "foreign": config.write_text(json.dumps(dict(format="another thing")))
    if damage == "not json": config.write_text("{")
    if damage == "a list": config.write_text("[]")
    if damage == "empty": shutil.rmtree(folder)
    with pytest.raises(BadInput) as e: SpectrumVAE.load(folder)
    assert "vae" in e.value.name and e.value.remedy


def test_without_weights_the_error_says_how_to_make_them(vae, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRANB_CACHE", str(tmp_path))
    import spectranb.vae as module
    monkeypatch.setattr(module, "__file__", str(tmp_path / "vae.py"))
    with pytest.raises(BadInput, match="make demo"): SpectrumVAE.load()
    vae.save(tmp_path / "models" / "vae")
    assert SpectrumVAE.load().info["n_train"] == 1200


def test_equal_in_another_process(vae, data, tmp_path):
    vae.save(tmp_path / "vae")
    np.savez(tmp_path / "in.npz", flux=data[0][:30], ivar=data[1][:30])
    code = (f"import numpy as np; from spectranb.vae import SpectrumVAE; d = np.load(r'{tmp_path / 'in.npz'}'); "
            f"np.save(r'{tmp_path / 'out.npy'}', SpectrumVAE.load(r'{tmp_path / 'vae'}').encode(d['flux'], d['ivar']))")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
    assert np.allclose(np.load(tmp_path / "out.npy"), vae.encode(data[0][:30], data[1][:30]), atol=1e-4)


# interrupted trainings, training sets, posterior ------------------------------------------------------------------------

class Killed(Exception): pass


def killer(at):
    def callback(epoch, row):
        if epoch == at: raise Killed
    return callback


@pytest.mark.parametrize("schedule", ["onecycle", "plateau"])
@pytest.mark.parametrize("at", [0, 3])
def test_an_interrupted_training_ends_with_the_same_weights(data, tmp_path, schedule, at):
    kwargs = QUICK | dict(schedule=schedule, lr=1e-3, seed=4)
    whole, state = SpectrumVAE.fit(*data[:2], **kwargs), tmp_path / "state.pt"
    with pytest.raises(Killed): SpectrumVAE.fit(*data[:2], checkpoint=state, callback=killer(at), **kwargs)
    epochs = []
    resumed = SpectrumVAE.fit(*data[:2], checkpoint=state, callback=lambda epoch, row: epochs.append(epoch), **kwargs)
    assert epochs == list(range(at + 1, 8))                          # nothing is done twice
    assert all(torch.equal(a, b) for a, b in zip(whole.net.state_dict().values(), resumed.net.state_dict().values()))
    assert whole.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds"))
    again = SpectrumVAE.fit(*data[:2], checkpoint=state, callback=killer(0), **kwargs)     # finished: no further epoch
    assert np.array_equal(again.encode(*data[:2]), whole.encode(*data[:2]))


def test_a_stopped_plateau_stays_stopped(data, tmp_path):
    kwargs = dict(hidden=(8,), epochs=60, schedule="plateau", lr=1e-12, progress=False, linear=False, checkpoint=tmp_path / "s.pt")
    first = SpectrumVAE.fit(*data[:2], **kwargs)
    assert len(first.history) < 60 and SpectrumVAE.fit(*data[:2], callback=killer(0), **kwargs).history.equals(first.history)


@pytest.mark.parametrize("change", [dict(seed=9), dict(lam=3.0), dict(n_latent=5, n_out=5), dict(lr=1e-4), dict(batch_size=64)])
def test_a_checkpoint_of_another_training_is_refused(data, tmp_path, change):
    state = tmp_path / "state.pt"
    SpectrumVAE.fit(*data[:2], checkpoint=state, **QUICK | dict(epochs=1))
    with pytest.raises(BadInput, match="another training"): SpectrumVAE.fit(*data[:2], checkpoint=state, **QUICK | dict(epochs=1) | change)


def test_other_spectra_refuse_the_checkpoint_too(data, tmp_path):
    SpectrumVAE.fit(*data[:2], checkpoint=tmp_path / "s.pt", **QUICK | dict(epochs=1))
    with pytest.raises(BadInput, match="another training"): SpectrumVAE.fit(*toys(1200, seed=5)[:2], checkpoint=tmp_path / "s.pt", **QUICK | dict(epochs=1))


@pytest.mark.parametrize("body", [b"", b"PK\x03\x04 no zip", b"\x80\x04cos\nsystem\n(S'true'\ntR."])
def test_a_damaged_checkpoint_is_named_and_not_executed(data, tmp_path, body):
    (tmp_path / "s.pt").write_bytes(body)
    with pytest.raises(BadInput, match="s.pt.*Delete it"): SpectrumVAE.fit(*data[:2], checkpoint=tmp_path / "s.pt", **QUICK)


def test_a_training_set_gives_what_the_spectra_give(data):
    direct, shared = SpectrumVAE.fit(*data[:2], **QUICK), SpectrumVAE.fit(TrainingSet.make(*data[:2], progress=False), **QUICK)
    assert np.array_equal(direct.encode(*data[:2]), shared.encode(*data[:2]))


def test_min_sigma_is_in_units_of_flux(data):
    flux, ivar = data[0][:200], data[1][:200].copy()
    ivar[:, 400:500] *= 100                                          # σ = 0.005 where the others have 0.05
    for scale in (1.0, 30.0):
        weight = TrainingSet.make(flux * scale, ivar / scale ** 2, min_sigma=0.01 * scale, progress=False).weight.numpy()
        assert (weight[:, 400:500] == 0).all() and np.array_equal(weight[:, :400] > 0, ivar[:, :400] > 0)


def test_more_latents_than_components_of_the_basis(data):
    small = TrainingSet.make(*data[:2], n_components=4, progress=False)
    with pytest.raises(BadInput, match="n_components"): SpectrumVAE.fit(small, **QUICK)
    assert SpectrumVAE.fit(small, linear=False, **QUICK | dict(epochs=1)).n_out == 6


@pytest.mark.parametrize("wrong", [dict(activation="softplus"), dict(n_latent=0), dict(hidden=(10, 0)), dict(n_out=0)])
def test_impossible_networks(data, wrong):
    with pytest.raises(BadInput): SpectrumVAE.fit(*data[:2], **QUICK | dict(epochs=1) | wrong)


def test_posterior_is_the_encoders_in_whitened_axes(vae, data):
    flux, ivar = data[0][:50], data[1][:50]
    mean, cov = vae.posterior(flux, ivar)
    assert np.allclose(mean, vae.encode(flux, ivar), atol=1e-6) and np.allclose(cov, cov.transpose(0, 2, 1)) and (np.linalg.eigvalsh(cov) > 0).all()
    x = torch.from_numpy(vae.prepare(flux, ivar)[0] - vae.basis.mean.astype(np.float32))
    with torch.no_grad(): mu, logvar = vae.net.encode(x)
    draws = (mu[0] + (logvar[0] / 2).exp() * torch.randn(40000, 6, generator=torch.Generator().manual_seed(0))).double().numpy()
    drawn = np.cov(((draws - vae.centre) @ vae.whiten.T).T)
    assert np.abs(drawn - cov[0]).max() < 0.03 * cov[0].max()
    one = vae.posterior(flux[3], ivar[3])
    assert one[0].shape == (6,) and np.allclose(one[1], cov[3], rtol=1e-4, atol=1e-8)


def test_plain_autoencoder_reconstructs_and_has_no_posterior(data, tmp_path):
    plain = SpectrumVAE.fit(*data[:2], variational=False, **QUICK)
    h = plain.history
    assert np.allclose(h.valid_loss, h.reconstruction) and h.reconstruction.iloc[-1] < h.reconstruction.iloc[0]
    plain.save(tmp_path); again = SpectrumVAE.load(tmp_path)
    assert np.array_equal(again.encode(*data[:2]), plain.encode(*data[:2])) and not again.net.variational
    with pytest.raises(BadInput, match="no posterior"): again.posterior(*(a[:2] for a in data[:2]))


def test_bad_argument_of_encode(vae, data):
    with pytest.raises(BadInput, match="'raise' or 'nan'"): vae.encode(data[0][:2], data[1][:2], bad="skip")


# gaps filled by the coder, and the posterior's calibration ---------------------------------------------------------------

def test_prepare_touches_nothing_that_has_data(vae, data):
    flux, ivar = data[0][:80], data[1][:80]
    x, scaled = vae.prepare(flux, ivar)
    assert np.allclose((x ** 2).mean(1), 1, atol=1e-5) and ((scaled > 0) == (ivar > 0)).all()
    assert np.allclose((x * np.sqrt(scaled))[ivar > 0], (flux * np.sqrt(ivar))[ivar > 0], atol=1e-3)


def test_refilling_a_linear_coder_ends_at_least_squares(monkeypatch):
    rng = np.random.default_rng(0)
    L = np.linalg.qr(rng.normal(size=(60, 4)))[0].T                  # encoder L, decoder Lᵀ: a projection
    net = InfoVAE(60, (5,), 4)
    for half in (net.encoder, net.decoder): torch.nn.init.zeros_(half[-1].weight); torch.nn.init.zeros_(half[-1].bias)
    net.linear_in.weight.data, net.linear_out.weight.data = torch.tensor(L, dtype=torch.float32), torch.tensor(L.T, dtype=torch.float32)
    net.linear_in.bias.data.zero_(); net.linear_out.bias.data.zero_()
    x = (rng.normal(size=(7, 4)) @ L + 0.01 * rng.normal(size=(7, 60))).astype(np.float32)
    good = np.ones(x.shape, bool); good[:, 20:32] = False
    monkeypatch.setattr(vae_module, "REFILLS", 300)
    filled, divided = vae_module._refill(net, np.where(good, x, 5), good, np.zeros(60))
    for f, d, y in zip(filled, divided, x):
        best = np.linalg.lstsq(L[:, good[0]].T, y[good[0]], rcond=None)[0] @ L
        assert np.allclose((f * d)[good[0]], y[good[0]], rtol=1e-3, atol=1e-4) and np.allclose((f * d)[~good[0]], best[~good[0]], atol=2e-3)
    assert np.allclose((filled ** 2).mean(1), 1, atol=1e-5)


@pytest.fixture
def linear(data):
    "A coder that is a linear map, so that errors can be propagated by hand."
    vae = SpectrumVAE.fit(*data[:2], **QUICK | dict(epochs=1, lr=1e-12))
    for layer in (vae.net.encoder[-1], vae.net.decoder[-1]): torch.nn.init.zeros_(layer.weight); torch.nn.init.zeros_(layer.bias)
    vae.net.encoder[-1].bias.data[6:] = -6.0
    return vae


def test_scatter_of_a_linear_coder_is_propagated_noise(linear, data):
    clean, ivar = data[2][:3], np.full((3, 1000), 1e6)               # σ 0.001: the norm hardly moves
    scatter, own = latent_scatter(linear, clean, ivar, n_draws=3000)
    A = linear.whiten @ linear.net.linear_in.weight.detach().double().numpy()
    for i in range(3):
        x = linear.prepare(clean, ivar)[0][i].astype(float)
        J = A @ (np.eye(1000) - np.outer(x, x) / 1000)               # the norm is divided out
        expected = J @ J.T / 1e6
        assert np.allclose(np.sqrt(np.diag(scatter[i])), np.sqrt(np.diag(expected)), rtol=0.06)
    assert np.allclose(own, linear.whiten @ linear.whiten.T * np.exp(-6.0), rtol=1e-4)


def test_factors_and_smooth_errors_enter_the_posterior(linear, data, tmp_path):
    clean, ivar = data[2][:12], np.full((12, 1000), 1e6)
    tilt = np.linspace(-1, 1, 1000)
    table = calibrate_posterior(linear, clean, ivar, lambda rng, i: 1 + 0.01 * rng.standard_normal() * tilt, n_draws=400)
    raw, scaled = (np.sqrt(np.diagonal(linear.posterior(clean, ivar, calibrated=c)[1], axis1=1, axis2=2)) for c in (False, True))
    assert np.allclose(scaled / raw, table.factor) and np.allclose(np.median(scaled, 0), table["σ of noise"], rtol=0.15)
    A = linear.whiten @ linear.net.linear_in.weight.detach().double().numpy()
    x = linear.prepare(clean, ivar)[0].astype(float)
    step = np.array([A @ (0.01 * tilt * f - f * np.mean(0.01 * tilt * f * f)) for f in x])
    assert np.allclose(table["σ of calibration"], np.sqrt((step ** 2).mean(0)), rtol=0.1)
    both = linear.posterior(clean, ivar, smooth=True)[1]
    assert np.allclose(both - linear.posterior(clean, ivar)[1], np.array(linear.info["posterior"]["smooth"]))
    linear.save(tmp_path)
    assert np.allclose(SpectrumVAE.load(tmp_path).posterior(clean, ivar, smooth=True)[1], both)


def test_smooth_errors_that_were_not_measured(vae, data):
    with pytest.raises(BadInput, match="not measured"): vae.posterior(data[0][:2], data[1][:2], smooth=True)
