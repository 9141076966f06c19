"Many images and many models: features in a mapped file, folders that change, all categories in one command."
import gc
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pradot import data, features
from pradot.data import InputError
from pradot.detector import LIGHT, Pradot
from pradot.experiment import categories_of, fit_all
from pradot.features import Backbone, extract
from pradot.toy import tray

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
SMALL = replace(LIGHT, image_size=64, n=1, batch_size=4, epochs=2, iterations=5)
WORDS = '--preset light --image-size 64 --n 1 --batch-size 4 --epochs 1 --iterations 5 --device cpu'.split()

@pytest.fixture(scope='module')
def small(): return Backbone('small')

@pytest.fixture
def pictures(tmp_path):
    "Eleven images in a folder"
    (tmp_path/'in').mkdir()
    for i in range(11):
        a = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(a).save(tmp_path/'in'/f'{i:03d}.png')
    return sorted((tmp_path/'in').iterdir())

# Features

def test_mapped_as_in_memory(small, pictures, tmp_path):
    inside = extract(small, pictures, (64, 64), 4, False)
    outside = extract(small, pictures, (64, 64), 4, False, ram=0, folder=tmp_path/'big')
    assert all(torch.equal(inside[l], outside[l]) for l in inside)
    assert list((tmp_path/'big').iterdir()) == []                  # the file has no name

@pytest.mark.parametrize('more', [{}, dict(held_out=0.2), dict(solver='stream', warm=True)])
def test_the_same_model(pictures, tmp_path, more):
    a, b, c = (Pradot(replace(SMALL, **more), 'cpu').fit(pictures, False, **k)
               for k in ({}, dict(ram=0, parts=tmp_path/'parts'), dict(ram=0, cache=tmp_path/'cache')))
    for m in (b, c):
        assert all(torch.equal(p, m.prototypes[k]) for k, p in a.prototypes.items())
        assert a.history == m.history and a.reference == m.reference
    assert not [p for p in (tmp_path/'parts').iterdir() if p.name[0] != '.' and p.suffix != '.safetensors']

@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='needs /proc')
def test_the_file_goes_with_the_features(small, pictures, tmp_path):
    def maps(): return sum(str(tmp_path/'big') in l for l in Path('/proc/self/maps').read_text().splitlines())
    Z = extract(small, pictures, (64, 64), 4, False, ram=0, folder=tmp_path/'big')
    assert maps() == 2
    del Z; gc.collect()
    assert maps() == 0

def test_the_limit_is_what_it_says(small, pictures, tmp_path):
    need = 11*(8*8*128 + 4*4*256)*4/2**30
    for ram, there in ((need*1.001, False), (need*0.999, True)):
        extract(small, pictures, (64, 64), 4, False, ram=ram, folder=tmp_path/f'{there}')
        assert (tmp_path/f'{there}').exists() == there

def test_no_room_on_the_disk(small, pictures, tmp_path, monkeypatch):
    "Known after the first batch, with how much is needed, how much there is, and where"
    seen, read = [], data.read_image
    monkeypatch.setattr(features.shutil, 'disk_usage', lambda p: SimpleNamespace(free=2**18))
    monkeypatch.setattr(features, 'read_image', lambda p: seen.append(p) or read(p))
    for how in (dict(folder=tmp_path/'big'), dict(cache=tmp_path/'big')):
        with pytest.raises(InputError, match=r'of 11 images need 0.000504 GiB in .*big, where 0.000244 GiB are free .*; make room there') as e:
            extract(small, pictures, (64, 64), 2, False, ram=0, **how)
        assert '\n' not in str(e.value) and len(seen) <= 6
        assert not [p for p in (tmp_path/'big').iterdir() if p.suffix != '.lock']
        seen.clear()
    with pytest.warns(UserWarning, match='they stay in memory'):   # small enough for that
        Z = extract(small, pictures, (64, 64), 2, False, cache=tmp_path/'big')
    assert len(Z[2]) == 11

def test_images_are_read_when_they_are_needed(small, tmp_path, pictures, monkeypatch):
    "Never more pictures at a time than two batches and what is being read"
    alive, most, read = [], [0], data.read_image
    def counted(path):
        im = read(path)
        alive.append(weakref.ref(im))
        most[0] = max(most[0], sum(r() is not None for r in alive))
        return im
    monkeypatch.setattr(features, 'read_image', counted)
    extract(small, pictures*8, (64, 64), 2, False, ram=0, folder=tmp_path/'big')
    assert 0 < most[0] <= 6

# Folders that are read-only, or change

def test_nothing_is_written_into_the_images_folder(pictures, tmp_path):
    folder = pictures[0].parent
    for p in pictures: p.chmod(0o444)
    folder.chmod(0o555)
    before = {p: p.stat().st_mtime_ns for p in (folder, *folder.rglob('*'))}
    try: Pradot(SMALL, 'cpu').fit(pictures, False, cache=tmp_path/'cache', ram=0)
    finally: folder.chmod(0o755)
    assert {p: p.stat().st_mtime_ns for p in (folder, *folder.rglob('*'))} == before

def meddled(monkeypatch, pictures, do, at):
    "Do something with the last picture once `at` were read"
    seen, read = [], data.read_image
    def meddling(path):
        seen.append(path)
        if len(seen) == at: do(pictures[-1])
        return read(path)
    monkeypatch.setattr(features, 'read_image', meddling)

@pytest.mark.parametrize('how', [{}, dict(ram=0), 'cache'])
def test_an_image_that_vanishes(pictures, tmp_path, monkeypatch, how):
    meddled(monkeypatch, pictures, Path.unlink, 3)
    with pytest.raises(InputError, match=r'010\.png (does not exist|was changed or removed)') as e:
        Pradot(SMALL, 'cpu').fit(pictures, False, **(dict(cache=tmp_path/'cache') if how == 'cache' else how))
    assert '\n' not in str(e.value)
    assert not list(tmp_path.rglob('features-*')) and not list(tmp_path.rglob('prototypes-*'))

def test_an_image_that_is_replaced(pictures, tmp_path, monkeypatch):
    "Its features would be kept under the digest of another"
    meddled(monkeypatch, pictures, lambda p: shutil.copy(pictures[0], p), 3)
    with pytest.raises(InputError, match=r'010\.png was changed or removed while the images were read; start again'):
        Pradot(SMALL, 'cpu').fit(pictures, False, cache=tmp_path/'cache')
    assert not list((tmp_path/'cache').glob('features-*')) and not list((tmp_path/'cache').glob('prototypes-*'))

def test_an_image_that_vanishes_after_it_was_read(pictures, monkeypatch):
    meddled(monkeypatch, pictures, lambda p: pictures[0].unlink(), 9)
    with pytest.raises(InputError, match=r'000\.png (was changed or removed|does not exist)'): Pradot(SMALL, 'cpu').fit(pictures, False)

def test_an_image_that_comes_in_between_is_left_out(pictures, monkeypatch):
    meddled(monkeypatch, pictures, lambda p: shutil.copy(p, p.with_name('new.png')), 3)
    assert Pradot(SMALL, 'cpu').fit(pictures, False).prototypes

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_an_image_that_may_not_be_read(pictures):
    pictures[4].chmod(0)
    with pytest.raises(InputError, match=r'004\.png cannot be read'): Pradot(SMALL, 'cpu').fit(pictures, False)

# All categories

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Three categories of eight images, the second damaged"
    toy, root = tray(size=(96, 96), train=8, validation=2, good=2, logical=2, structural=2), tmp_path_factory.mktemp('data')
    for c in ('cup', 'lid', 'pot'): shutil.copytree(toy.train[0].path.parents[2], root/c)
    shutil.rmtree(root/'lid'/'ground_truth')
    (root/'notes').mkdir()
    return root

def words(root, out, category='all', *more):
    return ['fit', '--dataset', 'mvtec_loco', '--data', root, '--category', category, '--out', out, *WORDS, *more]

def test_all_categories_in_one_command(run, root, tmp_path):
    status, out, err = run(*words(root, tmp_path/'m'))
    assert status == 1 and err.splitlines()[-1].startswith('pradot fit: lid failed: ') and 'has no mask' in err
    assert [l.split()[0] for l in out.splitlines()[1:]] == ['cup', 'pot', 'mean'] and 'AU-sPRO' in out
    assert sorted(p.name for p in (tmp_path/'m').glob('*.safetensors')) == ['cup.safetensors', 'pot.safetensors']
    assert not list((tmp_path/'m').glob('cache/*'))
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path/'m').glob('*.safetensors')}
    (tmp_path/'m'/'pot.safetensors').unlink()                      # its row alone is not enough
    assert run(*words(root, tmp_path/'m', 'cup,pot'))[0] == 0
    assert (tmp_path/'m'/'pot.safetensors').exists()
    assert (tmp_path/'m'/'cup.safetensors').stat().st_mtime_ns == stamps[tmp_path/'m'/'cup.safetensors']
    status, judged, err = run('evaluate', tmp_path/'m', '--dataset', 'mvtec_loco', '--data', root, '--category', 'all', '--out', tmp_path/'m.json',
                              '--device', 'cpu')
    assert status == 1 and 'lid failed' in err and [l.split()[0] for l in judged.splitlines()[1:]] == ['cup', 'pot', 'mean']
    assert [l.split()[:4] for l in judged.splitlines()[1:3]] == [l.split()[:4] for l in out.splitlines()[1:3]]

def test_each_model_is_that_of_its_own_command(run, root, tmp_path):
    assert run(*words(root, tmp_path/'m', 'cup,pot'))[0] == 0
    assert run(*words(root, tmp_path/'cup.safetensors', 'cup', '--ram', 0))[0] == 0
    a, b = Pradot.load(tmp_path/'m'/'cup.safetensors', 'cpu'), Pradot.load(tmp_path/'cup.safetensors', 'cpu')
    assert all(torch.equal(p, b.prototypes[k]) for k, p in a.prototypes.items()) and a.reference == b.reference

def test_stopped_between_two_categories(root, tmp_path, monkeypatch):
    from pradot import experiment
    plain, done = experiment.measure, []
    def once(run, *rest):
        if done: raise KeyboardInterrupt
        done.append(run.category)
        return plain(run, *rest)
    monkeypatch.setattr(experiment, 'measure', once)
    with pytest.raises(KeyboardInterrupt): fit_all('mvtec_loco', root, tmp_path/'m', SMALL, ['cup', 'pot'], 'cpu', False)
    def second(run, *rest): done.append(run.category); return plain(run, *rest)
    monkeypatch.setattr(experiment, 'measure', second)
    rows = fit_all('mvtec_loco', root, tmp_path/'m', SMALL, ['cup', 'pot'], 'cpu', False)
    assert done == ['cup', 'pot'] and [r['category'] for r in rows] == done

def test_a_folder_of_models_has_one_setting(run, root, tmp_path):
    assert run(*words(root, tmp_path/'m', 'cup,'))[0] == 0
    status, out, err = run(*words(root, tmp_path/'m', 'pot,', '--seed', 1))
    assert status == 1 and err.count('\n') == 1 and 'models of other settings' in err and not (tmp_path/'m'/'pot.safetensors').exists()

def test_folders_of_good_images_alone(root, tmp_path):
    for c in ('a b', 'ü'): shutil.copytree(root/'cup'/'train'/'good', tmp_path/'in'/c)
    rows = fit_all('folder', tmp_path/'in', tmp_path/'m', SMALL, None, 'cpu', False)
    assert [(r['category'], r['metrics']) for r in rows] == [('a b', {}), ('ü', {})]
    assert sorted(p.stem for p in (tmp_path/'m').glob('*.safetensors')) == ['a b', 'ü']

def test_what_cannot_be_all(refused, root, tmp_path):
    refused(words(root, tmp_path/'m', 'cup,lip'), "has no category 'lip'; it has cup, lid, pot")
    refused(words(root/'notes', tmp_path/'m'), 'holds no category')
    refused(words(root, tmp_path/'m', 'all', '--ram', 1), 'are for one category')
    refused(words(root, tmp_path/'m', 'all', '--calibrate', 0.3), 'are for one category')
    refused(['evaluate', tmp_path/'m', '--dataset', 'mvtec_loco', '--data', root, '--category', 'all'], 'is not a folder')
    with pytest.raises(InputError, match='is not a folder'): categories_of('folder', tmp_path/'none')
