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
