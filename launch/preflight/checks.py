"""All checks, in the order in which they run: quick ones first."""

from launch.preflight.configuration import check_configuration
from launch.preflight.data import check_heldout_data, check_tokenizer, check_training_data
from launch.preflight.devices import check_devices
from launch.preflight.dry_batch import check_dry_batch
from launch.preflight.kernels import check_kernels
from launch.preflight.packages import check_packages
from launch.preflight.ports import check_ports
from launch.preflight.run_folder import check_run_folder
from launch.preflight.runner import Check
from launch.preflight.space import check_space
from launch.preflight.start import check_start

CHECKS = (
    Check("configuration", check_configuration),
    Check("packages", check_packages),
    Check("ports", check_ports),
    Check("run folder", check_run_folder),
    Check("disk space", check_space),
    Check("tokenizer", check_tokenizer, needs=("packages",)),
    Check("training data", check_training_data, needs=("tokenizer",)),
    Check("held-out data", check_heldout_data, needs=("tokenizer",)),
    Check("start", check_start, needs=("training data",)),
    Check("devices", check_devices, needs=("packages",)),
    Check("kernels", check_kernels, needs=("packages",)),
)
DRY_BATCH = Check(
    "dry batch", check_dry_batch, needs=("configuration", "training data", "held-out data", "devices", "kernels")
)
