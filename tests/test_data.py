"""Data sets, splits, normalisation and augmentation."""

import hashlib
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cacp.data import (
    DATASETS,
    ImageData,
    augment,
    channel_statistics,
    load_dataset,
    make_splits,
    normalise,
)
from cacp.schema import Normalisation, UserError


def _numbered(count: int, classes: int = 5) -> ImageData:
    """Image i is filled with the byte i % 256 and its label is i % classes."""
    index = torch.arange(count)
    pixels = (index % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 6).contiguous()
    return ImageData(pixels, index % classes, tuple(f"class{label}" for label in range(classes)))


def _numbers(data: ImageData) -> list[int]:
    return data.batch(torch.arange(len(data)))[:, 0, 0, 0].tolist()


# ---- ImageData


def test_batches_and_subsets_of_subsets() -> None:
    data = _numbered(20)
    assert data.image_shape == (3, 4, 6)
    assert data.batch(torch.tensor([3, 3, 0])).shape == (3, 3, 4, 6)
    part = data.subset(torch.tensor([7, 2, 9, 4])).subset(torch.tensor([3, 0]))
    assert _numbers(part) == [4, 7]
    assert part.labels.tolist() == [4, 2]
    assert part.classes == data.classes
    assert len(part) == 2
    assert part.labels.dtype == torch.int64


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_images_in_memory_are_copied_to_a_device_and_cut_there(device: str) -> None:
    pixels = torch.arange(5 * 3 * 2 * 2, dtype=torch.uint8).view(5, 3, 2, 2)
    data = ImageData(pixels, torch.arange(5), tuple("abcde")).subset(torch.tensor([4, 2, 0]))
    moved = data.on(torch.device(device))
    batch = moved.batch(torch.tensor([2, 1]))
    assert (batch.device.type, batch.shape, moved.labels.tolist()) == (device, (2, 3, 2, 2), [4, 2, 0])
    assert device == "meta" or batch.cpu().equal(pixels[[0, 2]])
    assert data.on(torch.device("cpu")) is data


def test_labels_that_do_not_fit_are_refused() -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"labels of shape \(3,\) for 2 images and labels from 0 to 5 for 2 classes"):
        ImageData(pixels, torch.tensor([0, 1, 5]), ("a", "b"))
    with pytest.raises(UserError, match=r"pixels must be uint8.*float32 \(2, 3, 4, 4\)"):
        ImageData(pixels.float(), torch.tensor([0, 1]), ("a", "b"))


# ---- digits and CIFAR


def test_digits_are_split_by_class_without_a_seed(tmp_path: Path) -> None:
    train, test = load_dataset("digits", "train", tmp_path), load_dataset("digits", "test", tmp_path)
    assert (len(train), len(test)) == (1438, 359)  # 80 % and 20 % of 1797
    assert train.image_shape == (3, 32, 32)
    assert train.classes == tuple("0123456789")
    every = train.labels.bincount() + test.labels.bincount()
    assert every.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (test.labels.bincount() - every / 5).abs().max() <= 0.6
    assert load_dataset("digits", "val", tmp_path) is None


def test_digits_are_the_enlarged_scans(tmp_path: Path) -> None:
    bunch = load_digits()
    train, test = load_dataset("digits", "train", tmp_path), load_dataset("digits", "test", tmp_path)
    third_zero = int((bunch.target == 0).nonzero()[0][2])
    assert test.labels[(test.labels == 0).nonzero()[0, 0]] == 0
    image = test.batch((test.labels == 0).nonzero()[0])[0]  # (3, 32, 32)
    reference = Image.fromarray((bunch.images[third_zero] * 255 / 16).astype(np.float32)).resize(
        (32, 32), Image.Resampling.BILINEAR
    )
    assert np.abs(image[0].numpy() - np.asarray(reference)).max() <= 0.51
    assert torch.equal(image[0], image[2])
    assert int(train.batch(torch.arange(1438)).max()) == 255


def _fake_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """CIFAR-10's own format with 2 training and 1 test image."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"name{label}" for label in range(10)]
    contents: dict[str, object] = {
        "data_batch_1": {"data": pixels[:2], "labels": [9, 4]},
        "test_batch": {"data": pixels[2:], "labels": [1]},
        "batches.meta": {"label_names": names},
    }
    sums = {}
    for name, content in contents.items():
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        sums[name] = hashlib.md5(raw).hexdigest()
    source = torchvision.datasets.CIFAR10
    monkeypatch.setattr(source, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(source, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(source, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]})
    return pixels


def test_cifar10_is_read_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = _fake_cifar(tmp_path, monkeypatch)
    train, test = load_dataset("cifar10", "train", tmp_path), load_dataset("cifar10", "test", tmp_path)
    assert train.labels.tolist() == [9, 4]
    assert test.labels.tolist() == [1]
    assert train.classes[9] == "name9"
    assert np.array_equal(train.batch(torch.tensor([0, 1])).numpy(), pixels[:2].reshape(2, 3, 32, 32))


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_cifar_offline_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError) as caught:
        load_dataset(name, "train", tmp_path)
    for part in (name, folder, str(tmp_path), "tar.gz", "no network", "digits needs no download"):
        assert part in str(caught.value)


def test_wrong_arguments_are_listed_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)digits, cifar10.*got 'mnist'.*split must.*'dev'.*image_size.*got 4"):
        load_dataset("mnist", "dev", tmp_path, image_size=4)
    for name in DATASETS[:3]:
        with pytest.raises(UserError, match=rf"image_size of {name} is 32, but got 64; leave it out"):
            load_dataset(name, "train", tmp_path, image_size=64)


# ---- image folders


def _write(path: Path, value: int | Image.Image, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = value if isinstance(value, Image.Image) else Image.new("RGB", size, (value, 10, 20))
    image.save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("ant", "bee")):
            for index in range(count):
                _write(tmp_path / split / name / f"{index}.png", 100 * label + index)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path


@pytest.mark.parametrize("memory_limit_bytes", [10**9, 100])
def test_a_folder_in_sorted_order_in_memory_or_on_demand(folder: Path, memory_limit_bytes: int) -> None:
    data = load_dataset("imagefolder", "train", folder, memory_limit_bytes=memory_limit_bytes)
    assert data.classes == ("ant", "bee")
    assert data.image_shape == (3, 8, 8)
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    assert _numbers(data) == [0, 1, 2, 3, 100, 101, 102, 103]
    assert data.batch(torch.tensor([5]))[0, :, 7, 7].tolist() == [101, 10, 20]
    assert _numbers(data.subset(torch.tensor([6, 1]))) == [102, 1]
    files_may_go = memory_limit_bytes > 1000
    (folder / "train" / "bee" / "1.png").write_bytes(b"gone bad")
    if files_may_go:
        assert _numbers(data)[5] == 101
    else:
        with pytest.raises(UserError, match=r"bee/1\.png: broken"):
            data.batch(torch.tensor([0, 5]))


def test_val_is_optional(folder: Path) -> None:
    assert load_dataset("imagefolder", "val", folder) is None
    for name in ("ant", "bee"):
        _write(folder / "val" / name / "0.png", 7)
    val = load_dataset("imagefolder", "val", folder)
    assert val is not None
    assert _numbers(val) == [7, 7]


def test_other_modes_become_rgb(folder: Path) -> None:
    _write(folder / "train" / "ant" / "0.png", Image.new("L", (8, 8), 55))
    _write(folder / "train" / "ant" / "1.png", Image.new("RGBA", (8, 8), (1, 2, 3, 40)))
    _write(folder / "train" / "ant" / "2.PNG", Image.new("P", (8, 8), 0))
    pixels = load_dataset("imagefolder", "train", folder).batch(torch.tensor([0, 1]))
    assert pixels[0, :, 0, 0].tolist() == [55, 55, 55]
    assert pixels[1, :, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("memory_limit_bytes", [10**9, 100])
def test_sizes_that_differ_ask_for_image_size(folder: Path, memory_limit_bytes: int) -> None:
    _write(folder / "train" / "bee" / "0.png", 1, size=(12, 8))
    _write(folder / "train" / "bee" / "1.png", 1, size=(8, 9))
    with pytest.raises(UserError) as caught:
        load_dataset("imagefolder", "train", folder, memory_limit_bytes=memory_limit_bytes)
    for part in ("2 are not", "0.png: 12 x 8 pixels, not 8 x 8", "1.png: 8 x 9 pixels", "set image_size"):
        assert part in str(caught.value)
    data = load_dataset("imagefolder", "train", folder, image_size=16, memory_limit_bytes=memory_limit_bytes)
    assert data.image_shape == (3, 16, 16)
    assert _numbers(data)[4:6] == [1, 1]


def test_test_images_must_have_the_size_of_training_images(folder: Path) -> None:
    for name in ("ant", "bee"):
        for index in range(2):
            _write(folder / "test" / name / f"{index}.png", 1, size=(16, 16))
    with pytest.raises(UserError, match=r"4 are not:\n.*16 x 16 pixels, not 8 x 8"):
        load_dataset("imagefolder", "test", folder)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (33, 47), (16, 19), (21, 16), (9, 8)])
def test_resize_and_crop_is_torchvisions(folder: Path, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    _write(folder / "train" / "ant" / "0.png", Image.fromarray(noise))
    found = load_dataset("imagefolder", "train", folder, image_size=16).batch(torch.tensor([0]))[0]
    functional = torchvision.transforms.functional
    reference = functional.center_crop(functional.resize(Image.fromarray(noise), [16]), [16])
    assert torch.equal(found, functional.pil_to_tensor(reference))


@pytest.mark.parametrize("memory_limit_bytes", [10**9, 100])
def test_broken_images_are_listed_up_to_twenty(folder: Path, memory_limit_bytes: int) -> None:
    for index in range(23):
        (folder / "train" / "ant" / f"bad{index:02}.jpg").write_bytes(b"\xff\xd8 no image")
    with pytest.raises(UserError) as caught:
        load_dataset("imagefolder", "train", folder, memory_limit_bytes=memory_limit_bytes)
    text = str(caught.value)
    assert "23 are not" in text
    assert text.count(": broken:") == 20
    assert "bad00.jpg" in text
    assert "and 3 more" in text
    assert "delete broken files" in text


def test_files_read_on_demand_are_opened_first_at_any_image_size(folder: Path) -> None:
    (folder / "train" / "ant" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"ant/0\.png: broken"):
        load_dataset("imagefolder", "train", folder, image_size=16, memory_limit_bytes=0)


def test_a_truncated_image_is_broken(folder: Path) -> None:
    path = folder / "train" / "ant" / "0.png"
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    _write(path, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"1 are not:\n.*ant/0\.png: broken"):
        load_dataset("imagefolder", "train", folder)


def test_a_folder_of_broken_images_only(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "ant").mkdir(parents=True)
        (tmp_path / split / "ant" / "0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 are not:\n.*0\.jpg: broken"):
        load_dataset("imagefolder", "train", tmp_path)


def test_faults_of_the_layout_are_listed_together(folder: Path) -> None:
    (folder / "train" / "cat").mkdir()
    _write(folder / "test" / "dog" / "0.png", 1)
    with pytest.raises(UserError) as caught:
        load_dataset("imagefolder", "train", folder)
    for part in ("train/cat/ has no images", "test/cat/ is missing", "test/dog/ is no class of train/", str(folder)):
        assert part in str(caught.value)


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)train/ is missing\n  test/ is missing.*set data_dir"):
        load_dataset("imagefolder", "train", tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"(?s)test/ is missing\n  train/ has no class folders"):
        load_dataset("imagefolder", "train", tmp_path)


# ---- splits


def test_splits_from_train_are_disjoint_stratified_and_complete() -> None:
    splits = make_splits(_numbered(200), None, validation_images=30, calibration_images=50, seed=1)
    parts = [_numbers(part) for part in (splits.train, splits.validation, splits.holdout)]
    assert [len(part) for part in parts] == [140, 30, 30]
    assert sorted(number for part in parts for number in part) == list(range(200))
    for part, each in ((splits.validation, 6), (splits.holdout, 6), (splits.train, 28), (splits.calibration, 10)):
        assert part.labels.bincount().tolist() == [each] * 5
    assert set(_numbers(splits.calibration)) < set(parts[0])
    assert parts[1] != sorted(parts[1])


def test_uneven_classes_keep_their_proportions() -> None:
    labels = torch.tensor([0] * 150 + [1] * 40 + [2] * 10)
    data = ImageData(torch.zeros(200, 3, 4, 4, dtype=torch.uint8), labels, ("a", "b", "c"))
    splits = make_splits(data, None, validation_images=40, calibration_images=20, seed=0)
    for part, size in ((splits.validation, 40), (splits.holdout, 40), (splits.calibration, 20)):
        assert len(part) == size
        counts = part.labels.bincount(minlength=3)
        assert (counts - size * torch.tensor([0.75, 0.2, 0.05])).abs().max() <= 1


def test_splits_depend_on_the_seed_alone() -> None:
    def numbers(seed: int) -> list[list[int]]:
        splits = make_splits(_numbered(100), None, 20, 10, seed)
        return [_numbers(part) for part in (splits.train, splits.validation, splits.holdout, splits.calibration)]

    torch.manual_seed(0)
    first = numbers(7)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert numbers(7) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert numbers(8)[1] != first[1]


def test_splits_from_val_leave_train_whole() -> None:
    train, val = _numbered(50), _numbered(21)
    splits = make_splits(train, val, validation_images=100, calibration_images=50, seed=0)
    assert (len(splits.validation), len(splits.holdout)) == (10, 10)
    assert len(set(_numbers(splits.validation)) | set(_numbers(splits.holdout))) == 20
    assert sorted(_numbers(splits.train)) == list(range(50))
    assert len(splits.calibration) == 50
    assert len(make_splits(train, val, 4, 5, 0).holdout) == 4


def test_sizes_that_do_not_fit_are_refused() -> None:
    data = _numbered(100)
    make_splits(data, None, 45, 10, 0)
    with pytest.raises(UserError, match=r"has 100 images, but validation_images=45 takes 90 .*calibration_images=11"):
        make_splits(data, None, 45, 11, 0)
    with pytest.raises(UserError, match=r"(?s)validation_images must be .* got 0\ncalibration_images .* got 1\.5"):
        make_splits(data, None, 0, 1.5, 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"5 classes, \(3, 4, 6\)"):
        make_splits(data, _numbered(10, classes=4), 5, 5, 0)
    with pytest.raises(UserError, match="val must hold at least 2 images"):
        make_splits(data, _numbered(1), 5, 5, 0)


# ---- normalisation and augmentation


def test_normalise_is_the_formula() -> None:
    images = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).view(1, 2, 1, 2)
    out = normalise(images, Normalisation((0.5, 0.2), (0.25, 0.5)))
    assert out.dtype == torch.float32
    expected = torch.tensor([[-2.0, -1.2], [1.6, 0.4]])
    torch.testing.assert_close(out.view(2, 2), expected, atol=1e-6, rtol=0)
    assert images.view(-1).tolist() == [0, 51, 255, 102]


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0.5, 0.5), (0.5, 0.0)), ((0.5, 0.5), (0.5,))])
def test_a_normalisation_that_does_not_fit_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="images of 2 channels, mean="):
        normalise(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), Normalisation(mean, std))


def test_float_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"got torch\.float32 images"):
        normalise(torch.zeros(1, 1, 4, 4), Normalisation((0.5,), (0.5,)))


def test_channel_statistics_are_those_of_the_pixels() -> None:
    pixels = torch.randint(0, 256, (700, 3, 5, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels[:, 2] = 51
    mean, std = channel_statistics(ImageData(pixels, torch.zeros(700), ("only",)))
    share = pixels.double() / 255
    assert mean == pytest.approx(share.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert std[:2] == pytest.approx(share[:, :2].std((0, 2, 3), correction=0).tolist(), abs=1e-12)
    assert (mean[2], std[2]) == (pytest.approx(0.2), 1.0)
    with pytest.raises(UserError, match="at least 1 image, but got 0"):
        channel_statistics(_numbered(5).subset(torch.tensor([], dtype=torch.int64)))


def _candidates(image: Tensor, padding: int, flip: bool) -> dict[tuple[int, int, bool], Tensor]:
    """Every outcome that augmentation may have for one image (C, H, W), cut out one by one."""
    height, width = image.shape[1:]
    out = {}
    for flipped in (False, True) if flip else (False,):
        for top in range(2 * padding + 1):
            for left in range(2 * padding + 1):
                padded = torch.nn.functional.pad(image, (padding,) * 4)
                crop = padded[:, top : top + height, left : left + width]
                out[top, left, flipped] = crop.flip(2) if flipped else crop
    return out


@pytest.mark.parametrize("flip", [False, True])
def test_augment_gives_every_crop_and_nothing_else(flip: bool) -> None:
    image = torch.arange(1, 3 * 5 * 7 + 1, dtype=torch.uint8).view(3, 5, 7)
    out = augment(image.expand(600, 3, 5, 7), torch.Generator().manual_seed(0), padding=1, flip=flip)
    assert out.dtype == torch.uint8
    candidates = _candidates(image, 1, flip)
    seen = dict.fromkeys(candidates, 0)
    for crop in out:
        matches = [key for key, candidate in candidates.items() if torch.equal(candidate, crop)]
        assert len(matches) == 1
        seen[matches[0]] += 1
    mean = 600 / len(candidates)
    assert all(abs(count - mean) < 5 * mean**0.5 for count in seen.values())


def test_augment_without_padding_or_flip_copies() -> None:
    images = _numbered(9).batch(torch.arange(9))
    out = augment(images, torch.Generator().manual_seed(0), padding=0, flip=False)
    assert torch.equal(out, images)
    assert out.data_ptr() != images.data_ptr()


def test_augment_uses_only_its_generator() -> None:
    images = torch.randint(0, 256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before = torch.get_rng_state()
    first, second, other = (
        augment(images, torch.Generator().manual_seed(seed), padding=2, flip=True) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError, match="padding=-1"):
        augment(images, torch.Generator(), padding=-1, flip=False)


class _Counter(TorchDispatchMode):
    """Counts the tensor operations that run."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_augment_has_no_loop_over_images() -> None:
    calls = []
    for batch in (1, 256):
        images = torch.zeros(batch, 3, 8, 8, dtype=torch.uint8)
        with _Counter() as counter:
            augment(images, torch.Generator().manual_seed(0), padding=4, flip=True)
        calls.append(counter.calls)
    assert 5 < calls[0] == calls[1] < 40
