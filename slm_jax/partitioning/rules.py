"""Which mesh axis splits which logical axis."""

LogicalRules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# In order of precedence: within one array a mesh axis goes to the first rule that asks for it.
DEFAULT_RULES: LogicalRules = (
    # Parameters
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    ("kv", None),
    ("layers", None),
    ("gates", None),
    ("relpos_buckets", None),
    ("conv_kernel", None),
    ("conv_in", None),
    ("conv_out", None),
    ("mel", None),
    ("positions", None),
    ("codebooks", None),
    ("norm", None),
    # Activations
    ("activation_batch", ("slice", "data", "fsdp")),
    ("activation_vocab", "tensor"),
    ("activation_heads", "tensor"),
    ("activation_mlp", "tensor"),
    ("activation_slots", None),
    ("activation_length", None),
    ("activation_embed", None),
    ("activation_kv", None),
)
