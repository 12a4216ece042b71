"""The TensorRT session over another engine: ONNX Runtime runs the same graph behind the same small interface.

All that the session decides is tested here: profiles, shapes, dtypes, caches in place, prompts in pieces,
limits.
Only the calls into TensorRT are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from daco_rt._native import library_path
from daco_rt.artifacts.bundle import load_bundle
from daco_rt.artifacts.engine import DECODER_PLAN, VISION_PLAN
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.export import export_model
from daco_rt.export.tensorrt.build import build_engines
from daco_rt.runtime import GenerateRequest, Generator, OnnxSession, open_session
from daco_rt.runtime.tensorrt_session import DECODE, PREFILL, Port, TensorRTSession

LENGTH, BATCH = 128, 3
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def have_plugin() -> bool:
    try:
        library_path("tensorrt")
    except DacoError:
        return False
    return True


pytestmark = pytest.mark.skipif(not have_plugin(), reason="the TensorRT plugin was not built here")


class OnnxRunner:
    """An engine runner over ONNX Runtime. Its "device" arrays are NumPy arrays in a box of their own."""

    version = "of ONNX Runtime"

    def __init__(self, graph: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.runs: list[tuple[int, dict[str, tuple[int, ...]]]] = []

    def ports(self) -> list[Port]:
        def of(value: Any, is_input: bool) -> Port:
            shape = tuple(axis if isinstance(axis, int) else -1 for axis in value.shape)
            return Port(value.name, shape, np.dtype(TYPES[value.type]), is_input)

        return [of(v, True) for v in self.session.get_inputs()] + [
            of(v, False) for v in self.session.get_outputs()
        ]

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return SimpleNamespace(data=np.zeros(shape, dtype))

    def rows(self, array: Any, rows: NDArray[np.integer]) -> Any:
        return SimpleNamespace(data=array.data[rows].copy())

    def run(
        self,
        profile: int,
        feed: Mapping[str, np.ndarray],
        outputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
        in_place: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        self.runs.append((profile, {name: array.shape for name, array in feed.items()}))
        names = [value.name for value in self.session.get_outputs()]
        past = {name: box.data for name, box in in_place.items() if name.startswith("past_")}
        found = dict(zip(names, self.session.run(names, dict(feed) | past), strict=True))
        for name, box in in_place.items():
            if name in found:
                box.data[...] = found.pop(name)
        for name, (shape, dtype) in outputs.items():
            assert found[name].shape == shape and found[name].dtype == dtype, name
        return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket model for TensorRT, fp16, with plans recorded that stand for engines."""
    folder = tmp_path_factory.mktemp("trt")
    path = folder / "bundle"
    export_model(
        "internvl", checkpoint="pocket-internvl", output=path, runtime="tensorrt", max_length=LENGTH,
        max_batch=BATCH,
    )  # fmt: skip
    plans = {}
    for name in (DECODER_PLAN, VISION_PLAN):
        plans[name] = folder / name
        plans[name].write_bytes(name.encode())
    build_engines(
        load_bundle(path),
        SimpleNamespace(__version__="10.15.1.29"),  # type: ignore[arg-type]
        operators="functions",
        device="this machine",
        compute="0.0",
        given=plans,
    )
    return path


@pytest.fixture
def session(bundle: Path) -> TensorRTSession:
    graphs = {DECODER_PLAN: "decoder.onnx", VISION_PLAN: "vision.onnx"}
    return TensorRTSession(bundle, open_engine=lambda plan, plugin: OnnxRunner(bundle / graphs[plan.name]))


def prompts(session: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    ids = draw.integers(5, 500, (2, 11))
    return session.embed(ids), np.full((2, 11), 2), np.array([11, 7])


def test_steps_equal_those_of_onnxruntime(session: TensorRTSession, bundle: Path):
    reference = OnnxSession(bundle, library="off")
    for at in (session, reference):
        assert at.dtype == np.float16 and at.blocks == (2, 3, 4)
    embeds, slots, lengths = prompts(session)
    caches = [s.new_cache(2, 32) for s in (session, reference)]
    assert caches[0].length == LENGTH
    steps = [s.prefill(c, embeds, slots, lengths) for s, c in zip((session, reference), caches, strict=True)]
    for _ in range(3):
        np.testing.assert_array_equal(steps[0].logits, steps[1].logits)
        for block in session.blocks:
            np.testing.assert_array_equal(steps[0].reports[block].doses, steps[1].reports[block].doses)
        tokens = steps[0].logits[:, -1].argmax(-1)
        steps = [
            s.decode(c, tokens, np.full(2, 2)) for s, c in zip((session, reference), caches, strict=True)
        ]
    assert float(np.max([r.doses for r in steps[0].reports.values()])) > 0, "nothing was steered"
    runs = session._decoder.runs  # type: ignore[attr-defined]
    assert [profile for profile, _ in runs] == [PREFILL, DECODE, DECODE, DECODE]
    assert runs[1][1]["inputs_embeds"] == (2, 1, embeds.shape[2])


def test_prompts_wider_than_the_profile_run_in_pieces(session: TensorRTSession):
    embeds, slots, lengths = prompts(session)
    whole = session.prefill(session.new_cache(2, 32), embeds, slots, lengths)
    session.widest = 4
    session._decoder.runs.clear()  # type: ignore[attr-defined]
    cache = session.new_cache(2, 32)
    pieces = session.prefill(cache, embeds, slots, lengths, chunk=1000)
    widths = [shapes["inputs_embeds"][1] for _, shapes in session._decoder.runs]  # type: ignore[attr-defined]
    assert widths == [4, 4, 3]
    np.testing.assert_allclose(pieces.logits, whole.logits, atol=0.02 * float(np.abs(whole.logits).max()))
    assert cache.lengths.tolist() == [11, 7]


def test_rows_of_a_cache_can_be_kept(session: TensorRTSession):
    embeds, slots, lengths = prompts(session)
    cache = session.new_cache(2, 32)
    session.prefill(cache, embeds, slots, lengths)
    both = session.decode(cache.keep(np.array([0, 1])), np.array([9, 8]), np.zeros(2, np.int64))
    one = session.decode(cache.keep(np.array([1])), np.array([8]), np.zeros(1, np.int64))
    np.testing.assert_allclose(one.logits[0], both.logits[1], atol=0.02 * float(np.abs(one.logits).max()))


def test_limits_are_refused_before_anything_runs(session: TensorRTSession):
    with pytest.raises(DacoError, match="this engine runs 1 to 3 requests together, got 4"):
        session.new_cache(4, 32)
    with pytest.raises(DacoError, match="cache holds 128 positions, 200 are needed"):
        session.new_cache(1, 200)
    cache = session.new_cache(1, 32)
    with pytest.raises(ValueError, match="the logits of one row a request"):
        session.forward(cache, session.embed(np.array([[5, 6]])), np.zeros((1, 2), int),
                        logits_at=np.array([[0, 1]]))  # fmt: skip


def test_pictures_go_through_the_vision_engine(session: TensorRTSession, bundle: Path):
    tiles = np.random.default_rng(0).normal(size=(6, 3, 64, 64)).astype(np.float32)
    got = session.encode_images(tiles, tiles_at_once=100)
    expected = OnnxSession(bundle, library="off").encode_images(tiles)
    assert got.dtype == np.float16 and got.shape == expected.shape
    np.testing.assert_allclose(
        got.astype(np.float32), expected.astype(np.float32), atol=0.01 * float(np.abs(expected).max())
    )
    with pytest.raises(DacoError, match="image tiles must be 64 x 64 pixels"):
        session.encode_images(tiles[:, :, :32])


def test_a_generator_answers_with_it(session: TensorRTSession, bundle: Path):
    requests = [GenerateRequest(q, max_new_tokens=5) for q in ("What is a dagger?", "Who are you?")]
    answers = Generator(session, batch_size=2).generate(requests)
    expected = Generator(OnnxSession(bundle, library="off"), batch_size=2).generate(requests)
    assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
    assert answers[0].telemetry is not None and answers[0].telemetry.summary()["removed"]
    assert session.info.operator == "functions" and session.info.tensorrt == "of ONNX Runtime"


def test_an_engine_is_never_silently_replaced(bundle: Path, tmp_path: Path):
    assert isinstance(open_session(bundle, library="off"), OnnxSession)
    with pytest.raises(DacoError, match="was exported for TensorRT, so the custom-op library"):
        OnnxSession(bundle, library="require")
    bare = tmp_path / "bare"
    export_model(
        "internvl", checkpoint="pocket-internvl", output=bare, runtime="tensorrt", max_length=64, vision=False
    )
    with pytest.raises(ArtifactError, match=r"has no engine yet: .* or run its portable form"):
        open_session(bare)


def test_another_pack_needs_another_engine(bundle: Path, tmp_path: Path):
    import shutil

    from daco_rt.artifacts.engine import load_engine

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    assert load_engine(load_bundle(copy)).operators == "functions"
    manifest = copy / "pack" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(ArtifactError, match="was built from another pack than the bundle has now"):
        load_engine(load_bundle(copy, verify=False))
