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

def install(root):
    "The first cell of code: installs the package on Colab and does nothing elsewhere"
    return ('#| hide\ntry: import google.colab\nexcept ImportError: pass\n'
            f'else:\n    %pip install -q git+https://github.com/{address(root)[0]}')

def runs(nb):
    "Whether a notebook is one to run: it has code, and is not slides made of other notebooks' figures"
    return any(c['cell_type'] == 'code' for c in nb['cells']) and 'revealjs' not in ''.join(nb['cells'][0]['source'])

if __name__ == '__main__':
    root = Path(__file__).resolve().parents[1]
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        nb = json.loads(p.read_text(encoding='utf-8'))
        if '.ipynb_checkpoints' in p.parts or not runs(nb): continue
        for i, text in ((1, badge(root, p.relative_to(root/'nbs').as_posix())), (2, install(root))):
            nb['cells'][i]['source'] = text.splitlines(keepends=True)
        p.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
