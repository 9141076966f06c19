"""The pages: links that lead somewhere, figures with a description, citations with an entry, nothing that needs a network.
PRADOT_SITE=_docs checks a rendered site as well (nbdev_docs makes it)."""
import base64
import copy
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from PIL import Image, ImageDraw

import badges
from pradot.transport import Transport

HOST = 'https://pradot.github.io/pradot/'
COLAB = 'https://colab.research.google.com/github/pradot/pradot/blob/main/nbs/'
MOST = 2*2**20                                       # bytes of a page with its own pictures

@pytest.fixture(scope='module')
def notebooks(root):
    return {p.relative_to(root/'nbs').as_posix(): json.loads(p.read_text(encoding='utf-8'))
            for p in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in p.parts}

@pytest.fixture(scope='module')
def pages_script(root):
    spec = importlib.util.spec_from_file_location('site_pages', root/'site_pages.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def source(cell): return ''.join(cell['source'])
def prose(nb):
    "A notebook's text without code"
    text = '\n\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'markdown')
    return re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)

def name(page): return re.sub(r'^\d+[a-z]?_', '', Path(page).name).replace('.ipynb', '.html')
def address(page): return (Path(page).parent/name(page)).as_posix()

def anchors(nb):
    "What a link into this notebook's page may point at: headings, documented names, numbered equations"
    text = '\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'markdown')
    heads = {re.sub(r'[^\w\s.-]', '', re.sub(r'`|\{.*\}', '', h)).strip().lower().replace(' ', '-')
             for h in re.findall(r'^#+ (.+)$', text, re.M)}
    code = '\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'code')
    names = {n.lower() for n in re.findall(r'^(?:def|class) (\w+)', code, re.M)}
    return heads | names | {f'equation-{n}' for n in re.findall(r'\\tag\{(\w+)\}', text)}

# --- the notebooks

def test_every_figure_has_a_description(notebooks):
    bare = [f'{n}: {source(c)[:60]!r}' for n, nb in notebooks.items() for c in nb['cells'] if c['cell_type'] == 'code'
            and any(k.startswith('image/') for o in c['outputs'] for k in o.get('data', {}))
            and not re.search(r'^#\s*\|\s*fig-alt:\s*\S', source(c), re.M) and '#| hide' not in source(c)]
    assert bare == [], 'say in `#| fig-alt:` what the figure shows'

def test_cell_options_are_yaml(notebooks):
    "An unquoted `: ` in a description, say, stops the rendering of the whole site"
    wrong = []
    for n, nb in notebooks.items():
        for c in nb['cells']:
            lines = re.findall(r'^#\s*\| ?((?:fig|code|label|echo|tbl)[\w-]*:.*)$', source(c), re.M) if c['cell_type'] == 'code' else []
            try: yaml.safe_load('\n'.join(lines))
            except yaml.YAMLError as e: wrong.append(f'{n}: {str(e).splitlines()[0]} in {lines[0][:60]!r}')
    assert wrong == []

def test_badge_and_installation_come_from_settings(root, notebooks):
    for n, nb in notebooks.items():
        if not badges.runs(nb): continue
        title, badge, install = map(source, nb['cells'][:3])
        assert title.startswith('# ') and '\n\n> ' in title, n
        assert badge == badges.badge(root, n) and install == badges.install(root, n), f'{n}: run python tests/badges.py'

def test_the_installing_cell_does_nothing_elsewhere(root):
    code = badges.install(root).replace('%pip install -q ', 'raise SystemExit #')
    exec(code, {})                                                       # there is no google.colab here
    with pytest.MonkeyPatch.context() as m:
        for k in ('google', 'google.colab'): m.setitem(sys.modules, k, types.ModuleType(k))
        with pytest.raises(SystemExit): exec(code, {})

def test_links_in_notebooks_lead_somewhere(root, notebooks):
    by_address, broken = {address(n): n for n in notebooks}, []
    for n, nb in notebooks.items():
        for target in re.findall(r'(?<!!)\[[^\]]*\]\(([^)\s]+)\)', prose(nb)):
            if target.startswith(HOST): page = by_address.get(target[len(HOST):].split('#')[0] or 'index.html')
            elif re.match(r'\w+:', target): continue
            else:
                path = (root/'nbs'/n).parent/unquote(target.split('#')[0]) if target[0] != '#' else root/'nbs'/n
                page = os.path.relpath(path, root/'nbs').replace(os.sep, '/') if path.exists() else None
            if page is None: broken.append(f'{n}: {target}')
            elif '#' in target and page in notebooks and target.split('#')[1] not in anchors(notebooks[page]):
                broken.append(f'{n}: {target} (no such heading)')
    assert broken == []

def test_citations_have_an_entry(root, notebooks):
    bib = (root/'nbs'/'references.bib').read_text(encoding='utf-8')
    keys = re.findall(r'^@\w+\{([^,]+),', bib, re.M)
    assert len(keys) == len(set(keys))
    cited = {(n, k) for n, nb in notebooks.items() for k in re.findall(r'(?<![\w/.])@([a-z]\w*)', prose(nb))}
    assert cited and sorted((n, k) for n, k in cited if k not in keys) == []
    assert bib.count('{') == bib.count('}')

def test_an_equation_has_one_home_in_the_library(notebooks):
    tags = [t for n, nb in notebooks.items() if '/' not in n for t in re.findall(r'\$\$[^$]*\\tag\{(\w+)\}', prose(nb))]
    assert sorted(tags) == ['1', '2', '3', '4', '5', '6']

def test_names_in_prose_exist(notebooks):
    wrong = []
    for n, nb in notebooks.items():
        text = '\n'.join(source(c) for c in nb['cells'] if c['cell_type'] == 'markdown')
        for dotted in set(re.findall(r'`pradot\.(\w+(?:\.\w+)+)`', text)):
            module, *rest = dotted.split('.')
            try: functools.reduce(getattr, rest, importlib.import_module(f'pradot.{module}'))
            except (ImportError, AttributeError): wrong.append(f'{n}: pradot.{dotted}')
    assert wrong == []

def test_pages_that_say_how_to_cite_agree(root):
    cff = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    settings = (root/'settings.ini').read_text(encoding='utf-8')
    assert cff['version'] == re.search(r'^version = (\S+)', settings, re.M)[1]
    title = re.sub(r'\W+', ' ', cff['preferred-citation']['title'])
    for f in ('README.md', 'nbs/references.bib'):
        assert title in re.sub(r'\W+', ' ', (root/f).read_text(encoding='utf-8')), f

def test_contributing_is_its_page(root, notebooks):
    "CONTRIBUTING.md is made from contributing.ipynb by nbdev_contributing"
    def words(t): return ' '.join(re.findall(r'\w+', t))
    file = words(re.sub(r'\]\([^)]*\)', ']', (root/'CONTRIBUTING.md').read_text(encoding='utf-8')))
    for cell in notebooks['contributing.ipynb']['cells'][1:]:
        for part in re.split(r'\n\s*\n', source(cell)):
            if part.startswith('```'): continue
            assert words(re.sub(r'\]\([^)]*\)', ']', part)) in file, f'run nbdev_contributing: {part[:80]!r}'

# --- what site_pages.py makes of them

def cell(kind, text, *outputs):
    c = dict(cell_type=kind, source=text, metadata={})
    return c | dict(outputs=[dict(output_type='display_data', data=d) for d in outputs]) if kind == 'code' else c

def photo(size): return Image.merge('RGB', [Image.effect_noise(size, 90) for _ in range(3)])

def png(picture):
    file = io.BytesIO()
    picture.convert('RGBA').save(file, 'PNG')
    return base64.b64encode(file.getvalue()).decode()

@pytest.fixture
def small():
    widget = {'application/vnd.jupyter.widget-view+json': {}, 'text/plain': 'w'}
    return {
        '03_cost.ipynb': dict(metadata={}, cells=[
            cell('markdown', 'By Eq. 1, and Eq. 1, and `Eq. 1`\n\n$$C = 1 . \\tag{1}$$\n\n# Equation 1\n\nFigure 4b, Table 9.'),
            cell('code', 'df', {'text/html': ['<table>\n', '\n<tr></tr></table>'], 'text/plain': 'df'}, widget,
                 {'application/javascript': 'x'})]),
        'paper/fig4_assignments.ipynb': dict(metadata={}, cells=[
            cell('markdown', f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({COLAB}x.ipynb)'),
            cell('markdown', 'Figure 4 draws Equation 1 [see Eq. 1, here](x.html).'),
            cell('code', 'import os\nimport re\nimport sys'), cell('code', '\n'.join(f'x{i} = {i}' for i in range(20)),
                 {'image/png': png(photo((500, 500)))}), cell('code', 'x', {'image/png': png(Image.new('RGB', (50, 50)))})])}

def test_prepared_pages_need_no_network(pages_script, small):
    pages_script.prepare(small)
    code = small['03_cost.ipynb']['cells'][1]
    assert [sorted(o['data']) for o in code['outputs']] == [['text/markdown', 'text/plain'], ['text/plain']]
    assert '<table>' in code['outputs'][0]['data']['text/markdown']
    assert 'badge' not in source(small['paper/fig4_assignments.ipynb']['cells'][0])
    assert f'[Open in Colab]({COLAB}x.ipynb){{.colab}}' == source(small['paper/fig4_assignments.ipynb']['cells'][0])

def test_prepared_pages_link_to_what_they_name(pages_script, small):
    pages_script.prepare(small)
    cells = small['03_cost.ipynb']['cells'][0], small['paper/fig4_assignments.ipynb']['cells'][1]
    assert all(isinstance(line, str) and line.count('\n') <= 1 for c in cells for line in c['source'])   # as Quarto wants them
    cost, fig = map(source, cells)
    assert cost == ('By [Eq. 1](#equation-1), and Eq. 1, and `Eq. 1`\n\n[$$C = 1 . \\qquad (1)$$]{#equation-1 .equation}\n\n'
                    '# Equation 1\n\n[Figure 4b](paper/fig4_assignments.ipynb), Table 9.')
    assert fig == 'Figure 4 draws [Equation 1](../03_cost.ipynb#equation-1) [see Eq. 1, here](x.html).'

def test_prepared_pages_are_light_and_folded(pages_script, small):
    pages_script.prepare(small)
    imports, long, short = small['paper/fig4_assignments.ipynb']['cells'][2:]
    assert source(imports).startswith('#| code-fold: true\n#| code-summary: Imports\n')
    assert source(long).startswith('#| code-fold: true\n#| code-summary: Code\n') and source(short) == 'x'
    assert list(long['outputs'][0]['data']) == ['image/jpeg'] and list(short['outputs'][0]['data']) == ['image/png']
    jpeg = Image.open(io.BytesIO(base64.b64decode(long['outputs'][0]['data']['image/jpeg'])))
    assert jpeg.size == (500, 500)

def test_signatures_are_plain(pages_script):
    shown = '[`f`](x.html)\n\n```python\ndef g(\n    a:__main__.A, # See [`f`](x.html#f), one of `A`\n)\n```\n\nas [`f`](x.html)'
    c = cell('code', 'x', {'text/markdown': shown.splitlines(True)})
    pages_script.signatures(c)
    assert c['outputs'][0]['data']['text/markdown'] == shown.replace('[`f`](x.html#f)', '`f`').replace('__main__.', '')
    c = cell('code', 'x', {'text/markdown': '```python\ndef Plan(\n    *args, **kwargs\n):\n```\n\n*A plan*'})
    pages_script.signatures(c)
    assert c['outputs'][0]['data']['text/markdown'] == '```python\nclass Plan\n```\n\n*A plan*'

def test_fields_of_a_class_are_shown(pages_script):
    url = 'https://github.com/pradot/pradot/blob/main/pradot/transport.py#L22'
    c = cell('code', 'x', {'text/markdown': f'[source]({url})\n\n```python\nclass Transport\n```\n\n*An account*'})
    pages_script.signatures(c)
    shown = c['outputs'][0]['data']['text/markdown']
    assert '\n    converged:bool ' in shown and 'class Transport\n    ' in shown and shown.endswith('\n```\n\n*An account*')
    assert shown.count('\n    ') == len(Transport._fields)

def test_nbdev_s_warning_makes_no_slide(pages_script):
    cells = [cell('markdown', '<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->'), cell('markdown', '## A slide')]
    pages = {'learn/slides.ipynb': dict(metadata={}, cells=cells)}
    pages_script.prepare(pages)
    assert [source(c) for c in pages['learn/slides.ipynb']['cells']] == ['## A slide']

def test_numbers_stay_on_one_line(pages_script):
    c = cell('code', 'x', {'text/markdown': '| 1.2 ± 0.3 / 4. ± 5 | 6 % of a | and / or |'})
    pages_script.unbroken(c)
    assert c['outputs'][0]['data']['text/markdown'].replace('\N{NO-BREAK SPACE}', '~') == '| 1.2~±~0.3~/ 4.~±~5 | 6~% of a | and / or |'

def test_drawings_stay_sharp_and_photos_lose_what_nobody_sees(pages_script):
    drawing = Image.new('RGB', (1500, 300), 'white')
    ImageDraw.Draw(drawing).line((0, 0, 1500, 300), fill='#0072b2', width=9)
    for picture, kind, size in (drawing, 'image/png', (1500, 300)), (photo((1500, 300)), 'image/jpeg', (1100, 220)):
        c = cell('code', 'x', {'image/png': png(picture)})
        before = len(c['outputs'][0]['data']['image/png'])
        pages_script.lighter(c)
        (found, data), = c['outputs'][0]['data'].items()
        after = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (found, after.size) == (kind, size) and len(data) < before
        if picture is drawing: assert after.convert('RGB').tobytes() == drawing.tobytes()

@pytest.mark.parametrize('size,scrolls', [((1500, 300), True), ((1500, 900), False), ((600, 100), False)])
def test_broad_pictures_are_marked(pages_script, size, scrolls):
    c = cell('code', '#| fig-alt: x\nplot()', {'image/png': png(Image.new('RGB', size))})
    pages_script.broad(c)
    pages_script.broad(c)
    assert source(c) == '#| classes: broad\n'*scrolls + '#| fig-alt: x\nplot()'

def test_only_the_icons_in_use_are_kept(pages_script, tmp_path):
    css = tmp_path/'site_libs'/'bootstrap'/'bootstrap-icons.css'
    css.parent.mkdir(parents=True)
    rules = ['.bi::before {\n  line-height: 1;\n}\n'] + [f'.bi-{n}::before {{ content: "x"; }}\n' for n in ('list', 'list-ol', 'moon')]
    css.write_text(''.join(rules))
    (tmp_path/'a.html').write_text('<i class="bi bi-list"></i>')
    (tmp_path/'site_libs'/'a.js').write_text('x = "bi-moon"')
    pages_script.icons(tmp_path)
    assert css.read_text() == rules[0] + rules[1] + rules[3]

@pytest.mark.parametrize('text,link', [('Figure 3a', 'fig3a_batch.ipynb'), ('Figure 3b', 'fig3b_alpha.ipynb'), ('Figure 3', 'fig3a_batch.ipynb'),
                                       ('Figure 4b', 'fig4_assignments.ipynb')])
def test_a_figure_with_a_letter_has_its_own_page(pages_script, text, link):
    found = pages_script.targets({f'paper/{n}.ipynb': {'cells': []} for n in ('fig3a_batch', 'fig3b_alpha', 'fig4_assignments')})
    assert pages_script.link(f'See {text}.', '03_cost.ipynb', found) == f'See [{text}](paper/{link}).'
    assert pages_script.link(f'See {text}.', f'paper/{link}', found) == f'See {text}.'

def test_preparing_twice_changes_nothing_and_new_pages_still_find_the_equations(pages_script, small):
    new = copy.deepcopy(small['paper/fig4_assignments.ipynb'])
    pages_script.prepare(small)
    once = json.dumps(small)
    pages_script.prepare(small)
    assert json.dumps(small) == once
    small['paper/fig4_assignments.ipynb'] = new      # written anew by nbdev, because its notebook changed
    pages_script.prepare(small)
    assert json.dumps(small) == once

# --- the rendered site

class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loads, self.bare = set(), [], [], []
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag in ('img', 'script', 'source', 'iframe') and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('rel') in ('stylesheet', 'icon', 'preload'): self.loads.append(a['href'])
        if tag == 'img' and not a.get('alt'): self.bare.append(a.get('src', '')[:80])

@pytest.fixture(scope='module')
def rendered(root):
    where = os.environ.get('PRADOT_SITE')
    if not where: pytest.skip('set PRADOT_SITE to a rendered site to check it')
    where, found = (root/where).resolve(), {}
    for p in sorted(where.rglob('*.html')):
        if 'site_libs' in p.parts: continue
        found[p] = Page()
        found[p].feed(p.read_text(encoding='utf-8'))
    assert found, f'no pages in {where}'
    return found

def local(page, target):
    "(file, anchor) of an address within the site; None for one elsewhere"
    u = urlsplit(target)
    if u.scheme or u.netloc: return None
    return (page.parent/unquote(u.path)).resolve() if u.path else page, unquote(u.fragment)

def test_links_of_the_site_lead_somewhere(rendered):
    broken = []
    for page, p in rendered.items():
        for target in p.links:
            if not (to := local(page, target)): continue
            file, anchor = to
            if not file.exists(): broken.append(f'{page.name}: {target}')
            elif anchor and file in rendered and anchor not in rendered[file].ids: broken.append(f'{page.name}: {target} (anchor)')
    assert broken == []

def test_the_site_loads_nothing_from_elsewhere(rendered):
    loads = [(page.name, t) for page, p in rendered.items() for t in p.loads if not t.startswith('data:')]
    assert [x for x in loads if re.match(r'(\w+:)?//', x[1])] == []
    assert [(n, t) for page, p in rendered.items() for n, t in [(page.name, t) for t in p.loads]
            if (to := local(page, t)) and not to[0].exists()] == []

def test_pictures_of_the_site_have_descriptions(rendered):
    assert [(page.name, b) for page, p in rendered.items() for b in p.bare] == []

def test_pages_of_the_site_are_light(rendered):
    weight = {page.name: page.stat().st_size + sum(to[0].stat().st_size for t in set(p.loads) if 'site_libs' not in t
                                                   and (to := local(page, t)) and to[0].exists()) for page, p in rendered.items()}
    assert {n: w for n, w in weight.items() if w > MOST} == {}
