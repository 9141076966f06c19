"""What the notebooks of the paper say about where they live comes from settings.ini.
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
    "The cell under the title: opens the page on Colab"
    at, branch = address(root)
    return ('[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]'
            f'(https://colab.research.google.com/github/{at}/blob/{branch}/nbs/paper/{name}.ipynb)')

def install(root):
    "The first cell of code: installs the package on Colab and does nothing elsewhere"
    return ('#| hide\ntry: import google.colab\nexcept ImportError: pass\n'
            f'else:\n    %pip install -q git+https://github.com/{address(root)[0]}')

def pages(root): return sorted((root/'nbs'/'paper').glob('[!._]*.ipynb'))

if __name__ == '__main__':
    root = Path(__file__).resolve().parents[1]
    for p in pages(root):
        nb = json.loads(p.read_text(encoding='utf-8'))
        for i, text in ((1, badge(root, p.stem)), (2, install(root))): nb['cells'][i]['source'] = text.splitlines(keepends=True)
        p.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
