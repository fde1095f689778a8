"""mr1fast inside other trainers: `trl`, `liger` (its names and signatures) and `verl`. See docs/drop-in.md.

Each module is imported on its own and needs nothing but the library it is named after, if that.
"""

# The loss types that TRL and Liger have as well; beside them, vespo.
SHARED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo")
