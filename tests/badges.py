"""What the notebooks say about where they live comes from settings.ini.
`python tests/badges.py` writes the badge and the first cell of each anew, after user, repo or branch have changed."""
import configparser
import json
from pathlib import Path

def address(root):
    "user/repo and branch"
    c = configparser.ConfigParser(delimiters=['='])
    c.read(root/'settings.ini', encoding='utf-8')
    c = c['DEFAULT']
    return f'{c["user"]}/{c["repo"]}', c['branch']

def badge(root, name):
    "The cell under the title of a notebook, named from nbs/ as in paper/fig4_assignments.ipynb: opens it on Colab"
    at, branch = address(root)
    return ('[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
            f'(https://colab.research.google.com/github/{at}/blob/{branch}/nbs/{name})')

EXTRAS = {'15_export.ipynb': 'export', '15a_deploy.ipynb': 'export', 'howto.ipynb': 'export'} # what a page needs besides

def install(root, name=''):
    "The first cell of code: installs the package on Colab and does nothing elsewhere"
    what = f'git+https://github.com/{address(root)[0]}'
    if name in EXTRAS: what = f'"pradot[{EXTRAS[name]}] @ {what}"'
    return f'#| hide\ntry: import google.colab\nexcept ImportError: pass\nelse:\n    %pip install -q {what}'

def runs(nb):
    "Whether a notebook is one to run: it has code, and is not slides made of other notebooks' figures"
    return any(c['cell_type'] == 'code' for c in nb['cells']) and 'revealjs' not in ''.join(nb['cells'][0]['source'])

if __name__ == '__main__':
    root = Path(__file__).resolve().parents[1]
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        nb = json.loads(p.read_text(encoding='utf-8'))
        if '.ipynb_checkpoints' in p.parts or not runs(nb): continue
        name = p.relative_to(root/'nbs').as_posix()
        for i, text in ((1, badge(root, name)), (2, install(root, name))):
            nb['cells'][i]['source'] = text.splitlines(keepends=True)
        p.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
