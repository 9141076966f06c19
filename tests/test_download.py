"Downloading data sets, against a server on this machine that misbehaves on purpose."
import argparse
import dataclasses
import hashlib
import io
import lzma
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pradot.data import InputError
import pradot.download
from pradot.download import SOURCES, Source, _reason, download, download_command, extract, sha256

PIECE = 2**19  # gdown writes in pieces of this many bytes: what arrived after the last full one is asked for again

# ---- a tiny data set, and a server

def png(seed, size=(120, 160), mask=False):
    a = np.random.default_rng(seed).integers(0, 256, size if mask else (*size, 3), np.uint8)
    f = io.BytesIO()
    Image.fromarray((a > 127).astype(np.uint8)*255 if mask else a).save(f, 'PNG')
    return f.getvalue()

def category(name, seed):
    files = {f'train/good/{i:03}.png': png(seed + i) for i in range(4)}
    files |= {f'test/good/{i:03}.png': png(seed + 10 + i) for i in range(2)}
    files |= {f'test/dent/{i:03}.png': png(seed + 20 + i) for i in range(3)}
    files |= {f'ground_truth/dent/{i:03}_mask.png': png(seed + i, mask=True) for i in range(3)}
    return {f'{name}/{k}': v for k, v in files.items()}

FILES = category('bottle', 0) | category('cable', 100) | {'license.txt': b'CC BY-NC-SA', 'bottle/license.txt': b'too'}

def member(name, size=0, **kwargs):
    m = tarfile.TarInfo(name)
    m.size = size
    for k, v in kwargs.items(): setattr(m, k, v)
    return m

def tar(members, format=tarfile.GNU_FORMAT):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w', format=format) as t:
        for name, x in members.items():
            if isinstance(x, bytes): t.addfile(member(name, len(x)), io.BytesIO(x))
            else: t.fileobj.write(x.tobuf(format)); t.offset += tarfile.BLOCKSIZE   # a header without what it promises
    return f.getvalue()

def xz(data): return lzma.compress(data, preset=0)

DATA = xz(tar(FILES))

def source(url='http://127.0.0.1:9/tiny.tar.xz', data=DATA):
    return Source('a toy', SOURCES['mvtec_ad'].parts, dict(bottle=(4, 2, 3), cable=(4, 2, 3)), url, len(data),
                  hashlib.sha256(data).hexdigest(), 'https://example.org')

@contextmanager
def served(data=DATA, cuts=(), ranges=True, pause=0., status=200, length=True, most=8):
    "`source` on a server that answers `most` times, for at most 20 s; the first bodies end at the bytes in `cuts`"
    cuts, asked = list(cuts), []
    class Handler(BaseHTTPRequestHandler):
        timeout = 5
        def do_GET(self):
            asked.append(self.headers.get('Range'))
            if status != 200 or len(asked) > most: return self.send_error(status if status != 200 else 503)
            start = int(re.search(r'\d+', asked[-1])[0]) if asked[-1] and ranges else 0
            self.send_response(206 if start else 200)
            self.send_header('ETag', '"one"')
            if start: self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
            if length: self.send_header('Content-Length', str(len(data) - start))
            self.end_headers()
            end = cuts.pop(0) if cuts and (start or len(asked) == 1 or not ranges) else len(data)
            time.sleep(pause)
            try: self.wfile.write(data[start:end])
            except OSError: pass
            self.close_connection = True
        def log_message(self, *args): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        server.daemon_threads = True
        stop = threading.Timer(20, server.shutdown)
        stop.daemon = True
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        stop.start()
        try: yield source(f'http://127.0.0.1:{server.server_port}/tiny.tar.xz', data), asked
        finally: stop.cancel(); server.shutdown()

def refused(contains, f, *args, **kwargs):
    "The one sentence with which a call is refused"
    with pytest.raises(InputError) as e: f(*args, **kwargs)
    said = str(e.value)
    for c in [contains] if isinstance(contains, str) else contains: assert c in said
    assert '\n' not in said and 'Traceback' not in said
    print(said)
    return said

def get(s, root, **kwargs): return download(s, root, **{**dict(accept_license=True, retries=0, timeout=5), **kwargs})

def lying(root):
    "Names in a folder, the lock file aside"
    return sorted(p.name for p in root.iterdir() if not p.name.endswith('.lock')) if root.exists() else []

def whole(root, *more):
    "Whether all is in place as it was in the archive, and nothing else"
    assert lying(root) == sorted(['bottle', 'cable', 'license.txt', *more])
    assert {k: (root/k).read_bytes() for k in FILES} == FILES
    assert sum(p.is_file() for c in ('bottle', 'cable') for p in (root/c).rglob('*')) == len(FILES) - 1

STAGE = '.tiny'

@pytest.fixture
def root(tmp_path): return tmp_path/'deep'/'data'

# ---- what should work

def test_all_in_one_go_then_nothing_to_do(root):
    with served() as (s, asked):
        assert get(s, root) == ['bottle', 'cable']
        whole(root)
        n = len(asked)
        (root/'bottle/train/good/000.png').write_bytes(b'mine')
        assert get(s, root, accept_license=False) == [] and len(asked) == n
        assert (root/'bottle/train/good/000.png').read_bytes() == b'mine'

def test_the_archive_can_be_kept_and_is_then_used(root):
    with served() as (s, asked):
        get(s, root, keep_archive=True)
        whole(root, 'tiny.tar.xz')
        n = len(asked)
        shutil.rmtree(root/'cable')
        assert get(s, root) == ['cable'] and len(asked) == n
        whole(root, 'tiny.tar.xz')

def test_an_archive_put_there_by_hand_needs_no_network(root):
    root.mkdir(parents=True)
    (root/'tiny.tar.xz').write_bytes(DATA)
    assert get(source(), root) == ['bottle', 'cable']
    whole(root, 'tiny.tar.xz')

def test_what_the_user_has_stays(root):
    (root/'bottle').mkdir(parents=True)
    (root/'bottle/note.txt').write_text('mine')
    (root/'license.txt').write_text('mine')
    with served() as (s, _):
        assert get(s, root) == ['cable']
        assert lying(root/'bottle') == ['note.txt'] and (root/'license.txt').read_text() == 'mine'
        with pytest.warns(UserWarning, match='train/good has 0 images where a toy has 4.*2 more'):
            assert get(s, root) == []

def test_cut_then_resumed_in_one_run(root):
    with served(cuts=[PIECE + 9]) as (s, asked):
        get(s, root, retries=1)
        assert asked == [None, f'bytes={PIECE}-']
    whole(root)

def test_cut_then_resumed_by_the_next_run(root):
    with served(cuts=[PIECE + 9]) as (s, asked):
        refused(['run the same again to go on from 524kB of', 'https://example.org', str(root)], get, s, root)
        (part,) = (root/STAGE).iterdir()
        assert part.read_bytes() == DATA[:PIECE] and lying(root) == [STAGE]
        get(s, root)
        assert asked[-1] == f'bytes={PIECE}-'
    whole(root)

def test_a_part_that_is_whole_already_is_not_fetched_again(root):
    (root/STAGE).mkdir(parents=True)
    (root/STAGE/'tiny.tar.xzabcdefgh.part').write_bytes(DATA)
    (root/STAGE/'tiny.tar.xzijklmnop.part').write_bytes(DATA[:9])
    get(source(), root)
    whole(root)

def test_server_without_range(root):
    with served(ranges=False, cuts=[PIECE + 9]) as (s, _):
        refused('go on from 524kB', get, s, root)
        get(s, root)
    whole(root)

def test_server_that_does_not_tell_the_length(root):
    with served(length=False) as (s, _): get(s, root)
    whole(root)

def test_two_at_once(root):
    came = []
    with served(pause=.3) as (s, asked), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ts = [threading.Thread(target=lambda: came.append(get(s, root))) for _ in range(3)]
        for t in ts: t.start()
        for t in ts: t.join(15)
        assert sorted(came) == [[], [], ['bottle', 'cable']] and len(asked) == 1
    whole(root)

def test_the_command(root, monkeypatch, capsys):
    with served() as (s, _):
        monkeypatch.setitem(SOURCES, 'mvtec_ad', s)
        args = argparse.Namespace(source='mvtec_ad', data=str(root), accept_license=True, keep_archive=False)
        download_command(args)
        assert 'bottle, cable of a toy are in place now' in capsys.readouterr().out
        download_command(args)
        assert 'nothing to do' in capsys.readouterr().out

# ---- what should be refused

def test_license_not_accepted(root):
    with served() as (s, asked):
        refused(['CC BY-NC-SA 4.0', '--accept-license', 'nothing was downloaded'], get, s, root, accept_license=False)
        assert asked == [] and not root.exists()

def test_unknown_name(root): refused(['mvtec_ad', 'mvtec_loco'], get, 'imagenet', root)

def test_unreachable(root):
    words = ['127.0.0.1:9/tiny.tar.xz cannot be fetched', 'refused', 'https://example.org', f'put it in {root}']
    refused(words, get, source(), root)
    assert lying(root) == []

def test_not_found(root):
    with served(status=404) as (s, _): refused(['404 Not Found', 'https://example.org'], get, s, root)
    assert lying(root) == []

def test_silence(root):
    with served(pause=1) as (s, _): refused('Read timed out', get, s, root, timeout=.2)
    assert lying(root) == []

POOL = "HTTPSConnectionPool(host='a', port=443): "

@pytest.mark.parametrize('text,reason', [
    (POOL + "Max retries exceeded with url: /b (Caused by NewConnectionError(\"<c>: Failed to resolve 'a' "
     '([Errno -2] Name or service not known)"))', 'Name or service not known'),
    (POOL + "Max retries exceeded with url: /b (Caused by ProxyError('Unable to connect to proxy', "
     "OSError('Tunnel connection failed: 403 Forbidden')))", 'Tunnel connection failed: 403 Forbidden'),
    (POOL + 'Read timed out. (read timeout=60)', 'Read timed out. (read timeout=60)'),
    ('Download is incomplete.\nThe part is kept.', 'Download is incomplete'),
    ('', 'ConnectionError')])
def test_the_telling_part_of_an_error(text, reason): assert _reason(ConnectionError(text)) == reason

def test_another_file_at_the_address(root):
    "A login page in place of the archive: noticed at once, and the part that was there already stays"
    (root/STAGE).mkdir(parents=True)
    part = root/STAGE/'tiny.tar.xzabcdefgh.part'
    part.write_bytes(DATA[:PIECE])
    with served(b'<html>please log in</html>', ranges=False) as (s, _):
        s = dataclasses.replace(s, size=len(DATA))
        refused(['sends 26 bytes', 'may have moved', 'https://example.org'], get, s, root)
    assert lying(root/STAGE) == [part.name] and part.read_bytes() == DATA[:PIECE]

def test_wrong_checksum(root):
    with served() as (s, _):
        said = refused('it was removed', get, dataclasses.replace(s, sha256='0'*64), root)
        assert '0'*64 in said and s.sha256 in said and lying(root) == []
        get(s, root)
    whole(root)

def test_wrong_checksum_of_the_users_own_archive(root):
    root.mkdir(parents=True)
    (root/'tiny.tar.xz').write_bytes(DATA[:-1] + b'x')
    said = refused('remove it', get, source(), root)
    assert source().sha256 in said and lying(root) == ['tiny.tar.xz']

def test_root_is_a_file(root):
    root.parent.mkdir()
    root.write_text('x')
    refused(f'{root} is a file', get, source(), root)

def test_archive_without_the_categories(root):
    data = xz(tar({'elsewhere/bottle/train/good/000.png': b'x'}))
    with served(data) as (s, _): refused('lacks bottle, cable', get, s, root)
    assert lying(root) == [STAGE] and lying(root/STAGE) == ['tiny.tar.xz']

BAD = {
    'parent': (dict([('../out.png', b'x')]), 'outside the folder'),
    'parent inside': (dict([('bottle/../../out.png', b'x')]), 'outside the folder'),
    'absolute': (dict([('/out.png', b'x')]), 'outside the folder'),
    'backslash': (dict([('bottle\\..\\out.png', b'x')]), 'outside the folder'),
    'symlink': (dict(a=member('bottle', type=tarfile.SYMTYPE, linkname='/etc'), b=member('bottle/x.png')), 'a link'),
    'hardlink': (dict(a=member('x.png', type=tarfile.LNKTYPE, linkname='/etc/passwd')), 'a link'),
    'device': (dict(a=member('x.png', type=tarfile.CHRTYPE, devmajor=1, devminor=5)), 'neither a plain file nor'),
    'fifo': (dict(a=member('x.png', type=tarfile.FIFOTYPE)), 'neither a plain file nor'),
    'sparse': (dict(a=member('x.png', type=tarfile.GNUTYPE_SPARSE)), 'neither a plain file nor'),
    'huge file': (dict(a=member('x.png', 10**13)), 'claims 10000000000000 bytes'),
    'huge name': (dict(a=member('x.png', 10**12, type=tarfile.GNUTYPE_LONGNAME)), 'absurd'),
    'huge extended header': (dict(a=member('x.png', 10**9, type=tarfile.XHDTYPE)), 'absurd'),
    'many bytes': ({f'{i}.png': bytes(10**6) for i in range(12)}, 'unpacks to more than'),
    'deep': (dict([('a/'*20 + 'x.png', b'x')]), 'too deep'),
    'file as folder': (dict([('a', b'x'), ('a/b.png', b'x')]), 'cannot be written'),
}

@pytest.mark.parametrize('name', BAD)
def test_malicious_archive(name, root):
    members, why = BAD[name]
    data = xz(tar(members))
    do = 'see to that' if name == 'file as folder' else 'not unpacked: remove it and look for another source'
    with served(data) as (s, _): refused([why, do], get, s, root)
    assert [p for p in root.parent.parent.rglob('*') if p.name in ('out.png', 'x.png', 'b.png')] == []
    assert lying(root) == [STAGE] and lying(root/STAGE) == ['tiny.tar.xz']

DAMAGED = {'empty': b'', 'text': b'no archive', 'cut': DATA[:PIECE], 'no tar': xz(b'no tar'*999),
           'cut tar': xz(tar(FILES)[:-30000])}

@pytest.mark.parametrize('data', DAMAGED.values(), ids=DAMAGED)
def test_damaged_archive(data, tmp_path):
    (tmp_path/'a.tar.xz').write_bytes(data)
    (tmp_path/'into').mkdir()
    refused('cannot be unpacked', extract, tmp_path/'a.tar.xz', tmp_path/'into', 10**8)

def test_mutated_archives(tmp_path):
    "Bytes of headers changed at random: refused, or unpacked within the folder"
    good = tar({f'bottle/{i}.png': b'x'*(i*100) for i in range(6)}, tarfile.PAX_FORMAT)
    rng, archive = random.Random(0), tmp_path/'a.tar.xz'
    outcomes = {'refused': 0, 'unpacked': 0}
    for _ in range(100):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            at = rng.choice([i for i in range(0, len(data) - 512, 512) if data[i]]) + rng.randrange(345)
            data[at] = rng.choice([0, 47, 46, 49, 53, 55, rng.randrange(256)])
        for i in range(0, len(data) - 512, 512):                     # mend the sums, so that the mutation is seen
            if data[i + 257:i + 262] == b'ustar':
                data[i + 148:i + 156] = b' '*8
                data[i + 148:i + 156] = b'%06o\0 ' % sum(data[i:i + 512])
        archive.write_bytes(xz(bytes(data)))
        (tmp_path/'into').mkdir()
        try: extract(archive, tmp_path/'into', 10**6); outcomes['unpacked'] += 1
        except (InputError, OSError): outcomes['refused'] += 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ['a.tar.xz', 'into']
        assert not any(p.is_symlink() or not (p.is_file() or p.is_dir()) for p in (tmp_path/'into').rglob('*'))
        shutil.rmtree(tmp_path/'into')
    assert min(outcomes.values()) > 0

# ---- interruptions and a full disk

def test_interrupted_in_the_transfer(root, monkeypatch):
    class Bar(nullcontext):
        n = 0
        def __enter__(self): return self
        def update(self, n): raise KeyboardInterrupt
    with served() as (s, asked):
        with monkeypatch.context() as mp:
            mp.setattr('pradot.download._bar', lambda *args: Bar())
            with pytest.raises(KeyboardInterrupt): get(s, root)
        get(s, root)
        assert asked[-1] == f'bytes={PIECE}-'
    whole(root)

@pytest.mark.parametrize('stop', [KeyboardInterrupt, RuntimeError])
def test_interrupted_while_unpacking(stop, root, monkeypatch):
    put = pradot.download._put
    def some(tar, m, to):
        if m.name.startswith('cable/test'): raise stop
        put(tar, m, to)
    with served() as (s, asked):
        with monkeypatch.context() as mp:
            mp.setattr(pradot.download, '_put', some)
            with pytest.raises(stop): get(s, root)
        assert lying(root) == [STAGE] and lying(root/STAGE) == ['tiny.tar.xz']
        get(s, root)
        assert len(asked) == 1
    whole(root)

def test_interrupted_between_two_categories(root, monkeypatch):
    rename = os.rename
    def one(a, b):
        if Path(b).name == 'cable': raise KeyboardInterrupt
        rename(a, b)
    with served() as (s, asked):
        with monkeypatch.context() as mp:
            mp.setattr(os, 'rename', one)
            with pytest.raises(KeyboardInterrupt): get(s, root)
        assert lying(root) == [STAGE, 'bottle'] and lying(root/STAGE) == ['tiny.tar.xz']
        assert get(s, root) == ['cable'] and len(asked) == 1
    whole(root)

def test_killed_while_unpacking(root):
    code = ('import os, sys, pradot.download as d; import test_download as t\n'
            'put = d._put\n'
            'def some(tar, m, to):\n'
            '    put(tar, m, to)\n'
            '    if m.name.startswith("cable/test"): os.kill(os.getpid(), 9)\n'
            'd._put = some\n'
            't.get(t.source(), t.Path(sys.argv[1]))')
    root.mkdir(parents=True)
    (root/'tiny.tar.xz').write_bytes(DATA)
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, '-c', code, str(root)], cwd=here, capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr.decode()
    assert lying(root) == [STAGE, 'tiny.tar.xz'] and len(lying(root/STAGE)) == 1
    get(source(), root)
    whole(root, 'tiny.tar.xz')

@pytest.fixture
def small_disk(tmp_path):
    "A file system of `n` KiB"
    made = []
    def make(n):
        d = tmp_path/'small'
        d.mkdir()
        mount = ['mount', '-t', 'tmpfs', '-o', f'size={n}k', 'tmpfs', str(d)]
        if not shutil.which('mount') or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip('no small file system: mounting a tmpfs is not allowed here')
        made.append(d)
        return d
    yield make
    for d in made: subprocess.run(['umount', str(d)], check=True)

def free(monkeypatch, n): monkeypatch.setattr('pradot.download.shutil.disk_usage', lambda p: argparse.Namespace(free=n))

def test_too_little_room(root, monkeypatch):
    free(monkeypatch, 2*10**6)
    with served() as (s, asked):
        refused(['2.00MB free', 'needs 2.2', 'make room'], get, s, root)
        assert asked == [] and lying(root) == []

def test_disk_full_in_the_transfer(small_disk, monkeypatch):
    free(monkeypatch, 10**12)
    root = small_disk(700)
    with served() as (s, asked):
        refused([f'{root} cannot be written (No space left on device)', 'make room', 'goes on'], get, s, root)
        subprocess.run(['mount', '-o', 'remount,size=9m', str(root)], check=True)
        get(s, root)
        assert asked[-1] and asked[-1].startswith('bytes=')
    whole(root)

def test_disk_full_while_unpacking(small_disk, monkeypatch):
    free(monkeypatch, 10**12)
    root = small_disk(1600)
    with served() as (s, asked):
        refused([f'{root} cannot be written (No space left on device)', 'no half-unpacked category'], get, s, root)
        assert lying(root) == [STAGE] and lying(root/STAGE) == ['tiny.tar.xz']
        subprocess.run(['mount', '-o', 'remount,size=9m', str(root)], check=True)
        get(s, root)
        assert len(asked) == 1
    whole(root)

def test_sha256(tmp_path):
    (tmp_path/'x').write_bytes(DATA)
    assert sha256(tmp_path/'x') == hashlib.sha256(DATA).hexdigest()
