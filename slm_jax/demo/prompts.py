"""Prompt templates of the demonstration tasks; the same words ask for speech and for text in its place.

`{speech}` is where the speech goes, `{question}` and `{phrases}` are fields of the manifests.
"""

ASR = (
    "Transcribe the speech: {speech}",
    "Write down what is said: {speech}",
    "Transcribe: {speech}",
    "What does the speaker say? {speech}",
)
# `{target_language}` is the English name of a language.
AST = (
    "Translate to {target_language}: {speech}",
    "Translate the speech into {target_language}: {speech}",
    "Say it in {target_language}: {speech}",
)
QUESTION = ("Answer the question: {question} {speech}", "{question} {speech}")
# `{phrases}` are names that may be said.
NAMES = (
    "Names: {phrases}. Transcribe: {speech}",
    "These names may occur: {phrases}. Write down what is said: {speech}",
)
