// Kernels that are wrong on purpose, one per kind of finding of compute-sanitizer. bench/on_gpu.sh trusts a clean run of a tool only
// after the tool has flagged these. A program of its own, part of no other build: known_bad NAME.
#include <cstdio>
#include <cstring>

#include <cuda_runtime.h>

namespace {

__global__ void write_past_the_end(int* data, int count) { data[count + threadIdx.x] = 1; }

__global__ void share_without_barrier(int* data, int) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  data[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void read_uninitialised(int* data, int count) { data[threadIdx.x] += data[count - 1 - static_cast<int>(threadIdx.x)]; }

__global__ void right(int* data, int) { data[threadIdx.x] = 1; }

}  // namespace

int main(int count, char** words) {
  constexpr int kCount = 256;
  const char* name = count > 1 ? words[1] : "";
  void (*kernel)(int*, int) = !std::strcmp(name, "memcheck")    ? write_past_the_end
                              : !std::strcmp(name, "racecheck") ? share_without_barrier
                              : !std::strcmp(name, "initcheck") ? read_uninitialised
                              : !std::strcmp(name, "right")     ? right
                                                                : nullptr;
  if (!kernel) {
    std::fprintf(stderr, "known_bad: NAME must be memcheck, racecheck, initcheck or right, got \"%s\".\n", name);
    return 2;
  }
  int* data = nullptr;
  if (cudaMalloc(&data, kCount * sizeof(int)) != cudaSuccess) {
    std::fprintf(stderr, "known_bad: no device memory.\n");
    return 3;
  }
  kernel<<<1, 64>>>(data, kCount);
  std::printf("%s: %s\n", name, cudaGetErrorString(cudaDeviceSynchronize()));
  cudaFree(data);
  return 0;
}
