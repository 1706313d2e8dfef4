"""From references to placed batches: sources, index, plan, late loading, iterator."""

from typing import Any

from slm_jax.storage import serve_other_schemes


def _gfile() -> Any:
    from slm_jax.data.host_tensorflow import tf

    return tf.io.gfile


serve_other_schemes(_gfile)
