// Helpers of the CUDA files: current stream, device guard, launch sizes and checks.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "stable.h"

namespace detlib {

using torch::stable::accelerator::DeviceGuard;

constexpr int kThreads = 256;

inline cudaStream_t current_stream(const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
#if defined(TORCH_VERSION_2_13_0) && TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#else
  void* stream = nullptr;
  DETLIB_CALL(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}

// Returns the number of blocks for a grid-stride loop over `count` elements.
inline unsigned int num_blocks(int64_t count) {
  return static_cast<unsigned int>(std::min<int64_t>((count + kThreads - 1) / kThreads, 1 << 20));
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  DETLIB_CHECK(error == cudaSuccess, kernel, " failed to launch: ", cudaGetErrorString(error));
}

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64_t grid_size() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

}  // namespace detlib
