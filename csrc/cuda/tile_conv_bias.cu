// Derivative of a convolution in its bias: sums of each channel over all rows, in fixed shares that are then added in order.
#include "device.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kGroups = 8, kThreads = kGroups * kWarp, kRun = 8;

template <class T>
__global__ void __launch_bounds__(kThreads) channel_sum_kernel(const T* grad, int64_t rows, int32_t channels, float* sums) {
  __shared__ double parts[kGroups][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, group = static_cast<int>(threadIdx.x) / kWarp;
  const int channel = static_cast<int>(blockIdx.y) * kWarp + lane;
  const int64_t split = blockIdx.x, first = rows * split / gridDim.x, last = rows * (split + 1) / gridDim.x;
  double total = 0;
  if (channel < channels)
    for (int64_t row = first + group * kRun; row < last; row += kGroups * kRun) {
      float sum = 0;
      MWM_UNROLL
      for (int i = 0; i < kRun; ++i)
        if (row + i < last) sum += widen(grad[(row + i) * channels + channel]);
      total += static_cast<double>(sum);
    }
  parts[group][lane] = total;
  __syncthreads();
  if (group != 0 || channel >= channels) return;
  for (int other = 1; other < kGroups; ++other) total += parts[other][lane];
  sums[split * channels + channel] = static_cast<float>(total);
}

template <class T>
__global__ void __launch_bounds__(kThreads) join_kernel(const float* sums, int32_t splits, int32_t channels, T* out) {
  const int channel = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (channel >= channels) return;
  double total = 0;
  MWM_UNROLL_BY(8)
  for (int split = 0; split < splits; ++split) total += static_cast<double>(sums[static_cast<int64_t>(split) * channels + channel]);
  out[channel] = narrow<T>(static_cast<float>(total));
}

}  // namespace

void tile_conv_grad_bias(const View& grad, const View& sums, const View& out, int64_t device, int64_t stream) {
  const char* op = "tile_conv_grad_bias";
  check_tiles(op, grad, grad.dtype);
  check(op, sums, 2, DType::kFloat32);
  check(op, out, 1, grad.dtype);
  check_contiguous(op, sums);
  check_contiguous(op, out);
  const int64_t channels = grad.shape[1], splits = sums.shape[0], rows = grad.shape[0] * grad.shape[2] * grad.shape[3];
  if (out.shape[0] != channels || sums.shape[1] != channels || splits < 1 || splits > 65535 || channels > INT32_MAX - kThreads) fail("%s: sums and out must have K channels", op);
  const Place place(device, stream);
  with_float(op, grad.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch(op, place, splits, ceil_div<int64_t>(channels, kWarp), kThreads, channel_sum_kernel<T>, pointer<T>(grad), rows, channels, pointer<float>(sums));
    launch(op, place, ceil_div<int64_t>(channels, kThreads), 1, kThreads, join_kernel<T>, pointer<float>(sums), splits, channels, pointer<T>(out));
  });
}

}  // namespace cuda
}  // namespace mwm
