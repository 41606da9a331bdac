// Winograd's minimal filtering F(M x M, 3 x 3): transforms, and where a window's pixels lie.
//
// Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (arXiv 1509.09308), section 4. A square of M x M outputs
// reads a window of (M + 2)^2 pixels; between the transforms stand (M + 2)^2 products over channels instead of 9 M^2.
#pragma once

#include "conv_window.h"
#include "lanes.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// One-dimensional transforms: `data` of M + 2 pixels and `filter` of 3 taps, `outputs` of their products; `spread` and `unfilter`
// are the adjoints of `outputs` and `filter`.
template <int M> struct Minimal;

template <>
struct Minimal<2> {
  template <class V>
  static void data(V* d) {
    const V first = d[0] - d[2], sum = d[1] + d[2], difference = d[2] - d[1], last = d[1] - d[3];
    d[0] = first, d[1] = sum, d[2] = difference, d[3] = last;
  }
  template <class V>
  static void outputs(const V* m, V* y) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3]; }
  template <class V>
  static void spread(const V* y, V* m) { m[0] = y[0], m[1] = y[0] + y[1], m[2] = y[0] - y[1], m[3] = -y[1]; }
  template <class V>
  static void filter(const V* g, V* u) {
    const V even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = g[2];
  }
  template <class V>
  static void unfilter(const V* u, V* g) {
    const V even = (u[1] + u[2]) * 0.5f;
    g[0] = u[0] + even, g[1] = (u[1] - u[2]) * 0.5f, g[2] = even + u[3];
  }
};

template <>
struct Minimal<4> {
  template <class V>
  static void data(V* d) {
    const V even = d[4] - d[2] * 4.f, odd = d[3] - d[1] * 4.f, near = d[4] - d[2], far = (d[3] - d[1]) * 2.f;
    const V first = d[0] * 4.f - d[2] * 5.f + d[4], last = d[1] * 4.f - d[3] * 5.f + d[5];
    d[0] = first, d[1] = even + odd, d[2] = even - odd, d[3] = near + far, d[4] = near - far, d[5] = last;
  }
  template <class V>
  static void outputs(const V* m, V* y) {
    const V sum = m[1] + m[2], difference = m[1] - m[2], wide = m[3] + m[4], steep = m[3] - m[4];
    y[0] = m[0] + sum + wide, y[1] = difference + steep * 2.f, y[2] = sum + wide * 4.f, y[3] = difference + steep * 8.f + m[5];
  }
  template <class V>
  static void spread(const V* y, V* m) {
    const V even = y[0] + y[2], odd = y[1] + y[3], wide = y[0] + y[2] * 4.f, steep = y[1] * 2.f + y[3] * 8.f;
    m[0] = y[0], m[1] = even + odd, m[2] = even - odd, m[3] = wide + steep, m[4] = wide - steep, m[5] = y[3];
  }
  template <class V>
  static void filter(const V* g, V* u) {
    const V even = (g[0] + g[2]) * (1.f / 6), odd = g[1] * (1.f / 6), wide = g[0] * (1.f / 24) + g[2] * (1.f / 6), steep = g[1] * (1.f / 12);
    u[0] = g[0] * 0.25f, u[1] = -even - odd, u[2] = odd - even, u[3] = wide + steep, u[4] = wide - steep, u[5] = g[2];
  }
  template <class V>
  static void unfilter(const V* u, V* g) {
    const V even = (u[1] + u[2]) * (1.f / 6), odd = (u[1] - u[2]) * (1.f / 6), wide = u[3] + u[4], steep = (u[3] - u[4]) * (1.f / 12);
    g[0] = u[0] * 0.25f - even + wide * (1.f / 24), g[1] = steep - odd, g[2] = wide * (1.f / 6) - even + u[5];
  }
};

// The same in two dimensions, columns, then rows: from `read(i, j)` of IN x IN to `write(i, j, value)` of OUT x OUT. Inlined by force, so
// that the values stay in registers and the first level of the cache.
template <int IN, int OUT, class Read, class Function, class Write>
__attribute__((always_inline)) inline void both_ways(const Read& read, const Function& function, const Write& write) {
  FloatVector half[OUT][IN];
  MWM_UNROLL for (int j = 0; j < IN; ++j) {
    FloatVector column[IN], result[OUT];
    MWM_UNROLL for (int i = 0; i < IN; ++i) column[i] = read(i, j);
    function(column, result);
    MWM_UNROLL for (int i = 0; i < OUT; ++i) half[i][j] = result[i];
  }
  MWM_UNROLL for (int i = 0; i < OUT; ++i) {
    FloatVector result[OUT];
    function(half[i], result);
    MWM_UNROLL for (int j = 0; j < OUT; ++j) write(i, j, result[j]);
  }
}

template <int M>
struct Both {
  static constexpr int A = M + 2;
  template <class Read, class Write>
  __attribute__((always_inline)) static inline void data(const Read& read, const Write& write) {
    both_ways<A, A>(read, [](FloatVector* in, FloatVector* out) __attribute__((always_inline)) {
      Minimal<M>::data(in);
      MWM_UNROLL for (int i = 0; i < A; ++i) out[i] = in[i];
    }, write);
  }
  template <class Read, class Write>
  __attribute__((always_inline)) static inline void outputs(const Read& read, const Write& write) {
    both_ways<A, M>(read, [](FloatVector* in, FloatVector* out) __attribute__((always_inline)) { Minimal<M>::outputs(in, out); }, write);
  }
  template <class Read, class Write>
  __attribute__((always_inline)) static inline void spread(const Read& read, const Write& write) {
    both_ways<M, A>(read, [](FloatVector* in, FloatVector* out) __attribute__((always_inline)) { Minimal<M>::spread(in, out); }, write);
  }
  template <class Read, class Write>
  __attribute__((always_inline)) static inline void filter(const Read& read, const Write& write) {
    both_ways<3, A>(read, [](FloatVector* in, FloatVector* out) __attribute__((always_inline)) { Minimal<M>::filter(in, out); }, write);
  }
  template <class Read, class Write>
  __attribute__((always_inline)) static inline void unfilter(const Read& read, const Write& write) {
    both_ways<A, 3>(read, [](FloatVector* in, FloatVector* out) __attribute__((always_inline)) { Minimal<M>::unfilter(in, out); }, write);
  }
};

// Calls function(std::true_type-like) where the vector is whole, which spares the masks, else with false.
template <bool B> struct Flag { static constexpr bool value = B; };

template <class Function>
inline void with_full(Lanes<float> lanes, const Function& function) {
  if (lanes.count == kLanes<float>) return function(Flag<true>{});
  return function(Flag<false>{});
}

template <bool kFull, class E>
__attribute__((always_inline)) inline FloatVector load_some(const E* from, Lanes<float> lanes) {
  return load_lanes(from, kFull ? Lanes<float>(kLanes<float>) : lanes);
}

template <bool kFull, class E>
__attribute__((always_inline)) inline void store_some(E* to, FloatVector x, Lanes<float> lanes) {
  store_lanes(to, x, kFull ? Lanes<float>(kLanes<float>) : lanes);
}

// Squares of M x M outputs, row by row in each tile; the last ones of a tile may stand out of it. Tiles are [height, width].
struct Squares {
  const int32_t* coords;
  const int32_t* slots;
  int64_t rows, columns, height, width, edge, down, across, count;

  Squares(const View& coords_view, const View& slots_view, const View& tiles, int64_t outputs)
      : coords(pointer<int32_t>(coords_view)), slots(pointer<int32_t>(slots_view)), rows(slots_view.shape[1]), columns(slots_view.shape[2]),
        height(tiles.shape[2]), width(tiles.shape[3]), edge(outputs), down((height + outputs - 1) / outputs), across((width + outputs - 1) / outputs),
        count(coords_view.shape[0] * down * across) {}

  // Where the pixels of a square's window lie in x [S, C, height, width]; `zeros` where a tile is hidden or the image ends.
  template <int M, class E>
  void window(int64_t square, const E* x, int64_t channels, const E* zeros, const E* (&from)[M + 2][M + 2]) const {
    const int64_t n = square / (down * across), top = square / across % down * M - 1, left = square % across * M - 1;
    const int32_t* place = coords + 3 * n;
    for (int i = 0; i < M + 2; ++i) {
      const int64_t step = top + i < 0 ? -1 : top + i < height ? 0 : 1, row = top + i - step * height, tile_row = place[1] + step;
      const bool outside = tile_row < 0 || tile_row >= rows || row >= height;
      const int32_t* slot_row = slots + (place[0] * rows + (outside ? 0 : tile_row)) * columns;
      for (int j = 0; j < M + 2; ++j) {
        const int64_t side = left + j < 0 ? -1 : left + j < width ? 0 : 1, column = left + j - side * width, tile_column = place[2] + side;
        const int32_t slot = outside || tile_column < 0 || tile_column >= columns || column >= width ? -1 : slot_row[tile_column];
        from[i][j] = slot < 0 ? zeros : x + ((slot * height + row) * width + column) * channels;
      }
    }
  }

  // First pixel of a square in tiles [T, C, height, width], and how many of its rows and columns exist.
  template <class E>
  E* corner(int64_t square, E* tiles, int64_t channels, int64_t* tall, int64_t* wide) const {
    const int64_t n = square / (down * across), top = square / across % down * edge, left = square % across * edge;
    *tall = least(edge, height - top);
    *wide = least(edge, width - left);
    return tiles + ((n * height + top) * width + left) * channels;
  }
};

inline void check_winograd(const char* op, const View& source, const View& target, const View& coords, const View& slots, int64_t outputs) {
  check(op, source, 4);
  check(op, target, 4, source.dtype);
  check_channels_last(op, source);
  check_channels_last(op, target);
  check_places(op, coords, slots, source.shape[0]);
  if (target.shape[0] != coords.shape[0]) fail("%s: the tiles written must be the plan's", op);
  if (source.shape[2] != target.shape[2] || source.shape[3] != target.shape[3]) fail("%s: the tiles' edges differ", op);
  if (outputs != 2 && outputs != 4) fail("%s: squares of 2 or 4 outputs, got %lld", op, static_cast<long long>(outputs));
  if (source.dtype == DType::kFloat64) fail("%s: is for float32, bfloat16 and float16", op);
}

}  // namespace
}  // namespace MWM_ISA
}  // namespace mwm
