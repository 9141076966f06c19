"Real images and real weights, where the folder `shared` is; skipped by name elsewhere"
from dataclasses import replace
import numpy as np
import pytest, torch
from pradot.data import mvtec_ad, mvtec_loco
from pradot.detector import Pradot
from pradot.experiment import evaluate
from pradot.features import Backbone, extract, read_weights
from pradot.metrics import image_auroc

def weights(shared, name): return shared/'weights'/f'{name}_imagenet_to_layer3.safetensors'

@pytest.fixture(scope='module')
def bottle(shared): return mvtec_ad(shared/'mvtec_ad', 'bottle')

@pytest.fixture(scope='module')
def juice(shared): return mvtec_loco(shared/'mvtec_loco', 'juice_bottle')

def test_bottle(bottle):
    assert (len(bottle.train), len(bottle.validation), len(bottle.test)) == (209, 0, 83)
    assert bottle.kinds == ('broken_large', 'broken_small', 'contamination')
    assert sum(r.anomalous for r in bottle.test) == 63
    assert [r.path.name for r in bottle.train[:3]] == ['000.png', '001.png', '002.png'] and bottle.defects == ()
    for r in bottle.test:
        assert r.size == (360, 360) and len(r.masks) == r.anomalous
        if r.anomalous: assert 0 < r.mask().mean() < 0.5 and r.mask().dtype == bool

def test_juice_bottle(juice):
    assert (len(juice.train), len(juice.validation), len(juice.test)) == (335, 27, 169)
    assert juice.kinds == ('logical_anomalies',) and sum(r.anomalous for r in juice.test) == 142
    assert juice.defects and all(0 < d.value < 256 and d.threshold > 0 for d in juice.defects)
    for r in juice.test[::10]:
        assert r.size == r.image().size[::-1] == (480, 240) and (len(r.masks) == 1) == r.anomalous
        if r.anomalous: assert r.channels().shape == (1, 480, 240) and r.mask().any()

@pytest.mark.parametrize('name, dims', [('resnet50', (512, 1024)), ('resnet18', (128, 256))])
def test_weights_load_whole_and_see(shared, bottle, name, dims):
    path = weights(shared, name)
    b = Backbone(name, path)                                         # a missing or surplus key would raise
    stored = read_weights(path)
    for k, v in b.net.state_dict().items():
        if not k.endswith('num_batches_tracked'): assert torch.equal(v, stored[k].float()), k
    two = bottle.train[:2]
    Z = extract(b, two, (128, 160), progress=False)
    for l, D in zip((2, 3), dims):
        z = Z[l]                                                     # (2, H, W, D)
        assert z.shape == (2, 128//2**(l + 1), 160//2**(l + 1), D) and z.isfinite().all() and z.std() > 0
        assert (z.std((0, 1, 2)) > 0).float().mean() > 0.9           # few channels are dead
        u = torch.nn.functional.normalize(z, dim=-1).flatten(1, 2)
        same, all_ = (u[0]*u[1]).sum(-1), u[0] @ u[1].T
        assert same.mean() > all_.mean() + 0.1                       # the same place of two bottles looks alike
    other = extract(Backbone(name, 'random'), two, (128, 160), progress=False)
    assert not torch.allclose(other[2], Z[2], atol=0.1)

@pytest.mark.filterwarnings('ignore:in \\d+ of')
def test_a_small_fit_tells_broken_bottles_from_whole_ones(shared, bottle):
    m = Pradot(backbone='resnet18', weights=str(weights(shared, 'resnet18')), image_size=112, n=1, batch_size=12,
        epochs=8, eta=0.8, iterations=20, device='cpu')
    m.fit(bottle.train[:24], progress=False)
    good, bad = ([r for r in bottle.test if r.anomalous == yes] for yes in (False, True))
    some = [*good[::2], *bad[::6]][:21]
    pred = m.predict(some, progress=False)
    y = np.array([r.anomalous for r in some])
    assert pred.maps.shape == (21, 360, 360) and image_auroc(pred.scores, y) > 0.9
    hit = [np.median(p[r.mask()]) > np.median(p[~r.mask()]) for r, p in zip(some, pred.maps) if r.anomalous]
    assert np.mean(hit) > 0.8                                        # maps are higher on the defect
    losses = [h['loss'] for h in m.history[3, 0.3]]
    assert losses[-1] < losses[0]

@pytest.mark.filterwarnings('ignore:in \\d+ of')
def test_images_and_masks_of_loco_go_all_the_way(juice):
    m = Pradot(backbone='small', image_size=(96, 48), n=1, batch_size=4, epochs=1, iterations=20,
        device='cpu').fit(juice.train[:4], progress=False)
    good, bad = (tuple(r for r in juice.test if r.anomalous == yes)[:2] for yes in (False, True))
    some = replace(juice, test=good + bad)
    result = evaluate(m, some, progress=False)
    assert result['images'] == 4 and 0 <= result['image_auroc'] <= 1 and 0 <= result['pixel_auroc'] <= 1
    assert m.predict(some.test[:1], progress=False).maps.shape == (1, 480, 240)
