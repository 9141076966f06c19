"Models of a part of the image, and large images in tiles."
import hashlib, json, warnings
from dataclasses import replace

import numpy as np
import pytest
import safetensors, safetensors.torch, torch
from PIL import Image

from pradot.data import InputError
from pradot.detector import LIGHT, Pradot
from pradot.export import KINDS, export
from pradot.features import Backbone, extract, pieces, reach
from pradot.figures import assignments, patches, restore, sample
from pradot.region import cells_in, read_region, touched
from pradot.report import entry, page
from pradot.tables import part
from pradot.toy import tray

SMALL = replace(LIGHT, image_size=96, n=2, batch_size=8, epochs=2)
ROI = np.zeros((128, 128), bool); ROI[20:80, 30:100] = True

@pytest.fixture(scope='module')
def toy(): return tray(size=(128, 128), train=12, validation=6, good=3, logical=3, structural=3)

def fitted(toy, roi=ROI, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        return Pradot(SMALL, device='cpu', **changes).fit(toy.train, progress=False, roi=roi)

@pytest.fixture(scope='module')
def model(toy): return fitted(toy)

def same(a, b): return all(torch.equal(p.flatten(), b.prototypes[k].flatten()) for k, p in a.prototypes.items())

# A region

@pytest.mark.parametrize('changes', [{}, dict(solver='stream', warm=True, held_out=0.2), dict(image_size=(72, 100), products='bf16'),
                                     dict(relative=True, corners=True, squared=False, align_corners=True, solver='log')])
def test_a_region_of_everything_is_no_region(toy, changes):
    a, b = fitted(toy, None, **changes), fitted(toy, np.ones((30, 50)), **changes)
    assert same(a, b) and a.reference == b.reference
    x = torch.randn(2, 3, *a.config.image_size, generator=torch.Generator().manual_seed(0))
    for k, found in a.grids(x).items():
        assert all(torch.equal(u, v) for u, v in zip(found, b.grids(x)[k]))
    assert np.array_equal(a.predict(toy.test).maps, b.predict(toy.test).maps)

def test_only_its_cells_are_learnt(toy, model):
    for (l, _), p in model.prototypes.items():
        want = touched(ROI, (96//2**(l + 1),)*2)
        assert p.shape[:3] == (2, 1, want.sum()) and 0 < want.sum() < want.size
        assert np.array_equal(model.cells(l).inside.numpy(), np.flatnonzero(want))
    assert len(model.prototypes) == 4

@pytest.mark.parametrize('size', [None, (96, 96), (64, 200), (300, 7)])
def test_maps_are_exactly_0_outside_and_positive_inside(toy, model, size):
    found = model.predict(toy.test, size)
    inside = touched(ROI, found.maps.shape[1:])
    assert (found.maps[:, ~inside] == 0).all() and (found.maps[:, inside] > 0).all()
    own = model.predict(toy.test).maps
    assert np.array_equal(found.scores, own[:, ROI].max(1))

def test_the_border_is_not_dimmed(toy, model):
    "Enlarging must not mix in what was never measured: inside, the map lies between the distances of the cells of the region"
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    for (l, a), (d, _) in model.grids(x).items():
        inside = touched(ROI, d.shape[1:])
        assert d[0][~inside].min() >= d[0][inside].min() and d[0][~inside].max() <= d[0][inside].max()

def test_a_defect_far_outside_changes_nothing(toy):
    "Features see 49 pixels beyond their cell in the small network; what lies further away cannot matter"
    roi = np.zeros((128, 384), bool); roi[:, :100] = True
    rng = np.random.default_rng(0)
    good = [np.asarray(Image.fromarray(rng.integers(0, 256, (8, 24, 3), np.uint8)).resize((384, 128))) for _ in range(9)]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        m = Pradot(SMALL, device='cpu', image_size=(128, 384)).fit(good[:8], progress=False, roi=roi)
    bad, near = good[8].copy(), good[8].copy()
    bad[:, 112 + 49 + 1:] = 255; near[:, 100:] = 255           # cells of 16 pixels, so the last one ends at 112
    maps = m.predict([good[8], bad, near]).maps
    assert np.abs(maps[1] - maps[0]).max() < 1e-6 < 1e-3 < np.abs(maps[2] - maps[0]).max()

def test_saved_and_loaded_to_the_bit(toy, model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)
        m = fitted(toy).calibrate(toy.validation)
    m.save(tmp_path/'m.safetensors')
    again = Pradot.load(tmp_path/'m.safetensors', 'cpu')
    assert again.roi.dtype == bool and np.array_equal(again.roi, ROI) and same(m, again)
    assert np.array_equal(m.predict(toy.test).maps, again.predict(toy.test).maps)
    assert np.array_equal(again.calibration.scores, m.calibration.scores) and min(again.calibration.scores) > 0

def changed_file(path, out, change):
    "The same file with other tensors, and the checksum that belongs to them"
    with safetensors.safe_open(path, 'pt') as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    change(tensors)
    meta.pop('sha256')
    h = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for k in sorted(tensors): h.update(k.encode()); h.update(tensors[k].contiguous().numpy().data)
    safetensors.torch.save_file(tensors, out, meta | dict(sha256=h.hexdigest()))

@pytest.mark.parametrize('roi', [torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 4), torch.ones(4, dtype=torch.uint8),
                                 torch.full((4, 4), 2, dtype=torch.uint8), torch.zeros(0, 4, dtype=torch.uint8),
                                 torch.ones(128, 128, dtype=torch.uint8), None])
def test_a_file_with_another_region_is_refused(model, tmp_path, roi):
    model.save(tmp_path/'m.safetensors')
    changed_file(tmp_path/'m.safetensors', tmp_path/'same.safetensors', lambda t: None)
    Pradot.load(tmp_path/'same.safetensors', 'cpu')
    def change(t): t.pop('roi') if roi is None else t.update(roi=roi)
    changed_file(tmp_path/'m.safetensors', tmp_path/'bad.safetensors', change)
    with pytest.raises(InputError, match='is no model that pradot'): Pradot.load(tmp_path/'bad.safetensors', 'cpu')

def test_the_checksum_covers_the_region(model, tmp_path):
    model.save(tmp_path/'m.safetensors')
    with safetensors.safe_open(tmp_path/'m.safetensors', 'pt') as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    tensors['roi'][20, 30] = 0
    safetensors.torch.save_file(tensors, tmp_path/'m.safetensors', meta)
    with pytest.raises(InputError, match='damaged'): Pradot.load(tmp_path/'m.safetensors', 'cpu')

def test_kept_parts_are_those_of_the_region(toy, tmp_path):
    other = ROI.copy(); other[60:] = False
    def fit(roi):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            return Pradot(SMALL, device='cpu').fit(toy.train, progress=False, cache=tmp_path, roi=roi)
    for _ in range(2):
        for roi in (None, ROI, other): assert same(fit(roi), fitted(toy, roi))
    assert len(list(tmp_path.glob('prototypes-*'))) == 3*4 and len(list(tmp_path.glob('features-*.npy'))) == 2

@pytest.mark.parametrize('shape', [(128, 128), (31, 33), (500, 500)])
def test_a_mask_is_laid_over_the_image_whatever_its_size(toy, shape, tmp_path):
    whole = np.zeros(shape, bool); whole[:shape[0]//2] = True
    Image.fromarray(whole).save(tmp_path/'half.png')
    m = fitted(toy, tmp_path/'half.png', stages=(3,), alphas=(0.,), epochs=1)
    assert m.prototypes[3, 0.].shape[2] in (18, 24)          # 3 of 6 rows, and the one that a mask of odd height also touches

def test_a_mask_of_other_proportions_is_told(toy):
    with pytest.warns(UserWarning, match='region is 64 x 128 pixels and the first image 128 x 128: it is stretched'):
        Pradot(SMALL, device='cpu', epochs=1, stages=(3,)).fit(toy.train, progress=False, roi=np.ones((64, 128)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        Pradot(SMALL, device='cpu', epochs=1, stages=(3,), image_size=(48, 96)).fit(toy.train, progress=False, roi=np.ones((64, 128)))
    assert not any('stretched' in str(w.message) for w in said)

@pytest.mark.parametrize('form', ['1', 'L', 'RGB', 'P', 'I;16', 'jpg'])
def test_masks_of_every_form(form, tmp_path):
    path = tmp_path/f'mask.{"jpg" if form == "jpg" else "png"}'
    if form == 'I;16': Image.fromarray(np.uint16(65535)*ROI).save(path)
    else: Image.fromarray(np.uint8(255)*ROI).convert('L' if form == 'jpg' else form).save(path)
    assert (read_region(path) != ROI).mean() < (0.01 if form == 'jpg' else 1e-9)

@pytest.mark.parametrize('bad, says', [
    (np.zeros((4, 4)), 'the region is black everywhere; paint white'), (np.ones((4, 4, 3)), r'must be an \(H, W\) array'),
    (np.full((4, 4), np.nan), 'not finite'), (np.zeros((0, 4)), r'must be an \(H, W\) array'), (-np.ones((4, 4)), 'black everywhere'),
    (np.array([['a']]), r'must be an \(H, W\) array'), ('nowhere.png', 'nowhere.png does not exist')])
def test_wrong_regions_are_refused(toy, bad, says):
    with pytest.raises(InputError, match=says): fitted(toy, bad)

def test_figures_and_the_report_know_the_region(toy, model):
    for k, (d, which) in assignments(model, toy.test[:3]).items():
        found, inside = patches(model, toy.train, [k])[k], touched(ROI, d.shape[1:])
        own = np.arange(inside.size).reshape(inside.shape)
        assert (which[:, ~inside] == own[~inside]).all()
        there = which[:, inside] % inside.size
        assert inside.ravel()[there].all() and which.max() < 2*inside.size
        assert found.pixels.shape[:3] == (2, *inside.shape)
        assert not found.pixels[:, ~inside].any() and found.pixels[:, inside].any()
        assert inside.ravel()[found.cell[:, inside]].all() and (found.cosine[:, inside] > 0).all()
        cut = restore(which, found)
        h, w = found.pixels.shape[3:5]
        assert not cut[:, ~inside.repeat(h, 0).repeat(w, 1)].any()
    s = sample(model, toy.test, 2, 50, 50)
    cells = ((s.c*12).round().long() - 1).numpy()
    assert touched(ROI, (12, 12))[cells[:, 0], cells[:, 1]].all()
    kept = [entry(model, r.path, m) for r, m in zip(toy.test[:2], model.predict(toy.test[:2]).maps)]
    data = json.loads(page(model, kept, normal=toy.train).split('id="data">')[1].split('</script>')[0])
    assert [(k['H'], k['W']) for k in data['kinds']] == [(12, 12), (12, 12), (6, 6), (6, 6)]

def test_a_part_of_a_model_has_its_region(toy, model):
    some = part(model, (3,), (0.,))
    assert (some.predict(toy.test).maps[:, ~ROI] == 0).all()

@pytest.mark.parametrize('changes', [{}, dict(relative=True, squared=False, image_size=(72, 104))])
def test_the_exported_graph_is_of_the_region(toy, changes, tmp_path):
    pytest.importorskip('onnxruntime'); pytest.importorskip('onnxscript')
    m = fitted(toy, **changes)
    H, W = m.config.image_size
    images = [np.asarray(r.image().resize((W, H))) for r in toy.test]
    want = m.predict(images, (128, 128)).maps
    for suffix, (_, run) in KINDS.items():
        assert export(m, tmp_path/f'm{suffix}', size=(128, 128)) <= 1e-4
        got = run(tmp_path/f'm{suffix}', np.stack(images).transpose(0, 3, 1, 2).copy())['maps']
        assert np.abs(got - want).max() <= 1e-4*want.max() and (got[:, ~ROI] == 0).all()

def test_cells_are_few_and_cheap():
    cells = cells_in(ROI, (12, 12))
    assert len(cells.inside) == touched(ROI, (12, 12)).sum() and len(cells.nearest) == 144

# On the command line

def words(toy, out, *more):
    return ('fit', '--dataset', 'mvtec_loco', '--data', toy.train[0].path.parents[3], '--category', 'tray', '--preset', 'light',
            '--image-size', 96, '--n', 2, '--batch-size', 8, '--epochs', 1, '--out', out, *more)

def test_fit_and_predict_with_a_mask(toy, run, tmp_path):
    Image.fromarray(ROI).save(tmp_path/'belt of ü.png')
    code, out, err = run(*words(toy, tmp_path/'m.safetensors', '--roi', tmp_path/'belt of ü.png'))
    assert code == 0 and 'learnt' in out, err
    code, out, err = run('predict', tmp_path/'m.safetensors', toy.test[0].path, '--out', tmp_path/'r', '--report', tmp_path/'r.html')
    assert code == 0, err
    amap = np.asarray(Image.open(next((tmp_path/'r'/'maps').iterdir())))
    assert (amap[~ROI] == 0).all() and (amap[ROI] > 0).all() and (tmp_path/'r.html').stat().st_size > 1000

def test_wrong_words_are_refused(toy, refused, tmp_path):
    Image.new('L', (8, 8)).save(tmp_path/'black.png'); (tmp_path/'text.png').write_text('no picture')
    refused(words(toy, tmp_path/'m.safetensors', '--roi', tmp_path/'black.png'), 'black.png is black everywhere')
    refused(words(toy, tmp_path/'m.safetensors', '--roi', tmp_path/'text.png'), 'text.png cannot be read as an image')
    refused(words(toy, tmp_path/'m.safetensors', '--roi', 'nowhere.png'), 'nowhere.png does not exist')
    refused(words(toy, tmp_path/'m.safetensors', '--tile', 90), 'tiles of 90 pixels are too small', 'the least is 144')
    refused(words(toy, tmp_path/'m.safetensors', '--tile=-1'), 'tile must be a whole number of pixels')

# Tiles

@pytest.mark.parametrize('size', [(320, 480), (321, 479), (144, 500)])
@pytest.mark.parametrize('tile', [144, 175, 224])
def test_features_of_tiles_are_those_of_the_whole(size, tile):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    whole, tiles = Backbone('small')(x), Backbone('small', tile=tile)(x)
    assert whole.keys() == tiles.keys()
    for l, z in whole.items():
        assert z.shape == tiles[l].shape and (z - tiles[l]).abs().max() <= 1e-5*z.abs().max()

def test_what_lies_beyond_the_margin_would_show():
    "The comparison above can fail"
    x = torch.randn(1, 3, 160, 320, generator=torch.Generator().manual_seed(0))
    net = Backbone('small')
    whole, part = net(x)[3], net(x[..., :160])[3]
    seen = (whole[0, :, :10] - part[0]).abs().amax((0, 2))/whole.abs().max()       # by column
    assert reach(net.net, 3) == 49 and (seen[:7] <= 1e-5).all() and (seen[7:] > 1e-5).all()

def test_a_tile_larger_than_the_image_changes_nothing():
    x = torch.randn(2, 3, 96, 130, generator=torch.Generator().manual_seed(0))
    whole = Backbone('small')(x)
    for tile in (130, 1000): assert all(torch.equal(z, whole[l]) for l, z in Backbone('small', tile=tile)(x).items())

@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_features_of_tiles_with_imagenet_weights(shared, name):
    path = shared/'weights'/f'{name}_imagenet_to_layer3.safetensors'
    if not path.is_file(): pytest.skip(f'no {path.name}')
    x = torch.randn(1, 3, 340, 480, generator=torch.Generator().manual_seed(0))
    whole, tiles = (Backbone(name, path, tile=tile)(x) for tile in (0, 320))
    for l, z in whole.items(): assert (z - tiles[l]).abs().max() <= 1e-5*z.abs().max()

@pytest.mark.parametrize('length', [1, 16, 100, 143, 144, 145, 320, 1000])
@pytest.mark.parametrize('tile', [144, 150, 300])
def test_pieces_cover_each_pixel_once_and_see_enough(length, tile):
    found, done = pieces(length, tile, 64, 16), 0
    for begin, end, first, last in found:
        assert begin % 16 == 0 and 0 <= begin <= first < last <= end <= length and end - begin <= tile
        assert first == done and (begin == 0 or first - begin == 64) and (end == length or end - last == 64)
        done = last
    assert done == length

@pytest.mark.parametrize('name, stages, least', [('small', (2, 3), 144), ('small', (2,), 72), ('resnet50', (2, 3), 304), ('resnet18', (1,), 52)])
def test_the_least_tile_is_named_and_does(name, stages, least):
    x = torch.zeros(1, 3, least + 1, 64)
    with pytest.raises(InputError, match=f'tiles of {least - 1} pixels.*the least is {least}'):
        Backbone(name, 'random', stages, tile=least - 1)(x)
    assert Backbone(name, 'random', stages, tile=least)(x).keys() == set(stages)

def test_maps_of_a_model_with_tiles(toy, tmp_path):
    whole, tiles, large = (fitted(toy, None, image_size=(200, 216), tile=tile, n=1, epochs=1, alphas=(0.,)) for tile in (0, 144, 216))
    assert same(whole, large) and np.array_equal(whole.predict(toy.test).maps, large.predict(toy.test).maps)
    a, b = whole.predict(toy.test).maps, tiles.predict(toy.test).maps
    assert np.abs(a - b).max() <= 1e-4*a.max()                 # prototypes differ by rounding too
    tiles.save(tmp_path/'m.safetensors')
    again = Pradot.load(tmp_path/'m.safetensors', 'cpu')
    assert again.backbone.tile == 144 and np.array_equal(again.predict(toy.test).maps, b)
    whole.backbone.tile = 144                                  # the same prototypes
    assert np.abs(whole.predict(toy.test).maps - a).max() <= 1e-5*a.max()

def test_kept_features_of_tiles_are_their_own(toy, tmp_path):
    for tile in (0, 216, 144, 160):                            # the first two are the same
        extract(Backbone('small', tile=tile, stages=(3,)), toy.train[:2], (200, 216), cache=tmp_path)
    assert len(list(tmp_path.glob('features-*.npy'))) == 3

@pytest.mark.parametrize('tile', [-1, 2.5, '512', None])
def test_wrong_tiles_are_refused(tile):
    with pytest.raises(InputError, match='tile must be a whole number of pixels, or 0'): Pradot(SMALL, tile=tile)
