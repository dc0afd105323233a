"""Unusual and damaged images, captions and cache files: each is used, or skipped with one line."""

import io
import os
import shutil
import socket
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from small import logged

from fluxfast import train as training
from fluxfast.config.schema import build_config
from fluxfast.data import cache
from fluxfast.data.captions import decode, read_captions, read_text
from fluxfast.data.images import image_size, load_image
from fluxfast.data.prepare import prepare
from fluxfast.data.scan import SkipReport, scan_folders
from fluxfast.data.store import CacheDamaged
from fluxfast.encoders.fingerprint import fingerprint
from fluxfast.errors import FluxfastError
from fluxfast.train import train
from fluxfast.util.terminal import log_to_terminal

CPU = torch.device("cpu")


def square(color: str = "red", size=(64, 64), mode="RGB") -> Image.Image:
    return Image.new(mode, size, color)


def noise(size=(64, 64)) -> Image.Image:
    return Image.effect_noise(size, 90).convert("RGB")


def truncated(path: Path) -> None:
    noise((256, 256)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of one good image."""
    (tmp_path / "data").mkdir()
    square().save(tmp_path / "data" / "good.png")
    return tmp_path / "data"


def settings(folder: Path, **changes):
    data = {"folder": str(folder), "resolution": 64, "default_caption": "x", **changes}
    return build_config({"model": {"path": "unused"}, "data": data})


def scan_data(config, index: Path) -> list:
    return [found.images for found in scan_folders(config.data, index, SkipReport())]


def scanned(folder: Path, **changes) -> tuple[list[str], list[str]]:
    """Returns the names of the usable images, and the lines that are logged."""
    with logged() as lines:
        (images,) = scan_data(settings(folder, **changes), folder.parent / "sizes")
    return [image.name for image in images], lines


# ---------------------------------------------------------------- pictures

BOMB = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
BOMB += struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
BOMB += struct.pack(">I", zlib.crc32(BOMB[12:])) + b"\0\0\0\0IDAT"
BOMB += struct.pack(">I", zlib.crc32(b"IDAT"))


def used(folder: Path) -> list[str]:
    """Adds unusual images of every kind that can be trained on. Returns all names."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((64, 96)).save(folder / "turned.jpg", exif=exif)
    square("cyan", mode="CMYK").save(folder / "cmyk.jpg")
    square(mode="P", color=0).save(folder / "palette.png")
    Image.new("I;16", (64, 64), 40_000).save(folder / "deep.png")
    square(size=(20_000, 64)).save(folder / "wide.png")
    square().save(folder / "phone.jpg", format="MPO", save_all=True, append_images=[square()])
    square().save(folder / "a badly named gif.png", format="GIF")
    for name in ("naïve 写真 🎨.png", "line\nbreak.png", "\x1b[31mred.png", " .png", "%s {x}.png"):
        square().save(folder / name, format="PNG")
    shutil.copy(folder / "deep.png", os.fsencode(folder) + b"/caf\xe9.png")  # no UTF-8
    os.symlink(folder / "cmyk.jpg", folder / "link.jpg")
    os.symlink(folder, folder / "loop")
    return [path.name for path in folder.iterdir() if path.is_file()]


SKIPPED = {
    "zero.png": "is not an image that can be read",
    "words.jpg": "is not an image that can be read",
    "vector.png": "is not an image that can be read",
    "dot.png": "1x1 pixels is too small",
    "thin.png": "20000x20 pixels is too small",
    "bomb.png": "is too large to decode safely",
    "moving.webp": "holds several pictures",
    "circle.png": "Too many levels of symbolic links",
    "gone.png": "No such file or directory",
    "pipe.png": "it is no regular file",
    "device.png": "it is no regular file",
}


def skipped(folder: Path) -> None:
    """Adds files of every kind that the scan skips."""
    (folder / "zero.png").touch()
    (folder / "words.jpg").write_text("not a picture")
    square().save(folder / "vector.png", format="EPS")
    square(size=(1, 1)).save(folder / "dot.png")
    square(size=(20_000, 20)).save(folder / "thin.png")
    (folder / "bomb.png").write_bytes(BOMB)
    square().save(folder / "moving.webp", save_all=True, append_images=[square("blue")])
    os.symlink(folder / "circle.png", folder / "circle.png")
    os.symlink(folder / "nothing", folder / "gone.png")
    os.mkfifo(folder / "pipe.png")
    os.symlink("/dev/zero", folder / "device.png")


def test_strict_makes_one_error_of_them(folder, log_lines):
    skipped(folder)
    with pytest.raises(FluxfastError, match=r"11 files cannot be used: .*bomb\.png.*; …\nhint: "):
        scan_data(settings(folder, strict=True), folder.parent / "s")
    assert not log_lines


def test_images_below_the_folder_are_found(folder):
    names = ["b.PNG", "g.gif", "good.png", "x/c.JpEg", "x/y/d.webp"]
    others = [".hidden.png", "._a.jpg", ".git/e.png", "x/.thumbs/f.png", "notes.txt"]
    for name in [*names, *others, "../linked/e.png"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        square().save(folder / name, format="PNG")
    (folder / "folder.png").mkdir()
    (folder / "x" / "loop").symlink_to(folder)
    (folder / "link").symlink_to(folder.parent / "linked")
    assert scanned(folder) == (sorted([*names, "link/e.png"]), [])
    assert scanned(folder, recursive=False) == (["b.PNG", "g.gif", "good.png"], [])


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "No such file"), ("file", "Not a directory"), ("empty", "no images in")],
)
def test_a_folder_without_images_is_an_error(tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FluxfastError, match=f"{message}.*\n?hint: .*data.folder"):
        scanned(tmp_path / name)


def test_a_picture_at_half_of_the_limit_is_used_without_a_warning(tmp_path, monkeypatch):
    square().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(tmp_path / "a.png") == load_image(tmp_path / "a.png")[0].size == (64, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 32 - 1)
    with pytest.raises(FluxfastError, match="too large"):
        image_size(tmp_path / "a.png")


def test_ghostscript_never_runs(tmp_path, monkeypatch):
    """Pillow would start it for EPS, whatever the file is called."""
    from PIL import EpsImagePlugin

    def ghostscript(*args, **options):
        raise AssertionError("Ghostscript")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    square().save(tmp_path / "a.png", format="EPS")
    with pytest.raises(FluxfastError, match="not an image"):
        load_image(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    with image, pytest.raises(AssertionError, match="Ghostscript"):
        image.load()


@pytest.fixture
def nobody():
    """A folder of one good image, and a function that drops root's rights to read everything."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "cache").mkdir()
    (folder / "cache").chmod(0o777)
    (folder / "data").mkdir()
    square().save(folder / "data" / "good.png")
    root = os.geteuid() == 0
    yield folder / "data", (lambda: os.seteuid(65534)) if root else (lambda: None)
    if root:
        os.seteuid(0)
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_what_may_not_be_read_is_skipped(nobody):
    folder, become = nobody
    for name in ("locked.png", "sub/a.png", "unentered/a.png", "unlisted/a.png", "words.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        square().save(folder / name)
    (folder / "words.txt").write_text("x")
    for name in ("locked.png", "sub", "words.txt"):
        (folder / name).chmod(0)
    (folder / "unentered").chmod(0o444)
    (folder / "unlisted").chmod(0o111)
    os.link(folder / "good.png", folder / "hard.png")
    socket.socket(socket.AF_UNIX).bind(str(folder / "socket.png"))
    socket.socket(socket.AF_UNIX).bind(str(folder / "good.txt"))
    become()
    with logged() as lines:
        (images,) = scan_data(settings(folder), folder.parent / "cache" / "sizes")
    captions = read_captions(folder, [image.path for image in images])
    assert [image.name for image in images] == ["good.png", "hard.png", "words.png"]
    assert sorted(lines) == [
        f"skipped: cannot read the folder {folder}/sub: Permission denied",
        f"skipped: cannot read the folder {folder}/unlisted: Permission denied",
        f"skipped: cannot read the image {folder}/locked.png: Permission denied",
        f"skipped: cannot read the image {folder}/socket.png: it is no regular file",
        f"skipped: cannot read the image {folder}/unentered/a.png: Permission denied",
    ]
    assert {path.name: error.message for path, error in captions.unread.items()} == {
        "good.png": f"cannot read {folder}/good.txt: it is no regular file",
        "words.png": f"cannot read {folder}/words.txt: Permission denied",
    }
    with pytest.raises(FluxfastError, match=f"5 files .*cannot read the folder {folder}/sub: "):
        scan_data(settings(folder, strict=True), folder.parent / "cache" / "sizes")


def test_masks_and_folders_that_may_not_be_entered(nobody):
    folder, become = nobody
    closed = folder.parent / "closed"
    (closed / "in").mkdir(parents=True)
    square().save(closed / "in" / "good.png")
    closed.chmod(0)
    become()
    config = settings(folder, mask="folder", mask_folder=str(closed / "in"))
    with logged() as lines:
        assert scan_data(config, folder.parent / "cache" / "sizes") == [[]]
    assert len(lines) == 1 and lines[0].startswith(f"skipped: no mask for {folder / 'good.png'}")
    with pytest.raises(FluxfastError, match="cannot read the folder .*closed/in: Permission"):
        scanned(closed / "in")


def test_a_component_whose_folder_may_not_be_entered(nobody):
    folder, become = nobody
    (folder / "sub").mkdir()
    (folder / "sub" / "model.safetensors").write_bytes(b"")
    (folder / "sub").chmod(0o444)
    become()
    with pytest.raises(FluxfastError, match=r"cannot read .*model\.safetensors: Permission denied"):
        fingerprint(folder)


def test_links_in_a_circle_among_pictures_with_masks(folder):
    masks = folder / "masks"
    masks.mkdir()
    square("white", mode="L").save(masks / "good.png")
    os.symlink(folder / "circle.png", folder / "circle.png")
    data = {"mask": "folder", "mask_folder": str(masks)}
    names, lines = scanned(folder, **data)
    assert names == ["good.png"] and len(lines) == 1 and "levels of symbolic links" in lines[0]
    os.symlink(folder / "round", folder / "round")
    square().save(folder / "mask.png")
    os.symlink(masks / "mask.png", masks / "mask.png")
    names, lines = scanned(folder, **data)
    assert names == ["good.png"] and len(lines) == 2
    with pytest.raises(FluxfastError, match=r"no mask for .*good\.png"):
        scanned(folder, mask="folder", mask_folder=str(folder / "round"), strict=True)


def test_a_file_of_terabytes_is_not_read(folder):
    with open(folder / "huge.png", "wb") as file:
        file.truncate(2**42)
    skip = f"skipped: the image {folder / 'huge.png'} is larger than 2 GiB"
    assert scanned(folder) == (["good.png"], [skip])


def test_a_size_that_was_remembered_wrongly_is_measured_again(folder):
    index = folder.parent / "sizes"
    scanned(folder)
    whole = index.read_text()
    assert "[64, 64]" in whole
    for damaged in (whole.replace("[64, 64]", "[96, 64]"), "", "[" * 100_000, "{}"):
        index.write_text(damaged)
        (image,) = scan_data(settings(folder), index)[0]
        assert image.buckets == ((64, 64),) and index.read_text() == whole


# ---------------------------------------------------------------- captions

ACCENTS = "naïve café, élève – “Käfer”"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unambiguous_encodings(encoding):
    for text in (ACCENTS, "小猫坐着", "жук", "a"):
        assert decode(text.encode(encoding)) == (text, False)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "cp1252", "latin-1"])
def test_encodings_that_are_recognized_or_guessed(encoding):
    text = "caf\xe9" if encoding == "latin-1" else ACCENTS
    assert decode(text.encode(encoding)) == (text, "utf" not in encoding)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("小猫坐在窗台上".encode("gbk"), "nor Western European"),
        ("ねこがいる".encode("shift-jis"), "nor Western European"),
        ("рыжий кот".encode("cp1251"), "nor Western European"),
        ("é, caf\xe9".encode()[:-1] + b", ", r"is not UTF-8 \(byte 7\)"),  # a letter is cut
        ("a word".encode("utf-16-le")[:-1], "is damaged UTF-16 text"),
        (bytes(100), "nothing but zeros"),
    ],
)
def test_other_bytes_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        decode(data)


def test_control_characters_become_spaces(tmp_path):
    (tmp_path / "a.txt").write_text("\x1b[31mred\x00 \x07cat\x9b\tsits\nhere\x7f\x85")
    assert read_text(tmp_path / "a.txt", 1000, []) == " [31mred   cat \tsits\nhere "
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "b.png", "text": "a\\u001b[2Jcat\\u0000"}'
    )
    captions = read_captions(tmp_path, [tmp_path / "a.png", tmp_path / "b.png"])
    assert list(captions.texts.values()) == ["[31mred   cat \tsits\nhere", "a [2Jcat"]


def test_a_long_caption_is_used_and_a_book_is_not(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 20_000)
    (tmp_path / "b.txt").write_bytes(b"x" * 1_000_001)
    (tmp_path / "c.txt").write_text(" \n\t")
    captions = read_captions(tmp_path, [tmp_path / f"{name}.png" for name in "abc"])
    assert [len(text) for text in captions.texts.values()] == [99_999, 0]
    (error,) = captions.unread.values()
    assert error.message == f"{tmp_path / 'b.txt'} is larger than 1000000 bytes"


def test_a_caption_file_that_cannot_be_read_is_no_missing_one(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a.txt")
    os.symlink(tmp_path / "b.txt", tmp_path / "b.txt")
    os.symlink(tmp_path / "none", tmp_path / "c.txt")
    (tmp_path / "d.txt").mkdir()
    images = [tmp_path / f"{name}.png" for name in "abcd"]
    captions = read_captions(tmp_path, images)
    assert list(captions.unread) == images and not captions.texts
    os.mkfifo(tmp_path / "metadata.jsonl")  # likewise, for every image that might be in it
    assert list(read_captions(tmp_path, [tmp_path / "e.png"]).unread) == [tmp_path / "e.png"]


def test_pictures_whose_captions_cannot_be_used_are_skipped(
    nano_model, folder, tmp_path, configure
):
    contents = {"gbk": "小猫坐在窗台上".encode("gbk"), "west": b"caf\xe9", "west2": b"\xe9l"}
    for name, data in contents.items():
        square().save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(data)
    (folder / "metadata.jsonl").write_text("{\n")
    config = configure(data={"folder": str(folder), "resolution": 64})
    with logged() as lines:
        dataset = prepare(config, CPU).dataset
    assert [(s.name, s.caption) for s in dataset.samples] == [
        ("good.png", "ohwx"),
        ("west.png", "ohwx, café"),
        ("west2.png", "ohwx, él"),
    ]
    lines = [line for line in lines if "jsonl" in line or "gbk" in line or "read as" in line]
    starts = [
        f"skipped: {folder}/metadata.jsonl, line 1: not valid JSON",
        f"skipped: {folder}/gbk.txt is not UTF-8 (byte ",
        "  2 caption files are not UTF-8 and were read as Windows-1252: ",
    ]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    strict = configure(data={"folder": str(folder), "resolution": 64, "strict": True})
    with pytest.raises(FluxfastError, match=r"2 files cannot be used: .*line 1.*gbk\.txt"):
        prepare(strict, CPU)


# ---------------------------------------------------------------- the whole of it


def test_a_folder_of_everything_makes_a_data_set(folder, configure):
    """Also skips what only decoding finds, with one line each, whatever the names hold."""
    names = used(folder)
    skipped(folder)
    (folder / "good.txt").write_text("word " * 20_000)
    truncated(folder / "cut.jpg")
    truncated(folder / "cut\n\x1b[2J.png")
    screen = io.StringIO()
    config = configure(data={"folder": str(folder), "resolution": [64, 96], "flip": True})
    with log_to_terminal(Console(file=screen, width=500)):
        dataset = prepare(config, CPU).dataset
    assert {sample.name for sample in dataset.samples} == set(names)
    assert max(len(sample.caption) for sample in dataset.samples) > 99_000
    assert len(dataset.samples) == 2 * len(names) > 24
    assert all(s.latents.is_file() and s.flipped.is_file() for s in dataset.samples)
    text = screen.getvalue()
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if line.startswith("skipped: ")]
    assert len(lines) == len(SKIPPED) + 2
    for name, reason in SKIPPED.items():
        (line,) = (line for line in lines if f"/{name}" in line)
        assert reason in line
    assert r"/cut\n\x1b[2J.png is broken or truncated: " in text
    scanned = f"{folder}: {len(names) + 2} of {len(names) + len(lines)} pictures, in "
    assert sum(scanned in line for line in text.splitlines()) == 1
    assert f"left out: {len(SKIPPED)} that cannot be used, named above (strict: true" in text
    assert f"2 of {len(names) + 2} pictures skipped; strict: true" in text


def test_nothing_that_can_be_used_is_an_error(folder, configure, monkeypatch):
    (folder / "good.png").write_bytes(b"")
    monkeypatch.setattr("fluxfast.encoders.text.TextEncoders", None)  # not even loaded
    data = {"folder": str(folder), "resolution": 64}
    with pytest.raises(FluxfastError, match="none of the 1 pictures can be used"):
        prepare(configure(data=data), CPU)
    truncated(folder / "good.png")
    monkeypatch.undo()
    with pytest.raises(FluxfastError, match="none of the 1 pictures can be used"):
        prepare(configure(data=data), CPU)


def test_files_that_change_or_vanish_before_they_are_encoded_are_skipped(folder, configure):
    """After they were hashed: what was decoded must not be kept under another content's name."""
    for name in ("changed.png", "gone.png"):
        noise().save(folder / name)

    def disturb(kind, done, total):
        if kind == "text" and done == total:
            square("blue").save(folder / "changed.png")
            (folder / "gone.png").unlink()

    config = configure(data={"folder": str(folder), "resolution": 64}, trigger="disturbed")
    root = Path(config.model.path)
    before = set(config.cache_path.glob("latents/*"))
    with logged() as lines:
        dataset = cache.prepare_dataset(config, cache.Encoding(root, 32), progress=disturb)
    assert [sample.name for sample in dataset.samples] == ["good.png"]
    assert lines[0].startswith(f"{folder}: 3 of 3 pictures, in 1 bucket: 64x64 (3)")
    lines = [line for line in lines if "skipped" in line]
    assert lines[0] == f"skipped: the image {folder}/changed.png was changed while it was read"
    assert (
        lines[1] == f"skipped: cannot read the image {folder}/gone.png: No such file or directory"
    )
    assert lines[2].startswith("2 of 3 pictures skipped")
    made = set(config.cache_path.glob("latents/*")) - before
    assert made <= {dataset.samples[0].latents}
    with logged() as lines:
        again = cache.prepare_dataset(config, cache.Encoding(root, 32))
    assert [sample.name for sample in again.samples] == ["changed.png", "good.png"]
    assert not any("skipped" in line for line in lines)


def test_a_mask_that_changes_while_it_is_read_spoils_its_picture(folder, configure, monkeypatch):
    masks = folder.parent / "masks"
    masks.mkdir()
    square("white", mode="L").save(masks / "good.png")
    real = cache.images.load_mask

    def load_mask(path):
        mask = real(path)
        square("gray", mode="L").save(path)
        return mask

    monkeypatch.setattr(cache.images, "load_mask", load_mask)
    data = {"folder": str(folder), "resolution": 64, "mask": "folder", "mask_folder": str(masks)}
    with pytest.raises(FluxfastError, match=r"masks/good\.png was changed while"):
        prepare(configure(data={**data, "strict": True}), CPU)


# ---------------------------------------------------------------- the cache, while training


@pytest.fixture
def own(configure, tmp_path):
    """A cache of its own, to damage."""
    return lambda **changes: configure(
        cache_dir=str(tmp_path / "own"), train__batch_size=1, save__every=0, **changes
    )


def test_pictures_may_go_once_they_are_cached(own, photos, tmp_path, monkeypatch):
    copy = shutil.copytree(photos, tmp_path / "copy")
    build = training.build

    def gone(*args):
        shutil.rmtree(copy)
        return build(*args)

    monkeypatch.setattr(training, "build", gone)
    assert train(own(name="gone", data={"folder": str(copy), "resolution": 64})).is_file()


def tensors(content: bytes) -> bytes:
    """Returns a file without its header, which holds the run's folder."""
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.mark.slow
def test_a_cache_that_is_damaged_while_training_is_mended_and_changes_nothing(own, monkeypatch):
    """With one file corrupt and one missing, the run ends with the same bits as without."""
    expected = train(own(name="whole", train__steps=18))
    config, real, done = own(name="hurt", train__steps=18), training.train_step, []

    def hurting(run, batches, step):
        done.append(step)
        files = sorted(config.cache_path.glob("latents/*"))
        if step == 2 and done.count(2) == 1:
            data = bytearray(files[0].read_bytes())
            data[-5] ^= 4
            files[0].write_bytes(data)
        elif step == 10 and done.count(10) == 1:
            files[1].unlink()
        return real(run, batches, step)

    monkeypatch.setattr(training, "train_step", hurting)
    with logged() as lines:
        path = train(config)
    assert tensors(path.read_bytes()) == tensors(expected.read_bytes())
    notes = [line for line in lines if "is encoded anew, and the run goes on" in line]
    assert len(notes) == 2 and sum("checksum" in x for x in notes) == 1
    assert done == sorted(done) and set(done) == set(range(18))


def test_a_cache_file_that_is_damaged_again_and_again_ends_the_run(own, monkeypatch):
    config = own(name="failing")
    prepare(config, CPU)
    file = next(config.cache_path.glob("latents/*"))
    tries = []

    def damaged(*arguments):
        tries.append(1)
        raise CacheDamaged(file, "the disk is failing")

    monkeypatch.setattr("fluxfast.data.loader.read_tensors", damaged)
    with pytest.raises(FluxfastError, match="the disk is failing"):
        train(config)
    assert len(tries) == 2
