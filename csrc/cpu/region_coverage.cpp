// Coverage of each patch by a region. One pass over the pixels, bound by memory; work is cut by row of patches. Compiled without
// contraction (CMakeLists.txt): 255 * r must be rounded before it is rounded to an integer.
#include "isa.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// clamp(x, 0, 255) to the nearest integer, half to even: adding 2^23 (2^52) leaves the integer in the low bits. NaN becomes 0 here
// and is found apart.
inline int32_t quantise(float x) {
  x = x * 255.0f;
  x = x > 0.0f ? x : 0.0f;
  x = x < 255.0f ? x : 255.0f;
  return static_cast<int32_t>(bit_copy<uint32_t>(x + 8388608.0f) & 0xffffu);
}
inline int32_t quantise(double x) {
  x = x * 255.0;
  x = x > 0.0 ? x : 0.0;
  x = x < 255.0 ? x : 255.0;
  return static_cast<int32_t>(bit_copy<uint64_t>(x + 4503599627370496.0) & 0xffffu);
}
inline int32_t quantise(uint8_t x) { return x ? 255 : 0; }

inline bool is_nan(float x) { return x != x; }
inline bool is_nan(double x) { return x != x; }
inline bool is_nan(uint8_t) { return false; }
inline uint8_t widen(uint8_t x) { return x; }

constexpr int64_t kBlock = 512;
constexpr int64_t kMaxRows = 1 << 23;  // 255 * 2^23 fits int32

// Adds one line of quantised pixels to the column sums. The step is a template argument so that the usual case is a plain vector loop.
template <bool kDense, class T>
__attribute__((noinline)) int32_t add_line(const T* __restrict from, int64_t count, int64_t step, int32_t* __restrict sums) {
  int32_t nan = 0;
  for (int64_t j = 0; j < count; ++j) {
    const auto value = widen(from[kDense ? j : j * step]);
    sums[j] += quantise(value);
    nan |= is_nan(value) ? 1 : 0;
  }
  return nan;
}

// Strips are rows of patches. Column sums are kept over the rows of a strip, so that no line needs a reduction.
template <class T>
void sum_strips(const View& region, const View& cover, int64_t begin, int64_t end, int32_t* has_nan) {
  const int64_t rows = cover.shape[1], columns = cover.shape[2], width = region.shape[2];
  const int64_t edge_h = region.shape[1] / rows, edge_w = width / columns, step = region.strides[2];
  int32_t nan = 0;
  for (int64_t strip = begin; strip < end; ++strip) {
    const T* top = pointer<T>(region) + strip / rows * region.strides[0] + strip % rows * edge_h * region.strides[1];
    int64_t* to = pointer<int64_t>(cover) + strip * columns;
    for (int64_t c = 0; c < columns; ++c) to[c] = 0;
    for (int64_t first = 0; first < width; first += kBlock) {
      const int64_t count = least(kBlock, width - first);
      for (int64_t row = 0; row < edge_h; row += kMaxRows) {
        int32_t sums[kBlock] = {};
        for (int64_t i = row; i < least(row + kMaxRows, edge_h); ++i) {
          const T* line = top + i * region.strides[1] + first * step;
          nan |= step == 1 ? add_line<true>(line, count, 1, sums) : add_line<false>(line, count, step, sums);
        }
        for (int64_t j = 0; j < count;) {
          const int64_t patch = (first + j) / edge_w, last = least((patch + 1) * edge_w - first, count);
          int64_t total = 0;
          for (; j < last; ++j) total += sums[j];
          to[patch] += total;
        }
      }
    }
  }
  if (nan) __atomic_store_n(has_nan, 1, __ATOMIC_RELAXED);
}

}  // namespace

void region_coverage(const View& region, int64_t threshold, const View& inside, const View& cover, int64_t threads) {
  check("region_coverage: region", region, 3);
  check("region_coverage: inside", inside, 3, DType::kBool);
  check("region_coverage: cover", cover, 3, DType::kInt64);
  check_contiguous("region_coverage: inside", inside);
  check_contiguous("region_coverage: cover", cover);
  const int64_t batch = region.shape[0], rows = cover.shape[1], columns = cover.shape[2], patches = rows * columns;
  if (cover.shape[0] != batch || inside.shape[0] != batch || inside.shape[1] != rows || inside.shape[2] != columns || rows < 1 || columns < 1 ||
      region.shape[1] % rows || region.shape[2] % columns)
    fail("region_coverage: region does not divide into the grid");
  int32_t has_nan = 0;
  auto run = [&](auto tag) {
    using T = decltype(tag);
    const int64_t pixels = region.shape[1] / rows * region.shape[2];
    parallel_for(batch * rows, 131072 / (pixels + 1) + 1, threads,
                 [&](int64_t begin, int64_t end) { sum_strips<T>(region, cover, begin, end, &has_nan); });
  };
  if (region.dtype == DType::kBool) run(uint8_t{});
  else with_float("region_coverage", region.dtype, run);
  if (has_nan) fail("region_coverage: region contains NaN. Replace it, e.g. with torch.nan_to_num.");
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* sums = pointer<int64_t>(cover) + b * patches;
    uint8_t* flags = pointer<uint8_t>(inside) + b * patches;
    int64_t best = 0, reached = 0;
    for (int64_t i = 0; i < patches; ++i) {
      flags[i] = sums[i] >= threshold;
      reached += flags[i];
      if (sums[i] > sums[best]) best = i;
    }
    if (reached == 0 && sums[best] > 0) flags[best] = 1;
  }
}

}  // namespace MWM_ISA
}  // namespace mwm
