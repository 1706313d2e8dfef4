"""Ids of SeqIO's vocabularies against transformers' tokenizers and sentencepiece itself, on awkward text."""

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_jax.data.vocabularies import ByteVocabulary, sentencepiece_vocabulary, vocabulary_of
from slm_jax.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Das ist ein schöner Tag, nicht wahr?",
    "Привет, мир! Как дела сегодня?",
    "你好世界,今天天气很好。",
    "日本語のテキストです。",
    "مرحبا بالعالم كيف حالك",
    "हिन्दी में पाठ",
    "naïve café déjà vu 123 456 7890",
] * 20
TEXTS = [
    "The quick brown fox",
    "Привет, Tag! 你好 日本語 مرحبا हिन्दी",
    "  leading", "trailing  ", "a  b\t\tc\n\nd\r\ne", "", " ", "\t\n",
    "emoji 😀👍🏽👩‍👩‍👧 x", "\u200bzero\u200dwidth\ufeff", "control \x01\x07\x1f x", "\u3000wide\u00a0space",
    "Ünïcödé ﬁ ① ｆｕｌｌ", "ਪੰਜਾਬੀ unknown ᚠᛇᚻ", "x\u0301 combining", "▁x ▁ y", "a\u2028b", "\ufffd",
    "<extra_id_0> start", "a <extra_id_1> b", "a  <extra_id_1>  b",
]  # fmt: skip
# Where transformers reads special tokens and SeqIO letters, or finds sentinels inside a word.
READ_AS_LETTERS = ["</s> x", "<pad> a <unk>", "a<extra_id_1>b"]


def train(path: Path, byte_fallback: bool, **options: Any) -> Path:
    """Trains a sentencepiece model as T5's was: padding 0, end 1, unknown 2."""
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(path.with_suffix("")),
        vocab_size=480 if byte_fallback else 220,
        hard_vocab_limit=False,
        character_coverage=0.99,
        byte_fallback=byte_fallback,
        minloglevel=2,
        **({"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options),
    )
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["t5", "byte_fallback"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    train(folder / "spiece.model", request.param)
    return folder


def loaded(folder: Path, kind: Any = transformers.T5Tokenizer) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_pretrained(str(folder))


def processor_of(folder: Path) -> Any:
    processor: Any = sentencepiece.SentencePieceProcessor()
    processor.Load(str(folder / "spiece.model"))
    return processor


def without_bytes(ids: list[int], processor: Any) -> list[int]:
    """Ids with each run of byte pieces as one unknown token."""
    kept: list[int] = []
    for token in ids:
        if token < processor.vocab_size() and processor.is_byte(token):
            if not kept or kept[-1] != processor.unk_id():
                kept.append(processor.unk_id())
        else:
            kept.append(token)
    return kept


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(folder, text):
    processor, vocabulary = processor_of(folder), vocabulary_of(folder)
    found = list(vocabulary.encode(text))
    theirs = loaded(folder)(text, add_special_tokens=False).input_ids
    # Its T5Tokenizer knows no byte fallback: bytes of the model are its unknown token.
    assert without_bytes(found, processor) == theirs
    if "<extra_id" not in text:
        assert found == processor.encode(text)
    assert vocabulary.encode_tf(text).numpy().tolist() == found
    eos = loaded(folder)(text).input_ids[-1]
    assert eos == vocabulary.eos_id == 1


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_any_text_has_the_ids_of_sentencepiece(folder, text):
    text = text.replace("<", "")
    assert list(vocabulary_of(folder).encode(text)) == processor_of(folder).encode(text)


@pytest.mark.parametrize("text", READ_AS_LETTERS)
def test_text_never_ends_a_sequence(folder, text):
    found = list(vocabulary_of(folder).encode(text))
    assert found == processor_of(folder).encode(text)
    assert not {0, 1} & set(found)
    assert found != loaded(folder)(text, add_special_tokens=False).input_ids


def test_sentinels_count_down_from_the_last_id(folder):
    vocabulary, theirs = vocabulary_of(folder), loaded(folder)
    assert vocabulary.vocab_size == len(theirs)
    for number in (0, 1, 57, 99):
        name = f"<extra_id_{number}>"
        expected = theirs.convert_tokens_to_ids(name)
        assert list(vocabulary.encode(name)) == [expected] == [vocabulary.vocab_size - 1 - number]


def test_answers_are_decoded_as_sentencepiece_does(folder):
    vocabulary, processor = vocabulary_of(folder), processor_of(folder)
    for text in TEXTS[:2]:
        ids = list(vocabulary.encode(text))
        assert vocabulary.decode([*ids, 1, 5, 6]) == processor.decode(ids)


def test_sentinels_inside_the_pieces_are_not_added(tmp_path):
    names = [f"▁<extra_id_{number}>" for number in reversed(range(100))]
    train(tmp_path / "spiece.model", True, user_defined_symbols=names)
    (tmp_path / "config.json").write_text('{"vocab_size": 700}', encoding="utf-8")
    vocabulary = vocabulary_of(tmp_path)
    assert vocabulary.extra_ids == 0
    assert vocabulary.vocab_size == processor_of(tmp_path).vocab_size()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 100),
        ({"config.json": {"vocab_size": 350}}, 100),
        ({"config.json": {"vocab_size": 640}}, 300),
        ({"foundation.json": {"config": {"vocab_size": 640}}}, 300),
        ({"tokenizer_config.json": {"extra_ids": 7}, "config.json": {"vocab_size": 640}}, 7),
    ],
)
def test_how_many_sentinels(tmp_path, files, expected):
    train(tmp_path / "spiece.model", False)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert vocabulary_of(tmp_path).extra_ids == expected
    assert vocabulary_of(tmp_path, extra_ids=3).extra_ids == 3


def test_byte_vocabularies_describe_themselves():
    assert repr(ByteVocabulary()) == repr(ByteVocabulary()) != repr(ByteVocabulary(3))
    assert ByteVocabulary() == pickle.loads(pickle.dumps(ByteVocabulary())) == seqio.ByteVocabulary()


@pytest.mark.parametrize("text", [*TEXTS[:-3], "\x00\x7f", "🏳️‍🌈"])
def test_byt5(tmp_path, text):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}')
    (tmp_path / "config.json").write_text('{"vocab_size": 384}', encoding="utf-8")
    vocabulary = vocabulary_of(tmp_path)
    theirs: Any = transformers.ByT5Tokenizer()
    ids = list(vocabulary.encode(text))
    assert ids == theirs(text, add_special_tokens=False).input_ids == [byte + 3 for byte in text.encode()]
    assert vocabulary.decode([*ids, 1]) == text
    # The sentinels that the model was trained with are its last bytes.
    assert isinstance(vocabulary, seqio.ByteVocabulary) and vocabulary.vocab_size - 1 == 258


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no vocabulary, expected spiece\.model or"):
        vocabulary_of(tmp_path)
    file = tmp_path / "spiece.model"
    for damage in (b"", b"no model", b"\x0a\xff\xff"):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=r"spiece\.model is no sentencepiece model"):
            vocabulary_of(tmp_path)
    # SeqIO keeps what it once loaded from a path.
    other = train(tmp_path / "other.model", False, pad_id=-1, unk_id=0, bos_id=1, eos_id=2)
    with pytest.raises(UserError, match="has id -1 for padding and 2 for the end"):
        sentencepiece_vocabulary(other)
    fitting = tmp_path / "fitting"
    fitting.mkdir()
    train(fitting / "spiece.model", False)
    with pytest.raises(UserError, match="extra_ids is -1"):
        sentencepiece_vocabulary(fitting / "spiece.model", -1)
    (fitting / "config.json").write_text('{"vocab_size": 128}', encoding="utf-8")
    with pytest.raises(UserError, match="but the model has 128 rows"):
        vocabulary_of(fitting)
    (tmp_path / "config.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        vocabulary_of(tmp_path)


def test_a_converted_folder_gives_the_same(tmp_path, folder):
    shutil.copyfile(folder / "spiece.model", tmp_path / "spiece.model")
    record = {"kind": "t5", "config": {"vocab_size": 640}}
    (tmp_path / "foundation.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 100}', encoding="utf-8")
    assert list(vocabulary_of(tmp_path).encode(TEXTS[1])) == list(vocabulary_of(folder).encode(TEXTS[1]))
