"What the authors' released code does where it differs from the text: each option against formulas written out here"
from dataclasses import fields, replace
from functools import cache
import numpy as np
import pytest, torch, torchvision
from pradot.cost import grid, structural
from pradot.data import InputError, split
from pradot.detector import OFFICIAL, PAPER, Config, Pradot, merge
from pradot.features import Backbone, extract
from pradot.prototypes import barycentre, held_loss, learn, nearest, shuffles
from pradot.toy import tray
from pradot.transport import plan, sinkhorn

quiet = pytest.mark.filterwarnings('ignore:in \\d+ of', 'ignore:a batch of', 'ignore:only \\d+ images')
TINY = replace(OFFICIAL, backbone='small', weights=None, image_size=(48, 64), n=2, batch_size=3, epochs=3,
               iterations=20, eta=0.1, seed=2) # with this seed the second epoch is the best one

# The method in float64 and plain numpy, with the options' names

def lse(x, axis):
    top = x.max(axis, keepdims=True)
    return (np.log(np.exp(x - top).sum(axis, keepdims=True)) + top).squeeze(axis)

def places(H, W, corners):
    "(H*W, 2)"
    def along(i, k): return (i/(k - 1) if k > 1 else 0.) if corners else (i + 1)/k
    return np.array([(along(i, H), along(j, W)) for i in range(H) for j in range(W)])

def apart(H, W, squared, corners):
    "(H*W, H*W) distances between cells"
    p = places(H, W, corners)
    d = np.array([[np.sqrt((a[0] - b[0])**2 + (a[1] - b[1])**2) for b in p] for a in p])
    return d**2 if squared else d

def cosines(z, p):
    a, b = (x.reshape(-1, x.shape[-1]) for x in (z, p))
    return a @ b.T/np.linalg.norm(a, axis=1)[:, None]/np.linalg.norm(b, axis=1)

def batch_cost(z, p, alpha, S):
    "Eq. 3: both parts divided by their maximum over the batch"
    looks = 1 - cosines(z, p)
    place = np.tile(S, (len(z), len(p)))
    return (1 - alpha)*looks/looks.max() + alpha*place/place.max()

def logs(M, eps, iterations):
    "The plan after so many rounds: columns first, then rows"
    rows, cols, u = -np.log(M.shape[0]), -np.log(M.shape[1]), np.zeros(M.shape[0])
    for _ in range(iterations):
        v = cols - lse(u[:, None] - M/eps, 0)
        u = rows - lse(v[None] - M/eps, 1)
    return np.exp(u[:, None] + v[None] - M/eps)

def start(c, shape):
    gen = torch.Generator().manual_seed(c.seed)
    return (torch.rand if c.start == 'uniform' else torch.randn)(*shape, generator=gen).double().numpy()

def batches_of(c, N):
    "Epoch by epoch the batches, as lists of numbers of images"
    gen, B = torch.Generator().manual_seed(c.seed), c.batch_size if c.drop_last else min(N, c.batch_size)
    for _ in range(c.epochs):
        order = torch.randperm(N, generator=gen).tolist()
        full = [order[s:s + B] for s in range(0, N, B)]
        if len(full[-1]) < B: full[-1:] = [] if c.drop_last else [order[-B:]]
        yield full

def learnt(c, Z, V, alpha):
    "Prototypes, and for each epoch the loss on V"
    S, p = apart(*Z.shape[1:3], c.squared, c.corners), start(c, (c.n, *Z.shape[1:]))
    best, losses = p, []
    for full in batches_of(c, len(Z)):
        for chosen in full:
            M = batch_cost(Z[chosen], p, alpha, S)
            T, z = logs(M, c.eps, c.iterations), Z[chosen].reshape(-1, Z.shape[-1])
            mean = T.T @ z * (len(T[0]) if c.nominal else 1/T.sum(0)[:, None])
            p = c.eta*p + (1 - c.eta)*mean.reshape(p.shape)
        if not len(V) or not full: best = p; continue
        parts = [V[i:i + c.batch_size] for i in range(0, len(V), c.batch_size)]
        Ms = [batch_cost(v, p, alpha, S) for v in parts]
        losses.append(sum(len(v)*(M*logs(M, c.eps, c.iterations)).sum() for v, M in zip(parts, Ms))/len(V))
        if losses[-1] == min(losses): best = p
    return best, losses

def distances(c, z, p, alpha):
    "(H, W) of one image"
    H, W = z.shape[:2]
    looks, place = 1 - cosines(z, p), np.tile(apart(H, W, c.squared, c.corners), (1, len(p)))
    if c.relative: looks, place = looks/looks.max(), place/place.max()
    return ((1 - alpha)*looks + alpha*place).min(1).reshape(H, W)

def enlarged(d, size, align):
    "Bilinear, one number after the other"
    out = np.zeros(size)
    def at(i, n, k):
        x = i*(k - 1)/(n - 1) if align else min(max((i + 0.5)*k/n - 0.5, 0), k - 1)
        a = min(int(x), max(k - 2, 0))
        return a, min(a + 1, k - 1), x - a
    for i, j in np.ndindex(*size):
        (a, b, s), (e, f, t) = at(i, size[0], d.shape[0]), at(j, size[1], d.shape[1])
        out[i, j] = (1 - s)*((1 - t)*d[a, e] + t*d[a, f]) + s*((1 - t)*d[b, e] + t*d[b, f])
    return out

# The whole of it, each option switched off in turn

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return tray(tmp_path_factory.mktemp('toy'), size=(72, 96), train=8, validation=3, good=1, logical=1, structural=1)

@pytest.fixture(scope='module')
def by_hand(toy):
    "(config) -> its prototypes and the maps of the test images, by the formulas above"
    backbone = Backbone('small')
    def features(records):
        return {l: z.double().numpy() for l, z in extract(backbone, records, TINY.image_size, progress=False).items()}
    Z, test = features(toy.train), features(toy.test)
    V = features(toy.validation)
    @cache
    def go(c):
        keys = [(l, a) for l in c.stages for a in c.alphas]
        ps = {(l, a): learnt(c, Z[l], V[l] if c.held_out else (), a)[0] for l, a in keys}
        def one(i, l): return np.mean([distances(c, test[l][i], ps[l, a], a) for a in c.alphas], 0)
        maps = [np.mean([enlarged(one(i, l), (48, 64), c.align_corners) for l in c.stages], 0)
                for i in range(len(toy.test))]
        return ps, np.array(maps)
    return go

CHANGES = dict(squared=True, corners=False, start='normal', nominal=False, held_out=0., drop_last=False, relative=False,
    align_corners=False)
TESTED_APART = {'weights', 'tol', 'solver'}

def test_every_setting_in_which_the_released_code_differs_is_tested():
    differ = {f.name for f in fields(Config) if getattr(OFFICIAL, f.name) != getattr(PAPER, f.name)}
    assert differ == CHANGES.keys() | TESTED_APART
    assert all(getattr(PAPER, k) == v for k, v in CHANGES.items())

@quiet
@pytest.mark.parametrize('change', [{}, *[{k: v} for k, v in CHANGES.items()]], ids=lambda c: '-'.join(c) or 'official')
def test_the_released_code_is_what_the_formulas_say(toy, by_hand, change):
    c = replace(TINY, **change)
    model = Pradot(c, 'cpu').fit(toy.train, progress=False, validation=toy.validation)
    prototypes, maps = by_hand(c)
    for k, p in model.prototypes.items(): np.testing.assert_allclose(p, prototypes[k], atol=1e-3, rtol=1e-3)
    found = model.predict(toy.test, size=(48, 64), progress=False).maps
    np.testing.assert_allclose(found, maps, atol=1e-4)
    if change:                                       # and it makes a difference, much larger than that
        before = by_hand(TINY)
        moved = max(np.abs(prototypes[k] - p).max() for k, p in before[0].items())
        assert moved > 1e-2 or np.abs(maps - before[1]).max() > 1e-3

# One by one

@pytest.mark.parametrize('shape', [(3, 5), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize('squared', [True, False])
@pytest.mark.parametrize('corners', [True, False])
def test_places_and_the_distances_between_them(shape, squared, corners):
    np.testing.assert_allclose(grid(*shape, corners, dtype=torch.double), places(*shape, corners), atol=1e-12)
    S = structural(*shape, squared, corners, dtype=torch.double)
    np.testing.assert_allclose(S, apart(*shape, squared, corners), atol=1e-12)
    if corners and shape == (3, 5): assert float(S[0, -1]) == float(S.max()) == pytest.approx(2 if squared else 2**.5)

def some(B=4, H=3, W=5, D=6, seed=0, dtype=torch.double):
    gen = torch.Generator().manual_seed(seed)
    return torch.rand(B, H, W, D, generator=gen, dtype=dtype)**2

def test_which_marginal_a_solver_makes_exact():
    M = torch.from_numpy(batch_cost(some().numpy(), some(2, seed=1).numpy() - 0.3, 0.3, apart(3, 5, True, False)))
    rows, cols = (torch.full((k,), 1/k, dtype=M.dtype) for k in M.shape)
    T = {s: plan(M, (t := sinkhorn(M, 0.01, 5, 0., solver=s)).f, t.g, 0.01) for s in ('log', 'kernel')}
    torch.testing.assert_close(T['log'].sum(1), rows, atol=1e-12, rtol=0)
    torch.testing.assert_close(T['kernel'].sum(0), cols, atol=1e-12, rtol=0)
    assert (T['log'].sum(0) - cols).abs().max() > 1e-4 and (T['kernel'].sum(1) - rows).abs().max() > 1e-4
    np.testing.assert_allclose(T['log'], logs(M.numpy(), 0.01, 5), atol=1e-12)

def test_tol_0_never_stops_early():
    Z = some(dtype=torch.float32)
    for iterations in (1, 7, 40):
        h = learn(Z, 0.3, n=1, tol=0., solver='log', iterations=iterations, epochs=2, batch_size=2).history
        assert [s['iterations'] for s in h] == [iterations]*4
    assert learn(Z, 0.3, n=1, eps=0.5, tol=0.1, solver='log', epochs=1).history[0]['iterations'] < 40

def test_the_nominal_barycentre_divides_by_the_mass_that_is_due():
    z, p = some(), some(2, seed=1) - 0.3
    M = torch.from_numpy(batch_cost(z.numpy(), p.numpy(), 0.3, apart(3, 5, True, False)))
    t, flat = sinkhorn(M, 0.01, 5, 0., solver='log'), z.flatten(0, 2).numpy()
    T = logs(M.numpy(), 0.01, 5)
    np.testing.assert_allclose(barycentre(M, t, z.flatten(0, 2), 0.01, True)[0], 30*T.T @ flat, atol=1e-10)
    np.testing.assert_allclose(barycentre(M, t, z.flatten(0, 2), 0.01)[0], T.T @ flat/T.sum(0)[:, None], atol=1e-10)
    assert np.abs(30*T.sum(0) - 1).max() > 1e-3

def test_a_uniform_start_lies_in_0_to_1():
    p = learn(some(dtype=torch.float32), 0., n=50, eta=1., epochs=1, start='uniform', seed=3).prototypes
    assert 0 <= p.min() < 0.01 and 0.99 < p.max() < 1 and abs(float(p.mean()) - 0.5) < 0.02
    assert torch.equal(p, torch.rand(50, 3, 5, 6, generator=torch.Generator().manual_seed(3)))
    p = learn(some(dtype=torch.float32), 0., n=50, eta=1., epochs=1, seed=3).prototypes
    assert p.min() < -2 and p.max() > 2 and abs(float(p.std()) - 1) < 0.05
    with pytest.raises(InputError, match='cannot start'): learn(some(), 0., start='zero')

@pytest.mark.parametrize('alpha', [0., 0.3, 1.])
@pytest.mark.parametrize('squared', [True, False])
def test_costs_at_test_time_are_divided_by_the_maximum_of_each_image(alpha, squared):
    z, p, c = some(), some(2, seed=1) - 0.3, replace(TINY, squared=squared, corners=True)
    z[1:] *= 0.1; z[1:, ..., 0] += 0.4                         # images of different contrast
    S = structural(3, 5, squared, True, dtype=torch.double)
    d, j = nearest(z, p, alpha, S, True)
    for i in range(4):
        np.testing.assert_allclose(d[i], distances(c, z[i].numpy(), p.numpy(), alpha), atol=1e-12)
        alone = nearest(z[i:i + 1], p, alpha, S, True)
        torch.testing.assert_close(alone[0][0], d[i]); assert torch.equal(alone[1][0], j[i])
    assert 0 <= d.min() and d.max() <= 1 + 1e-12

def test_an_image_that_is_all_prototype_is_divided_by_nothing():
    p = some(1)
    one = p[:, :1, :1].expand_as(p).contiguous()
    assert nearest(one, one, 0., None, True)[0].abs().max() < 1e-10
    assert nearest(p[:, :1, :1], p[:, :1, :1], 0.3, None, True)[0].abs().max() < 1e-10    # a grid of one cell

@pytest.mark.parametrize('align', [True, False])
def test_maps_are_enlarged_corner_to_corner_or_cell_by_cell(align):
    d = some(1, 3, 4, 1)[..., 0]
    m = merge({(2, 0.): d, (2, 0.3): 3*d}, (9, 13), align)[0]
    np.testing.assert_allclose(m, 2*enlarged(d[0].numpy(), (9, 13), align), atol=1e-12)
    assert float(m[0, -1]) == pytest.approx(2*float(d[0, 0, -1]))
    assert (float(m[4, 4]) == pytest.approx(2*float(d[0, 1, 1]))) == align

def test_an_epoch_is_chosen_by_the_images_held_back():
    seen = set()
    for seed in range(6):
        Z, V = some(5, seed=seed, dtype=torch.float32), some(3, seed=50 + seed, dtype=torch.float32)
        how = dict(n=1, eta=0., batch_size=2, seed=seed, iterations=15, tol=0., solver='log', drop_last=True)
        found = learn(Z, 0.3, epochs=6, held=V, **how)
        c = replace(TINY, n=1, eta=0., batch_size=2, seed=seed, iterations=15, epochs=6, squared=True, corners=False,
                    start='normal', nominal=False)
        best, losses = learnt(c, Z.double().numpy(), V.double().numpy(), 0.3)
        held = [h['held'] for h in found.history if 'held' in h]
        np.testing.assert_allclose(held, losses, atol=1e-4)
        assert [h['epoch'] for h in found.history if 'held' in h] == list(range(6)) and len(found.history) == 12
        assert found.epoch == int(np.argmin(held))
        assert torch.equal(found.prototypes, learn(Z, 0.3, epochs=found.epoch + 1, **how).prototypes)
        np.testing.assert_allclose(found.prototypes, best, atol=1e-3)
        seen.add(found.epoch)
    assert len(seen) > 1 and seen - {5}                        # it is a choice

def test_batches_of_the_loss_count_by_their_images():
    V, p = some(5, seed=3), some(2, seed=4) - 0.3
    S = apart(3, 5, False, True)
    parts = [(V[:3], 3), (V[3:], 2)]
    Ms = [(batch_cost(v.numpy(), p.numpy(), 0.3, S), k) for v, k in parts]
    expected = sum(k*(M*logs(M, 0.01, 9)).sum() for M, k in Ms)/5
    assert held_loss(p, V, 3, 0.3, 0.01, 9, 0., 'log', torch.from_numpy(S)) == pytest.approx(expected, rel=1e-9)

@quiet
def test_without_a_validation_set_some_of_the_images_are_held_back(toy):
    rest, held = split(toy.train, 0.2, TINY.seed)
    assert (len(rest), len(held)) == (6, 2)
    a = Pradot(TINY, 'cpu').fit(toy.train, progress=False)
    b = Pradot(TINY, 'cpu').fit(rest, progress=False, validation=held)
    c = Pradot(TINY, 'cpu').fit(toy.train, progress=False, validation=held)
    for k in a.prototypes: assert torch.equal(a.prototypes[k], b.prototypes[k])
    assert any(not torch.equal(a.prototypes[k], c.prototypes[k]) for k in a.prototypes)
    d = Pradot(TINY, 'cpu', held_out=0.).fit(toy.train, progress=False)
    e = Pradot(TINY, 'cpu', held_out=0.).fit(toy.train, progress=False, validation=held)      # there for nothing
    for k in d.prototypes: assert torch.equal(d.prototypes[k], e.prototypes[k])

@pytest.mark.parametrize('N, B', [(7, 3), (6, 3), (2, 3), (1, 1)])
@pytest.mark.parametrize('drop', [True, False])
def test_images_that_fill_no_batch(N, B, drop):
    c = replace(TINY, batch_size=B, drop_last=drop, epochs=4, seed=5)
    expected = [(e, b) for e, full in enumerate(batches_of(c, N)) for b in full]
    assert [(e, b.tolist()) for e, b in shuffles(N, B, 4, 5, drop)] == expected
    assert len(expected) == 4*(N//B if drop else -(-N//B))

def test_too_few_images_for_a_batch_are_no_step_and_a_warning(toy):
    with pytest.warns(UserWarning, match='3 images do not fill a batch of 4.*lower the batch size'):
        m = Pradot(TINY, 'cpu', batch_size=4).fit(toy.train[:3], progress=False, validation=toy.validation)
    for k, p in m.prototypes.items():
        assert m.history[k] == []
        assert torch.equal(p, torch.rand(*p.shape, generator=torch.Generator().manual_seed(TINY.seed)))
    assert np.isfinite(m.predict(toy.test, progress=False).maps).all()

def test_weights_of_timm(monkeypatch):
    asked, torch_state = [], torchvision.models.resnet50(weights=None).state_dict()
    monkeypatch.setattr('torch.hub.load_state_dict_from_url', lambda url, **k: asked.append((url, k)) or torch_state)
    b = Backbone('resnet50', OFFICIAL.weights)
    assert asked[0][0].startswith('https://github.com/huggingface/pytorch-image-models/releases/') and len(asked) == 1
    assert asked[0][0].endswith('/resnet50_a1_0-14fe96d1.pth')
    assert asked[0][1]['check_hash'] and asked[0][1]['weights_only']
    assert torch.equal(b.net.layer3[2].conv1.weight, torch_state['layer3.2.conv1.weight'])
    Backbone('resnet50'); assert asked[1][0].startswith('https://download.pytorch.org/models/resnet50-')
    with pytest.raises(InputError, match='for resnet50 only'): Backbone('resnet18', 'timm')
