"""Writing a bundle: checkpoint + pack → graphs, weights, processor, in one step or not at all."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from daco_rt.artifacts.bundle import DECODER, PACK, PROCESSOR, RUNTIMES, VISION, bundle_fields
from daco_rt.artifacts.pack import Pack, load_pack
from daco_rt.artifacts.store import ArtifactWriter, check_target, new_artifact
from daco_rt.artifacts.tensors import TensorRef
from daco_rt.errors import ArtifactError, DacoError, PolicyError
from daco_rt.export.command import default_output
from daco_rt.export.graph import library_at_hand, steered_decoder
from daco_rt.export.tensorrt import target
from daco_rt.export.tensorrt.recipe import RECIPE
from daco_rt.export.weights import CONVERTED, Placement, place_weights
from daco_rt.models import Checkpoint, family_of, model_identity, resolve_checkpoint

LONGEST = 8192
"""Default limit of prompt plus answer: a cache is allocated for what a request needs, never beyond this."""

PROCESSOR_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote."""

    path: str
    family: str
    checkpoint: str
    precision: str
    max_length: int
    steered_blocks: tuple[int, ...]
    coder: str
    policies: tuple[str, ...]
    default_policy: str
    vision: bool
    linked_bytes: int
    converted_bytes: int
    library_required: str
    seconds: float
    runtime: str = "onnxruntime"
    engine: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return asdict(self)

    def print(self) -> None:
        """Print what was written and what to do next."""
        steering = (
            f"blocks {', '.join(map(str, self.steered_blocks))}, {self.coder}; "
            f"policies: {', '.join(self.policies)} (default {self.default_policy})"
            if self.steered_blocks
            else "none"
        )
        weights = f"{_size(self.linked_bytes)} linked, {_size(self.converted_bytes)} converted"
        print(f"wrote {self.path} in {self.seconds:.1f} s")
        print(
            f"  model     {self.checkpoint} ({self.family}), {self.precision}, up to {self.max_length} tokens"
        )
        print(f"  pictures  {'yes' if self.vision else 'no vision tower'}")
        print(f"  steering  {steering}")
        print(f"  weights   {weights}")
        if self.library_required and self.runtime == "onnxruntime":
            print(f"  needs the custom-op library: {self.library_required}")
        if self.runtime == "tensorrt":
            print(
                "  engine    "
                f"{self.engine or 'none yet: ' + self.path + '/' + RECIPE + ' says how to build it'}"
            )
        if self.runtime == "tensorrt" and self.engine:
            print(f"next: daco-rt generate {self.path} --prompt 'What is a dagger?'")
        elif self.precision == "bf16":
            print(f"next: python -m daco_rt.export.tensorrt {self.path} on the machine that will run it")
        else:
            print(f"next: daco-rt verify {self.path}")


def export_model(
    family: str,
    *,
    checkpoint: str | Path | None = None,
    pack: str | Path | None = None,
    output: str | Path | None = None,
    precision: str | None = None,
    max_length: int | None = None,
    layers: Iterable[int] | None = None,
    vision: bool = True,
    overwrite: bool = False,
    runtime: str = "onnxruntime",
    max_batch: int | None = None,
) -> ExportResult:
    """Write a bundle.

    Parameters
    ----------
    family : model family, for example ``"internvl"``.
    checkpoint : folder, hub id or built-in name; by default the family's ``smol`` model, fetched if absent.
    pack : folder of a concept pack; by default the one that belongs to a built-in checkpoint.
    output : folder to write; by default ``bundles/`` and the checkpoint's name.
    precision : ``"fp32"`` or ``"fp16"``; by default the checkpoint's own, and fp32 for bf16 checkpoints. For
        TensorRT ``"fp16"`` or ``"bf16"``, by default bf16 for bf16 checkpoints and fp16 for others.
    max_length : longest prompt plus answer in tokens; by default the model's own limit, at most 8192, and
        2048 for TensorRT, whose caches always have this length.
    layers : steer only these of the pack's blocks.
    vision : whether to export the vision tower.
    overwrite : replace a bundle that is there; until the new one is complete the old one stays.
    runtime : ``"onnxruntime"`` or ``"tensorrt"``. For TensorRT the graph is written in its dialect, with
        the plugin library beside it; the engine is built where TensorRT can be imported, else the bundle
        says how to build it.
    max_batch : most requests run together, TensorRT only; by default 8.

    Raises
    ------
    DacoError
        Naming the file or argument, what was found and what to do. Nothing is left behind then.

    Example
    -------
    >>> export_model("internvl", checkpoint="pocket-internvl", output="bundles/pocket")   # doctest: +SKIP
    """
    began = time.perf_counter()
    if runtime not in RUNTIMES:
        raise DacoError(f"--runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if max_batch is not None and runtime != "tensorrt":
        raise DacoError(
            "--max-batch is a limit of TensorRT engines; pass --runtime tensorrt, or leave it out"
        )
    label = _name(family, checkpoint) + ("-trt" if runtime == "tensorrt" else "")
    folder = Path(output) if output is not None else default_output(label)
    check_target(folder, overwrite=overwrite)
    ckpt = resolve_checkpoint(family, checkpoint)
    wanted = _precision(ckpt, precision, runtime)
    limit = _max_length(ckpt, max_length, target.LENGTH if runtime == "tensorrt" else LONGEST)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="daco-rt-")))
        chosen, note = _pack(ckpt, pack, layers, scratch)
        writer = stack.enter_context(new_artifact(folder, "bundle", overwrite=overwrite))
        placement = place_weights(_needed(ckpt, vision), wanted, writer)
        if chosen is not None:
            chosen = chosen.save_to(writer.path / PACK)
        graph = steered_decoder(
            ckpt.decoder, ckpt.text_weights(), wanted, placement.locate, chosen, writer.path
        )
        if graph.library_required and runtime == "onnxruntime" and not library_at_hand():
            print(
                f"note: {graph.library_required}; the custom-op library was not built here, so this bundle "
                "does not run on this machine",
                file=sys.stderr,
            )
        tower = family_of(ckpt).build_vision(ckpt, dtype=wanted, locate=placement.locate) if vision else None
        plan = None
        if runtime == "tensorrt":
            plan = target.choose_plan(limit, max_batch, steered=chosen is not None)
            target.add_to_bundle(writer, graph.model, tower, plan)
        ir.save(graph.model, writer.path / DECODER)
        if tower is not None:
            ir.save(tower, writer.path / VISION)
        _copy_processor(ckpt, writer)
        writer.set(
            source=str(ckpt.path),
            **bundle_fields(
                family=ckpt.family,
                checkpoint=ckpt.label,
                precision=wanted,
                max_length=limit,
                decoder=ckpt.decoder.to_dict(),
                embedding=_embedding(ckpt, placement),
                image=_image(ckpt) if vision else None,
                library_required=bool(graph.library_required),
                model=model_identity(ckpt),
                pack=chosen,
                k_out=0 if chosen is None else chosen.k_out,
                tensorrt=None if plan is None else plan.to_dict(),
            ),
        )
    if note:
        print(note, file=sys.stderr)
    engine = target.build_if_possible(folder) if runtime == "tensorrt" else ""
    needed = {ref.name: ref for ref in _needed(ckpt, vision)}
    return ExportResult(
        path=str(folder),
        family=ckpt.family,
        checkpoint=ckpt.label,
        precision=wanted,
        max_length=limit,
        steered_blocks=() if chosen is None else chosen.blocks,
        coder="" if chosen is None else _coder(chosen),
        policies=() if chosen is None else tuple(policy.name for policy in chosen.policies),
        default_policy="off" if chosen is None else chosen.default_policy,
        vision=vision,
        linked_bytes=sum(ref.nbytes for name, ref in needed.items() if name not in placement.converted),
        converted_bytes=placement.copied_bytes,
        library_required=graph.library_required,
        seconds=time.perf_counter() - began,
        runtime=runtime,
        engine=engine,
    )


def parse_layers(text: str) -> tuple[int, ...]:
    """Read a list of blocks: ``"15-19"``, ``"3,5"``, ``"3,15-19"``.

    Example
    -------
    >>> parse_layers("3,15-17")
    (3, 15, 16, 17)
    """
    blocks: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise PolicyError(f"--layers: {text!r} is no list of blocks; write 15-19 or 3,5 or 3,15-19")
        blocks.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(blocks))


def _coder(pack: Pack) -> str:
    """What codes or edits a block's rows, in a few words."""
    if pack.op == "affine":
        return f"affine edits of rank {pack.atoms}"
    size = f", k = {pack.k}" if pack.coder in ("topk", "omp") else ""
    return f"{pack.coder} over {pack.atoms} concepts{size}"


def _name(family: str, checkpoint: str | Path | None) -> str:
    if checkpoint is None:
        return f"smol-{family}"
    return Path(str(checkpoint).rstrip("/")).name.partition("@")[0]


def _precision(ckpt: Checkpoint, wanted: str | None, runtime: str) -> str:
    stored = {ref.dtype for ref in ckpt.text_weights().values()}
    if runtime == "tensorrt":
        return target.choose_precision(wanted, stored)
    if wanted == "bf16":
        raise DacoError(
            "--precision bf16 is for --runtime tensorrt: ONNX Runtime does not compute in bf16 on CPU; "
            "choose fp32 or fp16"
        )
    if wanted is not None:
        return wanted
    return "fp16" if stored == {"F16"} else "fp32"


def _max_length(ckpt: Checkpoint, wanted: int | None, longest: int) -> int:
    trained = ckpt.decoder.max_positions
    if wanted is None:
        return min(trained, longest)
    if not 2 <= wanted <= trained:
        raise DacoError(
            f"--max-length must be between 2 and {trained}, the positions that {ckpt.label} was trained for; "
            f"got {wanted}"
        )
    return wanted


def _pack(
    ckpt: Checkpoint, path: str | Path | None, layers: Iterable[int] | None, scratch: Path
) -> tuple[Pack | None, str]:
    """The pack to bake in and, when there is none, a note that says so."""
    if path is None:
        from daco_rt.export.default_pack import default_pack

        pack = default_pack(ckpt, scratch / PACK, layers)
    else:
        pack = load_pack(path, verify=True)
        if layers is not None:
            pack = pack.select_blocks(tuple(layers))
    if pack is not None:
        difference = pack.model.difference(model_identity(ckpt))
        if difference is not None:
            raise ArtifactError(
                f"{pack.path} was made for another model than {ckpt.label}: {difference}; "
                "build a pack for this one"
            )
        return pack, ""
    if layers is not None:
        raise PolicyError(f"--layers needs a pack: {ckpt.label} has no built-in one; pass --pack")
    return None, (
        f"note: {ckpt.label} has no built-in concept pack, so this bundle is not steered; "
        "pass --pack to steer it"
    )


def _needed(ckpt: Checkpoint, vision: bool) -> list[TensorRef]:
    refs = list(ckpt.text_weights().values())
    return refs + list(ckpt.vision_weights().values()) if vision else refs


def _copy_processor(ckpt: Checkpoint, writer: ArtifactWriter) -> None:
    """Tokenizer, chat template and configurations: small files that say how to prepare a prompt."""
    for name in PROCESSOR_FILES:
        if (ckpt.path / name).is_file():
            writer.add_file(ckpt.path / name, f"{PROCESSOR}/{name}")
    if not (ckpt.path / "tokenizer.json").is_file() and not (ckpt.path / "vocab.json").is_file():
        raise DacoError(f"{ckpt.path} has no tokenizer.json, so nothing could be asked of the model; add it")


def _embedding(ckpt: Checkpoint, placement: Placement) -> dict[str, Any]:
    ref = ckpt.ref("embed_tokens.weight")
    file, _ = placement.locate(ref)
    moved = placement.converted.get(ref.name)
    return {
        "file": file if moved is None else CONVERTED,
        "name": ref.name,
        "shape": list(ref.shape),
        "dtype": (moved or ref).dtype,
    }


def _image(ckpt: Checkpoint) -> dict[str, Any]:
    spec = family_of(ckpt)
    return {
        "token_id": spec.image_token_id(ckpt.config),
        "tokens_per_tile": spec.tokens_per_tile(ckpt.config),
        "tile_size": spec.image_size(ckpt.config),
    }


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"
