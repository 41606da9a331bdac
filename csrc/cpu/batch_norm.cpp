// Batch norm of channels-last rows in training: moments, then (x - mean) * scale + bias with an optional residual and activation in
// the same pass, and the derivative of the whole in two passes over memory.
//
// Rows are cut into fixed shares and channels into blocks. A share is summed in blocks of rows, in the wide type, and the blocks in
// double; shares are joined in order. So neither threads nor the instruction set's width decide on the order of a channel's sum.
#include "rows.h"
#include "stream.h"

#include <cmath>

namespace mwm {
namespace MWM_ISA {
namespace {

constexpr int64_t kRows = 32, kColumns = 64;

enum Activation : int64_t { kNone, kRelu, kRelu6 };

template <int64_t N> struct Kind { static constexpr int64_t value = N; };

struct Rows {
  int64_t rows, channels, splits, columns;  // columns: of one task

  // Whole rows where the shares occupy the threads, as memory likes them; else as few blocks of channels as do.
  Rows(const View& x, int64_t shares, int64_t threads) : rows(x.shape[0] * x.shape[2] * x.shape[3]), channels(x.shape[1]), splits(shares) {
    const int64_t wanted = (threads + shares - 1) / shares;
    columns = most(kColumns, round_up((channels + wanted - 1) / most<int64_t>(wanted, 1), kColumns));
  }
  int64_t blocks() const { return (channels + columns - 1) / columns; }
  int64_t tasks() const { return splits * blocks(); }
  int64_t first(int64_t split) const { return rows * split / splits; }
};

template <class L>
inline typename L::V activated(typename L::V x, int64_t activation) {
  if (activation == kNone) return x;
  const auto zero = L::zero();
  x = L::where_below(x, zero, zero, x);
  if (activation == kRelu6) {
    const auto six = L::all(6);
    x = L::where_below(six, x, six, x);
  }
  return x;
}

// The gradient before the activation, from its result.
template <class L, int64_t kActivation>
inline typename L::V passed(typename L::V grad, typename L::V out) {
  const auto zero = L::zero();
  if constexpr (kActivation != kNone) grad = L::where_at_most(out, zero, zero, grad);
  if constexpr (kActivation == kRelu6) grad = L::where_at_most(L::all(6), out, zero, grad);
  return grad;
}

// Whether a result is written past the caches.
template <class E>
inline bool past_caches(const View& map) {
  constexpr int64_t kAlign = Lanes<E, true>::kStreamAlign;
  const int64_t row = map.shape[1] * int64_t{sizeof(E)};
  return map.shape[0] * map.shape[2] * map.shape[3] * row >= kStreamBytes && row % kAlign == 0 && reinterpret_cast<std::uintptr_t>(map.data) % kAlign == 0;
}

// Adds a channel's or a vector's worth of sums to totals in double.
template <class L>
inline void add_to(double* total, typename L::V sum) {
  typename L::T values[L::count];
  L::store_wide(values, sum);
  for (int64_t i = 0; i < L::count; ++i) total[i] += static_cast<double>(values[i]);
}

// Adds two sums per channel of [begin, end) over rows [first, last) to `one` and `two`, which start at `begin`; `add(lanes, row, c, &a, &b)`
// adds a row's. Few channels stay in registers down a block of rows. More would make that walk jump from row to row, at half of the
// memory's pace: their sums lie in the first cache, and `kSide` rows are read side by side, one where several maps come from memory, four
// where one does, which spares the cache. The order of a channel's sum is the same.
template <class E, int kSide, class Add>
void walk(int64_t first, int64_t last, int64_t begin, int64_t end, double* one, double* two, const Add& add) {
  using T = typename Wide<E>::type;
  using Full = Lanes<E, true>;
  constexpr int kGroup = 4;
  const bool narrow = end - begin <= kGroup * Full::count;
  Scratch<T> kept(narrow ? 0 : 2 * (end - begin));
  T *a = kept.data(), *b = a + (end - begin);
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t stop = least(row + kRows, last);
    if (narrow) {
      for_groups<E>(begin, end, [&](auto lanes, auto group, int64_t c) {
        using L = decltype(lanes);
        constexpr int kVectors = decltype(group)::value;
        typename L::V total[kVectors], total_two[kVectors];
        MWM_UNROLL for (int v = 0; v < kVectors; ++v) total[v] = total_two[v] = L::zero();
        for (int64_t r = row; r < stop; ++r) MWM_UNROLL for (int v = 0; v < kVectors; ++v) add(L{}, r, c + v * L::count, &total[v], &total_two[v]);
        MWM_UNROLL for (int v = 0; v < kVectors; ++v) {
          add_to<L>(one + c - begin + v * L::count, total[v]);
          add_to<L>(two + c - begin + v * L::count, total_two[v]);
        }
      });
      continue;
    }
    std::memset(kept.data(), 0, static_cast<size_t>(2 * (end - begin)) * sizeof(T));
    const auto more = [&](auto rows, int64_t r) {
      for_lanes<E>(begin, end, [&](auto lanes, int64_t c) {
        using L = decltype(lanes);
        auto total = L::load_wide(a + c - begin), total_two = L::load_wide(b + c - begin);
        MWM_UNROLL for (int i = 0; i < decltype(rows)::value; ++i) add(L{}, r + i, c, &total, &total_two);
        L::store_wide(a + c - begin, total);
        L::store_wide(b + c - begin, total_two);
      });
    };
    int64_t r = row;
    for (; r + kSide <= stop; r += kSide) more(Group<kSide>{}, r);
    for (; r < stop; ++r) more(Group<1>{}, r);
    for (int64_t c = 0; c < end - begin; ++c) one[c] += static_cast<double>(a[c]), two[c] += static_cast<double>(b[c]);
  }
}

// Of a share and a block of channels: mean and sum of squared deviations.
template <class E>
void share_moments(const E* x, const Rows& shape, int64_t split, int64_t begin, int64_t end, double* mean, double* squares) {
  using T = typename Wide<E>::type;
  const int64_t first = shape.first(split), last = shape.first(split + 1), count = last - first;
  Scratch<T> shift(end - begin);
  Scratch<double> sum(end - begin), square(end - begin);
  for (int64_t c = 0; c < end - begin; ++c) sum[c] = square[c] = 0;
  // Deviations are taken from the mean of the first rows, so that a mean far from zero does not swallow the variance.
  const int64_t head = least(kRows, count);
  for_lanes<E>(begin, end, [&](auto lanes, int64_t c) {
    using L = decltype(lanes);
    auto total = L::zero();
    for (int64_t r = first; r < first + head; ++r) total = total + L::load(x + r * shape.channels + c);
    L::store_wide(shift.data() + c - begin, total * L::all(static_cast<T>(1) / static_cast<T>(most<int64_t>(head, 1))));
  });
  walk<E, 4>(first, last, begin, end, sum.data(), square.data(), [&](auto lanes, int64_t row, int64_t c, auto* total, auto* total_square) {
    using L = decltype(lanes);
    const auto d = L::load(x + row * shape.channels + c) - L::load_wide(shift.data() + c - begin);
    *total = *total + d;
    *total_square = L::multiply_add(d, d, *total_square);
  });
  for (int64_t c = 0; c < end - begin; ++c) {
    const double off = sum[c] / static_cast<double>(most<int64_t>(count, 1));
    mean[begin + c] = static_cast<double>(shift[c]) + off;
    squares[begin + c] = most(0.0, square[c] - sum[c] * off);
  }
}

template <class E>
void moments(const View& x, const View& sums, const View& mean, const View& var, const View& running_mean, const View& running_var, double momentum,
             int64_t threads) {
  using T = typename Wide<E>::type;
  const Rows shape(x, sums.shape[0], threads);
  double* parts = pointer<double>(sums);
  parallel_for(shape.tasks(), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t split = task / shape.blocks(), begin = task % shape.blocks() * shape.columns;
      double* part = parts + split * 2 * shape.channels;
      share_moments<E>(pointer<E>(x), shape, split, begin, least(begin + shape.columns, shape.channels), part, part + shape.channels);
    }
  });
  // Chan, Golub, LeVeque (1979): joins shares without taking the difference of large numbers.
  for (int64_t c = 0; c < shape.channels; ++c) {
    double count = 0, centre = 0, squares = 0;
    for (int64_t split = 0; split < shape.splits; ++split) {
      const double more = static_cast<double>(shape.first(split + 1) - shape.first(split)), both = count + more;
      if (more == 0) continue;
      const double* part = parts + split * 2 * shape.channels;
      const double delta = part[c] - centre;
      centre += delta * more / both;
      squares += part[shape.channels + c] + delta * delta * count * more / both;
      count = both;
    }
    pointer<T>(mean)[c] = static_cast<T>(centre);
    pointer<T>(var)[c] = static_cast<T>(squares / count);
    if (is_none(running_mean)) continue;
    T& kept_mean = pointer<T>(running_mean)[c];
    T& kept_var = pointer<T>(running_var)[c];
    kept_mean = static_cast<T>((1 - momentum) * static_cast<double>(kept_mean) + momentum * centre);
    kept_var = static_cast<T>((1 - momentum) * static_cast<double>(kept_var) + momentum * squares / (count - 1));
  }
}

// weight / sqrt(var + eps) by channel.
template <class T>
void fill_scale(const View& weight, const View& var, double eps, T* scale) {
  for (int64_t c = 0; c < var.shape[0]; ++c) {
    const double factor = is_none(weight) ? 1.0 : static_cast<double>(pointer<T>(weight)[c]);
    scale[c] = static_cast<T>(factor / std::sqrt(static_cast<double>(pointer<T>(var)[c]) + eps));
  }
}

template <class E, int64_t kActivation>
void apply(const View& x, const View& residual, const View& weight, const View& bias, const View& mean, const View& var, double eps, const View& out,
           int64_t threads) {
  using T = typename Wide<E>::type;
  const int64_t channels = x.shape[1], rows = x.shape[0] * x.shape[2] * x.shape[3];
  Scratch<T> scale(channels), shift(channels);
  fill_scale<T>(weight, var, eps, scale.data());
  for (int64_t c = 0; c < channels; ++c) shift[c] = is_none(bias) ? T{} : pointer<T>(bias)[c];
  const T* centre = pointer<T>(mean);
  const E* added = is_none(residual) ? nullptr : pointer<E>(residual);
  const bool past = past_caches<E>(out);
  parallel_for(rows, most<int64_t>(1, 8192 / channels), threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const E* from = pointer<E>(x) + r * channels;
      const E* more = added ? added + r * channels : nullptr;
      E* to = pointer<E>(out) + r * channels;
      for_lanes<E>(0, channels, [&](auto lanes, int64_t c) {
        using L = decltype(lanes);
        auto y = L::multiply_add(L::load(from + c) - L::load_wide(centre + c), L::load_wide(scale.data() + c), L::load_wide(shift.data() + c));
        if (more) y = y + L::load(more + c);
        y = activated<L>(y, kActivation);
        if (past) L::stream(to + c, y);
        else L::store(to + c, y);
      });
    }
    if (past) finish_streaming();
  });
}

// What the derivative reads. Without a residual the result that the activation's mask needs is computed again from x, bit for bit.
template <class E, int64_t kActivation>
struct Derivative {
  using T = typename Wide<E>::type;
  const E *grad, *x, *out;
  E* grad_residual;
  const T *centre, *scale, *shift;
  int64_t channels;

  // The gradient before the activation, and x - mean.
  template <class L>
  void read(int64_t at, int64_t c, typename L::V* g, typename L::V* d) const {
    *g = L::load(grad + at + c);
    *d = L::load(x + at + c) - L::load_wide(centre + c);
    if constexpr (kActivation != kNone) {
      if (out) *g = passed<L, kActivation>(*g, L::load(out + at + c));
      else *g = passed<L, kActivation>(*g, L::multiply_add(*d, L::load_wide(scale + c), L::load_wide(shift + c)));
    }
  }

  // Of a share and a block of channels: sums of that gradient, and of its product with x - mean.
  void share(const Rows& shape, int64_t split, int64_t begin, int64_t end, double* sum, double* product) const {
    for (int64_t c = begin; c < end; ++c) sum[c] = product[c] = 0;
    walk<E, 1>(shape.first(split), shape.first(split + 1), begin, end, sum + begin, product + begin, [&](auto lanes, int64_t row, int64_t c, auto* total, auto* total_product) {
      using L = decltype(lanes);
      typename L::V g, d;
      read<L>(row * channels, c, &g, &d);
      *total = *total + g;
      *total_product = L::multiply_add(g, d, *total_product);
      if (grad_residual) L::store(grad_residual + row * channels + c, g);
    });
  }
};

template <class E, int64_t kActivation>
void derivative(const View& grad, const View& x, const View& out, const View& weight, const View& bias, const View& mean, const View& var, double eps,
                const View& sums, const View& grad_x, const View& grad_residual, const View& grad_weight, const View& grad_bias, int64_t threads) {
  using T = typename Wide<E>::type;
  const Rows shape(x, sums.shape[0], threads);
  const int64_t channels = shape.channels;
  Scratch<T> scale(channels), shift(channels), slope(channels), constant(channels);
  fill_scale<T>(weight, var, eps, scale.data());
  for (int64_t c = 0; c < channels; ++c) shift[c] = is_none(bias) ? T{} : pointer<T>(bias)[c];
  Derivative<E, kActivation> from{pointer<E>(grad), pointer<E>(x), is_none(out) ? nullptr : pointer<E>(out), is_none(grad_residual) ? nullptr : pointer<E>(grad_residual),
                                  pointer<T>(mean), scale.data(), shift.data(), channels};
  double* parts = pointer<double>(sums);
  parallel_for(shape.tasks(), 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t split = task / shape.blocks(), begin = task % shape.blocks() * shape.columns;
      double* part = parts + split * 2 * channels;
      from.share(shape, split, begin, least(begin + shape.columns, channels), part, part + channels);
    }
  });
  const double rows = static_cast<double>(shape.rows);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, product = 0;
    for (int64_t split = 0; split < shape.splits; ++split) sum += parts[split * 2 * channels + c], product += parts[(split * 2 + 1) * channels + c];
    const double variance = static_cast<double>(pointer<T>(var)[c]) + eps;
    slope[c] = static_cast<T>(-product / (variance * rows));
    constant[c] = static_cast<T>(-sum / rows);
    if (!is_none(grad_weight)) pointer<T>(grad_weight)[c] = static_cast<T>(product / std::sqrt(variance));
    if (!is_none(grad_bias)) pointer<T>(grad_bias)[c] = static_cast<T>(sum);
  }
  if (is_none(grad_x)) return;
  E* to = pointer<E>(grad_x);
  const bool past = past_caches<E>(grad_x);
  const auto write = [&](const auto& reader) {
    parallel_for(shape.rows, most<int64_t>(1, 8192 / channels), threads, [&](int64_t first, int64_t last) {
      for (int64_t at = first * channels; at < last * channels; at += channels)
        for_lanes<E>(0, channels, [&](auto lanes, int64_t c) {
          using L = decltype(lanes);
          typename L::V g, d;
          reader.template read<L>(at, c, &g, &d);
          const auto inner = L::multiply_add(d, L::load_wide(slope.data() + c), g + L::load_wide(constant.data() + c));
          if (past) L::stream(to + at + c, inner * L::load_wide(scale.data() + c));
          else L::store(to + at + c, inner * L::load_wide(scale.data() + c));
        });
      if (past) finish_streaming();
    });
  };
  // The residual's gradient has the mask in it already.
  if (from.grad_residual) write(Derivative<E, kNone>{from.grad_residual, from.x, nullptr, nullptr, from.centre, from.scale, from.shift, channels});
  else write(from);
}

template <class Function>
void with_activation(const char* op, int64_t activation, const Function& function) {
  switch (activation) {
    case kNone: return function(Kind<kNone>{});
    case kRelu: return function(Kind<kRelu>{});
    case kRelu6: return function(Kind<kRelu6>{});
    default: fail("%s: activation must be 0, 1 or 2, got %lld", op, static_cast<long long>(activation));
  }
}

DType wide_type(const View& x) { return x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

void check_map(const char* op, const View& map, const View& like) {
  check(op, map, 4, like.dtype);
  check_channels_last(op, map);
  for (int i = 0; i < 4; ++i)
    if (map.shape[i] != like.shape[i]) fail("%s: maps must have one shape", op);
}

void check_channels(const char* op, const View& row, const View& like) {
  check(op, row, 1, wide_type(like));
  check_contiguous(op, row);
  if (row.shape[0] != like.shape[1]) fail("%s: rows must have %lld channels", op, static_cast<long long>(like.shape[1]));
}

void check_sums(const char* op, const View& sums, const View& x) {
  check(op, sums, 3, DType::kFloat64);
  check_contiguous(op, sums);
  if (sums.shape[0] < 1 || sums.shape[1] != 2 || sums.shape[2] != x.shape[1]) fail("%s: sums must be [splits, 2, C]", op);
}

}  // namespace

void batch_norm_moments(const View& x, const View& sums, const View& mean, const View& var, const View& running_mean, const View& running_var,
                        double momentum, int64_t threads) {
  const char* op = "batch_norm_moments";
  check_map(op, x, x);
  check_sums(op, sums, x);
  check_channels(op, mean, x);
  check_channels(op, var, x);
  if (is_none(running_mean) != is_none(running_var)) fail("%s: running_mean and running_var come together", op);
  if (!is_none(running_mean)) {
    check_channels(op, running_mean, x);
    check_channels(op, running_var, x);
  }
  if (x.shape[0] * x.shape[2] * x.shape[3] < 2) fail("%s: needs two rows or more", op);
  with_float(op, x.dtype, [&](auto element) { moments<decltype(element)>(x, sums, mean, var, running_mean, running_var, momentum, threads); });
}

void batch_norm_apply(const View& x, const View& residual, const View& weight, const View& bias, const View& mean, const View& var, double eps,
                      int64_t activation, const View& out, int64_t threads) {
  const char* op = "batch_norm_apply";
  check_map(op, x, x);
  check_map(op, out, x);
  if (!is_none(residual)) check_map(op, residual, x);
  const View* rows[] = {&weight, &bias};
  for (const View* row : rows)
    if (!is_none(*row)) check_channels(op, *row, x);
  check_channels(op, mean, x);
  check_channels(op, var, x);
  if (x.shape[1] == 0) return;
  with_activation(op, activation, [&](auto kind) {
    with_float(op, x.dtype, [&](auto element) { apply<decltype(element), decltype(kind)::value>(x, residual, weight, bias, mean, var, eps, out, threads); });
  });
}

void batch_norm_backward(const View& grad, const View& x, const View& out, const View& weight, const View& bias, const View& mean, const View& var,
                         double eps, int64_t activation, const View& sums, const View& grad_x, const View& grad_residual, const View& grad_weight,
                         const View& grad_bias, int64_t threads) {
  const char* op = "batch_norm_backward";
  check_map(op, x, x);
  check_map(op, grad, x);
  if (!is_none(out)) check_map(op, out, x);
  const View *maps[] = {&grad_x, &grad_residual}, *rows[] = {&weight, &bias, &grad_weight, &grad_bias};
  for (const View* map : maps)
    if (!is_none(*map)) check_map(op, *map, x);
  for (const View* row : rows)
    if (!is_none(*row)) check_channels(op, *row, x);
  check_channels(op, mean, x);
  check_channels(op, var, x);
  check_sums(op, sums, x);
  if (x.shape[1] == 0) return;
  with_activation(op, activation, [&](auto kind) {
    with_float(op, x.dtype, [&](auto element) {
      derivative<decltype(element), decltype(kind)::value>(grad, x, out, weight, bias, mean, var, eps, sums, grad_x, grad_residual, grad_weight, grad_bias, threads);
    });
  });
}

}  // namespace MWM_ISA
}  // namespace mwm
