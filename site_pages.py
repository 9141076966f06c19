"""What the site changes in its copies of the notebooks (_proc/), before Quarto reads them; the notebooks stay as they are.

Quarto runs it (`pre-render` and `post-render` in _quarto.yml). It makes pages that need no network, weigh little and
link to each other: tables and widgets without scripts from elsewhere, pictures as light as they can be, long code
folded, a link to Colab instead of a badge, an anchor at each numbered equation and a link at each mention of one, of a
figure, table or algorithm."""
import ast
import base64
import io
import json
import os
import re
import sys
from pathlib import Path, PurePosixPath

FEW, WIDE, LONG = .1, 1100, 8                        # mean error of 256 colours, pixels a photo is wide, lines of code
FOLDED = 'paper/', 'beyond/', 'benchmarks/'          # pages that are about results: long code is folded there

ASIDE = r'```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\[[^\]]*\](?:\([^)]*\))?|^#.*?$|<[^>]+>'  # no links are made in these
MENTION = re.compile(rf'({ASIDE})|\b(Eq\.|Equation|Figure|Table|Algorithm)\s(\d+)([a-z]?)\b', re.M | re.S)
TAG = re.compile(r'\$\$((?:(?!\$\$).)*?)\s*\\tag\{(\w+)\}\s*\$\$', re.S)
ANCHOR = re.compile(r'\{#(equation)-(\w+) ')           # what `prose` makes of a tag
BADGE = re.compile(r'\[!\[[^\]]*\]\([^)]*colab-badge\.svg\)\]\(([^)]+)\)')

def text(cell): return ''.join(cell['source'])

def offline(cell):
    "Tables as HTML in Markdown, no widgets: any other HTML or JavaScript output makes Quarto load scripts from a network"
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        html = data.pop('text/html', None)
        for kind in [k for k in data if 'javascript' in k or 'widget' in k]: del data[kind]
        if html and 'text/markdown' not in data: data['text/markdown'] = f'```{{=html}}\n{"".join(html).strip()}\n```\n'
    cell['outputs'] = [o for o in cell.get('outputs', []) if 'data' not in o or o['data']]

def fields(name, shown):
    "The lines of a class that name its fields, by the link to its source"
    file = re.search(r'/(pradot/\w+\.py)#L\d+', shown)
    if not file: return []
    source = (Path(__file__).parent/file[1]).read_text(encoding='utf-8')
    body = next((c.body for c in ast.parse(source).body if isinstance(c, ast.ClassDef) and c.name == name), [])
    lines = source.splitlines()
    return [l for f in body if isinstance(f, ast.AnnAssign) for l in lines[f.lineno - 1:f.end_lineno]]

def signatures(cell):
    "Of a signature what can be read: no links in its comments (code shows them as written), of a class its fields, no `*args`"
    def plain(m):
        code = re.sub(r'\[(`[^`]+`)\]\([^)]*\)', r'\1', m[0]).replace('__main__.', '')
        code = re.sub(r'^def ([A-Z]\w*)\(\n    \*args, \*\*kwargs\n\):$', r'class \1', code, flags=re.M)
        return re.sub(r'^class (\w+)$', lambda c: '\n'.join([c[0], *fields(c[1], shown)]), code, flags=re.M)
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'text/markdown' in data:
            shown = ''.join(data['text/markdown'])
            data['text/markdown'] = re.sub(r'^```python$.*?^```$', plain, shown, flags=re.M | re.S)

def unbroken(cell):
    "No new line within 1.2 ± 0.3, nor between a number and its per cent or slash"
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'text/markdown' in data:
            shown = ''.join(data['text/markdown'])
            data['text/markdown'] = re.sub(r'(?<=[\d.]) (?=[±%/])|(?<=±) (?=\d)', '\N{NO-BREAK SPACE}', shown)

def lighter(cell):
    "Pictures with few colours (drawings) as PNG with 256 of them, others (photos) as JPEG, where that is smaller"
    from PIL import Image, ImageChops, ImageStat
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        kind = next((k for k in ('image/png', 'image/jpeg') if k in data), None)
        if not kind: continue
        given = base64.b64decode(''.join(data[kind]))
        image = Image.open(io.BytesIO(given)).convert('RGBA')
        flat = Image.new('RGBA', image.size, 'white')
        flat.alpha_composite(image)
        flat, file, becomes = flat.convert('RGB'), io.BytesIO(), 'image/jpeg'
        if kind == 'image/png':
            few = flat.quantize(256, dither=Image.Dither.NONE)
            if sum(ImageStat.Stat(ImageChops.difference(flat, few.convert('RGB'))).mean)/3 < FEW:
                few.save(file, 'PNG', optimize=True)
                becomes = 'image/png'
        if becomes == 'image/jpeg':                  # a stored JPEG has as few pixels as it is shown with
            flat.thumbnail((WIDE, 10**6), Image.Resampling.LANCZOS)
            flat.save(file, 'JPEG', quality=78 if kind == 'image/png' else 60, optimize=True, progressive=True)
        if file.tell() < len(given):
            del data[kind]
            data[becomes] = base64.b64encode(file.getvalue()).decode()

def broad(cell):
    "A cell whose picture is much broader than high: on a phone it scrolls, rather than be too small to read"
    from PIL import Image
    for o in cell.get('outputs', []):
        for kind in ('image/png', 'image/jpeg'):
            if kind in o.get('data', {}):
                w, h = Image.open(io.BytesIO(base64.b64decode(''.join(o['data'][kind])))).size
                if w > 1.9*h and w > 700 and 'classes:' not in text(cell):
                    cell['source'] = '#| classes: broad\n' + text(cell)

def fold(cell, page):
    "Imports, and long code on a page about results, are shown on demand"
    lines = [l for l in text(cell).splitlines() if l.strip() and not l.startswith('#|')]
    if 'code-fold' in text(cell) or re.search(r'^#\s*\|\s*(hide|echo|include|export)', text(cell), re.M): return
    imports = all(re.match(r'(import|from)\s|\s|\)|#', l) for l in lines)
    if len(lines) > 2 and imports: what = 'Imports'
    elif len(lines) > LONG and page.startswith(FOLDED): what = 'Code'
    else: return
    cell['source'] = f'#| code-fold: true\n#| code-summary: {what}\n' + text(cell)

def targets(pages):
    "Where each numbered thing of the paper is: ('Equation', '4') → ('04_transport.ipynb', '#equation-4')"
    found = {}
    for page, nb in sorted(pages.items()):
        m = re.match(r'paper/(algorithm|fig|table)(\d+)([a-z]?)', page)
        if m:
            what = {'fig': 'Figure'}.get(m[1], m[1].capitalize())
            found[what, m[2] + m[3]] = page, ''
            found.setdefault((what, m[2]), (page, ''))   # Figure 3 is where Figure 3a is
        if '/' in page: continue                     # an equation's home is in the library
        for cell in nb['cells']:
            if cell['cell_type'] == 'markdown':
                for rule in (TAG, ANCHOR):
                    for m in rule.finditer(text(cell)): found['Equation', m[2]] = page, f'#equation-{m[2]}'
    return found

def link(source, page, found):
    "Text with a link at the first mention of each thing that has its home elsewhere or in an equation of this page"
    seen = set()
    def one(m):
        if m[1]: return m[1]
        kind = 'Equation' if m[2][:2] == 'Eq' else m[2]
        what = kind, m[3] + m[4] if (kind, m[3] + m[4]) in found else m[3]
        where, anchor = found.get(what, (page, ''))
        if what in seen or where == page and not anchor: return m[0]
        seen.add(what)
        up = os.path.relpath(where, PurePosixPath(page).parent) if where != page else ''
        return f'[{m[0]}]({up}{anchor})'
    return MENTION.sub(one, source)

def prose(cell, page, found):
    "A badge becomes a link, mentions become links, tags become anchors with their number"
    source = BADGE.sub(r'[Open in Colab](\1){.colab}', text(cell))
    source = link(source, page, found)
    cell['source'] = TAG.sub(r'[$$\1 \\qquad (\2)$$]{#equation-\2 .equation}', source)

def prepare(pages):
    "Change `pages`, {path: notebook}, in place; a second time changes nothing"
    found = targets(pages)
    for page, nb in pages.items():
        if nb['metadata'].get('site'): continue
        nb['metadata']['site'] = True
        nb['cells'] = [c for c in nb['cells'] if 'THIS FILE WAS AUTOGENERATED' not in text(c)]     # an empty slide otherwise
        for cell in nb['cells']:
            if cell['cell_type'] == 'markdown': prose(cell, page, found)
            if cell['cell_type'] == 'code':
                for change in (offline, signatures, unbroken, lighter, broad): change(cell)
                fold(cell, page)
            cell['source'] = text(cell).splitlines(True)    # Quarto would lose the line breaks of one string

def icons(site):
    "Of the icons' style sheet what some page or script names: a twentieth"
    pages = (p.read_text('utf-8') for p in site.rglob('*') if p.suffix in ('.html', '.js'))
    named = {name for page in pages for name in re.findall(r'\bbi-[a-z0-9-]+', page)}
    for css in site.glob('site_libs/bootstrap/bootstrap-icons.css'):
        rules = re.sub(r'^\.(bi-[\w-]+)::before *\{[^}]*\}\n', lambda m: m[0] if m[1] in named else '',
                       css.read_text('utf-8'), flags=re.M)
        css.write_text(rules, encoding='utf-8')

if __name__ == '__main__':
    here = Path.cwd()
    if here.name != '_proc': sys.exit(f'{here} is not _proc: run nbdev_docs, or nbdev_proc_nbs and quarto in _proc')
    if 'QUARTO_PROJECT_OUTPUT_FILES' in os.environ: sys.exit(icons(here/'_docs'))     # afterwards
    files = {p.relative_to(here).as_posix(): p for p in here.rglob('*.ipynb') if '_docs' not in p.parts}
    pages = {n: json.loads(p.read_text(encoding='utf-8')) for n, p in files.items()}
    before = {n: json.dumps(nb) for n, nb in pages.items()}
    prepare(pages)
    for n, nb in pages.items():
        if json.dumps(nb) != before[n]: files[n].write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
