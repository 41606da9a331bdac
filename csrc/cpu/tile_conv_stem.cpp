// Windows over few channels: a tile and what its windows reach are copied once into a small map, zero where hidden, so that a
// row of taps is one run of kernel_w * C values for every position, and the sums stay in registers over the whole window.
// A task is a tile and a panel of filters (forward), or a fixed share of the tiles and a panel (derivative in the filters).
#include "conv_stem.h"

#include "conv_block.h"

namespace mwm {
namespace MWM_ISA {
namespace {

// The map under the windows of one tile, [height][width][C] in the type of the sums.
template <class E, class T>
struct Halo {
  int64_t channels, height, row;
  Scratch<T> values;
  Scratch<bool> seen;  // rows with any visible position

  Halo(int64_t c, const Window& w, int64_t edge)
      : channels(c), height((edge - 1) * w.stride + (w.kernel_h - 1) * w.dilation_h + 1), row(((edge - 1) * w.stride + w.kernel_w) * c),
        values(height * row), seen(height) {}

  void fill(const View& x, const Neighbours& plan, const Window& w, int64_t n) {
    const int64_t edge = plan.source_edge, width = row / channels;
    for (int64_t y = 0; y < height; ++y) {
      T* out = values.data() + y * row;
      const int64_t above = floor_div(y - w.top, edge), position = y - w.top - above * edge, patch_row = plan.coords[3 * n + 1] + above;
      seen[y] = false;
      if (patch_row < 0 || patch_row >= plan.rows) continue;
      const int32_t* slots = plan.slots + (plan.coords[3 * n] * plan.rows + patch_row) * plan.columns;
      int64_t tile = floor_div(-w.left, edge), across = -w.left - tile * edge;
      for (int64_t c = 0; c < width; ++tile, across = 0) {
        const int64_t at = plan.coords[3 * n + 2] + tile, count = least(edge - across, width - c);
        const int32_t slot = at < 0 || at >= plan.columns ? -1 : slots[at];
        if (slot < 0) {
          std::memset(out, 0, static_cast<size_t>(count * channels) * sizeof(T));
        } else {
          const E* from = pointer<E>(x) + ((slot * edge + position) * edge + across) * channels;
          for (int64_t i = 0; i < count * channels; ++i) out[i] = widen(from[i]);
          seen[y] = true;
        }
        out += count * channels;
        c += count;
      }
    }
  }
};

// out[r] = sum over `rows` runs of a[r * step ..] * b, a run of `depth` values each; `skip` tells which runs are hidden.
template <int MR, int NV, class T>
inline void window_block(const T* a, int64_t step, int64_t row, int64_t rows, const bool* seen, int64_t seen_step, int64_t depth, const T* b, T* out) {
  using Vector = typename Simd<T>::Vector;
  constexpr int L = kLanes<T>;
  Vector sum[MR][NV] = {};
  for (int64_t u = 0; u < rows; ++u, a += row, b += depth * NV * L) {
    if (!seen[u * seen_step]) continue;
    const T *x = a, *filter = b;
    for (int64_t p = 0; p < depth; ++p, ++x, filter += NV * L) {
      Vector panel[NV];
      MWM_UNROLL for (int v = 0; v < NV; ++v) panel[v] = load(filter + v * L);
      MWM_UNROLL for (int r = 0; r < MR; ++r) {
        const Vector value = repeat(x[r * step]);
        MWM_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = fused(value, panel[v], sum[r][v]);
      }
    }
  }
  MWM_UNROLL for (int r = 0; r < MR; ++r) MWM_UNROLL for (int v = 0; v < NV; ++v) store(out + (r * NV + v) * L, sum[r][v]);
}

template <int MR, int NV, class T>
inline void window_rows(int64_t count, const T* a, int64_t step, int64_t row, int64_t rows, const bool* seen, int64_t seen_step, int64_t depth,
                        const T* b, T* out) {
  if (count == MR) return window_block<MR, NV>(a, step, row, rows, seen, seen_step, depth, b, out);
  if constexpr (MR > 1) window_rows<MR - 1, NV>(count, a, step, row, rows, seen, seen_step, depth, b, out);
}

template <class E>
void forward(const View& x, const Neighbours& plan, const Window& w, const Filters& filters, const void* packed, const View& bias, const View& out,
             int64_t threads) {
  using T = typename Wide<E>::type;
  const int64_t edge = plan.target_edge, channels = x.shape[1], outputs = out.shape[1], depth = w.kernel_w * channels;
  parallel_for(out.shape[0], 1, threads, [&](int64_t begin, int64_t end) {
    Halo<E, T> halo(channels, w, edge);
    T sums[kMaxBlockRows * kPanel<T>];
    for (int64_t n = begin; n < end; ++n) {
      halo.fill(x, plan, w, n);
      for (int64_t panel = 0; panel < filters.panels<T>(); ++panel) {
        const int64_t first = panel * kPanel<T>, lanes = least<int64_t>(kPanel<T>, outputs - first);
        const T* filter = static_cast<const T*>(packed) + filters.offset<T>(0, panel);
        T added[kPanel<T>] = {};
        if (!is_none(bias))
          for (int64_t lane = 0; lane < lanes; ++lane) added[lane] = widen(pointer<E>(bias)[first + lane]);
        with_vectors(filters.vectors<T>(panel), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value, MR = block_rows(NV);
          for (int64_t i = 0; i < edge; ++i)
            for (int64_t j = 0; j < edge; j += MR) {
              const int64_t count = least<int64_t>(MR, edge - j);
              window_rows<MR, NV>(count, halo.values.data() + i * w.stride * halo.row + j * w.stride * channels, w.stride * channels,
                                  w.dilation_h * halo.row, w.kernel_h, halo.seen.data() + i * w.stride, w.dilation_h, depth, filter, sums);
              E* to = pointer<E>(out) + ((n * edge + i) * edge + j) * outputs + first;
              for (int64_t r = 0; r < count; ++r, to += outputs)
                for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = narrow<E>(sums[r * NV * kLanes<T> + lane] + added[lane]);
            }
        });
      }
    }
  });
}

// sums[r] += over the tile's positions (i, j) of a(i, j)[r] * b(i, j).
template <int MR, int NV, class T>
inline void window_outer(const T* a, int64_t a_row, int64_t a_step, const bool* seen, int64_t seen_step, const T* b, int64_t b_step, int64_t edge, T* sums) {
  using Vector = typename Simd<T>::Vector;
  constexpr int L = kLanes<T>;
  Vector sum[MR][NV] = {};
  for (int64_t i = 0; i < edge; ++i, a += a_row, b += edge * b_step) {
    if (!seen[i * seen_step]) continue;
    const T *x = a, *y = b;
    for (int64_t j = 0; j < edge; ++j, x += a_step, y += b_step) {
      Vector panel[NV];
      MWM_UNROLL for (int v = 0; v < NV; ++v) panel[v] = load(y + v * L);
      MWM_UNROLL for (int r = 0; r < MR; ++r) {
        const Vector value = repeat(x[r]);
        MWM_UNROLL for (int v = 0; v < NV; ++v) sum[r][v] = fused(value, panel[v], sum[r][v]);
      }
    }
  }
  MWM_UNROLL for (int r = 0; r < MR; ++r)
    MWM_UNROLL for (int v = 0; v < NV; ++v) store(sums + (r * NV + v) * L, load(sums + (r * NV + v) * L) + sum[r][v]);
}

template <int MR, int NV, class T>
inline void outer_rows(int64_t count, const T* a, int64_t a_row, int64_t a_step, const bool* seen, int64_t seen_step, const T* b, int64_t b_step,
                       int64_t edge, T* sums) {
  if (count == MR) return window_outer<MR, NV>(a, a_row, a_step, seen, seen_step, b, b_step, edge, sums);
  if constexpr (MR > 1) outer_rows<MR - 1, NV>(count, a, a_row, a_step, seen, seen_step, b, b_step, edge, sums);
}

template <class E>
void grad_weight(const View& grad, const View& x, const Neighbours& plan, const Window& w, const View& sums, int64_t threads) {
  using T = typename Wide<E>::type;
  const int64_t edge = plan.target_edge, channels = x.shape[1], outputs = grad.shape[1], depth = w.kernel_w * channels, positions = edge * edge;
  const int64_t splits = sums.shape[0], tiles = grad.shape[0], panels = (outputs + kPanel<T> - 1) / kPanel<T>;
  parallel_for(splits * panels, 1, threads, [&](int64_t begin, int64_t end) {
    Halo<E, T> halo(channels, w, edge);
    Scratch<T> copy(positions * kPanel<T>), total(w.kernel_h * depth * kPanel<T>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task / panels, first = task % panels * kPanel<T>, lanes = least<int64_t>(kPanel<T>, outputs - first);
      with_vectors(static_cast<int>((lanes + kLanes<T> - 1) / kLanes<T>), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value, MR = block_rows(NV), width = NV * kLanes<T>;
        std::memset(total.data(), 0, static_cast<size_t>(w.kernel_h * depth * width) * sizeof(T));
        for (int64_t n = tiles * split / splits; n < tiles * (split + 1) / splits; ++n) {
          halo.fill(x, plan, w, n);
          const E* from = pointer<E>(grad) + n * positions * outputs + first;
          for (int64_t i = 0; i < positions; ++i) {
            T* to = copy.data() + i * width;
            for (int64_t lane = 0; lane < lanes; ++lane) to[lane] = widen(from[i * outputs + lane]);
            for (int64_t lane = lanes; lane < width; ++lane) to[lane] = 0;
          }
          for (int64_t u = 0; u < w.kernel_h; ++u)
            for (int64_t p = 0; p < depth; p += MR)
              outer_rows<MR, NV>(least<int64_t>(MR, depth - p), halo.values.data() + u * w.dilation_h * halo.row + p, w.stride * halo.row,
                                 w.stride * channels, halo.seen.data() + u * w.dilation_h, w.stride, copy.data(), width, edge,
                                 total.data() + (u * depth + p) * width);
        }
        T* out = pointer<T>(sums) + (split * outputs + first) * w.kernel_h * depth;
        for (int64_t lane = 0; lane < lanes; ++lane)
          for (int64_t p = 0; p < w.kernel_h * depth; ++p) *out++ = total[p * width + lane];
      });
    }
  });
}

}  // namespace

void stem_forward(const View& x, const Neighbours& plan, const Window& w, const Filters& filters, const void* panels, const View& bias, const View& out,
                  int64_t threads) {
  with_float("tile_conv", x.dtype, [&](auto element) { forward<decltype(element)>(x, plan, w, filters, panels, bias, out, threads); });
}

void stem_grad_weight(const View& grad, const View& x, const Neighbours& plan, const Window& w, const View& sums, int64_t threads) {
  with_float("tile_conv_grad_weight", x.dtype, [&](auto element) { grad_weight<decltype(element)>(grad, x, plan, w, sums, threads); });
}

}  // namespace MWM_ISA
}  // namespace mwm
