"""Networks only: speech encoders, T5, reducers, adapters, and SLM that joins them."""
