"Settings of every test run, and the way to real images where there are some."
import os
from pathlib import Path

import pytest

os.environ.setdefault('PRADOT_TEST', '1')      # notebooks and long examples run at reduced scale
os.environ.setdefault('OMP_NUM_THREADS', '2')  # read by torch when it is first imported
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # threads that wait do not keep others from working
os.environ.setdefault('MPLBACKEND', 'Agg')

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='session')
def root():
    "The top of the checkout"
    return ROOT

@pytest.fixture(scope='session')
def shared():
    "Folder with `mvtec_ad/`, `mvtec_loco/` and `weights/`; tests that ask for it are skipped where there is none"
    path = Path(os.environ.get('PRADOT_SHARED') or ROOT.parent/'shared'/'data')
    if not path.is_dir(): pytest.skip('no real images here: set PRADOT_SHARED to a folder with mvtec_ad/, mvtec_loco/, weights/')
    return path

def listing(folder):
    return {p.relative_to(folder).as_posix(): (p.is_dir() or p.stat().st_size, p.is_dir() or p.stat().st_mtime_ns)
        for p in folder.rglob('*')}

@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    "`run(words)` -> (status, stdout, stderr) of the command line, in a folder of its own"
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    from pradot.cli import main
    def go(*words):
        capsys.readouterr()
        try: status = main([str(w) for w in words])
        except SystemExit as e: status = e.code
        return status, *capsys.readouterr()
    return go

@pytest.fixture
def refused(run, tmp_path):
    "The command must fail with one sentence that holds all of `says`, and write nothing"
    def go(words, *says, status=1):
        before = listing(tmp_path)
        code, out, err = run(*words)
        assert code == status, (code, err)
        assert out == ''
        assert err.endswith('\n') and err.count('\n') == 1 and 'Traceback' not in err, err
        assert err.startswith(f'pradot {words[0]}: ' if status != 2 else 'pradot') and len(err) < 900, err
        for s in says: assert str(s) in err, (s, err)
        assert listing(tmp_path) == before
        return err
    return go
