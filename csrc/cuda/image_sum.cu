// Sum over the visible positions of each image: a block per image and 32 channels, eight groups of threads that take the rows of tiles in
// turn. A row is summed in float32, rows in float64, groups in order: the result depends on the input alone.
#include "device.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kGroups = 8, kThreads = kGroups * kWarp;

struct Rows {
  int64_t tile, channel, row, column;  // strides
  int32_t edge_h, edge_w, channels;
  int64_t tiles;
};

template <class T>
__global__ void __launch_bounds__(kThreads) image_sum_kernel(const T* x, Rows at, const int32_t* offsets, float* out) {
  __shared__ double parts[kGroups][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, group = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t b = blockIdx.x, first = offsets[b], last = offsets[b + 1];
  const int channel = static_cast<int>(blockIdx.y) * kWarp + lane;
  MWM_REQUIRE(first >= 0 && first <= last && last <= at.tiles, "image_sum: offsets do not fit the tiles. Use build_plan.");
  double total = 0;
  if (channel < at.channels) {
    int64_t n = first;
    int i = group;
    while (true) {
      while (i >= at.edge_h && n < last) i -= at.edge_h, ++n;
      if (n >= last) break;
      const T* row = x + n * at.tile + channel * at.channel + i * at.row;
      float sum = 0;
      MWM_UNROLL_BY(4)
      for (int j = 0; j < at.edge_w; ++j) sum += widen(row[j * at.column]);
      total += static_cast<double>(sum);
      i += kGroups;
    }
  }
  parts[group][lane] = total;
  __syncthreads();
  if (group != 0 || channel >= at.channels) return;
  for (int other = 1; other < kGroups; ++other) total += parts[other][lane];
  out[b * at.channels + channel] = static_cast<float>(total);
}

}  // namespace

void image_sum(const View& x, const View& offsets, const View& out, int64_t device, int64_t stream) {
  const char* op = "image_sum";
  check(op, x, 4);
  check(op, offsets, 1, DType::kInt32);
  check(op, out, 2, DType::kFloat32);
  check_contiguous(op, offsets);
  check_contiguous(op, out);
  if (offsets.shape[0] != out.shape[0] + 1 || out.shape[1] != x.shape[1]) fail("%s: out does not have one row per image", op);
  if (x.shape[1] > INT32_MAX - kWarp || x.shape[2] > (1 << 30) || x.shape[3] > INT32_MAX) fail("%s: x is too large", op);
  const Rows at{x.strides[0], x.strides[1], x.strides[2], x.strides[3], static_cast<int32_t>(x.shape[2]), static_cast<int32_t>(x.shape[3]), static_cast<int32_t>(x.shape[1]), x.shape[0]};
  if (at.edge_h == 0) fail("%s: tiles must not be empty", op);
  const Place place(device, stream);
  with_float(op, x.dtype, [&](auto tag) {
    using T = decltype(tag);
    launch(op, place, out.shape[0], ceil_div<int64_t>(at.channels, kWarp), kThreads, image_sum_kernel<T>, pointer<T>(x), at, pointer<int32_t>(offsets), pointer<float>(out));
  });
}

}  // namespace cuda
}  // namespace mwm
