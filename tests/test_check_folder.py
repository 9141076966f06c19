"`pradot check FOLDER`, and folders of one's own images"
import json

import numpy as np
import pytest
from PIL import Image

from pradot.check import examine, look, shown, survey
from pradot.data import InputError, folder

def picture(path, seed=0, size=(40, 40), mode='RGB'):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(a).convert(mode).save(path)
    return path

@pytest.fixture
def mine(tmp_path):
    for i in range(10): picture(tmp_path/f'my/good/{i}.png', i)
    for i in range(2): picture(tmp_path/f'my/bent/{i}.png', 50 + i)
    return tmp_path/'my'

def kinds(here, **k): return {f.kind: f for f in examine(here, k.get('n', 2), k.get('batch_size', 4), False)[1]}

def test_nothing_wrong(mine, run):
    assert kinds(mine) == {}
    status, out, err = run('check', mine, '--n', 2, '--batch-size', 4)
    assert (status, err) == (0, '') and 'nothing wrong' in out

@pytest.mark.parametrize('kind,spoil', [
    ('duplicate', lambda d: (d/'good/copy.png').write_bytes((d/'good/0.png').read_bytes())),
    ('leak', lambda d: (d/'bent/copy.png').write_bytes((d/'good/0.png').read_bytes())),
    ('near-duplicate', lambda d: Image.open(d/'good/3.png').save(d/'bent/near.jpg', quality=95)),
    ('unreadable', lambda d: (d/'good/cut.png').write_bytes((d/'good/0.png').read_bytes()[:900])),
    ('sizes', lambda d: picture(d/'good/wide.png', 70, (40, 60))),
    ('modes', lambda d: picture(d/'good/grey.png', 71, mode='L')),
    ('flat', lambda d: Image.new('RGB', (40, 40)).save(d/'good/black.png')),
    ('blurred', lambda d: Image.fromarray(np.random.default_rng(9).integers(0, 256, (4, 4, 3), np.uint8)).resize((40, 40), 2)
     .save(d/'good/blurred.png')),
    ('mask', lambda d: picture(d/'ground_truth/bent/9_mask.png'))])
def test_each_fault_is_found(mine, kind, spoil, run, tmp_path):
    spoil(mine)
    assert kinds(mine)[kind].problem
    status, out, err = run('check', mine, '--n', 2, '--batch-size', 4, '--out', tmp_path/'c.json')
    assert status == 1 and 'problem: ' in out and err == ''
    assert kind in {f['kind'] for f in json.loads((tmp_path/'c.json').read_text())['findings']}

def test_a_mask_of_another_size(mine):
    picture(mine/'ground_truth/bent/0_mask.png', size=(20, 20), mode='L')
    assert 'must agree' in kinds(mine)['mask'].text

def test_few_images(mine):
    assert kinds(mine, n=16)['few'].problem and not kinds(mine, batch_size=64)['few'].problem

def test_a_newline_in_a_name_is_escaped(mine):
    (mine/'good/a\nb.png').write_bytes(b'no image')
    assert '\n' not in kinds(mine)['unreadable'].text and shown('a\nb') == 'a\\nb'

def test_what_is_no_folder_is_refused(refused, tmp_path):
    refused(['check', tmp_path/'nowhere'], 'is not a folder')
    with pytest.raises(InputError): survey(tmp_path)

def test_survey_lists_what_folder_reads(mine):
    c, (parts, orphans) = folder(mine), survey(mine)
    assert orphans == [] and {r.path for r in parts['train']} == {r.path for r in (*c.train, *c.test) if r.kind == 'good'}
    assert parts['test/bent'] == [r for r in c.test if r.kind == 'bent'] and len(c.train) == 8

def test_good_alone_is_all_training(tmp_path):
    for i in range(3): picture(tmp_path/f'good/{i}.png', i)
    assert (len(folder(tmp_path).train), folder(tmp_path).test) == (3, ())

def test_a_vanished_file_is_a_finding(mine):
    r = survey(mine)[0]['train'][0]
    r.path.unlink()
    assert 'does not exist' in look('train', r)[1][0]
