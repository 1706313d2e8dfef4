"""What a run is: the one object that gin builds and every command reads."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from slm_jax import storage
from slm_jax.checkpoints.foundation import FORMATS
from slm_jax.cli import gin_config
from slm_jax.data.augmentation import AugmentationConfig
from slm_jax.data.batch import FEATURES
from slm_jax.errors import UserError, check_whole, is_number, nearest
from slm_jax.partitioning.rules import DEFAULT_RULES, LogicalRules, check_rule_types
from slm_jax.training.loop import LoopConfig
from slm_jax.training.objectives.base import Objective
from slm_jax.training.optimizers import OptimizerConfig

# The resolved configuration in a run's directory: what commands read that take `--run`.
CONFIG_FILE = "config.gin"
STEPS = ("newest", "best")
OPTIMIZER_STATES = ("carried", "fresh")
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads.

    Attributes:
      mixture_or_task: registered SeqIO name.
      feature_lengths: size of a row: `speech` in samples at 16 kHz, `inputs` and `targets` in tokens.
      batch_size: rows of the global batch.
      cache_dir: where index tables are kept; by default the user's cache folder.
      register: functions that register tasks and mixtures, called first, in this order.
      split: trained on.
      seed: of the order of examples.
      max_bad_share: the run stops when more than this share of its examples cannot be loaded.
      reader_threads: threads that read audio ahead.
      pack: whether a row holds several examples, in speech and in both halves of the LLM at once.
      utterances: with `pack`, most utterances of a row. A speech encoder that packs takes them side by side
        in a slot of `feature_lengths['speech']` samples (None: one for each second of it); one that takes
        one utterance a slot gets so many slots of that length (None: 1).
      buckets: with `pack`, for an encoder of one utterance a slot: slot lengths in samples besides that of
        `feature_lengths`. Every step has rows of one of them, the same on every host.
      block: with `pack`, references whose rows are made together; None chooses.
      shuffle_shards: None shuffles a whole task; a number mixes so many speech shards at a time, so that a
        stretch of training reads few files.
      stages: step -> registered SeqIO name that is trained on from that step on, in place of
        `mixture_or_task`. Every stage begins its own epochs. Steps that a rollback leaves out count.
      augment: what happens to the samples of speech on the host, anew in every epoch; None leaves them alone.
      frames: directory of `slm data encode`, local or remote: rows hold the frames that the frozen speech
        encoder gave there, and the encoder is no part of training.
      encode_once: the same with frames that the run itself makes before its first step, in its directory.
    """

    mixture_or_task: str
    feature_lengths: Mapping[str, int]
    batch_size: int
    cache_dir: str | None = None
    register: Sequence[Callable[[], object]] = ()
    split: str = "train"
    seed: int = 0
    max_bad_share: float = 0.05
    reader_threads: int = 4
    pack: bool = False
    utterances: int | None = None
    buckets: Sequence[int] = ()
    block: int | None = None
    shuffle_shards: int | None = None
    stages: Mapping[int, str] = dataclasses.field(default_factory=dict)
    augment: AugmentationConfig | None = None
    frames: str | None = None
    encode_once: bool = False

    def __post_init__(self):
        check_whole("BATCH_SIZE", self.batch_size)
        check_whole("DataConfig.reader_threads", self.reader_threads)
        for name in ("utterances", "block", "shuffle_shards"):
            if (value := getattr(self, name)) is not None:
                check_whole(f"DataConfig.{name}", value)
        for name in ("pack", "encode_once"):
            if not isinstance(value := getattr(self, name), bool):
                raise UserError(f"DataConfig.{name} is {value!r}, expected True or False")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UserError(f"DataConfig.seed is {self.seed!r}, expected a whole number")
        share = self.max_bad_share
        if not is_number(share) or not 0 <= share <= 1:
            raise UserError(f"DataConfig.max_bad_share is {share!r}, expected a number from 0 to 1")
        if not isinstance(self.buckets, (list, tuple)):
            raise UserError(
                f"DataConfig.buckets is {self.buckets!r}, expected a list of samples, such as [80000, 160000]"
            )
        for bucket in self.buckets:
            check_whole("DataConfig.buckets", bucket)
        for name, given in (
            ("utterances", self.utterances),
            ("buckets", self.buckets),
            ("block", self.block),
        ):
            if given and not self.pack:
                raise UserError(
                    f"DataConfig.{name} is {given!r}, and rows are not packed; expected pack = True"
                )
        if self.frames and self.encode_once:
            raise UserError(
                f"DataConfig.frames is {self.frames!r} and DataConfig.encode_once is True; expected one of "
                "both"
            )
        if self.cache_dir and storage.is_remote(self.cache_dir):
            raise UserError(
                f"DataConfig.cache_dir is {self.cache_dir!r}, expected a local folder: index tables are "
                "mapped into memory, and every host makes its own"
            )
        self._check_stages()

    def _check_stages(self) -> None:
        like = "expected steps and names, such as {1000: 'mixture'}"
        if not isinstance(self.stages, Mapping):
            raise UserError(f"DataConfig.stages is {self.stages!r}, {like}")
        for step, name in self.stages.items():
            check_whole("DataConfig.stages: a step", step)
            if not isinstance(name, str):
                raise UserError(f"DataConfig.stages has {name!r} at step {step}, {like}")

    @property
    def has_frames(self) -> bool:
        """Whether rows hold frames that were computed before, in place of samples."""
        return bool(self.frames) or self.encode_once


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a model is scored.

    Attributes:
      mixture_or_task: what it is scored on; None takes the training mixture.
      split: such as `validation`.
      batch_size: rows decoded at once.
      max_tokens: most tokens of a hypothesis.
      num_examples: examples of each task during training; all by default. `slm evaluate` takes all.
      feature_lengths: those of `DataConfig.feature_lengths` that are others when the model answers.
    """

    mixture_or_task: str | None = None
    split: str = "validation"
    batch_size: int = 16
    max_tokens: int = 128
    num_examples: int | None = None
    feature_lengths: Mapping[str, int] | None = None

    def __post_init__(self):
        check_whole("EvaluationConfig.batch_size", self.batch_size)
        check_whole("EvaluationConfig.max_tokens", self.max_tokens)
        if self.num_examples is not None:
            check_whole("EvaluationConfig.num_examples", self.num_examples)
        for name, length in (self.feature_lengths or {}).items():
            if name not in FEATURES:
                raise UserError(f"EvaluationConfig.feature_lengths has {name!r}{nearest(name, FEATURES)}")
            check_whole(f"EvaluationConfig.feature_lengths[{name!r}]", length)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 takes the devices that the others leave.

    Attributes:
      slices: of the axis `slice`: TPU slices, or groups of hosts, with a slow network between them.
      data, fsdp, tensor: of the axes of that name.
      rules: logical axis -> mesh axis.
    """

    slices: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rules: LogicalRules = DEFAULT_RULES

    def __post_init__(self):
        for name in ("slices", "data", "fsdp", "tensor"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
                raise UserError(
                    f"MeshConfig.{name} is {size!r}, expected a whole number of at least 1, or -1 for the "
                    "devices that the other axes leave"
                )
        check_rule_types(self.rules)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: where it lies, what it minimises, on what, and how long.

    Attributes:
      model_dir: the run's directory.
      objective: what it minimises.
      data: what it reads.
      optimizer: how it learns.
      loop: how long, and how often it logs, evaluates and saves.
      mesh: where arrays lie.
      evaluation: how the model is scored; None scores nothing.
      foundations: part of the model (`speech_encoder`, `llm`) -> directory of its foundation checkpoint.
      frozen_dtype: floating parameters of frozen parts are held in it; None keeps the dtype on disk.
      init_from: directory of another run; what that one has trained this one begins with, by name.
      init_from_step: of which checkpoint: `newest`, `best` by `LoopConfig.best_metric`, or a step.
      init_optimizer: what goes on from there does so with its optimizer state, `carried`, or with a new one,
        `fresh`; the schedule begins anew in any case.
      save_foundations: part of the model -> directory to which it is saved when the run is finished.
      save_format: of those: `orbax`, or `safetensors` for a model that one host holds.
      save_dtype: of their floating parameters; None keeps that of the training.
      working_dir: what relative paths are relative to; by default the current folder. A run's own copy of
        its configuration names it, so that the run can be used from any folder.
    """

    model_dir: str
    objective: Objective
    data: DataConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig | None = None
    foundations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    frozen_dtype: str | None = "bfloat16"
    init_from: str | None = None
    init_from_step: int | str = "newest"
    init_optimizer: str = "carried"
    save_foundations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    save_format: str = "orbax"
    save_dtype: str | None = None
    working_dir: str | None = None

    def __post_init__(self):
        for name in ("model_dir", "init_from", "working_dir"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "model_dir"):
                raise UserError(f"Run.{name} is {value!r}, expected a directory, such as 'runs/slm'")
        for name in ("foundations", "save_foundations"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(path, str) for path in value.values()):
                raise UserError(
                    f"Run.{name} is {value!r}, expected parts and directories, such as {{'llm': 'runs/llm'}}"
                )
        if not isinstance(self.optimizer, OptimizerConfig):
            names = "@optimizers.AdamWConfig(), @optimizers.AdafactorConfig() or @optimizers.MuonConfig()"
            raise UserError(f"OPTIMIZER is {self.optimizer!r}, expected {names}")
        for name, dtype in (("frozen_dtype", self.frozen_dtype), ("save_dtype", self.save_dtype)):
            if dtype is not None and dtype not in DTYPES:
                raise UserError(f"Run.{name} is {dtype!r}{nearest(dtype, DTYPES)}")
        step = self.init_from_step
        if isinstance(step, str) and step not in STEPS:
            raise UserError(f"Run.init_from_step is {step!r}{nearest(step, STEPS)}")
        if not isinstance(step, str):
            check_whole("Run.init_from_step", step)
        if self.init_optimizer not in OPTIMIZER_STATES:
            state = self.init_optimizer
            raise UserError(f"Run.init_optimizer is {state!r}{nearest(state, OPTIMIZER_STATES)}")
        if self.save_format not in FORMATS:
            raise UserError(f"Run.save_format is {self.save_format!r}{nearest(self.save_format, FORMATS)}")

    def path(self, path: str | Path) -> Path:
        """Returns a path of the configuration as an absolute one."""
        if storage.is_remote(path):
            return storage.absolute_path(path)
        return (Path(self.working_dir or ".") / path).absolute()

    @property
    def carries_optimizer(self) -> bool:
        """Whether optimizer state goes on from another run."""
        return self.init_from is not None and self.init_optimizer == "carried"

    @property
    def answer_lengths(self) -> Mapping[str, int]:
        """Feature lengths of a row when the model answers: the evaluation's, else those of training."""
        own = (self.evaluation and self.evaluation.feature_lengths) or {}
        # A layout of its own length holds what training's rows hold, so it does not outlive them.
        kept = {
            name: length for name, length in self.data.feature_lengths.items() if name != "layout" or not own
        }
        return {**kept, **own}

    @property
    def answer_tokens(self) -> int:
        """Most tokens of an answer: the evaluation's, else what targets may have."""
        return self.evaluation.max_tokens if self.evaluation else self.data.feature_lengths["targets"]

    def evaluated(self) -> EvaluationConfig:
        """Returns how to score; raises UserError where the run says nothing of it."""
        if self.evaluation is None:
            raise UserError("this run has no evaluation: bind run.Run.evaluation in its gin file")
        return self.evaluation


def load_run(directory: str | Path, bindings: Sequence[str] = ()) -> Run:
    """Builds the run that lies in a directory, wherever the directory lies now.

    Args:
      directory: of `slm train`.
      bindings: `NAME=value`, in place of the run's own.

    Raises:
      UserError: the directory is no run's.
    """
    directory = storage.absolute_path(directory)
    config = directory / CONFIG_FILE
    if not storage.asked(directory, lambda: storage.is_file(config)):
        local = not storage.is_remote(directory)
        near = [path.parent.name for path in directory.parent.glob(f"*/{CONFIG_FILE}")] if local else []
        there = storage.asked(directory, lambda: storage.is_folder(directory))
        found = f"has no {CONFIG_FILE}" if there else "does not exist"
        raise UserError(f"--run: {directory} is no run: it {found}{nearest(directory.name, near)}")
    with tempfile.TemporaryDirectory() as folder:
        # gin reads local files.
        copy = Path(folder) / CONFIG_FILE
        copy.write_bytes(storage.asked(directory, lambda: storage.read(config)))
        gin_config.parse([str(copy if storage.is_remote(config) else config)], bindings)
    # What is built may read files, such as a checkpoint's record, by paths relative to where training ran.
    working_dir = gin_config.bound("run.Run.working_dir") or "."
    if not Path(working_dir).is_dir():
        raise UserError(
            f"{config}: run.Run.working_dir is {working_dir!r}, and there is no such directory; paths of it "
            "are relative to that, so name where they lie now by --gin.run.Run.working_dir"
        )
    with contextlib.chdir(working_dir):
        built = gin_config.build(Run)
    return dataclasses.replace(built, model_dir=str(directory))


def save_config(directory: Path, working_dir: str | None = None) -> None:
    """Writes the resolved configuration into a run's directory, whole or not at all.

    Args:
      directory: of the run.
      working_dir: what relative paths are relative to; by default the current folder.

    Raises:
      UserError: it cannot be written.
    """
    folder = str(Path(working_dir or ".").absolute())
    text = f"{gin_config.resolved_config()}\nrun.Run.working_dir = {folder!r}\n"
    try:
        storage.write(directory / CONFIG_FILE, text)
    except OSError as error:
        raise storage.failed(f"cannot write {directory / CONFIG_FILE}", error, directory) from error
