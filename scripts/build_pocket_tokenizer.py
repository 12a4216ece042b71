"""Train the tokenizer of the pocket checkpoints on our own concept texts and write it into the package.

    python scripts/build_pocket_tokenizer.py [--output FILE]

The result is part of pocket-internvl's recipe: after a change, run scripts/build_concepts.py for it too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from daco_rt.concepts import ORDINARY_TEXTS, everyday_concepts, stimuli_for
from daco_rt.models.assembly import IMAGE_SPECIALS

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "python/daco_rt/models/assets/pocket/tokenizer.json"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_SPECIALS.values())
VOCABULARY = 2000


def texts() -> Iterator[str]:
    """Yield the training texts: every stimulus, each name after a space on its own, and ordinary texts."""
    for entry in everyday_concepts():
        # Names are said in many frames, so that each becomes one token early.
        yield from (f"I see a {entry.name}." for _ in range(20))
        yield from (stimulus.text for stimulus in stimuli_for(entry))
    yield from ORDINARY_TEXTS
    yield from ("Describe the image.", "What do you see in this picture?", "There is a", "I see a") * 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=TARGET, help="file to write (default: in the package)")
    arguments = parser.parse_args()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.output), pretty=False)
    print(f"wrote {arguments.output} with {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
