"pradot watch: in order of arrival, each image once, none half-written, on from where it was"
import json, os, signal, subprocess, sys, threading, time, warnings
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from PIL import Image
from pradot import watch as module
from pradot.data import InputError
from pradot.decision import Calibration
from pradot.detector import LIGHT, Pradot
from pradot.watch import Journal, Seen, arrivals, complete, look, watch

def picture(path, seed=0, size=48, hidden=True, **how):
    "Written under a hidden name and renamed, as a careful camera does"
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(seed).normal(128, 12, (size, size, 3)).clip(0, 255).astype(np.uint8)
    to = path.with_name(f'.{seed}{path.suffix}') if hidden else path
    Image.fromarray(a).save(to, **how)
    if hidden: os.replace(to, path)
    return path

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp('fitted')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = Pradot(LIGHT, 'cpu', image_size=32, n=1, batch_size=4, epochs=1)
        m.fit([picture(root/'images'/f'{i}.png', i) for i in range(4)], progress=False)
    m.save(root/'m.safetensors')
    m.path = root/'m.safetensors'
    return m

def lines(out): return [json.loads(l) for l in (out/'results.jsonl').read_text().splitlines()]
def names(out): return [l['image'] for l in lines(out)]
def once(model, folder, out, **how): return list(watch(model, folder, out, **dict(interval=0.02, patience=0.1, once=True) | how))

@pytest.fixture
def running(model, tmp_path):
    "A watcher in a thread; `stop()` ends it after its present image"
    jobs = []
    def go(folder, out, model=model, **how):
        job = SimpleNamespace(found=[], said=[], end=False, error=None)
        class End(Exception): pass
        def sleep(s):
            if job.end: raise End
            time.sleep(s)
        def work():
            try:
                for e in watch(model, folder, out, **dict(interval=0.05, patience=0.3, say=job.said.append) | how): job.found.append(e)
            except End: pass
            except Exception as e: job.error = e
        job.thread = threading.Thread(target=work)
        jobs.append(job)
        patch.setattr(module, 'time', SimpleNamespace(sleep=sleep, monotonic=time.monotonic, time=time.time))
        job.thread.start()
        def until(what, seconds=30):
            end = time.monotonic() + seconds
            while not what():
                assert job.error is None, job.error
                assert time.monotonic() < end, (job.found, job.said)
                time.sleep(0.01)
        def stop(): job.end = True; job.thread.join(30); assert not job.thread.is_alive() and job.error is None, job.error
        job.until, job.stop = until, stop
        return job
    with pytest.MonkeyPatch.context() as patch:
        yield go
        for j in jobs:
            j.end = True
            j.thread.join(30)

def test_scores_are_those_of_predict(model, tmp_path):
    ps = [picture(tmp_path/'in'/f'{i}.png', i, size=40 + 8*i) for i in range(5)]
    found = once(model, tmp_path/'in', tmp_path/'out', batch_size=2)
    assert [e['image'] for e in found] == [p.name for p in ps] and lines(tmp_path/'out') == found
    assert np.allclose([e['score'] for e in found], model.predict(ps, progress=False).scores, atol=1e-6)

def test_in_order_of_arrival(model, tmp_path):
    for i, t in enumerate([5, 3, 9, 1, 7]):
        p = picture(tmp_path/'in'/f'{i}.png', i)
        os.utime(p, (t, t))
    assert [e['image'] for e in once(model, tmp_path/'in', tmp_path/'out')] == ['3.png', '1.png', '0.png', '4.png', '2.png']

def test_never_twice_over_restarts(model, tmp_path):
    for i in range(3): picture(tmp_path/'in'/f'{i}.png', i)
    assert len(once(model, tmp_path/'in', tmp_path/'out')) == 3
    assert once(model, tmp_path/'in', tmp_path/'out') == []
    os.utime(tmp_path/'in'/'0.png')                                     # touched
    os.rename(tmp_path/'in', tmp_path/'moved'); os.rename(tmp_path/'moved', tmp_path/'in')
    assert once(model, tmp_path/'in', tmp_path/'out') == []
    picture(tmp_path/'in'/'1.png', 77)                                  # another picture under an old name
    picture(tmp_path/'in'/'new.png', 78)
    assert {e['image'] for e in once(model, tmp_path/'in', tmp_path/'out')} == {'1.png', 'new.png'}
    assert len(names(tmp_path/'out')) == 5

def test_the_same_picture_under_two_names_is_two_images(model, tmp_path):
    for name in ('a.png', 'b.png'): picture(tmp_path/'in'/name, 1)
    a, b = once(model, tmp_path/'in', tmp_path/'out')
    assert a['sha256'] == b['sha256'] and a['score'] == b['score']

def test_complete():
    now = Seen(10, 10**9, 10**9)
    assert not complete(now, None, 1, clock=1.2)                                  # being written, perhaps
    assert complete(now, now, 1, clock=1.2) and complete(now, None, 1, clock=9)
    assert complete(now._replace(ctime_ns=now.ctime_ns + 1), None, 1, clock=1.2)  # renamed
    assert not complete(now, now._replace(size=9), 1, clock=9)
    assert not complete(now, now._replace(mtime_ns=1), 1, clock=9)
    assert not complete(now._replace(size=0, ctime_ns=2*10**9), None, 1, clock=99)

@pytest.mark.parametrize('suffix', ['.png', '.bmp', '.jpg', '.tif'])
def test_an_image_written_slowly_is_judged_when_it_is_whole(running, model, tmp_path, suffix):
    whole = picture(tmp_path/'there'/f'x{suffix}', 3).read_bytes()
    (tmp_path/'in').mkdir()
    job = running(tmp_path/'in', tmp_path/'out', patience=30)
    with open(tmp_path/'in'/f'slow{suffix}', 'wb', buffering=0) as f:
        for i in range(12):
            f.write(whole[len(whole)*i//12:len(whole)*(i + 1)//12])
            time.sleep(0.03)
            assert i == 11 or not job.found
    job.until(lambda: job.found)
    assert job.found[0]['score'] == pytest.approx(float(model.predict([tmp_path/'there'/f'x{suffix}'], progress=False).scores[0]))
    job.stop()
    assert len(lines(tmp_path/'out')) == 1

def test_an_image_renamed_into_place_is_taken_at_once(tmp_path):
    (tmp_path/'in').mkdir()
    p = picture(tmp_path/'tmp.png', 0, hidden=False)
    time.sleep(0.02)                                                     # a clock of the file system ticks every few ms
    os.rename(p, tmp_path/'in'/'x.png')
    assert [k for k, _ in next(arrivals(tmp_path/'in', {}, interval=60))] == ['x.png']
    picture(tmp_path/'in'/'y.png', 1, hidden=False)                      # while this one may still be written
    assert [k for k, _ in next(arrivals(tmp_path/'in', {}, interval=60))] == ['x.png']

def test_unreadable_is_reported_once_and_passed_over(model, tmp_path):
    picture(tmp_path/'in'/'a.png', 1); picture(tmp_path/'in'/'b.png', 2)
    (tmp_path/'in'/'empty.png').touch(); (tmp_path/'in'/'text.jpg').write_text('no image')
    (tmp_path/'in'/'cut.png').write_bytes((tmp_path/'in'/'a.png').read_bytes()[:-40])
    picture(tmp_path/'in'/'tiny.png', 3, size=4)
    found = once(model, tmp_path/'in', tmp_path/'out')
    bad = {e['image']: e['error'] for e in found if 'error' in e}
    assert sorted(bad) == ['cut.png', 'empty.png', 'text.jpg', 'tiny.png'] and len(found) == 6
    assert 'it is empty' in bad['empty.png'] and 'smaller than one grid cell' in bad['tiny.png'] and 'cannot be read' in bad['cut.png']
    assert once(model, tmp_path/'in', tmp_path/'out') == []
    picture(tmp_path/'in'/'cut.png', 4)                                  # mended: a new image
    assert ['score' in e for e in once(model, tmp_path/'in', tmp_path/'out')] == [True]

@pytest.mark.skipif(os.name == 'nt', reason='names that Windows does not allow')
def test_any_name(model, tmp_path):
    every = ['ein Bild ☃.png', 'two\nlines.png', ' .png', "quote'\".png", '<b>&amp;.png', 'x'*250 + '.png', 'a;rm -rf.png', 'tab\t.PNG']
    for i, n in enumerate(every): picture(tmp_path/'in'/n, i)
    raw = os.fsencode(tmp_path/'in')+b'/\xff\xfe.png'                    # not UTF-8
    try: os.link(tmp_path/'in'/'two\nlines.png', raw); every.append(os.fsdecode(b'\xff\xfe.png'))
    except OSError: pass
    found = once(model, tmp_path/'in', tmp_path/'out', overlays=True)
    assert sorted(e['image'] for e in found) == sorted(every) and all('score' in e for e in found)
    assert len((tmp_path/'out'/'results.jsonl').read_bytes().splitlines()) == len(every)
    assert sorted(p.name for p in (tmp_path/'out'/'overlays').iterdir()) == [f'{i:06d}.png' for i in range(1, len(every) + 1)]
    assert once(model, tmp_path/'in', tmp_path/'out') == []

def test_links_fifos_hidden_files_and_results_are_left_out(model, tmp_path):
    here = tmp_path/'in'
    picture(here/'a.png', 0); picture(here/'monday'/'b.png', 1); picture(here/'.thumbs'/'c.png', 2)
    os.symlink(tmp_path, here/'up'); os.symlink(here/'nowhere', here/'broken.png')
    if hasattr(os, 'mkfifo'): os.mkfifo(here/'fifo.png')
    found = once(model, here, here/'out', overlays=True)
    assert {e['image'] for e in found} == {'a.png', 'monday/b.png'}
    assert once(model, here, here/'out') == []                           # overlays are no images to judge

def test_vanishing_files_and_folder(running, tmp_path):
    here = tmp_path/'in'
    picture(here/'a.png', 0)
    job = running(here, tmp_path/'out')
    job.until(lambda: len(job.found) == 1)
    os.rename(here, tmp_path/'away')
    job.until(lambda: job.said)
    assert 'waiting for it' in job.said[0]
    os.rename(tmp_path/'away', here)
    job.until(lambda: len(job.said) == 2)
    assert 'is back' in job.said[1]
    picture(here/'b.png', 1)
    job.until(lambda: len(job.found) == 2)
    job.stop()
    assert names(tmp_path/'out') == ['a.png', 'b.png'] and len(job.said) == 2

def test_a_file_that_vanishes_before_it_is_read_is_no_error(model, tmp_path, monkeypatch):
    for i in range(3): picture(tmp_path/'in'/f'{i}.png', i)
    real = module.read_image
    def read(path):
        if path.name == '1.png' and path.exists(): path.unlink()
        return real(path)
    monkeypatch.setattr(module, 'read_image', read)
    assert [e['image'] for e in once(model, tmp_path/'in', tmp_path/'out')] == ['0.png', '2.png']

def test_a_file_that_changes_while_it_is_read_is_judged_later(model, tmp_path, monkeypatch):
    p, real = picture(tmp_path/'in'/'x.png', 0), module.read_image
    def read(path):
        im = real(path)
        if len(seen) < 2: seen.append(picture(p, 5 + len(seen)))
        return im
    seen = []
    monkeypatch.setattr(module, 'read_image', read)
    found = once(model, tmp_path/'in', tmp_path/'out')
    assert len(found) == 1 and found[0]['score'] == pytest.approx(float(model.predict([p], progress=False).scores[0]))

def test_journal_torn_line_is_dropped_and_damage_is_told(tmp_path):
    path = tmp_path/'results.jsonl'
    e = dict(image='a.png', size=1, mtime_ns=2, sha256='ab', score=0.1)
    with Journal(path) as j: j.add(e)
    good = path.read_bytes()
    for n in range(1, len(good)):                                        # killed at any byte of the second line
        path.write_bytes(good + good[:n])
        with Journal(path) as j: assert list(j.known) == ['a.png'] and j.lines == 1
        assert path.read_bytes() == good
    path.write_bytes(good + b'{"image": "b.png"}\n' + good)
    with pytest.raises(InputError, match='line 2 is no line of a journal.*remove the line'): Journal(path)
    path.write_bytes(good)
    with Journal(path), pytest.raises(InputError, match='another pradot watch'): Journal(path)
    Journal(path).close()

def test_disk_full_leaves_no_half_line(tmp_path):
    with Journal(tmp_path/'j.jsonl') as j:
        j.add(dict(image='a', size=1, mtime_ns=1, sha256=''))
        real, j.file = j.file, SimpleNamespace(write=lambda b: real.write(b[:5]), truncate=lambda n: real.truncate(n), close=lambda: real.close())
        with pytest.raises(InputError, match='cannot be written'): j.add(dict(image='b', size=1, mtime_ns=1, sha256=''))
    with Journal(tmp_path/'j.jsonl') as j: assert list(j.known) == ['a']

def test_decision_of_a_calibrated_model(model, tmp_path, monkeypatch):
    calibration = Calibration([0.1, 0.2, 0.3])
    monkeypatch.setattr(model, 'calibration', calibration)
    picture(tmp_path/'in'/'a.png', 50)
    with pytest.raises(InputError, match='0.25'): once(model, tmp_path/'in', tmp_path/'out', rate=0.1)
    e, = once(model, tmp_path/'in', tmp_path/'out', rate=0.25)
    assert e['p'] == calibration.p(e['score']) and e['anomalous'] == (e['score'] > 0.3)

def test_memory_and_looks_do_not_pile_up(model, tmp_path):
    "Few images at a time, however many are there"
    for i in range(12): picture(tmp_path/'in'/f'{i}.png', i)
    most, real = [], model.stream
    model.stream = lambda xs, **k: (most.append(len(xs)), real(xs, **k))[1]
    try: once(model, tmp_path/'in', tmp_path/'out', batch_size=3)
    finally: del model.stream
    assert max(most) == 3 and sum(most) == 12

# The command

def words(model, *more): return ['watch', model.path, 'in', '--out', 'out', '--interval', '0.05', '--patience', '0.2', '--device', 'cpu', *more]

def test_command(run, model):
    for i in range(2): picture(Path('in')/f'{i}.png', i)
    Path('in/bad.png').write_text('x')
    code, out, err = run(*words(model, '--once', '--overlays'))
    assert code == 0 and out.splitlines()[-1] == 'out: 2 images judged, 1 passed over' and out.startswith('0.png: 0.')
    assert err.count('\n') == 1 and 'bad.png cannot be read' in err
    assert len(list(Path('out/overlays').iterdir())) == 2
    assert run(*words(model, '--once'))[1] == 'out: 0 images judged, 0 passed over\n'

def test_command_refuses(run, refused, model, tmp_path):
    refused(words(model), 'in', 'not a folder')
    Path('in').mkdir()
    Path('file').write_text('x')
    refused(['watch', model.path, 'in', '--out', 'file'], 'file', 'cannot be written')
    refused(['watch', 'no.safetensors', 'in', '--out', 'out'], 'there is no model')
    for w in ('0', '-1', 'nan', 'x'): refused(words(model, '--interval', w), 'not a number above 0', status=2)

@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='a read-only folder does not stop this user')
def test_read_only_out_is_refused_at_the_start(refused, model):
    picture(Path('in')/'a.png')
    Path('out').mkdir(mode=0o500)
    refused(words(model), 'out', 'cannot be written')

@pytest.mark.skipif(os.name == 'nt', reason='signals')
@pytest.mark.parametrize('sign', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_end_it_and_it_goes_on(model, tmp_path, sign):
    here = tmp_path/'in'
    for i in range(6): picture(here/f'{i}.png', i)
    script = 'import sys, signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pradot.cli import main; sys.exit(main())'
    p = subprocess.Popen([sys.executable, '-c', script, *map(str, words(model, '--batch-size', '1'))], cwd=tmp_path, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with p:
        end, seen = time.monotonic() + 120, p.stdout.readline()
        for i in range(6, 12): picture(here/f'{i}.png', i)
        while sum(1 for _ in open(tmp_path/'out'/'results.jsonl')) < 8 and time.monotonic() < end: time.sleep(0.01)
        p.send_signal(sign)
        out, err = p.communicate(timeout=60)
    if sign == signal.SIGKILL: assert p.returncode == -9
    else: assert p.returncode == 0 and err == '' and 'stopped, the same command goes on from here' in out.splitlines()[-1]
    done = names(tmp_path/'out')
    assert len(done) >= 8 and len(set(done)) == len(done)
    once(model, here, tmp_path/'out')
    assert sorted(names(tmp_path/'out')) == sorted(f'{i}.png' for i in range(12))
