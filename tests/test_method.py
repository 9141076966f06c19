"Properties of the method: costs, plans, prototypes, the detector and its files"
import json, math, random, socket, struct, warnings
from unittest.mock import patch
import numpy as np
import ot, pytest, safetensors, torch
from PIL import Image
from hypothesis import Phase, given, settings, strategies as st
from safetensors.torch import save_file
from pradot import cost as cost_module, prototypes, transport
from pradot.cost import cost, grid, normalised_cost, structural, unit
from pradot.data import InputError
from pradot.detector import FORMAT, Config, Pradot, merge
from pradot.experiment import evaluate
from pradot.features import Backbone, extract, to_tensor
from pradot.prototypes import barycentre, learn, nearest, shuffles, step
from pradot.toy import tray
from pradot.transport import Transport, plan, shift, sinkhorn

few = settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
sides, counts, alphas = st.integers(1, 4), st.integers(1, 4), st.sampled_from([0., 0.1, 0.3, 0.7, 1.])
GRIDS = (3, 5), (1, 7), (4, 1), (1, 1)

def feats(B, H, W, D=6, seed=0, dtype=torch.double):
    "Embeddings of a batch: things that recur from image to image, and noise"
    gen = torch.Generator().manual_seed(seed)
    things = torch.rand(4, D, generator=gen, dtype=dtype)
    return things[torch.arange(H*W).view(H, W) % 4] + 0.5*torch.rand(B, H, W, D, generator=gen, dtype=dtype)

def noise(n, H, W, D=6, seed=1, dtype=torch.double):
    return torch.randn(n, H, W, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def problem(B, H, W, n, alpha, seed=0, dtype=torch.double):
    return normalised_cost(feats(B, H, W, seed=seed, dtype=dtype), noise(n, H, W, seed=seed + 1, dtype=dtype), alpha)

def missing(T):
    "L1 error of both marginals of a plan, summed in float64"
    T = T.double()
    return float((T.sum(0) - 1/T.shape[1]).abs().sum() + (T.sum(1) - 1/T.shape[0]).abs().sum())

def in_logs(M, eps, iterations=5000):
    return ot.sinkhorn([], [], M.double(), eps, method='sinkhorn_log', numItermax=iterations, stopThr=1e-11, warn=False)

# Eq. 1 and 3

@few
@given(counts, counts, sides, sides, alphas, st.integers(0, 99))
def test_costs_are_eq_1_and_3_pair_by_pair(B, n, H, W, alpha, seed):
    z, p = feats(B, H, W, seed=seed).numpy(), noise(n, H, W, seed=seed).numpy()
    feat, place = np.zeros((2, B*H*W, n*H*W))
    for a, (b, i, j) in enumerate(np.ndindex(B, H, W)):
        for c, (k, s, t) in enumerate(np.ndindex(n, H, W)):
            feat[a, c] = 1 - z[b, i, j] @ p[k, s, t]/np.linalg.norm(z[b, i, j])/np.linalg.norm(p[k, s, t])
            place[a, c] = ((i - s)/H)**2 + ((j - t)/W)**2
    args = torch.from_numpy(z), torch.from_numpy(p), alpha
    np.testing.assert_allclose(cost(*args), (1 - alpha)*feat + alpha*place, atol=1e-12)
    M = normalised_cost(*args)
    np.testing.assert_allclose(M, (1 - alpha)*feat/feat.max() + alpha*(place/place.max() if H*W > 1 else 0), atol=1e-12)
    assert M.min() >= 0 and M.max() <= 1 + 1e-12

def test_costs_ignore_the_length_of_features():
    z, p = feats(2, 3, 4), noise(2, 3, 4)
    for f in (cost, normalised_cost): torch.testing.assert_close(f(z*1e4, p*1e-4, 0.3), f(z, p, 0.3))

def test_zero_and_constant_features_give_finite_numbers():
    for z in (torch.zeros(3, 2, 3, 5), torch.ones(3, 2, 3, 5)):
        for alpha in (0., 0.3, 1.):
            for p in (z[:2], noise(2, 2, 3, 5, dtype=torch.float32)):
                M = normalised_cost(z, p, alpha)
                assert M.isfinite().all() and M.min() >= 0 and M.max() <= 1 + 1e-6
                new, t, loss = step(p, z, alpha)
                assert new.isfinite().all() and np.isfinite(loss) and np.isfinite(t.error)
                # a mean of equals
                torch.testing.assert_close(new, torch.lerp(z[:1].expand_as(p), p, 0.95), atol=1e-5, rtol=0)

@pytest.mark.parametrize('f', [cost, normalised_cost])
def test_costs_refuse_grids_that_differ_and_bad_alphas(f):
    with pytest.raises(InputError, match='same H, W, D'): f(feats(2, 3, 4), noise(2, 4, 3), 0.3)
    with pytest.raises(InputError, match='same H, W, D'): f(feats(2, 3, 4), noise(2, 3, 4, 7), 0.3)
    for alpha in (-0.1, 1.1, float('nan')):
        with pytest.raises(InputError, match='between 0'): f(feats(2, 3, 4), noise(2, 3, 4), alpha)

def test_features_that_are_not_finite_are_refused():
    for bad in (float('nan'), float('inf')):
        z = feats(2, 2, 2); z[1, 0, 1, 3] = bad
        with pytest.raises(InputError, match='not finite'): normalised_cost(z, noise(1, 2, 2), 0.)
        with pytest.raises(InputError, match='not finite'): sinkhorn(torch.full((3, 3), bad))

# Eq. 4

@few
@given(counts, counts, sides, sides, alphas, st.sampled_from([0.01, 0.05, 0.2]), st.sampled_from([1, 3, 10, 60]),
    st.integers(0, 99))
def test_marginals_and_the_account(B, n, H, W, alpha, eps, iterations, seed):
    M = problem(B, H, W, n, alpha, seed)
    t = sinkhorn(M, eps, iterations, tol=1e-6)
    T = plan(M, t.f, t.g, eps)
    assert T.shape == M.shape and T.min() >= 0
    torch.testing.assert_close(T.sum(0), torch.full((M.shape[1],), 1/M.shape[1], dtype=M.dtype), atol=1e-12, rtol=1e-9)
    assert missing(T) == pytest.approx(t.error, abs=1e-9)
    assert t.converged == (t.error <= 1e-6) and 1 <= t.iterations <= iterations
    assert t.converged or t.iterations == iterations

@pytest.mark.parametrize('eps', [0.1, 0.02, 0.01])
@pytest.mark.parametrize('alpha', [0., 0.3])
def test_the_account_is_true_in_float32(alpha, eps):
    for seed in range(3):
        M = problem(4, 6, 6, 2, alpha, seed, torch.float32)
        t = sinkhorn(M, eps)
        assert missing(plan(M, t.f, t.g, eps)) == pytest.approx(t.error, abs=1e-4)

@pytest.mark.parametrize('eps', [0.005, 0.001])
@pytest.mark.parametrize('dtype', [torch.float32, torch.double])
def test_the_account_is_true_for_tiny_eps(dtype, eps):
    for seed in range(3):
        M = problem(4, 6, 6, 2, 0., seed, dtype)
        try: t = sinkhorn(M, eps)
        except InputError as e:
            assert dtype == torch.float32 and 'too small for float32' in str(e)
            continue
        assert missing(plan(M, t.f, t.g, eps)) == pytest.approx(t.error, abs=1e-3 if dtype == torch.float32 else 1e-9)

def unbalanced(dtype):
    "Most embeddings show one thing, most prototypes another: mass must travel at the highest cost"
    M = torch.rand(60, 40, generator=torch.Generator().manual_seed(0)).to(dtype)*0.02
    M[:40, 15:] += 1; M[40:, :15] += 1
    return M/M.max()

@pytest.mark.parametrize('eps', [0.1, 0.02, 0.01, 0.005, 0.001])
def test_mass_that_must_travel_far_does_so_in_float32(eps):
    M = unbalanced(torch.float32)
    try: t = sinkhorn(M, eps, 1000)
    except InputError as e:
        assert 'too small for float32' in str(e)
        return
    assert (plan(M, t.f, t.g, eps) - in_logs(M, eps)).abs().sum() < 5e-3

@pytest.mark.parametrize('eps', [0.1, 0.02, 0.01, 0.005])
def test_mass_that_must_travel_far_does_so_in_float64(eps):
    M = unbalanced(torch.double)
    t = sinkhorn(M, eps, 1000)
    assert (plan(M, t.f, t.g, eps) - in_logs(M, eps)).abs().sum() < 5e-3

@few
@given(counts, counts, sides, sides, st.sampled_from([0., 0.3]), st.integers(0, 99))
def test_numbers_added_to_rows_and_columns_change_no_plan(B, n, H, W, alpha, seed):
    M, gen = problem(B, H, W, n, alpha, seed), torch.Generator().manual_seed(seed)
    rows, cols = (10*torch.rand(k, generator=gen, dtype=torch.double) - 5 for k in M.shape)
    moved = M + rows[:, None] + cols
    S, r, c = shift(moved)
    assert S.amin(0).max() == 0 == S.amin(1).max() and S.min() >= 0
    torch.testing.assert_close(S + r[:, None] + c, moved)
    a, b = sinkhorn(M, 0.05, 3000, 1e-10), sinkhorn(moved, 0.05, 3000, 1e-10)
    assert (plan(M, a.f, a.g, 0.05) - plan(moved, b.f, b.g, 0.05)).abs().sum() < 1e-8

@pytest.mark.parametrize('eps', [0.005, 0.01, 0.1])
@pytest.mark.parametrize('shape', GRIDS)
@pytest.mark.parametrize('n', [1, 3])
def test_kernel_domain_is_log_domain(shape, n, eps):
    for alpha in (0., 0.3, 1.):
        M = problem(4, *shape, n, alpha)
        t = sinkhorn(M, eps, 10_000, tol=1e-9)
        assert t.converged and (plan(M, t.f, t.g, eps) - in_logs(M, eps)).abs().sum() < 1e-7

@pytest.mark.parametrize('eps', [0.01, 0.1])
@pytest.mark.parametrize('alpha', [0., 0.3])
def test_float32_is_float64(alpha, eps):
    M = problem(4, 3, 5, 2, alpha)
    for f, g in ((M, M.float()), (unbalanced(torch.double), unbalanced(torch.float32))):
        a, b = (sinkhorn(m, eps, 300, tol=0.) for m in (f, g))
        assert (plan(f, a.f, a.g, eps) - plan(g, b.f, b.g, eps)).abs().sum() < 1e-3
    z, p = feats(4, 3, 5), noise(2, 3, 5)
    exact, rough = (step(p.to(d), z.to(d), alpha, 0., eps, 300, 0.)[0] for d in (torch.double, torch.float32))
    torch.testing.assert_close(rough.double(), exact, atol=1e-3, rtol=0)

def test_a_warm_start_changes_the_way_and_not_the_plan():
    M = problem(4, 3, 5, 2, 0.3)
    cold = sinkhorn(M, 0.01, 5000, 1e-9)
    warm = sinkhorn(M, 0.01, 5000, 1e-9, g=cold.g + 7.)
    assert warm.iterations < cold.iterations
    assert (plan(M, warm.f, warm.g, 0.01) - plan(M, cold.f, cold.g, 0.01)).abs().sum() < 1e-8

# Eq. 5 and Algorithm 1

@few
@given(counts, counts, sides, sides, alphas, st.floats(0, 1), st.integers(0, 99))
def test_a_step_is_eq_5(B, n, H, W, alpha, eta, seed):
    z, p = feats(B, H, W, seed=seed), noise(n, H, W, seed=seed)
    moved, t, loss = step(p, z, alpha, eta, 0.2, 2000, 1e-9)
    M = normalised_cost(z, p, alpha)
    T = in_logs(M, 0.2, 3000)
    mean = T.T @ z.flatten(0, 2) * n*H*W
    torch.testing.assert_close(moved.flatten(0, 2), eta*p.flatten(0, 2) + (1 - eta)*mean, atol=1e-6, rtol=0)
    assert loss == pytest.approx(float((M*T).sum()), abs=1e-7)

def test_eta_0_is_the_barycentre_and_eta_1_stays():
    z, p = feats(5, 3, 4, dtype=torch.float32), noise(2, 3, 4, dtype=torch.float32)
    M = normalised_cost(z, p, 0.3)
    assert torch.equal(step(p, z, 0.3, 0.)[0], barycentre(M, sinkhorn(M), z.flatten(0, 2), 0.01)[0].view_as(p))
    assert torch.equal(step(p, z, 0.3, 1.)[0], p)
    still = learn(z, 0.3, n=2, eta=1., epochs=2)
    assert all(h['movement'] == 0 for h in still.history)
    assert torch.equal(still.prototypes, learn(z, 0.3, n=2, eta=1., epochs=1).prototypes)

def test_one_prototype_on_one_cell_is_the_mean_of_all():
    z, p = feats(7, 1, 1), noise(1, 1, 1)
    for alpha in (0., 0.3, 1.): torch.testing.assert_close(step(p, z, alpha, 0.)[0][0, 0, 0], z.mean((0, 1, 2)))

def test_blocks_change_nothing(monkeypatch):
    z, p = feats(5, 3, 4), noise(2, 3, 4)
    M = normalised_cost(z, p, 0.3); t = sinkhorn(M)
    whole, near = barycentre(M, t, z.flatten(0, 2), 0.01), nearest(z, p, 0.3)
    for budget in (1, 24*8*7, 12*8*5):                         # a row; 7 and 14 rows; 2 and 5 rows
        monkeypatch.setattr(transport, 'BUDGET', budget)
        mean, loss = barycentre(M, t, z.flatten(0, 2), 0.01)
        torch.testing.assert_close(mean, whole[0]); assert loss == pytest.approx(whole[1], rel=1e-12)
        d, j = nearest(z, p, 0.3)
        torch.testing.assert_close(d, near[0]); assert torch.equal(j, near[1])

@few
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31))
def test_every_image_is_seen_each_epoch_in_full_batches(N, size, epochs, seed):
    size = min(N, size)
    seen = list(shuffles(N, size, epochs, seed))
    assert len(seen) == epochs*-(-N//size)
    for e in range(epochs):
        batches = [b.tolist() for k, b in seen if k == e]
        assert {i for b in batches for i in b} == set(range(N))
        assert all(len(b) == size == len(set(b)) for b in batches)

def test_a_batch_larger_than_the_set_is_the_set():
    Z = feats(3, 2, 3, dtype=torch.float32)
    big = learn(Z, 0.3, n=2, epochs=4, batch_size=64)
    assert [h['epoch'] for h in big.history] == [0, 1, 2, 3] and all(h['movement'] > 0 for h in big.history)
    assert torch.equal(big.prototypes, learn(Z, 0.3, n=2, epochs=4, batch_size=3).prototypes)

def test_the_order_within_a_batch_is_of_no_account():
    z, p = feats(5, 3, 4), noise(2, 3, 4)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(step(p, z[order], 0.3, 0., iterations=2000, tol=1e-11)[0],
        step(p, z, 0.3, 0., iterations=2000, tol=1e-11)[0])

def shuffled(z, perm): return z.flatten(1, 2)[:, perm].view_as(z)

def test_alpha_0_ignores_places():
    z, p = feats(4, 3, 5), noise(2, 3, 5)
    perm = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    a, b = (learn(x.float(), 0., n=2, epochs=3, batch_size=2).prototypes for x in (z, shuffled(z, perm)))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    d, j = nearest(z, p, 0.)
    d2, j2 = nearest(shuffled(z, perm), p, 0.)
    torch.testing.assert_close(d2.flatten(1), d.flatten(1)[:, perm])
    assert torch.equal(j2.flatten(1), j.flatten(1)[:, perm])
    torch.testing.assert_close(nearest(z, shuffled(p, perm), 0.)[0], d)
    a, b = (learn(x.float(), 0.3, n=2, epochs=3, batch_size=2).prototypes for x in (z, shuffled(z, perm)))
    assert (a - b).abs().max() > 1e-3                                               # while α = 0.3 does not
    assert (nearest(z, shuffled(p, perm), 0.3)[0] - nearest(z, p, 0.3)[0]).abs().max() > 1e-3

def test_alpha_1_ignores_features():
    z, p = feats(4, 3, 5), noise(2, 3, 5)
    assert torch.equal(normalised_cost(z, p, 1.), normalised_cost(feats(4, 3, 5, seed=9), noise(2, 3, 5, seed=8), 1.))
    S = structural(3, 5, dtype=torch.double)[None, :, None]
    assert torch.equal(cost(z, p, 1.).view(4, 15, 2, 15), S.expand(4, 15, 2, 15))
    d, j = nearest(z, p, 1.)
    assert torch.equal(d, torch.zeros_like(d)) and torch.equal(j, torch.arange(15).view(3, 5).expand(4, 3, 5))

# Eq. 6

@few
@given(counts, counts, sides, sides, st.sampled_from([0., 0.3, 0.9]), st.integers(0, 99))
def test_nearest_is_brute_force(B, n, H, W, alpha, seed):
    z, p = feats(B, H, W, seed=seed), noise(n, H, W, seed=seed)
    d, j = nearest(z, p, alpha)
    places = grid(H, W, dtype=torch.double).view(H, W, 2)
    for b, i, k in np.ndindex(B, H, W):
        looks = 1 - (unit(z[b, i, k])*unit(p)).sum(-1)                              # (n, H, W)
        all_ = ((1 - alpha)*looks + alpha*((places[i, k] - places)**2).sum(-1)).flatten()
        assert float(d[b, i, k]) == pytest.approx(float(all_.min()), abs=1e-12)
        assert int(j[b, i, k]) == int(all_.argmin())
    for b in range(B):                                                              # alone as in company
        torch.testing.assert_close(nearest(z[b:b + 1], p, alpha)[0], d[b:b + 1])

@few
@given(counts, counts, sides, sides, st.sampled_from([0., 0.3, 0.9, 1.]), st.sampled_from(['noise', 'near ties', 'copies', 'zeros', 'short']),
       st.booleans(), st.integers(0, 99))
def test_coarse_first_finds_what_multiplying_everything_finds(B, n, H, W, alpha, what, relative, seed):
    gen = torch.Generator().manual_seed(seed)
    z, p = (torch.randn(k, H, W, 64 if what == 'short' else 300, generator=gen) for k in (B, n))
    if what == 'near ties': p = z[:1] + 10.**-torch.randint(1, 8, (n, H, W, 1), generator=gen)*p
    if what == 'copies': p = p[:1, :1, :1].repeat(n, H, W, 1)
    if what == 'zeros': z[0], p[0] = 0, 0
    with patch.object(prototypes, 'coarse_pays', return_value=False): d, _ = nearest(z, p, alpha, None, relative)
    for share in (prototypes.RIVALS, 1):                                            # 1: never too many rivals
        with patch.object(prototypes, 'coarse_pays', return_value=True), patch.object(prototypes, 'RIVALS', share):
            found, j = nearest(z, p, alpha, None, relative)
        torch.testing.assert_close(found, d, atol=1e-6, rtol=0)
        if not relative: torch.testing.assert_close(cost(z, p, alpha).gather(1, j.view(-1, 1)).view_as(d), d, atol=1e-6, rtol=0)

def test_features_that_are_not_numbers_have_no_distance_either_way():
    z, p = noise(2, 3, 4, 256, dtype=torch.float), noise(2, 3, 4, 256, 2, torch.float)
    z[1, 2, 3, 4] = math.nan
    for yes in (False, True):
        with patch.object(prototypes, 'coarse_pays', return_value=yes), patch.object(prototypes, 'RIVALS', 1): d = nearest(z, p, 0.3)[0]
        assert d.isnan().sum() == 1 and d[1, 2, 3].isnan()

def test_merge_averages_alphas_then_stages():
    a, b, c = torch.rand(2, 4, 6), torch.rand(2, 4, 6), torch.rand(2, 2, 3)
    m = merge({(2, 0.): a, (2, 0.3): b, (3, 0.): c}, (4, 6))
    up = torch.nn.functional.interpolate(c[:, None], (4, 6), mode='bilinear')[:, 0]
    torch.testing.assert_close(m, ((a + b)/2 + up)/2)

# The detector

SMALL = dict(backbone='small', n=2, batch_size=4, epochs=2, image_size=(48, 64), iterations=30, eta=0.5, device='cpu')
quiet = pytest.mark.filterwarnings('ignore:in \\d+ of', 'ignore:a batch of', 'ignore:only \\d+ images')

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return tray(tmp_path_factory.mktemp('toy'), size=(72, 96), train=6, validation=1, good=2, logical=2, structural=2)

@pytest.fixture(scope='module')
def model(toy):
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return Pradot(**SMALL).fit(toy.train)

@pytest.fixture(scope='module')
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp('model')/'m.safetensors'
    model.save(path)
    return path

def test_grids_are_not_square(model, toy):
    shapes = {k: tuple(p.shape) for k, p in model.prototypes.items()}
    for l in (2, 3):
        D, H, W = model.backbone(torch.zeros(1, 3, 48, 64))[l].shape[-1], 48//2**(l + 1), 64//2**(l + 1)
        assert shapes[l, 0.] == shapes[l, 0.3] == (2, H, W, D)
    pred = model.predict(toy.test)
    assert pred.maps.shape == (6, 72, 96) and pred.maps.dtype == np.float32 and np.isfinite(pred.maps).all()
    assert 0 <= pred.maps.min() and pred.maps.max() <= 2 and pred.maps.std((1, 2)).min() > 0
    np.testing.assert_array_equal(pred.scores, pred.maps.max((1, 2)))

def test_one_image_is_judged_alone_as_in_company(model, toy):
    together = model.predict(toy.test)
    for size in (1, 4):
        np.testing.assert_allclose(model.predict(toy.test, batch_size=size).maps, together.maps, atol=1e-5)
    for r, m in zip(toy.test[:3], together.maps): np.testing.assert_allclose(model.predict([r]).maps[0], m, atol=1e-5)
    np.testing.assert_allclose(model.predict([np.asarray(toy.test[0].image())]).maps[0], together.maps[0], atol=1e-5)

@quiet
def test_two_fits_are_equal_to_the_bit_and_another_seed_is_not(model, toy):
    again, other = Pradot(**SMALL).fit(toy.train), Pradot(**SMALL, seed=1).fit(toy.train)
    for k, p in model.prototypes.items():
        assert torch.equal(p, again.prototypes[k]) and not torch.equal(p, other.prototypes[k])
    assert again.reference == model.reference and again.history == model.history
    np.testing.assert_array_equal(again.predict(toy.test).maps, model.predict(toy.test).maps)

def test_a_loaded_model_is_the_same_to_the_bit(model, saved, toy, tmp_path):
    loaded = Pradot.load(saved, 'cpu')
    assert loaded.config == model.config and loaded.reference == model.reference
    a, b = model.predict(toy.test), loaded.predict(toy.test)
    np.testing.assert_array_equal(a.maps, b.maps); np.testing.assert_array_equal(a.scores, b.scores)
    assert evaluate(model, toy, progress=False) == evaluate(loaded, toy, progress=False)
    loaded.save(tmp_path/'again.safetensors')
    again = Pradot.load(tmp_path/'again.safetensors', 'cpu')
    np.testing.assert_array_equal(again.predict(toy.test).maps, a.maps)
    assert [p.name for p in tmp_path.iterdir()] == ['again.safetensors']

@quiet
@pytest.mark.parametrize('change', [
    dict(image_size=16), dict(image_size=(16, 80), stages=(3,)), dict(stages=(1,), image_size=(16, 24)),
    dict(n=1, alphas=(0.,)), dict(alphas=(0., 0.5, 1.)), dict(n=1, batch_size=1, epochs=1), dict(batch_size=64),
    dict(warm=True)])
def test_odd_settings_work(change, toy):
    m = Pradot(**SMALL | change).fit(toy.train[:5])
    pred = m.predict(toy.test[:2])
    assert pred.maps.shape == (2, 72, 96) and np.isfinite(pred.maps).all() and pred.scores.min() > 0

@quiet
def test_images_that_are_all_the_same_are_learnt():
    same = [np.full((40, 40, 3), 128, np.uint8)]*4
    m = Pradot(**SMALL | dict(image_size=32)).fit(same)
    pred = m.predict([same[0], np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)])
    assert np.isfinite(pred.maps).all() and pred.scores[1] > pred.scores[0]

@quiet
def test_no_global_state_is_touched_and_no_network_used(tmp_path, monkeypatch):
    def refuse(*a, **k): raise AssertionError('network')
    monkeypatch.setattr(socket.socket, 'connect', refuse); monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    def state():
        kind, keys, *rest = np.random.get_state()
        return (kind, keys.tolist(), rest, torch.get_rng_state().tolist(), random.getstate(),
            torch.get_default_dtype(), torch.is_grad_enabled(),
                torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), np.geterr())
    before = state()
    toy = tray(tmp_path, size=(64, 72), train=4, validation=1, good=1, logical=1, structural=1)
    for change in ({}, dict(backbone='resnet18', weights='random', image_size=32)):
        m = Pradot(**SMALL | change).fit(toy.train)
        m.predict(toy.test); evaluate(m, toy, progress=False)
        m.save(tmp_path/'m.safetensors'); Pradot.load(tmp_path/'m.safetensors', 'cpu').predict(toy.test)
    assert state() == before

def test_random_weights_are_of_the_seed():
    x = to_tensor(Image.new('RGB', (32, 32), 'red'), (32, 32))[None]
    a, b, c = (Backbone('resnet18', 'random', (2,), seed)(x)[2] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)

def test_everything_is_on_the_cpu(model, toy):
    assert model.device.type == 'cpu' and {p.device.type for p in model.prototypes.values()} == {'cpu'}
    Z = extract(model.backbone, toy.train[:3], (48, 64), batch_size=2, progress=False)
    one = extract(model.backbone, toy.train[2:3], (48, 64), progress=False)
    for l in (2, 3):
        assert Z[l].dtype == torch.float32 and Z[l].device.type == 'cpu' and not Z[l].requires_grad
        torch.testing.assert_close(one[l], Z[l][2:], atol=1e-4, rtol=1e-4)

# Model files

def rewritten(saved, path, **meta):
    "A copy of a model file with other metadata"
    with safetensors.safe_open(saved, 'pt') as f:
        old, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    save_file(tensors, path, {k: v for k, v in (old | meta).items() if v is not None})
    return path

@pytest.mark.parametrize('meta, says', [(dict(format=str(FORMAT + 1)), 'newer'), (dict(format='999999'), 'newer'),
    (dict(pradot=None), 'not a model of pradot'),
    *[(meta, 'is damaged or no model file .*its contents are not what was saved') for meta in (
        dict(config=None), dict(config='{'), dict(config='{"k": 3}'), dict(config='{"n": 0}'), dict(config='[]'),
        dict(config='3'), dict(config='{"stages": [1, 2]}'), dict(reference=None), dict(reference='7'),
        dict(reference='[1]'), dict(reference='[NaN, 1]'), dict(sha256=None), dict(sha256='0'*64))]])
def test_foreign_and_newer_model_files_are_refused(saved, tmp_path, meta, says):
    path = rewritten(saved, tmp_path/'x.safetensors', **meta)
    with pytest.raises(InputError, match=says) as e: Pradot.load(path, 'cpu')
    assert str(path) in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('field, value', [('n', 3), ('image_size', [64, 64]), ('image_size', [96, 128])])
def test_a_config_that_contradicts_the_prototypes_is_refused(saved, tmp_path, field, value):
    with safetensors.safe_open(saved, 'pt') as f: config = json.loads(f.metadata()['config'])
    path = rewritten(saved, tmp_path/'x.safetensors', config=json.dumps(config | {field: value}))
    with pytest.raises(InputError): Pradot.load(path, 'cpu')

@pytest.mark.parametrize('content', [b'', b'\0'*7, b'\0'*8, b'\0'*64, b'\xff'*64, b'PK\3\4 not ours', b'{}',
    struct.pack('<Q', 2) + b'{}', struct.pack('<Q', 2**40)])
def test_files_that_are_no_models_are_refused(tmp_path, content):
    path = tmp_path/'x.safetensors'
    path.write_bytes(content)
    with pytest.raises(InputError) as e: Pradot.load(path, 'cpu')
    assert str(path) in str(e.value) and '\n' not in str(e.value)

def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path, tmp_path/'no.safetensors', tmp_path/'no'/'no.safetensors'):
        with pytest.raises(InputError) as e: Pradot.load(path, 'cpu')
        assert str(path) in str(e.value)

def test_truncated_model_files_are_refused(saved, tmp_path):
    data, path = saved.read_bytes(), tmp_path/'x.safetensors'
    head = 8 + struct.unpack('<Q', data[:8])[0]
    for n in (*range(0, head + 1, max(1, head//60)), 7, 8, 9, head - 1, head, head + 1, len(data)//2, len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises(InputError) as e: Pradot.load(path, 'cpu')
        assert str(path) in str(e.value) and '\n' not in str(e.value)
    path.write_bytes(data + b'\0')
    with pytest.raises(InputError): Pradot.load(path, 'cpu')

def flipped(saved):
    """Model files with one header byte changed: each of its length and of what `save` says about the model,
    and some of the tensors' names and places"""
    data = saved.read_bytes()
    head = 8 + struct.unpack('<Q', data[:8])[0]
    start = data.index(b'__metadata__'); end = data.index(b'}', data.index(b'seed', start)) + 80
    # safetensors orders entries at random
    some = np.random.default_rng(0).choice(np.arange(8, head), 100, replace=False).tolist()
    for i in [*range(8), *range(start, min(end, head)), *some]:
        bad = bytearray(data)
        bad[i] ^= 1
        yield bytes(bad)

def test_flipped_header_bytes_never_crash(saved, tmp_path, toy):
    path, image = tmp_path/'x.safetensors', np.asarray(toy.test[0].image())
    refused = 0
    for bad in flipped(saved):
        path.write_bytes(bad)
        try: Pradot.load(path, 'cpu').predict([image])
        except InputError as e:
            assert '\n' not in str(e)
            refused += 1
    assert refused > 100

def test_flipped_header_bytes_are_always_noticed(saved, tmp_path):
    path = tmp_path/'x.safetensors'
    for bad in flipped(saved):
        path.write_bytes(bad)
        with pytest.raises(InputError): Pradot.load(path, 'cpu')

@few
@given(st.sampled_from(['n', 'eps', 'iterations', 'tol', 'eta', 'epochs', 'batch_size', 'seed', 'alphas', 'stages',
                        'image_size']),
       st.one_of(st.none(), st.booleans(), st.text(max_size=2), st.floats(-3, 0, exclude_max=True),
           st.just(float('nan')), st.just([]), st.just(object)))
def test_config_refuses_what_makes_no_sense(key, value):
    with pytest.raises(InputError) as e: Config(**{key: value})
    assert '\n' not in str(e.value)

def test_a_long_fit_says_so_after_its_first_step():
    from pradot.detector import FAST, PAPER, _Estimate
    for config, says in ((PAPER, r'about 16\d minutes; shorter with --preset fast .*a smaller --n'), (FAST, r'at most about 16\d minutes; shorter with')):
        e = _Estimate(config, [(2, 0.)], 1000, {2: 1.})
        e.start(2); e.begin -= 10.
        with pytest.warns(UserWarning, match=says): e.stepped()
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            e.stepped()                                            # once is enough
            short = _Estimate(config, [(2, 0.)], 50, {2: 1.}); short.start(2); short.begin -= 10.; short.stepped()

def test_a_matrix_in_half_precision_is_never_widened_whole(monkeypatch):
    monkeypatch.setattr(cost_module, 'CHUNK', 64)
    gen = torch.Generator().manual_seed(0)
    z, p = torch.randn(3, 4, 4, 5, generator=gen), torch.randn(2, 4, 4, 5, generator=gen)
    C = cost_module.pair_costs(z, p, 0.3, room=torch.empty(48, 32, dtype=torch.half))
    f0, g0, _ = transport.shifts(C)
    parts = transport.dense(C, f0, g0, 0.1)
    assert len(C.rows) > 1 and [s for s, _, _ in parts(10**9)] == C.rows
