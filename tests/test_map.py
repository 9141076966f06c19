"The glossary and the page that maps the paper to the code: every name on them exists, and equations lead where they should."
import importlib
import json
import re
from pathlib import Path

import pytest

LEARN = Path(__file__).resolve().parents[1]/'nbs'/'learn'
PAGES = 'glossary', 'map'

def text(page):
    cells = json.loads((LEARN/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')

def names(page): return sorted(set(re.findall(r'`(pradot\.[\w.]+)`', text(page))))

def resolve(name):
    "The object of a dotted name: a module's, or a class's of a module"
    _, module, *rest = name.split('.')
    x = importlib.import_module(f'pradot.{module}')
    for part in rest: x = getattr(x, part)
    return x

@pytest.mark.parametrize('page,name', [(p, n) for p in PAGES for n in names(p)])
def test_every_name_exists(page, name): resolve(name)

def test_a_wrong_name_would_be_found():
    with pytest.raises(AttributeError): resolve('pradot.cost.no_such_thing')

def test_names_are_public():
    for page in PAGES:
        for name in names(page):
            _, module, first, *_ = name.split('.')
            assert first in importlib.import_module(f'pradot.{module}').__all__, name

def test_all_equations_and_lines_are_there():
    page = text('map')
    for k in range(1, 7): assert re.search(rf'^\| Eq\. {k}\b', page, re.M), f'Eq. {k}'
    assert 'Algorithm 1' in page

@pytest.mark.parametrize('equation,name,said', [
    ('Eq. 1', 'pradot.cost.cost', 'Eq. 1'), ('Eq. 3', 'pradot.cost.normalised_cost', 'Eq. 3'), ('Eq. 4', 'pradot.transport.sinkhorn', 'Eq. 4'),
    ('Eq. 6', 'pradot.prototypes.nearest', 'Eq. 6')])
def test_the_function_says_which_equation_it_is(equation, name, said):
    line = next(l for l in text('map').splitlines() if l.startswith(f'| {equation} |'))
    assert f'`{name}`' in line and said in resolve(name).__doc__

@pytest.mark.parametrize('page', PAGES)
def test_links_lead_to_pages(page):
    for link in re.findall(r'\]\(([^)#]+\.ipynb)', text(page)): assert (LEARN/link).resolve().is_file(), link

def pictures(cells): return [''.join(o['data']['image/png']) for c in cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]

def test_slides_show_the_figures_of_the_lessons():
    "A figure that was drawn anew must be taken into the slides anew: run slides.ipynb"
    cells = json.loads((LEARN/'slides.ipynb').read_text(encoding='utf-8'))['cells']
    calls = [(c, m) for c in cells if (m := re.search(r"^figure\('(\w+)', '(.*)'\)$", ''.join(c['source']), re.M))]
    assert len(calls) > 15
    for cell, m in calls:
        lesson = json.loads((LEARN/f'{m[1]}.ipynb').read_text(encoding='utf-8'))['cells']
        begin = m[2].replace("\\'", "'")
        theirs = next(c for c in lesson if f'#| fig-cap: {begin}' in ''.join(c['source']))
        alt = [re.search(r'#\| fig-alt: (.*)', ''.join(c['source']))[1] for c in (cell, theirs)]
        assert alt[0] == alt[1], f'{m[1]}: {begin}'
        mine, = pictures([cell])
        assert mine.strip() == pictures([theirs])[0].strip(), f'{m[1]}: {begin}'
