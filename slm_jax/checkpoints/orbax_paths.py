"""Orbax in buckets: one rule for `gs://` and `s3://`, and retries that end.

Orbax 0.12 hands `gs://` to TensorStore and takes every other path for a local one
(https://github.com/google/orbax/issues/359). TensorStore itself reads and writes S3 as well; what is missing
is the description of such a path, and that Orbax, as on GCS, writes the file `commit_success.txt` last and
takes no checkpoint without it, as a bucket cannot rename a folder. Both are a few names of private modules.
"""

import functools
import os
from pathlib import Path
from typing import Any

from slm_jax import storage

# Named as TensorStore's and botocore's; the first that is set counts.
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_S3_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
# Google's name for a server in place of its own.
_GCS_ENDPOINT = "STORAGE_EMULATOR_HOST"


def orbax_path(path: Path) -> Any:
    """Returns a path of `storage.absolute_path` for Orbax, which is made ready where it is a bucket's."""
    if storage.is_remote(path):
        _serve_buckets()
    return path


def key_value_store(path: str) -> dict[str, Any]:
    """Returns TensorStore's description of a path of a bucket, without a slash at the end."""
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    retries = {
        "max_retries": max(0, storage.attempts() - 1),
        "initial_delay": f"{storage.FIRST_DELAY_SECONDS}s",
        "max_delay": f"{storage.LONGEST_DELAY_SECONDS}s",
    }
    if scheme == "gs":
        if endpoint := _first_set((_GCS_ENDPOINT,)):
            # Such a server asks for no credentials, and TensorStore would look for some.
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", endpoint)
            os.environ.setdefault("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        return {"driver": "gcs", "bucket": bucket, "path": key, "context": {"gcs_request_retries": retries}}
    context: dict[str, Any] = {"s3_request_retries": retries}
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # Without this it looks for files as well, and says that there are none.
        context["aws_credentials"] = {"type": "environment"}
    described = {"driver": "s3", "bucket": bucket, "path": key, "context": context}
    if endpoint := _first_set(_S3_ENDPOINTS):
        # Where the endpoint is given, TensorStore does not ask for the bucket's region.
        described |= {"endpoint": endpoint, "aws_region": _first_set(_S3_REGIONS) or "us-east-1"}
    return described


@functools.cache
def _serve_buckets() -> None:
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    prefixes = ("gs://", "s3://")
    # What follows from it: the sign of a complete checkpoint, how one is removed, the size of data files.
    gcs_utils._GCS_PATH_PREFIX = prefixes
    gcs_utils.get_kvstore_for_gcs = key_value_store
    # Asks Google's own client, with other credentials, whether empty folders stay behind.
    gcs_utils.is_hierarchical_namespace_enabled = lambda path: False
    tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(prefixes)
    normalised = tensorstore_utils._normalize_path
    tensorstore_utils._normalize_path = lambda path: (
        path.rstrip("/") if path.startswith(prefixes) else normalised(path)
    )


def _first_set(names: tuple[str, ...]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)
