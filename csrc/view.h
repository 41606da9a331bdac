// A tensor as the kernels see it: address, shape, strides in elements, dtype. Python allocates; nothing here owns memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mwm {

// The numbers are those of python/mwm/ops/native.py.
enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16, kInt64, kInt32, kInt16, kUInt8, kBool, kInt8, kComplex64, kNone };

constexpr int kMaxDims = 6;
constexpr int kMaxInts = 24;

struct View {
  void* data = nullptr;
  int ndim = 0;
  DType dtype = DType::kNone;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
};

// A short list of integers, e.g. the geometry of a window.
struct Ints {
  int count = 0;
  int64_t values[kMaxInts] = {};
};

// Throws std::invalid_argument (ValueError in Python) with a printf-style text. Defined in a portable file, so that no
// template of the standard library is compiled for an instruction set that the machine may lack.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

namespace {

inline int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: case DType::kInt64: case DType::kComplex64: return 8;
    case DType::kFloat32: case DType::kInt32: return 4;
    case DType::kFloat16: case DType::kBFloat16: case DType::kInt16: return 2;
    case DType::kUInt8: case DType::kBool: case DType::kInt8: return 1;
    case DType::kNone: break;
  }
  return 0;
}

// Product of the sizes; refuses what int64 cannot hold.
inline int64_t element_count(const char* name, const View& view) {
  int64_t count = 1;
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] < 0 || __builtin_mul_overflow(count, view.shape[i], &count)) fail("%s: the size overflows 64 bits", name);
  }
  int64_t bytes;
  if (__builtin_mul_overflow(count, item_size(view.dtype), &bytes)) fail("%s: the size overflows 64 bits", name);
  return count;
}

inline bool is_none(const View& view) { return view.dtype == DType::kNone; }

// Rank, address and alignment of any argument.
inline void check(const char* name, const View& view, int ndim) {
  if (is_none(view)) fail("%s: must be a tensor, got None", name);
  if (view.ndim != ndim) fail("%s: must have %d dimensions, got %d", name, ndim, view.ndim);
  const int64_t count = element_count(name, view);
  if (count > 0 && view.data == nullptr) fail("%s: has no memory", name);
  if (reinterpret_cast<std::uintptr_t>(view.data) % static_cast<std::uintptr_t>(item_size(view.dtype)) != 0) fail("%s: is not aligned to its element size", name);
}

inline void check(const char* name, const View& view, int ndim, DType dtype) {
  check(name, view, ndim);
  if (view.dtype != dtype) fail("%s: has the wrong dtype (code %d, expected %d)", name, static_cast<int>(view.dtype), static_cast<int>(dtype));
}

// Row-major without gaps; dimensions of size 1 may have any stride, as may all where there is no element.
inline void check_contiguous(const char* name, const View& view) {
  for (int i = 0; i < view.ndim; ++i)
    if (view.shape[i] == 0) return;
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] != 1 && view.strides[i] != expected) fail("%s: must be contiguous", name);
    expected *= view.shape[i];
  }
}

// [N, C, H, W] with the memory order N, H, W, C.
inline bool is_channels_last(const View& view) {
  const int order[4] = {1, 3, 2, 0};
  for (int i : order)
    if (view.shape[i] == 0) return true;
  int64_t expected = 1;
  for (int i : order) {
    if (view.shape[i] != 1 && view.strides[i] != expected) return false;
    expected *= view.shape[i];
  }
  return true;
}

inline void check_channels_last(const char* name, const View& view) {
  if (!is_channels_last(view)) fail("%s: must be channels-last contiguous", name);
}

// Coordinates [T, 3] and slots [B, Gh, Gw] that point at each other, which bounds every index a kernel derives from them.
inline void check_plan(const char* op, const View& coords, const View& slots) {
  check(op, coords, 2, DType::kInt32);
  check(op, slots, 3, DType::kInt32);
  check_contiguous(op, coords);
  check_contiguous(op, slots);
  const int64_t tiles = coords.shape[0], batch = slots.shape[0], rows = slots.shape[1], columns = slots.shape[2];
  if (coords.shape[1] != 3) fail("%s: coords must be [T, 3]", op);
  const int32_t* place = static_cast<const int32_t*>(coords.data);
  const int32_t* slot = static_cast<const int32_t*>(slots.data);
  for (int64_t n = 0; n < tiles; ++n) {
    const int64_t b = place[3 * n], r = place[3 * n + 1], c = place[3 * n + 2];
    if (b < 0 || b >= batch || r < 0 || r >= rows || c < 0 || c >= columns || slot[(b * rows + r) * columns + c] != n)
      fail("%s: coords of tile %lld do not fit the plan's grid. Use build_plan.", op, static_cast<long long>(n));
  }
  const int64_t patches = batch * rows * columns;
  for (int64_t i = 0; i < patches; ++i)
    if (slot[i] < -1 || slot[i] >= tiles) fail("%s: slots must lie in [-1, T). Use build_plan.", op);
}

}  // namespace
}  // namespace mwm
