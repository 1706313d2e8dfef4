"""The sentencepiece vocabularies: deterministic, normalising, without unknowns on the corpus."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from slm_jax.demo import corpus, prompts, sentences, vocabulary
from slm_jax.errors import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> vocabulary.Vocabularies:
    return vocabulary.build_vocabularies(tmp_path_factory.mktemp("vocabularies"), corpus.draw("train", 96, 0))


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromFile(str(path))
    return pieces


@pytest.fixture(scope="module")
def text_pieces(built) -> sentencepiece.SentencePieceProcessor:
    return _load(built.text)


@pytest.fixture(scope="module")
def ctc_pieces(built) -> sentencepiece.SentencePieceProcessor:
    return _load(built.ctc)


def test_specials_and_sizes(text_pieces, ctc_pieces):
    for pieces, size in ((text_pieces, vocabulary.TEXT_PIECES), (ctc_pieces, vocabulary.CTC_PIECES)):
        assert pieces.vocab_size() == size and size % 8 == 0
        assert [pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()] == [0, 1, 2, -1]
    for sentinel in vocabulary.SENTINELS:
        assert text_pieces.encode(f"a {sentinel} b").count(text_pieces.piece_to_id(sentinel)) == 1


def test_the_same_sentences_give_the_same_bytes(tmp_path: Path, built):
    again = vocabulary.build_vocabularies(tmp_path, corpus.draw("train", 96, 0))
    assert again.text.read_bytes() == built.text.read_bytes()
    assert again.ctc.read_bytes() == built.ctc.read_bytes()


def test_a_corpus_gets_the_shipped_ones(tmp_path: Path):
    placed = vocabulary.place_vocabularies(tmp_path)
    assert placed == vocabulary.vocabularies(tmp_path)
    assert placed.text.read_bytes() == vocabulary.shipped().text.read_bytes()
    assert placed.ctc.read_bytes() == vocabulary.shipped().ctc.read_bytes()


def test_every_sentence_comes_back_without_unknowns(text_pieces, ctc_pieces, rng: np.random.Generator):
    # Sentences of any seed, so also ones that the vocabulary was not trained on.
    for split in sentences.SPLITS:
        for sentence in sentences.draw(split, 500, int(rng.integers(2**31))):
            for text in (sentence.text, *sentence.translations.values()):
                tokens = text_pieces.encode(text)
                assert vocabulary.UNK_ID not in tokens
                assert text_pieces.decode(tokens) == text
            tokens = ctc_pieces.encode(sentence.text)
            assert not {vocabulary.UNK_ID, vocabulary.PAD_ID} & set(tokens)
            assert ctc_pieces.decode(tokens) == sentence.text


def test_prompts_and_questions_have_no_unknowns(text_pieces):
    for template in (*prompts.ASR, *prompts.AST, *prompts.QUESTION, *prompts.NAMES):
        for question in sentences.QUESTIONS.values():
            for language in ("German", "Spanish"):
                text = template.format(speech="", question=question, target_language=language, phrases="")
                tokens = text_pieces.encode(text)
                assert vocabulary.UNK_ID not in tokens
                # Prompts are asked all the time: hardly a word is spelled.
                assert len(tokens) <= 2 * len(sentences.normalize(text).split())


@pytest.mark.parametrize(
    ("typed", "normal"),
    [
        ("Which City is named?", "which city is named"),
        ("«MÜNCHEN», Mu\u0308nchen; AN\u0303O… Straße!", "münchen münchen año straße"),
        ("don't   stop", "dont stop"),
        ("half-past seven.", "half past seven"),
    ],
)
def test_typed_text_is_normalised_in_the_model(text_pieces, typed: str, normal: str):
    assert text_pieces.decode(text_pieces.encode(typed)) == normal == sentences.normalize(typed)
    assert text_pieces.encode(typed) == text_pieces.encode(normal)


def test_names_never_seen_can_be_spelled(text_pieces, ctc_pieces, rng: np.random.Generator):
    for _ in range(20):
        letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(3, 10)))
        text = "".join(letters)
        for pieces in (text_pieces, ctc_pieces):
            assert pieces.decode(pieces.encode(text)) == text


def test_seqio_reads_the_models(built):
    import seqio

    read = seqio.SentencePieceVocabulary(str(built.text), extra_ids=0)
    assert (read.vocab_size, read.pad_id, read.eos_id, read.unk_id) == (vocabulary.TEXT_PIECES, 0, 1, 2)
    text = "Transcribe the speech: the Train!"
    assert read.encode_tf(text).numpy().tolist() == list(read.encode(text))


def test_too_little_text_is_refused():
    with pytest.raises(UserError, match="cannot be trained"):
        vocabulary.train(["a few words"], 512)


def test_records_of_the_corpus_fit_the_frames_of_the_encoder(tiny_corpus: Path, ctc_pieces):
    for line in (tiny_corpus / "train.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        tokens = ctc_pieces.encode(record["text"])
        repeats = sum(one == other for one, other in itertools.pairwise(tokens))
        # A frame is 40 ms; CTC needs one for each piece and a blank between equal ones.
        assert len(tokens) + repeats <= record["duration"] / 0.04
