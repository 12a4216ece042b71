"""Training a sparse autoencoder: from rows of the residual stream to an SAE folder.

On one process, CPU and number of threads the result is a function of its arguments, bit for bit, also when
the process was killed and resumed any number of times: the order of rows is a function of the seed, and a
checkpoint holds weights, both moments of AdamW, the counters of dead latents and the position in the data.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daco_rt.artifacts import ConceptDictionary, ModelIdentity, Sae, check_target, load_sae, save_sae
from daco_rt.artifacts.manifest import read_manifest
from daco_rt.artifacts.store import is_artifact
from daco_rt.errors import ArtifactError, DacoError
from daco_rt.models.loading import torch_device
from daco_rt.progress import progress as show
from daco_rt.sae.autoencoder import Autoencoder, initial_directions
from daco_rt.sae.checkpoint import RunFolder, Saved
from daco_rt.sae.feed import RowSource, ShuffledRows
from daco_rt.sae.settings import SaeTraining

_CODERS = {"topk": "topk", "l1": "relu"}


def train_sae(
    source: RowSource,
    output: str | Path,
    *,
    model: ModelIdentity,
    block: int,
    training: SaeTraining | None = None,
    dictionary: ConceptDictionary | None = None,
    device: str | torch.device = "cpu",
    run: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    progress: bool = True,
) -> Sae:
    """Train an SAE and write it as a SAELens folder; return it as loaded for steering.

    Parameters
    ----------
    source : rows of the block's output: a ``StoreSource`` or a ``LiveSource``.
    output : the folder to make.
    model : identity of the model that the rows are of.
    block : the decoder block whose output they are.
    training : hyper-parameters; all are recorded in the artifact.
    dictionary : where the decoder starts, with ``init="dictionary"``; it must be of the same model.
    device : "cpu", "cuda", "cuda:1" or "auto".
    run : folder of checkpoint and metrics; by default the output's name with ".run" behind it. The checkpoint
    is
        removed at the end, ``metrics.jsonl`` stays.
    resume : go on from the checkpoint in ``run``, if there is one. A training that is complete is returned.
    overwrite : replace an existing output, and discard an unfinished run unless ``resume``.
    tensorboard : also write the metrics for TensorBoard under ``run``.
    progress : show a progress bar on standard error.

    Raises
    ------
    ArtifactError
        If output, run folder or dictionary do not fit, or the disk is full.
    DacoError
        If a setting is out of range, the source has no rows, or the training diverges.

    Example
    -------
    >>> store = open_store("stores/smol")
    >>> sae = train_sae(StoreSource(store, 16), "saes/b16", model=store.model, block=16, dictionary=concepts)
    >>> sae.coder, sae.k
    ('topk', 32)
    """
    training = training or SaeTraining()
    output = Path(output)
    atoms = _atoms(dictionary, model, block) if training.init == "dictionary" else None
    settings = {
        "training": training.to_dict(),
        "source": source.describe(),
        "model": model.to_dict(),
        "block": block,
        "dictionary": None if dictionary is None or atoms is None else _fingerprint(dictionary),
    }
    folder = RunFolder(Path(run) if run is not None else output.with_name(output.name + ".run"))
    with folder.locked():
        if resume and _is_result_of(output, settings):
            folder.finish()
            return load_sae(output)
        check_target(output, overwrite=overwrite)
        if overwrite and not resume:
            folder.discard()
        saved = folder.begin(settings, resume=resume)
        target = torch_device(device)
        trainer = _Trainer(source, training, atoms, target, saved)
        folder.cut_metrics(trainer.step)
        silent = contextlib.nullcontext(lambda _: None)
        bar = show(f"training the SAE of block {block}", training.steps, unit="steps") if progress else silent
        with bar as advance, _scalars(folder.path, tensorboard, trainer.step) as scalars:
            advance(trainer.step)
            while trainer.step < training.steps:
                row = trainer.advance()
                if row is not None:
                    folder.log(row)
                    scalars(row)
                if trainer.step % training.checkpoint_every == 0 and trainer.step < training.steps:
                    folder.save(*trainer.checkpoint())
                advance(1)
        recipe = {
            "method": "dictionary-initialised SAE" if atoms is not None else "SAE",
            **{key: value for key, value in settings.items() if key not in ("model", "block")},
            **trainer.facts(atoms),
            "run_on": {
                "device": torch.cuda.get_device_name(target) if target.type == "cuda" else platform.machine(),
                "torch": torch.__version__,
            },
        }
        sae = save_sae(
            output,
            model=model,
            block=block,
            coder=_CODERS[training.sparsity],
            k=training.k if training.sparsity == "topk" else None,
            weights=trainer.sae.weights(),
            recipe=recipe,
            overwrite=overwrite,
        )
        folder.finish()
    return sae


class _Trainer:
    """Everything that changes while training, and how it is saved and restored."""

    def __init__(
        self,
        source: RowSource,
        training: SaeTraining,
        atoms: np.ndarray | None,
        device: torch.device,
        saved: Saved | None,
    ) -> None:
        self.training, self.device = training, device
        half = training.precision == "bf16" or (training.precision == "auto" and device.type == "cuda")
        self._cast: Callable[[], Any] = lambda: torch.autocast(device.type, torch.bfloat16, enabled=half)
        order = np.random.default_rng((training.seed, 2)).permutation(source.chunks)
        held = sorted(order[: min(training.holdout, source.chunks - 1)].tolist())
        kept = [chunk for chunk in range(source.chunks) if chunk not in held]
        self.feed = ShuffledRows(
            source, kept, batch=training.batch, buffer_rows=training.buffer_rows, seed=training.seed
        )
        self._held = held
        self._eval = self._sample(source, held or kept)
        directions = initial_directions(atoms, source.dim, training).to(device)
        # Rows are given their length again after each step, so weight decay alone does not turn a held one.
        hold = 0 if atoms is None or not training.hold else len(atoms)
        self.since = torch.zeros(len(directions), dtype=torch.long, device=device)
        if saved is None:
            first = self._sample(source, kept)
            centre = first.mean(dim=0)
            # Half precision may leave rows without spread, which no autoencoder can learn.
            length = float((first - centre).norm(dim=1).mean())
            if not 0 < length < np.inf:
                raise DacoError(
                    "all rows of the source are equal, or one is not finite; there is nothing to learn"
                )
            self.sae = Autoencoder(directions, centre, source.dim**0.5 / length, training, held=hold)
            self.encoder_scale = 1.0
            if training.rescale:
                with self._cast():
                    self.encoder_scale = self.sae.fit_encoder_scale(self.sae.inputs(first))
        else:
            centre = torch.zeros(source.dim, device=device)
            self.sae = Autoencoder(directions, centre, saved.state["scale"], training, held=hold)
            self.encoder_scale = saved.state["encoder_scale"]
        self._named = dict(self.sae.named_parameters())
        self._optimizer = torch.optim.AdamW(
            self._named.values(),
            lr=training.lr,
            betas=(training.beta1, training.beta2),
            weight_decay=training.weight_decay,
            foreach=False,
        )
        self.step = 0
        if saved is not None:
            self._restore(saved)

    def advance(self) -> dict[str, Any] | None:
        """Take one step; return its metrics where they are to be logged."""
        training = self.training
        x = self.sae.inputs(torch.tensor(self.feed.draw()).to(self.device))
        rate = training.learning_rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        dead = self.since >= training.dead_rows()
        with self._cast():
            losses = self.sae.losses(x, dead)
        total = float(losses.total.detach())
        if not np.isfinite(total):
            raise DacoError(
                f"the loss is {total} at step {self.step + 1}; lower the learning rate (now {training.lr}) "
                f"and "
                "begin anew"
            )
        self._optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        self.sae.project_gradient()
        if training.clip:
            torch.nn.utils.clip_grad_norm_(self._named.values(), training.clip)
        self._optimizer.step()
        self.sae.normalise()
        fired = (losses.codes > 0).any(dim=0)
        self.since = torch.where(fired, 0, self.since + len(x))
        self.step += 1
        last = self.step == training.steps
        evaluate = last or self.step % training.checkpoint_every == 0
        if not evaluate and self.step % training.log_every:
            return None
        row = {
            "step": self.step,
            "rows": self.step * training.batch,
            "learning_rate": rate,
            "loss": total,
            "explained_variance": 1 - float(losses.unexplained),
            "sparsity_loss": float(losses.sparsity),
            "auxiliary_loss": float(losses.auxiliary),
            "l0": float((losses.codes > 0).sum(dim=1).float().mean()),
            "dead_fraction": float((self.since >= training.dead_rows()).float().mean()),
        }
        return row | {f"eval_{key}": value for key, value in self.evaluate().items()} if evaluate else row

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return explained variance, codes a row and the share of latents that never fire, on held-out
        rows."""
        left, codes = 0.0, 0.0
        fired = torch.zeros_like(self.since, dtype=torch.bool)
        x = self.sae.inputs(self._eval)
        for part in x.split(self.training.batch):
            with self._cast():
                active = self.sae.codes(part)
                made = self.sae.decode(active)
            left += float((part - self.sae.decoder_bias - made).square().sum())
            codes += float((active > 0).sum())
            fired |= (active > 0).any(dim=0)
        spread = float((x - x.mean(dim=0)).square().sum())
        return {
            "explained_variance": 1 - left / spread if spread else 0.0,
            "l0": codes / len(x),
            "silent_fraction": 1 - float(fired.float().mean()),
        }

    def facts(self, atoms: np.ndarray | None) -> dict[str, Any]:
        """Return what the training found out, for the artifact."""
        facts: dict[str, Any] = {
            "rows_seen": self.step * self.training.batch,
            "input_scale": self.sae.scale,
            "encoder_scale": self.encoder_scale,
            "dead_after": self.training.dead_rows(),
            "dead_fraction": float((self.since >= self.training.dead_rows()).float().mean()),
            "evaluation": self.evaluate(),
            "evaluated_on": f"held-out chunks {self._held}" if self._held else "training rows",
        }
        if atoms is not None:
            rows = self.sae.decoder.detach().cpu().numpy()[: len(atoms)]
            own = (rows * atoms).sum(axis=1) / np.linalg.norm(atoms, axis=1)
            facts["cosine_to_own_atom"] = {"mean": float(own.mean()), "min": float(own.min())}
        return facts

    def checkpoint(self) -> tuple[Mapping[str, np.ndarray], Mapping[str, Any]]:
        """Return tensors and values from which ``_restore`` goes on."""
        tensors = {"since": self.since.cpu().numpy()}
        for name, parameter in self._named.items():
            moments = self._optimizer.state[parameter]
            tensors[name] = parameter.detach().cpu().numpy()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = moments[moment].cpu().numpy()
        state = {
            "step": self.step,
            "feed": list(self.feed.state),
            "scale": self.sae.scale,
            "encoder_scale": self.encoder_scale,
        }
        return tensors, state

    def _restore(self, saved: Saved) -> None:
        try:
            with torch.no_grad():
                self.since.copy_(_tensor(saved.tensors["since"]))
                for name, parameter in self._named.items():
                    parameter.copy_(_tensor(saved.tensors[name]))
                    self._optimizer.state[parameter] = {
                        "step": torch.tensor(float(saved.state["step"])),
                        **{
                            moment: _tensor(saved.tensors[f"{moment}.{name}"]).to(self.device)
                            for moment in ("exp_avg", "exp_avg_sq")
                        },
                    }
            self.step = int(saved.state["step"])
            self.feed.restore(saved.state["feed"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(
                f"the checkpoint does not fit this training ({error}); begin anew with --force"
            ) from error

    def _sample(self, source: RowSource, chunks: Sequence[int]) -> Tensor:
        """Return a fixed sample of rows, fp32 [n, d]; few chunks may give a row twice."""
        rows = self.training.eval_rows
        feed = ShuffledRows(source, chunks, batch=rows, buffer_rows=rows, seed=self.training.seed)
        return torch.tensor(feed.draw()).to(self.device)


def _tensor(array: np.ndarray) -> Tensor:
    # A copy in torch's own memory: how a mapped file is aligned must not change a bit of the arithmetic.
    return torch.tensor(np.array(array))


def _atoms(dictionary: ConceptDictionary | None, model: ModelIdentity, block: int) -> np.ndarray | None:
    if dictionary is None:
        return None
    difference = dictionary.model.difference(model)
    if difference:
        raise ArtifactError(
            f"dictionary {dictionary.path} does not fit the activations: {difference}; use one of that model"
        )
    return dictionary.atoms(block).astype(np.float32)


def _fingerprint(dictionary: ConceptDictionary) -> dict[str, Any]:
    return {
        "name": dictionary.path.name,
        "concepts": dictionary.size,
        "checksum": read_manifest(dictionary.path)["checksum"],
    }


def _is_result_of(output: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a folder is the SAE that a training with these settings wrote."""
    if not is_artifact(output):
        return False
    with contextlib.suppress(ArtifactError):
        manifest = read_manifest(output, "sae")
        recipe = manifest.get("recipe", {})
        found = {**{key: recipe.get(key) for key in settings}, "model": manifest.get("model")}
        found["block"] = manifest.get("block")
        return found == {**settings}
    return False


@contextlib.contextmanager
def _scalars(run: Path, wanted: bool, step: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    if not wanted:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise DacoError("TensorBoard is not installed; pip install 'daco-rt[tensorboard]'") from error
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=step or None)

    def write(row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])

    try:
        yield write
    finally:
        writer.close()
