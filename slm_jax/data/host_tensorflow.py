"""The one place where TensorFlow is imported: it moves records on the host and never sees an accelerator."""

import tensorflow as tf

# Where TensorFlow took an accelerator first, JAX would find no memory left on it.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")

__all__ = ["tf"]
