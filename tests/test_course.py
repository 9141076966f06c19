"""The lessons: each exercise says it is waiting, passes for its solution, and answers every wrong answer with a sentence.
The notebooks are the source: their cells, the solutions folded in them, and the wrong answers listed in their last cell."""
import ast
import functools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest

from pradot import course
from pradot.course import array, carries, check, near, number, returns

LEARN = Path(__file__).resolve().parents[1]/'nbs'/'learn'
LESSONS = [p.stem for p in sorted(LEARN.glob('0[1-9]_*.ipynb'))]

def cells(lesson): return json.loads((LEARN/f'{lesson}.ipynb').read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])

def asks(cell): # the name of an exercise's answer, if the cell is one
    if cell['cell_type'] != 'code': return
    answers = re.findall(r'^(?:def )?(\w+)(?: =|\(.*\):) \.\.\.', source(cell), re.M)
    if not answers: return
    assert len(answers) == 1, 'one answer in an exercise'
    call = ast.parse(source(cell)).body[-1].value
    assert isinstance(call, ast.Call) and call.func.id == 'check', 'the last line of an exercise is its check'
    return answers[0]

def solution(cell): # the code of a folded solution
    assert cell['cell_type'] == 'markdown' and source(cell).startswith('<details>\n<summary>Solution'), source(cell)[:80]
    assert source(cell).rstrip().endswith('</details>')
    code = re.findall(r'^```python\n(.*?)^```', source(cell), re.M | re.S)
    assert len(code) == 1, 'one block of code in a solution'
    return code[0]

EXERCISES = [(l, name) for l in LESSONS for name in map(asks, cells(l)) if name]

class Exercise(NamedTuple):
    check:object # Compiled
    names:dict   # What the notebook knows when the exercise is asked
    solution:str
    wrong:list   # (expression, a word of what is said about it)
    first:object # Verdict of the cell as it stands

@functools.cache
def attempt(name):
    "What `run_cells` returns, or raises: a lesson that fails is run once too"
    try: return run_cells(name)
    except Exception as e: return e

def lesson(name):
    "Exercises of a lesson by the name of the answer, after its cells have run"
    if isinstance(found := attempt(name), Exception): raise found
    return found

def run_cells(name):
    here, names, found, wrong = os.getcwd(), {'__name__': name}, {}, {}
    os.chdir(LEARN)
    try:
        all_cells = cells(name)
        for i, cell in enumerate(all_cells):
            if cell['cell_type'] != 'code' or 'google.colab' in source(cell): continue
            body, answer = ast.parse(source(cell)).body, asks(cell)
            if not answer:
                exec(compile(ast.Module(body, []), f'{name} cell {i}', 'exec'), names)
                plt.close('all')
                continue
            exec(compile(ast.Module(body[:-1], []), f'{name} cell {i}', 'exec'), names)
            line = compile(ast.Expression(body[-1].value), f'{name} check of {answer}', 'eval')
            assert answer not in found, f'two exercises of {name} ask for {answer}'
            found[answer] = Exercise(line, dict(names), solution(all_cells[i + 1]), [], eval(line, names))
        wrong = names.get('WRONG', {})
        assert sorted(wrong) == sorted(found), f'WRONG of {name} names other answers than its exercises'
        return {k: e._replace(wrong=wrong[k]) for k, e in found.items()}
    finally: os.chdir(here)

def verdict(exercise, answer, value): return eval(exercise.check, {**exercise.names, answer: value})

def sentence(v):
    assert v.text and '\n' not in v.text and 'Traceback' not in v.text and len(v.text) < 400 and v.text.endswith(('.', '?')), v.text

@pytest.mark.parametrize('name', LESSONS)
def test_a_lesson_has_its_parts(name):
    parts = cells(name)
    code, text = ('\n'.join(source(c) for c in parts if c['cell_type'] == k) for k in ('code', 'markdown'))
    assert 3 <= len([e for e in EXERCISES if e[0] == name]) <= 6
    assert len(re.findall(r'^slider\(', code, re.M)) == 1, 'one control in a lesson'
    for part in ('**Aims.**', '**You need**', '**Time:**', '\n## Read on'): assert part in '\n' + text, part
    for cell in parts:
        kinds = {k for o in cell.get('outputs', []) for k in o.get('data', {})}
        assert not any('widget' in k for k in kinds), 'stored outputs hold the strip of states: run without a front end'
        if 'image/png' in kinds: assert '#| fig-alt: ' in source(cell) and '#| fig-cap: ' in source(cell), source(cell)[:80]
        if re.search(r'^slider\(', source(cell), re.M): assert 'image/png' in kinds, 'the strip of states is stored'
        if asks(cell): assert 'To do.' in json.dumps(cell['outputs']), 'exercises are stored unanswered'

@pytest.mark.parametrize('name,answer', EXERCISES)
def test_an_exercise_waits_for_its_answer(name, answer):
    v = lesson(name)[answer].first
    assert v.ok is None
    sentence(v)

@pytest.mark.parametrize('name,answer', EXERCISES)
def test_the_solution_is_right(name, answer):
    e = lesson(name)[answer]
    names = dict(e.names)
    exec(compile(e.solution, f'{name} solution of {answer}', 'exec'), names)
    plt.close('all')
    v = eval(e.check, names)
    assert v.ok is True, v
    sentence(v)     # and a right answer is told what it shows

@pytest.mark.parametrize('name,answer', EXERCISES)
def test_wrong_answers_are_told_why(name, answer):
    e = lesson(name)[answer]
    assert e.wrong, 'no wrong answer is listed'
    for expression, word in e.wrong:
        v = verdict(e, answer, eval(expression, dict(e.names)))
        assert v.ok is False and word in v.text, (expression, v)
        sentence(v)

class Odd:
    def __array__(self, *_, **__): raise ValueError('no')

WRONG_TYPES = ['five', '', None, {}, {'a': 1}, object(), Odd(), Odd, float, len, lambda *a: None, lambda: 1, lambda *a: a[99],
               lambda *a: 'text', [[1, 2], [3]], [], float('nan'), np.full((5, 5), np.inf), np.zeros((2, 3, 4, 5)), 1j, b'x',
               np.array(['a', 'b']), np.array(None), slice(3), range(0), True]

@pytest.mark.parametrize('name,answer', EXERCISES)
def test_any_type_and_shape_gets_a_sentence(name, answer):
    e = lesson(name)[answer]
    for wrong in WRONG_TYPES:
        v = verdict(e, answer, wrong)
        assert not v, wrong
        sentence(v)

def test_lessons_are_there(): assert LESSONS and EXERCISES

@pytest.mark.parametrize('kind', [number(), number(0, 1), array(), array(3), array(None, 2), returns(number(), 1), returns(array(2), 1)])
def test_kinds_never_stop(kind):
    for wrong in WRONG_TYPES:
        if wrong is True: continue
        v = check(wrong, kind, near(12345.), carries(np.ones(3), np.ones(2)) if kind.wanted.endswith('(any, 2)') else near(9.))
        assert v.ok is not True
        sentence(v)

def test_sentences_are_exact():
    v = check(np.array([[0.5, 0.2], [0.1, 0.2]]), array(2, 2), carries(np.array([0.5, 0.5]), np.array([0.6, 0.4])))
    assert v.text == 'The sum of row 0 of your plan is 0.7; it should be 0.5, the mass that lies there.'
    v = check([1, 2, 3.5], array(3), near([1, 2, 3], hint='Think of the last.'))
    assert v.text == 'Entry [2] is 3.5; that is too large. Think of the last.'
    assert check(2, number(), lambda x: None, lambda x: 'Odd numbers only.' if x % 2 == 0 else None).text == 'Odd numbers only.'
    assert check(3, number(), lambda x: 'Odd numbers only.' if x % 2 == 0 else None, shows='Three is odd.') == (True, 'Three is odd.')
    assert check([1, 2], array(2), near([1, 2]))._repr_markdown_() == '**✓ Right.**'

# --- the control

def line(ax, k): ax.plot([0, 1], [0, k])

@pytest.fixture
def front_end(monkeypatch):
    "As in a kernel that JupyterLab started"
    pytest.importorskip('ipykernel')
    monkeypatch.setenv('JPY_SESSION_NAME', 'lesson.ipynb')
    yield
    plt.close('all')

def test_nobody_is_watching_a_test(monkeypatch):
    for k in ('JPY_SESSION_NAME', 'VSCODE_PID'): monkeypatch.delenv(k, raising=False)
    assert not course.live()
    course.slider(line, k=[1, 2, 3, 4, 5])
    assert [ax.get_title() for ax in plt.gcf().axes] == ['k = 1', 'k = 2', 'k = 4', 'k = 5']
    plt.close('all')

def test_without_ipywidgets_the_strip_is_shown(front_end, monkeypatch, capsys):
    monkeypatch.setattr(course.importlib.util, 'find_spec', lambda name: None)
    course.slider(line, cols=3, k=[1, 2, 3, 4, 5])
    assert [ax.get_title() for ax in plt.gcf().axes] == ['k = 1', 'k = 3', 'k = 5']
    assert 'pip install ipywidgets' in capsys.readouterr().out

def test_with_a_front_end_there_is_a_slider(front_end, monkeypatch):
    pytest.importorskip('ipywidgets')
    import IPython.display
    shown, drawn = [], []
    monkeypatch.setattr(IPython.display, 'display', lambda *a, **k: shown.extend(a))
    monkeypatch.setattr(plt, 'show', lambda: None)
    course.slider(lambda ax, k: drawn.append(k), alpha=[0, 0.1, 0.3, 1])
    box, = shown
    handle = box.children[0]
    assert handle.description == 'α' and [o[0] for o in handle.options] == ['0', '0.1', '0.3', '1'] and handle.value == 0.3
    handle.value = 1
    assert drawn == [0.3, 1]

def test_ipywidgets_is_optional(root):
    text = (root/'settings.ini').read_text(encoding='utf-8')
    assert 'ipywidgets' not in re.search(r'^requirements = .*', text, re.M)[0]
    assert 'ipywidgets' in re.search(r'^dev_requirements = .*', text, re.M)[0]
