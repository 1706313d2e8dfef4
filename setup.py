"""Packaging of slm_jax."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="slm_jax",
    version="0.1.0",
    description="Joint speech-and-language models in JAX: a frozen speech encoder, a frozen T5, a trained adapter.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["slm_jax", "slm_jax.*"]),
    package_data={"slm_jax": ["gin/**/*.gin"]},
    entry_points={"console_scripts": ["slm = slm_jax.cli.main:main"]},
)
