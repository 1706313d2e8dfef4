"""The two sentencepiece vocabularies of the demonstration: of its T5, and of its encoder's CTC head.

Both normalise as `sentences.normalize` does (lower case, no punctuation), inside the model file, so that a
prompt typed in any case and with any punctuation gives the same tokens.
"""

import dataclasses
import importlib
import io
import itertools
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from slm_jax.demo import prompts, sentences
from slm_jax.errors import UserError

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(16))
TEXT_PIECES = 1024
CTC_PIECES = 128

# Pieces of one letter that every word of the three languages can be spelled with.
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MORE_LETTERS = "äöüßáéíóúñ"
# Latin letters with all their accents, and the punctuation of Unicode.
_NORMALIZED = (range(0x21, 0x250), range(0x2000, 0x2070))
# Letters whose accent may be a code point of its own: vowels with acute or diaeresis, n with tilde.
_COMBINED = [*itertools.product("aeiouAEIOU", "\u0301\u0308"), *itertools.product("nN", "\u0303")]


@dataclasses.dataclass(frozen=True)
class Vocabularies:
    """Paths of the sentencepiece models.

    Attributes:
      text: of the T5, multilingual, with sentinels `<extra_id_0>` ...
      ctc: of the encoder's CTC head, English; the pad piece 0 is the blank.
    """

    text: Path
    ctc: Path


def vocabularies(corpus_dir: str | os.PathLike) -> Vocabularies:
    """Returns where the vocabularies of a corpus lie."""
    return _in(Path(corpus_dir) / "vocabularies")


def shipped() -> Vocabularies:
    """Returns the vocabularies that come with the package, which its foundation models were trained with."""
    return _in(Path(__file__).parent / "models")


def place_vocabularies(corpus_dir: str | os.PathLike) -> Vocabularies:
    """Copies the shipped vocabularies into a corpus; the same bytes for every corpus."""
    paths = vocabularies(corpus_dir)
    for source, target in zip(dataclasses.astuple(shipped()), dataclasses.astuple(paths), strict=True):
        _write(target, source.read_bytes())
    return paths


def build_vocabularies(folder: str | os.PathLike, said: Sequence[sentences.Sentence]) -> Vocabularies:
    """Trains both vocabularies on sentences; the same ones give the same bytes.

    The shipped ones were trained on the text of the default corpus, `corpus.draw("train", 24_000, 0)`.
    """
    paths = _in(Path(folder))
    english = [sentence.text for sentence in said]
    translations = [text for sentence in said for text in sentence.translations.values()]
    # Prompts are few and asked in every example: repeated, they become whole pieces.
    asked = [*_prompt_texts()] * max(1, len(said) // 20)
    multilingual = [*english, *translations, *asked]
    _write(paths.text, train(multilingual, TEXT_PIECES, SENTINELS, _LETTERS + _MORE_LETTERS))
    _write(paths.ctc, train(english, CTC_PIECES, (), _LETTERS))
    return paths


def _in(folder: Path) -> Vocabularies:
    return Vocabularies(text=folder / "text.model", ctc=folder / "ctc.model")


def train(texts: Iterable[str], pieces: int, symbols: Iterable[str] = (), letters: str = _LETTERS) -> bytes:
    """Returns a sentencepiece model (BPE; pad 0, eos 1, unk 2) trained with fixed settings.

    Args:
      texts: what it is trained on.
      pieces: size of the vocabulary, special pieces and symbols included.
      symbols: pieces that are never split.
      letters: pieces of one letter that it has in any case.

    Raises:
      UserError: the texts are too few for so many pieces.
    """
    # Imported late, so that a corpus can be read without them.
    import sentencepiece

    messages = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "normalization.tsv"
        rules.write_text(normalization_rules(), encoding="utf-8")
        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=iter([*(sentences.normalize(text) for text in texts), " ".join(letters)]),
                model_writer=model,
                model_type="bpe",
                vocab_size=pieces,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=-1,
                user_defined_symbols=list(symbols),
                character_coverage=1.0,
                normalization_rule_tsv=str(rules),
                shuffle_input_sentence=False,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(f"vocabulary: {pieces} pieces cannot be trained on this text: {error}") from error
    proto = messages.ModelProto.FromString(model.getvalue())
    # The path of the rules is no part of the model, and differs from run to run; the compiled rules are.
    proto.normalizer_spec.ClearField("normalization_rule_tsv")
    return proto.SerializeToString(deterministic=True)


def normalization_rules() -> str:
    """Returns `sentences.normalize` as sentencepiece's rules: code points in hex, a tab, what they become."""
    characters = [chr(code) for code in itertools.chain(*_NORMALIZED)]
    characters += ["".join(pair) for pair in _COMBINED]
    lines = []
    for character in characters:
        # A letter on each side keeps the space that a punctuation mark becomes.
        normal = sentences.normalize(f"x{character}x")[1:-1]
        if normal != character:
            lines.append(f"{_hex(character)}\t{_hex(normal)}\n")
    return "".join(lines)


def _hex(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)


def _prompt_texts() -> list[str]:
    """Every prompt with every question and language, without the speech."""
    texts = [sentences.NO_ANSWER, *(template.replace("{speech}", "") for template in prompts.ASR)]
    for template, field, values in (
        (prompts.AST, "{target_language}", ("German", "Spanish")),
        (prompts.QUESTION, "{question}", sentences.QUESTIONS.values()),
        (prompts.NAMES, "{phrases}", ("",)),
    ):
        texts += [part.replace("{speech}", "").replace(field, value) for part in template for value in values]
    return texts


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)
