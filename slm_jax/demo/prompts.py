"""Prompt templates of the demonstration tasks; the same words ask for speech and for text in its place.

`{speech}` is where the speech goes, other fields are those of the manifests.
"""

ASR = ("transcribe the speech: {speech}", "write down what is said: {speech}")
TRANSLATE_DE = ("translate to german: {speech}", "say it in german: {speech}")
TRANSLATE_ES = ("translate to spanish: {speech}", "say it in spanish: {speech}")
# Stands before the question, so that the question is not read as a part of what is said.
QUESTION = ("answer the question: {question}: {speech}", "{question}: {speech}")

ALL = (*ASR, *TRANSLATE_DE, *TRANSLATE_ES, *QUESTION)
