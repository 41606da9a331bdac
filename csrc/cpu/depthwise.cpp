// Depthwise convolution of packed tiles and its derivative in the input: one filter per channel, vectors along the channels.
//
// A task is a share of the tile rows. For each strip of up to kStrip target positions the plan is looked up once: it gives, for
// every tap row, the sources of the strip's columns, and hidden ones point to a row of zeros. Tap rows that see nothing are left
// out. Then the sums of the strip stay in registers over all taps, vector by vector.
#include "conv_window.h"
#include "simd.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int kStrip = 8;

// Weight [C, 1, kh, kw] as [tap][channel] in the type of the sums.
template <class E, class T>
void filters_by_tap(const View& weight, T* out) {
  const int64_t channels = weight.shape[0], kernel_h = weight.shape[2], kernel_w = weight.shape[3];
  const E* from = pointer<E>(weight);
  for (int64_t u = 0; u < kernel_h; ++u)
    for (int64_t v = 0; v < kernel_w; ++v, out += channels)
      for (int64_t c = 0; c < channels; ++c) out[c] = widen(from[c * weight.strides[0] + u * weight.strides[2] + v * weight.strides[3]]);
}

// A vector of values, widened; with kWhole all lanes exist, else `lanes` do and the rest is zero.
template <bool kWhole, class T, class E>
inline typename Simd<T>::Vector load_wide(const E* from, int64_t lanes) {
  constexpr int L = kLanes<T>;
  if constexpr (kWhole && sizeof(E) == sizeof(T)) {
    return load(reinterpret_cast<const T*>(from));
  } else {
    T values[L] = {};
    for (int64_t i = 0; i < (kWhole ? L : lanes); ++i) values[i] = widen(from[i]);
    return load(values);
  }
}

template <bool kWhole, class T, class E>
inline void store_narrow(E* to, typename Simd<T>::Vector x, int64_t lanes) {
  constexpr int L = kLanes<T>;
  if constexpr (kWhole && sizeof(E) == sizeof(T)) {
    store(reinterpret_cast<T*>(to), x);
  } else {
    T values[L];
    store(values, x);
    for (int64_t i = 0; i < (kWhole ? L : lanes); ++i) to[i] = narrow<E>(values[i]);
  }
}

// What a strip sees: the source columns of every tap row, and for every tap that sees anything its first column.
template <class E>
struct Strip {
  struct Entry {
    const E* const* columns;
    int64_t tap;
  };
  int64_t width;
  Scratch<const E*> columns;  // [kernel_h][width]
  Scratch<int32_t> seen;      // [width + 1] visible columns before each
  Scratch<Entry> entries;     // [kernel_h * kernel_w]
  int64_t count = 0, step = 1;

  Strip(const Window& w, bool adjoint)
      : width((kStrip - 1) * (adjoint ? 1 : w.stride) + (w.kernel_w - 1) * w.dilation_w + 2), columns(w.kernel_h * width), seen(width + 1),
        entries(w.taps()) {}
};

template <class E, class T>
struct Depthwise {
  const View &source, &bias, &target;
  const Neighbours& plan;
  const Window& window;
  const T* filters;
  const E* zeros;
  bool adjoint;

  // Entries of the strip of positions (i, first + k * step), k < length, of tile n. In the adjoint of a strided window, positions
  // that lie a stride apart share their taps and read neighbouring columns.
  void find(Strip<E>& strip, int64_t n, int64_t i, int64_t first, int64_t length) const {
    const int64_t channels = source.shape[1], column = plan.coords[3 * n + 2], edge = plan.source_edge, s = window.stride;
    const int64_t reach = (window.kernel_w - 1) * window.dilation_w;
    const int64_t origin = adjoint ? floor_div(first + window.left - reach, s) : first * s - window.left;
    const int64_t width = adjoint ? floor_div(first + window.left, s) - origin + length : (length - 1) * s + reach + 1;
    strip.step = adjoint ? 1 : s;
    strip.count = 0;
    for (int64_t u = 0; u < window.kernel_h; ++u) {
      int64_t position;
      const int32_t* row = plan.slot_row(n, i, u, &position);
      if (!row) continue;
      const E** columns = strip.columns.data() + u * strip.width;
      int64_t tile = floor_div(origin, edge), across = origin - tile * edge;
      strip.seen[0] = 0;
      for (int64_t c = 0; c < width; ++tile, across = 0) {
        const int64_t at = column + tile;
        const int32_t slot = at < 0 || at >= plan.columns ? -1 : row[at];
        const E* from = slot < 0 ? zeros : pointer<E>(source) + ((slot * edge + position) * edge + across) * channels;
        for (; across < edge && c < width; ++across, ++c) {
          columns[c] = from;
          strip.seen[c + 1] = strip.seen[c] + (slot >= 0);
          if (slot >= 0) from += channels;
        }
      }
      for (int64_t v = 0; v < window.kernel_w; ++v) {
        int64_t begin = v * window.dilation_w;
        if (adjoint) {
          const int64_t distance = first + window.left - begin;
          begin = floor_div(distance, s) - origin;
          if ((begin + origin) * s != distance) continue;
        }
        if (strip.seen[begin + (length - 1) * strip.step + 1] > strip.seen[begin]) strip.entries[strip.count++] = {columns + begin, u * window.kernel_w + v};
      }
    }
  }

  template <int J, int NV, bool kWhole, bool kUnitStep>
  void multiply(const Strip<E>& strip, int64_t channel, int64_t lanes, E* const* out) const {
    using Vector = typename Simd<T>::Vector;
    constexpr int L = kLanes<T>;
    const int64_t channels = source.shape[1], step = kUnitStep ? 1 : strip.step;
    Vector sum[J][NV];
    MWM_UNROLL for (int v = 0; v < NV; ++v) {
      const Vector start = is_none(bias) ? Vector{} : load_wide<kWhole, T>(pointer<E>(bias) + channel + v * L, lanes);
      MWM_UNROLL for (int k = 0; k < J; ++k) sum[k][v] = start;
    }
    for (int64_t i = 0; i < strip.count; ++i) {
      const E* const* from = strip.entries[i].columns;
      const T* filter = filters + strip.entries[i].tap * channels + channel;
      Vector w[NV];
      MWM_UNROLL for (int v = 0; v < NV; ++v) w[v] = load_wide<kWhole, T>(filter + v * L, lanes);
      MWM_UNROLL for (int k = 0; k < J; ++k) {
        const E* x = from[k * step] + channel;
        MWM_UNROLL for (int v = 0; v < NV; ++v) sum[k][v] = fused(load_wide<kWhole, T>(x + v * L, lanes), w[v], sum[k][v]);
      }
    }
    MWM_UNROLL for (int k = 0; k < J; ++k)
      MWM_UNROLL for (int v = 0; v < NV; ++v) store_narrow<kWhole, T>(out[k] + channel + v * L, sum[k][v], lanes);
  }

  template <int J, bool kUnitStep>
  void channels_of(const Strip<E>& strip, E* const* out) const {
    constexpr int NV = J >= 8 ? 2 : J >= 4 ? 4 : 8;
    constexpr int64_t width = NV * kLanes<T>;
    const int64_t channels = source.shape[1];
    int64_t channel = 0;
    for (; channel + width <= channels; channel += width) multiply<J, NV, true, kUnitStep>(strip, channel, width, out);
    for (; channel + kLanes<T> <= channels; channel += kLanes<T>) multiply<J, 1, true, kUnitStep>(strip, channel, kLanes<T>, out);
    if (channel < channels) multiply<J, 1, false, kUnitStep>(strip, channel, channels - channel, out);
  }

  template <int J>
  void strip_of(Strip<E>& strip, int64_t n, int64_t i, int64_t first, int64_t step) const {
    find(strip, n, i, first, J);
    E* out[J];
    for (int k = 0; k < J; ++k) out[k] = pointer<E>(target) + ((n * plan.target_edge + i) * plan.target_edge + first + k * step) * target.shape[1];
    if (strip.step == 1) channels_of<J, true>(strip, out);
    else channels_of<J, false>(strip, out);
  }

  void run(int64_t begin, int64_t end) const {
    Strip<E> strip(window, adjoint);
    const int64_t edge = plan.target_edge, step = adjoint ? window.stride : 1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / edge, i = unit - n * edge;
      for (int64_t residue = 0; residue < step; ++residue) {
        int64_t j = residue, left = (edge - residue + step - 1) / step;
        for (; left >= 8; left -= 8, j += 8 * step) strip_of<8>(strip, n, i, j, step);
        for (; left >= 4; left -= 4, j += 4 * step) strip_of<4>(strip, n, i, j, step);
        for (; left >= 2; left -= 2, j += 2 * step) strip_of<2>(strip, n, i, j, step);
        for (; left >= 1; left -= 1, j += step) strip_of<1>(strip, n, i, j, step);
      }
    }
  }
};

void run(const char* op, const View& source, const View& weight, const View& bias, const View& coords, const View& slots, const Ints& geometry,
         const View& workspace, const View& target, int64_t threads, bool adjoint) {
  const Window w = window_of(op, geometry, weight.shape[2], weight.shape[3]);
  check(op, source, 4);
  check(op, weight, 4, source.dtype);
  check(op, target, 4, source.dtype);
  check_channels_last(op, source);
  check_channels_last(op, target);
  check_plan(op, coords, slots);
  const View &x = adjoint ? target : source, &y = adjoint ? source : target;
  const int64_t channels = x.shape[1];
  if (x.shape[0] != coords.shape[0] || y.shape[0] != coords.shape[0]) fail("%s: x and out must have the plan's number of tiles", op);
  if (x.shape[2] != x.shape[3] || y.shape[2] != y.shape[3] || y.shape[2] * w.stride != x.shape[2]) fail("%s: tiles do not fit the stride", op);
  if (weight.shape[0] != channels || weight.shape[1] != 1 || y.shape[1] != channels || w.groups != channels) fail("%s: weight must be [C, 1, kh, kw]", op);
  if (!is_none(bias)) {
    check(op, bias, 1, source.dtype);
    check_contiguous(op, bias);
    if (bias.shape[0] != channels) fail("%s: bias does not fit the channels", op);
  }
  const bool wide = source.dtype == DType::kFloat64;
  check(op, workspace, 1, wide ? DType::kFloat64 : DType::kFloat32);
  if (workspace.shape[0] < (w.taps() + 1) * channels) fail("%s: workspace must have %lld elements", op, static_cast<long long>((w.taps() + 1) * channels));
  const int64_t units = target.shape[0] * target.shape[2];
  if (units == 0 || channels == 0) return;
  const Neighbours plan(coords, slots, w, target.shape[2], source.shape[2], adjoint);
  with_float(op, source.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename Wide<E>::type;
    T* filters = pointer<T>(workspace);
    filters_by_tap<E>(weight, filters);
    E* zeros = reinterpret_cast<E*>(filters + w.taps() * channels);
    std::memset(zeros, 0, static_cast<size_t>(channels) * sizeof(E));
    const Depthwise<E, T> product{source, bias, target, plan, w, filters, zeros, adjoint};
    parallel_for(units, plan.target_edge, threads, [&](int64_t begin, int64_t end) { product.run(begin, end); });
  });
}

}  // namespace

void depthwise_forward(const View& x, const View& weight, const View& bias, const View& coords, const View& slots, const Ints& geometry,
                       const View& workspace, const View& out, int64_t threads) {
  run("depthwise", x, weight, bias, coords, slots, geometry, workspace, out, threads, false);
}

void depthwise_grad_input(const View& grad, const View& weight, const View& coords, const View& slots, const Ints& geometry, const View& workspace,
                          const View& out, int64_t threads) {
  run("depthwise_grad_input", grad, weight, View{}, coords, slots, geometry, workspace, out, threads, true);
}

}  // namespace MWM_ISA
}  // namespace mwm
