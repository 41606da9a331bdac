// Derivatives of tile_conv in the filters and the bias.
//
// A task is a tap, a panel of channels of one side (the features where they are many, else the gradient), a range of channels of
// the other side and a fixed share of the tiles. Pairs of rows that the tap joins are copied into two small panels and
// multiplied as an outer product whose sums stay in registers. Shares depend on shapes only and are added in order.
#include "conv_block.h"
#include "conv_filters.h"
#include "conv_outer.h"
#include "conv_stem.h"
#include "conv_window.h"

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int64_t kPairs = 128, kRange = 128;

typedef uint32_t AliasedWord __attribute__((may_alias));

// Copies `width` channels of the listed rows; `lanes` of them exist, the rest is zero. With kDot pairs of rows are interleaved.
template <bool kDot, class E, class P>
inline void gather(const E* x, int64_t channels, const int64_t* rows, int64_t count, int64_t offset, int64_t lanes, int64_t width, P* out) {
  if constexpr (kDot) {
    for (int64_t i = 0; i < count; i += 2, out += 2 * width) {
      AliasedWord* words = reinterpret_cast<AliasedWord*>(out);
      const E* first = x + rows[i] * channels + offset;
      if (i + 1 < count) {
        const E* second = x + rows[i + 1] * channels + offset;
        for (int64_t lane = 0; lane < lanes; ++lane) words[lane] = first[lane].bits | static_cast<uint32_t>(second[lane].bits) << 16;
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane) words[lane] = first[lane].bits;
      }
      for (int64_t lane = 2 * lanes; lane < 2 * width; ++lane) out[lane] = P{};
    }
  } else {
    if constexpr (sizeof(E) == sizeof(P)) {
      if (lanes % kLanes<P> == 0 && lanes == width) {
        for (int64_t i = 0; i < count; ++i, out += width) {
          const P* from = reinterpret_cast<const P*>(x) + rows[i] * channels + offset;
          for (int64_t lane = 0; lane < width; lane += kLanes<P>) store(out + lane, load(from + lane));
        }
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i, out += width) {
      const E* from = x + rows[i] * channels + offset;
      for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = widen(from[lane]);
      for (int64_t lane = lanes; lane < width; ++lane) out[lane] = P{};
    }
  }
}

// The place of filter elements: strides of [split][output][input][kh][kw]; partial sums lie as in a channels-last filter.
struct Place {
  void* data;
  int64_t split, output, input, tap_h, tap_w;
};

template <bool kDot, class E, class P, class T>
struct OuterProduct {
  const View &grad, &x;
  const Neighbours& plan;
  const Groups& groups;
  const Window& window;
  bool vectors_on_x;
  int64_t splits;
  Place place;
  bool wide;  // place has type T: sums, or a result in it; else a result of type E

  int64_t vector_channels() const { return vectors_on_x ? groups.inputs() : groups.outputs(); }
  int64_t other_channels() const { return vectors_on_x ? groups.outputs() : groups.inputs(); }
  int64_t panels() const { return (vector_channels() + kPanel<T> - 1) / kPanel<T>; }
  int64_t ranges() const { return (other_channels() + kRange - 1) / kRange; }
  int64_t tasks() const { return splits * groups.count * window.taps() * panels() * ranges(); }

  void run(int64_t begin, int64_t end) const {
    const int64_t capacity = kPairs + plan.target_edge;
    Scratch<int64_t> targets(capacity), sources(capacity);
    Scratch<P> vectors((kPairs + 2) * kPanel<T>), others((kPairs + 2) * (kRange + 16));
    Scratch<T> sums(kRange * kPanel<T>);
    for (int64_t task = begin; task < end; ++task) {
      int64_t rest = task;
      const int64_t range = rest % ranges();
      rest /= ranges();
      const int64_t panel = rest % panels();
      rest /= panels();
      const int64_t tap = rest % window.taps();
      rest /= window.taps();
      const int64_t group = rest % groups.count, split = rest / groups.count;
      const int64_t lanes = least<int64_t>(kPanel<T>, vector_channels() - panel * kPanel<T>);
      with_vectors(static_cast<int>((lanes + kLanes<T> - 1) / kLanes<T>), [&](auto count) {
        this->template one<decltype(count)::value>(split, group, tap, panel * kPanel<T>, lanes, range * kRange, targets.data(), sources.data(),
                                                   vectors.data(), others.data(), sums.data());
      });
    }
  }

  template <int NV>
  void one(int64_t split, int64_t group, int64_t tap, int64_t first_vector, int64_t lanes, int64_t first_other, int64_t* targets, int64_t* sources,
           P* vectors, P* others, T* sums) const {
    constexpr int64_t MR = block_rows(NV), width = NV * kLanes<T>;
    const int64_t range = least(kRange, other_channels() - first_other), step = range + 16;
    const int64_t tiles = grad.shape[0], edge = plan.target_edge;
    const int64_t first = tiles * split / splits * edge, last = tiles * (split + 1) / splits * edge;
    std::memset(sums, 0, static_cast<size_t>(range * width) * sizeof(T));
    const View &vector_side = vectors_on_x ? x : grad, &other_side = vectors_on_x ? grad : x;
    const int64_t* vector_rows = vectors_on_x ? sources : targets;
    const int64_t* other_rows = vectors_on_x ? targets : sources;
    int64_t count = 0;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t more = plan.pairs(unit, unit + 1, tap / window.kernel_w, tap % window.kernel_w, targets + count, sources + count);
      for (int64_t i = count; i < count + more; ++i) targets[i] += unit * edge;
      count += more;
      while (count >= kPairs || (unit == last - 1 && count > 0)) {
        const int64_t taken = least(count, kPairs);
        gather<kDot>(pointer<E>(vector_side), vector_side.shape[1], vector_rows, taken, group * vector_channels() + first_vector, lanes, width, vectors);
        gather<kDot>(pointer<E>(other_side), other_side.shape[1], other_rows, taken, group * other_channels() + first_other, range, step, others);
        for (int64_t r = 0; r < range; r += MR)
          outer_rows<MR, NV>(least(MR, range - r), taken, others + (kDot ? 2 : 1) * r, step, vectors, sums + r * width);
        count -= taken;
        std::memmove(targets, targets + taken, static_cast<size_t>(count) * sizeof *targets);
        std::memmove(sources, sources + taken, static_cast<size_t>(count) * sizeof *sources);
      }
    }
    const int64_t other_step = vectors_on_x ? place.output : place.input, vector_step = vectors_on_x ? place.input : place.output;
    const int64_t corner = split * place.split + group * groups.outputs() * place.output + tap / window.kernel_w * place.tap_h +
                           tap % window.kernel_w * place.tap_w;
    if (groups.joined == 1) {
      const int64_t at = corner + first_other * other_step + first_vector * vector_step;
      if (wide) write(static_cast<T*>(place.data) + at, range, lanes, width, other_step, vector_step, sums);
      else write(static_cast<E*>(place.data) + at, range, lanes, width, other_step, vector_step, sums);
      return;
    }
    for (int64_t r = 0; r < range; ++r)
      for (int64_t lane = 0; lane < lanes; ++lane)
        put(corner, vectors_on_x ? first_other + r : first_vector + lane, vectors_on_x ? first_vector + lane : first_other + r,
            sums[r * width + lane]);
  }

  template <class Out>
  static void write(Out* out, int64_t range, int64_t lanes, int64_t width, int64_t other_step, int64_t vector_step, const T* sums) {
    for (int64_t r = 0; r < range; ++r, out += other_step, sums += width) {
      if (vector_step == 1)
        for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = narrow<Out>(sums[lane]);
      else
        for (int64_t lane = 0; lane < lanes; ++lane) out[lane * vector_step] = narrow<Out>(sums[lane]);
    }
  }

  void put(int64_t corner, int64_t output, int64_t input, T value) const {
    if (output / groups.outputs_each != input / groups.inputs_each) return;  // outside of the diagonal of joined groups
    const int64_t at = corner + output * place.output + input % groups.inputs_each * place.input;
    if (wide) static_cast<T*>(place.data)[at] = value;
    else static_cast<E*>(place.data)[at] = narrow<E>(value);
  }
};

template <bool kDot, class E, class P>
void weight_gradient(const View& grad, const View& x, const Neighbours& plan, const Window& window, const View& sums, const View& out,
                     int64_t threads) {
  using T = typename Wide<E>::type;
  const Groups groups(window.groups, out.shape[1], out.shape[0] / window.groups);
  const int64_t splits = sums.shape[0], count = out.shape[0] * out.shape[1] * window.taps();
  const bool to_sums = splits > 1, wide = out.dtype != x.dtype;
  const Place place = to_sums ? Place{sums.data, count, out.shape[1] * window.taps(), 1, window.kernel_w * out.shape[1], out.shape[1]}
                              : Place{out.data, 0, out.strides[0], out.strides[1], out.strides[2], out.strides[3]};
  const bool vectors_on_x = groups.inputs() >= kLanes<T> || groups.inputs() >= groups.outputs();
  const OuterProduct<kDot, E, P, T> product{grad, x, plan, groups, window, vectors_on_x, splits, place, to_sums || wide};
  if (is_stem(window, x.shape[1]) && to_sums) stem_grad_weight(grad, x, plan, window, sums, threads);
  else parallel_for(product.tasks(), 1, threads, [&](int64_t begin, int64_t end) { product.run(begin, end); });
  if (!to_sums) return;
  parallel_for(count, 4096, threads, [&](int64_t begin, int64_t end) {
    const int64_t taps = window.taps(), inputs = out.shape[1];
    for (int64_t i = begin; i < end; ++i) {
      T total{};
      for (int64_t split = 0; split < splits; ++split) total += pointer<T>(sums)[split * count + i];
      const int64_t input = i % inputs, tap = i / inputs % taps, output = i / inputs / taps;
      const int64_t at = output * out.strides[0] + input * out.strides[1] + tap / window.kernel_w * out.strides[2] + tap % window.kernel_w * out.strides[3];
      if (wide) pointer<T>(out)[at] = total;
      else pointer<E>(out)[at] = narrow<E>(total);
    }
  });
}

}  // namespace

void tile_conv_grad_weight(const View& grad, const View& x, const View& coords, const View& slots, const Ints& geometry, const View& sums,
                           const View& out, int64_t threads) {
  const char* op = "tile_conv_grad_weight";
  const Window w = window_of(op, geometry, out.shape[2], out.shape[3]);
  check(op, x, 4);
  check(op, grad, 4, x.dtype);
  const bool half = x.dtype == DType::kBFloat16 || x.dtype == DType::kFloat16;
  check(op, out, 4, half && out.dtype == DType::kFloat32 ? DType::kFloat32 : x.dtype);
  check_channels_last(op, x);
  check_channels_last(op, grad);
  check_places(op, coords, slots, x.shape[0]);
  if (grad.shape[0] != coords.shape[0]) fail("%s: grad must have the plan's number of tiles", op);
  if (x.shape[2] != x.shape[3] || grad.shape[2] != grad.shape[3] || grad.shape[2] * w.stride != x.shape[2]) fail("%s: tiles do not fit the stride", op);
  if (out.shape[0] != grad.shape[1] || out.shape[1] * w.groups != x.shape[1] || out.shape[0] % w.groups) fail("%s: out does not fit the channels", op);
  check(op, sums, 2, x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  check_contiguous(op, sums);
  if (sums.shape[0] < 1 || (sums.shape[0] > 1 && sums.shape[1] != element_count(op, out))) fail("%s: sums must be [splits, filter elements]", op);
  if (element_count(op, out) == 0) return;
  const Neighbours plan(coords, slots, w, grad.shape[2], x.shape[2], false);
#if defined(__AVX512BF16__)
  if (x.dtype == DType::kBFloat16) return weight_gradient<true, BFloat16, BFloat16>(grad, x, plan, w, sums, out, threads);
#endif
  with_float(op, x.dtype, [&](auto element) {
    using E = decltype(element);
    weight_gradient<false, E, typename Wide<E>::type>(grad, x, plan, w, sums, out, threads);
  });
}

void tile_conv_grad_bias(const View& grad, const View& sums, const View& out, int64_t threads) {
  const char* op = "tile_conv_grad_bias";
  check(op, grad, 4);
  check(op, out, 1, grad.dtype);
  check_channels_last(op, grad);
  check_contiguous(op, out);
  check(op, sums, 2, grad.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  check_contiguous(op, sums);
  const int64_t channels = grad.shape[1], rows = grad.shape[0] * grad.shape[2] * grad.shape[3], splits = sums.shape[0];
  if (out.shape[0] != channels || sums.shape[1] != channels || splits < 1) fail("%s: sums and out must have %lld channels", op, static_cast<long long>(channels));
  with_float(op, grad.dtype, [&](auto element) {
    using E = decltype(element);
    using T = typename Wide<E>::type;
    parallel_for(splits, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t split = begin; split < end; ++split) {
        T* total = pointer<T>(sums) + split * channels;
        std::memset(total, 0, static_cast<size_t>(channels) * sizeof(T));
        // Blocks of rows are summed on their own first, which keeps rounding errors small.
        constexpr int64_t kRows = 32;
        Scratch<T> block(channels);
        const int64_t last = rows * (split + 1) / splits;
        for (int64_t row = rows * split / splits; row < last;) {
          std::memset(block.data(), 0, static_cast<size_t>(channels) * sizeof(T));
          for (const int64_t stop = least(row + kRows, last); row < stop; ++row) {
            const E* from = pointer<E>(grad) + row * channels;
            for (int64_t c = 0; c < channels; ++c) block[c] += widen(from[c]);
          }
          for (int64_t c = 0; c < channels; ++c) total[c] += block[c];
        }
      }
    });
    for (int64_t c = 0; c < channels; ++c) {
      T total{};
      for (int64_t split = 0; split < splits; ++split) total += pointer<T>(sums)[split * channels + c];
      pointer<E>(out)[c] = narrow<E>(total);
    }
  });
}

}  // namespace MWM_ISA
}  // namespace mwm
