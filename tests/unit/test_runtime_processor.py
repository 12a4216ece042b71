"""The processor: what transformers would do, from local files, with clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from daco_rt.errors import ArtifactError, DacoError
from daco_rt.models import resolve_checkpoint
from daco_rt.runtime.images import open_image
from daco_rt.runtime.processor import Processor

IMAGE = "<IMG_CONTEXT>"


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_checkpoint("internvl", "pocket-internvl").path


@pytest.fixture(scope="module")
def processor(folder: Path) -> Processor:
    return Processor(folder)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (80, 170, 3), dtype=np.uint8)


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    code = (
        "import sys, daco_rt.runtime\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx_ir', 'PIL'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_text_prompt_is_the_rendered_template(processor: Processor) -> None:
    got = processor.prepare("What is a dagger?")
    assert got.text == "<|im_start|>user\nWhat is a dagger?<|im_end|>\n<|im_start|>assistant\n"
    assert got.pixel_values is None and not got.image_mask.any()
    assert got.input_ids.tolist() == processor.tokenizer(got.text)["input_ids"]
    assert processor.prepare(got.text, raw=True).input_ids.tolist() == got.input_ids.tolist()


def test_token_ids_are_taken_as_they_are(processor: Processor) -> None:
    ids = processor.raw_ids("What is a dagger?")
    assert ids == processor.prepare("What is a dagger?", raw=True).input_ids.tolist()
    got = processor.prepare(ids[1:], raw=True)
    assert got.input_ids.tolist() == ids[1:] and got.text == processor.decode(ids[1:])
    assert not got.image_mask.any() and got.pixel_values is None


def test_an_answer_that_has_begun_can_be_left_open(processor: Processor) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Well, I"}]
    assert processor.render(messages, go_on=True).endswith("Well, I")
    assert not processor.render(messages).endswith("Well, I")
    assert processor.chat_template and "assistant" in processor.chat_template


def test_pictures_are_tiled_as_transformers_tiles_them(processor: Processor, picture: np.ndarray) -> None:
    from transformers import GotOcr2ImageProcessorPil

    pictures = [picture, picture[:, :50]]
    got = processor.prepare("Compare.", pictures)
    assert got.text.count(IMAGE) == 2
    settings = json.loads((processor.folder / "preprocessor_config.json").read_text())
    tiler = GotOcr2ImageProcessorPil(
        **{k: v for k, v in settings.items() if not k.endswith(("_type", "_class"))}
    )
    expected = tiler([open_image(p) for p in pictures], return_tensors="np")
    assert got.pixel_values is not None and got.pixel_values.dtype == np.float32
    np.testing.assert_array_equal(got.pixel_values, expected["pixel_values"])
    per_tile = int(got.image_mask.sum()) // len(got.pixel_values)
    # One run of image tokens a picture, as long as its tiles need.
    edges = np.flatnonzero(np.diff(np.concatenate([[0], got.image_mask.astype(int), [0]])))
    runs = (edges[1::2] - edges[::2]).tolist()
    assert runs == [int(n) * per_tile for n in expected["num_patches"]]


@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_most_tiles_can_be_bounded(processor: Processor, picture: np.ndarray, most: int) -> None:
    got = processor.prepare("What?", [picture], max_tiles=most)
    assert got.pixel_values is not None
    # An image cut into several tiles gets a thumbnail beside them.
    assert len(got.pixel_values) == (1 if most == 1 else 3)
    assert got.image_mask.sum() == 16 * len(got.pixel_values)


def test_messages_place_their_own_pictures(processor: Processor, picture: np.ndarray, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    open_image(picture[:40]).save(file)
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "This "},
                {"type": "image"},
                {"type": "text", "text": " or that "},
                {"type": "image", "path": str(file)},
            ],
        },
    ]
    got = processor.prepare(messages, [picture])
    assert got.text.index("This") < got.text.index(IMAGE) < got.text.index("or that") < got.text.rindex(IMAGE)
    first, second = (processor.prepare("x", [p]).pixel_values for p in (picture, picture[:40]))
    assert got.pixel_values is not None and first is not None and second is not None
    np.testing.assert_array_equal(got.pixel_values, np.concatenate([first, second]))


def test_transformers_is_left_as_it_was(folder: Path) -> None:
    from transformers import InternVLProcessor
    from transformers.processing_utils import ProcessorMixin

    before = ProcessorMixin.__dict__["get_attributes"]
    Processor(folder)
    assert ProcessorMixin.__dict__["get_attributes"] is before
    assert "video_processor" in InternVLProcessor.get_attributes()


def test_threads_share_a_processor(processor: Processor, picture: np.ndarray) -> None:
    prompts = [f"question {i} " * (i + 1) for i in range(16)]
    expected = [processor.prepare(p, [picture]).input_ids.tolist() for p in prompts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda p: processor.prepare(p, [picture]).input_ids.tolist(), prompts))
    assert got == expected


def test_end_of_answer_ids_come_from_every_source(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.j*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = Processor(tmp_path).tokenizer.eos_token_id
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert Processor(tmp_path).eos_token_ids == {5, 9, own}
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 11
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Processor(tmp_path).eos_token_ids == {11, own}


def test_pictures_come_upright_and_in_colour(tmp_path: Path) -> None:
    from PIL import Image

    image = Image.new("L", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    got = open_image(tmp_path / "turned.jpg")
    assert got.size == (4, 6) and got.mode == "RGB"


def test_what_is_no_picture_is_refused(processor: Processor, tmp_path: Path, picture: np.ndarray) -> None:
    (tmp_path / "photo.txt").write_text("not a picture")
    open_image(picture).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    for source, match in (
        (tmp_path / "photo.txt", r"photo\.txt is not an image that Pillow can read: unknown format"),
        (tmp_path / "cut.png", r"cut\.png is not an image that Pillow can read"),
        (tmp_path, "is not a file"),
        ("https://example.com/a.png", "local files only"),
        (np.zeros((4, 4, 3), np.float32), "must be uint8"),
        (np.zeros((0, 4, 3), np.uint8), "must be uint8"),
        (7, "must be a path"),
    ):
        with pytest.raises(DacoError, match=match):
            processor.prepare("What?", [source])  # type: ignore[list-item]


def test_requests_that_contradict_themselves_are_refused(
    processor: Processor, picture: np.ndarray, tmp_path: Path
) -> None:
    for prompt, images, options, match in (
        (f"see {IMAGE}", [], {}, "1 image placeholder"),
        (f"see {IMAGE}", [picture], {}, "2 image placeholder"),
        ("see", [picture], {"raw": True}, "0 image placeholder"),
        ("see", [picture], {"max_tiles": 0}, "max_tiles"),
        ("", [], {"raw": True}, "empty"),
        ([], [], {}, "empty"),
        ([{"content": "x"}], [], {}, "'role'"),
        ([{"role": "user", "content": None}], [], {}, "a string or a list"),
        ([{"role": "user", "content": "x"}], [picture], {}, "image entries for 0"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], {}, "more image entries"),
        ([{"role": "user", "content": "x"}], [], {"raw": True}, "must be a string"),
        ([1, 2], [picture], {"raw": True}, "token ids without images"),
        ([1, 2], [], {}, "message"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], [], {}, "entry of a message"),
        ([{"role": "user", "content": [{"type": "text"}]}], [], {}, "entry of a message"),
        ([{"role": "user", "content": [{"type": "image", "url": "https://x/a.png"}]}], [], {}, "local files"),
    ):
        with pytest.raises(DacoError, match=match):
            processor.prepare(prompt, images, **options)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="holds no tokenizer"):
        Processor(tmp_path)
    with pytest.raises(ArtifactError, match="is not a folder"):
        Processor(tmp_path / "absent")
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="not readable JSON"):
        Processor(tmp_path)
