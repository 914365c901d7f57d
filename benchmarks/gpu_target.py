"""NVIDIA cards for a compiler that has none: XLA takes a page of numbers for one.

Needs jax's plugin for CUDA (`pip install "jax[cuda13]"`), which compiles on any Linux machine.
"""

from jax.experimental import topologies

# What differs between the cards that are known here, by their data sheets.
CARDS = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", "bandwidth": 3352320000000, "memory": 84942979072},
    "h200": {"name": "NVIDIA H200 141GB HBM3e", "bandwidth": 4800000000000, "memory": 151397597184},
}
CUDNN = (9, 10, 0)

# Compute capability 9.0: 132 multiprocessors. Rates by type: 11 is float32, 16 is bfloat16.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}  l2_cache_size: 52428800  device_memory_size: {memory}
  clock_rate_ghz: 1.98  pcie_bandwidth: 34359738368  ecc_enabled: true  device_address_bits: 64
  cuda_compute_capability {{ major: 9  feature_extension: ACCELERATED_FEATURES }}
  scalar_unit_description {{
    rate_infos {{ key: 11 value {{ clock_rate_ghz: 1.98 units_per_core: 128 ops_per_clock: 1 }} }}
    rate_infos {{ key: 16 value {{ clock_rate_ghz: 1.98 units_per_core: 128 ops_per_clock: 2 }} }}
  }}
  matrix_unit_description {{
    rate_infos {{ key: 16 value {{ clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 512 }} }}
    rate_infos {{ key: 11 value {{ clock_rate_ghz: 1.83 units_per_core: 4 ops_per_clock: 256 }} }}
  }}
  device_vendor: "NVIDIA Corporation"  platform_version: "Compute Capability 9.0a"
  name: "{name}"  driver_version: "13.0.0"  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"  dnn_version: "{cudnn}"  cub_version: "3.1.2"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {major}  minor: {minor}  patch: {patch} }}
device_description_str: "{name}"
"""


def is_card(topology):
    """Tells whether a topology is that of cards: `h200`, `h100:8`."""
    return topology.partition(":")[0] in CARDS


def devices(topology):
    """Returns the devices of a topology like `h200` or `h100:8` (cards of one machine).

    Raises:
      ValueError: a number that is none.
      Exception: several kinds, of jax, where its plugin is missing.
    """
    name, _, count = topology.partition(":")
    if not (count or "1").isdigit():
        raise ValueError(f"{topology}: cards are named like h200 or h200:8")
    major, minor, patch = CUDNN
    text = HOPPER.format(
        **CARDS[name], cudnn=".".join(map(str, CUDNN)), major=major, minor=minor, patch=patch
    )
    return topologies.get_topology_desc(
        platform="cuda", target_config=text, topology=f"1x1x{count or 1}"
    ).devices


def believe():
    """Lets jax write programs with cuDNN's and Triton's kernels on a machine without a card.

    Before it does, jax asks the card at hand what it can, by functions of its own that no setting
    replaces; they are told here.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax._src.pallas.triton import gpu_info, pallas_call_registration

    major, minor, patch = CUDNN
    cudnn.check_cudnn_version = lambda: 10000 * major + 100 * minor + patch
    cudnn.check_compute_capability = lambda capability: True
    cudnn.is_cuda_compute_capability_equal = lambda capability: False
    info = gpu_info.GpuInfo(gpu_version=None, arch_name="9.0", compute_capability=90)
    gpu_info.get_gpu_info = lambda: info
    pallas_call_registration.gpu_info_lib.get_gpu_info = lambda: info
