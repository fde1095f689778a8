// csrc/grpo_cuda.cu as a shared object for the CPU; see cuda_on_host.h.
#define MR1_CUDA_ON_HOST
#include "../csrc/grpo_cuda.cu"

extern "C" __attribute__((visibility("default"))) void mr1_host_machine(
    int clusters, int shared_per_block, int shared_per_processor, int shared_reserved, int seed) {
  mr1fast::host_machine = {clusters != 0, shared_per_block, shared_per_processor, shared_reserved};
  mr1fast::host_random.seed(seed);
}
