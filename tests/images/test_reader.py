"""Reading image files of each kind, and finding them. These tests write the files."""
import io
import os
import resource
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
from helpers.forked import call
from helpers.image_folders import touch
from PIL import Image
from timm.models import create_model

from timm_eca.images.batches import ImageFiles, read_batches, read_images
from timm_eca.images.files import find_images, natural_order
from timm_eca.images.reader import ImageError, read_image


def sixteen_bit_png(colour_type: int, channels: int, value: int) -> bytes:
    """A PNG file of 2x2 pixels with 16 bits in a channel, which Pillow can't write for colours."""
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))
    row = b'\0' + struct.pack('>H', value) * channels * 2
    header = struct.pack('>IIBBBBB', 2, 2, 16, colour_type, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(row * 2)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, mode: str):
    """Grey as Pillow does with colours: the upper eight bits."""
    for value in (0, 255, 256, 0x80ff, 0xffff):
        expected = value >> 8
        for colour_type, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
            image = read_image(io.BytesIO(sixteen_bit_png(colour_type, channels, value)), mode)
            assert image.mode == mode
            assert set(image.tobytes()) == {expected}, (colour_type, value)
        for pillow_mode in ('I;16', 'I;16B'):
            Image.new(pillow_mode, (8, 8), value).save(tmp_path / 'grey.tif')
            assert set(read_image(tmp_path / 'grey.tif', mode).tobytes()) == {expected}
        for kind in ('png', 'jp2', 'pgm'):
            Image.new('I;16', (8, 8), value).save(tmp_path / f'grey.{kind}')
            assert set(read_image(tmp_path / f'grey.{kind}', mode).tobytes()) == {expected}, kind


@pytest.mark.parametrize(('mode', 'value'), [('F', 0.5), ('I', 70000)])
def test_pixels_of_no_known_range_are_refused(tmp_path: Path, mode: str, value: float):
    Image.new(mode, (8, 8), value).save(tmp_path / 'x.tif')
    with pytest.raises(ImageError, match='32 bits'):
        read_image(tmp_path / 'x.tif')


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'RGB'])
def test_other_modes_are_converted_as_timm_does(tmp_path: Path, mode: str):
    path = tmp_path / ('x.jpg' if mode == 'CMYK' else 'x.png')
    Image.linear_gradient('L').resize((16, 16)).convert('RGB').convert(mode).save(path)
    for wanted in ('L', 'RGB'):
        with Image.open(path) as image:
            assert read_image(path, wanted).tobytes() == image.convert(wanted).tobytes()


def test_orientation_is_left_as_in_timm(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (16, 8)).save(tmp_path / 'x.jpg', exif=exif)
    assert read_image(tmp_path / 'x.jpg').size == (16, 8)


def test_heic_is_read(tmp_path: Path):
    """Also under another name, as telephones save it; Pillow stays as it was."""
    pillow_heif = pytest.importorskip('pillow_heif')
    path = tmp_path / 'x.jpg'
    pillow_heif.from_pillow(Image.new('RGB', (16, 16), (200, 30, 30))).save(path, quality=90)
    for file in (path, io.BytesIO(path.read_bytes())):
        image = read_image(file)
        assert image.size == (16, 16)
        assert all(abs(a - b) < 12 for a, b in zip(image.getpixel((8, 8)), (200, 30, 30)))
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(path)


def test_heic_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    (tmp_path / 'x.heic').write_bytes(struct.pack('>I', 24) + b'ftypheic' + bytes(12))
    with pytest.raises(ImageError, match='pip install pillow-heif'):
        read_image(tmp_path / 'x.heic')


@pytest.mark.parametrize('content', [b'', b'text', b'\0\0\0\x18ftypmp42' + bytes(50)])
def test_what_is_not_an_image(tmp_path: Path, content: bytes):
    (tmp_path / 'x.jpg').write_bytes(content)
    with pytest.raises(ImageError, match='not an image'):
        read_image(tmp_path / 'x.jpg')


def test_what_systems_leave_is_left_out(tmp_path: Path):
    touch(
        tmp_path, 'a/2.png', 'a/10.png', '.hidden.png', '.ipynb_checkpoints/1.png', 'a/.ipynb_checkpoints/1.png',
        'a/@eaDir/1.png', '__MACOSX/a/._1.png', 'a/._1.png', 'a/Thumbs.db', 'a/__pycache__/x.png', '$RECYCLE.BIN/1.png',
        'a/desktop.ini', 'a/labels.csv', 'README.md', 'b/clip.mp4', 'b/photo')
    (tmp_path / 'a' / 'broken.png').symlink_to(tmp_path / 'nothing')
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert found == ['a/2.png', 'a/10.png', 'a/broken.png', 'b/clip.mp4', 'b/photo']
    assert find_images([tmp_path / 'a' / '._1.png'])  # what is named is read
    with pytest.raises(ImageError, match='no images'):
        find_images([tmp_path / '__MACOSX'])


@pytest.mark.skipif(not hasattr(os, 'getuid') or os.getuid() == 0, reason='root may list any folder')
def test_a_folder_that_cant_be_listed(tmp_path: Path):
    touch(tmp_path, 'a/1.png')
    (tmp_path / 'a').chmod(0)
    with pytest.raises(ImageError, match='listed'):
        find_images([tmp_path])


def test_order_of_names():
    names = ['b10', 'B2', 'a', '10', '9', 'A']
    assert sorted(names, key=natural_order) == ['9', '10', 'A', 'a', 'B2', 'b10']
    odd = ['12²', 'x9①7', '①', '²']  # digits that `int` refuses, and timm's own key with it
    assert sorted([*odd, '3', 'x10'], key=natural_order) == ['3', '12²', 'x9①7', 'x10', '²', '①']


def test_batches_and_what_is_left_out(tmp_path: Path):
    touch(tmp_path, '1.png', '2.png', '3.png', '5.png')
    Image.new('F', (8, 8)).save(tmp_path / '4.tif')
    unreadable: list[str] = []
    model = create_model('test_resnet').to(torch.float64)
    batches = list(read_images(model, find_images([tmp_path]), 3, unreadable))
    assert [len(labels) for _, labels in batches] == [3, 1]
    assert all(pixels.dtype == torch.float64 for pixels, _ in batches)
    assert [text.startswith(f'{tmp_path / "4.tif"}: ') for text in unreadable] == [True]


def test_a_reader_that_dies():
    images = ImageFiles([lambda: os._exit(1)], [0], 'RGB')
    with pytest.raises(RuntimeError, match='exited unexpectedly'):
        list(read_batches(create_model('test_resnet'), images, 1, [], workers=1))


def test_many_images_of_a_batch_need_few_file_descriptors(tmp_path: Path):
    touch(tmp_path, *(f'{i}.png' for i in range(300)))
    model, mode = create_model('test_resnet'), 'RGB'
    dataset = ImageFiles(find_images([tmp_path]), [0] * 300, mode)

    def read() -> int:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        model.pretrained_cfg['input_size'] = (3, 16, 16)
        assert [len(labels) for _, labels in read_batches(model, dataset, 300, [], workers=1)] == [300]
        return 0

    status, printed = call(read)
    assert status == 0, printed
