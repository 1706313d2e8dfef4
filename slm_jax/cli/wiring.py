"""Joins the rooms for one run: tasks, batches, mesh, foundation models, decoding, evaluation."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from slm_jax.checkpoints.foundation import architecture, load_foundation, read_foundation
from slm_jax.checkpoints.manager import RunCheckpoints
from slm_jax.checkpoints.provenance import Provenance, make_provenance
from slm_jax.cli.frames import SpeechFrames
from slm_jax.cli.main import default_cache_dir
from slm_jax.cli.run import Run
from slm_jax.cli.scoring import Evaluation
from slm_jax.cli.starting_point import StartingPoint
from slm_jax.errors import UserError, check_whole, nearest
from slm_jax.evaluation.predictor import Prediction, Predictor
from slm_jax.models.slm import SLM
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.rules import check_rules
from slm_jax.partitioning.sharding import batch_sharding, batch_shards, plan_text
from slm_jax.training.initialisation import RunShapes, make_variables, optimizer_of, run_shapes
from slm_jax.training.loop import Evaluate
from slm_jax.training.objectives.base import Part
from slm_jax.training.planning import held
from slm_jax.training.state import TrainState

if TYPE_CHECKING:
    from slm_jax.data.references import Reference


class Wiring:
    """The parts of a run, each made when it is first asked for.

    Args:
      run: what gin built.
    """

    def __init__(self, run: Run):
        self.run = run
        self._predictors: dict[tuple[int, int, int | None], Predictor] = {}
        self._on_batch: Callable[[], None] = lambda: None

    @classmethod
    def to_answer(cls, run: Run) -> "Wiring":
        """Joins the rooms of a run that answers here, maybe on another platform than it was trained on."""
        platform = jax.default_backend()
        if isinstance(run.objective.model, SLM):
            config, others = run.objective.model.config.on_platform(platform)
            if others:
                objective = copy.copy(run.objective)
                objective.model = SLM(config)
                run = dataclasses.replace(run, objective=objective)
                found = " and ".join(f"{part} is {kernel!r}" for part, kernel in others.items())
                say(f"attention_kernel of {found}, which this {platform} lacks: 'plain' is taken")
        return cls(run)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The devices of the run; raises UserError where its axes do not fit them."""
        sizes = self.run.mesh
        mesh = make_mesh(sizes.data, sizes.fsdp, sizes.tensor, slices=sizes.slices)
        check_rules(sizes.rules, mesh.shape)
        return mesh

    # ---- data

    @functools.cached_property
    def mixture(self) -> Any:
        """The SeqIO task or mixture that the run trains on, registered."""
        return self.task_or_mixture(self.run.data.mixture_or_task)

    def task_or_mixture(self, name: str) -> Any:
        """Returns a SeqIO task or mixture by name.

        Raises:
          UserError: nothing of that name is registered.
        """
        # First, so that TensorFlow never sees an accelerator.
        from slm_jax.data import host_tensorflow  # noqa: F401, I001
        import seqio

        _register(self.run)
        known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
        if name not in known:
            raise UserError(f"no task or mixture {name!r} is registered{nearest(name, known)}")
        return seqio.get_mixture_or_task(name)

    def vocabulary(self, feature: str) -> Any:
        """Returns the SeqIO vocabulary of the feature `inputs` or `targets`."""
        return self.mixture.output_features[feature].vocabulary

    def shape(self, rows: int, feature_lengths: Mapping[str, int] | None = None, packed: bool = False) -> Any:
        """Returns the `BatchShape` with that many rows.

        Args:
          rows: of a batch.
          feature_lengths: of a row, by default those of training.
          packed: whether rows hold what `DataConfig.utterances` says; otherwise one example.
        """
        from slm_jax.data.batch import BatchShape

        shape = BatchShape.from_feature_lengths(
            feature_lengths or self.run.data.feature_lengths,
            rows=rows,
            samples_per_position=self.run.objective.samples_per_position,
            **(self._room() if packed else {}),
        )
        most = getattr(self.run.objective.model, "longest_samples", None)
        if most is not None and shape.samples > most:
            raise UserError(
                f"TASK_FEATURE_LENGTHS['speech'] makes rows of {shape.samples} samples (whole positions of "
                f"{shape.samples_per_position}), expected at most {most}: the speech encoder takes no more"
            )
        return shape

    def _room(self) -> dict[str, int]:
        """Returns the slots of a row and the utterances of a slot that training has."""
        data, objective = self.run.data, self.run.objective
        if not data.pack:
            return {}
        if not objective.takes_packed_rows:
            raise UserError(
                f"DataConfig.pack is True, and {type(objective).__name__} takes one example a row; "
                "expected pack = False"
            )
        if not objective.packs and not data.has_frames:
            return {"slots": data.utterances or 1}
        seconds = data.feature_lengths.get("speech", 0) // 16_000
        return {"segments": data.utterances or max(1, seconds)}

    def train_shape(self) -> Any:
        """Returns the `BatchShape` of training, with frames where those take the place of speech."""
        data = self.run.data
        shape = self.shape(data.batch_size, packed=True)
        if data.has_frames and shape.has_speech:
            return dataclasses.replace(shape, frame_dim=self.frames.dim)
        return shape

    def compiled_batches(self) -> list[dict[str, Any]]:
        """Returns the shapes of every batch that training compiles a step for, the largest last."""
        from slm_jax.data.packing import bucket_shapes

        return [
            {name: jax.ShapeDtypeStruct(size, dtype) for name, (size, dtype) in shape.arrays().items()}
            for shape in bucket_shapes(self.train_shape(), tuple(sorted(self.run.data.buckets)))
        ]

    def plan(self) -> Any:
        """Returns the order of rows of the training split.

        Raises:
          UserError: the mixture, a length or an example source is not right.
        """
        from slm_jax.data.plan import Packing, plan_mixture
        from slm_jax.data.stages import StagedPlan, seed_of_stage

        data = self.run.data
        shape = self.shape(data.batch_size, packed=True)
        packing = Packing(data.pack, data.block, tuple(sorted(data.buckets)))
        plans = {}
        for step, mixture in {0: data.mixture_or_task, **data.stages}.items():
            self.task_or_mixture(mixture)
            plans[step] = plan_mixture(
                mixture,
                data.split,
                data.feature_lengths,
                shape,
                cache_dir=self.run.path(data.cache_dir or default_cache_dir()),
                seed=data.seed,
                order_seed=seed_of_stage(data.seed, step),
                packing=packing,
                shuffle_window=data.shuffle_shards,
                augmented=data.augment is not None,
                perturbation=data.augment and data.augment.speed,
            )
        return StagedPlan(plans) if data.stages else plans[0]

    def train_batches(self) -> Any:
        """Returns the `BatchSource` of the training split.

        Raises:
          UserError: the mixture, a length, the batch size or an example source is not right.
        """
        from slm_jax.data.encoding import EncodedBatches
        from slm_jax.data.iterator import TrainBatches

        data = self.run.data
        plan = self.plan()
        shape = self.train_shape()
        with_frames = shape.frame_dim > 0
        tables: Any = plan.tables
        for table in tables:
            if table.report.rejected and jax.process_index() == 0:
                say(f"{table.task}, split {table.split}: {table.report}")
        sharding = batch_sharding(self.mesh, self.run.mesh.rules)
        options: dict[str, Any] = {"threads": data.reader_threads, "max_bad_share": data.max_bad_share}
        if self._augmenter is not None:
            options["load"] = self._augmenter
        if with_frames and data.encode_once:
            frames = functools.partial(self.frames.encode_once, tables)
            return EncodedBatches(plan, shape, sharding, frames=frames, **options)
        if with_frames:
            options["load"] = self.frames.read(tables)
        return TrainBatches(plan, shape, sharding, **options)

    @functools.cached_property
    def _augmenter(self) -> Any:
        """What reads and augments utterances; None where nothing is augmented."""
        from slm_jax.data.augmentation import Augmenter

        augment = self.run.data.augment
        return Augmenter(augment, self.run.path(".")) if augment else None

    @functools.cached_property
    def frames(self) -> SpeechFrames:
        """The frames of the frozen speech encoder, where they are computed before training."""
        return SpeechFrames(self)

    # ---- evaluation

    def predict(
        self,
        variables: Mapping[str, Any],
        *,
        rows: int,
        max_tokens: int | None = None,
        transcript_tokens: int | None = None,
    ) -> "Callable[[Sequence[Reference]], list[Prediction]]":
        """Returns a function that answers references greedily; what is compiled is used again.

        Args:
          variables: `params` and `frozen`.
          rows: references decoded at once, rounded up to what the mesh divides.
          max_tokens: most tokens of an answer; by default the evaluation's, else what targets may have.
          transcript_tokens: the references have no speech, but up to so many tokens in its place.
        """
        if not isinstance(self.run.objective.model, SLM):
            name = type(self.run.objective.model).__name__
            raise UserError(
                f"a run of {name} pretrains one part and answers nothing; expected a run of an SLM"
            )
        shards = batch_shards(self.mesh, self.run.mesh.rules)
        rows = -(-rows // shards) * shards
        if max_tokens is None:
            max_tokens = self.run.answer_tokens
        check_whole("max_tokens", max_tokens)
        key = rows, max_tokens, transcript_tokens
        if key not in self._predictors:
            self._predictors[key] = self._predictor(variables, *key)
        return functools.partial(self._predictors[key], variables=variables)

    def _predictor(
        self, variables: Mapping[str, Any], rows: int, max_tokens: int, transcript_tokens: int | None
    ) -> Predictor:
        from slm_jax.data.audio_files import load_utterance
        from slm_jax.evaluation.batches import ReferenceBatches

        batches = ReferenceBatches(
            self._answer_shape(rows, transcript_tokens),
            lambda reference: load_utterance(reference).samples,
            self.mesh,
            self.run.mesh.rules,
        )
        return Predictor(
            self.run.objective.model,
            variables,
            batches,
            mesh=self.mesh,
            rules=self.run.mesh.rules,
            max_tokens=max_tokens,
            eos_id=self.vocabulary("targets").eos_id,
            on_batch=lambda: self._on_batch(),
        )

    def _answer_shape(self, rows: int, transcript_tokens: int | None = None) -> Any:
        lengths = dict(self.run.answer_lengths)
        if transcript_tokens is not None:
            lengths |= {"speech": 0, "inputs": lengths["inputs"] + transcript_tokens}
            lengths.pop("layout", None)
        return self.shape(rows, lengths)

    def evaluation(
        self, mixture_or_task: str | None = None, split: str | None = None, num_examples: int | None = None
    ) -> Evaluation:
        """Returns what scores variables on the examples of a split.

        Args:
          mixture_or_task: by default the evaluation's, else what is trained on.
          split: by default the evaluation's.
          num_examples: of each task; all by default.
        """
        evaluated = self.run.evaluated()
        return Evaluation(
            self,
            mixture_or_task or evaluated.mixture_or_task or self.run.data.mixture_or_task,
            split or evaluated.split,
            num_examples,
        )

    def speech_room(self) -> int:
        """Returns the most samples of an utterance that the model answers about.

        Raises:
          UserError: the run has no speech.
        """
        room = self.run.answer_lengths.get("speech")
        if not room:
            raise UserError(
                f"{self.run.model_dir} is a run without speech: its TASK_FEATURE_LENGTHS lacks 'speech'"
            )
        return room

    def saved_step(self, step: int | None = None) -> int | None:
        """Returns the step of a checkpoint of the run: the newest by default, None where there is none."""
        with contextlib.closing(self._checkpoints()) as checkpoints:
            return checkpoints.latest_step() if step is None else step

    def example_references(self, count: int) -> "list[Reference]":
        """Returns references of the evaluation that have speech and fit, from all tasks, of different audio.

        Args:
          count: how many, or fewer where there are fewer.
        """
        shape = self._answer_shape(1)
        queues = [iter(found) for found in self.evaluation(num_examples=count).references().values()]
        found: dict[str, Reference] = {}
        while queues and len(found) < count:
            for queue in list(queues):
                # Tasks often ask about the same audio, each in its own words: each gets a file of its own.
                fitting = (r for r in queue if r.audio and r.audio not in found and _fits(r, shape))
                if reference := next(fitting, None):
                    found[str(reference.audio)] = reference
                else:
                    queues.remove(queue)
        return list(found.values())[:count]

    def evaluation_in_training(self, on_batch: Callable[[], None] = lambda: None) -> Evaluate:
        """Returns the loop's evaluation: scores of the state at hand, named `task/metric`.

        Args:
          on_batch: called before every batch that is decoded.
        """
        self._on_batch = on_batch
        score = self.evaluation(num_examples=self.run.evaluated().num_examples)

        def evaluate(step: int, state: TrainState, frozen: Any) -> dict[str, float]:
            if self.run.data.has_frames and "speech_encoder" not in frozen:
                # Training has no use for it.
                frozen = {**frozen, **self._speech_encoder}
            return {
                f"{task}/{metric}": value
                for task, result in score({"params": state.params, "frozen": frozen}).items()
                for metric, value in result.metrics.items()
            }

        return evaluate

    # ---- model

    @functools.cached_property
    def shapes(self) -> RunShapes:
        """Shapes with shardings of all variables."""
        run, batch = self.run, self._batch_shapes()
        optimizer = optimizer_of(run.optimizer, run.objective, batch, run.loop.spikes, run.carries_optimizer)
        return run_shapes(run.objective, optimizer, batch, self.mesh, run.mesh.rules)

    def plan_text(self) -> str:
        """The sharding plan of the variables."""
        return plan_text(self.shapes.boxed, self.mesh, self.run.mesh.rules)

    def load_foundations(self, shapes: dict[str, Any]) -> dict[str, Any]:
        """Loads the foundation models of those parts that `shapes` holds (see `training.loop.train`).

        What `Run.init_from` has trained takes the place of theirs.

        Raises:
          UserError: a part that the model lacks, or a checkpoint that does not fit it.
        """
        begun: dict[str, Any] = {}
        if self.run.init_from is not None and "params" in shapes:
            # First: what does not fit is told before foundation models are read.
            begun = {"params": self._start.load(say if jax.process_index() == 0 else lambda _: None)}
        loaded: dict[str, Any] = {}
        for part, name in self.run.foundations.items():
            place = self._part(part, "foundations")
            for collection in ("frozen", "params"):
                # What trains beside a frozen part, such as LoRA, is no part of the foundation.
                beside = collection == "params" and subtree(self.shapes.frozen, place.path) is not None
                abstract = subtree(shapes.get(collection), place.path)
                if abstract is None or beside:
                    continue
                params = load_foundation(
                    self.run.path(name),
                    place.kind,
                    abstract,
                    dtype=self.run.frozen_dtype if collection == "frozen" else None,
                    config=architecture(place.config),
                    defaults=architecture(type(place.config)()),
                )
                if collection == "params":
                    # What trains does so in its own dtype, whatever the one on disk.
                    params = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), params, abstract)
                loaded = _merged(loaded, _at_path((collection, *place.path), params))
        return _merged(loaded, begun)

    def load_slots(self, opt_state: Any) -> Mapping[str, jax.Array]:
        """Loads the optimizer state that goes on with `Run.init_from` (see `training.loop.train`)."""
        return self._start.load_slots(opt_state)

    @functools.cached_property
    def _start(self) -> StartingPoint:
        return StartingPoint(self.run, self._model_fingerprints(), self.shapes)

    def provenance(self, config: str) -> Provenance:
        """Returns the record of this run for its checkpoints."""
        fingerprints = self._model_fingerprints() | _template_fingerprints(self.mixture)
        if self.run.data.frames:
            fingerprints["frames"] = self.frames.fingerprint
        if self._augmenter is not None:
            fingerprints["augmentation"] = self._augmenter.fingerprint
        if self.run.init_from is not None:
            fingerprints["init_from"] = StartingPoint.fingerprint(self.run)
        return make_provenance(config, fingerprints)

    def _model_fingerprints(self) -> dict[str, str]:
        fingerprints = {
            f"foundation/{part}": read_foundation(self.run.path(name)).fingerprint
            for part, name in self.run.foundations.items()
        }
        for feature in ("inputs", "targets"):
            model = getattr(self.vocabulary(feature), "sp_model", None)
            if model is not None:
                fingerprints[f"tokenizer/{feature}"] = hashlib.sha256(model).hexdigest()
        return fingerprints

    @functools.cached_property
    def _speech_encoder(self) -> Any:
        """The frozen speech encoder alone, for evaluation in a training that does without."""
        return self.variables_of("speech_encoder")["frozen"]

    def trained_variables(self, step: int | None = None) -> dict[str, Any]:
        """Returns `params` from a checkpoint of the run and `frozen` from the foundations.

        Args:
          step: of the checkpoint; the newest by default.

        Raises:
          UserError: nothing is saved, or what is saved does not fit.
        """
        with contextlib.closing(self._checkpoints()) as checkpoints:
            # What the run was trained on may be gone: noise, frames.
            provenance = make_provenance("", self._model_fingerprints())
            params = checkpoints.restore_params(self.shapes.state.params, provenance, step)
        return {"params": params, "frozen": self._frozen()}

    def _checkpoints(self) -> RunCheckpoints:
        loop = self.run.loop
        return RunCheckpoints(
            self.run.path(self.run.model_dir) / "checkpoints",
            loop.keep_last, loop.keep_best, loop.best_metric, loop.best_mode, read_only=True,
        )  # fmt: skip

    def fresh_variables(self) -> dict[str, Any]:
        """Returns the variables before the first step."""
        return self._variables({"params": self.shapes.state.params, "frozen": self.shapes.frozen})

    def _frozen(self) -> Any:
        return self._variables({"frozen": self.shapes.frozen})["frozen"]

    def variables_of(self, part: str) -> dict[str, Any]:
        """Returns the frozen variables of one part, as collections hold them."""
        return self._variables({"frozen": {part: self.shapes.frozen[part]}})

    def _variables(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Loads or initialises the variables of these shapes, by collection."""
        run = self.run
        return make_variables(
            run.objective,
            self._batch_shapes(),
            wanted,
            self.load_foundations,
            run.loop.seed,
            self.mesh,
            run.mesh.rules,
        )

    def _batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = self.shape(self.run.data.batch_size, packed=True).arrays()
        return {name: jax.ShapeDtypeStruct(size, dtype) for name, (size, dtype) in arrays.items()}

    def _part(self, part: str, field: str) -> Part:
        parts = self.run.objective.parts
        if part not in parts:
            raise UserError(f"run.Run.{field} has part {part!r}, which the model lacks{nearest(part, parts)}")
        return parts[part]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fits(reference: "Reference", shape: Any) -> bool:
    """Whether a row holds what is asked; the answer's length is not the model's business."""
    return shape.misfit(dataclasses.replace(reference, targets=reference.targets[:0])) is None


def _register(run: Run) -> None:
    # Registrations make the paths that they are given absolute.
    with contextlib.chdir(run.working_dir or "."):
        for register in run.data.register:
            register()


def _template_fingerprints(mixture_or_task: Any) -> dict[str, str]:
    """Fingerprints of the prompt templates of those tasks that have any, named `templates/<task>`."""
    from slm_jax.data.preprocessors import render_prompts, templates_fingerprint
    from slm_jax.data.prompt_languages import choose_prompts

    found: dict[str, list[str]] = {}
    for task in getattr(mixture_or_task, "tasks", [mixture_or_task]):
        for step in task.preprocessors:
            if isinstance(step, functools.partial) and step.func is render_prompts:
                found.setdefault(task.name, []).extend([*step.keywords["templates"], step.keywords["target"]])
            elif isinstance(step, functools.partial) and step.func is choose_prompts:
                by_language = step.keywords["templates"].items()
                found.setdefault(task.name, []).extend(
                    f"{language}: {template}" for language, some in by_language for template in some
                )
    return {f"templates/{task}": templates_fingerprint(templates) for task, templates in found.items()}


def subtree(tree: Any, path: tuple[str, ...]) -> Any:
    """Returns what lies at a path of nested dictionaries, or None where nothing does, or an empty tree."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree if jax.tree.leaves(tree) else None


def frozen_as_loaded(run: Run, frozen: Any) -> Any:
    """Returns shapes of frozen variables in the dtypes in which `Wiring.load_foundations` holds them.

    What comes from no foundation model is initialised, and stays as it is.
    """
    for part in run.foundations:
        path = run.objective.parts[part].path
        if (folder := subtree(frozen, path)) is not None:
            frozen = _merged(frozen, _at_path(path, held(folder, run.frozen_dtype)))
    return frozen


def _at_path(path: tuple[str, ...], leaf: Any) -> Any:
    for name in reversed(path):
        leaf = {name: leaf}
    return leaf


def _merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Both trees; of a leaf that both have, that of `b`."""
    both = {**a, **b}
    for name in a.keys() & b.keys():
        if isinstance(a[name], Mapping):
            both[name] = _merged(a[name], b[name])
    return both
