"""The foundation models that come with the package: a speech encoder and a T5 trained on the demo's corpus.

`make foundation` trains them again; each folder's `foundation.json` says by what it was made.
"""

from pathlib import Path

PARTS = ("speech_encoder", "llm")


def directory() -> str:
    """Returns the folder that holds one folder for each of `PARTS`, and the two vocabularies."""
    return str(Path(__file__).parent / "models")


def speech_encoder() -> str:
    """Returns the folder of the encoder: `SPEECH_ENCODER_CHECKPOINT = @foundation.speech_encoder()`."""
    return str(Path(directory()) / "speech_encoder")


def llm() -> str:
    """Returns the folder of the T5, for `LLM_CHECKPOINT = @foundation.llm()`."""
    return str(Path(directory()) / "llm")
