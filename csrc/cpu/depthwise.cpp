// Depthwise convolution of packed tiles and its derivative in the input: one filter per channel, vectors along the channels.
//
// A task is a range of tiles, taken in groups. Per tile the plan is looked up once: into a table of the source positions under the
// tile's window, hidden ones pointing to zeros, and a list of strips of up to eight positions with the runs of taps that see anything.
// Then, block of channels by block, so that filters and windows stay in the first cache, the sums of a strip stay in registers over
// its runs. The filters of a run stay in registers too, and every input is loaded (and widened) once for all taps that use it.
#include "conv_window.h"
#include "lanes.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int kBlockVectors = 4;

// Runs of taps that have unrolled code; others are cut into these.
constexpr int run_of(int64_t taps) {
  return taps >= 7 ? 7 : taps >= 5 ? 5 : taps >= 3 ? 3 : taps >= 2 ? 2 : 1;
}

// Adds N taps side by side to J positions whose sources lie S columns apart (kStep where S is 0).
template <int J, int NV, int N, int S, class E, class T>
__attribute__((always_inline)) inline void add_taps(const E* const* columns, int64_t step, const T* filters, int64_t filter_step, int64_t channel,
                                                    const Lanes<T>* lanes, typename Simd<T>::Vector (&sum)[NV][J]) {
  using Vector = typename Simd<T>::Vector;
  constexpr int L = kLanes<T>;
  Vector w[NV][N];
  MWM_UNROLL for (int i = 0; i < N; ++i) MWM_UNROLL for (int v = 0; v < NV; ++v) w[v][i] = load(filters + i * filter_step + v * L);
  if constexpr (S == 0) {
    MWM_UNROLL for (int k = 0; k < J; ++k) MWM_UNROLL for (int v = 0; v < NV; ++v)
      sum[v][k] = fused(load_lanes(columns[k * step] + channel + v * L, lanes[v]), w[v][0], sum[v][k]);
  } else {
    MWM_UNROLL for (int c = 0; c < (J - 1) * S + N; ++c) {
      const E* from = columns[c] + channel;
      MWM_UNROLL for (int v = 0; v < NV; ++v) {
        const Vector x = load_lanes(from + v * L, lanes[v]);
        MWM_UNROLL for (int i = 0; i < N; ++i)
          if (c >= i && (c - i) % S == 0 && (c - i) / S < J) sum[v][(c - i) / S] = fused(x, w[v][i], sum[v][(c - i) / S]);
      }
    }
  }
}

// Up to seven taps side by side: their sources, the number of the first, and how many.
template <class E>
struct Run {
  const E* const* columns;
  int32_t tap, taps;
};

// Positions side by side (a stride apart in the adjoint of a strided window, where those share their taps), and their runs.
template <class E>
struct Strip {
  E* out;
  const Run<E>* runs;
  int32_t count, length;
};

template <class E, class T>
struct Depthwise {
  const View &source, &weight, &bias, &target;
  const Neighbours& plan;
  const Window& window;
  const E* zeros;
  bool adjoint;
  // The window of a tile: source rows and columns relative to the tile of the same place.
  int64_t first_row, height, first_column, width;

  Depthwise(const View& source_, const View& weight_, const View& bias_, const View& target_, const Neighbours& plan_, const Window& w, const E* zeros_,
            bool adjoint_)
      : source(source_), weight(weight_), bias(bias_), target(target_), plan(plan_), window(w), zeros(zeros_), adjoint(adjoint_) {
    extent(w.top, (w.kernel_h - 1) * w.dilation_h, &first_row, &height);
    extent(w.left, (w.kernel_w - 1) * w.dilation_w, &first_column, &width);
  }

  void extent(int64_t before, int64_t reach, int64_t* first, int64_t* size) const {
    const int64_t last = plan.target_edge - 1, s = window.stride;
    *first = adjoint ? floor_div(before - reach, s) : -before;
    *size = (adjoint ? floor_div(last + before, s) : last * s + reach - before) - *first + 1;
  }

  int64_t target_step() const { return adjoint ? window.stride : 1; }
  int64_t source_step() const { return adjoint ? 1 : window.stride; }
  // Taps of a run lie one apart in the source; in the adjoint that is a stride backwards in the filter.
  int64_t tap_step() const { return adjoint && window.dilation_w == 1 ? -window.stride : adjoint ? -1 : 1; }
  bool has_runs() const { return sizeof(E) != 8 && window.dilation_w == 1 && source_step() <= 2; }

  // table [height][width] of sources; seen [height][width + 1] counts the visible ones before each column.
  void find(int64_t n, const E** table, int32_t* seen) const {
    const int64_t edge = plan.source_edge, channels = source.shape[1];
    const int32_t* place = plan.coords + 3 * n;
    for (int64_t r = 0; r < height; ++r, table += width, seen += width + 1) {
      const int64_t tile_row = floor_div(first_row + r, edge), position = first_row + r - tile_row * edge, at_row = place[1] + tile_row;
      const int32_t* slots = at_row < 0 || at_row >= plan.rows ? nullptr : plan.slots + (place[0] * plan.rows + at_row) * plan.columns;
      int64_t tile = floor_div(first_column, edge), across = first_column - tile * edge;
      int32_t count = seen[0] = 0;
      for (int64_t c = 0; c < width; ++tile, across = 0) {
        const int64_t at = place[2] + tile;
        const int32_t slot = !slots || at < 0 || at >= plan.columns ? -1 : slots[at];
        const E* from = slot < 0 ? zeros : pointer<E>(source) + ((slot * edge + position) * edge + across) * channels;
        const int64_t step = slot < 0 ? 0 : channels;
        for (; across < edge && c < width; ++across, ++c, from += step) {
          table[c] = from;
          seen[c + 1] = count += slot >= 0;
        }
      }
    }
  }

  // Runs of the positions (i, first + k * target_step), k < length, that see anything; taps in the order of the sources.
  Run<E>* runs_of(int64_t i, int64_t first, int64_t length, const E* const* table, const int32_t* seen, Run<E>* runs) const {
    const Window& w = window;
    const int64_t s = w.stride, reach = (length - 1) * source_step();
    const bool single = length == 1 || !has_runs();
    for (int64_t u = 0; u < w.kernel_h; ++u) {
      int64_t row = adjoint ? i + w.top - u * w.dilation_h : i * s + u * w.dilation_h;
      if (adjoint) {
        const int64_t from = s == 1 ? row : floor_div(row, s);
        if (from * s != row) continue;
        row = from - first_row;
      }
      const int32_t* visible = seen + row * (width + 1);
      if (visible[width] == 0) continue;
      for (int64_t v = adjoint ? w.kernel_w - 1 : 0; v >= 0 && v < w.kernel_w;) {
        int64_t column = adjoint ? first + w.left - v * w.dilation_w : first * s + v * w.dilation_w;
        if (adjoint) {
          const int64_t from = s == 1 ? column : floor_div(column, s);
          if (from * s != column) {
            --v;
            continue;
          }
          column = from - first_column;
        }
        const int taps = single ? 1 : run_of(adjoint ? v / s + 1 : w.kernel_w - v);
        *runs = {table + row * width + column, static_cast<int32_t>(u * w.kernel_w + v), taps};
        runs += visible[column + reach + taps] > visible[column];
        v += single ? (adjoint ? -1 : 1) : taps * tap_step();
      }
    }
    return runs;
  }

  // All strips of tile n; returns the ends of what was written.
  void strips_of(int64_t n, const E* const* table, const int32_t* seen, Strip<E>*& strips, Run<E>*& runs) const {
    const int64_t edge = plan.target_edge, step = target_step();
    for (int64_t i = 0; i < edge; ++i)
      for (int64_t residue = 0; residue < step; ++residue)
        for (int64_t j = residue, left = (edge - residue + step - 1) / step; left > 0;) {
          const int64_t length = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
          Run<E>* end = runs_of(i, j, length, table, seen, runs);
          *strips++ = {pointer<E>(target) + ((n * edge + i) * edge + j) * target.shape[1], runs, static_cast<int32_t>(end - runs), static_cast<int32_t>(length)};
          runs = end;
          left -= length, j += length * step;
        }
  }

  // Filters as [block][tap][channel], zero beyond the last channel.
  void filters_by_block(int64_t block, T* out) const {
    const int64_t channels = source.shape[1], kernel_w = window.kernel_w, taps = window.taps();
    const bool flat = window.kernel_h == 1 || weight.strides[2] == kernel_w * weight.strides[3];
    for (int64_t first = 0; first < channels; first += block, out += taps * block) {
      const int64_t count = least(block, channels - first);
      if (count < block) std::memset(out, 0, static_cast<size_t>(taps * block) * sizeof(T));
      for (int64_t c = 0; c < count; ++c) {
        const E* from = pointer<E>(weight) + (first + c) * weight.strides[0];
        T* to = out + c;
        if (flat && weight.strides[3] == 1) {
          for (int64_t tap = 0; tap < taps; ++tap, to += block) *to = widen(from[tap]);
        } else {
          for (int64_t tap = 0; tap < taps; ++tap, to += block) *to = widen(from[tap / kernel_w * weight.strides[2] + tap % kernel_w * weight.strides[3]]);
        }
      }
    }
  }

  template <int J, int NV, int S>
  __attribute__((noinline)) void sum_strip(const Strip<E>& strip, const T* filters, int64_t block, int64_t channel) const {
    using Vector = typename Simd<T>::Vector;
    constexpr int L = kLanes<T>;
    Vector sum[NV][J];
    Lanes<T> lanes[NV];
    MWM_UNROLL for (int v = 0; v < NV; ++v) {
      lanes[v] = Lanes<T>(source.shape[1] - channel - v * L);
      const Vector start = is_none(bias) ? Vector{} : load_lanes(pointer<E>(bias) + channel + v * L, lanes[v]);
      MWM_UNROLL for (int k = 0; k < J; ++k) sum[v][k] = start;
    }
    const int64_t step = source_step(), filter_step = tap_step() * block;
    for (const Run<E>* run = strip.runs; run < strip.runs + strip.count; ++run) {
      const T* f = filters + run->tap * block;
      if constexpr (S == 0) {
        add_taps<J, NV, 1, 0>(run->columns, step, f, filter_step, channel, lanes, sum);
      } else {
        switch (run->taps) {
          case 7: add_taps<J, NV, 7, S>(run->columns, step, f, filter_step, channel, lanes, sum); break;
          case 5: add_taps<J, NV, 5, S>(run->columns, step, f, filter_step, channel, lanes, sum); break;
          case 3: add_taps<J, NV, 3, S>(run->columns, step, f, filter_step, channel, lanes, sum); break;
          case 2: add_taps<J, NV, 2, S>(run->columns, step, f, filter_step, channel, lanes, sum); break;
          default: add_taps<J, NV, 1, S>(run->columns, step, f, filter_step, channel, lanes, sum);
        }
      }
    }
    const int64_t out_step = target_step() * target.shape[1];
    MWM_UNROLL for (int k = 0; k < J; ++k) MWM_UNROLL for (int v = 0; v < NV; ++v)
      store_lanes(strip.out + k * out_step + channel + v * L, sum[v][k], lanes[v]);
  }

  template <int J, int S>
  void channels_of(const Strip<E>& strip, const T* filters, int64_t channel, int64_t block) const {
    constexpr int NV = J == 8 ? 1 : J == 1 ? 4 : 2, L = kLanes<T>;
    const int64_t end = least(channel + block, source.shape[1]);
    int64_t c = channel;
    for (; c + (NV - 1) * L < end; c += NV * L) sum_strip<J, NV, S>(strip, filters + (c - channel), block, c);
    for (; c < end; c += L) sum_strip<J, 1, S>(strip, filters + (c - channel), block, c);
  }

  template <int S>
  void sum_strips(const Strip<E>* strips, const Strip<E>* end, const T* filters, int64_t channel, int64_t block) const {
    for (; strips < end; ++strips) switch (strips->length) {
        case 8: channels_of<8, S>(*strips, filters, channel, block); break;
        case 4: channels_of<4, S>(*strips, filters, channel, block); break;
        case 2: channels_of<2, S>(*strips, filters, channel, block); break;
        default: channels_of<1, 0>(*strips, filters, channel, block);
      }
  }

  void run(int64_t begin, int64_t end, int64_t block) const {
    constexpr int64_t kListBytes = 1 << 16;
    const int64_t channels = source.shape[1], blocks = (channels + block - 1) / block, edge = plan.target_edge, positions = edge * edge;
    const int64_t table_size = height * width, most_runs = positions * window.taps();
    const int64_t group = least(end - begin, most<int64_t>(1, kListBytes / (table_size * int64_t{sizeof(E*)} + most_runs * int64_t{sizeof(Run<E>)} / 4)));
    Scratch<T> filters(blocks * window.taps() * block);
    Scratch<int32_t> seen(height * (width + 1));
    Scratch<const E*> tables(group * table_size);
    Scratch<Run<E>> runs(group * most_runs + 1);
    Scratch<Strip<E>> strips(group * positions);
    filters_by_block(block, filters.data());
    for (int64_t first = begin; first < end; first += group) {
      Strip<E>* last = strips.data();
      Run<E>* free = runs.data();
      for (int64_t n = first; n < least(first + group, end); ++n) {
        const E** table = tables.data() + (n - first) * table_size;
        find(n, table, seen.data());
        strips_of(n, table, seen.data(), last, free);
      }
      for (int64_t b = 0; b < blocks; ++b) {
        const T* f = filters.data() + b * window.taps() * block;
        if (!has_runs()) sum_strips<0>(strips.data(), last, f, b * block, block);
        else if (source_step() == 1) sum_strips<1>(strips.data(), last, f, b * block, block);
        else sum_strips<2>(strips.data(), last, f, b * block, block);
      }
    }
  }
};

// Vectors of channels in a block: as many as leave the window of a tile and the filters in the first cache.
int64_t block_vectors(int64_t window_positions, int64_t taps, int64_t vectors) {
  constexpr int64_t kBytes = 32768;
  const int64_t fit = kBytes / ((window_positions + taps) * kVectorBytes);
  return least(vectors, fit >= kBlockVectors ? kBlockVectors : fit >= 2 ? 2 : int64_t{1});
}

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
  check(op, workspace, 1, source.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  if (workspace.shape[0] < channels) fail("%s: workspace must have %lld elements", op, static_cast<long long>(channels));
  const int64_t tiles = target.shape[0];
  if (tiles == 0 || target.shape[2] == 0 || channels == 0) return;
  const Neighbours plan(coords, slots, w, target.shape[2], source.shape[2], adjoint);
  with_float(op, source.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename Wide<E>::type;
    E* zeros = pointer<E>(workspace);
    std::memset(zeros, 0, static_cast<size_t>(channels) * sizeof(E));
    const Depthwise<E, T> product(source, weight, bias, target, plan, w, zeros, adjoint);
    const int64_t vectors = (channels + kLanes<T> - 1) / kLanes<T>, per_block = block_vectors(product.height * product.width, w.taps(), vectors);
    const int64_t cost = w.taps() * target.shape[2] * target.shape[2] * vectors;
    parallel_for(tiles, 8192 / (cost + 1) + 1, threads, [&](int64_t begin, int64_t end) { product.run(begin, end, per_block * kLanes<T>); });
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
