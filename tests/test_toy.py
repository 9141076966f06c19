"The toy set: determinism, layout, masks, config, concurrency, interruption, bad input"
import hashlib, json, os, subprocess, sys
import numpy as np
import pytest
from PIL import Image
from pradot import toy
from pradot.data import InputError, mvtec_loco
from pradot.toy import DEFECTS, LOGICAL, SPLITS, STRUCTURAL, config, kinds_of, part_area, scene, tray

FEW = dict(size=(72, 96), train=3, validation=2, good=2, logical=5, structural=5)

def files(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha1(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob('*')) if p.is_file()}

def grown(mask, n):
    for _ in range(n):
        p = np.pad(mask, 1)
        mask = p[1:-1, 1:-1] | p[:-2, 1:-1] | p[2:, 1:-1] | p[1:-1, :-2] | p[1:-1, 2:]
    return mask

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('toy')
    return root, tray(root, **FEW)

def test_layout_is_that_of_loco(made):
    root, cat = made
    for path in files(root): assert path.startswith('tray/')
    have = {p for p in files(root/'tray') if not p.startswith('ground_truth')}
    want = {'defects_config.json', 'toy.json'}
    for split, n in zip(SPLITS, (3, 2, 2, 5, 5)): want |= {f'{split}/{i:03d}.png' for i in range(n)}
    assert have == want
    assert cat == mvtec_loco(root, 'tray')
    assert [len(cat.train), len(cat.validation), len(cat.test)] == [3, 2, 12]
    assert {r.kind for r in cat.test} == {'good', 'logical_anomalies', 'structural_anomalies'}
    for r in cat.test:
        assert r.size == (72, 96) and r.image().mode == 'RGB'
        assert [m.name for m in r.masks] == [f'{j:03d}.png' for j in range(len(r.masks))]
        if r.anomalous: assert r.masks[0].parent == root/'tray'/'ground_truth'/r.kind/r.path.stem

def test_masks_hold_one_listed_value_and_are_not_empty(made):
    root, cat = made
    entries = {e['pixel_value']: e for e in json.loads((root/'tray'/'defects_config.json').read_text())}
    for r in cat.test:
        split = f'test/{r.kind}'
        names = kinds_of(split, int(r.path.stem), 0)
        assert len(names) == len(r.masks)
        for name, m in zip(names, r.masks):
            im = Image.open(m)
            values = np.unique(np.asarray(im))
            assert im.mode == 'L' and len(values) == 2 and values[0] == 0
            assert entries[int(values[1])]['defect_name'] == name
    assert {len(r.masks) for r in cat.test if r.anomalous} == {1, 2}

def test_config_is_complete():
    entries = config((128, 128))
    assert [e['defect_name'] for e in entries] == list(DEFECTS) == [*LOGICAL, *STRUCTURAL]
    assert len({e['pixel_value'] for e in entries}) == len(entries) and all(0 < e['pixel_value'] < 256 for e in entries)
    assert {e['relative_saturation'] for e in entries} == {True, False}
    for e in entries:
        if e['relative_saturation']: assert 0 < e['saturation_threshold'] <= 1
        else: assert isinstance(e['saturation_threshold'], int) and 0 < e['saturation_threshold'] < 128*128

@pytest.mark.parametrize('size', [(128, 128), (192, 320), (320, 192)])
def test_absolute_saturation_fits_in_the_masks(size):
    for e in config(size):
        if e['relative_saturation']: continue
        mask = scene(4, e['defect_name'], size)[1][e['defect_name']]
        assert mask.sum() > .97*e['saturation_threshold'], e

def test_two_runs_give_the_same_bytes(made, tmp_path):
    tray(tmp_path, **FEW)
    assert files(tmp_path) == files(made[0])

def test_counts_do_not_change_other_images(made, tmp_path):
    tray(tmp_path, **{**FEW, 'train': 1, 'logical': 2})
    old, new = files(made[0]), files(tmp_path)
    assert all(old[p] == h for p, h in new.items() if p.endswith('.png'))

def test_seeds_and_images_differ(made, tmp_path):
    tray(tmp_path, seed=1, **FEW)
    both = [*files(made[0]).items(), *files(tmp_path).items()]
    pngs = [h for p, h in both if p.endswith('.png') and 'truth' not in p]
    assert len(set(pngs)) == len(pngs)

def test_no_global_random_state_is_touched():
    np.random.seed(5); a = np.random.get_state()[1].copy()
    scene(0, 'crack', (64, 64))
    assert (np.random.get_state()[1] == a).all()

@pytest.mark.parametrize('kind', STRUCTURAL)
@pytest.mark.parametrize('seed', range(8))
def test_structural_defects_change_what_they_mark(kind, seed):
    image, masks = scene(seed, kind, (160, 160))
    changed = np.abs(image.astype(int) - scene(seed, size=(160, 160))[0]).max(-1) > 2
    mask = masks[kind]
    assert mask.sum() >= 4
    assert (mask & changed).sum() > .6*mask.sum()
    assert not (changed & ~grown(mask, 14 if kind == 'chip' else 2)).any()

@pytest.mark.parametrize('kind', LOGICAL)
def test_logical_defects_change_what_they_mark(kind):
    for seed in range(3):
        image, masks = scene(seed, kind, (128, 160))
        changed = np.abs(image.astype(int) - scene(seed, size=(128, 160))[0]).max(-1) > 12
        assert (masks[kind] & changed).any() and masks[kind].mean() < .2

def test_two_defects_are_two_masks():
    _, masks = scene(2, ('missing_gear', 'stain'), (64, 64))
    assert list(masks) == ['missing_gear', 'stain']
    for split in SPLITS[3:]:
        for i in range(60):
            names = kinds_of(split, i, 7)
            assert len(names) == len(set(names)) == (2 if i % 4 == 3 else 1)
            scene(0, names, (64, 64))                         # never refused

def test_a_finished_set_is_reused(made):
    root, _ = made
    before = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
    tray(root, **FEW)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob('*')}

def test_cache_folder_honours_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    a, b = tray(**FEW), tray(**{**FEW, 'good': 1})
    assert a.train[0].path.is_relative_to(tmp_path/'pradot'/'toy') and a.train[0].path != b.train[0].path

def test_two_processes_at_once(tmp_path):
    code = f'from pradot.toy import tray; tray({str(tmp_path/"both")!r}, **{FEW!r})'
    env = dict(os.environ, OMP_NUM_THREADS='1')
    ps = [subprocess.Popen([sys.executable, '-c', code], env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [p.communicate()[1] for p in ps]
    assert [p.returncode for p in ps] == [0, 0], errors
    assert [p.name for p in (tmp_path/'both').iterdir()] == ['tray']       # no temporary folder is left
    tray(tmp_path/'alone', **FEW)
    assert files(tmp_path/'both') == files(tmp_path/'alone')

def test_a_slower_process_takes_the_faster_ones_set(tmp_path, monkeypatch):
    write = toy._write
    def late(home, *args):
        write(home, *args)
        monkeypatch.setattr(toy, '_write', write)
        tray(tmp_path, **FEW)                                             # meanwhile somebody else finishes
    monkeypatch.setattr(toy, '_write', late)
    assert len(tray(tmp_path, **FEW).train) == 3
    assert [p.name for p in tmp_path.iterdir()] == ['tray']

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch, error):
    draw, calls = toy.scene, []
    def scene(*args):
        calls.append(args)
        if len(calls) == 9: raise error
        return draw(*args)
    monkeypatch.setattr(toy, 'scene', scene)
    with pytest.raises(error): tray(tmp_path, **FEW)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(tray(tmp_path, **FEW).train) == 3

def test_a_killed_process_leaves_nothing_usable(tmp_path):
    code = ('import os; from pradot import toy; draw, n = toy.scene, []\n'
            'def scene(*a):\n    n.append(1)\n    if len(n) == 9: os._exit(9)\n    return draw(*a)\n'
            f'toy.scene = scene; toy.tray({str(tmp_path)!r}, **{FEW!r})')
    assert subprocess.run([sys.executable, '-c', code]).returncode == 9
    assert not (tmp_path/'tray').exists()
    assert len(tray(tmp_path, **FEW).train) == 3

def test_a_damaged_or_foreign_folder_is_refused_and_kept(tmp_path):
    tray(tmp_path, **FEW)
    (tmp_path/'tray'/'test'/'good'/'001.png').unlink()
    before = files(tmp_path)
    with pytest.raises(InputError, match='has lost images'): tray(tmp_path, **FEW)
    with pytest.raises(InputError, match='already holds something else'): tray(tmp_path, **{**FEW, 'seed': 3})
    (tmp_path/'tray'/'toy.json').write_text('{')
    with pytest.raises(InputError, match='already holds something else'): tray(tmp_path, **FEW)
    after = files(tmp_path)
    assert set(after) == set(before) and {p for p in after if after[p] != before[p]} == {'tray/toy.json'}

@pytest.mark.parametrize('bad, match', [
    (dict(train=0), 'at least 1'), (dict(good=-1), 'at least 0'), (dict(logical=2.5), 'whole number'),
    (dict(structural=True), 'whole number'),
    (dict(seed=-1), 'seed'), (dict(seed='x'), 'seed'), (dict(seed=(1, 2)), 'seed'), (dict(seed=[]), 'seed'),
    (dict(size=256), 'size'), (dict(size=(32, 32)), '64'), (dict(size=(64, 200)), 'twice'),
    (dict(size=(64, 64, 3)), 'size'),
    (dict(size=(9000, 9000)), '4096'), (dict(size=(100.5, 100)), 'size')])
def test_bad_parameters_are_refused_in_one_sentence(tmp_path, bad, match):
    with pytest.raises(InputError, match=match) as e: tray(tmp_path/'new', **{**FEW, **bad})
    assert '\n' not in str(e.value) and not (tmp_path/'new').exists()

def test_bad_scenes_and_roots(tmp_path):
    with pytest.raises(InputError, match='there is no defect'): scene(0, 'melted')
    with pytest.raises(InputError, match='there is no defect'): scene(0, 3)
    with pytest.raises(InputError, match='same compartment'): scene(0, ('missing_gear', 'missing_gear'))
    with pytest.raises(InputError, match='same compartment'): scene(0, ('extra_screw', 'mismatched_plate'))
    (tmp_path/'file').write_text('x')
    with pytest.raises(InputError, match='cannot be written'): tray(tmp_path/'file', **FEW)

def test_sets_without_some_splits(tmp_path):
    cat = tray(tmp_path, **{**FEW, 'validation': 0, 'good': 0, 'logical': 0})
    assert (len(cat.validation), {r.kind for r in cat.test}) == (0, {'structural_anomalies'})

def test_part_areas_match_the_picture():
    assert part_area('marble', (256, 256)) == pytest.approx(np.pi*(toy.MARBLE*256)**2, rel=.02)
    mask = scene(1, 'missing_plate')[1]['missing_plate']
    assert mask.sum() == pytest.approx(part_area('plate', (256, 256)), rel=.03)
