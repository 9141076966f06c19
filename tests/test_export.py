"Exported models: equal to the model, whatever its settings; refusals; the deployment example without pradot and torch"
import dataclasses
import errno
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pradot.data import InputError
from pradot.decision import Calibration
from pradot.detector import LIGHT, OFFICIAL, Config, Pradot
from pradot import export as module
from pradot.export import KINDS, OPSET, Detector, Search, export, run_onnx, run_pt2, threshold_for
from pradot.cost import structural
from pradot.prototypes import nearest

onnx = pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
pytestmark = pytest.mark.filterwarnings('ignore:only \\d+ images', 'ignore:in \\d+ of')

def pictures(size, n=16, seed=0):
    "n pictures (H, W, 3): smooth colours with a bright square somewhere"
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        a = np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size[::-1])).copy()
        y, x = rng.integers(0, size[0] - 8), rng.integers(0, size[1] - 8)
        a[y:y + 8, x:x + 8] = 255
        out.append(a)
    return out

def fitted(size=(64, 64), **changes):
    m = Pradot(LIGHT, device='cpu', **(dict(image_size=size, n=2, batch_size=4, epochs=2, iterations=20) | changes))
    return m.fit(pictures(m.config.image_size, 6, seed=1), progress=False)

def batch(images): return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))

def gap(scores):
    "A threshold in the widest gap of scores, so that rounding decides nothing"
    s = np.sort(scores)
    i = np.argmax(np.diff(s))
    return float((s[i] + s[i + 1])/2)

@pytest.fixture(scope='module')
def model(): return fitted()

SETTINGS = {
    'small': {},
    'resnet18': dict(backbone='resnet18', weights='random'),
    'resnet50, other stages': dict(backbone='resnet50', weights='random', stages=(1, 3), n=1),
    'α = 0 only, one stage, wide': dict(alphas=(0.,), stages=(3,), image_size=(48, 96)),
    'α = 1, tall': dict(alphas=(0.2, 1.), image_size=(112, 48)),
    'released': {k: getattr(OFFICIAL, k) for k in ('squared', 'corners', 'relative', 'align_corners', 'nominal', 'start')},
    'distance, corners, align_corners': dict(squared=False, corners=True, align_corners=True, image_size=(50, 70)),
    'one cell': dict(image_size=16, stages=(3,)),
}

@pytest.mark.parametrize('name', SETTINGS)
def test_files_do_what_the_model_does(name, tmp_path):
    m = fitted(**SETTINGS[name])
    images = pictures(m.config.image_size)
    want = m.predict(images, progress=False)
    t = gap(want.scores)
    for suffix, (_, run) in KINDS.items():
        with warnings.catch_warnings():
            warnings.simplefilter('error')                          # nothing to be warned of
            assert export(m, tmp_path/f'm{suffix}', t) <= 1e-4
        for B in (1, 3, 16):
            got = run(tmp_path/f'm{suffix}', batch(images[:B]))
            assert got['maps'].shape == (B, *m.config.image_size) and got['maps'].dtype == np.float32
            assert np.abs(got['maps'] - want.maps[:B]).max() <= 1e-4*want.maps.max()
            assert got['scores'].shape == (B,) and np.array_equal(got['scores'], got['maps'].max((1, 2)))
            assert got['anomalous'].dtype == bool and np.array_equal(got['anomalous'], want.scores[:B] > t)
    assert 0 < got['anomalous'].sum() < 16

def test_every_setting_is_one_that_export_knows():
    "Whoever adds a setting that changes maps must teach it to pradot.export, then add it here"
    training = {'weights', 'n', 'eps', 'iterations', 'tol', 'warm', 'eta', 'epochs', 'batch_size', 'seed', 'cut', 'memory', 'still',
                'solver', 'start', 'nominal', 'held_out', 'drop_last'}
    judging = {'backbone', 'image_size', 'tile', 'stages', 'alphas', 'products', 'squared', 'corners', 'relative', 'align_corners'}
    assert {f.name for f in dataclasses.fields(Config)} == training | judging

def test_the_model_stays_as_it_is(model, tmp_path):
    before = {k: v.clone() for k, v in model.backbone.net.state_dict().items()}
    strides = {k: v.stride() for k, v in model.backbone.net.state_dict().items()}
    export(model, tmp_path/'m.pt2')
    assert all(torch.equal(v, before[k]) and v.stride() == strides[k] for k, v in model.backbone.net.state_dict().items())

def test_bf16_becomes_float32(tmp_path):
    m = fitted(products='bf16')
    exact = Pradot(m.config, 'cpu', products='float32')
    exact.backbone, exact.prototypes = m.backbone, m.prototypes
    images = pictures((64, 64), 4)
    export(m, tmp_path/'m.pt2')
    want = exact.predict(images, progress=False).maps
    assert np.abs(run_pt2(tmp_path/'m.pt2', batch(images))['maps'] - want).max() <= 1e-4*want.max()

@pytest.mark.parametrize('block', [1, 4*35*3, 4*35*35*2, 1 << 30])
@pytest.mark.parametrize('relative', [False, True])
def test_blocks_do_not_change_the_search(block, relative, monkeypatch):
    monkeypatch.setattr(module, 'BLOCK', block)
    gen = torch.Generator().manual_seed(3)
    z, p, S = torch.randn(2, 5, 7, 6, generator=gen), torch.randn(5, 5, 7, 6, generator=gen), structural(5, 7)
    for alpha in (0., 0.4, 1.):
        s = Search(p, alpha, S, relative)
        widest = max(b.shape[1] for bs in s.blocks for b in bs)
        assert widest*4*35 <= max(block, 4*35)                     # bytes of cosines an image
        torch.testing.assert_close(s(z), nearest(z, p, alpha, S, relative)[0], atol=1e-6, rtol=1e-5)

def test_features_of_zeros_and_equal_features():
    p, S = torch.zeros(2, 2, 3, 4), structural(2, 3)
    for z in (torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4)):
        for q in (p, torch.ones_like(p)):
            for relative in (False, True):
                torch.testing.assert_close(Search(q, 0.3, S, relative)(z), nearest(z, q, 0.3, S, relative)[0], atol=1e-6, rtol=0)

def test_maps_of_another_size_and_their_scores(model, tmp_path):
    own = (90, 130)
    images = pictures(own, 3)
    want = model.predict(images, progress=False)
    small = [np.asarray(Image.fromarray(a).resize((64, 64), Image.Resampling.BILINEAR)) for a in images]
    for suffix, (_, run) in KINDS.items():
        export(model, tmp_path/f'm{suffix}', size=own)
        got = run(tmp_path/f'm{suffix}', batch(small))
        assert sorted(got) == ['maps', 'scores'] and got['maps'].shape == (3, *own)
        np.testing.assert_allclose(got['maps'], want.maps, atol=1e-4*want.maps.max(), rtol=0)
        np.testing.assert_allclose(got['scores'], want.scores, rtol=1e-4)

def test_onnx_says_what_it_is(model, tmp_path):
    export(model, tmp_path/'m.onnx', 0.25)
    proto = onnx.load(tmp_path/'m.onnx')
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import if o.domain == ''] == [('', OPSET)]
    s = ort.InferenceSession(tmp_path/'m.onnx', providers=['CPUExecutionProvider'])
    assert [(i.name, i.shape, i.type) for i in s.get_inputs()] == [('pixels', ['batch', 3, 64, 64], 'tensor(uint8)')]
    assert [(o.name, o.shape) for o in s.get_outputs()] == [('maps', ['batch', 64, 64]), ('scores', ['batch']), ('anomalous', ['batch'])]
    meta = s.get_modelmeta().custom_metadata_map
    assert Config(**json.loads(meta['config'])) == model.config and json.loads(meta['threshold']) == 0.25
    assert json.loads(meta['preprocessing'])['size'] == [64, 64] and 'BILINEAR' in meta['preprocessing'] and meta['pradot']
    assert [p.name for p in tmp_path.iterdir()] == ['m.onnx']      # one file, no data beside it

def test_pt2_says_what_it_is_and_needs_no_pradot(model, tmp_path):
    export(model, tmp_path/'m.pt2')
    extra = {'pradot.json': ''}
    torch.export.load(tmp_path/'m.pt2', extra_files=extra)
    assert json.loads(json.loads(extra['pradot.json'])['threshold']) is None
    code = ('import sys; sys.modules["pradot"] = None; import torch; m = torch.export.load(sys.argv[1]).module(); '
            'print(*m(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))["scores"].shape)')
    out = subprocess.run([sys.executable, '-c', code, tmp_path/'m.pt2'], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ['2']

# --- thresholds

def test_which_threshold(model):
    m = Pradot(model.config, 'cpu')
    assert threshold_for(m) is None and threshold_for(m, 0.3) == 0.3
    m.calibration = Calibration(np.linspace(0.1, 0.9, 9))
    assert threshold_for(m, rate=0.1) == 0.9 and threshold_for(m, rate=0.5) == 0.5 and threshold_for(m, 0.3) == 0.3
    for words, says in ((dict(), 'smallest possible'), (dict(threshold=0.1, rate=0.1), 'not both'), (dict(threshold=float('nan')), '0 and 2'),
                        (dict(threshold=-1.), '0 and 2')):
        with pytest.raises(InputError, match=says): threshold_for(m, **words)
    m.calibration = None
    with pytest.raises(InputError, match='not calibrated'): threshold_for(m, rate=0.1)

def test_a_score_equal_to_the_threshold_is_normal(model):
    images = pictures((64, 64), 4)
    x = torch.from_numpy(batch(images))
    with torch.inference_mode():
        scores = Detector(model)(x)['scores']
        for t in scores.tolist():
            assert Detector(model, t)(x)['anomalous'].tolist() == [s > t for s in scores.tolist()]

# --- refusals

@pytest.mark.parametrize('words, says', [
    (dict(path='m.pth'), 'must end in .onnx or .pt2'), (dict(path='m'), 'must end in'), (dict(path='m.onnx', size=(0, 4)), 'size must be'),
    (dict(path='m.onnx', size=(4,)), 'size must be'), (dict(path='m.pt2', rate=0.1), 'not calibrated')])
def test_refusals(model, words, says, tmp_path):
    with pytest.raises(InputError, match=says): export(model, **(words | dict(path=tmp_path/words['path'])))
    assert not any(tmp_path.iterdir())

def test_a_model_that_learnt_nothing(tmp_path):
    with pytest.raises(InputError, match='learnt nothing'): export(Pradot(LIGHT, 'cpu'), tmp_path/'m.pt2')

def test_too_large_for_onnx(model, tmp_path, monkeypatch):
    class Huge: nbytes = 2**31
    monkeypatch.setattr(Detector, 'state_dict', lambda self: dict(x=Huge()))
    with pytest.raises(InputError, match=r'2\.0 GiB .* \.pt2'): export(model, tmp_path/'m.onnx')
    assert not any(tmp_path.iterdir())

@pytest.mark.parametrize('missing', ['onnx', 'onnxruntime', 'onnxscript'])
def test_without_the_extra(model, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=f'{missing} is not installed.*pip install'): export(model, tmp_path/'m.onnx')
    export(model, tmp_path/'m.pt2')                                # does not need it
    assert [p.name for p in tmp_path.iterdir()] == ['m.pt2']

@pytest.mark.parametrize('suffix', KINDS)
def test_a_full_disk_leaves_the_old_file(model, tmp_path, monkeypatch, suffix):
    path = tmp_path/f'm{suffix}'
    path.write_bytes(b'old')
    def full(self, data): Path.open(self, 'wb').write(bytes(data)[:9]); raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(InputError, match='No space left'): export(model, path)
    assert path.read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == [path.name]

def test_a_file_that_differs_gets_no_name(model, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, '.pt2', (KINDS['.pt2'][0], lambda path, x: {'maps': run_pt2(path, x)['maps'] + 1e-3}))
    with pytest.raises(InputError, match='off those of the model'): export(model, tmp_path/'m.pt2')
    assert not any(tmp_path.iterdir())

# --- the deployment example, and the command

def odd_files(folder):
    "The same scene in the formats that cameras write"
    folder.mkdir()
    a, b, c, d = pictures((90, 120), 4, seed=5)
    Image.fromarray(a).save(folder/'a b\n.png')
    Image.fromarray(b).convert('L').save(folder/'grau-ü.png')
    Image.fromarray((b[..., 0].astype(np.uint16) << 8) + 77).save(folder/'sixteen.png')
    Image.fromarray(c).convert('RGBA').save(folder/'alpha.png')
    Image.fromarray(c).quantize(16).save(folder/'palette.png')
    exif = Image.Exif(); exif[0x0112] = 6
    Image.fromarray(d).save(folder/'turned.jpg', exif=exif, quality=90)
    Image.fromarray(a).convert('CMYK').save(folder/'cmyk.tif')
    return sorted(folder.iterdir())

def test_the_example_decides_as_pradot_without_pradot_and_torch(model, tmp_path, root):
    paths = odd_files(tmp_path/'images')
    upright = [p for p in paths if p.name != 'turned.jpg']
    want = model.predict(paths, progress=False, size=(90, 120)).maps
    own = model.predict(upright, progress=False)
    t = gap(want.max((1, 2)))
    export(model, tmp_path/'m.onnx', t, size=(90, 120))
    (tmp_path/'deploy.py').write_bytes((root/'pradot'/'deploy.py').read_bytes())
    code = ('import sys; sys.modules.update(pradot=None, torch=None); import json, deploy\n'
            'print(json.dumps([[p, s, a, float(m.sum())] for p, s, a, m in deploy.judge(sys.argv[1], sys.argv[2:], 3)]))\n'
            'assert not [m for m in sys.modules if m.split(".")[0] in ("pradot", "torch") and sys.modules[m]]')
    out = subprocess.run([sys.executable, '-c', code, 'm.onnx', *map(str, paths)], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = json.loads(out.stdout)
    assert [r[0] for r in rows] == [str(p) for p in paths]
    np.testing.assert_allclose([r[1] for r in rows], want.max((1, 2)), rtol=1e-5)
    np.testing.assert_allclose([r[3] for r in rows], want.sum((1, 2)), rtol=1e-5)
    assert [r[2] for r in rows] == list(want.max((1, 2)) > t) and len({r[2] for r in rows}) == 2
    np.testing.assert_allclose([r[1] for r in rows if not r[0].endswith('turned.jpg')], own.scores, rtol=1e-5)

def test_the_example_is_thirty_lines_of_its_own(root):
    lines = (root/'pradot'/'deploy.py').read_text(encoding='utf-8').splitlines()
    assert len(lines) <= 32 and not any('pradot' in l or 'torch' in l.replace('PyTorch', '').split('onnx')[0]
                                        for l in lines if 'import' in l and not l.startswith(('#', '"')))

def test_the_command(model, run, tmp_path):
    model.save(tmp_path/'m.safetensors')
    for suffix in KINDS:
        code, out, err = run('export', tmp_path/'m.safetensors', '--out', f'x{suffix}', '--threshold', '0.3', '--size', '90x120')
        assert (code, err) == (0, '') and f'x{suffix}: ' in out and 'above 0.3' in out
    got = run_onnx('x.onnx', batch(pictures((64, 64), 2)))
    assert got['maps'].shape == (2, 90, 120) and 'anomalous' in got
    assert 'without a decision' in run('export', tmp_path/'m.safetensors', '--out', 'y.pt2')[1]

def test_the_command_refuses(model, refused, tmp_path):
    path = tmp_path/'m.safetensors'
    model.save(path)
    refused(['export', path, '--out', 'x.safetensors'], 'must end in .onnx or .pt2')
    refused(['export', 'none.safetensors', '--out', 'x.onnx'], 'there is no model')
    refused(['export', path, '--out', 'x.onnx', '--rate', '0.1'], 'not calibrated')
    refused(['export', path, '--out', 'x.pt2', '--threshold', '3'], 'between 0 and 2')
    refused(['export', path, '--out', path/'x.pt2'], 'cannot be written')
    refused(['export', path, '--out', 'x.pt2', '--threshold', 'high'], 'invalid float', status=2)

def test_a_real_model(shared, tmp_path):
    from pradot.data import mvtec_ad
    bottle = mvtec_ad(shared/'mvtec_ad', 'bottle')
    m = Pradot(LIGHT, 'cpu', backbone='resnet18', weights=str(shared/'weights'/'resnet18_imagenet_to_layer3.safetensors'),
               image_size=112, n=1, batch_size=8, epochs=2).fit(bottle.train[:8], progress=False)
    some = bottle.test[::12]
    want = m.predict(some, progress=False)
    pixels = batch([np.asarray(r.image().resize((112, 112), Image.Resampling.BILINEAR)) for r in some])
    t = gap(want.scores)
    for suffix, (_, run) in KINDS.items():
        export(m, tmp_path/f'm{suffix}', t, size=want.maps.shape[1:])
        got = run(tmp_path/f'm{suffix}', pixels)
        assert np.abs(got['maps'] - want.maps).max() <= 1e-4*want.maps.max()
        assert np.array_equal(got['anomalous'], want.scores > t)

def test_blocks_wait_for_each_other(tmp_path, monkeypatch):
    "Each product of a search depends on the one before, or onnxruntime would hold all of them at once"
    monkeypatch.setattr(module, 'BLOCK', 4*64*20)                  # 64 cells: twenty at a time
    for relative in (False, True):
        m = fitted(n=3, alphas=(0.3,), stages=(2,), relative=relative)
        export(m, tmp_path/'m.onnx')
        graph = onnx.load(tmp_path/'m.onnx').graph
        made = {o: n for n in graph.node for o in n.output}
        weights = {i.name for i in graph.initializer}
        products = [n for n in graph.node if n.op_type == 'MatMul']
        assert len(products) == 4*3*(1 + relative) and all(n.input[1] in weights for n in products)
        def before(node, seen):
            for i in node.input:
                if i in made and made[i].output[0] not in seen:
                    seen.add(made[i].output[0]); before(made[i], seen)
            return seen
        for a, b in zip(products, products[1:]): assert a.output[0] in before(b, set())
