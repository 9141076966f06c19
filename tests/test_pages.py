"Stored runs beside the paper's tables, and the notebooks of the paper run from the command line."
import json
import os
import sys
from dataclasses import asdict, replace

import pytest
from filelock import FileLock
from hypothesis import given, settings, strategies as st

from pradot import figures, pages, tables
from pradot.data import InputError, PUBLISHED
from pradot.detector import FAST, PAPER
from pradot.experiment import paper_table, variants
from pradot.toy import tray

def row(category='bottle', dataset='mvtec_ad', value=.5, seed=0, config=PAPER, test=10**6):
    "A stored run that never ran"
    m = dict(image_auroc=value, pixel_auroc=value, au_spro=value)
    return dict(dataset=dataset, category=category, seed=seed, hash=repr(config), config=json.loads(json.dumps(asdict(config))),
                metrics=m | dict(released=m), images=dict(train=1, validation=0, test=test), seconds=dict(all=1.),
                machine=dict(gpu=None, cpu='x', cores=1), versions=dict(pradot='0'), date='2026-01-01')

EVERY = [row(c, d) for d, p in PUBLISHED.items() for c in p.counts]

# ---- the stored runs

def test_stored_runs_are_what_data_results_holds(root):
    files = sorted((root/'data'/'results').glob('*-seed*.json'))
    rows = tables.stored('')
    assert files and len(rows) == len(files)
    for f, r in zip(files, [json.loads(f.read_text()) for f in files]):
        assert f.name == f'{r["dataset"]}-{r["category"]}-{r["hash"]}-seed{r["seed"]}.json'   # as the grid named it
        assert r in rows and {'date', 'versions', 'machine', 'seconds', 'config'} <= r.keys()

def test_runs_of_a_grid_join_the_stored_ones(tmp_path, monkeypatch):
    (tmp_path/'runs').mkdir()
    (tmp_path/'runs'/'a.json').write_text(json.dumps(row('cable')))
    monkeypatch.setenv('PRADOT_RUNS', str(tmp_path))
    assert len(tables.stored()) == len(tables.stored('')) + 1
    (tmp_path/'runs'/'a.json').write_text(json.dumps(tables.stored('')[0] | dict(date='later')))
    assert [r['date'] for r in tables.stored()].count('later') == 1 and len(tables.stored()) == len(tables.stored(''))
    (tmp_path/'runs'/'a.json').write_text('{}')
    with pytest.raises(InputError, match='a.json is not the result of a run'): tables.stored()
    monkeypatch.setenv('PRADOT_RUNS', str(tmp_path/'no'))
    with pytest.raises(InputError, match='no has no results'): tables.stored()

@pytest.mark.parametrize('number', [1, 2, 3, 4])
def test_every_printed_number_is_in_its_table(number):
    for rows in ([], EVERY):
        t = tables.beside(number, rows)
        cells = {x.strip() for v in t.values.ravel() for x in v.split(' / ')}
        assert {f'{v:.1f}' for v in paper_table(number)['value']} <= cells
        assert ('not run' in cells) == (rows == [] or number == 2)   # these rows have one of Table 2's seven parts

@pytest.mark.parametrize('number, size', [(1, (11, 2)), (2, (7, 6)), (3, (11, 6)), (4, (16, 9))])
def test_tables_keep_their_shape_with_and_without_runs(number, size):
    assert tables.beside(number, []).shape == tables.beside(number, EVERY).shape == size

def test_one_category_is_not_filled_in_as_the_mean():
    t = tables.beside(3, [row('pushpins', 'mvtec_loco', .25)])
    mine = t.loc[tables.HERE['mvtec']]
    assert mine['pushpins'] == '25.0 / 25.0' and mine['mean'] == 'not run' and (mine == 'not run').sum() == 5

@settings(max_examples=30, deadline=None)
@given(st.permutations([FAST, replace(FAST, n=8), replace(FAST, epochs=10), replace(FAST, n=4, batch_size=32, epochs=10),
                        replace(PAPER, squared=False), replace(PAPER, backbone='resnet18'), replace(PAPER, weights='random')]))
def test_the_nearest_setting_does_not_depend_on_the_order(configs):
    rows = [row(config=c) for c in configs]
    while rows:
        best = tables.nearest(1, rows)
        assert len(best) == 1 and tables.away(best[0]['config']) == min(tables.away(r['config']) for r in rows)
        rows.remove(best[0])

def test_what_differs_is_said():
    text = tables.said(4, [row(value=.97, config=replace(FAST, n=4), test=50)])
    assert 'the run has 50 of the 83 test images' in text and '(n = 4)' in text and 'Not reached: image AU-ROC, pixel AU-ROC' in text
    assert 'the reason is not known' in tables.said(4, [row(value=.5)])

# ---- notebooks from the command line

def test_the_pages_are_the_notebooks_of_the_paper(root):
    assert {p.stem for p in pages.pages().values()} == {p.stem for p in (root/'nbs'/'paper').glob('[!._]*.ipynb')}
    for name, p in pages.pages().items(): assert name == p.stem or p.stem.startswith(f'{name}_')

def test_a_page_becomes_a_notebook_and_pictures(run, tmp_path):
    pytest.importorskip('nbclient')
    (tmp_path/'o').mkdir(); (tmp_path/'o'/'mine.txt').write_text('stays')
    code, out, err = run('reproduce', 'fig4', '--out', tmp_path/'o')
    assert code == 0 and err == '' and 'fig4_assignments.ipynb and 3 figures' in out, err    # and no bar: not a terminal
    assert sorted(p.name for p in (tmp_path/'o').iterdir()) == \
        ['fig4_assignments-1.png', 'fig4_assignments-2.png', 'fig4_assignments-3.png', 'fig4_assignments.ipynb', 'mine.txt']
    assert (tmp_path/'o'/'fig4_assignments-1.png').read_bytes()[:4] == b'\x89PNG'
    nb = json.loads((tmp_path/'o'/'fig4_assignments.ipynb').read_text())
    assert 'a few images and steps' in json.dumps(nb)                # PRADOT_TEST reached the kernel
    assert os.listdir('.') == []

def test_a_page_on_real_folders_names_what_is_not_there(run, tmp_path):
    pytest.importorskip('nbclient')
    (tmp_path/'sets').mkdir()
    (tmp_path/'sets'/'pushpins').symlink_to(tray().train[0].path.parents[2])
    code, out, err = run('reproduce', 'table3_loco', '--data', tmp_path/'sets', '--out', tmp_path/'o')
    assert code == 0 and err == '', err
    assert 'table3_loco.ipynb' in out and f'not run, because not in {tmp_path/"sets"}: bottle, ' in out and 'pushpins' not in out
    text = (tmp_path/'o'/'table3_loco.ipynb').read_text()
    assert 'pushpins, released protocol' in text and 'Not run, because not found: bottle' in text

def test_pages_refuse_what_is_not_theirs(refused, run, tmp_path):
    out = '--out', tmp_path/'o'
    refused(['reproduce', 'fig99', *out], 'fig99', 'fig4', status=2)
    refused(['reproduce', 'fig4'], '--out', status=2)
    refused(['reproduce', 'fig4', *out, '--data', tmp_path/'no'], tmp_path/'no', 'is not a folder')
    refused(['reproduce', 'fig4', *out, '--data', tmp_path], tmp_path, 'holds no category')
    refused(['reproduce', 'fig4', *out, '--n', '4'], '--n is for the tables')
    refused(['reproduce', 'fig4', *out, '--preset', 'fast'], '--preset is for the tables')
    refused(['reproduce', 'fig4', *out, '--image-size', '64'], '--image-size is for the tables')
    refused(['reproduce', 'fig4', *out, '--weights', 'random'], 'add --full')
    refused(['reproduce', 'table3_loco', *out, '--runs', tmp_path], tmp_path, 'has no results')
    refused(['reproduce', 'table3', *out, '--data', tmp_path, '--full'], '--full is for notebooks')
    (tmp_path/'file').write_text('in the way')
    refused(['reproduce', 'fig4', '--out', tmp_path/'file'], tmp_path/'file', 'cannot be written')

def test_a_folder_in_use_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(pages.tempfile, 'gettempdir', lambda: str(tmp_path))
    monkeypatch.setattr(pages, 'execute', lambda *a: pytest.fail('started'))
    lock = FileLock(pages.lock_of(tmp_path/'o'))
    with lock: refused(['reproduce', 'fig4', '--out', tmp_path/'o'], tmp_path/'o', 'is in use')

def test_a_cell_that_fails_leaves_nothing(refused, tmp_path, monkeypatch):
    pytest.importorskip('nbclient')
    (tmp_path/'sets'/'bottle'/'train'/'good').mkdir(parents=True)    # a category without a single image
    refused(['reproduce', 'table4_mvtec', '--data', tmp_path/'sets', '--out', tmp_path/'o'], tmp_path/'sets'/'bottle')

def test_a_category_without_anomalies_of_a_kind_says_so(monkeypatch, tmp_path):
    toy = tray()
    (tmp_path/'pushpins').mkdir()
    home = toy.train[0].path.parents[2]
    for part in ('train', 'validation', 'defects_config.json'): (tmp_path/'pushpins'/part).symlink_to(home/part)
    for part in ('test/good', 'test/logical_anomalies', 'ground_truth/logical_anomalies'):
        (tmp_path/'pushpins'/part).parent.mkdir(exist_ok=True)
        (tmp_path/'pushpins'/part).symlink_to(home/part)
    monkeypatch.setenv('PRADOT_DATA', str(tmp_path))
    assert 'pushpins, with a few images and steps. It has no structural anomalies. Not run' in figures.cases()[0].note

def test_missing_nbclient_is_one_sentence(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nbclient', None)
    refused(['reproduce', 'fig4', '--out', tmp_path/'o'], "pip install 'pradot[notebooks]'")

def test_an_interrupted_page_says_that_nothing_was_written(run, tmp_path, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(pages, 'execute', stop)
    assert run('reproduce', 'fig4', '--out', tmp_path/'o') == (130, '', 'pradot reproduce: stopped; nothing was written\n')
    assert not (tmp_path/'o').exists()
