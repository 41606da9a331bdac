// Derivative of depthwise convolution in its filters.
//
// A task is a fixed share of the tiles. For each tile the plan is looked up once into a table of source rows under the window; a
// row of taps is then summed in registers over all positions of the tile, vector of channels by vector, and added to the share's
// sums. Shares depend on shapes only and are added in order.
#include "conv_window.h"
#include "simd.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int kTapRun = 8;

template <class T, class E>
inline typename Simd<T>::Vector wide(const E* from) {
  if constexpr (sizeof(E) == sizeof(T)) {
    return load(reinterpret_cast<const T*>(from));
  } else {
    T values[kLanes<T>];
    for (int i = 0; i < kLanes<T>; ++i) values[i] = widen(from[i]);
    return load(values);
  }
}

template <class E, class T>
struct DepthwiseWeight {
  const View &grad, &x, &sums;
  const Neighbours& plan;
  const Window& window;
  const E* zeros;

  // sources [edge][kernel_h][edge][kernel_w]: where each position reads under each tap, `zeros` where nothing is visible.
  void find(int64_t n, const E** sources, bool* seen) const {
    const int64_t edge = plan.target_edge, channels = x.shape[1], column = plan.coords[3 * n + 2];
    for (int64_t i = 0; i < edge; ++i)
      for (int64_t u = 0; u < window.kernel_h; ++u, sources += edge * window.kernel_w, ++seen) {
        int64_t position = 0;
        const int32_t* row = plan.slot_row(n, i, u, &position);
        *seen = false;
        if (!row) continue;
        for (int64_t v = 0; v < window.kernel_w; ++v) {
          const Axis::Entry* across = plan.horizontal.tap(v);
          for (int64_t j = 0; j < edge; ++j) {
            const int64_t at = column + across[j].tile;
            const int32_t slot = at < 0 || at >= plan.columns ? -1 : row[at];
            *seen |= slot >= 0;
            sources[j * window.kernel_w + v] =
                slot < 0 ? zeros : pointer<E>(x) + ((slot * plan.source_edge + position) * plan.source_edge + across[j].position) * channels;
          }
        }
      }
  }

  template <int V>
  void taps(int64_t n, int64_t u, int64_t v, const E* const* sources, const bool* seen, int64_t channel, T* total) const {
    using Vector = typename Simd<T>::Vector;
    const int64_t edge = plan.target_edge, channels = x.shape[1];
    // Rows are summed on their own first where a tile has many positions, which keeps rounding errors small.
    const int64_t rows_at_once = edge > 4 ? 1 : edge;
    for (int64_t first = 0; first < edge; first += rows_at_once) {
      Vector sum[V] = {};
      for (int64_t i = first; i < first + rows_at_once; ++i) {
        if (!seen[i * window.kernel_h + u]) continue;
        const E* g = pointer<E>(grad) + (n * edge + i) * edge * channels + channel;
        const E* const* from = sources + (i * window.kernel_h + u) * edge * window.kernel_w + v;
        for (int64_t j = 0; j < edge; ++j, g += channels, from += window.kernel_w) {
          const Vector y = wide<T>(g);
          MWM_UNROLL for (int k = 0; k < V; ++k) sum[k] = fused(wide<T>(from[k] + channel), y, sum[k]);
        }
      }
      MWM_UNROLL for (int k = 0; k < V; ++k) store(total + k * channels, load(total + k * channels) + sum[k]);
    }
  }

  template <int V>
  void tap_run(int64_t count, int64_t n, int64_t u, int64_t v, const E* const* sources, const bool* seen, int64_t channel, T* total) const {
    if (count == V) return taps<V>(n, u, v, sources, seen, channel, total);
    if constexpr (V > 1) tap_run<V - 1>(count, n, u, v, sources, seen, channel, total);
  }

  // The channels that fill no vector.
  void rest(int64_t n, int64_t u, const E* const* sources, const bool* seen, int64_t first, T* total) const {
    const int64_t edge = plan.target_edge, channels = x.shape[1];
    for (int64_t i = 0; i < edge; ++i) {
      if (!seen[i * window.kernel_h + u]) continue;
      for (int64_t v = 0; v < window.kernel_w; ++v)
        for (int64_t c = first; c < channels; ++c) {
          T row{};
          for (int64_t j = 0; j < edge; ++j) {
            const int64_t at = i * edge + j;
            const E* from = sources[((i * window.kernel_h + u) * edge + j) * window.kernel_w + v];
            row += widen(pointer<E>(grad)[(n * edge * edge + at) * channels + c]) * widen(from[c]);
          }
          total[v * channels + c] += row;
        }
    }
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t edge = plan.target_edge, channels = x.shape[1], tiles = x.shape[0], splits = sums.shape[0], kernel_w = window.kernel_w;
    Scratch<const E*> sources(edge * edge * window.taps());
    Scratch<bool> seen(edge * window.kernel_h);
    for (int64_t split = begin; split < end; ++split) {
      T* total = pointer<T>(sums) + split * window.taps() * channels;
      std::memset(total, 0, static_cast<size_t>(window.taps() * channels) * sizeof(T));
      for (int64_t n = tiles * split / splits; n < tiles * (split + 1) / splits; ++n) {
        find(n, sources.data(), seen.data());
        const int64_t whole = channels / kLanes<T> * kLanes<T>;
        for (int64_t channel = 0; channel < whole; channel += kLanes<T>)
          for (int64_t u = 0; u < window.kernel_h; ++u)
            for (int64_t v = 0; v < kernel_w; v += kTapRun)
              tap_run<kTapRun>(least<int64_t>(kTapRun, kernel_w - v), n, u, v, sources.data(), seen.data(), channel,
                               total + (u * kernel_w + v) * channels + channel);
        if (whole < channels)
          for (int64_t u = 0; u < window.kernel_h; ++u) rest(n, u, sources.data(), seen.data(), whole, total + u * kernel_w * channels);
      }
    }
  }
};

}  // namespace

void depthwise_grad_weight(const View& grad, const View& x, const View& coords, const View& slots, const Ints& geometry, const View& sums,
                           const View& out, int64_t threads) {
  const char* op = "depthwise_grad_weight";
  const Window w = window_of(op, geometry, out.shape[2], out.shape[3]);
  check(op, x, 4);
  check(op, grad, 4, x.dtype);
  check(op, out, 4, x.dtype);
  check_channels_last(op, x);
  check_channels_last(op, grad);
  check_plan(op, coords, slots);
  const int64_t channels = x.shape[1], count = w.taps() * channels;
  if (x.shape[0] != coords.shape[0] || grad.shape[0] != coords.shape[0]) fail("%s: x and grad must have the plan's number of tiles", op);
  if (x.shape[2] != x.shape[3] || grad.shape[2] != grad.shape[3] || grad.shape[2] * w.stride != x.shape[2]) fail("%s: tiles do not fit the stride", op);
  if (out.shape[0] != channels || out.shape[1] != 1 || grad.shape[1] != channels || w.groups != channels) fail("%s: out must be [C, 1, kh, kw]", op);
  check(op, sums, 2, x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  check_contiguous(op, sums);
  if (sums.shape[0] < 1 || sums.shape[1] != count) fail("%s: sums must be [splits, filter elements]", op);
  if (count == 0) return;
  const Neighbours plan(coords, slots, w, grad.shape[2], x.shape[2], false);
  with_float(op, x.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename Wide<E>::type;
    Scratch<E> zeros(channels);
    std::memset(zeros.data(), 0, static_cast<size_t>(channels) * sizeof(E));
    const DepthwiseWeight<E, T> product{grad, x, sums, plan, w, zeros.data()};
    parallel_for(sums.shape[0], 1, threads, [&](int64_t begin, int64_t end) { product.run(begin, end); });
    for (int64_t tap = 0; tap < w.taps(); ++tap)
      for (int64_t c = 0; c < channels; ++c) {
        T total{};
        for (int64_t split = 0; split < sums.shape[0]; ++split) total += pointer<T>(sums)[split * count + tap * channels + c];
        pointer<E>(out)[c * out.strides[0] + tap / w.kernel_w * out.strides[2] + tap % w.kernel_w * out.strides[3]] = narrow<E>(total);
      }
  });
}

}  // namespace MWM_ISA
}  // namespace mwm
