"""Options of the compiler: they reach the step's program, and mistakes are told."""

import jax
import pytest
from toy import ToyObjective, ToySource

from slm_jax.errors import UserError
from slm_jax.partitioning.mesh import make_mesh
from slm_jax.partitioning.sharding import partitioned
from slm_jax.training import program as program_module
from slm_jax.training.compiler_options import check_compiler_options
from slm_jax.training.loop import LoopConfig
from slm_jax.training.optimizers import AdamWConfig
from slm_jax.training.program import make_train_program


def _program(options):
    mesh = make_mesh(devices=jax.devices()[:1])
    return make_train_program(
        ToyObjective(), AdamWConfig(), ToySource(mesh).shapes, seed=0, mesh=mesh, compiler_options=options
    )


def test_options_reach_the_compilation_of_the_step(monkeypatch):
    monkeypatch.setattr(program_module, "check_compiler_options", lambda options, mesh: None)
    program = _program({"nonsense": 1})
    with partitioned(program.mesh):
        lowered = program.jitted.lower(
            program.shapes.state, program.shapes.frozen, ToySource(program.mesh).shapes
        )
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'nonsense'"):
        lowered.compile()


def test_a_mistake_is_told_before_anything_is_compiled_or_loaded():
    with pytest.raises(UserError, match="'nonsense': 1, which the cpu compiler refuses"):
        _program({"nonsense": 1})


def test_asking_the_compiler_leaves_the_cache_as_it_was():
    before = jax.config.values["jax_enable_compilation_cache"]
    check_compiler_options({"xla_cpu_enable_fast_math": False}, make_mesh(devices=jax.devices()[:1]))
    assert jax.config.values["jax_enable_compilation_cache"] == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"xla_tpu_scoped_vmem_limit_kib": 98304},
            "'xla_tpu_scoped_vmem_limit_kib', an option of tpu, .* on cpu",
        ),
        ({"xla_gpu_enable_cublaslt": False}, "'xla_gpu_enable_cublaslt', an option of gpu, .* on cpu"),
        ({"xla_cpu_enable_fast_math": False, "nonsense": 1}, "'nonsense': 1, .*: No such compile option"),
        ({"xla_backend_optimization_level": "high"}, "_level': 'high', .*: .*'high' is not a valid"),
    ],
)
def test_mistakes_are_told_in_one_sentence(options, told):
    with pytest.raises(UserError, match=told):
        check_compiler_options(options, make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize("options", ["xla=1", {"xla_cpu_enable_fast_math": None}, {3: True}])
def test_what_is_no_option_is_refused_with_the_configuration(options):
    with pytest.raises(UserError, match="compiler_options"):
        LoopConfig(train_steps=1, compiler_options=options)
