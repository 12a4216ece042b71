"""pocket-internvl: the same bytes everywhere, loadable as it stands, rebuilt when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from daco_rt.artifacts.tensors import read_header
from daco_rt.errors import CheckpointError
from daco_rt.models import assembly, catalogue, pocket
from daco_rt.models.seeded import IMAGE_TOKENS, near_normal

# A change of recipe is a new checkpoint: dictionaries and packs made for the old one no longer fit.
WEIGHTS_SHA256 = "a92453f1577e2dca3b1ee7470318f84caad5b83c265bb50a581c5aeb4683b527"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DACO_RT_CACHE", str(root))
        return pocket.ensure(progress=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DACO_RT_CACHE", str(tmp_path))
    return tmp_path


def test_weights_are_the_same_bytes_everywhere(folder: Path) -> None:
    record = json.loads((folder / assembly.RECORD).read_text())
    assert record["files"]["model.safetensors"]["sha256"] == WEIGHTS_SHA256


def test_noise_has_the_announced_moments_and_depends_on_name_and_seed() -> None:
    noise = near_normal("w", (400, 500), 0.25)
    assert noise.dtype == np.float32 and noise.shape == (400, 500)
    assert abs(noise.mean()) < 0.002 and abs(noise.std() - 0.25) < 0.002
    assert np.abs(noise).max() <= 0.25 * 3.5
    np.testing.assert_array_equal(noise, near_normal("w", (400, 500), 0.25))
    assert abs(np.corrcoef(noise.ravel(), near_normal("v", (400, 500), 0.25).ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(noise.ravel(), near_normal("w", (400, 500), 0.25, seed=1).ravel())[0, 1]) < 0.02


def test_a_whole_folder_is_left_alone_and_a_damaged_one_is_rebuilt(cache: Path) -> None:
    folder = pocket.ensure(progress=False)
    weights = folder / "model.safetensors"
    first, made = weights.read_bytes(), weights.stat().st_mtime_ns
    pocket.ensure(progress=False)
    assert weights.stat().st_mtime_ns == made

    flipped = bytearray(first)
    flipped[len(flipped) // 2] ^= 1
    weights.write_bytes(flipped)
    assert not pocket.is_built()
    pocket.ensure(progress=False)
    assert weights.read_bytes() == first

    (folder / "tokenizer.json").unlink()
    assert not pocket.is_built()
    pocket.ensure(progress=False)
    assert (folder / "tokenizer.json").is_file()

    (folder / assembly.RECORD).write_text("[]")
    assert not pocket.is_built()


def test_a_copied_folder_is_whole_although_its_times_differ(cache: Path) -> None:
    weights = pocket.ensure(progress=False) / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert pocket.is_built()


def test_a_failing_build_leaves_the_former_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pocket.ensure(progress=False)
    (folder / "config.json").write_text("{}")
    before = sorted(path.name for path in folder.iterdir())

    def fail(*_: object, **__: object) -> None:
        raise CheckpointError("no")

    monkeypatch.setattr(pocket, "write_processor", fail)
    with pytest.raises(CheckpointError):
        pocket.ensure(progress=False)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_catalogue_knows_all_models_and_refuses_others(cache: Path) -> None:
    rows = {model.name: model for model in catalogue.models_available()}
    assert list(rows) == ["smol-internvl", "scenes-internvl", "pocket-internvl"]
    assert rows["pocket-internvl"].state == "not built"
    built = catalogue.ensure("pocket-internvl", progress=False)
    rows = {model.name: model for model in catalogue.models_available()}
    assert rows["pocket-internvl"].path == built and rows["pocket-internvl"].licence == "Apache-2.0"
    assert rows["smol-internvl"].path is None
    with pytest.raises(CheckpointError, match="did you mean 'pocket-internvl'"):
        catalogue.ensure("pocket-internvI")
    with pytest.raises(ValueError, match="pocket-internvl"):
        pocket.ensure("pocket-llava")


def test_hugging_face_loads_the_stored_bits(folder: Path) -> None:
    import torch
    from transformers import InternVLForConditionalGeneration

    model, report = InternVLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    # Module paths differ from stored names only in these prefixes.
    state = {
        name.replace("model.language_model.", "language_model.model.", 1)
        .replace("model.vision_tower.", "vision_tower.", 1)
        .replace("model.multi_modal_projector.", "multi_modal_projector.", 1): tensor
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    stored = read_header(folder / "model.safetensors")
    assert state.keys() == stored.keys()
    for name, ref in stored.items():
        np.testing.assert_array_equal(state[name].numpy(), ref.read(), err_msg=name)


def test_processor_expands_images_and_the_model_answers_with_them(folder: Path) -> None:
    import torch
    from transformers import InternVLForConditionalGeneration

    from daco_rt.runtime.processor import Processor

    processor = Processor(folder)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    prepared = processor.prepare("What is this?", images=[Image.fromarray(noise)])
    token = json.loads((folder / "config.json").read_text())["image_token_id"]
    assert int((prepared.input_ids == token).sum()) == IMAGE_TOKENS
    model = InternVLForConditionalGeneration.from_pretrained(folder).eval()
    with torch.inference_mode():
        answer = model.generate(
            input_ids=torch.from_numpy(np.asarray(prepared.input_ids))[None],
            pixel_values=torch.from_numpy(np.asarray(prepared.pixel_values)),
            max_new_tokens=12,
            do_sample=False,
        )[0, -12:].tolist()
    # Noise, but neither one token for ever nor an answer that ends at once.
    assert len(set(answer)) > 1


def test_residual_stream_is_not_one_direction(folder: Path) -> None:
    import torch
    from transformers import InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration.from_pretrained(folder).eval()
    streams = []
    for block in model.model.language_model.layers:
        block.register_forward_hook(lambda _module, _args, output: streams.append(output[0]))
    with torch.inference_mode():
        model(input_ids=torch.arange(300, 340)[None])
    for stream in streams:
        norms = stream.norm(dim=1)
        assert 4 < norms.median() < 100 and norms.max() < 3 * norms.median()
        unit = stream / norms[:, None]
        assert ((unit @ unit.T).abs().mean() - 1 / len(unit)) < 0.6
