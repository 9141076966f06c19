"The pages of the paper's figures, and properties of what they draw with."
import json

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pradot import figures, transport
from pradot.cost import cost
from pradot.data import InputError

@pytest.fixture(scope='module')
def pages(root):
    found = {p.stem: json.loads(p.read_text(encoding='utf-8')) for p in sorted((root/'nbs'/'paper').glob('*.ipynb'))}
    assert found, 'no notebooks in nbs/paper'
    return found

def test_pictures_have_words_and_tables_are_markdown(pages):
    for name, nb in pages.items():
        for cell in nb['cells']:
            kinds = {k for o in cell.get('outputs', []) for k in o.get('data', {})}
            text = ''.join(cell['source'])
            assert 'text/html' not in kinds, f'{name}: an HTML table loads scripts from elsewhere'
            if 'image/png' in kinds: assert '#| fig-alt: ' in text and '#| fig-cap: ' in text, f'{name}: {text[:80]}'

@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_tiles_put_together_are_the_image(H, W, h, w):
    a = np.random.default_rng(0).integers(0, 256, (H*h, W*w, 3), dtype=np.uint8)
    t = figures.tiles(a, (H, W), a.shape[:2])
    assert t.shape == (H, W, h, w, 3)
    assert np.array_equal(figures.untile(t), a)
    assert np.array_equal(t[-1, -1], a[-h:, -w:])

@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_places_lead_from_cell_to_prototype(H, W, n, seed):
    which = np.random.default_rng(seed).integers(0, n*H*W, (2, H, W))
    d = figures.places(which)
    for b, i, j in np.ndindex(which.shape):
        to = which[b, i, j] % (H*W)
        assert np.allclose([i + d[b, i, j, 0]*H, j + d[b, i, j, 1]*W], divmod(int(to), W))

@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 99))
def test_pairwise_is_equation_1(alpha, seed):
    gen = torch.Generator().manual_seed(seed)
    z, p = torch.randn(1, 3, 4, 5, generator=gen), torch.randn(1, 3, 4, 5, generator=gen)
    c = figures.grid(3, 4)
    C = figures.pairwise(torch.cat([z.flatten(0, 2), p.flatten(0, 2)]), torch.cat([c, c]), alpha)
    assert np.allclose(C[:12, 12:], cost(z, p, alpha), atol=1e-5)
    assert np.array_equal(C, C.T) and (C >= 0).all() and (C.diagonal() == 0).all()

@pytest.mark.parametrize('budget', [1, 256, 1 << 20])
def test_most_alike_is_the_same_for_every_budget(monkeypatch, budget):
    gen = torch.Generator().manual_seed(0)
    q, u = (torch.nn.functional.normalize(torch.randn(k, 8, generator=gen), dim=1) for k in (13, 29))
    u[20] = u[3]                                                     # of equals, the first
    monkeypatch.setattr(transport, 'BUDGET', budget)
    best, row = figures._most_alike(q, u)
    C = q @ u.T
    assert np.allclose(best, C.max(1).values, atol=1e-6)
    assert np.allclose(C[torch.arange(13), torch.from_numpy(row)], best, atol=1e-6) and 20 not in row

def test_arrows_are_one_for_each_cell_that_moves():
    which = np.arange(12).reshape(3, 4)
    which[0, 0], which[2, 3] = 5, 12                                 # 12 is the second prototype of cell 0
    wrong = np.zeros((3, 4), bool)
    wrong[2, 3] = True
    _, ax = plt.subplots()
    figures.arrows(ax, which, (30, 40), wrong)
    stay, go = ax.lines, ax.collections
    assert [len(l.get_xdata()) for l in stay] == [10, 0] and [q.N for q in go] == [1, 1]
    assert (go[0].U, go[0].V) == (10, 10) and (go[1].U, go[1].V) == (-30, -20)
    plt.close()

def test_umap_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'umap', None)
    with pytest.raises(InputError, match='pip install umap-learn'): figures.project(np.zeros((40, 40)))

def test_data_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv('PRADOT_DATA', str(tmp_path/'no'))
    with pytest.raises(InputError, match='is not a folder'): figures.cases()
    monkeypatch.setenv('PRADOT_DATA', str(tmp_path))
    with pytest.raises(InputError, match='holds no category'): figures.cases()

def known_truths(saturations=True):
    "Two good images and one with a defect of each kind, and the share of the defect in each cell"
    known, share = [figures.Truth((8, 8), 'good', dict(saturations=()) if saturations else {})]*2, torch.zeros(4, 4, 4)
    for i, (kind, cell) in enumerate((('logical_anomalies', (0, 1)), ('structural_anomalies', (3, 2))), 2):
        mask = np.zeros((8, 8), bool)
        mask[2*cell[0]:2*cell[0] + 2, 2*cell[1]:2*cell[1] + 2] = True
        share[(i, *cell)] = 1
        known.append(figures.Truth((8, 8), kind, dict(channels=mask) | (dict(saturations=[1]) if saturations else {})))
    return known, share

def test_measured_of_the_truth_itself_is_best_and_of_its_opposite_worst():
    known, share = known_truths()
    best, worst = (figures.measured({(2, 0.): d}, known) for d in (share, 1 - share))
    assert best == dict(image=1, located=1, located_logical=1, located_structural=1)
    assert worst['image'] <= 0.5 and worst['located'] < 0.1
    assert set(figures.measured({(2, 0.): share}, known_truths(False)[0])) == {'image', 'located'}

def test_measured_counts_each_kind_by_itself():
    known, share = known_truths()
    share[3] = 0                                                     # the structural defect is not seen
    found = figures.measured({(2, 0.): share, (3, 0.): share[:, ::2, ::2]*0}, known)
    assert found['located_logical'] == 1 and found['located_structural'] < 0.1
    assert found['located'] == (found['located_logical'] + found['located_structural'])/2
    assert found['image'] == 0.75                                    # one of two is found, the other is a tie

def test_measured_needs_good_images():
    known, share = known_truths()
    with pytest.raises(InputError, match='no image is good'): figures.measured({(2, 0.): share[2:]}, known[2:])

def test_summed_takes_categories_together_before_seeds():
    t = pd.DataFrame([dict(knob=k, category=c, seed=s, image=x, other=9) for k, c, s, x in
                      (('b', 'u', 0, .1), ('b', 'v', 0, .3), ('b', 'u', 1, .5), ('b', 'v', 1, .3), ('a', 'u', 0, .5))])
    assert figures.summed(t, ['knob']).to_dict('list') == dict(knob=['b', 'a'], image=['30.0 ± 14.1', '50.0'])

def test_band_holds_mean_and_deviation():
    _, ax = plt.subplots()
    figures.band(ax, [1, 2], [[1, 5], [3, 5]], 'x')
    assert ax.lines[0].get_ydata().tolist() == [2, 5] and len(ax.lines) == 3
    (path,) = ax.collections[0].get_paths()
    assert np.isclose(path.vertices[:, 1].min(), 2 - 2**.5) and np.isclose(path.vertices[:, 1].max(), 5)
    plt.close()

def test_small_settings_do_not_change_the_papers(monkeypatch):
    for name in ('PRADOT_DATA', 'PRADOT_FULL', 'PRADOT_TEST'): monkeypatch.delenv(name, raising=False)
    assert figures.cases(small=dict(n=3))[0].config.n == 3
    assert figures.cases(small=dict(n=3), n=5)[0].config.n == 5
    monkeypatch.setenv('PRADOT_FULL', '1')
    assert figures.cases(small=dict(n=3))[0].config.n == 16
