"""The training step of a frozen LLM beside the same model in PyTorch, on this CPU, in one run.

    python benchmarks/step_vs_torch.py                              # both sizes
    python benchmarks/step_vs_torch.py --size tiny --steps 1

`quickstart` is the quickstart's step: the shipped tiny T5's shape, on frames that were encoded before. `base`
is a T5 of base size with 250,112 words on w2v-BERT's Conformer of 8 layers x 512, 10 s of speech, batch 8.
The rival is transformers' T5 and Wav2Vec2-BERT with the same weights by this project's conversion, and the
adapter in torch; frozen parts have requires_grad=False, the encoder runs under no_grad. Its features come
ready made, ours are computed in the step. Both have float32, AdamW of the same numbers, a bound on the
gradient's norm, and as many threads.

First the loss and every gradient of the adapter are compared, then the losses of the first steps; then
steps are timed in turns; of a turn of many the first does not count, for PyTorch's threads still wait
busily in it. The ratio is the median of those of neighbouring steps. Peak memory is the high-water mark of
a process that does nothing else, compilation included. What each side's library makes of one product alone,
in a size that the model has, stands beside it: MKL takes wide instructions on Intel's CPUs only, XLA on
all.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

RATE = 16_000
TOLERANCE = 1e-4
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the shape of its batch.

    Attributes:
      llm, encoder, adapter: fields of their configurations; the encoder is a w2v-BERT.
      frames: positions of speech of a row that come encoded; None where `seconds` of speech are encoded.
      reducer: encoder frames side by side in a position.
      turn: steps in a row of one side.
    """

    llm: dict[str, Any]
    encoder: dict[str, Any]
    adapter: dict[str, Any]
    rows: int
    prompt: int
    targets: int
    reducer: int
    seconds: float = 0.0
    frames: int | None = None
    turn: int = 10


_TINY_LLM = {"vocab_size": 1024, "emb_dim": 128, "num_heads": 4, "head_dim": 32, "mlp_dim": 256}
_TINY_ADAPTER = {"layers": 2, "dim": 128, "heads": 4, "head_dim": 32, "mlp_dim": 512}
SIZES = {
    "tiny": Size(
        _TINY_LLM | {"encoder_layers": 1, "decoder_layers": 1},
        {"layers": 1, "dim": 32, "heads": 2, "ffn_dim": 64},
        _TINY_ADAPTER | {"layers": 1},
        rows=2, prompt=4, targets=6, reducer=8, seconds=1.0,
    ),
    "quickstart": Size(
        _TINY_LLM | {"encoder_layers": 3, "decoder_layers": 3},
        {"layers": 1, "dim": 128, "heads": 4, "ffn_dim": 512},
        _TINY_ADAPTER,
        rows=16, prompt=16, targets=24, reducer=4, frames=22,
    ),
    "base": Size(
        {"vocab_size": 250112, "emb_dim": 768, "num_heads": 12, "mlp_dim": 2048,
         "encoder_layers": 12, "decoder_layers": 12},
        {"layers": 8, "dim": 512, "heads": 8, "ffn_dim": 2048},
        {"layers": 2, "dim": 512, "heads": 8, "head_dim": 64, "mlp_dim": 2048},
        rows=8, prompt=16, targets=64, reducer=8, seconds=10.0, turn=1,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["quickstart", "base"])
    parser.add_argument(
        "--steps", type=int, help="of each side that are timed, in whole turns; 400, or 10 of base"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the rival (needs a C++ compiler)"
    )
    parser.add_argument("--unrolled", action="store_true", help="our layers as a sequence, not as a loop")
    parser.add_argument("--alone", choices=["slm_jax", "torch"], help="run one side and say its peak memory")
    args = parser.parse_args()
    if args.alone:
        step = {"slm_jax": Ours, "torch": Theirs}[args.alone](SIZES[args.size[0]], args, None).step
        for _ in range(args.steps or 3):
            step()
        print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    results = [compared(name, args) for name in args.size]
    packages = ("jax", "torch", "transformers")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    print(f"\n{versions}; {os.cpu_count()} CPUs, {platform.processor() or platform.machine()}\n")
    names = ("ms", "peak MB", "product GFLOP/s")
    columns = [f"{side} {name}" for name in names for side in ("slm_jax", "torch")]
    print(f"| size | torch / slm_jax | {' | '.join(columns)} | load |")
    print("|---" * (len(columns) + 3) + "|")
    for found in results:
        numbers = " | ".join(f"{found[column.replace(' ', '_')]:.1f}" for column in columns)
        print(f"| {found['size']} | {found['ratio']:.2f} | {numbers} | {found['load']:.1f} |")
    print(json.dumps(results))


def compared(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Checks that both compute the same, times them in turns, and measures their memory apart."""
    peaks = {side: _peak_mb(name, side, args) for side in ("slm_jax", "torch")}
    ours = Ours(SIZES[name], args, np.random.default_rng(0))
    theirs = Theirs(SIZES[name], args, ours)
    differences = _differences(ours, theirs)
    assert max(differences.values()) < TOLERANCE, f"they do not compute the same: {differences}"
    sides = {"slm_jax": ours.step, "torch": theirs.step}
    for number in range(3):
        losses = [step() for step in sides.values()]
        differences[f"loss of step {number}"] = abs(losses[0] - losses[1]) / losses[1]
    turn, seconds = SIZES[name].turn, {side: [] for side in sides}
    for _ in range(-(-(args.steps or (10 if name == "base" else 400)) // turn)):
        for side, step in sides.items():
            for number in range(turn):
                began = time.perf_counter()
                step()
                if number or turn == 1:
                    seconds[side].append(time.perf_counter() - began)
    assert max(differences.values()) < TOLERANCE, f"they do not learn the same: {differences}"
    products = _products(SIZES[name])
    ratios = [b / a for a, b in zip(seconds["slm_jax"], seconds["torch"], strict=True)]
    return {
        "size": name,
        "slm_jax_ms": 1e3 * statistics.median(seconds["slm_jax"]),
        "torch_ms": 1e3 * statistics.median(seconds["torch"]),
        "ratio": statistics.median(ratios),
        "slm_jax_min_ms": 1e3 * min(seconds["slm_jax"]),
        "torch_min_ms": 1e3 * min(seconds["torch"]),
        **{f"{side}_peak_MB": peak for side, peak in peaks.items()},
        **{f"{side}_product_GFLOP/s": rate for side, rate in products.items()},
        "torch_compiled": args.compile,
        "largest_difference": max(differences.values()),
        "compile_seconds": ours.compile_seconds,
        "load": os.getloadavg()[0],
    }


def _peak_mb(size: str, side: str, args: argparse.Namespace) -> float:
    flags = ["--compile"] * args.compile + ["--unrolled"] * args.unrolled
    command = [
        sys.executable,
        __file__,
        "--size",
        size,
        "--alone",
        side,
        "--threads",
        str(args.threads),
        *flags,
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_mb"]


def _products(size: Size) -> dict[str, float]:
    """Returns GFLOP/s of the decoder's widest map, alone and hot: targets x emb_dim x mlp_dim, float32."""
    import jax
    import torch

    shape = size.rows * size.targets, size.llm["emb_dim"], size.llm["mlp_dim"]
    rng = np.random.default_rng(2)
    x, kernel = rng.standard_normal(shape[:2], np.float32), rng.standard_normal(shape[1:], np.float32)
    sides = {
        "slm_jax": functools.partial(
            jax.jit(lambda x, kernel: x @ kernel), *map(jax.device_put, (x, kernel))
        ),
        "torch": functools.partial(
            torch.nn.functional.linear, torch.tensor(x), torch.tensor(kernel.T.copy())
        ),
    }
    rates = {}
    for side, product in sides.items():
        seconds = []
        for _ in range(30):
            began = time.perf_counter()
            for _ in range(10):
                found = product()
            np.asarray(found)
            seconds.append((time.perf_counter() - began) / 10)
        rates[side] = 2e-9 * float(np.prod(shape)) / min(seconds)
    return rates


def _differences(ours: "Ours", theirs: "Theirs") -> dict[str, float]:
    """Returns relative differences, of the norm, of the loss and of each gradient of the adapter."""
    loss, gradients = ours.loss_and_gradients()
    their_loss, their_gradients = theirs.loss_and_gradients()
    found = {"loss": abs(loss - their_loss) / abs(their_loss)}
    assert gradients.keys() == their_gradients.keys(), gradients.keys() ^ their_gradients.keys()
    for path, expected in their_gradients.items():
        difference = gradients[path] - expected.reshape(gradients[path].shape)
        found[path] = float(np.linalg.norm(difference) / np.linalg.norm(expected))
    return found


class Ours:
    """The step of every run; with `rng` weights are drawn there, without they are made in place."""

    def __init__(self, size: Size, args: argparse.Namespace, rng: np.random.Generator | None):
        import jax
        from paper_size import random_like

        from slm_jax.checkpoints.safetensors import flatten, unflatten
        from slm_jax.models.slm import SLM
        from slm_jax.partitioning.mesh import make_mesh
        from slm_jax.partitioning.sharding import partitioned
        from slm_jax.training.initialisation import make_state
        from slm_jax.training.objectives.slm import SLMObjective
        from slm_jax.training.optimizers import AdamWConfig, ScheduleConfig
        from slm_jax.training.program import make_train_program

        self.size, self.config = size, config_of(size, unrolled=args.unrolled)
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self.objective = SLMObjective(SLM(self.config))
        self.batch: Any = batch_of(
            size, self.objective.samples_per_position, self.objective.model.reduced_dim
        )
        shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), self.batch)
        adamw = AdamWConfig(ScheduleConfig(LEARNING_RATE, warmup_steps=0))
        program = make_train_program(self.objective, adamw, shapes, seed=0, mesh=self.mesh)

        def made(shapes: Any) -> Any:
            if rng is None:
                return random_like(shapes, np.dtype(np.float32))
            drawn = {name: _drawn(rng, name, leaf.shape) for name, leaf in flatten(shapes).items()}
            return jax.device_put(unflatten(drawn), jax.tree.map(lambda leaf: leaf.sharding, shapes))

        params, self.frozen = made(program.shapes.state.params), made(program.shapes.frozen)
        self.state = make_state(params, program.optimizer, program.shapes.state)
        self.batch = jax.device_put(self.batch, self.mesh.devices.flat[0])
        self.flat = flatten
        with partitioned(self.mesh):
            began = time.perf_counter()
            self._compiled = program.jitted.lower(self.state, self.frozen, self.batch).compile()
            self.compile_seconds = time.perf_counter() - began

    def step(self) -> float:
        """One update; returns the loss."""
        self.state, metrics = self._compiled(self.state, self.frozen, self.batch)
        return float(metrics["loss"])

    def loss_and_gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the mean loss, and gradients of the adapter by path."""
        import jax

        from slm_jax.partitioning.sharding import partitioned

        def loss(params: Any, frozen: Any, batch: Any) -> jax.Array:
            total, weight, _ = self.objective.loss(params, frozen, batch, jax.random.key(0))
            return total / weight

        with partitioned(self.mesh):
            found, gradients = jax.jit(jax.value_and_grad(loss))(self.state.params, self.frozen, self.batch)
        return float(found), {
            name: np.asarray(leaf) for name, leaf in self.flat(gradients["adapter"]).items()
        }

    def features(self) -> np.ndarray:
        """The features of the batch's speech, [B, T, M]."""
        from slm_jax.models.conformer import ConformerEncoder

        encoder = ConformerEncoder(self.config.speech_encoder)
        return np.asarray(encoder.features(self.batch["speech"], self.batch["speech_segments"])[0])[:, 0]


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    if name.endswith(("scale", "bias")):
        return (np.float32(name.endswith("scale")) + 0.1 * values).astype(np.float32)
    # A table has a row of some features for each token; of all else the dims before the last are contracted.
    inputs = (
        shape[-1]
        if name.endswith("embedding")
        else int(np.prod(shape[-3:-1] if len(shape) > 3 else shape[-2:-1]))
    )
    return values * np.float32(inputs**-0.5)


def config_of(size: Size, *, unrolled: bool) -> Any:
    """Returns the SLM of a size."""
    from slm_jax.models import conformer, t5
    from slm_jax.models.adapters import AdapterConfig
    from slm_jax.models.reducers import StackReducer
    from slm_jax.models.slm import SLMConfig

    encoder = conformer.preset(
        "w2v_bert", **size.encoder, scan_unroll=size.encoder["layers"] if unrolled else 1
    )
    llm = t5.T5Config(**size.llm, scan=not unrolled)
    return SLMConfig(encoder, llm, AdapterConfig(**size.adapter), StackReducer(size.reducer))


def batch_of(size: Size, samples_per_position: int, reduced_dim: int) -> dict[str, np.ndarray]:
    """Returns a batch of full rows, one example each: prompt, then speech."""
    rng = np.random.default_rng(1)
    rows, prompt, targets = size.rows, size.prompt, size.targets
    positions = size.frames or -(-int(size.seconds * RATE) // samples_per_position)
    samples = positions * samples_per_position
    layout = np.concatenate([positions + np.arange(prompt), np.arange(positions)]).astype(np.int32)
    words = size.llm["vocab_size"]
    if size.frames:
        speech = {"speech_frames": rng.normal(0, 1, (rows, 1, positions, reduced_dim)).astype(np.float32)}
    else:
        speech = {"speech": rng.normal(0, 3000, (rows, 1, samples)).astype(np.int16)}
    return speech | {
        "speech_segments": np.tile(np.array([1, 0, samples], np.int32), (rows, 1, 1, 1)),
        "inputs": rng.integers(2, words, (rows, prompt), dtype=np.int32),
        "layout": np.tile(layout, (rows, 1)),
        "layout_segment_ids": np.ones((rows, len(layout)), np.int32),
        "targets": rng.integers(2, words, (rows, targets), dtype=np.int32),
        "target_segment_ids": np.ones((rows, targets), np.int32),
        "target_positions": np.tile(np.arange(targets, dtype=np.int32), (rows, 1)),
        "loss_weights": np.ones((rows, targets), np.float32),
    }


class Theirs:
    """The rival; with `ours` it has its weights, without they are its own."""

    def __init__(self, size: Size, args: argparse.Namespace, ours: Ours | None):
        import torch
        import transformers

        from slm_jax.checkpoints.families import t5, w2v_bert
        from slm_jax.training.optimizers import AdamWConfig

        torch.set_num_threads(args.threads)
        transformers.logging.set_verbosity_error()
        self.size, config = size, config_of(size, unrolled=False)
        llm = t5.FAMILY.hf_config(config.llm)
        made = transformers.AutoConfig.for_model(llm.pop("model_type"), **llm)
        self.llm = transformers.AutoModelForSeq2SeqLM.from_config(
            made, attn_implementation=attention_of(made)
        ).eval()
        # transformers 5 ties them whatever the configuration says, until a checkpoint brings both.
        self.llm.lm_head.weight = torch.nn.Parameter(self.llm.lm_head.weight.detach().clone())
        self.adapter = torch_adapter(
            config.adapter, config.speech_encoder.dim * size.reducer, config.llm.emb_dim
        )
        step = size.reducer * config.speech_encoder.samples_per_frame
        self.batch = {
            k: torch.as_tensor(v)
            for k, v in batch_of(size, step, config.speech_encoder.dim * size.reducer).items()
        }
        self.encoder = None
        if size.frames is None:
            bert = w2v_bert.FAMILY.hf_config(config.speech_encoder)
            self.encoder = transformers.AutoModel.from_config(
                transformers.AutoConfig.for_model(bert.pop("model_type"), **bert)
            ).eval()
            features = np.zeros(
                (
                    size.rows,
                    self.batch["speech"].shape[-1] // 320,
                    self.encoder.config.feature_projection_input_dim,
                )
            )
            self.valid = (self.batch["speech"].shape[-1] - 240) // 320
            if ours is not None:
                features = ours.features()
            self.features = torch.tensor(np.asarray(features, np.float32)[:, : self.valid])
        if ours is not None:
            _load(self.llm, t5.FAMILY, config.llm, ours.flat(ours.frozen["llm"]))
            if self.encoder is not None:
                speech_encoder = ours.flat(ours.frozen["speech_encoder"])
                _load(self.encoder, w2v_bert.FAMILY, config.speech_encoder, speech_encoder)
            self.adapter.load(ours.flat(ours.state.params["adapter"]))
        for frozen in filter(None, (self.llm, self.encoder)):
            frozen.requires_grad_(False)
        adamw = AdamWConfig()
        self.clip_norm = adamw.clip_norm
        self.optimizer = torch.optim.AdamW(
            self.adapter.parameters(),
            lr=LEARNING_RATE,
            betas=(adamw.b1, adamw.b2),
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            fused=True,
        )
        self._loss = torch.compile(self.loss) if args.compile else self.loss

    def loss(self) -> Any:
        """The mean loss of the batch, with a gradient of the adapter."""
        import torch

        size, batch = self.size, self.batch
        if self.encoder is None:
            frames = batch["speech_frames"][:, 0]
        else:
            with torch.no_grad():
                frames = self.encoder(self.features).last_hidden_state
                # Whole positions, as the layout counts them; what lacks is silence.
                lacking = batch["speech"].shape[-1] // 320 - frames.shape[1]
                frames = torch.nn.functional.pad(frames, (0, 0, 0, lacking))
                frames = frames.reshape(size.rows, -1, frames.shape[-1] * size.reducer)
        embed = self.llm.get_input_embeddings()
        embeddings = torch.cat([embed(batch["inputs"]), self.adapter(frames)], dim=1)
        before = torch.nn.functional.pad(batch["targets"][:, :-1], (1, 0))
        logits = self.llm(inputs_embeds=embeddings, decoder_input_ids=before, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten().long())

    def step(self) -> float:
        """One update; returns the loss."""
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.item()

    def loss_and_gradients(self) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the mean loss, and gradients of the adapter by path."""
        loss = self.loss()
        loss.backward()
        return loss.item(), self.adapter.gradients()


def attention_of(config: Any) -> str:
    """Returns `sdpa` where this version of transformers has it for this model, else `eager`."""
    import transformers

    model = transformers.AutoModelForSeq2SeqLM._model_mapping[type(config)]
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def _load(model: Any, family: Any, config: Any, values: dict[str, Any]) -> None:
    import torch

    tensors = {}
    for piece in family.hf_pieces(config):
        one = np.asarray(values[piece.parameter])
        one = one if piece.layer is None else one[piece.layer]
        tensors[piece.source] = torch.from_numpy(np.array(piece.layout.to_theirs(one)))
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=False)
    # The embedding table has a name in either stack, too.
    missing = [name for name in missing if not name.endswith(("embed_tokens.weight", "masked_spec_embed"))]
    assert not missing and not unexpected, (missing, unexpected)


def torch_adapter(config: Any, in_dim: int, out_dim: int) -> Any:
    """Returns the adapter of models/adapters.py as a module of torch, one segment a row."""
    import torch
    from torch import nn
    from torch.nn import functional

    heads, head_dim = config.heads, config.head_dim

    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            inner = heads * head_dim
            sizes = {"in": (in_dim, config.dim), "out": (config.dim, out_dim)}
            for layer in range(config.layers):
                for name in ("query", "key", "value"):
                    sizes[f"{layer}/attention/{name}"] = (config.dim, inner)
                sizes[f"{layer}/attention/out"] = (inner, config.dim)
                sizes[f"{layer}/mlp/wi"] = (config.dim, config.mlp_dim)
                sizes[f"{layer}/mlp/wo"] = (config.mlp_dim, config.dim)
            self.maps = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
            norms = {"final_norm": config.dim, "output_norm": out_dim}
            for layer in range(config.layers):
                norms |= dict.fromkeys(
                    (f"{layer}/pre_attention_layer_norm", f"{layer}/pre_mlp_layer_norm"), config.dim
                )
            self.norms = nn.ModuleDict({name: nn.RMSNorm(dim, eps=1e-6) for name, dim in norms.items()})
            self.table = nn.Embedding(config.relative_buckets, heads)

        def forward(self, frames: Any) -> Any:
            x = self.maps["in"](frames)
            rows, length, _ = x.shape
            bias = self.table(self.buckets(length)).permute(2, 0, 1)[None]
            for layer in range(config.layers):
                y = self.norms[f"{layer}/pre_attention_layer_norm"](x)
                query, key, value = (
                    self.maps[f"{layer}/attention/{name}"](y)
                    .view(rows, length, heads, head_dim)
                    .transpose(1, 2)
                    for name in ("query", "key", "value")
                )
                mixed = functional.scaled_dot_product_attention(
                    query, key, value, bias.expand(rows, -1, -1, -1)
                )
                x = x + self.maps[f"{layer}/attention/out"](mixed.transpose(1, 2).flatten(2))
                y = self.norms[f"{layer}/pre_mlp_layer_norm"](x)
                y = functional.gelu(self.maps[f"{layer}/mlp/wi"](y), approximate="tanh")
                x = x + self.maps[f"{layer}/mlp/wo"](y)
            return self.norms["output_norm"](self.maps["out"](self.norms["final_norm"](x)))

        @functools.cache  # noqa: B019
        def buckets(self, length: int) -> Any:
            from transformers.models.t5.modeling_t5 import T5Attention

            places = torch.arange(length)
            return T5Attention._relative_position_bucket(
                places[None] - places[:, None], True, config.relative_buckets, config.relative_max_distance
            )

        def pieces(self) -> dict[tuple[str, int | None], Any]:
            """Our path of each parameter, and its layer there."""
            found = {}
            for name, module in {**self.maps, **self.norms}.items():
                layer, _, rest = name.partition("/")
                path, number = (f"layers/{rest}", int(layer)) if rest else (name, None)
                leaf = "kernel" if isinstance(module, nn.Linear) else "scale"
                found[f"{path}/{leaf}", number] = module.weight
            found["relpos_bias/rel_embedding", None] = self.table.weight
            return found

        def load(self, values: dict[str, Any]) -> None:
            with torch.no_grad():
                for (path, layer), weight in self.pieces().items():
                    one = np.asarray(values[path]) if layer is None else np.asarray(values[path])[layer]
                    one = one if one.ndim == 1 else one.reshape(weight.shape[::-1]).T
                    weight.copy_(torch.tensor(np.ascontiguousarray(one)))

        def gradients(self) -> dict[str, Any]:
            found: dict[str, list[Any]] = {}
            for (path, _), weight in self.pieces().items():
                found.setdefault(path, []).append(weight.grad.numpy().T)
            return {path: np.stack(layers) for path, layers in found.items()}

    return Adapter()


if __name__ == "__main__":
    sys.exit(main())
