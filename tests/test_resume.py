"A fit that is stopped goes on from its last finished epoch to the same model."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pradot.detector import Pradot
from pradot.toy import tray

# a shell's background jobs, and what they start, ignore SIGINT: the program is given Python's own handler back
START = [sys.executable, '-c', 'import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); '
                               'from pradot.cli import main; sys.exit(main())']

@pytest.fixture(scope='module')
def words():
    root = tray().train[0].path.parents[3]
    return ['fit', '--dataset', 'mvtec_loco', '--data', root, '--category', 'tray', '--backbone', 'small', '--n', 3, '--epochs', 15,
            '--batch-size', 16, '--iterations', 20, '--image-size', 160, '--solver', 'stream', '--warm', '--stages', 2, '--alphas', 0.3,
            '--device', 'cpu']

def start(words, out, *more):
    return subprocess.Popen([*START, *map(str, [*words, '--out', out, *more])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

@pytest.fixture(scope='module')
def undisturbed(words, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')/'m.safetensors'
    p = start(words, out)
    p.communicate()
    assert p.returncode == 0 and [f.name for f in out.parent.iterdir()] == [out.name]
    return Pradot.load(out, 'cpu')

def stopped(words, out, how, *more):
    "Start, stop it when an epoch is finished that was not before; its process"
    parts, p = Path(f'{out}.parts'), start(words, out, *more)
    def stamp(): return max((f.stat().st_mtime_ns for f in parts.glob('unfinished*')), default=0) if parts.is_dir() else 0
    before, until = stamp(), time.monotonic() + 120
    while stamp() <= before and p.poll() is None and time.monotonic() < until: time.sleep(0.01)
    assert p.poll() is None, 'it was too quick to be stopped'
    p.send_signal(how)
    return p

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs POSIX signals')
def test_stopped_three_ways_and_resumed(words, undisturbed, tmp_path):
    out = tmp_path/'m.safetensors'
    for i, how in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)):
        p = stopped(words, out, how, *(['--resume'] if i else []))
        said = p.communicate()[1]
        assert not out.exists()
        if how == signal.SIGKILL: assert p.returncode == -signal.SIGKILL
        else:
            assert p.returncode == 130
            assert said == 'pradot fit: stopped; the same command with --resume goes on after the last finished epoch\n'
    p = start(words, out, '--resume')
    p.communicate()
    assert p.returncode == 0 and [f.name for f in tmp_path.iterdir()] == [out.name]
    model = Pradot.load(out, 'cpu')
    assert all(torch.equal(v, undisturbed.prototypes[k]) for k, v in model.prototypes.items())

def test_nothing_to_resume(words, tmp_path):
    p = start(words, tmp_path/'m.safetensors', '--resume')
    out, err = p.communicate()
    assert p.returncode == 1 and not out and err.count('\n') == 1 and 'there is nothing to resume in' in err
    assert not list(tmp_path.iterdir())

def test_stopped_before_the_first_epoch(words, tmp_path):
    p = start([*words[:words.index('--epochs') + 1], 1, *words[words.index('--epochs') + 2:]], tmp_path/'a'/'m.safetensors')
    while not (tmp_path/'a').exists() and p.poll() is None: time.sleep(0.005)
    p.send_signal(signal.SIGTERM)
    err = p.communicate()[1]
    if p.returncode == 0: pytest.skip('it was too quick to be stopped')
    assert p.returncode == 130 and 'stopped' in err
    if 'nothing was written' in err: assert not list(tmp_path.iterdir())
