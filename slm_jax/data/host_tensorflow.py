"""The one place where TensorFlow is imported: it moves records on the host and never sees an accelerator."""

from typing import Any

import tensorflow

# TensorFlow's annotations refuse most of what it accepts, such as operators on tensors.
tf: Any = tensorflow
Tensor = Any
Dataset = Any

# Where TensorFlow took an accelerator first, JAX would find no memory left on it.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

__all__ = ["Dataset", "Tensor", "tf"]
