"""The inside of a waveform: features in JAX, on the device."""
