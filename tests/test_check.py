"pradot.data.check on tiny data sets with one fault after another, and on the real images that are at hand"
import io, json, sys

import numpy as np
import pytest
from PIL import Image

from pradot.data import PUBLISHED, Defect, InputError, check, defect_of, mask_value, miscounts

def png(seed=0, size=(20, 30)):
    a = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return encoded(Image.fromarray(a))

def encoded(im):
    f = io.BytesIO()
    im.save(f, 'PNG')
    return f.getvalue()

def mask(value=255, size=(20, 30), dtype=np.uint8, more=()):
    "A square of `value`, and one pixel of each value in `more`"
    a = np.zeros(size, dtype)
    a[2:8, 3:9] = value
    for x, v in enumerate(more): a[15, x] = v
    return encoded(Image.fromarray(a))

def entry(value, **more):
    return dict(defect_name=f'defect {value}', pixel_value=value, saturation_threshold=.5,
                relative_saturation=True) | more

def config(*entries): return json.dumps(entries).encode()

AD = {f'{part}/{i:03}.png': png(i) for part, n in {'train/good': 4, 'test/good': 2, 'test/dent': 3}.items()
      for i in range(n)} | {f'ground_truth/dent/{i:03}_mask.png': mask() for i in range(3)}

TRUTH = 'ground_truth/logical_anomalies/000'
LOCO = {
    'train/good/000.png': png(0), 'validation/good/000.png': png(1), 'test/good/000.png': png(2),
    'test/logical_anomalies/000.png': png(3), f'{TRUTH}/000.png': mask(255), f'{TRUTH}/001.png': mask(254),
    'test/structural_anomalies/000.png': png(4), 'ground_truth/structural_anomalies/000/000.png': mask(253),
    'defects_config.json': config(entry(255), entry(254, saturation_threshold=40, relative_saturation=False),
                                  entry(253))}

def put(root, files):
    "Write files; None removes one"
    for k, v in files.items():
        (root/k).parent.mkdir(parents=True, exist_ok=True)
        if v is None: (root/k).unlink()
        else: (root/k).write_bytes(v)

def counts(table): return {(r.category, r.part): r.images for r in table.itertuples()}

def faults(root):
    "What `check` says; each on one line, as many as the table counts for files"
    table, said = check(root)
    assert all(isinstance(s, str) and s and '\n' not in s for s in said)
    return table, said

@pytest.mark.parametrize('files', [AD, LOCO], ids=['ad', 'loco'])
def test_a_whole_set_has_no_fault(files, tmp_path):
    put(tmp_path/'a', files)
    table, said = faults(tmp_path)
    assert said == [] and table.problems.sum() == 0 and table.published.isna().all() and table.masks.sum() == 3
    assert (table.part.tolist() == ['train/good', 'test/good', 'test/anomalous']) == (files is AD)

# ---- the published counts

def test_published_counts(tmp_path):
    put(tmp_path/'bottle', AD)
    put(tmp_path/'bottle', {'train/good/002.png': None})
    table, said = faults(tmp_path)
    assert counts(table) == {('bottle', 'train/good'): 3, ('bottle', 'test/good'): 2, ('bottle', 'test/anomalous'): 3}
    assert table.published.tolist() == [209, 20, 63] and table.masks.tolist() == [0, 0, 3] and table.problems.sum() == 0
    assert len(said) == 4 and 'lacks 14 of the 15 categories of MVTec AD' in said[0]
    assert 'train/good has 3 images where MVTec AD has 209; missing: 002, 004, 005, 006, 007 and others' in said[1]
    assert said[3].endswith('anomalous has 3 images where MVTec AD has 63')

def test_published_counts_of_loco(tmp_path):
    "A category that is not there at all but for its folder has a row and a sentence for each part"
    put(tmp_path/'pushpins', LOCO)
    (tmp_path/'screw_bag').mkdir()
    table, said = faults(tmp_path)
    assert len(table) == 10 and table.published.sum() == sum(map(sum, (PUBLISHED['mvtec_loco'].counts[c]
                                                                       for c in ('pushpins', 'screw_bag'))))
    assert 'lacks 3 of the 5 categories of MVTec LOCO AD: breakfast_box, juice_bottle, splicing' in said[0]
    assert sum('screw_bag' in s and 'has 0 images' in s for s in said) == 5
    assert any('screw_bag' in s and 'defects_config.json does not exist' in s for s in said)
    assert len(said) == 1 + 5 + 5 + 1

@pytest.mark.parametrize('name', PUBLISHED)
def test_a_set_with_the_published_counts_is_whole(name, tmp_path, monkeypatch):
    "Published counts of two and one instead of hundreds: nothing is missing, then one file is, then one too many"
    files = LOCO if name == 'mvtec_loco' else AD
    made = PUBLISHED[name]
    numbers = (1,)*5 if name == 'mvtec_loco' else (4, 2, 3)
    monkeypatch.setitem(PUBLISHED, name, type(made)(made.title, made.parts, dict(one=numbers, two=numbers)))
    for c in ('one', 'two'): put(tmp_path/c, files)
    table, said = faults(tmp_path)
    assert said == [] and table.images.tolist() == table.published.tolist() == [*numbers]*2
    put(tmp_path/'one', {'test/good/000.png': None})
    put(tmp_path/'two', {'train/good/900.png': png()})
    here = PUBLISHED[name]
    assert miscounts(tmp_path/'two', here) == [f'{tmp_path/"two/train/good"} has {numbers[0] + 1} images '
                                               f'where {made.title} has {numbers[0]}']
    table, said = faults(tmp_path)
    assert said == miscounts(tmp_path/'one', here) + miscounts(tmp_path/'two', here)
    assert str(tmp_path/'one'/'test'/'good') in said[0] and f'where {made.title} has' in said[0] and len(said) == 2

# ---- each fault, alone and then all together

AD_FAULTS = {
    'no image': ({'train/good/000.png': b'hello'}, 'train/good/000.png cannot be read as an image', 0),
    'empty image': ({'test/good/000.png': b''}, 'it is empty', 1),
    'cut image': ({'test/dent/001.png': png()[:1000]}, 'truncated', 2),
    'cut mask': ({'ground_truth/dent/001_mask.png': mask()[:50]}, '001_mask.png cannot be read as a mask', 2),
    'black mask': ({'ground_truth/dent/001_mask.png': mask(0)}, '001_mask.png marks no pixel', 2),
    'size of a mask': ({'ground_truth/dent/002_mask.png': mask(size=(30, 20))},
                       '002_mask.png is 30 x 20 pixels but its image', 2),
    'mask missing': ({'ground_truth/dent/001_mask.png': None}, 'dent/001.png is anomalous but has no mask', 2),
    'orphan mask': ({'ground_truth/dent/003_mask.png': mask()}, '003_mask.png is a mask without an image', None),
    'orphan kind': ({'ground_truth/bent/000_mask.png': mask()}, 'bent/000_mask.png is a mask without', None),
    'mask of a good image': ({'ground_truth/good/000_mask.png': mask()}, 'good/000_mask.png is a mask without', None),
    'part missing': ({'test/good/000.png': None, 'test/good/001.png': None}, 'test/good has no image', None)}

LOCO_FAULTS = {
    'unknown value': ({f'{TRUTH}/000.png': mask(9)},
                      '000.png holds the value 9, which defects_config.json does not list (it has [253, 254, 255])', 3),
    'several values': ({f'{TRUTH}/001.png': mask(254, more=[255, 3])}, 'holds the values [3, 254, 255]', 3),
    'size of a mask': ({f'{TRUTH}/001.png': mask(254, (20, 31))}, '20 x 31 pixels but its image', 3),
    '16-bit value': ({f'{TRUTH}/000.png': mask(511, dtype=np.uint16)}, 'holds the value 511', 3),
    'cut mask': ({f'{TRUTH}/000.png': mask()[:50]}, 'cannot be read as a mask', 3),
    'masks missing': ({f'{TRUTH}/000.png': None, f'{TRUTH}/001.png': None}, '000.png is anomalous but has no mask', 3),
    'orphan mask': ({'ground_truth/logical_anomalies/007/000.png': mask()}, '007/000.png is a mask without', None),
    'mask beside its folder': ({'ground_truth/logical_anomalies/000.png': mask()}, 'is a mask without', None),
    'config missing': ({'defects_config.json': None}, 'defects_config.json does not exist', None),
    'config no JSON': ({'defects_config.json': b'{'}, 'is not JSON', None),
    'config no list': ({'defects_config.json': b'{}'}, 'must hold a list', None),
    'entry without a field': ({'defects_config.json': b'[{"defect_name": "x"}]'}, 'entry 0: needs defect_name', None),
    'entry twice': ({'defects_config.json': config(entry(255), entry(255))},
                    'entry 1: pixel_value 255 stands twice', None),
    'share above 1': ({'defects_config.json': config(entry(255, saturation_threshold=2))}, 'at most 1', None)}

def of_loco(tmp_path):
    "Where a set without a config would not be known as LOCO's but for its name"
    return tmp_path/'juice_bottle'

@pytest.mark.parametrize('fault', AD_FAULTS)
def test_each_fault(fault, tmp_path):
    put(tmp_path/'a', AD)
    files, why, row = AD_FAULTS[fault]
    put(tmp_path/'a', files)
    table, said = faults(tmp_path)
    assert len(said) == 1 and why in said[0] and str(tmp_path/'a') in said[0]
    assert table.problems.tolist() == [int(i == row) for i in range(3)]

@pytest.mark.parametrize('fault', LOCO_FAULTS)
def test_each_fault_of_loco(fault, tmp_path):
    put(of_loco(tmp_path), LOCO)
    before = check(tmp_path)[1]                                       # the counts are not the published ones
    files, why, row = LOCO_FAULTS[fault]
    put(of_loco(tmp_path), files)
    table, said = faults(tmp_path)
    new = [s for s in said if s not in before]
    assert len(said) == len(before) + 1 and len(new) == 1 and why in new[0] and str(of_loco(tmp_path)) in new[0]
    assert table.problems.tolist() == [int(i == row) for i in range(5)]

def test_without_a_config_several_values_are_still_a_fault(tmp_path):
    put(of_loco(tmp_path), LOCO | {f'{TRUTH}/000.png': mask(9), f'{TRUTH}/001.png': mask(254, more=[255])})
    put(of_loco(tmp_path), {'defects_config.json': b'nothing'})
    said = [s for s in faults(tmp_path)[1] if 'MVTec' not in s]
    assert len(said) == 2 and 'is not JSON' in said[0] and 'holds the values [254, 255]' in said[1]

def test_all_faults_at_once(tmp_path):
    put(tmp_path/'a', LOCO)
    files = {
        f'{TRUTH}/001.png': (mask(254, (20, 31)), '20 x 31 pixels but its image'),
        'ground_truth/logical_anomalies/007/000.png': (mask(), '000.png is a mask without an image'),
        f'{TRUTH}/000.png': (png()[:300], 'cannot be read as a mask'),
        'test/logical_anomalies/001.png': (png(), '001.png is anomalous but has no mask'),
        'ground_truth/structural_anomalies/000/000.png': (mask(7), 'holds the value 7'),
        'test/good/000.png': (b'', 'it is empty'),
        'train/good/000.png': (png(0)[:1000], 'truncated'),
        'defects_config.json': (config(entry(253, pixel_value=0)), 'entry 0: pixel_value must be')}
    for i, (name, (data, why)) in enumerate(files.items(), 1):
        put(tmp_path/'a', {name: data})
        table, said = faults(tmp_path)
        listed = name != 'defects_config.json'                       # without a config no value is unknown
        assert len(said) == i - (not listed) and any(why in s for s in said), (name, said)
    assert table.problems.tolist() == [1, 0, 1, 3, 0]

def test_a_mask_of_an_unreadable_image_is_still_read(tmp_path):
    put(tmp_path/'a', LOCO | {'test/logical_anomalies/000.png': b'', f'{TRUTH}/000.png': mask(8)})
    said = faults(tmp_path)[1]
    assert len(said) == 2 and 'it is empty' in said[0] and 'holds the value 8' in said[1]

def test_hidden_files_and_other_files_are_no_fault(tmp_path):
    put(tmp_path/'a', AD | {'train/good/.hidden.png': b'', 'train/good/Thumbs.db': b'', 'readme.txt': b'x'})
    put(tmp_path, {'license.txt': b'x', '.part/train/good/000.png': b''})
    assert faults(tmp_path)[1] == []

def test_no_data_set(tmp_path):
    for where, says in ((tmp_path/'nowhere', 'is not a folder'), (tmp_path, 'holds no category')):
        with pytest.raises(InputError, match=says) as e: check(where)
        assert str(where) in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('terminal', [True, False])
def test_a_bar_in_a_terminal_only(terminal, tmp_path, monkeypatch, capsys):
    put(tmp_path/'a', AD)
    class Terminal(io.StringIO):
        def isatty(self): return terminal
    err = Terminal()
    monkeypatch.setattr(sys, 'stderr', err)
    check(tmp_path)
    assert ('9/9' in err.getvalue()) == terminal and capsys.readouterr().out == ''

# ---- values

def test_values_of_masks():
    kinds = Defect('label', 255, 2, False), Defect('scratch', 254, .5, True)
    assert defect_of(np.array([[0, 254], [254, 0]]), kinds).name == 'scratch'
    assert mask_value(np.array([[0, 7]])) == 7
    for m, says in (([[0, 0]], 'marks no pixel'), ([[1, 255]], r'values \[1, 255\]'), ([[0, 9]], 'does not list')):
        with pytest.raises(InputError, match=says) as e: defect_of(np.array(m), kinds, 'gt/000.png')
        assert str(e.value).startswith('gt/000.png')

# ---- real images

def test_the_bottle_at_hand_is_complete(shared):
    table, said = faults(shared/'mvtec_ad')
    bottle = table[table.category == 'bottle']
    assert bottle.images.tolist() == bottle.published.tolist() == [209, 20, 63] and bottle.problems.sum() == 0
    assert not any('bottle' in s.split(' categories ')[0] for s in said)

def test_the_juice_bottle_at_hand_lacks_images_but_has_no_bad_file(shared):
    table, said = faults(shared/'mvtec_loco')
    juice = table[table.category == 'juice_bottle'].set_index('part')
    assert juice.images['train/good'] == 335 and juice.masks['test/logical_anomalies'] == 142
    assert juice.problems.sum() == 0 and all(' lacks ' in s or ' images where ' in s for s in said)
