"No code in a file is run, no header makes memory grow, no name leads out of its folder"
import json, os, pickle, re, struct, zlib
from pathlib import Path
import numpy as np
import pytest, tifffile, torch
from PIL import Image, PngImagePlugin
from pradot import data
from pradot.data import InputError, folder, limit_pixels, mvtec_ad, mvtec_loco, read_image, read_mask
from pradot.detector import Pradot
from pradot.experiment import read_map
from pradot.features import read_weights

class Harm:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (os.mkdir, (str(self.path),))

def test_no_pickle_is_read_anywhere(root):
    wrong = []
    for p in (root/'pradot').rglob('*.py'):
        text = p.read_text(encoding='utf-8')
        if re.search(r'^\s*(import|from)\s+(pickle|dill|shelve|marshal)|allow_pickle\s*=\s*True|weights_only\s*=\s*False|'
                     r'read_pickle|joblib\.load|(?<![.\w])eval\(|(?<![.\w])exec\(', text, re.M): wrong.append(p.name)
        for call in re.finditer(r'\b(torch\.load|load_state_dict_from_url)\(', text):
            if 'weights_only=True' not in text[call.start():call.start() + 200]: wrong.append(f'{p.name}: {call[0]}')
    assert wrong == []

@pytest.mark.parametrize('how', ['pickle', 'torch', 'old torch', 'state dict'])
@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.safetensors', '.bin'])
def test_a_malicious_pickle_is_refused_and_not_run(how, suffix, tmp_path):
    path, harm = tmp_path/f'w{suffix}', Harm(tmp_path/'harm')
    if how == 'pickle': path.write_bytes(pickle.dumps(harm))
    elif how == 'state dict': torch.save({'conv1.weight': torch.zeros(1), 'x': harm}, path)
    else: torch.save(harm, path, _use_new_zipfile_serialization=how == 'torch')
    with pytest.raises(InputError, match='holds no weights that can be read'): read_weights(path)
    with pytest.raises(InputError, match='damaged or no model file'): Pradot.load(path, 'cpu')
    assert not (tmp_path/'harm').exists()

def chunk(kind, b): return struct.pack('>I', len(b)) + kind + b + struct.pack('>I', zlib.crc32(kind + b))

def png(w, h, rows=b'', more=b''):
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)) + more
            + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))

@pytest.mark.parametrize('size', [(20000, 20000), (2**31 - 1, 1), (1, 2**31 - 1), (2**31 - 1, 2**31 - 1), (0, 0), (2**32 - 1, 5)])
def test_absurd_headers_are_refused(size, tmp_path):
    path = tmp_path/'x.png'
    path.write_bytes(png(*size))
    for read in (read_image, read_mask):
        with pytest.raises(InputError, match='cannot be read as'): read(path)

def test_the_limit_can_be_lowered_and_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', Image.MAX_IMAGE_PIXELS)
    path = tmp_path/'x.png'
    Image.new('1', (200, 200), 1).save(path)
    tifffile.imwrite(tmp_path/'x.tiff', np.ones((200, 200), np.float32))
    monkeypatch.setenv('PRADOT_MAX_PIXELS', '39999')
    for read in (read_image, read_mask, lambda _: read_map(tmp_path/'x.tiff')):
        with pytest.raises(InputError, match='more than 39999 pixels; .*set PRADOT_MAX_PIXELS=N to allow N'): read(path)
    monkeypatch.setenv('PRADOT_MAX_PIXELS', '40000')
    assert read_image(path).size == read_map(tmp_path/'x.tiff').shape == (200, 200)
    for bad in ('x', '0', '-5', '1e9'):
        monkeypatch.setenv('PRADOT_MAX_PIXELS', bad)
        with pytest.raises(InputError, match='PRADOT_MAX_PIXELS must be a whole number'): read_image(path)

def test_huge_text_and_profiles_do_not_unpack(tmp_path):
    bomb = zlib.compress(bytes(300 << 20), 9)                            # 300 MiB in some hundred kB
    rows = b''.join(b'\0' + bytes(3*8) for _ in range(8))
    for kind, b in ((b'zTXt', b'a\0\0' + bomb), (b'iCCP', b'a\0\0' + bomb), (b'iTXt', b'a\0\1\0\0\0' + bomb)):
        path = tmp_path/'x.png'
        path.write_bytes(png(8, 8, rows, chunk(kind, b)))
        before = peak()
        try: assert read_image(path).size == (8, 8)
        except InputError as e: assert 'cannot be read as an image' in str(e)
        assert peak() - before < 150 << 20

def peak():
    Path('/proc/self/clear_refs').write_text('5')
    return 1024*next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmRSS'))

def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new('RGB', (16, 16), c) for c in ('red', 'blue', 'green')]
    for suffix in ('webp', 'png', 'tiff'):
        frames[0].save(tmp_path/f'x.{suffix}', save_all=True, append_images=frames[1:])
        r, g, b = read_image(tmp_path/f'x.{suffix}').getpixel((8, 8))
        assert r > 200 and b < 60

def test_a_map_that_claims_much_is_refused(tmp_path):
    path = tmp_path/'x.tiff'
    tifffile.imwrite(path, np.ones((8, 8), np.float32))
    b = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as f: at = [f.pages[0].tags[k].valueoffset for k in ('ImageWidth', 'ImageLength')]
    for i in at: b[i:i + 4] = struct.pack('<I' if b[:2] == b'II' else '>I', 0xffff)[:4]
    path.write_bytes(bytes(b))
    with pytest.raises(InputError, match='claims more than|cannot be read as a TIFF'): read_map(path)

@pytest.mark.parametrize('length', [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_model_whose_header_lies_about_its_length(length, tmp_path):
    path = tmp_path/'m.safetensors'
    path.write_bytes(struct.pack('<Q', length) + b'{}' + bytes(100))
    with pytest.raises(InputError, match='damaged or no model file'): Pradot.load(path, 'cpu')
    with pytest.raises(InputError, match='holds no weights'): read_weights(path)

def test_a_tensor_that_claims_more_than_the_file_holds(tmp_path):
    head = json.dumps({'a': dict(dtype='F32', shape=[2**20, 2**20], data_offsets=[0, 2**42])}).encode()
    (tmp_path/'m.safetensors').write_bytes(struct.pack('<Q', len(head)) + head + bytes(64))
    with pytest.raises(InputError, match='damaged or no model file'): Pradot.load(tmp_path/'m.safetensors', 'cpu')

@pytest.mark.parametrize('name', ['../x', '..', '.', '/etc', 'a/../../x', 'a\\b', 'a\0b'])
def test_a_category_is_one_name(name, tmp_path):
    (tmp_path/'data').mkdir()
    for load in (mvtec_ad, mvtec_loco, folder):
        with pytest.raises(InputError, match='is no category'): load(tmp_path/'data', name)

def test_the_report_escapes_names(tmp_path):
    from pradot.cli import _picture
    assert '<script>' not in _picture(Image.new('RGB', (4, 4)), '<script>"\'&')
