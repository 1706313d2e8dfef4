"""The folder of an exported run: weights as safetensors, the model as StableHLO, and what each is.

adapter.safetensors, .json   what was trained, LoRA too, and the foundation models that it fits on
merged.safetensors, .json    all weights by name; LoRA is merged into the kernels that it stands beside
model.stablehlo, .json       waveform and prompt to tokens, with `merged.safetensors` as its first argument
tokenizer.model              sentencepiece model of prompts and answers
"""

import dataclasses
import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export

from slm_jax.checkpoints.fingerprints import fingerprint
from slm_jax.checkpoints.foundation import FoundationRecord
from slm_jax.checkpoints.provenance import FORMAT_VERSION, Provenance
from slm_jax.checkpoints.safetensors import flatten, load_safetensors, save_safetensors
from slm_jax.errors import UserError, nearest
from slm_jax.export import parity, stablehlo
from slm_jax.export.weights import to_names
from slm_jax.models.lora import merged
from slm_jax.models.slm import SLM

FORMATS = ("adapter", "merged", "stablehlo")
# Its first number is changed to see whether the parity check would notice.
_PERTURBED = "adapter/out/kernel"


class Source(NamedTuple):
    """What is exported.

    Attributes:
      model: the SLM.
      variables: its collections, all of them on this host.
      step: of the checkpoint that its trained part comes from.
      foundations: part -> the foundation checkpoint that it was loaded from.
      provenance: of the model.
      tokenizer: bytes of the sentencepiece model, or None where the vocabulary is another.
      max_tokens, eos_id: of an answer.
    """

    model: SLM
    variables: Mapping[str, Any]
    step: int | None
    foundations: Mapping[str, FoundationRecord]
    provenance: Provenance
    tokenizer: bytes | None
    max_tokens: int
    eos_id: int


def check_request(directory: str | Path, formats: Sequence[str], platforms: Sequence[str]) -> None:
    """Refuses, before anything is loaded, what could not be written after it.

    Raises:
      UserError: the directory holds something; an unknown format or platform; or StableHLO that is not
        lowered for this machine, where it is checked.
    """
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--formats: {name!r}{nearest(name, FORMATS)}")
    stablehlo.check_platforms(platforms)
    if "stablehlo" in formats and _platform() not in platforms:
        raise UserError(
            f"--platforms {' '.join(platforms)}: this machine is {_platform()}, so the artifact could not be "
            "checked here; name it too"
        )
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"--to {directory}: it exists and is no empty folder; an export is never overwritten")


def export_run(
    directory: str | Path,
    source: Source,
    questions: Sequence[parity.Question],
    expected: Sequence[Sequence[int]],
    *,
    formats: Sequence[str] = FORMATS,
    platforms: Sequence[str] = stablehlo.PLATFORMS,
    report: Callable[[str], None] = print,
) -> Path:
    """Writes artifacts, checks each against the live model, and only then gives the folder its name.

    Args:
      directory: must not exist, or be empty.
      source: what is exported.
      questions: real speech with prompts, for the parity check; `stablehlo` needs them.
      expected: the live model's tokens for each.
      formats: out of `FORMATS`; `stablehlo` brings `merged`, its weights.
      platforms: that the StableHLO is lowered for.
      report: takes a line on each artifact.

    Raises:
      UserError: the directory holds something or cannot be written, an unknown format, an artifact that
        does not answer as the model does, or LoRA beside int8 kernels, into which it cannot be merged.
    """
    directory = Path(directory).absolute()
    check_request(directory, formats, platforms)
    partial = directory.with_name(f".{directory.name}.partial-{uuid.uuid4().hex[:8]}")
    writers = {"adapter": _write_adapter, "merged": _write_merged}
    whole = _with_merged_lora(source) if {"merged", "stablehlo"} & set(formats) else source
    if "stablehlo" in formats:
        whole = _with_plain_attention(whole, report)
    try:
        partial.mkdir(parents=True)
        if source.tokenizer is not None:
            (partial / "tokenizer.model").write_bytes(source.tokenizer)
        else:
            report("no tokenizer.model: the vocabulary is no sentencepiece model")
        for name in ("adapter", "merged"):
            if name in formats or (name == "merged" and "stablehlo" in formats):
                writers[name](partial, source if name == "adapter" else whole)
                report(f"{name}.safetensors: read back, bit for bit the model's")
        if "stablehlo" in formats:
            checked = _write_stablehlo(partial, whole, platforms, questions, expected)
            report(
                f"model.stablehlo: {checked['tokens']} tokens of {len(questions)} answers equal the model's, "
                f"together and alone; {checked['control']}; lowered for {', '.join(platforms)}"
            )
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise UserError(f"--to {directory}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _platform() -> str:
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def _with_merged_lora(source: Source) -> Source:
    """The same model with plain kernels."""
    config, variables = source.model.config, source.variables
    if config.lora is None:
        return source
    products = variables["params"]["llm"]
    llm = jax.device_get(merged(variables["frozen"]["llm"], products, config.lora))
    plain = {
        "params": {part: tree for part, tree in variables["params"].items() if part != "llm"},
        "frozen": {**variables["frozen"], "llm": llm},
    }
    return source._replace(model=SLM(dataclasses.replace(config, lora=None)), variables=plain)


def _with_plain_attention(source: Source, report: Callable[[str], None]) -> Source:
    """The same model in the form that one program has for all platforms and lengths."""
    config, others = source.model.config.on_platform(None)
    if others:
        found = " and ".join(f"{part} ({kernel})" for part, kernel in others.items())
        report(f"model.stablehlo: attention of {found} is lowered as plain, for any platform and length")
    return source._replace(model=SLM(config))


def _write_adapter(folder: Path, source: Source) -> None:
    config = source.model.config
    record = {
        "config": dataclasses.asdict(config.adapter),
        "reducer": _reducer(source.model),
        "trainable": list(config.trainable),
        "lora": config.lora and dataclasses.asdict(config.lora),
        "fits_on": {
            part: {"kind": found.kind, "config": found.config, "fingerprint": found.fingerprint}
            for part, found in source.foundations.items()
            if part not in config.trainable
        },
    }
    _write_weights(folder, "adapter", source.variables["params"], source, record)


def _write_merged(folder: Path, source: Source) -> None:
    record = {"config": _plain_config(source.model), "trainable": list(source.model.config.trainable)}
    _write_weights(folder, "merged", to_names(source.variables), source, record)


def _write_weights(
    folder: Path, name: str, weights: Mapping[str, Any], source: Source, record: Mapping[str, Any]
) -> None:
    path = folder / f"{name}.safetensors"
    found = fingerprint(weights)
    save_safetensors(path, weights, {"format": "slm_jax", "fingerprint": found})
    read, live = flatten(load_safetensors(path)), flatten(weights)
    for key, leaf in live.items():
        same = read[key].dtype == leaf.dtype and read[key].shape == leaf.shape
        if not same or read[key].tobytes() != np.asarray(leaf).tobytes():
            raise UserError(
                f"export: {name}.safetensors holds another {key} than the model; nothing is exported"
            )
    _write_record(folder / f"{name}.json", name, source, {"fingerprint": found, **record})


def _write_stablehlo(
    folder: Path,
    source: Source,
    platforms: Sequence[str],
    questions: Sequence[parity.Question],
    expected: Sequence[Sequence[int]],
) -> dict[str, Any]:
    model = source.model
    weights = flatten(load_safetensors(folder / "merged.safetensors"))
    blob = stablehlo.export_answer(
        model, weights, max_tokens=source.max_tokens, eos_id=source.eos_id, platforms=platforms
    )
    (folder / "model.stablehlo").write_bytes(blob)
    # Read back from the file, as a server would.
    exported = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    call = jax.jit(exported.call)
    frame = stablehlo.samples_per_frame(model)
    checked = {"platform": _platform()} | parity.check_parity(
        lambda using, *inputs: np.asarray(call(using, *inputs)),
        weights,
        questions,
        expected,
        eos_id=source.eos_id,
        multiple=frame,
        perturbed=_PERTURBED,
    )
    log_mel = model.config.speech_encoder.log_mel
    record = {
        "arguments": [
            {"name": "weights", "from": "merged.safetensors", "type": "dictionary of arrays by name"},
            {"name": "speech", "dtype": "int16", "shape": ["b", f"{frame}*s"], "rate": log_mel.sample_rate},
            {"name": "samples", "dtype": "int32", "shape": ["b"]},
            {
                "name": "prompt",
                "dtype": "int32",
                "shape": ["b", "n"],
                "speech_token": stablehlo.SPEECH,
                "padding": 0,
                "ends_with": source.eos_id,
            },
        ],
        "tokenizer": None if source.tokenizer is None else "tokenizer.model",
        "result": {"dtype": "int32", "shape": ["b", source.max_tokens], "eos": source.eos_id},
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "weights_fingerprint": json.loads((folder / "merged.json").read_text())["fingerprint"],
        "parity": checked,
    }
    _write_record(folder / "model.json", "stablehlo", source, record)
    return checked


def _write_record(path: Path, kind: str, source: Source, record: Mapping[str, Any]) -> None:
    whole = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "step": source.step,
        **record,
        "provenance": source.provenance.to_json(),
        "foundations": {part: found.provenance for part, found in source.foundations.items()},
    }
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain_config(model: SLM) -> dict[str, Any]:
    return {**dataclasses.asdict(model.config), "reducer": _reducer(model)}


def _reducer(model: SLM) -> dict[str, Any]:
    reducer = model.config.reducer
    return {"kind": type(reducer).__name__, **dataclasses.asdict(reducer)}
