// Pooling over packed tiles. Work is cut by tile; the inner loops run over channels, which lie side by side. The backward is written
// as a gather (each input position asks the windows that see it), so no two threads add to one place.
#include "isa.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int64_t kBlock = 128;

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

  // Where a position of the dense input is stored: its row of channels, kHidden or kOutside.
  static constexpr int64_t kHidden = -1, kOutside = -2;
  int64_t input(int64_t image, int64_t r, int64_t c) const {
    if (r < 0 || r >= height || c < 0 || c >= width) return kOutside;
    const int64_t n = slot[(image * rows + r / edge) * columns + c / edge];
    return n < 0 ? kHidden : ((n * edge + r % edge) * edge + c % edge) * channels;
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

template <class T>
void max_window(const Pool& p, const T* x, int64_t image, int64_t out_r, int64_t out_c, int64_t channel, int64_t width, double pad_value, T* out,
                int16_t* taps) {
  using W = typename Wide<T>::type;
  constexpr W kLowest = -static_cast<W>(__builtin_inf());
  W best[kBlock];
  int16_t where[kBlock];
  for (int64_t c = 0; c < kBlock; ++c) best[c] = kLowest, where[c] = -1;
  for (int64_t u = 0, tap = 0; u < p.kernel_h; ++u) {
    for (int64_t v = 0; v < p.kernel_w; ++v, ++tap) {
      const int64_t r = out_r * p.stride_h - p.top + u * p.dilation_h, col = out_c * p.stride_w - p.left + v * p.dilation_w;
      const int64_t at = p.input(image, r, col);
      if (at >= 0) {
        const T* from = x + at + channel;
        const int16_t mark = static_cast<int16_t>(tap);
        // The first position stands until a larger one comes; NaN always wins, as in torch.
        for (int64_t c = 0; c < width; ++c) {
          const W value = widen(from[c]);
          const bool wins = value > best[c] || value != value || tap == 0;
          best[c] = wins ? value : best[c];
          where[c] = wins ? mark : where[c];
        }
      } else {
        const W value = at == Pool::kHidden ? W{0} : p.in_padding(r, col) ? static_cast<W>(pad_value) : kLowest;
        for (int64_t c = 0; c < width; ++c) {
          const bool wins = value > best[c] || value != value;
          best[c] = wins ? value : best[c];
          where[c] = wins ? static_cast<int16_t>(-1) : where[c];
        }
      }
    }
  }
  for (int64_t c = 0; c < width; ++c) put(out[c], best[c]), taps[c] = where[c];
}

template <class T>
void average_window(const Pool& p, const T* x, int64_t image, int64_t out_r, int64_t out_c, int64_t channel, int64_t width, T* out) {
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

// Gradient of one input position: the windows that see it, in window order of their output positions.
template <class T>
void gather_gradient(const Pool& p, const T* grad, const int16_t* taps, int64_t image, int64_t r, int64_t col, int64_t channel, int64_t width, T* out) {
  using W = typename Wide<T>::type;
  W sum[kBlock] = {};
  for (int64_t u = p.kernel_h - 1; u >= 0; --u) {
    const int64_t row = r + p.top - u * p.dilation_h;
    if (row < 0 || row % p.stride_h || row / p.stride_h >= p.out_height) continue;
    for (int64_t v = p.kernel_w - 1; v >= 0; --v) {
      const int64_t column = col + p.left - v * p.dilation_w;
      if (column < 0 || column % p.stride_w || column / p.stride_w >= p.out_width) continue;
      const int64_t out_r = row / p.stride_h, out_c = column / p.stride_w;
      const int64_t n = p.slot[(image * p.rows + out_r / p.out_edge_h) * p.columns + out_c / p.out_edge_w];
      if (n < 0) continue;
      const int64_t at = ((n * p.out_edge_h + out_r % p.out_edge_h) * p.out_edge_w + out_c % p.out_edge_w) * p.channels + channel;
      if (p.max) {
        const int16_t mark = static_cast<int16_t>(u * p.kernel_w + v);
        for (int64_t c = 0; c < width; ++c) sum[c] += taps[at + c] == mark ? widen(grad[at + c]) : W{0};
      } else {
        const W divisor = static_cast<W>(p.divide_by(out_r, out_c));
        for (int64_t c = 0; c < width; ++c) sum[c] += widen(grad[at + c]) / divisor;
      }
    }
  }
  for (int64_t c = 0; c < width; ++c) put(out[c], sum[c]);
}

// Calls body(image, dense row, dense column, storage offset, channel, width) for every position and channel block of tiles [begin, end).
template <class Body>
void each_position(const Pool& p, int64_t begin, int64_t end, int64_t edge_h, int64_t edge_w, const Body& body) {
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
  const Pool p(geometry, x, out, coords, slots);
  if (p.max) {
    check_tiles("tile_pool: taps", taps, DType::kInt16);
    for (int i = 0; i < 4; ++i)
      if (taps.shape[i] != out.shape[i]) fail("tile_pool: taps must have the shape of out");
  }
  with_float("tile_pool", x.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(p.tiles, grain(p), threads, [&](int64_t begin, int64_t end) {
      each_position(p, begin, end, p.out_edge_h, p.out_edge_w, [&](int64_t image, int64_t r, int64_t c, int64_t at, int64_t channel, int64_t width) {
        if (p.max) max_window(p, pointer<T>(x), image, r, c, channel, width, pad_value, pointer<T>(out) + at, pointer<int16_t>(taps) + at);
        else average_window(p, pointer<T>(x), image, r, c, channel, width, pointer<T>(out) + at);
      });
    });
  });
}

void tile_pool_backward(const View& grad, const View& taps, const View& coords, const View& slots, const Ints& geometry, const View& out, int64_t threads) {
  check_tiles("tile_pool: grad", grad, grad.dtype);
  check_tiles("tile_pool: grad_x", out, grad.dtype);
  check_plan("tile_pool", coords, slots);
  const Pool p(geometry, out, grad, coords, slots);
  if (p.max) {
    check_tiles("tile_pool: taps", taps, DType::kInt16);
    for (int i = 0; i < 4; ++i)
      if (taps.shape[i] != grad.shape[i]) fail("tile_pool: taps must have the shape of grad");
  }
  with_float("tile_pool", grad.dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(p.tiles, grain(p), threads, [&](int64_t begin, int64_t end) {
      each_position(p, begin, end, p.edge, p.edge, [&](int64_t image, int64_t r, int64_t c, int64_t at, int64_t channel, int64_t width) {
        gather_gradient(p, pointer<T>(grad), pointer<int16_t>(taps), image, r, c, channel, width, pointer<T>(out) + at);
      });
    });
  });
}

}  // namespace MWM_ISA
}  // namespace mwm
