"pradot.metrics against loops over every threshold, against cases done by hand, and against bad input"
import json

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from pradot.data import Defect, InputError
from pradot.metrics import (LIMITS, Evaluation, average_precision, channel, evaluate_maps, f1_max, image_auroc,
                            pixel_auroc, regions, saturation)

TOL = 1e-12
many, some = settings(max_examples=120, deadline=None), settings(max_examples=25, deadline=None)


# the reference: every threshold, one after another, nothing clever

def area(x, y, limit):
    total = 0.
    for x0, x1, y0, y1 in zip(x, x[1:], y, y[1:]):
        if x0 >= limit: break
        if x1 > limit: x1, y1 = limit, y0 + (y1-y0)*(limit-x0)/(x1-x0)
        total += (x1-x0)*(y0+y1)/2
    return total/limit

def brute(images, limits=LIMITS):
    "images: (map, channels, saturations, kind). AU-PRO, AU-sPRO by limit; pixel AU-ROC, AP and F1-max."
    maps = [np.asarray(m, np.float64) for m,*_ in images]
    union = [np.any(c, 0) if len(c) else np.zeros(m.shape, bool) for m,(_,c,_,_) in zip(maps, images)]
    neg = np.concatenate([m[~u] for m,u in zip(maps, union)])
    pos = np.concatenate([m[u] for m,u in zip(maps, union)])
    spro = [(m[c], s) for m,(_,cs,ss,_) in zip(maps, images) for c,s in zip(cs, ss)]
    pro = []
    for m,u in zip(maps, union):
        lab, n = ndimage.label(u, np.ones((3, 3)))
        pro += [(m[lab == j], (lab == j).sum()) for j in range(1, n+1)]
    scores = sorted({*neg, *pos}, reverse=True)
    ts = [*scores, scores[-1]-1]
    fpr = [(neg > t).sum()/len(neg) for t in ts]
    tpr = [(pos > t).sum()/len(pos) for t in ts]
    curve = lambda rs: [np.mean([min((v > t).sum()/s, 1) for v,s in rs]) for t in ts]
    tp, fp = [np.array([(v > t).sum() for t in ts[1:]]) for v in (pos, neg)]
    out = dict(pixel_auroc=area(fpr, tpr, 1.), pixel_ap=sum(np.diff([0, *tp])*tp/(tp+fp))/len(pos),
               pixel_f1=max(2*tp/(tp+fp+len(pos))))
    for f,rs in dict(au_pro=pro, au_spro=spro).items(): out |= {(f, l): area(fpr, curve(rs), l) for l in limits}
    return out

def brute_of_name(images, name, limits):
    "images: (map, channels, saturations, kind, names). AU-sPRO by limit of the channels with that name alone."
    maps = [np.asarray(m, np.float64) for m,*_ in images]
    neg = np.concatenate([m[~c.any(0)] for m,(_,c,*_) in zip(maps, images)])
    rs = [(m[c], s) for m,(_,cs,ss,_,ns) in zip(maps, images) for c,s,n in zip(cs, ss, ns) if n == name]
    scores = sorted({*np.concatenate([m.ravel() for m in maps])}, reverse=True)
    ts = [*scores, scores[-1]-1]
    fpr = [(neg > t).sum()/len(neg) for t in ts]
    curve = [np.mean([min((v > t).sum()/s, 1) for v,s in rs]) for t in ts]
    return {l: area(fpr, curve, l) for l in limits}

def numbers(f):
    out = {k: getattr(f, k) for k in ('pixel_auroc', 'pixel_ap', 'pixel_f1')}
    return out | {(k, l): v for k in ('au_pro', 'au_spro') for l,v in (getattr(f, k) or {}).items()}

def differences(f, ref): return max(abs(numbers(f)[k]-v) for k,v in ref.items())

def evaluated(images, limits=LIMITS):
    e = Evaluation(limits)
    for m,c,s,k in images: e.update(m, c, s, k)
    return e.compute()

@st.composite
def categories(draw, kinds=('logical_anomalies', 'structural_anomalies')):
    "A few small images, good ones and ones with overlapping channels; few or many distinct scores of either sign."
    rng = np.random.default_rng(draw(st.integers(0, 2**32-1)))
    levels, dtype = draw(st.sampled_from([2, 5, 10**6])), draw(st.sampled_from([np.float32, np.float64]))
    scale = draw(st.sampled_from([1., 1e-3, 1e6]))
    images = []
    for kind in ['good']*draw(st.integers(1, 3)) + draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4)):
        h, w = rng.integers(1, 9, 2)
        m = ((rng.integers(0, levels, (h, w))-levels//3)/levels*scale).astype(dtype)
        c = np.zeros((0, h, w), bool)
        if kind != 'good':
            c = rng.random((rng.integers(1, 4), h, w)) < rng.choice([.1, .3, .7])
            c[np.arange(len(c)), rng.integers(0, h, len(c)), rng.integers(0, w, len(c))] = True
        images.append((m, c, [int(rng.integers(1, a.sum()+1)) for a in c], kind))
    order = rng.permutation(len(images))
    return [images[i] for i in order]


worst = 0.

@many
@given(categories())
def test_equals_the_loop_over_every_threshold(images):
    global worst
    r = evaluated(images)
    for kind,f in [*r.kinds.items(), (None, r.pooled)]:
        group = [i for i in images if kind is None or i[3] in ('good', kind)]
        d = differences(f, brute(group))
        worst = max(worst, d)
        assert d <= TOL
        assert all(0 <= v <= 1 for v in numbers(f).values())
        for c,au in ((f.spro_curve, f.au_spro), (f.pro_curve, f.au_pro)): # the drawn curve is the measured one
            assert (c[:, 0] == 0).all() and abs(c[:, -1]-1).max() <= TOL and (np.diff(c) >= 0).all()
            assert max(abs(area(*c, l)-v) for l,v in au.items()) <= TOL


@st.composite
def named(draw):
    "Such images, and for each the names of its channels: few that recur, or one for each channel"
    images = draw(categories())
    recur = draw(st.booleans())
    return images, [[draw(st.sampled_from('abc')) if recur else f'{i} {j}' for j in range(len(c))]
                    for i,(_,c,_,_) in enumerate(images)]

def names_evaluated(images, names, limits=LIMITS):
    e = Evaluation(limits)
    for (m,c,s,k),ns in zip(images, names): e.update(m, c, s, k, names=ns)
    return e.compute()

@many
@given(named(), st.sampled_from([LIMITS, (.123,), (.02, .999)]))
def test_named_defects_equal_the_loop_over_every_threshold(case, limits):
    images, names = case
    r = names_evaluated(images, names, limits)
    plain = evaluated(images, limits)
    for kind,f,p in [*((k, r.kinds[k], plain.kinds[k]) for k in r.kinds), (None, r.pooled, plain.pooled)]:
        group = [(i, ns) for i,ns in zip(images, names) if kind is None or i[3] in ('good', kind)]
        assert {n for _,ns in group for n in ns} == set(f.defects)
        assert sum(d['defects'] for d in f.defects.values()) == f.channels
        for name,d in f.defects.items():
            ref = brute_of_name([(*i, ns) for i,ns in group], name, limits)
            assert max(abs(d['au_spro'][l]-ref[l]) for l in limits) <= TOL
            assert all(0 <= v <= 1 for v in d['au_spro'].values())
            those = [i for i,ns in group if i[3] == 'good' or name in ns]
            assert d['images'] == sum(i[3] != 'good' for i in those)
            assert d['image_auroc'] == image_auroc([i[0].max() for i in those], [i[3] != 'good' for i in those])
        for l in limits:                                              # AU-sPRO is linear in the channels
            mean = sum(d['defects']*d['au_spro'][l] for d in f.defects.values())/f.channels
            assert abs(mean-f.au_spro[l]) <= TOL
        assert numbers(f) == numbers(p) and p.defects is None         # names change nothing else


def teardown_module(): print(f'\nlargest difference from the loop over every threshold: {worst:.1e}')


@some
@given(categories(), st.sampled_from([.001, .02, .123, .5, .999]))
def test_any_limit(images, limit):
    assert differences(evaluated(images, (limit,)).pooled, brute(images, (limit,))) <= TOL


@some
@given(categories())
def test_increasing_transforms_change_nothing(images):
    "Ranks, an affine map, a sinh and a cube: all in float64, where they keep distinct scores distinct"
    ref = evaluated(images).pooled
    values = np.unique(np.concatenate([m.ravel() for m,*_ in images]).astype(np.float64))
    top = np.abs(values).max() or 1.
    for f in (lambda x: np.searchsorted(values, x), lambda x: 3*x-7, lambda x: np.sinh(x/top), lambda x: x**3):
        assert len(np.unique(f(values))) == len(values)
        got = evaluated([(f(m.astype(np.float64)), c, s, k) for m,c,s,k in images]).pooled
        assert max(abs(v-numbers(got)[k]) for k,v in numbers(ref).items()) <= TOL
        for k in ('pixel_auroc', 'image_auroc', 'image_ap', 'image_f1'): assert getattr(got, k) == getattr(ref, k)


@some
@given(categories(), st.randoms(use_true_random=False))
def test_order_of_images_and_pixels(images, random):
    a = evaluated(images)
    random.shuffle(images)
    b = evaluated([(m[::-1].T, c[:, ::-1].transpose(0, 2, 1), s, k) for m,c,s,k in images])
    assert max(abs(v-numbers(b.pooled)[k]) for k,v in numbers(a.pooled).items()) <= TOL
    assert a.pooled.image_auroc == b.pooled.image_auroc and a.pooled.regions == b.pooled.regions


@some
@given(categories())
def test_torch_is_numpy(images):
    t = [(torch.tensor(m), torch.tensor(c), s, k) for m,c,s,k in images]
    assert evaluated(t).as_dict() == evaluated(images).as_dict()


@pytest.mark.parametrize('device', ['cpu', 'cuda', 'mps'])
def test_tensors_of_any_device(device):
    "Maps, masks, areas and scores as tensors, also of those that a network has just made"
    if device != 'cpu' and not getattr(torch, device).is_available(): pytest.skip(f'no {device} here')
    rng = np.random.default_rng(4)
    maps = rng.random((4, 7, 9)).astype(np.float32)
    masks = [rng.random((2, 7, 9)) < .3 for _ in range(2)] + [np.zeros((1, 7, 9), bool)]*2
    areas = [c.sum((1, 2))//2 for c in masks[:2]] + [()]*2
    ours = evaluate_maps(maps, masks, areas, scores=maps.mean((1, 2))).as_dict()
    def there(x): return torch.tensor(x, device=device)
    t = there(maps).requires_grad_()
    scores = there(maps.mean((1, 2)))
    found = evaluate_maps(t, [there(c) for c in masks], [there(a) if len(a) else a for a in areas], scores=scores)
    assert found.as_dict() == ours
    flat = there(np.stack([c.any(0) for c in masks]))
    assert pixel_auroc(t, flat) == ours['pooled']['pixel_auroc']
    y = there(np.array([1, 1, 0, 0]))
    for f, k in ((image_auroc, 'image_auroc'), (average_precision, 'image_ap'), (f1_max, 'image_f1')):
        assert f(scores, y) == f(list(scores), list(y)) == ours['pooled'][k]
    e = Evaluation()
    for m, c, a in zip(t, masks, areas): e.update(m, [there(x) for x in c], list(there(a)) if len(a) else a, score=m.mean())
    assert e.compute().pooled.au_spro == evaluate_maps(maps, masks, areas).pooled.au_spro
    assert regions(flat[0])[0] == regions(masks[0].any(0))[0]


@some
@given(categories())
def test_functions_agree(images):
    r = evaluated(images).pooled
    maps, masks = [m for m,*_ in images], [c.any(0) if len(c) else np.zeros(m.shape) for m,c,*_ in images]
    assert pixel_auroc(maps, masks) == r.pixel_auroc
    flat, y = np.concatenate([m.ravel() for m in maps]), np.concatenate([k.ravel() for k in masks])
    assert abs(average_precision(flat, y)-r.pixel_ap) <= TOL and f1_max(flat, y) == r.pixel_f1
    args = [m.max() for m in maps], [k != 'good' for *_,k in images]
    assert (image_auroc(*args), average_precision(*args), f1_max(*args)) == (r.image_auroc, r.image_ap, r.image_f1)
    good = [np.zeros((1, *m.shape)) if not len(c) else c for m,c,*_ in images]
    again = evaluate_maps(iter(maps), iter(good), (s for *_,s,_ in images), (k for *_,k in images))
    assert again.pooled.as_dict() == r.as_dict()


@many
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_agrees_with_sklearn(pairs):
    s, y = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs])
    if y.all() or not y.any(): return
    assert abs(image_auroc(s, y)-roc_auc_score(y, s)) <= TOL
    assert abs(average_precision(s, y)-average_precision_score(y, s)) <= TOL
    assert f1_max(s, y) == max(2*(y & (s >= t)).sum()/((s >= t).sum()+y.sum()) for t in s)


def test_many_scores_over_many_pages_agree_with_sklearn():
    "Random bit patterns: every exponent and sign, denormals and both zeros"
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    x = x[np.isfinite(x)][:16000].reshape(4, 40, 100)
    x[0, :5] = 0.; x[1, :5] = -0.
    y = rng.random(x.shape) < .2
    _, rank = np.unique(x, return_inverse=True) # sklearn's own sums overflow on such scores
    assert abs(pixel_auroc(x, y)-roc_auc_score(y.ravel(), rank.ravel())) <= TOL


def test_one_page_holds_more_than_a_batch():
    rng = np.random.default_rng(1)
    x = np.float32(1) + rng.integers(0, 50, (3, 1000, 1000)).astype(np.float32)*np.float32(2**-20)
    y = np.zeros(x.shape, bool); y[0, :300] = True
    x[0, :300] += np.float32(2**-17)
    assert abs(pixel_auroc(x, y)-roc_auc_score(y.ravel(), x.ravel())) <= TOL


def test_named_defects_of_more_than_a_batch():
    "Two overlapping defects of 1.2 million pixels each in one page, many ties"
    rng = np.random.default_rng(2)
    x = np.float32(1) + rng.integers(0, 50, (2, 1500, 1000)).astype(np.float32)*np.float32(2**-20)
    c = np.zeros((2, 1500, 1000), bool); c[0, :1200] = c[1, 200:1400] = True
    x[0, 700:] += np.float32(2**-17)
    s = [900_000, 1_200_000]
    f = Evaluation().update(x[0], c, s, names=['a', 'b']).update(x[1]).compute().pooled
    for l in LIMITS: assert abs(sum(d['au_spro'][l] for d in f.defects.values())/2-f.au_spro[l]) <= TOL
    neg, v = np.concatenate([x[0][~c.any(0)], x[1].ravel()]), np.sort(x[0][c[1]])[::-1]
    ts = np.unique(x)[::-1]
    ts = [*ts, ts[-1]-1]
    curve = [min((v > t).sum()/s[1], 1) for t in ts]
    assert abs(area([(neg > t).mean() for t in ts], curve, .05)-f.defects['b']['au_spro'][.05]) <= TOL


# by hand

def one(m, c, s, good=((0.,),), limits=(1.,)):
    return Evaluation(limits).update(np.array(m, float), np.array(c), s).update(np.array(good)).compute().pooled

def test_perfect_and_inverted():
    f = one([[2., 1.]], [[1, 0]], [1])
    assert (f.au_pro[1.], f.au_spro[1.], f.pixel_auroc, f.image_auroc) == (1, 1, 1, 1)
    f = one([[-2., -1.]], [[1, 0]], [1])
    assert (f.au_pro[1.], f.au_spro[1.], f.pixel_auroc, f.image_auroc) == (0, 0, 0, 0)

@pytest.mark.parametrize('value', [0., 1., -7.5, 1e30])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_constant_maps_are_worth_a_coin(value, dtype):
    m = np.full((4, 4), value, dtype)
    r = evaluate_maps([m, m], [np.eye(4), np.zeros((4, 4))], [[2], []], limits=LIMITS).pooled
    assert r.pixel_auroc == r.image_auroc == .5
    for l in LIMITS: assert abs(r.au_pro[l]-l/2) <= TOL and abs(r.au_spro[l]-l/2) <= TOL

def test_a_large_defect_saturates():
    "Two of four pixels lead, the others come last: half of PRO, all of sPRO with s = 2, two thirds with s = 3"
    m, c = [[9., 8., -1., -2., 1., 1.]], [[1, 1, 1, 1, 0, 0]]
    assert one(m, c, [4]).au_spro[1.] == one(m, c, [4]).au_pro[1.] == .5
    assert one(m, c, [2]).au_spro[1.] == 1
    assert abs(one(m, c, [3]).au_spro[1.] - 2/3) <= TOL
    assert one(m, c, [2]).au_pro[1.] == .5

def test_a_defect_smaller_than_its_saturation_is_fully_found():
    s = saturation(2, 100, False)
    assert s == 2 and one([[9., 8., 1.]], [[1, 1, 0]], [s]).au_spro[1.] == 1

def test_ties_at_the_saturation_do_not_matter():
    "Four tied pixels, s = 2: the overlap jumps from 0 to 1 together with the tied negative: a slanted piece over 1/2"
    f = one([[5., 5., 5., 5., 5.]], [[1, 1, 1, 1, 0]], [2])
    assert f.au_spro[1.] == .75
    assert f.spro_curve.tolist() == [[0, .5, 1], [0, 1, 1]]

def test_overlapping_channels_count_twice_and_the_pixel_once():
    "Both channels share the found pixel; the second has another, found last"
    f = one([[9., 1., -1.]], [[[1, 0, 0]], [[1, 0, 1]]], [1, 2])
    assert f.channels == 2 and f.regions == 2
    assert abs(f.au_spro[1.] - .75) <= TOL and f.pixel_auroc == .5

def test_pieces_that_touch_at_a_corner_are_one_region():
    assert regions(np.eye(3))[0] == 1 and regions([[1, 0, 1]])[0] == 2

def test_the_limit_cuts_a_slanted_piece():
    f = one([[5., 5.]], [[1, 0]], [1], good=[[0.]], limits=(.25, .5, 1.))
    assert [f.au_spro[l] for l in (.25, .5, 1.)] == [.25, .5, .75]

def test_good_images_count_for_every_kind_and_other_kinds_for_none():
    e = Evaluation((1.,))
    e.update([[3., 0.]], [[1, 0]], [1], 'logical_anomalies').update([[1., 9.]], [[1, 0]], [1], 'structural_anomalies')
    r = e.update([[2., 2.]]).compute()
    logical, structural = r.kinds['logical_anomalies'], r.kinds['structural_anomalies']
    assert logical.au_spro[1.] == 1 and structural.au_spro[1.] == 0 and r.mean['au_spro']['1.0'] == .5
    assert (logical.image_auroc, structural.image_auroc) == (1, 1)
    d = json.loads(json.dumps(r.as_dict()))
    assert d['image_auroc'] == 1 and d['pixel_auroc'] == .5 and set(d['kinds']) == set(r.kinds)

def test_names_by_kind_and_pooled():
    "The same name in two kinds: apart in each, together in the pool; an image with two names counts for both"
    e = Evaluation((.5, 1.))
    e.update([[3., 0., 0.]], [[[1, 0, 0]], [[1, 1, 0]]], [1, 1], 'logical_anomalies', names=['gone', 'swapped'])
    e.update([[1., 9.]], [[1, 0]], [1], 'structural_anomalies', names='gone').update([[2., 2.]])
    r = e.compute()
    logical, structural = (r.kinds[f'{k}_anomalies'].defects for k in ('logical', 'structural'))
    assert logical['gone'] == logical['swapped'] == dict(defects=1, images=1, image_auroc=1., au_spro={.5: 1., 1.: 1.})
    assert structural == {'gone': dict(defects=1, images=1, image_auroc=1., au_spro={.5: 0., 1.: 0.})}
    gone = r.pooled.defects['gone']                                   # negatives: 9, 2, 2 and the 0 of the first image
    assert (gone['defects'], gone['images'], gone['image_auroc']) == (2, 2, 1)
    assert gone['au_spro'] == {.5: (.5 + 0)/2, 1.: (.75 + .25)/2}
    d = json.loads(json.dumps(r.as_dict()))
    assert d['pooled']['defects']['gone']['au_spro'] == {'0.5': .25, '1.0': .5}
    assert d['kinds']['structural_anomalies']['defects']['gone']['image_auroc'] == 1
    assert 'defects' not in d['mean'] and 'defects' not in d

def test_names_without_saturations_have_no_areas():
    e = Evaluation((.5, 1.)).update([[3., 0.]], [[1, 0]], names=('scratch',)).update([[4.]]).compute()
    assert e.pooled.defects == {'scratch': dict(defects=1, images=1, image_auroc=0.)}
    assert 'defects' not in Evaluation().update([[3., 0.]], [[1, 0]]).update([[4.]]).compute().as_dict()['pooled']

def test_headline_numbers():
    rng = np.random.default_rng(3)
    def build(sat):
        e = Evaluation()
        for k in ('good', 'logical_anomalies', 'structural_anomalies'):
            c = [] if k == 'good' else rng.random((2, 9, 9)) < .2
            e.update(rng.random((9, 9)), c, [1, 1] if sat and len(c) else None, k)
        return e.compute()
    r = build(True); d = r.as_dict()
    assert d['au_spro'] == (d['au_spro_logical']+d['au_spro_structural'])/2 == r.mean['au_spro']['0.05']
    assert d['au_spro_logical'] == r.kinds['logical_anomalies'].au_spro[.05] and d['au_pro'] == r.mean['au_pro']['0.3']
    r = build(False); d = r.as_dict()
    assert 'au_spro' not in d and r.pooled.spro_curve is None and d['au_pro'] == r.pooled.au_pro[.3]
    assert d['pixel_auroc'] == r.pooled.pixel_auroc

def test_compute_may_be_called_between_updates():
    e = Evaluation().update([[1., 0.]], [[1, 0]], [1]).update([[0.5]])
    a = e.compute().as_dict()
    assert e.compute().as_dict() == a
    assert e.update([[2.]]).compute().pooled.image_auroc == .5

def test_a_score_may_differ_from_the_maximum():
    r = evaluate_maps([[[1.]], [[0.]]], [[[1]], [[0]]], scores=[0., 1.])
    assert r.pooled.image_auroc == 0 and r.pooled.au_spro is None

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.uint8, torch.int64])
def test_other_types(dtype):
    m = torch.tensor([[[3, 1], [2, 0]], [[1, 0], [0, 0]]]).to(dtype)
    y = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]]])
    assert pixel_auroc(m, y) == 1

def test_float32_and_float64_together():
    "0.1 in float64 is a little less than in float32: not a tie"
    assert float(np.float32(.1)) > .1
    m = [np.array([[.1]], np.float32), np.array([[.1]])]
    assert pixel_auroc(m, [[[1]], [[0]]]) == 1 and pixel_auroc(m, [[[0]], [[1]]]) == 0
    assert pixel_auroc([x.astype(np.float32) for x in m], [[[1]], [[0]]]) == .5


# saturation

@given(st.integers(1, 10**7), st.floats(1e-9, 1), st.integers(1, 10**7))
def test_saturation_is_from_1_to_the_area(area, share, pixels):
    assert saturation(area, share, True) == max(1, int(share*area)) <= area
    assert saturation(area, pixels, False) == min(pixels, area)

def test_channel_reads_defects():
    defects = (Defect('label', 255, 2, False), Defect('scratch', 254, .5, True))
    mask = np.zeros((4, 4), np.uint8); mask[0] = 254
    c, s = channel(mask, defects)
    assert s == 2 and (c == (mask > 0)).all()
    c, s = channel(torch.tensor(mask+1)*(torch.tensor(mask) > 0), defects)
    assert s == 2 and c.sum() == 4

@pytest.mark.parametrize('mask, says',
                         [([[0, 0]], 'marks no pixel'), ([[1, 255]], 'one value'), ([[0, 9]], 'does not list')])
def test_channel_refuses(mask, says):
    with pytest.raises(InputError, match=says) as e: channel(mask, (Defect('label', 255, 2, False),), 'gt/000.png')
    assert 'gt/000.png' in str(e.value)

@pytest.mark.parametrize('args', [(0, 1, False), (5, 0, False), (5, -1, True), (5, 1.1, True), (5, np.nan, False)])
def test_saturation_refuses(args):
    with pytest.raises(InputError): saturation(*args)


# bad input

OK, Y, N = [[1., 0.]], [[1, 0]], [[0, 0]]

@pytest.mark.parametrize('maps, masks, more, says', [
    ([[[float('nan'), 0.]], OK], [Y, N], {}, 'map 0 holds NaN'),
    ([OK, [[float('inf'), 0.]]], [Y, N], {}, 'map 1 holds NaN or infinite'),
    ([OK, OK], [N, N], {}, 'no image is anomalous'),
    ([OK, OK], [Y, Y], {}, 'no image is good'),
    ([OK], [[[1, 1]]], {}, 'no image is good'),
    ([], [], {}, 'no image is anomalous'),
    ([OK, OK], [[[1, 0], [1]], N], {}, r'map 0 is \(1, 2\) but its mask is \(2,\)'),
    ([OK, OK], [[[1]], N], {}, r'map 0 is \(1, 2\) but its mask is \(1, 1\)'),
    ([[1., 0.], OK], [[1, 0], N], {}, 'a map is'),
    ([OK, OK], [Y], {}, 'only 1 mask'),
    ([OK, OK], [Y, N], dict(kinds=['good', 'good']), 'map 0 is of a good image but its mask marks'),
    ([OK, OK], [Y, N], dict(kinds=['a', 'b']), 'map 1, mask 0: it marks no pixel'),
    ([OK, OK], [[Y, N], N], {}, 'map 0, mask 1: it marks no pixel'),
    ([OK, OK], [np.zeros((0, 1, 2)), N], dict(kinds=['a', 'good']), 'map 0 is of kind a but has no mask'),
    ([OK, OK], [Y, N], dict(saturations=[[1, 1], []]), '1 masks but 2 saturation areas'),
    ([OK, OK], [Y, N], dict(saturations=[[2], []]), 'from 1 to the area, 1'),
    ([OK, OK], [Y, N], dict(saturations=[[0], []]), 'the saturation area is 0'),
    ([OK, OK], [Y, N], dict(saturations=[[.5], []]), 'whole number'),
    ([OK, OK, OK], [Y, Y, N], dict(saturations=[[1], None, None]), 'map 1 comes without saturation areas'),
    ([OK, OK], [Y, N], dict(names=[['a', 'b'], []]), '1 masks but 2 names'),
    ([OK, OK], [Y, N], dict(names=[[7], []]), 'map 0, mask 0: the name of the defect is 7'),
    ([OK, OK], [Y, N], dict(names=[[''], []]), "the name of the defect is ''"),
    ([OK, OK], [Y, N], dict(names=[['a']]), 'only 1 names'),
    ([OK, OK, OK], [Y, Y, N], dict(names=[['a'], None, None]), 'map 1 comes without names'),
    ([OK, OK, OK], [Y, Y, N], dict(names=[None, ['a'], None]), 'map 1 comes with names'),
    ([OK, OK], [Y, N], dict(scores=[float('nan'), 0]), 'image 0 has the score nan'),
    ([OK, OK], [Y, N], dict(limits=(0., 1)), 'above 0 and at most 1'),
    ([OK, OK], [Y, N], dict(limits=()), 'above 0 and at most 1'),
])
def test_bad_input_in_one_sentence(maps, masks, more, says):
    with pytest.raises(InputError, match=says) as e: evaluate_maps(maps, masks, **more)
    assert '\n' not in str(e.value)

def test_no_negatives():
    with pytest.raises(InputError, match='normal pixels'): pixel_auroc([[[1.]]], [[[1]]])
    with pytest.raises(InputError, match='no pixel is marked'): pixel_auroc([[[1.]]], [[[0]]])
    with pytest.raises(InputError, match='labelled normal'): image_auroc([1, 2], [1, 1])
    with pytest.raises(InputError, match='labelled anomalous'): image_auroc([1, 2], [0, 0])
    with pytest.raises(InputError, match='2 image scores but 1 labels'): image_auroc([1, 2], [0])
    with pytest.raises(InputError, match='is nan'): image_auroc([1, float('nan')], [0, 1])

def test_a_refused_image_is_not_counted():
    e = Evaluation().update([[1., 0.]], [[1, 0]], [1]).update([[0.5]])
    before = e.compute().as_dict()
    for bad in (([[2., float('nan')]],), ([[2., 1.]], [[1, 0]]), ([[2., 1.]], [[1, 0]], [7]), ([[2., 1.]], [[1]], [1])):
        with pytest.raises(InputError): e.update(*bad)
    assert e.compute().as_dict() == before

def test_what_a_refused_image_came_with_binds_no_other():
    e = Evaluation()
    with pytest.raises(InputError): e.update([[2., 1.]], [[1, 0]], [1], names=['a', 'b'])
    with pytest.raises(InputError): e.update([[2., 1.]], [[1, 0]], [7], names=['a'])
    r = e.update([[2., 1.]], [[1, 0]]).update([[.5]]).compute()
    assert r.pooled.au_spro is None and r.pooled.defects is None
