"""One file per command; the only room that knows flags and gin."""
