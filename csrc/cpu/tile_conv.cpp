// Convolution of packed tiles and its derivative in the input: one implicit GEMM, driven by pairs (target row, source row).
//
// A task is a chunk of target rows and a few panels of output channels. For every tap the plan lists the rows whose neighbour is
// visible; blocks of them are multiplied with the tap's filters and added to the chunk's sums. Nothing is materialised, and
// hidden neighbours cost nothing, row by row. A sum runs over taps, then inputs, in order, so that neither chunks nor threads
// change it.
#include "conv_block.h"
#include "conv_filters.h"
#include "conv_stem.h"
#include "conv_window.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int64_t kChunkRows = 256, kDepthBlock = 128, kSumBytes = 1 << 17, kLargeFilters = 1 << 20, kFewRows = 1024;

// Reads blocks of rows as the register block wants them: in place, or converted into a scratch.
template <class E, class P, class T>
struct RowBlock {
  Scratch<P> converted{kMaxBlockRows * kDepthBlock};
  const P* rows[kMaxBlockRows];

  template <int MR>
  void read(const E* x, int64_t channels, const int64_t* source, int64_t offset, int64_t depth) {
    for (int r = 0; r < MR; ++r) {
      const E* from = x + source[r] * channels + offset;
      if constexpr (sizeof(E) == sizeof(P)) {
        rows[r] = reinterpret_cast<const P*>(from);
      } else {
        P* to = converted.data() + r * kDepthBlock;
        for (int64_t p = 0; p < depth; ++p) to[p] = widen(from[p]);
        rows[r] = to;
      }
    }
  }
};

template <class W, class E, class P, class T>
struct Product {
  const View &source, &bias, &target;
  const Neighbours& plan;
  const Filters& filters;
  const P* panels;
  int64_t units, units_per_chunk, panel_count, panels_per_task;
  bool chunks_outside, pack_inside;  // pack_inside: a task packs its filters tap by tap into a scratch that stays in its cache

  int64_t chunks() const { return (units + units_per_chunk - 1) / units_per_chunk; }
  int64_t panel_blocks() const { return (panel_count + panels_per_task - 1) / panels_per_task; }

  void run(int64_t begin, int64_t end) const {
    const int64_t rows = units_per_chunk * plan.target_edge;
    Scratch<T> sums(panels_per_task * (rows + 1) * kPanel<T>);
    Scratch<int64_t> targets(rows + kMaxBlockRows), sources(rows + kMaxBlockRows);
    Scratch<P> tap_filters(pack_inside ? filters.depth * kPanel<T> : 1);
    RowBlock<E, P, T> block;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = chunks_outside ? task / panel_blocks() : task % chunks();
      const int64_t first = (chunks_outside ? task % panel_blocks() : task / chunks()) * panels_per_task;
      multiply(chunk, first, least(first + panels_per_task, panel_count), sums.data(), targets.data(), sources.data(), tap_filters.data(), block);
    }
  }

  void multiply(int64_t chunk, int64_t first_panel, int64_t last_panel, T* sums, int64_t* targets, int64_t* sources, P* tap_filters,
                RowBlock<E, P, T>& block) const {
    const int64_t first = chunk * units_per_chunk, last = least(first + units_per_chunk, units);
    const int64_t rows = (last - first) * plan.target_edge, step = (rows + 1) * kPanel<T>, per_group = filters.panels<T>();
    std::memset(sums, 0, static_cast<size_t>((last_panel - first_panel) * step) * sizeof(T));
    for (int64_t tap = 0; tap < filters.taps; ++tap) {
      const int64_t count = plan.pairs(first, last, tap / filters.kernel_w, tap % filters.kernel_w, targets, sources);
      if (count == 0) continue;
      // The last block is filled up with a row whose sum nobody reads.
      for (int64_t i = count; i < count + kMaxBlockRows; ++i) targets[i] = rows, sources[i] = sources[count - 1];
      for (int64_t q = first_panel; q < last_panel; ++q)
        with_vectors(filters.vectors<T>(q % per_group), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          const P* filter = panels + filters.offset<T>(q / per_group, q % per_group) + tap * filters.depth * NV * kLanes<T>;
          if (pack_inside) {
            filters.pack_tap<W, E, P, T>(q / per_group, q % per_group, tap, tap_filters);
            filter = tap_filters;
          }
          this->template multiply_tap<NV>(filter, count, q / per_group, sums + (q - first_panel) * step, targets, sources, block);
        });
    }
    for (int64_t q = first_panel; q < last_panel; ++q) {
      const int64_t channel = q % per_group * kPanel<T>;
      finish(first * plan.target_edge, rows, q / per_group * filters.groups.outputs() + channel, least<int64_t>(kPanel<T>, filters.groups.outputs() - channel),
             filters.vectors<T>(q % per_group) * kLanes<T>, sums + (q - first_panel) * step);
    }
  }

  template <int NV>
  void multiply_tap(const P* filter, int64_t count, int64_t group, T* sums, const int64_t* targets, const int64_t* sources,
                    RowBlock<E, P, T>& block) const {
    constexpr int MR = block_rows(NV), width = NV * kLanes<T>;
    const int64_t depth = filters.depth;
    for (int64_t p = 0; p < depth; p += kDepthBlock) {
      const int64_t inputs = least(kDepthBlock, depth - p);
      for (int64_t i = 0; i < count; i += MR) {
        T* sum[MR];
        for (int r = 0; r < MR; ++r) sum[r] = sums + targets[i + r] * width;
        block.template read<MR>(pointer<E>(source), source.shape[1], sources + i, group * depth + p, inputs);
        multiply_block<MR, NV>(inputs, block.rows, filter + p * width, sum);
      }
    }
  }

  void finish(int64_t first, int64_t rows, int64_t channel, int64_t lanes, int64_t width, const T* sums) const {
    const int64_t channels = target.shape[1];
    T added[kPanel<T>] = {};
    if (!is_none(bias))
      for (int64_t lane = 0; lane < lanes; ++lane) added[lane] = widen(pointer<E>(bias)[channel + lane]);
    E* out = pointer<E>(target) + first * channels + channel;
    for (int64_t row = 0; row < rows; ++row, out += channels, sums += width)
      for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = narrow<E>(sums[lane] + added[lane]);
  }
};

// W: type of the weight, E: of the features, P: of both in a product.
template <class W, class E, class P>
void convolve(const View& source, const View& bias, const View& target, const Neighbours& plan, const Window& window, const Filters& filters,
              const View& workspace, bool stem, int64_t threads) {
  using T = typename Wide<E>::type;
  P* panels = static_cast<P*>(workspace.data);
  const int64_t panel_count = filters.groups.count * filters.panels<T>();
  const int64_t units = target.shape[0] * target.shape[2];
  const int64_t filter_bytes = filters.groups.count * filters.group_size<T>() * static_cast<int64_t>(sizeof(P));
  // Large filters over few rows: packed by whoever uses them, since writing all of them out costs as much as the products. The sums of
  // all rows must fit the cache, and there must be panels enough for the threads.
  const bool pack_inside = !stem && filter_bytes >= kLargeFilters && units * target.shape[2] <= kFewRows && panel_count >= 2 * threads;
  if (!pack_inside) parallel_for(panel_count, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / filters.panels<T>(), panel = i % filters.panels<T>();
      filters.pack_panel<W, E, P, T>(group, panel, panels + filters.offset<T>(group, panel));
    }
  });
  if (stem) return stem_forward(source, plan, window, filters, panels, bias, target, threads);
  // Smaller chunks where there would be too few tasks for the threads; the sums do not depend on how the work is cut.
  const int64_t wanted = most<int64_t>(1, 4 * threads / panel_count);
  const int64_t units_per_chunk = pack_inside ? units : most<int64_t>(1, least(kChunkRows / target.shape[2], units / wanted));
  const int64_t chunks = (units + units_per_chunk - 1) / units_per_chunk;
  const int64_t panel_bytes = units_per_chunk * target.shape[2] * least<int64_t>(kPanel<T>, filters.groups.outputs()) * static_cast<int64_t>(sizeof(T));
  const int64_t panels_per_task = pack_inside ? 1 : most<int64_t>(1, least(least(kSumBytes / panel_bytes, panel_count), chunks * panel_count / (4 * threads)));
  // Whichever of rows and filters would be read again from farther away stays in the inner loop.
  const int64_t per_group = filters.panels<T>();
  const int64_t source_bytes = source.shape[0] * source.shape[1] * source.shape[2] * source.shape[3] * static_cast<int64_t>(sizeof(E));
  const bool chunks_outside = (per_group - 1) * source_bytes > (chunks - 1) * filter_bytes;
  const Product<W, E, P, T> product{source, bias, target, plan, filters, panels, units, units_per_chunk, panel_count, panels_per_task, chunks_outside, pack_inside};
  parallel_for(product.panel_blocks() * product.chunks(), 1, threads, [&](int64_t begin, int64_t end) { product.run(begin, end); });
}

// A weight in float32 is rounded to the features' half type as it is packed.
DType weight_dtype(const View& source, const View& weight) {
  const bool half = source.dtype == DType::kBFloat16 || source.dtype == DType::kFloat16;
  return half && weight.dtype == DType::kFloat32 ? DType::kFloat32 : source.dtype;
}

void check_conv(const char* op, const View& source, const View& weight, const View& bias, const View& coords, const View& slots, const Window& w,
                const View& workspace, const View& target, bool adjoint) {
  check(op, source, 4);
  check(op, weight, 4, weight_dtype(source, weight));
  check(op, target, 4, source.dtype);
  check_channels_last(op, source);
  check_channels_last(op, target);
  check_places(op, coords, slots, source.shape[0]);
  const View &x = adjoint ? target : source, &y = adjoint ? source : target;
  if (target.shape[0] != coords.shape[0]) fail("%s: out must have the plan's number of tiles", op);
  if (x.shape[2] != x.shape[3] || y.shape[2] != y.shape[3] || y.shape[2] * w.stride != x.shape[2]) fail("%s: tiles do not fit the stride", op);
  if (weight.shape[0] != y.shape[1] || weight.shape[1] * w.groups != x.shape[1] || weight.shape[0] % w.groups) fail("%s: weight does not fit the channels", op);
  if (!is_none(bias)) {
    check(op, bias, 1, source.dtype);
    check_contiguous(op, bias);
    if (bias.shape[0] != target.shape[1]) fail("%s: bias does not fit the channels", op);
  }
  const Filters filters(weight, w, adjoint, false);
  const bool wide = source.dtype == DType::kFloat64;
  check(op, workspace, 1, wide ? DType::kFloat64 : DType::kFloat32);
  const int64_t needed = filters.groups.count * (wide ? filters.group_size<double>() : filters.group_size<float>());
  if (workspace.shape[0] < needed) fail("%s: workspace must have %lld elements", op, static_cast<long long>(needed));
}

void run(const char* op, const View& source, const View& weight, const View& bias, const View& coords, const View& slots, const Ints& geometry,
         const View& workspace, const View& target, int64_t threads, bool adjoint) {
  const Window w = window_of(op, geometry, weight.shape[2], weight.shape[3]);
  check_conv(op, source, weight, bias, coords, slots, w, workspace, target, adjoint);
  if (target.shape[0] == 0 || target.shape[1] == 0 || target.shape[2] == 0 || source.shape[1] == 0) return;
  const Neighbours plan(coords, slots, w, target.shape[2], source.shape[2], adjoint);
  const bool stem = !adjoint && is_stem(w, source.shape[1]);
  const Filters filters(weight, w, adjoint, kHasDot && !stem && source.dtype == DType::kBFloat16);
  const bool rounds = weight.dtype != source.dtype;
#if defined(__AVX512BF16__)
  if (filters.dot && rounds) return convolve<float, BFloat16, BFloat16>(source, bias, target, plan, w, filters, workspace, stem, threads);
  if (filters.dot) return convolve<BFloat16, BFloat16, BFloat16>(source, bias, target, plan, w, filters, workspace, stem, threads);
#endif
  with_float(op, source.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(E) == 2)
      if (rounds) return convolve<float, E, typename Wide<E>::type>(source, bias, target, plan, w, filters, workspace, stem, threads);
    convolve<E, E, typename Wide<E>::type>(source, bias, target, plan, w, filters, workspace, stem, threads);
  });
}

}  // namespace

void tile_conv_forward(const View& x, const View& weight, const View& bias, const View& coords, const View& slots, const Ints& geometry,
                       const View& workspace, const View& out, int64_t threads) {
  run("tile_conv", x, weight, bias, coords, slots, geometry, workspace, out, threads, false);
}

void tile_conv_grad_input(const View& grad, const View& weight, const View& coords, const View& slots, const Ints& geometry,
                          const View& workspace, const View& out, int64_t threads) {
  run("tile_conv_grad_input", grad, weight, View{}, coords, slots, geometry, workspace, out, threads, true);
}

}  // namespace MWM_ISA
}  // namespace mwm
