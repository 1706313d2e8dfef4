"""slm_jax: joint speech-and-language models with a small trained adapter between frozen parts."""

__version__ = "0.1.0"
