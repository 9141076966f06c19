"The streaming solver: the same iterations as ot.sinkhorn's, in the memory of the costs."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pradot import cost
from pradot.cost import PRODUCTS, cosines, matrix_costs, normalised_cost, pair_costs, products
from pradot.data import InputError
from pradot.prototypes import barycentre, learn, nearest, step, stream_barycentre
from pradot.transport import FILL, FLOOR, dense, iterate, plan, shifts, sinkhorn, sparse, stream_

def matrix(N, Np, seed, kind=torch.double):
    return torch.rand(N, Np, generator=torch.Generator().manual_seed(seed), dtype=kind)

def whole(found):
    "The plan of a `Stream`"
    return found.u[:, None]*torch.cat([k.clone().to_dense() for _, k, _ in found.parts()])*found.v

problems = dict(N=st.integers(1, 40), Np=st.integers(1, 30), seed=st.integers(0, 999), eps=st.sampled_from([0.01, 0.05, 0.3]))

@settings(max_examples=60, deadline=None)
@given(**problems, iterations=st.integers(1, 30), warm=st.booleans())
def test_iteration_for_iteration_as_pot(N, Np, seed, eps, iterations, warm):
    M = matrix(N, Np, seed)
    g = 0.05*matrix(1, Np, seed + 1)[0] if warm else None
    a, b = (sinkhorn(M, eps, iterations, 0., g, solver) for solver in ('kernel', 'stream'))
    assert b.iterations == iterations or b.error < 1e-12
    assert (plan(M, a.f, a.g, eps) - plan(M, b.f, b.g, eps)).abs().sum() < 1e-9
    assert abs(a.error - b.error) < 1e-9

@settings(max_examples=60, deadline=None)
@given(**problems, rows=st.integers(1, 41))
def test_account_and_blocks(N, Np, seed, eps, rows):
    "Prototypes' masses are exact, the account is of the plan that comes out, and blocks of any size give the same"
    M, kept = matrix(N, Np, seed), cost.CHUNK
    one = stream_(M.clone(), eps, 20, 0.)
    try:
        cost.CHUNK = rows*Np*8
        parts = stream_(M.clone(), eps, 20, 0.)
    finally: cost.CHUNK = kept
    T = whole(one)
    assert torch.allclose(T.sum(0), torch.full((Np,), 1/Np, dtype=torch.double), atol=1e-12)
    assert abs(float((T.sum(1) - 1/N).abs().sum()) - one.transport.error) < 1e-9
    assert abs(float((M*T).sum()) - one.loss) < 1e-9
    assert torch.allclose(whole(parts), T, atol=1e-12)

def test_in_place_and_a_one_in_every_row():
    M = matrix(50, 30, 0, torch.float32)
    at = M.data_ptr()
    C = matrix_costs(M)
    f0, g0, _ = shifts(C)
    dense(C, f0, g0, 0.01)
    assert M.data_ptr() == at and torch.equal(M.amax(1), torch.ones(50)) and torch.equal(M.amax(0), torch.ones(30)) and M.min() >= torch.tensor(FLOOR).exp()*0.999

def test_stops_at_the_tolerance():
    M = matrix(60, 40, 3)
    t = sinkhorn(M, 0.05, 500, 1e-3, solver='stream')
    assert t.converged and t.iterations < 500 and t.error <= 1e-3
    assert sinkhorn(M, 0.05, 500, 1e-6, solver='stream').iterations > t.iterations

def test_permutations():
    M, rows, cols = matrix(30, 20, 1), torch.randperm(30), torch.randperm(20)
    a, b = stream_(M.clone(), 0.05, 50, 0.), stream_(M[rows][:, cols].clone(), 0.05, 50, 0.)
    assert torch.allclose(whole(a)[rows][:, cols], whole(b), atol=1e-12)

@pytest.mark.parametrize('alpha', [0., 0.3, 1.])
def test_step_as_with_the_plan(alpha):
    gen = torch.Generator().manual_seed(0)
    z, p = torch.rand(5, 4, 3, 7, generator=gen, dtype=torch.double), torch.rand(2, 4, 3, 7, generator=gen, dtype=torch.double)
    M = normalised_cost(z, p, alpha)
    t = sinkhorn(M, 0.05, 40, 0., solver='stream')
    mean, loss = barycentre(M, t, z.flatten(0, 2), 0.05)
    found = stream_(pair_costs(z, p, alpha), 0.05, 40, 0.)
    assert torch.allclose(stream_barycentre(found, z.flatten(0, 2)), mean, atol=1e-9) and abs(found.loss - loss) < 1e-9
    moved, _, again = step(p, z, alpha, 0.9, 0.05, 40, 0., solver='stream')
    assert torch.allclose(moved, torch.lerp(mean.view_as(p), p, 0.9), atol=1e-9) and abs(again - loss) < 1e-9

def test_what_float32_cannot_do_is_refused():
    with pytest.raises(InputError, match='too small for float32'): sinkhorn(matrix(40, 30, 0, torch.float32), 1e-4, solver='stream')
    M = matrix(40, 30, 0, torch.float32)
    M[3, 4] = float('nan')
    with pytest.raises(InputError, match='not finite'): sinkhorn(M, solver='stream')
    z = torch.rand(2, 3, 3, 4); z[0, 0, 0, 0] = float('inf')
    with pytest.raises(InputError, match='not finite'): step(torch.rand(1, 3, 3, 4), z, 0.3, solver='stream')

@pytest.mark.parametrize('kind', PRODUCTS)
def test_precision_is_put_back(kind):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('high')
        with pytest.raises(KeyError), products(kind): raise KeyError
        assert torch.get_float32_matmul_precision() == 'high'
        learn(torch.rand(6, 3, 3, 8), 0.3, 2, epochs=1, batch_size=3, kind=kind, solver='stream')
        nearest(torch.rand(1, 3, 3, 8), torch.rand(2, 3, 3, 8), 0.3, kind=kind)
        assert torch.get_float32_matmul_precision() == 'high'
    finally: torch.set_float32_matmul_precision(before)

def test_float32_is_float32_whatever_is_set_around():
    z, p = torch.randn(4, 8, 8, 64), torch.randn(2, 8, 8, 64)
    wanted, before = cosines(z, p), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        assert torch.equal(cosines(z, p), wanted) and torch.equal(nearest(z, p, 0.3)[0], nearest(z, p, 0.3)[0])
    finally: torch.set_float32_matmul_precision(before)

@settings(max_examples=25, deadline=None)
@given(epochs=st.integers(2, 5), cut=st.integers(0, 3), warm=st.booleans(), held=st.booleans(), drop=st.booleans(), seed=st.integers(0, 9))
def test_learning_goes_on_to_the_same(epochs, cut, warm, held, drop, seed):
    Z, states = torch.rand(7, 2, 3, 4, generator=torch.Generator().manual_seed(seed)), []
    how = dict(alpha=0.3, n=2, epochs=epochs, batch_size=3, warm=warm, seed=seed, drop_last=drop, held=Z[:2] if held else None, solver='stream')
    whole = learn(Z, **how, keep=lambda s: states.append(s | dict(history=list(s['history']))))
    rest = learn(Z, **how, begin=states[min(cut, epochs - 1)])
    assert torch.equal(rest.prototypes, whole.prototypes) and rest.history == whole.history and rest.epoch == whole.epoch

def test_iterate_needs_no_float64():
    "Float32 stays within a thousandth of the mass of float64 at the paper's ε"
    M = matrix(200, 100, 5)
    exact, rough = stream_(M.clone(), 0.01, 100, 0.), stream_(M.float(), 0.01, 100, 0.)
    T, R = whole(exact), whole(rough)
    assert (T - R).abs().sum() < 1e-3
    K = torch.ones(3, 2)
    u, v, done = iterate(lambda: [(slice(0, 3), K, K.T)], K.shape, 5, 0.1, torch.ones(2))
    assert done == 2 and torch.allclose(u[:, None]*v, torch.full((3, 2), 1/6))

def peaked(N, Np, D, seed):
    "Costs of which few are small: cosine distances of noisy copies to the directions that they are copies of"
    gen = torch.Generator().manual_seed(seed)
    q = torch.nn.functional.normalize(torch.randn(Np, D, generator=gen), dim=1)
    u = q[torch.arange(N) % Np] + 0.05*torch.randn(N, D, generator=gen)
    return 1 - torch.nn.functional.normalize(u, dim=1) @ q.T

mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason='this PyTorch has no MKL, so K is never sparse')

@mkl
@settings(max_examples=40, deadline=None)
@given(N=st.integers(40, 200), Np=st.integers(20, 40), seed=st.integers(0, 999), warm=st.booleans(), rows=st.integers(1, 300))
def test_a_cut_plan_is_a_plan(N, Np, seed, warm, rows):
    "Prototypes' masses are exact, the account is of the plan that is used, and what is left out is small"
    M, kept = peaked(N, Np, 96, seed), cost.CHUNK
    g = 0.02*matrix(1, Np, seed + 1, torch.float32)[0] if warm else None
    f0, g0, _ = shifts(matrix_costs(M), g)
    try:
        cost.CHUNK = rows*Np*4
        cut = stream_(M.clone(), 0.02, 30, 0., g, cut=1e-7)
    finally: cost.CHUNK = kept
    exact, T = stream_(M.clone(), 0.02, 30, 0., g), whole(cut)
    assert torch.allclose(T.sum(0), torch.full((Np,), 1/Np), rtol=1e-5)
    assert abs(float((T.sum(1) - 1/N).abs().sum()) - cut.transport.error) < 1e-5
    assert abs(float((M*T).sum()) - cut.loss) < 1e-5
    K = ((f0[:, None] + g0 - M)/0.02).exp()
    if cut.filled < 1: assert cut.filled == pytest.approx(float((K >= 1e-7).float().mean()), abs=2/N) and cut.filled < 2*FILL
    assert (T > 0).any(0).all() and (T > 0).any(1).all()           # nothing loses all it has

@mkl
def test_what_the_cut_leaves_out_is_small():
    M = peaked(400, 100, 32, 0)
    exact = whole(stream_(M.clone(), 0.05, 100, 0.))
    off = []
    for cut in (1e-2, 1e-4, 1e-5):
        found = stream_(M.clone(), 0.05, 100, 0., cut=cut)
        assert found.filled < FILL
        off.append(float((whole(found) - exact).abs().sum()))
    assert off[0] > off[1] > off[2] and off[2] < 1e-4

@mkl
def test_a_prototype_nobody_wants_keeps_its_own():
    "A column that all rows would pass over by their potentials has entries all the same"
    M = peaked(300, 60, 96, 1)
    g = torch.zeros(60); g[7] = -5.                                # as if it had been far too popular before
    found = stream_(M.clone(), 0.02, 50, 0., g, cut=1e-6)
    assert found.filled < 1 and whole(found)[:, 7].sum() == pytest.approx(1/60, rel=1e-4)

def test_many_entries_are_not_cut():
    M = matrix(200, 100, 0, torch.float32)*0.1
    assert sparse(matrix_costs(M), *shifts(matrix_costs(M))[:2], 0.05, 1e-6) is None
    assert stream_(M.clone(), 0.05, 10, cut=1e-6).filled == 1

def learnt(budget, cut=0.):
    Z = torch.rand(7, 6, 5, 16, generator=torch.Generator().manual_seed(0))
    return learn(Z, 0.3, n=3, epochs=2, batch_size=4, warm=True, solver='stream', budget=budget, cut=cut).prototypes

def test_any_budget_gives_the_same():
    "120 x 90 costs take 43 200 bytes; half of it holds K in half precision, and less holds nothing"
    free = learnt(float('inf'))
    assert torch.equal(learnt(43_200), free)
    assert torch.allclose(learnt(43_199), free, atol=2e-3) and not torch.equal(learnt(43_199), free)
    assert torch.allclose(learnt(23_040), free, atol=2e-3) and torch.allclose(learnt(23_040, 1e-9), free, atol=2e-3)
    with pytest.raises(InputError, match=r'too small for 64 rows of 90 costs; raise --memory'): learnt(20_000)
