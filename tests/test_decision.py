"Decisions: the false-alarm rate asked for is the rate got, p-values, regions, the file that keeps them, the commands."
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import ndimage

from pradot.data import InputError
from pradot.decision import Calibration, regions, verdict
from pradot.detector import LIGHT, Pradot
from pradot.toy import tray

QUICK = dict(image_size=64, n=1, batch_size=8, epochs=1, stages=(2,))

@pytest.fixture(scope='module')
def toy(): return tray(size=(96, 96), train=16, validation=60, good=8, logical=8, structural=8)

@pytest.fixture(scope='module')
def fitted(toy, tmp_path_factory):
    "A model file without a calibration, and the scores of good images that it has not learnt from"
    path = tmp_path_factory.mktemp('decision')/'m.safetensors'
    with pytest.warns(UserWarning): model = Pradot(LIGHT, 'cpu', **QUICK).fit(toy.train)
    model.save(path)
    return path, model.predict(toy.validation).scores

def within(n, seeds, q): return abs(n - seeds*q) <= 4*math.sqrt(seeds*q*(1 - q))

# --- the rate

@pytest.mark.parametrize('m, rate', [(19, .05), (25, .1), (99, .01), (99, .07), (40, .5)])
def test_the_rate_asked_for_is_got(m, rate):
    s = np.random.default_rng(m).lognormal(size=(4000, m + 1))
    n = sum(row[0] > Calibration(row[1:]).threshold(rate) for row in s)
    assert within(n, len(s), math.floor(rate*(m + 1) + 1e-9)/(m + 1))

def test_equal_scores_never_raise_the_rate():
    s = np.random.default_rng(0).integers(0, 6, (4000, 20))
    n = sum(row[0] > Calibration(row[1:]).threshold(.2) for row in s)
    assert 0 < n <= 4000*.2 + 4*math.sqrt(4000*.2*.8)
    same = Calibration(np.ones(30))
    assert same.p(1.) == 1 and same.p(1.001) == 1/31 and not 1. > same.threshold(.05)

def test_the_rate_on_the_toy_set_over_many_seeds(fitted):
    scores, m, seeds = fitted[1], 39, 2000
    assert len(set(scores)) == len(scores) == 60
    for rate in (.05, .1, .3):
        n = 0
        for seed in range(seeds):
            s = np.random.default_rng(seed).permutation(scores)
            n += s[m] > Calibration(s[:m]).threshold(rate)
        assert within(n, seeds, math.floor(rate*(m + 1) + 1e-9)/(m + 1))

def test_a_rate_per_pixel_is_not_kept_by_images_but_a_region_is():
    "Noise without defects: at one pixel in a hundred, nearly all images have a region; by the maxima, as many as asked"
    maps = np.random.default_rng(0).normal(size=(600, 16, 16))
    c = Calibration(maps[:199].max((1, 2)))
    pixelwise = np.quantile(maps[:199], .99)
    assert np.mean([bool(regions(a, pixelwise)) for a in maps[199:]]) > .8
    n = sum(any(r.p <= .1 for r in regions(a, pixelwise, c)) for a in maps[199:])
    low, high = c.interval(.1, .9999)
    assert 401*low - 20 < n < 401*high + 20

def test_the_two_ways_to_decide_are_one():
    rng = np.random.default_rng(1)
    for m in (1, 3, 19, 50):
        for s in (rng.normal(size=m), rng.integers(0, 4, m)):
            c, new = Calibration(s), np.concatenate([s, s + .5, [-9, 9]])
            for k in range(1, m + 1): assert ((new > c.threshold(k/(m + 1))) == (c.p(new) <= k/(m + 1) + 1e-12)).all()

def test_p_by_brute_force():
    rng = np.random.default_rng(2)
    s, new = rng.integers(0, 9, 31), rng.integers(-1, 11, 50)
    assert Calibration(s).p(new).tolist() == [(1 + sum(x >= v for x in s))/32 for v in new]
    assert Calibration(s).p(float('nan')) == 1/32                                   # no number is not normal

def test_the_interval_holds_the_rates_of_calibrations():
    c = Calibration(np.arange(59.))
    low, high = c.interval(.1)
    rates = [1 - Calibration(np.random.default_rng(i).uniform(size=59)).threshold(.1) for i in range(1500)]
    assert within(sum(low <= r <= high for r in rates), 1500, .9)

# --- what is refused

@pytest.mark.parametrize('m, rate, says', [
    (4, .1, 'needs at least 9 held-out normal images; with 4 the smallest possible is 0.2 (1/5)'),
    (98, .01, 'needs at least 99'), (19, .049, 'needs at least 20'), (5, 0, 'between 0 and 1'), (5, 1, 'between 0 and 1'),
    (5, -1, 'between 0 and 1'), (5, math.nan, 'between 0 and 1')])
def test_rates_that_cannot_be_kept(m, rate, says):
    with pytest.raises(InputError) as e: Calibration(np.arange(m)).threshold(rate)
    assert says in str(e.value)

@pytest.mark.parametrize('m', [1, 3, 7, 19, 98, 333])
def test_the_rate_that_is_named_works(m):
    c = Calibration(np.arange(m))
    with pytest.raises(InputError) as e: c.threshold(1e-6)
    named = float(str(e.value).split('possible is ')[1].split(' ')[0])
    assert c.threshold(named) == m - 1
    assert c.threshold(1 - 1e-12) == 0

def test_scores_that_are_none():
    for bad in ([], [.1, math.nan], [math.inf]):
        with pytest.raises(InputError): Calibration(bad)

# --- regions

def test_regions_by_scipy():
    rng = np.random.default_rng(3)
    for _ in range(20):
        a = ndimage.gaussian_filter(rng.normal(size=(23, 31)), 1.5)
        t, c = np.quantile(a, .8), Calibration(rng.normal(size=9)*.1)
        found, (labels, n) = regions(a, t, c), ndimage.label(a > t, np.ones((3, 3)))
        assert len(found) == n and sum(r.area for r in found) == (a > t).sum()
        assert [r.peak for r in found] == sorted((r.peak for r in found), reverse=True)
        for r in found:
            top, left, below, right = r.box
            here = labels == labels[np.unravel_index(np.where(a == r.peak, 1, 0).argmax(), a.shape)]
            y, x = np.nonzero(here)
            assert (here.sum(), y.min(), x.min(), y.max() + 1, x.max() + 1) == (r.area, top, left, below, right)
            assert np.allclose(r.centre, (y.mean(), x.mean())) and r.p == c.p(r.peak)

def test_an_image_is_anomalous_where_it_has_a_region():
    rng = np.random.default_rng(4)
    c = Calibration(rng.normal(size=(99, 8, 8)).astype(np.float32).max((1, 2)))
    for _ in range(300):
        a = rng.normal(size=(8, 8)).astype(np.float32)
        v = verdict(a, c, .1)
        assert v['anomalous'] == bool(v['regions']) == (v['p'] <= .1 + 1e-12)
        assert not v['regions'] or v['regions'][0].p == v['p']

# --- the model and its file

def test_a_calibration_is_kept_with_the_model(fitted, toy, tmp_path):
    model = Pradot.load(fitted[0], 'cpu')
    assert model.calibration is None and model.scale == model.reference                   # a file as it was before
    model.calibrate(toy.validation).save(tmp_path/'c.safetensors')
    again = Pradot.load(tmp_path/'c.safetensors', 'cpu')
    assert (again.calibration.scores == np.sort(fitted[1])).all() and again.scale == model.calibration.reference
    whole = bytearray((tmp_path/'c.safetensors').read_bytes())
    at = whole.find(again.calibration.scores.tobytes())
    assert at > 0
    whole[at + 9] ^= 1
    (tmp_path/'c.safetensors').write_bytes(whole)
    with pytest.raises(InputError, match='damaged'): Pradot.load(tmp_path/'c.safetensors')
    with pytest.raises(InputError, match='no image to calibrate'): model.calibrate([])
    with pytest.warns(UserWarning): assert model.fit(toy.train).calibration is None

# --- commands

def test_commands(fitted, toy, run, tmp_path):
    root = toy.train[0].path.parents[2]
    status, out, err = run('predict', fitted[0], root/'test'/'good', '--out', 'plain', '--device', 'cpu')
    assert status == 0 and 'not calibrated' in err and err.count('\n') == 1
    assert list(pd.read_csv('plain/scores.csv')) == ['image', 'score', 'map', 'overlay']
    assert json.load(open('plain/scores.json'))['calibration'] is None
    status, out, err = run('calibrate', fitted[0], root/'validation', '--out', 'c.safetensors', '--device', 'cpu')
    assert (status, err) == (0, '') and '60 images' in out and '1/61' in out
    assert Pradot.load(fitted[0], 'cpu').calibration is None                              # --out leaves the model alone
    status, out, err = run('predict', 'c.safetensors', root/'test', '--rate', '.3', '--out', 'out', '--device', 'cpu')
    assert (status, err) == (0, '')
    table, found = pd.read_csv('out/scores.csv'), json.load(open('out/scores.json'))
    c = Pradot.load('c.safetensors', 'cpu').calibration
    assert (table.anomalous == (table.score > c.threshold(.3))).all() and 0 < table.anomalous.sum() < len(table)
    assert np.allclose(table.p, c.p(table.score)) and found['calibration']['images'] == 60
    for row, image in zip(table.itertuples(), found['images']):
        assert row.regions == len(image['regions']) and row.anomalous == image['anomalous'] == bool(image['regions'])
        assert all(set(r) == {'area', 'box', 'centre', 'peak', 'p'} for r in image['regions'])

def test_fit_holds_back_and_calibrates(toy, run):
    root = toy.train[0].path.parents[3]
    status, out, err = run('fit', '--dataset', 'mvtec_loco', '--data', root, '--category', 'tray', '--preset', 'light', '--image-size', 64,
                           '--n', 1, '--epochs', 1, '--stages', 2, '--calibrate', '.25', '--out', 'm.safetensors', '--device', 'cpu')
    assert status == 0 and '12 images' in out and 'calibrated with 4 others' in out
    assert len(Pradot.load('m.safetensors', 'cpu').calibration.scores) == 4

def test_what_commands_refuse(fitted, toy, refused, run, tmp_path):
    good = toy.validation[0].path
    copy = tmp_path/'zwei mal\n.png'
    Image.open(good).save(copy)
    text = tmp_path/'text.png'
    text.write_text('no image')
    refused(('calibrate', fitted[0], good, copy, '--out', 'x.safetensors'), 'are the same picture')
    refused(('calibrate', fitted[0], good, text, '--out', 'x.safetensors'), 'text.png cannot be read')
    refused(('calibrate', fitted[0], tmp_path/'gone.png'), 'gone.png does not exist')
    refused(('predict', fitted[0], good, '--rate', '.1', '--out', 'x'), 'not calibrated')
    refused(('predict', fitted[0], good, '--normal', good, '--out', 'x'), 'add --report')
    refused(('predict', fitted[0], good, '--rate', 'few', '--out', 'x'), 'invalid float', status=2)
    assert run('calibrate', fitted[0], *[r.path for r in toy.validation[:9]], '--out', 'nine.safetensors')[0] == 0
    refused(('predict', 'nine.safetensors', good, '--out', 'x'), '0.05 needs at least 19', 'with 9 the smallest possible is 0.1')
    refused(('predict', 'nine.safetensors', good, '--rate', '2', '--out', 'x'), 'between 0 and 1')
