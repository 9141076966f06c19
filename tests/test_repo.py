"Facts about the checkout itself: what is generated is up to date, and what must not be committed is not."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SITE = '_quarto.yml'

def git(root, *args):
    "Output of a git command in `root`; None where there is no git or no checkout"
    if not (root/'.git').exists(): return None
    try: return subprocess.run(['git', *args], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError): return None

@pytest.fixture(scope='session')
def tracked(root):
    "Paths of the files under version control, relative to the top"
    out = git(root, 'ls-files', '-z')
    if out is None: pytest.skip('not a git checkout: which files are committed is unknown')
    return [f for f in out.split('\0') if f and (root/f).is_file()]

@pytest.fixture(scope='session')
def notebooks(root):
    found = {p.relative_to(root/'nbs').as_posix(): json.loads(p.read_text(encoding='utf-8'))
             for p in sorted((root/'nbs').rglob('*.ipynb'))
             if not any(o[0] in '._' for o in p.relative_to(root/'nbs').parts)}
    assert found, 'no notebooks in nbs/'
    return found

@pytest.fixture(scope='session')
def site(root): return yaml.safe_load((root/SITE).read_text(encoding='utf-8'))

def code(nb): return [c for c in nb['cells'] if c['cell_type'] == 'code']
def source(cell): return ''.join(cell['source'])

@pytest.fixture
def copy(root, tracked, tmp_path):
    "A copy of the tracked files as they stand now"
    for f in tracked:
        to = tmp_path/f
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((root/f).read_bytes())
    return tmp_path

def nbdev(command, cwd):
    "Run one of nbdev's commands from the environment of these tests"
    script = Path(sys.executable).parent/command
    if not script.exists(): pytest.skip(f'{command} is not installed: pip install -e ".[dev]"')
    env = {**os.environ, 'PYTHONPATH': str(cwd), 'GIT_CEILING_DIRECTORIES': str(cwd.parent)}
    subprocess.run([str(script)], cwd=cwd, check=True, capture_output=True, text=True, env=env)

def differing(root, copy, pattern, tracked):
    "Files matching `pattern` that differ between checkout and copy, or stand in one only"
    new = {p.relative_to(copy).as_posix() for p in copy.glob(pattern)}
    top, ending = pattern.split('/')[0], Path(pattern).suffix
    old = {f for f in tracked if f.startswith(f'{top}/') and f.endswith(ending)}
    return sorted(new ^ old) + sorted(f for f in new & old if (copy/f).read_bytes() != (root/f).read_bytes())

def test_notebooks_ran():
    ran = os.environ.get('PRADOT_NOTEBOOKS')
    if not ran: pytest.skip('the notebooks are executed by ./run test')
    assert ran == 'passed', 'nbdev_test failed: see its messages above'

def test_exported(root, copy, tracked):
    nbdev('nbdev_export', copy)
    assert differing(root, copy, 'pradot/**/*.py', tracked) == [], 'run nbdev_export and commit pradot/'

def test_clean(root, copy, tracked):
    nbdev('nbdev_clean', copy)
    assert differing(root, copy, 'nbs/**/*.ipynb', tracked) == [], 'run nbdev_clean and commit nbs/'

def test_outputs_are_stored_and_without_errors(notebooks):
    empty = [n for n, nb in notebooks.items() if len(code(nb)) > 2 and not any(c['outputs'] for c in code(nb))]
    errors = [n for n, nb in notebooks.items() if any(o['output_type'] == 'error' for c in code(nb) for o in c['outputs'])]
    assert empty == [], 'run these notebooks and commit them with their outputs'
    assert errors == [], 'these notebooks store an error'

def test_imports_stand_alone(notebooks):
    "The site executes cells that contain imports; so imports share a cell with nothing else"
    mixed = []
    for name, nb in notebooks.items():
        for cell in code(nb):
            lines = [l for l in source(cell).splitlines() if l.strip() and not l.lstrip().startswith(('#', '%', '!'))]
            imports = [bool(re.match(r'(import|from)\s', l)) for l in lines]
            other = [not i and not re.match(r'\s|\)', l) for i, l in zip(imports, lines)]
            if any(imports) and any(other): mixed.append((name, lines[0]))
    assert mixed == []

def words(text):
    "The words of a text, without what Markdown or its renderer adds around them"
    text = re.sub(r'<!--.*?-->|\]\([^)\s]*\)|<[^>]+>|\\', ' ', text, flags=re.S)
    return ' '.join(re.findall(r'\w+', text.replace('_', ' ')))

def test_readme_is_the_home_page(root, notebooks):
    "README.md is made from index.ipynb by nbdev_readme: each of its headings, paragraphs and shown code, in order"
    if 'index.ipynb' not in notebooks: pytest.skip('there is no nbs/index.ipynb')
    readme, at = words((root/'README.md').read_text(encoding='utf-8')), 0
    for cell in notebooks['index.ipynb']['cells']:
        text = source(cell)
        if cell['cell_type'] == 'raw' or re.search(r'^#\s*\|\s*(hide|echo: false|include: false)', text, re.M): continue
        title = text.startswith('# ')  # the > line under it describes the page and is not part of README.md
        text = '\n'.join(l for l in text.splitlines() if not re.match(r'#\s*\||\|[-:| ]+\|$|\s*:::|!\[', l.strip())
                         and not (title and l.startswith('>')))
        for part in re.split(r'\n\s*\n', text):
            found = readme.find(words(part), at)
            assert found >= 0, f'README.md lacks this part of index.ipynb (run nbdev_readme): {part[:200]!r}'
            at = found

def test_home_page_is_the_readme(root, notebooks):
    "...and README.md has no paragraph that index.ipynb lacks"
    if 'index.ipynb' not in notebooks: pytest.skip('there is no nbs/index.ipynb')
    index = words('\n'.join(source(c) + '\n' + json.dumps(c.get('outputs', []), ensure_ascii=False).replace('\\n', '\n')
                            for c in notebooks['index.ipynb']['cells']))
    text = re.sub(r'<!--.*?-->|^!\[.*?\)$|<img.*?>|<figure.*?</figure>', '', (root/'README.md').read_text(encoding='utf-8'),
                  flags=re.S | re.M)
    for part in re.split(r'\n\s*\n', text):
        if re.search(r'^\s*(<|\||```)|^ {4}', part): continue  # tables, HTML and outputs are laid out anew
        assert words(part) in index, f'README.md has what index.ipynb lacks (run nbdev_readme): {part[:200]!r}'

def pages(node):
    "Every page named anywhere in the sidebar or the navigation bar"
    if isinstance(node, str): return [node] if re.search(r'\.(ipynb|qmd)$', node) else []
    if isinstance(node, dict): node = list(node.values())
    return [p for o in node for p in pages(o)] if isinstance(node, list) else []

def test_site_lists_every_page_once(site, notebooks):
    listed = pages(site['website']['sidebar'])
    assert len(listed) == len(set(listed)), 'the sidebar names a page twice'
    assert sorted(set(listed) - set(notebooks)) == [], f'{SITE} names pages that are not in nbs/'
    assert sorted(set(notebooks) - set(listed)) == [], f'notebooks missing in the sidebar of {SITE}'
    assert set(pages(site['website']['navbar'])) <= set(listed)

def test_one_site_configuration(root, site, tracked):
    link = root/'nbs'/SITE
    assert link.is_symlink() and os.readlink(link) == f'../{SITE}'
    assert 'nbs/nbdev.yml' not in tracked, 'nbs/nbdev.yml is written from settings.ini: do not commit it'
    settings = (root/'settings.ini').read_text(encoding='utf-8')
    user, repo = (re.search(rf'^{k} *= *(\S+)', settings, re.M)[1] for k in ('user', 'repo'))
    source_link = [t['href'] for t in site['website']['navbar']['tools']]
    assert source_link == [f'https://github.com/{user}/{repo}']

def test_a_build_holds_weights_tables_results_and_notebooks(root, tracked, tmp_path):
    pytest.importorskip('setuptools')
    copy, built = tmp_path/'copy', tmp_path/'built'
    links = 'pradot/paper', 'pradot/results', 'pradot/notebooks'    # to data/paper, data/results and nbs/paper
    for f in [*links, *tracked]:
        if not f.startswith(('pradot/', 'data/paper/', 'data/results/', 'nbs/paper/')) and '/' in f: continue
        (copy/f).parent.mkdir(parents=True, exist_ok=True)
        if (root/f).is_symlink(): os.symlink(os.readlink(root/f), copy/f)
        else: (copy/f).write_bytes((root/f).read_bytes())
    subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', str(built)], cwd=copy, check=True,
                   capture_output=True)
    for i in (1, 2, 3, 4):
        f = f'paper/table{i}.csv'
        assert not (built/'pradot'/f).is_symlink() and (built/'pradot'/f).read_bytes() == (root/'data'/f).read_bytes()
    for here, there in (('data/results', 'results'), ('nbs/paper', 'notebooks')):
        kept = {Path(f).name for f in tracked if f.startswith(f'{here}/') and f.endswith(('.json', '.csv', '.ipynb'))}
        assert kept and {p.name for p in (built/'pradot'/there).iterdir()} == kept
        assert all((built/'pradot'/there/k).read_bytes() == (root/here/k).read_bytes() for k in kept)
    weights = 'pradot/weights/small.safetensors'
    assert (built/weights).read_bytes() == (root/weights).read_bytes()
    code = 'import sys; sys.path.insert(0, sys.argv[1]); import pradot; from importlib.resources import files; ' \
           'print(pradot.__file__, len((files("pradot")/"paper"/"table2.csv").read_text()))'
    out = subprocess.run([sys.executable, '-c', code, str(built)], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert out.stdout.startswith(str(built)) and int(out.stdout.split()[-1]) > 1000

def test_no_path_of_one_machine(root, tracked):
    machine = re.compile(r'(?:^|[^\w.])/(?:' + '|'.join(['work', 'root', 'farm', 'home', 'tmp', 'Users']) + r')/\w')
    hits = []
    for f in tracked:
        try: text = (root/f).read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        hits += [f'{f}: {m.group()}' for m in machine.finditer(text)][:1]
    assert hits == []

def test_nothing_large_and_no_images_of_data_sets(root, tracked):
    assert [f for f in tracked if (root/f).stat().st_size > 3*2**20] == []
    kept = ('data/README.md', 'data/paper/', 'data/results/')
    assert [f for f in tracked if f.startswith('data/') and not f.startswith(kept)] == []
