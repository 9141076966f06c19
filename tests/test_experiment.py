"Runs, grids, stored maps and tables: what survives being killed, what must be equal, what is refused"
import ctypes, json, logging, multiprocessing, os, random, shutil, signal, sys, time
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
import joblib
from joblib.externals.loky import get_reusable_executor
import numpy as np
import pandas as pd
import pytest, safetensors.torch, tifffile, torch
from PIL import Image
from pradot import experiment
from pradot.data import InputError, mvtec_loco
from pradot.detector import LIGHT, Config, Pradot
from pradot.experiment import Run, evaluate, grid, paper_table, read_row, reproduce, results, score
from pradot.metrics import evaluate_maps
from pradot.toy import tray

unix = pytest.mark.skipif(os.name == 'nt', reason='signals')
quiet = pytest.mark.filterwarnings('ignore:in \\d+ of', 'ignore:a batch of', 'ignore:only \\d+ images')
FEW = replace(LIGHT, n=1, epochs=1, batch_size=4, image_size=96, iterations=10)
WORDS = '--preset light --n 1 --epochs 1 --batch-size 4 --image-size 96 --iterations 10 --device cpu'.split()
WHERE = 'seconds', 'peak_memory_gib', 'machine', 'date'   # what of a row depends on when and where it was computed

def core(rows): return [{k: v for k, v in r.items() if k not in WHERE} for r in rows]

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return tray(tmp_path_factory.mktemp('toy'), size=(96, 128), train=6, validation=2, good=2, logical=4, structural=2)

@pytest.fixture(scope='module')
def data(toy): return toy.train[0].path.parents[3]

@pytest.fixture(scope='module')
def runs(data):
    "Six runs that share features and prototypes, as the rows of Table 2 do"
    cs = [replace(FEW, **c, seed=s) for s in (0, 1) for c in (dict(), dict(alphas=(0.,)), dict(stages=(3,)))]
    return [Run('mvtec_loco', str(data), 'tray', c) for c in cs]

# Other processes: forked from one that has imported everything and done nothing yet

@pytest.fixture(scope='module')
def processes():
    if os.name == 'nt': pytest.skip('there is no fork')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['pytest', 'pandas', 'pradot.experiment', 'pradot.toy'])
    return context

def begin(processes, work, *args):
    p = processes.Process(target=_single, args=(work, *args))
    p.start()
    return p

def _single(work, *args):
    os.environ['OMP_NUM_THREADS'] = '1'
    torch.set_num_threads(1)                   # sums of other numbers of threads differ in the last digit
    work(*args)

def ended(p, code=0):
    p.join(120)
    assert p.exitcode == code, p.exitcode

STEPS = {'open', 'os.rename', 'os.remove', 'os.mkdir', 'os.chmod', 'os.scandir', 'os.listdir'}

def die(): os.kill(os.getpid(), signal.SIGKILL)

def mortal(folder, n):
    "This process is killed before the n-th thing that it does to a file in `folder`"
    def hook(event, args):
        nonlocal n
        paths = [os.fspath(a) for a in args[:2] if isinstance(a, (str, os.PathLike))] if event in STEPS else ()
        if any(p.startswith(folder) for p in paths):
            n -= 1
            if n == 0: die()
    sys.addaudithook(hook)

def note(log, *words):
    with open(log, 'a', encoding='utf-8') as f: f.write(' '.join(map(str, words)) + '\n')

def logged(log, meet=None):
    "From now on `measure` writes to a file when it begins and ends; at first it waits for others to begin too"
    plain, first = experiment.measure, [meet]
    def measure(run, *args):
        note(log, 'begin', run.name, os.getpid())
        if (m := first.pop() if first else None): m.wait(60)
        row = plain(run, *args)
        note(log, 'end', run.name)
        return row
    experiment.measure = measure

def told(log):
    lines = Path(log).read_text().splitlines() if Path(log).exists() else []
    return Counter(tuple(l.split()[:2]) for l in lines)

def do_grid(runs, out, reply=None, log=None, jobs=1, n=0, meet=None, cut=None):
    if log: logged(log, meet)
    if cut: cut()
    if n: mortal(str(out), n)
    rows = grid(runs, out, jobs, 'cpu', progress=False)
    if reply: Path(reply).write_text(json.dumps(rows), encoding='utf-8')

@pytest.fixture(scope='module')
def whole(runs, processes, tmp_path_factory):
    "A grid that nothing disturbed: its folder and its rows"
    here = tmp_path_factory.mktemp('whole')
    ended(begin(processes, do_grid, runs, here/'out', here/'rows.json'))
    return here/'out', json.loads((here/'rows.json').read_text())

def finished(out): # a result that is there is whole, and stays the same file
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, read_row(p)['hash']) for p in (out/'runs').glob('[!.]*')}

def cached_as_in(out, whole):
    "Whatever the cache holds under its final name is complete: as in the undisturbed grid"
    for p in (out/'cache').glob('[!.]*'):
        same = whole/'cache'/p.name
        if p.suffix in ('.npy', '.sha256'): assert p.read_bytes() == same.read_bytes()
        elif p.name.startswith('unfinished'): safetensors.torch.load_file(p)   # the state after an epoch, whole
        else: assert torch.equal(*(safetensors.torch.load_file(q)['prototypes'] for q in (p, same)))

def all_there(out, rows, whole):
    assert core(rows) == core(whole[1])
    assert sorted(p.name for p in (out/'runs').glob('[!.]*')) == sorted(p.name for p in (whole[0]/'runs').glob('[!.]*'))
    assert core(sorted(results(out), key=str)) == core(sorted(whole[1], key=str))
    cached_as_in(out, whole[0])
    assert not list((out/'failed').glob('*.json'))
    for d in ('runs', 'cache'):                                        # of half-written files none is left
        assert {p.name.endswith('.lock') for p in (out/d).glob('.*')} == {True}

def test_the_undisturbed_grid(whole, runs):
    out, rows = whole
    assert [(r['seed'], r['config']['stages'], r['config']['alphas']) for r in rows] == \
        [(x.config.seed, list(x.config.stages), list(x.config.alphas)) for x in runs]
    assert not any('error' in r for r in rows) and len({json.dumps(r['metrics']) for r in rows}) > 3
    all_there(out, rows, whole)
    assert len(list((out/'cache').glob('features-*.npy'))) == 2 and len(list((out/'cache').glob('prototypes-*'))) == 8

# Killed

def half_a_result(monkey=Path.write_text):
    def write(self, text, **how): monkey(self, text[:len(text)//2], **how); die()
    Path.write_text = write

def half_a_cache_of_features(plain=np.lib.format.open_memmap):
    def opened(path, *how):
        a = plain(path, *how)
        a[:len(a)//2] = 1; a.flush(); die()
    np.lib.format.open_memmap = opened

def half_a_set_of_prototypes(plain=safetensors.torch.save_file):
    def save(tensors, path, *how):
        plain(tensors, path, *how)
        os.truncate(path, os.path.getsize(path)//2); die()
    safetensors.torch.save_file = save

@unix
def test_a_grid_that_is_killed_again_and_again(runs, whole, processes, tmp_path):
    out, log, reply, rng = tmp_path/'out', tmp_path/'log', tmp_path/'rows.json', random.Random(1)
    cuts = [half_a_cache_of_features, half_a_set_of_prototypes, half_a_result]
    seen, before, kills = {}, {}, 0
    while True:
        how, cut = rng.random(), cuts[kills] if kills < len(cuts) else None
        n = rng.randrange(1, 60) if not cut and how < 0.6 else 0
        p = begin(processes, do_grid, runs, out, reply, log, 1, n, None, cut)
        if not cut and not n and kills < 12: p.join(rng.uniform(0.1, 1)); p.kill()
        p.join(120)
        now = finished(out)
        assert now.items() >= seen.items()                             # what was finished is not touched again
        cached_as_in(out, whole[0])
        begun = {name for what, name in told(log) if what == 'begin'}
        assert {f'{x}.json' for x in begun} >= now.keys()
        for name in seen: assert told(log)['begin', name[:-5]] == before['begin', name[:-5]]
        seen, before = now, told(log)
        if p.exitcode == 0: break
        assert p.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= len(cuts) + 2
    all_there(out, json.loads(reply.read_text()), whole)
    stamps = finished(out)
    ended(begin(processes, do_grid, runs, out, reply, log))            # nothing is left to do
    assert finished(out) == stamps and told(log) == before

def pretend(run, *_):
    return dict(dataset=run.dataset, category=run.category, hash=run.hash, seed=run.config.seed,
                metrics=dict(image_auroc=0.5), config=json.loads(json.dumps(asdict(run.config))), date='today', versions={},
                seconds=dict(features=1.), images=dict(train=1, test=1), machine=dict(gpu=None, cpu='x', cores=1))

def do_pretend(runs, out, log, n):
    experiment.measure = pretend
    do_grid(runs, out, log=log, n=n)

def broken(*_): raise ZeroDivisionError('broken')

@unix
def test_a_kill_before_and_after_every_step(runs, processes, tmp_path, monkeypatch):
    "Runs that had failed, killed at each of their steps on the way to a result, then finished"
    n, some = 0, runs[:2]
    while True:
        n += 1
        out, log = tmp_path/f'out{n}', tmp_path/f'log{n}'
        monkeypatch.setattr(experiment, 'measure', broken)
        assert [r['error'] for r in grid(some, out, progress=False)] == ['ZeroDivisionError: broken']*2
        p = begin(processes, do_pretend, some, out, log, n)
        p.join(60)
        there = finished(out)
        assert len(there) <= 2 and told(log).keys() <= {(w, r.name) for w in ('begin', 'end') for r in some}
        def again(run, *_): assert f'{run.name}.json' not in there; return pretend(run)
        monkeypatch.setattr(experiment, 'measure', again)
        assert grid(some, out, progress=False) == [pretend(r) for r in some]
        assert finished(out).items() >= there.items() and len(finished(out)) == 2
        assert [p.name for p in (out/'failed').iterdir()] == []
        assert all(p.name.endswith('.lock') for p in (out/'runs').glob('.*'))
        if p.exitcode == 0: break
        assert p.exitcode == -signal.SIGKILL
    assert n > 10

def in_group(*args):
    os.setsid()
    do_grid(*args)
    get_reusable_executor().shutdown(kill_workers=True)                # at the end of a child nobody else does it

@unix
def test_a_grid_of_two_processes_that_is_killed(runs, whole, processes, tmp_path):
    out, reply = tmp_path/'out', tmp_path/'rows.json'
    def start(jobs): return begin(processes, in_group, runs, out, reply, None, jobs)
    first = start(2)
    try:
        deadline = time.monotonic() + 120
        while not finished(out) and first.is_alive() and time.monotonic() < deadline: time.sleep(0.005)
        first.kill(); first.join()                                     # its workers are orphans now
        seen = finished(out); cached_as_in(out, whole[0])
        assert first.exitcode == -signal.SIGKILL and 1 <= len(seen) < 6
        second = start(1)                                              # goes on beside them
        second.join(0.3); second.kill(); second.join()
    finally:
        try: os.killpg(first.pid, signal.SIGKILL)
        except ProcessLookupError: pass
    between = finished(out); cached_as_in(out, whole[0])
    assert between.items() >= seen.items()
    more = [r._replace(config=replace(r.config, seed=2)) for r in runs[:2]]
    last = begin(processes, in_group, runs + more, out, reply, None, 2) # two processes to the end
    ended(last)
    assert finished(out).items() >= between.items()
    rows = json.loads(reply.read_text())
    assert [r['seed'] for r in rows[6:]] == [2, 2] and not any('error' in r for r in rows)
    for name in [p.name for r in more for p in (out/'runs').glob(f'{r.name}.json')]: (out/'runs'/name).unlink()
    for p in (out/'cache').glob('prototypes-*'):
        if not (whole[0]/'cache'/p.name).exists(): p.unlink()          # those of the third seed
    all_there(out, rows[:6], whole)

# Together

@unix
def test_two_grids_on_one_folder(runs, whole, processes, tmp_path):
    out, log, meet = tmp_path/'out', tmp_path/'log', processes.Barrier(2)
    replies = [tmp_path/f'rows{i}.json' for i in (0, 1)]
    ps = [begin(processes, do_grid, runs, out, r, log, 1, 0, meet) for r in replies]
    for p in ps: ended(p)
    assert told(log) == {(what, r.name): 1 for r in runs for what in ('begin', 'end')}       # each by one of them
    assert len({l.split()[2] for l in log.read_text().splitlines() if l.startswith('begin')}) == 2
    for r in replies: all_there(out, json.loads(r.read_text()), whole)

def test_dask_workers(runs, whole, tmp_path, recwarn):
    dask, distributed = pytest.importorskip('dask'), pytest.importorskip('distributed')
    one = {f'distributed.nanny.pre-spawn-environ.{k}': 1 for k in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')}
    with dask.config.set({'distributed.admin.low-level-log-length': 0, **one}), \
         distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                                  local_directory=str(tmp_path/'dask')) as cluster, \
         distributed.Client(cluster), joblib.parallel_config('dask'):
        rows = grid(runs, tmp_path/'out', device='cpu', progress=False)
        again = grid(runs, tmp_path/'out', device='cpu', progress=False)
    assert again == rows and not [w for w in recwarn if 'cancelled' in str(w.message)]
    all_there(tmp_path/'out', rows, whole)

# What goes wrong

@quiet
def test_a_run_that_fails_is_told_and_tried_again(runs, data, tmp_path):
    root, out = tmp_path/'data', tmp_path/'out'
    root.mkdir()
    here, gone = (runs[4]._replace(root=str(r), category=c) for r, c in ((data, 'tray'), (root, 'late')))
    first = grid([gone, here], out, device='cpu', progress=False)
    assert "no category 'late'" in first[0]['error'] and 'error' not in first[1]
    assert [p.name for p in (out/'failed').glob('*')] == [f'{gone.name}.json'] and len(results(out)) == 1
    record = json.loads((out/'failed'/f'{gone.name}.json').read_text())
    assert record['category'] == 'late' and 'Traceback' in record['traceback'] and record['error'] == first[0]['error']
    (root/'late').symlink_to(data/'tray')
    second = grid([gone, here], out, device='cpu', progress=False)
    assert second[1] == first[1] and list((out/'failed').glob('*')) == []
    assert second[0]['category'] == 'late' and second[0]['metrics'] == first[1]['metrics'] | dict(category='late')
    assert len(results(out)) == 2

@pytest.mark.parametrize('text', ['', '{', '{}', '[]', '3', 'null', '{"dataset": "mvtec_loco"}', '\udc80'])
def test_a_damaged_result_is_named(runs, tmp_path, monkeypatch, text):
    monkeypatch.setattr(experiment, 'measure', pretend)
    grid(runs, tmp_path, progress=False)
    bad = tmp_path/'runs'/f'{runs[3].name}.json'
    bad.write_bytes(text.encode(errors='surrogateescape'))
    for do in (lambda: grid(runs, tmp_path, progress=False), lambda: results(tmp_path)):
        with pytest.raises(InputError, match='not the result of a run.*delete it') as e: do()
        assert str(bad) in str(e.value) and '\n' not in str(e.value)
    bad.unlink()
    assert len(grid(runs, tmp_path, progress=False)) == 6

def test_an_out_that_is_a_file(runs, tmp_path):
    (tmp_path/'out').write_text('in the way')
    for out in (tmp_path/'out', tmp_path/'out'/'deeper'):
        with pytest.raises(InputError, match='cannot be written.*is a file') as e: grid(runs, out)
        assert str(out) in str(e.value) and '\n' not in str(e.value)

def do_refused(runs, out, reply):
    if os.getuid() == 0:                                               # root may write anywhere: give that up
        data = (ctypes.c_uint32*6)()
        ctypes.CDLL(None).capset((ctypes.c_uint32*2)(0x20080522, 0), data)
    if os.access(out, os.W_OK): return Path(reply).write_text('writable')
    try: grid(runs, out, progress=False)
    except InputError as e: Path(reply).write_text(str(e))

@unix
def test_an_out_that_is_read_only(runs, processes, tmp_path):
    out, reply = tmp_path/'out', tmp_path/'reply'
    out.mkdir(); out.chmod(0o555)
    try: ended(begin(processes, do_refused, runs, out, reply))
    finally: out.chmod(0o755)
    said = reply.read_text()
    if said == 'writable': pytest.skip('nothing is read-only for this user')
    assert str(out) in said and 'cannot be written' in said and '\n' not in said and list(out.iterdir()) == []

# What a run is called

def test_the_hash_is_of_every_setting_but_the_seed(tmp_path):
    other = dict(backbone='resnet18', weights='random', image_size=(96, 128), stages=(2,), alphas=(0., 0.2), n=3,
        eps=0.02, iterations=11, tol=1e-4, warm=True, eta=0.8, epochs=2, batch_size=3, solver='log', squared=False,
        corners=True, start='uniform', nominal=True, held_out=0.1, drop_last=True, relative=True, align_corners=True,
        products='bf16', still=0.01, cut=1e-6, memory=2., tile=512)
    assert other.keys() | {'seed'} == {f.name for f in fields(Config)}, 'a new setting belongs into this test'
    a = Run('mvtec_loco', 'here', 'tray', FEW)
    sown = a._replace(config=replace(FEW, seed=7))
    assert sown.hash == a.hash and sown.name != a.name
    found = [a.hash, *(a._replace(config=replace(FEW, **{k: v})).hash for k, v in other.items())]
    assert len(set(found)) == len(found) and all(len(h) == 12 and int(h, 16) >= 0 for h in found)
    same = a._replace(root='there', config=replace(FEW, eta=np.float64(FEW.eta), n=np.int64(1), image_size=96, warm=0))
    assert same.hash == a.hash and same.name == a.name     # not of the place, nor of how a number is written
    for i, text in enumerate(('same', 'same', 'other')): (tmp_path/f'{i}.pth').write_text(text)
    b, c, d = (a._replace(config=replace(FEW, weights=str(tmp_path/f'{i}.pth'))).hash for i in range(3))
    assert b == c != d and a.hash not in (b, d)

def test_flags_are_kept_as_true_and_false():
    assert json.dumps(Config(warm=np.True_, nominal=1).__dict__) == json.dumps(Config(warm=True, nominal=True).__dict__)

# Two protocols

def drawn(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)

FULL, SMALL = (48, 64), (32, 40)

def square(r, c, h, w):
    m = np.zeros(FULL, bool)
    m[r:r + h, c:c + w] = True
    return m

MASKS = {'logical_anomalies': [[(255, square(4, 6, 12, 20)), (254, square(30, 40, 9, 15))]],
         'structural_anomalies': [[(254, square(20, 10, 6, 7)), (255, square(2, 50, 20, 10))],
                                  [(255, square(2, 7, 1, 40))]]}   # row 2 is in none of the small rows 0, 1, 3, 4, 6…

def kit(root, entries, masks=MASKS):
    rng = np.random.default_rng(0)
    def picture(*parts): drawn(root.joinpath('kit', *parts), rng.integers(0, 256, (*FULL, 3), dtype=np.uint8))
    for i in range(3): picture('train', 'good', f'{i}.png')
    for i in range(2): picture('test', 'good', f'{i}.png')
    for kind, images in masks.items():
        for i, ms in enumerate(images):
            picture('test', kind, f'{i}.png')
            for j, (v, m) in enumerate(ms):
                drawn(root/'kit'/'ground_truth'/kind/f'{i}'/f'{j}.png', m.astype(np.uint8)*np.uint8(v))
    keys = 'defect_name', 'pixel_value', 'saturation_threshold', 'relative_saturation'
    entries = [dict(zip(keys, (f'd{e[0]}', *e))) for e in entries]
    (root/'kit'/'defects_config.json').write_text(json.dumps(entries))
    return mvtec_loco(root, 'kit')

ENTRIES = [(255, 60, False), (254, 0.5, True)]

@quiet
@pytest.mark.filterwarnings('ignore:a batch')
@pytest.mark.parametrize('stages, alphas', [((2,), (0.,)), ((2,), (0., 0.3)), ((1, 2), (0.,))])
@pytest.mark.parametrize('entries', [ENTRIES, ENTRIES[::-1], ENTRIES[1:] + [(253, 9, False)],
                                     [(255, 0.3, True), ENTRIES[1]]])
def test_the_protocol_of_the_released_code(tmp_path, stages, alphas, entries):
    masks = MASKS if any(v == 255 for v, *_ in entries) else \
        {k: [[(254 if v == 255 else 253, m) for v, m in ms] for ms in images] for k, images in MASKS.items()}
    category = kit(tmp_path, entries, masks)
    model = Pradot(FEW, 'cpu', image_size=SMALL, stages=stages, alphas=alphas).fit(category.train, progress=False)
    found = evaluate(model, category, progress=False)['released']
    assert found['protocol'] == 'released' and found['size'] == list(SMALL) and found['vanished'] == 1
    rows, cols = (np.floor(np.arange(s)*f/s).astype(int) for s, f in zip(SMALL, FULL))       # nearest, from the corner
    maps, truth, areas, kinds = [], [], [], []
    for r, m in zip(category.test, model.predict(category.test, SMALL, progress=False).maps):
        k, i = r.kind, int(r.path.stem)
        if k == 'structural_anomalies' and i == 1: continue                                  # nothing is left of it
        given = [m for _, m in MASKS[k][i]] if k != 'good' else [np.zeros(FULL, bool)]
        one = (given[0] if len(stages)*len(alphas) == 1 else np.any(given, 0))[rows][:, cols]
        area = int(one.sum())
        first = next((e for e in entries if e[0] == 255), None)                              # for all defects alike
        whole = area if first is None else int(first[1]*area) if first[2] else min(first[1], area)
        maps.append(m); truth.append(one); kinds.append(k); areas.append([whole] if k != 'good' else ())
    assert len(maps) == 4 and all(1 < a[0] < 400 for a in areas if len(a))
    expected = json.loads(json.dumps(evaluate_maps(maps, truth, areas, kinds).as_dict()))
    assert {k: v for k, v in found.items() if k not in ('protocol', 'size', 'vanished')} == expected
    assert expected['image_auroc'] is not None and expected['pooled']['channels'] == 2

def spro(maps, truth, areas, limit):
    "AU-sPRO by going through all thresholds"
    good = np.concatenate([m[~t] for m, t in zip(maps, truth)])
    points = [(0., 0.)]
    for x in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
        hits = [min((m[t] >= x).sum()/a[0], 1) for m, t, a in zip(maps, truth, areas) if t.any()]
        points.append(((good >= x).mean(), np.mean(hits)))
    x, y = np.array(points).T
    inner = x < limit
    x, y = np.r_[x[inner], limit], np.r_[y[inner], np.interp(limit, x, y)]
    return (np.diff(x)*(y[1:] + y[:-1])).sum()/2/limit

@quiet
@pytest.mark.filterwarnings('ignore:a batch')
def test_the_released_au_spro_counted_threshold_by_threshold(tmp_path):
    category = kit(tmp_path, ENTRIES)
    model = Pradot(FEW, 'cpu', image_size=SMALL, stages=(2,), alphas=(0.,)).fit(category.train, progress=False)
    found = evaluate(model, category, progress=False)['released']
    rows, cols = (np.floor(np.arange(s)*f/s).astype(int) for s, f in zip(SMALL, FULL))
    rs = [r for r in category.test if (r.kind, r.path.stem) != ('structural_anomalies', '1')]
    maps = list(model.predict(rs, SMALL, progress=False).maps)
    truth = [(MASKS[r.kind][0][0][1] if r.anomalous else np.zeros(FULL, bool))[rows][:, cols] for r in rs]
    areas = [[min(60, int(t.sum()))] for t in truth]
    for limit in (0.05, 0.3, 1.):
        assert found['pooled']['au_spro'][str(limit)] == pytest.approx(spro(maps, truth, areas, limit), abs=1e-9)

@quiet
@pytest.mark.filterwarnings('ignore:a batch')
def test_defects_that_all_vanish_leave_the_published_protocol(tmp_path):
    category = kit(tmp_path, ENTRIES, dict(logical_anomalies=[[(255, square(2, 7, 1, 40))]]))
    model = Pradot(FEW, 'cpu', image_size=SMALL, stages=(2,)).fit(category.train, progress=False)
    found = evaluate(model, category, progress=False)
    assert 0 <= found['au_spro'] <= 1 and found['released'] == dict(protocol='released', size=list(SMALL), vanished=1)

# Stored maps

@pytest.fixture(scope='module')
def judged(toy):
    "A model's figures, and its maps"
    import warnings
    maps = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = Pradot(FEW, 'cpu').fit(toy.train, progress=False)
    found = evaluate(model, toy, progress=False, each=lambda r, m, s: maps.append((r, m)))
    return {k: v for k, v in found.items() if k != 'released'}, maps

def stored(folder, maps, change=lambda m: m, suffix='tiff'):
    for r, m in maps:
        path = folder/'tray'/'test'/r.kind/f'{r.path.stem}.{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, change(m))
    return folder

def test_stored_maps_score_as_the_model_did(toy, judged, tmp_path):
    found, maps = judged
    assert score(stored(tmp_path/'a', maps), toy, False) == found
    assert score(stored(tmp_path/'b', maps, suffix='tif'), toy, False) == found
    assert score(stored(tmp_path/'c', maps, lambda m: m[None]), toy, False) == found        # one channel, said so
    assert json.loads(json.dumps(found)) == found

def test_the_top_of_the_json_of_evaluate_and_score(run, toy, data, tmp_path):
    "The headline figures by name, each the one at its limit further below; every limit for every kind"
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        Pradot(FEW, 'cpu').fit(toy.train, progress=False).save(tmp_path/'m.safetensors')
    where = '--dataset', 'mvtec_loco', '--data', data, '--category', 'tray'
    code, out, err = run('evaluate', tmp_path/'m.safetensors', *where, '--device', 'cpu', '--out', 'a.json')
    assert code == 0 and [l.split()[-5] for l in out.splitlines()[1:]] == ['mvtec']*3 + ['released'], err
    model = Pradot.load(tmp_path/'m.safetensors', 'cpu')
    stored(tmp_path/'maps', list(zip(toy.test, model.predict(toy.test, progress=False).maps)))
    code, out, err = run('score', '--maps', tmp_path/'maps', *where, '--out', 'b.json')
    assert code == 0 and [l.split()[-5] for l in out.splitlines()[1:]] == ['mvtec']*3, err
    a, b = (json.loads(Path(f).read_text()) for f in ('a.json', 'b.json'))
    assert b == {k: v for k, v in a.items() if k != 'released'}
    for d in (a, a['released']):
        kinds = d['kinds']
        assert set(kinds) == {'logical_anomalies', 'structural_anomalies'}
        for f in (*kinds.values(), d['mean'], d['pooled'], d['limits']):
            assert all(list(f[k]) == ['0.01', '0.05', '0.1', '0.3', '1.0'] for k in ('au_pro', 'au_spro'))
        for k in ('image_auroc', 'pixel_auroc', 'au_pro', 'au_spro', 'au_spro_logical', 'au_spro_structural'):
            assert isinstance(d[k], float) and 0 <= d[k] <= 1
        logical, structural = (kinds[f'{k}_anomalies'] for k in ('logical', 'structural'))
        assert d['au_spro_logical'] == logical['au_spro']['0.05']
        assert d['au_spro_structural'] == structural['au_spro']['0.05']
        for k in ('image_auroc', 'pixel_auroc'): assert d[k] == pytest.approx((logical[k] + structural[k])/2)
        assert d['au_spro'] == pytest.approx((d['au_spro_logical'] + d['au_spro_structural'])/2)
        assert d['au_pro'] == d['limits']['au_pro']['0.3'] == pytest.approx((logical['au_pro']['0.3'] + structural['au_pro']['0.3'])/2)
    assert a['protocol'] == 'mvtec' and a['released']['protocol'] == 'released'

def numbers(d, path=''):
    parts = (numbers(x, f'{path}{i}.') if isinstance(x, dict) else {path + i: x} for i, x in d.items()
             if not isinstance(x, str))
    return {k: v for part in parts for k, v in part.items()}

def test_what_is_strictly_increasing_changes_nothing(toy, judged, tmp_path):
    found, maps = judged
    values = np.unique(np.concatenate([m.ravel() for _, m in maps]))
    wide = np.float64
    ways = dict(stretch=lambda m: wide(m)*3e7 - 1e9, exp=lambda m: np.exp(wide(m)), cube=lambda m: wide(m)**3,
        rank=lambda m: wide(np.searchsorted(values, m)), minus=lambda m: -1/(wide(m) + 1))
    for name, f in ways.items():
        assert len(np.unique(f(values))) == len(values)
        after = numbers(score(stored(tmp_path/name, maps, f), toy, False))
        assert after == pytest.approx(numbers(found), rel=1e-12, abs=1e-12), name           # sums in another order
    down = score(stored(tmp_path/'down', maps, lambda m: -m), toy, False)
    assert down['pixel_auroc'] != found['pixel_auroc'] and down['pooled']['pixel_auroc'] == \
        pytest.approx(1 - found['pooled']['pixel_auroc'])

# The command line

@pytest.fixture
def nut(tmp_path):
    "A small category, and maps of its test images"
    rng, here = np.random.default_rng(0), tmp_path/'ad'/'nut'
    for p in ('train/good/0', 'train/good/1', 'test/good/0', 'test/good/1', 'test/cut/0', 'test/cut/1'):
        drawn(here/f'{p}.png', rng.integers(0, 256, (*FULL, 3), dtype=np.uint8))
        if p.startswith('test'): drawn_map(tmp_path/'maps'/'nut'/f'{p}.tiff', rng.integers(0, 256, FULL)/256)
    for i in (0, 1):
        drawn(here/'ground_truth'/'cut'/f'{i}_mask.png', square(10, 10 + 20*i, 12, 15).astype(np.uint8)*255)
    return here

def drawn_map(path, a, dtype=np.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, a.astype(dtype))

def scoring(tmp_path, *more, category='nut', data='ad'):
    return ['score', '--maps', tmp_path/'maps', '--dataset', 'mvtec_ad', '--data', tmp_path/data,
            '--category', category, '--out', 'out/metrics.json', *more]

def test_score_takes_maps_of_any_float(run, nut, tmp_path):
    found = []
    for dtype in ('<f2', '<f4', '<f8', '>f4'):
        for p in (tmp_path/'maps').rglob('*.tiff'): drawn_map(p, tifffile.imread(p), dtype)
        code, out, err = run(*scoring(tmp_path))
        assert code == 0 and err == '' and 'pixel AU-ROC' in out and 'released' not in out
        found.append(json.loads(Path('out/metrics.json').read_text()))
    assert found[0] == found[1] == found[2] == found[3] and found[0]['images'] == 4

def test_score_refuses_maps_that_are_none(refused, nut, tmp_path):
    bad = tmp_path/'maps'/'nut'/'test'/'cut'/'1.tiff'
    whole = bad.read_bytes()
    good = tifffile.imread(bad)
    bad.unlink(); refused(scoring(tmp_path), bad, 'does not exist')
    drawn_map(bad, good.T); refused(scoring(tmp_path), bad, '64 x 48', nut/'test'/'cut'/'1.png', '48 x 64')
    tifffile.imwrite(bad, np.stack([good]*3), photometric='minisblack')
    refused(scoring(tmp_path), bad, 'shape (3, 48, 64)', 'one channel')
    for value in (np.nan, np.inf, -np.inf):
        a = good.copy(); a[5, 5] = value
        drawn_map(bad, a); refused(scoring(tmp_path), bad, 'NaN or infinite')
    for content in (b'', b'this is no picture\n', b'II*\0', whole[:7]): # texts and stumps
        bad.write_bytes(content); refused(scoring(tmp_path), bad, 'cannot be read as a TIFF')
    drawn(bad.with_suffix('.png'), np.zeros((*FULL, 3), np.uint8)); os.replace(bad.with_suffix('.png'), bad)
    refused(scoring(tmp_path), bad, 'cannot be read as a TIFF')
    bad.unlink(); bad.mkdir(); refused(scoring(tmp_path), bad)

def test_score_of_a_cut_or_damaged_map_is_one_sentence(run, refused, nut, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), 'handlers', [])          # as outside pytest, which takes what is logged
    bad = tmp_path/'maps'/'nut'/'test'/'cut'/'0.tiff'
    whole, rng, read = bad.read_bytes(), np.random.default_rng(0), 0
    for n in (*range(8, 300, 23), len(whole)//2, len(whole) - 1):
        bad.write_bytes(whole[:n])
        refused(scoring(tmp_path), bad)
    for i in (10, 12, 20, 24, 34, 36, 60, 84, 96, 120, 124, 130, 142):  # types, sizes and places of the data
        harmed = bytearray(whole)
        harmed[i:i + 4] = rng.integers(1, 256, 4, dtype=np.uint8).tobytes()
        bad.write_bytes(bytes(harmed))
        code, out, err = run(*scoring(tmp_path))
        if code: assert out == '' and err.count('\n') == 1 and str(bad) in err, err
        else: assert err == ''; read += 1                             # what it is about does not matter for a map
    assert 0 < read < 13

def test_score_refuses_folders_and_words(refused, nut, tmp_path):
    refused(scoring(tmp_path, category='bolt'), "no category 'bolt'", 'it has nut')
    refused(scoring(tmp_path, data='nowhere'), tmp_path/'nowhere', 'not a folder')
    (tmp_path/'empty').mkdir()
    refused(scoring(tmp_path, data='empty'), tmp_path/'empty', "no category 'nut'")
    words = scoring(tmp_path)
    for gone in ('--data', '--maps', '--dataset'):
        i = words.index(gone)
        refused(words[:i] + words[i + 2:], gone, status=2)
    i = words.index('--category'); refused(words[:i] + words[i + 2:], '--category')
    refused(scoring(tmp_path, '--dataset', 'folder'), 'folder', status=2)
    refused(scoring(tmp_path, '--out', tmp_path/'ad'/'nut'), 'cannot be written')
    os.rename(tmp_path/'maps', tmp_path/'elsewhere'); refused(scoring(tmp_path), tmp_path/'maps', 'does not exist')
    shutil.rmtree(nut/'test'); shutil.rmtree(nut/'ground_truth')
    refused(scoring(tmp_path), 'no test images')

@pytest.fixture
def sets(data, tmp_path):
    "The toy set in the clothes of a LOCO category"
    (tmp_path/'sets'/'mvtec_loco').mkdir(parents=True)
    (tmp_path/'sets'/'mvtec_loco'/'pushpins').symlink_to(data/'tray')
    return tmp_path/'sets'

def reproducing(root, *more, table='table3', out='out'):
    return ['reproduce', table, '--data', root, '--out', out, *WORDS, *more]

def test_reproduce(run, sets, tmp_path):
    code, out, err = run(*reproducing(sets, '--seeds', '2'))
    assert code == 0 and err == '' and 'pushpins' in out and 'difference' in out and 'out: table3.csv, table3.md' in out
    t = pd.read_csv('out/table3.csv')
    assert set(t['category']) == {'pushpins', 'mean'} and set(t['protocol']) == {'mvtec', 'released'}
    assert set(t['of']) == {'1/5'} and set(t['images']) == {'8/310'} and '8/310' in out   # a part of pushpins
    assert (t['seeds'] == 2).all() and t['std'].notna().all()
    rows = results('out')
    assert sorted(r['seed'] for r in rows) == [0, 1]
    line = t[(t.category == 'pushpins') & (t.metric == 'au_spro_0.05') & (t.protocol == 'released')].iloc[0]
    assert line['ours'] == pytest.approx(100*np.mean([r['metrics']['released']['au_spro'] for r in rows]))
    p = paper_table(3)
    printed = p[(p.category == 'pushpins') & (p.metric == 'au_spro_0.05') & (p.method == 'PRADOT')]['value'].item()
    assert line['paper'] == line['paper_here'] == printed
    assert line['difference'] == pytest.approx(line['ours'] - printed)
    text = Path('out/table3.md').read_text()
    assert '# Table 3' in text and 'seeds.' in text and rows[0]['machine']['cpu'] in text
    before = finished(Path('out'))
    assert run(*reproducing(sets, '--seeds', '2'))[:2] == (0, out) and finished(Path('out')) == before
    code, out, err = run(*reproducing(sets, '--stages', '2,3', table='table2')) # its full method is there already
    t = pd.read_csv('out/table2.csv', dtype=dict(stages=str, alphas=str))
    assert code == 0 and len(results('out')) == 8 and finished(Path('out')).items() >= before.items()
    assert list(dict.fromkeys(zip(t.stages, t.alphas))) == \
        [('2', '0'), ('2', '0.3'), ('2', '0 0.3'), ('3', '0'), ('3', '0.3'), ('3', '0 0.3'), ('2 3', '0 0.3')]

def test_reproduce_refuses_folders_and_words(refused, sets, tmp_path):
    (tmp_path/'empty').mkdir()
    refused(reproducing(tmp_path/'empty'), tmp_path/'empty', 'holds no category')
    refused(reproducing(tmp_path/'nowhere'), tmp_path/'nowhere', 'not a folder')
    refused(reproducing(sets, '--categories', 'pushpins,screws'), "no category 'screws'", 'it has pushpins')
    refused(reproducing(sets, table='table4'), 'no category that table 4 is about')
    refused(reproducing(sets, '--stages', '2', table='table2'), 'more than one stage')
    for words in ('--jobs 0', '--jobs -1', '--jobs many', '--seeds 0', '--seeds 1.5', '--preset nonsense',
                  '--solver magic', '--start zero', '--backward 3', '--held-out half'):
        refused(reproducing(sets, *words.split()), words.split()[0], status=2)
    refused(reproducing(sets, table='table5'), 'table5', status=2)
    for words in ('--held-out 1', '--held-out -0.5', '--n 0', '--eps 0'):
        refused(reproducing(sets, *words.split()), words.split()[1])
    words = reproducing(sets)
    for gone, status in (('--data', 1), ('--out', 2)): # notebooks need no --data
        i = words.index(gone); refused(words[:i] + words[i + 2:], gone, status=status)
    (tmp_path/'file').write_text('in the way')
    refused(reproducing(sets, out=tmp_path/'file'), tmp_path/'file', 'cannot be written', 'is a file')

def test_reproduce_of_runs_that_all_fail_says_why(run, sets, monkeypatch, tmp_path):
    import urllib.error
    def refuse(*a, **k): raise urllib.error.URLError('no route to host')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'torch'))
    monkeypatch.setattr('torch.hub.load_state_dict_from_url', refuse)
    code, out, err = run(*reproducing(sets, '--preset', 'official', '--seeds', '2'))
    assert code == 1 and out == '' and err.count('\n') == 1, err
    assert err.startswith('pradot reproduce: all 2 runs failed') and 'timm' in err and 'no route to host' in err
    assert len(list(Path('out/failed').glob('*.json'))) == 2 and not Path('out/table3.csv').exists()

def test_reproduce_tells_of_the_runs_that_failed(run, sets, data):
    shutil.copytree(data/'tray', sets/'mvtec_loco'/'screw_bag')
    bad = sets/'mvtec_loco'/'screw_bag'/'train'/'good'/'001.png'
    whole = bad.read_bytes()
    bad.write_bytes(b'no picture')
    code, out, err = run(*reproducing(sets))
    assert code == 1 and err.count('\n') == 1 and '1 of the runs failed' in err and str(bad) in err
    assert set(pd.read_csv('out/table3.csv')['of']) == {'1/5'} and 'pushpins' in out
    bad.write_bytes(whole)
    code, out, err = run(*reproducing(sets))
    assert code == 0 and err == '' and set(pd.read_csv('out/table3.csv')['of']) == {'1/5', '2/5'}
    assert list(Path('out/failed').glob('*.json')) == []

def test_an_interrupted_table_says_that_it_goes_on(run, sets, monkeypatch):
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(experiment, 'measure', stop)
    code, out, err = run(*reproducing(sets))
    assert code == 130 and out == '' and err == 'pradot reproduce: stopped; the same command goes on from here\n'

def test_the_folder_of_a_table_may_be_anywhere(sets, tmp_path, monkeypatch):
    more = dict(images=dict(train=372, test=310))
    monkeypatch.setattr(experiment, 'measure', lambda run, *a: pretend(run) | more)
    t, failed = reproduce(1, sets, tmp_path/'not'/'there'/'yet', FEW, progress=False)
    assert failed == [] and (tmp_path/'not'/'there'/'yet'/'table1.md').exists() and t['ours'].tolist() == [50.]
    assert t['images'].tolist() == ['310/310']                         # of pushpins
