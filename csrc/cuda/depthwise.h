// What the depthwise kernels share: the geometry of a window, its check, and the choice between the kernels for usual shapes and the
// ones for all.
#pragma once

#include "device.h"

namespace mwm {
namespace cuda {
namespace {

// Channels of a block of the usual shapes: sixteen threads with two channels each.
constexpr int kPairs = 16, kBlockChannels = 2 * kPairs;

template <class T>
__device__ inline float2 load_pair(const T* from) {
  const Pack<T, 2> pair = *reinterpret_cast<const Pack<T, 2>*>(from);
  return make_float2(widen(pair.item[0]), widen(pair.item[1]));
}

template <class T>
__device__ inline void store_pair(T* to, float2 pair) {
  *reinterpret_cast<Pack<T, 2>*>(to) = Pack<T, 2>{{narrow<T>(pair.x), narrow<T>(pair.y)}};
}

// The geometry of ops/conv_geometry.py with the kernel's size.
struct Window {
  int32_t kernel_h, kernel_w, stride, dilation_h, dilation_w, left, top;
  int64_t weight_channel, weight_row, weight_column;  // strides

  // An odd square window that leaves the size alone, which is its own adjoint up to the order of the taps.
  bool same() const {
    return kernel_h == kernel_w && kernel_h % 2 == 1 && stride == 1 && dilation_h == 1 && dilation_w == 1 && left == kernel_w / 2 && top == kernel_h / 2;
  }
};

inline Window window_of(const char* op, const Ints& numbers, const View& weight, const View& x, const View& coords, const View& slots, const View& large, const View& small) {
  if (numbers.count != 8) fail("%s: geometry must have 8 numbers, got %d", op, numbers.count);
  const int64_t* n = numbers.values;
  check(op, weight, 4, x.dtype);
  const int64_t channels = x.shape[1], kernel_h = weight.shape[2], kernel_w = weight.shape[3];
  if (n[0] < 1 || n[1] < 1 || n[2] < 1 || kernel_h < 1 || kernel_w < 1) fail("%s: geometry must be positive", op);
  for (int64_t number : {n[0], n[1], n[2], n[3], n[5], kernel_h, kernel_w})
    if (number < 0 || number > 32767) fail("%s: kernel, stride, dilation and padding must be below 32768", op);
  if (weight.shape[0] != channels || weight.shape[1] != 1 || n[7] != channels || channels > INT32_MAX - 64) fail("%s: weight must be [C, 1, kh, kw]", op);
  check_plan_shape(op, coords, slots);
  check_tiles(op, large, x.dtype);
  check_tiles(op, small, x.dtype);
  if (large.shape[1] != channels || small.shape[1] != channels || large.shape[2] != large.shape[3] || small.shape[2] != small.shape[3] ||
      small.shape[2] * n[0] != large.shape[2] || large.shape[2] > 32767 || large.shape[0] > INT32_MAX || small.shape[0] > INT32_MAX)
    fail("%s: the tiles do not fit the stride", op);
  return {static_cast<int32_t>(kernel_h), static_cast<int32_t>(kernel_w), static_cast<int32_t>(n[0]), static_cast<int32_t>(n[1]), static_cast<int32_t>(n[2]),
          static_cast<int32_t>(n[3]), static_cast<int32_t>(n[5]), weight.strides[0], weight.strides[2], weight.strides[3]};
}

// How many tiles beyond its own a position's window may reach to one side.
template <int kKernel, int kEdge>
struct Reach {
  static constexpr int kPad = kKernel / 2, kHalo = (kPad + kEdge - 1) / kEdge, kSide = 2 * kHalo + 1;
};

// The tiles around `count` tiles from `first`, read once by the whole block: table [count][kSide * kSide], -1 where nothing is visible.
template <int kSide>
__device__ inline void find_neighbours(const Plan& plan, int64_t first, int count, int64_t last, int32_t sources, int32_t* table) {
  constexpr int kHalo = kSide / 2;
  for (int item = static_cast<int>(threadIdx.x); item < count * kSide * kSide; item += static_cast<int>(blockDim.x)) {
    const int tile = item / (kSide * kSide), place = item - tile * kSide * kSide;
    int32_t found = -1;
    if (first + tile < last) {
      int32_t image, row, column;
      plan.place_of(first + tile, &image, &row, &column);
      found = plan.tile_at(image, row + place / kSide - kHalo, column + place % kSide - kHalo, sources);
    }
    table[item] = found;
  }
}

// One row of a window: kEdge + kKernel - 1 positions at row `r` (counted from the tile's first) and two channels. False: nothing visible.
template <class T, int kKernel, int kEdge>
__device__ inline bool load_window(const T* x, const int32_t* table, int r, int32_t channels, int32_t channel, float2* window) {
  using R = Reach<kKernel, kEdge>;
  const int down = (r + R::kHalo * kEdge) / kEdge, position = r - (down - R::kHalo) * kEdge;
  const T* from[R::kSide];
  bool any = false;
  MWM_UNROLL
  for (int tile = 0; tile < R::kSide; ++tile) {
    const int32_t slot = table[down * R::kSide + tile];
    any |= slot >= 0;
    from[tile] = slot < 0 ? nullptr : x + (static_cast<int64_t>(slot) * kEdge + position) * kEdge * channels + channel;
  }
  if (!any) return false;
  MWM_UNROLL
  for (int q = 0; q < kEdge + 2 * R::kPad; ++q) {
    const int across = (q - R::kPad + R::kHalo * kEdge) / kEdge, column = q - R::kPad - (across - R::kHalo) * kEdge;
    window[q] = from[across] ? load_pair(from[across] + column * channels) : make_float2(0.0f, 0.0f);
  }
  return true;
}

template <int kValue>
using Number = std::integral_constant<int, kValue>;

// Calls function(Number<kernel>, Number<edge>) for the usual shapes; false for the others.
template <class Function>
bool with_usual_shape(const Window& w, int64_t edge, const Function& function) {
  if (!w.same()) return false;
  const auto with_edge = [&](auto kernel) {
    switch (edge) {
      case 1: function(kernel, Number<1>{}); return true;
      case 2: function(kernel, Number<2>{}); return true;
      case 4: function(kernel, Number<4>{}); return true;
      case 8: function(kernel, Number<8>{}); return true;
      default: return false;
    }
  };
  switch (w.kernel_h) {
    case 3: return with_edge(Number<3>{});
    case 5: return with_edge(Number<5>{});
    case 7: return with_edge(Number<7>{});
    default: return false;
  }
}

inline bool in_pairs(int64_t channels, std::initializer_list<const View*> views) {
  for (const View* view : views)
    if (!aligned(*view, 2 * item_size(view->dtype))) return false;
  return channels % 2 == 0;
}

}  // namespace
}  // namespace cuda
}  // namespace mwm
