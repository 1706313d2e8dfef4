"""Which mesh axis splits which logical axis."""

from collections.abc import Mapping

from slm_jax.errors import UserError, nearest

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
    ("lora_rank", None),
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

# Every logical axis that a parameter or an activation of slm_jax may have.
LOGICAL_AXES = tuple(name for name, _ in DEFAULT_RULES)


def check_rule_types(rules: object) -> None:
    """Raises UserError unless rules are pairs of a logical axis and a mesh axis, several of them, or None."""
    like = "expected pairs of a logical axis and a mesh axis, several or None, such as (('vocab', 'tensor'),)"
    if not isinstance(rules, tuple | list):
        raise UserError(f"MeshConfig.rules is {rules!r}, {like}")
    for rule in rules:
        pair = isinstance(rule, tuple | list) and len(rule) == 2
        axes = () if not pair or rule[1] is None else rule[1]
        axes = axes if isinstance(axes, tuple | list) else (axes,)
        if not pair or not all(isinstance(name, str) for name in (rule[0], *axes)):
            raise UserError(f"MeshConfig.rules has {rule!r}, {like}")


def check_rules(rules: LogicalRules, mesh_shape: Mapping[str, int]) -> None:
    """Refuses rules that say less, or other things, than their author means.

    One set of rules serves every model, so a rule for an axis of `LOGICAL_AXES` that the model at hand lacks
    is in order. Unused are a rule for a name outside of it, and a rule after another one of the same name
    that is taken wherever it could be: after None, or after mesh axes that are all among its own.

    Args:
      rules: logical axis -> mesh axis, in order of precedence.
      mesh_shape: mesh axis -> its size.

    Raises:
      UserError: an unused rule, an unknown mesh axis, an activation without a rule, or a mesh axis of
        several devices that no rule uses.
    """
    check_rule_types(rules)
    earlier: dict[str, list[set[str]]] = {}
    for name, mesh_axes in rules:
        if name not in LOGICAL_AXES:
            raise UserError(
                f"MeshConfig.rules: nothing has the logical axis {name!r}{nearest(name, LOGICAL_AXES)}"
            )
        axes = {mesh_axes} if isinstance(mesh_axes, str) else set(mesh_axes or ())
        for axis in sorted(axes - set(mesh_shape)):
            raise UserError(
                f"MeshConfig.rules: {name!r} -> {mesh_axes!r} names no axis of the mesh"
                f"{nearest(axis, mesh_shape)}"
            )
        if any(before <= axes for before in earlier.get(name, ())):
            raise UserError(
                f"MeshConfig.rules: {name!r} -> {mesh_axes!r} is never used, an earlier rule for {name!r} "
                "goes before it"
            )
        earlier.setdefault(name, []).append(axes)
    for name in LOGICAL_AXES:
        if name.startswith("activation_") and name not in earlier:
            raise UserError(f"MeshConfig.rules: the logical axis {name!r} has no rule")
    used = {axis for sets in earlier.values() for axes in sets for axis in axes}
    for axis, size in mesh_shape.items():
        if size > 1 and axis not in used:
            raise UserError(
                f"mesh axis {axis!r} is of size {size} and no rule uses it: {size} devices would do the same "
                f"work; expected {axis}=1, or a rule for it in MeshConfig.rules"
            )
