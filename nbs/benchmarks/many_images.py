"Learn from COUNT images of FOLDER, with up to RAM GiB of features in memory; prints peaks of memory and seconds."
import hashlib, json, sys, threading, time
from pathlib import Path
import torch
from pradot.detector import LIGHT, Pradot
folder, count, ram = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
images, peak, over = sorted(Path(folder).glob('*.png'))[:count], {}, threading.Event()
def watch():
    while not over.wait(0.05):
        for line in Path('/proc/self/status').read_text().splitlines():
            k, v = line.split(':', 1)
            if k in ('RssAnon', 'RssFile'): peak[k] = max(peak.get(k, 0), int(v.split()[0])/1024)
thread = threading.Thread(target=watch, daemon=True)
model = Pradot(LIGHT, 'cpu', image_size=64, batch_size=min(64, count), epochs=1)
thread.start(); begin = time.perf_counter()
model.fit(images, progress=False, ram=ram)
over.set(); thread.join()
digest = hashlib.sha256(b''.join(p.numpy().tobytes() for p in model.prototypes.values())).hexdigest()
print(json.dumps(dict(peak, seconds=time.perf_counter() - begin, features=model.seconds['features'], digest=digest)))
