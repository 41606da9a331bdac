// Coverage of the patches of one image by one block: region_coverage and region_active.
#pragma once

#include "device.h"

namespace mwm {
namespace cuda {
namespace {

// clamp(round(255 x), 0, 255), half to even; NaN becomes 0 here and is found apart. The product is rounded before it is rounded to
// an integer, so it must not be contracted with anything.
__device__ inline int quantise(float x) {
  const float wide = __fmul_rn(x, 255.0f);
  return __float2int_rn(wide > 0.0f ? (wide < 255.0f ? wide : 255.0f) : 0.0f);
}
__device__ inline int quantise(double x) {
  const double wide = __dmul_rn(x, 255.0);
  return __double2int_rn(wide > 0.0 ? (wide < 255.0 ? wide : 255.0) : 0.0);
}
__device__ inline int quantise(BFloat16 x) { return quantise(widen(x)); }
__device__ inline int quantise(Half x) { return quantise(widen(x)); }
__device__ inline int quantise(uint8_t x) { return x ? 255 : 0; }

__device__ inline bool is_nan(float x) { return x != x; }
__device__ inline bool is_nan(double x) { return x != x; }
__device__ inline bool is_nan(BFloat16 x) { return (x.bits & 0x7fff) > 0x7f80; }
__device__ inline bool is_nan(Half x) { return (x.bits & 0x7fff) > 0x7c00; }
__device__ inline bool is_nan(uint8_t) { return false; }

constexpr int kCoverThreads = 512;

// region [B, H, W] with its strides, cut into rows x columns patches of edge_h x edge_w pixels.
struct Cut {
  int64_t image, row, column;  // strides in elements
  int32_t rows, columns, edge_h, edge_w;
  int64_t threshold;
};

inline Cut cut_of(const char* op, const View& region, int64_t threshold, const View& inside, const View& cover) {
  check(op, region, 3);
  check(op, inside, 3, DType::kBool);
  check(op, cover, 3, DType::kInt64);
  check_contiguous(op, inside);
  check_contiguous(op, cover);
  const int64_t rows = cover.shape[1], columns = cover.shape[2];
  if (cover.shape[0] != region.shape[0] || inside.shape[0] != region.shape[0] || inside.shape[1] != rows || inside.shape[2] != columns || rows < 1 ||
      columns < 1 || region.shape[1] % rows || region.shape[2] % columns)
    fail("%s: region does not divide into the grid", op);
  if (region.shape[1] > (1 << 28) || region.shape[2] > (1 << 28) || rows * columns > INT32_MAX) fail("%s: region has a side of more than 2^28 pixels", op);
  return {region.strides[0], region.strides[1], region.strides[2], static_cast<int32_t>(rows), static_cast<int32_t>(columns),
          static_cast<int32_t>(region.shape[1] / rows), static_cast<int32_t>(region.shape[2] / columns), threshold};
}

// Sums patch by patch, a warp each, side by side along rows of pixels. Writes cover and inside [Gh * Gw] of this image and returns
// whether a patch is inside. All threads of the block take part; what they wrote is visible to all afterwards.
template <class T>
__device__ bool cover_image(const T* region, const Cut& cut, int64_t* cover, uint8_t* inside) {
  __shared__ int64_t best_sum[kCoverThreads];
  __shared__ int32_t best_place[kCoverThreads];
  __shared__ uint8_t reached[kCoverThreads];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int patches = cut.rows * cut.columns;
  const int lines = cut.edge_w < kWarp ? kWarp / most(cut.edge_w, 1) : 1;  // rows of pixels that a warp reads at once
  const int first_row = cut.edge_w < kWarp ? lane / most(cut.edge_w, 1) : 0, first_column = cut.edge_w < kWarp ? lane % most(cut.edge_w, 1) : lane;
  bool nan = false;
  for (int patch = thread / kWarp; patch < patches; patch += kCoverThreads / kWarp) {
    const T* corner = region + static_cast<int64_t>(patch / cut.columns) * cut.edge_h * cut.row + static_cast<int64_t>(patch % cut.columns) * cut.edge_w * cut.column;
    int64_t total = 0;
    if (first_row < lines) {
      MWM_UNROLL_BY(4)
      for (int i = first_row; i < cut.edge_h; i += lines) {
        const T* line = corner + i * cut.row;
        int sum = 0;
        for (int j = first_column; j < cut.edge_w; j += kWarp) {
          const T value = line[j * cut.column];
          nan |= is_nan(value);
          sum += quantise(value);
        }
        total += sum;
      }
    }
    for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(kFullWarp, total, step);
    if (lane == 0) cover[patch] = total;
  }
  MWM_REQUIRE(!nan, "region_coverage: region contains NaN. Replace it, e.g. with torch.nan_to_num.");
  __syncthreads();
  int64_t top = -1;
  int32_t place = 0;
  bool any = false;
  for (int patch = thread; patch < patches; patch += kCoverThreads) {
    const int64_t sum = cover[patch];
    const bool is_inside = sum >= cut.threshold;
    inside[patch] = is_inside;
    any |= is_inside;
    if (sum > top) top = sum, place = patch;
  }
  best_sum[thread] = top, best_place[thread] = place, reached[thread] = any;
  __syncthreads();
  for (int half = kCoverThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      const int64_t other = best_sum[thread + half];
      if (other > best_sum[thread] || (other == best_sum[thread] && best_place[thread + half] < best_place[thread]))
        best_sum[thread] = other, best_place[thread] = best_place[thread + half];
      reached[thread] = reached[thread] | reached[thread + half];
    }
    __syncthreads();
  }
  const bool claims = !reached[0] && best_sum[0] > 0, found = reached[0] || claims;
  // The loop above wrote this flag, in another thread perhaps, before the barriers.
  if (claims && thread == 0) inside[best_place[0]] = 1;
  __syncthreads();
  return found;
}

// Calls function(T{}) for a region's dtype.
template <class Function>
void with_region(const char* op, DType dtype, const Function& function) {
  if (dtype == DType::kBool) return function(uint8_t{});
  if (dtype == DType::kFloat64) return function(double{});
  with_float(op, dtype, function);
}

}  // namespace
}  // namespace cuda
}  // namespace mwm
