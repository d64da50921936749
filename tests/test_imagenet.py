"""ImageNet as it is unpacked: train/ and val/, sizes of all kinds, random crops, torchvision's weights; a small one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import Call
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from cacp.checkpoint import load_json
from cacp.data import load_dataset
from cacp.models.weights import published_weights_of
from cacp.schema import UserError

SYNSETS = ("n01440764", "n01443537", "n01484850")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synsets of noisy images, each of a colour, of many sizes: 40 to train on and 10 to test, each."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for folder, count in (("train", 40), ("val", 10)):
        for label, synset in enumerate(SYNSETS):
            (root / folder / synset).mkdir(parents=True)
            for index in range(count):
                height, width = generator.integers(40, 90, 2)
                pixels = generator.integers(0, 110, (height, width, 3), dtype=np.uint8)
                pixels[..., label] += 110
                name = f"{synset}_{index}.JPEG" if folder == "train" else f"ILSVRC2012_val_{label}{index}.JPEG"
                Image.fromarray(pixels).save(root / folder / synset / name)
    return root


def first_file(root: Path, folder: str) -> Path:
    return min((root / folder / SYNSETS[0]).iterdir())


def test_val_is_the_test_set_in_torchvisions_frame(imagenet: Path) -> None:
    test = load_dataset("imagenet", "test", imagenet, image_size=28)
    assert (len(test), test.image_shape, test.classes) == (30, (3, 28, 28), SYNSETS)
    assert load_dataset("imagenet", "val", imagenet, image_size=28) is None
    with Image.open(first_file(imagenet, "val")) as image:
        expected = np.asarray(CenterCrop(28)(Resize(32)(image)))
    assert np.array_equal(test.batch(torch.tensor([0]))[0].permute(1, 2, 0).numpy(), expected)
    assert load_dataset("imagenet", "test", imagenet).image_shape == (3, 224, 224)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_crops_are_torchvisions_and_the_generators_alone(imagenet: Path, workers: int) -> None:
    train = load_dataset("imagenet", "train", imagenet, 32, memory_limit_bytes=0, workers=workers)
    batches = torch.arange(120).split(50)
    before = torch.get_rng_state()
    crops = list(train.cropped(batches, torch.Generator().manual_seed(5), flip=False))
    assert torch.equal(torch.get_rng_state(), before)
    assert [crop.shape for crop in crops] == [(50, 3, 32, 32), (50, 3, 32, 32), (20, 3, 32, 32)]
    seed = int(torch.randint(0, 2**62, (50,), generator=torch.Generator().manual_seed(5))[0])
    with torch.random.fork_rng(devices=[]), Image.open(first_file(imagenet, "train")) as image:
        torch.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        box = (left, top, left + width, top + height)
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, box))
    assert np.array_equal(crops[0][0].permute(1, 2, 0).numpy(), expected)
    other = list(train.cropped(batches, torch.Generator().manual_seed(6), flip=False))
    assert not torch.equal(crops[0], other[0])
    flipped = list(train.cropped(batches, torch.Generator().manual_seed(5), flip=True))
    mirrored = [
        torch.equal(one, other.flip(2)) for one, other in zip(torch.cat(crops), torch.cat(flipped), strict=True)
    ]
    same = [torch.equal(one, other) for one, other in zip(torch.cat(crops), torch.cat(flipped), strict=True)]
    assert all(a or b for a, b in zip(mirrored, same, strict=True)) and 40 <= sum(mirrored) <= 80


def test_a_subset_crops_its_own_images(imagenet: Path) -> None:
    train = load_dataset("imagenet", "train", imagenet, 32, memory_limit_bytes=0, workers=0)
    part = train.subset(torch.tensor([100, 3]))
    generator = torch.Generator()
    first = next(part.cropped([torch.tensor([1])], generator.manual_seed(1), flip=False))
    second = next(train.cropped([torch.tensor([3])], generator.manual_seed(1), flip=False))
    assert torch.equal(first, second)


def test_what_cannot_be_read_is_named(imagenet: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train/<class>/\* and val/<class>/\*, with.*\n  val/ is missing"):
        (tmp_path / "train" / "a").mkdir(parents=True)
        first_file(imagenet, "train").rename(tmp_path / "train" / "a" / "one.JPEG")
        try:
            load_dataset("imagenet", "train", tmp_path)
        finally:
            (tmp_path / "train" / "a" / "one.JPEG").rename(imagenet / "train" / SYNSETS[0] / f"{SYNSETS[0]}_0.JPEG")
    for folder in ("train", "val"):
        (tmp_path / folder / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "a" / "broken.JPEG").write_bytes(b"no image")
    train = load_dataset("imagenet", "train", tmp_path, 32, memory_limit_bytes=0, workers=2)
    with pytest.raises(UserError, match=r"a/broken.JPEG: broken"):
        list(train.cropped([torch.tensor([0])], torch.Generator(), flip=True))
    digits = load_dataset("digits", "train", tmp_path)
    with pytest.raises(UserError, match="need images in files: dataset imagefolder or imagenet"):
        digits.cropped([torch.tensor([0])], torch.Generator(), flip=True)


def test_a_flat_val_is_told_from_a_missing_one(imagenet: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(imagenet / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match="archive of val/ is flat: sort it into synset folders"):
        load_dataset("imagenet", "train", tmp_path)


def test_torchvisions_weights_are_published_for_imagenet() -> None:
    found = published_weights_of("resnet50", "imagenet")
    assert found is not None
    assert (found.file, found.sha256) == ("resnet50-0676ba61.pth", "0676ba61")
    assert found.top1 == pytest.approx(0.7613) and found.normalisation.mean == (0.485, 0.456, 0.406)
    assert published_weights_of("mobilenet_v2", "imagenet") is not None
    assert published_weights_of("googlenet", "imagenet") is None  # published with auxiliary heads
    assert published_weights_of("efficientnet_b1", "imagenet") is None  # for 240 pixels
    assert published_weights_of("resnet20", "imagenet") is None and published_weights_of("resnet50", "cifar10") is None


def test_from_training_to_fine_tuning(call: Call, imagenet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [
        "--model=resnet20", "--dataset=imagenet", "--data_dir", imagenet, "--image_size=32", "--workers=2",
        "--validation_images=15", "--calibration_images=30", "--batch_size=16", "--pretrain_epochs=6",
        "--pretrain_lr=0.05", "--targets=0.5", "--finetune_epochs=1", "--finetune_lr=0.01", "--output", folder,
    ]  # fmt: skip
    call("pretrain", *settings)
    assert load_json(folder / "dense" / "result.json")["validation_top1"] > 0.6
    call("prune", *settings, "--method=sfp", "--epochs=1", "--method_lr=0.01")
    call("export", folder)
    call("finetune", folder)
    result = load_json(folder / "finetune" / "macs-0.50" / "result.json")
    assert result["recipe"]["resized_crop"] and result["test_images"] == 30
    assert result["test_top1"]["after"] > 0.6
