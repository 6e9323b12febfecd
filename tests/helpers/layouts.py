"""Parallel layouts by the short names that tests use, as overrides: `[*GIVEN, *TP2_SP]`."""

TP2, TP4, TP8 = ((f"parallel.tensor_parallel={degree}",) for degree in (2, 4, 8))
PP2, CP2 = ("parallel.pipeline_parallel=2",), ("parallel.context_parallel=2",)
SP = "parallel.sequence_parallel=true"
TP1 = ("parallel.tensor_parallel=1", "parallel.sequence_parallel=false")  # of a recipe that has more
TP2_SP, TP4_SP, TP8_SP = (*TP2, SP), (*TP4, SP), (*TP8, SP)
PP2_INTERLEAVED = (*PP2, "parallel.virtual_pipeline_parallel=2")
TP2_PP2, TP4_SP_PP2 = (*TP2, *PP2), (*TP4_SP, *PP2)
TP2_SP_CP2, TP8_SP_CP4 = (*TP2_SP, *CP2), (*TP8_SP, "parallel.context_parallel=4")
H100 = ("parallel=h100",)
H100_TP2, H100_TP4 = (*H100, *TP2_SP), (*H100, *TP4_SP)

# For tests that take a layout by name; two ranks unless `single`.
LAYOUTS = {
    "single": ("parallel=single",),
    "tp2": TP2,
    "tp2_sp": TP2_SP,
    "pp2": PP2,
    "pp2_interleaved": PP2_INTERLEAVED,
    "cp2": CP2,
}
