"""The one place where TensorFlow is imported: it moves records on the host and never sees an accelerator."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what C++ writes to standard error, and lets it out where the import fails.

    TensorFlow tells of oneDNN and of missing CUDA drivers before its own log level counts.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(terminal, held.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _quiet():
    import tensorflow

    # Where TensorFlow took an accelerator first, JAX would find no memory left on it.
    tensorflow.config.set_visible_devices([], "GPU")
    tensorflow.config.set_visible_devices([], "TPU")

# TensorFlow's annotations refuse most of what it accepts, such as operators on tensors.
tf: Any = tensorflow
Tensor = Any
Dataset = Any

__all__ = ["Dataset", "Tensor", "tf"]
