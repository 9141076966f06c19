"""PatchCore of anomalib on one category of MVTec AD, for benchmarks/fit.ipynb. Run it in an environment of its own:

    python -m venv bank && bank/bin/pip install anomalib
    bank/bin/python patchcore.py ROOT_OF_MVTEC_AD bottle WEIGHTS.safetensors patchcore.json

WEIGHTS has torchvision's key names (ResNet50, conv1 to layer3). The loop is the model's own, without the trainer around it:
features of the training images, coreset, then maps and scores of the test images.
"""
import importlib.metadata, json, os, platform, sys, time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

root, category, weights, out = sys.argv[1:]
SIZE, B = 224, 16
MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))

def batches(paths):
    for i in range(0, len(paths), B):
        images = [Image.open(p).convert('RGB').resize((SIZE, SIZE), Image.Resampling.BILINEAR) for p in paths[i:i + B]]
        yield torch.stack([torch.from_numpy((np.asarray(a, np.float32)/255 - MEAN)/STD).permute(2, 0, 1) for a in images])

def mask(path):
    where = path.parents[2]/'ground_truth'/path.parent.name/f'{path.stem}_mask.png'
    a = Image.open(where) if where.exists() else Image.new('L', Image.open(path).size)
    return np.asarray(a.convert('L')) > 0

train = sorted((Path(root)/category/'train'/'good').glob('*.png'))
test = sorted((Path(root)/category/'test').glob('*/*.png'))
truth, masks, rows = [p.parent.name != 'good' for p in test], [mask(p) for p in test], []
made = (f'Computed {date.today()} on {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} '
        f'threads, with anomalib {importlib.metadata.version("anomalib")}, torch {torch.__version__}, Python '
        f'{platform.python_version()}: ResNet50 of the same weights, stages 2 and 3, {SIZE} pixels, {B} images at a time.')
for share in map(float, os.environ.get('CORESETS', '0.01').split(',')):
    torch.manual_seed(0)
    model = PatchcoreModel(layers=['layer2', 'layer3'], backbone='resnet50', pre_trained=False, num_neighbors=9)
    found = model.feature_extractor.feature_extractor.load_state_dict(load_file(weights), strict=False)
    assert not [k for k in found.missing_keys if not k.endswith('num_batches_tracked')], found
    model.train(); model.feature_extractor.eval()
    begin = time.perf_counter()
    with torch.no_grad():
        for x in batches(train): model(x)
    features = time.perf_counter() - begin
    model.subsample_embedding(share)
    fit = time.perf_counter() - begin
    model.eval()
    begin, maps, scores = time.perf_counter(), [], []
    with torch.no_grad():
        for x in batches(test):
            y = model(x)
            maps += list(y.anomaly_map[:, 0].numpy()); scores += y.pred_score.flatten().tolist()
    seconds = time.perf_counter() - begin
    big = [np.asarray(Image.fromarray(m).resize(t.shape[::-1], Image.Resampling.BILINEAR)) for m, t in zip(maps, masks)]
    pixel = roc_auc_score(np.concatenate([t.ravel() for t in masks]), np.concatenate([m.ravel() for m in big]))
    rows.append(dict(coreset=share, made=made, result={
        'features, seconds': features, 'whole fit, seconds': fit, 'images a second at test': len(test)/seconds,
        'image AU-ROC': 100*roc_auc_score(truth, scores), 'pixel AU-ROC': 100*pixel,
        'model, MiB': model.memory_bank.numel()*4/2**20}))
    Path(out).write_text(json.dumps(rows, indent=1) + '\n')
