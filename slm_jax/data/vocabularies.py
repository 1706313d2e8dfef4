"""SeqIO vocabularies of published T5s, with the ids that the models were trained on.

| model | vocabulary | sentinels |
|---|---|---|
| T5, Flan-T5 | `spiece.model` of 32000 pieces | 100 after them; `<extra_id_0>` is the last, 32099 |
| mT5, mT0 | `spiece.model` of 250100 pieces | the last 100 of them |
| umT5 | `spiece.model` of 256000 pieces | 300 after them |
| ByT5 | bytes + 3 | none of their own: 258, 257, ... |

All were trained through SeqIO, so these ids are the right ones where transformers gives others. It does so

- for characters outside a vocabulary with byte fallback: `T5Tokenizer` of transformers 5 writes the unknown
  token where the model has bytes;
- for special tokens as text: transformers reads `</s>`, `<pad>` and `<unk>` as ids, SeqIO as letters, so that
  no text ends a sequence; and it finds `<extra_id_0>` anywhere, SeqIO at the start of a word alone;
- for ByT5, whose sentinels transformers adds as ids from 259 on, which the model has never seen.

A model has more rows than its vocabulary has ids, for an even split over devices.
"""

import json
from pathlib import Path
from typing import Any

import seqio

from slm_jax.data.host_tensorflow import tf
from slm_jax.errors import UserError, check_whole

PIECES_FILES = ("spiece.model", "sentencepiece.model", "tokenizer.model")
TOKENIZER_CONFIG = "tokenizer_config.json"
_SENTINELS = ("<extra_id_0>", "▁<extra_id_0>")


class ByteVocabulary(seqio.ByteVocabulary):
    """ByT5's vocabulary: the bytes of UTF-8 plus 3; 0 is padding, 1 the end (arXiv 2105.13626).

    SeqIO's prints as its place in memory, so that an index table of one process would be another's stranger.
    """

    def __repr__(self) -> str:
        return f"ByteVocabulary(extra_ids={self.extra_ids})"


def vocabulary_of(directory: str | Path, extra_ids: int | None = None) -> seqio.Vocabulary:
    """Returns the vocabulary of a model, from its published folder or a converted one.

    Args:
      directory: holds `spiece.model` (or `sentencepiece.model`, `tokenizer.model`), or the
        `tokenizer_config.json` of ByT5.
      extra_ids: sentinels after the pieces, if not what the folder or the model's rows say.

    Raises:
      UserError: there is no vocabulary, it is damaged, its padding is not 0, or the model has fewer rows.
    """
    directory = Path(directory)
    described = _json(directory / TOKENIZER_CONFIG)
    rows = _rows(directory)
    name = str(described.get("tokenizer_class") or "")
    file = next((directory / name for name in PIECES_FILES if (directory / name).is_file()), None)
    if file is None and name.startswith("ByT5"):
        vocabulary = ByteVocabulary(extra_ids or 0)
    elif file is None:
        raise UserError(
            f"{directory} has no vocabulary, expected {PIECES_FILES[0]} or the {TOKENIZER_CONFIG} of ByT5"
        )
    else:
        if extra_ids is None:
            extra_ids = described.get("extra_ids")
        vocabulary = sentencepiece_vocabulary(file, extra_ids, rows)
    if rows is not None and vocabulary.vocab_size > rows:
        raise UserError(
            f"the vocabulary of {directory} has {vocabulary.vocab_size} ids, but the model has {rows} rows, "
            "expected at least as many"
        )
    return vocabulary


def sentencepiece_vocabulary(
    file: str | Path, extra_ids: int | None = None, rows: int | None = None
) -> seqio.SentencePieceVocabulary:
    """Returns the vocabulary of a sentencepiece model, with the sentinels that T5 was trained with.

    Args:
      file: path of the model.
      extra_ids: sentinels after the pieces. None takes none where the pieces hold them, as mT5's do, and else
        300 where the model has room for them, as umT5 does, and 100 where not, as T5 does.
      rows: rows of the model's embedding table, if known.

    Raises:
      UserError: it cannot be read, or its padding is not 0.
    """
    if extra_ids is not None:
        check_whole(f"{file}: extra_ids", extra_ids, least=0)
    bare = seqio.SentencePieceVocabulary(str(file), extra_ids=0)
    try:
        tokenizer: Any = bare.tokenizer
        pieces, padding, end = bare.vocab_size, tokenizer.pad_id(), tokenizer.eos_id()
    except (RuntimeError, OSError, ValueError, TypeError, tf.errors.OpError) as error:
        line = (str(error).strip() or type(error).__name__).split("\n")[0][:300]
        raise UserError(f"{file} is no sentencepiece model: {line}") from error
    except Exception as error:
        # What google.protobuf raises derives from Exception alone.
        if type(error).__module__.startswith("google."):
            raise UserError(f"{file} is no sentencepiece model: {type(error).__name__}") from error
        raise
    if padding != 0 or end < 0:
        raise UserError(
            f"{file} has id {padding} for padding and {end} for the end of a sequence, "
            "expected 0 and one of its pieces, as T5 has"
        )
    if extra_ids is None:
        if any(tokenizer.PieceToId(sentinel) != tokenizer.unk_id() for sentinel in _SENTINELS):
            extra_ids = 0
        else:
            extra_ids = 300 if rows is not None and rows - pieces >= 300 else 100
    return seqio.SentencePieceVocabulary(str(file), extra_ids=extra_ids)


def _rows(directory: Path) -> int | None:
    """Rows of the embedding table, where the folder says so: `foundation.json` or `config.json`."""
    config = _json(directory / "foundation.json").get("config") or _json(directory / "config.json")
    rows = config.get("vocab_size") if isinstance(config, dict) else None
    return rows if isinstance(rows, int) else None


def _json(path: Path) -> dict[str, Any]:
    """What a file holds, nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0][:300]}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return found
