"The report: one page without a network, whatever files are called; nothing half-written."
import base64
import errno
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pradot.data import InputError
from pradot.decision import verdict
from pradot.detector import LIGHT, Pradot
from pradot.figures import assignments, patches, restore, untile
from pradot.report import SIDE, atlas, entry, jpeg, packed, page
from pradot.toy import tray

ODD = ['<script>alert(1)<|script>.png', 'line\nbreak.png', 'ü 図 é.png', '"quotes\' & <b>.png', '--out.png', "x' onerror='alert(1).png"]

@pytest.fixture(scope='module')
def toy(): return tray(size=(96, 96), train=16, validation=60, good=8, logical=8, structural=8)

@pytest.fixture(scope='module')
def model(toy):
    with pytest.warns(UserWarning):
        model = Pradot(LIGHT, 'cpu', image_size=64, n=1, batch_size=8, epochs=1).fit(toy.train)
    return model.calibrate(toy.validation)

@pytest.fixture(scope='module')
def kept(model, toy): return [entry(model, r, a, verdict(a, model.calibration, .3)) for r, a, _ in model.stream(toy.test)]

class Seen(HTMLParser):
    "Tags with their attributes, and text"
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], '', []
        self.feed(text)
    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data
    def all(self, tag): return [a for t, a in self.tags if t == tag]

def data(text): return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])

def test_one_page_without_a_network(model, kept, toy):
    text = page(model, kept, .3, toy.train)
    seen = Seen(text)
    for tag, attrs in seen.tags:
        for k in ('src', 'href', 'action', 'data', 'srcset', 'poster'):
            assert k not in attrs or attrs[k].startswith('data:image/jpeg;base64,'), (tag, attrs[k][:80])
    assert "default-src 'none'" in seen.all('meta')[1]['content'] and 'url(' not in text and '@import' not in text
    assert len(seen.all('script')) == 2 and len(seen.all('details')) == len(kept)
    assert all(a['alt'] and a['loading'] == 'lazy' for a in seen.all('img')) and len(seen.all('img')) == 2*len(kept)

def test_the_list_is_sorted_and_holds_the_verdicts(model, kept):
    text = page(model, kept, .3)
    p = [float(x) for x in re.findall(r'</span>, p = ([\d.e-]+)', text)]
    assert p == sorted(p) and len(p) == len(kept)
    assert text.count('<tr class="anomalous"') == sum(e.anomalous for e in kept) > 0
    assert text.count('class="over"') == sum(len(e.regions) for e in kept)
    assert 'not given (--normal)' in text and 'atlas' not in data(text)['kinds'][0]

def test_without_a_calibration_nothing_is_decided(model, toy, tmp_path):
    model.save(tmp_path/'m.safetensors')
    bare = Pradot.load(tmp_path/'m.safetensors', 'cpu')
    bare.calibration = None
    kept = [entry(bare, r, a) for r, a, _ in bare.stream(toy.test[:6])]
    text = page(bare, kept)
    scores = [float(x) for x in re.findall(r'score ([\d.]+)', text)]
    assert scores == sorted(scores, reverse=True) and 'not calibrated' in text
    assert '<tr class="anomalous"' not in text and text.count('not decided') == 6

@pytest.mark.parametrize('name', ODD)
def test_names_are_escaped(model, kept, name):
    text = page(model, [kept[0]._replace(name=name)], .3, title=name)
    seen = Seen(text)
    assert len(seen.all('script')) == 2 and not seen.all('b') and all(not k.startswith('on') for _, a in seen.tags for k in a)
    assert name in seen.text and name in [a['alt'][6:] for a in seen.all('img')]

def test_what_the_script_needs_is_there(model, kept, toy):
    d = data(page(model, kept, .3, toy.train))
    order = sorted(kept, key=lambda e: (e.p, -e.score))
    record = {r.path.name + r.kind: r for r in toy.test}
    e = order[0]
    r = record[Path(e.name).name + Path(e.name).parent.name]
    for k, (key, (_, which)) in enumerate(assignments(model, [r]).items()):
        kind, found = d['kinds'][k], patches(model, toy.train, [key])[key]
        numbers = np.frombuffer(base64.b64decode(d['images'][0]['which'][k]), '<u4' if kind['wide'] else '<u2')
        assert (numbers == which[0].ravel()).all() and kind['H']*kind['W'] == which[0].size
        im = np.asarray(Image.open(io.BytesIO(base64.b64decode(kind['atlas']))))
        h, w, cols = (kind[x] for x in ('h', 'w', 'cols'))
        cut = np.stack([im[p//cols*h:p//cols*h + h, p % cols*w:p % cols*w + w] for p in numbers]).reshape(kind['H'], kind['W'], h, w, 3)
        assert np.abs(untile(cut).astype(int) - restore(which, found)[0]).mean() < 4    # but for JPEG

def test_an_image_costs_little(model, kept):
    one, all_ = (len(page(model, x, .3)) for x in (kept[:1], kept))
    assert (all_ - one)/(len(kept) - 1) < 40_000
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3000, 40, 3), np.uint8))
    assert max(Image.open(io.BytesIO(base64.b64decode(jpeg(big)))).size) == SIDE and len(jpeg(big)) < 40_000

def test_numbers_survive():
    for most in (65536, 65537, 200_000):
        n = np.random.default_rng(0).integers(0, most, 99)
        assert (np.frombuffer(base64.b64decode(packed(n, most)), '<u2' if most <= 65536 else '<u4') == n).all()

def test_nothing_to_report(model):
    with pytest.raises(InputError, match='no image to report on'): page(model, [])

# --- the command

@pytest.fixture
def odd(toy, tmp_path):
    (tmp_path/'odd').mkdir()
    for i, name in enumerate(ODD): shutil.copy(toy.test[i].path, tmp_path/'odd'/name)
    shutil.copy(toy.test[9].path, tmp_path/'odd'/ODD[1].replace('line', 'again'))
    return tmp_path/'odd'

def test_the_command(model, odd, toy, run):
    model.save('m.safetensors')
    words = 'm.safetensors', odd, '--rate', '.2', '--out', 'out', '--device', 'cpu', '--report', 'out/page.html'
    status, out, err = run('predict', *words, '--normal', toy.train[0].path.parent)
    assert (status, err) == (0, '')
    text = Path('out/page.html').read_text(encoding='utf-8')
    assert len(Seen(text).all('details')) == len(ODD) + 1 and 'atlas' in data(text)['kinds'][0]
    assert len(json.loads(Path('out/scores.json').read_text())['images']) == len(ODD) + 1

def test_disk_full(model, odd, run, monkeypatch, tmp_path):
    model.save('m.safetensors')
    before, write = {p for p in tmp_path.rglob('*')}, Path.write_text
    def full(self, text, *a, **k):
        if self.suffix != '.html': return write(self, text, *a, **k)
        write(self, text[:1000], *a, **k)
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', full)
    status, out, err = run('predict', 'm.safetensors', odd, '--out', 'out', '--device', 'cpu', '--report', 'page.html')
    assert status == 1 and err.count('\n') == 1 and 'page.html cannot be written (No space left' in err
    assert {p for p in tmp_path.rglob('*')} == before

def test_a_place_that_cannot_be(model, odd, run):
    model.save('m.safetensors')
    Path('folder').mkdir()
    status, _, err = run('predict', 'm.safetensors', odd, '--out', 'out', '--report', 'folder', '--device', 'cpu')
    assert status == 1 and 'folder cannot be written' in err and not Path('out').exists()

def test_in_a_browser(model, kept, toy, tmp_path):
    "Where Chromium is installed: the page runs its script, and draws when a list item is opened"
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not browser: pytest.skip('no Chromium here')
    text = page(model, [kept[0]._replace(name=ODD[0]), *kept[1:]], .3, toy.train)
    (tmp_path/'page.html').write_text(text.replace('<details data-i="0">', '<details data-i="0" open>'), encoding='utf-8')
    dom = subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=3000', '--dump-dom',
                          (tmp_path/'page.html').as_uri()], capture_output=True, text=True, timeout=120).stdout
    assert dom.count('<canvas') == 2 and 'stage 2' in dom and 'width="480"' in dom
