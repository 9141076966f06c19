"""Every reader on mutated inputs: an `InputError` or a right answer; no other exception, no hang, no growth.
Some hundred inputs here; PRADOT_FUZZ=10000 asks for more in all, and `pytest -s` prints what came of them."""
import copy, io, json, os, signal, struct, time, warnings, zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import pytest, tifffile, torch
from PIL import Image
from safetensors.torch import save_file
from pradot import data
from pradot.data import Defect, InputError, Record, read_defects, read_image, read_mask
from pradot.detector import LIGHT, Config, Pradot, _digest
from pradot.experiment import read_map, results, summary, table
from pradot.features import Backbone, read_weights
from pradot.tables import beside, provenance, said, same, stored
from pradot.watch import Journal

resource = pytest.importorskip('resource', reason='limits of memory are those of Unix')

ALL = int(os.environ.get('PRADOT_FUZZ', 480))          # inputs, over all readers
SHARES = dict(images=24, masks=12, defects=12, models=18, settings=10, weights=8, rows=20, maps=10, journal=6) # of 120
SECONDS, ROOM = 10, 3*2**30                            # a single input may take; that the address space may grow by

@contextmanager
def limits():
    "An alarm after `SECONDS` and a MemoryError beyond `ROOM`"
    def late(*_): raise TimeoutError(f'more than {SECONDS} s')
    before, old = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    vm = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE') if Path('/proc/self/statm').exists() else None
    if vm: resource.setrlimit(resource.RLIMIT_AS, (vm + ROOM, old[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, old)

def resident():
    "Bytes of the process's own memory"
    return next((int(l.split()[1])*1024 for l in Path('/proc/self/status').read_text().splitlines() if l.startswith('RssAnon')), 0)

# Mutations of bytes

INTERESTING = [b'\0', b'\xff', b'\x7f', b'\x80', b'\0\0\0\0', b'\xff\xff\xff\xff', b'\x7f\xff\xff\xff', b'\xff\xff\xff\x7f',
               b'\0\1\0\0', b'\0\0\xff\xff', b'\xff'*8]

def bits(b, rng):
    a = np.frombuffer(b, np.uint8).copy()
    for i in rng.integers(0, len(a), rng.integers(1, 9)): a[i] ^= 1 << rng.integers(8)
    return a.tobytes()

def cut(b, rng): return b[:rng.integers(0, len(b))]

def header(b, rng):
    i, x = int(rng.integers(0, min(len(b), 96))), INTERESTING[rng.integers(len(INTERESTING))]
    return b[:i] + x + b[i + len(x):]

def splice(b, rng):
    i, j, k = (int(x) for x in rng.integers(0, len(b), 3))
    return b[:i] + b[j:j + int(rng.integers(1, 400))] + b[k:]

def anywhere(b, rng):
    i, x = int(rng.integers(0, len(b))), INTERESTING[rng.integers(len(INTERESTING))]
    return b[:i] + x + b[i + len(x):]

def noise(b, rng):
    i, n = int(rng.integers(0, len(b))), int(rng.integers(1, 64))
    return b[:i] + rng.bytes(n) + b[i + n:]

BYTES = bits, cut, header, splice, anywhere, noise

def mutated(b, rng):
    for _ in range(rng.integers(1, 3)): b = BYTES[rng.integers(len(BYTES))](b, rng) if b else b
    return b

def png_repaired(b):
    "A PNG whose checksums fit again, so that what was changed is looked at"
    out, i = bytearray(b), 8
    while i + 12 <= len(out):
        n, = struct.unpack('>I', out[i:i + 4])
        if i + 12 + n > len(out): break
        out[i + 8 + n:i + 12 + n] = struct.pack('>I', zlib.crc32(out[i + 4:i + 8 + n]))
        i += 12 + n
    return bytes(out)

# Mutations of JSON

ODD = [None, True, False, 0, -1, 1, 10**30, 1e308, float('nan'), float('inf'), '', 'x', '../../x', '\ud800', '\0', [], {}, [[]], [1, 2],
       {'a': 1}, 'é☃\n', -0.5, 10**8, [10**6, 10**6], 'a'*5000]

def places(o, at=()):
    yield at
    for k, v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else (): yield from places(v, (*at, k))

def structural(o, rng):
    "The same with an entry replaced, removed, doubled or nested"
    o = copy.deepcopy(o)
    for _ in range(rng.integers(1, 4)):
        every = list(places(o))
        short = [p for p in every if len(p) <= 2]
        at = short[rng.integers(len(short))] if rng.random() < 0.6 else every[rng.integers(len(every))]
        odd = copy.deepcopy(ODD[rng.integers(len(ODD))])
        if not at:
            if rng.random() < 0.1: return odd
            continue
        here = o
        for k in at[:-1]: here = here[k]
        what = rng.integers(5)
        if what == 0: del here[at[-1]]
        elif what == 1 and isinstance(here, dict): here[str(at[-1]) + 'x'] = here.pop(at[-1])
        elif what == 2 and isinstance(here, list): here.append(copy.deepcopy(here[at[-1]]))
        elif what == 3: here[at[-1]] = [here[at[-1]]]
        else: here[at[-1]] = odd
    return o

def as_json(o, rng):
    if rng.random() < 0.02: return b'['*int(rng.integers(1000, 200_000))
    b = json.dumps(o).encode()
    return mutated(b, rng) if rng.random() < 0.3 else json.dumps(structural(o, rng)).encode()

# The readers: each a maker of `(mutate(rng) -> bytes, suffix, read(path))`

def encoded(image, format, **how):
    f = io.BytesIO()
    image.save(f, format, **how)
    return f.getvalue()

def pictures():
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(rng.integers(0, 2**16, (24, 32), dtype=np.uint16))
    out = [(encoded(rgb, 'PNG'), '.png'), (encoded(rgb, 'JPEG'), '.jpg'), (encoded(rgb, 'BMP'), '.bmp'),
           (encoded(rgb, 'TIFF'), '.tiff'), (encoded(rgb, 'WEBP'), '.webp'), (encoded(grey16, 'PNG'), '.png'),
           (encoded(rgb.quantize(16), 'PNG', transparency=1), '.png'), (encoded(rgb, 'JPEG', exif=exif, progressive=True), '.jpeg'),
           (encoded(rgb, 'TIFF', compression='tiff_lzw'), '.tif'), (encoded(rgb.convert('RGBA'), 'WEBP', lossless=True), '.webp'),
           (encoded(grey16, 'TIFF', compression='tiff_adobe_deflate'), '.tif'),
           (encoded(rgb, 'PNG', save_all=True, append_images=[rgb.rotate(90)]), '.png')]
    return [o for o in out]

def image_cases():
    every = pictures()
    def make(rng):
        b, suffix = every[rng.integers(len(every))]
        new = mutated(b, rng)
        return (png_repaired(new) if suffix == '.png' and rng.random() < 0.7 else new), suffix
    def read(path):
        im = read_image(path)
        assert im.mode == 'RGB' and min(im.size) > 0 and len(im.tobytes()) == 3*im.width*im.height
        assert Record(path).size == im.size[::-1]
    return make, read

def mask_cases():
    a = np.zeros((24, 32), np.uint8)
    a[3:9, 4:20] = 255
    m = Image.fromarray(a)
    every = [(encoded(m, 'PNG'), '.png'), (encoded(m.convert('1'), 'PNG'), '.png'), (encoded(m.convert('P'), 'PNG'), '.png'),
             (encoded(Image.fromarray(a.astype(np.uint16)*257), 'PNG'), '.png'), (encoded(m, 'BMP'), '.bmp'),
             (encoded(m.convert('LA'), 'PNG'), '.png'), (encoded(Image.fromarray(a.astype(np.float32)), 'TIFF'), '.tif')]
    def make(rng):
        b, suffix = every[rng.integers(len(every))]
        new = mutated(b, rng)
        return (png_repaired(new) if suffix == '.png' and rng.random() < 0.7 else new), suffix
    def read(path):
        m = read_mask(path)
        assert m.ndim == 2 and m.dtype.kind == 'i' and m.max() > 0 and m.min() >= 0
    return make, read

def defects_cases():
    good = [dict(defect_name=f'd{i}', pixel_value=255 - i, saturation_threshold=t, relative_saturation=r)
            for i, (t, r) in enumerate([(1., True), (0.3, True), (400, False)])]
    def make(rng): return as_json(good, rng), '.json'
    def read(path):
        found = read_defects(path)
        assert all(isinstance(d, Defect) and 0 < d.value < 65536 and d.threshold > 0 for d in found)
    return make, read

def safetensors_parts(b):
    n, = struct.unpack('<Q', b[:8])
    return json.loads(b[8:8 + n]), b[8 + n:]

def safetensors_bytes(head, rest, length=None):
    h = json.dumps(head).encode()
    return struct.pack('<Q', len(h) if length is None else length) + h + rest

PICTURE = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp('model')/'m.safetensors'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = Pradot(LIGHT, 'cpu', image_size=32, n=1, batch_size=2, epochs=1, stages=(1, 2)).fit([PICTURE, PICTURE[::-1]], progress=False)
    m.save(path)
    return path

def judged(path):
    m = Pradot.load(path, 'cpu')
    pred = m.predict([PICTURE], progress=False)
    assert pred.scores.shape == (1,) and pred.maps[0].shape == (32, 32)

def model_cases(path):
    good = path.read_bytes()
    head, rest = safetensors_parts(good)
    def make(rng):
        what = rng.integers(5)
        if what == 0: return mutated(good, rng), '.safetensors'
        if what == 1: return header(good, rng), '.safetensors'
        if what == 2: return safetensors_bytes(head, rest, int(rng.choice([0, 1, 2**20, 2**31, 2**62, len(good)]))), '.safetensors'
        if what == 3: return safetensors_bytes(structural(head, rng), rest), '.safetensors'
        return safetensors_bytes(head, mutated(rest, rng)), '.safetensors'
    return make, judged

def settings_cases(path):
    "Metadata and tensors of a model changed and sealed again, as one does who means harm"
    from safetensors import safe_open
    with safe_open(path, 'pt') as f:
        meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    meta.pop('sha256')
    config = json.loads(meta['config'])
    def make(rng):
        m, t, what = dict(meta), dict(tensors), rng.integers(6)
        if what < 3: m['config'] = json.dumps(structural(config, rng))
        elif what == 3:
            k = sorted(m)[rng.integers(len(m))]
            m[k] = str(ODD[rng.integers(len(ODD))]).encode('utf-8', 'replace').decode()
        elif what == 4: m.pop(sorted(m)[rng.integers(len(m))])
        if what == 5 or rng.random() < 0.2:
            k = sorted(t)[rng.integers(len(t))]
            if rng.random() < 0.4: t.pop(k)
            else: t[k] = [t[k].flatten()[:1], t[k][None], t[k].to(torch.int8), torch.full_like(t[k], 3), t[k].double(),
                          torch.zeros(0)][rng.integers(6)].contiguous()
        new = path.with_name('new.safetensors')
        save_file(t, new, m | dict(sha256=_digest(m, t)))
        return new.read_bytes(), '.safetensors'
    return make, judged

def weights_cases(path):
    net = Backbone('small', None, (1,)).net.state_dict()
    file = path.with_name('weights.pth')
    torch.save(net, file)
    zipped = file.read_bytes()
    torch.save(net, file, _use_new_zipfile_serialization=False)
    every = [(zipped, '.pth'), (file.read_bytes(), '.pt')]
    save_file({k: v.contiguous() for k, v in net.items()}, file)
    every.append((file.read_bytes(), '.safetensors'))
    def make(rng):
        b, suffix = every[rng.integers(3)]
        if suffix == '.safetensors' and rng.random() < 0.5:
            head, rest = safetensors_parts(b)
            return safetensors_bytes(structural(head, rng), rest), suffix
        return mutated(b, rng), suffix
    def read(path):
        assert all(isinstance(v, torch.Tensor) for v in read_weights(path).values())
        Backbone('small', path, (1,))
    return make, read

def rows_cases(root):
    every = [json.loads(p.read_text(encoding='utf-8')) for p in sorted((root/'data'/'results').glob('*-seed*.json'))[:6]]
    def make(rng): return as_json(every[rng.integers(len(every))], rng), '.json'
    def read(path):
        out = path.parent/'grid'
        (out/'runs').mkdir(parents=True, exist_ok=True)
        os.replace(path, out/'runs'/'a.json')
        rows = results(out)
        assert len(table(rows)) == len(summary(rows)) == 1
        for number in (1, 2, 3, 4): beside(number, rows), provenance(number, rows)
        said(3, rows), said(4, rows), same(rows)
    return make, read

def maps_cases(path):
    a, every = np.random.default_rng(0).random((24, 32)).astype(np.float32), []
    for i, how in enumerate([{}, dict(compression='zlib'), dict(tile=(16, 16)), dict(bigtiff=True), dict(rowsperstrip=4)]):
        f = path.with_name(f'map{i}.tiff')
        tifffile.imwrite(f, a, **how)
        every.append(f.read_bytes())
    def make(rng): return mutated(every[rng.integers(len(every))], rng), '.tiff'
    def read(path):
        m = read_map(path)
        assert m.ndim == 2 and m.dtype.kind in 'fiub'
    return make, read

def journal_cases(path):
    lines = [dict(image=f'{i}.png', size=10*i, mtime_ns=i, sha256='ab'*32, score=i/7) for i in range(4)]
    lines.append(dict(image='bad\n.png', size=1, mtime_ns=2, sha256='', error='it is empty'))
    def make(rng):
        b = b''.join(json.dumps(structural(l, rng) if rng.random() < 0.3 else l).encode() + b'\n' for l in lines)
        return (mutated(b, rng) if rng.random() < 0.5 else b), '.jsonl'
    def read(path):
        with Journal(path) as j: assert all(isinstance(k, str) for k in j.known)
        assert path.read_bytes()[-1:] in (b'', b'\n')
    return make, read

@pytest.mark.parametrize('reader', SHARES)
def test_a_reader_refuses_or_is_right(reader, model, root, tmp_path):
    cases = dict(images=image_cases, masks=mask_cases, defects=defects_cases, models=lambda: model_cases(model),
                 settings=lambda: settings_cases(model), weights=lambda: weights_cases(model), rows=lambda: rows_cases(root),
                 maps=lambda: maps_cases(model), journal=lambda: journal_cases(model))
    make, read = cases[reader]()
    rng, n, seen, wrong, slowest = np.random.default_rng(list(reader.encode())), max(4, ALL*SHARES[reader]//120), Counter(), {}, 0
    warm, begin = None, time.perf_counter()
    for i in range(n):
        b, suffix = make(rng)
        path = tmp_path/f'input{suffix}'
        path.write_bytes(b)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(), limits():
                warnings.simplefilter('ignore')
                try: read(path); seen['answered'] += 1
                except InputError as e:
                    said_ = str(e)
                    assert said_ and len(said_) < 900 and 'Traceback' not in said_
                    seen['refused'] += 1
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt): raise
            seen['wrong'] += 1
            if len(wrong) < 200: wrong.setdefault(f'{type(e).__name__}: {str(e)[:90]}', (i, e))
        slowest = max(slowest, time.perf_counter() - start)
        if i == n//2: warm = resident()
    grown = (resident() - warm)/2**20
    print(f'\nfuzz {reader}: {n} inputs, {dict(seen)}, slowest {slowest:.2f} s, {grown:+.0f} MiB in the second half, '
          f'{time.perf_counter() - begin:.0f} s')
    if wrong and os.environ.get('PRADOT_FUZZ_TRACE'):
        import traceback
        for k, (i, e) in wrong.items(): print(i, k, [f'{f.filename.split("/")[-1]}:{f.lineno}' for f in traceback.extract_tb(e.__traceback__)][-5:])
    assert not wrong, wrong
    assert grown < 200, 'memory grows from input to input'
