// Pooling over packed tiles. Work is cut by tile; the inner loops run over channels, which lie side by side. The backward is written
// as a gather (each input position asks the windows that see it), so no two threads add to one place.
#include "rows.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int64_t kBlock = 128;

// One axis of the dense maps, so that no position needs a division: in which tile an index lies and where, and which output index an
// input index with padding is the first one of.
class Line {
 public:
  struct Entry { int32_t tile, position; };

  Line(int64_t size, int64_t edge, int64_t out_size, int64_t out_edge, int64_t stride, int64_t before)
      : begins_size_(most<int64_t>(size + before, 0)), in_(size), out_(out_size), begins_(begins_size_) {
    fill(in_, size, edge);
    fill(out_, out_size, out_edge);
    for (int64_t i = 0; i < begins_size_; ++i) begins_[i] = static_cast<int32_t>(i % stride || i / stride >= out_size ? -1 : i / stride);
  }
  Entry in(int64_t i) const { return in_[i]; }
  Entry out(int64_t i) const { return out_[i]; }
  // The output whose window begins at this padded index, or -1.
  int64_t begins(int64_t i) const { return i < 0 || i >= begins_size_ ? -1 : begins_[i]; }

 private:
  static void fill(const Scratch<Entry>& entries, int64_t size, int64_t edge) {
    for (int64_t i = 0; i < size; ++i) entries[i] = {static_cast<int32_t>(i / edge), static_cast<int32_t>(i % edge)};
  }
  int64_t begins_size_;
  Scratch<Entry> in_, out_;
  Scratch<int32_t> begins_;
};

// As in ops/pool_geometry.py, plus the plan and the sizes of the dense maps.
struct Pool {
  bool max, count_include_pad;
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, left, right, top, bottom, divisor;
  int64_t tiles, channels, edge, out_edge_h, out_edge_w, rows, columns, height, width, out_height, out_width;
  const int32_t *place, *slot;

  Pool(const Ints& g, const View& x, const View& out, const View& coords, const View& slots) {
    if (g.count != 14) fail("tile_pool: geometry must have 14 numbers");
    const int64_t* v = g.values;
    max = v[0] != 0;
    kernel_h = v[1], kernel_w = v[2], stride_h = v[3], stride_w = v[4], dilation_h = v[5], dilation_w = v[6];
    left = v[7], right = v[8], top = v[9], bottom = v[10];
    count_include_pad = v[12] != 0;
    divisor = v[13];
    tiles = x.shape[0], channels = x.shape[1], edge = x.shape[2], out_edge_h = out.shape[2], out_edge_w = out.shape[3];
    rows = slots.shape[1], columns = slots.shape[2];
    height = rows * edge, width = columns * edge, out_height = rows * out_edge_h, out_width = columns * out_edge_w;
    place = pointer<int32_t>(coords), slot = pointer<int32_t>(slots);
    if (kernel_h < 1 || kernel_w < 1 || stride_h < 1 || stride_w < 1 || dilation_h < 1 || dilation_w < 1 || kernel_h * kernel_w > 32767)
      fail("tile_pool: kernel, stride and dilation must be positive");
    if (x.shape[3] != edge || out_edge_h * stride_h != edge || out_edge_w * stride_w != edge || coords.shape[0] != tiles ||
        out.shape[0] != tiles || out.shape[1] != channels)
      fail("tile_pool: the tiles do not fit plan and stride");
  }

  Line vertical() const { return {height, edge, out_height, out_edge_h, stride_h, top}; }
  Line horizontal() const { return {width, edge, out_width, out_edge_w, stride_w, left}; }
};

// A pool with its two axes.
struct Places : Pool {
  Line down, across;

  explicit Places(const Pool& pool) : Pool(pool), down(pool.vertical()), across(pool.horizontal()) {}

  // Where a position of the dense input is stored: its row of channels, kHidden or kOutside.
  static constexpr int64_t kHidden = -1, kOutside = -2;
  int64_t input(int64_t image, int64_t r, int64_t c) const {
    if (r < 0 || r >= height || c < 0 || c >= width) return kOutside;
    const Line::Entry row = down.in(r), column = across.in(c);
    const int64_t n = slot[(image * rows + row.tile) * columns + column.tile];
    return n < 0 ? kHidden : ((n * edge + row.position) * edge + column.position) * channels;
  }

  // The same of a position of the dense output, or kHidden.
  int64_t output(int64_t image, int64_t r, int64_t c) const {
    const Line::Entry row = down.out(r), column = across.out(c);
    const int64_t n = slot[(image * rows + row.tile) * columns + column.tile];
    return n < 0 ? kHidden : ((n * out_edge_h + row.position) * out_edge_w + column.position) * channels;
  }

  bool in_padding(int64_t r, int64_t c) const { return r >= -top && r < height + bottom && c >= -left && c < width + right; }

  // Number of positions along one side that torch counts for a window that begins at `begin` (padded coordinates start at -before).
  static int64_t span(int64_t begin, int64_t kernel, int64_t size, int64_t after, bool with_pad) {
    const int64_t end = least(begin + kernel, size + after);
    return with_pad ? end - begin : least(end, size) - most<int64_t>(begin, 0);
  }

  double divide_by(int64_t out_r, int64_t out_c) const {
    if (divisor) return static_cast<double>(divisor);
    return static_cast<double>(span(out_r * stride_h - top, kernel_h, height, bottom, count_include_pad) *
                               span(out_c * stride_w - left, kernel_w, width, right, count_include_pad));
  }
};

// best, where = value, mark where value is larger or NaN: the first position stands until a larger one comes; NaN always wins, as in torch.
template <class L>
inline void take_larger(typename L::V& best, typename L::V& where, typename L::V value, typename L::V mark) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename L::V) == 64 && L::count == 16) {
    const __mmask16 wins = _mm512_cmp_ps_mask((__m512)best, (__m512)value, _CMP_LT_OQ) | _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
    best = (typename L::V)_mm512_mask_mov_ps((__m512)best, wins, (__m512)value);
    where = (typename L::V)_mm512_mask_mov_ps((__m512)where, wins, (__m512)mark);
    return;
  }
#endif
  where = L::where_at_most(value, value, L::where_below(best, value, mark, where), mark);
  best = L::where_at_most(value, value, L::where_below(best, value, value, best), value);
}

template <class L>
inline void store_marks(int16_t* to, typename L::V where) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename L::V) == 64 && L::count == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_cvttps_epi32((__m512)where)));
    return;
  }
#endif
  typename L::T marks[L::count];
  L::store_wide(marks, where);
  for (int64_t k = 0; k < L::count; ++k) to[k] = static_cast<int16_t>(marks[k]);
}

// The maximum of one window and the tap that gave it, -1 where that is no position. `at` has room for the taps: where each one reads.
template <class T>
void max_window(const Places& p, const T* x, int64_t image, int64_t out_r, int64_t out_c, int64_t channel, int64_t width, double pad_value, int64_t* at,
                T* out, int16_t* taps) {
  using W = typename Wide<T>::type;
  constexpr W kLowest = -static_cast<W>(__builtin_inf());
  constexpr int64_t kPadding = -3;
  const int64_t count = p.kernel_h * p.kernel_w;
  bool all_real = true;
  for (int64_t u = 0, tap = 0; u < p.kernel_h; ++u)
    for (int64_t v = 0; v < p.kernel_w; ++v, ++tap) {
      const int64_t r = out_r * p.stride_h - p.top + u * p.dilation_h, col = out_c * p.stride_w - p.left + v * p.dilation_w;
      at[tap] = p.input(image, r, col);
      if (at[tap] == Places::kOutside && p.in_padding(r, col)) at[tap] = kPadding;
      all_real = all_real && at[tap] >= 0;
    }
  if (all_real && count == 9) {
    for_lanes<T>(0, width, [&](auto lanes, int64_t c) {
      using L = decltype(lanes);
      const T* from = x + channel + c;
      auto best = L::load(from + at[0]), where = L::all(W{0});
      MWM_UNROLL for (int tap = 1; tap < 9; ++tap) take_larger<L>(best, where, L::load(from + at[tap]), L::all(static_cast<W>(tap)));
      L::store(out + c, best);
      store_marks<L>(taps + c, where);
    });
    return;
  }
  for_lanes<T>(0, width, [&](auto lanes, int64_t c) {
    using L = decltype(lanes);
    auto best = L::all(kLowest), where = L::all(W{-1});
    for (int64_t tap = 0; tap < count; ++tap) {
      const bool real = at[tap] >= 0;
      const auto value = real ? L::load(x + at[tap] + channel + c)
                              : L::all(at[tap] == Places::kHidden ? W{0} : at[tap] == kPadding ? static_cast<W>(pad_value) : kLowest);
      const auto mark = L::all(real ? static_cast<W>(tap) : W{-1});
      if (tap == 0 && real) best = value, where = mark;
      else take_larger<L>(best, where, value, mark);
    }
    L::store(out + c, best);
    store_marks<L>(taps + c, where);
  });
}

template <class T>
void average_window(const Places& p, const T* x, int64_t image, int64_t out_r, int64_t out_c, int64_t channel, int64_t width, T* out) {
  using W = typename Wide<T>::type;
  W sum[kBlock] = {};
  for (int64_t u = 0; u < p.kernel_h; ++u) {
    for (int64_t v = 0; v < p.kernel_w; ++v) {
      const int64_t at = p.input(image, out_r * p.stride_h - p.top + u, out_c * p.stride_w - p.left + v);
      if (at < 0) continue;
      const T* from = x + at + channel;
      for (int64_t c = 0; c < width; ++c) sum[c] += widen(from[c]);
    }
  }
  const W divisor = static_cast<W>(p.divide_by(out_r, out_c));
  for (int64_t c = 0; c < width; ++c) put(out[c], sum[c] / divisor);
}

// Calls seen(tap, output row, output column, storage row) for the windows that see an input position, in order of their outputs.
template <class Function>
inline void each_window(const Places& p, int64_t image, int64_t r, int64_t col, const Function& seen) {
  for (int64_t u = p.kernel_h - 1; u >= 0; --u) {
    const int64_t out_r = p.down.begins(r + p.top - u * p.dilation_h);
    if (out_r < 0) continue;
    for (int64_t v = p.kernel_w - 1; v >= 0; --v) {
      const int64_t out_c = p.across.begins(col + p.left - v * p.dilation_w);
      if (out_c < 0) continue;
      const int64_t row = p.output(image, out_r, out_c);
      if (row >= 0) seen(u * p.kernel_w + v, out_r, out_c, row);
    }
  }
}

// sum + value where the taps are `mark`.
template <class L>
inline typename L::V add_where(typename L::V sum, typename L::V value, const int16_t* taps, int16_t mark) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename L::V) == 64 && L::count == 16) {
    const __mmask16 chosen = _mm256_cmpeq_epi16_mask(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(taps)), _mm256_set1_epi16(mark));
    return (typename L::V)_mm512_mask_add_ps((__m512)sum, chosen, (__m512)sum, (__m512)value);
  }
#endif
  typename L::T chosen[L::count];
  for (int64_t k = 0; k < L::count; ++k) chosen[k] = taps[k] == mark ? 1 : 0;
  return sum + L::where_below(L::all(0), L::load_wide(chosen), value, L::all(0));
}

// Gradient of one input position of a max pool; `at` and `marks` have room for the windows that see it.
template <class T>
void gather_max(const Places& p, const T* grad, const int16_t* taps, int64_t image, int64_t r, int64_t col, int64_t channel, int64_t width, int64_t* at,
                int16_t* marks, T* out) {
  int64_t count = 0;
  each_window(p, image, r, col, [&](int64_t tap, int64_t, int64_t, int64_t row) { at[count] = row + channel, marks[count++] = static_cast<int16_t>(tap); });
  for_lanes<T>(0, width, [&](auto lanes, int64_t c) {
    using L = decltype(lanes);
    auto sum = L::zero();
    for (int64_t i = 0; i < count; ++i) sum = add_where<L>(sum, L::load(grad + at[i] + c), taps + at[i] + c, marks[i]);
    L::store(out + c, sum);
  });
}

template <class T>
void gather_average(const Places& p, const T* grad, int64_t image, int64_t r, int64_t col, int64_t channel, int64_t width, T* out) {
  using W = typename Wide<T>::type;
  W sum[kBlock] = {};
  each_window(p, image, r, col, [&](int64_t, int64_t out_r, int64_t out_c, int64_t row) {
    const W divisor = static_cast<W>(p.divide_by(out_r, out_c));
    const T* from = grad + row + channel;
    for (int64_t c = 0; c < width; ++c) sum[c] += widen(from[c]) / divisor;
  });
  for (int64_t c = 0; c < width; ++c) put(out[c], sum[c]);
}

// Calls body(image, dense row, dense column, storage offset, channel, width) for every position and channel block of tiles [begin, end).
template <class Body>
void each_position(const Places& p, int64_t begin, int64_t end, int64_t edge_h, int64_t edge_w, const Body& body) {
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t i = 0; i < edge_h; ++i) {
      for (int64_t j = 0; j < edge_w; ++j) {
        const int64_t at = ((n * edge_h + i) * edge_w + j) * p.channels;
        for (int64_t channel = 0; channel < p.channels; channel += kBlock)
          body(p.place[3 * n], p.place[3 * n + 1] * edge_h + i, p.place[3 * n + 2] * edge_w + j, at + channel, channel, least(kBlock, p.channels - channel));
      }
    }
  }
}

void check_tiles(const char* name, const View& view, DType dtype) {
  check(name, view, 4, dtype);
  check_channels_last(name, view);
}

int64_t grain(const Pool& p) { return most<int64_t>(1, 8192 / (p.edge * p.edge * p.channels + 1)); }

}  // namespace

void tile_pool_forward(const View& x, const View& coords, const View& slots, const Ints& geometry, double pad_value, const View& out, const View& taps,
                       int64_t threads) {
  check_tiles("tile_pool: x", x, x.dtype);
  check_tiles("tile_pool: out", out, x.dtype);
  check_plan("tile_pool", coords, slots);
  const Places p{Pool(geometry, x, out, coords, slots)};
  if (p.max) {
    check_tiles("tile_pool: taps", taps, DType::kInt16);
    for (int i = 0; i < 4; ++i)
      if (taps.shape[i] != out.shape[i]) fail("tile_pool: taps must have the shape of out");
  }
  with_float("tile_pool", x.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(p.tiles, grain(p), threads, [&](int64_t begin, int64_t end) {
      const Scratch<int64_t> at_tap(p.kernel_h * p.kernel_w);
      each_position(p, begin, end, p.out_edge_h, p.out_edge_w, [&](int64_t image, int64_t r, int64_t c, int64_t at, int64_t channel, int64_t width) {
        if (p.max) max_window(p, pointer<T>(x), image, r, c, channel, width, pad_value, at_tap.data(), pointer<T>(out) + at, pointer<int16_t>(taps) + at);
        else average_window(p, pointer<T>(x), image, r, c, channel, width, pointer<T>(out) + at);
      });
    });
  });
}

void tile_pool_backward(const View& grad, const View& taps, const View& coords, const View& slots, const Ints& geometry, const View& out, int64_t threads) {
  check_tiles("tile_pool: grad", grad, grad.dtype);
  check_tiles("tile_pool: grad_x", out, grad.dtype);
  check_plan("tile_pool", coords, slots);
  const Places p{Pool(geometry, out, grad, coords, slots)};
  if (p.max) {
    check_tiles("tile_pool: taps", taps, DType::kInt16);
    for (int i = 0; i < 4; ++i)
      if (taps.shape[i] != grad.shape[i]) fail("tile_pool: taps must have the shape of grad");
  }
  with_float("tile_pool", grad.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(p.tiles, grain(p), threads, [&](int64_t begin, int64_t end) {
      const Scratch<int64_t> rows(p.kernel_h * p.kernel_w);
      const Scratch<int16_t> marks(p.kernel_h * p.kernel_w);
      each_position(p, begin, end, p.edge, p.edge, [&](int64_t image, int64_t r, int64_t c, int64_t at, int64_t channel, int64_t width) {
        if (p.max) gather_max(p, pointer<T>(grad), pointer<int16_t>(taps), image, r, c, channel, width, rows.data(), marks.data(), pointer<T>(out) + at);
        else gather_average(p, pointer<T>(grad), image, r, c, channel, width, pointer<T>(out) + at);
      });
    });
  });
}

}  // namespace MWM_ISA
}  // namespace mwm
