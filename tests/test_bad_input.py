"Bad input through the command line: one sentence on stderr, a status that is not zero, and nothing written"
import json, os, shutil, signal, subprocess, sys, time, urllib.error, weakref
from pathlib import Path
import numpy as np
import pandas as pd
import pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from pradot import cli, data, features, prototypes
from pradot.cli import main
from pradot.detector import FORMAT
from pradot.features import SMALL, memory_advice
from pradot.data import InputError, read_image

LIGHT = '--backbone small --image-size 48x64 --n 1 --epochs 1 --batch-size 4 --iterations 30 --device cpu'.split()
size = H, W = 60, 80

def picture(path, shape=size, seed=0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:shape[0], :shape[1]]
    a = (120 + 60*np.sin(x/9) + 40*np.cos(y/7))[..., None] + np.random.default_rng(seed).normal(0, 6, (*shape, 3))
    Image.fromarray(a.clip(0, 255).astype(np.uint8)).save(path, **how)
    return path

def mask(path, shape=size, on=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.zeros(shape, np.uint8)
    if on: a[10:20, 10:30] = 255
    Image.fromarray(a).save(path)
    return path

@pytest.fixture
def ad(tmp_path):
    "A small category of MVTec AD's layout; also the folder that is watched for anything written"
    here = tmp_path/'ad'/'nut'
    for i in range(5): picture(here/'train'/'good'/f'{i:03d}.png', seed=i)
    picture(here/'test'/'good'/'000.png', seed=9)
    picture(here/'test'/'cut'/'000.png', seed=10)
    mask(here/'ground_truth'/'cut'/'000_mask.png')
    return here

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp('fitted')
    for i in range(5): picture(root/'images'/f'{i:03d}.png', seed=i)
    assert main(['fit', '--dataset', 'folder', '--data', str(root/'images'), '--out', str(root/'m.safetensors'),
        *LIGHT]) == 0
    return root/'m.safetensors'

def fit(root, *more, category='nut', dataset='mvtec_ad'):
    return ['fit', '--dataset', dataset, '--data', root, *(['--category', category] if category else []), '--out',
        'out/m.safetensors', *LIGHT, *more]

def judge(model, root, category='nut'):
    return ['evaluate', model, '--dataset', 'mvtec_ad', '--data', root, '--category', category, '--out',
        'out/metrics.json', '--device', 'cpu']

def predict(model, *images, out='results'): return ['predict', model, *images, '--out', out, '--device', 'cpu']

# The good case, without which the bad ones show nothing

def test_the_good_case_works(run, ad, model):
    code, out, err = run(*fit(ad.parent))
    assert code == 0 and 'out/m.safetensors: 5 images of nut' in out and os.listdir('out') == ['m.safetensors']
    assert [l[:6] for l in err.splitlines()] in ([], ['note: ']) and 'Traceback' not in err
    code, out, err = run(*judge('out/m.safetensors', ad.parent))
    result = json.loads(Path('out/metrics.json').read_text())
    assert code == 0 and err == '' and 'image AU-ROC' in out
    assert 0 <= result['image_auroc'] <= 1 and 0 <= result['pixel_auroc'] <= 1
    code, out, err = run(*predict('out/m.safetensors', ad/'test'))
    rows = pd.read_csv('results/scores.csv')
    assert code == 0 and 'not calibrated' in err and err.count('\n') == 1 and len(rows) == 2
    assert sorted(os.listdir('results')) == ['maps', 'overlays', 'scores.csv', 'scores.json']
    for r in rows.itertuples():
        m = Image.open(Path('results')/r.map)
        assert m.mode == 'F' and m.size == (W, H) == Image.open(Path('results')/r.overlay).size
        assert np.asarray(m).max() == pytest.approx(r.score)

# Folders

def test_missing_root(refused, ad, model):
    no = ad.parent/'nowhere'
    refused(fit(no), no, 'not a folder')
    refused(judge(model, no), no, 'not a folder')
    refused(fit(no, dataset='folder', category=None), no, 'not a folder')

def test_missing_category(refused, ad, model):
    refused(fit(ad.parent, category='bolt'), ad.parent, "no category 'bolt'", 'it has nut')
    refused(judge(model, ad.parent, 'bolt'), "no category 'bolt'")
    refused(fit(ad.parent, category='bolt', dataset='mvtec_loco'), "no category 'bolt'")
    refused(fit(ad.parent, category=None), '--category')

def test_missing_train_good(refused, ad):
    shutil.rmtree(ad/'train'/'good')
    refused(fit(ad.parent), ad, 'no train/good')
    refused(fit(ad.parent, dataset='mvtec_loco'), ad, 'no train/good')

def test_empty_folders(refused, ad, model, tmp_path):
    (tmp_path/'empty').mkdir()
    refused(fit(tmp_path/'empty', dataset='folder', category=None), tmp_path/'empty', 'holds no image')
    refused(predict(model, tmp_path/'empty'), tmp_path/'empty', 'holds no image')
    (tmp_path/'empty'/'notes.txt').write_text('no image')
    refused(predict(model, ad/'test', tmp_path/'empty'), tmp_path/'empty', 'holds no image')
    for p in (ad/'train'/'good').iterdir(): p.unlink()
    refused(fit(ad.parent), ad/'train'/'good', 'holds no image')

def test_no_test_images(refused, ad, model):
    shutil.rmtree(ad/'test'/'good')
    refused(judge(model, ad.parent), 'nut', 'no good test image')
    shutil.rmtree(ad/'test'); shutil.rmtree(ad/'ground_truth')
    refused(judge(model, ad.parent), 'nut', 'no test images')

def test_loco_without_its_defects_config(refused, ad):
    shutil.rmtree(ad/'test'); shutil.rmtree(ad/'ground_truth')
    refused(fit(ad.parent, dataset='mvtec_loco'), 'defects_config.json', 'does not exist')
    for text, says in (('{', 'not JSON'), ('[{"pixel_value": 3}]', 'entry 0'), ('{}', 'a list')):
        (ad/'defects_config.json').write_text(text)
        refused(fit(ad.parent, dataset='mvtec_loco'), ad/'defects_config.json', says)

# Images

def broken(path, how):
    whole = path.read_bytes()
    path.write_bytes({'empty': b'', 'text': b'this is no image', 'half': whole[:len(whole)//2],
        'header': whole[:20]}[how])

@pytest.mark.parametrize('how', ['empty', 'text', 'half', 'header'])
def test_broken_images_are_named(refused, ad, model, how):
    bad = ad/'train'/'good'/'003.png'
    broken(bad, how)
    says = (bad, 'cannot be read as an image') + (('it is empty',) if how == 'empty' else ())
    refused(fit(ad.parent), *says)
    # in the middle: what was done before is not left behind
    refused(predict(model, ad/'test', bad.parent), *says)
    bad = ad/'test'/'cut'/'000.png'
    broken(bad, how)
    refused(judge(model, ad.parent), bad, 'cannot be read as an image')

@pytest.mark.parametrize('suffix', ['jpg', 'tif', 'bmp', 'webp', 'png'])
@pytest.mark.filterwarnings('ignore')
def test_images_cut_anywhere_are_named(tmp_path, suffix):
    path = picture(tmp_path/f'a.{suffix}')
    whole = path.read_bytes()
    for n in (*range(0, min(len(whole), 200), 3), *range(200, len(whole) - 16, max(1, len(whole)//40))):
        path.write_bytes(whole[:n])
        with pytest.raises(InputError) as e: read_image(path)
        assert str(path) in str(e.value) and '\n' not in str(e.value)

def test_a_truncated_tiff_is_one_sentence_too(refused, ad, model):
    path = picture(ad/'a.tif')
    whole = path.read_bytes()
    for n in (8, 20, len(whole) - 40, len(whole) - 4):
        path.write_bytes(whole[:n])
        refused(predict(model, path), path, 'cannot be read as an image')

@pytest.mark.parametrize('suffix', ['jpg', 'tif', 'bmp', 'webp', 'png'])
@pytest.mark.filterwarnings('ignore')
def test_images_with_random_damage_are_named_or_read(tmp_path, suffix):
    path, rng = picture(tmp_path/f'a.{suffix}'), np.random.default_rng(0)
    whole = path.read_bytes()
    for _ in range(150):
        bad = bytearray(whole)
        for i in rng.integers(0, min(len(bad), 400), 3): bad[i] = rng.integers(0, 256)
        path.write_bytes(bytes(bad))
        try: assert read_image(path).mode == 'RGB'
        except InputError as e: assert str(path) in str(e) and '\n' not in str(e)

def test_missing_image(refused, model, ad):
    refused(predict(model, ad/'no.png'), ad/'no.png', 'does not exist')
    refused(predict(model, ad/'test', ad/'no.png'), ad/'no.png', 'does not exist')

def test_images_smaller_than_a_cell(refused, ad, model):
    tiny = picture(ad/'train'/'good'/'tiny.png', (9, 200))
    refused(fit(ad.parent), tiny, '9 x 200', 'smaller than one grid cell (16 x 16)')
    refused(predict(model, tiny), tiny, '9 x 200', 'smaller than one grid cell (16 x 16)')
    tiny.unlink()
    refused(fit(ad.parent, '--image-size', '8'), '8 x 8', 'stage 3', '--image-size')

# Masks

def test_mask_of_another_size(refused, ad, model):
    m = mask(ad/'ground_truth'/'cut'/'000_mask.png', (30, 40))
    refused(judge(model, ad.parent), m, '30 x 40', ad/'test'/'cut'/'000.png', f'{H} x {W}')

def test_empty_mask(refused, ad, model):
    m = mask(ad/'ground_truth'/'cut'/'000_mask.png', on=False)
    refused(judge(model, ad.parent), m, 'marks no pixel')

@pytest.mark.parametrize('how', ['empty', 'text', 'half', 'header'])
def test_broken_mask(refused, ad, model, how):
    m = ad/'ground_truth'/'cut'/'000_mask.png'
    broken(m, how)
    refused(judge(model, ad.parent), m, 'cannot be read as a mask')

def test_mask_without_image_and_image_without_mask(refused, ad, model):
    m = mask(ad/'ground_truth'/'cut'/'001_mask.png')
    refused(judge(model, ad.parent), m, 'without an image')
    m.unlink()
    p = picture(ad/'test'/'cut'/'002.png')
    refused(judge(model, ad.parent), p, 'no mask')

# Settings

@pytest.mark.parametrize('words, says', [
    ('--backbone vgg16', ["no backbone 'vgg16'", 'resnet50']), ('--stages 2,7', ['no stage 7', 'stages 1 to 3']),
    ('--stages 4', ['no stage 4']),
    ('--stages 0', ['no stage 0']), ('--stages 2,2', ['2 twice']), ('--alphas 0,1.5', ['α', '1.5']),
    ('--alphas -0.1', ['α', '-0.1']), ('--alphas nan', ['α', 'nan']),
    ('--alphas 0.3,0.3', ['twice']), ('--eps 0', ['eps', '0']), ('--eps -1', ['eps', '-1']),
    ('--eps nan', ['eps', 'nan']), ('--eps inf', ['eps', 'inf']),
    ('--n 0', ['n must be', '0']), ('--n -4', ['n must be', '-4']), ('--batch-size 0', ['batch', '0']),
    ('--batch-size -1', ['batch', '-1']), ('--epochs 0', ['epochs']),
    ('--iterations 0', ['iterations']), ('--eta 1.1', ['eta', '1.1']), ('--eta nan', ['eta', 'nan']),
    ('--seed -1', ['seed', '-1']), ('--image-size 0', ['image_size', '0'])])
def test_settings_out_of_range(refused, ad, words, says):
    name, value = words.split()
    refused(fit(ad.parent, f'{name}={value}'), *says)

@pytest.mark.parametrize('words, says', [
    ('--stages=two', ['two']), ('--alphas=', ['numbers']), ('--n=many', ['many']), ('--n=1.5', ['1.5']),
    ('--image-size=big', ['big']),
    ('--image-size=3x4x5', ['3x4x5']), ('--frobnicate=3', ['frobnicate']), ('--dataset=coco', ['coco', 'mvtec_ad'])])
def test_words_that_mean_nothing(refused, ad, words, says): refused(fit(ad.parent, words), '--help', *says, status=2)

def test_negative_numbers_need_no_equals_sign(refused, ad):
    refused(fit(ad.parent, '--eps', '-1'), 'eps', '-1')
    refused(fit(ad.parent, '--alphas', '-0.5'), 'α', '-0.5')

def test_no_command_and_missing_words(run):
    for words in ([], ['fly'], ['fit'], ['predict'], ['predict', 'm.safetensors', 'a.png']):
        code, out, err = run(*words)
        assert code == 2 and out == '' and err.count('\n') == 1 and '--help' in err

def test_an_eps_too_small_for_float32(refused, ad):
    refused(fit(ad.parent, '--eps', '1e-7'), '1e-07', 'too small', '--eps')

def test_a_batch_larger_than_the_set_shrinks_and_says_so(run, ad):
    code, out, err = run(*fit(ad.parent, '--batch-size', '64'))
    assert code == 0 and 'Traceback' not in err
    notes = [l for l in err.splitlines() if '64' in l and '5' in l and 'batch size' in l]
    assert len(notes) == 1 and notes[0].startswith('note: ')
    assert Path('out/m.safetensors').stat().st_size > 1000

def test_a_model_of_one_image(run, ad):
    for p in sorted((ad/'train'/'good').iterdir())[1:]: p.unlink()
    code, out, err = run(*fit(ad.parent))
    assert code == 0 and 'lowered from 4 to 1' in err

# Weights

@pytest.fixture(scope='module')
def weights(): return load_file(SMALL)

def test_missing_weights(refused, ad):
    refused(fit(ad.parent, '--weights', 'no/such.pth'), 'no/such.pth', 'no weights file')
    refused(fit(ad.parent, '--weights', str(ad)), ad)
    refused(fit(ad.parent, '--weights', 'imagenet'), 'small', '--weights')

def test_weights_with_keys_that_lack_or_are_too_many(refused, ad, weights, tmp_path):
    path, key = tmp_path/'w.safetensors', 'layer3.0.conv1.weight'
    save_file({k: v for k, v in weights.items() if k != key}, path)
    refused(fit(ad.parent, '--weights', path), path, 'lacks', key)
    save_file(weights | {'layer2.7.conv1.weight': torch.ones(3)}, path)
    refused(fit(ad.parent, '--weights', path), path, 'surplus', 'layer2.7.conv1.weight')
    save_file(weights | {key: torch.ones(3, 3)}, path)
    refused(fit(ad.parent, '--weights', path), path, key, '(3, 3)')
    torch.save(weights | {'layer1.x': torch.ones(2)}, tmp_path/'w.pth')
    refused(fit(ad.parent, '--weights', tmp_path/'w.pth'), tmp_path/'w.pth', 'surplus', 'layer1.x')
    refused(fit(ad.parent, '--backbone', 'resnet18', '--weights', SMALL), 'small.safetensors', 'lacks', '--backbone')

@pytest.mark.parametrize('name', ['w.safetensors', 'w.pth'])
def test_weights_files_that_hold_none(refused, ad, tmp_path, name):
    path = tmp_path/name
    for content in (b'nothing', b'\0'*100, SMALL.read_bytes()[:5000]):
        path.write_bytes(content)
        refused(fit(ad.parent, '--weights', path), path)
    if name == 'w.pth':
        for content in ([1, 2], {'a': 3}, {}):
            torch.save(content, path)
            refused(fit(ad.parent, '--weights', path), path, 'dictionary of tensors')
        torch.save({'f': Path}, path)                                # would run code if it were unpickled
        refused(fit(ad.parent, '--weights', path), path)

@pytest.mark.parametrize('name', ['w.safetensors', 'w.pth'])
def test_empty_weights_files(refused, ad, tmp_path, name):
    (tmp_path/name).write_bytes(b'')
    refused(fit(ad.parent, '--weights', tmp_path/name), tmp_path/name)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_features_that_are_not_finite(refused, ad, weights, tmp_path, value):
    path = tmp_path/'w.safetensors'
    save_file(weights | {'layer2.0.bn1.weight': torch.full_like(weights['layer2.0.bn1.weight'], value)}, path)
    refused(fit(ad.parent, '--weights', path), 'stage 2', ad/'train'/'good'/'000.png', 'not finite', 'weights')

@pytest.fixture
def offline(monkeypatch, tmp_path):
    "No network, and an empty cache of weights, which is given"
    def refuse(*a, **k): raise urllib.error.URLError('no route to host')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    monkeypatch.setattr('urllib.request.urlopen', refuse)
    monkeypatch.setattr('torch.hub.urlopen', refuse, raising=False)
    cache = tmp_path/'torch'/'hub'/'checkpoints'
    cache.mkdir(parents=True)
    return cache

def test_imagenet_weights_that_cannot_be_downloaded(offline):
    with pytest.raises(InputError) as e: features.Backbone('resnet18', 'imagenet')
    for s in ('https://download.pytorch.org/models/resnet18-f37072fd.pth', 'no route to host',
        offline/'resnet18-f37072fd.pth',
              '--weights PATH', '--weights random', '--backbone small'): assert str(s) in str(e.value)
    assert '\n' not in str(e.value) and list(offline.iterdir()) == []

def test_a_failed_download_says_nothing_else(refused, ad, offline):
    refused(fit(ad.parent, '--backbone', 'resnet18'), 'no route to host', '--weights random')

def test_half_a_download_is_named(refused, ad, offline):
    (offline/'resnet18-f37072fd.pth').write_bytes(b'half a download')
    refused(fit(ad.parent, '--backbone', 'resnet18'), offline/'resnet18-f37072fd.pth')

# Model files

def test_model_files_that_cannot_be_used(refused, ad, model, tmp_path):
    refused(predict(tmp_path/'no.safetensors', ad/'test'), tmp_path/'no.safetensors', 'no model')
    refused(judge(tmp_path/'no.safetensors', ad.parent), tmp_path/'no.safetensors', 'no model')
    refused(predict(ad, ad/'test'), ad)
    refused(predict(SMALL, ad/'test'), SMALL, 'not a model of pradot')
    whole, path = model.read_bytes(), tmp_path/'m.safetensors'
    for n in (0, 5, 100, 1500, len(whole)//2, len(whole) - 1):
        path.write_bytes(whole[:n])
        refused(predict(path, ad/'test'), path, 'damaged')
        refused(judge(path, ad.parent), path, 'damaged')
    path.write_bytes(whole.replace(b'"format":"%d"' % FORMAT, b'"format":"%d"' % (FORMAT + 1)))
    refused(predict(path, ad/'test'), path, 'newer', 'upgrade')
    picture(tmp_path/'p.png')
    refused(predict(tmp_path/'p.png', ad/'test'), tmp_path/'p.png', 'no model file')

# Output

def test_output_that_cannot_be_written(refused, ad, model, tmp_path):
    file = tmp_path/'file'
    file.write_text('in the way')
    words = fit(ad.parent); words[words.index('out/m.safetensors')] = file/'m.safetensors'
    refused(words, file, 'cannot be written')
    words[words.index(file/'m.safetensors')] = tmp_path/'ad'
    refused(words, tmp_path/'ad', 'cannot be written', 'folder')
    words = judge(model, ad.parent); words[words.index('out/metrics.json')] = file/'x.json'
    refused(words, file, 'cannot be written')
    refused(predict(model, ad/'test', out=file), file, 'cannot be written')
    refused(predict(model, ad/'test', out=file/'x'/'y'), file, 'cannot be written')
    refused(['demo', '--out', file], file, 'cannot be written')
    assert file.read_text() == 'in the way'

def test_a_folder_where_a_file_of_the_results_goes(refused, ad, model, tmp_path):
    (tmp_path/'results'/'scores.csv').mkdir(parents=True)
    refused(predict(model, ad/'test', out=tmp_path/'results'), 'scores.csv', 'cannot be written')

def test_a_file_where_a_folder_of_the_results_goes(refused, ad, model, tmp_path):
    (tmp_path/'results').mkdir(); (tmp_path/'results'/'overlays').write_text('in the way')
    refused(predict(model, ad/'test', out=tmp_path/'results'), 'overlays', 'cannot be written')

def test_a_full_disk(refused, ad, model, monkeypatch, tmp_path):
    import errno
    def full(*a, **k): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(pd.DataFrame, 'to_csv', full)
    refused(predict(model, ad/'test', out=tmp_path/'results'), tmp_path/'results', 'No space left')

def test_a_full_disk_while_saving_a_model(refused, ad, monkeypatch, tmp_path):
    from safetensors import SafetensorError
    def full(*a, **k): raise SafetensorError('Error while serializing: I/O error: No space left on device')
    monkeypatch.setattr('safetensors.torch.save_file', full)
    words = fit(ad.parent, '--iterations', '2000')                   # Sinkhorn converges, so there is no note
    words[words.index('out/m.safetensors')] = tmp_path/'m.safetensors'
    refused(words, tmp_path/'m.safetensors', 'No space left', 'cannot be written')

def test_results_that_are_there_already_are_replaced_and_others_stay(run, ad, model, tmp_path):
    (tmp_path/'results').mkdir(); (tmp_path/'results'/'mine.txt').write_text('keep')
    for _ in range(2): assert run(*predict(model, ad/'test', out=tmp_path/'results'))[0] == 0
    assert sorted(os.listdir(tmp_path/'results')) == ['maps', 'mine.txt', 'overlays', 'scores.csv', 'scores.json']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ad', 'here', 'results']

@pytest.mark.parametrize('break_it', ['image', 'memory'])
def test_a_failure_in_the_middle_leaves_old_results_as_they_were(refused, run, ad, model, tmp_path, monkeypatch,
    break_it):
    assert run(*predict(model, ad/'test', out=tmp_path/'results'))[0] == 0
    if break_it == 'image': broken(ad/'train'/'good'/'004.png', 'half')
    else: monkeypatch.setattr(cli, 'overlay', failing(MemoryError(), after=3))
    says = '004.png' if break_it == 'image' else 'memory'
    refused(predict(model, ad/'test', ad/'train', out=tmp_path/'results'), says)

# The machine

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('device', ['cuda', 'cuda:1', 'mps', 'abacus', 'xpu'])
def test_a_device_that_is_not_there(refused, ad, model, device):
    refused(fit(ad.parent, '--device', device), device, '--device cpu')
    refused(predict(model, ad/'test') + ['--device', device], device, '--device cpu')
    refused(judge(model, ad.parent) + ['--device', device], device, '--device cpu')

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_the_demo_on_a_device_that_is_not_there(refused, monkeypatch, tmp_path):
    from pradot.toy import tray
    monkeypatch.setattr(cli, 'tray', lambda seed: tray(tmp_path/'toy', seed, (64, 72), 2, 1, 1, 1, 1))
    refused(['demo', '--device', 'cuda'], 'cuda', '--device cpu')

def failing(e, after=0):
    "A function that raises at its call number `after`, and gives a picture before that"
    calls = []
    def f(*a, **k):
        calls.append(1)
        if len(calls) > after: raise e
        return Image.new('RGB', (4, 4))
    return f

OUT_OF_MEMORY = [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB.'), MemoryError(),
    RuntimeError('[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can\'t allocate memory: '
        'you tried to allocate 4611686018427387904 bytes. Error code 12'),
    RuntimeError('[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: '
        'you tried to allocate 4611686018427387904 bytes.'),              # on Windows, and where malloc gives NULL
    RuntimeError('MPS backend out of memory (MPS allocated: 8 GB)')]      # on a Mac

@pytest.mark.parametrize('error', OUT_OF_MEMORY)
def test_out_of_memory_names_the_knobs(refused, ad, model, monkeypatch, error):
    monkeypatch.setattr(prototypes, 'normalised_cost', failing(error))
    err = refused(fit(ad.parent), 'out of memory', '--batch-size', '--n', '--image-size')
    monkeypatch.setattr(features.Backbone, 'forward', failing(error))
    refused(fit(ad.parent), 'out of memory', '--image-size')
    refused(predict(model, ad/'test'), 'out of memory')

def test_what_torch_says_when_memory_runs_out():
    with pytest.raises(InputError, match='out of memory; lower --n'):
        with memory_advice('--n'): torch.empty(2**58)
    with pytest.raises(InputError, match='out of memory; lower --n'):
        with memory_advice('--n'): np.empty(2**55)
    with pytest.raises(RuntimeError, match='shapes'):
        with memory_advice('--n'): torch.ones(2, 3) @ torch.ones(2, 3)

def test_predict_names_a_knob_that_it_has(refused, ad, model, monkeypatch):
    monkeypatch.setattr(features.Backbone, 'forward', failing(MemoryError()))
    err = refused(predict(model, ad/'test'), 'out of memory')
    assert '--device cpu' not in err                                 # it is on the CPU
    assert 'batch size' not in err and 'size of the maps' not in err # there are no words for them

@pytest.mark.parametrize('where', ['fit', 'predict', 'evaluate'])
def test_interrupted(refused, ad, model, monkeypatch, where):
    if where == 'fit':
        monkeypatch.setattr(prototypes, 'normalised_cost', failing(KeyboardInterrupt()))
        refused(fit(ad.parent), 'stopped', 'nothing was written', status=130)
    elif where == 'predict':
        monkeypatch.setattr(cli, 'overlay', failing(KeyboardInterrupt(), after=1))
        refused(predict(model, ad/'test', out='results'), 'stopped', 'nothing was written', status=130)
    else:
        monkeypatch.setattr(features.Backbone, 'forward', failing(KeyboardInterrupt()))
        refused(judge(model, ad.parent), 'stopped', 'nothing was written', status=130)

def test_interrupted_while_python_tidies_up(refused, ad, model, monkeypatch):
    class Kept: pass
    def tidied(*_):
        kept, link = (k := Kept()), weakref.ref(k, failing(KeyboardInterrupt()))      # an exception there is lost
        del kept, k
        end = time.monotonic() + 30
        while time.monotonic() < end: time.sleep(0.01)
        raise AssertionError('it went on')
    monkeypatch.setattr(features.Backbone, 'forward', tidied)
    refused(judge(model, ad.parent), 'stopped', 'nothing was written', status=130)

def test_a_failure_leaves_no_folders_on_the_way_to_the_output(refused, ad, model):
    broken(ad/'test'/'good'/'000.png', 'half')
    refused(predict(model, ad/'test', out='not/there/yet'), '000.png')

# What looks odd and is fine

def scores(run, model, *images):
    code, out, err = run(*predict(model, *images))
    assert code == 0 and 'not calibrated' in err and err.count('\n') == 1, err
    table = pd.read_csv('results/scores.csv')
    sizes = [Image.open(Path('results')/m).size for m in table['map']]
    return table.score.tolist(), sizes, [Path(p).name for p in table.image]

def test_image_formats(run, model, tmp_path):
    im = Image.open(picture(tmp_path/'rgb.png'))
    grey, here = im.convert('L'), tmp_path/'in'
    here.mkdir()
    im.save(here/'a_rgb.png'); im.convert('RGBA').save(here/'b_rgba.png'); im.save(here/'c.bmp'); im.save(here/'d.tif')
    im.save(here/'e.webp', lossless=True)
    im.transpose(Image.Transpose.ROTATE_90).save(here/'f_exif.png', exif=bytes_of_orientation(6))
    im.convert('CMYK').save(here/'g_cmyk.jpg', quality=100, subsampling=0)
    im.save(here/'h_rgb.jpg', quality=100, subsampling=0)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16)*257)
    grey.save(here/'i_grey.png'); deep.save(here/'j_16.png'); grey.convert('LA').save(here/'k_la.png')
    deep.save(here/'l_16.tif'); im.quantize(64).save(here/'m_palette.png'); grey.convert('1').save(here/'n_bits.png')
    s, sizes, names = scores(run, model, here)
    s = dict(zip((n[0] for n in names), s))
    assert sizes == [(W, H)]*14
    assert s['b'] == s['c'] == s['d'] == s['e'] == s['f'] == s['a'] and s['j'] == s['k'] == s['l'] == s['i']
    assert s['h'] == pytest.approx(s['a'], rel=0.1) and s['g'] == pytest.approx(s['a'], rel=0.1)
    assert min(s.values()) > 0

def bytes_of_orientation(n):
    e = Image.Exif(); e[0x0112] = n
    return e

def test_floating_point_images_are_refused(refused, model, tmp_path):
    Image.fromarray(np.zeros((40, 40), np.float32)).save(tmp_path/'f.tif')
    refused(predict(model, tmp_path/'f.tif'), tmp_path/'f.tif', 'floating-point', '8 or 16 bits')

def test_file_names_with_spaces_and_letters_of_all_kinds(run, ad, model, tmp_path):
    here = tmp_path/'mit Leerzeichen'/'ünïcode 部品'
    names = ['ein Bild.png', 'naïve 部品 (1).PNG', 'a,b"c.png', '%s {x}.png', "it's.png", '-n.png', 'a.b.png',
        'x\u0301.jpg']
    for i, n in enumerate(names): picture(here/n, seed=i)
    picture(here/'ein Bild.jpg'); picture(here/'deep'/'a.png'); picture(here/'deep_a.png'); picture(here/'.hidden.png')
    s, sizes, got = scores(run, model, here)
    assert sorted(got) == sorted([*names, 'ein Bild.jpg', 'a.png', 'deep_a.png'])
    assert len(os.listdir('results/maps')) == len(got)
    out = here/'mein Modell ☃.safetensors'
    assert run('fit', '--dataset', 'folder', '--data', here.parent, '--category', here.name, '--out', out,
        *LIGHT)[0] == 0
    assert run(*predict(out, here/'ein Bild.png', here/'ein Bild.png', out=here/'Ergebnisse ☃'))[0] == 0
    table = pd.read_csv(here/'Ergebnisse ☃'/'scores.csv')
    assert table['map'].tolist() == ['maps/ein Bild.tiff', 'maps/ein Bild_2.tiff']

def test_a_huge_image_is_refused_in_one_sentence(refused, model, tmp_path):
    path = tmp_path/'bomb.png'
    Image.new('1', (20000, 20000)).save(path)
    refused(predict(model, path), path, 'cannot be read')

# As a program

def program(*words, **how):
    script = shutil.which('pradot', path=str(Path(sys.executable).parent))
    start = [script] if script else [sys.executable, '-c', 'import sys; from pradot.cli import main; sys.exit(main())']
    return subprocess.Popen([*start, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding='utf-8', **how)

def test_the_program_fails_with_one_sentence(tmp_path):
    with program('predict', 'no.safetensors', tmp_path, '--out', 'x', cwd=tmp_path,
        env=os.environ | {'LC_ALL': 'C', 'PYTHONUTF8': '1'}) as p:
        out, err = p.communicate(timeout=120)
    assert p.returncode == 1 and out == '' and err.count('\n') == 1
    assert 'holds no image' in err and list(tmp_path.iterdir()) == []

@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_the_program_is_interrupted(model, tmp_path):
    fifo = tmp_path/'slow.png'                                       # an image that never comes
    os.mkfifo(fifo)
    before = signal.signal(signal.SIGINT, signal.default_int_handler) # it is ignored in the background
    try: p = program(*predict(model, fifo), cwd=tmp_path)
    finally: signal.signal(signal.SIGINT, before)
    with p:
        deadline, writer = time.monotonic() + 120, None
        while writer is None and p.poll() is None and time.monotonic() < deadline:
            try: writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK) # works once the program waits for it
            except OSError: time.sleep(0.1)
        assert writer is not None, p.communicate()
        p.send_signal(signal.SIGINT)
        time.sleep(0.5)
        os.close(writer)
        out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and out == '' and err == 'pradot predict: stopped; nothing was written\n'
    assert [*tmp_path.iterdir()] == [fifo]
